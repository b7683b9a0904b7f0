package main

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/brutella/dnssd"
)

const (
	serviceType  = "_deimos._tcp.local."
	browseFor    = 4 * time.Second // answers come within a second; another for slow links
	browseFirst  = 2 * time.Second // pause
	browseMost   = 2 * time.Minute
	mostAnswers  = 32 // a look that gets more has met somebody who plays
	announcedURL = "url"
)

// discovery looks for a coordinator on the local network by DNS-SD (RFC 6763) on
// multicast DNS (RFC 6762): an instance of _deimos._tcp, whose TXT record may have
// url=https://host:port, and else is taken at its address and port.
//
// Anybody on the network can answer. What that gives away is which coordinator a
// device that belongs to nobody waits for: it must still be claimed there with the
// code that the device shows. A device with a token or a membership never asks. Where
// several answer, none is taken: the owner says which in deimos.toml.
type discovery struct {
	browse func(ctx context.Context, add func(dnssd.BrowseEntry)) error
	log    *slog.Logger
	found  func(address string)
}

// run returns when it has found one, or ctx ends.
func (d *discovery) run(ctx context.Context) {
	told := ""
	for pause := browseFirst; ; pause = min(2*pause, browseMost) {
		addresses, err := d.look(ctx)
		state := ""
		switch {
		case ctx.Err() != nil:
			return
		case len(addresses) == 1:
			d.log.Info("found a coordinator on this network", "coordinator", addresses[0])
			d.found(addresses[0])
			return
		case err != nil:
			state = "the network cannot be asked for a coordinator: " + err.Error()
		case len(addresses) > 1:
			state = "there are several coordinators on this network; name one in deimos.toml"
		default:
			state = "no coordinator answers on this network; name one in deimos.toml, or start one here"
		}
		if state != told {
			d.log.Warn(clean(state), "coordinators", addresses)
			told = state
		}
		if !sleep(ctx, pause) {
			return
		}
	}
}

func (d *discovery) look(ctx context.Context) ([]string, error) {
	// Canceled, and not run out: the library's readers end only by that, and would
	// otherwise take all the time of a core from then on.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer time.AfterFunc(browseFor, cancel).Stop()
	byInstance := map[string]string{}
	err := d.browse(ctx, func(e dnssd.BrowseEntry) {
		address := addressOf(e)
		if old, ok := byInstance[e.Name]; address != "" && len(byInstance) < mostAnswers && (!ok || better(address, old)) {
			byInstance[e.Name] = address
		}
	})
	if ctx.Err() != nil {
		err = nil // it always ends so
	}
	var list []string
	for _, a := range byInstance {
		list = append(list, a)
	}
	slices.Sort(list)
	return slices.Compact(list), err
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
