package wire

import "time"

// ChunkHoldings asks a device which chunks it holds.
type ChunkHoldings struct {
	// Drained is what the coordinator says that it has done, where the order ends a
	// drain. The device does nothing about it: order and report together are the
	// receipt of a drain.
	Drained *Drained `json:"drained,omitempty"`
	// After has those named whose ids come after this one, in the order of their bytes;
	// "": from the first on. An agent of before it was there names any.
	After string `json:"after,omitempty"`
}

// Drained says what was on a device and is elsewhere now.
type Drained struct {
	Began  time.Time `json:"began"`
	Ended  time.Time `json:"ended"`  // when the last chunk was dropped
	Chunks int       `json:"chunks"` // each of them is whole on another device, which has signed for it
	Bytes  int64     `json:"bytes"`
}

// Holdings is the body of a SUCCEEDED chunk.holdings. The attachment is the JSON
// of the ids, the first MaxHoldings of them at most, in order. What is known to be
// lost counts until it is dropped.
type Holdings struct {
	Count int   `json:"count"` // of all
	Bytes int64 `json:"bytes"`
}

// MaxHoldings is how many chunks a device names in one answer.
const MaxHoldings = 10_000
