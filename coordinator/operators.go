package coordinator

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// operatorRecord is what is kept of an operator, under its name. Who has the
// records can call nobody: a token has 256 random bits and only its SHA-256 is here.
type operatorRecord struct {
	api.Operator
	Hash [sha256.Size]byte `json:"hash"`
}

// operators are those who may call the API: the named ones of the bucket, which
// all coordinators share, and the owner, whose token is in [ContextFile] of each
// coordinator's own folder and cannot be lost by revoking.
//
// A token is found by its hash. How long that takes tells nothing about the
// token: a guess that differs in one bit has another hash altogether.
type operators struct {
	rows  *table[operatorRecord]
	owner [sha256.Size]byte

	mu     sync.RWMutex
	byHash map[[sha256.Size]byte]string // → name
	hashes map[string][sha256.Size]byte // the reverse
}

const (
	operatorPrefix      = "deimosop_" // that scanners for leaked secrets can find
	defaultOperatorLife = 90 * 24 * time.Hour
	maxOperatorLife     = 2 * 366 * 24 * time.Hour
	usedGrain           = 24 * time.Hour // a token's use is noted that often
	usedLimit           = 2 * time.Second
)

// index follows the bucket.
func (o *operators) index(name string, v operatorRecord, gone bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byHash == nil {
		o.byHash, o.hashes = make(map[[sha256.Size]byte]string), make(map[string][sha256.Size]byte)
	}
	if old, ok := o.hashes[name]; ok {
		delete(o.byHash, old)
		delete(o.hashes, name)
	}
	if !gone {
		o.byHash[v.Hash], o.hashes[name] = name, v.Hash
	}
}

// find is the operator with this token.
func (o *operators) find(token string, now time.Time) (api.Operator, error) {
	sum := sha256.Sum256([]byte(token))
	if sum == o.owner {
		return api.Operator{Name: api.Owner, Role: api.Admin}, nil
	}
	o.mu.RLock()
	name, ok := o.byHash[sum]
	o.mu.RUnlock()
	v, there := o.rows.get(name)
	switch {
	case !ok || !there || v.Hash != sum:
		return api.Operator{}, refuse(http.StatusUnauthorized, "unauthorized", "the operator token is missing or wrong; copy the context file again from the coordinator's folder, or ask an admin for one")
	case !v.Revoked.IsZero():
		return api.Operator{}, refuse(http.StatusUnauthorized, "token_revoked", "the token of operator %s was revoked; ask an admin for a new one", name)
	case !now.Before(v.Expires):
		return api.Operator{}, refuse(http.StatusUnauthorized, "token_expired", "the token of operator %s has expired; ask an admin for a new one", name)
	}
	return v.Operator, nil
}

// may tells whether a role includes a permission.
func may(r api.Role, p permission) bool {
	return slices.Contains(rolesWith(p), r)
}

func rolesWith(p permission) []api.Role {
	switch p {
	case toRead:
		return []api.Role{api.Viewer, api.Operating, api.ReleaseManager, api.Admin}
	case toOperate:
		return []api.Role{api.Operating, api.Admin}
	case toRelease:
		return []api.Role{api.ReleaseManager, api.Admin}
	case toAdmin:
		return []api.Role{api.Admin}
	}
	return nil
}

// rolesText names the roles that include a permission, for a person.
func rolesText(p permission) string {
	var names []string
	for _, r := range rolesWith(p) {
		names = append(names, string(r))
	}
	return strings.Join(names, " or ")
}

// checkOperator names the operator behind a request, who must be allowed p.
func (c *Coordinator) checkOperator(w http.ResponseWriter, r *http.Request, p permission) (api.Operator, error) {
	tok, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		tok = ""
	}
	op, err := c.operators.find(tok, c.now())
	if err != nil {
		if wait := c.limits.logins.take(network(r), c.now()); wait > 0 {
			return op, slowly(w, wait, "too many logins from this address have failed")
		}
		return op, err
	}
	if !may(op.Role, p) {
		return op, refuse(http.StatusForbidden, "forbidden", "this needs the role %s, and %s is %s; an admin gives another role with \"deimos operator create\"",
			rolesText(p), op.Name, op.Role)
	}
	c.used(r.Context(), op)
	return op, nil
}

// used notes that a token is in use.
func (c *Coordinator) used(ctx context.Context, op api.Operator) {
	now := c.now()
	if op.Name == api.Owner || now.Sub(op.LastUsed) < usedGrain {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, usedLimit)
	defer cancel()
	_, err := c.operators.rows.change(ctx, op.Name, func(v *operatorRecord, exists bool) error {
		if !exists || now.Sub(v.LastUsed) < usedGrain || v.Created != op.Created {
			return errUnchanged
		}
		v.LastUsed = now.UTC().Truncate(usedGrain)
		return nil
	})
	if err != nil {
		c.log.Warn("the use of an operator's token was not noted", "operator", op.Name, "error", err)
	}
}

