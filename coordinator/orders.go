package coordinator

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func (c *Coordinator) orderRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/orders", needs: toRead, summary: "List orders, the newest first", out: api.OrderList{},
			query: []param{{"device", "one of these devices", []string{}}, {"group", "devices in one of these groups", []string{}}, {"label", "devices with this label, key=value", []string{}},
				{"order", "this order, whichever device has it", ""}, {"state", "in this state", ""}, {"kind", "of this kind", ""},
				{"pending", "only what has not ended", false}, {"before", "older than the order with this id: what an answer gave as next", ""}, {"limit", "at most so many; default 100", 0}}, handle: c.listOrders},
		{method: "POST", path: v1 + "/orders", needs: toAdmin, summary: "Send an order of a kind that has no service of its own", in: api.SendRequest{}, out: []api.Order{},
			handle: answer(func(r *http.Request, q api.SendRequest) ([]api.Order, error) { return c.sendOrder(r.Context(), q) })},
		{method: "GET", path: v1 + "/orders/{device}/{id}", needs: toRead, summary: "An order and what became of it", out: api.Order{},
			query: []param{{"wait", "wait up to so many seconds for its end", 0.0}}, handle: c.getOrder},
		{method: "GET", path: v1 + "/orders/{device}/{id}/attachment", needs: toRead, summary: "The bulk result of an order that has succeeded", out: bytes.Buffer{}, handle: c.getAttachment},
		{method: "POST", path: v1 + "/orders/{device}/{id}/cancel", needs: toOperate, summary: "Ask a device to stop an order", in: api.CancelRequest{}, out: api.Order{},
			handle: answer(func(r *http.Request, q api.CancelRequest) (api.Order, error) {
				v, err := c.outbox.cancel(r.Context(), wire.DeviceID(r.PathValue("device")), r.PathValue("id"), q.Reason, operatorOf(r).Name)
				if v.Cancel != nil {
					about(r.Context(), v.Cancel.Order)
				}
				return v.view(), err
			})},
	}
}

func (c *Coordinator) getOrder(w http.ResponseWriter, r *http.Request) error {
	d, id := wire.DeviceID(r.PathValue("device")), r.PathValue("id")
	if s := r.URL.Query().Get("wait"); s != "" {
		seconds, err := strconv.ParseFloat(s, 64)
		if err != nil || !(seconds >= 0) {
			return refuse(http.StatusBadRequest, "bad_wait", "wait must be a number of seconds, not %q", s)
		}
		seconds = min(seconds, maxOrderWait.Seconds())
		ctx, cancel := context.WithTimeout(r.Context(), time.Duration(seconds*float64(time.Second)))
		defer cancel()
		_, err = c.outbox.await(ctx, wire.Order{ID: id, Device: d}, nil)
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errNotFound) {
			return err
		}
	}
	v, err := c.outbox.get(r.Context(), d, id)
	if errors.Is(err, errNotFound) {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "device %s has no order %s; an order is kept for %d days after its end", d, id, retention/(24*time.Hour))
	}
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, v.view())
	return nil
}

// getAttachment gives what a device has sent with its report, if it is what the
// device has signed for.
func (c *Coordinator) getAttachment(w http.ResponseWriter, r *http.Request) error {
	d, id := wire.DeviceID(r.PathValue("device")), r.PathValue("id")
	v, err := c.outbox.get(r.Context(), d, id)
	switch {
	case err != nil:
		return err
	case v.State != wire.Succeeded || v.Result.Attachment == nil:
		return refuse(http.StatusConflict, "no_attachment", "order %s has no bulk result: it is %s", id, v.State)
	}
	data, err := attachmentOf(r.Context(), c.staging, v.Result)
	if err != nil {
		return err
	}
	serveBytes(w, r, v.Result.Attachment.SHA256, data)
	return nil
}

