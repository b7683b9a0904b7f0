package coordinator

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// releases hands out the update repository and offers versions of it. It is a
// mirror and no more: what devices believe is signed by keys that are not here.
type releases struct {
	files jetstream.ObjectStore
	cache *staging // the same store with a cache before it

	// writing is of all that is not named for its content: to look what is there and to
	// write is one thing, here and, by turn, among the coordinators of a fleet.
	writing sync.Mutex
	turn    func(context.Context) (done func(), err error)
	ends    atomic.Pointer[lifetime]
}

const (
	offerLife   = 7 * 24 * time.Hour
	maxRepoFile = bundle.MaxPacked
	maxRepoPath = 256

	// A coordinator has turnLife for what it writes, and gives up after turnLimit, so
	// that it is over for the others' clocks, too.
	turnKey   = "repo"
	turnLife  = 3 * time.Minute
	turnLimit = time.Minute
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

// put takes a file of the repository. A published file never changes its content,
// but for the timestamp and the log's checkpoint: devices may have half of a release already.
func (r *releases) put(ctx context.Context, name string, data []byte) error {
	if err := checkRepoPath(name); err != nil {
		return err
	}
	if err := checkRoot(name, data); err != nil {
		return err
	}
	if err := r.checkNamed(ctx, name, data); err != nil {
		return err
	}
	if _, own := repo.NamedSum(name); own {
		return r.putOnce(ctx, name, data)
	}
	ctx, cancel := context.WithTimeout(ctx, turnLimit)
	defer cancel()
	r.writing.Lock()
	defer r.writing.Unlock()
	done, err := r.turn(ctx)
	if errors.Is(err, errTaken) {
		return refuse(http.StatusServiceUnavailable, "busy", "another coordinator is taking files of the update repository; publish again")
	}
	if err != nil {
		return err
	}
	defer done()
	if repo.Mutable(name) {
		if err := r.checkReplaces(ctx, name, data); err != nil {
			return err
		}
		if err := r.cache.put(ctx, name, data); err != nil {
			return err
		}
		if _, err := r.expiry(ctx); err != nil {
			return fmt.Errorf("%s is kept, and when the metadata ends cannot be told: %w", name, err)
		}
		return nil
	}
	if err := r.checkChain(ctx, name, data); err != nil {
		return err
	}
	return r.putOnce(ctx, name, data)
}

// putOnce takes a file that never changes.
func (r *releases) putOnce(ctx context.Context, name string, data []byte) error {
	there, err := r.files.GetInfo(ctx, name)
	switch {
	case errors.Is(err, jetstream.ErrObjectNotFound):
		return r.cache.put(ctx, name, data)
	case err != nil:
		return fmt.Errorf("the update repository cannot be read: %w", err)
	case there.Digest != objectDigest(data):
		return refuse(http.StatusConflict, "changed", "the update repository has another %s, and a published file never changes: publish a new version instead", name)
	}
	return nil
}

// objectDigest is what JetStream keeps with an object.
func objectDigest(data []byte) string {
	sum := sha256.Sum256(data)
	return digestScheme + base64.URLEncoding.EncodeToString(sum[:])
}

const digestScheme = "SHA-256="

// checkNamed refuses a part or a manifest that is not what its name says, and a
// manifest that names a part which is not here yet. So whatever an operator's
// command line left out because it took it to be here, a release whose parts are
// not all here cannot be offered.
func (r *releases) checkNamed(ctx context.Context, name string, data []byte) error {
	manifest := strings.HasPrefix(name, "targets/")
	if !manifest && !strings.HasPrefix(name, "parts/") {
		return nil
	}
	want, ok := repo.NamedSum(name)
	if !ok {
		return refuse(http.StatusBadRequest, "bad_path", "%q is no name of a part or of a release: they are parts/<sha256> and targets/bundles/<sha256>.<version>.json", name)
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != want {
		return refuse(http.StatusBadRequest, "bad_digest", "these are not the bytes that %s is named for, their SHA-256 is %x: the file is damaged, or was on its way; publish again from the bundle", name, sum)
	}
	if !manifest {
		return nil
	}
	return r.checkParts(ctx, name, data)
}

func (r *releases) checkParts(ctx context.Context, name string, manifest []byte) error {
	m, err := bundle.Parse(manifest)
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_manifest", "%s is no release that a device could read: %v", name, err)
	}
	for _, f := range m.Files() {
		switch there, err := r.files.GetInfo(ctx, bundle.PartPath(f.SHA256)); {
		case errors.Is(err, jetstream.ErrObjectNotFound):
			return refuse(http.StatusConflict, "part_missing", "the update repository here lacks a part of %s, the %s; upload %s first", m.Version, f.What, bundle.PartPath(f.SHA256))
		case err != nil:
			return fmt.Errorf("the update repository cannot be read: %w", err)
		case there.Size != uint64(f.Size):
			return refuse(http.StatusBadRequest, "bad_manifest", "%s gives %s %d bytes, it has %d", name, bundle.PartPath(f.SHA256), f.Size, there.Size)
		}
	}
	return nil
}

// list is what is here, by path.
func (r *releases) list(ctx context.Context) ([]api.RepoFile, error) {
	files, err := r.files.List(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, fmt.Errorf("the update repository cannot be read: %w", err)
	}
	list := make([]api.RepoFile, 0, len(files))
	for _, f := range files {
		sum, err := base64.URLEncoding.DecodeString(strings.TrimPrefix(f.Digest, digestScheme))
		if err != nil {
			return nil, fmt.Errorf("the digest of %s in the update repository cannot be read: %w", f.Name, err)
		}
		list = append(list, api.RepoFile{Path: f.Name, Size: int64(f.Size), SHA256: hex.EncodeToString(sum)})
	}
	slices.SortFunc(list, func(a, b api.RepoFile) int { return strings.Compare(a.Path, b.Path) })
	return list, nil
}

// rootVersion reads the number in metadata/N.root.json; ok is false for other
// files, and 0 stands for one that is written in another way.
func rootVersion(name string) (n int64, ok bool) {
	v, ok := strings.CutSuffix(name, ".root.json")
	if !ok {
		return 0, false
	}
	v, inside := strings.CutPrefix(v, "metadata/")
	n, err := strconv.ParseInt(v, 10, 64)
	if !inside || err != nil || n < 1 || strconv.FormatInt(n, 10) != v {
		return 0, true
	}
	return n, true
}

// checkRoot refuses a root that no device could begin with: the newest one is
// given to every new device.
func checkRoot(name string, data []byte) error {
	n, ok := rootVersion(name)
	if !ok {
		return nil
	}
	if n == 0 {
		return refuse(http.StatusBadRequest, "bad_root", "%q is no name of an update root: it must be metadata/<version>.root.json", name)
	}
	v, err := repo.RootVersion(data)
	if err != nil {
		return refuse(http.StatusBadRequest, "bad_root", "this is no update root that a device could trust: %v", err)
	}
	if v != n {
		return refuse(http.StatusBadRequest, "bad_root", "%s holds version %d of the update root", name, v)
	}
	return nil
}

// checkChain refuses a root that devices would not come to from those that are here: it
// would end their updates, and new devices would begin with it. The first root of all is
// taken as it is.
func (r *releases) checkChain(ctx context.Context, name string, data []byte) error {
	n, ok := rootVersion(name)
	if !ok {
		return nil
	}
	here, err := r.roots(ctx)
	if err != nil || len(here) == 0 || slices.Contains(here, n) {
		return err
	}
	joined := false
	for _, v := range []int64{n - 1, n + 1} {
		if !slices.Contains(here, v) {
			continue
		}
		raw, err := r.get(ctx, rootPath(v))
		if err != nil {
			return err
		}
		if joined = true; v < n {
			err = repo.RootFollows(raw, data)
		} else {
			err = repo.RootFollows(data, raw)
		}
		if err != nil {
			return refuse(http.StatusBadRequest, "bad_root", "root %d does not go with root %d, which is here: devices would stop at it: %v", n, v, err)
		}
	}
	if !joined {
		return refuse(http.StatusBadRequest, "bad_root", "root %d can only be taken where root %d is, and the newest here is root %d: devices go from one to the next; upload them in their order", n, n-1, slices.Max(here))
	}
	return nil
}

// checkReplaces refuses a timestamp or a checkpoint of the log that devices would
// refuse, such as one from an old copy of the repository. As long as there is no root,
// nobody can tell.
func (r *releases) checkReplaces(ctx context.Context, name string, data []byte) error {
	root, err := r.root(ctx)
	if err != nil || root == nil {
		return err
	}
	there, err := newStaging(r.files).get(ctx, name)
	if err != nil && !errors.Is(err, errNotStaged) {
		return err
	}
	err = repo.Replaces(name, root, there, data)
	var e *repo.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e) && e.Condition == repo.Rollback:
		return refuse(http.StatusConflict, "older", "%v; publish from the copy of the repository that was published last", err)
	}
	return refuse(http.StatusBadRequest, "not_signed", "devices would refuse it: %v", err)
}

