package fat

import (
	"encoding/binary"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
)

// Of a directory entry.
const (
	attrAt = 11
	sumAt  = 13 // of an entry of a long name
	highAt = 20
	lowAt  = 26
	sizeAt = 28

	deleted   = 0xe5
	attrLong  = 0x0f
	attrLabel = 0x08
	attrDir   = 0x10
	attrNone  = 0xc0 // no attribute has these bits

	dot    = ".          "
	dotDot = "..         "
)

// directory puts long names together.
type directory struct {
	long  []uint16
	slots []int64
	sum   byte
	due   byte // number of the next part; 0 if none is due
}

// entry takes the next one. It is nil if no file has ended with it. As Linux does,
// it takes an empty entry for a deleted one: there may be others behind it.
func (d *directory) entry(e []byte, at int64) *file {
	switch {
	case e[0] == 0, e[0] == deleted:
		*d = directory{}
		return nil
	case e[attrAt] == attrLong:
		d.part(e, at)
		return nil
	}
	long := *d
	*d = directory{}
	if e[attrAt]&attrLabel != 0 || e[0] == '.' {
		return nil
	}
	f := &file{
		name: shortName(e), slots: []int64{at}, dir: e[attrAt]&attrDir != 0,
		first: uint32(binary.LittleEndian.Uint16(e[highAt:]))<<16 | uint32(binary.LittleEndian.Uint16(e[lowAt:])),
		size:  binary.LittleEndian.Uint32(e[sizeAt:]),
	}
	if len(long.slots) > 0 && long.due == 0 && long.sum == checksum(e) {
		f.name, _, _ = strings.Cut(string(utf16.Decode(long.long)), "\x00")
		f.slots = append(long.slots, at)
	}
	return f
}

// part takes an entry of a long name; the last part comes first.
func (d *directory) part(e []byte, at int64) {
	n := e[0] & 0x1f
	if e[0]&0x40 != 0 {
		*d = directory{sum: e[sumAt], due: n}
	}
	if n == 0 || d.due != n || e[sumAt] != d.sum {
		*d = directory{}
		return
	}
	var units []uint16
	for _, span := range [][2]int{{1, 11}, {14, 26}, {28, 32}} {
		for i := span[0]; i < span[1]; i += 2 {
			units = append(units, binary.LittleEndian.Uint16(e[i:]))
		}
	}
	d.long, d.slots, d.due = append(units, d.long...), append(d.slots, at), n-1
}

// checksum ties a long name to its short one.
func checksum(e []byte) (sum byte) {
	for _, b := range e[:11] {
		sum = sum>>1 | sum<<7
		sum += b
	}
	return sum
}

func shortName(e []byte) string {
	name, end := strings.TrimRight(string(e[:8]), " "), strings.TrimRight(string(e[8:11]), " ")
	if end != "" {
		name += "." + end
	}
	return name
}

// startsWith tells whether a cluster begins as that of a directory does, with its
// own name and its parent's.
func startsWith(raw []byte, self uint32) bool {
	e := raw[:slot]
	own := uint32(binary.LittleEndian.Uint16(e[highAt:]))<<16 | uint32(binary.LittleEndian.Uint16(e[lowAt:]))
	return string(e[:11]) == dot && own == self && string(raw[slot:slot+11]) == dotDot
}

// onlyEntries tells whether a cluster holds nothing but what may stand in a
// directory. What a file left there does not pass, but for one of zeros.
func onlyEntries(raw []byte) bool {
	for e := range slices.Chunk(raw, slot) {
		switch {
		case e[0] == 0, e[0] == deleted, string(e[:11]) == dot, string(e[:11]) == dotDot:
		case e[attrAt] == attrLong:
			if e[12] != 0 || e[lowAt] != 0 || e[lowAt+1] != 0 || e[0]&0x1f == 0 {
				return false
			}
		case e[attrAt]&attrNone != 0, !isShort(e[:11]):
			return false
		}
	}
	return true
}

// isShort tells whether a name can be a short one: no lower-case letter of ASCII
// and none of the signs that the format forbids.
func isShort(name []byte) bool {
	for i, b := range name {
		escaped := i == 0 && b == 0x05 // stands for 0xe5, which would be a deleted one
		if b < ' ' && !escaped || b == 0x7f || b >= 'a' && b <= 'z' || strings.IndexByte(`"*+,./:;<=>?[\]|`, b) >= 0 {
			return false
		}
	}
	return name[0] != ' '
}

// counted is a name with systemd-boot's counter, as package ota/slot/firmware writes them.
var counted = regexp.MustCompile(`(?i)^(.+)\+[0-9]{1,4}(?:-([0-9]{1,4}))?\.efi$`)

// stage is how far a file is on the way that its renames take it.
func (f *file) stage() int {
	if strings.HasPrefix(f.name, ".") || strings.HasSuffix(strings.ToLower(f.name), ".tmp") {
		return 0
	}
	m := counted.FindStringSubmatch(f.name)
	if m == nil {
		return math.MaxInt
	}
	tries, _ := strconv.Atoi(m[2]) // digits, or none
	return 1 + tries
}

// stem is what stays of a name in its renames.
func (f *file) stem() string {
	if m := counted.FindStringSubmatch(f.name); m != nil {
		return strings.ToLower(m[1])
	}
	return strings.TrimSuffix(strings.ToLower(f.name), ".efi")
}
