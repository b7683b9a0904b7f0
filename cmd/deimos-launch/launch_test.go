package main

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/ota/slot"
)

// patience is how long an event may take before a test fails.
const patience = 2 * time.Minute

var launcherBin, agentBin []byte

func TestMain(m *testing.M) {
	launcherBin, agentBin = build("."), build("./testdata/agent")
	os.Exit(m.Run())
}

// build compiles with crash points, which do nothing unless asked for.
func build(pkg string) []byte {
	dir, err := os.MkdirTemp("", "deimos-launch-test-*")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "out")
	cmd := exec.Command("go", "build", "-tags", "crashpoints", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("build %s: %v\n%s", pkg, err, msg))
	}
	raw, err := os.ReadFile(out)
	if err != nil {
		panic(err)
	}
	return raw
}

// rig is one device: a state directory, a factory agent, a launcher.
type rig struct {
	t       *testing.T
	dir     string
	factory string
	flags   []string
}

func newRig(t *testing.T, version, mode string) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), flags: []string{"--restart-delay", "1ms", "--stop-within", "20s"}}
	write(t, filepath.Join(r.dir, "deimos-launch"), launcherBin)
	r.factory = filepath.Join(r.dir, "factory")
	next := filepath.Join(r.dir, "next")
	writeAgent(t, r.factory, version, mode, next)
	return r
}

func write(t *testing.T, path string, raw []byte) {
	t.Helper()
	if err := os.WriteFile(path, raw, 0o755); err != nil {
		t.Fatal(err)
	}
}

func writeAgent(t *testing.T, path, version, mode, next string) {
	t.Helper()
	write(t, path, slices.Concat(agentBin, fmt.Appendf(nil, "\n#agent %s %s %s\n", version, mode, next)))
}

func (r *rig) slots() *slot.Store {
	r.t.Helper()
	s, err := slot.Open(r.dir)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) state() slot.State {
	r.t.Helper()
	st, err := r.slots().Load()
	if err != nil {
		r.t.Fatal(err)
	}
	return st
}

// settle makes a device that runs version 0.1.0 and has been started before.
func (r *rig) settle() {
	r.t.Helper()
	if err := r.slots().InstallFactory(slot.A, r.factory, "0.1.0", ""); err != nil {
		r.t.Fatal(err)
	}
}

// putOnTrial installs version 0.2.0 as an agent would.
func (r *rig) putOnTrial(mode string) {
	r.t.Helper()
	s := r.slots()
	target, err := s.BeginInstall("order-1", "0.1.0")
	if err != nil {
		r.t.Fatal(err)
	}
	writeAgent(r.t, s.StagedPath(target), "0.2.0", mode, "-")
	if err := s.MarkTrial("order-1", slot.Image{Version: "0.2.0"}); err != nil {
		r.t.Fatal(err)
	}
}

// launch is a running launcher.
type launch struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines chan string
	seen  []string
}

func (r *rig) start(env ...string) *launch {
	r.t.Helper()
	args := append([]string{"--state", r.dir, "--agent", r.factory}, r.flags...)
	cmd := exec.Command(filepath.Join(r.dir, "deimos-launch"), append(args, "--", "run", r.dir)...)
	cmd.Env = append(os.Environ(), env...)
	out, w, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	w.Close()
	l := &launch{t: r.t, cmd: cmd, lines: make(chan string, 1000)}
	go func() { // ends when launcher and agent have both closed the pipe
		defer out.Close()
		defer close(l.lines)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			l.lines <- sc.Text()
		}
	}()
	r.t.Cleanup(l.kill)
	return l
}

// kill is the power going: launcher and, through it, the agent.
func (l *launch) kill() {
	_ = l.cmd.Process.Kill()
	l.drain()
	_ = l.cmd.Wait()
}

// drain reads until nobody holds the pipe any more: launcher and agent are gone.
func (l *launch) drain() {
	deadline := time.After(patience)
	for {
		select {
		case line, open := <-l.lines:
			if !open {
				return
			}
			l.seen = append(l.seen, line)
		case <-deadline:
			l.t.Errorf("somebody still runs:\n%s", strings.Join(l.seen, "\n"))
			return
		}
	}
}

// await reads until a line contains one of the texts and returns it; empty if all ended first.
func (l *launch) await(texts ...string) string {
	l.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case line, open := <-l.lines:
			if !open {
				return ""
			}
			l.seen = append(l.seen, line)
			for _, text := range texts {
				if strings.Contains(line, text) {
					return line
				}
			}
		case <-deadline:
			l.t.Fatalf("waited in vain for %q:\n%s", texts, strings.Join(l.seen, "\n"))
		}
	}
}

