package test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/wire"
)

const (
	// patience is how long an event may take before a test fails.
	patience = 60 * time.Second
	// testLimit bounds everything that one test waits for.
	testLimit = 4 * time.Minute
	stopLimit = 30 * time.Second
)

var (
	bin     string // folder with the programs
	starter *proc.Starter
	scratch string // what tests share, e.g. the nats-server
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	err := findPrograms()
	if err == nil {
		scratch, err = os.MkdirTemp("", "deimos-test-")
	}
	// Whatever our processes leave behind becomes our child, and can be counted.
	if err == nil {
		err = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	sideBySide()
	starter = proc.NewStarter()
	defer starter.End()
	code = m.Run()
	if left := leftBehind(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "processes are left: %s\n", strings.Join(left, "; "))
		return 1
	}
	return code
}

// sideBySide runs two tests a core, unless -parallel was given: they wait more
// than they work.
func sideBySide() {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		_ = flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0))) // a number always fits
	}
}

func findPrograms() (err error) {
	if bin = os.Getenv("DEIMOS_BIN"); bin == "" {
		bin = filepath.Join("..", "bin")
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	for _, name := range []string{"deimos", "deimos-agent", "deimos-launch", "guests/wordcount.wasm", "guests/sha256sum.wasm", "tour/agent-next", "tour/agent-broken"} {
		if _, err := os.Stat(program(name)); err != nil {
			return fmt.Errorf("%s is missing in %s: run \"make build\", or name the folder in DEIMOS_BIN", name, bin)
		}
	}
	return nil
}

// leftBehind names the processes that descend from this one and still run a
// moment after everything was stopped, and ends them.
func leftBehind() (left []string) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left = left[:0]
		for _, pid := range descendants(os.Getpid()) {
			cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			left = append(left, fmt.Sprintf("%d %s", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			for _, pid := range descendants(os.Getpid()) {
				_ = unix.Kill(pid, unix.SIGKILL) // it may have ended meanwhile
			}
			return left
		}
	}
}

// descendants lists what runs below a process; what has ended and was not
// reaped does not run.
func descendants(root int) (out []int) {
	children := map[int][]int{}
	entries, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range entries {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		_, rest, _ := strings.Cut(string(raw[bytes.LastIndexByte(raw, ')')+1:]), " ")
		f := strings.Fields(rest) // state, parent, …
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if parent, err := strconv.Atoi(f[1]); err == nil && f[0] != "Z" && f[0] != "X" {
			children[parent] = append(children[parent], pid)
		}
	}
	for next := children[root]; len(next) > 0; next = next[1:] {
		out = append(out, next[0])
		next = append(next, children[next[0]]...)
	}
	return out
}

// seeded is a random source whose seed is in the test's log.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("DEIMOS_TEST_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("DEIMOS_TEST_SEED is no number: %v", err)
		}
	}
	t.Logf("DEIMOS_TEST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// randomText is printable, because wc does not take what is not for words.
func randomText(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = "abcdefghijklmnopqrstuvwxyz.,  \t\n"[rng.IntN(32)]
	}
	return b
}

// ports gives each address away once. They lie below those that the kernel
// takes for outgoing connections, so that a server can come back to its own.
var ports = struct {
	sync.Mutex
	given map[int]bool
}{given: map[int]bool{}}

func freeAddress(t *testing.T) string {
	t.Helper()
	ports.Lock()
	defer ports.Unlock()
	for range 1000 {
		port := 20000 + rand.IntN(12000)
		if ports.given[port] {
			continue
		}
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if ln, err := net.Listen("tcp", addr); err == nil {
			ln.Close()
			ports.given[port] = true
			return addr
		}
	}
	t.Fatal("there is no free port")
	return ""
}

