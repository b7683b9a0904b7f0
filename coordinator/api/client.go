package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Context is where an operator's coordinator is and how to get in. "deimos
// serve" writes one for its own machine.
type Context struct {
	URL   string `json:"url"`   // https://host:port
	Token string `json:"token"` // operator token
	CA    string `json:"ca"`    // PEM
}

// Ready begins the line that "deimos serve" prints when it can be used.
const Ready = "The coordinator is ready"

// LoadContext reads a context file.
func LoadContext(path string) (Context, error) {
	var c Context
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, fmt.Errorf("there is no context file %s: it is written by \"deimos serve\"; copy it here, or name it with --context or DEIMOS_CONTEXT", path)
	}
	if err != nil {
		return c, fmt.Errorf("the context file cannot be read: %w", err)
	}
	if err := json.Unmarshal(raw, &c); err != nil || c.URL == "" || c.Token == "" || c.CA == "" {
		return c, fmt.Errorf("the context file %s is damaged: copy it again from the coordinator's folder", path)
	}
	return c, nil
}

// ErrUnreachable is in the error of a call that found no coordinator, ErrStalled in
// that of one whose request or answer stopped on the way.
var (
	ErrUnreachable = errors.New("cannot be reached")
	ErrStalled     = errors.New("for too long nothing more of it went through")
)

// Client talks to one coordinator. Its methods can be called concurrently.
type Client struct {
	base  *url.URL
	ca    string
	token string
	http  *http.Client
	stall time.Duration // how long no byte of a request, or of an answer that has begun, may go through
	whole time.Duration // how long an answer may take from its first byte to its last
}

// answerLimit is until an answer begins: the longest call waits for a device.
const answerLimit = 5 * time.Minute

// maxAnswer bounds what is read of an answer, in bytes.
const maxAnswer = 64 << 20

// NewClient trusts only the context's authority.
func NewClient(c Context) (*Client, error) {
	base, err := url.Parse(c.URL)
	if err != nil || base.Scheme != "https" || base.Hostname() == "" || base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return nil, fmt.Errorf("%q is no coordinator address, it looks like https://host:8443", c.URL)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.CA)) {
		return nil, errors.New("it holds no valid authority: copy it again from the coordinator's folder")
	}
	return &Client{base: base, ca: c.CA, token: c.Token, stall: time.Minute, whole: 30 * time.Minute, http: &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
			DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSHandshakeTimeout:   45 * time.Second, // over a link that is mostly away
			ResponseHeaderTimeout: answerLimit,
			MaxIdleConnsPerHost:   16,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Error is an answer that is a refusal.
type Error struct {
	Status int
	wire.APIError
}

func (e *Error) Error() string { return e.Reason }

// call makes one request. body may be nil, []byte, or anything JSON can hold.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, body any) ([]byte, error) {
	return c.callFor(ctx, method, path, query, body, maxAnswer)
}

// callFor is call for an answer of at most so many bytes.
func (c *Client) callFor(ctx context.Context, method, path string, query url.Values, body any, most int64) ([]byte, error) {
	content, upload := body.([]byte)
	kind := "application/octet-stream"
	if body != nil && !upload {
		var err error
		if content, err = json.Marshal(body); err != nil {
			return nil, err
		}
		kind = "application/json"
	}
	u := c.base.JoinPath("/api/v1", path)
	u.RawQuery = query.Encode()
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	sent := c.sending(req, func() { cut(ErrStalled) })
	defer sent()
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", kind)
	resp, err := c.http.Do(req)
	if err != nil && context.Cause(ctx) == ErrStalled {
		return nil, fmt.Errorf("the request to the coordinator at %s was cut off: %w", c.base.Host, ErrStalled)
	}
	if err != nil {
		return nil, c.explain(err)
	}
	sent()
	defer resp.Body.Close()
	var buf bytes.Buffer
	if resp.ContentLength > 0 && resp.ContentLength <= most {
		buf.Grow(int(resp.ContentLength) + bytes.MinRead)
	}
	answer := &watched{resp.Body, time.AfterFunc(c.stall, func() { cut(ErrStalled) }), c.stall}
	defer answer.timer.Stop()
	defer time.AfterFunc(c.whole, func() { cut(errSlow) }).Stop()
	if _, err := buf.ReadFrom(io.LimitReader(answer, most+1)); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("the coordinator's answer was cut off: %w", err)
	}
	raw := buf.Bytes()
	if int64(len(raw)) > most {
		return nil, fmt.Errorf("the coordinator's answer is larger than %d bytes", most)
	}
	if resp.StatusCode >= 300 {
		e := &Error{Status: resp.StatusCode}
		if json.Unmarshal(raw, &e.APIError) != nil || e.Reason == "" {
			e.Reason = fmt.Sprintf("the coordinator answered %s to %s %s", resp.Status, method, path)
		}
		return nil, e
	}
	return raw, nil
}

