package hw

import "context"

// cardReset is WDIOF_CARDRESET of <linux/watchdog.h>: the last boot was the watchdog's doing.
const cardReset = 0x20

// watchdogs reads what the kernel knows of watchdogs
// (Documentation/ABI/testing/sysfs-class-watchdog). The devices themselves are not
// opened: that alone arms them.
func (p *prober) watchdogs(context.Context) (func(*Inventory), notes) {
	var missing notes
	found := []Watchdog{}
	for _, name := range p.list("sys/class/watchdog") {
		dir := "sys/class/watchdog/" + name
		w := Watchdog{
			Name:      clean(name),
			Identity:  p.word(dir + "/identity"),
			Active:    p.word(dir+"/state") == "active",
			FiredLast: p.count(dir+"/bootstatus")&cardReset != 0,
			Access:    p.access("dev/" + name),
		}
		switch seconds, err := p.integer(dir + "/timeout"); {
		case err != nil:
			missing.add("watchdogs", NoteUnsupported, w.Name, "the kernel does not say what it is and whether it is fed (it was built without CONFIG_WATCHDOG_SYSFS)")
		case seconds < 0 || seconds > 1<<31/1000: // the kernel counts milliseconds in 32 bits
			missing.add("watchdogs", NoteImplausible, w.Name, "its timeout is not plausible and was dropped")
		default:
			w.Timeout = int(seconds)
		}
		missing.access("watchdogs", w.Name, w.Access)
		found = append(found, w)
	}
	return func(inv *Inventory) { inv.Watchdogs = found }, missing
}
