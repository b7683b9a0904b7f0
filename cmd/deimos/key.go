package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"filippo.io/age/agessh"

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
	// Written whole beside it and linked: two commands at once do not take each
	// other's key away.
	tmp, err := os.CreateTemp(k.dir, ".key-*")
	if err != nil {
		return nil, fmt.Errorf("the key cannot be written: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(text)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Link(tmp.Name(), k.path())
	}
	if err == nil {
		err = durable.SyncDir(k.dir)
	}
	if err != nil {
		return nil, fmt.Errorf("the key cannot be written: %w", err)
	}
	return id, nil
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
		id, err := agessh.ParseIdentity(raw)
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

// recipientOf is who an identity belongs to; nil, "" if it does not tell.
func recipientOf(id age.Identity) (age.Recipient, string) {
	switch v := id.(type) {
	case *age.X25519Identity:
		return v.Recipient(), v.Recipient().String()
	case *age.HybridIdentity:
		return v.Recipient(), v.Recipient().String()
	case *agessh.Ed25519Identity:
		return v.Recipient(), "the SSH key (Ed25519)"
	case *agessh.RSAIdentity:
		return v.Recipient(), "the SSH key (RSA)"
	}
	return nil, ""
}

func parseRecipient(text string) (age.Recipient, error) {
	if strings.HasPrefix(text, "ssh-") {
		r, err := agessh.ParseRecipient(text)
		if err != nil {
			return nil, fmt.Errorf("%q is no public SSH key that can be used: %w", text, err)
		}
		return r, nil
	}
	list, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil || len(list) != 1 {
		return nil, fmt.Errorf("%q is no public key: it begins with \"age1\", or is a line of an SSH public key", text)
	}
	return list[0], nil
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

// recipients are who will be able to read a file: the owner's key, those of the
// list, and more. Where there is no key and no one else, a key is made. names
// tells them apart.
func (k keyring) recipients(identity string, more []string) (list []age.Recipient, names []string, err error) {
	listed, err := k.listed()
	if err != nil {
		return nil, nil, err
	}
	for _, text := range append(listed, more...) {
		r, err := parseRecipient(text)
		if err != nil {
			return nil, nil, &cli.Error{Code: cli.ExitUsage, Err: err}
		}
		list, names = append(list, r), append(names, text)
	}
	own, err := k.identities(identity)
	if err != nil {
		return nil, nil, err
	}
	if len(own) == 0 && len(list) == 0 {
		id, err := k.create()
		if err != nil {
			return nil, nil, err
		}
		own = []age.Identity{id}
		fmt.Fprintf(os.Stderr, "A key was made: %s. Nobody can read what you store without it: keep a copy of it elsewhere.\n", k.path())
	}
	for _, id := range own {
		if r, name := recipientOf(id); r != nil {
			list, names = append(list, r), append(names, name)
		}
	}
	if len(list) == 0 {
		return nil, nil, &cli.Error{Code: cli.ExitConfig, Err: errors.New("the key does not tell its public key: name it with --recipient")}
	}
	return list, names, nil
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
		if _, name := recipientOf(id); name != "" {
			v.Recipients = append(v.Recipients, name)
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
	if _, err := parseRecipient(a.Recipient); err != nil {
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
