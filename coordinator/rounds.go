package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// AuditPlan is how much devices are challenged without being asked to be.
type AuditPlan struct {
	Leaves   int           // a day and device, of 4 KiB each; 0: no challenges but an operator's
	Interval time.Duration // mean time between two challenges of a device
	Jobs     bool          // challenges among the jobs of customers; see package trust for how many
}

func (p AuditPlan) check() error {
	switch {
	case p.Leaves == 0:
		return nil
	case p.Leaves < 0 || p.Leaves > maxPlanLeaves:
		return fmt.Errorf("a device cannot be asked for %d leaves a day: it is 1 to %d, or 0 for none", p.Leaves, maxPlanLeaves)
	case p.Interval < minInterval || p.Interval > maxInterval:
		return fmt.Errorf("devices cannot be challenged every %s: it is %s to %s", p.Interval, minInterval, maxInterval)
	}
	return nil
}

const (
	maxPlanLeaves = 100_000
	minInterval   = time.Second
	maxInterval   = 30 * 24 * time.Hour
)

// rounds challenges every device that should hold something, for ever.
//
// # When
//
// The time between two challenges of a device is exponentially distributed: it
// has no memory, so whatever a device has seen, the next challenge is as likely in
// this minute as in any other. For the same reason a challenge that was missed is
// not made up for: a device that was away, or whose coordinator was, gets a new
// time from now on, and a start after a night makes no storm.
//
// # How much
//
// What a device may be asked for is bytes on the line, of order, report and
// leaves. They accrue evenly, [AuditPlan].Leaves a day, up to two days', and a
// challenge asks for what has accrued: few leaves after a short time, many after
// a long one, and the plan on average. Each leaf is drawn anew, every byte that
// the device should hold with the same chance; how long a lie of a share p stays
// unseen is thus counted in leaves, (1-p)^n.
//
// A device in its first week, one with many new chunks, one whose integrity has
// suffered and one that owes an answer have all that twice as often and twice as
// much. A wrong or lost answer is followed up by a whole day's leaves within five
// minutes, up to followUps times in a row and for two days' bytes in advance.
//
// A challenge that was not answered with proof or confession comes again with the
// same leaves: who cannot answer gets no other question. Where a volume is away, which
// the device warns of and repair sees to, every second challenge is about the others.
//
// # Who
//
// A device's turn is a record, and who takes it moves it on by compare-and-set
// before asking. Of several coordinators one wins. If it dies then, the challenge
// is void and the next turn is as good.
type rounds struct {
	plan   AuditPlan
	turns  *table[turn]
	audits *audits
	log    *slog.Logger
	now    func() time.Time
	// exp is exponentially distributed with the mean 1, even evenly from 0 to 1;
	// both are from a generator that cannot be foretold (ChaCha8, seeded by the OS).
	exp, even func() float64
	slots     chan struct{}
}

// turn is when a device is challenged next, and for how much.
type turn struct {
	Next   time.Time        `json:"next"`
	At     time.Time        `json:"at"`     // when Credit was so much
	Credit float64          `json:"credit"` // bytes on the line that may be used; below 0, used in advance
	Chunks int              `json:"chunks"` // that it held when Next was drawn
	Follow int              `json:"follow,omitempty"`
	Again  []wire.AuditItem `json:"again,omitempty"` // of the challenge that it has not answered
}

const (
	roundsTick = time.Second
	// roundsBatch is how many turns are taken in a tick, roundsAtOnce how many
	// challenges are under way; both of one coordinator.
	roundsBatch  = 64
	roundsAtOnce = 32
	// turnGrace is how late a turn may be taken; later, it was missed.
	turnGrace  = 2 * time.Minute
	followUps  = 3
	followSoon = 4 * time.Minute // and a minute
	minPortion = 4               // leaves that are worth an order
	newFor     = 7 * 24 * time.Hour
	doubtBelow = 0.9 // integrity
)

func newRounds(a *audits, plan AuditPlan, log *slog.Logger) *rounds {
	return &rounds{plan: plan, audits: a, log: log, now: a.outbox.now, exp: rand.ExpFloat64, even: rand.Float64, slots: make(chan struct{}, roundsAtOnce)}
}

