package firmware

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const asideEnd = ".tmp"

// The counter's forms are the Boot Loader Specification's. A version has neither
// capital letters, which FAT does not tell from small ones, nor a "+", which
// begins the counter, nor a "_", which ends the name.
var (
	releaseForm = regexp.MustCompile(`^(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}(-[a-z]+(\.(0|[1-9][0-9]*))*)?$`)
	nameForm    = regexp.MustCompile(`^deimos_([0-9][0-9a-z.~^-]{0,63})(?:\+([0-9]{1,4})(?:-([0-9]{1,4}))?)?\.efi(\.tmp)?$`)
)

// ErrVersion is returned for a version that the boot loader would not sort as we do.
var ErrVersion = errors.New("cannot be the version of a firmware")

// ImageVersion is how the version of a release, a semantic one, is written in file
// names and in an image's IMAGE_VERSION: 1.0.0-rc.1 is 1.0.0~rc.1 there. For to
// the boot loader "1.0.0-rc.1" is newer than "1.0.0", and what follows a "~" older.
//
// Of versions before a release only those are taken that both orders sort alike: a
// word of small letters, then numbers. (Semantic versions have rc10 before rc9, and
// 1 before alpha.)
func ImageVersion(version string) (string, error) {
	if !releaseForm.MatchString(version) || len(version) > 64 {
		return "", fmt.Errorf("%.64q %w: it must look like 1.2.3 or 1.2.3-rc.1, a word of small letters and numbers after the dash", version, ErrVersion)
	}
	return strings.Replace(version, "-", "~", 1), nil
}

// releaseOf turns [ImageVersion] around.
func releaseOf(image string) string { return strings.Replace(image, "~", "-", 1) }

// file is an image on the ESP, or what is to become one.
type file struct {
	name    string // as it is on the disk; empty for one that is to be made
	size    int64  // bytes
	version string
	counted bool
	left    int // tries
	tried   int
	tmp     bool // nothing that boots
}

// parseName tells what a file name says; ok is false for one that is not ours.
func parseName(name string) (f file, ok bool) {
	m := nameForm.FindStringSubmatch(strings.ToLower(name))
	if m == nil {
		return file{}, false
	}
	f = file{name: name, version: m[1], counted: m[2] != "", tmp: m[4] != ""}
	f.left, _ = strconv.Atoi(m[2]) // digits, or none
	f.tried, _ = strconv.Atoi(m[3])
	return f, true
}

// fileOf is a file of that many bytes. An empty one is what a cut has left of
// an install or a rename.
func fileOf(name string, size int64) (f file, ok bool) {
	f, ok = parseName(name)
	f.size, f.tmp = size, f.tmp || size == 0
	return f, ok
}

// String is the name that f should have.
func (f file) String() string {
	counter := ""
	if f.counted {
		counter = fmt.Sprintf("+%d", f.left)
		if f.tried > 0 {
			counter += fmt.Sprintf("-%d", f.tried)
		}
	}
	return "deimos_" + f.version + counter + ".efi"
}

// images are the files of ours.
type images []file

// has tells whether there is an image like that; one that is aside is none.
func (all images) has(like func(file) bool) bool {
	return slices.ContainsFunc(all, func(f file) bool { return !f.tmp && like(f) })
}

// find prefers the confirmed one.
func (all images) find(version string) (found file, ok bool) {
	for _, f := range all {
		if !f.tmp && f.version == version && (!ok || !f.counted) {
			found, ok = f, true
		}
	}
	return found, ok
}

// nextTry is the counted image of a version that the boot loader would take: the
// one with the most tries left.
func (all images) nextTry(version string) (found file) {
	for _, f := range all {
		if !f.tmp && f.version == version && f.counted && (found.name == "" || f.left > found.left) {
			found = f
		}
	}
	return found
}

// compareVersions is the order of the UAPI group's Version Format Specification,
// which systemd-boot sorts by, for the characters that we allow.
func compareVersions(a, b string) int {
	digit := func(c byte) bool { return c >= '0' && c <= '9' }
	letter := func(c byte) bool { return c >= 'a' && c <= 'z' }
	at := func(s string) byte { return (s + "\x00")[0] }
	cut := func(s string, in func(byte) bool) (head, tail string) {
		n := 0
		for n < len(s) && in(s[n]) {
			n++
		}
		return s[:n], s[n:]
	}
	for {
		// In this order: "~" is below the end, which is below "-", "^", ".".
		for _, c := range []byte{'~', 0, '-', '^', '.'} {
			inA, inB := at(a) == c, at(b) == c
			switch {
			case inA && inB && c == 0:
				return 0
			case inA && inB:
				a, b = a[1:], b[1:]
			case inA:
				return -1
			case inB:
				return 1
			default:
				continue
			}
			break
		}
		var x, y string
		if digit(at(a)) || digit(at(b)) {
			x, a = cut(a, digit)
			y, b = cut(b, digit)
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if c := cmp.Compare(len(x), len(y)); c != 0 {
				return c
			}
		} else {
			x, a = cut(a, letter)
			y, b = cut(b, letter)
		}
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
	}
}
