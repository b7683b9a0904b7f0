package coordinator

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/ota/repo"
	"github.com/deimos-edge/deimos/wire"
)

// faces compares what devices were shown of the log of releases. Each report on an
// update has the newest checkpoint that the device has checked. Two that are of one log
// and of one size, signed by its key, and name different trees, prove that who signs
// the log shows devices different ones: a log with two faces.
//
// Of each size the checkpoint is kept with the first devices that were shown it, and of
// a second face the same: that is what a person needs to prove it to others. A
// checkpoint that no key of a published root has signed proves nothing, whoever says
// that it was shown it, and is not kept. Checkpoints of different sizes are compared
// with the log itself: "deimos release log verify".
//
// It hears of a report before the outbox does, and so before that is acknowledged: what
// could not be kept comes again.
type faces struct {
	rows     *table[api.LogSeen] // by log and size
	releases func() *releases
	note     func(context.Context, api.LogEntry)
	now      func() time.Time
	log      *slog.Logger
	unsigned complaints
}

const (
	maxFaces = 8 // of one size
	maxShown = 5 // devices that are named, of each face
)

func newFaces(now func() time.Time, log *slog.Logger) *faces {
	return &faces{now: now, log: log}
}

// heard takes the checkpoint of a final report on an update.
func (s *faces) heard(ctx context.Context, r wire.Report) error {
	if !r.State.Terminal() || len(r.Body) == 0 {
		return nil
	}
	var b wire.UpdateResult
	if json.Unmarshal(r.Body, &b) != nil || b.Checkpoint == "" {
		return nil // of another kind, or of a log that the device was not asked to look at
	}
	c, unproved := repo.SplitCheckpoint(b.Checkpoint)
	key := faceKey(c)
	if row, ok := s.rows.get(key); ok && unproved == nil && enough(row, c.Hash) {
		return nil
	}
	if unproved == nil {
		keys, err := s.keys(ctx)
		if err != nil {
			return err
		}
		unproved = repo.CheckCheckpoint(b.Checkpoint, keys)
	}
	if unproved != nil {
		if n := s.unsigned.add(r.Device, s.now()); n > 0 {
			s.log.Warn("a device reports a checkpoint that no log of a published root has signed", "device", r.Device, "order", label(r.Order), "times", n, "error", unproved)
		}
		return nil
	}
	second := false
	row, err := s.rows.change(ctx, key, func(v *api.LogSeen, exists bool) error {
		second = false
		v.Log, v.Size = c.Log, c.Size
		i := slices.IndexFunc(v.Faces, func(f api.LogFace) bool { return f.Hash == c.Hash })
		switch {
		case i < 0 && len(v.Faces) >= maxFaces:
			return errUnchanged
		case i < 0:
			v.Faces = append(slices.Clone(v.Faces), api.LogFace{Hash: c.Hash, Checkpoint: b.Checkpoint})
			i, second = len(v.Faces)-1, exists
		case enough(*v, c.Hash) || slices.ContainsFunc(v.Faces[i].Shown, func(d api.LogShown) bool { return d.Device == r.Device }):
			return errUnchanged
		default:
			v.Faces = slices.Clone(v.Faces)
		}
		f := &v.Faces[i]
		f.Shown = append(slices.Clone(f.Shown), api.LogShown{Device: r.Device, Order: r.Order, At: s.now().UTC()})
		return nil
	})
	if err != nil || !second {
		return err
	}
	text := forkText(row)
	s.log.Error(text, "device", r.Device, "order", r.Order)
	s.note(ctx, api.LogEntry{Actor: "coordinator", Action: "release.log-fork", Targets: []string{string(r.Device), r.Order}, Reason: text})
	return nil
}

// enough tells whether a face has all the devices that are named of it.
func enough(v api.LogSeen, hash string) bool {
	return slices.ContainsFunc(v.Faces, func(f api.LogFace) bool { return f.Hash == hash && len(f.Shown) >= maxShown })
}

func faceKey(c repo.Checkpoint) string {
	sum := sha256.Sum256([]byte(c.Log)) // a name may have what a key cannot
	return fmt.Sprintf("%x.%d", sum[:8], c.Size)
}

func forkText(v api.LogSeen) string {
	return fmt.Sprintf("the log of releases has %d faces: of %d records, devices were shown different ones, all signed with its key; who has that key shows somebody what the others do not see", len(v.Faces), v.Size)
}

// keys are those of the logs that the published roots name.
func (s *faces) keys(ctx context.Context) (keys []string, err error) {
	r := s.releases()
	files, err := r.files.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the update repository cannot be read: %w", err)
	}
	for _, f := range files {
		if n, _ := rootVersion(f.Name); n == 0 {
			continue
		}
		raw, err := r.get(ctx, f.Name)
		if err != nil {
			return nil, err
		}
		key, err := repo.LogKey(raw)
		if err != nil {
			return nil, fmt.Errorf("%s in the update repository: %w", f.Name, err)
		}
		if key != "" && !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// seen is what devices were shown, of each size, the largest first.
func (s *faces) seen() []api.LogSeen {
	rows := s.rows.all(func(a, b api.LogSeen) int { return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.Log, b.Log)) })
	return rows[:min(len(rows), api.MaxLogSeen)]
}

// forks are the sizes of which there is more than one face.
func (s *faces) forks() (out []api.LogSeen) {
	s.rows.each(func(_ string, v api.LogSeen) bool {
		if len(v.Faces) > 1 {
			out = append(out, v)
		}
		return true
	})
	slices.SortFunc(out, func(a, b api.LogSeen) int { return cmp.Or(cmp.Compare(a.Size, b.Size), cmp.Compare(a.Log, b.Log)) })
	return out[:min(len(out), api.MaxLogSeen)]
}

func (s *faces) attention() (see []api.Attention) {
	for _, v := range s.forks() {
		see = append(see, api.Attention{Code: api.AttentionLogFork, About: "coordinator", Text: forkText(v) + "; \"deimos release status\" shows the evidence"})
	}
	return see
}

func (c *Coordinator) faceRoutes() []route {
	return []route{
		{method: "GET", path: v1 + "/releases/log", needs: toRead, summary: "What devices were shown of the log of releases", out: []api.LogSeen{}, handle: func(w http.ResponseWriter, _ *http.Request) error {
			writeJSON(w, http.StatusOK, append([]api.LogSeen{}, c.faces.seen()...))
			return nil
		}},
	}
}
