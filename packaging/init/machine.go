package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/beevik/ntp"
	"github.com/brutella/dnssd"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
	"github.com/deimos-edge/deimos/packaging/init/fat"
	"github.com/deimos-edge/deimos/packaging/init/logring"
)

// Limits of the steps. A check of a large file system that was cut off is the slowest;
// without its journal it reads every inode. It may take hours: its limit is for the time
// in which it neither reads nor writes.
const (
	modulesLimit = 60 * time.Second
	diskSettle   = 8 * time.Second
	lookLimit    = 10 * time.Second
	hangLimit    = 5 * time.Minute // the kernel's own: it gives a command up after 30 s, and tries it 6 times
	dataLimit    = 20 * time.Minute
	shortLimit   = 15 * time.Second
	stopWithin   = slot.StopWithin + 5*time.Second
	killWait     = 3 * time.Second
	downLimit    = stopWithin + 45*time.Second // then the machine goes down as it is
	maxConfig    = 1 << 20                     // bytes, as the agent has it

	// The agent's.
	membershipFile = "data/deimos/identity/membership.json"
	statusFile     = "data/deimos/status.json"
)

// machine is what init works on; tests replace its parts.
type machine struct {
	root             string
	console          io.Writer
	signals, sigchld <-chan os.Signal
	diskNames        func() []string
	readDisk         func(name string) (blockDevice, error)
	node             func(partition) error
	mount            func(p partition, dir string, flags uintptr) error // an ESP
	wired            func(string) bool
	browse           func(context.Context, func(dnssd.BrowseEntry)) error
	query            func(string) (*ntp.Response, error)
	setClock         func(time.Time) error
	down             func(how int) error
	agent            []string
	released         time.Time
	settle           time.Duration // how long a disk may take to show up
	lookLimit        time.Duration // and then to answer, before it is left out
	hangLimit        time.Duration // and how long the machine waits for one that it may need, before it is started anew

	journal   *journal
	log       *slog.Logger
	processes processes
	params    params
	esp       string // where it is mounted; "" if it is not. Once the agent runs, mu guards it
	data      string // the partition that is mounted there; "" if none
	inMemory  bool   // /data is lost with the power
	ring      *logring.Ring
	hardware  chan struct{} // closed when what the disks do not need is there, too
	again     chan string   // why the machine is to be started anew
	trial     *trial
	dog       *startDog

	mu       sync.Mutex // guards found
	found    string     // coordinator, by DNS-SD
	declared string     // coordinator of the configuration
	unsound  bool       // the configuration cannot be read
	alone    bool       // what the owner allows is not known: nobody is looked for
}

// run does not return, but in tests.
func (m *machine) run(mounted error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	m.journal = newJournal(m.console)
	m.log = m.journal.logger()
	m.again = make(chan string, 1)
	writers := m.background(ctx)
	m.log.Info("Deimos starts", "firmware", version, "release", m.released.Format(time.DateOnly))
	if mounted != nil {
		m.log.Error("not everything could be mounted", "error", mounted)
	}
	_ = unix.Sethostname([]byte("deimos"))
	m.params = parseCommandLine(readWord(m.path("proc/cmdline")))
	m.trial = m.newTrial() // whose time begins now: a start that hangs is on trial, too
	go guard(m.log, "trial", func() { m.trial.watch(ctx) })
	m.dog = newStartDog(m.path(boardsWatchdog), m.log)
	go guard(m.log, "watchdog", func() { m.dog.run(context.WithoutCancel(ctx)) }) // the machine goes down with it
	_ = step(m.log, "loading modules", modulesLimit, func(context.Context) error {
		return loadModules(m.path("lib/modules.list"), m.path("lib/modules"), m.log)
	})
	if exists(m.path("sys/firmware/efi")) {
		_ = step(m.log, "mounting what the boot loader says", shortLimit, func(context.Context) error { return mountAll([]mount{variablesMount}) })
	}
	press := make(chan struct{}, 1)
	m.hardware = make(chan struct{})
	go m.loadRest(press)

	// A machine that is told to stop while it checks a disk stops: the rest of
	// the start runs beside the wait for that.
	stopAgent, agentStops := context.WithCancel(ctx)
	agentDone := make(chan struct{})
	go func() {
		defer close(agentDone)
		m.vital(stopAgent, "start", failedPause, func() { m.start(stopAgent, writers) })
	}()
	how := m.awaitStop(press)
	m.stop(how, agentStops, agentDone, func() { cancel(); writers.wait() })
}

