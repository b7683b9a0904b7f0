package coordinator

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/deimos-edge/deimos/wire"
)

// answering is a device as cheap as one can be: it checks an order, signs a
// terminal report and takes the ack, without MQTT between.
type answering struct {
	mu    sync.Mutex
	acked map[string]chan struct{}
}

func (a *answering) wait(order string) chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, ok := a.acked[order]
	if !ok {
		c = make(chan struct{})
		a.acked[order] = c
	}
	return c
}

func answeringDevice(b *testing.B, w *world, d *device) *answering {
	b.Helper()
	a := &answering{acked: make(map[string]chan struct{})}
	nc, pub := w.eng.Conn(), w.auth.orderKey.Public().(ed25519.PublicKey)
	sub, err := nc.Subscribe(wire.Subject(d.id, wire.ChannelOrder), func(m *nats.Msg) {
		typ, payload, err := wire.Open(m.Data, pub)
		if err != nil {
			b.Error(err)
			return
		}
		switch typ {
		case wire.TypeOrder:
			var o wire.Order
			_ = json.Unmarshal(payload, &o)
			raw, err := wire.Seal(d.key, wire.TypeReport, wire.Report{Order: o.ID, Device: d.id, Seq: 1, State: wire.Succeeded,
				At: o.Issued, Body: json.RawMessage(`{"agent":"1.0.0","uptime":1}`)})
			if err == nil {
				err = nc.Publish(wire.Subject(d.id, wire.ChannelReport), raw)
			}
			if err != nil {
				b.Error(err)
			}
		case wire.TypeAck:
			var v wire.Ack
			_ = json.Unmarshal(payload, &v)
			for _, r := range v.Reports {
				close(a.wait(r.Order))
			}
		}
	})
	must(b, err)
	b.Cleanup(func() { _ = sub.Unsubscribe() })
	must(b, nc.Flush())
	return a
}

// BenchmarkOrderRoundTrip is an order from submit to the ack of its terminal
// report: two signatures made and one checked on this side, two durable writes.
// By the profile, Ed25519 takes 36% of the processor (half of it is the device's,
// which runs here too), JSON 14%, the state store's server and files some 12%.
func BenchmarkOrderRoundTrip(b *testing.B) {
	for _, parallel := range []int{1, 64} {
		b.Run(fmt.Sprint(parallel), func(b *testing.B) {
			w := ownWorld(b)
			devices := make([]*device, parallel)
			ends := make([]*answering, parallel)
			for i := range devices {
				devices[i] = w.enrolled(b)
				ends[i] = answeringDevice(b, w, devices[i])
				w.reg.beat(wire.Beat{Device: devices[i].id})
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
			defer cancel()
			jobs := make(chan struct{}, parallel)
			b.ResetTimer()
			var wg sync.WaitGroup
			for i, d := range devices {
				wg.Go(func() {
					for range jobs {
						o, err := w.outbox.submit(ctx, d.id, wire.KindPing, struct{}{}, time.Minute)
						if err != nil {
							b.Error(err)
							continue
						}
						v, err := w.outbox.await(ctx, o, nil)
						if err != nil || v.State != wire.Succeeded {
							b.Errorf("%s %v", v.State, err)
							continue
						}
						select {
						case <-ends[i].wait(o.ID):
						case <-ctx.Done():
							b.Error("no ack")
						}
					}
				})
			}
			for range b.N {
				jobs <- struct{}{}
			}
			close(jobs)
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "orders/s")
			b.StopTimer()
			st, err := w.outbox.rows.kv.Status(ctx)
			must(b, err)
			b.ReportMetric(float64(st.Bytes())/float64(st.Values()), "B/record")
		})
	}
}
