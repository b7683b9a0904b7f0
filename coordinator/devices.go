package coordinator

import (
	"cmp"
	"net/http"
	"slices"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func (c *Coordinator) deviceRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/devices", needs: toRead, summary: "List the devices", out: []api.Device{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, c.reg.list())
			return nil
		}},
		{method: "GET", path: v1 + "/devices/{id}", needs: toRead, summary: "One device", out: api.Device{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			d, err := c.reg.device(wire.DeviceID(r.PathValue("id")))
			if err == nil {
				writeJSON(w, http.StatusOK, c.reg.view(d))
			}
			return err
		}},
	}
}

// selected is the devices that a selector means, sorted by id. A device that is
// named and not there, or retired, is an error, and so is a selector that means
// nobody, unless it is the empty one.
func (r *registry) selected(s api.Selector) ([]api.DeviceRecord, error) {
	for _, id := range s.Devices {
		d, err := r.device(id)
		if err != nil {
			return nil, err
		}
		if d.Retired {
			return nil, refuse(http.StatusConflict, wire.CodeRetired, "device %s is retired", id)
		}
	}
	var out []api.DeviceRecord
	r.rows.each(func(_ string, d api.DeviceRecord) bool {
		if s.Matches(d) {
			out = append(out, d)
		}
		return true
	})
	if len(out) == 0 && !s.Empty() {
		return nil, refuse(http.StatusNotFound, wire.CodeNotFound, "no device has all that was asked for; \"deimos device list\" shows groups and labels")
	}
	slices.SortFunc(out, func(a, b api.DeviceRecord) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}
