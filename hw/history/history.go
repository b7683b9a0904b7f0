// Package history keeps what a device has measured, in bounded files that
// survive a restart, so that a device that was offline shows its curve.
//
// # Two resolutions
//
// Each sample is kept in the fine files, three quarters of the budget; of every
// quarter of an hour the least, the mean and the most of each series are kept in
// the coarse files, the rest of it. The oldest file goes when the budget is
// reached. With the default of 16 MiB, a sample every 10 seconds and 60 series,
// that is about 10 days and 3 months (TestBudgetLastsAsTheCommentSays prints what it measures).
//
// # What it costs the flash
//
// Samples are held in memory for five minutes, then written as one block and
// synced: 288 writes a day, 1.3 MB with the figures above. A coarse block has
// six hours, 4 writes and 43 kB a day. A crash costs the last five minutes; coarse rows that were not
// written are made again from the fine ones when the ring is opened.
//
// # Files
//
// fine-N.seg and coarse-N.seg, N in 16 hex digits and growing, are records one
// after another, each by itself enough to be read (see block.go for what is in it):
//
//	magic "DHR1" | length u32 | CRC-32C u32 over length and body | body
//
// A reader that meets what is no record, or a wrong sum, goes on at the next
// magic: a torn tail or a flipped bit costs the record that it is in. Nothing is
// ever changed in place, so that another process may read while one writes.
//
// # Which time it was
//
// The clock of a board may begin in 1970 and jump by decades. A sample that
// carries a monotonic reading (as time.Now gives it) is therefore kept by boot and
// time since boot, each block with what had to be added to get the wall clock.
// Of one boot the last such difference holds for all of its samples, also those
// from before the clock was set. A boot whose clock was never right (earlier than
// 2024) is kept, and not shown until it is. A sample without a monotonic reading is
// kept under the time that it says. Order and age come from a sequence number, never from a clock.
package history

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/hw"
)

const (
	defaultBytes = 16 << 20
	leastBytes   = 256 << 10

	flushAfter = 5 * time.Minute
	flushRows  = 128 // or so many samples, if they come fast

	coarseSpan  = 15 * time.Minute
	coarseRows  = 24 // of one block
	keptBlocks  = 8  // coarse blocks held while the disk is full
	retryAfter  = 5 * time.Minute
	maxUnitText = 16
)

// epoch is a time that every right clock has passed.
var epoch = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC).UnixMilli()

// farthest is the time, in ms, beyond which no sample is taken: 70,000 years.
const farthest = 1 << 51

// Options bound a ring.
type Options struct {
	MaxBytes int64 // on disk; 0 is 16 MiB, the least is 256 KiB
	Log      *slog.Logger
}

// Ring is the device's own record of its measurements. Safe for concurrent use.
// One process writes a directory; others may [Load] it.
type Ring struct {
	log *slog.Logger
	env environment

	mu      sync.Mutex // guards the rest
	fine    *files
	coarse  *files
	next    uint64   // sequence number of the next sample
	buffer  *builder // samples that are not written yet; nil if none
	since   time.Time
	bucket  *bucket  // the quarter of an hour that is under way
	pending []*block // coarse rows that are not written yet, oldest first
	failed  time.Time
	reading bool // made by Load
	closed  bool
}

// environment is the clock that does not jump; tests set one.
type environment struct {
	boot      bootID
	sinceBoot func() time.Duration
	now       func() time.Time
}

type bootID [8]byte

func thisMachine() environment {
	e := environment{now: time.Now, sinceBoot: func() time.Duration {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
			return 0
		}
		return time.Duration(ts.Nano())
	}}
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err == nil {
		id, _ := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(raw)), "-", ""))
		copy(e.boot[:], id)
	}
	return e
}

// Open opens the ring in dir, or makes one. A damaged file costs what is
// damaged, not the ring.
func Open(dir string, o Options) (*Ring, error) { return open(dir, o, thisMachine()) }

func open(dir string, o Options, env environment) (*Ring, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of the history: %w", err)
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = defaultBytes
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	budget := max(o.MaxBytes, leastBytes)
	r := &Ring{log: o.Log, env: env, fine: newFiles(dir, "fine", budget/4*3), coarse: newFiles(dir, "coarse", budget/4)}
	return r, r.scan()
}

// Load reads the ring of dir, whether an agent writes it or not, and changes
// nothing. What the agent has not written yet, up to five minutes, is not in it.
func Load(dir string) (*Ring, error) {
	if st, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("open the history: %w", err)
	} else if !st.IsDir() {
		return nil, fmt.Errorf("open the history: %s is not a folder", dir)
	}
	r := &Ring{log: slog.New(slog.DiscardHandler), env: thisMachine(), reading: true,
		fine: newFiles(dir, "fine", defaultBytes), coarse: newFiles(dir, "coarse", defaultBytes)}
	return r, r.scan()
}

// scan finds the records, and makes the coarse rows again that were not written.
func (r *Ring) scan() error {
	if err := errors.Join(r.fine.scan(), r.coarse.scan()); err != nil {
		return fmt.Errorf("read the history: %w", err)
	}
	if lost := r.fine.damaged + r.coarse.damaged; lost > 0 && !r.reading {
		r.log.Warn("the history is damaged, as after a power cut; what can be read is kept", "bytes_lost", lost)
	}
	var summed uint64
	for _, f := range r.coarse.refs() {
		summed = max(summed, f.last)
	}
	r.next = summed + 1
	for _, f := range r.fine.refs() {
		r.next = max(r.next, f.last+1)
		if f.last <= summed {
			continue
		}
		b, err := r.fine.load(f)
		if err != nil {
			continue // gone or damaged meanwhile
		}
		for i, at := range b.rows {
			if at.seq > summed {
				r.sum(b, i)
				summed = at.seq
			}
		}
	}
	return nil
}

