package test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// promptly is how long a program may take to end that waits for nobody. It is
// well below the two minutes that an agent waits for an answer when it enrols.
const promptly = 30 * time.Second

// TestAgentEndsWithASentence is the agent's exit codes, as cmd/deimos-agent and
// internal/cli document them, and what an owner reads.
func TestAgentEndsWithASentence(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(2, false)
	good, err := wire.ParseFleetToken(f.token)
	if err != nil {
		t.Fatal(err)
	}
	unknown, foreign := good, wire.NewFleetToken([]byte("another authority"))
	unknown.Secret[0] ^= 1
	url := "https://" + f.HTTPS
	// A state that has enrolled, for others to break.
	enrolled := f.devices[1]
	enrolled.stop()
	fresh := 0

	for _, c := range []struct {
		name string
		args func(state string) []string
		code int
		says []string
	}{
		{"no coordinator and no token", nil, cli.ExitConfig, []string{"--coordinator", "--token"}},
		{"a token that is none", func(string) []string { return []string{"--coordinator", url, "--token", "hunter2"} }, cli.ExitUsage, []string{"no fleet token"}},
		{"a token that nobody made", func(string) []string { return []string{"--coordinator", url, "--token", unknown.String()} }, cli.ExitNoPerm, []string{"refused", "deimos token create"}},
		{"a token that is used up", func(string) []string { return []string{"--coordinator", url, "--token", f.token} }, cli.ExitNoPerm, []string{"refused", "used up"}},
		{"a token of another coordinator", func(string) []string { return []string{"--coordinator", url, "--token", foreign.String()} }, cli.ExitNoPerm, []string{"not the coordinator that the token belongs to"}},
		{"an address without https", func(string) []string { return []string{"--coordinator", "http://" + f.HTTPS, "--token", f.token} }, cli.ExitUsage, []string{"https://"}},
		{"a flag that there is not", func(string) []string { return []string{"--bogus"} }, cli.ExitUsage, []string{"--bogus"}},
		{"a configuration that is not there", func(string) []string { return []string{"--config", f.Path("nowhere.toml")} }, cli.ExitConfig, []string{"nowhere.toml"}},
		{"a misspelt configuration", func(string) []string {
			return []string{"--config", f.Write("bad.toml", []byte("[jobs]\nenabeld = false\n"))}
		}, cli.ExitConfig, []string{"bad.toml", "enabeld"}},
		{"a broken configuration", func(string) []string {
			return []string{"--config", f.Write("broken.toml", []byte("[jobs\n"))}
		}, cli.ExitConfig, []string{"broken.toml", "line "}},
		{"a state folder below a file", func(string) []string {
			return []string{"--state", filepath.Join(f.Write("file", nil), "state")}
		}, cli.ExitNoCreate, []string{"--state"}},
		{"a state that another agent has", func(string) []string {
			return []string{"--state", f.devices[0].state()}
		}, cli.ExitNoCreate, []string{"another agent", f.devices[0].state()}},
		{"a damaged key", func(state string) []string {
			enrolled.copyTo(state)
			overwrite(t, filepath.Join(state, "identity", "key.pem"), []byte("-----BEGIN NOTHING"))
			return nil
		}, cli.ExitFailed, []string{"key.pem", "damaged", "backup"}},
		{"a damaged enrolment", func(state string) []string {
			enrolled.copyTo(state)
			overwrite(t, filepath.Join(state, "identity", "membership.json"), []byte("{"))
			return nil
		}, cli.ExitFailed, []string{"membership.json", "damaged", "token"}},
		{"an enrolment without its certificate", func(state string) []string {
			enrolled.copyTo(state)
			overwrite(t, filepath.Join(state, "identity", "membership.json"), []byte(`{"brokers":["ssl://127.0.0.1:1"],"data_plane":["https://127.0.0.1:1"]}`))
			return nil
		}, cli.ExitFailed, []string{"enrolment", "token"}},
		{"a damaged journal", func(state string) []string {
			enrolled.copyTo(state)
			overwrite(t, filepath.Join(state, "journal", "MANIFEST"), bytes.Repeat([]byte{0xff}, 64))
			return nil
		}, cli.ExitFailed, []string{"journal"}},
	} {
		f.Sub(c.name, func(t *testing.T) {
			fresh++
			state := f.Path(fmt.Sprint("state-", fresh))
			args := []string{testbed.Program("deimos-agent"), "run", "--state", state}
			if c.args != nil {
				args = append(args, c.args(state)...)
			}
			f.checkEnd(proc.Command{Argv: args}, c.code, c.says...)
		})
	}
	f.Sub("a state folder of somebody else", func(t *testing.T) {
		testenv.Root(t, "only root can run a program as somebody else")
		agent := copyForEverybody(t)
		f.checkEnd(proc.Command{Argv: []string{agent, "run", "--state", f.devices[0].state()}, As: 65534, Dir: "/"}, cli.ExitNoCreate, "--state", "permission denied")
	})
	// What was tried above has hurt nobody.
	enrolled.start()
	for _, d := range f.devices {
		d.awaitOnline()
	}
}

