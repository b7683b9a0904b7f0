package test

import (
	"bytes"
	"crypto/rand"
	"os"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// TestOwnersLimitsKeepBulkAwayAndNothingElse gives a running device hours that are
// not now, and then a volume that is used up. It holds what it has and proves it;
// files are read from and stored on the other device.
func TestOwnersLimitsKeepBulkAwayAndNothingElse(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	config := f.Write("limits.toml", nil)
	f.enrol(1, false, "--config", config)
	f.enrol(1, false)
	limited, free := f.devices[0], f.devices[1]
	data := make([]byte, 3<<20)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	f.Put("both", data, "--replicas", "2")
	later := time.Now().Add(11 * time.Hour)
	limits := map[string]string{
		wire.CodeQuietHours: "hours = \"" + later.Format("15:04") + "-" + later.Add(time.Minute).Format("15:04") + "\"\n",
		// What enrolment and the first file took is above no limit that can be set, so
		// the record says that more was moved.
		wire.CodeMetered: "monthly_bytes = 67108864\n",
	}
	for code, text := range limits {
		limited.stop()
		f.Write("limits.toml", []byte("[transfer]\n"+text))
		if code == wire.CodeMetered {
			month := time.Now().Format("2006-01")
			if err := os.WriteFile(limited.state("traffic.json"), []byte(`{"month":"`+month+`","bytes":67000000,"ahead":0}`), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		limited.start()
		limited.awaitOnline()
		f.Until(code+" is told by a heartbeat", func() bool {
			r := f.Device(limited.id).Rest
			return r != nil && r.Code == code
		})
		f.CheckGet("both", data)
		other := bytes.Clone(data[:1<<20]) // another chunk than those that both hold
		copy(other, code)
		for _, h := range holdersOf(f, f.Put(code, other, "--replicas", "1").Name) {
			if h != free.id {
				t.Errorf("%s: a chunk was stored on %s", code, h)
			}
		}
		f.CheckStorage(limited.name, limited.id)
	}
	if s := f.Device(limited.id).Score; s == nil || len(s.Penalties) != 0 {
		t.Errorf("its score is %+v", s)
	}
}

func holdersOf(f *fleet, name string) (ids []wire.DeviceID) {
	f.T.Helper()
	places, err := f.Client.ObjectPlacements(f.Ctx, name)
	if err != nil {
		f.T.Fatal(err)
	}
	for _, p := range places {
		for _, h := range p.Holders {
			ids = append(ids, h.Device)
		}
	}
	return ids
}
