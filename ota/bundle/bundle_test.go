package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// agentFile is a file like a program: neither random nor all the same.
func agentFile(t testing.TB, size int) (string, []byte) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, uint64(size)))
	raw := make([]byte, 0, size)
	for len(raw) < size {
		raw = append(raw, fmt.Sprintf("func_%d:%x\n", rng.IntN(1000), rng.Uint32())...)
	}
	path := filepath.Join(t.TempDir(), "agent")
	must(t, os.WriteFile(path, raw[:size], 0o755))
	return path, raw[:size]
}

var amd64, arm64 = Platform{OS: "linux", Arch: "amd64"}, Platform{OS: "linux", Arch: "arm64"}

func build(t testing.TB, path string) (string, Manifest) {
	t.Helper()
	dir := t.TempDir()
	m, err := Build(t.Context(), dir, BuildOptions{Version: "1.2.3", Agents: []Agent{{Path: path, Platform: amd64}}, Fast: true})
	must(t, err)
	return dir, m
}

func packed(t testing.TB, dir string, m Manifest) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, PartPath(m.Parts[0].Forms[0].SHA256)))
	must(t, err)
	return raw
}

func TestUnpackGivesBackWhatWasBuilt(t *testing.T) {
	path, want := agentFile(t, 1<<20)
	dir, m := build(t, path)
	opened, _, err := Open(dir)
	must(t, err)
	part, forms, err := opened.For(Device{Version: "1.0.0", Platform: amd64})
	must(t, err)
	form := forms[0]
	out := filepath.Join(t.TempDir(), "agent")
	must(t, Unpack(t.Context(), bytes.NewReader(packed(t, dir, m)), part, form, nil, out))
	got, err := os.ReadFile(out)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("other bytes")
	}
	if fi, _ := os.Stat(out); fi.Mode().Perm() != 0o755 {
		t.Errorf("mode %v", fi.Mode())
	}
}

func TestBuildIsReproducible(t *testing.T) {
	path, raw := agentFile(t, 200<<10)
	before := filepath.Join(t.TempDir(), "before")
	must(t, os.WriteFile(before, fewChanges(raw), 0o755))
	from, _ := build(t, before)
	o := BuildOptions{Version: "1.2.4", Agents: []Agent{{Path: path, Platform: amd64}}, DeltaFrom: []string{from}}
	dir1, dir2 := t.TempDir(), t.TempDir()
	m1, err := Build(t.Context(), dir1, o)
	must(t, err)
	_, err = Build(t.Context(), dir2, o)
	must(t, err)
	raw1, err := os.ReadFile(filepath.Join(dir1, manifestFile))
	must(t, err)
	raw2, err := os.ReadFile(filepath.Join(dir2, manifestFile))
	must(t, err)
	if !bytes.Equal(raw1, raw2) {
		t.Error("two builds differ")
	}
	if forms := m1.Parts[0].Forms; len(forms) != 2 || !forms[1].Delta() {
		t.Fatalf("there is no delta: %+v", forms)
	}
	for _, f := range m1.Parts[0].Forms {
		one, err := os.ReadFile(filepath.Join(dir1, PartPath(f.SHA256)))
		must(t, err)
		two, err := os.ReadFile(filepath.Join(dir2, PartPath(f.SHA256)))
		must(t, err)
		if !bytes.Equal(one, two) || sumOf(one) != f.SHA256 {
			t.Errorf("two builds differ in the %s", f.Encoding)
		}
	}
}

func TestBuildTellsThePlatformOfABinary(t *testing.T) {
	exe, err := os.Executable()
	must(t, err)
	p, err := PlatformOf(exe)
	must(t, err)
	if p != Host() {
		t.Errorf("%v, want %v", p, Host())
	}
}

