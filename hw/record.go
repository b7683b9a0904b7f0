package hw

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/board"
)

// # Recorded machines
//
// A record is a directory that looks to a probe like the root of the machine that
// it was taken of. It holds the kernel files that a probe of that machine has
// read, with their content of that moment, the links and directories on the way to
// them, an empty file for each device file whose existence was asked for, and in
// deimos/ what is in no file:
//
//	deimos/machine.json          format, time, architecture, board, user
//	deimos/health/DISK.nvme      log page 02h as it came, 512 bytes
//	deimos/health/DISK.ata.json  attributes, thresholds and verdict of SMART
//
// Links are relative and stay inside; there are no devices, sockets or FIFOs. What a
// probe asks of system calls and not of files is not in it: addresses of network
// interfaces, sizes of filesystems, what periph finds.
//
// Unless it is exact, a record does not identify the machine or its people: serial numbers,
// hardware addresses, the boot id and the ids of 1-wire devices are replaced, the same by the
// same everywhere, in names of files too; of mounts those that are no storage of the machine's own
// are left out, and the names of people in /home and /media.
const (
	recordFormat  = 1
	recordAbout   = "deimos/machine.json"
	recordHealth  = "deimos/health/"
	recordFiles   = 50_000   // at most
	recordBytes   = 64 << 20 // at most
	recordedLinks = 40       // on the way to one file, as the kernel has it
)

// recorded is deimos/machine.json.
type recorded struct {
	Format int       `json:"format"`
	Taken  time.Time `json:"taken"`
	Arch   string    `json:"arch"`
	Board  string    `json:"board"` // name of its profile
	User   int       `json:"user"`  // numeric id that it was recorded as
	Exact  bool      `json:"exact"` // nothing was replaced
}

// asRecorded takes over what a record says about itself. A hand-made tree may say nothing.
func (p *prober) asRecorded() error {
	raw, err := p.bytes(recordAbout)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var r recorded
	if err == nil {
		err = json.Unmarshal(raw, &r)
	}
	if err != nil {
		return fmt.Errorf("read the recorded machine: %s: %w", recordAbout, err)
	}
	if r.Format != recordFormat {
		return fmt.Errorf("this machine was recorded in format %d; this program knows %d", r.Format, recordFormat)
	}
	p.arch, p.taken, p.user = clean(r.Arch), r.Taken.UTC().Truncate(time.Second), r.User
	if p.board.Name == r.Board {
		return nil
	}
	// The profile was chosen for the processor of the machine that reads.
	all, err := board.Profiles()
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(all, func(b board.Profile) bool { return b.Name == r.Board }); i >= 0 {
		p.board.Name, p.board.Title, p.board.Facts = all[i].Name, all[i].Title, all[i].Facts
	}
	return nil
}

// recordedHealth finds the pages of a disk. That they were read says that it was awake.
func (p *prober) recordedHealth(d *Disk) (pages, notes) {
	var missing notes
	var raw pages
	var err error
	if raw.nvme, err = p.bytes(recordHealth + d.Name + ".nvme"); err == nil {
		return raw, missing
	}
	text, err := p.bytes(recordHealth + d.Name + ".ata.json")
	if err == nil {
		raw.ata = &ataPages{}
		err = json.Unmarshal(text, raw.ata)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		d.Power = PowerUnknown
		missing.add("disks", NoteUnsupported, d.Name, "its health is not in the recording")
		return pages{}, missing
	case err != nil:
		missing.add("disks", NoteUnreadable, d.Name, "its health could not be read: "+clean(err.Error()))
		return pages{}, missing
	}
	if d.Bridge != nil {
		d.Bridge.SAT = true
	}
	return raw, missing
}

// sightings collects what a probe reads. A nil one keeps nothing. Safe for
// concurrent use; what a reading that was given up on brings later is not kept.
type sightings struct {
	mu     sync.Mutex
	closed bool
	files  map[string][]byte
	names  map[string]bool // that exist
	bytes  int
}

func (s *sightings) file(name string, raw []byte) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.bytes += len(raw) - len(s.files[name])
	s.files[name] = slices.Clone(raw)
}

func (s *sightings) asked(name string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.names[name] = true
	}
}

func (s *sightings) health(disk string, p pages) {
	switch {
	case s == nil:
	case p.nvme != nil:
		s.file(recordHealth+disk+".nvme", p.nvme)
	case p.ata != nil:
		raw, err := json.MarshalIndent(p.ata, "", " ")
		if err == nil { // numbers and texts
			s.file(recordHealth+disk+".ata.json", append(raw, '\n'))
		}
	}
}

// close ends the collection.
func (s *sightings) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

// RecordOptions says what to record and where.
type RecordOptions struct {
	Options
	Dir   string // made; must be new or empty
	Exact bool   // keep what identifies the machine
}

