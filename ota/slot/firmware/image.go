package firmware

import (
	"bufio"
	"bytes"
	"debug/pe"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/deimos-edge/deimos/ota/slot"
)

// maxRelease is the largest .osrel that is read, in bytes.
const maxRelease = 64 << 10

// machines is the PE machine types in Go's words.
var machines = map[uint16]string{pe.IMAGE_FILE_MACHINE_ARM64: "arm64", pe.IMAGE_FILE_MACHINE_AMD64: "amd64", pe.IMAGE_FILE_MACHINE_ARMNT: "arm"}

// Ask reads what a unified kernel image of size bytes says of itself, and checks
// that all of it is there: a PE image (Microsoft's PE format) with the sections
// that the UAPI group's "Unified Kernel Image" asks for.
func Ask(image io.ReaderAt, size int64) (slot.About, error) {
	f, err := pe.NewFile(io.NewSectionReader(image, 0, size))
	if err != nil {
		return slot.About{}, fmt.Errorf("this is no unified kernel image: %w", err)
	}
	arch, ok := machines[f.Machine]
	if !ok {
		return slot.About{}, fmt.Errorf("this unified kernel image is for a machine of the unknown PE type %#x", f.Machine)
	}
	for _, s := range f.Sections {
		if s.Offset != 0 && int64(s.Offset)+int64(s.Size) > size {
			return slot.About{}, fmt.Errorf("the unified kernel image is cut off: its section %s ends behind its end", s.Name)
		}
	}
	for _, name := range []string{".osrel", ".linux", ".initrd"} {
		if s := f.Section(name); s == nil || s.Size == 0 {
			return slot.About{}, fmt.Errorf("the image has no section %s: it is no unified kernel image", name)
		}
	}
	version, err := imageVersion(f.Section(".osrel"))
	return slot.About{Version: version, OS: "linux", Arch: arch}, err
}

// imageVersion reads os-release(5).
func imageVersion(s *pe.Section) (string, error) {
	raw := make([]byte, min(s.Size, s.VirtualSize, maxRelease))
	if _, err := s.ReadAt(raw, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("the image's .osrel cannot be read: %w", err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(raw)); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "IMAGE_VERSION="); ok {
			image := strings.Trim(v, `"'`)
			version := releaseOf(image)
			if back, err := ImageVersion(version); err != nil || back != image {
				return "", fmt.Errorf("the image's version %.64q is none of a firmware; it must look like 1.2.3 or 1.2.3~rc.1", image)
			}
			return version, nil
		}
	}
	return "", errors.New("the image's .osrel has no IMAGE_VERSION")
}
