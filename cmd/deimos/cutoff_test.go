package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/wire"
)

// asCommand has the test's binary be the command, so that it can be killed.
const asCommand = "DEIMOS_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == sandbox.WorkerArg { // of a coordinator or an agent in a test
		os.Exit(sandbox.WorkerMain())
	}
	if os.Getenv(asCommand) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// shelf keeps what is put on it. It stands still when gate says so. While no
// command runs, nobody asks, and the test may look at it and change it.
type shelf struct {
	mu      sync.Mutex // guards the rest
	chunks  map[string][]byte
	sent    map[string]int // how often each chunk was sent, or fetched
	fetched map[string]int
	object  *api.Object
	gate    func(r *http.Request) bool                        // may block; false: who asked is dead
	answer  func(w http.ResponseWriter, r *http.Request) bool // instead of the shelf; false: it has not
	busy    int                                               // requests under way
	idle    *sync.Cond                                        // busy is 0
}

func newShelf() *shelf {
	s := &shelf{chunks: map[string][]byte{}, sent: map[string]int{}, fetched: map[string]int{}}
	s.idle = sync.NewCond(&s.mu)
	return s
}

// begin takes a request in, and returns the gate that it has to go through, and who
// may answer it instead.
func (s *shelf) begin() (gate func(*http.Request) bool, instead func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy++
	return s.gate, s.answer
}

func (s *shelf) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy--; s.busy == 0 {
		s.idle.Broadcast()
	}
}

// await returns when all is answered.
func (s *shelf) await() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.busy > 0 {
		s.idle.Wait()
	}
}

func (s *shelf) setAnswer(answer func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

func (s *shelf) setGate(gate func(*http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate = gate
}

func (s *shelf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	say := func(status int, v any) {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v)
	}
	name := path.Base(r.URL.Path)
	gate, instead := s.begin()
	defer s.end()
	if gate != nil && !gate(r) || instead != nil && instead(w, r) {
		return
	}
	if strings.Contains(r.URL.Path, "/chunks/") && r.Method == http.MethodPut {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.chunks[name] = raw
		s.sent[name]++
		say(http.StatusOK, api.Placement{Chunk: api.Chunk{ID: name, Size: int64(len(raw))}})
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case strings.Contains(r.URL.Path, "/chunks/"):
		s.fetched[name]++
		_, _ = w.Write(s.chunks[name])
	case name == "stripes":
		var q api.StripeRequest
		_ = json.NewDecoder(r.Body).Decode(&q)
		out := api.Stripe{}
		for _, id := range q.Chunks {
			if raw, ok := s.chunks[id]; ok {
				out.Placed = append(out.Placed, api.Placement{Chunk: api.Chunk{ID: id, Size: int64(len(raw))}})
			}
		}
		say(http.StatusOK, out)
	case r.Method == http.MethodPut:
		s.object = new(api.Object)
		_ = json.NewDecoder(r.Body).Decode(s.object)
		say(http.StatusOK, s.object)
	case s.object == nil:
		say(http.StatusNotFound, wire.APIError{Code: wire.CodeNotFound, Reason: "there is none"})
	default:
		say(http.StatusOK, s.object)
	}
}

// machine is one user's: a context, a home, and a fleet that answers.
type machine struct {
	t    *testing.T
	dir  string
	s    *shelf
	args []string
}

func newMachine(t *testing.T) *machine {
	s := newShelf()
	c := answering(t, s.ServeHTTP)
	return &machine{t: t, dir: t.TempDir(), s: s, args: []string{"--context", c.Context}}
}

func (m *machine) command(args ...string) (*exec.Cmd, *bytes.Buffer) {
	cmd := exec.Command(os.Args[0], append(m.args, args...)...)
	cmd.Env = append(os.Environ(), asCommand+"=1", "XDG_STATE_HOME="+filepath.Join(m.dir, "state"))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	return cmd, &said
}

func (m *machine) ok(args ...string) string {
	m.t.Helper()
	said, err := m.run(args...)
	if err != nil {
		m.t.Fatalf("%v: %v\n%s", args, err, said)
	}
	return said
}

func (m *machine) run(args ...string) (said string, err error) {
	m.s.await() // what the test has changed is seen by who asks from now on
	cmd, out := m.command(args...)
	err = cmd.Run()
	m.s.await()
	return out.String(), err
}

// killAt runs a command and kills it when it has made n requests for chunks.
func (m *machine) killAt(n int, args ...string) {
	m.t.Helper()
	reached, dead := make(chan struct{}), make(chan struct{})
	var mu sync.Mutex
	m.s.setGate(func(r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/chunks/") {
			return true
		}
		mu.Lock()
		n--
		now := n
		mu.Unlock()
		if now == 0 {
			close(reached)
		}
		if now <= 0 {
			<-dead
		}
		return now > 0
	})
	cmd, said := m.command(args...)
	must(m.t, cmd.Start())
	select {
	case <-reached:
	case <-time.After(5 * time.Minute):
		m.t.Errorf("it did not come so far:\n%s", said)
	}
	must(m.t, cmd.Process.Kill())
	_ = cmd.Wait()
	close(dead)
	m.s.await()
	m.s.setGate(nil)
}

