package coordinator

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// unit is what is repaired at once: a stripe of a coded object, or one chunk.
type unit struct {
	key     string    // of its lease
	name    string    // of an object that has it; empty: none has yet
	index   int       // of the stripe, or of the chunk
	code    *api.Code // nil: each of chunks (there is one) is replicated
	chunks  []api.Chunk
	created time.Time
}

// units are those that chunks belong to. A chunk that no object has is one only
// while a device that holds it is being drained: it is about to get an object, or
// to be dropped.
func (r *repairs) units(ids map[string]bool) (out []unit) {
	objects, seen := make(map[string]bool), make(map[string]bool)
	for id := range ids {
		c, _ := r.storage.chunks.get(id)
		owned := false
		for _, key := range c.Refs {
			if _, ok := r.storage.objects.get(key); ok {
				objects[key], owned = true, true
			}
		}
		if !owned && slices.ContainsFunc(c.Holders, func(h api.Holder) bool { return !h.Lost && r.drains.leaving(h.Device) }) {
			out = append(out, unit{key: "c." + id, chunks: []api.Chunk{{ID: id, Size: c.Size}}, created: c.Used})
		}
	}
	for key := range objects {
		o, ok := r.storage.objects.get(key)
		if !ok {
			continue
		}
		width := 1
		if o.Code != nil {
			width = o.Code.Shards()
		}
		for i := 0; i*width < len(o.Chunks); i++ {
			part := o.Chunks[i*width : (i+1)*width]
			if !slices.ContainsFunc(part, func(c api.Chunk) bool { return ids[c.ID] }) {
				continue
			}
			unitKey := "c." + part[0].ID
			if o.Code != nil {
				unitKey = stripeKey(*o.Code, part)
			}
			if seen[unitKey] {
				continue
			}
			seen[unitKey] = true
			out = append(out, unit{key: unitKey, name: o.Name, index: i, code: o.Code, chunks: part, created: o.Created})
		}
	}
	return out
}

// stripeKey is of all its shards: two stripes may have some in common.
func stripeKey(code api.Code, shards []api.Chunk) string {
	h := sha256.New()
	fmt.Fprintln(h, code)
	for _, c := range shards {
		fmt.Fprintln(h, c.ID)
	}
	return "s." + hex.EncodeToString(h.Sum(nil))
}

// look is how a unit is.
type look struct {
	missing []int // indexes of chunks, one for each holder that is missing
	spare   int   // see [api.Endangered]
	lost    bool  // too little is left anywhere
	extra   []spot
	extraAt time.Time // when what is extra may be dropped
}

func (l look) whole() bool { return len(l.missing) == 0 }

// spot is a chunk on a device.
type spot struct {
	device wire.DeviceID
	chunk  int
}

// wanted is how many copies of a plain chunk there should be. A record of before
// that was kept means as many as have ever been made of it.
func (c chunkRecord) wanted() int {
	if c.Want > 0 {
		return c.Want
	}
	return min(max(len(c.Holders), 1), maxReplica)
}

// ask notes how many copies somebody wants; the most that anybody relies on counts.
func (c *chunkRecord) ask(replicas int) {
	if c.Want = c.wanted(); len(c.Refs) == 0 {
		c.Want = 0
	}
	c.Want = max(c.Want, replicas)
}

// look finds how a unit is by the records.
func (r *repairs) look(u unit) look { return r.lookBut(u, "", "") }

