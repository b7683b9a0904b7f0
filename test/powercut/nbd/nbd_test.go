package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// log is an observer that holds up the writes until told.
type log struct {
	lines []string
	gate  chan struct{} // nil: open
}

func (l *log) Write(offset int64, data []byte, fua bool) error {
	if l.gate != nil {
		<-l.gate
	}
	l.lines = append(l.lines, fmt.Sprintf("write %d+%d %q %v", offset, len(data), data[:1], fua))
	return nil
}

func (l *log) Zero(offset, length int64, fua bool) error {
	l.lines = append(l.lines, fmt.Sprintf("zero %d+%d %v", offset, length, fua))
	return nil
}

func (l *log) Flush(changes int) error {
	l.lines = append(l.lines, fmt.Sprintf("flush of %d", changes))
	return nil
}

// client is the machine's side, as QEMU speaks it.
type client struct {
	t    *testing.T
	conn net.Conn
	size uint64
}

func serve(t *testing.T, o Observer) (*Server, func() *client) {
	t.Helper()
	dir, err := os.MkdirTemp("", "d") // sockets want short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	image := filepath.Join(dir, "disk")
	if err := os.WriteFile(image, bytes.Repeat([]byte{'o'}, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Serve(filepath.Join(dir, "s"), image, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, func() *client { return dial(t, filepath.Join(dir, "s")) }
}

func dial(t *testing.T, socket string) *client {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(2 * time.Minute))
	c := &client{t: t, conn: conn}
	var hello struct {
		A, B  uint64
		Flags uint16
	}
	c.read(&hello)
	c.write(uint32(flagFixed | flagNoZeroes))
	c.write(uint64(magicOption), uint32(8), uint32(0)) // structured replies, which we do not have
	var r struct {
		Magic             uint64
		Option, Kind, Len uint32
	}
	if c.read(&r); r.Kind != repUnsupported {
		t.Fatalf("an option that it does not have: %+v", r)
	}
	c.write(uint64(magicOption), uint32(optGo), uint32(6), uint32(0), uint16(0))
	for c.read(&r); r.Kind != repAck; c.read(&r) {
		raw := make([]byte, r.Len)
		c.read(raw)
		if binary.BigEndian.Uint16(raw) == infoExport {
			c.size = binary.BigEndian.Uint64(raw[2:])
		}
	}
	return c
}

func (c *client) read(v any) {
	c.t.Helper()
	if err := binary.Read(c.conn, binary.BigEndian, v); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) write(data ...any) {
	c.t.Helper()
	var b bytes.Buffer
	put(&b, data...)
	if _, err := c.conn.Write(b.Bytes()); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) send(command, flags uint16, offset uint64, length uint32, data []byte) {
	c.t.Helper()
	c.write(uint32(magicRequest), flags, command, uint64(7), offset, length, data)
}

func (c *client) reply() uint32 {
	c.t.Helper()
	var r struct {
		Magic, Code uint32
		Cookie      uint64
	}
	if c.read(&r); r.Magic != magicReply || r.Cookie != 7 {
		c.t.Fatalf("%+v", r)
	}
	return r.Code
}

func (c *client) do(command, flags uint16, offset uint64, length uint32, data []byte) uint32 {
	c.t.Helper()
	c.send(command, flags, offset, length, data)
	return c.reply()
}

func TestWhatIsWrittenIsReadBackAndTold(t *testing.T) {
	var l log
	s, connect := serve(t, &l)
	c := connect()
	if c.size != 64<<10 {
		t.Errorf("the disk has %d bytes", c.size)
	}
	c.do(cmdWrite, 0, 512, 512, bytes.Repeat([]byte{'a'}, 512))
	c.do(cmdWrite, cmdFlagFUA, 4096, 512, bytes.Repeat([]byte{'b'}, 512))
	c.do(cmdTrim, 0, 8192, 4096, nil)
	c.do(cmdFlush, 0, 0, 0, nil)
	c.do(cmdWriteZeroes, cmdFlagFUA, 0, 512, nil)
	if code := c.do(cmdWrite, 0, 64<<10, 512, make([]byte, 512)); code != errInvalid {
		t.Errorf("a write behind the end: %d", code)
	}
	c.do(cmdRead, 0, 0, 12288, nil)
	got := make([]byte, 12288)
	if _, err := io.ReadFull(c.conn, got); err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(make([]byte, 512), bytes.Repeat([]byte{'a'}, 512), bytes.Repeat([]byte{'o'}, 3072),
		bytes.Repeat([]byte{'b'}, 512), bytes.Repeat([]byte{'o'}, 3584), make([]byte, 4096))
	if !bytes.Equal(got, want) {
		t.Error("what is read is not what was written")
	}
	c.send(cmdDisconnect, 0, 0, 0, nil)
	c = connect() // after the first has gone; counting goes on
	c.do(cmdFlush, 0, 0, 0, nil)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	told := []string{`write 512+512 "a" false`, `write 4096+512 "b" true`, "zero 8192+4096 false", "flush of 3", "zero 0+512 true", "flush of 4"}
	if !slices.Equal(l.lines, told) {
		t.Errorf("told: %q", l.lines)
	}
}

// A write that is under way when the flush comes is not covered by it, although
// the server is done with it first.
func TestAFlushCoversOnlyWhatWasAnsweredBefore(t *testing.T) {
	l := log{gate: make(chan struct{})}
	s, connect := serve(t, &l)
	c := connect()
	block := make([]byte, 512)
	c.send(cmdWrite, 0, 0, 512, block)
	l.gate <- struct{}{}
	c.reply()
	c.send(cmdWrite, 0, 512, 512, block)
	c.send(cmdFlush, 0, 0, 0, nil)
	// The flush has to be with the server by then. Requests are read in order, so it is once
	// most of one behind it was taken: more than the socket and a buffer hold.
	c.send(cmdWrite, 0, 64<<10, 8<<20, make([]byte, 8<<20))
	l.gate <- struct{}{}
	for range 3 {
		c.reply()
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := l.lines[len(l.lines)-1]; got != "flush of 1" {
		t.Errorf("%s, though one write was not answered yet", got)
	}
}
