package api

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/wire"
)

// Selector says which devices are meant: those that fit everything that is
// given. The empty one means every device. Retired devices are never meant.
type Selector struct {
	Devices []wire.DeviceID   `json:"devices,omitempty"` // one of these
	Groups  []string          `json:"groups,omitempty"`  // in one of these
	Labels  map[string]string `json:"labels,omitempty"`  // with all of these
}

// Empty tells whether s means every device.
func (s Selector) Empty() bool {
	return len(s.Devices) == 0 && len(s.Groups) == 0 && len(s.Labels) == 0
}

// Matches tells whether a device is meant.
func (s Selector) Matches(d DeviceRecord) bool {
	if d.Retired ||
		len(s.Devices) > 0 && !slices.Contains(s.Devices, d.ID) ||
		len(s.Groups) > 0 && !slices.Contains(s.Groups, d.Group) {
		return false
	}
	for k, v := range s.Labels {
		if got, ok := d.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Query is the selector as the query of a GET: device=…&group=…&label=k=v, each
// as often as needed.
func (s Selector) Query() url.Values {
	q := url.Values{}
	for _, d := range s.Devices {
		q.Add("device", string(d))
	}
	for _, g := range s.Groups {
		q.Add("group", g)
	}
	for k, v := range s.Labels {
		q.Add("label", k+"="+v)
	}
	return q
}

// ParseSelector reads such a query. What it says of a device id is a sentence
// for a person.
func ParseSelector(q url.Values) (Selector, error) {
	var s Selector
	for _, v := range q["device"] {
		d, err := wire.ParseDeviceID(v)
		if err != nil {
			return s, err
		}
		s.Devices = append(s.Devices, d)
	}
	s.Groups = q["group"]
	for _, v := range q["label"] {
		k, val, err := ParseLabel(v)
		if err != nil {
			return s, err
		}
		if s.Labels == nil {
			s.Labels = make(map[string]string)
		}
		s.Labels[k] = val
	}
	return s, nil
}

// MaxLabelBytes bounds a group's name and a label's key and value.
const MaxLabelBytes = 64

var errLabel = errors.New("a label is KEY=VALUE, each of at most 64 printable bytes, the key of letters, digits, '.', '_', '-' and '/'")

// ParseLabel reads KEY=VALUE.
func ParseLabel(s string) (key, value string, err error) {
	key, value, ok := strings.Cut(s, "=")
	if !ok || CheckLabel(key, value) != nil {
		return "", "", fmt.Errorf("%q: %w", s, errLabel)
	}
	return key, value, nil
}

// CheckLabel tells whether a label can be kept.
func CheckLabel(key, value string) error {
	if key == "" || len(key) > MaxLabelBytes || len(value) > MaxLabelBytes {
		return errLabel
	}
	for _, c := range key {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._-/", c)) {
			return errLabel
		}
	}
	for _, c := range value {
		if c < ' ' || c == 0x7f || c > 0x7f && c < 0xa0 || c == '\ufffd' {
			return errLabel
		}
	}
	return nil
}
