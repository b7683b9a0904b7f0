package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/deimos-edge/deimos/test/powercut/blocks"
	"github.com/deimos-edge/deimos/wire"
)

// recording is one of package blocks, with
//
//	recording.json  [header]
//	coordinator/    the coordinator's folder as it was at the end, for boots
type recording struct {
	header
	*blocks.Recording
}

// header is what is known of a recording beside its events.
type header struct {
	Size     int64             `json:"size"`     // of the disk, bytes
	Firmware map[string]string `json:"firmware"` // version → SHA-256 of its image
	Loader   string            `json:"loader"`   // SHA-256 of BOOTAA64.EFI
	HTTPS    string            `json:"https"`    // the coordinator's addresses, which devices remember
	MQTT     string            `json:"mqtt"`
	Device   wire.DeviceID     `json:"device"`
	Objects  []string          `json:"objects"` // that are stored at the end
}

func (h header) save(dir string) error {
	raw, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "recording.json"), append(raw, '\n'), 0o644)
}

// load reads a recording.
func load(dir string) (*recording, error) {
	r := &recording{}
	raw, err := os.ReadFile(filepath.Join(dir, "recording.json"))
	if err == nil {
		err = json.Unmarshal(raw, &r.header)
	}
	if err != nil {
		return nil, fmt.Errorf("this is no recording: %w", err)
	}
	r.Recording, err = blocks.Load(dir)
	return r, err
}

// promised is all that had been promised before an event.
func (r *recording) promised(before int) (p promises, err error) {
	p = newPromises()
	for _, e := range r.Events[:before] {
		err = errors.Join(err, p.pass(e))
	}
	return p, err
}

// The ESP begins at espStart, and the data partition not before espEnd, bytes:
// changes below that are those of the ESP and of the partition table.
const (
	espStart = 1 << 20
	espEnd   = 257 << 20
)
