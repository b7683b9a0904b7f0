package sandbox

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// task is what the parent tells the worker, ahead of the input on descriptor 0.
type task struct {
	Args       []string `json:"args,omitempty"`
	Digest     string   `json:"digest,omitempty"` // SHA-256 the module must have, hex; empty: unchecked
	InputBytes int      `json:"input_bytes"`
	Memory     int64    `json:"memory"`              // bytes of linear memory
	CPU        float64  `json:"cpu"`                 // seconds
	CacheDir   string   `json:"cache_dir,omitempty"` // for this module's compiled code
}

// event is one line that the worker says on descriptor 4: first Engine, once
// the module is compiled, then End.
type event struct {
	Engine string  `json:"engine,omitempty"`
	End    *ending `json:"end,omitempty"`
}

// ending is how a job ended that did not have to be killed. An empty Cause is success.
type ending struct {
	Cause       Cause  `json:"cause,omitempty"`
	ExitCode    int    `json:"exit_code,omitempty"`
	Reason      string `json:"reason,omitempty"`
	MaxRSS      int64  `json:"max_rss"`                // bytes
	CacheBroken bool   `json:"cache_broken,omitempty"` // compiled code could not be loaded or stored
}

const maxTask = 1 << 20 // bytes of JSON; an order has 128 KiB

// encode gives t its length in front.
func (t task) encode() ([]byte, error) {
	body, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("encode the task: %w", err)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...), nil
}

// readTask reads what encode made and not a byte more.
func readTask(r io.Reader) (task, error) {
	var t task
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return t, fmt.Errorf("read the task's length: %w", err)
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxTask {
		return t, fmt.Errorf("the task has %d bytes, at most %d are allowed", n, maxTask)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return t, fmt.Errorf("read the task: %w", err)
	}
	if err := json.Unmarshal(body, &t); err != nil {
		return t, fmt.Errorf("decode the task: %w", err)
	}
	return t, nil
}
