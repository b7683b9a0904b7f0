package hw

import (
	"path"
	"strings"
)

// bridgeOf describes what stands between USB and a disk; nil if nothing does.
// In sysfs, the disk is below the USB interface, and that below the USB device:
//
//	…/usb2/2-1/2-1:1.0/host0/target0:0:0/0:0:0:0/block/sda
func bridgeOf(t tree, name string) *Bridge {
	dir := strings.TrimPrefix(t.device("sys/block/"+name), "/")
	for range 16 { // deeper than any
		parent := path.Dir(dir)
		if parent == "." || !strings.Contains(parent, "/usb") {
			return nil
		}
		vendor := t.word(parent + "/idVendor")
		if vendor == "" {
			dir = parent
			continue
		}
		return &Bridge{
			ID:     vendor + ":" + t.word(parent+"/idProduct"),
			Name:   clean(t.word(parent+"/manufacturer") + " " + t.word(parent+"/product")),
			Driver: path.Base(t.device(dir + "/driver")),
		}
	}
	return nil
}
