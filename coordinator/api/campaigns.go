package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// CampaignRequest brings a published release to many devices, in phases. The
// selector says to which.
type CampaignRequest struct {
	Version string `json:"version"`
	Selector
	Phases []CampaignPhase `json:"phases"`
	Stop   CampaignStop    `json:"stop,omitzero"`
	Rate   float64         `json:"rate,omitempty"` // devices that are asked, a second, at most; 0: [CampaignRate]
}

// CampaignPhase is a part of the devices, and what must be before the next part is
// asked. It has one of Only, Count and Percentage; percentages grow, and the last
// phase has 100. Who was in a phase is in all later ones.
type CampaignPhase struct {
	Only        *Selector `json:"only,omitempty"`       // these of the campaign's devices
	Count       int       `json:"count,omitempty"`      // so many that are online when the phase begins
	Percentage  float64   `json:"percentage,omitempty"` // above 0 and up to 100; one device at least
	SoakSeconds float64   `json:"soak_seconds,omitempty"`
	Approve     bool      `json:"approve,omitempty"` // an operator must approve before the next
}

// CampaignStop says what ends a campaign by itself. Where neither a number nor a
// share is given, the share is the constant's below. Shares are in percent: the failed
// of the devices that were asked, the silent of those of them who have ended or are
// silent, and both of 50 at least, or of all of a phase that has fewer. After the
// campaign is done they are of those that came late. As many silent devices as would be
// expected by how many others are silent count for nothing, and hold the campaign.
type CampaignStop struct {
	MaxFailed      *int     `json:"max_failed,omitempty"` // more than so many have failed
	MaxFailedShare *float64 `json:"max_failed_share,omitempty"`
	MaxSilent      *int     `json:"max_silent,omitempty"` // more than so many are silent
	MaxSilentShare *float64 `json:"max_silent_share,omitempty"`
	// SilentSeconds is how long a device that was asked may be unheard of until it
	// counts as silent; 0: [CampaignSilent].
	SilentSeconds float64 `json:"silent_seconds,omitempty"`
}

// What a campaign does unless it is said.
const (
	CampaignRate        = 20.0
	CampaignFailedShare = 2.0
	CampaignSilentShare = 5.0
	CampaignSilent      = 30 * time.Minute
)

// CampaignState is where a campaign stands.
type CampaignState string

// The states of a campaign. The last three are its end, though what is done can still
// be stopped or aborted.
const (
	CampaignRunning  CampaignState = "running"
	CampaignAwaiting CampaignState = "awaiting_approval"
	CampaignPaused   CampaignState = "paused"
	CampaignStopped  CampaignState = "stopped" // by itself
	CampaignAborted  CampaignState = "aborted" // by an operator
	CampaignDone     CampaignState = "done"    // late devices still get the release, until a newer campaign for them is done
)

// Ended tells whether s is an end.
func (s CampaignState) Ended() bool {
	return s == CampaignStopped || s == CampaignAborted || s == CampaignDone
}

// Standing is where a device stands in a campaign.
type Standing string

// The standings, from not yet to done.
const (
	StandsLater      Standing = "later"      // its phase has not begun
	StandsAway       Standing = "away"       // its turn has come, and it is not online; it is asked when it is
	StandsDue        Standing = "due"        // it is about to be asked
	StandsAsked      Standing = "asked"      // it has not said yet that it has begun
	StandsWaiting    Standing = "waiting"    // for its owner, for its hours, for another update
	StandsInstalling Standing = "installing" // from the fetch to the end of the trial
	StandsUpdated    Standing = "updated"    // it runs the release, or a newer one
	StandsDeclined   Standing = "declined"   // it does not take it; that is no fault of the release
	StandsHindered   Standing = "hindered"   // it could not fetch it, has no room or was cut off; it is asked again
	StandsFailed     Standing = "failed"
	StandsSilent     Standing = "silent"     // it was asked and was not heard of since, or its update does not go on
	StandsCanceled   Standing = "canceled"   // the order was taken back
	StandsUnanswered Standing = "unanswered" // the order has expired
)

