package coordinator

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// wantStartError starts a coordinator that cannot, and checks what it says: one
// sentence with these words, and nothing left open.
func wantStartError(t *testing.T, cfg Config, words ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startLimit)
	defer cancel()
	c, err := Start(ctx, cfg)
	if err == nil {
		c.Close()
		t.Fatal("it started")
	}
	text := err.Error()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%q does not say %q", text, w)
		}
	}
	if strings.Contains(text, "\n") || strings.Contains(text, "goroutine") || !strings.Contains(text, " ") {
		t.Errorf("%q is not one sentence", text)
	}
}

// taken is an address that somebody listens on.
func taken(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}

func TestFaultsAtTheStartAreOneSentence(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	open(t, dir).Close() // keys and state of a first start
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))

	with := func(edit func(c *Config)) Config {
		c := testConfig(dir)
		edit(&c)
		return c
	}
	busy := taken(t)
	for name, c := range map[string]struct {
		cfg   Config
		words []string
	}{
		"HTTPS port in use":    {with(func(c *Config) { c.Listen = busy }), []string{busy, "stop what uses it"}},
		"MQTT port in use":     {with(func(c *Config) { c.MQTT = busy }), []string{busy, "choose another"}},
		"no HTTPS address":     {with(func(c *Config) { c.Listen = "nonsense" }), []string{"nonsense"}},
		"no MQTT address":      {with(func(c *Config) { c.MQTT = "nonsense" }), []string{"nonsense"}},
		"a file for a folder":  {with(func(c *Config) { c.Dir = filepath.Join(file, "x") }), []string{"cannot be made", file}},
		"a beat too short":     {with(func(c *Config) { c.Beat = time.Millisecond }), []string{"1ms", "1s"}},
		"a beat below nothing": {with(func(c *Config) { c.Beat = -time.Second }), []string{"-1s"}},
	} {
		t.Run(name, func(t *testing.T) { wantStartError(t, c.cfg, c.words...) })
	}
	t.Run("a second coordinator in the folder", func(t *testing.T) {
		w := open(t, dir)
		defer w.Close()
		wantStartError(t, testConfig(dir), "another coordinator is using", dir)
		// The first is none the worse for it.
		if _, err := w.op.Devices(testContext(t)); err != nil {
			t.Error(err)
		}
	})
	// After all of these the folder is as it was.
	open(t, dir).Close()
}

func TestDamagedKeysAreRefusedAndNeverReplaced(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	open(t, dir).Close()
	other, err := openAuthority(t.TempDir())
	must(t, err)
	keys := filepath.Join(dir, "keys")
	remove := []byte("REMOVE")
	for name, c := range map[string]struct {
		file  string
		bytes []byte
		words []string
	}{
		"another authority":      {"ca.pem", other.caPEM, []string{"do not belong together", "backup"}},
		"no certificate":         {"ca.pem", []byte("garbage"), []string{"ca.pem", "damaged"}},
		"a broken certificate":   {"ca.pem", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), []string{"ca.pem", "damaged"}},
		"an empty authority key": {"ca.key", nil, []string{"ca.key", "damaged"}},
		"no authority key":       {"ca.key", remove, []string{"ca.key", "missing", "backup"}},
		"a broken order key":     {"orders.key", []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), []string{"orders.key", "damaged"}},
		"no order key":           {"orders.key", remove, []string{"orders.key", "missing", "backup"}},
		"an empty ticket key":    {"tickets.key", nil, []string{"tickets.key", "damaged"}},
		"a cut engine secret":    {secretFile, []byte("short"), nil},
		"a damaged context":      {"../" + ContextFile, []byte("{"), []string{ContextFile, "remove the file"}},
		"an empty context":       {"../" + ContextFile, nil, []string{ContextFile, "remove the file"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(keys, c.file)
			good, err := os.ReadFile(path)
			must(t, err)
			if bytes.Equal(c.bytes, remove) {
				must(t, os.Remove(path))
			} else {
				must(t, os.WriteFile(path, c.bytes, 0o600))
			}
			wantStartError(t, testConfig(dir), c.words...)
			now, err := os.ReadFile(path)
			if bytes.Equal(c.bytes, remove) {
				if err == nil {
					t.Error("a new one was made")
				}
			} else if !bytes.Equal(now, c.bytes) {
				t.Error("the damaged file was replaced")
			}
			must(t, os.WriteFile(path, good, 0o600))
		})
	}
	// Put back, everything works again.
	w := open(t, dir)
	w.Close()
}

