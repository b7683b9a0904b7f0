// Package sensor reads the sensors that a board's profile or its owner declares.
package sensor

import (
	"context"
	"log/slog"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

// Set is the declared sensors of a machine. Safe for concurrent use.
type Set struct{}

// New checks the declarations; all that is wrong with them is in the error.
// It touches no bus.
func New(sensors []board.Sensor, log *slog.Logger) (*Set, error) { return &Set{}, nil }

// Run reads each sensor on its schedule until ctx ends.
func (s *Set) Run(ctx context.Context) {}

// Latest is the newest value of each that answers, and, for the warnings, which do not.
func (s *Set) Latest() (values []hw.Measurement, silent []Silent) { return nil, nil }

// Silent is a sensor that does not answer.
type Silent struct {
	Name string
	Err  error // why, and what to do
}

// Check tells what is wrong with a declaration, for linters.
func Check(s board.Sensor) error { return nil }
