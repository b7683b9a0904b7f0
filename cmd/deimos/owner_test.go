package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// file writes a file of so many bytes.
func (m *machine) file(name string, size int) (path string, data []byte) {
	m.t.Helper()
	data = make([]byte, size)
	rand.Read(data)
	path = filepath.Join(m.dir, name)
	must(m.t, os.WriteFile(path, data, 0o600))
	return path, data
}

func (m *machine) refused(want string, args ...string) {
	m.t.Helper()
	if said, err := m.run(args...); err == nil || !strings.Contains(said, want) {
		m.t.Errorf("%v: %v\n%s", args, err, said)
	}
}

func newKey(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	must(t, err)
	return id
}

// Who names others at the first put can read the file, too; only others can read
// it only if that is asked for.
func TestTheOwnerIsARecipientUnlessHeSaysOtherwise(t *testing.T) {
	m := newMachine(t)
	file, data := m.file("file", 1000)
	other := newKey(t)
	theirs := filepath.Join(m.dir, "theirs.txt")
	must(t, os.WriteFile(theirs, []byte(other.String()+"\n"), 0o600))
	out := filepath.Join(m.dir, "back")
	get := func(args ...string) {
		t.Helper()
		m.ok(append([]string{"object", "get", "file", "--out", out}, args...)...)
		if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data) {
			t.Errorf("%d bytes, %v", len(raw), err)
		}
	}
	m.refused("--recipient", "object", "put", "--only-recipients", file)
	if said := m.ok("object", "put", "--recipient", other.Recipient().String(), file); !strings.Contains(said, "keep a copy") {
		t.Errorf("said: %s", said)
	}
	get()
	get("--identity", theirs)
	// The same for others is another wish, and is not passed over.
	m.ok("object", "put", "--recipient", other.Recipient().String(), file)
	m.refused("other recipients", "object", "put", file)
	m.refused("code 4+2", "object", "put", "--code", "2+1", "--recipient", other.Recipient().String(), file)
	m.s.object = nil
	m.ok("object", "put", "--only-recipients", "--recipient", other.Recipient().String(), file)
	m.refused("--identity", "object", "get", "file", "--out", out)
	get("--identity", theirs)
	m.refused("--identity is for others", "object", "put", "--only-recipients", "--identity", theirs, file)
}

// sshKey writes a new key, and returns its file and its public half.
func (m *machine) sshKey(name string) (file, public string) {
	m.t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(m.t, err)
	block, err := ssh.MarshalPrivateKey(key, "somebody@somewhere")
	must(m.t, err)
	file = filepath.Join(m.dir, name)
	must(m.t, os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
	s, err := ssh.NewSignerFromKey(key)
	must(m.t, err)
	return file, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey())))
}

// A put that goes on is for who is named now, or begins anew.
func TestAPutWithAnotherSSHKeyIsForThatKey(t *testing.T) {
	m := newMachine(t)
	a, publicA := m.sshKey("a")
	b, _ := m.sshKey("b")
	file, data := m.file("file", 9<<20)
	m.killAt(10, "object", "put", "--identity", a, file)
	if len(m.states()) != 1 {
		t.Fatal("nothing is kept of it")
	}
	m.ok("object", "put", "--identity", b, file)
	out := filepath.Join(m.dir, "back")
	m.ok("object", "get", "file", "--identity", b, "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data) {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
	m.refused("none of the keys here opens it", "object", "get", "file", "--identity", a, "--out", out)
	// One key is one reader, however it is named.
	m.s.object = nil
	m.ok("object", "put", "--identity", a, "--name", "two", file)
	m.ok("object", "put", "--identity", a, "--recipient", publicA+" laptop", "--name", "two", file)
}

// What was placed and is lost is placed again by the same command.
func TestAPutOfALostFileBringsItBack(t *testing.T) {
	m := newMachine(t)
	file, data := m.file("file", 9<<20)
	m.ok("object", "put", "--code", "3+2", file)
	lost := m.s.object.Chunks[0].ID
	for _, ch := range m.s.object.Chunks[:4] {
		delete(m.s.chunks, ch.ID)
	}
	clear(m.s.sent)
	m.ok("object", "put", file)
	if len(m.s.sent) != 4 || m.s.sent[lost] != 1 {
		t.Errorf("%d shards were sent, 4 were lost", len(m.s.sent))
	}
	out := filepath.Join(m.dir, "back")
	m.ok("object", "get", "file", "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data) {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
}

// The owner's file is there until the other is safe on the disk. What the kernel
// could not write may be in its memory as if it was: it is not kept, or the next
// try would find it right.
func TestAFileThatCannotBeSyncedReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	must(t, os.WriteFile(path, []byte("before"), 0o600))
	f, err := openOutput(t.Context(), path, "", aVersion)
	must(t, err)
	_, err = io.WriteString(f, "after")
	must(t, err)
	// A pipe in the file's place: it takes a mode, and no sync.
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	must(t, syscall.Dup3(int(w.Fd()), int(f.Writer.(*os.File).Fd()), 0))
	if err := f.finish(); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("%v", err)
	}
	wantFile(t, path, "before", 0o600)
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("left: %v", list)
	}
}

