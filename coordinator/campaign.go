package coordinator

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/wire"
)

// The rules of campaigns, without clock and records: where a device stands, when a
// phase is over, when a campaign stops. campaigns.go keeps and carries them out.

// campaignRow is a campaign. What became of its devices is not in it: that is in
// their orders, so it is as small for a hundred thousand devices as for ten.
type campaignRow struct {
	ID      string            `json:"id"`
	Version string            `json:"version"`
	To      api.Selector      `json:"to"`
	Stop    stopRule          `json:"stop"`
	Rate    float64           `json:"rate"`
	By      string            `json:"by,omitempty"`
	Created time.Time         `json:"created"`
	State   api.CampaignState `json:"state"` // that it waits for an approval is found out
	Phase   int               `json:"phase"`
	Phases  []phaseRow        `json:"phases"`
	Code    string            `json:"code,omitempty"`
	Reason  string            `json:"reason,omitempty"`
	Ended   time.Time         `json:"ended,omitzero"`
	// Evidence is what it was stopped for.
	Evidence []api.CampaignDevice `json:"evidence,omitempty"`
}

// phaseRow is a phase of one.
type phaseRow struct {
	api.CampaignPhase
	Share      float64   `json:"share,omitempty"` // see [api.PhaseState]
	Planned    int       `json:"planned,omitempty"`
	Began      time.Time `json:"began,omitzero"`
	Settled    time.Time `json:"settled,omitzero"`
	Approved   time.Time `json:"approved,omitzero"`
	ApprovedBy string    `json:"approved_by,omitempty"`
	Ended      time.Time `json:"ended,omitzero"`
}

// stopRule is [api.CampaignStop] with nothing left out.
type stopRule struct {
	Failed      int           `json:"failed"`       // -1: no limit
	FailedShare float64       `json:"failed_share"` // percent; above 100: no limit
	Silent      int           `json:"silent"`
	SilentShare float64       `json:"silent_share"`
	After       time.Duration `json:"after"` // until a device counts as silent
}

const (
	maxPhases     = 20
	maxSoak       = 90 * 24 * time.Hour
	maxSilentTime = 7 * 24 * time.Hour
	maxRate       = 1000.0
	minRate       = 0.001
	noShare       = 101.0
)

func badCampaign(format string, args ...any) error {
	return refuse(http.StatusBadRequest, "bad_campaign", format, args...)
}

// rowOf checks a request, and fills in what it leaves out.
func rowOf(q api.CampaignRequest) (campaignRow, error) {
	row := campaignRow{Version: q.Version, To: q.Selector, Rate: q.Rate, State: api.CampaignRunning}
	if err := bundle.CheckVersion(q.Version); err != nil {
		return row, badCampaign("%v", err)
	}
	if row.Rate == 0 {
		row.Rate = api.CampaignRate
	}
	if !(row.Rate >= minRate && row.Rate <= maxRate) {
		return row, badCampaign("%v devices a second cannot be asked: the rate is from %v to %v", q.Rate, minRate, maxRate)
	}
	if n := len(q.Phases); n == 0 || n > maxPhases {
		return row, badCampaign("a campaign has 1 to %d phases, not %d", maxPhases, n)
	}
	last := 0.0
	for i, p := range q.Phases {
		ways := 0
		for _, given := range []bool{p.Only != nil, p.Count != 0, p.Percentage != 0} {
			if given {
				ways++
			}
		}
		switch {
		case ways != 1:
			return row, badCampaign("phase %d must say which devices it has: some that are selected, a number of them, or a percentage", i+1)
		case p.Only != nil && p.Only.CheckChange() != nil:
			return row, badCampaign("phase %d: %v", i+1, p.Only.CheckChange())
		case p.Count < 0:
			return row, badCampaign("phase %d cannot have %d devices", i+1, p.Count)
		case p.Percentage != 0 && !(p.Percentage > last && p.Percentage <= 100):
			return row, badCampaign("phase %d has %v%%: percentages grow from phase to phase, up to 100", i+1, p.Percentage)
		case !(p.SoakSeconds >= 0 && p.SoakSeconds <= maxSoak.Seconds()):
			return row, badCampaign("phase %d cannot soak for %v seconds: it is %d days at most", i+1, p.SoakSeconds, maxSoak/(24*time.Hour))
		}
		last = max(last, p.Percentage)
		row.Phases = append(row.Phases, phaseRow{CampaignPhase: p})
	}
	if q.Phases[len(q.Phases)-1].Percentage != 100 {
		return row, badCampaign("the last phase must have 100%%: who is not meant at all is left out by group or label")
	}
	var err error
	row.Stop, err = stopOf(q.Stop)
	return row, err
}

