package engine

import (
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"
)

// noReservation is the default of [Config.MaxStore], in bytes: more than any
// disk has. JetStream's own default depends on what is free at the start, and
// it counts a bucket's limit as taken: with less free disk than at the last
// start, a fleet that was running would not come up again.
const noReservation = 1 << 60

// Codes of JetStream's refusals, as in nats-server's errors.json. Two of them
// are for any reason, which their text tells.
const (
	codeNoResources   jetstream.ErrorCode = 10023
	codeNoStorage     jetstream.ErrorCode = 10047
	codeStreamUpdate  jetstream.ErrorCode = 10069
	codeStoreFailed   jetstream.ErrorCode = 10077
	codeOutOfService  jetstream.ErrorCode = 10008 // also after a full disk: JetStream then stops
	codeNotEnabled    jetstream.ErrorCode = 10076
	codeNotEnabledFor jetstream.ErrorCode = 10039
)

// ErrNoSpace is part of every error of [StoreError] that says that there is no
// room for more.
var ErrNoSpace = errors.New("the disk of the coordinator's state has no room for it")

// StoreError makes a sentence of an error of JetStream that a person can do
// something about, and returns any other as it is.
func StoreError(err error) error {
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return err
	}
	switch api.ErrorCode {
	case codeNoResources, codeNoStorage:
		return fmt.Errorf("%w: free space there, then try again (%w)", ErrNoSpace, err)
	case codeStreamUpdate, codeStoreFailed:
		if t := strings.ToLower(api.Description); strings.Contains(t, "insufficient") || strings.Contains(t, "no space") || strings.Contains(t, "maximum bytes") {
			return fmt.Errorf("%w: free space there, then try again (%w)", ErrNoSpace, err)
		}
		return fmt.Errorf("the coordinator's state cannot be written: check its disk, then start the coordinator again: %w", err)
	case codeOutOfService, codeNotEnabled, codeNotEnabledFor:
		return fmt.Errorf("the coordinator's state is out of service, as after a full disk: free space there, then start the coordinator again: %w", err)
	}
	return err
}

// Free is how many bytes the disk of the state has free. ok is false if the
// server is external: its disk is not ours to see.
func (e *Engine) Free() (free int64, ok bool) {
	if e.local == nil {
		return 0, false
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(e.local.lock.Name(), &fs); err != nil {
		return 0, false
	}
	return int64(fs.Bavail) * int64(fs.Bsize), true
}
