package watchdog

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/daemon"
)

// manager is systemd, to a service.
type manager struct {
	every time.Duration // between two feedings; 0: it does not watch
	main  bool          // this is the service's main process

	mu    sync.Mutex
	state string        // to be sent; "" if nothing is
	wake  chan struct{} // capacity 1: state has changed
}

// findManager is nil without NOTIFY_SOCKET. systemd asks to be fed at half of
// its limit, by the process that WATCHDOG_PID names.
func findManager() (*manager, error) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, nil
	}
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		err = fmt.Errorf("systemd's watchdog cannot be served: %w; see WatchdogSec= of the unit", err)
	}
	return &manager{every: limit / 2, main: isMain(), wake: make(chan struct{}, 1)}, err
}

// isMain tells whether systemd started this process itself, and not the
// launcher. Where systemd is too old to say (before 248, and without a
// watchdog), it did.
func isMain() bool {
	for _, name := range []string{"SYSTEMD_EXEC_PID", "WATCHDOG_PID"} {
		if v := os.Getenv(name); v != "" {
			return v == strconv.Itoa(os.Getpid())
		}
	}
	return true
}

// ready leaves the newest state for serve to send.
func (m *manager) ready(status string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = daemon.SdNotifyReady + "\nSTATUS=" + line(status)
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

func (m *manager) take() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.state
	m.state = ""
	return s
}

// line makes one line of text: in the protocol, a new line is a new field.
func line(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, s)
	if r := []rune(s); len(r) > 200 {
		s = string(r[:200])
	}
	return strings.TrimSpace(s)
}

// serve feeds systemd and hands on what the agent says, until ctx ends.
func (d *Dog) serve(ctx context.Context) {
	m := d.systemd
	told := false
	send := func(state string) error {
		_, err := daemon.SdNotify(false, state)
		if err != nil && !told {
			told = true
			d.log.Error("systemd cannot be told how the agent is; if the unit has WatchdogSec=, it starts the agent anew", "error", err)
		}
		return err
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	if m.every == 0 {
		timer.Stop()
	}
	for {
		select {
		case <-ctx.Done():
			if m.main {
				_ = send(daemon.SdNotifyStopping)
			}
			return
		case <-m.wake:
			if s := m.take(); s != "" {
				_ = send(s)
			}
		case <-timer.C:
			next, err := d.feed(m.every, func() error { return send(daemon.SdNotifyWatchdog) })
			if err != nil {
				next = min(next, recheck)
			}
			timer.Reset(next)
		}
	}
}
