package coordinator

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

func (w *world) statusNow(t testing.TB) api.Status {
	t.Helper()
	s, err := w.op.Status(testContext(t))
	must(t, err)
	return s
}

func TestStatusIsOneLookAtTheFleet(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	w.cfg.Version = "1.2.3"
	if s := w.statusNow(t); s.Version != "1.2.3" || s.Started.IsZero() || len(s.Attention) != 0 || s.Attention == nil || len(s.Orders.Open)+len(s.Orders.Ended)+len(s.Challenges) != 0 {
		t.Errorf("an empty fleet: %+v", s)
	}
	on, off, gone := w.device(t), w.enrolled(t), w.enrolled(t)
	w.retire(t, gone.id)
	w.knocks(t, newKey(t))
	_, err := w.outbox.submit(ctx, off.id, wire.KindPing, struct{}{}, time.Minute)
	must(t, err)
	on.on(wire.KindPing, func(wire.Order) *reply { return failed("no") })
	for range 2 {
		o, err := w.outbox.submit(ctx, on.id, wire.KindPing, struct{}{}, time.Minute)
		must(t, err)
		_, err = w.outbox.await(ctx, o, nil)
		must(t, err)
	}
	for outcome, n := range map[api.AuditOutcome]int{api.AuditRight: 2, api.AuditWrong: 1} {
		for range n {
			id := ulid.Make().String()
			must(t, w.audits.rows.create(ctx, string(on.id)+"."+id, api.Audit{ID: id, Device: on.id, Outcome: outcome, At: w.now()}))
		}
	}
	old := ulid.Make().String()
	must(t, w.audits.rows.create(ctx, string(off.id)+"."+old, api.Audit{ID: old, Device: off.id, Outcome: api.AuditLost, At: w.now().Add(-lately - time.Minute)}))
	s := w.statusNow(t)
	d := s.Devices
	if d.Online != 1 || d.Offline != 1 || d.Retired != 1 || d.Pending != 1 || d.Warned != 0 {
		t.Errorf("%+v", d)
	}
	if s.Orders.Open[wire.Queued] != 1 || len(s.Orders.Open) != 1 || s.Orders.Ended[wire.Failed] != 2 || len(s.Orders.Ended) != 1 || s.Orders.AtLeast {
		t.Errorf("%+v", s.Orders)
	}
	if s.Challenges[api.AuditRight] != 2 || s.Challenges[api.AuditWrong] != 1 || len(s.Challenges) != 2 {
		t.Errorf("%v", s.Challenges)
	}
	if len(s.Attention) != 1 || s.Attention[0].Code != api.AttentionChallenge || s.Attention[0].About != "device:"+string(on.id) {
		t.Errorf("%+v", s.Attention)
	}
	w.advance(lately + time.Minute)
	if s := w.statusNow(t); len(s.Orders.Ended)+len(s.Challenges)+len(s.Attention) != 0 {
		t.Errorf("a day later: %+v", s)
	}
}

func TestStatusNamesWhatNeedsAttention(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	codes := func() (out []string) {
		for _, a := range w.statusNow(t).Attention {
			if a.Text == "" {
				t.Errorf("%+v", a)
			}
			out = append(out, a.Code+" "+a.About)
		}
		return out
	}
	twin, fussy, gone := w.enrolled(t), w.enrolled(t), w.enrolled(t)
	for _, i := range []string{"a", "b", "a"} {
		w.hearFrom(t, twin, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: twin.id, Online: true, Session: newNonce(), Nonce: newNonce(),
			Instance: i, At: w.now(), TimeConfidence: wire.ClockTrusted})
	}
	for _, d := range []*device{fussy, gone} {
		_, err := w.config.rows.change(ctx, string(d.id), func(v *configRow, _ bool) error {
			v.Version, v.Order, v.Ended, v.State = 1, "x", "x", wire.Succeeded
			v.Reported = &api.ConfigReported{ConfigReport: wire.ConfigReport{Version: 1, Refused: map[string]wire.Refusal{"jobs.slots": {Code: "policy"}}, Running: map[string]json.RawMessage{}}}
			return nil
		})
		must(t, err)
	}
	w.retire(t, gone.id)
	w.newOperator(t, "carol", api.Viewer)
	dave := w.newOperator(t, "dave", api.Viewer)
	_, err := w.op.RevokeOperator(ctx, dave.Name)
	must(t, err)
	must(t, discardToken(w.op.CreateToken(ctx, api.TokenRequest{}))) // for a day: its end is no news
	want := []string{"config device:" + string(fussy.id), "duplicate_key device:" + string(twin.id)}
	if got := codes(); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if s := w.statusNow(t); s.Devices.Warned != 1 {
		t.Errorf("%+v", s.Devices)
	}

	w.advance(defaultOperatorLife - tokenSoon + time.Hour)
	w.hearFrom(t, twin, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: twin.id})
	got := codes()
	want = []string{"certificate device:" + string(twin.id), "config device:" + string(fussy.id), "token operator:carol"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for i := range api.MaxAttention {
		_, err := w.config.rows.change(ctx, string(w.enrolled(t).id), func(v *configRow, _ bool) error {
			v.Version, v.Order, v.Ended, v.State, v.Reason = 1, "x", "x", wire.Failed, strings.Repeat("r", i)
			return nil
		})
		must(t, err)
	}
	if s := w.statusNow(t); len(s.Attention) != api.MaxAttention || s.More != 3 {
		t.Errorf("%d and %d more", len(s.Attention), s.More)
	}
}

func discardToken(_ api.Token, err error) error { return err }

func TestCountsSayWhenTheyMayBeTooLow(t *testing.T) {
	o := newOutbox(nil, nil, nil, time.Now, nil)
	o.ended = newRecent(2)
	now := time.Now()
	add := func(id string, at time.Time) {
		o.ended.add(orderKeyOf("d", id), orderRow{State: wire.Succeeded, Updated: at})
	}
	add("1", now)
	add("2", now)
	if _, ended, atLeast := o.counts(now.Add(-lately)); ended[wire.Succeeded] != 2 || atLeast {
		t.Errorf("all are remembered: %v %t", ended, atLeast)
	}
	add("3", now)
	if _, ended, atLeast := o.counts(now.Add(-lately)); ended[wire.Succeeded] != 2 || !atLeast {
		t.Errorf("one is forgotten: %v %t", ended, atLeast)
	}
	add("4", now.Add(-2*lately))
	if _, ended, atLeast := o.counts(now.Add(-lately)); ended[wire.Succeeded] != 1 || atLeast {
		t.Errorf("what is forgotten is older: %v %t", ended, atLeast)
	}
}
