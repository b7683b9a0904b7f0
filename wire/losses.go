package wire

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"slices"
	"time"
)

// MaxLosses is how many losses a device tells of in one answer. It has the
// coordinator's order to forget those before it tells of more.
const MaxLosses = 10_000

// LossReport is the body of a SUCCEEDED chunk.losses. The attachment is the JSON
// of []ChunkLoss, sorted by id.
type LossReport struct {
	Digest string `json:"digest"` // of all losses, see LossDigest
	Count  int    `json:"count"`  // of all; the attachment has the first MaxLosses
}

// ChunkLoss is a chunk that a device should hold and found that it cannot read,
// or that it does not verify. What lies on a volume that is away is no loss.
type ChunkLoss struct {
	ID     string    `json:"id"`
	Size   int64     `json:"size"` // bytes, as the device's index has it; 0 if it does not know
	Volume string    `json:"volume"`
	Reason string    `json:"reason"` // a sentence for a person
	Found  time.Time `json:"found"`  // by the device's clock
}

// LossDigest stands for a set of lost chunks: lower-case hex SHA-256 over their
// sorted ids, a newline after each; "" of none.
func LossDigest(ids []string) string {
	if len(ids) == 0 {
		return ""
	}
	ids = slices.Clone(ids)
	slices.Sort(ids)
	h := sha256.New()
	for _, id := range slices.Compact(ids) {
		_, _ = io.WriteString(h, id+"\n") // a hash takes everything
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Scrub is how far a volume has got with reading and verifying all that it
// holds, over and over.
type Scrub struct {
	Volume   string    `json:"volume"`            // id
	Dir      string    `json:"dir"`               // where it is on the device
	Began    time.Time `json:"began"`             // this round
	Share    float64   `json:"share"`             // 0 to 1, of this round
	Bytes    int64     `json:"bytes"`             // verified in this round
	Lost     int       `json:"lost,omitempty"`    // chunks found lost in this round
	Verified time.Time `json:"verified,omitzero"` // when the newest round ended in which everything was read; zero: none has
	Ends     time.Time `json:"ends,omitzero"`     // when this round is expected to end
	Late     bool      `json:"late,omitempty"`    // this round should have ended
	Problem  string    `json:"problem,omitempty"` // why it does not go on; a sentence for a person
}

// MaxScrubs is how many volumes a heartbeat tells of.
const MaxScrubs = 16
