// Package provenance says how a release was built, and from what: an in-toto statement
// (github.com/in-toto/attestation, spec/v1) with the predicate SLSA Provenance v1
// (https://slsa.dev/spec/v1.0/provenance), in a DSSE envelope if the builder signs it.
//
// # What it says
//
//   - subject: the parts of the release, by the SHA-256 of the raw file that devices run.
//     Not the manifest, as that names the statement.
//   - buildDefinition.buildType is [BuildType]. externalParameters is what was asked for
//     ([Parameters]), internalParameters what Go was told for each program ([Program]).
//     resolvedDependencies are the sources by their commit, and every module and package
//     of the bill of materials.
//   - runDetails.builder.id says who built it; byproducts names the bill of materials.
//
// There are no times and no ids of a run in it: who builds the same again gets the same
// bytes, and can compare.
//
// # What it proves
//
// The manifest names the statement by digest, so the release keys sign it as they sign
// the parts. That says who let it out. A signature of its own says who built it: a
// build machine has a key that signs no releases, and who signs releases can insist on
// it ([Open]). Unsigned, it is what the release manager says.
package provenance

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/sbom"
	"github.com/deimos-edge/deimos/wire"
)

const (
	// PredicateType is that of SLSA Provenance v1.
	PredicateType = "https://slsa.dev/provenance/v1"

	// BuildType is how releases are built: "make release", or by hand with
	// "deimos release build". docs/PROTOCOL.md describes it.
	BuildType = "https://github.com/deimos-edge/deimos/release/v1"

	// ByHand is the builder of who names none.
	ByHand = "https://github.com/deimos-edge/deimos/builder/by-hand"

	// Sources is where the sources are, if nothing else is said.
	Sources = "https://github.com/deimos-edge/deimos"

	// MediaType is that of a signed statement, MediaTypeUnsigned of one without an envelope.
	MediaType         = "application/vnd.dsse.envelope.v1+json"
	MediaTypeUnsigned = string(wire.TypeStatement)
)

// Statement is one on a release.
type Statement = wire.StatementOf[Predicate]

// Predicate is SLSA Provenance v1, of which it has what can be known.
type Predicate struct {
	BuildDefinition Definition `json:"buildDefinition"`
	RunDetails      Run        `json:"runDetails"`
}

// Definition is what was built, from what.
type Definition struct {
	BuildType            string             `json:"buildType"`
	ExternalParameters   Parameters         `json:"externalParameters"`
	InternalParameters   map[string]Program `json:"internalParameters,omitempty"` // by name and platform
	ResolvedDependencies []sbom.Material    `json:"resolvedDependencies,omitempty"`
}

// Parameters is what was asked of the build.
type Parameters struct {
	Version            string   `json:"version"`
	Created            string   `json:"created,omitempty"` // RFC 3339
	Source             string   `json:"source"`            // URL of the sources
	Boards             []string `json:"boards,omitempty"`
	From               string   `json:"from,omitempty"`
	Percentage         *float64 `json:"percentage,omitempty"`
	Floor              string   `json:"floor,omitempty"`
	AllowDowngradeFrom []string `json:"allowDowngradeFrom,omitempty"`
	DeltaFrom          []string `json:"deltaFrom,omitempty"` // SHA-256 of the older files that deltas are from, sorted
}

// Program is what the linker has written into a program about how it was built.
type Program struct {
	SHA256   string            `json:"sha256"` // of the file
	Package  string            `json:"package"`
	Go       string            `json:"go"`       // release, as "go1.26.0"
	Settings map[string]string `json:"settings"` // of go build; -ldflags is not in it, as Go leaves it out with -trimpath
}

// Run is who built.
type Run struct {
	Builder    Builder         `json:"builder"`
	Byproducts []wire.Resource `json:"byproducts,omitempty"`
}

// Builder is who built.
type Builder struct {
	ID string `json:"id"` // URI
}

// Options is what the files do not say.
type Options struct {
	Builder string // URI; empty: [ByHand]
	Source  string // URL of the sources; empty: [Sources]
	// Commit is that of git, hex; empty: the one that all programs name, if they do and
	// nothing was changed after it.
	Commit string
}

// New is the statement on the parts of a release. The bill of materials is named if
// the manifest has it attached.
func New(m bundle.Manifest, bill *sbom.Bill, o Options) (Statement, error) {
	if o.Builder == "" {
		o.Builder = ByHand
	}
	if o.Source == "" {
		o.Source = Sources
	}
	d := Definition{BuildType: BuildType, ExternalParameters: parameters(m, o.Source), InternalParameters: map[string]Program{}}
	for _, p := range bill.Programs {
		platform, err := bundle.PlatformIn(p.Info)
		if err != nil {
			return Statement{}, fmt.Errorf("%s: %w", p.Name, err)
		}
		said := Program{SHA256: p.SHA256, Package: p.Info.Path, Go: p.Info.GoVersion, Settings: map[string]string{}}
		for _, s := range p.Info.Settings {
			said.Settings[s.Key] = s.Value
		}
		d.InternalParameters[p.Name+" "+platform.String()] = said
	}
	commit, err := o.commit(d.InternalParameters)
	if err != nil {
		return Statement{}, err
	}
	source := sbom.Material{Name: "source", URI: "git+" + o.Source}
	if commit != "" {
		source.Digest = map[string]string{"gitCommit": commit}
	}
	d.ResolvedDependencies = append([]sbom.Material{source}, bill.Materials()...)
	st := Statement{Type: wire.StatementType, Subject: subjects(m), PredicateType: PredicateType,
		Predicate: Predicate{BuildDefinition: d, RunDetails: Run{Builder: Builder{ID: o.Builder}}}}
	for _, a := range m.Attachments {
		st.Predicate.RunDetails.Byproducts = append(st.Predicate.RunDetails.Byproducts, wire.Resource{Name: a.Name, Digest: map[string]string{"sha256": a.SHA256}})
	}
	return st, nil
}

