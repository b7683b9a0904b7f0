package coordinator

import (
	"fmt"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/trust"
	"github.com/deimos-edge/deimos/wire"
)

// A task is placed among 10,000 devices: one that all could do, and one whose input none holds
// that is there.
func BenchmarkChoose(b *testing.B) {
	w := jobWorld(b)
	all, room := make([]jobDevice, 10_000), make(map[wire.DeviceID]int)
	for i := range all {
		id := wire.DeviceID(fmt.Sprintf("device%018d", i))
		all[i] = jobDevice{id: id, arch: "arm64", as: trust.Copy{Device: id, Owner: string(id)}, jobs: ready(), slots: 1, trust: 1}
		room[id] = 1
	}
	there := newFleet(all)
	for name, input := range map[string]string{"all": "", "none": "nobody holds it"} {
		a := asked{run: wire.JobRun{Module: wire.Blob{SHA256: "m"}, Input: input}}
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if c, _ := w.jobs.choose(a, taskRow{}, there, room, false); (c == nil) != (input != "") {
					b.Fatal(c)
				}
			}
		})
	}
}
