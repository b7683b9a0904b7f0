package coordinator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// slowBucket gives its records one by one.
type slowBucket struct {
	jetstream.KeyValue
	updates chan jetstream.KeyValueEntry
	once    sync.Once
}

func (b *slowBucket) WatchAll(context.Context, ...jetstream.WatchOpt) (jetstream.KeyWatcher, error) {
	return b, nil
}
func (b *slowBucket) Updates() <-chan jetstream.KeyValueEntry { return b.updates }
func (b *slowBucket) Stop() error                             { b.once.Do(func() { close(b.updates) }); return nil }
func (b *slowBucket) Error() <-chan error                     { return nil }

type slowEntry struct {
	jetstream.KeyValueEntry
	n uint64
}

func (e slowEntry) Key() string                     { return fmt.Sprint("k", e.n) }
func (e slowEntry) Value() []byte                   { return []byte(`{"n":1}`) }
func (e slowEntry) Revision() uint64                { return e.n }
func (e slowEntry) Operation() jetstream.KeyValueOp { return jetstream.KeyValuePut }

// A month of orders takes longer than a minute to read.
func TestALongLoadSucceedsAndASilentOneDoesNot(t *testing.T) {
	for _, silent := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := &slowBucket{updates: make(chan jetstream.KeyValueEntry)}
			const records = 10
			go func() {
				for n := range uint64(records) {
					time.Sleep(loadIdle * 2 / 3)
					b.updates <- slowEntry{n: n + 1}
				}
				if !silent {
					b.updates <- nil
				}
			}()
			var said bytes.Buffer
			began := time.Now()
			tab, err := openTable(context.Background(), b, "note", nil, loggingTo[note](slog.New(slog.NewTextHandler(&said, nil))))
			if took := time.Since(began); took < startLimit {
				t.Errorf("it took %s, which proves nothing", took)
			}
			if silent {
				if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "after 10 of them") {
					t.Error(err)
				}
				return
			}
			must(t, err)
			tab.close()
			if n := len(tab.rows); n != records {
				t.Errorf("%d records", n)
			}
			if !strings.Contains(said.String(), `"reading note records" so_far=5`) {
				t.Errorf("%s", said.String())
			}
		})
	}
}
