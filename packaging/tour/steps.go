package tour

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/disk"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/wire"
)

// probe has the agent look at this machine, without any coordinator.
func (t *tour) probe(ctx context.Context) ([]string, error) {
	var inv hw.Inventory
	if err := t.ask(ctx, &inv, "deimos-agent", "probe"); err != nil {
		return nil, err
	}
	if inv.Memory.Total == 0 || len(inv.Filesystems) == 0 {
		return nil, errors.New("the inventory has neither memory nor a filesystem")
	}
	var all []disk.Candidate
	if err := t.ask(ctx, &all, "deimos-agent", "disks"); err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, errors.New("the agent weighs no disk at all")
	}
	lines := []string{
		fmt.Sprintf("machine  %s: %s, %s, %s of memory, %s", inv.Board.Title, inv.CPU.Model,
			cli.Count(inv.CPU.Cores, "core"), cli.Bytes(int64(inv.Memory.Total)), cli.Count(len(inv.Network), "network interface")),
	}
	lines = append(lines, few("health", health(inv))...)
	return append(lines, few("chunks", room(all))...), nil
}

// ask runs one of our programs and reads what it prints as JSON.
func (t *tour) ask(ctx context.Context, into any, program, command string) error {
	raw, err := t.exec(ctx, program, command, "-o", "json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("what %s %s prints cannot be read: %w", program, command, err)
	}
	return nil
}

// health is what the disks and the hottest sensor say, the worst first.
func health(inv hw.Inventory) []string {
	var bad, rest []string
	for _, d := range inv.Disks {
		name := fmt.Sprintf("disk %s, %s, ", d.Name, cli.Bytes(int64(d.Size)))
		switch h := d.Health; {
		case d.Power == hw.PowerAsleep:
			rest = append(rest, name+"sleeps and was not asked")
		case h == nil:
			rest = append(rest, name+"does not tell how it is")
		case h.Passed != nil && !*h.Passed:
			bad = append(bad, name+"expects to fail: save what is on it")
		case len(h.Warnings) > 0:
			bad = append(bad, name+"warns: "+strings.Join(h.Warnings, "; "))
		default:
			rest = append(rest, name+"has no warning")
		}
	}
	warmth := "no temperature can be read"
	var hottest float64
	for _, s := range inv.Sensors {
		if s.Kind == hw.Temperature && s.Value > hottest {
			hottest = s.Value
			warmth = fmt.Sprintf("%.0f °C at the hottest sensor, %s", s.Value, s.Name)
		}
	}
	return slices.Concat(bad, []string{warmth}, rest)
}

// room is which disks could hold chunks, those that could before the others.
func room(all []disk.Candidate) (says []string) {
	slices.SortStableFunc(all, func(a, b disk.Candidate) int { return cmp.Compare(b.Capacity, a.Capacity) })
	for _, c := range all {
		name := cmp.Or(c.Mount, c.Disk)
		if c.Use {
			says = append(says, fmt.Sprintf("%s could hold %s: %s", name, cli.Bytes(c.Capacity), c.Why))
		} else {
			says = append(says, fmt.Sprintf("%s not used: %s", name, c.Why))
		}
	}
	return says
}

// few is at most three lines under one name.
func few(name string, says []string) (lines []string) {
	const most = 3
	more := len(says) - most
	if more > 0 {
		says = append(slices.Clone(says[:most]), fmt.Sprintf("and %d more", more))
	}
	for _, s := range says {
		lines = append(lines, fmt.Sprintf("%-7s  %s", name, s))
		name = ""
	}
	return lines
}

