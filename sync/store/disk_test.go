package store

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// ownDisk is an ext4 on a loop device.
type ownDisk struct {
	device, mount string
	guarded       io.Writer // a line to its guard: from now on it may hang
}

// newDisk makes one of what backing, which has an ext4 on it, holds. The file is that
// of the daemon with a process id, if there is one.
func newDisk(t *testing.T, backing string, daemon ...int) *ownDisk {
	t.Helper()
	d := &ownDisk{device: run(t, "losetup", "--find", "--show", backing), mount: filepath.Join(t.TempDir(), "mount")}
	d.guard(t, daemon...)
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", d.device).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	if err := os.Mkdir(d.mount, 0o700); err != nil {
		t.Fatal(err)
	}
	d.attach(t)
	return d
}

// hangsMost is how long a disk may hang: who waits for it in mapped memory holds up
// all of this process, the test and its time limit too.
const hangsMost = 2 * time.Minute

// guard has a process of its own take the disk away if this one dies, and have a
// daemon that is stopped from the moment it is told go on in time whatever becomes of this one: killed while it waits for
// the disk, it does not end before.
func (d *ownDisk) guard(t *testing.T, daemon ...int) {
	t.Helper()
	const script = `read hangs && timeout "$1" cat; test -z "$4" || kill -CONT "$4"; cat; umount -l "$3"; losetup -d "$2"; test -z "$4" || kill "$4"`
	args := []string{"-c", script, "sh", fmt.Sprint(hangsMost.Seconds()), d.device, d.mount}
	for _, pid := range daemon {
		args = append(args, fmt.Sprint(pid))
	}
	cmd := exec.Command("sh", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what ends this one must not end it
	alive, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	d.guarded = alive
	t.Cleanup(func() { // when all is taken away
		_ = cmd.Process.Kill()
		_ = alive.Close()
		_ = cmd.Wait()
	})
}

func (d *ownDisk) attach(t *testing.T) {
	t.Helper()
	if err := unix.Mount(d.device, d.mount, "ext4", 0, "errors=remount-ro"); err != nil {
		testenv.Cannot(t, "mounting is not allowed here: %v", err)
	}
	t.Cleanup(d.detach)
}

// detach waits for who still has files open; a volume that did not close has them.
func (d *ownDisk) detach() {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if err := unix.Unmount(d.mount, 0); err != unix.EBUSY {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	_ = unix.Unmount(d.mount, unix.MNT_DETACH)
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(testenv.Tool(t, name, "e2fsprogs mount util-linux"), args...).CombinedOutput()
	if err != nil {
		testenv.Cannot(t, "%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// image is a file of so many MiB with an ext4 on it.
func image(t *testing.T, mib int64) string {
	t.Helper()
	testenv.Root(t, "loop devices need root")
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(mib << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	run(t, "mkfs.ext4", "-q", "-F", path)
	return path
}

// readOnlyEnv is where the volume lies, for the process that this test starts, and
// triggerEnv what makes its file system read-only.
const (
	readOnlyEnv = "DEIMOS_TEST_STORE_READONLY"
	triggerEnv  = "DEIMOS_TEST_STORE_TRIGGER"
)

// A file system that has found an error makes itself read-only, whoever has files
// open there: the volume says so, serves what it has, and does not die of it. When the
// disk is mended, all is there.
func TestAFileSystemThatTurnsReadOnlyUnderAVolume(t *testing.T) {
	seed := testenv.Seed(t)
	some := func() map[chunk.ID][]byte {
		rng, held := rand.New(rand.NewPCG(seed, 0)), map[chunk.ID][]byte{}
		for range 30 {
			id, data := someChunk(rng, 1+rng.IntN(100_000))
			held[id] = data
		}
		return held
	}
	if dir := os.Getenv(readOnlyEnv); dir != "" {
		losesItsFileSystem(t, dir, some())
		return
	}
	d := newDisk(t, image(t, 128))
	store := filepath.Join(d.mount, "store")
	trigger := filepath.Join("/sys/fs/ext4", filepath.Base(d.device), "trigger_fs_error")
	if _, err := os.Stat(trigger); err != nil {
		testenv.Cannot(t, "no ext4 that can be told to have an error: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), readOnlyEnv+"="+store, triggerEnv+"="+trigger, fmt.Sprintf("DEIMOS_TEST_SEED=%d", seed))
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	d.detach()
	_ = exec.Command(testenv.Tool(t, "e2fsck", "e2fsprogs"), "-y", d.device).Run() // 1: it has mended something
	d.attach(t)
	v := open1(t, store, smallSegments())
	for id, data := range some() {
		mustHold(t, v, id, data)
		mustPut(t, v, id, data)
	}
	id, data := someChunk(rand.New(rand.NewPCG(seed, 1)), 50_000)
	mustPut(t, v, id, data)
	mustClose(t, v)
}

func losesItsFileSystem(t *testing.T, dir string, held map[chunk.ID][]byte) {
	v := open1(t, dir, smallSegments())
	for id, data := range held {
		mustPut(t, v, id, data)
	}
	if err := os.WriteFile(os.Getenv(triggerEnv), []byte("a test"), 0); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 2))
	var puts sync.WaitGroup
	for range 40 {
		id, data := someChunk(rng, 200_000) // enough for new logs
		puts.Go(func() {
			if err := v.Put(t.Context(), id, data); err == nil || wire.ProblemOf(err).Code != wire.CodeReadOnly {
				t.Errorf("a put where nothing can be written: %v", err)
			} else if strings.Contains(err.Error(), "free space") {
				t.Errorf("the reason is another: %v", err)
			}
		})
	}
	puts.Wait()
	for id, data := range held {
		mustHold(t, v, id, data)
	}
	if s := v.Stats(); s.ReadOnly == "" || s.Lost != 0 || s.Chunks != len(held) {
		t.Errorf("%+v", s)
	}
	for id := range held {
		mustFail(t, v.Drop(t.Context(), []chunk.ID{id}), wire.CodeReadOnly)
		break
	}
	if err := v.Close(); err == nil || !strings.Contains(err.Error(), "takes no writes") {
		t.Errorf("closed where nothing can be written: %v", err)
	}
}

// slowDisk is a disk that can be made to hang in every read and write: a loop device
// on a file of a process that is stopped.
func slowDisk(t *testing.T) (d *ownDisk, hang, answer func()) {
	t.Helper()
	backing := image(t, 192)
	daemon := testenv.Tool(t, "qemu-storage-daemon", "qemu-system-common")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		testenv.Cannot(t, "no FUSE here: %v", err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd := exec.Command(daemon, "--blockdev", "driver=file,node-name=n,filename="+backing,
		"--export", "type=fuse,id=e,node-name=n,writable=on,mountpoint="+disk)
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	send := func(sig syscall.Signal) {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() {
		send(syscall.SIGCONT)
		send(syscall.SIGTERM)
		<-ended
	})
	eventually(t, "the disk is there", func() bool {
		select {
		case err := <-ended:
			ended <- err
			testenv.Cannot(t, "qemu-storage-daemon makes no disk by FUSE: %v: %s", err, said.String())
		default:
		}
		info, err := os.Stat(disk)
		return err == nil && info.Size() > 0
	})
	d = newDisk(t, disk, cmd.Process.Pid)
	hang = func() {
		if _, err := fmt.Fprintln(d.guarded); err != nil {
			t.Fatal(err)
		}
		send(syscall.SIGSTOP)
	}
	return d, hang, func() { send(syscall.SIGCONT) }
}

// A disk that answers no read and no write, as one with a broken cable does for
// minutes, holds up nobody who has another; when it answers, all is as it was.
func TestADiskThatHangsHoldsUpNoOtherAndComesBack(t *testing.T) {
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 0))
	d, hang, answer := slowDisk(t)
	store := filepath.Join(d.mount, "store")
	wait := &hasty{least: 200 * time.Millisecond}
	opt := noFloor
	opt.Capacity, opt.SegmentBytes, opt.hooks.patience = 100<<20, 8<<20, wait.patience
	bad := open1(t, store, opt)
	patient := noFloor
	patient.Capacity = 50 << 20
	good := open1(t, t.TempDir(), patient)
	held := map[chunk.ID][]byte{}
	var onBoth chunk.ID
	var cold []chunk.ID
	for i := range 60 { // the last 30 of them or so are read by Open
		id, data := someChunk(rng, chunk.DefaultSize)
		mustPut(t, bad, id, data)
		if i < maxReaders+8 {
			cold = append(cold, id)
		}
		held[id] = data
		if i == 0 {
			onBoth = id
			mustPut(t, good, id, data)
		}
	}
	// What the kernel has in memory, no disk needs to give: it is mounted again.
	mustClose(t, bad)
	d.detach()
	d.attach(t)
	bad = open1(t, store, opt)
	s := NewSet(bad, good)
	t.Cleanup(answer) // before all is closed

	wait.hangs.Store(true)
	hang()
	var reads sync.WaitGroup
	for _, id := range cold { // more than are let through at once
		reads.Go(func() {
			if _, err := bad.Get(t.Context(), id); err == nil || wire.ProblemOf(err).Code != wire.CodeUnreachable {
				t.Errorf("a read of a disk that hangs: %v", err)
			}
		})
	}
	reads.Wait()
	id, data := someChunk(rng, 50_000)
	mustFail(t, bad.Put(t.Context(), id, data), wire.CodeUnreachable)
	for range 3 {
		id, data := someChunk(rng, 50_000)
		if where, err := s.Put(t.Context(), id, data); err != nil || where != good.ID() {
			t.Fatalf("put on %s: %v", where, err)
		}
		if got, err := s.Get(t.Context(), id); err != nil || !bytes.Equal(got, data) {
			t.Fatal(err)
		}
	}
	if got, err := s.Get(t.Context(), onBoth); err != nil || !bytes.Equal(got, held[onBoth]) {
		t.Fatalf("what lies on a good disk too: %v", err)
	}
	if err := s.CanTake(1000); err != nil {
		t.Fatal(err)
	}
	if stats := s.Stats(); stats[0].ReadOnly == "" || stats[0].Free != 0 || stats[1].ReadOnly != "" {
		t.Fatalf("%+v", stats)
	}
	if len(s.Lost()) != 0 {
		t.Fatal("what hangs is called lost")
	}

	wait.hangs.Store(false)
	answer()
	for id, data := range held { // who came before may have to be waited for
		eventually(t, "a chunk is read again", func() bool {
			got, err := bad.Get(t.Context(), id)
			return err == nil && bytes.Equal(got, data)
		})
	}
	eventually(t, "a chunk is taken again", func() bool { return bad.Put(t.Context(), id, data) == nil })
	mustClose(t, bad)
	bad = open1(t, store, opt)
	held[id] = data
	for id, data := range held {
		mustHold(t, bad, id, data)
	}
	mustClose(t, bad)
}

// leftEnv is where the volume lies, for the process that this test starts, and
// leftDevice is its loop device.
const (
	leftEnv    = "DEIMOS_TEST_STORE_LEFT"
	leftDevice = "DEIMOS_TEST_STORE_LEFT_DEVICE"
)

// limit makes a loop device answer for its first bytes alone, 0 means all: what is
// behind them cannot be read or written from then on.
func limit(t *testing.T, device string, bytes uint64) {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err == nil {
		info.Sizelimit = bytes
		for err = unix.EAGAIN; err == unix.EAGAIN; { // until nothing of it is in memory
			err = unix.IoctlLoopSetStatus64(int(f.Fd()), info)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A disk that leaves, and from then on has an error for each read and write, though it
// is mounted still: the volume says so and takes nothing more, calls nothing lost, and
// the process lives. When the disk is back, all is there.
func TestADiskThatLeavesUnderAVolume(t *testing.T) {
	seed := testenv.Seed(t)
	some := func() map[chunk.ID][]byte {
		rng, held := rand.New(rand.NewPCG(seed, 0)), map[chunk.ID][]byte{}
		for range 40 {
			id, data := someChunk(rng, 40_000+rng.IntN(60_000))
			held[id] = data
		}
		return held
	}
	if dir := os.Getenv(leftEnv); dir != "" {
		losesItsDisk(t, dir, some())
		return
	}
	d := newDisk(t, image(t, 128))
	store := filepath.Join(d.mount, "store")
	v := open1(t, store, smallSegments())
	for id, data := range some() {
		mustPut(t, v, id, data)
	}
	mustClose(t, v)
	d.detach() // nothing of it is in memory
	d.attach(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), leftEnv+"="+store, leftDevice+"="+d.device, fmt.Sprintf("DEIMOS_TEST_SEED=%d", seed))
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	d.detach()
	limit(t, d.device, 0)
	_ = exec.Command(testenv.Tool(t, "e2fsck", "e2fsprogs"), "-y", d.device).Run() // 1: it has mended something
	d.attach(t)
	v = open1(t, store, smallSegments())
	for id, data := range some() {
		mustHold(t, v, id, data)
	}
	id, data := someChunk(rand.New(rand.NewPCG(seed, 1)), 50_000)
	mustPut(t, v, id, data)
	mustClose(t, v)
}

func losesItsDisk(t *testing.T, dir string, held map[chunk.ID][]byte) {
	v := open1(t, dir, smallSegments())
	good := open1(t, t.TempDir(), smallSegments())
	s := NewSet(v, good)
	logs, err := filepath.Glob(filepath.Join(dir, chunksDir, "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range logs { // what was read at opening has to come from the disk again
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	limit(t, os.Getenv(leftDevice), 64<<10)
	unread := 0
	for id, data := range held {
		got, err := v.Get(t.Context(), id)
		switch {
		case err != nil:
			mustFail(t, err, wire.CodeUnreachable)
			unread++
		case !bytes.Equal(got, data):
			t.Error("other bytes are given for those of a chunk")
		}
	}
	if unread == 0 {
		t.Fatal("everything was read, from memory: this test tests nothing")
	}
	if st := v.Stats(); st.ReadOnly == "" || st.Lost != 0 || st.Chunks != len(held) {
		t.Errorf("%+v", st)
	}
	rng := rand.New(rand.NewPCG(testenv.Seed(t), 2))
	for range 20 {
		id, data := someChunk(rng, 100_000) // enough for new logs
		if err := v.Put(t.Context(), id, data); err == nil {
			t.Error("a receipt for what is on no disk")
		}
		if where, err := s.Put(t.Context(), id, data); err != nil || where != good.ID() {
			t.Fatalf("put on %s: %v", where, err)
		}
		mustHold(t, good, id, data)
	}
	if len(s.Lost()) != 0 {
		t.Errorf("lost are %v", s.Lost())
	}
	t.Logf("%d of %d could not be read; closed: %v", unread, len(held), v.Close())
	mustClose(t, good)
}
