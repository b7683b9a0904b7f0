package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/beevik/ntp"
	"github.com/brutella/dnssd"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// role makes the test's binary a part of a test: the agent, or process 1 of a
// machine made of namespaces.
const role = "DEIMOS_INIT_TEST"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(role) == "init":
		beMachine()
	case len(os.Args) > 2 && os.Args[1] == "agent":
		beAgent(os.Args[2])
	}
	os.Exit(m.Run())
}

// beAgent is an agent that behaves in one way.
func beAgent(mode string) {
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	fmt.Println("agent starts", strings.Join(os.Args[3:], " "))
	switch mode {
	case "crash":
		os.Exit(3)
	case "again":
		os.Exit(75)
	case "reboot":
		os.Exit(79)
	case "unconfigured":
		os.Exit(78)
	case "hang":
		signal.Ignore(unix.SIGTERM)
		fmt.Println("agent hangs")
		select {}
	case "orphans":
		for range 5 { // children of children, whose parent is gone
			c := exec.Command("/bin/agent", "agent", "parent")
			_ = c.Run()
		}
		fmt.Println("agent has made orphans, coordinator", os.Getenv("DEIMOS_COORDINATOR"), "token", os.Getenv("DEIMOS_TOKEN"))
	case "parent":
		c := exec.Command("/bin/agent", "agent", "crash")
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		_ = c.Start()
		os.Exit(0)
	}
	<-term
	fmt.Println("agent stops")
	os.Exit(0)
}

// said collects lines and lets a test wait for them.
type said struct {
	mu    sync.Mutex
	lines []string
	news  chan struct{}
}

func newSaid() *said { return &said{news: make(chan struct{}, 1)} }

func (s *said) say(line string) {
	s.mu.Lock()
	s.lines = append(s.lines, strings.TrimSpace(line))
	s.mu.Unlock()
	select {
	case s.news <- struct{}{}:
	default: // whoever waits has a look to come already
	}
}

func (s *said) count(text string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

func (s *said) await(t *testing.T, text string, times int) {
	t.Helper()
	limit := time.After(patience)
	for s.count(text) < times {
		select {
		case <-s.news:
		case <-limit:
			t.Fatalf("%q was not said %d times; only %q", text, times, s.lines)
		}
	}
}

// supervised runs the test's agent in one of its ways.
func supervised(t *testing.T, mode string, stopWithin time.Duration, kick <-chan struct{}, first time.Duration) (s *said, stop func()) {
	t.Helper()
	return supervisedBy(t, mode, stopWithin, kick, first, func(*supervisor) {})
}

func supervisedBy(t *testing.T, mode string, stopWithin time.Duration, kick <-chan struct{}, first time.Duration, change func(*supervisor)) (s *said, stop func()) {
	t.Helper()
	s = newSaid()
	ctx, cancel := context.WithCancel(context.Background())
	p := &processes{}
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	var all sync.WaitGroup
	reaping, endReaping := context.WithCancel(context.Background())
	all.Go(func() { p.reap(reaping, chld) })
	v := &supervisor{processes: p, say: s.say, log: slog.New(slog.NewTextHandler(lineWriter(s.say), nil)), kick: kick, stopWithin: stopWithin, first: first,
		command: func() ([]string, []string) { return []string{os.Args[0], "agent", mode}, os.Environ() }}
	change(v)
	ended := make(chan struct{})
	go func() { v.run(ctx); close(ended) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Error("the supervisor does not end")
		}
		endReaping()
		all.Wait()
		signal.Stop(chld)
	})
	t.Cleanup(stop)
	return s, stop
}

func TestAgentThatCrashesIsStartedAgainAfterLongerAndLongerPauses(t *testing.T) {
	s, _ := supervised(t, "crash", time.Second, nil, 10*time.Millisecond)
	for _, pause := range []string{"in=10ms", "in=20ms", "in=40ms", "in=80ms"} {
		s.await(t, pause, 1)
	}
	s.await(t, "agent starts", 4)
	if s.count("exit code 3") < 4 {
		t.Errorf("%q", s.lines)
	}
}

func TestAgentThatAsksIsStartedAtOnceButNotInALoop(t *testing.T) {
	s, stop := supervised(t, "again", time.Second, nil, time.Nanosecond)
	s.await(t, "agent starts", 5)
	stop()
	if s.count("in=") != 0 {
		t.Errorf("a pause after exit code 75: %q", s.lines)
	}
	s, _ = supervised(t, "again", time.Second, nil, time.Hour) // no agent lives so long
	s.await(t, "in=1h", 1)
}

