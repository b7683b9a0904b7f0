// Package watchdog has the machine, or the service manager, start the agent
// anew if its own loops make no progress.
//
// # Parties
//
//   - A loop of the agent has a [Pulse] with a limit of its own: it beats at
//     least that often, or it is late.
//   - The [Dog] feeds what watches over the agent, as long as no pulse is late.
//   - systemd (WatchdogSec= of the unit) ends the service and starts it again.
//     Protocol: sd_notify(3), sd_watchdog_enabled(3).
//   - The machine's watchdog (/dev/watchdogN) resets the machine.
//     Protocol: https://docs.kernel.org/watchdog/watchdog-api.html.
//
// # What always holds
//
//   - One late loop stops the feeding of both. The machine is reset at the latest
//     after the loop's limit and the device's timeout. A loop that beats again in
//     time is forgiven, within a second.
//   - Opening the device arms it, so it is opened only if named, only by Run, and
//     only once there is a pulse: an agent without a loop is not reset. The agent
//     samples from its start on, so it is guarded also while it waits for days to
//     be claimed.
//   - What does not answer as a watchdog is closed, and nothing is written to it.
//   - It is disarmed only where Run ends because its context did. An agent that
//     panics, is killed or hangs leaves it armed, on purpose. Where the driver
//     or the kernel does not play along, the log says so when it is armed.
//   - A feeding that hangs (a bus, a stuck service manager) holds up nothing but
//     itself: each of the two has a goroutine of its own.
//   - Time is the monotonic clock: a clock that is set makes nobody late, nor
//     does a suspend, in which that clock stands still.
//   - Who is not the service's main process (the launcher is) does not tell
//     systemd that the service stops: it may be only the agent that starts anew.
//
// # Not done yet
//
// Pretimeouts (WDIOC_SETPRETIMEOUT), and what the driver says of the last reset:
// hw's inventory tells that.
package watchdog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Options say which dog.
type Options struct {
	Device string // such as "/dev/watchdog0"; "" feeds none. Feeding begins with the first pulse
	Log    *slog.Logger
}

const (
	// recheck is how soon a late loop is looked at again: one that was late only
	// because the process was stopped for a while must not cost the machine.
	recheck = time.Second
	// patience is how long one feeding takes until the log says that it hangs, and
	// how long Run waits for the disarming.
	patience = 2 * time.Second
	// maxStacks bounds what the log says of the goroutines when a loop is late.
	maxStacks = 32 << 10
)

// Dog is fed while all pulses beat. Safe for concurrent use. A nil Dog watches
// over nothing, and its pulses are nil.
type Dog struct {
	log     *slog.Logger
	began   time.Time // pulses count from here
	systemd *manager  // nil: none in the environment
	device  *device   // nil: none named
	first   chan struct{}

	mu     sync.Mutex
	pulses map[*Pulse]struct{}
	late   bool // and the log says so
}

// New finds systemd's watchdog in the environment, and looks whether there is
// the device; only Run opens it. With an error, too, it returns a Dog, which
// feeds what was found: an agent is better unguarded than not started.
func New(o Options) (*Dog, error) {
	d := &Dog{log: o.Log, began: time.Now(), first: make(chan struct{}), pulses: make(map[*Pulse]struct{})}
	m, err := findManager()
	d.systemd = m
	if o.Device == "" {
		return d, err
	}
	if unfit := usable(o.Device); unfit != nil {
		return d, errors.Join(err, unfit)
	}
	d.device = &device{path: o.Device, sys: "/sys", open: openKernel, log: o.Log}
	return d, err
}

// usable tells whether a watchdog device can be opened, without opening it.
func usable(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("there is no watchdog %s: %w; see the inventory for what this machine has", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return fmt.Errorf("%s is no device; name a watchdog, such as /dev/watchdog0", path)
	}
	if err := unix.Access(path, unix.W_OK); err != nil {
		return fmt.Errorf("the watchdog %s may not be used: %w; run the agent as root, or let its group write to the device", path, err)
	}
	return nil
}

// Pulse is one loop's sign of life. The methods of a nil Pulse do nothing.
type Pulse struct {
	dog   *Dog
	name  string
	limit time.Duration
	last  atomic.Int64 // since dog.began
}

