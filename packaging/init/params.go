package main

import (
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/BurntSushi/toml"
)

// params is what the kernel's command line says to us.
type params struct {
	coordinator string        // deimos.coordinator=https://host:8443
	token       string        // deimos.token=deimos_…
	ntp         []string      // deimos.ntp=host,host; "off" alone: none
	confirm     time.Duration // deimos.confirm=60s: how long a firmware on trial has; 0 if nothing is said
}

const (
	longestLine = 64 << 10 // of the kernel's command line, bytes; COMMAND_LINE_SIZE is 2 KiB on arm64
	longestText = 1 << 10  // of a value, bytes
)

// parseCommandLine takes our words out of the kernel's command line, which is
// split as the kernel splits it (lib/cmdline.c, next_arg): at spaces, but not
// between double quotes. The last of several counts. Values with control
// characters, and addresses that are none, are left out.
func parseCommandLine(line string) params {
	var p params
	if len(line) > longestLine {
		line = line[:longestLine]
	}
	for _, word := range splitWords(line) {
		key, value, _ := strings.Cut(word, "=")
		value = strings.Trim(value, `"`)
		if len(value) > longestText || strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) || r == ' ' }) {
			continue
		}
		switch strings.Trim(key, `"`) {
		case "deimos.coordinator":
			if isAddress(value) {
				p.coordinator = value
			}
		case "deimos.token":
			p.token = value
		case "deimos.confirm":
			if d, err := time.ParseDuration(value); err == nil && d > 0 {
				p.confirm = d
			}
		case "deimos.ntp":
			p.ntp = slices.DeleteFunc(strings.Split(value, ","), func(s string) bool { return s == "" })
		}
	}
	return p
}

func splitWords(line string) []string {
	quoted := false
	return strings.FieldsFunc(line, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\t' || r == '\n' || r == 0)
	})
}

// isAddress tells whether text can be the address of a coordinator.
func isAddress(text string) bool {
	u, err := url.Parse(text)
	return err == nil && u.Scheme == "https" && u.Hostname() != "" && u.User == nil && u.RawQuery == "" && u.Fragment == "" && len(text) <= longestText
}

// ownersFile is what we must know of deimos.toml; the agent reads all of it.
type ownersFile struct {
	Coordinator string  `toml:"coordinator"`
	Watchdog    *string `toml:"watchdog"`
}

// prepareConfig is the agent's configuration: what the owner wrote, and the
// machine's watchdog where the owner says nothing of it (`watchdog = ""` is a
// word). A file that is no TOML stays as it is, and is not sound: the agent tells
// what is wrong with it, with the line.
func prepareConfig(raw []byte, watchdog string) (config []byte, coordinator string, sound bool) {
	var f ownersFile
	raw = []byte(strings.TrimPrefix(string(raw), "\ufeff")) // editors of Windows begin with it
	if _, err := toml.Decode(string(raw), &f); err != nil {
		return raw, "", false
	}
	if f.Watchdog == nil && watchdog != "" {
		raw = append([]byte("watchdog = \""+watchdog+"\" # this machine's\n"), raw...)
	}
	return raw, f.Coordinator, true
}

// namedWatchdog is the watchdog that the agent will use: what the prepared
// configuration names, and the other where it cannot be read.
func namedWatchdog(config []byte, otherwise string) string {
	var f ownersFile
	if _, err := toml.Decode(string(config), &f); err != nil || f.Watchdog == nil {
		return otherwise
	}
	return *f.Watchdog
}
