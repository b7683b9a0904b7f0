package agent

import (
	"path/filepath"
	"testing"
)

// A floor below what the journal needs would let a device fill itself with
// chunks until it can neither report nor start.
func TestChunksLeaveTheAgentRoomOnItsOwnDisk(t *testing.T) {
	state := t.TempDir()
	a := &Agent{cfg: Config{StateDir: state}, log: discardLog()}
	for _, c := range []struct {
		dir         string
		floor, want int64
	}{
		{filepath.Join(state, "volumes", "main"), 1_000_000, sharedFloor},
		{state, -1, sharedFloor},
		{state, sharedFloor + 1, sharedFloor + 1},
		{state, 0, 0},                        // the store's own default is above
		{"/proc/self", 1_000_000, 1_000_000}, // another file system
	} {
		if got := a.floorOf(VolumeConfig{Dir: c.dir, Floor: c.floor}); got != c.want {
			t.Errorf("%s with floor %d leaves %d, want %d", c.dir, c.floor, got, c.want)
		}
	}
}
