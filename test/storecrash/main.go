// Command storecrash cuts the power of a chunk store at thousands of moments, and
// looks each time whether everything that was promised is there.
//
// # How
//
// The store runs in a process of its own ([keeper]), on a file system whose disk is
// recorded ([live.Disk]). It lives a long life by chance ([history]): chunks of 1 KiB
// to 4 MiB are put, put again, confirmed and dropped by up to 16 writers at once,
// small ones by 64; its segments are short and the volume nearly full, so that
// dead bytes are given back all the time; all is read through; it is closed and
// opened, or killed at work and started again. At the end it is killed for good.
//
// What the disk was asked to do is recorded in one order, and among it what the
// store's user came to know ([mark]): a receipt, a drop that has returned. Then
// package blocks makes the disk again as it may be after a cut at any moment, and
// it is opened as a device does it ([checker]):
//
//   - e2fsck mends the file system, and it must mount;
//   - the store opens, the same volume, and takes changes;
//   - each chunk with a receipt is there and has its hash, unless somebody had asked
//     to drop it by then; each drop that returned is one; everything else is whole, or
//     listed as lost, or not there; nothing is there that nobody stored;
//   - the figures of used and dead bytes are those of the files, to the byte;
//   - the volume takes a new chunk and gives it back. Of one cut in eight the volume
//     is as full as it was, and gives dead bytes back meanwhile; of one in eight its index
//     was taken away; of one in three or so it is closed, opened and looked through once more.
//
// A check that never fails is none: the last disk of each recording is damaged in
// several ways, which must be seen ([damages]); and with -plant the store gets a bug,
// which the cuts must find ([plants]).
//
// # What it is told by
//
// It prints how many cuts there were, the seed, and the time. A cut that fails is
// named AT:SEED; -replay DIR -cut AT:SEED makes it again, alone. The seed chooses
// what the writers do and where the cuts are, but not in which order the writes of
// several writers meet; so a recording in which something failed is kept.
//
// # Not here
//
// Cuts while a repair after a cut is under way; disks that lie about a flush, fail or
// hang, which are tests of package store; several volumes.
//
// It needs Linux, root (loop devices, FUSE), e2fsprogs and qemu-storage-daemon
// (Debian: qemu-system-common).
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/deimos-edge/deimos/internal/testenv"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

type options struct {
	dir    string // of the recording; "" for a new one that is removed if all is well
	replay bool   // there is a recording already
	seed   uint64
	rounds int
	points int
	only   string // one cut
	disk   string // file to leave the disk of that cut in
	plant  string // a bug to be found
}

func main() {
	keep := flag.String("keep", "", "be the store in this folder, for storecrash itself")
	socket := flag.String("socket", "", "with -keep: where to listen")
	replay := flag.String("replay", "", "folder of a recording to replay")
	seed, err := testenv.ProgramSeed()
	if err != nil {
		fmt.Fprintln(os.Stderr, "storecrash:", err)
		os.Exit(1)
	}
	var o options
	flag.StringVar(&o.dir, "record", "", "empty or new folder for the recording; default: one that is removed if all is well")
	flag.Uint64Var(&o.seed, "seed", seed, "seed of everything by chance; default: DEIMOS_TEST_SEED, or a new one")
	flag.IntVar(&o.points, "points", 10_000, "how many cuts")
	flag.IntVar(&o.rounds, "rounds", 6, "how long a life to record")
	flag.StringVar(&o.only, "cut", "", "only this cut, AT:SEED")
	flag.StringVar(&o.disk, "disk", "", "with -cut: leave its disk in this file, and do nothing else")
	flag.StringVar(&o.plant, "plant", "", "put this bug into the store first, and fail unless a cut finds it: "+strings.Join(slices.Sorted(maps.Keys(plants)), ", "))
	flag.Parse()
	if *replay != "" {
		o.replay, o.dir = true, *replay
	}
	if *keep != "" {
		err = serveStore(*socket, *keep)
	} else if err = blocks.Alone(); err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "storecrash:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	made := o.dir == ""
	if made {
		if o.dir, err = os.MkdirTemp("", "deimos-storecrash-"); err != nil {
			return err
		}
	} else if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	defer func() {
		if made && err == nil {
			err = os.RemoveAll(o.dir)
		} else if err != nil {
			err = fmt.Errorf("%w\nThe recording is in %s; again: go run ./test/storecrash -replay %s", err, o.dir, o.dir)
		}
	}()
	fmt.Printf("storecrash: seed %d\n", o.seed)
	rec, err := recorded(ctx, o)
	if o.plant != "" && errors.Is(err, errBroken) {
		fmt.Printf("       the planted bug %q is found by a kill, before any cut: %v\n", o.plant, err)
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rec.Close()) }()
	if o.only != "" {
		return one(ctx, rec, o)
	}
	cuts, err := plan(rec, o.points, o.seed)
	if err != nil {
		return err
	}
	out, err := replay(ctx, rec, cuts)
	fmt.Printf("       %d cuts in %.0f s, seed %d; at %d the journal was not enough\n", out.Points, out.Took.Seconds(), o.seed, out.Repaired)
	switch {
	case err != nil:
		return err
	case o.plant == "":
		if err := errors.Join(out.Err(), tryChecks(rec)); err != nil {
			return err
		}
		fmt.Printf("       each of %d sorts of damage is seen\n", len(damages)-1)
	case len(out.Failures) == 0:
		return fmt.Errorf("the planted bug %q was not found by %d cuts", o.plant, out.Points)
	default:
		fmt.Printf("       the planted bug %q is found, in %d of %d cuts, as by this one: %s\n", o.plant, len(out.Failures), out.Points, out.Failures[0])
	}
	return nil
}

