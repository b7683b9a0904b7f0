package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/test/testbed/ploy"
	"github.com/deimos-edge/deimos/wire"
)

// echo is a module that writes what it reads, up to 4096 bytes: what comes out is known,
// and hardly costs anything.
const echo = "\x00asm\x01\x00\x00\x00" +
	"\x01\x0c\x02\x60\x04\x7f\x7f\x7f\x7f\x01\x7f\x60\x00\x00" + // types: four i32 to one; none to none
	"\x02\x44\x02\x16wasi_snapshot_preview1\x07fd_read\x00\x00\x16wasi_snapshot_preview1\x08fd_write\x00\x00" +
	"\x03\x02\x01\x01" + // one function of type 1
	"\x05\x03\x01\x00\x01" + // memory: a page
	"\x07\x0a\x01\x06_start\x00\x02" + // the function is exported
	"\x0a\x24\x01\x22\x00" + // its code:
	"\x41\x00\x41\x00\x41\x01\x41\x08\x10\x00\x1a" + // fd_read(0, the buffers at 0, 1 of them, how much at 8)
	"\x41\x04\x41\x08\x28\x02\x00\x36\x02\x00" + // the buffer is as long as that
	"\x41\x01\x41\x00\x41\x01\x41\x08\x10\x01\x1a\x0b" + // fd_write(1, the same)
	"\x0b\x0e\x01\x00\x41\x00\x0b\x08\x10\x00\x00\x00\x00\x10\x00\x00" // at 0: a buffer at 16, of 4096 bytes

// liars are the devices of a fleet that lie, and how many jobs each may be given until it is
// found, by the table of docs/PROTOCOL.md. How often two in league find each other at the same
// job, the machine decides; so of them it is how many lies they may tell, of which at least
// a fifth are looked at.
var liars = []struct {
	ploy.Ploy
	owner  string
	within int
}{
	{ploy.Ploy{Name: "always", Share: 1}, "ann", 21},
	{ploy.Ploy{Name: "sometimes", Share: 0.1}, "ben", 44},
	{ploy.Ploy{Name: "one of two", Share: 1, League: "two"}, "cem", 21},
	{ploy.Ploy{Name: "other of two", Share: 1, League: "two"}, "dan", 21},
}

const (
	liarsFiles = 250  // each on all devices
	liarsJobs  = 500  // of make test
	liarsRound = 5000 // tasks of one job, at most
	// surely is how many times as many jobs make one miss in a million of one in a hundred,
	// which is what the table says: ln 10⁻⁶ / ln 10⁻².
	surely = 3
)

// honest are the owners of the honest devices, all but one of which have a liar, too.
var honest = []string{"ann", "ben", "cem", "dan", "eva", "eva"}

// TestLiarsAreFoundAndNobodyElseIs is a fleet of ten agents that five people own. One
// lies always, one about a tenth of its jobs, two in league, in the same words, where both
// have the job at the same time. Each signs for what it says. All are found, by what the
// coordinator has worked out itself, in as many jobs as the protocol says; no honest device
// loses anything; and in the end no wrong result stands.
//
// JOBS=10000 makes it longer. In so many jobs as make test has, not each of the two in league
// need be found.
func TestLiarsAreFoundAndNobodyElseIs(t *testing.T) {
	t.Parallel()
	jobs := liarsJobs
	if s := os.Getenv("JOBS"); s != "" {
		var err error
		if jobs, err = strconv.Atoi(s); err != nil || jobs < 1 {
			t.Fatalf("JOBS is how many jobs are given, not %q", s)
		}
	}
	rng := testbed.Seeded(t)
	l := newLiarsFleet(t, rng.Uint64(), testLimit+time.Duration(jobs)*200*time.Millisecond)
	began := time.Now()
	names := l.store(liarsFiles)
	t.Logf("%d files on %d devices after %s", len(names), len(l.devices), time.Since(began).Round(time.Second))

	began = time.Now()
	var all []string
	for given := 0; given < jobs; {
		n := min(liarsRound, jobs-given)
		all = append(all, l.give(names, n, given, rng)...)
		given += n
	}
	took := time.Since(began)
	l.check(jobs, took, all)
}

// liarsFleet is that fleet. The first devices are the liars.
type liarsFleet struct {
	*fleet
	files  map[string][]byte
	module string

	wrong   int // results that were given out wrong
	leagued int // of these, those that two in league stood behind
}