// there are the chunks that have come.
func (m *machine) there() map[string]bool {
	ids := make(map[string]bool)
	for id := range m.s.chunks {
		ids[id] = true
	}
	return ids
}

func (m *machine) states() []string {
	m.t.Helper()
	list, err := filepath.Glob(filepath.Join(m.dir, "state", "deimos", "puts", "*"))
	must(m.t, err)
	return list
}

func TestAPutThatWasKilledGoesOn(t *testing.T) {
	m := newMachine(t)
	file := filepath.Join(m.dir, "file")
	data := make([]byte, 9<<20+5)
	rand.Read(data)
	must(t, os.WriteFile(file, data, 0o600))
	m.killAt(10, "object", "put", file)
	list := m.states()
	if len(list) != 1 || len(m.s.chunks) == 0 || m.s.object != nil {
		t.Fatalf("state %v, %d chunks", list, len(m.s.chunks))
	}
	for p, mode := range map[string]os.FileMode{list[0]: 0o600, filepath.Dir(list[0]): os.ModeDir | 0o700} {
		if s, err := os.Stat(p); err != nil || s.Mode() != mode {
			t.Errorf("%s has mode %v, %v", p, s.Mode(), err)
		}
	}
	before := m.there()
	said := m.ok("object", "put", file)
	if len(m.s.object.Chunks) != 18 || len(m.s.chunks) != 18 || !strings.Contains(said, "encrypted, code 4+2") {
		t.Errorf("%d chunks are there, 18 belong to the file:\n%s", len(m.s.chunks), said)
	}
	for id := range before {
		if n := m.s.sent[id]; n != 1 {
			t.Errorf("chunk %s was there and was sent %d times", id, n)
		}
	}
	if list := m.states(); len(list) != 0 {
		t.Errorf("the key is still in %v", list)
	}
	out := filepath.Join(m.dir, "back")
	m.ok("object", "get", "file", "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data) {
		t.Errorf("%d bytes came back, %v", len(raw), err)
	}
}

func TestAPutOfAFileThatChangedBeginsAnew(t *testing.T) {
	m := newMachine(t)
	file := filepath.Join(m.dir, "file")
	must(t, os.WriteFile(file, make([]byte, 9<<20), 0o600))
	m.killAt(10, "object", "put", file)
	before := m.there()
	must(t, os.WriteFile(file, make([]byte, 9<<20), 0o600)) // the same bytes, at another time
	m.ok("object", "put", file)
	for _, ch := range m.s.object.Chunks {
		if before[ch.ID] {
			t.Errorf("chunk %s was made with the key of the put before", ch.ID)
		}
	}
	if len(before) == 0 || len(m.states()) != 0 {
		t.Errorf("%d chunks before, states %v", len(before), m.states())
	}
}

