package coordinator

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// planner is what the coordinator that places tasks has in mind. All of it follows from
// the records: another one makes its own.
type planner struct {
	mu        sync.Mutex
	works     map[string]*work      // jobs that have not ended
	busy      map[wire.DeviceID]int // orders that are followed, or about to be made
	others    map[wire.DeviceID]int // open orders of jobs that are not
	turns     []*reservation        // the oldest first
	owning    int                   // tasks that the coordinator runs itself, or is about to
	proven    map[wire.DeviceID]int // how many jobs at once a device is good for, by what it has done; none: firstJobs
	resting   map[wire.DeviceID]jobRest
	following map[string]bool // orders whose end is awaited
	there     fleet
	looked    time.Time     // at devices
	looking   time.Duration // how long that took: it is done for a tenth of the time at most
	adopted   bool          // what was under way at the start
	kept      time.Time     // house
	listed    time.Time     // lists of open orders, put on the shelf anew

	checking   map[string]bool // tasks that have ended and are looked at once more
	checked    time.Time       // for which ones there are
	checkSoon  bool
	reviewing  bool
	reviewNext time.Time
}

func newPlanner() planner {
	return planner{works: make(map[string]*work), busy: make(map[wire.DeviceID]int), others: make(map[wire.DeviceID]int), proven: make(map[wire.DeviceID]int), resting: make(map[wire.DeviceID]jobRest), following: make(map[string]bool), checking: make(map[string]bool)}
}

// jobRest is how long a device that has failed is left alone: else one that fails at
// once would be given every task.
type jobRest struct {
	until time.Time
	times int
	code  string
}

// work is a job whose tasks are placed.
type work struct {
	row     jobRow
	files   jobFiles
	pending []int32 // tasks that want a device, or one more
	queued  map[int32]bool
	open    map[int32]*openTask // those that were begun
	times   []float64           // seconds that tasks took, from order to result
	waits   *api.JobWait
	shelved time.Time // when its module was put on the shelf anew
}

// openTask is a task that was begun and has not ended.
type openTask struct {
	row      taskRow
	starting int                   // attempts that are about to be made
	owning   bool                  // the coordinator runs it itself
	deciding bool                  // what follows is being kept
	passed   []string              // orders beside which another device is asked
	extra    int                   // devices that may have it beside those that are wanted
	still    map[string]standstill // attempts that stand still, by order
}

// standstill is an attempt that does not go on.
type standstill struct {
	since  time.Time
	silent bool // its device has not said a word, not even that it has the order
}

const (
	devicesFresh   = 100 * time.Millisecond // how long a look at devices counts
	houseEvery     = time.Second
	scanAtOnce     = 256 // tasks of a job that are looked at in vain in one round
	ownsAtOnce     = 16  // tasks that wait for the coordinator's own run of them
	quickTask      = time.Second
	firstJobs      = 4 // at once, of a device of which nothing is known yet
	quickAhead     = 3 // of tasks that are quick, a device gets so many times its slots: it need not wait for the next
	maxAttempts    = 32
	longestRetry   = time.Minute
	longestJobRest = 5 * time.Minute
	mostExtra      = 4   // devices that a task is given beside those that are wanted
	lateShare      = 0.8 // of a job's tasks have ended before one is late
	lateTimes      = 2   // the median
	lateTasks      = 5   // a job has at least, for one to be late
	lateSample     = 64  // of tasks that had ended before a start, for the median
)

// waits is why a job's tasks wait; nil if none does, or if another coordinator knows.
func (p *planner) waits(id string) *api.JobWait {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.works[id]; w != nil && len(w.pending) > 0 {
		return w.waits
	}
	return nil
}

// run places tasks until ctx ends.
func (s *jobs) run(ctx context.Context) {
	var under sync.WaitGroup
	defer under.Wait()
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			s.leader.resign(ctx)
			return
		case <-s.wake:
		case <-t.C:
		}
		t.Reset(s.step(ctx, &under))
	}
}

