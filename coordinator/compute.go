package coordinator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// compute has devices run jobs over chunks that they hold.
type compute struct {
	storage *storage
	staging *staging
	outbox  *outbox
	reg     *registry
	auth    *authority
	// wait is how long a call waits for its job; 0 is as long as the call has.
	wait time.Duration
}

// jobLife is how long a job takes at most from order to report beside its own
// time: waiting, moving module and output.
const jobLife = 15 * time.Minute

// lifeOfJob leaves a job all the time that it may run. The device refuses a limit
// above its own.
func lifeOfJob(l wire.JobLimits) time.Duration {
	wall := time.Duration(min(max(l.WallSeconds, 0), maxLife.Seconds()) * float64(time.Second))
	return min(jobLife+wall, maxLife)
}

// run carries out an operator's job and waits for it.
func (c *compute) run(ctx context.Context, r api.JobRequest) (api.Job, error) {
	o, err := c.storage.object(r.Object)
	if err != nil {
		return api.Job{}, err
	}
	if o.Code != nil {
		return api.Job{}, refuse(http.StatusConflict, "encrypted", "%q is encrypted: no device can read it, and so no job can run over it; store a copy with \"deimos object put --plain\"", r.Object)
	}
	if r.Chunk < 0 || r.Chunk >= len(o.Chunks) {
		return api.Job{}, refuse(http.StatusBadRequest, "no_such_chunk", "%q has chunks 0 to %d, not %d", r.Object, len(o.Chunks)-1, r.Chunk)
	}
	input := o.Chunks[r.Chunk].ID
	device, err := c.holder(input, r.Device)
	if err != nil {
		return api.Job{}, err
	}
	return c.runOn(ctx, device, r.Module, r.Args, input, r.Limits)
}

// holder picks a device that is there and holds the chunk, or checks the one asked for.
func (c *compute) holder(id string, want wire.DeviceID) (wire.DeviceID, error) {
	rec, ok := c.storage.chunks.get(id)
	if !ok {
		return "", refuse(http.StatusNotFound, wire.CodeNotFound, "no device is known to hold chunk %s", id)
	}
	var there []wire.DeviceID
	for _, h := range rec.Holders {
		if !h.Lost && c.reg.mayWork(h.Device) && (want == "" || want == h.Device) {
			there = append(there, h.Device)
		}
	}
	switch {
	case len(there) > 0:
		return there[rand.IntN(len(there))], nil
	case want != "":
		return "", refuse(http.StatusConflict, "not_a_holder", "device %s is offline, does not hold the input chunk %s, or has a warning that keeps jobs from it (\"deimos device show %s\")", want, id, want)
	}
	return "", refuse(http.StatusServiceUnavailable, "no_holder_online", "no device that holds the input chunk %s is online", id)
}

// runOn sends the job order and collects its result. Customers' jobs and
// challenges both come through here: on the wire they are the same.
func (c *compute) runOn(ctx context.Context, d wire.DeviceID, module string, args []string, input string, limits wire.JobLimits) (api.Job, error) {
	order, err := c.send(ctx, d, module, args, input, limits)
	if err != nil {
		return api.Job{}, err
	}
	about(ctx, string(d), order.ID)
	wait := ctx
	if c.wait > 0 {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, c.wait)
		defer cancel()
	}
	v, err := c.outbox.await(wait, order, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		return api.Job{}, &unfinished{order}
	}
	if err != nil {
		return api.Job{}, err
	}
	return c.collect(ctx, v)
}

// unfinished is the error of a call whose job goes on after it.
type unfinished struct{ order wire.Order }

func (u *unfinished) Error() string {
	return fmt.Sprintf("the job goes on: order %s of device %s has not ended in the time that a call has; \"deimos order show %s %s --wait 10m\" waits for its end",
		u.order.ID, u.order.Device, u.order.Device, u.order.ID)
}

