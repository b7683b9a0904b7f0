// Command bench measures the line between coordinator and devices, and storage, and
// prints a table: what, ours, the baseline in the same run, and their ratio. "make bench"
// runs it.
//
// Ours is the real coordinator as a process of its own, and in this process as
// many simulated devices as asked for (see agent.Simulation). The baseline is
// in bare.go, and of devices that follow a release in follow.go. For what a device spends while idle it is a real agent, and the
// baseline its budget or the bare databases (steady.go). Storage is measured beside
// plain files (storage.go). Both share the processors that there are; nothing else should run.
package main

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

var (
	bin    = flag.String("bin", "bin", "folder with the built programs")
	fleet  = flag.Int("agents", 1000, "devices for the rows on memory and on coming back")
	orders = flag.Int("orders", 10_000, "orders for the row on their rate")

	idleFor   = flag.Duration("idle", 2*time.Minute, "how long a device of the image is left alone")
	image     = flag.String("image", "", "disk image of a device, for the rows on it; the one below -bin if not given")
	imageOnly = flag.Bool("image-only", false, "the rows on a device of the image alone")

	computeOnly = flag.Bool("compute-only", false, "the rows on what jobs compute against native programs, and on what each costs beside that, alone")
	updatesOnly = flag.Bool("updates", false, "the rows on updates alone")
	jobsOnly    = flag.Bool("jobs", false, "the rows on what each job costs alone")

	followOnly = flag.Bool("follow", false, "the row on devices that follow a release alone")

	storageOnly = flag.String("storage", "", "the rows on storage alone: all, or puts, reads, growth, memory or objects")
)

const (
	rateDevices   = 64 // for the row on the rate of orders
	latencyOrders = 500
	connectAtOnce = 32
	limit         = 25 * time.Minute // for everything, but the time that a device of the image is left alone
)

func main() {
	if len(os.Args) == 4 && os.Args[1] == "bare-server" {
		check(bareServer(os.Args[2], os.Args[3]))
		return
	}
	if len(os.Args) == 4 && os.Args[1] == "bare-files" {
		check(bareFiles(os.Args[2], os.Args[3]))
		return
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) // what is on disk is removed
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit+*idleFor)
	defer cancel()
	var t table
	check(run(ctx, &t))
	check(t.kept())
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, t *table) error {
	fmt.Printf("%d processors, %s, %d devices\n\n", runtime.NumCPU(), runtime.Version(), *fleet)
	t.head()
	if *imageOnly {
		return imageRows(ctx, t)
	}
	if *storageOnly != "" {
		return storageRows(ctx, t, *storageOnly)
	}
	if *computeOnly {
		if err := computeRows(ctx, t); err != nil {
			return err
		}
		return jobRows(ctx, t)
	}
	if *jobsOnly {
		return jobRows(ctx, t)
	}
	if *followOnly {
		return followRow(ctx, t)
	}
	if *updatesOnly {
		if err := deltaRows(ctx, t); err != nil {
			return err
		}
		return updateRows(ctx, t)
	}
	sealing(t)
	known, err := knowing(ctx)
	if err != nil {
		return fmt.Errorf("know the machine: %w", err)
	}
	t.row("know the machine, of a core (budget)", "%", known, steadyBudget, "%.3f")
	idle, err := steady(ctx)
	if err != nil {
		return fmt.Errorf("an agent's steady state: %w", err)
	}
	bases, err := databases(ctx)
	if err != nil {
		return fmt.Errorf("idle databases: %w", err)
	}
	t.row("idle agent, of a core (databases)", "%", idle, bases, "%.3f")
	if err := imageRows(ctx, t); err != nil {
		return err
	}
	if err := storageRows(ctx, t, "all"); err != nil {
		return err
	}
	if err := computeRows(ctx, t); err != nil {
		return err
	}
	if err := jobRows(ctx, t); err != nil {
		return err
	}
	if err := deltaRows(ctx, t); err != nil {
		return err
	}
	if err := updateRows(ctx, t); err != nil {
		return fmt.Errorf("updates: %w", err)
	}
	if err := followRow(ctx, t); err != nil {
		return fmt.Errorf("devices that follow a release: %w", err)
	}
	bare, err := measure(ctx, newBareSide)
	if err != nil {
		return fmt.Errorf("the baseline: %w", err)
	}
	ours, err := measure(ctx, newOurSide)
	if err != nil {
		return err
	}
	t.row("order round trips", "/s", ours.rate, bare.rate, "%.0f")
	t.row("order round trip, p50", "ms", ms(ours.p50), ms(bare.p50), "%.2f")
	t.row("order round trip, p99", "ms", ms(ours.p99), ms(bare.p99), "%.2f")
	t.row("coordinator's memory, a device", "KiB", ours.memory/1024, bare.memory/1024, "%.0f")
	t.row(fmt.Sprintf("coordinator's memory, %d devices", *fleet), "MiB", ours.whole/(1<<20), bare.whole/(1<<20), "%.0f")
	t.row("device's memory, simulated", "KiB", ours.device/1024, bare.device/1024, "%.0f")
	t.row(fmt.Sprintf("%d devices enrolled or connected", *fleet), "s", ours.join.Seconds(), bare.join.Seconds(), "%.1f")
	t.row(fmt.Sprintf("%d devices back after a kill", *fleet), "s", ours.back.Seconds(), bare.back.Seconds(), "%.1f")
	return nil
}

