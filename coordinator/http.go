package coordinator

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

const (
	maxRequest   = 1 << 20         // bytes of a JSON request
	maxObject    = 2 << 20         // bytes of an object's record, white space included
	maxJob       = 2 << 20         // bytes of a job's, with the arguments of all tasks
	callLimit    = 4 * time.Minute // for an operator's call, waiting for devices included
	maxOrderWait = 30 * time.Second
)

// handler is an HTTP handler whose error becomes the answer.
type handler func(w http.ResponseWriter, r *http.Request) error

// route is one line of the HTTP surface. What may be asked, by whom, and what
// goes in and out is told here and nowhere else: permission, audit log and
// OpenAPI description are made from it.
type route struct {
	method, path string // as for [http.ServeMux]
	needs        permission
	summary      string // a short sentence
	// in and out are values of the types of the JSON bodies; nil for none, or
	// [bytes.Buffer] for a plain upload or download.
	in, out  any
	accepted any // body of an answer 202, where there is one
	query    []param
	handle   handler
	// unlogged is set for what does not change the fleet, though its method
	// might: uploads of content that nothing refers to yet, reads by POST.
	unlogged bool
}

// param is one parameter of a query.
type param struct {
	name, about string
	kind        any // a value of its type
}

// permission is what a caller must be, or be allowed, to use a route.
type permission string

const (
	byAnybody permission = "anybody"
	byDevice  permission = "device" // by client certificate
	toRead    permission = "read"
	toOperate permission = "operate" // devices, orders, data, configuration
	toRelease permission = "release" // update repository, offers and campaigns
	toAdmin   permission = "admin"   // operators and their tokens
)

// table is the whole HTTP surface.
func (c *Coordinator) table() []route {
	return slices.Concat(
		c.enrolRoutes(),
		c.dataRoutes(),
		c.deviceRoutes(),
		c.orderRoutes(),
		c.configRoutes(),
		c.storageRoutes(),
		c.jobRoutes(),
		c.auditRoutes(),
		c.honestyRoutes(),
		c.repairRoutes(),
		c.releaseRoutes(),
		c.campaignRoutes(),
		c.faceRoutes(),
		c.operatorRoutes(),
		c.logRoutes(),
		c.statusRoutes(),
		c.openapiRoutes(),
	)
}

const (
	v1        = "/api/v1"
	enrolPath = "/enrol/v1"
)

func (c *Coordinator) routes() http.Handler {
	mux := http.NewServeMux()
	for _, rt := range c.table() {
		h := rt.handle
		switch rt.needs {
		case byAnybody:
		case byDevice:
			h = c.forDevice(h)
		default:
			h = c.forOperator(rt)
		}
		if rt.path == enrolPath {
			h = c.limited(h)
		}
		mux.HandleFunc(rt.method+" "+rt.path, func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				writeError(w, c.log, c.life.Err() != nil, err)
			}
		})
	}
	return explained(mux)
}

// forOperator lets operators in who may use the route, so many times a second,
// and puts what they change on the audit log.
func (c *Coordinator) forOperator(rt route) handler {
	h := rt.handle
	if rt.changes() {
		h = c.logged(rt)
	}
	return func(w http.ResponseWriter, r *http.Request) error {
		op, err := c.checkOperator(w, r, rt.needs)
		if err != nil {
			return err
		}
		if !rt.bulk() {
			if wait := c.limits.calls.take(op.Name, c.now()); wait > 0 {
				return slowly(w, wait, "this operator makes too many calls")
			}
		}
		limit := callLimit
		if rt.bulk() {
			limit += uploadLimit(r.ContentLength)
			// An answer without it is the next best: the server has its own limit.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(limit))
		}
		ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), operatorKey{}, op), limit)
		defer cancel()
		return h(w, r.WithContext(ctx))
	}
}

// uploadLimit is how long a body of so many bytes may take to come, over the slowest
// line, which several uploads share.
func uploadLimit(size int64) time.Duration {
	size = min(max(size, 0), chunk.MaxSize)
	return 4 * time.Duration(size) * time.Second / slowestLine
}

// toTheEnd is for a change of many things: once begun, it is not cut off because
// who asked has left.
func (c *Coordinator) toTheEnd(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, end := c.outlive(ctx)
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	return ctx, func() { cancel(); end() }
}

