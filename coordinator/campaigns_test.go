package coordinator

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// quickly lets campaigns go on in moments.
func quickly(c *Config) {
	c.campaignPace = campaignPace{step: 20 * time.Millisecond, retry: 100 * time.Millisecond, stuck: time.Hour, lease: 2 * time.Second}
}

// rollout is a coordinator with a release, and devices that take it.
type rollout struct {
	*world
	t       testing.TB
	version string

	mu    sync.Mutex
	asked map[wire.DeviceID][]wire.Order // each once, in the order in which they came
	order []wire.DeviceID
}

func newRollout(t testing.TB, w *world, version string) *rollout {
	t.Helper()
	w.publish(t, version)
	return &rollout{world: w, t: t, version: version, asked: make(map[wire.DeviceID][]wire.Order)}
}

// ownRollout is a coordinator in a hurry for one test, with release 2.0.0.
func ownRollout(t testing.TB) (*world, *rollout) {
	t.Helper()
	w := openWith(t, t.TempDir(), quickly)
	t.Cleanup(w.Close)
	return w, newRollout(t, w, "2.0.0")
}

// taker is a device that takes releases: what it is asked, it is.
func (r *rollout) taker(d *device) *device { return r.does(d, d.takes) }

func (r *rollout) does(d *device, what func(wire.Order) *reply) *device {
	d.on(wire.KindUpdateInstall, func(o wire.Order) *reply {
		r.mu.Lock()
		r.asked[d.id] = append(r.asked[d.id], o)
		r.order = append(r.order, d.id)
		r.mu.Unlock()
		return what(o)
	})
	return d
}

// takes installs a release, comes up with it and confirms it.
func (d *device) takes(o wire.Order) *reply {
	b, _ := wire.DecodeBody[wire.UpdateInstall](o)
	d.mu.Lock()
	from := d.agent
	d.agent = b.Version
	d.mu.Unlock()
	// Its hello, whose welcome nobody waits for: the coordinator may be ended now.
	raw, err := wire.Seal(d.key, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: d.session, Nonce: newNonce(),
		Agent: b.Version, OS: "linux", Arch: "arm64", Board: "test", Capacity: d.capacity})
	if err != nil {
		return failed(wire.CodeInternal)
	}
	d.mqtt.Publish(wire.Topic(d.id, wire.ChannelPresence), 0, false, raw)
	return &reply{state: wire.Succeeded, body: wire.UpdateResult{From: from, To: b.Version, Running: b.Version, Confirmed: true}}
}

// latecomer is a taker that knows what to say before it is there: it can be asked at once.
func (r *rollout) latecomer() *device {
	r.t.Helper()
	d := r.taker(r.enrolled(r.t))
	d.connect(r.world)
	r.t.Cleanup(d.leave)
	return d
}

func (r *rollout) takers(n int) []*device {
	r.t.Helper()
	out := make([]*device, n)
	for i := range out {
		out[i] = r.taker(r.device(r.t))
	}
	return out
}

// says lets a device say something of an order without ending it.
func (d *device) says(o wire.Order, state wire.State, code string) {
	d.mu.Lock()
	d.seq++
	seq := d.seq
	d.mu.Unlock()
	raw, err := wire.Seal(d.key, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: seq, State: state, Code: code, At: time.Now()})
	if err == nil {
		d.mqtt.Publish(wire.Topic(d.id, wire.ChannelReport), 0, false, raw)
	}
}

func (r *rollout) ordersOf(d *device) []wire.Order {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.asked[d.id])
}

// asks is the orders for this release that a device was sent.
func (r *rollout) asks(d *device) []wire.Order {
	return slices.DeleteFunc(r.ordersOf(d), func(o wire.Order) bool {
		b, err := wire.DecodeBody[wire.UpdateInstall](o)
		return err != nil || b.Version != r.version
	})
}

func (r *rollout) start(q api.CampaignRequest) api.Campaign {
	r.t.Helper()
	q.Version = cmp.Or(q.Version, r.version)
	q.Rate = cmp.Or(q.Rate, maxRate)
	if q.Selector.Empty() {
		q.All = true
	}
	c, err := r.op.StartCampaign(testContext(r.t), q)
	must(r.t, err)
	return c
}

func (r *rollout) now(id string) api.Campaign {
	r.t.Helper()
	c, err := r.op.Campaign(testContext(r.t), id)
	must(r.t, err)
	return c
}

func (r *rollout) steer(id, what string) {
	r.t.Helper()
	_, err := r.op.SteerCampaign(testContext(r.t), id, what, "")
	must(r.t, err)
}

// until waits for what becomes of a campaign.
func (r *rollout) until(id, what string, f func(c api.Campaign) bool) (c api.Campaign) {
	r.t.Helper()
	came := false
	defer func() {
		if !came {
			raw, _ := json.Marshal(c)
			r.t.Logf("%s", raw)
		}
	}()
	eventually(r.t, what, func() bool { c = r.now(id); return f(c) })
	came = true
	return c
}

func (r *rollout) untilIs(id string, s api.CampaignState) api.Campaign {
	r.t.Helper()
	return r.until(id, "the campaign is "+string(s), func(c api.Campaign) bool { return c.State == s })
}

// holds sees that a campaign asks nobody: it has been looked at many times since.
func (r *rollout) holds(id string, f func(c api.Campaign) bool) {
	r.t.Helper()
	for range 15 {
		time.Sleep(20 * time.Millisecond)
		if c := r.now(id); !f(c) {
			r.t.Errorf("it does not stay as it was: %+v", c)
			return
		}
	}
}

// later advances the clock of the coordinator; those who are there say so before it looks.
func (r *rollout) later(by time.Duration, there ...*device) {
	r.t.Helper()
	r.campaigns.mu.Lock()
	defer r.campaigns.mu.Unlock()
	r.advance(by)
	for _, d := range there {
		d.hello()
	}
}

func percent(p float64) api.CampaignPhase { return api.CampaignPhase{Percentage: p} }

func byPoint(version string, list []*device) []*device {
	point := func(d *device) float64 { return bundle.RolloutPoint(version, string(d.id)) }
	return slices.SortedFunc(slices.Values(list), func(a, b *device) int { return cmp.Compare(point(a), point(b)) })
}