func (c *Coordinator) listOrders(w http.ResponseWriter, r *http.Request) error {
	q, err := parseOrderQuery(r.URL.Query())
	if err != nil {
		return err
	}
	list, err := c.orders(r.Context(), q)
	if err == nil {
		writeJSON(w, http.StatusOK, list)
	}
	return err
}

func parseOrderQuery(v url.Values) (api.OrderQuery, error) {
	q := api.OrderQuery{ID: v.Get("order"), State: wire.State(strings.ToUpper(v.Get("state"))), Kind: wire.Kind(v.Get("kind")), Limit: api.DefaultOrders}
	var err error
	bad := func(format string, args ...any) (api.OrderQuery, error) {
		return q, refuse(http.StatusBadRequest, "bad_query", format, args...)
	}
	if q.Selector, err = api.ParseSelector(v); err != nil {
		return bad("%v", err)
	}
	if q.State != "" && q.State != wire.Queued && q.State != wire.Running && !q.State.Terminal() {
		return bad("%q is no state of an order: QUEUED, RUNNING, SUCCEEDED, FAILED, REJECTED, TIMED_OUT or CANCELED", q.State)
	}
	if s := v.Get("pending"); s != "" {
		if q.Pending, err = strconv.ParseBool(s); err != nil {
			return bad("pending is true or false, not %q", s)
		}
	}
	if q.Before = v.Get("before"); q.Before != "" {
		if _, err := ulid.ParseStrict(q.Before); err != nil {
			return bad("before is the id of an order, not %q", q.Before)
		}
	}
	if s := v.Get("limit"); s != "" {
		if q.Limit, err = strconv.Atoi(s); err != nil || q.Limit < 1 || q.Limit > api.MaxOrders {
			return bad("limit is a number from 1 to %d, not %q", api.MaxOrders, s)
		}
	}
	return q, nil
}

// orders lists what a query means. Of one device all that is kept is looked
// through, else what is open and what ended last.
func (c *Coordinator) orders(ctx context.Context, q api.OrderQuery) (api.OrderList, error) {
	if len(q.Devices) == 1 && len(q.Groups) == 0 && len(q.Labels) == 0 && !q.Pending && q.ID == "" {
		if _, err := c.reg.device(q.Devices[0]); err != nil { // one that is retired has orders too
			return api.OrderList{}, err
		}
		return c.outbox.listOf(ctx, q.Devices[0], q)
	}
	var of map[wire.DeviceID]bool
	if !q.Selector.Empty() {
		devices, err := c.reg.shown(q.Selector)
		if err != nil {
			return api.OrderList{}, err
		}
		of = make(map[wire.DeviceID]bool, len(devices))
		for _, d := range devices {
			of[d.ID] = true
		}
	}
	return c.outbox.list(of, q), nil
}

func fits(q api.OrderQuery, id string, k wire.Kind, s wire.State) bool {
	return (q.ID == "" || q.ID == id) && older(id, q) && (q.Kind == "" || q.Kind == k) && (q.State == "" || q.State == s) && !(q.Pending && s.Terminal())
}

// older tells whether an order belongs to the part that is asked for: ids sort by
// the time at which they were made.
func older(id string, q api.OrderQuery) bool { return q.Before == "" || id < q.Before }

// newest is the limit newest of many keys of orders.
type newest struct {
	limit int
	keys  []string
	more  bool
}

func (n *newest) add(key string) {
	if n.keys = append(n.keys, key); len(n.keys) > 2*n.limit+1000 {
		n.cut()
	}
}

// cut sorts, and leaves no more than the limit. A ULID begins with its time.
func (n *newest) cut() {
	slices.SortFunc(n.keys, func(a, b string) int {
		_, x := parseOrderKey(a)
		_, y := parseOrderKey(b)
		return cmp.Compare(y, x)
	})
	if len(n.keys) > n.limit {
		n.keys, n.more = n.keys[:n.limit], true
	}
}

