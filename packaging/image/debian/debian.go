// Package debian gets Debian's packages for arm64, byte for byte those that
// debian.lock names, and unpacks them.
//
// They are fetched by apt-get, which checks Debian's signatures, with lists of
// its own: no root, and whatever release and architectures the host has. A cache
// keeps them; with all of them in it there is no network. Their SHA-256 is
// checked each time.
//
// Debian serves only the newest version of a package. After a security update
// the lock must be written anew ([Refresh]), or the old file be put into the cache from
// snapshot.debian.org.
package debian

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/deimos-edge/deimos/ota/slot"
)

// lockFile names Debian's packages by what is in them; see [Locked].
const lockFile = "packaging/image/debian/debian.lock"

//go:embed debian.lock
var lockText string

// KernelPrefix begins the name of the package with the kernel; the rest is its ABI.
const KernelPrefix = "linux-image-"

// Shell is the package of the debug variant's shell, which others are made without.
const Shell = "busybox-static"

// Arch is the architecture of all packages, as Debian names it.
const Arch = "arm64"

// wanted are the packages besides the kernel's.
var wanted = []string{
	Shell,
	"e2fsprogs", "libblkid1", "libc6", "libcom-err2", "libext2fs2", "libuuid1",
	"systemd-boot-efi",
}

// Package is a line of the lock file.
type Package struct {
	Name, Version string
	SHA256        string // of the .deb, lower-case hex
}

// FileName is the name that apt-get gives the file, and that it has in the cache.
func (p Package) FileName() string {
	return p.Name + "_" + strings.ReplaceAll(p.Version, ":", "%3a") + "_" + Arch + ".deb"
}

// Locked lists the packages that the image is made from.
func Locked() ([]Package, error) { return readLock(lockText) }

// readLock reads "NAME VERSION SHA256", a package a line.
func readLock(text string) ([]Package, error) {
	var all []Package
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 3 || len(f[2]) != 2*sha256.Size || strings.ContainsAny(line, "/") {
			return nil, fmt.Errorf("%s: no line of the form NAME VERSION SHA256: %q", lockFile, line)
		}
		all = append(all, Package{f[0], f[1], f[2]})
	}
	return all, nil
}

func writeLock(all []Package) error {
	var out bytes.Buffer
	out.WriteString("# Debian's packages for arm64 that the image is made from: name, version, SHA-256.\n" +
		"# Written by \"make image-lock\".\n")
	for _, p := range all {
		fmt.Fprintf(&out, "%s %s %s\n", p.Name, p.Version, p.SHA256)
	}
	return os.WriteFile(lockFile, out.Bytes(), 0o644)
}

// Fetch has every package in the cache folder, by network if it must, and
// unpacks them into dir. A package that is not the locked one is an error.
func Fetch(ctx context.Context, all []Package, cache, dir string) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	if err := fetchMissing(ctx, all, cache); err != nil {
		return err
	}
	for _, p := range all {
		deb := filepath.Join(cache, p.FileName())
		sum, err := slot.Digest(deb)
		if err != nil {
			return err
		}
		if sum != p.SHA256 {
			return fmt.Errorf("%s is not the package that %s names (SHA-256 %s); remove it and try again", deb, lockFile, sum)
		}
		if _, err := run(ctx, "", nil, "dpkg-deb", "-x", deb, dir); err != nil {
			return fmt.Errorf("unpack %s: %w", deb, err)
		}
	}
	return nil
}

// fetchMissing asks the network only if the cache lacks a package.
func fetchMissing(ctx context.Context, all []Package, cache string) error {
	var missing []Package
	for _, p := range all {
		if _, err := os.Stat(filepath.Join(cache, p.FileName())); errors.Is(err, os.ErrNotExist) {
			missing = append(missing, p)
		} else if err != nil {
			return err
		}
	}
	if len(missing) == 0 {
		return nil
	}
	a, err := openApt(ctx, cache)
	if err != nil {
		return err
	}
	for _, p := range missing {
		if err := a.download(ctx, p, cache); err != nil {
			return errors.Join(err, a.close())
		}
	}
	return a.close()
}

// download has apt-get put a package into the cache, whole or not at all.
func (a apt) download(ctx context.Context, p Package, cache string) error {
	fmt.Println("fetch ", p.Name, p.Version)
	if err := a.get(ctx, "-q", "download", p.Name+"="+p.Version); err != nil {
		return fmt.Errorf("fetch %s: %w\nIf Debian has a newer version by now, \"make image-lock\" takes it; "+
			"the old one is at https://snapshot.debian.org, to be put at %s", p.Name, err, filepath.Join(cache, p.FileName()))
	}
	return os.Rename(filepath.Join(a.dir, p.FileName()), filepath.Join(cache, p.FileName()))
}

// apt is apt-get with lists of its own, so that neither the release of Debian
// that this machine runs nor the architectures that it knows matter, and nobody
// has to be root. Proxies are the machine's.
type apt struct{ dir string }

