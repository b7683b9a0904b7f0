package coordinator

import (
	"crypto/ed25519"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/deimos-edge/deimos/wire"
)

// hearFrom is a message on a device's topic, as it comes from the broker.
func (w *world) hearFrom(t *testing.T, d *device, ch wire.Channel, typ wire.PayloadType, v any) {
	t.Helper()
	raw, err := wire.Seal(d.key, typ, v)
	must(t, err)
	w.hear(testContext(t), &nats.Msg{Subject: wire.Subject(d.id, ch), Data: raw})
}

func TestADeviceSpeaksForItselfAlone(t *testing.T) {
	w := aWorld(t)
	d, victim := w.enrolled(t), w.enrolled(t)
	entries := func() int {
		w.reg.mu.Lock()
		defer w.reg.mu.Unlock()
		return len(w.reg.live)
	}
	before := entries()
	invented := wire.IDOf(newKey(t).Public().(ed25519.PublicKey))
	for _, id := range []wire.DeviceID{victim.id, invented, ""} {
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: id, Capacity: 1 << 40})
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: id, Online: true, Session: "s", Nonce: newNonce()})
		if id != "" && w.reg.online(id) {
			t.Errorf("a device made %s look online", id)
		}
	}
	if n := entries(); n != before {
		t.Errorf("%d entries of devices that did not speak are kept", n-before)
	}
	w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id})
	if !w.reg.online(d.id) {
		t.Error("a device's own beat does not count")
	}
}

func TestADevicesSpaceIsWithinReason(t *testing.T) {
	w := aWorld(t)
	d := w.enrolled(t)
	for _, n := range []int64{-1, -1 << 63, 1<<63 - 1} {
		w.hearFrom(t, d, wire.ChannelBeat, wire.TypeBeat, wire.Beat{Device: d.id, Capacity: n, Used: n})
		w.reg.mu.Lock()
		l := *w.reg.live[d.id]
		w.reg.mu.Unlock()
		if l.capacity < 0 || l.capacity > 1<<60 || l.used < 0 || l.used > 1<<60 {
			t.Errorf("beat: %d was taken as %d, %d used", n, l.capacity, l.used)
		}
		w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: "s", Nonce: newNonce(), Capacity: n, Used: n})
		v, err := w.reg.device(d.id)
		must(t, err)
		if v.Capacity < 0 || v.Capacity > 1<<60 || v.Used < 0 || v.Used > 1<<60 {
			t.Errorf("presence: %d was taken as %d, %d used", n, v.Capacity, v.Used)
		}
	}
}
