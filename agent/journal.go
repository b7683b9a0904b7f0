package agent

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/compactors"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// journal is the agent's memory of orders: the terminal report of each, kept
// until the order expires, so that a repeat is answered and not done again; and
// whether the coordinator has acknowledged it, so that no result is lost. How
// much of it is kept is decided in outbox.go.
type journal interface {
	// get finds a finished order; ok is false for one that is not known.
	get(order string) (e entry, ok bool, err error)
	// put keeps e, and the record of what had to be given up for it
	// ([entry.lost]); when it returns nil, both have reached the disk. The order
	// is no longer begun.
	put(e entry) error
	// revise lets change look at each of these entries as it is now, and takes
	// over what change made of it, with the record of what was lost by it. An
	// entry that has gone is passed over. Only what is durable survives a power cut.
	revise(orders []string, durable bool, change func(*entry) fate) error
	// each calls f for every finished order.
	each(f func(entry)) error
	// begin notes that the handler of an order is about to be called; begun tells
	// whether that is noted. What is not durable survives the agent's death, and
	// costs no sync.
	begin(order string, expires time.Time, durable bool) error
	begun(order string) (bool, error)
	// hold keeps the envelope of an order that was begun, so that a life without a
	// coordinator can go on with it; held gives back all of them. It goes with the report.
	hold(order string, envelope []byte) error
	held() (envelopes [][]byte, err error)
	// revoke notes, durably, that an order which was begun is taken back by another
	// one; revokedBy tells which, "" if it is not. The note goes with the report.
	revoke(order, by string, expires time.Time) error
	revokedBy(order string) (string, error)
	// writable is an error while nothing can be written.
	writable() error
	// saveFloor keeps the newest trusted time, durably.
	saveFloor(t time.Time) error
	// bytes is what the entries take, keys included. What Badger adds on the disk
	// until it has compacted is not in it.
	bytes() int64
	// dropped is the record of everything that was lost, in the order of the classes.
	dropped() []wire.Dropped
	// forget drops acknowledged orders that expired before now.
	forget(now time.Time) error
	// forgot tells whether an order that is not known may be one that was
	// forgotten; timeIs says what time it is for sure. See mark.
	forgot(order string, expires, now time.Time) bool
	timeIs(now time.Time) error
}

// entry is a finished order.
type entry struct {
	Order   string    `json:"order"`
	Seq     uint64    `json:"seq"`
	Expires time.Time `json:"expires"`
	Report  []byte    `json:"report"` // the sealed envelope, sent as it is every time
	Acked   bool      `json:"acked"`
	Class   class     `json:"class,omitempty"` // results, in journals of before there were classes
	// Bare says that the report has neither body nor attachment (any more).
	Bare bool `json:"bare,omitempty"`
	// Was is the number that the report had before it was stripped, if that one
	// may have been sent: an acknowledgement of it counts as well.
	Was uint64 `json:"was,omitempty"`

	// lost is how many bytes were given up, and when, to make this of what was
	// there before.
	lost   int64
	lostAt time.Time
}

// answeredBy tells whether an acknowledgement of seq is one of this report.
func (e entry) answeredBy(seq uint64) bool {
	return e.Seq == seq || e.Was != 0 && e.Was == seq
}

// fate is what becomes of an entry that is revised.
type fate int

const (
	leave fate = iota
	replace
	remove
)

// floorMargin is more than a clock may be behind the saved floor that it was
// started with: [Clock.Trust] takes what is up to 5 minutes below.
const floorMargin = 10 * time.Minute

// forget drops what nobody will ask for again. An order that is forgotten must
// count as expired in every later life, also on a board whose clock then begins
// at the saved floor: so the floor goes first, and only what expired well before
// it is dropped. A clock that is not trusted makes it forget nothing.
func forget(j journal, c *Clock) error {
	now, sure := c.Read()
	if sure != wire.ClockTrusted {
		return nil
	}
	if err := j.saveFloor(now); err != nil {
		return err
	}
	return j.forget(now.Add(-floorMargin))
}

// forgotten is the fate of an entry that nobody will ask for again. One that is
// not acknowledged is kept: its result is still owed.
func forgotten(now time.Time) func(*entry) fate {
	return func(e *entry) fate {
		if e.Acked && e.Expires.Before(now) {
			return remove
		}
		return leave
	}
}

