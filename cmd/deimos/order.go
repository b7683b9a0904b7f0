package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/wire"
)

type orderCmd struct {
	List   orderListCmd   `cmd:"" help:"List orders, the newest first."`
	Show   orderShowCmd   `cmd:"" help:"Show an order and the device's report."`
	Cancel orderCancelCmd `cmd:"" help:"Ask devices to stop orders, or never to begin them."`
	Send   orderSendCmd   `cmd:"" help:"Send an order of a kind that has no command of its own: device.ping, or an extension's."`
}

type orderListCmd struct {
	targets
	State   string `placeholder:"STATE" help:"Only those in this state: QUEUED, RUNNING, SUCCEEDED, FAILED, REJECTED, TIMED_OUT or CANCELED."`
	Kind    string `placeholder:"KIND" help:"Only those of this kind, e.g. job.run."`
	Pending bool   `help:"Only those that have not ended."`
	Limit   int    `default:"100" help:"At most so many (${default})."`
	cli.Output
}

func (o *orderListCmd) Run(ctx context.Context, all *commands) error {
	q := api.OrderQuery{State: wire.State(o.State), Kind: wire.Kind(o.Kind), Pending: o.Pending, Limit: o.Limit}
	var err error
	if q.Selector, err = o.selector(); err != nil {
		return err
	}
	if o.Limit < 1 || o.Limit > api.MaxOrders {
		return &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf("a list has 1 to %d orders", api.MaxOrders)}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Orders(ctx, q)
	if err != nil {
		return err
	}
	return o.Print(list, func(w io.Writer) error {
		if len(list.Orders) == 0 {
			fmt.Fprintln(w, "No order fits.")
		} else {
			var rows []string
			for _, v := range list.Orders {
				rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s", v.ID, v.Device, v.Kind, stateOf(v), v.Code, cli.Ago(v.Updated)))
			}
			if err := cli.Table(w, "ORDER\tDEVICE\tKIND\tSTATE\tCODE\tCHANGED", rows); err != nil {
				return err
			}
		}
		if list.Cut != "" {
			fmt.Fprintf(cli.Plain(os.Stderr), "(%s)\n", list.Cut)
		}
		return nil
	})
}

func stateOf(v api.OrderSummary) string {
	if v.Canceled && !v.State.Terminal() {
		return string(v.State) + ", cancel asked"
	}
	return string(v.State)
}

type orderShowCmd struct {
	IDs  []string `arg:"" name:"order" help:"DEVICE ORDER, or ORDER alone if it is open or ended lately."`
	Wait duration `placeholder:"DURATION" help:"Wait up to this long for its end; exit code 75 if it has not ended by then."`
	cli.Output
}

func (o *orderShowCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	device, id, err := findOrder(ctx, c, o.IDs)
	if err != nil {
		return err
	}
	v, err := c.Order(ctx, device, id, 0)
	if err == nil && o.Wait > 0 && !v.State.Terminal() {
		v, err = watchOrder(ctx, c, v, time.Duration(o.Wait))
	}
	if err != nil {
		return err
	}
	err = o.Print(v, func(w io.Writer) error { return writeOrder(w, v) })
	if err == nil && o.Wait > 0 && !v.State.Terminal() {
		err = notEnded(o.Wait, "order "+id, v.State)
	}
	return err
}

// findOrder reads "DEVICE ORDER", or looks for an order by its id alone.
func findOrder(ctx context.Context, c *api.Client, args []string) (wire.DeviceID, string, error) {
	switch len(args) {
	case 2:
		return wire.DeviceID(args[0]), args[1], nil
	case 1:
		list, err := c.Orders(ctx, api.OrderQuery{ID: args[0], Limit: 2})
		switch {
		case err != nil:
			return "", "", err
		case len(list.Orders) == 1:
			return list.Orders[0].Device, args[0], nil
		}
		return "", "", fmt.Errorf("there is no order %s among those that are open or ended lately; name its device too: \"deimos order show DEVICE ORDER\"", args[0])
	}
	return "", "", &cli.Error{Code: cli.ExitUsage, Err: errors.New("an order is named by DEVICE ORDER, or by ORDER alone")}
}

