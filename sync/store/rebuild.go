package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"
	"github.com/dgraph-io/ristretto/v2/z"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/sync/chunk"
)

// What keeps Badger from opening the tree, or makes it forget, and how a new tree
// is made of what can still be read.
//
// The tree is its tables (.sst) and the list of those that count (MANIFEST). Badger
// crashes at a damaged table, refuses to open without one, and deletes every table
// that the list does not name: of a list that was cut it says nothing, and with the
// tables goes what they know. So [inspect] looks at all of it before Badger does.
//
// # Making it anew
//
// What is to be had comes from two sides:
//
//   - the tables, block by block. A block tells by its own checksum whether it is
//     whole, so a table with a damaged block, index or foot gives all others. If the
//     list cannot be read, every table counts: versions tell what is newer.
//   - the value logs, record by record. Each has the key, with its version, and the
//     chunk, which is hashed: what is listed from here was read a moment ago. Behind
//     a record whose length cannot be trusted the next one is searched for.
//
// Chunks are not copied: the new tree points to where they lie. Its entries are
// collected in sorted runs of a few MiB, which are merged into tables that do not
// overlap, Badger's lowest level. That takes as much of the disk as the tree twice,
// some hundred bytes a chunk, and some 40 MiB of memory for any number of them.
//
// Everything is made in chunks/rebuild. The tables are synced, moved beside the old
// ones, and then count at once, when a new MANIFEST takes the place of the old.
// Killed before, the next start begins again; killed after, it finds a whole tree, and
// Badger deletes the old tables as they are on no list.
//
// # What it may get wrong
//
// A chunk that was dropped comes back if the tables that knew of the drop are gone and
// its log is not: it takes room until it is dropped again. What only the old tree
// knew of (chunks below 1 KiB, which are in it) is lost with a block. If the index
// entry is left, it is told as lost, and so is what the tree has in a log that is
// gone. What neither side knows any more is not found.

const (
	rebuildDir = "rebuild" // in chunks/
	lastLevel  = 6         // Badger's, of seven

	// runBytes is what is sorted in memory at once: keys and values in the tree.
	runBytes = 4 << 20

	// greatestVersion is above what a volume can reach (a thousand changes a second for
	// 8,000 years), and far enough below the end that Badger counts on from there.
	greatestVersion = 1 << 48

	bitDelete = 1 << 0 // in an entry's meta: the key was deleted

	chunkKey = 1 + 32 + 8 // bytes of a key of ours, with Badger's version
	idKey    = 1 + 8

	maxBlock = 64 << 10 // bytes; Badger's are 4 KiB and one entry at most
	// minFound is the least length of a block that is believed where it was searched
	// for: more than a value in the tree can have, so none lies in a chunk.
	minFound = smallValue + 256

	keepVersions = 2 // as in tuning
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// damage is why a tree must be made anew.
type damage struct {
	why error
	// listed are the numbers of the tables that count; nil if all do, because the list
	// cannot be believed.
	listed []uint64
}

// inspect reads the list and all tables before Badger does. A nil damage means that
// Badger will open them and forget nothing; the error is not of what lies on disk,
// but of getting at it.
func inspect(dir string, tuned badger.Options) (*damage, error) {
	listed, err := listedTables(dir, tuned)
	var cannot *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if old, err := hasChunks(dir); err != nil || !old {
			return nil, err
		}
		return &damage{why: errors.New("its MANIFEST is gone")}, nil
	case errors.As(err, &cannot):
		return nil, err
	case err != nil:
		return &damage{why: fmt.Errorf("its MANIFEST is damaged: %w", err)}, nil
	}
	d := damage{listed: listed}
	var newest uint64
	for _, id := range listed {
		version, err := checkTable(table.NewFilename(id, dir))
		switch {
		case err == nil:
			newest = max(newest, version)
			continue
		case isErrno(err):
			return nil, err
		case errors.Is(err, errGone):
			d.listed = nil
		}
		d.why = cmp.Or(d.why, fmt.Errorf("table %s: %w", table.IDToFilename(id), err))
	}
	forgotten, err := forgottenTable(dir, listed, newest)
	if err != nil {
		return nil, err
	}
	if forgotten != "" {
		d = damage{why: cmp.Or(d.why, fmt.Errorf("its MANIFEST is cut: it does not know of %s", forgotten))}
	}
	if d.why == nil {
		return nil, nil
	}
	return &d, nil
}

