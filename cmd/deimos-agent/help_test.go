package main

import (
	"bytes"
	"context"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/deimos-edge/deimos/internal/cli"
)

// shownBy is what a command line shows.
func shownBy(t *testing.T, args ...string) string {
	t.Helper()
	return printed(t, func() {
		if err := cli.Run(t.Context(), "deimos-agent", about, &commands{}, args); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
	})
}

// TestHelpIsWhatKongWouldShow: our grammar is kong's, and so is how it reads.
func TestHelpIsWhatKongWouldShow(t *testing.T) {
	for _, width := range []int{40, 80, 200} {
		t.Setenv("COLUMNS", strconv.Itoa(width))
		for _, command := range allCommands(reflect.TypeFor[commands](), nil) {
			args := append(command, "--help")
			var want bytes.Buffer
			p, err := kong.New(&commands{}, kong.Name("deimos-agent"), kong.Description(about), kong.BindTo(t.Context(), (*context.Context)(nil)),
				kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true}),
				kong.Writers(&want, &want), kong.Exit(func(int) {}))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = p.Parse(args) // goes on where it would have ended
			if want.Len() == 0 {
				t.Fatalf("%q has no help", args)
			}
			if got := shownBy(t, args...); got != want.String() {
				t.Errorf("%q, %d columns:\n%s\nwant\n%s", args, width, got, &want)
			}
		}
	}
}

// allCommands are the words that name each command, the program itself first.
func allCommands(grammar reflect.Type, path []string) [][]string {
	all := [][]string{path}
	for i := range grammar.NumField() {
		if f := grammar.Field(i); f.Tag.Get("help") != "" && f.Type.Kind() == reflect.Struct {
			if _, ok := f.Tag.Lookup("cmd"); ok {
				word := strings.ToLower(f.Name)
				all = append(all, allCommands(f.Type, append(path[:len(path):len(path)], word))...)
			}
		}
	}
	return all
}
