package coordinator

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// registry knows the devices. Records change rarely and are kept; whether a
// device is there, and its telemetry, change all the time and are held in
// memory, from the messages that every coordinator hears.
type registry struct {
	rows *table[api.DeviceRecord]
	log  *slog.Logger
	now  func() time.Time

	mu   sync.Mutex
	live map[wire.DeviceID]*live
}

// live is how a device is now.
type live struct {
	online    bool
	lastSeen  time.Time
	session   string // of the last hello
	capacity  int64
	used      int64
	telemetry json.RawMessage
}

// missedBeats is how many heartbeats may be missing before a device counts as away.
const missedBeats = 3

func (r *registry) device(id wire.DeviceID) (api.DeviceRecord, error) {
	d, ok := r.rows.get(string(id))
	if !ok {
		return d, refuse(404, wire.CodeNotFound, "there is no device %s; \"deimos device list\" shows all", id)
	}
	return d, nil
}

// authorize is the broker's question: may the holder of this certificate come in?
func (r *registry) authorize(_ context.Context, id wire.DeviceID, cert *x509.Certificate) error {
	d, ok := r.rows.get(string(id))
	key, isEd := cert.PublicKey.(ed25519.PublicKey)
	switch {
	case !ok:
		return fmt.Errorf("device %s is not enrolled", id)
	case d.Retired:
		return fmt.Errorf("device %s is retired", id)
	case !isEd || !key.Equal(ed25519.PublicKey(d.PublicKey)):
		return fmt.Errorf("the certificate is not device %s's", id)
	}
	return nil
}

func errRetired(id wire.DeviceID) error {
	return refuse(403, "retired", "device %s was retired and cannot enrol again", id)
}

// mayEnrol refuses a device that has been sent away.
func (r *registry) mayEnrol(id wire.DeviceID) error {
	if d, ok := r.rows.get(string(id)); ok && d.Retired {
		return errRetired(id)
	}
	return nil
}

// enrolled adds a device, or renews what is known of one with the same key.
func (r *registry) enrolled(ctx context.Context, d api.DeviceRecord) error {
	_, err := r.rows.change(ctx, string(d.ID), func(v *api.DeviceRecord, exists bool) error {
		if exists {
			if v.Retired {
				return errRetired(d.ID)
			}
			d.Enrolled = v.Enrolled
		}
		*v = d
		return nil
	})
	return err
}

// openFrom verifies a message that came on the topic of device id, and decodes
// it. It is of a registered device, signed by that device's key, and speaks for
// that device only.
func openFrom[T wire.Report | wire.Presence | wire.Beat](r *registry, id wire.DeviceID, t wire.PayloadType, raw []byte) (T, error) {
	var none T
	d, err := r.device(id)
	if err != nil {
		return none, err
	}
	v, err := wire.OpenAs[T](raw, ed25519.PublicKey(d.PublicKey), t)
	if err != nil {
		return none, err
	}
	var of wire.DeviceID
	switch m := any(v).(type) {
	case wire.Report:
		of = m.Device
	case wire.Presence:
		of = m.Device
	case wire.Beat:
		of = m.Device
	}
	if of != id {
		return none, fmt.Errorf("a message that speaks for device %q came on the topic of %s", of, id)
	}
	return v, nil
}

const maxSpace = 1 << 60 // bytes; no device has as much

// space is a device's word on its bytes, within reason: sums of it must not run over.
func space(n int64) int64 { return min(max(n, 0), maxSpace) }

const maxLabel = 64 // bytes

// label is what a device says of itself, fit for a record, a log and a
// terminal. It is cut and not refused: boards have the oddest names.
func label(s string) string {
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s))
	for i, r := range s {
		if i+utf8.RuneLen(r) > maxLabel {
			return s[:i]
		}
	}
	return s
}

