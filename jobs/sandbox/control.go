package sandbox

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Control is the owner's hand on a job that runs, or is about to. What is asked
// of it is carried out while the job lives, and harmless before and after.
type Control struct {
	suspended atomic.Bool
	asked     atomic.Bool
	everAsked atomic.Bool
	saves     atomic.Bool
	share     atomic.Uint64 // bits of a float64
	cpu       atomic.Int64  // nanoseconds
	changed   chan struct{} // capacity 1
}

// NewControl makes the hand for one job, given to it by [Spec.Control].
func NewControl() *Control { return &Control{changed: make(chan struct{}, 1)} }

// Suspend makes the job stand still at once, until [Control.Continue]: it takes no
// CPU, its wall time does not pass, and it keeps its memory.
func (c *Control) Suspend() { c.suspended.Store(true); c.nudge() }

// Continue lets the job go on, and takes back [Control.AskCheckpoint].
func (c *Control) Continue() { c.suspended.Store(false); c.asked.Store(false); c.nudge() }

// AskCheckpoint tells the module, when it asks by should_checkpoint, that it is
// about to be stopped.
func (c *Control) AskCheckpoint() { c.everAsked.Store(true); c.asked.Store(true); c.nudge() }

// SetShare bounds the CPU that the job takes, in processors, by letting it stand
// still a part of the time: about a second is what it is true for. 0: no bound. That
// is no suspension: as on a slower processor, the wall time passes.
func (c *Control) SetShare(processors float64) {
	c.share.Store(math.Float64bits(processors))
	c.nudge()
}

// CPU is what the job has taken so far, as of half a second ago.
func (c *Control) CPU() time.Duration { return time.Duration(c.cpu.Load()) }

// Saves tells whether the module can make checkpoints, which is known when it begins.
func (c *Control) Saves() bool { return c.saves.Load() }

func (c *Control) nudge() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// pace decides when a child stands still, and how long it has run.
type pace struct {
	began   time.Time
	paused  time.Duration // by the owner, so far
	since   time.Time     // since when it is paused; zero: it is not
	stopped bool          // by SIGSTOP

	// The share is kept from here on; see throttle.
	from    time.Time
	fromCPU time.Duration
	until   time.Time // stands still until then for its share
}

// ran is the wall time that counts.
func (p *pace) ran(now time.Time) time.Duration {
	if !p.since.IsZero() {
		now = p.since
	}
	return now.Sub(p.began) - p.paused
}

// suspend takes the owner's word over. It is true if the job is to stand still.
func (p *pace) suspend(wanted bool, now time.Time) bool {
	switch {
	case wanted && p.since.IsZero():
		p.since = now
	case !wanted && !p.since.IsZero():
		p.paused += now.Sub(p.since)
		p.since, p.from, p.until = time.Time{}, time.Time{}, time.Time{}
	}
	return wanted
}

const (
	lookEvery   = 500 * time.Millisecond // at most, while a job runs
	shareLook   = 20 * time.Millisecond  // while it is kept to a share
	shareBurst  = 250 * time.Millisecond // of its share, that it may be ahead
	shareNoLess = 0.01                   // of a processor
)

// throttle is how long the job is to stand still now for its share of CPU.
func (p *pace) throttle(share float64, cpu time.Duration, now time.Time) time.Duration {
	if share <= 0 {
		p.from, p.until = time.Time{}, time.Time{}
		return 0
	}
	if left := p.until.Sub(now); left > 0 {
		return left
	}
	share = max(share, shareNoLess)
	allowed := time.Duration(share * float64(now.Sub(p.from)))
	ahead := cpu - p.fromCPU - allowed
	switch {
	case p.from.IsZero() || ahead < 0: // what was not taken is not saved up
		p.from, p.fromCPU = now, cpu
	case ahead > time.Duration(share*float64(shareBurst)):
		d := time.Duration(float64(ahead) / share)
		p.until = now.Add(d)
		return d
	}
	return 0
}

// newControlPage makes the memory through which a worker is spoken to. What the
// worker gets cannot be written, and is closed by the caller.
func newControlPage() (mine, worker *os.File, err error) {
	fd, err := unix.MemfdCreate("job", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	mine = os.NewFile(uintptr(fd), "control")
	if err = mine.Truncate(int64(os.Getpagesize())); err == nil {
		worker, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	}
	if err != nil {
		mine.Close()
		return nil, nil, err
	}
	return mine, worker, nil
}

// Checkpoints wear the disk out: each costs its bytes and checkpointCost. Who has
// used up checkpointBurst waits until there is as much again, at checkpointRate.
const (
	checkpointCost  = 64 << 10
	checkpointBurst = 128 << 20
	checkpointRate  = 256 << 10 // bytes a second
)

// keepCheckpoints takes checkpoints from the worker until it is gone. A module whose output
// must be the same everywhere does not see whether one was kept: it would go on from the one
// before, and do again what it did.
func (c *child) keepCheckpoints(r, answers *os.File, s Spec) {
	keep := s.OnCheckpoint
	defer close(c.kept)
	defer r.Close()
	defer answers.Close()
	left, at := int64(checkpointBurst), time.Now()
	for {
		var head [4]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return
		}
		size := int64(binary.BigEndian.Uint32(head[:]))
		if size > MaxCheckpoint {
			return // no worker of ours
		}
		body := io.LimitReader(r, size)
		answer := byte(0)
		if keep != nil {
			now := time.Now()
			left = min(left+int64(now.Sub(at).Seconds()*checkpointRate), checkpointBurst) - size - checkpointCost
			at = now
			if wait := time.Duration(float64(-left) / checkpointRate * float64(time.Second)); wait > 0 && !c.control.asked.Load() {
				select {
				case <-time.After(wait):
				case <-c.exited:
					return
				}
			}
			answer = 0
			if err := keep(size, body); err != nil && s.Live {
				answer = errnoIO
			}
		}
		if _, err := io.Copy(io.Discard, body); err != nil {
			return
		}
		if _, err := answers.Write([]byte{answer}); err != nil {
			return
		}
	}
}
