//go:build !wasip1

package deimos

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/iotest"
)

// start gives the test a device of its own.
func start(t *testing.T, d *Device) {
	before, beforeSaid := Local, said
	Local, said = d, -1
	t.Cleanup(func() { Local, said = before, beforeSaid })
}

func TestACheckpointIsWhatIsRestored(t *testing.T) {
	start(t, &Device{})
	if state, ok := Restore(); ok {
		t.Errorf("restored %q of nothing", state)
	}
	for _, want := range []string{"first", "", "the third"} {
		if err := Checkpoint([]byte(want)); err != nil {
			t.Fatal(err)
		}
		if state, ok := Restore(); !ok || string(state) != want {
			t.Errorf("restored %q, %v; want %q", state, ok, want)
		}
	}
	Local.Refuse = errors.New("no room")
	if err := Checkpoint([]byte("lost")); !errors.Is(err, Local.Refuse) {
		t.Errorf("a checkpoint that was not kept: %v", err)
	}
	if state, _ := Restore(); string(state) != "the third" {
		t.Errorf("it took the place of the former: %q", state)
	}
	Local.Refuse = nil
	if err := Checkpoint(make([]byte, MaxCheckpoint+1)); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a checkpoint too large: %v", err)
	}
}

func TestAnInputIsReadAtAnyPlace(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 1000)
	start(t, &Device{Inputs: map[string][]byte{"data": content}})
	in, err := OpenInput("data")
	if err != nil {
		t.Fatal(err)
	}
	if err := iotest.TestReader(io.NewSectionReader(in, 0, in.Size()), content); err != nil {
		t.Error(err)
	}
	if n, err := in.ReadAt(make([]byte, 1), in.Size()+5); n != 0 || err != io.EOF {
		t.Errorf("beyond its end: %d, %v", n, err)
	}
	if _, err := in.ReadAt(make([]byte, 1), -1); err == nil {
		t.Error("it was read before its beginning")
	}
	if _, err := OpenInput("other"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an input that is not there: %v", err)
	}
	if _, err := In("other"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an input that is not there: %v", err)
	}
}

func TestAnOutputIsThereOnceItIsClosed(t *testing.T) {
	start(t, &Device{Outputs: map[string][]byte{"result": nil}})
	if _, err := Out("other"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an output that the order does not name: %v", err)
	}
	w, err := Out("result")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "42"); err != nil || Local.Outputs["result"] != nil {
		t.Errorf("%v, %q before it is closed", err, Local.Outputs["result"])
	}
	if err := w.Close(); err != nil || string(Local.Outputs["result"]) != "42" {
		t.Errorf("%v, %q", err, Local.Outputs["result"])
	}
}

func TestProgressIsInThousandths(t *testing.T) {
	start(t, &Device{})
	nan := 0.0
	nan /= nan
	for done, want := range map[float64]int32{-1: 0, 0: 0, 0.5: 500, 0.9999: 999, 1: 1000, 7: 1000, nan: 0} {
		Progress(done)
		if Local.Permille != want {
			t.Errorf("%v is %d thousandths, want %d", done, Local.Permille, want)
		}
	}
}
