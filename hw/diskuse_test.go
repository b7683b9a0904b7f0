package hw

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sampled is a sampler of a recorded machine whose clock the test moves.
func sampled(t *testing.T, root string) (*Sampler, *time.Time) {
	t.Helper()
	s, err := NewSampler(SampleOptions{Root: root, Limit: unhurried})
	must(t, err)
	now := time.Now()
	s.now = func() time.Time { return now }
	return s, &now
}

func sample(t *testing.T, s *Sampler) Telemetry {
	t.Helper()
	got, err := s.Sample(t.Context())
	must(t, err)
	return got
}

// diskstats writes one line for each disk: reads, sectors, ms, writes, sectors,
// ms, in flight, busy ms, flushes, flush ms.
func diskstats(t *testing.T, root string, disks map[string][10]uint64) {
	t.Helper()
	text := "   7       0 loop0 134 0 2788 30 23 71 8972 4 0 16 37 2 0 131074 0 10 2\n nonsense\n"
	for name, v := range disks {
		text += fmt.Sprintf("   8       0 %s %d 0 %d %d %d 0 %d %d %d %d 0 0 0 0 0 %d %d\n", name, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9])
	}
	put(t, root, "proc/diskstats", text)
}

func TestDiskLatencyIsTheMeanOfTheRequestsSinceTheSampleBefore(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	s, now := sampled(t, root)
	diskstats(t, root, map[string][10]uint64{"sda": {100, 1000, 500, 10, 80, 900, 0, 2000, 5, 50}, "sda1": {1}})
	first := sample(t, s).Disks
	if len(first) != 1 {
		t.Fatalf("got %v; a partition or loop device is no disk", first)
	}
	if d := first["sda"]; d.ReadMS != nil || d.Busy != nil || d.ReadBytes != 512000 || d.WrittenBytes != 40960 || d.Errors != nil {
		t.Errorf("the first sample has rates: %+v", d)
	}
	*now = now.Add(10 * time.Second)
	diskstats(t, root, map[string][10]uint64{"sda": {110, 1100, 620, 10, 80, 900, 3, 4500, 7, 90}})
	d := sample(t, s).Disks["sda"]
	if show(d.ReadMS) != 12.0 || d.WriteMS != nil || show(d.FlushMS) != 20.0 || show(d.Busy) != 25.0 || d.InFlight != 3 {
		t.Errorf("read %v, write %v, flush %v, busy %v, in flight %d", show(d.ReadMS), show(d.WriteMS), show(d.FlushMS), show(d.Busy), d.InFlight)
	}
	// Two that ask at once do not cut each other's rates short.
	*now = now.Add(time.Millisecond)
	if d := sample(t, s).Disks["sda"]; d.Busy != nil {
		t.Errorf("busy %v of a millisecond", show(d.Busy))
	}
	*now = now.Add(10*time.Second - time.Millisecond)
	diskstats(t, root, map[string][10]uint64{"sda": {120, 1100, 640, 10, 80, 900, 0, 14500, 7, 90}})
	if d := sample(t, s).Disks["sda"]; show(d.ReadMS) != 2.0 || show(d.Busy) != 100.0 {
		t.Errorf("read %v, busy %v", show(d.ReadMS), show(d.Busy))
	}
}

func TestACounterThatWentBackGivesNoRate(t *testing.T) {
	const end = 1 << 32
	before := [10]uint64{1000, 9000, end - 100, 1000, 9000, 5000, 0, end - 1000, 10, 10}
	for name, c := range map[string]struct {
		after [10]uint64
		read  any
	}{
		"wrapped at 2^32":    {[10]uint64{1010, 9000, 100, 1000, 9000, 5000, 0, 4000, 10, 10}, 20.0},
		"one went back":      {[10]uint64{1010, 9000, end - 50, 999, 9000, 5000, 0, end - 10, 10, 10}, nil},
		"all began anew":     {[10]uint64{5, 100, 3, 5, 9, 5, 0, 9, 1, 1}, nil},
		"a mean of years":    {[10]uint64{1001, 9000, 1 << 29, 1000, 9000, 5000, 0, 500, 10, 10}, nil},
		"sectors went back":  {[10]uint64{1010, 8000, end - 50, 1000, 9000, 5000, 0, end - 10, 10, 10}, nil},
		"more than believed": {[10]uint64{1010, 1 << 60, end - 50, 1000, 9000, 5000, 0, end - 10, 10, 10}, nil},
	} {
		root := plant(t, "raspberry-pi-4.tree")
		s, now := sampled(t, root)
		diskstats(t, root, map[string][10]uint64{"sda": before})
		sample(t, s)
		*now = now.Add(10 * time.Second)
		diskstats(t, root, map[string][10]uint64{"sda": c.after})
		d := sample(t, s).Disks["sda"]
		if show(d.ReadMS) != c.read {
			t.Errorf("%s: read %v, want %v", name, show(d.ReadMS), c.read)
		}
		for _, v := range []*float64{d.ReadMS, d.WriteMS, d.FlushMS, d.Busy} {
			if v != nil && (*v < 0 || *v > 1e7) {
				t.Errorf("%s: %v", name, *v)
			}
		}
	}
}

