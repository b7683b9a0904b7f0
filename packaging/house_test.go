package packaging

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
)

const module = "github.com/deimos-edge/deimos"

// forTests is what the tests of every room may import, and what is below test;
// nobody else.
const forTests = "internal/testenv"

// mayImport is the table of docs/ARCHITECTURE.md: which of our own packages
// those of a room may import, tests included. A room is named by the path of
// its topmost package; the longest name that fits a package is its room, and an
// entry allows that package and all below it. What lies in or below a room's
// own folder it may always import, and its tests what asks for their machine.
var mayImport = map[string][]string{
	"wire":               {},
	"board":              {"wire"},
	"hw":                 {"board", "wire", "internal/durable"},
	"sync/chunk":         {"wire"},
	"sync/store":         {"sync/chunk", "wire", "internal/compactors", "internal/durable"},
	"sync/scrub":         {"sync/chunk", "sync/store", "wire", "internal/durable"},
	"sync/transfer":      {"wire"},
	"sync/orders":        {"sync/chunk", "sync/store", "sync/transfer", "wire"},
	"jobs":               {"wire", "internal/durable"},
	"ota":                {"wire", "internal/durable"},
	"agent":              {"board", "hw", "sync", "jobs", "ota", "wire", "internal/compactors", "internal/durable"},
	"coordinator":        {"wire", "sync/chunk", "ota/bundle", "ota/repo", "internal/durable"},
	"coordinator/engine": {"wire", "internal/durable"},
	"coordinator/trust":  {"wire"},
	"coordinator/api":    {"wire", "sync/chunk"},
	"coordinator/object": {"coordinator/api", "wire", "sync/chunk"},
	"cmd":                {""},
	"internal/cli":       {""},
	"packaging":          {""},
	// On no map: the tests of the whole, what runs processes for them and for
	// the tour, what tests ask of their machine, and how files are replaced.
	"test":                {""},
	"internal/proc":       {},
	forTests:              {},
	"internal/compactors": {},
	"internal/durable":    {},
}

// goPackage is the part of `go list -json` that the rules look at.
type goPackage struct {
	ImportPath   string
	Name         string
	Doc          string // synopsis of the package comment, test files left out
	Dir          string
	Standard     bool
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Error        *struct{ Err string }
}

// within tells whether package path pkg is room or lies below it; the empty
// room holds everything.
func within(pkg, room string) bool {
	return room == "" || pkg == room || strings.HasPrefix(pkg, room+"/")
}

// ours cuts the module's path off an import path; ok is false for a package of
// somebody else.
func ours(importPath string) (pkg string, ok bool) {
	return strings.CutPrefix(importPath, module+"/")
}

// roomOf finds the room of one of our packages.
func roomOf(pkg string) (room string, ok bool) {
	for r := range mayImport {
		if within(pkg, r) && len(r) > len(room) {
			room = r
		}
	}
	return room, room != ""
}

func importRule(pkgs []goPackage) (wrong []string) {
	for _, p := range pkgs {
		pkg, _ := ours(p.ImportPath)
		room, ok := roomOf(pkg)
		if !ok {
			wrong = append(wrong, fmt.Sprintf("%s belongs to no room: add it to docs/ARCHITECTURE.md and to mayImport", pkg))
			continue
		}
		for _, imp := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			target, ok := ours(imp)
			allowed := func(room string) bool { return within(target, room) }
			if target == forTests {
				if slices.Contains(p.Imports, imp) && room != "test" {
					wrong = append(wrong, fmt.Sprintf("%s imports %s, which only tests may", pkg, target))
				}
				continue
			}
			if ok && !within(target, room) && !slices.ContainsFunc(mayImport[room], allowed) {
				wrong = append(wrong, fmt.Sprintf("%s imports %s, which the room %s may not", pkg, target, room))
			}
		}
	}
	return wrong
}

func nameRule(pkgs []goPackage) (wrong []string) {
	for _, p := range pkgs {
		for _, name := range []string{p.Name, path.Base(p.ImportPath)} {
			switch name {
			case "util", "utils", "common", "helper", "helpers", "misc":
				wrong = append(wrong, fmt.Sprintf("%s is called %s, which says nothing: name it for what it is", p.ImportPath, name))
			}
		}
	}
	return wrong
}

