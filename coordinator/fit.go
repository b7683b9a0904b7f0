package coordinator

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// asked is what one task wants of a device.
type asked struct {
	name   string      // of the task
	args   []string    // of the task alone
	run    wire.JobRun // without addresses
	plain  bool        // a device that says nothing about jobs can do it
	orders int         // version of job orders that it takes
	chunks []api.Chunk // of its inputs, that can be fetched
	reads  int64       // bytes of stored files
	spools int64       // of those, bytes that a device keeps in files meanwhile
	needs  api.JobNeeds
}

// saidLimits are those of an order: the memory is said, so that every device has as much or
// is not asked.
func saidLimits(l wire.JobLimits) wire.JobLimits {
	if l.MemoryBytes <= 0 {
		l.MemoryBytes = wire.OrdinaryLimits.MemoryBytes
	}
	return l
}

// askedAs is what an order wants of its device, to be wanted of another one.
func askedAs(run wire.JobRun, needs api.JobNeeds) asked {
	a := asked{run: run, needs: needs}
	a.run.Inputs = slices.Clone(run.Inputs)
	for i, in := range a.run.Inputs { // what stands there is another's ticket
		a.run.Inputs[i].Parts = slices.Clone(in.Parts)
		for k, p := range in.Parts {
			a.run.Inputs[i].Parts[k].URL = ""
			a.chunks = append(a.chunks, api.Chunk{ID: p.Chunk, Size: p.Size})
		}
	}
	a.takes()
	return a
}

// takes notes what an agent must be able to do to take a task.
func (a *asked) takes() {
	if len(a.chunks) > inlineParts || slices.ContainsFunc(a.run.Inputs, func(in wire.JobInput) bool { return in.Name == wire.Stdin }) {
		a.orders = 1
	}
	a.plain = len(a.run.Env) == 0 && len(a.run.Inputs) == 0 && len(a.run.Outputs) == 0 && !a.run.Live
}

// resolve finds what a task wants by what is stored now.
func (s *jobs) resolve(row jobRow, files jobFiles, i int) (a asked, err error) {
	q := row.Spec
	a.needs = q.Needs
	a.run = wire.JobRun{Module: wire.Blob{SHA256: q.Module}, Args: q.Args, Env: q.Env, Outputs: q.Outputs, Limits: saidLimits(q.Limits), Rank: q.Rank, Live: q.Live}
	// Where it has to be done may not be where a chunk is.
	tied := q.Needs.Device != "" || slices.ContainsFunc(q.Inputs, func(in api.JobInput) bool { return in.Object == "" })
	object := func(name, as string) error {
		o, err := s.plain(name)
		switch {
		case err != nil:
			return err
		case as != wire.Stdin:
		case len(o.Chunks) == 0:
			return nil // an empty file is no input
		case len(o.Chunks) == 1 && !tied: // every device knows that, and who holds it need not fetch
			a.run.Input = o.Chunks[0].ID
			a.reads += o.Chunks[0].Size
			return nil
		}
		in := wire.JobInput{Name: as, Parts: make([]wire.JobPart, len(o.Chunks))}
		for k, ch := range o.Chunks {
			in.Parts[k] = wire.JobPart{Chunk: ch.ID, Size: ch.Size}
			a.reads += ch.Size
			a.spools += ch.Size
		}
		a.chunks = append(a.chunks, o.Chunks...)
		a.run.Inputs = append(a.run.Inputs, in)
		return nil
	}
	piece := func(name string, n int) error {
		o, err := s.plain(name)
		if err != nil {
			return err
		}
		if n >= len(o.Chunks) {
			return refuse(http.StatusBadRequest, "no_such_chunk", "%q has %d chunks, from 0 on: there is no chunk %d", name, len(o.Chunks), n)
		}
		a.run.Input = o.Chunks[n].ID
		a.reads += o.Chunks[n].Size
		return nil
	}
	if q.Input != nil {
		if q.Input.Chunk < 0 {
			return a, refuse(http.StatusBadRequest, "no_such_chunk", "chunks are counted from 0 on: there is no chunk %d", q.Input.Chunk)
		}
		if err := piece(q.Input.Object, q.Input.Chunk); err != nil {
			return a, err
		}
	}
	for _, in := range q.Inputs {
		if in.Object == "" {
			a.run.Inputs = append(a.run.Inputs, wire.JobInput{Name: in.Name, Dataset: in.Dataset, Sensors: in.Sensors})
			continue
		}
		if err := object(in.Object, in.Name); err != nil {
			return a, err
		}
	}
	switch {
	case files.Args != nil:
		a.name, a.args = strconv.Itoa(i+1), files.Args[i]
		a.run.Args = slices.Concat(q.Args, a.args)
	case q.Over != nil:
		file, n := files.of(i)
		a.name = file
		if n >= 0 {
			a.name = fmt.Sprintf("%s#%d", file, n)
		}
		if n >= 0 {
			err = piece(file, n)
		} else {
			err = object(file, cmp.Or(q.Over.As, wire.Stdin))
		}
		if err != nil {
			return a, err
		}
	}
	a.takes()
	return a, nil
}

