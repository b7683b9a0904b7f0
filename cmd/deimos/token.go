package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
)

type tokenCmd struct {
	Create tokenCreateCmd `cmd:"" help:"Make a token by which devices enrol. It is shown this once."`
	List   tokenListCmd   `cmd:"" help:"List the tokens, without their secrets."`
	Revoke tokenRevokeCmd `cmd:"" help:"End a token for ever. Who came in by it stays."`
}

type tokenCreateCmd struct {
	Name  string   `help:"What it is for, as a note." placeholder:"TEXT"`
	Group string   `help:"Group that the devices join." placeholder:"NAME"`
	Label []string `sep:"none" help:"Label that the devices get; may be repeated." placeholder:"KEY=VALUE"`
	Uses  int      `default:"1" help:"How many devices may use it (${default})."`
	Valid duration `default:"24h" help:"How long it can be used (${default})."`
	cli.Output
}

func (t *tokenCreateCmd) Run(ctx context.Context, all *commands) error {
	if t.Uses < 1 || t.Valid.seconds() < 1 {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("a token has at least one use and is valid for at least a second")}
	}
	labels, err := parseLabels(t.Label)
	if err != nil {
		return err
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	tok, err := c.CreateToken(ctx, api.TokenRequest{Name: t.Name, Group: t.Group, Labels: labels, Uses: t.Uses, ValidSeconds: t.Valid.seconds()})
	if err != nil {
		return err
	}
	return t.Print(tok, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, tok.Token) // alone, so that a script can take it
		return err
	})
}

type tokenListCmd struct{ cli.Output }

func (t *tokenListCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Tokens(ctx)
	if err != nil {
		return err
	}
	return t.Print(list, func(w io.Writer) error {
		if len(list) == 0 {
			_, err := fmt.Fprintln(w, "There is no token. Make one with \"deimos token create\".")
			return err
		}
		var rows []string
		for _, v := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s",
				v.ID, tokenState(v, time.Now()), v.Name, v.Group, labelText(v.Labels), v.Left, v.Uses-v.Left, cli.Ago(v.Created), v.Expires.Format(time.RFC3339)))
		}
		return cli.Table(w, "TOKEN\tSTATE\tNAME\tGROUP\tLABELS\tLEFT\tCAME IN\tCREATED\tEXPIRES", rows)
	})
}

func tokenState(t api.Token, now time.Time) string {
	switch {
	case !t.Revoked.IsZero():
		return "revoked"
	case now.After(t.Expires):
		return "expired"
	case t.Left == 0:
		return "used up"
	}
	return "good"
}

type tokenRevokeCmd struct {
	ID string `arg:"" help:"Id of the token (\"deimos token list\")."`
	cli.Output
}

func (t *tokenRevokeCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	v, err := c.RevokeToken(ctx, t.ID)
	if err != nil {
		return err
	}
	return t.Print(v, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "Token %s is revoked. %s came in by it and stay; \"deimos device retire\" sends them away.\n", v.ID, cli.Count(v.Uses-v.Left, "device"))
		return err
	})
}

// parseLabels reads flags of the form KEY=VALUE.
func parseLabels(flags []string) (map[string]string, error) {
	out, err := api.ParseLabels(flags)
	if err != nil {
		return nil, &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	return out, nil
}

func labelText(labels map[string]string) string {
	var out []string
	for k, v := range labels {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}
