package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"filippo.io/age"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/coordinator/object"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/wire"
)

type objectCmd struct {
	Put    objectPutCmd    `cmd:"" help:"Encrypt a file and store it."`
	Get    objectGetCmd    `cmd:"" help:"Get a file back, verified."`
	Ls     objectLsCmd     `cmd:"" help:"List the files, and how far each is from being lost."`
	Show   objectShowCmd   `cmd:"" help:"Show where the parts of a file are."`
	Verify objectVerifyCmd `cmd:"" help:"Read every part of a file from every device that holds it."`
	Rm     objectRmCmd     `cmd:"" help:"Remove a file."`
}

type objectPutCmd struct {
	File           string   `arg:"" type:"path" help:"File to store; - for standard input."`
	Name           *string  `help:"Name on the fleet. Default: the file's name." placeholder:"NAME"`
	Code           string   `placeholder:"K+M" help:"Spread over K+M devices, of which any K are enough to read it. Default: 4+2."`
	Recipient      []string `sep:"none" placeholder:"KEY" help:"Who can read it beside your own key: age1..., or a line of an SSH public key; may be repeated."`
	OnlyRecipients bool     `help:"Only they: your own key, if there is one, does not open it."`
	Identity       string   `type:"path" placeholder:"FILE" help:"Your key, as age or SSH keep it. Default: key.txt beside the context, made at the first put."`
	Plain          bool     `help:"Store it as it is: the devices that hold it can read it, and jobs can run over it."`
	Replicas       int      `placeholder:"N" help:"With --plain: how many devices hold each chunk. Default: 2."`
	cli.Output
}

const defaultReplicas = 2 // one device may be down

// putResult is what "object put" prints as JSON. SHA256 is there of every
// object: who put it knows it.
type putResult struct {
	api.Object
	Placements []api.Placement `json:"placements"`
}

func (p *objectPutCmd) check() error {
	switch {
	case p.Name != nil && *p.Name == "":
		return errors.New("--name is empty: give a name, or leave it out for the file's own")
	case p.Replicas != 0 && !p.Plain:
		return errors.New("--replicas is for files that are stored with --plain; others are spread by --code, as in --code 2+1")
	case p.Plain && (p.Code != "" || len(p.Recipient) > 0 || p.OnlyRecipients || p.Identity != ""):
		return errors.New("--plain stores a file as it is, for everybody to read: --code, --recipient, --only-recipients and --identity are for others")
	case p.OnlyRecipients && p.Identity != "":
		return errors.New("--only-recipients stores a file that your own key does not open: --identity is for others")
	}
	return nil
}

func (p *objectPutCmd) Run(ctx context.Context, all *commands) error {
	if err := p.check(); err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	in, size, err := openInput(ctx, p.File)
	if err != nil {
		return err
	}
	defer in.Close()
	var name string
	if p.Name != nil {
		name = *p.Name
	} else {
		if in == os.Stdin {
			return &cli.Error{Code: cli.ExitUsage, Err: errors.New("what comes from standard input needs a --name")}
		}
		name = filepath.Base(p.File)
	}
	var res putResult
	if p.Plain {
		bar := newProgress("storing "+name, size)
		res.Object, res.Placements, err = object.PutPlain(ctx, c, name, readable(ctx, in, size), cmp.Or(p.Replicas, defaultReplicas), bar.add)
		bar.end()
	} else {
		res, err = p.encrypt(ctx, all, c, name, in, size)
	}
	if err != nil {
		return err
	}
	return p.Print(res, func(w io.Writer) error { return writePut(w, res) })
}