func stopOf(q api.CampaignStop) (stopRule, error) {
	r := stopRule{Failed: -1, Silent: -1, FailedShare: noShare, SilentShare: noShare, After: time.Duration(q.SilentSeconds * float64(time.Second))}
	for _, v := range []struct {
		n        *int
		share    *float64
		intoN    *int
		into     *float64
		ordinary float64
	}{{q.MaxFailed, q.MaxFailedShare, &r.Failed, &r.FailedShare, api.CampaignFailedShare}, {q.MaxSilent, q.MaxSilentShare, &r.Silent, &r.SilentShare, api.CampaignSilentShare}} {
		switch {
		case v.n == nil && v.share == nil:
			*v.into = v.ordinary
		case v.n != nil && *v.n < 0, v.share != nil && !(*v.share >= 0 && *v.share <= 100):
			return r, badCampaign("how many devices may fail or be silent is a number from 0 on, or a share from 0%% to 100%%")
		}
		if v.n != nil {
			*v.intoN = *v.n
		}
		if v.share != nil {
			*v.into = *v.share
		}
	}
	if q.SilentSeconds == 0 {
		r.After = api.CampaignSilent
	}
	if math.IsNaN(q.SilentSeconds) || r.After <= 0 || r.After > maxSilentTime {
		return r, badCampaign("a device counts as silent after %d days at the latest, and not at once", maxSilentTime/(24*time.Hour))
	}
	return r, nil
}

// view is the rule as operators give it.
func (r stopRule) view() api.CampaignStop {
	v := api.CampaignStop{SilentSeconds: r.After.Seconds()}
	for _, x := range []struct {
		n     int
		share float64
		intoN **int
		into  **float64
	}{{r.Failed, r.FailedShare, &v.MaxFailed, &v.MaxFailedShare}, {r.Silent, r.SilentShare, &v.MaxSilent, &v.MaxSilentShare}} {
		if x.n >= 0 {
			*x.intoN = &x.n
		}
		if x.share <= 100 {
			*x.into = &x.share
		}
	}
	return v
}

// overlaps tells whether a device is meant by both.
func overlaps(a, b api.Selector, devices []api.DeviceRecord) bool {
	return slices.ContainsFunc(devices, func(d api.DeviceRecord) bool { return a.Matches(d) && b.Matches(d) })
}

// An order of a campaign has an id that is made of the campaign's, the device's and
// the number of the attempt: whoever makes it, and however often, it is the same
// order, and whoever sees it knows whose it is. The time in it is the campaign's.
//
//	time (6 bytes) | mark (2) | SHA-256(campaign, device) (6) | attempt (2)
var offerMark = [2]byte{0xca, 0x39}

func offerID(campaign ulid.ULID, d wire.DeviceID, attempt uint16) string {
	sum := sha256.Sum256(append(campaign[:], d...))
	id := campaign
	copy(id[6:], offerMark[:])
	copy(id[8:], sum[:6])
	binary.BigEndian.PutUint16(id[14:], attempt)
	return id.String()
}

// parseOffer reads such an id; at is the campaign's time.
func parseOffer(order string) (at uint64, attempt uint16, ok bool) {
	id, err := ulid.ParseStrict(order)
	if err != nil || [2]byte(id[6:8]) != offerMark {
		return 0, 0, false
	}
	return id.Time(), binary.BigEndian.Uint16(id[14:]), true
}