// enrol starts the coordinator and three devices, and waits until all are online.
func (t *tour) enrol(ctx context.Context) ([]string, error) {
	ready, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	argv := []string{t.program("deimos"), "serve", "--dir", t.path("coordinator"), "--listen", "127.0.0.1:0", "--mqtt", "127.0.0.1:0", "--beat", "2s"}
	if t.Image != "" {
		argv = append(argv, "--cert-name", qemu.Host)
	}
	var err error
	t.serve, err = t.starter.Start(ready, proc.Command{
		Name: "the coordinator", Log: t.path("logs", "coordinator.log"), Ready: api.Ready, Argv: argv,
	})
	if err != nil {
		return nil, err
	}
	// The release keys come first: a device learns whom to believe when it enrols.
	if err := t.cli(ctx, nil, "release", "keys", "init", "--keys", t.path("release-keys")); err != nil {
		return nil, err
	}
	if err := t.publish(ctx, ""); err != nil {
		return nil, err
	}
	var tok api.Token
	if err := t.cli(ctx, &tok, "token", "create", "--group", "tour", "--uses", fmt.Sprint(fleetSize)); err != nil {
		return nil, err
	}
	t.token = tok.Token
	for n := range fleetSize {
		t.devices = append(t.devices, &device{n: n + 1})
		if err := t.startDevice(ctx, t.devices[n]); err != nil {
			return nil, err
		}
	}
	if err := until(ctx, t.patience(readyLimit), "all devices coming online", func() (bool, error) {
		fleet, err := t.devicesNow(ctx)
		online := 0
		for _, d := range fleet {
			if d.Online {
				online++
			}
		}
		return online == fleetSize, errors.Join(err, t.fallen())
	}); err != nil {
		return nil, err
	}
	return t.learnIDs(ctx)
}

// learnIDs matches each agent's own key with what the coordinator lists.
func (t *tour) learnIDs(ctx context.Context) ([]string, error) {
	fleet, err := t.devicesNow(ctx)
	if err != nil {
		return nil, err
	}
	lines := []string{"one token, three keys made on the devices, mutual TLS 1.3 to broker and data plane"}
	for _, d := range t.devices {
		if d.id, err = t.idOf(d, fleet); err != nil {
			return nil, err
		}
		v, ok := fleet[d.id]
		if !ok || wire.IDOf(v.PublicKey) != wire.DeviceID(d.id) {
			return nil, fmt.Errorf("the coordinator does not list device %s under its own key", d.id)
		}
		where := "slot " + v.Slot
		if t.isMachine(d) {
			where = "a machine in QEMU, " + v.Board
		}
		lines = append(lines, fmt.Sprintf("device %d  %s  agent %s, %s, online", d.n, d.id, v.Agent, where))
	}
	return lines, nil
}

// idOf is what a device calls itself, or for a machine, which lets nobody look, who came
// in by its token.
func (t *tour) idOf(d *device, fleet map[string]api.Device) (string, error) {
	if t.isMachine(d) {
		for id, v := range fleet {
			if v.Labels[labelOf] == strconv.Itoa(d.n) {
				return id, nil
			}
		}
		return "", fmt.Errorf("nobody came in by the token of device %d", d.n)
	}
	raw, err := os.ReadFile(d.state(t, "identity", "membership.json"))
	if err != nil {
		return "", err
	}
	var m struct{ Device string }
	err = json.Unmarshal(raw, &m)
	return m.Device, err
}

// state is a path in a device's state folder.
func (d *device) state(t *tour, parts ...string) string {
	return t.path(append([]string{fmt.Sprintf("device-%d", d.n)}, parts...)...)
}

// startDevice starts a device's launcher, as a service manager would, or its machine.
func (t *tour) startDevice(ctx context.Context, d *device) error {
	raw, err := os.ReadFile(t.path("coordinator", "operator.json"))
	if err != nil {
		return err
	}
	var c api.Context
	if err := json.Unmarshal(raw, &c); err != nil {
		return err
	}
	if t.isMachine(d) {
		return t.startMachine(ctx, d, c.URL)
	}
	p, err := t.starter.Start(ctx, proc.Command{
		Name: fmt.Sprintf("device %d", d.n), Log: t.path("logs", fmt.Sprintf("device-%d.log", d.n)),
		Argv: []string{t.program("deimos-launch"), "--state", d.state(t), "--agent", t.program("deimos-agent"), "--confirm-within", t.patience(20 * time.Second).String(), "--",
			"run", "--coordinator", c.URL, "--token", t.token},
	})
	if err != nil {
		return err
	}
	d.proc = p
	return nil
}

// fallen tells of a process that should run and does not.
func (t *tour) fallen() error {
	if t.serve.Ended() {
		return fmt.Errorf("%s ended by itself: %s", t.serve.Name, t.serve.LastWords())
	}
	for _, d := range t.devices {
		if d == t.victim || d.proc == nil {
			continue
		}
		select {
		case <-d.proc.Done():
			return fmt.Errorf("device %d ended by itself: %s", d.n, d.proc.LastWords())
		default:
		}
	}
	return nil
}