type operatorKey struct{}

// operatorOf is the operator behind a request of a route that needs one.
func operatorOf(r *http.Request) api.Operator { return r.Context().Value(operatorKey{}).(api.Operator) }

func (c *Coordinator) operatorRoutes() []route {
	return []route{
		{method: "POST", path: v1 + "/operators", needs: toAdmin, summary: "Make an operator's token", in: api.OperatorRequest{}, out: api.OperatorToken{}, handle: answer(c.createOperator)},
		{method: "GET", path: v1 + "/operators", needs: toAdmin, summary: "List the operators", out: []api.Operator{}, handle: c.listOperators},
		{method: "POST", path: v1 + "/operators/{name}/revoke", needs: toAdmin, summary: "End an operator's token", out: api.Operator{}, handle: c.revokeOperator},
	}
}

func (c *Coordinator) createOperator(r *http.Request, q api.OperatorRequest) (api.OperatorToken, error) {
	if !validOperator(q.Name) {
		return api.OperatorToken{}, refuse(http.StatusBadRequest, "bad_operator", "an operator's name has 1 to %d of a-z, 0-9, '-' and '_', and is not %q", api.MaxLabelBytes, api.Owner)
	}
	if !may(q.Role, toRead) {
		return api.OperatorToken{}, refuse(http.StatusBadRequest, "bad_operator", "there is no role %q: it is one of viewer, operator, release-manager and admin", label(string(q.Role)))
	}
	life := defaultOperatorLife
	if q.ValidSeconds != 0 {
		if q.ValidSeconds < 1 || q.ValidSeconds > int64(maxOperatorLife/time.Second) {
			return api.OperatorToken{}, refuse(http.StatusBadRequest, "bad_operator", "an operator's token is valid for a second to two years")
		}
		life = time.Duration(q.ValidSeconds) * time.Second
	}
	secret := make([]byte, 32)
	rand.Read(secret) // never fails (crypto/rand)
	tok := operatorPrefix + base64.RawURLEncoding.EncodeToString(secret)
	now := c.now().UTC()
	v, err := c.operators.rows.change(r.Context(), q.Name, func(v *operatorRecord, exists bool) error {
		if exists && v.Revoked.IsZero() && now.Before(v.Expires) {
			return refuse(http.StatusConflict, "exists", "operator %s has a token that is good until %s; revoke it first, or choose another name", q.Name, v.Expires.Format(time.RFC3339))
		}
		*v = operatorRecord{Hash: sha256.Sum256([]byte(tok)), Operator: api.Operator{
			Name: q.Name, Role: q.Role, Created: now, CreatedBy: operatorOf(r).Name, Expires: now.Add(life)}}
		return nil
	})
	return api.OperatorToken{Operator: v.Operator, Token: tok}, err
}

func validOperator(name string) bool {
	return name != "" && name != api.Owner && len(name) <= api.MaxLabelBytes && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-_") == ""
}

func (c *Coordinator) listOperators(w http.ResponseWriter, _ *http.Request) error {
	list := []api.Operator{}
	c.operators.rows.each(func(_ string, v operatorRecord) bool {
		list = append(list, v.Operator)
		return true
	})
	slices.SortFunc(list, func(a, b api.Operator) int { return cmp.Compare(a.Name, b.Name) })
	writeJSON(w, http.StatusOK, list)
	return nil
}

func (c *Coordinator) revokeOperator(w http.ResponseWriter, r *http.Request) error {
	name := r.PathValue("name")
	if name == api.Owner {
		return refuse(http.StatusConflict, "owner", "the owner's token cannot be revoked here: remove %s from the coordinator's folder and start it again, and it makes a new one", ContextFile)
	}
	unknown := refuse(http.StatusNotFound, wire.CodeNotFound, "there is no operator %s; \"deimos operator list\" shows them", fmt.Sprintf("%q", label(name)))
	if !validOperator(name) {
		return unknown
	}
	v, err := c.operators.rows.change(r.Context(), name, func(v *operatorRecord, exists bool) error {
		switch {
		case !exists:
			return unknown
		case !v.Revoked.IsZero():
			return errUnchanged
		}
		v.Revoked = c.now().UTC()
		return nil
	})
	if err == nil {
		writeJSON(w, http.StatusOK, v.Operator)
	}
	return err
}
