package coordinator

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sync/singleflight"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
	"github.com/oklog/ulid/v2"
)

// chunkRecord is where a chunk is and which objects need it. The coordinator
// keeps its root and size, never its bytes.
type chunkRecord struct {
	ID      string       `json:"id"`
	Size    int64        `json:"size"`
	Holders []api.Holder `json:"holders"`
	Refs    []string     `json:"refs,omitempty"` // keys of object records
	// Want is how many copies there should be; 0, in a record of before it was kept,
	// is as many as were ever made. See [chunkRecord.wanted].
	Want int `json:"want,omitempty"`
	// Until is how long it is kept at least though no object has it: it is an output
	// of a job.
	Until time.Time `json:"until,omitzero"`
	// Used is when it was last placed or claimed; see [storage.dropOrphans].
	Used time.Time `json:"used,omitzero"`
}

// alive counts the holders that have not lost it.
func (c chunkRecord) alive() int {
	n := 0
	for _, h := range c.Holders {
		if !h.Lost {
			n++
		}
	}
	return n
}

// storage places chunks on devices and gets them back.
type storage struct {
	wait    time.Duration   // for a device to serve a chunk; serveWait
	life    context.Context // of the coordinator
	chunks  *table[chunkRecord]
	objects *table[api.Object]
	staging *staging
	outbox  *outbox
	reg     *registry
	auth    *authority
	log     *slog.Logger

	placing keyed // one placement or removal of a chunk at a time
	naming  keyed // one change of an object's name at a time
	// choosing is one device at a time for the shards of a stripe.
	choosing keyed
	reading  singleflight.Group
	coming   arrivals

	stripes  stripes
	networks networks
	resting  resting
	trust    func(wire.DeviceID) float64 // 0: gets nothing new
	// missed has the score hear of a chunk that a device did not have when it was read.
	missed  func(ctx context.Context, d wire.DeviceID, id, order string) error
	durable func(buckets ...string) error // see [engine.Engine.Durable]
	leaving func(wire.DeviceID) bool      // gets nothing new either
	// intended are devices that are about to be ordered to drop a chunk.
	intended func(id string) []wire.DeviceID
	// touched is told of every change of a chunk's record.
	touched func(ids ...string)

	mu    sync.Mutex
	holds map[wire.DeviceID]map[string]int64 // chunk id → size, of what each device should hold
	where map[string][]spotOn                // the same, seen from the chunk
	on    map[wire.DeviceID]map[string]int   // volume → how many of them, by the receipts
}

const (
	storeLife = 10 * time.Minute // of a chunk.store order
	storeWait = time.Minute      // until another device is asked as well
	serveLife = 2 * time.Minute  // and what the slowest line takes, see serveLifeOf
	serveWait = 15 * time.Second // without a byte, until the next holder is asked
	// slowestLine is the least rate that an owner can set, in bytes a second.
	slowestLine = 16 << 10
	// dropLife is as long as an order can live: nobody asks again for what a device that
	// was away for longer should drop.
	dropLife = maxLife
	dropWait = 5 * time.Second // for a drop, before its device is passed over
	dropPart = 500             // chunks in one order: well below a message's size
	// orphanLife is how long a chunk is kept for an object that is still being
	// put: the largest takes a day at 1 Mbit/s.
	orphanLife  = 24 * time.Hour
	orphanSweep = time.Hour
	servedSweep = 5 * time.Minute
	maxReplica  = 16
	// defaultReplicas lets one device be down.
	defaultReplicas = 2
)

// trackChunk keeps holds; it is the chunk table's onEach.
func (s *storage) trackChunk(id string, c chunkRecord, gone bool) {
	defer s.touched(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.where[id] {
		delete(s.holds[at.device], id)
		if s.on[at.device][at.volume]--; s.on[at.device][at.volume] == 0 {
			delete(s.on[at.device], at.volume)
		}
	}
	delete(s.where, id)
	if gone {
		return
	}
	for _, h := range c.Holders {
		if h.Lost {
			continue
		}
		if s.holds[h.Device] == nil {
			s.holds[h.Device] = make(map[string]int64)
			s.on[h.Device] = make(map[string]int)
		}
		s.holds[h.Device][id] = c.Size
		s.on[h.Device][h.Volume]++
		s.where[id] = append(s.where[id], spotOn{h.Device, h.Volume})
	}
}

// spotOn is where a chunk is, by a receipt.
type spotOn struct {
	device wire.DeviceID
	volume string
}

// volumeOf is where a device has a chunk, by its receipt; "" where there is none.
func (s *storage) volumeOf(d wire.DeviceID, id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.where[id] {
		if at.device == d {
			return at.volume
		}
	}
	return ""
}

// volumes are those of a device that chunks are on, by its receipts.
func (s *storage) volumes(d wire.DeviceID) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.on[d]))
}