// loadRest loads what the disks do not need, and then watches the power button.
func (m *machine) loadRest(press chan<- struct{}) {
	defer close(m.hardware)
	_ = step(m.log, "loading further modules", modulesLimit, func(context.Context) error {
		return loadModules(m.path("lib/modules.later"), m.path("lib/modules"), m.log)
	})
	guard(m.log, "power button", func() {
		watchPower(m.path("dev"), func() { press <- struct{}{} }, m.log)
	})
}

// writersOf is the goroutines that write the log.
type writersOf struct {
	life          context.Context // the machine's: they also write what is said while it stops
	console, ring sync.WaitGroup
}

func (w *writersOf) wait() {
	done := make(chan struct{})
	go func() { w.console.Wait(); w.ring.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(2 * time.Second): // a console that nobody reads
	}
}

func (m *machine) background(ctx context.Context) *writersOf {
	w := &writersOf{life: ctx}
	w.console.Go(func() { m.journal.console.drain(ctx) })
	go guard(m.log, "kernel's log", func() { m.followKernel(ctx) })
	go m.vital(ctx, "reaper", failedPause, func() { m.processes.reap(context.WithoutCancel(ctx), m.sigchld) })
	return w
}

func (m *machine) start(ctx context.Context, w *writersOf) {
	data := m.prepareDisks(ctx)
	if ctx.Err() != nil {
		return
	}
	m.dog.expect(modulesLimit)
	m.trial.begin()
	if m.data != "" {
		faults := m.path("sys/fs/ext4", filepath.Base(m.data), "errors_count")
		go guard(m.log, "data partition", func() { watchFaults(ctx, faults, faultsLook, faultsLeast, m.startAnew, m.log) })
	}
	if m.openRing() == nil {
		w.ring.Go(func() { m.journal.ring.drain(w.life); m.ring.Close() })
	}
	select {
	case <-m.hardware:
	case <-ctx.Done():
		return
	}
	m.configure()
	c := &clock{floor: newest(m.released, readStatus(m.path(statusFile)).TimeAtLeast), now: time.Now, set: m.setClock, query: m.query, log: m.log}
	_ = step(m.log, "setting the clock", shortLimit, func(context.Context) error { return c.raise() })
	kick := make(chan struct{}, 1)
	if m.esp == "" {
		go guard(m.log, "EFI system partition", func() { m.mountLateESP(ctx, data, kick) })
	}
	m.goOnline(ctx, c, kick)
	m.supervise(ctx, kick)
}

