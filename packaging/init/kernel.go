package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	kernelTells  = "kernel: "
	kernelRecord = 8 << 10     // bytes; LOG_LINE_MAX and its dictionary are less
	warning      = 4           // of syslog(2); errors and worse are less
	kernelBurst  = 200         // lines in kernelEach at most; the rest is counted
	kernelEach   = time.Minute // a disk that fails says thousands
)

// kernelLog brings the kernel's warnings and errors, such as of a disk that fails or
// of a process that was killed for want of memory, into the log. They are on
// the console already, as far as the kernel's command line wants them there.
type kernelLog struct {
	note func(line string)
	each time.Duration
	now  func() time.Time // asked for each line
}

// follow reads f, which is /dev/kmsg, from what the kernel said first, until ctx ends.
func (k *kernelLog) follow(ctx context.Context, f *os.File) error {
	defer context.AfterFunc(ctx, func() { f.Close() })()
	defer f.Close()
	record := make([]byte, kernelRecord)
	began, noted, left := k.now(), 0, 0
	for {
		n, err := f.Read(record)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EPIPE):
			k.note(kernelTells + "some of its lines were overwritten before they were read")
			continue
		case err != nil:
			return fmt.Errorf("what the kernel says cannot be read any more: %w", err)
		}
		line, ok := kernelLine(record[:n])
		if !ok {
			continue
		}
		if now := k.now(); now.Sub(began) >= k.each {
			if left > 0 {
				k.note(fmt.Sprintf("%s%d further lines were left out", kernelTells, left))
			}
			began, noted, left = now, 0, 0
		}
		if noted++; noted > kernelBurst {
			left++
			continue
		}
		k.note(kernelTells + line)
	}
}

// kernelLine is the text of a record (Documentation/ABI/testing/dev-kmsg) if it is the
// kernel's own and a warning or worse:
//
//	priority,sequence,microseconds,flags[,…];text\n KEY=value\n…
func kernelLine(record []byte) (line string, ok bool) {
	head, text, ok := bytes.Cut(record, []byte(";"))
	if !ok {
		return "", false
	}
	fields := strings.SplitN(string(head), ",", 4)
	priority, err := strconv.Atoi(fields[0])
	if err != nil || priority > warning || len(fields) < 4 { // above 7 it is somebody else's than the kernel's
		return "", false
	}
	text, _, _ = bytes.Cut(text, []byte("\n"))
	micro, _ := strconv.ParseUint(fields[2], 10, 64)
	return fmt.Sprintf("[%d.%06d] %s", micro/1e6, micro%1e6, text), len(text) > 0
}

// followKernel takes what the kernel says to the ring until ctx ends.
func (m *machine) followKernel(ctx context.Context) {
	f, err := os.OpenFile(m.path("dev/kmsg"), os.O_RDONLY|unix.O_NONBLOCK, 0) // so that a close ends a read
	if err == nil {
		err = (&kernelLog{note: m.journal.note, each: kernelEach, now: time.Now}).follow(ctx, f)
	}
	if err != nil {
		m.log.Warn("the log goes on without the kernel's lines", "error", err)
	}
}
