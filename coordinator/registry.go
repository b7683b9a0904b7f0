package coordinator

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
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

	// cut takes devices that must not be connected any more.
	cut chan wire.DeviceID
	// beatOf is the heartbeat interval that a device reports; 0 if it reports none.
	beatOf func(wire.DeviceID) time.Duration
	// away is the silence after which a device counts as away, where it does not say that it beats slower.
	away time.Duration
	// note puts on the audit log what nobody asked for.
	note func(context.Context, api.LogEntry)

	mu      sync.Mutex
	live    map[wire.DeviceID]*live
	retired map[wire.DeviceID]bool // the same as on record, for who holds mu
}

// maxCut is how many devices wait to be cut off. One that finds no place is cut
// off when it says something.
const maxCut = 1024

func newRegistry(log *slog.Logger, now func() time.Time) *registry {
	return &registry{log: log, now: now, beatOf: func(wire.DeviceID) time.Duration { return 0 }, note: func(context.Context, api.LogEntry) {}, cut: make(chan wire.DeviceID, maxCut), live: make(map[wire.DeviceID]*live), retired: make(map[wire.DeviceID]bool)}
}

// track sees every change of a record, whichever coordinator made it; it is the
// table's onEach. A retired device is cut off by all of them: one that did not
// know yet may have let it in again.
func (r *registry) track(_ string, d api.DeviceRecord, gone bool) {
	if gone || !d.Retired {
		return
	}
	r.mu.Lock()
	isNew := !r.retired[d.ID]
	r.retired[d.ID] = true
	delete(r.live, d.ID)
	r.mu.Unlock()
	if isNew {
		r.cutOff(d.ID)
	}
}

func (r *registry) cutOff(id wire.DeviceID) {
	select {
	case r.cut <- id:
	default: // see maxCut
	}
}

// live is how a device is now.
type live struct {
	online    bool
	left      bool // said by the last will of session
	lastSeen  time.Time
	session   string // of the last hello
	nonce     string // of the last hello
	capacity  int64
	used      int64
	telemetry json.RawMessage
	dropped   []wire.Dropped
	inventory string // digest of what it has; empty if it does not say
	losses    string // digest of what it has lost; empty if nothing
	scrubs    []wire.Scrub
	jobs      *wire.JobsState   // how it stands with jobs; nil if it does not say
	update    *wire.UpdateState // that is under way; nil if there is none
	health    []wire.Warning
	healthAt  time.Time // of the heartbeat that said so
	starts    starts
}

// missedBeats is how many heartbeats may be missing before a device counts as away.
const missedBeats = 3

