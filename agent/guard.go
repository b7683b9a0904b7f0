package agent

import (
	"errors"
	"net"

	"github.com/deimos-edge/deimos/wire"
)

// maxPacket is the largest MQTT packet that a broker may send: a message and
// its topic. The MQTT library reads a packet of any announced size (256 MiB at
// most) into memory, so it must not even see such an announcement.
const maxPacket = wire.MaxMessage + 1<<10

var errPacketTooLarge = errors.New("the broker announced a packet above the protocol's limit")

// guard watches the fixed headers (MQTT 3.1.1, section 2.2: a byte of type and
// flags, then the length of the rest, 7 bit a byte, low ones first) in what is
// read from a broker.
type guard struct {
	net.Conn
	skip   int  // bytes of the packet that are still to come
	inside bool // the type is read, the length is not yet complete
	length int
	shift  int
	broken error
}

func (g *guard) Read(p []byte) (int, error) {
	if g.broken != nil {
		return 0, g.broken
	}
	n, err := g.Conn.Read(p)
	if g.watch(p[:n]) {
		return n, err
	}
	g.broken = errPacketTooLarge
	g.Conn.Close()
	return 0, g.broken
}

// watch tells whether all that begins in b is allowed to.
func (g *guard) watch(b []byte) bool {
	for len(b) > 0 {
		if g.skip > 0 {
			n := min(g.skip, len(b))
			g.skip -= n
			b = b[n:]
			continue
		}
		c := b[0]
		b = b[1:]
		if !g.inside {
			g.inside, g.length, g.shift = true, 0, 0
			continue
		}
		g.length |= int(c&0x7f) << g.shift
		g.shift += 7
		if g.length > maxPacket || g.shift > 28 {
			return false
		}
		if c&0x80 == 0 {
			g.inside, g.skip = false, g.length
		}
	}
	return true
}
