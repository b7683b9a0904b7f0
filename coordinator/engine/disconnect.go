package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/deimos-edge/deimos/wire"
)

const (
	// connzPage is how many connections a server lists at once.
	connzPage = 256

	// sweepQuiet is how long to wait for one more server of a cluster to answer.
	sweepQuiet = 250 * time.Millisecond
)

// Disconnect ends a device's connections now, also those that are just being
// opened; its last will is published. It keeps the device out only together
// with [Config.Authorize], which must have begun to refuse it before the call.
// A device that is not connected is no error.
//
// No order of events leaves a connection behind: a server knows a connection's
// client id before it asks for its rights. Either the connection is in the
// server's list here, or the question comes later, and Authorize refuses.
func (e *Engine) Disconnect(ctx context.Context, id wire.DeviceID) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	for more := true; more; {
		var err error
		if more, err = e.sweep(ctx, id); err != nil {
			return fmt.Errorf("cannot make sure that device %s is cut off; it cannot connect again, try once more: %w", id, err)
		}
	}
	return nil
}

// sweep ends the connections that the servers list for a device, and tells
// whether there may be more of them.
func (e *Engine) sweep(ctx context.Context, id wire.DeviceID) (more bool, err error) {
	query, err := json.Marshal(map[string]any{"mqtt_client": string(id), "limit": connzPage})
	if err != nil {
		return false, err
	}
	if e.local != nil { // one server, one answer
		m, err := e.sys.RequestWithContext(ctx, "$SYS.REQ.SERVER."+e.sys.ConnectedServerId()+".CONNZ", query)
		if err != nil {
			return false, err
		}
		return e.kickListed(ctx, m)
	}
	inbox := e.sys.NewRespInbox()
	sub, err := e.sys.SubscribeSync(inbox)
	if err != nil {
		return false, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := e.sys.PublishRequest("$SYS.REQ.SERVER.PING.CONNZ", inbox, query); err != nil {
		return false, err
	}
	m, err := sub.NextMsgWithContext(ctx)
	for err == nil {
		var full bool
		if full, err = e.kickListed(ctx, m); err != nil {
			return false, err
		}
		more = more || full
		quiet, cancel := context.WithTimeout(ctx, sweepQuiet)
		m, err = sub.NextMsgWithContext(quiet)
		cancel()
		if err != nil && ctx.Err() == nil {
			return more, nil // all have answered that will
		}
	}
	return false, err
}

// connz is a server's answer to CONNZ in the system account.
type connz struct {
	Server struct {
		ID string `json:"id"`
	} `json:"server"`
	Data struct {
		Connections []struct {
			CID uint64 `json:"cid"`
		} `json:"connections"`
	} `json:"data"`
	Error *struct {
		Description string `json:"description"`
	} `json:"error"`
}

// kickListed ends the connections in one server's answer. full says that the
// server may have more.
func (e *Engine) kickListed(ctx context.Context, m *nats.Msg) (full bool, err error) {
	var list connz
	if err := json.Unmarshal(m.Data, &list); err != nil {
		return false, fmt.Errorf("read the message server's list of connections: %w", err)
	}
	if list.Error != nil {
		return false, fmt.Errorf("the message server does not list its connections: %s", list.Error.Description)
	}
	for _, c := range list.Data.Connections {
		body, err := json.Marshal(map[string]uint64{"cid": c.CID})
		if err != nil {
			return false, err
		}
		// That the connection has ended by itself, or its server has, is fine.
		_, err = e.sys.RequestWithContext(ctx, "$SYS.REQ.SERVER."+list.Server.ID+".KICK", body)
		if err != nil && !errors.Is(err, nats.ErrNoResponders) {
			return false, err
		}
	}
	return len(list.Data.Connections) >= connzPage, nil
}
