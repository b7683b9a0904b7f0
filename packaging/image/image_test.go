package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/pe"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/ota/sbom"
	"github.com/deimos-edge/deimos/packaging/image/debian"
	"github.com/klauspost/compress/zstd"
)

// fakeStub is a PE image like systemd's stub: a header of headerSize bytes, two sections.
func fakeStub(headerSize int) []byte {
	le := binary.LittleEndian
	raw := make([]byte, headerSize+0x600)
	copy(raw, "MZ")
	le.PutUint32(raw[0x3c:], 0x40)
	copy(raw[0x40:], "PE\x00\x00")
	coff := raw[0x44:]
	le.PutUint16(coff, 0xaa64)
	le.PutUint16(coff[2:], 2)
	le.PutUint16(coff[16:], 160)
	opt := coff[20:]
	le.PutUint16(opt, 0x20b)
	le.PutUint32(opt[32:], 0x1000)
	le.PutUint32(opt[36:], 0x200)
	le.PutUint32(opt[56:], 0x3000)
	le.PutUint32(opt[60:], uint32(headerSize))
	le.PutUint32(opt[64:], 0x12345)
	le.PutUint32(opt[108:], 6)
	for i, name := range []string{".text", ".data"} {
		h := opt[160+40*i:]
		copy(h, name)
		size, at := []int{0x400, 0x200}[i], headerSize+[]int{0, 0x400}[i]
		le.PutUint32(h[8:], uint32(size))
		le.PutUint32(h[12:], uint32(0x1000*(i+1)))
		le.PutUint32(h[16:], uint32(size))
		le.PutUint32(h[20:], uint32(at))
		copy(raw[at:], "stub "+name)
	}
	return raw
}

// sectionsOf reads an EFI image with Go's own reader and checks how it is laid out.
func sectionsOf(t *testing.T, uki []byte) map[string]string {
	t.Helper()
	f, err := pe.NewFile(bytes.NewReader(uki))
	if err != nil {
		t.Fatal(err)
	}
	opt := f.OptionalHeader.(*pe.OptionalHeader64)
	all := map[string]string{}
	nextAddress, nextOffset := opt.SizeOfHeaders, opt.SizeOfHeaders
	for _, s := range f.Sections {
		if s.VirtualAddress%opt.SectionAlignment != 0 || s.Offset%opt.FileAlignment != 0 || s.Size%opt.FileAlignment != 0 {
			t.Errorf("section %s is not aligned: %+v", s.Name, s.SectionHeader)
		}
		if s.VirtualAddress < nextAddress || s.Offset < nextOffset {
			t.Errorf("section %s lies in the one before it: %+v", s.Name, s.SectionHeader)
		}
		nextAddress, nextOffset = s.VirtualAddress+max(s.VirtualSize, s.Size), s.Offset+s.Size
		content, err := s.Data()
		if err != nil {
			t.Fatal(err)
		}
		all[s.Name] = string(content[:min(s.VirtualSize, s.Size)])
	}
	if opt.SizeOfImage < nextAddress || opt.SizeOfImage%opt.SectionAlignment != 0 {
		t.Errorf("an image of %#x bytes has sections up to %#x", opt.SizeOfImage, nextAddress)
	}
	if int(nextOffset) != len(uki) || opt.CheckSum != 0 {
		t.Errorf("sections end at %#x of %#x, checksum %#x", nextOffset, len(uki), opt.CheckSum)
	}
	return all
}

func TestFirmwareHoldsItsParts(t *testing.T) {
	kernel := strings.Repeat("kernel", 1000)
	uki, err := makeUKI(fakeStub(0x1000), []section{{".osrel", []byte("ID=x\n")}, {".cmdline", []byte("quiet")}, {".linux", []byte(kernel)}, {".initrd", []byte("i")}})
	if err != nil {
		t.Fatal(err)
	}
	got := sectionsOf(t, uki)
	for name, want := range map[string]string{".osrel": "ID=x\n", ".cmdline": "quiet", ".linux": kernel, ".initrd": "i"} {
		if got[name] != want {
			t.Errorf("section %s is %.20q, not %.20q", name, got[name], want)
		}
	}
	if !strings.HasPrefix(got[".text"], "stub .text") || !strings.HasPrefix(got[".data"], "stub .data") {
		t.Error("the stub's own sections have changed")
	}
}

