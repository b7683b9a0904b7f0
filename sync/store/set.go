package store

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// Set is all volumes of a device. A chunk lies on one of them; should it lie on
// several (a disk came back), any whole copy will do. Errors are those of the
// methods of [Volume] that have the same names.
type Set struct {
	volumes atomic.Pointer[[]*Volume] // never changed in place
}

// NewSet takes the volumes over; [Set.Close] closes them.
func NewSet(volumes ...*Volume) *Set {
	s := &Set{}
	s.volumes.Store(&volumes)
	return s
}

// Add takes over one more volume, of a disk that has come later. It must not be
// called by two at once, nor with Close.
func (s *Set) Add(v *Volume) {
	more := append(s.Volumes(), v)
	s.volumes.Store(&more)
}

// Volumes returns the volumes, in the order in which they came.
func (s *Set) Volumes() []*Volume { return slices.Clone(*s.volumes.Load()) }

// Put makes a chunk durable on the volume that holds it already, or else on the
// one with most free space that takes it. It returns that volume's id.
func (s *Set) Put(ctx context.Context, id chunk.ID, data []byte) (volume string, err error) {
	err = errNoVolume
	for _, v := range s.order(id) {
		err = v.Put(ctx, id, data)
		if err == nil {
			return v.ID(), nil
		}
		if !another(err) {
			return "", err
		}
	}
	return "", err
}

var errNoVolume = wire.RejectedBecause(wire.CodeNoSpace, "this device has no volume for chunks: give it a directory on a disk")

// another tells whether a put that failed may succeed on another volume.
func another(err error) bool {
	switch wire.ProblemOf(err).Code {
	case wire.CodeNoSpace, wire.CodeReadOnly, wire.CodeUnreachable:
		return true
	}
	return false
}