func commentRule(pkgs []goPackage) (wrong []string) {
	for _, p := range pkgs {
		if p.Doc == "" && !testsOnlyWithComment(p) {
			wrong = append(wrong, p.ImportPath+" has no package comment")
		}
	}
	return wrong
}

// testsOnlyWithComment tells whether p consists of tests alone, one of which
// carries the package comment, where go list does not look.
func testsOnlyWithComment(p goPackage) bool {
	if len(p.GoFiles) > 0 {
		return false
	}
	for _, name := range slices.Concat(p.TestGoFiles, p.XTestGoFiles) {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
		if err == nil && f.Doc != nil {
			return true
		}
	}
	return false
}

// agentRule keeps the coordinator and its engine out of the agent, whoever
// drags them in.
func agentRule(closure []goPackage) (wrong []string) {
	for _, p := range closure {
		if within(p.ImportPath, "github.com/nats-io/nats-server/v2") || within(p.ImportPath, module+"/coordinator") {
			wrong = append(wrong, "deimos-agent contains "+p.ImportPath)
		}
	}
	return wrong
}

// launchRule keeps the launcher small enough to never need an update.
func launchRule(closure []goPackage) (wrong []string) {
	for _, p := range closure {
		switch {
		case p.Standard, p.ImportPath == module+"/cmd/deimos-launch", p.ImportPath == module+"/ota/slot":
		case within(p.ImportPath, "golang.org/x/sys"):
		default:
			wrong = append(wrong, "deimos-launch contains "+p.ImportPath+": it may have the standard library, ota/slot and golang.org/x/sys")
		}
	}
	return wrong
}

// homePath finds absolute paths of somebody's machine: below root's home or a
// folder called work.
var homePath = regexp.MustCompile(`(^|[\s"'` + "`" + `=:(\[{<>,;|])(file://)?/(root|work)/`)

// textRule looks at one tracked file.
func textRule(name string, content []byte) (wrong []string) {
	if bytes.IndexByte(content, 0) >= 0 || slices.Contains(strings.Split(name, "/"), "testdata") {
		return nil
	}
	for i, line := range bytes.Split(content, []byte("\n")) {
		if m := homePath.Find(line); m != nil {
			wrong = append(wrong, fmt.Sprintf("%s:%d: a path of one machine (%s)", name, i+1, bytes.TrimSpace(m)))
		}
	}
	return wrong
}

// versionRule wants `var version = "…"` in a program's file set, because the
// linker ignores -X main.version without a word where there is none.
func versionRule(program string, files []*ast.File) (wrong []string) {
	for _, f := range files {
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				v := s.(*ast.ValueSpec)
				if slices.ContainsFunc(v.Names, func(n *ast.Ident) bool { return n.Name == "version" }) && constantOrNone(v) {
					return nil
				}
			}
		}
	}
	return []string{program + " has no `var version = \"…\"` (a string literal) for the Makefile to set"}
}

// constantOrNone tells whether v starts as the linker wants it: with nothing or
// with a literal.
func constantOrNone(v *ast.ValueSpec) bool {
	for _, e := range v.Values {
		if l, ok := e.(*ast.BasicLit); !ok || l.Kind != token.STRING {
			return false
		}
	}
	return true
}

