package store

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// A disk hangs while the journal of its file system is being written. A write to mapped
// memory would then wait in a page fault for the journal, and the garbage collector
// for the write, and so everybody in this process.
func TestAPutToADiskThatHangsDoesNotHoldUpTheProcess(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	d, hang, answer := slowDisk(t)
	wait := &hasty{least: 200 * time.Millisecond}
	opt := noFloor
	opt.Capacity, opt.SegmentBytes, opt.hooks.patience = 100<<20, 8<<20, wait.patience
	v := open1(t, filepath.Join(d.mount, "store"), opt)
	for range 3 {
		id, data := someChunk(rng, chunk.DefaultSize)
		mustPut(t, v, id, data)
	}
	t.Cleanup(answer) // before all is closed

	hang()
	touch := exec.Command("sh", "-c", `touch "$1" && exec sync -f "$1"`, "sh", filepath.Join(d.mount, "another"))
	if err := touch.Start(); err != nil {
		t.Fatal(err)
	}
	journal := "jbd2/" + filepath.Base(d.device) + "-"
	eventually(t, "the journal waits for the disk", func() bool { return waitsForDisk(t, journal) })

	id, data := someChunk(rng, 50_000)
	wait.hangs.Store(true)
	mustFail(t, v.Put(t.Context(), id, data), wire.CodeUnreachable)
	began := time.Now()
	runtime.GC() // waits until everybody can be stopped
	if took := time.Since(began); took > hangsMost/4 {
		t.Errorf("all of the process stood still for %s", took)
	}
	wait.hangs.Store(false)
	answer()
	if err := touch.Wait(); err != nil {
		t.Error(err)
	}
	eventually(t, "a chunk is taken again", func() bool { return v.Put(t.Context(), id, data) == nil })
	mustHold(t, v, id, data)
}

// waitsForDisk tells whether the kernel's thread whose name begins so is waiting for a
// disk.
func waitsForDisk(t *testing.T, name string) bool {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		_, rest, _ := strings.Cut(string(raw), "(")
		if strings.HasPrefix(rest, name) {
			return strings.Contains(rest, ") D ")
		}
	}
	return false
}
