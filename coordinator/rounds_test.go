package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

var usualPlan = AuditPlan{Leaves: 90, Interval: 8 * time.Hour}

// simRounds are rounds with a clock and luck of the test's.
func simRounds(seed uint64, now *time.Time) (*rounds, *rand.Rand) {
	rng := rand.New(rand.NewPCG(seed, 1))
	return &rounds{plan: usualPlan, now: func() time.Time { return *now }, exp: rng.ExpFloat64, even: rng.Float64, log: slog.New(slog.DiscardHandler)}, rng
}

func right(leaves int) api.Audit {
	return api.Audit{Outcome: api.AuditRight, Leaves: leaves, Bytes: int64(leaves) * leafOnLine}
}

// leafOnLine is held against the answer of a device over the largest chunk.
func TestALeafHasNotMoreOnTheLineThanIsCounted(t *testing.T) {
	data := make([]byte, chunk.MaxSize)
	var leaves []wire.AuditLeaf
	for i := range 90 {
		l := wire.AuditLeaf{Chunk: chunk.Sum(data).String(), Leaf: i * 11}
		var err error
		l.Data, l.Path, err = chunk.Prove(data, l.Leaf)
		must(t, err)
		leaves = append(leaves, l)
	}
	raw, err := json.Marshal(leaves)
	must(t, err)
	items := make([]wire.AuditItem, 90)
	for i := range items {
		items[i] = wire.AuditItem{Chunk: leaves[i].Chunk, Leaf: leaves[i].Leaf}
	}
	order, err := json.Marshal(items)
	must(t, err)
	if n := len(raw) + len(order)*4/3; n > 90*leafOnLine || n < 90*leafOnLine*9/10 {
		t.Errorf("90 leaves have %d bytes, %d are counted", n, 90*leafOnLine)
	}
}

// Over a year a device proves what the plan says, in portions, at times without
// memory, and no day in debt.
func TestThePlanIsKeptOnAverage(t *testing.T) {
	now := epoch
	seed := testenv.Seed(t)
	r, _ := simRounds(seed, &now)
	var tn turn
	r.next(&tn, false, 100, 1)
	total, n, day := 0, 0, float64(r.plan.Leaves*leafOnLine)
	var gaps []float64
	const days = 2000
	for last := now; now.Before(epoch.Add(days * 24 * time.Hour)); {
		now = tn.Next
		ask, leaves := r.next(&tn, true, 100, 1)
		gaps = append(gaps, now.Sub(last).Hours())
		last = now
		if tn.Credit < 0 || tn.Credit > 2*day {
			t.Fatalf("credit %v", tn.Credit)
		}
		if ask {
			n, total = n+1, total+leaves
			r.after(&tn, leaves, nil, right(leaves))
		}
	}
	if perDay := float64(total) / days; perDay < 85 || perDay > 90.5 {
		t.Errorf("seed %d: %.1f leaves a day", seed, perDay)
	}
	// Of an exponential distribution, mean and deviation are the same; of 6000
	// values both are within 8% but for one seed in 10^8.
	var sum, square float64
	for _, g := range gaps {
		sum += g
	}
	mean := sum / float64(len(gaps))
	for _, g := range gaps {
		square += (g - mean) * (g - mean)
	}
	if dev := math.Sqrt(square / float64(len(gaps))); math.Abs(mean-8) > 0.64 || math.Abs(dev-mean) > 0.1*mean {
		t.Errorf("seed %d: gaps of %.2f h, deviation %.2f h", seed, mean, dev)
	}
	t.Logf("%d challenges in %d days, %.1f leaves a day", n, days, float64(total)/days)
}

