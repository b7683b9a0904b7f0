package cli

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"
)

type shared struct {
	Where string `default:"/here" env:"CLI_TEST_WHERE" help:"Where (${default})."`
}

type leaf struct {
	First  string   `arg:"" optional:"" help:"The first."`
	Rest   []string `arg:"" optional:"" help:"The others."`
	Yes    bool     `help:"Do it."`
	Lines  int64    `env:"CLI_TEST_LINES" help:"So many."`
	Points int      `default:"7" help:"Points."`
	List   []string `name:"use" help:"Those."`
	Since  *time.Duration
	shared
	LogFlags
	Output
}

func (*leaf) Run() error { return nil }

type strict struct {
	From string `arg:"" help:"From."`
	To   string `arg:"" help:"To."`
}

func (strict) Run(context.Context) error { return nil }

type sample struct {
	Group struct {
		Show leaf   `cmd:"" default:"withargs" help:"Show."`
		Move strict `cmd:"" help:"Move."`
	} `cmd:"" help:"A group."`
	Plain struct {
		Leaf leaf `cmd:"" help:"A leaf."`
	} `cmd:"" help:"Without a default."`
	Top leaf `cmd:"" help:"At the top."`
}

// understood are lines that have to mean the same to us as to kong.
var understood = []string{
	"top", "top a", "top a b c", "top --yes a", "top a --yes b", "top --yes=false", "top --yes=no", "top --yes=1",
	"top --lines 3", "top --lines=-3", "top --points=0", "top --use a --use b,c", "top --use=a", "top --since 90m", "top --since=0", "top --where=",
	"top --where -", "top -", "top -- --yes", "top -o json", "top -ojson", "top --output=json a", "top --log-level debug --log-format=text",
	"top --where there --where=here", "top a=b", "top --where=a=b",
	"group", "group a", "group --yes", "group show a --lines 3", "group --yes show a", "group -o json", "group a --use x", "group move a b", "group move -- -a -b",
	"plain leaf", "plain leaf x --yes", "-- top", "top -- -h",
}

// refused are lines that neither may accept.
var refused = []string{
	"other", "top --other", "top --lines", "top --lines x", "top --lines 99999999999999999999", "top --since 5", "top -o xml", "top --output",
	"top --log-level loud", "top --yes=perhaps", "top -x", "top --where --yes", "plain", "plain other", "group move", "group move a", "group move a b c",
	"group --yes move a b --yes", "--yes",
}

func TestALineMeansWhatItMeansToKong(t *testing.T) {
	for _, env := range []map[string]string{{}, {"CLI_TEST_WHERE": "/env", "CLI_TEST_LINES": "12"}, {"CLI_TEST_WHERE": ""}, {"DEIMOS_LOG_LEVEL": "warn"}} {
		for name, v := range env {
			t.Setenv(name, v)
		}
		for _, line := range understood {
			var want, got sample
			p, err := kong.New(&want)
			if err != nil {
				t.Fatal(err)
			}
			k, err := p.Parse(strings.Fields(line))
			if err != nil {
				t.Fatalf("kong does not know %q: %v", line, err)
			}
			n, help, err := newNode("", "", nil, reflect.ValueOf(&got).Elem()).parse(strings.Fields(line))
			if err != nil || help {
				t.Errorf("%q: %v, help %v", line, err, help)
				continue
			}
			if command := k.Selected().Path(); n.path() != command {
				t.Errorf("%q is %q, want %q", line, n.path(), command)
			}
			// Of what is not asked for, kong sets the defaults too.
			if g, w := chosen(&got, n.path()), chosen(&want, n.path()); !reflect.DeepEqual(g, w) {
				t.Errorf("%q with %v:\n%+v, want\n%+v", line, env, g, w)
			}
		}
	}
}

// chosen is the command of s that is called path.
func chosen(s *sample, path string) any {
	return map[string]any{"top": s.Top, "group show": s.Group.Show, "group move": s.Group.Move, "plain leaf": s.Plain.Leaf}[path]
}

func TestALineThatCannotBeUnderstoodIsRefused(t *testing.T) {
	for _, line := range refused {
		p, err := kong.New(&sample{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Parse(strings.Fields(line)); err == nil {
			t.Fatalf("kong understands %q", line)
		}
		if err := Run(t.Context(), "program", "", &sample{}, strings.Fields(line)); CodeOf(err) != ExitUsage {
			t.Errorf("%q: %v", line, err)
		}
	}
	t.Setenv("CLI_TEST_LINES", "many")
	if err := Run(t.Context(), "program", "", &sample{}, []string{"top"}); CodeOf(err) != ExitUsage || !strings.Contains(err.Error(), "CLI_TEST_LINES") {
		t.Errorf("a variable that is no number: %v", err)
	}
}

func TestAMistakeIsExplained(t *testing.T) {
	for line, want := range map[string]string{
		"tpo":           `unexpected argument tpo, did you mean "top"?; see "program --help"`,
		"top --linex 3": `unknown flag --linex, did you mean "--lines"?`,
		"top --log- x":  `did you mean one of "--log-format","--log-level"?`,
		"top --where":   `--where wants a value: --where="/here"`,
		"plain":         `expected one of "plain leaf"`,
		"group move a":  `expected "<to>"`,
		"top -o xml":    `--output must be one of "table","json" but got "xml"`,
		// Of another command, it would be lost in silence.
		"group --where there move a b": `--where must stand behind move`,
		"group --yes=no move a b":      `--yes must stand behind move`,

		"top --since 10": `--since wants a time such as 90m or 24h, not "10"`,
	} {
		if err := Run(t.Context(), "program", "", &sample{}, strings.Fields(line)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", line, err, want)
		}
	}
}

func TestHelpIsGivenWhateverElseIsWrong(t *testing.T) {
	for line, want := range map[string]string{
		"--help": "", "-h": "", "top --help": "top", "top --wrong -h": "top", "group --help": "group", "group move a b c -h": "group move", "wrong --help": "",
	} {
		n, help, _ := newNode("", "", nil, reflect.ValueOf(&sample{}).Elem()).parse(strings.Fields(line))
		if !help || n.path() != want {
			t.Errorf("%q: %v, of %q, want %q", line, help, n.path(), want)
		}
	}
	if _, help, _ := newNode("", "", nil, reflect.ValueOf(&sample{}).Elem()).parse([]string{"top", "--", "--help"}); help {
		t.Error("an argument after -- is taken for a flag")
	}
}

// TestATypeThatNoFlagCanHaveIsFoundByAnyCommand, not only by one that has the flag.
func TestATypeThatNoFlagCanHaveIsFoundByAnyCommand(t *testing.T) {
	defer func() {
		if said := fmt.Sprint(recover()); !strings.Contains(said, "time.Duration cannot be a flag") {
			t.Errorf("it said %q", said)
		}
	}()
	var grammar struct {
		Good plainLeaf `cmd:""`
		Bad  struct {
			plainLeaf
			For time.Duration `default:"24h"`
		} `cmd:""`
	}
	_ = Run(t.Context(), "program", "", &grammar, []string{"good"})
}

type plainLeaf struct{}

func (plainLeaf) Run() error { return nil }
