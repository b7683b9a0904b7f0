package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/delta"
)

const (
	module      = "github.com/deimos-edge/deimos"
	deltaRounds = 5
)

// deltaRows are how large updates of the agent are, whole and as deltas, and what it takes to
// apply these. The next releases are made up, of today's sources: the code patch changes
// one function, the minor release the first lines of every fifth function of ours that the
// agent has, and links a package of the standard library that it did not have. Baselines
// are xz -9e of the whole, zstd -19 --patch-from, and bsdiff 4; one that is not
// installed is left out.
func deltaRows(ctx context.Context, t *table) error {
	dir, err := os.MkdirTemp("", "delta")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	apply, base := filepath.Join(dir, "applydelta"), filepath.Join(dir, "base")
	if err := command(ctx, "go", "build", "-o", apply, "./test/bench/applydelta"); err != nil {
		return err
	}
	if err := buildAgent(ctx, base, "1.0.0", "/dev/null"); err != nil {
		return err
	}
	if err := wholeRow(ctx, t, dir, base); err != nil {
		return err
	}
	for _, r := range []struct {
		name, version string
		every         int // of how many functions one is changed; 0: one of all
	}{{"code patch", "1.0.1", 0}, {"minor release", "1.1.0", 5}} {
		next := filepath.Join(dir, r.version)
		changes, err := overlay(ctx, filepath.Join(dir, "src-"+r.version), r.every)
		if err != nil {
			return err
		}
		if err := buildAgent(ctx, next, r.version, changes); err != nil {
			return err
		}
		if err := deltaOf(ctx, t, r.name, apply, base, next); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	return nil
}

// buildAgent is how the Makefile builds one.
func buildAgent(ctx context.Context, out, version, overlay string) error {
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid= -X main.version=" + version, "-o", out}
	if overlay != "/dev/null" {
		args = append(args, "-overlay", overlay)
	}
	return command(ctx, "go", append(args, "./cmd/deimos-agent")...)
}

// changed is what each function that is changed calls first; added once to a package.
const changed = `package %s

var benchSeen [64]uint64

//go:noinline
func benchChanged(n int) {
	benchSeen[n%%len(benchSeen)]++
	for i := range benchSeen {
		if benchSeen[i] == 1<<63 {
			panic("it counts to the end")
		}
	}
}
`

const linked = `package main

import (
	"encoding/xml"
	"os"
)

func init() {
	if len(os.Args) > 1<<20 {
		_ = xml.NewDecoder(os.Stdin).Decode(&benchSeen)
	}
}
`

// overlay writes changed sources below dir, and what go build -overlay reads.
func overlay(ctx context.Context, dir string, every int) (file string, err error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-deps", "-json=Dir,Name,ImportPath,GoFiles", "./cmd/deimos-agent").Output()
	if err != nil {
		return "", fmt.Errorf("go list: %w", err)
	}
	replace := map[string]string{}
	put := func(path, source string) error {
		to := filepath.Join(dir, fmt.Sprint(len(replace), ".go"))
		replace[path] = to
		return os.WriteFile(to, []byte(source), 0o600)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	met := 0
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			Dir, Name, ImportPath string
			GoFiles               []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return "", err
		}
		if !strings.HasPrefix(p.ImportPath, module) || every == 0 && p.ImportPath != module+"/agent" {
			continue
		}
		for _, name := range p.GoFiles {
			path := filepath.Join(p.Dir, name)
			source, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			source, changes, err := change(source, every, &met)
			if err != nil {
				return "", err
			}
			if changes {
				if err := put(path, string(source)); err != nil {
					return "", err
				}
			}
		}
		if err := put(filepath.Join(p.Dir, "bench_changed.go"), fmt.Sprintf(changed, p.Name)); err != nil {
			return "", err
		}
		if p.Name == "main" {
			if err := put(filepath.Join(p.Dir, "bench_linked.go"), linked); err != nil {
				return "", err
			}
		}
	}
	raw, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	file = filepath.Join(dir, "overlay.json")
	return file, os.WriteFile(file, raw, 0o600)
}