// encrypt stores a file for those who have a key, and goes on where the same
// command was cut off.
func (p *objectPutCmd) encrypt(ctx context.Context, all *commands, c *api.Client, name string, in *os.File, size int64) (res putResult, err error) {
	code := object.DefaultCode
	if p.Code != "" {
		if code, err = object.ParseCode(p.Code); err != nil {
			return res, &cli.Error{Code: cli.ExitUsage, Err: err}
		}
	}
	k, err := all.keyring()
	if err != nil {
		return res, err
	}
	recipients, who, err := k.recipients(p.Identity, p.Recipient, p.OnlyRecipients)
	if err != nil {
		return res, err
	}
	identities, err := k.identities(p.Identity)
	if err != nil {
		return res, err
	}
	state, err := openPutState(k.dir, name, in, code, who)
	if err != nil {
		return res, err
	}
	if state.Session == nil {
		if state.Session, err = object.NewSession(code, size, recipients); err != nil {
			return res, err
		}
		if err := state.keep(); err != nil {
			return res, err
		}
	}
	bar := newProgress("storing "+name, size)
	o, placed, err := object.Put(ctx, c, name, readable(ctx, in, size), state.Session, object.PutOptions{
		Identities: identities, Readers: who, AnyCode: p.Code == "", Progress: bar.add})
	bar.end()
	if err != nil {
		return res, state.interrupted(err, bar.done.Load())
	}
	if err := state.forget(); err != nil {
		return res, err
	}
	res = putResult{o.Object, placed}
	res.SHA256 = o.Digest()
	return res, nil
}

func writePut(w io.Writer, res putResult) error {
	receipts := 0
	devices := map[wire.DeviceID]bool{}
	for _, pl := range res.Placements {
		for _, h := range pl.Holders {
			if !h.Lost {
				receipts++
				devices[h.Device] = true
			}
		}
	}
	how := "plain"
	if res.Code != nil {
		how = fmt.Sprintf("encrypted, code %s", res.Code)
	}
	_, err := fmt.Fprintf(w, "%s: %s in %s on %s, %s, %s\nsha256 %s\n",
		res.Name, cli.Bytes(res.Size), cli.Count(len(res.Chunks), "chunk"), cli.Count(len(devices), "device"), cli.Count(receipts, "signed receipt"), how, res.SHA256)
	return err
}

