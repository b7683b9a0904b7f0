package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// RepairPlan is how what devices lose is made anew elsewhere.
type RepairPlan struct {
	AtOnce int           // stripes that one coordinator repairs at a time; 0: nothing is repaired
	Rate   int64         // bytes a second that it reads from devices and sends to them
	Grace  time.Duration // how long a device, or a volume of one, may be away

	spare time.Duration // how long a copy more than wanted is kept; 0: [spareKept]
	every time.Duration // between two looks at devices; 0: [repairTick]
	limit time.Duration // for one piece of work; 0: [mendLimit]
}

// DefaultRepair bears a night without a device, and leaves room on a line of 1 Gbit/s.
var DefaultRepair = RepairPlan{AtOnce: 4, Rate: 32 << 20, Grace: 24 * time.Hour}

const (
	maxRepairs     = 64
	minRepairRate  = 64 << 10
	minRepairGrace = time.Minute
)

func (p RepairPlan) check() error {
	switch {
	case p.AtOnce == 0:
		return nil
	case p.AtOnce < 0 || p.AtOnce > maxRepairs:
		return fmt.Errorf("%d stripes cannot be repaired at once: it is 1 to %d, or 0 for no repair", p.AtOnce, maxRepairs)
	case p.Rate < minRepairRate:
		return fmt.Errorf("repair cannot go on with %d bytes a second: it is %d at least", p.Rate, minRepairRate)
	case p.Grace < minRepairGrace:
		return fmt.Errorf("what a device holds cannot be made anew when it is away for %s: it is %s at least", p.Grace, minRepairGrace)
	}
	return nil
}

// repairs keeps every object as redundant as it was stored.
//
// # What is endangered
//
// A stripe of a coded object is whole if each of its shards has a good holder of its
// own; a chunk of a plain object, if it has as many good holders as were wanted.
// A holder is not good if it has lost the chunk (confessed, or shown by a
// challenge), or if its device is retired, distrusted ([audits.distrusted]), being
// drained, or away for longer than [RepairPlan].Grace, or the chunk's volume is.
//
// That is found from the copies of records in memory. A change of a record puts the
// chunk on a list, a change of a device what it holds, and the list is looked
// through once a tick; all objects are looked at when a coordinator starts, and
// once in lookEvery in case something was missed.
//
// # What is done
//
// The least that can still be lost goes first, and of equals what is known for
// longest. A missing shard is copied, if any device can serve it, whatever is
// thought of that device: bytes are checked against their id. Else it is made of
// Data others, and placed only if its id is right. Reads and writes are paced, and
// AtOnce stripes are under way. Who fails to serve what it should hold is challenged
// for it, so that what it answers is signed and counts.
//
// What cannot be done now, for want of devices or of shards that can be read, is
// not begun, said to be so, and tried again after a pause that doubles up to
// maxPause, or when a device comes. To try costs nothing but a look in memory.
//
// # What survives
//
// Queue and pauses are in memory: they follow from the records. What has been
// ordered is in the outbox; a receipt that comes after a restart counts
// ([storage.resume]), and the stripe is looked at anew.
//
// Of several coordinators, one works at a stripe: it takes a lease, a record with an
// end, by compare-and-set. It gives up its work before the lease ends.
//
// # What is superfluous
//
// A device may come back with what was made anew meanwhile. After spareKept, the copy
// on the device that would be chosen last for a new one is dropped: only when a copy
// with a receipt that stays has been read and verified, under the lock of the
// chunk's placement. The order to drop stands in the lease from before the
// holder is taken off the record until the outbox has it, so that after a crash it
// is sent, or, if the device has been given the chunk again, not.
type repairs struct {
	plan    RepairPlan
	storage *storage
	audits  *audits
	reg     *registry
	outbox  *outbox
	drains  *drains
	leases  *table[lease]
	away    *table[absence]
	now     func() time.Time
	log     *slog.Logger
	self    string // of this coordinator's leases
	alone   bool   // nobody else can have one: those of an earlier life are over
	started time.Time
	settled time.Duration // after the start, until who is not there counts as away
	pace    pacer

	// touching guards the two below alone: it is taken while the table of chunks is
	// locked, which is never waited for under it.
	touching sync.Mutex
	all      bool            // everything is to be looked at
	dirty    map[string]bool // chunks to look at

	looked time.Time    // at everything; of tick alone
	ticks  atomic.Int64 // how often devices and chunks have been looked at

	mu      sync.Mutex
	conds   map[wire.DeviceID]condition
	tasks   map[string]*task // by unit
	working int
	came    time.Time // when a device came last
	sum     api.RepairSummary
	asked   map[wire.DeviceID]time.Time // when who did not serve was challenged
}