var errSlow = errors.New("it came too slowly to ever end")

// sending has stalled called when no byte of a request's body was taken for too long,
// until done is. The transport reads on beside its caller, and after it.
func (c *Client) sending(req *http.Request, stalled func()) (done func()) {
	open := req.GetBody
	if req.ContentLength == 0 {
		return func() {}
	}
	var mu sync.Mutex
	over := false
	// Before the first byte there is a connection to be made.
	timer := time.AfterFunc(c.stall+answerLimit, stalled)
	went := func(limit time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		if !over {
			timer.Reset(limit)
		}
	}
	req.GetBody = func() (io.ReadCloser, error) {
		body, err := open()
		return sentBody{body, func(err error) {
			if err == nil {
				went(c.stall)
			} else { // what is still in buffers, and the answer
				went(c.stall + answerLimit)
			}
		}}, err
	}
	req.Body, _ = req.GetBody() // of bytes in memory: it cannot fail
	return func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		timer.Stop()
	}
}

// sentBody tells of each read of a body.
type sentBody struct {
	io.ReadCloser
	read func(error)
}

func (b sentBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.read(err)
	return n, err
}

// watched notes that bytes come.
type watched struct {
	io.Reader
	timer *time.Timer
	stall time.Duration
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	if n > 0 {
		w.timer.Reset(w.stall)
	}
	return n, err
}

// segment makes any text one part of a path: dots too, or "." and ".." would
// lead elsewhere.
func segment(s string) string {
	if s == "." || s == ".." {
		return strings.ReplaceAll(s, ".", "%2E")
	}
	return url.PathEscape(s)
}

// explain turns a transport error into what a person can act on.
func (c *Client) explain(err error) error {
	var unknown x509.UnknownAuthorityError
	var cert *tls.CertificateVerificationError
	var plain tls.RecordHeaderError
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &unknown):
		return fmt.Errorf("the coordinator of this context %w: the server at %s is another (another authority signed its certificate); check the address, or copy the context file again", ErrUnreachable, c.base.Host)
	case errors.As(err, &cert):
		return fmt.Errorf("the coordinator at %s %w: its certificate is not good for that (%w); check the name in the address and this machine's clock", c.base.Host, ErrUnreachable, cert.Err)
	case errors.As(err, &plain), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return fmt.Errorf("the coordinator at %s %w: what answers there does not speak TLS; check the address and the port", c.base.Host, ErrUnreachable)
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return fmt.Errorf("the coordinator at %s %w (%v): is it running, and is the address right?", c.base.Host, ErrUnreachable, op.Err)
	}
	return fmt.Errorf("the coordinator at %s: %w", c.base.Host, err)
}

func ask[T any](ctx context.Context, c *Client, method, path string, query url.Values, body any) (T, error) {
	var v T
	raw, err := c.call(ctx, method, path, query, body)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, fmt.Errorf("the coordinator's answer to %s %s cannot be read: %w", method, path, err)
	}
	return v, nil
}

// PutModule uploads a WebAssembly module unless it is there, and returns its SHA-256.
func (c *Client) PutModule(ctx context.Context, module []byte) (string, error) {
	sum := sha256.Sum256(module)
	id := hex.EncodeToString(sum[:])
	_, err := c.call(ctx, http.MethodHead, "modules/"+id, nil, nil)
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound {
		_, err = c.call(ctx, http.MethodPut, "modules/"+id, nil, module)
	}
	return id, err
}

// PutRepoFile uploads one file of the update repository, e.g.
// "metadata/timestamp.json".
func (c *Client) PutRepoFile(ctx context.Context, path string, data []byte) error {
	_, err := c.call(ctx, http.MethodPut, repoPath(path), nil, data)
	return err
}

// RepoFile fetches one file of the update repository.
func (c *Client) RepoFile(ctx context.Context, path string) ([]byte, error) {
	return c.call(ctx, http.MethodGet, repoPath(path), nil, nil)
}

func repoPath(path string) string {
	var parts []string
	for p := range strings.SplitSeq(path, "/") {
		parts = append(parts, segment(p))
	}
	return "repo/" + strings.Join(parts, "/")
}

// RepoFiles lists what the update repository there has, by path.
func (c *Client) RepoFiles(ctx context.Context) ([]RepoFile, error) {
	return ask[[]RepoFile](ctx, c, http.MethodGet, "repo", nil, nil)
}

// Offer sends update orders.
func (c *Client) Offer(ctx context.Context, r OfferRequest) ([]Order, error) {
	return ask[[]Order](ctx, c, http.MethodPost, "offers", nil, r)
}
