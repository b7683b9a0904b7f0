package coordinator

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// inPhase is a campaign of a canary of ten and of all others, in the phase i, which has
// so many devices.
func inPhase(t testing.TB, i, devices int) campaignRow {
	t.Helper()
	r, err := rowOf(api.CampaignRequest{Version: "2.0.0", Phases: []api.CampaignPhase{{Count: 10, SoakSeconds: 3600}, percent(100)}})
	must(t, err)
	r.Phase, r.Phases[i].Planned = i, devices
	return r
}

// tallied is a tally of so many that were asked and stand there.
func tallied(phase int, counts map[api.Standing]int) *tally {
	t := newTally(2)
	for s, n := range counts {
		for range n {
			t.add(at{standing: s, asked: true, phase: phase})
		}
	}
	return t
}

func TestHowManyMayFailIsAShareOfThoseThatWereAsked(t *testing.T) {
	for _, c := range []struct {
		what    string
		phase   int
		planned int
		counts  map[api.Standing]int
		want    string
	}{
		{"all that were asked of a large phase fail", 1, 100_000, map[api.Standing]int{api.StandsFailed: 2000}, api.CampaignTooManyFailed},
		{"all of them are silent", 1, 100_000, map[api.Standing]int{api.StandsSilent: 2000}, api.CampaignTooManySilent},
		{"none was updated while thousands are asked", 1, 100_000, map[api.Standing]int{api.StandsInstalling: 36_000, api.StandsSilent: 50}, api.CampaignTooManySilent},
		{"failures are known before successes", 1, 100_000, map[api.Standing]int{api.StandsInstalling: 1200, api.StandsFailed: 12}, ""},
		{"one of the first three", 1, 100_000, map[api.Standing]int{api.StandsUpdated: 2, api.StandsFailed: 1}, ""},
		{"two of the first three", 1, 100_000, map[api.Standing]int{api.StandsUpdated: 1, api.StandsFailed: 2}, api.CampaignTooManyFailed},
		{"2%", 1, 100_000, map[api.Standing]int{api.StandsUpdated: 980, api.StandsFailed: 20}, ""},
		{"more than 2%", 1, 100_000, map[api.Standing]int{api.StandsUpdated: 979, api.StandsFailed: 21}, api.CampaignTooManyFailed},
		{"one of a canary of ten", 0, 10, map[api.Standing]int{api.StandsUpdated: 9, api.StandsFailed: 1}, api.CampaignTooManyFailed},
		{"one of a canary of ten is silent", 0, 10, map[api.Standing]int{api.StandsUpdated: 9, api.StandsSilent: 1}, api.CampaignTooManySilent},
		{"5%", 1, 100_000, map[api.Standing]int{api.StandsUpdated: 950, api.StandsSilent: 50}, ""},
		{"more than 5%", 1, 100_000, map[api.Standing]int{api.StandsUpdated: 949, api.StandsSilent: 51}, api.CampaignTooManySilent},
		{"one that is silent among the first", 1, 100_000, map[api.Standing]int{api.StandsUpdated: 1, api.StandsSilent: 1}, ""},
	} {
		r := inPhase(t, c.phase, c.planned)
		if code, reason := r.stops(tallied(c.phase, c.counts)); code != c.want {
			t.Errorf("%s: %q (%s), want %q", c.what, code, reason, c.want)
		}
	}
	done := inPhase(t, 1, 1)
	done.State = api.CampaignDone
	for n, want := range map[int]string{1: "", 2: api.CampaignTooManyFailed} {
		if code, _ := done.stops(tallied(1, map[api.Standing]int{api.StandsFailed: n})); code != want {
			t.Errorf("%d late ones that fail: %q, want %q", n, code, want)
		}
	}
}

// stands is so many devices of a phase and a board that were asked and stand there.
type stands struct {
	phase, devices int
	board          string
	at             api.Standing
}

func addAll(t *tally, all ...stands) *tally {
	for _, s := range all {
		for range s.devices {
			t.add(at{standing: s.at, asked: true, tried: true, phase: s.phase, board: s.board})
		}
	}
	return t
}

