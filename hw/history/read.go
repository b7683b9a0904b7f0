package history

import (
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

const (
	defaultPoints = 240
	maxPatterns   = 200

	// maxValues bounds an answer: so many points of all curves together, each with
	// least, mean and most. In JSON that is about 3 MB.
	maxValues = 120_000
)

// view is what an answer is made of: the ring at one moment.
type view struct {
	parts []part
	clock map[bootID]int64
}

// part is one block, loaded when it is needed.
type part struct {
	head
	coarse bool
	load   func() (*block, error)
}

// Read answers a request; what is wrong with it is a *wire.Problem. The answer
// spans From to To in at most Points steps, but no finer than what was measured.
// Curves that would make it too large are named in LeftOut.
func (r *Ring) Read(q wire.HistoryRequest, now time.Time) (wire.History, error) {
	if err := check(q); err != nil {
		return wire.History{}, err
	}
	v := r.look()
	to := now.UnixMilli()
	if !q.To.IsZero() {
		to = q.To.UnixMilli()
	}
	from := to - 1000
	if !q.From.IsZero() {
		from = q.From.UnixMilli()
	} else {
		for _, p := range v.parts {
			if begin, _, ok := v.span(p.head); ok {
				from = min(from, begin)
			}
		}
	}
	if !q.From.IsZero() && from >= to {
		return wire.History{}, wire.RejectedBecause(wire.CodeBadBody, "the history was asked for from %s, which is not before its end; give an earlier beginning", q.From.UTC().Format(time.RFC3339))
	}
	points := q.Points
	if points == 0 {
		points = defaultPoints
	}
	g := v.grid(from, to, points)
	out := wire.History{From: time.UnixMilli(from).UTC(), Step: g.step / 1000, Count: g.count, Series: map[string]wire.Curve{}}
	if g.count == 0 {
		return out, nil
	}
	units := v.names(g, q.Series)
	names := slices.Sorted(maps.Keys(units))
	if most := maxValues / g.count; len(names) > most {
		out.LeftOut, names = names[most:], names[:most]
	}
	bins := make(map[string]*bin, len(names))
	for _, name := range names {
		bins[name] = newBin(g.count)
	}
	v.fill(g, bins)
	for _, name := range names {
		if b := bins[name]; !b.empty() {
			out.Series[name] = b.curve(units[name])
		}
	}
	return out, nil
}

func check(q wire.HistoryRequest) error {
	switch {
	case q.Points < 0 || q.Points > wire.MaxPoints:
		return wire.RejectedBecause(wire.CodeBadBody, "%d points were asked for; it can be 1 to %d, or 0 for %d", q.Points, wire.MaxPoints, defaultPoints)
	case len(q.Series) > maxPatterns:
		return wire.RejectedBecause(wire.CodeBadBody, "%d names of series were given; more than %d is too many, use names that end in *", len(q.Series), maxPatterns)
	case !q.From.IsZero() && !q.To.IsZero() && !q.From.Before(q.To):
		return wire.RejectedBecause(wire.CodeBadBody, "the end of the history that was asked for is not after its beginning")
	case far(q.From) || far(q.To):
		return wire.RejectedBecause(wire.CodeBadBody, "the history was asked for at a time that no clock shows")
	}
	for _, s := range q.Series {
		if s == "" || len(s) > maxName || strings.Contains(strings.TrimSuffix(s, "*"), "*") {
			return wire.RejectedBecause(wire.CodeBadBody, "%.40q names no series; give a name, or the beginning of one and * at its end", s)
		}
	}
	return nil
}

func far(t time.Time) bool {
	return !t.IsZero() && (t.UnixMilli() < -farthest || t.UnixMilli() > farthest)
}

// look takes what there is at this moment. Blocks on disk are loaded later,
// without the lock; one that is removed meanwhile is as if it had been before.
func (r *Ring) look() view {
	r.mu.Lock()
	defer r.mu.Unlock()
	var v view
	add := func(f *files, coarse bool) {
		for _, x := range f.refs() {
			v.parts = append(v.parts, part{x.head, coarse, func() (*block, error) { return f.load(x) }})
		}
	}
	hold := func(b *block, coarse bool) {
		copied := b.clone()
		v.parts = append(v.parts, part{copied.head(), coarse, func() (*block, error) { return copied, nil }})
	}
	add(r.coarse, true)
	for _, b := range r.pending {
		hold(b, true)
	}
	add(r.fine, false)
	if r.buffer != nil {
		hold(r.buffer.block, false)
	}
	v.clock = clocks(v.parts)
	return v
}

// clocks finds, for each boot, what makes the wall clock of the time since it:
// the last that was known and is not plainly wrong.
func clocks(parts []part) map[bootID]int64 {
	clock, last := map[bootID]int64{}, map[bootID]uint64{}
	for _, p := range parts {
		if p.boot == (bootID{}) || p.last < last[p.boot] || p.to+p.offset < epoch {
			continue
		}
		clock[p.boot], last[p.boot] = p.offset, p.last
	}
	return clock
}

// span is when a block's rows were, in ms; false if that is not known.
func (v view) span(h head) (from, to int64, ok bool) {
	offset, known := int64(0), true
	if h.boot != (bootID{}) {
		offset, known = v.clock[h.boot]
	}
	if from, to = h.from+offset, h.to+offset; h.boot == (bootID{}) {
		known, from = to >= epoch, max(from, epoch)
	}
	return from, to, known
}

// grid is the steps of an answer, and which rows go into it.
type grid struct {
	from, to int64 // ms
	step     float64
	count    int
	coarse   bool   // coarse rows where there are any, else fine ones
	border   uint64 // sequence number from which on rows are fine
}

// grid chooses the step. A step that is shorter than the time between samples
// would show gaps that are none, so it is one and a half of that at least.
func (v view) grid(from, to int64, points int) grid {
	g := grid{from: from, to: to}
	if from >= to {
		return g
	}
	g.step = max(float64(to-from)/float64(points), 1000)
	g.coarse = g.step >= 2*float64(coarseSpan.Milliseconds())
	g.border = math.MaxUint64
	for _, p := range v.parts {
		switch {
		case g.coarse && p.coarse:
			if g.border == math.MaxUint64 {
				g.border = 0
			}
			g.border = max(g.border, p.last+1)
		case !g.coarse && !p.coarse:
			g.border = min(g.border, p.first)
		}
	}
	if g.coarse && g.border == math.MaxUint64 {
		g.border = 0 // nothing coarse yet
	}
	if between, ok := v.interval(g); ok {
		g.step = max(g.step, 1.5*between)
	}
	g.count = max(1, min(points, int(math.Ceil(float64(to-from)/g.step))))
	return g
}

// interval is the usual time between the fine rows that g shows, in ms: the
// median, over the blocks and what lies between them.
func (v view) interval(g grid) (float64, bool) {
	type gap struct {
		ms    float64
		times int
	}
	var gaps []gap
	var last *part
	all := 0
	for i := range v.parts {
		p := &v.parts[i]
		if !v.shows(g, p) || p.coarse {
			continue
		}
		if p.between > 0 {
			gaps = append(gaps, gap{float64(p.between), p.rows - 1})
			all += p.rows - 1
		}
		if last != nil && last.boot == p.boot && p.from > last.to {
			gaps = append(gaps, gap{float64(p.from - last.to), 1})
			all++
		}
		last = p
	}
	slices.SortFunc(gaps, func(a, b gap) int {
		switch {
		case a.ms < b.ms:
			return -1
		case a.ms > b.ms:
			return 1
		}
		return 0
	})
	for n := 0; len(gaps) > 0; gaps = gaps[1:] {
		if n += gaps[0].times; 2*n >= all {
			return gaps[0].ms, true
		}
	}
	return 0, false
}

// shows tells whether a block has rows for the grid.
func (v view) shows(g grid, p *part) bool {
	from, to, ok := v.span(p.head)
	if !ok || from > g.to || to < g.from {
		return false
	}
	if p.coarse {
		return p.first < g.border
	}
	return p.last >= g.border
}

// each calls take for the blocks that have rows for the grid. A damaged one is left out.
func (v view) each(g grid, take func(p *part, b *block)) {
	for i := range v.parts {
		if p := &v.parts[i]; v.shows(g, p) {
			if b, err := p.load(); err == nil {
				take(p, b)
			}
		}
	}
}

// names finds the wanted series and their units.
func (v view) names(g grid, wanted []string) map[string]string {
	units := map[string]string{}
	v.each(g, func(_ *part, b *block) {
		for _, c := range b.cols {
			if matches(wanted, c.name) {
				units[c.name] = c.unit
			}
		}
	})
	return units
}

func matches(wanted []string, name string) bool {
	if len(wanted) == 0 {
		return true
	}
	return slices.ContainsFunc(wanted, func(w string) bool {
		beginning, many := strings.CutSuffix(w, "*")
		return name == w || many && strings.HasPrefix(name, beginning)
	})
}

// bin collects one series, step by step.
type bin struct {
	least, most, sum, n []float64
}

func newBin(count int) *bin {
	all := make([]float64, 4*count)
	return &bin{all[:count], all[count : 2*count], all[2*count : 3*count], all[3*count:]}
}

func (b *bin) add(at int, least, mean, most, n float64) {
	if b.n[at] == 0 {
		b.least[at], b.most[at] = least, most
	}
	b.least[at], b.most[at] = min(b.least[at], least), max(b.most[at], most)
	b.sum[at] += mean * n
	b.n[at] += n
}

func (b *bin) empty() bool {
	return !slices.ContainsFunc(b.n, func(n float64) bool { return n > 0 })
}

// fill puts every row where it belongs: a fine one into its step, a coarse one
// into all that it spans.
func (v view) fill(g grid, bins map[string]*bin) {
	v.each(g, func(p *part, b *block) {
		offset := v.clock[b.boot] // 0 of a block without a boot
		cols := columns{}
		for _, c := range b.cols {
			cols[columnKey{c.name, c.stat}] = c
		}
		for i, at := range b.rows {
			if p.coarse != (at.seq < g.border) {
				continue
			}
			first, last, ok := g.steps(at.from+offset, at.to+offset)
			if !ok || b.boot == (bootID{}) && at.to < epoch {
				continue
			}
			for _, c := range b.cols {
				into := bins[c.name]
				if into == nil || math.IsNaN(c.values[i]) {
					continue
				}
				mean := c.values[i]
				least, most, n := mean, mean, 1.0
				switch c.stat {
				case statValue:
				case statMean:
					least, most, n = cols.at(c.name, statLeast, i, mean), cols.at(c.name, statMost, i, mean), cols.at(c.name, statCount, i, 1)
				default:
					continue
				}
				for step := first; step <= last; step++ {
					into.add(step, least, mean, most, max(n, 1))
				}
			}
		}
	})
}

// columns finds a column by name and kind.
type columns map[columnKey]*column

// at is a value of a row; otherwise if there is none.
func (c columns) at(name string, stat byte, row int, otherwise float64) float64 {
	x := c[columnKey{name, stat}]
	if x == nil || math.IsNaN(x.values[row]) {
		return otherwise
	}
	return x.values[row]
}

// steps is where a row from one time to another lies; false if outside. The
// end counts as inside, so that a sample of this moment is shown.
func (g grid) steps(from, to int64) (first, last int, ok bool) {
	if to < g.from || from > g.to {
		return 0, 0, false
	}
	at := func(ms int64) int {
		return min(max(int(float64(ms-g.from)/g.step), 0), g.count-1)
	}
	return at(from), at(to), true
}

func (b *bin) curve(unit string) wire.Curve {
	c := wire.Curve{Unit: unit, Mean: make([]*float64, len(b.n)), Min: make([]*float64, len(b.n)), Max: make([]*float64, len(b.n))}
	differ := false
	for i, n := range b.n {
		if n == 0 {
			continue
		}
		least, most := short(b.least[i]), short(b.most[i])
		mean := min(max(short(b.sum[i]/n), least), most)
		c.Mean[i], c.Min[i], c.Max[i] = &mean, &least, &most
		differ = differ || least != most
	}
	if !differ {
		c.Min, c.Max = nil, nil
	}
	return c
}

// short rounds to what was kept: seven digits, or whole numbers.
func short(v float64) float64 {
	if math.Abs(v) >= 1e7 {
		return math.Round(v)
	}
	v, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 7, 64), 64)
	if err != nil {
		return 0
	}
	return v
}
