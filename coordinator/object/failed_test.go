package object

import (
	"bytes"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// However many shards cannot be read, and whatever is said of each, the error is a line
// that a person reads.
func TestTheErrorOfAStripeIsOneLine(t *testing.T) {
	s, c := newShelf(t)
	id := newIdentity(t)
	putCoded(t, c, "f", randomBytes(t, 5000), api.Code{Data: 3, Parity: 6}, 500, id)
	s.odd = chunkGets(func(w http.ResponseWriter, _ string) bool {
		answer(w, http.StatusServiceUnavailable, wire.APIError{Code: "unreadable", Reason: "the cause\nis this: " + strings.Repeat("ä", 500)})
		return true
	})
	_, err := Get(testContext(t), c, "f", &bytes.Buffer{}, keyOf(id))
	if err == nil {
		t.Fatal("it was read")
	}
	text := err.Error()
	if strings.Contains(text, "\n") || utf8.RuneCountInString(text) > 800 || !strings.Contains(text, "and 6 more") || strings.Count(text, "shard ") != maxProblems || !strings.Contains(text, "the cause is this") {
		t.Errorf("%d characters: %s", utf8.RuneCountInString(text), text)
	}
}