// run makes challenges until ctx ends.
func (r *rounds) run(ctx context.Context) {
	if r.plan.Leaves == 0 {
		return
	}
	var asking sync.WaitGroup
	defer asking.Wait()
	t := time.NewTicker(roundsTick)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := r.tick(ctx, &asking); err != nil && ctx.Err() == nil {
				r.log.Warn("challenges wait: the turns of devices cannot be written", "error", err)
			}
		}
	}
}

// tick takes the turns that are due, as many as there are places.
func (r *rounds) tick(ctx context.Context, asking *sync.WaitGroup) error {
	taken := 0
	for d, chunks := range r.audits.storage.holders() {
		if taken == roundsBatch || ctx.Err() != nil {
			return nil
		}
		t, ok := r.turns.get(string(d))
		if !r.due(t, ok, chunks) || !r.audits.storage.reg.member(d) || !r.audits.storage.reg.online(d) {
			continue
		}
		select {
		case r.slots <- struct{}{}:
		default:
			return nil
		}
		taken++
		ask, leaves, again, err := r.take(ctx, d, chunks)
		if err != nil || !ask {
			<-r.slots
			if err != nil {
				return err
			}
			continue
		}
		asking.Go(func() {
			defer func() { <-r.slots }()
			if err := r.ask(ctx, d, leaves, again); err != nil && ctx.Err() == nil {
				r.log.Warn("a challenge did not come to its end", "device", d, "error", err)
			}
		})
	}
	return nil
}

// due tells whether there is something to do about a turn. A third more chunks are
// many new ones.
func (r *rounds) due(t turn, ok bool, chunks int) bool {
	return !ok || !t.Next.After(r.now()) || chunks > t.Chunks+t.Chunks/3
}

// take moves a device's turn on, and says whether it is to be asked now, and for
// what. What is asked for is taken off its credit at once.
func (r *rounds) take(ctx context.Context, d wire.DeviceID, chunks int) (ask bool, leaves int, again []wire.AuditItem, err error) {
	haste := r.haste(d)
	_, err = r.turns.change(ctx, string(d), func(t *turn, exists bool) error {
		if ask = false; !r.due(*t, exists, chunks) {
			return errUnchanged // another coordinator was first
		}
		ask, leaves = r.next(t, exists, chunks, haste)
		again = t.Again
		return nil
	})
	return ask, leaves, again, err
}

// next makes a turn the one after it.
func (r *rounds) next(t *turn, exists bool, chunks int, haste float64) (ask bool, leaves int) {
	now := r.now()
	if len(t.Again) > 0 {
		haste = 2
	}
	gap := func(haste float64) time.Time {
		return now.Add(time.Duration(r.exp() * float64(r.plan.Interval) / haste)).UTC()
	}
	day := float64(r.plan.Leaves * leafOnLine)
	switch {
	case !exists: // all that it holds is new
		*t = turn{Next: gap(2), At: now.UTC(), Credit: day, Chunks: chunks}
		return false, 0
	case t.Next.After(now): // many new chunks
		t.Chunks = chunks
		if soon := gap(2); soon.Before(t.Next) {
			t.Next = soon
		}
		return false, 0
	}
	late := now.Sub(t.Next) > turnGrace
	t.Credit = min(t.Credit+haste*day*max(now.Sub(t.At).Hours(), 0)/24, 2*day)
	t.Next, t.At, t.Chunks = gap(haste), now.UTC(), chunks
	if late {
		return false, 0
	}
	leaves = r.portion(*t, day)
	t.Credit -= float64(leaves * leafOnLine)
	return leaves > 0, leaves
}

