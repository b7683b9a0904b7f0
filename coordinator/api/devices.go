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

// DeviceRecord is what the coordinator keeps of a device.
type DeviceRecord struct {
	ID        wire.DeviceID     `json:"id"`
	PublicKey []byte            `json:"public_key"` // raw Ed25519
	Group     string            `json:"group,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Token     string            `json:"token,omitempty"` // id of the fleet token it came in by; empty: it was claimed
	Enrolled  time.Time         `json:"enrolled"`
	Retired   bool              `json:"retired,omitempty"` // for ever
	RetiredAt time.Time         `json:"retired_at,omitzero"`
	// Settled says of a retired device that its orders have been ended and its
	// chunks counted as lost.
	Settled   bool      `json:"settled,omitempty"`
	CertUntil time.Time `json:"certificate_until,omitzero"` // zero: claimed, and has not come for its certificate yet
	Network   string    `json:"network,omitempty"`          // from where it called, 192.0.2.0/24 or 2001:db8::/48; at most an hour behind
	Agent     string    `json:"agent"`                      // version
	OS        string    `json:"os"`
	Arch      string    `json:"arch"`
	Board     string    `json:"board"`
	Slot      string    `json:"slot,omitempty"`
	Capacity  int64     `json:"capacity"`       // bytes that may hold chunks
	Used      int64     `json:"used"`           // bytes of chunks held
	Hello     time.Time `json:"hello,omitzero"` // when the newest hello was said, by the device's own trusted clock, to the minute
	Warnings  []Warning `json:"warnings,omitempty"`
}

// Warning is something about a device that its fleet manager should look at.
type Warning struct {
	Code  string    `json:"code"`  // stable, for machines
	Title string    `json:"title"` // a few words
	Since time.Time `json:"since"`
	Last  time.Time `json:"last"` // last observation, to the minute
	Text  string    `json:"text"` // what it means and what to do
}

// WarningDuplicateKey is the code of a device whose key is used by two machines.
const WarningDuplicateKey = "duplicate_key"

// DeviceState is how a device stands to the fleet now.
type DeviceState string

// The states of a device.
const (
	DeviceOnline  DeviceState = "online"
	DeviceOffline DeviceState = "offline"
	DeviceRetired DeviceState = "retired"
	DevicePending DeviceState = "pending" // no member yet, see [Pending]
)

// Device is a device's record and how it is now. Lists leave out Telemetry and
// Inventory, which are tens of kilobytes of each device, and have the worst
// [MaxListedHealth] of Health, without their texts.
type Device struct {
	DeviceRecord
	State     DeviceState     `json:"state"`
	Online    bool            `json:"online"`
	LastSeen  time.Time       `json:"last_seen,omitzero"`
	Telemetry json.RawMessage `json:"telemetry,omitempty"`
	Dropped   []wire.Dropped  `json:"dropped,omitempty"` // what its outbox gave up, by its last hello
	// Health is what the device says is wrong with it, the worst first, by the
	// heartbeat that came at HealthAt; zero: none was heard since this coordinator
	// started. Warnings are the coordinator's own; see [Device.Troubles].
	Health     []wire.Warning `json:"health,omitempty"`
	HealthMore int            `json:"health_more,omitempty"` // how many a list leaves out
	HealthAt   time.Time      `json:"health_at,omitzero"`
	// Scrubs is how far each volume is with verifying all that it holds, by the
	// same heartbeat. It is not in a list.
	Scrubs []wire.Scrub `json:"scrubs,omitempty"`
	// Jobs is how it stands with jobs, by its last heartbeat; nil if it does not say.
	Jobs *wire.JobsState `json:"jobs,omitempty"`
	// Update is the update that is under way, by the heartbeat that came at HealthAt; nil
	// if there is none.
	Update *wire.UpdateState `json:"update,omitempty"`
	// Rest says that it refuses to move chunks for a while, by what it said last.
	Rest *Rest `json:"rest,omitempty"`
	// Score is what its challenges say of it; lists leave it out.
	Score *Score `json:"score,omitempty"`
	// Drain says that it is being emptied, or was; lists leave it out.
	Drain *Drain `json:"drain,omitempty"`
	// Inventory is what the device has found in itself. With a digest, it has
	// signed for it, and it was taken in at InventoryTaken; without, it came with
	// the enrolment.
	Inventory       json.RawMessage `json:"inventory,omitempty"`
	InventoryDigest string          `json:"inventory_digest,omitempty"`
	InventoryTaken  time.Time       `json:"inventory_taken,omitzero"`
	// InventoryProblem is why a newer one was not taken in; empty if the newest was.
	InventoryProblem string `json:"inventory_problem,omitempty"`
}

// Rest is why a device moves no chunks, and until when.
type Rest struct {
	Code  string    `json:"code"` // wire.CodeMetered, wire.CodeQuietHours or wire.CodeBusy
	Until time.Time `json:"until"`
}

// DeviceChange changes the devices of a selector. The empty selector means all.
type DeviceChange struct {
	Selector
	SetGroup     *string           `json:"set_group,omitempty"` // "" takes them out of their group
	SetLabels    map[string]string `json:"set_labels,omitempty"`
	RemoveLabels []string          `json:"remove_labels,omitempty"`
}

// Pending is a device that waits to be claimed.
type Pending struct {
	Code    string        `json:"code"` // as the device shows it to its owner
	Device  wire.DeviceID `json:"device"`
	Agent   string        `json:"agent"`
	OS      string        `json:"os"`
	Arch    string        `json:"arch"`
	Board   string        `json:"board"`
	Address string        `json:"address"` // it came from, without the port
	First   time.Time     `json:"first"`
	Last    time.Time     `json:"last"` // to ten minutes
	Expires time.Time     `json:"expires"`
}

// Claim takes in the device that shows a code.
type Claim struct {
	Code   string            `json:"code"`
	Group  string            `json:"group,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
}

