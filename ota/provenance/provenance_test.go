package provenance

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	slsa "github.com/in-toto/attestation/go/predicates/provenance/v1"
	intoto "github.com/in-toto/attestation/go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/ota/sbom"
	"github.com/deimos-edge/deimos/wire"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const aCommit = "0123456789abcdef0123456789abcdef01234567"

func sum(digit string) string { return strings.Repeat(digit, 64) }

func aRelease() bundle.Manifest {
	half := 50.0
	part := func(name, arch, digit string) bundle.Part {
		return bundle.Part{Name: name, Platform: bundle.Platform{OS: "linux", Arch: arch}, SHA256: sum(digit), Size: 1}
	}
	agent := part(bundle.PartAgent, "amd64", "a")
	agent.Forms = []bundle.Form{{Encoding: bundle.EncodingZstd, SHA256: sum("1"), Size: 1}, {Encoding: "bsdiff", SHA256: sum("2"), Size: 1, From: sum("9")}, {Encoding: "zstd-patch", SHA256: sum("3"), Size: 1, From: sum("8")}}
	return bundle.Manifest{
		Format: bundle.Format, Version: "1.2.3", Created: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC), Percentage: &half, From: "1.0.0",
		Parts:       []bundle.Part{agent, part(bundle.PartFirmware, "arm64", "b")},
		Attachments: []bundle.Attachment{{Name: "sbom.cdx.json", MediaType: sbom.MediaType, SHA256: sum("c"), Size: 1}},
	}
}

func aBill(settings ...debug.BuildSetting) *sbom.Bill {
	b := sbom.New("deimos", "1.2.3")
	b.AddDebian(sbom.Debian{Name: "libc6", Version: "2.36", Arch: "arm64", SHA256: sum("d")})
	for _, name := range []string{"deimos-agent", "deimos-init"} {
		b.Programs = append(b.Programs, sbom.Program{Name: name, SHA256: sum("a"), Info: &debug.BuildInfo{
			GoVersion: "go1.26.0", Path: "github.com/deimos-edge/deimos/cmd/" + name,
			Settings: append([]debug.BuildSetting{{Key: "GOOS", Value: "linux"}, {Key: "GOARCH", Value: "amd64"}, {Key: "-trimpath", Value: "true"}}, settings...),
		}})
	}
	return b
}

func aStatement(t *testing.T) Statement {
	t.Helper()
	st, err := New(aRelease(), aBill(), Options{Commit: aCommit})
	must(t, err)
	return st
}

func aKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	return key
}

// TestOthersReadIt: the libraries of those who made DSSE, in-toto and SLSA verify it, and
// find in it what they ask for.
func TestOthersReadIt(t *testing.T) {
	key := aKey(t)
	raw, mediaType, err := Seal(aStatement(t), key)
	must(t, err)
	if mediaType != MediaType {
		t.Errorf("media type %s", mediaType)
	}
	var env dsse.Envelope
	must(t, json.Unmarshal(raw, &env))
	payload, err := env.DecodeB64Payload()
	must(t, err)
	if sig, err := b64(env.Signatures[0].Sig); err != nil || !ed25519.Verify(key.Public().(ed25519.PublicKey), dsse.PAE(env.PayloadType, payload), sig) {
		t.Error("the signature is none of DSSE")
	}
	var theirs intoto.Statement
	must(t, protojson.Unmarshal(payload, &theirs))
	must(t, theirs.Validate())
	inner, err := protojson.Marshal(theirs.GetPredicate())
	must(t, err)
	var p slsa.Provenance
	must(t, protojson.Unmarshal(inner, &p))
	must(t, p.Validate())
	deps := p.GetBuildDefinition().GetResolvedDependencies()
	switch {
	case theirs.GetPredicateType() != PredicateType || p.GetBuildDefinition().GetBuildType() != BuildType || p.GetRunDetails().GetBuilder().GetId() != ByHand:
		t.Errorf("it says %v", &p)
	case len(theirs.GetSubject()) != 2 || theirs.GetSubject()[1].GetDigest()["sha256"] != sum("b"):
		t.Errorf("its subjects are %v", theirs.GetSubject())
	case len(deps) != 2 || deps[0].GetUri() != "git+"+Sources || deps[0].GetDigest()["gitCommit"] != aCommit || deps[1].GetDigest()["sha256"] != sum("d"):
		t.Errorf("it was built from %v", deps)
	case p.GetBuildDefinition().GetExternalParameters().GetFields()["deltaFrom"].GetListValue().GetValues()[0].GetStringValue() != sum("8"):
		t.Errorf("it was asked for %v", p.GetBuildDefinition().GetExternalParameters())
	case p.GetRunDetails().GetByproducts()[0].GetDigest()["sha256"] != sum("c"):
		t.Errorf("beside it came %v", p.GetRunDetails().GetByproducts())
	case p.GetBuildDefinition().GetInternalParameters().GetFields()["deimos-init linux/amd64"] == nil:
		t.Errorf("its programs are %v", p.GetBuildDefinition().GetInternalParameters())
	}
}

func b64(s string) (raw []byte, err error) { return raw, json.Unmarshal([]byte(`"`+s+`"`), &raw) }

