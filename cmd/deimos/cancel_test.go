package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"path"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// However many orders are open, and whatever lies between them: none that is
// meant is left out.
func TestCancelPendingReachesTheOldestOrder(t *testing.T) {
	const device = "aaaabbbbccccddddeeeeffff"
	kinds := []wire.Kind{wire.KindOrderCancel, wire.KindOrderCancel, "b", "a"} // a part each, the newest first
	var asked []string
	at := answering(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			id := path.Base(path.Dir(r.URL.Path))
			asked = append(asked, id)
			_ = json.NewEncoder(w).Encode(api.Order{Order: wire.Order{ID: id, Device: device}, Cancel: &api.Cancel{Order: "c"}})
			return
		}
		i := 0
		if before := r.URL.Query().Get("before"); before != "" {
			_, _ = fmt.Sscan(before, &i)
			i = len(kinds) - i
		}
		list := api.OrderList{Orders: []api.OrderSummary{{ID: fmt.Sprint(len(kinds) - i - 1), Device: device, Kind: kinds[i], Canceled: i == 2}}}
		if i < len(kinds)-1 {
			list.Cut, list.Next = "there are more", list.Orders[0].ID
		}
		_ = json.NewEncoder(w).Encode(list)
	})
	_ = printed(t, func() {
		if err := typed(t, at, "order", "cancel", "--pending", "--all", "--yes"); err != nil {
			t.Error(err)
		}
	})
	if got := strings.Join(asked, " "); got != "1 0" {
		t.Errorf("asked to cancel %q, want 1 and 0", got)
	}
}
