package coordinator

import (
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// resting is which devices refuse to move chunks for a while, because of their
// owners' limits or because their disks are too slow at the moment. They said so
// in the report on an order or in a heartbeat, and until then they are asked for no
// bulk: they get no chunks, and reads go to others. It is neither a lie nor a
// silence, so no score hears of it, and they are challenged as ever.
//
// It is in memory only: the next heartbeat tells it again.
type resting struct {
	now func() time.Time

	mu   sync.Mutex
	rows map[wire.DeviceID]api.Rest
}

// longestRest is more than a month's volume can be used up for.
const longestRest = 32 * 24 * time.Hour

// heard takes what a report says.
func (r *resting) heard(rep wire.Report) {
	if rep.RetrySeconds <= 0 || !rep.State.Terminal() {
		return
	}
	at := r.now()
	if rep.TimeConfidence == wire.ClockTrusted && rep.At.Before(at) { // it may have been on its way for long
		at = rep.At
	}
	r.rest(rep.Device, rep.Code, at, rep.RetrySeconds)
}

// said takes what a heartbeat says, also that nothing is refused any more.
func (r *resting) said(b wire.Beat) {
	if b.Pause != nil && b.Pause.Seconds > 0 {
		r.rest(b.Device, b.Pause.Code, r.now(), b.Pause.Seconds)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.rows, b.Device)
}

func (r *resting) rest(d wire.DeviceID, code string, at time.Time, seconds int64) {
	until := at.Add(time.Duration(min(seconds, int64(longestRest/time.Second))) * time.Second)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rows == nil {
		r.rows = make(map[wire.DeviceID]api.Rest)
	}
	r.rows[d] = api.Rest{Code: label(code), Until: until.UTC()}
}

// of is a device's rest; nil if it has none.
func (r *resting) of(d wire.DeviceID) *api.Rest {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.rows[d]
	if !ok {
		return nil
	}
	if !r.now().Before(v.Until) {
		delete(r.rows, d)
		return nil
	}
	return &v
}

// count is how many rest.
func (r *resting) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, v := range r.rows {
		if r.now().Before(v.Until) {
			n++
		}
	}
	return n
}

// serves tells whether a device may be asked for what it holds: a disk that is
// too slow for more is not in the way of that.
func (r *resting) serves(d wire.DeviceID) bool {
	v := r.of(d)
	return v == nil || v.Code == wire.CodeBusy
}

// busyUntil is when the first of these devices whose disks are too slow may be
// asked again; zero if there is none.
func (r *resting) busyUntil(among func(wire.DeviceID) bool) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	var first time.Time
	for d, v := range r.rows {
		if v.Code == wire.CodeBusy && among(d) && (first.IsZero() || v.Until.Before(first)) {
			first = v.Until
		}
	}
	return first
}
