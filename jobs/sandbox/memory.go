package sandbox

import (
	"github.com/tetratelabs/wazero/experimental"
	"golang.org/x/sys/unix"
)

// boundedMemory gives a module its linear memory: one private mapping of
// exactly the limit, which the kernel fills with zero pages as they are
// touched. wazero's own bound would do for the limit, but tells nobody that it
// was hit; without one, growing copies and takes several times the limit.
type boundedMemory struct {
	limit   int64
	region  []byte
	refused uint64 // bytes last asked for in vain, 0 if never
}

// Allocate implements [experimental.MemoryAllocator]. What the module declares
// as its maximum does not matter.
func (m *boundedMemory) Allocate(_, _ uint64) experimental.LinearMemory {
	if m.region == nil {
		// On failure the region stays empty, and every size is refused.
		m.region, _ = unix.Mmap(-1, 0, int(m.limit), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	}
	return m
}

// Reallocate implements [experimental.LinearMemory].
func (m *boundedMemory) Reallocate(size uint64) []byte {
	if size > uint64(len(m.region)) {
		m.refused = size
		return nil
	}
	return m.region[:size:size]
}

// Free implements [experimental.LinearMemory]: the process ends soon.
func (m *boundedMemory) Free() {}
