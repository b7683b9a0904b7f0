package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/durable"
)

// putState is kept while a file is being stored, so that the same command goes
// on after it was cut off. It holds the file's key until the file is stored, for
// this user only to read. If the file, the code or who can read it has changed
// meanwhile, it is of no use, and the file gets a new key.
type putState struct {
	Session    *object.Session `json:"session"`
	Source     source          `json:"source"`
	Recipients []string        `json:"recipients"`

	path string // empty: nothing is kept
}

// source tells whether a file is still the same.
type source struct {
	Path   string    `json:"path"`
	Size   int64     `json:"size"`
	Time   time.Time `json:"time"` // of its last change
	Device uint64    `json:"device"`
	Inode  uint64    `json:"inode"`
}

const (
	maxPutState = 256 << 10 // bytes
	// putStateLife is longer than the coordinator keeps what has no name yet.
	putStateLife = 7 * 24 * time.Hour
)

// openPutState finds what is kept of a put, or makes what will be. What cannot
// be read twice is not kept.
func openPutState(contextDir, name string, in *os.File, code api.Code, recipients []string) (*putState, error) {
	s := &putState{Recipients: recipients}
	info, err := in.Stat()
	if err != nil {
		return nil, err
	}
	sys, ok := info.Sys().(*syscall.Stat_t)
	if in == os.Stdin || !ok || !info.Mode().IsRegular() {
		return s, nil
	}
	path, err := filepath.Abs(in.Name())
	if err != nil {
		return nil, err
	}
	s.Source = source{path, info.Size(), info.ModTime().UTC(), uint64(sys.Dev), sys.Ino}
	dir, err := putStateDir()
	if err != nil {
		return s, nil // as without a home folder: it cannot go on, nothing else
	}
	prune(dir)
	key, err := json.Marshal([]string{contextDir, name, path})
	if err != nil {
		return nil, err
	}
	s.path = filepath.Join(dir, fmt.Sprintf("%x.json", sha256.Sum256(key)))
	var old putState
	raw, err := durable.ReadFile(s.path, maxPutState)
	if err == nil && json.Unmarshal(raw, &old) == nil && old.Session != nil && old.Source == s.Source &&
		slices.Equal(old.Recipients, recipients) && old.Session.Code == code {
		s.Session = old.Session
	}
	return s, nil
}

// putStateDir is in the user's state folder (XDG base directory specification).
func putStateDir() (string, error) {
	base := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(base) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		base = filepath.Join(home, ".local", "state")
	}
	dir := filepath.Join(base, "deimos", "puts")
	return dir, os.MkdirAll(dir, 0o700)
}

// prune removes what nobody went on with.
func prune(dir string) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return // they stay
	}
	for _, e := range list {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > putStateLife {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// keep writes it, before the first byte of the file has gone.
func (s *putState) keep() error {
	if s.path == "" {
		return nil
	}
	raw, err := json.Marshal(s)
	if err == nil {
		err = durable.WriteFile(s.path, raw, 0o600)
	}
	if err != nil {
		return fmt.Errorf("what is needed to go on with a put that is cut off cannot be kept: %w", err)
	}
	return nil
}

// interrupted adds to the error of a put that had stored some bytes how it goes on.
func (s *putState) interrupted(err error, stored int64) error {
	if refused := new(api.Error); errors.As(err, &refused) && refused.Code == "exists" {
		return errors.Join(err, s.forget()) // the same command would be refused again
	}
	if s.path == "" || stored == 0 {
		return err
	}
	how := fmt.Sprintf("%s that are stored are kept for a day, and the same command goes on from there", cli.Bytes(stored))
	if errors.Is(err, context.Canceled) { // the program ends without a word
		fmt.Fprintln(os.Stderr, how)
		return err
	}
	return fmt.Errorf("%w; %s", err, how)
}

// forget is for when the file is stored, or never will be under this name.
func (s *putState) forget() error {
	if s.path == "" {
		return nil
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the key of the file that was put cannot be removed from %s: %w", s.path, err)
	}
	return nil
}
