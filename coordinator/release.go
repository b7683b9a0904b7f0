package coordinator

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// releases hands out the update repository and offers versions of it. It is a
// mirror and no more: what devices believe is signed by keys that are not here.
type releases struct {
	files  jetstream.ObjectStore
	cache  *staging // the same store with a cache before it
	outbox *outbox
	reg    *registry
}

const (
	offerLife   = 7 * 24 * time.Hour
	maxRepoFile = 64 << 20 // bytes
	maxRepoPath = 256
	// mutableRepoFile is the only file of the repository whose content changes
	// (see ota/repo).
	mutableRepoFile = "metadata/timestamp.json"
)

func checkRepoPath(p string) error {
	ok := p != "" && p != "." && len(p) <= maxRepoPath && path.Clean(p) == p && !strings.HasPrefix(p, "/") && !strings.HasPrefix(p, "..")
	for _, c := range p {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("._-+/", c))
	}
	if !ok {
		return refuse(http.StatusBadRequest, "bad_path", "%q cannot be a file of the update repository", p)
	}
	return nil
}

func (r *releases) put(ctx context.Context, name string, data []byte) error {
	if err := checkRepoPath(name); err != nil {
		return err
	}
	return r.cache.put(ctx, name, data)
}

func (r *releases) get(ctx context.Context, name string) ([]byte, error) {
	if err := checkRepoPath(name); err != nil {
		return nil, err
	}
	from := r.cache
	if name == mutableRepoFile {
		from = newStaging(r.files) // another coordinator may have put a newer one
	}
	data, err := from.get(ctx, name)
	if errors.Is(err, errNotStaged) {
		return nil, refuse(http.StatusNotFound, wire.CodeNotFound, "the update repository has no %s", name)
	}
	return data, err
}

// root is the newest root metadata that was published; nil if there is none.
// A new device starts its trust from it.
func (r *releases) root(ctx context.Context) ([]byte, error) {
	files, err := r.files.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the update repository cannot be read: %w", err)
	}
	newest := 0
	for _, f := range files {
		v, found := strings.CutSuffix(strings.TrimPrefix(f.Name, "metadata/"), ".root.json")
		if n, err := strconv.Atoi(v); found && err == nil {
			newest = max(newest, n)
		}
	}
	if newest == 0 {
		return nil, nil
	}
	return r.get(ctx, fmt.Sprintf("metadata/%d.root.json", newest))
}

// offer sends update orders.
func (r *releases) offer(ctx context.Context, q api.OfferRequest) ([]api.Order, error) {
	if q.Version == "" || q.Target == "" {
		return nil, refuse(http.StatusBadRequest, "bad_offer", "an offer names a version and a target")
	}
	devices := q.Devices
	if len(devices) == 0 {
		for _, d := range r.reg.list() {
			if !d.Retired {
				devices = append(devices, d.ID)
			}
		}
	}
	for _, d := range devices { // all or none
		if _, err := r.reg.device(d); err != nil {
			return nil, err
		}
	}
	out := make([]api.Order, 0, len(devices))
	for _, d := range slices.Compact(slices.Sorted(slices.Values(devices))) {
		o, err := r.outbox.submit(ctx, d, wire.KindUpdateInstall, wire.UpdateInstall{Version: q.Version, Target: q.Target}, offerLife)
		if err != nil {
			return out, err
		}
		out = append(out, api.Order{Order: o, State: wire.Queued, Updated: o.Issued})
	}
	return out, nil
}
