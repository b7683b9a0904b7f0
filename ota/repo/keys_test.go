package repo

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/deimos-edge/deimos/ota/bundle"
)

func (f *fleet) desk() ChangeOptions { return ChangeOptions{Desk: Desk{Keys: f.keys}, Now: now} }

func (f *fleet) rotate(role string) RootChange {
	f.t.Helper()
	c, err := Rotate(f.desk(), Rotation{Role: role})
	must(f.t, err)
	return c
}

// clientOf is a device that enrolled with a root.
func (f *fleet) clientOf(dir string, root []byte) *Client {
	f.t.Helper()
	c, err := NewClient(ClientOptions{Dir: dir, Root: root, Limits: quick, Source: HTTP{Client: f.server.Client(), Base: f.server.URL}})
	must(f.t, err)
	return c
}

func (f *fleet) pack(version string) (dir string) {
	f.t.Helper()
	dir = f.t.TempDir()
	agent := filepath.Join(dir, "agent")
	must(f.t, os.WriteFile(agent, []byte(version), 0o755))
	_, err := bundle.Build(f.t.Context(), filepath.Join(dir, "bundle"), bundle.BuildOptions{
		Version: version, Fast: true,
		Agents: []bundle.Agent{{Path: agent, Platform: bundle.Platform{OS: "linux", Arch: "arm64"}}},
	})
	must(f.t, err)
	return filepath.Join(dir, "bundle")
}

// TestDevicesFollowEachRotation of each role, also such that come back after all of them.
func TestDevicesFollowEachRotation(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	first := f.root()
	late, steady := t.TempDir(), t.TempDir()
	must(t, take(t, f.clientOf(late, first), "1.1.0"))
	for i, role := range Roles {
		before := keyFiles(t, f.keys)
		c := f.rotate(role)
		if c.Version != int64(i+2) || c.Awaits != "" {
			t.Errorf("%s: %+v", role, c)
		}
		for _, file := range before { // what the old keys sign counts no more
			if strings.HasPrefix(filepath.Base(file), role) {
				must(t, os.Rename(file, file+".old"))
			}
		}
		f.publish("", now)
		must(t, take(t, f.clientOf(steady, first), "1.1.0"))
	}
	f.release("1.2.0", "two")
	must(t, take(t, f.clientOf(late, first), "1.2.0")) // it has missed five roots
	must(t, take(t, f.clientOf(steady, first), "1.2.0"))
	must(t, take(t, f.clientOf(t.TempDir(), f.root()), "1.2.0"))
	if c := f.clientOf(late, first); c.mustRoot(t).Signed.Version != 6 {
		t.Errorf("root %d is stored", c.mustRoot(t).Signed.Version)
	}
	report, err := func() (LogReport, error) {
		c := f.clientOf(t.TempDir(), first)
		must(t, c.Refresh(t.Context(), now))
		seen, err := os.ReadFile(filepath.Join(late, seenFile))
		must(t, err)
		old, err := openSeen(seen)
		must(t, err)
		return c.VerifyLog(t.Context(), map[string]string{"late": old.signed})
	}()
	must(t, err)
	if len(report.Problems) > 0 || report.Compared != 1 {
		t.Errorf("%+v", report)
	}
}

func keyFiles(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.pem"))
	must(t, err)
	return files
}

// TestRotatedOutKeyIsWorthNothing: who stole it signs newer metadata in vain.
func TestRotatedOutKeyIsWorthNothing(t *testing.T) {
	for _, role := range []string{metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP, LogRole} {
		f := newFleet(t)
		f.release("1.1.0", "one")
		first := f.root()
		stolen := t.TempDir()
		must(t, os.RemoveAll(stolen))
		must(t, os.CopyFS(stolen, os.DirFS(f.keys)))
		f.rotate(role)
		f.publish("", now)
		dir := t.TempDir()
		must(t, take(t, f.clientOf(dir, first), "1.1.0"))
		// The thief has the old key, and for the sake of the test all other online keys.
		thief := f.twin()
		thief.keys = stolen
		must(t, os.Remove(filepath.Join(thief.repo, "metadata/2.root.json")))
		thief.release("6.6.6", "evil")
		thief.publish("", now)
		must(t, os.WriteFile(filepath.Join(thief.repo, "metadata/2.root.json"), f.root(), 0o644))
		for _, d := range []string{dir, t.TempDir()} {
			c, err := NewClient(ClientOptions{Dir: d, Root: first, Limits: quick, Source: Dir(thief.repo)})
			must(t, err)
			if err := take(t, c, "6.6.6"); conditionOf(err) != Signature {
				t.Errorf("%s: %v", role, err)
			}
		}
	}
}

