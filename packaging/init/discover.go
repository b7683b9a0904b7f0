package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/brutella/dnssd"
)

const (
	serviceType    = "_deimos._tcp.local."
	browseFor      = 4 * time.Second // answers come within a second; another for slow links
	browseFirst    = 2 * time.Second // pause
	browseMost     = 2 * time.Minute
	wantedEvery    = 20 * time.Second // how often it is asked whether there is need to look
	offlineLong    = 15 * time.Minute // a member that is offline for so long looks, too
	mostAnswers    = 32               // a look that gets more has met somebody who plays
	proofLimit     = 5 * time.Second
	announcedURL   = "url"
	announcedFleet = "fleet"
)

// discovery looks for a coordinator on the local network by DNS-SD (RFC 6763) on
// multicast DNS (RFC 6762): an instance of _deimos._tcp, whose TXT record may have
//
//	url=https://host:port   else it is taken at its address and port
//	fleet=…                 32 hexadecimal digits: the fingerprint of the fleet's authority,
//	                        the first half of the SHA-256 of its certificate
//
// It looks for as long as there is need: no coordinator of the owner's, and no
// membership, or one that has been offline for long ([offlineLong]), since its
// coordinator may have moved. An answer that differs from the one that is in use
// counts when it came in two looks, one after the other, and the one in use did not.
//
// Anybody on the network can answer. What that gives away is which coordinator a
// device that belongs to nobody waits for: the owner must still compare the code that
// the device shows. One with a token gives it to nobody but who has the authority that
// the token pins; a member is told answers of its own fleet only, and goes to none that
// has not its authority. Where several fleets answer, none is taken: the owner
// says which in deimos.toml. Of several coordinators of one fleet, one that proves to
// have its authority is.
type discovery struct {
	browse func(ctx context.Context, add func(dnssd.BrowseEntry)) error
	proves func(ctx context.Context, a answer) bool
	need   func() need // asked before each look
	log    *slog.Logger
	found  func(address string)
}

// need is what is to be looked for.
type need struct {
	look  bool
	fleet string // only this one's; "" is any
	known string // address that the agent has, "" if it has none
}

// answer is one coordinator's.
type answer struct {
	address, fleet string // fleet is "" where it says none
}

// run returns when ctx ends.
func (d *discovery) run(ctx context.Context) {
	told, before := "", ""
	for pause := browseFirst; ; pause = min(2*pause, browseMost) {
		n := d.need()
		if !n.look {
			told, before, pause = "", "", browseFirst/2
			if !sleep(ctx, wantedEvery) {
				return
			}
			continue
		}
		answers, err := d.look(ctx)
		address, state := "", ""
		if err != nil {
			state = "the network cannot be asked for a coordinator: " + err.Error()
		} else {
			address, state = d.choose(ctx, n, answers)
		}
		if ctx.Err() != nil {
			return
		}
		if state != "" && state != told {
			d.log.Warn(clean(state), "coordinators", addressesOf(answers))
		}
		told = state
		switch {
		case address == "" || address == n.known:
			before = ""
		case n.known == "" || address == before:
			d.log.Info("found a coordinator on this network", "coordinator", address)
			d.found(address)
			before, pause = "", browseMost
		default:
			before, pause = address, browseFirst
		}
		if address == n.known && address != "" {
			pause = browseMost
		}
		if !sleep(ctx, pause) {
			return
		}
	}
}

// choose returns the address to go to, or what to tell the owner, or neither: then
// there is nothing better than what is known.
func (d *discovery) choose(ctx context.Context, n need, answers []answer) (address, state string) {
	if n.fleet != "" {
		answers = slices.DeleteFunc(slices.Clone(answers), func(a answer) bool { return a.fleet != n.fleet })
	}
	fleets := map[string]bool{}
	for _, a := range answers {
		if a.address == n.known {
			return n.known, ""
		}
		fleets[cmp.Or(a.fleet, a.address)] = true // who says nothing is a fleet of its own
	}
	switch {
	case len(fleets) == 0 && n.known != "":
		return "", ""
	case len(fleets) == 0:
		return "", "no coordinator answers on this network; name one in deimos.toml, or start one here"
	case len(fleets) > 1:
		return "", "there are coordinators of several fleets on this network; name one in deimos.toml"
	case len(answers) == 1:
		return answers[0].address, ""
	}
	for _, a := range answers {
		if d.proves(ctx, a) {
			return a.address, ""
		}
	}
	return "", "several say on this network that they are coordinators of one fleet, and none proves it; name one in deimos.toml"
}

func addressesOf(answers []answer) (list []string) {
	for _, a := range answers {
		list = append(list, a.address)
	}
	return list
}

