package store

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"unsafe" // for go:linkname, and an address that is handed through

	"github.com/dgraph-io/badger/v4"
)

// What the store must know of Badger and Badger has no public call for: where a
// record lies, how far the newest value log is written, which memtable's log is the
// newest, and which log its RunValueLogGC takes. The first three are read, by
// reflection, from fields whose lack is found at the first Open; the last is one
// method linked by name, without which nothing links. So it is found out by who takes a new Badger,
// never by a device.

// place is where Badger keeps the value of a key.
type place struct {
	log    uint32 // the value log's number; 0: in the tree
	length uint32 // of the whole record, in bytes
	at     uint32 // bytes from the beginning of the log
}

const bitValuePointer = 1 << 1 // in an item's meta: the value is in a value log

var (
	itemMeta    = fieldOf(reflect.TypeFor[badger.Item](), "meta")
	itemPointer = fieldOf(reflect.TypeFor[badger.Item](), "vptr")
	valueLog    = fieldOf(reflect.TypeFor[badger.DB](), "vlog")
	memtable    = fieldOf(reflect.TypeFor[badger.DB](), "mt")
)

func fieldOf(t reflect.Type, name string) []int {
	f, ok := t.FieldByName(name)
	if !ok {
		panic("this Badger has no " + t.Name() + "." + name + ": the store must be adapted to it")
	}
	return f.Index
}

// placeOf tells where an item's value lies, without reading it.
func placeOf(item *badger.Item) place {
	fields := reflect.ValueOf(item).Elem()
	if fields.FieldByIndex(itemMeta).Uint()&bitValuePointer == 0 {
		return place{}
	}
	return placeIn(fields.FieldByIndex(itemPointer).Bytes())
}

// placeIn reads a pointer: three numbers of 32 bits in the order of the processor,
// log, length and offset.
func placeIn(pointer []byte) place {
	if len(pointer) != 12 {
		return place{}
	}
	return place{
		log:    binary.NativeEndian.Uint32(pointer),
		length: binary.NativeEndian.Uint32(pointer[4:]),
		at:     binary.NativeEndian.Uint32(pointer[8:]),
	}
}

// valueOf is the value of a record: behind meta and user meta, a byte each, the
// lengths of key and value and the expiry as uvarints, and the key. It is nil if the
// lengths are damaged.
func valueOf(record []byte) []byte {
	if len(record) < 2 {
		return nil
	}
	rest := record[2:]
	var numbers [3]uint64
	for i := range numbers {
		x, n := binary.Uvarint(rest)
		if n <= 0 {
			return nil
		}
		numbers[i], rest = x, rest[n:]
	}
	key, value := numbers[0], numbers[1]
	if key > uint64(len(rest)) || value > uint64(len(rest))-key {
		return nil
	}
	return rest[key : key+value : key+value]
}

// encode writes a pointer as placeIn reads it.
func (p place) encode() []byte {
	raw := binary.NativeEndian.AppendUint32(nil, p.log)
	raw = binary.NativeEndian.AppendUint32(raw, p.length)
	return binary.NativeEndian.AppendUint32(raw, p.at)
}

// newestLog is the number of the value log that Badger writes to, and how many
// bytes of it are written. Only who writes may ask, between two writes.
func newestLog(db *badger.DB) (number uint32, length int64) {
	logs := reflect.ValueOf(db).Elem().FieldByIndex(valueLog)
	number = uint32(logs.FieldByName("maxFid").Uint())
	return number, int64(logs.FieldByName("writableLogOffset").FieldByName("v").Uint())
}

// newestMemtable is the number of the log of the memtable that Badger writes to.
// Asked like newestLog.
func newestMemtable(db *badger.DB) uint32 {
	log := reflect.ValueOf(db).Elem().FieldByIndex(memtable).Elem().FieldByName("wal").Elem()
	return uint32(log.FieldByName("fid").Uint())
}

// memtableName is how Badger names its log.
func memtableName(number uint32) string { return fmt.Sprintf("%05d.mem", number) }

// chooseLog makes RunValueLogGC take this value log and no other: it takes the
// one that most can be discarded of, by figures that compactions add to.
func chooseLog(db *badger.DB, number uint32, others []uint32) {
	const most = 1 << 40 // bytes; above what compactions can add up to
	figures := reflect.ValueOf(db).Elem().FieldByIndex(valueLog).FieldByName("discardStats").UnsafePointer()
	for _, other := range others {
		updateDiscard(figures, other, -1)
	}
	updateDiscard(figures, number, most)
}

//go:linkname updateDiscard github.com/dgraph-io/badger/v4.(*discardStats).Update
func updateDiscard(figures unsafe.Pointer, log uint32, discard int64) int64
