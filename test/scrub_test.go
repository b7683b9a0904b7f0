package test

import (
	"crypto/rand"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// TestALossIsReportedBeforeItIsAskedFor flips a bit on the disk of a device that
// runs. Nobody reads the object and nobody asks for an audit: the device finds it,
// says so, and the coordinator notes it.
func TestALossIsReportedBeforeItIsAskedFor(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	// A round of some seconds: 0.00005 days.
	config := f.Write("scrub.toml", []byte("[scrub]\ndays = 0.00005\n"))
	f.enrol(1, false, "--config", config)
	d := f.devices[0]
	data := make([]byte, 3<<20)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	o := f.Put("photos", data, "--replicas", "1")
	if n := len(o.Chunks); n != 3 {
		t.Fatalf("%d chunks", n)
	}
	f.Until("everything on the volume is verified once", func() bool {
		s := f.Device(d.id).Scrubs
		return len(s) == 1 && !s[0].Verified.IsZero()
	})
	if lost := lostOf(f, "photos"); len(lost) != 0 {
		t.Fatalf("lost before anything was damaged: %v", lost)
	}
	damage(t, d.state("volumes", "main"), o.Chunks[1])
	f.Until("the loss is known to the coordinator", func() bool { return len(lostOf(f, "photos")) > 0 })
	if lost := lostOf(f, "photos"); len(lost) != 1 || lost[0] != o.Chunks[1].ID {
		t.Errorf("lost are %v, damaged was %s", lost, o.Chunks[1].ID)
	}
	// The device was told to forget it, and does not tell of it for ever.
	f.Until("the lost chunk is dropped", func() bool {
		list, err := f.Client.Orders(f.Ctx, api.OrderQuery{Kind: "chunk.drop", Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Orders) == 1 && list.Orders[0].State == "SUCCEEDED"
	})
	told, err := f.Client.Orders(f.Ctx, api.OrderQuery{Kind: "chunk.losses", Limit: 10})
	if err != nil || len(told.Orders) != 1 || told.Orders[0].State != "SUCCEEDED" {
		t.Errorf("the device was asked what it lost: %+v, %v", told.Orders, err)
	}
	asked, err := f.Client.Orders(f.Ctx, api.OrderQuery{Kind: "audit", Limit: 10})
	if err != nil || len(asked.Orders) != 0 {
		t.Errorf("audits were asked: %+v, %v", asked.Orders, err)
	}
	r, err := f.Deimos("device", "show", string(d.id))
	if err != nil || !strings.Contains(string(r.Stdout), "verified") {
		t.Errorf("device show does not say what is verified: %v\n%s", err, r.Stdout)
	}
}

// lostOf lists the chunks of an object of which a holder is noted as lost.
func lostOf(f *fleet, name string) (ids []string) {
	f.T.Helper()
	places, err := f.Client.ObjectPlacements(f.Ctx, name)
	if err != nil {
		f.T.Fatal(err)
	}
	for _, p := range places {
		for _, h := range p.Holders {
			if h.Lost {
				ids = append(ids, p.ID)
			}
		}
	}
	return ids
}