// TestNoMomentWithoutValidMetadata: a rotation is published file by file, and a
// device reads in between, one that knows the old root and one that knows none.
func TestNoMomentWithoutValidMetadata(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	first := f.root()
	for _, role := range []string{metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP, LogRole} {
		f.rotate(role)
	}
	served := t.TempDir() // a mirror that gets one file after the other
	must(t, os.RemoveAll(served))
	must(t, os.CopyFS(served, os.DirFS(f.repo)))
	dir := t.TempDir()
	f.publish(f.pack("1.2.0"), now)
	var files []string
	must(t, filepath.WalkDir(f.repo, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != ".lock" {
			rel, err := filepath.Rel(f.repo, path)
			must(t, err)
			files = append(files, filepath.ToSlash(rel))
		}
		return err
	}))
	slices.SortStableFunc(files, Compare)
	for _, file := range files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(served, file)), 0o755))
		must(t, os.WriteFile(filepath.Join(served, file), read(t, filepath.Join(f.repo, file)), 0o644))
		for _, d := range []string{dir, t.TempDir()} {
			c, err := NewClient(ClientOptions{Dir: d, Root: first, Limits: quick, Source: Dir(served)})
			must(t, err)
			if err := take(t, c, "1.1.0"); err != nil {
				t.Errorf("after %s: %v", file, err)
			}
		}
	}
	must(t, take(t, f.clientOf(dir, first), "1.2.0"))
}

func TestRevokeStopsAtTheThreshold(t *testing.T) {
	f := newFleet(t)
	info, err := Show(Desk{Keys: f.keys})
	must(t, err)
	if len(info.Keys) != 7 || info.Thresholds["root"] != 2 || info.Log == "" || info.Keys[0].File == "" {
		t.Errorf("%+v", info)
	}
	c, err := Revoke(f.desk(), info.Keys[0].ID[:10])
	must(t, err)
	if c.Version != 2 {
		t.Errorf("%+v", c)
	}
	for _, k := range info.Keys[1:] {
		if _, err := Revoke(f.desk(), k.ID); err == nil || !strings.Contains(err.Error(), "must sign for "+k.Role) {
			t.Errorf("%s: %v", k.Role, err)
		}
	}
	for _, id := range []string{"", "xyz", info.Keys[0].ID} {
		if _, err := Revoke(f.desk(), id); err == nil || !strings.Contains(err.Error(), "names no key") {
			t.Errorf("%q: %v", id, err)
		}
	}
	if after, err := Show(Desk{Keys: f.keys}); err != nil || after.Version != 2 {
		t.Errorf("refused changes changed it: %+v (%v)", after, err)
	}
	f.release("1.1.0", "one")
	must(t, take(t, f.client(t.TempDir()), "1.1.0"))
}

func TestRootsThatNobodyCouldUseAreNotSigned(t *testing.T) {
	f := newFleet(t)
	pub := func(file string) crypto.PublicKey {
		p, err := LoadPublicKey(filepath.Join(f.keys, file), nil)
		must(t, err)
		return p
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(t, err)
	for words, r := range map[string]Rotation{
		"one key alone":     {Role: "root", Threshold: 1},
		"of which 4 must":   {Role: "root", Threshold: 4},
		"of which 2 must":   {Role: "targets", Threshold: 2},
		"would have both":   {Role: "targets", Keys: []crypto.PublicKey{pub("root-1.pem")}},
		"the log has one":   {Role: "log", Keys: []crypto.PublicKey{pub("targets.pem"), pub("snapshot.pem")}},
		"no role":           {Role: "mirrors"},
		"P-384 cannot sign": {Role: "targets", Keys: []crypto.PublicKey{p384.Public()}},
	} {
		if _, err := Rotate(f.desk(), r); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", words, err)
		}
	}
	if info, err := Show(Desk{Keys: f.keys}); err != nil || info.Version != 1 {
		t.Errorf("%+v (%v)", info, err)
	}
}

