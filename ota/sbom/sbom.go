// Package sbom says what a release or a firmware is made of: a bill of materials, as
// CycloneDX 1.6 in JSON (https://cyclonedx.org/docs/1.6/json/).
//
// What a Go program is made of it says itself: the linker writes into it which modules,
// in which versions and with which sums, are in it (debug/buildinfo). So the bill is read
// from the very files that devices run, and from nothing beside them. A firmware cannot
// be asked: who makes one writes its bill beside it ([Beside]), which names it by digest.
//
// A bill has one component for each program, module and package, and says which of them
// is in which. Modules are known by their package URL (github.com/package-url/purl-spec),
// which is what databases of vulnerabilities ask for. The SHA-256 of a module is that of
// go.sum, in hex, as cyclonedx-gomod has it.
//
// The same files give the same bytes: sorted, the serial number made of the content, the
// time that of the release or none.
package sbom

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/wire"
)

// MediaType is that of a bill.
const MediaType = "application/vnd.cyclonedx+json; version=1.6"

// maxBill bounds a bill that is read, in bytes.
const maxBill = 4 << 20

// Bill is what something is made of.
type Bill struct {
	subject    cdx.Component
	components map[string]cdx.Component   // by bom-ref
	within     map[string]map[string]bool // of each, what is in it
	unknown    []string                   // of what is in these, nothing is known
	Programs   []Program
}

// Program is a Go program that is in a bill.
type Program struct {
	Name   string
	SHA256 string
	Info   *debug.BuildInfo
}

// New begins the bill of a release.
func New(name, version string) *Bill {
	return begin(cdx.Component{Type: cdx.ComponentTypeApplication, BOMRef: name + "@" + version, Name: name, Version: version})
}

// NewFirmware begins the bill of a firmware, a file.
func NewFirmware(file, version string) (*Bill, error) {
	sum, err := slot.Digest(file)
	if err != nil {
		return nil, err
	}
	return begin(ofFirmware(version, sum)), nil
}

func ofFirmware(version, sum string) cdx.Component {
	const name = "deimos-firmware"
	return cdx.Component{Type: cdx.ComponentTypeFirmware, BOMRef: name + "@sha256:" + sum, Name: name, Version: version, Hashes: sha(sum)}
}

func begin(subject cdx.Component) *Bill {
	return &Bill{subject: subject, components: map[string]cdx.Component{}, within: map[string]map[string]bool{subject.BOMRef: {}}}
}

// add puts a component into another; one that is there already stays.
func (b *Bill) add(into string, c cdx.Component) {
	b.components[c.BOMRef] = c
	if b.within[c.BOMRef] == nil {
		b.within[c.BOMRef] = map[string]bool{}
	}
	b.within[into][c.BOMRef] = true
}

// AddProgram adds a Go program, and all modules that are in it.
func (b *Bill) AddProgram(file, version string) error {
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return fmt.Errorf("what %s is made of: %w", file, err)
	}
	platform, err := bundle.PlatformIn(info)
	if err != nil {
		return fmt.Errorf("what %s is made of: %w", file, err)
	}
	sum, err := slot.Digest(file)
	if err != nil {
		return err
	}
	name := path.Base(info.Path)
	c := cdx.Component{
		Type: cdx.ComponentTypeApplication, BOMRef: name + "@sha256:" + sum, Name: name, Version: version, Hashes: sha(sum),
		Properties: &[]cdx.Property{{Name: "deimos:platform", Value: platform.String()}},
	}
	b.add(b.subject.BOMRef, c)
	b.Programs = append(b.Programs, Program{name, sum, info})
	goVersion, _, _ := strings.Cut(strings.TrimPrefix(info.GoVersion, "go"), " ") // "go1.26.0 X:experiment"
	b.add(c.BOMRef, library("std", goVersion, "pkg:golang/std@"+escape(goVersion)))
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		dep := library(m.Path, m.Version, "pkg:golang/"+m.Path+"@"+escape(m.Version))
		if dep.Hashes, err = goSum(m.Sum); err != nil {
			return fmt.Errorf("%s: the sum of %s: %w", file, m.Path, err)
		}
		b.add(c.BOMRef, dep)
	}
	return nil
}

func library(name, version, purl string) cdx.Component {
	return cdx.Component{Type: cdx.ComponentTypeLibrary, BOMRef: purl, Name: name, Version: version, PackageURL: purl}
}

// escape is a version in a package URL.
func escape(version string) string { return strings.ReplaceAll(version, "+", "%2B") }

// goSum is a line of go.sum, "h1:" and base64, as a hash; nil where there is none, as of
// a module that was replaced by a folder.
func goSum(sum string) (*[]cdx.Hash, error) {
	if sum == "" {
		return nil, nil
	}
	text, ok := strings.CutPrefix(sum, "h1:")
	raw, err := base64.StdEncoding.DecodeString(text)
	if !ok || err != nil || len(raw) != sha256.Size {
		return nil, fmt.Errorf("%q is none of go.sum", sum)
	}
	return sha(hex.EncodeToString(raw)), nil
}

func sha(sum string) *[]cdx.Hash { return &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: sum}} }

// Debian is one of Debian's packages.
type Debian struct {
	Name, Version, Arch string
	SHA256              string // of the .deb, lower-case hex
}

// AddDebian adds one of Debian's packages.
func (b *Bill) AddDebian(p Debian) {
	c := library(p.Name, p.Version, "pkg:deb/debian/"+p.Name+"@"+escape(p.Version)+"?arch="+p.Arch)
	c.Hashes = sha(p.SHA256)
	b.add(b.subject.BOMRef, c)
}

