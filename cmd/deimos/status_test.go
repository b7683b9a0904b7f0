package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func TestAStatusIsReadAtAGlance(t *testing.T) {
	var s api.Status
	var out bytes.Buffer
	show := func() string {
		out.Reset()
		if err := writeStatus(&out, s); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if text := show(); !strings.Contains(text, "0 online, 0 offline\n") || !strings.Contains(text, "nothing needs it") || strings.Count(text, "none") != 3 {
		t.Errorf("%s", text)
	}
	s.Devices.Online, s.Devices.Pending, s.Devices.Warned = 3, 2, 1
	s.Orders.Open = map[wire.State]int{wire.Queued: 1, wire.Running: 4}
	s.Orders.Ended, s.Orders.AtLeast = map[wire.State]int{wire.TimedOut: 7}, true
	s.Attention, s.More = []api.Attention{{Code: "x", About: "device:abc", Text: "an odd\nthing"}}, 4
	text := show()
	for _, want := range []string{"3 online, 0 offline, 2 waiting to be claimed, 1 with a warning\n", "open: 4 running, 1 queued\n", "at least 7 timed out\n", "device abc  an odd thing\n", "… and 4 more\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
}
