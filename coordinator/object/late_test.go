package object

import (
	"bytes"
	"encoding/json"
	"net/http"
	"path"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// Those that are asked in place of silent devices may be silent, too: the good
// ones are found all the same.
func TestSilentReplacementsAreReadAround(t *testing.T) {
	s, c := newShelf(t)
	code := api.Code{Data: 2, Parity: 5}
	o := putCoded(t, c, "f", randomBytes(t, 2000), code, 1000, newIdentity(t))
	silent := map[string]bool{}
	for _, ch := range o.Chunks[:5] {
		silent[ch.ID] = true
	}
	s.odd = func(_ http.ResponseWriter, r *http.Request) bool {
		if silent[path.Base(r.URL.Path)] {
			<-r.Context().Done()
			return true
		}
		return false
	}
	r := &reader{client: c, object: o}
	r.pace.took(time.Millisecond) // it knows how fast the others are
	shards := make([][]byte, len(o.Chunks))
	must(t, r.gather(testContext(t), o.Chunks, shards, 0, 1))
	for i := range 2 {
		if !bytes.Equal(shards[i], s.chunks[o.Chunks[i].ID]) {
			t.Errorf("shard %d is wrong", i)
		}
	}
}

// A line that is slow altogether does not make everything be asked for at once:
// each time that some are late, the next have twice the time.
func TestPatienceDoublesWithEachDelay(t *testing.T) {
	r := &reader{}
	r.pace.took(time.Hour)
	h := &hunt{reader: r, asked: make([]asked, 3), patience: 1}
	h.asked[0] = asked{at: time.Now().Add(-3 * time.Hour), patience: h.patience}
	h.asked[1] = asked{at: time.Now().Add(-3 * time.Hour), patience: h.patience, over: true}
	if h.coming() != 1 || h.untilLate() > 0 {
		t.Errorf("%d are coming, the next is late in %s", h.coming(), h.untilLate())
	}
	h.noteLate()
	if h.coming() != 0 || !h.asked[0].late || h.asked[1].late {
		t.Error("what is late is counted upon")
	}
	h.asked[2] = asked{at: time.Now().Add(-3 * time.Hour), patience: h.patience}
	h.noteLate()
	if h.asked[2].late || h.coming() != 1 || h.untilLate() <= 0 {
		t.Error("the second is late after the same time as the first")
	}
}

// Who was late once is not asked in each stripe again, as long as there are enough
// others; one that is quick again is.
func TestWhoWasLateIsAskedLast(t *testing.T) {
	s, c := newShelf(t)
	code := api.Code{Data: 4, Parity: 2}
	const stripes = 20
	o := putCoded(t, c, "f", randomBytes(t, stripes*4*1000), code, 1000, newIdentity(t))
	width := code.Shards()
	if len(o.Chunks) != stripes*width {
		t.Fatalf("it has %d chunks", len(o.Chunks))
	}
	// The devices take turns in what they hold of a stripe.
	placed := make([]api.Placement, len(o.Chunks))
	onSlow := map[string]bool{}
	for i, ch := range o.Chunks {
		d := (i%width + i/width) % width
		placed[i] = api.Placement{Chunk: ch, Holders: []api.Holder{{Device: wire.DeviceID(strconv.Itoa(d))}, {Device: "gone", Lost: true}}}
		onSlow[ch.ID] = d < 2
	}
	var silent, asked atomic.Int32
	silent.Store(1)
	s.odd = func(w http.ResponseWriter, r *http.Request) bool {
		switch {
		case path.Base(r.URL.Path) == "placements":
			_ = json.NewEncoder(w).Encode(placed)
			return true
		case onSlow[path.Base(r.URL.Path)]:
			asked.Add(1)
			if silent.Load() == 1 {
				<-r.Context().Done()
				return true
			}
		}
		return false
	}
	r := &reader{client: c, object: o}
	defer r.running.Wait()
	for range len(r.pace.latest) { // it knows how fast the others are
		r.pace.took(time.Second) // on a busy machine, too: twice that is late
	}
	get := func(stripe int) {
		t.Helper()
		_, err := r.stripe(testContext(t), int64(stripe), 0, o.Size)
		must(t, err)
	}
	get(0)
	r.running.Wait() // it knows where the chunks are
	if asked.Load() == 0 {
		t.Fatal("the slow devices were not asked at all")
	}
	asked.Store(0)
	for i := 1; i < stripes-1; i++ {
		get(i)
	}
	// In the first stripe one of the two was late at least, and the other may be once. On a
	// busy machine others may be, too. If nothing was learned, it is once in each stripe.
	if n := asked.Load(); n > stripes/3 {
		t.Errorf("in %d stripes, devices that were late were asked %d times", stripes-2, n)
	}
	silent.Store(0)
	r.slow.mu.Lock()
	clear(r.slow.until) // their rest is over
	r.slow.mu.Unlock()
	asked.Store(0)
	get(stripes - 1)
	if asked.Load() == 0 {
		t.Error("they are not tried again")
	}
}