// store puts the file and checks every receipt's signature.
func (t *tour) store(ctx context.Context) ([]string, error) {
	if err := t.cli(ctx, &t.object, "object", "put", "--plain", t.File, "--name", objectName); err != nil {
		return nil, err
	}
	fleet, err := t.devicesNow(ctx)
	if err != nil {
		return nil, err
	}
	receipts := 0
	for _, p := range t.object.Placements {
		holders := map[wire.DeviceID]bool{}
		for _, h := range p.Holders {
			if err := CheckReceipt(p.Chunk, h, fleet[string(h.Device)]); err != nil {
				return nil, err
			}
			holders[h.Device] = true
			receipts++
		}
		if len(holders) < 2 {
			return nil, fmt.Errorf("chunk %s is on %d devices, it should be on two", p.ID, len(holders))
		}
	}
	return []string{
		fmt.Sprintf("%s in %s, Merkle root of the first %s", cli.Bytes(t.object.Size), cli.Count(len(t.object.Chunks), "chunk"), cli.Short(t.object.Chunks[0].ID)),
		fmt.Sprintf("%d receipts, each signed by its device after a checked sync; every signature verified", receipts),
	}, nil
}

// CheckReceipt verifies that the device's own key signed for this very chunk.
func CheckReceipt(c api.Chunk, h api.Holder, d api.Device) error {
	r, err := wire.OpenAs[wire.Report](h.Receipt, ed25519.PublicKey(d.PublicKey), wire.TypeReport)
	if err != nil {
		return fmt.Errorf("the receipt of device %s for chunk %s: %w", h.Device, c.ID, err)
	}
	var receipt wire.Receipt
	if err := json.Unmarshal(r.Body, &receipt); err != nil {
		return err
	}
	if r.State != wire.Succeeded || r.Device != h.Device || receipt.ID != c.ID || receipt.Size != c.Size {
		return fmt.Errorf("device %s gave a receipt for something else than chunk %s", h.Device, c.ID)
	}
	return nil
}

// readBack kills the device with the most chunks and reads everything without it.
func (t *tour) readBack(ctx context.Context) ([]string, error) {
	held := map[*device]int{}
	for _, p := range t.object.Placements {
		for _, d := range t.holders(p) {
			held[d]++
		}
	}
	t.victim = slices.MaxFunc(t.devices, func(a, b *device) int { return held[a] - held[b] })
	if t.Image != "" {
		t.victim = t.devices[0]
	}
	t.victim.proc.Kill() // with SIGKILL: a cut cable asks nobody
	if err := until(ctx, t.patience(readyLimit), "the coordinator noticing that a device is gone", func() (bool, error) {
		fleet, err := t.devicesNow(ctx)
		return err == nil && !fleet[t.victim.id].Online, err
	}); err != nil {
		return nil, err
	}
	out := t.path("read-back")
	if err := t.cli(ctx, nil, "object", "get", "--plain", objectName, "--out", out); err != nil {
		return nil, err
	}
	want, err := slot.Digest(t.File)
	if err != nil {
		return nil, err
	}
	got, err := slot.Digest(out)
	if err != nil {
		return nil, err
	}
	if got != want {
		return nil, fmt.Errorf("the file came back with SHA-256 %s, it was stored with %s", got, want)
	}
	return []string{
		fmt.Sprintf("device %d, which holds %d of %d chunks, was killed and is offline", t.victim.n, held[t.victim], len(t.object.Chunks)),
		fmt.Sprintf("came back whole from the other two: sha256 %s, the same as the file's", cli.Short(got)),
	}, nil
}

