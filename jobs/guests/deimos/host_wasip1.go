package deimos

import (
	"io"
	"os"
	"syscall"
	"unsafe"
)

//go:wasmimport deimos_v1 progress
func importProgress(permille int32)

//go:wasmimport deimos_v1 checkpoint
func importCheckpoint(state unsafe.Pointer, n uint32) int32

//go:wasmimport deimos_v1 restore
func importRestore(state unsafe.Pointer, room uint32) int32

//go:wasmimport deimos_v1 should_checkpoint
func importShouldCheckpoint() int32

//go:wasmimport deimos_v1 input_size
func importInputSize(name unsafe.Pointer, nameBytes uint32) int64

//go:wasmimport deimos_v1 input_read
func importInputRead(name unsafe.Pointer, nameBytes uint32, off int64, p unsafe.Pointer, n uint32) int32

//go:wasmimport deimos_v1 sha256
func importSHA256(data unsafe.Pointer, n uint32, digest unsafe.Pointer)

//go:wasmimport deimos_v1 log
func importLog(level int32, text unsafe.Pointer, n uint32)

func hostProgress(permille int32) { importProgress(permille) }

func hostCheckpoint(state []byte) error {
	if errno := importCheckpoint(at(state), uint32(len(state))); errno != 0 {
		return syscall.Errno(errno)
	}
	return nil
}

func hostRestore(state []byte) int { return int(importRestore(at(state), uint32(len(state)))) }

func hostShouldCheckpoint() bool { return importShouldCheckpoint() != 0 }

func hostInputSize(name string) int64 {
	return importInputSize(unsafe.Pointer(unsafe.StringData(name)), uint32(len(name)))
}

func hostInputRead(name string, off int64, p []byte) int {
	return int(importInputRead(unsafe.Pointer(unsafe.StringData(name)), uint32(len(name)), off, at(p), uint32(len(p))))
}

func hostSHA256(data []byte, digest *[32]byte) {
	importSHA256(at(data), uint32(len(data)), unsafe.Pointer(digest))
}

func hostLog(l Level, text string) {
	importLog(int32(l), unsafe.Pointer(unsafe.StringData(text)), uint32(len(text)))
}

func hostOpen(name string) (io.ReadCloser, error) { return os.Open("/in/" + name) }

func hostCreate(name string) (io.WriteCloser, error) {
	return os.OpenFile("/out/"+name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
}

func at(p []byte) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(p)) }