// TestRulesSpeak breaks each rule once.
func TestRulesSpeak(t *testing.T) {
	pkg := func(path string, imports ...string) goPackage {
		return goPackage{ImportPath: module + "/" + path, Name: "x", Doc: "d", Imports: imports}
	}
	imports := func(from, to string) []string { return importRule([]goPackage{pkg(from, module+"/"+to)}) }
	source := func(src string) []string {
		f, err := parser.ParseFile(token.NewFileSet(), "main.go", "package main\n"+src, 0)
		if err != nil {
			t.Fatal(err)
		}
		return versionRule("p", []*ast.File{f})
	}
	inTest := pkg("wire")
	inTest.XTestImports = []string{module + "/agent"}
	util := pkg("sync/store")
	util.Name = "util"
	silent := pkg("wire")
	silent.Doc = ""

	for claim, wrong := range map[string][]string{
		"wire imports no room":                      imports("wire", "board"),
		"not even in a test":                        importRule([]goPackage{inTest}),
		"a program, what is for tests":              imports("wire", forTests),
		"a device room, the coordinator":            imports("hw", "coordinator/registry"),
		"the agent, the coordinator":                imports("agent", "coordinator"),
		"hw, sync":                                  imports("hw", "sync/store"),
		"sync, jobs":                                imports("sync/orders", "jobs/policy"),
		"jobs, ota":                                 imports("jobs", "ota/bundle"),
		"ota, the agent":                            imports("ota/slot", "agent"),
		"the store, the transfer beside it":         imports("sync/store", "sync/transfer"),
		"the coordinator, a store":                  imports("coordinator/storage", "sync/store"),
		"the coordinator, the device's update":      imports("coordinator", "ota"),
		"the coordinator, slots":                    imports("coordinator", "ota/slot"),
		"a name that only begins like a room's":     imports("coordinator", "sync/chunky"),
		"a room, what the command lines share":      imports("agent", "internal/cli"),
		"the engine, chunk ids":                     imports("coordinator/engine", "sync/chunk"),
		"the API's types, the coordinator":          imports("coordinator/api", "coordinator"),
		"a room, the tour":                          imports("coordinator", "packaging/tour"),
		"a room that nobody has drawn":              imports("cellar", "wire"),
		"a package called util":                     nameRule([]goPackage{util}),
		"a folder called helpers":                   nameRule([]goPackage{pkg("ota/helpers")}),
		"no package comment":                        commentRule([]goPackage{silent}),
		"the engine in the agent":                   agentRule([]goPackage{{ImportPath: "github.com/nats-io/nats-server/v2/server"}}),
		"the coordinator in the agent":              agentRule([]goPackage{pkg("coordinator/engine")}),
		"a library in the launcher":                 launchRule([]goPackage{{ImportPath: "github.com/google/renameio/v2"}}),
		"another room in the launcher":              launchRule([]goPackage{pkg("wire")}),
		"a home in a script":                        textRule("scripts/x", []byte("a\ncd "+"/root"+"/go\n")),
		"a home in Go":                              textRule("x.go", []byte(`p := "`+"/work"+`/main"`)),
		"a home in a document":                      textRule("README.md", []byte("see `file:///root"+"/deimos`")),
		"no version":                                source(`var name = "x"`),
		"a version that is constant":                source(`const version = "1"`),
		"a version that is computed":                source(`var version = f()`),
		"a version that is a local variable's name": source(`func main() { var version = "1"; _ = version }`),
	} {
		if len(wrong) == 0 {
			t.Errorf("no rule spoke about: %s", claim)
		}
	}

	for claim, wrong := range map[string][]string{
		"the coordinator, chunk ids":       imports("coordinator/storage", "sync/chunk"),
		"the coordinator, its own":         imports("coordinator", "coordinator/engine"),
		"the agent, a room below jobs":     imports("agent", "jobs/policy"),
		"a program, anything":              imports("cmd/deimos", "coordinator/engine"),
		"a test's program, a seed":         imports("test/powercut", forTests),
		"the launcher, what it may":        launchRule([]goPackage{pkg("ota/slot"), {ImportPath: "os", Standard: true}, {ImportPath: "golang.org/x/sys/unix"}}),
		"the agent, the NATS-free rest":    agentRule([]goPackage{pkg("wire"), {ImportPath: "github.com/eclipse/paho.mqtt.golang"}}),
		"a path that only ends like root/": textRule("x.go", []byte("metadata/root/1.json, $DIR/work/x, Network/work/")),
		"testdata":                         textRule("hw/testdata/pi/mounts", []byte("x "+"/root"+"/y")),
		"a version to set":                 source("// version is set by the linker.\nvar version = \"dev\""),
		"an empty version to set":          source("var version string"),
	} {
		if len(wrong) != 0 {
			t.Errorf("a rule spoke against %s: %s", claim, wrong)
		}
	}
}

