package main

import (
	"bufio"
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/repo"
)

type releaseKeysCmd struct {
	Init   releaseKeysInitCmd   `cmd:"" help:"Make the keys of a new fleet."`
	Show   releaseKeysShowCmd   `cmd:"" help:"Who may sign what, and which of the keys are here."`
	Rotate releaseKeysRotateCmd `cmd:"" help:"Give a role other keys, by a new root."`
	Revoke releaseKeysRevokeCmd `cmd:"" help:"Take a key out, by a new root."`
	Renew  releaseKeysRenewCmd  `cmd:"" help:"Sign the root anew, before it expires."`
}

// passphraseFlags say where passphrases come from: a file or the terminal, never
// the environment or an argument, which other users of the machine can read.
type passphraseFlags struct {
	PassphraseFile string `type:"existingfile" placeholder:"FILE" help:"File whose first line is the passphrase of the keys. Default: it is asked for at the terminal."`
}

// ask is the passphrase of a key that there is.
func (p passphraseFlags) ask(file string) ([]byte, error) {
	if p.PassphraseFile != "" {
		return p.read()
	}
	return prompt(fmt.Sprintf("Passphrase of %s: ", file))
}

// fresh is a passphrase for new keys.
func (p passphraseFlags) fresh() ([]byte, error) {
	if p.PassphraseFile != "" {
		return p.read()
	}
	pass, err := prompt("New passphrase: ")
	if err != nil {
		return nil, err
	}
	again, err := prompt("Once more: ")
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(pass, again) {
		return nil, errors.New("these were two different passphrases; nothing was made")
	}
	return pass, nil
}

// maxPassphrase bounds a passphrase file, in bytes.
const maxPassphrase = 4 << 10

func (p passphraseFlags) read() ([]byte, error) {
	raw, err := durable.ReadFile(p.PassphraseFile, maxPassphrase)
	if err != nil {
		return nil, err
	}
	line, _, _ := bytes.Cut(raw, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 {
		return nil, fmt.Errorf("the first line of %s is empty", p.PassphraseFile)
	}
	return line, nil
}

func prompt(text string) ([]byte, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, errors.New("there is no terminal to ask for the passphrase; name a file with --passphrase-file")
	}
	defer tty.Close()
	fmt.Fprint(tty, text)
	pass, err := term.ReadPassword(int(tty.Fd()))
	fmt.Fprintln(tty)
	if err == nil && len(pass) == 0 {
		err = errors.New("an empty passphrase is none")
	}
	return pass, err
}

type releaseKeysInitCmd struct {
	Keys       string `required:"" type:"path" placeholder:"DIR" help:"New folder for the keys."`
	RootKeys   int    `default:"3" help:"How many root keys (${default})."`
	Threshold  int    `default:"2" help:"How many of them must sign (${default})."`
	Passphrase bool   `help:"Lock the key files with a passphrase."`
	passphraseFlags
}

func (r *releaseKeysInitCmd) Run() error {
	o := repo.InitOptions{RootKeys: r.RootKeys, Threshold: r.Threshold, Now: time.Now()}
	if r.Passphrase || r.PassphraseFile != "" {
		var err error
		if o.Passphrase, err = r.fresh(); err != nil {
			return err
		}
	}
	if err := repo.Init(r.Keys, o); err != nil {
		return err
	}
	fmt.Printf("%d root keys, of which %d must sign, and one key each for targets, snapshot, timestamp and the log of releases are in %s.\n"+
		"Next, before devices enrol: deimos release publish --keys %s --repo DIR\n", r.RootKeys, r.Threshold, r.Keys, r.Keys)
	return nil
}

type releaseKeysShowCmd struct {
	Keys string `required:"" type:"existingdir" placeholder:"DIR" help:"Folder of the keys."`
	passphraseFlags
	cli.Output
}

