package testbed

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/wire"
)

// Fleet is a coordinator, and who commands it. Fields are set before
// [Fleet.StartServe], but for those that it sets.
type Fleet struct {
	T     *testing.T      // failures are those of this test; see [Fleet.Sub]
	Ctx   context.Context // bounds everything that the test waits for
	Dir   string          // the coordinator's state, logs, files
	HTTPS string          // where it listens
	MQTT  string
	Beat  string   // of devices; who misses three is offline, so that it must not be short where processes starve
	NATS  string   // URL of an external server; "" for the embedded one
	Flags []string // more of the coordinator's

	Patience time.Duration // how long an event may take, and half of what a command may; 0: [Patience]

	Serve  *proc.Process // set by StartServe, with the next
	Client *api.Client
}

// NewFleet is a fleet on addresses of its own, which has limit for everything.
func NewFleet(t *testing.T, limit time.Duration) *Fleet {
	t.Helper()
	f := &Fleet{T: t, Dir: t.TempDir(), Beat: "3s", HTTPS: FreeAddress(t), MQTT: FreeAddress(t)}
	var cancel context.CancelFunc
	f.Ctx, cancel = context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return f
}

// Path is a file or folder of the fleet.
func (f *Fleet) Path(parts ...string) string {
	return filepath.Join(append([]string{f.Dir}, parts...)...)
}

// Start runs a program in the background until the test ends.
func (f *Fleet) Start(c proc.Command) *proc.Process {
	f.T.Helper()
	ctx, cancel := context.WithTimeout(f.Ctx, Patience)
	defer cancel()
	p, err := Starter.Start(ctx, c)
	if err != nil {
		f.T.Fatal(err)
	}
	return p
}

// ServeArgs is the coordinator's command line.
func (f *Fleet) ServeArgs(more ...string) []string {
	args := []string{Program("deimos"), "serve", "--dir", f.Path("coordinator"), "--listen", f.HTTPS, "--mqtt", f.MQTT, "--beat", f.Beat}
	if f.NATS != "" {
		args = append(args, "--nats", f.NATS)
	}
	return slices.Concat(args, f.Flags, more)
}

// StartServe starts the coordinator and waits until it can be called.
func (f *Fleet) StartServe() {
	f.T.Helper()
	f.Serve = f.Start(proc.Command{Name: "the coordinator", Log: f.Path("logs", "coordinator.log"), Ready: api.Ready, Argv: f.ServeArgs()})
	c, err := api.LoadContext(f.Path("coordinator", "operator.json"))
	if err == nil {
		f.Client, err = api.NewClient(c)
	}
	if err != nil {
		f.T.Fatal(err)
	}
}

// ShowLogs shows the ends of all logs of a failed test.
func (f *Fleet) ShowLogs() {
	if !f.T.Failed() {
		return
	}
	logs, _ := filepath.Glob(f.Path("logs", "*"))
	for _, path := range logs {
		raw, _ := os.ReadFile(path)
		f.T.Logf("the end of %s:\n%s", filepath.Base(path), LastLines(string(raw), 40))
	}
}

// LastLines is the end of a text.
func LastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Stopped ends a process that should still run, with SIGTERM and in good order.
func (f *Fleet) Stopped(p *proc.Process, code int) {
	if p == nil || p.Ended() {
		return
	}
	if !p.Stop(StopLimit) {
		f.T.Errorf("%s did not end within %s of SIGTERM and was killed", p.Name, StopLimit)
	} else if got := p.ExitCode(); got != code {
		f.T.Errorf("%s ended with code %d on SIGTERM, want %d: %s", p.Name, got, code, p.LastWords())
	}
}

// Sub runs one part of a test under a name of its own.
func (f *Fleet) Sub(name string, part func(t *testing.T)) {
	whole := f.T
	whole.Run(name, func(t *testing.T) {
		f.T = t // failures belong to the part
		defer func() { f.T = whole }()
		part(t)
	})
}

// Device is what the coordinator knows of a device.
func (f *Fleet) Device(id wire.DeviceID) api.Device {
	f.T.Helper()
	v, err := f.Client.Device(f.Ctx, string(id))
	if err != nil {
		f.T.Fatal(err)
	}
	return v
}

