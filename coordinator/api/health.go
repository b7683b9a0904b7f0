package api

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"

	"github.com/deimos-edge/deimos/wire"
)

// Rank orders severities, the worst highest; 0 is none of them.
func Rank(s wire.Severity) int {
	return slices.Index([]wire.Severity{wire.Info, wire.Trouble, wire.Critical}, s) + 1
}

// Brief is a warning in a few words: its title, and what it is about.
func Brief(w wire.Warning) string {
	if w.Subject == "" {
		return w.Title
	}
	return w.Title + " (" + w.Subject + ")"
}

// Troubles is all that is wrong with a device, the worst first: what the
// coordinator has found, which is [wire.Trouble], and what the device says itself.
func (d Device) Troubles() []wire.Warning {
	var out []wire.Warning
	for _, w := range d.Warnings {
		out = append(out, wire.Warning{Code: w.Code, Severity: wire.Trouble, Title: w.Title, Text: w.Text, Since: w.Since})
	}
	out = append(out, d.Health...)
	slices.SortStableFunc(out, func(a, b wire.Warning) int { return cmp.Compare(Rank(b.Severity), Rank(a.Severity)) })
	return out
}

// Worst is the severity of the worst of [Device.Troubles]; empty if all is well.
func (d Device) Worst() wire.Severity {
	if all := d.Troubles(); len(all) > 0 {
		return all[0].Severity
	}
	return ""
}

// MaxListedHealth is how many warnings of a device stand in a list.
const MaxListedHealth = 4

// IdentifyRequest has a device show which one it is by its light.
type IdentifyRequest struct {
	Seconds int `json:"seconds"` // 0 ends it; at most [wire.MaxIdentify]
}

// Identify has a device blink, or stop. It returns the order; whether the device
// has a light, its end says.
func (c *Client) Identify(ctx context.Context, device wire.DeviceID, r IdentifyRequest) (Order, error) {
	return ask[Order](ctx, c, http.MethodPost, "devices/"+segment(string(device))+"/identify", nil, r)
}

// AskHistory asks a device for what it has measured. What it has sent when the
// order has ended is got with [Client.Attachment]: a [wire.History].
func (c *Client) AskHistory(ctx context.Context, device wire.DeviceID, r wire.HistoryRequest) (Order, error) {
	return ask[Order](ctx, c, http.MethodPost, "devices/"+segment(string(device))+"/history", nil, r)
}

// RefreshInventory has a device say now what it has, waits for it, and returns
// the device with it.
func (c *Client) RefreshInventory(ctx context.Context, device wire.DeviceID) (Device, error) {
	return ask[Device](ctx, c, http.MethodPost, "devices/"+segment(string(device))+"/inventory", nil, nil)
}

// Attachment gets the bulk result of an order that has succeeded, and checks it
// against what the order's report says of it. One that did not fit the report is
// kept for a day.
func (c *Client) Attachment(ctx context.Context, device wire.DeviceID, order string, signed wire.Attachment) ([]byte, error) {
	raw, err := c.call(ctx, http.MethodGet, orderPath(device, order)+"/attachment", url.Values{}, nil)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != signed.SHA256 {
		return nil, fmt.Errorf("the coordinator gave something else than device %s has signed for", device)
	}
	return raw, nil
}
