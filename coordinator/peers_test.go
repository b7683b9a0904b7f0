package coordinator

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// peers are coordinators of one fleet: they have the keys and the message server in
// common, and the clock of the first.
func peers(t testing.TB, n int, edit func(*Config)) []*world {
	t.Helper()
	dir := t.TempDir()
	var text bytes.Buffer
	must(t, WriteNATSConfig(&text, testConfig(dir)))
	opts := new(server.Options)
	must(t, opts.ProcessConfigString(text.String()))
	opts.NoSigs = true
	opts.Host, opts.Port = "127.0.0.1", server.RANDOM_PORT
	opts.MQTT.Host, opts.MQTT.Port = "127.0.0.1", server.RANDOM_PORT
	srv, err := server.NewServer(opts)
	must(t, err)
	go srv.Start()
	t.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	if !srv.ReadyForConnections(patience) {
		t.Fatal("the message server does not start")
	}
	out := make([]*world, n)
	for i := range out {
		at := dir
		if i > 0 {
			at = t.TempDir()
			must(t, os.CopyFS(filepath.Join(at, "keys"), os.DirFS(filepath.Join(dir, "keys"))))
		}
		w := openWith(t, at, func(c *Config) {
			c.NATS, c.MQTT = "tls://"+srv.Addr().String(), fmt.Sprintf("127.0.0.1:%d", opts.MQTT.Port)
			edit(c)
			if i > 0 {
				c.now = out[0].time
			}
		})
		if i > 0 {
			w.skew, w.frozen = out[0].skew, out[0].frozen
		}
		t.Cleanup(w.Close)
		out[i] = w
	}
	return out
}

// working tells whether a coordinator works at anything, and whether it would and has
// found that another one does.
func (w *world) working() (works, leaves bool) {
	r := w.repairs
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, v := range r.tasks {
		works = works || v.working
		leaves = leaves || !v.working && !v.state.whole() && v.problem == "" && v.next.After(r.now())
	}
	return works, leaves
}

// Two coordinators read from a device that has lost what they read, at the same time: it
// is one loss, and costs once.
func TestOfTwoCoordinatorsOneCountsALoss(t *testing.T) {
	t.Parallel()
	both := peers(t, 2, func(*Config) {})
	for range 20 {
		key, _, err := ed25519.GenerateKey(nil)
		must(t, err)
		d := wire.IDOf(key)
		var found errgroup.Group
		for _, w := range both {
			order, id := ulid.Make().String(), chunk.Sum(someBytes(100)).String()
			found.Go(func() error {
				return errors.Join(w.audits.missed(testContext(t), d, id, order), w.audits.missed(testContext(t), d, id, order))
			})
		}
		must(t, found.Wait())
		s, err := both[0].audits.scores.find(testContext(t), string(d))
		must(t, err)
		if len(s.Penalties) != 1 || s.Confessed != 1 {
			t.Fatalf("a loss that two have found costs %d times: %+v", len(s.Penalties), s)
		}
	}
}

// Two coordinators see the same loss at the same time: one of them mends it, once.
// When one is dead that held the lease, another goes on after that has ended.
func TestOfTwoCoordinatorsOneMendsAStripe(t *testing.T) {
	t.Parallel()
	both := peers(t, 2, func(c *Config) { c.Repair, c.Beat = testRepair, time.Hour })
	one, two := both[0], both[1]
	devices := one.devices(t, 9)
	f := one.putCoded(t, "both", 30_000, api.Code{Data: 4, Parity: 2})
	var stores atomic.Int32
	release := make(chan struct{})
	for _, d := range devices {
		d.on(wire.KindChunkStore, func(o wire.Order) *reply {
			stores.Add(1)
			<-release
			return d.honest(o)
		})
	}
	one.retire(t, f.placed[0].Holders[0].Device)
	eventually(t, "one works at it, and the other one knows", func() bool {
		if n := stores.Load(); n > 1 {
			close(release)
			t.Fatalf("%d devices are asked to store one shard", n)
		}
		a, x := one.working()
		b, y := two.working()
		return stores.Load() == 1 && (a && y || b && x)
	})
	close(release)
	for _, w := range both {
		w.untilWhole(t, "both")
		eventually(t, "nothing is left to do", func() bool { return w.repairs.summary().Endangered == 0 })
	}
	if n := one.repairs.summary().Done + two.repairs.summary().Done; n != 1 || stores.Load() != 1 {
		t.Errorf("one shard was missing: %d were made anew, %d stored", n, stores.Load())
	}

	u := one.unitOf(t, f.placed[1].ID)
	must(t, one.repairs.leases.create(testContext(t), u.key, lease{By: "one that is dead", Until: one.time().Add(leaseLife).UTC()}))
	one.retire(t, f.placed[1].Holders[0].Device)
	eventually(t, "both leave it alone", func() bool {
		_, x := one.working()
		_, y := two.working()
		return x && y
	})
	if n := stores.Load(); n != 1 {
		t.Errorf("%d are stored while another coordinator has the lease", n-1)
	}
	one.advance(leaseLife + time.Second)
	for _, w := range both {
		w.untilWhole(t, "both")
	}
	if n := stores.Load(); n != 2 {
		t.Errorf("after the lease, %d were stored for one", n-1)
	}
	one.checkHolders(t, devices, "both")
	must(t, f.get(t, two))
}