// Standings are all, in the order in which they are shown.
var Standings = []Standing{StandsUpdated, StandsInstalling, StandsAsked, StandsWaiting, StandsDue, StandsAway, StandsLater,
	StandsDeclined, StandsHindered, StandsFailed, StandsSilent, StandsCanceled, StandsUnanswered}

// Campaign is a campaign and how far it is.
type Campaign struct {
	ID      string `json:"id"`
	Version string `json:"version"`
	Selector
	Stop    CampaignStop  `json:"stop"`
	Rate    float64       `json:"rate"`
	By      string        `json:"by,omitempty"`
	Created time.Time     `json:"created"`
	State   CampaignState `json:"state"`
	Phase   int           `json:"phase"` // the one that runs or ran last, from 0
	Phases  []PhaseState  `json:"phases"`
	// Holdup is why the phase that runs does not go on by itself; empty: it does.
	Holdup string    `json:"holdup,omitempty"`
	Code   string    `json:"code,omitempty"`   // of an end before all was done
	Reason string    `json:"reason,omitempty"` // of a pause too
	Ended  time.Time `json:"ended,omitzero"`
	// Evidence is what it was stopped for: the first of those devices, at most [MaxEvidence].
	Evidence []CampaignDevice `json:"evidence,omitempty"`

	Devices int              `json:"devices"` // that are meant now
	Counts  map[Standing]int `json:"counts"`  // they add up to Devices
	Reasons []StandingReason `json:"reasons"` // why those who do not run it do not, the most first
	Failed  []CampaignDevice `json:"failed"`  // the failed and the silent, the newest first, at most [MaxEvidence]
	Current bool             `json:"current"` // done, and what late devices get
}

// MaxEvidence bounds the devices that a campaign names.
const MaxEvidence = 20

// What a campaign is stopped for.
const (
	CampaignTooManyFailed = "too_many_failed"
	CampaignTooManySilent = "too_many_silent"
)

// PhaseState is a phase and how far it is.
type PhaseState struct {
	CampaignPhase
	// Share is the percentage that was found for it when it began: that with so
	// many devices, or with one at least. 0 for those that are named.
	Share      float64          `json:"share,omitempty"`
	Began      time.Time        `json:"began,omitzero"`
	Settled    time.Time        `json:"settled,omitzero"` // all who could be asked have ended; it soaks from then on
	Approved   time.Time        `json:"approved,omitzero"`
	ApprovedBy string           `json:"approved_by,omitempty"`
	Ended      time.Time        `json:"ended,omitzero"`
	Devices    int              `json:"devices"` // whose first phase it is
	Counts     map[Standing]int `json:"counts"`
}

// StandingReason is how many devices stand somewhere for one reason.
type StandingReason struct {
	Standing Standing `json:"standing"`
	Code     string   `json:"code"`
	Devices  int      `json:"devices"`
}

// CampaignDevice is one device in a campaign.
type CampaignDevice struct {
	Device   wire.DeviceID `json:"device"`
	Standing Standing      `json:"standing"`
	Phase    int           `json:"phase"`
	Agent    string        `json:"agent"` // the version that it runs
	Order    string        `json:"order,omitempty"`
	Code     string        `json:"code,omitempty"`
	Reason   string        `json:"reason,omitempty"`
	Progress float64       `json:"progress,omitempty"`
	Updated  time.Time     `json:"updated,omitzero"` // of the order
	LastSeen time.Time     `json:"last_seen,omitzero"`
}

// CampaignDevices is a part of a campaign's devices, by id.
type CampaignDevices struct {
	Devices []CampaignDevice `json:"devices"`
	Next    string           `json:"next,omitempty"` // from here on there are more
}

// MaxCampaignDevices bounds one [CampaignDevices].
const MaxCampaignDevices = 1000

