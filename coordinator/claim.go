package coordinator

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// PendingRecord is a device that has proved its key, brought no token, and waits
// for somebody to claim it. Anybody can make one, so it is small and holds
// nothing that is not cut: what the device has found in itself is asked for
// again when it is a member.
type PendingRecord struct {
	Device    wire.DeviceID `json:"device"`
	PublicKey []byte        `json:"public_key"`
	Agent     string        `json:"agent"`
	OS        string        `json:"os"`
	Arch      string        `json:"arch"`
	Board     string        `json:"board"`
	Address   string        `json:"address"`
	First     time.Time     `json:"first"`
	Last      time.Time     `json:"last"`               // see pendingWrite
	Rejected  bool          `json:"rejected,omitempty"` // turned away; Last is when
}

const (
	// pendingLife is how long a device that does not come again is remembered,
	// and how long one that was rejected is turned away.
	pendingLife  = 24 * time.Hour
	pendingWrite = 10 * time.Minute // a device that asks again is written down so often
	pendingSweep = 10 * time.Minute
	// pendingKept is a little longer than pendingLife: the bucket's own limit
	// clears away what no coordinator was there to.
	pendingKept = pendingLife + time.Hour
	maxPending  = 10_000
	// A device asks again after retryMin, and later the more of them wait: all
	// together make maxPending/retryPer requests in retryMax.
	retryMin, retryMax, retryPer = 10, 600, 20 // seconds, seconds, devices a second
)

// waiting are the devices that wait to be claimed.
//
// The table is bounded. When it is full, the provider from whose networks most
// wait gives way, and of its networks the one from which most wait: whoever makes
// up keys pushes out its own, and the device that is alone in its network is the
// last to go. Of one network, those that came once and never
// again go first, the oldest of them before.
type waiting struct {
	rows  *table[PendingRecord]
	ca    [16]byte // the authority's fingerprint, for the codes
	now   func() time.Time
	most  int        // maxPending
	entry sync.Mutex // held while a new one is let in, so that the bound holds

	mu     sync.Mutex
	codes  map[string]wire.DeviceID
	codeOf map[wire.DeviceID]string
}

func newWaiting(ca [16]byte, now func() time.Time) *waiting {
	return &waiting{ca: ca, now: now, most: maxPending, codes: make(map[string]wire.DeviceID), codeOf: make(map[wire.DeviceID]string)}
}

// track keeps the index of codes; it is the table's onEach.
func (p *waiting) track(key string, v PendingRecord, gone bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := wire.DeviceID(key)
	code, known := p.codeOf[d]
	switch {
	case gone:
		delete(p.codes, code)
		delete(p.codeOf, d)
	case !known && len(v.PublicKey) == ed25519.PublicKeySize:
		code = wire.ClaimCode(v.PublicKey, p.ca)
		p.codes[code], p.codeOf[d] = d, code
	}
}

func (p *waiting) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.codeOf)
}

func (p *waiting) over(v PendingRecord) bool { return p.now().Sub(v.Last) >= pendingLife }

var errRejected = refuse(http.StatusForbidden, "rejected", "the fleet manager turned this device away; it can ask again a day after that, or be enrolled with a fleet token")

// knock notes that a device asks to be let in. q has been checked for the proof
// of its key.
func (p *waiting) knock(ctx context.Context, q wire.EnrolRequest, key ed25519.PublicKey, address string) (wire.EnrolPending, error) {
	id := wire.IDOf(key)
	now := p.now().UTC()
	fresh := PendingRecord{Device: id, PublicKey: key, Agent: label(q.Agent), OS: label(q.OS), Arch: label(q.Arch), Board: label(q.Board),
		Address: label(address), First: now, Last: now}
	if _, ok := p.rows.get(string(id)); !ok {
		p.entry.Lock()
		defer p.entry.Unlock()
		if err := p.makeRoom(ctx); err != nil {
			return wire.EnrolPending{}, err
		}
	}
	rec, err := p.rows.change(ctx, string(id), func(v *PendingRecord, exists bool) error {
		if !exists || p.over(*v) {
			*v = fresh
			return nil
		}
		if v.Rejected {
			return errRejected
		}
		next := fresh
		next.First, next.Last, next.Address = v.First, v.Last, v.Address // see site: a copied request moves nobody
		again := v.Last.Equal(v.First)                                   // that it came again is what saves it from makeRoom
		if !again && now.Sub(v.Last) < pendingWrite {
			return errUnchanged
		}
		next.Last = now
		if !next.Last.After(next.First) {
			next.Last = next.First.Add(1)
		}
		*v = next
		return nil
	})
	return wire.EnrolPending{Device: id, RetrySeconds: min(max(p.count()/retryPer, retryMin), retryMax), Expires: rec.Last.Add(pendingLife)}, err
}

