package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

type operatorCmd struct {
	Create operatorCreateCmd `cmd:"" help:"Let somebody call the coordinator. Prints a context file for them; its token is shown this once."`
	List   operatorListCmd   `cmd:"" help:"List who has or had a token."`
	Revoke operatorRevokeCmd `cmd:"" help:"End somebody's token, at once."`
}

type operatorCreateCmd struct {
	Name  string   `arg:"" help:"Who it is for: a-z, 0-9, '-' and '_'."`
	Role  string   `required:"" enum:"viewer,operator,release-manager,admin" help:"What they may do: viewer (look), operator (and devices, orders, data, configuration), release-manager (look, and updates) or admin (everything)."`
	Valid duration `default:"90d" help:"How long it can be used (${default})."`
	URL   string   `placeholder:"URL" help:"Address of the coordinator as they see it. Default: the one used here."`
	Out   string   `type:"path" placeholder:"FILE" help:"New file for it, that only you can read. Default: print it."`
	cli.Output
}

func (o *operatorCreateCmd) Run(ctx context.Context, all *commands) (err error) {
	if o.Valid.seconds() < 1 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("a token is valid for at least a second")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	file := c.Context("")
	if o.URL != "" {
		file.URL = o.URL
		if _, err := api.NewClient(file); err != nil {
			return &cli.Error{Code: cli.ExitUsage, Err: err}
		}
	} else if loopback(file.URL) {
		fmt.Fprintf(os.Stderr, "%s is for this machine only; who works elsewhere needs another address in the file: name it with --url\n", file.URL)
	}
	out := io.Writer(os.Stdout)
	if o.Out != "" {
		// Before there is a token: one that cannot be kept is not made.
		f, open := os.OpenFile(o.Out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if open != nil {
			return &cli.Error{Code: cli.ExitNoCreate, Err: fmt.Errorf("the context file cannot be made: %w", open)}
		}
		defer func() { // err is the function's
			err = errors.Join(err, f.Close())
			if err != nil {
				os.Remove(o.Out)
			}
		}()
		out = f
	}
	tok, err := c.CreateOperator(ctx, api.OperatorRequest{Name: o.Name, Role: api.Role(o.Role), ValidSeconds: o.Valid.seconds()})
	if err != nil {
		return err
	}
	file.Token = tok.Token
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	if err := e.Encode(file); err != nil {
		return fmt.Errorf("the token could not be written and is lost; revoke operator %s and make another: %w", tok.Name, err)
	}
	if o.Out == "" {
		return nil
	}
	return o.Print(tok.Operator, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s can use it until %s with --context %s.\n", tok.Name, tok.Expires.Format(time.RFC3339), shellWord(o.Out))
		return err
	})
}

// loopback tells whether an address means something only on this machine.
func loopback(address string) bool {
	u, err := url.Parse(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && (ip.IsLoopback() || ip.IsUnspecified())
}

type operatorListCmd struct{ cli.Output }

func (o *operatorListCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Operators(ctx)
	if err != nil {
		return err
	}
	return o.Print(list, func(w io.Writer) error {
		if len(list) == 0 {
			_, err := fmt.Fprintf(w, "There is only the %s, whose token is in the coordinator's folder. Let others in with \"deimos operator create\".\n", api.Owner)
			return err
		}
		var rows []string
		for _, v := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s",
				v.Name, v.Role, operatorState(v, time.Now()), v.Created.Format(time.DateOnly), v.Expires.Format(time.DateOnly), date(v.LastUsed)))
		}
		return cli.Table(w, "NAME\tROLE\tSTATE\tCREATED\tEXPIRES\tLAST USED", rows)
	})
}

func operatorState(o api.Operator, now time.Time) string {
	switch {
	case !o.Revoked.IsZero():
		return "revoked"
	case now.After(o.Expires):
		return "expired"
	}
	return "good"
}

func date(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.Format(time.DateOnly)
}

type operatorRevokeCmd struct {
	Name string `arg:"" help:"Whose token ends."`
	cli.Output
}

func (o *operatorRevokeCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.RevokeOperator(ctx, o.Name)
	if err != nil {
		return err
	}
	return o.Print(v, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "The token of %s is no longer taken.\n", v.Name)
		return err
	})
}