func TestNewsEndAPauseAndAnAgentThatKnowsLess(t *testing.T) {
	kick := make(chan struct{}, 1)
	s, stop := supervised(t, "crash", time.Second, kick, time.Hour)
	s.await(t, "in=1h", 1)
	kick <- struct{}{}
	s.await(t, "agent starts", 2)
	stop()
	s, _ = supervised(t, "good", time.Minute, kick, time.Hour)
	s.await(t, "agent starts", 1)
	kick <- struct{}{}
	s.await(t, "agent starts", 2)
	if s.count("agent stops") != 1 {
		t.Errorf("an agent that runs was not asked to stop: %q", s.lines)
	}
}

func TestAgentWithNobodyToComeToIsStartedWhenThereIsNews(t *testing.T) {
	kick, asked := make(chan struct{}, 1), make(chan struct{})
	s, stop := supervisedBy(t, "good", time.Minute, kick, time.Millisecond, func(v *supervisor) {
		v.waits = func() bool { close(asked); return true }
	})
	<-asked
	s.await(t, "waits for a coordinator", 1)
	if s.count("agent starts") != 0 {
		t.Errorf("started without anybody to come to: %q", s.lines)
	}
	kick <- struct{}{}
	s.await(t, "agent starts", 1)
	stop()
	if s.count("agent starts") != 1 || s.count("waits for a coordinator") != 1 {
		t.Errorf("%q", s.lines)
	}
}

func TestAgentThatCannotWorkWithWhatItIsToldIsLeftAloneUntilThereIsNews(t *testing.T) {
	kick := make(chan struct{}, 1)
	s, _ := supervised(t, "unconfigured", time.Second, kick, time.Nanosecond)
	s.await(t, "in=15m", 1)
	if s.count("agent starts") != 1 || s.count("level=ERROR") != 0 {
		t.Errorf("%q", s.lines)
	}
	kick <- struct{}{}
	s.await(t, "agent starts", 2)
}

