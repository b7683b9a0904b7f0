package main

import (
	"crypto/sha256"
	"os"
)

// plainLog is the baseline of durable puts: one file. What waits is appended
// together, synced once, and then answered, as in the store, so that both sync as
// often as they can share a sync. Everybody hashes what he brings.
type plainLog struct {
	f     *os.File
	queue chan plainPut
	ended chan struct{}
}

type plainPut struct {
	data []byte
	done chan error
}

// plainShare is how many bytes share a sync, at most: as in the store.
const plainShare = 16 << 20

func newPlainLog(path string) (*plainLog, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	l := &plainLog{f: f, queue: make(chan plainPut), ended: make(chan struct{})}
	go l.run()
	return l, nil
}

// put returns when data is durable.
func (l *plainLog) put(data []byte) error {
	sha256.Sum256(data)
	p := plainPut{data, make(chan error, 1)}
	l.queue <- p
	return <-p.done
}

// run ends with Close.
func (l *plainLog) run() {
	defer close(l.ended)
	for first := range l.queue {
		these := l.gather(first)
		err := l.write(these)
		for _, p := range these {
			p.done <- err
		}
	}
}

func (l *plainLog) gather(first plainPut) []plainPut {
	these, bytes := []plainPut{first}, len(first.data)
	for bytes < plainShare {
		select {
		case p, ok := <-l.queue:
			if !ok {
				return these
			}
			these, bytes = append(these, p), bytes+len(p.data)
		default:
			return these
		}
	}
	return these
}

func (l *plainLog) write(these []plainPut) error {
	for _, p := range these {
		if _, err := l.f.Write(p.data); err != nil {
			return err
		}
	}
	return l.f.Sync()
}

// Close must come after the last put has returned.
func (l *plainLog) Close() error {
	close(l.queue)
	<-l.ended
	return l.f.Close()
}
