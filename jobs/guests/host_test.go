//go:build linux

package guests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/jobs/internal/wasmtest"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/tetratelabs/wazero"
)

// file makes one that a job can be given.
func file(t *testing.T, content []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestWhatGuestsAreToldOfTheHostIsTrue runs one guest for the Go package and one for the
// C header against the real host: they call all that there is, and see the same.
func TestWhatGuestsAreToldOfTheHostIsTrue(t *testing.T) {
	for _, guest := range []string{"hosted-go", "hosted-c"} {
		t.Run(guest, func(t *testing.T) {
			module, err := filepath.Join(t.TempDir(), "hosted.wasm"), error(nil)
			if folder := filepath.Join("testdata", guest); guest == "hosted-c" {
				needsClang(t)
				err = wasmtest.BuildC(filepath.Join(folder, "main.c"), module)
			} else {
				err = wasmtest.Build(folder, module)
			}
			if err != nil {
				t.Fatal(err)
			}
			var copied bytes.Buffer
			var kept, said []string
			var progress []float64
			const data = "0123456789"
			s := job(guest, nil)
			s.Module = module
			s.Live = true // else it does not see that a checkpoint was not kept
			s.Inputs = []sandbox.Input{{Name: "data", Size: int64(len(data)), File: file(t, []byte(data))}}
			s.Outputs = []sandbox.Output{{Name: "copy", To: &copied}}
			s.OnProgress = func(share float64) { progress = append(progress, share) }
			s.OnLog = func(level int, text string) { said = append(said, fmt.Sprint(level, " ", text)) }
			s.OnCheckpoint = func(_ int64, r io.Reader) error {
				state, err := io.ReadAll(r)
				kept = append(kept, string(state))
				if len(kept) == 2 {
					return errors.New("the disk is full")
				}
				return err
			}
			const seen = "should checkpoint %v\ndata has 10 bytes, at 3: 34567\nat its end 2 true\n" +
				"sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\nkept true\nkept false\n"
			res, err := runner.Run(t.Context(), s)
			if want := "restored nothing\n" + fmt.Sprintf(seen, false); err != nil || string(res.Output) != want {
				t.Errorf("%v; it saw\n%swant\n%s%s", err, res.Output, want, res.Stderr)
			}
			if copied.String() != data || !slices.Equal(kept, []string{"first", "second"}) ||
				!slices.Equal(said, []string{"2 wärning"}) || !slices.Equal(progress, []float64{0.25, 1}) {
				t.Errorf("%q was copied, %q kept, %q said, progress %v", &copied, kept, said, progress)
			}

			// Again, from a checkpoint, and about to be stopped.
			s.Checkpoint, s.CheckpointBytes = file(t, []byte("first")), 5
			s.Control = sandbox.NewControl()
			s.Control.AskCheckpoint()
			res, err = runner.Run(t.Context(), s)
			if want := "restored first\n" + fmt.Sprintf(seen, true); err != nil || !strings.HasPrefix(string(res.Output), "restored first\nshould checkpoint true\n") {
				t.Errorf("%v; it saw\n%swant\n%s", err, res.Output, want)
			}
		})
	}
}

// TestGuestsImportWhatTheyCallAndNoMore: with an import that a host lacks a module does
// not start, so those that need nothing of the device must run anywhere.
func TestGuestsImportWhatTheyCallAndNoMore(t *testing.T) {
	rt := wazero.NewRuntimeWithConfig(t.Context(), wazero.NewRuntimeConfigInterpreter())
	defer rt.Close(context.Background())
	want := map[string][]string{"kmeans": {"checkpoint", "log", "progress", "restore", "should_checkpoint"}}
	guests := slices.Clone(goGuests)
	if noClang == nil {
		guests = append(guests, cGuests...)
	}
	for _, guest := range guests {
		module, err := os.ReadFile(filepath.Join(built, guest+".wasm"))
		if err != nil {
			t.Fatal(err)
		}
		code, err := rt.CompileModule(t.Context(), module)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range code.ImportedFunctions() {
			if from, name, _ := f.Import(); from == "deimos_v1" {
				got = append(got, name)
			} else if from != "wasi_snapshot_preview1" {
				t.Errorf("%s imports %s.%s", guest, from, name)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want[guest]) {
			t.Errorf("%s imports %q of the host, want %q", guest, got, want[guest])
		}
	}
}

func TestNamedInputsAndOutputsGiveWhatTheStandardOnesDo(t *testing.T) {
	for guest, args := range map[string][]string{"textstats": nil, "kmeans": {"-k", "2"}, "tabulate": {"-where", "`2` > 3"}} {
		if guest == "kmeans" && noClang != nil {
			continue
		}
		in := []byte("1,2\n3,4\n1,3\n9,9\n")
		want := run(t, guest, in, args...)
		var out bytes.Buffer
		s := job(guest, nil, append(args, "-in", "data.csv", "-out", "result")...)
		s.Inputs = []sandbox.Input{{Name: "data.csv", Size: int64(len(in)), File: file(t, in)}}
		s.Outputs = []sandbox.Output{{Name: "result", To: &out}}
		res, err := runner.Run(t.Context(), s)
		if err != nil {
			t.Fatalf("%s: %v", guest, err)
		}
		if !bytes.Equal(out.Bytes(), want) || len(res.Output) > 0 {
			t.Errorf("%s wrote %q to its output and %q beside, want %q", guest, &out, res.Output, want)
		}
	}
}

// TestKmeansGoesOnFromItsCheckpoint stops a job at each of its checkpoints in turn and
// starts it again with what was kept.
func TestKmeansGoesOnFromItsCheckpoint(t *testing.T) {
	needsClang(t)
	const most = 40
	points := clouds(rand.New(rand.NewPCG(testenv.Seed(t), 4)), 2000, 3)
	order := func(seed int) sandbox.Spec {
		s := job("kmeans", asCSV(points, "\n"), "-k", "12", "-seed", strconv.Itoa(seed), "-iterations", strconv.Itoa(most))
		s.OnCheckpoint = func(_ int64, r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }
		return s
	}
	var kept [][]byte
	keep := func(_ int64, r io.Reader) error {
		state, err := io.ReadAll(r)
		kept = append(kept, state)
		return err
	}
	whole := order(1)
	whole.OnCheckpoint = keep
	res, err := runner.Run(t.Context(), whole)
	if err != nil {
		t.Fatal(err)
	}
	want := res.Output
	if len(kept) < 3 {
		t.Fatalf("%d checkpoints are too few for a test: %s", len(kept), want)
	}
	for at := range kept {
		ctx, kill := context.WithCancel(t.Context())
		s, seen := order(1), 0
		var state []byte
		s.OnCheckpoint = func(_ int64, r io.Reader) (err error) {
			if seen++; seen-1 == at {
				state, err = io.ReadAll(r)
				kill()
				return err
			}
			_, err = io.Copy(io.Discard, r)
			return err
		}
		if _, err := runner.Run(ctx, s); !errors.Is(err, context.Canceled) {
			t.Fatalf("it was not stopped: %v", err)
		}
		kill()
		// Again from the beginning, with what was kept.
		s = order(1)
		s.Checkpoint, s.CheckpointBytes = file(t, state), int64(len(state))
		first := -1.0
		s.OnProgress = func(share float64) {
			if first < 0 {
				first = share
			}
		}
		s.OnLog = func(_ int, text string) { t.Errorf("checkpoint %d: it says %q", at, text) }
		res, err := runner.Run(t.Context(), s)
		if err != nil || !bytes.Equal(res.Output, want) {
			t.Errorf("from checkpoint %d: %v\n%.200s\nwithout an interruption\n%.200s", at, err, res.Output, want)
		}
		if first < float64(at+1)/most {
			t.Errorf("from checkpoint %d it began again at %v", at, first)
		}
	}
	// A checkpoint of another order, a damaged one, and one that is not kept: no harm.
	other := order(2)
	var warned []string
	other.OnLog = func(_ int, text string) { warned = append(warned, text) }
	res, err = runner.Run(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	want = res.Output
	damaged := slices.Clone(kept[0])
	damaged[0] ^= 1
	for what, state := range map[string][]byte{"of another order": kept[1], "damaged": damaged} {
		warned = nil
		other.Checkpoint, other.CheckpointBytes = file(t, state), int64(len(state))
		res, err := runner.Run(t.Context(), other)
		if err != nil || !bytes.Equal(res.Output, want) || len(warned) != 1 {
			t.Errorf("with a checkpoint %s: %v, %q\n%.200s\nwant\n%.200s", what, err, warned, res.Output, want)
		}
	}
	other.Checkpoint, warned, other.Live = nil, nil, true // else it does not see that
	other.OnCheckpoint = func(int64, io.Reader) error { return errors.New("the disk is full") }
	if res, err := runner.Run(t.Context(), other); err != nil || !bytes.Equal(res.Output, want) || len(warned) != 1 {
		t.Errorf("no checkpoint was kept: %v, %q\n%.200s\nwant\n%.200s", err, warned, res.Output, want)
	}
}
