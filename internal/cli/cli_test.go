package cli

import (
	"bytes"
	"testing"
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
