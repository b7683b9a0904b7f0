package sensor

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"periph.io/x/conn/v3/i2c"
	"periph.io/x/conn/v3/onewire"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
)

var discard = slog.New(slog.DiscardHandler)

// running is a set that runs in a bubble of fake time, stopped at its end.
func running(t *testing.T, m machine, sensors ...board.Sensor) (s *Set, stop func()) {
	t.Helper()
	s, err := newSet(sensors, discard, m)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	return s, func() { cancel(); <-done }
}

func values(s *Set) map[string]float64 {
	got := map[string]float64{}
	now, _ := s.Latest()
	for _, v := range now {
		got[v.Name] = v.Value
	}
	return got
}

func silent(s *Set) (names []string, text string) {
	_, all := s.Latest()
	for _, x := range all {
		names = append(names, x.Name)
		text += x.Err.Error() + "\n"
	}
	return names, text
}

func TestASensorThatDisappearsAndReturnsIsSilentInBetween(t *testing.T) {
	for _, name := range []string{"mcp9808", "scd41", "ds18b20"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := readTraffic(t, name)
				gone := f
				gone.ops = nil
				if name == "scd41" {
					// Stays open: plays three readings, then nobody answers.
					read := f.ops[len(f.ops)-7 : len(f.ops)-1]
					f.ops = append(append(append(f.ops[:len(f.ops)-1:len(f.ops)-1], read...), read...), f.ops[len(f.ops)-1])
				}
				m := play(f)
				f.sensor.Every = "10s"
				s, stop := running(t, m, f.sensor)
				defer func() {
					if stop(); m.open != 0 {
						t.Errorf("%d buses are still open", m.open)
					}
				}()
				time.Sleep(15 * time.Second)
				before := values(s)
				if len(before) == 0 {
					_, text := silent(s)
					t.Fatal("no value after its first interval: ", text)
				}
				m.set(f.sensor.Bus, &gone)
				time.Sleep(60 * time.Second)
				if v := values(s); len(v) > 0 {
					t.Errorf("shows %v, which are older than three intervals", v)
				}
				names, text := silent(s)
				if len(names) != 1 || names[0] != name || text == "" {
					t.Fatalf("silent: %q %q", names, text)
				}
				if name == "mcp9808" && !strings.Contains(text, "no chip answers at 0x18 on /dev/i2c-1") {
					t.Errorf("it says %q", text)
				}
				m.set(f.sensor.Bus, &f)
				time.Sleep(retryMost + time.Minute/2)
				if v := values(s); len(v) != len(before) {
					t.Errorf("after its return it shows %v", v)
				}
				if names, text := silent(s); len(names) > 0 {
					t.Errorf("after its return %s is silent: %s", names, text)
				}
			})
		})
	}
}

func TestABusThatComesLaterIsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := readTraffic(t, "aht20")
		m := &machineOf{on: map[string]traffic{}}
		s, stop := running(t, m, f.sensor)
		defer stop()
		time.Sleep(3 * time.Second)
		if names, text := silent(s); len(names) != 1 || !strings.Contains(text, "there is no bus") {
			t.Fatalf("silent: %q %q", names, text)
		}
		m.set(f.sensor.Bus, &f)
		time.Sleep(8 * time.Second)
		if v := values(s); len(v) != 2 {
			t.Errorf("shows %v", v)
		}
	})
}

func TestAGlitchIsNoWarningAndItsValueStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := readTraffic(t, "tmp102")
		m := play(f)
		s, stop := running(t, m, f.sensor)
		defer stop()
		time.Sleep(50 * time.Second)
		m.set(f.sensor.Bus, nil)
		time.Sleep(14 * time.Second) // its second reading, at most
		m.set(f.sensor.Bus, &f)
		if names, _ := silent(s); len(names) > 0 || len(values(s)) != 1 {
			t.Errorf("one failure: silent %q, shows %v", names, values(s))
		}
	})
}

