package coordinator

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
)

// What people are shown of campaigns, and where they ask for it.

// isBad tells whether a device counts against the release.
func isBad(a at) bool { return a.standing == api.StandsFailed || a.standing == api.StandsSilent }

// bad is the devices that failed or are silent, the newest first, [api.MaxEvidence]
// at most.
func (s *campaigns) bad(ctx context.Context, row campaignRow) []api.CampaignDevice {
	var out []api.CampaignDevice
	s.look(row, func(d *member, o *orderNow, a at) {
		if isBad(a) {
			out = append(out, deviceIn(row, d, o, a))
		}
	})
	return s.worst(ctx, out)
}

func (s *campaigns) worst(ctx context.Context, out []api.CampaignDevice) []api.CampaignDevice {
	slices.SortFunc(out, func(a, b api.CampaignDevice) int {
		return cmp.Or(b.Updated.Compare(a.Updated), cmp.Compare(a.Device, b.Device))
	})
	out = slices.Clone(out[:min(len(out), api.MaxEvidence)])
	s.explain(ctx, out)
	return append([]api.CampaignDevice{}, out...)
}

func deviceIn(row campaignRow, d *member, o *orderNow, a at) api.CampaignDevice {
	out := api.CampaignDevice{Device: d.ID, Standing: a.standing, Phase: a.phase, Agent: d.Agent, Code: a.code, LastSeen: d.last.UTC()}
	if d.last.IsZero() {
		out.LastSeen = time.Time{}
	}
	if id, err := ulid.ParseStrict(row.ID); o != nil && err == nil {
		out.Order, out.Updated, out.Progress = offerID(id, d.ID, o.attempt), o.updated.UTC(), o.progress
	}
	return out
}

// explain adds the sentences that devices gave. What cannot be read has none.
func (s *campaigns) explain(ctx context.Context, list []api.CampaignDevice) {
	var g errgroup.Group
	g.SetLimit(resultReaders)
	for i := range list {
		if d := &list[i]; d.Order != "" && d.Code != "" {
			g.Go(func() error {
				if v, err := s.outbox.get(ctx, d.Device, d.Order); err == nil {
					d.Reason = v.Result.Reason
				}
				return nil
			})
		}
	}
	_ = g.Wait() // see above
}

// view is a campaign as operators see it, without the devices that failed.
func (s *campaigns) view(row campaignRow) api.Campaign {
	now := s.now() // before all else, see look
	fleet := s.fleet()
	v, _ := s.viewAt(row, now, fleet)
	v.Current = s.current(fleet)[row.ID]
	return v
}

// viewAt also gives the devices that failed or are silent. Who asks fills in Current.
func (s *campaigns) viewAt(row campaignRow, now time.Time, fleet []member) (_ api.Campaign, bad []api.CampaignDevice) {
	there, lack := 0, 0 // who does not have it, and is online or not
	t := s.lookAt(row, now, fleet, func(d *member, o *orderNow, a at) {
		if isBad(a) {
			bad = append(bad, deviceIn(row, d, o, a))
		}
		if row.runs(d.Agent) {
			return
		}
		if lack++; d.online {
			there++
		}
	})
	v := api.Campaign{ID: row.ID, Version: row.Version, Selector: row.To, Stop: row.Stop.view(), Rate: row.Rate, By: row.By, Created: row.Created,
		State: row.State, Phase: row.Phase, Code: row.Code, Reason: row.Reason, Ended: row.Ended, Evidence: row.Evidence,
		Devices: t.devices, Counts: t.counts, Reasons: []api.StandingReason{}, Failed: []api.CampaignDevice{}}
	for i, p := range row.Phases {
		v.Phases = append(v.Phases, api.PhaseState{CampaignPhase: p.CampaignPhase, Share: p.Share, Began: p.Began, Settled: p.Settled,
			Approved: p.Approved, ApprovedBy: p.ApprovedBy, Ended: p.Ended, Devices: t.phases[i].devices, Counts: t.phases[i].counts})
	}
	for r, n := range t.reasons {
		r.Devices = n
		v.Reasons = append(v.Reasons, r)
	}
	slices.SortFunc(v.Reasons, func(a, b api.StandingReason) int {
		return cmp.Or(cmp.Compare(b.Devices, a.Devices), cmp.Compare(a.Standing, b.Standing), cmp.Compare(a.Code, b.Code))
	})
	v.Reasons = v.Reasons[:min(len(v.Reasons), api.MaxEvidence)]
	if p := row.Phases[row.Phase]; row.State == api.CampaignRunning {
		switch {
		case row.awaits(now):
			v.State, v.Holdup = api.CampaignAwaiting, fmt.Sprintf("phase %d waits for an approval", row.Phase+1)
		case p.Began.IsZero():
			if want := min(p.Count, lack); there < want {
				v.Holdup = fmt.Sprintf("phase %d begins when %d devices without the release are online; %d are", row.Phase+1, want, there)
			}
		case row.lull(t) != "":
			v.Holdup = row.lull(t)
		case p.Settled.IsZero():
			v.Holdup = row.holdup(t)
		}
	}
	return v, bad
}

