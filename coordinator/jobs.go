package coordinator

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// jobs keeps jobs, and has devices do them.
//
// # Records
//
// A job is a row and, if it is over files or lists of arguments, these beside it. A task
// has no row until it is given to a device; then its row names each order before the
// order is made, and in the end which of them has the result that stands. The
// result itself is the device's signed report, which the outbox keeps. So a crash at
// any place is gone on from: what has no row has not begun, an order that a row names
// and that is not there was never made, and of one that is there the end is awaited.
//
// # Who does what
//
// Any coordinator takes calls. One places tasks: it has a lease for that, so that the
// room of a device is counted in one place. Another takes over when the lease ends.
// Should two place at the same time, a task has a superfluous run at most: rows are
// changed by compare-and-set, and the first result that stands is the task's.
//
// # Where a task goes
//
// To a device that can do it ([jobs.misfit]) and has room, where the least has to be
// moved; see schedule.go. What no device can do now waits, and says why.
//
// # What is tried again
//
// What a device could not do goes to another, after a pause. What the module itself
// fails at would fail everywhere: once more elsewhere, to be sure. A device that is
// away, or lets a task stand still, or takes far longer with it than others took with
// others, is not waited for alone: another is asked as well, the first good result
// counts, and the rest is canceled.
type jobs struct {
	compute *compute
	storage *storage
	outbox  *outbox
	reg     *registry
	leader  *leader // who places
	leading atomic.Bool
	leaving func(wire.DeviceID) bool
	trust   func(wire.DeviceID, trust.Standing) float64 // 0: gets nothing
	honesty *honesty
	now     func() time.Time
	log     *slog.Logger
	self    string // of this coordinator's cursors
	pace    jobPace
	started time.Time

	rows   *table[jobRow]
	tasks  *table[taskRow]
	files  *table[jobFiles]
	caught *table[caughtRow] // by device: those whose results are to be looked at again

	settling keyed // one change of a task's results at a time

	mu     sync.Mutex
	loaded bool
	open   map[string]*progress // of jobs that have not ended, and of some that have
	closed []string             // those that have, the oldest first
	recent []jobSummary         // jobs that have ended, the oldest first
	plan   planner              // of who places
	wake   chan struct{}        // capacity 1: there may be something to place
}

// jobPace is how patient jobs are; tests hurry.
type jobPace struct {
	retry  time.Duration // before the first repeat; each further one waits twice as long
	silent time.Duration // of an order without any report, until another is asked as well: a device acknowledges at once
	away   time.Duration // of a device or of a task that stands still, until another is asked as well
	rest   time.Duration // of a device that has failed, at first
	late   time.Duration // the least that a straggler has run
	lease  time.Duration
	kept   time.Duration // of outputs
	module time.Duration // between two times that the module of a job is put on the shelf anew
}

var ordinaryPace = jobPace{retry: 250 * time.Millisecond, silent: 20 * time.Second, away: 20 * time.Second, rest: time.Second, late: 2 * time.Second,
	lease: time.Minute, kept: api.OutputKept, module: stagingLife / 3}

// jobRow is a job.
type jobRow struct {
	ID      string      `json:"id"`
	Spec    api.JobSpec `json:"spec"`
	Tasks   int         `json:"tasks"`
	By      string      `json:"by,omitempty"`
	Created time.Time   `json:"created"`
	Cancel  *api.Cancel `json:"cancel,omitempty"` // without an order
	// What follows is set in the end.
	State     wire.State `json:"state"`
	Code      string     `json:"code,omitempty"`
	Reason    string     `json:"reason,omitempty"`
	Ended     time.Time  `json:"ended,omitzero"`
	Succeeded int        `json:"succeeded,omitempty"`
	Failed    int        `json:"failed,omitempty"`
}

// jobFiles are the files that a job is over, or the arguments of each of its tasks.
type jobFiles struct {
	Names  []string   `json:"names,omitempty"`
	Chunks []int      `json:"chunks,omitempty"` // of each, where each chunk is a task
	Args   [][]string `json:"args,omitempty"`
	Rest   int        `json:"rest,omitempty"` // so many further records have the rest of Args, see restKey
}

// argsRecord is how much text of arguments one record has at most, in bytes: escaped, each
// may take six times as much.
const argsRecord = maxRecord / 8

func restKey(job string, n int) string { return job + ".rest." + strconv.Itoa(n) }

