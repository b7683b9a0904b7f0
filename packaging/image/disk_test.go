package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/packaging/init/gpt"
)

// readFAT reads a file system as the specification says, sharing nothing with
// what wrote it. Directories are in the result with a slash behind them.
func readFAT(t *testing.T, raw []byte) map[string]string {
	t.Helper()
	le := binary.LittleEndian
	if le.Uint16(raw[11:]) != 512 || raw[510] != 0x55 || raw[511] != 0xAA || !bytes.Equal(raw[:512], raw[6*512:7*512]) {
		t.Fatal("no boot sector, or its copy differs")
	}
	perCluster, reserved, copies, perFAT := int(raw[13]), int(le.Uint16(raw[14:])), int(raw[16]), int(le.Uint32(raw[36:]))
	data := (reserved + copies*perFAT) * 512
	clusters := (int(le.Uint32(raw[32:])) - data/512) / perCluster
	if clusters < 65525 {
		t.Fatalf("%d clusters make no FAT32", clusters)
	}
	if perFAT*512/4 < clusters+2 {
		t.Fatalf("FATs of %d sectors are too small for %d clusters", perFAT, clusters)
	}
	fat1, fat2 := raw[reserved*512:(reserved+perFAT)*512], raw[(reserved+perFAT)*512:(reserved+2*perFAT)*512]
	if !bytes.Equal(fat1, fat2) {
		t.Fatal("the two FATs differ")
	}
	used := map[uint32]bool{}
	chain := func(c uint32) (content []byte) {
		for c < 0x0FFFFFF8 {
			if c < 2 || int(c) >= clusters+2 || used[c] {
				t.Fatalf("cluster %d is none, or of two files", c)
			}
			used[c] = true
			at := data + int(c-2)*perCluster*512
			content = append(content, raw[at:at+perCluster*512]...)
			c = le.Uint32(fat1[4*c:]) & 0x0FFFFFFF
		}
		return content
	}
	all := map[string]string{}
	var dir func(prefix string, c, parent uint32)
	dir = func(prefix string, c, parent uint32) {
		var long []uint16
		var sum byte
		shorts := map[string]bool{}
		content := chain(c)
		for e := content; len(e) >= 32 && e[0] != 0; e = e[32:] {
			if e[11] == 0x0F {
				units := []uint16{}
				for _, at := range []int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30} {
					units = append(units, le.Uint16(e[at:]))
				}
				long, sum = append(units, long...), e[13]
				continue
			}
			short := string(e[:11])
			if shorts[short] {
				t.Errorf("%s has %q twice", prefix, short)
			}
			shorts[short] = true
			name := strings.TrimSuffix(strings.TrimRight(short[:8], " ")+"."+strings.TrimRight(short[8:], " "), ".")
			if long != nil {
				var want byte
				for _, b := range []byte(short) {
					want = (want&1)<<7 + want>>1 + b
				}
				if want != sum {
					t.Errorf("%q: the long name is of another file", short)
				}
				if end := slices.Index(long, 0); end >= 0 {
					long = long[:end]
				}
				name = string(utf16.Decode(long))
				long = nil
			}
			first := uint32(le.Uint16(e[20:]))<<16 | uint32(le.Uint16(e[26:]))
			switch {
			case e[11] == 0x08: // the label
			case short == ".          ":
				if first != c {
					t.Errorf("%s. is cluster %d, not %d", prefix, first, c)
				}
			case short == "..         ":
				if first != parent {
					t.Errorf("%s.. is cluster %d, not %d", prefix, first, parent)
				}
			case e[11]&0x10 != 0:
				all[prefix+name+"/"] = ""
				self := c
				if prefix == "" {
					self = 0
				}
				dir(prefix+name+"/", first, self)
			default:
				size := int(le.Uint32(e[28:]))
				var content []byte
				if first != 0 {
					content = chain(first)
				}
				if len(content) < size || len(content)-size >= perCluster*512 {
					t.Fatalf("%s%s: %d bytes in clusters of %d", prefix, name, size, len(content))
				}
				all[prefix+name] = string(content[:size])
			}
		}
	}
	dir("", le.Uint32(raw[44:]), 0)
	if free := int(le.Uint32(raw[512+488:])); free != clusters-len(used) {
		t.Errorf("the information sector says %d free clusters, there are %d", free, clusters-len(used))
	}
	return all
}

const testSectors = 140 << 20 / sector // the smallest that is FAT32, nearly

func testFAT(t *testing.T, files []file) ([]byte, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "fat")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(testSectors * sector); err != nil {
		t.Fatal(err)
	}
	if err := writeFAT(f, testSectors, alignment, 1, "DEIMOS-ESP", files); err != nil {
		return nil, err
	}
	// dosfstools knows better than we do.
	if out, err := exec.Command(testenv.Tool(t, "fsck.fat", "dosfstools"), "-n", name).CombinedOutput(); err != nil {
		t.Errorf("fsck.fat: %v\n%s", err, out)
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return raw, nil
}

