package test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

const (
	shards = 6 // of a stripe, with the default code of 4+2
	owners = 6 // of the devices, so that each shard of a stripe can have another
	// dayOfLeaves is what a device has to prove in a day by default, and the budget in
	// which one whose disk goes bad is to be found.
	dayOfLeaves = 90
	// badShare is how much of what it holds goes bad on one device. 90 leaves drawn
	// evenly all miss it in 1 of 500 million cases.
	badShare = 0.2
)

// fleetSize is how large the fleet of the test is.
type fleetSize struct {
	devices int
	bytes   int64 // of all files
	archive int64 // of one archive
	limit   time.Duration
	unheard bool // a device hangs for so long that a challenge ends; that takes minutes
}

// sizeOfFleet is small, unless FLEET says how many MiB of files there are to be.
func sizeOfFleet(t *testing.T) fleetSize {
	t.Helper()
	s := os.Getenv("FLEET")
	if s == "" {
		return fleetSize{devices: 9, bytes: 40 << 20, archive: 3 << 20, limit: testLimit}
	}
	mib, err := strconv.ParseInt(s, 10, 64)
	if err != nil || mib < 40 {
		t.Fatalf("FLEET is how many MiB of files are stored, 40 at least, not %q", s)
	}
	return fleetSize{devices: 12, bytes: mib << 20, archive: max(3<<20, mib<<20/32), limit: time.Hour, unheard: true}
}

// TestEveryFileComesBackFromAFleetThatRots: files of this machine are stored with the
// code of 4+2. Then two devices are destroyed, a third has a fifth of its chunks
// damaged under the running agent, and a fourth is slow, all drawn by chance.
//
//   - The damage is found by the challenges that nobody asks for, within the leaves of
//     one day, and nobody else is blamed.
//   - Every file comes back, bit for bit, while the two are gone.
//   - Repair makes every stripe whole, and in the end each of its shards was read from
//     a device of its own.
//   - The slow one has never been taken for one that lies or has lost something.
//
// The damage stays within what is promised: of no stripe are both destroyed devices
// and a damaged shard.
func TestEveryFileComesBackFromAFleetThatRots(t *testing.T) {
	t.Parallel()
	size := sizeOfFleet(t)
	rng := testbed.Seeded(t)
	r := &rot{size: size, fleet: newFleet(t, size.apply(t), serving("--audit-leaves", "0"))}
	r.enrol(size.devices, false)
	r.haveOwners()
	began := time.Now()
	r.store(collect(t, r.Path("files"), rng, size))
	r.checkSpread()
	t.Logf("%d files of %d MiB are on %d devices after %s", len(r.files), r.bytes()>>20, size.devices, time.Since(began).Round(time.Second))

	r.draw(rng)
	for _, d := range r.destroyed {
		d.destroy()
	}
	release := r.slow.slowDown(rng.Uint64())
	damage(t, r.corrupter.state("volumes", "main"), r.damaged...)
	r.challenge()

	r.findCorrupter()
	r.allComeBack()
	r.repaired()
	release()
	r.allWholeInTruth()
	r.checkBlame()
	if size.unheard {
		r.checkUnheard()
	}
}

// apply gives a fleet the time for its size.
func (s fleetSize) apply(t *testing.T) option {
	return func(f *fleet) {
		var cancel context.CancelFunc
		f.Ctx, cancel = context.WithTimeout(context.Background(), s.limit)
		t.Cleanup(cancel)
		f.Patience = s.limit / 4
	}
}

// rot is the fleet, what it holds and what happens to it.
type rot struct {
	*fleet
	size  fleetSize
	files []storedFile

	destroyed       []*device
	corrupter, slow *device
	damaged         []api.Chunk // on the corrupter
	share           float64     // of what it holds, in bytes
}

// storedFile is one that was put; the sum is of the file as it was before.
type storedFile struct {
	name   string
	size   int64
	sha256 [sha256.Size]byte
}

func (r *rot) bytes() (n int64) {
	for _, f := range r.files {
		n += f.size
	}
	return n
}

// ownerOf is whose a device is; it goes by the order in which they came.
func (r *rot) ownerOf(id wire.DeviceID) int {
	return slices.Index(r.devices, r.onDevice(id)) % owners
}

