package coordinator

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// Placement chooses which devices are asked to hold a chunk: those that are
// there, have room, do not rest ([resting]), and were not asked yet.
//
// The shards of one stripe must not be lost together, so they go to distinct
// devices, and of those first to owners, then to networks, that have none of
// the stripe yet. (Distinct devices have distinct disks.) Among equals it is
// drawn, with a chance in proportion to free space, health and trust: devices
// fill up alike, and none is asked by all at once.
//
// Which devices a stripe has is held in memory, by the stripe's token, until
// the object is named or nobody has asked for it for a while. Copies of a chunk
// without a stripe are spread in the same way. Two coordinators
// do not know each other's; what slips through is refused when the object is
// named ([storage.putObject]), and placed better when it is put again.

// offer is a device that could take a chunk.
type offer struct {
	device wire.DeviceID
	weight float64
	owner  string
	net    netip.Prefix
}

// around counts the shards of a stripe, or the copies of a chunk, by owner and network.
type around struct {
	owners map[string]int
	nets   map[netip.Prefix]int
}

// near is how many are with the owner of an offer, and in its network.
func (a around) near(o offer) [2]int { return [2]int{a.owners[o.owner], a.nets[o.net]} }

func (a around) add(owner string, net netip.Prefix) {
	a.owners[owner]++
	if net.IsValid() {
		a.nets[net]++
	}
}

// maxWeight is the most free space that counts, in bytes: what a device says of
// itself must not bring it every chunk.
const maxWeight = 1 << 40

// What is left of a device's weight when it says that something is wrong with it.
const (
	troubledWeight = 0.25
	criticalWeight = 0.01
)

// candidates are up to n devices for a chunk of some size, of a stripe if token
// is not empty.
func (s *storage) candidates(token string, size int64, not []wire.DeviceID, n int) []wire.DeviceID {
	return s.candidatesThat(func(d wire.DeviceID) bool { return s.resting.of(d) == nil }, token, size, not, n)
}

// candidatesThat are candidates of those that may.
func (s *storage) candidatesThat(may func(wire.DeviceID) bool, token string, size int64, not []wire.DeviceID, n int) []wire.DeviceID {
	fit, have := s.offers(may, token, size, not)
	return drawDevices(fit, have, n, rand.ExpFloat64)
}

// offers are all that may and can take a chunk, and what there is of its stripe, or of
// the chunk, already.
func (s *storage) offers(may func(wire.DeviceID) bool, token string, size int64, not []wire.DeviceID) (fit []offer, have around) {
	taken := s.stripes.devices(token)
	if token == "" { // those that have a copy are among them
		taken = not
	}
	have = around{map[string]int{}, map[netip.Prefix]int{}}
	for _, d := range taken {
		if rec, ok := s.reg.rows.get(string(d)); ok {
			have.add(ownerOf(rec), s.networks.of(rec))
		}
	}
	for _, d := range s.reg.list() {
		if slices.Contains(not, d.ID) || slices.Contains(taken, d.ID) || !may(d.ID) {
			continue
		}
		if w := s.weight(d, size); w > 0 {
			fit = append(fit, offer{d.ID, w, ownerOf(d.DeviceRecord), s.networks.of(d.DeviceRecord)})
		}
	}
	return fit, have
}

// weight is how much a device is to be preferred; 0 if it cannot take a chunk.
func (s *storage) weight(d api.Device, size int64) float64 {
	free := d.Capacity - max(d.Used, 0)
	if free < size || !s.reg.mayWork(d.ID) || s.leaving(d.ID) {
		return 0
	}
	w := float64(min(max(free, 1), maxWeight))
	worst := 1.0
	for _, warning := range d.Health {
		switch warning.Severity {
		case wire.Critical:
			worst = criticalWeight
		case wire.Trouble:
			worst = min(worst, troubledWeight)
		}
	}
	return w * worst * s.trust(d.ID)
}

// ownerLabel says whose a device is.
const ownerLabel = "owner"

// ownerOf is whose a device seems to be: who has several brings them in by one
// token, or into one group.
func ownerOf(d api.DeviceRecord) string {
	switch {
	case d.Labels[ownerLabel] != "":
		return "owner " + d.Labels[ownerLabel]
	case d.Token != "":
		return "token " + d.Token
	case d.Group != "":
		return "group " + d.Group
	}
	return "device " + string(d.ID)
}

