package coordinator

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// # Orders of jobs that are no task's
//
// A challenge, or a witness's run, is to be one more task of a customer's to the device that
// gets it. If it came beside the tasks that fill the device's slots, the device would know it by
// counting. So it waits for a place that a task would be given, and takes it. From then on it is
// counted as long as the outbox has it open: after a restart, too, and if another coordinator
// has made it.

// reservation is for an order that waits for a place on a device.
type reservation struct {
	order  string
	device wire.DeviceID
	come   chan struct{} // closed when it has its place
}

// reserve waits until a device would be given one more task, and keeps that place for an order
// that is about to be made. sent ends that, once the order is made or will not be; the place
// is taken until the order has ended. A device that is away or stands still has no place; the
// error is that of ctx. Who does not place tasks cannot wait for a place, and takes none.
func (s *jobs) reserve(ctx context.Context, d wire.DeviceID, order string) (sent func(), err error) {
	if !s.leading.Load() {
		return func() {}, nil
	}
	p, t := &s.plan, &reservation{order: order, device: d, come: make(chan struct{})}
	p.mu.Lock()
	p.turns = append(p.turns, t)
	p.mu.Unlock()
	s.poke()
	sent = func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.release(order, d)
		p.others[d]++ // until they are counted
	}
	select {
	case <-t.come:
		return sent, nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.turns, t); i >= 0 {
		p.turns = slices.Delete(p.turns, i, i+1)
	} else { // it came in the same moment
		p.release(order, d)
	}
	return nil, fmt.Errorf("device %s has not had room for one more job in time: %w", d, ctx.Err())
}

// # How many jobs at once
//
// Slots are a device's word. It begins with [firstJobs] at most, has one more place for each job
// that it does, so twice as many with each round of them, and loses half with each that it says
// nothing of. One that says it has many slots and is silent has few tasks that wait for it.

// did has a device get one more job at once, up to what its slots allow. p.mu is held.
func (p *planner) did(d wire.DeviceID) {
	n := p.trusts(d) + 1
	if x := p.there.find(d); x != nil {
		n = min(n, max(firstJobs, quickAhead*x.slots))
	}
	p.proven[d] = n
}

// missed has a device that has not said a word of a job get half as many at once. p.mu is held.
func (p *planner) missed(d wire.DeviceID) { p.proven[d] = max(p.trusts(d)/2, 1) }

// trusts is how many jobs at once a device is good for. p.mu is held.
func (p *planner) trusts(d wire.DeviceID) int {
	if n, ok := p.proven[d]; ok {
		return n
	}
	return firstJobs
}

// places is how many more jobs each device may have now, if they take a while, and if they are
// quick. p.mu is held.
func (p *planner) places() (room, ahead map[wire.DeviceID]int) {
	room, ahead = make(map[wire.DeviceID]int, len(p.there.all)), make(map[wire.DeviceID]int, len(p.there.all))
	for _, d := range p.there.all {
		has, most := p.busy[d.id]+p.others[d.id], p.trusts(d.id)
		room[d.id], ahead[d.id] = min(d.slots, most)-has, min(quickAhead*d.slots, most)-has
	}
	return room, ahead
}

// takeTurns gives orders that are no task's the places that they wait for, before tasks. Beyond
// its slots a device has one only while it has tasks there. It says when to look again.
// p.mu is held.
func (p *planner) takeTurns(room, ahead map[wire.DeviceID]int) time.Duration {
	still := p.turns[:0]
	for _, t := range p.turns {
		d := p.there.find(t.device)
		if d == nil || d.rests != nil || room[t.device] <= 0 && (room[t.device] == 0 || ahead[t.device] <= 0) {
			still = append(still, t)
			continue
		}
		p.busy[t.device]++
		p.following[t.order] = true
		room[t.device]--
		ahead[t.device]--
		close(t.come)
	}
	clear(p.turns[len(still):])
	p.turns = still
	if len(p.others) > 0 { // whose end nobody here is told of
		return devicesFresh
	}
	return houseEvery
}

// openBut is how many orders of a kind are open at each device, but those of others.
func (o *outbox) openBut(k wire.Kind, others map[string]bool) map[wire.DeviceID]int {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make(map[wire.DeviceID]int)
	for p, d := range o.kinds[k] {
		if !others[p.id] {
			out[d]++
		}
	}
	return out
}