// table prints its rows as they come.
type table struct {
	over []string // what is over its limit
}

func (*table) head() { fmt.Printf("%-40s %12s %12s %8s\n", "what", "ours", "baseline", "ratio") }

func (*table) row(what, unit string, ours, base float64, format string) {
	f := func(v float64) string { return fmt.Sprintf(format, v) + " " + unit }
	fmt.Printf("%-40s %12s %12s %8.2f\n", what, f(ours), f(base), ours/base)
}

// paired is a row of several rounds: the medians of both, the median of the rounds'
// ratios, and in brackets the least and the most of those.
func (*table) paired(what, unit string, rounds []pair, format string) {
	var ours, base, ratio []float64
	for _, r := range rounds {
		ours, base, ratio = append(ours, r.ours), append(base, r.base), append(ratio, r.ours/r.base)
	}
	f := func(v []float64) string { return fmt.Sprintf(format, median(v)) + " " + unit }
	fmt.Printf("%-40s %12s %12s %8.2f (%.2f to %.2f)\n", what, f(ours), f(base), median(ratio), slices.Min(ratio), slices.Max(ratio))
}

// pair is one round of ours and of the baseline.
type pair struct{ ours, base float64 }

// interleave measures both in turn, so that whatever else the machine does meets
// both; the one that begins changes. A round before the first is not counted.
func interleave(rounds int, ours, base func() (float64, error)) (all []pair, err error) {
	for i := range rounds + 1 {
		var p pair
		turns := []struct {
			measure func() (float64, error)
			into    *float64
		}{{ours, &p.ours}, {base, &p.base}}
		if i%2 == 1 {
			slices.Reverse(turns)
		}
		for _, turn := range turns {
			runtime.GC() // nobody pays for the garbage of another
			if *turn.into, err = turn.measure(); err != nil {
				return nil, err
			}
		}
		if i > 0 {
			all = append(all, p)
		}
	}
	return all, nil
}

// median is the middle one, or what is half way between the middle two.
func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// only is a row without a baseline.
func (*table) only(what, unit string, ours float64, format string) {
	fmt.Printf("%-40s %12s %12s\n", what, fmt.Sprintf(format, ours)+" "+unit, "none")
}

// limit is a row with a baseline that must not be passed.
func (t *table) limit(what, unit string, ours, limit float64, format string) {
	if t.row(what+" (limit)", unit, ours, limit, format); !(ours <= limit) {
		t.over = append(t.over, what)
	}
}

