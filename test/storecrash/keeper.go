package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/store"
	"github.com/deimos-edge/deimos/wire"
)

const askLimit = 2 * time.Minute // for one answer of the keeper

// keeper is the process that has the store, so that it can be killed. It does what
// it is asked over a unix socket, by net/rpc, any number of things at once.
type keeper struct {
	dir    string
	opt    store.Options
	mu     sync.RWMutex // held for writing while the volume is closed and opened again
	volume *store.Volume
}

// Stored is a chunk of the history: its bytes follow from these numbers.
type Stored struct {
	Seed uint64
	Size int
}

func (s Stored) bytes() []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], s.Seed)
	data := make([]byte, s.Size)
	_, _ = rand.NewChaCha8(seed).Read(data) // never fails
	return data
}

// Answer is how a request went: the code of a problem, or "".
type Answer struct {
	Code    string
	Reason  string
	Volume  string
	Segment int // after a put: the number of the newest segment
}

func (a *Answer) take(err error) {
	if err != nil {
		a.Code, a.Reason = wire.ProblemOf(err).Code, err.Error()
	}
}

// Put stores a chunk durably.
func (k *keeper) Put(s Stored, a *Answer) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	data := s.bytes()
	a.take(k.volume.Put(context.Background(), chunk.Sum(data), data))
	segments, err := filepath.Glob(filepath.Join(k.dir, "chunks", "*.seg"))
	for _, path := range segments {
		a.Segment = max(a.Segment, number(path))
	}
	return err
}

// Drop forgets chunks durably.
func (k *keeper) Drop(ids []chunk.ID, a *Answer) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	a.take(k.volume.Drop(context.Background(), ids))
	return nil
}

// Confirm reads a chunk; without an error it is durable.
func (k *keeper) Confirm(id chunk.ID, a *Answer) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	_, err := k.volume.Confirm(context.Background(), id)
	a.take(err)
	return nil
}

// Check reads everything.
func (k *keeper) Check(_ int, a *Answer) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	sum, err := k.volume.Check(context.Background())
	if err == nil && len(sum.Lost) > 0 {
		err = fmt.Errorf("of a disk without a fault %d chunks are lost: %s", len(sum.Lost), sum.Lost[0].Reason)
	}
	a.take(err)
	return nil
}

// Reopen closes the volume, if it is open, and opens it.
func (k *keeper) Reopen(_ int, a *Answer) (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.volume != nil {
		if err := k.volume.Close(); err != nil {
			return err
		}
	}
	if k.volume, err = store.Open(k.dir, k.opt); err == nil {
		a.Volume = k.volume.ID()
	}
	return err
}

// serveStore is the keeper's process. It ends by being killed.
func serveStore(socket, dir string) error {
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", socket)
	if err != nil {
		return err
	}
	server := rpc.NewServer()
	if err := server.RegisterName("Store", &keeper{dir: dir, opt: storeOptions()}); err != nil {
		return err
	}
	fmt.Println(ready)
	server.Accept(listener)
	return errors.New("the socket has ended")
}

// ready is what the keeper's process says when it listens.
const ready = "ready"

// storeOptions make short segments on a small volume, which is nearly full much of the
// time, so that dead bytes are given back all the time and without waiting.
func storeOptions() store.Options {
	return store.Options{Capacity: capacity, FloorBytes: -1, SegmentBytes: chunk.MaxSize}
}

const capacity = 40 << 20 // bytes

// kept is a keeper that runs.
type kept struct {
	process *proc.Process
	client  *rpc.Client
}

// startKeeper starts program as the keeper of the volume in dir.
func startKeeper(ctx context.Context, starter *proc.Starter, program, scratch, dir string, number int) (*kept, error) {
	socket := fmt.Sprintf("%s/keeper%d", scratch, number)
	p, err := starter.Start(ctx, proc.Command{Name: "the store", Argv: []string{program, "-keep", dir, "-socket", socket},
		Log: scratch + "/keeper.log", Ready: ready})
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		p.Kill()
		return nil, err
	}
	return &kept{p, rpc.NewClient(conn)}, nil
}

// ask returns an error only if there was no Answer.
func (k *kept) ask(ctx context.Context, what string, of any) (a Answer, err error) {
	call := k.client.Go("Store."+what, of, &a, make(chan *rpc.Call, 1))
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	select {
	case <-call.Done:
		return a, call.Error
	case <-ctx.Done():
		return Answer{}, fmt.Errorf("the store has not answered: %w", context.Cause(ctx)) // a may be written yet
	}
}

// kill ends it as nothing else does: at once.
func (k *kept) kill() {
	k.process.Kill()
	k.client.Close()
}

// lastSaid is for errors.
func lastSaid(scratch string) string {
	raw, err := os.ReadFile(scratch + "/keeper.log")
	if err != nil {
		return err.Error()
	}
	return string(raw[max(0, len(raw)-2000):])
}
