package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
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
	works     map[string]*work // jobs that have not ended
	busy      map[wire.DeviceID]int
	resting   map[wire.DeviceID]jobRest
	following map[string]bool // orders whose end is awaited
	there     []jobDevice
	looked    time.Time // at devices
	kept      time.Time // house

	checking   map[string]bool // tasks that have ended and are looked at once more
	checked    time.Time       // for which ones there are
	checkSoon  bool
	reviewing  bool
	reviewNext time.Time
}

func newPlanner() planner {
	return planner{works: make(map[string]*work), busy: make(map[wire.DeviceID]int), resting: make(map[wire.DeviceID]jobRest), following: make(map[string]bool), checking: make(map[string]bool)}
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
	starting int                  // attempts that are about to be made
	owning   bool                 // the coordinator runs it itself
	deciding bool                 // what follows is being kept
	extra    int                  // devices that may have it beside those that are wanted
	still    map[string]time.Time // since when an attempt stands still, by order
}

const (
	devicesFresh   = 100 * time.Millisecond // how long a look at devices counts
	houseEvery     = time.Second
	scanAtOnce     = 256 // tasks of a job that are looked at in vain in one round
	quickTask      = time.Second
	quickAhead     = 3 // of tasks that are quick, a device gets so many times its slots: it need not wait for the next
	maxAttempts    = 32
	longestRetry   = time.Minute
	longestJobRest = 5 * time.Minute
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
	if s.leader.lead(ctx) {
		return true
	}
	s.plan.mu.Lock()
	defer s.plan.mu.Unlock()
	clear(s.plan.works)
	return false
}

