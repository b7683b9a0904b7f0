package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/bundle"
)

// Limits bounds fetching in time. Zero values mean the defaults.
type Limits struct {
	Metadata time.Duration // for one file of metadata in one attempt; 1 min
	Window   time.Duration // a part must gain MinBytes in each window; 30 s
	MinBytes int64         // 16 KiB
	Attempts int           // in a row without any gain, before giving up; 4
	Pause    time.Duration // before the second attempt, doubling; 1 s
}

func (l Limits) orDefault() Limits {
	if l.Metadata == 0 {
		l.Metadata = time.Minute
	}
	if l.Window == 0 {
		l.Window = 30 * time.Second
	}
	if l.MinBytes == 0 {
		l.MinBytes = 16 << 10
	}
	if l.Attempts == 0 {
		l.Attempts = 4
	}
	if l.Pause == 0 {
		l.Pause = time.Second
	}
	return l
}

// errSlow ends a transfer that gains too little.
var errSlow = errors.New("too slow")

// fetch reads a small file of at most most bytes.
func (c *Client) fetch(ctx context.Context, path string, most int64) ([]byte, error) {
	for attempt := 1; ; attempt++ {
		raw, err := c.fetchOnce(ctx, path, most)
		if !c.retry(err) || attempt >= c.o.Limits.Attempts {
			return raw, err
		}
		if err := c.pause(ctx, attempt); err != nil {
			return nil, err
		}
	}
}

