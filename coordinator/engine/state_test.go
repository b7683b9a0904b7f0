package engine

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/time/rate"

	"github.com/deimos-edge/deimos/wire"
)

func TestStateSurvivesRestart(t *testing.T) {
	w := embedded(t)
	kv, err := w.KV(t.Context(), "registry")
	must(t, err)
	_, err = kv.Put(t.Context(), "device", []byte("enrolled"))
	must(t, err)
	objects, err := w.Objects(t.Context(), "staging")
	must(t, err)
	body := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	_, err = objects.PutBytes(t.Context(), "bundle", body)
	must(t, err)
	must(t, w.Close())

	w.start(t)
	kv, err = w.KV(t.Context(), "registry")
	must(t, err)
	v, err := kv.Get(t.Context(), "device")
	must(t, err)
	if string(v.Value()) != "enrolled" {
		t.Errorf("got %q", v.Value())
	}
	objects, err = w.Objects(t.Context(), "staging")
	must(t, err)
	got, err := objects.GetBytes(t.Context(), "bundle")
	must(t, err)
	if !bytes.Equal(got, body) {
		t.Error("the object is another one")
	}
	w.addr = w.MQTTAddr()
	w.connect(t, w.ca.device(t))
}

// childWriter writes numbered orders to a bucket and says which are
// acknowledged, until somebody kills it.
func childWriter(dir string) {
	ca := newAuthority(fatal{})
	e, err := Start(context.Background(), Config{
		Dir: dir, MQTTListen: "127.0.0.1:0", Sync: time.Hour,
		TLS:       &tls.Config{Certificates: []tls.Certificate{ca.server(fatal{})}, ClientCAs: ca.pool()},
		Authorize: func(context.Context, wire.DeviceID, *x509.Certificate) error { return errors.New("no") },
	})
	must(fatal{}, err)
	kv, err := e.KV(context.Background(), "outbox")
	must(fatal{}, err)
	for i := 0; ; i++ {
		_, err := kv.Create(context.Background(), fmt.Sprintf("order-%d-%d", os.Getpid(), i), []byte("do"))
		must(fatal{}, err)
		fmt.Printf("order-%d-%d\n", os.Getpid(), i)
	}
}

// fatal is a testing.TB for the child processes, which have none.
type fatal struct{ testing.TB }

func (fatal) Helper() {}
func (fatal) Fatal(args ...any) {
	fmt.Fprintln(os.Stderr, args...)
	os.Exit(1)
}

// TestAcknowledgedWritesSurviveKill: with the laziest setting of Sync.
func TestAcknowledgedWritesSurviveKill(t *testing.T) {
	w := newWorld(t)
	w.cfg.Dir = t.TempDir()
	w.cfg.MQTTListen = "127.0.0.1:0"
	w.cfg.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(t)}, ClientCAs: w.ca.pool()}
	var acked []string
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envWriter+"="+w.cfg.Dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			acked = append(acked, lines.Text())
			if n == 50+100*round {
				must(t, cmd.Process.Kill())
			}
		}
		_ = cmd.Wait()
	}
	if len(acked) < 400 {
		t.Fatalf("only %d orders were acknowledged", len(acked))
	}
	w.start(t)
	kv, err := w.KV(t.Context(), "outbox")
	must(t, err)
	for _, key := range acked {
		if _, err := kv.Get(t.Context(), key); err != nil {
			t.Fatalf("%s of %d was acknowledged and is lost: %v", key, len(acked), err)
		}
	}
}

func TestSecondEngineOnOneDirectoryIsRefused(t *testing.T) {
	w := embedded(t)
	_, err := Start(t.Context(), w.cfg)
	wantSentence(t, err, "another coordinator is using", w.cfg.Dir)
}

func TestPortInUseIsNamed(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer busy.Close()
	w := newWorld(t)
	w.cfg.Dir = t.TempDir()
	w.cfg.MQTTListen = busy.Addr().String()
	w.cfg.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(t)}, ClientCAs: w.ca.pool()}
	_, err = Start(t.Context(), w.cfg)
	wantSentence(t, err, "cannot listen for devices", busy.Addr().String(), "another program does")

	// Nothing is left behind: the same directory works at another address.
	w.cfg.MQTTListen = "127.0.0.1:0"
	w.start(t)
}

