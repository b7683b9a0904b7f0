package hw

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// clocks reads the real-time clocks (Documentation/ABI/testing/sysfs-class-rtc).
// One on an I²C bus can hang with its bus, so each is waited for on its own.
func (p *prober) clocks(ctx context.Context) (func(*Inventory), notes) {
	var missing notes
	found := []Clock{}
	for _, name := range p.list("sys/class/rtc") {
		type reading struct {
			clock   Clock
			missing notes
		}
		r, err := within(ctx, p.limit, p.root+" clock "+name, func() reading {
			c, missing := readClock(p.tree, name)
			return reading{c, missing}
		})
		if err != nil {
			code, text := reason(err)
			missing.add("clocks", code, clean(name), text)
			continue
		}
		found = append(found, r.clock)
		missing = append(missing, r.missing...)
	}
	return func(inv *Inventory) { inv.Clocks = found }, missing
}

func readClock(t tree, name string) (Clock, notes) {
	var missing notes
	dir := "sys/class/rtc/" + name
	// "rtc-ds1307 1-0068": the driver, then the device that it drives.
	driver, _, _ := strings.Cut(t.word(dir+"/name"), " ")
	c := Clock{Name: clean(name), Driver: driver, System: t.flag(dir + "/hctosys")}
	date, err := t.text(dir + "/date")
	if err != nil {
		code, text := reason(err)
		missing.add("clocks", code, c.Name, "its time: "+text)
		return c, missing
	}
	year, _, _ := strings.Cut(date, "-")
	y, err := strconv.Atoi(year)
	if err != nil || y < 1900 || y > 2500 { // 1900 and 2000 are where chips begin, and what they count to is less than 400 years off
		missing.add("clocks", NoteImplausible, c.Name, fmt.Sprintf("shows the date %.20q, which is not plausible and was dropped", date))
		return c, missing
	}
	c.Year = y
	return c, missing
}
