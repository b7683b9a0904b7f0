package api

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// JobSpec is what a job is to do. A job has one task, or, with Over, one for each
// file or chunk of many; each task is one run of the module.
type JobSpec struct {
	Module string            `json:"module"` // SHA-256, uploaded before
	Args   []string          `json:"args,omitempty"`
	Env    map[string]string `json:"env,omitempty"`
	// Input is standard input: a chunk of a file that is stored as it is. Only a
	// device that holds it can run the job.
	Input *JobChunk `json:"input,omitempty"`
	// Inputs are read as files, /in/NAME; one named [wire.Stdin] is standard input.
	Inputs  []JobInput `json:"inputs,omitempty"`
	Outputs []string   `json:"outputs,omitempty"` // names of what may be written, /out/NAME
	// Save keeps outputs as stored files: by name of the output, [wire.Stdout] among
	// them, the name of the file, in which {} stands for the task's name. An output
	// that is not saved is kept on its device for [OutputKept].
	Save   map[string]string `json:"save,omitempty"`
	Limits wire.JobLimits    `json:"limits,omitzero"`
	// Rank is from -[MaxRank] to [MaxRank]: of two jobs that wait, the higher goes first.
	Rank int `json:"rank,omitempty"`
	// Deadline is when results are of no use any more. Zero: after [JobLife].
	Deadline time.Time `json:"deadline,omitzero"`
	Live     bool      `json:"live,omitempty"` // give it the real time and real random numbers
	Needs    JobNeeds  `json:"needs,omitzero"`
	// Copies is how many devices run each task, to compare their results. 0: as Verify says.
	Copies int `json:"copies,omitempty"`
	// Verify is how a result is made sure of before it is given out. Empty: [VerifyAdaptive].
	Verify Verify `json:"verify,omitempty"`
	// Retries is how often a task is tried again where a device could not do it. 0:
	// [DefaultRetries]; below 0: not at all.
	Retries int      `json:"retries,omitempty"`
	Over    *JobOver `json:"over,omitempty"`
}

// Verify is how much makes a result good enough to be given out.
type Verify string

// What can be asked for.
const (
	// VerifyAdaptive believes devices that have earned it; a result of any other is
	// compared with one of another owner's device.
	VerifyAdaptive Verify = "adaptive"
	// VerifyAlways gives nothing out that not two owners, or the coordinator by its own
	// run, stand behind. A task that can have neither waits.
	VerifyAlways Verify = "always"
	// VerifyNone takes the first result.
	VerifyNone Verify = "none"
)

// VerifiedBy is who stands behind a result beside the device that gave it.
type VerifiedBy string

// Those who can stand behind a result.
const (
	ByOwners      VerifiedBy = "owners"      // devices of two owners or more have the same, and none another
	ByCoordinator VerifiedBy = "coordinator" // it has run the job itself, and has the same
	ByReputation  VerifiedBy = "reputation"  // the device alone, whose results were confirmed often enough
	ByMost        VerifiedBy = "most"        // devices differ, the coordinator cannot run the job, and most have this
	ByNobody      VerifiedBy = "nobody"      // see [JobTask].Unverified
)

// VerifiedBys are all of them.
var VerifiedBys = []VerifiedBy{ByOwners, ByCoordinator, ByReputation, ByMost, ByNobody}

// Codes of why nobody stands behind a result.
const (
	UnverifiedLive       = "live"           // it depends on time and chance, so no two are alike
	UnverifiedDeviceData = "device_data"    // it is made of what that device alone has
	UnverifiedNotWanted  = "not_wanted"     // [VerifyNone]
	UnverifiedNoOther    = "no_other_owner" // no device of another owner could do it
	UnverifiedCaught     = "caught"         // its device, or one that had the same, was caught lying since, and it could not be run again
	UnverifiedDoubtful   = "doubtful"       // the coordinator has another, but also another engine, and nobody could vouch for either
	UnverifiedRetracted  = "retracted"      // it is wrong, and no right one could be had: it is not given out any more
)

// Correction is a result that was given out and was wrong.
type Correction struct {
	At     time.Time     `json:"at"`
	Order  string        `json:"order"` // whose signed report had it
	Device wire.DeviceID `json:"device"`
	Result string        `json:"result"` // its digest, as [JobAttempt].Result
	Reason string        `json:"reason"`
}

// JobChunk is one chunk of a stored file.
type JobChunk struct {
	Object string `json:"object"`
	Chunk  int    `json:"chunk"` // index in the file, from 0
}

