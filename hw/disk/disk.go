// Package disk says which disks may hold chunks, how much, and whether they can
// be trusted with them.
package disk

import (
	"context"
	"log/slog"
	"time"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

// Options are the owner's word.
type Options struct {
	Auto  bool     // use what the rules allow, without being told
	Use   []string // mount points or disk serials that the owner consents to, foreign data or not
	Never []string // mount points, disk names or serials that are not to be used
	State string   // the agent's state folder
	Board board.Board
}

// Candidate is one filesystem that could hold chunks.
type Candidate struct {
	Mount    string `json:"mount"`
	Disk     string `json:"disk"` // kernel name
	Serial   string `json:"serial,omitempty"`
	System   bool   `json:"system"`
	Size     int64  `json:"size"`     // bytes
	Free     int64  `json:"free"`     // bytes
	Floor    int64  `json:"floor"`    // bytes that chunks leave free
	Capacity int64  `json:"capacity"` // bytes that may hold chunks; 0 if it is not used
	Dir      string `json:"dir"`      // folder for the chunks
	Use      bool   `json:"use"`
	Why      string `json:"why"` // a sentence: why it is used, or is not and what would change that
	Code     string `json:"code"`
	Test     *Test  `json:"test,omitempty"` // the newest self-test
}

// Test is what a self-test has found.
type Test struct {
	At       time.Time `json:"at"`
	Bytes    int64     `json:"bytes"`     // written and read back
	WriteBps float64   `json:"write_bps"` // bytes a second, synced
	ReadBps  float64   `json:"read_bps"`  // bytes a second, past the page cache where the filesystem allows it
	SyncMS   float64   `json:"sync_ms"`   // p50 of a small synced write
	Passed   bool      `json:"passed"`
	Problem  string    `json:"problem,omitempty"`
}

// Choose says for each mounted filesystem whether it may hold chunks and why.
// It writes nothing.
func Choose(inv *hw.Inventory, o Options) []Candidate { return nil }

// SelfTest writes to dir, syncs, reads back and compares, bounded by time and size.
// It removes what it wrote.
func SelfTest(ctx context.Context, dir string, log *slog.Logger) (Test, error) { return Test{}, nil }

// Record keeps the results of tests in the state folder, by disk and filesystem.
type Record struct{}

// OpenRecord reads the results.
func OpenRecord(state string) (*Record, error) { return &Record{}, nil }

// Trusted returns the test of the disk that dir is on, testing it if that was not done
// yet, or not with this disk.
func (r *Record) Trusted(ctx context.Context, dir string, inv *hw.Inventory, log *slog.Logger) (Test, error) {
	return Test{Passed: true}, nil
}