func TestAnotherDiskUnderTheSameNameHasNoPast(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	s, now := sampled(t, root)
	diskstats(t, root, map[string][10]uint64{"sda": {100, 1000, 500}})
	sample(t, s)
	*now = now.Add(10 * time.Second)
	// Its counters are larger than the old one's were; only sysfs tells.
	at, err := filepath.EvalSymlinks(filepath.Join(root, "sys/block/sda"))
	must(t, err)
	must(t, os.Rename(at, at+".gone"))
	must(t, os.CopyFS(at, os.DirFS(at+".gone")))
	diskstats(t, root, map[string][10]uint64{"sda": {200, 2000, 5000}})
	if d := sample(t, s).Disks["sda"]; d.ReadMS != nil || d.ReadBytes != 2000*512 {
		t.Errorf("got %+v", d)
	}
	*now = now.Add(10 * time.Second)
	diskstats(t, root, map[string][10]uint64{"sda": {300, 2000, 5200}})
	if d := sample(t, s).Disks["sda"]; show(d.ReadMS) != 2.0 {
		t.Errorf("got %+v", d)
	}
}

func TestErrorsOfTheDiskAndItsFilesystemsAreCounted(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	diskstats(t, root, map[string][10]uint64{"sda": {}, "mmcblk0": {}})
	put(t, root, "sys/block/sda/device/ioerr_cnt", "0x1f\n")
	put(t, root, "sys/fs/ext4/sda/errors_count", "3\n")
	s, _ := sampled(t, root)
	got := sample(t, s).Disks
	if e, io := got["sda"].Errors, got["sda"].IOErrors; e == nil || *e != 3 || io == nil || *io != 31 {
		t.Errorf("got %v", got["sda"])
	}
	if d := got["mmcblk0"]; d.Errors != nil || d.IOErrors != nil {
		t.Error("a disk that counts nothing has a count")
	}
	// A counter that does not answer costs itself.
	s, _ = sampled(t, root)
	s.prober.limit = hurried / 4
	release := make(chan struct{})
	s.prober.slow = func(name string) {
		if strings.HasSuffix(name, "ioerr_cnt") {
			<-release
		}
	}
	d, ok := sample(t, s).Disks["sda"]
	close(release)
	waitForHung(t)
	if !ok || d.Errors != nil || d.IOErrors != nil {
		t.Errorf("got %+v", d)
	}
}

func TestAThousandDisksAreSampledInTime(t *testing.T) {
	root := t.TempDir()
	disks := map[string][10]uint64{}
	for i := range 1000 {
		name := fmt.Sprintf("sd%d", i)
		must(t, os.MkdirAll(filepath.Join(root, "sys/block", name, "device"), 0o755))
		disks[name] = [10]uint64{uint64(i), 8, 8}
	}
	diskstats(t, root, disks)
	s, _ := sampled(t, root)
	got := sample(t, s)
	if len(got.Disks) != 1000 {
		t.Errorf("%d disks", len(got.Disks))
	}
	if n := len(got.Series()); n > MaxSeries {
		t.Errorf("%d series", n)
	}
}

func FuzzDiskstats(f *testing.F) {
	f.Add([]byte("   8       0 sda 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n"))
	f.Add([]byte("8 0 sda 1 2 3 4 5 6 7 8 9 10 11\n8 0 sdb -1 18446744073709551616\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var last diskStat
		parseDiskstats(raw, func(_ string, now diskStat) {
			var u DiskUse
			u.rates(now, last, time.Second)
			for _, v := range []*float64{u.ReadMS, u.WriteMS, u.FlushMS, u.Busy} {
				if v != nil && !(*v >= 0 && *v <= float64(longestRequest.Milliseconds())) {
					t.Errorf("%v of %+v", *v, now)
				}
			}
			last = now
		})
	})
}

func TestPressureIsThatOfTenSeconds(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	s, _ := sampled(t, root)
	if p := sample(t, s).Pressure; p != nil {
		t.Errorf("a kernel without pressure tells %+v", p)
	}
	put(t, root, "proc/pressure/memory", "some avg10=12.50 avg60=0.00 avg300=0.00 total=310115773\nfull avg10=3.25 avg60=0.00 avg300=0.00 total=282076298\n")
	put(t, root, "proc/pressure/cpu", "some avg10=40.00 avg60=0.00 avg300=0.00 total=1\n")
	put(t, root, "proc/pressure/io", "some avg10=2.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=1\n")
	if p := sample(t, s).Pressure; p == nil || *p != (Pressure{12.5, 3.25, 40, 2, 1}) {
		t.Errorf("got %+v", p)
	}
	for _, bad := range []string{"", "some\n", "some avg10=-1\n", "some avg10=NaN\n", "some avg10=101\n"} {
		put(t, root, "proc/pressure/io", bad)
		if p := sample(t, s).Pressure; p != nil {
			t.Errorf("%q makes %+v", bad, p)
		}
	}
}

