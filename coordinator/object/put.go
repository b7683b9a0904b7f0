package object

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"slices"

	"filippo.io/age"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// Session is what makes a file the same bytes again. While a put is under way it
// can be kept (as JSON, for nobody else to read: it holds the file's key), so
// that the put can go on after it was cut off.
type Session struct {
	Key     []byte   `json:"key"`     // of the file
	Wrapped []byte   `json:"wrapped"` // the same, for its recipients
	Token   string   `json:"token"`   // names its stripes to the coordinator
	Code    api.Code `json:"code"`
	Payload int      `json:"payload"`
}

// NewSession makes a key for a file of size bytes, -1 if that is not known.
func NewSession(code api.Code, size int64, recipients []age.Recipient) (*Session, error) {
	if err := checkCode(code); err != nil {
		return nil, err
	}
	payload, err := payloadFor(size, code)
	if err != nil {
		return nil, err
	}
	s := &Session{Key: make([]byte, keySize), Token: rand.Text(), Code: code, Payload: payload}
	rand.Read(s.Key)
	s.Wrapped, err = wrap(s.Key, recipients)
	return s, err
}

// payloadFor is the smallest payload with which a file has few enough chunks.
func payloadFor(size int64, c api.Code) (int, error) {
	if size < 0 {
		return chunk.MaxSize - overhead, nil
	}
	for shard := chunk.DefaultSize; shard <= chunk.MaxSize; shard *= 2 {
		m := manifest{Size: size, Code: c, Payload: shard - overhead}
		if m.stripes()*int64(c.Shards()) <= int64(maxChunks) {
			return m.Payload, nil
		}
	}
	return 0, errTooLarge(c)
}

func errTooLarge(c api.Code) error {
	most := int64(maxChunks/c.Shards()) * int64(c.Data) * (chunk.MaxSize - overhead)
	return fmt.Errorf("with the code %s an object has at most %d bytes: cut the file in parts", c, most)
}

// PutOptions are the particulars of [Put].
type PutOptions struct {
	// Identities open an object that has the name already, to see whether it is
	// the same file.
	Identities []age.Identity
	// Readers name the recipients of the session. An object that has the name
	// already is the same only if it was stored for the same.
	Readers []string
	// AnyCode says that an object that has the name already may have another code
	// than the session.
	AnyCode bool
	// Progress is told the bytes of the file that are safe; it may be called by
	// several goroutines at once. May be nil.
	Progress func(bytes int64)
}

func (o PutOptions) progress(n int64) {
	if o.Progress != nil {
		o.Progress(n)
	}
}