func (l *launch) must(text string) string {
	l.t.Helper()
	line := l.await(text)
	if line == "" {
		l.t.Fatalf("%q never came:\n%s", text, strings.Join(l.seen, "\n"))
	}
	return line
}

// exit waits for the launcher's end and that of everybody who holds its pipe.
func (l *launch) exit() int {
	l.t.Helper()
	l.drain()
	err := l.cmd.Wait()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		l.t.Fatal(err)
	}
	return l.cmd.ProcessState.ExitCode()
}

func (l *launch) signal(s syscall.Signal) {
	l.t.Helper()
	if err := l.cmd.Process.Signal(s); err != nil {
		l.t.Fatal(err)
	}
}

func (l *launch) count(text string) (n int) {
	for _, line := range l.seen {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func TestFirstStartInstallsFactoryAgent(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	l := r.start()
	if line := l.must("agent 0.1.0"); !strings.Contains(line, "slot a") || !strings.Contains(line, "args run "+r.dir) {
		t.Errorf("the agent was started as %q", line)
	}
	if st := r.state(); st.Current != slot.A || st.Version() != "0.1.0" {
		t.Errorf("state %+v", st)
	}
}

func TestHealthyTrialBecomesCurrent(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.settle()
	r.putOnTrial("good")
	l := r.start()
	l.must("confirmed 0.2.0")
	if st := r.state(); st.Current != slot.B || st.Trial != nil || st.Last.Result != slot.Confirmed {
		t.Errorf("state %+v", st)
	}
	l.signal(syscall.SIGTERM)
	if code := l.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestCrashingTrialRollsBackAfterThreeTries(t *testing.T) {
	for _, mode := range []string{"crash", "exit0", "usage"} {
		t.Run(mode, func(t *testing.T) {
			r := newRig(t, "0.1.0", "good")
			r.settle()
			r.putOnTrial(mode)
			l := r.start()
			l.must("confirmed 0.1.0")
			if n := l.count("agent 0.2.0"); n != 3 {
				t.Errorf("tried %d times, want 3", n)
			}
			st := r.state()
			if st.Current != slot.A || st.Last == nil || st.Last.Result != slot.RolledBack || st.Last.Order != "order-1" {
				t.Fatalf("state %+v", st)
			}
			if !strings.Contains(st.Last.Reason, "exited with code") {
				t.Errorf("reason %q does not say how it ended", st.Last.Reason)
			}
		})
	}
}

// TestWhatIsACrash: the agent holds it against a version, and no other end.
func TestWhatIsACrash(t *testing.T) {
	for what, c := range map[string]struct {
		end  ending
		want bool
	}{
		"an exit code":           {ending{code: 1}, true},
		"a signal":               {ending{code: -1}, true},
		"it cannot be started":   {ending{code: 126, unstartable: true}, true},
		"an end":                 {ending{code: 0}, false},
		"it wants another start": {ending{code: slot.ExitRestart}, false},
		"its time was over":      {ending{code: -1, givenUp: true}, false},
	} {
		if got := c.end.crash(); got != c.want {
			t.Errorf("%s: %v", what, got)
		}
	}
}

func TestTrialThatCannotBeExecutedRollsBack(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.settle()
	s := r.slots()
	target, err := s.BeginInstall("order-1", "0.1.0")
	if err != nil {
		t.Fatal(err)
	}
	write(t, s.StagedPath(target), []byte("no program"))
	if err := s.MarkTrial("order-1", slot.Image{Version: "0.2.0"}); err != nil {
		t.Fatal(err)
	}
	r.start().must("confirmed 0.1.0")
	if st := r.state(); st.Last == nil || !strings.Contains(st.Last.Reason, "could not be started") {
		t.Errorf("state %+v", st)
	}
}

func TestHangingTrialIsKilledAndRolledBack(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.flags = []string{"--restart-delay", "1ms", "--confirm-within", "100ms", "--stop-within", "50ms"}
	r.settle()
	r.putOnTrial("hang")
	l := r.start()
	l.must("confirmed 0.1.0")
	if n := l.count("starting version 0.2.0"); n != 3 {
		t.Errorf("tried %d times, want 3", n)
	}
	if st := r.state(); st.Current != slot.A || st.Last.Result != slot.RolledBack || !strings.Contains(st.Last.Reason, "did not confirm itself within 100ms") {
		t.Errorf("state %+v, %+v", st, st.Last)
	}
	for _, line := range l.seen {
		if _, rest, ok := strings.Cut(line, "agent 0.2.0 slot b pid "); ok {
			pid, _ := strconv.Atoi(strings.Fields(rest)[0])
			if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
				t.Errorf("the hanging agent %d still runs (%v)", pid, err)
			}
		}
	}
}

func TestTrialThatConfirmsInTimeIsNotKilledLater(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.flags = []string{"--restart-delay", "1ms", "--confirm-within", "30s"}
	r.settle()
	r.putOnTrial("good-then-crash")
	l := r.start()
	l.must("exited with code 3")
	l.must("exited with code 3") // started again as any confirmed agent
	if st := r.state(); st.Current != slot.B || st.Trial != nil {
		t.Errorf("state %+v", st)
	}
}

func TestPowerBlipDoesNotRollBack(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.settle()
	r.putOnTrial("run") // comes up, but is not confirmed yet
	for range slot.Interruptions {
		l := r.start()
		l.must("running 0.2.0")
		l.kill()
	}
	l := r.start()
	l.must("running 0.2.0")
	if st := r.state(); st.Trial == nil || st.Trial.Interrupted != slot.Interruptions || st.Trial.Tries != slot.Tries-1 {
		t.Fatalf("state %+v", st)
	}
	if err := r.slots().Confirm(slot.B); err != nil {
		t.Fatal(err)
	}
	l.kill()
	r.start().must("running 0.2.0")
}

func TestTooManyPowerCutsRollBack(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.settle()
	r.putOnTrial("run")
	for range slot.Interruptions + 1 {
		l := r.start()
		l.must("running 0.2.0")
		l.kill()
	}
	r.start().must("confirmed 0.1.0")
	if st := r.state(); st.Last == nil || !strings.Contains(st.Last.Reason, "went down with it") {
		t.Errorf("state %+v", st)
	}
}

func TestOrderlyStopsCostNoTry(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.settle()
	r.putOnTrial("run")
	for range slot.Tries + 1 {
		l := r.start()
		l.must("running 0.2.0")
		l.signal(syscall.SIGTERM)
		if code := l.exit(); code != 0 {
			t.Fatalf("exit code %d", code)
		}
	}
	if st := r.state(); st.Trial == nil || st.Trial.Tries != slot.Tries {
		t.Errorf("state %+v", st)
	}
}

func TestSignalLeavesNoProcess(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(s.String(), func(t *testing.T) {
			r := newRig(t, "0.1.0", "parent")
			l := r.start()
			line := l.must("grandchild ")
			l.must("running 0.1.0")
			l.signal(s)
			if code := l.exit(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			if l.count("stopping 0.1.0") != 1 {
				t.Error("the agent was not asked to stop")
			}
			awaitGone(t, line)
		})
	}
}

func awaitGone(t *testing.T, line string) {
	t.Helper()
	fields := strings.Fields(line)
	pid, err := strconv.Atoi(fields[len(fields)-1])
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if gone(pid) {
			return
		}
	}
	t.Errorf("process %d still runs", pid)
}

// gone counts a zombie as gone: who should reap it is not ours to say.
func gone(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	return strings.HasPrefix(rest, "Z")
}

func TestDeafAgentIsKilledOnStop(t *testing.T) {
	r := newRig(t, "0.1.0", "hang")
	r.flags = []string{"--stop-within", "50ms"}
	l := r.start()
	l.must("hanging 0.1.0")
	l.signal(syscall.SIGTERM)
	if code := l.exit(); code != 0 || l.count("killing it") != 1 {
		t.Errorf("exit code %d:\n%s", code, strings.Join(l.seen, "\n"))
	}
}

// An agent that is killed while it stops leaves the machine's watchdog armed.
func TestAnAgentHasTheTimeThatItAllowsItselfToStop(t *testing.T) {
	l, err := parse([]string{"--state", "state", "--agent", "agent"})
	if err != nil {
		t.Fatal(err)
	}
	if l.stopWithin <= slot.StopWithin {
		t.Errorf("killed after %s, but it may take %s", l.stopWithin, slot.StopWithin)
	}
}

func TestDeadLauncherTakesAgentAlong(t *testing.T) {
	r := newRig(t, "0.1.0", "hang")
	l := r.start()
	l.must("hanging 0.1.0")
	l.kill() // drain fails the test if the agent keeps the pipe open
}

func TestSecondLauncherRefuses(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.start().must("confirmed")
	l := r.start()
	if code := l.exit(); code != exitUnavailable || l.count("another deimos-launch already runs here") != 1 {
		t.Errorf("exit code %d:\n%s", code, strings.Join(l.seen, "\n"))
	}
}

func TestExitCodesOfConfirmedAgent(t *testing.T) {
	for mode, want := range map[string]int{"exit0": 0, "usage": 78} {
		t.Run(mode, func(t *testing.T) {
			r := newRig(t, "0.1.0", mode)
			if code := r.start().exit(); code != want {
				t.Errorf("exit code %d, want %d", code, want)
			}
		})
	}
	t.Run("restart", func(t *testing.T) {
		l := newRig(t, "0.1.0", "restart-once").start()
		l.must("exited with code 75")
		l.must("running 0.1.0")
	})
	t.Run("crash", func(t *testing.T) {
		l := newRig(t, "0.1.0", "crash").start()
		l.must("next start in 1ms")
		l.must("next start in 2ms")
		l.must("next start in 4ms")
	})
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{{}, {"--state", "x"}, {"--bogus"}, {"--state", "x", "--agent", "y", "--confirm-within", "-1s"}} {
		if code := run(args); code != exitUsage {
			t.Errorf("%q: exit code %d, want %d", args, code, exitUsage)
		}
	}
}

func TestMissingFactoryAgentIsSaid(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.factory = filepath.Join(r.dir, "nowhere")
	l := r.start()
	if code := l.exit(); code != exitNoAgent || l.count("check --agent") != 1 {
		t.Errorf("exit code %d:\n%s", code, strings.Join(l.seen, "\n"))
	}
}

func TestDamagedCurrentAgentIsReplaced(t *testing.T) {
	t.Run("by the other slot", func(t *testing.T) {
		r := newRig(t, "0.1.0", "good")
		r.settle()
		r.putOnTrial("good")
		l := r.start()
		l.must("confirmed 0.2.0")
		l.kill()
		if err := os.Truncate(r.slots().Path(slot.B), 1000); err != nil {
			t.Fatal(err)
		}
		l = r.start()
		l.must("is damaged")
		l.must("confirmed 0.1.0")
		if st := r.state(); st.Current != slot.A || st.Repair == nil {
			t.Errorf("state %+v", st)
		}
	})
	t.Run("by the factory agent", func(t *testing.T) {
		r := newRig(t, "0.1.0", "good")
		r.settle()
		f, err := os.OpenFile(r.slots().Path(slot.A), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{0xff}, 4096); err != nil { // one byte, found by the digest
			t.Fatal(err)
		}
		f.Close()
		l := r.start()
		l.must("is damaged")
		l.must("confirmed 0.1.0")
		if st := r.state(); st.Repair == nil || !strings.Contains(st.Repair.Reason, "damaged") {
			t.Errorf("state %+v", st)
		}
	})
}

func TestAgentThatTheKernelRefusesIsReplaced(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	write(t, r.slots().Path(slot.A), []byte("no program")) // without a state nobody knows its digest
	l := r.start()
	l.must("exec format error")
	l.must("confirmed 0.1.0")
}

func TestLostStateStartsSlotA(t *testing.T) {
	r := newRig(t, "0.1.0", "good")
	r.settle()
	for _, f := range []string{"state.json", "state.prev.json"} {
		write(t, filepath.Join(r.dir, "slots", f), []byte("{}"))
	}
	l := r.start()
	l.must("the slot state is lost")
	l.must("confirmed 0.1.0")
}

// TestKilledAtEveryPoint kills the launcher, then the agent, at each point
// where either changes something on disk, from the first start to the end of
// an update, and expects the next start to bring the update to its right end.
func TestKilledAtEveryPoint(t *testing.T) {
	step := 1
	if testing.Short() {
		step = 3
	}
	first := 1 + rand.IntN(step)
	for _, c := range []struct {
		next   string
		result slot.Result
		last   string
	}{
		{"good", slot.Confirmed, "confirmed 0.2.0"},
		{"crash", slot.RolledBack, "settled on 0.1.0"},
	} {
		for _, who := range []string{"deimos-launch", "deimos-agent"} {
			t.Run(c.next+" "+who, func(t *testing.T) {
				points := 0
				for n := first; killedAt(t, n, who, c.next, c.result, c.last); n += step {
					points++
				}
				t.Logf("%d points, from %d in steps of %d", points, first, step)
				if points < 2 {
					t.Errorf("only %d points: were the programs built with crash points?", points)
				}
			})
		}
	}
}

// killedAt returns whether there was an nth point.
func killedAt(t *testing.T, n int, who, next string, result slot.Result, last string) bool {
	r := newRig(t, "0.1.0", "updater")
	writeAgent(t, filepath.Join(r.dir, "next"), "0.2.0", next, "-")
	l := r.start("DEIMOS_CRASH_AT="+strconv.Itoa(n), "DEIMOS_CRASH_IN="+who)
	met := strings.Contains(l.await("crash point", last), "crash point")
	l.kill()
	if !met {
		return false
	}
	l = r.start()
	if l.await(last) == "" {
		t.Fatalf("point %d in %s:\n%s", n, who, strings.Join(l.seen, "\n"))
	}
	st := r.state()
	if st.Last == nil || st.Last.Result != result || st.Trial != nil {
		t.Errorf("point %d in %s: %+v\n%s", n, who, st, strings.Join(l.seen, "\n"))
	}
	l.kill()
	return true
}
