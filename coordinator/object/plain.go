package object

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// PutPlain stores what r gives under name as it is, each chunk on replicas
// devices, which can read it. progress is as in [PutOptions].
func PutPlain(ctx context.Context, c *api.Client, name string, r io.Reader, replicas int, progress func(bytes int64)) (api.Object, []api.Placement, error) {
	o := api.Object{Name: name, Chunks: []api.Chunk{}}
	if sizeOf(r) > int64(maxChunks)*chunk.DefaultSize {
		return o, nil, errTooMany()
	}
	old, taken, err := lookUp(ctx, c, name)
	if err != nil {
		return o, nil, err
	}
	if taken && old.Code != nil {
		return o, nil, errTaken(name)
	}
	keeper := keep(ctx, c)
	defer keeper.end()
	var way line
	var placed []*api.Placement
	h := newWhole()
	split := chunk.NewSplitter(io.TeeReader(r, h))
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
			return o, nil, errTooMany()
		}
		// Only what has all the same chunks may have a name that is taken.
		if n := len(o.Chunks); taken && (n >= len(old.Chunks) || old.Chunks[n].ID != id.String()) {
			_ = g.Wait() // the name is the reason to tell
			return o, nil, errTaken(name)
		}
		data = append([]byte(nil), data...) // the splitter uses its buffer again
		o.Chunks = append(o.Chunks, api.Chunk{ID: id.String(), Size: int64(len(data))})
		o.Size += int64(len(data))
		p := new(api.Placement)
		placed = append(placed, p)
		g.Go(func() (err error) {
			*p, err = over(gctx, &way, way.passes, func() (api.Placement, error) { return c.PutChunk(gctx, id.String(), data, replicas) })
			if err != nil {
				return err
			}
			way.begun.Store(true)
			keeper.add(api.StripeRequest{Token: rand.Text(), Code: api.Code{Data: 1}, Size: int64(len(data)), Chunks: []string{id.String()}, Replicas: replicas})
			if progress != nil {
				progress(int64(len(data)))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return o, nil, err
	}
	if err := ctx.Err(); err != nil {
		return o, nil, err
	}
	o.SHA256 = hex.EncodeToString(h.hash.Sum(nil))
	o, err = over(ctx, &way, interrupted, func() (api.Object, error) { return c.PutObject(ctx, o) })
	placements := make([]api.Placement, len(placed))
	for i, p := range placed {
		placements[i] = *p
	}
	return o, placements, err
}

func errTooMany() error {
	return fmt.Errorf("the file has more than %d chunks, which is the most that one object can have: cut it in parts", maxChunks)
}