// fleet is a coordinator and its devices.
type fleet struct {
	t       *testing.T
	ctx     context.Context
	dir     string
	beat    string
	https   string
	mqtt    string
	nats    string   // URL of the external server; empty: embedded
	natsAt  string   // where that listens, if nats is a way to it
	door    string   // where devices find the coordinator; empty: https
	public  []string // more flags of the coordinator
	agent   string   // program of the devices; empty: the agent that ships
	serve   *proc.Process
	server  *proc.Process // the external nats-server
	token   string
	devices []*device
	client  *api.Client
	trial   time.Duration // how long a test repeats a command that was not answered; 0: twice patience
}

type option func(*fleet)

// slowBeat lets nothing but a hello tell the coordinator how much room there is.
func slowBeat(f *fleet) { f.beat = "10m" }

// serving gives the coordinator more flags.
func serving(flags ...string) option {
	return func(f *fleet) { f.public = append(f.public, flags...) }
}

// newFleet starts a coordinator and ends everything with the test.
func newFleet(t *testing.T, opts ...option) *fleet {
	t.Helper()
	f := &fleet{t: t, dir: t.TempDir(), beat: "1s", https: freeAddress(t), mqtt: freeAddress(t)}
	var cancel context.CancelFunc
	f.ctx, cancel = context.WithTimeout(context.Background(), testLimit)
	t.Cleanup(cancel)
	t.Cleanup(f.end)
	for _, o := range opts {
		o(f)
	}
	f.startServe()
	return f
}

func (f *fleet) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

func program(name string) string { return filepath.Join(bin, name) }
func guest(name string) string   { return program("guests/" + name + ".wasm") }