func TestBadConfigIsASentence(t *testing.T) {
	w := newWorld(t)
	good := w.cfg
	good.Dir = t.TempDir()
	good.MQTTListen = "127.0.0.1:0"
	good.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(t)}, ClientCAs: w.ca.pool()}
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	occupied := t.TempDir()
	must(t, os.WriteFile(filepath.Join(occupied, "jetstream"), nil, 0o600))
	for name, c := range map[string]struct {
		edit  func(*Config)
		words string
	}{
		"no authorize":          {func(c *Config) { c.Authorize = nil }, "Authorize"},
		"no directory":          {func(c *Config) { c.Dir = "" }, "directory"},
		"directory is a file":   {func(c *Config) { c.Dir = file }, "directory " + file},
		"no port":               {func(c *Config) { c.MQTTListen = "127.0.0.1" }, "host:port"},
		"port out of range":     {func(c *Config) { c.MQTTListen = "127.0.0.1:70000" }, "65535"},
		"somebody else's host":  {func(c *Config) { c.MQTTListen = "192.0.2.1:8883" }, "192.0.2.1:8883"},
		"negative sync":         {func(c *Config) { c.Sync = -1 }, "sync"},
		"state is a file":       {func(c *Config) { c.Dir = occupied }, occupied},
		"no TLS":                {func(c *Config) { c.TLS = nil }, "certificate"},
		"no CA of the devices":  {func(c *Config) { c.TLS = &tls.Config{Certificates: c.TLS.Certificates} }, "CA"},
		"short secret":          {func(c *Config) { c.Secret = []byte("hunter2") }, "32 bytes"},
		"no server at the URL":  {func(c *Config) { c.URL = "nats://127.0.0.1:1"; c.Secret = make([]byte, 32) }, "127.0.0.1:1"},
		"URL without a secret":  {func(c *Config) { c.URL = "nats://127.0.0.1:1" }, "secret"},
		"URL that is not a URL": {func(c *Config) { c.URL = "::"; c.Secret = make([]byte, 32) }, "::"},
	} {
		cfg := good
		c.edit(&cfg)
		e, err := Start(t.Context(), cfg)
		if err == nil {
			e.Close()
			t.Errorf("%s: started", name)
			continue
		}
		t.Run(name, func(t *testing.T) { wantSentence(t, err, c.words) })
	}
}

func TestStrangerToAnExternalServerIsToldSo(t *testing.T) {
	w := external(t)
	cfg := w.cfg
	var err error
	cfg.Secret, err = NewSecret()
	must(t, err)
	_, err = Start(t.Context(), cfg)
	wantSentence(t, err, "does not know this coordinator", w.cfg.URL)
}

// TestDamagedBucketIsNotReplacedByAnEmptyOne: nats-server only warns.
func TestDamagedBucketIsNotReplacedByAnEmptyOne(t *testing.T) {
	w := embedded(t)
	kv, err := w.KV(t.Context(), "registry")
	must(t, err)
	_, err = kv.Put(t.Context(), "device", []byte("enrolled"))
	must(t, err)
	must(t, w.Close())
	meta := filepath.Join(w.cfg.Dir, "jetstream", accountCoordinator, "streams", "KV_registry", "meta.inf")
	whole, err := os.ReadFile(meta)
	must(t, err)

	for name, damage := range map[string]func() error{
		"flipped": func() error {
			bad := bytes.Clone(whole)
			bad[len(bad)/2] ^= 1
			return os.WriteFile(meta, bad, 0o600)
		},
		"cut":  func() error { return os.Truncate(meta, int64(len(whole)/2)) },
		"gone": func() error { return os.Remove(meta) },
	} {
		must(t, damage())
		e, err := Start(t.Context(), w.cfg)
		if err == nil {
			e.Close()
			t.Fatalf("%s: started", name)
		}
		wantSentence(t, err, "KV_registry", w.cfg.Dir, "damaged")
		must(t, os.WriteFile(meta, whole, 0o600))
	}
	w.start(t)
	kv, err = w.KV(t.Context(), "registry")
	must(t, err)
	_, err = kv.Get(t.Context(), "device")
	must(t, err)
}

// TestInterruptedMakingOfABucketIsNoDamage: a crash may leave a directory
// without a description and without records.
func TestInterruptedMakingOfABucketIsNoDamage(t *testing.T) {
	w := embedded(t)
	must(t, w.Close())
	must(t, os.MkdirAll(filepath.Join(w.cfg.Dir, "jetstream", accountCoordinator, "streams", "KV_new", "msgs"), 0o700))
	w.start(t)
	kv, err := w.KV(t.Context(), "new")
	must(t, err)
	_, err = kv.Put(t.Context(), "k", []byte("v"))
	must(t, err)
}