// list is the newest of what is open and what ended last, of some devices or,
// if of is nil, of all.
func (o *outbox) list(of map[wire.DeviceID]bool, q api.OrderQuery) api.OrderList {
	n := newest{limit: q.Limit}
	old := make(map[string]api.OrderSummary)
	o.mu.Lock()
	for _, l := range o.lines {
		if of != nil && !of[l.device] {
			continue
		}
		for _, p := range l.orders {
			if fits(q, p.id, p.kind, p.state) {
				n.add(orderKeyOf(l.device, p.id))
			}
		}
	}
	lost := o.ended.lost && !q.Pending && (q.State == "" || q.State.Terminal())
	if !q.Pending {
		for _, e := range o.ended.ring {
			d, id := parseOrderKey(e.key)
			if e.key != "" && (of == nil || of[d]) && fits(q, id, e.kind, e.state) {
				n.add(e.key)
			}
		}
	}
	n.cut()
	for _, k := range n.keys {
		_, id := parseOrderKey(k)
		if i, ok := o.ended.at[id]; ok {
			old[k] = o.ended.ring[i].summary()
		}
	}
	o.mu.Unlock()
	out := api.OrderList{Orders: []api.OrderSummary{}}
	for _, k := range n.keys {
		s, ended := old[k]
		if !ended {
			v, ok := o.rows.get(k)
			if !ok {
				continue // ended this moment
			}
			s = v.summary(k)
		}
		out.Orders = append(out.Orders, s)
	}
	switch {
	case n.more:
		_, out.Next = parseOrderKey(n.keys[len(n.keys)-1])
		out.Cut = fmt.Sprintf("these are the newest %d; ask for more with a higher limit, or name a device, a kind or a state", len(out.Orders))
	case lost:
		out.Cut = fmt.Sprintf("only the last %d orders that ended are looked through; name one device to see all of its own", recentOrders)
	}
	return out
}

// maxReads bounds the records that one list reads from the bucket.
const maxReads = 2000

// listOf looks through all that is kept of one device's orders.
func (o *outbox) listOf(ctx context.Context, d wire.DeviceID, q api.OrderQuery) (api.OrderList, error) {
	out := api.OrderList{Orders: []api.OrderSummary{}}
	keys, err := o.rows.keys(ctx, string(d)+".>")
	if err != nil {
		return out, err
	}
	keys = slices.DeleteFunc(keys, func(k string) bool {
		_, id := parseOrderKey(k)
		return !older(id, q)
	})
	n := newest{limit: max(maxReads, q.Limit), keys: keys}
	n.cut()
	for _, k := range n.keys {
		v, err := o.rows.find(ctx, k)
		if errors.Is(err, errNotFound) {
			continue
		}
		if err != nil {
			return out, err
		}
		_, id := parseOrderKey(k)
		if !fits(q, id, v.Kind, v.State) {
			continue
		}
		if len(out.Orders) == q.Limit {
			out.Next = out.Orders[q.Limit-1].ID
			out.Cut = fmt.Sprintf("these are the newest %d; ask for more with a higher limit, or for a kind or a state", q.Limit)
			return out, nil
		}
		out.Orders = append(out.Orders, v.summary(k))
	}
	if n.more {
		_, out.Next = parseOrderKey(n.keys[len(n.keys)-1])
		out.Cut = fmt.Sprintf("only the newest %d of this device's orders were looked through", n.limit)
	}
	return out, nil
}

func (v orderRow) summary(key string) api.OrderSummary {
	d, id := parseOrderKey(key)
	return api.OrderSummary{ID: id, Device: d, Kind: v.Kind, State: v.State, Code: v.Code, Canceled: v.Cancel != nil, Expires: v.Expires, Updated: v.Updated}
}

// recentOrders is how many ended orders a list of all devices looks through:
// some 12 MB.
const recentOrders = 50_000

