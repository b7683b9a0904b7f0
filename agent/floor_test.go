package agent

import (
	"path/filepath"
	"testing"

	"github.com/deimos-edge/deimos/sync/store"
)

// A floor below what the journal needs would let a device fill itself with
// chunks until it can neither report nor start.
func TestChunksLeaveTheAgentRoomOnItsOwnDisk(t *testing.T) {
	state := t.TempDir()
	for _, c := range []struct {
		dir         string
		floor, want int64
	}{
		{filepath.Join(state, "volumes", "main"), 1_000_000, sharedFloor},
		{state, -1, sharedFloor},
		{state, sharedFloor + 1, sharedFloor + 1},
		{state, 0, store.DefaultFloor(state)},
		{"/proc/self", 1_000_000, 1_000_000}, // another file system
	} {
		cfg := Config{StateDir: state, Volumes: []VolumeConfig{{Dir: c.dir, Floor: c.floor}}}
		if got := cfg.places(bareMachine())[0].Floor; got != c.want {
			t.Errorf("%s with floor %d leaves %d, want %d", c.dir, c.floor, got, c.want)
		}
	}
}

// Without a word from the owner, chunks go below the state, and leave more free
// there than a volume of its own would: it is the system's disk.
func TestWithoutAVolumeChunksGoBelowTheState(t *testing.T) {
	m, stop := realMachine(t, Config{StateDir: t.TempDir(), Floor: 1})
	if len(m.places) != 1 || m.places[0].Dir != filepath.Join(m.state, "volumes", "main") || m.places[0].Floor < store.DefaultFloor(m.state) {
		t.Errorf("chunks go to %+v", m.places)
	}
	if err := stop(nil); err != nil {
		t.Error(err)
	}
}
