// Command worker is the smallest executable that a Runner can use; tests build
// it for another architecture.
package main

import (
	"os"

	"github.com/deimos-edge/deimos/jobs/sandbox"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == sandbox.WorkerArg {
		os.Exit(sandbox.WorkerMain())
	}
}