// portion is how many leaves a turn is worth.
func (r *rounds) portion(t turn, day float64) int {
	spent := func(leaves int) float64 { return t.Credit - float64(leaves*leafOnLine) }
	switch {
	case len(t.Again) > 0:
		if spent(len(t.Again)) < -2*day {
			return 0
		}
		return len(t.Again)
	case t.Follow > 0:
		if n := min(r.plan.Leaves, maxLeaves); spent(n) >= -2*day {
			return n
		}
		return 0
	}
	n := min(int(t.Credit/leafOnLine), maxLeaves)
	if n < min(minPortion, r.plan.Leaves) {
		return 0
	}
	return n
}

// haste is how much more often than others a device is asked.
func (r *rounds) haste(d wire.DeviceID) float64 {
	rec, ok := r.audits.storage.reg.rows.get(string(d))
	if ok && r.now().Sub(rec.Enrolled) < newFor || r.audits.scoreOf(d).integrity() < doubtBelow {
		return 2
	}
	return 1
}

// ask challenges a device, and notes what that means for its turns.
func (r *rounds) ask(ctx context.Context, d wire.DeviceID, leaves int, again []wire.AuditItem) error {
	ctx, cancel := context.WithTimeout(ctx, r.audits.limit)
	defer cancel()
	held := r.audits.storage.held(d)
	// A device refuses a challenge as a whole if it asks for what is on a volume that
	// is away. So only every second one does, for the refusals to count.
	var aside []wire.AuditItem
	if away := r.audits.storage.volumesAway(d); len(away) > 0 && r.even() < 0.5 {
		there := func(id string) bool { return !slices.Contains(away, r.audits.storage.volumeOf(d, id)) }
		held = slices.DeleteFunc(held, func(c api.Chunk) bool { return !there(c.ID) })
		aside = slices.DeleteFunc(slices.Clone(again), func(it wire.AuditItem) bool { return there(it.Chunk) })
	}
	items := slices.DeleteFunc(slices.Clone(again), func(it wire.AuditItem) bool {
		_, there := slices.BinarySearchFunc(held, it.Chunk, func(c api.Chunk, id string) int { return cmp.Compare(c.ID, id) })
		return !there
	})
	if len(held) == 0 {
		return nil
	}
	if len(items) == 0 {
		var err error
		if items, err = draw(held, leaves); err != nil {
			return err
		}
	}
	rec, err := r.audits.challenge(ctx, held, items, api.Audit{Device: d, Routine: true})
	if rec.Outcome == api.AuditPending || rec.Outcome == "" {
		return err // cut off; the sweep sees to it
	}
	return errors.Join(err, r.note(context.WithoutCancel(ctx), d, leaves, items, aside, rec))
}

// note takes the end of a challenge into its device's turn.
func (r *rounds) note(ctx context.Context, d wire.DeviceID, leaves int, items, aside []wire.AuditItem, rec api.Audit) error {
	_, err := r.turns.change(ctx, string(d), func(t *turn, _ bool) error {
		r.after(t, leaves, items, rec)
		t.Again = append(t.Again, aside...)
		return nil
	})
	return err
}

func (r *rounds) after(t *turn, leaves int, items []wire.AuditItem, rec api.Audit) {
	used := rec.Bytes
	if used == 0 { // there was no answer: the order alone
		used = int64(len(items) * itemOnLine)
	}
	t.Credit += float64(leaves*leafOnLine) - float64(used)
	switch rec.Outcome {
	case api.AuditRefused, api.AuditUnreachable:
		t.Again = items
	case api.AuditWrong, api.AuditLost:
		t.Again = nil
		if t.Follow < followUps {
			t.Follow++
			t.Next = r.now().Add(time.Minute + time.Duration(r.even()*float64(followSoon))).UTC()
			return
		}
		t.Follow = 0
	case api.AuditRight:
		t.Again, t.Follow = nil, 0
	}
}

// itemOnLine is what an item has in a signed order, in bytes.
const itemOnLine = (len(`{"chunk":"","leaf":1023},`) + 2*len(chunk.ID{})) * 4 / 3

// holders counts the chunks of each device that should hold any.
func (s *storage) holders() map[wire.DeviceID]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[wire.DeviceID]int, len(s.holds))
	for d, chunks := range s.holds {
		if len(chunks) > 0 {
			out[d] = len(chunks)
		}
	}
	return out
}