func (r *registry) device(id wire.DeviceID) (api.DeviceRecord, error) {
	d, ok := r.rows.get(string(id))
	if !ok {
		return d, refuse(http.StatusNotFound, wire.CodeNotFound, "there is no device %s; \"deimos device list\" shows all", id)
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
	return refuse(http.StatusForbidden, wire.CodeRetired, "device %s was retired and cannot enrol again; a new key makes it a new device", id)
}

// known tells whether a device is on record, retired or not.
func (r *registry) known(id wire.DeviceID) bool {
	_, ok := r.rows.get(string(id))
	return ok
}

// member tells whether a device is on record and not retired.
func (r *registry) member(id wire.DeviceID) bool {
	d, ok := r.rows.get(string(id))
	return ok && !d.Retired
}

// written tells whether the record of a device that came in by a token is there.
func (r *registry) written(id wire.DeviceID, token string) bool {
	d, ok := r.rows.get(string(id))
	return ok && d.Token == token
}

// enrolled adds a device if isNew, or notes how long a member's new certificate
// lasts. Nothing else changes: the request may be a copy in other hands, and what
// a device says of itself comes in its signed hello.
func (r *registry) enrolled(ctx context.Context, d api.DeviceRecord, isNew bool) (api.DeviceRecord, error) {
	return r.rows.change(ctx, string(d.ID), func(v *api.DeviceRecord, exists bool) error {
		switch {
		case !exists && !isNew:
			return refuse(http.StatusConflict, "removed", "device %s was removed meanwhile; ask again", d.ID)
		case !exists:
			*v = d
			return nil
		case v.Retired:
			return errRetired(d.ID)
		}
		if v.CertUntil.Equal(d.CertUntil) || d.CertUntil.IsZero() {
			return errUnchanged
		}
		v.CertUntil = d.CertUntil
		return nil
	})
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
	if d.Retired {
		r.cutOff(id) // it should not be here
		return none, fmt.Errorf("device %s is retired", id)
	}
	v, err := wire.OpenAs[T](raw, ed25519.PublicKey(d.PublicKey), t)
	if err != nil {
		return none, err
	}
	var of wire.DeviceID
	switch m := any(v).(type) {
	case wire.Report:
		if of = m.Device; tooDeep(m.Body) {
			return none, fmt.Errorf("its report is nested more than %d deep", maxDepth)
		}
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

// said is what a message about presence is.
type said int

const (
	saidNothing said = iota // that has to be answered: a last will
	saidAgain               // a hello that was heard before, or was said before one that was
	saidHello
)

// presence takes a hello or a last will. A hello has to be answered; one that is
// stale changes nothing.
func (r *registry) presence(ctx context.Context, p wire.Presence) (said, error) {
	p.Capacity, p.Used = space(p.Capacity), space(p.Used)
	for _, s := range []*string{&p.Agent, &p.OS, &p.Arch, &p.Board, &p.Slot} {
		*s = label(*s)
	}
	what, twins := r.heard(p)
	if what != saidHello {
		return what, nil
	}
	var warned bool
	_, err := r.rows.change(ctx, string(p.Device), func(v *api.DeviceRecord, exists bool) error {
		if !exists {
			return errNotFound
		}
		warned = false
		changed := false
		if twins {
			changed, warned = warn(v, duplicateKey, r.now().UTC())
		}
		if p.Instance != "" && p.TimeConfidence == wire.ClockTrusted && p.At.Sub(v.Hello) >= helloWrite && p.At.Before(r.now().Add(maxAhead)) {
			v.Hello, changed = p.At.UTC(), true
		}
		old := [5]string{v.Agent, v.OS, v.Arch, v.Board, v.Slot}
		if !changed && old == [5]string{p.Agent, p.OS, p.Arch, p.Board, p.Slot} && v.Capacity == p.Capacity {
			return errUnchanged
		}
		v.Agent, v.OS, v.Arch, v.Board, v.Slot = p.Agent, p.OS, p.Arch, p.Board, p.Slot
		v.Capacity, v.Used = p.Capacity, p.Used
		return nil
	})
	if err == nil && warned {
		r.log.Warn("two machines use one device key; see \"deimos device show\"", "device", p.Device)
		r.note(ctx, api.LogEntry{Actor: "coordinator", Action: "device.duplicate-key", Targets: []string{string(p.Device)}})
	}
	return saidHello, err
}

// heard takes a hello or a last will into memory. twins is true if it shows that
// the device's key is used twice.
func (r *registry) heard(p wire.Presence) (what said, twins bool) {
	rec, _ := r.rows.get(string(p.Device))
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.liveOf(p.Device)
	if l == nil {
		return saidNothing, false // retired
	}
	if p.Online {
		stale := p.Nonce != "" && p.Nonce == l.nonce // a copy
		if !stale {
			l.starts.latest = later(l.starts.latest, rec.Hello) // of before a restart
			twins, stale = l.starts.hello(p, r.now())
		}
		if stale {
			return saidAgain, false
		}
		l.nonce = p.Nonce
	}
	// The last will of an old session may come after the hello of a new one.
	if p.Online || p.Session == l.session {
		l.online, l.left, l.lastSeen = p.Online, !p.Online, r.now()
	}
	if p.Online {
		l.session, l.capacity, l.used, l.dropped = p.Session, p.Capacity, p.Used, cleanDropped(p.Dropped)
		l.losses = p.Losses
		if isDigest(p.InventoryDigest) {
			l.inventory = p.InventoryDigest
		}
		return saidHello, twins
	}
	return saidNothing, false
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

const maxDropped = 16 // retention classes; there are a handful

func cleanDropped(list []wire.Dropped) []wire.Dropped {
	list = slices.Clone(list[:min(len(list), maxDropped)])
	for i := range list {
		list[i].Class = label(list[i].Class)
	}
	return list
}

func (r *registry) beat(b wire.Beat) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if tooDeep(b.Telemetry) {
		b.Telemetry = nil
	}
	if l := r.liveOf(b.Device); l != nil {
		l.online, l.left, l.lastSeen, l.telemetry, l.capacity, l.used = true, false, r.now(), b.Telemetry, space(b.Capacity), space(b.Used)
		l.health, l.healthAt = cleanWarnings(b.Warnings, r.now().UTC()), r.now().UTC()
		l.losses, l.scrubs, l.jobs, l.update = b.Losses, cleanScrubs(b.Scrubs), cleanJobs(b.Jobs), cleanUpdate(b.Update)
		if isDigest(b.InventoryDigest) {
			l.inventory = b.InventoryDigest
		}
	}
}

// inventoryOf is the digest of the inventory that a device has, by its own word;
// empty if it has not said so.
func (r *registry) inventoryOf(id wire.DeviceID) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l, ok := r.live[id]; ok {
		return l.inventory
	}
	return ""
}

// engineOf is what a device says that it runs jobs with; empty if it does not say.
func (r *registry) engineOf(id wire.DeviceID) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l, ok := r.live[id]; ok && l.jobs != nil {
		return l.jobs.Engine
	}
	return ""
}

// lossesOf is the digest of what a device has lost, by its own word; empty if it
// has lost nothing, or not said so in a form that can be compared.
func (r *registry) lossesOf(id wire.DeviceID) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l, ok := r.live[id]; ok && isDigest(l.losses) {
		return l.losses
	}
	return ""
}

// cleanScrubs makes fit to be shown what a device says of its volumes.
func cleanScrubs(list []wire.Scrub) []wire.Scrub {
	list = slices.Clone(list[:min(len(list), wire.MaxScrubs)])
	for i := range list {
		v := &list[i]
		v.Volume, v.Dir, v.Problem = label(v.Volume), label(v.Dir), cutText(sentence(v.Problem), maxWarningText)
		v.Share, v.Bytes, v.Lost = min(max(v.Share, 0), 1), space(v.Bytes), max(v.Lost, 0)
	}
	return list
}

