package coordinator

import (
	"cmp"
	"context"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/deimos-edge/deimos/wire"
)

const (
	uploadBytes = 32 << 20 // of one device, of which uploads may be under way: four chunks and the longest attachment
	uploadWait  = 30 * time.Second
)

// uploads bounds what one device can have the coordinator hold of uploads that have
// not ended: they are taken in whole before they are looked at. What is more waits
// before a byte of it is read. The zero value is ready.
type uploads struct {
	wait time.Duration // 0: uploadWait

	mu sync.Mutex
	of map[wire.DeviceID]*uploadShare
}

type uploadShare struct {
	room  *semaphore.Weighted
	users int // that have or want some of it
}

// enter takes so much of a device's share, and gives it back when leave is called.
func (u *uploads) enter(ctx context.Context, d wire.DeviceID, bytes int64) (leave func(), err error) {
	bytes = min(bytes, uploadBytes)
	u.mu.Lock()
	if u.of == nil {
		u.of = make(map[wire.DeviceID]*uploadShare)
	}
	s := u.of[d]
	if s == nil {
		s = &uploadShare{room: semaphore.NewWeighted(uploadBytes)}
		u.of[d] = s
	}
	s.users++
	u.mu.Unlock()
	gone := func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if s.users--; s.users == 0 {
			delete(u.of, d)
		}
	}
	wait, cancel := context.WithTimeout(ctx, cmp.Or(u.wait, uploadWait))
	defer cancel()
	if s.room.Acquire(wait, bytes) != nil {
		gone()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, refuse(http.StatusTooManyRequests, "too_many", "device %s has %d MiB of uploads under way; end those first", d, uploadBytes>>20)
	}
	return func() {
		s.room.Release(bytes)
		gone()
	}, nil
}

// takeUpload reads the upload of a request, of limit bytes at most, when there is room
// for it, and does with it what keep does. The room is its own until then.
func (c *Coordinator) takeUpload(w http.ResponseWriter, r *http.Request, limit int64, keep func(data []byte) error) error {
	size := r.ContentLength
	if size < 0 || size > limit {
		size = 2 * limit // a buffer that grows to it
	}
	leave, err := c.uploads.enter(r.Context(), caller(r), size)
	if err != nil {
		return err
	}
	defer leave()
	data, err := readBody(w, r, limit)
	if err != nil {
		return err
	}
	if err := keep(data); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
