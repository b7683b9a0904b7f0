package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestAVolumeThatIsNotThereIsAwayUntilItIsKnownToBeGone(t *testing.T) {
	now := time.Date(2026, 5, 4, 0, 0, 0, 0, time.UTC)
	two, one := map[string]string{"A": "/a", "B": "/b"}, map[string]string{"A": "/a"}
	for name, c := range map[string]struct {
		open  map[string]string
		after time.Duration
		sure  bool
		away  bool
	}{
		"not there":                            {one, time.Hour, true, true},
		"back":                                 {two, time.Hour, true, false},
		"back at another place":                {map[string]string{"A": "/a", "B": "/c"}, time.Hour, true, false},
		"another one in its place":             {map[string]string{"A": "/a", "C": "/b"}, time.Hour, true, false},
		"almost for the limit":                 {one, awayLimit - time.Hour, true, true},
		"for longer":                           {one, awayLimit + time.Hour, true, false},
		"for longer, by a clock nobody trusts": {one, awayLimit + time.Hour, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), seenFile)
			for range 2 { // what was noted is what a restart finds
				s, err := openSeen(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := s.note(two, now, true); err != nil || s.away != "" {
					t.Fatalf("%q, %v", s.away, err)
				}
				if s, err = openSeen(path); err != nil {
					t.Fatal(err)
				}
				if err := s.note(c.open, now.Add(c.after), c.sure); err != nil {
					t.Fatal(err)
				}
				if got := strings.Contains(s.away, "/b"); got != c.away || strings.Contains(s.away, "/a") {
					t.Errorf("away is %q", s.away)
				}
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func TestTheListOfVolumesIsWrittenOnceADay(t *testing.T) {
	path := filepath.Join(t.TempDir(), seenFile)
	s, err := openSeen(path)
	if err != nil {
		t.Fatal(err)
	}
	now, writes := time.Now(), 0
	for range 10 * 24 {
		now = now.Add(time.Hour)
		if err := s.note(map[string]string{"A": "/a"}, now, true); err != nil {
			t.Fatal(err)
		}
		if os.Remove(path) == nil {
			writes++
		}
	}
	if writes < 10 || writes > 11 {
		t.Errorf("%d writes in ten days", writes)
	}
}

func TestADamagedListOfVolumesKeepsNobodyFromStarting(t *testing.T) {
	path := filepath.Join(t.TempDir(), seenFile)
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := openSeen(path); err != nil || len(s.all) != 0 {
		t.Errorf("%v", err)
	}
}
