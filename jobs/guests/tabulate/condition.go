package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// condition is what -where asks of a row.
type condition interface {
	holds(row) (bool, error)
	fields() []string
}

type (
	and struct{ a, b condition }
	or  struct{ a, b condition }
	not struct{ a condition }

	comparison struct {
		a, b operand
		op   string
	}
)

// operand is a field, or a constant.
type operand struct {
	field string // "": constant
	value value
}

func (c and) holds(r row) (bool, error) {
	ok, err := c.a.holds(r)
	if !ok || err != nil {
		return false, err
	}
	return c.b.holds(r)
}

func (c or) holds(r row) (bool, error) {
	ok, err := c.a.holds(r)
	if ok || err != nil {
		return ok, err
	}
	return c.b.holds(r)
}

func (c not) holds(r row) (bool, error) {
	ok, err := c.a.holds(r)
	return !ok && err == nil, err
}

func (c and) fields() []string { return append(c.a.fields(), c.b.fields()...) }
func (c or) fields() []string  { return append(c.a.fields(), c.b.fields()...) }
func (c not) fields() []string { return c.a.fields() }

func (c comparison) fields() (names []string) {
	for _, o := range []operand{c.a, c.b} {
		if o.field != "" {
			names = append(names, o.field)
		}
	}
	return names
}

func (o operand) of(r row) (value, error) {
	if o.field == "" {
		return o.value, nil
	}
	return r.get(o.field)
}

func (c comparison) holds(r row) (bool, error) {
	a, err := c.a.of(r)
	if err != nil {
		return false, err
	}
	b, err := c.b.of(r)
	if err != nil {
		return false, err
	}
	if a.kind == null || b.kind == null {
		same := a.kind == b.kind
		return c.op == "==" && same || c.op == "!=" && !same, nil
	}
	if c.op == "~" {
		if !a.isText() || !b.isText() {
			return false, fmt.Errorf("%s is %v: ~ looks for a text in a text", c.name(!a.isText()), kindOf(a, b))
		}
		return strings.Contains(a.s, b.s), nil
	}
	sign, err := c.order(a, b)
	if err != nil {
		return false, err
	}
	switch c.op {
	case "==":
		return sign == 0, nil
	case "!=":
		return sign != 0, nil
	case "<":
		return sign < 0, nil
	case "<=":
		return sign <= 0, nil
	case ">":
		return sign > 0, nil
	default:
		return sign >= 0, nil
	}
}

func (v value) isText() bool { return v.kind == text || v.kind == plain }

func kindOf(a, b value) kind {
	if !a.isText() {
		return a.kind
	}
	return b.kind
}

// name is of the first or the second operand, for errors.
func (c comparison) name(first bool) string {
	o := c.b
	if first {
		o = c.a
	}
	if o.field == "" {
		return o.value.s
	}
	return fmt.Sprintf("field %q", o.field)
}

// order is the sign of a-b as both are to be compared.
func (c comparison) order(a, b value) (int, error) {
	asNumbers := a.kind == number || b.kind == number
	if a.kind == plain && b.kind == plain {
		asNumbers = isNumber(a.s) && isNumber(b.s)
	}
	if asNumbers {
		x, err := a.decimal(c.a.field)
		if err != nil {
			return 0, err
		}
		y, err := b.decimal(c.b.field)
		if err != nil {
			return 0, err
		}
		return x.Cmp(y), nil
	}
	switch {
	case a.isText() && b.isText():
		return strings.Compare(a.s, b.s), nil
	case a.kind == truth && b.kind == truth, a.kind == truth && b.kind == plain, a.kind == plain && b.kind == truth:
		if c.op != "==" && c.op != "!=" {
			return 0, fmt.Errorf("true and false are compared by == and != only, not by %s", c.op)
		}
		return strings.Compare(a.s, b.s), nil
	default:
		return 0, fmt.Errorf("%s is %v and %s is %v: they cannot be compared", c.name(true), a.kind, c.name(false), b.kind)
	}
}