// step does what there is to do, and says when to look again.
func (s *jobs) step(ctx context.Context, under *sync.WaitGroup) time.Duration {
	if !s.lead(ctx) {
		return houseEvery
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
	first := p.looked.IsZero()
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
				w.open[i] = &openTask{row: t, still: make(map[string]time.Time)}
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
	if v.own && !o.owning {
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
	if len(works) == 0 {
		return do, next
	}
	slices.SortFunc(works, func(a, b *work) int {
		return cmp.Or(cmp.Compare(b.row.Spec.Rank, a.row.Spec.Rank), cmp.Compare(a.row.ID, b.row.ID))
	})
	s.look()
	room, ahead := make(map[wire.DeviceID]int), make(map[wire.DeviceID]int)
	for _, d := range p.there {
		room[d.id], ahead[d.id] = d.slots-p.busy[d.id], quickAhead*d.slots-p.busy[d.id]
	}
	for _, w := range works {
		have := room
		if w.quick() {
			have = ahead
		}
		left := 0
		for _, d := range p.there {
			if d.why == nil && d.rests == nil {
				left += max(have[d.id], 0)
			}
		}
		var first, keep []int32 // to be looked at again, before or after all others
		vain := 0
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
				delete(w.queued, i)
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
				if o != nil && len(first) < scanAtOnce/4 { // a result comes sooner of what was begun
					first = append(first, i)
				} else {
					keep = append(keep, i)
				}
				continue
			}
			d := c.device
			if o == nil {
				o = &openTask{still: make(map[string]time.Time)}
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
		p.release(a)
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
	life := min(lifeOfJob(b.asked.run.Limits), max(b.deadline.Sub(s.now()), time.Second))
	body, err := s.body(ctx, a.Order, b.asked, b.device, b.deadline, life)
	if err == nil {
		_, err = s.compute.sendAs(ctx, a.Order, a.Device, b.module, body, life)
	}
	if err != nil {
		if ctx.Err() == nil {
			s.settle(ctx, b.id, b.task, a, OrderRecord{}, err)
		}
		return
	}
	s.follow(ctx, b.id, b.task, a)
}

// release forgets an attempt that is over. p.mu is held.
func (p *planner) release(a api.JobAttempt) {
	delete(p.following, a.Order)
	if p.busy[a.Device]--; p.busy[a.Device] <= 0 {
		delete(p.busy, a.Device)
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
				o.stand(a.Order, v.Code != "", s.now())
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

// stand notes whether an attempt stands still.
func (o *openTask) stand(order string, still bool, now time.Time) {
	if _, was := o.still[order]; !still {
		delete(o.still, order)
	} else if !was {
		o.still[order] = now
	}
}

// settle takes in how an attempt has ended, and what follows for its task.
func (s *jobs) settle(ctx context.Context, id string, task int, a api.JobAttempt, v OrderRecord, err error) {
	defer s.settling.lock(taskKey(id, task))()
	var out jobOutcome
	if err == nil {
		out, err = s.compute.collect(ctx, v)
	}
	if err == nil {
		err = s.keep(ctx, v, out)
	}
	if ctx.Err() != nil {
		return // it is found again
	}
	job, err2 := s.rows.find(ctx, id)
	if err2 != nil && !errors.Is(err2, errNotFound) {
		if ctx.Err() == nil {
			s.log.Warn("the end of a task could not be kept; it will be found again", "job", id, "task", task, "error", err2)
		}
		s.settled(id, task, a, taskRow{State: wire.Running}, false)
		return
	}
	job.ID = id
	a.Ended, a.State = s.now().UTC(), wire.Succeeded
	if err != nil {
		a.State, a.Code, a.Reason, a.Retry = ending(err, v)
	} else {
		a.Result, a.CPU, a.Wall, a.Engine = resultDigest(out.result), out.result.CPUSeconds, out.result.WallSeconds, label(out.result.Engine)
	}
	row, changed, err2 := s.update(ctx, job, task, func(t *taskRow) bool {
		k := slices.IndexFunc(t.Attempts, func(x api.JobAttempt) bool { return x.Order == a.Order })
		if k < 0 || !t.Attempts[k].Ended.IsZero() {
			return false
		}
		t.Attempts[k] = a
		return true
	})
	if err2 != nil {
		if ctx.Err() == nil {
			s.log.Warn("the end of a task could not be kept; it will be found again", "job", id, "task", task, "error", err2)
		}
		row = taskRow{State: wire.Running} // as it was
	}
	if row.State.Terminal() {
		s.stop(ctx, row, "another device was first, or the job has ended")
		if changed {
			s.credit(ctx, job, row)
		}
	}
	if v.Order.ID != "" && err2 == nil {
		s.dropLists(ctx, v.Order)
	}
	s.settled(id, task, a, row, err2 == nil)
	if a.State != wire.Succeeded && (a.Code == wire.CodeLost || a.Code == wire.CodeNotFound) {
		s.noteLoss(ctx, v)
	}
}

// ending is how an attempt has failed, in few words.
func ending(err error, v OrderRecord) (state wire.State, code, reason string, retry int64) {
	var r *refusal
	var p *wire.Problem
	switch {
	case errors.As(err, &p):
		return p.State, p.Code, cutText(p.Reason, maxLoggedText), v.Result.RetrySeconds
	case errors.As(err, &r):
		return wire.Failed, r.Code, cutText(r.Reason, maxLoggedText), 0
	}
	return wire.Failed, wire.CodeInternal, cutText(err.Error(), maxLoggedText), 0
}

// settled is what the planner makes of the end of an attempt.
func (s *jobs) settled(id string, task int, a api.JobAttempt, row taskRow, kept bool) {
	p, now := &s.plan, s.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	defer s.poke()
	p.release(a)
	switch {
	case a.State == wire.Succeeded:
		delete(p.resting, a.Device)
	case deviceFailed(a):
		r := p.resting[a.Device]
		wait := min(s.pace.rest<<min(r.times, 10), longestJobRest)
		if a.Retry > 0 {
			wait = max(wait, time.Duration(min(a.Retry, int64(maxLife/time.Second)))*time.Second)
		}
		p.resting[a.Device] = jobRest{now.Add(wait), r.times + 1, a.Code}
	}
	for i, d := range p.there { // the look is a moment old
		if r := p.resting[d.id]; d.id == a.Device && now.Before(r.until) {
			p.there[i].rests = &api.JobWait{Code: r.code, Reason: "failed lately (" + r.code + ")"}
		}
	}
	w := p.works[id]
	if w == nil {
		return
	}
	if a.State == wire.Succeeded {
		w.times = append(w.times, a.Ended.Sub(a.Began).Seconds())
	}
	o := w.open[int32(task)]
	if o == nil || !kept {
		return
	}
	if o.row, kept = s.tasks.get(taskKey(id, task)); !kept { // it has ended, and nothing of it goes on
		o.row = row
	}
	delete(o.still, a.Order)
	if row.State.Terminal() {
		w.over(int32(task))
		return
	}
	w.queueFirst(int32(task))
}

// deviceFailed tells whether it is the device that could not do a task, and not the
// task that could not be done.
func deviceFailed(a api.JobAttempt) bool {
	switch a.Code {
	case codeGuestFailed, codeBadModule, wire.CodeBadBody, wire.CodeLimit, wire.CodeLost, wire.CodeNotFound, wire.CodeInterrupted, "too_large", "no_module":
		return false
	}
	return a.State != wire.Canceled
}

// Codes of jobs/... that a device ends a job with.
const (
	codeGuestFailed = "guest_failed"
	codeBadModule   = "bad_module"
	codeDisagree    = "disagreement"
)

// failedAt tells whether a task came to a limit that the job itself has set, and that is the same
// on each device: of its memory, or its output. How much time it takes differs.
func failedAt(a api.JobAttempt, l wire.JobLimits) bool {
	return a.State == wire.Failed && a.Code == wire.CodeLimit && (l.MemoryBytes > 0 || l.OutputBytes > 0)
}

// decide sets a task's state by its attempts; lone is as for [jobs.rule].
func (s *jobs) decide(job jobRow, t *taskRow, lone func() bool) {
	now := s.now().UTC()
	end := func(state wire.State, code, format string, args ...any) {
		t.State, t.Code, t.Reason, t.Ended, t.Next = state, code, cutText(fmt.Sprintf(format, args...), maxLoggedText), now, time.Time{}
	}
	fails, good := 0, 0
	guest := make(map[string]int) // how often an owner's devices have said that it is the module that fails
	var last api.JobAttempt       // that counts
	for _, a := range t.Attempts {
		if !a.Ended.IsZero() && a.State == wire.Succeeded {
			good++
		}
		switch {
		case a.Ended.IsZero() || a.State == wire.Succeeded || a.Retry > 0 || a.State == wire.Canceled && (a.Code == wire.CodeRetired || a.Code == wire.CodeInterrupted):
			continue
		case a.State == wire.Canceled:
			end(wire.Canceled, a.Code, "order %s of device %s was canceled", a.Order, a.Device)
			return
		}
		if last, fails = a, fails+1; blames(a, job.Spec.Limits) {
			guest[s.honesty.copyOf(a.Device).Owner]++
		}
	}
	retries := max(job.Spec.Retries, 0)
	if spent := (fails > retries || len(t.Attempts) >= maxAttempts) && t.running() == 0; spent && good >= max(job.Spec.Copies, 1) {
		lone = func() bool { return true } // others could not do it
	}
	v := s.rule(job, *t, lone)
	if t.Case != nil && (v.copies != t.Case.Copies || v.noMore && !t.Case.NoMore) {
		c := *t.Case
		c.Copies, c.NoMore = v.copies, c.NoMore || v.noMore
		t.Case = &c
	}
	switch {
	case v.stands >= 0:
		end(wire.Succeeded, "", "%s", v.reason)
		t.Stands, t.VerifiedBy, t.Unverified = v.stands, v.by, v.unverified
	case v.code != "":
		end(wire.Failed, v.code, "%s", v.reason)
	case good > 0 && v.own: // what could not be done elsewhere counts for nothing
		t.State, t.Code, t.Reason = wire.Running, codeVerifying, v.reason
	case last.Code == wire.CodeBadBody || last.Code == "too_large" || last.Code == "no_module":
		end(last.State, last.Code, "%s", last.Reason)
	case confirmed(guest, retries, func() bool { return job.Spec.Needs.Device != "" || lone() }) && !job.Spec.Live && good == 0:
		end(last.State, last.Code, "%s", last.Reason)
	case (fails > retries || len(t.Attempts) >= maxAttempts) && t.running() == 0:
		reason := last.Reason
		if fails > 1 {
			reason = fmt.Sprintf("%d devices or tries failed; the last said: %s", fails, last.Reason)
		}
		end(cmp.Or(last.State, wire.Failed), cmp.Or(last.Code, wire.CodeInternal), "%s", reason)
	default:
		t.State, t.Code, t.Reason = wire.Queued, "", ""
		if t.running() > 0 {
			t.State = wire.Running
		}
		if good > 0 && v.reason != "" {
			t.State, t.Code, t.Reason = wire.Running, codeVerifying, v.reason
		}
		if n := len(t.Attempts); fails > 0 && n > 0 {
			t.Next = now.Add(min(s.pace.retry<<min(fails-1, 10), longestRetry))
		}
	}
}

// confirmed tells whether it is the module that fails: devices of two owners say so, or those
// of one have said it twice and nobody else could. Else one that lies would end all tasks.
func confirmed(said map[string]int, retries int, lone func() bool) bool {
	if len(said) != 1 {
		return len(said) > 1
	}
	for _, n := range said {
		return retries == 0 || n > 1 && lone()
	}
	return false
}

// blamed tells whether an owner's device has said that it is the module that fails at a task.
func (s *jobs) blamed(t taskRow, owner string, l wire.JobLimits) bool {
	return slices.ContainsFunc(t.Attempts, func(a api.JobAttempt) bool { return blames(a, l) && s.honesty.copyOf(a.Device).Owner == owner })
}

// blames tells whether an attempt has failed for what the task is, by the device's word.
func blames(a api.JobAttempt, l wire.JobLimits) bool {
	return a.Code == codeGuestFailed || a.Code == codeBadModule || failedAt(a, l)
}

// fail ends a task that no device can do, for what it is about.
func (s *jobs) fail(ctx context.Context, id string, task int, why error) {
	row, err := s.tasks.change(ctx, taskKey(id, task), func(t *taskRow, exists bool) error {
		if t.State.Terminal() {
			return errUnchanged
		}
		t.State, t.Code, t.Reason, _ = ending(why, OrderRecord{})
		t.Ended = s.now().UTC()
		return nil
	})
	p := &s.plan
	p.mu.Lock()
	if w := p.works[id]; w != nil {
		if err != nil {
			w.queue(int32(task))
		} else {
			w.over(int32(task))
		}
	}
	p.mu.Unlock()
	if err == nil {
		s.stop(ctx, row, "the task has ended")
	} else if ctx.Err() == nil {
		s.log.Warn("a task that cannot be done waits", "job", id, "task", task, "error", err)
	}
	s.poke()
}

// stop cancels what is still under way of a task that has ended.
func (s *jobs) stop(ctx context.Context, t taskRow, why string) {
	for _, a := range t.Attempts {
		if !a.Ended.IsZero() {
			continue
		}
		if _, err := s.outbox.cancel(ctx, a.Device, a.Order, why, "coordinator"); err != nil && ctx.Err() == nil {
			var r *refusal
			if !errors.As(err, &r) { // it has ended meanwhile, or was never made
				s.log.Warn("a superfluous run of a task goes on", "order", a.Order, "error", err)
			}
		}
	}
}

// finish ends jobs: those whose tasks have all ended, that were canceled or have no
// time left.
func (s *jobs) finish(ctx context.Context) {
	now := s.now().UTC()
	var list []jobRow
	s.rows.each(func(_ string, v jobRow) bool {
		list = append(list, v)
		return true
	})
	for _, v := range list {
		s.mu.Lock()
		good, failed := 0, 0
		if p := s.open[v.ID]; p != nil {
			good, failed = p.good, p.failed
		}
		s.mu.Unlock()
		state, code, reason := wire.Succeeded, "", ""
		switch {
		case v.Cancel != nil:
			state, code, reason = wire.Canceled, wire.CodeCanceled, "it was canceled by "+v.Cancel.By
			if v.Cancel.Reason != "" {
				reason += ": " + v.Cancel.Reason
			}
		case good+failed == v.Tasks && failed > 0:
			state, code, reason = s.failure(v, failed)
		case good+failed == v.Tasks:
		case now.After(v.Spec.Deadline):
			state, code, reason = wire.TimedOut, wire.CodeLimit, fmt.Sprintf("the deadline has come, and %d of %d tasks have not ended", v.Tasks-good-failed, v.Tasks)
			if w := s.plan.waits(v.ID); w != nil {
				reason += "; what waits: " + w.Reason
			}
		default:
			continue
		}
		if err := s.end(ctx, v, state, code, reason); err != nil && ctx.Err() == nil {
			s.log.Warn("a job that is over is not marked so yet", "job", v.ID, "error", err)
		}
	}
}

// failure is how a job ends of which tasks have failed.
func (s *jobs) failure(v jobRow, failed int) (state wire.State, code, reason string) {
	if v.Tasks > 1 {
		return wire.Failed, "tasks_failed", fmt.Sprintf("%d of %d tasks failed", failed, v.Tasks)
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeTimeout)
	defer cancel()
	t, err := s.tasks.find(ctx, taskKey(v.ID, 0))
	if err != nil || !t.State.Terminal() {
		return wire.Failed, "tasks_failed", "its task failed"
	}
	return t.State, t.Code, t.Reason
}

// end marks a job as over. Tasks that run are told to stop.
func (s *jobs) end(ctx context.Context, v jobRow, state wire.State, code, reason string) error {
	p := &s.plan
	p.mu.Lock()
	var open []int32
	if w := p.works[v.ID]; w != nil {
		w.pending = nil
		for i := range w.open {
			open = append(open, i)
		}
	}
	p.mu.Unlock()
	for _, i := range open {
		row, err := s.tasks.change(ctx, taskKey(v.ID, int(i)), func(t *taskRow, exists bool) error {
			if !exists || t.State.Terminal() {
				return errUnchanged
			}
			t.State, t.Code, t.Reason, t.Ended = state, code, reason, s.now().UTC()
			return nil
		})
		if err != nil {
			return err
		}
		s.stop(ctx, row, reason)
	}
	good := 0
	s.mu.Lock()
	if p := s.open[v.ID]; p != nil {
		good = p.good
	}
	s.mu.Unlock()
	_, err := s.rows.change(ctx, v.ID, func(r *jobRow, exists bool) error {
		if !exists || r.State.Terminal() {
			return errUnchanged
		}
		r.State, r.Code, r.Reason, r.Ended = state, code, reason, s.now().UTC()
		r.Succeeded, r.Failed = good, r.Tasks-good
		return nil
	})
	if err == nil {
		p.mu.Lock()
		delete(p.works, v.ID)
		p.mu.Unlock()
	}
	return err
}

// keepHouse sees to what takes too long, and to modules, which the shelf forgets
// after a day.
func (s *jobs) keepHouse(ctx context.Context) {
	p, now := &s.plan, s.now()
	if d := now.Sub(p.kept); d >= 0 && d < houseEvery {
		return
	}
	p.kept = now
	var shelve []string
	p.mu.Lock()
	for _, w := range p.works {
		if now.Sub(w.shelved) > s.pace.module {
			w.shelved, shelve = now, append(shelve, w.row.Spec.Module)
		}
		late := s.late(w)
		for i, o := range w.open {
			if o.extra > 0 {
				continue
			}
			for _, a := range o.row.Attempts {
				since, still := o.still[a.Order]
				if a.Ended.IsZero() && (late > 0 && now.Sub(a.Began) > late || still && now.Sub(since) > s.pace.away || s.awayFor(a.Device) > s.pace.away) {
					o.extra = 1
					w.queue(i)
					break
				}
			}
		}
	}
	p.mu.Unlock()
	for _, m := range shelve {
		code, err := s.compute.module(ctx, m)
		if err == nil {
			err = s.compute.staging.put(ctx, blobRef{moduleBlob, m}.String(), code)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("the module of a job may be forgotten before the job is done", "module", m, "error", err)
		}
	}
}

// late is from when on a task of a job takes too long beside the others; 0: that
// cannot be said yet. p.mu is held.
func (s *jobs) late(w *work) time.Duration {
	n, ended := len(w.times), 0
	s.mu.Lock()
	if p := s.open[w.row.ID]; p != nil {
		ended = len(p.ended)
	}
	s.mu.Unlock()
	if n == 0 || w.row.Tasks < lateTasks || float64(ended) < lateShare*float64(w.row.Tasks) {
		return 0
	}
	sorted := slices.Sorted(slices.Values(w.times))
	return max(time.Duration(lateTimes*sorted[n/2]*float64(time.Second)), s.pace.late)
}

// awayFor is how long a device has been away; 0: it is there.
func (s *jobs) awayFor(d wire.DeviceID) time.Duration {
	if s.reg.online(d) {
		return 0
	}
	if since := s.reg.lastSeen(d); !since.IsZero() {
		return s.now().Sub(since)
	}
	return s.now().Sub(s.started)
}

// keep notes where the outputs of a result are: what a device has signed for is as
// good as a receipt.
func (s *jobs) keep(ctx context.Context, v OrderRecord, out jobOutcome) error {
	now := s.now().UTC()
	for _, o := range out.result.Outputs {
		for _, part := range o.Parts {
			_, err := s.storage.chunks.change(ctx, part.Chunk, func(c *chunkRecord, exists bool) error {
				if !exists {
					*c = chunkRecord{ID: part.Chunk, Size: part.Size}
				}
				if c.Size != part.Size {
					return refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s signed for chunk %s with %d bytes, it has %d", v.Order.Device, part.Chunk, part.Size, c.Size)
				}
				c.Used, c.Until = now, latest(c.Until, now.Add(s.pace.kept))
				if slices.ContainsFunc(c.Holders, func(h api.Holder) bool { return h.Device == v.Order.Device && !h.Lost }) {
					return nil
				}
				c.Holders = slices.DeleteFunc(c.Holders, func(h api.Holder) bool { return h.Device == v.Order.Device })
				c.Holders = append(c.Holders, api.Holder{Device: v.Order.Device, Order: v.Order.ID, Since: now})
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// saveOf makes stored files of the outputs of a task whose result stands.
func (s *jobs) saveOf(ctx context.Context, job jobRow, t taskRow) error {
	a := t.Attempts[t.Stands]
	v, err := s.outbox.get(ctx, a.Device, a.Order)
	if err != nil {
		return err
	}
	out, err := s.compute.collect(ctx, v)
	if err != nil {
		return err
	}
	for _, o := range out.result.Outputs {
		file, ok := job.Spec.Save[o.Name]
		if !ok {
			continue
		}
		obj := api.Object{Name: fileOf(file, t.Name), Size: o.Size, SHA256: o.SHA256, Chunks: make([]api.Chunk, len(o.Parts))}
		for k, part := range o.Parts {
			obj.Chunks[k] = api.Chunk{ID: part.Chunk, Size: part.Size}
			if _, err := s.storage.chunks.change(ctx, part.Chunk, func(c *chunkRecord, exists bool) error {
				if exists {
					c.ask(defaultReplicas) // repair makes the others
					c.Until = time.Time{}  // the file says how long it is kept
				}
				return nil
			}); err != nil {
				return err
			}
		}
		if _, err := s.storage.putObject(ctx, obj); err != nil {
			return err
		}
	}
	return nil
}

// fileOf is the name of the file that an output of a task is kept as.
func fileOf(file, task string) string { return strings.ReplaceAll(file, "{}", task) }

// noteLoss takes a device at its word that it does not have its task's input any more.
func (s *jobs) noteLoss(ctx context.Context, v OrderRecord) {
	b, err := wire.DecodeBody[wire.JobRun](v.Order)
	if err != nil || b.Input == "" || len(b.Inputs) > 0 {
		return
	}
	if err := s.storage.lost(ctx, v.Order.Device, []string{b.Input}); err != nil && ctx.Err() == nil {
		s.log.Warn("a loss could not be noted", "chunk", b.Input, "error", err)
	}
}