// openInput opens a file that can be stored; size is -1 if it is not known.
func openInput(ctx context.Context, path string) (f *os.File, size int64, err error) {
	if path == "-" { // the argument itself: a file can have this name
		return os.Stdin, -1, nil
	}
	if f, err = openAny(ctx, path, os.O_RDONLY); err != nil {
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
	if !s.Mode().IsRegular() {
		return f, -1, nil
	}
	return f, s.Size(), nil
}

// openAny opens what may be a FIFO, which opens when somebody is at its other end.
func openAny(ctx context.Context, path string, flag int) (*os.File, error) {
	type opened struct {
		f   *os.File
		err error
	}
	done := make(chan opened, 1)
	go func() {
		f, err := os.OpenFile(path, flag, 0o644)
		done <- opened{f, err}
	}()
	select {
	case o := <-done:
		return o.f, o.err
	case <-ctx.Done(): // the program ends, and the open with it
		return nil, ctx.Err()
	}
}

// readable is a file whose reading ends with ctx, though nothing comes: from a
// pipe or a terminal, which are those without a size.
func readable(ctx context.Context, f *os.File, size int64) io.Reader {
	if size >= 0 {
		return f
	}
	r, w := io.Pipe()
	go func() { // ends with the file, or the program
		_, err := io.Copy(w, f)
		_ = w.CloseWithError(err) // it returns nil
	}()
	context.AfterFunc(ctx, func() { _ = w.CloseWithError(ctx.Err()) })
	return r
}

type objectGetCmd struct {
	Name     string `arg:"" help:"Name on the fleet."`
	Out      string `short:"O" type:"path" help:"File to write; - for standard output. Default: the name, in this folder." placeholder:"FILE"`
	Range    string `placeholder:"A-B" help:"Only the bytes A to B, counted from 0, both included; A- for all from A on. Needs --out."`
	Identity string `type:"path" placeholder:"FILE" help:"Your key, as age or SSH keep it. Default: key.txt beside the context."`
	Plain    bool   `help:"It was stored with --plain. Who has a key must say so: nothing else shows that it is not a forgery of an encrypted file."`
	cli.Output
}

// parseRange reads A-B of a file of size bytes: from, and up to without to.
func parseRange(s string, size int64) (from, to int64, err error) {
	a, b, ok := strings.Cut(s, "-")
	from, err = strconv.ParseInt(a, 10, 64)
	last := int64(math.MaxInt64)
	if err == nil && b != "" {
		last, err = strconv.ParseInt(b, 10, 64)
	}
	if !ok || err != nil || from < 0 || last < from {
		return 0, 0, &cli.Error{Code: cli.ExitUsage, Err: fmt.Errorf("%q is no range of bytes, as in 0-99 for the first hundred", s)}
	}
	if from >= size {
		return 0, 0, fmt.Errorf("the file has %d bytes, and none from %d on", size, from)
	}
	return from, min(last, size-1) + 1, nil
}

// openObject believes an object's record, with the key that is there.
func (c *commands) openObject(ctx context.Context, client *api.Client, name, identity string, plain bool) (*object.Object, error) {
	k, err := c.keyring()
	if err != nil {
		return nil, err
	}
	var identities []age.Identity
	if !plain {
		if identities, err = k.identities(identity); err != nil {
			return nil, err
		}
	}
	o, err := object.Open(ctx, client, name, identities)
	if errors.Is(err, object.ErrPlain) {
		return nil, fmt.Errorf("%w: if it was stored so, say --plain", err)
	}
	if errors.Is(err, object.ErrNoKey) {
		return nil, &cli.Error{Code: cli.ExitNoPerm, Err: fmt.Errorf("%w: name the file of a key that it was stored for with --identity (looked for: %s)", err, cmp.Or(identity, k.path()))}
	}
	return o, err
}

func (g *objectGetCmd) Run(ctx context.Context, all *commands) error {
	if g.Range != "" && g.Out == "" {
		return &cli.Error{Code: cli.ExitUsage, Err: errors.New("say with --out which file gets the range; it must not take the place of the whole one")}
	}
	c, err := all.client()
	if err != nil {
		return err
	}
	o, err := all.openObject(ctx, c, g.Name, g.Identity, g.Plain)
	if err != nil {
		return err
	}
	from, to := int64(0), o.Size
	if g.Range != "" {
		if from, to, err = parseRange(g.Range, o.Size); err != nil {
			return err
		}
	}
	path := g.Out
	if path == "" {
		path = filepath.Base(g.Name)
	}
	var f *output
	if path == "-" {
		f = streamTo(os.Stdout)
	} else if f, err = openOutput(ctx, path, g.Range, o.Version()); err != nil {
		return fmt.Errorf("the file cannot be written: %w", err)
	}
	bar := newProgress("getting "+g.Name, to-from)
	if g.Range != "" {
		if err = f.restart(); err == nil {
			err = o.WriteRange(ctx, c, f, from, to, bar.add)
		}
	} else {
		err = getWhole(ctx, c, o, f, bar.add)
	}
	bar.end()
	if err != nil {
		// Without the digest of the whole, a range cannot go on; and what does not
		// have it, or was removed, need not.
		if kept := f.abandon(g.Range == "" && !errors.Is(err, object.ErrWhole) && !errors.Is(err, object.ErrRemoved)); kept > 0 {
			err = fmt.Errorf("%w; %s that came are kept, and the same command goes on from there", err, cli.Bytes(kept))
		}
		return err
	}
	if err := f.finish(); err != nil {
		return fmt.Errorf("the file cannot be written: %w", err)
	}
	if path == "-" {
		return nil
	}
	return g.Print(getResult{o.Object, o.Digest(), from, to - from}, func(w io.Writer) error {
		if g.Range != "" {
			_, err := fmt.Fprintf(w, "%s: %s from byte %d on, each shard verified\n", path, cli.Bytes(to-from), from)
			return err
		}
		_, err := fmt.Fprintf(w, "%s: %s, every byte verified\nsha256 %s\n", path, cli.Bytes(o.Size), o.Digest())
		return err
	})
}

// getResult is what "object get" prints as JSON.
type getResult struct {
	api.Object
	SHA256 string `json:"sha256"` // of the whole file
	From   int64  `json:"from"`
	Bytes  int64  `json:"bytes"` // written
}

// getWhole goes on with what is there. If that was not what it should have been,
// it begins anew.
func getWhole(ctx context.Context, c *api.Client, o *object.Object, f *output, progress func(int64)) error {
	if f.had > o.Size {
		if err := f.restart(); err != nil {
			return err
		}
	}
	if f.had == 0 {
		return o.Write(ctx, c, f, progress)
	}
	err := o.Resume(ctx, c, f.before, f.had, f, progress)
	if !errors.Is(err, object.ErrWhole) {
		return err
	}
	progress(-f.had)
	if err := f.restart(); err != nil {
		return err
	}
	return o.Write(ctx, c, f, progress)
}

// output is where a file from the fleet goes. A regular file appears whole and
// verified, or not at all; what has come of it is kept beside it, for the next
// try. What is something else (a device, a FIFO, a symbolic link) is written to
// as it comes, because to replace it would not be to write to it.
type output struct {
	io.Writer
	had    int64     // bytes that came before
	before io.Reader // which are these
	// restart forgets what came.
	restart func() error
	finish  func() error
	// abandon keeps what has come if it may be kept, and returns how much that is.
	abandon func(keep bool) int64
}

// openOutput opens what a whole file is written to, or a range, as it was asked
// for; version is of the file.
func openOutput(ctx context.Context, path, span, version string) (*output, error) {
	// What a symbolic link leads to keeps its content, too, until all of the new is there.
	if to, err := filepath.EvalSymlinks(path); err == nil {
		path = to
	}
	s, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		umask := syscall.Umask(0o077)
		syscall.Umask(umask)
		return openFile(path, 0o666&^0o022&^fs.FileMode(umask), span, version)
	case err != nil:
		return nil, err
	case s.IsDir():
		return nil, fmt.Errorf("%s is a folder; name a file in it", path)
	case s.Mode().IsRegular():
		return openFile(path, s.Mode().Perm(), span, version)
	}
	f, err := openAny(ctx, path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, err
	}
	return streamTo(f), nil
}

