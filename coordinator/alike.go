package coordinator

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"path"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// # What a challenge is made of
//
// A device knows all that its customers have ever asked of it: modules, arguments, which parts
// make which file, what it holds and what it had to fetch. So a challenge is nothing that was
// made up, but a task of a customer that others have done: another of the same job, or the same
// over another file that lies beside; where a job has none of either, another job's.

// likeness is what a challenge is made of.
type likeness struct {
	asked    asked
	device   jobDevice
	deadline time.Time // of the customer's job
	data     reading
}

const (
	alikeTries = 64 // tasks of a job that are looked at
	readTries  = 4  // inputs that nobody else gives, before another challenge is tried later
)

// like finds what a challenge of a device is made of.
func (h *honesty) like(ctx context.Context, o owed) (l likeness, err error) {
	v, err := h.audits.outbox.get(ctx, o.Device, o.Order)
	if err != nil {
		return l, err
	}
	var there bool
	if l.device, there = h.jobs.deviceNow(o.Device); !there {
		return l, errors.New("the device has left")
	}
	if l.device.jobs == nil { // it may do another job than it is asked to, which would be called a lie
		return l, errors.New("its agent does not say how it stands with jobs")
	}
	had, err := h.hadBy(ctx, o.Device)
	if err != nil {
		return l, err
	}
	first, _ := parseTaskKey(v.Of)
	last := errors.New("the device has had all that others have done, or it would have to fetch what its customers' jobs do not")
	away := 0
	asked, err := wire.DecodeBody[wire.JobRun](v.Order)
	if err != nil {
		return l, err
	}
	moved := movedOf(asked.Inputs, func(in wire.JobInput) bool {
		return in.List != nil || slices.ContainsFunc(in.Parts, func(p wire.JobPart) bool { return p.URL != "" })
	})
	// What a device is given it mostly holds. So it has to fetch of a challenge the inputs that it
	// had to for the customer's job, and no others.
	for _, id := range h.modelsFrom(first) {
		row, files, err := h.jobs.model(ctx, id)
		if err != nil {
			last = err
			continue
		}
		for key, a := range h.jobs.alike(row, files) {
			if err := answerable(a.run); err != nil {
				last = err
				break // so are its others
			}
			moves := movedOf(a.run.Inputs, func(in wire.JobInput) bool {
				return slices.ContainsFunc(in.Parts, func(p wire.JobPart) bool { return !h.jobs.storage.holdsNow(o.Device, p.Chunk) })
			})
			if why, _ := h.jobs.misfit(&l.device, a); why != nil || !slices.Equal(moves, moved) || had(a.run) || !h.jobs.spare(ctx, key, o.Device) {
				continue
			}
			if l.data, err = h.readAll(ctx, a.run, o.Device); err != nil {
				if last, away = err, away+1; away >= readTries || ctx.Err() != nil {
					return l, err
				}
				continue
			}
			l.asked, l.deadline = a, row.Spec.Deadline
			h.madeOf(o.Device, a.run) // before the next is looked for
			return l, nil
		}
	}
	return l, fmt.Errorf("there is no job of a customer that a challenge could be made of: %w", last)
}

// movedOf are the names of inputs that a device has to fetch, or some of their parts.
func movedOf(inputs []wire.JobInput, fetches func(wire.JobInput) bool) (names []string) {
	for _, in := range inputs {
		if fetches(in) {
			names = append(names, in.Name)
		}
	}
	return names
}

// modelsFrom are the jobs that a challenge may be made of: the one after which it was drawn,
// and then the others of late, in any order.
func (h *honesty) modelsFrom(first string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if first != "" && !slices.Contains(h.models, first) {
		h.models = newestOf(append(h.models, first), modelsKept)
	}
	out := slices.Clone(h.models)
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	slices.SortStableFunc(out, func(x, y string) int { return truth(y == first) - truth(x == first) })
	return out
}

