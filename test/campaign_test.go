package test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// A fleet of simulated devices: 100, or as many as CAMPAIGN says.
const (
	campaignDevices = 100
	failingPercent  = 3
	silentPercent   = 2
	campaignSilence = "30s"
	campaignBeat    = "5s"
	partSize        = 64 << 10
)

// followers is a fleet of devices that take releases.
type followers struct {
	*fleet
	testbed.Followers
	rng  *rand.Rand
	list []*testbed.Follower

	mu   sync.Mutex
	fate map[string]map[int]testbed.Fate // by version
	twin map[int]repo.Source             // what a device reads in the repository's place
}

// newFollowers has n of them online, and the keys of releases made.
func newFollowers(t *testing.T, n int, opts ...option) *followers {
	t.Helper()
	v := &followers{rng: testbed.Seeded(t), fate: map[string]map[int]testbed.Fate{}, twin: map[int]repo.Source{}}
	v.fleet = newFleet(t, opts...)
	v.Dir = t.TempDir()
	v.OK(nil, "release", "keys", "init", "--keys", v.Path("release-keys"))
	v.Publish("")
	v.Fate = func(d int, version string) testbed.Fate {
		v.mu.Lock()
		defer v.mu.Unlock()
		return v.fate[version][d]
	}
	v.Mirror = func(d int, s repo.Source) repo.Source {
		v.mu.Lock()
		defer v.mu.Unlock()
		if twin := v.twin[d]; twin != nil {
			return twin
		}
		return s
	}
	began := time.Now()
	stop := v.Follow(n, &v.Followers)
	t.Cleanup(stop) // before the fleet ends
	v.list = v.All()
	t.Logf("%d devices are online after %.1f s", n, time.Since(began).Seconds())
	return v
}

// release publishes a version; of those who take it some fail and some fall silent.
func (v *followers) release(version string, fate map[int]testbed.Fate) {
	v.T.Helper()
	v.mu.Lock()
	v.fate[version] = fate
	v.mu.Unlock()
	dir := v.Path("bundle-" + version)
	if err := testbed.ToyBundle(dir, version, testbed.RandomBytes(v.rng, partSize)); err != nil {
		v.T.Fatal(err)
	}
	v.Publish(dir)
}

// campaign begins one, as an operator does.
func (v *followers) campaign(version string, args ...string) (c api.Campaign) {
	v.T.Helper()
	v.OK(&c, append([]string{"release", "campaign", "start", version, "--all", "--silent-after", campaignSilence, "--rate", "1000"}, args...)...)
	return c
}

func (v *followers) now(id string) (c api.Campaign) {
	v.T.Helper()
	c, err := v.Client.Campaign(v.Ctx, id)
	if err != nil {
		v.T.Fatal(err)
	}
	return c
}

// until waits for what becomes of a campaign.
func (v *followers) until(id, what string, f func(c api.Campaign) bool) (c api.Campaign) {
	v.T.Helper()
	defer func() {
		if v.T.Failed() {
			v.T.Logf("%s %s, %v", c.State, c.Reason, c.Counts)
		}
	}()
	v.Until(what, func() bool { c = v.now(id); return f(c) })
	return c
}

func (v *followers) ends(id string, as api.CampaignState) api.Campaign {
	v.T.Helper()
	return v.until(id, "the campaign being "+string(as), func(c api.Campaign) bool { return c.State == as })
}

// parts is whom each phase of these percentages has, as each device finds out for
// itself: all of the phases before, and at least one.
func (v *followers) parts(version string, percent ...float64) (parts [][]*testbed.Follower) {
	point := func(d *testbed.Follower) float64 { return bundle.RolloutPoint(version, string(d.ID)) }
	order := slices.SortedFunc(slices.Values(v.list), func(a, b *testbed.Follower) int { return cmp.Compare(point(a), point(b)) })
	for _, p := range percent {
		n, _ := slices.BinarySearchFunc(order, p, func(d *testbed.Follower, p float64) int { return cmp.Compare(point(d), p) })
		parts = append(parts, order[:max(n, 1)])
	}
	return parts
}

// draw says who fails and who falls silent, so many of all, until one of the first
// devices does.
func (v *followers) draw(first []*testbed.Follower) map[int]testbed.Fate {
	n := len(v.list)
	for {
		fate := map[int]testbed.Fate{}
		for i, d := range v.rng.Perm(n)[:n*(failingPercent+silentPercent)/100] {
			if fate[d] = testbed.FallsSilent; i < n*failingPercent/100 {
				fate[d] = testbed.Fails
			}
		}
		if slices.ContainsFunc(first, func(d *testbed.Follower) bool { return fate[d.N] != testbed.Takes }) {
			return fate
		}
	}
}

