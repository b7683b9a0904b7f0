package chunk

import (
	"errors"
	"io"
)

// Splitter cuts a stream into chunks of [DefaultSize], holding one at a time.
// Only the last may be shorter. An empty stream has no chunks.
type Splitter struct {
	r   io.Reader
	buf []byte
	err error
}

// NewSplitter returns a Splitter that reads r to its end.
func NewSplitter(r io.Reader) *Splitter {
	return &Splitter{r: r, buf: make([]byte, DefaultSize)}
}

// Next returns the next chunk with its id, or [io.EOF] after the last. The data
// is valid until the following call. An error of the reader is returned after
// it for ever, and what was read of the chunk that it cut is dropped.
func (s *Splitter) Next() (ID, []byte, error) {
	if s.err != nil {
		return ID{}, nil, s.err
	}
	n, err := io.ReadFull(s.r, s.buf)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF) && n > 0:
		s.err = io.EOF
	case err != nil:
		s.err = err
		return ID{}, nil, err
	}
	data := s.buf[:n]
	return Sum(data), data, nil
}
