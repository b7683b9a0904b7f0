package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// GetOptions are the particulars of [Get].
type GetOptions struct {
	Identities []age.Identity    // one of them must fit; none: the object is plain
	Progress   func(bytes int64) // as in [PutOptions]
}

// Get writes an object to w. On an error w may have got a part of it, every byte
// of which is right.
func Get(ctx context.Context, c *api.Client, name string, w io.Writer, o *GetOptions) (*Object, error) {
	if o == nil {
		o = &GetOptions{}
	}
	obj, err := Open(ctx, c, name, o.Identities)
	if err != nil {
		return obj, err
	}
	return obj, obj.Write(ctx, c, w, o.Progress)
}

// Write writes the whole file to w, as [Get] does.
func (o *Object) Write(ctx context.Context, c *api.Client, w io.Writer, progress func(int64)) error {
	return o.write(ctx, c, w, newWhole(), progress)
}

// Resume goes on with a file of which the first n bytes, which part reads, came
// before. What came before is checked with the rest, against the digest of the
// whole: if it is not what it should be, the error is [ErrWhole].
func (o *Object) Resume(ctx context.Context, c *api.Client, part io.Reader, n int64, w io.Writer, progress func(int64)) error {
	h := newWhole()
	if err := h.resume(part, n); err != nil {
		return fmt.Errorf("what came before cannot be read: %w", err)
	}
	if progress != nil {
		progress(n)
	}
	return o.write(ctx, c, w, h, progress)
}

func (o *Object) write(ctx context.Context, c *api.Client, w io.Writer, h *whole, progress func(int64)) error {
	if err := o.WriteRange(ctx, c, io.MultiWriter(toFile{w}, h), h.size, o.Size, progress); err != nil {
		return err
	}
	if got := h.sum(); h.size != o.Size || got != o.Digest() {
		return fmt.Errorf("%w: %q has SHA-256 %s, stored was %s", ErrWhole, o.Name, got, o.Digest())
	}
	return nil
}

// toFile says that it is the file which cannot be written.
type toFile struct{ io.Writer }

func (f toFile) Write(p []byte) (int, error) {
	n, err := f.Writer.Write(p)
	if err != nil {
		err = fmt.Errorf("the file cannot be written: %w", err)
	}
	return n, err
}

// WriteRange writes the bytes from, up to and without to. It fetches only the
// shards that they are in. Of a plain object, each chunk is checked against its
// id, and nothing says that the coordinator told the right ids.
func (o *Object) WriteRange(ctx context.Context, c *api.Client, w io.Writer, from, to int64, progress func(int64)) error {
	if from < 0 || to < from || to > o.Size {
		return fmt.Errorf("%q has %d bytes, and so no range %d-%d", o.Name, o.Size, from, to)
	}
	r := &reader{client: c, object: o}
	units, ahead := r.units(from, to)
	defer r.running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type piece struct {
		data [][]byte
		err  error
	}
	// Pieces are fetched ahead and written in order. One that is being written
	// still has its place.
	places := make(chan struct{}, ahead)
	queue := make(chan chan piece, ahead)
	r.running.Go(func() {
		defer close(queue)
		for fetch := range units {
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
				return
			}
			p := make(chan piece, 1)
			queue <- p
			r.running.Go(func() {
				data, err := fetch(ctx)
				p <- piece{data, err}
			})
		}
	})
	for p := range queue {
		got := <-p
		if got.err != nil {
			return r.removed(ctx, got.err)
		}
		for _, data := range got.data {
			if _, err := w.Write(data); err != nil {
				return err
			}
			if progress != nil {
				progress(int64(len(data)))
			}
		}
		<-places
	}
	return ctx.Err()
}

// reader gets one object.
type reader struct {
	client *api.Client
	object *Object
	pace   pace
	line   line
	// whole is for what is fetched as a whole, a chunk or a stripe: that some shards of
	// a stripe come ends the outage of the line, but not that of the stripe.
	whole line
	slow  latecomers

	running sync.WaitGroup // all that it has begun
}