var errGone = errors.New("it is gone")

// isErrno tells a failed system call from damage.
func isErrno(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno)
}

// forgottenTable names a table that is on no list and has what is newer than all
// that is: the list was cut. Badger would delete it. What a killed compaction has left
// has nothing newer; what a killed flush has, is in its memtable's log as well.
func forgottenTable(dir string, listed []uint64, newest uint64) (string, error) {
	there, err := tablesIn(dir)
	if err != nil {
		return "", err
	}
	for _, id := range there {
		if slices.Contains(listed, id) {
			continue
		}
		version, err := checkTable(table.NewFilename(id, dir))
		if isErrno(err) {
			return "", err
		}
		if err != nil || version <= newest { // never finished, or nothing of its own
			continue
		}
		if logged, err := inMemtableLog(dir, version); err != nil || !logged {
			return table.IDToFilename(id), err
		}
	}
	return "", nil
}

// listedTables reads MANIFEST.
func listedTables(dir string, tuned badger.Options) ([]uint64, error) {
	f, err := os.Open(filepath.Join(dir, badger.ManifestFilename))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, _, err := badger.ReplayManifestFile(f, tuned.ExternalMagicVersion, tuned)
	if err != nil {
		return nil, err
	}
	ids := make([]uint64, 0, len(m.Tables)) // not nil
	for id := range m.Tables {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

// tablesIn lists the numbers of the tables that lie in a directory.
func tablesIn(dir string) ([]uint64, error) {
	paths, err := filesOf(dir, ".sst")
	var ids []uint64
	for _, path := range paths {
		if id, ok := table.ParseFileID(path); ok {
			ids = append(ids, id)
		}
	}
	return ids, err
}

// hasChunks tells whether Badger has ever written here.
func hasChunks(dir string) (bool, error) {
	for _, ending := range []string{".sst", ".mem", ".vlog"} {
		if paths, err := filesOf(dir, ending); err != nil || len(paths) > 0 {
			return true, err
		}
	}
	return false, nil
}

// checkTable reads a table as Badger does, and returns the newest version in it. At
// a damaged one Badger crashes the process, from a goroutine of its own, or skips keys.
func checkTable(path string) (newest uint64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = errors.New("it is damaged, or cannot be read")
		}
	}()
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return 0, errGone
	case err == nil && info.Size() == 0:
		return 0, errors.New("it is empty")
	}
	file, err := z.OpenMmapFile(path, os.O_RDONLY, 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, file.Close(-1)) }()
	t, err := table.OpenTable(file, table.Options{ReadOnly: true, ChkMode: options.NoVerification})
	if err != nil {
		return 0, err
	}
	return t.MaxVersion(), t.VerifyChecksum()
}

// inMemtableLog tells whether a version lies between the first and the last of the
// log of a memtable. Then a table up to that version is the memtable's, and Badger
// was killed before it was on the list; it makes it again from the log.
func inMemtableLog(dir string, version uint64) (bool, error) {
	logs, err := filesOf(dir, ".mem")
	if err != nil {
		return false, err
	}
	for _, path := range logs {
		first, last, err := versionsOf(path)
		if err != nil {
			return false, err
		}
		if first <= version && version <= last {
			return true, nil
		}
	}
	return false, nil
}

// versionsOf is the least and the greatest version in the log of a memtable, up to
// its first damaged entry.
func versionsOf(path string) (first, last uint64, err error) {
	w, err := openWindow(path)
	if err != nil {
		return 0, 0, err
	}
	defer w.close()
	first = math.MaxUint64
	for at := int64(logHeader); ; {
		r, err := w.record(at)
		if err != nil || r == nil || !r.sound || len(r.key) < 8 {
			return first, last, err
		}
		version := y.ParseTs(r.key)
		first, last = min(first, version), max(last, version)
		at += r.length
	}
}

