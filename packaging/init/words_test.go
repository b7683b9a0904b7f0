package main

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/beevik/ntp"
	"github.com/brutella/dnssd"
)

func TestCommandLine(t *testing.T) {
	p := parseCommandLine(`console=ttyAMA0 deimos.coordinator=https://old:1 quiet "deimos.token=deimos_abc" deimos.coordinator="https://host:8443" deimos.ntp=a,,b`)
	if p.coordinator != "https://host:8443" || p.token != "deimos_abc" || strings.Join(p.ntp, " ") != "a b" {
		t.Errorf("%+v", p)
	}
	for _, bad := range []string{"deimos.coordinator=http://host:1", "deimos.coordinator=https://u:p@host:1", "deimos.coordinator=host:1", "deimos.token=\"a b\"", "deimos.token=a\x1b[2J"} {
		if p := parseCommandLine(bad); p.coordinator != "" || p.token != "" {
			t.Errorf("%q: %+v", bad, p)
		}
	}
}

func FuzzCommandLine(f *testing.F) {
	f.Add(`deimos.coordinator=https://a:1 deimos.token="x`)
	f.Fuzz(func(t *testing.T, line string) {
		p := parseCommandLine(line)
		for _, v := range append([]string{p.coordinator, p.token}, p.ntp...) {
			if len(v) > longestText || strings.ContainsAny(v, " \n\x00\x1b") {
				t.Fatalf("%q gives %q", line, v)
			}
		}
	})
}

func TestOwnersWordOnTheWatchdogStands(t *testing.T) {
	for text, want := range map[string]string{
		"": "/dev/watchdog0",
		"coordinator = \"https://h:1\"\n[jobs]\nenabled = false\n": "/dev/watchdog0",
		"watchdog = \"\"\n":               "",
		"watchdog = \"/dev/watchdog1\"\n": "/dev/watchdog1",
		"\ufeffwatchdog = \"\"\n":         "",
	} {
		raw, _, _ := prepareConfig([]byte(text), "/dev/watchdog0")
		var got struct {
			Watchdog string `toml:"watchdog"`
		}
		if _, err := toml.Decode(string(raw), &got); err != nil || got.Watchdog != want {
			t.Errorf("%q becomes %q: %v", text, raw, err)
		}
	}
	if raw, _, sound := prepareConfig([]byte("coordinator = \n"), "/dev/watchdog0"); string(raw) != "coordinator = \n" || sound {
		t.Errorf("a broken file was changed to %q", raw)
	}
}

func TestAnAnswerOfTheNetworkIsTakenAtItsWordOrItsAddress(t *testing.T) {
	entry := func(name string, port int, text map[string]string, ips ...string) dnssd.BrowseEntry {
		e := dnssd.BrowseEntry{Name: name, Port: port, Text: text}
		for _, ip := range ips {
			e.IPs = append(e.IPs, net.ParseIP(ip))
		}
		return e
	}
	for claim, c := range map[string]struct {
		entries []dnssd.BrowseEntry
		want    string
	}{
		"an address":                {[]dnssd.BrowseEntry{entry("a", 8443, nil, "fe80::1", "2001:db8::1", "192.0.2.1")}, "https://192.0.2.1:8443"},
		"on two links":              {[]dnssd.BrowseEntry{entry("a", 8443, nil, "2001:db8::1"), entry("a", 8443, nil, "192.0.2.1")}, "https://192.0.2.1:8443"},
		"its own word":              {[]dnssd.BrowseEntry{entry("a", 1, map[string]string{"url": "https://fleet.example.org:8443"}, "192.0.2.1")}, "https://fleet.example.org:8443"},
		"two":                       {[]dnssd.BrowseEntry{entry("a", 8443, nil, "192.0.2.1"), entry("b", 8443, nil, "192.0.2.2")}, "https://192.0.2.1:8443 https://192.0.2.2:8443"},
		"no address of use":         {[]dnssd.BrowseEntry{entry("a", 8443, nil, "fe80::1", "127.0.0.1", "224.0.0.1"), entry("b", 0, nil, "192.0.2.1")}, ""},
		"a word that is no address": {[]dnssd.BrowseEntry{entry("a", 8443, map[string]string{"url": "https://h:1/\x1b[2J"}, "192.0.2.1")}, ""},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		d := &discovery{log: slog.New(slog.DiscardHandler), browse: func(_ context.Context, add func(dnssd.BrowseEntry)) error {
			for _, e := range c.entries {
				add(e)
			}
			return nil
		}}
		got, err := d.look(ctx)
		cancel()
		if err != nil || strings.Join(addressesOf(got), " ") != c.want {
			t.Errorf("%s: %q, %v", claim, got, err)
		}
	}
}