// An order is forgotten, and what it has ended with. Who lacks the release then is asked
// as if for the first time, but by another id: the device may remember the one before.
// So attempts begin at a number that grows with the age of the campaign.
const attempts = 2 * maxOffers // from one such number to the next

func (r *campaignRow) firstAttempt(now time.Time) uint16 {
	return uint16(min(max(now.Sub(r.Created), 0)/retention, math.MaxUint16/attempts-1)) * attempts
}

// orderNow is the newest order of a campaign to one device.
type orderNow struct {
	attempt  uint16
	state    wire.State
	code     string
	updated  time.Time
	moved    time.Time // when it said something else than before
	progress float64
	gaveWay  bool // the coordinator has taken it back
}

// waits tells whether a device has said that it does not begin yet.
func (o orderNow) waits() bool { return !o.state.Terminal() && o.code != "" }

// meaning is what an ended order says of the release.
type meaning struct {
	standing api.Standing
	again    bool // it may be asked once more, later
}

// faults are refusals that speak against the release or where it came from, though
// the device has not begun.
var faults = map[string]bool{wire.CodeVerification: true, wire.CodeLogFork: true, wire.CodeNotLogged: true, wire.CodeBadBody: true}

// lasting are refusals that do not end by waiting.
var lasting = map[string]bool{wire.CodeWrongHardware: true, wire.CodeNotSupported: true, wire.CodeUnknownKind: true, wire.CodeDowngrade: true, wire.CodeNoUpdateRoot: true, wire.CodeNewerFormat: true}

// passing are failures that say nothing of the release: a home router that starts anew
// is enough, or the coordinator itself.
var passing = map[string]bool{wire.CodeTransfer: true, wire.CodeSlowTransfer: true, wire.CodeNoSpace: true, wire.CodeInterrupted: true}

func judgeOffer(o orderNow) meaning {
	switch o.state {
	case wire.Succeeded:
		return meaning{api.StandsUpdated, true} // should it run an older one again
	case wire.Failed:
		if passing[o.code] {
			return meaning{api.StandsHindered, true}
		}
		return meaning{api.StandsFailed, false}
	case wire.Rejected:
		switch {
		case o.code == wire.CodeAlreadyLatest:
			return meaning{api.StandsUpdated, true}
		case faults[o.code]:
			return meaning{api.StandsFailed, false}
		}
		return meaning{api.StandsDeclined, !lasting[o.code]}
	case wire.TimedOut:
		if o.code == codeNoAnswer {
			return meaning{api.StandsUnanswered, true}
		}
		return meaning{api.StandsFailed, false} // the device's own limit
	}
	return meaning{api.StandsCanceled, o.gaveWay} // a release that took its place may be stopped
}

// campaignPace is how patient campaigns are; tests hurry.
type campaignPace struct {
	step  time.Duration // between two looks
	retry time.Duration // before the first repeat; each further one waits twice as long
	stuck time.Duration // an update that does not go on for so long is silence, though the device is there; at least four times the silence that counts
	lease time.Duration
	hears time.Duration // from the coordinator's start on: who is there has been heard by then
}

var ordinaryCampaigns = campaignPace{step: time.Second, retry: time.Hour, stuck: 2 * time.Hour, lease: 20 * time.Second}

const (
	longestOfferPause = 24 * time.Hour
	maxOffers         = 64 // to one device
	// settleAfter is how long a device may run another version than the one that it
	// has said to have taken: its hello comes after.
	settleAfter = 10 * time.Minute
)

// pause is until a device is asked again, after the attempt-th time.
func (p campaignPace) pause(attempt uint16) time.Duration {
	return min(p.retry<<min(attempt, 10), longestOfferPause)
}

// seen is what is known of a device beside its record.
type seen struct {
	online bool
	last   time.Time
	open   []openUpdate
}

// openUpdate is an order to update a device that has not ended.
type openUpdate struct {
	order    string
	version  string // "" if it cannot be told
	expires  time.Time
	began    bool      // it fetches or installs
	canceled time.Time // when it was first asked back; zero: it was not
}

