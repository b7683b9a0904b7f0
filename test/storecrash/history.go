package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/powercut/live"
	"github.com/deimos-edge/deimos/wire"
)

// history is a life of a store that is recorded.
type history struct {
	program string // the keeper's
	seed    uint64
	rounds  int

	scratch string
	starter *proc.Starter
	disk    *live.Disk
	keeper  *kept
	starts  int
	writers []*writer

	segment   atomic.Int64 // the number of the newest segment; 0: not known since the volume was opened
	rotations atomic.Int64
}

// writer changes chunks of its own, one after the other.
type writer struct {
	*history
	rng    *rand.Rand
	chunks []*known
}

// known is a chunk that its writer has begun to put once.
type known struct {
	Stored
	id    chunk.ID
	state state
}

const (
	historyLimit = 20 * time.Minute
	// What is done in each round: by one writer, by some, by many, and what happens then.
	changesAtOnce = 16
	changes       = 64 // of a round's part, by all writers together
	smallWriters  = 64 // that fill segments with many records
	smallEach     = 25 // chunks, and again until another segment has begun; three times or so fill one (4 MiB)
)

// record lives such a life, and kills the store in the middle of it. The recording
// is in dir.
func (h *history) record(ctx context.Context, dir string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, historyLimit)
	defer cancel()
	if h.scratch, err = os.MkdirTemp("", "d"); err != nil { // sockets want short paths
		return err
	}
	defer os.RemoveAll(h.scratch)
	h.starter = proc.NewStarter()
	defer h.starter.End()
	if h.disk, err = live.Start(ctx, h.starter, h.scratch, dir); err != nil {
		return err
	}
	defer func() {
		if h.keeper != nil {
			h.keeper.kill()
		}
		if err != nil {
			err = fmt.Errorf("%w; the store said: %s", err, lastSaid(h.scratch))
		}
		err = errors.Join(err, h.disk.End())
	}()
	for n := range smallWriters {
		h.writers = append(h.writers, &writer{history: h, rng: rand.New(rand.NewPCG(h.seed, uint64(n)+10))})
	}
	if err := h.start(ctx); err != nil {
		return err
	}
	for round := range h.rounds {
		if err := h.round(ctx, round); err != nil {
			return fmt.Errorf("round %d: %w", round+1, err)
		}
	}
	return nil
}

// start starts the keeper, and opens the volume.
func (h *history) start(ctx context.Context) (err error) {
	h.starts++
	if h.keeper, err = startKeeper(ctx, h.starter, h.program, h.scratch, filepath.Join(h.disk.Dir, "volume"), h.starts); err != nil {
		return err
	}
	return h.reopen(ctx)
}

func (h *history) reopen(ctx context.Context) error {
	a, err := h.keeper.ask(ctx, "Reopen", 0)
	if err == nil {
		h.segment.Store(0)
		h.disk.Rec.Mark(mark{Volume: a.Volume})
	}
	return err
}

func (h *history) round(ctx context.Context, round int) error {
	rng := rand.New(rand.NewPCG(h.seed, uint64(round)+1e6))
	for _, n := range []int{1, 4, changesAtOnce} {
		h.disk.Rec.Note("round %d: %d writers", round+1, n)
		if err := h.all(ctx, n, changes/n, (*writer).change); err != nil {
			return err
		}
	}
	if round%3 == 0 {
		h.disk.Rec.Note("round %d: many small chunks", round+1)
		if err := h.fillSegments(ctx); err != nil {
			return err
		}
		if err := h.all(ctx, smallWriters, 1, (*writer).dropSmall); err != nil {
			return err
		}
	}
	if a, err := h.keeper.ask(ctx, "Check", 0); err != nil || a.Code != "" {
		return errors.Join(err, errors.New(a.Reason))
	}
	if round%2 == 0 {
		h.disk.Rec.Note("round %d: closed and opened", round+1)
		return h.reopen(ctx)
	}
	h.disk.Rec.Note("round %d: killed and started", round+1)
	return h.killed(ctx, time.Duration(rng.IntN(400))*time.Millisecond)
}

// fillSegments has small chunks stored until two segments have begun. How often they are
// asked for is nobody's business: on a full volume most are refused until there is room
// again, which takes as long as the disk does.
func (h *history) fillSegments(ctx context.Context) error {
	for enough := h.rotations.Load() + 2; h.rotations.Load() < enough; {
		if err := h.all(ctx, smallWriters, smallEach, (*writer).putSmall); err != nil {
			return fmt.Errorf("while small chunks filled two segments: %w", err)
		}
	}
	return nil
}

