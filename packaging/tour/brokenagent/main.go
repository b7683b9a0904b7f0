// Command brokenagent is the bad release of the tour and of the update tests:
// it passes every check that can be made before it runs, then does not come up.
// Built with -X main.mode=hang it starts and never confirms itself.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"
)

// Set by the linker.
var (
	version = "0.0.0-dev"
	mode    = "crash" // or "hang"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: brokenagent run | version [-o json]")
		os.Exit(64)
	}
	switch os.Args[1] {
	case "version":
		printVersion(slices.Contains(os.Args[2:], "json"))
	case "run":
		comeUpBroken()
	default:
		fmt.Fprintf(os.Stderr, "brokenagent: there is no command %q\n", os.Args[1])
		os.Exit(64)
	}
}

func printVersion(asJSON bool) {
	if !asJSON {
		fmt.Println(version)
		return
	}
	about := map[string]string{"version": version, "os": runtime.GOOS, "arch": runtime.GOARCH}
	if err := json.NewEncoder(os.Stdout).Encode(about); err != nil {
		os.Exit(1)
	}
}

func comeUpBroken() {
	if mode == "hang" {
		fmt.Fprintf(os.Stderr, "deimos-agent %s: starting\n", version)
		for {
			time.Sleep(time.Hour)
		}
	}
	fmt.Fprintf(os.Stderr, "deimos-agent %s: this release is broken on purpose\n", version)
	os.Exit(1)
}