// Of the parts of inputs: so many fit an order beside all else, with where to get them;
// if there are more, only so many of each file are in it, and those of longer ones in a
// list of their own.
const (
	inlineParts = 128
	inlineEach  = 4
)

// orderFor is the body of an order to a device, and how long that lives: of a task, and of
// what is to look like one. A device that says how it stands with jobs may let one stand still
// for as long as its owner wants, so it lives until the job's deadline; who hangs is found by
// that ([jobs.keepHouse]).
func (s *jobs) orderFor(ctx context.Context, order string, a asked, d jobDevice, deadline time.Time) (wire.JobRun, time.Duration, error) {
	left := max(deadline.Sub(s.now()), time.Second)
	life := min(lifeOfJob(a.run.Limits), left)
	if d.jobs != nil {
		life = min(left, maxLife)
	}
	body, err := s.body(ctx, order, a, d, deadline, life)
	return body, life, err
}

// body is a task's order to a device: what it does not hold it is told where to
// get. A device that says nothing about jobs is sent what every device understands.
func (s *jobs) body(ctx context.Context, order string, a asked, d jobDevice, deadline time.Time, life time.Duration) (wire.JobRun, error) {
	b := a.run
	if d.jobs == nil {
		return wire.JobRun{Args: b.Args, Input: b.Input, Limits: b.Limits}, nil
	}
	// A deadline that the order's own end comes before need not be said.
	if now := s.now(); deadline.Before(now.Add(life)) {
		b.Deadline = deadline
	}
	b.Inputs = slices.Clone(b.Inputs)
	for i := range b.Inputs {
		b.Inputs[i].Parts = slices.Clone(b.Inputs[i].Parts)
		for k, p := range b.Inputs[i].Parts {
			if !s.storage.holdsNow(d.id, p.Chunk) {
				b.Inputs[i].Parts[k].URL = s.compute.auth.issue(ticket{method: http.MethodGet, device: d.id, blob: blobRef{inputBlob, p.Chunk}, size: p.Size, expires: s.now().Add(life)})
			}
		}
		if in := &b.Inputs[i]; len(a.chunks) > inlineParts && len(in.Parts) > inlineEach {
			raw, err := json.Marshal(in.Parts)
			if err != nil {
				return b, err
			}
			sum := sha256.Sum256(raw)
			ref := blobRef{listBlob, hex.EncodeToString(sum[:])}
			if err := s.compute.staging.put(ctx, listName(order, ref.id), raw); err != nil {
				return b, err
			}
			u := s.compute.auth.issue(ticket{method: http.MethodGet, device: d.id, blob: ref, size: int64(len(raw)), expires: s.now().Add(life), order: order})
			in.Parts, in.List = nil, &wire.Blob{SHA256: ref.id, Size: int64(len(raw)), URL: u}
		}
	}
	return b, nil
}

// dropLists forgets the lists of an order that is over.
func (s *jobs) dropLists(ctx context.Context, o wire.Order) {
	b, err := wire.DecodeBody[wire.JobRun](o)
	if err != nil {
		return
	}
	for _, in := range b.Inputs {
		if in.List == nil {
			continue
		}
		if err := s.compute.staging.drop(ctx, listName(o.ID, in.List.SHA256)); err != nil && ctx.Err() == nil {
			s.log.Warn("the list of an input's chunks takes up room until tomorrow", "order", o.ID, "error", err)
		}
	}
}

