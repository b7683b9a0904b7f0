package agent

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/jobs/policy"
	"github.com/deimos-edge/deimos/wire"
)

// Config is what the owner tells the agent, from a TOML file and the command
// line:
//
//	coordinator = "https://fleet.example.org:8443"
//	token = "deimos_…"          # to enrol; without one, the device waits to be claimed
//
//	[[volume]]                  # at least one; the command line has a default
//	dir = "/mnt/disk1"
//	capacity_bytes = 0          # 0: up to the floor
//	floor_bytes = 0             # left free; 0: 512 MiB or 1%, whichever is more
//
//	[jobs]                      # see jobs/policy
//	enabled = true
//
//	[disks]                     # without any [[volume]]: which disks to use, see hw/disk
//	auto = false                # every disk that the rules allow, such as an empty one
//	use = ["/mnt/data"]         # these, whatever is on them
//	never = ["WD-WX11D1234"]    # not these: mount points, names or serial numbers
//
//	[scrub]                     # see sync/scrub
//	days = 21                   # in which every chunk is read and verified
//	max_bytes_per_second = 33554432 # of one disk
//
//	[transfer]                  # see TransferConfig; 0: no limit
//	max_down_bytes_per_second = 0
//	max_up_bytes_per_second = 0
//	monthly_bytes = 0           # in and out; counted over restarts
//	hours = "22:00-06:00"       # local time; "": the whole day
//
//	[updates]                   # see UpdatesConfig; the owner's alone
//	window = "02:00-05:00"      # local time, of the restart; "": any time
//	consent = "auto"            # or "ask": deimos-agent update approve
//	on_metered = "fetch"        # or "wait", for more than is left of the month's volume
//	monthly_bytes = 0           # that updates may fetch in a month; 0: no limit
//
//	[board]                     # see board
//	name = ""                   # instead of what is detected
//	profiles = "/etc/deimos/boards"
//
//	[[sensor]]                  # see hw/sensor; besides those of the board's profile
//	name = "cabinet"
//	driver = "bmxx80"
//	bus = "/dev/i2c-1"
//	address = "0x76"
//
//	watchdog = ""               # such as "/dev/watchdog0"; stands above the tables
//
// What stands below [jobs], [scrub] and [transfer] also limits what the fleet's configuration can make
// of it; what is missing there leaves it to the fleet.
type Config struct {
	Coordinator string         `toml:"coordinator"`
	Token       string         `toml:"token"`
	Volumes     []VolumeConfig `toml:"volume"`
	Jobs        policy.Policy  `toml:"jobs"`
	Disks       DisksConfig    `toml:"disks"`
	Scrub       ScrubConfig    `toml:"scrub"`
	Transfer    TransferConfig `toml:"transfer"`
	Updates     UpdatesConfig  `toml:"updates"`
	Board       BoardConfig    `toml:"board"`
	Sensors     []board.Sensor `toml:"sensor"`
	Watchdog    string         `toml:"watchdog"`

	Floor    int64     `toml:"-"` // of a volume that the agent chooses itself; 0: by the rules of hw/disk
	StateDir string    `toml:"-"` // key, enrolment, journal, slots
	Version  string    `toml:"-"` // of this agent
	Released time.Time `toml:"-"` // when that was made: no clock can be earlier
	Slot     string    `toml:"-"` // that it was started from; empty without the launcher

	ConfirmWithin time.Duration `toml:"-"` // how long this version has for its trial; 0: as the slots have it
	ESP           string        `toml:"-"` // where the EFI system partition is mounted; empty if our image does not run
	Log           *slog.Logger  `toml:"-"`
	// Routes are kinds of orders that a program which embeds the agent carries
	// out itself. A kind of the agent's own cannot be among them. Delivery is the
	// agent's: a handler must be idempotent, as a crash can come between its
	// effect and its report.
	Routes map[wire.Kind]Route `toml:"-"`
	// SystemTime is the hardware clock; nil is time.Now.
	SystemTime func() time.Time `toml:"-"`

	// owned is which settings the file states: they are limits for the fleet.
	owned map[string]bool
}

