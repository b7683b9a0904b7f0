package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/deimos-edge/deimos/packaging/init/gpt"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// damage is what is done to a good disk on purpose, to see that the check for
// it is one. Each recording's last disk is damaged in all these ways.
type damage struct {
	name string
	disk func(mem []byte) error                   // of the whole disk
	esp  func(e *esp) error                       // of the ESP
	data func(state string, want *promises) error // of the state folder, mounted
	want string                                   // what the check must say
}

var damages = []damage{
	{name: "both partition tables are overwritten", want: "the partition table is lost", disk: func(mem []byte) error {
		clear(mem[:34*blocks.Sector])
		clear(mem[len(mem)-34*blocks.Sector:])
		return nil
	}},
	{name: "no superblock of the data partition is left", want: "cannot be mended", disk: func(mem []byte) error {
		p, err := dataPartition(mem)
		if err != nil {
			return err
		}
		const block, group = 4096, 8 * 4096 * 4096 // bytes; a group's first block may hold a copy
		for at := int64(0); at+block <= p.Size(); at += group {
			clear(mem[p.First*gpt.Block+at:][:block])
		}
		return nil
	}},
	{name: "a byte of the boot loader is another", want: "the boot loader is damaged", esp: func(e *esp) error {
		return e.flip(func(f espFile) bool { return strings.EqualFold(f.path, "EFI/BOOT/BOOTAA64.EFI") })
	}},
	{name: "a byte of each firmware is another", want: "which is not firmware", esp: func(e *esp) error {
		return e.flip(func(f espFile) bool { return imageForm.MatchString(f.path) })
	}},
	{name: "the note of the data partition is another", want: "would wait for a data partition", esp: func(e *esp) error {
		return e.flip(func(f espFile) bool { return f.path == "deimos-data.id" })
	}},
	{name: "a newer firmware was confirmed", want: "the machine goes back", data: func(_ string, want *promises) error {
		want.confirmed = "9.0.0"
		return nil
	}},
	{name: "the key is gone", want: "the agent would not start|the device was", data: func(state string, _ *promises) error {
		return os.Remove(filepath.Join(state, "identity", "key.pem"))
	}},
	{name: "the membership is gone", want: "forgotten that it is a member", data: func(state string, _ *promises) error {
		return os.Remove(filepath.Join(state, "identity", "membership.json"))
	}},
	{name: "the membership is half", want: "is damaged", data: func(state string, _ *promises) error {
		return os.Truncate(filepath.Join(state, "identity", "membership.json"), 100)
	}},
	{name: "the configuration is gone", want: "of the configuration, and has version 0", data: func(state string, _ *promises) error {
		return os.Remove(filepath.Join(state, "config.json"))
	}},
	{name: "the journal is gone", want: "would be done again", data: func(state string, _ *promises) error {
		return os.RemoveAll(filepath.Join(state, "journal"))
	}},
	{name: "a byte of a chunk is another", want: "has a receipt, and is not there|the chunks cannot be opened", data: flipChunk},
	{name: "a dropped chunk is there", want: "and is back", data: func(_ string, want *promises) error {
		ids, err := want.held()
		if err == nil {
			want.chunks[ids[0].String()] = false
		}
		return err
	}},
}

func dataPartition(disk []byte) (gpt.Partition, error) {
	table, err := gpt.Read(section(disk), int64(len(disk)))
	if err != nil {
		return gpt.Partition{}, err
	}
	p, ok := table.Find("deimos-data")
	if !ok {
		return p, errors.New("there is no data partition")
	}
	return p, nil
}

// flip changes a byte in the middle of each such file.
func (e *esp) flip(which func(espFile) bool) error {
	files, err := e.list()
	if err != nil {
		return err
	}
	n := 0
	for _, f := range files {
		if which(f) && f.size > 0 {
			e.raw[e.dataAt+int64(f.first-2)*e.cluster+7] ^= 1 // in its first cluster
			n++
		}
	}
	if n == 0 {
		return errors.New("there is no such file")
	}
	return nil
}

// flipChunk changes a byte of a chunk with a receipt, wherever it is stored.
func flipChunk(state string, want *promises) error {
	dir := filepath.Join(state, "volumes", "main")
	ids, err := want.held()
	if err != nil {
		return err
	}
	data, err := readChunk(dir, ids)
	if err != nil {
		return err
	}
	n := 0
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if at := bytes.Index(raw, data); err == nil && at >= 0 {
			raw[at+len(data)/2] ^= 1
			n++
			err = os.WriteFile(path, raw, 0o600)
		}
		return err
	})
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("the chunk is in no file of the volume")
	}
	return nil
}

// readChunk is the first chunk that is long enough to be found in a file.
func readChunk(dir string, ids []chunk.ID) (data []byte, err error) {
	v, err := store.Open(dir, store.Options{FloorBytes: -1})
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if data, err = v.Get(context.Background(), id); err != nil || len(data) > 64 {
			break
		}
	}
	return data, errors.Join(err, v.Close())
}

// tryChecks damages the last disk of a recording, and fails where that is not seen.
func tryChecks(rec *recording) (err error) {
	d, err := blocks.NewDisk(rec.Recording)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := d.Advance(len(rec.Events)); err != nil {
		return err
	}
	all, err := rec.promised(len(rec.Events))
	if err != nil {
		return err
	}
	for _, x := range append([]damage{{name: "nothing"}}, damages...) {
		want := all.clone()
		if err := x.to(d, &want); err != nil {
			return fmt.Errorf("to try the checks, %s: %w", x.name, err)
		}
		_, err := (&checker{rec: rec}).check(d, true, want)
		if !x.seenIn(err) {
			return fmt.Errorf("a check is none: of a disk on which %s it says: %v", x.name, err)
		}
		if err := d.Restore(); err != nil {
			return err
		}
	}
	return nil
}

func (x damage) seenIn(err error) bool {
	if x.want == "" || err == nil {
		return x.want == "" && err == nil
	}
	for w := range strings.SplitSeq(x.want, "|") {
		if strings.Contains(err.Error(), w) {
			return true
		}
	}
	return false
}

// to does the damage.
func (x damage) to(d *blocks.Disk, want *promises) error {
	mem := d.Work.Mem
	switch {
	case x.disk != nil:
		return x.disk(mem)
	case x.esp != nil:
		e, err := openESP(mem[espStart:espEnd])
		if err != nil {
			return err
		}
		return x.esp(e)
	case x.data == nil:
		return nil
	}
	p, err := dataPartition(mem)
	if err != nil {
		return err
	}
	return d.Mounted(p.First*gpt.Block, p.Size(), func(dir string) error { return x.data(stateIn(dir), want) })
}