// jobDevice is a device that is there, as the scheduler sees it.
type jobDevice struct {
	id    wire.DeviceID
	arch  string
	as    trust.Copy
	jobs  *wire.JobsState // nil: it does not say
	slots int
	trust float64
	why   *api.JobWait // it gets no jobs at all, and why
	rests *api.JobWait // it gets none for a moment
	// paused says that this is its owner's wish; nobody knows for how long.
	paused bool
	not    []trust.Doubt // modules that it gets no jobs of
}

// fleet is the devices that are there.
type fleet struct {
	all []jobDevice
	at  map[wire.DeviceID]int // in all
}

func newFleet(all []jobDevice) fleet {
	f := fleet{all, make(map[wire.DeviceID]int, len(all))}
	for i := range all {
		f.at[all[i].id] = i
	}
	return f
}

// find is one of the devices, nil if it is not there.
func (f fleet) find(d wire.DeviceID) *jobDevice {
	if i, ok := f.at[d]; ok {
		return &f.all[i]
	}
	return nil
}

// candidates are the devices among which one for a task can be: that which is named, or where
// an input has to be held, its holders. away is why it is none of the others, nil if there are none.
func (s *jobs) candidates(a asked, there fleet) (among []jobDevice, away *api.JobWait) {
	var ids []wire.DeviceID
	switch {
	case a.needs.Device != "":
		ids, away = []wire.DeviceID{a.needs.Device}, &api.JobWait{Code: "device", Reason: "is another device"}
	case a.run.Input != "" && a.needs.Arch == "": // else none of that architecture may be the nearer reason
		ids, away = s.storage.holdersOf(a.run.Input), &api.JobWait{Code: waitsHolder, Reason: "does not hold the input"}
	default:
		return there.all, nil
	}
	for _, id := range ids {
		if d := there.find(id); d != nil {
			among = append(among, *d)
		}
	}
	if len(among) == len(there.all) {
		away = nil
	}
	return among, away
}

// Codes of why tasks wait.
const (
	waitsNoDevice  = "no_device_online"
	waitsHolder    = "no_holder_online"
	waitsSlots     = "slots"
	waitsMismatch  = "no_device_fits"
	waitsBackoff   = "tried"
	chooseAmong    = 64
	plainSlots     = 1 // of a device that does not say how many it has
	interpreterTag = "interpreter"
)

// deviceNow is a device as the scheduler sees it; false if it is not there.
func (s *jobs) deviceNow(id wire.DeviceID) (jobDevice, bool) {
	s.plan.mu.Lock()
	defer s.plan.mu.Unlock()
	for _, d := range s.devices() {
		if d.id == id {
			return d, true
		}
	}
	return jobDevice{id: id}, false
}

// devices are those that are online.
func (s *jobs) devices() []jobDevice {
	var out []jobDevice
	now := s.now()
	for _, v := range s.reg.list() {
		if !v.Online {
			continue
		}
		st := s.honesty.standing(v.ID)
		d := jobDevice{id: v.ID, arch: v.Arch, as: s.honesty.copyAs(v.ID, st), jobs: v.Jobs, slots: plainSlots, trust: s.trust(v.ID, st), not: st.Doubts}
		switch {
		case !s.reg.mayWork(v.ID):
			d.why = &api.JobWait{Code: api.WarningDuplicateKey, Reason: "has a warning that keeps jobs from it"}
		case s.leaving(v.ID):
			d.why = &api.JobWait{Code: "drained", Reason: "is being drained"}
		case d.trust == 0:
			d.why = &api.JobWait{Code: "distrusted", Reason: "is not trusted, by its challenges"}
		}
		if d.jobs != nil {
			d.slots = max(d.jobs.Slots, 0)
			if p := d.jobs.Pause; p != nil {
				d.paused, d.rests = true, &api.JobWait{Code: p.Code, Reason: "lets jobs stand still, as its owner wants (" + p.Code + ")"}
			}
		}
		if r := s.plan.resting[d.id]; now.Before(r.until) {
			d.rests = &api.JobWait{Code: r.code, Reason: "failed lately (" + r.code + "), and is left alone for a while"}
		}
		out = append(out, d)
	}
	return out
}