// forgetKeys removes Badger's list of encryption keys if it is damaged. It is empty,
// and Badger makes it again, but refuses to open beside one that it cannot read.
func forgetKeys(dir string) error {
	const empty = 16 + len("Hello Badger") // a random number, and the words in plain
	path := filepath.Join(dir, badger.KeyRegistryFileName)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(raw) == empty && bytes.HasSuffix(raw, []byte("Hello Badger")) {
		return nil
	}
	return os.Remove(path)
}

// forgetRebuild removes what a killed process has left of a tree that it was making.
func forgetRebuild(dir string) error { return os.RemoveAll(filepath.Join(dir, rebuildDir)) }

// stretch is a part of a value log that could not be read as records.
type stretch struct {
	log      uint32
	from, to int64 // bytes from the beginning of the log
}

// mended says what making a tree anew has shown.
type mended struct {
	logs    map[uint32]bool // that are there
	damaged []stretch
	chunks  int // records that are whole
}

// suspects tells whether what lies at a place must be read before it is believed.
func (m *mended) suspects(p place) bool {
	if p.log == 0 {
		return false
	}
	return !m.logs[p.log] || slices.ContainsFunc(m.damaged, func(s stretch) bool {
		return s.log == p.log && int64(p.at) < s.to && s.from < int64(p.at)+int64(p.length)
	})
}

// builder makes a tree anew.
type builder struct {
	dir   string
	id    string // of the volume; empty: not known
	tuned badger.Options
	hooks hooks
	log   *slog.Logger

	arena   []byte // keys and values of pending
	pending []treeEntry
	runs    []string // files
	next    uint64   // number of the next table
	tables  []string // made, to be moved beside the old ones

	hasID   bool // the volume's id was found
	blocks  int  // of tables, damaged
	total   int64
	done    int64 // bytes of logs read
	bad     int64 // of these, the disk did not give
	told    time.Time
	outcome mended
}

// treeEntry is a key with its version, and its value as in a table.
type treeEntry struct{ key, value []byte }

// rebuildTree makes the tree of the chunks in dir anew. The error is of the disk.
func rebuildTree(dir, id string, d *damage, tuned badger.Options, h hooks, log *slog.Logger) (_ *mended, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("a file could not be read: %v", p)
		}
	}()
	b := &builder{dir: dir, id: id, tuned: tuned, hooks: h, log: log, outcome: mended{logs: map[uint32]bool{}}}
	began := time.Now()
	if err := b.begin(); err != nil {
		return nil, err
	}
	if err := b.readTables(d.listed); err != nil {
		return nil, err
	}
	h.rebuilding("tables read")
	if err := b.readLogs(); err != nil {
		return nil, err
	}
	h.rebuilding("logs read")
	if err := b.enough(); err != nil {
		return nil, err
	}
	if !b.hasID && id != "" {
		b.add(y.KeyWithTs(keyOfVolume, 1), encode(y.ValueStruct{Value: []byte(id)}))
	}
	if err := b.merge(); err != nil {
		return nil, err
	}
	h.rebuilding("tables made")
	if err := b.install(); err != nil {
		return nil, err
	}
	log.Warn("the index of a volume was damaged and is made anew", "dir", dir, "damage", d.why, "chunks_read", b.outcome.chunks,
		"damaged_blocks", b.blocks, "damaged_stretches", len(b.outcome.damaged), "took", time.Since(began).Round(time.Millisecond))
	return &b.outcome, nil
}

func (b *builder) work(name string) string { return filepath.Join(b.dir, rebuildDir, name) }

func (b *builder) begin() error {
	if err := forgetRebuild(b.dir); err != nil {
		return err
	}
	if err := os.Mkdir(b.work(""), 0o700); err != nil {
		return err
	}
	ids, err := tablesIn(b.dir)
	b.next = 1
	if len(ids) > 0 {
		b.next = slices.Max(ids) + 1
	}
	return err
}

