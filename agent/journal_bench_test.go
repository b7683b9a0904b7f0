package agent

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkPut is how many terminal reports a second reach the disk when so
// many orders end at once.
func BenchmarkPut(b *testing.B) {
	for _, writers := range []int{1, 16} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			j, err := openJournal(b.TempDir())
			if err != nil {
				b.Fatal(err)
			}
			defer j.close()
			report := make([]byte, 900) // a receipt, sealed
			expires := time.Now().Add(time.Hour)
			var next atomic.Int64
			var wg sync.WaitGroup
			b.ResetTimer()
			for range writers {
				wg.Go(func() {
					for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
						if err := j.put(entry{Order: fmt.Sprintf("01J%023d", n), Seq: uint64(n), Expires: expires, Report: report}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "puts/s")
		})
	}
}
