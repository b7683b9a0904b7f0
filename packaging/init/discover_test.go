package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/brutella/dnssd"
)

func fleetNamed(name string) string { return fingerprintOf([]byte(name)) }

// says is an answer on the network; fleet is the name of one, or "".
func says(instance, address, fleet string) dnssd.BrowseEntry {
	e := dnssd.BrowseEntry{Name: instance, Port: 8443, IPs: []net.IP{net.IPv4(192, 0, 2, 9)}, Text: map[string]string{announcedURL: address}}
	if fleet != "" {
		e.Text[announcedFleet] = fleetNamed(fleet)
	}
	return e
}

// around is a device that looks around in a network whose answers a test changes.
type around struct {
	*machine

	sync    sync.Mutex // guards what follows
	answers []dnssd.BrowseEntry
	proves  string // address
	found   []string
	looks   int
}

// answer changes what a look gets.
func (a *around) answer(all ...dnssd.BrowseEntry) {
	a.sync.Lock()
	defer a.sync.Unlock()
	a.answers = all
}

func (a *around) looked() int {
	a.sync.Lock()
	defer a.sync.Unlock()
	return a.looks
}

// lookAround runs discovery in a bubble of its own time.
func lookAround(t *testing.T, test func(t *testing.T, a *around)) {
	synctest.Test(t, func(t *testing.T) {
		a := &around{machine: &machine{root: t.TempDir(), log: slog.New(slog.DiscardHandler)}}
		var offline time.Time
		d := &discovery{log: a.log, need: func() need { return a.seeks(time.Now(), &offline) },
			browse: func(ctx context.Context, add func(dnssd.BrowseEntry)) error {
				a.sync.Lock()
				a.looks++
				answers := a.answers
				a.sync.Unlock()
				for _, e := range answers {
					add(e)
				}
				<-ctx.Done()
				return ctx.Err()
			},
			proves: func(_ context.Context, b answer) bool {
				a.sync.Lock()
				defer a.sync.Unlock()
				return b.address == a.proves
			},
			found: func(address string) {
				a.mu.Lock()
				a.machine.found = address
				a.mu.Unlock()
				a.sync.Lock()
				a.found = append(a.found, address)
				a.sync.Unlock()
			}}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { d.run(ctx); close(ended) }()
		test(t, a)
		cancel()
		<-ended
	})
}

// goes lets time pass and tells what was found by then.
func (a *around) goes(t *testing.T, what string, after time.Duration, want ...string) {
	t.Helper()
	time.Sleep(after)
	synctest.Wait()
	a.sync.Lock()
	defer a.sync.Unlock()
	if !slices.Equal(a.found, want) {
		t.Fatalf("%s: found %q, not %q", what, a.found, want)
	}
}

