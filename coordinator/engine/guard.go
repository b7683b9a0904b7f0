package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// Reserve is how much of the disk of the state is left alone, in bytes. JetStream
// stops a stream for good when a write of it finds no space, and only a restart brings
// it back; so below this nothing is written here, and what is left is for what it
// writes by itself.
const Reserve = 8 << 20

// Room is nil, or an [ErrNoSpace] that says that nothing is written now.
func (e *Engine) Room() error {
	free, ok := e.Free()
	if !ok || free >= Reserve {
		return nil
	}
	return fmt.Errorf("%w: %d KiB of it are free, and below %d MiB nothing is written; free space there, then try again", ErrNoSpace, free>>10, Reserve>>20)
}

// written makes the error of a write: one that is late because the disk is full says so.
func (e *Engine) written(err error) error {
	if err != nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, jetstream.ErrNoStreamResponse)) {
		if full := e.Room(); full != nil {
			return errors.Join(full, err)
		}
	}
	return err
}

// guarded is JetStream that writes nothing below [Reserve]. What is deleted always may be.
type guarded struct {
	jetstream.JetStream
	e *Engine
}

func (g guarded) Publish(ctx context.Context, subject string, data []byte, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	if err := g.e.Room(); err != nil {
		return nil, err
	}
	ack, err := g.JetStream.Publish(ctx, subject, data, opts...)
	return ack, g.e.written(err)
}

type guardedKV struct {
	jetstream.KeyValue
	e *Engine
}

func (g guardedKV) write(f func() (uint64, error)) (uint64, error) {
	if err := g.e.Room(); err != nil {
		return 0, err
	}
	rev, err := f()
	return rev, g.e.written(err)
}

func (g guardedKV) Put(ctx context.Context, key string, value []byte) (uint64, error) {
	return g.write(func() (uint64, error) { return g.KeyValue.Put(ctx, key, value) })
}

func (g guardedKV) Create(ctx context.Context, key string, value []byte, opts ...jetstream.KVCreateOpt) (uint64, error) {
	return g.write(func() (uint64, error) { return g.KeyValue.Create(ctx, key, value, opts...) })
}

func (g guardedKV) Update(ctx context.Context, key string, value []byte, revision uint64) (uint64, error) {
	return g.write(func() (uint64, error) { return g.KeyValue.Update(ctx, key, value, revision) })
}

type guardedObjects struct {
	jetstream.ObjectStore
	e *Engine
}

func (g guardedObjects) PutBytes(ctx context.Context, name string, data []byte) (*jetstream.ObjectInfo, error) {
	if err := g.e.Room(); err != nil {
		return nil, err
	}
	info, err := g.ObjectStore.PutBytes(ctx, name, data)
	return info, g.e.written(err)
}
