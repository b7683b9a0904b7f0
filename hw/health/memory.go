package health

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
)

// What is remembered over restarts, in the file memory.json: which disks there
// were, what is usual for each, how its counters and its wear have grown, and
// what has happened in the last day.
//
// Its time is "run": hours that the agent has watched this machine, by the
// monotonic clock, summed over restarts. The wall clock of a device may be wrong
// by years and jump; this one is only ever a little short, by what was lost with
// a power cut and what passed while the agent did not run.
//
// It is written every saveEvery, when a disk is new (at most once an hour), when
// something happens that is remembered for a day, and at the end. That is about
// 2 kB a disk, 8 kB a day for each: nothing that wears out flash.
type memory struct {
	Format int                    `json:"format"`
	Run    float64                `json:"run"`   // hours
	Disks  map[string]*diskMemory `json:"disks"` // by Subject
	Events map[string]event       `json:"events,omitempty"`
	// Battery is the boot in which the clock showed that its battery is empty:
	// later in that boot the kernel has set it.
	Battery string `json:"battery,omitempty"`
	// Writable are the folders that could be written to, with the mount point that they were on.
	Writable map[string]string `json:"writable,omitempty"`
}

// event is something that happened, by code and subject.
type event struct {
	Run    float64 `json:"run"` // when
	Boot   string  `json:"boot,omitempty"`
	Detail string  `json:"detail"`
	Over   bool    `json:"over,omitempty"` // no longer shown

	// At is when, by the wall clock as it was when this was last saved by the agent
	// that noticed it; zero if that showed a time long ago.
	At      time.Time `json:"at,omitzero"`
	noticed time.Time // with the monotonic clock; zero if by an agent before this one
}

// clockEpoch is before each day on which this can run: a clock that shows less
// has never been set.
var clockEpoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// dated is e with the wall clock's time, which may have been set since e was noticed.
func (e event) dated() event {
	if e.noticed.IsZero() {
		return e
	}
	e.At = time.Now().UTC().Round(0).Add(-time.Since(e.noticed)).Truncate(time.Second)
	if e.At.Before(clockEpoch) {
		e.At = time.Time{}
	}
	return e
}

// diskMemory is one disk, there or not.
type diskMemory struct {
	Name       string   `json:"name"` // kernel name, the last time
	Model      string   `json:"model,omitempty"`
	Fixed      bool     `json:"fixed,omitempty"` // is missed when it is gone
	Rotational bool     `json:"rotational,omitempty"`
	Bus        string   `json:"bus,omitempty"`
	Seen       float64  `json:"seen"`           // run, the last time
	Gone       float64  `json:"gone,omitempty"` // run since it is not there; 0 while it is
	Holds      []string `json:"holds,omitempty"`

	Reallocated counter `json:"reallocated,omitzero"`
	Pending     counter `json:"pending,omitzero"`
	Media       counter `json:"media,omitzero"`
	CRC         counter `json:"crc,omitzero"`
	Unsafe      counter `json:"unsafe,omitzero"`
	Wear        wearing `json:"wear,omitzero"`

	Read  usual   `json:"read,omitzero"`
	Write usual   `json:"write,omitzero"`
	Flush usual   `json:"flush,omitzero"`
	Best  float64 `json:"best,omitempty"` // bytes a second that it has moved, nearly the most
}

const (
	memoryFormat = 1
	maxMemory    = 8 << 20 // bytes of the file
	maxDisks     = 1024
	maxEvents    = 64
	maxHolds     = 8
	maxWritable  = 256
	maxEdges     = 16
	maxMarks     = 14
	maxRun       = 1e6 // hours, over a hundred years
	saveEvery    = 6 * time.Hour
)

func newMemory() *memory {
	return &memory{Format: memoryFormat, Disks: map[string]*diskMemory{}, Events: map[string]event{}, Writable: map[string]string{}}
}

// loadMemory returns a new memory if there is none. If it cannot be used, it
// returns a new one and why.
func loadMemory(path string) (*memory, error) {
	raw, err := durable.ReadFile(path, maxMemory)
	if errors.Is(err, fs.ErrNotExist) {
		return newMemory(), nil
	}
	if err != nil {
		return newMemory(), err
	}
	return decodeMemory(raw)
}

func decodeMemory(raw []byte) (*memory, error) {
	m := newMemory()
	m.Format = 0
	if err := json.Unmarshal(raw, m); err != nil {
		return newMemory(), fmt.Errorf("it is damaged: %w", err)
	}
	if m.Format != memoryFormat {
		return newMemory(), fmt.Errorf("its format is %d, not %d", m.Format, memoryFormat)
	}
	m.sanitise()
	return m, nil
}

