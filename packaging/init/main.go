// Command init is process 1 of a device that runs our image: it makes a machine
// of what the kernel has started, and runs the agent on it. There is no other
// program, no shell and no login.
//
// # In this order
//
//	 1  mounts          proc, sys, dev, run, tmp, cgroup2
//	 2  modules         /lib/modules.list, a file name and its parameters a line: what
//	                    the disks need; then efivarfs is mounted. Those of
//	                    /lib/modules.later are loaded beside 3 to 6
//	 3  tables          primary and backup of our disks' partition tables made alike
//	 4  ESP             checked and repaired (package fat), mounted at /efi: the one
//	                    we were started from, or "deimos-esp"
//	 5  data            "deimos-data" found or made, checked, grown, mounted at /data
//	 6  log             the ring in /data/log
//	 7  configuration   /run/deimos/deimos.toml
//	 8  clock           not before the release and the time that the agent knew for sure
//	 9  network         DHCP on every wired link, in the background, for ever;
//	                    NTP and DNS-SD when there is an address
//	10  agent           started now, whatever has become of the rest; but without a
//	                    coordinator or membership, when one is found
//
// # What always holds
//
//   - No step ends process 1: each has a limit, and what fails or hangs is said
//     and left behind. Without a network the agent runs and waits. Where no data
//     partition ever was and none can be made, it runs on /data in memory, and the
//     console says so loudly; a device that has one, or may, waits for it.
//   - A disk is formatted only if it was blank when it was partitioned here, or is
//     the rest of the disk that the image was written to. A partition that was ever
//     mounted is repaired, never formatted; see [dataNote].
//   - The agent is started again whenever it ends; see [supervisor].
//   - All that ends is reaped by one goroutine; see [processes].
//   - Neither the console nor the disk can hold up the agent; see [journal].
//
// # Configuration
//
// The first of these that is there becomes the agent's --config:
//
//	/efi/deimos.toml                                               the owner's
//	/sys/firmware/qemu_fw_cfg/by_name/opt/deimos/config/raw        QEMU's -fw_cfg name=opt/deimos/config,file=…
//
// deimos.coordinator=, deimos.token= and deimos.ntp= on the kernel's command line,
// which only whoever makes an image or starts a test machine can change, stand above both (deimos.confirm=60s shortens the trial of new firmware). With no coordinator in any, and no membership in /data, one
// is looked for on the network; see [discovery]. Where the file says nothing of a
// watchdog, the agent gets the machine's.
//
// # Signals
//
// As busybox's init has them: SIGTERM and SIGINT (Ctrl-Alt-Del) start the machine
// anew, SIGUSR1 and SIGUSR2 switch it off, and so do SIGPWR and the power button. The
// agent gets SIGTERM and the time that it asks for, then everything else is
// ended, the log closed and the disks unmounted. All of it has a limit, after
// which the machine goes down as it is. An agent that wants the machine started
// anew, with new firmware, ends with 79; see [supervisor].
//
// # What the agent finds
//
// DEIMOS_ESP=/efi in its environment when the ESP is mounted (read-write), state
// in /data/deimos, /etc/resolv.conf from DHCP.
//
// Not here yet: wireless links, DHCPv6 and name servers by router advertisement,
// addresses set by hand.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Set by the build.
var (
	version  = "0.0.0-dev"
	released = "" // the day, 2006-01-02
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "deimos init", version+": this is process 1 of a device's image; it does nothing else")
		os.Exit(64)
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGUSR1, unix.SIGUSR2)
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	_, _ = unix.Setsid()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) // Ctrl-Alt-Del is a SIGINT to us
	_ = os.Setenv("PATH", "/sbin:/bin")

	mounted := mountAll(kernelMounts)
	m := &machine{
		root: "/", console: openConsole("/dev/console"), signals: signals, sigchld: sigchld,
		diskNames: func() []string { return diskNames("/sys") }, readDisk: func(name string) (blockDevice, error) { return readDisk("/sys", "/dev", name) }, node: ensureNode, mount: mountESP,
		wired: hasWire("/sys"), browse: browseLAN, query: askNTP, setClock: setClock, down: unix.Reboot,
		agent: []string{"/bin/deimos-agent"}, released: releaseDay(released), settle: diskSettle, lookLimit: lookLimit, hangLimit: hangLimit,
	}
	m.run(mounted)
}

func releaseDay(day string) time.Time {
	t, _ := time.Parse(time.DateOnly, day)
	return t
}

func (m *machine) path(parts ...string) string {
	return filepath.Join(append([]string{m.root}, parts...)...)
}

// tool is a program of e2fsprogs, in the image or, in tests, in the host's folder.
func (m *machine) tool(name string) string {
	for _, dir := range strings.Split("/sbin:/usr/sbin", ":") {
		if p := m.path(dir, name); exists(p) {
			return p
		}
	}
	return m.path("/sbin", name)
}
