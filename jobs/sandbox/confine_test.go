package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/wire"
	"golang.org/x/sys/unix"
)

// orphanArg makes the test binary a parent of one endless job; the next
// argument is the module.
const orphanArg = "orphan-parent"

func orphanParent() {
	_, err := (&Runner{}).Run(context.Background(), Spec{
		Module: os.Args[2], Limits: wire.JobLimits{CPUSeconds: 600, WallSeconds: 600},
	})
	fmt.Fprintln(os.Stderr, "the endless job ended:", err)
	os.Exit(1)
}

func TestWorkerDiesWithItsParent(t *testing.T) {
	parent := exec.Command("/proc/self/exe", orphanArg, endless.file(t))
	parent.Stderr = os.Stderr
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var worker int
	eventually(t, "a worker at its job", func() bool {
		worker = childOf(parent.Process.Pid)
		return worker != 0 && strings.Contains(procFile(worker, "limits"), "Max open files            0 ")
	})
	pidfd, err := unix.PidfdOpen(worker, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // killed
	// A pidfd becomes readable when its process ends.
	n, err := poll(pidfd, 2*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 {
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		t.Fatal("the worker outlived its parent")
	}
}

func TestWorkerIsConfinedBeforeTheModuleRuns(t *testing.T) {
	c := started(t, Spec{Module: endless.file(t), Limits: wire.JobLimits{MemoryBytes: 16 << 20, CPUSeconds: 30}})
	pid := c.cmd.Process.Pid
	eventually(t, "the job running", func() bool {
		return strings.Contains(procFile(pid, "limits"), "Max open files            0 ")
	})
	for what, want := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_FSIZE: 0, unix.RLIMIT_NOFILE: 0, unix.RLIMIT_CPU: 31} {
		var got unix.Rlimit
		if err := unix.Prlimit(pid, what, nil, &got); err != nil {
			t.Fatal(err)
		}
		if got.Cur != want || got.Max != want {
			t.Errorf("resource %d is limited to %d and at most %d, want %d", what, got.Cur, got.Max, want)
		}
	}
	var data unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_DATA, nil, &data); err != nil {
		t.Fatal(err)
	}
	if used := uint64(statusField([]byte(procFile(pid, "status")), "VmData")); data.Max != data.Cur || data.Max > used+16<<20+engineAllowance {
		t.Errorf("may map %d bytes, has mapped %d", data.Max, used)
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		t.Fatal("no threads", err)
	}
	for _, path := range threads {
		status, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		if !strings.Contains(string(status), "NoNewPrivs:\t1") {
			t.Errorf("%s: new privileges are possible", path)
		}
	}
	if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err == nil && cwd != "/" {
		t.Errorf("works in %s", cwd)
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err == nil && len(env) > 0 {
		t.Errorf("has the environment %q", env)
	}
	if got := strings.TrimSpace(procFile(pid, "oom_score_adj")); got != "1000" {
		t.Errorf("offers itself to the OOM killer with %s", got)
	}
	if pgid, err := unix.Getpgid(pid); err != nil || pgid != pid {
		t.Errorf("its process group is %d, not its own %d (%v)", pgid, pid, err)
	}
	// As who runs beside it, with no more rights than it has itself.
	if err := spend(func() error {
		f, err := os.Open(fmt.Sprintf("/proc/%d/environ", pid))
		if err == nil {
			f.Close()
		}
		return err
	}); err == nil {
		t.Error("a neighbour can look into it")
	}
}

func TestNoThreadOfTheParentIsSpentForLong(t *testing.T) {
	if strings.Contains(procFile(os.Getpid(), "status"), "NoNewPrivs:\t1") {
		testenv.Cannot(t, "this test itself runs without new privileges")
	}
	mustRun(t, Spec{Module: wasm{}.file(t)})
	eventually(t, "no thread without new privileges", func() bool {
		paths, _ := filepath.Glob("/proc/self/task/*/status")
		for _, path := range paths {
			if status, err := os.ReadFile(path); err == nil && strings.Contains(string(status), "NoNewPrivs:\t1") {
				return false
			}
		}
		return true
	})
}

func TestWorkerClosesWhatItInherits(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	leaked, err := unix.Dup(int(w.Fd())) // not close-on-exec
	if err != nil {
		t.Fatal(err)
	}
	c := started(t, Spec{Module: endless.file(t), Limits: wire.JobLimits{CPUSeconds: 30}})
	w.Close()
	unix.Close(leaked)
	ready, err := poll(int(r.Fd()), 2*time.Minute)
	if err != nil || ready == 0 {
		t.Fatal("the worker keeps a descriptor that it inherited", err)
	}
	select {
	case <-c.exited:
		t.Fatal("the worker has ended; this shows nothing")
	default:
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatal(n, err)
	}
}

func TestWorkerWithoutATaskSaysSo(t *testing.T) {
	out, err := exec.Command("/proc/self/exe", WorkerArg).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "started by the agent only") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestThisExecutableIsTheWorkerByDefault(t *testing.T) {
	res, err := (&Runner{}).Run(t.Context(), Spec{Module: wasm{}.file(t)})
	if err != nil {
		t.Fatalf("%v (stderr %q)", err, res.Stderr)
	}
}

func TestMissingExecutableIsAWorkerFailure(t *testing.T) {
	_, err := (&Runner{Executable: "/does/not/exist"}).Run(t.Context(), Spec{Module: endless.file(t)})
	wantCause(t, err, WorkerFailed, wire.Failed, wire.CodeInternal)
	_, err = (&Runner{Executable: "/bin/true"}).Run(t.Context(), Spec{Module: endless.file(t)})
	wantCause(t, err, WorkerFailed, wire.Failed, wire.CodeInternal)
}

// started starts a worker that nobody watches; the test's end kills it.
func started(t *testing.T, s Spec) *child {
	t.Helper()
	if err := s.normalize(); err != nil {
		t.Fatal(err)
	}
	module, err := openModule(s.Module)
	if err != nil {
		t.Fatal(err)
	}
	defer module.Close()
	kids := make(chan *child)
	ended := make(chan struct{})
	go func() {
		err := spend(func() error {
			c, err := runner.start(s, module, "")
			kids <- c
			if err == nil {
				<-c.exited
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		close(ended)
	}()
	c := <-kids
	if c == nil {
		<-ended
		t.FailNow()
	}
	t.Cleanup(func() {
		select {
		case <-c.exited:
		default:
			_ = c.kill(nil)
		}
		await(t, ended)
		if c.cmd.ProcessState == nil {
			_, _ = c.reap(nil, s.Limits)
		}
	})
	return c
}

// eventually waits for what no event announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not come: %s", what)
		}
	}
}

func await(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(3 * time.Minute):
		t.Fatal("waited for three minutes in vain")
	}
}

func poll(fd int, d time.Duration) (int, error) {
	for deadline := time.Now().Add(d); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, time.Until(deadline).Milliseconds())))
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// childOf finds a worker by its parent in /proc/<pid>/stat, see proc(5).
func childOf(parent int) int {
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		after := string(stat)[strings.LastIndexByte(string(stat), ')')+1:]
		fields := strings.Fields(after)
		if len(fields) > 1 && fields[1] == strconv.Itoa(parent) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			return pid
		}
	}
	return 0
}

func procFile(pid int, name string) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	return string(b)
}

// seeded makes random numbers that can be had again.
func seeded(t *testing.T) *rand.Rand {
	return rand.New(rand.NewPCG(testenv.Seed(t), 0))
}

// hostListener is a socket of the host that no guest may reach.
type hostListener struct {
	port string
	hits chan struct{}
}

func listener(t *testing.T) *hostListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h := &hostListener{port: port, hits: make(chan struct{}, 1)}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // the test is over
			}
			conn.Close()
			select {
			case h.hits <- struct{}{}:
			default:
			}
		}
	}()
	return h
}

func (h *hostListener) reached() bool {
	select {
	case <-h.hits:
		return true
	default:
		return false
	}
}
