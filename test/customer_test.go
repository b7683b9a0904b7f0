package test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	intoto "github.com/in-toto/attestation/go/v1"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// TestJobsAsACustomerRunsThem has real devices do jobs with inputs from everywhere and
// outputs to everywhere, by the command line. What comes back is compared with what was
// given, and what devices have signed is verified by libraries that are not ours.
func TestJobsAsACustomerRunsThem(t *testing.T) {
	t.Parallel()
	rng := testbed.Seeded(t)
	f := newFleet(t)
	owned := f.Path("owned")
	folder := map[string]string{"a.txt": "first", "below/b c.txt": "second", "below/ä.txt": ""}
	for name, text := range folder {
		path := filepath.Join(owned, "album", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(owned, "album", "link")); err != nil {
		t.Fatal(err)
	}
	// One owner has opened data, the others have not.
	f.enrol(1, false, "--config", f.Write("open.toml", fmt.Appendf(nil, "[jobs]\nslots = 2\nsensors = true\n[jobs.datasets]\nmine = %q\n", owned)))
	f.enrol(2, false, "--config", f.Write("closed.toml", []byte("[jobs]\nslots = 2\n")))
	open := f.devices[0]
	module := f.HostedGuest()

	small, large := []byte("one chunk\n"), testbed.RandomBytes(rng, 2<<20+4711)
	f.Put("small", small)
	f.Put("large", large)
	f.Put("empty", nil)

	f.Sub("several inputs to outputs, kept and fetched", func(t *testing.T) {
		dir := f.Path("copies")
		var r api.JobResult
		f.OK(&r, "job", "run", module, "--arg=copy", "--arg=a", "--arg=b", "--arg=c", "--input", "a=small", "--input", "b=large", "--input", "c=empty",
			"--write", "a", "--write", "b", "--write", "c", "--out", dir, "--save", "b=kept/b", "--save", "said")
		for name, want := range map[string][]byte{"a": small, "b": large, "c": nil, wire.Stdout: r.Output} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, want %d: %v", name, len(got), len(want), err)
			}
		}
		for name, want := range map[string][]byte{"kept/b": large, "said": r.Output} {
			out := f.Path("back")
			f.OK(nil, "object", "get", "--plain", name, "--out", out)
			if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s came back with %d bytes, want %d: %v", name, len(got), len(want), err)
			}
			if err := os.Remove(out); err != nil {
				t.Fatal(err)
			}
		}
		st := f.statement(r)
		want := map[string][]byte{"a": small, "b": large, "c": nil}
		for _, in := range st.Predicate.Inputs {
			if sum := sha256.Sum256(want[in.Name]); in.Digest["sha256"] != hex.EncodeToString(sum[:]) {
				t.Errorf("the statement has %s for the input %s", in.Digest["sha256"], in.Name)
			}
			delete(want, in.Name)
		}
		if len(want) > 0 {
			t.Errorf("the statement leaves out %v", slices.Collect(maps.Keys(want)))
		}
	})

	f.Sub("standard input is the whole file", func(t *testing.T) {
		var r api.JobResult
		f.OK(&r, "job", "run", testbed.Guest("sha256sum"), "--input", "large")
		if sum := sha256.Sum256(large); !strings.HasPrefix(string(r.Output), hex.EncodeToString(sum[:])) {
			t.Errorf("a device hashed %q", r.Output)
		}
		f.OK(&r, "job", "run", testbed.Guest("sha256sum"), "--input", "large", "--chunk", "1")
		if sum := sha256.Sum256(large[1<<20 : 2<<20]); !strings.HasPrefix(string(r.Output), hex.EncodeToString(sum[:])) {
			t.Errorf("of chunk 1 a device hashed %q", r.Output)
		}
	})

	f.Sub("a file of more chunks than fit an order", func(t *testing.T) {
		whole := f.putPieces("long", 400)
		var r api.JobResult
		f.OK(&r, "job", "run", testbed.Guest("sha256sum"), "--input", "long")
		if sum := sha256.Sum256(whole); !strings.HasPrefix(string(r.Output), hex.EncodeToString(sum[:])) {
			t.Errorf("a device hashed %q", r.Output)
		}
		if in := f.statement(r).Predicate.Inputs; len(in) != 1 || in[0].Name != wire.Stdin {
			t.Errorf("%v", in)
		}
	})

	f.Sub("a file and a folder of the owner", func(t *testing.T) {
		var r api.JobResult
		f.OK(&r, "job", "run", module, "--arg=walk", "--dataset", "d=mine/album", "--dataset", "stdin=mine/album/a.txt")
		want := "stdin 5 \"first\"\n./\nd/\nd/a.txt \"first\"\nd/below/\nd/below/b c.txt \"second\"\nd/below/ä.txt \"\"\n"
		if string(r.Output) != want || r.Device != open.id {
			t.Errorf("device %s saw\n%s\nwant\n%s", r.Device, r.Output, want)
		}
		var lines strings.Builder
		for _, name := range slices.Sorted(maps.Keys(folder)) {
			fmt.Fprintf(&lines, "%x  %s\n", sha256.Sum256([]byte(folder[name])), name)
		}
		sum := sha256.Sum256([]byte(lines.String()))
		if in := f.statement(r).Predicate.Inputs; len(in) != 2 || in[0].Digest[wire.DirHash] != hex.EncodeToString(sum[:]) {
			t.Errorf("%v", in)
		}
		if said := f.Fails(nil, 1, "job", "run", module, "--arg=walk", "--dataset", "d=mine/../../etc", "--retries", "0"); !strings.Contains(said, "does not lead below") {
			t.Errorf("it says %q", said)
		}
		if said := f.Fails(nil, 1, "job", "run", module, "--arg=walk", "--dataset", "d=theirs", "--deadline", "10s"); !strings.Contains(said, "has not opened the dataset theirs") {
			t.Errorf("it says %q", said)
		}
	})

	f.Sub("what a device has measured", func(t *testing.T) {
		var r api.JobResult
		f.OK(&r, "job", "run", module, "--arg=copy", "--arg=curves", "--sensors", "curves", "--write", "curves", "--out", f.Path("curves"))
		if said := f.Fails(nil, 1, "job", "run", module, "--arg=copy", "--arg=curves", "--sensors", "curves=none.such", "--write", "curves"); !strings.Contains(said, "none.such") {
			t.Errorf("of a series that nobody measures it says %q", said)
		}
		raw, err := os.ReadFile(f.Path("curves", "curves"))
		var h wire.History
		if err == nil {
			err = json.Unmarshal(raw, &h)
		}
		if err != nil || r.Device != open.id {
			t.Errorf("of device %s came %.100q: %v", r.Device, raw, err)
		}
	})

	f.Sub("over many files, with one that all get", func(t *testing.T) {
		texts := map[string][]byte{"in/x": []byte("x"), "in/y/z": []byte("yz"), "in/long": large}
		for name, data := range texts {
			f.OK(nil, "object", "put", "--plain", f.Write("in", data), "--name", name)
		}
		dir := f.Path("mapped")
		f.OK(nil, "job", "map", module, "--arg=copy", "--arg=each", "--arg=all", "--over", "in/*", "--as", "each", "--input", "all=small",
			"--write", "each", "--write", "all", "--out", dir, "--save", "each=out/{}")
		for name, want := range texts {
			got, err := os.ReadFile(filepath.Join(dir, name, "each"))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes: %v", name, len(got), err)
			}
			back := f.Path("back")
			f.OK(nil, "object", "get", "--plain", "out/"+name, "--out", back)
			if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s was kept with %d bytes: %v", name, len(got), err)
			}
			if err := os.Remove(back); err != nil {
				t.Fatal(err)
			}
		}
	})

	f.Sub("what cannot be done is said in a sentence", func(t *testing.T) {
		for _, bad := range []struct {
			code int
			says string
			args []string
		}{
			{1, `no object "nothing"`, []string{"run", module, "--input", "nothing"}},
			{1, `begins with "nothing/"`, []string{"map", module, "--over", "nothing/*"}},
			{1, "two inputs named a", []string{"run", module, "--input", "a=small", "--input", "a=large"}},
			{1, "two inputs named a", []string{"run", module, "--input", "a=small", "--dataset", "a=mine"}},
			{64, "one standard input", []string{"run", module, "--input", "small", "--input", "large"}},
			{64, "--chunk is for", []string{"run", module, "--input", "a=small", "--chunk", "0"}},
			{1, "there is no chunk 3", []string{"run", module, "--input", "large", "--chunk", "3"}},
			{1, "not valid WebAssembly", []string{"run", f.Write("text.wasm", []byte("no module")), "--input", "small"}},
		} {
			if said := f.Fails(nil, bad.code, append([]string{"job"}, bad.args...)...); !strings.Contains(said, bad.says) {
				t.Errorf("%v says %q, not %q", bad.args, said, bad.says)
			}
		}
	})

	f.Sub("a file that is removed while its job waits", func(t *testing.T) {
		f.Put("gone", small)
		var j api.Job
		f.OK(&j, "job", "run", module, "--arg=walk", "--input", "a=gone", "--dataset", "d=theirs", "--start")
		f.Until("the job waiting", func() bool {
			v, err := f.Client.Job(f.Ctx, j.ID, 0)
			return err == nil && v.Waits != nil && v.Waits.Code == "dataset"
		})
		f.OK(nil, "object", "rm", "gone")
		if said := f.Fails(nil, 1, "job", "wait", j.ID); !strings.Contains(said, `no object "gone"`) {
			t.Errorf("it says %q", said)
		}
	})
}