// makeRoom drops a hundredth of a full table, so that a flood pays for one look
// at all of it in a hundred requests. entry is held.
func (p *waiting) makeRoom(ctx context.Context) error {
	over := p.count() + 1 - p.most
	if over <= 0 {
		return nil
	}
	var all []PendingRecord
	p.rows.each(func(_ string, v PendingRecord) bool {
		all = append(all, v)
		return true
	})
	rank := func(v PendingRecord) int {
		if v.Last.Equal(v.First) && !v.Rejected {
			return 0
		}
		return 1
	}
	slices.SortFunc(all, func(a, b PendingRecord) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), a.Last.Compare(b.Last)) })
	level(all, site)
	level(all, provider)
	for _, v := range all[:min(len(all), over+p.most/100)] {
		if err := p.remove(ctx, v.Device); err != nil {
			return err
		}
	}
	return nil
}

// level puts first who has the most others of its place behind it: so the largest
// place gives way until it is as large as the next.
func level(all []PendingRecord, place func(address string) string) {
	behind, of := make(map[wire.DeviceID]int, len(all)), make(map[string]int)
	for _, v := range slices.Backward(all) {
		where := place(v.Address)
		behind[v.Device] = of[where]
		of[where]++
	}
	slices.SortStableFunc(all, func(a, b PendingRecord) int { return cmp.Compare(behind[b.Device], behind[a.Device]) })
}

// full tells whether somebody may have been pushed out just now; makeRoom leaves
// room for a hundredth.
func (p *waiting) full() bool { return p.count() >= p.most-p.most/100 }

// site is whose addresses are believed to be one party's: an IPv4 /24, an IPv6 /48.
func site(address string) string {
	if p, ok := prefix(address, 24, 48); ok {
		return p.String()
	}
	return address
}

// provider is who gives out such addresses: an IPv4 /16, an IPv6 /32. There are
// 65,536 sites in one.
func provider(address string) string {
	if p, ok := prefix(address, 16, 32); ok {
		return p.String()
	}
	return address
}

// remove forgets a device that waits.
func (p *waiting) remove(ctx context.Context, d wire.DeviceID) error {
	err := p.rows.remove(ctx, string(d), func(PendingRecord) bool { return true })
	if errors.Is(err, errNotFound) {
		return nil
	}
	return err
}

// sweep forgets those that have not come again, and those that are members.
func (p *waiting) sweep(ctx context.Context, member func(wire.DeviceID) bool, log *slog.Logger) {
	var old []wire.DeviceID
	p.rows.each(func(_ string, v PendingRecord) bool {
		if p.over(v) || member(v.Device) {
			old = append(old, v.Device)
		}
		return true
	})
	for _, d := range old {
		if err := p.remove(ctx, d); err != nil {
			if ctx.Err() == nil {
				log.Warn("a device that waited to be claimed could not be forgotten; it will be tried again", "device", d, "error", err)
			}
			return
		}
	}
}

// find gives the device that shows a code.
func (p *waiting) find(code string) (PendingRecord, error) {
	code, err := wire.ParseClaimCode(code)
	if err != nil {
		return PendingRecord{}, refuse(http.StatusBadRequest, "bad_code", "%v", err)
	}
	p.mu.Lock()
	d, ok := p.codes[code]
	p.mu.Unlock()
	v, there := p.rows.get(string(d))
	switch found := ok && there && !p.over(v); {
	case !found && p.full():
		return v, refuse(http.StatusNotFound, wire.CodeNotFound,
			"no device waits under the code %s. The table of devices that wait is full (%d), and this one may have been pushed out: restart it so that it asks again, and claim it at once; or enrol it with a fleet token (\"deimos token create\")", code, p.most)
	case !found:
		return v, refuse(http.StatusNotFound, wire.CodeNotFound,
			"no device waits under the code %s; \"deimos device pending\" lists the codes of all that do. A device that shows a code which is not among them speaks with another coordinator, or somebody stands between", code)
	}
	return v, nil
}

