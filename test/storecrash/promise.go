package main

import (
	"encoding/json"
	"fmt"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// mark is what the store's user came to know, or was about to ask. It is put into
// the record after the answer that it relies on has come, and before a request that
// may break it: so it holds for every cut from then on.
type mark struct {
	// Volume is open with this id.
	Volume string `json:"volume,omitempty"`
	// Putting is a chunk that may be there from now on.
	Putting *chunk.ID `json:"putting,omitempty"`
	// Receipt is a chunk that is durable.
	Receipt *chunk.ID `json:"receipt,omitempty"`
	// Removing are chunks that may be gone from now on.
	Removing []chunk.ID `json:"removing,omitempty"`
	// Removed are chunks that are gone.
	Removed []chunk.ID `json:"removed,omitempty"`
	// Rotated says that another segment has begun since the last such mark.
	Rotated bool `json:"rotated,omitempty"`
}

// state is what must hold of a chunk after a cut.
type state int

const (
	open state = iota // there, lost or not there
	held              // there
	gone              // not there
)

// promises are what must hold after a cut. No other chunk is there.
type promises struct {
	volume string
	chunks map[chunk.ID]state
}

// Pass takes what an event promises.
func (p *promises) Pass(e blocks.Event) error {
	m, err := markOf(e)
	if err == nil {
		p.take(m)
	}
	return err
}

// markOf is an event's mark, empty if it has none.
func markOf(e blocks.Event) (m mark, err error) {
	if e.Mark == nil {
		return m, nil
	}
	if err := json.Unmarshal(e.Mark, &m); err != nil {
		return m, fmt.Errorf("a mark of the recording: %w", err)
	}
	return m, nil
}

func (p *promises) take(m mark) {
	if m.Volume != "" {
		p.volume = m.Volume
	}
	if m.Putting != nil {
		p.chunks[*m.Putting] = open
	}
	if m.Receipt != nil {
		p.chunks[*m.Receipt] = held
	}
	for _, id := range m.Removing {
		p.chunks[id] = open
	}
	for _, id := range m.Removed {
		p.chunks[id] = gone
	}
}