// Releases is which versions the fleet runs, and what is under way.
type Releases struct {
	Versions []VersionCount `json:"versions"` // the newest first
	// Campaigns are those that have not ended, and of the others the newest, at
	// most [MaxCampaigns]. The newest is first.
	Campaigns []Campaign `json:"campaigns"`
	// Forks is what proves that the log of releases has more than one face: the sizes
	// of which devices were shown different trees, at most [MaxLogSeen].
	Forks []LogSeen `json:"forks,omitempty"`
}

// LogSeen is what devices were shown of the log of releases when it had so many
// records. An honest log has one face.
type LogSeen struct {
	Log   string    `json:"log"`
	Size  int64     `json:"size"`
	Faces []LogFace `json:"faces"` // in the order in which they were heard of
}

// LogFace is one tree, and the first devices that were shown it.
type LogFace struct {
	Hash       string     `json:"hash"`       // of the tree, base64
	Checkpoint string     `json:"checkpoint"` // that says so: a note signed by the log (golang.org/x/mod/sumdb/note)
	Shown      []LogShown `json:"shown"`
}

// LogShown is a device that has reported a checkpoint. The report, signed by the
// device, is with the order.
type LogShown struct {
	Device wire.DeviceID `json:"device"`
	Order  string        `json:"order"`
	At     time.Time     `json:"at"` // when its report came
}

// MaxLogSeen bounds a list of [LogSeen].
const MaxLogSeen = 1000

// VersionCount is how many members run a version.
type VersionCount struct {
	Version string `json:"version"`
	Devices int    `json:"devices"`
	Online  int    `json:"online"`
}

// MaxCampaigns bounds [Releases].Campaigns.
const MaxCampaigns = 20

// PauseRequest holds a campaign, or ends it.
type PauseRequest struct {
	Reason string `json:"reason,omitempty"` // a sentence for the record
}

// StartCampaign begins a campaign.
func (c *Client) StartCampaign(ctx context.Context, q CampaignRequest) (Campaign, error) {
	return ask[Campaign](ctx, c, http.MethodPost, "campaigns", nil, q)
}

// Campaign shows one.
func (c *Client) Campaign(ctx context.Context, id string) (Campaign, error) {
	return ask[Campaign](ctx, c, http.MethodGet, "campaigns/"+segment(id), nil, nil)
}

// CampaignDevices lists devices of a campaign that stand somewhere, or of "" all,
// from an answer's Next on.
func (c *Client) CampaignDevices(ctx context.Context, id string, at Standing, after string, limit int) (CampaignDevices, error) {
	q := url.Values{}
	for k, v := range map[string]string{"standing": string(at), "after": after} {
		if v != "" {
			q.Set(k, v)
		}
	}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	return ask[CampaignDevices](ctx, c, http.MethodGet, "campaigns/"+segment(id)+"/devices", q, nil)
}

// What can be done with a campaign that has not ended; it can be aborted, too, when it
// is done.
const (
	CampaignPause   = "pause"
	CampaignResume  = "resume"
	CampaignApprove = "approve" // go on to the next phase
	CampaignAbort   = "abort"
)

// SteerCampaign does one of the above.
func (c *Client) SteerCampaign(ctx context.Context, id, what, reason string) (Campaign, error) {
	return ask[Campaign](ctx, c, http.MethodPost, "campaigns/"+segment(id)+"/"+what, nil, PauseRequest{Reason: reason})
}

// Releases tells which versions the fleet runs, and of campaigns.
func (c *Client) Releases(ctx context.Context) (Releases, error) {
	return ask[Releases](ctx, c, http.MethodGet, "releases", nil, nil)
}

// LogSeen tells what devices were shown of the log of releases, the newest first.
func (c *Client) LogSeen(ctx context.Context) ([]LogSeen, error) {
	return ask[[]LogSeen](ctx, c, http.MethodGet, "releases/log", nil, nil)
}
