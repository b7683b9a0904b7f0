package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// duration is the value of every flag that is a time span. Other than Go's it can
// have days, as in 90d or 1d12h, and is not negative.
type duration time.Duration

func (d *duration) UnmarshalText(text []byte) error {
	rest, sum := string(text), time.Duration(0)
	bad := fmt.Errorf("%q is no time span: it looks like 90d, 1d12h, 12h or 30m", rest)
	if days, after, ok := strings.Cut(rest, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16) // 179 years: it cannot overflow
		if err != nil {
			return bad
		}
		if rest, sum = after, time.Duration(n)*day; rest == "" {
			*d = duration(sum)
			return nil
		}
	}
	v, err := time.ParseDuration(rest)
	if err != nil || v < 0 || sum+v < 0 {
		return bad
	}
	*d = duration(sum + v)
	return nil
}

const day = 24 * time.Hour

// String says it to a person: in days where they are whole.
func (d duration) String() string {
	v := time.Duration(d)
	if v >= day && v%day == 0 {
		return fmt.Sprintf("%dd", v/day)
	}
	s := v.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func (d duration) seconds() int64 { return int64(time.Duration(d) / time.Second) }