// Fifty thousand that are well hide nobody.
func TestAPartThatFailsIsNotHiddenByAllThatIsWell(t *testing.T) {
	well := stands{0, 50_000, "a", api.StandsUpdated}
	for _, c := range []struct {
		what    string
		planned int
		rule    api.CampaignStop
		stands  []stands
		want    string
	}{
		{"a late phase fails whole", 50_000, api.CampaignStop{}, []stands{well, {1, 1000, "a", api.StandsFailed}}, api.CampaignTooManyFailed},
		{"it is silent", 50_000, api.CampaignStop{}, []stands{well, {1, 1000, "a", api.StandsSilent}}, api.CampaignTooManySilent},
		{"a late phase of three fails whole", 3, api.CampaignStop{}, []stands{well, {1, 3, "a", api.StandsFailed}}, api.CampaignTooManyFailed},
		{"one of three", 3, api.CampaignStop{}, []stands{well, {1, 1, "a", api.StandsFailed}, {1, 2, "a", api.StandsUpdated}}, ""},
		{"the one that it has", 1, api.CampaignStop{}, []stands{well, {1, 1, "a", api.StandsFailed}}, ""},
		{"one of three that is silent", 3, api.CampaignStop{}, []stands{well, {1, 1, "a", api.StandsSilent}, {1, 2, "a", api.StandsUpdated}}, ""},
		{"little more than the share", 50_000, api.CampaignStop{}, []stands{well, {1, 965, "a", api.StandsUpdated}, {1, 35, "a", api.StandsFailed}}, ""},
		{"clearly more", 50_000, api.CampaignStop{}, []stands{well, {1, 960, "a", api.StandsUpdated}, {1, 40, "a", api.StandsFailed}}, api.CampaignTooManyFailed},
		{"most may fail, and all do", 10, api.CampaignStop{MaxFailedShare: new(80.0)}, []stands{well, {1, 10, "a", api.StandsFailed}}, api.CampaignTooManyFailed},
		{"most may fail, and do", 10, api.CampaignStop{MaxFailedShare: new(80.0)}, []stands{well, {1, 9, "a", api.StandsFailed}, {1, 1, "a", api.StandsUpdated}}, ""},
		{"all may fail", 1000, api.CampaignStop{MaxFailedShare: new(100.0)}, []stands{well, {1, 1000, "a", api.StandsFailed}}, ""},
		{"so many may fail, of all", 1000, api.CampaignStop{MaxFailed: new(1000)}, []stands{well, {1, 1000, "a", api.StandsFailed}}, ""},
		{"another board fails whole among many", 50_000, api.CampaignStop{}, []stands{well, {1, 30_000, "a", api.StandsUpdated}, {1, 200, "b", api.StandsFailed}}, api.CampaignTooManyFailed},
		{"it is silent among many", 50_000, api.CampaignStop{}, []stands{well, {1, 30_000, "a", api.StandsUpdated}, {1, 200, "b", api.StandsSilent}}, api.CampaignTooManySilent},
		{"one of three of another board", 50_000, api.CampaignStop{}, []stands{well, {1, 30_000, "a", api.StandsUpdated}, {1, 1, "b", api.StandsFailed}, {1, 2, "b", api.StandsUpdated}}, ""},
		{"a few of another board, as chance has it", 50_000, api.CampaignStop{}, []stands{well, {1, 30_000, "a", api.StandsUpdated}, {1, 4, "b", api.StandsFailed}, {1, 46, "b", api.StandsUpdated}}, ""},
		{"a few of a small board, and they are half of it", 50_000, api.CampaignStop{}, []stands{well, {1, 30_000, "a", api.StandsUpdated}, {1, 5, "b", api.StandsFailed}, {1, 5, "b", api.StandsUpdated}}, api.CampaignTooManyFailed},
		{"a board of two fails whole", 50_000, api.CampaignStop{}, []stands{well, {1, 30_000, "a", api.StandsUpdated}, {1, 2, "b", api.StandsFailed}}, api.CampaignTooManyFailed},
		{"a board of seven is silent whole", 50_000, api.CampaignStop{}, []stands{well, {1, 30_000, "a", api.StandsUpdated}, {1, 7, "b", api.StandsSilent}}, api.CampaignTooManySilent},
	} {
		r := inPhase(t, 1, c.planned)
		var err error
		r.Stop, err = stopOf(c.rule)
		must(t, err)
		if code, reason := r.stops(addAll(newTally(2), c.stands...)); code != c.want {
			t.Errorf("%s: %q (%s), want %q", c.what, code, reason, c.want)
		}
	}
	// Of those that come late, too.
	done := inPhase(t, 1, 1)
	done.State = api.CampaignDone
	late := addAll(newTally(2), stands{1, 30_000, "a", api.StandsUpdated}, stands{1, 5, "b", api.StandsFailed})
	if code, reason := done.stops(late); code != api.CampaignTooManyFailed || reason != `5 of 5 devices of the board "b" failed, and at most 2% may` {
		t.Errorf("late ones: %q (%s)", code, reason)
	}
}

