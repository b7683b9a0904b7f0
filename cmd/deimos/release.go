package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

type releaseCmd struct {
	Keys     releaseKeysCmd     `cmd:"" help:"Keys that sign releases. Keep them away from the coordinator."`
	Build    releaseBuildCmd    `cmd:"" help:"Pack agent binaries and firmware images into a bundle."`
	Show     releaseShowCmd     `cmd:"" help:"What a release contains, what it is made of, who built it, and where it stands in the log."`
	Publish  releasePublishCmd  `cmd:"" help:"Sign a bundle into the update repository and upload it."`
	Sign     releaseSignCmd     `cmd:"" help:"Look at what is to be signed on another machine, and add your signature."`
	Log      releaseLogCmd      `cmd:"" help:"The log that every release stands in."`
	Offer    releaseOfferCmd    `cmd:"" help:"Offer a published release to devices, to all of them at once."`
	Campaign releaseCampaignCmd `cmd:"" help:"Bring a published release to devices in phases, which stops by itself if they fail."`
	Status   releaseStatusCmd   `cmd:"" help:"Which versions the fleet runs, and how campaigns go."`
}

type releaseBuildCmd struct {
	Version    string   `required:"" help:"Version of the release, as in 1.2.3."`
	Agent      []string `type:"existingfile" placeholder:"FILE" help:"Agent binary; one for each platform. The platform is read from the binary."`
	Firmware   []string `type:"existingfile" placeholder:"FILE" help:"Firmware, a deimos_VERSION.efi of \"make image\", for devices that run our image. Version and platform are read from it."`
	Out        string   `required:"" type:"path" placeholder:"DIR" help:"Folder for the bundle."`
	Notes      string   `help:"What is new, for owners."`
	Board      []string `help:"Board that it fits; may be repeated. Default: all."`
	From       string   `help:"Oldest version that can be updated to it." placeholder:"VERSION"`
	Percentage float64  `default:"100" help:"Share of the fleet that takes it (${default})."`
	Floor      string   `placeholder:"VERSION" help:"Oldest version that may still be installed by who has seen this release. Default: as it was."`
	DownFrom   []string `name:"allow-downgrade-from" placeholder:"VERSION" help:"A newer version that may go back to this one; may be repeated. Without it, none may."`
	DeltaFrom  []string `type:"existingdir" placeholder:"DIR" help:"Bundle of a release that devices run now; may be repeated. Who runs it fetches only what differs. Takes about a minute for each part."`
	provenanceFlags
	cli.Output
}

func (releaseBuildCmd) Help() string {
	return `  deimos release build --version 0.2.0 --agent deimos-agent-arm64 --out r-0.2.0
  deimos release build --version 0.2.1 --agent deimos-agent-arm64 --out r-0.2.1 --delta-from r-0.2.0 --delta-from r-0.1.9

For each part of the bundles of --delta-from it makes a delta in two ways and measures them. The smaller one is kept if it
has less than 80% of the bytes of the whole part. A device uses a delta only if it runs the very file that it is from.`
}

func (r *releaseBuildCmd) Run(ctx context.Context) error {
	o := bundle.BuildOptions{Version: r.Version, Notes: r.Notes, Boards: r.Board, From: r.From, Percentage: &r.Percentage, Floor: r.Floor, DownFrom: r.DownFrom, Firmwares: r.Firmware}
	if len(r.Agent)+len(r.Firmware) == 0 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("a release has --agent files, --firmware files or both")}
	}
	for _, path := range r.Agent {
		o.Agents = append(o.Agents, bundle.Agent{Path: path})
	}
	attached, err := r.attachments(r.Agent, r.Firmware)
	if err != nil {
		return err
	}
	o.Created, o.Attach = r.Created, attached.attach
	var measured []bundle.Measured
	o.DeltaFrom, o.Measured = r.DeltaFrom, func(m bundle.Measured) { measured = append(measured, m) }
	clearLine := func() {}
	if cli.Terminal(os.Stderr) {
		const anew = "\r\x1b[K"
		o.Progress = func(what string, done float64) {
			line := fmt.Sprintf("%3.0f%% %s", 100*done, what)
			fmt.Fprint(os.Stderr, anew, line[:min(len(line), cli.Columns(os.Stderr)-1)])
		}
		clearLine = func() { fmt.Fprint(os.Stderr, anew) }
	}
	m, err := bundle.Build(ctx, r.Out, o)
	clearLine()
	if err != nil {
		return err
	}
	_, raw, err := bundle.Open(r.Out)
	if err != nil {
		return err
	}
	out := built{m, fmt.Sprintf("%x", sha256.Sum256(raw)), attached.lacks(), measured}
	return r.Print(out, func(w io.Writer) error {
		var rows []string
		for _, p := range m.Parts {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s", p.Name, p.Platform, cli.Bytes(p.Size), cli.Short(p.SHA256)))
		}
		fmt.Fprintf(w, "release %s in %s\n", m.Version, r.Out)
		if err := cli.Table(w, "PART\tPLATFORM\tSIZE\tSHA256", rows); err != nil {
			return err
		}
		if err := tellMeasured(w, measured); err != nil {
			return err
		}
		fmt.Fprintf(w, "manifest %s\n", out.SHA256)
		for _, s := range out.Lacks {
			fmt.Fprintln(w, s)
		}
		return nil
	})
}