func TestKVIsOpenedAsAsked(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		for _, history := range []uint8{1, 5} {
			kv, err := w.KV(t.Context(), "b", func(c *jetstream.KeyValueConfig) { c.History = history })
			must(t, err)
			st, err := kv.Status(t.Context())
			must(t, err)
			if st.History() != int64(history) {
				t.Errorf("history %d, want %d", st.History(), history)
			}
		}
	})
}

// TestExternalServerRestart: devices and coordinator find their way back, and
// the devices' streams are bounded again before a device is in.
func TestExternalServerRestart(t *testing.T) {
	w := external(t)
	kv, err := w.KV(t.Context(), "registry")
	must(t, err)
	_, err = kv.Put(t.Context(), "device", []byte("enrolled"))
	must(t, err)
	d := w.ca.device(t)
	c := w.connect(t, d)
	back := make(chan struct{}, 1)
	w.nc.SetReconnectHandler(func(*nats.Conn) { back <- struct{}{} })
	w.ext.stop()
	next(t, c.lost, "the end of the connection")
	w.ext.start(t)
	next(t, back, "the coordinator's connection")

	_, err = kv.Get(t.Context(), "device")
	must(t, err)
	// Refused while the streams are made; a device comes again, as it does here.
	var again *client
	for deadline := time.Now().Add(patience); ; {
		if again, err = w.tryConnect(d); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer again.Disconnect(0)
	for _, want := range mqttStreams() {
		s, err := w.keep.js.Stream(t.Context(), want.Name)
		must(t, err)
		if got := s.CachedInfo().Config; got.Storage != jetstream.MemoryStorage || got.MaxBytes != want.MaxBytes {
			t.Errorf("%s is in %v, bounded at %d bytes", want.Name, got.Storage, got.MaxBytes)
		}
	}
}

func TestServerConfigHoldsNoSecret(t *testing.T) {
	secret, err := NewSecret()
	must(t, err)
	var text bytes.Buffer
	must(t, WriteServerConfig(&text, ServerConfig{Secret: secret, StoreDir: "/s", CertFile: "c", KeyFile: "k", CAFile: "a"}))
	k, err := newKeyring(secret)
	must(t, err)
	for _, kp := range []interface{ Seed() ([]byte, error) }{k.issuer, k.coordinator, k.keeper, k.system} {
		seed, err := kp.Seed()
		must(t, err)
		if bytes.Contains(text.Bytes(), seed) {
			t.Error("the configuration holds a seed")
		}
	}
	if text.Len() == 0 || bytes.Contains(text.Bytes(), secret) || strings.Contains(text.String(), fmt.Sprintf("%x", secret)) {
		t.Error("the configuration holds the secret, or nothing")
	}
	for _, missing := range []func(*ServerConfig){
		func(c *ServerConfig) { c.StoreDir = "" }, func(c *ServerConfig) { c.CAFile = "" }, func(c *ServerConfig) { c.Secret = nil },
	} {
		c := ServerConfig{Secret: secret, StoreDir: "/s", CertFile: "c", KeyFile: "k", CAFile: "a"}
		missing(&c)
		wantSentence(t, WriteServerConfig(&text, c), "")
	}
}

// TestCloseLeavesNothing: no goroutine, no listener, no lock.
func TestCloseLeavesNothing(t *testing.T) {
	w := embedded(t)
	c := w.connect(t, w.ca.device(t))
	must(t, w.Close())
	must(t, w.Close())
	next(t, c.lost, "the end of the connection")
	if conn, err := net.Dial("tcp", w.addr); err == nil {
		conn.Close()
		t.Error("somebody still listens for devices")
	}
	lock, err := lockDir(w.cfg.Dir)
	must(t, err)
	must(t, lock.Close())

	deadline := time.Now().Add(patience)
	for {
		left := goroutinesOf("nats-server/v2/server", "nats.go.", "coordinator/engine.(*")
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines are left, for example\n%s", len(left), left[0])
		}
		runtime.Gosched()
	}
}