// Record probes this machine and writes what it read to a directory, which
// [Probe] takes as a root. It returns the inventory.
func Record(ctx context.Context, o RecordOptions) (*Inventory, error) {
	if err := emptyDir(o.Dir); err != nil {
		return nil, err
	}
	p, limit, err := newProber(o.Options)
	if err != nil {
		return nil, err
	}
	p.seen = &sightings{files: map[string][]byte{}, names: map[string]bool{}}
	inv, err := p.probe(ctx, limit)
	if err != nil {
		return nil, err
	}
	if err := p.readForLibraries(ctx, limit); err != nil {
		return nil, err
	}
	about, err := json.Marshal(recorded{recordFormat, inv.Taken, p.arch, inv.Board.Name, p.user, o.Exact})
	if err != nil {
		return nil, err
	}
	p.seen.file(recordAbout, append(about, '\n'))
	p.seen.close()
	if !o.Exact {
		p.seen.anonymize(nodevTypes(tree{root: p.root}))
	}
	w := &recordWriter{root: p.root, dir: o.Dir, mask: strings.NewReplacer()}
	if !o.Exact {
		w.mask = p.seen.mask()
	}
	if err := w.write(p.seen); err != nil {
		return nil, fmt.Errorf("write the record: %w", err)
	}
	return inv, nil
}

func emptyDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the folder for the record: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("open the folder for the record: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s is not empty; name a new folder for the record", dir)
	}
	return nil
}

// readForLibraries reads what gopsutil and package board have read past our tree.
func (p *prober) readForLibraries(ctx context.Context, limit time.Duration) error {
	_, err := within(ctx, limit, p.root+" record", func() struct{} {
		for _, name := range []string{
			"proc/cpuinfo", "proc/meminfo", "proc/device-tree/compatible", "proc/device-tree/model",
			"sys/class/dmi/id/sys_vendor", "sys/class/dmi/id/product_name",
		} {
			p.word(name)
		}
		for _, cpu := range p.list("sys/devices/system/cpu") {
			if !numberedCPU.MatchString(cpu) {
				continue
			}
			for _, name := range []string{"cpufreq/cpuinfo_max_freq", "topology/core_id", "topology/physical_package_id"} {
				p.word("sys/devices/system/cpu/" + cpu + "/" + name)
			}
		}
		return struct{}{}
	})
	return err
}

var numberedCPU = regexp.MustCompile(`^cpu\d+$`)

// recordWriter lays a record out in a directory.
type recordWriter struct {
	root, dir string
	mask      *strings.Replacer
	links     map[string]string // where it is, masked: where it leads to, both below the root
}

func (w *recordWriter) write(s *sightings) error {
	if len(s.files)+len(s.names) > recordFiles || s.bytes > recordBytes {
		return fmt.Errorf("this machine has %d files of %d bytes to record; %d files of %d bytes are the limit", len(s.files)+len(s.names), s.bytes, recordFiles, recordBytes)
	}
	w.links = map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(s.files)) {
		at, err := w.place(name)
		if err != nil {
			return err
		}
		if err := w.file(at, s.files[name]); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.names)) {
		if err := w.entry(name); err != nil {
			return err
		}
	}
	for at, to := range w.links {
		if err := w.link(at, to); err != nil {
			return err
		}
	}
	return nil
}

// place follows the links on the way to a file, notes them, and returns where it really is.
func (w *recordWriter) place(name string) (string, error) {
	left, done := strings.Split(path.Clean(name), "/"), ""
	for hops := 0; len(left) > 0; {
		next := path.Join(done, left[0])
		left = left[1:]
		target, err := os.Readlink(filepath.Join(w.root, next))
		if err != nil || next == "proc/self" { // a number that is another in each process
			done = next
			continue
		}
		if hops++; hops > recordedLinks {
			return "", fmt.Errorf("%s is behind more than %d links", name, recordedLinks)
		}
		if !path.IsAbs(target) {
			target = path.Join(done, target)
		}
		to := strings.TrimPrefix(path.Clean("/"+target), "/") // never above the root
		w.links[w.mask.Replace(next)] = w.mask.Replace(to)
		left, done = append(strings.Split(to, "/"), left...), ""
	}
	return w.mask.Replace(done), nil
}

func (w *recordWriter) file(at string, raw []byte) error {
	p := filepath.Join(w.dir, at)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	return os.WriteFile(p, raw, 0o644)
}

// entry makes what was asked for: a directory, or an empty file for anything else that was not read.
func (w *recordWriter) entry(name string) error {
	at, err := w.place(name)
	if err != nil {
		return err
	}
	st, err := os.Stat(filepath.Join(w.root, name))
	if err != nil {
		return nil // gone meanwhile, or a link to nowhere
	}
	p := filepath.Join(w.dir, at)
	if st.IsDir() {
		return os.MkdirAll(p, 0o755)
	}
	if _, err := os.Lstat(p); err == nil {
		return nil
	}
	return w.file(at, nil)
}