// built is what "release build -o json" prints.
type built struct {
	bundle.Manifest
	SHA256 string   `json:"manifest_sha256"`
	Lacks  []string `json:"lacks,omitempty"` // sentences: what the attachments do not tell

	Measured []bundle.Measured `json:"measured,omitempty"` // deltas
}

// tellMeasured is a table of the deltas that were made, each beside the whole part.
func tellMeasured(w io.Writer, measured []bundle.Measured) error {
	if len(measured) == 0 {
		return nil
	}
	var rows []string
	for _, d := range measured {
		whole := d.Part.Forms[0].Size
		kept := ""
		if d.Kept {
			kept = "kept"
		}
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%.1f%% of %s\t%s", d.Part.Name, d.Part.Platform, d.Form.FromVersion, d.Form.Encoding,
			cli.Bytes(d.Form.Size), 100*float64(d.Form.Size)/float64(whole), cli.Bytes(whole), kept))
	}
	fmt.Fprintln(w)
	return cli.Table(w, "DELTA\tPLATFORM\tFROM\tENCODING\tFETCHED\tSHARE\t", rows)
}

type releasePublishCmd struct {
	Keys   string `required:"" type:"existingdir" placeholder:"DIR" help:"Folder of the keys."`
	Repo   string `required:"" type:"path" placeholder:"DIR" help:"Folder of the update repository; made if missing."`
	Bundle string `type:"existingdir" placeholder:"DIR" help:"Bundle to add. Without one, the metadata is signed afresh."`
	Local  bool   `help:"Do not upload."`

	With     []string `type:"existingfile" placeholder:"FILE" help:"Further key that signs, from elsewhere; may be repeated."`
	Unsigned string   `type:"path" placeholder:"DIR" help:"If keys are elsewhere: folder for what their holders sign with \"deimos release sign\". Nothing is published then."`
	Signed   []string `type:"existingfile" placeholder:"FILE" help:"What was signed there; may be repeated. Name the bundle again."`
	passphraseFlags
	cli.Output
}

func (r *releasePublishCmd) Run(ctx context.Context, all *commands) error {
	var c *api.Client
	if !r.Local {
		var err error
		if c, err = all.client(); err != nil {
			return err
		}
	}
	signers, err := r.signers(r.With)
	if err != nil {
		return err
	}
	p, err := repo.Publish(repo.PublishOptions{Keys: r.Keys, Repo: r.Repo, Bundle: r.Bundle, Now: time.Now(),
		Signers: signers, Passphrase: r.ask, Unsigned: r.Unsigned, Signed: r.Signed})
	if err != nil {
		return err
	}
	out := published{Published: p}
	if !r.Local && p.Awaits == "" {
		if out.Upload, err = upload(ctx, c, r.Repo); err != nil {
			return err
		}
	}
	return r.Print(out, func(w io.Writer) error {
		if p.Awaits != "" {
			_, err := fmt.Fprintf(w, "nothing is published yet: %s\nNext, on the machines of those who have these keys: deimos release sign %s --key FILE\n"+
				"Then: this command again, with --signed %s\n", p.Missing, filepath.Base(p.Awaits), strings.Join(append(slices.Clone(r.Signed), p.Awaits), " --signed "))
			return err
		}
		if p.Target != "" {
			fmt.Fprintf(w, "signed %s\n", p.Target)
		}
		if u := out.Upload; u != nil {
			fmt.Fprintf(w, "uploaded %s; the coordinator had %s already\n", u.Sent, u.Skipped)
		}
		_, err := fmt.Fprintf(w, "the metadata expires at %s; publish again before\n", p.Expires.UTC().Format(time.RFC3339))
		return err
	})
}

// published is what "release publish -o json" prints.
type published struct {
	repo.Published
	Upload *uploaded `json:"upload,omitempty"` // missing with --local
}

// uploaded is what of a repository was sent, and what was not, as the coordinator
// has the same bytes.
type uploaded struct {
	Sent    amount `json:"sent"`
	Skipped amount `json:"skipped"`
}