// TokenRequest asks for a fleet token.
type TokenRequest struct {
	Name         string            `json:"name,omitempty"`   // a note for people
	Group        string            `json:"group,omitempty"`  // that the devices join
	Labels       map[string]string `json:"labels,omitempty"` // that the devices get
	Uses         int               `json:"uses"`             // 0 means 1
	ValidSeconds int64             `json:"valid_seconds"`    // 0 means a day
}

// Token is a fleet token. Its secret is shown once, to who makes it; the
// coordinator keeps a hash.
type Token struct {
	ID        string            `json:"id"` // the first 10 hex digits of the hash
	Token     string            `json:"token,omitempty"`
	Name      string            `json:"name,omitempty"`
	Group     string            `json:"group,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Uses      int               `json:"uses"` // devices that may come in by it, in all
	Left      int               `json:"left"` // of them, that still may
	Created   time.Time         `json:"created"`
	CreatedBy string            `json:"created_by,omitempty"` // operator
	Expires   time.Time         `json:"expires"`
	Revoked   time.Time         `json:"revoked,omitzero"`
}

// CreateToken makes a fleet token.
func (c *Client) CreateToken(ctx context.Context, r TokenRequest) (Token, error) {
	return ask[Token](ctx, c, http.MethodPost, "tokens", nil, r)
}

// Tokens lists the fleet tokens, oldest first, without their secrets.
func (c *Client) Tokens(ctx context.Context) ([]Token, error) {
	return ask[[]Token](ctx, c, http.MethodGet, "tokens", nil, nil)
}

// RevokeToken ends a token for ever. Who came in by it stays.
func (c *Client) RevokeToken(ctx context.Context, id string) (Token, error) {
	return ask[Token](ctx, c, http.MethodPost, "tokens/"+segment(id)+"/revoke", nil, nil)
}

// Devices lists the fleet.
func (c *Client) Devices(ctx context.Context) ([]Device, error) {
	return c.DevicesWhere(ctx, DeviceQuery{})
}

// DeviceQuery says which devices are meant: those that fit everything given.
type DeviceQuery struct {
	Selector
	State   DeviceState
	Trouble bool // only those that something worse than [wire.Info] is wrong with
}

// DevicesWhere lists the devices that are meant.
func (c *Client) DevicesWhere(ctx context.Context, d DeviceQuery) ([]Device, error) {
	q := d.Query()
	if d.State != "" {
		q.Set("state", string(d.State))
	}
	if d.Trouble {
		q.Set("trouble", "true")
	}
	return pages(ctx, c, "devices", q, MaxDevicePage, func(d Device) wire.DeviceID { return d.ID })
}

// MaxDevicePage is how many devices one answer lists at most. Labels and what is
// wrong make a device of up to 10 kB.
const MaxDevicePage = 5_000

// pages reads a list by device, page after page. A page that is not full is the
// last.
func pages[T any](ctx context.Context, c *Client, path string, q url.Values, size int, id func(T) wire.DeviceID) ([]T, error) {
	all := []T{}
	q.Set("limit", strconv.Itoa(size))
	for {
		page, err := ask[[]T](ctx, c, http.MethodGet, path, q, nil)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if len(page) < size {
			return all, nil
		}
		q.Set("after", string(id(page[len(page)-1])))
	}
}

// Device shows one device.
func (c *Client) Device(ctx context.Context, id string) (Device, error) {
	return ask[Device](ctx, c, http.MethodGet, "devices/"+segment(id), nil, nil)
}

// ChangeDevices sets groups and labels, and returns the devices that are meant,
// as they are then. A call that failed half way can be repeated.
func (c *Client) ChangeDevices(ctx context.Context, d DeviceChange) ([]wire.DeviceID, error) {
	return ask[[]wire.DeviceID](ctx, c, http.MethodPatch, "devices", nil, d)
}

// RetireDevice sends a device away for ever. When it returns, the device is cut
// off; a call that failed can be repeated. One that has the last copies of something
// is refused, unless by force.
func (c *Client) RetireDevice(ctx context.Context, id string, force bool) (Device, error) {
	return ask[Device](ctx, c, http.MethodPost, "devices/"+segment(id)+"/retire", url.Values{"force": {strconv.FormatBool(force)}}, nil)
}

// Pending lists the devices that wait to be claimed, the longest waiting first.
func (c *Client) Pending(ctx context.Context) ([]Pending, error) {
	return ask[[]Pending](ctx, c, http.MethodGet, "claims", nil, nil)
}

// Claim makes the device that shows a code a member. It comes for its
// certificate by itself.
func (c *Client) Claim(ctx context.Context, r Claim) (Device, error) {
	return ask[Device](ctx, c, http.MethodPost, "claims", nil, r)
}

// RejectClaim turns the device that shows a code away for a day.
func (c *Client) RejectClaim(ctx context.Context, code string) error {
	_, err := c.call(ctx, http.MethodDelete, "claims/"+segment(code), url.Values{}, nil)
	return err
}
