package hw

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestSampleAgreesWithThisMachine(t *testing.T) {
	dir := t.TempDir()
	s, err := NewSampler(SampleOptions{Data: dir, Limit: unhurried})
	must(t, err)
	got, err := s.Sample(t.Context())
	must(t, err)

	var st syscall.Statfs_t
	must(t, syscall.Statfs(dir, &st))
	if got.Data == nil || got.Data.Total != st.Blocks*uint64(st.Frsize) || got.Data.Used+got.Data.Free > got.Data.Total {
		t.Errorf("data %+v", got.Data)
	}
	inv := probe(t, Options{})
	if got.MemoryTotal != inv.Memory.Total || got.MemoryUsed+got.MemoryAvailable != got.MemoryTotal {
		t.Errorf("memory %+v", got)
	}
	if got.Load1 == nil || *got.Load1 < 0 {
		t.Errorf("load %v", got.Load1)
	}
	if a := got.Agent; a.RSS < 1<<20 || a.Anonymous == 0 || a.Anonymous > a.RSS || a.CPUSeconds <= 0 {
		t.Errorf("the agent uses %+v", a)
	}
	raw, err := json.Marshal(got)
	must(t, err)
	if len(raw) > 4096 {
		t.Errorf("a sample of this machine has %d bytes; it travels in every heartbeat", len(raw))
	}
}

func TestRatesAreBetweenSamples(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	stat := func(user, idle, iowait, steal int) {
		put(t, root, "proc/stat", fmt.Sprintf("cpu  %d 0 0 %d %d 0 0 %d 0 0\n", user, idle, iowait, steal))
	}
	percent := func(s *Sampler) *float64 {
		got, err := s.Sample(t.Context())
		must(t, err)
		return got.CPUPercent
	}
	stat(1000, 9000, 0, 0)
	s, err := NewSampler(SampleOptions{Root: root, Limit: unhurried})
	must(t, err)
	if v := percent(s); v != nil {
		t.Errorf("%v%% out of no time", *v)
	}
	stat(1300, 9500, 100, 100) // 300 of 1000 ticks
	if v := percent(s); v == nil || *v != 30 {
		t.Errorf("got %v, want 30", show(v))
	}
	stat(1300, 9600, 100, 100)
	if v := percent(s); v == nil || *v != 0 {
		t.Errorf("got %v, want 0: the sample before counts, not the first", show(v))
	}
	stat(10, 10, 0, 0) // counters that ran backwards
	if v := percent(s); v != nil {
		t.Errorf("%v%% out of counters that ran backwards", *v)
	}
	stat(60, 60, 0, 0)
	if v := percent(s); v == nil || *v != 50 {
		t.Errorf("got %v, want 50 after the counters began anew", show(v))
	}
}

func show(v *float64) any {
	if v == nil {
		return nil
	}
	return *v
}

func TestSampleNamesTemperaturesAsTheInventory(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	put(t, root, "sys/class/hwmon/hwmon2/temp1_input", "200000\n")
	s, err := NewSampler(SampleOptions{Root: root, Limit: unhurried})
	must(t, err)
	got, err := s.Sample(t.Context())
	must(t, err)
	if len(got.Temperatures) != 1 || got.Temperatures["cpu-thermal"] != 48.199 {
		t.Errorf("got %v", got.Temperatures)
	}
	if len(got.Notes) != 1 || got.Notes[0].Code != NoteImplausible {
		t.Errorf("notes %+v", got.Notes)
	}
	if *got.Load1 != 0.42 || got.MemoryTotal != 3884360*1024 {
		t.Errorf("got %v, %d", *got.Load1, got.MemoryTotal)
	}
}

func TestHungSensorDoesNotHangTheHeartbeat(t *testing.T) {
	s, err := NewSampler(SampleOptions{Root: plant(t, "raspberry-pi-4.tree"), Limit: unhurried})
	must(t, err)
	release := make(chan struct{})
	s.prober.slow = func(name string) {
		if strings.HasSuffix(name, "thermal_zone0/temp") {
			<-release
		}
	}
	patient := s.prober.limit
	s.prober.limit = hurried / 4
	first, err := s.Sample(t.Context())
	must(t, err)
	s.prober.limit = patient
	close(release)
	waitForHung(t)
	second, err := s.Sample(t.Context())
	must(t, err)
	if len(first.Notes) == 0 || first.Notes[0].Code != NoteTimeout || first.MemoryTotal == 0 {
		t.Errorf("got %+v", first)
	}
	if len(second.Temperatures) != 2 {
		t.Errorf("the sensor answers again and is not read: %+v", second)
	}
}

func TestMissingDataPathIsANote(t *testing.T) {
	s, err := NewSampler(SampleOptions{Data: filepath.Join(t.TempDir(), "gone"), Limit: unhurried})
	must(t, err)
	got, err := s.Sample(t.Context())
	must(t, err)
	if got.Data != nil || len(got.Notes) != 1 || got.Notes[0].Section != "data" {
		t.Errorf("got %+v", got)
	}
}

func TestCanceledSampleIsAnError(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Sample(ctx); err != context.Canceled {
		t.Errorf("got %v", err)
	}
}

func BenchmarkProbe(b *testing.B) {
	for b.Loop() {
		if _, err := Probe(b.Context(), Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSample(b *testing.B) {
	s, err := NewSampler(SampleOptions{Data: b.TempDir()})
	must(b, err)
	for b.Loop() {
		if _, err := s.Sample(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
