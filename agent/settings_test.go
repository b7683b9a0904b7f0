package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

// desk is a device's settings below a state folder, and what they put in force.
type desk struct {
	*settings
	t       testing.TB
	applied []inForce
}

// newDesk opens them with an owner's file of this text.
func newDesk(t testing.TB, dir, owner string) *desk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.toml")
	if err := os.WriteFile(path, []byte(owner), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{t: t}
	base := inForce{beatSeconds: 60, jobs: c.Jobs, scrub: c.Scrub, transfer: c.Transfer, level: slog.LevelInfo}
	d.settings, err = openSettings(filepath.Join(dir, settingsFile), base, c.owned, func(f inForce) { d.applied = append(d.applied, f) }, discardLog())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// order hands in a document as the dispatcher does.
func (d *desk) order(version uint64, values map[string]string) (wire.ConfigReport, error) {
	d.t.Helper()
	want := wire.ConfigApply{Version: version, Values: map[string]json.RawMessage{}}
	for k, v := range values {
		want.Values[k] = json.RawMessage(v)
	}
	body, err := json.Marshal(want)
	if err != nil {
		d.t.Fatal(err)
	}
	out, err := d.Handle(d.t.Context(), wire.Order{Kind: wire.KindConfigApply, Body: body}, nil)
	r, _ := out.Body.(wire.ConfigReport)
	return r, err
}

func (d *desk) mustOrder(version uint64, values map[string]string) wire.ConfigReport {
	d.t.Helper()
	r, err := d.order(version, values)
	if err != nil {
		d.t.Fatal(err)
	}
	if r.Version != version || d.version() != version {
		d.t.Errorf("version %d was taken, %d reported, %d for the hello", version, r.Version, d.version())
	}
	return r
}

func (d *desk) wantRunning(r wire.ConfigReport, key, value string) {
	d.t.Helper()
	if got := string(r.Running[key]); got != value {
		d.t.Errorf("%s runs with %s, want %s", key, got, value)
	}
}

func (d *desk) inForce() inForce { return d.applied[len(d.applied)-1] }

func TestEverySettingCanBeSetAndIsReported(t *testing.T) {
	d := newDesk(t, t.TempDir(), "")
	values := map[string]string{
		wire.SettingBeat: "30", wire.SettingJobs: "false", wire.SettingJobSlots: "9", wire.SettingJobMemory: "1073741824",
		wire.SettingJobOutput: "77", wire.SettingJobCPU: "1.5", wire.SettingJobWall: "86400", wire.SettingLogLevel: `"debug"`,
		wire.SettingScrubDays: "7.5", wire.SettingScrubRate: "1048576",
		wire.SettingDownRate: "20000", wire.SettingUpRate: "30000", wire.SettingMonthly: "1073741824",
	}
	if len(values) != len(wire.Settings()) || len(knobs) != len(values) {
		t.Fatalf("%d settings, %d knobs, %d tested", len(wire.Settings()), len(knobs), len(values))
	}
	r := d.mustOrder(1, values)
	for k, v := range values {
		d.wantRunning(r, k, v)
	}
	if len(r.Refused) != 0 {
		t.Errorf("refused: %v", r.Refused)
	}
	jobs := policy.Default()
	jobs.Enabled, jobs.Slots, jobs.MaxMemory, jobs.MaxOutput, jobs.MaxCPU, jobs.MaxWall = false, 9, 1<<30, 77, 1.5, 86400
	want := inForce{30, jobs, ScrubConfig{Days: 7.5, Rate: 1 << 20}, TransferConfig{Down: 20000, Up: 30000, Monthly: 1 << 30}, slog.LevelDebug}
	if !reflect.DeepEqual(d.inForce(), want) {
		t.Errorf("in force %+v, want %+v", d.inForce(), want)
	}
	// What is not wanted any more goes back.
	d.mustOrder(2, nil)
	if !reflect.DeepEqual(d.inForce(), d.base) || !reflect.DeepEqual(d.base.jobs, policy.Default()) {
		t.Errorf("in force %+v, want the defaults", d.inForce())
	}
}

func TestOwnersLimitsWinOverTheFleet(t *testing.T) {
	d := newDesk(t, t.TempDir(), "[jobs]\nenabled = false\nmax_memory_bytes = 268435456\n")
	for i, c := range []struct{ memory, running string }{
		{"134217728", "134217728"}, // lower is fine
		{"268435456", "268435456"},
		{"536870912", "268435456"}, // higher is refused, and the owner's holds
		{"65536", "65536"},
		{"4294967296", "268435456"},
	} {
		r := d.mustOrder(uint64(i+1), map[string]string{wire.SettingJobMemory: c.memory, wire.SettingJobs: "true", wire.SettingBeat: "7"})
		d.wantRunning(r, wire.SettingJobMemory, c.running)
		d.wantRunning(r, wire.SettingJobs, "false")
		d.wantRunning(r, wire.SettingBeat, "7") // one refusal does not fail the others
		if d.inForce().jobs.Enabled || d.inForce().jobs.MaxMemory > 268435456 {
			t.Errorf("the fleet passed the owner: %+v", d.inForce())
		}
		refusal, refused := r.Refused[wire.SettingJobMemory]
		if refused != (c.memory != c.running) {
			t.Errorf("%s: refused is %v", c.memory, refused)
		}
		if refused && (refusal.Code != wire.CodePolicy || !strings.Contains(refusal.Reason, "268435456") || !strings.Contains(refusal.Reason, "owner")) {
			t.Errorf("the refusal does not name the owner's limit: %+v", refusal)
		}
		if r.Refused[wire.SettingJobs].Code != wire.CodePolicy {
			t.Errorf("jobs: %+v", r.Refused)
		}
	}
}

func TestWhatTheOwnerDoesNotStateIsNoLimit(t *testing.T) {
	// Zero means the default to the owner's file, and so states nothing.
	d := newDesk(t, t.TempDir(), "[jobs]\nenabled = true\nmax_cpu_seconds = 0\n")
	r := d.mustOrder(1, map[string]string{wire.SettingJobMemory: "4294967296", wire.SettingJobCPU: "7200", wire.SettingJobs: "false"})
	if len(r.Refused) != 0 {
		t.Errorf("refused: %+v", r.Refused)
	}
}

func TestValuesThatMakeNoSenseAreRefusedEachWithItsReason(t *testing.T) {
	d := newDesk(t, t.TempDir(), "")
	r := d.mustOrder(1, map[string]string{wire.SettingBeat: "4", "jobs.colour": `"red"`, wire.SettingLogLevel: "7", wire.SettingJobSlots: "2"})
	for key, code := range map[string]string{wire.SettingBeat: wire.CodeBadBody, "jobs.colour": wire.CodeNotSupported, wire.SettingLogLevel: wire.CodeBadBody} {
		if got := r.Refused[key]; got.Code != code || got.Reason == "" {
			t.Errorf("%s: %+v, want %s", key, got, code)
		}
	}
	d.wantRunning(r, wire.SettingBeat, "60")
	d.wantRunning(r, wire.SettingJobSlots, "2")
}

func TestAnOlderConfigurationIsRejected(t *testing.T) {
	d := newDesk(t, t.TempDir(), "")
	d.mustOrder(7, map[string]string{wire.SettingBeat: "30"})
	_, err := d.order(6, map[string]string{wire.SettingBeat: "3600"})
	if err == nil || wire.ProblemOf(err).State != wire.Rejected || wire.ProblemOf(err).Code != wire.CodeSuperseded {
		t.Errorf("got %v", err)
	}
	if _, err := d.order(0, nil); err == nil || wire.ProblemOf(err).Code != wire.CodeBadBody {
		t.Errorf("without a version: %v", err)
	}
	if d.inForce().beatSeconds != 30 || d.version() != 7 {
		t.Errorf("version %d, %+v", d.version(), d.inForce())
	}
	d.mustOrder(7, map[string]string{wire.SettingBeat: "30"}) // a repeat
}

func TestConfigurationAndRefusalsOutliveARestart(t *testing.T) {
	dir := t.TempDir()
	const owner = "[jobs]\nslots = 2\n"
	d := newDesk(t, dir, owner)
	before := d.mustOrder(5, map[string]string{wire.SettingBeat: "30", wire.SettingJobSlots: "3", "x.y": "1"})
	d = newDesk(t, dir, owner)
	if d.version() != 5 || d.inForce().beatSeconds != 30 || len(d.applied) != 1 {
		t.Errorf("after a restart: version %d, %+v", d.version(), d.applied)
	}
	a, _ := json.Marshal(before)
	b, _ := json.Marshal(d.report())
	if len(before.Refused) != 2 || !bytes.Equal(a, b) {
		t.Errorf("reported\n%s\nafter the restart\n%s", a, b)
	}
	if _, err := d.order(4, nil); err == nil || wire.ProblemOf(err).Code != wire.CodeSuperseded {
		t.Errorf("an older version after the restart: %v", err)
	}
	// The owner allows more: the same document is weighed anew.
	d = newDesk(t, dir, "[jobs]\nslots = 4\n")
	d.wantRunning(d.report(), wire.SettingJobSlots, "3")
}

func TestAConfigurationThatCannotBeSavedIsNotInForce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	d := newDesk(t, dir, "")
	d.mustOrder(1, map[string]string{wire.SettingBeat: "30"})
	if err := os.Rename(dir, dir+".gone"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.order(2, map[string]string{wire.SettingBeat: "90"}); err == nil || wire.ProblemOf(err).State != wire.Failed {
		t.Errorf("got %v", err)
	}
	if d.version() != 1 || d.inForce().beatSeconds != 30 {
		t.Errorf("version %d, %+v", d.version(), d.inForce())
	}
}

func TestADamagedConfigurationIsAskedForAgain(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, settingsFile), []byte(`{"version":9,"values":{"beat.seconds":`), 0o600); err != nil {
		t.Fatal(err)
	}
	d := newDesk(t, dir, "")
	if d.version() != 0 || !reflect.DeepEqual(d.inForce(), d.base) {
		t.Errorf("version %d, %+v", d.version(), d.inForce())
	}
	d.mustOrder(9, nil)
}