// mark is what has been forgotten: orders that expired before Until, of which the
// newest was made at Newest (milliseconds of its ULID). By a right clock it says no
// more than an order's expiry does. But if the coordinator's clock was ahead for a
// while, orders were forgotten that have not expired by the time that it tells
// later, and one of them may come again; orders made since are newer, and are done.
// Those that were made while it was ahead bear times to come, up to Ahead: see
// setRight.
type mark struct {
	Until  time.Time `json:"until"`
	Newest uint64    `json:"newest"`
	Ahead  uint64    `json:"ahead,omitempty"`
}

// aheadOf is more than the clocks of coordinators differ: an order made later than
// that is of a time when one was wrong.
const aheadOf = time.Hour

func (m mark) covers(order string, expires, now time.Time) bool {
	id, err := ulid.ParseStrict(order)
	if err != nil || !expires.Before(m.Until) {
		return false
	}
	return id.Time() <= m.Newest || id.Time() <= m.Ahead && id.Time() > ulid.Timestamp(now.Add(aheadOf))
}

// setRight is m for a clock that turns out to have been ahead: what is made from
// now on must not count as forgotten. changed is false if it does not.
func (m mark) setRight(now time.Time) (_ mark, changed bool) {
	at := ulid.Timestamp(now)
	if m.Newest <= at {
		return m, false
	}
	m.Ahead, m.Newest = max(m.Ahead, m.Newest), at
	return m, true
}

// grown is m with these orders, forgotten at now.
func (m mark) grown(now time.Time, orders []string) mark {
	m.Until = later(m.Until, now)
	for _, order := range orders {
		if id, err := ulid.ParseStrict(order); err == nil {
			m.Newest = max(m.Newest, id.Time())
		}
	}
	return m
}

// acknowledge notes that the coordinator has these reports. It need not be
// durable: the worst that a lost note does is one report too many.
func acknowledge(j journal, reports []wire.Acked) error {
	seqs := make(map[string]uint64, len(reports))
	orders := make([]string, 0, len(reports))
	for _, r := range reports {
		seqs[r.Order] = r.Seq
		orders = append(orders, r.Order)
	}
	return j.revise(orders, false, func(e *entry) fate {
		if e.Acked || !e.answeredBy(seqs[e.Order]) {
			return leave
		}
		e.Acked = true
		return replace
	})
}

// unacked lists the orders whose report the coordinator has not acknowledged.
func unacked(j journal) (orders []string, err error) {
	err = j.each(func(e entry) {
		if !e.Acked {
			orders = append(orders, e.Order)
		}
	})
	return orders, err
}

// record adds what was lost to what was dropped before. It changes a copy.
func record(before []wire.Dropped, e entry) []wire.Dropped {
	all := slices.Clone(before)
	this := func(d wire.Dropped) bool { return d.Class == e.Class.name() }
	i := slices.IndexFunc(all, this)
	if i < 0 {
		all = append(all, wire.Dropped{Class: e.Class.name(), First: e.lostAt})
		slices.SortFunc(all, func(a, b wire.Dropped) int { return class(a.Class).worth() - class(b.Class).worth() })
		i = slices.IndexFunc(all, this)
	}
	all[i].Count++
	all[i].Bytes += uint64(e.lost)
	all[i].Last = e.lostAt
	return all
}

// badgerJournal is the journal of a device, in a small Badger store of its own.
//
// Keys: "order/<id>" → JSON of [entry]; "begun/<id>" → the expiry of an order
// whose handler was called and that has no report yet; "held/<id>" → its envelope; "revoked/<id>" → JSON of
// [revocation]; "forgotten" → JSON of [mark]; "dropped" → JSON of []wire.Dropped;
// "floor" → the newest trusted time; "epoch" → how often the agent was started.
//
// # Group commit
//
// Orders often end together, and a sync takes as long for one as for many. So a
// writer leaves its change in a queue and waits for its turn to commit; who gets
// it commits all that have queued up by then, and the others find theirs done.
// One transaction, then one sync, then the next: Badger's Sync leaves out the
// log of a memtable that has been rotated out, which happens only at the
// beginning of a transaction. A batch above [maxBatch] is therefore several
// transactions with a sync after each.
type badgerJournal struct {
	db    *badger.DB
	rest  *compactors.Keeper
	dir   string
	leave atomic.Int64 // bytes left free on the disk
	flush func() error // db.Sync, except in tests
	used  atomic.Int64
	lost  atomic.Pointer[[]wire.Dropped] // never changed in place

	queue  sync.Mutex // guards queued
	queued []*write
	turn   sync.Mutex // held by who commits
	// broken is set once a sync has failed: what is in memory may not be on the
	// disk, for good. died is closed then.
	broken  atomic.Pointer[error]
	died    chan struct{}
	gone    atomic.Pointer[mark] // never changed in place
	marking sync.Mutex           // held by who changes gone
}

