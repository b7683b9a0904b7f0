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

// sweepQuiet is how long to wait for one more server of a cluster to answer.
const sweepQuiet = 250 * time.Millisecond

// Disconnect ends a device's connection now; its last will is published. It
// keeps the device out only together with [Config.Authorize], which must have
// begun to refuse it before the call. A device that is not connected is no
// error.
func (e *Engine) Disconnect(ctx context.Context, id wire.DeviceID) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	var errs []error
	for _, c := range e.gate.forget(id) {
		errs = append(errs, e.kick(ctx, c))
	}
	// Another coordinator, or this one before its last start, may have let it in.
	others, err := e.find(ctx, id)
	errs = append(errs, err)
	for _, c := range others {
		errs = append(errs, e.kick(ctx, c))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot make sure that device %s is cut off; it cannot connect again, try once more: %w", id, err)
	}
	return nil
}

// sysReply is how a server answers in the system account.
type sysReply struct {
	Server struct {
		ID string `json:"id"`
	} `json:"server"`
	Data  json.RawMessage `json:"data"`
	Error *struct {
		Description string `json:"description"`
	} `json:"error"`
}

// kick ends one connection. One that has ended, or whose server has, is fine.
func (e *Engine) kick(ctx context.Context, c connection) error {
	body, err := json.Marshal(map[string]uint64{"cid": c.cid})
	if err != nil {
		return err
	}
	_, err = e.sys.RequestWithContext(ctx, "$SYS.REQ.SERVER."+c.server+".KICK", body)
	if errors.Is(err, nats.ErrNoResponders) {
		return nil
	}
	// The only error in the answer is that there is no such connection.
	return err
}

// find asks all servers for connections of a device.
func (e *Engine) find(ctx context.Context, id wire.DeviceID) ([]connection, error) {
	query, err := json.Marshal(map[string]any{"mqtt_client": string(id), "limit": 16})
	if err != nil {
		return nil, err
	}
	if e.local != nil { // one server, one answer
		m, err := e.sys.RequestWithContext(ctx, "$SYS.REQ.SERVER."+e.sys.ConnectedServerId()+".CONNZ", query)
		if err != nil {
			return nil, err
		}
		return connectionsIn(m)
	}
	inbox := e.sys.NewRespInbox()
	sub, err := e.sys.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := e.sys.PublishRequest("$SYS.REQ.SERVER.PING.CONNZ", inbox, query); err != nil {
		return nil, err
	}
	m, err := sub.NextMsgWithContext(ctx)
	var found []connection
	for err == nil {
		var here []connection
		if here, err = connectionsIn(m); err != nil {
			return found, err
		}
		found = append(found, here...)
		quiet, cancel := context.WithTimeout(ctx, sweepQuiet)
		m, err = sub.NextMsgWithContext(quiet)
		cancel()
		if err != nil && ctx.Err() == nil {
			return found, nil
		}
	}
	return found, err
}

// connectionsIn reads a server's answer to CONNZ.
func connectionsIn(m *nats.Msg) ([]connection, error) {
	var reply sysReply
	if err := json.Unmarshal(m.Data, &reply); err != nil {
		return nil, fmt.Errorf("read the message server's list of connections: %w", err)
	}
	if reply.Error != nil {
		return nil, fmt.Errorf("the message server does not list its connections: %s", reply.Error.Description)
	}
	var list struct {
		Connections []struct {
			CID uint64 `json:"cid"`
		} `json:"connections"`
	}
	if err := json.Unmarshal(reply.Data, &list); err != nil {
		return nil, fmt.Errorf("read the message server's list of connections: %w", err)
	}
	found := make([]connection, 0, len(list.Connections))
	for _, c := range list.Connections {
		found = append(found, connection{reply.Server.ID, c.CID})
	}
	return found, nil
}
