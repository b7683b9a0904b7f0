package watchdog

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// service is what systemd is to a service: the socket, and the environment.
type service struct {
	t    *testing.T
	conn *net.UnixConn
	path string
}

func newService(t *testing.T) *service {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &service{t: t, conn: conn, path: path}
}

// within reads one message; "" if none comes.
func (s *service) within(d time.Duration) string {
	s.t.Helper()
	if err := s.conn.SetReadDeadline(time.Now().Add(d)); err != nil {
		s.t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, err := s.conn.Read(buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ""
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return string(buf[:n])
}

// expect reads until message comes, and counts the others.
func (s *service) expect(message string) (others map[string]int) {
	s.t.Helper()
	others = make(map[string]int)
	limit := time.Now().Add(2 * time.Minute)
	for {
		switch got := s.within(time.Until(limit)); got {
		case message:
			return others
		case "":
			s.t.Fatalf("%q did not come, but %v", message, others)
		default:
			others[got]++
		}
	}
}

func (s *service) dog(env map[string]string) *Dog {
	s.t.Helper()
	s.t.Setenv("NOTIFY_SOCKET", s.path)
	for _, name := range []string{"WATCHDOG_USEC", "WATCHDOG_PID", "SYSTEMD_EXEC_PID"} {
		s.t.Setenv(name, env[name])
	}
	d, err := New(Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

var (
	own     = strconv.Itoa(os.Getpid())
	another = strconv.Itoa(os.Getppid())
)

func TestSystemdIsToldHowTheAgentIs(t *testing.T) {
	s := newService(t)
	d := s.dog(map[string]string{"WATCHDOG_USEC": "40000", "WATCHDOG_PID": own, "SYSTEMD_EXEC_PID": own})
	d.Ready("never sent")
	d.Ready("waits for\nMAINPID=1\x1b[2J its claim")
	stop := run(d)
	s.expect("READY=1\nSTATUS=waits for MAINPID=1 [2J its claim")
	for range 5 {
		s.expect("WATCHDOG=1")
	}
	d.Ready("online")
	s.expect("READY=1\nSTATUS=online")
	stop()
	s.expect("STOPPING=1")
	if got := s.within(50 * time.Millisecond); got != "" {
		t.Errorf("after the end came %q", got)
	}
}

func TestSystemdIsNotFedWhileALoopIsLate(t *testing.T) {
	s := newService(t)
	d := s.dog(map[string]string{"WATCHDOG_USEC": "40000"})
	p := d.Pulse("loop", time.Hour)
	p.last.Store(-int64(2 * time.Hour))
	defer run(d)()
	if got := s.within(300 * time.Millisecond); got != "" {
		t.Fatalf("got %q", got)
	}
	p.Beat()
	s.expect("WATCHDOG=1")
}

func TestSystemdIsToldNothingButWhatItAskedFor(t *testing.T) {
	s := newService(t)
	for name, c := range map[string]struct {
		env  map[string]string
		want map[string]int
	}{
		"no watchdog":                {map[string]string{}, map[string]int{"STOPPING=1": 1}},
		"the watchdog of another":    {map[string]string{"WATCHDOG_USEC": "1000", "WATCHDOG_PID": another}, map[string]int{}},
		"started by the launcher":    {map[string]string{"SYSTEMD_EXEC_PID": another}, map[string]int{}},
		"the main process, with one": {map[string]string{"SYSTEMD_EXEC_PID": own, "WATCHDOG_PID": own}, map[string]int{"STOPPING=1": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &service{t: t, conn: s.conn, path: s.path}
			d := s.dog(c.env)
			d.Ready("on")
			stop := run(d)
			s.expect("READY=1\nSTATUS=on")
			got := make(map[string]int)
			if first := s.within(50 * time.Millisecond); first != "" {
				got[first]++
			}
			stop()
			// What was sent is there by now. Time is for this process, which may stand still
			// before it looks.
			for m := s.within(time.Second); m != ""; m = s.within(time.Second) {
				got[m]++
			}
			if fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestAbsurdLimitsOfSystemdAreSaid(t *testing.T) {
	s := newService(t)
	t.Setenv("NOTIFY_SOCKET", s.path)
	for _, usec := range []string{"soon", "-1", "0", "99999999999999999999"} {
		t.Setenv("WATCHDOG_USEC", usec)
		d, err := New(Options{Log: slog.New(slog.DiscardHandler)})
		if err == nil || d == nil {
			t.Errorf("%q: dog %v, error %v", usec, d, err)
			continue
		}
		d.Ready("on")
		stop := run(d)
		s.expect("READY=1\nSTATUS=on") // the agent is not worse off for it
		stop()
		s.expect("STOPPING=1")
	}
}

func TestWithoutSystemdNothingIsSent(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "1000")
	d, err := New(Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil || d.systemd != nil {
		t.Fatalf("dog %+v, error %v", d, err)
	}
	d.Ready("on")
	run(d)()
}

func TestADeviceThatHangsDoesNotStarveSystemd(t *testing.T) {
	s := newService(t)
	d := s.dog(map[string]string{"WATCHDOG_USEC": "20000"})
	m := &machine{options: usual, own: 30, stuck: make(chan struct{})}
	d.device = &device{path: "/dev/watchdog0", sys: t.TempDir(), open: m.Open, log: d.log}
	d.Pulse("loop", time.Hour)
	stop := run(d)
	for range 10 {
		s.expect("WATCHDOG=1")
	}
	close(m.stuck)
	stop()
}

func TestASystemdThatDoesNotReadHoldsUpNothing(t *testing.T) {
	s := newService(t)
	d := s.dog(map[string]string{"WATCHDOG_USEC": "200"})
	stop := run(d) // fills the socket's queue
	for range 1000 {
		d.Ready("on")
	}
	d.Pulse("loop", time.Hour).Beat()
	asked := make(chan struct{})
	go func() { stop(); close(asked) }()
	select {
	case <-asked:
	case <-time.After(time.Minute):
		t.Fatal("Run does not end")
	}
}

// A process that is watched: its loops beat until it is told to stall one, or
// to stop.
const helper = "DEIMOS_TEST_WATCHED"

func TestMain(m *testing.M) {
	if os.Getenv(helper) == "" {
		os.Exit(m.Run())
	}
	d, err := New(Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Println(err)
		os.Exit(3)
	}
	defer beats(d.Pulse("stays", limitOfLoops), limitOfLoops/20)()
	stall := beats(d.Pulse("stalls", limitOfLoops), limitOfLoops/20)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			switch in.Text() {
			case "stall":
				stall()
			case "stop":
				cancel()
			}
		}
	}()
	d.Ready("watched")
	d.Run(ctx)
}

const (
	limitOfLoops   = time.Second
	limitOfService = time.Second
)

// watched is that process, as systemd starts one with WatchdogSec=.
func (s *service) watched() (*exec.Cmd, io.Writer) {
	s.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), helper+"=1", "NOTIFY_SOCKET="+s.path, "WATCHDOG_USEC="+strconv.FormatInt(limitOfService.Microseconds(), 10), "WATCHDOG_PID=", "SYSTEMD_EXEC_PID=")
	in, err := cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = cmd.Process.Kill() })
	s.expect("READY=1\nSTATUS=watched")
	for range 2 {
		s.expect("WATCHDOG=1")
	}
	return cmd, in
}

func TestAProcessThatStallsALoopIsEndedByItsSupervisor(t *testing.T) {
	s := newService(t)
	cmd, in := s.watched()
	if _, err := io.WriteString(in, "stall\n"); err != nil {
		t.Fatal(err)
	}
	// systemd's part: no word for so long, and the process is ended by SIGABRT.
	words := 0
	for s.within(limitOfService) == "WATCHDOG=1" {
		if words++; words > 100 {
			t.Fatal("it is fed although a loop has stalled")
		}
	}
	if err := cmd.Process.Signal(syscall.SIGABRT); err != nil {
		t.Fatal(err)
	}
	var ended *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &ended) || !strings.Contains(err.Error(), "exit status 2") {
		t.Errorf("it ended with %v", err) // Go answers SIGABRT with its stacks and status 2
	}
}

func TestAProcessThatStopsInOrderSaysSo(t *testing.T) {
	s := newService(t)
	cmd, in := s.watched()
	if _, err := io.WriteString(in, "stop\n"); err != nil {
		t.Fatal(err)
	}
	s.expect("STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
