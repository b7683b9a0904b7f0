package sandbox

import (
	"errors"
	"sync"
)

var errTooMuch = errors.New("more than allowed")

// collector takes what a worker writes, up to a limit.
type collector struct {
	limit int64
	tail  int           // keep the last so many bytes only; 0: keep all
	over  chan struct{} // closed when the limit is passed

	mu    sync.Mutex
	total int64
	buf   []byte
}

func newCollector(limit int64, tail int) *collector {
	return &collector{limit: limit, tail: tail, over: make(chan struct{})}
}

// Write implements io.Writer. It fails for good once the limit is passed, and
// with that ends the reading of the worker's pipe.
func (c *collector) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total > c.limit {
		return 0, errTooMuch
	}
	c.total += int64(len(p))
	if c.total > c.limit {
		close(c.over)
		return 0, errTooMuch
	}
	c.buf = append(c.buf, p...)
	if c.tail > 0 && len(c.buf) > c.tail {
		c.buf = append(c.buf[:0], c.buf[len(c.buf)-c.tail:]...)
	}
	return len(p), nil
}

func (c *collector) isOver() bool {
	select {
	case <-c.over:
		return true
	default:
		return false
	}
}

func (c *collector) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf
}
