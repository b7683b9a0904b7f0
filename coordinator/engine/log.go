package engine

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"golang.org/x/time/rate"
)

// serverLog gives nats-server's log lines to slog. What the server says of
// itself at start is for debugging; what it says of single connections is
// bounded, because strangers on the internet can cause it.
type serverLog struct {
	log   *slog.Logger
	limit *rate.Limiter // lines about connections

	mu      sync.Mutex
	dropped int
	fatal   error

	broken chan error // one, when a write has failed for good
}

func newServerLog(log *slog.Logger) *serverLog {
	return &serverLog{log: log, limit: rate.NewLimiter(5, 20), broken: make(chan error, 1)}
}

func (l *serverLog) Noticef(format string, v ...any) { l.say(slog.LevelDebug, format, v) }
func (l *serverLog) Debugf(format string, v ...any)  { l.say(slog.LevelDebug, format, v) }
func (l *serverLog) Tracef(format string, v ...any)  { l.say(slog.LevelDebug, format, v) }
func (l *serverLog) Warnf(format string, v ...any)   { l.say(slog.LevelWarn, format, v) }

func (l *serverLog) Errorf(format string, v ...any) {
	l.watch(format, v)
	l.say(slog.LevelError, format, v)
}

// watch finds out that nats-server has stopped a stream for good, which it tells
// nobody but its log.
func (l *serverLog) watch(format string, v []any) {
	text := fmt.Sprintf(format, v...)
	// No other line begins so: what a stranger can have logged does not.
	ours := strings.HasPrefix(text, "Filestore [") || strings.HasPrefix(text, "JetStream")
	if !ours || !strings.Contains(text, "ritical write error") && !strings.Contains(text, "will be DISABLED") {
		return
	}
	select {
	case l.broken <- fmt.Errorf("the coordinator's state cannot be written until the coordinator is started again, as after a full disk; see that its disk has room and is sound: %s", text):
	default: // the first is enough
	}
}

// Fatalf keeps what the server died of, for Start to return. It must not end
// the process.
func (l *serverLog) Fatalf(format string, v ...any) {
	err := fmt.Errorf(format, v...)
	for _, a := range v {
		if e, ok := a.(error); ok {
			err = fmt.Errorf("%s: %w", strings.TrimSuffix(err.Error(), ": "+e.Error()), e)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fatal == nil {
		l.fatal = err
	}
}

func (l *serverLog) died() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fatal
}

func (l *serverLog) say(level slog.Level, format string, v []any) {
	ctx := context.Background()
	if level == slog.LevelDebug {
		if l.log.Enabled(ctx, level) {
			l.log.Log(ctx, level, fmt.Sprintf(format, v...), "from", "nats-server")
		}
		return
	}
	text := fmt.Sprintf(format, v...)
	if !aboutConnection(text) {
		l.log.Log(ctx, level, text, "from", "nats-server")
		return
	}
	if uninteresting(text) {
		l.log.Log(ctx, slog.LevelDebug, text, "from", "nats-server")
		return
	}
	if !l.limit.Allow() {
		l.mu.Lock()
		l.dropped++
		l.mu.Unlock()
		return
	}
	l.mu.Lock()
	dropped := l.dropped
	l.dropped = 0
	l.mu.Unlock()
	l.log.Log(ctx, slog.LevelWarn, text, "from", "nats-server", "similar_dropped", dropped)
}

// aboutConnection tells a line about one client ("192.0.2.7:4711 - mid:12 -
// …") or one attempt to log in from one about the server.
func aboutConnection(text string) bool {
	return strings.Contains(text, " - mid:") || strings.Contains(text, " - cid:") || authCallout(text) ||
		strings.HasPrefix(text, "Could not register auth callout user")
}

// uninteresting lines are either anybody's doing, like a failed TLS handshake,
// or a repetition of what the auth callout has logged itself.
func uninteresting(text string) bool {
	return strings.Contains(text, "TLS handshake error") || authCallout(text) ||
		strings.Contains(text, "auth callout user: connection closed") ||
		strings.Contains(text, "authentication error") || strings.Contains(text, "unable to connect: authentication")
}

func authCallout(text string) bool {
	return strings.Contains(strings.ToLower(text), "auth callout service returned an error")
}
