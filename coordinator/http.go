package coordinator

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
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
	callLimit    = 4 * time.Minute // for an operator's call, waiting for devices included
	maxOrderWait = 30 * time.Second
)

// handler is an HTTP handler whose error becomes the answer.
type handler func(w http.ResponseWriter, r *http.Request) error

// routes is the whole HTTP surface. Three kinds of caller, told apart here and
// nowhere else: anybody (enrolment), devices (client certificate), operators
// (token).
func (c *Coordinator) routes() http.Handler {
	mux := http.NewServeMux()
	anybody := func(pattern string, h handler) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				writeError(w, c.log, c.life.Err() != nil, err)
			}
		})
	}
	operator := func(pattern string, h handler) {
		anybody(pattern, func(w http.ResponseWriter, r *http.Request) error {
			if err := c.checkOperator(r); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(r.Context(), callLimit)
			defer cancel()
			return h(w, r.WithContext(ctx))
		})
	}
	device := func(pattern string, h func(w http.ResponseWriter, r *http.Request, d wire.DeviceID) error) {
		anybody(pattern, func(w http.ResponseWriter, r *http.Request) error {
			d, err := c.checkDevice(r)
			if err != nil {
				return err
			}
			return h(w, r, d)
		})
	}

	anybody("POST /enrol/v1", c.enrol)

	device("GET "+blobPath+"{kind}/{id}", c.getBlob)
	device("PUT "+blobPath+"{kind}/{id}", c.putBlob)
	device("PUT /data/v1/attachment/{order}", c.putAttachment)
	device("GET /data/v1/repo/{path...}", c.getRepoFile)

	const v1 = "/api/v1"
	operator("POST "+v1+"/tokens", answer(c.createToken))
	operator("GET "+v1+"/devices", func(w http.ResponseWriter, _ *http.Request) error {
		writeJSON(w, http.StatusOK, c.reg.list())
		return nil
	})
	operator("GET "+v1+"/devices/{id}", func(w http.ResponseWriter, r *http.Request) error {
		d, err := c.reg.device(wire.DeviceID(r.PathValue("id")))
		if err == nil {
			writeJSON(w, http.StatusOK, c.reg.view(d))
		}
		return err
	})
	operator("PUT "+v1+"/chunks/{id}", c.putChunk)
	operator("GET "+v1+"/chunks/{id}", c.getChunk)
	operator("GET "+v1+"/objects", func(w http.ResponseWriter, _ *http.Request) error {
		writeJSON(w, http.StatusOK, c.storage.listObjects())
		return nil
	})
	operator("PUT "+v1+"/objects/{name}", c.putObject)
	operator("GET "+v1+"/objects/{name}", func(w http.ResponseWriter, r *http.Request) error {
		o, err := c.storage.object(r.PathValue("name"))
		if err == nil {
			writeJSON(w, http.StatusOK, o)
		}
		return err
	})
	operator("DELETE "+v1+"/objects/{name}", func(w http.ResponseWriter, r *http.Request) error {
		err := c.storage.removeObject(r.Context(), r.PathValue("name"))
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
		return err
	})
	operator("GET "+v1+"/modules/{id}", c.getModule)
	operator("PUT "+v1+"/modules/{id}", c.putModule)
	operator("POST "+v1+"/jobs", c.runJob)
	operator("GET "+v1+"/jobs/{device}/{order}", c.getJob)
	operator("POST "+v1+"/audits", answer(func(r *http.Request, q api.AuditRequest) (api.Audit, error) {
		// A challenge that has begun is judged, whoever asked for it has left or not.
		ctx, cancel := c.outlive(r.Context())
		defer cancel()
		return c.audits.run(ctx, q)
	}))
	operator("GET "+v1+"/audits", func(w http.ResponseWriter, _ *http.Request) error {
		writeJSON(w, http.StatusOK, c.audits.list())
		return nil
	})
	operator("PUT "+v1+"/repo/{path...}", c.putRepoFile)
	operator("POST "+v1+"/offers", answer(func(r *http.Request, q api.OfferRequest) ([]api.Order, error) {
		return c.releases.offer(r.Context(), q)
	}))
	operator("GET "+v1+"/orders/{device}/{id}", c.getOrder)
	return explained(mux)
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
	return func(w http.ResponseWriter, r *http.Request) error {
		var q Q
		if err := decode(w, r, maxRequest, &q); err != nil {
			return err
		}
		a, err := call(r, q)
		if err == nil {
			writeJSON(w, http.StatusOK, a)
		}
		return err
	}
}