// readTables takes from the tables what is whole.
func (b *builder) readTables(listed []uint64) error {
	there, err := tablesIn(b.dir)
	if err != nil {
		return err
	}
	for _, id := range there {
		if listed != nil && !slices.Contains(listed, id) {
			continue
		}
		if err := b.readTable(table.NewFilename(id, b.dir)); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) readTable(path string) error {
	w, err := openWindow(path)
	if err != nil {
		return err
	}
	defer w.close()
	end, err := w.endOfBlocks()
	if err != nil {
		return err
	}
	// chained: a whole block ends here, so here begins one.
	for at, chained := int64(0), true; at < w.size; {
		raw, err := w.bytes(at, maxBlock)
		if err != nil {
			return err
		}
		entries, length := splitBlock(raw)
		if length > 0 && (chained || length >= minFound || at+int64(length) == end) {
			for _, e := range entries {
				if err := b.takeEntry(e); err != nil {
					return err
				}
			}
			at, chained = at+int64(length), true
			continue
		}
		if chained && at != end {
			b.blocks++
		}
		chained = false
		at += int64(nextBlock(raw))
	}
	return nil
}

// endOfBlocks is where the blocks of a table end and its index begins, as far as the
// foot can be trusted: a block that ends there is believed however short it is.
func (w *window) endOfBlocks() (int64, error) {
	end := w.size
	for range 2 { // the checksum and its length, the index and its length
		raw, err := w.bytes(end-4, 4)
		if err != nil {
			return 0, err
		}
		if end < 4 || len(raw) < 4 {
			return w.size, nil
		}
		end -= 4 + int64(binary.BigEndian.Uint32(raw))
	}
	if end <= 0 {
		return w.size, nil
	}
	return end, nil
}

// splitBlock takes apart the block of a table at the beginning of b. Its length is 0
// if none begins there, or it is damaged.
//
// A block is its entries, the place of each (uint32 in the order of the processor),
// their number, a checksum of all that (a protobuf with a CRC-32C) and its length.
// An entry is the number of bytes that its key has in common with the first one, the
// number of its other bytes (two uint16 in the order of the processor), those, and the value.
func splitBlock(b []byte) (entries []treeEntry, length int) {
	if !beginsBlock(b) {
		return nil, 0
	}
	for end := 4 + idKey + 2 + 4; end+2+4 <= len(b); end++ {
		// The protobuf is tag 2, a varint; its length comes behind it.
		if b[end] != 2<<3 {
			continue
		}
		sum, n := binary.Uvarint(b[end+1 : min(len(b), end+1+binary.MaxVarintLen32)])
		if n <= 0 || end+1+n+4 > len(b) || binary.BigEndian.Uint32(b[end+1+n:]) != uint32(1+n) {
			continue
		}
		if uint64(crc32.Checksum(b[:end], castagnoli)) != sum {
			continue
		}
		return entriesOf(b[:end]), end + 1 + n + 4
	}
	return nil, 0
}

// beginsBlock tells whether the first entry of a block can begin here: a key of ours
// that has nothing in common with one before.
func beginsBlock(b []byte) bool {
	if len(b) < 5 || binary.NativeEndian.Uint16(b) != 0 {
		return false
	}
	switch length := binary.NativeEndian.Uint16(b[2:]); b[4] {
	case chunkPrefix, indexPrefix:
		return length == chunkKey
	case keyOfVolume[0]:
		return length == idKey
	}
	return false
}

// nextBlock is how many bytes to go on, at least one, to where a block can begin.
func nextBlock(b []byte) int {
	at := 1
	for at < len(b)-4 && !beginsBlock(b[at:]) {
		at++
	}
	return at
}

func entriesOf(b []byte) (entries []treeEntry) {
	n := int(binary.BigEndian.Uint32(b[len(b)-4:]))
	places := len(b) - 4 - 4*n
	if n < 1 || n > len(b)/4 || places < 4 {
		return nil
	}
	var first []byte
	for i := range n {
		from, to := int(binary.NativeEndian.Uint32(b[places+4*i:])), places
		if i+1 < n {
			to = int(binary.NativeEndian.Uint32(b[places+4*(i+1):]))
		}
		if from < 0 || to > places || from+4 > to {
			return entries
		}
		e := b[from:to]
		common, other := int(binary.NativeEndian.Uint16(e)), int(binary.NativeEndian.Uint16(e[2:]))
		if common > len(first) || 4+other+3 > len(e) {
			return entries
		}
		key := slices.Concat(first[:common], e[4:4+other])
		if i == 0 {
			first = key
		}
		entries = append(entries, treeEntry{key, e[4+other:]})
	}
	return entries
}

// takeEntry takes an entry over from an old table, with what follows from it: chunk
// and index entry come and go together, so one of them tells of the other.
func (b *builder) takeEntry(e treeEntry) error {
	if len(e.key) < 8 || y.ParseTs(e.key) >= greatestVersion {
		return nil
	}
	var v y.ValueStruct
	v.Decode(e.value)
	gone := v.Meta&bitDelete != 0
	switch key := y.ParseKey(e.key); {
	case bytes.Equal(key, keyOfVolume):
		b.hasID = b.hasID || !gone
	case len(e.key) != chunkKey:
		return nil // no key of ours
	case key[0] == chunkPrefix && !gone:
		size := int64(len(v.Value))
		if v.Meta&bitValuePointer != 0 {
			size = chunkSize(placeIn(v.Value))
		}
		if err := b.add(twin(e.key), encode(y.ValueStruct{Value: binary.BigEndian.AppendUint32(nil, uint32(size))})); err != nil {
			return err
		}
	case gone:
		if err := b.add(twin(e.key), e.value); err != nil {
			return err
		}
	}
	return b.add(e.key, e.value)
}

// twin is the key of a chunk's index entry for that of the chunk, and the other way
// round, with the same version.
func twin(key []byte) []byte {
	other := slices.Clone(key)
	other[0] = chunkPrefix + indexPrefix - key[0]
	return other
}

func encode(v y.ValueStruct) []byte {
	raw := make([]byte, v.EncodedSize())
	v.Encode(raw)
	return raw
}

// readLogs takes from the value logs each chunk that is whole.
func (b *builder) readLogs() error {
	paths, err := filesOf(b.dir, ".vlog")
	if err != nil {
		return err
	}
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		b.total += info.Size()
	}
	for i, path := range paths {
		n, err := logNumber(path)
		if err != nil {
			return fmt.Errorf("%s has no number: %w", path, err)
		}
		b.outcome.logs[n] = true
		if err := b.readLog(path, n); err != nil {
			return err
		}
		if i == 0 {
			b.hooks.rebuilding("a log read")
		}
	}
	return nil
}

