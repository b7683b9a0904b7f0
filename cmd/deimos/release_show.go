package main

import (
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/provenance"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/ota/sbom"
)

type releaseShowCmd struct {
	Release string `arg:"" optional:"" name:"version|dir" help:"Version, or folder of a bundle (./0.2.0 if it has the name of a version). Default: the newest version."`
	repoFlags
	BuilderKey string `type:"existingfile" placeholder:"FILE" help:"Key of the builder, either half: who else built it is an error."`
	SBOM       bool   `name:"sbom" help:"Print the bill of materials as it is (CycloneDX, JSON)." xor:"raw"`
	Provenance bool   `help:"Print the statement on how it was built as it is (in-toto)." xor:"raw"`
	cli.Output
}

// shown is what "release show -o json" prints.
type shown struct {
	bundle.Manifest
	SHA256     string           `json:"manifest_sha256"`
	Metadata   *shownMetadata   `json:"metadata,omitempty"`   // missing for a bundle, which is not signed yet
	Log        *shownLog        `json:"log,omitempty"`        // missing where there is none
	SBOM       *shownSBOM       `json:"sbom,omitempty"`       // missing if none is attached
	Provenance *shownProvenance `json:"provenance,omitempty"` // missing if none is attached
	// Problems are sentences: what contradicts something else, or is missing.
	Problems []string `json:"problems,omitempty"`
}

type shownMetadata struct {
	Root    int64     `json:"root"`    // version of the root that it is signed by
	Trusted bool      `json:"trusted"` // the root is one that was named, not the repository's own word
	Expires time.Time `json:"expires"`
}

type shownLog struct {
	Record     int64     `json:"record"` // from 0
	Logged     time.Time `json:"logged"`
	Size       int64     `json:"size"`       // records
	Checkpoint string    `json:"checkpoint"` // the signed note that it is proved by
}

type shownSBOM struct {
	SHA256   string `json:"sha256"`
	Programs int    `json:"programs"`
	Modules  int    `json:"modules"`  // of Go
	Packages int    `json:"packages"` // of Debian
	Unknown  int    `json:"unknown"`  // parts of which it says that it does not know what is in them
}

type shownProvenance struct {
	SHA256 string   `json:"sha256"`
	Format string   `json:"media_type"`
	Signed string   `json:"signed"` // "no", "unchecked" if no key was named, "yes" by the key that was
	Who    string   `json:"builder,omitempty"`
	Source string   `json:"source,omitempty"`
	Commit string   `json:"commit,omitempty"`
	Go     []string `json:"go,omitempty"` // releases that its programs were built with
}

// released is a release, and where what is attached to it is read.
type released struct {
	shown
	read func(bundle.Attachment) ([]byte, error)
}

func (r *releaseShowCmd) Run(ctx context.Context, all *commands) error {
	if r.JSON() && (r.SBOM || r.Provenance) {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("--sbom and --provenance print the document as it is, which is JSON already; leave out -o")}
	}
	var builder crypto.PublicKey
	var err error
	if r.BuilderKey != "" {
		if builder, err = repo.LoadPublicKey(r.BuilderKey, nil); err != nil {
			return err
		}
	}
	rel, done, err := r.open(ctx, all)
	if err != nil {
		return err
	}
	defer done()
	switch {
	case r.SBOM:
		return rel.printAttachment(sbomName)
	case r.Provenance:
		return rel.printAttachment(provenanceName)
	}
	rel.lookAtSBOM()
	rel.lookAtProvenance(builder)
	if err := r.Print(rel.shown, rel.describe); err != nil {
		return err
	}
	if n := len(rel.Problems); n > 0 {
		return fmt.Errorf("release %s is not what it says, in %s", rel.Version, cli.Count(n, "place"))
	}
	return nil
}

// open finds the release.
func (r *releaseShowCmd) open(ctx context.Context, all *commands) (*released, func(), error) {
	if r.Release == "" || bundle.CheckVersion(r.Release) == nil {
		return r.published(ctx, all)
	}
	if r.repoFlags != (repoFlags{}) {
		return nil, nil, &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf("%q is taken for the folder of a bundle, which is neither in a repository nor signed: leave out --repo, --keys and --root, or name a version", r.Release)}
	}
	m, raw, err := bundle.Open(r.Release)
	if err != nil {
		return nil, nil, fmt.Errorf("%q is neither a version, as in 1.2.3, nor the folder of a bundle: %w", r.Release, err)
	}
	rel := &released{read: func(a bundle.Attachment) ([]byte, error) { return bundle.ReadAttachment(r.Release, a) }}
	rel.Manifest, rel.SHA256 = m, fmt.Sprintf("%x", sha256.Sum256(raw))
	for _, f := range m.Files() {
		if _, attached := m.Attachment(f.What); attached {
			continue // looked at below
		}
		if err := bundle.CheckFile(r.Release, f); err != nil {
			rel.problem(err)
		}
	}
	return rel, func() {}, nil
}

