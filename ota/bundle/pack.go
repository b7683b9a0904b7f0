package bundle

import (
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"sort"
	"time"

	"github.com/google/renameio/v2"
	"github.com/klauspost/compress/zstd"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/delta"
	"github.com/deimos-edge/deimos/ota/slot/firmware"
)

const (
	manifestFile = "manifest.json"
	partsDir     = "parts"

	// windowSize bounds what a device needs to unpack; a larger one gains
	// under 1% on an agent of 15 MB.
	windowSize = 4 << 20
)

// BuildOptions describes a release to build.
type BuildOptions struct {
	Version    string
	Created    time.Time // leave zero, or set to the commit's time, to stay reproducible
	Notes      string
	Boards     []string
	From       string
	Percentage *float64
	Floor      string   // see [Manifest]
	DownFrom   []string // versions that may go back to this one
	Agents     []Agent
	Firmwares  []string // unified kernel images, files; each says itself for which machine it is
	Fast       bool     // quarter the time to build, 10% more bytes: for trying things out
	// Attach makes what is attached, once the parts are packed; nil for nothing.
	Attach func(Manifest) ([]Document, error)

	// DeltaFrom are directories of bundles, of releases that devices run now. Parts are
	// packed as deltas from theirs, too, where that is worth it. Measured, if not nil, is
	// told of each delta that was made; Progress, how far the one is that is being made, from 0 to 1.
	DeltaFrom []string
	Measured  func(Measured)
	Progress  func(what string, done float64)
}

// Document is an attachment that is not in a bundle yet.
type Document struct {
	Name      string
	MediaType string
	Content   []byte
}

// Attachment is how a manifest names it.
func (d Document) Attachment() Attachment {
	sum := sha256.Sum256(d.Content)
	return Attachment{Name: d.Name, MediaType: d.MediaType, SHA256: hex.EncodeToString(sum[:]), Size: int64(len(d.Content))}
}

// Measured is a delta that was made to see how large it is.
type Measured struct {
	Part Part `json:"part"` // with the whole form, for comparison
	Form Form `json:"form"`
	Kept bool `json:"kept"` // it is in the bundle: the smallest from there, and worth it
}

func (o BuildOptions) level() zstd.EncoderLevel {
	if o.Fast {
		return zstd.SpeedDefault
	}
	return zstd.SpeedBestCompression
}

// Agent is one agent binary.
type Agent struct {
	Path     string
	Platform Platform // zero: read from the binary
}

// Build packs agents and firmware images into dir, which is made if missing, and returns the
// manifest that it wrote there.
func Build(ctx context.Context, dir string, o BuildOptions) (Manifest, error) {
	m := Manifest{
		Format: Format, Version: o.Version, Created: o.Created.UTC(), Notes: o.Notes,
		Boards: o.Boards, From: o.From, Percentage: o.Percentage, Floor: o.Floor, AllowDowngradeFrom: o.DownFrom,
	}
	if err := CheckVersion(o.Version); err != nil {
		return m, err
	}
	if err := os.MkdirAll(filepath.Join(dir, partsDir), 0o755); err != nil {
		return m, fmt.Errorf("make the bundle's directory: %w", err)
	}
	parts, err := o.parts()
	if err != nil {
		return m, err
	}
	if err := o.checkDeltaFrom(parts); err != nil {
		return m, err
	}
	seen := map[string]string{}
	for _, p := range parts {
		if other, twice := seen[p.kind()]; twice {
			return m, fmt.Errorf("%s and %s are both the %s; leave one out, or give an agent a platform", other, p.path, p.kind())
		}
		seen[p.kind()] = p.path
		part, err := p.pack(ctx, dir, o.level())
		if err != nil {
			return m, fmt.Errorf("pack %s: %w", p.path, err)
		}
		if part.Forms, err = o.deltas(ctx, dir, p.path, part); err != nil {
			return m, err
		}
		m.Parts = append(m.Parts, part)
	}
	sort.Slice(m.Parts, func(i, j int) bool { return m.Parts[i].kind() < m.Parts[j].kind() })
	if o.Attach != nil {
		documents, err := o.Attach(m)
		if err != nil {
			return m, err
		}
		for _, d := range documents {
			a := d.Attachment()
			if err := durable.WriteFile(filepath.Join(dir, filepath.FromSlash(PartPath(a.SHA256))), d.Content, 0o644); err != nil {
				return m, err
			}
			m.Attachments = append(m.Attachments, a)
		}
	}
	if err := m.check(); err != nil {
		return m, err
	}
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return m, err
	}
	return m, durable.WriteFile(filepath.Join(dir, manifestFile), append(raw, '\n'), 0o644)
}

