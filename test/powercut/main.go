// Command powercut cuts a device's power at thousands of moments, and looks each
// time whether everything that was promised is there.
//
// # How
//
// The image runs as a virtual machine whose only disk is package nbd's, with a
// real coordinator beside it. It boots for the first time, joins, stores
// and drops chunks, answers orders, runs jobs, takes a configuration, is reset, installs a
// firmware; then its power is cut. What the disk was asked to do is recorded in
// one order: writes, trims, flushes; and among them marks: what somebody outside the
// device came to know ([mark]). A mark comes later than the flush that it relies
// on, so it must hold for every cut behind it.
//
// Then the record is replayed. At each of many moments the disk is made as a
// disk with a volatile write cache may be after a cut (package blocks): everything
// before the last flush, and of what came after, anything: all, none, some,
// single sectors. The disk is opened as the device does it, by the same steps
// and mostly the same code, as far as both look at what is on it:
//
//   - the partition table, repaired as init does it;
//   - the EFI system partition, first as the boot loader finds it, by a reader of our
//     own, then mended as init does it: the boot loader is whole, and the firmware
//     that it would start is one of the two that were made, with all its bytes,
//     and not older than one that was confirmed;
//   - the data partition: e2fsck mends it, by its journal but for few cuts, and it mounts;
//   - the state: the same key, the membership, the configuration that was
//     reported; no file that is replaced as a whole is half;
//   - the journal: it opens, and knows each order whose report the coordinator
//     has, so that none is done twice;
//   - the chunks: the store opens, each with a receipt is there and has its hash,
//     and each that was reported as dropped is gone.
//
// Some of the cuts are booted: a machine gets the disk, and must be online as the
// same device, give back what it had a receipt for, and store something new.
//
// A check that never fails is none: the last disk of each recording is damaged in
// each of many ways, which must be seen ([damages]); and with -plant the agent gets
// a bug, a sync left out say, which the cuts must find ([plants]).
//
// # What it is told by
//
// It prints how many cuts there were, the seed, and the time. A cut that fails is
// named AT:SEED; -replay DIR -cut AT:SEED makes it again, alone. A recording cannot be
// made a second time, as a machine does not live the same life twice, so the one in
// which something failed is kept.
//
// # Not here
//
// Cuts while a repair after a cut is under way; disks that lie about a flush;
// power that comes back for moments. Two disks.
//
// It needs Linux, root (loop devices), e2fsck, QEMU for arm64, and what "make
// build" and "make qemu-images" build.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

type options struct {
	work
	dir    string // of the recording; "" for a new one that is removed if all is well
	replay bool   // there is a recording already
	points int
	boots  int
	only   string // one cut
	disk   string // file to leave the disk of that cut in
	plant  string // a bug to be found
}

func main() {
	if err := blocks.Alone(); err != nil {
		fmt.Fprintln(os.Stderr, "powercut:", err)
		os.Exit(1)
	}
	seed, err := testenv.ProgramSeed()
	if err != nil {
		fmt.Fprintln(os.Stderr, "powercut:", err)
		os.Exit(1)
	}
	o := options{}
	o.log = func(format string, args ...any) { fmt.Printf("       "+format+"\n", args...) }
	replay := flag.String("replay", "", "folder of a recording to replay")
	flag.StringVar(&o.dir, "record", "", "empty or new folder for the recording; default: one that is removed if all is well")
	flag.StringVar(&o.bin, "bin", "bin", "folder of our programs")
	flag.StringVar(&o.image, "image", "", "image of the disk; default: that of bin/image of the version that make builds")
	flag.StringVar(&o.firmware, "firmware", "", "newer firmware to install; default: that of bin/qemu-test of the version after it; \"none\" for none")
	flag.Uint64Var(&o.seed, "seed", seed, "seed of everything by chance; default: DEIMOS_TEST_SEED, or a new one")
	flag.IntVar(&o.points, "points", 6000, "how many cuts")
	flag.IntVar(&o.boots, "boots", 10, "how many of them to boot")
	flag.IntVar(&o.rounds, "rounds", 4, "how much work to record")
	flag.StringVar(&o.only, "cut", "", "only this cut, AT:SEED")
	flag.StringVar(&o.disk, "disk", "", "with -cut: leave its disk in this file, and do nothing else")
	flag.StringVar(&o.plant, "plant", "", "put this bug into the agent first, and fail unless a cut finds it: "+strings.Join(slices.Sorted(maps.Keys(plants)), ", "))
	flag.Parse()
	if *replay != "" {
		o.replay, o.dir = true, *replay
	}
	if err := o.built(); err != nil {
		fmt.Fprintln(os.Stderr, "powercut:", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "powercut:", err)
		os.Exit(1)
	}
}