func TestNTPIsTakenForNoTimeThatCannotBe(t *testing.T) {
	floor := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for claim, c := range map[string]struct {
		offset time.Duration
		want   bool
	}{
		"later":              {24 * time.Hour, true},
		"before the floor":   {-24 * time.Hour, false},
		"long after":         {11 * 365 * 24 * time.Hour, false},
		"as good as in step": {time.Millisecond, false},
	} {
		set := false
		k := &clock{floor: floor, now: func() time.Time { return floor.Add(time.Hour) }, set: func(time.Time) error { set = true; return nil }, log: slog.New(slog.DiscardHandler),
			query: func(string) (*ntp.Response, error) {
				return &ntp.Response{ClockOffset: c.offset, Stratum: 2, Time: floor, ReferenceTime: floor, RootDistance: time.Millisecond}, nil
			}}
		k.hint("server")
		if set != c.want {
			t.Errorf("a time %s: set is %v", claim, set)
		}
	}
}

func TestStepThatHangsOrPanicsEnds(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	hang := make(chan struct{})
	defer close(hang)
	if err := step(log, "hang", time.Millisecond, func(context.Context) error { <-hang; return nil }); !errors.Is(err, errLimit) {
		t.Errorf("a step that hangs: %v", err)
	}
	if err := step(log, "panic", time.Minute, func(context.Context) error { panic("x") }); err == nil {
		t.Error("a step that panics is well")
	}
}

func TestConsoleThatNobodyReadsHoldsUpNobodyAndLossIsTold(t *testing.T) {
	blocked := make(chan struct{})
	s := newSaid()
	j := newJournal(lineWriter(func(string) {}))
	j.console.write = func(line string) error { <-blocked; s.say(line); return nil }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { j.console.drain(ctx); close(done) }()
	for range 3 * queued {
		j.say("line \x1b[2J")
	}
	close(blocked)
	cancel()
	<-done
	if s.count("lines were lost here") == 0 || s.count("line ?[2J") < queued {
		t.Errorf("%d lines, %d told losses", s.count("line ?"), s.count("lost"))
	}
}

func TestPowerButton(t *testing.T) {
	event := func(kind, code uint16, value uint32) []byte {
		e := make([]byte, eventSize)
		binary.NativeEndian.PutUint16(e[eventSize-8:], kind)
		binary.NativeEndian.PutUint16(e[eventSize-6:], code)
		binary.NativeEndian.PutUint32(e[eventSize-4:], value)
		return e
	}
	other := string(event(typeKey, 30, pressed)) + string(event(typeKey, keyPower, 0)) + string(event(0, 0, 0))
	if readPower(strings.NewReader(other)) {
		t.Error("another key, or one let go, switches off")
	}
	if !readPower(strings.NewReader(other + string(event(typeKey, keyPower, pressed)))) {
		t.Error("a press does nothing")
	}
}

func TestDisksAreAwaitedAsLongAsTheirBusNeeds(t *testing.T) {
	for claim, c := range map[string]struct {
		there []string
		late  bool
	}{
		"virtio only":              {[]string{"class/block/vda", "class/scsi_host/", "class/mmc_host/"}, false},
		"NVMe":                     {[]string{"class/nvme/nvme0/nvme0n1"}, false},
		"NVMe by a path":           {[]string{"class/nvme/nvme0/nvme0c0n1"}, false},
		"NVMe that is not ready":   {[]string{"class/nvme/nvme0/nvme0n1", "class/nvme/nvme1/state"}, true},
		"SATA or a stick":          {[]string{"class/nvme/nvme0/nvme0n1", "class/scsi_host/host0"}, true},
		"cards":                    {[]string{"class/mmc_host/mmc0"}, true},
		"USB with nothing on it":   {[]string{"bus/usb/devices/usb1"}, true},
		"nothing that is a disk's": {nil, false},
	} {
		sys := t.TempDir()
		for _, dir := range c.there {
			if err := os.MkdirAll(filepath.Join(sys, dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if disksComeLate(sys) != c.late {
			t.Errorf("%s: late is %v", claim, !c.late)
		}
	}
}
