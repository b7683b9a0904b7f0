package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// Chunk is one piece of an object.
type Chunk struct {
	ID   string `json:"id"`
	Size int64  `json:"size"`
}

// Holder is a device that has given a receipt for a chunk.
type Holder struct {
	Device  wire.DeviceID `json:"device"`
	Volume  string        `json:"volume"`
	Order   string        `json:"order"` // whose signed report is the receipt
	Receipt []byte        `json:"receipt,omitempty"`
	Lost    bool          `json:"lost,omitempty"` // it has confessed or been shown to have lost it
	Since   time.Time     `json:"since"`
}

// Placement is where a chunk is.
type Placement struct {
	Chunk
	Holders []Holder `json:"holders"`
}

const (
	// MaxChunks is how many chunks an object can have; its record must fit the
	// coordinator's state store.
	MaxChunks = 10_000
	// MaxShards is how many shards a stripe can have, parity included.
	MaxShards = 32
	// MaxManifest bounds [Object].Manifest, in bytes.
	MaxManifest = 64 << 10
	// MaxStripeToken bounds the name of a stripe that is being placed, in bytes.
	MaxStripeToken = 64
)

// Code is a Reed–Solomon code: a stripe has Data shards of content and Parity
// shards more, each on another device, and any Data of them give the others.
type Code struct {
	Data   int `json:"data"`
	Parity int `json:"parity"`
}

// Shards is how many a stripe has.
func (c Code) Shards() int { return c.Data + c.Parity }

func (c Code) String() string { return strconv.Itoa(c.Data) + "+" + strconv.Itoa(c.Parity) }

// Object is a stored file.
//
// With a code, Chunks are the shards stripe by stripe, first those of data, then
// those of parity. All shards of a stripe have one size, so that the coordinator
// can make a lost one from others, without any key. Only who has a key can tell
// what they hold: Manifest says it, sealed (package coordinator/object).
//
// Without, Chunks are the file's own bytes in their order, each on several
// devices, which can read them and run jobs over them.
type Object struct {
	Name     string    `json:"name"`
	Size     int64     `json:"size"`             // bytes of the file
	SHA256   string    `json:"sha256,omitempty"` // of the whole file, hex; without a code only
	Code     *Code     `json:"code,omitempty"`
	Manifest []byte    `json:"manifest,omitempty"` // with a code only
	Chunks   []Chunk   `json:"chunks"`
	Created  time.Time `json:"created,omitzero"`
}

// ObjectEntry is an object in a list, and how far it is from being lost.
type ObjectEntry struct {
	Name    string    `json:"name"`
	Size    int64     `json:"size"`
	SHA256  string    `json:"sha256,omitempty"`
	Code    *Code     `json:"code,omitempty"`
	Chunks  int       `json:"chunks"`
	Created time.Time `json:"created"`
	// Needed is how many shards of each stripe it takes to read it: Code.Data, or 1
	// copy of each chunk. Alive is how many there are of the worst stripe or chunk,
	// and Online how many of those are on devices that are there now.
	Needed int `json:"needed"`
	Alive  int `json:"alive"`
	Online int `json:"online"`
}

// StripeRequest asks which shards of a stripe are placed already. The devices
// that hold them get no other shard that is put with the same token. What is
// asked for is kept for a day more, though no object has it yet.
type StripeRequest struct {
	Token  string   `json:"token"`  // made up by who puts the object; at most [MaxStripeToken] bytes
	Code   Code     `json:"code"`   // of the object
	Size   int64    `json:"size"`   // of each shard, in bytes
	Chunks []string `json:"chunks"` // ids of the shards
	// Replicas is how many copies there should be of each that is placed; 0 means 1.
	Replicas int `json:"replicas,omitempty"`
}

// Stripe is what is placed of a stripe.
type Stripe struct {
	Placed []Placement `json:"placed"`
}

// PutChunk stores a chunk on replicas devices and returns when each has given
// its receipt.
func (c *Client) PutChunk(ctx context.Context, id string, data []byte, replicas int) (Placement, error) {
	return ask[Placement](ctx, c, http.MethodPut, "chunks/"+id, url.Values{"replicas": {strconv.Itoa(replicas)}}, data)
}

// PutShard stores a chunk on a device that has no other shard of the stripe.
func (c *Client) PutShard(ctx context.Context, id string, data []byte, stripe string) (Placement, error) {
	return ask[Placement](ctx, c, http.MethodPut, "chunks/"+id, url.Values{"replicas": {"1"}, "stripe": {stripe}}, data)
}

// Stripe asks what is placed of a stripe. Where there are too few devices for
// it, it is refused before a byte is sent.
func (c *Client) Stripe(ctx context.Context, r StripeRequest) (Stripe, error) {
	return ask[Stripe](ctx, c, http.MethodPost, "stripes", nil, r)
}

// GetChunk fetches a chunk from a device that holds it. The caller verifies it.
func (c *Client) GetChunk(ctx context.Context, id string) ([]byte, error) {
	return c.callFor(ctx, http.MethodGet, "chunks/"+id, nil, nil, chunk.MaxSize)
}

// GetChunkFrom fetches a chunk from one of its holders.
func (c *Client) GetChunkFrom(ctx context.Context, id string, d wire.DeviceID) ([]byte, error) {
	return c.callFor(ctx, http.MethodGet, "chunks/"+id, url.Values{"device": {string(d)}}, nil, chunk.MaxSize)
}

// Objects lists the stored files.
func (c *Client) Objects(ctx context.Context) ([]ObjectEntry, error) {
	return ask[[]ObjectEntry](ctx, c, http.MethodGet, "objects", nil, nil)
}

// Object shows one stored file.
func (c *Client) Object(ctx context.Context, name string) (Object, error) {
	return ask[Object](ctx, c, http.MethodGet, "objects/"+segment(name), nil, nil)
}

// ObjectPlacements shows where each chunk of a file is, in their order.
func (c *Client) ObjectPlacements(ctx context.Context, name string) ([]Placement, error) {
	return ask[[]Placement](ctx, c, http.MethodGet, "objects/"+segment(name)+"/placements", nil, nil)
}

// PutObject names chunks that were put before.
func (c *Client) PutObject(ctx context.Context, o Object) (Object, error) {
	return ask[Object](ctx, c, http.MethodPut, "objects/"+segment(o.Name), nil, o)
}

// RemoveObject forgets a file; devices drop the chunks that no other file has.
func (c *Client) RemoveObject(ctx context.Context, name string) error {
	_, err := c.call(ctx, http.MethodDelete, "objects/"+segment(name), nil, nil)
	return err
}
