package main

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// beInit is process 1 of the machine. It does not return.
func beInit() {
	if err := recordHere(); err != nil {
		fmt.Println("init:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func recordHere() error {
	for dir, kind := range map[string]string{"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs"} {
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	for range 200 { // a disk answers a moment after its driver was loaded
		if _, err := os.Stat("/dev/nvme0n1"); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	out, err := exec.Command("/deimos-agent", "probe", "--record", "/record").CombinedOutput()
	fmt.Printf("%s\n", out)
	if err != nil {
		return err
	}
	return send("/record")
}

func loadModules() error {
	files, err := os.ReadDir("/modules") // numbered in their order
	if err != nil {
		return err
	}
	for _, m := range files {
		f, err := os.Open(filepath.Join("/modules", m.Name()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", m.Name(), err)
		}
	}
	return nil
}

func send(dir string) error {
	var packed bytes.Buffer
	t := tar.NewWriter(&packed)
	if err := t.AddFS(os.DirFS(dir)); err != nil {
		return err
	}
	if err := t.Close(); err != nil {
		return err
	}
	fmt.Println(begin)
	for line := range slices.Chunk([]byte(base64.StdEncoding.EncodeToString(packed.Bytes())), 100) {
		fmt.Println(string(line))
	}
	fmt.Println(end)
	return nil
}

// unpack takes the record out of what the machine wrote to its console.
func unpack(console []byte, dir string) error {
	_, rest, ok := bytes.Cut(console, []byte(begin+"\n"))
	packed, _, whole := bytes.Cut(rest, []byte(end))
	if !ok || !whole {
		return errors.New("the machine sent no record")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	t := tar.NewReader(base64.NewDecoder(base64.StdEncoding, bytes.NewReader(packed)))
	for {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(filepath.Clean(h.Name), 0o755)
		case tar.TypeSymlink:
			if err = root.MkdirAll(filepath.Dir(h.Name), 0o755); err == nil {
				err = root.Symlink(h.Linkname, h.Name)
			}
		default:
			var raw []byte
			if raw, err = io.ReadAll(t); err == nil {
				if err = root.MkdirAll(filepath.Dir(h.Name), 0o755); err == nil {
					err = root.WriteFile(h.Name, raw, 0o644)
				}
			}
		}
		if err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
}
