package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/board"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/hw/sensor"
	"github.com/deimos-edge/deimos/internal/cli"
)

type sensorsCmd struct {
	Read    sensorsReadCmd    `cmd:"" default:"withargs" help:"Read each declared sensor once, and show the values or why there are none."`
	Drivers sensorsDriversCmd `cmd:"" help:"List which chips can be read, what they measure and at which addresses."`
}

func (sensorsCmd) Help() string {
	return `Sensors are those of the board's profile and the [[sensor]] of the agent's configuration. Nothing else on a bus is asked: some chips take a question for a command.

  sudo deimos-agent sensors --config /etc/deimos/agent.toml
  deimos-agent sensors drivers

While the agent runs it may miss one reading because of this, and says so if it does.`
}

type sensorsReadCmd struct {
	Config string `env:"DEIMOS_CONFIG" placeholder:"FILE" help:"The agent's configuration, for its [[sensor]] and [board]."`
	Board  string `placeholder:"NAME" help:"As if the machine were this board."`
	cli.Output
}

// sensorReading is what is known of a declared sensor after it was asked once.
type sensorReading struct {
	Name    string           `json:"name"`
	Driver  string           `json:"driver"`
	Bus     string           `json:"bus"`
	Address string           `json:"address"`
	Values  []hw.Measurement `json:"values"`
	Error   string           `json:"error,omitempty"` // why a value is missing, and what to do
}

func (c *sensorsReadCmd) Run(ctx context.Context) error {
	declared, err := c.declared()
	if err != nil {
		return &cli.Error{Code: cli.ExitConfig, Err: err}
	}
	set, err := sensor.New(declared, slog.New(slog.DiscardHandler))
	if err != nil {
		return &cli.Error{Code: cli.ExitConfig, Err: err}
	}
	all, failed := []sensorReading{}, 0
	for _, r := range set.ReadOnce(ctx) {
		x := sensorReading{r.Name, r.Driver, r.Bus, r.Address, append([]hw.Measurement{}, r.Values...), ""}
		if r.Err != nil {
			x.Error = r.Err.Error()
			failed++
		}
		all = append(all, x)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := c.Print(all, func(w io.Writer) error { return writeReadings(w, all) }); err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("%d of %s could not be read in full", failed, cli.Count(len(all), "sensor"))
	}
	return nil
}

// declared are the sensors of the board and of the owner, in this order.
func (c *sensorsReadCmd) declared() ([]board.Sensor, error) {
	cfg, err := agent.LoadConfig(c.Config)
	if err != nil {
		return nil, err
	}
	cfg.Board.Name = cmp.Or(c.Board, cfg.Board.Name)
	b, err := boardOf(cfg)
	if err != nil {
		return nil, err
	}
	return slices.Concat(b.Sensors, cfg.Sensors), nil
}

func writeReadings(w io.Writer, all []sensorReading) error {
	if len(all) == 0 {
		_, err := fmt.Fprint(w, `No sensor is declared, by the board's profile or in the configuration (--config). One is declared like this:

  [[sensor]]
  name = "cabinet"
  driver = "bmxx80"        # "deimos-agent sensors drivers" lists them
  bus = "/dev/i2c-1"       # "deimos-agent probe" lists them
  address = "0x76"
`)
		return err
	}
	var rows, problems []string
	for _, x := range all {
		place := strings.Join([]string{x.Driver, x.Bus, x.Address}, "\t")
		for _, v := range x.Values {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s %s", v.Name, place, strconv.FormatFloat(v.Value, 'g', 6, 64), v.Unit))
		}
		if len(x.Values) == 0 {
			rows = append(rows, fmt.Sprintf("%s\t%s\t-", x.Name, place))
		}
		if x.Error != "" {
			problems = append(problems, fmt.Sprintf("%s: %s\n", x.Name, x.Error))
		}
	}
	if err := cli.Table(w, "SENSOR\tDRIVER\tBUS\tADDRESS\tVALUE", rows); err != nil || len(problems) == 0 {
		return err
	}
	_, err := fmt.Fprint(w, "\n", strings.Join(problems, ""))
	return err
}

type sensorsDriversCmd struct {
	cli.Output
}

func (c *sensorsDriversCmd) Run() error {
	all := sensor.Drivers()
	return c.Print(all, func(w io.Writer) error {
		var rows []string
		for _, d := range all {
			rows = append(rows, strings.Join(driverCells(d), "\t"))
		}
		return cli.Table(w, "DRIVER\tCHIPS\tMEASURES\tBUS\tADDRESS\tDEFAULT\tLEAST INTERVAL", rows)
	})
}

// driverCells is a line of the table of drivers, here and in docs/sensors.md.
func driverCells(d sensor.Driver) []string {
	var measures []string
	for _, k := range d.Measures {
		measures = append(measures, string(k))
	}
	preset := "-"
	if d.Bus == sensor.I2C {
		preset = d.Addresses[0]
	}
	return []string{d.Name, strings.Join(d.Chips, ", "), strings.Join(measures, ", "), string(d.Bus), d.Where(), preset, d.Least}
}
