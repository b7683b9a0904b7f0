package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// campaigns bring releases to many devices, in phases, and stop by themselves when
// too many fail or fall silent.
//
// # Records
//
// A campaign is a row, which has how far it is, and no device. What became of a
// device is in its order, whose id is made of campaign, device and attempt
// ([offerID]): the outbox makes such an order once, whoever asks and however often,
// and every coordinator hears of each change of it. So a crash at any place is gone on
// from, and two coordinators that both believe to lead ask nobody twice. Outcomes are
// known as long as orders are kept; a device that failed is asked again after that.
//
// # Who does what
//
// Any coordinator takes calls and tells how it goes. One asks devices and takes
// campaigns from phase to phase ([leader]); rows are changed by compare-and-set.
//
// # Whom it asks
//
// Devices that are online, whose phase has come and that have no other update under
// way, so many a second. An order of an older release that a device has not begun, as it
// waits for its owner, gives way: it is taken back, and when the device has said how it
// ended, that is asked. One that is away is asked when it is back. What fails says so
// for ever; what a device could not fetch, or puts off, it is asked again, rarely. A
// device that waits for its owner or its hours holds nobody up, as long as it is not
// one of most.
//
// # How it ends
//
// Done: from then on the release is what late devices of that selector get, until a
// newer campaign for them is done. Too many of these stop it as well, and it can be
// aborted: then the one before counts for them. Stopped or aborted: nobody is asked any more, and all
// orders that have not ended are taken back. A device knows what that means to it: who
// fetches or waits installs nothing, and who has it installed is beyond recall, and
// confirms or rolls back as it would have, for which it needs no coordinator.
type campaigns struct {
	rows     *table[campaignRow]
	reg      *registry
	outbox   *outbox
	releases func() *releases
	forks    func() []api.LogSeen
	leader   *leader
	note     func(context.Context, api.LogEntry)
	beat     time.Duration // between two heartbeats of a device that does not say otherwise
	now      func() time.Time
	log      *slog.Logger
	started  time.Time
	pace     campaignPace

	mu     sync.Mutex
	offers map[uint64]map[wire.DeviceID]orderNow // by the time of the campaign
	open   map[wire.DeviceID][]openUpdate        // of campaigns or not; each list is replaced, never changed
	// recalled is the keys of the open orders that were taken back since this coordinator
	// leads. The one before may have ended between the mark on an order and the cancellation.
	recalled map[string]bool
	wake     chan struct{} // capacity 1: there is something to look at

	budgets map[string]*budget // of who leads; of run alone
}

// budget is how many devices a campaign may ask now.
type budget struct {
	left float64
	at   time.Time
}

func newCampaigns(reg *registry, o *outbox, now func() time.Time, log *slog.Logger) *campaigns {
	return &campaigns{reg: reg, outbox: o, now: now, log: log, started: now(), pace: ordinaryCampaigns,
		offers: make(map[uint64]map[wire.DeviceID]orderNow), open: make(map[wire.DeviceID][]openUpdate), wake: make(chan struct{}, 1), budgets: make(map[string]*budget), recalled: make(map[string]bool)}
}

// heard is told of each order to update a device, at the start and at each change.
func (s *campaigns) heard(d wire.DeviceID, order string, v orderRow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keepOpen(d, order, v)
	if v.State.Terminal() {
		s.poke()
	}
	created, attempt, ok := parseOffer(order)
	if !ok {
		return
	}
	of := s.offers[created]
	if of == nil {
		of = make(map[wire.DeviceID]orderNow)
		s.offers[created] = of
	}
	old, known := of[d]
	if known && old.attempt > attempt {
		return
	}
	o := orderNow{attempt: attempt, state: v.State, code: v.Code, updated: v.Updated, moved: v.Updated, progress: v.Progress, gaveWay: v.Cancel != nil && v.Cancel.By == byItself}
	if known && old.attempt == attempt && old.state == o.state && old.code == o.code && old.progress == o.progress {
		o.moved = old.moved // it says the same again
	}
	of[d] = o
}

