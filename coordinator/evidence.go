package coordinator

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// # Judging
//
// A challenge is judged by functions that see nothing but what was signed, the
// chunks' sizes and the leaves. The coordinator calls them when an answer comes,
// and [CheckEvidence] on any other machine: there is one implementation.
//
// # What evidence proves
//
// The order is signed by the coordinator's order key, the report by the device's
// key, of which its id is the hash. The report names the order and repeats its
// nonce, and signs for the leaves by their digest. A chunk's root is its id; its
// size, without which no leaf can be judged, is signed for by the device in its
// receipt. So a leaf that does not verify is one that the device signed, of a
// chunk that it had said to hold. What rests on the coordinator's word, and is
// said to: that the chunk was not dropped by order meanwhile; that leaves were
// never sent; that a job has another result than the device's (who has module and
// input can run it).

// verdict is how a challenge ended, as it follows from what was signed.
type verdict struct {
	Outcome     api.AuditOutcome
	Reason      string
	Right       int
	Lost, Wrong []string
	Got         string // of a job: the digest that the device signed for
	// OtherResult says that a job is wrong by nothing but its result.
	OtherResult bool
}

func wrong(format string, args ...any) verdict {
	return verdict{Outcome: api.AuditWrong, Reason: fmt.Sprintf(format, args...)}
}

// response is what came back on a challenge.
type response struct {
	report     wire.Report
	attachment []byte
	missing    bool // the report signs for an attachment that never came
}

// leafOnLine is what a leaf has in an answer at most, in bytes: base64 of its
// data and of a path of 10 hashes, the chunk's id in answer and order, and JSON
// around.
const leafOnLine = (chunk.LeafSize+2)/3*4 + 10*47 + 230

// maxLeafBytes bounds what n leaves may have: a JSON of the same with white
// space or other fields fits too.
func maxLeafBytes(n int) int64 { return 4096 + int64(n)*8192 }

// judgeStorage judges the answer to a storage challenge. Chunks that the device
// was released from meanwhile count for nothing, whether it has dropped them by
// then or not; a leaf that is made up is a lie about those too.
func judgeStorage(asked wire.Audit, sizes map[string]int64, a response, released map[string]bool) verdict {
	if a.report.State != wire.Succeeded {
		return judgeUndone(a.report)
	}
	var ans wire.AuditAnswer
	if err := json.Unmarshal(a.report.Body, &ans); err != nil || ans.Nonce != asked.Nonce {
		return wrong("the answer is not to this challenge")
	}
	if at := a.report.Attachment; at != nil && at.Size > maxLeafBytes(len(asked.Items)) {
		return wrong("the answer has %d bytes, which is more than %d leaves can need", at.Size, len(asked.Items))
	}
	if v, ok := judgeAttachment(a); !ok {
		return v
	}
	var leaves []wire.AuditLeaf
	if err := json.Unmarshal(a.attachment, &leaves); err != nil || len(leaves) != len(asked.Items) {
		return wrong("the answer has not one leaf for each that was asked for")
	}
	return judgeLeaves(asked.Items, leaves, sizes, released)
}

// judgeUndone judges the signed report on an order that did not succeed.
func judgeUndone(r wire.Report) verdict {
	return verdict{Outcome: api.AuditRefused, Reason: r.Reason}
}

// judgeAttachment holds an attachment against the digest that was signed.
func judgeAttachment(a response) (v verdict, ok bool) {
	at := a.report.Attachment
	if a.missing {
		return wrong("the device signed for an attachment that it never sent"), false
	}
	if at == nil {
		return verdict{}, len(a.attachment) == 0
	}
	sum := sha256.Sum256(a.attachment)
	if int64(len(a.attachment)) != at.Size || hex.EncodeToString(sum[:]) != at.SHA256 {
		return wrong("the device signed for another attachment than it sent"), false
	}
	return verdict{}, true
}

