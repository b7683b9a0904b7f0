package ota

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/bundle"
)

// floor is the version below which nothing is installed: ota/floor.json. It is the
// newest that was ever confirmed, or what a signed manifest has raised it to, and only
// grows; but for a release that a signed exception lets go below it, which is the floor
// from when it is confirmed. (Else its own next fix could not be installed.)
//
// It holds for the root of the enrolment: another fleet has other versions. Going back
// to the other slot does not ask for it, for a device must have something that starts.
type floor struct {
	Root    string `json:"root"` // SHA-256 of the update root, hex
	Version string `json:"version"`
}

const maxFloor = 4 << 10 // bytes

func (s *Service) floorPath() string { return filepath.Join(s.o.StateDir, "ota", "floor.json") }

// floor is "" if there is none. One that cannot be read is the version that runs: it was
// confirmed, or is about to be.
func (s *Service) floor() (version string, whole bool, err error) {
	var f floor
	raw, err := durable.ReadFile(s.floorPath(), maxFloor)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", true, nil
	case err != nil:
		return "", false, fmt.Errorf("the oldest version that may be installed cannot be read: %w", err)
	case json.Unmarshal(raw, &f) != nil || bundle.CheckVersion(f.Version) != nil:
		s.o.Log.Warn("the note of the oldest version that may be installed is damaged; it is taken to be the one that runs", "version", s.o.Version)
		return s.o.Version, false, nil
	case f.Root != s.rootSum():
		return "", true, nil
	}
	return f.Version, true, nil
}

// ReadFloor is the oldest version that may be installed on the device with this state
// folder, "" if that is not known.
func ReadFloor(stateDir string) (string, error) {
	var f floor
	raw, err := durable.ReadFile(filepath.Join(stateDir, "ota", "floor.json"), maxFloor)
	if errors.Is(err, fs.ErrNotExist) || err == nil && json.Unmarshal(raw, &f) != nil {
		return "", nil
	}
	return f.Version, err
}

func (s *Service) rootSum() string {
	sum := sha256.Sum256(s.o.Root())
	return hex.EncodeToString(sum[:])
}

// raise lifts the floor to version, or, if set, moves it there.
func (s *Service) raise(version string, set bool) error {
	if bundle.CheckVersion(version) != nil {
		return nil // none of a release
	}
	now, whole, err := s.floor()
	if err != nil || whole && (now == version || now != "" && bundle.Compare(version, now) < 0 && !set) {
		return err
	}
	if now != "" && bundle.Compare(version, now) < 0 && !set {
		version = now
	}
	raw, err := json.Marshal(floor{s.rootSum(), version})
	if err == nil {
		err = durable.WriteFile(s.floorPath(), append(raw, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("the oldest version that may be installed cannot be noted: %w", err)
	}
	return nil
}
