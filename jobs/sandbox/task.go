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
	Env        []string `json:"env,omitempty"`    // NAME, value, NAME, value, ...
	Digest     string   `json:"digest,omitempty"` // SHA-256 the module must have, hex; empty: unchecked
	InputBytes int      `json:"input_bytes"`      // of standard input
	Memory     int64    `json:"memory"`           // bytes of linear memory
	Compile    int64    `json:"compile"`          // bytes that compiling may take
	CPU        float64  `json:"cpu"`              // seconds
	Live       bool     `json:"live,omitempty"`
	CacheDir   string   `json:"cache_dir,omitempty"` // for this module's compiled code

	// Of each there is a descriptor, from firstFileFD on in this order.
	Restore *grant   `json:"restore,omitempty"` // the checkpoint to go on from
	Inputs  []grant  `json:"inputs,omitempty"`  // by path, in folders too
	Outputs []string `json:"outputs,omitempty"` // names

	Folders []string `json:"folders,omitempty"` // inputs that are folders; of them there is no descriptor
}

// grant is a file that the worker may read.
type grant struct {
	Name string `json:"name,omitempty"`
	Size int64  `json:"size"` // bytes
}

// Descriptors that a worker is born with, beside the standard three.
const (
	moduleFD = 3 + iota
	eventFD
	controlFD    // shared memory, see host.control
	checkpointFD // checkpoints, each with its length in front, as the task has
	answerFD     // a byte for each checkpoint: what the module gets
	firstFileFD
)

// lastFD is the highest of the descriptors that the worker is born with.
func (t task) lastFD() int {
	n := firstFileFD + len(t.Inputs) + len(t.Outputs)
	if t.Restore != nil {
		n++
	}
	return n - 1
}

// event is one line that the worker says on descriptor 4: first Walls, once
// they stand, then Engine, once the module is compiled, then what the module has to say, then End.
type event struct {
	Walls    []string `json:"walls,omitempty"`
	Engine   string   `json:"engine,omitempty"`
	Saves    bool     `json:"saves,omitempty"`    // with Engine: the module can make checkpoints
	Looks    bool     `json:"looks,omitempty"`    // with Engine: the module can see whether it goes on from one, or is asked for one
	Progress int32    `json:"progress,omitempty"` // permille
	Log      *logLine `json:"log,omitempty"`
	End      *ending  `json:"end,omitempty"`
}

// logLine is a message of the module.
type logLine struct {
	Level int    `json:"level"` // 0 to 3: debug, information, warning, error
	Text  string `json:"text"`
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
	if len(body) > maxTask {
		return nil, fmt.Errorf("what the worker would have to be told has %d bytes, at most %d are possible; give the job fewer files", len(body), maxTask)
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