const (
	repairTick = time.Second
	lookEvery  = time.Hour
	spareKept  = time.Hour
	leaseLife  = 10 * time.Minute
	mendLimit  = 8 * time.Minute // less than the lease, by more than clocks differ; both and paceOf
	firstPause = 15 * time.Second
	maxPause   = 10 * time.Minute
	// comePause is the least time between two tries because a device has come.
	comePause    = 5 * time.Second
	suspectPause = time.Minute
)

// lease says who works at a unit, or at a drain.
type lease struct {
	By    string    `json:"by"`
	Until time.Time `json:"until"`
	Drop  *dropping `json:"drop,omitempty"`
}

// dropping is an order to drop that is about to be made.
type dropping struct {
	Device wire.DeviceID `json:"device"`
	Order  string        `json:"order"`
	IDs    []string      `json:"ids"`
}

// absence is since when a device, or a volume of one, is away. Its key is the
// device, or device and volume.
type absence struct {
	Since time.Time `json:"since"`
}

// condition is what speaks against what a device holds.
type condition struct {
	why     weakness
	volumes string // that are away, each between two newlines
}

// weakness is why a holder is not good; empty: it is.
type weakness string

const (
	retired    weakness = "retired"
	leaving    weakness = "drained"
	distrusted weakness = "distrusted"
	absent     weakness = "away"
)

func newRepairs(s *storage, a *audits, plan RepairPlan, settled time.Duration, log *slog.Logger) *repairs {
	r := &repairs{plan: plan, storage: s, audits: a, reg: s.reg, outbox: s.outbox, now: s.outbox.now, log: log, self: ulid.Make().String(),
		settled: settled, all: true, dirty: make(map[string]bool), conds: make(map[wire.DeviceID]condition), tasks: make(map[string]*task), asked: make(map[wire.DeviceID]time.Time)}
	r.started = r.now()
	r.plan.spare, r.plan.every, r.plan.limit = cmp.Or(plan.spare, spareKept), cmp.Or(plan.every, repairTick), cmp.Or(plan.limit, mendLimit)
	r.plan.Grace = cmp.Or(plan.Grace, DefaultRepair.Grace)
	r.pace.rate, r.sum.Since = plan.Rate, r.started.UTC()
	return r
}

// open opens the buckets.
func (r *repairs) open(ctx context.Context, c *Coordinator) error {
	if err := bucket(ctx, c, "leases", &r.leases, nil); err != nil {
		return err
	}
	if err := bucket(ctx, c, "absences", &r.away, nil); err != nil {
		return err
	}
	return bucket(ctx, c, "drains", &r.drains.rows, nil)
}

// touch has a chunk looked at soon.
func (r *repairs) touch(ids ...string) {
	r.touching.Lock()
	defer r.touching.Unlock()
	for _, id := range ids {
		if !r.all {
			r.dirty[id] = true
		}
	}
}

// arrived is told of every hello: what could not be done may be possible now.
func (r *repairs) arrived() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.came = r.now()
}

// run repairs until ctx ends. With repair switched off it only looks, and tells.
func (r *repairs) run(ctx context.Context) {
	// Devices cannot be served any more when the coordinator begins to stop: what
	// fails then is no device's fault.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.storage.life, cancel)()
	var mending sync.WaitGroup
	defer r.drains.stepped.Wait()
	defer mending.Wait()
	t := time.NewTicker(r.plan.every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := r.tick(ctx, &mending); err != nil && ctx.Err() == nil {
				r.log.Warn("repair waits for the state store", "error", err)
			}
		}
	}
}

