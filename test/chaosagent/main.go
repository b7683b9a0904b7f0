// Command chaosagent is the agent with one kind of order more, whose effects
// can be counted: each "test.effect" adds a line with the order's id to
// effects.log in the state folder, durably and once, and each call of the
// handler a line to calls.log, in which a line "begin" stands for each start of
// the agent. Its jobs are done by a worker that can be told to lie, or to wait (package
// ploy). It is made for tests that kill it, or do not believe it.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == sandbox.WorkerArg {
		os.Exit(work())
	}
	var cfg agent.Config
	flag.StringVar(&cfg.StateDir, "state", "", "state folder")
	flag.StringVar(&cfg.Coordinator, "coordinator", "", "coordinator")
	flag.StringVar(&cfg.Token, "token", "", "fleet token")
	flag.Func("clock", "what the hardware clock shows at the start, RFC 3339; default: the truth", func(text string) error {
		shown, err := time.Parse(time.RFC3339, text)
		began := time.Now()
		cfg.SystemTime = func() time.Time { return shown.Add(time.Since(began)) }
		return err
	})
	// The command line is the agent's, which begins with "run", or else "owed",
	// which prints how many reports of a stopped agent are not acknowledged.
	_ = flag.CommandLine.Parse(os.Args[min(2, len(os.Args)):]) // it ends the program itself
	do := run
	if len(os.Args) > 1 && os.Args[1] == "owed" {
		do = owed
	}
	if err := do(cfg); err != nil {
		fmt.Fprintln(os.Stderr, "chaosagent:", err)
		os.Exit(1)
	}
}

func owed(cfg agent.Config) error {
	n, err := agent.Owed(cfg.StateDir)
	if err == nil {
		_, err = fmt.Println(n)
	}
	return err
}

func run(given agent.Config) error {
	cfg, err := agent.LoadConfig("")
	if err != nil {
		return err
	}
	cfg.StateDir, cfg.Coordinator, cfg.Token, cfg.SystemTime = given.StateDir, given.Coordinator, given.Token, given.SystemTime
	cfg.Version = "0.0.0-chaos"
	cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	cfg.Volumes = []agent.VolumeConfig{{Dir: filepath.Join(cfg.StateDir, "volumes", "main")}}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return err
	}
	e, err := openEffects(cfg.StateDir)
	if err != nil {
		return err
	}
	defer e.close()
	cfg.Routes = map[wire.Kind]agent.Route{"test.effect": {Handle: e.handle, AtOnce: 8, Limit: time.Hour}}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	return agent.Run(ctx, cfg)
}

// effects is the handler and what it has done.
type effects struct {
	mu    sync.Mutex
	done  map[string]bool
	log   *os.File // an order's id a line, synced: the effects
	calls *os.File // the same for each call
}

func openEffects(dir string) (*effects, error) {
	e := &effects{done: make(map[string]bool)}
	path := filepath.Join(dir, "effects.log")
	old, err := os.Open(path)
	if err == nil {
		for s := bufio.NewScanner(old); s.Scan(); {
			e.done[s.Text()] = true
		}
		old.Close()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	const flags = os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if e.log, err = os.OpenFile(path, flags, 0o600); err != nil {
		return nil, err
	}
	if e.calls, err = os.OpenFile(filepath.Join(dir, "calls.log"), flags, 0o600); err != nil {
		return nil, err
	}
	_, err = fmt.Fprintln(e.calls, "begin")
	return e, err
}

func (e *effects) close() { e.log.Close(); e.calls.Close() }

// pause is how long an order takes before and after its effect: long enough
// for a kill to fall between.
type pause struct {
	Before time.Duration `json:"before"`
	After  time.Duration `json:"after"`
}

func (e *effects) handle(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	p, err := wire.DecodeBody[pause](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	if _, err := fmt.Fprintln(e.calls, o.ID); err != nil {
		return wire.Outcome{}, err
	}
	if err := rest(ctx, p.Before); err != nil {
		return wire.Outcome{}, err
	}
	if err := e.once(o.ID); err != nil {
		return wire.Outcome{}, err
	}
	return wire.Outcome{}, rest(ctx, p.After)
}

// once leaves the effect of an order, unless it is there.
func (e *effects) once(order string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.done[order] {
		return nil
	}
	if _, err := fmt.Fprintln(e.log, order); err != nil {
		return err
	}
	if err := e.log.Sync(); err != nil {
		return err
	}
	e.done[order] = true
	return nil
}

func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
