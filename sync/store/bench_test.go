package store

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dgraph-io/badger/v4"

	"github.com/deimos-edge/deimos/sync/chunk"
)

// BenchmarkDurablePut compares puts of 1 MiB chunks with a plain file that is
// appended to and synced as often, hashing included, in the same run.
func BenchmarkDurablePut(b *testing.B) {
	data := make([]byte, chunk.DefaultSize)
	rng := rand.NewChaCha8([32]byte{})
	rng.Read(data)
	for _, writers := range []int{1, 4, 16} {
		var syncs int64
		b.Run(fmt.Sprintf("writers=%d/store", writers), func(b *testing.B) {
			syncs = benchStore(b, data, writers)
		})
		if b.N == 0 || syncs == 0 {
			continue
		}
		b.Run(fmt.Sprintf("writers=%d/plain-file", writers), func(b *testing.B) {
			benchFile(b, data, writers)
		})
	}
}

// benchStore returns how many puts shared a sync, on average, at least 1.
func benchStore(b *testing.B, data []byte, writers int) int64 {
	var syncs atomic.Int64
	opt := noFloor
	opt.hooks.sync = func(db *badger.DB) error { syncs.Add(1); return db.Sync() }
	v := open1(b, b.TempDir(), opt)
	var next atomic.Int64
	// Put hashes, as the baseline does; what it is asked to check is known.
	ids := make([]chunk.ID, b.N)
	own := append([]byte{}, data...)
	for i := range ids {
		copy(own, fmt.Sprintf("%9d", i))
		ids[i] = chunk.Sum(own)
	}
	syncs.Store(0)
	b.SetBytes(int64(len(data)))
	b.ResetTimer()
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			// Put has returned nil before its bytes are changed for the next.
			own := append([]byte{}, data...)
			for {
				i := next.Add(1) - 1
				if i >= int64(b.N) {
					return
				}
				copy(own, fmt.Sprintf("%9d", i))
				if err := v.Put(b.Context(), ids[i], own); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/float64(syncs.Load()), "puts/sync")
	return max(1, int64(b.N)/syncs.Load())
}

func benchFile(b *testing.B, data []byte, every int) {
	f, err := os.Create(filepath.Join(b.TempDir(), "plain"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	own := append([]byte{}, data...)
	b.SetBytes(int64(len(data)))
	b.ResetTimer()
	for i := range b.N {
		copy(own, fmt.Sprintf("%9d", i))
		chunk.Sum(own)
		if _, err := f.Write(own); err != nil {
			b.Fatal(err)
		}
		if (i+1)%every == 0 || i == b.N-1 {
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkGet compares a verified get from the page cache with hashing alone.
func BenchmarkGet(b *testing.B) {
	data := make([]byte, chunk.DefaultSize)
	rand.NewChaCha8([32]byte{}).Read(data)
	id := chunk.Sum(data)
	b.Run("store", func(b *testing.B) {
		v := open1(b, b.TempDir(), noFloor)
		mustPut(b, v, id, data)
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			if _, err := v.Get(b.Context(), id); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("hash-alone", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			chunk.Sum(data)
		}
	})
}