// jobs runs both guests over the first chunk and compares with our own count.
func (t *tour) jobs(ctx context.Context) ([]string, error) {
	data, err := t.chunkOf(0)
	if err != nil {
		return nil, err
	}
	count, err := t.runJob(ctx, "wordcount")
	if err != nil {
		return nil, err
	}
	var words struct{ Bytes, Lines, Words int }
	if err := json.Unmarshal(count.Output, &words); err != nil {
		return nil, fmt.Errorf("the word count cannot be read: %w", err)
	}
	lines := bytes.Count(data, []byte("\n"))
	fields := len(bytes.FieldsFunc(data, func(r rune) bool { return r < 0x80 && strings.ContainsRune(" \t\n\v\f\r", r) }))
	if words.Bytes != len(data) || words.Lines != lines || words.Words != fields {
		return nil, fmt.Errorf("the device counted %+v, it is %d bytes, %d lines, %d words", words, len(data), lines, fields)
	}
	hash, err := t.runJob(ctx, "sha256sum")
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(data)
	if got := strings.TrimSpace(string(hash.Output)); got != hex.EncodeToString(sum[:]) {
		return nil, fmt.Errorf("the device hashed to %s, it is %x", got, sum)
	}
	return []string{
		fmt.Sprintf("words   %d words, %d lines in %s; the same counted here (device %d, %.2f s of CPU)", words.Words, words.Lines, cli.Bytes(int64(len(data))), t.number(count.Device), count.Result.CPUSeconds),
		fmt.Sprintf("hash    %s; the same hashed here (device %d, %.2f s of CPU)", cli.Short(hex.EncodeToString(sum[:])), t.number(hash.Device), hash.Result.CPUSeconds),
		fmt.Sprintf("both results signed by their devices; engine %s in a process of its own", hash.Result.Engine),
	}, nil
}

// runJob runs a guest over the first chunk and checks the result's signature.
func (t *tour) runJob(ctx context.Context, guest string) (api.JobResult, error) {
	var j api.JobResult
	args := []string{"job", "run", t.guest(guest), "--input", objectName, "--chunk", "0"}
	if t.Image != "" { // compiling the guest alone takes a machine most of the ordinary minute
		args = append(args, "--cpu", machineJob.String(), "--wall", machineJob.String())
	}
	if err := t.cli(ctx, &j, args...); err != nil {
		return j, err
	}
	var d api.Device
	if err := t.cli(ctx, &d, "device", "show", string(j.Device)); err != nil {
		return j, err
	}
	r, err := wire.OpenAs[wire.Report](j.Report, ed25519.PublicKey(d.PublicKey), wire.TypeReport)
	if err != nil {
		return j, fmt.Errorf("the result of device %s: %w", j.Device, err)
	}
	sum := sha256.Sum256(j.Output)
	if r.Attachment == nil || r.Attachment.SHA256 != hex.EncodeToString(sum[:]) {
		return j, fmt.Errorf("device %s signed for another output", j.Device)
	}
	return j, nil
}

func (t *tour) guest(name string) string { return filepath.Join(t.bin, "guests", name+".wasm") }

func (t *tour) number(id wire.DeviceID) int {
	for _, d := range t.devices {
		if d.id == string(id) {
			return d.n
		}
	}
	return 0
}

// auditStorage has an honest device prove itself, then flips single bytes on the
// disk of the stopped one and challenges it when it is back.
func (t *tour) auditStorage(ctx context.Context) ([]string, error) {
	honest := t.holder()
	var good api.Audit
	if err := t.cli(ctx, &good, "audit", "storage", honest.id); err != nil {
		return nil, err
	}
	if good.Right != good.Leaves || good.Right == 0 {
		return nil, fmt.Errorf("the honest device proved %d of %d leaves", good.Right, good.Leaves)
	}
	flipped, err := t.tamper()
	if err != nil {
		return nil, err
	}
	d := t.victim
	if err := t.startDevice(ctx, d); err != nil {
		return nil, err
	}
	if err := t.untilOnline(ctx, d); err != nil {
		return nil, err
	}
	t.victim = nil
	var bad api.Audit
	if err := t.cli(ctx, &bad, "audit", "storage", d.id, "--leaves", "256"); err == nil {
		return nil, fmt.Errorf("device %d proved what it cannot have any more", d.n)
	}
	if bad.Outcome != api.AuditLost && bad.Outcome != api.AuditWrong {
		return nil, fmt.Errorf("the tampered device ended as %q: %s", bad.Outcome, bad.Reason)
	}
	// Storing the same file again brings every chunk back to two good copies.
	if err := t.cli(ctx, &t.object, "object", "put", "--plain", t.File, "--name", objectName); err != nil {
		return nil, err
	}
	return []string{
		fmt.Sprintf("device %d proved %d of %d random 4 KiB leaves, checked with root and size alone", honest.n, good.Right, good.Leaves),
		fmt.Sprintf("flipped one byte in each of %s on device %d's disk, and started it again", cli.Count(flipped, "chunk"), d.n),
		fmt.Sprintf("device %d, asked for %d leaves: outcome %q, %s confessed, %d answered wrong", d.n, bad.Leaves, bad.Outcome, cli.Count(len(bad.Lost), "chunk"), len(bad.Wrong)),
		"stored the file again: every chunk has two good copies once more",
	}, nil
}

