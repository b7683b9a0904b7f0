package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type configCmd struct {
	Set   configSetCmd   `cmd:"" help:"Want settings of a device, a group or the whole fleet."`
	Unset configUnsetCmd `cmd:"" help:"Leave settings to the next wider scope, and at last to the devices."`
	Show  configShowCmd  `cmd:"" help:"Show what is wanted of the whole fleet, a group or a device; of a device also what it runs and refuses."`
	List  configListCmd  `cmd:"" help:"Show which version devices run, and who refuses what."`
	Keys  configKeysCmd  `cmd:"" help:"Show what can be set."`
}

// scope are the flags that name one configuration.
type scope struct {
	Device deviceFlag `xor:"scope" placeholder:"ID" help:"Of this device."`
	Group  name       `xor:"scope" placeholder:"NAME" help:"Of this group."`
}

func (s scope) api() api.ConfigScope {
	return api.ConfigScope{Device: wire.DeviceID(s.Device), Group: string(s.Group)}
}

// changedScope are those of a change: none given is not yet the whole fleet.
type changedScope struct {
	scope
	All bool `xor:"scope" help:"Of the whole fleet."`
}

func describe(s api.ConfigScope) string {
	switch {
	case s.Device != "":
		return "device " + string(s.Device)
	case s.Group != "":
		return "group " + s.Group
	}
	return "the whole fleet"
}

type configSetCmd struct {
	Values []string `arg:"" name:"key=value" help:"What is wanted, as in beat.seconds=60 jobs.max_memory_bytes=256MiB; \"deimos config keys\" shows all."`
	Force  bool     `help:"Also keys that the coordinator does not know, for agents that are newer."`
	changedScope
	cli.Output
}

func (s *configSetCmd) Run(ctx context.Context, all *commands) error {
	set, err := parseValues(s.Values)
	if err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	return changeConfig(ctx, all, s.changedScope, s.Output, api.ConfigChange{Set: set, Force: s.Force})
}

// parseValues reads KEY=VALUE. A key that this program does not know is left to
// the coordinator, which may be newer; its value is JSON, or else text.
func parseValues(pairs []string) (map[string]json.RawMessage, error) {
	set := make(map[string]json.RawMessage)
	for _, p := range pairs {
		key, text, ok := strings.Cut(p, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("%q is not KEY=VALUE, as in beat.seconds=60", p)
		}
		if _, twice := set[key]; twice {
			return nil, fmt.Errorf("%s is given twice", key)
		}
		raw := json.RawMessage(text)
		if known, ok := wire.SettingOf(key); ok {
			var err error
			if raw, err = known.Parse(text); err != nil {
				return nil, err
			}
		} else if !json.Valid(raw) {
			raw, _ = json.Marshal(text) // a string always can be
		}
		set[key] = raw
	}
	return set, nil
}

type configUnsetCmd struct {
	Keys []string `arg:"" name:"key" help:"What is not wanted here any more."`
	changedScope
	cli.Output
}

func (u *configUnsetCmd) Run(ctx context.Context, all *commands) error {
	return changeConfig(ctx, all, u.changedScope, u.Output, api.ConfigChange{Unset: u.Keys})
}

func changeConfig(ctx context.Context, all *commands, s changedScope, o cli.Output, q api.ConfigChange) error {
	q.ConfigScope, q.All = s.api(), s.All
	if q.CheckChange() != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("say whom it is for with --device or --group, or else --all")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	doc, err := c.ChangeConfig(ctx, q)
	if err != nil {
		return err
	}
	return o.Print(doc, func(w io.Writer) error {
		if err := writeDocument(w, doc); err != nil {
			return err
		}
		if doc.Devices == 0 {
			_, err := fmt.Fprintln(w, "No device goes by it yet.")
			return err
		}
		_, err := fmt.Fprintf(w, "%s will be told; \"deimos config list\" shows how far they are.\n", cli.Count(doc.Devices, "device"))
		return err
	})
}

func writeDocument(w io.Writer, doc api.ConfigDocument) error {
	if len(doc.Values) == 0 {
		_, err := fmt.Fprintf(w, "Nothing is set for %s.\n", describe(doc.ConfigScope))
		return err
	}
	fmt.Fprintf(w, "for %s, since %s\n", describe(doc.ConfigScope), cli.Ago(doc.Updated))
	var rows []string
	for _, key := range slices.Sorted(maps.Keys(doc.Values)) {
		rows = append(rows, key+"\t"+value(key, doc.Values[key]))
	}
	return cli.Table(w, "KEY\tVALUE", rows)
}