// lookBut looks as if a device did not hold a chunk.
func (r *repairs) lookBut(u unit, not wire.DeviceID, id string) (l look) {
	n := len(u.chunks)
	good, sure, alive := make([][]wire.DeviceID, n), make([][]wire.DeviceID, n), 0
	var rest []spot // holders that are not good, and can be asked
	var newest time.Time
	conds := make(map[wire.DeviceID]condition)
	want := 1
	for i, ch := range u.chunks {
		c, _ := r.storage.chunks.get(ch.ID)
		left := 0
		for _, h := range c.Holders {
			if h.Lost || h.Device == not && ch.ID == id {
				continue
			}
			is, ok := conds[h.Device]
			if !ok {
				is = r.conditionOf(h.Device)
				conds[h.Device] = is
			}
			if is.why == retired {
				continue
			}
			left++
			newest = latest(newest, h.Since)
			gone := strings.Contains(is.volumes, "\n"+h.Volume+"\n")
			if !gone && (is.why == "" || is.why == leaving) {
				sure[i] = append(sure[i], h.Device)
			}
			if !gone && is.why == "" {
				good[i] = append(good[i], h.Device)
			} else if !gone && is.why != leaving {
				rest = append(rest, spot{h.Device, i})
			}
		}
		if alive += min(left, 1); u.code == nil {
			want = c.wanted()
		}
		r.bestFirst(good[i], ch.Size)
	}
	keep := make([][]wire.DeviceID, n)
	if u.code != nil {
		for i, d := range match(good) {
			if d == "" {
				l.missing = append(l.missing, i)
				continue
			}
			keep[i] = []wire.DeviceID{d}
		}
		there := 0
		for _, d := range match(sure) {
			if d != "" {
				there++
			}
		}
		l.spare, l.lost = there-u.code.Data, alive < u.code.Data
	} else {
		keep[0] = good[0][:min(want, len(good[0]))]
		l.missing = make([]int, want-len(keep[0]))
		l.spare, l.lost = len(sure[0])-1, alive == 0
	}
	if !l.whole() || u.name == "" {
		return l
	}
	l.extraAt = newest.Add(r.plan.spare)
	for i, devices := range good {
		for _, d := range devices {
			if !slices.Contains(keep[i], d) && r.reg.online(d) {
				l.extra = append(l.extra, spot{d, i})
			}
		}
	}
	for _, p := range rest {
		if r.reg.online(p.device) {
			l.extra = append(l.extra, p)
		}
	}
	return l
}

// bestFirst sorts devices by how much they are to be preferred.
func (r *repairs) bestFirst(list []wire.DeviceID, size int64) {
	if len(list) < 2 {
		return
	}
	weights := make(map[wire.DeviceID]float64)
	for _, d := range list {
		if rec, ok := r.reg.rows.get(string(d)); ok && r.reg.online(d) {
			v := r.reg.view(rec)
			v.Used -= size // it has it
			weights[d] = r.storage.weight(v, size)
		}
	}
	slices.SortFunc(list, func(a, b wire.DeviceID) int {
		return cmp.Or(cmp.Compare(weights[b], weights[a]), cmp.Compare(a, b))
	})
}

// withRoom lists the devices that can be given something.
func (s *storage) withRoom() []api.Device {
	return slices.DeleteFunc(s.reg.list(), func(d api.Device) bool { return s.weight(d, 1) == 0 || s.resting.of(d.ID) != nil })
}

// hindrance is why nothing can be done about a unit now; empty if something can. room
// is the devices that can be given something.
func (r *repairs) hindrance(u unit, l look, room []api.Device) string {
	if l.whole() {
		return ""
	}
	if l.lost {
		return "too little is left of it on any device; it can be read again only if a device brings back what it had"
	}
	served, there := make([]bool, len(u.chunks)), 0
	var not []wire.DeviceID
	for i, ch := range u.chunks {
		c, _ := r.storage.chunks.get(ch.ID)
		for _, h := range c.Holders {
			if !h.Lost {
				served[i] = served[i] || r.reg.online(h.Device)
				not = append(not, h.Device)
			}
		}
		if served[i] {
			there++
		}
	}
	copied := slices.ContainsFunc(l.missing, func(i int) bool { return served[i] })
	switch {
	case u.code == nil && !copied:
		return "none of the devices that hold a copy is online"
	case u.code != nil && !copied && there < u.code.Data:
		return fmt.Sprintf("%d shards can be read now and it takes %d: the devices that hold others are not online", there, u.code.Data)
	}
	size := u.chunks[l.missing[0]].Size
	if slices.ContainsFunc(room, func(d api.Device) bool { return d.Capacity-d.Used >= size && !slices.Contains(not, d.ID) }) {
		return ""
	}
	return noRoom
}

