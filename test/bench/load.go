package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

// An agent's memory while everything is asked of it at once: a real agent and a
// real coordinator, chunks of the largest size put and fetched, audits, and a scrub
// that never rests. What counts is its anonymous memory; pages of files that it
// has mapped are the kernel's to take back.

const (
	loadMemory = 96 // MiB, the limit

	loadFor     = time.Minute
	loadSize    = chunk.MaxSize
	loadFirst   = 64   // chunks that are there when it begins
	loadMost    = 1000 // chunks that are put, at most: for the disk's sake
	loadPutters = 12
	// A device serves and proves before it stores (see wire.Kind): with many more of
	// these no put would begin.
	loadGetters  = 3
	loadAuditors = 1

	// A terabyte of chunks of the usual size.
	indexed    = 1_000_000
	indexedFor = 30 * time.Second
	// indexedReal is how many whole chunks lie beside them: more than opening reads,
	// and more than the scrub reads meanwhile.
	indexedReal = 1280
)

func loadRows(ctx context.Context, t *table, dir string) error {
	if err := loadRow(ctx, t, filepath.Join(dir, "plain"), "agent's memory, full load", loadFor); err != nil {
		return err
	}
	full := filepath.Join(dir, "indexed")
	if err := simulateIndex(ctx, filepath.Join(full, "volume"), indexed, indexedReal); err != nil {
		return err
	}
	return loadRow(ctx, t, full, "agent's memory, index of 1 TB", indexedFor)
}

// simulateIndex makes a volume whose index names n chunks of 1 MiB that take no
// room, and puts so many whole ones into it, which are the newest. Of one that is
// simulated the index has an entry like any other ('i'‖id, with segment, place and size),
// which points into a segment that is all hole. So the index is as large as that of a
// terabyte and what walks it has as much to do; but who reads such a chunk finds it lost.
// Their ids begin with 0xff, behind almost all others: a scrub, which goes by ids, comes
// to them last.
func simulateIndex(ctx context.Context, dir string, n, whole int) error {
	v, err := store.Open(dir, store.Options{})
	if err != nil {
		return err
	}
	if err := v.Close(); err != nil {
		return err
	}
	db, err := badger.Open(badger.DefaultOptions(filepath.Join(dir, "chunks", "index")).WithLogger(nil).
		WithCompression(options.None).WithBlockCacheSize(0).WithMemTableSize(8 << 20))
	if err != nil {
		return err
	}
	ids := make([]chunk.ID, n)
	random := rand.NewChaCha8([32]byte{1})
	for i := range ids {
		random.Read(ids[i][:])
		ids[i][0] = 0xff
	}
	slices.SortFunc(ids, func(a, b chunk.ID) int { return slices.Compare(a[:], b[:]) }) // quickest for the tree
	last := uint32(2 + (n-1)/inSegment)
	for number := uint32(2); number <= last; number++ {
		path := filepath.Join(dir, "chunks", fmt.Sprintf("%06d.seg", number))
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, simulatedSegment)); err != nil {
			return closed(db, err)
		}
	}
	if err := closed(db, writeIndex(db, ids, last)); err != nil {
		return err
	}
	if v, err = store.Open(dir, store.Options{}); err != nil {
		return err
	}
	if got := v.Stats().Chunks; got != n {
		return closed(v, fmt.Errorf("a simulated index of %d chunks is read as one of %d", n, got))
	}
	b := newBatch(chunk.DefaultSize, 0, whole)
	return closed(v, b.each(16, func(i int, data []byte) error { return v.Put(ctx, b.ids[i], data) }))
}

const (
	inSegment        = 250 // simulated chunks
	simulatedSegment = (inSegment + 1) * (chunk.DefaultSize + 100)
)

// writeIndex writes entries, and the position 'p' up to which the index has all of the log,
// with how many entries there are and the sum of the CRC-32C of each.
func writeIndex(db *badger.DB, ids []chunk.ID, last uint32) error {
	w := db.NewWriteBatch()
	defer w.Cancel()
	var places uint64
	for i, id := range ids {
		at := binary.LittleEndian.AppendUint32(nil, uint32(2+i/inSegment))
		at = binary.LittleEndian.AppendUint32(at, uint32(100+i%inSegment*(chunk.DefaultSize+100)))
		at = binary.LittleEndian.AppendUint32(at, chunk.DefaultSize)
		places += uint64(crc32.Checksum(at, castagnoli))
		if err := w.Set(append([]byte{'i'}, id[:]...), at); err != nil {
			return err
		}
	}
	p := binary.LittleEndian.AppendUint32(nil, last)
	p = binary.LittleEndian.AppendUint32(p, simulatedSegment)
	p = binary.LittleEndian.AppendUint64(p, 1)
	p = binary.LittleEndian.AppendUint64(p, uint64(len(ids)))
	if err := w.Set([]byte{'p'}, binary.LittleEndian.AppendUint64(p, places)); err != nil {
		return err
	}
	return w.Flush()
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// loadRow measures an agent whose volume is dir/volume.
func loadRow(ctx context.Context, t *table, dir, what string, lasting time.Duration) (err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	opened, err := newOurSide(dir)
	if err != nil {
		return err
	}
	s := opened.(*ourSide)
	s.beat = time.Second
	if err := s.start(ctx); err != nil {
		return err
	}
	defer s.close()
	// A period that can never be kept: the scrub is always late, and does not wait for
	// orders to end.
	config := filepath.Join(dir, "agent.toml")
	if err := os.WriteFile(config, []byte("[scrub]\ndays = 0.00001\n"), 0o600); err != nil {
		return err
	}
	device, err := s.startAgent(ctx, filepath.Join(dir, "agent"), "--volume", filepath.Join(dir, "volume"), "--config", config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, device.kill()) }()
	list, err := s.client.Devices(ctx)
	if err != nil {
		return err
	}
	l := &load{client: s.client, device: list[0].ID, first: newBatch(loadSize, 0, loadFirst)}
	if err := l.first.each(4, func(i int, data []byte) error {
		_, err := l.client.PutChunk(ctx, l.first.ids[i].String(), data, 1)
		return err
	}); err != nil {
		return err
	}
	peak, err := l.run(ctx, device.cmd.Process.Pid, lasting)
	if err != nil {
		return err
	}
	t.limit(what, "MiB", peak/(1<<20), loadMemory, "%.1f")
	fmt.Printf("  in %s: %s\n", lasting, l.done())
	return nil
}

