package transfer

import (
	"context"
	"time"

	"golang.org/x/time/rate"
)

// Pace is the owner's rate for bulk, one for each direction and for all
// transfers together. It may be used, and set anew, by any number of goroutines.
//
// Bytes are paid for when they are read from the line or handed to it; who waits
// to pay is served in the order of asking, 16 KiB at a time. What the kernels
// buffer meanwhile is on the line sooner: a rate holds over some seconds, not
// within one.
type Pace struct{ up, down rate.Limiter }

const (
	paceStep = 16 << 10 // bytes that are paid for at once
	// paceAhead is what may be caught up with after a pause. It must be longer
	// than a sleep that comes late.
	paceAhead = time.Second / 8
)

// NewPace has no limit yet.
func NewPace() *Pace {
	p := &Pace{}
	p.Set(0, 0)
	return p
}

// Set changes the rates, in bytes a second; 0 is no limit. What waits already
// waits on as it was told.
func (p *Pace) Set(up, down int64) {
	setRate(&p.up, up)
	setRate(&p.down, down)
}

func setRate(l *rate.Limiter, bytes int64) {
	if bytes <= 0 {
		l.SetLimit(rate.Inf)
		return
	}
	l.SetBurst(max(paceStep, int(min(bytes, 1<<30)/int64(time.Second/paceAhead))))
	l.SetLimit(rate.Limit(bytes))
}

// line is what one attempt goes over: it is cut when no byte moves on it for too
// long, and it waits where its rate says so.
type line struct {
	timer *time.Timer
	stall time.Duration
	pace  *rate.Limiter // nil: none
}

// alive is called whenever a byte moves.
func (l *line) alive() { l.timer.Reset(l.stall) }

// pay waits until n bytes may be on the line. That is no stall.
func (l *line) pay(ctx context.Context, n int) error {
	if l.pace == nil || l.pace.Limit() == rate.Inf {
		return nil
	}
	l.timer.Stop()
	defer l.alive()
	for n > 0 {
		part := min(n, paceStep)
		if err := l.pace.WaitN(ctx, part); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return finally("the rate that is allowed does not let it through in time")
		}
		n -= part
	}
	return nil
}
