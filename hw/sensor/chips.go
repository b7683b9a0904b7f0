package sensor

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"periph.io/x/conn/v3/i2c"
	"periph.io/x/conn/v3/onewire"
	"periph.io/x/conn/v3/physic"
	"periph.io/x/devices/v3/aht20"
	"periph.io/x/devices/v3/bh1750"
	"periph.io/x/devices/v3/bmxx80"
	"periph.io/x/devices/v3/ds18b20"
	"periph.io/x/devices/v3/ina219"
	"periph.io/x/devices/v3/mcp9808"
	"periph.io/x/devices/v3/scd4x"
	"periph.io/x/devices/v3/tmp102"

	"github.com/deimos-edge/deimos/hw"
)

// The drivers are those of periph.io/x/devices/v3 v3.7.4. What is said of them
// here was read in their source; page numbers are left out where the datasheet
// has only one place. None of their SenseContinuous is used: they start
// goroutines that outlive errors.

func percent(h physic.RelativeHumidity) float64 { return float64(h) / float64(physic.PercentRH) }
func pascal(p physic.Pressure) float64          { return float64(p) / float64(physic.Pascal) }

// openBMxx80: the driver waits for the chip in a loop without end or pause
// (isIdle280), which link ends, and divides by what a BMP180 sends, which turn
// catches. A chip that loses power between configuration and reading shows
// values from its reset state that look right; so its control register must
// afterwards be what was written.
func openBMxx80(l *link, d declared) (chip, error) {
	dev, err := bmxx80.NewI2C(i2cLink{l}, d.i2c, &bmxx80.DefaultOpts)
	if err != nil {
		return chip{}, err
	}
	old := strings.HasPrefix(dev.String(), "BMP180")
	return chip{read: func() (map[hw.SensorKind]float64, error) {
		var e physic.Env
		if err := dev.Sense(&e); err != nil {
			return nil, err
		}
		if !old {
			const control = 0xf4 // osrs_t, osrs_p; below them the mode, which is sleep again
			got, want := make([]byte, 1), byte(bmxx80.DefaultOpts.Temperature<<5|bmxx80.DefaultOpts.Pressure<<2)
			if err := (&i2c.Dev{Bus: i2cLink{l}, Addr: d.i2c}).Tx([]byte{control}, got); err != nil {
				return nil, err
			}
			if got[0] != want {
				return nil, errors.New("it lost its settings while it was read; check its power")
			}
		}
		raw := map[hw.SensorKind]float64{hw.Temperature: e.Temperature.Celsius(), hw.AirPressure: pascal(e.Pressure)}
		if strings.HasPrefix(dev.String(), "BME280") {
			raw[hw.Humidity] = percent(e.Humidity)
		}
		return raw, nil
	}}, nil
}

// openDS18B20: the driver's New writes the resolution it is given to the chip's
// EEPROM, and zeros to its alarm limits with it, if it is not the one that the
// chip has. So it is given that. Its Sense sleeps for a conversion that the bus
// has already waited for (see thermal), so LastTemp is used. That means to
// refuse 85 °C, which the chip shows until it has measured and when it had too
// little power to, but compares with 85 K; so it is refused here. Nine zeros,
// which a bus shows whose wire is shorted, have a valid checksum and would be 0 °C.
func openDS18B20(l *link, d declared) (chip, error) {
	memory := make([]byte, 9)
	if err := (&onewire.Dev{Bus: wireLink{l}, Addr: d.rom}).Tx([]byte{readMemory}, memory); err != nil {
		return chip{}, err
	}
	bits := 12
	if ds18b20.Family(d.rom&0xff) == ds18b20.DS18B20 && onewire.CheckCRC(memory) {
		switch config := memory[4]; {
		case config == 0:
			return chip{}, errors.New("the bus shows nothing but zeros; a wire is shorted to ground")
		case config&^0x60 != 0x1f: // fixed bits, datasheet, "Configuration Register"
			return chip{}, fmt.Errorf("its configuration is %#02x, which no DS18B20 has; it is another chip or a bad copy", config)
		default:
			bits = 9 + int(config>>5)
		}
	}
	if memory[7] == 0 && onewire.CheckCRC(memory) { // 0x10 in both chips
		return chip{}, errors.New("the bus shows nothing but zeros; a wire is shorted to ground")
	}
	dev, err := ds18b20.New(wireLink{l}, d.rom, bits)
	if err != nil {
		return chip{}, err
	}
	return chip{read: func() (map[hw.SensorKind]float64, error) {
		t, err := dev.LastTemp()
		if err == nil && t == physic.ZeroCelsius+85*physic.Kelvin {
			err = errors.New("it shows 85 °C, as before a measurement; its power or the pull-up resistor of 4.7 kΩ is too weak")
		}
		return map[hw.SensorKind]float64{hw.Temperature: t.Celsius()}, err
	}}, nil
}

