package coordinator

import (
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/oklog/ulid/v2"
)

// allRoutes are those for operators and those for devices, with something in
// the place of each variable.
func allRoutes(t testing.TB, c *Coordinator) (operator, device [][2]string) {
	t.Helper()
	for _, rt := range c.table() {
		r := [2]string{rt.method, pathName.ReplaceAllString(rt.path, "x")}
		switch rt.needs {
		case byAnybody:
		case byDevice:
			device = append(device, r)
		default:
			operator = append(operator, r)
		}
	}
	if len(operator) < 17 || len(device) < 4 {
		t.Fatalf("%d operator and %d device routes found", len(operator), len(device))
	}
	return operator, device
}

func wantJSONRefusal(t *testing.T, what string, resp *http.Response, status int) {
	t.Helper()
	defer resp.Body.Close()
	var e wire.APIError
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || resp.StatusCode != status || e.Code == "" || e.Reason == "" {
		t.Errorf("%s: %d %+v %v, want %d", what, resp.StatusCode, e, err, status)
	}
}

func TestNoOperatorRouteWithoutTheToken(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	good, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(t, err)
	operator, _ := allRoutes(t, w.Coordinator)
	anybody := w.plain(nil)
	anybody.Transport.(*http.Transport).DisableKeepAlives = false // one handshake for hundreds of calls
	t.Cleanup(anybody.CloseIdleConnections)
	for _, r := range operator {
		for name, c := range map[string]struct {
			header string
			http   *http.Client
		}{
			"nothing":              {"", anybody},
			"an empty token":       {"Bearer ", anybody},
			"another token":        {"Bearer " + good.Token[1:], anybody},
			"another scheme":       {"Basic " + good.Token, anybody},
			"a device certificate": {"", d.http},
		} {
			req, err := http.NewRequest(r[0], w.URL()+r[1], nil)
			must(t, err)
			if c.header != "" {
				req.Header.Set("Authorization", c.header)
			}
			resp, err := c.http.Do(req)
			must(t, err)
			wantJSONRefusal(t, r[0]+" "+r[1]+" with "+name, resp, http.StatusUnauthorized)
		}
	}
}

func TestTheDataPlaneIsForDevicesAlone(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	good, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(t, err)
	_, device := allRoutes(t, w.Coordinator)
	for _, r := range device {
		req, err := http.NewRequest(r[0], w.URL()+r[1], nil)
		must(t, err)
		req.Header.Set("Authorization", "Bearer "+good.Token)
		resp, err := w.plain(nil).Do(req)
		must(t, err)
		wantJSONRefusal(t, r[0]+" "+r[1]+" with the operator's token", resp, http.StatusUnauthorized)
	}
}

func certificate(t *testing.T, pemBytes []byte, key any) tls.Certificate {
	t.Helper()
	block, _ := pem.Decode(pemBytes)
	return tls.Certificate{Certificate: [][]byte{block.Bytes}, PrivateKey: key}
}

// Only certificates of this fleet's authority, made for devices, come through
// TLS; one of a device that never enrolled comes no further than the registry.
func TestCertificatesOfOthersAreRefused(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	key := newKey(t)
	pub := key.Public().(ed25519.PublicKey)
	path := w.URL() + "/data/v1/repo/metadata/1.root.json"

	other, err := openAuthority(t.TempDir())
	must(t, err)
	foreign, _, err := other.deviceCertificate(pub, deviceCertLife)
	must(t, err)
	cert := certificate(t, foreign, key)
	if resp, err := w.plain(&cert).Get(path); err == nil {
		resp.Body.Close()
		t.Errorf("a certificate of another authority came through TLS: %d", resp.StatusCode)
	}

	server, err := w.auth.serverCertificate([]string{"localhost"})
	must(t, err)
	if resp, err := w.plain(&server).Get(path); err == nil {
		resp.Body.Close()
		t.Errorf("a server's certificate came through TLS as a client's: %d", resp.StatusCode)
	}

	unknown, _, err := w.auth.deviceCertificate(pub, deviceCertLife)
	must(t, err)
	cert = certificate(t, unknown, key)
	resp, err := w.plain(&cert).Get(path)
	must(t, err)
	wantJSONRefusal(t, "a device that never enrolled", resp, http.StatusForbidden)

	// The broker goes by the name in a certificate, the data plane by its key:
	// with two names in one, a device would be two.
	member := w.enrolled(t)
	ca, err := x509.ParseCertificate(w.auth.caCert.Raw)
	must(t, err)
	mine, err := x509.ParseCertificate(member.tls.Certificates[0].Certificate[0])
	must(t, err)
	named := *mine
	named.Subject.CommonName, named.RawSubject = string(wire.IDOf(pub)), nil
	raw, err := x509.CreateCertificate(crand.Reader, &named, ca, member.pub(), w.auth.caKey)
	must(t, err)
	cert = tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: member.key}
	resp, err = w.plain(&cert).Get(path)
	must(t, err)
	wantJSONRefusal(t, "a device by another name", resp, http.StatusForbidden)

	// The other way round: a device does not take another server for its coordinator.
	otherServer := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: other.pool()}}}
	if _, err := otherServer.Get(path); err == nil {
		t.Error("the coordinator passes as one of another fleet")
	}
}

