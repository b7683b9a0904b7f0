package coordinator

import (
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/wire"
)

// lateBody is a body that comes when it may.
type lateBody struct {
	may <-chan struct{}
	io.Reader
}

func (b *lateBody) Read(p []byte) (int, error) {
	<-b.may
	return b.Reader.Read(p)
}

// An operator's upload over a slow line, which takes longer to come than any call may,
// is taken in; a call that takes as long is not.
func TestAnOperatorsUploadMayTakeLongerThanACall(t *testing.T) {
	t.Parallel()
	const limit = 5 * time.Second // a handshake falls under it too
	w := openWith(t, t.TempDir(), func(c *Config) { c.readLimit = limit })
	t.Cleanup(w.Close)
	at, err := api.LoadContext(filepath.Join(w.dir, ContextFile))
	must(t, err)
	none := strings.Repeat("a", 64)
	for what, c := range map[string]struct {
		method, path, says string
	}{
		"a chunk":  {http.MethodPut, "/chunks/" + none, wire.CodeMismatch}, // all of it came: it is not what its name says
		"a module": {http.MethodPut, "/modules/" + none, wire.CodeMismatch},
		"a call":   {http.MethodPost, "/stripes", "timeout"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			may := make(chan struct{})
			time.AfterFunc(2*limit, func() { close(may) })
			req, err := http.NewRequestWithContext(testContext(t), c.method, w.URL()+v1+c.path, &lateBody{may, strings.NewReader(strings.Repeat(" ", 1000))})
			must(t, err)
			req.ContentLength = 1000
			req.Header.Set("Authorization", "Bearer "+at.Token)
			resp, err := w.plain(nil).Do(req)
			if err != nil {
				if c.says != "timeout" {
					t.Error(err)
				}
				return
			}
			raw, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if !strings.Contains(string(raw), c.says) {
				t.Errorf("%s %s", resp.Status, raw)
			}
		})
	}
}

// As many as four uploads of the largest chunk share the slowest line.
func TestTheLimitOfAnUploadIsThatOfTheSlowestLine(t *testing.T) {
	for size, want := range map[int64]time.Duration{
		-1:                0, // it is not told
		0:                 0,
		slowestLine:       4 * time.Second,
		chunk.MaxSize:     4 * chunk.MaxSize / slowestLine * time.Second,
		2 * chunk.MaxSize: 4 * chunk.MaxSize / slowestLine * time.Second,
	} {
		if got := uploadLimit(size); got != want {
			t.Errorf("%d bytes: %s, want %s", size, got, want)
		}
	}
}
