package store

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ledger is the bytes of the value logs, to the last one: how long each log is
// and how much of it is records of chunks held. It is made when the volume opens,
// from the lengths of the files and a walk of the tree, which knows the log and
// the length of every record, and then follows the committer. Nothing of it is
// written down, so nothing of it can be wrong after a crash.
type ledger struct {
	newest uint32
	logs   map[uint32]*logSpace
	length int64 // sums over all logs
	live   int64
	chunks int64 // bytes of the chunks alone, in these records
}

type logSpace struct {
	length int64 // bytes written, header included
	live   int64 // of these, in records of chunks held
	going  bool  // Badger deletes it when nobody walks the tree any more
}

func (l *logSpace) dead() int64 { return l.length - logHeader - l.live }

// dead is the bytes that belong to no chunk held.
func (l *ledger) dead() int64 { return l.length - l.live - int64(len(l.logs))*logHeader }

// heads is what Badger adds to chunks in the logs.
func (l *ledger) heads() int64 { return l.length - l.dead() - l.chunks }

func (l *ledger) set(number uint32, length int64) {
	s := l.logs[number]
	if s == nil {
		s = &logSpace{}
		l.logs[number] = s
	}
	l.length += length - s.length
	s.length = length
	l.newest = max(l.newest, number)
}

// forget is for a log that is deleted.
func (l *ledger) forget(number uint32) {
	if s := l.logs[number]; s != nil {
		l.length -= s.length
		l.live -= s.live
		delete(l.logs, number)
	}
}

func (l *ledger) add(p place, size int64) { l.change(p, 1, size) }

func (l *ledger) remove(p place, size int64) { l.change(p, -1, size) }

func (l *ledger) change(p place, sign, size int64) {
	s := l.logs[p.log]
	if s == nil { // in the tree, or its log is gone
		return
	}
	s.live += sign * int64(p.length)
	l.live += sign * int64(p.length)
	l.chunks += sign * size
}

// follow brings the lengths of logs up to date after a write. Logs that Badger
// has left behind are cut to their length.
func (v *Volume) follow() {
	number, length := newestLog(v.db)
	v.mu.Lock()
	from := v.space.newest
	v.mu.Unlock()
	sealed := map[uint32]int64{}
	for n := from; n < number; n++ {
		if info, err := os.Stat(v.logPath(n)); err == nil {
			sealed[n] = info.Size()
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for n, size := range sealed {
		v.space.set(n, size)
	}
	v.space.set(number, length)
}

func (v *Volume) logPath(number uint32) string {
	return filepath.Join(v.dir, chunksDir, logName(number))
}

func logName(number uint32) string {
	digits := strconv.FormatUint(uint64(number), 10)
	return strings.Repeat("0", max(0, 6-len(digits))) + digits + ".vlog"
}

func logNumber(path string) (uint32, error) {
	n, err := strconv.ParseUint(strings.TrimSuffix(filepath.Base(path), ".vlog"), 10, 32)
	return uint32(n), err
}

// measureLogs begins the ledger with the lengths of all logs.
func (v *Volume) measureLogs() error {
	paths, err := filesOf(filepath.Join(v.dir, chunksDir), ".vlog")
	if err != nil {
		return err
	}
	newest, length := newestLog(v.db)
	v.space = ledger{logs: map[uint32]*logSpace{}}
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		n, err := logNumber(path)
		if err != nil {
			return err
		}
		v.space.set(n, info.Size())
	}
	v.space.set(newest, length) // its file is longer, by a hole
	return nil
}

// victims are the logs worth emptying, the ones with most dead bytes first: those
// that are half dead, or a quarter if room is short, as far as what lives in them
// fits into room bytes. Those to skip are left out.
func (l *ledger) victims(short bool, room int64, skip func(uint32, *logSpace) bool) []uint32 {
	share := int64(2)
	if short {
		share = 4
	}
	var all []uint32
	for n, s := range l.logs {
		if n != l.newest && !s.going && !skip(n, s) && (s.live == 0 || s.dead()*share >= s.length) {
			all = append(all, n)
		}
	}
	slices.SortFunc(all, func(a, b uint32) int {
		return cmp.Or(cmp.Compare(l.logs[b].dead(), l.logs[a].dead()), cmp.Compare(a, b))
	})
	return slices.DeleteFunc(all, func(n uint32) bool {
		if live := l.logs[n].live; live <= max(0, room) {
			room -= live
			return false
		}
		return true
	})
}