// published is a release as the repository has it.
func (r *releaseShowCmd) published(ctx context.Context, all *commands) (*released, func(), error) {
	source, err := r.source(all)
	if err != nil {
		return nil, nil, err
	}
	root, err := r.root()
	if err != nil {
		return nil, nil, err
	}
	named := root != nil
	if !named {
		if root, err = firstRoot(ctx, source); err != nil {
			return nil, nil, err
		}
	}
	client, done, err := reader(ctx, source, root)
	if err != nil {
		return nil, nil, err
	}
	rel, err := r.look(ctx, client)
	if err != nil {
		done()
		return nil, nil, err
	}
	rel.Metadata.Trusted = named
	return rel, done, nil
}

// firstRoot is the root that a repository itself says is to be trusted.
func firstRoot(ctx context.Context, source repo.Source) ([]byte, error) {
	f, err := source.Open(ctx, repo.FirstRootFile, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("the update repository has no first root: nothing is published yet, or name the root with --keys or --root")
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, repo.MaxRoot))
}

func (r *releaseShowCmd) look(ctx context.Context, client *repo.Client) (*released, error) {
	version := r.Release
	if version == "" {
		var versions []string
		for _, name := range client.Targets() {
			if v, ok := repo.TargetVersion(name); ok {
				versions = append(versions, v)
			}
		}
		if len(versions) == 0 {
			return nil, errors.New("no release is published yet; \"deimos release publish --bundle DIR\" publishes one")
		}
		version = slices.MaxFunc(versions, bundle.Compare)
	}
	rel := &released{read: func(a bundle.Attachment) ([]byte, error) { return client.Attachment(ctx, a) }}
	var err error
	if rel.Manifest, err = client.Manifest(ctx, repo.TargetName(version)); err != nil {
		return nil, err
	}
	signed := client.Signed(repo.TargetName(version))
	rel.SHA256 = signed.SHA256
	rel.Metadata = &shownMetadata{Root: signed.Root, Expires: signed.Expires}
	proof := client.Log()
	if !proof.Asked {
		return rel, nil
	}
	report, err := client.VerifyLog(ctx, nil)
	if err != nil {
		return nil, err
	}
	rel.Log = &shownLog{Record: proof.Record, Logged: report.Records[proof.Record].Time, Size: report.Size, Checkpoint: proof.Checkpoint}
	return rel, nil
}

func (rel *released) attachment(name string) (bundle.Attachment, []byte, error) {
	a, ok := rel.Attachment(name)
	if !ok {
		return a, nil, fmt.Errorf("%s has no %s attached; \"deimos release build\" makes one for each new release", rel.Version, name)
	}
	raw, err := rel.read(a)
	return a, raw, err
}

func (rel *released) printAttachment(name string) error {
	_, raw, err := rel.attachment(name)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(raw)
	return err
}

func (rel *released) problem(err error) { rel.Problems = append(rel.Problems, err.Error()) }

func (rel *released) lookAtSBOM() {
	a, ok := rel.Attachment(sbomName)
	if !ok {
		return // of an older command line
	}
	_, raw, err := rel.attachment(sbomName)
	if err != nil {
		rel.problem(err)
		return
	}
	bom, err := sbom.Read(raw)
	if err != nil {
		rel.problem(fmt.Errorf("%s: %w", sbomName, err))
		return
	}
	rel.SBOM = &shownSBOM{SHA256: a.SHA256}
	is := map[string]bool{}
	for _, c := range *bom.Components {
		switch {
		case strings.HasPrefix(c.PackageURL, "pkg:golang/"):
			rel.SBOM.Modules++
		case c.PackageURL != "":
			rel.SBOM.Packages++
		case c.Hashes != nil:
			is[(*c.Hashes)[0].Value] = true
			if c.Type != "firmware" {
				rel.SBOM.Programs++
			}
		}
	}
	if bom.Compositions != nil {
		for _, c := range *bom.Compositions {
			rel.SBOM.Unknown += len(*c.Dependencies)
		}
	}
	for _, p := range rel.Parts {
		if !is[p.SHA256] {
			rel.problem(fmt.Errorf("the bill of materials lists no %s for %s with SHA-256 %s, which the release brings", p.Name, p.Platform, cli.Short(p.SHA256)))
		}
	}
}