// displaces tells whether all that a device has open gives way to a campaign: what is of an
// older release, was asked before the campaign was begun, and has not begun itself.
func (r *campaignRow) displaces(open []openUpdate) bool {
	if len(open) == 0 {
		return true
	}
	id, err := ulid.ParseStrict(r.ID)
	return err == nil && !slices.ContainsFunc(open, func(u openUpdate) bool {
		of, err := ulid.ParseStrict(u.order)
		return u.began || u.version == "" || r.runs(u.version) || err != nil || of.Time() >= id.Time()
	})
}

// givesWay is for how long a device that was told to leave an order is waited for.
const givesWay = time.Minute

// lingers tells whether a device was asked in vain to leave an order.
func lingers(open []openUpdate, now time.Time) bool {
	return slices.ContainsFunc(open, func(u openUpdate) bool { return !u.canceled.IsZero() && now.Sub(u.canceled) > givesWay })
}

// at is where a device stands in a campaign.
type at struct {
	standing api.Standing
	phase    int
	board    string
	asked    bool
	ask      bool // now is the time to ask it
	again    bool // what it has answered may change
	code     string
	// Who was tried in this phase can fall silent for it. Who was not, and was there in
	// it, tells how many do so anyway.
	tried, there, gone bool
}

// runs tells whether a version is the campaign's, or newer.
func (r *campaignRow) runs(version string) bool { return bundle.Compare(version, r.Version) >= 0 }

// phaseOf is the first phase that a device is in.
func (r *campaignRow) phaseOf(d *api.DeviceRecord) int {
	point := bundle.RolloutPoint(r.Version, string(d.ID))
	for i := range r.Phases {
		switch p := &r.Phases[i]; {
		case p.Only != nil && p.Only.Matches(*d):
			return i
		case p.Only == nil && point < max(p.Share, p.Percentage):
			return i
		}
	}
	return len(r.Phases) - 1
}

// unheard tells whether a device may be there all the same: a coordinator that goes on with
// a campaign of before its start has to listen for a while before it calls anybody away.
func (r *campaignRow) unheard(v seen, now, since time.Time, pace campaignPace) bool {
	return !v.online && v.last.Before(since) && r.Created.Before(since) && now.Sub(since) < pace.hears
}

// stand is where a device stands. since is when this coordinator began to hear.
func (r *campaignRow) stand(d *api.DeviceRecord, o *orderNow, v seen, now, since time.Time, pace campaignPace) at {
	a := at{phase: r.phaseOf(d), board: d.Board, asked: o != nil}
	mute := now.Sub(later(v.last, since))
	a.tried = o != nil && (!o.state.Terminal() || r.lately(o.updated, now))
	a.there = r.lately(v.last, now)
	a.gone = mute > r.Stop.After
	if o != nil && !o.state.Terminal() {
		word := now.Sub(later(o.updated, since))
		switch a.code = o.code; {
		case o.waits(): // it has not begun, so it may well be switched off
			a.standing = api.StandsWaiting
		case min(mute, word) > r.Stop.After:
			a.standing, a.code = api.StandsSilent, "away"
		case now.Sub(later(o.moved, since)) > max(pace.stuck, 4*r.Stop.After):
			a.standing, a.code = api.StandsSilent, "no_progress"
		case o.state == wire.Running:
			a.standing = api.StandsInstalling
		default:
			a.standing = api.StandsAsked
		}
		return a
	}
	if r.runs(d.Agent) {
		a.standing = api.StandsUpdated
		goesOn := !r.State.Ended() || r.State == api.CampaignDone
		if o != nil && o.state == wire.Succeeded && goesOn && r.lately(o.updated, now) && mute > r.Stop.After {
			a.standing, a.code = api.StandsSilent, "away_since" // it took it, and fell silent while that soaks
		}
		return a
	}
	if o != nil {
		j := judgeOffer(*o)
		ago := now.Sub(o.updated)
		a.standing, a.code, a.again = j.standing, o.code, j.again
		switch {
		case j.standing == api.StandsUpdated && ago < settleAfter:
			return a
		case j.standing == api.StandsUpdated:
			// It runs an older one again: as if it was never asked.
		default:
			a.ask = j.again && v.online && r.displaces(v.open) && o.attempt%attempts < maxOffers && ago > pace.pause(o.attempt%attempts) && r.reaches(a.phase)
			return a
		}
	}
	switch {
	case !r.reaches(a.phase):
		a.standing = api.StandsLater
	case r.unheard(v, now, since, pace):
		a.standing = api.StandsDue
	case !v.online:
		a.standing = api.StandsAway
	case !r.displaces(v.open):
		a.standing, a.code = api.StandsWaiting, wire.CodeUpdatePending
	case lingers(v.open, now): // it holds nobody up
		a.standing, a.code, a.ask = api.StandsWaiting, wire.CodeUpdatePending, true
	default:
		a.standing, a.ask = api.StandsDue, true
	}
	return a
}