// TestKeysWithAPassphrase are PKCS #8 as openssl reads and writes it, and nobody is
// asked for one that is not needed.
func TestKeysWithAPassphrase(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	must(t, Init(dir, InitOptions{Now: now, Passphrase: []byte("correct horse")}))
	var asked []string
	ask := func(answer string) func(string) ([]byte, error) {
		return func(file string) ([]byte, error) {
			asked = append(asked, filepath.Base(file))
			return []byte(answer), nil
		}
	}
	repo := t.TempDir()
	if _, err := Publish(PublishOptions{Keys: dir, Repo: repo, Now: now}); err == nil || !strings.Contains(err.Error(), "has a passphrase") {
		t.Errorf("without a passphrase: %v", err)
	}
	if _, err := Publish(PublishOptions{Keys: dir, Repo: repo, Now: now, Passphrase: ask("wrong")}); err == nil || !strings.Contains(err.Error(), "does not open") {
		t.Errorf("with a wrong one: %v", err)
	}
	if files, _ := filepath.Glob(filepath.Join(repo, "metadata/*")); len(files) > 0 {
		t.Errorf("a publication that failed has written %v", files)
	}
	asked = nil
	_, err := Publish(PublishOptions{Keys: dir, Repo: repo, Now: now, Passphrase: ask("correct horse")})
	must(t, err)
	if want := []string{"targets.pem", "snapshot.pem", "timestamp.pem", "log.pem"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %v, want %v", asked, want)
	}
	asked = nil
	_, err = Publish(PublishOptions{Keys: dir, Repo: repo, Now: now, Passphrase: ask("correct horse")})
	must(t, err)
	if !slices.Equal(asked, []string{"timestamp.pem"}) {
		t.Errorf("to sign the timestamp afresh, asked for %v", asked)
	}
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("no openssl here")
	}
	out, err := exec.Command(openssl, "pkey", "-in", filepath.Join(dir, "targets.pem"), "-passin", "pass:correct horse", "-pubout").CombinedOutput()
	if err != nil {
		t.Fatalf("openssl: %v: %s", err, out)
	}
	block, _ := pem.Decode(out)
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	must(t, err)
	ours, err := LoadPublicKey(filepath.Join(dir, "targets.pem"), nil)
	must(t, err)
	if !samePublic(public, ours) {
		t.Error("openssl reads another key")
	}
	theirs := filepath.Join(t.TempDir(), "theirs.pem")
	if out, err := exec.Command(openssl, "genpkey", "-algorithm", "ed25519", "-aes-256-cbc", "-pass", "pass:theirs", "-out", theirs).CombinedOutput(); err != nil {
		t.Fatalf("openssl: %v: %s", err, out)
	}
	if _, err := LoadKey(theirs, ask("theirs")); err != nil {
		t.Error(err)
	}
}

// TestShownPublicHalfMustBeTheKeys: somebody has exchanged the half that is not locked.
func TestShownPublicHalfMustBeTheKeys(t *testing.T) {
	dir := t.TempDir()
	_, err := newKey(filepath.Join(dir, "a.pem"), []byte("x"))
	must(t, err)
	_, err = newKey(filepath.Join(dir, "b.pem"), []byte("x"))
	must(t, err)
	a, b := read(t, filepath.Join(dir, "a.pem")), read(t, filepath.Join(dir, "b.pem"))
	cut := []byte("-----BEGIN ENCRYPTED")
	mixed := append(bytes.Clone(a[:bytes.Index(a, cut)]), b[bytes.Index(b, cut):]...)
	must(t, os.WriteFile(filepath.Join(dir, "c.pem"), mixed, 0o600))
	if _, err := LoadKey(filepath.Join(dir, "c.pem"), func(string) ([]byte, error) { return []byte("x"), nil }); err == nil || !strings.Contains(err.Error(), "of another key") {
		t.Error(err)
	}
}