// checkEnd runs a program that must fail with code and a sentence that says all
// of says.
func (f *fleet) checkEnd(c proc.Command, code int, says ...string) {
	f.T.Helper()
	r, err := testbed.RunToEnd(f.Ctx, c)
	if err != nil {
		f.T.Fatalf("%s: %v: %s", strings.Join(c.Argv, " "), err, r.Stderr)
	}
	testbed.CheckSentence(f.T, r)
	if r.Code != code {
		f.T.Errorf("exit code %d, want %d: %s", r.Code, code, r.Stderr)
	}
	last := strings.TrimSpace(string(r.Stderr))
	last = last[strings.LastIndexByte(last, '\n')+1:]
	for _, text := range says {
		if !strings.Contains(last, text) {
			f.T.Errorf("the sentence does not say %q: %s", text, last)
		}
	}
}

// copyTo copies a stopped device's state.
func (d *device) copyTo(state string) {
	d.f.T.Helper()
	if err := os.CopyFS(state, os.DirFS(d.state())); err != nil {
		d.f.T.Fatal(err)
	}
}

// overwrite damages a file that must be there.
func overwrite(t *testing.T, path string, data []byte) {
	t.Helper()
	readFile(t, path)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// copyForEverybody puts the agent where any user can run it.
func copyForEverybody(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "deimos-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "deimos-agent")
	if err := os.WriteFile(path, readFile(t, testbed.Program("deimos-agent")), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestAgentWaitsForItsCoordinator: nobody there is no reason to give up, nor to
// be hard to stop.
func TestAgentWaitsForItsCoordinator(t *testing.T) {
	t.Parallel()
	dead := testbed.FreeAddress(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	go func() {
		for {
			c, err := silent.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	for name, c := range map[string]struct{ addr, log string }{
		"nobody there": {dead, "the coordinator cannot be reached to enrol; trying again"},
		"a mute one":   {silent.Addr().String(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fleet{Fleet: &testbed.Fleet{T: t, Ctx: t.Context(), Dir: t.TempDir()}}
			tok := wire.NewFleetToken([]byte("any"))
			log := f.Path("agent.log")
			p := f.Start(proc.Command{Log: log, Argv: []string{testbed.Program("deimos-agent"), "run", "--state", f.Path("state"), "--coordinator", "https://" + c.addr, "--token", tok.String()}})
			f.Until("the agent trying", func() bool {
				if p.Ended() {
					t.Fatalf("it ended with code %d: %s", p.ExitCode(), p.LastWords())
				}
				if c.log == "" { // it is about to wait; its key is made before
					_, err := os.Stat(f.Path("state", "journal", "MANIFEST"))
					return err == nil
				}
				return bytes.Count(readFile(t, log), []byte(c.log)) >= 2
			})
			if !p.Stop(promptly) || p.ExitCode() != 0 {
				t.Errorf("SIGTERM ended it with code %d: %s", p.ExitCode(), p.LastWords())
			}
			for _, wrong := range []string{"goroutine", "did not end in time", "is left"} {
				if raw := readFile(t, log); bytes.Contains(raw, []byte(wrong)) {
					t.Errorf("it has said %q: %s", wrong, raw)
				}
			}
		})
	}
}

// TestOperatorsFaults is what people do to the command line and the coordinator.
func TestOperatorsFaults(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	serve := func(dir, listen, mqtt string) []string {
		return []string{testbed.Program("deimos"), "serve", "--dir", dir, "--listen", listen, "--mqtt", mqtt}
	}
	deimos := func(args ...string) []string {
		return append([]string{testbed.Program("deimos"), "--context", f.Path("coordinator", "operator.json")}, args...)
	}
	nobody := strings.Repeat("a", 24)
	f.OK(nil, "token", "create")
	other := f.Write("other.json", bytes.Replace(readFile(t, f.Path("coordinator", "operator.json")), []byte(f.HTTPS), []byte(testbed.FreeAddress(t)), 1))
	forged := f.Write("forged.json", bytes.Replace(readFile(t, f.Path("coordinator", "operator.json")), []byte(`"token": "`), []byte(`"token": "x`), 1))

	for _, c := range []struct {
		name string
		argv []string
		code int
		says []string
	}{
		{"HTTPS port in use", serve(f.Path("c2"), taken.Addr().String(), "127.0.0.1:0"), cli.ExitNoCreate, []string{port, "in use"}},
		{"MQTT port in use", serve(f.Path("c3"), "127.0.0.1:0", taken.Addr().String()), cli.ExitNoCreate, []string{port, "another program"}},
		{"a second coordinator on the folder", serve(f.Path("coordinator"), "127.0.0.1:0", "127.0.0.1:0"), cli.ExitNoCreate, []string{f.Path("coordinator")}},
		{"a folder below a file", serve(filepath.Join(f.Write("f", nil), "c"), "127.0.0.1:0", "127.0.0.1:0"), cli.ExitNoCreate, []string{"not a directory"}},
		{"a NATS server that is not there", append(serve(f.Path("c4"), "127.0.0.1:0", "127.0.0.1:1"), "--nats", "tls://"+testbed.FreeAddress(t)), cli.ExitNoCreate, []string{"cannot reach the message server"}},
		{"no context", []string{testbed.Program("deimos"), "--context", f.Path("nowhere.json"), "device", "list"}, cli.ExitConfig, []string{"nowhere.json", "deimos serve"}},
		{"a damaged context", []string{testbed.Program("deimos"), "--context", f.Write("damaged.json", []byte("{}")), "device", "list"}, cli.ExitConfig, []string{"damaged.json", "copy it again"}},
		{"a coordinator that is not there", []string{testbed.Program("deimos"), "--context", other, "device", "list"}, cli.ExitNoServer, []string{"cannot be reached", "is it running"}},
		{"a wrong operator token", []string{testbed.Program("deimos"), "--context", forged, "device", "list"}, cli.ExitNoPerm, []string{"token"}},
		{"an unknown device", deimos("device", "show", nobody), cli.ExitFailed, []string{nobody}},
		{"a challenge for an unknown device", deimos("audit", "storage", nobody), cli.ExitFailed, []string{nobody}},
		{"an offer to an unknown device", deimos("release", "offer", "9.9.9", "--device", nobody), cli.ExitFailed, nil},
		{"an unknown object", deimos("object", "get", "nothing"), cli.ExitFailed, []string{`"nothing"`, "object ls"}},
		{"removing an unknown object", deimos("object", "rm", "nothing"), cli.ExitFailed, []string{`"nothing"`}},
		{"an unknown order", deimos("order", "show", nobody, "01ARZ3NDEKTSV4RRFFQ69G5FAV"), cli.ExitFailed, []string{"01ARZ3NDEKTSV4RRFFQ69G5FAV"}},
		{"storing without a device", deimos("object", "put", f.Write("x", []byte("x"))), cli.ExitFailed, []string{"6 devices", "4+2"}},
		{"storing a folder", deimos("object", "put", f.Dir), cli.ExitFailed, []string{"is a folder", "archive"}},
		{"storing what is not there", deimos("object", "put", f.Path("nowhere")), cli.ExitFailed, []string{"nowhere"}},
		{"a module that is not there", deimos("job", "run", f.Path("nowhere.wasm"), "--input", "x"), cli.ExitUsage, []string{"nowhere.wasm"}},
		{"no command", deimos("objekt"), cli.ExitUsage, []string{"objekt"}},
	} {
		f.Sub(c.name, func(t *testing.T) { f.checkEnd(proc.Command{Argv: c.argv, Dir: f.Dir}, c.code, c.says...) })
	}

	f.enrol(1, false)
	data := []byte("a small file\n")
	f.Put("small", data, "--replicas", "1")
	f.Sub("getting to where nothing can be written", func(t *testing.T) {
		f.checkEnd(proc.Command{Argv: deimos("object", "get", "--plain", "small", "--out", f.Path("no", "such", "folder", "x"))}, cli.ExitFailed, "cannot be written", "no such file or directory")
		f.checkEnd(proc.Command{Argv: deimos("object", "get", "--plain", "small", "--out", f.Dir)}, cli.ExitFailed, "cannot be written")
	})
	f.Sub("storing something else under the same name", func(t *testing.T) {
		f.checkEnd(proc.Command{Argv: deimos("object", "put", "--plain", f.Write("y", []byte("other")), "--name", "small", "--replicas", "1")}, cli.ExitFailed, "small", "object rm")
	})
	f.Sub("a module that is none", func(t *testing.T) {
		f.checkEnd(proc.Command{Argv: deimos("job", "run", f.Write("text.wasm", []byte("no module")), "--input", "small")}, cli.ExitFailed, "module")
	})
	f.CheckGet("small", data)
}

// TestFullDisk fills a device's disk behind its back: it refuses with a reason,
// lives, and takes chunks again when there is room.
func TestFullDisk(t *testing.T) {
	testenv.Root(t, "only root can mount a small disk")
	t.Parallel()
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=512m"); err != nil {
		testenv.Cannot(t, "no small disk can be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	f := newFleet(t, slowBeat)
	rng := testbed.Seeded(t)
	f.enrol(1, false, "--volume", filepath.Join(disk, "chunks"), "--floor", fmt.Sprint(64<<20))
	d := f.devices[0]
	before := testbed.RandomBytes(rng, 1<<20)
	f.Put("before", before, "--replicas", "1")
	pid := d.proc.PID()

	filler, err := os.Create(filepath.Join(disk, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(filler, endless{})
	if filler.Close(); err == nil {
		t.Fatal("the disk does not get full")
	}
	during := f.Write("during", testbed.RandomBytes(rng, 1<<20))
	said := f.Fails(nil, 1, "object", "put", "--plain", during, "--replicas", "1")
	for _, text := range []string{string(d.id), "free-space floor", "free space there"} {
		if !strings.Contains(said, text) {
			t.Errorf("the sentence does not say %q: %s", text, said)
		}
	}
	f.CheckGet("before", before)
	d.checkStorage()
	if d.proc.Ended() || d.proc.PID() != pid {
		t.Fatal("the agent has ended")
	}
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	f.OK(nil, "object", "put", "--plain", during, "--replicas", "1")
	f.CheckGet("during", readFile(t, during))
}

// endless is a file without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestFloorAboveTheFreeSpace: a device that has no room says so at once, and is
// of use for everything else.
func TestFloorAboveTheFreeSpace(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(1, false, "--floor", fmt.Sprint(int64(1)<<60))
	d := f.devices[0]
	if v := d.now(); v.Capacity != 0 {
		t.Errorf("it offers %d bytes", v.Capacity)
	}
	said := f.Fails(nil, 1, "object", "put", "--plain", f.Write("x", []byte("x")), "--replicas", "1")
	if !strings.Contains(said, "devices with room") && !strings.Contains(said, "device with room") {
		t.Errorf("the sentence does not say what is missing: %s", said)
	}
}

// TestCtrlCInTheTour interrupts "deimos dev" as a person does.
// TestTourOverTheSmallestFile: one chunk, which is on two of three devices only.
func TestTourOverTheSmallestFile(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), testLimit)
	defer cancel()
	f := &fleet{Fleet: &testbed.Fleet{T: t, Ctx: ctx, Dir: t.TempDir()}}
	file := f.Write("a small file", bytes.Repeat([]byte("some words and a line\n"), 200)[:4096])
	r, err := testbed.RunToEnd(ctx, proc.Command{Argv: []string{testbed.Program("deimos"), "dev", "--once", "--dir", f.Path("fleet"), "--file", file}})
	if err != nil || r.Code != 0 || !strings.Contains(string(r.Stdout), "✓ 8/8") {
		t.Errorf("code %d, %v: %s%s", r.Code, err, r.Stdout, r.Stderr)
	}
	f.checkEnd(proc.Command{Argv: []string{testbed.Program("deimos"), "dev", "--once", "--file", f.Write("tiny", []byte("x"))}}, cli.ExitFailed, "4096 bytes")
}

func TestCtrlCInTheTour(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		when, ready string
		signal      syscall.Signal
	}{
		{"at once", "A Deimos fleet", syscall.SIGINT},
		{"while the fleet comes up", "✓ 1/8", syscall.SIGINT},
		{"while it works", "✓ 3/8", syscall.SIGINT},
		{"by a service manager", "✓ 2/8", syscall.SIGTERM},
	} {
		t.Run(c.when, func(t *testing.T) {
			f := &fleet{Fleet: &testbed.Fleet{T: t, Ctx: t.Context(), Dir: t.TempDir()}}
			tmp := f.Path("tmp")
			if err := os.Mkdir(tmp, 0o700); err != nil {
				t.Fatal(err)
			}
			p := f.Start(proc.Command{Log: f.Path("dev.log"), Ready: c.ready, Env: []string{"TMPDIR=" + tmp}, Argv: []string{testbed.Program("deimos"), "dev", "--once"}})
			family := append(testbed.Descendants(p.PID()), p.PID())
			p.Signal(c.signal)
			select {
			case <-p.Done():
			case <-time.After(testbed.StopLimit):
				p.Kill()
				t.Fatal("it did not end")
			}
			if code := p.ExitCode(); code != 130 {
				t.Errorf("exit code %d: %s", code, p.LastWords())
			}
			if said := strings.TrimSpace(string(readFile(t, p.Log))); said != "" {
				t.Errorf("it has something to say to somebody who only wanted to leave: %s", said)
			}
			left, err := os.ReadDir(tmp)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range left {
				t.Errorf("it leaves %s behind", e.Name())
			}
			// Who is killed because his parent has ended is gone a moment later. Nobody has
			// been given these numbers again so soon.
			for _, pid := range family {
				f.Until(fmt.Sprintf("the end of process %d of the tour", pid), func() bool {
					cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
					return err != nil || len(cmdline) == 0
				})
			}
		})
	}
}