// prepareDisks mounts the ESP and the data partition. A device that has a data
// partition, or may have one, does not run without it: with a key in memory it
// would be another device, which could even confirm new firmware. It waits, and
// looks again. A disk that does not answer may be the one that is missing: where
// something is, the machine is started anew for it, and else goes on.
func (m *machine) prepareDisks(ctx context.Context) *dataDisk {
	looks := &diskLooks{names: m.diskNames, look: m.readDisk, limit: m.lookLimit, log: m.log, loud: m.sayLoudly}
	data := &dataDisk{disks: looks.list, processes: &m.processes, log: m.log, settle: m.settle, node: m.node, tool: m.tool, esp: m.esp,
		late: func() bool { return disksComeLate(m.path("sys")) }}
	booted := bootedFrom(m.path("sys/firmware/efi/efivars"))
	anew := func(why string) *dataDisk {
		m.startAnew(why)
		<-ctx.Done()
		return data
	}
	const silent = "a disk that the start needs does not answer"
	seen := false // an ESP that could not be mounted
	for pause := firstLook; ; pause = min(2*pause, lastLook) {
		m.dog.expect(m.settle + dataLimit)
		var before []string // what shows up while this try fails is news
		if m.atDisks(func() { before = m.oursOn(data, booted) }) != nil {
			return anew(silent)
		}
		if m.esp == "" {
			data.lost = seen
			_ = step(m.log, "mounting the ESP", m.settle+shortLimit, func(ctx context.Context) error { return m.mountESP(ctx, data, booted) })
			seen = data.lost
			data.lost = m.esp == "" && (booted != "" || seen || looks.someHang())
			m.openTrial()
		}
		err := stepWhile(m.log, "preparing the data partition", dataLimit, func(ctx context.Context, moved func()) error {
			data.moved = func() { moved(); m.dog.expect(dataLimit) }
			return m.mountData(ctx, data)
		})
		if err == nil || ctx.Err() != nil {
			return data
		}
		if errors.Is(err, errLimit) { // what hangs may still be at the disk
			return anew("the data partition could not be made ready in time")
		}
		had := true
		if m.atDisks(func() { had = data.hadData() }) != nil {
			return anew(silent)
		}
		if !had {
			m.useMemory()
			return data
		}
		if pause == firstLook {
			m.sayLoudly(waitsForData)
		}
		wait, hung := pause, looks.someHang()
		if hung {
			wait = m.hangLimit
		}
		m.dog.expect(wait)
		news, err := m.awaitDisks(ctx, data, booted, before, wait, func() bool { return hung && !looks.someHang() })
		switch {
		case ctx.Err() != nil:
			return data
		case err != nil || hung && !news:
			return anew(silent)
		}
	}
}

// atDisks does what asks disks that are in use, or that the start needs: they may hang.
func (m *machine) atDisks(do func()) error {
	return step(m.log, "looking at the disks", m.settle+shortLimit, func(context.Context) error { do(); return nil })
}

// How long a device waits before it tries again the disks that it has, and how often
// it looks for one that it has not.
const (
	firstLook = time.Minute
	lastLook  = time.Hour
	diskLook  = 2 * time.Second
)

// awaitDisks tells whether there is news before the pause is over: a partition of ours
// that was not there before, or what answers says.
func (m *machine) awaitDisks(ctx context.Context, data *dataDisk, booted string, before []string, pause time.Duration, answers func() bool) (news bool, err error) {
	for until := time.Now().Add(pause); time.Now().Before(until); {
		var now []string
		if err := m.atDisks(func() { now = m.oursOn(data, booted) }); err != nil {
			return false, err
		}
		if answers() || slices.ContainsFunc(now, func(p string) bool { return !slices.Contains(before, p) }) {
			return true, nil
		}
		if !sleep(ctx, min(pause, diskLook)) {
			return false, nil
		}
		before = now
	}
	return false, nil
}

// oursOn are the partitions that a start needs, as far as they are there.
func (m *machine) oursOn(data *dataDisk, booted string) (ours []string) {
	known, _ := data.note()
	if p, ok := data.find(known); ok {
		ours = append(ours, p.path)
	}
	for _, p := range findESPs(data.disks(), booted) {
		ours = append(ours, p.path)
	}
	return ours
}

func (m *machine) mountData(ctx context.Context, data *dataDisk) error {
	p, err := data.prepare(ctx)
	if err != nil {
		return err
	}
	if ctx.Err() != nil { // too late: something else was decided by now
		return context.Cause(ctx)
	}
	if err := mountData(p, m.path("data")); err != nil {
		return err
	}
	if err := data.remember(p); err != nil {
		m.log.Warn("which partition holds the data could not be noted; if it is ever missing, this device may begin anew", "error", err)
	}
	m.data = p.path
	m.noteESP()
	return nil
}