// token is a key that never leaves its device.
type token struct{ crypto.Signer }

// TestHardwareKeySigns: the keys of targets are a file and a token with ECDSA, and
// both must sign.
func TestHardwareKeySigns(t *testing.T) {
	f := newFleet(t)
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	mine, err := LoadPublicKey(filepath.Join(f.keys, "targets.pem"), nil)
	must(t, err)
	_, err = Rotate(f.desk(), Rotation{Role: metadata.TARGETS, Keys: []crypto.PublicKey{mine, priv.Public()}, Threshold: 2})
	must(t, err)
	o := PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: f.pack("1.1.0"), Now: now}
	if _, err := Publish(o); err == nil || !strings.Contains(err.Error(), "1 of the 2 signatures") {
		t.Errorf("without the token: %v", err)
	}
	o.Signers = []crypto.Signer{token{priv}}
	_, err = Publish(o)
	must(t, err)
	must(t, take(t, f.client(t.TempDir()), "1.1.0"))
}

// elsewhere takes a key file out of the folder, to another machine.
func (f *fleet) elsewhere(file string) string {
	f.t.Helper()
	to := filepath.Join(f.t.TempDir(), file)
	must(f.t, os.Rename(filepath.Join(f.keys, file), to))
	return to
}

func signWith(t *testing.T, file, key string) Statement {
	t.Helper()
	s, err := LoadKey(key, nil)
	must(t, err)
	st, err := Examine(file, "", s.Public())
	must(t, err)
	_, err = Sign(file, s)
	must(t, err)
	return st
}

// TestReleaseIsSignedByHand on two machines, one after the other for one file and
// each for a copy of it; the repository is what it was until all is there.
func TestReleaseIsSignedByHand(t *testing.T) {
	f := newFleet(t)
	f.release("1.0.0", "zero")
	second, err := newKey(filepath.Join(f.keys, "targets-b.pem"), nil)
	must(t, err)
	mine, err := LoadPublicKey(filepath.Join(f.keys, "targets.pem"), nil)
	must(t, err)
	_, err = Rotate(f.desk(), Rotation{Role: metadata.TARGETS, Keys: []crypto.PublicKey{mine, second.Public()}, Threshold: 2})
	must(t, err)
	f.publish("", now)
	a, b := f.elsewhere("targets.pem"), f.elsewhere("targets-b.pem")
	before := tree(t, f.repo)
	o := PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: f.pack("1.1.0"), Now: now}
	if _, err := Publish(o); err == nil || !strings.Contains(err.Error(), "0 of the 2 signatures") || !strings.Contains(err.Error(), "--unsigned") {
		t.Errorf("without the keys: %v", err)
	}
	o.Unsigned = filepath.Join(t.TempDir(), "to-sign")
	p, err := Publish(o)
	must(t, err)
	if p.Awaits == "" || !strings.Contains(p.Missing, "0 of the 2") {
		t.Errorf("%+v", p)
	}
	if now := tree(t, f.repo); now != before {
		t.Errorf("the repository has changed:\n%s\nit was\n%s", now, before)
	}
	copied := filepath.Join(t.TempDir(), filepath.Base(p.Awaits))
	must(t, os.WriteFile(copied, read(t, p.Awaits), 0o644))
	st := signWith(t, p.Awaits, a)
	if st.Role != metadata.TARGETS || st.Version != 3 || st.Previous != 2 || !st.PreviousMine || len(st.Changes) != 1 ||
		!strings.Contains(st.Changes[0], `release "bundles/1.1.0.json" is added`) || !st.Expires.Equal(now.Add(DefaultExpiry.Targets)) {
		t.Errorf("%+v", st)
	}
	if st := signWith(t, copied, b); st.Previous != 0 || len(st.Changes) != 2 {
		t.Errorf("without the version before: %+v", st)
	}
	o.Unsigned = ""
	o.Signed = []string{p.Awaits}
	if _, err := Publish(o); err == nil || !strings.Contains(err.Error(), "1 of the 2 signatures") {
		t.Errorf("with one signature: %v", err)
	}
	for name, refuse := range map[string]func(*PublishOptions){
		"its bundle is not here":       func(o *PublishOptions) { o.Bundle = "" },
		"not for this bundle":          func(o *PublishOptions) { o.Bundle = f.pack("1.2.0") },
		"0 of the 2 signatures":        func(o *PublishOptions) { o.Signed = []string{otherTargets(t, p.Awaits)}; o.Signers = theirs(t, a, b) },
		"is signed for something else": func(o *PublishOptions) { o.Signed = append(o.Signed, otherTargets(t, p.Awaits)) },
	} {
		q := o
		q.Signed = []string{p.Awaits, copied}
		refuse(&q)
		if _, err := Publish(q); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if now := tree(t, f.repo); now != before {
		t.Error("refused signatures have changed the repository")
	}
	o.Signed = []string{p.Awaits, copied}
	_, err = Publish(o)
	must(t, err)
	must(t, take(t, f.client(t.TempDir()), "1.1.0"))
	if _, err := Publish(o); err == nil || !strings.Contains(err.Error(), "something was published in between") {
		t.Errorf("the same once more: %v", err)
	}
	f.publish("", now.Add(day)) // the timestamp needs nobody's hand
	must(t, take(t, f.client(t.TempDir()), "1.1.0"))
}

