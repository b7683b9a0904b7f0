package qemu

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/test/testbed"
)

const (
	insideLAN = "DEIMOS_QEMU_LAN" // set in the environment: we are on the network of our own
	tap       = "deimos0"         // the network: QEMU at one end, this host at the other
)

// Of the network for documentation (RFC 5737), which nobody has at home.
var (
	ourAddress    = net.IPv4(192, 0, 2, 1)
	deviceAddress = net.IPv4(192, 0, 2, 77)
	lanMask       = net.CIDRMask(24, 32)
)

// TestDeviceFindsItsCoordinatorByItself has a device without any configuration on
// a network with DHCP and two coordinators that announce themselves: it takes
// neither. When one has gone it waits with the other, and shows a code; once claimed
// it belongs there, whoever else announces himself.
func TestDeviceFindsItsCoordinatorByItself(t *testing.T) {
	if os.Getenv(insideLAN) == "" {
		onNetworkOfOurOwn(t)
		return
	}
	layNetwork(t)
	attic, cellar := newLANFleet(t, "attic"), newLANFleet(t, "cellar")
	d := newDevice(attic)
	d.options.Net = "tap,ifname=" + tap + ",script=no,downscript=no"

	d.powerOn()
	d.await("there are coordinators of several fleets on this network")
	for _, f := range []*testbed.Fleet{attic, cellar} {
		if waiting, err := f.Client.Pending(f.Ctx); err != nil || len(waiting) > 0 {
			t.Errorf("of two coordinators, the device took one: %v %v", waiting, err)
		}
	}
	cellar.Stopped(cellar.Serve, 0)
	d.await("found a coordinator on this network")
	code := claimCode.FindStringSubmatch(d.await("deimos device claim"))
	if code == nil {
		t.Fatal("the console shows no claim code")
	}
	attic.OK(nil, "device", "claim", code[1])
	d.awaitOnline()

	cellar.StartServe()
	d.cutPower()
	d.powerOn()
	d.awaitOnline()
	if said := d.machine.Said(); strings.Contains(said, "coordinators of several fleets") || strings.Contains(said, "found a coordinator") {
		t.Error("a device that has joined still looks for a coordinator")
	}
}

var claimCode = regexp.MustCompile(`deimos device claim ([a-z0-9-]+)`)

// newLANFleet is a coordinator that the whole network may call, and which announces
// itself.
func newLANFleet(t *testing.T, name string) *testbed.Fleet {
	t.Helper()
	f := testbed.NewFleet(t, testLimit)
	f.Patience = bootLimit
	for _, listen := range []*string{&f.HTTPS, &f.MQTT} {
		_, port, _ := strings.Cut(*listen, ":")
		*listen = ":" + port
	}
	f.Flags = []string{"--announce", name}
	run(f)
	return f
}

// onNetworkOfOurOwn runs this test again, in a network namespace. Without root,
// the namespace has a user namespace around it.
func onNetworkOfOurOwn(t *testing.T) {
	t.Helper()
	self, err := filepath.Abs(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout="+(testLimit+time.Minute).String())
	cmd.Env = append(os.Environ(), insideLAN+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	runtime.LockOSThread() // Pdeathsig is the thread's
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		testenv.Cannot(t, "there are no network namespaces here: %v", err)
	}
	err = cmd.Wait()
	t.Log(out.String())
	switch {
	case err != nil:
		t.Fatal(err)
	case strings.Contains(out.String(), "--- SKIP"):
		t.Skip("as the above says")
	}
}

// layNetwork makes the network: this host's end of it, with DHCP.
func layNetwork(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: tap}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(link); err != nil {
		testenv.Cannot(t, "there is no tap device here: %v", err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: ourAddress, Mask: lanMask}}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	server, err := server4.NewServer(tap, &net.UDPAddr{IP: net.IPv4zero, Port: dhcpv4.ServerPort}, lease)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve() }()
	t.Cleanup(func() { server.Close(); <-served })
}

// lease answers whoever asks for an address.
func lease(c net.PacketConn, peer net.Addr, q *dhcpv4.DHCPv4) {
	kind := dhcpv4.MessageTypeOffer
	if q.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
	}
	a, err := dhcpv4.NewReplyFromRequest(q, dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(deviceAddress), dhcpv4.WithServerIP(ourAddress),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(ourAddress)), dhcpv4.WithNetmask(lanMask), dhcpv4.WithRouter(ourAddress),
		dhcpv4.WithDNS(ourAddress), dhcpv4.WithLeaseTime(3600))
	if err == nil {
		_, _ = c.WriteTo(a.ToBytes(), peer)
	}
}
