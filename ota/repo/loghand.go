package repo

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/deimos-edge/deimos/internal/durable"
)

// The log, signed by hand: what is carried has all of its records, so that who signs can
// compute the tree anew, and see that it is the one before, grown.

// handLog is the file, SIZE.log.json.
type handLog struct {
	Signed struct {
		Type    string   `json:"_type"`   // [LogRole]
		Size    int64    `json:"version"` // how many records there are
		Origin  string   `json:"origin"`
		Records []string `json:"records"` // lines
	} `json:"signed"`
	// Checkpoint is the signed note, empty while nobody has signed; Previous is the one
	// that was published before, empty if there was none.
	Checkpoint string `json:"checkpoint,omitempty"`
	Previous   string `json:"previous,omitempty"`
}

// readHandLog reads one and computes its tree. What it says is right in itself, and nothing more.
func readHandLog(file string, raw []byte) (h handLog, l *ledger, text string, err error) {
	if err := json.Unmarshal(raw, &h); err != nil {
		return h, nil, "", fmt.Errorf("%s: %w", file, err)
	}
	l = new(ledger)
	for n, line := range h.Signed.Records {
		if err := l.add([]byte(line)); err != nil {
			return h, nil, "", fmt.Errorf("%s: record %d: %w", file, n, err)
		}
	}
	if l.size() != h.Signed.Size || l.size() == 0 {
		return h, nil, "", fmt.Errorf("%s has %d records, and says that it has %d", file, l.size(), h.Signed.Size)
	}
	tree, err := l.tree(l.size())
	if err != nil {
		return h, nil, "", err
	}
	text = checkpointText(h.Signed.Origin, tree)
	if h.Checkpoint != "" && !strings.HasPrefix(h.Checkpoint, text+"\n") {
		return h, nil, "", fmt.Errorf("%s is signed for other records than it has", file)
	}
	return h, l, text, nil
}

// writeHandLog writes the log for others to sign.
func (p *publisher) writeHandLog(origin string) (string, error) {
	var h handLog
	h.Signed.Type, h.Signed.Size, h.Signed.Origin, h.Previous = LogRole, p.log.size(), origin, string(p.signed)
	for _, line := range p.log.lines {
		h.Signed.Records = append(h.Signed.Records, string(line))
	}
	if err := os.MkdirAll(p.Unsigned, 0o755); err != nil {
		return "", fmt.Errorf("make the folder for what is to be signed: %w", err)
	}
	file := filepath.Join(p.Unsigned, fmt.Sprintf("%d.%s.json", h.Signed.Size, LogRole))
	return file, h.write(file)
}

func (h handLog) write(file string) error {
	raw, err := json.MarshalIndent(h, "", "\t")
	if err != nil {
		return err
	}
	return durable.WriteFile(file, raw, 0o644)
}

