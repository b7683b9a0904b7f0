package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go/jetstream"
)

type note struct {
	N    int      `json:"n"`
	List []string `json:"list,omitempty"`
}

// aBucket is a bucket of its own in the shared coordinator's engine.
func aBucket(t testing.TB) jetstream.KeyValue {
	t.Helper()
	kv, err := aWorld(t).eng.KV(testContext(t), "test-"+newNonce())
	must(t, err)
	return kv
}

func aTable(t testing.TB, kv jetstream.KeyValue, onEach func(string, note, bool)) *table[note] {
	t.Helper()
	tab, err := openTable(testContext(t), kv, "note", onEach)
	must(t, err)
	t.Cleanup(tab.close)
	return tab
}

func TestConcurrentChangesLoseNothing(t *testing.T) {
	kv := aBucket(t)
	// Two coordinators, eight writers in each.
	tables := []*table[note]{aTable(t, kv, nil), aTable(t, kv, nil)}
	const writers, each = 16, 5
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for k := range each {
				_, err := tables[i%2].change(testContext(t), "shared", func(v *note, _ bool) error {
					v.N++
					v.List = append(v.List, fmt.Sprintf("%d-%d", i, k))
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, tab := range tables {
		eventually(t, "both have seen all", func() bool { v, _ := tab.get("shared"); return v.N == writers*each })
		v, _ := tab.get("shared")
		slices.Sort(v.List)
		if n := len(slices.Compact(v.List)); n != writers*each {
			t.Errorf("%d of %d entries are left", n, writers*each)
		}
	}
}

func TestEachCoordinatorSeesTheOthersChanges(t *testing.T) {
	kv := aBucket(t)
	ctx := testContext(t)
	set := func(n int) func(*note, bool) error { return func(v *note, _ bool) error { v.N = n; return nil } }
	a := aTable(t, kv, nil)
	_, err := a.change(ctx, "old", set(1))
	must(t, err)
	b := aTable(t, kv, nil)
	if v, ok := b.get("old"); !ok || v.N != 1 {
		t.Errorf("a new coordinator starts without what was there: %+v %v", v, ok)
	}
	changed, leave := b.changed("new")
	defer leave()
	_, err = a.change(ctx, "new", set(2))
	must(t, err)
	next(t, changed, "the word of the change")
	if v, ok := b.get("new"); !ok || v.N != 2 {
		t.Errorf("%+v %v", v, ok)
	}
	gone, leave := b.changed("old")
	defer leave()
	must(t, a.remove(ctx, "old", func(note) bool { return true }))
	next(t, gone, "the word of the removal")
	if _, ok := b.get("old"); ok {
		t.Error("a removed record is still there")
	}
	// What is made under the same key again is there for both.
	_, err = b.change(ctx, "old", set(3))
	must(t, err)
	eventually(t, "it is there again", func() bool { v, ok := a.get("old"); return ok && v.N == 3 })
	if err := a.remove(ctx, "old", func(v note) bool { return v.N == 1 }); !errors.Is(err, errNotFound) {
		t.Errorf("a record that had changed was removed: %v", err)
	}
	if err := a.remove(ctx, "never", func(note) bool { return true }); !errors.Is(err, errNotFound) {
		t.Errorf("removal of nothing: %v", err)
	}
}

// Our own writes and the watch come from two sides: none may undo the other.
func TestAReadShowsTheLastWriteAlways(t *testing.T) {
	seen := map[string]note{}
	var mu sync.Mutex
	tab := aTable(t, aBucket(t), func(key string, v note, gone bool) {
		mu.Lock()
		defer mu.Unlock()
		if gone {
			delete(seen, key)
		} else {
			seen[key] = v
		}
	})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			key := fmt.Sprint("key", w)
			for n := range 60 {
				if _, err := tab.change(testContext(t), key, func(v *note, exists bool) error {
					if exists {
						t.Errorf("%s: a removed record came back with %+v", key, *v)
					}
					v.N = n
					return nil
				}); err != nil {
					t.Error(err)
				}
				if v, ok := tab.get(key); !ok || v.N != n {
					t.Errorf("%s: read %+v %v after writing %d", key, v, ok, n)
				}
				if err := tab.remove(testContext(t), key, func(note) bool { return true }); err != nil {
					t.Error(err)
				}
				if v, ok := tab.get(key); ok {
					t.Errorf("%s: read %+v after removing it", key, v)
				}
			}
		})
	}
	wg.Wait()
	// A last write by another table, and the watch is through with all before.
	_, err := tab.kv.Put(testContext(t), "end", []byte(`{"n":1}`))
	must(t, err)
	eventually(t, "the watch is through", func() bool { _, ok := tab.get("end"); return ok })
	mu.Lock()
	defer mu.Unlock()
	if want := map[string]note{"end": {N: 1}}; !maps.EqualFunc(seen, want, func(a, b note) bool { return a.N == b.N }) {
		t.Errorf("the follower has %v, want %v", seen, want)
	}
	tab.mu.Lock()
	defer tab.mu.Unlock()
	if len(tab.removed) != 0 || len(tab.rows) != 1 {
		t.Errorf("left behind: %v %v", tab.removed, tab.rows)
	}
}