// revocation is by which order another one is taken back, and until when that
// can matter.
type revocation struct {
	By      string    `json:"by"`
	Expires time.Time `json:"expires"`
}

// write is a change that waits for its commit.
type write struct {
	durable bool
	// change looks at the journal through tx, and says what is to be set; it may
	// be asked again.
	change func(tx *badger.Txn) (pairs []pair, err error)
	loss   *entry // set by change: what to add to the record
	done   bool
	err    error
}

// pair is a key with its new value; nil deletes it.
type pair struct {
	key, value []byte
}

// maxBatch bounds what one transaction sets, in bytes. Badger takes 15% of its
// memtable: 614 KiB, of which the largest entry may be 256.
const maxBatch = 320 << 10

const (
	orderPrefix   = "order/"
	begunPrefix   = "begun/"
	heldPrefix    = "held/"
	revokedPrefix = "revoked/"
)

var (
	floorKey     = []byte("floor")
	epochKey     = []byte("epoch")
	droppedKey   = []byte("dropped")
	forgottenKey = []byte("forgotten")
)

// journalFloor is what the journal leaves free on its disk, in bytes. Badger
// writes through mapped memory, where a full disk is a SIGBUS that ends the
// agent instead of an error: with a margin for what it compacts, it is asked
// before each write.
const journalFloor = 32 << 20

// room is an error if the disk is too full to write.
func (j *badgerJournal) room() error {
	var st unix.Statfs_t
	if err := unix.Statfs(j.dir, &st); err != nil {
		return fmt.Errorf("the journal's disk cannot be asked for its free space: %w", err)
	}
	if free := int64(st.Bavail) * int64(st.Bsize); free < j.leave.Load() {
		return fmt.Errorf("the disk of %s is full: %d MiB are free, the agent needs %d; free some space", j.dir, free>>20, j.leave.Load()>>20)
	}
	return nil
}

func openJournal(dir string) (*badgerJournal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the journal's folder cannot be made: %w", err)
	}
	j := &badgerJournal{dir: dir, died: make(chan struct{})}
	j.leave.Store(journalFloor)
	if err := j.room(); err != nil {
		return nil, err
	}
	if err := durable.RemoveEmpty(dir, ".vlog", ".mem"); err != nil {
		return nil, fmt.Errorf("the agent's journal in %s cannot be cleared of what a crash left: %w", dir, err)
	}
	opts := badger.DefaultOptions(dir).
		WithLogger(nil).
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithMemTableSize(4 << 20).
		WithNumMemtables(1).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(4).
		WithNumCompactors(2).
		WithBlockCacheSize(0).
		WithCompression(0).
		WithIndexCacheSize(1 << 20).
		// Every value stays in the tree, where compaction drops old ones: a value
		// log would have to be collected. 256 KiB is above the largest entry and
		// below Badger's bound for this MemTableSize.
		WithValueThreshold(256 << 10).
		WithValueLogFileSize(1 << 20).
		WithSyncWrites(false) // put syncs itself and checks that it worked
	var err error
	if j.db, err = badger.Open(opts); err != nil {
		return nil, fmt.Errorf("the agent's journal in %s cannot be opened: %w", dir, err)
	}
	j.flush = j.db.Sync
	if err := j.count(); err != nil {
		return nil, errors.Join(fmt.Errorf("the agent's journal in %s cannot be read: %w", dir, err), j.db.Close())
	}
	j.rest = compactors.Keep(j.db)
	return j, nil
}

func (j *badgerJournal) close() error {
	j.rest.Close()
	return j.db.Close()
}