func (t *table) kept() error {
	if len(t.over) == 0 {
		return nil
	}
	return fmt.Errorf("over the limit: %s", strings.Join(t.over, "; "))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// sealing compares an envelope with the signature alone.
func sealing(t *table) {
	key := newKey()
	pub := key.Public().(ed25519.PublicKey)
	o := sampleOrder(wire.IDOf(pub))
	raw, err := wire.Seal(key, wire.TypeOrder, o)
	check(err)
	payload, err := json.Marshal(o)
	check(err)
	sig := ed25519.Sign(key, payload)
	each := func(f func()) float64 {
		const n = 2000
		began := time.Now()
		for range n {
			f()
		}
		return float64(time.Since(began)) / n / float64(time.Microsecond)
	}
	t.row("seal an order (baseline: sign it)", "µs",
		each(func() { _, err := wire.Seal(key, wire.TypeOrder, o); check(err) }),
		each(func() { ed25519.Sign(key, payload) }), "%.1f")
	t.row("open an order (baseline: verify it)", "µs",
		each(func() { _, err := wire.OpenAs[wire.Order](raw, pub, wire.TypeOrder); check(err) }),
		each(func() { ed25519.Verify(pub, payload, sig) }), "%.1f")
}

func sampleOrder(d wire.DeviceID) wire.Order {
	now := time.Now().UTC()
	return wire.Order{ID: "01JDB5Z3W4YQ5R6S7T8V9WAXBY", Device: d, Kind: wire.KindPing, Issued: now, Expires: now.Add(time.Minute), Body: json.RawMessage("{}")}
}

// result is what was measured of one side.
type result struct {
	rate          float64 // orders a second
	p50, p99      time.Duration
	memory, whole float64 // of the server, bytes: a device, and all of it
	device        float64 // bytes
	join, back    time.Duration
}

// side is ours or the baseline.
type side interface {
	// connect brings devices online, and returns when all are.
	connect(ctx context.Context, n int) error
	disconnect()
	online() int
	// have has so many orders answered, by all devices or by one at a time, and
	// returns each order's time and that of all.
	have(ctx context.Context, n int, oneAtATime bool) (timing, error)
	kill() error
	start(ctx context.Context) error
	pid() int
	close()
}

type timing struct {
	Each []time.Duration
	All  time.Duration
}

func measure(ctx context.Context, open func(dir string) (side, error)) (r result, err error) {
	dir, err := os.MkdirTemp("", "deimos-bench-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	s, err := open(dir)
	if err != nil {
		return r, err
	}
	defer s.close()
	if err := s.start(ctx); err != nil {
		return r, err
	}
	if err := s.connect(ctx, rateDevices); err != nil {
		return r, err
	}
	if _, err := s.have(ctx, rateDevices*20, false); err != nil { // warm
		return r, err
	}
	all, err := s.have(ctx, *orders, false)
	if err != nil {
		return r, err
	}
	r.rate = float64(*orders) / all.All.Seconds()
	one, err := s.have(ctx, latencyOrders, true)
	if err != nil {
		return r, err
	}
	slices.Sort(one.Each)
	r.p50, r.p99 = one.Each[len(one.Each)/2], one.Each[len(one.Each)*99/100]
	s.disconnect()
	return r, comeBack(ctx, s, &r)
}

// comeBack measures what a large fleet takes, and how it returns.
func comeBack(ctx context.Context, s side, r *result) error {
	// Afresh, so that memory is that of the fleet and not of the orders before.
	if err := s.kill(); err != nil {
		return err
	}
	if err := s.start(ctx); err != nil {
		return err
	}
	mine, theirs := ownMemory(), memoryOf(s.pid())
	began := time.Now()
	if err := s.connect(ctx, *fleet); err != nil {
		return err
	}
	r.join = time.Since(began)
	r.whole = memoryOf(s.pid())
	r.memory = (r.whole - theirs) / float64(*fleet)
	r.device = (ownMemory() - mine) / float64(*fleet)
	if err := s.kill(); err != nil {
		return err
	}
	if err := until(ctx, func() bool { return s.online() == 0 }); err != nil {
		return err
	}
	began = time.Now()
	if err := s.start(ctx); err != nil {
		return err
	}
	err := until(ctx, func() bool { return s.online() == *fleet })
	r.back = time.Since(began)
	return err
}

func until(ctx context.Context, ok func() bool) error {
	for !ok() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// ownMemory is what this process uses now, in bytes.
func ownMemory() float64 {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// memoryOf is a process's resident memory, in bytes; 0 if it cannot be read.
func memoryOf(pid int) float64 { return statusOf(pid, "VmRSS") }

// statusOf is a line of proc_pid_status(5) that is in kB, in bytes; 0 if it cannot
// be read.
func statusOf(pid int, name string) float64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == name+":" {
			kb, _ := strconv.ParseFloat(f[1], 64)
			return kb * 1024
		}
	}
	return 0
}

// child is a process that prints a line when it is ready, and ends with us.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startChild(path string, args ...string) (*child, error) {
	cmd := exec.Command(path, args...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	runtime.LockOSThread() // the kernel ties the child's end to this thread, and main's lasts
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &child{cmd, in, bufio.NewReaderSize(out, 1<<20)}, nil
}

func (c *child) kill() error {
	if err := c.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = c.cmd.Wait() // it was killed
	return nil
}

// ourSide is the real coordinator and simulated devices.
type ourSide struct {
	dir         string
	https, mqtt string
	does        func(agent.SimDevice) (map[wire.Kind]agent.Route, func(*wire.Beat)) // simulated devices can; nil: nothing more
	advertise   string                                                              // to devices; "" for where they found it
	beat        time.Duration                                                       // of devices; 0: the default
	serve       *child
	client      *api.Client
	state       atomic.Pointer[agent.SimState]
	stop        func()
	ids         []wire.DeviceID
}

func newOurSide(dir string) (side, error) {
	https, err := testbed.UnusedAddress()
	if err != nil {
		return nil, err
	}
	mqtt, err := testbed.UnusedAddress()
	return &ourSide{dir: dir, https: https, mqtt: mqtt, stop: func() {}}, err
}

func (s *ourSide) pid() int    { return s.serve.cmd.Process.Pid }
func (s *ourSide) kill() error { return s.serve.kill() }
func (s *ourSide) online() int { return s.state.Load().Online }

func (s *ourSide) start(context.Context) error {
	args := []string{"serve", "--dir", filepath.Join(s.dir, "coordinator"), "--listen", s.https, "--mqtt", s.mqtt, "--log-level", "error", "--enrol-rate", "1000"}
	if s.advertise != "" {
		args = append(args, "--advertise", s.advertise)
	}
	if s.beat > 0 {
		args = append(args, "--beat", s.beat.String())
	}
	var err error
	if s.serve, err = startChild(filepath.Join(*bin, "deimos"), args...); err != nil {
		return err
	}
	for {
		line, err := s.serve.out.ReadString('\n')
		if err != nil {
			return fmt.Errorf("the coordinator ended: %w", err)
		}
		if strings.HasPrefix(line, api.Ready) {
			break
		}
	}
	go func() { _, _ = io.Copy(io.Discard, s.serve.out) }() // until it ends
	c, err := api.LoadContext(filepath.Join(s.dir, "coordinator", "operator.json"))
	if err != nil {
		return err
	}
	s.client, err = api.NewClient(c)
	return err
}

// startAgent starts a real agent with a folder for its state, and returns when it
// is online.
func (s *ourSide) startAgent(ctx context.Context, state string, more ...string) (*child, error) {
	tok, err := s.client.CreateToken(ctx, api.TokenRequest{Uses: 1, ValidSeconds: 3600})
	if err != nil {
		return nil, err
	}
	args := append([]string{"run", "--state", state, "--coordinator", "https://" + s.https, "--token", tok.Token, "--log-level", "error"}, more...)
	device, err := startChild(filepath.Join(*bin, "deimos-agent"), args...)
	if err != nil {
		return nil, err
	}
	go func() { _, _ = io.Copy(io.Discard, device.out) }() // until it ends
	if err := until(ctx, func() bool {
		st, err := agent.ReadStatus(state)
		return err == nil && st.Machine != nil && st.Machine.Online
	}); err != nil {
		return nil, errors.Join(fmt.Errorf("the agent did not come online: %w", err), device.kill())
	}
	return device, nil
}

func (s *ourSide) connect(ctx context.Context, n int) error {
	tok, err := s.client.CreateToken(ctx, api.TokenRequest{Uses: n, ValidSeconds: 3600})
	if err != nil {
		return err
	}
	s.state.Store(&agent.SimState{})
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	failed := make(chan error, 1)
	wg.Go(func() {
		failed <- agent.Simulation{
			Coordinator: "https://" + s.https, Token: tok.Token, Agents: n, Version: "0.0.0-bench", Log: slog.New(slog.DiscardHandler), Does: s.does,
			Progress: func(st agent.SimState) { s.state.Store(&st) },
		}.Run(ctx)
	})
	s.stop = func() { cancel(); wg.Wait(); s.stop = func() {} }
	var end error
	if err := until(ctx, func() bool {
		select {
		case end = <-failed:
			return true
		default:
			return s.online() == n
		}
	}); err != nil || end != nil {
		return errors.Join(err, end)
	}
	list, err := s.client.Devices(ctx)
	if err != nil {
		return err
	}
	s.ids = s.ids[:0]
	for _, d := range list {
		if d.Online {
			s.ids = append(s.ids, d.ID)
		}
	}
	return nil
}

func (s *ourSide) disconnect() { s.stop() }

func (s *ourSide) close() {
	s.stop()
	_ = s.serve.kill() // it may have ended
}

// sendAtOnce is how many requests are under way; each makes an order for every device.
const sendAtOnce = 4

func (s *ourSide) have(ctx context.Context, n int, oneAtATime bool) (timing, error) {
	var t timing
	began := time.Now()
	if oneAtATime {
		for i := range n {
			list, err := s.client.SendOrder(ctx, api.SendRequest{Kind: wire.KindPing, Selector: api.Selector{Devices: s.ids[i%len(s.ids) : i%len(s.ids)+1]}})
			if err != nil {
				return t, err
			}
			o, err := s.client.AwaitOrder(ctx, list[0].Order.Device, list[0].Order.ID, nil)
			if err != nil {
				return t, err
			}
			t.Each = append(t.Each, o.Updated.Sub(o.Order.Issued)) // both by the coordinator's clock
		}
		t.All = time.Since(began)
		return t, nil
	}
	var left atomic.Int64
	left.Store(int64(n))
	failed := make(chan error, sendAtOnce)
	for range sendAtOnce {
		go func() {
			for left.Add(-int64(len(s.ids))) >= 0 {
				if _, err := s.client.SendOrder(ctx, api.SendRequest{Kind: wire.KindPing, Selector: api.Selector{Devices: s.ids}}); err != nil {
					failed <- err
					return
				}
			}
			failed <- nil
		}()
	}
	for range sendAtOnce {
		if err := <-failed; err != nil {
			return t, err
		}
	}
	var asked error
	err := until(ctx, func() bool {
		l, err := s.client.Orders(ctx, api.OrderQuery{Pending: true, Limit: 1})
		asked = err
		return err != nil || len(l.Orders) == 0
	})
	t.All = time.Since(began)
	return t, errors.Join(err, asked)
}

// bareSide is the baseline.
type bareSide struct {
	dir    string
	addr   string
	server *child
	count  atomic.Int64
	ids    []wire.DeviceID
	stop   func()
}

func newBareSide(dir string) (side, error) {
	addr, err := testbed.UnusedAddress()
	if err != nil {
		return nil, err
	}
	return &bareSide{dir: dir, addr: addr, stop: func() {}}, newCA(dir)
}

func (s *bareSide) pid() int    { return s.server.cmd.Process.Pid }
func (s *bareSide) kill() error { return s.server.kill() }
func (s *bareSide) online() int { return int(s.count.Load()) }

func (s *bareSide) start(context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if s.server, err = startChild(self, "bare-server", s.dir, s.addr); err != nil {
		return err
	}
	line, err := s.server.out.ReadString('\n')
	if err != nil {
		return fmt.Errorf("the bare server ended: %w", err)
	}
	if got := strings.TrimSpace(line); got != s.addr {
		return fmt.Errorf("the bare server listens at %s, not at %s", got, s.addr)
	}
	return nil
}

func (s *bareSide) connect(ctx context.Context, n int) error {
	var err error
	s.ids, s.stop, err = bareDevices(s.dir, s.addr, n, sealedSize(wire.TypeReport), &s.count)
	if err != nil {
		return err
	}
	return until(ctx, func() bool { return s.online() == n })
}

func (s *bareSide) disconnect() {
	s.stop()
	s.stop = func() {}
}

func (s *bareSide) close() {
	s.stop()
	_ = s.server.kill() // it may have ended
}

func (s *bareSide) have(_ context.Context, n int, oneAtATime bool) (t timing, err error) {
	q := bareQuestion{Devices: s.ids, Orders: n, Window: 64, Order: sealedSize(wire.TypeOrder), Ack: sealedSize(wire.TypeAck)}
	if oneAtATime {
		q.Devices, q.Window = s.ids[:1], 1
	}
	if err := json.NewEncoder(s.server.in).Encode(q); err != nil {
		return t, err
	}
	line, err := s.server.out.ReadBytes('\n')
	if err != nil {
		return t, err
	}
	return t, json.Unmarshal(line, &t)
}

// sealedSize is what such a message of ours has, in bytes.
func sealedSize(t wire.PayloadType) int {
	key := newKey()
	o := sampleOrder(wire.IDOf(key.Public().(ed25519.PublicKey)))
	var v any = o
	switch t {
	case wire.TypeReport:
		body, err := json.Marshal(wire.Pong{Agent: "0.0.0-bench", Uptime: 12.345678})
		check(err)
		v = wire.Report{Order: o.ID, Device: o.Device, Seq: 1 << 33, State: wire.Succeeded, At: o.Issued, TimeConfidence: wire.ClockTrusted, Body: body}
	case wire.TypeAck:
		v = wire.Ack{Device: o.Device, Reports: []wire.Acked{{Order: o.ID, Seq: 1 << 33}}}
	}
	raw, err := wire.Seal(key, t, v)
	check(err)
	return len(raw)
}
