package health

import (
	"encoding/json"
	"log/slog"
	"reflect"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/board"
)

// Whatever stands in the file, what is made of it is bounded, can be written
// again as it is, and can be judged by.
func FuzzMemory(f *testing.F) {
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := decodeMemory(raw)
		if err != nil && !reflect.DeepEqual(m, newMemory()) {
			t.Fatal("what is damaged was half kept")
		}
		if len(m.Disks) > maxDisks || len(m.Events) > maxEvents || len(m.Writable) > maxWritable || !(m.Run >= 0 && m.Run <= maxRun) {
			t.Fatalf("not bounded: %+v", m)
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeMemory(again)
		if err != nil {
			t.Fatal(err)
		}
		if twice, _ := json.Marshal(back); string(twice) != string(again) {
			t.Fatalf("it changes each time:\n%s\n%s", again, twice)
		}
		r := New(time.Now)
		j := blank("/nowhere", board.Board{}, rigPaths, r, slog.New(slog.DiscardHandler), "boot1")
		j.mem, j.start, j.saved = back, back.Run, back.Run
		j.write = func(string, []byte) error { return nil }
		for range 3 {
			j.Inventory(well())
			j.Telemetry(fine(), nil)
		}
		for _, w := range r.Visible() {
			if len(w.Text) > maxDetail+400 || label(w.Text, 1000) != w.Text {
				t.Errorf("%q", w.Text)
			}
		}
		if _, err := json.Marshal(j.mem); err != nil {
			t.Fatal(err)
		}
	})
}