// openFile writes beside path, for nobody else to read until it is whole. The
// name there tells the content that it is for: of another, nothing is kept. What
// is kept of the whole is not touched by a range.
func openFile(path string, mode fs.FileMode, span, version string) (*output, error) {
	dir := filepath.Dir(path)
	of := sha256.Sum256([]byte(filepath.Base(path)))
	if span != "" {
		of = sha256.Sum256([]byte(filepath.Base(path) + "/range"))
	}
	prefix := filepath.Join(dir, fmt.Sprintf(".deimos-%x-", of[:8]))
	part := prefix + version[:16] + ".part"
	f, err := openPart(part)
	if err != nil {
		return nil, err
	}
	dropParts(dir, filepath.Base(prefix), part)
	s, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	o := &output{had: s.Size()}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		f.Close()
		return nil, err
	}
	o.Writer, o.before = f, io.NewSectionReader(f, 0, o.had)
	o.restart = func() error {
		o.had = 0
		_, err := f.Seek(0, io.SeekStart)
		return errors.Join(err, f.Truncate(0))
	}
	o.finish = func() error {
		defer f.Close() // with the lock, which it has until it has its name
		if err := f.Chmod(mode); err != nil {
			return err
		}
		// After an error, the kernel may hold for written what is not on the disk: the
		// next try would find it right.
		if err := f.Sync(); err != nil {
			return errors.Join(err, os.Remove(part))
		}
		if err := os.Rename(part, path); err != nil {
			return errors.Join(err, f.Chmod(0o600)) // it is kept
		}
		return durable.Sync(dir)
	}
	o.abandon = func(keep bool) int64 {
		defer f.Close()
		if at, err := f.Seek(0, io.SeekCurrent); keep && err == nil && at > 0 {
			return at
		}
		_ = os.Remove(part)
		return 0
	}
	return o, nil
}

// openPart opens what is to become the file, which no one else may have written
// to or be able to.
func openPart(part string) (*os.File, error) {
	for range 3 {
		f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, err
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			f.Close()
			return nil, fmt.Errorf("another command is getting the same file (it writes %s)", part)
		}
		var s, now syscall.Stat_t
		if err := syscall.Fstat(int(f.Fd()), &s); err != nil {
			f.Close()
			return nil, err
		}
		if syscall.Lstat(part, &now) == nil && now.Ino == s.Ino && now.Dev == s.Dev &&
			s.Mode&syscall.S_IFMT == syscall.S_IFREG && s.Mode&0o077 == 0 && int(s.Uid) == os.Geteuid() && s.Nlink == 1 {
			return f, nil
		}
		f.Close()
		if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%s is taken by somebody else again and again", part)
}

