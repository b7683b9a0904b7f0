// Package bundle describes a release: which parts it has, for which machines,
// and how a part is packed for the way to the device.
//
// A bundle is a directory:
//
//	manifest.json     the [Manifest]
//	parts/<sha256>    packed parts, each named by the SHA-256 of its bytes
//
// A part is an agent, or a whole firmware: a unified kernel image, for devices that
// were started by our image. A release may have both; a device takes the one for
// how it runs, and passes over parts that it does not know.
//
// The manifest is what release keys sign (as a TUF target, see ota/repo). It
// holds two digests of each part: of the packed form, so that nothing is
// unpacked that was not meant, and of the raw file, so that what runs is what
// was built. Nothing else needs a signature.
//
// A part may have several forms; a device takes one whose encoding it knows and
// passes over the others, so that later releases can add some. There is the whole file
// under zstd (RFC 8878), and there may be deltas (package delta), each from one certain
// file, which its digest names: a device takes one only if that is the file that it runs.
// Of those that it can take it takes the smallest.
//
// Beside the parts stand attachments: what the release is made of (ota/sbom) and how
// it was built (ota/provenance). The manifest names them by digest, as it does parts, so
// its signature covers them. Devices pass over them.
//
// Building is reproducible: the same agents, options and library version give
// the same bytes.
package bundle

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/semver"

	"github.com/deimos-edge/deimos/ota/delta"
)

const (
	// Format is the newest format of a manifest that this code reads.
	Format = 1

	// MaxManifest is the largest manifest that is read, in bytes.
	MaxManifest = 256 << 10

	// MaxPart is the largest raw file a part may claim to be, in bytes.
	MaxPart = 1 << 30

	// MaxPacked is the largest packed part that a coordinator takes, in bytes.
	MaxPacked = 64 << 20

	// MaxAttachment is the largest attachment, in bytes.
	MaxAttachment = 4 << 20

	// PartAgent is the name of the part that is the agent's binary.
	PartAgent = "agent"

	// PartFirmware is the name of the part that is a unified kernel image.
	PartFirmware = "firmware"

	// EncodingZstd is the encoding of a whole file under zstd.
	EncodingZstd = "zstd"
)

// Manifest is one release.
type Manifest struct {
	Format     int       `json:"format"`
	Version    string    `json:"version"`          // semantic version 2.0.0, without "v" and without build metadata
	Created    time.Time `json:"created,omitzero"` // informative
	Notes      string    `json:"notes,omitempty"`
	Boards     []string  `json:"boards,omitempty"`     // board profiles it is for; empty: all
	From       string    `json:"from,omitempty"`       // the oldest version that may update to this one; empty: any
	Percentage *float64  `json:"percentage,omitempty"` // share of devices, 0 to 100; missing: 100
	// Floor is the oldest version that may still be installed once a device has seen
	// this; empty: it stays as it is. AllowDowngradeFrom are the versions that may go
	// back to this one, though it is older, or below the floor.
	Floor              string   `json:"floor,omitempty"`
	AllowDowngradeFrom []string `json:"allow_downgrade_from,omitempty"`
	Parts              []Part   `json:"parts"`
	// Attachments are documents about the release, for people and their tools.
	Attachments []Attachment `json:"attachments,omitempty"`
}

// Part is one file of a release, for one platform.
type Part struct {
	Name string `json:"name"` // [PartAgent], [PartFirmware]
	Platform
	SHA256 string `json:"sha256"` // of the raw file, lower-case hex
	Size   int64  `json:"size"`   // of the raw file, bytes
	Forms  []Form `json:"forms"`
}

// Form is one way a part is packed. It is fetched as "parts/<SHA256>".
type Form struct {
	Encoding string `json:"encoding"`
	SHA256   string `json:"sha256"` // of the packed bytes, lower-case hex
	Size     int64  `json:"size"`   // packed, bytes
	// From is the SHA-256 of the raw file that a delta is applied to, lower-case hex, and
	// FromVersion, for people, the release it is of; both are empty for a whole file.
	From        string `json:"from,omitempty"`
	FromVersion string `json:"from_version,omitempty"`
}

// Delta tells whether a form makes the part out of another file.
func (f Form) Delta() bool { return f.From != "" }

