package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/deimos-edge/deimos/packaging/image/initramfs"
)

// makeInitrd makes the machine's root file system.
func makeInitrd(tmp, kernel string) ([]byte, error) {
	var root initramfs.Archive
	root.Dir("proc", "sys", "dev")
	for _, name := range []string{"init", "deimos-agent"} {
		raw, err := os.ReadFile(filepath.Join(tmp, name))
		if err != nil {
			return nil, err
		}
		root.File(name, raw, true)
	}
	root.File("etc/os-release", []byte("PRETTY_NAME=\"Recorder of machines\"\n"), false)
	files, err := initramfs.Modules(kernel, modules)
	if err != nil {
		return nil, err
	}
	for i, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		root.File(fmt.Sprintf("modules/%03d-%s", i, filepath.Base(file)), raw, false)
	}
	return root.Bytes()
}
