package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// diskLooks lists the disks, and looks at each in a goroutine of its own. One that
// does not answer within the limit, such as a USB stick that is broken, is left out,
// which is said once: nothing else waits for it. It is listed again when it answers,
// and forgotten when it is gone.
type diskLooks struct {
	names func() []string
	look  func(name string) (blockDevice, error)
	limit time.Duration
	log   *slog.Logger
	loud  func(lines []string)

	mu     sync.Mutex          // guards what follows, and hangs of each look
	begun  map[string]*oneLook // that nobody has seen the end of
	silent int                 // how many of them hang
}

// oneLook is one look at one disk.
type oneLook struct {
	done  chan struct{} // closed when disk and err are there
	disk  blockDevice
	err   error
	hangs bool
}

// list takes the limit once for each disk that hangs; it can be called at any time.
func (l *diskLooks) list() (disks []blockDevice) {
	names := l.names()
	limit, cancel := context.WithTimeout(context.Background(), l.limit)
	defer cancel()
	for i, k := range l.begin(names) {
		if l.await(limit, names[i], k) && k.err == nil {
			disks = append(disks, k.disk)
		}
	}
	return disks
}

// begin looks at each disk, but at those that have not answered yet only once.
func (l *diskLooks) begin(names []string) (all []*oneLook) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, k := range l.begun {
		if !slices.Contains(names, name) {
			l.end(name, k)
		}
	}
	if l.begun == nil {
		l.begun = map[string]*oneLook{}
	}
	for _, name := range names {
		k := l.begun[name]
		if k == nil {
			k = &oneLook{done: make(chan struct{}), err: errors.New("a mistake in this program")}
			l.begun[name] = k
			go func() { // ends when the kernel gives the disk up, or the disk is gone
				defer close(k.done)
				guard(l.log, "looking at a disk", func() { k.disk, k.err = l.look(name) })
			}()
		}
		all = append(all, k)
	}
	return all
}

// end is called with the lock held.
func (l *diskLooks) end(name string, k *oneLook) {
	if l.begun[name] != k {
		return
	}
	delete(l.begun, name)
	if k.hangs {
		l.silent--
	}
}

// await tells whether a look has ended. One that hangs is not awaited again.
func (l *diskLooks) await(limit context.Context, name string, k *oneLook) bool {
	l.mu.Lock()
	hung := k.hangs
	l.mu.Unlock()
	if !hung {
		select {
		case <-k.done:
		case <-limit.Done():
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-k.done:
		l.end(name, k)
		if k.hangs {
			k.hangs = false
			l.log.Info("a disk answers again", "disk", name)
		}
		return true
	default:
	}
	if !k.hangs && l.begun[name] == k {
		k.hangs = true
		l.silent++
		l.log.Error("a disk does not answer, and is left out until it does; check its cable and its supply, or remove it", "disk", name, "waited", l.limit)
		l.loud([]string{"A DISK DOES NOT ANSWER: " + name, "The device goes on without it, if it can."})
	}
	return false
}

// someHang tells whether a disk is left out now.
func (l *diskLooks) someHang() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.silent > 0
}