// bulk tells a plain upload or download from a call.
func (rt route) bulk() bool {
	for _, v := range []any{rt.in, rt.out} {
		if _, plain := v.(bytes.Buffer); plain {
			return true
		}
	}
	return false
}

// limited is for enrolment, which anybody can ask for.
func (c *Coordinator) limited(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if err := c.limitEnrol(w, r); err != nil {
			return err
		}
		return h(w, r)
	}
}

type deviceKey struct{}

func (c *Coordinator) forDevice(h handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		d, err := c.checkDevice(r)
		if err != nil {
			return err
		}
		c.storage.calledFrom(r.Context(), d, host(r))
		return h(w, r.WithContext(context.WithValue(r.Context(), deviceKey{}, d)))
	}
}

// caller is the device behind a request of a route that is byDevice.
func caller(r *http.Request) wire.DeviceID { return r.Context().Value(deviceKey{}).(wire.DeviceID) }

func (c *Coordinator) dataRoutes() []route {
	return []route{
		{method: "GET", path: blobPath + "{kind}/{id}", needs: byDevice, summary: "A chunk or module that an order names", handle: c.getBlob},
		{method: "PUT", path: blobPath + "{kind}/{id}", needs: byDevice, summary: "A chunk that the device was asked to serve", handle: c.putBlob},
		{method: "PUT", path: "/data/v1/attachment/{order}", needs: byDevice, summary: "The bulk result of an order", handle: c.putAttachment},
		{method: "GET", path: "/data/v1/repo/{path...}", needs: byDevice, summary: "A file of the update repository", handle: c.getRepoFile},
	}
}

func (c *Coordinator) storageRoutes() []route {
	return []route{
		{method: "PUT", path: v1 + "/chunks/{id}", needs: toOperate, summary: "Store a chunk on devices", unlogged: true,
			in: bytes.Buffer{}, out: api.Placement{}, query: []param{
				{"replicas", "how many devices hold it; default 2, with a stripe 1", 0},
				{"stripe", "token of the stripe that it is a shard of: it goes to a device that has no other shard of it", ""},
			}, handle: c.putChunk},
		{method: "GET", path: v1 + "/chunks/{id}", needs: toRead, summary: "Fetch a chunk from a device that holds it", out: bytes.Buffer{},
			query: []param{{"device", "the one to fetch it from; default any", ""}}, handle: c.getChunk},
		{method: "POST", path: v1 + "/stripes", needs: toOperate, summary: "Ask which shards of a stripe are placed, before the others are put", unlogged: true,
			in: api.StripeRequest{}, out: api.Stripe{}, handle: answer(func(r *http.Request, q api.StripeRequest) (api.Stripe, error) {
				return c.storage.stripe(r.Context(), q)
			})},
		{method: "GET", path: v1 + "/objects", needs: toRead, summary: "List the stored files", out: []api.ObjectEntry{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, c.storage.listObjects())
			return nil
		}},
		{method: "PUT", path: v1 + "/objects/{name}", needs: toOperate, summary: "Name stored chunks as a file", in: api.Object{}, out: api.Object{}, handle: c.putObject},
		{method: "GET", path: v1 + "/objects/{name}", needs: toRead, summary: "What a file is made of", out: api.Object{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			o, err := c.storage.object(r.PathValue("name"))
			if err == nil {
				writeJSON(w, http.StatusOK, o)
			}
			return err
		}},
		{method: "GET", path: v1 + "/objects/{name}/placements", needs: toRead, summary: "Where the chunks of a file are", out: []api.Placement{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			list, err := c.storage.placements(r.PathValue("name"))
			if err == nil {
				writeJSON(w, http.StatusOK, list)
			}
			return err
		}},
		{method: "DELETE", path: v1 + "/objects/{name}", needs: toOperate, summary: "Remove a file", handle: func(w http.ResponseWriter, r *http.Request) error {
			err := c.storage.removeObject(r.Context(), r.PathValue("name"))
			if err == nil {
				w.WriteHeader(http.StatusNoContent)
			}
			return err
		}},
	}
}

