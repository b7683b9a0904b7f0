package hw

import (
	"context"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/shirou/gopsutil/v3/common"
	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/load"
	"golang.org/x/sys/unix"
)

// Telemetry is how the machine feels right now; it travels in each heartbeat.
// A field is absent if it could not be read.
type Telemetry struct {
	At              time.Time          `json:"at"`
	Load1           *float64           `json:"load1,omitempty"` // runnable and waiting tasks, mean over 1, 5 and 15 minutes
	Load5           *float64           `json:"load5,omitempty"`
	Load15          *float64           `json:"load15,omitempty"`
	CPUPercent      *float64           `json:"cpu_percent,omitempty"` // 0 to 100 of all processors together, since the sample before
	MemoryTotal     uint64             `json:"memory_total,omitempty"`
	MemoryUsed      uint64             `json:"memory_used,omitempty"` // bytes that are not available
	MemoryAvailable uint64             `json:"memory_available,omitempty"`
	Temperatures    map[string]float64 `json:"temperatures,omitempty"` // °C by name of the sensor, as in the inventory
	Data            *Usage             `json:"data,omitempty"`         // of the filesystem that holds the agent's data
	Pressure        *Pressure          `json:"pressure,omitempty"`
	Throttling      *Throttling        `json:"throttling,omitempty"`
	Disks           map[string]DiskUse `json:"disks,omitempty"`    // by kernel name, as in the inventory
	Links           map[string]Link    `json:"links,omitempty"`    // by name of the interface, as in the inventory; without virtual ones
	Measured        []Measurement      `json:"measured,omitempty"` // by sensors outside of the board, see hw/sensor
	Agent           Process            `json:"agent"`
	Notes           []Note             `json:"notes,omitempty"`
}

// Pressure is how much work had to wait for lack of something: percent of the
// last 10 seconds (Documentation/accounting/psi.rst). Some: at least one task
// waited; full: all did.
type Pressure struct {
	MemorySome float64 `json:"memory_some"`
	MemoryFull float64 `json:"memory_full"`
	CPUSome    float64 `json:"cpu_some"`
	IOSome     float64 `json:"io_some"`
	IOFull     float64 `json:"io_full"`
}

// Throttling is what slows the processor down. A field is absent if this
// machine does not tell.
type Throttling struct {
	Now          *bool   `json:"now,omitempty"`           // held below its speed because it is hot, or lacks power
	Count        *uint64 `json:"count,omitempty"`         // how often, since boot
	UnderVoltage *bool   `json:"under_voltage,omitempty"` // the supply is too weak
}

// DiskUse is what a disk did since the sample before. A mean is absent if
// there was nothing to take it from.
type DiskUse struct {
	ReadBytes    uint64   `json:"read_bytes"`         // since boot
	WrittenBytes uint64   `json:"written_bytes"`      // since boot
	ReadMS       *float64 `json:"read_ms,omitempty"`  // mean time of a request, queueing included
	WriteMS      *float64 `json:"write_ms,omitempty"` //
	FlushMS      *float64 `json:"flush_ms,omitempty"` //
	Busy         *float64 `json:"busy,omitempty"`     // percent of the time with a request under way
	InFlight     uint64   `json:"in_flight"`          // requests under way; that do not end, if the disk hangs
	Errors       *uint64  `json:"errors,omitempty"`   // that ext4 found on it since its last check; only a growth says something
	// Commands that did not end plainly, since boot. SCSI only, and no sign of a bad
	// disk: each one that reads the health of an ATA disk is among them.
	IOErrors *uint64 `json:"io_errors,omitempty"`
}

// Link is the state of a network interface.
type Link struct {
	Up      bool   `json:"up"`
	Changes uint64 `json:"changes"` // of the carrier, since boot
}

// Measurement is one value of a declared sensor.
type Measurement struct {
	Name  string     `json:"name"` // the sensor's, and for one with several values "sensor/kind"
	Kind  SensorKind `json:"kind"`
	Unit  string     `json:"unit"`
	Value float64    `json:"value"` // calibrated
	At    time.Time  `json:"at"`
}

// Process is what the agent itself uses, without its children.
type Process struct {
	RSS        uint64   `json:"rss"`                   // bytes in memory, mapped files included
	Anonymous  uint64   `json:"anonymous"`             // bytes in memory that are its own
	CPUSeconds float64  `json:"cpu_seconds"`           // used since it started
	CPUPercent *float64 `json:"cpu_percent,omitempty"` // of one processor, since the sample before
	Written    uint64   `json:"written"`               // bytes sent to storage since it started (write_bytes of proc_pid_io(5))
}