// recorded makes the recording, unless there is one to be replayed.
func recorded(ctx context.Context, o options) (*blocks.Recording, error) {
	if !o.replay {
		began := time.Now()
		if err := record(ctx, o); err != nil {
			return nil, fmt.Errorf("the recording failed: %w", err)
		}
		fmt.Printf("       recorded in %.0f s\n", time.Since(began).Seconds())
	}
	rec, err := blocks.Load(o.dir)
	if err == nil {
		fmt.Printf("       %s\n", rec)
	}
	return rec, err
}

func record(ctx context.Context, o options) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if o.plant != "" {
		bug, ok := plants[o.plant]
		if !ok {
			return fmt.Errorf("there is no bug %q to plant", o.plant)
		}
		dir, err := os.MkdirTemp("", "deimos-plant-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		if program, err = build(ctx, bug, dir); err != nil {
			return err
		}
	}
	h := &history{program: program, seed: o.seed, rounds: o.rounds}
	return h.record(ctx, o.dir)
}

func replay(ctx context.Context, rec *blocks.Recording, cuts []blocks.Cut) (blocks.Outcome, error) {
	return blocks.Replay(ctx, rec, cuts, min(blocks.Workers(), len(cuts)), func(*blocks.Disk) blocks.Checker { return newChecker() })
}

// plan chooses n cuts: those of package blocks, and up to a quarter of them just after
// another segment has begun. There are few such moments.
func plan(rec *blocks.Recording, n int, seed uint64) ([]blocks.Cut, error) {
	const each = 8 // things that happen to the disk then
	rng := rand.New(rand.NewPCG(seed, 2))
	var near []blocks.Cut
	left := 0
	for i, e := range rec.Events {
		if left > 0 && e.Kind != blocks.Note {
			near = append(near, blocks.Cut{At: i, Seed: rng.Uint64() >> 32})
			left--
		}
		m, err := markOf(e)
		if err != nil {
			return nil, err
		}
		if m.Rotated {
			left = each
		}
	}
	if most := max(n/4, 1); len(near) > most { // not the first rotations alone
		rng.Shuffle(len(near), func(i, j int) { near[i], near[j] = near[j], near[i] })
		near = near[:most]
	}
	cuts := append(blocks.Plan(rec, n-len(near), seed), near...)
	slices.SortStableFunc(cuts, func(a, b blocks.Cut) int { return cmp.Compare(a.At, b.At) })
	return cuts, nil
}

// one makes a single cut.
func one(ctx context.Context, rec *blocks.Recording, o options) error {
	c, err := rec.ParseCut(o.only)
	if err != nil {
		return err
	}
	if o.disk != "" {
		how, err := blocks.MakeDisk(rec, c, o.disk)
		fmt.Printf("       %s: %s\n", c, how)
		return err
	}
	out, err := replay(ctx, rec, []blocks.Cut{c})
	if err = errors.Join(err, out.Err()); err == nil {
		fmt.Printf("       cut %s: all is well\n", c)
	}
	return err
}