// Ten thousand devices after a night without their coordinator: no storm.
func TestAStartIsNoStorm(t *testing.T) {
	now := epoch
	seed := testenv.Seed(t)
	r, _ := simRounds(seed, &now)
	const fleet = 10_000
	turns := make([]turn, fleet)
	for i := range turns {
		r.next(&turns[i], false, 100, 1)
	}
	// Through a first day, the night, and a second day, a minute a step.
	perMinute := func(minutes int) (most, asked, moved int) {
		for range minutes {
			now = now.Add(time.Minute)
			n := 0
			for i := range turns {
				tn := &turns[i]
				if tn.Next.After(now) {
					continue
				}
				moved++
				if ask, leaves := r.next(tn, true, 100, 1); ask {
					n++
					r.after(tn, leaves, nil, right(leaves))
				}
			}
			most, asked = max(most, n), asked+n
		}
		return most, asked, moved
	}
	most, asked, _ := perMinute(24 * 60)
	// On average 10,000·3/1440 = 21 a minute, twice that where all are new at first.
	if most > 90 || asked < fleet {
		t.Errorf("seed %d: %d a minute on the first day, %d in all", seed, most, asked)
	}
	now = now.Add(8 * time.Hour)
	most, _, moved := perMinute(1)
	if most > 60 || moved < fleet/2 {
		t.Errorf("seed %d: %d in the minute after the night, %d turns moved", seed, most, moved)
	}
	later, _, _ := perMinute(24 * 60)
	if later > 60 {
		t.Errorf("seed %d: %d a minute on the second day", seed, later)
	}
	t.Logf("at most %d challenges a minute on the first day, %d in the minute after the night, %d on the second day", 90, most, later)
}

// A device that has lost 5% and lies about it is found. The bound is that of n
// independent leaves, (1-p)^n; the simulation shows that the rounds draw as many.
func TestALiarIsFoundWithinItsBudget(t *testing.T) {
	const p, trials, leaves = 0.05, 3000, 90
	miss := math.Pow(1-p, leaves)
	if miss > 0.01 {
		t.Fatalf("%d leaves miss a share of %v with the chance %v", leaves, p, miss)
	}
	seed := uint64(20260101)
	now := epoch
	r, rng := simRounds(seed, &now)
	held := make([]api.Chunk, 200)
	bad := map[string]bool{}
	for i := range held {
		held[i] = api.Chunk{ID: string(rune('0'+i/100)) + string(rune('0'+i/10%10)) + string(rune('0'+i%10)), Size: chunk.DefaultSize}
		bad[held[i].ID] = i%20 == 7
	}
	missed, found := 0, 0.0
	for range trials {
		now = epoch
		var tn turn
		r.next(&tn, false, len(held), 1)
		asked, caught := 0, false
		for asked < leaves && !caught {
			now = tn.Next
			ask, n := r.next(&tn, true, len(held), 1)
			if !ask {
				continue
			}
			n = min(n, leaves-asked)
			for range n {
				asked++
				if it := leafAt(held, rng.Int64N(int64(len(held))*chunk.DefaultSize)); bad[it.Chunk] {
					caught = true
					break
				}
			}
			r.after(&tn, n, nil, right(n))
		}
		if !caught {
			missed++
		} else {
			found += now.Sub(epoch).Hours() / 24
		}
	}
	// Binomial: 3000 trials of 0.0099 are 30 ± 5.4. Fewer than by five deviations are one seed in
	// 10^9; as few seeds have more by seven, as so few have a long tail above.
	if got, dev := float64(missed), math.Sqrt(trials*miss*(1-miss)); got < trials*miss-5*dev || got > trials*miss+7*dev {
		t.Errorf("%d of %d liars were missed, %.1f expected", missed, trials, trials*miss)
	}
	t.Logf("%d of %d liars unseen after %d leaves, %.1f expected; the others after %.2f days on average", missed, trials, leaves, trials*miss, found/float64(trials-missed))
}