func (r *rot) haveOwners() {
	for _, d := range r.devices {
		_, err := r.Client.ChangeDevices(r.Ctx, api.DeviceChange{Selector: api.Selector{Devices: []wire.DeviceID{d.id}},
			SetLabels: map[string]string{"owner": fmt.Sprint("owner-", r.ownerOf(d.id))}})
		if err != nil {
			r.T.Fatal(err)
		}
	}
}

// store puts files, as a user does.
func (r *rot) store(paths []string) {
	for i, path := range paths {
		size, sum := digestOf(r.T, path)
		f := storedFile{fmt.Sprintf("%03d-%s", i, filepath.Base(path)), size, sum}
		r.OK(nil, "object", "put", path, "--name", f.name)
		r.files = append(r.files, f)
		if strings.HasPrefix(path, r.Dir) {
			_ = os.Remove(path) // an archive of ours; its folder goes at the end
		}
	}
}

func digestOf(t *testing.T, path string) (size int64, sum [sha256.Size]byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if size, err = io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return size, [sha256.Size]byte(h.Sum(nil))
}

// eachStripe tells the shards of every stripe of every file.
func (r *rot) eachStripe(do func(file string, stripe []api.Placement)) {
	r.T.Helper()
	for _, f := range r.files {
		places, err := r.Client.ObjectPlacements(r.Ctx, f.name)
		if err != nil {
			r.T.Fatal(err)
		}
		for part := range slices.Chunk(places, shards) {
			do(f.name, part)
		}
	}
}

// checkSpread wants no two shards of a stripe with one owner.
func (r *rot) checkSpread() {
	r.T.Helper()
	r.eachStripe(func(file string, stripe []api.Placement) {
		of := map[int]bool{}
		for _, p := range stripe {
			for _, h := range p.Holders {
				of[r.ownerOf(h.Device)] = true
			}
		}
		if len(of) != shards {
			r.T.Errorf("a stripe of %s is with %d owners, and there are %d", file, len(of), owners)
		}
	})
}

// draw decides who suffers what. Where two devices are the only ones of their owners,
// each stripe has shards on both, and none would bear damage: another pair is drawn.
func (r *rot) draw(rng *rand.Rand) {
	r.T.Helper()
	order := rng.Perm(len(r.devices))
	for a := range order {
		for b := range a {
			if r.drawWithout(rng, order[b], order[a], order) {
				r.T.Logf("%s and %s are destroyed, %d chunks (%.0f%%) of %s are damaged, %s is slow",
					r.destroyed[0].name, r.destroyed[1].name, len(r.damaged), 100*r.share, r.corrupter.name, r.slow.name)
				return
			}
		}
	}
	r.T.Fatal("no device has enough chunks in stripes that bear damage, whichever two are destroyed")
}

// drawWithout draws the other two, the first that fit in the order, if the devices a and
// b are destroyed. It returns false if too few chunks of any may be damaged.
func (r *rot) drawWithout(rng *rand.Rand, a, b int, order []int) bool {
	r.destroyed = []*device{r.devices[a], r.devices[b]}
	left := slices.DeleteFunc(slices.Clone(order), func(n int) bool { return n == a || n == b })
	for i, n := range left {
		r.corrupter = r.devices[n]
		if r.drawDamage(rng) {
			r.slow = r.devices[left[(i+1)%len(left)]]
			return true
		}
	}
	return false
}

// drawDamage chooses chunks of the corrupter, of stripes that do not have shards on
// both destroyed devices. It returns false if those are too few.
func (r *rot) drawDamage(rng *rand.Rand) bool {
	var may []api.Chunk
	var held, bad int64
	r.eachStripe(func(_ string, stripe []api.Placement) {
		gone, own := 0, []api.Chunk(nil)
		for _, p := range stripe {
			for _, h := range p.Holders {
				switch h.Device {
				case r.destroyed[0].id, r.destroyed[1].id:
					gone++
				case r.corrupter.id:
					own = append(own, p.Chunk)
					held += p.Size
				}
			}
		}
		if gone < len(r.destroyed) {
			may = append(may, own...)
		}
	})
	rng.Shuffle(len(may), func(i, j int) { may[i], may[j] = may[j], may[i] })
	for i, c := range may {
		if bad += c.Size; float64(bad) >= badShare*float64(held) {
			r.damaged, r.share = may[:i+1], float64(bad)/float64(held)
			return true
		}
	}
	return false
}

// destroy ends an agent and takes all that it had.
func (d *device) destroy() {
	d.f.T.Helper()
	d.kill()
	if err := os.RemoveAll(d.state()); err != nil {
		d.f.T.Fatal(err)
	}
}