// byItself is who takes orders back that no operator has.
const byItself = "coordinator"

// keepOpen keeps which updates a device has open. s.mu is held.
func (s *campaigns) keepOpen(d wire.DeviceID, order string, v orderRow) {
	was := s.open[d]
	u := openUpdate{order: order, expires: v.Expires, began: v.State == wire.Running && v.Code == ""}
	list := make([]openUpdate, 0, len(was)+1)
	for _, x := range was {
		if x.order == order {
			u.version = x.version
		} else {
			list = append(list, x)
		}
	}
	if !v.State.Terminal() {
		if v.Cancel != nil {
			u.canceled = v.Cancel.At
		}
		if u.version == "" {
			u.version = versionOf(v)
		}
		list = append(list, u)
	}
	if len(list) == 0 {
		delete(s.open, d)
		return
	}
	s.open[d] = list
}

// versionOf is the release that an order brings; "" if its record is damaged.
func versionOf(v orderRow) string {
	o, err := wire.Reread[wire.Order](v.Envelope)
	if err != nil {
		return ""
	}
	b, err := wire.DecodeBody[wire.UpdateInstall](o)
	if err != nil {
		return ""
	}
	return b.Version
}

// forget drops what became of orders that are not kept any more, and what should have
// ended and is not heard of.
func (s *campaigns) forget(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for campaign, of := range s.offers {
		maps.DeleteFunc(of, func(_ wire.DeviceID, o orderNow) bool {
			return o.state.Terminal() && now.Sub(o.updated) > retention
		})
		if len(of) == 0 {
			delete(s.offers, campaign)
		}
	}
	for d, list := range s.open {
		if left := slices.DeleteFunc(slices.Clone(list), func(u openUpdate) bool { return now.Sub(u.expires) > time.Hour }); len(left) == 0 {
			delete(s.open, d)
		} else {
			s.open[d] = left
		}
	}
}

func (s *campaigns) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// member is a device as it stood at one moment.
type member struct {
	api.DeviceRecord
	seen
}

// fleet is how all devices stand now. Who looks at several campaigns takes it once:
// of 100,000 devices it is some 50 MB.
func (s *campaigns) fleet() []member {
	out := make([]member, 0, s.reg.rows.len())
	s.reg.rows.each(func(_ string, d api.DeviceRecord) bool {
		if !d.Retired {
			out = append(out, member{DeviceRecord: d})
		}
		return true
	})
	s.mu.Lock()
	for i := range out {
		out[i].open = s.open[out[i].ID]
	}
	s.mu.Unlock()
	s.reg.mu.Lock()
	defer s.reg.mu.Unlock()
	for i := range out {
		if l, ok := s.reg.live[out[i].ID]; ok {
			out[i].online, out[i].last = l.online, l.lastSeen
		}
	}
	return out
}

// look goes through a campaign's devices.
func (s *campaigns) look(row campaignRow, visit func(d *member, o *orderNow, a at)) *tally {
	return s.lookAt(row, s.now(), s.fleet(), visit) // the time before all else: who is heard of meanwhile is not mute
}

// lookAt goes through those of a fleet, as it was at a time. visit may be nil.
func (s *campaigns) lookAt(row campaignRow, now time.Time, fleet []member, visit func(d *member, o *orderNow, a at)) *tally {
	t := newTally(len(row.Phases))
	s.eachOffer(row, fleet, func(d *member, o *orderNow) {
		a := row.stand(&d.DeviceRecord, o, d.seen, now, s.started, s.pace)
		t.add(a)
		if visit != nil {
			visit(d, o, a)
		}
	})
	return t
}

