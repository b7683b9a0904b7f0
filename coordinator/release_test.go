package coordinator

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// aRoot is an update root of two keys, both of which must sign; the first of
// them do.
func aRoot(t testing.TB, version int64, signatures int) []byte {
	t.Helper()
	return rootOf(t, version, []ed25519.PrivateKey{newKey(t), newKey(t)}, signatures)
}

// rootOf is one of these two keys.
func rootOf(t testing.TB, version int64, keys []ed25519.PrivateKey, signatures int) []byte {
	t.Helper()
	root := metadata.Root(time.Now().UTC().Truncate(time.Second).Add(time.Hour))
	root.Signed.Version = version
	for _, k := range keys {
		public, err := metadata.KeyFromPublicKey(k.Public())
		must(t, err)
		for _, role := range []string{metadata.ROOT, metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP} {
			must(t, root.Signed.AddKey(public, role))
		}
	}
	root.Signed.Roles[metadata.ROOT].Threshold = 2
	return signedBy(t, root, keys[:signatures]...)
}

func signedBy[T metadata.Roles](t testing.TB, m *metadata.Metadata[T], keys ...ed25519.PrivateKey) []byte {
	t.Helper()
	for _, k := range keys {
		signer, err := signature.LoadSigner(k, crypto.Hash(0))
		must(t, err)
		_, err = m.Sign(signer)
		must(t, err)
	}
	raw, err := m.ToBytes(false)
	must(t, err)
	return raw
}

// timestampOf is a timestamp that a key has signed.
func timestampOf(t testing.TB, version int64, key ed25519.PrivateKey) []byte {
	t.Helper()
	m := metadata.Timestamp(time.Now().UTC().Truncate(time.Second).Add(time.Hour))
	m.Signed.Version = version
	return signedBy(t, m, key)
}

// TestOnlyRootsThatDevicesComeToAreTaken: each must be signed by those beside it, so
// that who has stolen an operator's token ends no updates, and begins no trust.
func TestOnlyRootsThatDevicesComeToAreTaken(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	keys := []ed25519.PrivateKey{newKey(t), newKey(t)}
	path := func(v int) string { return fmt.Sprintf("metadata/%d.root.json", v) }
	ours := map[int][]byte{}
	for v := 1; v <= 6; v++ {
		ours[v] = rootOf(t, int64(v), keys, 2)
	}
	put := func(v int) error { return w.op.PutRepoFile(ctx, path(v), ours[v]) }
	must(t, put(3)) // of a fleet whose older roots are lost, or come later
	for _, v := range []int{2, 4, 1, 5} {
		wantRefusal(t, w.op.PutRepoFile(ctx, path(v), aRoot(t, int64(v), 2)), http.StatusBadRequest, "bad_root")
	}
	for _, v := range []int{1, 5} {
		wantRefusal(t, put(v), http.StatusBadRequest, "bad_root") // not yet
	}
	for _, v := range []int{4, 2, 5, 1, 4} {
		must(t, put(v))
	}
	wantRefusal(t, w.op.PutRepoFile(ctx, path(6), aRoot(t, 6, 2)), http.StatusBadRequest, "bad_root")
	_, m, _ := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: w.newToken(t, api.TokenRequest{})})
	if string(m.UpdateRoot) != string(ours[5]) {
		t.Errorf("a new device starts its trust from %q", m.UpdateRoot)
	}
	must(t, put(6))
}