// openTMP102: the driver takes a configuration that it could not read for zero
// and goes on; it reads extended mode, in which a count has one bit more, as
// half or twice the temperature; Halt is meant to shut the chip down and clears
// the bit that would. So the configuration is read and extended mode ended
// beforehand, and Halt is not called. A chip that was just switched on shows 0 °C
// until its first conversion has ended, at most 35 ms.
func openTMP102(l *link, d declared) (chip, error) {
	const configuration, extended = 0x01, 1 << 4 // EM, in the low byte
	dev := &i2c.Dev{Bus: i2cLink{l}, Addr: d.i2c}
	config := make([]byte, 2)
	if err := dev.Tx([]byte{configuration}, config); err != nil {
		return chip{}, err
	}
	if config[1]&extended != 0 {
		if err := dev.Tx([]byte{configuration, config[0], config[1] &^ extended}, nil); err != nil {
			return chip{}, err
		}
		time.Sleep(260 * time.Millisecond) // a conversion in the old format may be under way, at 4 Hz
	}
	tmp, err := tmp102.NewI2C(i2cLink{l}, d.i2c, nil)
	if err != nil {
		return chip{}, err
	}
	time.Sleep(40 * time.Millisecond)
	return chip{read: celsius(tmp)}, nil
}

// openMCP9808: the driver does not look what chip it talks to, and accelerometers
// share its addresses. Its first conversion takes 250 ms, before which it shows
// 0 °C. It is left converting, as after power-on.
func openMCP9808(l *link, d declared) (chip, error) {
	const manufacturer, microchip = 0x06, 0x0054
	id := make([]byte, 2)
	if err := (&i2c.Dev{Bus: i2cLink{l}, Addr: d.i2c}).Tx([]byte{manufacturer}, id); err != nil {
		return chip{}, err
	}
	if got := int(id[0])<<8 | int(id[1]); got != microchip {
		return chip{}, fmt.Errorf("the chip at 0x%02x is no MCP9808: its maker is %#04x, not %#04x; correct driver or address", d.i2c, got, microchip)
	}
	dev, err := mcp9808.New(i2cLink{l}, &mcp9808.Opts{Addr: int(d.i2c), Res: mcp9808.Maximum})
	if err != nil {
		return chip{}, err
	}
	time.Sleep(260 * time.Millisecond)
	return chip{read: celsius(dev)}, nil
}

// openAHT20: the driver has limits and a checksum. It sleeps between readings by
// itself.
func openAHT20(l *link, _ declared) (chip, error) {
	dev, err := aht20.NewI2C(i2cLink{l}, nil)
	if err != nil {
		return chip{}, err
	}
	return chip{read: func() (map[hw.SensorKind]float64, error) {
		var e physic.Env
		err := dev.Sense(&e)
		return map[hw.SensorKind]float64{hw.Temperature: e.Temperature.Celsius(), hw.Humidity: percent(e.Humidity)}, err
	}}, nil
}

// openSCD4x: the driver writes a command and reads its answer in one transfer;
// the datasheet (and the kernel's driver) have two, with the execution time of
// 1 ms between them. Its Sense waits for a value up to 6 s, whether the bus
// still answers or not; so that is asked beforehand. Between readings the chip
// goes on measuring every 5 s; Halt stops it.
func openSCD4x(l *link, d declared) (chip, error) {
	l.split = time.Millisecond
	dev, err := scd4x.NewI2C(i2cLink{l}, d.i2c)
	if err != nil {
		return chip{}, err
	}
	return chip{read: func() (map[hw.SensorKind]float64, error) {
		if err := waitSCD4x(l, d.i2c); err != nil {
			return nil, err
		}
		var e scd4x.Env
		if err := dev.Sense(&e); err != nil {
			return nil, err
		}
		return map[hw.SensorKind]float64{
			hw.CO2: float64(e.CO2), hw.Temperature: e.Temperature.Celsius(), hw.Humidity: percent(e.Humidity),
		}, nil
	}, rest: dev.Halt}, nil
}