const (
	keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	sources = "deb [signed-by=" + keyring + "] http://deb.debian.org/debian bookworm main\n" +
		"deb [signed-by=" + keyring + "] http://deb.debian.org/debian-security bookworm-security main\n"
)

// openApt asks Debian what there is. The folder goes with close.
func openApt(ctx context.Context, cache string) (a apt, err error) {
	if _, err := os.Stat(keyring); err != nil {
		return a, fmt.Errorf("the keys of Debian are missing: %w; install debian-archive-keyring", err)
	}
	if cache, err = filepath.Abs(cache); err != nil {
		return a, err
	}
	if a.dir, err = os.MkdirTemp(cache, "apt-"); err != nil {
		return a, err
	}
	config := fmt.Sprintf("Dir::State %q;\nDir::State::status %q;\nDir::Cache %q;\nDir::Etc::SourceList %q;\nDir::Etc::SourceParts \"/dev/null\";\n"+
		"APT::Architecture \"arm64\";\n#clear APT::Architectures;\nAPT::Architectures { \"arm64\"; };\nAPT::Sandbox::User \"root\";\n"+
		"Acquire::Languages \"none\";\nAcquire::Retries \"3\";\n#clear APT::Update;\n#clear DPkg::Post-Invoke;\n",
		filepath.Join(a.dir, "state"), filepath.Join(a.dir, "status"), filepath.Join(a.dir, "cache"), filepath.Join(a.dir, "sources.list"))
	err = errors.Join(
		os.MkdirAll(filepath.Join(a.dir, "state/lists/partial"), 0o755),
		os.MkdirAll(filepath.Join(a.dir, "cache/archives/partial"), 0o755),
		os.WriteFile(filepath.Join(a.dir, "status"), nil, 0o644),
		os.WriteFile(filepath.Join(a.dir, "sources.list"), []byte(sources), 0o644),
		os.WriteFile(filepath.Join(a.dir, "apt.conf"), []byte(config), 0o644))
	if err == nil {
		fmt.Println("ask    Debian for its lists")
		err = a.get(ctx, "-q", "-o", "APT::Update::Error-Mode=any", "update")
	}
	if err != nil {
		return a, errors.Join(fmt.Errorf("ask Debian what there is: %w", err), a.close())
	}
	return a, nil
}

func (a apt) close() error { return os.RemoveAll(a.dir) }

func (a apt) get(ctx context.Context, args ...string) error {
	_, err := a.run(ctx, "apt-get", args...)
	return err
}

func (a apt) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	return run(ctx, a.dir, []string{"APT_CONFIG=" + filepath.Join(a.dir, "apt.conf"), "LC_ALL=C"}, name, args...)
}

// Refresh fetches what Debian offers now and writes the lock file. It runs in
// the top folder of the sources.
func Refresh(ctx context.Context, cache string) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	a, err := openApt(ctx, cache)
	if err != nil {
		return err
	}
	all, err := a.newest(ctx, cache)
	if err := errors.Join(err, a.close()); err != nil {
		return err
	}
	return writeLock(all)
}

// newest downloads the newest of all packages into the cache.
func (a apt) newest(ctx context.Context, cache string) ([]Package, error) {
	kernel, err := a.kernel(ctx)
	if err != nil {
		return nil, err
	}
	var all []Package
	for _, name := range append([]string{kernel}, wanted...) {
		fmt.Println("fetch ", name)
		if err := a.get(ctx, "-q", "download", name); err != nil {
			return nil, fmt.Errorf("fetch %s: %w", name, err)
		}
		found, err := filepath.Glob(filepath.Join(a.dir, name+"_*_"+Arch+".deb"))
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("apt-get downloaded %d files for %s, not one", len(found), name)
		}
		version := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(found[0]), name+"_"), "_"+Arch+".deb")
		p := Package{Name: name, Version: strings.ReplaceAll(version, "%3a", ":")}
		if p.SHA256, err = slot.Digest(found[0]); err != nil {
			return nil, err
		}
		if err := os.Rename(found[0], filepath.Join(cache, p.FileName())); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// kernel is the package that linux-image-arm64 stands for today.
func (a apt) kernel(ctx context.Context) (string, error) {
	out, err := a.run(ctx, "apt-cache", "depends", KernelPrefix+"arm64")
	if err != nil {
		return "", fmt.Errorf("find Debian's kernel: %w", err)
	}
	_, name, ok := strings.Cut(string(out), "Depends: "+KernelPrefix)
	name, _, _ = strings.Cut(name, "\n")
	if !ok {
		return "", errors.New("linux-image-arm64 of Debian depends on no kernel")
	}
	return KernelPrefix + strings.TrimSpace(name), nil
}

// run runs a program in a folder, with more in its environment.
func run(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", name, err, bytes.TrimSpace(out))
	}
	return out, nil
}