// model is a job that challenges can be made of.
func (s *jobs) model(ctx context.Context, id string) (row jobRow, files jobFiles, err error) {
	if row, err = s.rows.find(ctx, id); err != nil {
		return row, files, err
	}
	row.ID = id
	if !row.Spec.Deadline.After(s.now()) {
		return row, files, errors.New("its time is over")
	}
	if row.Spec.Over != nil {
		files, err = s.loadFiles(ctx, id)
	}
	return row, files, err
}

// alike are tasks that the customer of a job has given, in any order, and then such as he
// could have: over another file beside his own. The first have the key of their row.
func (s *jobs) alike(row jobRow, files jobFiles) iter.Seq2[string, asked] {
	return func(yield func(string, asked) bool) {
		from, step := rand.IntN(row.Tasks), 1
		if row.Tasks > alikeTries { // the device may have had all of a run of them
			step = 1 + rand.IntN(row.Tasks-1)
		}
		for n := range min(row.Tasks, alikeTries) {
			i := (from + n*step) % row.Tasks
			if a, err := s.resolve(row, files, i); err == nil && !yield(taskKey(row.ID, i), a) {
				return
			}
		}
		for _, other := range s.beside(row, files) {
			a, err := s.resolve(other.row, other.files, other.task)
			if err == nil && !yield("", a) {
				return
			}
		}
	}
}

// variant is a job as it would be over another file.
type variant struct {
	row   jobRow
	files jobFiles
	task  int
}

// beside are variants of a job over other files of the same folder and kind, of half to twice
// the size, and other chunks of the same. An input that is the same in each of the customer's
// jobs, as a model is, stays.
func (s *jobs) beside(row jobRow, files jobFiles) (out []variant) {
	q := row.Spec
	var with func(name string, chunks int)
	own := ""
	switch {
	case files.Args != nil:
		return nil
	case q.Over != nil && len(files.Names) > 0:
		own = files.Names[rand.IntN(len(files.Names))]
		with = func(name string, chunks int) {
			if slices.Contains(files.Names, name) {
				return
			}
			v := variant{row: row, files: jobFiles{Names: []string{name}}}
			if files.Chunks != nil {
				v.files.Chunks, v.task = []int{chunks}, rand.IntN(chunks)
			}
			out = append(out, v)
		}
	case q.Input != nil:
		own = q.Input.Object
		with = func(name string, chunks int) {
			v := variant{row: row}
			v.row.Spec.Input = &api.JobChunk{Object: name, Chunk: rand.IntN(chunks)}
			out = append(out, v)
		}
	default:
		k := s.varies(q)
		if k < 0 {
			return nil
		}
		own = q.Inputs[k].Object
		with = func(name string, _ int) {
			v := variant{row: row}
			v.row.Spec.Inputs = slices.Clone(q.Inputs)
			v.row.Spec.Inputs[k].Object = name
			out = append(out, v)
		}
	}
	size := int64(0)
	if o, err := s.plain(own); err == nil {
		size = o.Size
	}
	folder, kind := path.Dir(own), path.Ext(own)
	s.storage.objects.each(func(_ string, o api.Object) bool {
		if o.Code == nil && len(o.Chunks) > 0 && o.Size >= size/2 && o.Size <= 2*size && path.Dir(o.Name) == folder && path.Ext(o.Name) == kind {
			with(o.Name, len(o.Chunks))
		}
		return true
	})
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out[:min(len(out), alikeTries)]
}

// varies is which of a job's named inputs is another in another job of the same module that has not ended; the
// only one, if there is but one. -1: nobody knows.
func (s *jobs) varies(q api.JobSpec) int {
	var stored, other []int
	for k, in := range q.Inputs {
		if in.Object != "" {
			stored = append(stored, k)
		}
	}
	if len(stored) == 1 {
		return stored[0]
	}
	s.rows.each(func(_ string, v jobRow) bool {
		for _, k := range stored {
			if v.Spec.Module == q.Module && slices.ContainsFunc(v.Spec.Inputs, func(in api.JobInput) bool {
				return in.Name == q.Inputs[k].Name && in.Object != "" && in.Object != q.Inputs[k].Object
			}) {
				other = append(other, k)
			}
		}
		return true
	})
	if len(other) == 0 {
		return -1
	}
	return other[rand.IntN(len(other))]
}

