package api

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Repair is what is endangered, and what is done about it, as the coordinator
// that answers sees it.
type Repair struct {
	RepairSummary
	// Most endangered first, at most [MaxEndangered].
	Queue []Endangered `json:"queue"`
	// Drains are the devices that are being emptied, or have been.
	Drains []Drain `json:"drains"`
	AtOnce int     `json:"at_once"`          // stripes; 0: nothing is repaired
	Rate   int64   `json:"bytes_per_second"` // read and written together
	Grace  float64 `json:"grace_seconds"`    // how long a device may be away
}

// RepairSummary counts. A stripe is one of a coded object, or one chunk of a plain
// one.
type RepairSummary struct {
	Endangered int `json:"endangered"` // stripes with less good shards, or copies, than wanted
	Working    int `json:"working"`    // of them, are being repaired by this coordinator
	Waiting    int `json:"waiting"`    // of them, something holds up
	Lost       int `json:"lost"`       // of them, too little is left on any device
	// Of this coordinator, since it started.
	Since   time.Time `json:"since"`
	Done    int       `json:"done"`    // shards and copies that were placed anew
	Rebuilt int       `json:"rebuilt"` // of them, made from other shards
	Bytes   int64     `json:"bytes"`   // read from devices and sent to them
	Dropped int       `json:"dropped"` // copies that were more than wanted
}

// MaxEndangered bounds [Repair].Queue.
const MaxEndangered = 100

// Endangered is a stripe that is not whole.
type Endangered struct {
	Object string `json:"object,omitempty"` // name; empty: a chunk that no object has yet
	Stripe int    `json:"stripe"`           // from 0; of a plain object, the chunk
	// Spare is how many good shards, or copies, can be lost until it cannot be read
	// any more; below 0, it cannot now.
	Spare   int       `json:"spare"`
	Missing int       `json:"missing"` // shards or copies
	Since   time.Time `json:"since"`   // that this coordinator knows
	Working bool      `json:"working,omitempty"`
	Lost    bool      `json:"lost,omitempty"`    // too little is left on any device
	Problem string    `json:"problem,omitempty"` // what holds it up, a sentence
	Next    time.Time `json:"next,omitzero"`     // when it is tried again, at the latest
}

// DrainState is how far a drain is.
type DrainState string

// The states of a drain.
const (
	DrainMoving   DrainState = "moving"   // its chunks are being copied or rebuilt elsewhere
	DrainDropping DrainState = "dropping" // everything is elsewhere; the device drops its own
	DrainDone     DrainState = "done"     // the device has signed that it holds nothing
)

// Drain is a device that is being emptied, or has been. It gets no new chunks until
// the drain is canceled.
type Drain struct {
	Device  wire.DeviceID `json:"device"`
	State   DrainState    `json:"state"`
	Began   time.Time     `json:"began"`
	By      string        `json:"by"`     // operator
	Chunks  int           `json:"chunks"` // that it held at the beginning
	Bytes   int64         `json:"bytes"`
	Left    int           `json:"left"`  // that it should still hold
	Alone   int           `json:"alone"` // of them, are not whole elsewhere yet
	Moved   int           `json:"moved"` // that it has been told to drop
	Problem string        `json:"problem,omitempty"`
	Ended   time.Time     `json:"ended,omitzero"`
	Receipt string        `json:"receipt,omitempty"` // id of the order that the device has signed its emptiness on
}

// DrainReceipt is the kind of the [Evidence] that ends a drain, and DrainEmpty what
// it claims.
const (
	DrainReceipt AuditKind    = "drain"
	DrainEmpty   AuditOutcome = "empty"
)

// Repair shows what is endangered and what is done about it.
func (c *Client) Repair(ctx context.Context) (Repair, error) {
	return ask[Repair](ctx, c, http.MethodGet, "repair", nil, nil)
}

// DrainDevice begins to empty a device; one that is being emptied goes on.
func (c *Client) DrainDevice(ctx context.Context, id string) (Drain, error) {
	return ask[Drain](ctx, c, http.MethodPost, "devices/"+segment(id)+"/drain", nil, nil)
}

// Drain shows how far a drain is.
func (c *Client) Drain(ctx context.Context, id string) (Drain, error) {
	return ask[Drain](ctx, c, http.MethodGet, "devices/"+segment(id)+"/drain", nil, nil)
}

// CancelDrain has a device used as before. What is elsewhere already is kept where
// it is wanted most.
func (c *Client) CancelDrain(ctx context.Context, id string) error {
	_, err := c.call(ctx, http.MethodDelete, "devices/"+segment(id)+"/drain", nil, nil)
	return err
}

// DrainReceipt fetches the receipt of a drain, an [Evidence] as JSON.
func (c *Client) DrainReceipt(ctx context.Context, id string) (json.RawMessage, error) {
	return c.call(ctx, http.MethodGet, "devices/"+segment(id)+"/drain/receipt", nil, nil)
}