// What chance does to one board of a hundred in a fleet that is well stops nothing, but once in
// a thousand campaigns: the tail of the binomial distribution is what tables of it say.
func TestWhatChanceDoesToPartsStopsNothing(t *testing.T) {
	for _, c := range []struct {
		p    float64
		n, k int
		want float64
	}{{0.02, 50, 4, 0.01776}, {0.5, 10, 8, 0.05469}, {0.05, 2, 2, 0.0025}, {0.02, 100_000, 2100, 0.01277}} {
		if got := tail(c.p, c.n, c.k); math.Abs(got-c.want) > c.want/100 {
			t.Errorf("%d or more of %d, each with %v: %.5f, want %.5f", c.k, c.n, c.p, got, c.want)
		}
	}
	const parts = 100
	for _, n := range []int{2, 3, 10, 50, 500, 20_000} {
		most := mostOfPart(0.02, n, parts)
		if whole := most == float64(n)-1; tail(0.02, n, int(most)+1) > byChance/parts && !whole || most >= float64(n) {
			t.Errorf("of %d, %v may fail", n, most)
		}
		if most > 1 && tail(0.02, n, int(most)) <= byChance/parts {
			t.Errorf("of %d, %v may fail, which is more than chance does", n, most)
		}
	}
	for share, want := range map[float64]float64{0: 1, 0.01: 1, 1: math.Inf(1), 2: math.Inf(1)} {
		if got := mostOfPart(share, 2, parts); got != want {
			t.Errorf("of 2, where %v may, %v may", share, got)
		}
	}
}

// One place that is cut off, and has all the devices of a board, is no release that
// silences them.
func TestABoardThatIsSilentAnywayHoldsACampaign(t *testing.T) {
	r := inPhase(t, 1, 100_000)
	tt := addAll(newTally(2), stands{1, 40_000, "a", api.StandsUpdated}, stands{1, 100, "b", api.StandsSilent})
	for range 20 {
		tt.add(at{standing: api.StandsAway, phase: 1, board: "b", there: true, gone: true})
	}
	for range 20_000 {
		tt.add(at{standing: api.StandsDue, phase: 1, board: "a", there: true})
	}
	if code, reason := r.stops(tt); code != "" || r.lull(tt) == "" {
		t.Errorf("%q (%s)", code, reason)
	}
}

