// Package firmware keeps two images of a whole firmware on the EFI system
// partition, and lets systemd-boot try the new one before it is kept. It is to a
// device that boots our image what package slot is to an agent under its
// launcher. (It is a package of its own, so that the launcher does not carry it.)
//
// # Parties
//
// An image is a unified kernel image: kernel, command line, initramfs and agent
// in one file. The agent installs one, restarts the machine, and confirms it from
// inside once it is healthy. systemd-boot chooses and counts, as the Boot Loader
// Specification says under "boot counting". It takes the newest version (of the
// image's own .osrel, which must say what the file name says; see [ImageVersion]) among those that
// are not used up, and before it starts one with a counter it pays for the try:
//
//	EFI/Linux/deimos_VERSION.efi              confirmed
//	EFI/Linux/deimos_VERSION+LEFT.efi         to be tried LEFT times
//	EFI/Linux/deimos_VERSION+LEFT-DONE.efi    tried DONE times; with LEFT 0 used up: taken only if nothing else is there
//	EFI/Linux/deimos_VERSION….efi.tmp         an install or a removal in progress; worthless after a cut
//	EFI/Linux/deimos-uncounted.txt            the boot loader of this machine cannot count: no updates
//	STATE/firmware.json                       the order of the trial, and how the last one ended
//
// Which one runs is told by the release file in its own initramfs: that comes out
// of the image itself, where the boot loader's variables need a firmware that
// keeps them. So no two images may have the same version.
//
// # States
//
//	on the ESP             runs   is                     leaves it by
//	1                      1      settled                Install 2
//	1, 2+3.tmp             1      settled, cut in the    Settled, which removes 2
//	                              install or removal of 2
//	1, 2+3                 1      on trial               restart; after one it was passed over: as rolled back
//	1, 2+3, no record      1      nobody's trial         Settled: removes 2
//	1, 2+2-1               2      being tried            Confirm, or a restart
//	1, 2+0-3               2      the last try           the same
//	1, 2+0-3               1      rolled back            Settled: reports, and removes 2
//	1, 2                   2      settled, 1 kept        Install 3, which removes 1 first
//	1+2-1                  1      new device             Confirm, or Install, which confirms 1 first
//	1+2-1, 1               1      settled, cut           nothing; 1+2-1 goes with the next Confirm if it is a copy
//
// # What always holds
//
//   - The image that runs and the newest confirmed one are never written to and
//     never removed. So at any moment there is an image to boot that was whole and
//     on the disk before.
//   - FAT has no journal and keeps no order: what was not synced may be there in
//     any part, and a rename is two changes, of which either may be missing. So an
//     image gets a name that boots only after its bytes are synced, and changes
//     that rely on one another have a sync of the directory between them. (Linux
//     syncs a FAT file with its part of the allocation table.)
//   - Linux puts a renamed file into its directory empty, and says where it lies when
//     the file itself is synced; a sync of the directory does not. So a rename is
//     followed by both, and a file without bytes is none: the boot loader passes
//     over it, and so do we.
//   - A rename that is cut between its two changes leaves two names of the same
//     blocks, and FAT has no such thing: who removes one frees the blocks of the
//     other. So a file that shares its first block with another (or that may, where
//     the kernel does not tell) is left alone. It takes its space until the
//     partition is checked with fsck.vfat, while it is not mounted.
//   - What is removed loses the name that boots first, for FAT frees the blocks of a
//     file before its name is gone.
//   - A reset to factory takes the record of a trial and leaves its image. One that
//     runs goes on being tried, and is confirmed in the next fleet or given up. One
//     that does not run is removed: nobody waits for it, and while it is there nothing
//     else can be installed. It never goes unless the image that runs is there.
//   - A rename may lose the file: that costs a new image, never the old one. With
//     no other confirmed image beside it an image is not renamed to be confirmed,
//     but copied, and the counted name removed after.
//   - The order of a trial is on disk before its image, and the outcome before the
//     used-up image goes, so that no roll-back goes unreported.
//
// All methods may be called again after any cut; they then finish, or do nothing.
//
// A version that is older than the one that runs cannot be installed: the boot
// loader would not take it. A machine whose boot loader does not take the new one
// either, because it starts from another disk, say, must not restart for ever: a
// trial that a later boot finds untouched is over.
//
// # Who ends a trial
//
// The boot loader counts starts; somebody must also start anew a machine whose new
// firmware does not work, and that is the image's process 1, by [Store.OnTrial]. It
// spends tries on a firmware that crashes, or hangs, or is not confirmed though the
// coordinator answers; while that cannot be reached, which is seldom the firmware's
// fault, a try may last much longer, but not for ever. (Three power cuts in a row
// during a trial end it all the same: the counter cannot tell them from crashes.)
//
// systemd-boot counts by a rename through UEFI. Older U-Boot refuses that, and
// systemd-boot then starts the image with its counter as it is. So the count that a start has
// left is remembered, and process 1 pays for a start that finds it unchanged: [Store.CountStart].
//
// That does not help where process 1 is not reached: the kernel of such an image
// would be started for ever. Nothing that such a loader obeys can be written (its
// variable LoaderEntryOneShot neither, as the same U-Boot keeps none of Linux), so a
// machine of which this is known takes no firmware by update. It is known since the
// first boot of a new device, which runs an image that still says "to be tried 3
// times": [Store.NoteLoader]. The note is a file beside the images, as it belongs to the
// machine, not to the fleet; and so that an owner who has mended the loader can delete it.
package firmware

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"

	"github.com/deimos-edge/deimos/ota/slot"
)