// presence takes a hello or a last will. It returns true for a hello, which
// has to be answered.
func (r *registry) presence(ctx context.Context, p wire.Presence) (bool, error) {
	p.Capacity, p.Used = space(p.Capacity), space(p.Used)
	for _, s := range []*string{&p.Agent, &p.OS, &p.Arch, &p.Board, &p.Slot} {
		*s = label(*s)
	}
	r.mu.Lock()
	l := r.liveOf(p.Device)
	// The last will of an old session may come after the hello of a new one.
	if p.Online || p.Session == l.session {
		l.online, l.lastSeen = p.Online, r.now()
	}
	if p.Online {
		l.session, l.capacity, l.used = p.Session, p.Capacity, p.Used
	}
	r.mu.Unlock()
	if !p.Online {
		return false, nil
	}
	_, err := r.rows.change(ctx, string(p.Device), func(v *api.DeviceRecord, exists bool) error {
		if !exists {
			return errNotFound
		}
		old := [5]string{v.Agent, v.OS, v.Arch, v.Board, v.Slot}
		if old == [5]string{p.Agent, p.OS, p.Arch, p.Board, p.Slot} && v.Capacity == p.Capacity {
			return errUnchanged
		}
		v.Agent, v.OS, v.Arch, v.Board, v.Slot = p.Agent, p.OS, p.Arch, p.Board, p.Slot
		v.Capacity, v.Used = p.Capacity, p.Used
		return nil
	})
	return true, err
}

func (r *registry) beat(b wire.Beat) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.liveOf(b.Device)
	l.online, l.lastSeen, l.telemetry, l.capacity, l.used = true, r.now(), b.Telemetry, space(b.Capacity), space(b.Used)
}

// liveOf finds or makes the entry of a registered device (see openFrom). r.mu is
// held.
func (r *registry) liveOf(id wire.DeviceID) *live {
	l, ok := r.live[id]
	if !ok {
		l = &live{}
		r.live[id] = l
	}
	return l
}

// expire marks devices as away that have not been heard of for longer than after.
func (r *registry) expire(after time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.live {
		if l.online && r.now().Sub(l.lastSeen) > after {
			l.online = false
			r.log.Info("device is silent", "device", id, "last_seen", l.lastSeen.UTC().Format(time.RFC3339))
		}
	}
}

func (r *registry) online(id wire.DeviceID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l, ok := r.live[id]
	return ok && l.online
}

func (r *registry) view(d api.DeviceRecord) api.Device {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := api.Device{DeviceRecord: d}
	if l, ok := r.live[d.ID]; ok {
		v.Online, v.LastSeen, v.Telemetry = l.online, l.lastSeen, l.telemetry
		if l.capacity > 0 {
			v.Capacity, v.Used = l.capacity, l.used
		}
	}
	return v
}

// list is every device, sorted by id.
func (r *registry) list() []api.Device {
	out := []api.Device{}
	r.rows.each(func(_ string, d api.DeviceRecord) bool {
		out = append(out, api.Device{DeviceRecord: d})
		return true
	})
	slices.SortFunc(out, func(a, b api.Device) int { return cmp.Compare(a.ID, b.ID) })
	for i := range out {
		out[i] = r.view(out[i].DeviceRecord)
	}
	return out
}

// TokenRecord is what is kept of a fleet token: never the secret itself.
type TokenRecord struct {
	Group   string    `json:"group,omitempty"`
	Expires time.Time `json:"expires"`
	Uses    int       `json:"uses"` // left
	Created time.Time `json:"created"`
	// Devices lists who came in by it, so that an enrolment whose answer was
	// lost can be repeated without another use.
	Devices []wire.DeviceID `json:"devices,omitempty"`
}

var errTokenRefused = errors.New("the fleet token is unknown, used up or expired; ask the fleet manager for a new one (\"deimos token create\")")

// spend takes one use of a token for a device. The same device spends one use
// however often it asks.
func spend(ctx context.Context, tokens *table[TokenRecord], key string, d wire.DeviceID, now time.Time) (TokenRecord, error) {
	return tokens.change(ctx, key, func(t *TokenRecord, exists bool) error {
		switch {
		case !exists || now.After(t.Expires):
			return refuse(403, "token_refused", "%v", errTokenRefused)
		case slices.Contains(t.Devices, d):
			return errUnchanged
		case t.Uses <= 0:
			return refuse(403, "token_refused", "%v", errTokenRefused)
		}
		t.Uses--
		t.Devices = append(t.Devices, d)
		return nil
	})
}
