package main

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/deimos-edge/deimos/coordinator"
	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

type auditCmd struct {
	Storage  auditStorageCmd  `cmd:"" help:"Have a device prove that it holds its chunks."`
	Compute  auditComputeCmd  `cmd:"" help:"Give a device a job whose answer is known."`
	Ls       auditListCmd     `cmd:"" aliases:"list" help:"List challenges, the newest first."`
	Show     auditShowCmd     `cmd:"" help:"What was asked, what came, and what it cost."`
	Evidence auditEvidenceCmd `cmd:"" help:"Print all that is needed to judge a wrong or lost answer again."`
	Check    auditCheckCmd    `cmd:"" help:"Judge evidence here, without the coordinator."`
}

type auditStorageCmd struct {
	Device string `arg:"" help:"Device id."`
	Leaves int    `default:"44" help:"How many 4 KiB pieces to ask for; 44 find a loss of 10% in 99 of 100 cases."`
	cli.Output
}

func (a *auditStorageCmd) Run(ctx context.Context, all *commands) error {
	if a.Leaves < 1 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("a challenge asks for at least one leaf")}
	}
	return runAudit(ctx, all, a.Output, api.AuditRequest{Kind: api.StorageAudit, Device: wire.DeviceID(a.Device), Leaves: a.Leaves}, "")
}

type auditComputeCmd struct {
	Device string     `arg:"" help:"Device id."`
	Module string     `required:"" type:"existingfile" placeholder:"FILE" help:"WebAssembly file to run, best one that customers run too."`
	Arg    []string   `help:"Argument for the module; may be repeated."`
	Limits limitFlags `embed:""`
	cli.Output
}

func (a *auditComputeCmd) Run(ctx context.Context, all *commands) error {
	return runAudit(ctx, all, a.Output, api.AuditRequest{Kind: api.ComputeAudit, Device: wire.DeviceID(a.Device), Args: a.Arg, Limits: a.Limits.limits()}, a.Module)
}

// runAudit fails for a device that did not prove itself, after printing why.
func runAudit(ctx context.Context, all *commands, out cli.Output, r api.AuditRequest, module string) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	if module != "" {
		if r.Module, err = putModule(ctx, c, module); err != nil {
			return err
		}
	}
	a, err := c.Audit(ctx, r)
	if err != nil {
		return err
	}
	if err := out.Print(a, func(w io.Writer) error { return writeAudit(w, a) }); err != nil {
		return err
	}
	if a.Outcome != api.AuditRight {
		return fmt.Errorf("the device did not prove itself (%s): %s", a.Outcome, a.Reason)
	}
	return nil
}

// writeAudit shows a challenge to a person.
func writeAudit(w io.Writer, a api.Audit) error {
	row := func(k, format string, args ...any) {
		fmt.Fprintf(w, "%-11s%s\n", k, cell(fmt.Sprintf(format, args...)))
	}
	by := "asked for by an operator"
	if a.Routine {
		by = "by itself"
	}
	row("challenge", "%s (%s), %s, %s", a.ID, a.Kind, by, a.At.UTC().Format(time.RFC3339))
	row("device", "%s", a.Device)
	row("order", "%s", a.Order)
	row("outcome", "%s", a.Outcome)
	if a.Reason != "" {
		row("because", "%s", a.Reason)
	}
	switch a.Kind {
	case api.StorageAudit:
		of := ""
		if len(a.Chunks) > 0 {
			of = ", from " + cli.Count(len(a.Chunks), "chunk")
		}
		row("proof", "%d of %d leaves verified%s", a.Right, a.Leaves, of)
	case api.ComputeAudit:
		row("committed", "%s before the job was sent", a.Commitment)
		row("expected", "%s", a.Expected)
		row("got", "%s", a.Got)
	case api.DisputeAudit:
		row("settled", "the coordinator has run this customer's job itself, in %.2f s of CPU", a.CPUSeconds)
		row("expected", "%s", a.Expected)
		row("got", "%s", a.Got)
	}
	for _, id := range a.Wrong {
		row("wrong", "%s", id)
	}
	for _, id := range a.Lost {
		row("lost", "%s", id)
	}
	if a.Bytes > 0 {
		row("on line", "%s", cli.Bytes(a.Bytes))
	}
	if p := a.Penalty; p != nil {
		row("cost", "%.2f of its %s, from %.2f to %.2f", p.Amount, p.Figure, p.Before, p.After)
	} else if a.Outcome != api.AuditPending {
		row("cost", "nothing")
	}
	if a.Evidence {
		row("evidence", "\"deimos audit evidence %s > FILE\", \"deimos audit check FILE\"", a.ID)
	}
	return nil
}

type auditListCmd struct {
	Device  deviceFlag `placeholder:"ID" help:"Only of this device."`
	Outcome string     `placeholder:"OUTCOME" help:"Only with this outcome: pending, right, wrong, lost, refused, unreachable or void."`
	Before  string     `placeholder:"ID" help:"Only older than the challenge with this id."`
	Limit   int        `default:"100" help:"How many at most (${default})."`
	cli.Output
}

func (a *auditListCmd) Run(ctx context.Context, all *commands) error {
	if a.Limit < 1 || a.Limit > api.MaxAudits {
		return &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf("a list has 1 to %d challenges", api.MaxAudits)}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Audits(ctx, api.AuditQuery{Device: wire.DeviceID(a.Device), Outcome: api.AuditOutcome(a.Outcome), Before: a.Before, Limit: a.Limit})
	if err != nil {
		return err
	}
	return a.Print(list, func(w io.Writer) error {
		if len(list.Audits) == 0 {
			fmt.Fprintln(w, "There is no such challenge.")
		} else {
			var rows []string
			for _, v := range list.Audits {
				rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", v.ID, v.Kind, v.Device, v.Outcome, cli.Ago(v.At), cell(v.Reason)))
			}
			if err := cli.Table(w, "CHALLENGE\tKIND\tDEVICE\tOUTCOME\tWHEN\tREASON", rows); err != nil {
				return err
			}
		}
		if list.Cut == "" {
			return nil
		}
		_, err := fmt.Fprintf(w, "There may be more: %s.\n", list.Cut)
		return err
	})
}

