package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
)

// trialOn is the watch of a machine that runs 2.0.0, with these images.
func trialOn(t *testing.T, confirm time.Duration, images ...string) (*trial, *machine) {
	t.Helper()
	root := t.TempDir()
	m := &machine{root: root, esp: filepath.Join(root, "efi"), again: make(chan string, 1), params: params{confirm: confirm},
		log: slog.New(slog.DiscardHandler)}
	if err := os.MkdirAll(m.path("efi", firmware.Folder), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range images {
		if err := os.WriteFile(m.path("efi", firmware.Folder, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(m.path("etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.path("etc/deimos-release"), []byte("2.0.0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.trial = m.newTrial()
	m.openTrial()
	m.trial.begin()
	m.trial.ask(func(context.Context) bool { return true })
	return m.trial, m
}

// loaderCounts is the boot loader's word in a machine without an ESP.
func loaderCounts(t *testing.T, m *machine, name string) {
	t.Helper()
	if err := os.RemoveAll(m.path("efi")); err != nil {
		t.Fatal(err)
	}
	m.esp = ""
	dir := m.path("sys/firmware/efi/efivars")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	raw := []byte{6, 0, 0, 0}
	for _, c := range `\EFI\Linux\` + name + "\x00" {
		raw = append(raw, byte(c), 0)
	}
	if err := os.WriteFile(filepath.Join(dir, "LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"), raw, 0o644); err != nil {
		t.Fatal(err)
	}
}

func restarts(m *machine) bool {
	select {
	case <-m.again:
		return true
	default:
		return false
	}
}

var (
	onTrial   = []string{"deimos_1.0.0.efi", "deimos_2.0.0+2-1.efi"}
	confirmed = []string{"deimos_1.0.0.efi", "deimos_2.0.0.efi"}
	newDevice = []string{"deimos_2.0.0+2-1.efi"}
	// None is confirmed: there is no safe one to go back to.
	noneSafe = []string{"deimos_1.0.0+0-3.efi", "deimos_2.0.0+2-1.efi"}
)

func TestOnlyAFirmwareOnTrialIsLeftWhenItsAgentDoesNotStay(t *testing.T) {
	for name, c := range map[string]struct {
		images []string
		want   bool
	}{"on trial": {onTrial, true}, "on its last try": {[]string{"deimos_1.0.0.efi", "deimos_2.0.0+0-3.efi"}, true},
		"confirmed": {confirmed, false}, "a new device": {newDevice, false}, "nothing safe": {noneSafe, false}} {
		w, m := trialOn(t, 0, c.images...)
		for range slot.Tries - 1 {
			w.ended()
		}
		if restarts(m) {
			t.Errorf("%s: restarted before the agent had its %d starts", name, slot.Tries)
		}
		said := w.ended()
		if got := restarts(m); got != c.want || said != c.want {
			t.Errorf("%s: restarted: %v, and says %v", name, got, said)
		}
	}
}

func TestOnlyAFirmwareThatIsNotConfirmedInTimeIsLeft(t *testing.T) {
	for name, c := range map[string]struct {
		images []string
		want   bool
	}{"on trial": {onTrial, true}, "confirmed": {confirmed, false}, "a new device": {newDevice, false}} {
		w, m := trialOn(t, time.Millisecond, c.images...)
		w.watch(t.Context())
		if got := restarts(m); got != c.want {
			t.Errorf("%s: restarted: %v", name, got)
		}
	}
	w, m := trialOn(t, time.Millisecond, onTrial...)
	w.ask(func(context.Context) bool { // it is confirmed once the watch has begun
		if err := os.Rename(imageOf(t, m), m.path("efi", firmware.Folder, "deimos_2.0.0.efi")); err != nil {
			t.Error(err)
		}
		w.ask(func(context.Context) bool { return true })
		return true
	})
	if w.watch(t.Context()); restarts(m) {
		t.Error("restarted though it was confirmed in time")
	}
	if w, _ := trialOn(t, 0, onTrial...); w.within != slot.ConfirmWithin {
		t.Errorf("by itself a trial lasts %s", w.within)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w, m = trialOn(t, time.Hour, onTrial...)
	if w.watch(ctx); restarts(m) {
		t.Error("restarted by a stop")
	}
}

// imageOf is the file of the firmware that runs.
func imageOf(t *testing.T, m *machine) string {
	t.Helper()
	all, _ := filepath.Glob(m.path("efi", firmware.Folder, "deimos_2.0.0*"))
	if len(all) != 1 {
		t.Fatalf("%q", all)
	}
	return all[0]
}

func TestAFirmwareIsNotBlamedForACoordinatorThatIsAway(t *testing.T) {
	w, m := trialOn(t, time.Nanosecond, onTrial...)
	looks, back := 0, make(chan struct{})
	w.ask(func(context.Context) bool {
		looks++
		select {
		case <-back:
			return true
		default:
		}
		if looks == 20 { // twenty times what it has, had somebody answered
			if restarts(m) {
				t.Error("restarted while nobody answered")
			}
			close(back)
		}
		return false
	})
	if w.watch(t.Context()); !restarts(m) || looks < 21 {
		t.Errorf("not restarted though it is not confirmed and somebody answers again; %d looks", looks)
	}
}

func TestAFirmwareThatReachesNobodyIsLeftAllTheSame(t *testing.T) {
	for name, answers := range map[string]func(context.Context) bool{"nobody answers": func(context.Context) bool { return false }, "the machine does not come so far": nil} {
		w, m := trialOn(t, time.Hour, onTrial...)
		w.patience, w.every = 20*time.Millisecond, time.Millisecond
		w.ask(answers)
		if w.watch(t.Context()); !restarts(m) {
			t.Errorf("%s: not restarted", name)
		}
	}
}

func TestAStartThatHangsIsOnTrialToo(t *testing.T) {
	w, m := trialOn(t, time.Hour, onTrial...)
	w.begun, w.paid, w.patience = make(chan struct{}), false, time.Millisecond
	before := imageOf(t, m)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if w.watch(ctx); !restarts(m) {
		t.Error("not restarted")
	}
	if imageOf(t, m) == before {
		t.Error("its start was not paid for")
	}
}

func TestEachStartOfATrialIsPaidForBeforeTheAgent(t *testing.T) {
	if _, m := trialOn(t, 0, "deimos_1.0.0.efi", "deimos_2.0.0+3.efi"); filepath.Base(imageOf(t, m)) != "deimos_2.0.0+2-1.efi" {
		t.Errorf("it is %s", imageOf(t, m))
	}
	for _, images := range [][]string{confirmed, {"deimos_2.0.0+3.efi"}} {
		if _, m := trialOn(t, 0, images...); filepath.Base(imageOf(t, m)) != images[len(images)-1] {
			t.Errorf("%s became %s", images, imageOf(t, m))
		}
	}
}

func TestThatTheBootLoaderDoesNotCountIsSeenAtTheFirstStartOfANewDevice(t *testing.T) {
	for name, want := range map[string]error{"deimos_2.0.0+3.efi": firmware.ErrUncounted, "deimos_2.0.0+2-1.efi": nil} {
		_, m := trialOn(t, 0, name)
		if err := m.trial.images.CheckRoom("3.0.0", 1); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAMachineWhoseStartsCannotBeCountedIsNotRestartedForEver has a name in the way
// that no file can be renamed to.
func TestAMachineWhoseStartsCannotBeCountedIsNotRestartedForEver(t *testing.T) {
	w, m := trialOn(t, time.Hour, "deimos_1.0.0.efi", "deimos_2.0.0+3.efi", "deimos_2.0.0+2-1.efi")
	for range slot.Tries {
		if w.ended() {
			t.Error("the firmware is given up, and would be started again")
		}
	}
	if restarts(m) {
		t.Error("restarted into the same firmware")
	}
	if err := os.Remove(m.path("efi", firmware.Folder, "deimos_2.0.0+2-1.efi")); err != nil {
		t.Fatal(err)
	}
	if !w.ended() || !restarts(m) {
		t.Error("not restarted once it could be counted")
	}
}

func TestWithoutTheESPTheBootLoadersWordCounts(t *testing.T) {
	for name, want := range map[string]bool{"deimos_2.0.0+2-1.efi": true, "deimos_2.0.0+0-3.efi": true, "deimos_2.0.0+0-4.efi": false, "deimos_2.0.0.efi": false, "": false} {
		for _, mounted := range []bool{false, true} { // and cannot be read
			w, m := trialOn(t, time.Millisecond, onTrial...)
			if loaderCounts(t, m, name); !mounted {
				w = m.newTrial()
				m.trial = w
				m.openTrial()
				w.begin()
				w.ask(func(context.Context) bool { return true })
			}
			limit := patience
			if !want {
				limit = 100 * time.Millisecond // one of which nobody knows is watched on
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			w.watch(ctx)
			cancel()
			if got := restarts(m); got != want {
				t.Errorf("%s, mounted: %v: restarted: %v", name, mounted, got)
			}
		}
	}
}

func TestATrialOutlivesADiskThatCannotBeReadForAWhile(t *testing.T) {
	w, m := trialOn(t, time.Millisecond, onTrial...)
	dir, aside := m.path("efi", firmware.Folder), m.path("efi", "aside")
	if err := os.Rename(dir, aside); err != nil {
		t.Fatal(err)
	}
	looks := 0
	w.ask(func(context.Context) bool {
		if looks++; looks == 20 {
			if restarts(m) {
				t.Error("restarted though nobody knows whether it is on trial")
			}
			if err := os.Rename(aside, dir); err != nil {
				t.Error(err)
			}
		}
		return true
	})
	if w.watch(t.Context()); !restarts(m) {
		t.Error("not restarted when the disk could be read again")
	}
}

func TestWhoMustAnswer(t *testing.T) {
	server, stranger := turnedAway(), turnedAway()
	defer server.Close()
	defer stranger.Close()
	server.StartTLS()
	stranger.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{ownAuthority(t)}}
	stranger.StartTLS()
	// The kernel accepts for a process that hangs, until its queue is full.
	hung, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	here, hangs, away := server.URL, "https://"+hung.Addr().String(), "https://127.0.0.1:1"
	fleet := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	member := func(words string) string { return `{"ca":"` + fleet + `",` + words + `}` }
	for name, c := range map[string]struct {
		declared, member string
		want             bool
	}{
		"nobody known": {"", "", false}, "declared": {here, "", true}, "declared, away": {away, "", false}, "no address": {"here", "", false},
		"declared, hangs":          {hangs, "", false},
		"declared, a stranger":     {stranger.URL, "", true}, // this one's authority is not known yet
		"member":                   {"", member(`"coordinator":"` + here + `","brokers":["` + here + `"]`), true},
		"member of one that moved": {"", member(`"coordinator":"` + away + `","data_plane":["` + here + `"],"brokers":["` + away + `","` + here + `"]`), true},
		"member of one that hangs": {"", member(`"coordinator":"` + hangs + `","brokers":["` + here + `"]`), false},
		"the broker hangs":         {"", member(`"coordinator":"` + here + `","brokers":["` + hangs + `"]`), false},
		"the broker is away":       {here, member(`"brokers":["` + away + `"]`), false},
		"only the broker is there": {"", member(`"coordinator":"` + away + `","brokers":["` + here + `"]`), false},
		"a stranger answers":       {"", member(`"coordinator":"` + stranger.URL + `","brokers":["` + here + `"]`), false},
		"the broker is a stranger": {here, member(`"brokers":["` + stranger.URL + `"]`), false},
		"a damaged membership":     {here, "{", false},
	} {
		m := &machine{root: t.TempDir(), declared: c.declared}
		if c.member != "" {
			if err := os.MkdirAll(filepath.Dir(m.path(membershipFile)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(m.path(membershipFile), []byte(c.member), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if strings.Contains(name, "hangs") { // a TCP connection would be there long before
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
		}
		if got := m.answers(ctx); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		cancel()
	}
}

// turnedAway says nothing of a client that does not believe it.
func turnedAway() *httptest.Server {
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	return s
}

// ownAuthority is its own.
func ownAuthority(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, about, about, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestAMachineWithoutOneOfItsVitalPartsIsStartedAnew(t *testing.T) {
	for name, do := range map[string]func(){"it panics": func() { panic("a mistake") }, "it returns": func() {}} {
		m := &machine{again: make(chan string, 1), log: slog.New(slog.DiscardHandler)}
		if m.vital(t.Context(), "start", time.Nanosecond, do); !restarts(m) {
			t.Errorf("%s: not started anew", name)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if m.vital(ctx, "start", time.Hour, func() { cancel(); do() }); restarts(m) {
			t.Errorf("%s: started anew though it was told to stop", name)
		}
	}
}

func TestAMachineWhoseFirmwareIsGivenUpIsRestartedNotSwitchedOff(t *testing.T) {
	w, m := trialOn(t, time.Millisecond, onTrial...)
	w.watch(t.Context())
	if how := m.awaitStop(nil); how != unix.LINUX_REBOOT_CMD_RESTART {
		t.Errorf("it goes down by %#x", how)
	}
}

func TestAgentThatAsksForAStartOfTheMachineIsNotStartedAgain(t *testing.T) {
	ended, reboots := 0, make(chan struct{}, 10)
	s, stop := supervisedBy(t, "reboot", time.Second, nil, time.Nanosecond, func(v *supervisor) {
		v.ended = func() bool { ended++; return false }
		v.reboot = func() { reboots <- struct{}{} }
	})
	<-reboots
	stop()
	if ended != 1 || s.count("agent starts") != 1 || len(reboots) != 0 {
		t.Errorf("%d ends: %q", ended, s.lines)
	}
}

func TestAgentForWhoseEndsTheMachineIsStartedAnewIsNotAnnouncedAgain(t *testing.T) {
	s, stop := supervisedBy(t, "crash", time.Second, nil, time.Nanosecond, func(v *supervisor) {
		ends := 0
		v.ended = func() bool { ends++; return ends == 3 }
	})
	s.await(t, "the machine is started anew", 1)
	stop()
	if s.count("it is started again") != 2 || s.count("agent starts") != 3 {
		t.Errorf("%q", s.lines)
	}
}

func TestConfirmTimeOfTheCommandLine(t *testing.T) {
	for line, want := range map[string]time.Duration{"deimos.confirm=60s": time.Minute, "deimos.confirm=-1s": 0, "deimos.confirm=soon": 0, "quiet": 0} {
		if got := parseCommandLine(line).confirm; got != want {
			t.Errorf("%s: %s", line, got)
		}
	}
}
