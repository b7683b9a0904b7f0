package coordinator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/wire"
)

// refusal is an error that a person or a program outside may see.
type refusal struct {
	status int
	wire.APIError
}

func (r *refusal) Error() string { return r.Reason }

func refuse(status int, code, format string, args ...any) *refusal {
	return &refusal{status, wire.APIError{Code: code, Reason: fmt.Sprintf(format, args...)}}
}

// writeError answers a request with err. What is no refusal and no device's
// problem is our own fault: it is logged, and the answer says no more than that.
// A call that was given up is never answered as if it had been done.
func writeError(w http.ResponseWriter, log *slog.Logger, stopping bool, err error) {
	r := explain(err, stopping)
	if r == nil {
		panic(http.ErrAbortHandler) // whoever asked has left; to return would be to answer 200
	}
	if r.Code == wire.CodeInternal && r.status == http.StatusInternalServerError {
		log.Error("a request failed", "error", err)
	}
	writeJSON(w, r.status, r.APIError)
}

// explain makes a refusal of any error; nil if whoever asked has left.
func explain(err error, stopping bool) *refusal {
	var r *refusal
	var p *wire.Problem
	switch {
	case errors.As(err, &r):
		return r
	case errors.As(err, &p):
		return refuse(http.StatusBadGateway, p.Code, "%s", p.Reason)
	case errors.Is(err, engine.ErrNoSpace):
		return refuse(http.StatusInsufficientStorage, wire.CodeNoSpace, "%v", err)
	case errors.Is(err, context.Canceled) && stopping:
		return refuse(http.StatusServiceUnavailable, "stopping", "the coordinator is being stopped; what was begun goes on after its next start, ask again then")
	case errors.Is(err, context.Canceled):
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return refuse(http.StatusGatewayTimeout, "no_answer", "this was not done in the time that a call has; what was begun goes on, ask again later")
	case errors.Is(err, errNotFound):
		return refuse(http.StatusNotFound, wire.CodeNotFound, "there is no such thing")
	}
	return refuse(http.StatusInternalServerError, wire.CodeInternal, "the coordinator could not do this: %v", err)
}

// partly is the error of a change that was cut off in the middle. It is never a
// refusal: something was done, and the audit log must not say otherwise.
func partly(done string, err error) error {
	r := explain(err, true)
	return refuse(max(r.status, http.StatusInternalServerError), "partly_done", "%s, then it went wrong: %s", done, r.Reason)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the peer went away: nobody is left to tell
}
