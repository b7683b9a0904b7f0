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

// Nobody waits minutes for a device that is known to be away.
func TestThatADeviceIsOfflineIsToldAtOnce(t *testing.T) {
	const id = "aaaabbbbccccddddeeeeffff"
	for command, want := range map[string]string{
		"device history " + id:             "on the device alone",
		"device inventory --refresh " + id: "without --refresh",
		"device identify " + id:            "deimos order cancel " + id + " 01",
		"device identify --stop " + id:     "is offline",
	} {
		var asked int
		all := answering(t, func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodPost:
				asked++
				_ = json.NewEncoder(w).Encode(api.Order{Order: wire.Order{ID: "01", Device: id}, State: wire.Queued})
			case strings.Contains(r.URL.Path, "/orders/"):
				t.Errorf("%s waits", command)
				w.WriteHeader(http.StatusNotFound)
			default:
				_ = json.NewEncoder(w).Encode(api.Device{DeviceRecord: api.DeviceRecord{ID: id}, State: api.DeviceOffline})
			}
		})
		err := typed(t, all, strings.Fields(command)...)
		if cli.CodeOf(err) != cli.ExitNotYet || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", command, err)
		}
		if identify := strings.Contains(command, "identify"); identify != (asked == 1) {
			t.Errorf("%s: asked %d times", command, asked)
		}
	}
}
