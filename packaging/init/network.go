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
	mostLease    = 24 * time.Hour   // a longer one is not believed
	mostRenewal  = time.Hour        // so often it is asked about: a router may have been replaced behind a switch
	retryFirst   = time.Second
	retryMost    = time.Minute
	routeBase    = 1000 // metric of the first link's default route
	linkPoll     = 2 * time.Second
	resolvLimits = 3 // name servers, as resolv.conf(5) has it
)

// network brings up every wired link, those plugged in later too, and keeps an
// IPv4 lease on each. IPv6 addresses and routes are the kernel's, by router
// advertisements.
//
// A cable that was unplugged and plugged in again may lead elsewhere: any server is
// asked anew then, at once, and so it is when the one of the lease does not answer. An
// address is kept until another is given, refused, or the lease ends.
type network struct {
	wired  func(name string) bool
	resolv string // path of resolv.conf
	log    *slog.Logger

	mu     sync.Mutex          // guards what follows
	leases map[string]*leaseOf // by link
	up     map[string]*wire    // links that have somebody who looks after them
	first  chan struct{}       // closed at the first lease
}

// wire is what is seen of a link's cable.
type wire struct {
	out       bool          // guarded by network.mu
	replugged chan struct{} // capacity 1
}

// unplugged tells whether a link has no cable, or not yet. Drivers that know
// nothing of cables say so, which counts as one.
func unplugged(l netlink.Link) bool {
	state := l.Attrs().OperState
	return state == netlink.OperDown || state == netlink.OperLowerLayerDown || state == netlink.OperNotPresent
}

// leaseOf is what a link was given.
type leaseOf struct {
	address *net.IPNet
	router  net.IP
	servers []net.IP // DNS
	ntp     []net.IP
}

func newNetwork(wired func(string) bool, resolv string, log *slog.Logger) *network {
	return &network{wired: wired, resolv: resolv, log: log, leases: map[string]*leaseOf{}, up: map[string]*wire{}, first: make(chan struct{})}
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
			n.see(l)
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
		case update, ok := <-news:
			if !ok {
				news = nil // closed; polling goes on
			} else if update.Link != nil {
				n.see(update.Link) // it may be over by the next look at all
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
	n.up[name] = &wire{replugged: make(chan struct{}, 1)}
	return true
}

// see notes whether a link's cable is in, and tells who looks after it that it was out.
func (n *network) see(l netlink.Link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.up[l.Attrs().Name]
	if w == nil {
		return
	}
	back := w.out && !unplugged(l)
	w.out = unplugged(l)
	if back {
		select {
		case w.replugged <- struct{}{}:
		default:
		}
	}
}

func (n *network) replugged(name string) chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	if w := n.up[name]; w != nil {
		return w.replugged
	}
	return nil
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
		if unplugged(link) {
			if !sleep(ctx, 500*time.Millisecond) {
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
	replugged := n.replugged(name)
	select {
	case <-replugged: // before there was a lease
	default:
	}
	lease, err := n.ask(ctx, name, nil)
	if err != nil {
		return err
	}
	defer n.release(link)
	for {
		if err := n.apply(link, lease.ACK); err != nil {
			return err
		}
		length := min(max(lease.ACK.IPAddressLeaseTime(leastLease), leastLease), mostLease)
		until := lease.CreationTime.Add(length)
		next := lease.ACK.IPAddressRenewalTime(length / 2)
		if next <= 0 || next >= length {
			next = length / 2
		}
		next = min(next, mostRenewal)
		for moved := false; ; {
			again := time.NewTimer(next)
			select {
			case <-ctx.Done():
			case <-replugged:
				moved, next = true, retryFirst
			case <-again.C:
			}
			again.Stop()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			answer, err := n.confirm(ctx, name, lease, moved)
			if err == nil {
				lease = answer
				break
			}
			var nak *nclient4.ErrNak
			if time.Now().After(until) || errors.As(err, &nak) {
				return fmt.Errorf("%w: %w", errLeaseLost, err)
			}
			if moved {
				next = min(2*next, retryMost)
			} else {
				next = min(max(time.Until(until)/2, retryFirst), mostRenewal) // RFC 2131, 4.4.5
			}
		}
	}
}

// confirm renews a lease where it was got, unless the link has moved, and else asks
// whoever is there.
func (n *network) confirm(ctx context.Context, name string, lease *nclient4.Lease, moved bool) (*nclient4.Lease, error) {
	if !moved {
		renewed, err := n.renew(ctx, name, lease)
		var nak *nclient4.ErrNak
		if err == nil || errors.As(err, &nak) {
			return renewed, err
		}
	}
	return n.ask(ctx, name, lease.ACK.YourIPAddr)
}

// The client is closed after each talk: its socket would copy every packet of the
// link into memory.
func newClient(name string) (*nclient4.Client, error) {
	return nclient4.New(name, nclient4.WithTimeout(dhcpTry), nclient4.WithRetry(dhcpTries))
}

var wanted = dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionNTPServers)

// ask gets a lease of any server, for the address that the link has if that can be.
func (n *network) ask(ctx context.Context, name string, had net.IP) (*nclient4.Lease, error) {
	c, err := newClient(name)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	asking := []dhcpv4.Modifier{wanted}
	if had != nil {
		asking = append(asking, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(had)))
	}
	offer, err := c.DiscoverOffer(ctx, asking...)
	if err != nil {
		return nil, err
	}
	return c.RequestFromOffer(ctx, offer, wanted)
}

func (n *network) renew(ctx context.Context, name string, lease *nclient4.Lease) (*nclient4.Lease, error) {
	c, err := newClient(name)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Renew(ctx, lease, wanted)
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
	if old != nil && (old.address.String() != l.address.String() || !old.router.Equal(l.router)) {
		n.release(link) // with its routes
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
	if old == nil || old.address.String() != l.address.String() || !old.router.Equal(l.router) {
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