func TestEveryRefusalIsJSON(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	c := w.plain(nil)
	for what, want := range map[string]int{
		"GET /":                  http.StatusNotFound,
		"GET /api/v1/nothing":    http.StatusNotFound,
		"GET /enrol/v1":          http.StatusMethodNotAllowed,
		"DELETE /api/v1/devices": http.StatusMethodNotAllowed,
		"GET /data/v1/blob/x":    http.StatusNotFound,
	} {
		method, path, _ := strings.Cut(what, " ")
		req, err := http.NewRequest(method, w.URL()+path, nil)
		must(t, err)
		resp, err := c.Do(req)
		must(t, err)
		if want == http.StatusMethodNotAllowed && resp.Header.Get("Allow") == "" {
			t.Errorf("%s: it does not say what is allowed", what)
		}
		wantJSONRefusal(t, what, resp, want)
	}
}

func (w *world) ticket(method string, d *device, kind blobKind, id string, size int64, life time.Duration) string {
	return w.auth.issue(ticket{method: method, device: d.id, blob: blobRef{kind, id}, size: size, expires: time.Now().Add(life)})
}

func TestTicketsAreGoodForWhatTheySayOnly(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	me, other := w.enrolled(t), w.enrolled(t)
	data := someBytes(5000)
	id, size := chunk.Sum(data).String(), int64(len(data))
	otherID := chunk.Sum([]byte("other")).String()
	must(t, w.staging.put(testContext(t), "chunk/"+id, data))
	must(t, w.staging.put(testContext(t), "chunk/"+otherID, []byte("other")))
	good := w.ticket(http.MethodGet, me, chunkBlob, id, size, time.Minute)
	exp := regexp.MustCompile(`exp=\d+`)
	later := "exp=" + strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10)
	for name, c := range map[string]struct {
		who    *device
		method string
		url    string
		want   int
	}{
		"as it is":                {me, http.MethodGet, good, http.StatusOK},
		"its head":                {me, http.MethodHead, good, http.StatusOK},
		"another device":          {other, http.MethodGet, good, http.StatusForbidden},
		"another size":            {me, http.MethodGet, strings.Replace(good, "size=5000", "size=5001", 1), http.StatusForbidden},
		"a later expiry":          {me, http.MethodGet, exp.ReplaceAllString(good, later), http.StatusForbidden},
		"another blob":            {me, http.MethodGet, strings.Replace(good, id, otherID, 1), http.StatusForbidden},
		"another kind":            {me, http.MethodGet, strings.Replace(good, "/chunk/", "/served/", 1), http.StatusForbidden},
		"another method":          {me, http.MethodPut, good, http.StatusForbidden},
		"no signature":            {me, http.MethodGet, good[:strings.Index(good, "sig=")], http.StatusForbidden},
		"no ticket":               {me, http.MethodGet, good[:strings.Index(good, "?")], http.StatusForbidden},
		"an expired one":          {me, http.MethodGet, w.ticket(http.MethodGet, me, chunkBlob, id, size, -time.Second), http.StatusGone},
		"the expired one renewed": {me, http.MethodGet, exp.ReplaceAllString(w.ticket(http.MethodGet, me, chunkBlob, id, size, -time.Second), later), http.StatusForbidden},
		"what is not here":        {me, http.MethodGet, w.ticket(http.MethodGet, me, chunkBlob, chunk.Sum(someBytes(9)).String(), 9, time.Minute), http.StatusNotFound},
	} {
		if status, body := c.who.transfer(c.method, c.url, nil); status != c.want {
			t.Errorf("%s: %d %s, want %d", name, status, body, c.want)
		}
	}
}

func TestRangesOfAChunkCanBeFetched(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	data := someBytes(10_000)
	id := chunk.Sum(data).String()
	must(t, w.staging.put(testContext(t), "chunk/"+id, data))
	req, err := http.NewRequest(http.MethodGet, w.URL()+w.ticket(http.MethodGet, d, chunkBlob, id, int64(len(data)), time.Minute), nil)
	must(t, err)
	req.Header.Set("Range", "bytes=4096-")
	req.Header.Set("If-Range", `"`+id+`"`)
	resp, err := d.http.Do(req)
	must(t, err)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent || resp.Header.Get("Content-Range") != "bytes 4096-9999/10000" {
		t.Errorf("%d %s", resp.StatusCode, resp.Header.Get("Content-Range"))
	}
	for _, none := range []string{"bytes=10000-", "bytes=x"} {
		req.Header.Set("Range", none)
		resp, err := d.http.Do(req)
		must(t, err)
		wantJSONRefusal(t, none, resp, http.StatusRequestedRangeNotSatisfiable)
	}
}

