package store

import (
	"errors"
	"strconv"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// On a 32-bit processor all volumes of a process share its address space: they take so many
// chunks and say why they take no more. Dropping makes room, as does closing.
func TestAProcessTakesSoManyChunks(t *testing.T) {
	rng := random(t)
	opt := noFloor
	c := &census{limit: 10}
	opt.hooks.census = c
	dir := t.TempDir()
	v, other := open1(t, dir, opt), open1(t, t.TempDir(), opt)
	var all []*request
	for range 6 {
		id, data := someChunk(rng, 1000)
		all = append(all, putOf(id, data))
	}
	if err := errors.Join(together(t, v, all...)...); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		id, data := someChunk(rng, 1000)
		mustPut(t, other, id, data)
	}
	id, data := someChunk(rng, 1000)
	for _, v := range []*Volume{v, other} {
		for _, err := range []error{v.Put(t.Context(), id, data), v.CanTake(1000)} {
			if wire.ProblemOf(err).Code != wire.CodeNoSpace || !strings.Contains(err.Error(), "32-bit") || !strings.Contains(err.Error(), "10 chunks") {
				t.Errorf("one chunk too many: %v", err)
			}
		}
	}
	mustPut(t, v, all[0].id, all[0].data) // held
	if err := v.Drop(t.Context(), []chunk.ID{all[0].id}); err != nil {
		t.Fatal(err)
	}
	mustPut(t, other, id, data)
	mustClose(t, other)
	if got := c.held.Load(); got != 5 {
		t.Errorf("%d chunks are counted, and 5 are in the volume that is open", got)
	}
	v = open1(t, killed(t, dir), opt) // counted from the log
	if got := c.held.Load(); got != 10 {
		t.Errorf("%d chunks are counted, and 5 are in each of two volumes", got)
	}
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeNoSpace)

	if got := chunkLimit(32); got != chunks32 {
		t.Errorf("a 32-bit processor takes %d", got)
	}
	if strconv.IntSize == 64 && process.limit != 0 {
		t.Errorf("this processor takes %d", process.limit)
	}
}
