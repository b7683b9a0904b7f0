package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// someReleases is a fleet with a campaign that soaks, one that was stopped, and a log
// with two faces.
func someReleases() api.Releases {
	const one, two = wire.DeviceID("b4irkgbk5iwtj6erquld22qs"), wire.DeviceID("c4v7e36rdugbtptya3zf4nkg")
	bad := []api.CampaignDevice{
		{Device: one, Standing: api.StandsFailed, Agent: "1.0.0", Order: "01M82S0X0KW1XPKMYQTXC9ZKY9", Code: wire.CodeRolledBack, Reason: "rolled back to version 1.0.0: it was not confirmed\x1b[2J", Updated: goldenAt, LastSeen: goldenAt},
		{Device: two, Standing: api.StandsSilent, Agent: "1.0.0", Order: "01M82S0X0KW1XPKMYQTXC9ZKYA", Code: "away", Progress: 0.4, Updated: goldenAt, LastSeen: goldenAt},
	}
	soaks := api.Campaign{ID: "01M82S0X0KW1XPKMYQTXC9ZKY8", Version: "1.2.0", Selector: api.Selector{Groups: []string{"homes"}}, By: "anna", Created: goldenAt, State: api.CampaignRunning, Devices: 12,
		Counts:  map[api.Standing]int{api.StandsUpdated: 3, api.StandsWaiting: 1, api.StandsLater: 8},
		Reasons: []api.StandingReason{{Standing: api.StandsWaiting, Code: wire.CodeWindow, Devices: 1}},
		Holdup:  "no device has taken it so far; an approval goes on all the same",
		Phases: []api.PhaseState{
			{CampaignPhase: api.CampaignPhase{Count: 4, SoakSeconds: 86400}, Began: goldenAt, Settled: goldenAt.AddDate(100, 0, 0), Devices: 4, Counts: map[api.Standing]int{api.StandsUpdated: 3, api.StandsWaiting: 1}},
			{CampaignPhase: api.CampaignPhase{Percentage: 100}, Devices: 8, Counts: map[api.Standing]int{api.StandsLater: 8}},
		}}
	stopped := api.Campaign{ID: "01M82S0X0KW1XPKMYQTXC9ZKY7", Version: "1.1.0", Selector: api.Selector{All: true}, By: "owner", Created: goldenAt, State: api.CampaignStopped, Devices: 12,
		Code: api.CampaignTooManyFailed, Reason: "1 of 2 devices failed, and at most 0 may", Ended: goldenAt, Evidence: bad,
		Counts:  map[api.Standing]int{api.StandsFailed: 1, api.StandsSilent: 1, api.StandsLater: 10},
		Reasons: []api.StandingReason{{Standing: api.StandsFailed, Code: wire.CodeRolledBack, Devices: 1}},
		Phases: []api.PhaseState{
			{CampaignPhase: api.CampaignPhase{Only: &api.Selector{Labels: map[string]string{"site": "lab"}}}, Began: goldenAt, Devices: 2, Counts: map[api.Standing]int{api.StandsFailed: 1, api.StandsSilent: 1}},
			{CampaignPhase: api.CampaignPhase{Percentage: 100}, Devices: 10, Counts: map[api.Standing]int{api.StandsLater: 10}},
		}}
	return api.Releases{
		Versions:  []api.VersionCount{{Version: "1.2.0", Devices: 3, Online: 3}, {Version: "1.0.0", Devices: 9, Online: 7}},
		Campaigns: []api.Campaign{soaks, stopped},
		Forks: []api.LogSeen{{Log: "deimos-releases-86d06886bb8abe29", Size: 2, Faces: []api.LogFace{
			{Hash: "ZejYV/zqhFtLcBOr8UW1VnUe1mWeS/L+YxUS82EjzCg=", Checkpoint: "…", Shown: []api.LogShown{{Device: one, Order: "01M82S0X0KW1XPKMYQTXC9ZKY9", At: goldenAt}}},
			{Hash: "wYKyxuFsseVZ3xWeZxha3BNVRIL1Xvp3WAr0iw7kcog=", Checkpoint: "…", Shown: []api.LogShown{{Device: two, Order: "01M82S0X0KW1XPKMYQTXC9ZKYA", At: goldenAt}}},
		}}},
	}
}

// TestCommandsOfCampaigns: what is asked of the coordinator, and what a person sees.
func TestCommandsOfCampaigns(t *testing.T) {
	rel := someReleases()
	var mu sync.Mutex
	var asked []string
	at := answering(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		asked = append(asked, strings.TrimSpace(fmt.Sprintf("→ %s %s %s", r.Method, r.URL.RequestURI(), body)))
		rel := rel
		mu.Unlock()
		var v any = rel
		switch path := strings.TrimPrefix(r.URL.Path, "/api/v1/"); {
		case path == "releases":
		case strings.HasSuffix(path, "/devices"):
			v = api.CampaignDevices{Devices: append(rel.Campaigns[1].Evidence, api.CampaignDevice{Device: "d4v7e36rdugbtptya3zf4nkg", Standing: api.StandsInstalling, Agent: "1.0.0", Progress: 0.425, LastSeen: goldenAt})}
		case strings.Contains(path, rel.Campaigns[1].ID):
			v = rel.Campaigns[1]
		default:
			v = rel.Campaigns[0]
		}
		if err := json.NewEncoder(w).Encode(v); err != nil {
			t.Error(err)
		}
	})
	m := &machine{t: t, dir: t.TempDir(), s: newShelf(), args: []string{"--context", at.Context}}
	golden(t, "campaigns", func(w *bytes.Buffer) error {
		for _, line := range []string{
			"status",
			"campaign list",
			"campaign show " + rel.Campaigns[1].ID,
			"campaign show --devices --at failed --limit 20 " + rel.Campaigns[1].ID,
			"campaign start 1.2.0 --all",
			"campaign start 1.2.0 --group homes --canary 4 --phase 10%:24h:approve --max-failed 3,2% --max-silent 0 --silent-after 1h --rate 5",
			"campaign start 1.2.0 --label site=lab --canary group:lab --canary label:a=b --canary-soak 1h --phase 50% --approve",
			"campaign pause --reason holidays",
			"campaign resume",
			"campaign approve",
			"campaign abort --reason broken " + rel.Campaigns[1].ID,
			"campaign start 1.2.0 --all --phase 10",
			"campaign start 1.2.0 --all --canary home",
			"campaign start 1.2.0 --all --max-failed many",
			"campaign start 1.2.0",
		} {
			mu.Lock()
			asked = nil
			mu.Unlock()
			said, err := m.run(append([]string{"release"}, strings.Fields(line)...)...)
			fmt.Fprintf(w, "$ deimos release %s\n", line)
			mu.Lock()
			for _, a := range asked {
				fmt.Fprintln(w, a)
			}
			mu.Unlock()
			if said = strings.ReplaceAll(said, m.dir, "DIR"); err != nil {
				said += err.Error() + "\n"
			}
			fmt.Fprintln(w, said)
		}
		return nil
	})

	var back api.Releases
	if err := json.Unmarshal([]byte(m.ok("release", "status", "-o", "json")), &back); err != nil || back.Forks[0].Faces[1].Checkpoint == "" || len(back.Campaigns) != 2 {
		t.Errorf("%v %+v", err, back)
	}
	now := func(list []api.Campaign) {
		mu.Lock()
		defer mu.Unlock()
		rel.Campaigns = list
	}
	now(rel.Campaigns[1:])
	m.refused("no campaign is under way", "release", "campaign", "pause")
	now(nil)
	m.refused("there is no campaign", "release", "campaign", "show")
}