// Put encrypts what r gives and stores it under name. What the session has
// placed before is not sent again. If the object is there already, shards of it
// that were lost are placed again.
func Put(ctx context.Context, c *api.Client, name string, r io.Reader, s *Session, o PutOptions) (*Object, []api.Placement, error) {
	old, taken, err := lookUp(ctx, c, name)
	if err != nil {
		return nil, nil, err
	}
	if taken {
		return repeat(ctx, c, old, r, s, o)
	}
	keys, err := deriveKeys(s.Key)
	if err != nil {
		return nil, nil, err
	}
	p := newPutter(c, s, keys, o)
	p.keeper = keep(ctx, c)
	defer p.keeper.end()
	size, sum, err := p.run(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	rec := api.Object{Name: name, Size: size, Code: &s.Code, Chunks: []api.Chunk{}}
	for _, st := range p.stripes {
		for _, pl := range st {
			rec.Chunks = append(rec.Chunks, pl.Chunk)
		}
	}
	m := manifest{Name: name, Size: size, SHA256: sum, Code: s.Code, Payload: s.Payload,
		Chunks: hex.EncodeToString(listDigest(rec.Chunks)), Readers: readersDigest(o.Readers)}
	if rec.Manifest, err = sealManifest(keys, s.Wrapped, m); err != nil {
		return nil, nil, err
	}
	if rec, err = over(ctx, &p.line, interrupted, func() (api.Object, error) { return c.PutObject(ctx, rec) }); err != nil {
		return nil, nil, err
	}
	return &Object{Object: rec, m: m, keys: keys}, slices.Concat(p.stripes...), nil
}

// lookUp tells what already has a name, so that a file under a taken name is
// refused before its first byte has gone over the line.
func lookUp(ctx context.Context, c *api.Client, name string) (o api.Object, taken bool, err error) {
	o, err = c.Object(ctx, name)
	var e *api.Error
	if errors.As(err, &e) && e.Status == http.StatusNotFound {
		return o, false, nil
	}
	return o, err == nil, err
}

func errTaken(name string) error { return errExists("there is another object %q", name) }

// errExists is a refusal as the coordinator's own.
func errExists(format string, args ...any) error {
	return &api.Error{Status: http.StatusConflict, APIError: wire.APIError{Code: "exists",
		Reason: fmt.Sprintf(format, args...) + "; remove it first (\"deimos object rm\") or choose another name"}}
}

// repeat is for a name that is taken. If the object there is the same file, only
// those of its shards are sent that no device has any more.
func repeat(ctx context.Context, c *api.Client, rec api.Object, r io.Reader, s *Session, o PutOptions) (*Object, []api.Placement, error) {
	old, err := s.open(rec, o)
	if err != nil {
		return nil, nil, err
	}
	if size := sizeOf(r); size >= 0 && size != rec.Size {
		return nil, nil, errTaken(rec.Name)
	}
	p := newPutter(c, &Session{Token: rand.Text(), Code: old.m.Code, Payload: old.m.Payload}, old.keys, o)
	p.same = rec.Chunks
	size, sum, err := p.run(ctx, r)
	if errors.Is(err, errOther) || err == nil && (size != rec.Size || sum != old.Digest()) {
		return nil, nil, errTaken(rec.Name)
	}
	if err != nil {
		return nil, nil, err
	}
	now, taken, err := lookUp(ctx, c, rec.Name)
	if err == nil && (!taken || !bytes.Equal(now.Manifest, rec.Manifest)) {
		err = fmt.Errorf("%q was removed meanwhile; store the file again", rec.Name)
	}
	return old, slices.Concat(p.stripes...), err
}

// open opens an object that may be what this put, or one like it, has made.
func (s *Session) open(rec api.Object, o PutOptions) (*Object, error) {
	if rec.Code == nil {
		return nil, errTaken(rec.Name)
	}
	old, err := open(rec, o.Identities)
	if e, bad := readEnvelope(rec); bad == nil && bytes.Equal(e.Key, s.Wrapped) { // this put has made it, maybe for others only
		m, k, err := e.open(rec, s.Key)
		return &Object{Object: rec, m: m, keys: k}, err
	}
	switch {
	case errors.Is(err, ErrNoKey):
		return nil, errTaken(rec.Name)
	case err != nil:
		return nil, err
	case old.m.Code != s.Code && !o.AnyCode:
		return nil, errExists("%q is stored with the code %s, not %s", rec.Name, old.m.Code, s.Code)
	case old.m.Readers != readersDigest(o.Readers):
		return nil, errExists("%q is stored for other recipients than those that are named now", rec.Name)
	}
	return old, nil
}

// sizeOf is the bytes of a regular file, and -1 for anything else.
func sizeOf(r io.Reader) int64 {
	f, ok := r.(interface{ Stat() (fs.FileInfo, error) })
	if !ok {
		return -1
	}
	s, err := f.Stat()
	if err != nil || !s.Mode().IsRegular() {
		return -1
	}
	return s.Size()
}

// putter is one put under way.
type putter struct {
	client   *api.Client
	session  *Session
	keys     keys
	o        PutOptions
	requests *semaphore.Weighted
	line     line
	stripes  [][]api.Placement
	keeper   *keeper // nil: an object has the chunks already
	// same is what the shards must be, of a file that was stored before.
	same []api.Chunk
}

// errOther is the error of a file that is not the one that was stored before.
var errOther = errors.New("it is another file")

func newPutter(c *api.Client, s *Session, k keys, o PutOptions) *putter {
	return &putter{client: c, session: s, keys: k, o: o, requests: semaphore.NewWeighted(atOnce)}
}

// window is how many stripes of so many bytes are in memory.
func window(stripe, most int) int { return min(max(underWay/stripe, 1), most) }

// run reads, seals and places stripe after stripe.
func (p *putter) run(ctx context.Context, r io.Reader) (size int64, sum string, err error) {
	code, payload := p.session.Code, p.session.Payload
	n := window(code.Shards()*(payload+overhead), 8)
	free := make(chan [][]byte, n) // stripes that can be filled; nil is not made yet
	for range n {
		free <- nil
	}
	h := newWhole()
	r = io.TeeReader(r, h)
	g, gctx := errgroup.WithContext(ctx)
	for s := 0; ; s++ {
		var shards [][]byte
		select {
		case shards = <-free:
		case <-gctx.Done():
			if ctx.Err() != nil {
				_ = g.Wait()
				return 0, "", ctx.Err()
			}
			return 0, "", g.Wait() // a stripe has failed, or none goes on
		}
		if shards == nil {
			shards = make([][]byte, code.Shards())
			for i := range shards {
				shards[i] = make([]byte, payload+overhead)
			}
		}
		got, err := p.fill(r, shards)
		if err == nil && got > 0 && (s+1)*code.Shards() > maxChunks {
			err = errTooLarge(code)
		}
		if err != nil {
			_ = g.Wait() // the file's error is the one to tell
			return 0, "", err
		}
		if got == 0 {
			break
		}
		placed := make([]api.Placement, code.Shards())
		p.stripes = append(p.stripes, placed)
		g.Go(func() error {
			err := p.place(gctx, s, got, shards, placed)
			free <- shards
			return err
		})
		if got < payload*code.Data {
			break
		}
	}
	if err := g.Wait(); err != nil {
		return 0, "", err
	}
	return h.size, h.sum(), ctx.Err()
}

// fill reads the payloads of a stripe to where they will be sealed. The shards
// of the last one become shorter.
func (p *putter) fill(r io.Reader, shards [][]byte) (n int, err error) {
	code, payload := p.session.Code, p.session.Payload
	for i := range code.Data {
		got, err := io.ReadFull(r, shards[i][nonceSize:nonceSize+payload])
		n += got
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return 0, fmt.Errorf("the file cannot be read: %w", err)
		}
	}
	if n < payload*code.Data {
		shorten(shards, code, payload, n)
	}
	return n, nil
}

