package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"
)

// How a device stays in. Its certificate is renewed at two thirds of its life,
// by the time that the device knows for sure; and whenever broker or data plane
// refuse it although they can be reached, because then its certificate may have
// ended while it was off, or its clock may be wrong. To renew takes the device's
// key and no token. A device that was sent away is told so, and then asks only
// about once an hour.

const (
	renewCheck  = 10 * time.Minute // how long a timer is believed
	renewMin    = time.Minute
	renewMax    = time.Hour
	renewGap    = 4 * time.Minute  // between two questions, give or take a half
	renewRare   = time.Hour        // the same, for a device that was sent away
	doubtSpread = 10 * time.Second // a broker that refuses everybody must not bring all of them here at once
)

// renewAt is when to renew: at two thirds of the certificate's life, and up to a
// tenth later (place from 0 to 1), so that a fleet that came together does not
// renew together.
func (m *Membership) renewAt(place float64) time.Time {
	life := m.ends().Sub(m.issued())
	return m.issued().Add(life*2/3 + time.Duration(place*float64(life/10)))
}

// keepRoot leaves the root of trust for updates as it is: it comes from the
// coordinator once. Later only its own keys change it (see ota/repo), or a
// coordinator could take over what runs here.
func (m *Membership) keepRoot(old *Membership) {
	if len(old.UpdateRoot) > 0 {
		m.UpdateRoot = old.UpdateRoot
	}
}

// doubted says that a server of the fleet was reached and refused this device.
func (a *Agent) doubted() {
	select {
	case a.doubts <- struct{}{}:
	default: // it is known already
	}
}

// stayMember renews the membership until ctx ends.
func (a *Agent) stayMember(ctx context.Context) {
	wait := renewMin
	// A member that is sent to another address asks there, and holds whoever answers
	// against its own authority: that is how it follows a coordinator that has moved.
	moved := a.cfg.Coordinator != "" && !slices.Contains(a.member.Load().addresses(""), a.cfg.Coordinator)
	for place := rand.Float64(); moved && ctx.Err() == nil || a.awaitRenewal(ctx, place); {
		err := a.renew(ctx)
		pause := renewGap
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			place, wait, moved = rand.Float64(), renewMin, false
		case forbidden(err):
			if a.dismissed.CompareAndSwap(false, true) {
				a.log.Error("the coordinator has sent this device away; it takes no orders, keeps what it has, and asks again about once an hour", "error", err)
			}
			a.session.slow(true)
			pause, moved = renewRare, false
		default:
			a.log.Warn("the membership cannot be renewed; trying again", "ends", a.member.Load().ends().Format(time.RFC3339), "error", plain(err))
			// Twice, as the pause may be half of it.
			pause, wait = max(wait, renewGap, 2*putOff(err)), min(2*wait, renewMax)
		}
		if a.rest(ctx, pause/2+rand.N(pause)) != nil {
			return
		}
	}
}

// awaitRenewal returns true when it is time to renew, false when ctx ends.
func (a *Agent) awaitRenewal(ctx context.Context, place float64) bool {
	for {
		if ctx.Err() != nil {
			return false
		}
		due := a.member.Load().renewAt(place)
		left := due.Sub(a.clock.AtLeast())
		if left <= 0 || a.dismissed.Load() {
			return true
		}
		t := time.NewTimer(min(left, renewCheck))
		select {
		case <-ctx.Done():
		case <-a.doubts:
			t.Stop()
			return a.rest(ctx, rand.N(doubtSpread)) == nil
		case <-a.timed:
		case <-t.C:
		}
		t.Stop()
	}
}

// renew asks for a new certificate, once at each address, and puts the answer
// in force.
func (a *Agent) renew(ctx context.Context) error {
	old := a.member.Load()
	req, err := a.request()
	if err != nil {
		return err
	}
	var failed error
	for _, base := range old.addresses(a.cfg.Coordinator) {
		m, p, err := enrol(ctx, a.id, knows(old.authority(), a.clock), base, req)
		switch {
		case err == nil && p != nil:
			a.showClaim(old.authority())
			return errors.New("the coordinator does not know this device any more; it waits to be claimed")
		case err == nil:
			a.renewed(m, old, base)
			return nil
		case forbidden(err), ctx.Err() != nil:
			return err // an answer, or no time for one
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", base, plain(err)))
	}
	return failed
}

// addresses are where a member may ask: what its owner configured, where it
// enrolled, and the data plane, which is the same server.
func (m *Membership) addresses(configured string) []string {
	var all []string
	for _, base := range append([]string{configured, m.Coordinator}, m.DataPlane...) {
		if base != "" && !slices.Contains(all, base) {
			all = append(all, base)
		}
	}
	return all
}

// renewed puts a checked answer in force: for the next handshakes, without a
// restart. The connections that stand end by themselves.
func (a *Agent) renewed(m, old *Membership, base string) {
	m.Coordinator = old.Coordinator
	if base == a.cfg.Coordinator {
		m.Coordinator = base
	}
	m.keepRoot(old)
	if err := m.save(a.cfg.path("identity")); err != nil {
		// It is good until the agent ends, and can be had again after that.
		a.log.Warn("the renewed membership cannot be saved", "error", err)
	}
	a.member.Store(m)
	a.clock.Raise(m.issued())
	a.forgetClaim()
	a.dismissed.Store(false)
	select {
	case <-a.doubts: // of the old certificate
	default:
	}
	a.log.Info("membership renewed", "until", m.ends().Format(time.RFC3339))
	a.web.CloseIdleConnections()
	a.session.slow(false)
}

// dataPlane is HTTPS that notices when the data plane refuses this device.
type dataPlane struct {
	*http.Transport
	refused func()
}

func (d dataPlane) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := d.Transport.RoundTrip(r)
	if isAlert(err) {
		d.refused()
	}
	return resp, err
}