// spare tells whether a task can be a challenge for a device: others have done it, so it will
// not come to this device as a customer's. What is no task yet can.
func (s *jobs) spare(ctx context.Context, key string, d wire.DeviceID) bool {
	if key == "" {
		return true
	}
	t, err := s.tasks.find(ctx, key)
	return err == nil && t.State.Terminal() && !slices.ContainsFunc(t.Attempts, func(a api.JobAttempt) bool { return a.Device == d })
}

// # What a device has had

// hadJobs are the newest jobs that a device was sent: who is sent the same twice, knows that
// one of the two was a challenge. Kept of devices that were challenged since the start, and
// found in their orders first.
type hadJobs struct {
	loaded bool
	// See hadKey, the oldest first; made are those that challenges were made of: customers'
	// jobs, which are many, do not push them out.
	keys, made []uint64
}

func (v *hadJobs) has(j wire.JobRun) bool {
	k := hadKey(j)
	return slices.Contains(v.keys, k) || slices.Contains(v.made, k)
}

// hadKey is the first 8 bytes of what makes one job the same as another.
func hadKey(j wire.JobRun) uint64 {
	same := wire.JobRun{Module: wire.Blob{SHA256: j.Module.SHA256}, Args: j.Args, Env: j.Env, Input: j.Input, Inputs: slices.Clone(j.Inputs)}
	for i, in := range same.Inputs {
		parts := make([]wire.JobPart, len(in.Parts))
		for k, p := range in.Parts {
			parts[k].Chunk = p.Chunk
		}
		same.Inputs[i].Parts = parts
	}
	raw, _ := json.Marshal(same) // it was made of JSON
	sum := sha256.Sum256(raw)
	return binary.BigEndian.Uint64(sum[:])
}

// given is told of each job that a device is sent.
func (h *honesty) given(d wire.DeviceID, j wire.JobRun) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if had := h.had[d]; had != nil {
		had.keys = newestOf(append(had.keys, hadKey(j)), hadKept)
	}
}

// madeOf notes that a challenge is made of a job.
func (h *honesty) madeOf(d wire.DeviceID, j wire.JobRun) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if had := h.had[d]; had != nil {
		had.made = newestOf(append(had.made, hadKey(j)), hadKept)
	}
}

// hadBy tells of jobs whether a device has had them.
func (h *honesty) hadBy(ctx context.Context, d wire.DeviceID) (func(wire.JobRun) bool, error) {
	h.mu.Lock()
	had := h.had[d]
	if had == nil {
		had = &hadJobs{}
		h.had[d] = had
	}
	loaded := had.loaded
	h.mu.Unlock()
	if !loaded {
		keys, made, err := h.hadBefore(ctx, d)
		if err != nil {
			return nil, err
		}
		h.mu.Lock()
		had.keys, had.made = newestOf(append(keys, had.keys...), hadKept), newestOf(append(made, had.made...), hadKept)
		had.loaded = true
		h.mu.Unlock()
	}
	return func(j wire.JobRun) bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return had.has(j)
	}, nil
}

// hadBefore are the jobs that a device's newest orders have.
func (h *honesty) hadBefore(ctx context.Context, d wire.DeviceID) (keys, made []uint64, err error) {
	rows := h.audits.outbox.rows
	ids, err := rows.keys(ctx, string(d)+".>")
	if err != nil {
		return nil, nil, err
	}
	n := newest{limit: 8 * hadKept, keys: ids} // other kinds are among them
	n.cut()
	for _, key := range n.keys {
		if len(keys) >= hadKept && len(made) >= hadKept {
			break
		}
		row, err := rows.find(ctx, key)
		if errors.Is(err, errNotFound) || err == nil && row.Kind != wire.KindJobRun {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		v, err := row.open()
		if err != nil {
			return nil, nil, err
		}
		j, err := wire.DecodeBody[wire.JobRun](v.Order)
		switch {
		case err != nil:
		case row.Of == "":
			made = append(made, hadKey(j))
		default:
			keys = append(keys, hadKey(j))
		}
	}
	slices.Reverse(keys)
	slices.Reverse(made)
	return keys, made, nil
}