// margin is left free on the ESP, in bytes: for directories, and the boot loader's own files.
const margin = 1 << 20

// ErrRunning is returned for an install of the version that runs.
var ErrRunning = errors.New("this firmware runs already")

// ErrOlder is returned for an install of a version that the boot loader would pass over.
var ErrOlder = errors.New("this firmware is older than the one that runs, which the boot loader would take instead")

// ErrUnknown is returned when the image that runs is not on the ESP.
var ErrUnknown = errors.New("the image of the firmware that runs is not on the EFI system partition")

// ErrTwice is returned when a power cut has left a file that a new one would collide with.
var ErrTwice = errors.New("a power cut has left two names of one file on the EFI system partition; check it with fsck.vfat")

// ErrUncounted is returned for an install on a machine whose boot loader cannot count starts.
var ErrUncounted = errors.New("the boot loader of this machine cannot count the starts of a firmware, so one that does not start could never be left; write the new image to the disk. " +
	"If the boot loader or the UEFI was mended, delete " + uncounted + " in " + Folder + " on the first partition")

// uncounted is the file that says so.
const uncounted = "deimos-uncounted.txt"

// Env is the environment variable by which the image's process 1 tells the agent
// where the EFI system partition is mounted, read-write. Folder is the folder of
// the images there.
const (
	Env    = "DEIMOS_ESP"
	Folder = "EFI/Linux"
)

// ErrSpace is returned when an image does not fit.
var ErrSpace = errors.New("the EFI system partition has too little room")

// record is what is remembered outside of the ESP.
type record struct {
	Trial *trial        `json:"trial,omitempty"`
	Last  *slot.Outcome `json:"last,omitempty"`
}

type trial struct {
	Order  string `json:"order"`
	From   string `json:"from"`
	To     string `json:"to"`
	SHA256 string `json:"sha256"`
	Boot   string `json:"boot,omitempty"` // of the machine, during which it was installed
	Left   int    `json:"left,omitempty"` // tries, after its last start
}

// Trial is an image that has not been confirmed yet.
type Trial struct {
	Order   string
	Version string
	Running bool // it is the one that runs
}

// Store is the firmware images of one device. One process has it at a time.
type Store struct {
	disk    disk
	running string // as [ImageVersion] has it, and so all versions in here
	boot    string
	mu      sync.Mutex
}

// Open uses the images on the ESP mounted at esp. running is the version that
// runs, of the release file in its initramfs; boot the kernel's id of this boot,
// empty if unknown.
func Open(esp, stateDir, running, boot string) (*Store, error) {
	version, err := ImageVersion(running)
	if err != nil {
		return nil, err
	}
	return &Store{disk: &mounted{esp: filepath.Join(esp, Folder), state: stateDir}, running: version, boot: boot}, nil
}