// TestOfTwoRootsOfOneVersionOneStands, though two coordinators are given them at once;
// and of two timestamps the newer one. Devices that were given the one would never take
// what goes with the other.
func TestOfTwoRootsOfOneVersionOneStands(t *testing.T) {
	t.Parallel()
	both := peers(t, 2, func(*Config) {})
	ctx := testContext(t)
	keys := []ed25519.PrivateKey{newKey(t), newKey(t)}
	must(t, both[0].op.PutRepoFile(ctx, rootPath(1), rootOf(t, 1, keys, 2)))
	atOnce := func(name string, files [2][]byte) (errs [2]error) {
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i, w := range both {
			wg.Go(func() {
				<-start
				errs[i] = w.op.PutRepoFile(ctx, name, files[i])
			})
		}
		close(start)
		wg.Wait()
		return errs
	}
	for version := int64(2); version < 12; version++ {
		var roots [2][]byte
		for i := range roots {
			root := metadata.Root(time.Now())
			_, err := root.FromBytes(rootOf(t, version, keys, 0))
			must(t, err)
			root.Signed.Expires = root.Signed.Expires.Add(time.Duration(i) * time.Second)
			roots[i] = signedBy(t, root, keys...)
		}
		errs := atOnce(rootPath(version), roots)
		stands := 0
		if errs[0] != nil {
			stands = 1
		}
		must(t, errs[stands])
		wantRefusal(t, errs[1-stands], http.StatusConflict, "changed")
		for i, w := range both {
			if raw, err := w.releases.root(ctx); err != nil || !bytes.Equal(raw, roots[stands]) {
				t.Errorf("root %d: coordinator %d has another one than was taken (%v)", version, i, err)
			}
		}

		stamps := [2][]byte{timestampOf(t, 2*version, keys[0]), timestampOf(t, 2*version+1, keys[0])}
		errs = atOnce("metadata/timestamp.json", stamps)
		must(t, errs[1])
		if errs[0] != nil {
			wantRefusal(t, errs[0], http.StatusConflict, "older")
		}
		for i, w := range both {
			if raw, err := w.releases.get(ctx, "metadata/timestamp.json"); err != nil || !bytes.Equal(raw, stamps[1]) {
				t.Errorf("coordinator %d has another timestamp than the newest (%v)", i, err)
			}
		}
	}
}

// TestAFileOfTheRepositoryWaitsForItsTurn, also when the coordinator that has it died.
func TestAFileOfTheRepositoryWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	taken := func(until time.Duration) {
		must(t, w.repairs.leases.create(ctx, turnKey, lease{By: "another", Until: w.time().Add(until).UTC()}))
	}
	put := func() <-chan error {
		done := make(chan error, 1)
		go func() { done <- w.op.PutRepoFile(ctx, rootPath(1), aRoot(t, 1, 2)) }()
		return done
	}
	taken(time.Hour)
	waits := put()
	eventually(t, "it waits", func() bool {
		w.repairs.leases.mu.RLock()
		defer w.repairs.leases.mu.RUnlock()
		return w.repairs.leases.waiters[turnKey] != nil
	})
	select {
	case err := <-waits:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	must(t, w.repairs.leases.remove(ctx, turnKey, func(lease) bool { return true }))
	must(t, <-waits)
	if _, there := w.repairs.leases.get(turnKey); there {
		t.Error("it was not given back")
	}
	taken(50 * time.Millisecond) // by one that dies
	must(t, w.op.PutRepoFile(ctx, rootPath(1), mustGet(t, w, rootPath(1))))
	taken(time.Hour)
	root := mustGet(t, w, rootPath(1))
	short, cancel := context.WithTimeout(ctx, 2*time.Second) // in which it comes to where it waits
	defer cancel()
	if err := w.releases.put(short, rootPath(1), root); err == nil || !strings.Contains(err.Error(), "another coordinator") {
		t.Errorf("it does not give up: %v", err)
	}
}

func mustGet(t testing.TB, w *world, name string) []byte {
	t.Helper()
	raw, err := w.releases.get(testContext(t), name)
	must(t, err)
	return raw
}

