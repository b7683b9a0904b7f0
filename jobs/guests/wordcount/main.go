//go:build wasip1

// Command wordcount is a guest that counts standard input as wc does, byte by
// byte, and prints one line of JSON:
//
//	{"bytes":12,"lines":1,"words":2,"top":[{"word":"hello","count":1},{"word":"world","count":1}]}
//
// A line is a newline byte. A word is a longest run of bytes none of which is
// ASCII white space (space, \t, \n, \v, \f, \r), whatever else they are. top
// lists the ten words seen most often, ties in the order of their bytes, of
// those that JSON can show as they are: valid UTF-8 of at most 64 bytes. The
// same input always gives the same output.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	topWords    = 10
	longestWord = 64 // bytes of a word that top can list
)

type word struct {
	Word  string `json:"word"`
	Count int    `json:"count"`
}

type counts struct {
	Bytes int    `json:"bytes"`
	Lines int    `json:"lines"`
	Words int    `json:"words"`
	Top   []word `json:"top"`
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "wordcount:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	data, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("cannot read the input: %w", err)
	}
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(count(string(data))); err != nil {
		return fmt.Errorf("cannot write the output: %w", err)
	}
	return nil
}

func count(text string) counts {
	c := counts{Bytes: len(text), Lines: strings.Count(text, "\n"), Top: []word{}}
	seen := make(map[string]int)
	for rest := text; ; {
		rest = rest[leading(rest, isSpace):]
		if rest == "" {
			break
		}
		n := leading(rest, isWord)
		c.Words++
		if w := rest[:n]; n <= longestWord && utf8.ValidString(w) {
			seen[w]++ // the key shares the input's memory
		}
		rest = rest[n:]
	}
	for w, n := range seen {
		c.Top = insert(c.Top, word{w, n})
	}
	return c
}

// insert puts w in its place among the most frequent, if it has one there.
func insert(top []word, w word) []word {
	i, _ := slices.BinarySearchFunc(top, w, func(a, b word) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Word, b.Word))
	})
	if i == topWords {
		return top
	}
	top = slices.Insert(top, i, w)
	return top[:min(len(top), topWords)]
}

// leading is how many of the first bytes of s are as asked.
func leading(s string, is func(byte) bool) int {
	for i := range len(s) {
		if !is(s[i]) {
			return i
		}
	}
	return len(s)
}

func isSpace(b byte) bool { return b == ' ' || '\t' <= b && b <= '\r' }
func isWord(b byte) bool  { return !isSpace(b) }
