// Command textstats is a guest that measures a text of any length and prints one
// line of JSON:
//
//	{"bytes":12,"lines":1,"words":2,"runes":12,"invalid_bytes":0,"distinct_words":2,
//	 "longest_line":{"line":1,"bytes":11,"runes":11},
//	 "top":[{"word":"hello","count":1},{"word":"world","count":1}]}
//
// A line is a newline byte. A word is a longest run of bytes none of which is ASCII
// white space (space, \t, \n, \v, \f, \r). A rune is a character of UTF-8;
// invalid_bytes are those that belong to none. The longest line is the first of those
// with the most bytes, its newline not among them; line counts from 1, and is 0 in an
// empty text. What comes after the last newline is a line here, though lines does not
// count it.
//
// top lists the -top words seen most often, ties in the order of their bytes, of those
// that JSON can show as they are: valid UTF-8 of at most 64 bytes. distinct_words counts
// those alike. With -letters a word is a longest run of letters and digits, in lower
// case, and everything else parts words.
//
// The text is read once, as it comes: memory grows with the distinct words alone. The
// same input always gives the same output.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"unicode"
	"unicode/utf8"

	"github.com/deimos-edge/deimos/jobs/guests/deimos"
)

const (
	mostTop     = 1000
	longestWord = 64 // bytes of a word that top can list
	readBytes   = 256 << 10
)

type word struct {
	Word  string `json:"word"`
	Count int64  `json:"count"`
}

type line struct {
	Line  int64 `json:"line"` // from 1
	Bytes int64 `json:"bytes"`
	Runes int64 `json:"runes"`
}

