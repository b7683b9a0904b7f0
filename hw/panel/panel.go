// Package panel is what a person sees and presses on a device: its light and its button.
package panel

import (
	"context"
	"log/slog"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

// State is what the light shows.
type State string

// The states of the light, by rising precedence.
const (
	Online   State = "online"
	Working  State = "working"
	Trouble  State = "trouble"
	Waiting  State = "waiting" // for claim
	Starting State = "starting"
	Updating State = "updating"
)

// Light is the status light of the board, if it has one. Safe for concurrent use.
type Light struct{}

// NewLight finds the board's light; a machine without one gets a Light that
// shows nothing. root is "/" but in tests.
func NewLight(root string, b board.Board, leds []hw.LED, log *slog.Logger) *Light { return &Light{} }

// Show is the pattern from now on.
func (l *Light) Show(s State) {}

// Identify blinks for d, whatever else is to be shown; 0 ends it.
func (l *Light) Identify(d time.Duration) {}

// Exists tells whether there is a light at all.
func (l *Light) Exists() bool { return false }

// Run drives the light until ctx ends, then gives it back to the kernel as it was.
func (l *Light) Run(ctx context.Context) {}

// HoldForReset is how long the button is held at start.
const HoldForReset = 10 * time.Second

// Held tells whether the button is pressed now and stays so for hold. It
// returns at once if it is not pressed, or there is none. feedback, if not nil,
// is told how long it has been held.
func Held(ctx context.Context, b board.Board, hold time.Duration, feedback func(time.Duration)) (bool, error) {
	return false, nil
}