func (r *releases) get(ctx context.Context, name string) ([]byte, error) {
	if err := checkRepoPath(name); err != nil {
		return nil, err
	}
	from := r.cache
	if repo.Mutable(name) {
		from = newStaging(r.files) // another coordinator may have put a newer one
	}
	data, err := from.get(ctx, name)
	if errors.Is(err, errNotStaged) {
		return nil, refuse(http.StatusNotFound, wire.CodeNotFound, "the update repository has no %s", name)
	}
	return data, err
}

// roots are the versions of the roots that are here.
func (r *releases) roots(ctx context.Context) (versions []int64, err error) {
	files, err := r.files.List(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, fmt.Errorf("the update repository cannot be read: %w", err)
	}
	for _, f := range files {
		if n, _ := rootVersion(f.Name); n > 0 {
			versions = append(versions, n)
		}
	}
	return versions, nil
}

func rootPath(version int64) string { return fmt.Sprintf("metadata/%d.root.json", version) }

// root is the newest root metadata that was published; nil if there is none.
// A new device starts its trust from it.
func (r *releases) root(ctx context.Context) ([]byte, error) {
	here, err := r.roots(ctx)
	if err != nil || len(here) == 0 {
		return nil, err
	}
	return r.get(ctx, rootPath(slices.Max(here)))
}

