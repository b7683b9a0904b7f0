package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/internal/cli"
)

type simCmd struct {
	Agents      int    `default:"100" help:"How many devices (${default})."`
	Coordinator string `required:"" env:"DEIMOS_COORDINATOR" placeholder:"URL" help:"Where they enrol, https://HOST:8443."`
	Token       string `required:"" env:"DEIMOS_TOKEN" placeholder:"TOKEN" help:"Fleet token with a use for each of them."`
	cli.Output
	cli.LogFlags
}

// Help says more than a line.
func (s *simCmd) Help() string {
	return `Simulated devices enrol with keys of their own, hold real sessions with the broker, and answer "device.ping" and
take configuration. They keep nothing: after the end their records stay, until each is sent away by its id with
"deimos device retire". Each needs about 100 KiB and a file descriptor ("ulimit -n").

  deimos sim --agents 5000 --coordinator https://localhost:8443 --token "$(deimos token create --uses 5000)"`
}

func (s *simCmd) Run(ctx context.Context) error {
	if s.Agents < 1 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("a simulation has at least one agent")}
	}
	began := time.Now()
	var last agent.SimState
	sim := agent.Simulation{
		Coordinator: s.Coordinator, Token: s.Token, Agents: s.Agents, Version: version, Log: cli.Logger(s.LogFormat, s.LogLevel),
		Progress: func(st agent.SimState) {
			if st == last || ctx.Err() != nil { // at the end they leave one by one
				return
			}
			last = st
			fmt.Fprintf(os.Stderr, "%6.1f s  %d enrolled, %d online, %d orders done\n", time.Since(began).Seconds(), st.Enrolled, st.Online, st.Orders)
		},
	}
	if err := sim.Run(ctx); err != nil {
		return err
	}
	return s.Print(last, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%d simulated devices were online at the end, %d orders were done\n", last.Online, last.Orders)
		return err
	})
}