func decode(w http.ResponseWriter, r *http.Request, limit int64, into any) error {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit)).Decode(into); err != nil {
		return refuse(http.StatusBadRequest, wire.CodeBadBody, "the request cannot be read: %v", err)
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

func (c *Coordinator) checkOperator(r *http.Request) error {
	tok, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	got := sha256.Sum256([]byte(tok))
	if !ok || subtle.ConstantTimeCompare(got[:], c.operatorHash[:]) != 1 {
		return refuse(http.StatusUnauthorized, "unauthorized", "the operator token is missing or wrong; copy the context file again from the coordinator's folder")
	}
	return nil
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
	if err := c.reg.authorize(r.Context(), id, cert); err != nil {
		return "", refuse(http.StatusForbidden, "forbidden", "%v", err)
	}
	return id, nil
}

// getBlob serves a staged chunk or module, with ranges.
func (c *Coordinator) getBlob(w http.ResponseWriter, r *http.Request, d wire.DeviceID) error {
	ref, err := parseBlobRef(r.PathValue("kind"), r.PathValue("id"))
	if err != nil {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "%v", err)
	}
	if _, err := c.auth.redeem(r, d, ref); err != nil {
		return err
	}
	data, err := c.staging.get(r.Context(), ref.String())
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
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

// putBlob takes a chunk that a device was asked to serve.
func (c *Coordinator) putBlob(w http.ResponseWriter, r *http.Request, d wire.DeviceID) error {
	ref, err := parseBlobRef(r.PathValue("kind"), r.PathValue("id"))
	if err != nil {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "%v", err)
	}
	t, err := c.auth.redeem(r, d, ref)
	if err != nil {
		return err
	}
	data, err := readBody(w, r, min(t.size, chunk.MaxSize))
	if err != nil {
		return err
	}
	if err := verifyBlob(ref, data); err != nil {
		return refuse(http.StatusUnprocessableEntity, wire.CodeMismatch, "%v", err)
	}
	if err := c.staging.put(r.Context(), ref.String(), data); err != nil {
		return err // ours, not the device's: it must not think that its chunk is damaged
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// putAttachment takes the bulk result of an order that is under way.
func (c *Coordinator) putAttachment(w http.ResponseWriter, r *http.Request, d wire.DeviceID) error {
	order := r.PathValue("order")
	v, ok := c.outbox.rows.get(orderKeyOf(d, order))
	if !ok || v.State.Terminal() {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "device %s has no order %s under way", d, order)
	}
	data, err := readBody(w, r, maxAttachment)
	if err != nil {
		return err
	}
	if err := c.staging.put(r.Context(), attachmentName(order), data); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (c *Coordinator) getRepoFile(w http.ResponseWriter, r *http.Request, _ wire.DeviceID) error {
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
	replicas := defaultReplicas
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
	rec, err := c.storage.place(r.Context(), r.PathValue("id"), data, replicas)
	if err != nil {
		return err
	}
	// A copy: the record in memory is everybody's.
	p := api.Placement{Chunk: api.Chunk{ID: rec.ID, Size: rec.Size}, Holders: slices.Clone(rec.Holders)}
	for i, h := range p.Holders {
		if v, ok := c.outbox.rows.get(orderKeyOf(h.Device, h.Order)); ok {
			p.Holders[i].Receipt = v.Report
		}
	}
	writeJSON(w, http.StatusOK, p)
	return nil
}

func (c *Coordinator) getChunk(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	data, err := c.storage.read(r.Context(), id)
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

func (c *Coordinator) runJob(w http.ResponseWriter, r *http.Request) error {
	var q api.JobRequest
	if err := decode(w, r, maxRequest, &q); err != nil {
		return err
	}
	j, err := c.compute.run(r.Context(), q)
	var u *unfinished
	if errors.As(err, &u) {
		w.Header().Set(api.HeaderDevice, string(u.order.Device))
		w.Header().Set(api.HeaderOrder, u.order.ID)
		return refuse(http.StatusGatewayTimeout, codeNoAnswer, "%v", u)
	}
	if err != nil {
		return err
	}
	return c.deliver(w, r, j)
}

// getJob is for who had not the patience, or the time, to wait for a job's end.
func (c *Coordinator) getJob(w http.ResponseWriter, r *http.Request) error {
	j, err := c.compute.result(r.Context(), wire.DeviceID(r.PathValue("device")), r.PathValue("order"))
	if err != nil {
		return err
	}
	return c.deliver(w, r, j)
}

// deliver answers with a job, and forgets its output only when the answer has
// gone out: until then it can be fetched again.
func (c *Coordinator) deliver(w http.ResponseWriter, r *http.Request, j api.Job) error {
	writeJSON(w, http.StatusOK, j)
	if err := http.NewResponseController(w).Flush(); err != nil || r.Context().Err() != nil {
		return nil // nobody took it
	}
	if err := c.compute.delivered(r.Context(), j); err != nil {
		c.log.Warn("a job's output stays until it expires", "order", j.Order, "error", err)
	}
	return nil
}

func (c *Coordinator) getOrder(w http.ResponseWriter, r *http.Request) error {
	d, id := wire.DeviceID(r.PathValue("device")), r.PathValue("id")
	if s := r.URL.Query().Get("wait"); s != "" {
		seconds, err := strconv.ParseFloat(s, 64)
		if err != nil || !(seconds >= 0) {
			return refuse(http.StatusBadRequest, "bad_wait", "wait must be a number of seconds, not %q", s)
		}
		seconds = min(seconds, maxOrderWait.Seconds())
		ctx, cancel := context.WithTimeout(r.Context(), time.Duration(seconds*float64(time.Second)))
		defer cancel()
		_, err = c.outbox.await(ctx, wire.Order{ID: id, Device: d}, nil)
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errNotFound) {
			return err
		}
	}
	v, ok := c.outbox.rows.get(orderKeyOf(d, id))
	if !ok {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "device %s has no order %s", d, id)
	}
	writeJSON(w, http.StatusOK, api.Order{Order: v.Order, State: v.State, Progress: v.Progress, Result: v.Result, Report: v.Report, Updated: v.Updated})
	return nil
}
