package cli

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

func TestAHistoryTellsWhatIsLeftOut(t *testing.T) {
	h := curveOf(60, 1, 2, 3)
	for i := range 20 {
		h.LeftOut = append(h.LeftOut, fmt.Sprintf("disk%d\n\t\x1b[2J", i))
	}
	for _, draw := range []bool{false, true} {
		var b bytes.Buffer
		if err := WriteHistory(&b, h, draw, ChartStyle{Width: 60, Height: 8}); err != nil {
			t.Fatal(err)
		}
		if s := b.String(); !strings.Contains(s, "Left out") || !strings.Contains(s, "disk15") || strings.Contains(s, "disk16") || !strings.Contains(s, "and 4 more") || strings.ContainsAny(s, "\x1b\t") {
			t.Errorf("drawn %v:\n%s", draw, s)
		}
	}
}

func TestANameIsOneCell(t *testing.T) {
	h := curveOf(60, 1, 2)
	h.Series = map[string]wire.Curve{"a\tb\nc\x1b": {Unit: "\n\t", Mean: h.Series["t"].Mean}}
	var b bytes.Buffer
	if err := WriteHistory(&b, h, false, ChartStyle{}); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(b.String(), "\n"); n != 4 || strings.Contains(b.String(), "\x1b") {
		t.Errorf("%d lines:\n%q", n, b.String())
	}
}

func TestASummaryForOldTerminalsHasNoCurve(t *testing.T) {
	var b bytes.Buffer
	if err := WriteHistory(&b, curveOf(60, 1, 2), false, ChartStyle{ASCII: true}); err != nil || strings.Contains(b.String(), "CURVE") || strings.ContainsAny(b.String(), "▁█") {
		t.Errorf("%v\n%s", err, b.String())
	}
}

func TestItIsKnownWhereMeasuringBegan(t *testing.T) {
	gap := math.NaN()
	if _, ok := MostlyEmpty(curveOf(60, 1, gap, gap, gap)); ok {
		t.Error("one that begins at once")
	}
	if _, ok := MostlyEmpty(curveOf(60, gap, gap)); ok {
		t.Error("one without a point")
	}
	if at, ok := MostlyEmpty(curveOf(60, gap, gap, gap, 1)); !ok || !at.Equal(chartFrom.Add(3*time.Minute)) {
		t.Errorf("%s %v", at, ok)
	}
}