// The order in which a write's own result and the watch's news of it, and of
// what came after, can arrive is not ours to choose: play all that matter.
func TestLateNewsDoesNotBringRecordsBack(t *testing.T) {
	ctx := testContext(t)
	kv := aBucket(t)
	tab := aTable(t, kv, nil)
	rev, err := kv.Put(ctx, "k", []byte(`{"n":1}`))
	must(t, err)
	eventually(t, "it is there", func() bool { _, ok := tab.get("k"); return ok })
	must(t, kv.Delete(ctx, "k"))
	eventually(t, "it is gone", func() bool { _, ok := tab.get("k"); return !ok })
	tab.took("k", note{N: 1}, rev) // our write's answer, late
	if v, ok := tab.get("k"); ok {
		t.Errorf("a record deleted by another came back: %+v", v)
	}
	must(t, func() error {
		_, err := tab.change(ctx, "m", func(v *note, _ bool) error { v.N = 1; return nil })
		return err
	}())
	e, err := kv.Get(ctx, "m")
	must(t, err)
	must(t, tab.remove(ctx, "m", func(note) bool { return true }))
	tab.apply(e) // the watch's news of the write, late
	if v, ok := tab.get("m"); ok {
		t.Errorf("a record that we deleted came back: %+v", v)
	}
	eventually(t, "the watch has given the deletion too", func() bool {
		tab.mu.RLock()
		defer tab.mu.RUnlock()
		return tab.seen > e.Revision()
	})
	tab.apply(e)
	if v, ok := tab.get("m"); ok {
		t.Errorf("a record came back after the word of its deletion: %+v", v)
	}
}

func TestADamagedRecordIsAnErrorAndStopsNothingElse(t *testing.T) {
	kv := aBucket(t)
	ctx := testContext(t)
	for key, raw := range map[string]string{"good": `{"n":1}`, "damaged": `{"n":`, "other": `{"n":2}`} {
		_, err := kv.Put(ctx, key, []byte(raw))
		must(t, err)
	}
	tab := aTable(t, kv, nil)
	n := 0
	tab.each(func(string, note) bool { n++; return true })
	if n != 2 {
		t.Errorf("%d records are read, 2 are good", n)
	}
	if _, ok := tab.get("damaged"); ok {
		t.Error("a damaged record is given out")
	}
	_, err := tab.change(ctx, "damaged", func(v *note, exists bool) error { v.N = 9; return nil })
	if err == nil || !strings.Contains(err.Error(), "note record damaged is damaged") {
		t.Errorf("a change of a damaged record: %v", err)
	}
	if e, err := kv.Get(ctx, "damaged"); err != nil || string(e.Value()) != `{"n":` {
		t.Errorf("the damaged record, which somebody may restore, was overwritten: %v", err)
	}
	if _, err := tab.change(ctx, "good", func(v *note, _ bool) error { v.N = 5; return nil }); err != nil {
		t.Error(err)
	}
	// A good record that becomes damaged is not served from memory.
	changed, leave := tab.changed("other")
	defer leave()
	_, err = kv.Put(ctx, "other", []byte("x"))
	must(t, err)
	next(t, changed, "the damage")
	if v, ok := tab.get("other"); ok {
		t.Errorf("served: %+v", v)
	}
}

