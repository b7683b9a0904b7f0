package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// lockFile names Debian's packages by what is in them; see readLock.
const lockFile = "packaging/image/debian.lock"

//go:embed debian.lock
var lockText string

// kernelPrefix begins the name of the package with the kernel; the rest is its ABI.
const kernelPrefix = "linux-image-"

// wanted are the packages besides the kernel's.
var wanted = []string{
	"busybox-static", // the debug variant's shell
	"e2fsprogs", "libblkid1", "libc6", "libcom-err2", "libext2fs2", "libuuid1",
	"systemd-boot-efi",
}

// debPackage is a line of the lock file.
type debPackage struct {
	name, version string
	sha256        string // of the .deb, lower-case hex
}

// fileName is the name that apt-get gives the file.
func (p debPackage) fileName() string {
	return p.name + "_" + strings.ReplaceAll(p.version, ":", "%3a") + "_arm64.deb"
}

// readLock reads "NAME VERSION SHA256", a package a line.
func readLock(text string) ([]debPackage, error) {
	var all []debPackage
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 3 || len(f[2]) != 2*sha256.Size || strings.ContainsAny(line, "/") {
			return nil, fmt.Errorf("%s: no line of the form NAME VERSION SHA256: %q", lockFile, line)
		}
		all = append(all, debPackage{f[0], f[1], f[2]})
	}
	return all, nil
}

func writeLock(all []debPackage) error {
	var out bytes.Buffer
	out.WriteString("# Debian's packages for arm64 that the image is made from: name, version, SHA-256.\n" +
		"# Written by \"make image-lock\".\n")
	for _, p := range all {
		fmt.Fprintf(&out, "%s %s %s\n", p.name, p.version, p.sha256)
	}
	return os.WriteFile(lockFile, out.Bytes(), 0o644)
}

// fetch has every package of the lock in the cache folder and unpacks them into dir.
func fetch(ctx context.Context, all []debPackage, cache, dir string) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	for _, p := range all {
		deb := filepath.Join(cache, p.fileName())
		sum, err := digest(deb)
		if errors.Is(err, os.ErrNotExist) {
			if err = download(ctx, p, cache); err == nil {
				sum, err = digest(deb)
			}
		}
		if err != nil {
			return err
		}
		if sum != p.sha256 {
			return fmt.Errorf("%s is not the package that %s names (SHA-256 %s); remove it and try again", deb, lockFile, sum)
		}
		if err := run(ctx, "", "dpkg-deb", "-x", deb, dir); err != nil {
			return fmt.Errorf("unpack %s: %w", deb, err)
		}
	}
	return nil
}

// download has apt-get put a package into the cache, whole or not at all.
func download(ctx context.Context, p debPackage, cache string) error {
	tmp, err := os.MkdirTemp(cache, "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	fmt.Println("fetch ", p.name, p.version)
	if err := aptDownload(ctx, tmp, p.name+":arm64="+p.version); err != nil {
		return fmt.Errorf("%w\nIf Debian has a newer version by now, \"make image-lock\" takes it; "+
			"the old one is at https://snapshot.debian.org, to be put at %s", err, filepath.Join(cache, p.fileName()))
	}
	return os.Rename(filepath.Join(tmp, p.fileName()), filepath.Join(cache, p.fileName()))
}

func aptDownload(ctx context.Context, dir, what string) error {
	// Without a sandbox user: that one may not write into our folder, and apt-get warns.
	if err := run(ctx, dir, "apt-get", "-q", "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=3", "download", what); err != nil {
		return fmt.Errorf("fetch %s: %w\nDebian's packages for arm64 must be known: dpkg --add-architecture arm64 && apt-get update", what, err)
	}
	return nil
}

// refresh fetches what Debian offers now and writes the lock file.
func refresh(ctx context.Context, cache string) ([]debPackage, error) {
	kernel, err := newestKernel(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(cache, "download-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	var all []debPackage
	for _, name := range append([]string{kernel}, wanted...) {
		if err := aptDownload(ctx, tmp, name+":arm64"); err != nil {
			return nil, err
		}
		found, err := filepath.Glob(filepath.Join(tmp, name+"_*_arm64.deb"))
		if err != nil || len(found) != 1 {
			return nil, fmt.Errorf("apt-get downloaded %d files for %s, not one", len(found), name)
		}
		version := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(found[0]), name+"_"), "_arm64.deb")
		p := debPackage{name: name, version: strings.ReplaceAll(version, "%3a", ":")}
		if p.sha256, err = digest(found[0]); err != nil {
			return nil, err
		}
		if err := os.Rename(found[0], filepath.Join(cache, p.fileName())); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, writeLock(all)
}

// newestKernel is the package that linux-image-arm64 stands for today.
func newestKernel(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "apt-cache", "depends", kernelPrefix+"arm64:arm64")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("find Debian's kernel: %w; first: dpkg --add-architecture arm64 && apt-get update", err)
	}
	_, name, ok := strings.Cut(string(out), "Depends: "+kernelPrefix)
	name, _, _ = strings.Cut(name, "\n")
	if !ok {
		return "", errors.New("Debian's linux-image-arm64 depends on no kernel")
	}
	return kernelPrefix + strings.TrimSuffix(strings.TrimSpace(name), ":arm64"), nil
}

func digest(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, bytes.TrimSpace(out))
	}
	return nil
}
