package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// makeInitrd makes the machine's root file system: a cpio archive in the format
// "newc" (Documentation/driver-api/early-userspace/buffer-format).
func makeInitrd(tmp, kernel string) ([]byte, error) {
	var out bytes.Buffer
	for _, dir := range []string{"proc", "sys", "dev", "etc", "modules"} {
		addCPIO(&out, dir, 0o40755, nil)
	}
	for _, name := range []string{"init", "deimos-agent"} {
		raw, err := os.ReadFile(filepath.Join(tmp, name))
		if err != nil {
			return nil, err
		}
		addCPIO(&out, name, 0o100755, raw)
	}
	addCPIO(&out, "etc/os-release", 0o100644, []byte("PRETTY_NAME=\"Recorder of machines\"\n"))
	files, err := resolve(kernel)
	if err != nil {
		return nil, err
	}
	for i, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		addCPIO(&out, fmt.Sprintf("modules/%03d-%s", i, filepath.Base(file)), 0o100644, raw)
	}
	addCPIO(&out, "TRAILER!!!", 0, nil)
	return out.Bytes(), nil
}

func addCPIO(out *bytes.Buffer, name string, mode int, content []byte) {
	links := 1
	fmt.Fprintf(out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		0, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	pad := func() { out.Write(make([]byte, -out.Len()&3)) }
	pad()
	out.Write(content)
	pad()
}

// resolve lists the files of the modules and of what they depend on, which comes first.
func resolve(kernel string) ([]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(kernel, "lib", "modules"), func(p string, d fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(p), ".ko"); ok {
			files[strings.ReplaceAll(name, "-", "_")] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	var order []string
	var add func(name string) error
	add = func(name string) error {
		file := files[strings.ReplaceAll(name, "-", "_")]
		if file == "" {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		if slices.Contains(order, file) {
			return nil
		}
		needs, err := depends(file)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, file)
		return nil
	}
	for _, name := range modules {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// depends reads the section .modinfo of a module: "key=value" texts, each ended by a NUL.
func depends(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("%s says nothing about itself", file)
	}
	raw, err := s.Data()
	if err != nil {
		return nil, err
	}
	for text := range strings.SplitSeq(string(raw), "\x00") {
		if list, ok := strings.CutPrefix(text, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