// work does what can be done about a unit.
func (r *repairs) work(ctx context.Context, u unit) error {
	if err := r.leaseFor(ctx, u.key, leaseLife+r.paceOf(u)); err != nil {
		return err
	}
	defer r.unlease(ctx, u.key)
	// The records may have been changed by whoever had the lease before.
	if l := r.look(u); !l.whole() {
		return r.mend(ctx, u, l)
	}
	return r.trim(ctx, u)
}

// mend brings the missing shards or copies onto other devices.
func (r *repairs) mend(ctx context.Context, u unit, l look) error {
	var liars []liar
	defer func() { r.challenge(ctx, liars) }()
	data := make([][]byte, len(u.chunks))
	var rebuild []int
	for _, i := range slices.Compact(slices.Clone(l.missing)) {
		var err error
		if data[i], err = r.fetch(ctx, u.chunks[i], &liars); err == nil {
			continue
		}
		if ctx.Err() != nil || u.code == nil {
			return err
		}
		rebuild = append(rebuild, i)
	}
	if len(rebuild) > 0 {
		if err := r.rebuild(ctx, u, data, rebuild, &liars); err != nil {
			return err
		}
	}
	for _, i := range l.missing {
		if err := r.putAnew(ctx, u, i, data[i]); err != nil {
			return err
		}
		r.mu.Lock()
		r.sum.Done++
		if slices.Contains(rebuild, i) {
			r.sum.Rebuilt++
		}
		r.mu.Unlock()
	}
	return nil
}

// liar is a device that did not serve what it should hold.
type liar struct {
	device wire.DeviceID
	chunk  api.Chunk
}

var errNoSource = errors.New("no device that holds it is online")

// fetch gets a chunk from any device that holds it. A device that is being drained is
// asked first: it is there for that.
func (r *repairs) fetch(ctx context.Context, ch api.Chunk, liars *[]liar) ([]byte, error) {
	c, _ := r.storage.chunks.get(ch.ID)
	holders := slices.DeleteFunc(slices.Clone(c.Holders), func(h api.Holder) bool { return h.Lost || !r.reg.online(h.Device) })
	rank := map[weakness]int{leaving: 0, "": 1, absent: 2, distrusted: 3}
	slices.SortStableFunc(holders, func(a, b api.Holder) int {
		return cmp.Compare(rank[r.conditionOf(a.Device).why], rank[r.conditionOf(b.Device).why])
	})
	last := errNoSource
	for _, h := range holders {
		data, err := r.fetchFrom(ctx, h.Device, c)
		if err == nil {
			return data, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if code := wire.ProblemOf(err).Code; !errors.Is(err, context.DeadlineExceeded) && !saysLost(code) {
			*liars = append(*liars, liar{h.Device, ch})
		}
		r.log.Warn("a device did not serve a chunk for a repair", "chunk", ch.ID, "device", h.Device, "error", err)
		last = err
	}
	return nil, last
}

// fetchFrom gets a chunk from one device, at the pace of repair, and verifies it.
func (r *repairs) fetchFrom(ctx context.Context, d wire.DeviceID, c chunkRecord) ([]byte, error) {
	if err := r.move(ctx, c.Size); err != nil {
		return nil, err
	}
	data, err := r.storage.readFrom(ctx, d, c)
	if err != nil {
		return nil, err
	}
	if sum := chunk.Sum(data).String(); sum != c.ID {
		return nil, fmt.Errorf("device %s served other bytes than those of chunk %s", d, c.ID)
	}
	return data, nil
}

// move waits until bytes may be moved, and counts them.
func (r *repairs) move(ctx context.Context, n int64) error {
	if err := r.pace.wait(ctx, n); err != nil {
		return err
	}
	r.mu.Lock()
	r.sum.Bytes += n
	r.mu.Unlock()
	return nil
}

// rebuild makes shards of others, of which data may have some already. What it makes
// has the right ids, or is not given out.
func (r *repairs) rebuild(ctx context.Context, u unit, data [][]byte, want []int, liars *[]liar) error {
	have := func() (n int) {
		for _, s := range data {
			if s != nil {
				n++
			}
		}
		return n
	}
	var last error
	for i := range u.chunks {
		if data[i] != nil || slices.Contains(want, i) {
			continue
		}
		if have() >= u.code.Data {
			if err := reconstruct(u, data, want); err == nil {
				return nil
			} else {
				// Each of the others is what its id says. So one of them was wrong when
				// it was stored, and perhaps not all of them: another takes its part.
				last = err
				r.log.Error("a rebuilt shard is wrong and is not used; others are tried", "object", u.name, "stripe", u.index, "error", err)
			}
		}
		got, err := r.fetch(ctx, u.chunks[i], liars)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			last = err
			continue
		}
		data[i] = got
	}
	if have() < u.code.Data {
		return refuse(http.StatusServiceUnavailable, "unreadable", "%d shards of the stripe can be read now and it takes %d; of another: %v", have(), u.code.Data, last)
	}
	return reconstruct(u, data, want)
}