// JobInput is a named input; exactly one of its sources is given.
type JobInput struct {
	Name    string               `json:"name"`
	Object  string               `json:"object,omitempty"`  // a whole file that is stored as it is
	Dataset string               `json:"dataset,omitempty"` // of the device's owner, see [wire.JobInput]
	Sensors *wire.HistoryRequest `json:"sensors,omitempty"`
}

// JobNeeds narrows which devices may run a job, beside its limits and inputs.
type JobNeeds struct {
	Device wire.DeviceID `json:"device,omitempty"` // this one alone
	Arch   string        `json:"arch,omitempty"`   // as Go names it
	// Compiled wants modules compiled to machine code: an interpreter is some 60
	// times slower.
	Compiled bool `json:"compiled,omitempty"`
}

// JobOver makes one task of each of many stored files, or of each of their chunks, or of
// each of many lists of arguments.
type JobOver struct {
	Prefix string   `json:"prefix,omitempty"` // of the names of files
	Names  []string `json:"names,omitempty"`
	// PerChunk makes a task of each chunk, which is standard input.
	PerChunk bool `json:"per_chunk,omitempty"`
	// As gives each task its whole file as the input of this name. Without it the file
	// is standard input.
	As string `json:"as,omitempty"`
	// Args has, instead of files, the arguments of each task, which come after those of
	// all. Tasks are named by their places in it, from 1.
	Args [][]string `json:"args,omitempty"`
}

const (
	// JobLife is how long a job may take if nobody says.
	JobLife = 7 * 24 * time.Hour
	// OutputKept is how long a named output is kept that was not saved.
	OutputKept = 7 * 24 * time.Hour
	// MaxRank is the highest rank of a job; the lowest is as far below 0.
	MaxRank = 10
	// DefaultRetries is how often a task is tried again.
	DefaultRetries = 3
	// MaxTasks bounds the tasks of a job.
	MaxTasks = 10_000
	// MaxArgsText bounds [JobOver].Args of a job, and MaxSpecText its other arguments and
	// environment together with those of one task: bytes of all of them, without what
	// JSON adds.
	MaxArgsText = 1 << 20
	MaxSpecText = 64 << 10
	// MaxCopies bounds [JobSpec].Copies.
	MaxCopies = 16
)

// Job is a job and how far it is.
type Job struct {
	ID      string     `json:"id"`
	Spec    JobSpec    `json:"spec"`
	State   wire.State `json:"state"` // RUNNING from its first task on
	Code    string     `json:"code,omitempty"`
	Reason  string     `json:"reason,omitempty"` // why it ended so
	By      string     `json:"by,omitempty"`     // operator
	Created time.Time  `json:"created"`
	Ended   time.Time  `json:"ended,omitzero"`
	JobCounts
	// Waits is why the first of the tasks that wait does, as the coordinator that
	// places them sees it.
	Waits *JobWait `json:"waits,omitempty"`
	// Verified counts the tasks that have succeeded by who stands behind them. Lists leave
	// it, and what follows, out.
	Verified map[VerifiedBy]int `json:"verified,omitempty"`
	// Corrected counts those of them whose first result was wrong.
	Corrected int `json:"corrected,omitempty"`
	// Wrong are those whose result was wrong, at most [MaxOpenShown].
	Wrong []JobTask `json:"wrong,omitempty"`
	// Open are tasks that run now, at most [MaxOpenShown], the oldest first.
	Open []JobTask `json:"open,omitempty"`
}

// MaxOpenShown bounds [Job].Open and [Job].Wrong.
const MaxOpenShown = 100

// JobCounts counts the tasks of a job.
type JobCounts struct {
	Tasks     int `json:"tasks"`
	Running   int `json:"running"`
	Succeeded int `json:"succeeded"`
	Failed    int `json:"failed"` // and timed out, and canceled
}

// JobWait is why something waits.
type JobWait struct {
	Code   string `json:"code"` // stable, for machines
	Reason string `json:"reason"`
}