// lead tells whether this is the coordinator that places.
func (s *jobs) lead(ctx context.Context) bool {
	leads := s.leader.lead(ctx)
	if s.leading.Store(leads); leads {
		return true
	}
	s.plan.mu.Lock()
	defer s.plan.mu.Unlock()
	clear(s.plan.works)
	s.plan.adopted = false
	return false
}

// step does what there is to do, and says when to look again.
func (s *jobs) step(ctx context.Context, under *sync.WaitGroup) time.Duration {
	if !s.lead(ctx) {
		_, next := s.place() // without tasks: what is no task's
		return next
	}
	if err := s.adopt(ctx, under); err != nil {
		if ctx.Err() == nil {
			s.log.Warn("jobs wait for the state store", "error", err)
		}
		return houseEvery
	}
	s.finish(ctx)
	s.keepHouse(ctx)
	s.checks(ctx, under)
	s.reviews(ctx, under)
	todo, next := s.place()
	for _, f := range todo.fails {
		under.Go(func() { s.fail(ctx, f.id, f.task, f.err) })
	}
	for _, st := range todo.starts {
		under.Go(func() { s.start(ctx, st) })
	}
	for _, d := range todo.decided {
		under.Go(func() { s.reconsider(ctx, d.id, d.task, d.edit) })
	}
	for _, o := range todo.owns {
		under.Go(func() { s.runOwn(ctx, o.id, o.task, o.row) })
	}
	return next
}

// adopt takes up jobs that were made since, and after a start all that there are.
func (s *jobs) adopt(ctx context.Context, under *sync.WaitGroup) error {
	p := &s.plan
	var fresh []jobRow
	p.mu.Lock()
	first := !p.adopted
	known := make(map[string]bool, len(p.works))
	for id := range p.works {
		known[id] = true
	}
	p.mu.Unlock()
	s.rows.each(func(id string, v jobRow) bool {
		if !known[id] {
			fresh = append(fresh, v)
		}
		return true
	})
	if len(fresh) == 0 && !first {
		return nil
	}
	begun := make(map[string]map[int32]taskRow)
	s.tasks.each(func(key string, t taskRow) bool {
		id, i := parseTaskKey(key)
		if begun[id] == nil {
			begun[id] = make(map[int32]taskRow)
		}
		begun[id][int32(i)] = t
		return true
	})
	for _, row := range fresh {
		w := &work{row: row, queued: make(map[int32]bool), open: make(map[int32]*openTask), shelved: s.now()}
		if row.Spec.Over != nil {
			var err error
			if w.files, err = s.loadFiles(ctx, row.ID); err != nil {
				return err
			}
		}
		s.mu.Lock()
		over, sample := make(map[int32]bool), []int32(nil)
		for i := range s.progressOf(row.ID).is { // in no order
			if over[i] = true; len(sample) < lateSample {
				sample = append(sample, i)
			}
		}
		s.mu.Unlock()
		w.times = s.took(ctx, row.ID, sample)
		for i := range int32(row.Tasks) {
			if over[i] {
				continue
			}
			if t, ok := begun[row.ID][i]; ok && !t.State.Terminal() {
				w.open[i] = &openTask{row: t, still: make(map[string]standstill)}
			}
			w.queue(i)
		}
		p.mu.Lock()
		p.works[row.ID] = w
		p.mu.Unlock()
	}
	// Whatever is under way is awaited, of tasks that have ended too: what their other
	// devices have made is on record then.
	for id, tasks := range begun {
		if known[id] {
			continue
		}
		for i, t := range tasks {
			for _, a := range t.Attempts {
				if a.Ended.IsZero() && s.claim(a.Order) {
					p.mu.Lock()
					p.busy[a.Device]++
					p.mu.Unlock()
					under.Go(func() { s.follow(ctx, id, int(i), a) })
				}
			}
		}
	}
	p.mu.Lock()
	p.adopted = true
	p.mu.Unlock()
	return nil
}

