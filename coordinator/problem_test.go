package coordinator

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// A call that was not carried out must not look like one that was.
func TestACallThatWasGivenUpIsNotAnsweredAsDone(t *testing.T) {
	for _, stopping := range []bool{true, false} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			writeError(w, slog.New(slog.DiscardHandler), stopping, fmt.Errorf("staging: %w", context.Canceled))
		}))
		resp, err := srv.Client().Get(srv.URL)
		switch {
		case stopping && (err != nil || resp.StatusCode != http.StatusServiceUnavailable):
			t.Errorf("while stopping: %v %v", resp, err)
		case !stopping && err == nil:
			t.Errorf("after giving up: %d", resp.StatusCode)
		}
		if err == nil {
			resp.Body.Close()
		}
		srv.Close()
	}
}

func TestACallThatTheStopCutsOffIsToldSo(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.device(t)
	data := someBytes(1000)
	w.putFile(t, "kept", data, 1)
	d.on(wire.KindAudit, silent)
	calls := make(chan error, 1)
	go func() {
		_, err := w.op.Audit(testContext(t), api.AuditRequest{Kind: api.StorageAudit, Device: d.id})
		calls <- err
	}()
	for next(t, d.orders, "the challenge").Kind != wire.KindAudit {
	}
	w.Close()
	wantRefusal(t, next(t, calls, "the end of the call"), http.StatusServiceUnavailable, "stopping")
}