func newLiarsFleet(t *testing.T, seed uint64, limit time.Duration) *liarsFleet {
	t.Helper()
	l := &liarsFleet{fleet: newFleet(t, func(f *fleet) {
		var cancel context.CancelFunc
		f.Ctx, cancel = context.WithTimeout(context.Background(), limit)
		t.Cleanup(cancel)
		f.Patience = limit
		effectAgent(f)
	})}
	meet := l.Path("meet")
	if err := os.Mkdir(meet, 0o700); err != nil {
		t.Fatal(err)
	}
	l.token = l.NewToken(len(liars) + len(honest))
	for _, v := range liars {
		v.Ploy.Seed = seed
		if v.League != "" {
			v.Meet = meet
		}
		l.plot(l.add(device{}), v.Ploy)
	}
	for range honest {
		l.add(device{})
	}
	for _, d := range l.devices {
		d.start()
	}
	for i, d := range l.devices {
		d.awaitOnline()
		owner := ""
		if i < len(liars) {
			owner = liars[i].owner
		} else {
			owner = honest[i-len(liars)]
		}
		d.ownedBy(owner)
	}
	var err error
	if l.module, err = l.Client.PutModule(l.Ctx, []byte(echo)); err != nil {
		t.Fatal(err)
	}
	return l
}

func (d *device) ownedBy(owner string) {
	d.f.T.Helper()
	if _, err := d.f.Client.ChangeDevices(d.f.Ctx, api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{d.id}}, SetLabels: map[string]string{"owner": owner}}); err != nil {
		d.f.T.Fatal(err)
	}
}

// plot gives a device a program of its own, and beside it what its worker is up to.
func (f *fleet) plot(d *device, p ploy.Ploy) {
	f.T.Helper()
	path, err := buildEffectAgent()
	if err != nil {
		f.T.Fatal(err)
	}
	dir := f.Path(d.name + "-program")
	raw, err := json.Marshal(p)
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, ploy.File), raw, 0o600)
	}
	d.program = filepath.Join(dir, "agent")
	if err == nil {
		err = os.Link(path, d.program)
	}
	if err != nil {
		f.T.Fatal(err)
	}
}