// SampleOptions says what to sample.
type SampleOptions struct {
	Root  string        // "/" if empty
	Data  string        // a path on the filesystem that holds the agent's data; none if empty
	Limit time.Duration // for a whole sample; DefaultLimit if 0
}

// Sampler takes samples. It remembers the one before, for rates. Safe for
// concurrent use.
type Sampler struct {
	prober *prober
	limit  time.Duration
	data   string

	now func() time.Time

	turn   chan struct{} // holds one; who has taken it may use the next two
	layout *layout
	stats  map[string]lastStat // of disks, by name

	mu        sync.Mutex // guards the rest
	cpu       cpuTimes
	agent     cpuTimes
	throttled *uint64 // how often, at the sample before
}

// cpuTimes is time spent, in seconds, out of time passed.
type cpuTimes struct{ busy, total float64 }

// percent is the share of busy time since before; nil if too little time has
// passed to tell (the kernel counts in ticks of 10 ms) or a counter ran backwards.
func (now cpuTimes) percent(before cpuTimes) *float64 {
	busy, total := now.busy-before.busy, now.total-before.total
	if before.total == 0 || total < 0.05 || busy < 0 || math.IsNaN(busy) || math.IsInf(total, 0) {
		return nil
	}
	return new(100 * busy / total)
}

// NewSampler begins sampling; the first sample's rates are since now.
func NewSampler(o SampleOptions) (*Sampler, error) {
	p, limit, err := newProber(Options{Root: o.Root, Limit: o.Limit})
	if err != nil {
		return nil, err
	}
	if o.Data != "" {
		if o.Data, err = filepath.Abs(o.Data); err != nil {
			return nil, err
		}
	}
	s := &Sampler{
		prober: p, limit: limit, data: o.Data, now: time.Now, turn: make(chan struct{}, 1),
		layout: &layout{}, agent: processTimes(),
	}
	s.turn <- struct{}{}
	s.cpu, _ = machineTimes(context.WithValue(context.Background(), common.EnvKey, p.env))
	return s, nil
}

var standard = sync.OnceValues(func() (*Sampler, error) { return NewSampler(SampleOptions{}) })

// Sample is a sample of the live machine, without a data path. Whoever wants
// one, or rates that nobody else's samples cut short, makes a [Sampler].
func Sample(ctx context.Context) (Telemetry, error) {
	s, err := standard()
	if err != nil {
		return Telemetry{}, err
	}
	return s.Sample(ctx)
}

// Sample reads the machine once. It returns within the limit, whatever hangs,
// and fails only if ctx has ended.
func (s *Sampler) Sample(ctx context.Context) (Telemetry, error) {
	if err := ctx.Err(); err != nil {
		return Telemetry{}, err
	}
	p := s.prober
	limited, cancel := context.WithTimeout(context.WithValue(ctx, common.EnvKey, p.env), s.limit)
	defer cancel()

	t := Telemetry{At: s.now().UTC()}
	var missing notes
	missing = append(missing, s.kernel(limited, &t)...)
	missing = append(missing, s.devices(limited, &t)...)
	if s.data != "" {
		u, err := diskUsage(limited, p, s.data)
		if err != nil {
			code, text := reason(err)
			missing.add("data", code, clean(s.data), text)
		} else {
			t.Data = &u
		}
	}
	s.own(&t)
	if len(missing) > 0 {
		t.Notes = missing.merged()
	}
	return t, ctx.Err()
}

