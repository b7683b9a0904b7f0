package history

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
)

// The body of a record: a head of fixed size, little endian, then a deflated
// table. The head is enough to know whether the table is of interest.
//
//	first, last   u64  sequence numbers of the samples that are in it
//	boot          [8]  the first half of the kernel's boot id; zero if times are the wall clock's
//	offset        i64  ms from the times below to the wall clock, as it was at the last row
//	from, to      i64  ms, the least and the most time of a row
//	rows          u32
//	between       u32  ms, the usual (median) time from one row to the next; 0 if there is one row
//
// The table, of unsigned varints (u) and zigzag varints (z), is the rows' times
// and sequence numbers, then the columns:
//
//	rows  × from z, to-from z, seq z   each as the difference to the row before
//	columns u
//	columns × name (u length, bytes), unit (the same), stat byte, form byte,
//	          presence bits if form has the bit sparse, values of the rows that have one
//
// Values that are all whole numbers are z, each as the difference to the one
// before. Others are float32: seven digits are more than a sensor has. Their bits,
// exclusive-or the one before, are written in four planes of a byte each, which deflates best.
const (
	headSize   = 56
	maxRows    = 1024
	maxColumns = 4096
	maxName    = 256
	maxTable   = 8 << 20
)

const (
	formWhole  = 1 << 0
	formSparse = 1 << 1
)

// What a column holds.
const (
	statValue = 'v' // of a sample
	statMean  = 'm' // of a quarter of an hour, and so on
	statLeast = 'l'
	statMost  = 'h'
	statCount = 'n' // of samples that had one
)

// row is one sample, or the samples of a quarter of an hour.
type row struct {
	from, to int64 // ms
	seq      uint64
}

type column struct {
	name, unit string
	stat       byte
	values     []float64 // one a row; NaN where there is none
}

type block struct {
	boot   bootID
	offset int64
	rows   []row
	cols   []*column
}

// head is what is known of a block without its table.
type head struct {
	first, last uint64
	boot        bootID
	offset      int64
	from, to    int64
	rows        int
	between     uint32
}

func (b *block) head() head {
	h := head{boot: b.boot, offset: b.offset, rows: len(b.rows), from: math.MaxInt64, to: math.MinInt64, first: math.MaxUint64}
	for _, r := range b.rows {
		h.first, h.last = min(h.first, r.seq), max(h.last, r.seq)
		h.from, h.to = min(h.from, r.from), max(h.to, r.to)
	}
	var gaps []int64
	for i := 1; i < len(b.rows); i++ {
		if d := b.rows[i].from - b.rows[i-1].from; d > 0 {
			gaps = append(gaps, d)
		}
	}
	if len(gaps) > 0 {
		slices.Sort(gaps)
		h.between = uint32(min(gaps[len(gaps)/2], math.MaxUint32))
	}
	return h
}

// builder adds rows to a block.
type builder struct {
	block *block
	index map[columnKey]*column
}

type columnKey struct {
	name string
	stat byte
}

func newBuilder(boot bootID) *builder { return extend(&block{boot: boot}) }

func extend(b *block) *builder {
	x := &builder{b, make(map[columnKey]*column, len(b.cols))}
	for _, c := range b.cols {
		x.index[columnKey{c.name, c.stat}] = c
	}
	return x
}

// row begins a row; values are set in it.
func (x *builder) row(r row, offset int64) {
	x.block.rows = append(x.block.rows, r)
	x.block.offset = offset
	for _, c := range x.block.cols {
		c.values = append(c.values, math.NaN())
	}
}

func (x *builder) set(name string, stat byte, v float64, unit func() string) {
	key := columnKey{name, stat}
	c := x.index[key]
	if c == nil {
		if len(x.block.cols) >= maxColumns || len(name) > maxName {
			return
		}
		c = &column{name: name, unit: unit(), stat: stat, values: make([]float64, len(x.block.rows))}
		for i := range c.values {
			c.values[i] = math.NaN()
		}
		x.index[key] = c
		x.block.cols = append(x.block.cols, c)
	}
	c.values[len(c.values)-1] = v
}

func (b *block) clone() *block {
	out := *b
	out.rows = append([]row(nil), b.rows...)
	out.cols = make([]*column, len(b.cols))
	for i, c := range b.cols {
		copied := *c
		copied.values = append([]float64(nil), c.values...)
		out.cols[i] = &copied
	}
	return &out
}