// putPieces stores a file of n small chunks, on one device each, and gives it back.
func (f *fleet) putPieces(name string, n int) (whole []byte) {
	f.T.Helper()
	o := api.Object{Name: name}
	for i := range n {
		piece := fmt.Appendf(nil, "piece %d of %s\n", i, name)
		id := chunk.Sum(piece).String()
		if _, err := f.Client.PutChunk(f.Ctx, id, piece, 1); err != nil {
			f.T.Fatal(err)
		}
		whole = append(whole, piece...)
		o.Chunks = append(o.Chunks, api.Chunk{ID: id, Size: int64(len(piece))})
	}
	sum := sha256.Sum256(whole)
	o.Size, o.SHA256 = int64(len(whole)), hex.EncodeToString(sum[:])
	if _, err := f.Client.PutObject(f.Ctx, o); err != nil {
		f.T.Fatal(err)
	}
	return whole
}

// statement verifies what a device has said of a result, by the libraries of those who
// have made the formats.
func (f *fleet) statement(r api.JobResult) wire.Statement {
	f.T.Helper()
	var st wire.Statement
	var env dsse.Envelope
	if err := json.Unmarshal(r.Result.Statement, &env); err != nil {
		f.T.Fatal(err)
	}
	verifier, err := dsse.NewEnvelopeVerifier(deviceKey(f.Device(r.Device).PublicKey))
	if err != nil {
		f.T.Fatal(err)
	}
	if _, err := verifier.Verify(f.Ctx, &env); err != nil {
		f.T.Fatalf("the statement's envelope: %v", err)
	}
	payload, err := env.DecodeB64Payload()
	if err != nil {
		f.T.Fatal(err)
	}
	var theirs intoto.Statement
	if err := protojson.Unmarshal(payload, &theirs); err != nil {
		f.T.Fatalf("this is no in-toto statement: %v\n%s", err, payload)
	}
	if err := theirs.Validate(); err != nil {
		f.T.Errorf("the statement is not valid: %v\n%s", err, payload)
	}
	if err := json.Unmarshal(payload, &st); err != nil {
		f.T.Fatal(err)
	}
	sum := sha256.Sum256(r.Output)
	if env.PayloadType != "application/vnd.in-toto+json" || theirs.GetSubject()[0].GetDigest()["sha256"] != hex.EncodeToString(sum[:]) || st.Predicate.Order != r.Order {
		f.T.Errorf("it is about something else: %s", payload)
	}
	for i, in := range st.Predicate.Inputs {
		d := &intoto.ResourceDescriptor{Name: in.Name, Digest: in.Digest}
		if err := d.Validate(); err != nil {
			f.T.Errorf("input %d: %v", i, err)
		}
	}
	// And not whatever is signed passes.
	env.Payload = base64.StdEncoding.EncodeToString(append(payload, ' '))
	if _, err := verifier.Verify(f.Ctx, &env); err == nil {
		f.T.Error("an altered statement verifies")
	}
	return st
}

// deviceKey verifies signatures for the library.
type deviceKey ed25519.PublicKey

func (k deviceKey) KeyID() (string, error)   { return string(wire.IDOf(ed25519.PublicKey(k))), nil }
func (k deviceKey) Public() crypto.PublicKey { return ed25519.PublicKey(k) }

func (k deviceKey) Verify(_ context.Context, data, sig []byte) error {
	if !ed25519.Verify(ed25519.PublicKey(k), data, sig) {
		return fmt.Errorf("the signature is not of this key")
	}
	return nil
}
