// Package nbd is a disk for a virtual machine, served over a unix socket by the
// Network Block Device protocol, which tells somebody of every write and flush
// in the order in which the machine may rely on them.
//
// Of the protocol (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md)
// it has the fixed newstyle negotiation with EXPORT_NAME, INFO and GO, simple
// replies, and the commands READ, WRITE, FLUSH, TRIM, WRITE_ZEROES and DISC, with FUA. One
// export, whatever it is called; one client at a time, another after it.
//
// # What the order means
//
// Requests are carried out one after the other, as they come. A client has
// several under way, so the order alone does not say what a flush covers: only
// the writes that were answered before the flush came. Therefore requests are
// read while others are carried out, and [Observer.Flush] is told how many
// changes had been answered when it came. That is the least that a disk must
// make durable, and so the most that a disk may lose.
package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Observer is told of what changes, by one goroutine. An error ends the connection.
// Changes are counted from 1, over all connections.
type Observer interface {
	// Write is a change; with fua it was durable when it was answered.
	Write(offset int64, data []byte, fua bool) error
	// Zero is a change: a trim, or zeros written.
	Zero(offset, length int64, fua bool) error
	// Flush has made the first n changes durable.
	Flush(changes int) error
}

// Numbers of the protocol.
const (
	magicInit     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply = 0x3e889045565a9
	magicRequest  = 0x25609513
	magicReply    = 0x67446698

	flagFixed, flagNoZeroes = 1, 2

	optExportName, optAbort, optInfo, optGo = 1, 2, 6, 7

	repAck, repInfo, repUnsupported = 1, 3, 1<<31 | 1

	infoExport, infoBlockSize = 0, 3

	// has flags, flush, FUA, trim, write zeroes
	exportFlags = 1 | 1<<2 | 1<<3 | 1<<5 | 1<<6

	cmdRead, cmdWrite, cmdDisconnect, cmdFlush, cmdTrim, cmdWriteZeroes = 0, 1, 2, 3, 4, 6

	cmdFlagFUA = 1

	errInvalid = 22

	maxPayload = 32 << 20 // bytes, as the protocol recommends
	maxOption  = 4 << 10
	ahead      = 64 // requests read before the first of them is carried out
)

// Server serves one disk.
type Server struct {
	disk     *os.File
	size     int64
	observer Observer
	listener net.Listener
	changes  int // that the observer was told of
	ended    chan error
	close    func() error

	mu   sync.Mutex // guards conn
	conn net.Conn
}

// Serve serves a raw image on a new socket until [Server.Close].
func Serve(socket, image string, o Observer) (*Server, error) {
	disk, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := disk.Stat()
	if err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", socket)
	if err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	s := &Server{disk: disk, size: info.Size(), observer: o, listener: listener, ended: make(chan error, 1)}
	s.close = sync.OnceValue(s.end)
	go func() { s.ended <- s.run() }()
	return s, nil
}

// Close ends the server, and returns why it ended if that was not the reason.
func (s *Server) Close() error { return s.close() }

func (s *Server) end() error {
	err := s.listener.Close()
	s.mu.Lock()
	if s.conn != nil {
		s.conn.Close()
	}
	s.mu.Unlock()
	return errors.Join(err, <-s.ended, s.disk.Close())
}

func (s *Server) run() error {
	for {
		conn, err := s.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.conn = conn
		s.mu.Unlock()
		err = s.serve(conn)
		conn.Close()
		if fatal := (*observerError)(nil); errors.As(err, &fatal) {
			return err
		} // a client that went away is its own affair
	}
}

// observerError is one after which the record is no longer complete.
type observerError struct{ error }

func (s *Server) serve(conn net.Conn) error {
	in, out := bufio.NewReaderSize(conn, 1<<20), bufio.NewWriterSize(conn, 1<<20)
	if err := s.negotiate(in, out); err != nil {
		return err
	}
	// Requests are read ahead: see the package comment.
	var answer sync.Mutex // so that a request that follows an answer finds it counted
	answered := s.changes
	requests := make(chan request, ahead)
	var readErr error
	stop := make(chan struct{})
	go func() {
		defer close(requests)
		for {
			r, err := readRequest(in)
			if err != nil {
				readErr = err
				return
			}
			answer.Lock()
			r.answered = answered
			answer.Unlock()
			select {
			case requests <- r:
			case <-stop:
				return
			}
			if r.command == cmdDisconnect {
				return
			}
		}
	}()
	defer func() {
		conn.Close()
		close(stop)
		for range requests { // until its reader has ended
		}
	}()
	for r := range requests {
		if r.command == cmdDisconnect {
			return nil
		}
		if err := s.carryOut(r, out); err != nil {
			return err
		}
		answer.Lock()
		err := out.Flush()
		answered = s.changes
		answer.Unlock()
		if err != nil {
			return err
		}
	}
	return readErr
}

