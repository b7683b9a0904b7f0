package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// Source is where a repository is read from. Open returns the file at a path
// like "metadata/timestamp.json" from a byte offset on; a file that is not
// there is an error that wraps [fs.ErrNotExist], and one that can only be had from its
// beginning errNoRanges.
type Source interface {
	Open(ctx context.Context, path string, offset int64) (io.ReadCloser, error)
}

// errNoRanges is what a server is that answers with a whole file where the rest was
// asked for. What is read in vain then is for the caller to count.
var errNoRanges = errors.New("the server sends files from their beginning only")

// Mirrors are several places of one repository. The first is asked until it fails,
// then the next, and after the last the first again. Not safe for concurrent use.
type Mirrors struct {
	all []Source
	at  int // which is asked
}

// NewMirrors asks these, best first; there is at least one.
func NewMirrors(all ...Source) *Mirrors { return &Mirrors{all: all} }

// Open implements [Source]. A file that is not there is at no other place either.
func (m *Mirrors) Open(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	var failed error
	for range m.all {
		r, err := m.all[m.at].Open(ctx, path, offset)
		if err == nil {
			return &mirrored{r, m}, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		m.turn()
		if failed == nil {
			failed = err
		} else {
			failed = fmt.Errorf("%w; %w", failed, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failed
}

func (m *Mirrors) turn() { m.at = (m.at + 1) % len(m.all) }

// mirrored is a file of one of them. When it breaks off, the rest is asked of the next.
type mirrored struct {
	io.ReadCloser
	of *Mirrors
}

func (f *mirrored) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		f.of.turn()
	}
	return n, err
}

// HTTP is a repository behind a web server.
type HTTP struct {
	Client *http.Client // may have no timeout of its own: every use here is bounded
	Base   string       // URL of the repository's directory
}

// Open implements [Source].
func (h HTTP) Open(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	u, err := url.JoinPath(h.Base, path)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept-Encoding", "identity") // ranges count the bytes that are signed
	if offset > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
	}
	res, err := h.Client.Do(req)
	if err != nil {
		return nil, err
	}
	body, err := from(res, offset)
	if err != nil {
		res.Body.Close()
		return nil, fmt.Errorf("%s: %w", u, err)
	}
	return body, nil
}

// from is the body of an answer, starting at offset.
func from(res *http.Response, offset int64) (io.ReadCloser, error) {
	switch res.StatusCode {
	case http.StatusOK:
		if offset == 0 {
			return res.Body, nil
		}
		return nil, errNoRanges
	case http.StatusPartialContent:
		if !strings.HasPrefix(res.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", offset)) {
			return nil, fmt.Errorf("asked from byte %d on, the server sent %q", offset, res.Header.Get("Content-Range"))
		}
		return res.Body, nil
	case http.StatusNotFound, http.StatusGone:
		return nil, fs.ErrNotExist
	}
	return nil, errors.New("the server answers " + res.Status)
}