type stats struct {
	Bytes    int64  `json:"bytes"`
	Lines    int64  `json:"lines"`
	Words    int64  `json:"words"`
	Runes    int64  `json:"runes"`
	Invalid  int64  `json:"invalid_bytes"`
	Distinct int    `json:"distinct_words"`
	Longest  line   `json:"longest_line"`
	Top      []word `json:"top"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "textstats:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("textstats", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	in := flags.String("in", "", "name of the input; standard input if not given")
	out := flags.String("out", "", "name of the output; standard output if not given")
	top := flags.Int("top", 10, "how many words are listed")
	letters := flags.Bool("letters", false, "words are runs of letters and digits, in lower case")
	switch err := flags.Parse(args); {
	case err != nil:
		return err
	case flags.NArg() > 0:
		return fmt.Errorf("%q is one argument too many; an input is named by -in", flags.Arg(0))
	case *top < 0 || *top > mostTop:
		return fmt.Errorf("-top %d is not between 0 and %d", *top, mostTop)
	}
	r, err := deimos.In(*in)
	if err != nil {
		return err
	}
	defer r.Close()
	c := newCounter(*letters)
	if _, err := io.CopyBuffer(c, struct{ io.Reader }{r}, make([]byte, readBytes)); err != nil {
		return fmt.Errorf("cannot read the input: %w", err)
	}
	w, err := deimos.Out(*out)
	if err != nil {
		return err
	}
	buffered := bufio.NewWriter(w)
	enc := json.NewEncoder(buffered)
	enc.SetEscapeHTML(false)
	if err := errors.Join(enc.Encode(c.end(*top)), buffered.Flush(), w.Close()); err != nil {
		return fmt.Errorf("cannot write the output: %w", err)
	}
	return nil
}

// counter takes a text in pieces of any length.
type counter struct {
	letters bool
	stats   stats
	seen    map[string]*int64
	word    []byte // the beginning of the word that is being read, longestWord+1 bytes at most
	inWord  bool
	line    line   // the one that is being read
	rest    []byte // of a rune that the last piece cut
}

func newCounter(letters bool) *counter {
	return &counter{letters: letters, seen: map[string]*int64{}, line: line{Line: 1}}
}

// Write never fails.
func (c *counter) Write(p []byte) (int, error) {
	n := len(p)
	c.stats.Bytes += int64(n)
	for len(c.rest) > 0 && len(p) > 0 { // until the rune that was cut is whole
		c.rest, p = append(c.rest, p[0]), p[1:]
		for len(c.rest) > 0 && utf8.FullRune(c.rest) {
			r, size := utf8.DecodeRune(c.rest)
			c.take(r, c.rest[:size])
			c.rest = c.rest[size:]
		}
	}
	for len(p) > 0 {
		if b := p[0]; b < utf8.RuneSelf {
			c.ascii(b)
			p = p[1:]
			continue
		}
		if !utf8.FullRune(p) {
			c.rest = append(c.rest[:0], p...)
			break
		}
		r, size := utf8.DecodeRune(p)
		c.take(r, p[:size])
		p = p[size:]
	}
	return n, nil
}

// ascii is take for a rune of one byte, which most are.
func (c *counter) ascii(b byte) {
	c.stats.Runes++
	if b == '\n' {
		c.stats.Lines++
		c.endWord()
		c.endLine()
		return
	}
	c.line.Bytes++
	c.line.Runes++
	switch {
	case c.letters && 'A' <= b && b <= 'Z':
		b += 'a' - 'A'
	case b == ' ' || '\t' <= b && b <= '\r' || c.letters && !('a' <= b && b <= 'z' || '0' <= b && b <= '9'):
		c.endWord()
		return
	}
	c.inWord = true
	if len(c.word) <= longestWord {
		c.word = append(c.word, b)
	}
}

// take is one rune as its bytes; of invalid UTF-8, one byte.
func (c *counter) take(r rune, as []byte) {
	if r < utf8.RuneSelf {
		c.ascii(byte(r))
		return
	}
	c.line.Bytes += int64(len(as))
	if r == utf8.RuneError && len(as) == 1 {
		c.stats.Invalid++
		if c.letters {
			c.endWord()
			return
		}
	} else {
		c.stats.Runes++
		c.line.Runes++
	}
	if c.letters {
		if !unicode.IsLetter(r) && !unicode.IsDigit(r) && !(unicode.IsMark(r) && c.inWord) {
			c.endWord()
			return
		}
		as = utf8.AppendRune(nil, unicode.ToLower(r))
	}
	c.inWord = true
	if len(c.word) <= longestWord {
		c.word = append(c.word, as...)
	}
}

func (c *counter) endWord() {
	if !c.inWord {
		return
	}
	c.stats.Words++
	if len(c.word) <= longestWord {
		if n := c.seen[string(c.word)]; n != nil {
			*n++
		} else if utf8.Valid(c.word) {
			one := int64(1)
			c.seen[string(c.word)] = &one
		}
	}
	c.word, c.inWord = c.word[:0], false
}

func (c *counter) endLine() {
	if c.line.Bytes > c.stats.Longest.Bytes || c.stats.Longest.Line == 0 {
		c.stats.Longest = c.line
	}
	c.line = line{Line: c.line.Line + 1}
}

// end is what has been counted. Nothing may be written after.
func (c *counter) end(top int) stats {
	for len(c.rest) > 0 {
		r, size := utf8.DecodeRune(c.rest)
		c.take(r, c.rest[:size])
		c.rest = c.rest[size:]
	}
	c.endWord()
	if c.line.Bytes > 0 {
		c.endLine()
	}
	c.stats.Distinct, c.stats.Top = len(c.seen), []word{}
	for w, n := range c.seen {
		c.stats.Top = insert(c.stats.Top, word{w, *n}, top)
	}
	return c.stats
}

// insert puts w in its place among the most frequent, if it has one there.
func insert(all []word, w word, most int) []word {
	i, _ := slices.BinarySearchFunc(all, w, func(a, b word) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Word, b.Word))
	})
	if i == most {
		return all
	}
	all = slices.Insert(all, i, w)
	return all[:min(len(all), most)]
}