func TestACampaignGoesFromPhaseToPhaseAndLateDevicesFollow(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	devices := byPoint("2.0.0", r.takers(10))
	away := r.taker(w.enrolled(t))
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 2, SoakSeconds: 0.3}, percent(50), percent(100)}})
	c = r.untilIs(c.ID, api.CampaignDone)
	if !c.Current || c.Counts[api.StandsUpdated] != 10 || c.Counts[api.StandsAway] != 1 || c.Devices != 11 {
		t.Errorf("%+v", c)
	}
	if soaked := c.Phases[0].Ended.Sub(c.Phases[0].Settled); soaked < 300*time.Millisecond {
		t.Errorf("the canary has soaked for %s", soaked)
	}
	for i, d := range devices {
		list := r.ordersOf(d)
		if len(list) == 0 {
			t.Fatalf("device %d of 10 was not asked", i)
		}
		b, _ := wire.DecodeBody[wire.UpdateInstall](list[0])
		point := bundle.RolloutPoint("2.0.0", string(d.id))
		if b.Version != "2.0.0" || b.Target != repo.TargetName("2.0.0") || b.Percentage != 0 && b.Percentage <= point || i < 2 && b.Percentage == 0 {
			t.Errorf("device %d of 10, at %v, was asked %+v", i, point, b)
		}
		for _, o := range list {
			if o.ID != list[0].ID {
				t.Errorf("device %d was asked twice", i)
			}
		}
	}
	// By turns: nobody was asked before all of the phase before had ended.
	r.mu.Lock()
	var turn []int
	for _, id := range r.order {
		if i := slices.IndexFunc(devices, func(d *device) bool { return d.id == id }); !slices.Contains(turn, i) {
			turn = append(turn, i)
		}
	}
	r.mu.Unlock()
	half := slices.IndexFunc(devices, func(d *device) bool { return bundle.RolloutPoint("2.0.0", string(d.id)) >= 50 })
	if half < 0 {
		half = 10
	}
	for i, d := range turn {
		if i < 2 && d >= 2 || i < half && d >= max(half, 2) {
			t.Errorf("by turns %v were asked; the canary is 0 and 1, and below 50%% are the first %d", turn, half)
		}
	}

	away.connect(w)
	t.Cleanup(away.leave)
	newcomer := r.latecomer()
	r.until(c.ID, "who comes late has it too", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 12 })
	if len(r.ordersOf(away)) == 0 || len(r.ordersOf(newcomer)) == 0 {
		t.Error("they were not asked")
	}
	// One that comes back with an older version is asked anew, by another order.
	back := devices[3]
	back.mu.Lock()
	back.agent = "1.0.0"
	back.mu.Unlock()
	r.later(settleAfter+time.Minute, append([]*device{away, newcomer}, devices...)...)
	eventually(t, "a device that went back is asked again", func() bool {
		list := r.ordersOf(back)
		return list[len(list)-1].ID != list[0].ID
	})

	// A newer campaign for some takes its place for them, and for no others.
	r2 := newRollout(t, w, "2.1.0")
	_, err := w.op.ChangeDevices(testContext(t), api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{newcomer.id}}, SetGroup: new("roof")})
	must(t, err)
	r2.taker(newcomer)
	c2 := r2.start(api.CampaignRequest{Selector: api.Selector{Groups: []string{"roof"}}, Phases: []api.CampaignPhase{percent(100)}})
	r2.untilIs(c2.ID, api.CampaignDone)
	r.holds(c.ID, func(c api.Campaign) bool { return c.Current && r2.now(c2.ID).Current })
	for _, d := range devices {
		if n := len(r2.ordersOf(d)); n > 0 {
			t.Errorf("a device of another group got 2.1.0")
		}
	}
	w.publish(t, "2.2.0")
	r2.start(api.CampaignRequest{Version: "2.2.0", Phases: []api.CampaignPhase{percent(100)}})
	r.until(c.ID, "the newest campaign for all is what counts", func(c api.Campaign) bool { return !c.Current && !r2.now(c2.ID).Current })
}

func TestACanaryThatFailsStopsTheCampaign(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	devices := byPoint("2.0.0", r.takers(12))
	fails := func(wire.Order) *reply { return failed(wire.CodeRolledBack) }
	release := make(chan struct{})
	goOn := sync.OnceFunc(func() { close(release) })
	t.Cleanup(goOn)
	canary, rest := devices[:7], devices[7:]
	trying, fetching, queued, waiter := canary[3], canary[4], canary[5], canary[6]
	installing := make(chan bool, 16)
	r.does(trying, func(o wire.Order) *reply {
		trying.says(o, wire.Running, "")
		installing <- true
		<-release
		return trying.takes(o)
	})
	r.does(fetching, func(o wire.Order) *reply { fetching.says(o, wire.Running, ""); return nil })
	r.does(queued, silent)
	r.does(waiter, func(o wire.Order) *reply {
		waiter.says(o, wire.Running, "window")
		return nil
	})
	for _, d := range []*device{fetching, queued, waiter} {
		d.on(wire.KindOrderCancel, func(o wire.Order) *reply {
			b, _ := wire.DecodeBody[wire.OrderCancel](o)
			for _, u := range r.ordersOf(d) {
				if u.ID == b.Order {
					d.says(u, wire.Canceled, wire.CodeCanceled)
				}
			}
			return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Canceled}}
		})
	}
	told := make(chan bool, 16)
	trying.on(wire.KindOrderCancel, func(wire.Order) *reply { // what is on trial is beyond recall
		told <- true
		return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Running}}
	})
	// The second one fails only once the others stand where they are to be.
	second := make(chan struct{})
	r.does(canary[0], fails)
	r.does(canary[1], func(o wire.Order) *reply { <-second; return fails(o) })
	one := 1
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 7, SoakSeconds: 3600}, percent(100)}, Stop: api.CampaignStop{MaxFailed: &one}})
	next(t, installing, "the install")
	r.until(c.ID, "all but one of the canary stand", func(c api.Campaign) bool {
		return c.Counts[api.StandsFailed] == 1 && c.Counts[api.StandsUpdated] == 1 && c.Counts[api.StandsInstalling] == 2 && c.Counts[api.StandsWaiting] == 1 && c.Counts[api.StandsAsked] == 2
	})
	close(second)
	c = r.untilIs(c.ID, api.CampaignStopped)
	if c.Code != api.CampaignTooManyFailed || c.Reason == "" || c.Ended.IsZero() || len(c.Evidence) != 2 {
		t.Errorf("%+v", c)
	}
	for _, e := range c.Evidence {
		if e.Device != canary[0].id && e.Device != canary[1].id || e.Code != wire.CodeRolledBack || e.Reason == "" || e.Order == "" || e.Standing != api.StandsFailed {
			t.Errorf("evidence %+v", e)
		}
	}
	c = r.until(c.ID, "what is not on trial is taken back, also from who fetches", func(c api.Campaign) bool {
		return c.Counts[api.StandsCanceled] == 3 && c.Counts[api.StandsInstalling] == 1
	})
	next(t, told, "the word to who tries it")
	goOn()
	c = r.until(c.ID, "who tries it goes on to the end", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 2 })
	late := r.latecomer()
	r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignStopped && c.Counts[api.StandsLater] == 6 })
	for _, d := range append(rest, late) {
		if n := len(r.ordersOf(d)); n > 0 {
			t.Errorf("a device outside the canary was asked")
		}
	}
	see, err := w.op.Status(testContext(t))
	must(t, err)
	if !slices.ContainsFunc(see.Attention, func(a api.Attention) bool {
		return a.Code == api.AttentionCampaign && a.About == "campaign:"+c.ID
	}) {
		t.Errorf("%+v", see.Attention)
	}
	// The next release is not held up by it, nor by devices that it was canceled on.
	r2 := newRollout(t, w, "2.0.1")
	for _, d := range append(devices, late) {
		r2.taker(d)
	}
	c2 := r2.start(api.CampaignRequest{Phases: []api.CampaignPhase{percent(100)}})
	c2 = r2.untilIs(c2.ID, api.CampaignDone)
	if c2.Counts[api.StandsUpdated] != 13 {
		t.Errorf("%+v", c2.Counts)
	}
}

