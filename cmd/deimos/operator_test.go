package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

// askable is a coordinator that answers every call alike, and a count of the calls.
func askable(t *testing.T, status int, body any) (*commands, *int) {
	t.Helper()
	asked := new(int)
	return answering(t, func(w http.ResponseWriter, _ *http.Request) {
		*asked++
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(body)
	}), asked
}

// answering is a coordinator that answers by a function.
func answering(t *testing.T, answer http.HandlerFunc) *commands {
	t.Helper()
	srv := httptest.NewTLSServer(answer)
	t.Cleanup(srv.Close)
	at := api.Context{URL: srv.URL, Token: "t", CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))}
	raw, err := json.Marshal(at)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "operator.json")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return &commands{Context: path}
}

func TestAContextFileIsPrivateAndOverwritesNothing(t *testing.T) {
	out := filepath.Join(t.TempDir(), "carol.json")
	create := operatorCreateCmd{Name: "carol", Role: "viewer", Valid: duration(time.Hour), Out: out}

	refusing, _ := askable(t, http.StatusConflict, map[string]string{"code": "exists", "reason": "there is one"})
	if err := create.Run(t.Context(), refusing); err == nil {
		t.Error("a refusal is no error")
	}
	if _, err := os.Lstat(out); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file is left for a token that was not made: %v", err)
	}

	good, asked := askable(t, http.StatusOK, api.OperatorToken{Operator: api.Operator{Name: "carol"}, Token: "secret"})
	if err := create.Run(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(out)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", info, err)
	}
	at, err := api.LoadContext(out)
	if err != nil || at.Token != "secret" {
		t.Errorf("%+v %v", at, err)
	}

	before := *asked
	for _, name := range []string{out, dangling(t)} {
		create.Out = name
		var e *cli.Error
		if err := create.Run(context.Background(), good); !errors.As(err, &e) || e.Code != cli.ExitNoCreate {
			t.Errorf("%s: %v", name, err)
		}
	}
	if *asked != before {
		t.Error("a token was made that cannot be kept")
	}
	if again, err := api.LoadContext(out); err != nil || again != at {
		t.Errorf("the file was touched: %+v %v", again, err)
	}
}

// dangling is a link to a file that is not there.
func dangling(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Join(t.TempDir(), "other"), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// Nobody is there to say yes where a script or a service runs.
func TestRetiringWithoutATerminalWantsYes(t *testing.T) {
	c, asked := askable(t, http.StatusOK, api.Device{})
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	stdin := os.Stdin
	os.Stdin = null
	defer func() { os.Stdin = stdin }()
	retire := deviceRetireCmd{ID: "aaaabbbbccccddddeeeeffff"}
	var e *cli.Error
	if err := retire.Run(t.Context(), c); !errors.As(err, &e) || e.Code != cli.ExitUsage || *asked != 0 {
		t.Errorf("%v after %d calls", err, *asked)
	}
	retire.Yes = true
	if err := retire.Run(t.Context(), c); err != nil || *asked != 1 {
		t.Errorf("%v after %d calls", err, *asked)
	}
}
