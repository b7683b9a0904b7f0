package coordinator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// putParts stores a file of several chunks, each on two devices.
func (w *world) putParts(t testing.TB, name string, sizes ...int) api.Object {
	t.Helper()
	var all []byte
	var chunks []api.Chunk
	for _, n := range sizes {
		data := someBytes(n)
		id := chunk.Sum(data).String()
		_, err := w.op.PutChunk(testContext(t), id, data, 2)
		must(t, err)
		all, chunks = append(all, data...), append(chunks, api.Chunk{ID: id, Size: int64(n)})
	}
	sum := sha256.Sum256(all)
	o, err := w.op.PutObject(testContext(t), api.Object{Name: name, Size: int64(len(all)), SHA256: hex.EncodeToString(sum[:]), Chunks: chunks})
	must(t, err)
	return o
}

// received is an order as a device sees it.
type received struct {
	order wire.Order
	job   wire.JobRun
}

func (r received) input(name string) (ids []string, sizes []int64, urls int) {
	for _, in := range r.job.Inputs {
		if in.Name != name {
			continue
		}
		for _, p := range in.Parts {
			if ids, sizes = append(ids, p.Chunk), append(sizes, p.Size); p.URL != "" {
				urls++
			}
		}
	}
	return ids, sizes, urls
}

// No rule by which a device could tell challenges from its customers' jobs is better than
// guessing: over a batch of files of several chunks with an input that all tasks share, some
// of which it holds.
func TestNoRuleTellsAChallenge(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var got []received
	ours := make(map[string]bool)
	w, luck := honestWorld(t, func(c *Config) {
		hurried(c)
		c.jobPace.away, c.jobPace.late = time.Minute, time.Minute
		c.Compute = func(_ context.Context, j ComputeJob) (ComputeResult, error) {
			if len(j.Inputs["model"]) != 700 { // as a module that reads what it is given
				return ComputeResult{}, fmt.Errorf("a model of %d bytes", len(j.Inputs["model"]))
			}
			return ComputeResult{Outputs: map[string][]byte{"copy": slices.Concat(j.Inputs["model"], j.Inputs["data"])}}, nil
		}
	})
	ds := w.devices(t, 4)
	d := ds[0]
	w.putParts(t, "models/m", 700)
	files := make(map[string]bool)
	// So many that the device has a part of some, and others are free for those when it is not: of
	// files that it alone does in each batch no challenge can be made.
	for i := range 48 {
		o := w.putParts(t, fmt.Sprintf("f/%03d.dat", i), 3000, 1000+i)
		files[o.Chunks[0].ID+o.Chunks[1].ID] = true
	}
	w.chunksOf(t, 4, 3000) // what is not the customers'
	says := ready()
	says.Slots = 2
	for _, x := range ds {
		x.tell(says)
		honest := x.maker(nil)
		x.on(wire.KindJobRun, func(o wire.Order) *reply {
			if x == d {
				b, _ := wire.DecodeBody[wire.JobRun](o)
				w.audits.honesty.mu.Lock()
				_, is := w.audits.honesty.ours[o.ID]
				w.audits.honesty.mu.Unlock()
				mu.Lock()
				got, ours[o.ID] = append(got, received{o, b}), is
				mu.Unlock()
			}
			time.Sleep(100 * time.Millisecond) // what a job takes
			return honest(o)
		})
	}
	const enough = 20
	count := func() (challenges, all int) {
		mu.Lock()
		defer mu.Unlock()
		for _, is := range ours {
			challenges += btoi(is)
		}
		return challenges, len(ours)
	}
	for batch := 0; ; batch++ {
		j, err := w.op.StartJob(testContext(t), api.JobSpec{Module: w.module(t), Args: []string{fmt.Sprint(batch)}, Over: &api.JobOver{Prefix: "f/", As: "data"},
			Inputs: []api.JobInput{{Name: "model", Object: "models/m"}}, Outputs: []string{"copy"}, Verify: api.VerifyNone})
		must(t, err)
		j, err = w.op.AwaitJob(testContext(t), j.ID, nil)
		must(t, err)
		if j.State != wire.Succeeded {
			t.Fatalf("%s: %s", j.State, j.Reason)
		}
		if n, _ := count(); n >= enough {
			break
		}
		if batch == 200 {
			t.Fatal("there are too few challenges")
		}
	}
	luck.never.Store(true)
	eventually(t, "all are judged", func() bool { return len(w.audits.underWay()) == 0 })
	for _, a := range w.challengesOf(t, d.id) {
		if a.Outcome != api.AuditRight {
			t.Errorf("of an honest device: %s %s", a.Outcome, a.Reason)
		}
	}
	n, all := count()
	mu.Lock()
	defer mu.Unlock()
	share := float64(n) / float64(all)
	life := func(r received) time.Duration { return r.order.Expires.Sub(r.order.Issued) }
	var lives []time.Duration
	for _, r := range got {
		lives = append(lives, life(r))
	}
	slices.Sort(lives)
	usual := lives[len(lives)/2]
	seen := make(map[uint64]string)
	repeats := make(map[string]bool)
	for _, r := range got {
		if first := seen[hadKey(r.job)]; first != "" {
			repeats[r.order.ID] = true
			t.Errorf("order %s (a challenge: %v) is as %s (a challenge: %v)", r.order.ID, ours[r.order.ID], first, ours[first])
		}
		seen[hadKey(r.job)] = r.order.ID
	}
	for rule, challenge := range map[string]func(received) bool{
		"it has to fetch nothing":        func(r received) bool { _, _, urls := r.input("data"); return urls == 0 },
		"it has to fetch something":      func(r received) bool { _, _, urls := r.input("data"); return urls > 0 },
		"it lives beyond its deadline":   func(r received) bool { return !r.job.Deadline.IsZero() && r.order.Expires.After(r.job.Deadline) },
		"it says its deadline":           func(r received) bool { return !r.job.Deadline.IsZero() },
		"its order lives unusually long": func(r received) bool { return (life(r) - usual).Abs() > 10*time.Minute },
		"it is no file":                  func(r received) bool { ids, _, _ := r.input("data"); return !files[strings.Join(ids, "")] },
		"its parts are of odd sizes":     func(r received) bool { _, s, _ := r.input("data"); return len(s) != 2 || s[0] != 3000 },
		"another model":                  func(r received) bool { _, s, _ := r.input("model"); return len(s) != 1 || s[0] != 700 },
		"it comes again":                 func(r received) bool { return repeats[r.order.ID] },
	} {
		hits, said := 0, 0
		for _, r := range got {
			if challenge(r) {
				said++
				hits += btoi(ours[r.order.ID])
			}
		}
		odds := byGuessing(all, n, said, hits)
		t.Logf("%q: %d of %d it says are challenges, by guessing %.1f: as many once in %.3g", rule, hits, said, float64(said)*share, 1/odds)
		if odds < 1e-8 { // nine rules: a false alarm in 10^7 runs
			t.Errorf("%q tells challenges: %d of %d, by guessing %.1f", rule, hits, said, float64(said)*share)
		}
	}
	t.Logf("%d challenges in %d orders", n, all)
}

