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
	"sort"
	"time"

	"github.com/google/renameio/v2"
	"github.com/klauspost/compress/zstd"

	"github.com/deimos-edge/deimos/internal/durable"
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
	Agents     []Agent
	Fast       bool // quarter the time to build, 10% more bytes: for trying things out
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

// Build packs agents into dir, which is made if missing, and returns the
// manifest that it wrote there.
func Build(ctx context.Context, dir string, o BuildOptions) (Manifest, error) {
	m := Manifest{
		Format: Format, Version: o.Version, Created: o.Created.UTC(), Notes: o.Notes,
		Boards: o.Boards, From: o.From, Percentage: o.Percentage,
	}
	if err := CheckVersion(o.Version); err != nil {
		return m, err
	}
	if err := os.MkdirAll(filepath.Join(dir, partsDir), 0o755); err != nil {
		return m, fmt.Errorf("make the bundle's directory: %w", err)
	}
	seen := map[Platform]string{}
	for _, a := range o.Agents {
		part, err := pack(ctx, dir, a, o.level())
		if err != nil {
			return m, fmt.Errorf("pack %s: %w", a.Path, err)
		}
		if other, twice := seen[part.Platform]; twice {
			return m, fmt.Errorf("%s and %s are both for %s; give one agent a platform", other, a.Path, part.Platform)
		}
		seen[part.Platform] = a.Path
		m.Parts = append(m.Parts, part)
	}
	sort.Slice(m.Parts, func(i, j int) bool { return m.Parts[i].String() < m.Parts[j].String() })
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

// PartPath is where a packed part stands, below a bundle and below a repository.
func PartPath(sum string) string { return partsDir + "/" + sum }

// pack compresses one agent into dir.
func pack(ctx context.Context, dir string, a Agent, level zstd.EncoderLevel) (Part, error) {
	platform := a.Platform
	if platform == (Platform{}) {
		var err error
		if platform, err = PlatformOf(a.Path); err != nil {
			return Part{}, err
		}
	}
	src, err := os.Open(a.Path)
	if err != nil {
		return Part{}, err
	}
	defer src.Close()
	out, err := os.CreateTemp(filepath.Join(dir, partsDir), ".packing-*")
	if err != nil {
		return Part{}, err
	}
	defer os.Remove(out.Name())
	defer out.Close()

	raw, packed := newCounter(), newCounter()
	enc, err := zstd.NewWriter(io.MultiWriter(out, packed),
		zstd.WithEncoderLevel(level),
		zstd.WithEncoderConcurrency(1), // for the same bytes on any machine
		zstd.WithWindowSize(windowSize))
	if err != nil {
		return Part{}, err
	}
	_, err = io.Copy(enc, io.TeeReader(withContext(ctx, src), raw))
	if err := errors.Join(err, enc.Close()); err != nil {
		return Part{}, err
	}
	form := Form{Encoding: EncodingZstd, SHA256: packed.sum(), Size: packed.n}
	path := filepath.Join(dir, filepath.FromSlash(PartPath(form.SHA256)))
	if err := errors.Join(out.Chmod(0o644), out.Sync()); err != nil {
		return Part{}, err
	}
	if err := os.Rename(out.Name(), path); err != nil {
		return Part{}, err
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return Part{}, err
	}
	return Part{Name: PartAgent, Platform: platform, SHA256: raw.sum(), Size: raw.n, Forms: []Form{form}}, nil
}

// PlatformOf reads from a Go binary what it was built for.
func PlatformOf(path string) (Platform, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return Platform{}, fmt.Errorf("cannot tell its platform: %w", err)
	}
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

// ErrContent is returned by [Unpack] for bytes that are not the promised ones.
var ErrContent = errors.New("the part does not have the signed content")

// Unpack reads a packed part from src and writes the raw file to path, mode
// 0755, durably and all at once: path is not touched unless both digests and
// both sizes are right. It needs about twice the window (8 MiB) of memory.
func Unpack(ctx context.Context, src io.Reader, part Part, form Form, path string) error {
	if form.Encoding != EncodingZstd {
		return fmt.Errorf("the encoding %q is not known", form.Encoding)
	}
	packed, raw := newCounter(), newCounter()
	in := io.TeeReader(io.LimitReader(withContext(ctx, src), form.Size+1), packed)
	dec, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(windowSize))
	if err != nil {
		return err
	}
	defer dec.Close()
	dst, err := renameio.TempFile(filepath.Dir(path), path)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer func() { _ = dst.Cleanup() }()

	_, err = io.Copy(io.MultiWriter(dst, raw), io.LimitReader(dec, part.Size+1))
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var badWrite *os.PathError
	if errors.As(err, &badWrite) {
		return fmt.Errorf("unpack: %w", err)
	}
	dec.Close()
	// What the decoder did not need belongs to the digest all the same.
	if _, drainErr := io.Copy(io.Discard, in); err == nil {
		err = drainErr
	}
	switch {
	case packed.n != form.Size || packed.sum() != form.SHA256:
		return fmt.Errorf("%w: packed, it is %d bytes with SHA-256 %.12s…, signed are %d and %.12s…", ErrContent, packed.n, packed.sum(), form.Size, form.SHA256)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrContent, err)
	case raw.n != part.Size || raw.sum() != part.SHA256:
		return fmt.Errorf("%w: unpacked, it is %d bytes with SHA-256 %.12s…, signed are %d and %.12s…", ErrContent, raw.n, raw.sum(), part.Size, part.SHA256)
	}
	if err := dst.Chmod(0o755); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	if err := dst.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return durable.SyncDir(filepath.Dir(path))
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