// removed is err, or that the object is not there any more, which explains it.
func (r *reader) removed(ctx context.Context, err error) error {
	var e *api.Error
	if ctx.Err() != nil || !errors.As(err, &e) {
		return err
	}
	now, there, lookErr := lookUp(ctx, r.client, r.object.Name)
	switch {
	case lookErr != nil:
		return err
	case !there:
		return fmt.Errorf("%q %w", r.object.Name, ErrRemoved)
	case !slices.Equal(now.Chunks, r.object.Chunks):
		return fmt.Errorf("%q %w, and something else has its name now", r.object.Name, ErrRemoved)
	}
	return err
}

// outlast fetches what passes says may be there again soon. Whoever has got nothing yet
// is told at once that it is not there.
func outlast[T any](ctx context.Context, r *reader, passes func(error) bool, f func() (T, error)) (T, error) {
	got, err := over(ctx, &r.whole, func(err error) bool { return r.whole.begun.Load() && passes(err) }, f)
	if err == nil {
		r.whole.begun.Store(true)
	}
	return got, err
}

// unit fetches the next bytes.
type unit func(context.Context) ([][]byte, error)

// requestsAhead is how many shards are asked for at once, those of one stripe
// and what is asked for in place of slow ones not counted.
const requestsAhead = 24

// units are the parts of a range in their order, and how many of them may be in
// memory.
func (r *reader) units(from, to int64) (units func(yield func(unit) bool), ahead int) {
	o := r.object
	if o.Code == nil {
		return func(yield func(unit) bool) {
			var at int64
			for _, ch := range o.Chunks {
				a, b := max(from, at)-at, min(to, at+ch.Size)-at
				at += ch.Size
				if a < b && !yield(func(ctx context.Context) ([][]byte, error) {
					data, err := outlast(ctx, r, away, func() ([]byte, error) { return r.fetch(ctx, ch) })
					if err != nil {
						return nil, err
					}
					return [][]byte{data[a:b]}, nil
				}) {
					return
				}
			}
		}, window(chunk.MaxSize, atOnce)
	}
	m := o.m
	ahead = window(m.Code.Shards()*(m.Payload+overhead), min(4, max(requestsAhead/m.Code.Data, 1)))
	return func(yield func(unit) bool) {
		if from == to {
			return
		}
		full := int64(m.Payload) * int64(m.Code.Data)
		for s := from / full; s <= (to-1)/full; s++ {
			if !yield(func(ctx context.Context) ([][]byte, error) { return r.stripe(ctx, s, from, to) }) {
				return
			}
		}
	}, ahead
}

// fetch gets a chunk and checks it against its id.
func (r *reader) fetch(ctx context.Context, ch api.Chunk) ([]byte, error) {
	data, err := over(ctx, &r.line, interrupted, func() ([]byte, error) { return r.client.GetChunk(ctx, ch.ID) })
	if err != nil {
		return nil, err
	}
	return data, checkChunk(ch, data)
}

func checkChunk(ch api.Chunk, data []byte) error {
	if int64(len(data)) != ch.Size || chunk.Sum(data).String() != ch.ID {
		return damaged("chunk %s does not verify", ch.ID)
	}
	return nil
}

// stripe gets the bytes of a range that are in one stripe.
func (r *reader) stripe(ctx context.Context, s, from, to int64) ([][]byte, error) {
	m := r.object.m
	at, payload := m.stripe(s)
	p := int64(payload)
	a, b := max(from, at)-at, min(to, at+p*int64(m.Code.Data), m.Size)-at
	first, last := int(a/p), int((b-1)/p)
	width := m.Code.Shards()
	shards := make([][]byte, width)
	_, err := outlast(ctx, r, tooFewNow, func() (struct{}, error) {
		return struct{}{}, r.gather(ctx, r.object.Chunks[int(s)*width:][:width], shards, first, last)
	})
	if err != nil {
		return nil, fmt.Errorf("%q, stripe %d: %w", r.object.Name, s, err)
	}
	var out [][]byte
	for i := first; i <= last; i++ {
		data, err := r.object.keys.openShard(m.Code, s*int64(m.Code.Data)+int64(i), shards[i])
		if err != nil {
			return nil, fmt.Errorf("%q: %w", r.object.Name, err)
		}
		lo, hi := max(a-int64(i)*p, 0), min(b-int64(i)*p, p)
		out = append(out, data[lo:hi])
	}
	return out, nil
}