func TestStubThatCannotHoldTheFirmwareIsRefused(t *testing.T) {
	sections := []section{{".a", []byte("a")}, {".b", []byte("b")}, {".c", []byte("c")}, {".d", []byte("d")}, {".e", []byte("e")}}
	if _, err := makeUKI(fakeStub(0x200), sections); err == nil {
		t.Error("section headers were written over the stub's code")
	}
	if _, err := makeUKI([]byte("MZ"), sections); err == nil {
		t.Error("what is no stub was taken")
	}
	if _, err := makeUKI(fakeStub(0x1000), []section{{".linux", nil}}); err == nil {
		t.Error("an empty kernel was taken")
	}
}

// fakeELF is an AArch64 file with one section for each purpose: a module's
// .modinfo, or the libraries that a program needs.
func fakeELF(modinfo string, libraries ...string) []byte {
	le := binary.LittleEndian
	texts, dynamic := "\x00", []byte{}
	for _, l := range libraries {
		dynamic = le.AppendUint64(le.AppendUint64(dynamic, 1), uint64(len(texts)))
		texts += l + "\x00"
	}
	const names = "\x00.modinfo\x00.dynamic\x00.dynstr\x00"
	raw := make([]byte, 64)
	copy(raw, "\x7fELF\x02\x01\x01")
	le.PutUint16(raw[16:], 3)
	le.PutUint16(raw[18:], 183)
	le.PutUint32(raw[20:], 1)
	table := make([]byte, 64)
	for _, s := range []struct {
		name, kind, link uint32
		content          string
	}{{1, 1, 0, modinfo}, {10, 6, 3, string(dynamic)}, {19, 3, 0, texts}, {0, 3, 0, names}} {
		h := make([]byte, 64)
		le.PutUint32(h, s.name)
		le.PutUint32(h[4:], s.kind)
		le.PutUint64(h[24:], uint64(len(raw)))
		le.PutUint64(h[32:], uint64(len(s.content)))
		le.PutUint32(h[40:], s.link)
		table = append(table, h...)
		raw = append(raw, s.content...)
	}
	le.PutUint64(raw[40:], uint64(len(raw)))
	le.PutUint16(raw[52:], 64)
	le.PutUint16(raw[58:], 64)
	le.PutUint16(raw[60:], 5)
	le.PutUint16(raw[62:], 4)
	return append(raw, table...)
}

// fakeDebian builds packages as Debian does, small ones, into a cache folder,
// and returns their lock.
func fakeDebian(t *testing.T, cache string) []debian.Package {
	t.Helper()
	testenv.Tool(t, "dpkg-deb", "dpkg")
	const lib = "lib/aarch64-linux-gnu/"
	kernel := map[string]string{"boot/vmlinuz-6.1.0": strings.Repeat("kernel", 5000)}
	for _, m := range slices.Concat(diskModules, laterModules) {
		kernel["lib/modules/6.1.0/"+m+".ko"] = string(fakeELF("depends=\x00name=" + m + "\x00"))
	}
	kernel["lib/modules/6.1.0/ext4.ko"] = string(fakeELF("depends=jbd2\x00"))
	kernel["lib/modules/6.1.0/jbd2.ko"] = string(fakeELF("depends=\x00"))
	program := string(fakeELF("", "libext2fs.so.2", "libc.so.6"))
	var lock []debian.Package
	for name, files := range map[string]map[string]string{
		"linux-image-6.1.0-arm64": kernel,
		"e2fsprogs":               {"sbin/mke2fs": program, "sbin/resize2fs": program, "sbin/e2fsck": program, "etc/mke2fs.conf": "[defaults]\n"},
		"libext2fs2":              {"usr/" + lib + "libext2fs.so.2": string(fakeELF("", "libc.so.6"))},
		"libc6":                   {lib + "libc.so.6": string(fakeELF("", "ld-linux-aarch64.so.1")), "lib/ld-linux-aarch64.so.1": string(fakeELF(""))},
		"busybox-static":          {"bin/busybox": "busybox"},
		"systemd-boot-efi": {"usr/lib/systemd/boot/efi/linuxaa64.efi.stub": string(fakeStub(0x1000)),
			"usr/lib/systemd/boot/efi/systemd-bootaa64.efi": "systemd-boot"},
	} {
		dir := t.TempDir()
		files["DEBIAN/control"] = "Package: " + name + "\nVersion: 1:2-3\nArchitecture: arm64\nMaintainer: nobody <nobody@example.org>\nDescription: for a test\n"
		for f, content := range files {
			put(t, filepath.Join(dir, f), content)
		}
		p := debian.Package{Name: name, Version: "1:2-3"}
		deb := filepath.Join(cache, p.FileName())
		if out, err := exec.Command("dpkg-deb", "--root-owner-group", "-Znone", "-b", dir, deb).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		p.SHA256 = fmt.Sprintf("%x", sha256.Sum256(read(t, deb)))
		lock = append(lock, p)
	}
	return lock
}