// start runs a program in the background until the test ends.
func (f *fleet) start(c proc.Command) *proc.Process {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	p, err := starter.Start(ctx, c)
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

func (f *fleet) serveArgs(more ...string) []string {
	args := []string{program("deimos"), "serve", "--dir", f.path("coordinator"), "--listen", f.https, "--mqtt", f.mqtt, "--beat", f.beat}
	if f.nats != "" {
		args = append(args, "--nats", f.nats)
	}
	return slices.Concat(args, f.public, more)
}

func (f *fleet) startServe() {
	f.t.Helper()
	f.serve = f.start(proc.Command{Name: "the coordinator", Log: f.path("logs", "coordinator.log"), Ready: api.Ready, Argv: f.serveArgs()})
	c, err := api.LoadContext(f.path("coordinator", "operator.json"))
	if err == nil {
		f.client, err = api.NewClient(c)
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// end stops everything, devices first, and shows the logs of a failed test.
func (f *fleet) end() {
	var wg sync.WaitGroup
	for _, d := range f.devices {
		wg.Go(func() { f.stopped(d.proc, 0) })
	}
	wg.Wait()
	f.stopped(f.serve, 0)
	f.stopped(f.server, 0)
	if !f.t.Failed() {
		return
	}
	logs, _ := filepath.Glob(f.path("logs", "*"))
	for _, path := range logs {
		raw, _ := os.ReadFile(path)
		lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
		f.t.Logf("the end of %s:\n%s", filepath.Base(path), strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
}

// stopped ends a process that should still run, with SIGTERM and in good order.
func (f *fleet) stopped(p *proc.Process, code int) {
	if p == nil || p.Ended() {
		return
	}
	if !p.Stop(stopLimit) {
		f.t.Errorf("%s did not end within %s of SIGTERM and was killed", p.Name, stopLimit)
	} else if got := p.ExitCode(); got != code {
		f.t.Errorf("%s ended with code %d on SIGTERM, want %d: %s", p.Name, got, code, p.LastWords())
	}
}

// device is one agent, alone or under its launcher.
type device struct {
	f        *fleet
	name     string
	launcher bool
	noToken  bool     // it waits to be claimed, or is a member
	args     []string // more flags of the agent
	env      []string // more of its environment
	id       wire.DeviceID
	proc     *proc.Process
}

// enrol starts n devices and waits until the coordinator knows and sees them.
func (f *fleet) enrol(n int, launcher bool, args ...string) {
	f.t.Helper()
	var tok api.Token
	f.ok(&tok, "token", "create", "--group", "test", "--uses", strconv.Itoa(n))
	f.token = tok.Token
	first := len(f.devices)
	for range n {
		d := f.add(device{launcher: launcher, args: args})
		d.start()
	}
	for _, d := range f.devices[first:] {
		d.awaitOnline()
	}
}

// add gives the fleet a device that has not begun to run.
func (f *fleet) add(v device) *device {
	d := &v
	d.f, d.name = f, fmt.Sprintf("device-%d", len(f.devices)+1)
	f.devices = append(f.devices, d)
	return d
}

func (d *device) state(parts ...string) string {
	return d.f.path(append([]string{d.name}, parts...)...)
}

func (d *device) runArgs() []string {
	args := []string{"run", "--state", d.state(), "--coordinator", "https://" + cmp.Or(d.f.door, d.f.https)}
	if !d.noToken {
		args = append(args, "--token", d.f.token)
	}
	return append(args, d.args...)
}

func (d *device) start() {
	d.f.t.Helper()
	argv := append([]string{cmp.Or(d.f.agent, program("deimos-agent"))}, d.runArgs()...)
	if d.launcher {
		argv = append([]string{program("deimos-launch"), "--state", d.state(), "--agent", program("deimos-agent"), "--confirm-within", "30s", "--"}, d.runArgs()...)
	}
	d.proc = d.f.start(proc.Command{Name: d.name, Log: d.log(), Argv: argv, Env: d.env})
}

func (d *device) log() string { return d.f.path("logs", d.name+".log") }

// awaitOnline waits until the device has enrolled and the coordinator sees it.
func (d *device) awaitOnline() {
	d.f.t.Helper()
	d.f.until(d.name+" coming online", func() bool {
		if d.proc.Ended() {
			d.f.t.Fatalf("%s ended with code %d: %s", d.name, d.proc.ExitCode(), d.proc.LastWords())
		}
		if d.id == "" {
			raw, err := os.ReadFile(d.state("identity", "membership.json"))
			if err != nil {
				return false
			}
			var m wire.EnrolReply
			if json.Unmarshal(raw, &m) != nil {
				return false
			}
			d.id = m.Device
		}
		return d.now().Online
	})
}

// now is what the coordinator knows of the device.
func (d *device) now() api.Device {
	d.f.t.Helper()
	v, err := d.f.client.Device(d.f.ctx, string(d.id))
	if err != nil {
		d.f.t.Fatal(err)
	}
	return v
}

// kill pulls the plug and waits until the coordinator has noticed.
func (d *device) kill() {
	d.f.t.Helper()
	d.proc.Kill()
	d.awaitOffline()
}

func (d *device) awaitOffline() {
	d.f.t.Helper()
	d.f.until("the coordinator noticing that "+d.name+" is gone", func() bool { return !d.now().Online })
}

// stop ends the agent in good order.
func (d *device) stop() {
	d.f.t.Helper()
	d.f.stopped(d.proc, 0)
	d.awaitOffline()
}

// sub runs one part of a test under a name of its own.
func (f *fleet) sub(name string, part func(t *testing.T)) {
	whole := f.t
	whole.Run(name, func(t *testing.T) {
		f.t = t // failures belong to the part
		defer func() { f.t = whole }()
		part(t)
	})
}

// until polls for an event, at most for patience.
func (f *fleet) until(what string, ok func() bool) {
	f.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) || f.ctx.Err() != nil {
			f.t.Fatalf("%s did not happen within %s", what, patience)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// runToEnd runs a program as a user would, within a bound.
func runToEnd(ctx context.Context, c proc.Command) (proc.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	return starter.Run(ctx, c)
}

// deimos runs the command line with this fleet's context.
func (f *fleet) deimos(args ...string) (proc.Result, error) {
	return runToEnd(f.ctx, proc.Command{Argv: append([]string{program("deimos")}, args...), Dir: f.dir, Env: []string{"DEIMOS_CONTEXT=" + f.path("coordinator", "operator.json")}})
}

// ok runs a command that must succeed. v, unless nil, takes what it prints as JSON.
func (f *fleet) ok(v any, args ...string) {
	f.t.Helper()
	if code, said := f.try(v, args...); code != 0 {
		f.t.Fatalf("deimos %s: exit code %d: %s", strings.Join(args, " "), code, said)
	}
}

// fails runs a command that must end with code, and returns its sentence.
func (f *fleet) fails(v any, code int, args ...string) string {
	f.t.Helper()
	got, said := f.try(v, args...)
	if got != code {
		f.t.Fatalf("deimos %s: exit code %d, want %d: %s", strings.Join(args, " "), got, code, said)
	}
	return said
}

func (f *fleet) try(v any, args ...string) (code int, said string) {
	f.t.Helper()
	if v != nil {
		args = append(slices.Clone(args), "-o", "json")
	}
	r, err := f.deimos(args...)
	if err != nil {
		f.t.Fatalf("deimos %s: %v", strings.Join(args, " "), err)
	}
	if v != nil && len(r.Stdout) > 0 {
		if err := json.Unmarshal(r.Stdout, v); err != nil {
			f.t.Fatalf("deimos %s printed no JSON: %v", strings.Join(args, " "), err)
		}
	}
	if r.Code != 0 {
		checkSentence(f.t, r)
	}
	return r.Code, r.Said()
}

// checkSentence wants one sentence for a person on standard error: no stack
// trace, no usage page, nothing twice.
func checkSentence(t *testing.T, r proc.Result) {
	t.Helper()
	text := strings.TrimSpace(string(r.Stderr))
	switch {
	case text == "":
		t.Error("a failure without a word")
	case strings.Contains(text, "goroutine ") || strings.Contains(text, "panic"):
		t.Errorf("a stack trace: %s", text)
	case len(text) > 1000:
		t.Errorf("%d bytes are no sentence: %s", len(text), text)
	}
}

// putResult is what "deimos object put -o json" prints.
type putResult struct {
	api.Object
	Placements []api.Placement `json:"placements"`
}

// put stores data as a user stores a file.
func (f *fleet) put(name string, data []byte, args ...string) (o putResult) {
	f.t.Helper()
	file := f.write("in-"+name, data)
	f.ok(&o, append([]string{"object", "put", file, "--name", name}, args...)...)
	return o
}

// checkGet reads an object back through the command line.
func (f *fleet) checkGet(name string, want []byte) {
	f.t.Helper()
	out := f.path("out-" + name)
	defer os.Remove(out)
	f.ok(nil, "object", "get", name, "--out", out)
	got, err := os.ReadFile(out)
	if err != nil {
		f.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		f.t.Fatalf("%s came back as something else (%d bytes, stored %d)", name, len(got), len(want))
	}
}

func (f *fleet) write(name string, data []byte) string {
	f.t.Helper()
	path := f.path(name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return path
}

// holdersOf lists the devices that gave a receipt for chunk i.
func (f *fleet) holdersOf(o putResult, i int) (out []*device) {
	f.t.Helper()
	for _, h := range o.Placements[i].Holders {
		n := slices.IndexFunc(f.devices, func(d *device) bool { return d.id == h.Device })
		if n < 0 {
			f.t.Fatalf("chunk %d is said to be on device %s, which is none of ours", i, h.Device)
		}
		out = append(out, f.devices[n])
	}
	return out
}

// filesBelow finds the files below dir whose names end so.
func filesBelow(dir, end string) (out []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() && strings.HasSuffix(path, end) {
			out = append(out, path)
		}
		return err
	})
	return out, err
}
