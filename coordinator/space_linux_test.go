package coordinator

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// smallDisk is a file system of its own of n MiB.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	testenv.Root(t, "only root can mount a small disk")
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		testenv.Cannot(t, "a small disk cannot be mounted here: %v", err)
	}
	t.Cleanup(func() { must(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
	return dir
}

func TestACoordinatorStartsOnASmallDiskAndAgainOnAFullerOne(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "128m")
	state := filepath.Join(dir, "state")
	ctx := testContext(t)
	w := open(t, state)
	data := someBytes(chunk.MaxSize)
	name := "chunk/" + chunk.Sum(data).String()
	must(t, w.staging.put(ctx, name, data))
	w.Close()

	must(t, os.WriteFile(filepath.Join(dir, "others"), make([]byte, 90<<20), 0o600))
	w = open(t, state)
	t.Cleanup(func() { w.Close() })
	if got, err := w.staging.get(ctx, name); err != nil || len(got) != len(data) {
		t.Errorf("what was staged is gone: %d bytes, %v", len(got), err)
	}
	// It fills up to its share of the disk, says so, and goes on.
	var refused *refusal
	for n := range 64 {
		err := w.staging.put(ctx, "attachment/"+newNonce(), someBytes(1<<20))
		if errors.As(err, &refused) {
			t.Logf("refused after %d MiB more: %v", n, err)
			break
		}
		must(t, err)
	}
	if refused == nil || refused.status != http.StatusInsufficientStorage || refused.Code != wire.CodeNoSpace {
		t.Fatalf("a small disk was filled: %+v", refused)
	}
	if free, ok := w.eng.Free(); !ok || free < 4<<20 {
		t.Errorf("%d bytes are left for records", free)
	}
	w.enrolled(t) // records still have room
	w.Close()
	w = open(t, state)
	if err := w.staging.put(ctx, "attachment/"+newNonce(), someBytes(1<<20)); !errors.As(err, &refused) {
		t.Errorf("after a restart the limit is gone: %v", err)
	}
}

func TestJetStreamsRefusalsAreSentences(t *testing.T) {
	for code, c := range map[jetstream.ErrorCode]struct {
		text    string
		noSpace bool
	}{
		10047: {"insufficient storage resources available", true},
		10069: {"insufficient storage resources available", true},
		10077: {"write /x: no space left on device", true},
		10023: {"insufficient resources", true},
		10008: {"JetStream system temporarily unavailable", false},
	} {
		err := engine.StoreError(&jetstream.APIError{ErrorCode: code, Description: c.text})
		if errors.Is(err, engine.ErrNoSpace) != c.noSpace || !strings.Contains(err.Error(), "free space there") {
			t.Errorf("%d: %v", code, err)
		}
	}
	if other := errors.New("x"); engine.StoreError(other) != other {
		t.Error("another error is not left alone")
	}
}