func TestFilesAreReadBack(t *testing.T) {
	seed := rand.Uint64()
	t.Log("seed", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	want := map[string]string{}
	var files []file
	dirs := []string{"", "EFI/BOOT", "EFI/Linux", "loader", "a.long.name of a directory/x"}
	for i := range 200 { // directories of several clusters
		dir := dirs[r.IntN(len(dirs))]
		name := path.Join(dir, fmt.Sprintf([]string{"F%d", "f%d.efi", "deimos_1.0.%d+3.efi", "deimos_%d-rc.1+2-1.efi", "thirteen.%04d", "X%d.TXT"}[r.IntN(6)], i))
		content := make([]byte, []int{0, 1, clusterSize - 1, clusterSize, clusterSize + 1, 100_000}[r.IntN(6)])
		for j := range content {
			content[j] = byte(r.Uint32())
		}
		files = append(files, file{name, content})
		want[name] = string(content)
		for d := path.Dir(name); d != "."; d = path.Dir(d) {
			want[d+"/"] = ""
		}
	}
	raw, err := testFAT(t, files)
	if err != nil {
		t.Fatal(err)
	}
	if got := readFAT(t, raw); !maps.Equal(got, want) {
		t.Errorf("read back %d names, wrote %d; or a content differs", len(got), len(want))
		for _, n := range slices.Sorted(maps.Keys(want)) {
			if v, ok := got[n]; !ok || v != want[n] {
				t.Fatalf("the first: %s (there: %t)", n, ok)
			}
		}
	}
}

func TestFilesThatDoNotFitAreRefused(t *testing.T) {
	for claim, files := range map[string][]file{
		"too much":            {{"x", make([]byte, testSectors*sector)}},
		"one name twice":      {{"a/X", nil}, {"A/x", nil}},
		"a file as directory": {{"a", nil}, {"a/b", nil}},
		"a name with a colon": {{"a:b", nil}},
		"a dot at the end":    {{"a.", nil}},
		"dot dot":             {{"../a", nil}},
		"no name":             {{"", nil}},
	} {
		if _, err := testFAT(t, files); err == nil {
			t.Errorf("%s was written", claim)
		}
	}
}

func TestFileSystemTooSmallForFAT32IsRefused(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "fat"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := writeFAT(f, 64<<20/sector, 0, 1, "X", nil); err == nil {
		t.Error("what others read as FAT16 was written")
	}
}

// TestPartitionTableIsWhole follows the UEFI specification, table 5-5 and 5-6.
func TestPartitionTableIsWhole(t *testing.T) {
	const sectors = 10_000
	disk := make(memory, sectors*sector)
	if err := writeGPT(disk, sectors, 2048, 4095); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	for here, other := range map[uint64]uint64{1: sectors - 1, sectors - 1: 1} {
		h := bytes.Clone(disk[here*512:][:512])
		sum := le.Uint32(h[16:])
		clear(h[16:20])
		if string(h[:8]) != "EFI PART" || le.Uint32(h[12:]) != 92 || crc32.ChecksumIEEE(h[:92]) != sum {
			t.Errorf("the header in sector %d is damaged", here)
		}
		if le.Uint64(h[24:]) != here || le.Uint64(h[32:]) != other {
			t.Errorf("the header in sector %d does not know where it stands", here)
		}
		if first, last := le.Uint64(h[40:]), le.Uint64(h[48:]); first != 34 || last != sectors-34 {
			t.Errorf("sectors %d to %d may be used, not 34 to %d", first, last, sectors-34)
		}
		table := disk[le.Uint64(h[72:])*512:][:128*128]
		if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
			t.Errorf("the table of the header in sector %d is damaged", here)
		}
		// C12A7328-F81F-11D2-BA4B-00A0C93EC93B as bytes.
		if !bytes.Equal(table[:16], []byte{0x28, 0x73, 0x2A, 0xC1, 0x1F, 0xF8, 0xD2, 0x11, 0xBA, 0x4B, 0x00, 0xA0, 0xC9, 0x3E, 0xC9, 0x3B}) {
			t.Errorf("the partition is no EFI system partition: % x", table[:16])
		}
		if le.Uint64(table[32:]) != 2048 || le.Uint64(table[40:]) != 4095 || !bytes.HasPrefix(table[56:], []byte("d\x00e\x00i\x00m\x00o\x00s\x00-\x00e\x00s\x00p\x00\x00\x00")) {
			t.Errorf("the partition is another: % x", table[32:128])
		}
	}
	if disk[450] != 0xEE || le.Uint32(disk[454:]) != 1 || le.Uint32(disk[458:]) != sectors-1 || disk[510] != 0x55 || disk[511] != 0xAA {
		t.Error("no protective MBR")
	}
}

// TestFirstBootReadsThePartitionTable asks the reader that the device has.
func TestFirstBootReadsThePartitionTable(t *testing.T) {
	disk := make(memory, 10_000*sector)
	if err := writeGPT(disk, 10_000, 2048, 4095); err != nil {
		t.Fatal(err)
	}
	table, err := gpt.Read(disk, int64(len(disk)))
	if err != nil {
		t.Fatal(err)
	}
	esp, ok := table.Find("deimos-esp")
	if !ok || esp.Number != 1 || esp.First != 2048 || esp.Last != 4095 || esp.Type != gpt.EFISystem {
		t.Errorf("the device sees %+v (%t)", esp, ok)
	}
}

// memory is a disk in memory.
type memory []byte

func (m memory) ReadAt(p []byte, at int64) (int, error)  { return bytes.NewReader(m).ReadAt(p, at) }
func (m memory) WriteAt(p []byte, at int64) (int, error) { return copy(m[at:], p), nil }
func (m memory) Sync() error                             { return nil }
