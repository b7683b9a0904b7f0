package hw

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/shirou/gopsutil/v3/common"

	"github.com/deimos-edge/deimos/board"
)

// DefaultLimit is how long each section of a probe may take.
const DefaultLimit = 1500 * time.Millisecond

// Options says what to probe.
type Options struct {
	Root  string        // "/" if empty; else the directory of a recorded machine
	Board board.Board   // as detected; detected from Root if its Name is empty
	Limit time.Duration // for each section, all of which run at once; DefaultLimit if 0
	User  *int          // numeric user id that the notes assume; if nil, the process's own, or that of the recording
}

// prober is one probe.
type prober struct {
	tree
	board board.Board
	limit time.Duration // of one reading of one device
	user  int
	arch  string
	taken time.Time     // of a recorded machine, if it says so
	env   common.EnvMap // tells gopsutil the root
	ask   *asking       // the disks themselves; nil for a recorded machine
}

// section reads one part of the inventory. It touches nothing that is shared:
// what it found is written by fill, if it came back in time.
type section struct {
	name string
	read func(context.Context) (fill func(*Inventory), missing notes)
}

// Probe takes the inventory of a machine. It returns within the limit and a
// little, whatever hangs; what is missing then is in the notes. It fails only
// if ctx is canceled or the root is no directory.
func Probe(ctx context.Context, o Options) (*Inventory, error) {
	p, limit, err := newProber(o)
	if err != nil {
		return nil, err
	}
	return p.probe(ctx, limit)
}

func (p *prober) probe(ctx context.Context, limit time.Duration) (*Inventory, error) {
	inv := &Inventory{
		Format: Format, Taken: p.taken, Board: p.board,
		CPU:   CPU{Crypto: []string{}},
		Disks: []Disk{}, Filesystems: []Filesystem{}, Network: []Interface{}, Sensors: []Sensor{},
		LEDs: []LED{}, GPIO: []GPIOChip{}, Buses: []Bus{}, Clocks: []Clock{}, TPMs: []TPM{}, Watchdogs: []Watchdog{},
	}
	if p.taken.IsZero() {
		inv.Taken = time.Now().UTC().Truncate(time.Second)
	}
	missing := p.run(ctx, limit, inv, []section{
		{"system", p.system}, {"cpu", p.cpu}, {"memory", p.memory}, {"disks", p.disks},
		{"filesystems", p.filesystems}, {"network", p.network}, {"sensors", p.sensors},
		{"leds", p.leds}, {"buses", p.buses}, {"clocks", p.clocks}, {"tpms", p.tpms}, {"watchdogs", p.watchdogs},
	})
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, ctx.Err()
	}
	link(inv)
	inv.Notes = missing.merged()
	return inv, nil
}

func newProber(o Options) (*prober, time.Duration, error) {
	root := filepath.Clean("/" + o.Root)
	if o.Root != "" && !filepath.IsAbs(o.Root) {
		abs, err := filepath.Abs(o.Root)
		if err != nil {
			return nil, 0, fmt.Errorf("find the recorded machine %s: %w", o.Root, err)
		}
		root = abs
	}
	if st, err := os.Stat(root); err != nil {
		return nil, 0, fmt.Errorf("open the recorded machine: %w", err)
	} else if !st.IsDir() {
		return nil, 0, fmt.Errorf("%s is not a directory; give the root directory of a machine", root)
	}
	limit := o.Limit
	if limit <= 0 {
		limit = DefaultLimit
	}
	p := &prober{
		tree: tree{root: root}, limit: limit / 3, env: rootEnv(root),
		board: o.Board, user: os.Geteuid(), arch: runtime.GOARCH,
	}
	if p.board.Name == "" {
		p.board = board.Detect(root)
	}
	if p.live() {
		p.ask = &asking{ataSpinning, askDisk}
	} else if err := p.asRecorded(); err != nil {
		return nil, 0, err
	}
	if o.User != nil {
		p.user = *o.User
	}
	return p, limit, nil
}

