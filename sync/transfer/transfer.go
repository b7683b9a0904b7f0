// Package transfer moves bytes over HTTPS between a device and the fleet's data
// plane, whatever the line does.
//
// A [Client] talks to the data plane's own addresses and to nobody else: a URL
// is a path below them, or absolute with the host of one of them. Redirects are
// refused, so an order cannot send a device elsewhere.
//
// [Client.Fetch] streams into a writer, in constant memory. When the line is
// cut it asks for the rest with Range and If-Range; the answer is taken up only
// if it carries the same strong ETag, so that the bytes of two files are never
// joined. Without a strong ETag a cut transfer fails, and its caller begins
// anew. What comes is capped at the size that the caller expects, before it is
// written. [Client.Put] sends a body that is at hand.
//
// Retries are bounded and backed off with full jitter; Retry-After is heeded. A
// refusal (4xx but 408 and 429) is never retried, an unreachable address makes
// way for the next one. A line on which no byte moves for [Client.Stall] counts
// as cut; waiting for its turn by a [Pace] is no stall.
//
// Bytes are not verified here: who fetches knows their digest.
package transfer

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

const (
	defaultStall    = 30 * time.Second
	defaultBackoff  = 250 * time.Millisecond
	maxBackoff      = 15 * time.Second
	maxRetryAfter   = time.Minute
	defaultFutile   = 6  // attempts in a row that brought nothing
	defaultAttempts = 60 // in all, progress or not
)

// Client fetches and puts. It may be used from any number of goroutines.
type Client struct {
	// HTTP does the requests: TLS, client certificate and proxy are its. Its own
	// timeout should be zero, since the size of a transfer is not known to it.
	HTTP *http.Client
	// Base tells the data plane's addresses ("https://host:port"), best first.
	// It is asked at each transfer, so they may change.
	Base func() []string
	// Stall is how long no byte may move; 0 means 30 s.
	Stall time.Duration
	// Backoff is the longest wait before the first retry, doubled for each in a
	// row that brings nothing, up to 15 s; 0 means 250 ms.
	Backoff time.Duration
	// Pace is the rate that all transfers of this client share; nil is none.
	Pace *Pace
	// Futile is how many attempts in a row may bring nothing; 0 means 6.
	Futile int
}

// Fetch writes the file at ref, of at most maxSize bytes, to w. On an error w
// has received a beginning of it. Errors are [*wire.Problem]s with
// [wire.CodeTransfer] and a sentence, or the context's own.
func (c *Client) Fetch(ctx context.Context, ref string, maxSize int64, w io.Writer) error {
	f := &fetch{max: maxSize, w: w}
	return c.persist(ctx, "fetch", ref, func(ctx context.Context, to string, l *line) (bool, error) {
		if c.Pace != nil {
			l.pace = &c.Pace.down
		}
		before := f.got
		err := f.attempt(ctx, c.client(), to, l)
		return f.got > before, err
	})
}

// Put sends data to ref. It may arrive several times. Errors as for [Client.Fetch].
func (c *Client) Put(ctx context.Context, ref string, data []byte, contentType string) error {
	return c.persist(ctx, "put", ref, func(ctx context.Context, to string, l *line) (bool, error) {
		if c.Pace != nil {
			l.pace = &c.Pace.up
		}
		return false, put(ctx, c.client(), to, data, contentType, l)
	})
}

// client is HTTP without redirects.
func (c *Client) client() *http.Client {
	own := *c.HTTP
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &own
}

// final is an error that no retry mends.
type final struct{ err error }

func (f final) Error() string { return f.err.Error() }

func finally(format string, args ...any) error { return final{fmt.Errorf(format, args...)} }

// refusal is an answer with a status of 300 or above.
type refusal struct {
	status int
	said   wire.APIError
	after  time.Duration // Retry-After
}

func (r *refusal) Error() string {
	what := fmt.Sprintf("the server answers %d %s", r.status, http.StatusText(r.status))
	if r.said.Reason != "" {
		what += fmt.Sprintf(" (%s: %s)", r.said.Code, r.said.Reason)
	}
	return what
}

// retry tells whether the same request may be answered differently later.
func (r *refusal) retry() bool {
	return r.status >= 500 || r.status == http.StatusRequestTimeout || r.status == http.StatusTooManyRequests
}

// try is one attempt. It tells the line of every byte that moves, and whether it
// brought the transfer forward.
type try func(ctx context.Context, to string, l *line) (progress bool, err error)