func (b *builder) readLog(path string, number uint32) error {
	w, err := openWindow(path)
	if err != nil {
		return err
	}
	defer w.close()
	// chained: a whole record ends here, so here begins one.
	at, chained := int64(logHeader), true
	for at < w.size {
		r, err := w.record(at)
		if err != nil {
			return err
		}
		if r != nil && r.wholeChunk() {
			if err := b.takeRecord(r, place{log: number, length: uint32(r.length), at: uint32(at)}); err != nil {
				return err
			}
			at, chained = at+r.length, true
			b.tell(at)
			continue
		}
		next, err := w.behind(at, r, chained)
		if err != nil {
			return err
		}
		b.outcome.skip(stretch{number, at, next})
		chained = chained && r != nil && next == at+r.length
		at = next
	}
	b.done += w.size
	b.bad += w.bad
	return nil
}

// enough is an error if the disk gave so little that it rather fails than has lost
// the rest: then the old tree stays.
func (b *builder) enough() error {
	if b.bad > b.total/2 {
		return fmt.Errorf("the disk does not give %d of %d MiB of the chunks: check it, its cable and its power", b.bad>>20, b.total>>20)
	}
	return nil
}

// skip notes a stretch, joined to the last one where they meet.
func (m *mended) skip(s stretch) {
	if last := len(m.damaged) - 1; last >= 0 && m.damaged[last].log == s.log && m.damaged[last].to == s.from {
		m.damaged[last].to = s.to
		return
	}
	m.damaged = append(m.damaged, s)
}

