package engine

import (
	"bytes"
	"testing"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/wire"
)

func TestDeviceTalksOnItsOwnTopics(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d := w.ca.device(t)
		c := w.connect(t, d)
		for _, ch := range []wire.Channel{wire.ChannelReport, wire.ChannelBeat, wire.ChannelPresence} {
			got := listen(t, w.Conn(), wire.Subject("", ch))
			for qos := byte(0); qos <= 1; qos++ {
				c.publish(t, wire.Topic(d.id, ch), qos, false, []byte{'0' + qos})
				m := next(t, got, "a message on "+string(ch))
				if m.Subject != wire.Subject(d.id, ch) || string(m.Data) != string('0'+rune(qos)) {
					t.Errorf("got %q on %s", m.Data, m.Subject)
				}
			}
		}
		if code := c.subscribe(t, wire.Topic(d.id, wire.ChannelOrder), 0); code != 0 {
			t.Fatalf("the subscription of its own orders was answered with %#x", code)
		}
		must(t, w.Conn().Publish(wire.Subject(d.id, wire.ChannelOrder), []byte("do")))
		if m := next(t, c.got, "the order"); string(m.Payload()) != "do" || m.Topic() != wire.Topic(d.id, wire.ChannelOrder) {
			t.Errorf("got %q on %s", m.Payload(), m.Topic())
		}
	})
}

func TestLargestMessagePassesBothWays(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d := w.ca.device(t)
		c := w.connect(t, d)
		big := bytes.Repeat([]byte("x"), wire.MaxMessage)
		reports := listen(t, w.Conn(), wire.Subject("", wire.ChannelReport))
		c.publish(t, wire.Topic(d.id, wire.ChannelReport), 1, false, big)
		if m := next(t, reports, "the report"); !bytes.Equal(m.Data, big) {
			t.Errorf("the report arrived with %d bytes", len(m.Data))
		}
		c.subscribe(t, wire.Topic(d.id, wire.ChannelOrder), 0)
		must(t, w.Conn().Publish(wire.Subject(d.id, wire.ChannelOrder), big))
		if m := next(t, c.got, "the order"); !bytes.Equal(m.Payload(), big) {
			t.Errorf("the order arrived with %d bytes", len(m.Payload()))
		}
		// More than that ends the connection.
		c.Publish(wire.Topic(d.id, wire.ChannelReport), 0, false, bytes.Repeat(big, 2))
		next(t, c.lost, "the end of the connection")
		select {
		case m := <-reports:
			t.Errorf("%d bytes passed", len(m.Data))
		default:
		}
	})
}

// TestDeviceCannotPublishElsewhere watches all three accounts and a victim.
func TestDeviceCannotPublishElsewhere(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d, victim := w.ca.device(t), w.ca.device(t)
		v := w.connect(t, victim)
		v.subscribe(t, wire.Topic(victim.id, wire.ChannelOrder), 0)
		c := w.connect(t, d)

		coordinator := listen(t, w.Conn(), "deimos.>")
		state := listen(t, w.Conn(), "$JS.>")
		kv := listen(t, w.Conn(), "$KV.>")
		devices := listen(t, w.keep.nc, "deimos.>")
		mqttState := listen(t, w.keep.nc, "$MQTT.msgs.>")
		system := listen(t, w.sys, "$SYS.REQ.>")

		for _, topic := range []string{
			wire.Topic(victim.id, wire.ChannelReport),
			wire.Topic(victim.id, wire.ChannelBeat),
			wire.Topic(victim.id, wire.ChannelPresence),
			wire.Topic(victim.id, wire.ChannelOrder),
			wire.Topic(d.id, wire.ChannelOrder),
			wire.Topic(d.id, wire.ChannelReport) + "/more",
			"deimos/1/" + string(d.id),
			"deimos/2/" + string(d.id) + "/report",
			"$SYS/REQ/SERVER/PING",
			"$SYS/REQ/USER/AUTH",
			"$JS/API/STREAM/LIST",
			"$JS/API/INFO",
			"$KV/registry/x",
			"$MQTT/sess/x",
			"$MQTT/msgs/" + "deimos/1/" + string(victim.id) + "/order",
			"spBv1.0/group/NBIRTH/node",
		} {
			for qos := byte(0); qos <= 1; qos++ {
				c.publish(t, topic, qos, false, []byte("forged"))
			}
		}
		// The fence: messages of one connection are dealt with in order.
		c.publish(t, wire.Topic(d.id, wire.ChannelBeat), 0, false, []byte("fence"))
		for _, ch := range []struct {
			name string
			m    string
		}{
			{"the coordinator", string(next(t, coordinator, "the fence").Data)},
			{"the devices' account", string(next(t, devices, "the fence").Data)},
		} {
			if ch.m != "fence" {
				t.Errorf("a forged message reached %s", ch.name)
			}
		}
		must(t, w.Conn().Publish(wire.Subject(victim.id, wire.ChannelOrder), []byte("fence")))
		if m := next(t, v.got, "the fence"); string(m.Payload()) != "fence" {
			t.Errorf("the victim got %q on %s", m.Payload(), m.Topic())
		}
		must(t, w.Conn().FlushTimeout(patience))
		must(t, w.sys.FlushTimeout(patience))
		must(t, w.keep.nc.FlushTimeout(patience))
		for name, n := range map[string]int{
			"JetStream": len(state), "the buckets": len(kv), "MQTT's streams": len(mqttState), "the system account": len(system),
		} {
			if n > 0 {
				t.Errorf("%d forged messages reached %s", n, name)
			}
		}
	})
}

