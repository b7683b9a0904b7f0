package hw

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/deimos-edge/deimos/board"
)

// inventory.schema.json and docs/inventory.md are made here, from the types of
// the inventory and the comments in their source. -update writes them.

// comments are what a package's source says about its types, fields and constants.
type comments struct {
	types  map[string]string   // by name
	fields map[string]string   // by "Type.Field"
	values map[string][]string // texts of the constants of a type
}

func readComments(tb testing.TB, dir string) comments {
	c := comments{map[string]string{}, map[string]string{}, map[string][]string{}}
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	must(tb, err)
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments|parser.SkipObjectResolution)
		must(tb, err)
		for _, d := range f.Decls {
			if g, ok := d.(*ast.GenDecl); ok {
				c.read(g)
			}
		}
	}
	return c
}

func (c comments) read(g *ast.GenDecl) {
	for _, spec := range g.Specs {
		switch s := spec.(type) {
		case *ast.TypeSpec:
			c.types[s.Name.Name] = prose(g.Doc, s.Doc)
			body, ok := s.Type.(*ast.StructType)
			if !ok {
				continue
			}
			for _, f := range body.Fields.List {
				for _, name := range f.Names {
					c.fields[s.Name.Name+"."+name.Name] = prose(f.Doc, f.Comment)
				}
			}
		case *ast.ValueSpec:
			kind, ok := s.Type.(*ast.Ident)
			if !ok || g.Tok != token.CONST || len(s.Values) != 1 {
				continue
			}
			if lit, ok := s.Values[0].(*ast.BasicLit); ok && lit.Kind == token.STRING {
				text, _ := strconv.Unquote(lit.Value)
				c.values[kind.Name] = append(c.values[kind.Name], text)
			}
		}
	}
}

func prose(groups ...*ast.CommentGroup) string {
	var parts []string
	for _, g := range groups {
		if g != nil {
			parts = append(parts, strings.Join(strings.Fields(g.Text()), " "))
		}
	}
	return strings.TrimSpace(strings.Join(parts, " "))
}

// describer walks the types.
type describer struct {
	source map[string]comments // by the path of the package
	done   map[string]bool
	defs   []definition // in the order of their first use
	bare   []string     // fields without a word about them
}

// definition is one object of the format.
type definition struct {
	name, about string
	fields      []field
}

type field struct {
	name, kind, about string
	optional          bool
	schema            map[string]any
}

func describe(tb testing.TB) *describer {
	d := &describer{
		source: map[string]comments{
			reflect.TypeFor[Inventory]().PkgPath():   readComments(tb, "."),
			reflect.TypeFor[board.Board]().PkgPath(): readComments(tb, "../board"),
		},
		done: map[string]bool{},
	}
	d.object(reflect.TypeFor[Inventory]())
	return d
}

func nameOf(t reflect.Type) string {
	if t.PkgPath() == reflect.TypeFor[board.Board]().PkgPath() && t.Name() != "Board" {
		return "Board" + t.Name() // both have disks, sensors and LEDs
	}
	return t.Name()
}

func (d *describer) object(t reflect.Type) {
	if d.done[nameOf(t)] {
		return
	}
	d.done[nameOf(t)] = true
	at := len(d.defs)
	d.defs = append(d.defs, definition{})
	d.defs[at] = definition{nameOf(t), d.source[t.PkgPath()].types[t.Name()], d.fieldsOf(t)}
}

func (d *describer) fieldsOf(t reflect.Type) []field {
	var all []field
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			all = append(all, d.fieldsOf(f.Type)...)
			continue
		}
		tag := f.Tag.Get("json")
		if tag == "" || tag == "-" {
			continue
		}
		name, options, _ := strings.Cut(tag, ",")
		about := d.source[t.PkgPath()].fields[t.Name()+"."+f.Name]
		kind, schema := d.schema(f.Type)
		if about == "" && t.PkgPath() == reflect.TypeFor[Inventory]().PkgPath() && schema["$ref"] == nil && schema["items"] == nil && schema["enum"] == nil {
			d.bare = append(d.bare, t.Name()+"."+f.Name)
		}
		if about != "" {
			schema["description"] = about
		}
		all = append(all, field{name, kind, about, strings.Contains(options, "omit"), schema})
	}
	return all
}

// schema describes a type, in words and as JSON schema.
func (d *describer) schema(t reflect.Type) (string, map[string]any) {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return "time", map[string]any{"type": "string", "format": "date-time"}
	case t.Kind() == reflect.Pointer:
		return d.schema(t.Elem())
	}
	switch t.Kind() {
	case reflect.Struct:
		d.object(t)
		return nameOf(t), map[string]any{"$ref": "#/$defs/" + nameOf(t)}
	case reflect.Slice:
		kind, items := d.schema(t.Elem())
		return "list of " + kind, map[string]any{"type": "array", "items": items}
	case reflect.Bool:
		return "true or false", map[string]any{"type": "boolean"}
	case reflect.Uint64:
		return "count", map[string]any{"type": "integer", "minimum": 0}
	case reflect.Int:
		return "integer", map[string]any{"type": "integer"}
	case reflect.Float64:
		return "number", map[string]any{"type": "number"}
	case reflect.String:
		if values := d.source[t.PkgPath()].values[t.Name()]; len(values) > 0 {
			return strings.Join(values, ", "), map[string]any{"type": "string", "enum": values}
		}
		return "text", map[string]any{"type": "string"}
	}
	panic(fmt.Sprintf("the format has a %s, of which this generator knows nothing", t))
}

