package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// argLines reads a file, or standard input if it is named "-", of which each line is the
// arguments of one task. Lines are taken apart as by "xargs -L 1": at blanks, where no
// quotes and no backslash keep them together. A line of blanks is none.
func argLines(path string) ([][]string, error) {
	var from io.Reader = os.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("the lists of arguments cannot be read: %w", err)
		}
		defer f.Close()
		from = f
	}
	var out [][]string
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, api.MaxSpecText+1)
	n := 1
	for ; lines.Scan(); n++ {
		args, err := words(lines.Text())
		if err != nil {
			return nil, usage("line %d of %s: %w", n, path, err)
		}
		if len(args) > 0 {
			out = append(out, args)
		}
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, usage("line %d of %s has more than %d bytes, which no job takes as arguments: store them as a file", n, path, api.MaxSpecText)
	case err != nil:
		return nil, fmt.Errorf("%s cannot be read: %w", path, err)
	case len(out) == 0:
		return nil, usage("%s has no line with arguments", path)
	case len(out) > api.MaxTasks:
		return nil, usage("%s has %d lines with arguments, and a job at most %d tasks: divide it (split -l %d)", path, len(out), api.MaxTasks, api.MaxTasks)
	}
	return out, nil
}

// words takes one line apart.
func words(line string) (out []string, err error) {
	var word strings.Builder
	in, quote, escaped := false, rune(0), false
	for _, c := range line {
		switch {
		case escaped:
			word.WriteRune(c)
			escaped = false
		case c == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(c)
		case c == '\\':
			in, escaped = true, true
		case c == '\'' || c == '"':
			in, quote = true, c
		case c == ' ' || c == '\t' || c == '\r':
			if in {
				out = append(out, word.String())
			}
			word.Reset()
			in = false
		default:
			in = true
			word.WriteRune(c)
		}
	}
	switch {
	case quote != 0:
		return nil, fmt.Errorf("the quote %c has no end; a backslash before it makes it a letter like any other", quote)
	case escaped:
		return nil, errors.New("nothing follows the last backslash")
	case in:
		out = append(out, word.String())
	}
	return out, nil
}
