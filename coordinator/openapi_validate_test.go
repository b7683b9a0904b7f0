package coordinator

import (
	"context"
	"encoding/json"
	"net/http/httptest"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// These need a validator of OpenAPI 3.1, github.com/getkin/kin-openapi: build with -tags kin.

func loaded(t *testing.T, w *world) *openapi3.T {
	t.Helper()
	raw, _ := described(t, w)
	doc, err := openapi3.NewLoader().LoadFromData(raw)
	must(t, err)
	return doc
}

func TestTheDescriptionIsValid(t *testing.T) {
	t.Parallel()
	doc := loaded(t, aWorld(t))
	must(t, doc.Validate(context.Background()))
	if !doc.IsOpenAPI31OrLater() {
		t.Errorf("it is OpenAPI %s", doc.OpenAPI)
	}
}

func operationIn(doc *openapi3.T, method, path string) *openapi3.Operation {
	item := doc.Paths.Value(openapiPath(path))
	if item == nil {
		return nil
	}
	return item.GetOperation(method)
}

// answerFits checks an answer against the description.
func answerFits(t *testing.T, doc *openapi3.T, method, pattern string, rec *httptest.ResponseRecorder) {
	t.Helper()
	op := operationIn(doc, method, pattern)
	if op == nil {
		t.Fatalf("%s %s is not described", method, pattern)
	}
	answer := op.Responses.Status(rec.Code)
	if answer == nil && rec.Code >= 400 {
		answer = op.Responses.Default()
	}
	if answer == nil {
		t.Fatalf("%s %s: %d is not described", method, pattern, rec.Code)
	}
	var v any
	must(t, json.Unmarshal(rec.Body.Bytes(), &v))
	schema := answer.Value.Content.Get("application/json").Schema.Value
	if err := schema.VisitJSON(v, openapi3.EnableJSONSchema2020()); err != nil {
		t.Errorf("%s %s: %s\n%v", method, pattern, rec.Body, err)
	}
}

func TestAnswersAreAsDescribed(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	doc := loaded(t, w)
	d := w.device(t)
	w.putFile(t, "described", someBytes(3000), 1)
	_, err := w.op.CreateOperator(testContext(t), api.OperatorRequest{Name: "described", Role: api.Viewer})
	must(t, err)
	for _, c := range []struct {
		method, pattern, path string
		body                  any
		status                int
	}{
		{"GET", "/devices", "", nil, 200},
		{"GET", "/devices/{id}", "/devices/" + string(d.id), nil, 200},
		{"GET", "/devices/{id}", "/devices/nobody", nil, 404},
		{"GET", "/objects", "", nil, 200},
		{"GET", "/objects/{name}", "/objects/described", nil, 200},
		{"GET", "/audits", "", nil, 200},
		{"POST", "/audits", "", api.AuditRequest{Kind: api.StorageAudit, Device: d.id}, 200},
		{"POST", "/audits", "", api.AuditRequest{Kind: "none"}, 404},
		{"POST", "/tokens", "", api.TokenRequest{Group: "g"}, 200},
		{"GET", "/operators", "", nil, 200},
		{"POST", "/operators", "", api.OperatorRequest{Name: "other", Role: api.Admin}, 200},
		{"POST", "/operators/{name}/revoke", "/operators/other/revoke", nil, 200},
		{"GET", "/log", "", nil, 200},
		{"GET", "/log", "/log?limit=x", nil, 400},
	} {
		if c.path == "" {
			c.path = c.pattern
		}
		rec := answersFor(t, w, c.method, v1+c.path, c.body)
		if rec.Code != c.status {
			t.Errorf("%s %s: %d %s", c.method, c.path, rec.Code, rec.Body)
		}
		answerFits(t, doc, c.method, v1+c.pattern, rec)
	}
	// The check can fail.
	schema := operationIn(doc, "GET", v1+"/devices").Responses.Status(200).Value.Content.Get("application/json").Schema.Value
	if schema.VisitJSON([]any{map[string]any{"id": 7.0}}, openapi3.EnableJSONSchema2020()) == nil {
		t.Error("a device whose id is a number is as described")
	}
}