// order is which volumes to try for a chunk: who has it first, then by free space.
func (s *Set) order(id chunk.ID) []*Volume {
	type candidate struct {
		v    *Volume
		has  bool
		free int64
	}
	volumes := *s.volumes.Load()
	all := make([]candidate, len(volumes))
	for i, v := range volumes {
		all[i] = candidate{v, v.Has(id), v.Stats().Free}
	}
	slices.SortStableFunc(all, func(a, b candidate) int {
		if a.has != b.has {
			if a.has {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.free, a.free)
	})
	order := make([]*Volume, len(all))
	for i, c := range all {
		order[i] = c.v
	}
	return order
}

// CanTake tells whether any volume would take a chunk of size bytes now.
func (s *Set) CanTake(size int64) error {
	var err error = errNoVolume
	for _, v := range *s.volumes.Load() {
		if err = v.CanTake(size); err == nil {
			return nil
		}
	}
	return err
}

// Confirm tells on which volume a chunk is durable and whole, and its size.
func (s *Set) Confirm(ctx context.Context, id chunk.ID) (volume string, size int64, err error) {
	type confirmed struct {
		volume string
		size   int64
	}
	c, err := first(ctx, s, id, func(ctx context.Context, v *Volume) (confirmed, error) {
		size, err := v.Confirm(ctx, id)
		return confirmed{v.ID(), size}, err
	})
	return c.volume, c.size, err
}

// Get reads and verifies a chunk.
func (s *Set) Get(ctx context.Context, id chunk.ID) ([]byte, error) {
	return first(ctx, s, id, func(ctx context.Context, v *Volume) ([]byte, error) { return v.Get(ctx, id) })
}

// Tree reads and verifies a chunk, ready to prove its leaves.
func (s *Set) Tree(ctx context.Context, id chunk.ID) (*chunk.Tree, error) {
	return first(ctx, s, id, func(ctx context.Context, v *Volume) (*chunk.Tree, error) { return v.Tree(ctx, id) })
}

// first tries the volumes, one after the other, those that hang last, until one
// succeeds. One that does not answer is waited for with patience before the next
// is tried beside it. If none succeeds, the answer of one that knows the chunk
// outweighs "not found", and one that cannot read it now outweighs both: it may have
// the whole copy.
func first[T any](ctx context.Context, s *Set, id chunk.ID, try func(context.Context, *Volume) (T, error)) (T, error) {
	var none T
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	volumes := s.Volumes()
	slices.SortStableFunc(volumes, func(a, b *Volume) int { return cmp.Compare(min(1, a.hangs.Load()), min(1, b.hangs.Load())) })
	type answer struct {
		t   T
		err error
	}
	answers := make(chan answer, len(volumes))
	var failed error = notFound(id)
	next := 0
	start := func() {
		if next < len(volumes) {
			v := volumes[next]
			next++
			go func() {
				t, err := try(ctx, v)
				answers <- answer{t, err}
			}()
		}
	}
	start()
	for got := 0; got < next; {
		v := volumes[next-1]
		patience := time.NewTimer(v.opt.hooks.patience())
		select {
		case a := <-answers:
			patience.Stop()
			if a.err == nil {
				return a.t, nil
			}
			if code := wire.ProblemOf(a.err).Code; code != wire.CodeNotFound && wire.ProblemOf(failed).Code != wire.CodeUnreachable {
				failed = a.err
			}
			got++
			start()
		case <-patience.C:
			if next == len(volumes) && v.hangs.Load() > 0 {
				return none, v.hung()
			}
			start()
		case <-ctx.Done():
			patience.Stop()
			return none, context.Cause(ctx)
		}
	}
	return none, failed
}

// Drop forgets chunks on every volume. It goes on after an error.
func (s *Set) Drop(ctx context.Context, ids []chunk.ID) error {
	var failed error
	for _, v := range *s.volumes.Load() {
		if err := v.dropHeld(ctx, ids); err != nil && failed == nil {
			failed = err
		}
	}
	return failed
}

// DropLost has each volume drop what is lost on it: what is whole on another stays there.
// It goes on after an error.
func (s *Set) DropLost(ctx context.Context, ids []chunk.ID) error {
	var failed error
	for _, v := range *s.volumes.Load() {
		failed = cmp.Or(failed, v.DropLost(ctx, ids))
	}
	return failed
}

// Has tells whether any volume holds the chunk and does not know it to be lost.
func (s *Set) Has(id chunk.ID) bool {
	return slices.ContainsFunc(*s.volumes.Load(), func(v *Volume) bool { return v.Has(id) })
}

// List calls fn for every chunk of every volume, volume by volume. One whose disk
// does not answer holds up no other, and is an error at the end; an error of fn
// ends the list.
func (s *Set) List(ctx context.Context, fn func(id chunk.ID, size int64, lost bool) error) error {
	var hung error
	for _, v := range *s.volumes.Load() {
		err := v.List(ctx, fn)
		if err != nil && wire.ProblemOf(err).Code != wire.CodeUnreachable {
			return err
		}
		hung = cmp.Or(hung, err)
	}
	return hung
}

// Stats returns the figures of each volume.
func (s *Set) Stats() []Stats {
	volumes := *s.volumes.Load()
	all := make([]Stats, len(volumes))
	for i, v := range volumes {
		all[i] = v.Stats()
	}
	return all
}

// Lost lists what is lost on one volume and not whole on another.
func (s *Set) Lost() []Loss {
	var all []Loss
	for _, v := range *s.volumes.Load() {
		for _, l := range v.Lost() {
			if !s.Has(l.ID) {
				all = append(all, l)
			}
		}
	}
	return all
}

// Close closes every volume.
func (s *Set) Close() error {
	volumes := *s.volumes.Load()
	failed := make([]error, len(volumes))
	var wg sync.WaitGroup
	for i, v := range volumes { // at once: one disk that hangs must not keep the others open
		wg.Go(func() { failed[i] = v.Close() })
	}
	wg.Wait()
	return errors.Join(failed...)
}