// recent is the orders that ended last. It is filled at the start from the
// bucket, which gives its records in the order of their last change.
type recent struct {
	ring []endedOrder
	next int
	at   map[string]int // order id → place in ring
	lost bool           // there were more
}

// endedOrder is the summary of an order, in few bytes.
type endedOrder struct {
	key              string
	kind             wire.Kind
	state            wire.State
	code             string
	canceled         bool
	expires, updated int64 // Unix, ms
}

func newRecent(size int) recent {
	return recent{ring: make([]endedOrder, 0, size), at: make(map[string]int)}
}

func (r *recent) add(key string, v orderRow) {
	_, id := parseOrderKey(key)
	e := endedOrder{key, v.Kind, v.State, v.Code, v.Cancel != nil, v.Expires.UnixMilli(), v.Updated.UnixMilli()}
	if i, ok := r.at[id]; ok {
		r.ring[i] = e
		return
	}
	if len(r.ring) < cap(r.ring) {
		r.ring = append(r.ring, e)
	} else {
		if _, old := parseOrderKey(r.ring[r.next].key); old != "" {
			delete(r.at, old)
			r.lost = true
		}
		r.ring[r.next] = e
	}
	r.at[id] = r.next
	r.next = (r.next + 1) % cap(r.ring)
}

func (r *recent) forget(id string) {
	if i, ok := r.at[id]; ok {
		r.ring[i] = endedOrder{}
		delete(r.at, id)
	}
}

func (e endedOrder) summary() api.OrderSummary {
	d, id := parseOrderKey(e.key)
	return api.OrderSummary{ID: id, Device: d, Kind: e.kind, State: e.state, Code: e.code, Canceled: e.canceled,
		Expires: time.UnixMilli(e.expires).UTC(), Updated: time.UnixMilli(e.updated).UTC()}
}

// services are the kinds that only a service of the coordinator may order: it
// keeps account of what they do, or takes their results.
var services = map[wire.Kind]string{
	wire.KindChunkStore:    "deimos object put",
	wire.KindChunkServe:    "deimos object get",
	wire.KindChunkDrop:     "deimos object rm",
	wire.KindChunkLosses:   "deimos audit show",
	wire.KindChunkHoldings: "deimos device drain",
	wire.KindAudit:         "deimos audit storage",
	wire.KindJobRun:        "deimos job run",
	wire.KindUpdateInstall: "deimos release offer",
	wire.KindConfigApply:   "deimos config set",
	wire.KindOrderCancel:   "deimos order cancel",
	wire.KindIdentify:      "deimos device identify",
	wire.KindInventory:     "deimos device inventory --refresh",
	wire.KindHistory:       "deimos device history",
}

const maxKind = 64 // bytes

func checkKind(k wire.Kind) error {
	if s, ok := services[k]; ok {
		return refuse(http.StatusBadRequest, "has_service", "orders of the kind %s are not sent by hand; use \"%s\"", k, s)
	}
	ok := k != "" && len(k) <= maxKind
	for _, c := range k {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || strings.ContainsRune("._-", c))
	}
	if !ok {
		return refuse(http.StatusBadRequest, "bad_kind", "a kind has 1 to %d of the characters a-z, 0-9, '.', '_' and '-'", maxKind)
	}
	return nil
}

// sent is what is kept of a request with a key.
type sent struct {
	ID      string `json:"id"`      // ULID, of which the orders' ids are made
	Request string `json:"request"` // SHA-256 of it, hex
}

// sentKept is how long a key is known.
const sentKept = 24 * time.Hour

// sendAtOnce is how many orders of one request are made together: each waits for
// the state store.
const sendAtOnce = 16

