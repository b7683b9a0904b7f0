package coordinator

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// entries is the whole log as the coordinator hands it out, oldest first.
func (w *world) entries(t testing.TB) []api.LogEntry {
	t.Helper()
	var out []api.LogEntry
	_, err := w.op.Log(testContext(t), 0, api.LogFilter{}, func(e api.LogEntry) error {
		out = append(out, e)
		return nil
	})
	must(t, err)
	return out
}

func TestEveryChangeIsOnTheLogBeforeItIsMadeAndAfter(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.enrolled(t)
	carol := w.newOperator(t, "carol", api.ReleaseManager)
	before := len(w.entries(t))

	_, err := w.op.Devices(ctx)
	must(t, err)
	_, err = w.as(t, carol.Token).CreateToken(ctx, api.TokenRequest{})
	wantRefusal(t, err, http.StatusForbidden, "forbidden")
	if n := len(w.entries(t)); n != before {
		t.Errorf("what changes nothing has %d entries", n-before)
	}
	_, err = w.as(t, carol.Token).Offer(ctx, api.OfferRequest{Version: "1.0.0", Target: "none", Selector: api.Selector{Devices: []wire.DeviceID{d.id}}})
	if err == nil {
		t.Fatal("a release that is not there was offered")
	}
	list := w.entries(t)[before:]
	if len(list) != 2 {
		t.Fatalf("%+v", list)
	}
	asked, refused := list[0], list[1]
	for _, e := range list {
		if e.Actor != "operator:carol" || e.Action != "offer.create" || e.Address != "127.0.0.1" || !slices.Contains(e.Targets, string(d.id)) {
			t.Errorf("%+v", e)
		}
	}
	var q api.OfferRequest
	must(t, json.Unmarshal(asked.Request, &q))
	if asked.Outcome != api.LogAsked || q.Version != "1.0.0" || asked.Of != 0 {
		t.Errorf("%+v", asked)
	}
	if refused.Outcome != api.LogRefused || refused.Of != asked.Seq || refused.Code == "" || refused.Reason != err.Error() {
		t.Errorf("%+v", refused)
	}
	w.newToken(t, api.TokenRequest{Group: "g"})
	list = w.entries(t)[before+2:]
	if len(list) != 2 || list[0].Action != "token.create" || list[1].Outcome != api.LogDone || list[1].Of != list[0].Seq || list[1].Actor != "operator:owner" {
		t.Errorf("%+v", list)
	}
	if first := w.entries(t)[0]; first.Seq != 1 || first.Action != "coordinator.start" || first.Outcome != api.LogNoted {
		t.Errorf("%+v", first)
	}
}

// Devices come and go by themselves, too.
func TestWhatDevicesDoIsOnTheLog(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	of := func(d wire.DeviceID) (out []api.LogEntry) {
		for _, e := range w.entries(t) {
			if slices.Contains(e.Targets, string(d)) && !strings.HasPrefix(e.Actor, "operator:") {
				out = append(out, e)
			}
		}
		return out
	}
	d := w.enrolled(t)
	rec, err := w.reg.device(d.id)
	must(t, err)
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, d.key)}); status != http.StatusOK {
		t.Fatal(e.Reason)
	}
	list := of(d.id) // the renewal is none
	if len(list) != 1 || list[0].Action != "device.enrol" || list[0].Actor != "device:"+string(d.id) || list[0].Address != "127.0.0.1" ||
		string(list[0].Request) != `{"token":"`+rec.Token+`"}` || rec.Token == "" || list[0].Outcome != api.LogNoted {
		t.Errorf("%+v", list)
	}

	key := newKey(t)
	id := wire.IDOf(key.Public().(ed25519.PublicKey))
	w.knocks(t, key)
	if list := of(id); len(list) != 0 {
		t.Errorf("one that only waits: %+v", list)
	}
	_, err = w.op.Claim(ctx, api.Claim{Code: w.codeFor(key), Group: "g"})
	must(t, err)
	if list := of(id); len(list) != 1 || list[0].Action != "device.enrol" || string(list[0].Request) != `{"claimed":"yes","group":"g"}` {
		t.Errorf("%+v", list)
	}

	for range 2 { // said once, however often it is seen
		for _, instance := range []string{"a", "b", "a"} {
			w.hearFrom(t, d, wire.ChannelPresence, wire.TypePresence, wire.Presence{Device: d.id, Online: true, Session: newNonce(), Nonce: newNonce(),
				Instance: instance, At: w.now(), TimeConfidence: wire.ClockTrusted})
		}
	}
	w.retire(t, d.id)
	w.retire(t, d.id)
	var actions []string
	for _, e := range of(d.id) {
		actions = append(actions, e.Actor+" "+e.Action)
	}
	if want := []string{"device:" + string(d.id) + " device.enrol", "coordinator device.duplicate-key", "coordinator device.settle"}; !slices.Equal(actions, want) {
		t.Errorf("%q, want %q", actions, want)
	}
}