func put(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// ask is a build of small parts, which takes no time.
func ask(t *testing.T) (o options, lock []debian.Package) {
	t.Helper()
	o.cache, o.out = t.TempDir(), t.TempDir()
	lock = fakeDebian(t, o.cache)
	o.version = "1.2.3"
	o.init, o.agent, o.config = filepath.Join(o.cache, "init"), filepath.Join(o.cache, "agent"), filepath.Join(o.cache, "toml")
	aProgram(t, o.init)
	put(t, o.agent, string(read(t, o.init)))
	put(t, o.config, "[coordinator]\n")
	return o, lock
}

// aProgram makes a small program, of which can be told what it is made of.
func aProgram(t *testing.T, name string) {
	t.Helper()
	source := filepath.Join(t.TempDir(), "main.go")
	put(t, source, "package main\n\nfunc main() {}\n")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", name, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestImageHoldsLoaderFirmwareAndConfiguration(t *testing.T) {
	o, lock := ask(t)
	if err := build(t.Context(), o, lock); err != nil {
		t.Fatal(err)
	}
	disk := read(t, filepath.Join(o.out, "deimos-arm64-1.2.3.img"))
	uki := read(t, filepath.Join(o.out, "deimos_1.2.3.efi"))
	got := readFAT(t, disk[alignment*sector:(alignment+espSectors)*sector])
	for name, want := range map[string]string{
		"EFI/BOOT/BOOTAA64.EFI":        "systemd-boot",
		"EFI/Linux/deimos_1.2.3+3.efi": string(uki),
		"deimos.toml":                  "[coordinator]\n",
		"loader/loader.conf":           loaderConf,
	} {
		if got[name] != want {
			t.Errorf("%s is %.40q, not %.40q", name, got[name], want)
		}
		delete(got, name)
	}
	if rest := slices.Sorted(maps.Keys(got)); !slices.Equal(rest, []string{"EFI/", "EFI/BOOT/", "EFI/Linux/", "loader/"}) {
		t.Errorf("there are more files: %q", rest)
	}
	left, err := os.ReadDir(o.out)
	if err != nil || len(left) != 3 {
		t.Errorf("the folder has %v (%v), not an image, a firmware and what that is made of", left, err)
	}
}

// TestWhatAFirmwareIsMadeOfStandsBesideIt: the packages that are in it, and no others.
func TestWhatAFirmwareIsMadeOfStandsBesideIt(t *testing.T) {
	o, lock := ask(t)
	for _, debug := range []bool{false, true} {
		o.debug = debug
		if err := build(t.Context(), o, lock); err != nil {
			t.Fatal(err)
		}
		firmware := filepath.Join(o.out, map[bool]string{false: "deimos_1.2.3.efi", true: "deimos_1.2.3-debug.efi"}[debug])
		b := sbom.New("release", "1.2.3")
		if known, err := b.AddFirmware(firmware, "1.2.3"); err != nil || !known {
			t.Fatalf("what is in %s is known: %v, %v", firmware, known, err)
		}
		sums := map[string]bool{}
		for _, m := range b.Materials() {
			sums[m.Digest["sha256"]] = true
		}
		for _, p := range lock {
			if want := debug || p.Name != debian.Shell; sums[p.SHA256] != want {
				t.Errorf("debug %v: %s is listed: %v", debug, p.Name, sums[p.SHA256])
			}
		}
		for _, program := range []string{o.agent, o.init} {
			if sum := fmt.Sprintf("%x", sha256.Sum256(read(t, program))); !b.Has(sum) {
				t.Errorf("debug %v: %s is not listed", debug, program)
			}
		}
	}
}

// initramfsOf takes the root file system out of a firmware.
func initramfsOf(t *testing.T, uki []byte) string {
	t.Helper()
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	raw, err := d.DecodeAll([]byte(sectionsOf(t, uki)[".initrd"]), nil)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestOnlyTheDebugVariantHasAShell(t *testing.T) {
	o, lock := ask(t)
	if err := build(t.Context(), o, lock); err != nil {
		t.Fatal(err)
	}
	o.debug = true
	if err := build(t.Context(), o, lock); err != nil {
		t.Fatal(err)
	}
	release := initramfsOf(t, read(t, filepath.Join(o.out, "deimos_1.2.3.efi")))
	debug := initramfsOf(t, read(t, filepath.Join(o.out, "deimos_1.2.3-debug.efi")))
	for _, name := range []string{"bin/sh\x00", "bin/busybox\x00"} {
		if strings.Contains(release, name) {
			t.Errorf("the release has %s", name)
		}
		if !strings.Contains(debug, name) {
			t.Errorf("the debug variant has no %s", name)
		}
	}
	for _, part := range []string{
		"sbin/mke2fs\x00", "sbin/resize2fs\x00", "sbin/e2fsck\x00", "bin/deimos-agent\x00", "init\x00",
		"lib/libc.so.6\x00", "lib/libext2fs.so.2\x00", "lib/ld-linux-aarch64.so.1\x00", // what was needed, and what that needs
		"lib/modules/jbd2.ko\x00", "crc32c_generic.ko\njbd2.ko\next4.ko\n", "lib/modules.later\x00", "hid_generic.ko\nevdev.ko\n", "IMAGE_VERSION=1.2.3\n",
	} {
		if !strings.Contains(release, part) {
			t.Errorf("the root file system has no %q", part)
		}
	}
}

func TestTwoBuildsGiveTheSameBytes(t *testing.T) {
	o, lock := ask(t)
	two := o
	two.out = t.TempDir()
	two.cache = t.TempDir()
	for _, p := range lock {
		put(t, filepath.Join(two.cache, p.FileName()), string(read(t, filepath.Join(o.cache, p.FileName()))))
	}
	slices.Reverse(lock)
	sameBytes(t, lock, o, two)
}

// TestTwoRealBuildsGiveTheSameBytes takes half a minute and, the first time, the
// network: DEIMOS_IMAGE names the folder with deimos-agent and deimos-init, as
// `scripts/test qemu` does.
func TestTwoRealBuildsGiveTheSameBytes(t *testing.T) {
	bin := os.Getenv("DEIMOS_IMAGE")
	if bin == "" {
		t.Skip("DEIMOS_IMAGE does not name the folder with the arm64 programs")
	}
	lock, err := debian.Locked()
	if err != nil {
		t.Fatal(err)
	}
	var o options
	o.version, o.agent, o.init = "1.2.3", filepath.Join(bin, "deimos-agent"), filepath.Join(bin, "deimos-init")
	o.cache, o.out = "../../.tools/debian", t.TempDir()
	two := o
	two.out = t.TempDir()
	sameBytes(t, lock, o, two)
}

func sameBytes(t *testing.T, lock []debian.Package, one, two options) {
	t.Helper()
	for _, o := range []options{one, two} {
		if err := build(t.Context(), o, lock); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"deimos-arm64-1.2.3.img", "deimos_1.2.3.efi", "deimos_1.2.3.cdx.json"} {
		if !bytes.Equal(read(t, filepath.Join(one.out, name)), read(t, filepath.Join(two.out, name))) {
			t.Errorf("%s differs between two builds of the same parts", name)
		}
	}
}

func TestPackageThatIsNotTheLockedOneIsRefused(t *testing.T) {
	o, lock := ask(t)
	deb := filepath.Join(o.cache, lock[0].FileName())
	raw := read(t, deb)
	raw[len(raw)/2] ^= 1
	put(t, deb, string(raw))
	err := build(t.Context(), o, lock)
	if err == nil || !strings.Contains(err.Error(), lock[0].Name) {
		t.Errorf("a package with one bit flipped: %v", err)
	}
	if left, _ := os.ReadDir(o.out); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
}

func TestMissingLibraryStopsTheBuild(t *testing.T) {
	o, lock := ask(t)
	lock = slices.DeleteFunc(lock, func(p debian.Package) bool { return p.Name == "libext2fs2" })
	if err := build(t.Context(), o, lock); err == nil || !strings.Contains(err.Error(), "libext2fs.so.2") {
		t.Errorf("an image without a library of mke2fs: %v", err)
	}
}

func TestVersionThatBreaksFileNamesIsRefused(t *testing.T) {
	for _, version := range []string{"", "1+2", "1_2", "../x", "1 2", "1\n2", "-1", strings.Repeat("1", 60)} {
		var o options
		o.version = version
		if err := build(context.Background(), o, nil); err == nil || !strings.Contains(err.Error(), "cannot be the version") {
			t.Errorf("version %q: %v", version, err)
		}
	}
}