// change lets functions call what counts them; met are those that were seen by now.
func change(source []byte, every int, met *int) (out []byte, changes bool, err error) {
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, "", source, parser.SkipObjectResolution)
	if err != nil {
		return nil, false, err
	}
	from := 0
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok || fn.Body == nil {
			continue
		}
		*met++
		if every == 0 && *met != 1 || every > 0 && *met%every != 0 {
			continue
		}
		at := set.Position(fn.Body.Lbrace).Offset + 1
		out = append(out, source[from:at]...)
		out = fmt.Appendf(out, " benchChanged(%d);", *met)
		from, changes = at, true
	}
	return append(out, source[from:]...), changes, nil
}

func wholeRow(ctx context.Context, t *table, dir, agent string) error {
	platform, err := bundle.PlatformOf(agent)
	if err != nil {
		return err
	}
	m, err := bundle.Build(ctx, filepath.Join(dir, "bundle"), bundle.BuildOptions{Version: "1.0.0", Agents: []bundle.Agent{{Path: agent, Platform: platform}}})
	if err != nil {
		return err
	}
	xz, err := packed(ctx, "xz", "-9e", "-T1", "-k", "-c", agent)
	if err != nil {
		return err
	}
	t.sized("agent, whole (xz)", float64(m.Parts[0].Forms[0].Size), xz)
	return nil
}

// packed is how many bytes a program writes, 0 if it is not here.
func packed(ctx context.Context, name string, args ...string) (float64, error) {
	if _, err := exec.LookPath(name); err != nil {
		return 0, nil
	}
	var out counted
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return float64(out), nil
}

// counted counts what is written.
type counted int64

func (c *counted) Write(p []byte) (int, error) { *c += counted(len(p)); return len(p), nil }

// sized is a row of sizes in KiB; a baseline of 0 is none.
func (t *table) sized(what string, ours, base float64) {
	if base == 0 {
		t.only(what, "KiB", ours/1024, "%.1f")
		return
	}
	t.row(what, "KiB", ours/1024, base/1024, "%.1f")
}

func deltaOf(ctx context.Context, t *table, name, apply, old, next string) error {
	was, err := os.ReadFile(old)
	if err != nil {
		return err
	}
	file, err := os.ReadFile(next)
	if err != nil {
		return err
	}
	zstd, err := packed(ctx, "zstd", "-19", "-q", "--long=27", "--patch-from="+old, "-c", next)
	if err != nil {
		return err
	}
	theirs := 0.0
	if _, err := exec.LookPath("bsdiff"); err == nil {
		if err := command(ctx, "bsdiff", old, next, next+".theirs"); err != nil {
			return err
		}
		info, err := os.Stat(next + ".theirs")
		if err != nil {
			return err
		}
		theirs = float64(info.Size())
	}
	for _, encoding := range delta.Encodings {
		base, label := theirs, "bsdiff"
		if encoding == delta.DCZ {
			base, label = zstd, "zstd --patch-from"
		}
		var out bytes.Buffer
		began := time.Now()
		if err := delta.Make(ctx, encoding, was, file, &out, nil); err != nil {
			return err
		}
		took := time.Since(began)
		patch := next + "." + encoding
		if err := os.WriteFile(patch, out.Bytes(), 0o600); err != nil {
			return err
		}
		t.sized(fmt.Sprintf("%s, %s (%s)", name, encoding, label), float64(out.Len()), base)
		t.only("  to make it", "s", took.Seconds(), "%.1f")
		var seconds, peaks []float64
		for range deltaRounds {
			told, err := exec.CommandContext(ctx, apply, encoding, old, patch, next, next+".out").Output()
			if err != nil {
				return fmt.Errorf("apply %s: %w", encoding, err)
			}
			var s, p float64
			if _, err := fmt.Sscan(string(told), &s, &p); err != nil {
				return err
			}
			seconds, peaks = append(seconds, s), append(peaks, p)
		}
		t.only("  to apply it and have it on disk", "s", median(seconds), "%.2f")
		t.limit("  memory to apply it (budget)", "MiB", median(peaks)/(1<<20), delta.Budget>>20, "%.1f")
	}
	return nil
}
