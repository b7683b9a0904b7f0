// Package qemu runs the image of a device as a virtual machine: arm64 (QEMU's
// virt, with a device tree), UEFI, two cores, 512 MiB, in software alone, so that
// it runs the same on any machine with QEMU.
//
// # The machine
//
//	firmware   EDK2 (Debian: qemu-efi-aarch64)
//	disks      as [Options] has them; the first one with an EFI system partition boots
//	network    QEMU's own, unless asked for another: the machine reaches this
//	           host's loopback as 10.0.2.2 ([Host]), and nobody reaches the machine
//	watchdog   i6300esb, which starts the machine anew
//	console    the serial line
//	random     this host's
//
// A machine started with [Start] ends with this process, whatever becomes of
// either. [Machine.Kill] is a power cut of the machine, but not of its disks:
// what it has written is there, synced or not.
package qemu

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/internal/proc"
)

// Host is how a machine calls the host that it runs on.
const Host = "10.0.2.2"

// Options is what a machine is made of.
type Options struct {
	Disks  []Disk
	Config string // file that the machine finds as its configuration; see packaging/init
	Net    string // QEMU's -netdev without its id; "" for "user"
	MAC    string // "" for QEMU's; machines on one network need different ones
	Serial string // of SMBIOS; "" for none

	// Counted has the machine's clock count instructions, 2 ns each, and follow this
	// host's while the machine is idle: what a process of the machine used of its
	// time is what it did, however busy this host is. One thread of this host runs
	// both cores. While the machine is busy its clock may fall behind this host's.
	Counted bool
}

// Disk is one disk.
type Disk struct {
	File string // raw image, written to; or
	NBD  string // socket of a server of the Network Block Device protocol
	NVMe bool   // else virtio
}

// Machine is one that was started.
type Machine struct {
	Console string // file with what the machine wrote to its console

	dir  string
	proc *proc.Process
}

// Find tells whether this host can run machines, and with which firmware.
func Find() (firmware string, err error) {
	if _, err := exec.LookPath("qemu-system-aarch64"); err != nil {
		return "", fmt.Errorf("QEMU for arm64 is missing (Debian: apt-get install qemu-system-arm): %w", err)
	}
	for _, f := range []string{"/usr/share/qemu-efi-aarch64/QEMU_EFI.fd", "/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/edk2/aarch64/QEMU_EFI.fd"} {
		if _, err := os.Stat(f); err == nil {
			return f, nil
		}
	}
	return "", errors.New("UEFI for arm64 machines is missing (Debian: apt-get install qemu-efi-aarch64)")
}