func (c *Coordinator) releaseRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/repo", needs: toRelease, summary: "List the files of the update repository", out: []api.RepoFile{}, handle: func(w http.ResponseWriter, r *http.Request) error {
			list, err := c.releases.list(r.Context())
			if err == nil {
				writeJSON(w, http.StatusOK, list)
			}
			return err
		}},
		{method: "GET", path: v1 + "/repo/{path...}", needs: toRead, summary: "A file of the update repository", out: bytes.Buffer{}, handle: c.getRepoFile},
		{method: "PUT", path: v1 + "/repo/{path...}", needs: toRelease, summary: "Upload a file of the update repository", in: bytes.Buffer{}, handle: c.putRepoFile},
		{method: "POST", path: v1 + "/offers", needs: toRelease, summary: "Offer a release to devices", in: api.OfferRequest{}, out: []api.Order{},
			handle: answer(func(r *http.Request, q api.OfferRequest) ([]api.Order, error) {
				return c.offer(r.Context(), q)
			})},
	}
}

// explained answers for paths and methods that there are not, in the form of
// every other refusal.
func explained(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, pattern := mux.Handler(r); pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		rec := statusOnly{header: w.Header(), status: http.StatusOK}
		mux.ServeHTTP(&rec, r)
		if rec.status == http.StatusMethodNotAllowed { // Allow is set
			writeJSON(w, rec.status, wire.APIError{Code: "bad_method", Reason: fmt.Sprintf("%s cannot be asked for here", r.Method)})
			return
		}
		writeJSON(w, http.StatusNotFound, wire.APIError{Code: wire.CodeNotFound, Reason: "there is nothing at this address"})
	})
}

// statusOnly is a ResponseWriter that keeps the header and drops the body.
type statusOnly struct {
	header http.Header
	status int
}

func (s *statusOnly) Header() http.Header         { return s.header }
func (s *statusOnly) Write(b []byte) (int, error) { return len(b), nil }
func (s *statusOnly) WriteHeader(status int)      { s.status = status }

// answer makes a handler of a call with a JSON request and a JSON answer.
func answer[Q, A any](call func(r *http.Request, q Q) (A, error)) handler {
	return answerUpTo(maxRequest, call)
}

// answerUpTo is answer for requests of up to so many bytes.
func answerUpTo[Q, A any](limit int64, call func(r *http.Request, q Q) (A, error)) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		var q Q
		if err := decode(w, r, limit, &q); err != nil {
			return err
		}
		if change, ok := any(q).(interface{ CheckChange() error }); ok { // it has a selector
			if err := change.CheckChange(); err != nil {
				return refuse(http.StatusBadRequest, wire.CodeBadBody, "%v", err)
			}
		}
		a, err := call(r, q)
		if err == nil {
			writeJSON(w, http.StatusOK, a)
		}
		return err
	}
}

// decode reads an operator's request. What it does not know is refused: a
// misspelt "groups" would mean everybody. Devices' requests, in which unknown
// fields are passed over, are not read with it.
func decode(w http.ResponseWriter, r *http.Request, limit int64, into any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); more == nil {
			err = errors.New("there is more after its end")
		} else if more != io.EOF {
			err = more
		}
	}
	if err != nil {
		return refuse(http.StatusBadRequest, wire.CodeBadBody, "the request cannot be read: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

// readBody takes in a whole upload of at most limit bytes.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	var buf bytes.Buffer
	if r.ContentLength > 0 && r.ContentLength <= limit {
		buf.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	_, err := buf.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, refuse(http.StatusRequestEntityTooLarge, "too_large", "this upload may have at most %d bytes", limit)
	case err != nil:
		return nil, refuse(http.StatusBadRequest, "cut_off", "the upload was cut off: %v", err)
	}
	return buf.Bytes(), nil
}

// checkDevice names the device behind a connection. TLS has verified the
// certificate; the registry says whether it still counts.
func (c *Coordinator) checkDevice(r *http.Request) (wire.DeviceID, error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return "", refuse(http.StatusUnauthorized, "unauthorized", "the data plane is for devices with a certificate of this fleet")
	}
	cert := r.TLS.VerifiedChains[0][0]
	key, ok := cert.PublicKey.(ed25519.PublicKey)
	if !ok {
		return "", refuse(http.StatusForbidden, "forbidden", "this is no device's certificate")
	}
	id := wire.IDOf(key)
	if cert.Subject.CommonName != string(id) { // the broker goes by the name
		return "", refuse(http.StatusForbidden, "forbidden", "this certificate has another name than its key")
	}
	if err := c.reg.authorize(r.Context(), id, cert); err != nil {
		return "", refuse(http.StatusForbidden, "forbidden", "%v", err)
	}
	return id, nil
}

