package coordinator

import (
	"sync"
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// What one device may say in a second, and at once. An honest one that comes back
// with a full journal sends 64 reports in 100 ms; beats and hellos are few. What
// is beyond is dropped before it costs a signature check or a look into a bucket,
// and an honest device says it again.
const (
	hearRate  = 700
	hearBurst = 2000
)

// complaints are what the log says about devices that misbehave: one line a
// minute about each, however often they do.
type complaints struct {
	mu     sync.Mutex
	of     map[wire.DeviceID]*complaint
	pruned time.Time
}

type complaint struct {
	said  time.Time // the last line
	times int       // since
}

const complainEvery = time.Minute

// add counts one more. It is how many there were since the last line if it is
// time for another, or else 0.
func (c *complaints) add(d wire.DeviceID, now time.Time) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of == nil {
		c.of = make(map[wire.DeviceID]*complaint)
	}
	if now.Sub(c.pruned) >= complainEvery {
		c.pruned = now
		for id, v := range c.of {
			if now.Sub(v.said) >= 2*complainEvery {
				delete(c.of, id)
			}
		}
	}
	v := c.of[d]
	if v == nil {
		v = &complaint{}
		c.of[d] = v
	}
	v.times++
	if now.Sub(v.said) < complainEvery {
		return 0
	}
	n := v.times
	v.said, v.times = now, 0
	return n
}