// lately tells whether something was since the phase began that runs, or since the
// campaign was done; for as long as is known what became of late devices, or in a year
// all that were ever switched off would excuse those that the release silences.
func (r *campaignRow) lately(t, now time.Time) bool {
	since := r.Phases[r.Phase].Began
	if r.State == api.CampaignDone {
		since = later(r.Ended, now.Add(-retention))
	}
	return !since.IsZero() && !t.Before(since)
}

// reaches tells whether devices of a phase are asked.
func (r *campaignRow) reaches(phase int) bool {
	switch r.State {
	case api.CampaignRunning, api.CampaignPaused:
		return phase < r.Phase || phase == r.Phase && !r.Phases[phase].Began.IsZero()
	case api.CampaignDone:
		return true
	}
	return false
}

// group is devices whose failures and silence are judged together.
type group struct {
	asked  int
	ended  int // of those asked, who run it, failed or are silent
	failed int
	silent int
	tried  int // see [at]
	others int // who were not tried, and there
	gone   int // of others
}

func (g *group) add(a at) {
	if !a.asked {
		return
	}
	g.asked++
	switch a.standing {
	case api.StandsUpdated:
		g.ended++
	case api.StandsFailed:
		g.ended++
		g.failed++
	case api.StandsSilent:
		g.ended++
		g.silent++
	}
}

func (g *group) compare(a at) {
	switch {
	case a.tried:
		g.tried++
	case a.there:
		g.others++
		if a.gone {
			g.gone++
		}
	}
}

// quiet is the share of those that were not tried who are silent.
func (g *group) quiet() float64 { return float64(g.gone) / max(1, float64(g.others)) }

// tally is how many devices stand where.
type tally struct {
	group
	devices int
	counts  map[api.Standing]int
	phases  []phaseTally
	boards  map[string]*group
	reasons map[api.StandingReason]int // with Devices 0
}

type phaseTally struct {
	group
	devices int
	open    int // of those asked, who may still take it, and hold nobody up
	counts  map[api.Standing]int
}

func newTally(phases int) *tally {
	t := &tally{counts: make(map[api.Standing]int), reasons: make(map[api.StandingReason]int), boards: make(map[string]*group), phases: make([]phaseTally, phases)}
	for i := range t.phases {
		t.phases[i].counts = make(map[api.Standing]int)
	}
	return t
}

// groups is those that a device is in.
func (t *tally) groups(a at) [3]*group {
	board := t.boards[a.board]
	if board == nil {
		board = new(group)
		t.boards[a.board] = board
	}
	return [...]*group{&t.group, &t.phases[a.phase].group, board}
}

func (t *tally) add(a at) {
	t.compare(a)
	for _, g := range t.groups(a) {
		g.add(a)
	}
	t.devices++
	t.counts[a.standing]++
	p := &t.phases[a.phase]
	p.devices++
	p.counts[a.standing]++
	if a.asked {
		switch a.standing {
		case api.StandsWaiting, api.StandsHindered:
			p.open++
		case api.StandsDeclined:
			if a.again {
				p.open++
			}
		}
	}
	if a.code != "" && a.standing != api.StandsUpdated && a.standing != api.StandsInstalling {
		t.reasons[api.StandingReason{Standing: a.standing, Code: a.code}]++
	}
}