// A transfer that hangs in the kernel holds one goroutine and its bus, not the
// other buses, and not the end of Run.
func TestAHangHoldsItsBusOnceAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := readTraffic(t, "tmp102"), readTraffic(t, "mcp9808"), readTraffic(t, "aht20")
		c.sensor.Bus = "/dev/i2c-2"
		m := &machineOf{on: map[string]traffic{a.sensor.Bus: a, c.sensor.Bus: c}}
		release := make(chan struct{})
		var mu sync.Mutex
		hanging := 0
		m.before = func(bus string) {
			if bus == a.sensor.Bus {
				mu.Lock()
				hanging++
				mu.Unlock()
				<-release
			}
		}
		s, stop := running(t, m, a.sensor, b.sensor, c.sensor)
		time.Sleep(20 * time.Minute)
		mu.Lock()
		if hanging != 1 {
			t.Errorf("%d goroutines went into the kernel; one was to be left behind", hanging)
		}
		mu.Unlock()
		if v := values(s); len(v) != 2 {
			t.Errorf("the other bus shows %v", v)
		}
		names, text := silent(s)
		if len(names) != 2 || !strings.Contains(text, "is held up by a reading of sensor") {
			t.Errorf("silent: %q %q", names, text)
		}
		began := time.Now()
		if err := s.sensors[1].bus.wait(t.Context()); err == nil || time.Since(began) > 0 {
			t.Errorf("a bus that is stuck was waited for: %v", err)
		}
		stop()
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("Run took %v to end", took)
		}
		m.mu.Lock()
		m.before = nil
		m.mu.Unlock()
		close(release)
		synctest.Wait()
		if m.open != 0 {
			t.Errorf("what was left behind did not close its bus")
		}
	})
}

func TestABusThatHungIsUsedAgainWhenItCameBack(t *testing.T) {
	for _, name := range []string{"tmp102", "scd41"} {
		synctest.Test(t, func(t *testing.T) {
			f := readTraffic(t, name)
			f.sensor.Every = "20m"
			m := play(f)
			release := make(chan struct{})
			m.before = func(string) { <-release }
			s, stop := running(t, m, f.sensor)
			time.Sleep(time.Minute)
			if names, _ := silent(s); len(names) != 1 {
				t.Fatal("a sensor that hangs is not silent")
			}
			close(release)
			time.Sleep(retryMost + time.Minute)
			if v := values(s); len(v) != len(f.values) {
				_, text := silent(s)
				t.Errorf("%s shows %v: %s", name, v, text)
			}
			if stop(); m.open != 0 {
				t.Errorf("%s: %d buses are still open", name, m.open)
			}
		})
	}
}

func TestWhyATransferFailedIsNotLostInTheDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := readTraffic(t, "ina219")
		f.ops = f.ops[:1] // the driver says only that it failed to write
		if r := readOne(t, play(f), f.sensor); r.Err == nil || !strings.Contains(r.Err.Error(), "unexpected Tx") {
			t.Error(r.Err)
		}
	})
}

func TestABusHasOneReaderAndBusesGoInParallel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machineOf{on: map[string]traffic{}}
		var sensors []board.Sensor
		for i := range 4 { // of four addresses on two buses
			for bus := range 2 {
				f := readTraffic(t, "tmp102")
				f.sensor.Name, f.sensor.Bus = fmt.Sprint(bus, "-", i), fmt.Sprintf("/dev/i2c-%d", bus)
				f.sensor.Address = fmt.Sprintf("0x%02x", 0x48+i)
				m.on[f.sensor.Bus] = f
				sensors = append(sensors, f.sensor)
			}
		}
		var mu sync.Mutex
		using, most := map[string]int{}, 0
		m.before = func(bus string) {
			mu.Lock()
			using[bus]++
			if using[bus] > 1 {
				t.Errorf("%d transfers at once on %s", using[bus], bus)
			}
			most = max(most, len(using))
			mu.Unlock()
			time.Sleep(10 * time.Millisecond)
			mu.Lock()
			if using[bus]--; using[bus] == 0 {
				delete(using, bus)
			}
			mu.Unlock()
		}
		s, err := newSet(sensors, discard, m)
		if err != nil {
			t.Fatal(err)
		}
		s.ReadOnce(t.Context())
		if most != 2 {
			t.Errorf("%d buses were in use at once, not 2", most)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.opened) != len(sensors) || m.open != 0 {
			t.Errorf("%d of %d sensors were opened, %d are still open", len(m.opened), len(sensors), m.open)
		}
	})
}

func TestReadingsKeepTheirIntervalWithJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := readTraffic(t, "bh1750")
		f.sensor.Every = "20s"
		m := play(f)
		var mu sync.Mutex
		var at []time.Time
		m.before = func(string) {
			mu.Lock()
			defer mu.Unlock()
			if n := len(at); n == 0 || time.Since(at[n-1]) > time.Second {
				at = append(at, time.Now())
			}
		}
		_, stop := running(t, m, f.sensor)
		time.Sleep(time.Hour)
		stop()
		if n := len(at); n < 176 || n > 184 {
			t.Errorf("%d readings in an hour, not about 180", n)
		}
		different := map[time.Duration]bool{}
		for i := 1; i < len(at); i++ {
			d := at[i].Sub(at[i-1])
			different[d] = true
			if d < 19*time.Second || d > 21*time.Second {
				t.Errorf("%v between two readings", d)
			}
		}
		if len(different) < 10 {
			t.Error("the interval has no jitter")
		}
	})
}

func TestTheChipsLeastIntervalHoldsForRetriesAndJitter(t *testing.T) {
	for _, dr := range drivers {
		d := declared{driver: dr, every: dr.least}
		for failures := range 40 {
			for range 20 {
				got := d.next(failures)
				if got < dr.least || got > max(retryMost, dr.least) {
					t.Fatalf("%s: %v after %d failures", dr.Name, got, failures)
				}
			}
		}
	}
	hourly := declared{driver: drivers[0], every: time.Hour}
	if got := hourly.next(1); got != retryFirst {
		t.Errorf("the first retry of an hourly sensor comes after %v", got)
	}
	if got := hourly.next(30); got != time.Hour {
		t.Errorf("an hourly sensor that is gone is tried every %v", got)
	}
}

func TestRunStopsWhileReading(t *testing.T) {
	for _, name := range []string{"scd41", "ina219", "bme280"} {
		synctest.Test(t, func(t *testing.T) {
			f := readTraffic(t, name)
			m := play(f)
			began := make(chan struct{})
			var once sync.Once
			m.before = func(string) { once.Do(func() { close(began) }) }
			_, stop := running(t, m, f.sensor)
			<-began
			at := time.Now()
			stop()
			if took := time.Since(at); took > 3*time.Second {
				t.Errorf("%s: %v", name, took)
			}
			if m.open != 0 {
				t.Errorf("%s: the bus is still open", name)
			}
		})
	}
}

func TestImplausibleValuesAreDroppedAndSayWhy(t *testing.T) {
	for name, c := range map[string]struct {
		traffic string
		change  func(traffic) traffic
		kept    int // values
		say     string
	}{
		"a battery that is not there":  {"ina219", func(f traffic) traffic { return f.change(4, 0xff, 0xfa) }, 2, "32.764 V of voltage"},
		"air without CO2":              {"scd41", func(f traffic) traffic { return f.change(11, 0, 0, 0x81, 0x67, 0xd, 0x36, 0x4d, 0x8, 0xf1) }, 2, "0 ppm of co2"},
		"a light sensor that dazzles":  {"bh1750", func(f traffic) traffic { return f.change(4, 0xff, 0xff) }, 0, "54612 lx"},
		"a wire that hangs in the air": {"mcp9808", func(f traffic) traffic { return f.change(3, 0x0f, 0xff) }, 0, "255.938 °C"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := c.change(readTraffic(t, c.traffic))
				r := readOne(t, play(f), f.sensor)
				if r.Err == nil || !strings.Contains(r.Err.Error(), c.say) || !strings.Contains(r.Err.Error(), "dropped") {
					t.Errorf("it says %v", r.Err)
				}
				if len(r.Values) != c.kept {
					t.Errorf("it shows %v", r.Values)
				}
			})
		})
	}
}

