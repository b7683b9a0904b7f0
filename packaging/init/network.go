package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	dhcpTry      = 4 * time.Second // for each of dhcpTries packets
	dhcpTries    = 3
	leastLease   = 30 * time.Second // a shorter one is not believed
	mostLease    = 24 * time.Hour   // a longer one is asked about so often
	retryFirst   = time.Second
	retryMost    = time.Minute
	routeBase    = 1000 // metric of the first link's default route
	linkPoll     = 2 * time.Second
	resolvLimits = 3 // name servers, as resolv.conf(5) has it
)

// network brings up every wired link, those plugged in later too, and keeps an
// IPv4 lease on each. IPv6 addresses and routes are the kernel's, by router
// advertisements.
type network struct {
	wired  func(name string) bool
	resolv string // path of resolv.conf
	log    *slog.Logger

	mu     sync.Mutex           // guards what follows
	leases map[string]*leaseOf  // by link
	up     map[string]time.Time // links that have somebody who looks after them
	first  chan struct{}        // closed at the first lease
}

// leaseOf is what a link was given.
type leaseOf struct {
	address *net.IPNet
	router  net.IP
	servers []net.IP // DNS
	ntp     []net.IP
}

func newNetwork(wired func(string) bool, resolv string, log *slog.Logger) *network {
	return &network{wired: wired, resolv: resolv, log: log, leases: map[string]*leaseOf{}, up: map[string]time.Time{}, first: make(chan struct{})}
}

// hasWire tells whether a link is a network card with a cable: hardware behind
// it, Ethernet, and no radio.
func hasWire(sys string) func(string) bool {
	return func(name string) bool {
		dir := filepath.Join(sys, "class/net", name)
		return exists(filepath.Join(dir, "device")) && readWord(filepath.Join(dir, "type")) == "1" &&
			!exists(filepath.Join(dir, "wireless")) && !exists(filepath.Join(dir, "phy80211"))
	}
}

// run looks after all links until ctx ends.
func (n *network) run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	if lo, err := netlink.LinkByName("lo"); err == nil {
		_ = netlink.LinkSetUp(lo)
	}
	news := make(chan netlink.LinkUpdate, 16)
	_ = netlink.LinkSubscribe(news, ctx.Done()) // without it, polling finds them
	poll := time.NewTicker(linkPoll)
	defer poll.Stop()
	for {
		links, err := netlink.LinkList()
		if err != nil {
			n.log.Warn("the network's links cannot be listed", "error", err)
		}
		for _, l := range links {
			if name := l.Attrs().Name; n.wired(name) && n.begin(name) {
				all.Go(func() {
					defer n.forget(name)
					guard(n.log, "link "+name, func() { n.keep(ctx, name) })
				})
			}
		}
		select {
		case <-ctx.Done():
			return
		case _, ok := <-news:
			if !ok {
				news = nil // closed; polling goes on
			}
		case <-poll.C:
		}
	}
}

func (n *network) begin(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.up[name]; ok {
		return false
	}
	n.up[name] = time.Now()
	return true
}

func (n *network) forget(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.up, name)
}

// keep gets and renews a lease until ctx ends or the link is gone.
func (n *network) keep(ctx context.Context, name string) {
	pause, told := retryFirst, false
	for ctx.Err() == nil {
		link, err := netlink.LinkByName(name)
		if err != nil {
			n.drop(name)
			return
		}
		if link.Attrs().Flags&net.FlagUp == 0 {
			if err := netlink.LinkSetUp(link); err != nil {
				n.log.Warn("a link cannot be brought up", "link", name, "error", err)
			}
		}
		if state := link.Attrs().OperState; state == netlink.OperDown || state == netlink.OperLowerLayerDown || state == netlink.OperNotPresent {
			if !sleep(ctx, 500*time.Millisecond) { // no cable, or not yet
				return
			}
			continue
		}
		err = n.hold(ctx, link)
		if ctx.Err() != nil {
			return
		}
		if !told {
			n.log.Warn("no address by DHCP; it is tried again for as long as it takes", "link", name, "error", err)
		}
		told = !errors.Is(err, errLeaseLost)
		if !told {
			pause = retryFirst
		}
		if !sleep(ctx, pause+rand.N(pause/2)) {
			return
		}
		pause = min(2*pause, retryMost)
	}
}

var errLeaseLost = errors.New("the lease has ended")

