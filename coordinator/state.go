package coordinator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/engine"
)

// storeTimeout bounds every single call to the state store.
const storeTimeout = 15 * time.Second

// maxRecord is what fits a message of NATS with its default limit of 1 MiB, in bytes.
const maxRecord = 1<<20 - 1<<10

// errNotFound is returned for a key that has no record.
var errNotFound = errors.New("not found")

// table is one kind of record in a JetStream key-value bucket, with a copy in
// memory that a watch keeps up to date. Every coordinator of a fleet has such a
// copy; changes are made by compare-and-set on the bucket, so that two of them
// cannot undo each other. The copy holds every record, or those that [keeping]
// says; the others are read from the bucket ([table.find]).
type table[T any] struct {
	kv   jetstream.KeyValue
	what string // for messages, e.g. "device"

	mu      sync.RWMutex
	rows    map[string]row[T]
	removed map[string]uint64      // key → revision that we deleted, until the watch says so too
	left    map[string]uint64      // key → revision that we wrote and do not keep, until the watch says so too
	damaged map[string]bool        // keys of records that cannot be decoded
	writing map[string]*written[T] // what we are writing now: the watch may tell before the answer comes
	seen    uint64                 // newest revision that the watch has given
	loaded  bool                   // the watch has given all there was, and gives news
	watch   jetstream.KeyWatcher
	done    chan struct{}
	waiters map[string]*waiter
	onEach  func(key string, v T, gone bool)
	keep    func(v T) bool // nil keeps all
	flat    bool
	write   func(v T) ([]byte, error)
	log     *slog.Logger
}

// tableOption is how one table differs from others.
type tableOption[T any] func(*table[T])

// keeping has the copy in memory hold only what keep says.
func keeping[T any](keep func(v T) bool) tableOption[T] {
	return func(t *table[T]) { t.keep = keep }
}

// flat is for records that change functions never write through: they replace
// what a slice or a map of it holds, and so need no copy of their own.
func flat[T any]() tableOption[T] { return func(t *table[T]) { t.flat = true } }

// encoded gives records another way into JSON than [json.Marshal].
func encoded[T any](f func(v T) ([]byte, error)) tableOption[T] {
	return func(t *table[T]) { t.write = f }
}

// waiter is closed when its key changes. It is shared, and goes when the last
// of those who wait leaves.
type waiter struct {
	c chan struct{}
	n int
}

type row[T any] struct {
	v   T
	rev uint64
}

type written[T any] struct {
	v   T
	raw []byte
}

// loggingTo tells of a long start.
func loggingTo[T any](log *slog.Logger) tableOption[T] {
	return func(t *table[T]) { t.log = log }
}

// How long all records take depends on how many there are; that some come is
// what can be asked.
const (
	loadIdle = 30 * time.Second // without a record
	loadNews = 10 * time.Second
)

// openTable fills the copy before it returns. onEach, if not nil, sees each
// record once at the start and after each change, in the order of changes and
// never concurrently. It must not call the table's writing methods.
func openTable[T any](ctx context.Context, kv jetstream.KeyValue, what string, onEach func(key string, v T, gone bool), options ...tableOption[T]) (*table[T], error) {
	t := &table[T]{kv: kv, what: what, rows: make(map[string]row[T]), removed: make(map[string]uint64),
		left: make(map[string]uint64), damaged: make(map[string]bool), waiters: make(map[string]*waiter), done: make(chan struct{}), onEach: onEach,
		log: slog.New(slog.DiscardHandler), writing: make(map[string]*written[T]), write: func(v T) ([]byte, error) { return json.Marshal(v) }}
	for _, o := range options {
		o(t)
	}
	w, err := kv.WatchAll(context.WithoutCancel(ctx))
	if err != nil {
		return nil, fmt.Errorf("the coordinator's %s records cannot be read: %w", what, err)
	}
	t.watch = w
	idle := time.NewTimer(loadIdle)
	defer idle.Stop()
	news := time.NewTicker(loadNews)
	defer news.Stop()
	for loading, n := true, 0; loading; {
		select {
		case e, open := <-w.Updates():
			if !open {
				return nil, fmt.Errorf("the coordinator's %s records cannot be read: the state store went away", what)
			}
			if e == nil { // the marker for "that was all there is"
				loading = false
				break
			}
			t.apply(e)
			n++
			idle.Reset(loadIdle)
		case <-news.C:
			t.log.Info(fmt.Sprintf("reading %s records", what), "so_far", n)
		case <-idle.C:
			_ = w.Stop() // the reason for giving up is another
			return nil, fmt.Errorf("the coordinator's %s records cannot be read: after %d of them the state store said nothing for %s: %w", what, n, loadIdle, context.DeadlineExceeded)
		case <-ctx.Done():
			_ = w.Stop() // the reason for giving up is ctx's
			return nil, fmt.Errorf("the coordinator's %s records cannot be read: %w", what, ctx.Err())
		}
	}
	t.mu.Lock()
	t.loaded = true
	t.mu.Unlock()
	go t.follow()
	return t, nil
}

