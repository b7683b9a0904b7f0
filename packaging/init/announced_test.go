package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	encodingpem "encoding/pem"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/brutella/dnssd"
	"github.com/vishvananda/netlink"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/internal/testenv"
)

const patience = 3 * time.Minute

// inOwnNetwork runs the test once more in a process with a network of its own, as
// root of it, and tells whether this is that one.
func inOwnNetwork(t *testing.T) bool {
	if os.Getenv(role) == "network" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=9m")
	cmd.Env = append(os.Environ(), role+"=network")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		Pdeathsig: syscall.SIGKILL,
	}
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	runtime.LockOSThread() // Pdeathsig is the thread's
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		testenv.Cannot(t, "no namespaces here: %v", err)
	}
	err := cmd.Wait()
	switch {
	case err != nil:
		t.Fatalf("%v\n%s", err, said.String())
	case strings.Contains(said.String(), "--- SKIP"):
		t.Skip(said.String())
	}
	return false
}

// connect adds a link with an address; its other end is here too.
func connect(t *testing.T, name, address string) netlink.Link {
	t.Helper()
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-peer"}
	if err := netlink.LinkAdd(link); err != nil {
		testenv.Cannot(t, "no virtual link here: %v", err)
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		t.Fatal(err)
	}
	for _, end := range []string{name, name + "-peer"} {
		l, err := netlink.LinkByName(end)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	return link
}

// looked looks for coordinators as a device does, until good says that it has found what it should.
func looked(t *testing.T, what string, good func(found []string) bool) []string {
	t.Helper()
	d := &discovery{browse: browseLAN, log: slog.New(slog.DiscardHandler)}
	var found []string
	for end := time.Now().Add(patience); time.Now().Before(end); {
		answers, err := d.look(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// While it still asks whether its name is free, its TXT record is not there.
		whole := !slices.ContainsFunc(answers, func(a answer) bool { return a.fleet == "" })
		if found = addressesOf(answers); whole && good(found) {
			return found
		}
	}
	t.Fatalf("%s: a device finds %q", what, found)
	return nil
}

func TestADeviceFindsTheCoordinatorThatAnnouncesItself(t *testing.T) {
	if testing.Short() {
		t.Skip("half a minute of looking around")
	}
	if !inOwnNetwork(t) {
		return
	}
	if lo, err := netlink.LinkByName("lo"); err != nil || netlink.LinkSetUp(lo) != nil {
		testenv.Cannot(t, "the loopback of a network of our own cannot be set up")
	}
	first := connect(t, "lan0", "192.168.77.2/24")
	dir := t.TempDir()
	start := func(change func(*coordinator.Config)) *coordinator.Coordinator {
		cfg := coordinator.Config{Dir: dir, Listen: ":0", MQTT: "127.0.0.1:0", Log: slog.New(slog.NewTextHandler(os.Stdout, nil))}
		change(&cfg)
		c, err := coordinator.Start(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}

	c := start(func(cfg *coordinator.Config) {})
	u, err := url.Parse(c.URL())
	if err != nil {
		t.Fatal(err)
	}
	port := u.Port()
	looked(t, "by address", func(found []string) bool { return slices.Equal(found, []string{"https://192.168.77.2:" + port}) })
	serves(t, dir, "192.168.77.2:"+port)

	// Another link comes, and the one that was there goes.
	connect(t, "lan1", "10.99.0.2/24")
	if err := netlink.LinkDel(first); err != nil {
		t.Fatal(err)
	}
	looked(t, "by the new link", func(found []string) bool { return slices.Equal(found, []string{"https://10.99.0.2:" + port}) })
	serves(t, dir, "10.99.0.2:"+port)

	// Whoever is looking when it ends learns that it is gone.
	gone, stop := follow(t)
	c.Close()
	await(t, gone, "the goodbye")
	stop()

	// What the operator says counts more than the addresses.
	c = start(func(cfg *coordinator.Config) {
		cfg.Advertise, cfg.Announce = []string{"fleet.example.org"}, "Cellar (second)"
	})
	u, _ = url.Parse(c.URL())
	looked(t, "by name", func(found []string) bool {
		return slices.Equal(found, []string{"https://fleet.example.org:" + u.Port()})
	})
	c.Close()

	// Off is off, and so is loopback.
	for _, change := range []func(*coordinator.Config){
		func(cfg *coordinator.Config) { cfg.Announce = "off" },
		func(cfg *coordinator.Config) { cfg.Listen = "127.0.0.1:0" },
	} {
		c := start(change)
		if said := c.Announced(); said != "" {
			t.Errorf("it announces %s", said)
		}
		c.Close()
	}

	// No reader of the network goes on by itself: one of a closed socket would take all
	// the time of a core. One that was left with a message that nobody wants does nothing.
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		busy := 0
		for one := range strings.SplitSeq(string(stacks), "\n\n") {
			if strings.Contains(one, "dnssd.(*mdnsConn).readInto.func") && !strings.Contains(one, "[chan send") {
				busy++
			}
		}
		if busy == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d readers of the network were left behind", busy)
		}
	}
}

// follow looks around until it has heard the coordinator say its url, which is not
// while it still asks whether its name is free, and tells when it is gone after that.
func follow(t *testing.T) (gone <-chan struct{}, stop func()) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); {
		ctx, cancel := context.WithCancel(t.Context())
		said, left := make(chan string, 8), make(chan struct{}, 8)
		go func() {
			_ = dnssd.LookupType(ctx, serviceType, func(e dnssd.BrowseEntry) { said <- e.Text[announcedURL] }, func(dnssd.BrowseEntry) { left <- struct{}{} })
		}()
		select {
		case url := <-said:
			if url != "" {
				return left, cancel
			}
		case <-time.After(browseFor):
		}
		cancel()
	}
	t.Fatal("the coordinator never said its url")
	return nil, nil
}

func await(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s did not happen", what)
	}
}

// serves fails unless the coordinator's certificate is good for this address.
func serves(t *testing.T, dir, addr string) {
	t.Helper()
	pem, err := os.ReadFile(filepath.Join(dir, "keys", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", addr, &tls.Config{RootCAs: roots})
	if err != nil {
		t.Fatalf("a device that comes to %s: %v", addr, err)
	}
	conn.Close()
	block, _ := encodingpem.Decode(pem)
	for fleet, want := range map[string]bool{fingerprintOf(block.Bytes): true, fingerprintOf([]byte("another")): false} {
		if a := (answer{"https://" + addr, fleet}); provesFleet(t.Context(), a) != want {
			t.Errorf("%+v proves its fleet: %v", a, !want)
		}
	}
}