// JobTask is a task and who has run it.
type JobTask struct {
	Job   string     `json:"job"`
	Task  int        `json:"task"`           // from 0
	Name  string     `json:"name,omitempty"` // of the file, or of file and chunk, that it is over
	Args  []string   `json:"args,omitempty"` // of [JobOver].Args
	State wire.State `json:"state"`
	Code  string     `json:"code,omitempty"`
	// Reason is why it ended so; of one that has succeeded, what is to be said of the
	// other results.
	Reason   string       `json:"reason,omitempty"`
	Ended    time.Time    `json:"ended,omitzero"`
	Attempts []JobAttempt `json:"attempts,omitempty"`
	// VerifiedBy is who stands behind the result, of a task that has succeeded; Checking
	// says that it is out, and looked at once more.
	VerifiedBy  VerifiedBy   `json:"verified_by,omitempty"`
	Unverified  *JobWait     `json:"unverified,omitempty"` // why nobody does
	Checking    bool         `json:"checking,omitempty"`
	Corrections []Correction `json:"corrections,omitempty"` // the newest last
}

// Retracted tells whether the result that was given out is known to be wrong, and there is
// no other.
func (t JobTask) Retracted() bool {
	return t.Unverified != nil && t.Unverified.Code == UnverifiedRetracted
}

// JobAttempt is one order that a task was given to a device by.
type JobAttempt struct {
	Order     string        `json:"order"`
	Device    wire.DeviceID `json:"device"`
	Began     time.Time     `json:"began"`
	Ended     time.Time     `json:"ended,omitzero"` // zero: it has not
	State     wire.State    `json:"state,omitempty"`
	Code      string        `json:"code,omitempty"`
	Reason    string        `json:"reason,omitempty"`
	Engine    string        `json:"engine,omitempty"`    // that made the result, as in [wire.JobResult]
	Result    string        `json:"result,omitempty"`    // digest over all outputs, hex: the same of the same result
	Disturbed bool          `json:"disturbed,omitempty"` // the device stopped it meanwhile, which its module may have seen
	CPU       float64       `json:"cpu_seconds,omitempty"`
	Wall      float64       `json:"wall_seconds,omitempty"`
	Progress  float64       `json:"progress,omitempty"`      // 0 to 1, while it runs
	Retry     int64         `json:"retry_seconds,omitempty"` // the device refused for so long: that counts as no failure
}

// JobResult is a task that has ended. Of one that has succeeded there is the result
// that stands, and who has signed for it.
type JobResult struct {
	JobTask
	Order  string         `json:"order,omitempty"`
	Device wire.DeviceID  `json:"device,omitempty"`
	Result wire.JobResult `json:"result,omitzero"`
	Output []byte         `json:"output,omitempty"` // standard output
	Report []byte         `json:"report,omitempty"` // the device's signed report, a DSSE envelope
	// Problem is why the result, which was there, cannot be given any more, or is not as it
	// is wrong.
	Problem string `json:"problem,omitempty"`
}

// JobResults is a part of the results of a job, in the order in which they came.
// After a restart of the coordinator what was given before may come again.
type JobResults struct {
	Results []JobResult `json:"results"`
	Next    string      `json:"next"` // where the next part begins
	// State is the job's; with a state that is final, More says whether there are
	// further results.
	State wire.State `json:"state"`
	More  bool       `json:"more,omitempty"`
}

// JobList is a part of all jobs, the newest first.
type JobList struct {
	Jobs []Job  `json:"jobs"`
	Cut  string `json:"cut,omitempty"` // a sentence: why there may be more
}

// JobQuery says which jobs are meant.
type JobQuery struct {
	State   wire.State
	Pending bool // only those that have not ended
	Limit   int  // 0 for [DefaultOrders]
}

func jobPath(id string) string { return "jobs/" + segment(id) }

// StartJob begins a job, which goes on without who asked.
func (c *Client) StartJob(ctx context.Context, s JobSpec) (Job, error) {
	return ask[Job](ctx, c, http.MethodPost, "jobs", nil, s)
}