func TestAGetThatWasKilledGoesOn(t *testing.T) {
	m := newMachine(t)
	file, out := filepath.Join(m.dir, "file"), filepath.Join(m.dir, "back")
	data := make([]byte, 40<<20)
	rand.Read(data)
	must(t, os.WriteFile(file, data, 0o600))
	m.ok("object", "put", file)
	m.killAt(30, "object", "get", "file", "--out", out)
	list, err := filepath.Glob(filepath.Join(m.dir, ".deimos-*.part"))
	must(t, err)
	if _, err := os.Stat(out); err == nil || len(list) != 1 {
		t.Fatalf("%v beside it", list)
	}
	part, err := os.ReadFile(list[0])
	must(t, err)
	if len(part) == 0 || !bytes.HasPrefix(data, part) {
		t.Fatalf("%d bytes are kept, or wrong ones", len(part))
	}
	clear(m.s.fetched)
	m.ok("object", "get", "file", "--out", out)
	raw, err := os.ReadFile(out)
	must(t, err)
	if !bytes.Equal(raw, data) {
		t.Error("it came back as something else")
	}
	first := m.s.object.Chunks[0].ID
	if m.s.fetched[first] != 0 {
		t.Error("what had come was fetched again")
	}
	// What was kept and is wrong is found out, and fetched again.
	must(t, os.Remove(out))
	part[100] ^= 1
	must(t, os.WriteFile(list[0], part, 0o600))
	m.ok("object", "get", "file", "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data) || m.s.fetched[first] == 0 {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
	if list, _ := filepath.Glob(filepath.Join(m.dir, ".deimos-*")); len(list) != 0 {
		t.Errorf("left behind: %v", list)
	}
	// A range.
	must(t, os.Remove(out))
	m.ok("object", "get", "file", "--range", "5000000-5000099", "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data[5000000:5000100]) {
		t.Errorf("a range of %d bytes, %v", len(raw), err)
	}
}

func TestTheKeyIsMadeOnceAndForItsOwnerOnly(t *testing.T) {
	m := newMachine(t)
	file := filepath.Join(m.dir, "file")
	must(t, os.WriteFile(file, []byte("content"), 0o600))
	said := m.ok("object", "put", file)
	key := filepath.Join(filepath.Dir(m.args[1]), keyFile)
	if s, err := os.Stat(key); err != nil || s.Mode() != 0o600 || !strings.Contains(said, "keep a copy") || !strings.Contains(said, key) {
		t.Fatalf("%v, said:\n%s", err, said)
	}
	before, err := os.ReadFile(key)
	must(t, err)
	if out, err := m.run("key", "new"); err == nil || !strings.Contains(out, "there is a key already") {
		t.Errorf("a second key: %v, %s", err, out)
	}
	m.s.object = nil
	if said := m.ok("object", "put", file); strings.Contains(said, "keep a copy") {
		t.Error("another key was made")
	}
	if after, err := os.ReadFile(key); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the key is another: %v", err)
	}
	if said := m.ok("key", "show"); !strings.Contains(said, "age1") || strings.Contains(said, "AGE-SECRET-KEY") {
		t.Errorf("shown: %s", said)
	}
	// Without it there is nothing to be had, and with a copy of it there is.
	moved := filepath.Join(m.dir, "moved.txt")
	must(t, os.Rename(key, moved))
	if out, err := m.run("object", "get", "file", "--out", filepath.Join(m.dir, "back")); err == nil || !strings.Contains(out, "--identity") {
		t.Errorf("without a key: %v, %s", err, out)
	}
	m.ok("object", "get", "file", "--identity", moved, "--out", filepath.Join(m.dir, "back"))
}

// On a file system without hard links, as FAT is, a key is made as well, and takes no
// other one away.
func TestAKeyIsNamedWithoutLinks(t *testing.T) {
	for name, link := range map[string]func(string, string) error{
		"links": os.Link,
		"FAT":   func(from, to string) error { return &os.LinkError{Op: "link", Old: from, New: to, Err: unix.EPERM} },
	} {
		dir := t.TempDir()
		one, other, key := filepath.Join(dir, "one"), filepath.Join(dir, "other"), filepath.Join(dir, "key")
		must(t, os.WriteFile(one, []byte("one"), 0o600))
		must(t, os.WriteFile(other, []byte("other"), 0o600))
		if err := nameNew(one, key, link); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := nameNew(other, key, link); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: another key in its place: %v", name, err)
		}
		if raw, err := os.ReadFile(key); err != nil || string(raw) != "one" {
			t.Errorf("%s: the key is %q, %v", name, raw, err)
		}
	}
	full := func(from, to string) error { return unix.ENOSPC }
	if err := nameNew("x", "y", full); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("another error: %v", err)
	}
}

// What is given as plain to who has a key may be a forgery.
func TestWhoHasAKeyGetsNoPlainFileUnasked(t *testing.T) {
	m := newMachine(t)
	file := filepath.Join(m.dir, "file")
	must(t, os.WriteFile(file, []byte("content"), 0o600))
	m.ok("object", "put", "--plain", file)
	m.ok("object", "get", "file", "--out", filepath.Join(m.dir, "one"))
	m.ok("key", "new")
	if out, err := m.run("object", "get", "file", "--out", filepath.Join(m.dir, "two")); err == nil || !strings.Contains(out, "--plain") {
		t.Errorf("%v, %s", err, out)
	}
	m.ok("object", "get", "--plain", "file", "--out", filepath.Join(m.dir, "two"))
}

func TestRangesAreReadAsPeopleWriteThem(t *testing.T) {
	for s, want := range map[string][2]int64{"0-99": {0, 100}, "5-5": {5, 6}, "10-": {10, 1000}, "0-9999": {0, 1000}, "999-": {999, 1000}, "1-9223372036854775807": {1, 1000}} {
		if from, to, err := parseRange(s, 1000); err != nil || from != want[0] || to != want[1] {
			t.Errorf("%q: %d, %d, %v", s, from, to, err)
		}
	}
	for _, s := range []string{"", "-", "5", "-5", "5-3", "a-b", "1000-", "1-2-3", "+1-2x"} {
		if from, to, err := parseRange(s, 1000); err == nil {
			t.Errorf("%q was taken for %d to %d", s, from, to)
		}
	}
}
