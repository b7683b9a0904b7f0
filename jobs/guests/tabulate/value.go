package main

import (
	"fmt"
	"math/big"
	"strings"

	"github.com/cockroachdb/apd/v3"
)

// kind is what a value is.
type kind int

const (
	null kind = iota
	text
	number
	truth // true or false
	other // an object or a list of JSON
	plain // a field of CSV, which may be meant as a text or as a number
)

func (k kind) String() string {
	return [...]string{"null", "a text", "a number", "true or false", "an object or a list", "a field"}[k]
}

// value is one field of a row, or a constant.
type value struct {
	kind kind
	s    string // a text as it is; a number, true, false, object or list as JSON has it
}

// exact adds and compares without rounding.
var exact = func() apd.Context {
	c := apd.BaseContext
	c.Precision = 0
	return c
}()

const (
	longestNumber = 1000 // bytes
	farthest      = 1000 // power of ten: a few bytes must not become a number of millions of digits
)

// decimal is what s says as a number; ok is false if it is none. The error is for one
// that is beyond what this program takes.
func decimal(s string) (d *apd.Decimal, ok bool, err error) {
	if !isNumber(s) {
		return nil, false, nil
	}
	d = new(apd.Decimal)
	if len(s) > longestNumber {
		return nil, false, fmt.Errorf("%.30q… is longer than the %d characters that a number may have", s, longestNumber)
	}
	if _, _, err := d.SetString(s); err != nil || d.Form != apd.Finite || d.Exponent > farthest || d.Exponent < -2*farthest {
		return nil, false, fmt.Errorf("%.30q is beyond the numbers that can be added up exactly: at most 1000 digits before the point and after it", s)
	}
	return d, true, nil
}

// isNumber tells whether s is what JSON calls a number; a sign + and zeros before it
// are allowed, too, as CSV often has them.
func isNumber(s string) bool {
	digits := func() bool {
		rest := strings.TrimLeft(s, "0123456789")
		some := len(rest) < len(s)
		s = rest
		return some
	}
	if strings.HasPrefix(s, "+") || strings.HasPrefix(s, "-") {
		s = s[1:]
	}
	if !digits() {
		return false
	}
	if strings.HasPrefix(s, ".") {
		if s = s[1:]; !digits() {
			return false
		}
	}
	if strings.HasPrefix(s, "e") || strings.HasPrefix(s, "E") {
		s = s[1:]
		if strings.HasPrefix(s, "+") || strings.HasPrefix(s, "-") {
			s = s[1:]
		}
		if !digits() {
			return false
		}
	}
	return s == ""
}

// decimal is the number that v must be; name is of its field, for the error.
func (v value) decimal(name string) (*apd.Decimal, error) {
	if v.kind == number || v.kind == plain {
		switch d, ok, err := decimal(v.s); {
		case err != nil:
			return nil, fmt.Errorf("field %q: %w", name, err)
		case ok:
			return d, nil
		}
	}
	if v.kind == plain {
		return nil, fmt.Errorf("field %q is %.40q, which is no number", name, v.s)
	}
	return nil, fmt.Errorf("field %q is %v (%.40s), no number", name, v.kind, v.s)
}

// canonical writes a number as digits, without an exponent or zeros that say nothing.
func canonical(d *apd.Decimal) string {
	var r apd.Decimal
	r.Reduce(d)
	if r.IsZero() {
		return "0"
	}
	return r.Text('f')
}

// quotient is d/n with at most so many digits after its point, halves away from zero.
func quotient(d *apd.Decimal, n int64, digits int) string {
	r, _ := new(big.Rat).SetString(d.Text('f')) // always a number
	s := r.Quo(r, new(big.Rat).SetInt64(n)).FloatString(digits)
	if strings.Contains(s, ".") {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	if s == "-0" {
		return "0"
	}
	return s
}