func TestABadAnswerIsFollowedUpWithinMinutesAndBounded(t *testing.T) {
	now := epoch
	r, _ := simRounds(testenv.Seed(t), &now)
	var tn turn
	r.next(&tn, false, 100, 1)
	now = tn.Next
	_, leaves := r.next(&tn, true, 100, 1)
	day := float64(r.plan.Leaves * leafOnLine)
	var bytes float64
	soon := 0
	for now.Before(epoch.Add(48 * time.Hour)) {
		if leaves > 0 {
			bytes += float64(leaves * leafOnLine)
			r.after(&tn, leaves, nil, api.Audit{Outcome: api.AuditWrong, Leaves: leaves, Bytes: int64(leaves * leafOnLine)})
		}
		if gap := tn.Next.Sub(now); tn.Follow > 0 && leaves > 0 && (gap < time.Minute || gap > 5*time.Minute) {
			t.Fatalf("followed up after %s", gap)
		} else if tn.Follow > 0 && leaves > 0 {
			soon++
		}
		now = tn.Next
		_, leaves = r.next(&tn, true, 100, 2)
		if tn.Credit < -2*day {
			t.Fatalf("credit of %.1f days", tn.Credit/day)
		}
	}
	// Two days, twice as much as usual, and two days' in advance, one to begin with.
	if bytes > 7*day+day || soon < followUps {
		t.Errorf("a liar was asked for %.1f days' bytes in two days, %d follow-ups", bytes/day, soon)
	}
	// So many times in a row, and then as any other.
	tn = turn{Credit: day}
	for range followUps {
		tn.Next = epoch
		if r.after(&tn, 1, nil, api.Audit{Outcome: api.AuditLost}); !tn.Next.After(now) {
			t.Error("it is not followed up")
		}
	}
	tn.Next = epoch
	if r.after(&tn, 1, nil, api.Audit{Outcome: api.AuditLost}); !tn.Next.Equal(epoch) || tn.Follow != 0 {
		t.Errorf("it is followed up %d times", followUps+1)
	}
	// What was not answered comes again as far as two days' bytes in advance go.
	again := turn{Again: make([]wire.AuditItem, 90)}
	if n := r.portion(again, day); n != 90 {
		t.Errorf("of 90 leaves %d are asked for again", n)
	}
	again.Credit = -2 * day
	if n := r.portion(again, day); n != 0 {
		t.Errorf("%d leaves are asked for again, beyond what may be used in advance", n)
	}
	// A right answer ends it.
	tn.Follow = 2
	r.after(&tn, 1, nil, right(1))
	if tn.Follow != 0 {
		t.Error("it is followed up though it was right")
	}
}

// Who is new, or has been caught, is asked twice as much and twice as often; many
// new chunks bring the next time nearer, and never put it off.
func TestNewDoubtedAndGrowingDevicesAreAskedMore(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	r := planned(w)
	if got := r.haste(d.id); got != 2 {
		t.Errorf("a new device is asked %v times as much", got)
	}
	w.advance(newFor + time.Hour)
	if got := r.haste(d.id); got != 1 {
		t.Errorf("after a week %v times as much", got)
	}
	_, err := w.audits.count(testContext(t), api.Audit{ID: "one", Kind: api.StorageAudit, Device: d.id, Outcome: api.AuditWrong})
	must(t, err)
	if got := r.haste(d.id); got != 2 {
		t.Errorf("after a lie %v times as much", got)
	}
	now := epoch
	sim, _ := simRounds(testenv.Seed(t), &now)
	sim.exp = func() float64 { return 1 }
	var tn turn
	sim.next(&tn, false, 99, 1)
	if want := now.Add(usualPlan.Interval / 2); !tn.Next.Equal(want) || tn.Credit != float64(usualPlan.Leaves*leafOnLine) {
		t.Errorf("one that holds something for the first time is asked at %s, for %v bytes", tn.Next, tn.Credit)
	}
	tn.Next = now.Add(usualPlan.Interval)
	if sim.due(tn, true, 132) || !sim.due(tn, true, 133) {
		t.Error("it is not a third more chunks that are many")
	}
	if ask, _ := sim.next(&tn, true, 133, 1); ask || !tn.Next.Equal(now.Add(usualPlan.Interval/2)) || tn.Chunks != 133 {
		t.Errorf("with a third more chunks it is asked at %s", tn.Next)
	}
	tn.Next = now.Add(time.Minute)
	if sim.next(&tn, true, 200, 1); !tn.Next.Equal(now.Add(time.Minute)) {
		t.Errorf("with more chunks the next time was put off to %s", tn.Next)
	}
	// Twice as much in the same time.
	portion := func(haste float64) int {
		v := turn{Next: now, At: now.Add(-8 * time.Hour), Chunks: 99}
		_, n := sim.next(&v, true, 99, haste)
		return n
	}
	if a, b := portion(1), portion(2); a != usualPlan.Leaves/3 || b != 2*a {
		t.Errorf("after a third of a day %d leaves, and %d in haste", a, b)
	}
}