// The data plane takes nothing from a device but the very bytes that the ticket names.
func TestWrongBytesAreNotTakenIn(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	d := w.enrolled(t)
	data := someBytes(5000)
	id, size := chunk.Sum(data).String(), int64(len(data))
	order, put := w.asked(t, d, id, size)
	bent := append([]byte(nil), data...)
	bent[4999] ^= 1
	for name, c := range map[string]struct {
		body []byte
		want int
	}{
		"one bit flipped": {bent, http.StatusUnprocessableEntity},
		"cut short":       {data[:4999], http.StatusUnprocessableEntity},
		"nothing":         {nil, http.StatusUnprocessableEntity},
		"a byte more":     {append(append([]byte(nil), data...), 0), http.StatusRequestEntityTooLarge},
		"much more":       {make([]byte, chunk.MaxSize+1), http.StatusRequestEntityTooLarge},
	} {
		if status, body := d.transfer(http.MethodPut, put, c.body); status != c.want {
			t.Errorf("%s: %d %s, want %d", name, status, body, c.want)
		}
		if _, err := w.staging.get(testContext(t), servedName(order)); err == nil {
			t.Fatalf("%s: it was staged", name)
		}
	}
	if status, body := d.transfer(http.MethodPut, put, data); status != http.StatusNoContent {
		t.Errorf("the right bytes: %d %s", status, body)
	}
}

// asked makes an order to serve a chunk and returns its id and where the bytes go.
func (w *world) asked(t *testing.T, d *device, id string, size int64) (order, url string) {
	t.Helper()
	order = ulid.Make().String()
	url = w.auth.issue(ticket{method: http.MethodPut, device: d.id, blob: blobRef{servedBlob, id}, size: size, expires: time.Now().Add(time.Minute), order: order})
	_, err := w.outbox.submitAs(testContext(t), order, d.id, wire.KindChunkServe, wire.ChunkServe{ID: id, URL: url}, time.Minute)
	must(t, err)
	return order, url
}

// What nobody waits for is not taken in: a device could fill the staging area with it,
// or pass with it as the keeper of a chunk that it has thrown away.
func TestNothingIsServedThatNobodyWaitsFor(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	d := w.enrolled(t)
	data := someBytes(5000)
	id, size := chunk.Sum(data).String(), int64(len(data))
	refused := func(what, url string, want int) {
		t.Helper()
		if status, body := d.transfer(http.MethodPut, url, data); status != want {
			t.Errorf("%s: %d %s, want %d", what, status, body, want)
		}
	}
	ended, put := w.asked(t, d, id, size)
	must(t, w.outbox.end(ctx, d.id, ended, wire.Failed, wire.CodeInternal, "it has ended"))
	refused("of an order that has ended", put, http.StatusGone)
	canceled, put := w.asked(t, d, id, size)
	_, err := w.outbox.cancel(ctx, d.id, canceled, "", "")
	must(t, err)
	refused("of one that was taken back", put, http.StatusGone)
	refused("of none", w.ticket(http.MethodPut, d, servedBlob, id, size, time.Minute), http.StatusGone)
	order, put := w.asked(t, d, id, size)
	refused("of another", strings.Replace(put, order, ended, 1), http.StatusForbidden)
	for _, o := range []string{ended, canceled, ""} {
		if _, err := w.staging.get(ctx, servedName(o)); err == nil {
			t.Errorf("bytes for %q were staged", o)
		}
	}
}

// endingBucket ends an order in the moment in which its chunk has been staged.
type endingBucket struct {
	jetstream.ObjectStore
	end func()
}

func (b endingBucket) PutBytes(ctx context.Context, name string, data []byte) (*jetstream.ObjectInfo, error) {
	info, err := b.ObjectStore.PutBytes(ctx, name, data)
	b.end()
	return info, err
}

// Nor does it stay when the order ends while it comes.
func TestNothingStaysThatIsServedWhileItsOrderEnds(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.enrolled(t)
	data := someBytes(5000)
	order, put := w.asked(t, d, chunk.Sum(data).String(), int64(len(data)))
	w.staging.bucket = endingBucket{w.staging.bucket, func() {
		if err := w.outbox.end(ctx, d.id, order, wire.Succeeded, "", ""); err != nil {
			t.Error(err)
		}
	}}
	if status, body := d.transfer(http.MethodPut, put, data); status != http.StatusGone {
		t.Errorf("%d %s", status, body)
	}
	if _, err := w.staging.get(ctx, servedName(order)); !errors.Is(err, errNotStaged) {
		t.Errorf("it is staged: %v", err)
	}
}

