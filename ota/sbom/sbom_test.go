package sbom

import (
	"bufio"
	"bytes"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/deimos-edge/deimos/wire"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// program is a Go program with modules in it, which a test has not.
var program string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "deimos-sbom-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "image")
		if out, err := exec.Command("go", "build", "-o", program, "../../packaging/image").CombinedOutput(); err != nil {
			panic(string(out))
		}
		return m.Run()
	}())
}

// aFirmware is a file that is called one, with the bill of what would be in it beside it.
func aFirmware(t testing.TB, content string, listed bool) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "deimos_1.2.3.efi")
	must(t, os.WriteFile(file, []byte(content), 0o644))
	if !listed {
		return file
	}
	b, err := NewFirmware(file, "1.2.3")
	must(t, err)
	must(t, b.AddProgram(program, "1.2.3"))
	b.AddDebian(Debian{"libc6", "2.36-9+deb12u14", "arm64", strings.Repeat("ab", 32)})
	raw, err := b.JSON(time.Time{})
	must(t, err)
	must(t, os.WriteFile(Beside(file), raw, 0o644))
	return file
}

func aBill(t testing.TB, listed bool) *Bill {
	t.Helper()
	b := New("deimos", "1.2.3")
	must(t, b.AddProgram(program, "1.2.3"))
	known, err := b.AddFirmware(aFirmware(t, "a firmware", listed), "1.2.3")
	must(t, err)
	if known != listed {
		t.Errorf("what is in the firmware is known: %v, want %v", known, listed)
	}
	return b
}

// TestABillFitsTheSchema of CycloneDX, which its library brings.
func TestABillFitsTheSchema(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	must(t, err)
	c := jsonschema.NewCompiler()
	for _, name := range []string{"bom-1.6.schema.json", "spdx.schema.json", "jsf-0.82.schemax.json"} {
		raw, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "schema", name))
		must(t, err)
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
		must(t, err)
		must(t, c.AddResource("http://cyclonedx.org/schema/"+strings.Replace(name, "schemax", "schema", 1), doc))
	}
	schema, err := c.Compile("http://cyclonedx.org/schema/bom-1.6.schema.json")
	must(t, err)
	for _, listed := range []bool{true, false} {
		raw, err := aBill(t, listed).JSON(time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC))
		must(t, err)
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
		must(t, err)
		if err := schema.Validate(doc); err != nil {
			t.Error(err)
		}
		bom, err := Read(raw)
		must(t, err)
		if said := bom.Compositions != nil && strings.HasPrefix(string((*(*bom.Compositions)[0].Dependencies)[0]), "deimos-firmware@"); said == listed {
			t.Errorf("that nothing is known of the firmware is said: %v", said)
		}
	}
	if schema.Validate(map[string]any{"bomFormat": "CycloneDX"}) == nil {
		t.Error("the schema takes anything")
	}
}

// goSums is go.sum, as hex by package URL.
func goSums(t *testing.T) map[string]string {
	t.Helper()
	f, err := os.Open("../../go.sum")
	must(t, err)
	defer f.Close()
	sums := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(fields[2], "h1:"))
		must(t, err)
		sums["pkg:golang/"+fields[0]+"@"+strings.ReplaceAll(fields[1], "+", "%2B")] = hex.EncodeToString(raw)
	}
	return sums
}

