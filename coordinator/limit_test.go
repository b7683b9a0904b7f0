package coordinator

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// wantSlowly checks a refusal that says when to come back, and gives when.
func wantSlowly(t *testing.T, rec *httptest.ResponseRecorder) time.Duration {
	t.Helper()
	var e wire.APIError
	seconds, err := strconv.Atoi(rec.Header().Get("Retry-After"))
	if json.Unmarshal(rec.Body.Bytes(), &e) != nil || rec.Code != http.StatusTooManyRequests || e.Code != "too_many" ||
		err != nil || seconds < 1 || !strings.Contains(e.Reason, "try again in") {
		t.Fatalf("%d %v %s", rec.Code, rec.Header(), rec.Body)
	}
	return time.Duration(seconds) * time.Second
}

func TestEnrolmentIsBoundedForAnAddressAndForAll(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.freeze()
	ask := func(from string) *httptest.ResponseRecorder {
		return w.serveLocal(http.MethodPost, enrolPath, "", from, []byte("{"))
	}
	let := func(from string, most int) (n int) {
		for n < most && ask(from).Code != http.StatusTooManyRequests {
			n++
		}
		return n
	}
	burst := w.limits.enrol.burst
	if n := let("192.0.2.1:1", 10*burst); n != burst {
		t.Errorf("one address may ask %d times at once, want %d", n, burst)
	}
	wait := wantSlowly(t, ask("192.0.2.1:2"))
	if n := let("192.0.2.2:1", 1); n != 1 {
		t.Error("another address is refused with it")
	}
	// With IPv6, a network is one party, whatever address it takes.
	for i := range burst {
		if rec := ask(fmt.Sprintf("[2001:db8:1:2:%x::1]:1", i)); rec.Code == http.StatusTooManyRequests {
			t.Fatalf("refused after %d", i)
		}
	}
	wantSlowly(t, ask("[2001:db8:1:2:ffff::1]:1"))
	// A household has a /56 of them to choose from, and is one party too.
	wantSlowly(t, ask("[2001:db8:1:3::1]:1"))
	if n := let("[2001:db8:1:102::1]:1", 1); n != 1 {
		t.Error("another household is refused with it")
	}
	site := w.limits.enrol48.burst
	n := burst + 1 // of 2001:db8:1::/48
	for i := 2; i < 100; i++ {
		n += let(fmt.Sprintf("[2001:db8:1:%x00::1]:1", i), burst)
	}
	if n != site || 2*site > w.limits.enrolAll.Burst() {
		t.Errorf("one site may ask %d times at once, want %d; all have %d", n, site, w.limits.enrolAll.Burst())
	}
	wantSlowly(t, ask("[2001:db8:1:ffff::1]:1"))
	if n := let("[2001:db8:2::1]:1", 1); n != 1 {
		t.Error("another site is refused with it")
	}
	w.advance(wait)
	if n := let("192.0.2.1:1", 1); n != 1 {
		t.Error("who came back when it was told to is refused")
	}
	// A fleet of 10,000 behind 50 addresses is in within minutes.
	if s := 10_000 / float64(w.limits.enrolAll.Limit()); s > 120 {
		t.Errorf("a fleet of 10,000 needs %.0f s", s)
	}
}