// A release may turn out bad only when its campaign is done.
func TestWhatIsDoneCanBeAborted(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), quickly)
	t.Cleanup(w.Close)
	all := api.CampaignRequest{Phases: []api.CampaignPhase{percent(100)}}
	r := newRollout(t, w, "2.0.0")
	devices := r.takers(2)
	good := r.start(all)
	r.untilIs(good.ID, api.CampaignDone)
	bad := newRollout(t, w, "2.1.0")
	for _, d := range devices {
		bad.taker(d)
	}
	c := bad.start(all)
	bad.untilIs(c.ID, api.CampaignDone)
	fetching := w.enrolled(t)
	bad.does(fetching, func(o wire.Order) *reply { fetching.says(o, wire.Running, ""); return nil })
	fetching.cancels(t)
	fetching.connect(w)
	t.Cleanup(fetching.leave)
	bad.until(c.ID, "who comes late fetches it", func(c api.Campaign) bool { return c.Counts[api.StandsInstalling] == 1 })
	for _, what := range []string{api.CampaignPause, api.CampaignResume, api.CampaignApprove} {
		_, err := w.op.SteerCampaign(testContext(t), c.ID, what, "")
		wantRefusal(t, err, http.StatusConflict, "ended")
	}
	bad.steer(c.ID, api.CampaignAbort)
	c = bad.until(c.ID, "it is taken back", func(c api.Campaign) bool {
		return c.State == api.CampaignAborted && c.Counts[api.StandsCanceled] == 1
	})
	if c.Current || !r.now(good.ID).Current || c.Counts[api.StandsUpdated] != 2 {
		t.Errorf("%+v", c)
	}
	late := r.latecomer()
	r.until(good.ID, "who comes late gets what was done before", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 3 })
	if b, _ := wire.DecodeBody[wire.UpdateInstall](r.ordersOf(late)[0]); b.Version != "2.0.0" {
		t.Errorf("it was asked to take %s", b.Version)
	}
}

func TestLateDevicesThatFailStopWhatIsDone(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), quickly)
	t.Cleanup(w.Close)
	r := newRollout(t, w, "2.0.0")
	devices := r.takers(3)
	fails := func(wire.Order) *reply { return failed(wire.CodeRolledBack) }
	r.does(devices[0], fails)
	one := 1
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{percent(100)}, Stop: api.CampaignStop{MaxFailed: &one}})
	r.untilIs(c.ID, api.CampaignDone)
	late := func(what func(wire.Order) *reply) *device {
		d := r.does(w.enrolled(t), what)
		d.connect(w)
		t.Cleanup(d.leave)
		return d
	}
	late(fails)
	r.until(c.ID, "a late one has failed", func(c api.Campaign) bool { return c.Counts[api.StandsFailed] == 2 })
	r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignDone }) // before it was done is not late
	late(fails)
	c = r.untilIs(c.ID, api.CampaignStopped)
	if c.Code != api.CampaignTooManyFailed || len(c.Evidence) != 3 || c.Current {
		t.Errorf("%+v", c)
	}
	after := r.latecomer()
	r.holds(c.ID, func(api.Campaign) bool { return len(r.ordersOf(after)) == 0 })
}

func TestLateDevicesThatFallSilentStopWhatIsDone(t *testing.T) {
	t.Parallel()
	_, r := ownRollout(t)
	devices := r.takers(2)
	none := 0
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{percent(100)}, Stop: api.CampaignStop{MaxSilent: &none, SilentSeconds: 600}})
	r.untilIs(c.ID, api.CampaignDone)
	devices[0].leave() // it had it before
	quiet := r.latecomer()
	r.until(c.ID, "who came late has it", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 3 })
	r.later(9*time.Minute, devices[1])
	quiet.leave()
	r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignDone && c.Counts[api.StandsSilent] == 0 })
	r.later(11*time.Minute, devices[1])
	c = r.untilIs(c.ID, api.CampaignStopped)
	if c.Code != api.CampaignTooManySilent || len(c.Evidence) != 1 || c.Evidence[0].Device != quiet.id {
		t.Errorf("%s %s: %+v", c.Code, c.Reason, c.Evidence)
	}
}