// byGuessing is how likely hits or more of n challenges are among said orders, drawn of all: the
// upper tail of the hypergeometric distribution.
func byGuessing(all, n, said, hits int) (p float64) {
	choose := func(n, k int) float64 { // its logarithm
		a, _ := math.Lgamma(float64(n + 1))
		b, _ := math.Lgamma(float64(k + 1))
		c, _ := math.Lgamma(float64(n - k + 1))
		return a - b - c
	}
	for k := max(hits, said-(all-n)); k <= min(n, said); k++ {
		p += math.Exp(choose(n, k) + choose(all-n, said-k) - choose(all, said))
	}
	return p
}

// What a device was sent is known after a restart, of its customers and of challenges.
func TestWhatADeviceHasHadIsKnownAfterARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := &luck{}
	start := func() *world {
		return openWith(t, dir, func(c *Config) { c.Audits.Jobs, c.even = true, l.even })
	}
	w := start()
	d, _ := w.worker(t), w.worker(t)
	ids := w.chunksOf(t, 3, 5000)
	jobs := make(chan wire.JobRun, 8)
	d.on(wire.KindJobRun, func(o wire.Order) *reply {
		b, _ := wire.DecodeBody[wire.JobRun](o)
		jobs <- b
		return d.compute(o, nil)
	})
	w.doJob(t, d, w.module(t), ids[0])
	sent := []wire.JobRun{next(t, jobs, "the customer's job"), next(t, jobs, "the challenge")}
	l.never.Store(true)
	eventually(t, "it is judged", func() bool { return len(w.audits.underWay()) == 0 && len(w.challengesOf(t, d.id)) > 0 })
	w.Close()
	w = start()
	t.Cleanup(w.Close)
	had, err := w.audits.honesty.hadBy(testContext(t), d.id)
	must(t, err)
	for _, j := range sent {
		if !had(j) {
			t.Errorf("%+v is forgotten", j)
		}
	}
	other := sent[0]
	if other.Input = ids[2]; ids[2] != sent[1].Input && had(other) || ids[2] == sent[1].Input && !had(other) {
		t.Error("it takes one for another")
	}
	for range 2 * hadKept {
		w.audits.honesty.given(d.id, other)
	}
	if n := len(w.audits.honesty.had[d.id].keys); n != hadKept {
		t.Errorf("%d are kept of a device", n)
	}
}

// What all of a customer's jobs read stays in a challenge, and what each reads another of does not.
func TestASharedInputStays(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	for range 2 {
		w.device(t)
	}
	for _, name := range []string{"shared/m1", "shared/m2", "pics/1.jpg", "pics/2.jpg", "pics/3.txt", "pics/sub/4.jpg"} {
		w.putFile(t, name, someBytes(1000), 1)
	}
	w.putFile(t, "pics/large.jpg", someBytes(5000), 1)
	defer func() {
		for _, name := range []string{"shared/m1", "shared/m2", "pics/1.jpg", "pics/2.jpg", "pics/3.txt", "pics/sub/4.jpg", "pics/large.jpg"} {
			must(t, w.op.RemoveObject(testContext(t), name))
		}
	}()
	module := w.module(t)
	spec := func(data string) api.JobSpec {
		return api.JobSpec{Module: module, Inputs: []api.JobInput{{Name: "model", Object: "shared/m1"}, {Name: "data", Object: data}}, Needs: api.JobNeeds{Arch: "none has it"}}
	}
	if k := w.jobs.varies(spec("pics/1.jpg")); k != -1 {
		t.Errorf("with nothing to compare it with, input %d is taken for the one that varies", k)
	}
	j, err := w.op.StartJob(testContext(t), spec("pics/2.jpg"))
	must(t, err)
	defer func() { _, _ = w.op.CancelJob(testContext(t), j.ID, api.CancelRequest{}) }()
	var names []string
	for _, v := range w.jobs.beside(jobRow{ID: "x", Tasks: 1, Spec: spec("pics/1.jpg")}, jobFiles{}) {
		if v.row.Spec.Inputs[0].Object != "shared/m1" {
			t.Errorf("the model is %s", v.row.Spec.Inputs[0].Object)
		}
		names = append(names, v.row.Spec.Inputs[1].Object)
	}
	slices.Sort(names)
	if !slices.Equal(names, []string{"pics/1.jpg", "pics/2.jpg"}) {
		t.Errorf("%v", names)
	}
}
