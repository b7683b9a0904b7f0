package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type deviceCmd struct {
	List    deviceListCmd    `cmd:"" help:"List the devices."`
	Show    deviceShowCmd    `cmd:"" help:"Show one device."`
	Set     deviceSetCmd     `cmd:"" help:"Set the group and labels of devices."`
	Pending devicePendingCmd `cmd:"" help:"List the devices that wait to be claimed."`
	Claim   deviceClaimCmd   `cmd:"" help:"Take in the device that shows a claim code."`
	Reject  deviceRejectCmd  `cmd:"" help:"Turn the device that shows a claim code away for a day."`
	Drain   deviceDrainCmd   `cmd:"" help:"Empty a device that is to leave."`
	Retire  deviceRetireCmd  `cmd:"" help:"Send a device away for ever."`

	Identify  deviceIdentifyCmd  `cmd:"" help:"Have a device blink, to find it among others."`
	History   deviceHistoryCmd   `cmd:"" help:"What a device has measured: temperatures, load, disks."`
	Inventory deviceInventoryCmd `cmd:"" help:"What a device has found in itself."`
	Honesty   deviceHonestyCmd   `cmd:"" help:"How far the results of a device's jobs are believed, and why."`
}

type deviceListCmd struct {
	targets
	State   string `enum:"all,online,offline,retired,pending" default:"all" placeholder:"STATE" help:"Which of them: ${enum} (${default})."`
	Trouble bool   `help:"Only those that something is wrong with."`
	cli.Output
}

func (d *deviceListCmd) Run(ctx context.Context, all *commands) error {
	s, err := d.selector()
	if err != nil {
		return err
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	q := api.DeviceQuery{Selector: s, Trouble: d.Trouble}
	if d.State != "all" {
		q.State = api.DeviceState(d.State)
	}
	list, err := listDevices(ctx, c, q)
	if err != nil {
		return err
	}
	return d.Print(list, func(w io.Writer) error { return writeDevices(w, q, list) })
}

// writeDevices shows a list of devices to a person.
func writeDevices(w io.Writer, q api.DeviceQuery, list []api.Device) error {
	switch {
	case len(list) > 0:
	case q.Trouble:
		_, err := fmt.Fprintln(w, "Nothing is wrong with any device that fits.")
		return err
	case q.State != "":
		_, err := fmt.Fprintf(w, "No device that fits is %s.\n", q.State)
		return err
	default:
		return writeNobody(w, q.Selector)
	}
	var rows []string
	wrong := false
	for _, v := range list {
		wrong = wrong || api.Rank(v.Worst()) > api.Rank(wire.Info)
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s of %s\t%s",
			v.ID, v.State, healthText(v), v.Agent, v.Board, v.Group, labelText(v.Labels), cli.Bytes(v.Used), cli.Bytes(v.Capacity), cli.Ago(v.LastSeen)))
	}
	err := cli.Table(w, "DEVICE\tSTATE\tHEALTH\tAGENT\tBOARD\tGROUP\tLABELS\tUSED\tSEEN", rows)
	if wrong && err == nil {
		_, err = fmt.Fprintln(w, "\"deimos device show DEVICE\" tells what is wrong and what to do.")
	}
	return err
}

// writeNobody says why a list of devices is empty.
func writeNobody(w io.Writer, s api.Selector) error {
	text := "No device fits."
	if s.Empty() {
		text = "There is no device yet. Make a token with \"deimos token create\" to let one in."
	}
	_, err := fmt.Fprintln(w, text)
	return err
}

// listDevices is members, and those that wait to be claimed where they fit: they
// have neither group nor label.
func listDevices(ctx context.Context, c *api.Client, q api.DeviceQuery) ([]api.Device, error) {
	list := []api.Device{}
	if q.State != api.DevicePending {
		var err error
		if list, err = c.DevicesWhere(ctx, q); err != nil {
			return nil, err
		}
	}
	if !q.Selector.Empty() || q.Trouble || q.State != "" && q.State != api.DevicePending {
		return list, nil
	}
	waiting, err := c.Pending(ctx)
	for _, p := range waiting {
		list = append(list, api.Device{State: api.DevicePending, LastSeen: p.Last,
			DeviceRecord: api.DeviceRecord{ID: p.Device, Agent: p.Agent, OS: p.OS, Arch: p.Arch, Board: p.Board}})
	}
	return list, err
}

