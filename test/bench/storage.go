package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
	chunkorders "github.com/deimos-edge/deimos/sync/orders"
	"github.com/deimos-edge/deimos/sync/scrub"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

// The rows on storage. A store is opened in this process, as an agent opens it,
// and measured beside a plain file on the same disk: the same bytes, written,
// hashed and synced by who needs nothing else (plain.go). Both take turns, round
// by round, and the one that begins changes: what else the disk does meets both.
//
// A row that says "cold" reads from the disk, not from the page cache (cold.go).

const (
	// storageSpace is what the rows need free, in bytes: most of it for the file of
	// objects.go, half as much again on the devices, and what an agent is given in a
	// minute (load.go).
	storageSpace = 12 << 30

	putRounds  = 5
	readRounds = 5
	shelfBytes = 256 << 20 // in a volume whose reads are measured

	auditLeaves = 90
)

// storageRows are those of one kind, or all. Everything that a kind writes is below
// one folder, which is removed at its end.
func storageRows(ctx context.Context, t *table, kind string) error {
	kinds := []struct {
		name string
		rows func(ctx context.Context, t *table, dir string) error
	}{{"puts", putRows}, {"reads", readRows}, {"growth", growthRows}, {"memory", loadRows}, {"objects", objectRows}}
	known := kind == "all"
	var st unix.Statfs_t
	if err := unix.Statfs(os.TempDir(), &st); err != nil {
		return fmt.Errorf("the free space of %s: %w", os.TempDir(), err)
	}
	if free := int64(st.Bavail) * int64(st.Bsize); free < storageSpace {
		fmt.Printf("left out: storage: it needs %d GiB, and %s has %d: name a folder on another disk with TMPDIR\n", storageSpace>>30, os.TempDir(), free>>30)
		return nil
	}
	for _, k := range kinds {
		if kind != "all" && kind != k.name {
			continue
		}
		known = true
		dir, err := os.MkdirTemp("", "deimos-bench-")
		if err != nil {
			return err
		}
		err = k.rows(ctx, t, dir)
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		if err != nil {
			return fmt.Errorf("storage, %s: %w", k.name, err)
		}
	}
	if !known {
		return fmt.Errorf("there are no rows on storage called %q: see -help", kind)
	}
	return nil
}

// putRows compares puts that are durable with a plain file to which the same
// bytes are appended. Who puts knows the ids; both sides hash: the store into a
// tree of 4 KiB leaves, the file at one go.
func putRows(ctx context.Context, t *table, dir string) error {
	for _, r := range []struct{ size, atOnce, n int }{
		{64 << 10, 1, 128}, {1 << 20, 1, 48}, {4 << 20, 1, 24},
		{64 << 10, 16, 1024}, {1 << 20, 16, 192}, {4 << 20, 16, 64},
	} {
		rounds, err := measurePuts(ctx, filepath.Join(dir, fmt.Sprintf("%d-%d", r.size, r.atOnce)), r.size, r.atOnce, r.n)
		if err != nil {
			return err
		}
		t.paired(fmt.Sprintf("durable put, %s, %d at once", bytesOf(r.size), r.atOnce), "MiB/s", rounds, "%.0f")
	}
	return nil
}

func measurePuts(ctx context.Context, dir string, size, atOnce, n int) (rounds []pair, err error) {
	v, err := store.Open(dir, store.Options{})
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	defer func() { err = closed(v, err) }()
	plain, err := newPlainLog(dir + ".plain")
	if err != nil {
		return nil, err
	}
	defer os.Remove(dir + ".plain")
	defer func() { err = closed(plain, err) }()
	made := 0
	side := func(put func(chunk.ID, []byte) error) func() (float64, error) {
		return func() (float64, error) {
			b := newBatch(size, made, n)
			made += n
			began := time.Now()
			err := b.each(atOnce, func(i int, data []byte) error { return put(b.ids[i], data) })
			return mib(size*n) / time.Since(began).Seconds(), err
		}
	}
	return interleave(putRounds,
		side(func(id chunk.ID, data []byte) error { return v.Put(ctx, id, data) }),
		side(func(_ chunk.ID, data []byte) error { return plain.put(data) }))
}

