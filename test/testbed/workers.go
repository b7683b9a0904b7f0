package testbed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/deimos-edge/deimos/agent"
	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/sync/transfer"
	"github.com/deimos-edge/deimos/wire"
)

// Workers makes simulated devices hold chunks, in memory, and do jobs: what a job
// makes of its input is [Toy].
type Workers struct {
	Slots int
	// Odd has a device do something else with a job; it may be nil. What it returns
	// is what the device says, unless ok is false.
	Odd func(ctx context.Context, device int, o wire.Order) (out []byte, err error, ok bool)
}

// Toy is what such a device makes of an input.
func Toy(args []string, input []byte) []byte {
	h := sha256.New()
	fmt.Fprintln(h, strings.Join(args, " "))
	h.Write(input)
	return []byte(hex.EncodeToString(h.Sum(nil)) + "\n")
}

// workerRoom is the room that such a device has for chunks, in bytes.
const workerRoom = 64 << 20

// Does is for [agent.Simulation].
func (k Workers) Does(d agent.SimDevice) (map[wire.Kind]agent.Route, func(*wire.Beat)) {
	v := &worker{Workers: k, SimDevice: d, chunks: make(map[string][]byte)}
	v.move = &transfer.Client{HTTP: d.HTTP, Base: func() []string { return d.DataPlane }}
	const limit = time.Minute
	return map[wire.Kind]agent.Route{
		wire.KindChunkStore: {AtOnce: 4, Limit: limit, Handle: v.store},
		wire.KindChunkServe: {AtOnce: 4, Limit: limit, Handle: v.serve},
		wire.KindJobRun:     {AtOnce: k.Slots, Limit: limit, Handle: v.run},
	}, v.say
}

type worker struct {
	Workers
	agent.SimDevice
	move *transfer.Client

	mu     sync.Mutex
	chunks map[string][]byte
	used   int64
}

func (v *worker) say(b *wire.Beat) {
	v.mu.Lock()
	defer v.mu.Unlock()
	b.Capacity, b.Used = workerRoom, v.used
	b.Jobs = &wire.JobsState{Host: 1, Engine: sandbox.Engine(), Slots: v.Slots, MemoryBytes: 1 << 30, WallSeconds: 3600}
}

func (v *worker) store(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	b, err := wire.DecodeBody[wire.ChunkStore](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	var data bytes.Buffer
	if err := v.move.Fetch(ctx, b.URL, b.Size, &data); err != nil {
		return wire.Outcome{}, err
	}
	if chunk.Sum(data.Bytes()).String() != b.ID {
		return wire.Outcome{}, wire.FailedBecause(wire.CodeMismatch, "these bytes are another chunk")
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.chunks[b.ID] = data.Bytes()
	v.used += b.Size
	return wire.Outcome{Body: wire.Receipt{ID: b.ID, Size: b.Size, Volume: "memory"}}, nil
}

func (v *worker) held(id string) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	data, ok := v.chunks[id]
	if !ok {
		return nil, wire.FailedBecause(wire.CodeNotFound, "chunk %s is not here", id)
	}
	return data, nil
}

func (v *worker) serve(ctx context.Context, o wire.Order, _ func(wire.Progress)) (wire.Outcome, error) {
	b, err := wire.DecodeBody[wire.ChunkServe](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	data, err := v.held(b.ID)
	if err != nil {
		return wire.Outcome{}, err
	}
	return wire.Outcome{}, v.move.Put(ctx, b.URL, data, "application/octet-stream")
}

func (v *worker) run(ctx context.Context, o wire.Order, tell func(wire.Progress)) (wire.Outcome, error) {
	b, err := wire.DecodeBody[wire.JobRun](o)
	if err != nil {
		return wire.Outcome{}, err
	}
	var input []byte
	if b.Input != "" {
		if input, err = v.held(b.Input); err != nil {
			return wire.Outcome{}, err
		}
	}
	out := Toy(b.Args, input)
	if v.Odd != nil {
		if odd, err, ok := v.Odd(ctx, v.N, o); ok {
			if err != nil {
				return wire.Outcome{}, err
			}
			out = odd
		}
	}
	sum := sha256.Sum256(out)
	return wire.Outcome{Attachment: out, Body: wire.JobResult{Module: b.Module.SHA256, Input: b.Input, Output: hex.EncodeToString(sum[:]), OutputBytes: int64(len(out)), Engine: sandbox.Engine()}}, nil
}

// Simulate runs devices until stop is called, and waits until all are online and the
// coordinator knows what they can do.
func (f *Fleet) Simulate(n int, k Workers) (stop func()) {
	f.T.Helper()
	stop = f.simulate(n, k.Does)
	f.Until("the simulated devices saying what they can do", func() bool {
		list, err := f.Client.Devices(f.Ctx)
		if err != nil {
			return false
		}
		able := 0
		for _, d := range list {
			if d.Online && d.Jobs != nil {
				able++
			}
		}
		return able == n
	})
	return stop
}

// simulate runs devices of version 1.0.0 until stop is called, and waits until all are online.
func (f *Fleet) simulate(n int, does func(agent.SimDevice) (map[wire.Kind]agent.Route, func(*wire.Beat))) (stop func()) {
	f.T.Helper()
	ctx, cancel := context.WithCancel(f.Ctx)
	ended := make(chan error, 1)
	var online atomic.Int64
	sim := agent.Simulation{Coordinator: "https://" + f.HTTPS, Token: f.NewToken(n), Agents: n, Version: FirstVersion, Log: slog.New(slog.DiscardHandler), Does: does,
		Progress: func(st agent.SimState) { online.Store(int64(st.Online)) }}
	go func() { ended <- sim.Run(ctx) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			f.T.Errorf("the simulated devices: %v", err)
		}
	}
	f.Until("the simulated devices coming online", func() bool {
		select {
		case err := <-ended:
			f.T.Fatalf("the simulated devices: %v", err)
		default:
		}
		return online.Load() == int64(n)
	})
	return stop
}

// FirstVersion is what simulated devices run at first.
const FirstVersion = "1.0.0"