// look returns what answers, sorted by address.
func (d *discovery) look(ctx context.Context) ([]answer, error) {
	// Canceled, and not run out: the library's readers end only by that, and would
	// otherwise take all the time of a core from then on.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer time.AfterFunc(browseFor, cancel).Stop()
	byInstance := map[string]answer{}
	err := d.browse(ctx, func(e dnssd.BrowseEntry) {
		a := answer{addressOf(e), fleetOf(e)}
		old, ok := byInstance[e.Name]
		if a.address != "" && (ok || len(byInstance) < mostAnswers) && (!ok || a.address == old.address && old.fleet == "" || better(a.address, old.address)) { // its TXT record may come last
			byInstance[e.Name] = a
		}
	})
	if ctx.Err() != nil {
		err = nil // it always ends so
	}
	list := slices.SortedFunc(maps.Values(byInstance), func(a, b answer) int {
		return cmp.Or(cmp.Compare(a.address, b.address), cmp.Compare(a.fleet, b.fleet))
	})
	return slices.Compact(list), err
}

// fleetOf is the fingerprint that an answer names; "" if it names none.
func fleetOf(e dnssd.BrowseEntry) string {
	if raw, err := hex.DecodeString(e.Text[announcedFleet]); err != nil || len(raw) != fingerprint {
		return ""
	}
	return e.Text[announcedFleet]
}

const fingerprint = sha256.Size / 2 // bytes

func fingerprintOf(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:fingerprint])
}

// provesFleet tells whether the server at an address has a certificate of the
// authority whose fingerprint it announces.
func provesFleet(ctx context.Context, a answer) bool {
	ctx, cancel := context.WithTimeout(ctx, proofLimit)
	defer cancel()
	return a.fleet != "" && shakesHands(ctx, a.address, func(shown *x509.Certificate) *x509.Certificate {
		if fingerprintOf(shown.Raw) != a.fleet {
			return nil
		}
		return shown
	})
}

// shakesHands tells whether the server at an address finishes a TLS handshake with
// a certificate of the authority that we believe, which is chosen knowing the one at
// the end of the chain that is shown; nil believes none. Times do not count: the clock
// may be wrong.
func shakesHands(ctx context.Context, address string, believe func(shown *x509.Certificate) *x509.Certificate) bool {
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" {
		return false
	}
	dialer := &tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: u.Hostname(),
		InsecureSkipVerify: true, // against the authority, here:
		VerifyConnection: func(cs tls.ConnectionState) error {
			leaf, roots := cs.PeerCertificates[0], x509.NewCertPool()
			ca := believe(cs.PeerCertificates[len(cs.PeerCertificates)-1])
			if ca == nil {
				return errors.New("another authority")
			}
			roots.AddCert(ca)
			_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: u.Hostname(), CurrentTime: leaf.NotBefore})
			return err
		},
	}}
	conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443")))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// membership is what we must know of the agent's.
type membership struct {
	Coordinator string   `json:"coordinator"`
	CA          []byte   `json:"ca"` // PEM
	Brokers     []string `json:"brokers"`
	DataPlane   []string `json:"data_plane"` // the coordinator's as well
}

// authority is its DER; nil if there is none that can be read.
func (m membership) authority() []byte {
	block, _ := pem.Decode(m.CA)
	if block == nil {
		return nil
	}
	return block.Bytes
}

// seeks tells what discovery is to look for. since is when the device was first seen to
// be an offline member, or zero.
func (m *machine) seeks(now time.Time, since *time.Time) need {
	m.mu.Lock()
	n := need{look: m.declared == "", known: m.found}
	m.mu.Unlock()
	raw, err := os.ReadFile(m.path(membershipFile))
	if !n.look || errors.Is(err, fs.ErrNotExist) {
		*since = time.Time{}
		return n
	}
	var mine membership
	_ = json.Unmarshal(raw, &mine) // the agent says what is wrong with one that is damaged
	ca := mine.authority()
	if ca == nil || readStatus(m.path(statusFile)).Online {
		*since = time.Time{}
		return need{}
	}
	if since.IsZero() {
		*since = now
	}
	return need{look: now.Sub(*since) >= offlineLong, fleet: fingerprintOf(ca), known: cmp.Or(m.found, mine.Coordinator)}
}

// better prefers IPv4, which is never link-local only, and then one order for all.
func better(a, b string) bool {
	four := func(s string) bool {
		u, err := url.Parse(s)
		return err == nil && net.ParseIP(u.Hostname()).To4() != nil
	}
	if four(a) != four(b) {
		return four(a)
	}
	return a < b
}

// addressOf is what an answer stands for; "" if it is of no use.
func addressOf(e dnssd.BrowseEntry) string {
	if text := e.Text[announcedURL]; text != "" {
		if isAddress(text) && clean(text) == text {
			return text
		}
		return ""
	}
	if e.Port <= 0 || e.Port > 65535 {
		return ""
	}
	best := ""
	for _, ip := range e.IPs {
		a, ok := netip.AddrFromSlice(ip)
		a = a.Unmap()
		if !ok || !a.IsGlobalUnicast() { // a link-local one needs a zone, which a URL does not carry
			continue
		}
		address := "https://" + net.JoinHostPort(a.String(), strconv.Itoa(e.Port))
		if best == "" || better(address, best) {
			best = address
		}
	}
	return best
}

func browseLAN(ctx context.Context, add func(dnssd.BrowseEntry)) error {
	return dnssd.LookupType(ctx, serviceType, add, func(dnssd.BrowseEntry) {})
}
