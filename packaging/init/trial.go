package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
)

// trial watches a firmware that is not confirmed yet, as a launcher watches an
// agent on trial. The boot loader counts the starts of the machine and goes back
// when they are used up; but a firmware that starts and does not work, nobody
// would start again. So the machine is started anew when the agent has ended by
// itself slot.Tries times since the machine's start, or has not confirmed the
// firmware in time.
//
// There is a trial only while there is another firmware to go back to (ota/slot/
// firmware, [firmware.Store.OnTrial]): a new device, which may wait for days until
// somebody claims it, is left alone. An agent that hangs is the watchdog's, too.
type trial struct {
	onTrial func() (bool, error)
	within  time.Duration
	restart func(why string)
	log     *slog.Logger

	ends int // of the agent, since the machine's start
}

// newTrial returns nil where there is no firmware to go back to: without an ESP, or
// without the release file of our image.
func (m *machine) newTrial() *trial {
	release := readWord(m.path("etc/deimos-release"))
	if m.esp == "" || release == "" {
		return nil
	}
	images, err := firmware.Open(m.esp, m.path("data/deimos/ota"), release, "")
	if err != nil {
		m.log.Error("whether this firmware is on trial cannot be told", "error", err)
		return nil
	}
	within := m.params.confirm
	if within == 0 {
		within = slot.ConfirmWithin
	}
	return &trial{onTrial: images.OnTrial, within: within, restart: m.startAnew, log: m.log}
}

// watch returns when the trial is over, or ctx.
func (t *trial) watch(ctx context.Context) {
	if !t.is() {
		return
	}
	t.log.Info("this firmware is on trial", "confirm_within", t.within)
	timer := time.NewTimer(t.within)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return
	case <-timer.C:
	}
	if t.is() {
		t.restart(fmt.Sprintf("this firmware was not confirmed within %s", t.within))
	}
}

// ended is told of each end of the agent that we did not ask for, and tells
// whether the firmware is given up for it.
func (t *trial) ended() bool {
	if t.ends++; t.ends < slot.Tries || !t.is() {
		return false
	}
	t.restart(fmt.Sprintf("the agent of this firmware has ended %d times before it was confirmed", t.ends))
	return true
}

func (t *trial) is() bool {
	on, err := t.onTrial()
	if err != nil {
		t.log.Error("whether this firmware is on trial cannot be told", "error", err)
	}
	return err == nil && on
}

// startAnew asks for a restart of the machine; the first reason counts.
func (m *machine) startAnew(why string) {
	select {
	case m.again <- why:
	default:
	}
}