// drawDevices draws up to n without repeats, each time those with the least near,
// of what there is and was drawn before; among equals each next one with a chance in
// proportion to its weight: the n smallest of Exp(1)/weight (Efraimidis and
// Spirakis, 2006). have is changed.
func drawDevices(fit []offer, have around, n int, exp func() float64) (out []wire.DeviceID) {
	type drawn struct {
		offer
		at float64
	}
	lots := make([]drawn, len(fit))
	for i, f := range fit {
		lots[i] = drawn{f, exp() / f.weight}
	}
	for len(lots) > 0 && len(out) < n {
		best := 0
		for i := range lots {
			a, b := have.near(lots[i].offer), have.near(lots[best].offer)
			if cmp.Or(slices.Compare(a[:], b[:]), cmp.Compare(lots[i].at, lots[best].at)) < 0 {
				best = i
			}
		}
		out = append(out, lots[best].device)
		have.add(lots[best].owner, lots[best].net)
		lots = slices.Delete(lots, best, best+1)
	}
	return out
}

// networks remembers from where devices have called last. What has changed goes on
// record too, so that a coordinator that starts anew spreads as before.
type networks struct {
	now  func() time.Time
	mu   sync.Mutex
	rows map[wire.DeviceID]calledFrom
}

type calledFrom struct {
	net     netip.Prefix
	written time.Time // when its record was last compared with it
}

// networkKeep is how often the network of one device is put on record at most: one
// that calls now by IPv4, now by IPv6 has another each time.
const networkKeep = time.Hour

// networkOf is what an address is in, not valid if it is none.
func networkOf(address string) netip.Prefix {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return netip.Prefix{}
	}
	a = a.Unmap()
	bits := 48
	if a.Is4() {
		bits = 24
	}
	p, _ := a.WithZone("").Prefix(bits) // it has as many
	return p
}