// TestATimestampThatDevicesWouldRefuseIsNotTaken: an upload from an old copy of the
// repository would fail the updates of all.
func TestATimestampThatDevicesWouldRefuseIsNotTaken(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	keys := []ed25519.PrivateKey{newKey(t), newKey(t)}
	put := func(raw []byte) error { return w.op.PutRepoFile(ctx, "metadata/timestamp.json", raw) }
	must(t, put(timestampOf(t, 1, keys[0]))) // before the first root: roots come last
	must(t, w.op.PutRepoFile(ctx, "metadata/1.root.json", rootOf(t, 1, keys, 2)))
	three := timestampOf(t, 3, keys[0])
	must(t, put(three))
	wantRefusal(t, put(timestampOf(t, 2, keys[0])), http.StatusConflict, "older")
	for _, raw := range [][]byte{timestampOf(t, 4, newKey(t)), []byte("{}"), nil, []byte("4")} {
		wantRefusal(t, put(raw), http.StatusBadRequest, "not_signed")
	}
	must(t, put(three))
	must(t, put(timestampOf(t, 4, keys[1])))
	// Who stole the key and went far ahead is forgotten with it.
	must(t, put(timestampOf(t, 1_000_000, keys[0])))
	root := metadata.Root(time.Now().Add(time.Hour))
	_, err := root.FromBytes(rootOf(t, 2, keys, 0))
	must(t, err)
	fresh := newKey(t)
	public, err := metadata.KeyFromPublicKey(fresh.Public())
	must(t, err)
	for _, id := range slices.Clone(root.Signed.Roles[metadata.TIMESTAMP].KeyIDs) {
		must(t, root.Signed.RevokeKey(id, metadata.TIMESTAMP))
	}
	must(t, root.Signed.AddKey(public, metadata.TIMESTAMP))
	must(t, w.op.PutRepoFile(ctx, "metadata/2.root.json", signedBy(t, root, keys...)))
	must(t, put(timestampOf(t, 5, fresh)))
}

func TestOnlyARootThatDevicesCouldTrustIsTaken(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	good := aRoot(t, 1, 2)
	must(t, w.op.PutRepoFile(ctx, "metadata/1.root.json", good))
	for name, raw := range map[string][]byte{
		"metadata/99.root.json":   []byte("{}"),
		"metadata/3.root.json":    []byte("no JSON"),
		"metadata/4.root.json":    aRoot(t, 4, 1), // signed by one of two
		"metadata/5.root.json":    aRoot(t, 6, 2), // another version
		"metadata/7.root.json":    []byte(strings.Replace(string(aRoot(t, 7, 2)), `"_type":"root"`, `"_type":"targets"`, 1)),
		"metadata/08.root.json":   aRoot(t, 8, 2),
		"metadata/x.root.json":    aRoot(t, 8, 2),
		"metadata/-8.root.json":   aRoot(t, 8, 2),
		"8.root.json":             aRoot(t, 8, 2), // elsewhere
		"metadata/a/8.root.json":  aRoot(t, 8, 2),
		"metadata/1e1.root.json":  aRoot(t, 10, 2),
		"targets/100.root.json":   []byte("{}"),
		"metadata/0.root.json":    aRoot(t, 0, 2),
		"metadata/+11.root.json":  aRoot(t, 11, 2),
		"metadata/2.x.root.json":  aRoot(t, 2, 2),
		"metadata/12.0.root.json": aRoot(t, 12, 2),
	} {
		if err := w.op.PutRepoFile(ctx, name, raw); err == nil {
			t.Errorf("%s was taken", name)
		} else {
			wantRefusal(t, err, http.StatusBadRequest, "bad_root")
		}
	}
	_, m, _ := w.postEnrol(t, wire.EnrolRequest{CSR: csr(t, newKey(t)), Token: w.newToken(t, api.TokenRequest{})})
	if string(m.UpdateRoot) != string(good) {
		t.Errorf("a new device starts its trust from %q", m.UpdateRoot)
	}
}

func TestAPublishedFileNeverChanges(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	keys := []ed25519.PrivateKey{newKey(t), newKey(t)}
	for name, first := range map[string]string{"metadata/1.targets.json": "a", "log/tile/8/0/000.p/1": "a", "metadata/1.root.json": string(rootOf(t, 1, keys, 2))} {
		must(t, w.op.PutRepoFile(ctx, name, []byte(first)))
		must(t, w.op.PutRepoFile(ctx, name, []byte(first)))
		other := "b"
		if strings.HasSuffix(name, "root.json") {
			other = string(aRoot(t, 1, 2))
		}
		wantRefusal(t, w.op.PutRepoFile(ctx, name, []byte(other)), http.StatusConflict, "changed")
		if raw, err := w.releases.get(ctx, name); err != nil || string(raw) != first {
			t.Errorf("%s is %q now (%v)", name, raw, err)
		}
	}
	for _, v := range []int64{1, 2} {
		raw := timestampOf(t, v, keys[0])
		must(t, w.op.PutRepoFile(ctx, "metadata/timestamp.json", raw))
		if got, err := w.op.RepoFile(ctx, "metadata/timestamp.json"); err != nil || !bytes.Equal(got, raw) {
			t.Errorf("the timestamp is %q (%v), want %s", got, err, raw)
		}
	}
}