// compare counts a device as one whose silence may be the release's, or is not.
func (t *tally) compare(a at) {
	for _, g := range t.groups(a) {
		g.compare(a)
	}
}

// anyway is how many of a group's devices that were tried would be silent if they fell
// silent as the others do: at night, or when it is the coordinator that cannot be
// reached. The others are all, or its own, as one place may be cut off; a few prove nothing.
func (t *tally) anyway(g *group) float64 {
	quiet := t.quiet()
	if g.others >= fewestOthers {
		quiet = max(quiet, g.quiet())
	}
	return float64(g.tried) * quiet
}

// lull is why a campaign asks nobody and does not go on, though it need not stop.
func (r *campaignRow) lull(t *tally) string {
	code, reason := r.stops(t)
	if code != "" || !r.Phases[r.Phase].Approved.IsZero() {
		return ""
	}
	return reason
}

// fewest is of how many devices at least a share is, so that one blip among the first
// three that answer stops nothing; of all of a phase that has fewer.
const (
	fewest       = 50
	fewestOthers = 10
)

// judged is a group, and how it is judged.
type judged struct {
	*group
	name string // " of phase 2", after "devices"
	of   int    // a share is of so many
	part bool   // of all: a number is not for it, and a share must be passed clearly
}

// stops tells why a campaign must stop; code "" if it need not, with a reason if it
// waits instead: many are silent, and so are others. Shares are not of what
// the phase will have some day: of a hundred thousand the first two thousand could fail.
// Nor of all alone: fifty thousand that are well would hide a board that comes in a late
// phase, and fails whole.
func (r *campaignRow) stops(t *tally) (code, reason string) {
	var groups []judged
	if r.State == api.CampaignDone { // of those that came late
		groups = append(groups, judged{group: &t.group, of: max(t.asked, fewest)})
	} else {
		planned, p := min(r.Phases[r.Phase].Planned, fewest), &t.phases[r.Phase].group
		groups = append(groups, judged{group: &t.group, of: max(t.asked, planned)},
			judged{p, fmt.Sprintf(" of phase %d", r.Phase+1), p.asked, true})
	}
	for _, name := range slices.Sorted(maps.Keys(t.boards)) {
		b := t.boards[name]
		groups = append(groups, judged{b, fmt.Sprintf(" of the board %q", name), b.asked, true})
	}
	for _, g := range groups {
		c, why := r.judge(g, len(groups), t.anyway(g.group))
		if c != "" {
			return c, why
		}
		reason = cmp.Or(reason, why)
	}
	return "", reason
}

func (r *campaignRow) judge(g judged, parts int, anyway float64) (code, reason string) {
	// Who falls silent is known long after who was updated, so a share of all that were
	// asked would be too small for as long as more are asked. Some failures are known
	// sooner than any success, so a share of those that have ended would be too large.
	ended := min(g.of, max(g.ended, fewest))
	if g.part { // it is not too small to be judged
		ended = g.ended
	}
	over := func(n float64, most int, share float64, of int) bool {
		if g.part {
			return n > mostOfPart(share/100, of, parts)
		}
		return most >= 0 && n > float64(most) || n > 0 && share <= 100 && n > share/100*float64(of)
	}
	limit := func(most int, share float64) string {
		var said []string
		if most >= 0 && !g.part {
			said = append(said, fmt.Sprintf("%d", most))
		}
		if share <= 100 {
			said = append(said, fmt.Sprintf("%v%%", share))
		}
		return strings.Join(said, " or ")
	}
	failed, silent := float64(g.failed), float64(g.silent)
	switch {
	case over(failed, r.Stop.Failed, r.Stop.FailedShare, g.of):
		return api.CampaignTooManyFailed, fmt.Sprintf("%d of %d devices%s failed, and at most %s may", g.failed, g.of, g.name, limit(r.Stop.Failed, r.Stop.FailedShare))
	case over(silent-anyway, r.Stop.Silent, r.Stop.SilentShare, ended):
		return api.CampaignTooManySilent, fmt.Sprintf("%d of %d devices%s fell silent for more than %s, and at most %s may", g.silent, ended, g.name, r.Stop.After, limit(r.Stop.Silent, r.Stop.SilentShare))
	case over(silent, r.Stop.Silent, r.Stop.SilentShare, ended):
		return "", fmt.Sprintf("%d devices%s fell silent, but so did others: by those that were not asked in this phase, %.0f would have anyway; it goes on when they are back, or by an approval", g.silent, g.name, anyway)
	}
	return "", ""
}

