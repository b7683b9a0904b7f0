package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// A file put and got through a coordinator and six agents, all of them processes
// of this machine, as an operator types it: encrypted, coded 4+2, each shard sent
// through the coordinator to a device, written durably, and answered with a receipt;
// then fetched, verified, and written to a file that is synced.
//
// The baseline has openssl encrypt the file, and writes what comes out of it to
// six files, as many bytes to each as a device gets, synced at the end: no network,
// no receipts, no parity worked out, nothing verified. Back, it joins four of the
// six and has openssl decrypt them into a file that is synced.

const (
	objectBytes  = 1 << 30
	objectRounds = 2
	objectData   = 4
	objectParity = 2
)

func objectRows(ctx context.Context, t *table, dir string) error {
	if _, err := exec.LookPath("openssl"); err != nil {
		fmt.Println("left out: objects: openssl is not installed")
		return nil
	}
	opened, err := newOurSide(dir)
	if err != nil {
		return err
	}
	s := opened.(*ourSide)
	if err := s.start(ctx); err != nil {
		return err
	}
	defer s.close()
	for i := range objectData + objectParity {
		device, err := s.startAgent(ctx, filepath.Join(dir, fmt.Sprintf("device-%d", i)))
		if err != nil {
			return err
		}
		defer device.kill() // with the command, at the latest
	}
	o := &objects{dir: dir, file: filepath.Join(dir, "file")}
	if err := o.makeFile(); err != nil {
		return err
	}
	var puts, gets []pair
	for i := range objectRounds {
		var put, get pair
		turns := []func() error{
			func() (err error) { put.ours, get.ours, err = o.fleet(ctx); return err },
			func() (err error) { put.base, get.base, err = o.plain(ctx); return err },
		}
		if i%2 == 1 {
			slices.Reverse(turns)
		}
		for _, turn := range turns {
			if err := turn(); err != nil {
				return err
			}
		}
		puts, gets = append(puts, put), append(gets, get)
	}
	t.paired("object put, 1 GiB, 4+2 (openssl, copies)", "MiB/s", puts, "%.0f")
	t.paired("object get, 1 GiB, 4+2 (openssl)", "MiB/s", gets, "%.0f")
	return nil
}

type objects struct {
	dir  string
	file string // what is put
	sum  []byte // of it
}

func (o *objects) makeFile() error {
	f, err := os.Create(o.file)
	if err != nil {
		return err
	}
	h := sha256.New()
	_, err = io.CopyN(io.MultiWriter(f, h), rand.NewChaCha8([32]byte{}), objectBytes)
	o.sum = h.Sum(nil)
	return closed(f, errors.Join(err, f.Sync()))
}

// fleet puts the file, gets it back, and removes it. Both speeds are in MiB/s.
func (o *objects) fleet(ctx context.Context) (put, get float64, err error) {
	out := filepath.Join(o.dir, "out")
	if put, err = o.deimos(ctx, "object", "put", o.file, "--name", "file"); err != nil {
		return 0, 0, err
	}
	if get, err = o.deimos(ctx, "object", "get", "file", "--out", out); err != nil {
		return 0, 0, err
	}
	if err := o.check(out); err != nil {
		return 0, 0, err
	}
	_, err = o.deimos(ctx, "object", "rm", "file")
	return put, get, err
}

// deimos runs a command as the owner, and returns how many MiB of the file it did
// in a second.
func (o *objects) deimos(ctx context.Context, args ...string) (speed float64, err error) {
	cmd := exec.CommandContext(ctx, filepath.Join(*bin, "deimos"), args...)
	cmd.Env = append(os.Environ(), "DEIMOS_CONTEXT="+filepath.Join(o.dir, "coordinator", "operator.json"))
	began := time.Now()
	if said, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("deimos %s: %w: %s", args[1], err, lastOf(string(said), 500))
	}
	return speedSince(began), nil
}

func speedSince(began time.Time) float64 { return mib(objectBytes) / time.Since(began).Seconds() }

// check compares a file that came back, and removes it.
func (o *objects) check(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	h := sha256.New()
	_, err = io.Copy(h, f)
	if err := closed(f, err); err != nil {
		return err
	}
	if !bytes.Equal(h.Sum(nil), o.sum) {
		return fmt.Errorf("%s is not what was stored", path)
	}
	return os.Remove(path)
}

// plain is fleet of the baseline.
func (o *objects) plain(ctx context.Context) (put, get float64, err error) {
	dir := filepath.Join(o.dir, "plain")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	began := time.Now()
	if err := o.encrypt(ctx, dir); err != nil {
		return 0, 0, err
	}
	put = speedSince(began)
	began = time.Now()
	out := filepath.Join(dir, "out")
	if err := o.decrypt(ctx, dir, out); err != nil {
		return 0, 0, err
	}
	return put, speedSince(began), o.check(out)
}

// plainBlock is what goes to one file before the next has its turn, in bytes.
const plainBlock = 1 << 20

func openssl(ctx context.Context, more ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "openssl", append([]string{"enc", "-aes-256-ctr", "-pbkdf2", "-pass", "pass:bench"}, more...)...)
	cmd.Stderr = os.Stderr
	return cmd
}

// copies opens n of the six files.
func copies(dir string, n int, open func(path string) (*os.File, error)) (files []*os.File, err error) {
	for i := range n {
		f, err := open(filepath.Join(dir, fmt.Sprint(i)))
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func (o *objects) encrypt(ctx context.Context, dir string) error {
	files, err := copies(dir, objectData+objectParity, os.Create)
	if err != nil {
		return err
	}
	cmd := openssl(ctx, "-in", o.file)
	from, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = closed(from, deal(from, files))
	err = errors.Join(err, cmd.Wait())
	for _, f := range files {
		err = closed(f, errors.Join(err, f.Sync()))
	}
	return err
}

// deal writes block by block to one file after the other. In place of parity, the
// first blocks of each turn are written once more.
func deal(from io.Reader, files []*os.File) error {
	block := make([]byte, plainBlock)
	for i := 0; ; i = (i + 1) % objectData {
		n, err := io.ReadFull(from, block)
		if n > 0 {
			if _, err := files[i].Write(block[:n]); err != nil {
				return err
			}
			if i < objectParity {
				if _, err := files[objectData+i].Write(block[:n]); err != nil {
					return err
				}
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (o *objects) decrypt(ctx context.Context, dir, out string) error {
	files, err := copies(dir, objectData, os.Open)
	if err != nil {
		return err
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	cmd := openssl(ctx, "-d")
	cmd.Stdout = f
	to, err := cmd.StdinPipe()
	if err != nil {
		return closed(f, err)
	}
	if err := cmd.Start(); err != nil {
		return closed(f, err)
	}
	err = closed(to, gather(to, files))
	err = errors.Join(err, cmd.Wait())
	err = closed(f, errors.Join(err, f.Sync()))
	for _, f := range files {
		err = closed(f, err)
	}
	return err
}

// gather reads block by block of one file after the other, until one ends.
func gather(to io.Writer, files []*os.File) error {
	block := make([]byte, plainBlock)
	for i := 0; ; i = (i + 1) % len(files) {
		n, err := io.ReadFull(files[i], block)
		if _, err := to.Write(block[:n]); err != nil {
			return err
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