func (t *tour) untilOnline(ctx context.Context, d *device) error {
	return until(ctx, t.patience(readyLimit), fmt.Sprintf("device %d coming online", d.n), func() (bool, error) {
		fleet, err := t.devicesNow(ctx)
		return err == nil && fleet[d.id].Online, errors.Join(err, t.fallen())
	})
}

// holder is a running device that holds something. Every chunk is on two, so
// there is one.
func (t *tour) holder() *device {
	for _, p := range t.object.Placements {
		for _, d := range t.holders(p) {
			if d != t.victim {
				return d
			}
		}
	}
	return t.devices[0]
}

// tamper flips one byte in a fifth of the chunks on the stopped device's disk,
// one at least, so that a challenge of 256 leaves cannot miss them. It finds
// the chunks by their content: they stand in the segments as they are.
func (t *tour) tamper() (int, error) {
	var mine []int
	for i, p := range t.object.Placements {
		if slices.Contains(t.holders(p), t.victim) {
			mine = append(mine, i)
		}
	}
	rand.Shuffle(len(mine), func(i, j int) { mine[i], mine[j] = mine[j], mine[i] })
	want := (len(mine) + 4) / 5
	logs, err := filepath.Glob(t.victim.state(t, "volumes", "main", "*", "*.seg"))
	if err != nil || len(logs) == 0 {
		logs, err = filepath.Glob(t.victim.state(t, "volumes", "main", "*.seg"))
	}
	if err != nil || len(logs) == 0 {
		return 0, fmt.Errorf("device %d has no segment to tamper with: %v", t.victim.n, err)
	}
	flipped := 0
	for _, i := range mine {
		if flipped == want {
			break
		}
		data, err := t.chunkOf(i)
		if err != nil {
			return flipped, err
		}
		for _, log := range logs {
			ok, err := FlipByte(log, data)
			if err != nil {
				return flipped, err
			}
			if ok {
				flipped++
				break
			}
		}
	}
	if flipped == 0 {
		return 0, fmt.Errorf("none of device %d's chunks were found on its disk", t.victim.n)
	}
	return flipped, nil
}

// FlipByte changes one byte in the middle of data where it stands in a file.
func FlipByte(path string, data []byte) (bool, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	at := bytes.Index(raw, data)
	if at < 0 {
		return false, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return false, err
	}
	off := at + len(data)/2
	_, err = f.WriteAt([]byte{raw[off] ^ 1}, int64(off))
	return err == nil, errors.Join(err, f.Close())
}

// auditCompute gives a device a job whose answer is known, and checks that the
// answer was fixed before.
func (t *tour) auditCompute(ctx context.Context) ([]string, error) {
	var last error
	for _, d := range t.devices {
		var a api.Audit
		if last = t.cli(ctx, &a, "audit", "compute", d.id, "--module", t.guest("sha256sum")); last != nil {
			if a.Outcome != "" {
				return nil, fmt.Errorf("device %d was asked, and the outcome is %q: %w", d.n, a.Outcome, last)
			}
			continue // this one may share no chunk with another any more
		}
		salt, err1 := hex.DecodeString(a.Salt)
		expected, err2 := hex.DecodeString(a.Expected)
		sum := sha256.Sum256(slices.Concat(salt, expected))
		if err := errors.Join(err1, err2); err != nil || hex.EncodeToString(sum[:]) != a.Commitment {
			return nil, errors.New("the opened commitment is not the one that was made")
		}
		return []string{
			fmt.Sprintf("the coordinator got a chunk of device %d from another holder and ran the job itself", d.n),
			fmt.Sprintf("committed to %s; the order is a job order like any other", cli.Short(a.Commitment)),
			fmt.Sprintf("device %d answered %s: outcome %q, and the commitment opens", d.n, cli.Short(a.Got), a.Outcome),
		}, nil
	}
	return nil, last
}

// The programs of the releases that the tour offers, which "make build" gives the
// versions after ours.
const (
	nextAgent   = "tour/agent-next"
	brokenAgent = "tour/agent-broken"
)

