package slot

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	stateFile    = "state.json"
	prevFile     = "state.prev.json"
	maxStateSize = 64 << 10
	lockWait     = 5 * time.Second
)

// onDisk is the form of a state file. The digest covers State byte by byte.
type onDisk struct {
	Format int             `json:"format"` // 1
	SHA256 string          `json:"sha256"`
	State  json.RawMessage `json:"state"`
}

// Load reads the state. What had to be made up for stands in State.Warning; an
// error means that the directory itself cannot be used.
func (s *Store) Load() (State, error) {
	unlock, err := s.lock()
	if err != nil {
		return State{}, err
	}
	defer unlock()
	return s.load(), nil
}

// load takes the newest generation that is whole. The lock is held.
func (s *Store) load() State {
	st, err := readState(filepath.Join(s.dir, stateFile))
	if err == nil {
		return st
	}
	prev, prevErr := readState(filepath.Join(s.dir, prevFile))
	if prevErr == nil {
		// A missing file is what a cut between two renames leaves: nothing was lost.
		if !errors.Is(err, os.ErrNotExist) {
			prev.Warning = fmt.Sprintf("the slot state was damaged (%v); the one before it is used", err)
		}
		return prev
	}
	if errors.Is(err, os.ErrNotExist) && errors.Is(prevErr, os.ErrNotExist) && !exists(s.Path(A)) && !exists(s.Path(B)) {
		return State{} // a new device
	}
	return State{Current: A, Warning: fmt.Sprintf("the slot state is lost (%v; %v); starting from slot a", err, prevErr)}
}

func readState(path string) (State, error) {
	f, err := os.Open(path)
	if err != nil {
		return State{}, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxStateSize))
	if err != nil {
		return State{}, err
	}
	return decodeState(raw)
}

func decodeState(raw []byte) (State, error) {
	var d onDisk
	if err := json.Unmarshal(raw, &d); err != nil {
		return State{}, fmt.Errorf("not readable: %w", err)
	}
	if d.Format != 1 {
		return State{}, fmt.Errorf("format %d is not known", d.Format)
	}
	if sum := sha256.Sum256(d.State); hex.EncodeToString(sum[:]) != d.SHA256 {
		return State{}, errors.New("its checksum does not match")
	}
	var st State
	if err := json.Unmarshal(d.State, &st); err != nil {
		return State{}, fmt.Errorf("not readable: %w", err)
	}
	if !st.Current.Valid() || st.Trial != nil && st.Trial.Slot != st.Current.Other() {
		return State{}, errors.New("it contradicts itself")
	}
	return st, nil
}

func encodeState(st State) ([]byte, error) {
	raw, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(raw)
	out, err := json.Marshal(onDisk{Format: 1, SHA256: hex.EncodeToString(sum[:]), State: raw})
	return append(out, '\n'), err
}

// update is the only way the state changes: read, change and replace under the lock, if
// [Table] has it. An error of change comes first, as it says more.
func (s *Store) update(e Event, change func(*State) error) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	st := s.load()
	before := st.Phase()
	if err := change(&st); err != nil {
		return err
	}
	to, err := Next(before, e)
	if err == nil && to != st.Phase() {
		err = fmt.Errorf("%w: %s from %s leads to %s, not %s", ErrTransition, e, before, to, st.Phase())
	}
	if err != nil {
		return err
	}
	st.Generation++
	return s.replace(st)
}

// replace makes st the newest generation. At every moment at least one whole
// generation is on disk, because a damaged newest one never replaces the older.
func (s *Store) replace(st State) error {
	raw, err := encodeState(st)
	if err != nil {
		return fmt.Errorf("encode the slot state: %w", err)
	}
	newest, prev := filepath.Join(s.dir, stateFile), filepath.Join(s.dir, prevFile)
	tmp := newest + ".new"
	if err := writeSynced(tmp, raw); err != nil {
		return fmt.Errorf("write the slot state: %w", err)
	}
	CrashPoint("state written")
	if _, err := readState(newest); err == nil {
		if err := os.Rename(newest, prev); err != nil {
			return fmt.Errorf("keep the slot state: %w", err)
		}
		CrashPoint("state kept")
	}
	if err := moveIntoPlace(tmp, newest); err != nil {
		return fmt.Errorf("replace the slot state: %w", err)
	}
	CrashPoint("state replaced")
	return nil
}

// lock waits for the other process, which holds it for some milliseconds.
func (s *Store) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(s.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cannot use the slot directory: %w", err)
	}
	for deadline := time.Now().Add(lockWait); ; time.Sleep(5 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("the slot state has been locked by another process for %s: %w", lockWait, err)
		}
	}
}

// ErrLauncherRuns is returned by [Store.LockLauncher].
var ErrLauncherRuns = errors.New("another deimos-launch already runs here")

// LockLauncher makes the caller the only launcher until it exits or closes the lock.
func (s *Store) LockLauncher() (io.Closer, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, "launcher.lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("cannot use the slot directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, ErrLauncherRuns
	}
	return f, nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// copyDurably copies an executable and returns its SHA-256.
func copyDurably(from, to string) (string, error) {
	src, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(dst, h), src)
	if err := errors.Join(err, dst.Chmod(0o755), dst.Sync(), dst.Close()); err != nil {
		return "", err
	}
	CrashPoint("factory copied")
	return hex.EncodeToString(h.Sum(nil)), nil
}

// moveIntoPlace renames within a directory and makes that durable.
func moveIntoPlace(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	CrashPoint("renamed")
	d, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Digest is the SHA-256 of a file, in lower-case hex.
func Digest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
