package slot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// askLimit is how long an agent may take to say what it is.
const askLimit = 10 * time.Second

// About is what an agent binary says of itself: the output of "version -o json".
type About struct {
	Version string `json:"version"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// Ask runs "PATH version -o json" for at most ten seconds. It is the first sign
// of life of a new agent: that it starts on this machine at all.
func Ask(ctx context.Context, path string) (About, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	out, err := output(ctx, path)
	// Another goroutine that forks while the file was being written holds it
	// open until its exec; the kernel then refuses to run the file.
	for tries := 0; errors.Is(err, unix.ETXTBSY) && tries < 20; tries++ {
		time.Sleep(50 * time.Millisecond)
		out, err = output(ctx, path)
	}
	if err != nil {
		return About{}, fmt.Errorf("%s version: %w", path, err)
	}
	var about About
	if err := json.Unmarshal(out, &about); err != nil {
		return About{}, fmt.Errorf("%s version: the answer is no JSON: %w", path, err)
	}
	return about, nil
}

func output(ctx context.Context, path string) ([]byte, error) {
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, "version", "-o", "json")
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout = &capped{w: &out, left: 64 << 10}
	cmd.Stderr = &capped{w: &stderr, left: 4 << 10}
	cmd.WaitDelay = 5 * time.Second // it has ended, and an agent that gets no processor for a second reads its answer late
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("no answer in time: %w", ctx.Err())
	case err != nil && stderr.Len() > 0:
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return out.Bytes(), err
}

// capped passes on so many bytes and swallows the rest.
type capped struct {
	w    io.Writer
	left int
}

func (c *capped) Write(p []byte) (int, error) {
	n := min(len(p), c.left)
	c.left -= n
	if n > 0 {
		if _, err := c.w.Write(p[:n]); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}