// slowDown has an agent stand still for most of the time, as a disk does that tries a
// sector again and again, until the returned function is called or the test ends.
func (d *device) slowDown(seed uint64) (release func()) {
	rng := rand.New(rand.NewPCG(seed, 0))
	ended := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer d.proc.Signal(syscall.SIGCONT)
		for sig, long := syscall.SIGSTOP, time.Duration(0); ; {
			d.proc.Signal(sig)
			if sig == syscall.SIGSTOP {
				sig, long = syscall.SIGCONT, 200*time.Millisecond+some(rng, 600*time.Millisecond)
			} else {
				sig, long = syscall.SIGSTOP, 20*time.Millisecond+some(rng, 100*time.Millisecond)
			}
			select {
			case <-time.After(long):
			case <-ended:
				return
			}
		}
	})
	release = sync.OnceFunc(func() { close(ended); wg.Wait() })
	d.f.T.Cleanup(release)
	return release
}

// damage changes a byte of each chunk wherever it lies on a volume. Its agent may run,
// and is not told.
func damage(t *testing.T, volume string, chunks ...api.Chunk) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(volume, "chunks", "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, path := range logs {
		if err := damageLog(path, chunks, found); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range chunks {
		if !found[c.ID] {
			t.Fatalf("chunk %s is in no segment", c.ID)
		}
	}
}

// damageLog looks for the ids of chunks in one segment. In a record, a chunk's bytes begin
// 12 bytes behind its id, with its length before that; a table of contents has ids, too, and
// is left alone.
func damageLog(path string, chunks []api.Chunk, found map[string]bool) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 1<<30))
	if err != nil {
		return err
	}
	for _, c := range chunks {
		id, err := chunk.ParseID(c.ID)
		if err != nil {
			return err
		}
		key := append(binary.LittleEndian.AppendUint32([]byte{1, 0, 0, 0}, uint32(c.Size)), id[:]...)
		for from := 0; ; {
			at := bytes.Index(raw[from:], key)
			if at < 0 {
				break
			}
			from += at + len(key)
			middle := from + 12 + int(c.Size)/2
			if _, err := f.WriteAt([]byte{raw[middle] ^ 1}, int64(middle)); err != nil {
				return err
			}
			found[c.ID] = true
		}
	}
	return nil
}

// challenge starts the coordinator anew, after a kill, with the default amount of
// challenges and a day's leaves to begin with, as each new device has them.
func (r *rot) challenge() {
	r.T.Helper()
	r.Serve.Kill()
	r.Flags = []string{"--audit-leaves", strconv.Itoa(dayOfLeaves), "--audit-interval", "1s"}
	r.StartServe()
	for _, d := range r.living() {
		d.awaitOnline()
	}
}

// living are the devices that were not destroyed.
func (r *rot) living() []*device {
	return slices.DeleteFunc(slices.Clone(r.devices), func(d *device) bool { return slices.Contains(r.destroyed, d) })
}

// audits are the challenges of a device, the newest first.
func (r *rot) audits(d *device) []api.AuditSummary {
	r.T.Helper()
	list, err := r.Client.Audits(r.Ctx, api.AuditQuery{Device: d.id, Limit: api.MaxAudits})
	if err != nil {
		r.T.Fatal(err)
	}
	return list.Audits
}

// findCorrupter waits for the challenge that finds the damage, and counts the leaves
// that it took.
func (r *rot) findCorrupter() {
	r.T.Helper()
	var found api.Audit
	leaves := 0
	r.Until("the damage being found", func() bool {
		leaves = 0
		for _, s := range slices.Backward(r.audits(r.corrupter)) {
			a, err := r.Client.AuditByID(r.Ctx, s.ID)
			if err != nil || !a.Routine || a.Kind != api.StorageAudit || a.Outcome != api.AuditRight && a.Outcome != api.AuditLost {
				continue // not an answer, or none yet
			}
			leaves += a.Leaves
			if a.Outcome == api.AuditLost {
				found = a
				return a.Penalty != nil // it is on record a moment before what it costs
			}
		}
		return leaves > dayOfLeaves // too late
	})
	switch {
	case found.ID == "" || leaves > dayOfLeaves:
		r.T.Fatalf("%d leaves were asked for, and %.0f%% that are damaged were not found", leaves, 100*r.share)
	case found.Penalty == nil || found.Penalty.Figure != api.Integrity || !found.Evidence:
		r.T.Errorf("the damage was found without a penalty or evidence: %+v", found.Penalty)
	}
	for _, id := range found.Lost {
		if !slices.ContainsFunc(r.damaged, func(c api.Chunk) bool { return c.ID == id }) {
			r.T.Errorf("chunk %s was said to be lost, and was not damaged", id)
		}
	}
	r.T.Logf("the damage was found with %d leaves: %d of them failed, of %d chunks; by chance all would be missed in %.1g of cases",
		leaves, found.Leaves-found.Right, len(found.Lost), math.Pow(1-r.share, float64(leaves)))
}