// What an order ended with is known for as long as the order is; then the device is
// asked by another one, as it may remember the one before.
func TestWhatIsForgottenIsAskedAnewByAnotherOrder(t *testing.T) {
	t.Parallel()
	w := openWith(t, t.TempDir(), quickly)
	t.Cleanup(w.Close)
	r := newRollout(t, w, "2.0.0")
	d := w.device(t)
	r.does(d, func(wire.Order) *reply { return failed(wire.CodeRolledBack) })
	ten := 10
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{percent(100)}, Stop: api.CampaignStop{MaxFailed: &ten}})
	r.untilIs(c.ID, api.CampaignDone)
	r.later(retention-2*time.Hour, d)
	r.holds(c.ID, func(c api.Campaign) bool { return c.Counts[api.StandsFailed] == 1 })
	first := r.ordersOf(d)[0].ID
	r.later(4*time.Hour, d)
	r.until(c.ID, "it is asked once more, and fails", func(c api.Campaign) bool {
		list := r.ordersOf(d)
		return list[len(list)-1].ID != first && c.Counts[api.StandsFailed] == 1
	})
	id, err := ulid.ParseStrict(c.ID)
	must(t, err)
	w.campaigns.mu.Lock()
	known := maps.Clone(w.campaigns.offers[id.Time()])
	w.campaigns.mu.Unlock()
	if o := known[d.id]; len(known) != 1 || o.attempt != attempts {
		t.Errorf("%+v", known)
	}
	w.campaigns.forget(w.now().Add(retention + time.Hour))
	w.campaigns.mu.Lock()
	defer w.campaigns.mu.Unlock()
	if len(w.campaigns.offers) > 0 {
		t.Errorf("%d campaigns are remembered", len(w.campaigns.offers))
	}
}

// A coordinator that ends between the mark on an order and the cancellation leaves the
// latter to the next: who fetches would go on to install.
func TestAnOrderThatIsOnlyMarkedAsTakenBackIsTakenBack(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	d := w.device(t)
	r.does(d, func(o wire.Order) *reply { d.says(o, wire.Running, ""); return nil })
	d.cancels(t)
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 1, Approve: true}, percent(100)}})
	r.until(c.ID, "it is under way", func(c api.Campaign) bool { return c.Counts[api.StandsInstalling] == 1 })
	_, err := w.op.SteerCampaign(testContext(t), c.ID, api.CampaignApprove, "")
	wantRefusal(t, err, http.StatusConflict, "nothing_to_approve") // of what nobody has seen yet
	_, err = w.outbox.rows.change(testContext(t), orderKeyOf(d.id, r.ordersOf(d)[0].ID), func(v *orderRow, _ bool) error {
		v.Cancel = &api.Cancel{Order: ulid.Make().String(), At: w.now(), By: "coordinator"}
		return nil
	})
	must(t, err)
	r.steer(c.ID, api.CampaignAbort)
	r.until(c.ID, "it is taken back", func(c api.Campaign) bool { return c.Counts[api.StandsCanceled] == 1 })
}

// Who waits for its owner's consent to an older release is not kept from a newer one for
// the week that such an order lives. What has begun goes on to its end first, and so does
// what turns out to have begun when the word to leave it comes.
func TestAnOlderOrderThatHasNotBegunGivesWay(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	waits := func(d *device) func(wire.Order) *reply {
		return func(o wire.Order) *reply { d.says(o, wire.Running, wire.CodeConsent); return nil }
	}
	waiting, offered, fetching, crossing := w.device(t), w.device(t), w.device(t), w.device(t)
	for _, d := range []*device{waiting, offered, crossing} {
		r.does(d, waits(d))
	}
	r.does(fetching, func(o wire.Order) *reply { fetching.says(o, wire.Running, ""); return nil })
	waiting.cancels(t)
	offered.cancels(t)
	fetching.on(wire.KindOrderCancel, func(wire.Order) *reply {
		t.Error("what has begun is taken back")
		return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Running}}
	})
	told := make(chan bool, 16)
	crossing.on(wire.KindOrderCancel, func(wire.Order) *reply { // its owner has agreed this moment
		told <- true
		return &reply{state: wire.Succeeded, body: wire.CancelResult{State: wire.Running}}
	})
	all := []api.CampaignPhase{percent(100)}
	_, err := w.op.Offer(testContext(t), api.OfferRequest{Selector: api.Selector{Devices: []wire.DeviceID{offered.id}}, Version: "2.0.0", Target: repo.TargetName("2.0.0")})
	must(t, err)
	eventually(t, "the one that was asked by hand waits", func() bool { return len(r.ordersOf(offered)) > 0 })
	old := r.start(api.CampaignRequest{Phases: all})
	r.until(old.ID, "they stand where they are to be", func(c api.Campaign) bool {
		return c.Counts[api.StandsWaiting] == 3 && c.Counts[api.StandsInstalling] == 1
	})
	r2 := newRollout(t, w, "2.1.0")
	for _, d := range []*device{waiting, offered} {
		r2.taker(d)
	}
	fetches, tries := r.ordersOf(fetching)[0], r.ordersOf(crossing)[0]
	for _, d := range []*device{fetching, crossing} {
		r2.does(d, func(o wire.Order) *reply {
			if slices.ContainsFunc([]wire.Order{fetches, tries}, func(x wire.Order) bool { return x.ID == o.ID }) {
				return nil // it comes again, and is under way
			}
			return d.takes(o)
		})
	}
	_, err = w.op.StartCampaign(testContext(t), api.CampaignRequest{Selector: api.Selector{All: true}, Version: "2.1.0", Phases: all})
	wantRefusal(t, err, http.StatusConflict, "overlaps")
	fetching.says(fetches, wire.Running, wire.CodeTransfer) // a line that is away is waited for
	r.until(old.ID, "all wait", func(c api.Campaign) bool { return c.Counts[api.StandsWaiting] == 4 && c.Holdup != "" })
	r.steer(old.ID, api.CampaignApprove)
	r.untilIs(old.ID, api.CampaignDone)
	fetching.says(fetches, wire.Running, "")
	r.until(old.ID, "it fetches again", func(c api.Campaign) bool { return c.Counts[api.StandsInstalling] == 1 })

	c := r2.start(api.CampaignRequest{Phases: all})
	next(t, told, "the word to leave it")
	r2.until(c.ID, "who has not begun has the newer one", func(c api.Campaign) bool {
		return c.Counts[api.StandsUpdated] == 2 && c.Counts[api.StandsWaiting] == 1 && c.Counts[api.StandsDue] == 1
	})
	for _, d := range []*device{waiting, offered} {
		id := r.ordersOf(d)[0].ID
		v, err := w.outbox.get(testContext(t), d.id, id)
		must(t, err)
		if v.State != wire.Canceled || v.Cancel == nil || v.Cancel.By != byItself || v.Cancel.Reason == "" {
			t.Errorf("the older order is %s, %+v", v.State, v.Cancel)
		}
	}
	// The one that crossed begins, and goes on to its end; nobody has asked it for another.
	crossing.says(tries, wire.Running, "")
	r2.until(c.ID, "who has begun is waited for", func(c api.Campaign) bool { return c.Counts[api.StandsWaiting] == 2 })
	r2.holds(c.ID, func(api.Campaign) bool { return len(r2.asks(crossing)) == 0 && len(r2.asks(fetching)) == 0 })
	fetching.says(fetches, wire.Failed, wire.CodeTransfer)
	crossing.says(tries, wire.Succeeded, "")
	c = r2.untilIs(c.ID, api.CampaignDone)
	r2.until(c.ID, "then they have the newer one as well", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 4 })
	if n := len(told); n > 0 {
		t.Errorf("it was told to leave it %d times more", n)
	}
}

