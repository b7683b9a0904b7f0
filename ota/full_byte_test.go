//go:build !arm

// The library of the disk does not build there.

package ota

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/deimos-edge/deimos/internal/testenv"
)

// TestADiskThatIsFullAtAnyByteThatCounts is the test of pages on a disk that counts bytes,
// as file systems that compress or pack do: a write is cut in its midst, and not where a
// page is full. Tried are the first byte of each write and its last, and each page in it,
// and a byte more and less.
func TestADiskThatIsFullAtAnyByteThatCounts(t *testing.T) {
	testenv.Root(t, "a disk of its own is mounted")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		testenv.Cannot(t, "a disk cannot be made: %v", err)
	}
	old := freeSpace
	freeSpace = func(string) (int64, error) { return 1 << 40, nil } // or nothing would be tried
	defer func() { freeSpace = old }()
	for _, name := range []string{"whole", "delta"} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			dir, _, _ := f.withDelta()
			f.publish(dir)
			d := newByteDisk(t)
			at := f.writes(t, d, name == "delta")
			if testing.Short() {
				at = slices.DeleteFunc(at, func(free int) bool { return free%4 > 0 && free < at[len(at)-1] })
			}
			began, most := time.Now(), at[len(at)-1]
			var met []string
			for _, free := range at {
				// The times in a record make it longer or shorter, from one install to the next.
				reason := f.fullAtByte(t, d, free, name == "delta")
				if reason == "" && free < most-2*slack || reason != "" && free == most {
					t.Errorf("with %d bytes free of some %d that it takes: %q", free, most-slack, reason)
				}
				met = append(met, reason)
			}
			if !testing.Short() {
				meets(t, met, name == "delta")
			}
			t.Logf("%d disks were full, of up to %d bytes, in %s", len(at)-1, most, time.Since(began).Round(time.Millisecond))
		})
	}
}

// writes is how many bytes are to be free for an install to meet the full disk at each
// place of interest; the last is so many that it does not.
func (f *fleet) writes(t *testing.T, d *byteDisk, delta bool) (at []int) {
	t.Helper()
	if reason := f.fullAtByte(t, d, plenty, delta); reason != "" {
		t.Fatal(reason)
	}
	const page = 4096
	most := 0
	for _, w := range d.asks(byteWord{}).Grown {
		first, last := w.Used, w.Used+w.Bytes
		points := []int{first, last - 1}
		for p := page - w.Off%page; p < w.Bytes; p += page {
			points = append(points, first+p)
		}
		for _, p := range points {
			at = append(at, p-1, p, p+1)
		}
		most = max(most, last)
	}
	at = slices.DeleteFunc(at, func(n int) bool { return n < 0 })
	slices.Sort(at)
	return append(slices.Compact(at), most+slack)
}

func (f *fleet) fullAtByte(t *testing.T, d *byteDisk, free int, delta bool) string {
	t.Helper()
	dir := filepath.Join(d.dir, "device")
	must(t, os.Mkdir(dir, 0o755))
	defer func() { must(t, os.RemoveAll(dir)) }()
	leave := func(n int) { d.asks(byteWord{Leave: &n}) }
	leave(plenty)
	return f.installsOn(t, free, delta, disk{dir, func() { leave(plenty) }}, func() { leave(free) })
}

const (
	plenty = math.MaxInt32
	slack  = 512
)

// byteDisk is a folder that has room for so many bytes, exactly. Another process serves it:
// one that starts a program from a disk of its own waits for itself.
type byteDisk struct {
	dir string
	// asks sets how many bytes are free from here on, and returns the writes since then.
	asks func(byteWord) byteWord
}

type byteWord struct {
	Leave *int
	Grown []growth
}

// growth is a write that makes a file longer.
type growth struct {
	Used  int // bytes that had been added to the disk before
	Off   int // in the file
	Bytes int
}

const envByteDisk = "DEIMOS_TEST_BYTE_DISK" // where to mount, and what is below