// sendOrder sends one order to each device that is meant.
func (c *Coordinator) sendOrder(ctx context.Context, q api.SendRequest) ([]api.Order, error) {
	if err := checkKind(q.Kind); err != nil {
		return nil, err
	}
	if len(q.Body) == 0 {
		q.Body = json.RawMessage("{}")
	}
	life := kindOf(q.Kind).life
	if q.LifeSeconds != 0 {
		if !(q.LifeSeconds > 0 && q.LifeSeconds <= maxLife.Seconds()) {
			return nil, refuse(http.StatusBadRequest, "bad_life", "an order lives for up to %d days, not %v seconds", maxLife/(24*time.Hour), q.LifeSeconds)
		}
		life = time.Duration(q.LifeSeconds * float64(time.Second))
	}
	devices, err := c.reg.selected(q.Selector)
	if err != nil {
		return nil, err
	}
	base, err := c.sentAs(ctx, q.Key, q)
	if err != nil {
		return nil, err
	}
	return c.sendAll(ctx, base, devices, q.Kind, q.Body, life)
}

// sendAll makes one order for each device. After an error it begins no more.
func (c *Coordinator) sendAll(ctx context.Context, base ulid.ULID, devices []api.DeviceRecord, k wire.Kind, body any, life time.Duration) ([]api.Order, error) {
	ctx, cancel := c.toTheEnd(ctx)
	defer cancel()
	out := make([]api.Order, len(devices))
	var g errgroup.Group
	g.SetLimit(sendAtOnce)
	var broken atomic.Bool
	for i, d := range devices {
		if broken.Load() {
			break
		}
		g.Go(func() error {
			v, err := c.outbox.submitAs(ctx, idFor(base, d.ID), d.ID, k, body, life)
			if err != nil {
				broken.Store(true)
				return err
			}
			out[i] = v.view()
			return nil
		})
	}
	err := g.Wait()
	var to []wire.DeviceID
	var made []string
	for _, o := range out {
		if o.Order.ID != "" {
			to, made = append(to, o.Order.Device), append(made, o.Order.ID)
		}
	}
	about(ctx, to...)
	about(ctx, made...)
	if err != nil && len(made) > 0 {
		return nil, partly(fmt.Sprintf("%d of %d orders were made; \"deimos order list --kind %s --limit %d\" shows them", len(made), len(devices), k, min(len(made), api.MaxOrders)), err)
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

// sentAs gives the same id to each repeat of a request with a key.
func (c *Coordinator) sentAs(ctx context.Context, key string, q any) (ulid.ULID, error) {
	id := ulid.Make()
	if key == "" {
		return id, nil
	}
	raw, err := json.Marshal(q)
	if err != nil {
		return id, err
	}
	sum, name := sha256.Sum256(raw), sha256.Sum256([]byte(key))
	request := hex.EncodeToString(sum[:])
	v, err := c.sent.change(ctx, hex.EncodeToString(name[:]), func(v *sent, exists bool) error {
		switch {
		case !exists:
			*v = sent{ID: id.String(), Request: request}
			return nil
		case v.Request != request:
			return refuse(http.StatusConflict, "key_used", "the key was used for another request; choose a new one")
		}
		return errUnchanged
	})
	if err != nil {
		return id, err
	}
	return ulid.Parse(v.ID)
}

// idFor is an order's id of a request's: the same time, and for each device
// another rest.
func idFor(base ulid.ULID, d wire.DeviceID) string {
	sum := sha256.Sum256(append(base[:], d...))
	id := base
	copy(id[6:], sum[:])
	return id.String()
}

// openOrders opens the buckets of orders.
func (c *Coordinator) openOrders(ctx context.Context) error {
	kv, err := c.openKV(ctx, "orders", func(k *jetstream.KeyValueConfig) { k.TTL = retention })
	if err != nil {
		return err
	}
	if err := c.outbox.openRows(ctx, kv); err != nil {
		return err
	}
	c.closers = append(c.closers, c.outbox.rows.close)
	return bucket(ctx, c, "sent", &c.sent, nil, func(k *jetstream.KeyValueConfig) { k.TTL = sentKept })
}
