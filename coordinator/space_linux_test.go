package coordinator

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
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

// fillUp leaves so many bytes of a disk, until empty is called.
func fillUp(t *testing.T, dir string, left int64) (empty func()) {
	t.Helper()
	var fs syscall.Statfs_t
	must(t, syscall.Statfs(dir, &fs))
	path := filepath.Join(dir, "others")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	if n := int64(fs.Bavail)*int64(fs.Bsize) - left; n > 0 {
		must(t, syscall.Fallocate(int(f.Fd()), 0, 0, n))
	}
	return func() { must(t, os.Remove(path)) }
}

// Others fill the disk: nothing is written before JetStream comes to harm, that is said,
// and when there is room again, everything goes on.
func TestAFullDiskStopsWritesAndNothingElse(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "128m")
	ctx := testContext(t)
	w := open(t, filepath.Join(dir, "state"))
	t.Cleanup(func() { w.Close() })
	attention := func() string {
		for _, a := range w.statusNow(t).Attention {
			if a.Code == api.AttentionSpace {
				return a.Text
			}
		}
		return ""
	}
	if !strings.Contains(attention(), "MiB left") {
		t.Errorf("that little is left is not shown: %q", attention())
	}
	empty := fillUp(t, dir, engine.Reserve/2)
	if _, err := w.op.CreateToken(ctx, api.TokenRequest{}); err == nil || !strings.Contains(err.Error(), "free space there") {
		t.Errorf("a change on a full disk: %v", err)
	}
	for what, err := range map[string]error{
		"a record": w.storage.chunks.create(ctx, newNonce(), chunkRecord{}),
		"a blob":   w.staging.put(ctx, "attachment/"+newNonce(), someBytes(1000)),
	} {
		if err == nil || explain(err, false).Code != wire.CodeNoSpace {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	if _, err := w.eng.JetStream().Publish(ctx, engine.LogSubject(trailName), nil); !errors.Is(err, engine.ErrNoSpace) {
		t.Errorf("an entry of the log on a full disk: %v", err)
	}
	if !strings.Contains(attention(), "free space there") {
		t.Errorf("that it is full is not shown: %q", attention())
	}
	empty()
	w.enrolled(t)
	select {
	case err := <-w.Failed():
		t.Error(err)
	default:
	}
}

// A write that has failed stops JetStream for good: the coordinator ends, with a
// sentence, so that it is started again; not before there is room.
func TestACoordinatorThatCannotWriteAnyMoreEnds(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t, "128m")
	state := filepath.Join(dir, "state")
	ctx := testContext(t)
	w := open(t, state)
	t.Cleanup(func() { w.Close() })
	data := someBytes(chunk.MaxSize)
	name := "chunk/" + chunk.Sum(data).String()
	must(t, w.staging.put(ctx, name, data))
	empty := fillUp(t, dir, 1<<20)
	past, err := jetstream.New(w.eng.Conn()) // who fills a disk in an instant comes past the guard
	must(t, err)
	kv, err := past.KeyValue(ctx, "devices")
	must(t, err)
	for n := range 64 {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		_, err = kv.Put(ctx, fmt.Sprint("x", n), someBytes(512<<10))
		if cancel(); err != nil {
			break
		}
	}
	select {
	case err := <-w.Failed():
		if !strings.Contains(err.Error(), "started again") {
			t.Error(err)
		}
	case <-ctx.Done():
		t.Fatalf("it goes on as if nothing had happened; the write: %v", err)
	}
	w.Close()
	cfg := testConfig(state)
	if c, err := Start(ctx, cfg); !errors.Is(err, engine.ErrNoSpace) {
		if err == nil {
			c.Close()
		}
		t.Errorf("it starts on a full disk: %v", err)
	}
	empty()
	w = open(t, state)
	t.Cleanup(func() { w.Close() })
	if got, err := w.staging.get(ctx, name); err != nil || len(got) != len(data) {
		t.Errorf("what was staged is gone: %d bytes, %v", len(got), err)
	}
	w.enrolled(t)
}
