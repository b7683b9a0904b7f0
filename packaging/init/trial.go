package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
)

const (
	// How long a try lasts at most, from power-on: when nobody answers, and when this
	// program hangs before the agent is started.
	trialPatience = time.Hour

	answerLimit = 5 * time.Second
)

// trial watches a firmware that is not confirmed yet, as a launcher watches an
// agent on trial. The boot loader counts the starts of the machine and goes back
// when they are used up; but a firmware that starts and does not work, nobody
// would start again. So the machine is started anew
//
//   - when the agent has ended by itself slot.Tries times since the machine's start;
//   - when the firmware is not confirmed, though coordinator and broker answered
//     for within, all in all: the agent crashes, hangs, or is not welcome;
//   - when it is not confirmed trialPatience after power-on. A coordinator or router
//     that is away, or a cable that is out, is seldom the firmware's fault, and costs
//     a try only after that; but it may be, with a driver missing, say, and then the
//     machine is back with the old one after slot.Tries times that.
//
// Whether somebody answers we ask ourselves, and do not take the agent's word for
// it: a TLS handshake with a server of the fleet's authority. A connection alone is
// accepted by the kernel of one whose process hangs, and by a router in its place. (A
// launcher has a name for neither, and does not wait: the old agent is a restart of a
// process away.)
//
// There is a trial only while there is another firmware to go back to (ota/slot/
// firmware, [firmware.Store.OnTrial]): a new device, which may wait for days until
// somebody claims it, is left alone. Where the ESP is not mounted or cannot be
// read, the boot loader's word counts: it says in a variable when it has counted
// this start. That ends, too: see [trial.byLoader]. Where neither tells, there is none.
//
// Each start must be paid for, or the trial never ends: [firmware.Store.CountStart].
// A machine on which that cannot be done is not started anew, which would come to the same firmware.
type trial struct {
	within, patience, every time.Duration
	efivars                 string
	restart                 func(why string)
	log                     *slog.Logger

	begun chan struct{} // closed when the disks are there, as far as they are

	mu      sync.Mutex // guards the rest
	images  *firmware.Store
	answers func(context.Context) bool // nil: the machine is not as far
	paid    bool                       // this start is counted
	over    bool                       // it was seen confirmed

	ends int // of the agent, since the machine's start; the supervisor's
}

// newTrial is called at power-on.
func (m *machine) newTrial() *trial {
	within := m.params.confirm
	if within == 0 {
		within = slot.ConfirmWithin
	}
	return &trial{within: within, patience: max(trialPatience, within), every: max(within/6, time.Millisecond), begun: make(chan struct{}),
		efivars: m.path("sys/firmware/efi/efivars"), restart: m.startAnew, log: m.log}
}

// openTrial is called when the ESP is mounted, or could not be.
func (m *machine) openTrial() {
	release := readWord(m.path("etc/deimos-release"))
	if m.esp == "" || release == "" {
		return
	}
	images, err := firmware.Open(m.esp, m.path("data/deimos/ota"), release, "")
	if err != nil {
		m.log.Error("whether this firmware is on trial cannot be told", "error", err)
		return
	}
	m.trial.mu.Lock()
	m.trial.images = images
	m.trial.mu.Unlock()
}

// begin pays for this start, when the data partition is there with what is remembered
// of the one before. A start that does not come so far pays when it is given up.
func (t *trial) begin() {
	t.count()
	close(t.begun)
}

// beginLate begins again in a start that had no ESP until now, and returns as watch does.
func (t *trial) beginLate(ctx context.Context) {
	watched := t.byLoader()
	if t.count(); !watched {
		t.watch(ctx)
	}
}

func (t *trial) count() {
	if images := t.store(); images != nil {
		_ = step(t.log, "looking whether the boot loader counts starts", shortLimit, func(context.Context) error { return images.NoteLoader() }) // which has said why
	}
	t.pay()
}

// store is nil where the ESP is not mounted.
func (t *trial) store() *firmware.Store {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.images
}

// pay tells whether this start is counted.
func (t *trial) pay() bool {
	images := t.store()
	if images == nil {
		return true // by the boot loader, or it were no trial
	}
	err := step(t.log, "counting this start of a firmware on trial", shortLimit, func(context.Context) error { return images.CountStart() })
	t.mu.Lock()
	defer t.mu.Unlock()
	t.paid = err == nil
	return t.paid
}

// ask tells whom the agent must reach.
func (t *trial) ask(answers func(context.Context) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.answers = answers
}

