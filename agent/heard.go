package agent

import (
	"log/slog"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

// heard is until when a pause lasts that the owner has said "for 2h" of. What the machine's
// clock said then does not count: a board may not know the time, and the agent goes by the
// coordinator's. How long it is to last counts, from when the agent first hears of it.
type heard struct {
	state string
	clock *Clock
	log   *slog.Logger
	mono  func() time.Time // that nobody sets

	last pause
	end  time.Time // of last, by mono
	sure bool      // whether the clock was trusted when that was last asked for
}

// pause is what outlives the agent.
type pause struct {
	Word  policy.Word `json:"word"`           // as the owner said it
	Until time.Time   `json:"until"`          // by the agent's clock
	Sure  bool        `json:"sure,omitempty"` // that clock was trusted
}

const heardFile = "heard.json"

func newHeard(state string, clock *Clock, log *slog.Logger, mono func() time.Time) *heard {
	h := &heard{state: state, clock: clock, log: log, mono: mono}
	if err := readOwn(h.path(), &h.last); err != nil {
		log.Warn("how much of the owner's pause of jobs is over was forgotten; it begins anew", "error", err)
		h.last = pause{}
	}
	h.end = mono().Add(h.left(clock.Now()))
	return h
}

func (h *heard) path() string { return filepath.Join(h.state, jobsDir, heardFile) }

// left is how much of the last pause is left at a time of the agent's clock.
func (h *heard) left(now time.Time) time.Duration {
	return min(h.last.Until.Sub(now), h.last.Word.Until.Sub(h.last.Word.Said))
}

// word is what the owner says, with the end of a pause by the agent's clock.
func (h *heard) word() (policy.Word, error) {
	w, err := OwnersWord(h.state)
	if err != nil || !w.Paused || w.Until.IsZero() || w.Said.IsZero() {
		return w, err
	}
	now, confidence := h.clock.Read()
	sure := confidence == wire.ClockTrusted
	switch {
	case w != h.last.Word:
		whole := w.Until.Sub(w.Said)
		h.end = h.mono().Add(whole)
		h.note(pause{Word: w, Until: now.Add(whole), Sure: sure})
	case sure && !h.last.Sure: // the clock was set meanwhile, which is no reason to go on
		h.note(pause{Word: w, Until: now.Add(h.end.Sub(h.mono())), Sure: true})
	case sure && !h.sure: // since the agent was started it could only guess
		h.end = h.mono().Add(h.left(now))
	}
	h.sure = sure
	w.Until = now.Add(h.end.Sub(h.mono()))
	return w, nil
}

func (h *heard) note(p pause) {
	h.last = p
	if err := writeOwn(h.path(), p); err != nil {
		h.log.Warn("until when the owner has paused jobs cannot be noted; after a start of the agent the pause begins anew", "error", err)
	}
}