func TestDeviceCannotSubscribeElsewhere(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d, victim := w.ca.device(t), w.ca.device(t)
		c := w.connect(t, d)
		for _, filter := range []string{
			"#", "+/#", "deimos/#", "deimos/1/+/order", "deimos/1/+/report", "deimos/1/" + string(d.id) + "/#",
			wire.Topic(victim.id, wire.ChannelOrder),
			wire.Topic(victim.id, wire.ChannelReport),
			wire.Topic(d.id, wire.ChannelReport),
			"$SYS/#", "$JS/#", "$KV/#", "$MQTT/#", "$MQTT/msgs/#", "$MQTT/sub/#", "$MQTT/deliver/pubrel/#", "_INBOX/#",
		} {
			if code := c.subscribe(t, filter, 0); code != 0x80 {
				t.Errorf("the subscription of %s was answered with %#x", filter, code)
			}
		}
		if code := c.subscribe(t, wire.Topic(d.id, wire.ChannelOrder), 0); code != 0 {
			t.Fatalf("the subscription of its own orders was answered with %#x", code)
		}
		v := w.connect(t, victim)
		reports := listen(t, w.Conn(), wire.Subject("", wire.ChannelReport))
		v.publish(t, wire.Topic(victim.id, wire.ChannelReport), 1, false, []byte("secret"))
		next(t, reports, "the victim's report")
		must(t, w.Conn().Publish(wire.Subject(victim.id, wire.ChannelOrder), []byte("secret")))
		must(t, w.Conn().Publish(wire.Subject(d.id, wire.ChannelOrder), []byte("fence")))
		if m := next(t, c.got, "the fence"); string(m.Payload()) != "fence" {
			t.Errorf("got %q on %s", m.Payload(), m.Topic())
		}
	})
}

