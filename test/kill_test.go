package test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/testbed"
)

const (
	killsQuick = 8 // two of each kind of work; KILLS=200 makes more
	killTries  = 4 // to meet work that has not ended yet
	killObject = 6 // chunks of an object, of some 256 KiB
	killAtOnce = 8 // objects that are put beside each other
	killKeep   = 4 // objects that stay
)

// TestKilledInTheMiddleAnAgentHasAllThatItSignedFor kills agents with SIGKILL in the
// middle of storing, of emptying segments, of a scrub and of a drain. Each time a
// sign of the work is awaited, and then a moment by chance. When the agent is back,
// every chunk of every object is read from every device that gave a receipt for it. In
// the end all volumes are read through without their agents, and nothing there is
// damaged.
//
// The volumes are so small that their logs are emptied as soon as something is
// dropped, and are scrubbed without end.
func TestKilledInTheMiddleAnAgentHasAllThatItSignedFor(t *testing.T) {
	t.Parallel()
	kills := killsQuick
	if s := os.Getenv("KILLS"); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil || kills < 1 {
			t.Fatalf("KILLS is how often agents are killed, not %q", s)
		}
	}
	k := newKiller(t, kills)
	works := []work{{"storing", k.storing}, {"emptying logs", k.emptying}, {"a scrub", k.scrubbing}, {"a drain", k.draining}}
	for n := range kills {
		if n%len(works) == 0 {
			k.rng.Shuffle(len(works), func(i, j int) { works[i], works[j] = works[j], works[i] })
		}
		k.killIn(works[n%len(works)])
		if t.Failed() {
			return
		}
	}
	t.Logf("%d kills, and so many more that came when the work was done: %d", kills, k.late)
	k.checkReceipts(k.receipts())
}

// killer is three small devices, and what is stored on them.
type killer struct {
	*fleet
	rng  *rand.Rand
	kept []string // names of objects, the oldest first
	made int      // objects so far
	late int      // kills that found the work done
}

// work is something that an agent is killed in. Its function kills d and returns
// whether the work was under way then.
type work struct {
	name string
	do   func(d *device) bool
}

func newKiller(t *testing.T, kills int) *killer {
	t.Helper()
	k := &killer{rng: testbed.Seeded(t), fleet: newFleet(t, func(f *fleet) {
		var cancel context.CancelFunc
		f.Ctx, cancel = context.WithTimeout(context.Background(), testLimit+time.Duration(kills)*20*time.Second)
		t.Cleanup(cancel)
	})}
	k.token = k.NewToken(3)
	for range 3 {
		d := k.add(device{env: []string{"DEIMOS_LOG_LEVEL=debug"}})
		d.args = []string{"--config", k.Write(d.name+".toml", fmt.Appendf(nil, "[[volume]]\ndir = %q\ncapacity_bytes = %d\n[scrub]\ndays = 0.00001\n", d.state("volumes", "main"), 48<<20))}
		d.start()
	}
	for _, d := range k.devices {
		d.awaitOnline()
	}
	names, done := k.store(1, nil)
	<-done
	k.kept = names
	return k
}

// killIn kills some agent in the middle of some work, and wants everything to be there
// when it is back.
func (k *killer) killIn(w work) {
	k.T.Helper()
	for range killTries {
		d := k.devices[k.rng.IntN(len(k.devices))]
		inTime := w.do(d)
		if k.T.Failed() {
			return
		}
		k.checkServed(fmt.Sprintf("%s was killed in the middle of %s (%v)", d.name, w.name, inTime))
		if inTime {
			return
		}
		k.late++
	}
	k.T.Logf("%d kills have all found %s done: this machine is too quick, or too busy to strike in time", killTries, w.name)
}

// strike kills an agent at a moment by chance, tells whether the work was under way
// then, and starts the agent again.
func (k *killer) strike(d *device, within time.Duration, underWay func() bool) bool {
	k.T.Helper()
	time.Sleep(some(k.rng, within)) // any moment will do
	before, sessions := underWay(), d.said(sessionBegins)
	d.proc.Kill()
	d.start()
	// The coordinator may still see the session that was cut.
	k.Until(d.name+" coming back", func() bool { return d.said(sessionBegins) > sessions && d.now().Online })
	return before
}

// store puts n objects beside each other, so that their chunks lie between one
// another's, until done is closed. placed, unless nil, is told of each chunk with
// receipts.
func (k *killer) store(n int, placed chan<- api.Placement) (names []string, done <-chan struct{}) {
	if placed == nil {
		placed = make(chan api.Placement, n*killObject)
	}
	ended := make(chan struct{})
	var all sync.WaitGroup
	for range n {
		name := fmt.Sprint("object-", k.made)
		data := testbed.RandomBytes(k.rng, killObject<<18-k.rng.IntN(1<<18))
		k.made++
		names = append(names, name)
		all.Go(func() { k.storeInChunks(name, data, killObject, placed) })
	}
	go func() { all.Wait(); close(ended) }()
	return names, ended
}

// trim removes the oldest objects.
func (k *killer) trim() {
	k.T.Helper()
	old := max(0, len(k.kept)-killKeep)
	k.remove(k.kept[:old]...)
	k.kept = slices.Clone(k.kept[old:])
}

func (k *killer) remove(names ...string) {
	k.T.Helper()
	for _, name := range names {
		if err := k.Client.RemoveObject(k.Ctx, name); err != nil {
			k.T.Fatal(err)
		}
	}
}

