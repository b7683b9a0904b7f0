package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/repo"
)

type releaseLogCmd struct {
	Verify releaseLogVerifyCmd `cmd:"" help:"Compute the log of releases anew, and compare it with what is signed and with what others have seen."`
}

// repoFlags say which update repository is read, and by which root it is checked.
type repoFlags struct {
	Keys string `type:"existingdir" placeholder:"DIR" help:"Folder of the keys, for its root."`
	Root string `type:"existingfile" placeholder:"FILE" help:"The root to trust, where the keys are not."`
	Repo string `type:"existingdir" placeholder:"DIR" help:"Folder of the update repository. Default: the coordinator's."`
}

func (f repoFlags) source(all *commands) (repo.Source, error) {
	if f.Repo != "" {
		return repo.Dir(f.Repo), nil
	}
	c, err := all.client()
	return mirror{c}, err
}

// root is the one to trust; empty if none was named.
func (f repoFlags) root() ([]byte, error) {
	switch {
	case f.Keys != "" && f.Root != "":
		return nil, &cli.Error{Code: cli.ExitUsage, Err: errors.New("name the root to trust with --keys or with --root, not with both")}
	case f.Keys != "":
		return repo.FirstRoot(f.Keys)
	case f.Root != "":
		return os.ReadFile(f.Root)
	}
	return nil, nil
}

// reader reads the repository as a device would that has never seen it, and keeps
// nothing after done.
func reader(ctx context.Context, source repo.Source, root []byte) (c *repo.Client, done func(), err error) {
	dir, err := os.MkdirTemp("", "deimos-repo-")
	if err != nil {
		return nil, nil, err
	}
	done = func() { os.RemoveAll(dir) }
	c, err = repo.NewClient(repo.ClientOptions{Dir: dir, Root: root, Source: source})
	if err == nil {
		err = c.Refresh(ctx, time.Now())
	}
	if err != nil {
		done()
	}
	return c, done, err
}

type releaseLogVerifyCmd struct {
	repoFlags
	Checkpoint []string `type:"existingfile" placeholder:"FILE" help:"Signed checkpoint that was seen elsewhere; may be repeated."`
	cli.Output
}

// maxCheckpoint bounds a file with a signed checkpoint, in bytes.
const maxCheckpoint = 64 << 10

func (r *releaseLogVerifyCmd) Run(ctx context.Context, all *commands) error {
	root, err := r.root()
	if err != nil {
		return err
	}
	if root == nil {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("name the root to trust, with --keys or with --root")}
	}
	seen, err := r.notes()
	if err != nil {
		return err
	}
	source, err := r.source(all)
	if err != nil {
		return err
	}
	if m, ok := source.(mirror); ok {
		if err := reported(ctx, m.c, seen); err != nil {
			return err
		}
	}
	client, done, err := reader(ctx, source, root)
	if err != nil {
		return err
	}
	defer done()
	report, err := client.VerifyLog(ctx, seen)
	if err != nil {
		return err
	}
	return r.printReport(report)
}

// mirror is the update repository of a coordinator, as operators read it.
type mirror struct{ c *api.Client }

// Open implements [repo.Source].
func (m mirror) Open(ctx context.Context, path string, offset int64) (io.ReadCloser, error) {
	raw, err := m.c.RepoFile(ctx, path)
	var refused *api.Error
	switch {
	case errors.As(err, &refused) && refused.Status == http.StatusNotFound:
		return nil, fs.ErrNotExist
	case err != nil:
		return nil, err
	case offset > int64(len(raw)):
		return nil, fmt.Errorf("%s has %d bytes, and was asked for from byte %d on", path, len(raw), offset)
	}
	return io.NopCloser(bytes.NewReader(raw[offset:])), nil
}

// reported adds the checkpoints that devices have reported to a coordinator.
func reported(ctx context.Context, c *api.Client, seen map[string]string) error {
	list, err := c.LogSeen(ctx)
	for _, v := range list {
		for _, face := range v.Faces {
			for _, d := range face.Shown {
				seen[fmt.Sprintf("device %s, by its report on order %s,", d.Device, d.Order)] = face.Checkpoint
			}
		}
	}
	return err
}

// notes are the checkpoints that were named.
func (r *releaseLogVerifyCmd) notes() (map[string]string, error) {
	seen := map[string]string{}
	for _, file := range r.Checkpoint {
		raw, err := durable.ReadFile(file, maxCheckpoint)
		if err != nil {
			return nil, err
		}
		seen[file] = string(raw)
	}
	return seen, nil
}

// printReport shows the log; problems are the command's error.
func (r *releaseLogVerifyCmd) printReport(report repo.LogReport) error {
	if err := r.Print(report, func(w io.Writer) error {
		var rows []string
		for n, record := range report.Records {
			rows = append(rows, fmt.Sprintf("%d\t%s\t%s\t%s", n, record.Version, cli.Short(record.SHA256), record.Time.Format(time.RFC3339)))
		}
		if err := cli.Table(w, "RECORD\tVERSION\tSHA256\tLOGGED", rows); err != nil {
			return err
		}
		for _, p := range report.Problems {
			fmt.Fprintf(w, "✗ %s\n", p)
		}
		_, err := fmt.Fprintf(w, "%s: %s, tree %s; %s of others fit\n", report.Name, cli.Count(int(report.Size), "record"), report.Hash, cli.Count(report.Compared, "checkpoint"))
		return err
	}); err != nil {
		return err
	}
	if n := len(report.Problems); n > 0 {
		return fmt.Errorf("the log of releases does not agree with what is signed and seen, in %s", cli.Count(n, "place"))
	}
	return nil
}
