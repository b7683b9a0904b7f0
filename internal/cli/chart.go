package cli

import (
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/wire"
)

// ChartStyle is what a chart is drawn for.
type ChartStyle struct {
	Width, Height int            // characters, axes included
	ASCII         bool           // the terminal shows no braille
	Color         bool           // it may have color
	Zone          *time.Location // of the times; UTC if nil
}

// The least that a chart is drawn in.
const (
	leastChartWidth  = 40
	leastChartHeight = 6
)

// ChartFor is the style for the terminal that f is; false if it is none. Color
// is left out if NO_COLOR is set (no-color.org), braille on the kernel's own
// console, whose fonts have none, and where the locale is not UTF-8.
func ChartFor(f *os.File) (ChartStyle, bool) {
	if !Terminal(f) {
		return ChartStyle{}, false
	}
	s := ChartStyle{Width: 80, Height: 14, Zone: time.Local}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
		s.Width = int(size.Col)
	}
	term := os.Getenv("TERM")
	locale := os.Getenv("LC_ALL")
	for _, name := range []string{"LC_CTYPE", "LANG"} {
		if locale == "" {
			locale = os.Getenv(name)
		}
	}
	locale = strings.ToLower(locale)
	s.ASCII = term == "linux" || term == "dumb" || locale == "c" || locale == "posix" ||
		strings.Contains(locale, ".") && !strings.Contains(locale, "utf")
	s.Color = os.Getenv("NO_COLOR") == "" && term != "dumb"
	return s, true
}

// Chart draws one curve of a history: the mean as a line, around it the band
// from least to most. Where nothing was measured, nothing is drawn.
func Chart(w io.Writer, h wire.History, name string, s ChartStyle) error {
	c := h.Series[name]
	s.Width, s.Height = max(s.Width, leastChartWidth), max(s.Height, leastChartHeight)
	low, high, ok := extent(c)
	title := harmless(name)
	if !ok {
		_, err := fmt.Fprintf(w, "%s: nothing was measured\n", title)
		return err
	}
	y := newScale(low, high, c.Unit, s.Height-3)
	margin := 0
	for _, l := range y.labels {
		margin = max(margin, len([]rune(l)))
	}
	p := newPlot(s.Width-margin-2, s.Height-3, s.ASCII)
	p.draw(c, y)

	sum := Summarize(c)
	var b strings.Builder
	fmt.Fprintf(&b, "%s  min %s  mean %s  max %s  last %s\n", title,
		Quantity(sum.Min, c.Unit), Quantity(sum.Mean, c.Unit), Quantity(sum.Max, c.Unit), Quantity(sum.Last, c.Unit))
	marks := []string{"┤", "│", "└", "─", "┬"}
	if s.ASCII {
		marks = []string{"+", "|", "+", "-", "+"}
	}
	for line := range p.height {
		label, mark := y.labels[line], marks[1]
		if label != "" {
			mark = marks[0]
		}
		fmt.Fprintf(&b, "%*s %s%s\n", margin, label, mark, p.line(line, s.Color))
	}
	axis, labels := timeAxis(h, p.width, s.Zone, marks[3], marks[4])
	fmt.Fprintf(&b, "%*s %s%s\n", margin, "", marks[2], axis)
	fmt.Fprintf(&b, "%s\n", strings.TrimRight(strings.Repeat(" ", margin+2)+labels, " "))
	_, err := io.WriteString(w, b.String())
	return err
}

// Summary is a curve in four numbers.
type Summary struct{ Min, Mean, Max, Last float64 }

// Summarize sums a curve up; zero if nothing was measured.
func Summarize(c wire.Curve) Summary {
	var s Summary
	s.Min, s.Max, _ = extent(c)
	n := 0.0
	for _, v := range c.Mean {
		if v != nil {
			s.Mean += *v
			s.Last = *v
			n++
		}
	}
	s.Mean /= max(n, 1)
	return s
}