// took is how long some tasks took that have ended, in seconds.
func (s *jobs) took(ctx context.Context, id string, tasks []int32) (out []float64) {
	for _, i := range tasks {
		t, err := s.tasks.find(ctx, taskKey(id, int(i)))
		if err == nil && t.State == wire.Succeeded {
			a := t.Attempts[t.Stands]
			out = append(out, a.Ended.Sub(a.Began).Seconds())
		}
	}
	return out
}

// claim is true for who follows an order.
func (s *jobs) claim(order string) bool {
	s.plan.mu.Lock()
	defer s.plan.mu.Unlock()
	was := s.plan.following[order]
	s.plan.following[order] = true
	return !was
}

// queue has a task looked at. The planner's lock is held, unless the work is new.
func (w *work) queue(i int32) {
	if !w.queued[i] {
		w.queued[i] = true
		w.pending = append(w.pending, i)
	}
}

// queueFirst has a task that was begun looked at before those that were not, so that results
// come as early as they can.
func (w *work) queueFirst(i int32) {
	if !w.queued[i] {
		w.queued[i] = true
		w.pending = slices.Insert(w.pending, 0, i)
	}
}

// over is told of a task that has ended, which may be queued still: it may have waited for
// one more device.
func (w *work) over(i int32) {
	delete(w.open, i)
	delete(w.queued, i)
}

// begun is a task that is about to be given to a device.
type begun struct {
	id       string
	task     int
	asked    asked
	device   jobDevice
	module   string
	deadline time.Time
	spec     api.JobSpec
}

// refused is a task that no device can do.
type refused struct {
	id   string
	task int
	err  error
}

// settledTask is a task about which something is to be kept, or that the coordinator is to run.
type settledTask struct {
	id   string
	task int
	row  taskRow
	edit func(*taskRow)
}

// todo is what follows from a look at all tasks.
type todo struct {
	starts  []begun
	fails   []refused
	decided []settledTask
	owns    []settledTask
}

// verify has a task's result made sure of; done tells whether nothing is to be waited for
// but that. p.mu is held.
func (s *jobs) verify(w *work, i int32, o *openTask, v ruling, do *todo) (done bool) {
	about := settledTask{id: w.row.ID, task: int(i), row: o.row, edit: func(*taskRow) {}}
	if v.decided() {
		if !o.deciding {
			o.deciding, do.decided = true, append(do.decided, about)
		}
		return true
	}
	if v.own && !o.owning && s.plan.owning < ownsAtOnce {
		s.plan.owning++
		o.owning, do.owns = true, append(do.owns, about)
	}
	return false
}