func TestChangesAreAllOrNothing(t *testing.T) {
	kv := aBucket(t)
	ctx := testContext(t)
	tab := aTable(t, kv, nil)
	_, err := tab.change(ctx, "k", func(v *note, _ bool) error { v.List = []string{"a"}; return nil })
	must(t, err)
	oops := errors.New("oops")
	_, err = tab.change(ctx, "k", func(v *note, _ bool) error { v.List[0] = "b"; return oops })
	if !errors.Is(err, oops) {
		t.Error(err)
	}
	if _, err = tab.change(ctx, "k", func(v *note, _ bool) error { v.List[0] = "c"; return errUnchanged }); err != nil {
		t.Error(err)
	}
	if v, _ := tab.get("k"); v.List[0] != "a" {
		t.Errorf("a change that was given up left %v", v.List)
	}
	_, err = tab.change(ctx, "k", func(v *note, _ bool) error { v.List[0] = strings.Repeat("x", maxRecord); return nil })
	var r *refusal
	if !errors.As(err, &r) || r.status != http.StatusRequestEntityTooLarge {
		t.Errorf("too large a record: %v", err)
	}
	// The largest that is allowed does fit.
	full := note{}
	raw, _ := json.Marshal(note{List: []string{""}})
	full.List = []string{strings.Repeat("x", maxRecord-len(raw))}
	if _, err = tab.change(ctx, "k", func(v *note, _ bool) error { *v = full; return nil }); err != nil {
		t.Errorf("the largest record: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := tab.change(ended, "k", func(v *note, _ bool) error { v.N++; return nil }); err == nil {
		t.Error("a change was made in spite of its context")
	}
}

// A record that is not kept is read from the bucket, and neither the news of
// our own write nor that of another coordinator brings it into the copy.
func TestOnlyWhatIsKeptIsInMemory(t *testing.T) {
	kv := aBucket(t)
	ctx := testContext(t)
	var mu sync.Mutex
	told := map[string]int{}
	small := keeping(func(v note) bool { return v.N < 10 })
	var tabs []*table[note]
	for range 2 {
		tab, err := openTable(ctx, kv, "note", func(key string, v note, gone bool) {
			mu.Lock()
			defer mu.Unlock()
			told[fmt.Sprint(key, v.N)]++
		}, small, flat[note]())
		must(t, err)
		t.Cleanup(tab.close)
		tabs = append(tabs, tab)
	}
	a, b := tabs[0], tabs[1]
	must(t, a.create(ctx, "k", note{N: 1}))
	if err := b.create(ctx, "k", note{N: 2}); !errors.Is(err, errExists) {
		t.Errorf("made twice: %v", err)
	}
	eventually(t, "both have it", func() bool { _, x := a.get("k"); _, y := b.get("k"); return x && y })
	changed, leave := b.changed("k")
	defer leave()
	_, err := a.change(ctx, "k", func(v *note, _ bool) error { v.N = 10; return nil })
	must(t, err)
	next(t, changed, "the word of the change")
	for i, tab := range tabs {
		if v, ok := tab.get("k"); ok {
			t.Errorf("coordinator %d holds %+v", i, v)
		}
		if v, err := tab.find(ctx, "k"); err != nil || v.N != 10 {
			t.Errorf("coordinator %d finds %+v %v", i, v, err)
		}
		if _, err := tab.find(ctx, "none"); !errors.Is(err, errNotFound) {
			t.Errorf("found nothing: %v", err)
		}
	}
	// Out of the copy it is changed by the same rules, and can come back.
	_, err = b.change(ctx, "k", func(v *note, exists bool) error {
		if !exists || v.N != 10 {
			t.Errorf("%+v %v", v, exists)
		}
		v.N = 3
		return nil
	})
	must(t, err)
	eventually(t, "it is back", func() bool { v, ok := a.get("k"); return ok && v.N == 3 })
	must(t, a.create(ctx, "j", note{N: 4}))
	eventually(t, "both have it", func() bool { _, ok := b.get("j"); return ok })
	if all := b.all(func(x, y note) int { return y.N - x.N }); len(all) != 2 || all[0].N != 4 || all[1].N != 3 {
		t.Errorf("%+v", all)
	}
	keys, err := b.keys(ctx, ">")
	slices.Sort(keys)
	if err != nil || !slices.Equal(keys, []string{"j", "k"}) {
		t.Errorf("%v %v", keys, err)
	}
	// Each is told of each change once.
	eventually(t, "the watch is through", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.left) == 0 && a.seen == b.rows["j"].rev
	})
	mu.Lock()
	defer mu.Unlock()
	for _, k := range []string{"k1", "k10", "k3", "j4"} {
		if told[k] != 2 {
			t.Errorf("%s was told %d times to 2 coordinators", k, told[k])
		}
	}
}

// counted is a record that counts how often one is read from JSON.
type counted struct{ N int }

var readCounted atomic.Int64

func (c *counted) UnmarshalJSON(raw []byte) error {
	readCounted.Add(1)
	return json.Unmarshal(raw, &c.N)
}

func (c counted) MarshalJSON() ([]byte, error) { return json.Marshal(c.N) }

// TestOwnWritesAreNotReadBack: neither when the watch tells of them after the
// answer to the write, nor when it is first. What others write is read.
func TestOwnWritesAreNotReadBack(t *testing.T) {
	kv := aBucket(t)
	open := func() *table[counted] {
		tab, err := openTable(testContext(t), kv, "counted", nil, flat[counted]())
		must(t, err)
		t.Cleanup(tab.close)
		return tab
	}
	tab := open()
	before := readCounted.Load()
	const writers, each = 8, 40
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			key := fmt.Sprint("k", i)
			if err := tab.create(testContext(t), key, counted{}); err != nil {
				t.Error(err)
			}
			for range each {
				if _, err := tab.change(testContext(t), key, func(v *counted, _ bool) error { v.N++; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	// The watch gives news in order: once it has told of the last, it has of all.
	c, leave := tab.changed("last")
	defer leave()
	raw, err := json.Marshal(counted{7})
	must(t, err)
	_, err = kv.Put(testContext(t), "last", raw)
	must(t, err)
	select {
	case <-c:
	case <-testContext(t).Done():
		t.Fatal("the watch does not tell")
	}
	if n := readCounted.Load() - before; n != 1 {
		t.Errorf("%d records were read from JSON, want 1: the one that somebody else wrote", n)
	}
	if len(tab.writing) != 0 {
		t.Errorf("%d writes are under way after all have ended", len(tab.writing))
	}
	for i := range writers {
		if v, _ := tab.get(fmt.Sprint("k", i)); v.N != each {
			t.Errorf("k%d is %d, want %d", i, v.N, each)
		}
	}
}