// Attachment is a document about a release. It is not packed, and is fetched as
// "parts/<SHA256>"; no device fetches or counts it.
type Attachment struct {
	Name      string `json:"name"`       // that a file of it would have; a release has it once
	MediaType string `json:"media_type"` // RFC 6838
	SHA256    string `json:"sha256"`     // of its bytes, lower-case hex
	Size      int64  `json:"size"`       // bytes
}

// Check tells, as an [ErrContent], whether these are not the signed bytes.
func (a Attachment) Check(raw []byte) error {
	if sum := sha256.Sum256(raw); int64(len(raw)) != a.Size || hex.EncodeToString(sum[:]) != a.SHA256 {
		return fmt.Errorf("%w: the attachment %s has %d bytes with SHA-256 %.12x…, signed are %d and %.12s…", ErrContent, a.Name, len(raw), sum, a.Size, a.SHA256)
	}
	return nil
}

// Attachment is the one of that name.
func (m Manifest) Attachment(name string) (a Attachment, ok bool) {
	at := slices.IndexFunc(m.Attachments, func(a Attachment) bool { return a.Name == name })
	if at < 0 {
		return a, false
	}
	return m.Attachments[at], true
}

// File is one of those that stand beside the manifest, at [PartPath] of its digest.
type File struct {
	What   string // for people
	SHA256 string
	Size   int64
}

// Files are all that a release needs to be whole: each form of each part, and what is
// attached. One that two of them share is there twice.
func (m Manifest) Files() (all []File) {
	for _, p := range m.Parts {
		for _, f := range p.Forms {
			all = append(all, File{fmt.Sprintf("%s for %s", p.Name, p.Platform), f.SHA256, f.Size})
		}
	}
	for _, a := range m.Attachments {
		all = append(all, File{a.Name, a.SHA256, a.Size})
	}
	return all
}

// Platform is what a binary runs on, in Go's words.
type Platform struct {
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	Variant string `json:"variant,omitempty"` // of arm: GOARM, "5" to "7"
}

func (p Platform) String() string {
	s := p.OS + "/" + p.Arch
	if p.Variant != "" {
		s += "/v" + p.Variant
	}
	return s
}

// Host is the platform that this very binary was built for. A device asks for
// no more than what it is known to run.
func Host() Platform {
	p := Platform{OS: runtime.GOOS, Arch: runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		p.Variant = armVariant(info)
	}
	return p
}

func armVariant(info *debug.BuildInfo) string {
	for _, s := range info.Settings {
		if s.Key == "GOARM" {
			v, _, _ := strings.Cut(s.Value, ",") // "7,hardfloat"
			return v
		}
	}
	return ""
}

// runs tells whether a binary for q runs on p.
func (p Platform) runs(q Platform) bool {
	if p.OS != q.OS || p.Arch != q.Arch {
		return false
	}
	have, err1 := strconv.Atoi(p.Variant)
	need, err2 := strconv.Atoi(q.Variant)
	return err1 != nil || err2 != nil || need <= have
}

// Compare orders two versions: -1, 0 or 1. A version that is none is older than all others.
func Compare(a, b string) int { return semver.Compare("v"+a, "v"+b) }

// Prerelease tells whether a version is one that comes before a release, as 1.2.0-rc.1.
func Prerelease(v string) bool { return semver.Prerelease("v"+v) != "" }

// CheckVersion tells, as an error, why v may not name a release.
func CheckVersion(v string) error {
	if !semver.IsValid("v"+v) || semver.Canonical("v"+v) != "v"+v {
		return fmt.Errorf("%q is no version: it must look like 1.2.3 or 1.2.3-rc.1", v)
	}
	return nil
}

// ErrNewerFormat is returned for a manifest from the future.
var ErrNewerFormat = errors.New("the bundle has a newer format than this agent reads; update to a release in between first")

// Parse reads a manifest and checks that it makes sense. It must have been
// verified before.
func Parse(raw []byte) (Manifest, error) {
	var head struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return Manifest{}, fmt.Errorf("the manifest cannot be read: %w", err)
	}
	if head.Format > Format {
		return Manifest{}, fmt.Errorf("format %d: %w", head.Format, ErrNewerFormat)
	}
	var m Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return Manifest{}, fmt.Errorf("the manifest cannot be read: %w", err)
	}
	return m, m.check()
}