// persist repeats an attempt until it succeeds or there is no hope.
func (c *Client) persist(ctx context.Context, verb, ref string, once try) error {
	targets, err := c.resolve(ref)
	if err != nil {
		return problem(verb, ref, err)
	}
	futile, at := 0, 0
	for range defaultAttempts {
		var progress bool
		progress, err = c.bounded(ctx, targets[at%len(targets)], once)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var refused *refusal
		if errors.As(err, &final{}) || errors.As(err, &refused) && !refused.retry() {
			return problem(verb, ref, err)
		}
		if refused == nil { // nobody there, or cut: perhaps the next address
			at++
		}
		if futile++; progress {
			futile = 0
		}
		if futile >= cmp.Or(c.Futile, defaultFutile) {
			break
		}
		if err := c.pause(ctx, futile, refused); err != nil {
			return err
		}
	}
	return problem(verb, ref, fmt.Errorf("%w; given up after several attempts, it can be asked for again", err))
}

var errStalled = errors.New("no byte has come or gone for too long")

// bounded runs one attempt that is cut when nothing moves.
func (c *Client) bounded(ctx context.Context, to string, once try) (bool, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := cmp.Or(c.Stall, defaultStall)
	timer := time.AfterFunc(stall, func() { cancel(errStalled) })
	defer timer.Stop()
	progress, err := once(ctx, to, &line{timer: timer, stall: stall})
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		err = errStalled
	}
	return progress, err
}

func (c *Client) pause(ctx context.Context, futile int, refused *refusal) error {
	longest := min(cmp.Or(c.Backoff, defaultBackoff)<<max(0, futile-1), maxBackoff)
	wait := rand.N(longest)
	if refused != nil {
		wait = max(wait, refused.after)
	}
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// resolve makes the addresses to try out of a URL of an order.
func (c *Client) resolve(ref string) ([]string, error) {
	u, err := url.Parse(ref)
	if err != nil {
		return nil, errors.New("the URL cannot be read")
	}
	bases := c.Base()
	if len(bases) == 0 {
		return nil, errors.New("no address of the data plane is known")
	}
	var targets []string
	for _, b := range bases {
		base, err := url.Parse(b)
		if err != nil || base.Scheme != "https" || base.Host == "" {
			return nil, fmt.Errorf("%q is no address of a data plane: it must be https://host:port", b)
		}
		switch {
		case isPath(u, ref):
			targets = append(targets, base.ResolveReference(u).String())
		case u.Scheme == "https" && u.User == nil && strings.EqualFold(u.Host, base.Host):
			return []string{u.String()}, nil
		}
	}
	if len(targets) == 0 {
		return nil, errors.New("the URL does not lead to the data plane, and no other place is allowed")
	}
	return targets, nil
}

func isPath(u *url.URL, ref string) bool {
	return u.Scheme == "" && u.Host == "" && u.User == nil && u.Opaque == "" &&
		strings.HasPrefix(ref, "/") && !strings.HasPrefix(ref, "//") && !strings.HasPrefix(u.Path, "//")
}

// fetch is a download that may take several attempts.
type fetch struct {
	max   int64
	w     io.Writer
	got   int64  // bytes written to w
	etag  string // strong, of the first answer
	total int64  // size of the whole, if got > 0 and it is known; else -1
}

func (f *fetch) attempt(ctx context.Context, client *http.Client, to string, l *line) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, to, nil)
	if err != nil {
		return final{err}
	}
	req.Header.Set("Accept-Encoding", "identity") // offsets count the file's own bytes
	if f.got > 0 {
		if f.etag == "" {
			return finally("the line was cut after %d bytes, and without an ETag of the server the rest cannot be asked for", f.got)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", f.got))
		req.Header.Set("If-Range", f.etag)
	}
	resp, err := do(client, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	l.alive()
	if resp.StatusCode >= 300 {
		return readRefusal(resp)
	}
	if err := f.accept(resp); err != nil {
		return err
	}
	return f.copy(ctx, resp, l)
}

// do sends a request. What arrives after its context has ended is no answer: a
// server whose handler gives up because we do may say 200 to nothing.
func do(client *http.Client, req *http.Request) (*http.Response, error) {
	resp, err := client.Do(req)
	if err == nil && req.Context().Err() != nil {
		resp.Body.Close()
		return nil, context.Cause(req.Context())
	}
	return resp, err
}

// accept checks that the answer goes on where the last one was cut.
func (f *fetch) accept(resp *http.Response) error {
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return finally("the server sends the file encoded as %q, which was not asked for", enc)
	}
	etag := strongTag(resp.Header.Get("ETag"))
	if f.got == 0 {
		if resp.StatusCode != http.StatusOK {
			return finally("the server answers %d to a request for the whole file", resp.StatusCode)
		}
		if resp.ContentLength > f.max {
			return finally("the file has %d bytes, %d are expected", resp.ContentLength, f.max)
		}
		f.etag, f.total = etag, resp.ContentLength
		return nil
	}
	if resp.StatusCode != http.StatusPartialContent {
		return finally("the file has changed at the server while it was fetched, or the server knows no ranges")
	}
	if etag != "" && etag != f.etag {
		return finally("the file has changed at the server while it was fetched")
	}
	start, end, total, err := contentRange(resp.Header.Get("Content-Range"))
	if err != nil {
		return final{err}
	}
	if start != f.got || f.total >= 0 && total != f.total || total > f.max || end != total-1 {
		return finally("the server was asked for the bytes from %d and offers %q", f.got, resp.Header.Get("Content-Range"))
	}
	if resp.ContentLength >= 0 && resp.ContentLength != end-start+1 {
		return finally("the server announces %d bytes for the range %q", resp.ContentLength, resp.Header.Get("Content-Range"))
	}
	f.total = total
	return nil
}