func TestOnlyWhatTheMirrorHasIsOffered(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.enrolled(t)
	offer := func(version, target string) error {
		_, err := w.op.Offer(ctx, api.OfferRequest{Version: version, Target: target, Selector: api.Selector{Devices: []wire.DeviceID{d.id}}})
		return err
	}
	wantRefusal(t, offer("3.0.0", repo.TargetName("3.0.0")), http.StatusNotFound, wire.CodeNotFound)
	w.publish(t, "13.0.0")
	must(t, w.op.PutRepoFile(ctx, "metadata/bundles/"+strings.Repeat("0", 64)+".3.0.0.json", []byte("{}")))
	wantRefusal(t, offer("3.0.0", repo.TargetName("3.0.0")), http.StatusNotFound, wire.CodeNotFound)
	w.publish(t, "3.0.0")
	must(t, offer("3.0.0", repo.TargetName("3.0.0")))
	for version, target := range map[string]string{"3.0.0": "agent", "3": repo.TargetName("3.0.0"), "../x": "bundles/../x.json", "a b": "bundles/a b.json", "a/b": "bundles/a/b.json"} {
		wantRefusal(t, offer(version, target), http.StatusBadRequest, "bad_offer")
	}
}

func TestAReleaseIsNotThereBeforeAllOfItsPartsAre(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	d := w.enrolled(t)
	offer := func() error {
		_, err := w.op.Offer(ctx, api.OfferRequest{Version: "3.0.0", Target: repo.TargetName("3.0.0"), Selector: api.Selector{Devices: []wire.DeviceID{d.id}}})
		return err
	}
	part := []byte("packed")
	wantRefusal(t, w.putManifest(t, "3.0.0", part), http.StatusConflict, "part_missing")
	// Nobody can fill the place of a part with other bytes.
	wantRefusal(t, w.op.PutRepoFile(ctx, bundle.PartPath(sumOf(part)), []byte("other!")), http.StatusBadRequest, "bad_digest")
	wantRefusal(t, w.putManifest(t, "3.0.0", part), http.StatusConflict, "part_missing")
	wantRefusal(t, offer(), http.StatusNotFound, wire.CodeNotFound)
	must(t, w.op.PutRepoFile(ctx, bundle.PartPath(sumOf(part)), part))
	must(t, w.putManifest(t, "3.0.0", part))
	must(t, offer())

	// Nor is one whose documents are not all here.
	var m bundle.Manifest
	must(t, json.Unmarshal(manifestOf(t, "3.1.0", part), &m))
	document := []byte("a document")
	m.Attachments = []bundle.Attachment{{Name: "sbom.json", MediaType: "application/json", SHA256: sumOf(document), Size: int64(len(document))}}
	put := func() error {
		raw, err := json.Marshal(m)
		must(t, err)
		return w.op.PutRepoFile(ctx, "targets/bundles/"+sumOf(raw)+".3.1.0.json", raw)
	}
	wantRefusal(t, put(), http.StatusConflict, "part_missing")
	must(t, w.op.PutRepoFile(ctx, bundle.PartPath(sumOf(document)), document))
	must(t, put())
	m.Attachments[0].Size++
	wantRefusal(t, put(), http.StatusBadRequest, "bad_manifest")
}