// asked is the orders of a version that a device was given.
func asked(d *testbed.Follower, version string) (out []wire.Order) {
	for _, o := range d.Orders() {
		if b, err := wire.DecodeBody[wire.UpdateInstall](o); err == nil && b.Version == version {
			out = append(out, o)
		}
	}
	return out
}

// TestACampaignStopsByItselfAndStrandsNobody: of the devices that take a release 3%
// fail and 2% fall silent. The campaign stops in the first phase that has one of them,
// and no device of a later phase was asked, has fetched a byte or lost its connection.
// Another one is aborted half way. After both, and the silent ones' return, everybody
// takes the next release.
func TestACampaignStopsByItselfAndStrandsNobody(t *testing.T) {
	t.Parallel()
	n, phases := campaignDevices, []float64{10, 30, 100}
	if s := os.Getenv("CAMPAIGN"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < campaignDevices {
			t.Fatalf("CAMPAIGN=%s is no number of devices, from %d on", s, campaignDevices)
		}
		phases = []float64{1, 10, 100}
	}
	v := newFollowers(t, n, func(f *fleet) { f.Beat = campaignBeat; f.Patience = 3 * testbed.Patience }, serving("--enrol-rate", "1000"))
	var flags []string
	for _, p := range phases[:2] {
		flags = append(flags, "--phase", fmt.Sprintf("%v%%:1s", p))
	}
	strict := append([]string{"--max-failed", "0", "--max-silent", "0"}, flags...)

	v.Sub("it stops by itself", func(t *testing.T) {
		const version = "2.0.0"
		parts := v.parts(version, phases...)
		fate := v.draw(parts[1])
		v.release(version, fate)
		of := func(list []*testbed.Follower, f testbed.Fate) (n int) {
			for _, d := range list {
				if fate[d.N] == f {
					n++
				}
			}
			return n
		}
		phase := 0
		for of(parts[phase], testbed.Takes) == len(parts[phase]) {
			phase++
		}
		want := api.CampaignTooManySilent
		if of(parts[phase], testbed.Fails) > 0 {
			want = api.CampaignTooManyFailed
		}
		began := time.Now()
		c := v.campaign(version, strict...)
		c = v.ends(c.ID, api.CampaignStopped)
		if c.Phase != phase || c.Code != want || len(c.Evidence) == 0 {
			t.Errorf("it stopped in phase %d, %s (%s); want phase %d, %s", c.Phase+1, c.Code, c.Reason, phase+1, want)
		}
		for _, e := range c.Evidence {
			i := slices.IndexFunc(v.list, func(d *testbed.Follower) bool { return d.ID == e.Device })
			if i < 0 || fate[i] == testbed.Takes {
				t.Errorf("%s is named as evidence, and was well: %+v", e.Device, e)
			}
		}
		took := time.Since(began)
		touched := 0
		for _, d := range v.list {
			orders := asked(d, version)
			files, bytes := d.Fetched()
			if len(orders) > 0 {
				touched++
			}
			if slices.Contains(parts[phase], d) {
				continue
			}
			if len(orders) > 0 || files > 0 || bytes > 0 || d.Starts() != 1 || d.Runs() != testbed.FirstVersion {
				t.Errorf("device %d, of a later phase: %d orders, %d files and %d bytes fetched, %d starts, runs %s", d.N, len(orders), files, bytes, d.Starts(), d.Runs())
			}
		}
		if touched > len(parts[phase]) || touched == 0 {
			t.Errorf("%d devices were asked, the phase has %d", touched, len(parts[phase]))
		}
		if got := c.Counts[api.StandsLater]; got != n-len(parts[phase]) {
			t.Errorf("%d devices are said to be untouched, %d are", got, n-len(parts[phase]))
		}
		v.Until("all but those that fell silent being online", func() bool {
			online := 0
			for _, x := range v.versions() {
				online += x.Online
			}
			return online == n-v.silent(version)
		})
		t.Logf("%d devices, %d would fail and %d fall silent: stopped in phase %d (%v%%) after %.1f s, %s: %s; %d devices asked, %d untouched",
			n, of(v.list, testbed.Fails), of(v.list, testbed.FallsSilent), phase+1, phases[phase], took.Seconds(), c.Code, c.Reason, touched, n-len(parts[phase]))
		for _, d := range v.list {
			if fate[d.N] == testbed.FallsSilent && len(asked(d, version)) > 0 {
				d.Back()
			}
		}
	})

	v.Sub("aborted", func(t *testing.T) {
		const version = "2.1.0"
		v.release(version, nil)
		c := v.campaign(version, "--phase", "100%", "--rate", strconv.Itoa(n/60)) // all in a minute and more, so that it is aborted before, however busy this machine is
		v.until(c.ID, "some having it", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] >= n/10 })
		v.OK(&c, "release", "campaign", "abort", c.ID, "--reason", "a try")
		if c.State != api.CampaignAborted {
			t.Errorf("it is %s", c.State)
		}
		c = v.until(c.ID, "nobody being in the middle any more", func(c api.Campaign) bool {
			return c.Counts[api.StandsInstalling]+c.Counts[api.StandsAsked]+c.Counts[api.StandsWaiting] == 0
		})
		took, left := 0, 0
		for _, d := range v.list {
			switch now := d.Runs(); {
			case now == version:
				took++
			case len(asked(d, version)) == 0:
				left++
			}
		}
		if took != c.Counts[api.StandsUpdated] || took == n || left == 0 {
			t.Errorf("%d devices run it and %d were not asked, the campaign says %v", took, left, c.Counts)
		}
		t.Logf("aborted when %d of %d devices had it: %d were not asked", took, n, left)
	})

	v.Sub("all follow", func(t *testing.T) {
		const version = "2.2.0"
		v.release(version, nil)
		late := v.list[v.rng.IntN(n)]
		on := late.Off()
		v.Until("one device being away", func() bool { return !v.Device(late.ID).Online })
		began := time.Now()
		c := v.campaign(version, strict...)
		c = v.ends(c.ID, api.CampaignDone)
		took := time.Since(began)
		if c.Counts[api.StandsUpdated] != n-1 || c.Counts[api.StandsAway] != 1 {
			t.Errorf("%v", c.Counts)
		}
		on()
		v.until(c.ID, "who was away following", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] == n })
		for _, d := range v.list {
			if orders := asked(d, version); d.Runs() != version || len(orders) != 1 {
				t.Errorf("device %d runs %s and got %d orders for %s", d.N, d.Runs(), len(orders), version)
			}
		}
		if list := v.versions(); len(list) != 1 || list[0] != (api.VersionCount{Version: version, Devices: n, Online: n}) {
			t.Errorf("%+v", list)
		}
		t.Logf("%d devices follow in %.1f s, through phases of %v%% that soak for a second each", n, took.Seconds(), phases)
	})
}

