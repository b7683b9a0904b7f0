package coordinator

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// as is a client with an operator's token.
func (w *world) as(t testing.TB, token string) *api.Client {
	t.Helper()
	c, err := api.NewClient(w.op.Context(token))
	must(t, err)
	return c
}

func (w *world) newOperator(t testing.TB, name string, role api.Role) api.OperatorToken {
	t.Helper()
	tok, err := w.op.CreateOperator(testContext(t), api.OperatorRequest{Name: name, Role: role})
	must(t, err)
	return tok
}

func (w *world) serveLocal(method, path, token, from string, body []byte) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, bytes.NewReader(body))
	r.RemoteAddr = from
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	rec := httptest.NewRecorder()
	w.server.Handler.ServeHTTP(rec, r)
	return rec
}

func TestEachRoleMayDoItsOwnOnly(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	for role, may := range map[api.Role][]permission{
		api.Viewer:         {toRead},
		api.Operating:      {toRead, toOperate},
		api.ReleaseManager: {toRead, toRelease},
		api.Admin:          {toRead, toOperate, toRelease, toAdmin},
	} {
		tok := w.newOperator(t, "the-"+string(role), role)
		for _, rt := range w.table() {
			if rt.needs == byAnybody || rt.needs == byDevice {
				continue
			}
			rec := w.serveLocal(rt.method, pathName.ReplaceAllString(rt.path, "x"), tok.Token, "192.0.2.1:1", nil)
			forbidden := rec.Code == http.StatusForbidden && strings.Contains(rec.Body.String(), `"forbidden"`)
			if forbidden == slices.Contains(may, rt.needs) {
				t.Errorf("%s asks %s %s, which needs %s: %d %s", role, rt.method, rt.path, rt.needs, rec.Code, rec.Body)
			}
			if forbidden && !strings.Contains(rec.Body.String(), rolesText(rt.needs)) {
				t.Errorf("%s is not told who may: %s", role, rec.Body)
			}
		}
	}
}

// Who may do what is a promise. A route that is new, or that others may use from
// now on, is written down here by somebody who means it.
func TestEachRouteNeedsWhatIsWrittenHere(t *testing.T) {
	t.Parallel()
	want := map[permission][]string{
		byAnybody: {
			"GET /api/v1/openapi.json",
			"POST /enrol/v1",
		},
		byDevice: {
			"GET /data/v1/repo/{path...}",
			"GET /data/v1/blob/{kind}/{id}",
			"PUT /data/v1/attachment/{order}",
			"PUT /data/v1/blob/{kind}/{id}",
		},
		toRead: {
			"GET /api/v1/audits",
			"GET /api/v1/audits/{id}",
			"GET /api/v1/audits/{id}/evidence",
			"GET /api/v1/chunks/{id}",
			"GET /api/v1/campaigns/{id}",
			"GET /api/v1/campaigns/{id}/devices",
			"GET /api/v1/claims",
			"GET /api/v1/config",
			"GET /api/v1/config/devices",
			"GET /api/v1/config/settings",
			"GET /api/v1/devices",
			"GET /api/v1/devices/{id}",
			"GET /api/v1/devices/{id}/drain",
			"GET /api/v1/devices/{id}/drain/receipt",
			"GET /api/v1/devices/{id}/honesty",
			"GET /api/v1/jobs",
			"GET /api/v1/jobs/{id}",
			"GET /api/v1/jobs/{id}/results",
			"GET /api/v1/log",
			"GET /api/v1/modules/{id}",
			"GET /api/v1/objects",
			"GET /api/v1/objects/{name}",
			"GET /api/v1/objects/{name}/placements",
			"GET /api/v1/orders",
			"GET /api/v1/orders/{device}/{id}",
			"GET /api/v1/orders/{device}/{id}/attachment",
			"GET /api/v1/releases",
			"GET /api/v1/releases/log",
			"GET /api/v1/repair",
			"GET /api/v1/repo/{path...}",
			"POST /api/v1/devices/{id}/history",
			"GET /api/v1/status",
			"GET /api/v1/tokens",
		},
		toOperate: {
			"DELETE /api/v1/claims/{code}",
			"DELETE /api/v1/devices/{id}/drain",
			"DELETE /api/v1/objects/{name}",
			"PATCH /api/v1/config",
			"PATCH /api/v1/devices",
			"POST /api/v1/audits",
			"POST /api/v1/claims",
			"POST /api/v1/devices/{id}/drain",
			"POST /api/v1/devices/{id}/identify",
			"POST /api/v1/devices/{id}/inventory",
			"POST /api/v1/devices/{id}/retire",
			"POST /api/v1/jobs",
			"POST /api/v1/jobs/{id}/cancel",
			"POST /api/v1/orders/{device}/{id}/cancel",
			"POST /api/v1/stripes",
			"POST /api/v1/tokens",
			"POST /api/v1/tokens/{id}/revoke",
			"PUT /api/v1/chunks/{id}",
			"PUT /api/v1/modules/{id}",
			"PUT /api/v1/objects/{name}",
		},
		toRelease: {
			"GET /api/v1/repo",
			"POST /api/v1/campaigns",
			"POST /api/v1/campaigns/{id}/abort",
			"POST /api/v1/campaigns/{id}/approve",
			"POST /api/v1/campaigns/{id}/pause",
			"POST /api/v1/campaigns/{id}/resume",
			"POST /api/v1/offers",
			"PUT /api/v1/repo/{path...}",
		},
		toAdmin: {
			"GET /api/v1/operators",
			"POST /api/v1/operators",
			"POST /api/v1/operators/{name}/revoke",
			"POST /api/v1/orders",
		},
	}
	found := map[permission][]string{}
	for _, rt := range aWorld(t).table() {
		found[rt.needs] = append(found[rt.needs], rt.method+" "+rt.path)
	}
	for _, routes := range []map[permission][]string{want, found} {
		for _, list := range routes {
			slices.Sort(list)
		}
	}
	for p := range found {
		if !slices.Equal(found[p], want[p]) {
			t.Errorf("%s is needed for\n%s\nand here stands\n%s", p, strings.Join(found[p], "\n"), strings.Join(want[p], "\n"))
		}
	}
	if len(found) != len(want) {
		t.Errorf("%d permissions, want %d", len(found), len(want))
	}
}