// TestABillListsWhatIsInAProgram: each module that the linker put in, with the sum that
// go.sum has of it, and the standard library.
func TestABillListsWhatIsInAProgram(t *testing.T) {
	info, err := buildinfo.ReadFile(program)
	must(t, err)
	if len(info.Deps) < 3 {
		t.Fatalf("%s has no modules in it", program)
	}
	b := aBill(t, true)
	sums := goSums(t)
	is := map[string]string{}
	for _, r := range b.Materials() {
		is[r.URI] = r.Digest[wire.DirHash]
	}
	for _, m := range info.Deps {
		purl := "pkg:golang/" + m.Path + "@" + strings.ReplaceAll(m.Version, "+", "%2B")
		if sums[purl] == "" || is[purl] != sums[purl] {
			t.Errorf("%s has the sum %q, go.sum says %q", purl, is[purl], sums[purl])
		}
	}
	std := "pkg:golang/std@" + strings.Fields(strings.TrimPrefix(info.GoVersion, "go"))[0]
	if _, ok := is[std]; !ok || len(is) != len(info.Deps)+2 { // and libc6
		t.Errorf("%d materials, of which %s is one: %v; want %d", len(is), std, ok, len(info.Deps)+2)
	}
	if !b.Has(b.Programs[0].SHA256) || b.Has(sums["pkg:golang/"+info.Deps[0].Path+"@"+info.Deps[0].Version]) {
		t.Error("it does not know what its files are")
	}
}

// TestWhatIsInWhat: libc6 is in the firmware and not in the program.
func TestWhatIsInWhat(t *testing.T) {
	raw, err := aBill(t, true).JSON(time.Time{})
	must(t, err)
	bom, err := Read(raw)
	must(t, err)
	within := map[string]string{}
	for _, d := range *bom.Dependencies {
		if d.Dependencies != nil {
			within[d.Ref] = fmt.Sprint(*d.Dependencies)
		}
	}
	const libc = "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=arm64"
	for ref, refs := range within {
		if has, firmware := strings.Contains(refs, libc), strings.HasPrefix(ref, "deimos-firmware@"); has != firmware {
			t.Errorf("libc6 is said to be in %s: %v", ref, has)
		}
	}
	if top := within["deimos@1.2.3"]; !strings.Contains(top, "deimos-firmware@") || !strings.Contains(top, "image@") {
		t.Errorf("the release has %s", top)
	}
}

// TestTheSameFilesGiveTheSameBill, wherever they are, and others another one.
func TestTheSameFilesGiveTheSameBill(t *testing.T) {
	write := func(listed bool, at time.Time) string {
		t.Helper()
		raw, err := aBill(t, listed).JSON(at)
		must(t, err)
		return string(raw)
	}
	at := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	one := write(true, at)
	if other := write(true, at); other != one {
		t.Error("two bills of the same differ")
	}
	serials := map[string]bool{}
	for _, raw := range []string{one, write(false, at), write(true, at.Add(time.Hour))} {
		bom, err := Read([]byte(raw))
		must(t, err)
		serials[bom.SerialNumber] = true
	}
	if len(serials) != 3 {
		t.Errorf("three bills have the serial numbers %v", serials)
	}
}

// TestTheBillOfAnotherFirmwareIsRefused: one that was left of an older build.
func TestTheBillOfAnotherFirmwareIsRefused(t *testing.T) {
	file := aFirmware(t, "a firmware", true)
	for content, words := range map[string]string{"another firmware": "of another firmware", "a firmware": ""} {
		must(t, os.WriteFile(file, []byte(content), 0o644))
		_, err := New("deimos", "1.2.3").AddFirmware(file, "1.2.3")
		if words == "" && err != nil || words != "" && (err == nil || !strings.Contains(err.Error(), words)) {
			t.Errorf("%s: %v", content, err)
		}
	}
	for _, raw := range []string{"{", "{}", `{"bomFormat":"CycloneDX","specVersion":"1.6","metadata":{"component":{"name":"x","type":"firmware"}}}`} {
		if _, err := Read([]byte(raw)); err == nil {
			t.Errorf("%s was read", raw)
		}
		must(t, os.WriteFile(Beside(file), []byte(raw), 0o644))
		if _, err := New("deimos", "1.2.3").AddFirmware(file, "1.2.3"); err == nil || !strings.Contains(err.Error(), "bill of materials") {
			t.Errorf("%s: %v", raw, err)
		}
	}
}

func TestWhatIsNoProgramIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent")
	must(t, os.WriteFile(file, []byte("#!/bin/sh\n"), 0o755))
	if err := New("deimos", "1.2.3").AddProgram(file, "1.2.3"); err == nil || !strings.Contains(err.Error(), file) {
		t.Error(err)
	}
}
