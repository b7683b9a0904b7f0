package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// board is a machine's watchdog; package hw/watchdog tells what the kernel does. Only
// one has it open.
type board struct {
	most     time.Duration // longer timeouts are not taken
	nowayout bool
	stuck    chan struct{} // feeding waits for it

	mu    sync.Mutex  // guards the rest
	clock *time.Timer // nil: not armed
	state
}

type state struct {
	open   bool
	takes  int
	resets int
}

// now is how the watchdog stands.
func (b *board) now() (s state, isArmed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.state, b.clock != nil
}

func (b *board) take(string) (armed, error) {
	b.mu.Lock()
	inUse := b.open
	if !inUse {
		b.open = true
		b.takes++
	}
	b.mu.Unlock()
	if inUse {
		return nil, unix.EBUSY
	}
	return b, b.Feed()
}

func (b *board) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.resets++
}

func (b *board) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open = false
}

func (b *board) Timeout() time.Duration { return min(b.most, 5*time.Minute) }

func (b *board) Feed() error {
	if b.stuck != nil {
		<-b.stuck
	}
	b.stop()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clock = time.AfterFunc(b.Timeout(), b.reset)
	return nil
}

func (b *board) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.clock != nil {
		b.clock.Stop()
	}
	b.clock = nil
}

func (b *board) HandOver() (bool, error) { b.close(); return true, b.Feed() }

func (b *board) Disarm() (bool, error) {
	if b.close(); b.nowayout {
		return false, b.Feed()
	}
	b.stop()
	return true, nil
}

// guarded is a start of a machine with this watchdog.
func guarded(t *testing.T, b *board) (d *startDog, s *said) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "watchdog0")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s = newSaid()
	d = newStartDog(path, slog.New(slog.NewTextHandler(lineWriter(s.say), nil)))
	d.take = b.take
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { d.run(ctx); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended; b.stop() })
	return d, s
}

// inABubble runs a test for each watchdog with a clock of its own.
func inABubble(t *testing.T, b *board, do func(t *testing.T, d *startDog, s *said)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d, s := guarded(t, b)
		synctest.Wait()
		do(t, d, s)
	})
}

func TestAStartThatMakesNoProgressIsReset(t *testing.T) {
	b := &board{most: time.Hour}
	inABubble(t, b, func(t *testing.T, d *startDog, s *said) {
		d.expect(20 * time.Minute)
		time.Sleep(20*time.Minute + startGrace)
		if is, _ := b.now(); is.resets != 0 {
			t.Fatal("reset within the time that a start may take")
		}
		time.Sleep(b.Timeout() + 2*time.Second)
		if is, _ := b.now(); is.resets != 1 || s.count("makes no progress") != 1 {
			t.Errorf("reset %d times; %q", is.resets, s.lines)
		}
	})
}

func TestAStartThatMakesProgressIsNotReset(t *testing.T) {
	b := &board{most: 15 * time.Second} // as short as some are
	inABubble(t, b, func(t *testing.T, d *startDog, _ *said) {
		for range 100 {
			d.expect(time.Hour)
			time.Sleep(time.Hour)
		}
		if is, isArmed := b.now(); is.resets != 0 || !isArmed {
			t.Errorf("reset %d times, armed %v", is.resets, isArmed)
		}
	})
}

func TestAnAgentThatHangsBeforeItHasArmedTheWatchdogIsReset(t *testing.T) {
	b := &board{most: time.Hour}
	inABubble(t, b, func(t *testing.T, d *startDog, _ *said) {
		d.handOver()
		if is, _ := b.now(); is.open {
			t.Fatal("the agent finds it in use")
		}
		time.Sleep(b.Timeout() + time.Second)
		if is, _ := b.now(); is.resets != 1 {
			t.Error("not reset")
		}
	})
}