// misfit is why a device cannot do a task, however much time it has; nil if it can.
// rank says how far it is from it: the higher, the nearer.
func (s *jobs) misfit(d *jobDevice, a asked) (why *api.JobWait, rank int) {
	n, l, j := a.needs, a.run.Limits, d.jobs
	no := func(rank int, code, format string, args ...any) (*api.JobWait, int) {
		return &api.JobWait{Code: code, Reason: fmt.Sprintf(format, args...)}, rank
	}
	if n.Device != "" && n.Device != d.id {
		return no(0, "device", "is another device")
	}
	if d.why != nil {
		return d.why, 1
	}
	if slices.ContainsFunc(d.not, func(x trust.Doubt) bool { return x.Module == a.run.Module.SHA256 }) {
		return no(1, "distrusted", "has had another result with this module than the coordinator, and gets no jobs of it for a while")
	}
	if n.Arch != "" && n.Arch != d.arch {
		return no(1, "arch", "is %s", d.arch)
	}
	if a.run.Input != "" && !s.storage.holdsNow(d.id, a.run.Input) {
		return no(2, waitsHolder, "does not hold the input")
	}
	if j == nil {
		if a.plain && !n.Compiled {
			return nil, 0
		}
		return no(3, "too_old", "has an agent that is too old for this, or runs no jobs")
	}
	if j.Orders < a.orders {
		return no(3, "too_old", "has an agent that is too old for this")
	}
	switch {
	case n.Compiled && strings.Contains(j.Engine, interpreterTag):
		return no(4, "engine", "only interprets modules")
	case l.MemoryBytes > j.MemoryBytes:
		return no(4, "memory", "gives a job %d bytes of memory", j.MemoryBytes)
	case l.WallSeconds > j.WallSeconds:
		return no(4, "wall_time", "gives a job %g s", j.WallSeconds)
	case j.InputBytes > 0 && a.reads > j.InputBytes:
		return no(4, "input", "lets a job read %d bytes, and this one reads %d or more", j.InputBytes, a.reads)
	case j.DiskBytes != nil && a.files(j) > *j.DiskBytes:
		return no(4, "disk", "has room on its disk for %d bytes of a job, and this one needs %d or more", *j.DiskBytes, a.files(j))
	case a.run.Live && !j.Live:
		return no(4, "live", "gives jobs neither the time nor random numbers")
	case d.slots == 0:
		return no(4, "policy", "runs no jobs now")
	}
	for _, in := range a.run.Inputs {
		name, _, _ := strings.Cut(in.Dataset, "/")
		if in.Dataset != "" && !slices.Contains(j.Datasets, name) {
			return no(3, "dataset", "has not opened the dataset %s", name)
		}
		if in.Sensors != nil && !j.Sensors {
			return no(3, "sensors", "does not open its sensors to jobs")
		}
	}
	return nil, 0
}

// files is how many bytes of its disk a device gives a task at least, or refuses it: its inputs,
// and what it may write if it has named outputs.
func (a asked) files(j *wire.JobsState) int64 {
	if len(a.run.Outputs) == 0 {
		return a.spools
	}
	out := a.run.Limits.OutputBytes
	if out <= 0 {
		out = wire.OrdinaryLimits.OutputBytes
	}
	if j.OutputBytes > 0 {
		out = min(out, j.OutputBytes)
	}
	return a.spools + out
}

// choice is a device for a task.
type choice struct {
	device *jobDevice
	moves  int64   // bytes
	free   float64 // share of its places
	same   bool    // its owner has a copy of the task already
	tried  bool    // it has failed at the task before
}