// current is the campaigns that are the newest that is done for one of a fleet's devices.
func (s *campaigns) current(fleet []member) map[string]bool {
	done := s.rows.all(func(a, b campaignRow) int { return b.Ended.Compare(a.Ended) })
	done = slices.DeleteFunc(done, func(r campaignRow) bool { return r.State != api.CampaignDone })
	out := make(map[string]bool)
	for i := range fleet {
		if n := slices.IndexFunc(done, func(r campaignRow) bool { return r.To.Matches(fleet[i].DeviceRecord) }); n >= 0 {
			out[done[n].ID] = true
		}
	}
	return out
}

// show is one campaign with the devices that failed.
func (s *campaigns) show(ctx context.Context, id string) (api.Campaign, error) {
	row, ok := s.rows.get(id)
	if !ok {
		return api.Campaign{}, errNoCampaign(id)
	}
	v := s.view(row)
	v.Failed = s.bad(ctx, row)
	return v, nil
}

// list is some of a campaign's devices.
func (s *campaigns) list(ctx context.Context, id string, standing api.Standing, after string, limit int) (api.CampaignDevices, error) {
	out := api.CampaignDevices{Devices: []api.CampaignDevice{}}
	row, ok := s.rows.get(id)
	if !ok {
		return out, errNoCampaign(id)
	}
	s.look(row, func(d *member, o *orderNow, a at) {
		if string(d.ID) > after && (standing == "" || standing == a.standing) {
			out.Devices = append(out.Devices, deviceIn(row, d, o, a))
		}
	})
	slices.SortFunc(out.Devices, func(a, b api.CampaignDevice) int { return cmp.Compare(a.Device, b.Device) })
	if len(out.Devices) > limit {
		out.Devices = out.Devices[:limit]
		out.Next = string(out.Devices[limit-1].Device)
	}
	s.explain(ctx, out.Devices)
	return out, nil
}

// all is how the fleet stands with its releases.
func (s *campaigns) all(ctx context.Context) api.Releases {
	out := api.Releases{Versions: []api.VersionCount{}, Campaigns: []api.Campaign{}, Forks: s.forks()}
	now := s.now()
	fleet := s.fleet()
	of := make(map[string]*api.VersionCount)
	for i := range fleet {
		d := &fleet[i]
		v := of[d.Agent]
		if v == nil {
			v = &api.VersionCount{Version: d.Agent}
			of[d.Agent] = v
		}
		if v.Devices++; d.online {
			v.Online++
		}
	}
	for _, v := range of {
		out.Versions = append(out.Versions, *v)
	}
	slices.SortFunc(out.Versions, func(a, b api.VersionCount) int {
		return cmp.Or(bundle.Compare(b.Version, a.Version), cmp.Compare(a.Version, b.Version))
	})
	rows := s.rows.all(func(a, b campaignRow) int { return cmp.Compare(b.ID, a.ID) })
	slices.SortStableFunc(rows, func(a, b campaignRow) int {
		switch {
		case a.State.Ended() == b.State.Ended():
			return 0
		case b.State.Ended():
			return -1
		}
		return 1
	})
	rows = rows[:min(len(rows), api.MaxCampaigns)]
	current := s.current(fleet)
	out.Campaigns = make([]api.Campaign, len(rows))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, row := range rows {
		g.Go(func() error {
			v, bad := s.viewAt(row, now, fleet)
			v.Current = current[row.ID]
			if row.Evidence == nil {
				v.Failed = s.worst(ctx, bad)
			}
			out.Campaigns[i] = v
			return nil
		})
	}
	_ = g.Wait() // none of them fails
	return out
}