type deviceShowCmd struct {
	ID deviceFlag `arg:"" help:"Device id."`
	cli.Output
}

func (d *deviceShowCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.Device(ctx, string(d.ID))
	if err != nil {
		return err
	}
	return d.Print(v, func(w io.Writer) error { return writeDevice(w, v) })
}

// writeDevice shows a device to a person.
func writeDevice(w io.Writer, d api.Device) error {
	row := func(k, format string, args ...any) {
		if v := strings.TrimSpace(fmt.Sprintf(format, args...)); v != "" {
			fmt.Fprintf(w, "%-12s %s\n", k, v)
		}
	}
	row("device", "%s", d.ID)
	row("state", "%s, seen %s", d.State, cli.Ago(d.LastSeen))
	writeHealth(w, d)
	row("group", "%s", d.Group)
	row("labels", "%s", labelText(d.Labels))
	row("agent", "%s on %s/%s", d.Agent, d.OS, d.Arch)
	row("slot", "%s", d.Slot)
	row("update", "%s", updateText(d.Update))
	row("board", "%s", d.Board)
	row("storage", "%s of %s used", cli.Bytes(d.Used), cli.Bytes(d.Capacity))
	for _, v := range d.Dropped {
		row("dropped", "%d of %s (%s) from a full outbox, last %s", v.Count, v.Class, cli.Bytes(int64(min(v.Bytes, 1<<62))), cli.Ago(v.Last))
	}
	came := "claimed"
	if d.Token != "" {
		came = "by token " + d.Token
	}
	row("enrolled", "%s, %s", d.Enrolled.Format(time.RFC3339), came)
	switch {
	case d.Retired:
		row("retired", "%s", d.RetiredAt.Format(time.RFC3339))
	case d.CertUntil.IsZero():
		row("certificate", "not fetched yet; the device comes for it by itself")
	default:
		row("certificate", "valid until %s", d.CertUntil.Format(time.RFC3339))
	}
	writeDrain(row, d.Drain)
	writeScore(row, d.Score)
	if d.Rest != nil {
		row("chunks", "it moves none until %s (%s)", d.Rest.Until.Format(time.RFC3339), d.Rest.Code)
	}
	writeScrubs(row, d)
	writeNow(row, d)
	return writeInventory(w, d)
}

// updateText says how far an update is that is under way.
func updateText(u *wire.UpdateState) string {
	if u == nil {
		return ""
	}
	text := map[string]string{
		wire.UpdateFetching:  "is being fetched",
		wire.UpdateVerified:  "was fetched, and is being installed",
		wire.UpdateInstalled: "is installed, and waits for a start",
		wire.UpdateTesting:   "runs, and is on trial",
	}[u.Phase]
	if text == "" {
		text = "is " + u.Phase
	}
	if u.Phase == wire.UpdateWaiting && u.Code != "" {
		text += " (" + u.Code + ")"
	}
	if u.Seconds > 0 {
		text += fmt.Sprintf(", and goes on in %s or so", strings.TrimSuffix(max(time.Duration(u.Seconds)*time.Second, time.Minute).Round(time.Minute).String(), "0s"))
	}
	if u.Local {
		text += ", by its owner's wish"
	}
	return cell(u.Version + " " + text)
}

type deviceSetCmd struct {
	changed
	SetGroup    *string  `placeholder:"NAME" help:"Group that they join; an empty name takes them out of theirs."`
	SetLabel    []string `sep:"none" placeholder:"KEY=VALUE" help:"Label that they get; may be repeated."`
	RemoveLabel []string `sep:"none" placeholder:"KEY" help:"Label that they lose; may be repeated."`
	cli.Output
}