// learnVersions asks the programs that are going to be offered what they are.
func (t *tour) learnVersions(ctx context.Context) error {
	for program, version := range map[string]*string{nextAgent: &t.next, brokenAgent: &t.broken} {
		var v cli.Version
		if err := t.ask(ctx, &v, program, "version"); err != nil {
			return err
		}
		*version = v.Version
	}
	return nil
}

// update installs a good release and then one that does not come up.
func (t *tour) update(ctx context.Context) ([]string, error) {
	d := t.devices[1]
	if t.Image != "" {
		d = t.devices[0]
	}
	forward, err := t.goForward(ctx, d)
	if err != nil {
		return nil, err
	}
	lines, err := t.comeBack(ctx, d)
	if err != nil {
		return nil, err
	}
	lines = append([]string{forward}, lines...)
	if t.Image != "" {
		lines = append(lines, "the machines stay as they are: their update is a firmware, which this tour does not build")
	}
	return lines, nil
}

// goForward offers the good release.
func (t *tour) goForward(ctx context.Context, d *device) (string, error) {
	fleet, err := t.devicesNow(ctx)
	if err != nil {
		return "", err
	}
	before := fleet[d.id]
	if err := t.release(ctx, t.next, nextAgent); err != nil {
		return "", err
	}
	began := time.Now()
	var good []api.Order
	if err := t.cli(ctx, &good, "release", "offer", t.next, "--device", d.id, "--wait", t.patience(time.Minute).String()); err != nil {
		return "", err
	}
	took := time.Since(began)
	after, err := t.running(ctx, d, t.next)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%-7s signed with TUF keys, installed beside, confirmed: device %d went %s/%s → %s/%s in %.1f s",
		t.next, d.n, before.Agent, before.Slot, after.Agent, after.Slot, took.Seconds()), nil
}

// comeBack offers a release that does not come up to a device that runs the good one.
func (t *tour) comeBack(ctx context.Context, d *device) ([]string, error) {
	if err := t.release(ctx, t.broken, brokenAgent); err != nil {
		return nil, err
	}
	began := time.Now()
	var bad []api.Order
	err := t.cli(ctx, &bad, "release", "offer", t.broken, "--device", d.id, "--wait", t.patience(2*time.Minute).String())
	if len(bad) != 1 || bad[0].State != wire.Failed || bad[0].Result.Code != wire.CodeRolledBack {
		return nil, fmt.Errorf("the bad release should have been rolled back, but: %v", errors.Join(err, errors.New("the order is "+stateOf(bad))))
	}
	back := time.Since(began)
	if _, err := t.running(ctx, d, t.next); err != nil {
		return nil, err
	}
	return []string{
		fmt.Sprintf("%-7s signed alike, but does not come up; back on %s by itself after %.1f s; the device reports:", t.broken, t.next, back.Seconds()),
		"        " + strings.Replace(bad[0].Result.Reason, "; ", ";\n                 ", 1),
	}, nil
}

func stateOf(list []api.Order) string {
	if len(list) != 1 {
		return "missing"
	}
	return string(list[0].State) + " " + list[0].Result.Code
}

// running waits until a device is online with a version.
func (t *tour) running(ctx context.Context, d *device, version string) (api.Device, error) {
	var v api.Device
	err := until(ctx, t.patience(readyLimit), fmt.Sprintf("device %d running %s", d.n, version), func() (bool, error) {
		fleet, err := t.devicesNow(ctx)
		v = fleet[d.id]
		return err == nil && v.Online && v.Agent == version, err
	})
	return v, err
}

// release builds, signs and publishes an agent binary.
func (t *tour) release(ctx context.Context, version, agent string) error {
	dir := t.path("releases", version)
	if err := t.cli(ctx, nil, "release", "build", "--version", version, "--agent", t.program(agent), "--out", dir); err != nil {
		return err
	}
	return t.publish(ctx, dir)
}

// publish signs with the keys of the tour and uploads.
func (t *tour) publish(ctx context.Context, bundle string) error {
	args := []string{"release", "publish", "--keys", t.path("release-keys"), "--repo", t.path("repo")}
	if bundle != "" {
		args = append(args, "--bundle", bundle)
	}
	return t.cli(ctx, nil, args...)
}