// held lists what a device should hold, in a fixed order.
func (s *storage) held(d wire.DeviceID) []api.Chunk {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]api.Chunk, 0, len(s.holds[d]))
	for id, size := range s.holds[d] {
		out = append(out, api.Chunk{ID: id, Size: size})
	}
	slices.SortFunc(out, func(a, b api.Chunk) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// volumeFailed is the code of the warning of a device that cannot reach a volume
// (hw/health).
const volumeFailed = "volume_failed"

// volumesAway are those that chunks are on, by their receipts, and that a device
// which warns of one does not have open.
func (s *storage) volumesAway(d wire.DeviceID) (away []string) {
	rec, ok := s.reg.rows.get(string(d))
	if !ok {
		return nil
	}
	v := s.reg.view(rec)
	warned := slices.ContainsFunc(v.Health, func(w wire.Warning) bool { return w.Code == volumeFailed })
	if !warned || len(v.Scrubs) >= wire.MaxScrubs { // of more it does not tell
		return nil
	}
	for _, volume := range s.volumes(d) {
		open := slices.ContainsFunc(v.Scrubs, func(x wire.Scrub) bool { return x.Volume == volume })
		if !open && isVolume(volume) {
			away = append(away, volume)
		}
	}
	return away
}

// claims are what a device has signed for: chunk id → store order. Another
// order is another claim, even on the same chunk.
type claims map[string]string

// claims lists a device's for some chunks.
func (s *storage) claims(d wire.DeviceID, ids []string) claims {
	out := make(claims, len(ids))
	for _, id := range ids {
		out[id] = s.claim(d, id)
	}
	return out
}

// claim is "" where there is none. One that the device has lost still is one.
func (s *storage) claim(d wire.DeviceID, id string) string {
	c, _ := s.chunks.get(id)
	for _, h := range c.Holders {
		if h.Device == d {
			return h.Order
		}
	}
	return ""
}

// released tells which chunks a device need not have any more since it had been
// asked for them: their record is gone, or an order to drop them is out.
func (s *storage) released(d wire.DeviceID, before claims) map[string]bool {
	out := make(map[string]bool)
	for id, order := range before {
		if order == "" || s.claim(d, id) != order {
			out[id] = true
		}
	}
	for _, v := range s.outbox.unfinished(wire.KindChunkDrop) {
		if b, err := wire.DecodeBody[wire.ChunkDrop](v.Order); err == nil && v.Order.Device == d {
			for _, id := range b.IDs {
				out[id] = true
			}
		}
	}
	return out
}

// place makes sure that replicas devices hold the chunk, and returns when each
// has given its receipt. data is checked against id first. With a stripe's
// token, it is on a device that has no other chunk of the stripe.
func (s *storage) place(ctx context.Context, id string, data []byte, replicas int, token string) (chunkRecord, error) {
	if replicas < 1 || replicas > maxReplica {
		return chunkRecord{}, refuse(http.StatusBadRequest, "bad_replicas", "replicas must be 1 to %d", maxReplica)
	}
	if token != "" && (replicas != 1 || len(token) > api.MaxStripeToken) {
		return chunkRecord{}, refuse(http.StatusBadRequest, "bad_stripe", "a shard of a stripe has one replica, and the stripe's token at most %d bytes", api.MaxStripeToken)
	}
	ref, err := parseBlobRef(string(chunkBlob), id)
	if err == nil {
		err = verifyBlob(ref, data)
	}
	if err != nil {
		return chunkRecord{}, refuse(http.StatusBadRequest, wire.CodeMismatch, "%v", err)
	}
	defer s.placing.lock(id)()
	asked := replicas
	if c, ok := s.chunks.get(id); ok {
		if token == "" && c.alive() >= replicas || token != "" && s.settled(token, c) {
			return s.use(ctx, c, replicas)
		}
		if token != "" { // it is where another shard of the stripe is: one copy more
			replicas = c.alive() + 1
		}
	}
	if err := s.staging.put(ctx, ref.String(), data); err != nil {
		return chunkRecord{}, err
	}
	// Once it is placed, reads come from devices: the staged copy must not
	// hide that they cannot.
	defer func() {
		if err := s.staging.drop(context.WithoutCancel(ctx), ref.String()); err != nil {
			s.log.Warn("a staged chunk stays until it expires", "chunk", id, "error", err)
		}
	}()
	return s.spread(ctx, ref, int64(len(data)), asked, replicas, token)
}

// use keeps a chunk that is there from being taken for an orphan. A write each
// hour is enough for that.
func (s *storage) use(ctx context.Context, c chunkRecord, replicas int) (chunkRecord, error) {
	now := s.outbox.now().UTC()
	asked := c
	if asked.ask(replicas); now.Sub(c.Used) < orphanSweep && asked.Want == c.Want {
		return c, nil
	}
	return s.chunks.change(ctx, c.ID, func(c *chunkRecord, exists bool) error {
		if !exists {
			return refuse(http.StatusConflict, "chunk_missing", "the chunk was removed meanwhile; store the file again")
		}
		c.Used = now
		c.ask(replicas)
		return nil
	})
}

// spread asks devices until replicas have given a receipt or none is left to ask.
// want is how many there should be from then on.
func (s *storage) spread(ctx context.Context, ref blobRef, size int64, want, replicas int, token string) (chunkRecord, error) {
	c, err := s.chunks.change(ctx, ref.id, func(c *chunkRecord, exists bool) error {
		if !exists {
			*c = chunkRecord{ID: ref.id, Size: size}
		}
		c.ask(want)
		c.Used = s.outbox.now().UTC()
		return nil
	})
	if err != nil {
		return c, err
	}
	var asked []wire.DeviceID
	for _, h := range c.Holders {
		if !h.Lost {
			asked = append(asked, h.Device)
		}
	}
	var failed error
	patient, done := context.WithTimeout(ctx, storeWait)
	defer done()
	for c.alive() < replicas {
		missing := replicas - c.alive()
		next := s.free(ctx, ref.id, size, asked, missing, token)
		if len(next) < missing && s.awaitRested(patient, ref.id, token, size, slices.Concat(asked, next)) {
			continue
		}
		if len(next) < missing {
			return c, s.tooFew(replicas, c.alive()+len(next), token, failed)
		}
		asked = append(asked, next...)
		type tried struct {
			device wire.DeviceID
			err    error
		}
		results := make(chan tried, len(next))
		for _, d := range next {
			go func() {
				err := s.storeOn(ctx, d, ref, size)
				if err != nil && token != "" {
					s.stripes.leave(token, d)
				}
				results <- tried{d, err}
			}()
		}
		for range next {
			r := <-results
			if err := r.err; err != nil {
				failed = err
				if wire.ProblemOf(err).Code == wire.CodeBusy { // it may be asked again when it has rested
					asked = slices.DeleteFunc(asked, func(d wire.DeviceID) bool { return d == r.device })
				}
				s.log.Warn("a device did not take a chunk; asking another", "chunk", ref.id, "error", err)
			}
		}
		if ctx.Err() != nil {
			return c, ctx.Err()
		}
		c, _ = s.chunks.get(ref.id)
	}
	return c, nil
}

// awaitRested waits for the first of the devices that could take a chunk, but for
// disks that are too slow at the moment. It returns false if there is none, or if
// ctx ends before.
func (s *storage) awaitRested(ctx context.Context, id, token string, size int64, asked []wire.DeviceID) bool {
	not := slices.Concat(asked, s.lettingGo(id, s.dropping(id)))
	able, _ := s.offers(s.resting.serves, token, size, not)
	until := s.resting.busyUntil(func(d wire.DeviceID) bool {
		return slices.ContainsFunc(able, func(o offer) bool { return o.device == d })
	})
	if until.IsZero() {
		return len(s.candidates(token, size, not, 1)) > 0 // it has rested meanwhile
	}
	wait := time.NewTimer(until.Sub(s.outbox.now()))
	defer wait.Stop()
	select {
	case <-wait.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *storage) tooFew(want, have int, token string, last error) error {
	reason, way := fmt.Sprintf("%d devices with room are needed, %d can be found", want, have), "store fewer copies with --replicas"
	if token != "" {
		reason, way = "no device with room is left that has no other shard of the same stripe", "store with fewer shards by --code"
	}
	if last != nil {
		reason += fmt.Sprintf(" (one said: %v)", last)
	}
	if n := s.resting.count(); n > 0 {
		reason += fmt.Sprintf("; %d that refuse chunks for a while are left alone (\"deimos device show\" says until when)", n)
	}
	return refuse(http.StatusServiceUnavailable, "too_few_devices", "%s; add devices, or %s", reason, way)
}

// free are n candidates for a chunk, or less if there are not as many. A device
// that still has to drop this chunk is not asked to store it, because the two
// orders may arrive in any order; where no other is left, the drop is waited for.
func (s *storage) free(ctx context.Context, id string, size int64, asked []wire.DeviceID, n int, token string) []wire.DeviceID {
	ctx, cancel := context.WithTimeout(ctx, dropWait)
	defer cancel()
	for {
		drops := s.dropping(id)
		next := s.choose(token, id, size, slices.Concat(asked, s.lettingGo(id, drops)), n)
		if len(next) == n || !s.awaitAny(ctx, drops) {
			return next
		}
	}
}

// choose draws candidates, and reserves the one of a stripe before another shard of
// it looks whose devices are taken: else both could go to one owner.
func (s *storage) choose(token, id string, size int64, not []wire.DeviceID, n int) []wire.DeviceID {
	if token == "" {
		return s.candidates(token, size, not, n)
	}
	defer s.choosing.lock(token)()
	for {
		next := s.candidates(token, size, not, n)
		if len(next) == 0 || s.stripes.take(token, next[0], id) {
			return next
		}
		// A shard that was there already has come between.
	}
}

// lettingGo are the devices that are about to be ordered to drop a chunk, or are by
// drops.
func (s *storage) lettingGo(id string, drops []wire.Order) []wire.DeviceID {
	out := s.intended(id)
	for _, o := range drops {
		out = append(out, o.Device)
	}
	return out
}

// awaitAny returns true when one of the orders to devices that are there has ended.
func (s *storage) awaitAny(ctx context.Context, orders []wire.Order) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan bool, len(orders))
	n := 0
	for _, o := range orders {
		if !s.reg.online(o.Device) {
			continue
		}
		n++
		go func() {
			_, err := s.outbox.await(ctx, o, nil)
			ended <- err == nil
		}()
	}
	for range n {
		if <-ended {
			return true
		}
	}
	return false
}