func TestWhatABrokenChipSendsIsNoValue(t *testing.T) {
	memory := func(b ...byte) func(traffic) traffic {
		return func(f traffic) traffic {
			b := append(b, onewire.CalcCRC(b))
			return f.change(0, b...).change(1, b...).change(2, b...)
		}
	}
	for name, c := range map[string]struct {
		traffic string
		change  func(traffic) traffic
		say     string
	}{
		"checksum of AHT20":      {"aht20", func(f traffic) traffic { return f.change(3, 0x18, 0x75, 0x52, 5, 0x8e, 0x41, 0x7f) }, "data is corrupt"},
		"checksum of SCD4x":      {"scd41", func(f traffic) traffic { return f.change(11, 2, 0x2c, 0xa4, 0x67, 0xd, 0x36, 0x4d, 8, 0xf1) }, "invalid crc"},
		"checksum of DS18B20":    {"ds18b20", func(f traffic) traffic { return f.change(2, 0xe0, 2, 0, 0, 0x3f, 0xff, 0x10, 0x10, 0x3f) }, "incorrect scratchpad CRC"},
		"DS18B20 without power":  {"ds18b20", memory(0x50, 5, 0, 0, 0x3f, 0xff, 0x10, 0x10), "too weak"},
		"shorted 1-wire":         {"ds18b20", memory(0, 0, 0, 0, 0, 0, 0, 0), "shorted to ground"},
		"a copy of a DS18B20":    {"ds18b20", memory(0xe0, 1, 0, 0, 0x8f, 0xff, 0x10, 0x10), "no DS18B20 has"},
		"another chip":           {"mcp9808", func(f traffic) traffic { return f.change(0, 0x33, 0x33) }, "is no MCP9808"},
		"another chip at 0x76":   {"bme280", func(f traffic) traffic { return f.change(0, 0x61) }, "unexpected chip id"},
		"power lost in between":  {"bme280", func(f traffic) traffic { return f.change(8, 0) }, "lost its settings"},
		"overflow of an INA219":  {"ina219", func(f traffic) traffic { return f.change(4, 0x5d, 0xc3) }, "overflow"},
		"a division by zero":     {"bmp180", func(f traffic) traffic { return f.change(1, make180()...).change(3, 0, 1) }, "makes no sense"},
		"a chip that is not set": {"aht20", func(f traffic) traffic { return f.change(3, crc8(0, 0, 0, 0, 0, 0)...) }, "not initialized"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := c.change(readTraffic(t, c.traffic))
				r := readOne(t, play(f), f.sensor)
				if len(r.Values) > 0 || r.Err == nil || !strings.Contains(strings.ToLower(r.Err.Error()), strings.ToLower(c.say)) {
					t.Errorf("it shows %v and says %v", r.Values, r.Err)
				}
			})
		})
	}
}

// make180 is the calibration of a BMP180 for which the driver divides by zero
// at a raw temperature of 1: AC6 is 1, so x1 is 0, and MD must be 0, which the
// driver refuses; so x1 is made -MD.
func make180() []byte {
	// AC5 = 0x8000 and AC6 = 2 make x1 = (1-2)·32768>>15 = -1; MD = 1.
	c := []int{1, 1, 1, 1, 0x8000, 2, 1, 1, 1, 1, 1}
	var b []byte
	for _, v := range c {
		b = append(b, byte(v>>8), byte(v))
	}
	return b
}

// crc8 is the checksum of an AHT20 behind its data.
func crc8(data ...byte) []byte {
	crc := byte(0xff)
	for _, b := range data {
		crc ^= b
		for range 8 {
			if crc&0x80 != 0 {
				crc = crc<<1 ^ 0x31
			} else {
				crc <<= 1
			}
		}
	}
	return append(data, crc)
}

// stubborn is a bus that sends the same byte for ever.
type stubborn struct {
	always byte
	count  int
}

func (s *stubborn) String() string { return "stubborn" }
func (s *stubborn) Close() error   { return nil }
func (s *stubborn) Tx(_ uint16, w, r []byte) error {
	s.count++
	for i := range r {
		r[i] = s.always
	}
	if len(w) == 1 && w[0] == 0xd0 {
		r[0] = 0x58
	}
	return nil
}

type anyBus struct {
	i2cBus i2c.BusCloser
	wire   onewire.BusCloser
}

func (a anyBus) i2c(string) (i2c.BusCloser, error)         { return a.i2cBus, nil }
func (a anyBus) oneWire(string) (onewire.BusCloser, error) { return a.wire, nil }

