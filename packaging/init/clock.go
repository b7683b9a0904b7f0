package main

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/beevik/ntp"
	"golang.org/x/sys/unix"
)

// clock sets the machine's clock, which dates files and log lines. The agent
// does not believe it further than its own floor, and trusts only what its
// coordinator signs; so NTP, which anybody on the network can forge, is a hint:
// it is never taken for a time before floor, and once it was taken it is not
// asked again until the next boot. Slow drift is not corrected.
type clock struct {
	floor time.Time // no time before it can be: the release, or what the agent wrote last
	now   func() time.Time
	set   func(time.Time) error
	query func(server string) (*ntp.Response, error)
	log   *slog.Logger
}

const (
	ntpLimit   = 3 * time.Second // a server
	ntpRetry   = time.Minute
	ntpMost    = time.Hour
	nearEnough = 500 * time.Millisecond
	centuries  = 100 * 365 * 24 * time.Hour // nobody's clock is so much ahead of a release
)

// publicNTP is asked where neither the network nor the owner names a server.
var publicNTP = []string{"0.debian.pool.ntp.org", "1.debian.pool.ntp.org"}

// newest is the later of the release and the times of files that the agent writes.
func newest(release time.Time, files ...string) time.Time {
	for _, f := range files {
		if st, err := os.Stat(f); err == nil && st.ModTime().After(release) {
			release = st.ModTime()
		}
	}
	return release
}

// raise sets a clock that is behind the floor, such as that of a board without a
// battery, to the floor.
func (c *clock) raise() error {
	if !c.now().Before(c.floor) {
		return nil
	}
	c.log.Info("the clock is behind; it is set to the latest time that is known for sure", "clock", c.now().UTC(), "floor", c.floor.UTC())
	return c.set(c.floor)
}

// follow asks until one server answers, or ctx ends.
func (c *clock) follow(ctx context.Context, servers func() []string) {
	for pause := ntpRetry; ; pause = min(2*pause, ntpMost) {
		for _, s := range servers() {
			if ctx.Err() != nil || c.hint(s) {
				return
			}
		}
		if !sleep(ctx, pause) {
			return
		}
	}
}

func (c *clock) hint(server string) bool {
	r, err := c.query(server)
	if err == nil {
		err = r.Validate()
	}
	if err != nil {
		c.log.Debug("no time by NTP", "server", server, "error", err)
		return false
	}
	now := c.now()
	t := now.Add(r.ClockOffset)
	if t.Before(c.floor) || t.After(c.floor.Add(centuries)) {
		c.log.Warn("the time by NTP cannot be; it is not taken", "server", server, "time", t.UTC())
		return false
	}
	if r.ClockOffset.Abs() < nearEnough {
		return true
	}
	if err := c.set(t); err != nil {
		c.log.Warn("the clock cannot be set", "error", err)
		return true
	}
	c.log.Info("the clock was set by NTP", "server", server, "by", r.ClockOffset)
	return true
}

func setClock(t time.Time) error {
	tv := unix.NsecToTimeval(t.UnixNano())
	return unix.Settimeofday(&tv)
}

func askNTP(server string) (*ntp.Response, error) {
	return ntp.QueryWithOptions(server, ntp.QueryOptions{Timeout: ntpLimit})
}