// metadataSoon is how long before the end of signed metadata it is pointed out.
const metadataSoon = 14 * 24 * time.Hour

// lifetime is the metadata that ends first.
type lifetime struct {
	file string
	at   time.Time // zero: there is none
}

func (e lifetime) over(now time.Time) bool { return !e.at.IsZero() && !now.Before(e.at) }

// expiry looks which metadata ends first, and notes it for [releases.attention].
func (r *releases) expiry(ctx context.Context) (e lifetime, err error) {
	root, err := r.root(ctx)
	if err != nil {
		return e, err
	}
	e.file, e.at, err = repo.EndsFirst(root, func(file string) ([]byte, error) {
		raw, err := newStaging(r.files).get(ctx, file)
		if errors.Is(err, errNotStaged) {
			return nil, nil
		}
		return raw, err
	})
	if err == nil {
		r.ends.Store(&e)
	}
	return e, err
}

// attention tells that metadata ends soon: devices that find it so take no release, and
// say that they put it off.
func (r *releases) attention(now time.Time) []api.Attention {
	e := r.ends.Load()
	if e == nil || e.at.IsZero() || e.at.Sub(now) > metadataSoon {
		return nil
	}
	does := "ends"
	if e.over(now) {
		does = "has ended"
	}
	return []api.Attention{{Code: api.AttentionMetadata, About: "releases", Text: fmt.Sprintf("%s %s %s; without it devices take no release: publish again, with \"deimos release publish\"", e.file, does, e.at.UTC().Format(time.RFC3339))}}
}

// published refuses a target that devices would look for in vain. Whether it
// is signed they find out themselves.
func (r *releases) published(ctx context.Context, target string) error {
	files, err := r.files.List(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		return fmt.Errorf("the update repository cannot be read: %w", err)
	}
	if !slices.ContainsFunc(files, func(f *jetstream.ObjectInfo) bool { return repo.IsTarget(f.Name, target) }) {
		return refuse(http.StatusNotFound, wire.CodeNotFound, "the update repository here has no %s; publish it first, with \"deimos release publish\"", target)
	}
	return nil
}

// offer sends update orders.
func (c *Coordinator) offer(ctx context.Context, q api.OfferRequest) ([]api.Order, error) {
	if q.Version == "" || q.Target == "" {
		return nil, refuse(http.StatusBadRequest, "bad_offer", "an offer names a version and a target")
	}
	if q.Target != repo.TargetName(q.Version) || strings.Contains(q.Version, "/") || checkRepoPath(q.Target) != nil {
		return nil, refuse(http.StatusBadRequest, "bad_offer", "%q is not the target of version %q: a target is bundles/<version>.json", q.Target, q.Version)
	}
	devices, err := c.reg.selected(q.Selector)
	if err != nil {
		return nil, err
	}
	if err := c.releases.published(ctx, q.Target); err != nil {
		return nil, err
	}
	base, err := c.sentAs(ctx, q.Key, q)
	if err != nil {
		return nil, err
	}
	return c.sendAll(ctx, base, devices, wire.KindUpdateInstall, wire.UpdateInstall{Version: q.Version, Target: q.Target}, offerLife)
}
