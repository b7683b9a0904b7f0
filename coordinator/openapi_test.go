package coordinator

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// described is the description as a coordinator serves it, to anybody.
func described(t testing.TB, w *world) ([]byte, apiDocument) {
	t.Helper()
	resp, err := w.plain(nil).Get(w.URL() + v1 + "/openapi.json")
	must(t, err)
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	must(t, err)
	var doc apiDocument
	must(t, json.Unmarshal(raw, &doc))
	return raw, doc
}

func TestEveryRouteIsDescribed(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	raw, doc := described(t, w)
	ids := map[string]bool{}
	for _, rt := range w.table() {
		op := doc.Paths[openapiPath(rt.path)][strings.ToLower(rt.method)]
		if op == nil {
			t.Errorf("%s %s is not described", rt.method, rt.path)
			continue
		}
		if rt.summary == "" || op.Summary != rt.summary || op.ID == "" || ids[op.ID] {
			t.Errorf("%s %s: summary %q, id %q", rt.method, rt.path, op.Summary, op.ID)
		}
		ids[op.ID] = true
		scheme := operatorScheme
		switch rt.needs {
		case byAnybody:
			scheme = ""
		case byDevice:
			scheme = deviceScheme
		}
		if scheme == "" && op.Security != nil || scheme != "" && (len(op.Security) != 1 || op.Security[0][scheme] == nil) {
			t.Errorf("%s %s needs %s and is described as %v", rt.method, rt.path, rt.needs, op.Security)
		}
		if (rt.in != nil) != (op.RequestBody != nil) || len(op.Responses) < 2 || len(op.Parameters) != len(rt.query)+len(rt.pathNames()) {
			t.Errorf("%s %s: something is missing: %+v", rt.method, rt.path, op)
		}
	}
	// What it refers to is in it.
	for _, ref := range strings.Split(string(raw), `"$ref":"#/components/schemas/`)[1:] {
		name, _, _ := strings.Cut(ref, `"`)
		if doc.Components.Schemas[name] == nil {
			t.Errorf("there is no schema %s", name)
		}
	}
}

// answersFor asks as the owner, without a network.
func answersFor(t testing.TB, w *world, method, path string, body any) *httptest.ResponseRecorder {
	t.Helper()
	at, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(t, err)
	raw, err := json.Marshal(body)
	must(t, err)
	r := httptest.NewRequest(method, path, bytes.NewReader(raw)).WithContext(testContext(t))
	r.Header.Set("Authorization", "Bearer "+at.Token)
	rec := httptest.NewRecorder()
	w.server.Handler.ServeHTTP(rec, r)
	return rec
}

// pathOf finds the pattern of the description that a request is for.
func pathOf(doc apiDocument, method, path string) string {
	if method == http.MethodHead {
		method = http.MethodGet // whose answer it is the head of
	}
	for pattern, item := range doc.Paths {
		if item[strings.ToLower(method)] == nil {
			continue
		}
		want, got := strings.Split(pattern, "/"), strings.Split(path, "/")
		ok := len(want) == len(got) || strings.HasSuffix(pattern, "/{path}") && len(got) > len(want)
		for i := 0; ok && i < len(want); i++ {
			ok = strings.HasPrefix(want[i], "{") || want[i] == got[i]
		}
		if ok {
			return pattern
		}
	}
	return ""
}

// TestTheClientAsksOnlyForWhatIsDescribed calls every method of the client, of
// which the command line uses nothing else.
func TestTheClientAsksOnlyForWhatIsDescribed(t *testing.T) {
	t.Parallel()
	_, doc := described(t, aWorld(t))
	asked := make(chan string, 10_000)
	srv := httptest.NewTLSServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		asked <- r.Method + " " + r.URL.EscapedPath()
		status := http.StatusTeapot
		if r.Method == http.MethodHead {
			status = http.StatusNotFound // it is uploaded then
		}
		writeJSON(rw, status, wire.APIError{Code: "test", Reason: "this is a test"})
	}))
	defer srv.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	c, err := api.NewClient(api.Context{URL: srv.URL, Token: "t", CA: string(ca)})
	must(t, err)
	ctx := testContext(t)
	seen := map[string]bool{}
	// The verb is a part of the path: each is asked for by itself.
	for _, verb := range []string{api.CampaignPause, api.CampaignResume, api.CampaignApprove, api.CampaignAbort} {
		_, _ = c.SteerCampaign(ctx, "x", verb, "")
		if len(asked) != 1 {
			t.Fatalf("%s made %d requests", verb, len(asked))
		}
		a := <-asked
		seen[a] = true
		method, path, _ := strings.Cut(a, " ")
		if want := v1 + "/campaigns/{id}/" + verb; pathOf(doc, method, path) != want {
			t.Errorf("SteerCampaign asks for %s, which is not %s", a, want)
		}
	}
	for i := range reflect.TypeOf(c).NumMethod() {
		if reflect.TypeOf(c).Method(i).Name == "SteerCampaign" {
			continue // above
		}
		m := reflect.ValueOf(c).Method(i)
		args := []reflect.Value{}
		for j := range m.Type().NumIn() {
			switch in := m.Type().In(j); {
			case in == reflect.TypeFor[context.Context]():
				args = append(args, reflect.ValueOf(ctx))
			case in.Kind() == reflect.String:
				args = append(args, reflect.ValueOf("x").Convert(in))
			default:
				args = append(args, reflect.Zero(in))
			}
		}
		name := reflect.TypeOf(c).Method(i).Name
		if m.Type().IsVariadic() {
			args = args[:len(args)-1]
		}
		m.Call(args)
		for len(asked) > 0 {
			a := <-asked
			seen[a] = true
			method, path, _ := strings.Cut(a, " ")
			if pathOf(doc, method, path) == "" {
				t.Errorf("%s asks for %s, which is not described", name, a)
			}
		}
	}
	if len(seen) < 20 {
		t.Errorf("only %d requests were seen: %v", len(seen), seen)
	}
	if p := pathOf(doc, "GET", v1+"/nothing"); p != "" {
		t.Errorf("anything passes for described: %s", p)
	}
}