func TestAnAgentThatEndsIsNoReasonForAReset(t *testing.T) {
	b := &board{most: time.Hour}
	inABubble(t, b, func(t *testing.T, d *startDog, s *said) {
		for range 50 {
			d.handOver()
			time.Sleep(time.Minute)
			d.takeBack()
			d.expect(toldNothing)
			time.Sleep(toldNothing)
		}
		if is, isArmed := b.now(); is.resets != 0 || !isArmed {
			t.Errorf("reset %d times, armed %v", is.resets, isArmed)
		}
		// One that cannot be killed has it open still: nobody feeds.
		d.handOver()
		_, _ = b.take("")
		d.takeBack()
		d.expect(time.Hour)
		time.Sleep(time.Hour)
		if is, _ := b.now(); is.resets != 1 || s.count("is not armed") != 1 {
			t.Errorf("reset %d times: %q", is.resets, s.lines)
		}
	})
}

func TestAWatchdogThatIsNotUsedIsStopped(t *testing.T) {
	for name, do := range map[string]func(*startDog){
		"the owner wants none":         func(d *startDog) { d.use("") },
		"the owner wants another":      func(d *startDog) { d.use(filepath.Join(d.path + "1")) },
		"the machine goes down":        (*startDog).off,
		"it has gone down, and hangs":  func(d *startDog) { d.handOver(); d.takeBack(); d.off(); d.off() },
		"none, and agents come and go": func(d *startDog) { d.use(""); d.handOver(); d.takeBack(); d.handOver() },
	} {
		b := &board{most: time.Hour}
		inABubble(t, b, func(t *testing.T, d *startDog, _ *said) {
			do(d)
			time.Sleep(24 * time.Hour)
			if is, isArmed := b.now(); is.resets != 0 || isArmed {
				t.Errorf("%s: reset %d times, armed %v", name, is.resets, isArmed)
			}
		})
	}
}

func TestAWatchdogTooShortForAnAgentIsStoppedBeforeIt(t *testing.T) {
	b := &board{most: 59 * time.Second}
	inABubble(t, b, func(t *testing.T, d *startDog, s *said) {
		time.Sleep(startGrace)
		d.handOver()
		time.Sleep(time.Hour)
		if is, _ := b.now(); is.resets != 0 || s.count("cannot wait for an agent") != 1 {
			t.Errorf("reset %d times: %q", is.resets, s.lines)
		}
	})
}

func TestAWatchdogThatCannotBeStoppedIsSaid(t *testing.T) {
	b := &board{most: time.Hour, nowayout: true}
	inABubble(t, b, func(t *testing.T, d *startDog, s *said) {
		d.use("")
		if s.count("cannot be disarmed") != 1 {
			t.Errorf("%q", s.lines)
		}
	})
}

func TestAWatchdogThatHangsHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &board{most: time.Hour, stuck: make(chan struct{})}
		d, _ := guarded(t, b)
		synctest.Wait()
		began := time.Now()
		d.handOver()
		d.takeBack()
		d.off()
		if took := time.Since(began); took > 3*dogLimit {
			t.Errorf("it took %v", took)
		}
		close(b.stuck)
	})
}

func TestAWatchdogWhoseDriverIsLoadedLaterIsTaken(t *testing.T) {
	b := &board{most: time.Hour}
	synctest.Test(t, func(t *testing.T) {
		d, _ := guarded(t, b)
		synctest.Wait()
		later := filepath.Join(t.TempDir(), "watchdog0")
		d.use(later)
		time.Sleep(time.Minute)
		if is, _ := b.now(); is.open {
			t.Fatal("taken before it is there")
		}
		if err := os.WriteFile(later, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * lookForDog)
		if is, _ := b.now(); !is.open || is.takes != 2 {
			t.Errorf("taken %d times", is.takes)
		}
	})
}

func TestTheWatchdogIsTheOneThatTheAgentWillUse(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "/dev/watchdog0",
		"watchdog = \"\"\n":               "",
		"watchdog = \"/dev/watchdog1\"\n": "/dev/watchdog1",
		"coordinator = \n":                "/dev/watchdog0", // the agent ends
		"watchdog = 3\n":                  "/dev/watchdog0",
	} {
		config, _, _ := prepareConfig([]byte(text), "/dev/watchdog0")
		if got := namedWatchdog(config, "/dev/watchdog0"); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	if config, _, _ := prepareConfig(nil, ""); namedWatchdog(config, "") != "" {
		t.Error("a machine that has none uses one")
	}
}
