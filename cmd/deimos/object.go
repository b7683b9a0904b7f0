package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/renameio/v2"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/durable"
)

type objectCmd struct {
	Put objectPutCmd `cmd:"" help:"Store a file."`
	Get objectGetCmd `cmd:"" help:"Get a file back, verified."`
	Ls  objectLsCmd  `cmd:"" help:"List the files."`
	Rm  objectRmCmd  `cmd:"" help:"Remove a file."`
}

type objectPutCmd struct {
	File     string `arg:"" type:"path" help:"File to store; - for standard input."`
	Name     string `help:"Name on the fleet. Default: the file's name." placeholder:"NAME"`
	Replicas int    `default:"2" help:"How many devices hold each chunk (${default})."`
	cli.Output
}

// putResult is what "object put" prints as JSON.
type putResult struct {
	api.Object
	Placements []api.Placement `json:"placements"`
}

func (p *objectPutCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	in, size, err := openInput(p.File)
	if err != nil {
		return err
	}
	defer in.Close()
	name := p.Name
	if name == "" {
		if in == os.Stdin {
			return &cli.Error{Code: cli.ExitUsage, Err: errors.New("what comes from standard input needs a --name")}
		}
		name = filepath.Base(p.File)
	}
	bar := newProgress("storing "+name, size)
	o, placed, err := object.Put(ctx, c, name, in, p.Replicas, bar.add)
	bar.end()
	if err != nil {
		return err
	}
	return p.Print(putResult{o, placed}, func(w io.Writer) error {
		receipts := 0
		devices := map[string]bool{}
		for _, pl := range placed {
			for _, h := range pl.Holders {
				if !h.Lost {
					receipts++
					devices[string(h.Device)] = true
				}
			}
		}
		_, err := fmt.Fprintf(w, "%s: %s in %s on %s, %s\nsha256 %s\n",
			o.Name, cli.Bytes(o.Size), cli.Count(len(o.Chunks), "chunk"), cli.Count(len(devices), "device"), cli.Count(receipts, "signed receipt"), o.SHA256)
		return err
	})
}

// openInput opens a file that can be stored; size is -1 if it is not known.
func openInput(path string) (*os.File, int64, error) {
	if path == "-" { // the argument itself: a file can have this name
		return os.Stdin, -1, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	s, err := f.Stat()
	if err == nil && s.IsDir() {
		err = fmt.Errorf("%s is a folder; store its files one by one, or an archive of it", path)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, s.Size(), nil
}

type objectGetCmd struct {
	Name string `arg:"" help:"Name on the fleet."`
	Out  string `short:"O" type:"path" help:"File to write; - for standard output. Default: the name, in this folder." placeholder:"FILE"`
	cli.Output
}

func (g *objectGetCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	if g.Out == "-" {
		_, err := object.Get(ctx, c, g.Name, os.Stdout, nil)
		return err
	}
	path := g.Out
	if path == "" {
		path = filepath.Base(g.Name)
	}
	info, err := c.Object(ctx, g.Name)
	if err != nil {
		return err
	}
	f, err := openOutput(ctx, path)
	if err != nil {
		return fmt.Errorf("the file cannot be written: %w", err)
	}
	defer f.abandon()
	bar := newProgress("getting "+g.Name, info.Size)
	o, err := object.Get(ctx, c, g.Name, f, bar.add)
	bar.end()
	if err != nil {
		return err
	}
	if err := f.finish(); err != nil {
		return fmt.Errorf("the file cannot be written: %w", err)
	}
	return g.Print(o, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s: %s in %s, each verified\nsha256 %s\n", path, cli.Bytes(o.Size), cli.Count(len(o.Chunks), "chunk"), o.SHA256)
		return err
	})
}

// output is where a file from the fleet goes. A regular file appears whole and
// verified, or not at all; what is something else (a device, a FIFO, a symbolic
// link) is written to as it comes, because to replace it would not be to write
// to it.
type output struct {
	io.Writer
	finish  func() error
	abandon func() // does nothing after finish
}

func openOutput(ctx context.Context, path string) (*output, error) {
	s, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		umask := syscall.Umask(0o077)
		syscall.Umask(umask)
		return openFile(path, 0o666&^0o022&^fs.FileMode(umask))
	case err != nil:
		return nil, err
	case s.IsDir():
		return nil, fmt.Errorf("%s is a folder; name a file in it", path)
	case s.Mode().IsRegular():
		return openFile(path, s.Mode().Perm())
	}
	return openStream(ctx, path)
}