// planned is the rounds of a coordinator that makes none by itself, with the usual plan.
func planned(w *world) *rounds {
	r := newRounds(w.audits, usualPlan, w.log)
	r.turns = w.audits.rounds.turns
	return r
}

func TestAnUnansweredChallengeComesAgainAsItWas(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d, _, chunks := auditScene(t, w)
	r := planned(w)
	asked := make(chan []wire.AuditItem, 1)
	watch := func(answer func(wire.Order) *reply) {
		d.on(wire.KindAudit, func(o wire.Order) *reply {
			b, _ := wire.DecodeBody[wire.Audit](o)
			asked <- b.Items
			return answer(o)
		})
	}
	watch(func(wire.Order) *reply { return failed(wire.CodeInternal) })
	must(t, r.ask(ctx, d.id, 12, nil))
	first := next(t, asked, "the challenge")
	tn, _ := r.turns.get(string(d.id))
	if !slices.Equal(tn.Again, first) {
		t.Fatalf("asked again is %v, was %v", tn.Again, first)
	}
	watch(func(o wire.Order) *reply { return d.prove(o, nil) })
	must(t, r.ask(ctx, d.id, 12, tn.Again))
	if again := next(t, asked, "it again"); !slices.Equal(again, first) {
		t.Errorf("asked for %v, then for %v", first, again)
	}
	if tn, _ := r.turns.get(string(d.id)); len(tn.Again) != 0 {
		t.Error("it comes a third time, though answered")
	}
	// What was taken from the device is not asked for.
	gone := []wire.AuditItem{{Chunk: chunks[0]}, {Chunk: "none"}}
	must(t, r.ask(ctx, d.id, 2, gone))
	if got := next(t, asked, "what is left"); !slices.Equal(got, gone[:1]) {
		t.Errorf("asked for %v", got)
	}
}

func TestOnlyDevicesThatAreThereAreChallenged(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d, away, _ := auditScene(t, w)
	r := planned(w)
	away.leave()
	var asking sync.WaitGroup
	must(t, r.tick(ctx, &asking)) // turns are drawn
	due := func(id wire.DeviceID) {
		_, err := r.turns.change(ctx, string(id), func(tn *turn, _ bool) error {
			tn.Next, tn.At, tn.Chunks, tn.Credit = w.time(), w.time(), 3, 1e6
			return nil
		})
		must(t, err)
	}
	due(d.id)
	due(away.id)
	must(t, r.tick(ctx, &asking))
	asking.Wait()
	list, err := w.op.Audits(ctx, api.AuditQuery{})
	if err != nil || len(list.Audits) != 1 || list.Audits[0].Device != d.id || list.Audits[0].Outcome != api.AuditRight || !list.Audits[0].Routine {
		t.Errorf("%+v %v", list.Audits, err)
	}
	// One that comes back after its turn is not asked at once.
	w.advance(time.Hour)
	d.hello()
	away.connect(w)
	must(t, r.tick(ctx, &asking))
	asking.Wait()
	if again, _ := w.op.Audits(ctx, api.AuditQuery{Device: away.id}); len(again.Audits) != 0 {
		t.Error("a missed turn is made up for, at a time that the device has chosen")
	}
	if s := w.audits.scoreOf(away.id); s.reachability() != 1 {
		t.Error("being away has cost something")
	}
}