// maxSubsets bounds how many choices of shards are tried, when some of them make
// something wrong: all of 4+2, and enough of larger ones to leave out one.
const maxSubsets = 64

// reconstruct fills in the wanted shards if any choice of Data of those in data gives
// what their ids say.
func reconstruct(u unit, data [][]byte, want []int) error {
	var have []int
	for i, s := range data {
		if s != nil {
			have = append(have, i)
		}
	}
	tried := 0
	var try func(from int, chosen []int) bool
	try = func(from int, chosen []int) bool {
		if len(chosen) == u.code.Data {
			tried++
			return reconstructFrom(u, data, chosen, want)
		}
		for i := from; i < len(have) && tried < maxSubsets; i++ {
			if try(i+1, append(slices.Clone(chosen), have[i])) {
				return true
			}
		}
		return false
	}
	if try(0, nil) {
		return nil
	}
	return refuse(http.StatusConflict, "inconsistent", "the shards of this stripe are each what their ids say and do not fit together: what is missing cannot be made of them (%d choices were tried); store the file again while it can be read", tried)
}

func reconstructFrom(u unit, data [][]byte, chosen, want []int) bool {
	shards := make([][]byte, len(u.chunks))
	for _, i := range chosen {
		shards[i] = data[i]
	}
	if object.Reconstruct(*u.code, shards) != nil {
		return false
	}
	for _, i := range want {
		if int64(len(shards[i])) != u.chunks[i].Size || chunk.Sum(shards[i]).String() != u.chunks[i].ID {
			return false
		}
	}
	for _, i := range want {
		data[i] = shards[i]
	}
	return true
}

const noRoom = "there is no device online with room for it that holds nothing of it yet; add a device, or free space on one"

// maxPutAnew is how many devices are asked to take one shard, at a time.
const maxPutAnew = 4

