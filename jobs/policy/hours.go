package policy

import (
	"fmt"
	"strings"
	"time"
)

// Hours are a part of each day, such as "22:00-06:00", by the machine's local
// time. The zero value is the whole day.
type Hours struct{ from, to int } // minutes after midnight

// UnmarshalText reads "22:00-06:00"; "" is the whole day.
func (h *Hours) UnmarshalText(text []byte) error {
	*h = Hours{}
	if len(text) == 0 {
		return nil
	}
	begin, end, _ := strings.Cut(string(text), "-")
	from, err := time.Parse("15:04", begin)
	to, err2 := time.Parse("15:04", end)
	*h = Hours{from.Hour()*60 + from.Minute(), to.Hour()*60 + to.Minute()}
	if err != nil || err2 != nil || h.String() != string(text) || h.from == h.to {
		*h = Hours{}
		return fmt.Errorf("hours cannot be %.40q: they are like \"22:00-06:00\", two different times of the day from 00:00 to 23:59, or \"\" for the whole day", text)
	}
	return nil
}

// MarshalText is what UnmarshalText reads.
func (h Hours) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

func (h Hours) String() string {
	if h == (Hours{}) {
		return ""
	}
	return fmt.Sprintf("%02d:%02d-%02d:%02d", h.from/60, h.from%60, h.to/60, h.to%60)
}

// Closed is how long it takes from now, a local time, until the hours begin; 0
// within them.
func (h Hours) Closed(now time.Time) time.Duration {
	at := now.Hour()*60 + now.Minute()
	if h.from < h.to && at >= h.from && at < h.to || h.from > h.to && (at >= h.from || at < h.to) || h.from == h.to {
		return 0
	}
	y, m, d := now.Date()
	if at >= h.from {
		d++
	}
	return max(time.Minute, time.Date(y, m, d, h.from/60, h.from%60, 0, 0, now.Location()).Sub(now))
}
