package testbed

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/packaging/tour"
	"github.com/deimos-edge/deimos/wire"
)

// CheckPlacements verifies every receipt with its device's own key.
func (f *Fleet) CheckPlacements(o PutResult, replicas int) {
	f.T.Helper()
	for _, p := range o.Placements {
		var seen []wire.DeviceID
		for _, h := range p.Holders {
			d, err := f.Client.Device(f.Ctx, string(h.Device))
			if err == nil {
				err = tour.CheckReceipt(p.Chunk, h, d)
			}
			if err != nil {
				f.T.Error(err)
			}
			if wire.IDOf(d.PublicKey) != h.Device {
				f.T.Errorf("device %s is listed under another's key", h.Device)
			}
			seen = append(seen, h.Device)
		}
		slices.Sort(seen)
		if len(slices.Compact(seen)) != replicas {
			f.T.Errorf("chunk %s is on %d devices, want %d", p.ID, len(seen), replicas)
		}
	}
}

// CheckJobs has devices run both guests over the first chunk of an object, whose
// content is chunk.
func (f *Fleet) CheckJobs(o PutResult, chunk []byte) {
	f.T.Helper()
	f.CheckWordcount(o, chunk)
	sum, err := exec.Command("sha256sum", f.Write("chunk", chunk)).Output()
	if err != nil {
		f.T.Fatal(err)
	}
	if got, want := strings.TrimSpace(string(f.RunJob(o.Name, "sha256sum"))), strings.Fields(string(sum))[0]; got != want {
		f.T.Errorf("a device hashed to %s, sha256sum to %s", got, want)
	}
}

// CheckWordcount compares the guest with this machine's wc. flags are more of the
// job's.
func (f *Fleet) CheckWordcount(o PutResult, chunk []byte, flags ...string) {
	f.T.Helper()
	count := exec.Command("wc", "-lwc", f.Write("chunk", chunk))
	count.Env = append(os.Environ(), "LC_ALL=C")
	wc, err := count.Output()
	if err != nil {
		f.T.Fatal(err)
	}
	var words struct{ Lines, Words, Bytes json.Number }
	if err := json.Unmarshal(f.RunJob(o.Name, "wordcount", flags...), &words); err != nil {
		f.T.Fatal(err)
	}
	if got, want := []string{words.Lines.String(), words.Words.String(), words.Bytes.String()}, strings.Fields(string(wc))[:3]; !slices.Equal(got, want) {
		f.T.Errorf("a device counted %v, wc %v", got, want)
	}
}

// RunJob runs a guest over the first chunk and checks who signed for the output.
func (f *Fleet) RunJob(object, name string, flags ...string) []byte {
	f.T.Helper()
	var j api.JobResult
	f.OK(&j, append([]string{"job", "run", Guest(name), "--input", object, "--chunk", "0"}, flags...)...)
	d, err := f.Client.Device(f.Ctx, string(j.Device))
	if err != nil {
		f.T.Fatal(err)
	}
	r, err := wire.OpenAs[wire.Report](j.Report, ed25519.PublicKey(d.PublicKey), wire.TypeReport)
	if err != nil {
		f.T.Fatal(err)
	}
	sum := sha256.Sum256(j.Output)
	if r.Attachment == nil || r.Attachment.SHA256 != hex.EncodeToString(sum[:]) || r.Order != j.Order {
		f.T.Errorf("device %s signed for another output", j.Device)
	}
	return j.Output
}

// CheckStorage challenges a device to prove what it holds.
func (f *Fleet) CheckStorage(name string, id wire.DeviceID) {
	f.T.Helper()
	var a api.Audit
	f.OK(&a, "audit", "storage", string(id))
	if a.Outcome != api.AuditRight || a.Leaves == 0 || a.Right != a.Leaves {
		f.T.Errorf("%s proved %d of %d leaves: %s %s", name, a.Right, a.Leaves, a.Outcome, a.Reason)
	}
}

// CheckCompute challenges a device to run a guest, and opens the commitment.
func (f *Fleet) CheckCompute(name string, id wire.DeviceID, guest string) {
	f.T.Helper()
	var a api.Audit
	f.OK(&a, "audit", "compute", string(id), "--module", Guest(guest))
	salt, err1 := hex.DecodeString(a.Salt)
	expected, err2 := hex.DecodeString(a.Expected)
	sum := sha256.Sum256(slices.Concat(salt, expected))
	if err1 != nil || err2 != nil || hex.EncodeToString(sum[:]) != a.Commitment || a.Got != a.Expected || len(expected) != sha256.Size {
		f.T.Errorf("the challenge of %s does not open its commitment: %+v", name, a)
	}
}
