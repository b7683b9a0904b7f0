package coordinator

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/brutella/dnssd"
	dnssdlog "github.com/brutella/dnssd/log"

	"github.com/deimos-edge/deimos/wire"
)

func init() { dnssdlog.Info.Disable() } // it writes to standard output

// announcement tells the local network where this coordinator is, so that a device
// without a configuration finds it: an instance of _deimos._tcp by DNS-SD (RFC 6763)
// on multicast DNS (RFC 6762).
//
//	TXT      url=https://host:port, fleet=the fingerprint of the fleet's authority in hexadecimal
//	         digits, so that several coordinators of one fleet are seen to be that
//	SRV, A   the same as port and address, for whoever reads no TXT
//
// The host is the name that the operator has said devices come by, or else the address
// from which this machine goes out to the rest of the network. The certificate is good
// for either: it is made for the operator's names and this machine's addresses, and anew
// when there is another address ([serverCert]). A device on another link that has no way to that
// address needs a configuration.
//
// It is the same on every link, because the library takes what it hears of itself from one link
// on another for somebody else's, as on a machine that is on a network by cable and by radio,
// and goes through one name after the other.
//
// Whoever is asked by a device can say the same of himself, so this is no proof of
// anything: such a device must still be claimed, by the code that it shows.
//
// # What always holds
//
//   - The coordinator starts and works whatever becomes of this: a network that cannot
//     be used is said once and tried again.
//   - When links or their addresses change, the old announcement is withdrawn and a new one
//     made: the library joins the group only on the links that it finds at its start.
//     That is at most once every [announceEvery], whatever the links do.
//   - close withdraws it (a record with no time to live), within [withdrawLimit].
type announcement struct {
	name   string // of the instance, if nobody else has it
	host   string // that the operator has said, with its port; "" is none
	port   int
	fleet  string // fingerprint of its authority
	listen net.IP // nil is every address
	log    *slog.Logger

	cancel context.CancelFunc
	done   chan struct{}
}

const (
	serviceType   = "_deimos._tcp"
	announceOff   = "off" // Config.Announce
	announceEvery = 10 * time.Second
	announceMost  = 5 * time.Minute  // pause after one failure after the other
	probeLimit    = 45 * time.Second // RFC 6762, section 9 gives up after a minute
	withdrawLimit = 3 * time.Second
	longestName   = 63 // bytes, RFC 6763, section 4.1.1
)

// newAnnouncement is what is to be said of a coordinator that listens at addr; nil
// if nobody else could reach it, or the operator wants none.
func newAnnouncement(cfg Config, addr net.Addr, authority *x509.Certificate, log *slog.Logger) (*announcement, error) {
	tcp, ok := addr.(*net.TCPAddr)
	if cfg.Announce == announceOff || !ok {
		return nil, nil
	}
	if tcp.IP.IsLoopback() || tcp.IP.IsLinkLocalUnicast() {
		if cfg.Announce != "" {
			return nil, fmt.Errorf("%s cannot be announced on the network: nobody else can reach it; listen on another address, or announce nothing", addr)
		}
		return nil, nil
	}
	fleet := wire.Fingerprint(authority.Raw)
	a := &announcement{name: cmp.Or(cfg.Announce, defaultName()), host: announcedHost(cfg, tcp.Port), port: tcp.Port, fleet: hex.EncodeToString(fleet[:]), log: log, done: make(chan struct{})}
	if !tcp.IP.IsUnspecified() {
		a.listen = tcp.IP
	}
	if len(a.name) > longestName || !utf8.ValidString(a.name) || strings.ContainsFunc(a.name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return nil, fmt.Errorf("%q cannot be announced: a name has at most %d bytes, and no control characters", a.name, longestName)
	}
	return a, nil
}

// announcedHost is the host and port by which the operator says that devices come; "" if he says none.
func announcedHost(cfg Config, port int) string {
	if len(cfg.PublicHTTPS) > 0 {
		return cfg.PublicHTTPS[0]
	}
	host, _, _ := net.SplitHostPort(cfg.Listen)
	if len(cfg.Advertise) > 0 {
		host = cfg.Advertise[0]
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return ""
	}
	return net.JoinHostPort(host, strconv.Itoa(port))
}

func defaultName() string {
	name := "Deimos on " + shortHostname()
	if len(name) > longestName {
		name = strings.ToValidUTF8(name[:longestName], "")
	}
	return name
}

func shortHostname() string {
	h, err := os.Hostname()
	if err != nil {
		return "this machine"
	}
	h, _, _ = strings.Cut(h, ".")
	return h
}

// String is the announcement as a person reads it.
func (a *announcement) String() string {
	return fmt.Sprintf("%q (%s)", a.name, serviceType)
}