func (m Manifest) check() error {
	if m.Format != Format {
		return fmt.Errorf("the manifest's format is %d, expected %d", m.Format, Format)
	}
	if err := CheckVersion(m.Version); err != nil {
		return err
	}
	if m.From != "" {
		if err := CheckVersion(m.From); err != nil {
			return fmt.Errorf("from: %w", err)
		}
	}
	if m.Floor != "" {
		if err := CheckVersion(m.Floor); err != nil {
			return fmt.Errorf("floor: %w", err)
		}
		if Compare(m.Floor, m.Version) > 0 {
			return fmt.Errorf("the floor is %s, above the release itself, %s", m.Floor, m.Version)
		}
	}
	for _, v := range m.AllowDowngradeFrom {
		if err := CheckVersion(v); err != nil {
			return fmt.Errorf("allow_downgrade_from: %w", err)
		}
	}
	if m.Percentage != nil && !(*m.Percentage >= 0 && *m.Percentage <= 100) {
		return fmt.Errorf("the percentage is %v, must be 0 to 100", *m.Percentage)
	}
	if len(m.Parts) == 0 {
		return errors.New("the manifest names no parts")
	}
	for _, p := range m.Parts {
		if err := p.check(); err != nil {
			return fmt.Errorf("part %s for %s: %w", p.Name, p.Platform, err)
		}
	}
	names := map[string]bool{}
	for _, a := range m.Attachments {
		if names[a.Name] {
			return fmt.Errorf("two attachments have the name %q", a.Name)
		}
		names[a.Name] = true
		if err := a.check(); err != nil {
			return fmt.Errorf("attachment %q: %w", a.Name, err)
		}
	}
	return nil
}