// noteESP notes on the data partition that there is an ESP.
func (m *machine) noteESP() {
	if m.esp == "" || m.data == "" || exists(m.path(hadESP)) {
		return
	}
	if err := durable.WriteFile(m.path(hadESP), nil, 0o600); err != nil {
		m.log.Warn("that this device has an EFI system partition could not be noted", "error", err)
	}
}

// mountESP waits for the disk that we were started from. A machine that was
// started without one, such as by QEMU's -kernel, has none.
func (m *machine) mountESP(ctx context.Context, data *dataDisk, booted string) error {
	settle := m.settle
	if booted == "" && !data.late() {
		settle = min(settle, promptSettle)
	}
	for until := time.Now().Add(settle); ; {
		disks := data.disks()
		if all := findESPs(disks, booted); len(all) > 0 {
			return m.mountOneOf(ctx, data, disks, all)
		}
		if time.Now().After(until) || !sleep(ctx, 100*time.Millisecond) {
			repairTables(disks, m.log)
			return errors.New("there is no EFI system partition called " + espName + "; the owner's deimos.toml cannot be read, and firmware not be updated")
		}
	}
}

// mountOneOf mounts the ESP, of all that may be it.
func (m *machine) mountOneOf(ctx context.Context, data *dataDisk, disks []blockDevice, all []partition) error {
	repairTables(disks, m.log)
	p, sure := chooseESP(all, m.holdsOurs)
	if !sure {
		m.log.Error("there are disks of several devices in this machine, and which one it was started from cannot be told; remove the others", "taken", p.path)
	}
	data.boot, data.bootOnly, data.lost = p.disk.path, !sure, true // until it is mounted
	if err := m.node(p); err != nil {
		return err
	}
	m.mendESP(p)
	if ctx.Err() != nil { // too late: the agent was told that there is none
		return context.Cause(ctx)
	}
	dir := m.path("efi")
	if err := m.mount(p, dir, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.esp, data.esp = dir, dir
	return nil
}

// mountLateESP mounts an ESP that shows up after the data partition was mounted, or
// can be read only then. The agent is started again with it: else a firmware on trial
// could be neither confirmed nor left. The owner's file on it is read at the next start.
// After trialPatience nobody looks any more. A machine that runs from memory, and may
// have data after all, must not confirm a firmware: it is started anew, after a pause.
func (m *machine) mountLateESP(ctx context.Context, data *dataDisk, kick chan<- struct{}) {
	booted := bootedFrom(m.path("sys/firmware/efi/efivars"))
	tried := ""
	for until := time.Now().Add(trialPatience); sleep(ctx, diskLook) && time.Now().Before(until); {
		disks := data.disks()
		all := findESPs(disks, booted)
		if here := paths(all); here == tried {
			continue
		} else if tried = here; here == "" {
			continue
		}
		if m.inMemory {
			m.log.Error("an EFI system partition has shown up, which may say where this device's data is; the machine is started anew", "in", faultsLeast)
			if sleep(ctx, faultsLeast) {
				m.startAnew("the EFI system partition came late")
			}
			return
		}
		if step(m.log, "mounting the ESP", m.settle+shortLimit, func(ctx context.Context) error { return m.mountOneOf(ctx, data, disks, all) }) != nil {
			continue
		}
		m.log.Warn("the EFI system partition came late: the agent is started again with it, and deimos.toml is read at the next start of the device")
		m.noteESP()
		m.openTrial()
		select {
		case kick <- struct{}{}:
		default: // the supervisor will read what is known by then
		}
		m.trial.beginLate(ctx)
		return
	}
}

func mountESP(p partition, dir string, flags uintptr) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(p.path, dir, "vfat", quiet|unix.MS_NOATIME|flags, "umask=0077,flush,errors=remount-ro"); err != nil {
		return fmt.Errorf("mount %s: %w", p.path, err)
	}
	return nil
}

// chooseESP takes, of several, the one with the firmware that runs.
func chooseESP(all []partition, holdsOurs func(partition) bool) (p partition, sure bool) {
	if len(all) == 1 {
		return all[0], true
	}
	fit := slices.Collect(func(yield func(partition) bool) {
		for _, p := range all {
			if holdsOurs(p) && !yield(p) {
				return
			}
		}
	})
	return append(fit, all...)[0], len(fit) == 1
}

