package test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/test/testbed/ploy"
	"github.com/deimos-edge/deimos/wire"
)

// TestAKillInTheMiddleOfVerifyingIsMadeUpForOnce kills coordinator, the agent that verifies,
// and both, when one owner's device has a result and the other's is at it. The result is not
// given out before the other has it too; in the end it stands once, each device was asked
// once, and none did the work twice but the one that was killed.
func TestAKillInTheMiddleOfVerifyingIsMadeUpForOnce(t *testing.T) {
	t.Parallel()
	f := newFleet(t, effectAgent, serving("--no-audit-jobs"))
	f.token = f.NewToken(2)
	first, second := f.add(device{}), f.add(device{})
	const gate = "gate"
	f.plot(second, ploy.Ploy{Name: "second", Gate: gate})
	for _, d := range f.devices {
		d.start()
	}
	first.awaitOnline()
	second.awaitOnline()
	first.ownedBy("ann")
	second.ownedBy("ben")
	module := f.Write("echo.wasm", []byte(echo))
	door := filepath.Join(filepath.Dir(second.program), gate)

	for i, c := range []struct {
		name               string
		coordinator, agent bool
	}{{"the coordinator", true, false}, {"the agent", false, true}, {"both", true, true}} {
		f.Sub(c.name, func(t *testing.T) {
			name := fmt.Sprint("input-", i)
			text := []byte("of " + name + "\n")
			f.Put(name, text, "--replicas", "2")
			var job api.Job
			f.OK(&job, "job", "run", module, "--input", name, "--verify", "always", "--start")
			half := func() (v api.JobTask, ok bool) {
				j, err := f.Client.Job(f.Ctx, job.ID, 0)
				if err != nil || len(j.Open) != 1 || len(j.Open[0].Attempts) != 2 {
					return v, false
				}
				done := 0
				for _, a := range j.Open[0].Attempts {
					switch {
					case a.Device == first.id && a.State == wire.Succeeded && !a.Ended.IsZero(), a.Device == second.id && a.State == wire.Running:
						done++
					}
				}
				return j.Open[0], done == 2 && j.Open[0].Code == "verifying"
			}
			f.Until("one result being there, and the other device at it", func() bool { _, ok := half(); return ok })
			if c.agent {
				second.proc.Kill()
			}
			if c.coordinator {
				f.Serve.Kill()
				f.StartServe()
			}
			if c.agent {
				second.start()
			}
			first.awaitOnline()
			second.awaitOnline()
			f.Until("the task being verified as before", func() bool { _, ok := half(); return ok })
			if part, err := f.Client.JobResults(f.Ctx, job.ID, "", 0); err != nil || len(part.Results) != 0 {
				t.Errorf("a result was given out that nobody else stands behind: %+v %v", part, err)
			}

			if err := os.WriteFile(door, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			n := 0
			if err := f.Client.EachJobResult(f.Ctx, job.ID, func(r api.JobResult) error {
				n++
				if r.VerifiedBy != api.ByOwners || string(r.Output) != string(text) || len(r.Attempts) != 2 || len(r.Corrections) > 0 {
					t.Errorf("%q: %+v", r.Output, r.JobTask)
				}
				for _, a := range r.Attempts {
					if a.State != wire.Succeeded {
						t.Errorf("%+v", a)
					}
				}
				return nil
			}, nil); err != nil {
				t.Fatal(err)
			}
			if n != 1 {
				t.Errorf("%d results", n)
			}
			for _, d := range f.devices {
				var all api.OrderList
				f.OK(&all, "order", "list", "--kind", string(wire.KindJobRun), "--device", string(d.id))
				if len(all.Orders) != i+1 {
					t.Errorf("%s was given %d orders for %d jobs", d.name, len(all.Orders), i+1)
				}
				h, err := f.Client.Honesty(f.Ctx, d.id)
				if err != nil || h.Wrong != 0 || len(h.Penalties) != 0 {
					t.Errorf("%s: %+v %v", d.name, h, err)
				}
			}
			if err := os.Remove(door); err != nil {
				t.Fatal(err)
			}
		})
	}
}
