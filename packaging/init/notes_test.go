package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/packaging/init/gpt"
)

// at lets a dataDisk see these devices. (A test has one dataDisk, and attaches its disks
// before: its reaper would take the end of what it did not start.)
func at(d *dataDisk, devices ...string) *dataDisk {
	d.disks = func() (all []blockDevice) {
		for _, device := range devices {
			if b, err := lookAt(device); err == nil {
				all = append(all, b)
			}
		}
		return all
	}
	return d
}

// use makes the data partition, and notes it.
func use(t *testing.T, d *dataDisk) partition {
	t.Helper()
	p, err := d.prepare(t.Context())
	if err == nil {
		err = d.remember(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNoteThatCannotBeReadIsNoMissingNote(t *testing.T) {
	for name, spoil := range map[string]func(note string) error{
		"empty":      func(note string) error { return os.WriteFile(note, nil, 0o600) },
		"unreadable": func(note string) error { return errors.Join(os.Remove(note), os.Mkdir(note, 0o700)) },
		"garbage":    func(note string) error { return os.WriteFile(note, []byte("\xff\xff\x00garbage"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			esp := t.TempDir()
			ours, _ := diskOf(t, 600<<20)
			empty, _ := diskOf(t, 600<<20)
			d, _ := dataOn(t, ours, esp)
			p := use(t, d)
			note := filepath.Join(esp, dataNote)
			if err := spoil(note); err != nil {
				t.Fatal(err)
			}
			without := at(d, empty)
			if q, err := without.prepare(t.Context()); err == nil || !strings.Contains(err.Error(), dataNote) {
				t.Errorf("its disk is late: %s, %v", q.path, err)
			}
			if disk, err := lookAt(empty); err != nil || disk.parted {
				t.Errorf("an empty disk was written to: %v", err)
			}
			if !without.hadData() {
				t.Error("it would run from memory, as another device")
			}
			with := at(d, ours)
			if q, err := with.prepare(t.Context()); err != nil || q.ID != p.ID {
				t.Errorf("its disk is there: %s, %v", q.path, err)
			}
			if name == "unreadable" {
				return // and so it cannot be replaced
			}
			if err := with.remember(p); err != nil || readWord(note) != p.ID.String() {
				t.Errorf("the note is not mended: %q, %v", readWord(note), err)
			}
		})
	}
}

func TestNoteThatAPartitionIsNewEndsBeforeItIsMounted(t *testing.T) {
	device, _ := diskOf(t, 600<<20)
	d, s := dataOn(t, device, t.TempDir())
	p, err := d.prepare(t.Context()) // and never a note of it: the ESP failed, or the power
	if err != nil {
		t.Fatal(err)
	}
	uuid := uuidOf(t, p)
	wipe(t, p.path, 2048)
	if _, err := d.prepare(t.Context()); err != nil {
		t.Errorf("%v; %q", err, s.lines)
	} else if uuidOf(t, p) != uuid {
		t.Error("a partition that may have been used was formatted")
	}
	write(t, filepath.Join(d.esp, freshNote), p.ID.String()+"\n") // formatted, and then the power was cut
	if _, err := d.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exists(filepath.Join(d.esp, freshNote)) {
		t.Error("a partition with a file system is still noted as new")
	}
}

func TestNoteIsDurableUnderItsName(t *testing.T) {
	esp := t.TempDir()
	note := filepath.Join(esp, dataNote)
	id := newGUID()
	var synced []string
	d := &dataDisk{esp: esp, synced: func(path string) {
		if readWord(note) == id.String() {
			synced = append(synced, path)
		}
	}}
	if err := d.remember(partition{Partition: gpt.Partition{ID: id}}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(synced, []string{note, esp}) {
		t.Errorf("made durable after it was renamed: %q", synced)
	}
}

func TestOfCopiesOfADataPartitionNoneIsTakenButTheOneBesideTheESP(t *testing.T) {
	esp := t.TempDir()
	ours, _ := diskOf(t, 600<<20)
	clone, image := diskOf(t, 600<<20)
	other, _ := diskOf(t, 600<<20)
	d, _ := dataOn(t, other, t.TempDir())
	use(t, d)
	d.esp = esp
	p := use(t, at(d, ours))
	raw, err := os.ReadFile(ours)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(image, raw, 0o600), dropCaches()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		esp, second string
		lost        bool
	}{
		"a copy":                     {esp: esp, second: clone},
		"a copy, no note":            {esp: t.TempDir(), second: clone},
		"another device's, no note":  {esp: t.TempDir(), second: other},
		"another device's, ESP lost": {lost: true, second: other},
	} {
		for _, devices := range [][]string{{ours, c.second}, {c.second, ours}} {
			d.esp, d.lost, d.boot = c.esp, c.lost, ""
			at(d, devices...)
			if q, err := d.prepare(t.Context()); err == nil || !strings.Contains(err.Error(), "several data partitions") || !strings.Contains(err.Error(), p.path) {
				t.Errorf("%s: %s, %v", name, q.path, err)
			}
			if !d.hadData() {
				t.Errorf("%s: it would run from memory, as another device", name)
			}
			d.boot = ours
			if q, err := d.prepare(t.Context()); err != nil || q.path != p.path {
				t.Errorf("%s, beside the ESP: %s, %v", name, q.path, err)
			}
		}
	}
}