// putAnew has a device that holds nothing of the unit store a chunk of it.
func (r *repairs) putAnew(ctx context.Context, u unit, i int, data []byte) error {
	s, id := r.storage, u.chunks[i].ID
	ref, err := parseBlobRef(string(chunkBlob), id)
	if err == nil {
		err = verifyBlob(ref, data)
	}
	if err != nil {
		return fmt.Errorf("what was to be placed anew is wrong: %w", err)
	}
	defer s.placing.lock(id)()
	// It may have been removed, or a receipt have come, while it was read.
	c, ok := s.chunks.get(id)
	if !ok || len(c.Refs) == 0 && u.name != "" || !slices.Contains(r.look(u).missing, i) {
		return nil
	}
	if _, err := s.chunks.change(ctx, id, func(c *chunkRecord, exists bool) error {
		if !exists {
			return errNotFound
		}
		if c.Want > 0 {
			return errUnchanged
		}
		c.Want = c.wanted() // before there is one holder more
		return nil
	}); err != nil {
		return err
	}
	if err := s.staging.put(ctx, ref.String(), data); err != nil {
		return err
	}
	defer func() {
		if err := s.staging.drop(context.WithoutCancel(ctx), ref.String()); err != nil {
			r.log.Warn("a staged chunk stays until it expires", "chunk", id, "error", err)
		}
	}()
	// The devices of the others count for how it is spread.
	token := "repair " + u.key
	defer s.stripes.forget(token)
	var asked []wire.DeviceID
	for _, ch := range u.chunks {
		c, _ := s.chunks.get(ch.ID)
		for _, h := range c.Holders {
			if !h.Lost {
				asked = append(asked, h.Device)
				s.stripes.take(token, h.Device, ch.ID)
			}
		}
	}
	var last error
	for range maxPutAnew {
		next := s.free(ctx, id, u.chunks[i].Size, asked, 1, token)
		if len(next) == 0 {
			break
		}
		if err := r.move(ctx, u.chunks[i].Size); err != nil {
			return err
		}
		if last = s.storeOn(ctx, next[0], ref, u.chunks[i].Size); last == nil {
			r.log.Info("a chunk was placed anew", "chunk", id, "device", next[0], "object", u.name, "stripe", u.index)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.log.Warn("a device did not take a chunk of a repair; asking another", "chunk", id, "device", next[0], "error", last)
		s.stripes.leave(token, next[0])
		asked = append(asked, next[0])
	}
	why := noRoom
	if last != nil {
		why += fmt.Sprintf(" (one said: %v)", last)
	}
	return refuse(http.StatusServiceUnavailable, "too_few_devices", "%s", why)
}

// forget gives up all reservations of a stripe.
func (s *stripes) forget(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.rows, token)
}

// challenge asks those who did not serve to prove what they should hold: what they
// answer is signed, and counts.
func (r *repairs) challenge(ctx context.Context, liars []liar) {
	for _, v := range liars {
		r.mu.Lock()
		soon := r.now().Sub(r.asked[v.device]) < suspectPause
		if !soon {
			r.asked[v.device] = r.now()
		}
		r.mu.Unlock()
		if soon || r.storage.claim(v.device, v.chunk.ID) == "" {
			continue
		}
		held := []api.Chunk{v.chunk}
		items, err := draw(held, defaultLeaves)
		if err == nil {
			_, err = r.audits.challenge(ctx, held, items, api.Audit{Device: v.device, Routine: true})
		}
		if err != nil && ctx.Err() == nil {
			r.log.Warn("a device that did not serve a chunk could not be challenged for it", "device", v.device, "chunk", v.chunk.ID, "error", err)
		}
	}
}

// trim drops what a unit has too much of.
func (r *repairs) trim(ctx context.Context, u unit) error {
	l := r.look(u)
	if len(l.extra) == 0 || r.now().Before(l.extraAt) {
		return nil
	}
	for _, p := range l.extra {
		id := u.chunks[p.chunk].ID
		n, err := r.giveUp(ctx, u.key, p.device, []string{id}, nil)
		if err != nil {
			return err
		}
		r.mu.Lock()
		r.sum.Dropped += n
		r.mu.Unlock()
	}
	return nil
}

