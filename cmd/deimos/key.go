package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/durable"
)

// Files beside the context.
const (
	keyFile        = "key.txt"        // age identities, as age-keygen writes them
	recipientsFile = "recipients.txt" // one a line: who can read what is stored, too
)

const maxKeyFile = 64 << 10 // bytes

type keyCmd struct {
	New          keyNewCmd          `cmd:"" help:"Make the key that files are encrypted for. The first \"object put\" does it, too."`
	Show         keyShowCmd         `cmd:"" help:"Show where the key is, and who can read what is stored from now on."`
	AddRecipient keyAddRecipientCmd `cmd:"" help:"Let another key read what is stored from now on."`
}

// keyring is what is beside the context.
type keyring struct{ dir string }

func (c *commands) keyring() (keyring, error) {
	path, err := c.contextPath()
	return keyring{filepath.Dir(path)}, err
}

func (k keyring) path() string { return filepath.Join(k.dir, keyFile) }

// create makes a key, unless there is one.
func (k keyring) create() (*age.X25519Identity, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, err
	}
	text := fmt.Sprintf("# created: %s\n# public key: %s\n%s\n", time.Now().UTC().Format(time.RFC3339), id.Recipient(), id)
	// Written whole beside it, and then named: two commands at once do not take each
	// other's key away.
	tmp, err := os.CreateTemp(k.dir, ".key-*")
	if err != nil {
		return nil, fmt.Errorf("the key cannot be written: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(text)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = nameNew(tmp.Name(), k.path(), os.Link)
	}
	if err == nil {
		err = durable.Sync(k.dir)
	}
	if err != nil {
		return nil, fmt.Errorf("the key cannot be written: %w", err)
	}
	return id, nil
}

// nameNew gives a file another name, which must not be taken ([fs.ErrExist]), by a hard
// link where the file system has them. FAT has none (EPERM), but a rename that takes
// nothing away.
func nameNew(from, to string, link func(from, to string) error) error {
	err := link(from, to)
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	if renaming := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); renaming != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: renaming}
	}
	return nil
}

// identities reads those of a file; of the key beside the context, if path is
// empty: none, if that is not there.
func (k keyring) identities(path string) ([]age.Identity, error) {
	own := path == ""
	if own {
		path = k.path()
	}
	raw, err := durable.ReadFile(path, maxKeyFile)
	if own && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &cli.Error{Code: cli.ExitConfig, Err: fmt.Errorf("the key cannot be read: %w", err)}
	}
	if bytes.HasPrefix(raw, []byte("-----BEGIN")) {
		id, err := parseSSH(raw)
		if err != nil {
			return nil, &cli.Error{Code: cli.ExitConfig, Err: fmt.Errorf("%s is no SSH key that can be used, which is an Ed25519 or RSA key without a passphrase: %w", path, err)}
		}
		return []age.Identity{id}, nil
	}
	list, err := age.ParseIdentities(bytes.NewReader(raw))
	if err != nil {
		return nil, &cli.Error{Code: cli.ExitConfig, Err: fmt.Errorf("%s is no file of age identities: %w", path, err)}
	}
	return list, nil
}

// sshIdentity is an SSH key.
type sshIdentity struct {
	age.Identity
	public string // as in a file of authorized keys, without a comment
}

func parseSSH(raw []byte) (id sshIdentity, err error) {
	if id.Identity, err = agessh.ParseIdentity(raw); err != nil {
		return id, err
	}
	s, err := ssh.ParsePrivateKey(raw)
	if err == nil {
		id.public = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey())))
	}
	return id, err
}

// publicOf is the public key of an identity; empty if it does not tell.
func publicOf(id age.Identity) string {
	switch v := id.(type) {
	case *age.X25519Identity:
		return v.Recipient().String()
	case *age.HybridIdentity:
		return v.Recipient().String()
	case sshIdentity:
		return v.public
	}
	return ""
}

// parseRecipient reads a public key. name tells it from every other, whatever is
// written beside it.
func parseRecipient(text string) (r age.Recipient, name string, err error) {
	if strings.HasPrefix(text, "ssh-") {
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(text))
		if err == nil {
			name = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
			r, err = agessh.ParseRecipient(name)
		}
		if err != nil {
			return nil, "", fmt.Errorf("%q is no public SSH key that can be used: %w", text, err)
		}
		return r, name, nil
	}
	list, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil || len(list) != 1 {
		return nil, "", fmt.Errorf("%q is no public key: it begins with \"age1\", or is a line of an SSH public key", text)
	}
	return list[0], strings.TrimSpace(text), nil
}

// listed are those of recipients.txt.
func (k keyring) listed() ([]string, error) {
	raw, err := durable.ReadFile(filepath.Join(k.dir, recipientsFile), maxKeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the list of recipients cannot be read: %w", err)
	}
	var out []string
	for line := range strings.Lines(string(raw)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			out = append(out, line)
		}
	}
	return out, nil
}

