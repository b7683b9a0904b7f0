package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
)

// What it costs that a store has grown: three of them, ten times as large each,
// are measured side by side. Chunks are as small as a leaf, so that there are
// many; a volume of chunks of 1 MiB has as many in 256 times the space.

const (
	growthLeast  = 2000 // chunks in the smallest
	growthSize   = chunk.LeafSize
	growthAtOnce = 512 // puts while they are filled

	growthPuts = 20 // in a round, one after the other
	growthGets = 200
)

// grown is a store with so many chunks to begin with.
type grown struct {
	dir  string
	held int
	ids  []chunk.ID
	v    *store.Volume
}

func growthRows(ctx context.Context, t *table, dir string) (err error) {
	var all []*grown
	for held := growthLeast; held <= 100*growthLeast; held *= 10 {
		g, err := newGrown(ctx, filepath.Join(dir, fmt.Sprint(held)), held)
		if err != nil {
			return err
		}
		defer func() { err = closed(g.v, err) }()
		all = append(all, g)
	}
	for _, r := range []struct {
		what, unit string
		do         func(g *grown) error
		each       float64 // in a round
		rounds     int
	}{
		{"durable put", "ms", func(g *grown) error { return g.put(ctx) }, growthPuts, 5},
		{"verified get", "µs", func(g *grown) error { return g.get(ctx) }, growthGets / 1000., 5},
		{"opening", "ms", (*grown).open, 1, 3},
	} {
		side := func(g *grown) func() (float64, error) {
			measure := took(func() error { return r.do(g) })
			return func() (float64, error) { d, err := measure(); return d / r.each, err }
		}
		for _, g := range all[1:] {
			rounds, err := interleave(r.rounds, side(g), side(all[0]))
			if err != nil {
				return err
			}
			t.paired(fmt.Sprintf("%s, %d chunks held (%d)", r.what, g.held, growthLeast), r.unit, rounds, "%.2f")
		}
	}
	return nil
}

func newGrown(ctx context.Context, dir string, held int) (*grown, error) {
	v, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	b := newBatch(growthSize, 0, held)
	if err := b.each(growthAtOnce, func(i int, data []byte) error { return v.Put(ctx, b.ids[i], data) }); err != nil {
		return nil, closed(v, err)
	}
	return &grown{dir: dir, held: held, ids: b.ids, v: v}, nil
}

func (g *grown) put(ctx context.Context) error {
	b := newBatch(growthSize, len(g.ids), growthPuts)
	g.ids = append(g.ids, b.ids...)
	return b.each(1, func(i int, data []byte) error { return g.v.Put(ctx, b.ids[i], data) })
}

func (g *grown) get(ctx context.Context) error {
	for range growthGets {
		if _, err := g.v.Get(ctx, g.ids[rand.IntN(len(g.ids))]); err != nil {
			return err
		}
	}
	return nil
}

// open closes the volume and opens it again.
func (g *grown) open() error {
	if err := g.v.Close(); err != nil {
		return err
	}
	v, err := store.Open(g.dir, store.Options{})
	if err == nil {
		g.v = v
	}
	return err
}