func (r *repairs) tick(ctx context.Context, mending *sync.WaitGroup) error {
	if err := r.noteAbsences(ctx); err != nil {
		return err
	}
	r.lookAtDevices()
	r.lookAtChunks()
	if r.plan.AtOnce == 0 {
		return nil
	}
	if err := r.endLeases(ctx); err != nil {
		return err
	}
	r.begin(ctx, mending)
	r.ticks.Add(1)
	return r.drains.tick(ctx)
}

// noteAbsences keeps since when devices and volumes are away: a coordinator that
// starts must not begin to count anew.
func (r *repairs) noteAbsences(ctx context.Context) error {
	now := r.now().UTC()
	gone := make(map[string]time.Time)
	for d := range r.storage.holders() {
		if !r.reg.member(d) {
			continue
		}
		if r.reg.online(d) {
			for _, v := range r.storage.volumesAway(d) {
				gone[string(d)+"."+v] = now
			}
			continue
		}
		if since := r.reg.lastSeen(d); !since.IsZero() {
			gone[string(d)] = since.UTC()
		} else if now.Sub(r.started) > r.settled {
			gone[string(d)] = now
		} else if row, ok := r.away.get(string(d)); ok { // it may be about to come
			gone[string(d)] = row.Since
		}
	}
	for key, since := range gone {
		if _, ok := r.away.get(key); ok {
			continue
		}
		if err := r.away.create(ctx, key, absence{since}); err != nil && !errors.Is(err, errExists) {
			return err
		}
	}
	var back []string
	r.away.each(func(key string, _ absence) bool {
		if _, ok := gone[key]; !ok {
			back = append(back, key)
		}
		return true
	})
	for _, key := range back {
		if err := r.away.remove(ctx, key, func(absence) bool { return true }); err != nil && !errors.Is(err, errNotFound) {
			return err
		}
	}
	return nil
}

