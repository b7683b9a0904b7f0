package store

import (
	"slices"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
)

// Who is expected shares the sync with those who are there already, and is known to
// the volume like them.
func TestThoseWhoComeTogetherShareASync(t *testing.T) {
	rng, w := random(t), &witness{}
	v := open1(t, t.TempDir(), w.hooked(noFloor))
	id, data := someChunk(rng, 50_000)
	mustPut(t, v, id, data) // the committer has nothing to do from now on
	w.synced()
	put := func() *request {
		id, data := someChunk(rng, 50_000)
		return &request{id: id, data: data, done: make(chan error, 1)}
	}
	first, second, third := put(), put(), put()
	again := &request{id: second.id, data: second.data, done: make(chan error, 1)}
	dropped := &request{drops: []chunk.ID{third.id}, done: make(chan error, 1)}
	all := []*request{first, second, third, again, dropped}
	queue := make(chan *request)
	c := crowd{queue: queue, size: len(all), took: time.Hour}
	go func() {
		for _, r := range all[1:] {
			queue <- r
		}
	}()
	var b batch
	b.add(first)
	if next := v.commit(b, &c); len(next.requests) != 0 {
		t.Fatalf("%d requests were put off", len(next.requests))
	}
	for i, r := range all {
		if err := <-r.done; err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	if got, want := w.synced(), []string{segmentName(1)}; !slices.Equal(got, want) {
		t.Fatalf("synced %v, want %v", got, want)
	}
	mustHold(t, v, first.id, first.data)
	mustHold(t, v, second.id, second.data)
	if s := v.Stats(); s.Chunks != 3 || s.Used != 150_000 || s.Dead != 2*recordHead+50_000 || v.Has(third.id) {
		t.Fatalf("%+v", s)
	}
}

// Nobody is waited for again and again who does not come.
func TestWaitingInVainIsNotRepeated(t *testing.T) {
	rng := random(t)
	v := open1(t, t.TempDir(), noFloor)
	c := crowd{queue: make(chan *request), size: 2}
	for range waitAgain {
		id, data := someChunk(rng, 1000)
		r := &request{id: id, data: data, done: make(chan error, 1)}
		var b batch
		b.add(r)
		v.commit(b, &c)
		if err := <-r.done; err != nil {
			t.Fatal(err)
		}
		c.size, c.took = 2, time.Hour // the first had no time to wait; one that waits now does so to the end
	}
	if c.skip != 1 {
		t.Fatalf("%d batches are not held up now, want 1", c.skip)
	}
}

// Nobody knows of the damage before the chunk comes again. A chunk that is new costs no read.
func TestAPutOfWhatIsHeldReadsItFirst(t *testing.T) {
	dir, opt, reads := t.TempDir(), noFloor, 0
	opt.hooks.reading = func() { reads++ }
	v := open1(t, dir, opt)
	id, data := someChunk(random(t), 30_000)
	mustPut(t, v, id, data)
	if reads != 0 {
		t.Errorf("a new chunk was read %d times", reads)
	}
	before := v.Stats()
	mustPut(t, v, id, data)
	if now := v.Stats(); reads != 1 || now.Dead != before.Dead || now.Used != before.Used {
		t.Errorf("a chunk that was held and whole was read %d times; %+v before, %+v after", reads, before, now)
	}
	flip(t, dir, data, 20_000)
	mustPut(t, v, id, data)
	mustHold(t, v, id, data)
	if now := v.Stats(); now.Lost != 0 || now.Chunks != 1 || now.Dead < 30_000 {
		t.Errorf("%+v", now)
	}
}