// Devices say that they have it after a minute, so of a crash after that only their
// silence tells. Who took it before it was done, or long ago, was switched off.
func TestLateSilenceIsTheReleases(t *testing.T) {
	now := time.Now()
	r := inPhase(t, 0, 100)
	r.Phases = r.Phases[:1]
	r.State, r.Phases[0].Began, r.Ended = api.CampaignDone, now.Add(-2400*time.Hour), now.Add(-2300*time.Hour)
	look := func(taken, heard time.Duration) at {
		o := &orderNow{state: wire.Succeeded, updated: now.Add(-taken), moved: now.Add(-taken)}
		return r.stand(&api.DeviceRecord{ID: "d", Agent: "2.0.0"}, o, seen{last: now.Add(-heard)}, now, now.Add(-10_000*time.Hour), ordinaryCampaigns)
	}
	for _, c := range []struct {
		taken, heard time.Duration // ago
		want         at
	}{
		{2 * time.Hour, 2 * time.Hour, at{standing: api.StandsSilent, code: "away_since", asked: true, tried: true, there: true, gone: true}},
		{2 * time.Hour, 29 * time.Minute, at{standing: api.StandsUpdated, asked: true, tried: true, there: true}},
		{2301 * time.Hour, 2 * time.Hour, at{standing: api.StandsUpdated, asked: true, there: true, gone: true}},
		{retention + time.Hour, retention + time.Hour, at{standing: api.StandsUpdated, asked: true, gone: true}},
	} {
		if got := look(c.taken, c.heard); got != c.want {
			t.Errorf("taken %s ago, heard %s ago: %+v, want %+v", c.taken, c.heard, got, c.want)
		}
	}
	tt := newTally(1)
	for range 1000 {
		tt.add(look(2*time.Hour, 2*time.Hour))
	}
	if code, reason := r.stops(tt); code != api.CampaignTooManySilent {
		t.Errorf("1000 took it and fell silent: %q (%s)", code, reason)
	}
}

// Devices refuse with these when what they are shown was not made by the keys' owners,
// or is not what everybody is shown.
func TestAReleaseThatDevicesDistrustHasFailed(t *testing.T) {
	for _, code := range []string{wire.CodeVerification, wire.CodeLogFork, wire.CodeNotLogged, wire.CodeBadBody} {
		if got := judgeOffer(orderNow{state: wire.Rejected, code: code}); got != (meaning{api.StandsFailed, false}) {
			t.Errorf("%s: %+v", code, got)
		}
	}
	// And no code is in a list that devices do not send.
	known := []string{wire.CodeLogFork, wire.CodeNotLogged, wire.CodeWrongHardware, wire.CodeDowngrade, wire.CodeNoUpdateRoot, wire.CodeNewerFormat, wire.CodeSlowTransfer,
		wire.CodeVerification, wire.CodeBadBody, wire.CodeNotSupported, wire.CodeUnknownKind, wire.CodeTransfer, wire.CodeNoSpace, wire.CodeInterrupted}
	for _, list := range []map[string]bool{faults, lasting, passing} {
		for code := range list {
			if !slices.Contains(known, code) {
				t.Errorf("no device refuses an update with %q", code)
			}
		}
	}
}

func TestWhatSaysNothingOfTheReleaseIsNoFailure(t *testing.T) {
	for _, code := range []string{wire.CodeTransfer, wire.CodeSlowTransfer, wire.CodeNoSpace, wire.CodeInterrupted} {
		if got := judgeOffer(orderNow{state: wire.Failed, code: code}); got != (meaning{api.StandsHindered, true}) {
			t.Errorf("%s: %+v", code, got)
		}
	}
	r := inPhase(t, 0, 10)
	if code, reason := r.stops(tallied(0, map[api.Standing]int{api.StandsUpdated: 6, api.StandsHindered: 4})); code != "" {
		t.Errorf("%s: %s", code, reason)
	}
	// But a phase is not over when most could not take it.
	for _, c := range []struct {
		at   at
		hold bool
	}{
		{at{standing: api.StandsHindered, again: true}, true},
		{at{standing: api.StandsDeclined, code: wire.CodeStaleMetadata, again: true}, true},
		{at{standing: api.StandsWaiting, code: wire.CodeConsent}, true},
		{at{standing: api.StandsDeclined, code: wire.CodeWrongHardware}, false},
	} {
		r, few := inPhase(t, 0, 10), tallied(0, map[api.Standing]int{api.StandsUpdated: 5})
		c.at.asked = true
		for range 5 {
			few.add(c.at)
		}
		if h := r.holdup(few); h != "" {
			t.Errorf("half of them, %+v: %q", c.at, h)
		}
		few.add(c.at)
		if h := r.holdup(few); (h != "") != c.hold {
			t.Errorf("most of them, %+v: %q", c.at, h)
		}
	}
}

