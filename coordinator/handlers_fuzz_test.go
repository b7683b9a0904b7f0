package coordinator

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"hash/fnv"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// handlerInput is one call: a route by "METHOD /pattern", the values of its
// path's variables one a line, and the rest of a request. Words in capitals
// stand for what differs from one run to the next: DEVICE, OTHER, FLEETTOKEN, CHUNK,
// MODULE, TICKET and CSR.
type handlerInput struct {
	route, path, query, header string
	body                       []byte
}

// handlerSeeds are calls that get far, at least one for each route.
func handlerSeeds(c *Coordinator) []handlerInput {
	bodies := map[string][]string{
		"POST " + enrolPath: {`{"csr":"CSR","token":"FLEETTOKEN","agent":"1.0.0","os":"linux","arch":"arm64","board":"b","inventory":{"a":[1,null]}}`,
			`{"csr":"CSR"}`, `{"csr":"MA==","token":"FLEETTOKEN"}`},
		"POST " + v1 + "/tokens":                      {`{"group":"g","uses":3,"valid_seconds":60}`, `{"uses":-1,"valid_seconds":9223372036854775807}`},
		"POST " + v1 + "/operators":                   {`{"name":"carol","role":"viewer","valid_seconds":60}`},
		"POST " + v1 + "/audits":                      {`{"kind":"storage","device":"DEVICE"}`, `{"kind":"compute","device":"DEVICE","module":"MODULE","args":["a"]}`},
		"POST " + v1 + "/jobs":                        {`{"module":"MODULE","object":"o","chunk":0,"device":"DEVICE","limits":{"fuel":1}}`, `{"module":"x","object":"o","chunk":-9223372036854775808}`},
		"POST " + v1 + "/offers":                      {`{"version":"1.0.0","target":"x","devices":["DEVICE"],"labels":{"a":"b"}}`, `{"version":"1","target":"x","groups":[""]}`},
		"POST " + v1 + "/claims":                      {`{"code":"abcde-fghij-klmno","group":"g"}`},
		"PATCH " + v1 + "/devices":                    {`{"devices":["DEVICE"],"set_group":"g","set_labels":{"a":"b"},"remove_labels":["c"]}`},
		"PATCH " + v1 + "/config":                     {`{"all":true,"set":{"beat.seconds":60},"unset":["x"]}`, `{"set":{"x":{"a":[1]}},"force":true,"groups":["g"]}`},
		"POST " + v1 + "/orders":                      {`{"kind":"ping","body":{},"life_seconds":60,"key":"k","devices":["DEVICE"]}`, `{"kind":"chunk.drop","body":{"ids":["CHUNK"]},"life_seconds":1e300}`},
		"POST " + v1 + "/orders/{device}/{id}/cancel": {`{"reason":"a"}`},
		"PUT " + v1 + "/objects/{name}":               {`{"size":0,"sha256":"MODULE","chunks":[]}`, `{"size":3,"chunks":[{"id":"CHUNK","size":3}]}`},
		"PUT " + v1 + "/modules/{id}":                 {"module"},
		"PUT " + v1 + "/chunks/{id}":                  {"abc"},
		"PUT " + v1 + "/repo/{path...}":               {"{}"},
		"PUT " + blobPath + "{kind}/{id}":             {"abc"},
	}
	paths := map[string][]string{"{kind}/{id}": {"chunk\nCHUNK", "module\nMODULE", "served\nCHUNK"}, "/chunks/{id}": {"CHUNK"}, "/modules/{id}": {"MODULE"},
		"{path...}": {"metadata/1.root.json", "a/../b"}, "/devices/{": {"DEVICE"}, "{device}/{": {"DEVICE\nx"}, "/audits/{": {"01ARZ3NDEKTSV4RRFFQ69G5FAV"}, "/operators/{": {"carol"}, "/objects/{": {"o"}}
	var out []handlerInput
	for _, rt := range c.table() {
		in := handlerInput{route: rt.method + " " + rt.path, path: strings.Repeat("x\n", len(rt.pathNames())), header: "bytes=0-1"}
		var query []string
		for _, q := range rt.query {
			if v := strings.Trim(fmt.Sprint(q.kind), "[]"); v != "" && v != "0" {
				query = append(query, q.name+"="+v)
			}
		}
		in.query = strings.Join(query, "&")
		if strings.HasPrefix(rt.path, blobPath) {
			in.query = "TICKET"
		}
		if hasJSON(rt.in) {
			in.body, _ = json.Marshal(rt.in)
		}
		out = append(out, in)
		for end, values := range paths {
			for _, v := range values {
				if strings.Contains(rt.path, end) {
					next := in
					next.path = v
					if strings.HasSuffix(rt.path, "/retire") {
						next.path = "OTHER" // the one that is here to go
					}
					out = append(out, next)
				}
			}
		}
		for _, b := range bodies[in.route] {
			next := out[len(out)-1]
			next.body = []byte(b)
			out = append(out, next)
		}
	}
	return out
}

