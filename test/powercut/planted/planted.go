// Package planted puts bugs into our programs on purpose, to see that a test finds
// them. A bug is a change of the sources that "go build -overlay" makes, so no file
// of ours is touched.
package planted

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Bug is a change of one file.
type Bug struct {
	File    string    // of the repository
	Replace []Replace // one after the other
}

// Replace is a piece of text that stands once in a file, and what stands there then.
type Replace struct{ Was, Is string }

// Overlay writes the changed file and the list for "go build -overlay" into dir.
// It runs in the repository's root.
func (b Bug) Overlay(dir string) (list string, err error) {
	raw, err := os.ReadFile(b.File)
	if err != nil {
		return "", err
	}
	text := string(raw)
	for _, r := range b.Replace {
		if n := strings.Count(text, r.Was); n != 1 {
			return "", fmt.Errorf("%q stands %d times in %s, where the bug is to be planted", r.Was, n, b.File)
		}
		text = strings.Replace(text, r.Was, r.Is, 1)
	}
	full, err := filepath.Abs(b.File)
	if err != nil {
		return "", err
	}
	changed := filepath.Join(dir, "planted.go")
	raw, err = json.Marshal(map[string]map[string]string{"Replace": {full: changed}})
	if err != nil {
		return "", err
	}
	list = filepath.Join(dir, "overlay.json")
	return list, errors.Join(os.WriteFile(changed, []byte(text), 0o644), os.WriteFile(list, raw, 0o644))
}
