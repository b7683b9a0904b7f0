package cli

import (
	"bytes"
	"math"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/deimos-edge/deimos/wire"
)

var chartFrom = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// curveOf makes a history of one curve; NaN is a point that was not measured.
func curveOf(step float64, values ...float64) wire.History {
	c := wire.Curve{Unit: "°C"}
	for _, v := range values {
		if math.IsNaN(v) {
			c.Mean = append(c.Mean, nil)
			continue
		}
		c.Mean = append(c.Mean, new(v))
	}
	return wire.History{From: chartFrom, Step: step, Count: len(values), Series: map[string]wire.Curve{"t": c}}
}

func chartOf(t *testing.T, h wire.History, s ChartStyle) []string {
	t.Helper()
	var b bytes.Buffer
	if err := Chart(&b, h, "t", s); err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
}

// TestAxisEnds wherever the history begins and whatever it spans.
func TestAxisEnds(t *testing.T) {
	for _, step := range []float64{0.5, 10, 60, 900, 7200, 86400} {
		for _, late := range []time.Duration{0, time.Millisecond, 3*time.Hour + 4*time.Minute + 5*time.Second, 24*time.Hour - 1} {
			h := curveOf(step, 1, 2, 3, 4, 5, 6, 7, 8, 9)
			h.From = h.From.Add(late)
			ended := make(chan struct{})
			go func() { chartOf(t, h, ChartStyle{Width: 60, Height: 5}); close(ended) }()
			select {
			case <-ended:
			case <-time.After(time.Minute):
				t.Fatalf("no end with a step of %g s from %s", step, h.From)
			}
		}
	}
}