// Add takes one sample. It is on disk after [Ring.Flush], or after a while. The
// first of a row of failed writes is an error; until one succeeds the others are
// not, and the oldest samples that wait are forgotten.
func (r *Ring) Add(t hw.Telemetry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.reading {
		return errors.New("the history is not open for writing")
	}
	values := t.Series()
	if wall := t.At.UnixMilli(); len(values) == 0 || wall < -farthest || wall > farthest {
		return nil
	}
	boot, at, offset := r.when(t.At)
	if r.buffer != nil && r.buffer.block.boot != boot {
		if err := r.flush(); err != nil {
			return err
		}
	}
	if r.buffer == nil {
		r.buffer, r.since = newBuilder(boot), r.env.now()
	}
	b := r.buffer
	b.row(row{from: at, to: at, seq: r.next}, offset)
	r.next++
	for _, name := range slices.Sorted(maps.Keys(values)) {
		b.set(name, statValue, values[name], func() string { return cut(t.Unit(name), maxUnitText) })
	}
	r.sum(b.block, len(b.block.rows)-1)
	if len(b.block.rows) < flushRows && r.env.now().Sub(r.since) < flushAfter {
		return nil
	}
	return r.flush()
}

func cut(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n])
	}
	return s
}

// when is a sample's place in time, in ms, and what makes it the wall clock's.
func (r *Ring) when(at time.Time) (boot bootID, ms, offset int64) {
	wall := at.UnixMilli()
	if r.env.boot == (bootID{}) || at == at.Round(0) { // Round strips the monotonic reading
		return bootID{}, wall, 0
	}
	ms = (r.env.sinceBoot() - r.env.now().Sub(at)).Milliseconds()
	return r.env.boot, ms, wall - ms
}

// Flush puts on disk what is not there yet.
func (r *Ring) Flush() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.reading {
		return nil
	}
	r.failed = time.Time{} // who asks wants to know
	return r.flush()
}

// flush writes the samples that wait, and full coarse blocks.
func (r *Ring) flush() error {
	if now := r.env.now(); !r.failed.IsZero() && now.Sub(r.failed) < retryAfter && now.After(r.failed) {
		r.forget()
		return nil
	}
	err := r.write()
	if err == nil {
		if !r.failed.IsZero() {
			r.failed = time.Time{}
			r.log.Info("the history is written again")
		}
		return nil
	}
	first := r.failed.IsZero()
	r.failed = r.env.now()
	r.forget()
	if !first {
		return nil
	}
	return fmt.Errorf("the history could not be written and pauses until it can, the agent goes on: %w", err)
}

func (r *Ring) write() error {
	if r.buffer != nil {
		if err := r.fine.append(r.buffer.block); err != nil {
			return err
		}
		r.buffer = nil
	}
	for len(r.pending) > 1 || len(r.pending) == 1 && len(r.pending[0].rows) >= coarseRows {
		if err := r.coarse.append(r.pending[0]); err != nil {
			return err
		}
		r.pending = r.pending[1:]
	}
	return nil
}

// forget keeps what waits for a full disk small.
func (r *Ring) forget() {
	if r.buffer != nil && len(r.buffer.block.rows) >= flushRows {
		r.buffer = nil
	}
	if over := len(r.pending) - keptBlocks; over > 0 {
		r.pending = r.pending[over:]
	}
}

// Close flushes and closes.
func (r *Ring) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	if r.reading {
		return nil
	}
	r.failed = time.Time{}
	return errors.Join(r.flush(), r.fine.close(), r.coarse.close())
}

// bucket is one coarse row that is under way.
type bucket struct {
	boot   bootID
	offset int64
	row    row
	cols   map[string]*summary
}

type summary struct {
	unit           string
	least, most, n float64
	sum            float64
}

// sum takes row i of a block of samples into the coarse rows.
func (r *Ring) sum(b *block, i int) {
	at := b.rows[i]
	if k := r.bucket; k != nil && (k.boot != b.boot || at.from < k.row.from || at.from >= k.row.from+coarseSpan.Milliseconds()) {
		r.closeBucket()
	}
	if r.bucket == nil {
		r.bucket = &bucket{boot: b.boot, row: at, cols: map[string]*summary{}}
	}
	k := r.bucket
	k.row.to, k.row.seq, k.offset = at.to, at.seq, b.offset
	for _, c := range b.cols {
		v := c.values[i]
		if math.IsNaN(v) {
			continue
		}
		s := k.cols[c.name]
		if s == nil {
			s = &summary{unit: c.unit, least: v, most: v}
			k.cols[c.name] = s
		}
		s.least, s.most = min(s.least, v), max(s.most, v)
		s.sum += v
		s.n++
	}
}

func (r *Ring) closeBucket() {
	k := r.bucket
	r.bucket = nil
	last := len(r.pending) - 1
	if last < 0 || len(r.pending[last].rows) >= coarseRows || r.pending[last].boot != k.boot {
		r.pending = append(r.pending, &block{boot: k.boot})
		last++
	}
	b := extend(r.pending[last])
	b.row(k.row, k.offset)
	for _, name := range slices.Sorted(maps.Keys(k.cols)) {
		s := k.cols[name]
		unit := func() string { return s.unit }
		b.set(name, statMean, s.sum/s.n, unit)
		b.set(name, statLeast, s.least, unit)
		b.set(name, statMost, s.most, unit)
		b.set(name, statCount, s.n, unit)
	}
}

var _ io.Closer = (*Ring)(nil)