// run reads all sections at once and merges them in their order.
func (p *prober) run(ctx context.Context, limit time.Duration, inv *Inventory, sections []section) notes {
	type result struct {
		fill    func(*Inventory)
		missing notes
	}
	results := make([]chan result, len(sections))
	// A section learns of its end before it is given up on, so that it can
	// still hand over what it has.
	inner, cancel := context.WithTimeout(context.WithValue(ctx, common.EnvKey, p.env), limit*3/4)
	defer cancel()
	for i, s := range sections {
		results[i] = make(chan result, 1)
		go func() {
			r, err := within(ctx, limit, p.root+" section "+s.name, func() result {
				fill, missing := s.read(inner)
				return result{fill, missing}
			})
			if err != nil {
				r.missing.add(s.name, NoteTimeout, "", "not all of it "+err.Error())
			}
			results[i] <- r
		}()
	}
	var all notes
	for i := range sections {
		r := <-results[i]
		if r.fill != nil {
			r.fill(inv)
		}
		all = append(all, r.missing...)
	}
	return all
}

// rootEnv makes gopsutil read below root. It is set for the live machine too,
// so that variables in the environment of the agent cannot redirect it.
func rootEnv(root string) common.EnvMap {
	return common.EnvMap{
		common.HostProcEnvKey: filepath.Join(root, "proc"),
		common.HostSysEnvKey:  filepath.Join(root, "sys"),
		common.HostEtcEnvKey:  filepath.Join(root, "etc"),
		common.HostDevEnvKey:  filepath.Join(root, "dev"),
		common.HostRunEnvKey:  filepath.Join(root, "run"),
		common.HostVarEnvKey:  filepath.Join(root, "var"),
	}
}

// systemMounts are where the filesystems are that a machine starts and runs
// from. An image whose root is in memory or layered still has one of the others.
var systemMounts = []string{"/", "/usr", "/boot", "/boot/firmware", "/boot/efi", "/efi"}

// link says which filesystem is on which disk. Layers between the two (LVM,
// encryption, RAID) were resolved when the filesystem was read.
func link(inv *Inventory) {
	for i := range inv.Filesystems {
		f := &inv.Filesystems[i]
		on := func(name, dev string) bool {
			return f.dev == dev || f.Source == "/dev/"+name || slices.Contains(f.below, name)
		}
		system := slices.ContainsFunc(f.mounts, func(m string) bool { return slices.Contains(systemMounts, m) })
		found := ""
		for d := range inv.Disks {
			disk := &inv.Disks[d]
			here := false
			if on(disk.Name, disk.dev) {
				disk.Mounts = appendNew(disk.Mounts, f.mounts)
				here = true
			}
			for n := range disk.Partitions {
				part := &disk.Partitions[n]
				if on(part.Name, part.dev) {
					part.Mounts = appendNew(part.Mounts, f.mounts)
					here = true
				}
			}
			if here {
				found = firstOf(found, disk.Name)
				disk.System = disk.System || system
			}
		}
		f.Disk = firstOf(found, f.Disk)
	}
	printable(inv)
	for i := range inv.LEDs {
		inv.LEDs[i].Use = ledUse(inv.Board, inv.LEDs, inv.LEDs[i].Name)
	}
}

// printable cleans the kernel's names of disks, which until now were parts of paths.
func printable(inv *Inventory) {
	for i := range inv.Disks {
		d := &inv.Disks[i]
		d.Name = clean(d.Name)
		for n := range d.Partitions {
			d.Partitions[n].Name = clean(d.Partitions[n].Name)
		}
	}
	for i := range inv.Filesystems {
		inv.Filesystems[i].Disk = clean(inv.Filesystems[i].Disk)
	}
}

func appendNew(list, more []string) []string {
	for _, s := range more {
		if !slices.Contains(list, s) {
			list = append(list, s)
		}
	}
	return list
}

// ledUse finds what the profile says an LED is for. A profile names one light
// by several names; only the first of them that exists is meant.
func ledUse(b board.Board, leds []LED, name string) string {
	for _, l := range b.LEDs {
		for _, n := range l.Names {
			if slices.ContainsFunc(leds, func(x LED) bool { return x.Name == n }) {
				if n == name {
					return l.Use
				}
				break
			}
		}
	}
	return ""
}

// countModels joins names, with how often each occurs if they differ.
func countModels(models []string) string {
	n := map[string]int{}
	for _, m := range models {
		if m != "" {
			n[m]++
		}
	}
	names := slices.Sorted(maps.Keys(n))
	if len(names) == 1 {
		return names[0]
	}
	for i, m := range names {
		names[i] = fmt.Sprintf("%d × %s", n[m], m)
	}
	return strings.Join(names, " + ")
}