// dropping lists the orders to drop a chunk that are not done yet.
func (s *storage) dropping(id string) []wire.Order {
	var out []wire.Order
	for _, v := range s.outbox.unfinished(wire.KindChunkDrop) {
		if b, err := wire.DecodeBody[wire.ChunkDrop](v.Order); err == nil && slices.Contains(b.IDs, id) {
			out = append(out, v.Order)
		}
	}
	return out
}

// storeOn asks one device and keeps its receipt.
func (s *storage) storeOn(ctx context.Context, d wire.DeviceID, ref blobRef, size int64) error {
	u := s.auth.issue(ticket{method: http.MethodGet, device: d, blob: ref, size: size, expires: s.outbox.now().Add(storeLife)})
	o, err := s.outbox.submit(ctx, d, wire.KindChunkStore, wire.ChunkStore{ID: ref.id, Size: size, URL: u}, storeLife)
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, storeWait)
	defer cancel()
	v, err := s.outbox.await(wait, o, nil)
	if err != nil {
		go s.late(o, ref, size)
		return fmt.Errorf("device %s has not answered: %w", d, err)
	}
	return s.receipt(ctx, v, ref, size)
}

// late waits for a receipt that nobody waits for any more: what a device holds
// has to be known, or it could never be dropped.
func (s *storage) late(o wire.Order, ref blobRef, size int64) {
	v, err := s.outbox.await(s.life, o, nil) // the outbox ends every order
	if err == nil {
		defer s.placing.lock(ref.id)()
		err = s.receipt(s.life, v, ref, size)
	}
	if err != nil && s.life.Err() == nil {
		s.log.Warn("a device did not take a chunk that it was given more time for", "chunk", ref.id, "error", err)
	}
}

// resume waits for the receipts that were asked for before a restart.
func (s *storage) resume() {
	for _, v := range s.outbox.unfinished(wire.KindChunkStore) {
		b, err := wire.DecodeBody[wire.ChunkStore](v.Order)
		if err != nil {
			s.log.Warn("an order to store a chunk is not waited for", "order", v.Order.ID, "error", err)
			continue
		}
		go s.late(v.Order, blobRef{chunkBlob, b.ID}, b.Size)
	}
}