// gather gets the shards first to last of a stripe, those that are not there yet. As
// soon as one of them fails or is late, others are asked for, of which as many as there
// are shards of data do as well; at once for those on a device that was late just before. What has come stays in shards if there is an error.
func (r *reader) gather(ctx context.Context, chunks []api.Chunk, shards [][]byte, first, last int) error {
	whole := ctx
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // whoever is late need not go on
	h := &hunt{reader: r, chunks: chunks, first: first, last: last, code: r.object.m.Code,
		shards: shards, asked: make([]asked, len(chunks)), got: make(chan shard, len(chunks)), patience: 1}
	for i, data := range shards {
		if data != nil {
			h.have++
			h.asked[i] = asked{at: time.Now(), over: true}
		}
	}
	skipped := false
	for i := first; i <= last; i++ {
		switch {
		case !h.asked[i].at.IsZero():
		case r.slow.rests(chunks[i].ID):
			skipped = true
		default:
			h.ask(ctx, i)
		}
	}
	if skipped {
		h.askMore(ctx, h.code.Data-h.have-h.coming())
	}
	late := time.NewTimer(h.untilLate())
	defer late.Stop()
	for !h.complete() {
		if h.underWay == 0 && !h.askMore(ctx, h.code.Data-h.have) {
			return h.failed()
		}
		late.Reset(h.untilLate())
		select {
		case s := <-h.got:
			h.take(s)
			if s.err != nil && ctx.Err() == nil {
				h.askMore(ctx, h.code.Data-h.have-h.coming())
			}
		case <-late.C:
			for _, i := range h.noteLate() {
				r.slow.late(whole, r, chunks[i].ID)
			}
			h.askMore(ctx, h.code.Data-h.have-h.coming())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if slices.ContainsFunc(shards[first:last+1], func(s []byte) bool { return s == nil }) {
		return reconstructData(h.code, shards)
	}
	return nil
}

// hunt is the search for the shards of one stripe.
type hunt struct {
	reader      *reader
	chunks      []api.Chunk
	first, last int // wanted
	code        api.Code
	shards      [][]byte
	asked       []asked
	got         chan shard
	// patience is how often the reader's patience a request has from now on: it
	// doubles each time that some are late, so that a line that is slow altogether
	// does not make everything be asked for.
	patience int
	// How many have come, and are under way.
	have, underWay int
	away           int // how many cannot be read only for now
	problems       []string
	unreadable     error // the first that was not a fault of the stripe alone
}

// asked is a request for a shard; zero: there was none.
type asked struct {
	at       time.Time
	patience int
	late     bool // it is not counted upon any more
	over     bool
}

// counted tells whether a request is under way and not late.
func (a *asked) counted() bool { return !a.at.IsZero() && !a.over && !a.late }

type shard struct {
	i    int
	data []byte
	err  error
}

func (h *hunt) ask(ctx context.Context, i int) {
	h.asked[i] = asked{at: time.Now(), patience: h.patience}
	h.underWay++
	h.reader.running.Go(func() {
		began := time.Now()
		data, err := h.reader.fetch(ctx, h.chunks[i])
		if err == nil {
			h.reader.pace.took(time.Since(began))
		}
		h.got <- shard{i, data, err}
	})
}

// askMore asks for n shards more, last for those on devices that were late, and returns
// false if none is left.
func (h *hunt) askMore(ctx context.Context, n int) (any bool) {
	for _, rests := range []bool{false, true} {
		for i := range h.chunks {
			if n <= 0 {
				return any
			}
			if h.asked[i].at.IsZero() && (rests || !h.reader.slow.rests(h.chunks[i].ID)) {
				h.ask(ctx, i)
				any = true
				n--
			}
		}
	}
	return any
}

// expected calls f with the requests that are under way and not late.
func (h *hunt) expected(f func(a *asked)) {
	for i := range h.asked {
		if a := &h.asked[i]; a.counted() {
			f(a)
		}
	}
}

// coming is how many shards can be counted upon.
func (h *hunt) coming() (n int) {
	h.expected(func(*asked) { n++ })
	return n
}

// untilLate is how long it takes until the next request is late; for ever, if
// all are.
func (h *hunt) untilLate() time.Duration {
	each, next := h.reader.pace.patience(), time.Duration(math.MaxInt64)
	h.expected(func(a *asked) { next = min(next, time.Until(a.at.Add(time.Duration(a.patience)*each))) })
	return next
}

// noteLate returns which requests are late since the last time.
func (h *hunt) noteLate() (late []int) {
	each := h.reader.pace.patience()
	for i := range h.asked {
		if a := &h.asked[i]; a.counted() && time.Since(a.at) >= time.Duration(a.patience)*each {
			a.late = true
			late = append(late, i)
		}
	}
	h.patience *= 2
	return late
}

func (h *hunt) take(s shard) {
	h.underWay--
	h.asked[s.i].over = true
	if s.err != nil {
		if away(s.err) {
			h.away++
		}
		h.problems = append(h.problems, fmt.Sprintf("shard %d: %s", s.i, brief(s.err)))
		if h.unreadable == nil || errors.Is(s.err, ErrDamaged) {
			h.unreadable = s.err
		}
		return
	}
	h.have++
	h.shards[s.i] = s.data
	if !h.asked[s.i].late {
		h.reader.slow.onTime(h.chunks[s.i].ID)
	}
}

// complete tells whether what was wanted is there, or enough to make it of.
func (h *hunt) complete() bool {
	return h.have >= h.code.Data || !slices.ContainsFunc(h.shards[h.first:h.last+1], func(s []byte) bool { return s == nil })
}

// brief is an error in one line that leaves room for others.
func brief(err error) string {
	const most = 160 // runes
	text := []rune(strings.Join(strings.Fields(err.Error()), " "))
	if len(text) > most {
		text = append(text[:most-1], '…')
	}
	return string(text)
}

// maxProblems is how many shards an error names.
const maxProblems = 3

func (h *hunt) failed() error {
	slices.Sort(h.problems)
	named := h.problems[:min(len(h.problems), maxProblems)]
	told := strings.Join(named, "; ")
	if more := len(h.problems) - len(named); more > 0 {
		told += fmt.Sprintf("; and %d more", more)
	}
	return fmt.Errorf("%d of %d shards can be read, it takes %d (%s): %w", h.have, len(h.chunks), h.code.Data, told, unreadable{h.unreadable, h.have+h.away >= h.code.Data})
}

// unreadable is an error that was told already.
type unreadable struct {
	error
	passes bool // with those shards that are away only for now, there are enough
}

// tooFewNow tells whether a stripe misses only shards that may be there again soon.
func tooFewNow(err error) bool {
	var u unreadable
	return errors.As(err, &u) && u.passes
}

func (unreadable) Error() string   { return "the file cannot be read whole now" }
func (u unreadable) Unwrap() error { return u.error }

// pace learns how long a shard takes, and so when one is late: after twice as
// long as nine of ten took lately. What was given up for being late does not
// count, so that a slow device does not make everybody wait for it.
type pace struct {
	mu     sync.Mutex
	latest [64]time.Duration
	n      int
}

const (
	// Before anything has come, and at least: what is quick is not worth more load.
	firstPatience = 5 * time.Second
	leastPatience = 50 * time.Millisecond
)

func (p *pace) took(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latest[p.n%len(p.latest)] = d
	p.n++
}

func (p *pace) patience() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n == 0 {
		return firstPatience
	}
	list := slices.Clone(p.latest[:min(p.n, len(p.latest))])
	slices.Sort(list)
	return max(2*list[(len(list)-1)*9/10], leastPatience)
}