func (t *table[T]) follow() {
	defer close(t.done)
	for e := range t.watch.Updates() {
		if e != nil {
			t.apply(e)
		}
	}
}

// close ends the watch.
func (t *table[T]) close() {
	_ = t.watch.Stop() // fails only when the connection is gone, which is the aim
	select {
	case <-t.done:
	case <-time.After(storeTimeout):
	}
}

// apply takes one change into the copy. A record that cannot be decoded counts
// as absent: it was written by a newer version, or damaged. [table.unreadable]
// tells of those, for who must not take them for removed.
func (t *table[T]) apply(e jetstream.KeyValueEntry) {
	if t.knows(e) {
		return
	}
	v, err := t.decode(e)
	gone := e.Operation() != jetstream.KeyValuePut || err != nil
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.loaded && e.Revision() <= t.seen {
		return // the watch gives news in the order of revisions: this is none
	}
	t.seen = max(t.seen, e.Revision())
	if delete(t.damaged, e.Key()); err != nil {
		t.damaged[e.Key()] = true
		t.log.Error(fmt.Sprintf("the %s record cannot be read and counts as absent: it is damaged, or of a newer version", t.what), "key", e.Key(), "error", err)
	}
	if old, ok := t.rows[e.Key()]; ok && old.rev >= e.Revision() {
		return // our own write, already taken
	}
	if rev, ok := t.left[e.Key()]; ok {
		if e.Revision() >= rev {
			delete(t.left, e.Key())
		}
		if e.Revision() <= rev {
			return // the same, of a record that is not kept
		}
	}
	if rev, ok := t.removed[e.Key()]; ok {
		if e.Revision() <= rev {
			return // what we have deleted since
		}
		delete(t.removed, e.Key())
	}
	if gone || !t.keeps(v) {
		delete(t.rows, e.Key())
	} else {
		t.rows[e.Key()] = row[T]{v, e.Revision()}
	}
	t.announce(e.Key(), v, gone)
}

// decode spares what we are writing ourselves the way back through JSON.
func (t *table[T]) decode(e jetstream.KeyValueEntry) (v T, err error) {
	if e.Operation() != jetstream.KeyValuePut {
		return v, nil
	}
	t.mu.RLock()
	w := t.writing[e.Key()]
	t.mu.RUnlock()
	if w != nil && bytes.Equal(w.raw, e.Value()) {
		return w.v, nil
	}
	err = json.Unmarshal(e.Value(), &v)
	return v, err
}

// unreadable counts the records that are there and cannot be decoded.
func (t *table[T]) unreadable() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.damaged)
}

func (t *table[T]) keeps(v T) bool { return t.keep == nil || t.keep(v) }

// knows is true for the watch's news of what we wrote ourselves, and of what that
// has replaced: most of it is, and need not be decoded.
func (t *table[T]) knows(e jetstream.KeyValueEntry) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.loaded {
		return false
	}
	rev, left := t.left[e.Key()]
	if old, ok := t.rows[e.Key()]; ok {
		rev, left = old.rev, false
	}
	if e.Revision() > rev {
		return false
	}
	if left && e.Revision() == rev {
		delete(t.left, e.Key())
	}
	t.seen = max(t.seen, e.Revision())
	return true
}