// dropParts removes what came of other content for the same file.
func dropParts(dir, prefix, but string) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return // they stay
	}
	for _, e := range list {
		p := filepath.Join(dir, e.Name())
		if p == but || !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), prefix) || !strings.HasSuffix(e.Name(), ".part") {
			continue
		}
		if f, err := os.OpenFile(p, os.O_RDWR|syscall.O_NOFOLLOW, 0); err == nil {
			if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
				_ = os.Remove(p)
			}
			f.Close()
		}
	}
}

// streamTo writes to what cannot be written to twice.
func streamTo(f *os.File) *output {
	return &output{Writer: f, restart: func() error { return nil }, finish: f.Close, abandon: func(bool) int64 { _ = f.Close(); return 0 }}
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
			rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%d\t%s\t%s", o.Name, cli.Bytes(o.Size), codeOf(o.Code), o.Chunks, standing(o), cli.Ago(o.Created)))
		}
		return cli.Table(w, "NAME\tSIZE\tCODE\tCHUNKS\tWORST STRIPE\tSTORED", rows)
	})
}

func codeOf(c *api.Code) string {
	if c == nil {
		return "plain"
	}
	return c.String()
}

// standing says how far an object is from being lost.
func standing(o api.ObjectEntry) string {
	if o.Chunks == 0 {
		return "-"
	}
	s := fmt.Sprintf("%d alive, %d needed", o.Alive, o.Needed)
	switch {
	case o.Alive < o.Needed:
		return "LOST: " + s
	case o.Online < o.Needed:
		s += ", only " + fmt.Sprint(o.Online) + " online"
	case o.Alive == o.Needed && o.Code != nil && o.Code.Parity > 0:
		s += ": the next loss is the last"
	}
	return s
}

type objectShowCmd struct {
	Name string `arg:"" help:"Name on the fleet."`
	cli.Output
}

// objectView is what "object show" prints as JSON.
type objectView struct {
	api.Object
	Placements []api.Placement `json:"placements"` // in the order of the chunks
}

func (s *objectShowCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	o, err := c.Object(ctx, s.Name)
	if err != nil {
		return err
	}
	placed, err := c.ObjectPlacements(ctx, s.Name)
	if err != nil {
		return err
	}
	return s.Print(objectView{o, placed}, func(w io.Writer) error { return writeObject(w, o, placed) })
}

func writeObject(w io.Writer, o api.Object, placed []api.Placement) error {
	how, width, what := "plain, for everybody who holds it to read", 1, "CHUNK"
	if o.Code != nil {
		how, width, what = fmt.Sprintf("encrypted, any %d of %d shards are enough", o.Code.Data, o.Code.Shards()), o.Code.Shards(), "STRIPE"
	}
	fmt.Fprintf(w, "%s: %s, %s, stored %s\n", o.Name, cli.Bytes(o.Size), how, cli.Ago(o.Created))
	var rows []string
	n := 0
	for part := range slices.Chunk(placed, width) {
		alive := 0
		var where []string
		for _, pl := range part {
			var holders []string
			for _, h := range pl.Holders {
				if h.Lost {
					holders = append(holders, string(h.Device)+" (lost)")
					continue
				}
				holders = append(holders, string(h.Device))
			}
			living := slices.ContainsFunc(pl.Holders, func(h api.Holder) bool { return !h.Lost })
			switch {
			case o.Code == nil:
				for _, h := range pl.Holders {
					if !h.Lost {
						alive++
					}
				}
			case living:
				alive++
			}
			where = append(where, cmp.Or(strings.Join(holders, " and "), "nowhere"))
		}
		rows = append(rows, fmt.Sprintf("%d\t%d\t%s", n, alive, strings.Join(where, ", ")))
		n++
	}
	return cli.Table(w, what+"\tALIVE\tDEVICES", rows)
}

type objectVerifyCmd struct {
	Name     string `arg:"" help:"Name on the fleet."`
	Identity string `type:"path" placeholder:"FILE" help:"Your key. Default: key.txt beside the context."`
	cli.Output
}

