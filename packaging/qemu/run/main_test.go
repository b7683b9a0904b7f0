package main

import (
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/packaging/qemu"
)

// serve starts a coordinator on this host's loopback and returns its address.
func serve(t *testing.T, names ...string) string {
	t.Helper()
	c, err := coordinator.Start(t.Context(), coordinator.Config{Dir: t.TempDir(), Listen: "127.0.0.1:0", MQTT: "127.0.0.1:0", CertNames: names})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	u, err := url.Parse(c.URL())
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", u.Port())
}

func TestTheCoordinatorIsFoundWhereItsCertificateIsGood(t *testing.T) {
	addr := serve(t, qemu.Host)
	_, port, _ := net.SplitHostPort(addr)
	if got, err := find(addr, qemu.Host, nil); err != nil || got != "https://10.0.2.2:"+port {
		t.Errorf("with a certificate for it: %q, %v", got, err)
	}

	addr = serve(t)
	_, port, _ = net.SplitHostPort(addr)
	// 127.0.0.1 stands for an address of the network: the certificate is good for it.
	if got, err := find(addr, qemu.Host, []string{"127.0.0.9", "127.0.0.1"}); err != nil || got != "https://127.0.0.1:"+port {
		t.Errorf("with a certificate for this host's addresses alone: %q, %v", got, err)
	}
	if got, err := find(addr, qemu.Host, nil); err == nil || !strings.Contains(err.Error(), "--cert-name 10.0.2.2") {
		t.Errorf("with a certificate for none: %q, %v", got, err)
	}
	if got, err := find("127.0.0.1:1", qemu.Host, nil); err == nil || !strings.Contains(err.Error(), "deimos serve") {
		t.Errorf("with no coordinator: %q, %v", got, err)
	}
}

func TestADeviceIsKeptUntilANewOneIsAskedFor(t *testing.T) {
	if _, err := qemu.Find(); err != nil {
		testenv.Cannot(t, "%v", err)
	}
	o := options{image: filepath.Join(t.TempDir(), "image"), dir: t.TempDir(), size: 1 << 20}
	if err := os.WriteFile(o.image, []byte("image"), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(o.dir, "disk.img")
	begin := func(fresh bool) (begins string) {
		o.fresh = fresh
		unlock, err := prepare(o)
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
		if _, err := prepare(o); err == nil || !strings.Contains(err.Error(), "runs already") {
			t.Errorf("a second machine in the folder of a first: %v", err)
		}
		f, err := os.Open(disk)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		raw := make([]byte, 8)
		if _, err := io.ReadFull(f, raw); err != nil {
			t.Fatal(err)
		}
		return strings.TrimRight(string(raw), "\x00")
	}
	if got := begin(false); got != "image" {
		t.Errorf("a new device starts from %q", got)
	}
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("lived"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if got := begin(false); got != "lived" {
		t.Errorf("the same device starts again from %q", got)
	}
	if got := begin(true); got != "image" {
		t.Errorf("a device begun anew starts from %q", got)
	}
}
