package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// damage is what is done to a good disk on purpose, to see that the check for it is
// one. Each recording's last disk is damaged in all these ways.
type damage struct {
	name string
	disk func(mem []byte)
	data func(dir string, p *promises) error // of the volume, mounted
	want string                              // what the check must say
}

var damages = []damage{
	{name: "nothing is damaged"},
	{name: "the file system begins with zeros", want: "the file system cannot be mended|has a receipt", disk: func(mem []byte) { clear(mem[:32<<20]) }},
	{name: "a byte of a chunk is another", want: "has a receipt, and is not whole", data: flipChunk},
	{name: "a chunk is missing", want: "has a receipt, and is not there", data: func(_ string, p *promises) error {
		p.chunks[chunk.Sum([]byte("never stored"))] = held
		return nil
	}},
	{name: "a dropped chunk is there", want: "was dropped, and is back", data: func(_ string, p *promises) error {
		p.chunks[p.first()] = gone
		return nil
	}},
	{name: "a chunk is there that nobody stored", want: "was never stored, and is listed", data: func(_ string, p *promises) error {
		delete(p.chunks, p.first())
		return nil
	}},
	{name: "the volume is another", want: "the store does not open: this is another volume", data: func(_ string, p *promises) error {
		p.volume = "01J0000000000000000000000A"
		return nil
	}},
}

// first is a chunk with a receipt.
func (p *promises) first() chunk.ID {
	var ids []chunk.ID
	for id, s := range p.chunks {
		if s == held {
			ids = append(ids, id)
		}
	}
	return slices.MinFunc(ids, func(a, b chunk.ID) int { return bytes.Compare(a[:], b[:]) })
}

// flipChunk changes a byte of a chunk with a receipt, wherever it lies.
func flipChunk(dir string, p *promises) error {
	data, err := readChunk(dir, p.first())
	if err != nil {
		return err
	}
	logs, err := filepath.Glob(filepath.Join(dir, "chunks", "*.seg"))
	if err != nil {
		return err
	}
	n := 0
	for _, path := range logs {
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if at := bytes.Index(raw, data); at >= 0 {
			raw[at+len(data)/2] ^= 1
			n++
			if err := os.WriteFile(path, raw, 0o600); err != nil {
				return err
			}
		}
	}
	if n == 0 {
		return errors.New("the chunk is in no segment of the volume")
	}
	return nil
}

func readChunk(dir string, id chunk.ID) (data []byte, err error) {
	opt := storeOptions()
	opt.Capacity += 64 << 20 // so that nothing is moved
	v, err := store.Open(dir, opt)
	if err != nil {
		return nil, err
	}
	data, err = v.Get(context.Background(), id)
	return data, errors.Join(err, v.Close())
}

// tryChecks damages the last disk of a recording, and fails where that is not seen.
func tryChecks(rec *blocks.Recording) (err error) {
	d, err := blocks.NewDisk(rec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := d.Advance(len(rec.Events)); err != nil {
		return err
	}
	all := newChecker()
	for _, e := range rec.Events {
		if err := all.Pass(e); err != nil {
			return err
		}
	}
	for _, x := range damages {
		k := *all
		k.chunks = maps.Clone(all.chunks)
		if x.disk != nil {
			x.disk(d.Work.Mem)
		}
		if x.data != nil {
			if err := mounted(d, func(dir string) error { return x.data(dir, &k.promises) }); err != nil {
				return fmt.Errorf("to try the checks, %s: %w", x.name, err)
			}
		}
		err := k.Check(d, blocks.Cut{Seed: 2}, false)
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
