package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/beevik/ntp"
	"golang.org/x/sys/unix"
)

// clock sets the machine's clock, which dates files and log lines. The agent
// does not believe it further than its own floor, and trusts only what its
// coordinator signs; so NTP, which anybody on the network can forge, is a hint:
// it is never taken for a time before floor nor for one long after. Nothing that
// a hint has set moves the floor, and it is asked again every day: a time that was
// forged stays for as long as nobody answers truly, and drift is corrected.
type clock struct {
	floor time.Time // no time before it can be: the release, or what the agent knows for sure
	now   func() time.Time
	set   func(time.Time) error
	query func(server string) (*ntp.Response, error)
	log   *slog.Logger
}

const (
	ntpLimit   = 3 * time.Second // a server
	ntpRetry   = time.Minute
	ntpMost    = time.Hour
	ntpAgain   = 24 * time.Hour // after an answer
	nearEnough = 500 * time.Millisecond
	longAfter  = 10 * 365 * 24 * time.Hour // so much after the floor no device is switched on
)

// publicNTP is asked where neither the network nor the owner names a server.
var publicNTP = []string{"0.debian.pool.ntp.org", "1.debian.pool.ntp.org"}

// status is what we must know of the agent's [statusFile].
type status struct {
	Online      bool      `json:"online"`
	TimeAtLeast time.Time `json:"time_at_least"` // that it knew for sure; not of a clock that anybody can set
}

// readStatus is all zero if there is none that can be read.
func readStatus(path string) (s status) {
	raw, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(raw, &s) != nil {
		return status{}
	}
	return s
}

// newest is the later of the release and a time that the agent knew for sure.
func newest(release, sure time.Time) time.Time {
	if sure.After(release) {
		return sure
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

// follow asks until one server answers, and every day, until ctx ends.
func (c *clock) follow(ctx context.Context, servers func() []string) {
	for pause := ntpRetry; ; pause = min(2*pause, ntpMost) {
		next := pause
		if slices.ContainsFunc(servers(), func(s string) bool { return ctx.Err() == nil && c.hint(s) }) {
			next, pause = ntpAgain, ntpRetry
		}
		if !sleep(ctx, next) {
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
	if t.Before(c.floor) || t.After(c.floor.Add(longAfter)) {
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
