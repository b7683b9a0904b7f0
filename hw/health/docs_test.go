package health

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

var update = flag.Bool("update", false, "write docs/health.md anew")

const page = "../../docs/health.md"

// The table that owners read is the one that the agent works by.
func TestThePageSaysWhatTheKindsAre(t *testing.T) {
	want := docs()
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("docs/health.md is not what the kinds say; write it anew with\n\tgo test ./hw/health -run %s -update", t.Name())
	}
}

func docs() string {
	var b strings.Builder
	b.WriteString(`# Warnings

What a device finds wrong with itself is shown by ` + "`deimos-agent status`" + `, by its light, and to the fleet manager. Each
warning says what happened, since when, and what to do.

* A warning is shown when it has lasted for the time in *after*, and stays for the time in *stays* after its end, so
  that nothing flickers.
* *follows from* names the warnings beside which this one is not shown, if both are about the same thing: it would only
  repeat them.
* A figure that cannot be read says nothing: it neither makes a warning nor ends one.
* Of one kind at most four are shown, and how many more there are.

`)
	causes := map[Code][]string{}
	for _, k := range kinds {
		for _, c := range k.Hides {
			causes[c] = append(causes[c], "`"+string(k.Code)+"`")
		}
	}
	b.WriteString("| code | title | severity | after | stays | follows from | what to do |\n|---|---|---|---|---|---|---|\n")
	sorted := slices.Clone(kinds)
	slices.SortStableFunc(sorted, func(a, b Kind) int { return rank[b.Severity] - rank[a.Severity] })
	for _, k := range sorted {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s | %s |\n", k.Code, k.Title, k.Severity,
			spell(k.After, "at once"), spell(k.Hold, ""), strings.Join(causes[k.Code], ", "), k.Todo)
	}
	fmt.Fprintf(&b, `
Severity is what it is as a rule: %s, %s or %s. A warning can be worse than its kind, such as a disk that is gone with
chunks on it.

## How the machine is judged

| what | when it is wrong | when it is well again |
|---|---|---|
| a disk fails | it says so itself; or bad sectors or media errors have grown within %.0f days (critical from %d on); or sectors cannot be read | two probes without |
| a disk wears out | %d%% of its rated life are used, or %d%% of the spare blocks are left, or at the rate of late its life ends within %d days | below %d%%; %d%%; more than %d days |
| a disk is slow | reads, writes or flushes take %d times as long as is usual for it, and at least 50 ms (SSD), 150 (eMMC), 300 (hard disk) or 500 (SD card, USB), %d samples in a row | below %d times, as often |
| a disk hangs | a request has been under way for %s and none was done; or it did not answer a probe | it does something |
| a disk is gone | it was there before, with a serial number, is not removable or held chunks, and a probe or %d samples do not have it | it returns, or it is forgotten |
| a filesystem is full | below %d%% and %s free; where volumes fill it on purpose, also below %d%% of their floor | a fifth more |
| it is too hot | %d samples of a processor, a disk or a thermal zone above the board's limit, or the sensor's own | %d °C below |
| memory is short | programs wait for it %d%% of the time, all of them %d%%, or less than %d%% and %s are available, %d samples in a row | %d%%; %d%%; half as much again |

The forecast of a disk's life is made from when its wear has gone up, by the time that the device and the disk were running: the
wall clock may be wrong. There is none before two such steps are a week apart. A disk that wears out at a steady 0.1%% a day has
over two years and gets no warning.

What is usual for a disk is learned from 128 samples with work in them, and then follows slowly. What is more than %d times as long is
not learned. A disk that moves a quarter of the most that it ever did, and %s a second, is at work and not slow.

The device remembers its disks and what is usual for them in %s of its state folder, below health. It is written every %s
and at the end. If it is damaged, it is begun anew.
`, wire.Critical, wire.Trouble, wire.Info,
		badWindow/24, manyBad,
		wornHigh, spareLow, forecastDays, wornLow, spareGood, forecastBack,
		slowTimes, slowInARow, fineTimes,
		spell(hungInARow, ""), goneInARow,
		int(fullShare*100), size(fullBytes), int(floorShare*100),
		hotInARow, coolBelow,
		someHigh, fullHigh, int(leastShare*100), size(leastAvailable), memoryInARow, someLow, fullLow,
		learnBelow, size(busyBytes), "`"+memoryName+"`", spell(saveEvery, ""))
	return b.String()
}

func spell(d time.Duration, zero string) string {
	switch {
	case d == 0:
		return zero
	case d >= time.Hour:
		return fmt.Sprintf("%.0f h", d.Hours())
	case d >= time.Minute:
		return fmt.Sprintf("%.0f min", d.Minutes())
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}
