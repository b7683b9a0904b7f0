package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// stopper is a program that takes until its input ends to stop.
type stopper struct{}

func (stopper) Run(ctx context.Context) error {
	fmt.Println("up")
	<-ctx.Done()
	time.Sleep(10 * time.Millisecond) // what else is done at the signal is done
	fmt.Println("stopping")
	_, err := io.Copy(io.Discard, os.Stdin)
	fmt.Println("stopped")
	return err
}

const asStopper = "CLI_TEST_STOPPER"

func TestASecondSIGTERMDoesNotKillAProgramThatStops(t *testing.T) {
	if os.Getenv(asStopper) != "" {
		os.Args = []string{"stopper", "run"}
		Main("stopper", func(err error) error { return err }, func(ctx context.Context, args []string) error {
			return Run(ctx, "stopper", "stops", &struct {
				Run stopper `cmd:""`
			}{}, args)
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), asStopper+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for _, want := range []string{"up", "stopping"} {
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("it says %q, want %q; %v", lines.Text(), want, cmd.Wait())
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	_ = in.Close()
	lines.Scan()
	said := lines.Text()
	if err := cmd.Wait(); err != nil || said != "stopped" {
		t.Errorf("after a second SIGTERM it said %q and ended with %v", said, err)
	}
}