func (r *releaseKeysShowCmd) Run() error {
	info, err := repo.Show(repo.Desk{Keys: r.Keys, Passphrase: r.ask})
	if err != nil {
		return err
	}
	return r.Print(info, func(w io.Writer) error {
		fmt.Fprintf(w, "root %d, expires at %s\n", info.Version, info.Expires.UTC().Format(time.RFC3339))
		var rows []string
		for _, k := range info.Keys {
			where := k.File
			if where == "" {
				where = "not here"
			}
			rows = append(rows, fmt.Sprintf("%s\t%d\t%s\t%s", k.Role, info.Thresholds[k.Role], k.ID, where))
		}
		if err := cli.Table(w, "ROLE\tMUST SIGN\tKEY\tFILE", rows); err != nil {
			return err
		}
		if info.Log == "" {
			_, err := fmt.Fprintln(w, "No log of releases is kept; deimos release keys rotate --role log begins one.")
			return err
		}
		return nil
	})
}

// rootFlags are those of commands that sign a new root.
type rootFlags struct {
	Keys     string   `required:"" type:"existingdir" placeholder:"DIR" help:"Folder of the keys."`
	With     []string `type:"existingfile" placeholder:"FILE" help:"Further key that signs, from elsewhere; may be repeated."`
	Unsigned string   `type:"path" placeholder:"DIR" help:"If keys are elsewhere: folder for the root that their holders sign with \"deimos release sign\"."`
	passphraseFlags
	cli.Output
}

func (f *rootFlags) options() (repo.ChangeOptions, error) {
	o := repo.ChangeOptions{Desk: repo.Desk{Keys: f.Keys, Passphrase: f.ask}, Now: time.Now(), Unsigned: f.Unsigned}
	var err error
	o.Signers, err = f.signers(f.With)
	return o, err
}