// store puts small files, each on all devices, so that each can be asked to do each job.
func (l *liarsFleet) store(n int) (names []string) {
	l.T.Helper()
	l.files = l.putSmallOn("of/", n, len(l.devices))
	for name := range l.files {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// give has n jobs done, by several jobs of the coordinator, as the same over the same file
// is one. Their ids come back.
func (l *liarsFleet) give(names []string, n, from int, rng *rand.Rand) (ids []string) {
	l.T.Helper()
	for n > 0 {
		part := min(n, len(names))
		rng.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		verify := api.VerifyAdaptive
		if rng.IntN(2) == 0 {
			verify = api.VerifyAlways
		}
		j, err := l.Client.StartJob(l.Ctx, api.JobSpec{Module: l.module, Args: []string{strconv.Itoa(from)}, Over: &api.JobOver{Names: names[:part]}, Verify: verify})
		if err != nil {
			l.T.Fatal(err)
		}
		if err := l.Client.EachJobResult(l.Ctx, j.ID, func(r api.JobResult) error {
			if err := r.Err(); err != nil {
				return fmt.Errorf("%s: %w", r.Name, err)
			}
			if !bytes.Equal(r.Output, l.files[r.Name]) {
				l.wasWrong(r)
			}
			return nil
		}, nil); err != nil {
			l.T.Fatal(err)
		}
		ids = append(ids, j.ID)
		n, from = n-part, from+part
	}
	return ids
}

// wasWrong is told of a wrong result that was given out. Those who stood behind it must
// have been of two owners.
func (l *liarsFleet) wasWrong(r api.JobResult) {
	l.T.Helper()
	l.wrong++
	stood := r.Attempts[slices.IndexFunc(r.Attempts, func(a api.JobAttempt) bool { return a.Order == r.Order })].Result
	var behind []string
	for _, a := range r.Attempts {
		if a.Result == stood {
			i := slices.IndexFunc(l.devices, func(d *device) bool { return d.id == a.Device })
			if i >= len(liars) {
				l.T.Errorf("an honest device has said %q of %s", r.Output, r.Name)
				continue
			}
			behind = append(behind, liars[i].Name)
		}
	}
	if slices.Contains(behind, "one of two") && slices.Contains(behind, "other of two") {
		l.leagued++
	} else if r.VerifiedBy != api.ByReputation {
		l.T.Errorf("a wrong result of %s was given out as verified by %s, behind which is %q", r.Name, r.VerifiedBy, behind)
	}
}

// check wants the liars found in time, and nobody else, and every result right in the end.
func (l *liarsFleet) check(jobs int, took time.Duration, ids []string) {
	t := l.T
	given := make(map[wire.DeviceID][]string) // orders of jobs, the oldest first
	total := 0
	for _, d := range l.devices {
		list, err := l.Client.Orders(l.Ctx, api.OrderQuery{Selector: api.Selector{Devices: []wire.DeviceID{d.id}}, Kind: wire.KindJobRun, Limit: api.MaxOrders})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range list.Orders {
			given[d.id] = append(given[d.id], o.ID)
		}
		slices.Sort(given[d.id])
		total += len(given[d.id])
	}
	t.Logf("%d jobs in %s, %.1f a second: %d runs by devices, challenges among them, %.2f a job; %d wrong results were given out, %d of them with two in league behind them",
		jobs, took.Round(time.Second), float64(jobs)/took.Seconds(), total, float64(total)/float64(jobs), l.wrong, l.leagued)
	allFound := true
	for i, d := range l.devices {
		h, err := l.Client.Honesty(l.Ctx, d.id)
		if err != nil {
			t.Fatal(err)
		}
		if i >= len(liars) {
			if h.Distrusted || h.Aside || h.Compute < 1 || h.Wrong > 0 || len(h.Doubts) > 0 || len(h.Penalties) > 0 {
				t.Errorf("an honest device was punished: %+v", h)
			}
			t.Logf("honest, of %s: %d jobs, %.1f confirmed, trusted: %v", honest[i-len(liars)], len(given[d.id]), h.Confirmed, h.Trusted)
			continue
		}
		v, program := liars[i], filepath.Dir(d.program)
		told, _ := os.ReadFile(filepath.Join(program, ploy.Told)) // there is none before the first lie
		if !h.Distrusted {
			allFound = false
			t.Logf("%s was not found in %d jobs, in which it lied %d times", v.Name, len(given[d.id]), len(told))
			if n := len(given[d.id]); v.League == "" && n > surely*v.within || len(told) > surely*v.within {
				t.Errorf("%s should have been found within %d", v.Name, v.within)
			}
			continue
		}
		if len(told) == 0 {
			t.Errorf("%s is distrusted and never lied: %+v", v.Name, h)
		}
		first := slices.MinFunc(h.Penalties, func(a, b api.Penalty) int { return a.At.Compare(b.At) })
		a, err := l.Client.AuditByID(l.Ctx, first.Audit)
		if err != nil {
			t.Fatal(err)
		}
		at := slices.Index(given[d.id], a.Order) + 1
		what := "jobs"
		if v.League != "" {
			what = "lies"
		}
		t.Logf("%s: found by the result of its job %d (%s), the table has %d %s; by then and in flight it had lied %d times in %d jobs", v.Name, at, a.Kind, v.within, what, len(told), len(given[d.id]))
		if at == 0 || v.League == "" && at > surely*v.within {
			t.Errorf("%s was found by its job %d (order %s), it should be by number %d", v.Name, at, a.Order, v.within)
		}
		if v.League != "" && len(told) > surely*v.within {
			t.Errorf("%s has lied %d times, it should have been found by lie %d", v.Name, len(told), v.within)
		}
		if !a.Evidence || a.Outcome != api.AuditWrong {
			t.Errorf("what %s was caught by proves nothing: %+v", v.Name, a)
		}
	}
	if !allFound {
		return // what stands may be of who was not found yet
	}
	corrected := 0
	for _, id := range ids {
		l.Until("all that liars stood behind being looked through", func() bool {
			ok, again := true, 0
			if err := l.Client.EachJobResult(l.Ctx, id, func(r api.JobResult) error {
				ok = ok && !r.Checking && (r.Retracted() || bytes.Equal(r.Output, l.files[r.Name]))
				again += len(r.Corrections)
				return nil
			}, nil); err != nil {
				t.Fatal(err)
			}
			if ok {
				corrected += again
			}
			return ok
		})
	}
	t.Logf("in the end every result is right, or taken back; %d were corrected", corrected)
}