// What gave way to a release that is stopped is asked once more.
func TestWhatGaveWayIsAskedAgainWhenTheNewerReleaseIsStopped(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	d := w.device(t)
	r.does(d, func(o wire.Order) *reply { d.says(o, wire.Running, wire.CodeConsent); return nil })
	d.cancels(t)
	all := []api.CampaignPhase{percent(100)}
	old := r.start(api.CampaignRequest{Phases: all})
	r.until(old.ID, "it waits", func(c api.Campaign) bool { return c.Counts[api.StandsWaiting] == 1 && c.Holdup != "" })
	r.steer(old.ID, api.CampaignApprove)
	r.untilIs(old.ID, api.CampaignDone)
	r2 := newRollout(t, w, "2.1.0")
	c := r2.start(api.CampaignRequest{Phases: all})
	r2.until(c.ID, "the newer one waits in its place", func(c api.Campaign) bool { return c.Counts[api.StandsWaiting] == 1 && c.Holdup != "" })
	first := r.asks(d)[0].ID
	r2.steer(c.ID, api.CampaignAbort)
	eventually(t, "the older one is asked again", func() bool {
		list := r.asks(d)
		return list[len(list)-1].ID != first
	})
}

func TestSilenceStopsACampaign(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"before it answers", "after it was confirmed"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			_, r := ownRollout(t)
			devices := byPoint("2.0.0", r.takers(8))
			quiet := devices[1]
			if kind == "before it answers" {
				r.does(quiet, func(o wire.Order) *reply { quiet.says(o, wire.Running, ""); return nil })
			}
			none := 0
			c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 4, SoakSeconds: 3600}, percent(100)},
				Stop: api.CampaignStop{MaxSilent: &none, SilentSeconds: 600}})
			r.until(c.ID, "the canary has it, as far as it goes", func(c api.Campaign) bool {
				return c.Counts[api.StandsUpdated]+c.Counts[api.StandsInstalling] == 4
			})
			quiet.leave()
			others := slices.DeleteFunc(slices.Clone(devices), func(d *device) bool { return d == quiet })
			r.later(9*time.Minute, others...)
			r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignRunning && c.Counts[api.StandsSilent] == 0 })
			r.later(2*time.Minute, others...)
			c = r.untilIs(c.ID, api.CampaignStopped)
			if c.Code != api.CampaignTooManySilent || len(c.Evidence) != 1 || c.Evidence[0].Device != quiet.id || c.Evidence[0].Standing != api.StandsSilent {
				t.Errorf("%s %s: %+v", c.Code, c.Reason, c.Evidence)
			}
			for _, d := range devices[4:] {
				if len(r.ordersOf(d)) > 0 {
					t.Error("a device outside the canary was asked")
				}
			}
		})
	}
}

// A device that is there and says nothing of its update is silent too, and later a
// phase does not wait for it.
func TestADeviceThatIsStuckHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	_, r := ownRollout(t)
	devices := byPoint("2.0.0", r.takers(4))
	r.does(devices[0], func(o wire.Order) *reply { devices[0].says(o, wire.Running, ""); return nil })
	two := 2
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 2}, percent(100)}, Stop: api.CampaignStop{MaxSilent: &two, SilentSeconds: 600}})
	r.until(c.ID, "one has it", func(c api.Campaign) bool {
		return c.Counts[api.StandsUpdated] == 1 && c.Counts[api.StandsInstalling] == 1
	})
	r.later(50*time.Minute, devices...)
	r.holds(c.ID, func(c api.Campaign) bool { return c.Phase == 0 && c.Holdup != "" })
	r.later(11*time.Minute, devices...)
	c = r.untilIs(c.ID, api.CampaignDone)
	if c.Counts[api.StandsSilent] != 1 || c.Counts[api.StandsUpdated] != 3 || c.Failed[0].Code != "no_progress" {
		t.Errorf("%+v", c)
	}
}

