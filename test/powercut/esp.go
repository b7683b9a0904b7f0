package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// esp reads the EFI system partition as a boot loader does: it takes the first
// table as it is, and repairs nothing. It is a reader of its own, so that a
// mistake in the one that mends (packaging/init/fat) is not made twice.
type esp struct {
	raw     []byte
	cluster int64
	tableAt int64
	dataAt  int64
	end     uint32
}

// espFile is a file of the ESP.
type espFile struct {
	path  string // with slashes, as written
	first uint32
	size  int64
}

var errFAT = errors.New("the EFI system partition cannot be read")

func openESP(raw []byte) (*esp, error) {
	le := binary.LittleEndian
	if len(raw) < 512 || le.Uint16(raw[510:]) != 0xaa55 || le.Uint16(raw[11:]) != blocks.Sector || le.Uint16(raw[22:]) != 0 || raw[13] == 0 || raw[16] == 0 {
		return nil, fmt.Errorf("%w: its first sector is damaged", errFAT)
	}
	perFAT, reserved := int64(le.Uint32(raw[36:])), int64(le.Uint16(raw[14:]))
	e := &esp{raw: raw, cluster: int64(raw[13]) * blocks.Sector, tableAt: reserved * blocks.Sector, dataAt: (reserved + int64(raw[16])*perFAT) * blocks.Sector}
	sectors := int64(le.Uint32(raw[32:]))
	if sectors*blocks.Sector > int64(len(raw)) || e.dataAt >= sectors*blocks.Sector {
		return nil, fmt.Errorf("%w: its measures are wrong", errFAT)
	}
	e.end = 2 + uint32((sectors*blocks.Sector-e.dataAt)/e.cluster)
	return e, nil
}

// copy gives w the bytes of a chain, n of them; n below 0 means all.
func (e *esp) copy(w io.Writer, first uint32, n int64) error {
	done := int64(0)
	for c, steps := first, uint32(0); done < n || n < 0 && c < 0x0ffffff8; steps++ {
		if c < 2 || c >= e.end || steps > e.end {
			return fmt.Errorf("%w: its chain of clusters breaks off after %d bytes", errFAT, done)
		}
		at, some := e.dataAt+int64(c-2)*e.cluster, e.cluster
		if n >= 0 {
			some = min(some, n-done)
		}
		if _, err := w.Write(e.raw[at : at+some]); err != nil {
			return err
		}
		done += some
		c = binary.LittleEndian.Uint32(e.raw[e.tableAt+4*int64(c):]) & 0x0fffffff
	}
	return nil
}

// list is the files below a directory. A directory that is damaged behind what
// can be read is as long as that.
func (e *esp) list() (files []espFile, err error) {
	root := binary.LittleEndian.Uint32(e.raw[44:])
	return files, e.walk(root, "", 0, &files)
}

func (e *esp) walk(first uint32, dir string, depth int, files *[]espFile) error {
	var content bytes.Buffer
	if err := e.copy(&content, first, -1); err != nil {
		return fmt.Errorf("folder /%s: %w", dir, err)
	}
	if depth > 8 {
		return fmt.Errorf("%w: folder /%s is in itself", errFAT, dir)
	}
	var long []uint16
	var sum byte
	for raw := content.Bytes(); len(raw) >= 32 && raw[0] != 0; raw = raw[32:] {
		d := raw[:32]
		switch attr := d[11]; {
		case d[0] == 0xe5:
			long = nil
			continue
		case attr&0x3f == 0x0f:
			part := lettersOf(d)
			if d[0]&0x40 != 0 {
				long, sum = nil, d[13]
			}
			long = append(part, long...)
			continue
		case attr&0x08 != 0:
			long = nil
			continue
		default:
			name := shortName(d)
			if len(long) > 0 && sum == checksumOf(d) {
				name = string(utf16.Decode(long))
			}
			long = nil
			if name == "." || name == ".." {
				continue
			}
			f := espFile{path: path.Join(dir, name), size: int64(binary.LittleEndian.Uint32(d[28:])),
				first: uint32(binary.LittleEndian.Uint16(d[20:]))<<16 | uint32(binary.LittleEndian.Uint16(d[26:]))}
			if attr&0x10 == 0 {
				*files = append(*files, f)
			} else if err := e.walk(f.first, f.path, depth+1, files); err != nil {
				return err
			}
		}
	}
	return nil
}

// lettersOf is a part of a long name.
func lettersOf(d []byte) (letters []uint16) {
	for _, r := range [][2]int{{1, 11}, {14, 26}, {28, 32}} {
		for i := r[0]; i < r[1]; i += 2 {
			c := binary.LittleEndian.Uint16(d[i:])
			if c == 0 || c == 0xffff {
				return letters
			}
			letters = append(letters, c)
		}
	}
	return letters
}

