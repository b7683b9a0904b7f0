package coordinator

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// BenchmarkReleaseStatusOfALargeFleet is one look of an operator's at the releases of
// 100,000 devices on record, over HTTPS: one campaign under way, to half of them, of
// which each fiftieth has failed, and as many that have ended as are shown. ns/op is
// the time of a look, cpu-s that of all processors, look-MiB what the coordinator and the operator allocate for it.
func BenchmarkReleaseStatusOfALargeFleet(b *testing.B) {
	const devices = 100_000
	w := openWith(b, b.TempDir(), func(c *Config) {
		c.campaignPace = campaignPace{step: time.Hour, retry: time.Hour, stuck: time.Hour, lease: time.Hour}
	})
	b.Cleanup(w.Close)
	ids := make([]wire.DeviceID, devices)
	var g errgroup.Group
	g.SetLimit(64)
	for i := range ids {
		ids[i] = wire.IDOf(fmt.Appendf(nil, "%032d", i))
		d := api.DeviceRecord{ID: ids[i], Agent: "1.0.0", OS: "linux", Arch: "arm64", Board: "test", Group: fmt.Sprint("group-", i%10)}
		if i%2 == 0 {
			d.Agent = "2.0.0"
		}
		g.Go(func() error { return w.reg.rows.create(context.Background(), string(d.ID), d) })
	}
	must(b, g.Wait())
	now := time.Now().UTC()
	for n := range api.MaxCampaigns {
		row := campaignRow{ID: ulid.MustNew(ulid.Timestamp(now)+uint64(n), nil).String(), Version: "2.0.0", To: api.Selector{All: true}, State: api.CampaignDone, Created: now, Ended: now.Add(time.Duration(n)),
			Phases: []phaseRow{{CampaignPhase: percent(50), Began: now}, {CampaignPhase: percent(100)}}}
		if n == 0 {
			row.State = api.CampaignPaused
			row.Stop, _ = stopOf(api.CampaignStop{})
			row.Stop.FailedShare = noShare
		}
		must(b, w.campaigns.rows.create(b.Context(), row.ID, row))
		id, _ := ulid.Parse(row.ID)
		for i, d := range ids {
			o := orderRow{State: wire.Succeeded, Updated: now}
			if i%100 == 1 {
				o.State, o.Code = wire.Failed, wire.CodeRolledBack
			}
			if n < 3 { // the orders of older ones are forgotten
				w.campaigns.heard(d, offerID(id, d, 0), o)
			}
		}
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	var took []time.Duration
	cpu := cpuTime(b)
	for b.Loop() {
		began := time.Now()
		v, err := w.op.Releases(context.Background())
		must(b, err)
		if len(v.Campaigns) != api.MaxCampaigns || v.Campaigns[0].Counts[api.StandsFailed] != devices/100 {
			b.Fatalf("%+v", v.Campaigns[0].Counts)
		}
		took = append(took, time.Since(began))
	}
	b.ReportMetric((cpuTime(b)-cpu).Seconds()/float64(len(took)), "cpu-s")
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/float64(len(took))/(1<<20), "look-MiB")
	b.ReportMetric(slices.Max(took).Seconds(), "slowest-s")
	b.ReportMetric(float64(before.HeapAlloc)/(1<<20), "heap-MiB")
}

// cpuTime is what this process has computed for.
func cpuTime(t testing.TB) time.Duration {
	var u unix.Rusage
	must(t, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