// judgeLeaves counts leaves.
func judgeLeaves(asked []wire.AuditItem, leaves []wire.AuditLeaf, sizes map[string]int64, released map[string]bool) (v verdict) {
	note := func(list *[]string, id string) {
		if !slices.Contains(*list, id) {
			*list = append(*list, id)
		}
	}
	for i, l := range leaves {
		it := asked[i]
		id, err := chunk.ParseID(it.Chunk)
		if err == nil && l.Lost {
			if !released[it.Chunk] {
				note(&v.Lost, it.Chunk)
			}
			continue
		}
		if err == nil {
			err = chunk.VerifyLeaf(id, sizes[it.Chunk], it.Leaf, l.Data, l.Path)
		}
		if err != nil {
			note(&v.Wrong, it.Chunk)
			continue
		}
		if !released[it.Chunk] {
			v.Right++
		}
	}
	switch {
	case len(v.Wrong) > 0:
		v.Outcome, v.Reason = api.AuditWrong, fmt.Sprintf("leaves of %s do not verify", chunksOf(len(v.Wrong)))
	case len(v.Lost) > 0:
		v.Outcome, v.Reason = api.AuditLost, "the device says that it has lost "+chunksOf(len(v.Lost))
	case v.Right == 0:
		v.Outcome, v.Reason = api.AuditVoid, releasedReason
	default:
		v.Outcome = api.AuditRight
	}
	return v
}

func chunksOf(n int) string {
	if n == 1 {
		return "1 chunk"
	}
	return fmt.Sprintf("%d chunks", n)
}

// judgeCompute judges the answer to a job whose output has the digest expected.
func judgeCompute(asked wire.JobRun, expected string, a response, released bool) (v verdict) {
	if r := a.report; r.State != wire.Succeeded {
		v = judgeUndone(r)
		// The input is the one chunk that the device may confess to have lost. What has a
		// name it fetches where it does not hold it.
		if saysLost(r.Code) && asked.Input != "" {
			v.Outcome, v.Lost = api.AuditLost, []string{asked.Input}
			if released {
				v = verdict{Outcome: api.AuditVoid, Reason: releasedReason}
			}
		}
		return v
	}
	var res wire.JobResult
	if err := json.Unmarshal(a.report.Body, &res); err != nil {
		return wrong("the result cannot be read")
	}
	got := expectedOf(asked.Outputs, res)
	defer func() { v.Got = got }()
	if res.Module != asked.Module.SHA256 || res.Input != asked.Input {
		return wrong("the device signed the result of another job")
	}
	if v, ok := judgeAttachment(a); !ok {
		return v
	}
	sum := sha256.Sum256(a.attachment)
	switch {
	case hex.EncodeToString(sum[:]) != res.Output:
		return wrong("the device signed for another output than it sent")
	case got != expected:
		v = wrong("the device signed another result than the job has")
		v.OtherResult = true
		return v
	}
	return verdict{Outcome: api.AuditRight}
}

// answerOf puts an order's end and its attachment together. Its error is the
// coordinator's own.
func (a *audits) answerOf(ctx context.Context, v OrderRecord) (response, error) {
	ans := response{report: v.Result}
	at := v.Result.Attachment
	if at == nil {
		return ans, nil
	}
	if ans.attachment = at.Inline; !isStaged(v.Result) {
		return ans, nil
	}
	var err error
	ans.attachment, err = a.staging.get(ctx, attachmentName(v.Order.ID))
	if errors.Is(err, errNotStaged) {
		ans.missing, err = true, nil
	}
	if err != nil {
		err = fmt.Errorf("the answer to order %s: %w", v.Order.ID, err)
	}
	return ans, err
}

// maxEvidence bounds the attachment that is kept: [maxLeaves] leaves fit.
const maxEvidence = 5 << 20