// saveFiles keeps what a job is over. That with the job's own key is last.
func (s *jobs) saveFiles(ctx context.Context, id string, f jobFiles) error {
	var parts []jobFiles
	room := 0
	for _, args := range f.Args {
		size := 8 // of an empty list, and commas
		for _, a := range args {
			size += len(a) + 3
		}
		if room < size {
			parts, room = append(parts, jobFiles{}), argsRecord
		}
		last := &parts[len(parts)-1]
		last.Args, room = append(last.Args, args), room-size
	}
	if len(parts) > 0 {
		for n, p := range parts[1:] {
			if err := s.files.create(ctx, restKey(id, n), p); err != nil {
				return err
			}
		}
		f.Args, f.Rest = parts[0].Args, len(parts)-1
	}
	return s.files.create(ctx, id, f)
}

// loadFiles is what saveFiles has kept.
func (s *jobs) loadFiles(ctx context.Context, id string) (f jobFiles, err error) {
	if f, err = s.files.find(ctx, id); err != nil {
		return f, err
	}
	for n := range f.Rest {
		part, err := s.files.find(ctx, restKey(id, n))
		if err != nil {
			return f, err
		}
		f.Args = append(f.Args, part.Args...)
	}
	f.Rest = 0
	return f, nil
}

// of is the file of a task, and its chunk; -1: all of it.
func (f jobFiles) of(task int) (name string, chunk int) {
	if f.Chunks == nil {
		return f.Names[task], -1
	}
	for i, n := range f.Chunks {
		if task < n {
			return f.Names[i], task
		}
		task -= n
	}
	return "", -1 // tasks are counted by this list
}

// taskRow is a task that was given to a device.
type taskRow struct {
	Name     string           `json:"name,omitempty"`
	Args     []string         `json:"args,omitempty"` // of it alone
	State    wire.State       `json:"state"`
	Code     string           `json:"code,omitempty"`
	Reason   string           `json:"reason,omitempty"`
	Ended    time.Time        `json:"ended,omitzero"`
	Attempts []api.JobAttempt `json:"attempts"`
	Stands   int              `json:"stands,omitempty"` // whose result it is, of one that has succeeded
	Next     time.Time        `json:"next,omitzero"`    // it is not tried again, or looked at again, before
	// Case is how sure its result must be, and what the coordinator has found out. Who was
	// asked and has answered are the attempts. Nil: results cannot be compared.
	Case        *trust.Case      `json:"case,omitempty"`
	VerifiedBy  api.VerifiedBy   `json:"verified_by,omitempty"`
	Unverified  *api.JobWait     `json:"unverified,omitempty"`
	Checking    bool             `json:"checking,omitempty"` // it has ended, and its case has not
	Checks      int              `json:"checks,omitempty"`   // in vain, so far
	Corrections []api.Correction `json:"corrections,omitempty"`
}

// running counts the attempts that have not ended.
func (t taskRow) running() int {
	n := 0
	for _, a := range t.Attempts {
		if a.Ended.IsZero() {
			n++
		}
	}
	return n
}

// stays tells what of tasks is held in memory.
func (t taskRow) stays() bool { return !t.State.Terminal() || t.running() > 0 || t.Checking }

func taskKey(job string, i int) string { return job + "." + strconv.Itoa(i) }

func parseTaskKey(key string) (job string, i int) {
	job, n, _ := strings.Cut(key, ".")
	i, err := strconv.Atoi(n)
	if err != nil {
		i = -1
	}
	return job, i
}

// progress is what a coordinator knows of the tasks of a job that have ended.
type progress struct {
	ended        []int32        // in the order in which they did
	is           map[int32]sure // those, and how sure their results are
	good, failed int
	changed      chan struct{} // closed with the next one
}

// jobSummary is an ended job as a list shows it.
type jobSummary struct {
	id  string
	row jobRow
}

const (
	recentJobs    = 2000    // ended ones that a list looks through
	closedKept    = 64      // ended jobs whose results can be given in the order in which they came
	resultsAtOnce = 256     // in one answer
	resultBytes   = 8 << 20 // of output in one answer, about
	resultReaders = 16      // results that one answer reads at once
	maxJobNames   = 32      // inputs, and outputs, of one job
)

func newJobs(c *compute, s *storage, log *slog.Logger) *jobs {
	return &jobs{compute: c, storage: s, outbox: s.outbox, reg: s.reg, now: s.outbox.now, log: log, self: ulid.Make().String(),
		started: s.outbox.now(), open: make(map[string]*progress), wake: make(chan struct{}, 1), plan: newPlanner()}
}

