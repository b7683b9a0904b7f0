package coordinator

import (
	"bytes"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// refusing makes a device refuse that kind of order until it is set to 0, and
// counts how often it was asked.
func (d *device) refusing(k wire.Kind, code string, seconds *atomic.Int64) (asked *atomic.Int32) {
	asked = new(atomic.Int32)
	d.on(k, func(o wire.Order) *reply {
		asked.Add(1)
		if s := seconds.Load(); s > 0 {
			return &reply{state: wire.Rejected, code: code, retry: s}
		}
		return d.honest(o)
	})
	return asked
}

func (w *world) putOne(t *testing.T, replicas int) (id string) {
	t.Helper()
	data := someBytes(1000)
	id = chunk.Sum(data).String()
	_, err := w.op.PutChunk(testContext(t), id, data, replicas)
	must(t, err)
	return id
}

// A device that refuses because of a limit is asked once, and then not before the
// time that it named. No score hears of it.
func TestADeviceThatRefusesForAWhileIsLeftAloneUntilThen(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.freeze()
	limited := w.enrolled(t)
	limited.capacity = 1 << 50 // it is asked first
	var seconds atomic.Int64
	seconds.Store(3600)
	asked := limited.refusing(wire.KindChunkStore, wire.CodeMetered, &seconds)
	limited.connect(w)
	t.Cleanup(limited.leave)
	w.devices(t, 2)
	for range 20 {
		w.putOne(t, 2)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("it was asked %d times", n)
	}
	v, err := w.op.Device(testContext(t), string(limited.id))
	must(t, err)
	if want := w.now().Add(time.Hour); v.Rest == nil || v.Rest.Code != wire.CodeMetered || !v.Rest.Until.Equal(want) {
		t.Errorf("shown is %+v, want until %s", v.Rest, want)
	}
	if s := w.audits.scoreOf(limited.id); s.integrity() != 1 || s.reachability() != 1 || len(s.Penalties) != 0 {
		t.Errorf("it cost the device: %+v", s)
	}
	seconds.Store(0)
	w.advance(time.Hour + time.Second)
	w.putOne(t, 3) // all are needed
	if asked.Load() != 2 {
		t.Errorf("when it may be asked again, it was asked %d times", asked.Load()-1)
	}
}

// A heartbeat says it before anybody asks, and the next one that it is over.
// Meanwhile the device is challenged as ever.
func TestAHeartbeatSaysThatADeviceRests(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	id := w.putOne(t, 1)
	var none atomic.Int64
	stores := d.refusing(wire.KindChunkStore, "", &none)
	serves := d.refusing(wire.KindChunkServe, "", &none)
	rests := func(p *wire.Pause) {
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, Pause: p})
	}
	for _, code := range []string{wire.CodeMetered, wire.CodeQuietHours} {
		rests(&wire.Pause{Code: code, Seconds: 3600})
		data := someBytes(1000)
		_, err := w.op.PutChunk(testContext(t), chunk.Sum(data).String(), data, 1)
		wantRefusal(t, err, http.StatusServiceUnavailable, "too_few_devices")
		if err == nil || !strings.Contains(err.Error(), "1 that refuse chunks for a while") {
			t.Errorf("it says %v", err)
		}
		_, err = w.op.GetChunk(testContext(t), id)
		wantRefusal(t, err, http.StatusServiceUnavailable, code)
		_, err = w.op.GetChunkFrom(testContext(t), id, d.id)
		wantRefusal(t, err, http.StatusServiceUnavailable, code)
	}
	if stores.Load()+serves.Load() != 0 {
		t.Errorf("it was asked for %d stores and %d reads", stores.Load(), serves.Load())
	}
	if len(holders(w.chunkRecord(t, id).Holders)) != 1 {
		t.Error("rest was taken for a loss")
	}
	a, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id, Leaves: 5})
	if err != nil || a.Outcome != api.AuditRight {
		t.Errorf("a challenge meanwhile: %+v, %v", a, err)
	}
	rests(nil)
	w.putOne(t, 1)
	_, err = w.op.GetChunk(testContext(t), id)
	must(t, err)
}