// sanitise drops what this program would not have written.
func (m *memory) sanitise() {
	m.Run = within(m.Run, 0, maxRun)
	if m.Disks == nil {
		m.Disks = map[string]*diskMemory{}
	}
	if m.Events == nil {
		m.Events = map[string]event{}
	}
	for name, d := range m.Disks {
		if d == nil || name == "" || name != label(name, maxSubject) || len(m.Disks) > maxDisks {
			delete(m.Disks, name)
			continue
		}
		d.sanitise(m.Run)
	}
	for k, e := range m.Events {
		if _, ok := byCode[eventKey(k).code]; !ok || !(e.Run >= 0 && e.Run <= m.Run) || len(m.Events) > maxEvents {
			delete(m.Events, k)
			continue
		}
		e.Boot, e.Detail = label(e.Boot, 64), label(e.Detail, maxDetail)
		m.Events[k] = e
	}
	m.Battery = label(m.Battery, 64)
	if m.Writable == nil || len(m.Writable) > maxWritable {
		m.Writable = map[string]string{}
	}
}

func (d *diskMemory) sanitise(run float64) {
	d.Name, d.Model, d.Bus = label(d.Name, 32), label(d.Model, 64), label(d.Bus, 16)
	d.Seen, d.Gone = within(d.Seen, 0, run), within(d.Gone, 0, run)
	d.Holds = d.Holds[:min(len(d.Holds), maxHolds)]
	for _, c := range d.counters() {
		c.At = within(c.At, 0, run)
	}
	for _, u := range []*usual{&d.Read, &d.Write, &d.Flush} {
		if !(u.Log >= minLog && u.Log <= maxLog) {
			*u = usual{}
		}
	}
	d.Best = within(d.Best, 0, maxRate)
	d.Wear.sanitise(run)
}

func (d *diskMemory) counters() []*counter {
	return []*counter{&d.Reallocated, &d.Pending, &d.Media, &d.CRC, &d.Unsafe}
}

// within is v, or low if v is not from low to high.
func within(v, low, high float64) float64 {
	if v >= low && v <= high { // false for NaN
		return v
	}
	return low
}

// room forgets the disks that were not seen for longest, so that one more fits.
func (m *memory) room() {
	for len(m.Disks) >= maxDisks {
		oldest := ""
		for name, d := range m.Disks {
			if o := m.Disks[oldest]; o == nil || d.Seen < o.Seen || d.Seen == o.Seen && name < oldest {
				oldest = name
			}
		}
		delete(m.Disks, oldest)
	}
}

// counter tells how much a disk's own count of something bad has grown of late.
// One odd reading changes nothing: growth and decrease count when two readings
// in a row show them.
type counter struct {
	Known bool    `json:"known,omitempty"`
	Last  uint64  `json:"last,omitempty"`
	Grew  uint64  `json:"grew,omitempty"`
	At    float64 `json:"at,omitempty"` // run of the newest growth

	before *uint64 // the reading before
}

// observe takes a reading; what grew is forgotten when nothing was added for
// window hours. falls says that the count may become less. That of one that is kept for
// life cannot: what is below its highest reading is a mistake.
func (c *counter) observe(v uint64, run, window float64, falls bool) {
	defer func() { c.before = &v }()
	switch {
	case !c.Known:
		c.Known, c.Last = true, v
	case c.before == nil:
	case v > c.Last && *c.before > c.Last:
		sure := min(v, *c.before)
		c.Grew, c.At, c.Last = c.Grew+(sure-c.Last), run, sure
		if c.Grew > math.MaxUint32 {
			c.Grew = math.MaxUint32
		}
	case falls && v < c.Last && *c.before < c.Last:
		c.Last = max(v, *c.before)
	}
	if run-c.At > window {
		c.Grew = 0
	}
}

// usual learns what a latency usually is: the median, followed slowly.
type usual struct {
	Log float64 `json:"log,omitempty"` // natural logarithm of milliseconds
	N   uint32  `json:"n,omitempty"`   // samples
}

const (
	minLog     = -12 // nanoseconds
	maxLog     = 17  // hours
	learnMean  = 64  // samples until the mean is good enough to tell what is bad
	learnJudge = 128 // samples until it is judged by
	learnStep  = 1e-4
	learnBelow = 4 // times the usual; what is above is not learned
)