// encode makes the body of a record.
func (b *block) encode() ([]byte, error) {
	h := b.head()
	out := make([]byte, 0, 16<<10)
	out = binary.LittleEndian.AppendUint64(out, h.first)
	out = binary.LittleEndian.AppendUint64(out, h.last)
	out = append(out, h.boot[:]...)
	out = binary.LittleEndian.AppendUint64(out, uint64(h.offset))
	out = binary.LittleEndian.AppendUint64(out, uint64(h.from))
	out = binary.LittleEndian.AppendUint64(out, uint64(h.to))
	out = binary.LittleEndian.AppendUint32(out, uint32(h.rows))
	out = binary.LittleEndian.AppendUint32(out, h.between)

	packed := bytes.NewBuffer(out)
	w, err := flate.NewWriter(packed, flate.DefaultCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(b.table()); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

func (b *block) table() []byte {
	var out []byte
	var last row
	for _, r := range b.rows {
		out = binary.AppendVarint(out, r.from-last.from)
		out = binary.AppendVarint(out, r.to-r.from)
		out = binary.AppendVarint(out, int64(r.seq-last.seq))
		last = r
	}
	out = binary.AppendUvarint(out, uint64(len(b.cols)))
	for _, c := range b.cols {
		out = appendText(out, c.name)
		out = appendText(out, c.unit)
		out = c.append(append(out, c.stat))
	}
	return out
}

func appendText(out []byte, s string) []byte {
	return append(binary.AppendUvarint(out, uint64(len(s))), s...)
}

func (c *column) append(out []byte) []byte {
	form := byte(formWhole)
	present := make([]float64, 0, len(c.values))
	bits := make([]byte, (len(c.values)+7)/8)
	for i, v := range c.values {
		if math.IsNaN(v) {
			form |= formSparse
			continue
		}
		bits[i/8] |= 1 << (i % 8)
		present = append(present, v)
		if v != math.Trunc(v) || math.Abs(v) > 1<<53 {
			form &^= formWhole
		}
	}
	out = append(out, form)
	if form&formSparse != 0 {
		out = append(out, bits...)
	}
	if form&formWhole != 0 {
		var last int64
		for _, v := range present {
			out = binary.AppendVarint(out, int64(v)-last)
			last = int64(v)
		}
		return out
	}
	at := len(out)
	out = append(out, make([]byte, 4*len(present))...)
	var last uint32
	for i, v := range present {
		now := math.Float32bits(float32(v))
		for plane := range 4 {
			out[at+plane*len(present)+i] = byte((now ^ last) >> (8 * plane))
		}
		last = now
	}
	return out
}

var errBlock = errors.New("a block of the history is damaged")

func decodeHead(body []byte) (head, error) {
	if len(body) < headSize {
		return head{}, errBlock
	}
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(body[at:]) }
	h := head{
		first: u64(0), last: u64(8), boot: bootID(body[16:24]),
		offset: int64(u64(24)), from: int64(u64(32)), to: int64(u64(40)),
		rows: int(binary.LittleEndian.Uint32(body[48:])), between: binary.LittleEndian.Uint32(body[52:]),
	}
	const times = 1 << 52 // ms; 140,000 years, so that sums cannot overflow
	within := func(v int64) bool { return v > -times && v < times }
	if h.rows < 1 || h.rows > maxRows || h.first > h.last || h.last > 1<<62 || h.from > h.to ||
		!within(h.offset) || !within(h.from) || !within(h.to) {
		return head{}, errBlock
	}
	return h, nil
}

// decode reads a body, which may be anything.
func decode(body []byte) (*block, error) {
	h, err := decodeHead(body)
	if err != nil {
		return nil, err
	}
	inflate := flate.NewReader(bytes.NewReader(body[headSize:]))
	table, err := io.ReadAll(io.LimitReader(inflate, maxTable))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBlock, err)
	}
	p := parser{rest: table}
	b := &block{boot: h.boot, offset: h.offset, rows: make([]row, h.rows)}
	var last row
	for i := range b.rows {
		r := row{from: last.from + p.signed()}
		r.to = r.from + p.signed()
		r.seq = last.seq + uint64(p.signed())
		if r.from < h.from || r.to > h.to || r.from > r.to || r.seq < h.first || r.seq > h.last {
			return nil, errBlock
		}
		b.rows[i], last = r, r
	}
	n := p.unsigned()
	if n > maxColumns {
		return nil, errBlock
	}
	for range n {
		c := &column{name: p.text(), unit: p.text(), stat: p.byte()}
		c.values = p.values(h.rows)
		if p.failed {
			return nil, errBlock
		}
		b.cols = append(b.cols, c)
	}
	if p.failed || len(p.rest) > 0 {
		return nil, errBlock
	}
	return b, nil
}

// parser takes a table apart; after a failure it yields zeros.
type parser struct {
	rest   []byte
	failed bool
}

func (p *parser) fail() { p.failed, p.rest = true, nil }

func (p *parser) signed() int64    { return varint(p, binary.Varint) }
func (p *parser) unsigned() uint64 { return varint(p, binary.Uvarint) }

func varint[T int64 | uint64](p *parser, read func([]byte) (T, int)) T {
	v, n := read(p.rest)
	if n <= 0 {
		p.fail()
		return 0
	}
	p.rest = p.rest[n:]
	return v
}

func (p *parser) take(n int) []byte {
	if n > len(p.rest) {
		p.fail()
		return make([]byte, n)
	}
	v := p.rest[:n]
	p.rest = p.rest[n:]
	return v
}

func (p *parser) byte() byte { return p.take(1)[0] }

func (p *parser) text() string {
	n := p.unsigned()
	if n > maxName {
		p.fail()
		return ""
	}
	return string(p.take(int(n)))
}

func (p *parser) values(rows int) []float64 {
	form := p.byte()
	values := make([]float64, rows)
	at := make([]int, 0, rows)
	var bits []byte
	if form&formSparse != 0 {
		bits = p.take((rows + 7) / 8)
	}
	for i := range values {
		values[i] = math.NaN()
		if bits == nil || bits[i/8]&(1<<(i%8)) != 0 {
			at = append(at, i)
		}
	}
	if form&formWhole != 0 {
		var last int64
		for _, i := range at {
			last += p.signed()
			values[i] = float64(last)
		}
		return values
	}
	planes := p.take(4 * len(at))
	var last uint32
	for n, i := range at {
		for plane := range 4 {
			last ^= uint32(planes[plane*len(at)+n]) << (8 * plane)
		}
		if v := float64(math.Float32frombits(last)); !math.IsInf(v, 0) {
			values[i] = v
		}
	}
	return values
}
