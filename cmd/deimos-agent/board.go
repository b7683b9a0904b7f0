package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw/sensor"
	"github.com/deimos-edge/deimos/internal/cli"
)

type boardCmd struct {
	Show  boardShowCmd  `cmd:"" default:"withargs" help:"Show which board this is and what is known about it."`
	List  boardListCmd  `cmd:"" help:"List the profiles of boards, built in and of the owner."`
	Check boardCheckCmd `cmd:"" help:"Check profiles before they are used; lists every problem."`
}

func (boardCmd) Help() string {
	return `A profile says what cannot be read from a machine: which LED shows the status, a button, sensors on a bus, which disks may be used.

  deimos-agent board                         which board this is
  deimos-agent board list                    all profiles
  deimos-agent board check mybox.toml        before it is put into /etc/deimos/boards`
}

// profilesFlag is where the owner's profiles are.
type profilesFlag struct {
	Profiles string `default:"/etc/deimos/boards" env:"DEIMOS_BOARDS" placeholder:"DIR" help:"Folder of the owner's profiles (${default})."`
}

// load tells on standard error what is left out.
func (f profilesFlag) load() board.Set {
	set, problems := board.Load(f.Profiles)
	for _, err := range problems {
		fmt.Fprintf(cli.Plain(os.Stderr), "deimos-agent: %v\n", err)
	}
	return set
}

// boardOf is the machine's board, or the one that the configuration names.
func boardOf(cfg agent.Config) (board.Board, error) {
	return profilesFlag{cmp.Or(cfg.Board.Profiles, board.Dir)}.load().Named("/", cfg.Board.Name)
}

type boardShowCmd struct {
	Name string `arg:"" optional:"" help:"Profile to show; what is detected if left out."`
	Root string `default:"/" placeholder:"DIR" help:"Root directory of a recorded machine."`
	profilesFlag
	cli.Output
}

func (c *boardShowCmd) Run() error {
	b, err := c.load().Named(c.Root, c.Name)
	if err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	return c.Print(b, func(w io.Writer) error { return writeBoard(w, b) })
}

func writeBoard(w io.Writer, b board.Board) error {
	var rows []string
	row := func(name string, values ...string) {
		if s := strings.Join(values, ", "); s != "" {
			rows = append(rows, name+"\t"+s)
		}
	}
	row("profile", cmp.Or(b.Name, "none"))
	row("title", b.Title)
	row("model", b.Model)
	row("vendor", b.Vendor)
	row("compatible", b.Compatible...)
	for _, l := range b.LEDs {
		row(l.Use+" light", ledPlace(l))
	}
	if b.Button != nil {
		row(b.Button.Use+" button", linePlace(b.Button.Line))
	}
	for _, s := range b.Sensors {
		row("sensor "+s.Name, strings.TrimSpace(s.Driver+" on "+s.Bus+" "+s.Address))
	}
	row("disks not used", b.Disks.Never...)
	if b.Disks.System {
		row("system's disk", "may be used")
	}
	row("warm from", degrees(b.Thermal.Warm))
	row("too hot from", degrees(b.Thermal.Critical))
	row("watchdog", b.Watchdog)
	row("system updates", b.Slots)
	return cli.Table(w, "WHAT\tVALUE", rows)
}

func ledPlace(l board.LED) string {
	if l.Line != nil {
		return linePlace(*l.Line)
	}
	return strings.Join(l.Names, " or ")
}

func linePlace(l board.Line) string {
	s := fmt.Sprintf("line %d of %s", l.Offset, l.Chip)
	if l.ActiveLow {
		s += ", active low"
	}
	if l.Pull != "" {
		s += ", pulled " + l.Pull
	}
	return s
}

func degrees(c float64) string {
	if c == 0 {
		return ""
	}
	return fmt.Sprintf("%g °C", c)
}

type boardListCmd struct {
	profilesFlag
	cli.Output
}

func (c *boardListCmd) Run() error {
	all := c.load().Profiles()
	slices.SortFunc(all, func(a, b board.Profile) int { return cmp.Compare(a.Name, b.Name) })
	return c.Print(all, func(w io.Writer) error {
		rows := make([]string, len(all))
		for i, p := range all {
			rows[i] = fmt.Sprintf("%s\t%s\t%s\t%s", p.Name, p.Title, matches(p.Match), cmp.Or(p.File, "built in"))
		}
		return cli.Table(w, "NAME\tTITLE\tFITS\tFROM", rows)
	})
}

func matches(m board.Match) string {
	list := slices.Clone(m.Compatible)
	for _, d := range m.DMI {
		list = append(list, d.Vendor+" / "+d.Product)
	}
	if len(list) == 0 {
		return "any other, " + strings.Join(m.Arch, ", ")
	}
	return strings.Join(list, "; ")
}

type boardCheckCmd struct {
	Files []string `arg:"" name:"file" help:"Profiles, NAME.toml."`
	cli.Output
}

func (boardCheckCmd) Help() string {
	return `Prints each problem with its file and, where it is known, its line, and ends with 78 if there is one.

  deimos-agent board check /etc/deimos/boards/*.toml`
}

// checked is what is wrong with a file; nothing if Problems is empty.
type checked struct {
	File     string          `json:"file"`
	Problems []board.Problem `json:"problems"`
}

func (c *boardCheckCmd) Run() error {
	all := make([]checked, len(c.Files))
	wrong := 0
	for i, file := range c.Files {
		all[i] = checkProfile(file)
		wrong += len(all[i].Problems)
	}
	if err := c.Print(all, func(w io.Writer) error { return writeChecked(w, all) }); err != nil {
		return err
	}
	if wrong > 0 {
		return &cli.Error{Code: cli.ExitConfig, Err: fmt.Errorf("%s found; correct them, then check again", cli.Count(wrong, "problem"))}
	}
	return nil
}

// checkProfile is the linter: what [board.ReadFile] finds, and whether the
// sensors' drivers can do what is declared, which board cannot know.
func checkProfile(file string) checked {
	r := checked{File: file, Problems: []board.Problem{}}
	if filepath.Ext(file) != ".toml" {
		r.Problems = append(r.Problems, board.Problem{Text: "its name does not end in .toml; it would not be read"})
	}
	p, err := board.ReadFile(file)
	if invalid, ok := errors.AsType[*board.Invalid](err); ok {
		r.Problems = append(r.Problems, invalid.Problems...)
	} else if err != nil {
		r.Problems = append(r.Problems, board.Problem{Text: err.Error()})
	}
	r.Problems = append(r.Problems, checkSensors(p)...)
	return r
}

func checkSensors(p board.Profile) []board.Problem {
	var problems []board.Problem
	for _, s := range p.Sensors {
		if err := sensor.Check(s); err != nil {
			problems = append(problems, board.Problem{Text: err.Error()})
		}
	}
	return problems
}

func writeChecked(w io.Writer, all []checked) error {
	for _, r := range all {
		for _, p := range r.Problems {
			if p.Line > 0 {
				fmt.Fprintf(w, "%s:%d: %s\n", r.File, p.Line, p.Text)
			} else {
				fmt.Fprintf(w, "%s: %s\n", r.File, p.Text)
			}
		}
		if len(r.Problems) == 0 {
			fmt.Fprintf(w, "%s: good\n", r.File)
		}
	}
	return nil
}
