package coordinator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// compute makes job orders and takes what comes back apart. Customers' jobs and
// challenges both come through here: on the wire they are the same.
type compute struct {
	staging *staging
	outbox  *outbox
	reg     *registry
	auth    *authority
	// given is told of each job that a device is sent.
	given func(wire.DeviceID, wire.JobRun)
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

// isStaged is true for a report whose attachment came over HTTPS.
func isStaged(r wire.Report) bool {
	return r.Attachment != nil && r.Attachment.Inline == nil && r.Attachment.Size > 0
}

// sendAs sends a job order with the id given, in which only the module is missing; of is the
// task that it is for, of a customer's job.
func (c *compute) sendAs(ctx context.Context, of, id string, d wire.DeviceID, module string, body wire.JobRun, life time.Duration) (OrderRecord, error) {
	code, err := c.module(ctx, module)
	if err != nil {
		return OrderRecord{}, err
	}
	size := int64(len(code))
	u := c.auth.issue(ticket{method: http.MethodGet, device: d, blob: blobRef{moduleBlob, module}, size: size, expires: c.outbox.now().Add(life)})
	body.Module = wire.Blob{SHA256: module, Size: size, URL: u}
	v, err := c.outbox.submitOf(ctx, of, id, d, wire.KindJobRun, body, life)
	if err == nil {
		c.given(d, body)
	}
	return v, err
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

// jobOutcome is what a job order has come to.
type jobOutcome struct {
	asked  wire.JobRun
	result wire.JobResult
	output []byte // standard output
}

// collect takes the result of a finished job order apart and checks that its
// parts belong together. What is the device's fault is a refusal.
func (c *compute) collect(ctx context.Context, v OrderRecord) (j jobOutcome, err error) {
	order, device := v.Order.ID, v.Order.Device
	if err := succeeded(v); err != nil {
		return j, err
	}
	bad := func(format string, args ...any) (jobOutcome, error) {
		return j, refuse(http.StatusBadGateway, wire.CodeMismatch, "device %s %s", device, fmt.Sprintf(format, args...))
	}
	if err := json.Unmarshal(v.Result.Body, &j.result); err != nil {
		return bad("reports a result that cannot be read: %v", err)
	}
	if j.asked, err = wire.DecodeBody[wire.JobRun](v.Order); err != nil {
		return j, err
	}
	if j.result.Module != j.asked.Module.SHA256 || j.result.Input != j.asked.Input {
		return bad("signed the result of another job")
	}
	if err := checkOutputs(j.asked, j.result); err != nil {
		return bad("signed for outputs that were not asked for: %v", err)
	}
	if len(j.result.Statement) > 0 {
		rec, err := c.reg.device(device)
		if err != nil {
			return j, err
		}
		if err := checkStatement(rec, v.Order, j.asked, j.result); err != nil {
			return bad("made a statement about another job than it was asked for: %v", err)
		}
	}
	// Nothing of it can have been staged before the order was made.
	if isStaged(v.Result) && c.outbox.now().After(v.Order.Issued.Add(stagingLife)) && !c.staging.has(ctx, attachmentName(order)) {
		return j, refuse(http.StatusGone, "expired", "the output of order %s was kept for a day and is gone; \"deimos order show %s %s\" has its signed digest", order, device, order)
	}
	if j.output, err = attachmentOf(ctx, c.staging, v.Result); err != nil {
		return j, err
	}
	if sum := sha256.Sum256(j.output); hex.EncodeToString(sum[:]) != j.result.Output {
		return bad("signed for another output than it sent")
	}
	return j, nil
}

// checkOutputs tells whether the named outputs are those that were asked for, each
// in one piece. All chunks of one but its last are as large as a chunk can be, so that the
// same bytes are the same chunks on each device.
func checkOutputs(asked wire.JobRun, r wire.JobResult) error {
	if len(r.Outputs) != len(asked.Outputs) {
		return fmt.Errorf("%d outputs instead of %d", len(r.Outputs), len(asked.Outputs))
	}
	for i, o := range r.Outputs {
		if o.Name != asked.Outputs[i] {
			return fmt.Errorf("the output %q instead of %q", label(o.Name), asked.Outputs[i])
		}
		var size int64
		for k, p := range o.Parts {
			if !isDigest(p.Chunk) || p.Size < 1 || p.Size > chunk.MaxSize {
				return fmt.Errorf("the output %s has a part that is no chunk", o.Name)
			}
			if p.Size < chunk.MaxSize && k < len(o.Parts)-1 {
				return fmt.Errorf("the output %s has a part of %d bytes before its last; there it is %d", o.Name, p.Size, chunk.MaxSize)
			}
			size += p.Size
		}
		if !isDigest(o.SHA256) || size != o.Size || o.Name == wire.Stdout && o.SHA256 != r.Output {
			return fmt.Errorf("the parts of the output %s are not it", o.Name)
		}
	}
	return nil
}

// checkStatement tells whether a statement says of what was asked for what the result
// says. What an input of several chunks has as its digest cannot be known here; its
// name can.
func checkStatement(d api.DeviceRecord, o wire.Order, asked wire.JobRun, r wire.JobResult) error {
	st, err := wire.OpenAs[wire.Statement](r.Statement, d.PublicKey, wire.TypeStatement)
	if err != nil {
		return err
	}
	p := st.Predicate
	switch {
	case st.Type != wire.StatementType || st.PredicateType != wire.JobPredicateType:
		return fmt.Errorf("it is of another type")
	case p.Order != o.ID || p.Device != o.Device:
		return fmt.Errorf("it is about another order")
	case p.Module.Digest["sha256"] != asked.Module.SHA256:
		return fmt.Errorf("it is about another module")
	case !slices.Equal(p.Args, asked.Args) || !maps.Equal(p.Env, asked.Env) || p.Live != asked.Live:
		return fmt.Errorf("it is about other arguments, or another environment")
	}
	want, parts := map[string]string{wire.Stdout: r.Output}, make(map[string][]wire.JobPart)
	for _, f := range r.Outputs {
		want[f.Name], parts[f.Name] = f.SHA256, f.Parts
	}
	for _, s := range st.Subject {
		if want[s.Name] == "" || s.Digest["sha256"] != want[s.Name] {
			return fmt.Errorf("it is about another output %q", label(s.Name))
		}
		if id, of := s.Digest["deimosChunk"], parts[s.Name]; id != "" && (len(of) != 1 || of[0].Chunk != id) {
			return fmt.Errorf("it says that the output %q is another chunk", label(s.Name))
		}
		delete(want, s.Name)
	}
	if len(want) > 0 {
		return fmt.Errorf("it leaves out the output %s", slices.Sorted(maps.Keys(want))[0])
	}
	inputs := make(map[string]string) // name → id, where it is one chunk
	if asked.Input != "" {
		inputs[wire.Stdin] = asked.Input
	}
	for _, in := range asked.Inputs {
		inputs[in.Name] = ""
		if len(in.Parts) == 1 {
			inputs[in.Name] = in.Parts[0].Chunk
		}
	}
	for _, in := range p.Inputs {
		id, ok := inputs[in.Name]
		if !ok || id != "" && in.Digest["deimosChunk"] != id {
			return fmt.Errorf("it is about another input %q", label(in.Name))
		}
		delete(inputs, in.Name)
	}
	if len(inputs) > 0 {
		return fmt.Errorf("it leaves out the input %s", slices.Sorted(maps.Keys(inputs))[0])
	}
	return nil
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
