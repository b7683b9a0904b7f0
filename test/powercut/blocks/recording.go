package blocks

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
)

// Recording is a folder:
//
//	base  the disk before anything was written, sparse
//	log   an [Event] a line, in order
//	data  what was written, where the events say
//
// and whatever else its maker keeps there.
type Recording struct {
	Events []Event
	dir    string
	size   int64  // of the disk, bytes
	data   []byte // mapped
}

// Event is one thing that happened to the disk, or became known of it.
type Event struct {
	Kind   Kind            `json:"k"`
	Offset int64           `json:"o,omitempty"` // write, zero: bytes
	Length int64           `json:"n,omitempty"`
	At     int64           `json:"at,omitempty"`    // write: where in data
	FUA    bool            `json:"fua,omitempty"`   // write, zero: durable at once
	Covers int             `json:"cover,omitempty"` // flush: the first so many changes are durable
	Mark   json.RawMessage `json:"mark,omitempty"`  // a promise, in its maker's words
	Note   string          `json:"note,omitempty"`  // for people
}

// Kind is what happened.
type Kind string

// Kinds of events.
const (
	Write Kind = "w"
	Zero  Kind = "z"
	Flush Kind = "f"
	Note  Kind = "m" // a mark, or only a note
)

// Change tells whether it changed the disk.
func (e Event) Change() bool { return e.Kind == Write || e.Kind == Zero }

// Recorder is the [nbd.Observer] that writes a recording.
type Recorder struct {
	mu   sync.Mutex // guards the rest; the machine and those who watch it both write
	log  *bufio.Writer
	data *bufio.Writer
	at   int64
	err  error

	files []*os.File
}

// NewRecorder writes the log and the data in dir; the base is its maker's.
func NewRecorder(dir string) (*Recorder, error) {
	r := &Recorder{}
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

func (r *Recorder) add(e Event) error {
	raw, err := json.Marshal(e)
	if err == nil {
		_, err = r.log.Write(append(raw, '\n'))
	}
	r.err = errors.Join(r.err, err)
	return r.err
}

// Write keeps zeros as such, which is half of what a file system writes.
func (r *Recorder) Write(offset int64, data []byte, fua bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if AllZero(data) {
		return r.add(Event{Kind: Zero, Offset: offset, Length: int64(len(data)), FUA: fua})
	}
	if _, err := r.data.Write(data); err != nil {
		return err
	}
	at := r.at
	r.at += int64(len(data))
	return r.add(Event{Kind: Write, Offset: offset, Length: int64(len(data)), At: at, FUA: fua})
}

func (r *Recorder) Zero(offset, length int64, fua bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.add(Event{Kind: Zero, Offset: offset, Length: length, FUA: fua})
}

func (r *Recorder) Flush(changes int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.add(Event{Kind: Flush, Covers: changes})
}

// Mark notes a promise, from now on. It must be encodable as JSON.
func (r *Recorder) Mark(m any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	raw, err := json.Marshal(m)
	r.err = errors.Join(r.err, err) // Close tells
	_ = r.add(Event{Kind: Note, Mark: raw})
}

// Note is for people.
func (r *Recorder) Note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.add(Event{Kind: Note, Note: fmt.Sprintf(format, args...)})
}

// Close tells whether the record is complete.
func (r *Recorder) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := errors.Join(r.err, r.log.Flush(), r.data.Flush())
	for _, f := range r.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

// Load reads a recording.
func Load(dir string) (*Recording, error) {
	r := &Recording{dir: dir}
	base, err := os.Stat(r.Path("base"))
	if err != nil {
		return nil, fmt.Errorf("this is no recording: %w", err)
	}
	r.size = base.Size()
	log, err := os.Open(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	for d := json.NewDecoder(bufio.NewReaderSize(log, 1<<20)); ; {
		var e Event
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("event %d of the recording: %w", len(r.Events), err)
		}
		r.Events = append(r.Events, e)
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

// Close lets go of the data.
func (r *Recording) Close() error {
	if r.data == nil {
		return nil
	}
	return unix.Munmap(r.data)
}

// Path is of a file in the recording's folder.
func (r *Recording) Path(name string) string { return filepath.Join(r.dir, name) }

func (r *Recording) String() string {
	flushes, changes, bytes, marks := 0, 0, int64(0), 0
	for _, e := range r.Events {
		switch {
		case e.Kind == Flush:
			flushes++
		case e.Change():
			changes++
			bytes += e.Length
		case e.Mark != nil:
			marks++
		}
	}
	return fmt.Sprintf("%d events: %d changes of %d MB, %d flushes, %d marks", len(r.Events), changes, bytes/1e6, flushes, marks)
}

// bytes is what a write wrote.
func (r *Recording) bytes(e Event) []byte { return r.data[e.At : e.At+e.Length] }

// AllZero tells whether there is nothing but zeros.
func AllZero(b []byte) bool {
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
