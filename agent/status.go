package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Status is how a device stands with its fleet, as its state folder tells.
type Status struct {
	Device      wire.DeviceID `json:"device,omitempty"` // empty before the first start
	Standing    Standing      `json:"standing"`
	Coordinator string        `json:"coordinator,omitempty"`
	ClaimCode   string        `json:"claim_code,omitempty"` // of a device that waits
	Until       *time.Time    `json:"certificate_until,omitempty"`
}

// Standing is where a device is on its way into a fleet.
type Standing string

// A device is new until it has seen a coordinator, waits until it is claimed
// (with a token it does not wait), and then is a member.
const (
	New     Standing = "new"
	Waiting Standing = "waiting"
	Member  Standing = "member"
)

// Owed counts the reports of a stopped agent that its coordinator has not
// acknowledged.
func Owed(stateDir string) (n int, err error) {
	j, err := openJournal(filepath.Join(stateDir, "journal"))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, j.close()) }()
	left, err := unacked(j)
	return len(left), err
}

// ReadStatus reads a state folder, whether an agent runs with it or not. It
// changes nothing there.
func ReadStatus(stateDir string) (Status, error) {
	dir := filepath.Join(stateDir, "identity")
	id, err := readIdentity(filepath.Join(dir, keyFile))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(stateDir); err != nil {
			return Status{}, fmt.Errorf("%w be read: %w; choose another with --state", ErrState, err)
		}
		return Status{Standing: New}, nil
	}
	if err != nil {
		return Status{}, err
	}
	s := Status{Device: id.ID, Standing: New}
	m, err := loadMembership(dir, id)
	if err != nil {
		return Status{}, err
	}
	if m != nil {
		until := m.ends()
		s.Standing, s.Coordinator, s.Until = Member, m.Coordinator, &until
		return s, nil
	}
	p, err := loadPending(dir)
	if err != nil {
		return Status{}, err
	}
	if p != nil {
		s.Standing, s.Coordinator, s.ClaimCode = Waiting, p.Coordinator, code(id, p.ca())
	}
	return s, nil
}
