package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

// slow is a coordinator with one order that answers no wait in time. Asked once
// more how it is, it has come to its end.
func slow(t *testing.T, end wire.State) *commands {
	v := api.Order{Order: wire.Order{ID: "01", Device: "aaaabbbbccccddddeeeeffff", Kind: wire.KindUpdateInstall}, State: wire.Queued}
	waited := make(chan struct{}, 1)
	return answering(t, func(w http.ResponseWriter, r *http.Request) {
		wait := r.URL.Query().Get("wait")
		if wait != "" && wait != "0.0" {
			select {
			case waited <- struct{}{}:
			default:
			}
			<-r.Context().Done() // the command has hung up
			return
		}
		now := v
		select {
		case <-waited:
			now.State = end
		default:
		}
		if r.Method == http.MethodPost {
			_ = json.NewEncoder(w).Encode([]api.Order{now})
			return
		}
		_ = json.NewEncoder(w).Encode(now)
	})
}

func TestAWaitEndsWithHowItIsThen(t *testing.T) {
	for _, command := range []string{"order show aaaabbbbccccddddeeeeffff 01 --wait 300ms", "release offer 1.0.0 --all --wait 300ms"} {
		for end, want := range map[wire.State]int{wire.Succeeded: 0, wire.Running: cli.ExitNotYet} {
			text := printed(t, func() {
				if err := typed(t, slow(t, end), strings.Fields(command)...); cli.CodeOf(err) != want {
					t.Errorf("%s, %s: %v", command, end, err)
				}
			})
			if !strings.Contains(text, string(end)) {
				t.Errorf("%s, %s: it said\n%s", command, end, text)
			}
		}
	}
	_ = printed(t, func() {
		if err := typed(t, slow(t, wire.Failed), "release", "offer", "1.0.0", "--all", "--wait", "300ms"); cli.CodeOf(err) != cli.ExitFailed {
			t.Errorf("an offer that failed: %v", err)
		}
	})
}
