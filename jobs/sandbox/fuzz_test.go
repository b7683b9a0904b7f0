package sandbox

import (
	"context"
	"os"
	"testing"

	"github.com/tetratelabs/wazero"
)

// FuzzModule feeds any bytes to what a worker does with a module before it runs: it
// must end, as compiled code or as an error. That a worker which crashes takes nothing
// with it is another test. The guests that ship are among the seeds.
func FuzzModule(f *testing.F) {
	for _, w := range []wasm{endless, memoryBomb, bomb(1), {table: true}, {host: "checkpoint", memory: 1}, {from: "wasi", host: "thread-spawn"}} {
		f.Add(w.encode())
	}
	for _, path := range []string{sha256Module, hostedModule} {
		guest, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(guest[:min(len(guest), 64<<10)]) // a Go guest as a whole takes a second
	}
	f.Fuzz(func(t *testing.T, module []byte) {
		if len(module) > 256<<10 {
			return
		}
		rt, code, err := compileWith(module, wazero.NewRuntimeConfig())
		if err == nil {
			_ = imports(code, "")
			_ = code.ExportedFunctions()["_start"]
		}
		if err := rt.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
}
