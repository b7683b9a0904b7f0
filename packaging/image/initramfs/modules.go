package initramfs

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Modules lists the files of kernel modules and of what they depend on, in an
// order in which they can be loaded. kernel is an unpacked kernel package, with
// lib/modules in it. What is built into the kernel is left out.
func Modules(kernel string, names []string) ([]string, error) {
	r, err := read(kernel)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := r.add(name); err != nil {
			return nil, err
		}
	}
	return r.order, nil
}

type resolver struct {
	files   map[string]string // by name
	builtIn map[string]bool
	order   []string
}

// canonical is the name of a module's file as the kernel knows it.
func canonical(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")
}

func read(kernel string) (*resolver, error) {
	r := &resolver{files: map[string]string{}, builtIn: map[string]bool{}}
	err := filepath.WalkDir(filepath.Join(kernel, "lib", "modules"), func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		switch {
		case filepath.Ext(p) == ".ko":
			r.files[canonical(p)] = p
		case filepath.Base(p) == "modules.builtin":
			list, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			for line := range strings.FieldsSeq(string(list)) {
				r.builtIn[canonical(line)] = true
			}
		}
		return nil
	})
	return r, err
}

func (r *resolver) add(name string) error {
	file := r.files[canonical(name)]
	if file == "" {
		if r.builtIn[canonical(name)] {
			return nil
		}
		return fmt.Errorf("the kernel has no module %s", name)
	}
	if slices.Contains(r.order, file) {
		return nil
	}
	needs, err := depends(file)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	for _, n := range needs {
		if err := r.add(n); err != nil {
			return fmt.Errorf("for %s: %w", name, err)
		}
	}
	r.order = append(r.order, file)
	return nil
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
		return nil, errors.New("it says nothing about itself (no section .modinfo)")
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
