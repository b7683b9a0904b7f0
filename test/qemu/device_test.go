package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/packaging/init/gpt"
	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

const (
	// bootLimit is how long a machine may take to say or do the next thing. It is a
	// bound for a machine with much else to do, not a claim.
	bootLimit = 6 * time.Minute
	testLimit = 40 * time.Minute
	// diskSize is that of a small card. An agent that chooses the system's disk by
	// itself leaves 8 GiB of it alone.
	diskSize = 16 << 30
	espAt    = "@@1M" // where mtools find the ESP in an image
)

var image string

func TestMain(m *testing.M) {
	if image = os.Getenv("DEIMOS_QEMU_IMAGE"); image == "" {
		fmt.Println("the image is not tested: \"make qemu-test\" does that")
		return
	}
	if err := canRun(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(testbed.Main(m, "deimos", "deimos-agent", "guests/wordcount.wasm", nextAgent, brokenAgent))
}

// canRun tells what this host lacks.
func canRun() error {
	_, err := qemu.Find()
	for tool, deb := range map[string]string{"mcopy": "mtools", debugfs: "e2fsprogs"} {
		if _, missing := exec.LookPath(tool); missing != nil {
			err = errors.Join(err, fmt.Errorf("%s is missing (Debian: apt-get install %s)", tool, deb))
		}
	}
	abs, aerr := filepath.Abs(image)
	if image = abs; aerr == nil {
		_, aerr = os.Stat(image)
	}
	return errors.Join(err, aerr)
}

// debugfs reads ext4 without root; it stands where only root looks.
const debugfs = "/usr/sbin/debugfs"

// newFleet is a coordinator that machines call as 10.0.2.2.
func newFleet(t *testing.T) *testbed.Fleet {
	t.Helper()
	f := testbed.NewFleet(t, testLimit)
	f.Patience = bootLimit
	f.Flags = []string{"--cert-name", qemu.Host}
	run(f)
	return f
}

// run starts the coordinator, and ends it with the test.
func run(f *testbed.Fleet) {
	t := f.T
	t.Helper()
	t.Cleanup(func() { f.Stopped(f.Serve, 0); f.ShowLogs() })
	f.StartServe()
}

// address is where a machine finds the coordinator.
func address(f *testbed.Fleet) string {
	_, port, _ := strings.Cut(f.HTTPS, ":")
	return "https://" + qemu.Host + ":" + port
}

// device is a machine with its disk, switched on and off.
type device struct {
	f       *testbed.Fleet
	options qemu.Options
	machine *qemu.Machine // the last start
	began   time.Time     // of it
	starts  []*qemu.Machine
	dirs    []string // theirs
	id      wire.DeviceID
}

// newDevice is a device that was just unpacked: the image on its disk, and
// never switched on. It is switched off with the test.
func newDevice(f *testbed.Fleet) *device {
	f.T.Helper()
	d := &device{f: f}
	d.options.Disks = []qemu.Disk{{File: filepath.Join(f.T.TempDir(), "disk"), NVMe: true}}
	d.writeImage()
	f.T.Cleanup(d.end)
	return d
}

// writeImage makes a new device of one that is off.
func (d *device) writeImage() {
	d.f.T.Helper()
	err := os.RemoveAll(d.disk())
	if err == nil {
		err = qemu.CopyDisk(image, d.disk(), diskSize)
	}
	if err != nil {
		d.f.T.Fatal(err)
	}
	d.id = ""
}

func (d *device) disk() string { return d.options.Disks[0].File }

// end cuts the power, and shows what a failed test's machine has said.
func (d *device) end() {
	if d.machine != nil {
		d.machine.Kill()
	}
	for i, m := range d.starts {
		if d.f.T.Failed() {
			d.f.T.Logf("the end of the console after power-on %d:\n%s", i+1, testbed.LastLines(m.Said(), 60))
		}
		os.RemoveAll(d.dirs[i])
	}
}

func (d *device) powerOn() {
	d.f.T.Helper()
	dir, err := os.MkdirTemp("", "d") // its sockets need a short path
	if err != nil {
		d.f.T.Fatal(err)
	}
	d.dirs = append(d.dirs, dir)
	ctx, cancel := context.WithTimeout(d.f.Ctx, testbed.Patience)
	defer cancel()
	d.began = time.Now()
	if d.machine, err = qemu.Start(ctx, testbed.Starter, dir, d.options); err != nil {
		d.f.T.Fatal(err)
	}
	d.starts = append(d.starts, d.machine)
}

// cutPower pulls the plug and waits until the coordinator has noticed.
func (d *device) cutPower() {
	d.f.T.Helper()
	d.machine.Kill()
	if d.id != "" {
		d.f.Until("the coordinator noticing the power cut", func() bool { return !d.now().Online })
	}
}

// await waits until the machine has said text since it was switched on.
func (d *device) await(text string) (line string) {
	d.f.T.Helper()
	ctx, cancel := context.WithTimeout(d.f.Ctx, bootLimit)
	defer cancel()
	line, err := d.machine.Await(ctx, text, 1)
	if err != nil {
		d.f.T.Fatal(err)
	}
	return line
}

// awaitOnline waits until the list of devices has this one online. One that has
// just joined is the only one that is.
func (d *device) awaitOnline() {
	d.f.T.Helper()
	d.f.Until("the device coming online", func() bool {
		select {
		case <-d.machine.Done():
			d.f.T.Fatal("the machine has ended")
		default:
		}
		list, err := d.f.Client.Devices(d.f.Ctx)
		if err != nil {
			d.f.T.Fatal(err)
		}
		for _, v := range list {
			if v.Online && (d.id == "" || d.id == v.ID) {
				d.id = v.ID
				return true
			}
		}
		return false
	})
}

// now is what the coordinator knows of the device.
func (d *device) now() api.Device {
	d.f.T.Helper()
	return d.f.Device(d.id)
}

// powerOff presses the power button and waits until the machine is off.
func (d *device) powerOff() {
	d.f.T.Helper()
	ctx, cancel := context.WithTimeout(d.f.Ctx, bootLimit)
	defer cancel()
	if err := d.machine.PowerOff(ctx); err != nil {
		d.f.T.Fatal(err)
	}
}

// console is everything that the device has ever said.
func (d *device) console() string {
	var all strings.Builder
	for _, m := range d.starts {
		all.WriteString(m.Said())
	}
	return all.String()
}

// waited is how long QEMU's threads were ready to run and had to wait for a core
// that somebody else had: the longest of any one of them, so that nothing counts
// twice. From the kernel's schedstat (second field, nanoseconds).
func (d *device) waited() (longest time.Duration) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", d.machine.PID()))
	for _, path := range tasks {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		if f := strings.Fields(string(raw)); len(f) == 3 {
			ns, _ := strconv.ParseInt(f[1], 10, 64)
			longest = max(longest, time.Duration(ns))
		}
	}
	return longest
}

