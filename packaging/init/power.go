package main

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of struct input_event (linux/input.h): two longs of time, then type, code and value.
const (
	eventSize = int(2*unsafe.Sizeof(uintptr(0))) + 8
	typeKey   = 1
	keyPower  = 116
	pressed   = 1
)

// watchPower sends once the power button is pressed, ACPI's or one on a GPIO: both
// are keys of an input device. It looks at the devices that are there when it is called.
func watchPower(dev string, press func(), log *slog.Logger) {
	nodes, _ := filepath.Glob(filepath.Join(dev, "input/event*"))
	for _, node := range nodes {
		f, err := os.OpenFile(node, os.O_RDONLY, 0)
		if err != nil {
			continue
		}
		go guard(log, "power button", func() { // ends with the device, or the machine
			defer f.Close()
			if readPower(f) {
				press()
			}
		})
	}
}

// readPower returns true at the first press, false when r ends.
func readPower(r io.Reader) bool {
	raw := make([]byte, eventSize)
	for {
		if _, err := io.ReadFull(r, raw); err != nil {
			return false
		}
		e := raw[eventSize-8:]
		if binary.NativeEndian.Uint16(e) == typeKey && binary.NativeEndian.Uint16(e[2:]) == keyPower && binary.NativeEndian.Uint32(e[4:]) == pressed {
			return true
		}
	}
}

// killAll ends every other process, those that hold a file on the data partition.
func killAll(ctx context.Context, own int, proc string) {
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if !signalAll(s, own, proc) {
			return
		}
		for range 20 {
			if !signalAll(0, own, proc) || !sleep(ctx, killWait/20) {
				break
			}
		}
	}
}

// signalAll tells whether there is anybody. Kernel threads, which have no command
// line, are not meant.
func signalAll(s unix.Signal, own int, proc string) (any bool) {
	dirs, _ := os.ReadDir(proc)
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == own {
			continue
		}
		if line, err := os.ReadFile(filepath.Join(proc, d.Name(), "cmdline")); err != nil || len(line) == 0 {
			continue
		}
		any = unix.Kill(pid, s) == nil || any
	}
	return any
}
