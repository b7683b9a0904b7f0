package sensor

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/i2c"
	"periph.io/x/conn/v3/onewire"
	"periph.io/x/conn/v3/physic"
	"periph.io/x/host/v3/sysfs"
)

const (
	turnWait  = 30 * time.Second        // for other readings on the bus to end
	stopGrace = 1500 * time.Millisecond // for a reading to end when its set stops
	restLimit = time.Second             // for leaving a chip as it should be
	transfers = 2000                    // in one reading; a driver that needs more waits for something that never comes
)

// machine opens buses, by the names that have passed the check of a declaration.
type machine interface {
	i2c(name string) (i2c.BusCloser, error)
	oneWire(name string) (onewire.BusCloser, error)
}

// kernel is the machine below root: "/" but for tests.
//
// I²C buses are opened with periph's driver but not through its registry, which
// is filled once in the life of a process and so never knows a bus that comes
// later, and which starts the drivers of all other periph buses with it.
//
// 1-wire goes through the kernel's own driver of these chips (w1_therm), not
// through periph's netlink bus. That one waits for the kernel's answer without
// any limit, in a receive that cannot be broken off; takes the answer to a
// request that failed for the answer to the next one; has no strong pull-up,
// which chips on two wires need; and would talk to a chip that w1_therm, which
// the kernel loads by itself, is talking to (periph.io/x/host/v3@v3.8.5/netlink).
type kernel struct{ root string }

func (k kernel) i2c(name string) (i2c.BusCloser, error) {
	n, err := strconv.Atoi(strings.TrimPrefix(name, "/dev/i2c-"))
	if err != nil {
		return nil, err
	}
	// Asked first, because periph's error does not say which it is.
	switch err := unix.Access(filepath.Join(k.root, name), unix.R_OK|unix.W_OK); {
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("there is no bus %s; load the module i2c-dev, switch I²C on in the board's firmware configuration, or correct the name (\"deimos-agent probe\" lists the buses)", name)
	case err != nil:
		return nil, fmt.Errorf("%s may not be used: %w; run as root, or add the user to the group that owns it", name, err)
	}
	return sysfs.NewI2C(n)
}

func (k kernel) oneWire(name string) (onewire.BusCloser, error) {
	dir := filepath.Join(k.root, "sys/bus/w1/devices", name)
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("there is no bus %s; load the module w1-gpio or the board's device tree overlay for 1-wire, or correct the name (\"deimos-agent probe\" lists the buses)", name)
	}
	return &thermal{dir: dir}, nil
}

// thermal is a 1-wire bus with thermometers, as the kernel's driver w1_therm
// shows it (Documentation/w1/slaves/w1_therm.rst): reading a chip's file makes
// it measure, which takes up to 0.75 s, and shows its memory. So it can do one
// thing: read the memory. In particular it writes nothing.
type thermal struct {
	dir    string
	memory map[onewire.Address][]byte // once read; a bus is open for one reading
}

func (t *thermal) String() string { return filepath.Base(t.dir) }
func (t *thermal) Close() error   { return nil }

func (t *thermal) Search(bool) ([]onewire.Address, error) {
	return nil, errors.New("the kernel searches this bus itself")
}

const readMemory = 0xbe

// Tx serves "match ROM, read memory".
func (t *thermal) Tx(w, r []byte, _ onewire.Pullup) error {
	if len(w) != 10 || w[0] != 0x55 || w[9] != readMemory {
		return fmt.Errorf("the kernel's driver of 1-wire thermometers cannot send % x", w)
	}
	var rom onewire.Address
	for i, b := range w[1:9] {
		rom |= onewire.Address(b) << (8 * i)
	}
	if t.memory[rom] == nil {
		raw, err := t.measure(romText(rom))
		if err != nil {
			return err
		}
		t.memory = map[onewire.Address][]byte{rom: raw}
	}
	copy(r, t.memory[rom])
	return nil
}