// verifyResult is what "object verify" prints as JSON.
type verifyResult struct {
	Name string `json:"name"`
	object.Report
	// Manifest is whether the key was there to see that the list of parts is the
	// one that was stored.
	Manifest bool `json:"manifest"`
}

func (v *objectVerifyCmd) Run(ctx context.Context, all *commands) error {
	c, err := all.client()
	if err != nil {
		return err
	}
	res := verifyResult{Name: v.Name}
	var rec api.Object
	o, err := all.openObject(ctx, c, v.Name, v.Identity, false)
	switch {
	case err == nil:
		rec, res.Manifest = o.Object, o.Code != nil
	case (errors.Is(err, object.ErrNoKey) || errors.Is(err, object.ErrPlain)) && v.Identity == "":
		if rec, err = c.Object(ctx, v.Name); err != nil {
			return err
		}
	default:
		return err
	}
	var total int64
	for _, ch := range rec.Chunks {
		total += ch.Size
	}
	bar := newProgress("verifying "+v.Name, total)
	res.Report, err = object.Verify(ctx, c, rec, bar.add)
	bar.end()
	if err != nil {
		return err
	}
	if err := v.Print(res, func(w io.Writer) error { return writeVerified(w, rec, res) }); err != nil {
		return err
	}
	switch {
	case len(res.Faults) > 0:
		return fmt.Errorf("%s: %s missing or wrong", v.Name, cli.Count(len(res.Faults), "part"))
	case len(res.Away) > 0:
		return fmt.Errorf("%s: %s could not be looked at; verify it again when the devices are there", v.Name, cli.Count(len(res.Away), "part"))
	}
	return nil
}

func writeVerified(w io.Writer, o api.Object, res verifyResult) error {
	fmt.Fprintf(w, "%s: %s read and right\n", res.Name, cli.Count(res.Read, "part"))
	if o.Code != nil && !res.Manifest {
		fmt.Fprintln(w, "Without a key, which parts there should be is the coordinator's word.")
	}
	problems := slices.Concat(res.Faults, res.Away)
	if len(problems) == 0 {
		return nil
	}
	var rows []string
	for _, f := range problems {
		rows = append(rows, fmt.Sprintf("%d\t%d\t%s\t%s", f.Stripe, f.Shard, cmp.Or(string(f.Device), "-"), f.Problem))
	}
	if err := cli.Table(w, "STRIPE\tSHARD\tDEVICE\tPROBLEM", rows); err != nil {
		return err
	}
	verdict := "It can be read."
	if res.Least < res.Needed {
		verdict = "It cannot be read whole now."
	}
	_, err := fmt.Fprintf(w, "In the worst stripe %d are right, %d are needed. %s\n", res.Least, res.Needed, verdict)
	return err
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
				fmt.Fprint(os.Stderr, "\r\x1b[K", p.line(cli.Columns(os.Stderr)))
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

// line is what there is to say in less than width columns: a terminal breaks what is
// longer, and the beginning stays there. The name is shortened first.
func (p *progress) line(width int) string {
	done := p.done.Load()
	speed := float64(done) / time.Since(p.began).Seconds()
	var parts []string // what matters most first
	if p.total <= 0 {
		parts = []string{cli.Bytes(done), cli.Bytes(int64(speed)) + "/s"}
	} else {
		left := "?"
		if speed > 0 {
			left = time.Duration(float64(p.total-done) / speed * float64(time.Second)).Round(time.Second).String()
		}
		parts = []string{fmt.Sprintf("%3d%% of %s", 100*done/p.total, cli.Bytes(p.total)), cli.Bytes(int64(speed)) + "/s", left + " left"}
	}
	rest := strings.Join(parts, ", ")
	for len(parts) > 1 && len(rest) >= width {
		parts = parts[:len(parts)-1]
		rest = strings.Join(parts, ", ")
	}
	what := []rune(p.what)
	if room := width - 1 - len(rest) - len(": "); len(what) > room {
		if room < leastName {
			return rest[:min(len(rest), max(width-1, 0))]
		}
		what = append(what[:room-1], '…')
	}
	return string(what) + ": " + rest
}

// leastName is how many columns of a name are worth showing.
const leastName = 6