// count finds out what the entries take, and what was lost and forgotten before.
func (j *badgerJournal) count() error {
	lost, gone := []wire.Dropped{}, mark{}
	j.lost.Store(&lost)
	j.gone.Store(&gone)
	return j.db.View(func(tx *badger.Txn) error {
		var used int64
		if err := eachItem(tx, orderPrefix, func(item *badger.Item) error {
			return item.Value(func(v []byte) error {
				used += int64(len(item.Key()) + len(v))
				return nil
			})
		}); err != nil {
			return err
		}
		j.used.Store(used)
		return errors.Join(
			valueOf(tx, droppedKey, func(v []byte) error { return json.Unmarshal(v, &lost) }),
			valueOf(tx, forgottenKey, func(v []byte) error { return json.Unmarshal(v, &gone) }),
		)
	})
}

func (j *badgerJournal) bytes() int64            { return j.used.Load() }
func (j *badgerJournal) dropped() []wire.Dropped { return slices.Clone(*j.lost.Load()) }

func eachItem(tx *badger.Txn, prefix string, f func(*badger.Item) error) error {
	it := tx.NewIterator(badger.IteratorOptions{Prefix: []byte(prefix)})
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		if err := f(it.Item()); err != nil {
			return err
		}
	}
	return nil
}

// valueOf calls f with the value of key, if there is one.
func valueOf(tx *badger.Txn, key []byte, f func([]byte) error) error {
	item, err := tx.Get(key)
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return item.Value(f)
}

func orderKey(order string) []byte   { return []byte(orderPrefix + order) }
func begunKey(order string) []byte   { return []byte(begunPrefix + order) }
func heldKey(order string) []byte    { return []byte(heldPrefix + order) }
func revokedKey(order string) []byte { return []byte(revokedPrefix + order) }

func (j *badgerJournal) put(e entry) error {
	w := &write{durable: true}
	w.change = func(tx *badger.Txn) ([]pair, error) {
		pairs, err := w.keep(e)
		if err != nil {
			return nil, err
		}
		for _, key := range [][]byte{begunKey(e.Order), heldKey(e.Order), revokedKey(e.Order)} {
			err = errors.Join(err, valueOf(tx, key, func([]byte) error {
				pairs = append(pairs, pair{key: key})
				return nil
			}))
		}
		return pairs, err
	}
	return j.commit(w)
}

func (j *badgerJournal) revoke(order, by string, expires time.Time) error {
	raw, err := json.Marshal(revocation{by, expires})
	if err != nil {
		return err
	}
	return j.set(true, revokedKey(order), raw)
}

func (j *badgerJournal) revokedBy(order string) (string, error) {
	var r revocation
	err := j.db.View(func(tx *badger.Txn) error {
		return valueOf(tx, revokedKey(order), func(v []byte) error { return json.Unmarshal(v, &r) })
	})
	if err != nil {
		err = fmt.Errorf("the journal cannot be read: %w", err)
	}
	return r.By, err
}

func (j *badgerJournal) forgot(order string, expires, now time.Time) bool {
	return j.gone.Load().covers(order, expires, now)
}

func (j *badgerJournal) timeIs(now time.Time) error {
	j.marking.Lock()
	defer j.marking.Unlock()
	gone, changed := j.gone.Load().setRight(now)
	if !changed {
		return nil
	}
	return j.mark(gone)
}

// mark puts what is forgotten on the disk, and then in force. j.marking is held.
func (j *badgerJournal) mark(gone mark) error {
	raw, err := json.Marshal(gone)
	if err != nil {
		return err
	}
	if err := j.set(true, forgottenKey, raw); err != nil {
		return err
	}
	j.gone.Store(&gone)
	return nil
}

// keep is e as it is stored; what was given up for it is recorded with it.
func (w *write) keep(e entry) ([]pair, error) {
	if e.lost > 0 {
		w.loss = &e
	}
	raw, err := json.Marshal(e)
	return []pair{{orderKey(e.Order), raw}}, err
}

func (j *badgerJournal) revise(orders []string, durable bool, change func(*entry) fate) error {
	writes := make([]*write, 0, len(orders))
	for _, order := range orders {
		w := &write{durable: durable}
		w.change = func(tx *badger.Txn) (pairs []pair, err error) {
			e, ok, err := find(tx, order)
			if err != nil || !ok {
				return nil, err
			}
			switch change(&e) {
			case replace:
				return w.keep(e)
			case remove:
				return []pair{{key: orderKey(order)}}, nil
			}
			return nil, nil
		}
		writes = append(writes, w)
	}
	return j.commit(writes...)
}

func (j *badgerJournal) begin(order string, expires time.Time, durable bool) error {
	raw, err := expires.UTC().MarshalText()
	if err != nil {
		return err
	}
	return j.set(durable, begunKey(order), raw)
}