// keepEvidence keeps what a wrong or lost outcome was judged from. It tells
// whether there is anything signed to keep.
func (a *audits) keepEvidence(ctx context.Context, rec api.Audit, v OrderRecord, sizes map[string]int64) (bool, error) {
	if len(v.Report) == 0 {
		return false, nil
	}
	key, err := a.keyOf(rec.Device)
	if err != nil {
		return false, err
	}
	ans, err := a.answerOf(ctx, v)
	if err != nil {
		return false, err
	}
	e := api.Evidence{Format: evidenceFormat, Audit: rec.ID, At: rec.At, Kind: rec.Kind, Device: rec.Device, DeviceKey: key,
		OrderKey: a.outbox.key.Public().(ed25519.PublicKey), Order: v.Envelope, Report: v.Report, Attachment: ans.attachment, Missing: ans.missing,
		Sizes: map[string]int64{}, Receipts: map[string]json.RawMessage{}, Outcome: rec.Outcome, Lost: rec.Lost, Wrong: rec.Wrong,
		Commitment: rec.Commitment, Salt: rec.Salt, Expected: rec.Expected}
	if len(e.Attachment) > maxEvidence {
		e.Attachment, e.Missing = nil, true
	}
	if !isStaged(v.Result) {
		e.Attachment = nil // it stands in the report
	}
	for _, id := range rec.Chunks {
		if n, ok := sizes[id]; ok {
			e.Sizes[id] = n
		}
	}
	for _, id := range slices.Concat(rec.Wrong, rec.Lost) {
		if raw := a.receiptOf(ctx, rec.Device, id); raw != nil {
			e.Receipts[id] = raw
		}
	}
	raw, err := json.Marshal(e)
	if err != nil {
		return false, err
	}
	if _, err := a.evidence.PutBytes(ctx, rec.ID, raw); err != nil {
		return false, fmt.Errorf("the evidence of challenge %s cannot be kept: %w", rec.ID, engine.StoreError(err))
	}
	return true, nil
}

// receiptRow is a receipt that is kept beyond its order.
type receiptRow struct {
	Report json.RawMessage `json:"report"` // the device's signed report on chunk.store
}

const (
	receiptSweep = time.Hour
	// receiptAge is when a receipt is copied out of its order, which is forgotten
	// after retention: most chunks that are removed again are so before.
	receiptAge = retention * 2 / 3
)

// receiptOf is what a device has signed for a chunk; nil where nothing is left.
func (a *audits) receiptOf(ctx context.Context, d wire.DeviceID, id string) json.RawMessage {
	order := a.storage.claim(d, id)
	if order == "" {
		return nil
	}
	if v, err := a.outbox.get(ctx, d, order); err == nil && v.State == wire.Succeeded {
		return v.Report
	}
	v, err := a.receipts.find(ctx, orderKeyOf(d, order))
	if err != nil && !errors.Is(err, errNotFound) {
		a.storage.log.Warn("a receipt cannot be read", "device", d, "chunk", id, "error", err)
	}
	return v.Report
}

// saveReceipts keeps receipts beyond their orders, for as long as there is the
// chunk on the device.
func (a *audits) saveReceipts(ctx context.Context) error {
	have, err := a.receipts.keys(ctx, ">")
	if err != nil {
		return err
	}
	kept := make(map[string]bool, len(have))
	for _, k := range have {
		kept[k] = true
	}
	old := a.outbox.now().Add(-receiptAge)
	var due []string
	a.storage.chunks.each(func(_ string, c chunkRecord) bool {
		for _, h := range c.Holders {
			key := orderKeyOf(h.Device, h.Order)
			if h.Since.Before(old) && !kept[key] {
				due = append(due, key)
			}
			delete(kept, key)
		}
		return true
	})
	for _, key := range due {
		d, order := parseOrderKey(key)
		v, err := a.outbox.get(ctx, d, order)
		if errors.Is(err, errNotFound) || err == nil && v.State != wire.Succeeded {
			continue
		}
		if err == nil {
			err = a.receipts.create(ctx, key, receiptRow{v.Report})
		}
		if err != nil && !errors.Is(err, errExists) {
			return err
		}
	}
	for key := range kept { // of chunks that are gone
		if err := a.receipts.remove(ctx, key, func(receiptRow) bool { return true }); err != nil && !errors.Is(err, errNotFound) {
			return err
		}
	}
	return nil
}