func (b *builder) takeRecord(r *logRecord, p place) error {
	b.outcome.chunks++
	if err := b.add(r.key, encode(y.ValueStruct{Meta: bitValuePointer, Value: p.encode()})); err != nil {
		return err
	}
	return b.add(twin(r.key), encode(y.ValueStruct{Value: binary.BigEndian.AppendUint32(nil, uint32(len(r.value)))}))
}

// tell says how far it is, from time to time.
func (b *builder) tell(at int64) {
	const every = 10 * time.Second
	if b.told.IsZero() {
		b.told = time.Now()
	}
	if time.Since(b.told) < every {
		return
	}
	b.told = time.Now()
	b.log.Info("the index of a volume is made anew from its chunks", "dir", b.dir, "read_mib", (b.done+at)>>20, "of_mib", b.total>>20)
}

// add collects an entry, and writes a run when there are enough.
func (b *builder) add(key, value []byte) error {
	if len(b.arena)+len(key)+len(value) > runBytes {
		if err := b.writeRun(); err != nil {
			return err
		}
	}
	if b.arena == nil {
		b.arena = make([]byte, 0, runBytes)
	}
	from := len(b.arena)
	b.arena = append(append(b.arena, key...), value...)
	b.pending = append(b.pending, treeEntry{b.arena[from : from+len(key)], b.arena[from+len(key):]})
	return nil
}

// writeRun writes what is pending as one sorted table.
func (b *builder) writeRun() error {
	slices.SortFunc(b.pending, func(a, b treeEntry) int { return y.CompareKeys(a.key, b.key) })
	b.pending = slices.CompactFunc(b.pending, func(a, b treeEntry) bool { return bytes.Equal(a.key, b.key) })
	t := table.NewTableBuilder(table.Options{TableSize: runBytes, BlockSize: b.tuned.BlockSize})
	for _, e := range b.pending {
		var v y.ValueStruct
		v.Decode(e.value)
		t.Add(e.key, v, 0)
	}
	path, err := b.writeTable(t)
	b.runs = append(b.runs, path)
	b.arena, b.pending = b.arena[:0], b.pending[:0]
	b.hooks.rebuilding("run written")
	return err
}

func (b *builder) writeTable(t *table.Builder) (path string, err error) {
	defer t.Close()
	path = b.work(table.IDToFilename(b.next))
	b.next++
	return path, os.WriteFile(path, t.Finish(), 0o600)
}