func (j *badgerJournal) begun(order string) (ok bool, err error) {
	err = j.db.View(func(tx *badger.Txn) error {
		return valueOf(tx, begunKey(order), func([]byte) error {
			ok = true
			return nil
		})
	})
	if err != nil {
		err = fmt.Errorf("the journal cannot be read: %w", err)
	}
	return ok, err
}

func (j *badgerJournal) hold(order string, envelope []byte) error {
	return j.set(false, heldKey(order), envelope)
}

func (j *badgerJournal) held() (envelopes [][]byte, err error) {
	err = j.db.View(func(tx *badger.Txn) error {
		return eachItem(tx, heldPrefix, func(item *badger.Item) error {
			v, err := item.ValueCopy(nil)
			envelopes = append(envelopes, v)
			return err
		})
	})
	if err != nil {
		err = fmt.Errorf("the journal cannot be read: %w", err)
	}
	return envelopes, err
}

func (j *badgerJournal) set(durable bool, key, value []byte) error {
	return j.commit(&write{durable: durable, change: func(*badger.Txn) ([]pair, error) { return []pair{{key, value}}, nil }})
}

// commit waits until all of these writes are done; see the type's comment.
func (j *badgerJournal) commit(mine ...*write) error {
	if len(mine) == 0 {
		return nil
	}
	j.queue.Lock()
	j.queued = append(j.queued, mine...)
	j.queue.Unlock()
	j.turn.Lock()
	defer j.turn.Unlock()
	if !mine[len(mine)-1].done {
		j.queue.Lock()
		all := j.queued
		j.queued = nil
		j.queue.Unlock()
		for len(all) > 0 {
			all = all[j.transact(all):]
		}
	}
	var failed error
	for _, w := range mine {
		if w.err != nil {
			failed = w.err // most likely it is the same for all of them
		}
	}
	return failed
}

// transact commits as many writes as go into one transaction, at least one,
// syncs if one of them wants it, and says how many they were. j.turn is held.
func (j *badgerJournal) transact(all []*write) (n int) {
	err := j.writable()
	var b batch
	if err == nil {
		n, b, err = j.attempt(all)
	}
	if err == nil {
		j.used.Add(b.grown)
		if b.lost != nil {
			j.lost.Store(&b.lost)
		}
		if b.durable {
			err = j.sync()
		}
	}
	n = max(n, 1)
	for _, w := range all[:n] {
		w.done = true
		w.err = errors.Join(w.err, err)
	}
	return n
}

// batch is what a transaction amounts to.
type batch struct {
	size, grown int64 // bytes set; by which the entries grew
	durable     bool
	lost        []wire.Dropped // the whole record anew; nil if nothing was lost
}

func (j *badgerJournal) attempt(all []*write) (n int, b batch, err error) {
	j.rest.Begin(maxBatch)
	defer j.rest.End()
	tx := j.db.NewTransaction(true)
	defer tx.Discard()
	for ; n < len(all); n++ {
		w := all[n]
		w.loss = nil
		pairs, failed := w.change(tx)
		if failed != nil {
			w.err = failed // of this one alone: it has set nothing
			continue
		}
		var size int64
		for _, p := range pairs {
			size += int64(len(p.key) + len(p.value) + 64)
		}
		if n > 0 && b.size+size > maxBatch {
			break
		}
		b.size += size
		for _, p := range pairs {
			grown, err := apply(tx, p)
			if err != nil {
				return n, b, fmt.Errorf("the journal cannot be written: %w", err)
			}
			b.grown += grown
		}
		b.durable = b.durable || w.durable && len(pairs) > 0
		if w.loss != nil {
			if b.lost == nil {
				b.lost = *j.lost.Load()
			}
			b.lost = record(b.lost, *w.loss)
		}
	}
	if b.lost != nil {
		raw, err := json.Marshal(b.lost)
		if err == nil {
			err = tx.Set(droppedKey, raw)
		}
		if err != nil {
			return n, b, fmt.Errorf("the journal cannot be written: %w", err)
		}
	}
	if err := tx.Commit(); err != nil {
		return n, b, fmt.Errorf("the journal cannot be written: %w", err)
	}
	return n, b, nil
}

