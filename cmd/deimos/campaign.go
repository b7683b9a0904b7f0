package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

type releaseCampaignCmd struct {
	Start   campaignStartCmd   `cmd:"" help:"Begin to bring a release to devices."`
	List    campaignListCmd    `cmd:"" help:"List campaigns, those under way first."`
	Show    campaignShowCmd    `cmd:"" help:"Show a campaign, or its devices."`
	Pause   campaignPauseCmd   `cmd:"" help:"Ask no more devices for now."`
	Resume  campaignResumeCmd  `cmd:"" help:"Go on with a campaign that is paused."`
	Approve campaignApproveCmd `cmd:"" help:"Let a campaign go on to its next phase."`
	Abort   campaignAbortCmd   `cmd:"" help:"End a campaign; who has it installed already tries it to the end."`
}

// Help says more than a line.
func (*releaseCampaignCmd) Help() string {
	return `A campaign asks the devices phase by phase: first a canary, then growing parts, and between them it waits, and looks whether they
are well. If too many fail or fall silent it stops by itself. Who comes late gets the release when the campaign is done.

  deimos release campaign start 1.4.0 --all --canary 5 --phase 10%:24h
  deimos release campaign start 1.4.0 --group homes --canary group:lab
  deimos release status --watch`
}

type campaignStartCmd struct {
	Version string `arg:"" help:"Published version."`
	changed
	Canary     []string      `sep:"none" placeholder:"WHO" help:"First phase: so many devices, or group:NAME, label:KEY=VALUE, device:ID; may be repeated."`
	CanarySoak duration      `default:"24h" help:"How long the canary is looked at before the next phase (${default})."`
	Phase      []phaseFlag   `sep:"none" placeholder:"SHARE[:SOAK[:approve]]" help:"A further phase, as in 10%:24h; may be repeated. Default: 1%:24h without a canary, then 10%:24h, then 100%."`
	Approve    bool          `help:"Wait for an approval after each phase."`
	MaxFailed  []allowedFlag `sep:"," placeholder:"N|SHARE%" help:"Stop when more have failed, as in 3 or 2%, or 3,2% for whichever comes first. Default: 2%."`
	MaxSilent  []allowedFlag `sep:"," placeholder:"N|SHARE%" help:"Stop when more are silent. Default: 5%."`
	Silent     duration      `name:"silent-after" default:"30m" help:"How long a device that was asked may be unheard of (${default})."`
	Rate       float64       `default:"20" help:"How many devices are asked a second, at most (${default})."`
	cli.Output
}

// phaseFlag is SHARE[:SOAK[:approve]].
type phaseFlag api.CampaignPhase

func (p *phaseFlag) UnmarshalText(text []byte) error {
	parts := strings.Split(string(text), ":")
	bad := fmt.Errorf("%q is no phase: it looks like 10%%:24h or 10%%:24h:approve", text)
	share, ok := strings.CutSuffix(parts[0], "%")
	v, err := strconv.ParseFloat(share, 64)
	if !ok || err != nil || !(v > 0 && v <= 100) || len(parts) > 3 || len(parts) == 3 && parts[2] != "approve" {
		return bad
	}
	p.Percentage, p.Approve = v, len(parts) == 3
	if len(parts) > 1 {
		var soak duration
		if err := soak.UnmarshalText([]byte(parts[1])); err != nil {
			return err
		}
		p.SoakSeconds = time.Duration(soak).Seconds()
	}
	return nil
}

// allowedFlag is a number of devices, or a share of them in percent.
type allowedFlag struct {
	n     *int
	share *float64
}

func (a *allowedFlag) UnmarshalText(text []byte) error {
	if share, ok := strings.CutSuffix(string(text), "%"); ok {
		v, err := strconv.ParseFloat(share, 64)
		if err != nil || !(v >= 0 && v <= 100) {
			return fmt.Errorf("%q is no share: it is from 0%% to 100%%", text)
		}
		a.share = &v
		return nil
	}
	v, err := strconv.Atoi(string(text))
	if err != nil || v < 0 {
		return fmt.Errorf("%q is no number of devices, and no share as in 2%%", text)
	}
	a.n = &v
	return nil
}