func TestOnlySilenceSinceItsPhaseBeganIsTheReleases(t *testing.T) {
	now := time.Now()
	r := inPhase(t, 1, 100)
	r.Phases[0].Began, r.Phases[0].Ended = now.Add(-240*time.Hour), now.Add(-239*time.Hour)
	r.Phases[1].Began = now.Add(-239 * time.Hour)
	for _, c := range []struct {
		updated, heard time.Duration // ago
		want           api.Standing
	}{
		{240 * time.Hour, 31 * time.Minute, api.StandsUpdated}, // what it took has soaked for long
		{238 * time.Hour, 31 * time.Minute, api.StandsSilent},
		{238 * time.Hour, 29 * time.Minute, api.StandsUpdated},
	} {
		o := &orderNow{state: wire.Succeeded, updated: now.Add(-c.updated), moved: now.Add(-c.updated)}
		a := r.stand(&api.DeviceRecord{ID: "d", Agent: "2.0.0"}, o, seen{last: now.Add(-c.heard)}, now, now.Add(-1000*time.Hour), ordinaryCampaigns)
		if a.standing != c.want {
			t.Errorf("updated %s ago, heard %s ago: %s, want %s", c.updated, c.heard, a.standing, c.want)
		}
	}
}

// At night, or when it is the coordinator that cannot be reached, all fall silent
// alike.
func TestSilenceOfOthersHoldsACampaignAndDoesNotStopIt(t *testing.T) {
	now := time.Now()
	r := inPhase(t, 1, 1000)
	r.Phases[1].Began = now.Add(-24 * time.Hour)
	since := now.Add(-1000 * time.Hour)
	look := func(asked, silent, others, gone int) *tally {
		tt := newTally(2)
		for i := range asked + others {
			d, v, o := &api.DeviceRecord{ID: "d", Agent: "1.0.0"}, seen{last: now, online: true}, (*orderNow)(nil)
			if i < silent || i >= asked && i < asked+gone {
				v = seen{last: now.Add(-31 * time.Minute)}
			}
			if i < asked {
				d.Agent, o = "2.0.0", &orderNow{state: wire.Succeeded, updated: now.Add(-time.Hour), moved: now.Add(-time.Hour)}
			}
			tt.add(r.stand(d, o, v, now, since, ordinaryCampaigns))
		}
		return tt
	}
	for _, c := range []struct {
		what                        string
		asked, silent, others, gone int
		code                        string
		holds                       bool
	}{
		{"the release silences all", 1000, 1000, 1000, 0, api.CampaignTooManySilent, false},
		{"the uplink was away", 1000, 1000, 1000, 1000, "", true},
		{"a night", 1000, 200, 1000, 190, "", true},
		{"a night, and a release that silences some", 1000, 300, 1000, 190, api.CampaignTooManySilent, false},
		{"few are silent", 1000, 40, 1000, 190, "", false},
		{"there are no others", 1000, 1000, 0, 0, api.CampaignTooManySilent, false},
	} {
		tt := look(c.asked, c.silent, c.others, c.gone)
		code, reason := r.stops(tt)
		if code != c.code || (r.lull(tt) != "") != c.holds {
			t.Errorf("%s: %q (%s), %q", c.what, code, reason, r.lull(tt))
		}
	}
	night := look(1000, 200, 1000, 190)
	if !r.approvable(night, now) {
		t.Error("nobody can say that it is to go on")
	}
	if r.Phases[1].Approved = now; r.lull(night) != "" {
		t.Error("it does not go on by an approval")
	}
}

