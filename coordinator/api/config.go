package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// ConfigScope says whom a configuration document is for: one device, the
// devices of a group, or, with neither, all of the fleet. At most one is set. A
// change for all of the fleet says so too (see [ConfigChange.CheckChange]).
type ConfigScope struct {
	Device wire.DeviceID `json:"device,omitempty"`
	Group  string        `json:"group,omitempty"`
}

// Query is the scope as the query of a GET.
func (s ConfigScope) Query() url.Values {
	q := url.Values{}
	if s.Device != "" {
		q.Set("device", string(s.Device))
	}
	if s.Group != "" {
		q.Set("group", s.Group)
	}
	return q
}

// ConfigDocument is what is wanted in one scope.
type ConfigDocument struct {
	ConfigScope
	Values  map[string]json.RawMessage `json:"values"` // by the keys of [wire.Setting]
	Updated time.Time                  `json:"updated,omitzero"`
	Devices int                        `json:"devices"` // in the scope now
}

// ConfigChange changes keys of one document and leaves the others as they are,
// so that two changes at the same time both hold.
type ConfigChange struct {
	ConfigScope
	All   bool                       `json:"all,omitempty"` // the fleet's document, and neither device nor group is given
	Set   map[string]json.RawMessage `json:"set,omitempty"`
	Unset []string                   `json:"unset,omitempty"`
	Force bool                       `json:"force,omitempty"` // also keys that the coordinator does not know
}

// CheckChange refuses a change that does not say plainly whom it is for, as
// [Selector.CheckChange] does.
func (q ConfigChange) CheckChange() error {
	switch none := q.ConfigScope == (ConfigScope{}); {
	case none && !q.All:
		return errNoScope
	case !none && q.All:
		return errAllAndSome
	}
	return nil
}

var errNoScope = errors.New("say whose configuration is meant, a device's or a group's, or \"all\"")

// ConfigState is how far a device is with its configuration.
type ConfigState string

// The states of a device's configuration.
const (
	ConfigNone    ConfigState = "none"    // nothing was ever wanted of it
	ConfigWaiting ConfigState = "waiting" // the device has not answered yet
	ConfigApplied ConfigState = "applied" // it runs all of it
	ConfigPartly  ConfigState = "partly"  // it refuses some values
	ConfigFailed  ConfigState = "failed"  // the order ended otherwise; it is given again at the next hello
)

// DeviceConfig is what is wanted of a device and what it says to that.
type DeviceConfig struct {
	Device wire.DeviceID          `json:"device"`
	Group  string                 `json:"group,omitempty"`
	State  ConfigState            `json:"state"`
	Reason string                 `json:"reason,omitempty"` // of ConfigFailed
	Wanted uint64                 `json:"wanted"`           // version; 0: nothing was ever wanted
	Order  string                 `json:"order,omitempty"`  // that carries it
	Values map[string]ConfigValue `json:"values"`
	// Reported is the device's newest answer; nil if there is none.
	Reported *ConfigReported `json:"reported,omitempty"`
}

// ConfigValue is one value that is wanted of a device.
type ConfigValue struct {
	Value json.RawMessage `json:"value"`
	From  string          `json:"from"` // fleet, group or device
}

// ConfigReported is what a device says that it runs.
type ConfigReported struct {
	wire.ConfigReport
	At time.Time `json:"at"` // when the coordinator heard of it
}

// Settings lists what can be configured.
func (c *Client) Settings(ctx context.Context) ([]wire.Setting, error) {
	return ask[[]wire.Setting](ctx, c, http.MethodGet, "config/settings", nil, nil)
}

// Config shows one document.
func (c *Client) Config(ctx context.Context, s ConfigScope) (ConfigDocument, error) {
	return ask[ConfigDocument](ctx, c, http.MethodGet, "config", s.Query(), nil)
}

// ChangeConfig changes one document. The devices follow.
func (c *Client) ChangeConfig(ctx context.Context, q ConfigChange) (ConfigDocument, error) {
	return ask[ConfigDocument](ctx, c, http.MethodPatch, "config", nil, q)
}

// MaxConfigPage is how many devices one answer tells the configuration of at most.
const MaxConfigPage = 1000

// DeviceConfigs shows how far each of the devices is.
func (c *Client) DeviceConfigs(ctx context.Context, s Selector) ([]DeviceConfig, error) {
	return pages(ctx, c, "config/devices", s.Query(), MaxConfigPage, func(d DeviceConfig) wire.DeviceID { return d.Device })
}
