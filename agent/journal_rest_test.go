package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
)

// TestAHundredThousandReportsStayBounded is the journal at its busiest, from
// compactors at rest: reports come in groups, are forgotten, and come again.
func TestAHundredThousandReportsStayBounded(t *testing.T) {
	reports := 100_000
	if testing.Short() {
		reports = 10_000
	}
	const group, kept = 500, 5_000
	dir := t.TempDir()
	j, err := openJournal(dir)
	if err != nil {
		t.Fatal(err)
	}
	report, expires := make([]byte, 600), time.Now().Add(time.Hour)
	order := func(n int) string { return fmt.Sprintf("01J%023d", n) }
	for n := 0; n < reports; n += group {
		writes := make([]*write, 0, 2*group)
		for i := n; i < n+group; i++ {
			pairs, err := (&write{}).keep(entry{Order: order(i), Seq: uint64(i), Expires: expires, Report: report})
			if err != nil {
				t.Fatal(err)
			}
			if i >= kept {
				pairs = append(pairs, pair{key: orderKey(order(i - kept))})
			}
			writes = append(writes, &write{durable: true, change: func(*badger.Txn) ([]pair, error) { return pairs, nil }})
		}
		if err := j.commit(writes...); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.close(); err != nil {
		t.Fatal(err)
	}
	if size := onDisk(t, dir); size > 48<<20 {
		t.Errorf("the journal takes %d MiB for %d MiB of reports", size>>20, j.bytes()>>20)
	}
	if j, err = openJournal(dir); err != nil {
		t.Fatal(err)
	}
	defer j.close()
	found := 0
	if err := j.each(func(entry) { found++ }); err != nil || found != kept {
		t.Errorf("%d of %d reports are there after opening again: %v", found, kept, err)
	}
}

// onDisk is what the tables of a journal take.
func onDisk(t *testing.T, dir string) (sum int64) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		sum += info.Size()
	}
	return sum
}
