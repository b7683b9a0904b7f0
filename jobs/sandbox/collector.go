package sandbox

import (
	"errors"
	"io"
	"sync"
)

var errTooMuch = errors.New("more than allowed")

// budget is how much a worker may write.
type budget struct {
	limit int64         // bytes
	over  chan struct{} // closed when the limit is passed

	mu    sync.Mutex
	total int64
}

func newBudget(limit int64) *budget { return &budget{limit: limit, over: make(chan struct{})} }

// take is false once the limit is passed, for good.
func (b *budget) take(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.total > b.limit {
		return false
	}
	if b.total += int64(n); b.total > b.limit {
		close(b.over)
		return false
	}
	return true
}

func (b *budget) isOver() bool {
	select {
	case <-b.over:
		return true
	default:
		return false
	}
}

// collector takes what a worker writes, within a budget.
type collector struct {
	*budget
	tail int // keep the last so many bytes only; 0: keep all

	mu  sync.Mutex
	buf []byte
}

// Write implements io.Writer. It fails for good once the limit is passed, and
// with that ends the reading of the worker's pipe.
func (c *collector) Write(p []byte) (int, error) {
	if !c.take(len(p)) {
		return 0, errTooMuch
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = append(c.buf, p...)
	if c.tail > 0 && len(c.buf) > c.tail {
		c.buf = append(c.buf[:0], c.buf[len(c.buf)-c.tail:]...)
	}
	return len(p), nil
}

func (c *collector) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf
}

// metered passes on what a worker writes, within a budget.
type metered struct {
	*budget
	to io.Writer
}

func (m metered) Write(p []byte) (int, error) {
	if !m.take(len(p)) {
		return 0, errTooMuch
	}
	return m.to.Write(p)
}
