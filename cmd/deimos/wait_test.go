package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

// slow is a coordinator with one order that answers no wait in time, and counts them. Asked
// without one how it is, it has come to its end: on a busy machine the time may be over before
// there is a wait to answer.
func slow(t *testing.T, end wire.State, waits *atomic.Int32) *commands {
	v := api.Order{Order: wire.Order{ID: "01", Device: "aaaabbbbccccddddeeeeffff", Kind: wire.KindUpdateInstall}, State: wire.Queued}
	return answering(t, func(w http.ResponseWriter, r *http.Request) {
		wait := r.URL.Query().Get("wait")
		if wait != "" && wait != "0.0" {
			waits.Add(1)
			<-r.Context().Done() // the command has hung up
			return
		}
		if r.Method == http.MethodPost {
			_ = json.NewEncoder(w).Encode([]api.Order{v})
			return
		}
		now := v
		now.State = end
		_ = json.NewEncoder(w).Encode(now)
	})
}

func TestAWaitEndsWithHowItIsThen(t *testing.T) {
	var waits atomic.Int32
	for _, command := range []string{"order show aaaabbbbccccddddeeeeffff 01 --wait 1s", "release offer 1.0.0 --all --wait 1s"} {
		for end, want := range map[wire.State]int{wire.Succeeded: 0, wire.Running: cli.ExitNotYet} {
			text := printed(t, func() {
				if err := typed(t, slow(t, end, &waits), strings.Fields(command)...); cli.CodeOf(err) != want {
					t.Errorf("%s, %s: %v", command, end, err)
				}
			})
			if !strings.Contains(text, string(end)) {
				t.Errorf("%s, %s: it said\n%s", command, end, text)
			}
		}
	}
	_ = printed(t, func() {
		if err := typed(t, slow(t, wire.Failed, &waits), "release", "offer", "1.0.0", "--all", "--wait", "1s"); cli.CodeOf(err) != cli.ExitFailed {
			t.Errorf("an offer that failed: %v", err)
		}
	})
	if waits.Load() == 0 {
		t.Error("nobody has waited")
	}
}