func TestThrottlingIsToldByEachKindOfBoard(t *testing.T) {
	say := func(v *bool) string {
		if v == nil {
			return "-"
		}
		return fmt.Sprint(*v)
	}
	const pi = "sys/devices/platform/soc/soc:firmware/get_throttled"
	for name, c := range map[string]struct {
		first, then map[string]string // files
		want        string            // now, count, under-voltage
	}{
		"nothing":         {nil, nil, "- - false"}, // the recorded board has rpi_volt
		"alarm":           {nil, map[string]string{"sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"}, "- - true"},
		"flags at rest":   {map[string]string{pi: "50000\n"}, nil, "false - false"},
		"flags":           {map[string]string{pi: "0\n"}, map[string]string{pi: "50005\n"}, "true - true"},
		"flags of heat":   {map[string]string{pi: "0x0\n"}, map[string]string{pi: "0x80008\n"}, "true - false"},
		"flags of noise":  {map[string]string{pi: "0\n"}, map[string]string{pi: "hot\n"}, "- - false"},
		"cooling at rest": {map[string]string{"sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n", "sys/class/thermal/cooling_device0/cur_state": "0\n"}, nil, "false - false"},
		"cooling": {map[string]string{"sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n", "sys/class/thermal/cooling_device0/cur_state": "0\n"},
			map[string]string{"sys/class/thermal/cooling_device0/cur_state": "2\n"}, "true - false"},
		"a fan": {map[string]string{"sys/class/thermal/cooling_device0/type": "pwm-fan\n", "sys/class/thermal/cooling_device0/cur_state": "3\n"}, nil, "- - false"},
		"limit that an owner lowers": {map[string]string{"sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1800000\n"},
			map[string]string{"sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1500000\n"}, "- - false"},
		"x86 at rest": {map[string]string{"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "7\n"}, nil, "false 7 false"},
		"x86": {map[string]string{"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "7\n", "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "9\n"},
			map[string]string{"sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "11\n"}, "true 11 false"},
		"x86 absurd": {map[string]string{"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "-5\n"}, nil, "false 0 false"},
	} {
		root := plant(t, "raspberry-pi-4.tree")
		for file, text := range c.first {
			put(t, root, file, text)
		}
		s, _ := sampled(t, root)
		sample(t, s)
		for file, text := range c.then {
			put(t, root, file, text)
		}
		x := sample(t, s).Throttling
		if x == nil {
			t.Errorf("%s: nothing is told", name)
			continue
		}
		count := "-"
		if x.Count != nil {
			count = fmt.Sprint(*x.Count)
		}
		if got := say(x.Now) + " " + count + " " + say(x.UnderVoltage); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func TestLinksAreThoseWithADeviceBehindThem(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	for name, changes := range map[string]string{"eth0": "4\n", "wlan0": "7\n", "docker0": "2\n", "lo": "0\n"} {
		put(t, root, "sys/class/net/"+name+"/carrier_changes", changes)
	}
	s, _ := sampled(t, root)
	got := sample(t, s).Links
	if len(got) != 2 || got["eth0"] != (Link{true, 4}) || got["wlan0"] != (Link{false, 7}) {
		t.Errorf("got %v", got)
	}
	put(t, root, "sys/class/net/wwan0/type", "1\n") // a modem that is plugged in
	put(t, root, "sys/class/net/wwan0/device/uevent", "")
	put(t, root, "sys/class/net/wwan0/carrier_changes", "1\n")
	put(t, root, "sys/class/net/wlan0/carrier_changes", "-1\n")
	if got = sample(t, s).Links; len(got) != 2 || got["wwan0"].Changes != 1 {
		t.Errorf("got %v", got)
	}
}

func TestASensorWhoseDeviceFellAsleepIsNotWoken(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	s, _ := sampled(t, root)
	before := len(sample(t, s).Temperatures)
	put(t, root, "sys/class/hwmon/hwmon2/device/power/runtime_status", "suspended\n")
	read := false
	s.prober.slow = func(name string) { read = read || strings.HasSuffix(name, "hwmon2/temp1_input") }
	if got := sample(t, s).Temperatures; len(got) != before-1 || read {
		t.Errorf("%d temperatures, then %v, read %v", before, got, read)
	}
}

func TestSamplersListTheMachineOnceInAWhile(t *testing.T) {
	root := plant(t, "raspberry-pi-4.tree")
	s, now := sampled(t, root)
	sample(t, s)
	first := s.layout
	*now = now.Add(layoutAge - time.Second)
	sample(t, s)
	if s.layout != first {
		t.Error("what there is to read was looked for again at once")
	}
	*now = now.Add(2 * time.Second)
	sample(t, s)
	if s.layout == first {
		t.Error("what there is to read is never looked for again")
	}
}

func TestConcurrentSamplesAreWhole(t *testing.T) {
	s, err := NewSampler(SampleOptions{Limit: unhurried})
	must(t, err)
	done := make(chan Telemetry)
	for range 8 {
		go func() {
			got, _ := s.Sample(context.Background())
			done <- got
		}()
	}
	for range 8 {
		if got := <-done; got.Agent.Written == 0 && got.Agent.RSS == 0 || len(got.Notes) > 0 && got.Notes[0].Code == NoteTimeout {
			t.Errorf("got %+v", got)
		}
	}
}