func TestReadsGoToThoseThatDoNotRest(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	devices := w.devices(t, 2)
	id := w.putOne(t, 2)
	var none atomic.Int64
	for _, code := range []string{wire.CodeMetered, wire.CodeBusy} {
		asked := devices[0].refusing(wire.KindChunkServe, "", &none)
		w.hearFrom(t, devices[0], wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: devices[0].id, Pause: &wire.Pause{Code: code, Seconds: 3600}})
		for range 10 {
			got, err := w.storage.read(testContext(t), id)
			if err != nil || chunk.Sum(got).String() != id {
				t.Fatal(err)
			}
		}
		if asked.Load() != 0 {
			t.Errorf("%s: it was asked %d times", code, asked.Load())
		}
	}
	devices[1].leave() // a slow disk is better than none
	eventually(t, "one device is there", func() bool { return !w.reg.online(devices[1].id) })
	if got, err := w.storage.read(testContext(t), id); err != nil || !bytes.Equal(got, devices[0].chunks[id]) {
		t.Error(err)
	}
}

// Disks that are too slow for some seconds are waited for, where no other is left,
// but not for ever.
func TestABusyDeviceIsWaitedForWhereThereIsNoOther(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	var seconds atomic.Int64
	seconds.Store(1)
	asked := d.refusing(wire.KindChunkStore, wire.CodeBusy, &seconds)
	placed := make(chan error, 1)
	data := someBytes(1000)
	ctx := testContext(t)
	go func() {
		_, err := w.op.PutChunk(ctx, chunk.Sum(data).String(), data, 1)
		placed <- err
	}()
	eventually(t, "it refuses twice", func() bool { return asked.Load() >= 2 })
	select {
	case err := <-placed:
		t.Fatalf("given up: %v", err)
	default:
	}
	seconds.Store(0)
	must(t, next(t, placed, "the placement"))
	if !d.holds(chunk.Sum(data).String()) {
		t.Error("it is not there")
	}
	// With another, nobody waits.
	other := w.device(t)
	seconds.Store(3600)
	for range 5 {
		w.putOne(t, 1)
	}
	if n := len(other.chunks); n < 4 {
		t.Errorf("the other device has %d of 5", n)
	}
}

func TestARestEndsAndIsBounded(t *testing.T) {
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	r := resting{now: func() time.Time { return now }}
	rep := func(at time.Time, sure wire.Confidence, state wire.State, seconds int64) wire.Report {
		return wire.Report{Device: "d", State: state, Code: wire.CodeMetered, RetrySeconds: seconds, At: at, TimeConfidence: sure}
	}
	for what, c := range map[string]struct {
		rep  wire.Report
		left time.Duration
	}{
		"as said":                    {rep(now, wire.ClockTrusted, wire.Rejected, 60), time.Minute},
		"long on its way":            {rep(now.Add(-40*time.Second), wire.ClockTrusted, wire.Rejected, 60), 20 * time.Second},
		"over when it arrives":       {rep(now.Add(-time.Hour), wire.ClockTrusted, wire.Rejected, 60), 0},
		"of a clock that is ahead":   {rep(now.Add(time.Hour), wire.ClockTrusted, wire.Rejected, 60), time.Minute},
		"of a clock that is unknown": {rep(now.Add(-time.Hour), wire.ClockFloor, wire.Rejected, 60), time.Minute},
		"for ever":                   {rep(now, wire.ClockTrusted, wire.Failed, 1<<62), longestRest},
		"negative":                   {rep(now, wire.ClockTrusted, wire.Rejected, -5), 0},
		"not final":                  {rep(now, wire.ClockTrusted, wire.Running, 60), 0},
	} {
		r.rows = nil
		r.heard(c.rep)
		if c.left == 0 {
			if got := r.of("d"); got != nil {
				t.Errorf("%s: until %s", what, got.Until)
			}
			continue
		}
		begin := now
		now = begin.Add(c.left - time.Nanosecond)
		if r.of("d") == nil {
			t.Errorf("%s: over too soon", what)
		}
		now = begin.Add(c.left)
		if r.of("d") != nil || len(r.rows) != 0 {
			t.Errorf("%s: not over after %s", what, c.left)
		}
		now = begin
	}
}
