// A stand-in for the agent. What it is and does stands at the end of its own
// file, so that one build serves as many versions:
//
//	\n#agent VERSION MODE NEXT\n
//
// It says what it does on standard error, one line each.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/ota/slot"
)

func main() {
	version, mode, next := self()
	if len(os.Args) > 1 && os.Args[1] == "version" {
		json.NewEncoder(os.Stdout).Encode(slot.About{Version: version, OS: runtime.GOOS, Arch: runtime.GOARCH})
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "sleep" { // a grandchild
		time.Sleep(time.Hour)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	say("agent %s slot %s pid %d args %s", version, os.Getenv(slot.Env), os.Getpid(), strings.Join(os.Args[1:], " "))
	slots, err := slot.Open(os.Args[2])
	check(err)
	me := slot.Name(os.Getenv(slot.Env))

	switch mode {
	case "good":
		check(slots.Confirm(me))
		say("confirmed %s", version)
	case "good-then-crash":
		check(slots.Confirm(me))
		os.Exit(3)
	case "crash":
		os.Exit(1)
	case "exit0":
		os.Exit(0)
	case "usage":
		os.Exit(78)
	case "restart-once":
		if _, err := os.Stat(filepath.Join(os.Args[2], "again")); err != nil {
			check(os.WriteFile(filepath.Join(os.Args[2], "again"), nil, 0o644))
			os.Exit(slot.ExitRestart)
		}
	case "hang": // deaf as well
		signal.Ignore(syscall.SIGTERM)
		say("hanging %s", version)
		select {}
	case "parent":
		c := exec.Command("/proc/self/exe", "sleep")
		check(c.Start())
		say("grandchild %d", c.Process.Pid)
	case "updater":
		update(slots, version, next)
		say("settled on %s", version)
	}
	say("running %s", version)
	<-stop
	say("stopping %s", version)
}

// update installs the file next once.
func update(slots *slot.Store, version, next string) {
	st, err := slots.Load()
	check(err)
	if st.Last != nil {
		return
	}
	target, err := slots.BeginInstall("order-1", version)
	if errors.Is(err, slot.ErrBusy) {
		os.Exit(slot.ExitRestart)
	}
	check(err)
	raw, err := os.ReadFile(next)
	check(err)
	check(os.WriteFile(slots.StagedPath(target), raw, 0o755))
	check(slots.MarkTrial("order-1", slot.Image{Version: "0.2.0"}))
	os.Exit(slot.ExitRestart)
}

func self() (version, mode, next string) {
	f, err := os.Open("/proc/self/exe")
	check(err)
	_, err = f.Seek(-512, io.SeekEnd)
	check(err)
	tail, err := io.ReadAll(f)
	check(err)
	_, line, ok := strings.Cut(string(tail), "\n#agent ")
	if !ok {
		return "0.0.0", "run", ""
	}
	_, err = fmt.Sscan(line, &version, &mode, &next)
	check(err)
	return version, mode, next
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func check(err error) {
	if err != nil {
		say("agent failed: %v", err)
		os.Exit(2)
	}
}
