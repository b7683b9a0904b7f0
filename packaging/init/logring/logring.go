// Package logring keeps the newest lines of a log in a folder, and never more
// than so many bytes.
//
// The log is a row of files, 00000001.log, 00000002.log and so on. Lines are
// appended to the newest; when it is full the next one is begun and the oldest
// removed. Nothing is ever rewritten, so a process that is killed or a power cut
// costs at most the lines that the kernel had not written yet, and a torn last
// line, which [Open] cuts off.
//
// # What always holds
//
//   - All files together have at most Segments × Size bytes, also right after a
//     file was begun, and also when the folder held more at [Open].
//   - A line is whole or not there.
//   - A write makes no flush: an idle device leaves its disk alone. [Ring.Sync]
//     is for moments that someone will ask about.
package logring

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Limits of a ring.
type Limits struct {
	Segments int   // files, 2 or more
	Size     int64 // bytes a file; no line is longer
}

// Ring is an open log. Its methods may be called from several goroutines.
type Ring struct {
	dir    string
	limits Limits

	mu      sync.Mutex // guards what follows
	numbers []uint64   // of the files, oldest first; the last is open
	file    *os.File
	size    int64
}

// Open continues the log in dir, which it makes. A folder has one Ring at a time.
func Open(dir string, l Limits) (*Ring, error) {
	if l.Segments < 2 || l.Size < 1 {
		return nil, fmt.Errorf("a log of %d files of %d bytes keeps nothing", l.Segments, l.Size)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	r := &Ring{dir: dir, limits: l}
	var err error
	if r.numbers, err = numbersIn(dir); err != nil {
		return nil, err
	}
	return r, r.resume()
}

func numbersIn(dir string) ([]uint64, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, f := range files {
		text, ok := strings.CutSuffix(f.Name(), ".log")
		if n, err := strconv.ParseUint(text, 10, 64); ok && err == nil && f.Name() == name(n) && f.Type().IsRegular() {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

func name(n uint64) string { return fmt.Sprintf("%08d.log", n) }

func (r *Ring) path(n uint64) string { return filepath.Join(r.dir, name(n)) }

// resume opens the newest file behind its last whole line.
func (r *Ring) resume() error {
	if len(r.numbers) == 0 {
		return r.next()
	}
	for i, n := range r.numbers { // of a ring with larger files, or damaged by a repair of the disk
		if st, err := os.Stat(r.path(n)); err != nil || st.Size() > r.limits.Size {
			if err := r.remove([]uint64{n}); err != nil {
				return err
			}
			r.numbers = slices.Delete(r.numbers, i, i+1)
			return r.resume()
		}
	}
	if err := r.shorten(r.limits.Segments); err != nil {
		return err
	}
	f, err := os.OpenFile(r.path(r.numbers[len(r.numbers)-1]), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	raw := make([]byte, r.limits.Size)
	n, _ := f.ReadAt(raw, 0) // what cannot be read is cut off, too
	r.file, r.size = f, int64(bytes.LastIndexByte(raw[:n], '\n')+1)
	if err := f.Truncate(r.size); err != nil {
		f.Close()
		return err
	}
	return nil
}

// shorten removes the oldest files until there are at most keep.
func (r *Ring) shorten(keep int) error {
	if len(r.numbers) <= keep {
		return nil
	}
	n := len(r.numbers) - keep
	if err := r.remove(r.numbers[:n]); err != nil {
		return err
	}
	r.numbers = slices.Clone(r.numbers[n:])
	return nil
}

func (r *Ring) remove(numbers []uint64) error {
	for _, n := range numbers {
		if err := os.Remove(r.path(n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// next begins a file. It makes room first, so that there is never one too many.
func (r *Ring) next() error {
	if err := r.shorten(r.limits.Segments - 1); err != nil {
		return err
	}
	n := uint64(1)
	if len(r.numbers) > 0 {
		n = r.numbers[len(r.numbers)-1] + 1
	}
	f, err := os.OpenFile(r.path(n), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if r.file != nil {
		r.file.Close()
	}
	r.numbers, r.file, r.size = append(r.numbers, n), f, 0
	return nil
}

// WriteLine appends a line, which is cut to a file's size. After an error, such
// as of a full disk, the next line is tried again.
func (r *Ring) WriteLine(line string) error {
	line = strings.ReplaceAll(line, "\n", " ")
	if int64(len(line)) >= r.limits.Size {
		line = line[:r.limits.Size-1]
	}
	raw := []byte(line + "\n")
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return os.ErrClosed
	}
	if r.size+int64(len(raw)) > r.limits.Size {
		if err := r.next(); err != nil {
			return err
		}
	}
	n, err := r.file.WriteAt(raw, r.size)
	if err != nil {
		if n > 0 {
			_ = r.file.Truncate(r.size) // else the next line overwrites it
		}
		return err
	}
	r.size += int64(n)
	return nil
}

// Sync makes the newest file durable.
func (r *Ring) Sync() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return os.ErrClosed
	}
	return r.file.Sync()
}

// Close makes the log durable and ends it.
func (r *Ring) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return nil
	}
	err := errors.Join(r.file.Sync(), r.file.Close())
	r.file = nil
	return err
}