// readEvidence gives the evidence of a challenge, as JSON.
func (a *audits) readEvidence(ctx context.Context, id string) ([]byte, error) {
	if _, err := a.find(ctx, id); err != nil {
		return nil, err
	}
	raw, err := a.evidence.GetBytes(ctx, id)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return nil, refuse(http.StatusNotFound, wire.CodeNotFound, "there is no evidence of challenge %s: it is kept of wrong and lost answers that the device has signed, for a year", id)
	}
	if err != nil {
		return nil, fmt.Errorf("the evidence of challenge %s cannot be read: %w", id, engine.StoreError(err))
	}
	return raw, nil
}

const evidenceFormat = 1

// maxClockSkew is how far the clocks of device and coordinator may be apart.
const maxClockSkew = 5 * time.Minute

// EvidenceChecks is what a check goes by beside the evidence itself.
type EvidenceChecks struct {
	OrderKey ed25519.PublicKey // that the coordinator is known by; nil: the one in the evidence is believed
	// Output is what the job of a compute challenge has put out here; nil: it was
	// not run.
	Output []byte
}

// EvidenceVerdict is what evidence proves.
type EvidenceVerdict struct {
	Device   wire.DeviceID    `json:"device"`
	Kind     api.AuditKind    `json:"kind"`
	Order    string           `json:"order"`
	OrderKey []byte           `json:"order_key"`
	Outcome  api.AuditOutcome `json:"outcome"`
	Reason   string           `json:"reason"`
	Lost     []string         `json:"lost,omitempty"`
	Wrong    []string         `json:"wrong,omitempty"`
	Checked  []string         `json:"checked"`         // sentences: what was verified
	Trusting []string         `json:"trust,omitempty"` // sentences: what rests on the coordinator's word
}

// CheckEvidence judges a challenge again, from the JSON of an [api.Evidence]
// alone. Its error says what the evidence does not prove.
func CheckEvidence(raw []byte, with EvidenceChecks) (v EvidenceVerdict, err error) {
	var e api.Evidence
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil || d.More() {
		return v, errors.New("this is no evidence: it cannot be read, or there is more after its end")
	}
	if e.Format != evidenceFormat {
		return v, fmt.Errorf("this evidence has the format %d, this program knows %d", e.Format, evidenceFormat)
	}
	c := evidenceCheck{Evidence: e, with: with}
	v = EvidenceVerdict{Device: e.Device, Kind: e.Kind, OrderKey: e.OrderKey}
	for _, step := range []func(*EvidenceVerdict) error{c.keys, c.order, c.report, c.receipts, c.judge} {
		if err := step(&v); err != nil {
			return v, err
		}
	}
	return v, nil
}

// evidenceCheck is one run of [CheckEvidence].
type evidenceCheck struct {
	api.Evidence
	with EvidenceChecks

	asked    wire.Order
	answered wire.Report
	sizes    map[string]int64 // signed for by receipts
}

func (c *evidenceCheck) keys(v *EvidenceVerdict) error {
	if len(c.DeviceKey) != ed25519.PublicKeySize || wire.IDOf(c.DeviceKey) != c.Device {
		return fmt.Errorf("the key in it is not that of device %s", c.Device)
	}
	v.Checked = append(v.Checked, "the device's id is the hash of its key")
	if len(c.OrderKey) != ed25519.PublicKeySize {
		return errors.New("there is no valid key in it that orders are signed with")
	}
	if c.with.OrderKey == nil {
		v.Trusting = append(v.Trusting, "that the key which signed the order is the coordinator's; compare it, or give it with --order-key")
		return nil
	}
	if !c.with.OrderKey.Equal(ed25519.PublicKey(c.OrderKey)) {
		return errors.New("the order was signed with another key than the given one")
	}
	v.Checked = append(v.Checked, "the order key is the given one")
	return nil
}