// eachOffer calls f on the devices of a campaign, with what is known of their orders.
// They are copied a few at a time, so that who reports does not wait for f.
func (s *campaigns) eachOffer(row campaignRow, fleet []member, f func(d *member, o *orderNow)) {
	id, err := ulid.ParseStrict(row.ID)
	if err != nil {
		return
	}
	var offers [256]orderNow
	var known [256]bool
	for part := range slices.Chunk(fleet, len(offers)) {
		s.mu.Lock()
		of := s.offers[id.Time()]
		for i := range part {
			offers[i], known[i] = of[part[i].ID]
		}
		s.mu.Unlock()
		for i := range part {
			if !row.To.Matches(part[i].DeviceRecord) {
				continue
			}
			if known[i] {
				o := offers[i]
				f(&part[i], &o)
			} else {
				f(&part[i], nil)
			}
		}
	}
}

// begin keeps a campaign; from then on it goes on by itself.
func (s *campaigns) begin(ctx context.Context, q api.CampaignRequest) (api.Campaign, error) {
	row, err := rowOf(q)
	if err != nil {
		return api.Campaign{}, err
	}
	devices, err := s.reg.selected(row.To)
	if err != nil {
		return api.Campaign{}, err
	}
	if len(devices) == 0 {
		return api.Campaign{}, refuse(http.StatusConflict, "nobody", "the fleet has no device yet that a release could be brought to")
	}
	// Of who is well, too, a heartbeat may be lost.
	least := missedBeats * s.beat
	for _, d := range devices {
		least = max(least, missedBeats*s.reg.beatOf(d.ID))
	}
	if row.Stop.After < least {
		return api.Campaign{}, badCampaign("a device cannot count as silent after %s: some are heard of so rarely that it takes %s to tell", row.Stop.After, least)
	}
	for i, p := range row.Phases {
		if p.Only != nil && !overlaps(row.To, *p.Only, devices) {
			return api.Campaign{}, refuse(http.StatusNotFound, wire.CodeNotFound, "none of the campaign's devices is in phase %d", i+1)
		}
	}
	if err := s.releases().published(ctx, repo.TargetName(row.Version)); err != nil {
		return api.Campaign{}, err
	}
	switch e, err := s.releases().expiry(ctx); {
	case err != nil:
		return api.Campaign{}, err
	case e.over(s.now()):
		return api.Campaign{}, refuse(http.StatusConflict, wire.CodeStaleMetadata, "%s has ended %s, so no device would take a release; publish again first, with \"deimos release publish\"", e.file, e.at.UTC().Format(time.RFC3339))
	}
	var other *campaignRow
	taken := make(map[uint64]bool)
	s.rows.each(func(_ string, v campaignRow) bool {
		if id, err := ulid.ParseStrict(v.ID); err == nil {
			taken[id.Time()] = true
		}
		if !v.State.Ended() && overlaps(v.To, row.To, devices) {
			other = &v
		}
		return other == nil
	})
	if other != nil {
		return api.Campaign{}, refuse(http.StatusConflict, "overlaps", "campaign %s brings %s to some of these devices and has not ended; wait for it, or end it with \"deimos release campaign abort %s\"", other.ID, other.Version, other.ID)
	}
	id := ulid.Make()
	for taken[id.Time()] {
		if err := id.SetTime(id.Time() + 1); err != nil {
			return api.Campaign{}, err
		}
	}
	row.ID, row.By, row.Created = id.String(), by(ctx), s.now().UTC()
	if err := s.rows.create(ctx, row.ID, row); err != nil {
		return api.Campaign{}, err
	}
	about(ctx, row.ID)
	s.poke()
	return s.view(row), nil
}

func errNoCampaign(id string) error {
	return refuse(http.StatusNotFound, wire.CodeNotFound, "there is no campaign %s; \"deimos release campaign list\" shows all", id)
}

