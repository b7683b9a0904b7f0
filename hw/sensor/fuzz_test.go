package sensor

import (
	"errors"
	"testing"
	"testing/synctest"

	"periph.io/x/conn/v3/onewire"
	"periph.io/x/conn/v3/physic"
)

// speed is the part of an I²C bus that nobody may use.
type speed struct{}

func (speed) SetSpeed(physic.Frequency) error { return errors.New("not for drivers") }

// noise is a bus that sends the bytes of a fuzzer, over and over, and now and
// then an error.
type noise struct {
	speed
	bytes []byte
	at    int
}

func (n *noise) String() string { return "noise" }
func (n *noise) Close() error   { return nil }
func (n *noise) next() byte {
	if len(n.bytes) == 0 {
		return 0xff
	}
	n.at++
	return n.bytes[(n.at-1)%len(n.bytes)]
}

func (n *noise) Tx(_ uint16, w, r []byte) error {
	for i := range r {
		r[i] = n.next()
	}
	if len(r) > 0 && n.next() == 0xee {
		return errors.New("noise")
	}
	return nil
}

type wireNoise struct{ *noise }

func (n wireNoise) Search(bool) ([]onewire.Address, error) { return nil, nil }
func (n wireNoise) Tx(w, r []byte, _ onewire.Pullup) error {
	if err := n.noise.Tx(0, w, r); err != nil {
		return err
	}
	if len(r) == 9 { // or no driver gets past the checksum
		r[8] = onewire.CalcCRC(r[:8])
	}
	return nil
}

// Whatever a bus sends: no panic, an end, and only believable values.
func FuzzDriversBearAnyBytes(f *testing.F) {
	for i := range drivers {
		f.Add(byte(i), []byte{0x55, 1, 2, 3})
		f.Add(byte(i), []byte{0x60, 0, 0, 0})
		f.Add(byte(i), []byte{0x58})
		f.Add(byte(i), []byte{0, 0x54, 0x18})
		f.Add(byte(i), []byte{})
		f.Add(byte(i), append([]byte{0x55, 0}, make180()...))
		f.Add(byte(i), []byte{0xe0, 0x01, 0x00, 0x00, 0x3f, 0xff, 0x10, 0x10, 0x3f, 0x00})
	}
	f.Fuzz(func(t *testing.T, which byte, sent []byte) {
		d := drivers[int(which)%len(drivers)]
		synctest.Test(t, func(t *testing.T) {
			n := &noise{bytes: sent}
			r := readOne(t, anyBus{i2cBus: n, wire: wireNoise{n}}, playedSensor(d.Name))
			if len(r.Values) == 0 && r.Err == nil {
				t.Error("neither value nor error")
			}
			for _, v := range r.Values {
				if m := plausible[v.Kind]; !(v.Value >= m.min && v.Value <= m.max) {
					t.Errorf("%s: %v", v.Kind, v.Value)
				}
			}
		})
	})
}

func FuzzAddresses(f *testing.F) {
	for _, s := range []string{"", "0x76", "118", "0X7", "28-0000075565ad", "28-0000075565a", "0x", "10-FFFFFFFFFFFF", "\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if rom, err := parseROM(s); err == nil {
			if again, err := parseROM(romText(rom)); err != nil || again != rom {
				t.Errorf("%q is %#x and then %#x, %v", s, rom, again, err)
			}
		}
		for _, d := range drivers {
			if d.Bus != I2C {
				continue
			}
			a, err := d.parseAddress(s)
			if err == nil && (a < 0x08 || a > 0x77) { // the others are reserved (UM10204, 3.1.12)
				t.Errorf("%s: %q is %#x", d.Name, s, a)
			}
		}
	})
}

func FuzzMemoryOfThermometers(f *testing.F) {
	f.Add([]byte("e0 01 00 00 3f ff 10 10 3f : crc=3f YES\n"))
	f.Add([]byte(" :"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if m, err := parseMemory(raw); err == nil && len(m) != 9 {
			t.Errorf("%q has %d bytes", raw, len(m))
		}
	})
}
