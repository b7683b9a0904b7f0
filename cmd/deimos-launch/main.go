// Command deimos-launch starts the agent from one of its two slots and goes
// back to the other when a new version does not come up. It is all that stands
// between an update and a device that needs a visit, so it does nothing else:
// no network, no configuration file, nothing beyond the standard library and
// ota/slot. Updates of the agent never replace it.
//
//	deimos-launch --state DIR --agent /usr/lib/deimos/deimos-agent -- run --state DIR
//
// What it promises:
//
//   - An agent on trial may fail three times. A try fails when the process ends,
//     cannot be started, or has not confirmed itself within --confirm-within; after
//     the last one the previous version starts. Five tries that end with
//     the machine or the launcher, as in a power cut, cost nothing.
//   - A confirmed agent that crashes is started again, after 1 s at first and up
//     to 1 min. Exit code 75 means "start me again at once"; 0 means that the
//     work is done; 64 to 78 are mistakes of usage or configuration, which
//     starting again does not cure: the launcher exits with the same code.
//   - SIGTERM, SIGINT and SIGHUP stop the agent (SIGTERM, SIGKILL after
//     --stop-within) and everything it started, then the launcher.
//   - If the launcher dies, the kernel kills the agent.
//   - A state that cannot be written never keeps a confirmed agent from starting.
//
// Its own exit codes are those of sysexits.h: 64 usage, 69 another launcher runs,
// 72 no agent can be started, 74 the state directory cannot be used.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/ota/slot"
)

// version is set by the linker.
var version = "0.0.0-dev"

const (
	exitUsage       = 64
	exitUnavailable = 69
	exitNoAgent     = 72
	exitState       = 74
)

// The kernel ties PR_SET_PDEATHSIG to the thread that forks, so every start
// must come from a thread that lives as long as the process: the main one.
func init() { runtime.LockOSThread() }

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	log.SetFlags(0)
	log.SetPrefix("deimos-launch: ")
	l, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		log.Print(err)
		return exitUsage
	}
	if l == nil { // --version
		fmt.Println(version)
		return 0
	}
	if l.slots, err = slot.Open(l.stateDir); err != nil {
		log.Print(err)
		return exitState
	}
	lock, err := l.slots.LockLauncher()
	if err != nil {
		log.Printf("%s: %v; stop it first, or use another --state", l.stateDir, err)
		if errors.Is(err, slot.ErrLauncherRuns) {
			return exitUnavailable
		}
		return exitState
	}
	defer lock.Close()
	l.signals = make(chan os.Signal, 4)
	signal.Notify(l.signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	return l.supervise()
}

func parse(args []string) (*launcher, error) {
	l := &launcher{}
	fs := flag.NewFlagSet("deimos-launch", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&l.stateDir, "state", "", "the agent's state `directory`; the slots are kept below it")
	fs.StringVar(&l.factory, "agent", "", "the agent that this device was shipped with, a `file`")
	fs.DurationVar(&l.confirmWithin, "confirm-within", slot.ConfirmWithin, "how long a new version has to prove itself")
	fs.DurationVar(&l.stopWithin, "stop-within", slot.StopWithin+5*time.Second, "how long an agent has to stop before it is killed; if it is killed, a watchdog that it feeds resets the machine")
	fs.DurationVar(&l.minDelay, "restart-delay", time.Second, "wait before the first restart after a crash; doubles up to a minute")
	showVersion := fs.Bool("version", false, "print the version")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fs.SetOutput(os.Stdout)
			fmt.Println("usage: deimos-launch --state DIR --agent FILE [flags] -- ARGUMENTS OF THE AGENT")
			fs.PrintDefaults()
			return nil, err
		}
		return nil, fmt.Errorf("%w; see deimos-launch --help", err)
	}
	switch {
	case *showVersion:
		return nil, nil
	case l.stateDir == "" || l.factory == "":
		return nil, errors.New("--state and --agent are needed; see deimos-launch --help")
	case l.confirmWithin <= 0 || l.stopWithin <= 0 || l.minDelay <= 0:
		return nil, errors.New("times must be greater than zero")
	}
	l.args = fs.Args()
	return l, nil
}