// announce tells who waits. t.mu is held.
func (t *table[T]) announce(key string, v T, gone bool) {
	if w, ok := t.waiters[key]; ok {
		close(w.c)
		delete(t.waiters, key)
	}
	if t.onEach != nil {
		t.onEach(key, v, gone)
	}
}

// find reads from the copy, and from the bucket what the copy does not keep.
// It returns errNotFound for a key that has no record.
func (t *table[T]) find(ctx context.Context, key string) (T, error) {
	if v, ok := t.get(key); ok {
		return v, nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	v, _, exists, err := t.load(ctx, key, true)
	if err == nil && !exists {
		err = errNotFound
	}
	return v, err
}

// keys lists the keys of the bucket that fit a filter in the form of a NATS
// subject, kept in the copy or not, in no order.
func (t *table[T]) keys(ctx context.Context, filter string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	l, err := t.kv.ListKeysFiltered(ctx, filter)
	if err != nil {
		return nil, fmt.Errorf("the %s records cannot be listed: %w", t.what, engine.StoreError(err))
	}
	var out []string
	for k := range l.Keys() {
		out = append(out, k)
	}
	if ctx.Err() != nil { // the list was cut off
		return nil, fmt.Errorf("the %s records cannot be listed: %w", t.what, ctx.Err())
	}
	return out, nil
}

// get reads from the copy.
func (t *table[T]) get(key string) (T, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	r, ok := t.rows[key]
	return r.v, ok
}

// len is how many records the copy has.
func (t *table[T]) len() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.rows)
}

// each calls f on every record of the copy until it returns false.
func (t *table[T]) each(f func(key string, v T) bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for k, r := range t.rows {
		if !f(k, r.v) {
			return
		}
	}
}

// all is every record of the copy, in the order of less.
func (t *table[T]) all(less func(a, b T) int) []T {
	t.mu.RLock()
	out := make([]T, 0, len(t.rows))
	for _, r := range t.rows {
		out = append(out, r.v)
	}
	t.mu.RUnlock()
	slices.SortFunc(out, less)
	return out
}

// changed is closed when the record of key changes next. Who does not wait any
// longer calls leave.
func (t *table[T]) changed(key string) (c <-chan struct{}, leave func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.waiters[key]
	if w == nil {
		w = &waiter{c: make(chan struct{})}
		t.waiters[key] = w
	}
	w.n++
	return w.c, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if w.n--; w.n == 0 && t.waiters[key] == w {
			delete(t.waiters, key)
		}
	}
}

// errUnchanged is what a change function returns to leave the record alone.
var errUnchanged = errors.New("unchanged")

// change reads, changes and writes one record by compare-and-set, again and
// again until nobody came between. f gets the zero value and exists false for a
// record that is not there; its error ends the attempt and is returned, except
// errUnchanged, which is success without a write.
func (t *table[T]) change(ctx context.Context, key string, f func(v *T, exists bool) error) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	for try := 0; ; try++ {
		v, rev, exists, err := t.load(ctx, key, try > 0)
		if err != nil {
			return v, err
		}
		if err := f(&v, exists); errors.Is(err, errUnchanged) {
			return v, nil
		} else if err != nil {
			return v, err
		}
		if !exists {
			rev = 0
		}
		err = t.put(ctx, key, v, rev)
		if err == nil || !isConflict(err) {
			return v, err
		}
	}
}

// put writes a record whose revision is still rev, 0 for one that is not there.
func (t *table[T]) put(ctx context.Context, key string, v T, rev uint64) error {
	raw, err := t.encode(v)
	if err != nil {
		return err
	}
	w := &written[T]{v, raw}
	t.mu.Lock()
	t.writing[key] = w
	t.mu.Unlock()
	if rev > 0 {
		rev, err = t.kv.Update(ctx, key, raw, rev)
	} else {
		rev, err = t.kv.Create(ctx, key, raw)
	}
	if err == nil {
		t.took(key, v, rev)
	}
	t.mu.Lock()
	if t.writing[key] == w {
		delete(t.writing, key)
	}
	t.mu.Unlock()
	if err != nil {
		return fmt.Errorf("the %s record %s cannot be saved: %w", t.what, key, engine.StoreError(err))
	}
	return nil
}