// Beside is where the bill of a firmware stands.
func Beside(firmware string) string { return strings.TrimSuffix(firmware, ".efi") + ".cdx.json" }

// AddFirmware adds a firmware, and what the bill beside it says. Without one, the bill
// says that it does not know what is in the firmware; known tells. A bill of another
// firmware is an error.
func (b *Bill) AddFirmware(file, version string) (known bool, err error) {
	sum, err := slot.Digest(file)
	if err != nil {
		return false, err
	}
	c := ofFirmware(version, sum)
	b.add(b.subject.BOMRef, c)
	beside := Beside(file)
	raw, err := durable.ReadFile(beside, maxBill)
	if errors.Is(err, os.ErrNotExist) {
		b.unknown = append(b.unknown, c.BOMRef)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	bom, err := Read(raw)
	if err != nil {
		return false, fmt.Errorf("%s: %w", beside, err)
	}
	if bom.Metadata.Component.BOMRef != c.BOMRef {
		return false, fmt.Errorf("%s is the bill of materials of another firmware than %s; make the image again, which writes both", beside, file)
	}
	for _, dep := range *bom.Components {
		b.components[dep.BOMRef] = dep
	}
	for _, d := range *bom.Dependencies {
		if b.within[d.Ref] == nil {
			b.within[d.Ref] = map[string]bool{}
		}
		if d.Dependencies != nil {
			for _, ref := range *d.Dependencies {
				b.within[d.Ref][ref] = true
			}
		}
	}
	return true, nil
}

// Has tells whether a file of this SHA-256 is in the bill.
func (b *Bill) Has(sum string) bool {
	for _, c := range b.components {
		if c.Hashes != nil && c.PackageURL == "" && (*c.Hashes)[0].Value == sum {
			return true
		}
	}
	return false
}

// Material is something that a program is made of, as an in-toto statement names it
// (spec/v1/resource_descriptor.md).
type Material struct {
	Name string `json:"name,omitempty"`
	URI  string `json:"uri"`
	// Digest is, of a Go module, the hash of go.sum, which in-toto calls [wire.DirHash];
	// of a file "sha256"; of sources "gitCommit". Hex, empty if it is not known.
	Digest map[string]string `json:"digest,omitempty"`
}

// Materials are the modules and packages; they have no names, but URLs.
func (b *Bill) Materials() []Material {
	var all []Material
	for _, ref := range slices.Sorted(maps.Keys(b.components)) {
		c := b.components[ref]
		if c.PackageURL == "" {
			continue
		}
		r := Material{URI: c.PackageURL}
		if c.Hashes != nil {
			kind := wire.DirHash
			if !strings.HasPrefix(c.PackageURL, "pkg:golang/") {
				kind = "sha256"
			}
			r.Digest = map[string]string{kind: (*c.Hashes)[0].Value}
		}
		all = append(all, r)
	}
	return all
}

// JSON is the document. created may be zero.
func (b *Bill) JSON(created time.Time) ([]byte, error) {
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Component: &b.subject}
	if !created.IsZero() {
		bom.Metadata.Timestamp = created.UTC().Format(time.RFC3339)
	}
	components := slices.SortedFunc(maps.Values(b.components), func(x, y cdx.Component) int { return cmp.Compare(x.BOMRef, y.BOMRef) })
	bom.Components = &components
	var within []cdx.Dependency
	for _, ref := range slices.Sorted(maps.Keys(b.within)) {
		refs := slices.Sorted(maps.Keys(b.within[ref]))
		within = append(within, cdx.Dependency{Ref: ref, Dependencies: &refs})
	}
	bom.Dependencies = &within
	if len(b.unknown) > 0 {
		slices.Sort(b.unknown)
		var refs []cdx.BOMReference
		for _, ref := range b.unknown {
			refs = append(refs, cdx.BOMReference(ref))
		}
		bom.Compositions = &[]cdx.Composition{{Aggregate: cdx.CompositionAggregateUnknown, Dependencies: &refs}}
	}
	var plain, out bytes.Buffer
	if err := encode(&plain, bom); err != nil {
		return nil, err
	}
	bom.SerialNumber = serial(plain.Bytes())
	err := encode(&out, bom)
	return out.Bytes(), err
}

func encode(w io.Writer, bom *cdx.BOM) error {
	return cdx.NewBOMEncoder(w, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(bom, cdx.SpecVersion1_6)
}

// serial is a UUID of version 8 (RFC 9562, section 5.8) made of the SHA-256 of the
// document without it.
func serial(document []byte) string {
	u := sha256.Sum256(document)
	u[6], u[8] = u[6]&0x0f|0x80, u[8]&0x3f|0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// Read reads a bill as [Bill.JSON] writes one: components, what is in which, and a subject
// are there.
func Read(raw []byte) (*cdx.BOM, error) {
	bom := new(cdx.BOM)
	if err := cdx.NewBOMDecoder(bytes.NewReader(raw), cdx.BOMFileFormatJSON).Decode(bom); err != nil {
		return nil, fmt.Errorf("it is no bill of materials in CycloneDX: %w", err)
	}
	if bom.Metadata == nil || bom.Metadata.Component == nil || bom.Components == nil || bom.Dependencies == nil {
		return nil, errors.New("it is no bill of materials of ours: it lacks what it is of, or what that is made of")
	}
	return bom, nil
}
