// Package testenv is what tests ask of the machine they run on: programs that not
// every machine has, and what only root may.
//
// On a developer's machine a test that lacks something is left out, as all others
// still tell much. Continuous integration is set up to have everything
// (scripts/setup), so there, with CI set, the test fails: one that is silently left
// out for ever protects nothing.
//
// Only tests import it, and what is below test, where the programs are tests, too.
package testenv

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"
)

// Cannot ends the test, which this machine cannot run for the given reason.
func Cannot(t testing.TB, format string, args ...any) {
	t.Helper()
	why := fmt.Sprintf(format, args...)
	if os.Getenv("CI") != "" {
		t.Fatalf("%s; with CI set nothing is left out", why)
	}
	t.Skip(why)
}

// Tool is the path of a program, looked for in PATH and where root's are, which not
// every PATH has. debian names the packages that have it.
func Tool(t testing.TB, name, debian string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	Cannot(t, "this machine has no %s (Debian: apt-get install %s)", name, debian)
	return ""
}

// Root is for what only root may do, in the words of why.
func Root(t testing.TB, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Cannot(t, "%s", why)
	}
}

// Seed is what a random test begins with: that of DEIMOS_TEST_SEED, or a new one.
// It is in the test's log.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed, err := ProgramSeed()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s=%d", seedEnv, seed)
	return seed
}

const seedEnv = "DEIMOS_TEST_SEED"

// ProgramSeed is [Seed] for a program, which has to say itself which it is.
func ProgramSeed() (uint64, error) {
	s := os.Getenv(seedEnv)
	if s == "" {
		return rand.Uint64(), nil
	}
	seed, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s is no number: %w", seedEnv, err)
	}
	return seed, nil
}
