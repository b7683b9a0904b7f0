package coordinator

import (
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	sumnote "golang.org/x/mod/sumdb/note"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// releaseLog is a log of releases: what roots name it by, and what signs its checkpoints.
type releaseLog struct {
	name, public string
	signer       sumnote.Signer
}

func newReleaseLog(t testing.TB, name string) releaseLog {
	t.Helper()
	private, public, err := sumnote.GenerateKey(crand.Reader, name)
	must(t, err)
	signer, err := sumnote.NewSigner(private)
	must(t, err)
	return releaseLog{name, public, signer}
}

// checkpoint says that the log has so many records, in a tree that is told by its name.
func (l releaseLog) checkpoint(t testing.TB, size int64, tree string) string {
	t.Helper()
	sum := sha256.Sum256([]byte(tree))
	signed, err := sumnote.Sign(&sumnote.Note{Text: fmt.Sprintf("%s\n%d\n%s\n", l.name, size, base64.StdEncoding.EncodeToString(sum[:]))}, l.signer)
	must(t, err)
	return string(signed)
}

// shown is a world whose devices report what they were shown of logs.
type shown struct {
	*world
	t     *testing.T
	noted []string
}

// newShown is one whose roots name these logs, one after the other.
func newShown(t *testing.T, logs ...releaseLog) *shown {
	t.Helper()
	s := &shown{world: ownWorld(t), t: t}
	keys := []ed25519.PrivateKey{newKey(t), newKey(t)}
	for i, l := range logs {
		root := metadata.Root(time.Now())
		_, err := root.FromBytes(rootOf(t, int64(i+1), keys, 0))
		must(t, err)
		root.Signed.UnrecognizedFields = map[string]any{"transparency_log": map[string]any{"key": l.public}}
		must(t, s.op.PutRepoFile(testContext(t), rootPath(int64(i+1)), signedBy(t, root, keys...)))
	}
	s.freeze()
	s.faces.note = func(_ context.Context, e api.LogEntry) { s.noted = append(s.noted, e.Action+" "+e.Reason) }
	return s
}

func (s *shown) reports(ctx context.Context, device string, state wire.State, checkpoint string) error {
	s.t.Helper()
	body, err := json.Marshal(wire.UpdateResult{Checkpoint: checkpoint})
	must(s.t, err)
	return s.faces.heard(ctx, wire.Report{Device: wire.DeviceID(device), Order: "order-of-" + device, State: state, Body: body})
}

// shows tells of a final report that is taken.
func (s *shown) shows(device, checkpoint string) {
	s.t.Helper()
	must(s.t, s.reports(testContext(s.t), device, wire.Succeeded, checkpoint))
}

// is compares what is kept: of each log and size, the devices of each face.
func (s *shown) is(want ...string) {
	s.t.Helper()
	var got []string
	for _, v := range s.faces.seen() {
		row := fmt.Sprintf("%s %d: ", v.Log, v.Size)
		for _, f := range v.Faces {
			if !strings.Contains(f.Checkpoint, f.Hash) {
				s.t.Errorf("the evidence is for another tree: %+v", f)
			}
			row += "("
			for _, d := range f.Shown {
				if d.Order != "order-of-"+string(d.Device) || d.At.IsZero() {
					s.t.Errorf("%+v", d)
				}
				row += string(d.Device)
			}
			row += ")"
		}
		got = append(got, row)
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		s.t.Errorf("kept is\n%s\nand should be\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// alarms is how many faces a person is told of, at most, and how often it was noted.
func (s *shown) alarms(sizes, notes int) {
	s.t.Helper()
	status, err := s.op.Status(testContext(s.t))
	must(s.t, err)
	told := 0
	for _, a := range status.Attention {
		if a.Code == api.AttentionLogFork {
			told++
		}
	}
	if told != sizes || len(s.faces.forks()) != sizes || len(s.noted) != notes {
		s.t.Errorf("%d sizes with two faces are told, %d known, and noted is %q; want %d and %d", told, len(s.faces.forks()), s.noted, sizes, notes)
	}
}

// TestASecondFaceIsFoundAndKept with the first devices that were shown it.
func TestASecondFaceIsFoundAndKept(t *testing.T) {
	t.Parallel()
	l := newReleaseLog(t, "log")
	s := newShown(t, l)
	s.shows("a", l.checkpoint(t, 3, "ours"))
	s.shows("b", l.checkpoint(t, 3, "ours"))
	s.shows("b", l.checkpoint(t, 3, "ours")) // its report came twice
	s.shows("c", l.checkpoint(t, 4, "ours, grown"))
	s.is("log 4: (c)", "log 3: (ab)")
	s.alarms(0, 0)

	must(t, s.reports(testContext(t), "d", wire.Running, l.checkpoint(t, 3, "a twin"))) // not its last word
	s.is("log 4: (c)", "log 3: (ab)")
	s.shows("d", l.checkpoint(t, 3, "a twin"))
	s.is("log 4: (c)", "log 3: (ab)(d)")
	s.alarms(1, 1)
	s.shows("e", l.checkpoint(t, 3, "a twin"))
	s.shows("f", l.checkpoint(t, 3, "ours"))
	s.is("log 4: (c)", "log 3: (abf)(de)")
	s.alarms(1, 1) // it is no news
	if !strings.Contains(s.noted[0], "release.log-fork") || !strings.Contains(s.noted[0], "2 faces") || !strings.Contains(s.noted[0], "of 3 records") {
		t.Errorf("noted is %q", s.noted)
	}
	s.shows("g", l.checkpoint(t, 3, "a third"))
	s.shows("h", l.checkpoint(t, 4, "a twin, grown"))
	s.alarms(2, 3)
}

// TestFacesAreBounded: whoever has the log's key can make as many as they like, and a
// fleet has as many devices as it has.
func TestFacesAreBounded(t *testing.T) {
	t.Parallel()
	l := newReleaseLog(t, "log")
	s := newShown(t, l)
	for i := range maxShown + 3 {
		s.shows(string(rune('a'+i)), l.checkpoint(t, 1, "ours"))
	}
	s.is("log 1: (abcde)")
	for i := range maxFaces + 3 {
		s.shows("x", l.checkpoint(t, 1, fmt.Sprint(i)))
	}
	s.is("log 1: (abcde)" + strings.Repeat("(x)", maxFaces-1))
	s.alarms(1, maxFaces-1)
}

// TestEachLogHasItsFace: one of another name is another, and one whose key was changed
// is the same.
func TestEachLogHasItsFace(t *testing.T) {
	t.Parallel()
	before, log, other := newReleaseLog(t, "log"), newReleaseLog(t, "log"), newReleaseLog(t, "other")
	s := newShown(t, before, log, other)
	s.shows("a", other.checkpoint(t, 1, "x"))
	s.shows("b", log.checkpoint(t, 1, "y"))
	s.is("log 1: (b)", "other 1: (a)")
	s.alarms(0, 0)
	s.shows("c", before.checkpoint(t, 1, "y"))
	s.alarms(0, 0)
	s.shows("d", before.checkpoint(t, 1, "z"))
	s.is("log 1: (bc)(d)", "other 1: (a)")
	s.alarms(1, 1)
}

// TestWhatNoLogHasSignedProvesNothing: any device may say that it was shown anything.
func TestWhatNoLogHasSignedProvesNothing(t *testing.T) {
	t.Parallel()
	l, thief := newReleaseLog(t, "log"), newReleaseLog(t, "log")
	ours := l.checkpoint(t, 3, "ours")
	for name, s := range map[string]*shown{"a log": newShown(t, l), "no root": newShown(t)} {
		for what, c := range map[string]string{
			"signed by another":      thief.checkpoint(t, 3, "a twin"),
			"changed":                strings.Replace(ours, "\n3\n", "\n4\n", 1),
			"without its signature":  ours[:strings.Index(ours, "\n\n")+2],
			"no note":                "garbage",
			"of another log's name":  strings.Replace(ours, "log\n", "loG\n", 1),
			"endless":                ours + strings.Repeat("x", 1<<20),
			"of fewer than no lines": "\n\n",
		} {
			if err := s.reports(testContext(t), "liar", wire.Succeeded, c); err != nil {
				t.Errorf("%s, %s: %v", name, what, err) // its report is acknowledged: it would come again for ever
			}
		}
		s.is()
		s.alarms(0, 0)
		if n := strings.Count(s.said.take(), "that no log of a published root has signed"); n != 1 {
			t.Errorf("%s: it is said %d times of one device in a minute", name, n)
		}
	}
}

// TestWhatCouldNotBeKeptComesAgain: the report is not acknowledged then.
func TestWhatCouldNotBeKeptComesAgain(t *testing.T) {
	t.Parallel()
	l := newReleaseLog(t, "log")
	s := newShown(t, l)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.reports(gone, "a", wire.Succeeded, l.checkpoint(t, 1, "ours")); err == nil {
		t.Error("it counts as kept")
	}
	s.is()
	s.shows("a", l.checkpoint(t, 1, "ours"))
	s.is("log 1: (a)")
}

// TestACheckpointThatDevicesWouldRefuseIsNotTaken: with one from an old copy of the
// repository, or of another log, the updates of all would end.
func TestACheckpointThatDevicesWouldRefuseIsNotTaken(t *testing.T) {
	t.Parallel()
	l, thief := newReleaseLog(t, "log"), newReleaseLog(t, "log")
	s := newShown(t, l)
	put := func(checkpoint string) error {
		return s.op.PutRepoFile(testContext(t), "log/checkpoint", []byte(checkpoint))
	}
	must(t, put(l.checkpoint(t, 3, "three")))
	wantRefusal(t, put(l.checkpoint(t, 2, "two")), http.StatusConflict, "older")
	for _, c := range []string{thief.checkpoint(t, 4, "four"), "garbage", "", strings.Replace(l.checkpoint(t, 4, "four"), "\n4\n", "\n5\n", 1)} {
		wantRefusal(t, put(c), http.StatusBadRequest, "not_signed")
	}
	for _, c := range []string{l.checkpoint(t, 3, "three"), l.checkpoint(t, 4, "four")} {
		must(t, put(c))
		if raw, err := s.releases.get(testContext(t), "log/checkpoint"); err != nil || string(raw) != c {
			t.Errorf("the checkpoint is %q (%v), want %q", raw, err, c)
		}
	}
}