// What an owner decides is no failure, and those who wait hold nobody up, unless they
// are most.
func TestWhatOwnersDecideIsNoFailure(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	devices := byPoint("2.0.0", r.takers(9))
	refuses := func(code string) func(wire.Order) *reply {
		return func(wire.Order) *reply { return &reply{state: wire.Rejected, code: code} }
	}
	for i, code := range []string{wire.CodePolicy, "wrong_hardware", "not_in_rollout"} {
		r.does(devices[i], refuses(code))
	}
	wait := func(d *device) {
		r.does(d, func(o wire.Order) *reply { d.says(o, wire.Queued, "consent"); return nil })
	}
	wait(devices[3])
	none := 0
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 7}, percent(100)}, Stop: api.CampaignStop{MaxFailed: &none}})
	r.untilIs(c.ID, api.CampaignDone)
	c = r.until(c.ID, "who is asked again has answered", func(c api.Campaign) bool { return c.Counts[api.StandsDeclined] == 3 })
	if c.Counts[api.StandsWaiting] != 1 || c.Counts[api.StandsUpdated] != 5 || len(c.Reasons) != 4 {
		t.Errorf("%+v %+v", c.Counts, c.Reasons)
	}
	eventually(t, "what may change is asked again", func() bool {
		p, h := r.ordersOf(devices[0]), r.ordersOf(devices[1])
		return p[len(p)-1].ID != p[0].ID && h[len(h)-1].ID == h[0].ID
	})

	r2 := newRollout(t, w, "2.1.0")
	for i, d := range byPoint("2.1.0", devices) {
		if r2.taker(d); i < 3 {
			d2 := d
			r2.does(d, func(o wire.Order) *reply {
				if b, _ := wire.DecodeBody[wire.UpdateInstall](o); b.Version != r2.version {
					return &reply{state: wire.Rejected, code: wire.CodePolicy} // the campaign before asks again
				}
				d2.says(o, wire.Queued, "consent")
				return nil
			})
		}
	}
	devices[3].cancels(t) // its old order gives way
	c2 := r2.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 5}, percent(100)}})
	c2 = r2.until(c2.ID, "most wait", func(c api.Campaign) bool {
		return c.Counts[api.StandsWaiting] == 3 && c.Counts[api.StandsUpdated] == 2 && c.Holdup != ""
	})
	r2.holds(c2.ID, func(c api.Campaign) bool { return c.Phase == 0 && c.Holdup != "" })
	r2.steer(c2.ID, api.CampaignApprove)
	c2 = r2.untilIs(c2.ID, api.CampaignDone)
	if c2.Counts[api.StandsUpdated] != 6 {
		t.Errorf("%+v", c2.Counts)
	}
}

func TestACampaignIsHeldApprovedAndAborted(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	devices := byPoint("2.0.0", r.takers(6))
	canary := api.Selector{Devices: []wire.DeviceID{devices[5].id, devices[4].id}}
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Only: &canary, Approve: true}, {Percentage: 50, Approve: true}, percent(100)}})
	refused := func(what, code string) {
		t.Helper()
		_, err := w.op.SteerCampaign(testContext(t), c.ID, what, "")
		wantRefusal(t, err, http.StatusConflict, code)
	}
	refused(api.CampaignResume, "not_paused")
	r.untilIs(c.ID, api.CampaignAwaiting)
	r.holds(c.ID, func(c api.Campaign) bool {
		return c.State == api.CampaignAwaiting && c.Counts[api.StandsUpdated] == 2 && len(r.ordersOf(devices[5])) > 0
	})
	r.steer(c.ID, api.CampaignPause)
	r.steer(c.ID, api.CampaignApprove) // it is kept for later
	r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignPaused && c.Counts[api.StandsUpdated] == 2 })
	r.steer(c.ID, api.CampaignResume)
	v := r.until(c.ID, "the second phase waits for its approval", func(c api.Campaign) bool { return c.State == api.CampaignAwaiting && c.Phase == 1 })
	if v.Phases[0].ApprovedBy != "owner" || v.Phases[0].Approved.IsZero() {
		t.Errorf("%+v", v.Phases[0])
	}
	r.steer(c.ID, api.CampaignAbort)
	v = r.untilIs(c.ID, api.CampaignAborted)
	for _, what := range []string{api.CampaignPause, api.CampaignResume, api.CampaignApprove, api.CampaignAbort} {
		refused(what, "ended")
	}
	n := v.Counts[api.StandsUpdated]
	r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignAborted && c.Counts[api.StandsUpdated] == n })

	// A pause asks nobody, though its orders are answered.
	r2 := newRollout(t, w, "2.1.0")
	for _, d := range devices {
		r2.taker(d)
	}
	w.freeze() // it soaks until it is paused
	c = r2.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 1, SoakSeconds: 0.2}, percent(100)}})
	r2.steer(c.ID, api.CampaignPause)
	left := r2.now(c.ID).Counts
	if n = left[api.StandsLater] + left[api.StandsDue]; n < 5 {
		t.Fatalf("%d are left", n)
	}
	w.frozen.Store(nil)
	w.advance(time.Second)
	r2.holds(c.ID, func(c api.Campaign) bool { return c.Counts[api.StandsLater]+c.Counts[api.StandsDue] >= 5 })
	r2.steer(c.ID, api.CampaignResume)
	r2.untilIs(c.ID, api.CampaignDone)
}

// A campaign goes on after the coordinator was ended at any place of it, and asks
// nobody twice.
func TestACampaignSurvivesItsCoordinator(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := openWith(t, dir, quickly)
	r := newRollout(t, w, "2.0.0")
	devices := byPoint("2.0.0", r.takers(6))
	again := func() {
		t.Helper()
		w.Close()
		w = openWith(t, dir, quickly)
		r.world = w
		for _, d := range devices {
			d.connect(w)
		}
	}
	defer func() { w.Close() }()
	var ready atomic.Bool
	r.does(devices[0], func(o wire.Order) *reply {
		if !ready.Load() {
			devices[0].says(o, wire.Running, "")
			return nil
		}
		return devices[0].takes(o)
	})
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 2, SoakSeconds: 0.5, Approve: true}, {Percentage: 99.9, SoakSeconds: 0.1}, percent(100)}})
	r.until(c.ID, "one is under way", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 1 })
	ready.Store(true) // the order comes again, from the next
	again()
	r.until(c.ID, "it soaks", func(c api.Campaign) bool { return !c.Phases[0].Settled.IsZero() })
	again()
	r.untilIs(c.ID, api.CampaignAwaiting)
	again()
	r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignAwaiting && c.Counts[api.StandsUpdated] == 2 })
	r.steer(c.ID, api.CampaignPause)
	again()
	r.holds(c.ID, func(c api.Campaign) bool { return c.State == api.CampaignPaused && c.Counts[api.StandsUpdated] == 2 })
	r.steer(c.ID, api.CampaignResume)
	r.steer(c.ID, api.CampaignApprove)
	again()
	r.untilIs(c.ID, api.CampaignDone)
	again()
	newcomer := r.latecomer()
	r.until(c.ID, "a newcomer follows", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 7 })
	for i, d := range append(devices, newcomer) {
		for _, o := range r.ordersOf(d) {
			if o.ID != r.ordersOf(d)[0].ID {
				t.Errorf("device %d was asked twice", i)
			}
		}
	}
	devices = append(devices, newcomer)
	w.publish(t, "2.1.0")
	for _, d := range devices {
		r.does(d, func(wire.Order) *reply { return failed(wire.CodeRolledBack) })
	}
	c = r.start(api.CampaignRequest{Version: "2.1.0", Phases: []api.CampaignPhase{{Count: 1}, percent(100)}})
	r.untilIs(c.ID, api.CampaignStopped)
	again()
	r.holds(c.ID, func(c api.Campaign) bool {
		return c.State == api.CampaignStopped && c.Counts[api.StandsFailed] == 1 && len(c.Evidence) == 1
	})
}