type auditShowCmd struct {
	ID string `arg:"" help:"Id of the challenge."`
	cli.Output
}

func (a *auditShowCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.AuditByID(ctx, a.ID)
	if err != nil {
		return err
	}
	return a.Print(v, func(w io.Writer) error { return writeAudit(w, v) })
}

type auditEvidenceCmd struct {
	ID string `arg:"" help:"Id of the challenge."`
}

func (a *auditEvidenceCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	raw, err := c.Evidence(ctx, a.ID)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(append(raw, '\n'))
	return err
}

type auditCheckCmd struct {
	File     string `arg:"" type:"existingfile" help:"Evidence, as \"deimos audit evidence\" prints it."`
	OrderKey string `placeholder:"KEY" help:"Key that the coordinator signs its orders with, in base64. Without it, the one in the evidence is believed and shown."`
	Module   string `type:"existingfile" placeholder:"FILE" help:"Module of a compute challenge, to run it here."`
	Input    string `type:"existingfile" placeholder:"FILE" help:"Chunk that it ran over."`
	cli.Output
}

// maxEvidenceFile is more than any evidence has: leaves in base64, and around
// them some 100 KiB.
const maxEvidenceFile = 64 << 20

func (a *auditCheckCmd) Run(ctx context.Context) error {
	raw, err := readLimited(a.File, maxEvidenceFile)
	if err != nil {
		return err
	}
	with := coordinator.EvidenceChecks{}
	if a.OrderKey != "" {
		key, err := base64.StdEncoding.DecodeString(a.OrderKey)
		if err != nil || len(key) != ed25519.PublicKeySize {
			return &cli.Error{Code: cli.ExitUsage, Err: errors.New("--order-key is an Ed25519 key of 32 bytes in base64")}
		}
		with.OrderKey = key
	}
	if with.Output, err = a.again(ctx, raw); err != nil {
		return err
	}
	v, err := coordinator.CheckEvidence(raw, with)
	if err != nil {
		return fmt.Errorf("it is not proved: %w", err)
	}
	return a.Print(v, func(w io.Writer) error { return writeVerdict(w, v) })
}

// again runs the job of a compute challenge; nil where it was not asked for.
func (a *auditCheckCmd) again(ctx context.Context, raw []byte) ([]byte, error) {
	if a.Module == "" && a.Input == "" {
		return nil, nil
	}
	job, err := coordinator.JobOf(raw)
	if err != nil {
		return nil, err
	}
	if a.Module == "" || a.Input == "" {
		return nil, &cli.Error{Code: cli.ExitUsage, Err: errors.New("a job is run with both --module and --input")}
	}
	module, err := readLimited(a.Module, maxEvidenceFile)
	if err != nil {
		return nil, err
	}
	input, err := readLimited(a.Input, chunk.MaxSize)
	if err != nil {
		return nil, err
	}
	if sum := chunk.Sum(input).String(); sum != job.Input {
		return nil, fmt.Errorf("the job ran over chunk %s, the file %s is chunk %s", job.Input, a.Input, sum)
	}
	if sum := sha256.Sum256(module); hex.EncodeToString(sum[:]) != job.Module.SHA256 {
		return nil, fmt.Errorf("the job ran module %s, the file %s is another", job.Module.SHA256, a.Module)
	}
	out, err := new(engine).compute(ctx, coordinator.ComputeJob{Module: module, Args: job.Args, Input: input, Limits: job.Limits})
	if err != nil {
		return nil, fmt.Errorf("the job cannot be run here: %w", err)
	}
	if out.Output == nil {
		out.Output = []byte{}
	}
	return out.Output, nil
}

// readLimited reads a file of at most limit bytes.
func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return raw, err
}

func writeVerdict(w io.Writer, v coordinator.EvidenceVerdict) error {
	fmt.Fprintf(w, "proved     %s: %s\ndevice     %s\norder      %s (%s)\norder key  %s\n",
		v.Outcome, cell(v.Reason), v.Device, cell(v.Order), v.Kind, base64.StdEncoding.EncodeToString(v.OrderKey))
	for _, id := range v.Wrong {
		fmt.Fprintf(w, "wrong      %s\n", cell(id))
	}
	for _, id := range v.Lost {
		fmt.Fprintf(w, "lost       %s\n", cell(id))
	}
	for _, s := range v.Checked {
		fmt.Fprintf(w, "verified   %s\n", s)
	}
	for _, s := range v.Trusting {
		fmt.Fprintf(w, "not proved %s\n", s)
	}
	return nil
}

// maxShownPenalties is how many of a device are shown with it.
const maxShownPenalties = 5

// writeScore shows what is thought of a device, and why.
func writeScore(row func(name, format string, args ...any), s *api.Score) {
	if s == nil {
		return
	}
	row("integrity", "%.2f", s.Integrity)
	row("reachability", "%.2f", s.Reachability)
	row("compute", "%.2f", s.Compute)
	if s.Distrusted {
		row("trust", "none: it gets no new chunks, and what it holds counts as endangered")
	}
	for i, p := range s.Penalties[:min(len(s.Penalties), maxShownPenalties)] {
		name := ""
		if i == 0 {
			name = "penalties"
		}
		row(name, "%s %s -%.2f (%s), %s", cli.Ago(p.At), p.Figure, p.Amount, p.Cause, p.Audit)
	}
}