// getBlob serves a staged chunk or module, with ranges.
func (c *Coordinator) getBlob(w http.ResponseWriter, r *http.Request) error {
	ref, err := parseBlobRef(r.PathValue("kind"), r.PathValue("id"))
	if err != nil {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "%v", err)
	}
	t, err := c.auth.redeem(r, caller(r), ref)
	if err != nil {
		return err
	}
	var data []byte
	switch ref.kind {
	case inputBlob: // from who holds it, when it is wanted
		data, err = c.storage.relay(r.Context(), ref)
	case listBlob:
		data, err = c.staging.get(r.Context(), listName(t.order, ref.id))
	default:
		data, err = c.staging.get(r.Context(), ref.String())
	}
	if errors.Is(err, errNotStaged) {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "%s is not here any more", ref)
	}
	if err != nil {
		return err
	}
	serveBytes(w, r, ref.id, data)
	return nil
}

// serveBytes answers with ranges; id, which names the content, is the ETag.
func serveBytes(w http.ResponseWriter, r *http.Request, id string, data []byte) {
	w.Header().Set("ETag", `"`+id+`"`)
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(&inJSON{ResponseWriter: w}, r, "", time.Time{}, bytes.NewReader(data))
}

// inJSON puts the refusals of net/http in the form of every other.
type inJSON struct {
	http.ResponseWriter
	refused bool
}

func (w *inJSON) WriteHeader(status int) {
	if status < 400 {
		w.ResponseWriter.WriteHeader(status)
		return
	}
	w.refused = true
	e := wire.APIError{Code: "bad_request", Reason: "the content cannot be given as asked for: " + http.StatusText(status)}
	if status == http.StatusRequestedRangeNotSatisfiable {
		e = wire.APIError{Code: "bad_range", Reason: "the content has no such range of bytes"}
		if of := w.Header().Get("Content-Range"); of != "" {
			e.Reason += "; it is " + of
		}
	}
	writeJSON(w.ResponseWriter, status, e)
}

func (w *inJSON) Write(b []byte) (int, error) {
	if w.refused {
		return len(b), nil
	}
	return w.ResponseWriter.Write(b)
}

// putBlob takes a chunk that a device was asked to serve.
func (c *Coordinator) putBlob(w http.ResponseWriter, r *http.Request) error {
	ref, err := parseBlobRef(r.PathValue("kind"), r.PathValue("id"))
	if err != nil {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "%v", err)
	}
	t, err := c.auth.redeem(r, caller(r), ref)
	if err != nil {
		return err
	}
	if err := c.awaited(r.Context(), t); err != nil {
		return err
	}
	r.Body = c.storage.coming.body(r.Body, t.order)
	return c.takeUpload(w, r, min(t.size, chunk.MaxSize), func(data []byte) error {
		if err := verifyBlob(ref, data); err != nil {
			return refuse(http.StatusUnprocessableEntity, wire.CodeMismatch, "%v", err)
		}
		if err := c.staging.put(r.Context(), servedName(t.order), data); err != nil {
			return err // ours, not the device's: it must not think that its chunk is damaged
		}
		// Who waited takes away what is there when the order has ended, not what comes after.
		if err := c.awaited(r.Context(), t); err != nil {
			return errors.Join(err, c.staging.drop(context.WithoutCancel(r.Context()), servedName(t.order)))
		}
		return nil
	})
}

// awaited refuses what nobody waits for: nobody would take it away.
func (c *Coordinator) awaited(ctx context.Context, t ticket) error {
	// Another coordinator may have made the order, and this one not have heard of it yet.
	v, err := c.outbox.rows.find(ctx, orderKeyOf(t.device, t.order))
	switch {
	case err != nil && !errors.Is(err, errNotFound):
		return err
	case err != nil || v.State.Terminal() || v.Cancel != nil:
		return refuse(http.StatusGone, "not_awaited", "nobody waits for this any more: order %s of device %s is not under way", t.order, t.device)
	}
	return nil
}