// list is who waits, the longest first.
func (p *waiting) list(member func(wire.DeviceID) bool) []api.Pending {
	out := []api.Pending{}
	p.rows.each(func(_ string, v PendingRecord) bool {
		if !v.Rejected && !p.over(v) && !member(v.Device) {
			out = append(out, api.Pending{Code: wire.ClaimCode(v.PublicKey, p.ca), Device: v.Device, Agent: v.Agent, OS: v.OS, Arch: v.Arch, Board: v.Board,
				Address: v.Address, First: v.First, Last: v.Last, Expires: v.Last.Add(pendingLife)})
		}
		return true
	})
	slices.SortFunc(out, func(a, b api.Pending) int { return cmp.Or(a.First.Compare(b.First), cmp.Compare(a.Device, b.Device)) })
	return out
}

func (c *Coordinator) claimRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/claims", needs: toRead, summary: "List the devices that wait to be claimed", out: []api.Pending{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, c.waiting.list(c.reg.known))
			return nil
		}},
		{method: "POST", path: v1 + "/claims", needs: toOperate, summary: "Take in the device that shows a code", in: api.Claim{}, out: api.Device{}, handle: answer(c.claim)},
		{method: "DELETE", path: v1 + "/claims/{code}", needs: toOperate, summary: "Turn the device that shows a code away for a day", handle: func(w http.ResponseWriter, r *http.Request) error {
			err := c.rejectClaim(r.Context(), r.PathValue("code"))
			if err == nil {
				w.WriteHeader(http.StatusNoContent)
			}
			return err
		}},
	}
}

// claim makes a waiting device a member. Its next request is then a renewal like
// any other, so nothing of a claim is kept that could be used twice. The record
// of the member is written first: a crash leaves one too many that waits, which
// sweep clears away.
func (c *Coordinator) claim(r *http.Request, q api.Claim) (api.Device, error) {
	if err := checkPlace(q.Group, q.Labels); err != nil {
		return api.Device{}, err
	}
	p, err := c.waiting.find(q.Code)
	if err != nil {
		return api.Device{}, err
	}
	about(r.Context(), p.Device)
	defer c.enrolling.lock(string(p.Device))()
	made := false // by this call, and no other's, here or at another coordinator
	rec, err := c.reg.rows.change(r.Context(), string(p.Device), func(v *api.DeviceRecord, exists bool) error {
		made = !exists
		switch {
		case made:
			*v = api.DeviceRecord{
				ID: p.Device, PublicKey: p.PublicKey, Group: q.Group, Labels: q.Labels, Enrolled: c.now().UTC(),
				Agent: p.Agent, OS: p.OS, Arch: p.Arch, Board: p.Board,
			}
			return nil
		case v.Retired:
			return errRetired(p.Device)
		case v.Group != q.Group || !maps.Equal(v.Labels, q.Labels):
			return refuse(http.StatusConflict, "claimed", "device %s has become a member meanwhile, with another group or other labels; look at them with \"deimos device show\", change them with \"deimos device set\"", p.Device)
		}
		return errUnchanged
	})
	if err != nil {
		return api.Device{}, err
	}
	if !made {
		return c.reg.view(rec), c.waiting.remove(r.Context(), p.Device)
	}
	c.log.Info("device claimed", "device", p.Device, "group", q.Group, "board", p.Board, "from", p.Address)
	c.noteMember(r.Context(), rec, p.Address)
	return c.reg.view(rec), c.waiting.remove(r.Context(), p.Device)
}

// rejectClaim turns a device away. It keeps its record, as the reason to refuse it.
func (c *Coordinator) rejectClaim(ctx context.Context, code string) error {
	p, err := c.waiting.find(code)
	if err != nil {
		return err
	}
	about(ctx, p.Device)
	_, err = c.waiting.rows.change(ctx, string(p.Device), func(v *PendingRecord, exists bool) error {
		if !exists {
			return errNotFound
		}
		v.Rejected, v.Last = true, c.now().UTC()
		return nil
	})
	return err
}
