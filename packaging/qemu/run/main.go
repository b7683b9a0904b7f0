// Command run is a device in a terminal: the image as a virtual machine of
// packaging/qemu, with its console here. `make qemu` runs it.
//
//	run -image FILE [-dir DIR] [-new] [-size BYTES] [-coordinator URL] [-token TOKEN]
//
// # The device
//
// It is a folder: disk.img, a copy of the image that it starts from, and data.img, an
// NVMe disk that is empty at first. The next run in the same folder starts the same
// device, with the firmware that it has by then; -new makes another. One machine at a time runs
// in a folder.
//
// # Its coordinator
//
// The machine reaches nothing of this host but by dialing out, and calls this host's
// loopback 10.0.2.2. Its configuration is a file that QEMU hands it (-fw_cfg), which
// says -coordinator and -token. Without -coordinator it is one on this host's port
// 8443, at an address that its certificate is good for:
//
//  1. 10.0.2.2, if the coordinator was started with --cert-name 10.0.2.2;
//  2. else an address of this host's network, where the same coordinator answers.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/packaging/qemu"
)

const (
	port      = "8443" // of a coordinator, unless it was started with another
	lookLimit = 3 * time.Second
	madeFile  = "made"  // its time is when the device was made
	diskSize  = 1 << 30 // that it starts from; room for what an owner puts there
)

type options struct {
	image, dir         string
	fresh              bool
	size               int64
	coordinator, token string
}

func main() {
	var o options
	flag.StringVar(&o.image, "image", "", "image that a new device starts from (make image)")
	flag.StringVar(&o.dir, "dir", "bin/qemu/device", "folder of the device")
	flag.BoolVar(&o.fresh, "new", false, "begin anew: remove the device that is in the folder")
	flag.Int64Var(&o.size, "size", 4<<30, "size of a new data disk, bytes")
	flag.StringVar(&o.coordinator, "coordinator", "", "https://HOST:PORT as the machine reaches it; this host is "+qemu.Host+" (default: the one on this host's port "+port+")")
	flag.StringVar(&o.token, "token", "", "token with which the device joins; without one it waits to be claimed")
	flag.Parse()
	runtime.LockOSThread() // QEMU ends with the thread that started it
	if flag.NArg() > 0 || o.image == "" {
		flag.Usage()
		os.Exit(64)
	}
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "qemu:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	unlock, err := prepare(o)
	if err != nil {
		return err
	}
	defer unlock()
	if o.coordinator == "" {
		if o.coordinator, err = find(net.JoinHostPort("127.0.0.1", port), qemu.Host, ownAddresses()); err != nil {
			return err
		}
	}
	config := filepath.Join(o.dir, "deimos.toml")
	if err := os.WriteFile(config, configuration(o.coordinator, o.token), 0o600); err != nil {
		return err
	}
	argv, err := qemu.Command(qemu.Options{
		Disks:  []qemu.Disk{{File: filepath.Join(o.dir, "disk.img")}, {File: filepath.Join(o.dir, "data.img"), NVMe: true}},
		Config: config,
	}, "mon:stdio")
	if err != nil {
		return err
	}
	explain(os.Stdout, o)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the machine ended: %w", err)
	}
	fmt.Printf("\nThe device is kept in %s: the same command starts it again.\n", o.dir)
	return nil
}

// prepare makes the device, if it is not there, and keeps others from it until unlock.
func prepare(o options) (unlock func(), err error) {
	if _, err := qemu.Find(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(o.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("the device in %s runs already: end it first, or name another (NAME=…)", o.dir)
	}
	disk, data := filepath.Join(o.dir, "disk.img"), filepath.Join(o.dir, "data.img")
	if o.fresh {
		if err := errors.Join(gone(disk), gone(data)); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(disk); err == nil {
		return func() { lock.Close() }, nil
	}
	f, err := os.OpenFile(data, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(o.size), f.Close()); err != nil {
		return nil, err
	}
	// The disk comes last and under its name when it is whole: with it the device is there.
	if err := errors.Join(gone(disk+".new"), qemu.CopyDisk(o.image, disk+".new", diskSize)); err != nil {
		return nil, err
	}
	return func() { lock.Close() }, errors.Join(os.WriteFile(filepath.Join(o.dir, madeFile), nil, 0o600), os.Rename(disk+".new", disk))
}

func gone(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// configuration is what the machine finds as its deimos.toml.
func configuration(coordinator, token string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "coordinator = %s\n", strconv.Quote(coordinator))
	if token != "" {
		fmt.Fprintf(&b, "token = %s\n", strconv.Quote(token))
	}
	return b.Bytes()
}

// explain says what to do, before the console has the terminal.
func explain(w io.Writer, o options) {
	fmt.Fprintf(w, "A device in %s, which dials out to %s.\n\n", o.dir, o.coordinator)
	if o.token == "" {
		fmt.Fprint(w, "  claim it   a new device shows a code below, after \"Its code is\"; type in another terminal:\n"+
			"             deimos device claim CODE\n")
	} else {
		fmt.Fprint(w, "  it joins   by its token; deimos device list shows it\n")
	}
	fmt.Fprint(w, "  end it     Ctrl-A X: as if the plug was pulled\n")
	if older(filepath.Join(o.dir, madeFile), o.image) {
		fmt.Fprint(w, "  new image  it was built after this device, which keeps its firmware; NEW=1 begins anew with it\n")
	}
	fmt.Fprintln(w)
}

// older tells whether a device was made before its image was built again.
func older(note, image string) bool {
	made, err1 := os.Stat(note)
	built, err2 := os.Stat(image)
	return err1 == nil && err2 == nil && made.ModTime().Before(built.ModTime())
}

// ownAddresses are this host's, by which a machine can reach it as it reaches any other.
func ownAddresses() (all []string) {
	addrs, _ := net.InterfaceAddrs() // none is as good as an error
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() && n.IP.To4() != nil { // QEMU's network has no IPv6 everywhere
			all = append(all, n.IP.String())
		}
	}
	return all
}

// find is the address by which a machine reaches the coordinator that listens at local:
// guest, which is what it calls local's host, or one of others.
func find(local, guest string, others []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lookLimit)
	defer cancel()
	there, err := certificates(ctx, local)
	if err != nil {
		return "", fmt.Errorf("no coordinator answers at %s: start one (deimos serve), or say where it is (COORDINATOR=https://%s:PORT for a port of this host): %w", local, qemu.Host, err)
	}
	_, port, err := net.SplitHostPort(local)
	if err != nil {
		return "", err
	}
	if there.PeerCertificates[0].VerifyHostname(guest) == nil {
		return "https://" + net.JoinHostPort(guest, port), nil
	}
	for _, host := range others {
		addr := net.JoinHostPort(host, port)
		here, err := certificates(ctx, addr)
		if err == nil && here.PeerCertificates[0].VerifyHostname(host) == nil && sameAuthority(here, there) {
			return "https://" + addr, nil
		}
	}
	return "", fmt.Errorf("the coordinator at %s has no certificate for an address by which the machine reaches it: start it with --cert-name %s", local, guest)
}

func sameAuthority(a, b *tls.ConnectionState) bool {
	last := func(s *tls.ConnectionState) []byte { return s.PeerCertificates[len(s.PeerCertificates)-1].Raw }
	return bytes.Equal(last(a), last(b))
}

// certificates are what a server shows. Nothing is said to it, so nothing is believed either.
func certificates(ctx context.Context, addr string) (*tls.ConnectionState, error) {
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	state := c.(*tls.Conn).ConnectionState()
	return &state, nil
}
