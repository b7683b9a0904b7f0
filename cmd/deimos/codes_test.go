package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

func TestExitCodesTellWhatToCheck(t *testing.T) {
	good, _ := askable(t, http.StatusOK, []string{})
	at, err := api.LoadContext(good.Context)
	must(t, err)
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	as := func(change func(*api.Context)) *commands {
		v := at
		change(&v)
		raw, err := json.Marshal(v)
		must(t, err)
		path := filepath.Join(t.TempDir(), "operator.json")
		must(t, os.WriteFile(path, raw, 0o600))
		return &commands{Context: path}
	}
	for what, c := range map[string]struct {
		change func(*api.Context)
		code   int
		says   string
	}{
		"no authority":    {func(c *api.Context) { c.CA = "x" }, cli.ExitConfig, "authority"},
		"no address":      {func(c *api.Context) { c.URL = "https://" }, cli.ExitConfig, "looks like"},
		"another scheme":  {func(c *api.Context) { c.URL = "http://x:1" }, cli.ExitConfig, "looks like"},
		"no TLS":          {func(c *api.Context) { c.URL = strings.Replace(plain.URL, "http:", "https:", 1) }, cli.ExitNoServer, "TLS"},
		"another name":    {func(c *api.Context) { c.URL = strings.Replace(c.URL, "127.0.0.1", "localhost", 1) }, cli.ExitNoServer, "check the name"},
		"nobody is there": {func(c *api.Context) { c.URL = "https://127.0.0.1:1" }, cli.ExitNoServer, "is it running"},
	} {
		err := typed(t, as(c.change), "device", "list")
		if cli.CodeOf(err) != c.code || err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %d %v", what, cli.CodeOf(err), err)
		}
	}
	for _, args := range []string{"--beat 10ms", "--listen nowhere", "--mqtt :x", "--certificate-life 1s"} {
		wantUsage(t, typed(t, good, append([]string{"serve", "--dir", filepath.Join(t.TempDir(), "x")}, strings.Fields(args)...)...), args)
	}
	wantUsage(t, typed(t, good, "operator", "create", "carol", "--role", "viewer", "--url", "http://x"), "a URL without TLS")
}

func TestAPrintedPathIsOneWordOfTheShell(t *testing.T) {
	for _, path := range []string{"/plain/path-1", "/with space", "/it's", "/$(id)`x`", ""} {
		out, err := exec.Command("sh", "-c", "printf %s "+shellWord(path)).Output()
		if err != nil || string(out) != path {
			t.Errorf("%q is read as %q, %v", path, out, err)
		}
	}
}