// The driver of the BMx280 waits in a loop without end for "not measuring".
func TestAChipThatIsNeverReadyDoesNotSpinForEver(t *testing.T) {
	bus := &stubborn{always: 0xff}
	s := playedSensor("bmxx80")
	r := readOne(t, anyBus{i2cBus: struct {
		*stubborn
		speed
	}{bus, speed{}}}, s)
	if r.Err == nil || !strings.Contains(r.Err.Error(), "never becomes ready") || bus.count > 2*transfers {
		t.Errorf("after %d transfers: %v", bus.count, r.Err)
	}
}

func TestCalibrationIsScaleThenOffset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := readTraffic(t, "bme280")
		f.sensor.Calibration = []board.Calibration{
			{Kind: "temperature", Scale: new(2.0), Offset: -1.5},
			{Kind: "pressure", Offset: 57.3046875},
			{Kind: "humidity", Scale: new(1.0), Offset: 60},
		}
		r := readOne(t, play(f), f.sensor)
		want := map[hw.SensorKind]float64{hw.Temperature: 45.94, hw.AirPressure: 101000, hw.Humidity: 100}
		for _, v := range r.Values {
			if math.Abs(v.Value-want[v.Kind]) > 1e-9 {
				t.Errorf("%s is %v, not %v", v.Kind, v.Value, want[v.Kind])
			}
		}
		if len(r.Values) != 3 || r.Err != nil {
			t.Error(r.Values, r.Err)
		}
	})
}

func TestDeclarationsAreChecked(t *testing.T) {
	good := board.Sensor{Name: "box", Driver: "bmxx80", Bus: "/dev/i2c-1"}
	with := func(change func(*board.Sensor)) board.Sensor { s := good; change(&s); return s }
	for name, c := range map[string]struct {
		sensor board.Sensor
		say    string // "" is right
	}{
		"least that is needed": {good, ""},
		"all that is possible": {board.Sensor{Name: "12 V rail", Driver: "ina219", Bus: "/dev/i2c-22", Address: "0X4F", Every: "1s", Shunt: 0.01,
			Calibration: []board.Calibration{{Kind: "voltage", Scale: new(10.0)}, {Kind: "current", Offset: -0.01}}}, ""},
		"1-wire":                  {board.Sensor{Name: "t", Driver: "ds18b20", Bus: "w1_bus_master1", Address: "28-0000075565AD"}, ""},
		"unknown driver":          {with(func(s *board.Sensor) { s.Driver = "dht11" }), `there is no driver "dht11"; there are bmxx80, ds18b20, tmp102, mcp9808, aht20, scd4x, ina219, bh1750`},
		"chip instead of driver":  {with(func(s *board.Sensor) { s.Driver = "BME280" }), `the driver of a BME280 is called "bmxx80"`},
		"no name":                 {with(func(s *board.Sensor) { s.Name = " " }), "it has no name"},
		"name with a slash":       {with(func(s *board.Sensor) { s.Name = "a/b" }), "may not"},
		"name with a steering":    {with(func(s *board.Sensor) { s.Name = "a\x1b[31m" }), `sensor "a\x1b[31m": its name`},
		"address of another chip": {with(func(s *board.Sensor) { s.Address = "0x48" }), `its address is "0x48"; bmxx80 can only be at 0x76 or 0x77`},
		"address without 0x":      {with(func(s *board.Sensor) { s.Address = "76" }), `write it in hex with 0x in front, such as "0x76"`},
		"address in decimal":      {with(func(s *board.Sensor) { s.Address = "118" }), `write it in hex`},
		"bus that is none":        {with(func(s *board.Sensor) { s.Bus = "/dev/sda" }), `its bus is "/dev/sda"; bmxx80 is on i2c, so that must be such as "/dev/i2c-1"`},
		"bus with a way out":      {with(func(s *board.Sensor) { s.Bus = "/dev/i2c-1/../../etc" }), "its bus is"},
		"1-wire chip on I2C":      {with(func(s *board.Sensor) { s.Driver, s.Address = "ds18b20", "28-0000075565ad" }), `such as "w1_bus_master1"`},
		"1-wire without address":  {board.Sensor{Name: "t", Driver: "ds18b20", Bus: "w1_bus_master1"}, "its address is missing"},
		"1-wire of another kind":  {board.Sensor{Name: "t", Driver: "ds18b20", Bus: "w1_bus_master1", Address: "3a-0000075565ad"}, "begins with 28- or 10-"},
		"1-wire too short":        {board.Sensor{Name: "t", Driver: "ds18b20", Bus: "w1_bus_master1", Address: "28-75565ad"}, "twelve digits"},
		"too often":               {board.Sensor{Name: "air", Driver: "scd4x", Bus: "/dev/i2c-1", Every: "1s"}, "every is 1s; scd4x bears no more than one reading every 5s"},
		"too seldom":              {with(func(s *board.Sensor) { s.Every = "25h" }), "24h0m0s at most"},
		"no time":                 {with(func(s *board.Sensor) { s.Every = "often" }), `every is "often"`},
		"shunt of a thermometer":  {with(func(s *board.Sensor) { s.Shunt = 0.1 }), "bmxx80 does not"},
		"shunt of nothing":        {board.Sensor{Name: "p", Driver: "ina219", Bus: "/dev/i2c-1", Shunt: -1}, "shunt_ohm is -1"},
		"shunt that is no number": {board.Sensor{Name: "p", Driver: "ina219", Bus: "/dev/i2c-1", Shunt: math.NaN()}, "shunt_ohm is NaN"},
		"calibration of nothing":  {with(func(s *board.Sensor) { s.Calibration = []board.Calibration{{Kind: "co2"}} }), `calibration is of "co2", which bmxx80 does not measure; it measures temperature, pressure, humidity`},
		"calibration twice":       {with(func(s *board.Sensor) { s.Calibration = []board.Calibration{{Kind: "humidity"}, {Kind: "humidity"}} }), "two calibrations of humidity"},
		"scale of 0":              {with(func(s *board.Sensor) { s.Calibration = []board.Calibration{{Kind: "humidity", Scale: new(0.0)}} }), "other than 0"},
		"offset without end":      {with(func(s *board.Sensor) { s.Calibration = []board.Calibration{{Kind: "humidity", Offset: math.Inf(1)}} }), "the offset of humidity"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Check(c.sensor)
			if c.say == "" && err != nil || c.say != "" && (err == nil || !strings.Contains(err.Error(), c.say)) {
				t.Errorf("it says %v", err)
			}
		})
	}
}