// load is what is asked of a device, and how much of it was done.
type load struct {
	client *api.Client
	device wire.DeviceID
	first  batch // what it holds when it begins

	begun    atomic.Int64 // puts
	stored   atomic.Int64
	fetched  atomic.Int64
	audits   atomic.Int64
	refused  atomic.Int64
	scrubbed int64 // bytes
}

func (l *load) done() string {
	size := int64(loadSize >> 20)
	return fmt.Sprintf("%d MiB stored, %d MiB fetched, %d audits of %d leaves, %d MiB scrubbed, %d requests refused",
		l.stored.Load()*size, l.fetched.Load()*size, l.audits.Load(), auditLeaves, l.scrubbed>>20, l.refused.Load())
}

// run returns the most anonymous memory that the process had, in bytes.
func (l *load) run(ctx context.Context, pid int, lasting time.Duration) (peak float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, lasting)
	defer cancel()
	failed := make(chan error, 1)
	var all sync.WaitGroup
	keep := func(n int, do func(context.Context) error) {
		for range n {
			all.Go(func() {
				if err := l.keepAt(ctx, do); err != nil {
					select {
					case failed <- err:
						cancel()
					default:
					}
				}
			})
		}
	}
	keep(loadPutters, l.putOne)
	keep(loadGetters, l.getOne)
	keep(loadAuditors, l.auditOne)
	keep(1, l.watchScrub)
	for rest(ctx, 50*time.Millisecond) == nil {
		peak = max(peak, statusOf(pid, "RssAnon"))
	}
	all.Wait()
	select {
	case err := <-failed:
		return 0, err
	default:
	}
	if l.stored.Load() == 0 || l.fetched.Load() == 0 || l.audits.Load() == 0 || l.scrubbed == 0 {
		return 0, fmt.Errorf("this was no load: %s", l.done())
	}
	return peak, nil
}

// keepAt does it until ctx ends. A refusal is an answer: the device or the
// coordinator has enough to do.
func (l *load) keepAt(ctx context.Context, do func(context.Context) error) error {
	for ctx.Err() == nil {
		err := do(ctx)
		var refusal *api.Error
		switch {
		case ctx.Err() != nil, errors.Is(err, errAllPut):
			return nil
		case errors.As(err, &refusal) && refusal.Status >= 500:
			l.refused.Add(1)
			_ = rest(ctx, 200*time.Millisecond) // it ends with ctx
		case err != nil:
			return err
		}
	}
	return nil
}

var errAllPut = errors.New("every chunk is put")

func (l *load) putOne(ctx context.Context) error {
	i := l.begun.Add(1)
	if i > loadMost {
		return errAllPut
	}
	data := slices.Clone(l.first.block)
	binary.BigEndian.PutUint64(data, uint64(loadFirst+i))
	if _, err := l.client.PutChunk(ctx, chunk.Sum(data).String(), data, 1); err != nil {
		return err
	}
	l.stored.Add(1)
	return nil
}

// getOne reads one of the chunks that were there first.
func (l *load) getOne(ctx context.Context) error {
	if _, err := l.client.GetChunkFrom(ctx, l.first.ids[rand.IntN(loadFirst)].String(), l.device); err != nil {
		return err
	}
	l.fetched.Add(1)
	return nil
}

func (l *load) auditOne(ctx context.Context) error {
	a, err := l.client.Audit(ctx, api.AuditRequest{Kind: api.StorageAudit, Device: l.device, Leaves: auditLeaves})
	if err != nil {
		return err
	}
	if a.Outcome != api.AuditRight {
		return fmt.Errorf("an audit ended %s: %s", a.Outcome, a.Reason)
	}
	l.audits.Add(1)
	return nil
}

// watchScrub adds up what the heartbeats tell of the scrub. It alone changes scrubbed.
func (l *load) watchScrub(ctx context.Context) error {
	seen := int64(-1)
	for rest(ctx, time.Second) == nil {
		d, err := l.client.Device(ctx, string(l.device))
		if err != nil {
			return err
		}
		for _, s := range d.Scrubs {
			switch {
			case s.Lost > 0:
				return fmt.Errorf("the scrub has lost %d chunks", s.Lost)
			case seen >= 0 && s.Bytes >= seen:
				l.scrubbed += s.Bytes - seen
			case seen >= 0: // the next round
				l.scrubbed += s.Bytes
			}
			seen = s.Bytes
		}
	}
	return nil
}