func TestRoomsImportOnlyTheirNeighbours(t *testing.T) { report(t, importRule(everyPackage(t))) }
func TestPackagesAreNamedForWhatTheyAre(t *testing.T) { report(t, nameRule(everyPackage(t))) }
func TestEveryPackageHasAComment(t *testing.T)        { report(t, commentRule(everyPackage(t))) }

// TestMapAndRulesNameTheSameRooms keeps docs/ARCHITECTURE.md and mayImport
// from drifting apart.
func TestMapAndRulesNameTheSameRooms(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join(root(t), "docs", "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(doc), "## Rooms")
	if !ok {
		t.Fatal("docs/ARCHITECTURE.md has no section Rooms")
	}
	table, _, _ = strings.Cut(table, "\n## ")
	var drawn []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(table, -1) {
		for _, m := range regexp.MustCompile("`([a-z/]+?)(?:/\\.\\.\\.)?`").FindAllStringSubmatch(row[1], -1) {
			drawn = append(drawn, m[1])
		}
	}
	for room := range mayImport {
		if room != "test" && !within(room, "internal") && !slices.Contains(drawn, room) {
			t.Errorf("mayImport has the room %s, the map has not", room)
		}
	}
	for _, room := range drawn {
		if _, ok := mayImport[room]; !ok {
			t.Errorf("the map has the room %s, mayImport has not", room)
		}
	}
}

func TestAgentHasNoPartOfTheCoordinator(t *testing.T) {
	var wrong []string
	for _, arch := range []string{"amd64", "arm64", "arm"} {
		wrong = append(wrong, agentRule(closure(t, arch, "cmd/deimos-agent"))...)
	}
	report(t, wrong)
}

// TestTheAgentCarriesNoMethodThatNobodyCalls: if any function looks a method up by a
// name that the linker cannot know, every exported method of every type stays, a
// sixth of the agent. text/template and github.com/alecthomas/kong have such ones.
func TestTheAgentCarriesNoMethodThatNobodyCalls(t *testing.T) {
	lookAround(t)
	cmd := exec.Command("go", "build", "-ldflags=-dumpdep", "-o", filepath.Join(t.TempDir(), "agent"), "./cmd/deimos-agent")
	cmd.Dir = root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=arm64")
	said, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, said[max(0, len(said)-2000):])
	}
	if !bytes.Contains(said, []byte("main.main -> ")) {
		t.Fatal("the linker did not say what it keeps, and why")
	}
	for line := range strings.Lines(string(said)) {
		if why, what, _ := strings.Cut(strings.TrimSpace(line), " -> "); strings.HasSuffix(what, "<ReflectMethod>") {
			t.Fatalf("%s, which %s uses, looks methods up by name", what, why)
		}
	}
}

func TestLauncherIsStandardLibraryAndSlotsOnly(t *testing.T) {
	var wrong []string
	for _, arch := range []string{"amd64", "arm64", "arm"} {
		wrong = append(wrong, launchRule(closure(t, arch, "cmd/deimos-launch"))...)
	}
	report(t, wrong)
}

func TestEveryProgramHasAVersionToSet(t *testing.T) {
	programs := 0
	var wrong []string
	for _, p := range everyPackage(t) {
		pkg, _ := ours(p.ImportPath)
		if p.Name != "main" || !within(pkg, "cmd") && pkg != "packaging/tour/brokenagent" {
			continue
		}
		programs++
		var files []*ast.File
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, f)
		}
		wrong = append(wrong, versionRule(pkg, files)...)
	}
	report(t, wrong)
	if programs == 0 {
		t.Error("there is no program to look at")
	}
}

