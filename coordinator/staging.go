package coordinator

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/http"
	"sync"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/singleflight"

	"github.com/deimos-edge/deimos/coordinator/engine"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// staging is where chunks, modules and attachments wait between an operator and
// a device, for a day at most. It is a JetStream object store, so that any
// coordinator of the fleet can serve what another one took in, with a small
// memory cache before it, because what was just put is fetched next.
type staging struct {
	bucket jetstream.ObjectStore
	fill   singleflight.Group

	// Our own limit, because one that JetStream knows is space that it counts as
	// taken (see engine). Both may be left out.
	free func() (bytes int64, ok bool) // of the disk below the bucket
	most int64                         // bytes
	door sync.Mutex                    // guards arriving
	// arriving is what is being put and not in the bucket's size for sure.
	arriving int64

	mu    sync.Mutex
	bytes int64
	index map[string]*list.Element
	order *list.List // of *blob, most recently used first
	drops uint64     // how many there were
}

type blob struct {
	name string
	data []byte
}

const (
	stagingCache  = 64 << 20 // bytes
	maxModule     = 32 << 20 // bytes
	maxAttachment = 16 << 20 // bytes
)

func newStaging(bucket jetstream.ObjectStore) *staging {
	return &staging{bucket: bucket, index: make(map[string]*list.Element), order: list.New()}
}

// verifyBlob checks a chunk or a module against its id.
func verifyBlob(ref blobRef, data []byte) error {
	var got string
	switch ref.kind {
	case chunkBlob, servedBlob:
		if len(data) == 0 || len(data) > chunk.MaxSize {
			return fmt.Errorf("a chunk has 1 to %d bytes, this has %d", chunk.MaxSize, len(data))
		}
		got = chunk.Sum(data).String()
	case moduleBlob, listBlob:
		sum := sha256.Sum256(data)
		got = hex.EncodeToString(sum[:])
	}
	if got != ref.id {
		return fmt.Errorf("these bytes are %s %s, not %s", ref.kind, got, ref.id)
	}
	return nil
}

func attachmentName(order string) string { return "attachment/" + order }

// servedName is of the chunk that a device serves for an order: what came for another,
// or from another device, is no proof that this one has it.
func servedName(order string) string { return string(servedBlob) + "/" + order }

// listName is of the list of the parts of an input of a job order.
func listName(order, id string) string { return string(listBlob) + "/" + order + "/" + id }

// put keeps data, which belongs to the staging area from now on.
func (s *staging) put(ctx context.Context, name string, data []byte) error {
	done, err := s.admit(ctx, int64(len(data)))
	if err != nil {
		return err
	}
	defer done()
	if _, err := s.bucket.PutBytes(ctx, name, data); err != nil {
		err = engine.StoreError(err)
		if errors.Is(err, engine.ErrNoSpace) {
			return refuse(http.StatusInsufficientStorage, wire.CodeNoSpace, "%v", err)
		}
		return fmt.Errorf("staging %s: %w", name, err)
	}
	s.remember(name, data)
	return nil
}

// admit refuses what would leave too little of the disk: JetStream stops for
// good when there is nothing left, and then records cannot be written either.
// The bucket may have half of what it holds and what is free together.
func (s *staging) admit(ctx context.Context, size int64) (done func(), err error) {
	st, err := s.bucket.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("staging: %w", engine.StoreError(err))
	}
	s.door.Lock()
	defer s.door.Unlock()
	held, limit := int64(st.Size())+s.arriving, int64(math.MaxInt64)
	if s.most > 0 {
		limit = s.most
	}
	if s.free != nil {
		if free, ok := s.free(); ok {
			limit = min(limit, (int64(st.Size())+free)/2)
		}
	}
	if size > limit-held {
		return nil, refuse(http.StatusInsufficientStorage, wire.CodeNoSpace,
			"the coordinator has no room for %d bytes more: it holds %d MiB for devices and may hold %d MiB; free space on its disk, or wait until devices have fetched theirs",
			size, held>>20, limit>>20)
	}
	s.arriving += size
	return func() {
		s.door.Lock()
		defer s.door.Unlock()
		s.arriving -= size
	}, nil
}

// errNotStaged is returned for a blob that is not here, or not any more.
var errNotStaged = errors.New("not staged")

// get returns a blob whole. The bytes are shared: do not change them.
func (s *staging) get(ctx context.Context, name string) ([]byte, error) {
	if data, ok := s.recall(name); ok {
		return data, nil
	}
	v, err, _ := s.fill.Do(name, func() (any, error) {
		// Others wait for this too: it must not end with the first one's request.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
		defer cancel()
		s.mu.Lock()
		drops := s.drops
		s.mu.Unlock()
		data, err := s.bucket.GetBytes(ctx, name)
		if errors.Is(err, jetstream.ErrObjectNotFound) {
			return nil, errNotStaged
		}
		if err != nil {
			return nil, fmt.Errorf("staging %s: %w", name, err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if drops == s.drops { // or it may be what has gone meanwhile
			s.enter(name, data)
		}
		return data, nil
	})
	if err != nil {
		return nil, err
	}
	return v.([]byte), nil
}

// has tells whether a blob is here. Who cannot find out is told that it is.
func (s *staging) has(ctx context.Context, name string) bool {
	_, err := s.get(ctx, name)
	return !errors.Is(err, errNotStaged)
}

// drop forgets a blob; one that is not there is no error.
func (s *staging) drop(ctx context.Context, name string) error {
	err := s.bucket.Delete(ctx, name)
	s.mu.Lock() // after the bucket, or a read would bring it back into the cache
	s.drops++
	if e, ok := s.index[name]; ok {
		s.evict(e)
	}
	s.mu.Unlock()
	if err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) {
		return fmt.Errorf("staging %s: %w", name, err)
	}
	return nil
}

// names are those of all blobs.
func (s *staging) names(ctx context.Context) ([]string, error) {
	list, err := s.bucket.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("staging: %w", engine.StoreError(err))
	}
	names := make([]string, len(list))
	for i, o := range list {
		names[i] = o.Name
	}
	return names, nil
}

func (s *staging) recall(name string) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.index[name]
	if !ok {
		return nil, false
	}
	s.order.MoveToFront(e)
	return e.Value.(*blob).data, true
}

// remember puts a blob into the cache.
func (s *staging) remember(name string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enter(name, data)
}

// enter is remember with s.mu held.
func (s *staging) enter(name string, data []byte) {
	if e, ok := s.index[name]; ok {
		s.evict(e)
	}
	s.index[name] = s.order.PushFront(&blob{name, data})
	s.bytes += int64(len(data))
	for s.bytes > stagingCache && s.order.Len() > 1 {
		s.evict(s.order.Back())
	}
}

// evict drops a cache entry. s.mu is held.
func (s *staging) evict(e *list.Element) {
	b := s.order.Remove(e).(*blob)
	delete(s.index, b.name)
	s.bytes -= int64(len(b.data))
}
