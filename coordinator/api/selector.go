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
// given. The empty one means every device, where something is only read; what
// changes devices wants All said too (see [Selector.CheckChange]). Retired
// devices are never meant.
type Selector struct {
	Devices []wire.DeviceID   `json:"devices,omitempty"` // one of these
	Groups  []string          `json:"groups,omitempty"`  // in one of these
	Labels  map[string]string `json:"labels,omitempty"`  // with all of these
	All     bool              `json:"all,omitempty"`     // of a change: every device, and nothing else is given
}

// CheckChange refuses a selector that does not say plainly whom a change is
// for: what was left out or misspelt must not become the whole fleet.
func (s Selector) CheckChange() error {
	switch {
	case s.Empty() && !s.All:
		return errNobody
	case !s.Empty() && s.All:
		return errAllAndSome
	case slices.Contains(s.Groups, ""):
		return errEmptyGroup
	}
	return nil
}

var (
	errNobody     = errors.New("say which devices are meant, by id, group or label, or \"all\"")
	errAllAndSome = errors.New("all devices are meant, or only some: say one of the two")
	errEmptyGroup = errors.New("a group has a name; this one is empty")
)

// Empty tells whether s names no device, group or label.
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
	for _, g := range q["group"] {
		if g == "" {
			return s, errEmptyGroup
		}
		s.Groups = append(s.Groups, g)
	}
	var err error
	s.Labels, err = ParseLabels(q["label"])
	return s, err
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

// ParseLabels reads a list of KEY=VALUE; nil for none. No key can have two values.
func ParseLabels(list []string) (map[string]string, error) {
	var out map[string]string
	for _, s := range list {
		k, v, err := ParseLabel(s)
		if err != nil {
			return nil, err
		}
		if before, twice := out[k]; twice && before != v {
			return nil, fmt.Errorf("label %s is given twice, as %q and %q: a device has only one of it", k, before, v)
		}
		if out == nil {
			out = make(map[string]string)
		}
		out[k] = v
	}
	return out, nil
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