func TestTrackedFilesNameNoOnesHome(t *testing.T) {
	dir := root(t)
	out, err := exec.CommandContext(t.Context(), "git", "-C", dir, "ls-files", "-z").Output()
	if err != nil {
		testenv.Cannot(t, "this is no git checkout, so nothing tells which files are tracked: %v", err)
	}
	names := strings.Split(strings.TrimRight(string(out), "\x00"), "\x00")
	if len(names) < 10 {
		t.Fatalf("git knows of %d files only", len(names))
	}
	for _, name := range names {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, os.ErrNotExist) {
			continue // removed, not yet committed
		}
		if err != nil {
			t.Error(err)
			continue
		}
		report(t, textRule(name, content))
	}
}

// TestTheTestsOfTheDocumentsAreThere: a table of who tries what is worth nothing once one
// of them was renamed.
func TestTheTestsOfTheDocumentsAreThere(t *testing.T) {
	raw, err := os.ReadFile("../docs/developer.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`(Test[A-Z][A-Za-z0-9]+)`").FindAllStringSubmatch(string(raw), -1)
	if len(named) < 50 {
		t.Fatalf("only %d tests are named: is the table still there?", len(named))
	}
	there := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func (Test[A-Z][A-Za-z0-9]+)\(`)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		raw, err := os.ReadFile(path)
		for _, m := range declared.FindAllSubmatch(raw, -1) {
			there[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range named {
		if !there[m[1]] {
			t.Errorf("docs/developer.md names %s, which is nowhere", m[1])
		}
	}
}

func TestLicenceIsApache2WordForWord(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root(t), "LICENSE"))
	if err != nil {
		t.Fatal(err)
	}
	// Digest of LICENSE-2.0.txt as the Apache Software Foundation publishes it.
	const want = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
	if sum := sha256.Sum256(text); hex.EncodeToString(sum[:]) != want {
		t.Errorf("LICENSE is not the Apache License 2.0 word for word (SHA-256 %x)", sum)
	}
}

func report(t *testing.T, wrong []string) {
	t.Helper()
	slices.Sort(wrong) // platforms repeat one another
	for _, w := range slices.Compact(wrong) {
		t.Error(w)
	}
}

// root is the folder of go.mod, one above this package.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// everyPackage lists the module's own packages as each platform sees them; a
// package that several platforms see alike appears as often.
func everyPackage(t *testing.T) []goPackage {
	t.Helper()
	lookAround(t)
	pkgs, err := listed()
	if err != nil {
		t.Fatal(err)
	}
	return pkgs
}

var listed = sync.OnceValues(func() ([]goPackage, error) {
	var all []goPackage
	for _, platform := range [][2]string{{"linux", "amd64"}, {"linux", "arm64"}, {"linux", "arm"}, {"wasip1", "wasm"}} {
		pkgs, err := goList(platform[0], platform[1], "./...")
		if err != nil {
			return nil, err
		}
		all = append(all, pkgs...)
	}
	return all, nil
})

// closure lists a program and everything that is linked into it.
func closure(t *testing.T, arch, program string) []goPackage {
	t.Helper()
	lookAround(t)
	pkgs, err := goList("linux", arch, "-deps", "./"+program)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pkgs {
		if p.Error != nil {
			t.Fatalf("%s for %s: %s", program, arch, p.Error.Err)
		}
	}
	return pkgs
}

// lookAround opens every folder of the sources. The cache of test results asks
// only about files that the test itself has looked at, not about what the go
// command has read for it; without this, an old pass would be served for new
// sources.
func lookAround(t *testing.T) {
	t.Helper()
	top := root(t)
	err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && name != top && (name[len(top)+1:] == "bin" || strings.HasPrefix(d.Name(), ".")) {
			return filepath.SkipDir
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// goList asks the go command about packages of this module. Packages that do
// not load are among the result, with their Error set.
func goList(goos, arch string, args ...string) ([]goPackage, error) {
	cmd := exec.Command("go", append([]string{"list", "-e",
		"-json=ImportPath,Name,Doc,Dir,Standard,GoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports,Error"}, args...)...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH="+arch, "GOARM=7", "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, stderr.Bytes())
	}
	var pkgs []goPackage
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := d.Decode(&p); err == io.EOF {
			return pkgs, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		pkgs = append(pkgs, p)
	}
}
