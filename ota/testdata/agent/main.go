// An agent that can do nothing but update itself, for the tests of ota. What it
// is and does stands at the end of its own file: "\n#agent VERSION MODE\n".
//
//	agent run STATE REPOSITORY-URL ROOT-FILE ORDER-FILE
//	agent build VERSION FILE BUNDLE-DIRECTORY [BUNDLE-DIRECTORY-TO-MAKE-A-DELTA-FROM]
//
// "build" is here because packing megabytes takes ten times as long in a test
// binary with the race detector.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"github.com/deimos-edge/deimos/ota"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

func main() {
	version, mode := self()
	if os.Args[1] == "version" {
		json.NewEncoder(os.Stdout).Encode(slot.About{Version: version, OS: runtime.GOOS, Arch: runtime.GOARCH})
		return
	}
	if os.Args[1] == "build" {
		_, err := bundle.Build(context.Background(), os.Args[4], bundle.BuildOptions{
			Version: os.Args[2], Agents: []bundle.Agent{{Path: os.Args[3], Platform: bundle.Host()}}, Fast: true, DeltaFrom: os.Args[5:]})
		check(err)
		return
	}
	say("agent %s slot %s", version, os.Getenv(slot.Env))
	if mode == "crash" {
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	root, err := os.ReadFile(os.Args[4])
	check(err)
	s, err := ota.New(ota.Options{
		StateDir: os.Args[2], Slot: os.Getenv(slot.Env), Version: version,
		Root:   func() []byte { return root },
		Source: func() (repo.Source, error) { return repo.HTTP{Client: http.DefaultClient, Base: os.Args[3]}, nil },
	})
	check(err)
	check(s.Confirm(ctx))
	work(ctx, s, os.Args[5])
	<-ctx.Done()
}

// work carries out the order as a dispatcher would: what is settled is
// reported, anything else is begun, or begun again.
func work(ctx context.Context, s *ota.Service, orderFile string) {
	raw, err := os.ReadFile(orderFile)
	check(err)
	var o wire.Order
	check(json.Unmarshal(raw, &o))
	if done, err := s.Settled(); err != nil || done != nil && done.Order == o.ID {
		check(err)
		report(done.Outcome, done.Problem)
		return
	}
	out, err := s.Handle(ctx, o, func(p wire.Progress) { say("progress %.2f", p.Done) })
	if errors.Is(err, ota.ErrRestart) {
		os.Exit(slot.ExitRestart)
	}
	if err != nil {
		report(out, wire.ProblemOf(err))
		return
	}
	report(out, nil)
}

func report(out wire.Outcome, p *wire.Problem) {
	body, err := json.Marshal(out.Body)
	check(err)
	if p != nil {
		say("report %s %s %s %s", p.State, p.Code, body, p.Reason)
		return
	}
	say("report SUCCEEDED %s", body)
}

func self() (version, mode string) {
	f, err := os.Open("/proc/self/exe")
	check(err)
	_, err = f.Seek(-256, io.SeekEnd)
	check(err)
	tail, err := io.ReadAll(f)
	check(err)
	_, line, _ := strings.Cut(string(tail), "\n#agent ")
	_, err = fmt.Sscan(line, &version, &mode)
	check(err)
	return version, mode
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func check(err error) {
	if err != nil {
		say("agent failed: %v", err)
		os.Exit(2)
	}
}