const deepest = 100 // parentheses and negations in one another

// parser reads a condition from left to right.
type parser struct {
	rest  string
	depth int
}

func parseCondition(s string) (condition, error) {
	p := parser{rest: s}
	c, err := p.either()
	if err != nil {
		return nil, err
	}
	if p.space(); p.rest != "" {
		return nil, fmt.Errorf("%.40q is left over; && and || join comparisons", p.rest)
	}
	return c, nil
}

func (p *parser) space() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

// take is true if token comes next, which it takes.
func (p *parser) take(token string) bool {
	p.space()
	rest, ok := strings.CutPrefix(p.rest, token)
	if ok {
		p.rest = rest
	}
	return ok
}

func (p *parser) either() (condition, error) {
	c, err := p.both()
	for err == nil && p.take("||") {
		var b condition
		b, err = p.both()
		c = or{c, b}
	}
	return c, err
}

func (p *parser) both() (condition, error) {
	c, err := p.one()
	for err == nil && p.take("&&") {
		var b condition
		b, err = p.one()
		c = and{c, b}
	}
	return c, err
}

func (p *parser) one() (condition, error) {
	if p.depth++; p.depth > deepest {
		return nil, fmt.Errorf("more than %d parentheses in one another", deepest)
	}
	defer func() { p.depth-- }()
	if p.take("!") {
		c, err := p.one()
		return not{c}, err
	}
	if p.take("(") {
		c, err := p.either()
		if err == nil && !p.take(")") {
			err = fmt.Errorf("a closing parenthesis is missing before %.40q", p.rest)
		}
		return c, err
	}
	return p.comparison()
}

func (p *parser) comparison() (condition, error) {
	var c comparison
	var err error
	if c.a, err = p.operand(); err != nil {
		return nil, err
	}
	for _, op := range []string{"==", "!=", "<=", ">=", "<", ">", "~"} {
		if p.take(op) {
			c.op = op
			break
		}
	}
	if c.op == "" {
		return nil, fmt.Errorf("one of ==, !=, <, <=, >, >= and ~ is missing before %.40q", p.rest)
	}
	if c.b, err = p.operand(); err != nil {
		return nil, err
	}
	for _, o := range []operand{c.a, c.b} {
		if o.field == "" && o.value.kind == null && c.op != "==" && c.op != "!=" {
			return nil, fmt.Errorf("null is compared by == and != only, not by %s", c.op)
		}
	}
	return c, nil
}

func (p *parser) operand() (operand, error) {
	p.space()
	first, _ := utf8.DecodeRuneInString(p.rest)
	switch {
	case p.rest == "":
		return operand{}, errors.New("it ends where a field or a constant is missing")
	case first == '"':
		quoted, err := strconv.QuotedPrefix(p.rest)
		if err != nil {
			return operand{}, fmt.Errorf("the text %.40s has no end, or something that cannot be after a backslash", p.rest)
		}
		p.rest = p.rest[len(quoted):]
		s, err := strconv.Unquote(quoted)
		return operand{value: value{text, s}}, err
	case first == '`':
		name, rest, err := cutName(p.rest)
		p.rest = rest
		return operand{field: name}, err
	}
	n := strings.IndexFunc(p.rest, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && r != '_' && r != '.' && r != '-' && r != '+'
	})
	if n < 0 {
		n = len(p.rest)
	}
	word := p.rest[:n]
	p.rest = p.rest[n:]
	switch {
	case word == "":
		return operand{}, fmt.Errorf("%.40q is neither a field nor a constant", p.rest)
	case word == "null":
		return operand{value: value{null, word}}, nil
	case word == "true" || word == "false":
		return operand{value: value{truth, word}}, nil
	case unicode.IsLetter(first) || first == '_':
		return operand{field: word}, nil
	}
	if _, ok, err := decimal(word); err != nil || !ok {
		return operand{}, fmt.Errorf("%.40q is no number; the name of a field that is no plain word stands in backquotes", word)
	}
	return operand{value: value{number, word}}, nil
}
