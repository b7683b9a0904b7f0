package coordinator

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// TestAFloodOfOneDeviceSilencesNobody: it sends reports that are good in form,
// faster than they can be looked at.
func TestAFloodOfOneDeviceSilencesNobody(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	flooder, other := w.enrolled(t), w.enrolled(t)
	raw, err := wire.Seal(flooder.key, wire.TypeReport, wire.Report{Order: "01NONE", Device: flooder.id, Seq: 1, State: wire.Running})
	must(t, err)
	stop, full := make(chan struct{}), make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		nc := w.eng.Conn()
		for round := 0; ; round++ {
			select {
			case <-stop:
				return
			default:
			}
			for range 1000 {
				if err := nc.Publish(wire.Subject(flooder.id, wire.ChannelReport), raw); err != nil {
					t.Error(err)
					return
				}
			}
			if err := nc.FlushTimeout(patience); err != nil {
				t.Error(err)
				return
			}
			if round == 20 {
				close(full)
			}
		}
	})
	defer flood.Wait()
	defer close(stop)
	next(t, full, "the flood")
	other.connect(w) // one hello, and its welcome
	if !w.reg.online(other.id) {
		t.Error("the device is not there")
	}
}

// lines counts lines of a log.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

func TestADeviceThatMisbehavesHasOneLogLineAMinute(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.freeze()
	const burst = 100
	w.heard = newBuckets(hearRate, burst)
	d, e := w.enrolled(t), w.enrolled(t)
	bad := func(d *device, n int) string {
		for range n {
			w.hearFrom(t, d, wire.ChannelReport, wire.TypeBeat, wire.Beat{Device: d.id})
		}
		return w.said.take()
	}
	count := func(log, what string, want int) {
		t.Helper()
		if n := strings.Count(log, what); n != want {
			t.Errorf("%q %d times, want %d:\n%s", what, n, want, log)
		}
	}
	log := bad(d, burst+10)
	count(log, "was not taken", 1)
	count(log, "dropped=1", 1)
	log = bad(e, 2)
	count(log, "was not taken", 1) // the other's lines are its own
	w.advance(complainEvery)
	log = bad(d, burst+1)
	count(log, fmt.Sprintf("times=%d", burst), 1)
	count(log, "dropped=10", 1)
	w.advance(2 * complainEvery)
	bad(e, 1)
	if n := len(w.refused.of); n != 1 {
		t.Errorf("%d devices are remembered", n)
	}
}

func TestWhoIsRetiredMeanwhileIsGivenNothing(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	chosen, err := w.reg.selected(api.Selector{Devices: []wire.DeviceID{d.id}})
	must(t, err)
	_, err = w.op.RetireDevice(testContext(t), string(d.id), false)
	must(t, err)
	o, err := w.outbox.submit(testContext(t), chosen[0].ID, extension, struct{}{}, 28*24*time.Hour)
	must(t, err)
	if v := w.record(t, o); v.State != wire.Canceled || v.Result.Code != wire.CodeRetired {
		t.Errorf("%s %s", v.State, v.Result.Code)
	}
	if open := w.outbox.openOf(d.id); len(open) != 0 {
		t.Errorf("open: %v", open)
	}
}

func TestReportsAreASignOfLife(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	w.freeze()
	report := func() {
		w.hearFrom(t, d, wire.ChannelReport, wire.TypeReport, wire.Report{Order: "01NONE", Device: d.id, State: wire.Succeeded, Seq: 1})
		w.reg.expire()
	}
	for range 5 {
		w.advance(w.cfg.Beat)
		report()
	}
	if !w.reg.online(d.id) {
		t.Error("a device that reports all the time counts as away")
	}
	w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Session: d.session})
	report()
	if w.reg.online(d.id) {
		t.Error("a late report brought back who has left")
	}
}