// negotiate is the handshake, up to the transmission phase.
func (s *Server) negotiate(in *bufio.Reader, out *bufio.Writer) error {
	put(out, uint64(magicInit), uint64(magicOption), uint16(flagFixed|flagNoZeroes))
	if err := out.Flush(); err != nil {
		return err
	}
	var flags uint32
	if err := binary.Read(in, binary.BigEndian, &flags); err != nil {
		return err
	}
	for {
		var h struct {
			Magic          uint64
			Option, Length uint32
		}
		if err := binary.Read(in, binary.BigEndian, &h); err != nil {
			return err
		}
		if h.Magic != magicOption || h.Length > maxOption {
			return fmt.Errorf("this is no option of the NBD protocol: %x", h)
		}
		if _, err := in.Discard(int(h.Length)); err != nil {
			return err
		}
		reply := func(kind uint32, data ...any) {
			n := 0
			for _, d := range data {
				n += binary.Size(d)
			}
			put(out, uint64(magicOptReply), h.Option, kind, uint32(n))
			put(out, data...)
		}
		switch h.Option {
		case optExportName:
			put(out, uint64(s.size), uint16(exportFlags))
			if flags&flagNoZeroes == 0 {
				put(out, make([]byte, 124))
			}
			return out.Flush()
		case optInfo, optGo:
			reply(repInfo, uint16(infoExport), uint64(s.size), uint16(exportFlags))
			reply(repInfo, uint16(infoBlockSize), uint32(512), uint32(4096), uint32(maxPayload))
			reply(repAck)
		case optAbort:
			reply(repAck)
			return errors.Join(out.Flush(), io.EOF)
		default:
			reply(repUnsupported)
		}
		if err := out.Flush(); err != nil || h.Option == optGo {
			return err
		}
	}
}

// put writes to a buffer, whose Flush tells of an error.
func put(out io.Writer, data ...any) {
	for _, d := range data {
		_ = binary.Write(out, binary.BigEndian, d)
	}
}

// request is one as it came.
type request struct {
	command, flags uint16
	cookie         uint64
	offset         int64
	length         int64
	data           []byte
	answered       int // changes that had been answered when it came
}

func readRequest(in io.Reader) (request, error) {
	var h [28]byte
	if _, err := io.ReadFull(in, h[:]); err != nil {
		return request{}, err
	}
	if binary.BigEndian.Uint32(h[:]) != magicRequest {
		return request{}, fmt.Errorf("this is no request of the NBD protocol: %x", h)
	}
	r := request{
		flags: binary.BigEndian.Uint16(h[4:]), command: binary.BigEndian.Uint16(h[6:]), cookie: binary.BigEndian.Uint64(h[8:]),
		offset: int64(binary.BigEndian.Uint64(h[16:])), length: int64(binary.BigEndian.Uint32(h[24:])),
	}
	if r.command != cmdWrite {
		return r, nil
	}
	if r.length > maxPayload {
		return r, fmt.Errorf("a write of %d bytes is too long", r.length)
	}
	r.data = make([]byte, r.length)
	_, err := io.ReadFull(in, r.data)
	return r, err
}

// carryOut answers a request. A disk that cannot be read or written ends the
// connection: the machine must not go on with a disk that is not the recorded one.
func (s *Server) carryOut(r request, out *bufio.Writer) error {
	code, fua := uint32(0), r.flags&cmdFlagFUA != 0
	inside := r.offset >= 0 && r.offset+r.length <= s.size
	var answer []byte
	var err error
	switch {
	case r.command == cmdFlush:
		err = s.tell(s.observer.Flush(r.answered))
	case !inside || r.command == cmdRead && r.length > maxPayload:
		code = errInvalid
	case r.command == cmdRead:
		answer = make([]byte, r.length)
		_, err = s.disk.ReadAt(answer, r.offset)
	case r.command == cmdWrite:
		if _, err = s.disk.WriteAt(r.data, r.offset); err == nil {
			s.changes++
			err = s.tell(s.observer.Write(r.offset, r.data, fua))
		}
	case r.command == cmdTrim, r.command == cmdWriteZeroes:
		if err = punch(s.disk, r.offset, r.length); err == nil {
			s.changes++
			err = s.tell(s.observer.Zero(r.offset, r.length, fua))
		}
	default:
		code = errInvalid
	}
	if err != nil {
		return err
	}
	put(out, uint32(magicReply), code, r.cookie, answer)
	return nil
}

func (s *Server) tell(err error) error {
	if err != nil {
		return &observerError{fmt.Errorf("a change of the disk could not be recorded: %w", err)}
	}
	return nil
}

func punch(f *os.File, offset, length int64) error {
	if length == 0 {
		return nil
	}
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
}