// Pulse adds a loop, which beats at least every limit from now on. limit must
// be positive.
func (d *Dog) Pulse(name string, limit time.Duration) *Pulse {
	if limit <= 0 {
		panic("watchdog: the limit of " + name + " is not positive")
	}
	if d == nil {
		return nil
	}
	p := &Pulse{dog: d, name: name, limit: limit}
	p.Beat()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pulses[p] = struct{}{}
	select {
	case <-d.first:
	default:
		close(d.first)
	}
	return p
}

// Beat says that the loop is alive. It costs next to nothing.
func (p *Pulse) Beat() {
	if p != nil {
		p.last.Store(int64(time.Since(p.dog.began)))
	}
}

// End says that the loop has ended in good order.
func (p *Pulse) End() {
	if p == nil {
		return
	}
	p.dog.mu.Lock()
	defer p.dog.mu.Unlock()
	delete(p.dog.pulses, p)
}

// Stalled names the loops that are late, and how long each has not beaten.
func (d *Dog) Stalled() map[string]time.Duration {
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stalled()
}

func (d *Dog) stalled() map[string]time.Duration {
	var late map[string]time.Duration
	for p := range d.pulses {
		silent := time.Since(d.began) - time.Duration(p.last.Load())
		if silent <= p.limit {
			continue
		}
		if late == nil {
			late = make(map[string]time.Duration)
		}
		late[p.name] = max(late[p.name], silent)
	}
	return late
}

// Ready tells systemd that the agent has started, and status what it does. It
// does not block: Run sends it, and only the newest.
func (d *Dog) Ready(status string) {
	if d != nil && d.systemd != nil {
		d.systemd.ready(status)
	}
}

// Run feeds until ctx ends, and then disarms what it opened: a stop in good
// order must not reset the machine. To be guarded until the loops have ended,
// ctx ends after them.
func (d *Dog) Run(ctx context.Context) {
	if d == nil {
		return
	}
	var wg sync.WaitGroup
	if d.systemd != nil {
		wg.Go(func() { d.serve(ctx) })
	}
	if d.device != nil {
		wg.Go(func() { d.guard(ctx) })
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	<-ctx.Done()
	select {
	case <-ended:
	case <-time.After(patience):
		d.log.Error("a watchdog does not take its orders and stays as it is; an armed device resets the machine")
	}
}

// feed gives food if no loop is late, and says when to come back.
func (d *Dog) feed(every time.Duration, give func() error) (time.Duration, error) {
	if !d.inTime() {
		return min(every, recheck), nil
	}
	hangs := time.AfterFunc(patience, func() {
		d.log.Error("feeding a watchdog hangs; unless it comes through, the agent or the machine is started anew")
	})
	defer hangs.Stop()
	return every, give()
}

// inTime tells whether all loops are, and logs when that changes, with what
// every goroutine is doing: after the reset nobody can ask any more.
func (d *Dog) inTime() bool {
	d.mu.Lock()
	late := d.stalled()
	was := d.late
	d.late = len(late) > 0
	d.mu.Unlock()
	switch {
	case len(late) > 0 && !was:
		stacks := make([]byte, maxStacks)
		stacks = stacks[:runtime.Stack(stacks, true)]
		for _, name := range slices.Sorted(maps.Keys(late)) {
			d.log.Error("a loop of the agent makes no progress; the watchdogs are not fed until it does", "loop", name, "silent", late[name].Round(time.Millisecond).String())
		}
		d.log.Error("goroutines at that time", "stacks", string(stacks))
	case len(late) == 0 && was:
		d.log.Info("all loops of the agent make progress again; the watchdogs are fed")
	}
	return len(late) == 0
}

// nowayout tells whether the kernel refuses to disarm the device, by
// /sys/class/watchdog/watchdogN/nowayout.
func nowayout(sys, path string) bool {
	name := filepath.Base(path)
	if name == "watchdog" { // the old name of the first
		name = "watchdog0"
	}
	raw, err := os.ReadFile(filepath.Join(sys, "class/watchdog", name, "nowayout"))
	return err == nil && len(raw) > 0 && raw[0] == '1'
}