func TestOnlyADeviceWithNobodyToComeToWaits(t *testing.T) {
	for name, c := range map[string]struct {
		file, commandLine, found string
		member, want             bool
	}{
		"nothing":              {want: true},
		"a file without one":   {file: "token = \"deimos_x\"\n", want: true},
		"a file":               {file: "coordinator = \"https://h:1\"\n"},
		"a file that is wrong": {file: "coordinator = \n"},
		"the command line":     {commandLine: "deimos.coordinator=https://h:1"},
		"the network":          {found: "https://h:1"},
		"a member":             {member: true},
	} {
		m := &machine{root: t.TempDir(), log: slog.New(slog.DiscardHandler), params: parseCommandLine(c.commandLine), found: c.found}
		files := map[string]string{}
		if c.file != "" {
			files["efi/deimos.toml"] = c.file
		}
		if c.member {
			files["data/deimos/identity/membership.json"] = "{}"
		}
		for file, text := range files {
			if err := errors.Join(os.MkdirAll(filepath.Dir(m.path(file)), 0o700), os.WriteFile(m.path(file), []byte(text), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		m.configure()
		if got := m.waits(); got != c.want {
			t.Errorf("%s: it waits: %v", name, got)
		}
	}
}

func TestAgentIsAskedToStopAndKilledIfItDoesNot(t *testing.T) {
	s, stop := supervised(t, "good", time.Minute, nil, time.Second)
	s.await(t, "agent starts", 1)
	stop()
	if s.count("agent stops") != 1 || s.count("killed") != 0 {
		t.Errorf("one that stops: %q", s.lines)
	}
	s, stop = supervised(t, "hang", 50*time.Millisecond, nil, time.Second)
	s.await(t, "agent hangs", 1)
	stop()
	if s.count("did not stop in time") != 1 {
		t.Errorf("one that hangs: %q", s.lines)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	testenv.Root(t, "namespaces, loop devices and DHCP need root")
}

// diskOf attaches an image as a loop device.
func diskOf(t *testing.T, bytes int64) (device, image string) {
	t.Helper()
	needRoot(t)
	image = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, bytes); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-fP", "--show", image).CombinedOutput()
	if err != nil {
		testenv.Cannot(t, "no loop device: %v: %s", err, out)
	}
	device = strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", device).Run() })
	return device, image
}

func dataOn(t *testing.T, device, esp string) (*dataDisk, *said) {
	t.Helper()
	s := newSaid()
	p := &processes{}
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { p.reap(ctx, chld); close(done) }()
	t.Cleanup(func() { cancel(); <-done; signal.Stop(chld) })
	return &dataDisk{
		processes: p, log: slog.New(slog.NewTextHandler(lineWriter(s.say), nil)), esp: esp, node: ensureNode,
		tool: func(name string) string { return "/usr/sbin/" + name },
		disks: func() []blockDevice {
			d, err := lookAt(device)
			if err != nil {
				return nil
			}
			return []blockDevice{d}
		},
	}, s
}

func TestDataPartitionIsMadeKeptAndGrown(t *testing.T) {
	device, image := diskOf(t, 600<<20)
	esp := t.TempDir()
	d, s := dataOn(t, device, esp)
	p, err := d.prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	made, err := readExt4(p.path)
	if err != nil || made < 590<<20 {
		t.Fatalf("a file system of %d bytes: %v; %q", made, err, s.lines)
	}
	if err := d.remember(p); err != nil {
		t.Fatal(err)
	}
	uuid := superblock(t, p.path)[0x68:0x78]

	if err := os.Truncate(image, 900<<20); err != nil {
		t.Fatal(err)
	}
	// Not by a program: the reaper, which waits for every child, may take its end.
	loop, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_CAPACITY, 0), loop.Close())
	if err != nil {
		t.Fatal(err)
	}
	p, err = d.prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	grown, err := readExt4(p.path)
	if err != nil || grown < 890<<20 {
		t.Errorf("grown to %d bytes: %v; %q", grown, err, s.lines)
	}
	if !bytes.Equal(superblock(t, p.path)[0x68:0x78], uuid) {
		t.Error("it was formatted again")
	}

	// What was used once is repaired from a backup superblock, and never formatted.
	wipe(t, p.path, 2048)
	if p, err = d.prepare(t.Context()); err != nil {
		t.Errorf("a damaged superblock: %v", err)
	} else if !bytes.Equal(superblock(t, p.path)[0x68:0x78], uuid) {
		t.Error("a damaged file system was formatted")
	}
	wipe(t, p.path, 890<<20)
	if _, err := d.prepare(t.Context()); err == nil {
		t.Error("a partition that held data was formatted when nothing was left of it")
	}

	if err := os.WriteFile(filepath.Join(esp, dataNote), []byte("01020304-0000-4000-8000-000000000000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.prepare(t.Context()); err == nil {
		t.Error("another partition was taken for the one that is missing")
	}
}

func superblock(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	raw := make([]byte, 1024)
	if _, err := f.ReadAt(raw, 1024); err != nil {
		t.Fatal(err)
	}
	return raw
}

func wipe(t *testing.T, path string, n int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zero := make([]byte, 1<<20)
	for at := int64(0); at < n; at += int64(len(zero)) {
		if _, err := f.WriteAt(zero[:min(n-at, int64(len(zero)))], at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func TestDiskOfSomebodysIsLeftAlone(t *testing.T) {
	for name, at := range map[string]int64{"a byte at its front": 1 << 20, "a byte at its end": 600<<20 - 4096} {
		image := filepath.Join(t.TempDir(), "disk")
		f, err := os.Create(image)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(600 << 20); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{1}, at); err != nil {
			t.Fatal(err)
		}
		f.Close()
		d, _ := dataOn(t, image, "")
		if _, err := d.prepare(t.Context()); err == nil {
			t.Errorf("a disk with %s was taken", name)
		}
		if disk, err := lookAt(image); err != nil || disk.parted {
			t.Errorf("a disk with %s was written to: %v", name, err)
		}
	}
}

// beMachine is process 1 of namespaces of its own; the test's folder is its root.
func beMachine() {
	must := func(err error) {
		if err != nil {
			fmt.Println("test machine:", err)
			os.Exit(1)
		}
	}
	root := os.Getenv("DEIMOS_INIT_ROOT")
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	for _, dir := range []string{"/usr", "/lib", "/lib64"} { // what a test's binary is linked with
		if _, err := os.Stat(dir); err == nil {
			must(os.MkdirAll(root+dir, 0o755))
			must(unix.Mount(dir, root+dir, "", unix.MS_BIND|unix.MS_REC, ""))
		}
	}
	must(unix.Chroot(root))
	must(os.Chdir("/"))
	must(unix.Mount("proc", "/proc", "proc", 0, ""))
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGUSR1, unix.SIGUSR2)
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	m := &machine{
		root: "/", console: os.Stdout, signals: signals, sigchld: chld,
		diskNames: func() []string { return nil }, node: ensureNode, mount: mountESP,
		wired: func(name string) bool { return name == "deimos0" },
		browse: func(ctx context.Context, add func(dnssd.BrowseEntry)) error {
			add(dnssd.BrowseEntry{Name: "a", IPs: []net.IP{net.IPv4(10, 77, 0, 1)}, Port: 8443})
			<-ctx.Done()
			return ctx.Err()
		},
		query:    func(string) (*ntp.Response, error) { return nil, os.ErrDeadlineExceeded },
		setClock: func(time.Time) error { return nil },
		down:     unix.Reboot, settle: time.Millisecond,
		agent: []string{"/bin/agent", "agent", "orphans"},
	}
	m.run(nil)
	os.Exit(9) // reboot ends process 1 of a namespace
}

// TestMachineComesUpAndGoesDown boots init as process 1 of a machine of
// namespaces, with a DHCP server at the other end of its cable: no disk, no
// owner's file. The agent runs from memory, learns its coordinator from the
// network, leaves orphans that are reaped; then the machine is switched off.
func TestMachineComesUpAndGoesDown(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	for _, dir := range []string{"proc", "bin", "etc", "run", "data", "dev", "efi"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if raw, err := os.ReadFile(os.Args[0]); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(filepath.Join(root, "bin/agent"), raw, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "dev/null"), nil, 0o666); err != nil {
		t.Fatal(err)
	}
	console, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), role+"=init", "DEIMOS_INIT_ROOT="+root)
	cmd.Stdout, cmd.Stderr = theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is the thread's
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		testenv.Cannot(t, "no namespaces here: %v", err)
	}
	theirs.Close()
	defer func() { _ = cmd.Process.Kill() }()
	s := newSaid()
	go eachLine(console, s.say)
	plug(t, cmd.Process.Pid)

	s.await(t, "address=10.77.0.2/24", 1)
	s.await(t, "RUNS FROM MEMORY", 1)
	s.await(t, "coordinator https://10.77.0.1:8443", 1)
	// An orphan that has just ended may not be reaped yet.
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		zombies := childrenOf(t, cmd.Process.Pid, "Z")
		if zombies == 0 {
			break
		}
		if time.Now().After(end) {
			t.Errorf("%d orphans were not reaped", zombies)
			break
		}
	}
	if raw, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(cmd.Process.Pid), "root/etc/resolv.conf")); err != nil || !strings.Contains(string(raw), "nameserver 10.77.0.1") {
		t.Errorf("resolv.conf: %q, %v", raw, err)
	}
	if err := cmd.Process.Signal(unix.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != unix.SIGINT { // reboot(2): of a namespace, POWER_OFF is SIGINT
		t.Errorf("the machine went down with %v; it said %q", cmd.ProcessState, s.lines)
	}
	s.await(t, "goodbye", 1)
	if s.count("agent stops") != s.count("agent has made orphans") {
		t.Errorf("the agent was not asked to stop: %q", s.lines)
	}
}

