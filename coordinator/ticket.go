package coordinator

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// ticket is permission for one device to move one blob once or more, one way,
// up to a size and a time, and if it names an order, while that is under way. It travels in the URL of an order and needs no
// memory: HMAC-SHA-256 over all of its fields under the authority's ticket key.
type ticket struct {
	method  string // http.MethodGet or http.MethodPut
	device  wire.DeviceID
	blob    blobRef
	size    int64 // bytes; exactly this many
	expires time.Time
	order   string // may be empty
}

const blobPath = "/data/v1/blob/"

// issue makes the URL path of a ticket.
func (a *authority) issue(t ticket) string {
	q := url.Values{
		"size": {strconv.FormatInt(t.size, 10)},
		"exp":  {strconv.FormatInt(t.expires.Unix(), 10)},
		"sig":  {base64.RawURLEncoding.EncodeToString(a.signTicket(t))},
	}
	if t.order != "" {
		q.Set("order", t.order)
	}
	return blobPath + t.blob.String() + "?" + q.Encode()
}

// redeem checks the ticket in a request's URL for the device that shows it.
func (a *authority) redeem(r *http.Request, device wire.DeviceID, blob blobRef) (ticket, error) {
	q := r.URL.Query()
	size, err1 := strconv.ParseInt(q.Get("size"), 10, 64)
	exp, err2 := strconv.ParseInt(q.Get("exp"), 10, 64)
	sig, err3 := base64.RawURLEncoding.DecodeString(q.Get("sig"))
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	t := ticket{method: method, device: device, blob: blob, size: size, expires: time.Unix(exp, 0), order: q.Get("order")}
	if err1 != nil || err2 != nil || err3 != nil || !hmac.Equal(sig, a.signTicket(t)) {
		return t, refuse(http.StatusForbidden, "bad_ticket", "this address is not meant for this device")
	}
	if time.Now().After(t.expires) {
		return t, refuse(http.StatusGone, "expired", "this address expired at %s", t.expires.UTC().Format(time.RFC3339))
	}
	return t, nil
}

func (a *authority) signTicket(t ticket) []byte {
	m := hmac.New(sha256.New, a.ticketKey)
	// Length-prefixed, so that no two tickets have the same bytes.
	for _, f := range []string{"deimos ticket v1", t.method, string(t.device), t.blob.String()} {
		_ = binary.Write(m, binary.BigEndian, uint32(len(f))) // a hash does not fail
		m.Write([]byte(f))
	}
	_ = binary.Write(m, binary.BigEndian, []int64{t.size, t.expires.Unix()})
	m.Write([]byte(t.order))
	return m.Sum(nil)
}

// blobRef names a blob: what it is, and its content's id.
type blobRef struct {
	kind blobKind
	id   string // lower-case hex, 64 digits
}

type blobKind string

const (
	chunkBlob  blobKind = "chunk"  // id is the Merkle root
	servedBlob blobKind = "served" // the same, on its way from a device to a reader
	inputBlob  blobKind = "input"  // a chunk that a job reads and its device does not hold
	moduleBlob blobKind = "module" // id is SHA-256
	listBlob   blobKind = "list"   // of the parts of a job's input; id is SHA-256
)

func (b blobRef) String() string { return string(b.kind) + "/" + b.id }

func parseBlobRef(kind, id string) (blobRef, error) {
	b := blobRef{blobKind(kind), id}
	if !slices.Contains([]blobKind{chunkBlob, servedBlob, inputBlob, moduleBlob, listBlob}, b.kind) {
		return b, fmt.Errorf("%q is no kind of blob", kind)
	}
	if len(id) != 64 {
		return b, fmt.Errorf("%q is no id of a blob: it must have 64 digits", id)
	}
	for _, c := range id {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return b, fmt.Errorf("%q is no id of a blob: only 0-9 and a-f are used", id)
		}
	}
	return b, nil
}