// openRows opens the buckets: first what says which tasks count.
func (s *jobs) openRows(ctx context.Context, c *Coordinator) error {
	month := func(k *jetstream.KeyValueConfig) { k.TTL = retention }
	kv, err := c.openKV(ctx, "jobs", month)
	if err != nil {
		return err
	}
	if s.rows, err = openTable(ctx, kv, "job", s.trackJob, loggingTo[jobRow](c.log), keeping(func(v jobRow) bool { return !v.State.Terminal() })); err != nil {
		return err
	}
	c.closers = append(c.closers, s.rows.close)
	if kv, err = c.openKV(ctx, "tasks", month); err != nil {
		return err
	}
	if s.tasks, err = openTable(ctx, kv, "task", s.trackTask, loggingTo[taskRow](c.log), keeping(taskRow.stays)); err != nil {
		return err
	}
	c.closers = append(c.closers, s.tasks.close)
	if kv, err = c.openKV(ctx, "jobfiles", month); err != nil {
		return err
	}
	if s.files, err = openTable(ctx, kv, "list of a job's files", nil, loggingTo[jobFiles](c.log), keeping(func(jobFiles) bool { return false })); err != nil {
		return err
	}
	c.closers = append(c.closers, s.files.close)
	if err := bucket(ctx, c, "caught", &s.caught, nil, month); err != nil {
		return err
	}
	s.mu.Lock()
	s.loaded = true
	s.mu.Unlock()
	return nil
}

// trackJob is the table's onEach.
func (s *jobs) trackJob(id string, v jobRow, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case gone:
	case !v.State.Terminal():
		s.progressOf(id)
	default:
		if p := s.open[id]; p != nil && !slices.Contains(s.closed, id) {
			p.tell()
			s.closed = append(s.closed, id)
			if len(s.closed) > closedKept {
				delete(s.open, s.closed[0])
				s.closed = slices.Clone(s.closed[1:])
			}
		}
		if s.recent = append(s.recent, jobSummary{id, v}); len(s.recent) > 2*recentJobs {
			s.recent = slices.Clone(s.recent[len(s.recent)-recentJobs:])
		}
	}
	s.poke()
}

// progressOf finds or makes what is known of a job. s.mu is held.
func (s *jobs) progressOf(id string) *progress {
	p := s.open[id]
	if p == nil {
		p = &progress{is: make(map[int32]sure), changed: make(chan struct{})}
		s.open[id] = p
	}
	return p
}

func (p *progress) tell() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// trackTask is the table's onEach.
func (s *jobs) trackTask(key string, v taskRow, gone bool) {
	id, i := parseTaskKey(key)
	if gone || i < 0 || !v.State.Terminal() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.open[id]
	if p == nil {
		if !s.loaded { // of a job that has ended
			return
		}
		p = s.progressOf(id) // another coordinator's: this watch was first
	}
	if _, had := p.is[int32(i)]; had {
		p.is[int32(i)] = v.sure()
		return
	}
	p.is[int32(i)] = v.sure()
	p.ended = append(p.ended, int32(i))
	if v.State == wire.Succeeded {
		p.good++
	} else {
		p.failed++
	}
	p.tell()
	s.poke()
}

// poke has it looked whether something can be placed.
func (s *jobs) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// begin keeps a job; from then on it is done, or said why not.
func (s *jobs) begin(ctx context.Context, q api.JobSpec) (api.Job, error) {
	row := jobRow{ID: ulid.Make().String(), Tasks: 1, By: by(ctx), Created: s.now().UTC(), State: wire.Queued}
	if err := checkSpec(&q, row.Created); err != nil {
		return api.Job{}, err
	}
	if _, err := s.compute.module(ctx, q.Module); err != nil {
		return api.Job{}, err
	}
	if d := q.Needs.Device; d != "" {
		if rec, err := s.reg.device(d); err != nil {
			return api.Job{}, err
		} else if rec.Retired {
			return api.Job{}, errRetired(d)
		}
	}
	var files *jobFiles
	if q.Over != nil {
		f, err := s.filesOf(*q.Over)
		if err != nil {
			return api.Job{}, err
		}
		files, row.Tasks = &f, max(len(f.Names), len(f.Args))
		if f.Chunks != nil {
			row.Tasks = 0
			for _, n := range f.Chunks {
				row.Tasks += n
			}
		}
		if row.Tasks > api.MaxTasks {
			return api.Job{}, refuse(http.StatusRequestEntityTooLarge, "too_large", "a job has at most %d tasks, this would have %d: make several of it", api.MaxTasks, row.Tasks)
		}
		over := *q.Over // what is kept beside it is left out
		over.Names, over.Args = nil, nil
		q.Over = &over
	}
	row.Spec = q
	var of jobFiles
	if files != nil {
		of = *files
	}
	// What cannot be done by any device, for what it is about, is refused at once.
	if _, err := s.resolve(row, of, 0); err != nil {
		return api.Job{}, err
	}
	if err := s.checkHolder(q); err != nil {
		return api.Job{}, err
	}
	if files != nil {
		if err := s.saveFiles(ctx, row.ID, *files); err != nil {
			return api.Job{}, err
		}
	}
	if err := s.rows.create(ctx, row.ID, row); err != nil {
		return api.Job{}, err
	}
	about(ctx, row.ID)
	s.poke()
	return s.view(row, false), nil
}