func (rel *released) lookAtProvenance(builder crypto.PublicKey) {
	a, raw, err := rel.attachment(provenanceName)
	if _, ok := rel.Attachment(provenanceName); !ok {
		if builder != nil {
			rel.problem(err)
		}
		return
	}
	if err != nil {
		rel.problem(err)
		return
	}
	p := &shownProvenance{SHA256: a.SHA256, Format: a.MediaType, Signed: "no"}
	rel.Provenance = p
	st, err := provenance.Open(rel.Manifest, raw, a.MediaType, builder)
	if err != nil {
		rel.problem(err)
		return
	}
	switch {
	case builder != nil:
		p.Signed = "yes"
	case a.MediaType == provenance.MediaType:
		p.Signed = "unchecked"
	}
	p.Who, p.Source, p.Commit = st.Predicate.RunDetails.Builder.ID, st.Predicate.BuildDefinition.ExternalParameters.Source, provenance.Commit(st)
	versions := map[string]bool{}
	for _, program := range st.Predicate.BuildDefinition.InternalParameters {
		versions[program.Go] = true
	}
	p.Go = slices.Sorted(maps.Keys(versions))
}

// describe is for people.
func (rel *released) describe(w io.Writer) error {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-10s %s\n", name, fmt.Sprintf(format, args...))
	}
	if rel.Created.IsZero() {
		line("release", "%s", rel.Version)
	} else {
		line("release", "%s of %s", rel.Version, rel.Created.Format(time.DateOnly))
	}
	if rel.Notes != "" {
		line("notes", "%s", rel.Notes)
	}
	line("boards", "%s", cmp.Or(strings.Join(rel.Boards, ", "), "all"))
	line("from", "%s", cmp.Or(rel.From, "any version"))
	line("floor", "%s", cmp.Or(rel.Floor, "as it was"))
	if len(rel.AllowDowngradeFrom) > 0 {
		line("back from", "%s", strings.Join(rel.AllowDowngradeFrom, ", "))
	}
	if rel.Percentage != nil && *rel.Percentage < 100 {
		line("goes to", "%v%% of devices", *rel.Percentage)
	}
	line("manifest", "SHA-256 %s", rel.SHA256)
	rel.describeOrigin(line)
	fmt.Fprintln(w)
	var rows []string
	for _, p := range rel.Parts {
		for _, f := range p.Forms {
			as := f.Encoding
			if f.Delta() {
				as += " from " + cmp.Or(f.FromVersion, cli.Short(f.From))
			}
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", p.Name, p.Platform, cli.Bytes(p.Size), cli.Short(p.SHA256), as, cli.Bytes(f.Size)))
		}
	}
	if err := cli.Table(w, "PART\tPLATFORM\tSIZE\tSHA256\tFETCHED AS\tFETCHED", rows); err != nil {
		return err
	}
	for _, s := range rel.Problems {
		fmt.Fprintf(w, "✗ %s\n", s)
	}
	return nil
}

func (rel *released) describeOrigin(line func(name, format string, args ...any)) {
	switch m := rel.Metadata; {
	case m == nil:
		line("signed", "not yet: this is a bundle; \"deimos release publish\" signs it")
	case m.Trusted:
		line("signed", "by root %d, until %s", m.Root, m.Expires.UTC().Format(time.RFC3339))
	default:
		line("signed", "by root %d, until %s; the root is the repository's own word, name yours with --keys or --root", m.Root, m.Expires.UTC().Format(time.RFC3339))
	}
	switch l := rel.Log; {
	case l != nil:
		line("log", "record %d, written %s; there are %d", l.Record, l.Logged.Format(time.RFC3339), l.Size)
	case rel.Metadata != nil:
		line("log", "the root names none")
	}
	if s := rel.SBOM; s != nil {
		unknown := ""
		if s.Unknown > 0 {
			unknown = fmt.Sprintf("; what is in %s is not known", cli.Count(s.Unknown, "part"))
		}
		packages := ""
		if s.Packages > 0 {
			packages = fmt.Sprintf(" and %s of Debian", cli.Count(s.Packages, "package"))
		}
		line("made of", "%s of %s%s%s (--sbom)", cli.Count(s.Programs, "program"), cli.Count(s.Modules, "Go module"), packages, unknown)
	} else {
		line("made of", "no bill of materials can be read")
	}
	p := rel.Provenance
	if p == nil || p.Who == "" {
		line("built", "no statement on it can be read")
		return
	}
	commit := "at a commit that is not known"
	if p.Commit != "" {
		commit = "at commit " + p.Commit
	}
	line("built by", "%s, %s (--provenance)", p.Who, map[string]string{"no": "who has not signed it", "unchecked": "signed; --builder-key checks by whom", "yes": "signed with the key that you named"}[p.Signed])
	line("built from", "%s %s, with %s", p.Source, commit, cmp.Or(strings.Join(p.Go, ", "), "an unknown Go"))
}
