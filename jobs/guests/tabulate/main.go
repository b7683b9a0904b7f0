// Command tabulate is a guest that filters a table and adds it up, exactly: numbers are
// decimals of any length, never floating point, so that the same input gives the same
// bytes everywhere and a sum of money is right to the last cent.
//
//	tabulate [-format csv|json] [-where CONDITION] [-select FIELDS]
//	tabulate [-format csv|json] [-where CONDITION] [-by FIELDS] -agg AGGREGATES
//
// The table is CSV (RFC 4180) whose first line names the fields, or with -format json an
// object a line (https://jsonlines.org); what comes out has the same format. -in and -out
// name an input and an output; otherwise they are the standard ones.
//
// A CONDITION compares fields and constants with ==, !=, <, <=, >, >= and ~ (contains), and
// joins comparisons with &&, ||, ! and parentheses:
//
//	-where 'price >= 9.99 && (city == "Köln" || !(name ~ "test")) && note != null'
//
// A field is named as it is, or in backquotes if its name is no plain word; of JSON, a.b is
// field b of the object a. A constant is a number, a text in double quotes, true, false or
// null. With a number, numbers are compared, with a text, texts, byte by byte; a field that
// is something else ends the job with its line, as a guess would be a wrong answer. A field
// that is empty (in CSV) or null or missing (in JSON) is null: it equals null and nothing else,
// and is neither less nor greater than anything. Two fields are compared as numbers if both are, otherwise as
// texts.
//
// AGGREGATES are count, count(FIELD), sum(FIELD), min(FIELD), max(FIELD) and mean(FIELD),
// parted by commas. Fields that are null are left out; one that is no number ends the job.
// All are exact; a mean has at most -digits (6) digits after its point, halves rounded away
// from zero. What has nothing to add up is null. With -by there is a line for each
// combination of values there, sorted by them byte by byte, otherwise one in all.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/deimos-edge/deimos/jobs/guests/deimos"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "tabulate:", err)
		os.Exit(1)
	}
}

// order is what the arguments ask for.
type order struct {
	in, out, format string
	where           condition // nil: everything
	fields          []string  // of -select; nil: all
	by              []string
	aggregates      []aggregate
	digits          int
}

func parseOrder(args []string) (o order, err error) {
	flags := flag.NewFlagSet("tabulate", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.in, "in", "", "")
	flags.StringVar(&o.out, "out", "", "")
	flags.StringVar(&o.format, "format", "csv", "")
	flags.IntVar(&o.digits, "digits", 6, "")
	where := flags.String("where", "", "")
	fields := flags.String("select", "", "")
	by := flags.String("by", "", "")
	agg := flags.String("agg", "", "")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("%q is one argument too many; an input is named by -in", flags.Arg(0))
	case o.format != "csv" && o.format != "json":
		return o, fmt.Errorf("-format %q is neither csv nor json", o.format)
	case o.digits < 0 || o.digits > 100:
		return o, fmt.Errorf("-digits %d is not between 0 and 100", o.digits)
	case *by != "" && *agg == "":
		return o, errors.New("-by groups rows for -agg, which is missing")
	case *fields != "" && *agg != "":
		return o, errors.New("-select is of rows and -agg of sums over them: give one of the two")
	}
	if *where != "" {
		if o.where, err = parseCondition(*where); err != nil {
			return o, fmt.Errorf("-where: %w", err)
		}
	}
	if o.fields, err = parseFields(*fields); err != nil {
		return o, fmt.Errorf("-select: %w", err)
	}
	if o.by, err = parseFields(*by); err != nil {
		return o, fmt.Errorf("-by: %w", err)
	}
	if o.aggregates, err = parseAggregates(*agg); err != nil {
		return o, fmt.Errorf("-agg: %w", err)
	}
	return o, nil
}

// needed are the fields that the order names.
func (o order) needed() []string {
	all := append(append([]string{}, o.fields...), o.by...)
	for _, a := range o.aggregates {
		if a.field != "" {
			all = append(all, a.field)
		}
	}
	if o.where != nil {
		all = append(all, o.where.fields()...)
	}
	return all
}

func run(args []string) error {
	o, err := parseOrder(args)
	if err != nil {
		return err
	}
	in, err := deimos.In(o.in)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := deimos.Out(o.out)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(out, 64<<10)
	var t table
	if o.format == "csv" {
		t, err = newCSV(in, w)
	} else {
		t = newJSON(in, w)
	}
	if err != nil {
		return err
	}
	if err := t.has(o.needed()); err != nil {
		return err
	}
	if err := tabulate(o, t); err != nil {
		return err
	}
	if err := errors.Join(t.flush(), w.Flush(), out.Close()); err != nil {
		return fmt.Errorf("cannot write the output: %w", err)
	}
	return nil
}

// tabulate goes through the table once.
func tabulate(o order, t table) error {
	g := newGroups(o)
	if o.aggregates == nil {
		if err := t.begin(o.fields); err != nil {
			return err
		}
	}
	for {
		r, err := t.next()
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if o.where != nil {
			keep, err := o.where.holds(r)
			if err != nil {
				return fmt.Errorf("line %d: %w", r.line(), err)
			}
			if !keep {
				continue
			}
		}
		if o.aggregates != nil {
			err = g.add(r)
		} else {
			err = t.write(r, o.fields)
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", r.line(), err)
		}
	}
	if o.aggregates == nil {
		return nil
	}
	return g.print(t)
}

// parseFields reads names parted by commas; each may be in backquotes.
func parseFields(list string) ([]string, error) {
	var names []string
	for rest := list; rest != ""; {
		name, after, err := cutName(rest)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
		switch {
		case after == "":
			return names, nil
		case after == "," || after[0] != ',':
			return nil, fmt.Errorf("%q should be names of fields, parted by commas", list)
		}
		rest = after[1:]
	}
	return names, nil
}

// cutName takes the name of a field off the beginning of s.
func cutName(s string) (name, rest string, err error) {
	if strings.HasPrefix(s, "`") {
		name, rest, ok := strings.Cut(s[1:], "`")
		if !ok || name == "" {
			return "", "", fmt.Errorf("the backquote in %.30q is not closed, or nothing is in it", s)
		}
		return name, rest, nil
	}
	n := strings.IndexAny(s, ",()")
	if n < 0 {
		n = len(s)
	}
	if name = strings.TrimSpace(s[:n]); name == "" {
		return "", "", fmt.Errorf("a name of a field is missing before %.30q", s)
	}
	return name, s[n:], nil
}