// merge writes all runs as tables that do not overlap.
func (b *builder) merge() (err error) {
	if len(b.pending) > 0 {
		if err := b.writeRun(); err != nil {
			return err
		}
	}
	b.arena, b.pending = nil, nil
	if len(b.runs) == 0 {
		return nil
	}
	var all []y.Iterator
	for _, path := range b.runs {
		file, err := z.OpenMmapFile(path, os.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer file.Close(-1)
		// An iterator that meets damage says that it is at its end: all is checked now.
		t, err := table.OpenTable(file, table.Options{ReadOnly: true, ChkMode: options.OnTableRead})
		if err != nil {
			return err
		}
		all = append(all, t.NewIterator(table.NOCACHE))
	}
	it := table.NewMergeIterator(all, false)
	defer func() { err = errors.Join(err, it.Close()) }()
	return b.writeTables(it)
}

func (b *builder) writeTables(it y.Iterator) error {
	of := table.Options{TableSize: uint64(b.tuned.BaseTableSize), BlockSize: b.tuned.BlockSize, BloomFalsePositive: b.tuned.BloomFalsePositive}
	t := table.NewTableBuilder(of)
	finish := func() error {
		path, err := b.writeTable(t)
		if err != nil {
			return err
		}
		b.tables = append(b.tables, path)
		return b.hooks.fsync(path)
	}
	var last []byte
	versions := 0
	for it.Rewind(); it.Valid(); it.Next() {
		key, value := it.Key(), it.Value()
		if !bytes.Equal(y.ParseKey(key), last) {
			last, versions = append(last[:0], y.ParseKey(key)...), 0
			if t.ReachedCapacity() { // all versions of a key are in one table
				if err := finish(); err != nil {
					return err
				}
				t = table.NewTableBuilder(of)
			}
		}
		if versions++; versions > keepVersions {
			continue
		}
		var length uint32
		if value.Meta&bitValuePointer != 0 {
			length = placeIn(value.Value).length
		}
		t.Add(key, value, length)
	}
	return finish()
}

// install puts the new tables in the place of the old ones.
func (b *builder) install() error {
	ids := make([]uint64, len(b.tables))
	for i, path := range b.tables {
		ids[i], _ = table.ParseFileID(path)
		if err := os.Rename(path, filepath.Join(b.dir, filepath.Base(path))); err != nil {
			return err
		}
	}
	if err := b.hooks.fsync(b.dir); err != nil {
		return err
	}
	b.hooks.rebuilding("tables in place")
	list := b.work(badger.ManifestFilename)
	if err := os.WriteFile(list, manifest(ids), 0o600); err != nil {
		return err
	}
	if err := b.hooks.fsync(list); err != nil {
		return err
	}
	if err := os.Rename(list, filepath.Join(b.dir, badger.ManifestFilename)); err != nil {
		return err
	}
	if err := b.hooks.fsync(b.dir); err != nil {
		return err
	}
	b.hooks.rebuilding("list replaced")
	return forgetRebuild(b.dir)
}

// manifest is a list of tables as Badger writes it: "Bdgr", the user's version (0) and
// Badger's, then sets of changes, each with its length and CRC-32C. A set is a protobuf of
// changes (1), a change has the table's number (1) and its level (3), and is else zero: the
// table is new, and neither encrypted nor compressed.
func manifest(tables []uint64) []byte {
	var set []byte
	for _, id := range tables {
		change := binary.AppendUvarint([]byte{1 << 3}, id)
		change = append(change, 3<<3, lastLevel)
		set = append(append(set, 1<<3|2, byte(len(change))), change...)
	}
	raw := append([]byte("Bdgr"), 0, 0, 0, 8)
	raw = binary.BigEndian.AppendUint32(raw, uint32(len(set)))
	raw = binary.BigEndian.AppendUint32(raw, crc32.Checksum(set, castagnoli))
	return append(raw, set...)
}

// logRecord is a record of a log: its head (meta and user meta, a byte each, the lengths of
// key and value and the expiry as uvarints), key, value, and a CRC-32C of all that.
type logRecord struct {
	meta, userMeta byte
	expires        uint64
	key, value     []byte // the key with its version; valid until the next read
	length         int64
	sound          bool // the checksum is right
}

// maxHead is what a record has before its value at most.
const maxHead = 2 + 3*binary.MaxVarintLen64 + maxKey

const maxKey = 64 // bytes; longer than any of ours, and of Badger's

// wholeChunk tells whether the record is a chunk that is what its key says.
func (r *logRecord) wholeChunk() bool {
	if !r.likeAChunk() || !r.sound || y.ParseTs(r.key) >= greatestVersion {
		return false
	}
	id := chunk.Sum(r.value)
	return bytes.Equal(id[:], r.key[1:1+len(id)])
}

func (r *logRecord) likeAChunk() bool {
	return r.meta == 0 && r.userMeta == 0 && r.expires == 0 && len(r.key) == chunkKey && r.key[0] == chunkPrefix && len(r.value) > 0
}

// record reads the record at a place of a log; nil if there can be none.
func (w *window) record(at int64) (*logRecord, error) {
	raw, err := w.bytes(at, maxHead)
	if err != nil || len(raw) < 2 {
		return nil, err
	}
	r := &logRecord{meta: raw[0], userMeta: raw[1]}
	n := 2
	var numbers [3]uint64
	for i := range numbers {
		x, k := binary.Uvarint(raw[n:])
		if k <= 0 {
			return nil, nil
		}
		numbers[i], n = x, n+k
	}
	if numbers[0] == 0 || numbers[0] > maxKey || numbers[1] > chunk.MaxSize {
		return nil, nil
	}
	key, value := int(numbers[0]), int(numbers[1])
	r.expires, r.length = numbers[2], int64(n+key+value+crc32.Size)
	if at+r.length > w.size {
		return nil, nil
	}
	if raw, err = w.bytes(at, int(r.length)); err != nil || int64(len(raw)) < r.length {
		return nil, err
	}
	end := n + key + value
	r.key, r.value = raw[n:n+key], raw[n+key:end]
	r.sound = crc32.Checksum(raw[:end], castagnoli) == binary.BigEndian.Uint32(raw[end:])
	return r, nil
}

// behind is where to read on after a record that is not whole. If one of its length
// is where it is expected, and another begins behind it, its length is right.
func (w *window) behind(at int64, r *logRecord, chained bool) (int64, error) {
	if chained && r != nil && r.likeAChunk() {
		next := at + r.length
		if next == w.size {
			return next, nil
		}
		if n, err := w.record(next); err != nil || n != nil && n.likeAChunk() {
			return next, err
		}
	}
	return w.search(at + 1)
}

// search is where the next record of a chunk can begin, or the end.
func (w *window) search(at int64) (int64, error) {
	const step = 64 << 10
	for ; at < w.size; at += step {
		raw, err := w.bytes(at, step+maxHead)
		if err != nil {
			return 0, err
		}
		raw = slices.Clone(raw) // the next read goes over it
		for i := 0; i < min(step, len(raw)-3); i++ {
			if raw[i] != 0 || raw[i+1] != 0 || raw[i+2] != chunkKey {
				continue
			}
			if r, err := w.record(at + int64(i)); err != nil || r != nil && r.likeAChunk() {
				return at + int64(i), err
			}
		}
	}
	return w.size, nil
}

// window reads a file from its beginning to its end, a few MiB at a time. Where the
// disk gives nothing it reads zeros.
type window struct {
	f    *os.File
	size int64
	from int64 // of what is in buf
	buf  []byte
	bad  int64 // bytes that the disk did not give
}

func openWindow(path string) (*window, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	const most = 2 * (chunk.MaxSize + maxHead + crc32.Size)
	return &window{f: f, size: info.Size(), buf: make([]byte, 0, min(most, info.Size()))}, nil
}

func (w *window) close() { w.f.Close() }

// bytes are n bytes, or fewer at the end of the file; valid until the next read.
func (w *window) bytes(at int64, n int) ([]byte, error) {
	end := min(at+int64(n), w.size)
	if at < 0 || at >= end {
		return nil, nil
	}
	if at < w.from || end > w.from+int64(len(w.buf)) {
		w.from, w.buf = at, w.buf[:min(int64(cap(w.buf)), w.size-at)]
		if err := w.fill(); err != nil {
			return nil, err
		}
	}
	return w.buf[at-w.from : end-w.from], nil
}

func (w *window) fill() error {
	const sector = 4 << 10
	skip := int64(sector)
	for done := int64(0); done < int64(len(w.buf)); {
		n, err := w.f.ReadAt(w.buf[done:], w.from+done)
		if n > 0 {
			done, skip = done+int64(n), sector
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			return fmt.Errorf("%s became shorter while it was read", w.f.Name())
		case !isMediaError(err):
			return err
		default: // the rest of this sector, then longer stretches: each try may take seconds
			at := w.from + done
			hole := min(cmp.Or(skip-at%sector, skip), int64(len(w.buf))-done)
			clear(w.buf[done : done+hole])
			done, w.bad, skip = done+hole, w.bad+hole, min(2*skip, 1<<20)
		}
	}
	return nil
}

// isMediaError tells whether the disk, or a file system with checksums, has these
// bytes no more.
func isMediaError(err error) bool { return errors.Is(err, unix.EIO) || errors.Is(err, unix.EBADMSG) }