// waitSCD4x waits until there is a value: get_data_ready_status, of which the
// lower 11 bits are 0 until then. A chip that lost its power since it was opened
// never has one.
func waitSCD4x(l *link, addr uint16) error {
	status := make([]byte, 3)
	for began := time.Now(); time.Since(began) < 6*time.Second; {
		if err := (&i2c.Dev{Bus: i2cLink{l}, Addr: addr}).Tx([]byte{0xe4, 0xb8}, status); err != nil {
			return err
		}
		if status[0]&7 != 0 || status[1] != 0 {
			return nil
		}
		if err := pause(l.ctx, 500*time.Millisecond); err != nil {
			return err
		}
	}
	return errors.New("it does not measure; it may have lost its power; it is started again")
}

// openINA219: the driver sets a range of 16 V, although the chip and the text on
// most modules have 26, and shows whatever is above as 16 V; the range is set
// again here. It then takes 137 ms (128 samples of both voltages) until there is
// a first value. The power is without sign, also while a battery is charged.
func openINA219(l *link, d declared) (chip, error) {
	o := ina219.Opts{Address: int(d.i2c)}
	if d.shunt > 0 {
		const most = 0.32 // V over the shunt
		o.SenseResistor = physic.ElectricResistance(math.Round(d.shunt * float64(physic.Ohm)))
		o.MaxCurrent = physic.ElectricCurrent(math.Round(most / d.shunt * float64(physic.Ampere)))
	}
	dev, err := ina219.New(i2cLink{l}, &o)
	if err != nil {
		return chip{}, err
	}
	// As the driver sets it, and bit 13: 32 V.
	if err := (&i2c.Dev{Bus: i2cLink{l}, Addr: d.i2c}).Tx([]byte{0x00, 0x3f, 0xff}, nil); err != nil {
		return chip{}, err
	}
	time.Sleep(150 * time.Millisecond)
	return chip{read: func() (map[hw.SensorKind]float64, error) {
		p, err := dev.Sense()
		return map[hw.SensorKind]float64{
			hw.Voltage:   float64(p.Voltage) / float64(physic.Volt),
			hw.Current:   float64(p.Current) / float64(physic.Ampere),
			hw.PowerDraw: float64(p.Power) / float64(physic.Watt),
		}, err
	}}, nil
}

// openBH1750: the driver writes the command "reset" where it means to switch the
// chip on or off; on does not matter (the datasheet allows to leave it out), off
// is written here. It gives the chip 140 ms for a measurement that takes up to
// 180, and would show what was measured before, or 0 lx after power-on; so the
// measurement that opening begins is waited for.
func openBH1750(l *link, d declared) (chip, error) {
	dev, err := bh1750.NewI2C(i2cLink{l}, d.i2c)
	if err != nil {
		return chip{}, err
	}
	time.Sleep(180 * time.Millisecond)
	return chip{
		read: func() (map[hw.SensorKind]float64, error) {
			v, err := dev.Sense()
			return map[hw.SensorKind]float64{hw.Illuminance: float64(v) / float64(physic.Lumen)}, err
		},
		rest: func() error {
			return (&i2c.Dev{Bus: i2cLink{l}, Addr: d.i2c}).Tx([]byte{byte(bh1750.PowerDown)}, nil)
		},
	}, nil
}

// celsius reads a thermometer.
func celsius(dev interface{ Sense(*physic.Env) error }) func() (map[hw.SensorKind]float64, error) {
	return func() (map[hw.SensorKind]float64, error) {
		var e physic.Env
		err := dev.Sense(&e)
		return map[hw.SensorKind]float64{hw.Temperature: e.Temperature.Celsius()}, err
	}
}