// shelf is the same chunks in a volume and one after the other in a plain file.
type shelf struct {
	dir   string
	size  int
	ids   []chunk.ID // in the order in which they lie in the file
	v     *store.Volume
	plain *os.File
}

func newShelf(ctx context.Context, dir string, size, n int) (*shelf, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	plain, err := os.Create(filepath.Join(dir, "plain"))
	if err != nil {
		return nil, err
	}
	v, err := store.Open(filepath.Join(dir, "volume"), store.Options{})
	if err != nil {
		return nil, closed(plain, err)
	}
	b := newBatch(size, 0, n)
	s := &shelf{dir: dir, size: size, ids: b.ids, v: v, plain: plain}
	err = b.each(16, func(i int, data []byte) error {
		if _, err := plain.WriteAt(data, int64(i)*int64(size)); err != nil {
			return err
		}
		return v.Put(ctx, b.ids[i], data)
	})
	if err != nil {
		return nil, s.close(err)
	}
	return s, nil
}

func (s *shelf) bytes() int { return len(s.ids) * s.size }

func (s *shelf) close(err error) error { return closed(s.v, closed(s.plain, err)) }

// read is the baseline of all reads: so many chunks of the plain file, in this
// order, each into memory of its own and hashed at one go.
func (s *shelf) read(order []int) error {
	for _, i := range order {
		data := make([]byte, s.size)
		if _, err := s.plain.ReadAt(data, int64(i)*int64(s.size)); err != nil {
			return err
		}
		sha256.Sum256(data)
	}
	return nil
}

// readRows compares what reads and verifies with reading and hashing alone:
// gets in any order, a scrub, and the answer to an audit.
func readRows(ctx context.Context, t *table, dir string) error {
	for _, size := range []int{64 << 10, 1 << 20, 4 << 20} {
		s, err := newShelf(ctx, filepath.Join(dir, bytesOf(size)), size, shelfBytes/size)
		if err != nil {
			return err
		}
		err = s.rows(ctx, t)
		if err = s.close(err); err != nil {
			return err
		}
		if err := os.RemoveAll(s.dir); err != nil {
			return err
		}
	}
	return nil
}

func (s *shelf) rows(ctx context.Context, t *table) error {
	name := bytesOf(s.size)
	all := rand.Perm(len(s.ids))
	speed := func(do func() error) func() (float64, error) {
		return func() (float64, error) {
			began := time.Now()
			err := do()
			return mib(s.bytes()) / time.Since(began).Seconds(), err
		}
	}
	if err := s.row(t, "verified get, "+name, "MiB/s", "%.0f",
		speed(func() error { return s.getAll(ctx, all) }),
		speed(func() error { return s.read(all) })); err != nil {
		return err
	}
	inOrder := slices.Sorted(slices.Values(all))
	if err := s.row(t, "scrub, "+name, "MiB/s", "%.0f",
		speed(func() error { return s.scrub(ctx) }),
		speed(func() error { return s.read(inOrder) })); err != nil {
		return err
	}
	if s.size != chunk.DefaultSize {
		return nil
	}
	asked := all[:auditLeaves]
	return s.row(t, fmt.Sprintf("audit of %d leaves, %s", auditLeaves, name), "ms", "%.0f",
		took(func() error { return s.audit(ctx, asked) }),
		took(func() error { return s.read(asked) }))
}

// row is two rows: with what is read in the page cache, and without.
func (s *shelf) row(t *table, what, unit, format string, ours, base func() (float64, error)) error {
	warm, err := interleave(readRounds, ours, base)
	if err != nil {
		return err
	}
	t.paired(what+", warm", unit, warm, format)
	cold, err := interleave(readRounds, cooled(s.dir, ours), cooled(s.dir, base))
	if isWarm(err) {
		fmt.Printf("left out: %s, cold: %v\n", what, err)
		return nil
	}
	if err != nil {
		return err
	}
	t.paired(what+", cold", unit, cold, format)
	return nil
}

func (s *shelf) getAll(ctx context.Context, order []int) error {
	for _, i := range order {
		if _, err := s.v.Get(ctx, s.ids[i]); err != nil {
			return err
		}
	}
	return nil
}