func (d *deviceSetCmd) Run(ctx context.Context, all *commands) error {
	s, err := d.selector()
	if err != nil {
		return err
	}
	labels, err := parseLabels(d.SetLabel)
	if err != nil {
		return err
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	ids, err := c.ChangeDevices(ctx, api.DeviceChange{Selector: s, SetGroup: d.SetGroup, SetLabels: labels, RemoveLabels: d.RemoveLabel})
	if err != nil {
		return err
	}
	return d.Print(ids, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s as asked for.\n", cli.Count(len(ids), "device"))
		return err
	})
}

type devicePendingCmd struct{ cli.Output }

func (d *devicePendingCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Pending(ctx)
	if err != nil {
		return err
	}
	return d.Print(list, func(w io.Writer) error {
		if len(list) == 0 {
			_, err := fmt.Fprintln(w, "No device waits to be claimed.")
			return err
		}
		var rows []string
		for _, v := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", v.Code, v.Device, v.Board, v.Agent, v.Address, cli.Ago(v.First), cli.Ago(v.Last)))
		}
		if err := cli.Table(w, "CODE\tDEVICE\tBOARD\tAGENT\tFROM\tFIRST\tLAST", rows); err != nil {
			return err
		}
		_, err := fmt.Fprintln(w, "Compare the code with the one that the device shows, then: deimos device claim CODE")
		return err
	})
}

type deviceClaimCmd struct {
	Code  string   `arg:"" help:"Claim code, as the device shows it."`
	Group string   `help:"Group that it joins." placeholder:"NAME"`
	Label []string `sep:"none" help:"Label that it gets; may be repeated." placeholder:"KEY=VALUE"`
	cli.Output
}

func (d *deviceClaimCmd) Run(ctx context.Context, all *commands) error {
	code, err := wire.ParseClaimCode(d.Code)
	if err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	labels, err := parseLabels(d.Label)
	if err != nil {
		return err
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.Claim(ctx, api.Claim{Code: code, Group: d.Group, Labels: labels})
	if err != nil {
		return err
	}
	return d.Print(v, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "Device %s is yours. It comes for its certificate the next time it asks.\n", v.ID)
		return err
	})
}

type deviceRejectCmd struct {
	Code string `arg:"" help:"Claim code, as \"deimos device pending\" shows it."`
	cli.Output
}

func (d *deviceRejectCmd) Run(ctx context.Context, all *commands) error {
	code, err := wire.ParseClaimCode(d.Code)
	if err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	if err := c.RejectClaim(ctx, code); err != nil {
		return err
	}
	return d.Print(map[string]string{"rejected": code}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "The device that shows %s is turned away for a day.\n", code)
		return err
	})
}

type deviceRetireCmd struct {
	ID  deviceFlag `arg:"" help:"Device id."`
	Yes bool       `help:"Do not ask."`

	Force bool `help:"Even if it has the last copies of something."`
	cli.Output
}

func (d *deviceRetireCmd) Run(ctx context.Context, all *commands) error {
	if !d.Yes && !cli.Terminal(os.Stdin) {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("nothing was done: there is nobody here to ask whether the device is to be retired for ever; if it is, say --yes")}
	}
	if !d.Yes {
		fmt.Fprintf(os.Stderr, "Device %s will be cut off for ever, and the chunks that it holds count as lost. Type \"yes\" to go on: ", d.ID)
		line, _ := bufio.NewReader(os.Stdin).ReadString('\n') // an end is no "yes"
		if strings.TrimSpace(line) != "yes" {
			return &cli.Error{Code: cli.ExitUsage, Err: errors.New("nothing was done; with --yes there is no question")}
		}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.RetireDevice(ctx, string(d.ID), d.Force)
	if err != nil {
		return err
	}
	return d.Print(v, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "Device %s is retired and cut off.\n", v.ID)
		return err
	})
}