// Install puts a new image on trial: from the next start of the machine on it is
// tried [slot.Tries] times. content is size bytes with the digest image.SHA256,
// which must be given; check looks at them on the disk, before they can boot.
// A repeat of an order that is on trial does nothing.
//
// Errors: [slot.ErrBusy] while an image is on trial, [ErrRunning], [ErrOlder],
// [ErrSpace], [ErrUnknown], [ErrUncounted]; else the content, its check or the disk failed, and nothing has
// changed but that an older image was removed to make room.
func (s *Store) Install(ctx context.Context, order string, image slot.Image, size int64, content io.Reader, check func(io.ReaderAt) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	version, err := ImageVersion(image.Version)
	if err != nil {
		return err
	}
	if err := s.loaderCounts(); err != nil {
		return err
	}
	if onTrial, err := s.onTrial(); err != nil {
		return err
	} else if !onTrial {
		if err := s.confirm(ctx); err != nil { // a new device's, which must not be the one to be lost
			return err
		}
	}
	if _, err := s.settle(); err != nil {
		return err
	}
	all, rec, err := s.look()
	if err != nil {
		return err
	}
	if t := rec.Trial; t != nil && t.Order == order && t.To == version && t.SHA256 == image.SHA256 && all.has(func(f file) bool { return f.version == t.To }) {
		return nil
	}
	current, _ := all.find(s.running)
	switch order := compareVersions(version, s.running); {
	case order == 0:
		return ErrRunning
	case order < 0:
		return ErrOlder
	case current.counted, all.has(func(f file) bool { return f.counted && f.left > 0 && f.version != s.running }):
		return slot.ErrBusy
	case all.has(func(f file) bool { return !f.counted && compareVersions(f.version, s.running) > 0 }):
		return fmt.Errorf("a newer firmware than the one that runs is confirmed; restart to use it: %w", slot.ErrBusy)
	}
	old, err := s.toRemove(all, version, size)
	if err != nil {
		return err
	}
	if err := s.remove(old); err != nil {
		return err
	}
	rec.Trial = &trial{Order: order, From: s.running, To: version, SHA256: image.SHA256, Boot: s.boot, Left: slot.Tries}
	if err := s.disk.save(rec); err != nil {
		return err
	}
	return s.write(file{version: version, counted: true, left: slot.Tries}, size, image.SHA256, reader{ctx, content}, check)
}

// Running opens the image that runs, and tells its size in bytes.
func (s *Store) Running() (image interface {
	io.ReaderAt
	io.Closer
}, size int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := s.disk.list()
	if err != nil {
		return nil, 0, err
	}
	mine, ok := all.find(s.running)
	if !ok {
		return nil, 0, ErrUnknown
	}
	in, err := s.disk.open(mine.name)
	return in, mine.size, err
}

// CheckRoom tells, as an error, whether an image of that version and size would
// not fit, once the older ones are gone, or [ErrUncounted].
func (s *Store) CheckRoom(version string, size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.loaderCounts(); err != nil {
		return err
	}
	version, err := ImageVersion(version)
	if err != nil {
		return err
	}
	all, err := s.disk.list()
	if err != nil {
		return err
	}
	_, err = s.toRemove(all, version, size)
	return err
}

// toRemove is all but the image that runs, if that makes room enough for one
// of that version and size.
func (s *Store) toRemove(all images, version string, size int64) (old []string, err error) {
	free, err := s.disk.free()
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		switch {
		case !f.tmp && f.version == s.running:
		case !s.shares(f, all):
			old = append(old, f.name)
			free += f.size
		case f.version == version:
			return nil, ErrTwice
		}
	}
	if free < size+margin {
		return nil, fmt.Errorf("%w: %d MiB are free for an image of %d MiB; delete other files there", ErrSpace, free>>20, size>>20)
	}
	return old, nil
}

// shares tells whether a file may have the same blocks as another one.
func (s *Store) shares(f file, all images) bool {
	for _, other := range all {
		if other.name == f.name || other.size != f.size || f.size == 0 {
			continue
		}
		if same, err := s.disk.same(f.name, other.name); same || err != nil {
			return true
		}
	}
	return false
}

// remove removes files, and returns when they are gone for good. FAT frees the
// blocks of a file before its name is gone, so one that could boot loses that name
// first: a cut would leave it broken, and the boot loader may prefer it.
func (s *Store) remove(names []string) error {
	if len(names) == 0 {
		return nil
	}
	var aside []string
	for _, name := range names {
		if !strings.HasSuffix(name, asideEnd) {
			if err := s.disk.rename(name, name+asideEnd); err != nil {
				return err
			}
			name += asideEnd
		}
		aside = append(aside, name)
	}
	if err := s.disk.sync(); err != nil {
		return err
	}
	for _, name := range aside {
		if err := s.disk.remove(name); err != nil {
			return err
		}
	}
	return s.disk.sync()
}