// learn takes one sample in ms. The first ones make a geometric mean; from there
// on it moves by 0.01% towards each: it follows what changes over months of
// work, not what grows bad in a day. What is far above it is not learned at all.
func (u *usual) learn(ms float64) {
	x := min(max(math.Log(ms), minLog), maxLog)
	switch {
	case u.N < learnMean:
		u.Log += (x - u.Log) / float64(u.N+1)
	case x > u.Log+math.Log(learnBelow):
		return
	case x > u.Log:
		u.Log += learnStep
	case x < u.Log:
		u.Log -= learnStep
	}
	if u.N < math.MaxUint32 {
		u.N++
	}
}

func (u *usual) ms() float64 { return math.Exp(u.Log) }

// wearing is how a disk was used up over time. The rated life is told in whole
// percents (eMMC: in tens), so time is measured from one step to another:
// between two steps exactly as much was used as the difference says, where
// between two readings it may be nearly a step more or less.
type wearing struct {
	Edges []edge `json:"edges,omitempty"` // each first reading of a higher value, oldest first
	Marks []edge `json:"marks,omitempty"` // one reading a day, for what is written of late

	before *float64
}

// edge is one reading.
type edge struct {
	Run     float64 `json:"run"`
	Hours   float64 `json:"hours,omitempty"` // the disk's own power-on hours; 0 if it does not say
	Wear    float64 `json:"wear"`            // percent
	Written float64 `json:"written,omitempty"`
}

// since is how many hours have passed from e to later. Both clocks can only be
// short (ours by the time that the agent did not run, the disk's by the time
// that it slept), so the longer is the better.
func (e edge) since(later edge) float64 {
	own := later.Run - e.Run
	if e.Hours > 0 && later.Hours > 0 {
		return max(own, later.Hours-e.Hours)
	}
	return own
}

func (w *wearing) sanitise(run float64) {
	good := func(list []edge, most int) []edge {
		list = slices.DeleteFunc(list, func(e edge) bool {
			return !(e.Run >= 0 && e.Run <= run && e.Hours >= 0 && e.Hours <= maxRun && e.Wear >= 0 && e.Wear <= 255 && e.Written >= 0 && e.Written <= 1e21)
		})
		list = list[max(0, len(list)-most):]
		if len(list) == 0 || !slices.IsSortedFunc(list, func(a, b edge) int { return cmp.Compare(a.Run, b.Run) }) {
			return nil
		}
		return list
	}
	w.Edges, w.Marks = good(w.Edges, maxEdges), good(w.Marks, maxMarks)
}

// observe takes one reading. The first edge is not one: nobody saw the step.
func (w *wearing) observe(e edge) {
	sure := w.before != nil && *w.before == e.Wear
	w.before = &e.Wear
	if !sure {
		return
	}
	n := len(w.Edges)
	switch {
	case n == 0 || e.Wear < w.Edges[n-1].Wear: // the first, or another disk's figures
		w.Edges, w.Marks = []edge{e}, nil
	case e.Wear > w.Edges[n-1].Wear:
		if w.Edges = append(w.Edges, e); len(w.Edges) > maxEdges {
			w.Edges = w.Edges[1:]
		}
	}
	if n = len(w.Marks); n > 0 && e.Written < w.Marks[n-1].Written {
		w.Marks = nil
	}
	if n = len(w.Marks); n == 0 || e.Run-w.Marks[n-1].Run >= 24 {
		if w.Marks = append(w.Marks, e); len(w.Marks) > maxMarks {
			w.Marks = w.Marks[1:]
		}
	}
}

const week = 7 * 24.0 // hours

// remaining is how many hours the rated life lasts on, if it is used up as of
// late; false if less than a week, or less than one percent between two steps, was seen.
func (w *wearing) remaining(now edge) (float64, bool) {
	if len(w.Edges) < 3 {
		return 0, false
	}
	first, last := w.Edges[1], w.Edges[len(w.Edges)-1]
	span, used := first.since(last), last.Wear-first.Wear
	if span < week || used < 1 {
		return 0, false
	}
	rate := used / span
	// A step that is overdue tells that it is slower now.
	step := used / float64(len(w.Edges)-2)
	rate = min(rate, (used+step)/first.since(now))
	// What is written now, at the wear that writing has cost.
	if n := len(w.Marks); n > 0 && last.Written > first.Written && w.Marks[0].since(now) >= week && now.Written >= w.Marks[0].Written {
		rate = (now.Written - w.Marks[0].Written) / w.Marks[0].since(now) * used / (last.Written - first.Written)
	}
	if !(rate > 0) || math.IsInf(rate, 0) {
		return 0, false
	}
	return max(0, 100-now.Wear) / rate, true
}