// plug connects the machine to a DHCP server on our end of a cable.
func plug(t *testing.T, pid int) {
	t.Helper()
	name := fmt.Sprintf("dei%d", pid%100000)
	cable := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "deimos0", PeerNamespace: netlink.NsPid(pid)}
	if err := netlink.LinkAdd(cable); err != nil {
		testenv.Cannot(t, "no virtual cable here: %v", err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(cable) })
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 77, 0, 1), Mask: net.CIDRMask(24, 32)}}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	server, err := server4.NewServer(name, &net.UDPAddr{IP: net.IPv4zero, Port: dhcpv4.ServerPort}, func(c net.PacketConn, peer net.Addr, q *dhcpv4.DHCPv4) {
		kind := dhcpv4.MessageTypeOffer
		if q.MessageType() == dhcpv4.MessageTypeRequest {
			kind = dhcpv4.MessageTypeAck
		}
		a, err := dhcpv4.NewReplyFromRequest(q, dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IPv4(10, 77, 0, 2)),
			dhcpv4.WithServerIP(net.IPv4(10, 77, 0, 1)), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 1))), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
			dhcpv4.WithRouter(net.IPv4(10, 77, 0, 1)), dhcpv4.WithDNS(net.IPv4(10, 77, 0, 1)), dhcpv4.WithLeaseTime(60))
		if err == nil {
			_, _ = c.WriteTo(a.ToBytes(), peer)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve() }()
	t.Cleanup(func() { server.Close() })
}

func childrenOf(t *testing.T, pid int, state string) (n int) {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		after := raw[bytes.LastIndexByte(raw, ')')+1:]
		fields := strings.Fields(string(after))
		if len(fields) > 1 && fields[1] == fmt.Sprint(pid) && fields[0] == state {
			n++
		}
	}
	return n
}