func (c *evidenceCheck) order(v *EvidenceVerdict) (err error) {
	if c.asked, err = wire.OpenAs[wire.Order](c.Order, c.OrderKey, wire.TypeOrder); err != nil {
		return fmt.Errorf("the order: %w", err)
	}
	v.Order = c.asked.ID
	kinds := map[api.AuditKind][]wire.Kind{api.StorageAudit: {wire.KindAudit}, api.ComputeAudit: {wire.KindJobRun}, api.DisputeAudit: {wire.KindJobRun},
		api.Confession: {wire.KindChunkLosses, wire.KindChunkServe}, api.DrainReceipt: {wire.KindChunkHoldings}}
	if !slices.Contains(kinds[c.Kind], c.asked.Kind) {
		return fmt.Errorf("an order of the kind %q is none of a %q challenge", c.asked.Kind, c.Kind)
	}
	if c.asked.Device != c.Device {
		return fmt.Errorf("the order is for device %s, not %s", c.asked.Device, c.Device)
	}
	v.Checked = append(v.Checked, "the order is signed, and for this device")
	return nil
}

func (c *evidenceCheck) report(v *EvidenceVerdict) (err error) {
	if c.answered, err = wire.OpenAs[wire.Report](c.Report, c.DeviceKey, wire.TypeReport); err != nil {
		return fmt.Errorf("the device's report: %w", err)
	}
	switch {
	case c.answered.Device != c.Device || c.answered.Order != c.asked.ID:
		return errors.New("the report is not on this order")
	case !c.answered.State.Terminal():
		return fmt.Errorf("the report says that the order is %s, which is no end", c.answered.State)
	case c.answered.Dropped:
		return errors.New("the device had to give up what it had answered (its outbox was full): that proves nothing")
	case c.answered.TimeConfidence == wire.ClockTrusted && c.answered.At.Before(c.asked.Issued.Add(-maxClockSkew)):
		return errors.New("the report was signed before the order was made")
	}
	v.Checked = append(v.Checked, "the report is signed by the device, and on this order")
	return nil
}

// receipts opens what the device has signed for the chunks that are said to be
// wrong or lost, and says for which there is nothing.
func (c *evidenceCheck) receipts(v *EvidenceVerdict) error {
	c.sizes = make(map[string]int64)
	for id, raw := range c.Receipts {
		if !slices.Contains(c.Wrong, id) && !slices.Contains(c.Lost, id) {
			return fmt.Errorf("there is a receipt for %q, which is not claimed to be wrong or lost", id)
		}
		r, err := wire.OpenAs[wire.Report](raw, c.DeviceKey, wire.TypeReport)
		if err != nil {
			return fmt.Errorf("the receipt for chunk %s: %w", id, err)
		}
		size := receiptFor(r, id)
		if r.State != wire.Succeeded || r.Device != c.Device || chunk.CheckSize(size) != nil {
			return fmt.Errorf("what is given as the receipt for chunk %s is none", id)
		}
		if n, ok := c.Sizes[id]; ok && n != size {
			return fmt.Errorf("chunk %s is said to have %d bytes, the device has signed for %d", id, n, size)
		}
		c.sizes[id] = size
	}
	for _, id := range slices.Concat(c.Wrong, c.Lost) {
		if c.sizes[id] == 0 {
			return fmt.Errorf("there is no receipt for chunk %s: it is not proved that the device ever held it", id)
		}
	}
	if len(c.sizes) > 0 {
		v.Checked = append(v.Checked, fmt.Sprintf("the device has signed that it stored %s, and the size", chunksOf(len(c.sizes))))
		v.Trusting = append(v.Trusting, "that no order to drop these chunks was out")
	}
	return nil
}