// putAttachment takes the bulk result of an order that is under way.
func (c *Coordinator) putAttachment(w http.ResponseWriter, r *http.Request) error {
	d := caller(r)
	order := r.PathValue("order")
	v, ok := c.outbox.rows.get(orderKeyOf(d, order))
	if !ok || v.State.Terminal() {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "device %s has no order %s under way", d, order)
	}
	most := int64(maxAttachment)
	if v.Kind == wire.KindInventory {
		most = maxInventory
	}
	return c.takeUpload(w, r, most, func(data []byte) error {
		return c.staging.put(r.Context(), attachmentName(order), data)
	})
}

func (c *Coordinator) getRepoFile(w http.ResponseWriter, r *http.Request) error {
	data, err := c.releases.get(r.Context(), r.PathValue("path"))
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	serveBytes(w, r, hex.EncodeToString(sum[:]), data)
	return nil
}

func (c *Coordinator) putRepoFile(w http.ResponseWriter, r *http.Request) error {
	data, err := readBody(w, r, maxRepoFile)
	if err != nil {
		return err
	}
	if err := c.releases.put(r.Context(), r.PathValue("path"), data); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (c *Coordinator) putChunk(w http.ResponseWriter, r *http.Request) error {
	replicas, token := defaultReplicas, r.URL.Query().Get("stripe")
	if token != "" {
		replicas = 1
	}
	if s := r.URL.Query().Get("replicas"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			return refuse(http.StatusBadRequest, "bad_replicas", "replicas must be a number, not %q", s)
		}
		replicas = n
	}
	data, err := readBody(w, r, chunk.MaxSize)
	if err != nil {
		return err
	}
	rec, err := c.storage.place(r.Context(), r.PathValue("id"), data, replicas, token)
	if err != nil {
		return err
	}
	// A copy: the record in memory is everybody's.
	p := api.Placement{Chunk: api.Chunk{ID: rec.ID, Size: rec.Size}, Holders: slices.Clone(rec.Holders)}
	for i, h := range p.Holders {
		v, err := c.outbox.get(r.Context(), h.Device, h.Order)
		if err != nil && !errors.Is(err, errNotFound) { // after a month it is not kept
			return err
		}
		p.Holders[i].Receipt = v.Report
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

func (c *Coordinator) getChunk(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	var data []byte
	var err error
	if d := r.URL.Query().Get("device"); d != "" {
		data, err = c.storage.readHolder(r.Context(), id, wire.DeviceID(d))
	} else {
		data, err = c.storage.read(r.Context(), id)
	}
	if err != nil {
		return err
	}
	serveBytes(w, r, id, data)
	return nil
}

func (c *Coordinator) putObject(w http.ResponseWriter, r *http.Request) error {
	var o api.Object
	if err := decode(w, r, maxObject, &o); err != nil {
		return err
	}
	o.Name = r.PathValue("name")
	o, err := c.storage.putObject(r.Context(), o)
	if err != nil {
		return err
	}
	// From here on the reader's only copy of the key may be in this record.
	if err := c.storage.durable("chunks", "objects"); err != nil {
		return fmt.Errorf("the object %q may not survive a power cut; put it again: %w", o.Name, err)
	}
	writeJSON(w, http.StatusOK, o)
	return nil
}

func (c *Coordinator) getModule(w http.ResponseWriter, r *http.Request) error {
	ref, err := parseBlobRef(string(moduleBlob), r.PathValue("id"))
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_module", "%v", err)
	}
	data, err := c.staging.get(r.Context(), ref.String())
	if errors.Is(err, errNotStaged) {
		return errNotFound
	}
	if err != nil {
		return err
	}
	serveBytes(w, r, ref.id, data)
	return nil
}

func (c *Coordinator) putModule(w http.ResponseWriter, r *http.Request) error {
	ref, err := parseBlobRef(string(moduleBlob), r.PathValue("id"))
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_module", "%v", err)
	}
	data, err := readBody(w, r, maxModule)
	if err != nil {
		return err
	}
	if err := verifyBlob(ref, data); err != nil {
		return refuse(http.StatusBadRequest, wire.CodeMismatch, "%v", err)
	}
	if err := c.staging.put(r.Context(), ref.String(), data); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