// kernel fills in what the kernel knows without touching a device.
func (s *Sampler) kernel(ctx context.Context, t *Telemetry) notes {
	var missing notes
	if avg, err := load.AvgWithContext(ctx); err != nil || !sane(avg.Load1) || !sane(avg.Load5) || !sane(avg.Load15) {
		missing.add("load", NoteUnreadable, "", "the kernel does not give a plausible load")
	} else {
		t.Load1, t.Load5, t.Load15 = &avg.Load1, &avg.Load5, &avg.Load15
	}
	if m, err := readMemory(ctx); err != nil {
		missing.add("memory", NoteUnreadable, "", "the kernel's figures "+err.Error())
	} else {
		t.MemoryTotal, t.MemoryAvailable, t.MemoryUsed = m.Total, m.Available, m.Total-m.Available
	}
	t.Pressure = readPressure(s.prober.tree)
	now, err := machineTimes(ctx)
	if err != nil {
		missing.add("cpu", NoteUnreadable, "", "the kernel does not say how busy the processor is")
		return missing
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.CPUPercent = now.percent(s.cpu); t.CPUPercent != nil || s.cpu.total > now.total || s.cpu.total == 0 {
		s.cpu = now
	}
	return missing
}

func sane(v float64) bool { return v >= 0 && v < 1e6 }

// devices fills in what has to be looked for first. One sample at a time does so.
func (s *Sampler) devices(ctx context.Context, t *Telemetry) notes {
	var missing notes
	select {
	case <-s.turn:
		defer func() { s.turn <- struct{}{} }()
	case <-ctx.Done():
		missing.add("sensors", NoteTimeout, "", "another sample still waits for a device that "+errTimeout.Error())
		return missing
	}
	if now := s.now(); s.layout.found.IsZero() || now.Sub(s.layout.found) >= layoutAge {
		l, err := within(ctx, s.prober.limit, s.prober.root+" layout", func() *layout { return findLayout(s.prober.tree, now) })
		if err != nil {
			missing.add("sensors", NoteTimeout, "", "the list of what there is to read "+err.Error())
		} else {
			s.layout = l
		}
	}
	if s.layout.names == nil {
		return missing
	}
	missing = append(missing, s.temperatures(ctx, s.layout.temperatures, t)...)
	t.Throttling = s.throttling(ctx, s.layout.throttling)
	t.Disks = s.disks(ctx, s.layout)
	t.Links = s.links(ctx, s.layout.links)
	return missing
}

func (s *Sampler) temperatures(ctx context.Context, sources []source, t *Telemetry) notes {
	found, missing := s.prober.readSources(ctx, sources)
	for _, x := range found {
		if t.Temperatures == nil {
			t.Temperatures = map[string]float64{}
		}
		t.Temperatures[x.Name] = x.Value
	}
	return missing
}

// own fills in what the agent uses.
func (s *Sampler) own(t *Telemetry) {
	t.Agent.RSS, t.Agent.Anonymous = ownMemory()
	t.Agent.Written = ownWrites()
	now := processTimes()
	t.Agent.CPUSeconds = now.busy
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.Agent.CPUPercent = now.percent(s.agent); t.Agent.CPUPercent != nil {
		s.agent = now
	}
}

// machineTimes sums up all processors. Time stolen by a hypervisor and time waiting
// for disks is not the machine's work.
func machineTimes(ctx context.Context) (cpuTimes, error) {
	all, err := cpu.TimesWithContext(ctx, false)
	if err == nil && len(all) == 0 {
		err = os.ErrNotExist
	}
	if err != nil {
		return cpuTimes{}, err
	}
	c := all[0]
	busy := c.User + c.System + c.Nice + c.Irq + c.Softirq
	return cpuTimes{busy: busy, total: busy + c.Idle + c.Iowait + c.Steal}, nil
}

var started = time.Now()

// processTimes is the time that this process has spent on processors, out of
// the time since it started.
func processTimes() cpuTimes {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return cpuTimes{}
	}
	seconds := func(tv unix.Timeval) float64 { return float64(tv.Sec) + float64(tv.Usec)/1e6 }
	return cpuTimes{busy: seconds(u.Utime) + seconds(u.Stime), total: time.Since(started).Seconds()}
}

// ownMemory reads RssAnon and VmRSS of proc_pid_status(5).
func ownMemory() (rss, anonymous uint64) {
	raw, err := tree{root: "/"}.bytes("proc/self/status")
	if err != nil {
		return 0, 0
	}
	return statusKB(raw, "VmRSS:"), statusKB(raw, "RssAnon:")
}

// ownWrites reads write_bytes of proc_pid_io(5).
func ownWrites() uint64 {
	raw, err := tree{root: "/"}.bytes("proc/self/io")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		if text, ok := strings.CutPrefix(line, "write_bytes:"); ok {
			v, _ := strconv.ParseUint(strings.TrimSpace(text), 10, 63)
			return v
		}
	}
	return 0
}

func statusKB(raw []byte, key string) uint64 {
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == key && f[2] == "kB" {
			if v, err := strconv.ParseUint(f[1], 10, 40); err == nil {
				return v * 1024
			}
		}
	}
	return 0
}