func limits(list []allowedFlag) (n *int, share *float64) {
	for _, a := range list {
		n, share = cmp.Or(a.n, n), cmp.Or(a.share, share)
	}
	return n, share
}

// canaryOf reads who goes first.
func canaryOf(list []string) (p api.CampaignPhase, err error) {
	q := map[string][]string{}
	for _, s := range list {
		if n, err := strconv.Atoi(s); err == nil && n > 0 && len(list) == 1 {
			return api.CampaignPhase{Count: n}, nil
		}
		kind, value, ok := strings.Cut(s, ":")
		if !ok || kind != "group" && kind != "label" && kind != "device" {
			return p, fmt.Errorf("--canary is a number of devices, or group:NAME, label:KEY=VALUE or device:ID, not %q", s)
		}
		q[kind] = append(q[kind], value)
	}
	sel, err := api.ParseSelector(q)
	return api.CampaignPhase{Only: &sel}, err
}

// request is what the flags mean.
func (c *campaignStartCmd) request() (q api.CampaignRequest, err error) {
	if q.Selector, err = c.selector(); err != nil {
		return q, err
	}
	q.Version, q.Rate = c.Version, c.Rate
	if len(c.Canary) > 0 {
		p, err := canaryOf(c.Canary)
		if err != nil {
			return q, &cli.Error{Code: cli.ExitUsage, Err: err}
		}
		p.SoakSeconds = time.Duration(c.CanarySoak).Seconds()
		q.Phases = append(q.Phases, p)
	}
	for _, p := range c.Phase {
		q.Phases = append(q.Phases, api.CampaignPhase(p))
	}
	if len(c.Phase) == 0 {
		if len(c.Canary) == 0 {
			q.Phases = append(q.Phases, api.CampaignPhase{Percentage: 1, SoakSeconds: day.Seconds()})
		}
		q.Phases = append(q.Phases, api.CampaignPhase{Percentage: 10, SoakSeconds: day.Seconds()})
	}
	if q.Phases[len(q.Phases)-1].Percentage != 100 {
		q.Phases = append(q.Phases, api.CampaignPhase{Percentage: 100})
	}
	for i := range q.Phases[:len(q.Phases)-1] {
		q.Phases[i].Approve = q.Phases[i].Approve || c.Approve
	}
	q.Stop.MaxFailed, q.Stop.MaxFailedShare = limits(c.MaxFailed)
	q.Stop.MaxSilent, q.Stop.MaxSilentShare = limits(c.MaxSilent)
	q.Stop.SilentSeconds = time.Duration(c.Silent).Seconds()
	return q, nil
}

func (c *campaignStartCmd) Run(ctx context.Context, all *commands) error {
	q, err := c.request()
	if err != nil {
		return err
	}
	client, err := all.client()
	if err != nil {
		return err
	}
	v, err := client.StartCampaign(ctx, q)
	if err != nil {
		return err
	}
	return c.Print(v, func(w io.Writer) error {
		if err := writeCampaign(w, v); err != nil {
			return err
		}
		_, err := fmt.Fprintln(w, "\nIt goes on by itself; \"deimos release status --watch\" shows how.")
		return err
	})
}

type campaignListCmd struct{ cli.Output }

func (c *campaignListCmd) Run(ctx context.Context, all *commands) error {
	client, err := all.client()
	if err != nil {
		return err
	}
	v, err := client.Releases(ctx)
	if err != nil {
		return err
	}
	return c.Print(v.Campaigns, func(w io.Writer) error {
		var rows []string
		for _, x := range v.Campaigns {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%d of %d\t%d\t%d\t%d\t%s", x.ID, x.Version, cell(whom(x.Selector)), campaignIs(x), x.Phase+1, len(x.Phases),
				x.Counts[api.StandsUpdated], x.Counts[api.StandsFailed], x.Counts[api.StandsSilent], cli.Ago(x.Created)))
		}
		return cli.Table(w, "CAMPAIGN\tVERSION\tTO\tSTATE\tPHASE\tUPDATED\tFAILED\tSILENT\tBEGAN", rows)
	})
}

