package coordinator

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func (c *Coordinator) orderRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/orders/{device}/{id}", needs: toRead, summary: "An order and what became of it", out: api.Order{},
			query: []param{{"wait", "wait up to so many seconds for its end", 0.0}}, handle: c.getOrder},
	}
}

func (c *Coordinator) getOrder(w http.ResponseWriter, r *http.Request) error {
	d, id := wire.DeviceID(r.PathValue("device")), r.PathValue("id")
	if s := r.URL.Query().Get("wait"); s != "" {
		seconds, err := strconv.ParseFloat(s, 64)
		if err != nil || !(seconds >= 0) {
			return refuse(http.StatusBadRequest, "bad_wait", "wait must be a number of seconds, not %q", s)
		}
		seconds = min(seconds, maxOrderWait.Seconds())
		ctx, cancel := context.WithTimeout(r.Context(), time.Duration(seconds*float64(time.Second)))
		defer cancel()
		_, err = c.outbox.await(ctx, wire.Order{ID: id, Device: d}, nil)
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errNotFound) {
			return err
		}
	}
	v, ok := c.outbox.rows.get(orderKeyOf(d, id))
	if !ok {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "device %s has no order %s", d, id)
	}
	writeJSON(w, http.StatusOK, api.Order{Order: v.Order, State: v.State, Progress: v.Progress, Result: v.Result, Report: v.Report, Updated: v.Updated})
	return nil
}
