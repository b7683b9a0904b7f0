package tour

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/internal/proc"
)

// stopLimit is how long a process of the fleet has to end in good order.
const stopLimit = 20 * time.Second

// cli runs "deimos" as an operator would and decodes its JSON into v, which may
// be nil for commands that print none.
func (t *tour) cli(ctx context.Context, v any, args ...string) error {
	if v != nil {
		args = append(args, "-o", "json")
	}
	raw, err := t.exec(ctx, "deimos", args...)
	if v != nil && len(raw) > 0 {
		if jerr := json.Unmarshal(raw, v); jerr != nil {
			return errors.Join(err, fmt.Errorf("\"deimos %s\" did not print JSON: %w", strings.Join(args, " "), jerr))
		}
	}
	return err
}

// exec runs one of our programs to its end and returns its standard output; its
// standard error becomes the error.
func (t *tour) exec(ctx context.Context, program string, args ...string) ([]byte, error) {
	r, err := t.starter.Run(ctx, proc.Command{
		Argv: append([]string{filepath.Join(t.bin, program)}, args...),
		Env:  []string{"DEIMOS_CONTEXT=" + t.path("coordinator", "operator.json")},
	})
	if err == nil && r.Code != 0 {
		said := r.Said()
		if said == "" {
			said = fmt.Sprintf("exit code %d", r.Code)
		}
		err = fmt.Errorf("\"%s %s\": %s", program, strings.Join(args, " "), said)
	}
	return r.Stdout, err
}