// giveUp has a device drop those of the chunks without which their units are whole,
// and which a device that keeps its copy has just given back whole. It returns how
// many. The lease is held. before, if not nil, is told which they are, when nothing
// has been changed yet.
func (r *repairs) giveUp(ctx context.Context, lease string, d wire.DeviceID, ids []string, before func(sure []string) error) (n int, err error) {
	s := r.storage
	ids, unlock := s.lockAll(ids)
	defer unlock()
	var sure []string
	var last error
	keeper := make(map[string]wire.DeviceID)
	for _, id := range ids {
		k, err := r.safeElsewhere(ctx, d, id)
		if err != nil {
			last = err
			continue
		}
		keeper[id] = k
		sure = append(sure, id)
	}
	if len(sure) == 0 {
		return 0, last
	}
	if before != nil {
		if err := before(sure); err != nil {
			return 0, err
		}
	}
	drop := dropping{Device: d, Order: ulid.Make().String(), IDs: sure}
	if err := r.intend(ctx, lease, &drop); err != nil {
		return 0, err
	}
	for _, id := range sure {
		_, err := s.chunks.change(ctx, id, func(c *chunkRecord, exists bool) error {
			kept := slices.ContainsFunc(c.Holders, func(h api.Holder) bool { return !h.Lost && h.Device == keeper[id] })
			if !exists || !kept {
				return errUnchanged // it was lost meanwhile: sendDrop leaves it alone
			}
			c.Want = c.wanted()
			c.Holders = slices.DeleteFunc(c.Holders, func(h api.Holder) bool { return h.Device == d })
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	if err := r.sendDropLocked(ctx, drop); err != nil {
		return 0, err
	}
	return len(sure), r.intend(ctx, lease, nil)
}

// intend notes in a lease what is about to be ordered; nil: it has been.
func (r *repairs) intend(ctx context.Context, key string, d *dropping) error {
	_, err := r.leases.change(ctx, key, func(l *lease, exists bool) error {
		if !exists || l.By != r.self {
			return errTaken
		}
		l.Drop = d
		return nil
	})
	return err
}

// safeElsewhere finds out whether a device can drop a chunk, and which one keeps it
// and has given it back whole. The placing lock of the chunk is held.
func (r *repairs) safeElsewhere(ctx context.Context, d wire.DeviceID, id string) (keeper wire.DeviceID, err error) {
	for _, u := range r.units(map[string]bool{id: true}) {
		if !r.lookBut(u, d, id).whole() {
			return "", refuse(http.StatusConflict, "endangered", "chunk %s is not whole without device %s", id, d)
		}
	}
	c, ok := r.storage.chunks.get(id)
	if !ok {
		return "", refuse(http.StatusConflict, "chunk_missing", "chunk %s was removed meanwhile", id)
	}
	last := errNoSource
	for _, h := range c.Holders {
		if h.Lost || h.Device == d || r.conditionOf(h.Device) != (condition{}) || !r.reg.online(h.Device) {
			continue
		}
		if _, last = r.fetchFrom(ctx, h.Device, c); last == nil {
			return h.Device, nil
		}
	}
	return "", fmt.Errorf("chunk %s cannot be read from a device that keeps it: %w", id, last)
}

// intended are the devices that are about to be ordered to drop a chunk.
func (r *repairs) intended(id string) (out []wire.DeviceID) {
	r.leases.each(func(_ string, l lease) bool {
		if l.Drop != nil && slices.Contains(l.Drop.IDs, id) {
			out = append(out, l.Drop.Device)
		}
		return true
	})
	return out
}

// sendDrop makes an order to drop that a crash may have come before.
func (r *repairs) sendDrop(ctx context.Context, d dropping) error {
	_, unlock := r.storage.lockAll(d.IDs)
	defer unlock()
	return r.sendDropLocked(ctx, d)
}

// sendDropLocked leaves out what the device holds by the record, or is being asked to.
func (r *repairs) sendDropLocked(ctx context.Context, d dropping) error {
	if !r.reg.member(d.Device) {
		return nil
	}
	coming := make(map[string]bool)
	for _, v := range r.outbox.unfinished(wire.KindChunkStore) {
		if b, err := wire.DecodeBody[wire.ChunkStore](v.Order); err == nil && v.Order.Device == d.Device {
			coming[b.ID] = true
		}
	}
	ids := slices.DeleteFunc(slices.Clone(d.IDs), func(id string) bool {
		c, _ := r.storage.chunks.get(id)
		return coming[id] || slices.ContainsFunc(c.Holders, func(h api.Holder) bool { return h.Device == d.Device && !h.Lost })
	})
	if len(ids) == 0 {
		return nil
	}
	_, err := r.outbox.submitAs(ctx, d.Order, d.Device, wire.KindChunkDrop, wire.ChunkDrop{IDs: ids}, dropLife)
	return err
}

// lastSeen is when a device was heard last by this coordinator; zero: never.
func (r *registry) lastSeen(d wire.DeviceID) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l, ok := r.live[d]; ok {
		return l.lastSeen
	}
	return time.Time{}
}