func TestNewTellsEverythingThatIsWrong(t *testing.T) {
	_, err := New([]board.Sensor{
		{Name: "a", Driver: "tmp102", Bus: "/dev/i2c-1"},
		{Name: "a", Driver: "aht20", Bus: "/dev/i2c-1"},
		{Name: "b", Driver: "tmp102", Bus: "/dev/i2c-1", Address: "0x48"},
		{Name: "c", Driver: "tmp102", Bus: "/dev/i2c-2", Address: "0x48"},
		{Name: "d", Driver: "?", Bus: "/dev/i2c-2"},
		{Name: "e", Driver: "tmp102", Bus: "x", Every: "1ms"},
	}, discard)
	if err == nil {
		t.Fatal("nothing is wrong with it")
	}
	for _, say := range []string{`two sensors have the name "a"`, `sensors "a" and "b" are both at 0x48 on /dev/i2c-1`, `sensor "d": there is no driver`, `sensor "e": its bus`, `sensor "e": every is 1ms`} {
		if !strings.Contains(err.Error(), say) {
			t.Errorf("it does not say %q: %v", say, err)
		}
	}
	if strings.Contains(err.Error(), `"c"`) {
		t.Error("the same address on another bus is no fault:", err)
	}
}

func TestROMHasTheChecksumThatTheChipSends(t *testing.T) {
	// The address of periph.io/x/devices/v3@v3.7.4/ds18b20/ds18b20_test.go.
	rom, err := parseROM("28-0000070e41ac")
	if want := onewire.Address(0x740000070e41ac28); rom != want || err != nil {
		t.Errorf("%#x, not %#x; %v", rom, want, err)
	}
	if got := romText(rom); got != "28-0000070e41ac" {
		t.Error(got)
	}
}

