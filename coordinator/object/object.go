// Package object stores files in the fleet and gets them back, on the operator's
// side of the API. It cuts a file into chunks, has each placed on several
// devices, and trusts nobody on the way back: every chunk is checked against
// its id, and the whole against its digest.
//
// Memory is bounded by the number of chunks under way, whatever the file's size.
//
// Not here yet: encryption and erasure coding. What is stored is readable by the
// devices that hold it and by the coordinator that hands it on.
package object

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// atOnce is how many chunks are under way together.
const atOnce = 4

// maxChunks is api.MaxChunks, but for tests.
var maxChunks = api.MaxChunks

// ErrDamaged is returned when what came back is not what was stored.
var ErrDamaged = errors.New("what came back is not what was stored")

// Put stores what r gives under name, each chunk on replicas devices. done, if
// not nil, is told the bytes that are safe so far; it may be called by several
// goroutines at once.
func Put(ctx context.Context, c *api.Client, name string, r io.Reader, replicas int, done func(bytes int64)) (api.Object, []api.Placement, error) {
	o := api.Object{Name: name, Chunks: []api.Chunk{}}
	if size := sizeOf(r); size > int64(maxChunks)*chunk.DefaultSize {
		return o, nil, errTooLarge()
	}
	old, taken, err := lookUp(ctx, c, name)
	if err != nil {
		return o, nil, err
	}
	var placed []*api.Placement
	whole := sha256.New()
	split := chunk.NewSplitter(io.TeeReader(r, whole))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for gctx.Err() == nil {
		id, data, err := split.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			_ = g.Wait() // the file's error is the one to tell
			return o, nil, fmt.Errorf("the file cannot be read: %w", err)
		}
		if len(o.Chunks) == maxChunks {
			_ = g.Wait() // the size is the reason to tell
			return o, nil, errTooLarge()
		}
		// Only what has all the same chunks may have a name that is taken.
		if n := len(o.Chunks); taken && (n >= len(old.Chunks) || old.Chunks[n].ID != id.String()) {
			_ = g.Wait() // the name is the reason to tell
			return o, nil, &api.Error{Status: http.StatusConflict, APIError: wire.APIError{Code: "exists",
				Reason: fmt.Sprintf("there is another object %q; remove it first (\"deimos object rm\") or choose another name", name)}}
		}
		data = append([]byte(nil), data...) // the splitter uses its buffer again
		o.Chunks = append(o.Chunks, api.Chunk{ID: id.String(), Size: int64(len(data))})
		o.Size += int64(len(data))
		p := new(api.Placement)
		placed = append(placed, p)
		g.Go(func() (err error) {
			if *p, err = c.PutChunk(gctx, id.String(), data, replicas); err == nil && done != nil {
				done(int64(len(data)))
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return o, nil, err
	}
	if err := ctx.Err(); err != nil {
		return o, nil, err
	}
	o.SHA256 = hex.EncodeToString(whole.Sum(nil))
	o, err = c.PutObject(ctx, o)
	placements := make([]api.Placement, len(placed))
	for i, p := range placed {
		placements[i] = *p
	}
	return o, placements, err
}

func errTooLarge() error {
	return fmt.Errorf("the file has more than %d chunks, which is the most that one object can have: cut it in parts", maxChunks)
}

// sizeOf is the bytes of a regular file, and 0 for anything else.
func sizeOf(r io.Reader) int64 {
	f, ok := r.(interface{ Stat() (fs.FileInfo, error) })
	if !ok {
		return 0
	}
	s, err := f.Stat()
	if err != nil || !s.Mode().IsRegular() {
		return 0
	}
	return s.Size()
}

// lookUp tells what already has a name, so that a file under a taken name is
// refused before its first byte has gone over the line.
func lookUp(ctx context.Context, c *api.Client, name string) (o api.Object, taken bool, err error) {
	o, err = c.Object(ctx, name)
	var e *api.Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound {
		return o, false, nil
	}
	return o, err == nil, err
}

// Get writes an object to w. On an error w may have got a part of it, every
// byte of which is right.
func Get(ctx context.Context, c *api.Client, name string, w io.Writer, done func(bytes int64)) (api.Object, error) {
	o, err := c.Object(ctx, name)
	if err != nil {
		return o, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type piece struct {
		data []byte
		err  error
	}
	// Pieces are fetched ahead and written in order.
	queue := make(chan chan piece, atOnce)
	go func() {
		defer close(queue)
		for _, ch := range o.Chunks {
			p := make(chan piece, 1)
			select {
			case queue <- p:
			case <-ctx.Done():
				return
			}
			go func() {
				data, err := fetch(ctx, c, ch)
				p <- piece{data, err}
			}()
		}
	}()
	whole := sha256.New()
	for p := range queue {
		got := <-p
		if got.err != nil {
			return o, got.err
		}
		whole.Write(got.data)
		if _, err := w.Write(got.data); err != nil {
			return o, fmt.Errorf("the file cannot be written: %w", err)
		}
		if done != nil {
			done(int64(len(got.data)))
		}
	}
	if err := ctx.Err(); err != nil {
		return o, err
	}
	if got := hex.EncodeToString(whole.Sum(nil)); got != o.SHA256 {
		return o, fmt.Errorf("%w: %q has SHA-256 %s, stored was %s", ErrDamaged, name, got, o.SHA256)
	}
	return o, nil
}

func fetch(ctx context.Context, c *api.Client, ch api.Chunk) ([]byte, error) {
	data, err := c.GetChunk(ctx, ch.ID)
	if err != nil {
		return nil, err
	}
	if int64(len(data)) != ch.Size || chunk.Sum(data).String() != ch.ID {
		return nil, fmt.Errorf("%w: chunk %s does not verify", ErrDamaged, ch.ID)
	}
	return data, nil
}