// tool runs a program of the host to its end.
func tool(t *testing.T, argv ...string) string {
	t.Helper()
	r, err := testbed.RunToEnd(t.Context(), proc.Command{Argv: argv, Env: []string{"LC_ALL=C"}})
	if err != nil || r.Code != 0 {
		t.Fatalf("%s: code %d, %v: %s", strings.Join(argv, " "), r.Code, err, r.Stderr)
	}
	return string(r.Stdout)
}

// editConfig puts a deimos.toml on the first partition, as a person does with
// any computer.
func (d *device) editConfig(text string) {
	d.f.T.Helper()
	tool(d.f.T, "mcopy", "-o", "-i", d.disk()+espAt, d.f.Write("deimos.toml", []byte(text)), "::deimos.toml")
}

// debugData asks debugfs about the data partition of a machine that is off.
func (d *device) debugData(request string) string {
	d.f.T.Helper()
	f, err := os.Open(d.disk())
	if err != nil {
		d.f.T.Fatal(err)
	}
	defer f.Close()
	table, err := gpt.Read(f, diskSize)
	if err != nil {
		d.f.T.Fatal(err)
	}
	p, ok := table.Find("deimos-data")
	if !ok {
		d.f.T.Fatal("the disk has no data partition")
	}
	return tool(d.f.T, debugfs, "-R", request, fmt.Sprintf("%s?offset=%d", d.disk(), p.First*gpt.Block))
}

// log is the ring of the data partition.
func (d *device) log() string {
	d.f.T.Helper()
	var all strings.Builder
	for field := range strings.FieldsSeq(d.debugData("ls -p /log")) { // /inode/mode/uid/gid/name/size/
		if parts := strings.Split(field, "/"); len(parts) > 5 && strings.HasSuffix(parts[5], ".log") {
			all.WriteString(d.debugData("cat /log/" + parts[5]))
		}
	}
	return all.String()
}

func decode[T any](t *testing.T, raw []byte) (v T) {
	t.Helper()
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	return v
}
