//go:build wasip1

// Command sha256sum is a guest that prints the SHA-256 of standard input in
// lower-case hex, and a newline.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
)

func main() {
	h := sha256.New()
	if _, err := io.Copy(h, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "sha256sum: cannot read the input:", err)
		os.Exit(1)
	}
	if _, err := fmt.Printf("%x\n", h.Sum(nil)); err != nil {
		fmt.Fprintln(os.Stderr, "sha256sum: cannot write the output:", err)
		os.Exit(1)
	}
}
