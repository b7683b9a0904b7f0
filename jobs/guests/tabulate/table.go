package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// table is what is read and what is written, in one format.
type table interface {
	has(fields []string) error // an error for one that it cannot have
	next() (row, error)        // io.EOF after the last; until the next call
	begin(fields []string) error
	write(r row, fields []string) error         // these fields of a row, or all of it; after begin
	print(names []string, values []value) error // a row that was made; the first names the fields
	flush() error
}

type row interface {
	get(field string) (value, error)
	line() int
}

// --- CSV --------------------------------------------------------------------

type csvTable struct {
	in     *csv.Reader
	out    *csv.Writer
	header []string
	index  map[string]int
	record []string
	at     int
	begun  bool
	buf    []string // reused
}

func newCSV(in io.Reader, out io.Writer) (*csvTable, error) {
	t := &csvTable{in: csv.NewReader(in), out: csv.NewWriter(out), index: map[string]int{}}
	header, err := t.in.Read()
	if err == io.EOF {
		return nil, errors.New("the input is empty: its first line should name the fields")
	} else if err != nil {
		return nil, malformed(err)
	}
	header[0] = strings.TrimPrefix(header[0], "\ufeff") // as some programs begin a file
	for i, name := range header {
		if _, twice := t.index[name]; twice || name == "" {
			return nil, fmt.Errorf("line 1: field %d has no name, or that of another: %q", i+1, name)
		}
		t.index[name] = i
	}
	t.header = header
	t.in.ReuseRecord = true
	return t, nil
}

// malformed puts the line first.
func malformed(err error) error {
	var e *csv.ParseError
	switch {
	case !errors.As(err, &e):
		return fmt.Errorf("cannot read the input: %w", err)
	case e.Err == csv.ErrFieldCount:
		return fmt.Errorf("line %d has more or fewer fields than the first", e.StartLine)
	default:
		return fmt.Errorf("line %d is no CSV: %w", e.Line, e.Err)
	}
}

func (t *csvTable) has(fields []string) error {
	for _, f := range fields {
		if _, ok := t.index[f]; !ok {
			return fmt.Errorf("there is no field %q; there are: %.500s", f, strings.Join(t.header, ", "))
		}
	}
	return nil
}

func (t *csvTable) next() (row, error) {
	record, err := t.in.Read()
	if err == io.EOF {
		return nil, err
	} else if err != nil {
		return nil, malformed(err)
	}
	t.record = record
	t.at, _ = t.in.FieldPos(0)
	return t, nil
}

func (t *csvTable) line() int { return t.at }

func (t *csvTable) get(field string) (value, error) {
	if s := t.record[t.index[field]]; s != "" {
		return value{plain, s}, nil
	}
	return value{kind: null}, nil
}

func (t *csvTable) begin(fields []string) error {
	if fields == nil {
		fields = t.header
	}
	return t.out.Write(fields)
}

func (t *csvTable) write(_ row, fields []string) error {
	if fields == nil {
		return t.out.Write(t.record)
	}
	t.buf = t.buf[:0]
	for _, f := range fields {
		t.buf = append(t.buf, t.record[t.index[f]])
	}
	return t.out.Write(t.buf)
}

func (t *csvTable) print(names []string, values []value) error {
	if !t.begun {
		t.begun = true
		if err := t.out.Write(names); err != nil || values == nil {
			return err
		}
	}
	if values == nil {
		return nil
	}
	t.buf = t.buf[:0]
	for _, v := range values {
		t.buf = append(t.buf, v.s)
	}
	return t.out.Write(t.buf)
}

func (t *csvTable) flush() error {
	t.out.Flush()
	return t.out.Error()
}

// --- JSON lines ---------------------------------------------------------------

const longestLine = 16 << 20 // bytes

type jsonTable struct {
	in     *bufio.Scanner
	out    io.Writer
	at     int
	raw    []byte
	object map[string]json.RawMessage
}

func newJSON(in io.Reader, out io.Writer) *jsonTable {
	s := bufio.NewScanner(in)
	s.Buffer(make([]byte, 0, 64<<10), longestLine)
	return &jsonTable{in: s, out: out}
}

