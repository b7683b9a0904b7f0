package engine

import (
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/deimos-edge/deimos/wire"
)

// benchWorld is an embedded engine below DEIMOS_BENCH_DIR, or the default place
// for temporary files, which may be no disk.
func benchWorld(b *testing.B, sync time.Duration) *world {
	b.Helper()
	w := newWorld(b)
	dir, err := os.MkdirTemp(os.Getenv("DEIMOS_BENCH_DIR"), "engine")
	must(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	w.cfg.Dir = filepath.Join(dir, "e")
	w.cfg.MQTTListen = "127.0.0.1:0"
	w.cfg.TLS = &tls.Config{Certificates: []tls.Certificate{w.ca.server(b)}, ClientCAs: w.ca.pool()}
	w.cfg.Sync = sync
	w.start(b)
	w.addr = w.MQTTAddr()
	return w
}

// BenchmarkKVPut is what an order costs the outbox: 1 KiB, one writer or
// sixteen. Its baseline is a plain file with an fsync for each record.
func BenchmarkKVPut(b *testing.B) {
	value := make([]byte, 1<<10)
	b.Run("baseline=file+fsync", func(b *testing.B) {
		f, err := os.CreateTemp(os.Getenv("DEIMOS_BENCH_DIR"), "baseline")
		must(b, err)
		defer os.Remove(f.Name())
		defer f.Close()
		measure(b, 1, func(int) error {
			if _, err := f.Write(value); err != nil {
				return err
			}
			return f.Sync()
		})
	})
	for _, sync := range []time.Duration{0, time.Second, time.Minute} {
		for _, writers := range []int{1, 16} {
			b.Run(fmt.Sprintf("sync=%s/writers=%d", sync, writers), func(b *testing.B) {
				w := benchWorld(b, sync)
				kv, err := w.KV(b.Context(), "outbox")
				must(b, err)
				measure(b, writers, func(i int) error {
					_, err := kv.Put(b.Context(), fmt.Sprintf("order.%d", i%5000), value)
					return err
				})
			})
		}
	}
}

// measure runs op from several goroutines and reports the median and the 99th
// percentile beside the mean.
func measure(b *testing.B, writers int, op func(i int) error) {
	b.Helper()
	var (
		mu    sync.Mutex
		all   []time.Duration
		group errgroup.Group
		queue = make(chan int)
	)
	b.ResetTimer()
	for range writers {
		group.Go(func() error {
			var mine []time.Duration
			for i := range queue {
				begun := time.Now()
				if err := op(i); err != nil {
					return err
				}
				mine = append(mine, time.Since(begun))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, mine...)
			return nil
		})
	}
	for i := range b.N {
		queue <- i
	}
	close(queue)
	must(b, group.Wait())
	b.StopTimer()
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "puts/s")
}

// BenchmarkFleetConnect connects a fleet at once, TLS and auth callout
// included, and then sends it an order each. The devices' side is in the same
// process and counts.
func BenchmarkFleetConnect(b *testing.B) {
	const fleet = 500
	for b.Loop() {
		b.StopTimer()
		w := benchWorld(b, time.Minute)
		devices := make([]device, fleet)
		for i := range devices {
			devices[i] = w.ca.device(b)
		}
		clients := make([]*client, fleet)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		b.StartTimer()

		begun := time.Now()
		var group errgroup.Group
		group.SetLimit(32)
		for i, d := range devices {
			group.Go(func() (err error) {
				if clients[i], err = w.tryConnect(d); err != nil {
					return err
				}
				return done(clients[i].Subscribe(wire.Topic(d.id, wire.ChannelOrder), 0, nil))
			})
		}
		must(b, group.Wait())
		b.ReportMetric(fleet/time.Since(begun).Seconds(), "connects/s")

		begun = time.Now()
		for _, d := range devices {
			must(b, w.Conn().Publish(wire.Subject(d.id, wire.ChannelOrder), []byte("do")))
		}
		for _, c := range clients {
			next(b, c.got, "the order")
		}
		b.ReportMetric(fleet/time.Since(begun).Seconds(), "orders/s")
		b.StopTimer()
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapInuse+after.StackInuse-before.HeapInuse-before.StackInuse)/fleet/1024, "KiB/device")
		for _, c := range clients {
			c.Disconnect(0)
		}
		must(b, w.Close())
		b.StartTimer()
	}
}