func TestChartShowsLineGapAxisAndTimes(t *testing.T) {
	var values []float64
	for i := range 60 {
		v := float64(i)
		if i >= 20 && i < 40 {
			v = math.NaN()
		}
		values = append(values, v)
	}
	got := strings.Join(chartOf(t, curveOf(60, values...), ChartStyle{Width: 40, Height: 10, ASCII: true}), "\n")
	want := strings.TrimPrefix(`
t  min 0 °C  mean 29.5 °C  max 59 °C  last 59 °C
60 °C +                              :**
      |                         ******
40 °C +                      ***
      |
20 °C +        :**
      |   ******
 0 °C +***
      ++---------------+----------------
                     12:30`, "\n")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestChartFitsItsWidth(t *testing.T) {
	values := make([]float64, 500)
	for i := range values {
		values[i] = 1e6 * math.Sin(float64(i)/40)
	}
	h := curveOf(600, values...)
	for _, width := range []int{1, 40, 80, 120, 300} {
		for _, s := range []ChartStyle{{Width: width, Height: 14}, {Width: width, Height: 3, ASCII: true}} {
			for _, line := range chartOf(t, h, s)[1:] {
				if n := len([]rune(line)); n > max(width, leastChartWidth) {
					t.Errorf("a line of %d characters for %d: %s", n, width, line)
				}
			}
		}
	}
}

func TestBandIsDrawnAroundTheMeanAndDimmedOnlyWithColor(t *testing.T) {
	h := curveOf(60, 5, 5, 5, 5)
	c := h.Series["t"]
	for range 4 {
		c.Min, c.Max = append(c.Min, new(0.0)), append(c.Max, new(10.0))
	}
	h.Series["t"] = c
	plain := strings.Join(chartOf(t, h, ChartStyle{Width: 60, Height: 12}), "\n")
	if strings.Contains(plain, "\x1b") {
		t.Error("a chart without color steers the terminal")
	}
	if !strings.ContainsRune(plain, '⢕') && !strings.ContainsRune(plain, '⡪') {
		t.Errorf("no band of every second dot:\n%s", plain)
	}
	colored := strings.Join(chartOf(t, h, ChartStyle{Width: 60, Height: 12, Color: true}), "\n")
	if !strings.Contains(colored, "\x1b[2m") || strings.Count(colored, "\x1b[2m") != strings.Count(colored, "\x1b[0m") {
		t.Errorf("the band is not dim, or stays so:\n%q", colored)
	}
}

func TestChartOfStrangeCurves(t *testing.T) {
	nan := math.NaN()
	for name, h := range map[string]wire.History{
		"nothing": curveOf(60), "only gaps": curveOf(60, nan, nan), "one": curveOf(60, 7),
		"flat": curveOf(60, 0, 0, 0), "huge": curveOf(60, -1e300, 1e300), "tiny": curveOf(60, 1e-300, 2e-300),
		"beyond": curveOf(60, -1.7e308, 1.7e308, 0), "infinite": curveOf(60, math.Inf(1), 1), "years": curveOf(1e8, 1, 2, 3), "moment": curveOf(0.001, 1, 2, 3), "no step": curveOf(0, 1, 2),
	} {
		for _, s := range []ChartStyle{{Width: 80, Height: 14}, {Width: 80, Height: 14, ASCII: true}} {
			if lines := chartOf(t, h, s); len(lines) == 0 {
				t.Errorf("%s: nothing drawn", name)
			}
		}
	}
}

// What differs by less than can be drawn is flat, and what is never negative has
// no negative axis.
func TestAFlatLineHasAnAxis(t *testing.T) {
	for name, h := range map[string]wire.History{"zero": curveOf(60, 0, 0), "a denormal": curveOf(60, 0, 5e-324), "its negative": curveOf(60, -5e-324, 0), "almost": curveOf(60, 0, 1e-13), "large": curveOf(60, -1e18, -1e18+128)} {
		got := strings.Join(chartOf(t, h, ChartStyle{Width: 60, Height: 10, ASCII: true})[1:], "\n")
		if !strings.Contains(got, "**") || (name == "zero" || name == "a denormal" || name == "almost") && strings.Contains(strings.ReplaceAll(got, "--", ""), "-0") {
			t.Errorf("%s:\n%s", name, got)
		}
	}
}

func TestChartPrintsNothingThatSteersATerminal(t *testing.T) {
	h := curveOf(60, 1, 2)
	c := h.Series["t"]
	c.Unit = "\x1b[2J"
	h.Series = map[string]wire.Curve{"a\x1b]0;x\a": c}
	var b bytes.Buffer
	if err := Chart(&b, h, "a\x1b]0;x\a", ChartStyle{Width: 60, Height: 8}); err != nil {
		t.Fatal(err)
	}
	for _, r := range b.String() {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("printed %q", r)
		}
	}
}

func TestTicksOfBytesDiffer(t *testing.T) {
	h := curveOf(60, 100e9, 100.2e9)
	c := h.Series["t"]
	c.Unit = "B"
	h.Series["t"] = c
	seen := map[string]bool{}
	for _, line := range chartOf(t, h, ChartStyle{Width: 80, Height: 14})[1:] {
		if label, _, ok := strings.Cut(line, "┤"); ok {
			if seen[label] {
				t.Errorf("%s stands twice", label)
			}
			seen[label] = true
		}
	}
	if len(seen) < 3 {
		t.Errorf("ticks %v", seen)
	}
}

func TestSparkline(t *testing.T) {
	h := curveOf(60, 0, 1, 2, 3, math.NaN(), 5, 6, 7)
	if got := Sparkline(h.Series["t"].Mean, 8); got != "▁▂▃▄ ▆▇█" {
		t.Errorf("got %q", got)
	}
	if got := Sparkline(curveOf(60, 3, 3).Series["t"].Mean, 20); got != "▁▁" {
		t.Errorf("got %q", got)
	}
	if got := Sparkline(nil, 20); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestNoChartForWhatIsNoTerminal(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/out")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, ok := ChartFor(f); ok {
		t.Error("a file is taken for a terminal")
	}
}