// band is the least and most of each point, which are the mean if they are left out.
func band(c wire.Curve) (least, most []*float64) {
	if len(c.Min) != len(c.Mean) || len(c.Max) != len(c.Mean) {
		return c.Mean, c.Mean
	}
	return c.Min, c.Max
}

func extent(c wire.Curve) (low, high float64, ok bool) {
	least, most := band(c)
	low, high = math.Inf(1), math.Inf(-1)
	for i := range c.Mean {
		for _, v := range []*float64{least[i], c.Mean[i], most[i]} {
			if v != nil && math.Abs(*v) <= 1e300 { // beyond, differences are infinite
				low, high, ok = min(low, *v), max(high, *v), true
			}
		}
	}
	if !ok {
		return 0, 0, false
	}
	return low, high, true
}

// Quantity says a measured value to a person.
func Quantity(v float64, unit string) string {
	if unit == "B" && v >= 0 {
		return Bytes(int64(min(v, math.MaxInt64/2)))
	}
	text := number(v, math.Abs(v)/100)
	if unit == "" {
		return text
	}
	return text + " " + harmless(unit)
}

// number writes v so that it differs from what is a step away.
func number(v, step float64) string {
	if math.Abs(v) >= 1e9 || v != 0 && math.Abs(v) < 1e-6 {
		return fmt.Sprintf("%.3g", v)
	}
	return trimZeros(fmt.Sprintf("%.*f", decimals(step), v))
}

// decimals is how many digits after the point a step of that size needs.
func decimals(step float64) int {
	if step <= 0 || step >= 1 {
		return 0
	}
	return min(int(math.Ceil(-math.Log10(step)-1e-9)), 6)
}

func trimZeros(s string) string {
	if strings.Contains(s, ".") {
		s = strings.TrimRight(strings.TrimRight(s, "0"), ".")
	}
	if s == "-0" {
		return "0"
	}
	return s
}

// scale is the vertical axis: from low at the bottom to high at the top.
type scale struct {
	low, high float64
	labels    []string // of each line, top first; "" for most
}

func newScale(low, high float64, unit string, lines int) scale {
	if largest := max(math.Abs(low), math.Abs(high)); high-low <= max(largest*1e-9, 1e-12) {
		// A flat line lies in the middle, but of what is never negative, on the ground.
		room, ground := max(largest*0.05, 0.5), math.Inf(-1)
		if low >= 0 {
			ground = 0
		}
		low, high = max(low-room, ground), high+room
	}
	step := niceStep((high-low)/4, unit == "B")
	s := scale{low: math.Floor(low/step+1e-9) * step, high: math.Ceil(high/step-1e-9) * step, labels: make([]string, lines)}
	for n := 0; n < 100; n++ {
		v := s.low + float64(n)*step
		if v > s.high+step/2 {
			break
		}
		at := lines - 1 - int(math.Round((v-s.low)/(s.high-s.low)*float64(lines-1)))
		if unit == "B" && v >= 0 {
			s.labels[at] = bytesTick(v, s.high, step)
			continue
		}
		s.labels[at] = strings.TrimSpace(number(v, step) + " " + harmless(unit))
	}
	return s
}

// bytesTick says a size in the unit of the largest, with the digits that tell it from its neighbours.
func bytesTick(v, largest, step float64) string {
	i, size := 0, 1.0
	for largest >= 1024*size && i < 5 {
		size *= 1024
		i++
	}
	unit := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}[i]
	return trimZeros(fmt.Sprintf("%.*f", decimals(step/size), v/size)) + " " + unit
}

// niceStep is 1, 2 or 5 times a power of ten, or a power of two for bytes.
func niceStep(atLeast float64, binary bool) float64 {
	if binary && atLeast >= 1 {
		return math.Exp2(math.Ceil(math.Log2(atLeast)))
	}
	ten := math.Pow(10, math.Floor(math.Log10(atLeast)))
	for _, m := range []float64{1, 2, 5} {
		if m*ten >= atLeast*(1-1e-9) {
			return m * ten
		}
	}
	return 10 * ten
}

