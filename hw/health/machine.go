package health

import (
	"log/slog"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/sensor"
)

// Machine judges a machine by its inventory and telemetry. It remembers what is
// usual for it, in a file.
type Machine struct{}

// Path is a folder whose filesystem matters.
type Path struct {
	Dir   string
	Floor uint64 // bytes that what is in it leaves free on purpose, as volumes do; 0 if it is not meant to fill the disk
}

// NewMachine opens the memory in dir, or begins one.
func NewMachine(dir string, b board.Board, paths []Path, r *Registry, log *slog.Logger) (*Machine, error) {
	return &Machine{}, nil
}

// Inventory judges what is there. Called with each probe.
func (m *Machine) Inventory(inv *hw.Inventory) {}

// Telemetry judges how it feels. Called with each sample.
func (m *Machine) Telemetry(t hw.Telemetry, silent []sensor.Silent) {}

// Close saves the memory, and notes that the end was in good order.
func (m *Machine) Close() error { return nil }