// Command is the program and its arguments that run a machine, with its console
// as QEMU's -serial has it.
func Command(o Options, serial string) ([]string, error) {
	firmware, err := Find()
	if err != nil {
		return nil, err
	}
	accel := []string{"-accel", "tcg,thread=multi"}
	if o.Counted {
		accel = []string{"-accel", "tcg,thread=single", "-icount", "shift=1,sleep=on"}
	}
	args := []string{"qemu-system-aarch64",
		"-M", "virt,acpi=off", "-cpu", "cortex-a57", "-smp", "2", "-m", "512",
		"-bios", firmware, "-display", "none", "-serial", serial,
		"-netdev", cmp.Or(o.Net, "user") + ",id=net", "-device", "virtio-net-pci,netdev=net,romfile=" + prefixed(",mac=", o.MAC),
		"-device", "i6300esb", "-device", "virtio-rng-pci",
	}
	args = append(args, accel...)
	if o.Serial != "" {
		args = append(args, "-smbios", "type=1,serial="+quote(o.Serial))
	}
	if o.Config != "" {
		args = append(args, "-fw_cfg", "name=opt/deimos/config,file="+quote(o.Config))
	}
	for i, d := range o.Disks {
		node := fmt.Sprintf("disk%d", i)
		// What the machine syncs goes to the file, and no further: this host is not the one that loses its power.
		drive := "driver=raw,node-name=" + node + ",cache.no-flush=on,discard=unmap,file.driver=file,file.filename=" + quote(d.File)
		if d.NBD != "" {
			drive = "driver=nbd,node-name=" + node + ",discard=unmap,server.type=unix,server.path=" + quote(d.NBD)
		}
		device := "virtio-blk-pci,drive=" + node
		if d.NVMe {
			device = fmt.Sprintf("nvme,drive=%s,serial=DEIMOS-%d", node, i)
		}
		args = append(args, "-blockdev", drive, "-device", device)
	}
	return args, nil
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

// quote doubles the commas, which separate QEMU's options.
func quote(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// CopyDisk makes a disk of size bytes that begins with an image. Zeros become
// holes, so that it takes no more room than its content.
func CopyDisk(image, disk string, size int64) error {
	in, err := os.Open(image)
	if err != nil {
		return fmt.Errorf("the image cannot be read (make image): %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(disk, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(copySparse(out, in), out.Truncate(size), out.Close())
}

func copySparse(out io.WriterAt, in io.Reader) error {
	buf, zeros := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); ; {
		n, err := io.ReadFull(in, buf)
		if !bytes.Equal(buf[:n], zeros[:n]) {
			if _, err := out.WriteAt(buf[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// Start starts a machine. dir is an empty folder for its console and sockets, and must
// have a short path. ctx bounds the start, not the machine's life.
func Start(ctx context.Context, starter *proc.Starter, dir string, o Options) (*Machine, error) {
	m := &Machine{dir: dir, Console: filepath.Join(dir, "console.log")}
	argv, err := Command(o, "file:"+quote(m.Console))
	if err != nil {
		return nil, err
	}
	argv = append(argv, "-qmp", "unix:"+quote(m.qmp())+",server=on,wait=off")
	m.proc, err = starter.Start(ctx, proc.Command{Name: "qemu", Argv: argv, Log: filepath.Join(dir, "qemu.log")})
	if err != nil {
		return nil, err
	}
	for { // the socket is there when QEMU has understood its arguments
		if _, err := os.Stat(m.qmp()); err == nil {
			return m, nil
		}
		select {
		case <-m.proc.Done():
			return nil, fmt.Errorf("QEMU ended: %s", m.proc.LastWords())
		case <-ctx.Done():
			m.Kill()
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (m *Machine) qmp() string { return filepath.Join(m.dir, "qmp") }

// PID is QEMU's.
func (m *Machine) PID() int { return m.proc.PID() }

// Done is closed when the machine has ended.
func (m *Machine) Done() <-chan struct{} { return m.proc.Done() }

// LastWords is the last line that QEMU itself wrote.
func (m *Machine) LastWords() string { return m.proc.LastWords() }

// Kill is a power cut.
func (m *Machine) Kill() { m.proc.Kill() }

// PowerOff presses the power button and waits until the machine is off.
func (m *Machine) PowerOff(ctx context.Context) error {
	if _, err := m.monitor(ctx, "system_powerdown"); err != nil {
		return err
	}
	select {
	case <-m.proc.Done():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the machine does not switch off: %w", context.Cause(ctx))
	}
}

// Reset presses the reset button.
func (m *Machine) Reset(ctx context.Context) error {
	_, err := m.monitor(ctx, "system_reset")
	return err
}

// Written is what the machine has written to a disk since it started.
type Written struct {
	Writes, Flushes int64
	Bytes           int64
}

// Written tells it of each disk, in the order of [Options].
func (m *Machine) Written(ctx context.Context) ([]Written, error) {
	raw, err := m.monitor(ctx, "query-blockstats")
	if err != nil {
		return nil, err
	}
	var devices []struct {
		Node  string `json:"node-name"`
		Stats struct {
			Writes  int64 `json:"wr_operations"`
			Flushes int64 `json:"flush_operations"`
			Bytes   int64 `json:"wr_bytes"`
		}
	}
	if err := json.Unmarshal(raw, &devices); err != nil {
		return nil, fmt.Errorf("QEMU's statistics of its disks: %w", err)
	}
	var all []Written
	for _, d := range devices {
		if strings.HasPrefix(d.Node, "disk") {
			all = append(all, Written(d.Stats))
		}
	}
	return all, nil
}

// monitor gives QEMU an order and returns its answer (QEMU Machine Protocol).
func (m *Machine) monitor(ctx context.Context, command string) (json.RawMessage, error) {
	c, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "unix", m.qmp())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	d := json.NewDecoder(c)
	var greeting json.RawMessage
	if err := d.Decode(&greeting); err != nil {
		return nil, err
	}
	var last json.RawMessage
	for _, name := range []string{"qmp_capabilities", command} {
		if _, err := fmt.Fprintf(c, `{"execute":%q}`+"\n", name); err != nil {
			return nil, err
		}
		for answered := false; !answered; {
			var answer struct {
				Event, Return json.RawMessage
				Error         *struct{ Desc string }
			}
			if err := d.Decode(&answer); err != nil {
				return nil, err
			}
			if answer.Error != nil {
				return nil, fmt.Errorf("QEMU refuses %s: %s", name, answer.Error.Desc)
			}
			last, answered = answer.Return, answer.Return != nil
		}
	}
	return last, nil
}

// Said is what the machine wrote to its console so far, without the carriage returns.
func (m *Machine) Said() string {
	raw, _ := os.ReadFile(m.Console)
	return strings.ReplaceAll(string(raw), "\r", "")
}

// Await waits until the machine has said text for the n-th time, and returns the
// line. It fails when the machine ends before, or ctx does.
func (m *Machine) Await(ctx context.Context, text string, n int) (string, error) {
	for ended := false; ; {
		found := 0
		for line := range strings.Lines(m.Said()) {
			if strings.Contains(line, text) && strings.HasSuffix(line, "\n") {
				if found++; found == n {
					return strings.TrimSpace(line), nil
				}
			}
		}
		if ended {
			return "", fmt.Errorf("the machine ended without %q; QEMU: %s", text, m.proc.LastWords())
		}
		select {
		case <-m.proc.Done():
			ended = true // look once more
		case <-ctx.Done():
			return "", fmt.Errorf("the machine did not say %q in time: %w", text, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