// scrub is one round of the scrub, without its pace.
func (s *shelf) scrub(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	v := &countedReads{Volume: s.v}
	var scrubber *scrub.Scrubber
	var before time.Time
	looks := 0
	scrubber = scrub.New(scrub.Pace{Period: 1, Rate: math.MaxInt64}, scrub.Options{Late: func(string, bool, string) {
		// It looks once before it begins, and when the round has ended.
		verified := scrubber.Progress()[0].Verified
		if looks++; looks == 1 {
			before = verified
		} else if verified.After(before) {
			cancel()
		}
	}})
	scrubber.Run(ctx, v, s.dir)
	if got, want := v.bytes, int64(s.bytes()); got != want {
		return fmt.Errorf("a round of the scrub has read %d bytes of %d", got, want)
	}
	return nil
}

// countedReads is a volume that counts what is read of it.
type countedReads struct {
	*store.Volume
	bytes int64
}

func (v *countedReads) Stretch(ctx context.Context, after chunk.ID, bytes int64) (store.Stretch, error) {
	s, err := v.Volume.Stretch(ctx, after, bytes)
	next := s.Next
	s.Next = func(ctx context.Context) ([]store.Verified, error) {
		some, err := next(ctx)
		for _, c := range some {
			v.bytes += c.Size
			if c.Err != nil {
				return nil, c.Err
			}
		}
		return some, err
	}
	return s, err
}

// audit has the handler of audits answer one: a leaf of each of these chunks.
func (s *shelf) audit(ctx context.Context, chunks []int) error {
	ask := wire.Audit{Nonce: strings.Repeat("0", 32)}
	for _, i := range chunks {
		ask.Items = append(ask.Items, wire.AuditItem{Chunk: s.ids[i].String(), Leaf: rand.IntN(chunk.LeafCount(int64(s.size)))})
	}
	slices.SortFunc(ask.Items, func(a, b wire.AuditItem) int { return strings.Compare(a.Chunk, b.Chunk) }) // as the coordinator does
	body, err := json.Marshal(ask)
	if err != nil {
		return err
	}
	answer := chunkorders.New(store.NewSet(s.v), nil, chunkorders.Options{}).Handlers()[wire.KindAudit]
	out, err := answer(ctx, wire.Order{Kind: wire.KindAudit, Body: body}, func(wire.Progress) {})
	if err == nil && len(out.Attachment) < len(chunks)*chunk.LeafSize {
		err = fmt.Errorf("the answer to %d leaves has %d bytes", len(chunks), len(out.Attachment))
	}
	return err
}

// batch is chunks of one size, which differ by a number at their head.
type batch struct {
	block []byte
	first int // number of the first
	ids   []chunk.ID
}

func newBatch(size, first, n int) batch {
	b := batch{block: make([]byte, size), first: first, ids: make([]chunk.ID, n)}
	rand.NewChaCha8([32]byte{}).Read(b.block)
	_ = b.each(1, func(i int, data []byte) error { b.ids[i] = chunk.Sum(data); return nil }) // it does not fail
	return b
}

// each does something with every chunk, some at once. data is the doer's until
// it returns.
func (b batch) each(atOnce int, do func(i int, data []byte) error) error {
	var next atomic.Int64
	var all errgroup.Group
	for range atOnce {
		all.Go(func() error {
			own := slices.Clone(b.block)
			for {
				i := int(next.Add(1) - 1)
				if i >= len(b.ids) {
					return nil
				}
				binary.BigEndian.PutUint64(own, uint64(b.first+i))
				if err := do(i, own); err != nil {
					return err
				}
			}
		})
	}
	return all.Wait()
}

// took measures how long something takes, in milliseconds.
func took(do func() error) func() (float64, error) {
	return func() (float64, error) {
		began := time.Now()
		err := do()
		return ms(time.Since(began)), err
	}
}

func mib(bytes int) float64 { return float64(bytes) / (1 << 20) }

func bytesOf(n int) string {
	if n < 1<<20 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// closed closes what was used until err, which may be nil.
func closed(c interface{ Close() error }, err error) error {
	if closing := c.Close(); err == nil {
		return closing
	}
	return err
}
