package coordinator

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// fuzzCall sends a body to the handlers without a network. Whatever it is, the
// answer is a success or a refusal in words, and never the coordinator's fault.
func fuzzCall(t *testing.T, w *world, method, path, token string, body []byte) {
	t.Helper()
	r := httptest.NewRequest(method, path, bytes.NewReader(body)).WithContext(testContext(t))
	r.Header.Set("Authorization", "Bearer "+token)
	rec := httptest.NewRecorder()
	w.routes().ServeHTTP(rec, r)
	if rec.Code < 400 {
		return
	}
	var e wire.APIError
	if err := json.Unmarshal(rec.Body.Bytes(), &e); err != nil || e.Code == "" || e.Reason == "" {
		t.Errorf("%s %s: %d %q", method, path, rec.Code, rec.Body)
	}
	if rec.Code >= 500 {
		t.Errorf("%s %s with %q: %d %s", method, path, body, rec.Code, e.Reason)
	}
}

func FuzzEnrol(f *testing.F) {
	w := aWorld(f)
	tok := w.newToken(f, api.TokenRequest{Uses: maxTokenUse})
	good, err := json.Marshal(wire.EnrolRequest{CSR: csr(f, newKey(f)), Token: tok})
	must(f, err)
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"board":""`), []byte(`"inventory":{"a":[1,null]}`), 1))
	f.Add([]byte(`{"csr":"MA==","token":"` + tok + `"}`))
	f.Add([]byte(`{"token":"deimos_a_b"}`))
	waits, err := json.Marshal(wire.EnrolRequest{CSR: csr(f, newKey(f)), Agent: "\x1b[2J", Board: strings.Repeat("é", 99)})
	must(f, err)
	f.Add(waits)
	member, err := json.Marshal(wire.EnrolRequest{CSR: csr(f, w.enrolled(f).key), Token: "nonsense"})
	must(f, err)
	f.Add(member)
	gone := w.enrolled(f)
	w.retire(f, gone.id)
	retired, err := json.Marshal(wire.EnrolRequest{CSR: csr(f, gone.key)})
	must(f, err)
	f.Add(retired)
	f.Add([]byte(`[]`))
	f.Add([]byte(`{"csr":1e999}`))
	minimizeBriefly(f)
	f.Fuzz(func(t *testing.T, body []byte) { fuzzCall(t, w, http.MethodPost, "/enrol/v1", "", body) })
}

func FuzzOperatorBodies(f *testing.F) {
	w := aWorld(f)
	at, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(f, err)
	d := w.enrolled(f)
	for i, body := range []string{
		`{"module":"x","object":"o","chunk":-9223372036854775808}`, `{"kind":"storage","device":"` + string(d.id) + `"}`,
		`{"kind":"compute","device":"` + string(d.id) + `","module":"../../x"}`, `{"uses":-1,"valid_seconds":9223372036854775807}`,
		`{"code":"aaaaa-aaaaa-aaaaa","labels":{"":""}}`, `{"set_group":null,"set_labels":{"a":"b"},"devices":["x"]}`, `{"remove_labels":["",null],"groups":["\u0000"]}`,
		`{"version":"1","target":"x","devices":[""]}`, `{"name":"o","size":0,"chunks":[]}`, `{"size":-1,"chunks":[{"id":"","size":-1}]}`, `null`, `[`,
	} {
		f.Add(byte(i), []byte(body))
	}
	minimizeBriefly(f)
	f.Fuzz(func(t *testing.T, which byte, body []byte) {
		routes := [][2]string{{http.MethodPost, "/api/v1/jobs"}, {http.MethodPost, "/api/v1/audits"}, {http.MethodPost, "/api/v1/tokens"},
			{http.MethodPost, "/api/v1/offers"}, {http.MethodPut, "/api/v1/objects/fuzz"},
			{http.MethodPost, "/api/v1/claims"}, {http.MethodPatch, "/api/v1/devices"}}
		r := routes[int(which)%len(routes)]
		fuzzCall(t, w, r[0], r[1], at.Token, body)
	})
}

// FuzzPaths asks for names of things that a caller may make up.
func FuzzPaths(f *testing.F) {
	w := aWorld(f)
	at, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(f, err)
	for _, s := range []string{"x", "..", ".", "a/b", "*", ">", "\x00", "\xff", strings.Repeat("a", 64), strings.Repeat("f", 63) + "G", "a b", "%2e%2e", "$KV.devices.x"} {
		f.Add(s)
	}
	minimizeBriefly(f)
	f.Fuzz(func(t *testing.T, s string) {
		one := url.PathEscape(s)
		if s == "" || s == "." || s == ".." {
			one = "%2E"
		}
		for _, p := range []string{"devices/" + one, "devices?state=" + url.QueryEscape(s), "devices?label=" + url.QueryEscape(s), "chunks/" + one, "objects/" + one, "modules/" + one, "orders/" + one + "/" + one + "?wait=" + url.QueryEscape(s[:min(1, len(s))])} {
			fuzzCall(t, w, http.MethodGet, "/api/v1/"+p, at.Token, nil)
		}
		fuzzCall(t, w, http.MethodDelete, "/api/v1/objects/"+one, at.Token, nil)
		fuzzCall(t, w, http.MethodDelete, "/api/v1/claims/"+one, at.Token, nil)
		fuzzCall(t, w, http.MethodPost, "/api/v1/tokens/"+one+"/revoke", at.Token, nil)
		fuzzCall(t, w, http.MethodPost, "/api/v1/devices/"+one+"/retire", at.Token, nil)
		fuzzCall(t, w, http.MethodPut, "/api/v1/repo/"+one, at.Token, []byte("x"))
	})
}

func FuzzBlobRef(f *testing.F) {
	f.Add("chunk", strings.Repeat("a", 64))
	f.Add("module", strings.Repeat("A", 64))
	f.Add("served", strings.Repeat("é", 32))
	f.Add("attachment", strings.Repeat("0", 64))
	f.Add("", "")
	f.Fuzz(func(t *testing.T, kind, id string) {
		ref, err := parseBlobRef(kind, id)
		if err != nil {
			return
		}
		if ref.String() != kind+"/"+id || len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "" ||
			kind != "chunk" && kind != "served" && kind != "module" {
			t.Errorf("%q %q was taken for a blob", kind, id)
		}
	})
}

func FuzzRepoPath(f *testing.F) {
	for _, s := range []string{"metadata/1.root.json", "targets/bundles/a+b_c.json", "..", "a/../b", "/a", "a//b", "a/", ".", "a\x00", "a\\b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if checkRepoPath(s) != nil {
			return
		}
		if s != path.Clean(s) || path.IsAbs(s) || s == "." || strings.HasPrefix(s, "..") || len(s) > maxRepoPath || strings.ContainsAny(s, "\\ \x00\n") {
			t.Errorf("%q was taken for a file of the repository", s)
		}
	})
}