// The order key in use must be of the kind that devices verify with.
func TestAnOrderKeyOfAnotherKindIsRefused(t *testing.T) {
	dir := t.TempDir()
	_, err := openAuthority(filepath.Join(dir, "keys"))
	must(t, err)
	ecdsaKey, err := os.ReadFile(filepath.Join(dir, "keys", "ca.key"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "keys", "orders.key"), ecdsaKey, 0o600))
	wantStartError(t, testConfig(dir), "orders.key", "Ed25519")
}

func TestTheOperatorsContextLastsAndIsPrivate(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	path := filepath.Join(dir, ContextFile)
	first, err := api.LoadContext(path)
	must(t, err)
	for _, f := range []string{path, filepath.Join(dir, "keys", "ca.key"), filepath.Join(dir, "keys", "orders.key"), filepath.Join(dir, "keys", "tickets.key"), filepath.Join(dir, "keys", secretFile)} {
		fi, err := os.Stat(f)
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, fi.Mode(), err)
		}
	}
	w.Close()
	w = open(t, dir)
	second, err := api.LoadContext(path)
	w.Close()
	if err != nil || second.Token != first.Token || second.CA != first.CA {
		t.Error("a restart changed the operator's token")
	}
	must(t, os.Remove(path))
	w = open(t, dir)
	defer w.Close()
	third, err := api.LoadContext(path)
	must(t, err)
	if third.Token == first.Token {
		t.Error("a removed context came back with the old token")
	}
	old, err := api.NewClient(api.Context{URL: w.URL(), Token: first.Token, CA: first.CA})
	must(t, err)
	_, err = old.Devices(testContext(t))
	wantRefusal(t, err, 401, "unauthorized")
}

// ours lists goroutines that run this module's or the engine's code.
func ours() []string {
	buf := make([]byte, 8<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var out []string
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "testing.") || strings.Contains(g, "coordinator.TestMain") {
			continue
		}
		if strings.Contains(g, "deimos-edge/deimos/coordinator") || strings.Contains(g, "nats-io/") || strings.Contains(g, "net/http.(*Server)") || strings.Contains(g, "net/http.(*conn)") {
			out = append(out, g)
		}
	}
	return out
}

func TestCloseLeavesNothingBehind(t *testing.T) {
	closeShared() // their goroutines could not be told apart
	before := len(ours())
	dir := t.TempDir()
	w := open(t, dir)
	d, other, chunks := auditScene(t, w)
	if _, err := w.op.GetChunk(testContext(t), chunks[0]); err != nil {
		t.Error(err)
	}
	// Calls of each kind that wait for a device are under way.
	for _, k := range []wire.Kind{wire.KindAudit, wire.KindChunkServe, wire.KindChunkStore, wire.KindUpdateInstall} {
		d.on(k, silent)
	}
	o := w.offer(t, d)
	calls := make(chan error, 3)
	go func() {
		_, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id})
		calls <- err
	}()
	go func() { _, err := w.op.AwaitOrder(testContext(t), d.id, o.ID, nil); calls <- err }()
	go func() {
		_, err := w.storage.read(testContext(t), chunks[0], other.id)
		calls <- err
	}()
	for next(t, d.orders, "the challenge").Kind != wire.KindAudit {
	}
	mqtt := w.Broker()
	began := time.Now()
	w.Close()
	w.Close() // and once more does no harm
	if took := time.Since(began); took >= closeLimit {
		t.Errorf("closing took %s", took)
	}
	for range 3 {
		if next(t, calls, "the end of a call") == nil {
			t.Error("a call that was cut off succeeded")
		}
	}
	d.http.CloseIdleConnections()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("left:\n%s", strings.Join(ours(), "\n\n"))
		}
	})
	eventually(t, "no goroutine is left", func() bool { return len(ours()) <= before })
	// Ports and locks are free: the same place can be taken again at once.
	for _, port := range []string{w.httpPort, mqtt} {
		ln, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Errorf("port %s: %v", port, err)
			continue
		}
		ln.Close()
	}
	open(t, dir).Close()
}

// An external server's configuration can be made before the first start, and
// again, with the same keys.
func TestTheExternalServersFilesStayTheSame(t *testing.T) {
	cfg := testConfig(t.TempDir())
	var first, second bytes.Buffer
	must(t, WriteNATSConfig(&first, cfg))
	must(t, WriteNATSConfig(&second, cfg))
	if first.String() != second.String() || !strings.Contains(first.String(), "auth_callout") {
		t.Error("the configuration changes from call to call")
	}
	secret, err := os.ReadFile(filepath.Join(cfg.Dir, "keys", secretFile))
	must(t, err)
	if bytes.Contains(first.Bytes(), bytes.TrimSpace(secret)) {
		t.Error("the configuration holds the secret")
	}
}