// What counts for all is only what proves a key, and members have their own.
func TestStrangersCannotStopRenewals(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	d := w.enrolled(t)
	other := w.enrolled(t)
	w.freeze()
	w.limits.enrolAll, w.limits.renewAll = rate.NewLimiter(1, 5), rate.NewLimiter(1, 30)
	from := 0
	ask := func(q any) *httptest.ResponseRecorder {
		from++
		raw, err := json.Marshal(q)
		must(t, err)
		return w.serveLocal(http.MethodPost, enrolPath, "", fmt.Sprintf("198.51.%d.%d:1", 100+from/250, from%250), raw)
	}
	for range 50 {
		if rec := ask(wire.EnrolRequest{CSR: []byte("nothing")}); rec.Code != http.StatusBadRequest {
			t.Fatalf("%d %s", rec.Code, rec.Body)
		}
	}
	for i := range 5 {
		if rec := ask(wire.EnrolRequest{CSR: csr(t, newKey(t))}); rec.Code != http.StatusAccepted {
			t.Fatalf("new device %d, after requests that prove nothing: %d %s", i, rec.Code, rec.Body)
		}
	}
	wait := wantSlowly(t, ask(wire.EnrolRequest{CSR: csr(t, newKey(t))}))
	// A member's request may be in other hands, and is worth little there.
	renewals := 0
	for ask(wire.EnrolRequest{CSR: csr(t, d.key)}).Code == http.StatusOK {
		renewals++
	}
	if renewals != w.limits.renew.burst {
		t.Errorf("one member may renew %d times at once, want %d", renewals, w.limits.renew.burst)
	}
	if rec := ask(wire.EnrolRequest{CSR: csr(t, other.key)}); rec.Code != http.StatusOK {
		t.Errorf("another member's renewal: %d %s", rec.Code, rec.Body)
	}
	w.advance(wait)
	if rec := ask(wire.EnrolRequest{CSR: csr(t, newKey(t))}); rec.Code != http.StatusAccepted {
		t.Errorf("who came back when it was told to: %d %s", rec.Code, rec.Body)
	}
}

func TestFailedLoginsAreBoundedAndAGoodTokenIsNot(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	good, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(t, err)
	w.freeze()
	ask := func(token, from string) *httptest.ResponseRecorder {
		return w.serveLocal(http.MethodGet, v1+"/objects", token, from, nil)
	}
	for i := range w.limits.logins.burst {
		if rec := ask("wrong", "192.0.2.1:1"); rec.Code != http.StatusUnauthorized {
			t.Fatalf("attempt %d: %d", i, rec.Code)
		}
	}
	wait := wantSlowly(t, ask("wrong", "192.0.2.1:1"))
	if rec := ask(good.Token, "192.0.2.1:1"); rec.Code != http.StatusOK {
		t.Errorf("the owner is locked out by a neighbour: %d", rec.Code)
	}
	if rec := ask("wrong", "192.0.2.2:1"); rec.Code != http.StatusUnauthorized {
		t.Errorf("another address: %d", rec.Code)
	}
	w.advance(wait)
	if rec := ask("wrong", "192.0.2.1:1"); rec.Code != http.StatusUnauthorized {
		t.Errorf("after the wait: %d", rec.Code)
	}
}

func TestOneOperatorsCallsAreBoundedAndUploadsAreNot(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	busy, other := w.newOperator(t, "busy", api.Operating), w.newOperator(t, "other", api.Operating)
	w.freeze()
	w.limits.calls = newBuckets(1, 20)
	ask := func(token string) *httptest.ResponseRecorder {
		return w.serveLocal(http.MethodGet, v1+"/objects", token, "192.0.2.1:1", nil)
	}
	for i := range 20 {
		if rec := ask(busy.Token); rec.Code != http.StatusOK {
			t.Fatalf("call %d: %d %s", i, rec.Code, rec.Body)
		}
	}
	wait := wantSlowly(t, ask(busy.Token))
	if rec := ask(other.Token); rec.Code != http.StatusOK {
		t.Errorf("another operator: %d", rec.Code)
	}
	upload := w.serveLocal(http.MethodPut, v1+"/modules/"+strings.Repeat("0", 64), busy.Token, "192.0.2.1:1", []byte("x"))
	if upload.Code == http.StatusTooManyRequests {
		t.Error("an upload is counted as a call")
	}
	w.advance(wait)
	if rec := ask(busy.Token); rec.Code != http.StatusOK {
		t.Errorf("after the wait: %d", rec.Code)
	}
}

func TestLimitsRememberABoundedNumberOfParties(t *testing.T) {
	b := newBuckets(1, 1)
	now := time.Now()
	for i := range 3 * maxBuckets {
		b.take("used all the time", now)
		b.take(fmt.Sprint(i), now)
	}
	if len(b.of) > maxBuckets || b.order.Len() != len(b.of) {
		t.Errorf("%d and %d parties", len(b.of), b.order.Len())
	}
	if b.take("used all the time", now) == 0 {
		t.Error("who asks all the time is forgotten, and may ask anew")
	}
}
