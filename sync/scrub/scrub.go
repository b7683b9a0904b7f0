// Package scrub reads and verifies every chunk of every volume within a set
// time, round after round, so that a loss is known before somebody asks.
//
// # Rounds
//
// A round walks a volume in the order of chunk ids, stretch by stretch, and has each
// stretch read in the order in which it lies on disk: [store.Volume.Stretch] verifies,
// and remembers what is lost. A stretch is 256 MiB, or what the rate reads in
// [saveEvery] if that is less. The round has [Pace.Period], of which the last seventh
// is kept for catching up. When a round ends the next begins at once. Ids are hashes, so
// the greatest id of the last stretch that was read says how much is done:
//
//	share = id / 2²⁵⁶,  left = bytes held · (1 − share)
//
// What is put or dropped meanwhile needs no account: a new chunk lies ahead of
// the walk, or behind it and is read by the next round. What is gone when the
// walk gets there is no error.
//
// # Bursts
//
// A spinning disk must not be kept awake by a trickle. So a round is read in a
// few bursts, at most one in [burstEvery], and fewer if they would read less than
// [burstLeast]; a small volume is read in one. Each burst takes its part of what
// is left by then:
//
//	quota = left · interval / (time to the target + interval)
//
// read as fast as [Pace.Rate] allows, and never faster, one volume of a disk at a
// time. It rests while orders are at work ([Idleness]), unless the round could not
// end in time any more even at full rate: then it rests no longer. A disk that
// sleeps is woken by a burst and by nothing else here.
//
// # What survives
//
//	chunks/scrub.json   in the volume's directory, with the chunks it is about:
//	                    the round, its last id, and the chunks known to be lost
//
// It is replaced after each burst, within one after a stretch if [saveEvery] has
// passed, and when the lost chunks are others; a process that is killed reads some
// minutes of one burst again. The store forgets at its end what it knew to be lost, so those chunks,
// [maxKept] at most, are read at the start. Where the file cannot be written (a
// read-only disk) the round goes on in memory.
//
// The times are wall-clock times. If the clock goes back behind them they are
// moved to now; one that runs ahead only makes the scrub read sooner.
package scrub

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

// Volume is what a scrub needs of a [store.Volume], whose methods these are.
type Volume interface {
	ID() string
	Dir() string
	Stretch(ctx context.Context, after chunk.ID, bytes int64) (store.Stretch, error)
	Get(ctx context.Context, id chunk.ID) ([]byte, error)
	Lost() []store.Loss
	Stats() store.Stats
}

// Idleness tells whether the disks have nothing to do for orders right now.
type Idleness interface{ Idle() bool }

// Pace is how a scrub reads.
type Pace struct {
	Period time.Duration // in which everything is read; not above 0: DefaultPeriod
	Rate   int64         // bytes a second of one disk, at most; not above 0: DefaultRate
}

// The pace if nobody says otherwise. The rate reads 49 TiB in the period.
const (
	DefaultPeriod = 21 * 24 * time.Hour
	DefaultRate   = 32 << 20
)

const (
	burstEvery = 6 * time.Hour
	burstLeast = 256 << 20 // bytes; 8 s at the default rate
	saveEvery  = 5 * time.Minute
	settleTime = 10 * time.Minute // after a start, before a burst that is overdue
	retryAfter = time.Hour        // after a volume could not be read
	busyRest   = 10 * time.Second // until it is asked again whether the disks are idle
	look       = time.Minute      // between two looks at the clock
	readLimit  = 2 * time.Minute  // for one chunk, or those beside it
	stretch    = 256 << 20        // bytes that are read in the order in which they lie
	maxKept    = 4096             // lost chunks that are kept over a restart
)

// Options of [New]. Those that are nil have a default.
type Options struct {
	Idle Idleness                                     // nil: always
	Now  func() time.Time                             // the wall clock
	Rest func(context.Context, time.Duration) error   // waits; its error is that ctx has ended
	Late func(dir string, late bool, sentence string) // told after each look whether a round is late
	Log  *slog.Logger
}