// watch returns when the trial is over, or ctx.
func (t *trial) watch(ctx context.Context) {
	last := time.NewTimer(t.patience)
	defer last.Stop()
	select {
	case <-ctx.Done():
		return
	case <-t.begun:
	case <-last.C:
		last.Reset(0)
	}
	on, known := t.is()
	if known && !on {
		return
	}
	if on {
		t.log.Info("this firmware is on trial", "confirm_within", t.within, "without_an_answer", t.patience)
	}
	for {
		why := t.await(ctx, last.C)
		if why == "" {
			return
		}
		switch on, known := t.is(); {
		case known && !on, on && t.giveUp(why):
			return
		}
		last.Reset(t.patience)
	}
}

// await returns why this try is over, or nothing if ctx is.
func (t *trial) await(ctx context.Context, last <-chan time.Time) (why string) {
	look := time.NewTicker(t.every)
	defer look.Stop()
	var answered time.Duration
	said := false
	for before := time.Now(); answered < t.within; {
		select {
		case <-ctx.Done():
			return ""
		case <-last:
			return fmt.Sprintf("this firmware was not confirmed, and %s is the longest that it is waited for", t.patience)
		case <-look.C:
		}
		t.mu.Lock()
		answers := t.answers
		t.mu.Unlock()
		yes := answers != nil && answers(ctx)
		now := time.Now()
		if yes {
			answered += now.Sub(before)
		} else if answers != nil && !said {
			said = true
			t.log.Warn("this firmware is on trial, and coordinator or broker do not answer; it is given longer", "at_most", t.patience)
		}
		before = now
	}
	return fmt.Sprintf("this firmware was not confirmed within %s", t.within)
}

// ended is told of each end of the agent that we did not ask for, and tells
// whether the firmware is given up for it.
func (t *trial) ended() bool {
	if t.ends++; t.ends < slot.Tries {
		return false
	}
	on, _ := t.is()
	return on && t.giveUp(fmt.Sprintf("the agent of this firmware has ended %d times before it was confirmed", t.ends))
}

// giveUp tells whether the machine is started anew.
func (t *trial) giveUp(why string) bool {
	t.mu.Lock()
	paid := t.paid
	t.mu.Unlock()
	if !paid && !t.pay() {
		t.log.Error("this firmware does not work, and cannot be left: neither the boot loader nor Linux can write to the EFI system partition; replace the disk, or write the image to it anew", "why", why)
		return false
	}
	t.restart(why)
	return true
}

// is tells whether there is a trial; not known where the ESP cannot be read and the
// boot loader says nothing.
func (t *trial) is() (on, known bool) {
	t.mu.Lock()
	images, over := t.images, t.over
	t.mu.Unlock()
	if over {
		return false, true
	}
	if images == nil {
		return t.byLoader(), true
	}
	answer := make(chan bool, 1)
	err := step(t.log, "looking whether this firmware is on trial", shortLimit, func(context.Context) error {
		on, err := images.OnTrial()
		answer <- on
		return err
	})
	if err != nil {
		on = t.byLoader()
		return on, on
	}
	if on = <-answer; !on {
		t.mu.Lock()
		t.over = true
		t.mu.Unlock()
	}
	return on, true
}

// byLoader tells whether the boot loader has counted this start, and not more often
// than a firmware is tried: one that it starts after that is the only one, and
// would be started for ever.
func (t *trial) byLoader() bool {
	_, tried, ok := firmware.Counter(loaderWord(t.efivars, "LoaderBootCountPath"))
	return ok && tried <= slot.Tries
}

// answers tells whether the coordinator and, for a member, a broker answer.
func (m *machine) answers(ctx context.Context) bool {
	var member membership
	believe := func(shown *x509.Certificate) *x509.Certificate { return shown }
	if raw, err := os.ReadFile(m.path(membershipFile)); err == nil {
		_ = json.Unmarshal(raw, &member) // of one that cannot be read, nobody answers
		ca, _ := x509.ParseCertificate(member.authority())
		believe = func(*x509.Certificate) *x509.Certificate { return ca }
	}
	m.mu.Lock()
	coordinators := append([]string{m.params.coordinator, m.declared, m.found, member.Coordinator}, member.DataPlane...)
	m.mu.Unlock()
	return anyAnswers(ctx, coordinators, believe) && (len(member.Brokers) == 0 || anyAnswers(ctx, member.Brokers, believe))
}

func anyAnswers(ctx context.Context, addresses []string, believe func(*x509.Certificate) *x509.Certificate) bool {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	results := make(chan bool, len(addresses))
	for _, address := range addresses {
		go func() { results <- shakesHands(ctx, address, believe) }() // ends with ctx
	}
	for range addresses {
		if <-results {
			return true
		}
	}
	return false
}

// startAnew asks for a restart of the machine; the first reason counts.
func (m *machine) startAnew(why string) {
	select {
	case m.again <- why:
	default:
	}
}
