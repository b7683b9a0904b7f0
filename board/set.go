package board

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Dir is where owners put profiles of their own, as NAME.toml.
const Dir = "/etc/deimos/boards"

// maxProfiles is how many files of a folder are read.
const maxProfiles = 256

// Set is the profiles that a machine is looked for in. The zero value has none.
type Set struct {
	profiles []Profile // those on disk first, each part sorted by name
}

// Builtin is the embedded profiles.
func Builtin() Set {
	all, err := embedded()
	if err != nil {
		// Cannot happen in a tested binary; a machine without a profile still works.
		return Set{}
	}
	return Set{slices.Clone(all)}
}

// Load is the embedded profiles and those of a folder, which replace and
// precede them. Whatever is wrong with the folder or a file in it is in the
// errors, each of which names its file and what to do; the rest is used. A
// folder that is missing has no profiles and is no error, nor is dir "".
func Load(dir string) (Set, []error) {
	if dir == "" {
		return Builtin(), nil
	}
	names, problems := list(dir)
	var own []Profile
	for _, name := range names {
		p, err := ReadFile(filepath.Join(dir, name))
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
		case err != nil:
			problems = append(problems, fmt.Errorf("%w; it is not used", err))
		default:
			own = append(own, p)
		}
	}
	all := slices.DeleteFunc(Builtin().profiles, func(p Profile) bool {
		return slices.ContainsFunc(own, func(o Profile) bool { return o.Name == p.Name })
	})
	return Set{append(own, all...)}, problems
}

// list names the profiles of a folder, sorted. It reads no more of an endless
// folder than a few names beyond the most there may be.
func list(dir string) ([]string, []error) {
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, []error{fmt.Errorf("board profiles of the owner are not used: %w", err)}
	}
	defer d.Close()
	var problems []error
	entries, err := d.ReadDir(4 * maxProfiles)
	if err != nil && !errors.Is(err, io.EOF) {
		problems = append(problems, fmt.Errorf("not all board profiles of the owner are used: %w", err))
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".toml") && !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	if len(names) > maxProfiles || len(entries) == 4*maxProfiles {
		problems = append(problems, fmt.Errorf("board profiles of the owner: %s holds more than %d files; only some are used, remove the others", dir, maxProfiles))
		names = names[:min(len(names), maxProfiles)]
	}
	return names, problems
}

// ReadFile reads the profile at path. What is wrong with its content is an [*Invalid].
func ReadFile(path string) (Profile, error) {
	// Opening must not wait for the other end of a FIFO.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return Profile{}, fmt.Errorf("board profile: %w", err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return Profile{}, fmt.Errorf("board profile: %w", err)
	} else if !st.Mode().IsRegular() {
		return Profile{}, fmt.Errorf("board profile %s: it is no regular file", clip(path))
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Profile{}, fmt.Errorf("board profile: %w", err)
	}
	p, err := Parse(strings.TrimSuffix(filepath.Base(path), ".toml"), raw)
	if err != nil {
		return Profile{}, fmt.Errorf("%s: %w", clip(path), err)
	}
	p.File = path
	return p, nil
}

// Profiles returns the profiles in the order in which equally specific ones are tried.
func (s Set) Profiles() []Profile { return slices.Clone(s.profiles) }

// Detect tells which board the machine below root is; see [Detect].
func (s Set) Detect(root string) Board { return s.detect(root, runtime.GOARCH) }

func (s Set) detect(root, arch string) Board {
	id := identify(root, arch)
	return id.as(choose(s.profiles, id))
}

// Named is the machine below root with the profile that its owner names, fit or
// not. An empty name detects.
func (s Set) Named(root, name string) (Board, error) {
	if name == "" {
		return s.Detect(root), nil
	}
	i := slices.IndexFunc(s.profiles, func(p Profile) bool { return p.Name == name })
	if i < 0 {
		var names []string
		for _, p := range s.profiles {
			names = append(names, p.Name)
		}
		slices.Sort(names)
		return Board{}, fmt.Errorf("there is no board profile %q; there are %s", clip(name), strings.Join(names, ", "))
	}
	return identify(root, runtime.GOARCH).as(&s.profiles[i]), nil
}
