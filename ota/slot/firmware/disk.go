package firmware

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/durable"
)

// disk is the ESP and the state: what a power cut can tear apart.
type disk interface {
	list() (images, error)
	free() (int64, error) // bytes of the ESP
	open(name string) (input, error)
	create(name string) (output, error) // empty, whatever was there
	rename(from, to string) error
	place(name string) error        // makes durable where the bytes of a file lie and how many they are, which a rename's sync does not
	remove(name string) error       // no error if it is not there
	same(a, b string) (bool, error) // whether they begin with the same block
	sync() error                    // of names; contents are synced by themselves
	load() (record, error)
	save(record) error // all or nothing, and durable
}

type input interface {
	io.ReadCloser
	io.ReaderAt
}

type output interface {
	io.WriteCloser
	Sync() error
}

// mounted is the real disk.
type mounted struct {
	esp   string // the folder of the images
	state string
}

func (m *mounted) path(name string) string { return filepath.Join(m.esp, name) }

func (m *mounted) list() (all images, err error) {
	entries, err := os.ReadDir(m.esp)
	if err != nil {
		return nil, fmt.Errorf("the EFI system partition cannot be read; is it mounted? %w", err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if f, ok := fileOf(e.Name(), info.Size()); ok {
			all = append(all, f)
		}
	}
	return all, nil
}

func (m *mounted) free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(m.esp, &st); err != nil {
		return 0, fmt.Errorf("the free space of %s cannot be read: %w", m.esp, err)
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

func (m *mounted) open(name string) (input, error) { return os.Open(m.path(name)) }

func (m *mounted) create(name string) (output, error) { return os.Create(m.path(name)) }

func (m *mounted) rename(from, to string) error { return os.Rename(m.path(from), m.path(to)) }

func (m *mounted) place(name string) error {
	f, err := os.Open(m.path(name))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (m *mounted) remove(name string) error {
	if err := os.Remove(m.path(name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (m *mounted) same(a, b string) (bool, error) {
	x, errX := firstBlock(m.path(a))
	y, errY := firstBlock(m.path(b))
	return x == y, errors.Join(errX, errY)
}

// firstBlock asks with FIBMAP (linux/fs.h), which FAT has, for root only.
func firstBlock(path string) (block int32, err error) {
	const fibmap = 1
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if _, _, failed := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fibmap, uintptr(unsafe.Pointer(&block))); failed != 0 {
		return 0, fmt.Errorf("where %s lies: %w", path, failed)
	}
	return block, nil
}

func (m *mounted) sync() error { return durable.Sync(m.esp) }

const recordFile = "firmware.json"

// load takes a record that cannot be read for none: what boots is decided on the
// ESP, and a device must not be stuck for a lost report.
func (m *mounted) load() (rec record, err error) {
	raw, err := os.ReadFile(filepath.Join(m.state, recordFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return rec, fmt.Errorf("the record of the firmware's updates cannot be read: %w", err)
	}
	if json.Unmarshal(raw, &rec) != nil {
		return record{}, nil
	}
	return rec, nil
}

func (m *mounted) save(rec record) error {
	raw, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(m.state, recordFile), append(raw, '\n'), 0o600)
}