func (t *thermal) measure(device string) ([]byte, error) {
	if _, err := os.Stat(filepath.Join(t.dir, device)); err != nil {
		return nil, fmt.Errorf("%s is not on the bus; check its wiring, the pull-up resistor of 4.7 kΩ and its address (\"deimos-agent probe\" lists those that are)", device)
	}
	f, err := os.Open(filepath.Join(t.dir, device, "w1_slave"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the kernel has no driver for %s; load the module w1_therm", device)
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return nil, fmt.Errorf("the kernel could not read %s (%w); check its wiring and the pull-up resistor of 4.7 kΩ", device, err)
	}
	return parseMemory(raw)
}

// parseMemory reads the first line of w1_slave: nine bytes, then what the
// kernel thinks of their checksum, which the driver computes itself.
//
//	72 01 4b 46 7f ff 0e 10 57 : crc=57 YES
func parseMemory(raw []byte) ([]byte, error) {
	text, _, found := bytes.Cut(raw, []byte(" :"))
	memory, err := hex.DecodeString(strings.ReplaceAll(string(text), " ", ""))
	if !found || err != nil || len(memory) != 9 {
		return nil, errors.New("the kernel's file of the chip is not in its documented form; the kernel is too old or has another driver")
	}
	return memory, nil
}

// bus is shared by the sensors on it.
type bus struct {
	name string
	turn chan struct{} // holds one: whose turn it is; given back when the reading has really ended

	mu    sync.Mutex
	stuck string // the sensor whose reading was given up on and has not come back
}

func newBus(name string) *bus { return &bus{name: name, turn: make(chan struct{}, 1)} }

// use runs work when it is who's turn, and waits for it until limit has passed.
// When ctx ends, work is given a moment more. After that the bus is stuck until
// work does return; its result then goes to late. Within work ctx ends with the limit.
func (b *bus) use(ctx context.Context, who string, limit time.Duration, work func(context.Context) outcome, late func(outcome)) outcome {
	if err := b.wait(ctx); err != nil {
		return outcome{err: err}
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	done := make(chan outcome, 1)
	finished, abandoned := false, false // guarded by mu
	go func() {
		defer cancel()
		o := work(limited)
		b.mu.Lock()
		finished = true
		b.mu.Unlock()
		if abandoned { // is not written again
			late(o)
			b.mu.Lock()
			b.stuck = ""
			b.mu.Unlock()
		}
		done <- o
		<-b.turn
	}()
	select {
	case o := <-done:
		return o
	case <-limited.Done():
	}
	// A driver that only sleeps ends by itself: its next transfer is refused.
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case o := <-done:
		return o
	case <-grace.C:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if finished {
		return <-done
	}
	abandoned, b.stuck = true, who
	return outcome{err: fmt.Errorf("it did not answer within %v and holds up the bus %s; if this stays so, take it off the bus and restart the machine", limit, b.name)}
}

// wait takes the turn.
func (b *bus) wait(ctx context.Context) error {
	b.mu.Lock()
	stuck := b.stuck
	b.mu.Unlock()
	if stuck != "" {
		return b.held(stuck)
	}
	limit := time.NewTimer(turnWait)
	defer limit.Stop()
	select {
	case b.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-limit.C:
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.held(b.stuck)
	}
}

func (b *bus) held(who string) error {
	if who == "" {
		return fmt.Errorf("the bus %s was busy for %v; have the sensors on it read less often", b.name, turnWait)
	}
	return fmt.Errorf("the bus %s is held up by a reading of sensor %q that does not end; take that one off the bus and restart the machine", b.name, who)
}

// link is a sensor's connection to its bus, as its driver sees it. It refuses
// transfers after the end of a reading, which ends drivers that wait in a loop
// for a chip to become ready, and too many of them within one. It remembers why
// a transfer failed, since many drivers do not pass that on. It is used by one
// goroutine at a time.
type link struct {
	ctx   context.Context // of the reading under way
	left  int             // transfers that the reading may still do
	err   error           // the first of a transfer of this reading
	wire  onewire.Bus     // one of wire and i2c
	i2c   i2c.Bus
	split time.Duration // a transfer that writes and reads is two, so far apart; 0: it is one
}

func (l *link) begin(ctx context.Context) { l.ctx, l.left, l.err = ctx, transfers, nil }

func (l *link) transfer(do func() error) error {
	err := l.ctx.Err()
	switch l.left--; {
	case err != nil:
		err = errors.New("it took too long; check its wiring and power")
	case l.left < 0:
		err = errors.New("it answers but never becomes ready; switch its power off and on")
	default:
		err = do()
	}
	if l.err == nil {
		l.err = err
	}
	return err
}

// i2cLink is a link as an I²C bus.
type i2cLink struct{ *link }

func (l i2cLink) String() string                    { return l.i2c.String() }
func (l i2cLink) SetSpeed(f physic.Frequency) error { return errors.New("the bus keeps its speed") }

func (l i2cLink) Tx(addr uint16, w, r []byte) error {
	if l.split == 0 || len(w) == 0 || len(r) == 0 {
		return l.transfer(func() error { return l.i2c.Tx(addr, w, r) })
	}
	if err := l.transfer(func() error { return l.i2c.Tx(addr, w, nil) }); err != nil {
		return err
	}
	time.Sleep(l.split)
	return l.transfer(func() error { return l.i2c.Tx(addr, nil, r) })
}

// wireLink is a link as a 1-wire bus.
type wireLink struct{ *link }

func (l wireLink) String() string                             { return l.wire.String() }
func (l wireLink) Search(all bool) ([]onewire.Address, error) { return l.wire.Search(all) }

func (l wireLink) Tx(w, r []byte, p onewire.Pullup) error {
	return l.transfer(func() error { return l.wire.Tx(w, r, p) })
}