// Who takes a turn moves it on: of several coordinators, one asks.
func TestCoordinatorsShareTheTurns(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.device(t)
	var rs []*rounds
	for range 4 {
		turns, err := openTable[turn](ctx, w.audits.rounds.turns.kv, "round", nil)
		must(t, err)
		defer turns.close()
		r := newRounds(w.audits, usualPlan, w.log)
		r.turns = turns
		rs = append(rs, r)
	}
	for range 5 {
		_, err := w.audits.rounds.turns.change(ctx, string(d.id), func(tn *turn, _ bool) error {
			*tn = turn{Next: w.time().Add(-time.Second).UTC(), At: w.time().UTC(), Credit: 1e6, Chunks: 3}
			return nil
		})
		must(t, err)
		for _, r := range rs {
			eventually(t, "each has heard of the turn", func() bool {
				tn, ok := r.turns.get(string(d.id))
				return ok && !tn.Next.After(w.time())
			})
		}
		asks := make(chan bool, len(rs))
		for _, r := range rs {
			go func() {
				ask, _, _, err := r.take(ctx, d.id, 3)
				asks <- ask && err == nil
			}()
		}
		n := 0
		for range rs {
			if <-asks {
				n++
			}
		}
		if n != 1 {
			t.Fatalf("%d of %d coordinators ask", n, len(rs))
		}
	}
}

// A coordinator that dies between record and score finishes what it began; one
// that dies before the record has asked for nothing.
func TestAnInterruptedEndIsFinishedOnce(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d, _, _ := auditScene(t, w)
	held := w.storage.held(d.id)
	row, err := w.audits.begin(ctx, challengeRow{Audit: api.Audit{Kind: api.StorageAudit, Device: d.id, Chunks: []string{held[0].ID}}})
	must(t, err)
	rec := row.Audit
	rec.Outcome, rec.Wrong = api.AuditWrong, rec.Chunks
	rec, err = w.audits.put(ctx, w.audits.home(rec), auditKey(rec), rec)
	must(t, err)
	for range 2 {
		must(t, w.audits.void(ctx, w.now().Add(time.Minute)))
	}
	s := w.audits.scoreOf(d.id)
	if len(s.Penalties) != 1 || s.Penalties[0].Audit != rec.ID {
		t.Errorf("%+v", s.Penalties)
	}
	if got, err := w.audits.find(ctx, rec.ID); err != nil || got.Outcome != api.AuditWrong || got.Penalty == nil {
		t.Errorf("%+v %v", got, err)
	}
	if n := len(w.audits.underWay()); n != 0 {
		t.Errorf("%d are under way", n)
	}
	if now := w.storage.held(d.id); len(now) != len(held)-1 || now[0] == held[0] {
		t.Errorf("of %d chunks, one proved wrong, it still counts as holding %d", len(held), len(now))
	}
}

func TestRoundsEndWithTheCoordinator(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d, _, _ := auditScene(t, w)
	r := newRounds(w.audits, AuditPlan{Leaves: 90, Interval: time.Second}, w.log)
	r.turns = w.audits.rounds.turns
	d.on(wire.KindAudit, silent)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan bool)
	go func() { r.run(ctx); close(ended) }()
	for next(t, d.orders, "a challenge that nobody asked for").Kind != wire.KindAudit {
	}
	cancel()
	next(t, ended, "the end")
	if s := w.audits.scoreOf(d.id); len(s.Penalties) > 0 {
		t.Errorf("a challenge that was cut off has cost %+v", s.Penalties)
	}
}

func TestPlansThatCannotBeKeptAreRefused(t *testing.T) {
	for _, p := range []AuditPlan{{Leaves: -1, Interval: time.Hour}, {Leaves: maxPlanLeaves + 1, Interval: time.Hour}, {Leaves: 1}, {Leaves: 1, Interval: 31 * 24 * time.Hour}} {
		cfg := testConfig(t.TempDir())
		cfg.Audits = p
		if c, err := Start(testContext(t), cfg); err == nil {
			c.Close()
			t.Errorf("%+v is taken", p)
		}
	}
	if err := errors.Join(AuditPlan{}.check(), usualPlan.check()); err != nil {
		t.Error(err)
	}
}