func TestTwoCoordinatorsThatBothLeadAskNobodyTwice(t *testing.T) {
	t.Parallel()
	// A lease that ends at once: both lead, and that nobody is asked twice hangs on
	// nothing else.
	both := peers(t, 2, func(c *Config) {
		quickly(c)
		c.campaignPace.lease = time.Nanosecond
	})
	a, b := both[0], both[1]
	r := newRollout(t, a, "2.0.0")
	devices := r.takers(8)
	eventually(t, "both know all devices", func() bool {
		return !slices.ContainsFunc(devices, func(d *device) bool { return !b.reg.online(d.id) || !a.reg.online(d.id) })
	})
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 3}, percent(100)}})
	r.untilIs(c.ID, api.CampaignDone)
	for _, d := range devices {
		for _, o := range r.ordersOf(d) {
			if o.ID != r.ordersOf(d)[0].ID {
				t.Error("a device was asked twice")
			}
		}
	}
	for _, w := range both { // and both tell the same
		r.world = w
		if v := r.until(c.ID, "it is known here too", func(c api.Campaign) bool { return c.State == api.CampaignDone }); v.Counts[api.StandsUpdated] != 8 {
			t.Errorf("%+v", v.Counts)
		}
	}
	// What was tried: whoever asks leads, but for the nanosecond in which the other took it.
	for _, w := range both {
		eventually(t, "each leads", func() bool { return w.campaigns.leader.lead(testContext(t)) })
	}
}

func TestACampaignAsksSoManyASecond(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	r.takers(8)
	w.freeze()
	c := r.start(api.CampaignRequest{Rate: 2, Phases: []api.CampaignPhase{percent(100)}})
	for i, want := range []int{1, 2, 3, 5, 7} { // one at once, then one each half second, then two a second and never more
		r.until(c.ID, fmt.Sprint(want, " were asked"), func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] >= want })
		r.holds(c.ID, func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == want })
		switch {
		case i < 2:
			w.advance(500 * time.Millisecond)
		case i == 3:
			w.advance(10 * time.Second) // what was not used is not saved up
		default:
			w.advance(time.Second)
		}
	}
	r.until(c.ID, "all", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 8 })
}

func TestWhatIsNoCampaignIsRefused(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	all := []api.CampaignPhase{percent(100)}
	to := api.Selector{All: true}
	begin := func(q api.CampaignRequest) error {
		_, err := w.op.StartCampaign(testContext(t), q)
		return err
	}
	wantRefusal(t, begin(api.CampaignRequest{Version: "2.0.0", Selector: to, Phases: all}), http.StatusConflict, "nobody")
	d := r.does(w.device(t), silent)
	minus, much := -1, 101.0
	for name, q := range map[string]api.CampaignRequest{
		"no version":         {Phases: all},
		"no such version":    {Version: "two", Phases: all},
		"a path":             {Version: "../2.0.0", Phases: all},
		"no phase":           {},
		"an empty phase":     {Phases: []api.CampaignPhase{{}, percent(100)}},
		"two ways":           {Phases: []api.CampaignPhase{{Count: 1, Percentage: 3}, percent(100)}},
		"no end":             {Phases: []api.CampaignPhase{percent(10)}},
		"not growing":        {Phases: []api.CampaignPhase{percent(50), percent(10), percent(100)}},
		"too much":           {Phases: []api.CampaignPhase{percent(50), percent(101)}},
		"backwards":          {Phases: []api.CampaignPhase{percent(-1), percent(100)}},
		"a count below none": {Phases: []api.CampaignPhase{{Count: -1}, percent(100)}},
		"a nobody":           {Phases: []api.CampaignPhase{{Only: &api.Selector{}}, percent(100)}},
		"a long soak":        {Phases: []api.CampaignPhase{{Percentage: 1, SoakSeconds: 1e9}, percent(100)}},
		"a soak before":      {Phases: []api.CampaignPhase{{Percentage: 1, SoakSeconds: -1}, percent(100)}},
		"a rate":             {Phases: all, Rate: -1},
		"a high rate":        {Phases: all, Rate: 1e9},
		"fewer than none":    {Phases: all, Stop: api.CampaignStop{MaxFailed: &minus}},
		"more than all":      {Phases: all, Stop: api.CampaignStop{MaxSilentShare: &much}},
		"silent at once":     {Phases: all, Stop: api.CampaignStop{SilentSeconds: 0.001}},
		"sooner than beats":  {Phases: all, Stop: api.CampaignStop{SilentSeconds: missedBeats*60 - 1}},
		"silent never":       {Phases: all, Stop: api.CampaignStop{SilentSeconds: 1e9}},
		"too many phases":    {Phases: append(make([]api.CampaignPhase, maxPhases), percent(100))},
	} {
		if q.Version == "" && name != "no version" {
			q.Version = "2.0.0"
		}
		q.Selector = to
		t.Log(name)
		wantRefusal(t, begin(q), http.StatusBadRequest, "bad_campaign")
	}
	good := api.CampaignRequest{Version: "2.0.0", Selector: to, Phases: all}
	bad := good
	bad.Selector = api.Selector{}
	wantRefusal(t, begin(bad), http.StatusBadRequest, wire.CodeBadBody)
	bad = good
	bad.Version = "9.9.9"
	wantRefusal(t, begin(bad), http.StatusNotFound, wire.CodeNotFound)
	bad = good
	bad.Phases = []api.CampaignPhase{{Only: &api.Selector{Groups: []string{"nowhere"}}}, percent(100)}
	wantRefusal(t, begin(bad), http.StatusNotFound, wire.CodeNotFound)
	must(t, begin(good))
	wantRefusal(t, begin(good), http.StatusConflict, "overlaps")
	bad = good
	bad.Selector = api.Selector{Devices: []wire.DeviceID{d.id}}
	wantRefusal(t, begin(bad), http.StatusConflict, "overlaps")
	ctx := testContext(t)
	_, err := w.op.Campaign(ctx, "01JD9W3B5XJ8Z6Q0M2T4R7V9YA")
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
	_, err = w.op.SteerCampaign(ctx, "01JD9W3B5XJ8Z6Q0M2T4R7V9YA", api.CampaignAbort, "")
	wantRefusal(t, err, http.StatusNotFound, wire.CodeNotFound)
	rel, err := w.op.Releases(ctx)
	must(t, err)
	id := rel.Campaigns[0].ID
	_, err = w.op.SteerCampaign(ctx, id, api.CampaignApprove, "")
	wantRefusal(t, err, http.StatusConflict, "nothing_to_approve")
	_, err = w.op.CampaignDevices(ctx, id, "somewhere", "", 0)
	wantRefusal(t, err, http.StatusBadRequest, "bad_query")
	_, err = w.op.CampaignDevices(ctx, id, "", "", 1e6)
	wantRefusal(t, err, http.StatusBadRequest, "bad_query")
}