// awaitOrder waits for an order's end until wait is over.
func awaitOrder(ctx, wait context.Context, c *api.Client, v api.Order, watch func(api.Order)) (api.Order, error) {
	return endOf(ctx, wait,
		func(ctx context.Context) (api.Order, error) {
			return c.AwaitOrder(ctx, v.Order.Device, v.Order.ID, watch)
		},
		func(ctx context.Context) (api.Order, error) { return c.Order(ctx, v.Order.Device, v.Order.ID, 0) })
}

// endOf awaits the end of an order or a job until wait is over. Then it is asked for
// once more, so that the answer is how it is now.
func endOf[T any](ctx, wait context.Context, await, now func(context.Context) (T, error)) (T, error) {
	end, err := await(wait)
	if err != nil && wait.Err() != nil && ctx.Err() == nil {
		return now(ctx)
	}
	return end, err
}

// notEnded is the error of a command that has waited in vain.
func notEnded(after fmt.Stringer, what string, state wire.State) error {
	return &cli.Error{Code: cli.ExitNotYet, Err: fmt.Errorf("after %s %s has not ended: it is %s", after, what, state)}
}

// cancelEach cancels one after the other. One that fails is no reason to leave the
// rest, unless ctx is over, which alone is err.
func cancelEach[K, V any](ctx context.Context, all []K, cancel func(K) (V, error)) (done []V, failed []error, err error) {
	done = []V{}
	for _, k := range all {
		v, err := cancel(k)
		switch {
		case ctx.Err() != nil:
			return nil, nil, context.Cause(ctx)
		case err != nil:
			failed = append(failed, err)
		default:
			done = append(done, v)
		}
	}
	return done, failed, nil
}

