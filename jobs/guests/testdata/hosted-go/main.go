//go:build wasip1

// Command hosted-go calls all of the guest package and prints what came of it, the same
// as hosted-c of deimos.h.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/deimos-edge/deimos/jobs/guests/deimos"
)

func main() {
	deimos.Progress(0.25)
	state, ok := deimos.Restore()
	if !ok {
		fmt.Println("restored nothing")
	} else {
		fmt.Printf("restored %s\n", state)
	}
	deimos.Log(deimos.Warning, "wärning")
	fmt.Println("should checkpoint", deimos.ShouldCheckpoint())

	in, err := deimos.OpenInput("data")
	check(err)
	buf := make([]byte, 5)
	_, err = in.ReadAt(buf, 3)
	check(err)
	fmt.Printf("data has %d bytes, at 3: %s\n", in.Size(), buf)
	n, err := in.ReadAt(buf, in.Size()-2)
	fmt.Println("at its end", n, err == io.EOF)
	if _, err := deimos.OpenInput("missing"); !errors.Is(err, os.ErrNotExist) {
		check(errors.New("there is an input that is missing"))
	}
	fmt.Printf("sha256 %x\n", deimos.SHA256([]byte("abc")))

	r, err := deimos.In("data")
	check(err)
	w, err := deimos.Out("copy")
	check(err)
	_, err = io.Copy(w, r)
	check(err)
	check(w.Close())

	fmt.Println("kept", deimos.Checkpoint([]byte("first")) == nil)
	fmt.Println("kept", deimos.Checkpoint([]byte("second")) == nil)
	deimos.Progress(2) // as much as there is
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "hosted:", err)
		os.Exit(1)
	}
}