func TestDevicesOfACampaignAreListedByParts(t *testing.T) {
	t.Parallel()
	w, r := ownRollout(t)
	devices := r.takers(5)
	r.does(devices[2], func(wire.Order) *reply { return failed("preflight") })
	no := 5
	// A canary of more than there are is all of them.
	c := r.start(api.CampaignRequest{Phases: []api.CampaignPhase{{Count: 50}, percent(100)}, Stop: api.CampaignStop{MaxFailed: &no}})
	r.untilIs(c.ID, api.CampaignDone)
	var all []api.CampaignDevice
	for after := ""; ; {
		part, err := w.op.CampaignDevices(testContext(t), c.ID, "", after, 2)
		must(t, err)
		all = append(all, part.Devices...)
		if after = part.Next; after == "" {
			break
		}
	}
	if len(all) != 5 || !slices.IsSortedFunc(all, func(a, b api.CampaignDevice) int { return cmp.Compare(a.Device, b.Device) }) {
		t.Errorf("%+v", all)
	}
	some, err := w.op.CampaignDevices(testContext(t), c.ID, api.StandsFailed, "", 0)
	must(t, err)
	if len(some.Devices) != 1 || some.Devices[0].Device != devices[2].id || some.Devices[0].Code != "preflight" || some.Devices[0].Reason == "" || some.Devices[0].Agent != "1.0.0" {
		t.Errorf("%+v", some)
	}
	rel, err := w.op.Releases(testContext(t))
	must(t, err)
	if want := []api.VersionCount{{Version: "2.0.0", Devices: 4, Online: 4}, {Version: "1.0.0", Devices: 1, Online: 1}}; !slices.Equal(rel.Versions, want) || len(rel.Campaigns) != 1 || len(rel.Campaigns[0].Failed) != 1 {
		t.Errorf("%+v", rel)
	}
}

// The order's id is what says whose it is.
func TestAnOfferKnowsItsCampaign(t *testing.T) {
	c := ulid.Make()
	ids := map[string]bool{}
	for _, d := range []wire.DeviceID{"a", "b"} {
		for _, n := range []uint16{0, 1, math.MaxUint16} {
			id := offerID(c, d, n)
			at, attempt, ok := parseOffer(id)
			if !ok || at != c.Time() || attempt != n || ids[id] || id != offerID(c, d, n) || id == offerID(ulid.Make(), d, n) {
				t.Errorf("%s: %d %d %v", id, at, attempt, ok)
			}
			ids[id] = true
		}
	}
	for _, id := range []string{"", "x", ulid.Make().String(), idFor(ulid.Make(), "a")} {
		if _, _, ok := parseOffer(id); ok {
			t.Errorf("%q is taken for a campaign's", id)
		}
	}
}

// What a device says of its update is shown, fit for a terminal, as long as it says so.
func TestADeviceTellsHowFarItsUpdateIs(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.device(t)
	beats := func(u *wire.UpdateState) *wire.UpdateState {
		t.Helper()
		d.say(wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, At: time.Now(), Update: u, Capacity: d.capacity, Used: d.capacity})
		var v api.Device
		eventually(t, "the heartbeat is heard", func() bool {
			var err error
			v, err = w.op.Device(testContext(t), string(d.id))
			must(t, err)
			return v.Used == d.capacity && (v.Update == nil) == (u == nil)
		})
		return v.Update
	}
	got := beats(&wire.UpdateState{Phase: wire.UpdateWaiting, Version: "1.2.0\x1b[2J", Code: wire.CodeWindow, Seconds: -3})
	if want := (wire.UpdateState{Phase: wire.UpdateWaiting, Version: "1.2.0[2J", Code: wire.CodeWindow}); *got != want {
		t.Errorf("%+v", got)
	}
	beats(nil)
}

// That one of several coordinators leads is what keeps a campaign's rate: each would
// ask as many as it may.
func TestOfTwoCoordinatorsOneAsks(t *testing.T) {
	t.Parallel()
	both := peers(t, 2, quickly)
	r := newRollout(t, both[0], "2.0.0")
	devices := r.takers(4)
	eventually(t, "both know all devices", func() bool {
		return !slices.ContainsFunc(devices, func(d *device) bool { return !both[0].reg.online(d.id) || !both[1].reg.online(d.id) })
	})
	both[0].freeze()
	c := r.start(api.CampaignRequest{Rate: 1, Phases: []api.CampaignPhase{percent(100)}})
	r.until(c.ID, "one was asked", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 1 })
	r.holds(c.ID, func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == 1 })
}
