package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"
)

// keeper makes the streams that nats-server's MQTT would otherwise make for
// itself, without limits and in files: here they are in memory and bounded. It
// does so again after each restart of an external server, before a device is
// let in; the devices' account has no file storage, so that a device that comes
// too early is refused, not served wrongly.
type keeper struct {
	nc  *nats.Conn
	js  jetstream.JetStream
	log func(msg string, args ...any)

	ok     atomic.Bool
	redo   chan struct{}
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// mqttStreams are the streams as nats-server's mqtt.go makes them (names,
// subjects, retention), but for storage and limits.
func mqttStreams() []jetstream.StreamConfig {
	const room = mqttMemory / 8
	return []jetstream.StreamConfig{
		{ // one record a session
			Name: "$MQTT_sess", Subjects: []string{"$MQTT.sess.>"}, Retention: jetstream.LimitsPolicy,
			MaxMsgsPerSubject: 1, MaxMsgSize: 4 << 10, MaxBytes: mqttMemory / 2, Discard: jetstream.DiscardOld,
		},
		{ // QoS 1 publishes; nobody may subscribe above QoS 0, so nothing is kept
			Name: "$MQTT_msgs", Subjects: []string{"$MQTT.msgs.>"}, Retention: jetstream.InterestPolicy, MaxBytes: room,
		},
		{ // no retained message is as small as one byte with its headers: all are refused
			Name: "$MQTT_rmsgs", Subjects: []string{"$MQTT.rmsgs.>"}, Retention: jetstream.LimitsPolicy,
			MaxMsgsPerSubject: 1, MaxMsgSize: 1, MaxBytes: 1 << 20,
		},
		{ // QoS 2 is rejected; MQTT wants the stream all the same
			Name: "$MQTT_qos2in", Subjects: []string{"$MQTT.qos2.in.>"}, Retention: jetstream.LimitsPolicy,
			MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew, DiscardNewPerSubject: true, MaxBytes: 1 << 20,
		},
		{
			Name: "$MQTT_out", Subjects: []string{"$MQTT.out.>"}, Retention: jetstream.InterestPolicy, MaxBytes: 1 << 20,
		},
	}
}

func (e *Engine) startKeeper(ctx context.Context, c Config, key nkeys.KeyPair) (_ *keeper, err error) {
	k := &keeper{log: c.Log.Error, redo: make(chan struct{}, 1)}
	k.nc, err = e.connect(ctx, c, "keeper", key,
		nats.DisconnectErrHandler(func(*nats.Conn, error) { k.ok.Store(false) }),
		nats.ReconnectHandler(func(*nats.Conn) { k.again() }))
	if err != nil {
		return nil, err
	}
	if k.js, err = jetstream.New(k.nc); err == nil {
		err = k.makeStreams(ctx)
	}
	if err != nil {
		k.nc.Close()
		return nil, err
	}
	ctx, k.cancel = context.WithCancel(context.Background())
	k.done.Go(func() { k.run(ctx) })
	return k, nil
}

func (k *keeper) again() {
	select {
	case k.redo <- struct{}{}:
	default:
	}
}

// run makes the streams anew whenever the server may have lost them.
func (k *keeper) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.redo:
		}
		try, cancel := context.WithTimeout(ctx, requestTimeout)
		err := k.makeStreams(try)
		cancel()
		if err == nil || ctx.Err() != nil {
			continue
		}
		k.log("devices cannot connect for now", "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
			k.again()
		}
	}
}

func (k *keeper) makeStreams(ctx context.Context) error {
	for _, cfg := range mqttStreams() {
		cfg.Storage = jetstream.MemoryStorage
		cfg.Replicas = 1
		if _, err := k.js.CreateOrUpdateStream(ctx, cfg); err != nil {
			if errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) {
				return fmt.Errorf("the message server runs without JetStream for devices; start it with the configuration made for it: %w", err)
			}
			return fmt.Errorf("prepare the message server for MQTT (%s): %w", cfg.Name, err)
		}
	}
	k.ok.Store(true)
	return nil
}

// ready tells whether devices may be let in.
func (k *keeper) ready() bool { return k.ok.Load() }

func (k *keeper) close() {
	k.cancel()
	k.done.Wait()
	k.nc.Close()
}