func (c *Client) fetchOnce(ctx context.Context, path string, most int64) ([]byte, error) {
	limited, cancel := context.WithTimeoutCause(ctx, c.o.Limits.Metadata, errSlow)
	defer cancel()
	r, err := c.o.Source.Open(limited, path, 0)
	if err != nil {
		return nil, transferError(ctx, limited, path, err)
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil {
		// A server that we hang up on may end its answer as if it were whole.
		err = limited.Err()
	}
	if err != nil {
		return nil, transferError(ctx, limited, path, err)
	}
	if int64(len(raw)) > most {
		return nil, &Error{Condition: Size, File: path, Reason: fmt.Sprintf("it does not end after the %d bytes that it may have", most)}
	}
	return raw, nil
}

// transferError says why bytes did not come. The end of the caller's ctx is
// handed back as it is.
func transferError(caller, limited context.Context, path string, err error) error {
	switch {
	case caller.Err() != nil:
		return caller.Err()
	case errors.Is(context.Cause(limited), errSlow):
		return &Error{Condition: Slow, File: path, Reason: "it comes too slowly to ever be complete", Err: err}
	case errors.Is(err, fs.ErrNotExist):
		return &Error{Condition: Missing, File: path, Reason: "it is not there", Err: err}
	}
	return &Error{Condition: Unreachable, File: path, Reason: fmt.Sprintf("it could not be fetched: %v", err), Err: err}
}

func (c *Client) retry(err error) bool {
	is := conditionOf(err)
	return !c.o.Local && (is == Slow || is == Unreachable)
}

// Passing tells whether bytes did not come for a reason that passes by itself: whoever has
// them is away, or the line is slow.
func Passing(err error) bool {
	is := conditionOf(err)
	return (is == Slow || is == Unreachable) && !errors.Is(err, errWasteful)
}

// pause waits before attempt n+1, with jitter so that a fleet does not come in step.
func (c *Client) pause(ctx context.Context, n int) error {
	d := c.o.Limits.Pause << min(n-1, 6)
	timer := time.NewTimer(d/2 + rand.N(d/2+1))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// maxOverLine is how many times its size a part may take of the line in one
// [Client.FetchPart]: a server without ranges that breaks off begins anew each time.
const maxOverLine = 3

// FetchPart brings the packed form of a part to path, durably and verified. It
// resumes from path + ".partial", which stays when it fails for reasons of the
// network. told, if not nil, is told how many bytes are on disk, and how many came
// since the last call: more, from a server that cannot send the rest of a file alone.
func (c *Client) FetchPart(ctx context.Context, form bundle.Form, path string, told func(have, came int64)) error {
	d := &download{c: c, form: form, path: path, told: told, file: bundle.PartPath(form.SHA256)}
	again := true // once: what was resumed from may have been damaged
	for attempt := 1; ; {
		before := d.have()
		err := d.once(ctx)
		switch {
		case err == nil:
			return nil
		case conditionOf(err) == Digest && before > 0 && again:
			again = false
			continue
		case !c.retry(err), errors.Is(err, errWasteful):
			return err
		}
		if d.have() > before {
			attempt = 0
		}
		if attempt++; attempt > c.o.Limits.Attempts {
			return err
		}
		if err := c.pause(ctx, attempt); err != nil {
			return err
		}
	}
}

// download is one part on its way.
type download struct {
	c        *Client
	form     bundle.Form
	path     string
	file     string // in the repository
	told     func(have, came int64)
	came     int64 // over the line
	noRanges bool  // a server has sent the whole where the rest was asked for
}

func (d *download) partial() string { return d.path + ".partial" }

func (d *download) have() int64 {
	fi, err := os.Stat(d.partial())
	if err != nil {
		return 0
	}
	return fi.Size()
}

// once resumes, or begins, and checks the whole when it is there.
func (d *download) once(ctx context.Context) error {
	f, err := os.OpenFile(d.partial(), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	have, err := io.Copy(h, f)
	if err != nil {
		return err
	}
	if have > d.form.Size { // never ours
		if err := f.Truncate(0); err != nil {
			return err
		}
		return d.once(ctx)
	}
	if have < d.form.Size {
		if err := d.append(ctx, io.MultiWriter(f, h), have); err != nil {
			return err
		}
	}
	if hex.EncodeToString(h.Sum(nil)) != d.form.SHA256 {
		if err := os.Remove(d.partial()); err != nil {
			return err
		}
		return &Error{Condition: Digest, File: d.file, Reason: "its bytes are not the signed ones"}
	}
	return d.finish(f)
}

func (d *download) append(ctx context.Context, w io.Writer, have int64) error {
	paced, gain, stop := d.c.paced(ctx)
	defer stop()
	r, skip, err := d.open(paced, have)
	if err != nil {
		return transferError(ctx, paced, d.file, err)
	}
	defer r.Close()
	count := func(n, came int64) error {
		gain(came)
		have += n
		if d.told != nil {
			d.told(have, came)
		}
		if d.came += came; d.came > maxOverLine*d.form.Size {
			return errWasteful
		}
		return nil
	}
	_, err = io.CopyN(writerFunc(func(p []byte) (int, error) { return len(p), count(0, int64(len(p))) }), r, skip)
	if err == nil {
		w = io.MultiWriter(w, writerFunc(func(p []byte) (int, error) { return len(p), count(int64(len(p)), int64(len(p))) }))
		_, err = io.Copy(w, io.LimitReader(r, d.form.Size-have)) // no byte beyond the signed size
	}
	var disk *fs.PathError
	switch {
	case errors.Is(err, errWasteful):
		return &Error{Condition: Slow, File: d.file, Reason: fmt.Sprintf("of its %d bytes the server sends the first ones again and again, %d so far: it cannot send the rest of a file, and breaks off", d.form.Size, d.came), Err: err}
	case errors.As(err, &disk) && disk.Path == d.partial():
		return err
	case err != nil:
		return transferError(ctx, paced, d.file, err)
	case have < d.form.Size && d.c.o.Local:
		return transferError(ctx, paced, d.file, errCut)
	case have < d.form.Size:
		return transferError(ctx, paced, d.file, io.ErrUnexpectedEOF)
	}
	return nil
}

// errWasteful ends a transfer that takes too many times its size of the line.
var errWasteful = errors.New("wasteful")

// open opens what is missing, or, where that cannot be had alone, all: the first skip
// bytes are here then.
func (d *download) open(ctx context.Context, have int64) (r io.ReadCloser, skip int64, err error) {
	if !d.noRanges {
		r, err = d.c.o.Source.Open(ctx, d.file, have)
		if !errors.Is(err, errNoRanges) {
			return r, 0, err
		}
		d.noRanges = true
	}
	r, err = d.c.o.Source.Open(ctx, d.file, 0)
	return r, have, err
}

func (d *download) finish(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(d.partial(), d.path); err != nil {
		return err
	}
	return durable.Sync(filepath.Dir(d.path))
}

// paced ends the context it returns when less than MinBytes are gained in a window.
func (c *Client) paced(ctx context.Context) (paced context.Context, gain func(int64), stop func()) {
	paced, cancel := context.WithCancelCause(ctx)
	var gained atomic.Int64
	ticker := time.NewTicker(c.o.Limits.Window)
	go func() {
		defer ticker.Stop()
		for {
			select {
			case <-paced.Done():
				return
			case <-ticker.C:
				if gained.Swap(0) < c.o.Limits.MinBytes {
					cancel(errSlow)
				}
			}
		}
	}()
	return paced, func(n int64) { gained.Add(n) }, func() { cancel(nil) }
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func digestOf(r io.Reader) (sum []byte, size int64, err error) {
	h := sha256.New()
	size, err = io.Copy(h, r)
	return h.Sum(nil), size, err
}