// Scrubber scrubs any number of volumes.
type Scrubber struct {
	opt Options

	mu    sync.Mutex // guards the rest
	pace  Pace
	all   []*volume
	disks map[string]chan struct{} // one token each: who has it reads
}

// New returns a scrubber with nothing to do.
func New(pace Pace, opt Options) *Scrubber {
	if opt.Idle == nil {
		opt.Idle = always{}
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Rest == nil {
		opt.Rest = rest
	}
	if opt.Late == nil {
		opt.Late = func(string, bool, string) {}
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	s := &Scrubber{opt: opt, disks: make(map[string]chan struct{})}
	s.SetPace(pace)
	return s
}

type always struct{}

func (always) Idle() bool { return true }

func rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// SetPace changes the pace, also of rounds that have begun.
func (s *Scrubber) SetPace(p Pace) {
	if p.Period <= 0 {
		p.Period = DefaultPeriod
	}
	if p.Rate <= 0 {
		p.Rate = DefaultRate
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pace = p
}

func (s *Scrubber) paceNow() Pace {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pace
}

// work is the part of the period in which a round should end; the rest is for
// catching up.
func (p Pace) work() time.Duration { return p.Period / 7 * 6 }

// interval is the time between two bursts of a volume that holds used bytes.
func (p Pace) interval(used int64) time.Duration {
	most := max(1, int64(p.work()/burstEvery))
	n := min(max(1, used/burstLeast), most)
	return p.work() / time.Duration(n)
}

// takes is how long n bytes take at the full rate.
func (p Pace) takes(n int64) time.Duration {
	seconds := float64(n) / float64(p.Rate)
	return time.Duration(min(seconds*float64(time.Second), math.MaxInt64/2))
}

// reads is how many bytes the full rate reads in that time.
func (p Pace) reads(d time.Duration) int64 {
	return int64(min(float64(p.Rate)*d.Seconds(), math.MaxInt64/2))
}

// Progress tells of each volume, in the order in which they came. It touches no
// disk.
func (s *Scrubber) Progress() []wire.Scrub {
	s.mu.Lock()
	all := slices.Clone(s.all)
	s.mu.Unlock()
	out := make([]wire.Scrub, len(all))
	for i, v := range all {
		out[i] = v.progress()
	}
	return out
}

// Run scrubs one volume until ctx ends. Volumes with the same disk take turns.
func (s *Scrubber) Run(ctx context.Context, vol Volume, disk string) {
	s.mu.Lock()
	turn := s.disks[disk]
	if turn == nil {
		turn = make(chan struct{}, 1)
		s.disks[disk] = turn
	}
	v := &volume{Volume: vol, s: s, turn: turn, opened: s.opt.Now()}
	s.all = append(s.all, v)
	s.mu.Unlock()
	defer s.forget(v)
	v.begin(ctx)
	for ctx.Err() == nil {
		v.tellLate()
		if wait := v.wait(); wait > 0 {
			v.keepLosses()
			_ = s.opt.Rest(ctx, min(wait, look)) // ends with ctx
			continue
		}
		err := v.burst(ctx)
		if ctx.Err() == nil {
			v.ended(err)
		}
	}
}

func (s *Scrubber) forget(v *volume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = slices.DeleteFunc(s.all, func(x *volume) bool { return x == v })
}

// volume is one volume's scrub. Only Run changes it.
type volume struct {
	Volume
	s      *Scrubber
	turn   chan struct{} // of its disk
	opened time.Time
	due    time.Time // when the rate allows the next read
	saved  time.Time
	unkept bool // the record could not be written, and that was logged

	mu      sync.Mutex // guards the rest, for who asks how it goes
	rec     record
	used    int64
	retry   time.Time // not before
	problem string
}

// begin goes on where an earlier life was. What that knew to be lost is read
// again, so that the store knows it, too.
func (v *volume) begin(ctx context.Context) {
	now := v.s.opt.Now()
	rec, err := readRecord(v.Dir())
	if err != nil {
		v.s.opt.Log.Warn("how far the scrub of a volume was is not known; it begins anew", "volume", v.Dir(), "error", err)
	}
	if rec.Volume != v.ID() {
		rec = record{Volume: v.ID(), Began: now.UTC()}
	}
	v.mu.Lock()
	v.rec, v.used, v.saved = rec, v.Stats().Used, now
	v.mu.Unlock()
	for _, id := range rec.Lost {
		if id, err := chunk.ParseID(id); err == nil && ctx.Err() == nil {
			v.lookAt(ctx, id)
		}
	}
}

// lookAt reads one chunk. The store remembers it if it is lost.
func (v *volume) lookAt(ctx context.Context, id chunk.ID) {
	limited, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	_, _ = v.Get(limited, id)
}

// position is where the round is, put right if the clock has gone back.
func (v *volume) position() (began, newest time.Time, left, used int64) {
	used = v.Stats().Used
	now := v.s.opt.Now().UTC()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.used = used
	if v.rec.Began.After(now) {
		v.rec.Began = now
	}
	if v.rec.Read.After(now) {
		v.rec.Read = now
	}
	newest = v.rec.Read
	if newest.Before(v.rec.Began) {
		newest = v.rec.Began
	}
	return v.rec.Began, newest, v.rec.left(used), used
}

// wait is how long until the next burst; none if it is due.
func (v *volume) wait() time.Duration {
	began, newest, left, used := v.position()
	now, pace := v.s.opt.Now(), v.s.paceNow()
	interval := pace.interval(used)
	next := newest.Add(interval)
	if last := pace.latest(began, left); last.Before(next) {
		next = last
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, at := range []time.Time{v.opened.Add(min(settleTime, interval/10)), v.retry} {
		// One that is further off was noted before the clock went back.
		if next.Before(at) && at.Sub(now) <= max(settleTime, retryAfter) {
			next = at
		}
	}
	return next.Sub(now)
}

// latest is when a round must be read at full rate to be done at its target, if
// so many bytes are left.
func (p Pace) latest(began time.Time, left int64) time.Time {
	return began.Add(p.work() - p.takes(left))
}

// pressed tells whether that time has come.
func (v *volume) pressed() bool {
	began, _, left, _ := v.position()
	return !v.s.opt.Now().Before(v.s.paceNow().latest(began, left))
}

// quota is what this burst is to read, in bytes.
func (v *volume) quota() int64 {
	if v.pressed() {
		return math.MaxInt64
	}
	began, _, left, used := v.position()
	pace := v.s.paceNow()
	interval, remains := pace.interval(used), max(0, began.Add(pace.work()).Sub(v.s.opt.Now()))
	return int64(math.Ceil(float64(left) * float64(interval) / float64(remains+interval)))
}

// burst reads until its quota is spent or the round has ended.
func (v *volume) burst(ctx context.Context) (err error) {
	select {
	case v.turn <- struct{}{}:
		defer func() { <-v.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	v.mu.Lock()
	v.rec.Read = v.s.opt.Now().UTC()
	v.mu.Unlock()
	v.due = v.s.opt.Now()
	defer v.save()
	for quota := v.quota(); quota > 0; {
		next, err := v.Stretch(ctx, v.cursor(), min(quota, stretch, v.s.paceNow().reads(saveEvery)))
		if err != nil {
			return fmt.Errorf("the chunks of the volume cannot be listed: %w", err)
		}
		if next.Last == (chunk.ID{}) {
			v.finish()
			return nil
		}
		n, err := v.read(ctx, next)
		if err != nil {
			return err
		}
		quota -= max(n, 1)
		if now := v.s.opt.Now(); now.Sub(v.saved) >= saveEvery || now.Before(v.saved) {
			v.save()
		}
	}
	return nil
}

func (v *volume) cursor() (id chunk.ID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rec.cursor()
}

// read reads a stretch of chunks, each when the time for it has come, and then notes
// it as done. It returns how many bytes that took. What it does not finish counts as
// not read.
func (v *volume) read(ctx context.Context, these store.Stretch) (n int64, err error) {
	v.mu.Lock()
	bytes, found := v.rec.Bytes, v.rec.Found
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if err == nil {
			v.rec.Cursor = these.Last.String()
		} else {
			v.rec.Bytes, v.rec.Found = bytes, found
		}
	}()
	for {
		read, err := v.few(ctx, these)
		if err != nil {
			return n, err
		}
		if read < 0 {
			break
		}
		n += read
		if err := v.slow(ctx, read); err != nil {
			return n, err
		}
	}
	return n, nil
}

// few reads the next chunks of a stretch, and returns how many bytes that took: less
// than none if there are no more.
func (v *volume) few(ctx context.Context, these store.Stretch) (n int64, err error) {
	for !v.s.opt.Idle.Idle() && !v.pressed() {
		if err := v.s.opt.Rest(ctx, busyRest); err != nil {
			return 0, err
		}
		v.tellLate()
	}
	limited, cancel := context.WithTimeoutCause(ctx, readLimit, fmt.Errorf("chunks could not be read within %s", readLimit))
	defer cancel()
	some, err := these.Next(limited)
	if err != nil {
		return 0, err
	}
	if len(some) == 0 {
		return -1, nil
	}
	lost := 0
	for _, c := range some {
		switch {
		case c.Err == nil:
			n += c.Size
		case wire.ProblemOf(c.Err).Code == wire.CodeLost:
			lost++
			v.s.opt.Log.Warn("a chunk is lost", "volume", v.Dir(), "chunk", c.ID, "reason", c.Err)
		}
	}
	v.mu.Lock()
	v.rec.Bytes += n
	v.rec.Found += lost
	v.mu.Unlock()
	return n, nil
}

// slow waits until n bytes more may be read. A clock that is set meanwhile holds
// it up no longer than those take.
func (v *volume) slow(ctx context.Context, n int64) error {
	now, takes := v.s.opt.Now(), v.s.paceNow().takes(n)
	if v.due.Before(now) { // what the disk was too slow for is not made up for
		v.due = now
	}
	v.due = v.due.Add(takes)
	wait := v.due.Sub(now)
	if wait > takes {
		wait, v.due = takes, now.Add(takes)
	}
	if wait <= 0 {
		return ctx.Err()
	}
	return v.s.opt.Rest(ctx, wait)
}

// finish ends the round and begins the next.
func (v *volume) finish() {
	now := v.s.opt.Now().UTC()
	v.mu.Lock()
	done := v.rec
	v.rec.Began, v.rec.Cursor, v.rec.Bytes, v.rec.Found, v.rec.Verified = now, "", 0, 0, now
	v.mu.Unlock()
	v.s.opt.Log.Info("everything on a volume was read and verified", "volume", v.Dir(), "bytes", done.Bytes, "lost", done.Found, "since", done.Began)
}

// ended notes why a burst failed, if it did.
func (v *volume) ended(err error) {
	v.mu.Lock()
	said := v.problem != ""
	if v.problem = ""; err != nil {
		v.problem = err.Error()
		v.retry = v.s.opt.Now().Add(min(retryAfter, v.s.paceNow().interval(v.used)))
	}
	v.mu.Unlock()
	if err != nil && !said {
		v.s.opt.Log.Warn("a volume cannot be read through; it is tried again", "volume", v.Dir(), "error", err)
	}
	v.tellLate()
}

func (v *volume) tellLate() {
	p := v.progress()
	v.s.opt.Late(v.Dir(), p.Late, lateness(p, v.s.opt.Now()))
}

func lateness(p wire.Scrub, now time.Time) string {
	s := fmt.Sprintf("%.0f%% of what is in %s were read in %.1f days", 100*p.Share, p.Dir, now.Sub(p.Began).Hours()/24)
	if p.Problem != "" {
		s += ": " + p.Problem
	}
	return s
}

func (v *volume) progress() wire.Scrub {
	now, pace := v.s.opt.Now().UTC(), v.s.paceNow()
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.rec
	p := wire.Scrub{
		Volume: v.ID(), Dir: v.Dir(), Began: r.Began, Share: r.share(), Bytes: r.Bytes, Lost: r.Found,
		Verified: r.Verified, Problem: v.problem, Late: now.Sub(r.Began) > pace.Period,
	}
	p.Ends = r.Began.Add(pace.work())
	if soonest := now.Add(pace.takes(r.left(v.used))); soonest.After(p.Ends) {
		p.Ends = soonest
	}
	return p
}