func theirs(t *testing.T, files ...string) (list []crypto.Signer) {
	t.Helper()
	for _, f := range files {
		s, err := LoadKey(f, nil)
		must(t, err)
		list = append(list, s)
	}
	return list
}

// otherTargets is a copy of a file that says something else.
func otherTargets(t *testing.T, file string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.json")
	must(t, os.WriteFile(path, read(t, file), 0o644))
	edit[metadata.TargetsType](t, path, func(m *metadata.Metadata[metadata.TargetsType]) { m.Signed.Expires = m.Signed.Expires.Add(time.Hour) })
	return path
}

// tree is what a folder holds, to compare.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			_, sum, err := digestFile(path)
			must(t, err)
			out.WriteString(path + " " + sum + "\n")
		}
		return err
	}))
	return out.String()
}

// TestRootIsSignedByHand: one root key is here, the other with somebody else.
func TestRootIsSignedByHand(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	first := f.root()
	b, c := f.elsewhere("root-2.pem"), f.elsewhere("root-3.pem")
	if _, err := Rotate(f.desk(), Rotation{Role: metadata.TIMESTAMP}); err == nil || !strings.Contains(err.Error(), "1 of the 2 signatures") {
		t.Errorf("with one key: %v", err)
	}
	o := f.desk()
	o.Unsigned = t.TempDir()
	change, err := Rotate(o, Rotation{Role: metadata.TIMESTAMP})
	must(t, err)
	if change.Awaits == "" || change.Version != 2 {
		t.Errorf("%+v", change)
	}
	if string(f.root()) != string(first) {
		t.Error("the root has changed before enough have signed")
	}
	if _, err := TakeRoot(f.keys, []string{change.Awaits}); err == nil || !strings.Contains(err.Error(), "1 of the 2 signatures") {
		t.Errorf("taken too early: %v", err)
	}
	st := signWith(t, change.Awaits, b)
	if len(st.Signed) != 1 || st.Role != metadata.ROOT || len(st.Changes) != 2 || !strings.Contains(strings.Join(st.Changes, "; "), "may no longer sign timestamp") {
		t.Errorf("%+v", st)
	}
	if st := signWith(t, change.Awaits, c); !st.PreviousMine {
		t.Errorf("%+v", st)
	}
	p, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Now: now, Signed: []string{change.Awaits}})
	must(t, err)
	if p.Root != 2 {
		t.Errorf("%+v", p)
	}
	must(t, take(t, f.clientOf(t.TempDir(), first), "1.1.0"))
	// Cut off after the root was taken, the same once more.
	_, err = Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Now: now, Signed: []string{change.Awaits}})
	must(t, err)
	other := newFleet(t)
	if _, err := TakeRoot(other.keys, []string{change.Awaits}); err == nil {
		t.Error("another fleet took our root, and signed it with its keys")
	}
}