// holdsOurs tells whether the firmware that runs is on an ESP, which it mounts for that.
func (m *machine) holdsOurs(p partition) bool {
	dir := m.path("efi")
	err := m.node(p)
	if err == nil {
		err = m.mount(p, dir, unix.MS_RDONLY)
	}
	if err != nil {
		m.log.Warn("an EFI system partition cannot be read", "partition", p.path, "error", err)
		return false
	}
	defer unmount(dir)
	return holdsRelease(dir, readWord(m.path("etc/deimos-release")))
}

func holdsRelease(esp, release string) bool {
	entries, _ := os.ReadDir(filepath.Join(esp, firmware.Folder))
	return release != "" && slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		rest, ok := strings.CutPrefix(e.Name(), "deimos_"+release)
		return ok && strings.HasSuffix(rest, ".efi") && (rest == ".efi" || rest[0] == '+')
	})
}

// mendESP repairs what a power cut left in the file system. One that cannot be
// repaired is used as it is: it may well hold a firmware that boots.
func (m *machine) mendESP(p partition) {
	f, err := os.OpenFile(p.path, os.O_RDWR, 0)
	if err != nil {
		m.log.Warn("the EFI system partition cannot be checked", "partition", p.path, "error", err)
		return
	}
	defer f.Close()
	r, err := fat.Repair(f)
	switch {
	case err != nil:
		m.log.Warn("the EFI system partition could not be checked", "partition", p.path, "error", err)
	case len(r.Left) > 0:
		m.log.Error("the EFI system partition has faults that are left alone; if updates fail, copy its files away, format it as FAT32, and copy them back", "partition", p.path, "faults", r.Left)
	}
	if len(r.Cut)+len(r.Dropped)+r.Freed+r.Holes > 0 || r.Copies {
		m.log.Warn("the EFI system partition was repaired", "partition", p.path, "cut", r.Cut, "second_names", r.Dropped, "freed_clusters", r.Freed, "holes", r.Holes, "tables_differed", r.Copies)
	}
}

