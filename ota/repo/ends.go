package repo

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// EndsFirst is which metadata of a repository ends first, and when: from then on devices
// take nothing of it. root is the newest root; read gives a file, nil if there is none.
// What is not there is passed over, and signatures are not looked at. at is zero if there
// is nothing.
func EndsFirst(root []byte, read func(file string) ([]byte, error)) (file string, at time.Time, err error) {
	raw, name := root, "the root"
	version := int64(0)
	for _, next := range []string{metadata.TIMESTAMP, metadata.SNAPSHOT, metadata.TARGETS, ""} {
		var m struct {
			Signed struct {
				Expires time.Time `json:"expires"`
				Meta    map[string]struct {
					Version int64 `json:"version"`
				} `json:"meta"`
			} `json:"signed"`
		}
		if raw != nil {
			if err := json.Unmarshal(raw, &m); err != nil {
				return "", time.Time{}, fmt.Errorf("%s cannot be read: %w", name, err)
			}
			if end := m.Signed.Expires; at.IsZero() || end.Before(at) {
				file, at = name, end
			}
		}
		if next == "" {
			break
		}
		if next != metadata.TIMESTAMP {
			if version = m.Signed.Meta[next+".json"].Version; version == 0 {
				break
			}
		}
		name = metadataPath(next, version)
		if raw, err = read(name); err != nil {
			return "", time.Time{}, err
		}
	}
	return file, at, nil
}
