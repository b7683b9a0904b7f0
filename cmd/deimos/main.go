// Command deimos is the coordinator of a Deimos fleet and the command line for it.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/alecthomas/kong"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/jobs/sandbox"
)

// version is set by the build.
var version = "0.0.0-dev"

const about = `The coordinator of a Deimos fleet, and the command line for it.

  deimos dev                    a whole fleet on this machine, with a tour
  deimos serve --dir fleet      the coordinator
  deimos token create           let a device in
  deimos object put FILE        store a file on the fleet`

type commands struct {
	Context string `env:"DEIMOS_CONTEXT" placeholder:"FILE" help:"Where the coordinator is and how to get in; \"deimos serve\" writes it as operator.json. Default: ~/.config/deimos/operator.json."`

	Serve    serveCmd    `cmd:"" help:"Run the coordinator."`
	Dev      devCmd      `cmd:"" help:"Run a whole fleet on this machine and walk through it."`
	Token    tokenCmd    `cmd:"" help:"Fleet tokens: let devices in."`
	Device   deviceCmd   `cmd:"" help:"Devices of the fleet."`
	Object   objectCmd   `cmd:"" help:"Files stored on the fleet."`
	Key      keyCmd      `cmd:"" help:"The key that stored files are encrypted for."`
	Job      jobCmd      `cmd:"" help:"Run WebAssembly modules where the data is."`
	Audit    auditCmd    `cmd:"" help:"Challenge devices to prove what they hold and compute."`
	Release  releaseCmd  `cmd:"" help:"Make, publish and offer agent updates."`
	Order    orderCmd    `cmd:"" help:"Orders to devices, and what became of them."`
	Config   configCmd   `cmd:"" help:"What the fleet wants of its devices' settings, and what they run."`
	Operator operatorCmd `cmd:"" help:"Who may call the coordinator, and what they may do."`
	Repair   repairCmd   `cmd:"" help:"What is endangered, and what is done about it."`
	Status   statusCmd   `cmd:"" help:"One look at the fleet, and what needs attention."`
	Log      logCmd      `cmd:"" help:"What was changed, when and by whom."`
	Sim      simCmd      `cmd:"" help:"A fleet of simulated devices, to see what a coordinator bears."`
	Version  versionCmd  `cmd:"" help:"Show the version."`
}

// helpOptions is how help is shown.
var helpOptions = kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true})

func main() {
	// The coordinator runs modules itself to know the answers of challenges.
	if len(os.Args) > 1 && os.Args[1] == sandbox.WorkerArg {
		os.Exit(sandbox.WorkerMain())
	}
	var c commands
	cli.Main("deimos", coded, func(ctx context.Context, args []string) error {
		p, err := kong.New(&c,
			kong.Name("deimos"), kong.Description(about),
			helpOptions, kong.BindTo(ctx, (*context.Context)(nil)), kong.Bind(&c))
		if err != nil {
			return err
		}
		k, err := p.Parse(args)
		if err != nil {
			return cli.Usage("deimos", err)
		}
		return k.Run()
	})
}

// coded gives what a coordinator could not be asked, or would not do for this
// operator, an exit code that scripts can tell apart.
func coded(err error) error {
	var refused *api.Error
	switch {
	case errors.Is(err, api.ErrUnreachable):
		return &cli.Error{Code: cli.ExitNoServer, Err: err}
	case errors.As(err, &refused) && (refused.Status == http.StatusUnauthorized || refused.Status == http.StatusForbidden):
		return &cli.Error{Code: cli.ExitNoPerm, Err: err}
	}
	return err
}

// contextPath is the chosen context's file.
func (c *commands) contextPath() (string, error) {
	if c.Context != "" {
		return c.Context, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", errors.New("there is no home folder to find the context in; name it with --context")
	}
	return filepath.Join(dir, "deimos", "operator.json"), nil
}

// client opens the coordinator of the chosen context.
func (c *commands) client() (*api.Client, error) {
	path, err := c.contextPath()
	if err != nil {
		return nil, err
	}
	ctx, err := api.LoadContext(path)
	if err != nil {
		return nil, &cli.Error{Code: cli.ExitConfig, Err: err}
	}
	client, err := api.NewClient(ctx)
	if err != nil {
		return nil, &cli.Error{Code: cli.ExitConfig, Err: fmt.Errorf("the context file %s: %w", path, err)}
	}
	return client, nil
}

type versionCmd struct{ cli.Output }

func (v *versionCmd) Run() error { return cli.PrintVersion(v.Output, "deimos", version) }
