package coordinator

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/wire"
)

const (
	// lately is what a status counts as new.
	lately = 24 * time.Hour
	// tokenSoon is how long before its end a token is pointed out, if it was made
	// for longer than twice that.
	tokenSoon = 7 * 24 * time.Hour
	// spaceSoon is how much of the disk of the state is left when it is pointed out, in bytes.
	spaceSoon = 256 << 20
)

func (c *Coordinator) statusRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/status", needs: toRead, summary: "One look at the fleet", out: api.Status{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, c.status())
			return nil
		}},
	}
}

// status is made of the copies in memory: it asks nobody.
func (c *Coordinator) status() api.Status {
	now := c.now().UTC()
	s := api.Status{Version: c.cfg.Version, Started: c.started.UTC(), Since: now.Add(-lately), Challenges: make(map[api.AuditOutcome]int)}
	s.Orders.Open, s.Orders.Ended, s.Orders.AtLeast = c.outbox.counts(s.Since)
	see := slices.Concat(c.statusOfDevices(&s, now), c.statusOfChallenges(&s), c.config.unsettled(c.reg), c.tokensThatEnd(now), c.repairs.attention(), c.campaigns.attention(), c.releases.attention(now), c.faces.attention(), c.spaceLeft())
	s.Repair = c.repairs.summary()
	slices.SortFunc(see, func(a, b api.Attention) int {
		return cmp.Or(cmp.Compare(a.Code, b.Code), cmp.Compare(a.About, b.About))
	})
	s.More = max(len(see)-api.MaxAttention, 0)
	s.Attention = append([]api.Attention{}, see[:len(see)-s.More]...)
	return s
}

func (c *Coordinator) statusOfDevices(s *api.Status, now time.Time) (see []api.Attention) {
	health := healthOf{kinds: make(map[string]*api.HealthCount)}
	c.reg.rows.each(func(_ string, rec api.DeviceRecord) bool {
		d := c.reg.view(rec)
		switch d.State {
		case api.DeviceRetired:
			s.Devices.Retired++
			return true
		case api.DeviceOnline:
			s.Devices.Online++
			if !d.CertUntil.IsZero() && d.CertUntil.Sub(now) < c.cfg.CertificateLife/6 {
				see = append(see, aboutDevice(d.ID, api.AttentionCertificate, "is online and has not renewed its certificate, which ends "+d.CertUntil.Format(time.RFC3339)))
			}
		default:
			s.Devices.Offline++
		}
		if len(d.Warnings) > 0 {
			s.Devices.Warned++
		}
		for _, w := range d.Warnings {
			see = append(see, aboutDevice(d.ID, w.Code, w.Title))
		}
		health.count(s, d)
		return true
	})
	s.Health = health.most()
	see = append(see, health.see...)
	s.Devices.Pending = len(c.waiting.list(c.reg.known))
	return see
}

// spaceLeft is whether the disk of the state is full, or nearly.
func (c *Coordinator) spaceLeft() []api.Attention {
	free, ok := c.eng.Free()
	if !ok || free >= spaceSoon {
		return nil
	}
	text := fmt.Sprintf("the disk of its state has %d MiB left; below %d MiB it writes nothing: free space there", free>>20, engine.Reserve>>20)
	if err := c.eng.Room(); err != nil {
		text = err.Error()
	}
	return []api.Attention{{Code: api.AttentionSpace, About: "coordinator", Text: text}}
}

func aboutDevice(d wire.DeviceID, code, text string) api.Attention {
	return api.Attention{Code: code, About: "device:" + string(d), Text: text}
}

func (c *Coordinator) statusOfChallenges(s *api.Status) (see []api.Attention) {
	failed := make(map[wire.DeviceID]int)
	lately, _ := c.audits.newest.list(func(a api.AuditSummary) bool { return !a.At.Before(s.Since) && a.Kind != api.Confession })
	for _, a := range lately {
		s.Challenges[a.Outcome]++
		if a.Outcome == api.AuditWrong || a.Outcome == api.AuditLost {
			failed[a.Device]++
		}
	}
	for d, n := range failed {
		if c.reg.member(d) {
			see = append(see, aboutDevice(d, api.AttentionChallenge, fmt.Sprintf("has failed challenges in the last day, %d in all; \"deimos audit ls --device %s\" shows them", n, d)))
		}
	}
	return see
}

// unsettled is the members whose configuration is not what is wanted and does
// not become it by waiting.
func (s *configs) unsettled(reg *registry) (see []api.Attention) {
	s.rows.each(func(id string, v configRow) bool {
		d := wire.DeviceID(id)
		switch {
		case v.Ended != v.Order || v.Order == "":
		case v.State != wire.Succeeded:
			see = append(see, aboutDevice(d, api.AttentionConfig, "could not take its configuration: "+v.Reason))
		case v.Reported != nil && len(v.Reported.Refused) > 0:
			keys := slices.Sorted(maps.Keys(v.Reported.Refused))
			see = append(see, aboutDevice(d, api.AttentionConfig, cutText("refuses what is wanted of "+strings.Join(keys, ", "), maxLoggedText)))
		}
		return true
	})
	return slices.DeleteFunc(see, func(a api.Attention) bool {
		return !reg.member(wire.DeviceID(strings.TrimPrefix(a.About, "device:")))
	})
}

// tokensThatEnd is operators' tokens and fleet tokens with uses left that end soon.
func (c *Coordinator) tokensThatEnd(now time.Time) (see []api.Attention) {
	soon := func(created, expires, revoked time.Time) bool {
		return revoked.IsZero() && now.Before(expires) && expires.Sub(now) < tokenSoon && expires.Sub(created) > 2*tokenSoon
	}
	add := func(about string, expires time.Time) {
		see = append(see, api.Attention{Code: api.AttentionToken, About: about, Text: "the token ends " + expires.Format(time.RFC3339)})
	}
	c.operators.rows.each(func(name string, o operatorRecord) bool {
		if soon(o.Created, o.Expires, o.Revoked) {
			add("operator:"+name, o.Expires)
		}
		return true
	})
	c.tokens.rows.each(func(key string, t TokenRecord) bool {
		if t.Left > 0 && soon(t.Created, t.Expires, t.Revoked) {
			add("token:"+tokenID(key), t.Expires)
		}
		return true
	})
	return see
}

// counts is the open orders by state, and those that have ended since by state.
// atLeast says that more have than are remembered.
func (o *outbox) counts(since time.Time) (open, ended map[wire.State]int, atLeast bool) {
	open, ended = make(map[wire.State]int), make(map[wire.State]int)
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, l := range o.lines {
		for _, p := range l.orders {
			open[p.state]++
		}
	}
	atLeast = o.ended.lost
	for _, e := range o.ended.ring {
		switch {
		case e.key == "":
		case e.updated < since.UnixMilli():
			atLeast = false // the memory reaches back beyond
		default:
			ended[e.state]++
		}
	}
	return open, ended, atLeast
}
