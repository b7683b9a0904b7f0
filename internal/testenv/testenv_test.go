package testenv

import (
	"runtime"
	"testing"
)

// recorder is a test that notes how it was ended.
type recorder struct {
	testing.TB
	ended string
}

func (r *recorder) Helper() {}

func (r *recorder) Skip(...any) { r.ended = "skipped"; runtime.Goexit() }

func (r *recorder) Fatalf(string, ...any) { r.ended = "failed"; runtime.Goexit() }

func TestWhatIsLackingFailsUnderCIAndIsLeftOutElsewhere(t *testing.T) {
	for ci, want := range map[string]string{"": "skipped", "true": "failed"} {
		t.Setenv("CI", ci)
		r := &recorder{TB: t}
		done := make(chan struct{})
		go func() { defer close(done); Tool(r, "no-such-program", "nothing") }()
		<-done
		if r.ended != want {
			t.Errorf("with CI=%q the test is %q, want %s", ci, r.ended, want)
		}
	}
}

func TestASeedIsTheOneThatIsGivenOrANewOne(t *testing.T) {
	t.Setenv(seedEnv, "18446744073709551615")
	if got := Seed(t); got != 1<<64-1 {
		t.Errorf("given 2^64-1: %d", got)
	}
	t.Setenv(seedEnv, "")
	if a, b := Seed(t), Seed(t); a == b {
		t.Errorf("not given: %d twice", a)
	}
	t.Setenv(seedEnv, "0x7")
	if got, err := ProgramSeed(); err == nil {
		t.Errorf("given 0x7: %d", got)
	}
}