// receiptFor is the size with which a report says that a chunk is durable: it is a
// receipt, or the result of a job that made the chunk. 0: it does not say so.
func receiptFor(r wire.Report, id string) int64 {
	var stored wire.Receipt
	if json.Unmarshal(r.Body, &stored) == nil && stored.ID == id && stored.Volume != "" {
		return stored.Size
	}
	var made wire.JobResult
	if json.Unmarshal(r.Body, &made) == nil {
		for _, o := range made.Outputs {
			for _, p := range o.Parts {
				if p.Chunk == id {
					return p.Size
				}
			}
		}
	}
	return 0
}

func (c *evidenceCheck) judge(v *EvidenceVerdict) error {
	if c.Kind == api.DrainReceipt {
		return c.judgeDrain(v)
	}
	if c.Outcome != api.AuditWrong && c.Outcome != api.AuditLost {
		return fmt.Errorf("it claims %q: there is evidence of wrong and lost only", c.Outcome)
	}
	a := response{report: c.answered, attachment: c.Attachment, missing: c.Missing}
	if at := c.answered.Attachment; at != nil && !isStaged(c.answered) {
		a.attachment, a.missing = at.Inline, false
	}
	if !isStaged(c.answered) && (len(c.Attachment) > 0 || c.Missing) {
		return errors.New("there is an attachment that the device has not signed for")
	}
	if isStaged(c.answered) && !c.Missing { // bytes that the device did not sign are no proof against it
		if _, ok := judgeAttachment(a); !ok {
			return errors.New("the attachment is not the one that the device signed for; only the coordinator can say whether the device sent it so")
		}
	}
	var got verdict
	var err error
	switch c.Kind {
	case api.StorageAudit:
		got, err = c.judgeStorage(a)
	case api.ComputeAudit, api.DisputeAudit:
		got, err = c.judgeCompute(a, v)
	case api.Confession:
		got, err = c.judgeConfession(a)
	}
	if err != nil {
		return err
	}
	v.Outcome, v.Reason, v.Lost, v.Wrong = got.Outcome, got.Reason, got.Lost, got.Wrong
	if got.Outcome != c.Outcome || !sameSet(got.Wrong, c.Wrong) || !sameSet(got.Lost, c.Lost) {
		return fmt.Errorf("it claims that the answer is %s, but by what was signed it is %s (%s)", c.Outcome, got.Outcome, got.Reason)
	}
	return nil
}

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

func (c *evidenceCheck) judgeStorage(a response) (verdict, error) {
	asked, err := wire.DecodeBody[wire.Audit](c.asked)
	if err != nil {
		return verdict{}, err
	}
	if asked.Nonce == "" || !asked.Deadline.After(c.asked.Issued) || asked.Deadline.After(c.asked.Expires.Add(maxClockSkew)) {
		return verdict{}, errors.New("the challenge has no nonce, or a deadline that is none")
	}
	tooLarge := c.answered.Attachment != nil && c.answered.Attachment.Size > maxLeafBytes(len(asked.Items))
	if a.missing && !tooLarge {
		return verdict{}, errors.New("the leaves are missing: that the device signed for them and never sent them rests on the coordinator's word alone")
	}
	var ids []string
	for _, it := range asked.Items {
		ids = append(ids, it.Chunk)
	}
	slices.Sort(ids)
	if !slices.Equal(slices.Compact(ids), slices.Sorted(maps.Keys(c.Sizes))) {
		return verdict{}, errors.New("the sizes in it are not those of the chunks that were asked for")
	}
	// What was released does not count as lost; that it was is the coordinator's
	// word, and it speaks for the device.
	released := make(map[string]bool)
	for _, it := range asked.Items {
		released[it.Chunk] = !slices.Contains(c.Lost, it.Chunk)
	}
	return judgeStorage(asked, c.Sizes, a, released), nil
}

