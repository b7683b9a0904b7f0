package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// FuzzReceive attacks the order topic from two sides. What the coordinator did
// not sign must do nothing. What it did sign, whatever is in it, must not hurt:
// the handler sees only whole orders for this device, and each that is answered
// is answered in a signed report.
func FuzzReceive(f *testing.F) {
	owner := newAuthority(f)
	var ran []wire.Order
	r := startRig(f, owner, newIdentity(f), f.TempDir(), func(_ context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
		ran = append(ran, o) // the fuzz body waits for the end of each order
		tell(wire.Progress{Done: 0.5})
		return wire.Outcome{Body: json.RawMessage(`{}`)}, nil
	})
	good, err := json.Marshal(r.order("seed"))
	if err != nil {
		f.Fatal(err)
	}
	ack, err := json.Marshal(wire.Ack{Device: r.id.ID, Reports: []wire.Acked{{Order: "seed", Seq: r.epoch + 3}}})
	if err != nil {
		f.Fatal(err)
	}
	for _, typ := range []wire.PayloadType{wire.TypeOrder, wire.TypeAck, wire.TypeReport, ""} {
		f.Add(string(typ), good, good)
		f.Add(string(typ), ack, owner.seal(wire.TypeOrder, r.order("seed"))[1:])
	}
	f.Add(string(wire.TypeOrder), []byte(`{"id":"x","device":"`+r.id.ID+`","kind":"?","expires":"9999-12-31T23:59:59Z"}`), []byte(`{"payload":"","payloadType":"","signatures":[{}]}`))
	f.Add(string(wire.TypeOrder), bytes.Repeat([]byte(`[`), 10000), bytes.Repeat([]byte(`{"payload":`), 1000))
	f.Add(string(wire.TypeOrder), []byte(`null`), []byte(`null`))
	public := owner.order.Public().(ed25519.PublicKey)
	f.Fuzz(func(t *testing.T, typ string, signed, unsigned []byte) {
		for len(r.reports) > 0 {
			<-r.reports
		}
		ran = ran[:0]
		if _, _, err := wire.Open(unsigned, public); err != nil {
			if err := r.receive(r.ctx, unsigned); err == nil {
				t.Fatalf("taken without a signature: %q", unsigned)
			}
			r.wait()
			if len(r.reports) != 0 || len(ran) != 0 {
				t.Fatalf("%d reports and %d effects without a signature", len(r.reports), len(ran))
			}
		}
		if !json.Valid(signed) {
			return // cannot be sealed
		}
		raw, err := wire.Seal(owner.order, wire.PayloadType(typ), json.RawMessage(signed))
		if err != nil {
			return
		}
		err = r.receive(r.ctx, raw)
		r.wait()
		for _, o := range ran {
			if o.Device != r.id.ID || o.ID == "" || o.Expires.Before(time.Now().Add(-time.Minute)) || wire.PayloadType(typ) != wire.TypeOrder {
				t.Fatalf("carried out: %+v", o)
			}
		}
		if len(ran) > 1 || err != nil && len(ran)+len(r.reports) > 0 {
			t.Fatalf("%d effects and %d reports with error %v", len(ran), len(r.reports), err)
		}
		if len(r.inFlight) != 0 {
			t.Fatalf("%d orders are left in flight", len(r.inFlight))
		}
	})
}