func (d *describer) jsonSchema() []byte {
	defs := map[string]any{}
	for _, def := range d.defs {
		properties, required := map[string]any{}, []string{}
		for _, f := range def.fields {
			properties[f.name] = f.schema
			if !f.optional {
				required = append(required, f.name)
			}
		}
		object := map[string]any{"type": "object", "description": def.about, "properties": properties, "required": required}
		if len(required) == 0 {
			delete(object, "required")
		}
		if nameOf(reflect.TypeFor[Inventory]()) == def.name {
			properties["format"] = map[string]any{"const": Format, "description": "version of this format"}
		}
		// Fields may be added within a version of the format; ours has none that is not known here.
		object["additionalProperties"] = false
		defs[def.name] = object
	}
	out, err := json.MarshalIndent(map[string]any{
		"$schema": "https://json-schema.org/draft/2020-12/schema",
		"title":   "Inventory of a Deimos device",
		"$ref":    "#/$defs/Inventory",
		"$defs":   defs,
	}, "", "  ")
	if err != nil {
		panic(err)
	}
	return append(out, '\n')
}

func (d *describer) markdown() []byte {
	var out bytes.Buffer
	out.WriteString(`# The inventory

What ` + "`deimos-agent probe -o json`" + ` prints, and a device reports when it has changed: what the machine has. This page and
` + "`hw/inventory.schema.json`" + ` are made from the source by ` + "`go test ./hw -run AsCommitted -update`" + `; do not edit them.

Sizes are bytes, temperatures °C, times RFC 3339 in UTC. A list is empty, never null, if nothing was found. A field that is
marked *optional* is absent if it is not known, is empty, or does not apply. What could not be read is in ` + "`notes`" + `, with the reason.

A machine can be recorded, for a bug report or a test, with ` + "`deimos-agent probe --record DIR`" + `, and looked at with
` + "`deimos-agent probe --root DIR`" + `. Serial numbers, hardware addresses and names of people are replaced, unless ` + "`--exact`" + ` is given.
`)
	for _, def := range d.defs {
		fmt.Fprintf(&out, "\n## %s\n\n%s\n\n| field | is | |\n|---|---|---|\n", def.name, def.about)
		for _, f := range def.fields {
			about := f.about
			if f.optional {
				about = strings.TrimSpace("*optional* " + about)
			}
			fmt.Fprintf(&out, "| `%s` | %s | %s |\n", f.name, f.kind, strings.ReplaceAll(about, "|", "\\|"))
		}
	}
	return out.Bytes()
}

func TestSchemaAndDocumentAreAsCommitted(t *testing.T) {
	d := describe(t)
	asCommitted(t, "inventory.schema.json", d.jsonSchema())
	asCommitted(t, "../docs/inventory.md", d.markdown())
	if len(d.bare) > 0 {
		t.Errorf("nothing says what these are, and in what unit: %v", d.bare)
	}
}

func inventorySchema(tb testing.TB) *jsonschema.Schema {
	tb.Helper()
	raw, err := os.ReadFile("inventory.schema.json")
	must(tb, err)
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	must(tb, err)
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	must(tb, c.AddResource("inventory.schema.json", doc))
	s, err := c.Compile("inventory.schema.json")
	must(tb, err)
	return s
}

func asDocument(tb testing.TB, inv *Inventory) map[string]any {
	tb.Helper()
	raw, err := json.Marshal(inv)
	must(tb, err)
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	must(tb, err)
	return doc.(map[string]any)
}

func TestEveryMachineFitsTheSchema(t *testing.T) {
	schema := inventorySchema(t)
	all := map[string]*Inventory{"this machine": probe(t, Options{}), "an empty one": probe(t, Options{Root: t.TempDir()})}
	for _, name := range machines {
		all[name] = recordedMachine(t, name)
	}
	for name, inv := range all {
		if err := schema.Validate(asDocument(t, inv)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWrongInventoryDoesNotFitTheSchema(t *testing.T) {
	schema := inventorySchema(t)
	inv := recordedMachine(t, "qemu-virt-arm64")
	disk := func(doc map[string]any) map[string]any { return doc["disks"].([]any)[0].(map[string]any) }
	for name, spoil := range map[string]func(map[string]any){
		"another format":   func(doc map[string]any) { doc["format"] = json.Number("2") },
		"section missing":  func(doc map[string]any) { delete(doc, "disks") },
		"section null":     func(doc map[string]any) { doc["disks"] = nil },
		"unknown section":  func(doc map[string]any) { doc["surprise"] = true },
		"no time":          func(doc map[string]any) { doc["taken"] = "yesterday" },
		"negative size":    func(doc map[string]any) { disk(doc)["size"] = json.Number("-1") },
		"size in words":    func(doc map[string]any) { disk(doc)["size"] = "1 GB" },
		"unknown power":    func(doc map[string]any) { disk(doc)["power"] = "dozing" },
		"wrong in a field": func(doc map[string]any) { disk(doc)["health"].(map[string]any)["wear"] = "none" },
		"disk of no name":  func(doc map[string]any) { delete(disk(doc), "name") },
	} {
		doc := asDocument(t, inv)
		spoil(doc)
		if schema.Validate(doc) == nil {
			t.Errorf("%s fits", name)
		}
	}
	if err := schema.Validate(asDocument(t, inv)); err != nil {
		t.Error(err)
	}
}
