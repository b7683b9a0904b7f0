package coordinator

import (
	"cmp"
	"context"
	"encoding/hex"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// TokenRecord is what is kept of a fleet token: never the secret itself. Its key
// is the hash of the secret, in hex.
//
// Who came in by a token stands on the device's record, so that this one stays
// small whatever the fleet's size. A use is spent here, by compare-and-set,
// before the device's record is written. Between the two the device stands in
// Open: a crash there neither loses the use nor gives it twice, because the
// device finds its use again when it repeats its request.
type TokenRecord struct {
	Name      string            `json:"name,omitempty"`
	Group     string            `json:"group,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Uses      int               `json:"uses"` // in all
	Left      int               `json:"left"`
	Created   time.Time         `json:"created"`
	CreatedBy string            `json:"created_by,omitempty"` // operator
	Expires   time.Time         `json:"expires"`
	Revoked   time.Time         `json:"revoked,omitzero"` // for ever
	// Open are devices that have spent a use and whose record may not be written.
	// It is cleared of those that are written when the next use is spent.
	Open []wire.DeviceID `json:"open,omitempty"`
}

const (
	defaultTokenUse = 1
	maxTokenUse     = 1_000_000
	defaultTokenTTL = 24 * time.Hour
	maxTokenTTL     = 366 * 24 * time.Hour
	tokenIDLen      = 10 // hex digits
	// maxOpen bounds TokenRecord.Open: enrolments of one token under way, and
	// those that a crash has cut off. 27 bytes each.
	maxOpen = 1000
)

// tokens are the fleet tokens.
type tokens struct {
	rows *table[TokenRecord]
	// written tells whether the record of a device that came in by a token is
	// there.
	written  func(d wire.DeviceID, token string) bool
	now      func() time.Time
	spending keyed // one use of a token at a time: else all who come at once collide
}

func tokenKey(t wire.FleetToken) string {
	h := t.Hash()
	return hex.EncodeToString(h[:])
}

// tokenID names a token to people, and on device records.
func tokenID(key string) string { return key[:tokenIDLen] }

func (c *Coordinator) tokenRoutes() []route {
	return []route{
		{method: "POST", path: v1 + "/tokens", needs: toOperate, summary: "Make a fleet token", in: api.TokenRequest{}, out: api.Token{}, handle: answer(c.createToken)},
		{method: "GET", path: v1 + "/tokens", needs: toRead, summary: "List the fleet tokens, without their secrets", out: []api.Token{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, c.tokens.list())
			return nil
		}},
		{method: "POST", path: v1 + "/tokens/{id}/revoke", needs: toOperate, summary: "End a fleet token for ever", out: api.Token{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			t, err := c.tokens.revoke(r.Context(), r.PathValue("id"))
			if err == nil {
				writeJSON(w, http.StatusOK, t)
			}
			return err
		}},
	}
}

// createToken makes a fleet token and keeps its hash.
func (c *Coordinator) createToken(r *http.Request, q api.TokenRequest) (api.Token, error) {
	uses, ttl := cmp.Or(q.Uses, defaultTokenUse), time.Duration(min(max(q.ValidSeconds, -1), int64(maxTokenTTL/time.Second)+1))*time.Second
	ttl = cmp.Or(ttl, defaultTokenTTL)
	if uses < 1 || uses > maxTokenUse || ttl < time.Second || ttl > maxTokenTTL {
		return api.Token{}, refuse(http.StatusBadRequest, "bad_token", "a token has 1 to %d uses and is valid for a second to a year", maxTokenUse)
	}
	if label(q.Name) != q.Name {
		return api.Token{}, refuse(http.StatusBadRequest, "bad_token", "a token's name has at most %d printable bytes, without spaces around it", maxLabel)
	}
	if err := checkPlace(q.Group, q.Labels); err != nil {
		return api.Token{}, err
	}
	rec := TokenRecord{Name: q.Name, Group: q.Group, Labels: q.Labels, Uses: uses, Left: uses,
		Created: c.now().UTC(), CreatedBy: operatorOf(r).Name, Expires: c.now().Add(ttl).UTC()}
	tok := wire.NewFleetToken(c.auth.caCert.Raw)
	key := tokenKey(tok)
	about(r.Context(), tokenID(key))
	_, err := c.tokens.rows.change(r.Context(), key, func(v *TokenRecord, _ bool) error {
		*v = rec
		return nil
	})
	v := viewToken(key, rec)
	v.Token = tok.String()
	return v, err
}

func viewToken(key string, t TokenRecord) api.Token {
	return api.Token{ID: tokenID(key), Name: t.Name, Group: t.Group, Labels: t.Labels, Uses: t.Uses, Left: t.Left,
		Created: t.Created, CreatedBy: t.CreatedBy, Expires: t.Expires, Revoked: t.Revoked}
}

func (t *tokens) list() []api.Token {
	out := []api.Token{}
	t.rows.each(func(key string, v TokenRecord) bool {
		out = append(out, viewToken(key, v))
		return true
	})
	slices.SortFunc(out, func(a, b api.Token) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	return out
}

// revoke ends a token. It cannot be taken back.
func (t *tokens) revoke(ctx context.Context, id string) (api.Token, error) {
	var keys []string
	t.rows.each(func(key string, _ TokenRecord) bool {
		if len(id) >= tokenIDLen && strings.HasPrefix(key, id) {
			keys = append(keys, key)
		}
		return true
	})
	switch {
	case len(keys) == 0:
		return api.Token{}, refuse(http.StatusNotFound, wire.CodeNotFound, "there is no token %q; \"deimos token list\" shows the ids of all", label(id))
	case len(keys) > 1: // of 2^40 ids
		return api.Token{}, refuse(http.StatusConflict, "ambiguous", "%d tokens have the id %s; give more digits of its hash: %s", len(keys), id, strings.Join(keys, ", "))
	}
	rec, err := t.rows.change(ctx, keys[0], func(v *TokenRecord, exists bool) error {
		if !exists {
			return errNotFound
		}
		if !v.Revoked.IsZero() {
			return errUnchanged
		}
		v.Revoked = t.now().UTC()
		return nil
	})
	return viewToken(keys[0], rec), err
}

func errToken(why string) error {
	return refuse(http.StatusForbidden, "token_refused", "the fleet token %s; ask the fleet manager for a new one (\"deimos token create\")", why)
}

// spend takes one use of a token for a device that is no member. The same device
// spends one use however often it asks.
func (t *tokens) spend(ctx context.Context, tok wire.FleetToken, d wire.DeviceID) (id string, rec TokenRecord, err error) {
	key := tokenKey(tok)
	id = tokenID(key)
	defer t.spending.lock(key)()
	rec, err = t.rows.change(ctx, key, func(v *TokenRecord, exists bool) error {
		switch {
		case !exists:
			return errToken("is not known here")
		case !v.Revoked.IsZero():
			return errToken("was revoked")
		case t.now().After(v.Expires):
			return errToken("has expired")
		case slices.Contains(v.Open, d):
			return errUnchanged
		case v.Left <= 0:
			return errToken("is used up")
		}
		v.Open = slices.DeleteFunc(v.Open, func(d wire.DeviceID) bool { return t.written(d, id) })
		if len(v.Open) >= maxOpen {
			return refuse(http.StatusServiceUnavailable, "busy", "%d devices are being enrolled by this token; try again in a minute", len(v.Open))
		}
		v.Left--
		v.Open = append(v.Open, d)
		return nil
	})
	return id, rec, err
}

const maxLabels = 32 // of a device

// checkPlace checks the group and labels that devices are to get.
func checkPlace(group string, labels map[string]string) error {
	if label(group) != group {
		return refuse(http.StatusBadRequest, "bad_group", "a group has a name of at most %d printable bytes, without spaces around it", maxLabel)
	}
	if len(labels) > maxLabels {
		return errTooManyLabels
	}
	for k, v := range labels {
		if err := api.CheckLabel(k, v); err != nil {
			return refuse(http.StatusBadRequest, "bad_label", "%v", err)
		}
	}
	return nil
}

var errTooManyLabels = refuse(http.StatusBadRequest, "bad_label", "a device has at most %d labels", maxLabels)