// came notes the address of a device, and tells whether it is time to look that its
// record says so.
func (n *networks) came(d wire.DeviceID, address string) (look bool) {
	p := networkOf(address)
	if !p.IsValid() {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.rows == nil {
		n.rows = make(map[wire.DeviceID]calledFrom)
	}
	c := n.rows[d]
	now := n.now()
	if look = c.net != p && now.Sub(c.written) >= networkKeep; look {
		c.written = now
	}
	c.net = p
	n.rows[d] = c
	return look
}

// of is a device's network, not valid if it is not known.
func (n *networks) of(d api.DeviceRecord) netip.Prefix {
	n.mu.Lock()
	c, ok := n.rows[d.ID]
	n.mu.Unlock()
	if ok {
		return c.net
	}
	p, _ := netip.ParsePrefix(d.Network) // empty: it has not called yet
	return p
}

// calledFrom takes in from where a device calls.
func (s *storage) calledFrom(ctx context.Context, d wire.DeviceID, address string) {
	if !s.networks.came(d, address) {
		return
	}
	_, err := s.reg.rows.change(ctx, string(d), func(rec *api.DeviceRecord, exists bool) error {
		now := networkOf(address).String()
		if !exists || rec.Network == now {
			return errUnchanged
		}
		rec.Network = now
		return nil
	})
	if err != nil { // the next start finds an older one
		s.log.Warn("the network of a device could not be put on record", "device", d, "error", err)
	}
}

// stripes are those that are being placed.
type stripes struct {
	mu    sync.Mutex
	rows  map[string]*stripe
	swept time.Time
	now   func() time.Time
}

// stripe is which device has, or is being asked to hold, which chunk.
type stripe struct {
	holds map[wire.DeviceID]string
	until time.Time
}

const (
	// stripeLife is longer than the placement of one chunk can take.
	stripeLife  = 15 * time.Minute
	stripeSweep = time.Minute
)

// take reserves a device for a chunk of a stripe. It returns false if the
// device has another.
func (s *stripes) take(token string, d wire.DeviceID, chunk string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if now.Sub(s.swept) > stripeSweep {
		s.swept = now
		for t, r := range s.rows {
			if now.After(r.until) {
				delete(s.rows, t)
			}
		}
	}
	if s.rows == nil {
		s.rows = make(map[string]*stripe)
	}
	r := s.rows[token]
	if r == nil {
		r = &stripe{holds: make(map[wire.DeviceID]string)}
		s.rows[token] = r
	}
	r.until = now.Add(stripeLife)
	if has, ok := r.holds[d]; ok && has != chunk {
		return false
	}
	r.holds[d] = chunk
	return true
}

// leave gives up a reservation.
func (s *stripes) leave(token string, d wire.DeviceID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.rows[token]; r != nil {
		delete(r.holds, d)
	}
}

// devices are those of a stripe.
func (s *stripes) devices(token string) []wire.DeviceID {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []wire.DeviceID
	if r := s.rows[token]; r != nil {
		for d := range r.holds {
			out = append(out, d)
		}
	}
	return out
}

// settled tells whether a chunk of a stripe is on a device that has no other
// chunk of it, and reserves that device.
func (s *storage) settled(token string, c chunkRecord) bool {
	for _, h := range c.Holders {
		if !h.Lost && s.reg.member(h.Device) && s.stripes.take(token, h.Device, c.ID) {
			return true
		}
	}
	return false
}

// stripe answers what is placed of a stripe. Where nothing is, it also looks
// whether there are devices enough.
func (s *storage) stripe(ctx context.Context, q api.StripeRequest) (api.Stripe, error) {
	if err := checkCode(q.Code); err != nil {
		return api.Stripe{}, err
	}
	if q.Token == "" || len(q.Token) > api.MaxStripeToken || len(q.Chunks) != q.Code.Shards() || q.Size < 1 || q.Size > chunk.MaxSize {
		return api.Stripe{}, refuse(http.StatusBadRequest, "bad_stripe", "a stripe has a token of 1 to %d bytes and %d shards of 1 to %d bytes", api.MaxStripeToken, q.Code.Shards(), chunk.MaxSize)
	}
	if q.Replicas < 0 || q.Replicas > maxReplica {
		return api.Stripe{}, refuse(http.StatusBadRequest, "bad_replicas", "replicas must be 1 to %d", maxReplica)
	}
	out := api.Stripe{Placed: []api.Placement{}}
	for _, id := range q.Chunks {
		c, ok := s.chunks.get(id)
		if !ok || c.Size != q.Size || !s.settled(q.Token, c) {
			continue
		}
		c, err := s.use(ctx, c, max(q.Replicas, 1))
		if err != nil {
			return out, err
		}
		out.Placed = append(out.Placed, api.Placement{Chunk: api.Chunk{ID: c.ID, Size: c.Size}, Holders: slices.Clone(c.Holders)})
	}
	missing := q.Code.Shards() - len(out.Placed)
	// Those that are busy for seconds are waited for when their turn comes.
	if found := len(s.candidatesThat(s.resting.serves, q.Token, q.Size, nil, missing)); found < missing {
		return out, tooFewFor(q.Code, found+len(out.Placed))
	}
	return out, nil
}

// tooFewFor says which code fits the devices that there are.
func tooFewFor(c api.Code, have int) error {
	way := "add devices"
	if have > 0 {
		way += fmt.Sprintf(", or store with --code %s", fittingCode(have))
	}
	return refuse(http.StatusServiceUnavailable, "too_few_devices", "%d devices with room are needed for a code of %s, one for each shard; %d can be found: %s", c.Shards(), c, have, way)
}

// fittingCode is the code for a number of devices that bears the loss of as
// many of them as 4+2 does, or as nearly as can be.
func fittingCode(devices int) api.Code {
	switch {
	case devices >= 4:
		return api.Code{Data: min(devices-2, 4), Parity: 2}
	case devices > 1:
		return api.Code{Data: devices - 1, Parity: 1}
	}
	return api.Code{Data: 1}
}

func checkCode(c api.Code) error {
	if c.Data < 1 || c.Parity < 0 || c.Data > api.MaxShards || c.Parity > api.MaxShards || c.Shards() > api.MaxShards {
		return refuse(http.StatusBadRequest, "bad_code", "a code has at least one shard of data and at most %d shards together, %s has not", api.MaxShards, c)
	}
	return nil
}

// apart tells whether the chunks of a stripe can each be read from a device of
// its own.
func apart(chunks []chunkRecord) bool {
	on := make([][]wire.DeviceID, len(chunks))
	for i, c := range chunks {
		for _, h := range c.Holders {
			if !h.Lost {
				on[i] = append(on[i], h.Device)
			}
		}
	}
	return !slices.Contains(match(on), "")
}

// match gives as many chunks as can be a device of their own, of those that each is
// on: a maximum matching (Kuhn, 1955). "" is none. Devices that come first are
// preferred.
func match(on [][]wire.DeviceID) []wire.DeviceID {
	has := make(map[wire.DeviceID]int) // whose chunk it serves
	var give func(i int, seen map[wire.DeviceID]bool) bool
	give = func(i int, seen map[wire.DeviceID]bool) bool {
		for _, d := range on[i] {
			if seen[d] {
				continue
			}
			seen[d] = true
			if other, taken := has[d]; !taken || give(other, seen) {
				has[d] = i
				return true
			}
		}
		return false
	}
	for i := range on {
		give(i, make(map[wire.DeviceID]bool))
	}
	out := make([]wire.DeviceID, len(on))
	for d, i := range has {
		out[i] = d
	}
	return out
}