func TestWhatANameOfTheRepositoryPromisesIsChecked(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	part := []byte("packed")
	must(t, w.op.PutRepoFile(ctx, bundle.PartPath(sumOf(part)), part))
	short := bytes.Replace(manifestOf(t, "3.0.0", part), []byte(`"size":6`), []byte(`"size":5`), 1)
	for _, bad := range []struct{ name, data, code string }{
		{"parts/x", "a", "bad_path"},
		{"parts/a/" + sumOf([]byte("a")), "a", "bad_path"},
		{"parts/" + sumOf([]byte("a")) + ".json", "a", "bad_path"},
		{"parts/" + strings.ToUpper(sumOf([]byte("a"))), "a", "bad_path"},
		{"targets/x.3.0.0.json", "a", "bad_path"},
		{"targets/bundles/short.3.0.0.json", "{}", "bad_path"},
		{"targets/bundles/" + sumOf([]byte("{}")) + ".3.0.0.json", "{ }", "bad_digest"},
		{"targets/bundles/" + sumOf([]byte("{}")) + ".3.0.0.json", "{}", "bad_manifest"},
		{"targets/bundles/" + sumOf(short) + ".3.0.0.json", string(short), "bad_manifest"}, // the part is longer
	} {
		wantRefusal(t, w.op.PutRepoFile(ctx, bad.name, []byte(bad.data)), http.StatusBadRequest, bad.code)
	}
	list, err := w.op.RepoFiles(ctx)
	if want := []api.RepoFile{{Path: bundle.PartPath(sumOf(part)), Size: 6, SHA256: sumOf(part)}}; err != nil || !slices.Equal(list, want) {
		t.Errorf("the repository has %+v (%v), not %+v", list, err, want)
	}
}

// Devices put off what was signed for a time that is over, and a campaign would go
// through its phases with nobody updated.
func TestMetadataThatEndsIsPointedOut(t *testing.T) {
	t.Parallel()
	w := ownWorld(t)
	ctx := testContext(t)
	w.freeze()
	w.publish(t, "2.0.0")
	w.device(t)
	now := w.now().UTC().Truncate(time.Second)
	put := func(name string, days int, meta string) {
		t.Helper()
		raw := fmt.Sprintf(`{"signed":{"expires":%q,"meta":{%s}}}`, now.Add(time.Duration(days)*24*time.Hour).Format(time.RFC3339), meta)
		must(t, w.op.PutRepoFile(ctx, name, []byte(raw)))
	}
	seen := func() (text string) {
		t.Helper()
		s, err := w.op.Status(ctx)
		must(t, err)
		for _, a := range s.Attention {
			if a.Code == api.AttentionMetadata {
				text += a.Text
			}
		}
		return text
	}
	start := func() error {
		_, err := w.op.StartCampaign(ctx, api.CampaignRequest{Version: "2.0.0", Selector: api.Selector{All: true}, Phases: []api.CampaignPhase{percent(100)}})
		return err
	}
	for version, role := range []string{"timestamp", "snapshot", "targets"} {
		days := []int{100, 100, 100}
		days[version] = 20
		// What is named comes before what names it, as for who publishes.
		put(fmt.Sprintf("metadata/%d.targets.json", 4+10*version), days[2], "")
		put(fmt.Sprintf("metadata/%d.snapshot.json", 3+10*version), days[1], fmt.Sprintf(`"targets.json":{"version":%d}`, 4+10*version))
		put("metadata/timestamp.json", days[0], fmt.Sprintf(`"snapshot.json":{"version":%d}`, 3+10*version))
		if text := seen(); text != "" {
			t.Errorf("%s, 20 days before: %s", role, text)
		}
		w.advance(7 * 24 * time.Hour)
		if text := seen(); !strings.Contains(text, role) || !strings.Contains(text, "ends") {
			t.Errorf("%s, 13 days before: %q", role, text)
		}
		w.advance(13 * 24 * time.Hour)
		if text := seen(); !strings.Contains(text, role) || !strings.Contains(text, "has ended") {
			t.Errorf("%s, at its end: %q", role, text)
		}
		wantRefusal(t, start(), http.StatusConflict, "stale_metadata")
		now = w.now().UTC().Truncate(time.Second)
	}
	put("metadata/99.targets.json", 100, "")
	put("metadata/99.snapshot.json", 100, `"targets.json":{"version":99}`)
	put("metadata/timestamp.json", 100, `"snapshot.json":{"version":99}`)
	must(t, start())
}