// The process that serves the disk comes to no test: TestMain is of every processor.
func init() {
	where := os.Getenv(envByteDisk)
	if where == "" {
		return
	}
	if err := serveByteDisk(where); err != nil {
		fmt.Fprintln(os.Stderr, "the disk that counts bytes:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func newByteDisk(t testing.TB) *byteDisk {
	t.Helper()
	d := &byteDisk{dir: t.TempDir()}
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), envByteDisk+"="+d.dir+string(filepath.ListSeparator)+t.TempDir())
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { must(t, errors.Join(in.Close(), cmd.Wait())) })
	answers := json.NewDecoder(out)
	d.asks = func(w byteWord) byteWord {
		t.Helper()
		must(t, json.NewEncoder(in).Encode(w))
		var back byteWord
		must(t, answers.Decode(&back))
		return back
	}
	d.asks(byteWord{}) // it is mounted
	return d
}

// serveByteDisk does so until nobody asks any more.
func serveByteDisk(where string) error {
	dirs := filepath.SplitList(where)
	d := &byteServer{below: dirs[1], free: plenty}
	root, err := fusefs.NewLoopbackRoot(d.below)
	if err != nil {
		return err
	}
	below, ok := root.(*fusefs.LoopbackNode)
	if !ok {
		return fmt.Errorf("the root is a %T", root)
	}
	node := &byteNode{below, d}
	below.RootData.RootNode = node
	server, err := fusefs.Mount(dirs[0], node, &fusefs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "bytes"}})
	if err != nil {
		return err
	}
	questions, answers := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var w byteWord
		if err := questions.Decode(&w); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return errors.Join(err, server.Unmount())
		}
		if err := answers.Encode(byteWord{Grown: d.leave(w.Leave)}); err != nil {
			return errors.Join(err, server.Unmount())
		}
	}
}

type byteServer struct {
	below string

	mu    sync.Mutex
	began int // bytes in it when free was said
	free  int
	grown []growth
}

func (d *byteServer) leave(free *int) (grown []growth) {
	d.mu.Lock()
	defer d.mu.Unlock()
	grown = d.grown
	if free != nil {
		d.began, d.free, d.grown = d.used(), *free, nil
	}
	return grown
}

func (d *byteServer) used() (bytes int) {
	_ = filepath.WalkDir(d.below, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if info, err := e.Info(); err == nil {
				bytes += int(info.Size())
			}
		}
		return nil
	})
	return bytes
}

// room is how many bytes of a write that goes from off to end may be written to a file of
// this size.
func (d *byteServer) room(size, off, end int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if end <= size {
		return end - off
	}
	used := d.used() - d.began
	from := max(size, off)
	d.grown = append(d.grown, growth{used, from, end - from})
	return max(0, min(end, from+d.free-used)-off)
}

type byteNode struct {
	*fusefs.LoopbackNode
	disk *byteServer
}

func (n *byteNode) WrapChild(_ context.Context, ops fusefs.InodeEmbedder) fusefs.InodeEmbedder {
	if below, ok := ops.(*fusefs.LoopbackNode); ok {
		return &byteNode{below, n.disk}
	}
	return ops
}

func (n *byteNode) Open(ctx context.Context, flags uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	h, flags, errno := n.LoopbackNode.Open(ctx, flags)
	return n.counted(h), flags, errno
}

func (n *byteNode) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fusefs.Inode, fusefs.FileHandle, uint32, syscall.Errno) {
	inode, h, flags, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	return inode, n.counted(h), flags, errno
}

func (n *byteNode) counted(h fusefs.FileHandle) fusefs.FileHandle {
	if file, ok := h.(*fusefs.LoopbackFile); ok {
		return &byteFile{file, n.disk}
	}
	return h
}

type byteFile struct {
	*fusefs.LoopbackFile
	disk *byteServer
}

// PassthroughFd has the kernel send all writes here.
func (*byteFile) PassthroughFd() (int, bool) { return 0, false }

func (f *byteFile) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	var attr fuse.AttrOut
	if errno := f.Getattr(ctx, &attr); errno != 0 {
		return 0, errno
	}
	n := f.disk.room(int(attr.Size), int(off), int(off)+len(data))
	if n == 0 && len(data) > 0 {
		return 0, syscall.ENOSPC
	}
	return f.LoopbackFile.Write(ctx, data[:n], off)
}
