package api

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// Order is an order and what became of it.
type Order struct {
	Order    wire.Order  `json:"order"`
	State    wire.State  `json:"state"`
	Progress float64     `json:"progress,omitempty"`
	Result   wire.Report `json:"result,omitzero"`
	Report   []byte      `json:"report,omitempty"` // the device's signed report of that state
	Late     []byte      `json:"late,omitempty"`   // the device's signed end, where the coordinator had ended the order before
	Cancel   *Cancel     `json:"cancel,omitempty"`
	Updated  time.Time   `json:"updated"`
}

// Cancel is the wish that an order be stopped. The order itself ends by its
// device's report, CANCELED or whatever it was by then.
type Cancel struct {
	Order  string    `json:"order"` // the order.cancel that was sent
	At     time.Time `json:"at"`
	By     string    `json:"by,omitempty"`
	Reason string    `json:"reason,omitempty"`
}

// OrderSummary is an order in a list.
type OrderSummary struct {
	ID       string        `json:"id"`
	Device   wire.DeviceID `json:"device"`
	Kind     wire.Kind     `json:"kind"`
	State    wire.State    `json:"state"`
	Code     string        `json:"code,omitempty"`
	Canceled bool          `json:"cancel_asked,omitempty"`
	Expires  time.Time     `json:"expires"`
	Updated  time.Time     `json:"updated"`
}

// OrderList is a part of all orders, the newest first.
type OrderList struct {
	Orders []OrderSummary `json:"orders"`
	Cut    string         `json:"cut,omitempty"`  // a sentence: why there may be more than these; empty if these are all
	Next   string         `json:"next,omitempty"` // [OrderQuery.Before] of the next part; empty if there is none
}

// OrderQuery says which orders are meant: those that fit everything given.
type OrderQuery struct {
	Selector
	ID      string // one order, whichever device has it
	State   wire.State
	Kind    wire.Kind
	Pending bool   // only those that have not ended
	Before  string // only those that are older than the order with this id
	Limit   int    // 0 for [DefaultOrders]
}

// How many orders a list has if nobody says, and at most.
const (
	DefaultOrders = 100
	MaxOrders     = 10_000
)

// CancelRequest asks to stop an order.
type CancelRequest struct {
	Reason string `json:"reason,omitempty"` // a sentence for the record
}

// SendRequest sends an order of a kind that has no service of its own: a ping,
// or a kind of an extension.
type SendRequest struct {
	Kind        wire.Kind       `json:"kind"`
	Body        json.RawMessage `json:"body,omitempty"`         // {} if left out
	LifeSeconds float64         `json:"life_seconds,omitempty"` // 0: as is usual for the kind
	// Key makes a repeat of the request send nothing twice: for a day, the same
	// key gives the same orders. Empty: each request is a new one.
	Key string `json:"key,omitempty"`
	Selector
}

// longPoll is how long one request waits for an order's end.
const longPoll = 20 * time.Second

func orderPath(device wire.DeviceID, id string) string {
	return "orders/" + segment(string(device)) + "/" + segment(id)
}

// Order shows an order, after waiting up to wait for its end.
func (c *Client) Order(ctx context.Context, device wire.DeviceID, id string, wait time.Duration) (Order, error) {
	return ask[Order](ctx, c, http.MethodGet, orderPath(device, id), url.Values{"wait": {strconv.FormatFloat(wait.Seconds(), 'f', 1, 64)}}, nil)
}

// AwaitOrder waits until an order has ended. onChange, if not nil, sees each
// answer on the way.
func (c *Client) AwaitOrder(ctx context.Context, device wire.DeviceID, id string, onChange func(Order)) (Order, error) {
	wait := longPoll
	if onChange != nil {
		wait = time.Second // somebody watches
	}
	for {
		o, err := c.Order(ctx, device, id, wait)
		if err != nil || o.State.Terminal() {
			return o, err
		}
		if onChange != nil {
			onChange(o)
		}
	}
}

// Orders lists orders, the newest first.
func (c *Client) Orders(ctx context.Context, q OrderQuery) (OrderList, error) {
	v := q.Query()
	for k, s := range map[string]string{"order": q.ID, "before": q.Before, "state": string(q.State), "kind": string(q.Kind)} {
		if s != "" {
			v.Set(k, s)
		}
	}
	if q.Pending {
		v.Set("pending", "true")
	}
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return ask[OrderList](ctx, c, http.MethodGet, "orders", v, nil)
}

// CancelOrder asks a device to stop an order.
func (c *Client) CancelOrder(ctx context.Context, device wire.DeviceID, id string, r CancelRequest) (Order, error) {
	return ask[Order](ctx, c, http.MethodPost, orderPath(device, id)+"/cancel", nil, r)
}

// SendOrder sends an order to devices.
func (c *Client) SendOrder(ctx context.Context, r SendRequest) ([]Order, error) {
	return ask[[]Order](ctx, c, http.MethodPost, "orders", nil, r)
}
