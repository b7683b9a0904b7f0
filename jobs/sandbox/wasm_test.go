package sandbox

import (
	"cmp"
	"os"
	"path/filepath"
	"testing"
)

// A small encoder of the WebAssembly binary format (WebAssembly Core 2.0,
// chapter 5), enough for hostile modules that no compiler would make.

// Opcodes and types that the modules below use.
const (
	i32     = 0x7f
	funcref = 0x70
	void    = 0x40 // empty block type

	opUnreachable = 0x00
	opLoop        = 0x03
	opIf          = 0x04
	opEnd         = 0x0b
	opBr          = 0x0c
	opCall        = 0x10
	opDrop        = 0x1a
	opI32Store    = 0x36
	opMemorySize  = 0x3f
	opMemoryGrow  = 0x40
	opI32Const    = 0x41
	opI32Eq       = 0x46
	opI32Sub      = 0x6b
	opI32DivS     = 0x6d
	opI32Shl      = 0x74
	opRefNull     = 0xd0
	opTable       = 0xfc // prefix; then 0x0f: table.grow
)

// wasm describes a module with one function, exported as _start, that may
// import one function of four i32 and one result.
type wasm struct {
	imported string // name in wasi_snapshot_preview1; its index is 0, and _start's is 1
	host     string // instead, a function of two i32 and one result, in deimos_v1
	from     string // module of that function, if it is another
	memory   uint32 // initial pages, 0: no memory
	table    bool   // one table of one funcref, without a maximum
	data     []byte // at address 0
	start    []byte // code of _start
	export   string // "" for _start
}

func (w wasm) encode() []byte {
	out := []byte("\x00asm\x01\x00\x00\x00")
	section := func(id byte, body ...byte) {
		out = append(append(append(out, id), leb(uint32(len(body)))...), body...)
	}
	section(1, cat(leb(3),
		[]byte{0x60, 0, 0},
		[]byte{0x60, 4, i32, i32, i32, i32, 1, i32},
		[]byte{0x60, 2, i32, i32, 1, i32})...)
	self := uint32(0)
	if w.imported != "" {
		section(2, cat(leb(1), name("wasi_snapshot_preview1"), name(w.imported), []byte{0, 1})...)
		self = 1
	}
	if w.host != "" {
		section(2, cat(leb(1), name(cmp.Or(w.from, hostModule)), name(w.host), []byte{0, 2})...)
		self = 1
	}
	section(3, 1, 0)
	if w.table {
		section(4, 1, funcref, 0, 1)
	}
	if w.memory > 0 {
		section(5, cat([]byte{1, 0}, leb(w.memory))...)
	}
	export := "_start"
	if w.export != "" {
		export = w.export
	}
	exports := cat(leb(1), name(export), []byte{0}, leb(self))
	section(7, exports...)
	body := cat([]byte{0}, w.start, []byte{opEnd})
	section(10, cat(leb(1), leb(uint32(len(body))), body)...)
	if len(w.data) > 0 {
		section(11, cat([]byte{1, 0, opI32Const, 0, opEnd}, leb(uint32(len(w.data))), w.data)...)
	}
	return out
}

// file writes the module where a worker can be given it.
func (w wasm) file(t testing.TB) string {
	t.Helper()
	return write(t, w.encode())
}

func write(t testing.TB, module []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "module.wasm")
	if err := os.WriteFile(path, module, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func leb(v uint32) []byte {
	var out []byte
	for {
		b := byte(v & 0x7f)
		if v >>= 7; v == 0 {
			return append(out, b)
		}
		out = append(out, b|0x80)
	}
}

// constant is i32.const v.
func constant(v int32) []byte {
	out := []byte{opI32Const}
	for {
		b := byte(v & 0x7f)
		v >>= 7
		if v == 0 && b&0x40 == 0 || v == -1 && b&0x40 != 0 {
			return append(out, b)
		}
		out = append(out, b|0x80)
	}
}

func name(s string) []byte { return append(leb(uint32(len(s))), s...) }

func cat(parts ...[]byte) []byte {
	var out []byte
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// forever repeats code.
func forever(code ...[]byte) []byte {
	return cat([]byte{opLoop, void}, cat(code...), []byte{opBr, 0, opEnd})
}

// orTrap traps if the i32 on the stack is -1.
func orTrap() []byte {
	return cat(constant(-1), []byte{opI32Eq, opIf, void, opUnreachable, opEnd})
}

// endless never ends and never calls out.
var endless = wasm{start: forever()}

// bomb writes 60,000 bytes at a time to a descriptor, for ever.
func bomb(fd int32) wasm {
	return wasm{
		imported: "fd_write", memory: 1,
		data: []byte{16, 0, 0, 0, 0x60, 0xea, 0, 0}, // one iovec: 60,000 bytes at 16
		start: forever(constant(fd), constant(0), constant(1), constant(8),
			[]byte{opCall, 0, opDrop}),
	}
}

// memoryBomb takes page after page, touches each, and traps when refused.
var memoryBomb = wasm{memory: 1, start: forever(
	constant(1), []byte{opMemoryGrow, 0}, orTrap(),
	// store at (memory.size-1)*64 KiB
	[]byte{opMemorySize, 0}, constant(1), []byte{opI32Sub}, constant(16), []byte{opI32Shl},
	constant(1), []byte{opI32Store, 2, 0},
)}