func TestAnApprovalIsOfWhatCanBeSeen(t *testing.T) {
	now := time.Now()
	half := map[api.Standing]int{api.StandsUpdated: 5}
	for _, c := range []struct {
		what           string
		approve        bool
		began, settled time.Duration // ago; 0: not yet
		counts         map[api.Standing]int
		want           bool
	}{
		{"before the phase began", true, 0, 0, nil, false},
		{"while devices are asked", true, time.Hour, 0, map[api.Standing]int{api.StandsInstalling: 5}, false},
		{"while it soaks", true, time.Hour, time.Minute, half, false},
		{"when it has soaked", true, 2 * time.Hour, time.Hour, half, true},
		{"when it goes on by itself", false, 2 * time.Hour, time.Hour, half, false},
		{"when most wait", false, time.Hour, 0, map[api.Standing]int{api.StandsWaiting: 5, api.StandsUpdated: 1}, true},
		{"when nobody has it", true, time.Hour, 0, map[api.Standing]int{api.StandsFailed: 1}, true},
	} {
		r := inPhase(t, 0, 100)
		p := &r.Phases[0]
		p.Approve = c.approve
		if c.began > 0 {
			p.Began = now.Add(-c.began)
		}
		if c.settled > 0 {
			p.Settled = now.Add(-c.settled)
		}
		if got := r.approvable(tallied(0, c.counts), now); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

// Where a device stands when nothing is heard of it, to the moment.
func TestSilenceBeginsAtItsDeadline(t *testing.T) {
	const after = 10 * time.Minute
	pace := campaignPace{stuck: time.Hour}
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	row := campaignRow{Version: "2.0.0", State: api.CampaignRunning, Stop: stopRule{After: after}, Phases: []phaseRow{{CampaignPhase: percent(100), Began: start}}}
	for _, c := range []struct {
		what         string
		agent        string
		state        wire.State
		code         string
		beat, report time.Duration // ago
		moved        time.Duration
		since        time.Duration // the coordinator hears
		want         api.Standing
		why          string
	}{
		{"nothing for just so long", "1.0.0", wire.Running, "", after, after, after, time.Hour, api.StandsInstalling, ""},
		{"nothing for longer", "1.0.0", wire.Running, "", after + 1, after + 1, after + 1, time.Hour, api.StandsSilent, "away"},
		{"heartbeats", "1.0.0", wire.Running, "", 0, after + 1, after + 1, time.Hour, api.StandsInstalling, ""},
		{"reports", "1.0.0", wire.Running, "", after + 1, 0, 0, time.Hour, api.StandsInstalling, ""},
		{"a coordinator that has just come", "1.0.0", wire.Queued, "", after + 1, after + 1, after + 1, after, api.StandsAsked, ""},
		{"the same for just too long", "1.0.0", wire.Running, "", 0, 0, time.Hour, 2 * time.Hour, api.StandsInstalling, ""},
		{"the same for longer", "1.0.0", wire.Running, "", 0, 0, time.Hour + 1, 2 * time.Hour, api.StandsSilent, "no_progress"},
		{"one that waits may be off", "1.0.0", wire.Running, "window", 24 * time.Hour, 24 * time.Hour, 24 * time.Hour, 48 * time.Hour, api.StandsWaiting, "window"},
		{"updated and heard of", "2.0.0", wire.Succeeded, "", after, time.Hour, time.Hour, 2 * time.Hour, api.StandsUpdated, ""},
		{"updated and gone", "2.0.0", wire.Succeeded, "", after + 1, time.Hour, time.Hour, 2 * time.Hour, api.StandsSilent, "away_since"},
	} {
		now := start.Add(100 * time.Hour)
		o := &orderNow{state: c.state, code: c.code, updated: now.Add(-c.report), moved: now.Add(-c.moved)}
		got := row.stand(&api.DeviceRecord{ID: "d", Agent: c.agent}, o, seen{online: true, last: now.Add(-c.beat)}, now, now.Add(-c.since), pace)
		if got.standing != c.want || got.code != c.why {
			t.Errorf("%s: %s %q, want %s %q", c.what, got.standing, got.code, c.want, c.why)
		}
	}
	for soaked, want := range map[time.Duration]bool{time.Hour - 1: false, time.Hour: true} {
		if p := (phaseRow{CampaignPhase: api.CampaignPhase{SoakSeconds: 3600}, Settled: start}); p.soaked(start.Add(soaked)) != want {
			t.Errorf("after %s it has soaked: %v", soaked, !want)
		}
	}
	if (phaseRow{}).soaked(start) {
		t.Error("what has not settled has soaked")
	}
}

// A coordinator that has just begun calls nobody away: a phase would settle, and the next
// one begin, without all those who are about to say hello.
func TestNobodyIsAwayAtTheStart(t *testing.T) {
	start := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	r := campaignRow{Version: "2.0.0", State: api.CampaignRunning, Created: start.Add(-time.Hour), Phases: []phaseRow{{CampaignPhase: percent(100), Began: start.Add(-time.Hour)}}}
	d := api.DeviceRecord{ID: "d", Agent: "1.0.0"}
	pace := campaignPace{hears: time.Minute}
	for _, c := range []struct {
		heard, now time.Duration
		want       api.Standing
	}{{-time.Hour, 30 * time.Second, api.StandsDue}, {-time.Hour, 2 * time.Minute, api.StandsAway}, {10 * time.Second, 30 * time.Second, api.StandsAway}} {
		if a := r.stand(&d, nil, seen{last: start.Add(c.heard)}, start.Add(c.now), start, pace); a.standing != c.want || a.ask {
			t.Errorf("heard %s after the start, and %s after it: %+v, want %s", c.heard, c.now, a, c.want)
		}
	}
}

// What gives way is older in both ways and has not begun: who waits for 2.1.0 is not sent back
// to 2.0.0, and what an operator asked since the campaign began is meant.
func TestWhatGivesWay(t *testing.T) {
	early, late := ulid.MustNew(1000, nil).String(), ulid.MustNew(3000, nil).String()
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	r := campaignRow{ID: ulid.MustNew(2000, nil).String(), Version: "2.0.0", State: api.CampaignRunning, Created: now, Phases: []phaseRow{{CampaignPhase: percent(100), Began: now}}}
	gives := openUpdate{order: early, version: "1.9.0"}
	asked, slow := gives, gives
	asked.canceled, slow.canceled = now.Add(-givesWay), now.Add(-givesWay-1)
	for what, c := range map[string]struct {
		open []openUpdate
		want api.Standing
		ask  bool
	}{
		"nothing":            {nil, api.StandsDue, true},
		"an older one":       {[]openUpdate{gives}, api.StandsDue, true},
		"two":                {[]openUpdate{gives, gives}, api.StandsDue, true},
		"asked to leave it":  {[]openUpdate{asked}, api.StandsDue, true},
		"in vain":            {[]openUpdate{slow}, api.StandsWaiting, true},
		"it has begun":       {[]openUpdate{{order: early, version: "1.9.0", began: true}}, api.StandsWaiting, false},
		"one has begun":      {[]openUpdate{gives, {order: early, version: "1.9.0", began: true}}, api.StandsWaiting, false},
		"a newer release":    {[]openUpdate{{order: early, version: "2.0.1"}}, api.StandsWaiting, false},
		"the same":           {[]openUpdate{{order: early, version: "2.0.0"}}, api.StandsWaiting, false},
		"asked since":        {[]openUpdate{{order: late, version: "1.9.0"}}, api.StandsWaiting, false},
		"nobody knows which": {[]openUpdate{{order: early}}, api.StandsWaiting, false},
		"an id that is none": {[]openUpdate{{order: "x", version: "1.9.0"}}, api.StandsWaiting, false},
	} {
		a := r.stand(&api.DeviceRecord{ID: "d", Agent: "1.0.0"}, nil, seen{online: true, last: now, open: c.open}, now, now.Add(-time.Hour), ordinaryCampaigns)
		if a.standing != c.want || a.ask != c.ask {
			t.Errorf("%s: %+v", what, a)
		}
	}
}
