package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

// healthText is one cell: the worst that is wrong with a device, and how much
// more there is.
func healthText(d api.Device) string {
	all := d.Troubles()
	switch n := len(all) + d.HealthMore; {
	case d.State == api.DeviceRetired || d.State == api.DevicePending:
		return "-"
	case n > 1:
		return fmt.Sprintf("%s +%d", cell(api.Brief(all[0])), n-1)
	case n == 1:
		return cell(api.Brief(all[0]))
	case d.HealthAt.IsZero():
		return "-"
	}
	return "ok"
}

// cell is somebody else's text, which must not make columns or lines of its own.
func cell(s string) string { return oneCell.Replace(s) }

// writeHealth tells a person what is wrong with a device, and what to do first.
func writeHealth(w io.Writer, d api.Device) {
	all := d.Troubles()
	if len(all) == 0 {
		if !d.HealthAt.IsZero() {
			fmt.Fprintf(w, "%-12s ok, by its word of %s\n", "health", cli.Ago(d.HealthAt))
		}
		return
	}
	for i, v := range all {
		name := ""
		if i == 0 {
			name = "health"
		}
		since := ""
		if !v.Since.IsZero() {
			since = ", since " + v.Since.UTC().Format(time.RFC3339)
		}
		fmt.Fprintf(w, "%-12s %s: %s%s\n", name, v.Severity, cell(api.Brief(v)), since)
		for _, l := range cli.Wrap(cell(v.Text), 86) {
			fmt.Fprintf(w, "%-12s   %s\n", "", l)
		}
	}
}

// writeScrubs shows what a device has verified of what it holds.
func writeScrubs(row func(name, format string, args ...any), d api.Device) {
	for i, x := range d.Scrubs {
		name := ""
		if i == 0 {
			name = "verified"
		}
		s := "not yet as a whole"
		if !x.Verified.IsZero() {
			s = "as a whole " + cli.Ago(x.Verified)
		}
		s += fmt.Sprintf("; %.0f%% of this round, begun %s, to end by %s", 100*x.Share, cli.Ago(x.Began), x.Ends.UTC().Format(time.DateOnly))
		if x.Lost > 0 {
			s += fmt.Sprintf("; %d chunks lost", x.Lost)
		}
		if x.Late {
			s += "; late"
		}
		if x.Problem != "" {
			s += ": " + cell(x.Problem)
		}
		row(name, "%s", cell(x.Dir)+": "+s)
	}
}

// writeNow shows how a device feels, by its last heartbeat. What cannot be read
// is left out: it is of a newer agent, or of one that is not ours.
func writeNow(row func(name, format string, args ...any), d api.Device) {
	var t hw.Telemetry
	if len(d.Telemetry) == 0 || json.Unmarshal(d.Telemetry, &t) != nil {
		return
	}
	var load []string
	for _, v := range []*float64{t.Load1, t.Load5, t.Load15} {
		if v != nil {
			load = append(load, fmt.Sprintf("%.2f", *v))
		}
	}
	if t.CPUPercent != nil {
		row("processor", "%.0f%% busy", *t.CPUPercent)
	}
	row("load", "%s", strings.Join(load, " "))
	if t.MemoryTotal > 0 {
		row("memory", "%s of %s used", size(t.MemoryUsed), size(t.MemoryTotal))
	}
	row("temperature", "%s", temperatures(t))
	if h := t.Throttling; h != nil {
		switch {
		case h.UnderVoltage != nil && *h.UnderVoltage:
			row("power", "the supply is too weak")
		case h.Now != nil && *h.Now:
			row("power", "the processor is held below its speed")
		}
	}
	for i, name := range someKeys(t.Disks) {
		v, label := t.Disks[name], ""
		if i == 0 {
			label = "disks"
		}
		var parts []string
		for _, p := range []struct {
			what string
			ms   *float64
		}{{"reads", v.ReadMS}, {"writes", v.WriteMS}, {"flushes", v.FlushMS}} {
			if p.ms != nil {
				parts = append(parts, fmt.Sprintf("%s %.1f ms", p.what, *p.ms))
			}
		}
		if v.Busy != nil {
			parts = append(parts, fmt.Sprintf("busy %.0f%%", *v.Busy))
		}
		parts = append(parts, size(v.WrittenBytes)+" written since boot")
		row(label, "%s", cell(name)+": "+strings.Join(parts, ", "))
	}
	row("agent uses", "%s of memory, %s written since it started", size(t.Agent.Anonymous), size(t.Agent.Written))
}

