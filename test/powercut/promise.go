package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/deimos-edge/deimos/sync/chunk"
	"github.com/deimos-edge/deimos/test/powercut/blocks"
)

// mark is what somebody outside the device came to know, or was about to ask.
// It is put into the record after the answer that it relies on has come, and
// before a request that may break it: so it holds for every cut from then on.
type mark struct {
	// Device is a member with this id: key and membership are on its disk.
	Device string `json:"device,omitempty"`
	// Receipt is a chunk that the device has given a receipt for.
	Receipt string `json:"receipt,omitempty"`
	// Removing are chunks that are about to be dropped.
	Removing []string `json:"removing,omitempty"`
	// Removed are chunks that the device has said it has dropped.
	Removed []string `json:"removed,omitempty"`
	// Order is one whose report the coordinator has.
	Order string `json:"order,omitempty"`
	// Config is the version that the device has said it runs.
	Config uint64 `json:"config,omitempty"`
	// Confirmed is a firmware that has been confirmed: no older one may run any more.
	Confirmed string `json:"confirmed,omitempty"`
}

// promises is what must hold after a cut.
type promises struct {
	device    string
	chunks    map[string]bool // id → held; false: dropped
	orders    map[string]bool
	config    uint64
	confirmed string
}

func newPromises() promises {
	return promises{chunks: map[string]bool{}, orders: map[string]bool{}}
}

func (p promises) clone() promises {
	p.chunks, p.orders = maps.Clone(p.chunks), maps.Clone(p.orders)
	return p
}

// pass takes what an event promises.
func (p *promises) pass(e blocks.Event) error {
	if e.Mark == nil {
		return nil
	}
	var m mark
	if err := json.Unmarshal(e.Mark, &m); err != nil {
		return fmt.Errorf("a mark of the recording: %w", err)
	}
	p.take(m)
	return nil
}

func (p *promises) take(m mark) {
	if m.Device != "" {
		p.device = m.Device
	}
	if m.Receipt != "" {
		p.chunks[m.Receipt] = true
	}
	for _, id := range m.Removing {
		delete(p.chunks, id)
	}
	for _, id := range m.Removed {
		p.chunks[id] = false
	}
	if m.Order != "" {
		p.orders[m.Order] = true
	}
	p.config = max(p.config, m.Config)
	if m.Confirmed != "" {
		p.confirmed = m.Confirmed
	}
}

// held are the chunks with a receipt, in a fixed order.
func (p promises) held() (ids []chunk.ID, err error) {
	for _, s := range slices.Sorted(maps.Keys(p.chunks)) {
		if !p.chunks[s] {
			continue
		}
		id, err := chunk.ParseID(s)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}
