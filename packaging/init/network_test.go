package main

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"
)

// lan is a network at the other end of a cable, whose router can be replaced.
type lan struct {
	mu     sync.Mutex
	router net.IP // it is the name server, too
	gives  net.IP
	renew  time.Duration
}

func (l *lan) replace(router, gives string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.router, l.gives = net.ParseIP(router).To4(), net.ParseIP(gives).To4()
}

// answer is a router's that knows nothing of what another has given: it refuses that.
func (l *lan) answer(c net.PacketConn, peer net.Addr, q *dhcpv4.DHCPv4) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kind := dhcpv4.MessageTypeOffer
	if q.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
		if id := q.ServerIdentifier(); id != nil && !id.Equal(l.router) {
			return
		}
		if asked := q.RequestedIPAddress(); !q.ClientIPAddr.Equal(l.gives) && !asked.Equal(l.gives) {
			kind = dhcpv4.MessageTypeNak
		}
	}
	a, err := dhcpv4.NewReplyFromRequest(q, dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(l.gives), dhcpv4.WithServerIP(l.router),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(l.router)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithRouter(l.router), dhcpv4.WithDNS(l.router), dhcpv4.WithLeaseTime(24*3600), dhcpv4.WithOption(dhcpv4.OptRenewTimeValue(l.renew)))
	if err == nil {
		_, _ = c.WriteTo(a.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
	}
}

// online waits until the link has this address alone, and this name server.
func online(t *testing.T, link netlink.Link, resolv, address, router string) {
	t.Helper()
	var has []string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		has = nil
		for _, a := range addrs {
			has = append(has, a.IPNet.String())
		}
		raw, _ := os.ReadFile(resolv)
		if strings.Join(has, " ") == address && string(raw) == "nameserver "+router+"\n" {
			return
		}
	}
	t.Fatalf("the link has %q, and not %s", has, address)
}

// TestDeviceFollowsItsCableAndItsRouter has leases of a day, as home routers give them.
func TestDeviceFollowsItsCableAndItsRouter(t *testing.T) {
	for name, c := range map[string]struct {
		renew  time.Duration
		replug bool
	}{
		"a cable that is moved":               {renew: 12 * time.Hour, replug: true},
		"a router replaced behind the switch": {renew: time.Second},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) { followed(t, c.renew, c.replug) })
	}
}

func followed(t *testing.T, renew time.Duration, replug bool) {
	if testing.Short() && !replug {
		t.Skip("a server that is gone is asked for 12 s")
	}
	if !inOwnNetwork(t) {
		return
	}
	link := connect(t, "lan0", "192.168.1.77/24")
	if addr, err := netlink.ParseAddr("192.168.1.77/24"); err != nil || netlink.AddrDel(link, addr) != nil {
		t.Fatal("the link is not bare")
	}
	peer, err := netlink.LinkByName("lan0-peer")
	if err != nil {
		t.Fatal(err)
	}
	l := &lan{renew: renew}
	l.replace("192.168.1.1", "192.168.1.2")
	server, err := server4.NewServer("lan0-peer", &net.UDPAddr{IP: net.IPv4zero, Port: dhcpv4.ServerPort}, l.answer)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve() }()
	t.Cleanup(func() { server.Close() })
	// Answers go to everybody, and leave by the one way that there is.
	if err := netlink.AddrAdd(peer, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(24, 32)}}); err != nil {
		t.Fatal(err)
	}

	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	n := newNetwork(func(name string) bool { return name == "lan0" }, resolv, slog.New(slog.NewTextHandler(os.Stdout, nil)))
	ended := make(chan struct{})
	go func() { n.run(t.Context()); close(ended) }()
	t.Cleanup(func() { <-ended })
	online(t, link, resolv, "192.168.1.2/24", "192.168.1.1")

	if replug {
		if err := netlink.LinkSetDown(peer); err != nil {
			t.Fatal(err)
		}
		// The kernel looks at cables once a second; nobody is faster than that.
		for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
			if l, err := netlink.LinkByName("lan0"); err != nil || time.Now().After(end) {
				t.Fatalf("the link does not see that the cable is out: %v", err)
			} else if unplugged(l) {
				break
			}
		}
	}
	l.replace("10.9.0.1", "10.9.0.7")
	if replug {
		if err := netlink.LinkSetUp(peer); err != nil {
			t.Fatal(err)
		}
	}
	online(t, link, resolv, "10.9.0.7/24", "10.9.0.1")
}