// place gives devices to tasks: by rank, then by age.
func (s *jobs) place() (do todo, next time.Duration) {
	p, now := &s.plan, s.now()
	next = houseEvery
	p.mu.Lock()
	defer p.mu.Unlock()
	works := make([]*work, 0, len(p.works))
	for _, w := range p.works {
		if len(w.pending) > 0 {
			works = append(works, w)
		}
	}
	if len(works) == 0 && len(p.turns) == 0 {
		return do, next
	}
	slices.SortFunc(works, func(a, b *work) int {
		return cmp.Or(cmp.Compare(b.row.Spec.Rank, a.row.Spec.Rank), cmp.Compare(a.row.ID, b.row.ID))
	})
	s.look()
	room, ahead := p.places()
	next = min(next, p.takeTurns(room, ahead))
	for _, w := range works {
		have := room
		if w.quick() {
			have = ahead
		}
		left := 0
		for _, d := range p.there.all {
			if d.why == nil && d.rests == nil {
				left += max(have[d.id], 0)
			}
		}
		var first, keep []int32 // to be looked at again, before or after all others
		vain := 0
		none := make(map[class]bool) // of whose tasks one was looked at in vain: none has more room by now
		for n := len(w.pending); n > 0 && vain < scanAtOnce && (left > 0 || vain == 0); n-- {
			i := w.pending[0]
			w.pending = w.pending[1:]
			if !w.queued[i] {
				continue
			}
			o := w.open[i]
			if o != nil && o.starting > 0 { // where it goes, its row will say in a moment
				keep, vain = append(keep, i), vain+1
				continue
			}
			v := ruling{more: 1}
			if o != nil {
				v = s.rule(w.row, o.row, func() bool { return s.lone(w, i, o.row) })
				if s.verify(w, i, o, v, &do) {
					delete(w.queued, i)
					continue
				}
			} else if w.row.Spec.Copies > 1 {
				v.more = w.row.Spec.Copies
			}
			wants := func() int {
				if o == nil {
					return v.more
				}
				return v.more + o.extra - o.row.running() - o.starting
			}
			if wants() <= 0 {
				if v.own && !o.owning { // others are first
					keep, vain = append(keep, i), vain+1
				} else {
					delete(w.queued, i)
				}
				continue
			}
			if o != nil && now.Before(o.row.Next) {
				keep, next = append(keep, i), min(next, o.row.Next.Sub(now))
				continue
			}
			a, err := s.resolve(w.row, w.files, int(i))
			if err != nil {
				delete(w.queued, i)
				do.fails = append(do.fails, refused{w.row.ID, int(i), err})
				continue
			}
			kind, fresh := class{a.run.Input, a.orders, a.plain, a.reads, a.spools}, o == nil || len(o.row.Attempts) == 0
			if fresh && none[kind] {
				keep, vain = append(keep, i), vain+1
				continue
			}
			var t taskRow
			strict := false
			if o != nil {
				t, strict = o.row, v.strict && wants() > o.extra
			}
			c, wait := s.choose(a, t, p.there, have, strict)
			if c == nil {
				if vain++; t.running() == 0 {
					w.waits = wait
				}
				if fresh {
					none[kind] = true
				}
				if o != nil && len(first) < scanAtOnce/4 { // a result comes sooner of what was begun
					first = append(first, i)
				} else {
					keep = append(keep, i)
				}
				continue
			}
			d := *c.device
			if o == nil {
				o = &openTask{still: make(map[string]standstill)}
				w.open[i] = o
			}
			o.starting++
			p.busy[d.id]++
			room[d.id]--
			ahead[d.id]--
			left--
			do.starts = append(do.starts, begun{w.row.ID, int(i), a, d, w.row.Spec.Module, w.row.Spec.Deadline, w.row.Spec})
			if wants() > 0 {
				keep = append(keep, i)
			} else {
				delete(w.queued, i)
			}
		}
		w.pending = slices.Concat(first, w.pending, keep)
	}
	return do, next
}

// class is what tells the tasks of a job apart that no device has had, for who could do them.
type class struct {
	input  string
	orders int
	plain  bool
	reads  int64
	spools int64
}

// quick tells whether a job's tasks take a moment only.
func (w *work) quick() bool {
	n := len(w.times)
	return n > 0 && w.times[n-1] < quickTask.Seconds()
}

