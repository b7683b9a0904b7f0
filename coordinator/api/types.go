// Package api is the operator's side of a coordinator: the types of its HTTPS
// API and a client for it. The command line uses only this.
//
// The API lives below /api/v1 on the coordinator's HTTPS address, and describes
// itself: GET /api/v1/openapi.json is an OpenAPI 3.1 document made from what is
// served, so there is no list of the calls here. Every request carries
// "Authorization: Bearer <operator token>". Every answer with a status of 400 or
// above has a [wire.APIError] as its body; one with 429 says in Retry-After when
// to ask again. Sizes are bytes, times are RFC 3339 in UTC, binary fields are
// base64 (encoding/json's).
package api

// RepoFile is a file of the update repository as the coordinator has it.
type RepoFile struct {
	Path   string `json:"path"`   // e.g. "metadata/timestamp.json"
	Size   int64  `json:"size"`   // bytes
	SHA256 string `json:"sha256"` // of the content, lower-case hex, as the coordinator found it to be
}

// OfferRequest offers a published release to devices.
type OfferRequest struct {
	Version string `json:"version"`
	Target  string `json:"target"`        // name in the TUF targets metadata
	Key     string `json:"key,omitempty"` // as in [SendRequest]
	Selector
}
