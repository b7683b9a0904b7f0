package coordinator

import (
	"context"

	"github.com/deimos-edge/deimos/wire"
)

// trust is how far new chunks may be entrusted to a device: 1 for one that
// nothing is known against, 0 for one that gets nothing new.
func (a *audits) trust(d wire.DeviceID) float64 { return 1 }

// distrusted tells whether what a device holds is to be held elsewhere, too.
func (a *audits) distrusted(d wire.DeviceID) bool { return a.trust(d) == 0 }

// confessed notes that a device has told of chunks that it lost before it was
// asked for them. The order is the one whose signed report says so.
func (a *audits) confessed(ctx context.Context, d wire.DeviceID, ids []string, order string) error {
	return nil
}
