package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Without the check, a full disk ends the process with SIGBUS.
func TestAFullDiskIsASentenceAndNotTheEnd(t *testing.T) {
	dir := t.TempDir()
	j, err := openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	e := entry{Order: "one", Seq: 1, Expires: time.Now().Add(time.Hour), Report: []byte("report")}
	if err := j.put(e); err != nil {
		t.Fatal(err)
	}
	j.leave.Store(1 << 62) // no disk has that much free
	e.Order = "two"
	for what, err := range map[string]error{
		"put":   j.put(e),
		"acked": acknowledge(j, []wire.Acked{{Order: "one", Seq: 1}}),
		"floor": j.saveFloor(time.Now()),
	} {
		if err == nil || !strings.Contains(err.Error(), "free some space") {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	if _, ok, err := j.get("two"); ok || err != nil {
		t.Errorf("what was refused is there: %v %v", ok, err)
	}
	if _, ok, err := j.get("one"); !ok || err != nil {
		t.Errorf("what was kept is gone: %v %v", ok, err)
	}
}

// As an agent leaves them that is killed while Badger makes its next log.
func TestLogsThatWereJustMadeCostNothing(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"", "900000.vlog", "90000.mem"} {
		if name != "" {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		j, err := openJournal(dir)
		if err != nil {
			t.Fatalf("beside an empty %s: %v", name, err)
		}
		if name == "" {
			err = j.put(entry{Order: "one", Seq: 1, Expires: time.Now().Add(time.Hour), Report: []byte("report")})
		}
		if err != nil {
			t.Error(err)
		}
		if _, ok, err := j.get("one"); !ok || err != nil {
			t.Errorf("beside an empty %s the entry is gone: %v", name, err)
		}
		if err := j.close(); err != nil {
			t.Error(err)
		}
	}
}