// plot is the area within the axes, made of dots: a braille character has 2 by 4
// (Unicode, Braille Patterns), an ASCII one is a dot itself.
type plot struct {
	width, height int // characters
	dotsX, dotsY  int // of one
	mean, around  []bool
}

func newPlot(width, height int, ascii bool) *plot {
	p := &plot{width: width, height: height, dotsX: 2, dotsY: 4}
	if ascii {
		p.dotsX, p.dotsY = 1, 1
	}
	p.mean = make([]bool, width*p.dotsX*height*p.dotsY)
	p.around = make([]bool, len(p.mean))
	return p
}

func (p *plot) draw(c wire.Curve, y scale) {
	columns, rows := p.width*p.dotsX, p.height*p.dotsY
	row := func(v float64) int {
		at := (v - y.low) / (y.high - y.low) * float64(rows-1)
		return rows - 1 - min(max(int(math.Round(at)), 0), rows-1)
	}
	fill := func(dots []bool, x, from, to int) {
		for r := min(from, to); r <= max(from, to); r++ {
			dots[r*columns+x] = true
		}
	}
	least, most := band(c)
	last := -1
	for x := range columns {
		mean, ok := columnOf(c.Mean, x, columns, average)
		if !ok {
			last = -1
			continue
		}
		low, _ := columnOf(least, x, columns, slices.Min[[]float64])
		high, _ := columnOf(most, x, columns, slices.Max[[]float64])
		fill(p.around, x, row(low), row(high))
		at := row(mean)
		if last < 0 {
			last = at
		}
		// From where the line was, so that it has no holes where it is steep.
		switch {
		case at > last:
			fill(p.mean, x, last+1, at)
		case at < last:
			fill(p.mean, x, at, last-1)
		default:
			fill(p.mean, x, at, at)
		}
		last = at
	}
}

// columnOf is the value of a column of dots: all its points in one, or, if there
// are more columns than points, between the two next to it.
func columnOf(values []*float64, x, columns int, join func([]float64) float64) (float64, bool) {
	n := len(values)
	if n >= columns {
		var in []float64
		for _, v := range values[x*n/columns : (x+1)*n/columns] {
			if v != nil {
				in = append(in, *v)
			}
		}
		if len(in) == 0 {
			return 0, false
		}
		return join(in), true
	}
	at := (float64(x)+0.5)/float64(columns)*float64(n) - 0.5
	left := int(math.Floor(at))
	right, part := left+1, at-math.Floor(at)
	value := func(i int) *float64 {
		if i < 0 || i >= n {
			return nil
		}
		return values[i]
	}
	l, r := value(left), value(right)
	switch {
	case l != nil && r != nil:
		return *l + (*r-*l)*part, true
	case l != nil && part < 0.5:
		return *l, true
	case r != nil && part >= 0.5:
		return *r, true
	}
	return 0, false
}

func average(values []float64) float64 {
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}

// braille is the bit of each dot of a character, by row and column.
var braille = [4][2]rune{{0x01, 0x08}, {0x02, 0x10}, {0x04, 0x20}, {0x40, 0x80}}

// line is one line of characters. Without color the band is every second dot.
func (p *plot) line(at int, color bool) string {
	var b strings.Builder
	dim := false
	columns := p.width * p.dotsX
	for x := range p.width {
		char, hasLine, hasBand := rune(0), false, false
		for dy := range p.dotsY {
			for dx := range p.dotsX {
				r, c := at*p.dotsY+dy, x*p.dotsX+dx
				i := r*columns + c
				hasLine, hasBand = hasLine || p.mean[i], hasBand || p.around[i]
				if p.mean[i] || p.around[i] && (color || (r+c)%2 == 0) {
					char |= braille[dy][dx]
				}
			}
		}
		if want := color && hasBand && !hasLine; want != dim && (hasBand || hasLine) {
			dim = want
			b.WriteString(map[bool]string{true: "\x1b[2m", false: "\x1b[0m"}[dim])
		}
		switch {
		case !hasLine && !hasBand:
			b.WriteByte(' ')
		case p.dotsX == 2:
			b.WriteRune('⠀' + char)
		case hasLine:
			b.WriteByte('*')
		default:
			b.WriteByte(':')
		}
	}
	if dim {
		b.WriteString("\x1b[0m")
	}
	return strings.TrimRight(b.String(), " ")
}