// recipients are who will be able to read a file: the owner's key, which is made
// if there is none, those of the list, and more; without the owner's key, if they
// are to be the only ones. names tells them apart.
func (k keyring) recipients(identity string, more []string, only bool) (list []age.Recipient, names []string, err error) {
	texts, err := k.listed()
	if err != nil {
		return nil, nil, err
	}
	texts = append(texts, more...)
	if !only {
		own, err := k.own(identity)
		if err != nil {
			return nil, nil, err
		}
		texts = append(texts, own...)
	}
	for _, text := range texts {
		r, name, err := parseRecipient(text)
		if err != nil {
			return nil, nil, &cli.Error{Code: cli.ExitUsage, Err: err}
		}
		if !slices.Contains(names, name) {
			list, names = append(list, r), append(names, name)
		}
	}
	if len(list) == 0 {
		return nil, nil, &cli.Error{Code: cli.ExitUsage, Err: errors.New("--only-recipients needs somebody who can read the file: name them with --recipient")}
	}
	return list, names, nil
}

// own are the owner's public keys.
func (k keyring) own(identity string) ([]string, error) {
	ids, err := k.identities(identity)
	if err != nil {
		return nil, err
	}
	if len(ids) == 0 {
		id, err := k.create()
		if err != nil {
			return nil, err
		}
		ids = []age.Identity{id}
		fmt.Fprintf(os.Stderr, "A key was made: %s. Nobody can read what you store without it: keep a copy of it elsewhere.\n", k.path())
	}
	var out []string
	for _, id := range ids {
		public := publicOf(id)
		if public == "" {
			return nil, &cli.Error{Code: cli.ExitConfig, Err: errors.New("the key does not tell its public key: name that with --recipient and --only-recipients")}
		}
		out = append(out, public)
	}
	return out, nil
}

type keyNewCmd struct{ cli.Output }

type keyView struct {
	File       string   `json:"file"`
	Recipients []string `json:"recipients"` // public keys
}

func (n *keyNewCmd) Run(all *commands) error {
	k, err := all.keyring()
	if err != nil {
		return err
	}
	id, err := k.create()
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("there is a key already, %s: files that were stored with it need it; move it away first if you want another", k.path())
	}
	if err != nil {
		return err
	}
	return n.Print(keyView{k.path(), []string{id.Recipient().String()}}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s\npublic key %s\nNobody can read what you store without this file: keep a copy of it elsewhere.\n", k.path(), id.Recipient())
		return err
	})
}

type keyShowCmd struct{ cli.Output }

func (s *keyShowCmd) Run(all *commands) error {
	k, err := all.keyring()
	if err != nil {
		return err
	}
	own, err := k.identities("")
	if err != nil {
		return err
	}
	v := keyView{File: k.path(), Recipients: []string{}}
	for _, id := range own {
		if public := publicOf(id); public != "" {
			v.Recipients = append(v.Recipients, public)
		}
	}
	listed, err := k.listed()
	if err != nil {
		return err
	}
	if len(own) == 0 {
		if len(listed) == 0 {
			return fmt.Errorf("there is no key yet: \"deimos key new\" makes one at %s, as does the first \"deimos object put\"", k.path())
		}
		v.File = ""
	}
	v.Recipients = append(v.Recipients, listed...)
	return s.Print(v, func(w io.Writer) error {
		if v.File != "" {
			fmt.Fprintln(w, v.File)
		}
		for _, r := range v.Recipients {
			fmt.Fprintf(w, "can read what is stored from now on: %s\n", r)
		}
		return nil
	})
}

type keyAddRecipientCmd struct {
	Recipient string `arg:"" help:"Public key: age1..., or a line of an SSH public key."`
	cli.Output
}

func (a *keyAddRecipientCmd) Run(all *commands) error {
	if _, _, err := parseRecipient(a.Recipient); err != nil {
		return &cli.Error{Code: cli.ExitUsage, Err: err}
	}
	k, err := all.keyring()
	if err != nil {
		return err
	}
	own, err := k.identities("")
	if err != nil {
		return err
	}
	if len(own) == 0 {
		return errors.New("there is no key of your own yet, and only the other could read what you store: make one first with \"deimos key new\"")
	}
	list, err := k.listed()
	if err != nil {
		return err
	}
	list = append(list, a.Recipient)
	if err := durable.WriteFile(filepath.Join(k.dir, recipientsFile), []byte(strings.Join(list, "\n")+"\n"), 0o600); err != nil {
		return fmt.Errorf("the list of recipients cannot be written: %w", err)
	}
	return a.Print(map[string][]string{"recipients": list}, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s can read what is stored from now on, not what is there already.\n", a.Recipient)
		return err
	})
}