func (w *recordWriter) link(at, to string) error {
	p := filepath.Join(w.dir, at)
	target, err := filepath.Rel(path.Dir("/"+at), "/"+to)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	return os.Symlink(target, p)
}

// secretFiles are what identifies a machine, by the name of the file.
var secretFiles = regexp.MustCompile(`^sys/block/.*/(serial|wwid)$|^sys/class/net/.*/address$|^proc/sys/kernel/random/boot_id$`)

var (
	oneWireID  = regexp.MustCompile(`\b[0-9a-f]{2}-([0-9a-f]{12})\b`)
	cpuSerial  = regexp.MustCompile(`(?m)^Serial\s*:\s*(\S+)$`)
	peoplesDir = regexp.MustCompile(`(/home|/run/media|/media)/[^/ ]+`)
)

// anonymize rewrites the files in which more than single values identify somebody.
func (s *sightings) anonymize(nodev map[string]bool) {
	if raw, ok := s.files["proc/self/mountinfo"]; ok {
		s.files["proc/self/mountinfo"] = plainMounts(raw, nodev)
	}
}

// plainMounts keeps of the mounts those on the machine's own storage, without
// the options of filesystems and the names of people.
func plainMounts(raw []byte, nodev map[string]bool) []byte {
	var out strings.Builder
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		sep := slices.Index(f, "-")
		if sep < 6 || len(f) < sep+3 || (f[4] != "/" && (nodev[f[sep+1]] || strings.HasPrefix(f[sep+1], "fuse."))) {
			continue
		}
		options := "rw"
		if len(f) > sep+3 && slices.Contains(strings.Split(f[sep+3], ","), "ro") {
			options = "ro"
		}
		f = append(f[:sep+3], options)
		for _, i := range []int{3, 4} {
			f[i] = peoplesDir.ReplaceAllString(f[i], "$1/somebody")
		}
		out.WriteString(strings.Join(f, " ") + "\n")
	}
	return []byte(out.String())
}

// mask replaces each secret by one of the same look, in contents and in names.
func (s *sightings) mask() *strings.Replacer {
	secrets := map[string]string{}
	hide := func(secret, with string) {
		if len(secret) >= 6 && strings.Trim(secret, "0:-. ") != "" { // less identifies nothing, and would be replaced where it is something else
			secrets[secret] = with
		}
	}
	for name, raw := range s.files {
		text := strings.TrimSpace(string(raw))
		switch {
		case strings.HasSuffix(name, "/vpd_pg80") && len(raw) > 4:
			serial := strings.Trim(string(raw[4:]), " \x00")
			hide(serial, lookalike(serial, 0))
		case strings.HasSuffix(name, "/address") && secretFiles.MatchString(name):
			other := lookalike(text, 9) // keeps the maker
			hide(text, other)
			hide(strings.ReplaceAll(text, ":", ""), strings.ReplaceAll(other, ":", "")) // in the interface's name
		case secretFiles.MatchString(name):
			kind, _, dotted := strings.Cut(text, ".") // "eui.", "naa.", "t10.", "nvme."
			keep := 0
			if dotted && strings.HasSuffix(name, "wwid") {
				keep = len(kind) + 1
			}
			hide(text, lookalike(text, keep))
		case name == "proc/cpuinfo": // of ARM
			for _, m := range cpuSerial.FindAllStringSubmatch(text, -1) {
				hide(m[1], lookalike(m[1], 0))
			}
		}
		for _, m := range oneWireID.FindAllStringSubmatch(name+" "+text, -1) {
			if _, ok := secrets[m[1]]; !ok {
				hide(m[1], lookalike(m[1], 0))
			}
		}
	}
	order := slices.SortedFunc(maps.Keys(secrets), func(a, b string) int { return cmp.Or(len(b)-len(a), cmp.Compare(a, b)) })
	var pairs []string
	for _, secret := range order {
		pairs = append(pairs, secret, secrets[secret])
	}
	r := strings.NewReplacer(pairs...)
	for name, raw := range s.files {
		s.files[name] = []byte(r.Replace(string(raw)))
	}
	return r
}

// lookalike draws a text of the same length with digits for digits and letters
// for letters, from keep on. Hexadecimal stays so.
func lookalike(secret string, keep int) string {
	random := make([]byte, len(secret))
	_, _ = rand.Read(random) // never fails
	const digits, small, large = "0123456789", "abcdef", "ABCDEF"
	out := []byte(secret)
	for i := min(keep, len(out)); i < len(out); i++ {
		switch c := out[i]; {
		case c >= '0' && c <= '9':
			if i+1 < len(out) && c == '0' && out[i+1] == 'x' {
				continue
			}
			out[i] = digits[random[i]%10]
		case c >= 'a' && c <= 'z' && c != 'x':
			out[i] = small[random[i]%6]
		case c >= 'A' && c <= 'Z':
			out[i] = large[random[i]%6]
		case c >= 0x80:
			out[i] = hex.EncodeToString(random[i : i+1])[0]
		}
	}
	return string(out)
}
