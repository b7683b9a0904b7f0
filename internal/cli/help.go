package cli

import (
	"bytes"
	"fmt"
	"go/doc/comment"
	"io"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Columns is how wide a terminal is: what $COLUMNS says (POSIX, Base Definitions
// 8.3), else what f says, else 80.
func Columns(f *os.File) int {
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil {
		return n
	}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
		return int(size.Col)
	}
	return 80
}

// writeHelp says how n, of the program called name, is used.
func writeHelp(w io.Writer, name string, n *node, width int) error {
	var out bytes.Buffer
	fmt.Fprintf(&out, "Usage: %s\n", n.usage(name))
	for _, text := range []string{n.help, n.detail} {
		if text != "" {
			fmt.Fprintf(&out, "\n%s\n", wrapped(text, "    ", width))
		}
	}
	var args, commands [][2]string
	for _, x := range n.args {
		args = append(args, [2]string{x.summary(), x.help})
	}
	writeColumns(&out, "Arguments", args, width)
	writeColumns(&out, "Flags", n.flagRows(), width)
	for _, c := range n.children {
		commands = append(commands, [2]string{c.path(), c.help})
	}
	writeColumns(&out, "Commands", commands, width)
	if n.parent == nil {
		fmt.Fprintf(&out, "\nRun \"%s <command> --help\" for more information on a command.\n", name)
	}
	for line := range strings.Lines(out.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// usage is a command line of n as a pattern.
func (n *node) usage(name string) string {
	words := []string{strings.TrimSpace(name + " " + n.path())}
	if len(n.children) > 0 {
		words = append(words, "<command>")
	}
	for _, x := range n.args {
		words = append(words, x.summary())
	}
	if len(n.flags) > 0 {
		words = append(words, "[flags]")
	}
	return strings.Join(words, " ")
}

// flagRows are the flags and what they mean: help, and those of n itself.
func (n *node) flagRows() [][2]string {
	rows := [][2]string{{"-h, --help", "Show context-sensitive help."}}
	if len(n.flags) > 0 {
		rows = append(rows, [2]string{})
	}
	for _, x := range n.flags {
		left := "    --" + x.name
		if x.short != "" {
			left = "-" + x.short + ", --" + x.name
		}
		if !x.isBool() {
			left += "=" + x.example()
		}
		rows = append(rows, [2]string{left, x.described()})
	}
	return rows
}

// described is what x means, with the variable that it can come from.
func (x *value) described() string {
	if x.env == "" {
		return x.help
	}
	return strings.TrimSuffix(x.help, ".") + " ($" + x.env + ")."
}

// example stands for x's value.
func (x *value) example() string {
	tail := ""
	if x.isList() {
		tail = ",..."
	}
	switch {
	case x.placeholder != "":
		return x.placeholder + tail
	case x.preset != "" && x.target.Kind() == reflect.String:
		return strconv.Quote(x.preset)
	case x.preset != "":
		return x.preset + tail
	}
	return strings.ToUpper(x.name) + tail
}

// summary is how a positional argument is written.
func (x *value) summary() string {
	s := "<" + x.name + ">"
	if x.isList() {
		s += " ..."
	}
	if x.optional {
		s = "[" + s + "]"
	}
	return s
}

// writeColumns writes a section of what there is and what it means.
func writeColumns(out *bytes.Buffer, title string, rows [][2]string, width int) {
	if len(rows) == 0 {
		return
	}
	fmt.Fprintf(out, "\n%s:\n", title)
	const indent, between = "  ", 4
	width -= len(indent)
	// What is too long for its column has a line of its own.
	longest, left := max(375*width/1000, 30), 0
	for _, row := range rows {
		if n := len(row[0]); n < longest {
			left = max(left, n)
		}
	}
	margin := indent + strings.Repeat(" ", left+between)
	for _, row := range rows {
		lines := strings.Split(wrapped(row[1], indent, width-left-between), "\n")
		if len(row[0]) >= longest {
			fmt.Fprintf(out, "%s%s\n", indent, row[0])
		} else {
			fmt.Fprintf(out, "%s%-*s%s\n", indent, left+between, row[0], lines[0])
			lines = slices.Delete(lines, 0, 1)
		}
		for _, line := range lines {
			fmt.Fprintf(out, "%s%s\n", margin, line)
		}
	}
}

// wrapped breaks the lines of text as those of a Go comment: what is indented
// stays as it is, behind prefix.
func wrapped(text, prefix string, width int) string {
	p := comment.Printer{TextCodePrefix: prefix, TextWidth: width}
	var parser comment.Parser
	return strings.TrimSpace(string(p.Text(parser.Parse(text))))
}