// errExists is returned by create for a key that is taken.
var errExists = errors.New("there is such a record")

// create writes a record that must not be there yet: one call to the bucket.
func (t *table[T]) create(ctx context.Context, key string, v T) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	err := t.put(ctx, key, v, 0)
	if isConflict(err) {
		return errExists
	}
	return err
}

func (t *table[T]) encode(v T) ([]byte, error) {
	raw, err := t.write(v)
	if err == nil && len(raw) > maxRecord {
		err = refuse(http.StatusRequestEntityTooLarge, "too_large", "this would make a %s record of %d bytes, at most %d can be kept", t.what, len(raw), maxRecord)
	}
	return raw, err
}

// load reads from the copy first, because conflicts are rare, and from the
// bucket after one. Values are decoded afresh: f may change what it gets.
func (t *table[T]) load(ctx context.Context, key string, fresh bool) (v T, rev uint64, exists bool, err error) {
	if !fresh {
		t.mu.RLock()
		r, ok := t.rows[key]
		t.mu.RUnlock()
		if ok && t.flat {
			return r.v, r.rev, true, nil
		}
		if ok {
			raw, err := json.Marshal(r.v)
			if err == nil {
				err = json.Unmarshal(raw, &v)
			}
			return v, r.rev, true, err
		}
	}
	e, err := t.kv.Get(ctx, key)
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound), errors.Is(err, jetstream.ErrKeyDeleted), errors.Is(err, jetstream.ErrInvalidKey):
		return v, 0, false, nil // what cannot be a key has no record either
	case err != nil:
		return v, 0, false, fmt.Errorf("the %s record %s cannot be read: %w", t.what, key, err)
	}
	if err := json.Unmarshal(e.Value(), &v); err != nil {
		return v, 0, false, fmt.Errorf("the %s record %s is damaged: %w", t.what, key, err)
	}
	return v, e.Revision(), true, nil
}

// took notes our own write in the copy, so that we read what we wrote.
func (t *table[T]) took(key string, v T, rev uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	// What the watch has passed it has either told us or seen replaced: a record
	// that was deleted meanwhile must not come back.
	if old, ok := t.rows[key]; rev <= t.seen || ok && old.rev >= rev {
		return
	}
	if gone, ok := t.removed[key]; ok && gone >= rev {
		return
	}
	if old, ok := t.left[key]; ok && old >= rev {
		return
	}
	if t.keeps(v) {
		delete(t.left, key)
		t.rows[key] = row[T]{v, rev}
	} else {
		delete(t.rows, key)
		t.left[key] = rev
	}
	t.announce(key, v, false)
}

// remove deletes a record if cond still holds for it.
func (t *table[T]) remove(ctx context.Context, key string, cond func(v T) bool) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	for try := 0; ; try++ {
		v, rev, exists, err := t.load(ctx, key, try > 0)
		if err != nil {
			return err
		}
		if !exists || !cond(v) {
			return errNotFound
		}
		err = t.kv.Delete(ctx, key, jetstream.LastRevision(rev))
		if err == nil {
			t.forget(key, v, rev)
			return nil
		}
		if !isConflict(err) {
			return fmt.Errorf("the %s record %s cannot be removed: %w", t.what, key, engine.StoreError(err))
		}
	}
}

// forget takes our own deletion of revision rev into the copy.
func (t *table[T]) forget(key string, v T, rev uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.rows[key]
	switch {
	case ok && r.rev > rev:
		return // made anew by somebody else, and the watch has told us
	case ok:
		delete(t.rows, key)
	case t.seen > rev:
		return // the watch is past the record, and may be past its end
	}
	t.removed[key] = rev
	t.announce(key, v, true)
}

func isConflict(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrKeyExists) ||
		errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence
}