// attention is the campaigns that somebody should look at: that wait for an approval,
// and that were stopped, until another one for some of the same devices was begun.
func (s *campaigns) attention() (see []api.Attention) {
	rows := s.rows.all(func(a, b campaignRow) int { return cmp.Compare(a.ID, b.ID) })
	now, members := s.now(), s.members()
	for i, r := range rows {
		add := func(text string) {
			see = append(see, api.Attention{Code: api.AttentionCampaign, About: "campaign:" + r.ID, Text: cutText(fmt.Sprintf("of %s %s", r.Version, text), maxLoggedText)})
		}
		switch {
		case r.awaits(now):
			add(fmt.Sprintf("waits for an approval after phase %d", r.Phase+1))
		case r.State != api.CampaignStopped:
		case !slices.ContainsFunc(rows[i+1:], func(v campaignRow) bool { return overlaps(r.To, v.To, members) }):
			add("was stopped: " + r.Reason)
		}
	}
	return see
}

func (s *campaigns) members() (out []api.DeviceRecord) {
	s.reg.rows.each(func(_ string, d api.DeviceRecord) bool {
		if !d.Retired {
			out = append(out, d)
		}
		return true
	})
	return out
}

func (c *Coordinator) campaignRoutes() []route {
	steer := func(what, summary string) route {
		return route{method: "POST", path: v1 + "/campaigns/{id}/" + what, needs: toRelease, summary: summary, in: api.PauseRequest{}, out: api.Campaign{},
			handle: answer(func(r *http.Request, q api.PauseRequest) (api.Campaign, error) {
				return c.campaigns.steer(r.Context(), r.PathValue("id"), what, q.Reason)
			})}
	}
	return []route{
		{method: "GET", path: v1 + "/releases", needs: toRead, summary: "Which versions the fleet runs, and which campaigns there are", out: api.Releases{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			writeJSON(w, http.StatusOK, c.campaigns.all(r.Context()))
			return nil
		}},
		{method: "POST", path: v1 + "/campaigns", needs: toRelease, summary: "Bring a release to devices, in phases", in: api.CampaignRequest{}, out: api.Campaign{},
			handle: answer(func(r *http.Request, q api.CampaignRequest) (api.Campaign, error) {
				return c.campaigns.begin(r.Context(), q)
			})},
		{method: "GET", path: v1 + "/campaigns/{id}", needs: toRead, summary: "A campaign and how far it is", out: api.Campaign{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			v, err := c.campaigns.show(r.Context(), r.PathValue("id"))
			if err == nil {
				writeJSON(w, http.StatusOK, v)
			}
			return err
		}},
		{method: "GET", path: v1 + "/campaigns/{id}/devices", needs: toRead, summary: "Where the devices of a campaign stand, and why", out: api.CampaignDevices{},
			query: []param{{"standing", "only those that stand there", ""}, {"after", "from here on: what an answer gave as next", ""}, {"limit", "at most so many; default 100", 0}}, handle: c.getCampaignDevices},
		steer(api.CampaignPause, "Ask no more devices for now"),
		steer(api.CampaignResume, "Go on with a campaign that is paused"),
		steer(api.CampaignApprove, "Let a campaign go on to its next phase"),
		steer(api.CampaignAbort, "End a campaign; who has it installed already tries it to the end"),
	}
}

func (c *Coordinator) getCampaignDevices(w http.ResponseWriter, r *http.Request) error {
	q, limit := r.URL.Query(), api.DefaultOrders
	standing := api.Standing(q.Get("standing"))
	if standing != "" && !slices.Contains(api.Standings, standing) {
		return refuse(http.StatusBadRequest, "bad_query", "%q is no standing of a device: %v", standing, api.Standings)
	}
	if s := q.Get("limit"); s != "" {
		var err error
		if limit, err = strconv.Atoi(s); err != nil || limit < 1 || limit > api.MaxCampaignDevices {
			return refuse(http.StatusBadRequest, "bad_query", "limit is a number from 1 to %d, not %q", api.MaxCampaignDevices, s)
		}
	}
	v, err := c.campaigns.list(r.Context(), r.PathValue("id"), standing, q.Get("after"), limit)
	if err == nil {
		writeJSON(w, http.StatusOK, v)
	}
	return err
}