// receipt keeps what a device has signed for.
func (s *storage) receipt(ctx context.Context, v OrderRecord, ref blobRef, size int64) error {
	o, d := v.Order, v.Order.Device
	if err := succeeded(v); err != nil {
		return fmt.Errorf("device %s: %w", d, err)
	}
	var r wire.Receipt
	if err := json.Unmarshal(v.Result.Body, &r); err != nil || r.ID != ref.id || r.Size != size {
		return fmt.Errorf("device %s gave a receipt for something else", d)
	}
	_, err := s.chunks.change(ctx, ref.id, func(c *chunkRecord, exists bool) error {
		if !exists {
			*c = chunkRecord{ID: ref.id, Size: size, Used: s.outbox.now().UTC()}
		}
		c.Holders = slices.DeleteFunc(c.Holders, func(h api.Holder) bool { return h.Device == d })
		c.Holders = append(c.Holders, api.Holder{Device: d, Volume: r.Volume, Order: o.ID, Since: s.outbox.now().UTC()})
		return nil
	})
	return err
}

// read fetches a chunk from a device that holds it, the next if one fails. What
// it returns has been checked against the id.
func (s *storage) read(ctx context.Context, id string, not ...wire.DeviceID) ([]byte, error) {
	c, ok := s.chunks.get(id)
	if !ok {
		return nil, refuse(http.StatusNotFound, wire.CodeNotFound, "no device is known to hold chunk %s", id)
	}
	// Readers of the same chunk share one fetch.
	got := s.reading.DoChan(id+fmt.Sprint(not), func() (any, error) {
		ctx, cancel := outlive(ctx, s.life)
		defer cancel()
		ctx, cancel = context.WithTimeout(ctx, serveLifeOf(c.Size))
		defer cancel()
		return s.readAny(ctx, c, not)
	})
	select {
	case r := <-got:
		data, _ := r.Val.([]byte)
		return data, r.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *storage) readAny(ctx context.Context, c chunkRecord, not []wire.DeviceID) ([]byte, error) {
	holders := slices.Clone(c.Holders)
	rand.Shuffle(len(holders), func(i, j int) { holders[i], holders[j] = holders[j], holders[i] })
	// Those whose disks are too slow at the moment come last.
	slices.SortStableFunc(holders, func(a, b api.Holder) int { return cmp.Compare(s.slow(a.Device), s.slow(b.Device)) })
	tried := 0
	var rests *api.Rest
	var last error
	for _, h := range holders {
		if h.Lost || slices.Contains(not, h.Device) || !s.reg.online(h.Device) {
			continue
		}
		if !s.resting.serves(h.Device) {
			rests = s.resting.of(h.Device)
			continue
		}
		tried++
		data, err := s.readFrom(ctx, h.Device, c)
		if err == nil {
			return data, nil
		}
		last = err
		s.log.Warn("a device did not serve a chunk; asking the next", "chunk", c.ID, "error", err)
	}
	if tried == 0 && rests != nil {
		return nil, atRest("every device that is online and holds chunk "+c.ID, rests)
	}
	if tried == 0 {
		now, ok := s.chunks.get(c.ID) // it may have been removed meanwhile
		switch n := now.alive(); {
		case !ok:
			return nil, refuse(http.StatusNotFound, wire.CodeNotFound, "chunk %s was removed while it was read", c.ID)
		case n == 0:
			return nil, refuse(http.StatusGone, wire.CodeLost, "every device that held chunk %s has lost it, or was retired", c.ID)
		default:
			return nil, refuse(http.StatusServiceUnavailable, "no_holder_online",
				"none of the %d devices that hold chunk %s is online; try again when one is (\"deimos device list\")", n, c.ID)
		}
	}
	return nil, refuse(http.StatusServiceUnavailable, "unreadable", "chunk %s cannot be read now; the last device said: %v", c.ID, last)
}

// slow is 1 of a device whose disks are too slow at the moment.
func (s *storage) slow(d wire.DeviceID) int {
	if s.resting.of(d) != nil {
		return 1
	}
	return 0
}

// atRest is why nothing can be read now; r may be nil, if it has ended meanwhile.
func atRest(who string, r *api.Rest) error {
	if r == nil {
		r = &api.Rest{Code: wire.CodeBusy}
	}
	when := "soon"
	if !r.Until.IsZero() {
		when = "at " + r.Until.Format(time.RFC3339)
	}
	return refuse(http.StatusServiceUnavailable, r.Code, "%s moves no chunks now (%s); try again %s", who, r.Code, when)
}

// relay reads a chunk for a device that does not hold it. What was read is
// remembered for a while: it may come again for the rest, and others for the same.
func (s *storage) relay(ctx context.Context, ref blobRef) ([]byte, error) {
	if data, ok := s.staging.recall(ref.String()); ok {
		return data, nil
	}
	data, err := s.read(ctx, ref.id)
	if err == nil {
		s.staging.remember(ref.String(), data)
	}
	return data, err
}

// readHolder fetches a chunk from one device that should hold it.
func (s *storage) readHolder(ctx context.Context, id string, d wire.DeviceID) ([]byte, error) {
	c, ok := s.chunks.get(id)
	i := slices.IndexFunc(c.Holders, func(h api.Holder) bool { return h.Device == d })
	switch {
	case !ok || i < 0:
		return nil, refuse(http.StatusNotFound, wire.CodeNotFound, "device %s is not known to hold chunk %s", d, id)
	case c.Holders[i].Lost:
		return nil, refuse(http.StatusGone, wire.CodeLost, "device %s has lost chunk %s", d, id)
	case !s.reg.online(d):
		return nil, refuse(http.StatusServiceUnavailable, "offline", "device %s is offline; try again when it is there", d)
	case !s.resting.serves(d):
		return nil, atRest("device "+string(d), s.resting.of(d))
	}
	ctx, cancel := context.WithTimeout(ctx, serveLifeOf(c.Size))
	defer cancel()
	data, err := s.readFrom(ctx, d, c)
	if err != nil {
		return nil, s.unserved(d, err)
	}
	return data, nil
}

// errSilent is the error of a device that said nothing in the time that it had.
var errSilent = errors.New("has not answered")

// unserved is the refusal for who asked one device: "unreadable" only for what the
// device itself has said of its chunk. That it is slow, or cannot for now, is another
// thing, and what is the coordinator's own fault is none of the device's.
func (s *storage) unserved(d wire.DeviceID, err error) error {
	var said *wire.Problem
	switch {
	case errors.Is(err, errSilent):
		return refuse(http.StatusServiceUnavailable, codeNoAnswer, "%v; it or its line may be slow, try again later", err)
	case !errors.As(err, &said):
		return err
	}
	switch said.Code {
	case wire.CodeLost, wire.CodeNotFound, wire.CodeUnreachable, wire.CodeMetered, wire.CodeQuietHours, wire.CodeBusy:
		return refuse(http.StatusServiceUnavailable, said.Code, "device %s: %v", d, said)
	case codeNoAnswer, wire.CodeLimit, wire.CodeTransfer, wire.CodeCanceled, wire.CodeInterrupted, wire.CodeExpired:
		return refuse(http.StatusServiceUnavailable, codeNoAnswer, "device %s did not serve the chunk in time: %v; try again later", d, said)
	}
	return refuse(http.StatusServiceUnavailable, "unreadable", "device %s: %v", d, said)
}

// readFrom fetches the chunk from one device, and notes if it says that it is
// lost.
func (s *storage) readFrom(ctx context.Context, d wire.DeviceID, c chunkRecord) ([]byte, error) {
	asked := s.claims(d, []string{c.ID})
	data, err := s.served(ctx, d, c, asked)
	s.noteMissing(context.WithoutCancel(ctx), d, c.ID, asked, err)
	return data, err
}

// noteMissing notes that a device, by its own word, does not have a chunk that it was
// told to serve when its claims were those that are given. What it has given a receipt
// for since is there.
func (s *storage) noteMissing(ctx context.Context, d wire.DeviceID, id string, asked claims, served error) {
	var n *notServed
	if !errors.As(served, &n) || !saysLost(n.problem.Code) {
		return
	}
	// Before the holder is: one that is lost owes nothing any more.
	if !s.released(d, asked)[id] {
		if err := s.missed(ctx, d, id, n.order); err != nil {
			s.log.Warn("a loss that a read found does not count for now: it could not be noted", "device", d, "chunk", id, "error", err)
			return
		}
	}
	if err := s.lostThat(ctx, d, []string{id}, func(h api.Holder) bool { return h.Order == asked[id] }); err != nil {
		s.log.Warn("a loss could not be noted", "chunk", id, "error", err)
	}
}

// saysLost tells by the code of a device's answer whether it does not have a chunk.
func saysLost(code string) bool { return code == wire.CodeLost || code == wire.CodeNotFound }

// notServed is what a device says that does not serve a chunk.
type notServed struct {
	order   string // whose signed report says so
	problem *wire.Problem
}

func (n *notServed) Error() string { return n.problem.Error() }
func (n *notServed) Unwrap() error { return n.problem }

// served has one device put the chunk on the data plane.
func (s *storage) served(ctx context.Context, d wire.DeviceID, c chunkRecord, asked claims) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	id, life := ulid.Make().String(), serveLifeOf(c.Size)
	u := s.auth.issue(ticket{method: http.MethodPut, device: d, blob: blobRef{servedBlob, c.ID}, size: c.Size, expires: s.outbox.now().Add(life), order: id})
	o, err := s.outbox.submitAs(ctx, id, d, wire.KindChunkServe, wire.ChunkServe{ID: c.ID, URL: u}, life)
	if err != nil {
		return nil, err
	}
	wait, done := s.coming.wait(ctx, id, s.wait)
	defer done()
	v, err := s.outbox.await(wait, o.Order, nil)
	if err != nil {
		go s.unserve(o.Order, c.ID, asked)
		return nil, fmt.Errorf("device %s %w: %w", d, errSilent, cmp.Or(context.Cause(wait), err))
	}
	if err := succeeded(v); err != nil {
		return nil, &notServed{id, wire.ProblemOf(err)}
	}
	data, err := s.staging.get(ctx, servedName(id))
	if err != nil {
		return nil, fmt.Errorf("device %s says that it served chunk %s, but it is not here: %w", d, c.ID, err)
	}
	if err := s.staging.drop(ctx, servedName(id)); err != nil {
		return nil, err
	}
	return data, nil
}