// apply sets or deletes a key, and says by how many bytes the entries grow.
func apply(tx *badger.Txn, p pair) (grown int64, err error) {
	if bytes.HasPrefix(p.key, []byte(orderPrefix)) {
		err = valueOf(tx, p.key, func(v []byte) error {
			grown -= int64(len(p.key) + len(v))
			return nil
		})
		if p.value != nil {
			grown += int64(len(p.key) + len(p.value))
		}
	}
	if err != nil {
		return 0, err
	}
	if p.value == nil {
		return grown, tx.Delete(p.key)
	}
	return grown, tx.Set(p.key, p.value)
}

// sync brings to the disk what was committed. After a failure nothing that is
// in memory can be relied on, and the journal takes nothing any more.
func (j *badgerJournal) sync() error {
	err := j.flush()
	if err == nil {
		err = durable.Sync(j.dir) // of a log that is new; Badger does it some time later
	}
	if err != nil {
		err = fmt.Errorf("the journal could not be synced to disk, and is not used until the agent is started again: %w", err)
		if j.broken.Swap(&err) == nil {
			close(j.died)
		}
	}
	return err
}

func (j *badgerJournal) writable() error { return cmp.Or(j.usable(), j.room()) }

func (j *badgerJournal) usable() error {
	if err := j.broken.Load(); err != nil {
		return *err
	}
	return nil
}

func (j *badgerJournal) get(order string) (e entry, ok bool, err error) {
	if err := j.usable(); err != nil {
		return entry{}, false, err
	}
	err = j.db.View(func(tx *badger.Txn) error {
		e, ok, err = find(tx, order)
		return err
	})
	if err != nil {
		return entry{}, false, fmt.Errorf("the journal cannot be read: %w", err)
	}
	return e, ok, nil
}

func find(tx *badger.Txn, order string) (e entry, ok bool, err error) {
	err = valueOf(tx, orderKey(order), func(v []byte) error {
		ok = true
		return json.Unmarshal(v, &e)
	})
	return e, ok, err
}

func (j *badgerJournal) each(f func(entry)) error {
	return j.db.View(func(tx *badger.Txn) error {
		return eachItem(tx, orderPrefix, func(item *badger.Item) error {
			var e entry
			if err := item.Value(func(v []byte) error { return json.Unmarshal(v, &e) }); err != nil {
				return err
			}
			f(e)
			return nil
		})
	})
}

// forget also drops what began or was taken back and never concluded. That it
// has forgotten is on the disk before anything is.
func (j *badgerJournal) forget(now time.Time) error {
	is := forgotten(now)
	var old []string
	if err := j.each(func(e entry) {
		if is(&e) == remove {
			old = append(old, e.Order)
		}
	}); err != nil {
		return err
	}
	var never []pair
	drop := func(expires time.Time, item *badger.Item, prefix string) {
		if expires.Add(keepConcluded).Before(now) {
			never = append(never, pair{key: item.KeyCopy(nil)}, pair{key: heldKey(string(item.Key()[len(prefix):]))})
			old = append(old, string(item.Key()[len(prefix):]))
		}
	}
	err := j.db.View(func(tx *badger.Txn) error {
		return errors.Join(
			eachItem(tx, begunPrefix, func(item *badger.Item) error {
				return item.Value(func(v []byte) error {
					var expires time.Time
					_ = expires.UnmarshalText(v) // what cannot be read goes
					drop(expires, item, begunPrefix)
					return nil
				})
			}),
			eachItem(tx, revokedPrefix, func(item *badger.Item) error {
				return item.Value(func(v []byte) error {
					var r revocation
					_ = json.Unmarshal(v, &r) // the same
					drop(r.Expires, item, revokedPrefix)
					return nil
				})
			}))
	})
	if err != nil || len(old) == 0 {
		return err
	}
	j.marking.Lock()
	err = j.mark(j.gone.Load().grown(now, old))
	j.marking.Unlock()
	if err != nil {
		return err
	}
	if len(never) > 0 {
		err = j.commit(&write{change: func(*badger.Txn) ([]pair, error) { return never, nil }})
	}
	return errors.Join(err, j.revise(old, false, is))
}

// floor is the newest trusted time that was saved; zero if there is none.
func (j *badgerJournal) floor() (t time.Time, err error) {
	err = j.db.View(func(tx *badger.Txn) error { return valueOf(tx, floorKey, t.UnmarshalBinary) })
	return t, err
}