// start names an order in the task's row, makes it, and follows it to its end.
func (s *jobs) start(ctx context.Context, b begun) {
	a := api.JobAttempt{Order: ulid.Make().String(), Device: b.device.id, Began: s.now().UTC(), State: wire.Queued}
	s.claim(a.Order)
	p, key, made := &s.plan, taskKey(b.id, b.task), false
	drawn := s.newCase(b.spec, a.Device)
	row, err := s.tasks.change(ctx, key, func(t *taskRow, exists bool) error {
		made = false
		if t.State.Terminal() || slices.ContainsFunc(t.Attempts, func(x api.JobAttempt) bool { return x.Device == a.Device && x.Ended.IsZero() }) {
			return errUnchanged
		}
		t.Name, t.Args, t.State, t.Next, made = b.asked.name, b.asked.args, wire.Running, time.Time{}, true
		// What was drawn for a trusted device is not for another that begins anew.
		if t.Case == nil || t.Case.Copies == 1 && !slices.ContainsFunc(t.Attempts, func(x api.JobAttempt) bool { return x.Result != "" }) {
			t.Case = drawn
		}
		t.Attempts = append(t.Attempts, a)
		return nil
	})
	if err != nil && made {
		row, made, err = s.written(ctx, key, a.Order, err)
	}
	p.mu.Lock()
	if w := p.works[b.id]; w != nil {
		if o := w.open[int32(b.task)]; o != nil {
			if o.starting--; err == nil && row.State.Terminal() {
				w.over(int32(b.task))
			} else {
				o.row, _ = s.tasks.get(key) // as it is by now
				w.queueFirst(int32(b.task))
			}
		}
	}
	if !made {
		p.release(a.Order, a.Device)
	}
	p.mu.Unlock()
	s.poke()
	switch {
	case err != nil && ctx.Err() == nil:
		s.log.Warn("a task could not be given to a device; it will be tried again", "job", b.id, "task", b.task, "error", err)
		return
	case err != nil || !made:
		return
	}
	body, life, err := s.orderFor(ctx, a.Order, b.asked, b.device, b.deadline)
	if err == nil {
		_, err = s.compute.sendAs(ctx, key, a.Order, a.Device, b.module, body, life)
	}
	var r *refusal
	if errors.As(err, &r) {
		s.settle(ctx, b.id, b.task, a, OrderRecord{}, err)
		return
	}
	if err != nil { // it may have been made, and the answer been lost
		if ctx.Err() == nil {
			s.log.Warn("whether a task's order was made is not known; it is looked for", "job", b.id, "task", b.task, "order", a.Order, "error", err)
		}
		if rest(ctx, houseEvery) != nil {
			return
		}
	}
	s.follow(ctx, b.id, b.task, a)
}

// written tells whether a change of a task's row that failed with err has named an order in it
// all the same: the answer may have been lost.
func (s *jobs) written(ctx context.Context, key, order string, err error) (row taskRow, made bool, _ error) {
	for rest(ctx, houseEvery) == nil {
		row, lost := s.tasks.find(ctx, key)
		switch {
		case errors.Is(lost, errNotFound):
			return row, false, err
		case lost != nil:
			continue
		case slices.ContainsFunc(row.Attempts, func(x api.JobAttempt) bool { return x.Order == order }):
			return row, true, nil
		}
		return row, false, err
	}
	return row, false, ctx.Err()
}

// release forgets an order that is not followed any more. p.mu is held.
func (p *planner) release(order string, d wire.DeviceID) {
	delete(p.following, order)
	if p.busy[d]--; p.busy[d] <= 0 {
		delete(p.busy, d)
	}
}

// errNeverMade is the end of an attempt that a crash came before.
var errNeverMade = &wire.Problem{State: wire.Canceled, Code: wire.CodeInterrupted, Reason: "the coordinator was stopped before it had made the order"}

// follow waits for the end of an attempt.
func (s *jobs) follow(ctx context.Context, id string, task int, a api.JobAttempt) {
	v, err := s.outbox.await(ctx, wire.Order{ID: a.Order, Device: a.Device}, func(v OrderRecord) {
		s.plan.mu.Lock()
		defer s.plan.mu.Unlock()
		if w := s.plan.works[id]; w != nil {
			if o := w.open[int32(task)]; o != nil {
				o.stand(a.Order, v.Code != "", v.Seq == 0, s.now())
			}
		}
	})
	for ctx.Err() == nil {
		switch {
		case errors.Is(err, errNotFound):
			s.settle(ctx, id, task, a, v, errNeverMade)
			return
		case err == nil:
			s.settle(ctx, id, task, a, v, nil)
			return
		}
		s.log.Warn("what became of a task cannot be read; it will be tried again", "job", id, "task", task, "error", err)
		if rest(ctx, houseEvery) != nil {
			return
		}
		v, err = s.outbox.await(ctx, wire.Order{ID: a.Order, Device: a.Device}, nil)
	}
}

// rest waits, unless ctx ends before.
func rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stand notes whether an attempt stands still: its device says so, or has said nothing yet.
func (o *openTask) stand(order string, still, silent bool, now time.Time) {
	if was, ok := o.still[order]; !still && !silent {
		delete(o.still, order)
	} else if !ok || was.silent != silent {
		o.still[order] = standstill{now, silent}
	}
}