// timeSteps are the distances of marks on the axis of time.
var timeSteps = []time.Duration{
	time.Second, 5 * time.Second, 15 * time.Second, 30 * time.Second,
	time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute,
	time.Hour, 2 * time.Hour, 3 * time.Hour, 6 * time.Hour, 12 * time.Hour,
	24 * time.Hour, 48 * time.Hour, 7 * 24 * time.Hour, 14 * 24 * time.Hour, 28 * 24 * time.Hour,
	91 * 24 * time.Hour, 365 * 24 * time.Hour,
}

// timeAxis is the line under a plot and the times under it.
func timeAxis(h wire.History, width int, zone *time.Location, dash, mark string) (axis, labels string) {
	if zone == nil {
		zone = time.UTC
	}
	const apart = 10 // characters
	span := time.Duration(min(max(h.Step*float64(h.Count), 1), 9e9) * float64(time.Second))
	step := timeSteps[len(timeSteps)-1]
	for _, s := range timeSteps {
		if float64(s)/float64(span)*float64(width) >= apart {
			step = s
			break
		}
	}
	line, text := slices.Repeat([]string{dash}, width), []rune(strings.Repeat(" ", width))
	from := h.From.In(zone)
	free := 0
	year, month, day := from.Date()
	for n := int64(0); ; n++ {
		// Days are counted in the calendar, since one in a year has 23 hours.
		t := time.Date(year, month, day, 0, 0, 0, 0, zone).Add(time.Duration(n) * step)
		if days := int(step / (24 * time.Hour)); days > 0 {
			t = time.Date(year, month, day+int(n)*days, 0, 0, 0, 0, zone)
		} else if t.Before(from) {
			n += max(int64(from.Sub(t)/step)-1, 0) // near, and then on by one
		}
		at := int(float64(t.Sub(from)) / float64(span) * float64(width))
		if at >= width || n > 1e6 {
			break
		}
		if t.Before(from) {
			continue
		}
		line[at] = mark
		label := []rune(timeLabel(t, step))
		if begin := at - len(label)/2; begin >= free && begin+len(label) <= width {
			copy(text[begin:], label)
			free = begin + len(label) + 1
		}
	}
	return strings.Join(line, ""), string(text)
}

func timeLabel(t time.Time, step time.Duration) string {
	switch {
	case step < time.Minute:
		return t.Format("15:04:05")
	case t.Hour() == 0 && t.Minute() == 0 || step >= 24*time.Hour:
		return t.Format("2 Jan")
	}
	return t.Format("15:04")
}

var sparks = []rune("▁▂▃▄▅▆▇█")

// Sparkline is a curve in one line of so many characters, each between the least
// and the most of the line; a space where nothing was measured.
func Sparkline(values []*float64, width int) string {
	width = min(width, len(values))
	line := make([]float64, width)
	low, high := math.Inf(1), math.Inf(-1)
	for x := range line {
		v, ok := columnOf(values, x, width, average)
		if line[x] = v; !ok {
			line[x] = math.NaN()
			continue
		}
		low, high = min(low, v), max(high, v)
	}
	out := make([]rune, width)
	for x, v := range line {
		switch {
		case math.IsNaN(v):
			out[x] = ' '
		case high <= low:
			out[x] = sparks[0]
		default:
			out[x] = sparks[min(int((v-low)/(high-low)*float64(len(sparks))), len(sparks)-1)]
		}
	}
	return string(out)
}