// built fills in what make builds where nothing else is said.
func (o *options) built() error {
	out, err := exec.Command("make", "-s", "versions").Output()
	if err != nil {
		return fmt.Errorf("make does not tell which versions it builds; run this in the repository's root: %w", err)
	}
	versions := strings.Fields(string(out)) // ours, when it was released, the next one, ...
	if len(versions) < 3 {
		return fmt.Errorf("make tells %q as the versions that it builds", out)
	}
	o.version = versions[0]
	if o.image == "" {
		o.image = filepath.Join(o.bin, "image", "deimos-arm64-"+versions[0]+".img")
	}
	switch o.firmware {
	case "":
		o.firmware = filepath.Join(o.bin, "qemu-test", "deimos_"+versions[2]+".efi")
	case "none":
		o.firmware = ""
	}
	return nil
}

func run(ctx context.Context, o options) (err error) {
	made := o.dir == ""
	if made {
		if o.dir, err = os.MkdirTemp("", "deimos-powercut-"); err != nil {
			return err
		}
	} else if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	defer func() {
		if made && err == nil {
			err = os.RemoveAll(o.dir)
		} else if err != nil {
			err = fmt.Errorf("%w\nThe recording is in %s; again: go run ./test/powercut -replay %s", err, o.dir, o.dir)
		}
	}()
	fmt.Printf("powercut: seed %d\n", o.seed)
	if o.plant != "" {
		return findPlanted(ctx, o)
	}
	rec, err := recorded(ctx, o)
	if err != nil {
		return err
	}
	defer rec.Close()
	if o.only != "" {
		return one(ctx, rec, o)
	}
	out, err := replayAll(ctx, rec, o)
	if err := errors.Join(err, out.Err()); err != nil {
		return err
	}
	if err := tryChecks(rec); err != nil {
		return err
	}
	fmt.Printf("       each of %d sorts of damage is seen\n", len(damages))
	return bootSome(ctx, rec, o)
}

// recorded makes the recording, unless there is one to be replayed.
func recorded(ctx context.Context, o options) (*recording, error) {
	if !o.replay {
		began := time.Now()
		if err := record(ctx, o.work, o.dir); err != nil {
			return nil, fmt.Errorf("the recording failed: %w", err)
		}
		fmt.Printf("       recorded in %s\n", sinceNow(began))
	}
	rec, err := load(o.dir)
	if err == nil {
		fmt.Printf("       %s\n", rec)
	}
	return rec, err
}

// replayAll fails if not all cuts could be made; what they have found is in the outcome.
func replayAll(ctx context.Context, rec *recording, o options) (outcome, error) {
	cuts := blocks.Plan(rec.Recording, o.points, o.seed)
	out, err := replay(ctx, rec, cuts, blocks.Workers())
	fmt.Printf("       %d cuts in %.0f s, seed %d; they would boot: %v; at %d the journal was not enough\n",
		out.Points, out.Took.Seconds(), o.seed, out.boots, out.Repaired)
	return out, err
}

// one makes a single cut.
func one(ctx context.Context, rec *recording, o options) error {
	c, err := rec.ParseCut(o.only)
	if err != nil {
		return err
	}
	if o.disk != "" {
		how, err := blocks.MakeDisk(rec.Recording, c, o.disk)
		fmt.Printf("       %s: %s\n", o.disk, how)
		return err
	}
	out, err := replay(ctx, rec, []blocks.Cut{c}, 1)
	if err = errors.Join(err, out.Err()); err == nil && o.boots > 0 {
		var after time.Duration
		after, err = bootCut(ctx, rec, c, o.bin)
		fmt.Printf("       online %.0f s after power on\n", after.Seconds())
	}
	return err
}

// bootSome boots the end of the record, and cuts spread over all of it from the
// moment on at which the device was a member.
func bootSome(ctx context.Context, rec *recording, o options) error {
	first := 0
	for i, e := range rec.Events {
		var m mark
		if e.Mark != nil && json.Unmarshal(e.Mark, &m) == nil && m.Device != "" {
			first = i + 1
			break
		}
	}
	rng := rand.New(rand.NewPCG(o.seed, 5))
	for k := range o.boots {
		c := blocks.Cut{At: len(rec.Events), Seed: rng.Uint64() >> 32}
		if k > 0 {
			lo, hi := blocks.Spread(first, len(rec.Events), k-1, o.boots-1)
			c.At = lo + rng.IntN(max(1, hi-lo))
		}
		after, err := bootCut(ctx, rec, c, o.bin)
		if err != nil {
			return fmt.Errorf("cut %s, booted: %w", c, err)
		}
		fmt.Printf("       boot %d of %d: cut %s is online after %.0f s, the same device\n", k+1, o.boots, c, after.Seconds())
	}
	return nil
}
