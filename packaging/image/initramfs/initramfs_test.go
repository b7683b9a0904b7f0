package initramfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// unpack reads a newc archive as the kernel does, and returns "MODE NAME CONTENT" an entry.
func unpack(t *testing.T, raw []byte) (all []string) {
	t.Helper()
	for at := 0; ; {
		if len(raw)-at < 110 || string(raw[at:at+6]) != "070701" {
			t.Fatalf("no header at %d of %d", at, len(raw))
		}
		field := func(i int) int {
			n, err := strconv.ParseUint(string(raw[at+6+8*i:at+14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return int(n)
		}
		if field(0)|field(2)|field(3)|field(5) != 0 {
			t.Errorf("inode, owner, group or time are not 0: %s", raw[at:at+110])
		}
		nameEnd := at + 110 + field(11)
		name := string(raw[at+110 : nameEnd-1])
		begin := (nameEnd + 3) &^ 3
		end := begin + field(6)
		if name == "TRAILER!!!" {
			if rest := len(raw) - end; rest > 3 {
				t.Errorf("%d bytes behind the end", rest)
			}
			return all
		}
		all = append(all, fmt.Sprintf("%o %s %s", field(1), name, raw[begin:end]))
		at = (end + 3) &^ 3
	}
}

func TestArchiveHoldsWhatWasPutIn(t *testing.T) {
	var a Archive
	a.Dir("dev", "etc")
	a.File("init", []byte("program"), true)
	a.File("etc/deep/er/x", []byte("12345"), false)
	a.Symlink("bin/sh", "busybox")
	a.Dir("etc/deep")
	raw, err := a.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"40755 bin ", "120777 bin/sh busybox", "40755 dev ", "40755 etc ", "40755 etc/deep ", "40755 etc/deep/er ",
		"100644 etc/deep/er/x 12345", "100755 init program",
	}
	if got := unpack(t, raw); !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

func TestOrderOfAddingDoesNotShow(t *testing.T) {
	var a, b Archive
	a.File("x/1", []byte("1"), false)
	a.File("x/2", []byte("2"), true)
	b.File("x/2", []byte("2"), true)
	b.Dir("x")
	b.File("x/1", []byte("1"), false)
	one, err1 := a.Bytes()
	two, err2 := b.Bytes()
	if err1 != nil || err2 != nil || !bytes.Equal(one, two) {
		t.Errorf("two archives of the same differ (%v, %v)", err1, err2)
	}
}

func TestTwoOfOneNameAreRefused(t *testing.T) {
	var a Archive
	a.File("x", nil, false)
	a.File("x", nil, false)
	if _, err := a.Bytes(); err == nil {
		t.Error("two files of one name went in")
	}
	var b Archive
	b.File("x", nil, false)
	b.File("x/y", nil, false)
	if _, err := b.Bytes(); err == nil {
		t.Error("a file below a file went in")
	}
}

// module writes a kernel module that says only what it depends on.
func module(t *testing.T, kernel, name, depends string) string {
	t.Helper()
	info := "license=GPL\x00depends=" + depends + "\x00name=" + name + "\x00"
	const names = "\x00.modinfo\x00.shstrtab\x00"
	le := binary.LittleEndian
	raw := make([]byte, 64)
	copy(raw, "\x7fELF\x02\x01\x01")
	le.PutUint16(raw[16:], 1)   // relocatable
	le.PutUint16(raw[18:], 183) // AArch64
	le.PutUint32(raw[20:], 1)
	infoAt := len(raw)
	raw = append(raw, info...)
	namesAt := len(raw)
	raw = append(raw, names...)
	table := len(raw)
	raw = append(raw, make([]byte, 3*64)...)
	for i, s := range [][4]int{{1, 1, infoAt, len(info)}, {10, 3, namesAt, len(names)}} {
		h := raw[table+(i+1)*64:]
		le.PutUint32(h[0:], uint32(s[0]))
		le.PutUint32(h[4:], uint32(s[1]))
		le.PutUint64(h[24:], uint64(s[2]))
		le.PutUint64(h[32:], uint64(s[3]))
	}
	le.PutUint64(raw[40:], uint64(table))
	le.PutUint16(raw[52:], 64)
	le.PutUint16(raw[58:], 64)
	le.PutUint16(raw[60:], 3)
	le.PutUint16(raw[62:], 2)
	file := filepath.Join(kernel, "lib/modules/6.1.0/kernel", name+".ko")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	kernel := t.TempDir()
	module(t, kernel, "ext4", "mbcache,jbd2,built-in")
	module(t, kernel, "jbd2", "")
	module(t, kernel, "mbcache", "lib_crc")
	module(t, kernel, "lib-crc", "")
	module(t, kernel, "unwanted", "")
	if err := os.WriteFile(filepath.Join(kernel, "lib/modules/6.1.0/modules.builtin"), []byte("kernel/x/built_in.ko\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	files, err := Modules(kernel, []string{"jbd2", "built_in", "ext4", "mbcache"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, filepath.Base(f))
	}
	if want := []string{"jbd2.ko", "lib-crc.ko", "mbcache.ko", "ext4.ko"}; !slices.Equal(got, want) {
		t.Errorf("order %q, want %q", got, want)
	}
}

func TestMissingModuleIsNamed(t *testing.T) {
	kernel := t.TempDir()
	module(t, kernel, "ext4", "jbd2")
	if _, err := Modules(kernel, []string{"ext4"}); err == nil || !strings.Contains(err.Error(), "jbd2") {
		t.Errorf("a module that is missing: %v", err)
	}
	broken := filepath.Join(kernel, "lib/modules/6.1.0/kernel/ext4.ko")
	if err := os.WriteFile(broken, []byte("no ELF"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Modules(kernel, []string{"ext4"}); err == nil || !strings.Contains(err.Error(), "ext4") {
		t.Errorf("a module that is broken: %v", err)
	}
}