// signers opens key files that are not in the folder of the keys.
func (p passphraseFlags) signers(files []string) (list []crypto.Signer, err error) {
	for _, file := range files {
		s, err := repo.LoadKey(file, p.ask)
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

func (f *rootFlags) tell(c repo.RootChange) error {
	return f.Print(c, func(w io.Writer) error {
		for _, file := range c.Made {
			fmt.Fprintf(w, "made %s\n", file)
		}
		if c.Awaits != "" {
			_, err := fmt.Fprintf(w, "root %d waits: %s\nNext, on the machines of those who have these keys: deimos release sign %s --key FILE\n"+
				"Then: deimos release publish --keys %s --repo DIR --signed %s\n", c.Version, c.Missing, filepath.Base(c.Awaits), f.Keys, c.Awaits)
			return err
		}
		_, err := fmt.Fprintf(w, "root %d is signed, and expires at %s\nNext: deimos release publish --keys %s --repo DIR\n", c.Version, c.Expires.UTC().Format(time.RFC3339), f.Keys)
		return err
	})
}

type releaseKeysRotateCmd struct {
	Role       string   `required:"" enum:"root,targets,snapshot,timestamp,log" help:"Whose keys: ${enum}."`
	Key        []string `placeholder:"FILE|ID" help:"Key that the role has from now on: a file with its public half, or the id of one that it has; may be repeated. Default: as many new ones as it has, made in the folder."`
	Threshold  int      `help:"How many of them must sign. Default: as many as now."`
	Passphrase bool     `help:"Lock new key files with a passphrase."`
	rootFlags
}

func (r *releaseKeysRotateCmd) Run() error {
	o, err := r.options()
	if err != nil {
		return err
	}
	rotation := repo.Rotation{Role: r.Role, Threshold: r.Threshold}
	for _, name := range r.Key {
		var public crypto.PublicKey
		if _, statErr := os.Stat(name); statErr == nil {
			public, err = repo.LoadPublicKey(name, r.ask)
		} else {
			public, err = repo.PublicKey(r.Keys, name)
		}
		if err != nil {
			return err
		}
		rotation.Keys = append(rotation.Keys, public)
	}
	if r.Passphrase {
		if rotation.Passphrase, err = r.fresh(); err != nil {
			return err
		}
	}
	c, err := repo.Rotate(o, rotation)
	if err != nil {
		return err
	}
	return r.tell(c)
}

type releaseKeysRevokeCmd struct {
	ID string `arg:"" name:"key-id" help:"Key, or the beginning of its id."`
	rootFlags
}

func (r *releaseKeysRevokeCmd) Run() error {
	o, err := r.options()
	if err != nil {
		return err
	}
	c, err := repo.Revoke(o, r.ID)
	if err != nil {
		return err
	}
	return r.tell(c)
}

type releaseKeysRenewCmd struct{ rootFlags }

func (r *releaseKeysRenewCmd) Run() error {
	o, err := r.options()
	if err != nil {
		return err
	}
	c, err := repo.Renew(o)
	if err != nil {
		return err
	}
	return r.tell(c)
}

type releaseSignCmd struct {
	File     string `arg:"" type:"existingfile" help:"What is to be signed, as \"publish --unsigned\" or \"keys rotate --unsigned\" has written it."`
	Key      string `required:"" type:"existingfile" placeholder:"FILE" help:"Your key."`
	Previous string `type:"existingfile" placeholder:"FILE" help:"The version before, from a copy of your own; of the log, a copy of log/checkpoint. Default: the one beside the file, or in it."`
	Yes      bool   `help:"Do not ask."`
	passphraseFlags
	cli.Output
}

// signedByHand is what "release sign -o json" prints.
type signedByHand struct {
	repo.Statement
	Key string `json:"key"`
}

func (r *releaseSignCmd) Run() error {
	key, err := repo.LoadKey(r.Key, r.ask)
	if err != nil {
		return err
	}
	st, err := repo.Examine(r.File, r.Previous, key.Public())
	if err != nil {
		return err
	}
	if !r.Yes {
		if !cli.Terminal(os.Stdin) {
			return &cli.Error{Code: cli.ExitUsage, Err: errors.New("nothing was signed: there is nobody here to ask; if you know what is signed, say --yes")}
		}
		if err := describeStatement(os.Stderr, st); err != nil {
			return err
		}
		fmt.Fprint(os.Stderr, "Sign this? Type yes: ")
		if line, _ := bufio.NewReader(os.Stdin).ReadString('\n'); strings.TrimSpace(line) != "yes" { // an end is no "yes"
			return errors.New("nothing was signed")
		}
	}
	id, err := repo.Sign(r.File, key)
	if err != nil {
		return err
	}
	return r.Print(signedByHand{st, id}, func(w io.Writer) error {
		if r.Yes {
			if err := describeStatement(w, st); err != nil {
				return err
			}
		}
		_, err := fmt.Fprintf(w, "signed with key %s; carry %s back\n", id, r.File)
		return err
	})
}

// describeStatement says in words what a signature says.
func describeStatement(w io.Writer, st repo.Statement) error {
	until := "good until " + st.Expires.UTC().Format(time.RFC3339)
	if st.Expires.IsZero() {
		until = "for ever"
	}
	fmt.Fprintf(w, "You sign: %s, version %d, %s\n", meaning[st.Role], st.Version, until)
	fmt.Fprintf(w, "SHA-256 of what is signed: %s\n", st.SHA256)
	switch {
	case st.Previous == 0 && st.Version > 1:
		fmt.Fprintln(w, "The version before is not here, so everything is shown as new:")
	case st.Previous == 0:
		fmt.Fprintln(w, "It is the first. It says:")
	case st.PreviousMine:
		fmt.Fprintf(w, "Against version %d, which you have signed too:\n", st.Previous)
	default:
		fmt.Fprintf(w, "Against version %d, which your key has NOT signed (compare with a copy of your own: --previous):\n", st.Previous)
	}
	for _, c := range st.Changes {
		fmt.Fprintf(w, "  - %s\n", c)
	}
	if len(st.Changes) == 0 {
		fmt.Fprintln(w, "  - nothing changes but version and expiry")
	}
	_, err := fmt.Fprintf(w, "Signatures that it has so far: %d\n", len(st.Signed))
	return err
}

var meaning = map[string]string{
	"root":      "the ROOT, which says whose keys may sign what",
	"targets":   "the list of RELEASES",
	"snapshot":  "the SNAPSHOT, which says which list of releases is the newest",
	"timestamp": "the TIMESTAMP, which says which snapshot is the newest",
	"log":       "the LOG of releases; its version is how many records it has",
}