// What was served for a coordinator that has ended meanwhile does not stay for a day: it
// goes when no order can be open any more that it was for.
func TestWhatWasServedForNobodyGoes(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	w.freeze()
	ctx := testContext(t)
	must(t, w.storage.dropServed(ctx)) // of nothing
	order := ulid.MustNew(ulid.Timestamp(w.time()), crand.Reader).String()
	must(t, w.staging.put(ctx, servedName(order), someBytes(3000)))
	must(t, w.staging.put(ctx, servedName("of no order"), someBytes(3000)))
	must(t, w.staging.put(ctx, attachmentName(order), someBytes(3000)))
	there := func(name string) bool { return w.staging.has(ctx, name) }
	must(t, w.storage.dropServed(ctx))
	if !there(servedName(order)) || there(servedName("of no order")) {
		t.Error("what may be waited for is gone, or what nobody can have asked for is there")
	}
	w.advance(serveLifeOf(chunk.MaxSize) + 2*time.Minute)
	must(t, w.storage.dropServed(ctx))
	if there(servedName(order)) || !there(attachmentName(order)) {
		t.Error("what was served for nobody stays, or something else has gone")
	}
}

// A module's or chunk's upload by an operator is checked in the same way.
func TestOperatorsUploadsAreChecked(t *testing.T) {
	t.Parallel()
	w := aWorld(t)
	ctx := testContext(t)
	_, err := w.op.PutChunk(ctx, chunk.Sum([]byte("a")).String(), []byte("b"), 1)
	wantRefusal(t, err, http.StatusBadRequest, wire.CodeMismatch)
	_, err = w.op.PutChunk(ctx, "short", []byte("b"), 1)
	wantRefusal(t, err, http.StatusBadRequest, wire.CodeMismatch)
	_, err = w.op.PutChunk(ctx, chunk.Sum([]byte("a")).String(), make([]byte, chunk.MaxSize+1), 1)
	wantRefusal(t, err, http.StatusRequestEntityTooLarge, "too_large")
	for _, n := range []int{0, -1, maxReplica + 1} {
		_, err = w.op.PutChunk(ctx, chunk.Sum([]byte("a")).String(), []byte("a"), n)
		wantRefusal(t, err, http.StatusBadRequest, "bad_replicas")
	}
	good, err := api.LoadContext(w.dir + "/" + ContextFile)
	must(t, err)
	req, err := http.NewRequest(http.MethodPut, w.URL()+"/api/v1/modules/"+strings.Repeat("0", 64), strings.NewReader("module"))
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+good.Token)
	resp, err := w.plain(nil).Do(req)
	must(t, err)
	wantJSONRefusal(t, "a module under another's name", resp, http.StatusBadRequest)
}

func TestUpdateRepositoryIsHandedOutAsPublished(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.enrolled(t)
	roots := map[int64]string{}
	keys := []ed25519.PrivateKey{newKey(t), newKey(t)}
	for v := range int64(10) {
		v++
		roots[v] = string(rootOf(t, v, keys, 2))
		must(t, w.op.PutRepoFile(ctx, fmt.Sprintf("metadata/%d.root.json", v), []byte(roots[v])))
	}
	if status, body := d.transfer(http.MethodGet, "/data/v1/repo/metadata/2.root.json", nil); status != http.StatusOK || body != roots[2] {
		t.Errorf("%d %s", status, body)
	}
	_, m, _ := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: w.newToken(t, api.TokenRequest{})})
	if string(m.UpdateRoot) != roots[10] {
		t.Errorf("a new device starts its trust from %q", m.UpdateRoot)
	}
	for _, p := range []string{"../ca.key", "metadata/../../x", "a\x00b", "a b", strings.Repeat("a", maxRepoPath+1), "."} {
		if err := checkRepoPath(p); err == nil {
			t.Errorf("%q can be a file of the repository", p)
		}
	}
	// Two coordinators on one store: what one publishes the other hands out.
	peer := &releases{files: w.releases.files, cache: newStaging(w.releases.files)}
	for version := range int64(2) {
		v := string(timestampOf(t, 1+version, keys[0]))
		must(t, w.op.PutRepoFile(ctx, "metadata/timestamp.json", []byte(v)))
		if got, err := peer.get(ctx, "metadata/timestamp.json"); err != nil || string(got) != v {
			t.Errorf("the peer hands out %q, published was %q (%v)", got, v, err)
		}
	}
}