// write makes a new image, aside first. What was left aside is written over.
func (s *Store) write(f file, size int64, sum string, content io.Reader, check func(io.ReaderAt) error) error {
	aside := f.String() + asideEnd
	out, err := s.disk.create(aside)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), io.LimitReader(content, size+1))
	if got := hex.EncodeToString(h.Sum(nil)); err == nil && (n != size || got != sum) {
		err = fmt.Errorf("the image is not what was announced: %d bytes with SHA-256 %.12s…, expected %d with %.12s…", n, got, size, sum)
	}
	if err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", aside, err), s.disk.remove(aside))
	}
	if err := s.check(aside, check); err != nil {
		return errors.Join(err, s.disk.remove(aside))
	}
	return s.rename(aside, f.String())
}

func (s *Store) check(name string, check func(io.ReaderAt) error) error {
	if check == nil {
		return nil
	}
	in, err := s.disk.open(name)
	if err != nil {
		return err
	}
	return errors.Join(check(in), in.Close())
}

func (s *Store) rename(from, to string) error {
	if err := s.disk.rename(from, to); err != nil {
		return err
	}
	if err := s.disk.place(to); err != nil {
		return err
	}
	return s.disk.sync()
}

// OnTrial tells whether the image that runs must be confirmed, or the machine goes
// back to another. The only firmware of a new device is not on trial.
func (s *Store) OnTrial() (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.onTrial()
}

func (s *Store) onTrial() (bool, error) {
	all, err := s.disk.list()
	mine, ok := all.find(s.running)
	return ok && mine.counted && all.has(s.isOther), err
}

// NoteLoader notes for good if the boot loader did not count this start, though
// the image has a counter: its name is as it was made. To be called once in each start of
// the machine, before [Store.CountStart], which renames it.
func (s *Store) NoteLoader() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := s.disk.list()
	if err != nil {
		return err
	}
	if mine := all.nextTry(s.running); mine.name == "" || mine.tried > 0 || errors.Is(s.loaderCounts(), ErrUncounted) {
		return nil
	}
	out, err := s.disk.create(uncounted)
	if err != nil {
		return err
	}
	_, err = io.WriteString(out, "Deimos: "+ErrUncounted.Error()+".\n")
	return errors.Join(err, out.Sync(), out.Close(), s.disk.sync())
}

// loaderCounts returns [ErrUncounted] if it is noted that the boot loader does not.
func (s *Store) loaderCounts() error {
	note, err := s.disk.open(uncounted)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	return errors.Join(ErrUncounted, note.Close())
}

// CountStart pays for this start of an image on trial if the boot loader could
// not: some UEFI cannot rename files, and on those a trial would never end. To be
// called once in each start of the machine, before the agent; it does nothing for
// an image that is not on trial, or on its last try. An error means that this start
// is not paid for: a restart may come to the same image for ever.
func (s *Store) CountStart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	on, err := s.onTrial()
	if err != nil || !on {
		return err
	}
	all, rec, err := s.look()
	if err != nil {
		return err
	}
	mine := all.nextTry(s.running)
	paid := file{version: s.running, counted: true, left: mine.left - 1, tried: mine.tried + 1}
	known := rec.Trial != nil && rec.Trial.To == s.running
	if known {
		t := *rec.Trial // before the name: a cut between the two pays at the next start
		before := t.Left
		if t.Left = mine.left; mine.left > 0 && mine.left >= before {
			t.Left = paid.left
		}
		rec.Trial = &t
		if err = s.disk.save(rec); err == nil && t.Left == mine.left {
			return nil
		}
	}
	// Where nothing can be remembered, the boot loader may have paid, too: better twice than never.
	switch {
	case mine.left == 0:
		return nil
	case all.has(func(f file) bool { return f.String() == paid.String() }):
		return fmt.Errorf("this start of the firmware is not counted: %w", ErrTwice)
	}
	if err := s.rename(mine.name, paid.String()); err != nil {
		return fmt.Errorf("neither the boot loader nor Linux can count the starts of this firmware: %w", err)
	}
	return nil
}