// allComeBack gets every file through the command line.
func (r *rot) allComeBack() {
	r.T.Helper()
	began := time.Now()
	out := r.Path("back")
	for _, f := range r.files {
		r.OK(nil, "object", "get", f.name, "--out", out)
		if size, sum := digestOf(r.T, out); size != f.size || sum != f.sha256 {
			r.T.Errorf("%s came back as something else: %d bytes, stored %d", f.name, size, f.size)
		}
		_ = os.Remove(out) // the next get would replace it, too
	}
	r.T.Logf("all came back in %s", time.Since(began).Round(time.Millisecond))
}

// repaired gives up the destroyed devices and waits until nothing is endangered.
func (r *rot) repaired() {
	r.T.Helper()
	for _, d := range r.destroyed {
		r.OK(nil, "device", "retire", string(d.id), "--yes")
	}
	began := time.Now()
	r.awaitWhole()
	v, err := r.Client.Repair(r.Ctx)
	if err != nil {
		r.T.Fatal(err)
	}
	r.T.Logf("whole again after %s: %d shards placed anew, %d of them rebuilt, %d MiB moved", time.Since(began).Round(time.Millisecond), v.Done, v.Rebuilt, v.Bytes>>20)
}

// awaitWhole waits until every shard of every stripe has a device of its own again, as
// far as the coordinator knows.
func (r *rot) awaitWhole() {
	r.T.Helper()
	living := map[wire.DeviceID]bool{}
	for _, d := range r.living() {
		living[d.id] = true
	}
	r.Until("everything being whole again", func() bool {
		if v, err := r.Client.Repair(r.Ctx); err != nil || v.Endangered > 0 {
			return false
		}
		whole := true
		r.eachStripe(func(_ string, stripe []api.Placement) {
			on := map[wire.DeviceID]bool{}
			for _, p := range stripe {
				held := false
				for _, h := range p.Holders {
					if living[h.Device] && !h.Lost {
						on[h.Device], held = true, true
					}
				}
				whole = whole && held
			}
			whole = whole && len(on) >= shards
		})
		return whole
	})
}

// allWholeInTruth reads every shard from every device. The first time that may find
// damage which no challenge has met, on the corrupter; the second time nothing.
func (r *rot) allWholeInTruth() {
	r.T.Helper()
	met := map[string]bool{}
	for _, f := range r.files {
		for _, fault := range r.verify(f).Faults {
			if fault.Device == r.corrupter.id && slices.ContainsFunc(r.damaged, func(c api.Chunk) bool { return c.ID == fault.Chunk }) {
				met[fault.Chunk] = true
			} else if !slices.ContainsFunc(r.destroyed, func(d *device) bool { return d.id == fault.Device }) {
				r.T.Errorf("%s: stripe %d, shard %d on %s: %s", f.name, fault.Stripe, fault.Shard, fault.Device, fault.Problem)
			}
		}
	}
	r.awaitWhole()
	for _, f := range r.files {
		if v := r.verify(f); v.Least < shards {
			r.T.Errorf("%s: only %d shards of a stripe can be read after the repair: %+v", f.name, v.Least, v.Faults)
		}
	}
	r.T.Logf("reading everything met %d damaged chunks more", len(met))
}

func (r *rot) verify(f storedFile) (v object.Report) {
	r.T.Helper()
	r.Try(&v, "object", "verify", f.name) // fails if there are faults
	if v.Needed == 0 {
		r.T.Fatalf("deimos object verify %s has verified nothing", f.name)
	}
	return v
}