// goroutinesOf returns the stacks that run code of any of these packages.
func goroutinesOf(packages ...string) []string {
	buf := make([]byte, 4<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var found []string
	for _, stack := range strings.Split(string(buf), "\n\n") {
		for _, p := range packages {
			if strings.Contains(stack, p) {
				found = append(found, stack)
				break
			}
		}
	}
	return found
}

// TestQuietStart: an operator's terminal shows nothing of a start that works.
func TestQuietStart(t *testing.T) {
	w := newWorld(t)
	var out lockedBuffer
	w.cfg.Log = slog.New(slog.NewTextHandler(&out, nil))
	w.cfg.Dir = t.TempDir()
	w.cfg.MQTTListen = "127.0.0.1:0"
	w.cfg.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(t)}, ClientCAs: w.ca.pool()}
	w.start(t)
	w.addr = w.MQTTAddr()
	w.connect(t, w.ca.device(t)).Disconnect(0)
	must(t, w.Close())
	if text := out.String(); text != "" {
		t.Errorf("the log says\n%s", text)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestRefusalIsLoggedOnce, with its reason; what strangers do without a
// certificate is not worth a line.
func TestRefusalIsLoggedOnce(t *testing.T) {
	w := newWorld(t)
	var out lockedBuffer
	w.cfg.Log = slog.New(slog.NewTextHandler(&out, nil))
	w.cfg.Dir = t.TempDir()
	w.cfg.MQTTListen = "127.0.0.1:0"
	w.cfg.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(t)}, ClientCAs: w.ca.pool()}
	w.start(t)
	w.addr = w.MQTTAddr()
	d := w.ca.device(t)
	w.reg.retire(d.id)
	for _, d := range []device{d, {id: "x"}, newAuthority(t).device(t)} {
		if _, err := w.tryConnect(d); err == nil {
			t.Fatal("let in")
		}
	}
	must(t, w.Close())
	if text := out.String(); strings.Count(text, "\n") != 1 || !strings.Contains(text, string(d.id)) || !strings.Contains(text, "retired") {
		t.Errorf("the log says\n%s", text)
	}
}

// TestLogIsNotFloodedByDevices, and says what it left out.
func TestLogIsNotFloodedByDevices(t *testing.T) {
	var out lockedBuffer
	l := newServerLog(slog.New(slog.NewTextHandler(&out, nil)))
	for range 10_000 {
		l.Errorf("192.0.2.1:4711 - mid:%d - %q - Publish Violation", 7, "id")
	}
	lines := strings.Count(out.String(), "\n")
	if lines == 0 || lines > 1000 {
		t.Errorf("%d lines", lines)
	}
	l.limit = rate.NewLimiter(1, 1)
	l.Errorf("192.0.2.1:4711 - mid:%d - %q - Publish Violation", 7, "id")
	dropped := 0
	for _, part := range strings.Split(out.String(), "similar_dropped=")[1:] {
		var n int
		_, err := fmt.Sscan(part, &n)
		must(t, err)
		dropped += n
	}
	if dropped+lines != 10_000 {
		t.Errorf("%d lines, which tell of %d others", lines, dropped)
	}
	l.Errorf("the disk is full")
	if !strings.Contains(out.String(), "level=ERROR msg=\"the disk is full\"") {
		t.Error("an error of the server itself is missing")
	}
}

// TestDamagedRecordIsNotServed: with one flipped byte, what is read is right or
// an error. JetStream drops the record, and after a crash those behind it in the
// same file too, without a word: see "Not done yet" of the package.
func TestDamagedRecordIsNotServed(t *testing.T) {
	for _, crashed := range []bool{false, true} {
		t.Run(fmt.Sprintf("crashed=%v", crashed), func(t *testing.T) {
			w := embedded(t)
			value := func(i int) string { return fmt.Sprintf("<value of order %03d>", i) }
			kv, err := w.KV(t.Context(), "outbox")
			must(t, err)
			for i := range 20 {
				_, err = kv.Put(t.Context(), fmt.Sprint(i), []byte(value(i)))
				must(t, err)
			}
			must(t, w.Close())
			msgs := filepath.Join(w.cfg.Dir, "jetstream", accountCoordinator, "streams", "KV_outbox", "msgs")
			raw, err := os.ReadFile(filepath.Join(msgs, "1.blk"))
			must(t, err)
			at := bytes.Index(raw, []byte(value(7)))
			if at < 0 {
				t.Fatal("the value is not in the file")
			}
			raw[at+3] ^= 1
			must(t, os.WriteFile(filepath.Join(msgs, "1.blk"), raw, 0o600))
			if crashed {
				must(t, os.Remove(filepath.Join(msgs, "index.db")))
			}
			w.start(t)
			kv, err = w.KV(t.Context(), "outbox")
			must(t, err)
			for i := range 20 {
				v, err := kv.Get(t.Context(), fmt.Sprint(i))
				switch {
				case err == nil && string(v.Value()) != value(i):
					t.Errorf("%d is served as %q", i, v.Value())
				case err == nil && i == 7:
					t.Error("the damaged record is served")
				case err != nil && i < 7:
					t.Errorf("%d is not damaged: %v", i, err)
				}
			}
		})
	}
}
