package gpt

import (
	"bytes"
	"errors"
	"hash/crc32"
	"io"
	"testing"
)

const size = 8 << 20

// memory is a disk that notes its writes.
type memory struct {
	raw    []byte
	writes []write
}

type write struct {
	at  int64
	raw []byte
}

func (m *memory) ReadAt(b []byte, at int64) (int, error) {
	return bytes.NewReader(m.raw).ReadAt(b, at)
}

func (m *memory) WriteAt(b []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(b)) > int64(len(m.raw)) {
		return 0, io.ErrShortWrite
	}
	m.writes = append(m.writes, write{at, bytes.Clone(b)})
	return copy(m.raw[at:], b), nil
}

func (m *memory) Sync() error { return nil }

// shipped is a disk as the image leaves it, and larger by what it was written to.
func shipped(t testing.TB, larger int64) *memory {
	t.Helper()
	m := &memory{raw: make([]byte, size)}
	table := New(GUID{1})
	if _, err := table.Append(size/2, EFISystem, GUID{2}, "deimos-esp", 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := table.Write(m, size); err != nil {
		t.Fatal(err)
	}
	copy(m.raw, ProtectiveMBR(size))
	m.raw = append(m.raw, make([]byte, larger)...)
	m.writes = nil
	return m
}

func TestAppendedPartitionIsReadBackAndTheOthersKeepTheirs(t *testing.T) {
	m := shipped(t, 0)
	table, err := Read(m, size)
	if err != nil {
		t.Fatal(err)
	}
	esp := table.Partitions[0]
	made, err := table.Append(size, LinuxData, GUID{3}, "deimos-data", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := table.Write(m, size); err != nil {
		t.Fatal(err)
	}
	again, err := Read(m, size)
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := again.Find("deimos-data"); !ok || got != made || made.First%align != 0 || made.First <= esp.Last {
		t.Errorf("made %+v, read %+v", made, got)
	}
	if got, _ := again.Find("deimos-esp"); got != esp {
		t.Errorf("the ESP was %+v and is %+v", esp, got)
	}
	if _, err := again.Append(size, LinuxData, GUID{4}, "more", 1<<20); !errors.Is(err, ErrFull) {
		t.Errorf("a full disk says %v", err)
	}
}

func TestPartitionIsAddedOnlyWhereThereIsRoom(t *testing.T) {
	table := New(GUID{1})
	for _, c := range []struct {
		first, last int64
		fits        bool
	}{{33, 99, false}, {200, 199, false}, {100, 199, true}, {199, 300, false}, {34, 100, false}, {34, 99, true}} {
		p, err := table.Add(Partition{Type: LinuxData, First: c.first, Last: c.last})
		if (err == nil) != c.fits || c.fits && p.Number != len(table.Partitions) {
			t.Errorf("from %d to %d: %+v, %v", c.first, c.last, p, err)
		}
	}
}

func TestLastPartitionGrowsWithItsDiskAndNoOther(t *testing.T) {
	m := shipped(t, size)
	table, err := Read(m, 2*size)
	if err != nil {
		t.Fatal(err)
	}
	p, ok := table.Grow(2*size, 1)
	if !ok || p.Last < 2*size/Block-2*align {
		t.Fatalf("grown %v to %+v", ok, p)
	}
	if _, again := table.Grow(2*size, 1); again {
		t.Error("it grows twice")
	}
	table, _ = Read(m, 2*size)
	if _, err := table.Append(2*size, LinuxData, GUID{3}, "data", 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, ok := table.Grow(2*size, 1); ok {
		t.Error("a partition grew over its neighbour")
	}
}

// TestPowerCutLeavesTheOldTableOrTheNew cuts after each block of each write, with
// the blocks of the torn write kept from its front or from its back.
func TestPowerCutLeavesTheOldTableOrTheNew(t *testing.T) {
	for _, larger := range []int64{0, size} {
		now := shipped(t, larger)
		before := bytes.Clone(now.raw)
		all := int64(len(now.raw))
		table, err := Read(now, all)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := table.Append(all, LinuxData, GUID{3}, "deimos-data", 1<<20); err != nil {
			t.Fatal(err)
		}
		if err := table.Write(now, all); err != nil {
			t.Fatal(err)
		}
		cuts := 0
		for i, torn := range now.writes {
			for kept := 0; kept <= len(torn.raw); kept += Block {
				for _, back := range []bool{false, true} {
					m := &memory{raw: bytes.Clone(before)}
					for _, w := range now.writes[:i] {
						copy(m.raw[w.at:], w.raw)
					}
					if back {
						at := len(torn.raw) - kept
						copy(m.raw[torn.at+int64(at):], torn.raw[at:])
					} else {
						copy(m.raw[torn.at:], torn.raw[:kept])
					}
					cuts++
					found, err := Read(m, all)
					if err != nil || len(found.Partitions) < 1 || found.Partitions[0].Name != "deimos-esp" {
						t.Fatalf("write %d, %d bytes kept, from the back %v: %v", i, kept, back, err)
					}
					if _, err := Repair(m, all); err != nil {
						t.Fatal(err)
					}
					one, err1 := readAt(m, all, 1)
					two, err2 := readAt(m, all, all/Block-1)
					if err1 != nil || err2 != nil || !bytes.Equal(one.entries, two.entries) {
						t.Fatalf("write %d, %d bytes kept, from the back %v: not repaired: %v, %v", i, kept, back, err1, err2)
					}
				}
			}
		}
		if cuts < 100 {
			t.Errorf("only %d cuts", cuts)
		}
	}
}

func TestDamagedTableIsNotBelieved(t *testing.T) {
	m := shipped(t, 0)
	for _, at := range []int{Block + 40, 2*Block + 32} { // header, entry
		d := &memory{raw: bytes.Clone(m.raw)}
		d.raw[at] ^= 1
		d.raw[len(d.raw)-Block+40] ^= 1 // the backup
		if _, err := Read(d, size); err == nil || errors.Is(err, ErrNone) {
			t.Errorf("a flipped bit at %d: %v", at, err)
		}
	}
	if _, err := Read(&memory{raw: make([]byte, size)}, size); !errors.Is(err, ErrNone) {
		t.Errorf("an empty disk: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	m := shipped(f, 0)
	f.Add(m.raw[Block : 4*Block])
	f.Fuzz(func(t *testing.T, head []byte) {
		d := &memory{raw: make([]byte, 1<<20)}
		copy(d.raw[Block:], head)
		if len(head) >= 4*Block { // let it past the checksums
			fix(d.raw)
		}
		table, err := Read(d, int64(len(d.raw)))
		if err != nil {
			return
		}
		for i, p := range table.Partitions {
			if p.First < 2 || p.Last < p.First || p.Last >= int64(len(d.raw))/Block {
				t.Fatalf("partition outside of the disk: %+v", p)
			}
			for _, q := range table.Partitions[:i] {
				if p.First <= q.Last && q.First <= p.Last {
					t.Fatalf("%+v and %+v overlap", p, q)
				}
			}
		}
		_, _ = table.Append(int64(len(d.raw)), LinuxData, GUID{9}, "x", 1)
		if table.Write(d, int64(len(d.raw))) == nil {
			if _, err := Read(d, int64(len(d.raw))); err != nil {
				t.Fatalf("what was written cannot be read: %v", err)
			}
		}
	})
}

func fix(raw []byte) {
	h := raw[Block : 2*Block]
	n := int64(le32(h, 80)) * entrySize
	first := le64(h, 72)
	if first < 2 || first > 100 || n > 128*entrySize {
		return
	}
	put32 := func(at int, v uint32) {
		h[at], h[at+1], h[at+2], h[at+3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
	}
	put32(12, headerSize)
	put32(88, checksumAll(raw[first*Block:first*Block+n]))
	put32(16, checksum(h[:headerSize], 16))
}

func checksumAll(b []byte) uint32 { return crc32.ChecksumIEEE(b) }