// Jobs lists jobs, the newest first.
func (c *Client) Jobs(ctx context.Context, q JobQuery) (JobList, error) {
	v := url.Values{}
	if q.State != "" {
		v.Set("state", string(q.State))
	}
	if q.Pending {
		v.Set("pending", "true")
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return ask[JobList](ctx, c, http.MethodGet, "jobs", v, nil)
}

// Job shows a job, after waiting up to wait for its end.
func (c *Client) Job(ctx context.Context, id string, wait time.Duration) (Job, error) {
	return ask[Job](ctx, c, http.MethodGet, jobPath(id), waitQuery(wait), nil)
}

func waitQuery(wait time.Duration) url.Values {
	return url.Values{"wait": {strconv.FormatFloat(wait.Seconds(), 'f', 1, 64)}}
}

// AwaitJob waits until a job has ended. onChange, if not nil, sees each answer on
// the way.
func (c *Client) AwaitJob(ctx context.Context, id string, onChange func(Job)) (Job, error) {
	wait := longPoll
	if onChange != nil {
		wait = time.Second // somebody watches
	}
	for {
		j, err := patiently(ctx, func() (Job, error) { return c.Job(ctx, id, wait) })
		if err != nil || j.State.Terminal() {
			return j, err
		}
		if onChange != nil {
			onChange(j)
		}
	}
}

// JobResults gives results from where after says on, "" for the beginning. It waits
// up to wait if there is none yet.
func (c *Client) JobResults(ctx context.Context, id, after string, wait time.Duration) (JobResults, error) {
	q := waitQuery(wait)
	if after != "" {
		q.Set("after", after)
	}
	return ask[JobResults](ctx, c, http.MethodGet, jobPath(id)+"/results", q, nil)
}

// EachJobResult gives each result of a job once, as they come, until the job has
// ended or take returns an error. poll, if not nil, is called after each answer.
func (c *Client) EachJobResult(ctx context.Context, id string, take func(JobResult) error, poll func()) error {
	seen := make([]uint64, (MaxTasks+63)/64) // what was given before may come again
	wait := longPoll
	if poll != nil {
		wait = time.Second
	}
	for after := ""; ; {
		part, err := patiently(ctx, func() (JobResults, error) { return c.JobResults(ctx, id, after, wait) })
		if err != nil {
			return err
		}
		for _, r := range part.Results {
			if r.Task < 0 || r.Task >= MaxTasks || seen[r.Task/64]&(1<<(r.Task%64)) != 0 {
				continue
			}
			seen[r.Task/64] |= 1 << (r.Task % 64)
			if err := take(r); err != nil {
				return err
			}
		}
		if poll != nil {
			poll()
		}
		if part.State.Terminal() && !part.More {
			return nil
		}
		after = part.Next
	}
}

// How long and how often a coordinator is asked that cannot be reached: it may be
// starting anew, and jobs go on after that.
const (
	patience   = 5 * time.Minute
	askedAgain = 500 * time.Millisecond
)

// patiently repeats a call that a coordinator which is not there, or is being
// stopped, has not answered.
func patiently[T any](ctx context.Context, call func() (T, error)) (T, error) {
	for end := time.Now().Add(patience); ; {
		v, err := call()
		var refused *Error
		switch {
		case err == nil || ctx.Err() != nil || time.Now().After(end):
			return v, err
		case errors.As(err, &refused) && refused.Status != http.StatusServiceUnavailable && refused.Status != http.StatusGatewayTimeout:
			return v, err
		}
		select {
		case <-time.After(askedAgain):
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
}

// CancelJob stops a job: what waits is not begun, what runs is told to stop.
func (c *Client) CancelJob(ctx context.Context, id string, r CancelRequest) (Job, error) {
	return ask[Job](ctx, c, http.MethodPost, jobPath(id)+"/cancel", nil, r)
}

// RunJob runs a job of one task and waits for its result.
func (c *Client) RunJob(ctx context.Context, s JobSpec) (JobResult, error) {
	j, err := c.StartJob(ctx, s)
	if err != nil {
		return JobResult{}, err
	}
	return c.JobOutcome(ctx, j.ID)
}

// JobOutcome waits for the end of a job of one task. A job that did not succeed is an
// error, a [*wire.Problem].
func (c *Client) JobOutcome(ctx context.Context, id string) (out JobResult, err error) {
	err = c.EachJobResult(ctx, id, func(r JobResult) error {
		out = r
		return nil
	}, nil)
	if err != nil {
		return out, err
	}
	if out.State == "" { // it ended before its task began
		j, err := c.Job(ctx, id, 0)
		if err != nil {
			return out, err
		}
		out.JobTask = JobTask{Job: id, State: j.State, Code: j.Code, Reason: j.Reason}
	}
	return out, out.Err()
}

// Err is nil of a task whose result is there.
func (r JobResult) Err() error {
	switch {
	case r.State != wire.Succeeded:
		return &wire.Problem{State: r.State, Code: r.Code, Reason: r.Reason}
	case r.Problem != "":
		return &wire.Problem{State: r.State, Code: wire.CodeExpired, Reason: r.Problem}
	}
	return nil
}