func (j *badgerJournal) saveFloor(t time.Time) error {
	raw, err := t.UTC().Truncate(time.Second).MarshalBinary()
	if err != nil {
		return err
	}
	return j.set(true, floorKey, raw)
}

// reportsAnEpoch is how many reports there can be in one life of the agent (a
// hundred a second for a year); epochs are multiples of it. They stay exact in
// any reader of JSON (2^53) for two million lives, and in Go's for four billion.
const reportsAnEpoch = 1 << 32

// nextEpoch counts the agent's lives, durably.
func (j *badgerJournal) nextEpoch() (uint64, error) {
	var n uint64
	err := j.commit(&write{durable: true, change: func(tx *badger.Txn) ([]pair, error) {
		n = 0
		err := valueOf(tx, epochKey, func(v []byte) error {
			n = binary.BigEndian.Uint64(v)
			return nil
		})
		n++
		return []pair{{epochKey, binary.BigEndian.AppendUint64(nil, n)}}, err
	}})
	if err != nil {
		return 0, err
	}
	return n * reportsAnEpoch, nil
}

// memoryJournal is a journal that dies with its process, for simulated devices.
type memoryJournal struct {
	mu     sync.Mutex
	orders map[string]entry
	open   map[string]time.Time // begun
	back   map[string]string    // revoked, by which order
	used   int64
	lost   []wire.Dropped
	gone   mark
}

func newMemoryJournal() *memoryJournal {
	return &memoryJournal{orders: map[string]entry{}, open: map[string]time.Time{}, back: map[string]string{}}
}

// size is near what an entry takes in memory.
func (e entry) size() int64 { return int64(2*len(e.Order) + len(e.Report) + 128) }

func (j *memoryJournal) get(order string) (entry, bool, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e, ok := j.orders[order]
	return e, ok, nil
}

func (j *memoryJournal) put(e entry) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.open, e.Order)
	delete(j.back, e.Order)
	j.set(e)
	return nil
}

func (j *memoryJournal) set(e entry) {
	j.drop(e.Order)
	if e.lost > 0 {
		j.lost = record(j.lost, e)
		e.lost = 0
	}
	j.orders[e.Order] = e
	j.used += e.size()
}

func (j *memoryJournal) drop(order string) {
	if old, ok := j.orders[order]; ok {
		j.used -= old.size()
		delete(j.orders, order)
	}
}

func (j *memoryJournal) revise(orders []string, _ bool, change func(*entry) fate) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, order := range orders {
		e, ok := j.orders[order]
		if !ok {
			continue
		}
		switch change(&e) {
		case replace:
			j.set(e)
		case remove:
			j.drop(order)
		}
	}
	return nil
}

func (j *memoryJournal) each(f func(entry)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.orders {
		f(e)
	}
	return nil
}

func (j *memoryJournal) writable() error           { return nil }
func (j *memoryJournal) saveFloor(time.Time) error { return nil } // no life comes after this one

// Nor is anything held for it.
func (j *memoryJournal) hold(string, []byte) error { return nil }
func (j *memoryJournal) held() ([][]byte, error)   { return nil, nil }

func (j *memoryJournal) begin(order string, expires time.Time, _ bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.open[order] = expires
	return nil
}

func (j *memoryJournal) begun(order string) (bool, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	_, ok := j.open[order]
	return ok, nil
}

func (j *memoryJournal) bytes() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.used
}

func (j *memoryJournal) dropped() []wire.Dropped {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.lost)
}

func (j *memoryJournal) forget(now time.Time) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	is := forgotten(now)
	var old []string
	for order, e := range j.orders {
		if is(&e) == remove {
			j.drop(order)
			old = append(old, order)
		}
	}
	for order, expires := range j.open {
		if expires.Add(keepConcluded).Before(now) {
			delete(j.open, order)
			delete(j.back, order)
			old = append(old, order)
		}
	}
	if len(old) > 0 {
		j.gone = j.gone.grown(now, old)
	}
	return nil
}

func (j *memoryJournal) forgot(order string, expires, now time.Time) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.gone.covers(order, expires, now)
}

func (j *memoryJournal) timeIs(now time.Time) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.gone, _ = j.gone.setRight(now)
	return nil
}

func (j *memoryJournal) revoke(order, by string, _ time.Time) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, open := j.open[order]; open {
		j.back[order] = by
	}
	return nil
}

func (j *memoryJournal) revokedBy(order string) (string, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.back[order], nil
}