// result collects a job that was begun by a call before.
func (c *compute) result(ctx context.Context, d wire.DeviceID, order string) (api.Job, error) {
	v, err := c.outbox.get(ctx, d, order)
	switch {
	case err != nil && !errors.Is(err, errNotFound):
		return api.Job{}, err
	case err != nil || v.Kind != wire.KindJobRun:
		return api.Job{}, refuse(http.StatusNotFound, wire.CodeNotFound, "device %s has no job %s", d, order)
	case !v.State.Terminal():
		return api.Job{}, refuse(http.StatusConflict, "not_ended", "job %s has not ended; \"deimos order show %s %s --wait 10m\" waits for its end", order, d, order)
	}
	return c.collect(ctx, v)
}

// isStaged is true for a report whose attachment came over HTTPS.
func isStaged(r wire.Report) bool {
	return r.Attachment != nil && r.Attachment.Inline == nil && r.Attachment.Size > 0
}

func (c *compute) send(ctx context.Context, d wire.DeviceID, module string, args []string, input string, limits wire.JobLimits) (wire.Order, error) {
	code, err := c.module(ctx, module)
	if err != nil {
		return wire.Order{}, err
	}
	ref := blobRef{moduleBlob, module}
	size := int64(len(code))
	life := lifeOfJob(limits)
	u := c.auth.issue(ticket{method: http.MethodGet, device: d, blob: ref, size: size, expires: c.outbox.now().Add(life)})
	return c.outbox.submit(ctx, d, wire.KindJobRun, wire.JobRun{
		Module: wire.Blob{SHA256: module, Size: size, URL: u},
		Args:   args, Input: input, Limits: limits,
	}, life)
}

// module gets a module that was uploaded before.
func (c *compute) module(ctx context.Context, id string) ([]byte, error) {
	ref, err := parseBlobRef(string(moduleBlob), id)
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "bad_module", "%v", err)
	}
	code, err := c.staging.get(ctx, ref.String())
	if errors.Is(err, errNotStaged) {
		return nil, refuse(http.StatusNotFound, "no_module", "module %s is not here; upload it first", id)
	}
	return code, err
}

// collect takes the result of a finished job order apart and checks that its
// parts belong together. What is the device's fault is a refusal.
func (c *compute) collect(ctx context.Context, v OrderRecord) (api.Job, error) {
	j := api.Job{Order: v.Order.ID, Device: v.Order.Device, Report: v.Report}
	if err := succeeded(v); err != nil {
		return j, err
	}
	if err := json.Unmarshal(v.Result.Body, &j.Result); err != nil {
		return j, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s reports a result that cannot be read: %v", j.Device, err)
	}
	asked, err := wire.DecodeBody[wire.JobRun](v.Order)
	if err != nil {
		return j, err
	}
	if j.Result.Module != asked.Module.SHA256 || j.Result.Input != asked.Input {
		return j, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s signed the result of another job", j.Device)
	}
	// Nothing of it can have been staged before the order was made.
	if isStaged(v.Result) && c.outbox.now().After(v.Order.Issued.Add(stagingLife)) && !c.staging.has(ctx, attachmentName(v.Order.ID)) {
		return j, refuse(http.StatusGone, "expired", "the output of job %s was kept for a day and is gone; \"deimos order show %s %s\" has its signed digest", j.Order, j.Device, j.Order)
	}
	if j.Output, err = attachmentOf(ctx, c.staging, v.Result); err != nil {
		return j, err
	}
	if sum := sha256.Sum256(j.Output); hex.EncodeToString(sum[:]) != j.Result.Output {
		return j, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s signed for another output than it sent", j.Device)
	}
	return j, nil
}

// attachmentOf gets a report's attachment, from inside it or from the data
// plane, and checks it against the signed digest.
func attachmentOf(ctx context.Context, s *staging, r wire.Report) ([]byte, error) {
	a := r.Attachment
	if a == nil {
		return nil, nil
	}
	data := a.Inline
	if isStaged(r) {
		var err error
		data, err = s.get(ctx, attachmentName(r.Order))
		if errors.Is(err, errNotStaged) {
			return nil, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s signed for an attachment that it never sent", r.Device)
		}
		if err != nil {
			return nil, fmt.Errorf("the result of order %s: %w", r.Order, err)
		}
	}
	sum := sha256.Sum256(data)
	if int64(len(data)) != a.Size || hex.EncodeToString(sum[:]) != a.SHA256 {
		return nil, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s signed for another attachment than it sent", r.Device)
	}
	return data, nil
}
