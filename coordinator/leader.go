package coordinator

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

// leader is what one of several coordinators does alone: who has the lease of that
// name. Another takes over when the lease ends, or is given back.
type leader struct {
	leases *table[lease]
	name   string
	self   string // of this coordinator's leases
	alone  bool   // nobody else can have the lease
	life   time.Duration
	now    func() time.Time
	log    *slog.Logger

	mu           sync.Mutex
	until, renew time.Time
}

// lead takes or keeps the lease.
func (l *leader) lead(ctx context.Context) bool {
	now := l.now()
	l.mu.Lock()
	fine, had := now.Before(l.renew), now.Before(l.until)
	l.mu.Unlock()
	if fine {
		return true
	}
	_, err := l.leases.change(ctx, l.name, func(v *lease, exists bool) error {
		if exists && v.By != l.self && v.Until.After(now) && !l.alone {
			return errTaken
		}
		*v = lease{By: l.self, Until: now.Add(l.life).UTC()}
		return nil
	})
	if err == nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.until, l.renew = now.Add(l.life), now.Add(l.life/3)
		return true
	}
	return had && !errors.Is(err, errTaken) // the store is away for a moment
}

// resign gives the lease back.
func (l *leader) resign(ctx context.Context) {
	err := l.leases.remove(context.WithoutCancel(ctx), l.name, func(v lease) bool { return v.By == l.self })
	if err != nil && !errors.Is(err, errNotFound) {
		l.log.Warn("what one coordinator does alone waits until the lease of this one ends", "lease", l.name, "error", err)
	}
}

// turn takes a lease as soon as no other coordinator has it, and returns what gives it
// back; errTaken if another has it until ctx ends.
func (r *repairs) turn(ctx context.Context, key string, life time.Duration) (done func(), err error) {
	for {
		changed, leave := r.leases.changed(key)
		err := r.leaseFor(ctx, key, life)
		if !errors.Is(err, errTaken) {
			leave()
			return func() { r.unlease(ctx, key) }, err
		}
		l, _ := r.leases.get(key)
		over := time.NewTimer(max(time.Second, l.Until.Sub(r.now()))) // of one that died
		select {
		case <-changed:
		case <-over.C:
		case <-ctx.Done():
		}
		over.Stop()
		leave()
		if ctx.Err() != nil {
			return nil, err
		}
	}
}
