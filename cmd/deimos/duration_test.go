package main

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestTimeSpansCanHaveDays(t *testing.T) {
	for text, want := range map[string]time.Duration{"2d": 48 * time.Hour, "1d12h": 36 * time.Hour, "0d": 0, "90m": 90 * time.Minute, "65535d": 65535 * day, "1.5h": 90 * time.Minute} {
		var d duration
		if err := d.UnmarshalText([]byte(text)); err != nil || time.Duration(d) != want {
			t.Errorf("%s: %s, %v", text, time.Duration(d), err)
		}
	}
	for _, text := range []string{"", "d", "-1d", "1dd", "-5m", "1d-5m", "70000d", "5", "1d5", "1.5d", "65535d2500000h"} {
		var d duration
		if err := d.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is taken for %s", text, d)
		}
	}
	for want, d := range map[string]time.Duration{"2d": 48 * time.Hour, "36h": 36 * time.Hour, "1h30m": 90 * time.Minute, "10s": 10 * time.Second, "20m": 20 * time.Minute, "1h0m1s": time.Hour + time.Second} {
		if got := duration(d).String(); got != want {
			t.Errorf("%s is said as %s", d, got)
		}
	}
}

// Whoever has learnt 2d at one command types it at the next.
func TestEveryTimeSpanTakesDays(t *testing.T) {
	c, _ := askable(t, http.StatusNotFound, map[string]string{"code": "not_found", "reason": "no"})
	for _, command := range []string{"token create --valid 2d", "operator create x --role viewer --valid 2d", "order send device.ping --all --life 2d", "log --since 2d",
		"order show aaaabbbbccccddddeeeeffff X --wait 2d", "release offer 1.0.0 --all --wait 2d"} {
		if err := typed(t, c, strings.Fields(command)...); err == nil || err.Error() != "no" {
			t.Errorf("%s: %v", command, err)
		}
	}
}