// VolumeConfig is one place for chunks. Each disk should have its own.
type VolumeConfig struct {
	Dir      string `toml:"dir"`
	Capacity int64  `toml:"capacity_bytes"`
	Floor    int64  `toml:"floor_bytes"`
}

const maxConfig = 1 << 20 // bytes

func readConfig(path string) ([]byte, error) {
	raw, err := durable.ReadFile(path, maxConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no configuration file %s", path)
	}
	if err != nil {
		return nil, fmt.Errorf("the configuration file %s cannot be read: %w", path, err)
	}
	return raw, nil
}

// DisksConfig is the owner's word on disks that no [[volume]] names.
type DisksConfig struct {
	Auto  bool     `toml:"auto"`
	Use   []string `toml:"use"`
	Never []string `toml:"never"`
}

// BoardConfig is the owner's word on what board this is.
type BoardConfig struct {
	Name     string `toml:"name"`
	Profiles string `toml:"profiles"` // folder; "" is [board.Dir]
}

// LoadConfig reads a configuration file; without a path, it returns the
// defaults. A key that is not known is an error: it is most likely misspelt,
// and an owner's limit must not be ignored in silence.
func LoadConfig(path string) (Config, error) {
	c := Config{Jobs: policy.Default()}
	if path == "" {
		return c, nil
	}
	raw, err := readConfig(path)
	if err != nil {
		return c, err
	}
	meta, err := toml.Decode(string(raw), &c)
	var parse toml.ParseError
	switch {
	case errors.As(err, &parse):
		return c, fmt.Errorf("the configuration file %s, line %d: %s", path, parse.Position.Line, parse.Message)
	case err != nil:
		return c, fmt.Errorf("the configuration file %s cannot be read: %w", path, err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		var keys []string
		for _, k := range unknown {
			keys = append(keys, k.String())
		}
		return c, fmt.Errorf("the configuration file %s has keys that mean nothing: %s", path, strings.Join(keys, ", "))
	}
	if err := c.Transfer.check(); err != nil {
		return c, fmt.Errorf("the configuration file %s: %w", path, err)
	}
	if err := c.Jobs.Check(); err != nil {
		return c, fmt.Errorf("the configuration file %s: %w", path, err)
	}
	if err := c.Updates.check(); err != nil {
		return c, fmt.Errorf("the configuration file %s: %w", path, err)
	}
	c.owned = owners(meta.IsDefined, c)
	return c, nil
}

// detectBoard asks the machine what it is, unless its owner knows better. A
// profile that cannot be read is left out, and the log says so.
func (c Config) detectBoard(log *slog.Logger) board.Board {
	all, problems := board.Load(cmp.Or(c.Board.Profiles, board.Dir))
	for _, p := range problems {
		log.Warn("a board profile is left out", "error", p)
	}
	b, err := all.Named("/", c.Board.Name)
	if err != nil {
		log.Error("the configuration names a board that there is no profile of; what is detected is used", "error", err)
		return all.Detect("/")
	}
	return b
}

// ErrState begins the sentence about a state folder that cannot be used.
var ErrState = errors.New("the state folder cannot")

func (c Config) path(parts ...string) string {
	return filepath.Join(append([]string{c.StateDir}, parts...)...)
}

const lockFile = "agent.lock"

// absolute makes the folders independent of the working directory, which what is
// noted of them must outlive. It changes a copy.
func (c Config) absolute() (Config, error) {
	var err error
	if c.StateDir, err = filepath.Abs(c.StateDir); err != nil {
		return c, err
	}
	c.Volumes = slices.Clone(c.Volumes)
	for i := range c.Volumes {
		if c.Volumes[i].Dir, err = filepath.Abs(c.Volumes[i].Dir); err != nil {
			return c, err
		}
	}
	return c, nil
}

// makeState makes the state folder and takes its lock, so that two agents
// cannot both be this device on one machine. Closing the file gives it back.
func (c Config) makeState() (*os.File, error) {
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("%w be made: %w; choose another with --state", ErrState, err)
	}
	f, err := os.OpenFile(c.path(lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w be written: %w; choose another with --state", ErrState, err)
	}
	if err := flock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w be used: another agent runs with %s; stop it first", ErrState, c.StateDir)
	}
	return f, nil
}