// all has n writers do something so often, at once.
func (h *history) all(ctx context.Context, n, times int, do func(*writer, context.Context) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, w := range h.writers[:n] {
		group.Go(func() error {
			for range times {
				if err := do(w, ctx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// killed kills the store's process while there is work, and starts it again: what
// it wrote is in the kernel's memory still.
func (h *history) killed(ctx context.Context, after time.Duration) error {
	ended := make(chan error, 1)
	go func() { ended <- h.all(ctx, changesAtOnce, changes, (*writer).change) }()
	select {
	case err := <-ended:
		if err != nil {
			return err
		}
		h.keeper.kill()
	case <-time.After(after):
		h.keeper.kill()
		<-ended // with an error, as the store is dead
	}
	if err := h.start(ctx); err != nil {
		return err
	}
	return h.all(ctx, changesAtOnce, 1, (*writer).lookAround)
}

// change is one step of a writer.
func (w *writer) change(ctx context.Context) error {
	switch n := w.rng.IntN(20); {
	case n < 11 || len(w.chunks) == 0:
		s := Stored{w.rng.Uint64(), someSize(w.rng)}
		c := &known{Stored: s, id: chunk.Sum(s.bytes()), state: gone}
		w.chunks = append(w.chunks, c)
		return w.put(ctx, c)
	case n < 14: // once more, or for the first time again
		return w.put(ctx, w.some())
	case n < 18:
		var these []*known
		for range 1 + w.rng.IntN(4) {
			these = append(these, w.some())
		}
		return w.drop(ctx, these)
	default:
		return w.confirm(ctx, w.some())
	}
}

// someSize is from 1 KiB to 4 MiB, as often between 1 and 2 as between 2 and 4.
func someSize(rng *rand.Rand) int {
	return int(math.Exp2(10 + 12*rng.Float64()))
}

func (w *writer) some() *known { return w.chunks[w.rng.IntN(len(w.chunks))] }

// put stores a chunk. On a full volume it makes room instead.
func (w *writer) put(ctx context.Context, c *known) error {
	if c.state != held { // one that is there stays there
		c.state = open
		w.disk.Rec.Mark(mark{Putting: &c.id})
	}
	a, err := w.keeper.ask(ctx, "Put", c.Stored)
	switch {
	case err != nil:
		return err
	case a.Code == wire.CodeNoSpace:
		return w.drop(ctx, w.chunks[:(len(w.chunks)+2)/3])
	case a.Code != "":
		return fmt.Errorf("chunk %s was not stored: %s", c.id, a.Reason)
	}
	c.state = held
	w.disk.Rec.Mark(mark{Receipt: &c.id})
	w.rotated(a.Segment)
	return nil
}

// rotated notes when another segment has begun since the volume was opened.
func (h *history) rotated(segment int) {
	for {
		last := h.segment.Load()
		switch {
		case int64(segment) <= last:
			return
		case h.segment.CompareAndSwap(last, int64(segment)):
			if last > 0 {
				h.rotations.Add(1)
				h.disk.Rec.Mark(mark{Rotated: true})
			}
			return
		}
	}
}

func (w *writer) drop(ctx context.Context, these []*known) error {
	ids := make([]chunk.ID, len(these))
	for i, c := range these {
		ids[i], c.state = c.id, open
	}
	w.disk.Rec.Mark(mark{Removing: ids})
	a, err := w.keeper.ask(ctx, "Drop", ids)
	switch {
	case err != nil:
		return err
	case a.Code != "":
		return fmt.Errorf("%d chunks were not dropped: %s", len(ids), a.Reason)
	}
	for _, c := range these {
		c.state = gone
	}
	w.disk.Rec.Mark(mark{Removed: ids})
	return nil
}

// errBroken is what a kill alone has shown, while the life was recorded.
var errBroken = errors.New("a promise is broken")

// confirm asks whether a chunk is durable, which is as good as a receipt.
func (w *writer) confirm(ctx context.Context, c *known) error {
	a, err := w.keeper.ask(ctx, "Confirm", c.id)
	switch {
	case err != nil:
		return err
	case a.Code == "" && c.state != gone:
		c.state = held
		w.disk.Rec.Mark(mark{Receipt: &c.id})
		return nil
	case a.Code == wire.CodeNotFound && c.state != held:
		return nil
	}
	return fmt.Errorf("%w: chunk %s (%d) is not as it was left: %q %s", errBroken, c.id, c.state, a.Code, a.Reason)
}

// lookAround finds out what a kill has left.
func (w *writer) lookAround(ctx context.Context) error {
	for _, c := range w.chunks {
		if err := w.confirm(ctx, c); err != nil {
			return fmt.Errorf("after a kill: %w", err)
		}
	}
	return nil
}

// putSmall stores a small chunk, and drops those before now and then.
func (w *writer) putSmall(ctx context.Context) error {
	if w.rng.IntN(6) == 0 {
		if err := w.dropSmall(ctx); err != nil {
			return err
		}
	}
	s := Stored{w.rng.Uint64(), 900 + w.rng.IntN(100)}
	c := &known{Stored: s, id: chunk.Sum(s.bytes()), state: gone}
	w.chunks = append(w.chunks, c)
	return w.put(ctx, c)
}

func (w *writer) dropSmall(ctx context.Context) error {
	var these, others []*known
	for _, c := range w.chunks {
		if c.Size < 1000 {
			these = append(these, c)
		} else {
			others = append(others, c)
		}
	}
	if len(these) == 0 {
		return nil
	}
	w.chunks = others
	return w.drop(ctx, these)
}