// versions is who runs what.
func (v *followers) versions() []api.VersionCount {
	v.T.Helper()
	var r api.Releases
	v.OK(&r, "release", "status")
	return r.Versions
}

// silent is how many fell silent of those who were asked.
func (v *followers) silent(version string) (n int) {
	for _, d := range v.list {
		if v.fate[version][d.N] == testbed.FallsSilent && len(asked(d, version)) > 0 {
			n++
		}
	}
	return n
}

// TestACampaignGoesOnWhereItsCoordinatorWasKilled, at each turn of it and at moments of
// chance: no device is asked twice, nor something else than what is on record, no phase
// begins before its time, and what was stopped stays so.
func TestACampaignGoesOnWhereItsCoordinatorWasKilled(t *testing.T) {
	t.Parallel()
	const n, soak = 20, 3 * time.Second
	v := newFollowers(t, n)
	kill := func() {
		t.Helper()
		v.Serve.Kill()
		v.StartServe()
	}
	once := func(version string, most int) (told int) {
		t.Helper()
		for _, d := range v.list {
			orders := asked(d, version)
			if len(orders) > 1 {
				t.Errorf("device %d got %d orders for %s", d.N, len(orders), version)
			}
			for _, o := range orders {
				told++
				kept, err := v.Client.Order(v.Ctx, d.ID, o.ID, 0)
				if err != nil || !bytes.Equal(kept.Order.Body, o.Body) || !kept.Order.Issued.Equal(o.Issued) {
					t.Errorf("device %d was told %s, on record is %s (%v)", d.N, o.Body, kept.Order.Body, err)
				}
			}
		}
		if told > most {
			t.Errorf("%d devices were asked for %s, at most %d were to be", told, version, most)
		}
		return told
	}

	v.release("2.0.0", nil)
	c := v.campaign("2.0.0", "--canary", "4", "--canary-soak", soak.String(), "--phase", "50%:0s:approve", "--rate", "2")
	kill()
	v.until(c.ID, "the canary being under way", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] > 0 })
	kill()
	v.until(c.ID, "the canary soaking", func(c api.Campaign) bool { return !c.Phases[0].Settled.IsZero() })
	told := once("2.0.0", n)
	// The number was taken before the phase: once the canary has soaked, others are asked.
	if v.now(c.ID).Phase == 0 && told > 4 {
		t.Errorf("%d devices were asked for the canary of 4", told)
	}
	kill()
	c = v.until(c.ID, "the second phase being under way", func(c api.Campaign) bool { return c.Counts[api.StandsUpdated] > 4 })
	if p := c.Phases[0]; p.Ended.Sub(p.Settled) < soak {
		t.Errorf("the canary has soaked for %s, not for %s", p.Ended.Sub(p.Settled), soak)
	}
	kill()
	c = v.ends(c.ID, api.CampaignAwaiting)
	kill()
	half := c.Counts[api.StandsUpdated]
	once("2.0.0", half)
	v.OK(&c, "release", "campaign", "approve", c.ID)
	kill()
	c = v.ends(c.ID, api.CampaignDone)
	kill()
	once("2.0.0", n)
	if c = v.now(c.ID); c.State != api.CampaignDone || c.Counts[api.StandsUpdated] != n {
		t.Errorf("%s, %v", c.State, c.Counts)
	}

	all := map[int]testbed.Fate{}
	for _, d := range v.list {
		all[d.N] = testbed.Fails
	}
	v.release("2.1.0", all)
	c = v.campaign("2.1.0", "--canary", "3", "--max-failed", "0", "--rate", "1")
	v.until(c.ID, "one of the canary having failed", func(c api.Campaign) bool { return c.Counts[api.StandsFailed] > 0 })
	kill()
	v.ends(c.ID, api.CampaignStopped)
	kill()

	// Those that come late get 2.0.0, or would, if one lacked it: the stopped one is none.
	v.release("2.2.0", nil)
	d := v.campaign("2.2.0", "--phase", "20%:0s", "--rate", "2")
	for range 4 {
		time.Sleep(time.Duration(v.rng.IntN(3000)) * time.Millisecond) // the moment is the point
		kill()
	}
	v.ends(d.ID, api.CampaignDone)
	once("2.2.0", n)
	once("2.1.0", 3)
	if c = v.now(c.ID); c.State != api.CampaignStopped || c.Code != api.CampaignTooManyFailed || len(c.Evidence) == 0 {
		t.Errorf("%s %s %v", c.State, c.Code, c.Evidence)
	}
}

