package qemu

import (
	"fmt"
	"strings"
	"testing"
)

// TestOwnersFileIsTheDevices has a person edit deimos.toml on the first partition,
// first with a mistake, then with an editor that begins a file with a byte order
// mark and ends lines as Windows does.
func TestOwnersFileIsTheDevices(t *testing.T) {
	f := newFleet(t)
	d := newDevice(f)
	good := fmt.Sprintf("coordinator = %q\ntoken = %q\n\n[jobs]\nenabled = true\n", address(f), f.NewToken(1))

	d.editConfig(strings.Replace(good, "enabled = true", "enabled = yes", 1))
	d.powerOn()
	if line := d.await("the configuration file"); !strings.Contains(line, "line 5") {
		t.Errorf("the console says %q; the mistake is in line 5", line)
	}
	d.machine.Kill()

	d.editConfig("\ufeff" + strings.ReplaceAll(good, "\n", "\r\n"))
	d.powerOn()
	d.awaitOnline()
	if n := strings.Count(d.machine.Said(), "the configuration file"); n != 0 {
		t.Error("the console still complains of the file")
	}
}