// takeHandLog takes in the log that people have signed, if they have: the one of the
// repository, grown by the releases that are published now and by nothing else. Its
// records are as they were written then, with the times of then.
func (p *publisher) takeHandLog() error {
	for _, file := range p.Signed {
		raw, role, err := readHand(file)
		if err != nil || role != LogRole {
			if err != nil {
				return err
			}
			continue
		}
		h, l, text, err := readHandLog(file, raw)
		if err != nil {
			return err
		}
		if p.signedLog != nil && !strings.HasPrefix(string(p.signedLog), text+"\n") {
			return fmt.Errorf("%s is signed for something else than the other files for the log: sign copies of one file", file)
		}
		if err := p.growLog(file, l); err != nil {
			return err
		}
		if p.signedLog, err = joinNotes(text, string(p.signedLog), h.Checkpoint); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	return nil
}

// growLog makes the log what l is, which must be what is in the repository and more.
func (p *publisher) growLog(file string, l *ledger) error {
	if l.size() < p.log.size() {
		return fmt.Errorf("%s has %d records, and the log in the repository %d: something was published in between; write it anew with --unsigned", file, l.size(), p.log.size())
	}
	for n, line := range l.lines {
		switch {
		case int64(n) >= p.log.size():
			if err := p.log.add(line); err != nil {
				return err
			}
		case !bytes.Equal(line, p.log.lines[n]):
			return fmt.Errorf("%s has another record %d than the log in the repository; write it anew with --unsigned", file, n)
		}
	}
	return nil
}

// joinNotes is a note of this text with the signatures of two, of which either may be empty.
func joinNotes(text, a, b string) ([]byte, error) {
	joined := &note.Note{Text: text}
	for _, signed := range []string{a, b} {
		if signed == "" {
			continue
		}
		sigs, err := signaturesOf(signed)
		if err != nil {
			return nil, err
		}
		for _, sig := range sigs {
			if !slices.Contains(joined.UnverifiedSigs, sig) {
				joined.UnverifiedSigs = append(joined.UnverifiedSigs, sig)
			}
		}
	}
	if len(joined.UnverifiedSigs) == 0 {
		return nil, errors.New("nobody has signed it yet")
	}
	return note.Sign(joined)
}

// signaturesOf are those that a note bears, whoever's they are.
func signaturesOf(signed string) ([]note.Signature, error) {
	_, err := note.Open([]byte(signed), note.VerifierList())
	var unverified *note.UnverifiedNoteError
	if !errors.As(err, &unverified) {
		return nil, fmt.Errorf("its checkpoint is no signed note: %w", err)
	}
	return unverified.Note.UnverifiedSigs, nil
}

// examineLog is [Examine] of the log. previous is a checkpoint that was published before,
// a file; empty: the one that is carried along.
func examineLog(file, previous string, by crypto.PublicKey, raw []byte) (Statement, error) {
	h, l, text, err := readHandLog(file, raw)
	if err != nil {
		return Statement{}, err
	}
	st := Statement{Role: LogRole, Version: l.size(), SHA256: fmt.Sprintf("%x", sha256.Sum256([]byte(text)))}
	if h.Checkpoint != "" {
		sigs, err := signaturesOf(h.Checkpoint)
		if err != nil {
			return st, fmt.Errorf("%s: %w", file, err)
		}
		for _, s := range sigs {
			st.Signed = append(st.Signed, fmt.Sprintf("%s+%08x", s.Name, s.Hash))
		}
	}
	before := h.Previous
	if previous != "" {
		raw, err := durable.ReadFile(previous, maxCheckpoint)
		if err != nil {
			return st, fmt.Errorf("read the checkpoint before: %w", err)
		}
		before = string(raw)
	}
	if before != "" {
		if st.Previous, st.PreviousMine, err = l.follows(h.Signed.Origin, before, by); err != nil {
			return st, fmt.Errorf("%s: %w", file, err)
		}
	}
	records, err := l.records()
	if err != nil {
		return st, err
	}
	st.Changes = logChanges(records, st.Previous)
	return st, nil
}

// follows tells of how many records a checkpoint is that was published before, and whether
// the key has signed it. A log that is not that one, grown, is an error.
func (l *ledger) follows(origin, before string, by crypto.PublicKey) (size int64, mine bool, err error) {
	key, err := logVerifierKey(origin, by)
	if err != nil {
		return 0, false, err
	}
	v, err := note.NewVerifier(key)
	if err != nil {
		return 0, false, err
	}
	seen, err := openCheckpoint([]byte(before), v)
	if mine = err == nil; !mine {
		// Of another key, as after a rotation: it must be the same log all the same.
		text, _, _ := strings.Cut(before, "\n\n")
		if seen.tree, err = parseCheckpoint(text+"\n", origin); err != nil {
			return 0, false, fmt.Errorf("the checkpoint before: %w", err)
		}
	}
	if seen.tree.N > l.size() {
		return 0, mine, fmt.Errorf("the log would go back: it had %d records, and this has %d", seen.tree.N, l.size())
	}
	if t, err := l.tree(seen.tree.N); err != nil || t != seen.tree {
		return 0, mine, fmt.Errorf("the first %d records are not those of the log as it was before: somebody has written it anew", seen.tree.N)
	}
	return seen.tree.N, mine, nil
}

func logChanges(records []LogRecord, from int64) (out []string) {
	versions := map[string]bool{}
	for n, r := range records {
		twice := versions[r.Version]
		versions[r.Version] = true
		switch {
		case int64(n) < from:
		case twice:
			out = append(out, fmt.Sprintf("release %q is logged ONCE MORE, as record %d, with SHA-256 %s; a published version never changes", r.Target, n, r.SHA256))
		default:
			out = append(out, fmt.Sprintf("release %q is record %d: a manifest with SHA-256 %s", r.Target, n, r.SHA256))
		}
	}
	return out
}

// signHandLog is [Sign] of the log.
func signHandLog(file string, raw []byte, s crypto.Signer) error {
	h, _, text, err := readHandLog(file, raw)
	if err != nil {
		return err
	}
	key, err := logVerifierKey(h.Signed.Origin, s.Public())
	if err != nil {
		return err
	}
	v, err := note.NewVerifier(key)
	if err != nil {
		return err
	}
	mine, err := note.Sign(&note.Note{Text: text}, logSigner{v, s})
	if err != nil {
		return fmt.Errorf("sign %s: %w", file, err)
	}
	joined, err := joinNotes(text, h.Checkpoint, string(mine))
	if err != nil {
		return fmt.Errorf("sign %s: %w", file, err)
	}
	h.Checkpoint = string(joined)
	return h.write(file)
}

// checkHandLog is the checkpoint that people have signed, once the key that the newest
// root names has, and it is of the log as it is to be published.
func (p *publisher) checkHandLog(v note.Verifier, tree tlog.Tree) ([]byte, error) {
	c, err := openCheckpoint(p.signedLog, v)
	if err != nil {
		return nil, fmt.Errorf("what is signed for the log bears no signature of the key that root %d names: %w", p.root.Signed.Version, err)
	}
	if c.tree != tree {
		return nil, errors.New("what is signed for the log is not for this bundle: it lacks the release; write it anew with --unsigned")
	}
	return p.signedLog, nil
}