type campaignShowCmd struct {
	ID      string       `arg:"" optional:"" help:"Campaign; default: the newest."`
	Devices bool         `xor:"what" help:"List its devices."`
	At      api.Standing `placeholder:"STANDING" help:"With --devices: only those that stand there, as in failed, silent, declined, hindered, waiting, away."`
	Limit   int          `default:"100" help:"With --devices: at most so many (${default})."`
	cli.Output
}

func (c *campaignShowCmd) Run(ctx context.Context, all *commands) error {
	client, err := all.client()
	if err != nil {
		return err
	}
	if c.ID == "" {
		if c.ID, err = onlyCampaign(ctx, client, false); err != nil {
			return err
		}
	}
	if c.Devices || c.At != "" {
		var list []api.CampaignDevice
		for after := ""; ; {
			part, err := client.CampaignDevices(ctx, c.ID, c.At, after, min(max(c.Limit-len(list), 1), api.MaxCampaignDevices))
			if err != nil {
				return err
			}
			list = append(list, part.Devices...)
			if after = part.Next; after == "" || len(list) >= c.Limit {
				break
			}
		}
		return c.Print(list, func(w io.Writer) error { return writeCampaignDevices(w, list) })
	}
	v, err := client.Campaign(ctx, c.ID)
	if err != nil {
		return err
	}
	return c.Print(v, func(w io.Writer) error { return writeCampaign(w, v) })
}

// onlyCampaign is the campaign that is meant if none is named.
func onlyCampaign(ctx context.Context, c *api.Client, open bool) (string, error) {
	v, err := c.Releases(ctx)
	if err != nil {
		return "", err
	}
	switch list := v.Campaigns; {
	case len(list) == 0:
		return "", errors.New("there is no campaign; \"deimos release campaign start\" begins one")
	case open && list[0].State.Ended():
		return "", errors.New("no campaign is under way")
	case open && len(list) > 1 && !list[1].State.Ended():
		return "", &cli.Error{Code: cli.ExitUsage, Err: errors.New("several campaigns are under way; say which, by an id of \"deimos release campaign list\"")}
	default:
		return list[0].ID, nil
	}
}

// steered are the flags of what is done with a campaign.
type steered struct {
	ID     string `arg:"" optional:"" help:"Campaign; default: the one under way."`
	Reason string `help:"A sentence for the record."`
	cli.Output
}

func (s *steered) run(ctx context.Context, all *commands, what string) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	if s.ID == "" {
		if s.ID, err = onlyCampaign(ctx, c, true); err != nil {
			return err
		}
	}
	v, err := c.SteerCampaign(ctx, s.ID, what, s.Reason)
	if err != nil {
		return err
	}
	return s.Print(v, func(w io.Writer) error { return writeCampaign(w, v) })
}

type (
	campaignPauseCmd   struct{ steered }
	campaignResumeCmd  struct{ steered }
	campaignApproveCmd struct{ steered }
	campaignAbortCmd   struct{ steered }
)

func (c *campaignPauseCmd) Run(ctx context.Context, all *commands) error {
	return c.run(ctx, all, api.CampaignPause)
}
func (c *campaignResumeCmd) Run(ctx context.Context, all *commands) error {
	return c.run(ctx, all, api.CampaignResume)
}
func (c *campaignApproveCmd) Run(ctx context.Context, all *commands) error {
	return c.run(ctx, all, api.CampaignApprove)
}
func (c *campaignAbortCmd) Run(ctx context.Context, all *commands) error {
	return c.run(ctx, all, api.CampaignAbort)
}

type releaseStatusCmd struct {
	Watch bool     `help:"Go on showing it until Ctrl-C."`
	Every duration `default:"2s" help:"With --watch: how often (${default})."`
	cli.Output
}

