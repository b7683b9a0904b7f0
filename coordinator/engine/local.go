package engine

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"golang.org/x/sys/unix"
)

// localServer is the embedded nats-server and the lock on its directory.
type localServer struct {
	srv      *server.Server
	log      *serverLog
	lock     *os.File
	entrance *entrance
	mqttAddr string
}

// startLocal runs a server inside this process, configured by the same text as
// an external one.
func startLocal(ctx context.Context, c Config, keys *keyring) (_ *localServer, err error) {
	opts, err := localOptions(c, keys)
	if err != nil {
		return nil, err
	}
	l := &localServer{log: newServerLog(c.Log), entrance: newEntrance(c.Hold)}
	opts.MQTT.TLSConfig = l.entrance.guard(opts.MQTT.TLSConfig)
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.lock, err = lockDir(c.Dir); err != nil {
		return nil, err
	}
	if err := (&Engine{local: l}).Room(); err != nil {
		return nil, err // before anything of the state is touched
	}
	if l.srv, err = server.NewServer(opts); err != nil {
		return nil, fmt.Errorf("set up the message server: %w", err)
	}
	l.srv.SetLogger(l.log, c.Log.Enabled(ctx, slog.LevelDebug), false)

	started := make(chan struct{})
	go func() {
		defer close(started)
		l.srv.Start()
	}()
	select {
	case <-started:
	case <-ctx.Done():
		return nil, fmt.Errorf("the message server was still reading its files in %s when the time for the start was over: %w", c.Dir, ctx.Err())
	}
	if err := l.log.died(); err != nil {
		return nil, l.explain(err, c)
	}
	if !l.srv.ReadyForConnections(time.Second) || !l.srv.JetStreamEnabled() {
		return nil, fmt.Errorf("the message server did not get ready; its log says why (directory %s, address %s)", c.Dir, c.MQTTListen)
	}
	if err := l.checkStreams(c.Dir); err != nil {
		return nil, err
	}
	l.mqttAddr = net.JoinHostPort(opts.MQTT.Host, strconv.Itoa(opts.MQTT.Port))
	return l, nil
}

func localOptions(c Config, keys *keyring) (*server.Options, error) {
	if c.Dir == "" {
		return nil, errors.New("the engine needs a directory for its state (Config.Dir)")
	}
	if c.Sync < 0 {
		return nil, fmt.Errorf("the engine cannot sync every %s; zero means at once", c.Sync)
	}
	host, port, err := splitListen(c.MQTTListen)
	if err != nil {
		return nil, err
	}
	if c.TLS == nil || c.TLS.ClientCAs == nil || (len(c.TLS.Certificates) == 0 && c.TLS.GetCertificate == nil && c.TLS.GetConfigForClient == nil) {
		return nil, errors.New("the engine needs a server certificate and the CA of the devices' certificates (Config.TLS)")
	}
	var text bytes.Buffer
	if err := renderConfig(&text, ServerConfig{StoreDir: c.Dir, Sync: c.Sync, MaxStore: c.MaxStore, MaxDevices: c.MaxDevices}, keys); err != nil {
		return nil, err
	}
	opts := &server.Options{}
	if err := opts.ProcessConfigString(text.String()); err != nil {
		return nil, fmt.Errorf("read the message server's configuration: %w", err)
	}
	opts.DontListen = true
	opts.NoSigs = true
	opts.MQTT.Host = host
	opts.MQTT.Port = port
	if port == 0 {
		opts.MQTT.Port = server.RANDOM_PORT
	}
	opts.MQTT.TLSConfig = requireClientCert(c.TLS)
	opts.MQTT.TLSTimeout = handshakeTimeout.Seconds()
	return opts, nil
}

