package agent

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"testing/iotest"

	"github.com/eclipse/paho.mqtt.golang/packets"

	"github.com/deimos-edge/deimos/wire"
)

type readConn struct {
	net.Conn
	io.Reader
	closed bool
}

func (c *readConn) Read(p []byte) (int, error) { return c.Reader.Read(p) }
func (c *readConn) Close() error               { c.closed = true; return nil }

func publishOf(t *testing.T, size int) []byte {
	t.Helper()
	p := packets.NewControlPacket(packets.Publish).(*packets.PublishPacket)
	p.TopicName, p.Payload = "deimos/1/x/order", make([]byte, size)
	var b bytes.Buffer
	if err := p.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What the protocol allows passes however it is cut; what announces more than
// that never reaches the library, which would make room for it.
func TestOversizedPacketsEndTheConnectionBeforeTheyAreRead(t *testing.T) {
	good := append(publishOf(t, wire.MaxMessage), publishOf(t, 0)...)
	for name, cut := range map[string]func(io.Reader) io.Reader{
		"whole":   func(r io.Reader) io.Reader { return r },
		"by byte": iotest.OneByteReader,
		"halved":  iotest.HalfReader,
	} {
		for _, bad := range [][]byte{{0x30, 0xff, 0xff, 0xff, 0x7f}, {0x30, 0xff, 0xff, 0xff, 0xff, 0x01}, publishOf(t, maxPacket)} {
			c := &readConn{Reader: cut(bytes.NewReader(append(bytes.Clone(good), bad...)))}
			g := &guard{Conn: c}
			n, err := io.Copy(io.Discard, struct{ io.Reader }{g})
			if !errors.Is(err, errPacketTooLarge) || !c.closed || n > int64(len(good))+4 {
				t.Errorf("%s: %d of %d bytes passed, closed %t: %v", name, n, len(good), c.closed, err)
			}
		}
		g := &guard{Conn: &readConn{Reader: cut(bytes.NewReader(good))}}
		if got, err := io.ReadAll(g); err != nil || !bytes.Equal(got, good) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}