func (s *releaseStatusCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	for {
		v, err := c.Releases(ctx)
		if err != nil {
			return err
		}
		if s.Watch && !s.JSON() && cli.Terminal(os.Stdout) {
			fmt.Print("\033[H\033[J") // from the top, and nothing of before
		}
		if err := s.Print(v, func(w io.Writer) error { return writeReleases(w, v) }); err != nil || !s.Watch {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(time.Duration(s.Every), 100*time.Millisecond)):
		}
	}
}

// writeReleases shows who runs what, and the campaigns that matter now: those under
// way, those that late devices get, and the newest of the rest. What would shake the
// trust in all of them stands first.
func writeReleases(w io.Writer, v api.Releases) error {
	for _, f := range v.Forks {
		if err := writeFork(w, f); err != nil {
			return err
		}
	}
	var rows []string
	all := 0
	for _, x := range v.Versions {
		all += x.Devices
	}
	for _, x := range v.Versions {
		rows = append(rows, fmt.Sprintf("%s\t%d\t%d\t%s", cell(cmp.Or(x.Version, "unknown")), x.Devices, x.Online, bar(x.Devices, all)))
	}
	if err := cli.Table(w, "VERSION\tDEVICES\tONLINE\t", rows); err != nil {
		return err
	}
	for i, x := range v.Campaigns {
		if x.State.Ended() && !x.Current && i > 0 {
			continue
		}
		fmt.Fprintln(w)
		if err := writeCampaign(w, x); err != nil {
			return err
		}
	}
	return nil
}

// writeFork shows a log with two faces, and who has seen which.
func writeFork(w io.Writer, f api.LogSeen) error {
	fmt.Fprintf(w, "✗ THE LOG OF RELEASES HAS %d FACES. Of %s, devices were shown different ones, all signed with the key of the log\n", len(f.Faces), cli.Count(int(f.Size), "record"))
	fmt.Fprintf(w, "  (%s): who has that key shows some devices what others do not see. Publish nothing; keep the evidence, the signed\n", cell(f.Log))
	fmt.Fprint(w, "  checkpoints in \"deimos release status -o json\"; find out who had the key; then \"deimos release keys rotate --role log\".\n\n")
	var rows []string
	for i, face := range f.Faces {
		for _, d := range face.Shown {
			rows = append(rows, fmt.Sprintf("%d\t%s\t%s\t%s\t%s", i+1, cell(face.Hash), d.Device, d.Order, d.At.UTC().Format(time.RFC3339)))
		}
	}
	if err := cli.Table(w, "FACE\tTREE\tDEVICE\tORDER\tREPORTED", rows); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w)
	return err
}

// whom says a selector as its flags are given.
func whom(s api.Selector) string {
	var parts []string
	for _, g := range s.Groups {
		parts = append(parts, "group "+g)
	}
	for _, l := range slices.Sorted(maps.Keys(s.Labels)) {
		parts = append(parts, "label "+l+"="+s.Labels[l])
	}
	switch n := len(s.Devices); {
	case n == 1:
		parts = append(parts, "device "+string(s.Devices[0]))
	case n > 1:
		parts = append(parts, cli.Count(n, "device"))
	}
	return cmp.Or(strings.Join(parts, ", "), "all")
}

func campaignIs(c api.Campaign) string {
	s := strings.ReplaceAll(string(c.State), "_", " ")
	if c.Current {
		s += ", current"
	}
	return s
}

// barWidth is how many characters a bar has.
const barWidth = 20

// bar shows a part of a whole. Something is never shown as nothing, nor as all.
func bar(n, of int) string {
	full := 0
	if of > 0 {
		full = int(math.Round(float64(n) / float64(of) * barWidth))
	}
	if n > 0 {
		full = max(full, 1)
	}
	if n < of {
		full = min(full, barWidth-1)
	}
	return "[" + strings.Repeat("#", full) + strings.Repeat(".", barWidth-full) + "]"
}