// maxShown bounds lists that a device makes up.
const maxShown = 16

func someKeys[V any](m map[string]V) []string {
	keys := slices.Sorted(maps.Keys(m))
	return keys[:min(len(keys), maxShown)]
}

// temperatures is the hottest first.
func temperatures(t hw.Telemetry) string {
	keys := slices.SortedFunc(maps.Keys(t.Temperatures), func(a, b string) int {
		return cmp.Or(cmp.Compare(t.Temperatures[b], t.Temperatures[a]), cmp.Compare(a, b))
	})
	var parts []string
	for _, k := range keys[:min(len(keys), maxShown)] {
		parts = append(parts, fmt.Sprintf("%s %.0f °C", cell(k), t.Temperatures[k]))
	}
	return strings.Join(parts, ", ")
}

func size(n uint64) string { return cli.Bytes(int64(min(n, 1<<62))) }

// writeInventory shows what a device has found in itself.
func writeInventory(w io.Writer, d api.Device) error {
	if d.InventoryProblem != "" {
		fmt.Fprintf(w, "\nIts newest inventory was not taken: %s.\n", strings.TrimRight(cell(d.InventoryProblem), "."))
	}
	if len(d.Inventory) == 0 {
		return nil
	}
	inv, err := inventoryOf(d.Inventory)
	if err != nil {
		_, err = fmt.Fprintf(w, "\nIts inventory cannot be shown as a table: %v. \"deimos device inventory %s -o json\" prints it as it is.\n", err, d.ID)
		return err
	}
	when := "as it came with the enrolment"
	if !d.InventoryTaken.IsZero() {
		when = "signed by the device, taken in " + cli.Ago(d.InventoryTaken)
	}
	fmt.Fprintf(w, "\ninventory, %s:\n", when)
	return hw.WriteTable(w, inv)
}

// inventoryOf reads an inventory. Its texts are a device's: none may make a line.
func inventoryOf(raw json.RawMessage) (*hw.Inventory, error) {
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, err
	}
	clean, err := json.Marshal(printable(v))
	if err != nil {
		return nil, err
	}
	inv := new(hw.Inventory)
	if err := json.Unmarshal(clean, inv); err != nil {
		return nil, err
	}
	if inv.Format > hw.Format {
		return nil, fmt.Errorf("it has the format %d of a newer agent", inv.Format)
	}
	return inv, nil
}

// printable is a JSON value whose texts have printable characters only.
func printable(v any) any {
	switch v := v.(type) {
	case string:
		return strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) {
				return ' '
			}
			return r
		}, v)
	case []any:
		for i := range v {
			v[i] = printable(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = printable(v[k])
		}
	}
	return v
}

// awaited waits for the end of an order that a person waits for. One that did not
// succeed is an error in the device's own words.
func awaited(o api.Order, unsupported string) error {
	switch {
	case o.State == wire.Succeeded:
		return nil
	case !o.State.Terminal():
		return &cli.Error{Code: cli.ExitNotYet, Err: fmt.Errorf("device %s has not answered yet; \"deimos order show %s %s --wait 1m\" waits for it", o.Order.Device, o.Order.Device, o.Order.ID)}
	case o.Result.Code == wire.CodeUnknownKind:
		return fmt.Errorf("the agent of device %s is too old for this; offer it an update", o.Order.Device)
	case o.Result.Code == wire.CodeNotSupported && unsupported != "":
		return fmt.Errorf("%s: %s", unsupported, o.Result.Reason)
	}
	return fmt.Errorf("device %s did not do it (%s, %s): %s", o.Order.Device, o.State, o.Result.Code, o.Result.Reason)
}