// value says a value to a person.
func value(key string, raw json.RawMessage) string {
	var n int64
	if s, _ := wire.SettingOf(key); s.Unit == "bytes" && json.Unmarshal(raw, &n) == nil && n >= 1024 {
		return fmt.Sprintf("%s (%s)", raw, cli.Bytes(n))
	}
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return strings.ReplaceAll(strings.ReplaceAll(text, "\t", " "), "\n", " ")
	}
	return string(raw)
}

type configShowCmd struct {
	scope
	cli.Output
}

func (s *configShowCmd) Run(ctx context.Context, all *commands) error {
	sc := s.api()
	c, err := all.client()
	if err != nil {
		return err
	}
	if sc.Device == "" {
		doc, err := c.Config(ctx, sc)
		if err != nil {
			return err
		}
		return s.Print(doc, func(w io.Writer) error { return writeDocument(w, doc) })
	}
	list, err := c.DeviceConfigs(ctx, api.Selector{Devices: []wire.DeviceID{sc.Device}})
	if err != nil {
		return err
	}
	if len(list) != 1 {
		return errors.New("the coordinator's answer is not of one device")
	}
	return s.Print(list[0], func(w io.Writer) error { return writeDeviceConfig(w, list[0]) })
}

func writeDeviceConfig(w io.Writer, d api.DeviceConfig) error {
	runs := "nothing is known of what it runs"
	if d.Reported != nil {
		runs = fmt.Sprintf("runs version %d, said %s", d.Reported.Version, cli.Ago(d.Reported.At))
	}
	fmt.Fprintf(w, "device %s: %s; version %d is wanted; %s\n", d.Device, d.State, d.Wanted, runs)
	if d.Reason != "" {
		fmt.Fprintln(w, d.Reason)
	}
	keys := make(map[string]bool)
	for k := range d.Values {
		keys[k] = true
	}
	var reported wire.ConfigReport
	if d.Reported != nil {
		reported = d.Reported.ConfigReport
	}
	for k := range reported.Running {
		keys[k] = true
	}
	var rows []string
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		wanted, from, running := "-", "-", "-"
		if v, ok := d.Values[k]; ok {
			wanted, from = value(k, v.Value), v.From
		}
		if raw, ok := reported.Running[k]; ok {
			running = value(k, raw)
		}
		rows = append(rows, strings.Join([]string{k, wanted, from, running, reported.Refused[k].Reason}, "\t"))
	}
	return cli.Table(w, "KEY\tWANTED\tFROM\tRUNS\tREFUSED BECAUSE", rows)
}

type configListCmd struct {
	targets
	cli.Output
}

func (l *configListCmd) Run(ctx context.Context, all *commands) error {
	sel, err := l.selector()
	if err != nil {
		return err
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.DeviceConfigs(ctx, sel)
	if err != nil {
		return err
	}
	return l.Print(list, func(w io.Writer) error {
		if len(list) == 0 {
			return writeNobody(w, sel)
		}
		return writeConfigs(w, list)
	})
}

func writeConfigs(w io.Writer, list []api.DeviceConfig) error {
	var rows []string
	for _, d := range list {
		runs, notes := "-", []string{}
		if d.Reported != nil {
			runs = fmt.Sprint(d.Reported.Version)
			for _, k := range slices.Sorted(maps.Keys(d.Reported.Refused)) {
				notes = append(notes, k+": "+d.Reported.Refused[k].Reason)
			}
		}
		if d.Reason != "" {
			notes = append(notes, d.Reason)
		}
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%d\t%s\t%s", d.Device, d.Group, d.State, d.Wanted, runs, strings.Join(notes, "; ")))
	}
	return cli.Table(w, "DEVICE\tGROUP\tSTATE\tWANTED\tRUNS\tREFUSED", rows)
}

type configKeysCmd struct{ cli.Output }

func (k *configKeysCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Settings(ctx)
	if err != nil {
		return err
	}
	return k.Print(list, func(w io.Writer) error {
		var rows []string
		for _, s := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s", s.Key, s.Type, s.Range(), s.About))
		}
		return cli.Table(w, "KEY\tTYPE\tRANGE\tMEANING", rows)
	})
}