// choose picks the device for one more attempt at a task, or says why there is none.
// room is how many more tasks each device may have now. Company that a result is to have is
// drawn, so that who lies in league does not choose it, and is strictly another owner's.
func (s *jobs) choose(a asked, t taskRow, there fleet, room map[wire.DeviceID]int, strict bool) (best *choice, wait *api.JobWait) {
	var fit, again []choice // again: of who has said already that it is the module that fails
	blame := 0
	var near *api.JobWait
	nearest, able, away := -1, 0, 0
	devices, others := s.candidates(a, there)
	if others != nil && others.Code == waitsHolder {
		near, nearest, away = others, 2, len(there.all)-len(devices)
	}
	sent := s.sentTo(t, there)
	same := func(d *jobDevice) bool {
		return slices.ContainsFunc(sent, func(c trust.Copy) bool { return c.Owner == d.as.Owner })
	}
	// Of a task that nobody has had and nothing is to be moved for, one among some will do, from
	// anywhere on: it need not be looked at thousands.
	some, from := len(t.Attempts) == 0 && len(a.chunks) == 0, 0
	if some && len(devices) > chooseAmong {
		from = rand.IntN(len(devices))
	}
	for n := range devices {
		d := &devices[(from+n)%len(devices)]
		if some && len(fit) >= chooseAmong {
			break
		}
		why, rank := s.misfit(d, a)
		if why == nil && strict && same(d) {
			why, rank = &api.JobWait{Code: api.UnverifiedNoOther, Reason: "is of an owner who has this task already"}, 5
		}
		if why == nil && slices.ContainsFunc(t.Attempts, func(at api.JobAttempt) bool {
			return at.Device == d.id && (at.Ended.IsZero() || at.State == wire.Succeeded)
		}) {
			why, rank = &api.JobWait{Code: waitsBackoff, Reason: "has or had this task already"}, 5
		}
		if why != nil {
			if rank > nearest {
				near, nearest, away = why, rank, 1
			} else if rank == nearest && why.Code == near.Code {
				away++
			}
			continue
		}
		able++
		said := s.blamed(t, d.as.Owner, a.run.Limits)
		if said {
			blame++
		}
		if d.rests != nil {
			wait = d.rests
			continue
		}
		if room[d.id] <= 0 {
			continue
		}
		c := choice{device: d, free: share(room[d.id], s.plan.busy[d.id]+s.plan.others[d.id]), same: same(d)}
		c.tried = slices.ContainsFunc(t.Attempts, func(at api.JobAttempt) bool { return at.Device == d.id })
		if said {
			again = append(again, c)
		} else {
			fit = append(fit, c)
		}
	}
	if able == blame { // else another owner's device is to say the same, though it be busy now
		fit = again
	}
	if len(fit) == 0 {
		return nil, s.waitOf(a, able, len(there.all), away, near, wait)
	}
	for i := range fit {
		for _, ch := range a.chunks {
			if !s.storage.holdsNow(fit[i].device.id, ch.ID) {
				fit[i].moves += ch.Size
			}
		}
	}
	if len(sent) > 0 {
		from := make([]trust.Copy, len(fit))
		for i := range fit {
			from[i] = fit[i].device.as
		}
		if drawn := trust.Pick(from, sent, "", 1, rand.IntN); len(drawn) > 0 {
			return &fit[slices.IndexFunc(fit, func(c choice) bool { return c.device.id == drawn[0].Device })], nil
		}
	}
	rand.Shuffle(len(fit), func(i, j int) { fit[i], fit[j] = fit[j], fit[i] })
	c := slices.MinFunc(fit, func(x, y choice) int {
		return cmp.Or(truth(x.same)-truth(y.same), truth(x.tried)-truth(y.tried), cmp.Compare(x.moves, y.moves), cmp.Compare(y.free, x.free), cmp.Compare(y.device.trust, x.device.trust))
	})
	return &c, nil
}

// share is the free part of places, some of which are taken: who says that it has many is not
// asked first for that.
func share(free, taken int) float64 { return float64(free) / float64(free+taken) }

func truth(b bool) int {
	if b {
		return 1
	}
	return 0
}

// waitOf puts into words why no device takes a task.
func (s *jobs) waitOf(a asked, able, online, away int, near, rests *api.JobWait) *api.JobWait {
	d := a.needs.Device
	switch {
	case able > 0 && rests != nil:
		return &api.JobWait{Code: rests.Code, Reason: fmt.Sprintf("of %d that could do it, each is at work or %s", able, rests.Reason)}
	case able > 0:
		return &api.JobWait{Code: waitsSlots, Reason: fmt.Sprintf("waits for its turn: those that could do it (%d) are at work", able)}
	case d != "" && !s.reg.online(d):
		return &api.JobWait{Code: waitsNoDevice, Reason: fmt.Sprintf("device %s is not online", d)}
	case online == 0:
		return &api.JobWait{Code: waitsNoDevice, Reason: "no device is online"}
	case near == nil:
		return &api.JobWait{Code: waitsMismatch, Reason: "no device fits"}
	case near.Code == waitsHolder:
		return &api.JobWait{Code: waitsHolder, Reason: fmt.Sprintf("no device that is online and may run jobs holds the input chunk %s", a.run.Input)}
	case online == 1 || d != "":
		return &api.JobWait{Code: near.Code, Reason: "the one device that could be asked " + near.Reason}
	}
	return &api.JobWait{Code: near.Code, Reason: fmt.Sprintf("none of the %d devices that are online can do it; of the nearest (%d), each %s", online, away, near.Reason)}
}