// hold gets a lease and renews it; it returns when there is none any more.
func (n *network) hold(ctx context.Context, link netlink.Link) error {
	name := link.Attrs().Name
	c, err := nclient4.New(name, nclient4.WithTimeout(dhcpTry), nclient4.WithRetry(dhcpTries))
	if err != nil {
		return err
	}
	asking := []dhcpv4.Modifier{dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionNTPServers)}
	lease, err := c.Request(ctx, asking...)
	c.Close() // its socket would copy every packet of the link into memory
	if err != nil {
		return err
	}
	if err := n.apply(link, lease.ACK); err != nil {
		return err
	}
	defer n.release(link)
	for {
		length := min(max(lease.ACK.IPAddressLeaseTime(leastLease), leastLease), mostLease)
		until := lease.CreationTime.Add(length)
		next := lease.ACK.IPAddressRenewalTime(length / 2)
		if next <= 0 || next >= length {
			next = length / 2
		}
		for {
			if !sleep(ctx, next) {
				return ctx.Err()
			}
			renewed, err := n.renew(ctx, name, lease, asking)
			if err == nil {
				lease = renewed
				break
			}
			var nak *nclient4.ErrNak
			if time.Now().After(until) || errors.As(err, &nak) {
				return fmt.Errorf("%w: %w", errLeaseLost, err)
			}
			next = max(time.Until(until)/2, retryFirst) // RFC 2131, 4.4.5
		}
		if err := n.apply(link, lease.ACK); err != nil {
			return err
		}
	}
}

func (n *network) renew(ctx context.Context, name string, lease *nclient4.Lease, asking []dhcpv4.Modifier) (*nclient4.Lease, error) {
	c, err := nclient4.New(name, nclient4.WithTimeout(dhcpTry), nclient4.WithRetry(dhcpTries))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Renew(ctx, lease, asking...)
}

// apply gives the link what an answer says, in place of what it had.
func (n *network) apply(link netlink.Link, ack *dhcpv4.DHCPv4) error {
	ip := ack.YourIPAddr.To4()
	if ip == nil || !ip.IsGlobalUnicast() && !ip.IsLinkLocalUnicast() {
		return fmt.Errorf("the DHCP server offers %v, which is no address of a machine", ack.YourIPAddr)
	}
	mask := ack.SubnetMask()
	if ones, bits := mask.Size(); bits != 32 || ones < 1 {
		mask = ip.DefaultMask()
	}
	l := &leaseOf{address: &net.IPNet{IP: ip, Mask: mask}, servers: ack.DNS(), ntp: ack.NTPServers()}
	if routers := ack.Router(); len(routers) > 0 {
		l.router = routers[0]
	}
	n.mu.Lock()
	old := n.leases[link.Attrs().Name]
	n.mu.Unlock()
	if old != nil && !old.address.IP.Equal(ip) {
		n.release(link)
	}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: l.address}); err != nil {
		return fmt.Errorf("give %s its address: %w", link.Attrs().Name, err)
	}
	if l.router != nil {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: l.router, Priority: routeBase + link.Attrs().Index, Protocol: unix.RTPROT_DHCP, Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(route); err != nil {
			n.log.Warn("the way out of the network cannot be set", "link", link.Attrs().Name, "router", l.router, "error", err)
		}
	}
	n.mu.Lock()
	n.leases[link.Attrs().Name] = l
	err := n.writeResolv()
	select {
	case <-n.first:
	default:
		close(n.first)
	}
	n.mu.Unlock()
	if err != nil {
		n.log.Warn("the name servers cannot be written", "error", err)
	}
	if old == nil || !old.address.IP.Equal(ip) {
		n.log.Info("the link has an address", "link", link.Attrs().Name, "address", l.address.String(), "router", l.router)
	}
	return nil
}

// release takes the address off; the kernel takes the routes with it.
func (n *network) release(link netlink.Link) {
	name := link.Attrs().Name
	n.mu.Lock()
	l := n.leases[name]
	n.mu.Unlock()
	if l != nil {
		_ = netlink.AddrDel(link, &netlink.Addr{IPNet: l.address})
	}
	n.drop(name)
}

func (n *network) drop(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.leases[name] != nil {
		delete(n.leases, name)
		_ = n.writeResolv()
	}
}

// writeResolv is called with mu held.
func (n *network) writeResolv() error {
	var text strings.Builder
	seen := map[string]bool{}
	for _, l := range n.inOrder() {
		for _, s := range l.servers {
			if !seen[s.String()] && len(seen) < resolvLimits {
				seen[s.String()] = true
				fmt.Fprintf(&text, "nameserver %s\n", s)
			}
		}
	}
	if err := os.MkdirAll(filepath.Dir(n.resolv), 0o755); err != nil {
		return err
	}
	return renameio.WriteFile(n.resolv, []byte(text.String()), 0o644)
}

// inOrder is called with mu held.
func (n *network) inOrder() (list []*leaseOf) {
	var names []string
	for name := range n.leases {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		list = append(list, n.leases[name])
	}
	return list
}

// ntpServers are those that DHCP has named.
func (n *network) ntpServers() (servers []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.inOrder() {
		for _, s := range l.ntp {
			servers = append(servers, s.String())
		}
	}
	return servers
}

// sleep is false if ctx ended before.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