// openFile writes beside path, for nobody else to read until it is whole.
func openFile(path string, mode fs.FileMode) (*output, error) {
	dir := filepath.Dir(path)
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithPermissions(0o600))
	if err != nil {
		return nil, err
	}
	finish := func() error {
		if err := f.Chmod(mode); err != nil {
			return err
		}
		if err := f.CloseAtomicallyReplace(); err != nil {
			return err
		}
		return durable.SyncDir(dir)
	}
	return &output{f, finish, func() { _ = f.Cleanup() }}, nil
}

// openStream opens what is there already. A FIFO opens when somebody reads it.
func openStream(ctx context.Context, path string) (*output, error) {
	type opened struct {
		f   *os.File
		err error
	}
	done := make(chan opened, 1)
	go func() {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
		done <- opened{f, err}
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return nil, o.err
		}
		return &output{o.f, o.f.Close, func() { _ = o.f.Close() }}, nil
	case <-ctx.Done(): // the program ends, and the open with it
		return nil, ctx.Err()
	}
}

type objectLsCmd struct{ cli.Output }

func (l *objectLsCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	list, err := c.Objects(ctx)
	if err != nil {
		return err
	}
	return l.Print(list, func(w io.Writer) error {
		var rows []string
		for _, o := range list {
			rows = append(rows, fmt.Sprintf("%s\t%s\t%d\t%s\t%s", o.Name, cli.Bytes(o.Size), len(o.Chunks), cli.Short(o.SHA256), cli.Ago(o.Created)))
		}
		return cli.Table(w, "NAME\tSIZE\tCHUNKS\tSHA256\tSTORED", rows)
	})
}

type objectRmCmd struct {
	Name string `arg:"" help:"Name on the fleet."`
	cli.Output
}

func (r *objectRmCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	if err := c.RemoveObject(ctx, r.Name); err != nil {
		return err
	}
	return r.Print(map[string]string{"removed": r.Name}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s is removed; devices drop the chunks that no other file has.\n", r.Name)
		return err
	})
}

// progress is a line on a terminal that says how far a transfer is. Where
// nobody watches, it says nothing.
type progress struct {
	what  string
	total int64 // -1: not known
	done  atomic.Int64
	began time.Time
	stop  chan struct{}
	ended chan struct{}
}

func newProgress(what string, total int64) *progress {
	p := &progress{what: what, total: total, began: time.Now(), stop: make(chan struct{}), ended: make(chan struct{})}
	if !cli.Terminal(os.Stderr) {
		close(p.ended)
		return p
	}
	go func() {
		defer close(p.ended)
		t := time.NewTicker(200 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				fmt.Fprint(os.Stderr, "\r\x1b[K", p.line())
			case <-p.stop:
				fmt.Fprint(os.Stderr, "\r\x1b[K")
				return
			}
		}
	}()
	return p
}

func (p *progress) add(n int64) { p.done.Add(n) }

func (p *progress) end() {
	close(p.stop)
	<-p.ended
}

func (p *progress) line() string {
	done := p.done.Load()
	speed := float64(done) / time.Since(p.began).Seconds()
	if p.total <= 0 {
		return fmt.Sprintf("%s: %s, %s/s", p.what, cli.Bytes(done), cli.Bytes(int64(speed)))
	}
	left := "?"
	if speed > 0 {
		left = time.Duration(float64(p.total-done) / speed * float64(time.Second)).Round(time.Second).String()
	}
	return fmt.Sprintf("%s: %3d%% of %s, %s/s, %s left", p.what, 100*done/p.total, cli.Bytes(p.total), cli.Bytes(int64(speed)), left)
}