// unserve takes back an order to serve a chunk that nobody waits for any more, and what
// came for it. That the device does not have the chunk counts, however late it says so.
// It ends with the order, or the coordinator.
func (s *storage) unserve(o wire.Order, id string, asked claims) {
	ctx, cancel := context.WithDeadline(s.life, o.Expires.Add(time.Minute))
	defer cancel()
	_, _ = s.outbox.cancel(ctx, o.Device, o.ID, "it took too long, or another device was quicker", "") // or it has ended
	if v, err := s.outbox.await(ctx, o, nil); err == nil {
		if err := succeeded(v); err != nil {
			s.noteMissing(ctx, o.Device, id, asked, &notServed{o.ID, wire.ProblemOf(err)})
		}
	}
	if err := s.staging.drop(ctx, servedName(o.ID)); err != nil && s.life.Err() == nil {
		s.log.Warn("a chunk that nobody waits for any more stays for a day", "order", o.ID, "error", err)
	}
}

// dropServed drops what came for orders that are over, as nobody has taken it away: a
// coordinator that waited for it has ended. Orders carry the time they were made at.
func (s *storage) dropServed(ctx context.Context) error {
	names, err := s.staging.names(ctx)
	if err != nil {
		return err
	}
	over := s.outbox.now().Add(-serveLifeOf(chunk.MaxSize) - time.Minute)
	var failed error
	for _, name := range names {
		order, ok := strings.CutPrefix(name, servedName(""))
		if !ok {
			continue
		}
		if made, err := ulid.ParseStrict(order); err != nil || ulid.Time(made.Time()).Before(over) {
			failed = errors.Join(failed, s.staging.drop(ctx, name))
		}
	}
	return failed
}

// serveLifeOf is how long a device may take to serve a chunk of some size, if bytes
// keep coming.
func serveLifeOf(size int64) time.Duration {
	return serveLife + time.Duration(size)*time.Second/slowestLine
}

