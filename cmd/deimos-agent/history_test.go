package main

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/internal/cli"
)

func TestAFolderThatHangsEndsTheCommand(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	read := func() (int, error) { <-hang; return 1, nil }
	if _, err := within(t.Context(), time.Millisecond, "/srv/state", read); err == nil || !strings.Contains(err.Error(), "/srv/state does not answer") {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := within(ctx, time.Hour, "/srv/state", read); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if v, err := within(t.Context(), time.Hour, "", func() (int, error) { return 7, nil }); v != 7 || err != nil {
		t.Errorf("%d %v", v, err)
	}
}

func TestAnEmptyHistorySaysWhatFits(t *testing.T) {
	zero, day := time.Duration(0), 24*time.Hour
	for _, c := range []historyCmd{{}, {Since: &zero}, {Since: &day}} {
		if s := c.nothing(); strings.Contains(s, "names") || !strings.Contains(s, "every five minutes") || strings.Contains(s, "--since 0") != (c.Since == &day) {
			t.Error(s)
		}
	}
	if s := (&historyCmd{Series: []string{"x"}}).nothing(); !strings.Contains(s, "no names show a table") {
		t.Error(s)
	}
	missing := &historyCmd{State: filepath.Join(t.TempDir(), "none")}
	if err := missing.Run(t.Context()); cli.CodeOf(err) != cli.ExitConfig {
		t.Errorf("%v", err)
	}
}