// steer does what an operator wants of a campaign.
func (s *campaigns) steer(ctx context.Context, id, what, reason string) (api.Campaign, error) {
	about(ctx, id)
	var approve string // what an approval would be for
	if row, ok := s.rows.get(id); ok && what == api.CampaignApprove && row.Phase < len(row.Phases) && !row.State.Ended() {
		if !row.approvable(s.look(row, nil), s.now()) {
			return api.Campaign{}, refuse(http.StatusConflict, "nothing_to_approve", "phase %d of campaign %s has nothing to approve: it goes on by itself, or has not been looked at for long enough yet; \"deimos release campaign show %s\" says what it waits for", row.Phase+1, id, id)
		}
		approve = fmt.Sprintf("%s.%d", id, row.Phase)
	}
	row, err := s.rows.change(ctx, id, func(v *campaignRow, exists bool) error {
		now := s.now().UTC()
		switch {
		case !exists:
			return errNoCampaign(id)
		case v.State.Ended() && (v.State != api.CampaignDone || what != api.CampaignAbort): // late devices get what is done
			return refuse(http.StatusConflict, "ended", "campaign %s has ended (%s): begin a new one with \"deimos release campaign start\"", id, v.State)
		}
		switch what {
		case api.CampaignPause:
			if v.State == api.CampaignPaused {
				return errUnchanged
			}
			v.State, v.Reason = api.CampaignPaused, sentence(reason)
		case api.CampaignResume:
			if v.State != api.CampaignPaused {
				return refuse(http.StatusConflict, "not_paused", "campaign %s is not paused: it is %s", id, v.State)
			}
			v.State, v.Reason = api.CampaignRunning, ""
		case api.CampaignApprove:
			if approve != fmt.Sprintf("%s.%d", id, v.Phase) {
				return refuse(http.StatusConflict, "changed", "campaign %s has gone on meanwhile; look at it before you approve", id)
			}
			p := &v.Phases[v.Phase]
			if !p.Approved.IsZero() {
				return errUnchanged
			}
			p.Approved, p.ApprovedBy = now, by(ctx)
		case api.CampaignAbort:
			v.State, v.Code, v.Ended = api.CampaignAborted, wire.CodeCanceled, now
			v.Reason = "aborted by " + label(by(ctx))
			if reason != "" {
				v.Reason += ": " + sentence(reason)
			}
		}
		return nil
	})
	if err != nil {
		return api.Campaign{}, err
	}
	s.poke()
	return s.view(row), nil
}

// run takes campaigns forward until ctx ends.
func (s *campaigns) run(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	least := time.NewTimer(0) // between two looks, whatever pokes
	defer least.Stop()
	var swept time.Time
	for {
		select {
		case <-ctx.Done():
			s.leader.resign(ctx)
			return
		case <-s.wake:
			select {
			case <-least.C:
			case <-ctx.Done():
				continue
			}
		case <-t.C:
		}
		began := time.Now()
		if now := s.now(); now.Sub(swept) > time.Hour {
			s.forget(now)
			if _, err := s.releases().expiry(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("when the metadata of the releases ends cannot be told", "error", err)
			}
			swept = now
		}
		if s.leader.lead(ctx) {
			s.step(ctx)
		} else {
			clear(s.budgets)
			s.mu.Lock()
			clear(s.recalled)
			s.mu.Unlock()
		}
		// Of a large fleet a look takes a while: no more than a twentieth of a core. The
		// store may take long too, which is no reason to wait for long.
		rest := min(20*time.Since(began), 5*s.pace.step)
		least.Reset(max(s.pace.step/4, rest))
		t.Reset(max(s.pace.step, rest))
	}
}

// step does what is due for each campaign.
func (s *campaigns) step(ctx context.Context) {
	s.forgetEnded()
	rows := s.rows.all(func(a, b campaignRow) int { return cmp.Compare(a.ID, b.ID) })
	for _, row := range rows {
		var err error
		switch row.State {
		case api.CampaignRunning, api.CampaignPaused:
			err = s.advance(ctx, row)
		case api.CampaignStopped, api.CampaignAborted:
			if s.now().Sub(row.Ended) < offerLife+time.Hour { // what has not ended by then is over
				err = s.takeBack(ctx, row)
			}
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("a campaign waits", "campaign", row.ID, "error", err)
		}
	}
	if err := s.follow(ctx, rows); err != nil && ctx.Err() == nil {
		s.log.Warn("late devices wait for the release that the others have", "error", err)
	}
}