// arrivals lets those who wait for what a device serves see that it is coming.
type arrivals struct {
	mu   sync.Mutex
	rows map[string]func() // by order: bytes have come
}

// wait gives a context that ends, with context.DeadlineExceeded as its cause, when
// nothing has come for an order for some time.
func (a *arrivals) wait(ctx context.Context, order string, quiet time.Duration) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(quiet, func() { cancel(context.DeadlineExceeded) })
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.rows == nil {
		a.rows = make(map[string]func())
	}
	a.rows[order] = func() { timer.Reset(quiet) }
	return ctx, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.rows, order)
		timer.Stop()
		cancel(nil)
	}
}

// body is an upload whose bytes are seen by whoever waits for them.
func (a *arrivals) body(r io.ReadCloser, order string) io.ReadCloser {
	return arrivingBody{r, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if seen, ok := a.rows[order]; ok {
			seen()
		}
	}}
}

type arrivingBody struct {
	io.ReadCloser
	seen func()
}

func (b arrivingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.seen()
	}
	return n, err
}

// lost notes that a device does not have chunks any more.
func (s *storage) lost(ctx context.Context, d wire.DeviceID, ids []string) error {
	return s.lostThat(ctx, d, ids, func(api.Holder) bool { return true })
}

// lostBefore is lost, but for what the device has given a receipt for since.
func (s *storage) lostBefore(ctx context.Context, d wire.DeviceID, ids []string, at time.Time) error {
	return s.lostThat(ctx, d, ids, func(h api.Holder) bool { return !h.Since.After(at) })
}