func TestATokenEndsWhenItIsRevokedOrExpires(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	// Another coordinator of the same fleet: its copy of the records.
	kv, err := w.eng.KV(ctx, "operators")
	must(t, err)
	peer := &operators{}
	peer.rows, err = openTable(ctx, kv, "operator", peer.index)
	must(t, err)
	defer peer.rows.close()

	carol, dave := w.newOperator(t, "carol", api.Viewer), w.newOperator(t, "dave", api.Viewer)
	knows := func(tok api.OperatorToken) bool {
		_, err := peer.find(tok.Token, w.now())
		return err == nil
	}
	eventually(t, "the peer knows both", func() bool { return knows(carol) && knows(dave) })
	_, err = w.as(t, carol.Token).Devices(ctx)
	must(t, err)
	list, err := w.op.Operators(ctx)
	must(t, err)
	if len(list) != 2 || list[0].Name != "carol" || list[0].LastUsed.IsZero() || !list[1].LastUsed.IsZero() || list[0].CreatedBy != api.Owner {
		t.Errorf("%+v", list)
	}

	_, err = w.op.RevokeOperator(ctx, "carol")
	must(t, err)
	_, err = w.as(t, carol.Token).Devices(ctx)
	wantRefusal(t, err, http.StatusUnauthorized, "token_revoked")
	eventually(t, "the peer refuses it too", func() bool { return !knows(carol) })
	if !knows(dave) {
		t.Error("another operator's token ended with it")
	}

	// A name whose token is good has one token; then it can have a new one, and
	// the old one does not come back with it.
	_, err = w.op.CreateOperator(ctx, api.OperatorRequest{Name: "dave", Role: api.Admin})
	wantRefusal(t, err, http.StatusConflict, "exists")
	again := w.newOperator(t, "carol", api.Operating)
	_, err = w.as(t, carol.Token).Devices(ctx)
	wantRefusal(t, err, http.StatusUnauthorized, "unauthorized")
	_, err = w.as(t, again.Token).CreateToken(ctx, api.TokenRequest{})
	must(t, err)

	w.advance(defaultOperatorLife + time.Second)
	_, err = w.as(t, dave.Token).Devices(ctx)
	wantRefusal(t, err, http.StatusUnauthorized, "token_expired")

	for _, name := range []string{"", api.Owner, "Carol", "a b", "a.b", "*", ">", strings.Repeat("a", 65)} {
		_, err = w.op.CreateOperator(ctx, api.OperatorRequest{Name: name, Role: api.Viewer})
		wantRefusal(t, err, http.StatusBadRequest, "bad_operator")
	}
	_, err = w.op.CreateOperator(ctx, api.OperatorRequest{Name: "eve", Role: "root"})
	wantRefusal(t, err, http.StatusBadRequest, "bad_operator")
	_, err = w.op.RevokeOperator(ctx, api.Owner)
	wantRefusal(t, err, http.StatusConflict, "owner")
	_, err = w.op.RevokeOperator(ctx, "a.b")
	wantRefusal(t, err, http.StatusNotFound, "not_found")
}

// Whoever reads the coordinator's files can call nobody by them.
func TestTokensAreKeptAsHashes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	op := w.newOperator(t, "carol", api.Admin).Token
	fleet := w.newToken(t, api.TokenRequest{})
	must(t, checkCall(w.as(t, op)))
	w.Close()
	seen := 0
	must(t, filepath.WalkDir(filepath.Join(dir, "nats"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		seen += bytes.Count(raw, []byte("carol"))
		for _, secret := range []string{op, strings.TrimPrefix(op, operatorPrefix), fleet, strings.Split(fleet, "_")[1]} {
			if bytes.Contains(raw, []byte(secret)) {
				t.Errorf("a token is in %s", path)
			}
		}
		return err
	}))
	if seen == 0 {
		t.Error("the records were not looked at")
	}
	// The token is good after a restart, and whoever else was let in can be lost: the owner's way in is a file.
	w = open(t, dir)
	defer w.Close()
	must(t, checkCall(w.as(t, op)))
	must(t, checkCall(w.op))
}

func checkCall(c *api.Client) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := c.Devices(ctx)
	return err
}

// A lost last admin is no lost fleet.
func TestTheOwnersFileAlwaysLetsIn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	ctx := testContext(t)
	admin := w.newOperator(t, "carol", api.Admin)
	_, err := w.op.RevokeOperator(ctx, "carol")
	must(t, err)
	w.Close()
	must(t, os.Remove(filepath.Join(dir, ContextFile)))
	old := w.op
	w = open(t, dir)
	defer w.Close()
	must(t, checkCall(w.op))
	wantRefusal(t, checkCall(w.as(t, admin.Token)), http.StatusUnauthorized, "token_revoked")
	at := old.Context("")
	if at.CA != w.op.Context("").CA {
		t.Error("the fleet's authority is another")
	}
}