// forgetEnded drops of the orders that were taken back those that have ended.
func (s *campaigns) forgetEnded() {
	s.mu.Lock()
	keys := slices.Collect(maps.Keys(s.recalled))
	s.mu.Unlock()
	for _, key := range keys {
		if _, open := s.outbox.rows.get(key); open {
			continue
		}
		s.mu.Lock()
		delete(s.recalled, key)
		s.mu.Unlock()
	}
}

// ask is a device that is to be asked.
type ask struct {
	device  wire.DeviceID
	attempt uint16
	phase   int
	point   float64
	inWay   []string // orders that have to be taken back first
}

// askOf is what a device is to be told; false if that has been done, and its word is
// missing.
func (s *campaigns) askOf(row campaignRow, d *member, o *orderNow, a at, now time.Time) (ask, bool) {
	q := ask{device: d.ID, phase: a.phase, point: bundle.RolloutPoint(row.Version, string(d.ID)), attempt: row.firstAttempt(now)}
	if o != nil {
		q.attempt = o.attempt + 1
	}
	if len(d.open) == 0 {
		return q, true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range d.open {
		if !s.recalled[orderKeyOf(d.ID, u.order)] {
			q.inWay = append(q.inWay, u.order)
		}
	}
	return q, len(q.inWay) > 0
}

// advance does the next thing about a campaign that has not ended.
func (s *campaigns) advance(ctx context.Context, row campaignRow) error {
	p := row.Phases[row.Phase]
	if p.Began.IsZero() {
		if row.State == api.CampaignPaused {
			return nil
		}
		var err error
		if row, err = s.beginPhase(ctx, row); err != nil || row.Phases[row.Phase].Began.IsZero() {
			return err
		}
		p = row.Phases[row.Phase]
	}
	var asks []ask
	t := s.look(row, func(d *member, o *orderNow, a at) {
		if !a.ask {
			return
		}
		if q, ok := s.askOf(row, d, o, a, s.now()); ok {
			asks = append(asks, q)
		}
	})
	if code, reason := row.stops(t); code != "" {
		return s.stop(ctx, row, code, reason)
	}
	if row.State == api.CampaignPaused || row.lull(t) != "" {
		return nil
	}
	if err := s.askAll(ctx, row, asks); err != nil {
		return err
	}
	now := s.now().UTC()
	change := func(f func(v *campaignRow, p *phaseRow)) error {
		_, err := s.rows.change(ctx, row.ID, func(v *campaignRow, exists bool) error {
			if !exists || v.State != row.State || v.Phase != row.Phase {
				return errUnchanged // somebody was first; the next look sees it
			}
			f(v, &v.Phases[v.Phase])
			return nil
		})
		s.poke()
		return err
	}
	switch {
	case p.Settled.IsZero() && row.holdup(t) == "":
		return change(func(_ *campaignRow, p *phaseRow) { p.Settled = now })
	case !p.soaked(now) || p.Approve && p.Approved.IsZero():
		return nil
	}
	last := row.Phase == len(row.Phases)-1
	err := change(func(v *campaignRow, p *phaseRow) {
		if p.Ended = now; last {
			v.State, v.Ended = api.CampaignDone, now
		} else {
			v.Phase++
		}
	})
	if err == nil && last {
		s.note(ctx, api.LogEntry{Actor: "coordinator", Action: "campaign.done", Targets: []string{row.ID}})
	} else if err == nil {
		s.note(ctx, api.LogEntry{Actor: "coordinator", Action: "campaign.phase", Targets: []string{row.ID}, Reason: fmt.Sprintf("phase %d of %d begins", row.Phase+2, len(row.Phases))})
	}
	return err
}

// beginPhase finds whom the phase has, and notes that it begins. One of so many
// devices waits until they are online.
func (s *campaigns) beginPhase(ctx context.Context, row campaignRow) (campaignRow, error) {
	now := s.now().UTC()
	would := row
	would.Phases = slices.Clone(row.Phases)
	p := &would.Phases[row.Phase]
	p.Began = now
	if p.Only == nil {
		var points []float64 // of those that are there
		lack := 0            // how many do not have the release
		unheard := 0         // of those
		s.look(would, func(d *member, _ *orderNow, _ at) {
			if row.runs(d.Agent) {
				return
			}
			if lack++; d.online {
				points = append(points, bundle.RolloutPoint(row.Version, string(d.ID)))
			} else if row.unheard(d.seen, now, s.started, s.pace) {
				unheard++
			}
		})
		if unheard > 0 {
			return row, nil // four of the first who are back are no canary of four: all others would be below their points
		}
		slices.Sort(points)
		want := min(max(p.Count, 1), lack)
		if p.Count > 0 && len(points) < want {
			return row, nil
		}
		if want = min(want, len(points)); want > 0 {
			p.Share = min(max(p.Percentage, math.Nextafter(points[want-1], 101)), 100)
		}
	}
	t := s.look(would, nil)
	p.Planned = t.asked + t.counts[api.StandsDue]
	return s.rows.change(ctx, row.ID, func(v *campaignRow, exists bool) error {
		if !exists || v.State != row.State || v.Phase != row.Phase || !v.Phases[v.Phase].Began.IsZero() {
			return errUnchanged
		}
		v.Phases[v.Phase] = *p
		return nil
	})
}

// stop ends a campaign by itself.
func (s *campaigns) stop(ctx context.Context, row campaignRow, code, reason string) error {
	evidence := s.bad(ctx, row)
	_, err := s.rows.change(ctx, row.ID, func(v *campaignRow, exists bool) error {
		if !exists || v.State.Ended() && v.State != row.State {
			return errUnchanged
		}
		v.State, v.Code, v.Reason, v.Ended, v.Evidence = api.CampaignStopped, code, reason, s.now().UTC(), evidence
		return nil
	})
	if err != nil {
		return err
	}
	s.log.Warn("a campaign was stopped", "campaign", row.ID, "version", row.Version, "code", code, "reason", reason)
	s.note(ctx, api.LogEntry{Actor: "coordinator", Action: "campaign.stop", Targets: []string{row.ID}, Reason: reason})
	s.poke()
	return nil
}

// takeBack cancels what has not ended of a campaign that ended early.
func (s *campaigns) takeBack(ctx context.Context, row campaignRow) error {
	id, err := ulid.ParseStrict(row.ID)
	if err != nil {
		return err
	}
	open := make(map[string]wire.DeviceID)
	s.mu.Lock()
	for d, o := range s.offers[id.Time()] {
		if order := offerID(id, d, o.attempt); !o.state.Terminal() && !s.recalled[orderKeyOf(d, order)] {
			open[order] = d
		}
	}
	s.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(sendAtOnce)
	for order, d := range open {
		g.Go(func() error { return s.recall(ctx, d, order, "the campaign has ended: "+row.Reason) })
	}
	return g.Wait()
}

// recall takes an order back, once while this coordinator leads.
func (s *campaigns) recall(ctx context.Context, d wire.DeviceID, order, reason string) error {
	_, err := s.outbox.cancel(ctx, d, order, reason, byItself)
	var r *refusal
	if err != nil && !errors.As(err, &r) { // refused: it has ended meanwhile
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recalled[orderKeyOf(d, order)] = true
	return nil
}

// askAll asks devices, as many as the campaign may now, the lowest points first. Who has an
// older order yet is told to leave that, which counts as one that is asked, and is asked
// when it has ended: two orders under way could cross.
func (s *campaigns) askAll(ctx context.Context, row campaignRow, asks []ask) error {
	n := s.spend(row, len(asks))
	if n == 0 {
		return nil
	}
	id, err := ulid.ParseStrict(row.ID)
	if err != nil {
		return err
	}
	slices.SortFunc(asks, func(a, b ask) int { return cmp.Or(cmp.Compare(a.phase, b.phase), cmp.Compare(a.point, b.point)) })
	var g errgroup.Group
	g.SetLimit(sendAtOnce)
	for _, q := range asks[:n] {
		if v, ok := s.rows.get(row.ID); !ok || v.State != row.State { // somebody said stop
			break
		}
		g.Go(func() error {
			if len(q.inWay) > 0 {
				for _, order := range q.inWay {
					if err := s.recall(ctx, q.device, order, "release "+row.Version+" takes its place"); err != nil {
						return err
					}
				}
				return nil
			}
			body := wire.UpdateInstall{Version: row.Version, Target: repo.TargetName(row.Version)}
			if p := row.Phases[q.phase]; p.Only == nil && max(p.Share, p.Percentage) < 100 && row.State != api.CampaignDone {
				body.Percentage = max(p.Share, p.Percentage)
			}
			_, err := s.outbox.submitAs(ctx, offerID(id, q.device, q.attempt), q.device, wire.KindUpdateInstall, body, offerLife)
			return err
		})
	}
	return g.Wait()
}

// spend takes so many from a campaign's budget, or what is left of it.
func (s *campaigns) spend(row campaignRow, n int) int {
	b, now := s.budgets[row.ID], s.now()
	if b == nil {
		b = &budget{left: 1, at: now} // who has just begun to lead does not know what the one before has asked
		s.budgets[row.ID] = b
	}
	b.left = min(b.left+row.Rate*max(now.Sub(b.at), 0).Seconds(), max(row.Rate, 1))
	b.at = now
	n = min(n, int(b.left))
	b.left -= float64(n)
	return n
}

// follow asks late devices: those that came or came back since the newest campaign
// for them was done. One that a campaign under way has come to is that one's. What
// becomes of them stops a campaign as what becomes of the others does.
func (s *campaigns) follow(ctx context.Context, rows []campaignRow) error {
	now := s.now()
	var done, open []campaignRow
	for _, r := range rows {
		switch {
		case r.State == api.CampaignDone:
			done = append(done, r)
		case !r.State.Ended():
			open = append(open, r)
		}
	}
	if len(done) == 0 {
		return nil
	}
	slices.SortFunc(done, func(a, b campaignRow) int { return b.Ended.Compare(a.Ended) })
	fleet := s.fleet()
	current := s.current(fleet)
	done = slices.DeleteFunc(done, func(r campaignRow) bool { return !current[r.ID] })
	asks := make([][]ask, len(done))
	late := make([]*tally, len(done))
	for i, r := range done {
		late[i] = newTally(len(r.Phases))
		s.eachOffer(r, fleet, func(d *member, o *orderNow) {
			came := o != nil && o.updated.After(r.Ended)
			if slices.ContainsFunc(done[:i], func(r campaignRow) bool { return r.To.Matches(d.DeviceRecord) }) {
				return
			}
			a := r.stand(&d.DeviceRecord, o, d.seen, now, s.started, s.pace)
			if came {
				late[i].add(a)
			} else {
				late[i].compare(a)
			}
			if a.ask && !slices.ContainsFunc(open, func(r campaignRow) bool {
				return r.To.Matches(d.DeviceRecord) && r.reaches(r.phaseOf(&d.DeviceRecord))
			}) {
				if q, ok := s.askOf(r, d, o, a, now); ok {
					asks[i] = append(asks[i], q)
				}
			}
		})
	}
	var errs []error
	for i, r := range done {
		if code, reason := r.stops(late[i]); code != "" {
			errs = append(errs, s.stop(ctx, r, code, "of those that came late "+reason))
			continue
		}
		if r.lull(late[i]) != "" {
			continue
		}
		errs = append(errs, s.askAll(ctx, r, asks[i]))
	}
	return errors.Join(errs...)
}
