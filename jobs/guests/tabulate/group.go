package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cockroachdb/apd/v3"
)

// aggregate is one column of sums.
type aggregate struct {
	what  string // count, sum, min, max or mean
	field string // "" for count of rows
}

func (a aggregate) name() string {
	if a.field == "" {
		return a.what
	}
	return a.what + "(" + a.field + ")"
}

func parseAggregates(list string) (all []aggregate, err error) {
	for rest := list; rest != ""; {
		var a aggregate
		if a.what, rest, err = cutName(rest); err != nil {
			return nil, err
		}
		if strings.HasPrefix(rest, "(") {
			if a.field, rest, err = cutName(rest[1:]); err != nil {
				return nil, err
			}
			if !strings.HasPrefix(rest, ")") {
				return nil, fmt.Errorf("a closing parenthesis is missing in %q", list)
			}
			rest = strings.TrimSpace(rest[1:])
		}
		if !slices.Contains([]string{"count", "sum", "min", "max", "mean"}, a.what) || a.field == "" && a.what != "count" {
			return nil, fmt.Errorf("%q is none of count, count(FIELD), sum(FIELD), min(FIELD), max(FIELD) and mean(FIELD)", a.name())
		}
		all = append(all, a)
		if rest == "" {
			break
		}
		if after, ok := strings.CutPrefix(rest, ","); ok && after != "" {
			rest = strings.TrimSpace(after)
			continue
		}
		return nil, fmt.Errorf("%q should be aggregates, parted by commas", list)
	}
	return all, nil
}

// groups adds up, for each combination of values.
type groups struct {
	order order
	all   map[string]*group
	key   []byte // of the row at hand
}

type group struct {
	key    string
	values []value // of -by
	sums   []sum   // of -agg
}

// sum is what an aggregate needs to know.
type sum struct {
	count int64
	acc   apd.Decimal // the sum, or the least or greatest so far
}

func newGroups(o order) *groups {
	g := &groups{order: o, all: map[string]*group{}}
	if len(o.by) == 0 {
		g.all[""] = &group{sums: make([]sum, len(o.aggregates))}
	}
	return g
}

func (g *groups) add(r row) error {
	to, err := g.of(r)
	if err != nil {
		return err
	}
	for i, a := range g.order.aggregates {
		s := &to.sums[i]
		if a.field == "" {
			s.count++
			continue
		}
		v, err := r.get(a.field)
		if err != nil {
			return err
		}
		if v.kind == null {
			continue
		}
		if a.what == "count" {
			s.count++
			continue
		}
		d, err := v.decimal(a.field)
		if err != nil {
			return err
		}
		s.count++
		switch {
		case s.count == 1:
			s.acc.Set(d)
		case a.what == "min":
			if d.Cmp(&s.acc) < 0 {
				s.acc.Set(d)
			}
		case a.what == "max":
			if d.Cmp(&s.acc) > 0 {
				s.acc.Set(d)
			}
		default:
			if _, err := exact.Add(&s.acc, &s.acc, d); err != nil {
				return fmt.Errorf("field %q cannot be added up: %w", a.field, err)
			}
		}
	}
	return nil
}

// of is the group of a row. Numbers of JSON are one group however they are written.
func (g *groups) of(r row) (*group, error) {
	g.key = g.key[:0]
	values := make([]value, len(g.order.by))
	for i, f := range g.order.by {
		v, err := r.get(f)
		if err != nil {
			return nil, err
		}
		if v.kind == number {
			d, err := v.decimal(f)
			if err != nil {
				return nil, err
			}
			v.s = canonical(d)
		}
		values[i] = v
		// The kind keeps 1 and "1" apart; the length, "a","bc" and "ab","c".
		g.key = fmt.Appendf(g.key, "%d %d %s", v.kind, len(v.s), v.s)
	}
	to := g.all[string(g.key)]
	if to == nil {
		to = &group{key: string(g.key), values: values, sums: make([]sum, len(g.order.aggregates))}
		g.all[to.key] = to
	}
	return to, nil
}

func (g *groups) print(t table) error {
	names := slices.Clone(g.order.by)
	for _, a := range g.order.aggregates {
		names = append(names, a.name())
	}
	all := make([]*group, 0, len(g.all))
	for _, one := range g.all {
		all = append(all, one)
	}
	slices.SortFunc(all, func(a, b *group) int {
		for i := range a.values {
			if c := strings.Compare(a.values[i].s, b.values[i].s); c != 0 {
				return c
			}
		}
		return strings.Compare(a.key, b.key) // 1 and "1"
	})
	if err := t.print(names, nil); err != nil {
		return err
	}
	for _, one := range all {
		row := slices.Clone(one.values)
		for i, a := range g.order.aggregates {
			row = append(row, one.sums[i].value(a, g.order.digits))
		}
		if err := t.print(names, row); err != nil {
			return err
		}
	}
	return nil
}

func (s *sum) value(a aggregate, digits int) value {
	switch {
	case a.what == "count":
		return value{number, fmt.Sprint(s.count)}
	case s.count == 0:
		return value{kind: null}
	case a.what == "mean":
		return value{number, quotient(&s.acc, s.count, digits)}
	default:
		return value{number, canonical(&s.acc)}
	}
}