// checkHolder refuses a device that was named and does not hold the input.
func (s *jobs) checkHolder(q api.JobSpec) error {
	d := q.Needs.Device
	if d == "" || q.Input == nil {
		return nil
	}
	o, err := s.storage.object(q.Input.Object)
	if err != nil {
		return err
	}
	id := o.Chunks[q.Input.Chunk].ID
	if !s.storage.holdsNow(d, id) {
		return refuse(http.StatusConflict, "not_a_holder", "device %s does not hold the input chunk %s; \"deimos object show %s\" says who does", d, id, q.Input.Object)
	}
	return nil
}

// holdsNow tells whether a device should hold a chunk.
func (s *storage) holdsNow(d wire.DeviceID, id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.holds[d][id]
	return ok
}

// holdersOf are the devices that should hold a chunk.
func (s *storage) holdersOf(id string) []wire.DeviceID {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]wire.DeviceID, len(s.where[id]))
	for i, at := range s.where[id] {
		out[i] = at.device
	}
	return out
}

func badJob(format string, args ...any) error {
	return refuse(http.StatusBadRequest, "bad_job", format, args...)
}

// isJobName tells whether an input or an output can have a name.
func isJobName(s string) bool {
	if s == "" || len(s) > 64 || s == "." || s == ".." {
		return false
	}
	for _, c := range s {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '.' && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// checkSpec checks what can be without looking around, and fills in what was left out.
func checkSpec(q *api.JobSpec, now time.Time) error {
	text, lines := 0, q.Over != nil && len(q.Over.Args) > 0
	for _, a := range q.Args {
		text += len(a)
	}
	for k, v := range q.Env {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.Contains(v, "\x00") {
			return badJob("%q is no name of an environment variable", k)
		}
		text += len(k) + len(v)
	}
	names := make(map[string]bool)
	for _, in := range q.Inputs {
		sources := 0
		for _, given := range []bool{in.Object != "", in.Dataset != "", in.Sensors != nil} {
			if given {
				sources++
			}
		}
		switch {
		case !isJobName(in.Name):
			return badJob("an input's name is 1 to 64 letters, digits, dots, dashes and underscores; %q is not", in.Name)
		case names[in.Name]:
			return badJob("there are two inputs named %s", in.Name)
		case in.Name == wire.Stdin && (q.Input != nil || q.Over != nil && q.Over.As == "" && !lines):
			return badJob("there are two inputs that would be standard input; give the others names of their own")
		case sources != 1:
			return badJob("the input %s must come from one of a stored file, a dataset and sensors", in.Name)
		}
		names[in.Name] = true
	}
	outputs := make(map[string]bool)
	for _, name := range slices.Concat(q.Outputs, slices.Sorted(maps.Keys(q.Save))) {
		if !isJobName(name) {
			return badJob("an output's name is 1 to 64 letters, digits, dots, dashes and underscores; %q is not", name)
		}
		outputs[name] = true
	}
	for name, file := range q.Save {
		if q.Over != nil && !strings.Contains(file, "{}") {
			return badJob("the output %s of all tasks cannot be saved as one file %q: put {} where the task's name is to stand", name, file)
		}
		if err := checkName(strings.ReplaceAll(file, "{}", "x")); err != nil {
			return err
		}
	}
	if err := q.Limits.Check(); err != nil {
		return badJob("%v", err)
	}
	if q.Deadline.IsZero() {
		q.Deadline = now.Add(api.JobLife)
	}
	all, most := 0, 0 // of the tasks' own arguments
	if lines {
		for _, args := range q.Over.Args {
			own := 0
			for _, a := range args {
				own += len(a)
			}
			all, most = all+own, max(most, own)
		}
	}
	switch {
	case text+most > api.MaxSpecText:
		return refuse(http.StatusRequestEntityTooLarge, "too_large", "arguments and environment have %d bytes, at most %d can be sent", text+most, api.MaxSpecText)
	case all > api.MaxArgsText:
		return refuse(http.StatusRequestEntityTooLarge, "too_large", "the arguments of all tasks have %d bytes, at most %d can be kept: make several jobs of it", all, api.MaxArgsText)
	case len(names) > maxJobNames || len(outputs) > maxJobNames:
		return badJob("a job has at most %d inputs and %d outputs", maxJobNames, maxJobNames)
	case q.Copies < 0 || q.Copies > api.MaxCopies:
		return badJob("a task is run by 1 to %d devices, not by %d", api.MaxCopies, q.Copies)
	case q.Copies > 1 && q.Needs.Device != "":
		return badJob("results of %d devices are wanted, and one device alone is allowed", q.Copies)
	case q.Verify != "" && q.Verify != api.VerifyAdaptive && q.Verify != api.VerifyAlways && q.Verify != api.VerifyNone:
		return badJob("results are verified %s, %s or %s, not %q", api.VerifyAdaptive, api.VerifyAlways, api.VerifyNone, q.Verify)
	case q.Verify == api.VerifyNone && q.Copies > 1:
		return badJob("results of %d devices are wanted, and they are not to be verified", q.Copies)
	case q.Verify == api.VerifyAlways && incomparable(*q) != nil:
		return badJob("the results of this job cannot be verified: %s", incomparable(*q).Reason)
	case !q.Deadline.After(now):
		return badJob("the deadline %s is over", q.Deadline.Format(time.RFC3339))
	case q.Deadline.Sub(now) > maxLife:
		return badJob("a job can take %d days at most", maxLife/(24*time.Hour))
	case lines && (q.Over.Prefix != "" || len(q.Over.Names) > 0 || q.Over.PerChunk || q.Over.As != ""):
		return badJob("a job is over files, or over lists of arguments, not over both")
	case q.Over != nil && q.Input != nil && !lines:
		return badJob("a job over files has them as its input: give what all tasks get a name")
	case q.Over != nil && q.Over.As != "" && (q.Over.PerChunk || !isJobName(q.Over.As) || names[q.Over.As]):
		return badJob("%q cannot be the name of the input that each file becomes", q.Over.As)
	case q.Over != nil && !lines && (q.Over.Prefix == "") == (len(q.Over.Names) == 0):
		return badJob("a job is over files whose names begin alike, or over some that are named, or over lists of arguments")
	}
	if q.Rank < -api.MaxRank || q.Rank > api.MaxRank {
		return badJob("the rank %d is too far from 0: it is from %d to %d, and the higher goes first", q.Rank, -api.MaxRank, api.MaxRank)
	}
	if r := q.Retries; r == 0 {
		q.Retries = api.DefaultRetries
	} else if r > api.MaxCopies {
		return badJob("a task is tried again at most %d times", api.MaxCopies)
	}
	q.Deadline = q.Deadline.UTC()
	q.Outputs = slices.Sorted(maps.Keys(outputs))
	return nil
}

// filesOf lists the files that a job is over, or takes over its lists of arguments.
func (s *jobs) filesOf(o api.JobOver) (f jobFiles, err error) {
	if len(o.Args) > 0 {
		return jobFiles{Args: o.Args}, nil
	}
	f.Names = slices.Clone(o.Names)
	if o.Prefix != "" {
		s.storage.objects.each(func(_ string, v api.Object) bool {
			if strings.HasPrefix(v.Name, o.Prefix) {
				f.Names = append(f.Names, v.Name)
			}
			return true
		})
		if len(f.Names) == 0 {
			return f, refuse(http.StatusNotFound, wire.CodeNotFound, "there is no stored file whose name begins with %q", o.Prefix)
		}
	}
	slices.Sort(f.Names)
	f.Names = slices.Compact(f.Names)
	for _, n := range f.Names {
		v, err := s.plain(n)
		if err != nil {
			return f, err
		}
		if o.PerChunk {
			f.Chunks = append(f.Chunks, len(v.Chunks))
		}
	}
	return f, nil
}

// plain is a stored file that jobs can run over.
func (s *jobs) plain(name string) (api.Object, error) {
	o, err := s.storage.object(name)
	if err == nil && o.Code != nil {
		err = refuse(http.StatusConflict, "encrypted", "%q is encrypted: no device can read it, and so no job can run over it; store a copy with \"deimos object put --plain\"", name)
	}
	return o, err
}

func errNoJob(id string) error {
	return refuse(http.StatusNotFound, wire.CodeNotFound, "there is no job %s; a job is kept for %d days after its end (\"deimos job list\")", id, retention/(24*time.Hour))
}

func (s *jobs) find(ctx context.Context, id string) (jobRow, error) {
	v, err := s.rows.find(ctx, id)
	if errors.Is(err, errNotFound) {
		err = errNoJob(id)
	}
	return v, err
}

// cancel has a job stopped.
func (s *jobs) cancel(ctx context.Context, id string, q api.CancelRequest) (api.Job, error) {
	row, err := s.rows.change(ctx, id, func(v *jobRow, exists bool) error {
		switch {
		case !exists:
			return errNoJob(id)
		case v.State.Terminal():
			return refuse(http.StatusConflict, "ended", "job %s has ended (%s): it cannot be canceled any more", id, v.State)
		case v.Cancel != nil:
			return errUnchanged
		}
		v.Cancel = &api.Cancel{At: s.now().UTC(), By: label(by(ctx)), Reason: sentence(q.Reason)}
		return nil
	})
	if err != nil {
		return api.Job{}, err
	}
	s.poke()
	return s.view(row, false), nil
}

// view is a job as operators see it, with the tasks that run if they are wanted.
func (s *jobs) view(row jobRow, open bool) api.Job {
	v := api.Job{ID: row.ID, Spec: row.Spec, State: row.State, Code: row.Code, Reason: row.Reason, By: row.By, Created: row.Created, Ended: row.Ended,
		JobCounts: api.JobCounts{Tasks: row.Tasks, Succeeded: row.Succeeded, Failed: row.Failed}}
	if row.State.Terminal() {
		return v
	}
	s.mu.Lock()
	if p := s.open[row.ID]; p != nil {
		v.Succeeded, v.Failed = p.good, p.failed
	}
	s.mu.Unlock()
	v.Waits = s.plan.waits(row.ID) // which has a lock of its own, that comes first
	s.tasks.each(func(key string, t taskRow) bool {
		id, i := parseTaskKey(key)
		if id != row.ID || t.State.Terminal() {
			return true
		}
		if t.State == wire.Running { // or its result is being verified
			v.Running++
		}
		if open {
			v.Open = append(v.Open, t.view(id, i))
		}
		return true
	})
	if v.Running+v.Succeeded+v.Failed > 0 {
		v.State = wire.Running
	}
	slices.SortFunc(v.Open, func(a, b api.JobTask) int { return cmp.Compare(a.Task, b.Task) })
	v.Open = v.Open[:min(len(v.Open), api.MaxOpenShown)]
	for _, t := range v.Open {
		for i, a := range t.Attempts {
			if o, ok := s.outbox.rows.get(orderKeyOf(a.Device, a.Order)); ok && a.Ended.IsZero() {
				t.Attempts[i].State, t.Attempts[i].Progress, t.Attempts[i].Code = o.State, o.Progress, o.Code
				if r, err := o.open(); err == nil && o.Code != "" {
					t.Attempts[i].Reason = r.Result.Reason
				}
			}
		}
	}
	return v
}

func (t taskRow) view(job string, i int) api.JobTask {
	return api.JobTask{Job: job, Task: i, Name: t.Name, Args: t.Args, State: t.State, Code: t.Code, Reason: t.Reason, Ended: t.Ended, Attempts: slices.Clone(t.Attempts),
		VerifiedBy: t.VerifiedBy, Unverified: t.Unverified, Checking: t.Checking, Corrections: t.Corrections}
}

// list is the newest jobs that fit.
func (s *jobs) list(q api.JobQuery) api.JobList {
	fits := func(v jobRow, state wire.State) bool {
		return (q.State == "" || q.State == state) && !(q.Pending && v.State.Terminal())
	}
	found := []api.Job{}
	for _, row := range s.rows.all(func(a, b jobRow) int { return cmp.Compare(b.ID, a.ID) }) {
		if v := s.view(row, false); fits(row, v.State) {
			found = append(found, v)
		}
	}
	s.mu.Lock()
	recent := slices.Clone(s.recent)
	s.mu.Unlock()
	for _, r := range recent {
		if fits(r.row, r.row.State) {
			found = append(found, s.view(r.row, false))
		}
	}
	slices.SortFunc(found, func(a, b api.Job) int { return cmp.Compare(b.ID, a.ID) })
	found = slices.CompactFunc(found, func(a, b api.Job) bool { return a.ID == b.ID })
	out := api.JobList{Jobs: found}
	if n := cmp.Or(q.Limit, api.DefaultOrders); len(found) > n {
		out.Jobs, out.Cut = found[:n], fmt.Sprintf("these are the newest %d; ask for more with a higher limit, or for a state", n)
	} else if len(recent) >= recentJobs {
		out.Cut = fmt.Sprintf("only about the last %d jobs that ended are looked through", recentJobs)
	}
	return out
}

// results gives a part of a job's results. A cursor is a place in this
// coordinator's list of what has ended; one of another coordinator, or of an earlier
// life, begins anew. Where there is no such list any more, it is a task's number.
func (s *jobs) results(ctx context.Context, id, after string, wait time.Duration) (api.JobResults, error) {
	ctx, cancel := context.WithTimeout(ctx, wait+callLimit/2)
	defer cancel()
	due := time.NewTimer(wait)
	defer due.Stop()
	for {
		s.mu.Lock()
		p := s.open[id]
		var news <-chan struct{}
		if p != nil {
			news = p.changed
		}
		s.mu.Unlock()
		row, err := s.find(ctx, id) // after that: what changes from now on is news
		if err != nil {
			return api.JobResults{}, err
		}
		if p == nil && !row.State.Terminal() { // it was made this moment, elsewhere
			s.mu.Lock()
			s.progressOf(id)
			s.mu.Unlock()
			continue
		}
		var some []int32
		from, next := 0, ""
		all := 0
		if p != nil {
			s.mu.Lock()
			if at, ok := strings.CutPrefix(after, s.self+"-"); ok {
				from, _ = strconv.Atoi(at)
			}
			from = min(max(from, 0), len(p.ended))
			some = slices.Clone(p.ended[from:min(len(p.ended), from+resultsAtOnce)])
			s.mu.Unlock()
			next = s.self + "-"
		} else {
			if at, ok := strings.CutPrefix(after, "i-"); ok {
				from, _ = strconv.Atoi(at)
			}
			from = min(max(from, 0), row.Tasks)
			for i := from; i < min(row.Tasks, from+resultsAtOnce); i++ {
				some = append(some, int32(i))
			}
			all, next = row.Tasks, "i-"
		}
		if len(some) == 0 && !row.State.Terminal() {
			select {
			case <-news:
				continue
			case <-due.C:
				wait = 0
			case <-ctx.Done():
			}
			return api.JobResults{Results: []api.JobResult{}, Next: next + strconv.Itoa(from), State: s.view(row, false).State}, nil
		}
		out := api.JobResults{State: row.State}
		taken, err := s.read(ctx, row, some, &out)
		if err != nil {
			return out, err
		}
		if p != nil {
			s.mu.Lock()
			all = len(p.ended)
			s.mu.Unlock()
		}
		out.Next, out.More = next+strconv.Itoa(from+taken), from+taken < all
		return out, nil
	}
}

// read takes up results until there is enough for one answer, and says how many
// tasks it has looked at.
func (s *jobs) read(ctx context.Context, row jobRow, tasks []int32, out *api.JobResults) (taken int, err error) {
	out.Results = []api.JobResult{}
	size := 0
	for part := range slices.Chunk(tasks, resultReaders) {
		got := make([]*api.JobResult, len(part))
		var g errgroup.Group
		for k, i := range part {
			g.Go(func() (err error) {
				got[k], err = s.result(ctx, row.ID, int(i))
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return taken, err
		}
		for _, r := range got {
			if r != nil {
				out.Results = append(out.Results, *r)
				size += len(r.Output) + len(r.Report)
			}
		}
		if taken += len(part); size > resultBytes {
			break
		}
	}
	return taken, nil
}

// result is one task that has ended; nil if it never began, or has not.
func (s *jobs) result(ctx context.Context, id string, i int) (*api.JobResult, error) {
	t, err := s.tasks.find(ctx, taskKey(id, i))
	if errors.Is(err, errNotFound) || err == nil && !t.State.Terminal() {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r := &api.JobResult{JobTask: t.view(id, i)}
	switch {
	case t.State != wire.Succeeded:
		return r, nil
	case r.Retracted():
		r.Problem = t.Unverified.Reason
		return r, nil
	}
	a := t.Attempts[t.Stands]
	r.Order, r.Device = a.Order, a.Device
	v, err := s.outbox.get(ctx, a.Device, a.Order)
	if err == nil {
		var got jobOutcome
		got, err = s.compute.collect(ctx, v)
		r.Result, r.Output, r.Report = got.result, got.output, v.Report
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		r.Problem = errText(err)
	}
	return r, nil
}

func (c *Coordinator) jobRoutes() []route {
	wait := param{"wait", "wait up to so many seconds", 0.0}
	return []route{
		{method: "GET", path: v1 + "/modules/{id}", needs: toRead, summary: "A module that was uploaded", out: bytes.Buffer{}, handle: c.getModule},
		{method: "PUT", path: v1 + "/modules/{id}", needs: toOperate, summary: "Upload a WebAssembly module", unlogged: true, in: bytes.Buffer{}, handle: c.putModule},
		{method: "POST", path: v1 + "/jobs", needs: toOperate, summary: "Begin a job, of one task or of many", in: api.JobSpec{}, out: api.Job{},
			handle: answerUpTo(maxJob, func(r *http.Request, q api.JobSpec) (api.Job, error) { return c.jobs.begin(r.Context(), q) })},
		{method: "GET", path: v1 + "/jobs", needs: toRead, summary: "List jobs, the newest first", out: api.JobList{},
			query: []param{{"state", "in this state", ""}, {"pending", "only what has not ended", false}, {"limit", "at most so many; default 100", 0}}, handle: c.listJobs},
		{method: "GET", path: v1 + "/jobs/{id}", needs: toRead, summary: "A job and how far it is", out: api.Job{}, query: []param{wait}, handle: c.getJob},
		{method: "GET", path: v1 + "/jobs/{id}/results", needs: toRead, summary: "What tasks of a job have come to, as they end", out: api.JobResults{},
			query: []param{wait, {"after", "from here on: what an answer gave as next", ""}}, handle: c.getResults},
		{method: "POST", path: v1 + "/jobs/{id}/cancel", needs: toOperate, summary: "Stop a job", in: api.CancelRequest{}, out: api.Job{},
			handle: answer(func(r *http.Request, q api.CancelRequest) (api.Job, error) {
				return c.jobs.cancel(r.Context(), r.PathValue("id"), q)
			})},
	}
}

// waitOf is how long a call wants to wait.
func waitOf(v url.Values) (time.Duration, error) {
	s := v.Get("wait")
	if s == "" {
		return 0, nil
	}
	seconds, err := strconv.ParseFloat(s, 64)
	if err != nil || !(seconds >= 0) {
		return 0, refuse(http.StatusBadRequest, "bad_wait", "wait must be a number of seconds, not %q", s)
	}
	return time.Duration(min(seconds, maxOrderWait.Seconds()) * float64(time.Second)), nil
}

func (c *Coordinator) listJobs(w http.ResponseWriter, r *http.Request) error {
	q, err := parseOrderQuery(r.URL.Query())
	if err == nil {
		writeJSON(w, http.StatusOK, c.jobs.list(api.JobQuery{State: q.State, Pending: q.Pending, Limit: q.Limit}))
	}
	return err
}

func (c *Coordinator) getJob(w http.ResponseWriter, r *http.Request) error {
	wait, err := waitOf(r.URL.Query())
	if err != nil {
		return err
	}
	id := r.PathValue("id")
	due := time.NewTimer(wait)
	defer due.Stop()
	for over := false; ; {
		changed, leave := c.jobs.rows.changed(id)
		row, err := c.jobs.find(r.Context(), id)
		if err != nil || over || row.State.Terminal() {
			leave()
			if err != nil {
				return err
			}
			v := c.jobs.view(row, true)
			if err := c.jobs.count(r.Context(), &v); err != nil {
				return err
			}
			writeJSON(w, http.StatusOK, v)
			return nil
		}
		select {
		case <-changed:
		case <-due.C:
			over = true
		case <-r.Context().Done():
			over = true
		}
		leave()
	}
}

func (c *Coordinator) getResults(w http.ResponseWriter, r *http.Request) error {
	wait, err := waitOf(r.URL.Query())
	if err != nil {
		return err
	}
	part, err := c.jobs.results(r.Context(), r.PathValue("id"), r.URL.Query().Get("after"), wait)
	if err == nil {
		writeJSON(w, http.StatusOK, part)
	}
	return err
}
