package test

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// testLimit bounds everything that one test waits for.
const testLimit = 10 * time.Minute

func TestMain(m *testing.M) {
	sideBySide()
	os.Exit(testbed.Main(m, "deimos", "deimos-agent", "deimos-launch", "guests/wordcount.wasm", "guests/sha256sum.wasm", "tour/agent-next", "tour/agent-broken"))
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

// fleet is a coordinator and its devices, processes of this machine.
type fleet struct {
	*testbed.Fleet
	natsAt  string        // where the external server listens, if NATS is a way to it
	door    string        // where devices find the coordinator; empty: HTTPS
	agent   string        // program of the devices; empty: the agent that ships
	server  *proc.Process // the external nats-server
	token   string
	devices []*device
	trial   time.Duration // how long a test repeats a command that was not answered; 0: twice testbed.Patience
}

type option func(*fleet)

// slowBeat lets nothing but a hello tell the coordinator how much room there is.
func slowBeat(f *fleet) { f.Beat = "10m" }

// serving gives the coordinator more flags.
func serving(flags ...string) option {
	return func(f *fleet) { f.Flags = append(f.Flags, flags...) }
}

// newFleet starts a coordinator and ends everything with the test.
func newFleet(t *testing.T, opts ...option) *fleet {
	t.Helper()
	f := &fleet{Fleet: testbed.NewFleet(t, testLimit)}
	t.Cleanup(f.end)
	for _, o := range opts {
		o(f)
	}
	f.StartServe()
	return f
}

// end stops everything, devices first, and shows the logs of a failed test.
func (f *fleet) end() {
	var wg sync.WaitGroup
	for _, d := range f.devices {
		wg.Go(func() { f.Stopped(d.proc, 0) })
	}
	wg.Wait()
	f.Stopped(f.Serve, 0)
	f.Stopped(f.server, 0)
	f.ShowLogs()
}

// device is one agent, alone or under its launcher.
type device struct {
	f        *fleet
	name     string
	launcher bool
	program  string   // the agent, if it is another than the fleet's
	noToken  bool     // it waits to be claimed, or is a member
	args     []string // more flags of the agent
	env      []string // more of its environment
	id       wire.DeviceID
	proc     *proc.Process
}

// enrol starts n devices and waits until the coordinator knows and sees them.
func (f *fleet) enrol(n int, launcher bool, args ...string) {
	f.T.Helper()
	f.token = f.NewToken(n)
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
	return d.f.Path(append([]string{d.name}, parts...)...)
}

func (d *device) runArgs() []string {
	args := []string{"run", "--state", d.state(), "--coordinator", "https://" + cmp.Or(d.f.door, d.f.HTTPS)}
	if !d.noToken {
		args = append(args, "--token", d.f.token)
	}
	return append(args, d.args...)
}

func (d *device) start() {
	d.f.T.Helper()
	argv := append([]string{cmp.Or(d.program, d.f.agent, testbed.Program("deimos-agent"))}, d.runArgs()...)
	if d.launcher {
		argv = append([]string{testbed.Program("deimos-launch"), "--state", d.state(), "--agent", testbed.Program("deimos-agent"), "--confirm-within", "30s", "--"}, d.runArgs()...)
	}
	d.proc = d.f.Start(proc.Command{Name: d.name, Log: d.log(), Argv: argv, Env: d.env})
}

func (d *device) log() string { return d.f.Path("logs", d.name+".log") }

// awaitOnline waits until the device has enrolled and the coordinator sees it.
func (d *device) awaitOnline() {
	d.f.T.Helper()
	d.f.Until(d.name+" coming online", func() bool {
		if d.proc.Ended() {
			d.f.T.Fatalf("%s ended with code %d: %s", d.name, d.proc.ExitCode(), d.proc.LastWords())
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
	d.f.T.Helper()
	return d.f.Device(d.id)
}

// kill pulls the plug and waits until the coordinator has noticed.
func (d *device) kill() {
	d.f.T.Helper()
	d.proc.Kill()
	d.awaitOffline()
}

func (d *device) awaitOffline() {
	d.f.T.Helper()
	d.f.Until("the coordinator noticing that "+d.name+" is gone", func() bool { return !d.now().Online })
}

// stop ends the agent in good order.
func (d *device) stop() {
	d.f.T.Helper()
	d.f.Stopped(d.proc, 0)
	d.awaitOffline()
}

// holdersOf lists the devices that gave a receipt for chunk i.
func (f *fleet) holdersOf(o testbed.PutResult, i int) (out []*device) {
	f.T.Helper()
	for _, h := range o.Placements[i].Holders {
		n := slices.IndexFunc(f.devices, func(d *device) bool { return d.id == h.Device })
		if n < 0 {
			f.T.Fatalf("chunk %d is said to be on device %s, which is none of ours", i, h.Device)
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
