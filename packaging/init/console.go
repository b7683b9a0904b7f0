package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/deimos-edge/deimos/packaging/init/logring"
)

// ringLimits is what the log may take of the data partition: 8 MiB.
var ringLimits = logring.Limits{Segments: 8, Size: 1 << 20}

const (
	queued  = 1000     // lines that wait for a slow console or disk; more are dropped and counted
	longest = 4 << 10  // bytes of a line
	tellTo  = "init: " // before our own lines
)

// journal takes lines from us and from the agent, and warnings of the kernel's, to the console and to the ring
// on the data partition. say never blocks: neither a serial line that nobody
// reads nor a disk that hangs may hold up the agent. What is said before there is a
// ring is kept in the queue of the ring.
type journal struct {
	console, ring *outlet
	began         time.Time
}

func newJournal(console io.Writer) *journal {
	return &journal{
		began:   time.Now(),
		console: newOutlet(func(line string) error { _, err := io.WriteString(console, line+"\r\n"); return err }),
		ring:    newOutlet(nil),
	}
}

// say takes one line, of whomever. What is not printable becomes "?", so that
// nothing steers a terminal.
func (j *journal) say(line string) {
	line = clean(line)
	if line == "" {
		return
	}
	j.console.put(line)
	j.note(line)
}

// note takes a line that the console has already.
func (j *journal) note(line string) {
	line = clean(line)
	// The clock may be wrong by decades early on; the time since boot is not.
	now := time.Now()
	j.ring.put(fmt.Sprintf("%s +%.3f %s", now.UTC().Format(time.RFC3339), now.Sub(j.began).Seconds(), line))
}

func clean(line string) string {
	line = strings.TrimRight(line, "\r\n")
	if len(line) > longest {
		line = line[:longest]
	}
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, line)
}

// logger writes our own lines.
func (j *journal) logger() *slog.Logger {
	drop := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	return slog.New(slog.NewTextHandler(lineWriter(j.say), &slog.HandlerOptions{ReplaceAttr: drop}))
}

type lineWriter func(string)

func (w lineWriter) Write(b []byte) (int, error) {
	w(tellTo + string(bytes.TrimRight(b, "\n")))
	return len(b), nil
}

// outlet is a bounded queue of lines before a writer that may be slow.
type outlet struct {
	lines chan string
	write func(string) error // nil until there is where to write

	mu   sync.Mutex
	lost int // guarded by mu
}

func newOutlet(write func(string) error) *outlet {
	return &outlet{lines: make(chan string, queued), write: write}
}

func (o *outlet) put(line string) {
	select {
	case o.lines <- line:
	default:
		o.mu.Lock()
		o.lost++
		o.mu.Unlock()
	}
}

// drain writes until ctx ends, and then what waits.
func (o *outlet) drain(ctx context.Context) {
	for {
		select {
		case line := <-o.lines:
			o.emit(line)
		case <-ctx.Done():
			for {
				select {
				case line := <-o.lines:
					o.emit(line)
				default:
					return
				}
			}
		}
	}
}

func (o *outlet) emit(line string) {
	o.mu.Lock()
	lost := o.lost
	o.lost = 0
	o.mu.Unlock()
	if lost > 0 {
		if o.write(fmt.Sprintf("%s%d lines were lost here", tellTo, lost)) == nil {
			lost = 0
		}
	}
	if o.write(line) != nil {
		lost++ // a console that is gone, a disk that is full: told when it is back
	}
	o.mu.Lock()
	o.lost += lost
	o.mu.Unlock()
}

// openConsole is the kernel's console, or standard error.
func openConsole(path string) io.Writer {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return os.Stderr
	}
	return f
}
