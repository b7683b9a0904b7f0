package debian

import (
	"slices"
	"strings"
	"testing"
)

func TestLockNamesEveryPackageOnce(t *testing.T) {
	lock, err := Locked()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	kernels := 0
	for _, p := range lock {
		if strings.HasPrefix(p.Name, KernelPrefix) {
			kernels++
			continue
		}
		names = append(names, p.Name)
	}
	if slices.Sort(names); !slices.Equal(names, wanted) || kernels != 1 {
		t.Errorf("the lock has %d kernels and %q, wanted are one and %q", kernels, names, wanted)
	}
	for _, line := range []string{"a 1", "a 1 ff", "../a 1 " + strings.Repeat("f", 64)} {
		if _, err := readLock(line); err == nil {
			t.Errorf("the lock took %q", line)
		}
	}
}