// TestAKeyUnderAnothersIDIsRefused by who looks at the root before signing it, by who
// takes it in, and by devices: ids are all that a person compares.
func TestAKeyUnderAnothersIDIsRefused(t *testing.T) {
	for _, role := range Roles[:4] {
		f := newFleet(t)
		f.release("1.1.0", "one")
		first := f.root()
		b, c := f.elsewhere("root-2.pem"), f.elsewhere("root-3.pem")
		o := f.desk()
		o.Unsigned = t.TempDir()
		change, err := Renew(o)
		must(t, err)
		if st := signWith(t, change.Awaits, b); !st.PreviousMine || len(st.Changes) != 0 {
			t.Fatalf("%s: of the true one: %+v", role, st)
		}
		thief, err := newKey(filepath.Join(t.TempDir(), "k.pem"), nil)
		must(t, err)
		edit(t, change.Awaits, func(m *metadata.Metadata[metadata.RootType]) {
			ids := m.Signed.Roles[role].KeyIDs
			m.Signed.Keys[ids[0]], err = tufKey(thief.Public())
			must(t, err)
		}, b, c) // two who have not looked
		s, err := LoadKey(b, nil)
		must(t, err)
		if st, err := Examine(change.Awaits, "", s.Public()); err == nil || !strings.Contains(err.Error(), "is another key") {
			t.Errorf("%s: who is to sign is shown %+v (%v)", role, st.Changes, err)
		}
		if _, err := TakeRoot(f.keys, []string{change.Awaits}); err == nil || !strings.Contains(err.Error(), "is another key") {
			t.Errorf("%s: it was taken in: %v", role, err)
		}
		must(t, os.WriteFile(filepath.Join(f.repo, "metadata", "2.root.json"), read(t, change.Awaits), 0o644))
		refused(t, f.clientOf(t.TempDir(), first).Refresh(t.Context(), now), Malformed, "is another key")
		if _, err := RootVersion(read(t, change.Awaits)); err == nil {
			t.Errorf("%s: a mirror would hand it to new devices", role)
		}
	}
}

func TestStatementShowsWhatIsHidden(t *testing.T) {
	f := newFleet(t)
	f.release("1.0.0", "zero")
	f.elsewhere("targets.pem")
	thief, err := newKey(filepath.Join(t.TempDir(), "k.pem"), nil)
	must(t, err)
	p, err := Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: f.pack("1.1.0"), Now: now, Unsigned: t.TempDir()})
	must(t, err)
	edit[metadata.TargetsType](t, p.Awaits, func(m *metadata.Metadata[metadata.TargetsType]) {
		m.Signed.Targets["bundles/1.0.0.json"].Hashes["sha256"][0] ^= 1
		m.Signed.Targets["bundles/\x1b[2K6.6.6.json"] = m.Signed.Targets["bundles/1.1.0.json"]
	})
	st, err := Examine(p.Awaits, "", thief.Public())
	must(t, err)
	all := strings.Join(st.Changes, "\n")
	if st.PreviousMine || !strings.Contains(all, "OTHER CONTENT") || strings.Contains(all, "\x1b") || len(st.Changes) != 3 {
		t.Errorf("%+v", st)
	}
	if _, err := Examine(p.Awaits, p.Awaits, thief.Public()); err == nil {
		t.Error("a version was compared with itself")
	}
}

func TestRenewedRootLastsLonger(t *testing.T) {
	f := newFleet(t)
	f.release("1.1.0", "one")
	first := f.root()
	late := now.Add(DefaultExpiry.Root + day)
	o := f.desk()
	o.Now = late
	c, err := Renew(o)
	must(t, err)
	if !c.Expires.Equal(late.Add(DefaultExpiry.Root)) {
		t.Errorf("%+v", c)
	}
	_, err = Publish(PublishOptions{Keys: f.keys, Repo: f.repo, Now: late})
	must(t, err)
	must(t, f.clientOf(t.TempDir(), first).Refresh(t.Context(), late)) // over an expired root to one that is not
}

func digestFile(path string) (size int64, sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	raw, size, err := digestOf(f)
	return size, hex.EncodeToString(raw), err
}