func parameters(m bundle.Manifest, source string) Parameters {
	p := Parameters{Version: m.Version, Source: source, Boards: m.Boards, From: m.From, Percentage: m.Percentage, Floor: m.Floor, AllowDowngradeFrom: m.AllowDowngradeFrom}
	if !m.Created.IsZero() {
		p.Created = m.Created.UTC().Format(time.RFC3339)
	}
	for _, part := range m.Parts {
		for _, f := range part.Forms {
			if f.Delta() {
				p.DeltaFrom = append(p.DeltaFrom, f.From)
			}
		}
	}
	slices.Sort(p.DeltaFrom)
	p.DeltaFrom = slices.Compact(p.DeltaFrom)
	return p
}

// subjects are the parts, by what they are and for whom.
func subjects(m bundle.Manifest) (all []wire.Resource) {
	for _, p := range m.Parts {
		all = append(all, wire.Resource{Name: p.Name + " " + m.Version + " " + p.Platform.String(), Digest: map[string]string{"sha256": p.SHA256}})
	}
	return all
}

// commit is the one that was named, or that all programs name.
func (o Options) commit(programs map[string]Program) (string, error) {
	if o.Commit != "" {
		if raw, err := hex.DecodeString(o.Commit); err != nil || len(raw) != 20 && len(raw) != 32 {
			return "", fmt.Errorf("%q is no commit of git: it has 40 or 64 hex digits, as \"git rev-parse HEAD\" prints them", o.Commit)
		}
		return o.Commit, nil
	}
	commit, first := "", true
	for _, p := range programs {
		is := p.Settings["vcs.revision"]
		if p.Settings["vcs.modified"] != "false" || !first && is != commit {
			return "", nil
		}
		commit, first = is, false
	}
	return commit, nil
}

// Seal signs a statement with the builder's key, which must be an Ed25519 key. Without
// one (nil) it is the statement as it is. It tells the media type, too.
func Seal(st Statement, key crypto.Signer) (raw []byte, mediaType string, err error) {
	if key == nil {
		raw, err = json.MarshalIndent(st, "", "  ")
		return append(raw, '\n'), MediaTypeUnsigned, err
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, "", fmt.Errorf("a key of type %T cannot sign how a release was built: use Ed25519 (openssl genpkey -algorithm ed25519)", key)
	}
	raw, err = wire.Seal(private, wire.TypeStatement, st)
	return raw, MediaType, err
}

// What [Open] refuses.
var (
	ErrUnsigned = errors.New("the statement on how it was built bears no signature")
	ErrOther    = errors.New("the statement on how it was built is about something else than this release")
)

// Open reads the statement that is attached to a release, and makes sure that it is about
// the parts of that release, all of them and no other, and says of them what the manifest
// says. builder is the key that must have signed it; nil asks for none, and no signature is looked at.
func Open(m bundle.Manifest, raw []byte, mediaType string, builder crypto.PublicKey) (Statement, error) {
	st, err := open(raw, mediaType, builder)
	if err != nil {
		return Statement{}, err
	}
	definition := st.Predicate.BuildDefinition
	switch {
	case st.Type != wire.StatementType || st.PredicateType != PredicateType || definition.BuildType != BuildType:
		return st, fmt.Errorf("%w: it is of type %q, %q, %q", ErrOther, st.Type, st.PredicateType, definition.BuildType)
	case !same(st.Subject, subjects(m)):
		return st, fmt.Errorf("%w: its subjects are not the parts that the manifest names", ErrOther)
	case !same(definition.ExternalParameters, parameters(m, definition.ExternalParameters.Source)):
		return st, fmt.Errorf("%w: it was asked for another version, or for other devices, than the manifest says", ErrOther)
	}
	for _, b := range st.Predicate.RunDetails.Byproducts {
		if a, ok := m.Attachment(b.Name); !ok || a.SHA256 != b.Digest["sha256"] {
			return st, fmt.Errorf("%w: it names another %s than the manifest", ErrOther, b.Name)
		}
	}
	return st, nil
}

// same tells whether two values say the same.
func same(a, b any) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

func open(raw []byte, mediaType string, builder crypto.PublicKey) (st Statement, err error) {
	switch {
	case mediaType == MediaTypeUnsigned && builder != nil:
		return st, ErrUnsigned
	case mediaType == MediaTypeUnsigned:
		if err := json.Unmarshal(raw, &st); err != nil {
			return st, fmt.Errorf("the statement on how it was built cannot be read: %w", err)
		}
		return st, nil
	case mediaType != MediaType:
		return st, fmt.Errorf("the statement on how it was built has the media type %q, which this version does not read", mediaType)
	case builder == nil:
		return wire.Reread[Statement](raw)
	}
	public, ok := builder.(ed25519.PublicKey)
	if !ok {
		return st, fmt.Errorf("a key of type %T has signed no statement on how a release was built: name the builder's Ed25519 key", builder)
	}
	if st, err = wire.OpenAs[Statement](raw, public, wire.TypeStatement); err != nil {
		return st, fmt.Errorf("the statement on how it was built is not this builder's: %w", err)
	}
	return st, nil
}

// Commit is that of the sources; empty if it is not known.
func Commit(st Statement) string {
	deps := st.Predicate.BuildDefinition.ResolvedDependencies
	at := slices.IndexFunc(deps, func(m sbom.Material) bool { return m.Name == "source" })
	if at < 0 {
		return ""
	}
	return deps[at].Digest["gitCommit"]
}
