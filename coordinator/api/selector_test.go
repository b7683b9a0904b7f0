package api

import (
	"net/url"
	"reflect"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/wire"
)

var (
	deviceA = wire.DeviceID(strings.Repeat("a", 24))
	deviceB = wire.DeviceID(strings.Repeat("b", 24))
)

func TestASelectorMeansDevicesThatFitAllOfIt(t *testing.T) {
	d := DeviceRecord{ID: deviceA, Group: "shop", Labels: map[string]string{"site": "n", "empty": ""}}
	gone := d
	gone.Retired = true
	for name, c := range map[string]struct {
		s    Selector
		d    DeviceRecord
		want bool
	}{
		"everything":               {Selector{}, d, true},
		"a retired one, never":     {Selector{}, gone, false},
		"a retired one by its id":  {Selector{Devices: []wire.DeviceID{deviceA}}, gone, false},
		"its id":                   {Selector{Devices: []wire.DeviceID{deviceB, deviceA}}, d, true},
		"another id":               {Selector{Devices: []wire.DeviceID{deviceB}}, d, false},
		"its group":                {Selector{Groups: []string{"x", "shop"}}, d, true},
		"another group":            {Selector{Groups: []string{"x"}}, d, false},
		"a label":                  {Selector{Labels: map[string]string{"site": "n"}}, d, true},
		"another value":            {Selector{Labels: map[string]string{"site": "s"}}, d, false},
		"a label it has not":       {Selector{Labels: map[string]string{"none": ""}}, d, false},
		"an empty label":           {Selector{Labels: map[string]string{"empty": ""}}, d, true},
		"one label of two":         {Selector{Labels: map[string]string{"site": "n", "none": "1"}}, d, false},
		"its id, another group":    {Selector{Devices: []wire.DeviceID{deviceA}, Groups: []string{"x"}}, d, false},
		"its group, another label": {Selector{Groups: []string{"shop"}, Labels: map[string]string{"site": "s"}}, d, false},
		"all of it":                {Selector{Devices: []wire.DeviceID{deviceA}, Groups: []string{"shop"}, Labels: map[string]string{"site": "n"}}, d, true},
	} {
		if got := c.s.Matches(c.d); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

func TestASelectorSurvivesItsQuery(t *testing.T) {
	for _, s := range []Selector{
		{},
		{Devices: []wire.DeviceID{deviceA, deviceB}},
		{Groups: []string{"a group", "b&c=d", "ü"}},
		{Labels: map[string]string{"a/b.c-d_e": "x = y", "empty": ""}},
		{Devices: []wire.DeviceID{deviceA}, Groups: []string{" "}, Labels: map[string]string{"k": "=", "l": "%00+&"}},
	} {
		q, err := url.ParseQuery(s.Query().Encode())
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseSelector(q)
		if err != nil || !reflect.DeepEqual(got, s) {
			t.Errorf("%+v comes back as %+v, %v", s, got, err)
		}
		if got.Empty() != (len(q) == 0) {
			t.Errorf("%+v: empty is %t", s, got.Empty())
		}
	}
}

// TestABadSelectorMeansNobody: what cannot be read must not widen to the whole fleet.
func TestABadSelectorMeansNobody(t *testing.T) {
	for _, query := range []string{"device=x", "device=", "group=", "group=a&group=", "label=a=b&label=a=c", "device=" + string(deviceA) + "x", "label=", "label=a", "label==v", "label=a b=c", "label=a=%00", "label=a=" + strings.Repeat("x", MaxLabelBytes+1)} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if s, err := ParseSelector(q); err == nil {
			t.Errorf("%q is taken for %+v", query, s)
		}
	}
}

func TestAChangeSaysWhomItIsFor(t *testing.T) {
	some := Selector{Groups: []string{"g"}}
	for _, s := range []Selector{some, {All: true}} {
		if err := s.CheckChange(); err != nil {
			t.Errorf("%+v: %v", s, err)
		}
	}
	some.All = true
	for _, s := range []Selector{{}, some, {Groups: []string{""}}} {
		if s.CheckChange() == nil {
			t.Errorf("%+v is taken", s)
		}
	}
}

func TestLabelsAreShortAndPrintable(t *testing.T) {
	long := strings.Repeat("x", MaxLabelBytes)
	for _, s := range []string{"a=b", "a=", "a/b=c=d", "A.b-c_9=ü ñ", long + "=" + long} {
		k, v, err := ParseLabel(s)
		if err != nil || k+"="+v != s {
			t.Errorf("%q is read as %q %q, %v", s, k, v, err)
		}
	}
	for _, s := range []string{"", "=", "=b", "a", "a b=c", "ü=c", "a=\n", "a=\x1b[31m", "a=\x7f", "a=\u0085", "a=\xff", "a\x00=b", long + "x=b", "a=" + long + "x"} {
		if k, v, err := ParseLabel(s); err == nil || k != "" || v != "" {
			t.Errorf("%q is taken for %q %q", s, k, v)
		} else if strings.ContainsAny(err.Error(), "\n\x1b\x00") {
			t.Errorf("the refusal of %q repeats what no terminal should see", s)
		}
	}
}

func FuzzParseSelector(f *testing.F) {
	for _, s := range []Selector{{}, {Devices: []wire.DeviceID{deviceA}}, {Groups: []string{"g", "h"}}, {Labels: map[string]string{"a": "b", "c": ""}}} {
		f.Add(s.Query().Encode())
	}
	f.Add("label=a=b&label=a=c")
	f.Add("label=%ff=%00&device=*&group=%0a")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		s, err := ParseSelector(q)
		if err != nil {
			return
		}
		again, err := ParseSelector(s.Query())
		if err != nil || !reflect.DeepEqual(s, again) {
			t.Fatalf("%q is %+v, written and read again %+v, %v", query, s, again, err)
		}
		if s.Empty() && (q.Has("device") || q.Has("group") || q.Has("label")) {
			t.Fatalf("%q asks for some and means everybody", query)
		}
	})
}