func (m *machine) useMemory() {
	m.inMemory = true
	err := step(m.log, "mounting memory instead of the data partition", shortLimit, func(context.Context) error {
		if err := os.MkdirAll(m.path("data"), 0o700); err != nil {
			return err
		}
		return unix.Mount("tmpfs", m.path("data"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=50%")
	})
	if err != nil {
		return
	}
	m.sayLoudly([]string{
		"THIS DEVICE HAS NO DATA DISK AND RUNS FROM MEMORY.",
		"Its identity and all chunks are lost when it is switched",
		"off. The lines above say why.",
	})
}

var waitsForData = []string{
	"THIS DEVICE WAITS FOR ITS DATA DISK AND DOES NOTHING ELSE.",
	"It goes on by itself when the disk can be used.",
	"The lines above say what is wrong.",
}

func (m *machine) sayLoudly(lines []string) {
	frame := strings.Repeat("*", 68)
	m.journal.say(tellTo + frame)
	for _, line := range lines {
		m.journal.say(tellTo + fmt.Sprintf("***  %-60s***", line))
	}
	m.journal.say(tellTo + frame)
}

func (m *machine) openRing() error {
	return step(m.log, "opening the log", shortLimit, func(context.Context) error {
		limits := ringLimits
		if m.inMemory {
			limits.Size /= 8
		}
		r, err := logring.Open(m.path("data/log"), limits)
		if err != nil {
			return err
		}
		m.ring, m.journal.ring.write = r, r.WriteLine
		return nil
	})
}

// configure writes the agent's configuration file. It is read anew at each start
// of the machine, not of the agent. A file that is there and cannot be read is no
// missing file: what it said when it could be read still holds, and where that is
// not known, the fleet gets no more than the disk.
func (m *machine) configure() {
	_ = step(m.log, "reading the configuration", shortLimit, func(context.Context) error {
		raw, source, err := m.readConfig()
		last, lastErr := os.ReadFile(m.path(lastConfig))
		switch {
		case err == nil:
		case lastErr == nil:
			raw, source = last, m.path(lastConfig)
		default:
			raw, source, m.alone = []byte(noConfig), "", true
			err = fmt.Errorf("%w; jobs are off, and no coordinator is looked for", err)
		}
		if source != "" {
			m.log.Info("the configuration is read", "file", source)
		}
		watchdog := ""
		if exists(m.path(boardsWatchdog)) {
			watchdog = boardsWatchdog
		}
		config, coordinator, sound := prepareConfig(raw, watchdog)
		if named := namedWatchdog(config, watchdog); named != "" {
			m.dog.use(m.path(named))
		} else {
			m.dog.use("")
		}
		m.declared, m.unsound = coordinator, !sound
		if m.params.coordinator != "" {
			m.declared = m.params.coordinator
		}
		if sound && err == nil && m.data != "" && (lastErr != nil || !bytes.Equal(raw, last)) {
			if err := durable.WriteFile(m.path(lastConfig), raw, 0o600); err != nil {
				m.log.Warn("the configuration is not kept for a start that cannot read it", "error", err)
			}
		}
		if mkdir := os.MkdirAll(m.path("run/deimos"), 0o700); mkdir != nil {
			return errors.Join(err, mkdir)
		}
		return errors.Join(err, os.WriteFile(m.path("run/deimos/deimos.toml"), config, 0o600))
	})
}

const (
	boardsWatchdog = "/dev/watchdog0"

	lastConfig = "data/deimos.toml.last" // what was read last, an empty file if there was none
	hadESP     = "data/deimos-esp.seen"  // there once was an ESP with the data: without it, no owner's file is not known to be none
	noConfig   = "[jobs]\nenabled = false\n"
)

func (m *machine) readConfig() (raw []byte, source string, err error) {
	if m.esp == "" && (bootedFrom(m.path("sys/firmware/efi/efivars")) != "" || exists(m.path(hadESP))) {
		return nil, "", errors.New("the EFI system partition is not mounted, and the owner's deimos.toml cannot be read")
	}
	for _, path := range []string{m.path("efi/deimos.toml"), m.path("sys/firmware/qemu_fw_cfg/by_name/opt/deimos/config/raw")} {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", err
		}
		defer f.Close()
		raw, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
		if err == nil && len(raw) > maxConfig {
			err = fmt.Errorf("%s has more than %d bytes; it is left out", path, maxConfig)
		}
		if err != nil {
			return nil, "", err
		}
		return raw, path, nil
	}
	return nil, "", nil
}

// goOnline begins what needs no end before the machine's: links, clock, coordinator.
func (m *machine) goOnline(ctx context.Context, c *clock, kick chan<- struct{}) {
	n := newNetwork(m.wired, m.path("etc/resolv.conf"), m.log)
	go guard(m.log, "network", func() { n.run(ctx) })
	go guard(m.log, "clock", func() {
		if len(m.params.ntp) == 1 && m.params.ntp[0] == "off" || !awaitAddress(ctx, n) {
			return
		}
		c.follow(ctx, func() []string { return firstOf(m.params.ntp, n.ntpServers(), publicNTP) })
	})
	if m.declared != "" || m.alone {
		return // its owner's word is final
	}
	var offline time.Time
	d := &discovery{browse: m.browse, proves: provesFleet, log: m.log, need: func() need { return m.seeks(time.Now(), &offline) }, found: func(address string) {
		m.mu.Lock()
		m.found = address
		m.mu.Unlock()
		select {
		case kick <- struct{}{}:
		default: // the supervisor will read what is known by then
		}
	}}
	go guard(m.log, "discovery", func() {
		if awaitAddress(ctx, n) {
			d.run(ctx)
		}
	})
}

// belongs tells whether this device knows where to go, by its owner's word or as
// a member.
func (m *machine) belongs() bool {
	return m.declared != "" || exists(m.path(membershipFile))
}

// waits tells whether the agent has nobody to come to, and nothing to tell: what
// is wrong with the owner's file is for it to say.
func (m *machine) waits() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.found == "" && !m.unsound && !m.alone && !m.belongs()
}