// storing kills d when some of an object's chunks are there. What was given a receipt
// stays for later rounds.
func (k *killer) storing(d *device) bool {
	k.T.Helper()
	k.trim()
	placed := make(chan api.Placement, killAtOnce*killObject)
	await := 1 + k.rng.IntN(killAtOnce*killObject/2)
	names, done := k.store(killAtOnce, placed)
	for range await {
		select {
		case <-placed:
		case <-done: // with an error
		}
	}
	inTime := k.strike(d, 60*time.Millisecond, func() bool {
		select {
		case <-done:
			return false
		default:
			return true
		}
	})
	<-done
	k.kept = append(k.kept, names...)
	return inTime
}

// emptying kills d while what lives in its segments is moved, because most of what
// was put lately was removed at once. That begins when something is removed, or when
// the segment that all of it lies in is full.
func (k *killer) emptying(d *device) bool {
	k.T.Helper()
	begun := d.said(emptyingBegins)
	begins := func(before <-chan struct{}) bool {
		for {
			if d.said(emptyingBegins) > begun {
				return true
			}
			select {
			case <-before:
				return false
			case <-time.After(2 * time.Millisecond):
			}
		}
	}
	strike := func() bool {
		return k.strike(d, 30*time.Millisecond, func() bool { // as long as one takes
			log := readFile(k.T, d.log())
			return bytes.LastIndex(log, []byte(emptyingBegins)) > bytes.LastIndex(log, []byte(emptyingEnds))
		})
	}
	for !k.T.Failed() { // until there is a full segment
		names, done := k.store(killAtOnce, nil)
		if begins(done) {
			inTime := strike()
			<-done
			k.kept = append(k.kept, names...)
			return inTime
		}
		k.kept = append(k.kept, names[:2]...)
		k.remove(names[2:]...)
		k.trim()
		second, cancel := context.WithTimeout(k.Ctx, time.Second)
		soon := begins(second.Done())
		cancel()
		if soon {
			return strike()
		}
	}
	return false
}

const (
	sessionBegins  = `"msg":"online"`
	emptyingBegins = "a segment is being emptied"
	emptyingEnds   = "a segment was emptied"
	scrubEnds      = "everything on a volume was read and verified"
	scrubForgot    = "how far the scrub of a volume was is not known"
)

// scrubbing kills d in a round of its scrub. There is always one.
func (k *killer) scrubbing(d *device) bool {
	k.T.Helper()
	ended := d.said(scrubEnds)
	k.Until(d.name+" having read everything once more", func() bool { return d.said(scrubEnds) > ended })
	k.strike(d, time.Second, func() bool { return true })
	if n := d.said(scrubForgot); n > 0 {
		k.T.Errorf("%s has forgotten %d times how far its scrub was", d.name, n)
	}
	return true
}

// draining kills d while its chunks are brought elsewhere or dropped. The drain goes on
// to its end all the same.
func (k *killer) draining(d *device) bool {
	k.T.Helper()
	if _, err := k.Client.DrainDevice(k.Ctx, string(d.id)); err != nil {
		k.T.Fatal(err)
	}
	var v api.Drain
	show := func() bool {
		var err error
		if v, err = k.Client.Drain(k.Ctx, string(d.id)); err != nil {
			k.T.Fatal(err)
		}
		return v.State != api.DrainDone
	}
	part := k.rng.Float64()
	k.Until("the drain of "+d.name+" having come so far", func() bool {
		return !show() || v.Moved > 0 || float64(v.Alone) < part*float64(v.Chunks)
	})
	inTime := k.strike(d, 300*time.Millisecond, show)
	k.checkServed(d.name + " was killed in the middle of a drain")
	k.Until("the drain of "+d.name+" having ended", func() bool { return !show() })
	if v.Left != 0 {
		k.T.Errorf("the drain of %s ended as %+v", d.name, v)
	}
	if err := k.Client.CancelDrain(k.Ctx, string(d.id)); err != nil { // it is used again
		k.T.Fatal(err)
	}
	return inTime
}

// places is where each chunk of an object is.
func (k *killer) places(name string) []api.Placement {
	k.T.Helper()
	places, err := k.Client.ObjectPlacements(k.Ctx, name)
	if err != nil {
		k.T.Fatal(err)
	}
	return places
}

// receipts are the places of all chunks.
func (k *killer) receipts() <-chan api.Placement {
	k.T.Helper()
	var all []api.Placement
	for _, name := range k.kept {
		all = append(all, k.places(name)...)
	}
	out := make(chan api.Placement, len(all))
	for _, p := range all {
		out <- p
	}
	close(out)
	return out
}

// checkServed reads every chunk from every device that should have it.
func (k *killer) checkServed(when string) {
	k.T.Helper()
	for _, name := range k.kept {
		var readers sync.WaitGroup
		for i, p := range k.places(name) {
			if len(p.Holders) < 2 {
				k.T.Errorf("%s: chunk %s has %d holders", when, p.ID, len(p.Holders))
			}
			for _, h := range p.Holders {
				readers.Go(func() {
					problem := k.served(p.ID, h)
					if problem != "" && k.holds(name, i, h) { // a drain may have taken it off meanwhile
						k.T.Errorf("%s: chunk %s on %s %s", when, p.ID, h.Device, problem)
					}
				})
			}
		}
		readers.Wait()
	}
}

// served says what is wrong with a chunk on a device, if anything is.
func (k *killer) served(id string, h api.Holder) string {
	data, err := k.Client.GetChunkFrom(k.Ctx, id, h.Device)
	switch {
	case h.Lost:
		return "is lost"
	case err != nil:
		return "is not served: " + err.Error()
	case chunk.Sum(data).String() != id:
		return "is something else"
	}
	return ""
}

// holds tells whether chunk i of an object still is to be where it was.
func (k *killer) holds(name string, i int, h api.Holder) bool {
	places, err := k.Client.ObjectPlacements(k.Ctx, name)
	return err != nil || slices.ContainsFunc(places[i].Holders, func(x api.Holder) bool { return x.Order == h.Order })
}
