package firmware

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/mod/semver"

	"github.com/deimos-edge/deimos/ota/slot"
	"github.com/deimos-edge/deimos/ota/slot/firmware/firmwaretest"
)

func ask(raw []byte) (slot.About, error) { return Ask(bytes.NewReader(raw), int64(len(raw))) }

func TestAnImageSaysWhatItIs(t *testing.T) {
	got, err := ask(firmwaretest.Image("1.0.0~rc.1", "arm64", 1000))
	if want := (slot.About{Version: "1.0.0-rc.1", OS: "linux", Arch: "arm64"}); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestWhatIsNoWholeImageIsRefusedByName(t *testing.T) {
	good := firmwaretest.Image("1.0.0", "arm64", 1000)
	for name, c := range map[string]struct {
		raw   []byte
		words string
	}{
		"no image":           {[]byte("#!/bin/sh\necho no image at all, and long enough to be looked at: " + strings.Repeat("-", 100)), "no unified kernel image"},
		"another machine":    {firmwaretest.Image("1.0.0", "riscv64", 1000), "unknown PE type"},
		"no version":         {firmwaretest.Image("1.0.0", "arm64", 1000, ".osrel"), "no section .osrel"},
		"no kernel":          {firmwaretest.Image("1.0.0", "arm64", 1000, ".linux"), "no section .linux"},
		"no root":            {firmwaretest.Image("1.0.0", "arm64", 1000, ".initrd"), "no section .initrd"},
		"a semantic version": {firmwaretest.Image("1.0.0-rc.1", "arm64", 1000), "is none of a firmware"},
		"no words":           {firmwaretest.Image("", "arm64", 1000), "is none of a firmware"},
		"its last byte cut":  {good[:len(good)-1], "cut off"},
	} {
		if _, err := ask(c.raw); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %q", name, err, c.words)
		}
	}
	for n := range len(good) { // whatever is cut off, it is seen
		if about, err := ask(good[:n]); err == nil {
			t.Fatalf("%d of %d bytes are taken for %+v", n, len(good), about)
		}
	}
}

// The boot loader sorts by one order, releases are compared by another. A device
// that took a release as newer, and whose boot loader did not, would go on with the
// old one.
func TestBothOrdersSortVersionsAlike(t *testing.T) {
	var all []string
	for _, core := range []string{"0.1.0", "0.2.0", "0.10.0", "1.0.0", "1.0.1", "1.0.10", "1.9.0", "10.0.0"} {
		for _, pre := range []string{"", "-a", "-alpha", "-alpha.1", "-alpha.1.0", "-alpha.2", "-alpha.10", "-beta", "-beta.2", "-dev", "-rc", "-rc.0", "-rc.1", "-rc.2", "-rc.10", "-rca"} {
			all = append(all, core+pre)
		}
	}
	for _, a := range all {
		for _, b := range all {
			x, errX := ImageVersion(a)
			y, errY := ImageVersion(b)
			if errX != nil || errY != nil || releaseOf(x) != a {
				t.Fatal(a, b, errX, errY)
			}
			if got, want := compareVersions(x, y), semver.Compare("v"+a, "v"+b); got != want {
				t.Errorf("%s against %s: the boot loader says %d, the release %d", a, b, got, want)
			}
		}
	}
}

func TestVersionsThatTheOrdersSortDifferentlyAreNoFirmwares(t *testing.T) {
	for _, v := range []string{"1.0.0-1", "1.0.0-rc10", "1.0.0-rc.x", "1.0.0-rc-1", "1.0.0-RC.1", "1.0.0-rc.01", "1.0.0~rc.1", "1.0.0+1", "1.0", "01.0.0", "v1.0.0", "", "1.0.0-" + strings.Repeat("x", 64)} {
		if got, err := ImageVersion(v); err == nil {
			t.Errorf("%q is taken as %s", v, got)
		}
	}
	// Why: unmapped, or with these, the orders differ.
	for _, c := range [][2]string{{"1.0.0", "1.0.0-rc.1"}, {"1.0.0~rc10", "1.0.0~rc9"}, {"1.0.0~1", "1.0.0~alpha"}} {
		a, b := c[0], c[1]
		if compareVersions(a, b) == semver.Compare("v"+releaseOf(a), "v"+releaseOf(b)) {
			t.Error(fmt.Sprint(c), "are sorted alike after all")
		}
	}
}