// handlerWorld is a coordinator without limits and with something in it.
type handlerWorld struct {
	*world
	admin  string
	device *device
	cert   *x509.Certificate
	routes map[string]route
	words  *strings.Replacer
	mux    http.Handler
}

func newHandlerWorld(f testing.TB) *handlerWorld {
	w := ownWorld(f)
	w.audits.limit = 200 * time.Millisecond // challenges go on though who asked has left
	all, each := rate.NewLimiter(rate.Inf, 1), newBuckets(rate.Inf, 1)
	w.limits = &limits{enrol: each, enrol56: each, enrol48: each, enrolAll: all, renew: each, renewAll: all, logins: each, calls: each}
	h := &handlerWorld{world: w, admin: w.newOperator(f, "admin", api.Admin).Token, device: w.enrolled(f), routes: map[string]route{}, mux: w.Coordinator.routes()}
	var err error
	h.cert, err = x509.ParseCertificate(h.device.tls.Certificates[0].Certificate[0])
	must(f, err)
	for _, rt := range w.table() {
		h.routes[rt.method+" "+rt.path] = rt
	}
	data := []byte("abc")
	id := chunk.Sum(data).String()
	must(f, w.staging.put(testContext(f), "chunk/"+id, data))
	_, ticket, _ := strings.Cut(w.ticket(http.MethodGet, h.device, chunkBlob, id, 3, time.Hour), "?")
	module, err := w.op.PutModule(testContext(f), []byte("module"))
	must(f, err)
	request, err := json.Marshal(csr(f, newKey(f)))
	must(f, err)
	h.words = strings.NewReplacer("DEVICE", string(w.enrolled(f).id), "OTHER", string(w.enrolled(f).id), "FLEETTOKEN", w.newToken(f, api.TokenRequest{Uses: 1000}),
		"CHUNK", id, "MODULE", module, "TICKET", ticket, "CSR", strings.Trim(string(request), `"`))
	return h
}

// request makes a call of fuzz input; false if there is no such.
func (h *handlerWorld) request(in handlerInput) (*http.Request, bool) {
	rt, ok := h.routes[in.route]
	if !ok { // any text is some route
		sum := fnv.New32a()
		sum.Write([]byte(in.route))
		table := h.table()
		rt = table[int(sum.Sum32())%len(table)]
	}
	values := strings.Split(h.words.Replace(in.path), "\n")
	path := pathName.ReplaceAllStringFunc(rt.path, func(name string) string {
		v := "x"
		if len(values) > 0 && values[0] != "" {
			v, values = values[0], values[1:]
		}
		esc := strings.ReplaceAll(url.PathEscape(v), ".", "%2E")
		if strings.HasSuffix(name, "...}") {
			esc = strings.ReplaceAll(esc, "%2F", "/")
		}
		return esc
	})
	r, err := http.NewRequest(rt.method, "https://localhost"+path, bytes.NewReader([]byte(h.words.Replace(string(in.body)))))
	if err != nil {
		return nil, false
	}
	r.URL.RawQuery = h.words.Replace(in.query)
	r.RemoteAddr = "192.0.2.1:4711"
	for _, name := range []string{"Content-Type", "Range", "If-Range", "If-None-Match", "If-Match", "Deimos-Order"} {
		if v, ok := strings.CutPrefix(in.header, name+": "); ok || name == "Range" {
			r.Header.Set(name, v)
		}
	}
	if rt.needs == byDevice {
		r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{h.cert}}}
	} else {
		r.Header.Set("Authorization", "Bearer "+h.admin)
	}
	return r, true
}

// fuzzPatience is for calls that wait for devices, which wait in vain.
const fuzzPatience = 50 * time.Millisecond