func (s *storage) lostThat(ctx context.Context, d wire.DeviceID, ids []string, fits func(api.Holder) bool) error {
	for _, id := range ids {
		_, err := s.chunks.change(ctx, id, func(c *chunkRecord, exists bool) error {
			i := slices.IndexFunc(c.Holders, func(h api.Holder) bool { return h.Device == d && !h.Lost && fits(h) })
			if !exists || i < 0 {
				return errUnchanged
			}
			c.Holders[i].Lost = true
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// objectKey makes any name fit the state store.
func objectKey(name string) string { return base64.RawURLEncoding.EncodeToString([]byte(name)) }

const maxName = 512 // bytes

// putObject names chunks that are placed. A name that is taken is refused,
// unless it is for the very same content, which is a repeat.
func (s *storage) putObject(ctx context.Context, o api.Object) (api.Object, error) {
	if err := checkObject(o); err != nil {
		return o, err
	}
	key := objectKey(o.Name)
	// A removal of the same name takes off its claims: they must not be ours.
	defer s.naming.lock(key)()
	if old, ok := s.objects.get(key); ok {
		if sameContent(old, o) {
			return old, nil
		}
		return old, refuse(http.StatusConflict, "exists", "there is another object %q; remove it first (\"deimos object rm\") or choose another name", o.Name)
	}
	// The chunks are claimed before the object is there: a crash between leaves
	// a claim too many, never an object whose chunks may be dropped.
	o.Created = s.outbox.now().UTC()
	var added []string
	for _, ch := range o.Chunks {
		if slices.Contains(added, ch.ID) {
			continue
		}
		var isNew bool
		_, err := s.chunks.change(ctx, ch.ID, func(c *chunkRecord, exists bool) error {
			switch {
			case !exists || c.alive() == 0:
				return refuse(http.StatusConflict, "chunk_missing", "chunk %s is on no device; store the file again", ch.ID)
			case c.Size != ch.Size:
				return refuse(http.StatusBadRequest, "bad_object", "chunk %s has %d bytes, not %d", ch.ID, c.Size, ch.Size)
			}
			if isNew = !slices.Contains(c.Refs, key); isNew {
				c.Refs = append(c.Refs, key)
			}
			c.Used = o.Created
			return nil
		})
		if err != nil {
			return o, errors.Join(err, s.unclaim(ctx, key, added, o.Created))
		}
		if isNew {
			added = append(added, ch.ID)
		}
	}
	if err := s.checkApart(o); err != nil {
		return o, errors.Join(err, s.unclaim(ctx, key, added, o.Created))
	}
	made, err := s.objects.change(ctx, key, func(v *api.Object, exists bool) error {
		if exists {
			return refuse(http.StatusConflict, "exists", "an object %q was made meanwhile", o.Name)
		}
		*v = o
		return nil
	})
	if err != nil {
		return o, errors.Join(err, s.unclaim(ctx, key, added, o.Created))
	}
	return made, nil
}

// sameContent tells whether putting b is a repeat of what made a. Of what is
// encrypted, only the same key makes the same chunks.
func sameContent(a, b api.Object) bool {
	if (a.Code == nil) != (b.Code == nil) || a.Size != b.Size {
		return false
	}
	if a.Code == nil {
		return a.SHA256 == b.SHA256
	}
	return *a.Code == *b.Code && slices.Equal(a.Chunks, b.Chunks)
}

// checkApart tells whether the shards of each stripe are on distinct devices.
func (s *storage) checkApart(o api.Object) error {
	if o.Code == nil {
		return nil
	}
	n := 0
	for part := range slices.Chunk(o.Chunks, o.Code.Shards()) {
		stripe := make([]chunkRecord, len(part))
		for i, ch := range part {
			stripe[i], _ = s.chunks.get(ch.ID)
		}
		if !apart(stripe) {
			return refuse(http.StatusConflict, "not_apart", "two shards of stripe %d are on one device, whose loss would take both; store the file again", n)
		}
		n++
	}
	return nil
}

// unclaim takes back the claims that an object added at a time and does not
// need, because it was not made. The chunks stay for another try. Where somebody
// has come to rely on such a claim since, it stays: they have set Used again.
func (s *storage) unclaim(ctx context.Context, key string, ids []string, at time.Time) error {
	for _, id := range ids {
		_, err := s.chunks.change(context.WithoutCancel(ctx), id, func(c *chunkRecord, exists bool) error {
			if !exists || !c.Used.Equal(at) {
				return errUnchanged
			}
			c.Refs = slices.DeleteFunc(c.Refs, func(r string) bool { return r == key })
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxName {
		return refuse(http.StatusBadRequest, "bad_object", "an object's name has 1 to %d bytes", maxName)
	}
	if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return refuse(http.StatusBadRequest, "bad_object", "an object's name is UTF-8 without control characters")
	}
	return nil
}

func checkObject(o api.Object) error {
	if err := checkName(o.Name); err != nil {
		return err
	}
	if len(o.Chunks) > api.MaxChunks {
		return refuse(http.StatusRequestEntityTooLarge, "too_large", "an object has at most %d chunks, this has %d: cut the file in parts", api.MaxChunks, len(o.Chunks))
	}
	var sum int64
	for _, c := range o.Chunks {
		if _, err := chunk.ParseID(c.ID); err != nil || c.Size < 1 || c.Size > chunk.MaxSize {
			return refuse(http.StatusBadRequest, "bad_object", "the object's list of chunks is not valid")
		}
		sum += c.Size
	}
	if o.Code != nil {
		return checkCoded(o)
	}
	if len(o.Manifest) > 0 {
		return refuse(http.StatusBadRequest, "bad_object", "only an object with a code has a manifest")
	}
	if sum != o.Size {
		return refuse(http.StatusBadRequest, "bad_object", "the chunks have %d bytes together, the object is said to have %d", sum, o.Size)
	}
	return nil
}

// checkCoded checks what can be checked without a key: that each stripe is whole
// and can be made anew from its other shards.
func checkCoded(o api.Object) error {
	bad := func(format string, args ...any) error {
		return refuse(http.StatusBadRequest, "bad_object", format, args...)
	}
	if err := checkCode(*o.Code); err != nil {
		return err
	}
	switch {
	case len(o.Manifest) == 0 || len(o.Manifest) > api.MaxManifest:
		return bad("an object with a code has a manifest of 1 to %d bytes, this has %d", api.MaxManifest, len(o.Manifest))
	case o.SHA256 != "":
		return bad("an object with a code tells the digest of the file to nobody but its readers, in the manifest")
	case len(o.Chunks)%o.Code.Shards() != 0:
		return bad("%d chunks are no whole stripes of %d shards", len(o.Chunks), o.Code.Shards())
	}
	var room int64
	seen := make(map[string]bool, len(o.Chunks))
	for part := range slices.Chunk(o.Chunks, o.Code.Shards()) {
		for _, ch := range part {
			if ch.Size != part[0].Size {
				return bad("the shards of a stripe must have one size, these have %d and %d bytes", part[0].Size, ch.Size)
			}
			if seen[ch.ID] {
				return bad("chunk %s is there twice: each shard differs from every other", ch.ID)
			}
			seen[ch.ID] = true
		}
		room += part[0].Size * int64(o.Code.Data)
	}
	if o.Size < 0 || o.Size > room {
		return bad("the shards of data have %d bytes together, the file is said to have %d", room, o.Size)
	}
	return nil
}

// object also refuses a name that none could have: who asks may want to use it.
func (s *storage) object(name string) (api.Object, error) {
	if err := checkName(name); err != nil {
		return api.Object{}, err
	}
	o, ok := s.objects.get(objectKey(name))
	if !ok {
		return o, refuse(http.StatusNotFound, wire.CodeNotFound, "there is no object %q; \"deimos object ls\" shows all", name)
	}
	return o, nil
}

// listObjects is every object, sorted by name, and how it is.
func (s *storage) listObjects() []api.ObjectEntry {
	list := s.objects.all(func(a, b api.Object) int { return cmp.Compare(a.Name, b.Name) })
	out := make([]api.ObjectEntry, len(list))
	online := make(map[wire.DeviceID]bool)
	for _, d := range s.reg.list() {
		online[d.ID] = d.Online
	}
	for i, o := range list {
		out[i] = s.entry(o, online)
	}
	return out
}

// entry looks for the stripe that is nearest to be lost; without a code, for
// the chunk with the least copies.
func (s *storage) entry(o api.Object, online map[wire.DeviceID]bool) api.ObjectEntry {
	e := api.ObjectEntry{Name: o.Name, Size: o.Size, SHA256: o.SHA256, Code: o.Code, Chunks: len(o.Chunks), Created: o.Created, Needed: 1}
	if o.Code != nil {
		e.Needed = o.Code.Data
	}
	if len(o.Chunks) == 0 { // nothing can be lost
		e.Needed = 0
		return e
	}
	e.Alive, e.Online = math.MaxInt, math.MaxInt
	width := 1
	if o.Code != nil {
		width = o.Code.Shards()
	}
	for part := range slices.Chunk(o.Chunks, width) {
		alive, there := 0, 0
		for _, ch := range part {
			c, _ := s.chunks.get(ch.ID)
			copies, near := c.alive(), 0
			for _, h := range c.Holders {
				if !h.Lost && online[h.Device] {
					near++
				}
			}
			if o.Code != nil { // a second copy of a shard is no second shard
				copies, near = min(copies, 1), min(near, 1)
			}
			alive, there = alive+copies, there+near
		}
		e.Alive, e.Online = min(e.Alive, alive), min(e.Online, there)
	}
	return e
}

// placements are where the chunks of an object are.
func (s *storage) placements(name string) ([]api.Placement, error) {
	o, err := s.object(name)
	if err != nil {
		return nil, err
	}
	out := make([]api.Placement, len(o.Chunks))
	for i, ch := range o.Chunks {
		c, _ := s.chunks.get(ch.ID)
		out[i] = api.Placement{Chunk: ch, Holders: append([]api.Holder{}, c.Holders...)}
	}
	return out, nil
}

// removeObject forgets an object, and has devices drop the chunks that no other
// object needs.
func (s *storage) removeObject(ctx context.Context, name string) error {
	key := objectKey(name)
	defer s.naming.lock(key)()
	o, err := s.object(name)
	if err != nil {
		return err
	}
	if err := s.objects.remove(ctx, key, func(v api.Object) bool { return sameContent(v, o) }); err != nil {
		return err
	}
	for part := range slices.Chunk(o.Chunks, dropPart) {
		if err := s.release(ctx, key, part); err != nil {
			return err
		}
	}
	return nil
}

// release takes an object's claim off chunks, and has those dropped that nobody
// claims any more. Nobody can place one of them until the order to drop it is
// in the outbox, where dropping finds it.
func (s *storage) release(ctx context.Context, key string, chunks []api.Chunk) error {
	ids := make([]string, len(chunks))
	for i, ch := range chunks {
		ids[i] = ch.ID
	}
	ids, unlock := s.lockAll(ids)
	defer unlock()
	for _, id := range ids {
		_, err := s.chunks.change(ctx, id, func(c *chunkRecord, exists bool) error {
			if !exists || !slices.Contains(c.Refs, key) {
				return errUnchanged
			}
			c.Refs = slices.DeleteFunc(c.Refs, func(r string) bool { return r == key })
			return nil
		})
		if err != nil {
			return err
		}
	}
	now := s.outbox.now()
	return s.drop(ctx, ids, func(c chunkRecord) bool { return len(c.Refs) == 0 && c.Until.Before(now) })
}

// lockAll takes the placing locks of chunks and returns their ids without repeats.
func (s *storage) lockAll(ids []string) (locked []string, unlock func()) {
	ids = slices.Clone(ids)
	slices.Sort(ids) // one order of locking for all
	ids = slices.Compact(ids)
	var unlocks []func()
	for _, id := range ids {
		unlocks = append(unlocks, s.placing.lock(id))
	}
	return ids, func() {
		for _, u := range unlocks {
			u()
		}
	}
}

// drop has devices drop the chunks that free is true for, and removes their
// records. Their placing locks are held. First the chunks are given up: nobody
// reads them or asks for them from then on. If a crash comes before the orders
// to drop them are kept, the record is there to begin again from (dropOrphans).
func (s *storage) drop(ctx context.Context, ids []string, free func(chunkRecord) bool) error {
	drops := make(map[wire.DeviceID][]string)
	var given []string
	for _, id := range ids {
		if c, ok := s.chunks.get(id); !ok || !free(c) {
			continue
		}
		c, err := s.chunks.change(ctx, id, func(c *chunkRecord, exists bool) error {
			if !exists || !free(*c) {
				return errNotFound // gone already, or claimed by a new object meanwhile
			}
			if c.alive() == 0 {
				return errUnchanged
			}
			for i := range c.Holders {
				c.Holders[i].Lost = true
			}
			return nil
		})
		if errors.Is(err, errNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		given = append(given, id)
		for _, h := range c.Holders {
			if s.reg.member(h.Device) { // a retired one gets no orders
				drops[h.Device] = append(drops[h.Device], id)
			}
		}
	}
	for d, ids := range drops {
		if _, err := s.outbox.submit(ctx, d, wire.KindChunkDrop, wire.ChunkDrop{IDs: ids}, dropLife); err != nil {
			return err
		}
	}
	for _, id := range given {
		err := s.chunks.remove(ctx, id, func(now chunkRecord) bool { return now.alive() == 0 && free(now) })
		if err != nil && !errors.Is(err, errNotFound) {
			return err
		}
	}
	return nil
}

// sweep drops orphans, and what was served for nobody, until ctx ends.
func (s *storage) sweep(ctx context.Context) {
	orphans, served := time.NewTicker(orphanSweep), time.NewTicker(servedSweep)
	defer orphans.Stop()
	defer served.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-orphans.C:
			if err := s.dropOrphans(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("chunks that no object needs could not all be dropped; they will be tried again", "error", err)
			}
		case <-served.C:
			if err := s.dropServed(ctx); err != nil && ctx.Err() == nil {
				s.log.Warn("chunks that nobody waits for any more could not all be dropped; they will be tried again", "error", err)
			}
		}
	}
}

// dropOrphans drops the chunks that no object has and nobody has placed or
// claimed for orphanLife: what is left of uploads that were given up, and of
// crashes. It is the objects that count, not the claims: a crash can leave one.
// While there is an object that cannot be read, nobody knows what it needs.
func (s *storage) dropOrphans(ctx context.Context) error {
	if n := s.objects.unreadable(); n > 0 {
		return fmt.Errorf("%d object records cannot be read, and their chunks must not be taken for unneeded: nothing is dropped until the version of the coordinator that wrote them runs again", n)
	}
	needed := make(map[string]bool)
	s.objects.each(func(_ string, o api.Object) bool {
		for _, ch := range o.Chunks {
			needed[ch.ID] = true
		}
		return true
	})
	now := s.outbox.now()
	old := now.Add(-orphanLife)
	// An object that is made after the look above has set Used before.
	orphan := func(c chunkRecord) bool {
		return !c.Used.IsZero() && c.Used.Before(old) && c.Until.Before(now) && !needed[c.ID]
	}
	var ids []string
	s.chunks.each(func(id string, c chunkRecord) bool {
		if orphan(c) {
			ids = append(ids, id)
		}
		return true
	})
	for part := range slices.Chunk(ids, dropPart) {
		part, unlock := s.lockAll(part)
		err := s.drop(ctx, part, orphan)
		unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// keyed is a lock for each key.
type keyed struct {
	mu    sync.Mutex
	locks map[string]*keyLock
}

type keyLock struct {
	mu   sync.Mutex
	refs int
}

// lock takes the lock of key and returns what gives it back.
func (k *keyed) lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = make(map[string]*keyLock)
	}
	l := k.locks[key]
	if l == nil {
		l = &keyLock{}
		k.locks[key] = l
	}
	l.refs++
	k.mu.Unlock()
	l.mu.Lock()
	return func() {
		l.mu.Unlock()
		k.mu.Lock()
		if l.refs--; l.refs == 0 {
			delete(k.locks, key)
		}
		k.mu.Unlock()
	}
}