func TestTheHeartbeatLearnsOfAChangeAtOnce(t *testing.T) {
	d := newDesk(t, t.TempDir(), "")
	every, changed := d.beat()
	if every != time.Minute {
		t.Errorf("%s", every)
	}
	d.mustOrder(1, map[string]string{wire.SettingBeat: "5"})
	await(t, "news of the change", changed)
	if every, _ := d.beat(); every != 5*time.Second {
		t.Errorf("%s", every)
	}
}

func TestTheLogLevelChangesForLoggersThatThereAre(t *testing.T) {
	var out bytes.Buffer
	log, level := withLevel(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelWarn})))
	child := log.With("device", "x").WithGroup("g")
	if level.Level() != slog.LevelWarn || child.Enabled(context.Background(), slog.LevelInfo) {
		t.Errorf("it begins at %s", level.Level())
	}
	level.Set(slog.LevelDebug)
	child.Debug("told now")
	level.Set(slog.LevelError)
	child.Warn("not told")
	if got := out.String(); !strings.Contains(got, "told now") || strings.Contains(got, "not told") {
		t.Errorf("logged %q", got)
	}
}

// An owner who wants the disk read no more than so often, nor faster.
func TestTheFleetScrubsNoMoreThanTheOwnerAllows(t *testing.T) {
	d := newDesk(t, t.TempDir(), "[scrub]\ndays = 30\nmax_bytes_per_second = 1000000\n")
	r := d.mustOrder(1, map[string]string{wire.SettingScrubDays: "20", wire.SettingScrubRate: "2000000"})
	if len(r.Refused) != 2 || !strings.Contains(r.Refused[wire.SettingScrubDays].Reason, "no less than 30") {
		t.Errorf("refused: %v", r.Refused)
	}
	if f := d.inForce(); f.scrub != (ScrubConfig{Days: 30, Rate: 1000000}) {
		t.Errorf("in force: %+v", f.scrub)
	}
	r = d.mustOrder(2, map[string]string{wire.SettingScrubDays: "40", wire.SettingScrubRate: "500000"})
	if f := d.inForce(); len(r.Refused) != 0 || f.scrub != (ScrubConfig{Days: 40, Rate: 500000}) {
		t.Errorf("in force: %+v, refused: %v", f.scrub, r.Refused)
	}
}
