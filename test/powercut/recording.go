package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/wire"
)

// A recording is a folder:
//
//	recording.json  [header]
//	base            the disk before it was first switched on, sparse
//	log             an [event] a line, in order
//	data            what was written, where the events say
//	coordinator/    the coordinator's folder as it was at the end, for boots
type recording struct {
	header
	dir    string
	events []event
	data   []byte // mapped
}

// header is what is known of a recording beside its events.
type header struct {
	Size     int64             `json:"size"`     // of the disk, bytes
	Firmware map[string]string `json:"firmware"` // version → SHA-256 of its image
	Loader   string            `json:"loader"`   // SHA-256 of BOOTAA64.EFI
	HTTPS    string            `json:"https"`    // the coordinator's addresses, which devices remember
	MQTT     string            `json:"mqtt"`
	Device   wire.DeviceID     `json:"device"`
	Objects  []string          `json:"objects"` // that are stored at the end
}

// event is one thing that happened to the disk, or became known of it.
type event struct {
	Kind   kind   `json:"k"`
	Offset int64  `json:"o,omitempty"` // write, zero: bytes
	Length int64  `json:"n,omitempty"`
	At     int64  `json:"at,omitempty"`    // write: where in data
	FUA    bool   `json:"fua,omitempty"`   // write, zero: durable at once
	Covers int    `json:"cover,omitempty"` // flush: the first so many changes are durable
	Mark   *mark  `json:"mark,omitempty"`
	Note   string `json:"note,omitempty"` // for people
}

type kind string

const (
	write kind = "w"
	zero  kind = "z"
	flush kind = "f"
	note  kind = "m" // a mark, or only a note
)

func (e event) change() bool { return e.Kind == write || e.Kind == zero }

// recorder is the observer that writes a recording.
type recorder struct {
	mu   sync.Mutex // guards the rest; the machine and those who watch it both write
	log  *bufio.Writer
	data *bufio.Writer
	at   int64
	err  error

	files []*os.File
}

func newRecorder(dir string) (*recorder, error) {
	r := &recorder{}
	for _, name := range []string{"log", "data"} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		r.files = append(r.files, f)
	}
	r.log, r.data = bufio.NewWriter(r.files[0]), bufio.NewWriterSize(r.files[1], 1<<20)
	return r, nil
}

func (r *recorder) add(e event) error {
	raw, err := json.Marshal(e)
	if err == nil {
		_, err = r.log.Write(append(raw, '\n'))
	}
	r.err = errors.Join(r.err, err)
	return r.err
}

// Write keeps zeros as such, which is half of what a file system writes.
func (r *recorder) Write(offset int64, data []byte, fua bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if allZero(data) {
		return r.add(event{Kind: zero, Offset: offset, Length: int64(len(data)), FUA: fua})
	}
	if _, err := r.data.Write(data); err != nil {
		return err
	}
	at := r.at
	r.at += int64(len(data))
	return r.add(event{Kind: write, Offset: offset, Length: int64(len(data)), At: at, FUA: fua})
}

func (r *recorder) Zero(offset, length int64, fua bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.add(event{Kind: zero, Offset: offset, Length: length, FUA: fua})
}

func (r *recorder) Flush(changes int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.add(event{Kind: flush, Covers: changes})
}

// mark notes a promise, from now on.
func (r *recorder) mark(m mark) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.add(event{Kind: note, Mark: &m}) // close tells
}

func (r *recorder) note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.add(event{Kind: note, Note: fmt.Sprintf(format, args...)})
}

func (r *recorder) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := errors.Join(r.err, r.log.Flush(), r.data.Flush())
	for _, f := range r.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

func (h header) save(dir string) error {
	raw, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "recording.json"), append(raw, '\n'), 0o644)
}

// load reads a recording.
func load(dir string) (*recording, error) {
	r := &recording{dir: dir}
	raw, err := os.ReadFile(filepath.Join(dir, "recording.json"))
	if err != nil {
		return nil, fmt.Errorf("this is no recording: %w", err)
	}
	if err := json.Unmarshal(raw, &r.header); err != nil {
		return nil, err
	}
	log, err := os.Open(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	for d := json.NewDecoder(bufio.NewReaderSize(log, 1<<20)); ; {
		var e event
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("event %d of the recording: %w", len(r.events), err)
		}
		r.events = append(r.events, e)
	}
	data, err := os.Open(filepath.Join(dir, "data"))
	if err != nil {
		return nil, err
	}
	defer data.Close()
	info, err := data.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > 0 {
		r.data, err = unix.Mmap(int(data.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	}
	return r, err
}

func (r *recording) close() error {
	if r.data == nil {
		return nil
	}
	return unix.Munmap(r.data)
}

func (r *recording) path(name string) string { return filepath.Join(r.dir, name) }

// promised is what must hold after a cut before event at.
func (r *recording) promised(at int) promises {
	p := newPromises()
	for _, e := range r.events[:at] {
		if e.Mark != nil {
			p.take(*e.Mark)
		}
	}
	return p
}

// bytes is what a write wrote.
func (r *recording) bytes(e event) []byte { return r.data[e.At : e.At+e.Length] }

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
			return false
		}
		b = b[8:]
	}
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
