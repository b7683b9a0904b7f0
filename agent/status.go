package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/deimos-edge/deimos/hw/panel"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

// Status is how a device is and stands with its fleet, as its state folder tells.
type Status struct {
	Running     bool          `json:"running"`          // an agent runs with this folder
	Device      wire.DeviceID `json:"device,omitempty"` // empty before the first start
	Standing    Standing      `json:"standing"`
	Coordinator string        `json:"coordinator,omitempty"`
	ClaimCode   string        `json:"claim_code,omitempty"` // of a device that waits
	Until       *time.Time    `json:"certificate_until,omitempty"`
	Machine     *Feeling      `json:"machine,omitempty"` // absent before the first start
	Line        *Line         `json:"line,omitempty"`    // absent before it was a member
	Jobs        *Jobs         `json:"jobs,omitempty"`    // absent before there were any, and nothing was said of them
}

// Feeling is how a device feels, as its agent last noted. It is noted whenever
// it changes.
type Feeling struct {
	At    time.Time `json:"at"`
	Ended bool      `json:"ended,omitempty"` // then
	Error string    `json:"error,omitempty"` // why it ended, if not in good order
	Agent string    `json:"agent"`           // version
	// Sure is the latest time that had come for sure when this was noted: one
	// that was proved, and not of a clock that anybody on the network can set.
	Sure     *time.Time     `json:"time_at_least,omitempty"`
	Board    string         `json:"board"`
	BootID   string         `json:"boot_id"`
	Online   bool           `json:"online"`
	Light    panel.State    `json:"light"` // what the light shows, if there is one
	Warnings []wire.Warning `json:"warnings"`
	// Scrubs is how far the volumes' were at At. It does not have the rest noted.
	Scrubs []wire.Scrub `json:"scrubs,omitempty"`
}

const statusFile = "status.json"

// saveStatus notes how the device feels, if that has changed since it was noted.
func (m *machine) saveStatus(ended bool) error {
	m.mu.Lock()
	online := m.online
	m.mu.Unlock()
	f := Feeling{Ended: ended, Error: m.lastWords(ended), Agent: m.version, Board: m.board.Name, BootID: m.boot, Online: online && !ended, Light: m.look(), Warnings: m.health.Visible()}
	if m.noted != nil && reflect.DeepEqual(*m.noted, f) {
		return nil
	}
	out := f
	out.At = time.Now().UTC().Truncate(time.Second)
	if sure := m.sure(); !sure.IsZero() {
		sure = sure.UTC().Truncate(time.Second)
		out.Sure = &sure
	}
	if s := m.scrubs.Load(); s != nil {
		out.Scrubs = s.Progress()
	}
	raw, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(m.state, statusFile), raw, 0o600); err != nil {
		return err
	}
	m.noted = &f
	return nil
}

// sure is the latest time that has come for sure, as far as is known.
func (m *machine) sure() time.Time {
	if c := m.clock.Load(); c != nil {
		return later(m.once, c.AtLeast())
	}
	return m.once
}

// lastWords is why the agent ends, if that is no stop in good order.
func (m *machine) lastWords(ended bool) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !ended || m.why == nil || errors.Is(m.why, ErrRestart) {
		return ""
	}
	return m.why.Error()
}

// readFeeling returns nil without error if nothing was noted yet, or what was is damaged.
func readFeeling(stateDir string) (*Feeling, error) {
	raw, err := os.ReadFile(filepath.Join(stateDir, statusFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var f Feeling
	if json.Unmarshal(raw, &f) != nil {
		return nil, nil
	}
	return &f, nil
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
	s := Status{Device: id.ID, Standing: New, Running: locked(filepath.Join(stateDir, lockFile))}
	if s.Machine, err = readFeeling(stateDir); err != nil {
		return Status{}, fmt.Errorf("%w be read: %w", ErrState, err)
	}
	if s.Line, err = readLine(stateDir); err != nil {
		return Status{}, fmt.Errorf("%w be read: %w", ErrState, err)
	}
	if s.Jobs, err = ReadJobs(stateDir); err != nil {
		return Status{}, fmt.Errorf("%w be read: %w", ErrState, err)
	}
	if f := s.Machine; f != nil && !s.Running {
		f.Online, f.Light = false, "" // whatever it was when the agent was cut off
	}
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