func (a *around) write(t *testing.T, file string, v any) {
	t.Helper()
	raw, err := json.Marshal(v)
	if err := errors.Join(err, os.MkdirAll(filepath.Dir(a.path(file)), 0o700), os.WriteFile(a.path(file), raw, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func (a *around) join(t *testing.T, coordinator, fleet string, online bool) {
	t.Helper()
	a.write(t, membershipFile, membership{Coordinator: coordinator, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(fleet)})})
	a.write(t, statusFile, status{Online: online})
}

func TestDeviceOfNobodyFollowsACoordinatorThatMoves(t *testing.T) {
	lookAround(t, func(t *testing.T, a *around) {
		a.answer(says("a", "https://192.0.2.1:8443", ""))
		a.goes(t, "the first", time.Minute, "https://192.0.2.1:8443")
		a.goes(t, "the same", time.Hour, "https://192.0.2.1:8443")
		a.answer()
		a.goes(t, "none", time.Hour, "https://192.0.2.1:8443")
		a.answer(says("a", "https://192.0.2.2:8443", ""))
		a.goes(t, "another", 10*time.Minute, "https://192.0.2.1:8443", "https://192.0.2.2:8443")
		a.answer(says("a", "https://192.0.2.2:8443", ""), says("b", "https://192.0.2.3:8443", ""))
		a.goes(t, "a stranger beside it", time.Hour, "https://192.0.2.1:8443", "https://192.0.2.2:8443")
	})
}

func TestAnAnswerThatCameOnceMovesNobody(t *testing.T) {
	lookAround(t, func(t *testing.T, a *around) {
		a.answer(says("a", "https://192.0.2.1:8443", ""))
		a.goes(t, "the first", time.Minute, "https://192.0.2.1:8443")
		for i := range 20 {
			a.answer(says("a", fmt.Sprintf("https://192.0.2.%d:8443", 10+i), ""))
			for was := a.looked(); a.looked() == was; {
				time.Sleep(time.Second)
			}
		}
		a.goes(t, "one that changes with each look", 0, "https://192.0.2.1:8443")
	})
}

func TestMemberDoesNotLookAroundAndOneThatWasResetDoes(t *testing.T) {
	lookAround(t, func(t *testing.T, a *around) {
		a.join(t, "https://192.0.2.1:8443", "home", true)
		a.answer(says("a", "https://192.0.2.2:8443", "home"))
		time.Sleep(time.Second)
		was := a.looked()
		a.goes(t, "a member", 24*time.Hour)
		if now := a.looked(); now != was {
			t.Fatalf("a member that is online looked %d times", now-was)
		}
		if err := os.Remove(a.path(membershipFile)); err != nil {
			t.Fatal(err)
		}
		a.goes(t, "one that was reset", time.Minute, "https://192.0.2.2:8443")
	})
}

func TestMemberThatIsOfflineForLongLooksForItsOwnFleet(t *testing.T) {
	lookAround(t, func(t *testing.T, a *around) {
		a.join(t, "https://192.0.2.1:8443", "home", false)
		a.answer(says("a", "https://192.0.2.2:8443", "home"), says("b", "https://192.0.2.3:8443", "other"), says("c", "https://192.0.2.4:8443", ""))
		a.goes(t, "not yet", offlineLong-2*wantedEvery)
		a.goes(t, "its own fleet", 5*time.Minute, "https://192.0.2.2:8443")
		a.join(t, "https://192.0.2.2:8443", "home", true)
		a.answer(says("a", "https://192.0.2.5:8443", "home"))
		a.goes(t, "online again", 24*time.Hour, "https://192.0.2.2:8443")
	})
	lookAround(t, func(t *testing.T, a *around) {
		a.join(t, "https://192.0.2.1:8443", "home", false)
		a.answer(says("a", "https://192.0.2.1:8443", "home"), says("b", "https://192.0.2.3:8443", "other"))
		a.goes(t, "one that has not moved, and a stranger", 24*time.Hour)
	})
}

func TestCoordinatorsOfOneFleetAreOneAndOfTwoAreNone(t *testing.T) {
	for claim, c := range map[string]struct {
		fleets [2]string
		proves string
		want   string
	}{
		"two of one fleet":               {[2]string{"home", "home"}, "https://192.0.2.2:8443", "https://192.0.2.2:8443"},
		"two that only say so":           {[2]string{"home", "home"}, "", ""},
		"two of two fleets":              {[2]string{"home", "other"}, "https://192.0.2.2:8443", ""},
		"two that say nothing":           {[2]string{"", ""}, "https://192.0.2.2:8443", ""},
		"one that says nothing, and one": {[2]string{"home", ""}, "https://192.0.2.1:8443", ""},
	} {
		lookAround(t, func(t *testing.T, a *around) {
			a.answer(says("a", "https://192.0.2.1:8443", c.fleets[0]), says("b", "https://192.0.2.2:8443", c.fleets[1]))
			a.sync.Lock()
			a.proves = c.proves
			a.sync.Unlock()
			var want []string
			if c.want != "" {
				want = strings.Fields(c.want)
			}
			a.goes(t, claim, time.Hour, want...)
		})
	}
}
