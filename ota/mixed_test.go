package ota

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/ota/bundle"
	"github.com/deimos-edge/deimos/wire"
)

// TestAPartialOrMixedBundleIsRefused: a mirror has not all of a release, or hands out
// pieces of another one, signed as well, in their place. Nothing of it stays: from an
// honest mirror the same order is carried out.
func TestAPartialOrMixedBundleIsRefused(t *testing.T) {
	eachWay(t, func(t *testing.T, _ way, f *fleet) {
		f.good("1.1.0")
		f.good("1.2.0")
		read := func(pattern string) []byte {
			t.Helper()
			files, err := filepath.Glob(filepath.Join(f.repo, pattern))
			must(t, err)
			raw, err := os.ReadFile(files[0])
			must(t, err)
			return raw
		}
		part := map[string][]byte{}
		for _, v := range []string{"1.1.0", "1.2.0"} {
			m, err := bundle.Parse(read("targets/bundles/*." + v + ".json"))
			must(t, err)
			part[v] = read(bundle.PartPath(m.Parts[0].Forms[0].SHA256))
		}
		ours, other := part["1.1.0"], part["1.2.0"]
		half := len(ours) / 2
		for name, c := range map[string]struct {
			path  string // of what is not handed out as it is
			sends []byte // nil: it is not there
			state wire.State
			code  string
		}{
			"no part":                           {"/parts/", nil, wire.Failed, wire.CodeNotFound},
			"half of the part":                  {"/parts/", ours[:half], wire.Failed, wire.CodeTransfer},
			"the part of another release":       {"/parts/", other, wire.Rejected, wire.CodeVerification},
			"half of one and half of the other": {"/parts/", append(append([]byte{}, ours[:half]...), other[min(half, len(other)):]...), wire.Rejected, wire.CodeVerification},
			"no manifest":                       {".1.1.0.json", nil, wire.Failed, wire.CodeNotFound},
			"half of the manifest":              {".1.1.0.json", read("targets/bundles/*.1.1.0.json")[:100], wire.Rejected, wire.CodeVerification},
			"the manifest of another release":   {".1.1.0.json", read("targets/bundles/*.1.2.0.json"), wire.Rejected, wire.CodeVerification},
			"targets that name one of them":     {"/metadata/2.targets.json", read("metadata/1.targets.json"), wire.Rejected, wire.CodeVerification},
			"a snapshot from before the other":  {"/metadata/2.snapshot.json", read("metadata/1.snapshot.json"), wire.Rejected, wire.CodeVerification},
		} {
			t.Run(name, func(t *testing.T) {
				s, _ := f.device()
				f.mu.Lock()
				f.hook = func(w http.ResponseWriter, r *http.Request) bool {
					if !strings.Contains(r.URL.Path, c.path) {
						return false
					}
					if c.sends == nil {
						w.WriteHeader(http.StatusNotFound)
						return true
					}
					_, _ = w.Write(c.sends)
					return true
				}
				f.mu.Unlock()
				refused(t, s, order("o", "1.1.0"), c.state, c.code, "")
				f.mu.Lock()
				f.hook = nil
				f.mu.Unlock()
				f.installs(s, order("o", "1.1.0"))
			})
		}
	})
}