// Open reads the manifest of a bundle in a directory, with the bytes that are signed.
func Open(dir string) (Manifest, []byte, error) {
	f, err := os.Open(filepath.Join(dir, manifestFile))
	if err != nil {
		return Manifest{}, nil, fmt.Errorf("this is no bundle: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, MaxManifest+1))
	if err != nil {
		return Manifest{}, nil, err
	}
	if len(raw) > MaxManifest {
		return Manifest{}, nil, fmt.Errorf("%s is larger than %d bytes", f.Name(), MaxManifest)
	}
	m, err := Parse(raw)
	return m, raw, err
}

// CheckFile tells whether a bundle in a directory has a file of its manifest, whole.
func CheckFile(dir string, want File) error {
	f, err := os.Open(filepath.Join(dir, filepath.FromSlash(PartPath(want.SHA256))))
	if err != nil {
		return fmt.Errorf("the bundle lacks its %s: %w", want.What, err)
	}
	defer f.Close()
	is := newCounter()
	if _, err := io.Copy(is, f); err != nil {
		return fmt.Errorf("the %s in the bundle cannot be read: %w", want.What, err)
	}
	if is.n != want.Size || is.sum() != want.SHA256 {
		return fmt.Errorf("the %s in the bundle is not what the manifest says; build the bundle again", want.What)
	}
	return nil
}

// ReadAttachment reads what is attached to a bundle in a directory, and checks that it
// is what the manifest says.
func ReadAttachment(dir string, a Attachment) ([]byte, error) {
	raw, err := durable.ReadFile(filepath.Join(dir, filepath.FromSlash(PartPath(a.SHA256))), MaxAttachment)
	if err != nil {
		return nil, fmt.Errorf("the bundle lacks its attachment %s: %w", a.Name, err)
	}
	return raw, a.Check(raw)
}

// PartPath is where a packed part or an attachment stands, below a bundle and below a repository.
func PartPath(sum string) string { return partsDir + "/" + sum }

// unpacked is a part that is to be packed.
type unpacked struct {
	Part // its name and platform
	path string
}

// kind is what a release has once.
func (p Part) kind() string { return p.Name + " for " + p.String() }

// parts looks at what is to be packed before any of it is.
func (o BuildOptions) parts() (all []unpacked, err error) {
	for _, a := range o.Agents {
		if a.Platform == (Platform{}) {
			if a.Platform, err = PlatformOf(a.Path); err != nil {
				return nil, fmt.Errorf("pack %s: %w", a.Path, err)
			}
		}
		all = append(all, unpacked{Part{Name: PartAgent, Platform: a.Platform}, a.Path})
	}
	for _, path := range o.Firmwares {
		platform, err := firmwarePlatform(path, o.Version)
		if err != nil {
			return nil, fmt.Errorf("pack %s: %w", path, err)
		}
		all = append(all, unpacked{Part{Name: PartFirmware, Platform: platform}, path})
	}
	return all, nil
}

// firmwarePlatform reads from a unified kernel image what machine it is for. Its
// version must be the release's: the boot loader sorts by it.
func firmwarePlatform(path, version string) (Platform, error) {
	f, err := os.Open(path)
	if err != nil {
		return Platform{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Platform{}, err
	}
	about, err := firmware.Ask(f, info.Size())
	if err != nil {
		return Platform{}, err
	}
	if about.Version != version {
		return Platform{}, fmt.Errorf("the image says that it is version %s, the release is %s; build the image with that version", about.Version, version)
	}
	return Platform{OS: about.OS, Arch: about.Arch}, nil
}

// pack compresses it into dir.
func (p unpacked) pack(ctx context.Context, dir string, level zstd.EncoderLevel) (Part, error) {
	src, err := os.Open(p.path)
	if err != nil {
		return Part{}, err
	}
	defer src.Close()
	raw := newCounter()
	form, err := keep(dir, func(out io.Writer) error {
		enc, err := zstd.NewWriter(out,
			zstd.WithEncoderLevel(level),
			zstd.WithEncoderConcurrency(1), // for the same bytes on any machine
			zstd.WithWindowSize(windowSize))
		if err != nil {
			return err
		}
		_, err = io.Copy(enc, io.TeeReader(withContext(ctx, src), raw))
		return errors.Join(err, enc.Close())
	})
	if err != nil {
		return Part{}, err
	}
	form.Encoding = EncodingZstd
	return Part{Name: p.Name, Platform: p.Platform, SHA256: raw.sum(), Size: raw.n, Forms: []Form{form}}, nil
}

// keep makes a packed part of what is written, which is then in dir by its digest.
func keep(dir string, write func(io.Writer) error) (Form, error) {
	out, err := os.CreateTemp(filepath.Join(dir, partsDir), ".packing-*")
	if err != nil {
		return Form{}, err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	packed := newCounter()
	if err := write(io.MultiWriter(out, packed)); err != nil {
		return Form{}, err
	}
	if packed.n > MaxPacked {
		return Form{}, fmt.Errorf("packed it has %d MiB, and a coordinator takes %d at most; make it smaller", packed.n>>20, MaxPacked>>20)
	}
	form := Form{SHA256: packed.sum(), Size: packed.n}
	path := filepath.Join(dir, filepath.FromSlash(PartPath(form.SHA256)))
	if err := errors.Join(out.Chmod(0o644), out.Sync()); err != nil {
		return Form{}, err
	}
	if err := os.Rename(out.Name(), path); err != nil {
		return Form{}, err
	}
	return form, durable.Sync(filepath.Dir(path))
}

// PlatformOf reads from a Go binary what it was built for.
func PlatformOf(path string) (Platform, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return Platform{}, fmt.Errorf("cannot tell its platform: %w", err)
	}
	return PlatformIn(info)
}

// PlatformIn reads it from what the linker has written into the binary.
func PlatformIn(info *debug.BuildInfo) (Platform, error) {
	p := Platform{Variant: armVariant(info)}
	for _, s := range info.Settings {
		switch s.Key {
		case "GOOS":
			p.OS = s.Value
		case "GOARCH":
			p.Arch = s.Value
		}
	}
	if p.OS == "" || p.Arch == "" {
		return Platform{}, errors.New("cannot tell its platform: the binary does not say")
	}
	return p, nil
}

// ErrContent is returned for bytes that are not the promised ones.
var ErrContent = errors.New("the part does not have the signed content")

// Unpack reads a packed part from src and writes the raw file to path, mode
// 0755, durably and all at once: path is not touched unless both digests and
// both sizes are right. See [NewReader].
func Unpack(ctx context.Context, src io.Reader, part Part, form Form, old *io.SectionReader, path string) error {
	raw, err := NewReader(ctx, src, part, form, old)
	if err != nil {
		return err
	}
	defer raw.Close()
	dst, err := renameio.TempFile(filepath.Dir(path), path)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer func() { _ = dst.Cleanup() }()
	if _, err = io.Copy(dst, raw); ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		err = dst.Chmod(0o755)
	}
	if err == nil {
		err = dst.CloseAtomicallyReplace()
	}
	switch {
	case errors.Is(err, ErrContent):
		return err
	case err != nil:
		return fmt.Errorf("unpack: %w", err)
	}
	return durable.Sync(filepath.Dir(path))
}

// Reader gives out the raw file of a packed part. It ends with io.EOF only if both
// digests and both sizes are right, and with [ErrContent] if not: what came before
// is worth nothing then.
type Reader struct {
	ctx         context.Context
	part        Part
	form        Form
	in          io.Reader // what is packed, counted
	dec         io.ReadCloser
	packed, raw *counter
	end         error
}

// NewReader begins to unpack. For a delta old is the file whose digest is form.From; it
// is not looked at for a whole file, which takes about twice the window (8 MiB) of memory.
// What a delta takes see [delta.Memory]; one that cannot be applied is [ErrContent], too.
func NewReader(ctx context.Context, src io.Reader, part Part, form Form, old *io.SectionReader) (*Reader, error) {
	r := &Reader{ctx: ctx, part: part, form: form, packed: newCounter(), raw: newCounter()}
	r.in = io.TeeReader(io.LimitReader(withContext(ctx, src), form.Size+1), r.packed)
	var err error
	switch {
	case form.whole():
		var dec *zstd.Decoder
		if dec, err = zstd.NewReader(r.in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(windowSize)); err == nil {
			r.dec = dec.IOReadCloser()
		}
	case old == nil || !delta.Known(form.Encoding):
		return nil, fmt.Errorf("%w: the encoding %q cannot be unpacked here", ErrContent, form.Encoding)
	default:
		r.dec, err = delta.NewReader(form.Encoding, r.in, old, part.Size)
	}
	if err != nil {
		if ctx.Err() == nil {
			err = fmt.Errorf("%w: %w", ErrContent, err)
		}
		return nil, err
	}
	return r, nil
}

// Close frees the memory.
func (r *Reader) Close() { _ = r.dec.Close() }

// Read is that of [io.Reader].
func (r *Reader) Read(p []byte) (int, error) {
	if r.end != nil {
		return 0, r.end
	}
	if left := r.part.Size + 1 - r.raw.n; int64(len(p)) > left {
		p = p[:left] // one byte too many is enough to know
	}
	n, err := r.dec.Read(p)
	_, _ = r.raw.Write(p[:n])
	if err != nil || r.raw.n > r.part.Size {
		r.end = r.verdict(err)
	}
	return n, r.end
}

func (r *Reader) verdict(err error) error {
	if r.ctx.Err() != nil {
		return r.ctx.Err()
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	r.Close()
	// What the decoder did not need belongs to the digest all the same.
	if _, drainErr := io.Copy(io.Discard, r.in); err == nil {
		err = drainErr
	}
	packed, raw, part, form := r.packed, r.raw, r.part, r.form
	switch {
	case packed.n != form.Size || packed.sum() != form.SHA256:
		return fmt.Errorf("%w: packed, it is %d bytes with SHA-256 %.12s…, signed are %d and %.12s…", ErrContent, packed.n, packed.sum(), form.Size, form.SHA256)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrContent, err)
	case raw.n != part.Size || raw.sum() != part.SHA256:
		return fmt.Errorf("%w: unpacked, it is %d bytes with SHA-256 %.12s…, signed are %d and %.12s…", ErrContent, raw.n, raw.sum(), part.Size, part.SHA256)
	}
	return io.EOF
}

// counter hashes and counts what goes through.
type counter struct {
	h interface {
		io.Writer
		Sum([]byte) []byte
	}
	n int64
}

func newCounter() *counter { return &counter{h: sha256.New()} }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.h.Write(p)
}

func (c *counter) sum() string { return hex.EncodeToString(c.h.Sum(nil)) }

// withContext makes reads fail once ctx has ended.
func withContext(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(p)
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