// isVolume tells whether a device's name for a volume can be part of a key.
func isVolume(s string) bool {
	if s == "" || len(s) > maxLabel {
		return false
	}
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// conditionOf is what speaks against a device now.
func (r *repairs) conditionOf(d wire.DeviceID) (c condition) {
	over := func(key string) bool {
		row, ok := r.away.get(key)
		return ok && r.now().Sub(row.Since) > r.plan.Grace
	}
	switch {
	case !r.reg.member(d):
		c.why = retired
	case r.drains.leaving(d):
		c.why = leaving
	case r.audits.distrusted(d):
		c.why = distrusted
	case over(string(d)):
		c.why = absent
	case r.reg.online(d):
		for _, v := range r.storage.volumesAway(d) {
			if over(string(d) + "." + v) {
				c.volumes += "\n" + v + "\n"
			}
		}
	}
	return c
}

// lookAtDevices finds what has changed about devices, and what they hold is looked at.
func (r *repairs) lookAtDevices() {
	held := r.storage.holders()
	for d := range held {
		is := r.conditionOf(d)
		r.mu.Lock()
		was, known := r.conds[d]
		r.conds[d] = is
		r.mu.Unlock()
		if was != is || !known && is != (condition{}) {
			for _, c := range r.storage.held(d) {
				r.touch(c.ID)
			}
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for d := range r.conds {
		if _, ok := held[d]; !ok {
			delete(r.conds, d)
		}
	}
}

// lookAtChunks looks at what was touched.
func (r *repairs) lookAtChunks() {
	r.touching.Lock()
	all := r.all || r.now().Sub(r.looked) > lookEvery
	ids := r.dirty
	r.dirty, r.all = make(map[string]bool), false
	r.touching.Unlock()
	if all {
		r.looked = r.now()
		clear(ids)
		r.storage.chunks.each(func(id string, _ chunkRecord) bool {
			ids[id] = true
			return true
		})
	}
	current := make(map[string]bool)
	for _, u := range r.units(ids) {
		current[u.key] = true
		r.consider(u)
	}
	if len(ids) == 0 && !all {
		return
	}
	// What was removed is no task any more.
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, t := range r.tasks {
		looked := all || slices.ContainsFunc(t.chunks, func(c api.Chunk) bool { return ids[c.ID] })
		if looked && !current[key] && !t.working {
			delete(r.tasks, key)
		}
	}
}

// task is a unit that is to be worked at.
type task struct {
	unit
	state   look
	since   time.Time
	working bool
	tries   int
	tried   time.Time
	next    time.Time
	problem string
}

// consider puts a unit on the queue, or takes it off.
func (r *repairs) consider(u unit) {
	l := r.look(u)
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.tasks[u.key]
	switch {
	case l.whole() && len(l.extra) == 0:
		if t != nil && !t.working {
			delete(r.tasks, u.key)
		}
		return
	case t == nil:
		t = &task{since: r.now()}
		r.tasks[u.key] = t
	}
	if l.whole() && !t.state.whole() {
		t.tries, t.problem, t.next = 0, "", time.Time{} // what follows is another matter
	}
	t.unit, t.state = u, l
	if l.whole() {
		t.next = latest(t.next, l.extraAt)
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// begin takes the most endangered units that are due, as many as there are places.
func (r *repairs) begin(ctx context.Context, mending *sync.WaitGroup) {
	for _, a := range r.due() {
		mending.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, r.plan.limit+r.paceOf(a.unit))
			defer cancel()
			r.end(a.task, r.work(ctx, a.unit))
		})
	}
}

// assignment is a task that is begun, with its unit as it was then: the task's may be
// looked at anew meanwhile.
type assignment struct {
	task *task
	unit unit
}

// due takes units for which there are places.
func (r *repairs) due() (out []assignment) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	if r.working == r.plan.AtOnce {
		return nil
	}
	var ready []*task
	for _, t := range r.tasks {
		again := t.problem != "" && r.came.After(t.tried) && now.Sub(t.tried) > comePause
		if !t.working && (again || !t.next.After(now)) {
			ready = append(ready, t)
		}
	}
	if len(ready) == 0 {
		return nil
	}
	slices.SortFunc(ready, func(a, b *task) int { return a.compare(b) })
	room := r.storage.withRoom()
	for _, t := range ready {
		if r.working == r.plan.AtOnce {
			break
		}
		// It is only looked in memory whether it can be done: what cannot does not
		// take the place of what can.
		if problem := r.hindrance(t.unit, t.state, room); problem != "" {
			t.wait(now, problem)
			continue
		}
		t.working = true
		r.working++
		out = append(out, assignment{t, t.unit})
	}
	return out
}

// compare puts the most endangered first.
func (t *task) compare(o *task) int {
	return cmp.Or(cmp.Compare(t.rank(), o.rank()), t.since.Compare(o.since), t.created.Compare(o.created), cmp.Compare(t.key, o.key))
}

// rank: what is whole, and only has a copy too many, comes last.
func (t *task) rank() int {
	if t.state.whole() {
		return 1 << 20
	}
	return t.state.spare
}

func (t *task) wait(now time.Time, problem string) {
	t.tried, t.problem = now, problem
	t.next = now.Add(min(firstPause<<min(t.tries, 10), maxPause))
	t.tries++
}

// errTaken says that another coordinator works at it.
var errTaken = errors.New("another coordinator works at it")

// end takes a unit back, and looks how it is.
func (r *repairs) end(t *task, err error) {
	r.mu.Lock()
	t.working = false
	r.working--
	switch {
	case errors.Is(err, errTaken):
		t.next = r.now().Add(firstPause)
	case err != nil:
		t.wait(r.now(), cutText(errText(err), maxLoggedText))
		r.log.Warn("a stripe could not be repaired; it will be tried again", "object", t.name, "stripe", t.index, "next", t.next, "error", err)
	default:
		t.tries, t.problem, t.next = 0, "", time.Time{}
	}
	u := t.unit
	r.mu.Unlock()
	ids := make(map[string]bool)
	for _, c := range u.chunks {
		ids[c.ID] = true
	}
	now := r.units(ids)
	for _, u := range now {
		r.consider(u)
	}
	if !slices.ContainsFunc(now, func(v unit) bool { return v.key == u.key }) { // it was removed
		r.mu.Lock()
		delete(r.tasks, u.key)
		r.mu.Unlock()
	}
}

func errText(err error) string {
	if p := wire.ProblemOf(err); p != nil && p.Reason != "" {
		return p.Reason
	}
	return err.Error()
}

// paceOf is how long a unit may have to wait for its turns to move bytes: at a low rate
// longer than anything else takes.
func (r *repairs) paceOf(u unit) time.Duration {
	if r.plan.Rate <= 0 {
		return 0
	}
	var all int64 // that are read and written, at most
	for _, c := range u.chunks {
		all += 2 * c.Size
	}
	return time.Duration(float64(all) * float64(r.plan.AtOnce) / float64(r.plan.Rate) * float64(time.Second))
}

// lease takes a unit or a drain for this coordinator.
func (r *repairs) lease(ctx context.Context, key string) error {
	return r.leaseFor(ctx, key, leaseLife)
}

func (r *repairs) leaseFor(ctx context.Context, key string, life time.Duration) error {
	_, err := r.leases.change(ctx, key, func(l *lease, exists bool) error {
		if exists && (l.Drop != nil || l.By != r.self && l.Until.After(r.now())) {
			return errTaken
		}
		*l = lease{By: r.self, Until: r.now().Add(life).UTC()}
		return nil
	})
	return err
}

// unlease gives it back. A lease with an order that was not made yet stays, for
// endLeases.
func (r *repairs) unlease(ctx context.Context, key string) {
	err := r.leases.remove(context.WithoutCancel(ctx), key, func(l lease) bool { return l.By == r.self && l.Drop == nil })
	if err != nil && !errors.Is(err, errNotFound) {
		r.log.Warn("what was worked at is left alone until the lease of it ends", "lease", key, "error", err)
	}
}

// endLeases sees to what crashes left: leases that have ended, and orders to drop
// that were about to be made.
func (r *repairs) endLeases(ctx context.Context) error {
	var over []string
	r.leases.each(func(key string, l lease) bool {
		if !l.Until.After(r.now()) || r.alone && l.By != r.self {
			over = append(over, key)
		}
		return true
	})
	for _, key := range over {
		l, ok := r.leases.get(key)
		if !ok {
			continue
		}
		if l.Drop != nil {
			// Until the order is in the outbox, the lease keeps the chunk from being
			// placed there (see intended).
			if err := r.sendDrop(ctx, *l.Drop); err != nil {
				return err
			}
		}
		err := r.leases.remove(ctx, key, func(v lease) bool { return v.By == l.By && v.Until.Equal(l.Until) })
		if err != nil && !errors.Is(err, errNotFound) {
			return err
		}
	}
	return nil
}

// status is what operators see.
func (r *repairs) status() api.Repair {
	v := api.Repair{RepairSummary: r.summary(), Queue: []api.Endangered{}, Drains: r.drains.list(), AtOnce: r.plan.AtOnce, Rate: r.plan.Rate, Grace: r.plan.Grace.Seconds()}
	for _, t := range r.endangered() {
		if len(v.Queue) == api.MaxEndangered {
			break
		}
		v.Queue = append(v.Queue, api.Endangered{Object: t.name, Stripe: t.index, Spare: t.state.spare, Missing: len(t.state.missing), Since: t.since.UTC(),
			Working: t.working, Lost: t.state.lost, Problem: t.problem, Next: t.next})
	}
	return v
}

// endangered is a copy of the tasks that are not whole, in their order.
func (r *repairs) endangered() (out []task) {
	r.mu.Lock()
	for _, t := range r.tasks {
		if !t.state.whole() {
			out = append(out, *t)
		}
	}
	r.mu.Unlock()
	slices.SortFunc(out, func(a, b task) int { return a.compare(&b) })
	return out
}

func (r *repairs) summary() api.RepairSummary {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sum
	for _, t := range r.tasks {
		switch {
		case t.state.whole():
			continue
		case t.working:
			s.Working++
		case t.state.lost:
			s.Lost++
		case t.problem != "":
			s.Waiting++
		}
		s.Endangered++
	}
	return s
}

// attention is what somebody should look at: objects that cannot be repaired now.
func (r *repairs) attention() (see []api.Attention) {
	type held struct {
		lost, waiting int
		problem       string
	}
	by := make(map[string]*held)
	for _, t := range r.endangered() {
		if r.plan.AtOnce == 0 {
			t.problem = "repair is switched off (--repair-at-once 0)"
		}
		if t.problem == "" && !t.state.lost {
			continue
		}
		h := by[t.name]
		if h == nil {
			h = &held{}
			by[t.name] = h
		}
		if t.state.lost {
			h.lost++
			continue
		}
		h.waiting++
		h.problem = cmp.Or(h.problem, t.problem)
	}
	for name, h := range by {
		about, what := "object:"+name, "of its stripes"
		if name == "" {
			about, what = "uploads", "chunks that no object has yet"
		}
		if h.lost > 0 {
			see = append(see, api.Attention{Code: api.AttentionLost, About: about, Text: fmt.Sprintf("too little is left of %d %s on any device: they are lost, unless a device brings them back; \"deimos repair\" shows them", h.lost, what)})
		}
		if h.waiting > 0 {
			see = append(see, api.Attention{Code: api.AttentionRepair, About: about, Text: fmt.Sprintf("%d %s wait to be repaired: %s", h.waiting, what, cutText(h.problem, 200))})
		}
	}
	for _, d := range r.drains.list() {
		if d.Problem != "" && d.State != api.DrainDone {
			see = append(see, aboutDevice(d.Device, api.AttentionDrain, "its drain waits: "+cutText(d.Problem, 200)))
		}
	}
	return see
}

// pacer spreads bytes evenly over time.
type pacer struct {
	rate int64 // a second

	mu   sync.Mutex
	free time.Time // when the next may begin
}

// wait returns when n bytes may be moved.
func (p *pacer) wait(ctx context.Context, n int64) error {
	p.mu.Lock()
	now := time.Now()
	at := latest(now, p.free)
	p.free = at.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	p.mu.Unlock()
	t := time.NewTimer(at.Sub(now))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *Coordinator) repairRoutes() []route {
	drain := func(handle func(ctx context.Context, d wire.DeviceID) (any, error)) handler {
		return func(w http.ResponseWriter, r *http.Request) error {
			v, err := handle(r.Context(), wire.DeviceID(r.PathValue("id")))
			if err == nil {
				writeJSON(w, http.StatusOK, v)
			}
			return err
		}
	}
	return []route{
		{method: "GET", path: v1 + "/repair", needs: toRead, summary: "What is endangered, and what is done about it", out: api.Repair{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, c.repairs.status())
			return nil
		}},
		{method: "POST", path: v1 + "/devices/{id}/drain", needs: toOperate, summary: "Empty a device: what it holds goes elsewhere", out: api.Drain{},
			handle: drain(func(ctx context.Context, d wire.DeviceID) (any, error) { return c.repairs.drains.begin(ctx, d) })},
		{method: "GET", path: v1 + "/devices/{id}/drain", needs: toRead, summary: "How far a drain is", out: api.Drain{},
			handle: drain(func(_ context.Context, d wire.DeviceID) (any, error) { return c.repairs.drains.show(d) })},
		{method: "GET", path: v1 + "/devices/{id}/drain/receipt", needs: toRead, summary: "What was signed at the end of a drain", out: api.Evidence{},
			handle: drain(func(_ context.Context, d wire.DeviceID) (any, error) { return c.repairs.drains.receipt(d) })},
		{method: "DELETE", path: v1 + "/devices/{id}/drain", needs: toOperate, summary: "Use a device as before it was drained", handle: func(w http.ResponseWriter, r *http.Request) error {
			err := c.repairs.drains.cancel(r.Context(), wire.DeviceID(r.PathValue("id")))
			if err == nil {
				w.WriteHeader(http.StatusNoContent)
			}
			return err
		}},
	}
}
