package coordinator

import (
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// What is misspelt, left out or said twice must not become the whole fleet.
func TestARequestForEverybodySaysSo(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.enrolled(t)
	owner, err := api.LoadContext(filepath.Join(w.dir, ContextFile))
	must(t, err)
	for path, c := range map[string]struct{ method, rest string }{
		"/devices": {"PATCH", `"set_group":"g"`},
		"/orders":  {"POST", `"kind":"device.ping"`},
		"/offers":  {"POST", `"version":"9.9.9","target":"bundles/9.9.9.json"`},
	} {
		ask := func(body string) int {
			return w.serveLocal(c.method, v1+path, owner.Token, "192.0.2.1:7", []byte(body)).Code
		}
		for _, sel := range []string{``, `"all":false,`, `"gruops":["x"],"all":true,`, `"group":"x","all":true,`, `"groups":["x"],"all":true,`, `"groups":[""],`, `"groups":[],`, `"labels":{},`} {
			if got := ask("{" + sel + c.rest + "}"); got != http.StatusBadRequest {
				t.Errorf("%s %s %s: %d", c.method, path, sel, got)
			}
		}
		if got := ask(`{"all":true,` + c.rest + `} {}`); got != http.StatusBadRequest {
			t.Errorf("%s %s with two bodies: %d", c.method, path, got)
		}
		want := http.StatusOK
		if path == "/offers" {
			want = http.StatusNotFound // nothing is published
		}
		if got := ask(`{"all":true,` + c.rest + "}\n "); got != want {
			t.Errorf("%s %s for all: %d", c.method, path, got)
		}
	}
}

// A client made from the description sends what can be repeated as often as needed.
func TestSelectorsAreDescribedAsLists(t *testing.T) {
	t.Parallel()
	raw, err := openapi(aWorld(t).table())
	must(t, err)
	var doc apiDocument
	must(t, json.Unmarshal(raw, &doc))
	for _, path := range []string{"/devices", "/orders", "/config/devices"} {
		lists := 0
		for _, p := range doc.Paths[v1+path]["get"].Parameters {
			if (p.Name == "device" || p.Name == "group" || p.Name == "label") && strings.Contains(fmt.Sprint(p.Schema["type"]), "array") && p.Schema["items"] != nil {
				lists++
			}
		}
		if lists != 3 {
			t.Errorf("%s: %d lists", path, lists)
		}
	}
}