// What has happened already is not undone because it cannot be noted.
func TestADeviceEnrolsThoughTheLogIsGone(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	tok := w.newToken(t, api.TokenRequest{})
	must(t, w.eng.JetStream().DeleteStream(testContext(t), "LOG_audit"))
	if status, _, e := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: tok}); status != http.StatusOK {
		t.Errorf("%d %s", status, e.Reason)
	}
}

// Who reads the log, or filters it, relies on what actions are called.
func TestActionsAreStableAndTellRoutesApart(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	seen := map[string]string{}
	for _, rt := range w.table() {
		if !rt.changes() {
			continue
		}
		if other, ok := seen[rt.verb()]; ok {
			t.Errorf("%s %s and %s are both called %s", rt.method, rt.path, other, rt.verb())
		}
		seen[rt.verb()] = rt.method + " " + rt.path
	}
	for action, want := range map[string]string{
		"token.create":    "POST /api/v1/tokens",
		"object.put":      "PUT /api/v1/objects/{name}",
		"object.remove":   "DELETE /api/v1/objects/{name}",
		"job.create":      "POST /api/v1/jobs",
		"repo.put":        "PUT /api/v1/repo/{path...}",
		"operator.revoke": "POST /api/v1/operators/{name}/revoke",
	} {
		if seen[action] != want {
			t.Errorf("%s is %q", action, seen[action])
		}
	}
	if v := (route{method: "PUT", path: v1 + "/devices/{id}/labels"}).verb(); v != "device.put-labels" {
		t.Error(v)
	}
}

// TestNoChangeWithoutAnEntry takes the log away.
func TestNoChangeWithoutAnEntry(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	w.newOperator(t, "carol", api.Viewer)
	must(t, w.eng.JetStream().DeleteStream(ctx, "LOG_audit"))
	_, err := w.op.CreateOperator(ctx, api.OperatorRequest{Name: "dave", Role: api.Viewer})
	wantRefusal(t, err, http.StatusServiceUnavailable, "log_unavailable")
	_, err = w.op.RevokeOperator(ctx, "carol")
	wantRefusal(t, err, http.StatusServiceUnavailable, "log_unavailable")
	list, err := w.op.Operators(ctx)
	must(t, err)
	if len(list) != 1 || !list[0].Revoked.IsZero() {
		t.Errorf("it was done all the same: %+v", list)
	}
	if err := w.Coordinator.record(ctx, api.LogEntry{Actor: "coordinator", Action: "test"}); err == nil {
		t.Error("an entry that is not there is said to be")
	}
}

func TestTheServerRemovesNoEntry(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	w.newToken(t, api.TokenRequest{})
	js := w.eng.JetStream()
	s, err := js.Stream(ctx, "LOG_audit")
	must(t, err)
	if err := s.DeleteMsg(ctx, 1); err == nil {
		t.Error("an entry was removed")
	}
	if err := s.SecureDeleteMsg(ctx, 1); err == nil {
		t.Error("an entry was overwritten")
	}
	if err := s.Purge(ctx); err == nil {
		t.Error("the log was emptied")
	}
	cfg := s.CachedInfo().Config
	cfg.DenyDelete, cfg.DenyPurge = false, false
	if _, err := js.UpdateStream(ctx, cfg); err == nil {
		t.Error("the log can be made one from which entries are removed")
	}
	if cfg.MaxAge != 0 || cfg.MaxMsgs > 0 || cfg.MaxBytes > 0 || cfg.Storage != jetstream.FileStorage {
		t.Errorf("entries go by themselves: %+v", cfg)
	}
	if _, err := w.op.VerifyLog(ctx, api.LogHead{}); err != nil {
		t.Error(err)
	}
}