// copy writes the body on, and never more than is expected.
func (f *fetch) copy(ctx context.Context, resp *http.Response, l *line) error {
	limit := f.max
	if f.total >= 0 {
		limit = f.total
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			l.alive()
			if f.got+int64(n) > limit {
				return finally("the server sends more than the %d bytes that are expected", limit)
			}
			if _, err := f.w.Write(buf[:n]); err != nil {
				return finally("what was fetched cannot be kept: %w", err)
			}
			f.got += int64(n)
			if err := l.pay(ctx, n); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if f.total >= 0 && f.got < f.total {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// strongTag is the tag if two answers with it have the same bytes (RFC 9110, 8.8.1).
func strongTag(tag string) string {
	if len(tag) < 2 || tag[0] != '"' || tag[len(tag)-1] != '"' {
		return ""
	}
	return tag
}

// contentRange reads "bytes 5-9/10".
func contentRange(s string) (start, end, total int64, err error) {
	bad := fmt.Errorf("the server sends a part of the file without saying which (%.60q)", s)
	span, ok := strings.CutPrefix(s, "bytes ")
	span, size, ok2 := strings.Cut(span, "/")
	from, to, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, 0, bad
	}
	for _, part := range []struct {
		text string
		into *int64
	}{{from, &start}, {to, &end}, {size, &total}} {
		n, err := strconv.ParseUint(part.text, 10, 62)
		if err != nil {
			return 0, 0, 0, bad
		}
		*part.into = int64(n)
	}
	return start, end, total, nil
}

func put(ctx context.Context, client *http.Client, to string, data []byte, contentType string, l *line) error {
	body := func() io.ReadCloser { return io.NopCloser(&watched{ctx, bytes.NewReader(data), l}) }
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, to, body())
	if err != nil {
		return final{err}
	}
	req.GetBody = func() (io.ReadCloser, error) { return body(), nil }
	req.ContentLength = int64(len(data))
	if len(data) == 0 {
		req.Body = http.NoBody
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := do(client, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	l.alive()
	if resp.StatusCode >= 300 {
		return readRefusal(resp)
	}
	// Read to the end, so that the connection is used again.
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	return nil
}

// watched tells the line of every read, and reads no faster than that allows.
type watched struct {
	ctx  context.Context // of the attempt
	r    io.Reader
	line *line
}

func (w *watched) Read(p []byte) (int, error) {
	w.line.alive()
	n, err := w.r.Read(p[:min(len(p), paceStep)])
	if n == 0 {
		return n, err
	}
	if late := w.line.pay(w.ctx, n); late != nil {
		return 0, late
	}
	return n, err
}

func readRefusal(resp *http.Response) error {
	r := &refusal{status: resp.StatusCode}
	if resp.StatusCode < 400 {
		return finally("the server redirects (%d) to another place, which is not allowed", resp.StatusCode)
	}
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, 8<<10))
	if json.Unmarshal(raw, &r.said) != nil {
		r.said = wire.APIError{}
	}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		r.after = min(time.Duration(s)*time.Second, maxRetryAfter)
	}
	return r
}

// problem says it to a person. The query of a URL is left out, since it may
// carry a ticket.
func problem(verb, ref string, err error) error {
	var inner *url.Error
	if errors.As(err, &inner) {
		err = fmt.Errorf("the data plane cannot be reached: %w", inner.Err)
	}
	if u, perr := url.Parse(ref); perr == nil {
		u.RawQuery, u.User = "", nil
		ref = u.String()
	}
	return wire.FailedBecause(wire.CodeTransfer, "could not %s %.120s: %v", verb, ref, err)
}
