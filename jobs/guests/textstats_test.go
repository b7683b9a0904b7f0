//go:build linux

package guests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
)

type textStats struct {
	Bytes, Lines, Words, Runes int
	InvalidBytes               int         `json:"invalid_bytes"`
	DistinctWords              int         `json:"distinct_words"`
	LongestLine                textLine    `json:"longest_line"`
	Top                        []countedBy `json:"top"`
}

type textLine struct{ Line, Bytes, Runes int }

type countedBy struct {
	Word  string
	Count int
}

func textstats(t testing.TB, in []byte, args ...string) (s textStats) {
	t.Helper()
	if err := json.Unmarshal(run(t, "textstats", in, args...), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// textInputs adds to inputs what breaks readers of lines and of runes: a line longer
// than any buffer, and text in many alphabets whose runes every read cuts.
func textInputs(t *testing.T) map[string][]byte {
	all := inputs(t)
	all["equally long lines"] = []byte("a\nbb\ncc\n\ndd")
	all["one huge line"] = bytes.Repeat([]byte("x"), 3<<20)
	r := rand.New(rand.NewPCG(testenv.Seed(t), 1))
	alphabet := []rune("aäßжλ中🙂\u0301 \n\tZ9")
	var text []byte
	for range 300_000 + r.IntN(1000) {
		if r.IntN(500) == 0 {
			text = append(text, byte(0x80+r.IntN(128))) // invalid, or the beginning of a rune that never ends
		}
		text = append(text, string(alphabet[r.IntN(len(alphabet))])...)
	}
	all["alphabets"] = text
	// Whatever even length the reads have, they cut these in the middle of a rune.
	all["cut"] = append([]byte("x"), bytes.Repeat([]byte("🙂"), 200_000)...)
	return all
}

func TestTextstatsAgreesWithWc(t *testing.T) {
	for what, in := range textInputs(t) {
		s := textstats(t, in)
		if wc := native(t, in, "wc", "-lc"); strconv.Itoa(s.Lines) != wc[0] || strconv.Itoa(s.Bytes) != wc[1] {
			t.Errorf("%s: %d lines, %d bytes; wc says %s, %s", what, s.Lines, s.Bytes, wc[0], wc[1])
		}
		if want := native(t, printable(in), "wc", "-w")[0]; strconv.Itoa(s.Words) != want {
			t.Errorf("%s: %d words; wc says %s", what, s.Words, want)
		}
		// What is not valid is left out, as libc tells it from what is in a way of its own.
		valid := bytes.ToValidUTF8(in, nil)
		cmd := exec.Command(testenv.Tool(t, "wc", "coreutils"), "-m")
		cmd.Env, cmd.Stdin = []string{"LC_ALL=C.UTF-8"}, bytes.NewReader(valid)
		want, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if strconv.Itoa(s.Runes) != strings.TrimSpace(string(want)) {
			t.Errorf("%s: %d runes; wc says %s", what, s.Runes, want)
		}
		if want := len(in) - len(valid); s.InvalidBytes != want {
			t.Errorf("%s: %d invalid bytes, want %d", what, s.InvalidBytes, want)
		}
	}
}

func TestTextstatsFindsTheLongestLineAsAwkDoes(t *testing.T) {
	const longest = `length($0) > most || NR == 1 { most = length($0); line = NR } END { print line + 0, most + 0 }`
	for what, in := range textInputs(t) {
		s := textstats(t, in)
		awk := native(t, in, "gawk", "-b", longest)
		if got := []string{strconv.Itoa(s.LongestLine.Line), strconv.Itoa(s.LongestLine.Bytes)}; !slices.Equal(got, awk) {
			t.Errorf("%s: the longest line is %v; awk says %v", what, got, awk)
		}
	}
}

func TestTextstatsListsWhatSortAndUniqCount(t *testing.T) {
	for what, in := range textInputs(t) {
		var words []byte
		for _, w := range bytes.FieldsFunc(in, func(r rune) bool { return r == ' ' || '\t' <= r && r <= '\r' }) {
			if len(w) <= 64 && bytes.Equal(bytes.ToValidUTF8(w, []byte{0}), w) {
				words = append(append(words, w...), '\n')
			}
		}
		const n = 25
		script := "sort | uniq -c | sort -k1,1nr -k2 | sed 's/^ *//'"
		lines := strings.Split(strings.TrimSuffix(pipe(t, words, script), "\n"), "\n")
		if lines[0] == "" {
			lines = nil
		}
		s := textstats(t, in, "-top", strconv.Itoa(n))
		if s.DistinctWords != len(lines) {
			t.Errorf("%s: %d distinct words; uniq says %d", what, s.DistinctWords, len(lines))
		}
		var got []string
		for _, w := range s.Top {
			got = append(got, fmt.Sprintf("%d %s", w.Count, w.Word))
		}
		if want := lines[:min(n, len(lines))]; !slices.Equal(got, want) {
			t.Errorf("%s: the most frequent are\n%q, sort and uniq say\n%q", what, got, want)
		}
	}
}

func TestTextstatsTakesLettersForWordsAsGrepDoes(t *testing.T) {
	in := inputs(t)["text"]
	script := "LC_ALL=C tr -cs 'a-zA-Z0-9' '\\n' | tr A-Z a-z | grep . | sort | uniq -c | sort -k1,1nr -k2 | head -n 20 | sed 's/^ *//'"
	ascii := bytes.Map(func(r rune) rune {
		if r >= 0x80 {
			return ' ' // umlauts and arrows would be letters to us and not to tr
		}
		return r
	}, in)
	var got []string
	for _, w := range textstats(t, ascii, "-top", "20", "-letters").Top {
		got = append(got, fmt.Sprintf("%d %s", w.Count, w.Word))
	}
	if want := strings.Split(strings.TrimSpace(pipe(t, ascii, script)), "\n"); !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	// Other alphabets have letters and cases, too; marks belong to what they are on.
	s := textstats(t, []byte("Élan ÉLAN e\u0301lan ΛΌΓΟΣ λόγοΣ x2 ✓—x2"), "-letters")
	var all []string
	for _, w := range s.Top {
		all = append(all, fmt.Sprint(w.Count, w.Word))
	}
	if want := []string{"2x2", "2élan", "2λόγοσ", "1e\u0301lan"}; !slices.Equal(all, want) {
		t.Errorf("got %q, want %q", all, want)
	}
}

func TestTextstatsRefusesWhatItCannotDo(t *testing.T) {
	refuses(t, "-top -1 is not between", "textstats", nil, "-top", "-1")
	refuses(t, "-top 1001 is not between", "textstats", nil, "-top", "1001")
	refuses(t, "argument too many", "textstats", nil, "file")
	refuses(t, "not defined: -what", "textstats", nil, "-what")
	refuses(t, `no input "missing"`, "textstats", nil, "-in", "missing")
	refuses(t, `no output "missing"`, "textstats", nil, "-out", "missing")
}