// shorten lays n bytes out anew, in payloads that are as small as can be.
func shorten(shards [][]byte, code api.Code, payload, n int) {
	rest := make([]byte, 0, n)
	for i := 0; len(rest) < n; i++ {
		rest = append(rest, shards[i][nonceSize:nonceSize+min(payload, n-len(rest))]...)
	}
	each := payloadOf(int64(n), code)
	for i := range shards {
		shards[i] = shards[i][:each+overhead]
		clear(shards[i])
		if i < code.Data {
			rest = rest[copy(shards[i][nonceSize:nonceSize+each], rest):]
		}
	}
}

// place seals a stripe with n bytes of the file and has it placed.
func (p *putter) place(ctx context.Context, s, n int, shards [][]byte, placed []api.Placement) error {
	code, each := p.session.Code, len(shards[0])-overhead
	for i := range code.Data {
		shards[i] = p.keys.sealShard(shards[i], code, int64(s)*int64(code.Data)+int64(i), shards[i][nonceSize:nonceSize+each])
	}
	if err := encode(code, shards); err != nil {
		return err
	}
	ids := make([]string, len(shards))
	for i, sh := range shards {
		ids[i] = chunk.Sum(sh).String()
		placed[i].Chunk = api.Chunk{ID: ids[i], Size: int64(len(sh))}
	}
	// Nothing of another file goes out under this name, nor with this key.
	if at := s * len(shards); p.same != nil && (at+len(shards) > len(p.same) || !slices.EqualFunc(placed, p.same[at:at+len(shards)],
		func(pl api.Placement, ch api.Chunk) bool { return pl.Chunk == ch })) {
		return errOther
	}
	token := fmt.Sprintf("%s-%d", p.session.Token, s)
	q := api.StripeRequest{Token: token, Code: code, Size: int64(len(shards[0])), Chunks: ids}
	there, err := over(ctx, &p.line, p.line.passes, func() (api.Stripe, error) { return p.client.Stripe(ctx, q) })
	if err != nil {
		return err
	}
	p.keeper.add(q)
	g, ctx := errgroup.WithContext(ctx)
	for i := range shards {
		of := 0 // bytes of the file in this shard
		if i < code.Data {
			of = min(max(n-i*each, 0), each)
		}
		if j := slices.IndexFunc(there.Placed, func(pl api.Placement) bool { return pl.Chunk == placed[i].Chunk }); j >= 0 {
			placed[i] = there.Placed[j]
			p.o.progress(int64(of))
			continue
		}
		g.Go(func() error {
			if err := p.requests.Acquire(ctx, 1); err != nil {
				return err
			}
			defer p.requests.Release(1)
			pl, err := over(ctx, &p.line, p.line.passes, func() (api.Placement, error) { return p.client.PutShard(ctx, ids[i], shards[i], token) })
			if err != nil {
				return err
			}
			p.line.begun.Store(true)
			if pl.Chunk != placed[i].Chunk {
				return damaged("the coordinator placed chunk %s for %s", pl.ID, ids[i])
			}
			placed[i] = pl
			p.o.progress(int64(of))
			return nil
		})
	}
	return g.Wait()
}
