package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/packaging/init/fat"
	"github.com/deimos-edge/deimos/packaging/init/gpt"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// checker opens disks after a cut as a device does when its power comes back.
type checker struct {
	rec *recording
	esp espSeen
}

// espSeen is the last ESP that was looked at and was in order.
type espSeen struct {
	valid   bool
	changes int // of disk
	notes   dataNotes
	boots   string
	after   string // a firmware was confirmed
}

// dataNotes are what the ESP says of the data partition, as packaging/init writes it.
type dataNotes struct {
	used  string // id of the partition that was mounted before; "" if none was
	fresh string // id of one that is being made
}

// check looks at everything, and says in a sentence what is not as it must be.
// It leaves the disk as the device would: repaired, opened and closed.
func (k *checker) check(d *blocks.Disk, espTouched bool, p promises) (boots string, err error) {
	mem := d.Work.Mem
	if _, err := gpt.Repair(section(mem), k.rec.Size); err != nil {
		return "", fmt.Errorf("the partition table is lost: %w", err)
	}
	table, err := gpt.Read(section(mem), k.rec.Size)
	if err != nil {
		return "", fmt.Errorf("the partition table is lost: %w", err)
	}
	part, ok := table.Find("deimos-esp")
	if !ok {
		return "", errors.New("the partition table has no EFI system partition")
	}
	if espTouched || !k.esp.valid || k.esp.changes != d.QuietChanges || k.esp.after != p.confirmed {
		k.esp.valid, d.QuietWritten = false, true // it is mended
		if k.esp.boots, k.esp.notes, err = k.checkESP(mem[part.First*gpt.Block:(part.Last+1)*gpt.Block], p); err != nil {
			return "", err
		}
		if !espTouched {
			k.esp.valid, k.esp.changes, k.esp.after = true, d.QuietChanges, p.confirmed
		}
	}
	data, ok := table.Find("deimos-data")
	if !ok {
		if p.device != "" || k.esp.notes.used != "" {
			return k.esp.boots, errors.New("the partition table has no data partition any more")
		}
		return k.esp.boots, nil // the first boot begins again
	}
	switch used := k.esp.notes.used; {
	case used == "" && p.device != "":
		return k.esp.boots, errors.New("the EFI system partition does not say any more which partition holds the device's data")
	case used != "" && used != data.ID.String():
		return k.esp.boots, fmt.Errorf("the device would wait for a data partition %q that is not there", used)
	}
	return k.esp.boots, checkData(d, data, k.esp.notes, p)
}

// checkESP looks twice: as the boot loader finds it, and after init has mended it.
func (k *checker) checkESP(raw []byte, p promises) (boots string, notes dataNotes, err error) {
	look := func() (string, error) {
		e, err := openESP(raw)
		if err != nil {
			return "", err
		}
		return e.check(k.rec.header, p.confirmed)
	}
	if boots, err = look(); err != nil {
		return "", notes, fmt.Errorf("the machine does not boot: %w", err)
	}
	if _, err := fat.Repair(section(raw)); err != nil {
		return "", notes, fmt.Errorf("the EFI system partition cannot be mended: %w", err)
	}
	mended, err := look()
	if err == nil && mended != boots {
		err = fmt.Errorf("firmware %s would start now, and %s did before", mended, boots)
	}
	if err != nil {
		return "", notes, fmt.Errorf("after the EFI system partition was mended: %w", err)
	}
	e, err := openESP(raw)
	if err != nil {
		return "", notes, err
	}
	for name, to := range map[string]*string{"deimos-data.id": &notes.used, "deimos-data.new": &notes.fresh} {
		note, err := e.read(name)
		if err != nil {
			return "", notes, fmt.Errorf("%s, the note of the data partition: %w", name, err)
		}
		*to = strings.TrimSpace(string(note))
	}
	return boots, notes, nil
}

// checkData opens the data partition by the same decisions as packaging/init.
func checkData(d *blocks.Disk, p gpt.Partition, notes dataNotes, want promises) error {
	from := p.First * gpt.Block
	mem := d.Work.Mem[from:]
	if binary.LittleEndian.Uint16(mem[1024+0x38:]) != 0xef53 && notes.used == "" {
		if notes.fresh != p.ID.String() && !blocks.AllZero(mem[:1<<20]) {
			return errors.New("the data partition has no file system, and would not be formatted: the device runs from memory")
		}
		return nil // it would be formatted, now or once more
	}
	return d.Mounted(from, p.Size(), func(dir string) error { return checkState(stateIn(dir), want) })
}

// stateIn is the state folder of a data partition that is mounted at dir.
func stateIn(dir string) string { return filepath.Join(dir, "deimos") }

// checkState opens the state folder with our own code.
func checkState(dir string, want promises) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) && want.device == "" {
		return nil
	}
	if err := checkFiles(dir); err != nil {
		return err
	}
	got, err := agent.Remember(dir)
	switch {
	case err != nil:
		return fmt.Errorf("the agent would not start: %w", err)
	case want.device == "":
		return nil
	case string(got.Device) != want.device:
		return fmt.Errorf("the device was %s and is %q now", want.device, got.Device)
	case !got.Member:
		return errors.New("the device has forgotten that it is a member of the fleet")
	case got.Config < want.config:
		return fmt.Errorf("the device said that it runs version %d of the configuration, and has version %d", want.config, got.Config)
	}
	for order := range want.orders {
		if !slices.Contains(got.Orders, order) {
			return fmt.Errorf("order %s was reported, and would be done again: the journal does not know it", order)
		}
	}
	return checkChunks(filepath.Join(dir, "volumes", "main"), want)
}

// checkFiles reads what is replaced as a whole: old or new, never half.
func checkFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("the state folder cannot be read: %w", err)
		}
		if e.IsDir() && (e.Name() == "volumes" || e.Name() == "journal") {
			return fs.SkipDir
		}
		if filepath.Ext(path) != ".json" || firstLife(path) {
			return nil
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%s cannot be read: %w", e.Name(), err)
		}
		if !json.Valid(raw) {
			return fmt.Errorf("%s is damaged: %d bytes, %.40q", strings.TrimPrefix(path, dir+"/"), len(raw), raw)
		}
		return nil
	})
}

// firstLife is true for what is known of a job that has kept nothing yet: it is not
// synced, and the job begins anew without it.
func firstLife(path string) bool {
	if work := filepath.Dir(filepath.Dir(path)); filepath.Base(path) != "meta.json" || !strings.HasSuffix(work, filepath.Join("jobs", "work")) {
		return false
	}
	_, err := os.Stat(filepath.Join(filepath.Dir(path), "checkpoint"))
	return errors.Is(err, fs.ErrNotExist)
}

func checkChunks(dir string, want promises) (err error) {
	ids, err := want.held()
	if err != nil {
		return err
	}
	v, err := store.Open(dir, store.Options{FloorBytes: -1})
	if err != nil {
		return fmt.Errorf("the chunks cannot be opened: %w", err)
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	for _, id := range ids {
		if data, err := v.Get(context.Background(), id); err != nil || chunk.Sum(data) != id {
			return fmt.Errorf("chunk %s has a receipt, and is not there: %w", id, err)
		}
	}
	for s, held := range want.chunks {
		if id, err := chunk.ParseID(s); err != nil || !held && v.Has(id) {
			return errors.Join(err, fmt.Errorf("chunk %s was dropped by an order that has been reported, and is back", s))
		}
	}
	return nil
}