// requireClientCert makes sure of what must not depend on the caller.
func requireClientCert(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.MinVersion = tls.VersionTLS13
	c.ClientAuth = tls.RequireAndVerifyClientCert
	cas := c.ClientCAs
	if inner := c.GetConfigForClient; inner != nil {
		c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			got, err := inner(h)
			if got == nil || err != nil {
				return nil, err
			}
			if got.ClientCAs == nil { // to Go that means every CA of the system
				got = got.Clone()
				got.ClientCAs = cas
			}
			return requireClientCert(got), nil
		}
	}
	return c
}

// lockDir makes dir and keeps other engines out of it. The lock is the
// kernel's, so that no crash leaves it behind.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the engine's directory %s; check its owner and permissions: %w", dir, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "engine.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot write in the engine's directory %s; check its owner and permissions: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another coordinator is using %s; stop it first, or give this one a directory of its own", dir)
		}
		return nil, fmt.Errorf("cannot lock %s: %w", f.Name(), err)
	}
	return f, nil
}

// explain makes a sentence of what the server died of.
func (l *localServer) explain(err error, c Config) error {
	var op *net.OpError
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("cannot listen for devices on %s, another program does; stop it or choose another address", c.MQTTListen)
	case errors.As(err, &op) && op.Op == "listen":
		return fmt.Errorf("cannot listen for devices on %s; choose an address of this machine and a port that you may use: %w", c.MQTTListen, err)
	case strings.Contains(err.Error(), "JetStream"):
		return fmt.Errorf("cannot use the state in %s; check the disk and the permissions, or restore the directory from a backup: %w", c.Dir, err)
	}
	return fmt.Errorf("the message server does not start: %w", err)
}

// checkStreams finds out what nats-server only warns of: it skips a stream
// whose description is damaged, and the next caller would be given an
// empty bucket of the same name.
func (l *localServer) checkStreams(dir string) error {
	info, err := l.srv.Jsz(&server.JSzOptions{Accounts: true, Streams: true, Limit: 1 << 20})
	if err != nil {
		return fmt.Errorf("cannot list the state in %s: %w", dir, err)
	}
	found := map[string]bool{}
	for _, acc := range info.AccountDetails {
		for _, s := range acc.Streams {
			found[acc.Name+"/"+s.Name] = true
			if s.State.Lost != nil && len(s.State.Lost.Msgs) > 0 {
				l.log.log.Error("the disk lost records that had been written; compare with a backup",
					"bucket", s.Name, "records", len(s.State.Lost.Msgs), "dir", dir)
			}
		}
	}
	onDisk, err := filepath.Glob(filepath.Join(globEscape(dir), "jetstream", "*", "streams", "*"))
	if err != nil {
		return fmt.Errorf("cannot list the state in %s: %w", dir, err)
	}
	for _, path := range onDisk {
		name := filepath.Base(path)
		account := filepath.Base(filepath.Dir(filepath.Dir(path)))
		if strings.HasPrefix(name, ".") || found[account+"/"+name] || !holdsRecords(path) {
			continue
		}
		return fmt.Errorf("the bucket %s in %s is damaged: its description cannot be read; restore the directory from a backup, or move %s away to go on without it", name, dir, path)
	}
	return nil
}

// holdsRecords tells a damaged stream from one whose making was interrupted.
func holdsRecords(stream string) bool {
	blocks, _ := filepath.Glob(filepath.Join(globEscape(stream), "msgs", "*.blk"))
	for _, b := range blocks {
		if fi, err := os.Stat(b); err == nil && fi.Size() > 0 {
			return true
		}
	}
	return false
}

func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// close stops the server and gives the directory back. If the server does not
// stop in time the directory stays locked, because it may still be written.
func (l *localServer) close() error {
	l.entrance.close()
	if l.srv != nil {
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			l.srv.Shutdown()
			l.srv.WaitForShutdown()
		}()
		select {
		case <-stopped:
		case <-time.After(closeTimeout):
			return fmt.Errorf("the message server did not stop within %s; end the process before using its directory again", closeTimeout)
		}
	}
	if l.lock != nil {
		return l.lock.Close()
	}
	return nil
}