// watchOrder is awaitOrder that shows a person on the terminal how far it is.
func watchOrder(ctx context.Context, c *api.Client, v api.Order, limit time.Duration) (api.Order, error) {
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	shown := false
	var watch func(api.Order)
	if cli.Terminal(os.Stderr) {
		watch = func(v api.Order) {
			shown = true
			fmt.Fprint(os.Stderr, "\r\x1b[K")
			fmt.Fprint(cli.Plain(os.Stderr), progressLine(v))
		}
		watch(v)
	}
	end, err := awaitOrder(ctx, wait, c, v, watch)
	if shown {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
	return end, err
}

func progressLine(v api.Order) string {
	const width = 30
	if v.State != wire.Running {
		return fmt.Sprintf("%s  %s", v.Order.Kind, v.State)
	}
	done := min(max(v.Progress, 0), 1)
	n := int(done * width)
	return fmt.Sprintf("%s  [%s%s] %3.0f%%", v.Order.Kind, strings.Repeat("=", n), strings.Repeat(" ", width-n), done*100)
}

func writeOrder(w io.Writer, v api.Order) error {
	row := func(k, format string, args ...any) { fmt.Fprintf(w, "%-9s%s\n", k, fmt.Sprintf(format, args...)) }
	row("order", "%s", v.Order.ID)
	row("kind", "%s", v.Order.Kind)
	row("device", "%s", v.Order.Device)
	row("issued", "%s", v.Order.Issued.Format(time.RFC3339))
	row("expires", "%s", v.Order.Expires.Format(time.RFC3339))
	row("changed", "%s", v.Updated.Format(time.RFC3339))
	if v.State == wire.Running {
		row("state", "%s, %.0f%%", v.State, 100*v.Progress)
	} else {
		row("state", "%s", v.State)
	}
	if k := v.Cancel; k != nil {
		row("cancel", "asked at %s by %s (order %s)", k.At.Format(time.RFC3339), k.By, k.Order)
		if k.Reason != "" {
			row("", "%s", k.Reason)
		}
	}
	if v.Result.Reason != "" {
		row("because", "%s (%s)", v.Result.Reason, v.Result.Code)
	}
	if v.Result.Dropped {
		row("result", "given up by the device, whose outbox was full")
	}
	if len(v.Result.Body) > 0 {
		row("result", "%s", v.Result.Body)
	}
	if len(v.Late) > 0 {
		row("late", "the device has answered after this order was over; -o json has its signed report")
	}
	return nil
}

type orderCancelCmd struct {
	IDs     []string `arg:"" optional:"" name:"order" help:"DEVICE ORDER..., or one ORDER alone if it is open."`
	Pending bool     `help:"All orders that have not ended, of the devices that are meant."`
	Reason  string   `placeholder:"TEXT" help:"Why, for the record."`
	Yes     bool     `help:"Do it, if more than one order is meant."`
	changed
	cli.Output
}

func (o *orderCancelCmd) Run(ctx context.Context, all *commands) error {
	sel, err := o.targets.selector()
	if err != nil {
		return err
	}
	if o.Pending == (len(o.IDs) > 0) || !o.Pending && (o.All || !sel.Empty()) {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("name either DEVICE ORDER... or --pending, with --device, --group or --label for some devices, or --all")}
	}
	if o.Pending {
		if _, err := o.selector(); err != nil {
			return err
		}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := o.meant(ctx, c, sel)
	if err != nil {
		return err
	}
	if len(list) > 1 {
		fmt.Fprintf(os.Stderr, "%s would be canceled\n", cli.Count(len(list), "open order"))
		if !o.Yes {
			return &cli.Error{Code: cli.ExitUsage, Err: errors.New("nothing was done; say --yes to cancel them all")}
		}
	}
	done, failed, err := cancelEach(ctx, list, func(s api.OrderSummary) (api.Order, error) {
		return c.CancelOrder(ctx, s.Device, s.ID, api.CancelRequest{Reason: o.Reason})
	})
	if err != nil {
		return err
	}
	failed = slices.DeleteFunc(failed, func(err error) bool { // what has ended meanwhile is as was wished
		var refused *api.Error
		return o.Pending && errors.As(err, &refused) && refused.Code == "ended"
	})
	err = o.Print(done, func(w io.Writer) error {
		if len(list) == 0 {
			fmt.Fprintln(w, "There is no open order to cancel.")
		}
		for _, v := range done {
			fmt.Fprintf(w, "%s  %s  cancel asked (order %s); it ends when the device says so\n", v.Order.ID, v.Order.Device, v.Cancel.Order)
		}
		return nil
	})
	return errors.Join(append(failed, err)...)
}

// meant lists the orders to cancel.
func (o *orderCancelCmd) meant(ctx context.Context, c *api.Client, sel api.Selector) ([]api.OrderSummary, error) {
	if o.Pending {
		var out []api.OrderSummary
		for q := (api.OrderQuery{Selector: sel, Pending: true, Limit: api.MaxOrders}); ; {
			list, err := c.Orders(ctx, q)
			if err != nil {
				return nil, err
			}
			for _, s := range list.Orders {
				if s.Kind != wire.KindOrderCancel { // one that was canceled before: it may be lost
					out = append(out, s)
				}
			}
			if list.Next == "" || list.Next == q.Before {
				return out, nil
			}
			q.Before = list.Next
		}
	}
	if len(o.IDs) == 1 {
		d, id, err := findOrder(ctx, c, o.IDs)
		return []api.OrderSummary{{Device: d, ID: id}}, err
	}
	var out []api.OrderSummary
	for _, id := range o.IDs[1:] {
		out = append(out, api.OrderSummary{Device: wire.DeviceID(o.IDs[0]), ID: id})
	}
	return out, nil
}

type orderSendCmd struct {
	Kind string   `arg:"" help:"Kind of the order."`
	Body string   `arg:"" optional:"" default:"{}" help:"Its body, JSON."`
	Life duration `placeholder:"DURATION" help:"How long devices may take; default: as is usual for the kind."`
	Key  string   `placeholder:"TEXT" help:"Makes a repeat of this command send nothing twice, for a day."`
	changed
	cli.Output
}

func (o *orderSendCmd) Run(ctx context.Context, all *commands) error {
	sel, err := o.selector()
	if err != nil {
		return err
	}
	if !json.Valid([]byte(o.Body)) {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("the body is not valid JSON")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.SendOrder(ctx, api.SendRequest{Kind: wire.Kind(o.Kind), Body: json.RawMessage(o.Body), LifeSeconds: time.Duration(o.Life).Seconds(), Key: o.Key, Selector: sel})
	if err != nil {
		return err
	}
	return o.Print(list, func(w io.Writer) error {
		var rows []string
		for _, v := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s", v.Order.Device, v.Order.ID, v.State))
		}
		return cli.Table(w, "DEVICE\tORDER\tSTATE", rows)
	})
}