// Counter reads the counter in the name of an image, such as in the boot loader's
// variable LoaderBootCountPath: a path with either kind of slash. ok is false for
// a name without one.
func Counter(path string) (left, tried int, ok bool) {
	f, is := parseName(path[strings.LastIndexAny(path, `/\`)+1:])
	return f.left, f.tried, is && f.counted && !f.tmp
}

// isOther tells of an image to go back to.
func (s *Store) isOther(f file) bool { return f.version != s.running && !f.counted }

// Confirm makes the image that runs the one to keep. It does nothing if it is
// that already. The only firmware of a new device is copied for it, which ends with ctx.
func (s *Store) Confirm(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.confirm(ctx)
}

func (s *Store) confirm(ctx context.Context) error {
	all, err := s.disk.list()
	if err != nil {
		return err
	}
	mine, ok := all.find(s.running)
	switch {
	case !ok:
		return ErrUnknown
	case mine.counted && all.has(s.isOther):
		return s.rename(mine.name, file{version: s.running}.String())
	case mine.counted:
		if err := s.copy(ctx, mine, file{version: s.running}); err != nil {
			return err
		}
		return s.remove([]string{mine.name}) // it is a copy for certain
	}
	var rest []string
	for _, f := range all {
		if !f.tmp && f.version == s.running && f.counted && !s.shares(f, all) {
			rest = append(rest, f.name)
		}
	}
	return s.remove(rest)
}

// copy writes an image a second time, under another name.
func (s *Store) copy(ctx context.Context, from, to file) error {
	if free, err := s.disk.free(); err != nil || free < from.size+margin {
		return cmp.Or(err, fmt.Errorf("%w to confirm the only firmware: %d MiB are free, %d are needed; delete other files there", ErrSpace, free>>20, (from.size+margin)>>20))
	}
	in, err := s.disk.open(from.name)
	if err != nil {
		return err
	}
	sum := sha256.New()
	if _, err = io.Copy(sum, reader{ctx, io.NewSectionReader(in, 0, from.size)}); err == nil {
		err = s.write(to, from.size, hex.EncodeToString(sum.Sum(nil)), reader{ctx, in}, nil)
	}
	return errors.Join(err, in.Close())
}

// State tells which image is on trial, nil if none is, and how the last trial ended.
func (s *Store) State() (*Trial, *slot.Outcome, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last, err := s.settle()
	if err != nil {
		return nil, nil, err
	}
	all, rec, err := s.look()
	if err != nil {
		return nil, nil, err
	}
	if t := rec.Trial; t != nil {
		if f, ok := all.find(t.To); ok && f.counted {
			return &Trial{Order: t.Order, Version: releaseOf(t.To), Running: t.To == s.running}, last, nil
		}
	}
	return nil, last, nil
}

// Settled tells how the last trial ended, nil if there was none or it is not
// decided. It keeps telling until the next one has ended, as what is reported can
// be lost; the order tells a repeat. It removes an image that was rolled back, or
// whose order is forgotten.
func (s *Store) Settled() (*slot.Outcome, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.settle()
}

// Reported notes that the outcome of this order is told.
func (s *Store) Reported(order string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, err := s.disk.load()
	if err != nil || rec.Last == nil || rec.Last.Order != order || rec.Last.Reported {
		return err
	}
	last := *rec.Last
	last.Reported = true
	rec.Last = &last
	return s.disk.save(rec)
}

func (s *Store) settle() (*slot.Outcome, error) {
	all, rec, err := s.look()
	if err != nil {
		return nil, err
	}
	if result, reason := s.result(all, rec.Trial); result != "" {
		t := rec.Trial
		rec.Last, rec.Trial = &slot.Outcome{Order: t.Order, From: releaseOf(t.From), To: releaseOf(t.To), Result: result, Reason: reason}, nil
		if err := s.disk.save(rec); err != nil {
			return nil, err
		}
	}
	_, here := all.find(s.running)
	over := func(f file) bool { return f.left == 0 || rec.Trial == nil || rec.Trial.To != f.version }
	var bad []string
	for _, f := range all {
		given := here && f.counted && f.version != s.running && over(f)
		if (f.tmp || given) && !s.shares(f, all) { // what is aside was cut off, in its making or its removal
			bad = append(bad, f.name)
		}
	}
	return rec.Last, s.remove(bad)
}

// result is empty for a trial that is not decided.
func (s *Store) result(all images, t *trial) (result slot.Result, reason string) {
	if t == nil {
		return "", ""
	}
	f, ok := all.find(t.To)
	switch {
	case !ok:
		return "", "" // it never began
	case !f.counted:
		return slot.Confirmed, ""
	case t.To == s.running:
		return "", ""
	case f.left == 0:
		return slot.RolledBack, fmt.Sprintf("not confirmed in %d starts of the machine", slot.Tries)
	case t.Boot != "" && s.boot != "" && t.Boot != s.boot:
		return slot.RolledBack, fmt.Sprintf("the boot loader has started version %s all the same; is there another disk that it starts from?", releaseOf(s.running))
	}
	return "", ""
}

func (s *Store) look() (images, record, error) {
	rec, err := s.disk.load()
	if err != nil {
		return nil, rec, err
	}
	all, err := s.disk.list()
	return all, rec, err
}

// reader ends with its context.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}