// TestALogWithTwoFacesIsToldLoudly: who has all keys shows one device another log, of
// the same size, in which the release has other bytes. Each device is content with what
// it sees; the coordinator, which has both reports, is not, and has the proof.
func TestALogWithTwoFacesIsToldLoudly(t *testing.T) {
	t.Parallel()
	const n, deceived = 5, 3
	const version = "2.0.0"
	v := newFollowers(t, n)
	twin := v.Path("twin")
	if err := os.CopyFS(twin, os.DirFS(v.Path("repo"))); err != nil {
		t.Fatal(err)
	}
	v.release(version, nil)
	dir := v.Path("bundle-of-twin")
	if err := testbed.ToyBundle(dir, version, testbed.RandomBytes(v.rng, partSize)); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Publish(repo.PublishOptions{Keys: v.Path("release-keys"), Repo: twin, Bundle: dir, Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	v.mu.Lock()
	v.twin[deceived] = repo.Dir(twin)
	v.mu.Unlock()
	c := v.campaign(version, "--phase", "100%")
	if c = v.ends(c.ID, api.CampaignDone); c.Counts[api.StandsUpdated] != n {
		t.Fatalf("%v", c.Counts)
	}
	var r api.Releases
	v.OK(&r, "release", "status")
	if len(r.Forks) != 1 || r.Forks[0].Size != 1 || len(r.Forks[0].Faces) != 2 {
		t.Fatalf("%+v", r.Forks)
	}
	for _, f := range r.Forks[0].Faces {
		alone := len(f.Shown) == 1 && f.Shown[0].Device == v.list[deceived].ID
		if !alone && len(f.Shown) != n-1 {
			t.Errorf("%+v", f.Shown)
		}
		// The evidence stands by itself: signed by the log, and reported by the device.
		o, err := v.Client.Order(v.Ctx, f.Shown[0].Device, f.Shown[0].Order, 0)
		var told wire.UpdateResult
		if err == nil {
			err = json.Unmarshal(o.Result.Body, &told)
		}
		if err != nil || told.Checkpoint != f.Checkpoint || !strings.Contains(f.Checkpoint, f.Hash) {
			t.Errorf("%v: %q and %q", err, told.Checkpoint, f.Checkpoint)
		}
	}
	said, err := v.Deimos("release", "status")
	if err != nil || !strings.HasPrefix(string(said.Stdout), "✗ THE LOG OF RELEASES HAS 2 FACES") || !strings.Contains(string(said.Stdout), string(v.list[deceived].ID)) {
		t.Errorf("%v\n%s", err, said.Stdout)
	}
	var status api.Status
	v.OK(&status, "status")
	if !slices.ContainsFunc(status.Attention, func(a api.Attention) bool { return a.Code == api.AttentionLogFork }) {
		t.Errorf("%+v", status.Attention)
	}
	verdict := v.Fails(nil, 1, "release", "log", "verify", "--keys", v.Path("release-keys"))
	if !strings.Contains(verdict, "does not agree") {
		t.Error(verdict)
	}
	v.Serve.Kill()
	v.StartServe()
	v.OK(&r, "release", "status")
	if len(r.Forks) != 1 {
		t.Error("it is forgotten with the process")
	}
}