func TestAPartThatNoCoordinatorTakesIsNotBuilt(t *testing.T) {
	seed := [32]byte{1}
	path := filepath.Join(t.TempDir(), "agent")
	raw := make([]byte, MaxPacked+1)
	must(t, func() error { _, err := rand.NewChaCha8(seed).Read(raw); return err }())
	must(t, os.WriteFile(path, raw, 0o755))
	dir := t.TempDir()
	_, err := Build(t.Context(), dir, BuildOptions{Version: "1.2.3", Agents: []Agent{{Path: path, Platform: amd64}}, Fast: true})
	if err == nil || !strings.Contains(err.Error(), "64 at most") {
		t.Error(err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "parts")); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

func TestOneAgentAPlatform(t *testing.T) {
	path, _ := agentFile(t, 100)
	agent := Agent{Path: path, Platform: amd64}
	if _, err := Build(t.Context(), t.TempDir(), BuildOptions{Version: "1.0.0", Agents: []Agent{agent, agent}}); err == nil {
		t.Error("two agents for one platform were accepted")
	}
	if _, err := Build(t.Context(), t.TempDir(), BuildOptions{Version: "1.0.0", Agents: []Agent{{Path: path}}}); err == nil {
		t.Error("a file of no platform was accepted")
	}
}

// TestAlteredPartNeverReachesTheDisk flips bits all over the packed part, cuts
// it and appends to it.
func TestAlteredPartNeverReachesTheDisk(t *testing.T) {
	path, _ := agentFile(t, 64<<10)
	dir, m := build(t, path)
	part, form := m.Parts[0], m.Parts[0].Forms[0]
	whole := packed(t, dir, m)
	out := filepath.Join(t.TempDir(), "agent")
	must(t, os.WriteFile(out, []byte("old"), 0o755))
	check := func(what string, raw []byte) {
		t.Helper()
		if err := Unpack(t.Context(), bytes.NewReader(raw), part, form, nil, out); !errors.Is(err, ErrContent) {
			t.Fatalf("%s: %v", what, err)
		}
		if got, _ := os.ReadFile(out); string(got) != "old" {
			t.Fatalf("%s: the old file is gone", what)
		}
	}
	for i := 0; i < len(whole); i += 1 + len(whole)/97 {
		raw := bytes.Clone(whole)
		raw[i] ^= 0x10
		check(fmt.Sprint("byte ", i), raw)
		check(fmt.Sprint("cut at ", i), whole[:i])
	}
	check("longer", append(bytes.Clone(whole), 0))
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(out), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestUnpackIsBounded: a part that is signed but unpacks to far more than it says.
func TestUnpackIsBounded(t *testing.T) {
	var bomb bytes.Buffer
	enc, err := zstd.NewWriter(&bomb, zstd.WithWindowSize(windowSize))
	must(t, err)
	for range 16 {
		_, err := enc.Write(make([]byte, 1<<20))
		must(t, err)
	}
	must(t, enc.Close())
	c := newCounter()
	_, err = c.Write(bomb.Bytes())
	must(t, err)
	part := Part{SHA256: strings.Repeat("0", 64), Size: 1000}
	form := Form{Encoding: EncodingZstd, SHA256: c.sum(), Size: c.n}
	dir := t.TempDir()
	err = Unpack(t.Context(), &bomb, part, form, nil, filepath.Join(dir, "agent"))
	if !errors.Is(err, ErrContent) || !strings.Contains(err.Error(), "it is 1001 bytes") {
		t.Errorf("%v: not stopped at the signed size", err)
	}
}

func TestUnpackNeedsBothDigests(t *testing.T) {
	path, _ := agentFile(t, 1<<10)
	dir, m := build(t, path)
	part, form := m.Parts[0], m.Parts[0].Forms[0]
	form.SHA256 = strings.Repeat("0", 64)
	if err := Unpack(t.Context(), bytes.NewReader(packed(t, dir, m)), part, form, nil, filepath.Join(dir, "x")); !errors.Is(err, ErrContent) {
		t.Errorf("wrong packed digest: %v", err)
	}
	part, form = m.Parts[0], m.Parts[0].Forms[0]
	part.SHA256 = strings.Repeat("0", 64)
	if err := Unpack(t.Context(), bytes.NewReader(packed(t, dir, m)), part, form, nil, filepath.Join(dir, "x")); !errors.Is(err, ErrContent) {
		t.Errorf("wrong raw digest: %v", err)
	}
}

func TestUnpackStopsWithContext(t *testing.T) {
	path, _ := agentFile(t, 1<<10)
	dir, m := build(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Unpack(ctx, bytes.NewReader(packed(t, dir, m)), m.Parts[0], m.Parts[0].Forms[0], nil, filepath.Join(dir, "x")); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func percent(p float64) *float64 { return &p }

func manifest(change func(*Manifest)) Manifest {
	sum := strings.Repeat("ab", 32)
	part := func(p Platform) Part {
		return Part{Name: PartAgent, Platform: p, SHA256: sum, Size: 1, Forms: []Form{{Encoding: "future", SHA256: sum, Size: 1}, {Encoding: EncodingZstd, SHA256: sum, Size: 2}}}
	}
	m := Manifest{Format: 1, Version: "2.0.0", Parts: []Part{part(amd64), part(arm64),
		part(Platform{"linux", "arm", "5"}), part(Platform{"linux", "arm", "7"})}}
	if change != nil {
		change(&m)
	}
	return m
}

func TestReleaseKnowsForWhomItIs(t *testing.T) {
	dev := Device{ID: "dev", Board: "qemu-virt-arm64", Version: "1.5.0", Platform: arm64}
	for name, c := range map[string]struct {
		m    func(*Manifest)
		d    func(*Device)
		want error
	}{
		"fits":                             {nil, nil, nil},
		"same":                             {nil, func(d *Device) { d.Version = "2.0.0" }, ErrSame},
		"older":                            {nil, func(d *Device) { d.Version = "2.0.1" }, ErrDowngrade},
		"older, by an exception":           {func(m *Manifest) { m.AllowDowngradeFrom = []string{"2.0.2", "2.0.1"} }, func(d *Device) { d.Version, d.Floor = "2.0.1", "2.0.1" }, nil},
		"older, an exception for another":  {func(m *Manifest) { m.AllowDowngradeFrom = []string{"2.0.2"} }, func(d *Device) { d.Version = "2.0.1" }, ErrDowngrade},
		"the same, by an exception":        {func(m *Manifest) { m.AllowDowngradeFrom = []string{"2.0.0"} }, func(d *Device) { d.Version = "2.0.0" }, ErrSame},
		"newer, below the floor":           {nil, func(d *Device) { d.Floor = "2.0.1" }, ErrFloor},
		"newer, at the floor":              {nil, func(d *Device) { d.Floor = "2.0.0" }, nil},
		"below the floor, by an exception": {func(m *Manifest) { m.AllowDowngradeFrom = []string{"1.5.0"} }, func(d *Device) { d.Floor = "3.0.0" }, nil},
		"release candidate":                {nil, func(d *Device) { d.Version = "2.0.0-rc.1" }, nil},
		"ten is more than nine":            {func(m *Manifest) { m.Version = "1.10.0" }, func(d *Device) { d.Version = "1.9.0" }, nil},
		"unknown version":                  {nil, func(d *Device) { d.Version = "" }, nil},
		"board":                            {func(m *Manifest) { m.Boards = []string{"x", "qemu-virt-arm64"} }, nil, nil},
		"other board":                      {func(m *Manifest) { m.Boards = []string{"rock-5b"} }, nil, ErrBoard},
		"too old":                          {func(m *Manifest) { m.From = "1.6.0" }, nil, ErrFrom},
		"just old enough":                  {func(m *Manifest) { m.From = "1.5.0" }, nil, nil},
		"other platform":                   {nil, func(d *Device) { d.Platform.Arch = "riscv64" }, ErrPlatform},
		"nobody's turn":                    {func(m *Manifest) { m.Percentage = percent(0) }, nil, ErrRollout},
		"everybody's turn":                 {func(m *Manifest) { m.Percentage = percent(100) }, nil, nil},
		"only forms of the future":         {func(m *Manifest) { m.Parts[1].Forms = m.Parts[1].Forms[:1] }, nil, ErrPlatform},
	} {
		d := dev
		if c.d != nil {
			c.d(&d)
		}
		if _, forms, err := manifest(c.m).For(d); !errors.Is(err, c.want) || err == nil && (len(forms) != 1 || forms[0].Encoding != EncodingZstd) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestArmTakesTheBestVariantItRuns(t *testing.T) {
	for have, want := range map[string]string{"7": "7", "6": "5", "5": "5"} {
		part, ok := manifest(nil).Select(PartAgent, Platform{"linux", "arm", have})
		if !ok || part.Variant != want {
			t.Errorf("ARMv%s takes the agent for v%s, want v%s", have, part.Variant, want)
		}
	}
}

func TestRolloutReachesItsShareAndOnlyGrows(t *testing.T) {
	const n = 20000
	in, sum := 0, 0.0
	for i := range n {
		p := RolloutPoint("1.2.3", fmt.Sprint("device", i))
		if p < 0 || p >= 100 {
			t.Fatalf("point %v", p)
		}
		sum += p
		if p < 10 {
			in++
		}
	}
	// Binomial with n·p·(1-p) = 1800: six standard deviations are 255.
	if math.Abs(float64(in)-n*0.1) > 255 {
		t.Errorf("10%% of %d devices are %d", n, in)
	}
	if RolloutPoint("1.2.3", "d") == RolloutPoint("1.2.4", "d") {
		t.Error("a device stands at the same place for every version")
	}
}

func TestBadManifestsAreRefusedByName(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	part := func(sum string, size any) string {
		return fmt.Sprintf(`{"name":"agent","os":"linux","arch":"arm64","sha256":%q,"size":%v}`, sum, size)
	}
	forms := func(form string) string {
		return `{"format":1,"version":"1.2.3","parts":[` + strings.TrimSuffix(part(sum, 1), "}") + `,"forms":[{"size":1,"sha256":"` + sum + `",` + form + `}]}]}`
	}
	for raw, want := range map[string]string{
		`{`:                                "cannot be read",
		`{"format":2}`:                     "newer format",
		`{"format":0}`:                     "format is 0",
		`{"format":1,"version":"latest"}`:  "is no version",
		`{"format":1,"version":"1.2"}`:     "is no version",
		`{"format":1,"version":"1.2.3+b"}`: "is no version",
		`{"format":1,"version":"1.2.3"}`:   "no parts",
		`{"format":1,"version":"1.2.3","from":"x","parts":[` + part(sum, 1) + `]}`:                    "from",
		`{"format":1,"version":"1.2.3","percentage":101,"parts":[` + part(sum, 1) + `]}`:              "percentage",
		`{"format":1,"version":"1.2.3","floor":"x","parts":[` + part(sum, 1) + `]}`:                   "floor",
		`{"format":1,"version":"1.2.3","floor":"1.2.4","parts":[` + part(sum, 1) + `]}`:               "above the release",
		`{"format":1,"version":"1.2.3","allow_downgrade_from":["v9"],"parts":[` + part(sum, 1) + `]}`: "allow_downgrade_from",
		`{"format":1,"version":"1.2.3","parts":[` + part("../../etc/passwd", 1) + `]}`:                "no SHA-256",
		`{"format":1,"version":"1.2.3","parts":[` + part(strings.ToUpper(sum), 1) + `]}`:              "no SHA-256",
		`{"format":1,"version":"1.2.3","parts":[` + part(sum, -1) + `]}`:                              "size",
		`{"format":1,"version":"1.2.3","parts":[` + part(sum, int64(MaxPart+1)) + `]}`:                "size",
		forms(`"encoding":"bsdiff"`):                                                 "does not say from which",
		forms(`"encoding":"bsdiff","from":"abc"`):                                    "from: \"abc\" is no SHA-256",
		forms(`"encoding":"zstd","from":"` + sum + `"`):                              "a whole file is from none",
		forms(`"encoding":"bsdiff","from":"` + sum + `","from_version":"yesterday"`): "from_version",
	} {
		if _, err := Parse([]byte(raw)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", raw, err, want)
		}
	}
	if _, err := Parse([]byte(`{"format":1,"version":"1.2.3","unknown":1,"parts":[` + part(sum, 1) + `]}`)); err != nil {
		t.Errorf("an unknown field: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"format":1,"version":"1.2.3","parts":[{"name":"agent","os":"linux","arch":"arm64","sha256":"00","size":1}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := Parse(raw)
		if err == nil {
			_, _, _ = m.For(Device{ID: "d", Version: "0.0.1", Platform: arm64})
		}
	})
}

func BenchmarkUnpack(b *testing.B) {
	path, _ := agentFile(b, 16<<20)
	dir, m := build(b, path)
	raw := packed(b, dir, m)
	b.SetBytes(m.Parts[0].Size)
	b.ReportAllocs()
	for b.Loop() {
		must(b, Unpack(b.Context(), bytes.NewReader(raw), m.Parts[0], m.Parts[0].Forms[0], nil, filepath.Join(dir, "out")))
	}
}
