package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/deimos-edge/deimos/ota/delta"
)

// A delta is worth it if it has less than this share of the bytes of the whole form: a
// device needs the old file for it, and longer.
const worth = 0.8

// deltas are the forms of a part, with those that make it out of parts of other bundles.
func (o BuildOptions) deltas(ctx context.Context, dir, path string, part Part) ([]Form, error) {
	forms := part.Forms
	var file []byte
	seen := map[string]bool{part.SHA256: true}
	for _, from := range o.DeltaFrom {
		m, _, err := Open(from)
		if err != nil {
			return nil, fmt.Errorf("make deltas from %s: %w", from, err)
		}
		old, ok := m.part(part.kind())
		if !ok || seen[old.SHA256] {
			continue
		}
		seen[old.SHA256] = true
		if file == nil {
			if file, err = os.ReadFile(path); err != nil {
				return nil, err
			}
		}
		raw, err := old.unpack(ctx, from)
		if err != nil {
			return nil, fmt.Errorf("make deltas from %s: %w", from, err)
		}
		form, err := o.smallest(ctx, dir, part, m.Version, raw, file)
		if err != nil {
			return nil, fmt.Errorf("make the delta of %s from %s: %w", part.kind(), m.Version, err)
		}
		if form.Delta() {
			forms = append(forms, form)
		}
	}
	return forms, nil
}

// checkDeltaFrom refuses a bundle of which nothing fits the parts of this one: its
// directory is a mistake.
func (o BuildOptions) checkDeltaFrom(parts []unpacked) error {
	for _, from := range o.DeltaFrom {
		m, _, err := Open(from)
		if err != nil {
			return fmt.Errorf("make deltas from %s: %w", from, err)
		}
		fits := false
		for _, p := range parts {
			_, has := m.part(p.kind())
			fits = fits || has
		}
		if !fits {
			return fmt.Errorf("make deltas from %s: release %s has none of the parts of this one", from, m.Version)
		}
	}
	return nil
}

func (m Manifest) part(kind string) (Part, bool) {
	for _, p := range m.Parts {
		if p.kind() == kind {
			return p, true
		}
	}
	return Part{}, false
}

// unpack reads the raw file of a part, checked, from its bundle.
func (p Part) unpack(ctx context.Context, dir string) ([]byte, error) {
	for _, form := range p.Forms {
		if !form.whole() {
			continue
		}
		f, err := os.Open(filepath.Join(dir, filepath.FromSlash(PartPath(form.SHA256))))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		r, err := NewReader(ctx, f, p, form, nil)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	}
	return nil, fmt.Errorf("its %s has no whole form", p.kind())
}

// smallest makes each kind of delta and keeps the smallest; none, if none is worth it.
func (o BuildOptions) smallest(ctx context.Context, dir string, part Part, version string, old, file []byte) (Form, error) {
	var best []byte
	var tried []Form
	at := -1
	for _, encoding := range delta.Encodings {
		var out bytes.Buffer
		err := delta.Make(ctx, encoding, old, file, &out, func(done float64) {
			if o.Progress != nil {
				o.Progress(fmt.Sprintf("%s of the %s from %s", encoding, part.kind(), version), done)
			}
		})
		if errors.Is(err, delta.ErrPatch) {
			continue // a device could not spend what it takes
		}
		if err != nil {
			return Form{}, err
		}
		tried = append(tried, Form{Encoding: encoding, SHA256: sumOf(out.Bytes()), Size: int64(out.Len()), From: sumOf(old), FromVersion: version})
		if float64(out.Len()) < worth*float64(part.Forms[0].Size) && (best == nil || out.Len() < len(best)) {
			best, at = out.Bytes(), len(tried)-1
		}
	}
	for i, form := range tried {
		if o.Measured != nil {
			o.Measured(Measured{Part: part, Form: form, Kept: i == at})
		}
	}
	if at < 0 {
		return Form{}, nil
	}
	_, err := keep(dir, func(w io.Writer) error { _, err := w.Write(best); return err })
	return tried[at], err
}

func sumOf(raw []byte) string {
	c := newCounter()
	_, _ = c.Write(raw)
	return c.sum()
}