// start begins to announce, in the background.
func (a *announcement) start(ctx context.Context) {
	ctx, a.cancel = context.WithCancel(ctx)
	go func() {
		defer close(a.done)
		a.run(ctx)
	}()
}

func (a *announcement) close() {
	a.cancel()
	select {
	case <-a.done:
	case <-time.After(withdrawLimit):
	}
}

func (a *announcement) run(ctx context.Context) {
	said := ""
	for pause := announceEvery; ; {
		links := a.links()
		var err error
		if len(links) > 0 {
			err = a.announce(ctx, links)
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && err.Error() != said:
			said = err.Error()
			a.log.Warn("this coordinator cannot be announced on the local network; it will be tried again", "error", err)
		case err == nil:
			said, pause = "", announceEvery
		}
		if err == nil && len(links) > 0 {
			continue // it has changed
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		if err != nil {
			pause = min(2*pause, announceMost)
		}
	}
}

// announce announces until the links change or ctx ends, and withdraws it then.
func (a *announcement) announce(ctx context.Context, links map[string][]netip.Addr) error {
	// The library's readers end when their context is canceled, and only then: one that
	// runs out leaves them spinning. So there is no deadline on any.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	primary := wayOut(links)
	url := "https://" + cmp.Or(a.host, netip.AddrPortFrom(primary, uint16(a.port)).String())
	service, err := a.probe(ctx, primary, url)
	if err != nil {
		return err
	}
	responder, err := dnssd.NewResponder()
	if err != nil {
		return err
	}
	if _, err := responder.Add(service); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		err := responder.Respond(ctx)
		drain(responder)
		ended <- err
	}()
	a.log.Info("announced on the local network", "name", service.Name, "type", serviceType, "url", url, "links", slices.Sorted(maps.Keys(links)))
	for {
		select {
		case err := <-ended: // after the goodbye, if ctx has ended
			return err
		case <-time.After(announceEvery):
		}
		if !maps.EqualFunc(a.links(), links, slices.Equal) {
			a.log.Info("the addresses of this machine have changed; announcing it anew")
			cancel()
			<-ended
			return nil
		}
	}
}

// drain lets the readers of a responder that has ended end too: they hand what
// they have read to nobody, as the responder's own goodbye, and would wait for ever.
func drain(r dnssd.Responder) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer time.AfterFunc(50*time.Millisecond, cancel).Stop()
	r.Debug(ctx, func(*dnssd.Request) {})
}

// probe finds a name that nobody else on the network has, ours if it is free.
func (a *announcement) probe(ctx context.Context, primary netip.Addr, url string) (dnssd.Service, error) {
	service, err := dnssd.NewService(dnssd.Config{
		Name: a.name, Type: serviceType, Port: a.port, Text: map[string]string{"url": url, "fleet": a.fleet}, IPs: []net.IP{primary.AsSlice()},
		// Not the machine's own name, which its own mDNS may answer for with other addresses.
		Host: "deimos-" + shortHostname() + "-" + strconv.Itoa(a.port),
	})
	if err != nil {
		return service, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer time.AfterFunc(probeLimit, cancel).Stop()
	return dnssd.ProbeService(ctx, service)
}

// links are the names of the interfaces over which others can reach this coordinator,
// with their addresses.
func (a *announcement) links() map[string][]netip.Addr {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	links := make(map[string][]netip.Addr)
	for _, i := range all {
		const want = net.FlagUp | net.FlagMulticast
		if i.Flags&want != want || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue // it has just gone
		}
		for _, addr := range addrs {
			n, ok := addr.(*net.IPNet)
			if !ok || !n.IP.IsGlobalUnicast() || a.listen != nil && !a.listen.Equal(n.IP) {
				continue
			}
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				links[i.Name] = append(links[i.Name], ip.Unmap())
			}
		}
		slices.SortFunc(links[i.Name], netip.Addr.Compare)
	}
	return links
}

// wayOut is the address from which this machine goes out to the rest of the network; where it
// goes nowhere, the first that it has. IPv4 comes before IPv6: every device has it.
func wayOut(links map[string][]netip.Addr) netip.Addr {
	var all []netip.Addr
	for _, name := range slices.Sorted(maps.Keys(links)) {
		all = append(all, links[name]...)
	}
	for _, outside := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} { // for documentation; nothing is sent
		c, err := net.Dial("udp", outside)
		if err != nil {
			continue // no route
		}
		from := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
		c.Close()
		if slices.Contains(all, from) {
			return from
		}
	}
	slices.SortStableFunc(all, func(x, y netip.Addr) int { return cmp.Compare(x.BitLen(), y.BitLen()) })
	return all[0]
}