func (a Attachment) check() error {
	if a.Name == "" || strings.ContainsAny(a.Name, `/\`) || strings.HasPrefix(a.Name, ".") || a.MediaType == "" {
		return errors.New("a name that a file can have and a media type are needed")
	}
	if a.Size > MaxAttachment {
		return fmt.Errorf("%d bytes are too many (limit %d)", a.Size, MaxAttachment)
	}
	return checkBlob(a.SHA256, a.Size)
}

func (p Part) check() error {
	if p.Name == "" || p.OS == "" || p.Arch == "" {
		return errors.New("a name, an operating system and an architecture are needed")
	}
	if err := checkBlob(p.SHA256, p.Size); err != nil {
		return err
	}
	for _, f := range p.Forms {
		if err := f.check(); err != nil {
			return fmt.Errorf("form %s: %w", f.Encoding, err)
		}
	}
	return nil
}

func (f Form) check() error {
	if err := checkBlob(f.SHA256, f.Size); err != nil {
		return err
	}
	switch {
	case f.From != "":
		if err := checkSum(f.From); err != nil {
			return fmt.Errorf("from: %w", err)
		}
		if f.Encoding == EncodingZstd {
			return errors.New("a whole file is from none")
		}
	case delta.Known(f.Encoding):
		return errors.New("a delta is from a file, and this does not say from which")
	}
	if f.FromVersion != "" {
		if err := CheckVersion(f.FromVersion); err != nil {
			return fmt.Errorf("from_version: %w", err)
		}
	}
	return nil
}

func checkSum(sum string) error {
	if raw, err := hex.DecodeString(sum); err != nil || len(raw) != sha256.Size || strings.ToLower(sum) != sum {
		return fmt.Errorf("%q is no SHA-256 in lower-case hex", sum)
	}
	return nil
}

func checkBlob(sum string, size int64) error {
	if err := checkSum(sum); err != nil {
		return err
	}
	if size <= 0 || size > MaxPart {
		return fmt.Errorf("a size of %d bytes is not allowed (limit %d)", size, MaxPart)
	}
	return nil
}

// Device is who asks whether a release is for it.
type Device struct {
	ID       string
	Board    string
	Version  string // that runs now
	Floor    string // the oldest version that may be installed; "" for none
	Part     string // by which it is updated; "" for [PartAgent]
	Platform Platform
	Runs     string // SHA-256 of the raw file that runs, lower-case hex; "" if unknown: no delta is for it
}

// Why a release is not for a device.
var (
	ErrBoard     = errors.New("the release is for other boards")
	ErrPlatform  = errors.New("the release has nothing for this platform")
	ErrFrom      = errors.New("this version is too old to update in one step")
	ErrSame      = errors.New("that version already runs")
	ErrDowngrade = errors.New("the release is older than what runs")
	ErrFloor     = errors.New("the release is older than what this device may go back to")
	ErrRollout   = errors.New("this device is not in the rollout yet")
)

// For tells whether the release is for d, which part d should install, and by which
// forms it can, the smallest first: one at least. The error wraps one of those above.
func (m Manifest) For(d Device) (Part, []Form, error) {
	none := func(err error, format string, args ...any) (Part, []Form, error) {
		return Part{}, nil, fmt.Errorf("%w: %s", err, fmt.Sprintf(format, args...))
	}
	switch c := Compare(m.Version, d.Version); {
	case c == 0:
		return none(ErrSame, "%s", m.Version)
	case m.GoesBackFrom(d.Version):
	case c < 0:
		return none(ErrDowngrade, "%s is older than %s", m.Version, d.Version)
	case d.Floor != "" && Compare(m.Version, d.Floor) < 0:
		return none(ErrFloor, "%s is older than %s", m.Version, d.Floor)
	}
	if !m.fitsBoard(d.Board) {
		return none(ErrBoard, "%s is for %s, this is %s", m.Version, strings.Join(m.Boards, ", "), d.Board)
	}
	if m.From != "" && Compare(d.Version, m.From) < 0 {
		return none(ErrFrom, "%s installs from %s on, this is %s", m.Version, m.From, d.Version)
	}
	if m.Percentage != nil && RolloutPoint(m.Version, d.ID) >= *m.Percentage {
		return none(ErrRollout, "%s goes to %v%% of devices", m.Version, *m.Percentage)
	}
	name := cmp.Or(d.Part, PartAgent)
	part, ok := m.Select(name, d.Platform)
	if !ok {
		return none(ErrPlatform, "%s has no %s for %s", m.Version, name, d.Platform)
	}
	return part, part.formsFor(d.Runs), nil
}

// GoesBackFrom tells whether a signed exception lets that version go back to this one.
func (m Manifest) GoesBackFrom(version string) bool {
	return slices.Contains(m.AllowDowngradeFrom, version)
}

func (m Manifest) fitsBoard(board string) bool {
	for _, b := range m.Boards {
		if b == board {
			return true
		}
	}
	return len(m.Boards) == 0
}

// Select finds the part of that name that suits p best, and that this code can unpack
// whatever runs.
func (m Manifest) Select(name string, p Platform) (best Part, found bool) {
	for _, part := range m.Parts {
		if part.Name != name || !p.runs(part.Platform) || !slices.ContainsFunc(part.Forms, Form.whole) {
			continue
		}
		if !found || part.Variant > best.Variant {
			best, found = part, true
		}
	}
	return best, found
}

func (f Form) whole() bool { return f.Encoding == EncodingZstd }

// formsFor are the forms that make the part where that file runs, the smallest first.
func (p Part) formsFor(runs string) (forms []Form) {
	for _, f := range p.Forms {
		if f.whole() || runs != "" && f.From == runs && delta.Known(f.Encoding) {
			forms = append(forms, f)
		}
	}
	slices.SortStableFunc(forms, func(a, b Form) int { return cmp.Compare(a.Size, b.Size) })
	return forms
}

// RolloutPoint is where a device stands in the rollout of a version, from 0 up
// to but not including 100: the first 8 bytes of
// SHA-256(version, 0x00, device), scaled. The device is in if the release's
// percentage is above it. A device stands elsewhere for each version, so that
// it is not always the same ones that go first.
func RolloutPoint(version, device string) float64 {
	var text [128]byte // without an allocation: coordinators ask for each device of a fleet
	sum := sha256.Sum256(append(append(append(text[:0], version...), 0), device...))
	const bits = 53 // what a float64 holds exactly
	return float64(binary.BigEndian.Uint64(sum[:])>>(64-bits)) / (1 << bits) * 100
}