type amount struct {
	Files int   `json:"files"`
	Bytes int64 `json:"bytes"`
}

func (a *amount) add(data []byte) {
	a.Files++
	a.Bytes += int64(len(data))
}

func (a amount) String() string {
	return fmt.Sprintf("%s (%s)", cli.Count(a.Files, "file"), cli.Bytes(a.Bytes))
}

// upload sends to the coordinator what it lacks of a repository, in the order in
// which it stays consistent for readers: what is named before what names it. What is
// there is told by the coordinator, which has found the digests itself; what is sent
// it checks again.
func upload(ctx context.Context, c *api.Client, dir string) (*uploaded, error) {
	files, err := repoFiles(dir)
	if err != nil {
		return nil, fmt.Errorf("the repository cannot be read: %w", err)
	}
	list, err := c.RepoFiles(ctx)
	if err != nil {
		return nil, fmt.Errorf("what the coordinator has of the repository: %w", err)
	}
	there := make(map[string]string, len(list)) // SHA-256 by path
	for _, f := range list {
		there[f.Path] = f.SHA256
	}
	u := new(uploaded)
	again := len(files) // what comes from here on was refused before
	for i := 0; i < len(files); i++ {
		path := files[i]
		raw, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(path)))
		if err != nil {
			return nil, fmt.Errorf("the repository cannot be read: %w", err)
		}
		if sum := sha256.Sum256(raw); there[path] == hex.EncodeToString(sum[:]) {
			u.Skipped.add(raw)
			continue
		}
		err = c.PutRepoFile(ctx, path, raw)
		// The key that it is judged by may be lost, or a thief's, who has gone far ahead: then
		// a new root makes it good, after which it is sent again.
		if refused := new(api.Error); i < again && errors.As(err, &refused) && (refused.Code == "not_signed" || refused.Code == "older") && rootLacks(files[i:again], there) {
			files = append(files, path)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("upload of %s: %w", path, err)
		}
		u.Sent.add(raw)
	}
	return u, nil
}

// rootLacks tells whether the coordinator has not, by name, one of the roots among files.
func rootLacks(files []string, there map[string]string) bool {
	return slices.ContainsFunc(files, func(file string) bool { return repo.IsRoot(file) && there[file] == "" })
}

// repoFiles are the files that belong to a repository, in the order of an upload.
// What begins with a dot is a lock, or left of a write that was cut.
func repoFiles(dir string) (files []string, err error) {
	for _, room := range []string{"parts", "targets", "log", "metadata"} {
		err := filepath.WalkDir(filepath.Join(dir, room), func(path string, d fs.DirEntry, err error) error {
			if room == "log" && errors.Is(err, fs.ErrNotExist) {
				return nil // of a fleet whose root names none
			}
			if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".") {
				return err
			}
			rel, err := filepath.Rel(dir, path)
			files = append(files, filepath.ToSlash(rel))
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(files, repo.Compare)
	return files, nil
}

type releaseOfferCmd struct {
	Version string `arg:"" help:"Published version."`
	changed
	Wait duration `placeholder:"DURATION" help:"Wait up to this long for the outcome; exit code 75 if there is none by then."`
	cli.Output
}

func (r *releaseOfferCmd) Run(ctx context.Context, all *commands) error {
	sel, err := r.selector()
	if err != nil {
		return err
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	q := api.OfferRequest{Version: r.Version, Target: repo.TargetName(r.Version), Selector: sel}
	list, err := c.Offer(ctx, q)
	if err != nil {
		return err
	}
	if r.Wait > 0 {
		wait, cancel := context.WithTimeout(ctx, time.Duration(r.Wait))
		defer cancel()
		for i, o := range list {
			if list[i], err = awaitOrder(ctx, wait, c, o, nil); err != nil {
				return err
			}
		}
	}
	if err := r.Print(list, func(w io.Writer) error {
		var rows []string
		for _, o := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s", o.Order.Device, o.Order.ID, o.State, o.Result.Reason))
		}
		return cli.Table(w, "DEVICE\tORDER\tSTATE\tREASON", rows)
	}); err != nil {
		return err
	}
	open := 0
	for _, o := range list {
		if o.State.Terminal() && o.State != wire.Succeeded {
			return fmt.Errorf("device %s did not take %s: %s", o.Order.Device, r.Version, o.Result.Reason)
		}
		if !o.State.Terminal() {
			open++
		}
	}
	if r.Wait > 0 && open > 0 {
		return &cli.Error{Code: cli.ExitNotYet, Err: fmt.Errorf("after %s there is no answer yet from %s of %d; \"deimos order list --kind %s\" shows how it goes on",
			r.Wait, cli.Count(open, "device"), len(list), wire.KindUpdateInstall)}
	}
	return nil
}