// w1 makes what the kernel shows of a 1-wire bus with a thermometer of each family.
func w1(t testing.TB, slave string) kernel {
	root := t.TempDir()
	for _, family := range []string{"28", "10"} {
		dir := filepath.Join(root, "sys/bus/w1/devices/w1_bus_master1", family+"-0000070e41ac")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if slave != "" {
			if err := os.WriteFile(filepath.Join(dir, "w1_slave"), []byte(slave), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	return kernel{root: root}
}

// The form of the file is that of Documentation/w1/slaves/w1_therm.rst.
func TestThermometersAreReadThroughTheKernel(t *testing.T) {
	s := board.Sensor{Name: "t", Driver: "ds18b20", Bus: "w1_bus_master1", Address: "28-0000070e41ac"}
	const good = "e0 01 00 00 3f ff 10 10 3f : crc=3f YES\ne0 01 00 00 3f ff 10 10 3f t=30000\n"
	r := readOne(t, w1(t, good), s)
	if r.Err != nil || len(r.Values) != 1 || r.Values[0].Value != 30 {
		t.Error(r.Values, r.Err)
	}
	other := s
	other.Address = "28-0000070e41ad"
	bus, old := s, s
	bus.Bus, old.Address = "w1_bus_master2", "10-0000070e41ac"
	// A DS18S20 counts in half degrees: 0x32 is 25 °C (periph's TestParseTemperature).
	memory := []byte{0x32, 0, 0, 0, 0xff, 0xff, 0x0c, 0x10}
	r = readOne(t, w1(t, fmt.Sprintf("% x %02x : crc=00 YES\n", memory, onewire.CalcCRC(memory))), old)
	if r.Err != nil || len(r.Values) != 1 || r.Values[0].Value != 25 {
		t.Error(r.Values, r.Err)
	}
	for name, c := range map[string]struct {
		file string
		s    board.Sensor
		say  string
	}{
		"checksum":        {strings.Replace(good, "e0", "e1", 1), s, "incorrect scratchpad CRC"},
		"nobody answers":  {"ff ff ff ff ff ff ff ff ff : crc=c9 NO\n", s, "did not respond"},
		"not on the bus":  {good, other, "28-0000070e41ad is not on the bus"},
		"no bus":          {good, bus, "there is no bus w1_bus_master2"},
		"no driver":       {"", s, "load the module w1_therm"},
		"another form":    {"e0 01", s, "not in its documented form"},
		"too many bytes":  {"e0 01 00 00 3f ff 10 10 3f 3f : crc=3f YES", s, "not in its documented form"},
		"shorted to zero": {"00 00 00 00 00 00 00 00 00 : crc=00 YES", s, "shorted to ground"},
		"shorted DS18S20": {"00 00 00 00 00 00 00 00 00 : crc=00 YES", old, "shorted to ground"},
	} {
		if r := readOne(t, w1(t, c.file), c.s); r.Err == nil || len(r.Values) > 0 || !strings.Contains(r.Err.Error(), c.say) {
			t.Errorf("%s: it shows %v and says %v", name, r.Values, r.Err)
		}
	}
}

func TestTheKernelsThermometersAreNeverWrittenTo(t *testing.T) {
	b, err := w1(t, "e0 01 00 00 3f ff 10 10 3f : crc=3f YES").oneWire("w1_bus_master1")
	if err != nil {
		t.Fatal(err)
	}
	rom := []byte{0x55, 0x28, 0xac, 0x41, 0x0e, 7, 0, 0, 0x74}
	for _, command := range [][]byte{{0x4e, 0, 0, 0x7f}, {0x48}, {0x44}} {
		if err := b.Tx(append(rom[:9:9], command...), nil, onewire.StrongPullup); err == nil {
			t.Errorf("it took % x", command)
		}
	}
}

func TestABusThatIsMissingSaysWhatToDo(t *testing.T) {
	r := readOne(t, kernel{root: t.TempDir()}, playedSensor("tmp102"))
	if r.Err == nil || !strings.Contains(r.Err.Error(), "there is no bus /dev/i2c-1; load the module i2c-dev") {
		t.Error(r.Err)
	}
}

// playedSensor is a declaration with nothing special.
func playedSensor(driver string) board.Sensor {
	s := board.Sensor{Name: driver, Driver: driver, Bus: "/dev/i2c-1"}
	if driver == "ds18b20" {
		s.Bus, s.Address = "w1_bus_master1", "28-0000070e41ac"
	}
	return s
}
