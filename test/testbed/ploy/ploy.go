// Package ploy is what the worker of test/chaosagent does to the jobs of its device: a
// file beside the program says it, as a worker has no environment.
package ploy

// File is the ploy beside the program; Told has a byte for each lie.
const (
	File = "ploy.json"
	Told = "told"
)

// Ploy is that file. The zero value is an honest worker.
type Ploy struct {
	Name string `json:"name"` // of the device
	// Share of the jobs is lied about. Which is drawn from Seed and the job.
	Share float64 `json:"share,omitempty"`
	Seed  uint64  `json:"seed,omitempty"`
	// Those with the same League lie about the same jobs, in the same words.
	League string `json:"league,omitempty"`
	// Meet is a folder that those in league share. With it, they lie only about what two
	// of them have at the same time.
	Meet string `json:"meet,omitempty"`
	// Gate is a file beside the program. No job begins before it is there.
	Gate string `json:"gate,omitempty"`
}
