package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/deimos-edge/deimos/wire"
)

// Remembered is what an agent that starts in a state folder knows of its lives before.
type Remembered struct {
	Device wire.DeviceID // "": it has no key yet
	Member bool
	Orders []string // with a report, which answers them if they come again
	Config uint64   // version of the fleet's configuration that was in force; 0: none
}

// Remember reads a state folder that no agent has, by the same ways as one that
// starts there: what it cannot read, an agent could not. The journal is opened,
// and so written to.
func Remember(stateDir string) (Remembered, error) {
	var r Remembered
	dir := filepath.Join(stateDir, "identity")
	id, err := readIdentity(filepath.Join(dir, keyFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	if err == nil {
		m, err := loadMembership(dir, id)
		if err != nil {
			return r, err
		}
		r.Device, r.Member = id.ID, m != nil
	}
	if r.Config, err = wantedVersion(filepath.Join(stateDir, settingsFile)); err != nil {
		return r, err
	}
	j, err := openJournal(filepath.Join(stateDir, "journal"))
	if err != nil {
		return r, err
	}
	err = j.each(func(e entry) { r.Orders = append(r.Orders, e.Order) })
	return r, errors.Join(err, j.close())
}

// wantedVersion fails for a document that an agent would only complain of, and
// ask for again.
func wantedVersion(path string) (uint64, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	var w wire.ConfigApply
	if err == nil {
		err = json.Unmarshal(raw, &w)
	}
	if err != nil {
		return 0, fmt.Errorf("the fleet's configuration %s cannot be read: %w", path, err)
	}
	return w.Version, nil
}
