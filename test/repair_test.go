package test

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// repairing has the coordinator make anew what is away for a minute.
var repairing = serving("--repair-grace", "1m")

// onDevice is the agent with an id.
func (f *fleet) onDevice(id wire.DeviceID) *device {
	f.T.Helper()
	i := slices.IndexFunc(f.devices, func(d *device) bool { return d.id == id })
	if i < 0 {
		f.T.Fatalf("device %s is none of ours", id)
	}
	return f.devices[i]
}

// spread is, stripe by stripe, which devices hold shards that they have not lost.
func (f *fleet) spread(name string, width int) (stripes [][]wire.DeviceID) {
	f.T.Helper()
	places, err := f.Client.ObjectPlacements(f.Ctx, name)
	if err != nil {
		f.T.Fatal(err)
	}
	for part := range slices.Chunk(places, width) {
		var on []wire.DeviceID
		for _, p := range part {
			for _, h := range p.Holders {
				if !h.Lost {
					on = append(on, h.Device)
				}
			}
		}
		slices.Sort(on)
		stripes = append(stripes, slices.Compact(on))
	}
	return stripes
}

// putSealed stores a file with the default code.
func (f *fleet) putSealed(name string, size int) []byte {
	f.T.Helper()
	data := make([]byte, size)
	if _, err := rand.Read(data); err != nil {
		f.T.Fatal(err)
	}
	f.OK(nil, "object", "put", f.Write(name+".in", data), "--name", name)
	return data
}

// comesBack gets a file and compares it.
func (f *fleet) comesBack(name string, data []byte) {
	f.T.Helper()
	out := filepath.Join(f.T.TempDir(), name)
	f.OK(nil, "object", "get", name, "--out", out)
	got, err := os.ReadFile(out)
	if err != nil {
		f.T.Fatal(err)
	}
	if !slices.Equal(got, data) {
		f.T.Errorf("%s came back as something else", name)
	}
}

// TestDestroyedDevicesAreRepairedAndOneIsDrained: agents with real stores are killed
// and wiped, the coordinator is killed in the middle of the repair, and then an agent
// in the middle of its drain. Everything is whole again each time, and the last one
// signs that it is empty.
func TestDestroyedDevicesAreRepairedAndOneIsDrained(t *testing.T) {
	t.Parallel()
	f := newFleet(t, repairing)
	f.enrol(9, false)
	data := f.putSealed("photos", 24<<20)
	stripes := f.spread("photos", 6)
	for _, id := range stripes[0][:2] {
		d := f.onDevice(id)
		d.kill()
		if err := os.RemoveAll(d.state("volumes")); err != nil {
			t.Fatal(err)
		}
		f.OK(nil, "device", "retire", string(id), "--yes")
	}
	// In the middle: as soon as something was placed anew.
	f.Until("the repair having begun", func() bool {
		v, err := f.Client.Repair(f.Ctx)
		return err == nil && (v.Done > 0 || v.Working > 0)
	})
	f.Serve.Kill()
	f.StartServe()
	for _, d := range f.devices {
		if !slices.Contains(stripes[0][:2], d.id) {
			d.awaitOnline()
		}
	}
	whole := func() bool {
		v, err := f.Client.Repair(f.Ctx)
		if err != nil || v.Endangered > 0 {
			return false
		}
		for _, on := range f.spread("photos", 6) {
			if len(on) < 6 {
				return false
			}
		}
		return true
	}
	f.Until("everything being whole again", whole)
	f.comesBack("photos", data)

	d := f.onDevice(f.spread("photos", 6)[0][0])
	f.OK(nil, "device", "drain", string(d.id))
	f.Until("the drain having begun", func() bool {
		v, err := f.Client.Drain(f.Ctx, string(d.id))
		return err == nil && v.Alone < v.Chunks
	})
	d.proc.Kill()
	d.start()
	var v api.Drain
	f.OK(&v, "device", "drain", string(d.id), "--wait")
	if v.State != api.DrainDone || v.Left != 0 || v.Moved == 0 {
		t.Errorf("the drain ended as %+v", v)
	}
	r, err := f.Deimos("device", "drain", string(d.id), "--receipt")
	if err != nil {
		t.Fatal(err)
	}
	r, err = f.Deimos("audit", "check", f.Write("receipt.json", r.Stdout))
	if err != nil || !strings.Contains(string(r.Stdout), "holds no chunk") {
		t.Errorf("the receipt is judged as %s %s: %v", r.Stdout, r.Stderr, err)
	}
	f.OK(nil, "device", "retire", string(d.id), "--yes")
	f.Until("nothing being endangered by that", whole)
	f.comesBack("photos", data)
}