func TestTwoCoordinatorsWriteOneChain(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	peer, err := openTrail(ctx, w.eng, w.now)
	must(t, err)
	const writers, each = 4, 25
	var wg sync.WaitGroup
	for i := range writers {
		for _, tr := range []*trail{w.trail, peer} {
			wg.Go(func() {
				for j := range each {
					if _, err := tr.append(ctx, api.LogEntry{Actor: "coordinator", Action: fmt.Sprintf("test.%d-%d", i, j)}); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
	head, err := w.op.VerifyLog(ctx, api.LogHead{})
	must(t, err)
	if want := uint64(1 + 2*writers*each); head.Seq != want {
		t.Errorf("%d entries, want %d", head.Seq, want)
	}
	count := map[string]int{}
	for _, e := range w.entries(t) {
		count[e.Action]++
	}
	for i := range writers {
		for j := range each {
			if n := count[fmt.Sprintf("test.%d-%d", i, j)]; n != 2 {
				t.Errorf("entry %d-%d stands %d times", i, j, n)
			}
		}
	}
}

func TestTheChainGoesOnAfterARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	w := open(t, dir)
	w.newToken(t, api.TokenRequest{})
	head, err := w.op.VerifyLog(testContext(t), api.LogHead{})
	must(t, err)
	w.Close()
	w = open(t, dir)
	defer w.Close()
	w.newToken(t, api.TokenRequest{})
	after, err := w.op.VerifyLog(testContext(t), head)
	must(t, err)
	if after.Seq != head.Seq+3 {
		t.Errorf("%s then %s", head, after)
	}
}

func TestTheLogIsReadInPagesAndSinceATime(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	const n = api.MaxLogPage + 10
	var middle time.Time
	for i := range n {
		_, err := w.trail.append(ctx, api.LogEntry{Actor: "coordinator", Action: "test." + strconv.Itoa(i)})
		must(t, err)
		if i == n/2 {
			m, err := w.trail.stream.GetMsg(ctx, w.trail.last)
			must(t, err)
			middle = m.Time
		}
	}
	list := w.entries(t)
	if len(list) != n+1 || list[n].Action != "test."+strconv.Itoa(n-1) {
		t.Errorf("%d entries", len(list))
	}
	p, err := w.op.LogPage(ctx, 0, middle, 1)
	must(t, err)
	var e api.LogEntry
	must(t, json.Unmarshal(p.Entries[0], &e))
	if e.Action != "test."+strconv.Itoa(n/2) || p.Last != n+1 {
		t.Errorf("since %s comes %+v of %d", middle, e, p.Last)
	}
	p, err = w.op.LogPage(ctx, n+5, time.Time{}, 0)
	must(t, err)
	if len(p.Entries) != 0 || p.Last != n+1 {
		t.Errorf("beyond the end: %d entries of %d", len(p.Entries), p.Last)
	}
}

// verifyAs checks a log that a coordinator makes up.
func verifyAs(t *testing.T, log [][]byte, noted api.LogHead) (api.LogHead, error) {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		after, _ := strconv.Atoi(r.URL.Query().Get("after"))
		writeJSON(w, http.StatusOK, api.LogPage{After: uint64(after), Last: uint64(len(log)), Entries: log[after:min(after+3, len(log))]})
	}))
	defer srv.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	c, err := api.NewClient(api.Context{URL: srv.URL, Token: "t", CA: string(ca)})
	must(t, err)
	return c.VerifyLog(testContext(t), noted)
}

// realLog is what a coordinator has written.
func realLog(t *testing.T) ([][]byte, api.LogHead) {
	t.Helper()
	w := ownWorld(t)
	for range 4 {
		w.newToken(t, api.TokenRequest{})
	}
	p, err := w.op.LogPage(testContext(t), 0, time.Time{}, 0)
	must(t, err)
	head, err := w.op.VerifyLog(testContext(t), api.LogHead{})
	must(t, err)
	return p.Entries, head
}

func TestVerifyNamesTheFirstBrokenEntry(t *testing.T) {
	log, head := realLog(t)
	if got, err := verifyAs(t, log, head); err != nil || got != head || head.Seq != uint64(len(log)) || len(log) != 9 {
		t.Fatalf("%v %v", got, err)
	}
	alter := func(i int, old, new string) [][]byte {
		l := slices.Clone(log)
		l[i] = bytes.Replace(l[i], []byte(old), []byte(new), 1)
		if bytes.Equal(l[i], log[i]) {
			t.Fatalf("%s is not in %s", old, log[i])
		}
		return l
	}
	// rewritten is what who has all files can do: everything from entry i on anew.
	rewritten := func(i int) [][]byte {
		l := slices.Clone(log)
		for ; i < len(l); i++ {
			var e api.LogEntry
			must(t, json.Unmarshal(l[i], &e))
			e.Actor = "operator:innocent"
			if i > 0 {
				sum := sha256.Sum256(l[i-1])
				e.Prev = hex.EncodeToString(sum[:])
			}
			var err error
			l[i], err = json.Marshal(e)
			must(t, err)
		}
		return l
	}
	removed := slices.Delete(slices.Clone(log), 4, 5)
	swapped := slices.Clone(log)
	swapped[3], swapped[4] = swapped[4], swapped[3]
	lost := slices.Clone(log)
	lost[5] = nil
	junk := slices.Clone(log)
	junk[5] = []byte("{")
	for name, c := range map[string]struct {
		log   [][]byte
		noted api.LogHead
		at    uint64
	}{
		"who did it altered":              {log: alter(3, "operator:owner", "operator:other"), at: 4},
		"a space added":                   {log: alter(3, `{"seq"`, `{ "seq"`), at: 4},
		"its number altered":              {log: alter(3, `"seq":4`, `"seq":5`), at: 4},
		"the first altered":               {log: alter(0, "coordinator.start", "coordinator.stort"), at: 1},
		"one removed, the rest moved up":  {log: removed, at: 5},
		"two swapped":                     {log: swapped, at: 4},
		"one lost":                        {log: lost, at: 6},
		"one unreadable":                  {log: junk, at: 6},
		"the first removed":               {log: log[1:], at: 1},
		"the last altered, noted before":  {log: alter(8, "operator:owner", "operator:other"), noted: head, at: 9},
		"the tail removed, noted before":  {log: log[:6], noted: head, at: 7},
		"all rewritten, noted before":     {log: rewritten(0), noted: head, at: 9},
		"the end rewritten, noted before": {log: rewritten(7), noted: head, at: 9},
	} {
		_, err := verifyAs(t, c.log, c.noted)
		var broken *api.BrokenLog
		if !errors.As(err, &broken) || broken.Seq != c.at || !strings.Contains(err.Error(), " ") {
			t.Errorf("%s: %v, want a break at %d", name, err, c.at)
		}
	}
	// Without a note, what was rewritten to the end is a good log: this is the limit of a chain.
	if _, err := verifyAs(t, rewritten(0), api.LogHead{}); err != nil {
		t.Error(err)
	}
}

// The raw stream of a server that was tampered with: the same bytes, but one.
func TestAnEntryThatIsAlteredInTheStoreIsFound(t *testing.T) {
	t.Parallel()
	log, _ := realLog(t)
	w := ownWorld(t)
	ctx := testContext(t)
	js := w.eng.JetStream()
	must(t, js.DeleteStream(ctx, "LOG_audit"))
	var err error
	w.trail.stream, err = w.eng.Log(ctx, trailName)
	must(t, err)
	w.trail.known = false
	for i, raw := range log {
		if i == 6 {
			raw = bytes.Replace(raw, []byte("owner"), []byte("other"), 1)
		}
		_, err := js.Publish(ctx, "log.audit", raw)
		must(t, err)
	}
	w.newToken(t, api.TokenRequest{}) // it goes on all the same
	_, err = w.op.VerifyLog(ctx, api.LogHead{})
	var broken *api.BrokenLog
	if !errors.As(err, &broken) || broken.Seq != 7 {
		t.Errorf("%v", err)
	}
}

func TestNoSecretIsLogged(t *testing.T) {
	fleet := wire.NewFleetToken([]byte("x")).String()
	op := operatorPrefix + base64.RawURLEncoding.EncodeToString(someBytes(32))
	for _, body := range []string{
		`{"token":"` + fleet + `"}`, `{"note":"use ` + fleet + ` please"}`, `["` + op + `"]`, `{"` + op + `":1}`,
		`{"wifi":{"password":"hunter2","psk":"hunter2"}}`, `{"key":"wifi.password","value":"hunter2"}`, `{"code":"hunter2"}`, `{"apiToken":["hunter2"]}`,
		`{"values":[{"key":"x.Secret","value":{"a":"hunter2"}}]}`, fleet + ` hunter2`,
	} {
		got, _ := summary([]byte(body))
		for _, secret := range []string{fleet, strings.Split(fleet, "_")[1], op, "hunter2"} {
			if strings.Contains(string(got), secret) {
				t.Errorf("%s is logged as %s", body, got)
			}
		}
	}
	got, named := summary([]byte(`{"group":"g","uses":3,"name":"n","device":"` + strings.Repeat("a", 24) + `","devices":["b",7]}`))
	if !strings.Contains(string(got), `"uses":3`) || !strings.Contains(string(got), `"group":"g"`) || !slices.Equal(named, []string{"n", strings.Repeat("a", 24)}) {
		t.Errorf("%s %v", got, named)
	}
}

func FuzzLogSummary(f *testing.F) {
	fleet := wire.NewFleetToken([]byte("x")).String()
	for _, s := range []string{``, `{}`, `{"token":"x"}`, `"` + fleet + `"`, `[[[[]]]]`, `{"a":"\ud800"}`, "\xff", `"` + strings.Repeat(`\u0000<`, 3000) + `"`, `[` + strings.Repeat(`"a",`, 3000) + `1]`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		got, named := summary(body)
		if got != nil && !json.Valid(got) || len(got) > 2*maxLogged || len(named) > maxTargets+1 {
			t.Errorf("%q becomes %q %q", body, got, named)
		}
		if _, err := json.Marshal(api.LogEntry{Request: got, Targets: named}); err != nil {
			t.Errorf("%q: %v", body, err)
		}
		if tokenText.Match(got) {
			t.Errorf("%q is logged as %q", body, got)
		}
	})
}