// checkBlame: only the corrupter has lost anything in the coordinator's eyes, and
// nobody has lied.
func (r *rot) checkBlame() {
	r.T.Helper()
	for _, d := range r.living() {
		outcomes := map[api.AuditOutcome]int{}
		for _, a := range r.audits(d) {
			outcomes[a.Outcome]++
		}
		if d == r.slow {
			r.T.Logf("challenges of the slow device: %v", outcomes)
		}
		if outcomes[api.AuditWrong] > 0 || d != r.corrupter && outcomes[api.AuditLost] > 0 {
			r.T.Errorf("%s has answered as %v", d.name, outcomes)
		}
		if d != r.corrupter {
			r.checkHonest(d)
		}
	}
	if s := r.Device(r.corrupter.id).Score; s == nil || s.Integrity >= 1 {
		r.T.Errorf("the score of the device with a bad disk is %+v", s)
	}
}

// checkHonest wants nothing said against what a device answers.
func (r *rot) checkHonest(d *device) {
	r.T.Helper()
	s := r.Device(d.id).Score
	if s == nil {
		return // nothing is thought of it
	}
	for _, p := range s.Penalties {
		if p.Figure == api.Integrity {
			r.T.Errorf("%s is blamed for %s: %.2f → %.2f", d.name, p.Cause, p.Before, p.After)
		}
	}
}

// checkUnheard has the slow device hang until a challenge of it has ended: it counts as
// one that could not be reached, and as nothing else.
func (r *rot) checkUnheard() {
	r.T.Helper()
	r.slow.awaitOnline()
	r.slow.proc.Signal(syscall.SIGSTOP)
	a, err := r.Client.Audit(r.Ctx, api.AuditRequest{Kind: api.StorageAudit, Device: r.slow.id})
	r.slow.proc.Signal(syscall.SIGCONT)
	if err != nil || a.Outcome != api.AuditUnreachable {
		r.T.Errorf("a device that hung was judged as %s: %s, %v", a.Outcome, a.Reason, err)
	}
	if s := r.Device(r.slow.id).Score; s == nil || s.Reachability >= 1 {
		r.T.Errorf("it was not noted that the device could not be reached: %+v", s)
	}
	r.checkHonest(r.slow)
}

// collect makes files of what this machine has: single ones that are large, and
// archives of the others, which are put into dir.
func collect(t *testing.T, dir string, rng *rand.Rand, size fleetSize) (paths []string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	found := realFiles(t, size.bytes)
	rng.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	var total, packed int64
	var pack []string
	flush := func() {
		if len(pack) > 0 {
			path := filepath.Join(dir, fmt.Sprintf("archive-%d.tar", len(paths)))
			if err := archive(path, pack); err != nil {
				t.Fatal(err)
			}
			paths, pack, packed = append(paths, path), nil, 0
		}
	}
	for _, f := range found {
		if total >= size.bytes {
			break
		}
		total += f.size
		if f.size > size.archive/2 {
			paths = append(paths, f.path)
			continue
		}
		pack = append(pack, f.path)
		if packed += f.size; packed >= size.archive {
			flush()
		}
	}
	flush()
	if total < size.bytes {
		t.Fatalf("this machine has %d MiB of files to store, and %d are wanted", total>>20, size.bytes>>20)
	}
	return paths
}

// realFile is one that this machine has.
type realFile struct {
	path string
	size int64
}

// realFiles are those of the Go distribution, Debian's packages, Go's modules, and what
// is installed, folder after folder until there are enough.
func realFiles(t *testing.T, enough int64) (found []realFile) {
	t.Helper()
	raw, err := exec.Command("go", "env", "GOROOT", "GOMODCACHE").Output()
	if err != nil {
		t.Fatalf("go env: %v", err)
	}
	folders := strings.Fields(string(raw))
	var total int64
	for _, dir := range slices.Concat(folders[:1], []string{"/var/cache/apt/archives"}, folders[1:], []string{"/usr/lib", "/usr/share"}) {
		if total >= enough {
			break
		}
		here := map[string]int64{}
		_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return nil // what cannot be read is not ours to store
			}
			if info, err := e.Info(); err == nil && info.Size() > 0 && info.Size() <= enough/4 && info.Mode().Perm()&0o004 != 0 {
				here[path] = info.Size()
				total += info.Size()
			}
			return nil
		})
		for _, path := range slices.Sorted(maps.Keys(here)) {
			found = append(found, realFile{path, here[path]})
		}
	}
	return found
}

// archive packs files.
func archive(path string, files []string) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	w := tar.NewWriter(out)
	for _, path := range files {
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(path, "/"), Mode: 0o644, Size: int64(len(content))}); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return out.Close()
}