// minimizeBriefly keeps the fuzzer fuzzing: what runs beside a handler makes
// coverage vary, so that every second input is thought to be new, and for each of
// them the fuzzer would take a minute to find a shorter one. Given
// -fuzzminimizetime holds.
func minimizeBriefly(f *testing.F) {
	v := flag.Lookup("test.fuzzminimizetime")
	if v.Value.String() == v.DefValue {
		must(f, v.Value.Set("10x"))
	}
}

// asksDevices is true for what may fail because of a device that is not there.
func asksDevices(path string) bool {
	for _, s := range []string{"/jobs", "/audits", "/chunks", "/objects"} {
		if strings.HasPrefix(path, v1+s) {
			return true
		}
	}
	return false
}

// FuzzHandlers calls every handler through the mux, as an admin or as a device.
// Whatever comes, it is answered; a refusal is in JSON and has a reason; and
// nothing that can be sent is the coordinator's own fault.
func FuzzHandlers(f *testing.F) {
	h := newHandlerWorld(f)
	minimizeBriefly(f)
	for _, in := range handlerSeeds(h.Coordinator) {
		f.Add(in.route, in.path, in.query, in.header, in.body)
	}
	f.Fuzz(func(t *testing.T, route, path, query, header string, body []byte) {
		r, ok := h.request(handlerInput{route, path, query, header, body})
		if !ok {
			t.Skip()
		}
		ctx, cancel := context.WithTimeout(r.Context(), fuzzPatience)
		defer cancel()
		rec := httptest.NewRecorder()
		h.mux.ServeHTTP(rec, r.WithContext(ctx))
		if rec.Code < 400 {
			return
		}
		var e wire.APIError
		if err := json.Unmarshal(rec.Body.Bytes(), &e); err != nil || e.Code == "" || e.Reason == "" || rec.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s %s: %d %q %v", r.Method, r.URL, rec.Code, rec.Body, rec.Header())
		}
		if rec.Code == http.StatusInternalServerError || !asksDevices(r.URL.Path) && (rec.Code == http.StatusBadGateway || rec.Code == http.StatusServiceUnavailable) {
			t.Errorf("%s %s with %q: %s", r.Method, r.URL, body, e.Reason)
		}
	})
}

// TestHandlerSeedsReachEveryRoute: a fuzz target that starts at the door learns
// nothing of the rooms. DEIMOS_WRITE_SEEDS=1 commits the seeds to testdata.
func TestHandlerSeedsReachEveryRoute(t *testing.T) {
	t.Parallel()
	h := newHandlerWorld(t)
	reached, done := map[string]bool{}, 0
	for _, in := range handlerSeeds(h.Coordinator) {
		r, ok := h.request(in)
		if !ok {
			t.Errorf("%+v is no request", in)
			continue
		}
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		r = r.WithContext(ctx)
		rec := httptest.NewRecorder()
		h.mux.ServeHTTP(rec, r)
		cancel()
		if r.Pattern != in.route {
			t.Errorf("a seed for %s came to %q: %s", in.route, r.Pattern, r.URL)
		}
		if rec.Code == http.StatusUnauthorized || rec.Code == http.StatusTooManyRequests {
			t.Errorf("%s: %d %s", in.route, rec.Code, rec.Body)
		}
		if rec.Code < 300 {
			done++
		}
		t.Log(rec.Code, r.Method, r.URL.Path, strings.TrimSpace(rec.Body.String()[:min(150, rec.Body.Len())]))
		reached[in.route] = true
		if os.Getenv("DEIMOS_WRITE_SEEDS") != "" {
			writeSeed(t, in)
		}
	}
	for _, rt := range h.table() {
		if !reached[rt.method+" "+rt.path] {
			t.Errorf("no seed for %s %s", rt.method, rt.path)
		}
	}
	if done < 15 {
		t.Errorf("only %d seeds have an effect", done)
	}
}

func writeSeed(t *testing.T, in handlerInput) {
	t.Helper()
	dir := filepath.Join("testdata", "fuzz", "FuzzHandlers")
	must(t, os.MkdirAll(dir, 0o755))
	text := fmt.Sprintf("go test fuzz v1\nstring(%q)\nstring(%q)\nstring(%q)\nstring(%q)\n[]byte(%q)\n", in.route, in.path, in.query, in.header, in.body)
	sum := fnv.New64a()
	sum.Write([]byte(text))
	must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("seed-%016x", sum.Sum64())), []byte(text), 0o644))
}
