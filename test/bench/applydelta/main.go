// Command applydelta makes a file out of an old one and a delta, as a device does, and
// prints how many seconds that took and how many bytes of memory this process, which does
// nothing else, had at most.
//
//	applydelta ENCODING OLD DELTA NEW OUT
//
// NEW is what is to come out.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
)

func main() {
	old, patch := open(os.Args[2]), open(os.Args[3])
	var part bundle.Part
	form := bundle.Form{Encoding: os.Args[1]}
	form.From, _ = sum(os.Args[2])
	form.SHA256, form.Size = sum(os.Args[3])
	part.SHA256, part.Size = sum(os.Args[4])
	info, err := old.Stat()
	check(err)
	began := time.Now()
	check(bundle.Unpack(context.Background(), patch, part, form, io.NewSectionReader(old, 0, info.Size()), os.Args[5]))
	took := time.Since(began)
	status, err := os.ReadFile("/proc/self/status")
	check(err)
	fmt.Println(took.Seconds(), peak(string(status)))
}

// peak is VmHWM, the most that was resident, in bytes; see proc(5).
func peak(status string) (bytes int64) {
	for line := range strings.Lines(status) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	return 0
}

func sum(path string) (digest string, size int64) {
	f := open(path)
	defer f.Close()
	h := sha256.New()
	size, err := io.Copy(h, f)
	check(err)
	return hex.EncodeToString(h.Sum(nil)), size
}

func open(path string) *os.File {
	f, err := os.Open(path)
	check(err)
	return f
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "applydelta:", err)
		os.Exit(1)
	}
}