// standings says how many stand where.
func standings(counts map[api.Standing]int) string {
	var parts []string
	for _, s := range api.Standings {
		if n := counts[s]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, s))
		}
	}
	return strings.Join(parts, ", ")
}

func phaseText(p api.CampaignPhase) string {
	switch {
	case p.Only != nil:
		return whom(*p.Only)
	case p.Count > 0:
		return cli.Count(p.Count, "device")
	}
	return fmt.Sprintf("%v%%", p.Percentage)
}

// phaseIs says where a phase is.
func phaseIs(c api.Campaign, i int) string {
	p := c.Phases[i]
	soak := time.Duration(p.SoakSeconds * float64(time.Second))
	switch {
	case !p.Ended.IsZero():
		return "over"
	case p.Began.IsZero() || c.State.Ended():
		if p.Began.IsZero() {
			return ""
		}
		return "ended here"
	case p.Settled.IsZero():
		return "asking"
	case time.Since(p.Settled) < soak:
		return "soaks until " + p.Settled.Add(soak).UTC().Format(time.RFC3339)
	}
	return "soaked"
}

// writeCampaign shows a campaign to a person.
func writeCampaign(w io.Writer, c api.Campaign) error {
	row := func(k, v string) { fmt.Fprintf(w, "%-10s %s\n", k, v) }
	row("campaign", c.ID)
	by := ""
	if c.By != "" {
		by = " by " + cell(c.By)
	}
	row("release", fmt.Sprintf("%s to %s (%s), begun%s %s", c.Version, cell(whom(c.Selector)), cli.Count(c.Devices, "device"), by, c.Created.UTC().Format(time.RFC3339)))
	row("state", campaignIs(c))
	if c.Reason != "" {
		row("because", cell(c.Reason))
	}
	if c.Holdup != "" {
		row("it waits", cell(c.Holdup))
	}
	row("devices", standings(c.Counts))
	if len(c.Reasons) > 0 {
		var parts []string
		for _, r := range c.Reasons {
			parts = append(parts, fmt.Sprintf("%d %s: %s", r.Devices, r.Standing, cell(r.Code)))
		}
		row("why", strings.Join(parts, "; "))
	}
	fmt.Fprintln(w)
	var rows []string
	for i, p := range c.Phases {
		asked := p.Devices - p.Counts[api.StandsLater] - p.Counts[api.StandsAway] - p.Counts[api.StandsDue]
		rows = append(rows, fmt.Sprintf("%d\t%s\t%s\t%d of %d\t%s\t%s", i+1, cell(phaseText(p.CampaignPhase)), bar(p.Counts[api.StandsUpdated], p.Devices), asked, p.Devices, phaseIs(c, i), standings(p.Counts)))
	}
	if err := cli.Table(w, "PHASE\tWHO\tUPDATED\tASKED\tIS\tDEVICES", rows); err != nil {
		return err
	}
	bad := c.Evidence
	if len(bad) == 0 {
		bad = c.Failed
	}
	if len(bad) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	return writeCampaignDevices(w, bad)
}

func writeCampaignDevices(w io.Writer, list []api.CampaignDevice) error {
	var rows []string
	for _, d := range list {
		why := d.Reason
		if why == "" {
			why = silences[d.Code]
		}
		if d.Standing == api.StandsInstalling && d.Progress > 0 {
			why = fmt.Sprintf("%.0f%% done", d.Progress*100)
		}
		rows = append(rows, fmt.Sprintf("%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s", d.Device, d.Standing, d.Phase+1, cell(d.Agent), cell(d.Code), cli.Ago(d.LastSeen), d.Order, cell(why)))
	}
	return cli.Table(w, "DEVICE\tSTANDS\tPHASE\tRUNS\tCODE\tSEEN\tORDER\tREASON", rows)
}

// silences are what the coordinator itself says of devices that say nothing.
var silences = map[string]string{
	"away":           "it was asked, and was not heard of since",
	"away_since":     "it took the release, and was not heard of since",
	"no_progress":    "it is there, and its update does not go on",
	"update_pending": "another update of it is under way",
}
