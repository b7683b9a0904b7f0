package cli

import (
	"context"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// The agent's commands are structs with the tags of github.com/alecthomas/kong,
// of which this reads what the agent uses. kong itself finds methods by names
// that it makes at run time, so that the linker has to keep every exported method
// of every type: 8 MB of an agent that may have 20. Tests hold both to the same
// help and the same understanding.
//
//	cmd          a command; the field is a struct, with commands of its own or a
//	             method Run() error or Run(context.Context) error, and a method
//	             Help() string if there is more to say
//	default      of a command: what is meant if none of its parent's is named
//	             ("withargs"); of a flag: its value
//	arg          a positional argument; a list takes all that come
//	optional     it may be left out
//	env          the variable that a flag is read from if it is not given
//	enum         the values there are, with commas
//	name, short, placeholder, help    how it is called and shown
//
// A field is a string, a bool, an int or int64, a list of strings or a
// *time.Duration, which is nil if it was not given.

// runner and runnerWithin are commands that do something.
type (
	runner       interface{ Run() error }
	runnerWithin interface{ Run(context.Context) error }
)

// node is a command, or the program itself.
type node struct {
	name     string // "" for the program
	help     string
	detail   string
	parent   *node
	children []*node
	preset   *node // of the children: the one that is meant if none is named
	flags    []*value
	args     []*value
	run      func(context.Context) error // nil if it only has children
}

// value is a flag or a positional argument.
type value struct {
	name        string
	short       string // one letter, or ""
	help        string
	placeholder string
	preset      string
	env         string
	enum        []string
	positional  bool
	optional    bool
	target      reflect.Value
	given       bool
}

// Run does what args ask of grammar, a pointer to a struct of commands; about
// says what the program is for.
func Run(ctx context.Context, name, about string, grammar any, args []string) error {
	top := newNode("", about, nil, reflect.ValueOf(grammar).Elem())
	n, help, err := top.parse(args)
	switch {
	case help:
		return writeHelp(os.Stdout, name, n, Columns(os.Stdout))
	case err != nil:
		return Usage(name, err)
	}
	return n.run(ctx)
}

// newNode reads a command's struct. It panics if a tag or a type is none that it
// knows: that is a mistake in the program, which any of its tests finds.
func newNode(name, help string, parent *node, v reflect.Value) *node {
	n := &node{name: name, help: help, parent: parent}
	n.fields(v)
	self := v.Addr().Interface()
	if d, ok := self.(interface{ Help() string }); ok {
		n.detail = d.Help()
	}
	switch r := self.(type) {
	case runnerWithin:
		n.run = r.Run
	case runner:
		n.run = func(context.Context) error { return r.Run() }
	}
	if (n.run == nil) != (len(n.children) > 0) || len(n.children) > 0 && len(n.flags)+len(n.args) > 0 {
		panic(fmt.Sprintf("cli: %s has to have either commands, or a method Run with flags and arguments", v.Type()))
	}
	return n
}

// fields reads the fields of a command's struct, and of those embedded in it.
func (n *node) fields(v reflect.Value) {
	for i := range v.NumField() {
		f, tag := v.Type().Field(i), v.Type().Field(i).Tag
		if f.Anonymous {
			n.fields(v.Field(i))
			continue
		}
		name := tag.Get("name")
		if name == "" {
			name = dashed(f.Name)
		}
		if _, ok := tag.Lookup("cmd"); ok {
			child := newNode(name, tag.Get("help"), n, v.Field(i))
			n.children = append(n.children, child)
			if tag.Get("default") == "withargs" {
				n.preset = child
			}
			continue
		}
		x := &value{
			name: name, short: tag.Get("short"), placeholder: tag.Get("placeholder"),
			preset: tag.Get("default"), env: tag.Get("env"), target: v.Field(i),
		}
		if !slices.Contains(settable, f.Type) {
			panic(fmt.Sprintf("cli: a %s cannot be a flag or an argument: %s of %s", f.Type, f.Name, v.Type()))
		}
		if s := tag.Get("enum"); s != "" {
			x.enum = strings.Split(s, ",")
		}
		x.help = strings.NewReplacer("${default}", x.preset, "${enum}", tag.Get("enum")).Replace(tag.Get("help"))
		if _, isArg := tag.Lookup("arg"); isArg {
			_, x.optional = tag.Lookup("optional")
			x.positional = true
			n.args = append(n.args, x)
		} else {
			n.flags = append(n.flags, x)
		}
	}
}

// dashed makes log-level of LogLevel.
func dashed(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

func (x *value) isList() bool { return x.target.Kind() == reflect.Slice }
func (x *value) isBool() bool { return x.target.Kind() == reflect.Bool }

// settable are the types that set knows.
var settable = []reflect.Type{
	reflect.TypeFor[string](), reflect.TypeFor[bool](), reflect.TypeFor[int](), reflect.TypeFor[int64](), reflect.TypeFor[*time.Duration](), reflect.TypeFor[[]string](),
}

// set reads a value from text. A list grows; a flag's text lists with commas.
func (x *value) set(text string) error {
	x.given = true
	switch p := x.target.Addr().Interface().(type) {
	case *string:
		*p = text
	case *bool:
		switch strings.ToLower(text) {
		case "true", "1", "yes":
			*p = true
		case "false", "0", "no":
			*p = false
		default:
			return fmt.Errorf("--%s is true or false, not %q", x.name, text)
		}
	case *int, *int64:
		n, err := strconv.ParseInt(text, 10, x.target.Type().Bits())
		if err != nil {
			return fmt.Errorf("--%s wants a whole number, not %q", x.name, text)
		}
		x.target.SetInt(n)
	case **time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("--%s wants a time such as 90m or 24h, not %q", x.name, text)
		}
		*p = &d
	case *[]string:
		if x.positional {
			*p = append(*p, text)
		} else if text != "" {
			*p = append(*p, strings.Split(text, ",")...)
		}
	}
	return nil
}

// parse reads a command line up to its end, and returns the command that it
// names, and whether only help is wanted, which is so even if the rest is wrong.
func (n *node) parse(args []string) (_ *node, help bool, err error) {
	named, positional := n, []string(nil)
	early := ""                         // a flag of the command that is meant where none is named
	for only := false; len(args) > 0; { // only positional arguments, after "--"
		arg := args[0]
		args = args[1:]
		switch {
		case only || arg == "-" || !strings.HasPrefix(arg, "-"):
			if child := n.child(arg); child != nil {
				if early != "" && err == nil && child != n.preset { // it would be lost, and the command meant for another folder
					err = fmt.Errorf("%s must stand behind %s", early, arg)
				}
				named, n = child, child
			} else if err == nil {
				if n.preset != nil {
					n = n.preset
				}
				if !n.takes(len(positional)) {
					err = n.unexpected(arg)
				}
				positional = append(positional, arg)
			}
		case arg == "--":
			only = true
		case arg == "--help", arg == "-h":
			return named, true, nil
		case err == nil:
			if n.preset != nil {
				early, _, _ = strings.Cut(arg, "=")
			}
			args, err = n.flag(arg, args)
		}
	}
	if err != nil {
		return named, false, err
	}
	if n.preset != nil {
		n = n.preset
	}
	return n, false, n.finish(positional)
}

func (n *node) child(name string) *node {
	i := slices.IndexFunc(n.children, func(c *node) bool { return c.name == name })
	if i < 0 {
		return nil
	}
	return n.children[i]
}

// takes tells whether n has a positional argument at i.
func (n *node) takes(i int) bool {
	return i < len(n.args) || len(n.args) > 0 && n.args[len(n.args)-1].isList()
}

// flag reads one argument that begins with a dash, and what of the next
// arguments belongs to it; the others are returned.
func (n *node) flag(arg string, rest []string) ([]string, error) {
	if n.preset != nil {
		n = n.preset
	}
	name, text, attached := strings.Cut(arg, "=")
	is := func(x *value) bool { return "--"+x.name == name }
	if !strings.HasPrefix(arg, "--") {
		name, text = arg[:2], strings.TrimPrefix(arg[2:], "=")
		attached = len(arg) > 2
		is = func(x *value) bool { return "-"+x.short == name }
	}
	i := slices.IndexFunc(n.flags, is)
	switch {
	case i < 0:
		return rest, n.unknown(name)
	case attached:
		return rest, n.flags[i].set(text)
	case n.flags[i].isBool():
		return rest, n.flags[i].set("true")
	case len(rest) == 0 || strings.HasPrefix(rest[0], "-") && rest[0] != "-":
		return rest, fmt.Errorf("%s wants a value: %s=%s", name, name, n.flags[i].example())
	}
	return rest[1:], n.flags[i].set(rest[0])
}

// finish fills in what the command line does not say, and looks whether it is enough.
func (n *node) finish(positional []string) error {
	if n.run == nil {
		return fmt.Errorf("expected one of %s", n.names())
	}
	for i, x := range n.args {
		for len(positional) > 0 && (!x.given || x.isList()) {
			if err := x.set(positional[0]); err != nil {
				return err
			}
			positional = positional[1:]
		}
		if !x.given && !x.optional {
			var missing []string
			for _, x := range n.args[i:] {
				missing = append(missing, x.summary())
			}
			return fmt.Errorf("expected %q", strings.Join(missing, " "))
		}
	}
	for _, x := range n.flags {
		text, from := os.LookupEnv(x.env)
		if from = from && x.env != ""; !from {
			text = x.preset
		}
		if !x.given && (from || text != "") {
			if err := x.set(text); err != nil {
				if from {
					err = fmt.Errorf("%w, from $%s", err, x.env)
				}
				return err
			}
		}
		if len(x.enum) > 0 && !slices.Contains(x.enum, x.target.String()) {
			return fmt.Errorf("--%s must be one of %s but got %q", x.name, quoted(x.enum), x.target)
		}
	}
	return nil
}

// unexpected is for an argument that is no command and that no command takes.
func (n *node) unexpected(arg string) error {
	var names []string
	for _, c := range n.children {
		names = append(names, c.name)
	}
	return fmt.Errorf("unexpected argument %s%s", arg, meant(arg, names))
}

func (n *node) unknown(flag string) error {
	names := []string{"--help", "-h"}
	for _, x := range n.flags {
		names = append(names, "--"+x.name)
		if x.short != "" {
			names = append(names, "-"+x.short)
		}
	}
	return fmt.Errorf("unknown flag %s%s", flag, meant(flag, names))
}

// names lists the commands of n.
func (n *node) names() string {
	var names []string
	for _, c := range n.children {
		names = append(names, c.path())
	}
	return quoted(names)
}

// path is how n is called after the program's name.
func (n *node) path() string {
	if n.parent == nil {
		return n.name
	}
	return strings.TrimSpace(n.parent.path() + " " + n.name)
}

func quoted(list []string) string {
	q := make([]string, len(list))
	for i, s := range list {
		q[i] = strconv.Quote(s)
	}
	return strings.Join(q, ",")
}

// meant asks for what begins like it or differs in two letters at most.
func meant(said string, names []string) string {
	var close []string
	for _, name := range names {
		if strings.HasPrefix(name, said) || distance(name, said) <= 2 {
			close = append(close, name)
		}
	}
	switch len(close) {
	case 0:
		return ""
	case 1:
		return ", did you mean " + quoted(close) + "?"
	}
	return ", did you mean one of " + quoted(close) + "?"
}

// distance is Levenshtein's: how many letters must be inserted, deleted or
// replaced to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0]++
		for j := range len(b) {
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			diagonal = row[j+1]
			row[j+1] = min(replace, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
