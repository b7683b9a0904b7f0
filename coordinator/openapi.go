package coordinator

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"github.com/swaggest/jsonschema-go"

	"github.com/deimos-edge/deimos/wire"
)

// The description of the HTTP surface is made from its table of routes and the
// Go types of their bodies, so that it cannot tell of anything else.

// Names of the security schemes in it.
const (
	operatorScheme = "operator"
	deviceScheme   = "device"
)

func (c *Coordinator) openapiRoutes() []route {
	// It has no secret, and who writes a client has no token yet.
	describe := sync.OnceValues(func() ([]byte, error) { return openapi(c.table()) })
	return []route{
		{method: "GET", path: v1 + "/openapi.json", needs: byAnybody, summary: "This description", out: json.RawMessage{},
			handle: func(w http.ResponseWriter, _ *http.Request) error {
				raw, err := describe()
				if err == nil {
					w.Header().Set("Content-Type", "application/json")
					_, _ = w.Write(raw) // the peer went away: nobody is left to tell
				}
				return err
			}},
	}
}

// The parts of an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.1.html)
// that are used here.
type (
	apiDocument struct {
		OpenAPI    string                              `json:"openapi"`
		Info       apiInfo                             `json:"info"`
		Paths      map[string]map[string]*apiOperation `json:"paths"` // path → method in lower case
		Components apiComponents                       `json:"components"`
	}
	apiInfo struct {
		Title       string `json:"title"`
		Version     string `json:"version"`
		Description string `json:"description"`
	}
	apiComponents struct {
		Schemas         map[string]schema    `json:"schemas"`
		SecuritySchemes map[string]apiScheme `json:"securitySchemes"`
	}
	apiScheme struct {
		Type        string `json:"type"`
		Scheme      string `json:"scheme,omitempty"`
		Description string `json:"description"`
	}
	apiOperation struct {
		ID          string                 `json:"operationId"`
		Summary     string                 `json:"summary"`
		Description string                 `json:"description,omitempty"`
		Security    []map[string][]string  `json:"security,omitempty"`
		Parameters  []apiParameter         `json:"parameters,omitempty"`
		RequestBody *apiBody               `json:"requestBody,omitempty"`
		Responses   map[string]apiResponse `json:"responses"` // status, or "default"
	}
	apiParameter struct {
		Name        string `json:"name"`
		In          string `json:"in"`
		Description string `json:"description,omitempty"`
		Required    bool   `json:"required,omitempty"`
		Schema      schema `json:"schema"`
	}
	apiBody struct {
		Required bool                `json:"required"`
		Content  map[string]apiMedia `json:"content"`
	}
	apiResponse struct {
		Description string              `json:"description"`
		Content     map[string]apiMedia `json:"content,omitempty"`
	}
	apiMedia struct {
		Schema schema `json:"schema"`
	}
	// schema is a JSON schema (draft 2020-12).
	schema = map[string]any
)

// description is a document that is being made.
type description struct {
	apiDocument
	types jsonschema.Reflector
}

// openapi describes routes.
func openapi(routes []route) ([]byte, error) {
	d := description{apiDocument: apiDocument{
		OpenAPI: "3.1.0",
		Info: apiInfo{Title: "Deimos coordinator", Version: "1", Description: "Operators' calls are below " + v1 + ". " +
			"Sizes are bytes, times are RFC 3339 in UTC, binary fields are base64. Whatever has a status of 400 or above is explained in its body."},
		Paths: make(map[string]map[string]*apiOperation),
		Components: apiComponents{Schemas: make(map[string]schema), SecuritySchemes: map[string]apiScheme{
			operatorScheme: {Type: "http", Scheme: "bearer", Description: "An operator's token"},
			deviceScheme:   {Type: "mutualTLS", Description: "The client certificate that a device got when it enrolled"},
		}},
	}}
	for _, rt := range routes {
		op, err := d.operation(rt)
		if err != nil {
			return nil, fmt.Errorf("%s %s cannot be described: %w", rt.method, rt.path, err)
		}
		path := openapiPath(rt.path)
		if d.Paths[path] == nil {
			d.Paths[path] = make(map[string]*apiOperation)
		}
		d.Paths[path][strings.ToLower(rt.method)] = op
	}
	return json.Marshal(d.apiDocument)
}

// openapiPath is a path of [http.ServeMux] as OpenAPI writes it. There a
// variable cannot span several parts: its slashes are then part of the value.
func openapiPath(p string) string { return strings.ReplaceAll(p, "...}", "}") }

func (d *description) operation(rt route) (*apiOperation, error) {
	op := &apiOperation{ID: operationID(rt), Summary: rt.summary}
	switch rt.needs {
	case byAnybody:
	case byDevice:
		op.Security = []map[string][]string{{deviceScheme: {}}}
	default:
		op.Security = []map[string][]string{{operatorScheme: {}}}
		op.Description = "For operators with the role " + rolesText(rt.needs) + "."
	}
	for _, n := range rt.pathNames() {
		op.Parameters = append(op.Parameters, apiParameter{Name: n, In: "path", Required: true, Schema: schema{"type": "string"}})
	}
	for _, q := range rt.query {
		s, err := d.schemaOf(q.kind)
		if err != nil {
			return nil, err
		}
		op.Parameters = append(op.Parameters, apiParameter{Name: q.name, In: "query", Description: q.about, Schema: s})
	}
	if rt.in != nil {
		content, err := d.content(rt.in)
		if err != nil {
			return nil, err
		}
		op.RequestBody = &apiBody{Required: true, Content: content}
	}
	op.Responses = make(map[string]apiResponse)
	for status, r := range map[string]struct {
		about string
		body  any
	}{
		"200":     {"Done", rt.out},
		"202":     {"Accepted, and not done yet", rt.accepted},
		"default": {"Refused, or failed", wire.APIError{}},
	} {
		if r.body == nil {
			continue
		}
		content, err := d.content(r.body)
		if err != nil {
			return nil, err
		}
		op.Responses[status] = apiResponse{r.about, content}
	}
	if rt.out == nil {
		op.Responses["204"] = apiResponse{Description: "Done"}
	}
	return op, nil
}

// operationID names an operation for who makes a client from the description,
// as in getDevicesId.
func operationID(rt route) string {
	id := strings.ToLower(rt.method)
	for _, p := range strings.FieldsFunc(strings.TrimPrefix(rt.path, v1), func(r rune) bool { return strings.ContainsRune("/{}._-", r) }) {
		id += strings.ToUpper(p[:1]) + p[1:]
	}
	return id
}

func (d *description) content(body any) (map[string]apiMedia, error) {
	if _, plain := body.(bytes.Buffer); plain {
		return map[string]apiMedia{"application/octet-stream": {schema{}}}, nil
	}
	s, err := d.schemaOf(body)
	return map[string]apiMedia{"application/json": {s}}, err
}

// schemaOf is the schema of the JSON of a type; those of named types are put
// with the components.
func (d *description) schemaOf(v any) (schema, error) {
	var failed error
	s, err := d.types.Reflect(v, jsonschema.RootRef, jsonschema.DefinitionsPrefix("#/components/schemas/"),
		jsonschema.CollectDefinitions(func(name string, def jsonschema.Schema) {
			m, err := def.ToSchemaOrBool().ToSimpleMap()
			if err != nil {
				failed = err
			}
			d.Components.Schemas[name] = m
		}))
	if err != nil {
		return nil, err
	}
	m, err := s.ToSchemaOrBool().ToSimpleMap()
	if err == nil {
		err = failed
	}
	return m, err
}