// cleanUpdate makes fit to be shown what a device says of its update.
func cleanUpdate(u *wire.UpdateState) *wire.UpdateState {
	if u == nil {
		return nil
	}
	v := *u
	v.Phase, v.Version, v.Code, v.Seconds = label(v.Phase), label(v.Version), label(v.Code), max(v.Seconds, 0)
	return &v
}

// maxJobsNames bounds the datasets and walls that a device tells of.
const maxJobsNames = 64

// cleanJobs makes fit to be shown what a device says of its jobs.
func cleanJobs(j *wire.JobsState) *wire.JobsState {
	if j == nil {
		return nil
	}
	v := *j
	v.Engine = label(v.Engine)
	v.Slots, v.Running, v.Waiting = min(max(v.Slots, 0), maxJobSlots), max(v.Running, 0), max(v.Waiting, 0)
	v.MemoryBytes, v.InputBytes, v.OutputBytes = space(v.MemoryBytes), space(v.InputBytes), space(v.OutputBytes)
	if v.DiskBytes != nil {
		v.DiskBytes = new(space(*v.DiskBytes))
	}
	names := func(list []string) []string {
		list = slices.Clone(list[:min(len(list), maxJobsNames)])
		for i := range list {
			list[i] = label(list[i])
		}
		return list
	}
	v.Walls, v.Datasets = names(v.Walls), names(v.Datasets)
	if v.Pause != nil {
		v.Pause = &wire.Pause{Code: label(v.Pause.Code), Seconds: max(v.Pause.Seconds, 0)}
	}
	return &v
}

// maxJobSlots is the most jobs at a time that a device is believed to run.
const maxJobSlots = 256

// seen is told of every verified report, which is a sign of life as a beat is:
// on a slow link beats may be lost while reports come. One that was still on its
// way when the device left brings it back to nobody.
func (r *registry) seen(id wire.DeviceID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.liveOf(id); l != nil && !l.left {
		l.online, l.lastSeen = true, r.now()
	}
}

// liveOf finds or makes the entry of a registered device (see openFrom); it is
// nil for one that was retired since its message was opened. r.mu is held.
func (r *registry) liveOf(id wire.DeviceID) *live {
	if r.retired[id] {
		return nil
	}
	l, ok := r.live[id]
	if !ok {
		l = &live{}
		r.live[id] = l
	}
	return l
}

// expire marks devices as away that have not been heard of for longer than
// away, or missedBeats of their own intervals, whichever is more.
func (r *registry) expire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, l := range r.live {
		if l.online && r.now().Sub(l.lastSeen) > max(r.away, missedBeats*r.beatOf(id)) {
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

// heardLately tells whether a device was heard in the time after which it would count as away.
func (r *registry) heardLately(id wire.DeviceID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l, ok := r.live[id]
	return ok && l.online && r.now().Sub(l.lastSeen) <= max(r.away, missedBeats*r.beatOf(id))
}

// runsJobs tells whether a device says how it stands with jobs, and its owner does not want them
// to stand still.
func (r *registry) runsJobs(id wire.DeviceID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	l, ok := r.live[id]
	return ok && l.jobs != nil && l.jobs.Pause == nil
}

// mayWork tells whether a device can be given new work: it is there, and nothing
// speaks against it.
func (r *registry) mayWork(id wire.DeviceID) bool {
	d, ok := r.rows.get(string(id))
	return ok && !d.Retired && !standing(d, api.WarningDuplicateKey, r.now()) && r.online(id)
}

func (r *registry) view(d api.DeviceRecord) api.Device {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := api.Device{DeviceRecord: d}
	v.Warnings = nil
	for _, w := range d.Warnings {
		if r.now().Sub(w.Last) < warningLife {
			v.Warnings = append(v.Warnings, w)
		}
	}
	if l, ok := r.live[d.ID]; ok {
		v.Online, v.LastSeen, v.Telemetry, v.Dropped = l.online, l.lastSeen, l.telemetry, l.dropped
		v.Health, v.HealthAt, v.Scrubs, v.Jobs, v.Update = l.health, l.healthAt, l.scrubs, l.jobs, l.update
		if l.capacity > 0 {
			v.Capacity, v.Used = l.capacity, l.used
		}
	}
	v.Online = v.Online && !d.Retired
	v.State = stateOf(d, v.Online)
	return v
}

func stateOf(d api.DeviceRecord, online bool) api.DeviceState {
	switch {
	case d.Retired:
		return api.DeviceRetired
	case online:
		return api.DeviceOnline
	}
	return api.DeviceOffline
}

// list is every device, sorted by id.
func (r *registry) list() []api.Device {
	records := r.rows.all(func(a, b api.DeviceRecord) int { return cmp.Compare(a.ID, b.ID) })
	out := make([]api.Device, len(records))
	for i, d := range records {
		out[i] = r.view(d)
	}
	return out
}