// A part has its own name, and leaves alone what is there of the whole.
func TestARangeTakesNothingFromTheWhole(t *testing.T) {
	m := newMachine(t)
	file, data := m.file("file", 40<<20)
	m.ok("object", "put", file)
	out := filepath.Join(m.dir, "back")
	m.killAt(30, "object", "get", "file", "--out", out)
	part := func() []byte {
		t.Helper()
		list, err := filepath.Glob(filepath.Join(m.dir, ".deimos-*.part"))
		must(t, err)
		if len(list) != 1 {
			t.Fatalf("kept: %v", list)
		}
		raw, err := os.ReadFile(list[0])
		must(t, err)
		return raw
	}
	before := part()
	m.refused("--out", "object", "get", "file", "--range", "0-99")
	for _, r := range []string{"5-4", "100-0"} {
		m.refused("no range", "object", "get", "file", "--range", r, "--out", out)
	}
	m.ok("object", "get", "file", "--range", "100-199", "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data[100:200]) {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
	if len(before) == 0 || !bytes.Equal(part(), before) {
		t.Error("what was kept of the whole is not any more what it was")
	}
}

// One shard that is wrong on its way is no reason to fetch again what came right.
func TestWhatCameIsKeptWhenTheNextIsWrong(t *testing.T) {
	m := newMachine(t)
	file, data := m.file("file", 40<<20)
	m.ok("object", "put", file)
	out := filepath.Join(m.dir, "back")
	m.killAt(30, "object", "get", "file", "--out", out)
	chunks := m.s.object.Chunks
	for _, ch := range chunks[len(chunks)-3:] { // one more than parity
		m.s.chunks[ch.ID][50] ^= 1
	}
	clear(m.s.fetched)
	m.refused("are kept", "object", "get", "file", "--out", out)
	for _, ch := range chunks[len(chunks)-3:] {
		m.s.chunks[ch.ID][50] ^= 1
	}
	m.ok("object", "get", "file", "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data) {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
	if m.s.fetched[chunks[0].ID] != 0 {
		t.Error("what had come was fetched again")
	}
}

// Of a pipe nobody knows the size: its shards are as large as they can be, and who
// waits for it can give up, before it is opened and while nothing comes.
func TestAPipeIsOfUnknownSizeAndCanBeGivenUp(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	must(t, syscall.Mkfifo(fifo, 0o600))
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := openInput(ended, fifo); !errors.Is(err, context.Canceled) {
		t.Errorf("a FIFO that nobody writes to: %v", err)
	}
	w, err := os.OpenFile(fifo, os.O_RDWR, 0) // and lets the open of before through
	must(t, err)
	defer w.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	f, size, err := openInput(ctx, fifo)
	must(t, err)
	defer f.Close()
	if size != -1 {
		t.Errorf("its size is said to be %d", size)
	}
	r := readable(ctx, f, size)
	_, err = io.WriteString(w, "content")
	must(t, err)
	got := make([]byte, 7)
	if _, err := io.ReadFull(r, got); err != nil || string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
	giveUp := time.AfterFunc(10*time.Millisecond, cancel)
	defer giveUp.Stop()
	if _, err := r.Read(got); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
}

func TestAPutOfAPipeGivesTheLargestShards(t *testing.T) {
	m := newMachine(t)
	fifo := filepath.Join(m.dir, "fifo")
	must(t, syscall.Mkfifo(fifo, 0o600))
	data := make([]byte, 17<<20)
	rand.Read(data)
	go func() {
		if err := os.WriteFile(fifo, data, 0); err != nil {
			t.Error(err)
		}
	}()
	m.ok("object", "put", fifo)
	if n := len(m.s.object.Chunks); n != 12 {
		t.Errorf("17 MiB are in %d shards, not two stripes", n)
	}
	out := filepath.Join(m.dir, "back")
	m.ok("object", "get", "fifo", "--out", out)
	if raw, err := os.ReadFile(out); err != nil || !bytes.Equal(raw, data) {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
}

// A verify that ends early says why, and blames nobody.
func TestAVerifyOfWhatIsAwayIsNoSuccess(t *testing.T) {
	m := newMachine(t)
	file, _ := m.file("file", 1000)
	m.ok("object", "put", file)
	o := *m.s.object
	offline := func(id string) bool { return id == o.Chunks[0].ID }
	c := answering(t, func(w http.ResponseWriter, r *http.Request) {
		say := func(status int, v any) {
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(v)
		}
		switch name := path.Base(r.URL.Path); {
		case name == "placements":
			var list []api.Placement
			for _, ch := range o.Chunks {
				list = append(list, api.Placement{Chunk: ch, Holders: []api.Holder{{Device: "d"}}})
			}
			say(http.StatusOK, list)
		case strings.Contains(r.URL.Path, "/chunks/") && offline(name):
			say(http.StatusServiceUnavailable, map[string]string{"code": "offline", "reason": "device d is offline"})
		case strings.Contains(r.URL.Path, "/chunks/"):
			_, _ = w.Write(m.s.chunks[name])
		default:
			say(http.StatusOK, o)
		}
	})
	verify := func() error { return typed(t, c, "object", "verify", "file") }
	var err error
	said := printed(t, func() { err = verify() })
	if err == nil || !strings.Contains(err.Error(), "1 part could not be looked at") || !strings.Contains(said, "offline") {
		t.Errorf("%v\n%s", err, said)
	}
	offline = func(string) bool { return false }
	printed(t, func() { must(t, verify()) })
}

// Who is told that a put has failed is told, too, that it need not begin anew.
func TestAPutThatFailsTellsThatItGoesOn(t *testing.T) {
	m := newMachine(t)
	file, _ := m.file("file", 20<<20)
	var n atomic.Int32
	m.s.setAnswer(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/chunks/") || n.Add(1) <= 10 {
			return false
		}
		w.WriteHeader(http.StatusInsufficientStorage)
		_, _ = io.WriteString(w, `{"code":"no_space","reason":"there is no space"}`)
		return true
	})
	m.refused("the same command goes on from there", "object", "put", file)
	m.s.setAnswer(nil)
	before := m.there()
	m.ok("object", "put", file)
	for id := range before {
		if m.s.sent[id] != 1 {
			t.Errorf("chunk %s was there and was sent %d times", id, m.s.sent[id])
		}
	}
}
