//go:build linux

package guests

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/jobs/internal/wasmtest"
	"github.com/deimos-edge/deimos/jobs/sandbox"
)

// TestEveryModuleGivesTheSameBytesOnArm64 runs an arm64 worker under emulation. Each
// module of this folder has an order here.
func TestEveryModuleGivesTheSameBytesOnArm64(t *testing.T) {
	if testing.Short() {
		t.Skip("compiling Go modules under emulation takes minutes; run without -short")
	}
	dir := t.TempDir()
	worker := filepath.Join(dir, "worker")
	if err := wasmtest.Worker("arm64", worker); err != nil {
		t.Fatal(err)
	}
	// The worker's environment is empty, and so is this shell's.
	start := filepath.Join(dir, "start")
	qemu := testenv.Tool(t, "qemu-aarch64-static", "qemu-user-static")
	if err := os.WriteFile(start, fmt.Appendf(nil, "#!/bin/sh\nexec %s %s \"$@\"\n", qemu, worker), 0o700); err != nil {
		t.Fatal(err)
	}
	there := sandbox.Runner{Executable: start}
	orders := archOrders(t)
	modules, err := filepath.Glob(filepath.Join(wasmtest.Guests(), "*", "main.*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range modules {
		guest := filepath.Base(filepath.Dir(m))
		if slices.Contains(cGuests, guest) && noClang != nil {
			t.Logf("%s: %v", guest, noClang)
			continue
		}
		if len(orders[guest]) == 0 {
			t.Errorf("%s is run on one architecture only: give it an order here", guest)
		}
		for i, spec := range orders[guest] {
			spec.Limits.CPUSeconds, spec.Limits.WallSeconds = 900, 900 // emulation, on a machine that may be busy
			t.Run(fmt.Sprintf("%s/%d", guest, i), func(t *testing.T) {
				ours, err := runner.Run(t.Context(), spec)
				if err != nil {
					t.Fatalf("%v (stderr %q)", err, ours.Stderr)
				}
				theirs, err := there.Run(t.Context(), spec)
				if err != nil {
					t.Fatalf("%v (stderr %q)", err, theirs.Stderr)
				}
				if !strings.HasSuffix(theirs.Engine, " compiler arm64") {
					t.Errorf("that was no arm64: %s", theirs.Engine)
				}
				if !bytes.Equal(ours.Output, theirs.Output) {
					t.Errorf("%s: %.500q\n%s: %.500q", ours.Engine, ours.Output, theirs.Engine, theirs.Output)
				}
				t.Logf("%d bytes; %s: %v of CPU; %s: %v", len(ours.Output), ours.Engine, ours.CPU, theirs.Engine, theirs.CPU)
			})
		}
	}
}

// archOrders are jobs of each module that go through most of its code.
func archOrders(t *testing.T) map[string][]sandbox.Spec {
	text := textInputs(t)["alphabets"]
	points := clouds(rand.New(rand.NewPCG(testenv.Seed(t), 3)), 3000, 7)
	all, _ := pictures(t)
	orders := map[string][]sandbox.Spec{
		"sha256sum": {job("sha256sum", text)},
		"wordcount": {job("wordcount", text)},
		"textstats": {job("textstats", text), job("textstats", text, "-letters", "-top", "1000")},
		"thumbnail": {
			job("thumbnail", all["progressive 4:4:4"], "-size", "100"),
			job("thumbnail", all["clear PNG"], "-size", "50"),
			job("thumbnail", all["baseline 4:2:0"], "-strip"),
		},
		"tabulate": {
			job("tabulate", sales(t, 3000), "-where", `city != "Bonn" && n > 3`, "-by", "city", "-agg", "count,sum(price),mean(price),max(n)"),
			job("tabulate", []byte(`{"a":{"b":1e3,"c":"ä"}}`+"\n"), "-format", "json", "-where", "a.b < 1000.5", "-select", "a.c,a.b"),
		},
	}
	if noClang == nil {
		orders["kmeans"] = []sandbox.Spec{job("kmeans", asCSV(points, "\n"), "-k", "9"), job("kmeans", asFloats(points), "-k", "5", "-f32", "7")}
	}
	return orders
}