func (c *evidenceCheck) judgeCompute(a response, v *EvidenceVerdict) (verdict, error) {
	asked, err := wire.DecodeBody[wire.JobRun](c.asked)
	if err != nil {
		return verdict{}, err
	}
	got := judgeCompute(asked, c.Expected, a, false)
	if got.Outcome != api.AuditWrong {
		return got, nil
	}
	if a.missing {
		return got, errors.New("the output is missing: that the device signed for it and never sent it rests on the coordinator's word alone")
	}
	if c.Kind == api.ComputeAudit { // of a dispute the result was not known before
		salt, err1 := hex.DecodeString(c.Salt)
		expected, err2 := hex.DecodeString(c.Expected)
		if err1 != nil || err2 != nil || commitment(salt, expected) != c.Commitment {
			return got, errors.New("the commitment does not open to the expected result")
		}
		v.Checked = append(v.Checked, "the commitment opens to the expected result")
	}
	if len(asked.Inputs) > 0 || len(asked.Env) > 0 || len(asked.Outputs) > 0 {
		return got, errors.New("the expected result is the coordinator's word: this job has inputs or outputs with names, or an environment, and cannot be run again by this command")
	}
	if c.with.Output == nil {
		return got, errors.New("the expected result is the coordinator's word so far: give the module with --module and the input chunk with --input to have the job run here")
	}
	if sum := sha256.Sum256(c.with.Output); hex.EncodeToString(sum[:]) != c.Expected {
		return got, errors.New("the job has another result here than the coordinator expected")
	}
	v.Checked = append(v.Checked, "the job, run here, has the expected result")
	return got, nil
}

// judgeConfession finds the chunks in what the device has signed: a list of losses, or
// that it does not have the one that it was told to serve.
func (c *evidenceCheck) judgeConfession(a response) (verdict, error) {
	if c.asked.Kind == wire.KindChunkServe {
		asked, err := wire.DecodeBody[wire.ChunkServe](c.asked)
		if err == nil && (c.answered.State != wire.Failed && c.answered.State != wire.Rejected || !saysLost(c.answered.Code)) {
			err = errors.New("the device does not say that it has lost the chunk that it was told to serve")
		}
		return verdict{Outcome: api.AuditLost, Reason: "the device does not have a chunk that it was told to serve", Lost: []string{asked.ID}}, err
	}
	if c.answered.State != wire.Succeeded || a.missing {
		return verdict{}, errors.New("the device's list is not in it")
	}
	var list []wire.ChunkLoss
	if err := json.Unmarshal(a.attachment, &list); err != nil {
		return verdict{}, errors.New("the device's list of losses cannot be read")
	}
	said := make(map[string]bool, len(list))
	for _, l := range list {
		said[l.ID] = true
	}
	got := verdict{Outcome: api.AuditLost, Reason: "the device says by itself that it has lost " + chunksOf(len(list))}
	for _, id := range c.Lost {
		if !said[id] {
			return got, fmt.Errorf("the device does not say that it has lost chunk %s", id)
		}
		got.Lost = append(got.Lost, id)
	}
	if len(got.Lost) == 0 {
		return got, errors.New("it names no chunk")
	}
	return got, nil
}

// JobOf is the job that evidence of a compute challenge or a dispute is about, for who runs it
// again: module's SHA-256, arguments and input chunk. Nothing of it is verified.
func JobOf(raw []byte) (wire.JobRun, error) {
	var e api.Evidence
	if err := json.Unmarshal(raw, &e); err != nil || e.Kind != api.ComputeAudit && e.Kind != api.DisputeAudit {
		return wire.JobRun{}, errors.New("this is no evidence of a compute challenge or a dispute")
	}
	o, err := wire.Reread[wire.Order](e.Order)
	if err != nil {
		return wire.JobRun{}, err
	}
	return wire.DecodeBody[wire.JobRun](o)
}
