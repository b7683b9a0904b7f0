package hw

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// maxFile bounds what is read of one kernel file. Attributes of sysfs end at
// one page; mountinfo of a machine with many containers is the largest read.
const maxFile = 1 << 20

var errNotRegular = errors.New("is not a regular file")

// tree reads the kernel's files below a root directory.
type tree struct {
	root string
	slow func(name string) // called before each read, if set; tests hang here as a device would
	seen *sightings        // keeps what was read, if set
}

// live tells whether this is the running machine and not a recorded one.
func (t tree) live() bool { return t.root == "/" }

func (t tree) path(name string) string { return filepath.Join(t.root, name) }

// bytes reads a regular file. Opening does not block, so that a FIFO or a tty
// in a recorded tree is an error and not the end of the probe. A read of a
// real device's attribute can still hang in the kernel: see within.
func (t tree) bytes(name string) ([]byte, error) {
	raw, err := t.read(name)
	if err == nil {
		t.seen.file(name, raw)
	}
	return raw, err
}

func (t tree) read(name string) ([]byte, error) {
	if t.slow != nil {
		t.slow(name)
	}
	p := t.path(name)
	fd, err := retry(func() (int, error) { return unix.Open(p, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: p, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: p, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, &fs.PathError{Op: "read", Path: p, Err: errNotRegular}
	}
	buf := make([]byte, 0, 4096)
	for len(buf) < maxFile {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := retry(func() (int, error) { return unix.Read(fd, buf[len(buf):cap(buf)]) })
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: p, Err: err}
		}
		if n == 0 {
			break
		}
		buf = buf[:len(buf)+n]
	}
	return buf, nil
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// text reads one value, cleaned.
func (t tree) text(name string) (string, error) {
	raw, err := t.bytes(name)
	return clean(string(raw)), err
}

// word is text for attributes that may well be missing; "" then.
func (t tree) word(name string) string {
	s, _ := t.text(name)
	return s
}

// integer reads a number. A negative one is the caller's to judge.
func (t tree) integer(name string) (int64, error) {
	s, err := t.text(name)
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s holds %.40q, which is no number", t.path(name), s)
	}
	return v, nil
}

// count reads a number that cannot be negative; 0 if it is missing or absurd.
func (t tree) count(name string) uint64 {
	v, err := t.integer(name)
	if err != nil || v < 0 {
		return 0
	}
	return uint64(v)
}

func (t tree) flag(name string) bool { return t.word(name) == "1" }

// list names a directory's entries, sorted; none if it is missing.
func (t tree) list(dir string) []string {
	entries, err := os.ReadDir(t.path(dir))
	if err != nil {
		return nil
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
		if !e.Type().IsRegular() { // files are kept when they are read
			t.seen.asked(dir + "/" + e.Name())
		}
	}
	return names
}

func (t tree) exists(name string) bool {
	_, err := os.Stat(t.path(name))
	if err == nil {
		t.seen.asked(name)
	}
	return err == nil
}

// device is where a class entry really lives, below the root: "/sys/devices/…".
func (t tree) device(name string) string {
	p, err := filepath.EvalSymlinks(t.path(name))
	if err != nil {
		return ""
	}
	root, err := filepath.EvalSymlinks(t.root)
	if err != nil {
		return ""
	}
	t.seen.asked(name)
	return "/" + strings.TrimPrefix(strings.TrimPrefix(p, root), "/")
}

// access tells whether this process may use a device file.
func (t tree) access(node string) Access {
	err := unix.Access(t.path(node), unix.R_OK|unix.W_OK)
	if errors.Is(err, fs.ErrNotExist) {
		return AccessNoNode
	}
	t.seen.asked(node)
	if err != nil {
		return AccessDenied
	}
	return AccessOK
}

// clean makes text safe to print: no control characters, no invisible
// direction marks, single spaces, and not longer than a person reads.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == 0:
			return ' '
		case !unicode.IsPrint(r) || r == unicode.ReplacementChar:
			return -1
		}
		return r
	}, s)
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 200 {
		s = string(r[:200])
	}
	return s
}

// reason turns an error of reading into a note's code and words.
func reason(err error) (NoteCode, string) {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return NotePermission, "not allowed for this user; run with sudo to see it"
	case errors.Is(err, errTimeout):
		return NoteTimeout, err.Error()
	default:
		return NoteUnreadable, "could not be read: " + clean(err.Error())
	}
}
