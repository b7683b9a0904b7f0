// Package cli is what the two command lines share: how data is printed, how a
// failure ends a program, how sizes and times are said to people.
package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Exit codes, after sysexits.h where that has one. The launcher of the agent
// relies on them: it does not start again what ends with 64 to 78, except 75.
const (
	ExitFailed   = 1
	ExitUsage    = 64 // the command line is wrong
	ExitNoServer = 69 // the coordinator cannot be reached
	ExitNoCreate = 73 // state cannot be made or is in use
	ExitNotYet   = 75 // what was waited for has not ended; of a command, never of the agent
	ExitRestart  = 75 // start me again (ota/slot.ExitRestart)
	ExitNoPerm   = 77 // refused: a token, a certificate
	ExitConfig   = 78 // the configuration is wrong or incomplete
)

// Error is an error with an exit code of its own.
type Error struct {
	Code int
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Exit ends the program: with 0 for nil, else with one sentence on standard
// error and the error's code.
func Exit(name string, err error) {
	if err == nil {
		os.Exit(0)
	}
	if errors.Is(err, context.Canceled) {
		os.Exit(130) // the person knows: it was their Ctrl-C
	}
	fmt.Fprintf(Plain(os.Stderr), "%s: %v\n", name, err)
	os.Exit(CodeOf(err))
}

// CodeOf is the exit code of an error.
func CodeOf(err error) int {
	var e *Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.Code
	}
	return ExitFailed
}

// Main runs a program on its command line, which is "--help" if there is none,
// and ends it. The context ends with Ctrl-C or SIGTERM; coded gives an error its
// exit code (see [Error]).
func Main(name string, coded func(error) error, run func(ctx context.Context, args []string) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second Ctrl-C ends a program that does not end well. A second SIGTERM does
	// not: systemd sends one to the launcher and to the agent, and the launcher its
	// own to the agent, which would die of it and leave the watchdog armed.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	args := os.Args[1:]
	if len(args) == 0 {
		args = []string{"--help"}
	}
	Exit(name, coded(run(ctx, args)))
}

// Usage is what is said of a command line that cannot be understood.
func Usage(name string, err error) error {
	return &Error{ExitUsage, fmt.Errorf("%w; see \"%s --help\"", err, name)}
}

// Output is the -o flag.
type Output struct {
	Format string `name:"output" short:"o" enum:"table,json" default:"table" help:"How to print: ${enum}."`
}

// JSON tells whether the caller wants JSON.
func (o Output) JSON() bool { return o.Format == "json" }

// Print writes v as JSON, or calls table.
func (o Output) Print(v any, table func(w io.Writer) error) error {
	if o.JSON() {
		raw, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		_, err = os.Stdout.Write(append(escape(raw), '\n'))
		return err
	}
	return table(Plain(os.Stdout))
}

// Line writes v as one line of JSON, as the next of a stream of them.
func Line(w io.Writer, v any) error {
	raw, err := json.Marshal(v)
	if err == nil {
		_, err = w.Write(append(escape(raw), '\n'))
	}
	return err
}

// escape writes the characters of a JSON document that are not printable, which
// can stand in its strings only, as JSON's \u: the same document, and nothing
// that steers a terminal. encoding/json does so for those below a space.
func escape(raw []byte) []byte {
	if !bytes.ContainsFunc(raw, unprintable) {
		return raw
	}
	out := make([]byte, 0, len(raw)+64)
	for len(raw) > 0 {
		r, n := utf8.DecodeRune(raw)
		switch {
		case r == utf8.RuneError && n == 1, unprintable(r) && r <= 0xffff:
			out = fmt.Appendf(out, `\u%04x`, r)
		case unprintable(r):
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		default:
			out = append(out, raw[:n]...)
		}
		raw = raw[n:]
	}
	return out
}

// unprintable also holds for U+FFFD, which is how a broken byte reads.
func unprintable(r rune) bool { return r != '\n' && (r == utf8.RuneError || !unicode.IsPrint(r)) }

// Plain is a writer of text for a terminal: what devices say of themselves goes
// through here, and must not steer it. What is not printable, but new lines and
// tabs, becomes "?".
func Plain(w io.Writer) io.Writer { return plain{w} }

type plain struct{ w io.Writer }

func (p plain) Write(b []byte) (int, error) {
	if _, err := io.WriteString(p.w, harmless(string(b))); err != nil {
		return 0, err
	}
	return len(b), nil
}

func harmless(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// Table aligns rows under a head; cells are separated by tabs.
func Table(w io.Writer, head string, rows []string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, head)
	for _, r := range rows {
		fmt.Fprintln(t, r)
	}
	return t.Flush()
}

// Version is what a program says about itself.
type Version struct {
	Version string `json:"version"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	Go      string `json:"go"`
}

// PrintVersion answers a version command.
func PrintVersion(o Output, name, version string) error {
	v := Version{version, runtime.GOOS, runtime.GOARCH, runtime.Version()}
	return o.Print(v, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s %s (%s/%s, %s)\n", name, v.Version, v.OS, v.Arch, v.Go)
		return err
	})
}

// Bytes says a size to a person.
func Bytes(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/unit, 0
	for f >= unit && i < 4 {
		f /= unit
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTP"[i])
}

// Count says how many to a person: "1 chunk", "2 chunks".
func Count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// Ago says a time to a person.
func Ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	d := time.Since(t)
	switch {
	case d < 2*time.Second:
		return "now"
	case d < time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	}
	return t.UTC().Format("2006-01-02")
}

// Short shortens a digest for a table.
func Short(hex string) string {
	if len(hex) > 12 {
		return hex[:12]
	}
	return hex
}

// Logger logs to standard error: for people on a terminal, as JSON lines elsewhere.
func Logger(format, level string) *slog.Logger {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		l = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: l}
	if format == "auto" && !Terminal(os.Stderr) || format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, opts))
	}
	// A person wants the time of day, not the date and a zone.
	opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey && len(groups) == 0 {
			a.Value = slog.StringValue(a.Value.Time().Format(time.TimeOnly))
		}
		return a
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts))
}

// LogFlags are the flags of what runs for long.
type LogFlags struct {
	LogFormat string `enum:"auto,text,json" default:"auto" env:"DEIMOS_LOG_FORMAT" help:"Log as ${enum}; auto is text on a terminal, JSON elsewhere."`
	LogLevel  string `enum:"debug,info,warn,error" default:"info" env:"DEIMOS_LOG_LEVEL" help:"Log from this level on: ${enum}."`
}

// Terminal tells whether a person watches f.
func Terminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// Wrap breaks text into lines of at most width characters.
func Wrap(s string, width int) (lines []string) {
	line := ""
	for _, word := range strings.Fields(s) {
		if line != "" && len([]rune(line))+1+len([]rune(word)) > width {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	if line == "" {
		return lines
	}
	return append(lines, line)
}
