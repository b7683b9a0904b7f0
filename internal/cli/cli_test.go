package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"
	"unicode"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// A device chooses what it calls itself; it must not choose what a terminal does.
func TestTextCannotSteerATerminal(t *testing.T) {
	var out bytes.Buffer
	in := "0.1\x1b]0;pwned\a\x1b[2J\u009b31m\tä\u202e\r\n"
	n, err := Plain(&out).Write([]byte(in))
	if err != nil || n != len(in) {
		t.Fatalf("%d %v", n, err)
	}
	if got, want := out.String(), "0.1?]0;pwned??[2J?31m\tä??\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestSizesAndCountsAreSaidAsPeopleDo(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 20: "1.0 MiB", 3 << 39: "1.5 TiB"} {
		if got := Bytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	if Count(1, "chunk") != "1 chunk" || Count(0, "chunk") != "0 chunks" {
		t.Error("counts")
	}
}

// JSON is for programs, and people look at it all the same.
func TestJSONCannotSteerATerminalAndSaysTheSame(t *testing.T) {
	for name, said := range map[string]string{
		"one byte too few": "\"\x9b2J\"", "C1": "\"\u009b2J\"", "delete": "\"\x7f\"", "direction": "\"\u202e\"",
		"beyond 16 bits": "\"\U000e0041\"", "a mark": "\"\ufffd\"", "text": "\"ä 漢 😀\"",
	} {
		raw, err := json.MarshalIndent(map[string]json.RawMessage{"telemetry": json.RawMessage(said)}, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		out := escape(raw)
		for _, r := range string(out) {
			if r != '\n' && !unicode.IsPrint(r) || r == unicode.ReplacementChar {
				t.Errorf("%s: %q in %q", name, r, out)
			}
		}
		var before, after map[string]string
		if json.Unmarshal(raw, &before) != nil || json.Unmarshal(out, &after) != nil || before["telemetry"] != after["telemetry"] {
			t.Errorf("%s: %q became %q", name, before, after)
		}
		if name == "text" && !bytes.Equal(raw, out) {
			t.Errorf("%q became %q", raw, out)
		}
	}
}

func TestOnlyATerminalIsATerminal(t *testing.T) {
	for _, name := range []string{os.DevNull, "/dev/zero"} { // character devices too
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if Terminal(f) {
			t.Errorf("%s counts as a terminal", name)
		}
	}
	p, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		testenv.Cannot(t, "no terminal can be made here: %v", err)
	}
	defer p.Close()
	if !Terminal(p) {
		t.Error("a terminal does not count as one")
	}
}
