package panel

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	"periph.io/x/conn/v3/gpio"

	"github.com/deimos-edge/deimos/board"
)

// HoldForReset is how long the button is held at start.
const HoldForReset = 10 * time.Second

// resetUse is the use of a button that resets to factory.
const resetUse = "reset"

const (
	// sampleEvery is how often a button is looked at.
	sampleEvery = 20 * time.Millisecond
	// bounce is how many looks in a row a button must be found released, to be:
	// contacts bounce for a few milliseconds.
	bounce = 3
	// gap is the most that counts between two looks: what happened to the button
	// while the process stood still, nobody knows.
	gap = 5 * sampleEvery
	// answer is how long a GPIO controller may take to answer.
	answer = 2 * time.Second
)

// Held tells whether the button is pressed now and stays so for hold. It
// returns at once if it is not pressed, or there is none. feedback, if not nil,
// is told how long it has been held: at once, and after each second.
//
// What it decides cannot be undone, so in doubt it was not held: a line that
// cannot be read, or stops answering, is an error.
func Held(ctx context.Context, b board.Board, hold time.Duration, feedback func(time.Duration)) (bool, error) {
	if b.Button == nil || b.Button.Use != resetUse {
		return false, nil
	}
	if feedback == nil {
		feedback = func(time.Duration) {}
	}
	held, err := watch(ctx, b.Button.Line, openLine, hold, feedback)
	switch {
	case errors.Is(err, unix.EBUSY):
		return false, fmt.Errorf("the reset button cannot be read: the kernel or another program has its line: %w", err)
	case err != nil && ctx.Err() == nil:
		return false, fmt.Errorf("the reset button cannot be read: %w", err)
	}
	return held && err == nil, err
}

// look is what one look at the button found.
type look struct {
	pressed bool
	sure    bool // the line was found to obey after it was read
	err     error
}

// watch decides by looks that a goroutine takes, which a controller that hangs
// may keep.
func watch(ctx context.Context, l board.Line, open func(board.Line) (pin, error), hold time.Duration, feedback func(time.Duration)) (bool, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	looks, verify := make(chan look), make(chan struct{})
	go lookAt(ctx, l, open, looks, verify)

	first, err := receive(ctx, looks)
	if err != nil || !first.pressed {
		return false, err
	}
	feedback(0)
	var held, said time.Duration
	last, released := time.Now(), 0
	for held < hold {
		found, err := receive(ctx, looks)
		if err != nil {
			return false, err
		}
		if released++; found.pressed {
			released = 0
		}
		if released == bounce {
			return false, nil
		}
		now := time.Now()
		held += min(now.Sub(last), gap)
		last = now
		if s := held.Truncate(time.Second); s > said {
			said = s
			feedback(said)
		}
	}
	close(verify)
	for {
		found, err := receive(ctx, looks)
		if err != nil || found.sure {
			return found.pressed, err
		}
	}
}

// receive waits for the next look, within a limit.
func receive(ctx context.Context, looks <-chan look) (look, error) {
	timer := time.NewTimer(answer)
	defer timer.Stop()
	select {
	case found := <-looks:
		return found, found.err
	case <-ctx.Done():
		return look{}, ctx.Err()
	case <-timer.C:
		return look{}, errors.New("its GPIO controller does not answer")
	}
}

// lookAt has the line and looks until ctx ends. The library reads a line that
// fails as low, which can mean pressed. So once verify is closed the line is
// configured again after it was read: that fails if it does not obey.
func lookAt(ctx context.Context, l board.Line, open func(board.Line) (pin, error), looks chan<- look, verify <-chan struct{}) {
	p, err := open(l)
	if err == nil {
		defer closePin(p)
		err = p.In(pull(l), gpio.NoEdge)
	}
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		found := look{err: err}
		if err == nil {
			found.pressed = p.Read() == level(l, true)
		}
		select {
		case <-verify:
			found.sure = true
			if err == nil {
				found.err = p.In(pull(l), gpio.NoEdge)
			}
		default:
		}
		select {
		case looks <- found:
		case <-ctx.Done():
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