// byChance is how likely a campaign that is well may be taken for one that is not, because
// too many devices of one of its parts fail or are silent.
const byChance = 1e-3

// mostOfPart is how many of so many devices of a part may do what a share (0 to 1) of all may: as
// many as chance would exceed once in 1/[byChance] campaigns with so many parts, by the binomial
// distribution. One device is no part, and a part of which all do is always too much.
func mostOfPart(share float64, of, parts int) float64 {
	if share >= 1 {
		return math.Inf(1)
	}
	n := float64(of)
	most := int(share * n)
	most += sort.Search(of-most, func(more int) bool { return tail(share, of, most+more+1) <= byChance/float64(parts) })
	return max(share*n, 1, min(float64(most), n-1))
}

// tail is the chance that at least k of n, more than p of them, do what each does with a chance of p.
func tail(p float64, n, k int) (sum float64) {
	if p <= 0 && k > 0 {
		return 0
	}
	for i := k; i <= n; i++ {
		all, _ := math.Lgamma(float64(n + 1))
		these, _ := math.Lgamma(float64(i + 1))
		others, _ := math.Lgamma(float64(n - i + 1))
		term := math.Exp(all - these - others + float64(i)*math.Log(p) + float64(n-i)*math.Log1p(-p))
		if sum += term; term < 1e-6*sum {
			break
		}
	}
	return sum
}

// holdup is why the phase that runs is not settled; empty: it is.
func (r *campaignRow) holdup(t *tally) string {
	if n := t.moving(); n > 0 {
		return fmt.Sprintf("%d devices are to be asked, or under way", n)
	}
	p := t.phases[r.Phase]
	updated := 0
	for i := range r.Phase + 1 {
		updated += t.phases[i].counts[api.StandsUpdated]
	}
	switch {
	case !r.Phases[r.Phase].Approved.IsZero():
		return ""
	case 2*p.open > p.asked:
		return fmt.Sprintf("%d of the %d devices that were asked wait, put it off or could not fetch it; an approval goes on without them", p.open, p.asked)
	case updated == 0 && r.Phase < len(r.Phases)-1:
		return "no device has taken it so far; an approval goes on all the same"
	}
	return ""
}

// approvable tells whether there is something to approve: what the phase has shown, or
// that it goes on without those that hold it up. An approval in advance would be of
// what nobody has seen.
func (r *campaignRow) approvable(t *tally, now time.Time) bool {
	p := r.Phases[r.Phase]
	if p.Began.IsZero() {
		return false
	}
	return p.Approve && p.soaked(now) || r.lull(t) != "" || p.Settled.IsZero() && t.moving() == 0 && r.holdup(t) != ""
}

// moving is how many are under way, or will be.
func (t *tally) moving() int {
	return t.counts[api.StandsDue] + t.counts[api.StandsAsked] + t.counts[api.StandsInstalling]
}

// awaits tells whether only an approval is missing.
func (r *campaignRow) awaits(now time.Time) bool {
	if r.State != api.CampaignRunning || r.Phase >= len(r.Phases) {
		return false
	}
	p := r.Phases[r.Phase]
	return p.Approve && p.Approved.IsZero() && p.soaked(now)
}

func (p phaseRow) soaked(now time.Time) bool {
	return !p.Settled.IsZero() && now.Sub(p.Settled).Seconds() >= p.SoakSeconds
}
