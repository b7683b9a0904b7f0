package sandbox

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/tetratelabs/wazero"
	"github.com/tetratelabs/wazero/api"
	"golang.org/x/sys/unix"
)

// HostVersion is that of the host interface, and a part of the name by which
// modules import it: see [hostModule]. A function that was there stays as it was;
// what changes is another version, beside this one.
const HostVersion = 1

const (
	hostModule = "deimos_v1"

	// MaxCheckpoint bounds a checkpoint, in bytes, and the module's memory does.
	MaxCheckpoint = 64 << 20

	maxLog     = 1 << 10  // bytes of one message
	maxLogs    = 64 << 10 // bytes of all messages of a job
	maxLogText = "further messages of this job are left out"
)

// Numbers of errors, as WASI preview 1 has them.
const (
	errnoIO     = 29
	errnoTooBig = 22
)

// host is what modules find in deimos_v1, beside WASI:
//
//	progress(permille i32)
//	checkpoint(ptr, len i32) -> errno i32
//	restore(ptr, cap i32) -> i32
//	should_checkpoint() -> i32
//	input_size(name, name_len i32) -> i64
//	input_read(name, name_len i32, offset i64, ptr, len i32) -> i32
//	sha256(ptr, len, out i32)
//	log(level, ptr, len i32)
//
// A range that is not within the module's memory is a trap, as it would be for
// an instruction of the module.
type host struct {
	say      *json.Encoder // events
	inputs   *folder
	restored *input // the checkpoint that this run goes on from; nil: none
	control  []byte // one byte of shared memory, written by the parent: 1 asks for a checkpoint

	checkpoints io.Writer // to the parent
	answers     io.Reader // from it, a byte for each

	permille int32 // told last
	logged   int   // bytes of messages
}

// imports tells whether a module imports this function of the host interface, or
// any, if it is "".
func imports(code wazero.CompiledModule, function string) bool {
	return slices.ContainsFunc(code.ImportedFunctions(), func(f api.FunctionDefinition) bool {
		module, name, _ := f.Import()
		return module == hostModule && (function == "" || name == function)
	})
}

// offer makes the functions importable.
func (h *host) offer(ctx context.Context, rt wazero.Runtime) error {
	const i32, i64 = api.ValueTypeI32, api.ValueTypeI64
	b := rt.NewHostModuleBuilder(hostModule)
	add := func(name string, params, results []api.ValueType, f func(m api.Memory, p []uint64)) {
		b = b.NewFunctionBuilder().WithGoModuleFunction(api.GoModuleFunc(func(_ context.Context, m api.Module, stack []uint64) {
			f(m.Memory(), stack)
		}), params, results).Export(name)
	}
	add("progress", []api.ValueType{i32}, nil, func(_ api.Memory, p []uint64) { h.progress(int32(p[0])) })
	add("checkpoint", []api.ValueType{i32, i32}, []api.ValueType{i32}, func(m api.Memory, p []uint64) {
		p[0] = uint64(h.checkpoint(within(m, p[0], p[1])))
	})
	add("restore", []api.ValueType{i32, i32}, []api.ValueType{i32}, func(m api.Memory, p []uint64) {
		p[0] = uint64(uint32(h.restore(within(m, p[0], p[1]))))
	})
	add("should_checkpoint", nil, []api.ValueType{i32}, func(_ api.Memory, p []uint64) { p[0] = uint64(h.control[0] & 1) })
	add("input_size", []api.ValueType{i32, i32}, []api.ValueType{i64}, func(m api.Memory, p []uint64) {
		size := int64(-1)
		if in := h.inputs.inputs[string(within(m, p[0], p[1]))]; in != nil {
			size = in.size
		}
		p[0] = uint64(size)
	})
	add("input_read", []api.ValueType{i32, i32, i64, i32, i32}, []api.ValueType{i32}, func(m api.Memory, p []uint64) {
		n := int32(-1)
		buf := within(m, p[3], p[4])
		if in := h.inputs.inputs[string(within(m, p[0], p[1]))]; in != nil {
			if got, errno := in.readAt(buf[:min(len(buf), 1<<30)], int64(p[2])); errno == 0 {
				n = int32(got)
			}
		}
		p[0] = uint64(uint32(n))
	})
	add("sha256", []api.ValueType{i32, i32, i32}, nil, func(m api.Memory, p []uint64) {
		sum := sha256.Sum256(within(m, p[0], p[1]))
		copy(within(m, p[2], sha256.Size), sum[:])
	})
	add("log", []api.ValueType{i32, i32, i32}, nil, func(m api.Memory, p []uint64) {
		h.log(int(int32(p[0])), within(m, p[1], p[2]))
	})
	_, err := b.Instantiate(ctx)
	return err
}

var errOutside = errors.New("a host function was given memory that the module does not have")

// within is a range of the module's memory; the panic is a trap to wazero.
func within(m api.Memory, ptr, length uint64) []byte {
	if uint32(length) == 0 {
		return nil
	}
	if m != nil {
		if b, ok := m.Read(uint32(ptr), uint32(length)); ok {
			return b
		}
	}
	panic(errOutside)
}

// progress tells what is more than before.
func (h *host) progress(permille int32) {
	if permille = min(permille, 1000); permille > h.permille {
		h.permille = permille
		_ = h.say.Encode(event{Progress: permille}) // a parent that does not listen is about to kill
	}
}

// log passes a message on, while there have not been too many.
func (h *host) log(level int, text []byte) {
	if h.logged >= maxLogs {
		return
	}
	text = text[:min(len(text), maxLog)]
	h.logged += len(text) + 32
	e := event{Log: &logLine{Level: min(max(level, 0), 3), Text: strings.ToValidUTF8(string(text), "\uFFFD")}}
	if h.logged >= maxLogs {
		e.Log.Level, e.Log.Text = 2, maxLogText
	}
	_ = h.say.Encode(e)
}

// checkpoint hands data to the parent, and waits until it is durable.
func (h *host) checkpoint(data []byte) (errno uint32) {
	if len(data) > MaxCheckpoint {
		return errnoTooBig
	}
	var answer [1]byte
	w := bufio.NewWriter(h.checkpoints)
	_, _ = w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(data))))
	_, _ = w.Write(data)
	if w.Flush() != nil {
		return errnoIO
	}
	if _, err := io.ReadFull(h.answers, answer[:]); err != nil {
		return errnoIO
	}
	return uint32(answer[0])
}

// restore fills buf, if it is large enough.
func (h *host) restore(buf []byte) int32 {
	if h.restored == nil {
		return -1
	}
	if int64(len(buf)) >= h.restored.size {
		if _, errno := h.restored.readAt(buf[:h.restored.size], 0); errno != 0 {
			return -1
		}
	}
	return int32(h.restored.size)
}

// mapControl maps the page through which the parent speaks to the module.
func mapControl() ([]byte, error) {
	defer unix.Close(controlFD)
	return unix.Mmap(controlFD, 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
}