// awaitAddress also ends after a while: a network may have IPv6 only.
func awaitAddress(ctx context.Context, n *network) bool {
	select {
	case <-ctx.Done():
		return false
	case <-n.first:
	case <-time.After(20 * time.Second):
	}
	return true
}

func firstOf(lists ...[]string) []string {
	for _, l := range lists {
		if len(l) > 0 {
			return l
		}
	}
	return nil
}

func (m *machine) supervise(ctx context.Context, kick <-chan struct{}) {
	s := &supervisor{
		processes: &m.processes, command: m.command, say: m.journal.say, log: m.log, kick: kick,
		dog: m.dog, waits: m.waits, stopWithin: stopWithin, first: firstPause,
		reboot: func() { m.startAnew("new firmware is installed, and waits for its trial") },
		crashed: func() {
			if m.ring != nil {
				_ = m.ring.Sync() // somebody will ask what it said
			}
		},
	}
	s.ended = m.trial.ended
	m.trial.ask(m.answers)
	s.run(ctx)
}

// command is how the agent is started, with what is known now. The token goes by
// the environment, which other users cannot read.
func (m *machine) command() (argv, env []string) {
	argv = append(append([]string(nil), m.agent...), "run", "--state", m.path("data/deimos"))
	if config := m.path("run/deimos/deimos.toml"); exists(config) {
		argv = append(argv, "--config", config)
	}
	env = append(env, toolEnv...)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.esp != "" {
		env = append(env, firmware.Env+"="+m.esp)
	}
	if m.trial != nil {
		env = append(env, slot.EnvConfirmWithin+"="+m.trial.within.String())
	}
	switch {
	case m.params.coordinator != "":
		env = append(env, "DEIMOS_COORDINATOR="+m.params.coordinator)
	case m.declared == "" && m.found != "":
		env = append(env, "DEIMOS_COORDINATOR="+m.found)
	}
	if m.params.token != "" {
		env = append(env, "DEIMOS_TOKEN="+m.params.token)
	}
	return argv, env
}

// awaitStop returns how the machine is to go down.
func (m *machine) awaitStop(press <-chan struct{}) (how int) {
	select {
	case <-press:
		m.log.Info("the power button was pressed")
		return unix.LINUX_REBOOT_CMD_POWER_OFF
	case why := <-m.again:
		m.log.Info("the machine is started anew", "why", why)
		return unix.LINUX_REBOOT_CMD_RESTART
	case s := <-m.signals:
		switch s {
		case unix.SIGPWR, unix.SIGUSR1, unix.SIGUSR2:
			return unix.LINUX_REBOOT_CMD_POWER_OFF
		}
		return unix.LINUX_REBOOT_CMD_RESTART
	}
}

// stop takes the machine down.
func (m *machine) stop(how int, agentStops func(), agentDone <-chan struct{}, closeLog func()) {
	m.log.Info("the machine stops")
	m.dog.expect(downLimit)
	goDown := func() {
		m.dog.off()
		_ = m.down(how)
	}
	last := time.AfterFunc(downLimit, goDown)
	defer last.Stop()
	agentStops()
	select {
	case <-agentDone:
	case <-time.After(stopWithin + 15*time.Second):
	}
	killAll(context.Background(), os.Getpid(), m.path("proc"))
	m.log.Info("goodbye")
	closeLog()
	for _, dir := range []string{"data", "efi"} {
		unmount(m.path(dir))
	}
	unix.Sync()
	goDown()
}

// unmount makes a file system that is still in use read-only, which is as good.
func unmount(dir string) {
	for range 10 {
		if err := unix.Unmount(dir, 0); !errors.Is(err, unix.EBUSY) {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	_ = unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
}