func (t *jsonTable) has([]string) error { return nil } // the next line may have it

func (t *jsonTable) next() (row, error) {
	for t.in.Scan() {
		t.at++
		t.raw = bytes.TrimSpace(t.in.Bytes())
		if len(t.raw) == 0 {
			continue
		}
		t.object = nil
		switch err := json.Unmarshal(t.raw, &t.object); {
		case !utf8.Valid(t.raw):
			return nil, fmt.Errorf("line %d is no UTF-8", t.at)
		case err != nil || t.object == nil:
			return nil, fmt.Errorf("line %d is no JSON object: %w", t.at, noObject(err))
		}
		return t, nil
	}
	switch err := t.in.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, fmt.Errorf("line %d is longer than %d MiB", t.at+1, longestLine>>20)
	case err != nil:
		return nil, fmt.Errorf("cannot read the input: %w", err)
	}
	return nil, io.EOF
}

// noObject is why; null is valid JSON and still none.
func noObject(err error) error {
	if err == nil {
		return errors.New("it is null")
	}
	return err
}

func (t *jsonTable) line() int { return t.at }

// get finds a field by its whole name, or by a path through objects.
func (t *jsonTable) get(field string) (value, error) {
	raw, err := find(t.object, field)
	if err != nil {
		return value{}, fmt.Errorf("field %q: %w", field, err)
	}
	return jsonValue(raw)
}

func find(object map[string]json.RawMessage, field string) (json.RawMessage, error) {
	if raw, ok := object[field]; ok {
		return raw, nil
	}
	first, rest, ok := strings.Cut(field, ".")
	if inner := object[first]; ok && bytes.HasPrefix(inner, []byte("{")) {
		var o map[string]json.RawMessage
		if err := json.Unmarshal(inner, &o); err != nil {
			return nil, err
		}
		return find(o, rest)
	}
	return nil, nil
}

func jsonValue(raw json.RawMessage) (value, error) {
	if len(raw) == 0 {
		return value{kind: null, s: "null"}, nil
	}
	switch raw[0] {
	case 'n':
		return value{null, "null"}, nil
	case 't', 'f':
		return value{truth, string(raw)}, nil
	case '"':
		var s string
		err := json.Unmarshal(raw, &s)
		return value{text, s}, err
	case '{', '[':
		var b bytes.Buffer
		err := json.Compact(&b, raw)
		return value{other, b.String()}, err
	default:
		return value{number, string(raw)}, nil
	}
}

func (t *jsonTable) begin([]string) error { return nil }

func (t *jsonTable) write(_ row, fields []string) error {
	if fields == nil {
		_, err := t.out.Write(append(slices.Clone(t.raw), '\n'))
		return err
	}
	values := make([]value, len(fields))
	for i, f := range fields {
		raw, err := find(t.object, f)
		if err != nil {
			return fmt.Errorf("field %q: %w", f, err)
		}
		if values[i] = (value{other, string(raw)}); len(raw) == 0 {
			values[i] = value{null, "null"}
		}
	}
	return t.print(fields, values)
}

func (t *jsonTable) print(names []string, values []value) error {
	if values == nil {
		return nil
	}
	var b bytes.Buffer
	for i, name := range names {
		b.WriteByte("{,"[min(i, 1)])
		quote(&b, name)
		b.WriteByte(':')
		switch v := values[i]; v.kind {
		case text, plain:
			quote(&b, v.s)
		case null:
			b.WriteString("null")
		default:
			if err := json.Compact(&b, []byte(v.s)); err != nil {
				return err
			}
		}
	}
	b.WriteString("}\n")
	_, err := t.out.Write(b.Bytes())
	return err
}

// quote writes a text of JSON. It escapes no more than JSON asks for.
func quote(b *bytes.Buffer, s string) {
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s)         // a buffer takes everything
	b.Truncate(b.Len() - 1) // its newline
}

func (t *jsonTable) flush() error { return nil }
