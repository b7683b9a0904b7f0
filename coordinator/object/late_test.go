package object

import (
	"bytes"
	"net/http"
	"path"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
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