// Until polls for an event, at most for its patience.
func (f *Fleet) Until(what string, ok func() bool) {
	f.T.Helper()
	limit := cmp.Or(f.Patience, Patience)
	deadline := time.Now().Add(limit)
	for !ok() {
		if time.Now().After(deadline) || f.Ctx.Err() != nil {
			f.T.Fatalf("%s did not happen within %s", what, limit)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Deimos runs the command line with this fleet's context.
func (f *Fleet) Deimos(args ...string) (proc.Result, error) {
	ctx, cancel := context.WithTimeout(f.Ctx, 2*cmp.Or(f.Patience, Patience))
	defer cancel()
	return Starter.Run(ctx, proc.Command{Argv: append([]string{Program("deimos")}, args...), Dir: f.Dir, Env: []string{
		"DEIMOS_CONTEXT=" + f.Path("coordinator", "operator.json"),
		"XDG_STATE_HOME=" + f.Path("user-state"), // what a put is to go on from stays out of the home of who runs the tests
	}})
}

// OK runs a command that must succeed. v, unless nil, takes what it prints as JSON.
func (f *Fleet) OK(v any, args ...string) {
	f.T.Helper()
	if code, said := f.Try(v, args...); code != 0 {
		f.T.Fatalf("deimos %s: exit code %d: %s", strings.Join(args, " "), code, said)
	}
}

// Fails runs a command that must end with code, and returns its sentence.
func (f *Fleet) Fails(v any, code int, args ...string) string {
	f.T.Helper()
	got, said := f.Try(v, args...)
	if got != code {
		f.T.Fatalf("deimos %s: exit code %d, want %d: %s", strings.Join(args, " "), got, code, said)
	}
	return said
}

// Try runs a command that may fail, but only as a command may.
func (f *Fleet) Try(v any, args ...string) (code int, said string) {
	f.T.Helper()
	if v != nil {
		args = append(slices.Clone(args), "-o", "json")
	}
	r, err := f.Deimos(args...)
	if err != nil {
		f.T.Fatalf("deimos %s: %v", strings.Join(args, " "), err)
	}
	if v != nil && len(r.Stdout) > 0 {
		if err := json.Unmarshal(r.Stdout, v); err != nil {
			f.T.Fatalf("deimos %s printed no JSON: %v", strings.Join(args, " "), err)
		}
	}
	if r.Code != 0 {
		CheckSentence(f.T, r)
	}
	return r.Code, r.Said()
}

// CheckSentence wants one sentence for a person on standard error: no stack
// trace, no usage page, nothing twice.
func CheckSentence(t *testing.T, r proc.Result) {
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

// PutResult is what "deimos object put -o json" prints.
type PutResult struct {
	api.Object
	Placements []api.Placement `json:"placements"`
}

// Put stores data as a user stores a file.
func (f *Fleet) Put(name string, data []byte, args ...string) (o PutResult) {
	f.T.Helper()
	file := f.Write("in-"+name, data)
	f.OK(&o, append([]string{"object", "put", "--plain", file, "--name", name}, args...)...)
	return o
}

// CheckGet reads an object back through the command line.
func (f *Fleet) CheckGet(name string, want []byte) {
	f.T.Helper()
	out := f.Path("out-" + name)
	defer os.Remove(out)
	f.OK(nil, "object", "get", "--plain", name, "--out", out)
	got, err := os.ReadFile(out)
	if err != nil {
		f.T.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		f.T.Fatalf("%s came back as something else (%d bytes, stored %d)", name, len(got), len(want))
	}
}

// Write makes a file of the fleet and returns its path.
func (f *Fleet) Write(name string, data []byte) string {
	f.T.Helper()
	path := f.Path(name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		f.T.Fatal(err)
	}
	return path
}

// Publish signs with the fleet's release keys and uploads.
func (f *Fleet) Publish(bundle string) {
	f.T.Helper()
	args := []string{"release", "publish", "--keys", f.Path("release-keys"), "--repo", f.Path("repo")}
	if bundle != "" {
		args = append(args, "--bundle", bundle)
	}
	f.OK(nil, args...)
}

// NewToken makes one for n devices.
func (f *Fleet) NewToken(n int) string {
	f.T.Helper()
	var tok api.Token
	f.OK(&tok, "token", "create", "--group", "test", "--uses", strconv.Itoa(n))
	return tok.Token
}