// TestNothingOfADeviceIsKept is what keeps a fleet from filling the disk.
func TestNothingOfADeviceIsKept(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d := w.ca.device(t)
		c := w.connect(t, d, func(o *mqtt.ClientOptions) { o.SetCleanSession(false) })
		beats := listen(t, w.Conn(), wire.Subject("", wire.ChannelBeat))
		for qos := byte(0); qos <= 1; qos++ {
			c.publish(t, wire.Topic(d.id, wire.ChannelBeat), qos, true, []byte("keep me"))
			next(t, beats, "the retained beat, which is delivered all the same")
		}
		// Each subscription above QoS 0 would be a consumer.
		for qos := byte(1); qos <= 2; qos++ {
			if code := c.subscribe(t, wire.Topic(d.id, wire.ChannelOrder), qos); code != 0x80 {
				t.Errorf("a subscription at QoS %d was answered with %#x", qos, code)
			}
		}
		for _, name := range []string{"$MQTT_rmsgs", "$MQTT_msgs", "$MQTT_out", "$MQTT_qos2in"} {
			consumers := 0
			if name == "$MQTT_rmsgs" {
				consumers = 1 // the server's own
			}
			// The server takes back a refused subscription's consumer, and an
			// acknowledged message, a moment after its answer.
			var info *jetstream.StreamInfo
			for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
				s, err := w.keep.js.Stream(t.Context(), name)
				must(t, err)
				if info = s.CachedInfo(); info.State.Msgs == 0 && info.State.Consumers == consumers || time.Now().After(deadline) {
					break
				}
			}
			if info.State.Msgs != 0 {
				t.Errorf("%s keeps %d messages", name, info.State.Msgs)
			}
			if info.State.Consumers != consumers {
				t.Errorf("%s has %d consumers", name, info.State.Consumers)
			}
		}
		acc, err := w.keep.js.AccountInfo(t.Context())
		must(t, err)
		if acc.Store != 0 || acc.Streams != len(mqttStreams()) {
			t.Errorf("the devices' account has %d bytes in files and %d streams", acc.Store, acc.Streams)
		}
		if l := acc.Limits; l.MaxStore != 0 || l.MaxMemory != mqttMemory || l.MaxStreams != len(mqttStreams()) {
			t.Errorf("the devices' account may have %d bytes in files, %d in memory and %d streams", l.MaxStore, l.MaxMemory, l.MaxStreams)
		}
		c.Publish(wire.Topic(d.id, wire.ChannelBeat), 2, false, []byte("twice is enough"))
		next(t, c.lost, "the end of a connection that publishes at QoS 2")
		if len(beats) != 0 {
			t.Error("a QoS 2 message was delivered")
		}
	})
}

// TestSessionIsThereAfterReconnect: a session that is not clean keeps its
// subscription.
func TestSessionIsThereAfterReconnect(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d := w.ca.device(t)
		keep := func(o *mqtt.ClientOptions) { o.SetCleanSession(false) }
		c := w.connect(t, d, keep)
		c.subscribe(t, wire.Topic(d.id, wire.ChannelOrder), 0)
		c.Disconnect(100)

		o, again := w.options(d, keep)
		again.Client = mqtt.NewClient(o)
		tok := again.Connect().(*mqtt.ConnectToken)
		must(t, done(tok))
		t.Cleanup(func() { again.Disconnect(0) })
		if !tok.SessionPresent() {
			t.Fatal("the session is not there")
		}
		beats := listen(t, w.Conn(), wire.Subject("", wire.ChannelBeat))
		again.publish(t, wire.Topic(d.id, wire.ChannelBeat), 0, false, nil) // the session is set up when this is through
		next(t, beats, "the beat")
		must(t, w.Conn().Publish(wire.Subject(d.id, wire.ChannelOrder), []byte("do")))
		next(t, again.got, "the order without a new subscription")
	})
}

func TestLastWillIsPublishedOnDrop(t *testing.T) {
	bothModes(t, func(t *testing.T, w *world) {
		d, victim := w.ca.device(t), w.ca.device(t)
		presence := listen(t, w.Conn(), wire.Subject("", wire.ChannelPresence))
		closed := listen(t, w.sys, "$SYS.ACCOUNT."+accountDevices+".DISCONNECT")

		// A will for somebody else is dropped; the server tells of the end of a
		// connection after its will.
		c := w.connect(t, d, func(o *mqtt.ClientOptions) {
			o.SetBinaryWill(wire.Topic(victim.id, wire.ChannelPresence), []byte("forged"), 0, false)
		})
		c.cut()
		next(t, closed, "the end of the first connection")

		c = w.connect(t, d, func(o *mqtt.ClientOptions) {
			o.SetBinaryWill(wire.Topic(d.id, wire.ChannelPresence), []byte("gone"), 1, false)
		})
		c.cut()
		if m := next(t, presence, "the last will"); string(m.Data) != "gone" || m.Subject != wire.Subject(d.id, wire.ChannelPresence) {
			t.Errorf("got %q on %s", m.Data, m.Subject)
		}
	})
}
