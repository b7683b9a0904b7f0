package scrub

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/sync/chunk"
)

// record is what is kept of a volume's scrub, as JSON.
type record struct {
	Volume   string    `json:"volume"`            // id: a copy of the directory is another's
	Began    time.Time `json:"began"`             // the round
	Cursor   string    `json:"cursor,omitempty"`  // the greatest id of what was read; "" before the first stretch
	Bytes    int64     `json:"bytes"`             // verified in this round
	Found    int       `json:"found,omitempty"`   // lost ones that this round has come upon
	Read     time.Time `json:"read,omitzero"`     // when the newest burst began
	Verified time.Time `json:"verified,omitzero"` // when the newest whole round ended
	Lost     []string  `json:"lost,omitempty"`    // ids, earliest found first, at most maxKept
}

func (r record) cursor() chunk.ID {
	id, err := chunk.ParseID(r.Cursor)
	if err != nil {
		return chunk.ID{} // the beginning
	}
	return id
}

// share is the part of all possible ids that was walked.
func (r record) share() float64 {
	id := r.cursor()
	return float64(binary.BigEndian.Uint64(id[:8])) / (1 << 64)
}

// left is about how many of used bytes are still to be read.
func (r record) left(used int64) int64 { return int64(float64(used) * (1 - r.share())) }

// recordPath is where the chunks are, so that it goes where they go.
func recordPath(dir string) string { return filepath.Join(dir, "chunks", "scrub.json") }

const maxRecord = 1 << 20 // bytes; maxKept ids are a quarter of it

// readRecord returns the zero record if there is none, and with an error.
func readRecord(dir string) (r record, err error) {
	raw, err := durable.ReadFile(recordPath(dir), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(raw, &r)
	}
	if err != nil {
		return record{}, err
	}
	return r, nil
}

// save keeps how far the round is, and what is lost.
func (v *volume) save() {
	lost := v.lostIDs()
	v.mu.Lock()
	v.rec.Lost = lost
	rec := v.rec
	v.mu.Unlock()
	v.saved = v.s.opt.Now()
	raw, err := json.Marshal(rec)
	if err == nil {
		err = durable.WriteFile(recordPath(v.Dir()), raw, 0o600)
	}
	if err != nil && !v.unkept {
		v.s.opt.Log.Warn("how far the scrub of a volume is cannot be saved; after a restart it begins where it was saved last", "volume", v.Dir(), "error", err)
	}
	v.unkept = err != nil
}

// keepLosses saves if other chunks are lost than were noted: whoever found them.
func (v *volume) keepLosses() {
	v.mu.Lock()
	noted := v.rec.Lost
	v.mu.Unlock()
	if v.unkept || slices.Equal(noted, v.lostIDs()) {
		return
	}
	v.save()
}

func (v *volume) lostIDs() []string {
	lost := v.Lost()
	lost = lost[:min(len(lost), maxKept)]
	var ids []string
	for _, l := range lost {
		ids = append(ids, l.ID.String())
	}
	return ids
}
