package hw

import (
	"strings"
	"testing"
)

// FuzzRecordedMountinfo: what a record keeps of the mounts shows the same filesystems.
func FuzzRecordedMountinfo(f *testing.F) {
	f.Add([]byte("24 1 179:2 / / rw,noatime shared:1 - ext4 /dev/mmcblk0p2 rw\n43 24 0:40 / /mnt/nas rw - nfs4 nas:/export rw\n"))
	f.Add([]byte("1 0 0:30 / / rw - overlay overlay rw,lowerdir=/a\n2 1 8:1 /pub /home/alice/x ro - ext4 /dev/sda1 ro\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		nodev := nodevTypes(tree{root: "/does/not/exist"})
		kept := plainMounts(raw, nodev)
		if strings.Contains(string(kept), "/home/alice") {
			t.Errorf("a name is kept: %q", kept)
		}
		before, after := onThisMachine(parseMountinfo(raw), nodev), onThisMachine(parseMountinfo(kept), nodev)
		if peoplesDir.Match(raw) { // may make two of them one
			return
		}
		if len(before) != len(after) {
			t.Fatalf("%d filesystems became %d: %q", len(before), len(after), kept)
		}
		for i, b := range before {
			if a := after[i]; a.Mount != b.Mount || a.Type != b.Type || a.Source != b.Source || a.ReadOnly != b.ReadOnly {
				t.Errorf("%+v became %+v", b, a)
			}
		}
	})
}