func checksumOf(d []byte) (sum byte) {
	for _, b := range d[:11] {
		sum = sum<<7 | sum>>1 + b
	}
	return sum
}

func shortName(d []byte) string {
	base, ext := strings.TrimRight(string(d[:8]), " "), strings.TrimRight(string(d[8:11]), " ")
	if d[12]&0x08 != 0 {
		base = strings.ToLower(base)
	}
	if d[12]&0x10 != 0 {
		ext = strings.ToLower(ext)
	}
	if ext != "" {
		base += "." + ext
	}
	return base
}

// image is a firmware that systemd-boot may start.
type image struct {
	espFile
	version string
	left    int // tries; -1: not counted
}

var imageForm = regexp.MustCompile(`^(?i)EFI/Linux/deimos_([^_+]+?)(?:\+(\d+)(?:-\d+)?)?\.efi$`)

// choice is the images in the order in which systemd-boot would start them: those
// that are used up last, the newest version first (Boot Loader Specification,
// "Sorting"). Versions here are dotted numbers. It passes over an empty file, as
// over anything in which it finds no .osrel.
func choice(files []espFile) (images []image) {
	for _, f := range files {
		m := imageForm.FindStringSubmatch(f.path)
		if m == nil || f.size == 0 {
			continue
		}
		v := image{espFile: f, version: strings.ToLower(m[1]), left: -1}
		if m[2] != "" {
			v.left, _ = strconv.Atoi(m[2]) // digits
		}
		images = append(images, v)
	}
	slices.SortStableFunc(images, func(a, b image) int {
		switch usedUp := a.left == 0; {
		case usedUp == (b.left == 0):
			return compareVersions(b.version, a.version)
		case usedUp:
			return 1
		default:
			return -1
		}
	})
	return images
}

func compareVersions(a, b string) int {
	numbers := func(s string) (n []int) {
		for part := range strings.SplitSeq(s, ".") {
			x, _ := strconv.Atoi(part)
			n = append(n, x)
		}
		return n
	}
	return slices.Compare(numbers(a), numbers(b))
}

// check sees that the machine boots, and which firmware: that is one of those
// that were made, whole, and not older than one that was confirmed.
func (e *esp) check(h header, confirmed string) (boots string, err error) {
	files, err := e.list()
	if err != nil {
		return "", err
	}
	loader := slices.IndexFunc(files, func(f espFile) bool { return strings.EqualFold(f.path, "EFI/BOOT/BOOTAA64.EFI") })
	if loader < 0 {
		return "", errors.New("there is no boot loader on the EFI system partition")
	}
	if sum, err := e.digest(files[loader]); err != nil || sum != h.Loader {
		return "", fmt.Errorf("the boot loader is damaged: %w", cmp.Or(err, errors.New("its bytes are others")))
	}
	images := choice(files)
	if len(images) == 0 {
		return "", errors.New("there is no firmware to boot")
	}
	for _, first := range images {
		if first.version != images[0].version || first.left == 0 != (images[0].left == 0) {
			break // the boot loader would not come to it
		}
		sum, err := e.digest(first.espFile)
		if err != nil {
			return "", fmt.Errorf("the boot loader would start %s, which cannot be read: %w", first.path, err)
		}
		if sum != h.Firmware[first.version] {
			return "", fmt.Errorf("the boot loader would start %s (%d bytes), which is not firmware %s as it was made", first.path, first.size, first.version)
		}
	}
	if boots = images[0].version; confirmed != "" && compareVersions(boots, confirmed) < 0 {
		return "", fmt.Errorf("firmware %s was confirmed, but the machine goes back to %s", confirmed, boots)
	}
	return boots, nil
}

func (e *esp) digest(f espFile) (string, error) {
	h := sha256.New()
	if err := e.copy(h, f.first, f.size); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// read is a small file; nil if it is not there.
func (e *esp) read(name string) ([]byte, error) {
	files, err := e.list()
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		if strings.EqualFold(f.path, name) {
			var content bytes.Buffer
			err := e.copy(&content, f.first, f.size)
			return content.Bytes(), err
		}
	}
	return nil, nil
}

// section is a part of the disk in memory, as what repairs file systems wants it.
type section []byte

func (s section) ReadAt(b []byte, at int64) (int, error) { return bytes.NewReader(s).ReadAt(b, at) }

func (s section) WriteAt(b []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(b)) > int64(len(s)) {
		return 0, errors.New("a write beyond the partition")
	}
	return copy(s[at:], b), nil
}

func (section) Sync() error { return nil }