// TestAStatementOnThisReleaseIsTaken, signed or not, and it has the same bytes each time.
func TestAStatementOnThisReleaseIsTaken(t *testing.T) {
	key := aKey(t)
	for _, signer := range []crypto.Signer{nil, key} {
		raw, mediaType, err := Seal(aStatement(t), signer)
		must(t, err)
		again, _, err := Seal(aStatement(t), signer)
		must(t, err)
		if string(raw) != string(again) {
			t.Error("built again it differs")
		}
		st, err := Open(aRelease(), raw, mediaType, nil)
		must(t, err)
		if Commit(st) != aCommit {
			t.Errorf("its commit is %q", Commit(st))
		}
		_, err = Open(aRelease(), raw, mediaType, key.Public())
		if signer == nil && !errors.Is(err, ErrUnsigned) || signer != nil && err != nil {
			t.Errorf("signed %v, asked for the builder's key: %v", signer != nil, err)
		}
	}
}

// TestAStatementOnSomethingElseIsRefused, though its builder has signed it.
func TestAStatementOnSomethingElseIsRefused(t *testing.T) {
	key := aKey(t)
	for what, change := range map[string]func(st *Statement){
		"another agent":         func(st *Statement) { st.Subject[0].Digest["sha256"] = sum("e") },
		"a part less":           func(st *Statement) { st.Subject = st.Subject[:1] },
		"a part more":           func(st *Statement) { st.Subject = append(st.Subject, wire.Resource{Name: "x"}) },
		"no parts":              func(st *Statement) { st.Subject = nil },
		"another name":          func(st *Statement) { st.Subject[0].Name = "agent 9.9.9 linux/amd64" },
		"another version":       func(st *Statement) { st.Predicate.BuildDefinition.ExternalParameters.Version = "1.2.4" },
		"other devices":         func(st *Statement) { st.Predicate.BuildDefinition.ExternalParameters.From = "" },
		"another older file":    func(st *Statement) { st.Predicate.BuildDefinition.ExternalParameters.DeltaFrom[0] = sum("7") },
		"another bill":          func(st *Statement) { st.Predicate.RunDetails.Byproducts[0].Digest["sha256"] = sum("e") },
		"a bill that is none":   func(st *Statement) { st.Predicate.RunDetails.Byproducts[0].Name = "x" },
		"another kind of build": func(st *Statement) { st.Predicate.BuildDefinition.BuildType += "2" },
		"another predicate":     func(st *Statement) { st.PredicateType += "2" },
		"no statement":          func(st *Statement) { st.Type = "" },
	} {
		st := aStatement(t)
		change(&st)
		for _, signer := range []crypto.Signer{nil, key} {
			raw, mediaType, err := Seal(st, signer)
			must(t, err)
			var by crypto.PublicKey
			if signer != nil {
				by = key.Public()
			}
			if _, err := Open(aRelease(), raw, mediaType, by); !errors.Is(err, ErrOther) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

// TestOnlyTheBuildersSignatureCounts.
func TestOnlyTheBuildersSignatureCounts(t *testing.T) {
	key := aKey(t)
	raw, mediaType, err := Seal(aStatement(t), key)
	must(t, err)
	if _, err := Open(aRelease(), raw, mediaType, aKey(t).Public()); !errors.Is(err, wire.ErrSignature) {
		t.Errorf("another's key: %v", err)
	}
	order, err := wire.Seal(key, wire.TypeOrder, aStatement(t))
	must(t, err)
	if _, err := Open(aRelease(), order, mediaType, key.Public()); err == nil {
		t.Error("what was signed as something else was taken for a statement")
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	if _, _, err := Seal(aStatement(t), other); err == nil || !strings.Contains(err.Error(), "openssl genpkey") {
		t.Errorf("a key of another kind: %v", err)
	}
	for _, by := range []crypto.PublicKey{nil, key.Public(), other.Public()} {
		for _, raw := range []string{"", "{", "{}", `{"payload":"!"}`} {
			for _, mediaType := range []string{MediaType, MediaTypeUnsigned, "text/html"} {
				if _, err := Open(aRelease(), []byte(raw), mediaType, by); err == nil {
					t.Errorf("%q as %s by %T was taken", raw, mediaType, by)
				}
			}
		}
	}
}

// TestTheCommitIsTheOneThatWasBuilt, or none is named.
func TestTheCommitIsTheOneThatWasBuilt(t *testing.T) {
	vcs := func(revision, modified string) []debug.BuildSetting {
		return []debug.BuildSetting{{Key: "vcs.revision", Value: revision}, {Key: "vcs.modified", Value: modified}}
	}
	two := aBill(vcs(aCommit, "false")...)
	info := *two.Programs[1].Info
	info.Settings = slices.Concat(info.Settings[:3], vcs(strings.Repeat("f", 40), "false"))
	two.Programs[1].Info = &info
	for what, c := range map[string]struct {
		bill  *sbom.Bill
		named string
		want  string
	}{
		"that all programs name": {aBill(vcs(aCommit, "false")...), "", aCommit},
		"with changes after it":  {aBill(vcs(aCommit, "true")...), "", ""},
		"that none names":        {aBill(), "", ""},
		"of two":                 {two, "", ""},
		"that was named":         {two, strings.Repeat("e", 64), strings.Repeat("e", 64)},
	} {
		st, err := New(aRelease(), c.bill, Options{Commit: c.named})
		must(t, err)
		if Commit(st) != c.want {
			t.Errorf("the commit %s is %q, want %q", what, Commit(st), c.want)
		}
	}
	for _, bad := range []string{"main", "abc", aCommit[1:], aCommit[1:] + "g"} {
		if _, err := New(aRelease(), aBill(), Options{Commit: bad}); err == nil || !strings.Contains(err.Error(), "git rev-parse") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
