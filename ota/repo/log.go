package repo

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Where the transparency log stands in a repository.
const (
	logDir         = "log/"
	checkpointFile = "log/checkpoint"
	tileHeight     = 8 // 256 records or hashes in a full tile
	tileWidth      = 1 << tileHeight
)

// Limits of the log, in bytes unless said otherwise.
const (
	maxCheckpoint = 4 << 10
	maxRecord     = 512
	maxLookup     = 32
	maxLogSize    = 1 << 31 // records
)

// LogRecord is one release in the transparency log: a line of version, target,
// digest and time, with a space between.
type LogRecord struct {
	Version string    `json:"version"`
	Target  string    `json:"target"`
	SHA256  string    `json:"sha256"` // of the manifest, lower-case hex
	Time    time.Time `json:"time"`   // when it was logged, by the signer's clock
}

func (r LogRecord) line() ([]byte, error) {
	line := fmt.Appendf(nil, "%s %s %s %s\n", r.Version, r.Target, r.SHA256, r.Time.UTC().Format(time.RFC3339))
	if back, err := parseRecord(line); err != nil || back != r {
		return nil, fmt.Errorf("release %q cannot stand in the log: %w", r.Version, err)
	}
	return line, nil
}

func parseRecord(line []byte) (LogRecord, error) {
	fields := strings.Split(strings.TrimSuffix(string(line), "\n"), " ")
	if len(line) > maxRecord || len(fields) != 4 || !bytes.HasSuffix(line, []byte("\n")) {
		return LogRecord{}, errors.New("it is no line of version, target, digest and time")
	}
	at, err := time.Parse(time.RFC3339, fields[3])
	return LogRecord{Version: fields[0], Target: fields[1], SHA256: fields[2], Time: at.UTC()}, err
}

// checkpoint is what the log's key signs: how many records there are, and their
// Merkle tree's root. The text is that of https://c2sp.org/tlog-checkpoint, whose
// first line, the origin, is the name of the key.
type checkpoint struct {
	tree   tlog.Tree
	signed string // the whole note
}

func checkpointText(origin string, t tlog.Tree) string {
	return fmt.Sprintf("%s\n%d\n%s\n", origin, t.N, base64.StdEncoding.EncodeToString(t.Hash[:]))
}

// openCheckpoint verifies a signed checkpoint.
func openCheckpoint(signed []byte, v note.Verifier) (checkpoint, error) {
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil {
		return checkpoint{}, err
	}
	t, err := parseCheckpoint(n.Text, v.Name())
	return checkpoint{tree: t, signed: string(signed)}, err
}

// parseCheckpoint reads the text of a note.
func parseCheckpoint(text, origin string) (t tlog.Tree, err error) {
	lines := strings.Split(text, "\n")
	if len(lines) < 4 || lines[0] != origin {
		return t, errors.New("it is no checkpoint of this log")
	}
	t.N, err = strconv.ParseInt(lines[1], 10, 64)
	if err != nil || t.N < 0 || t.N > maxLogSize || strconv.FormatInt(t.N, 10) != lines[1] {
		return t, fmt.Errorf("%q is no size of a log", lines[1])
	}
	t.Hash, err = tlog.ParseHash(lines[2])
	return t, err
}

// Checkpoint is what a signed checkpoint says.
type Checkpoint struct {
	Log  string // its name
	Size int64  // records
	Hash string // of their tree, base64
}

// SplitCheckpoint reads a signed checkpoint and does not ask who has signed it; see
// [CheckCheckpoint].
func SplitCheckpoint(signed string) (c Checkpoint, err error) {
	if len(signed) > maxCheckpoint {
		return c, fmt.Errorf("it has %d bytes, a checkpoint has %d at most", len(signed), maxCheckpoint)
	}
	_, err = note.Open([]byte(signed), nil)
	var n *note.UnverifiedNoteError
	if !errors.As(err, &n) {
		return c, fmt.Errorf("it is no signed note: %w", err)
	}
	c.Log, _, _ = strings.Cut(n.Note.Text, "\n")
	t, err := parseCheckpoint(n.Note.Text, c.Log)
	c.Size, c.Hash = t.N, t.Hash.String()
	return c, err
}

// CheckCheckpoint tells whether one of these keys, as [LogKey] gives them, has signed a
// checkpoint of its log.
func CheckCheckpoint(signed string, keys []string) error {
	err := errors.New("no root names a log")
	for _, key := range keys {
		var v note.Verifier
		if v, err = note.NewVerifier(key); err == nil {
			if _, err = openCheckpoint([]byte(signed), v); err == nil {
				return nil
			}
		}
	}
	return err
}

// LogKey is the key of the log that a root names, "" if it names none. Whether the root
// is the right one only a device can tell, see [RootVersion].
func LogKey(root []byte) (string, error) {
	t, err := new(Client).startFrom(root)
	if err != nil {
		return "", err
	}
	return logKeyText(t.Root)
}

// logField is where the root names the log: a field of its own that every
// signature of the root covers, {"key": verifier key as in x/mod/sumdb/note}.
const logField = "transparency_log"

// logKey is the key of the log that a root names; nil if it names none.
func logKey(root *metadata.Metadata[metadata.RootType]) (note.Verifier, error) {
	text, err := logKeyText(root)
	if text == "" || err != nil {
		return nil, err
	}
	v, err := note.NewVerifier(text)
	if err != nil {
		return nil, fmt.Errorf("its %s has no key that can be read: %w", logField, err)
	}
	return v, nil
}

func logKeyText(root *metadata.Metadata[metadata.RootType]) (string, error) {
	field, ok := root.Signed.UnrecognizedFields[logField]
	if !ok {
		return "", nil
	}
	named, _ := field.(map[string]any)
	text, _ := named["key"].(string)
	if text == "" {
		return "", fmt.Errorf("its %s names no key", logField)
	}
	return text, nil
}

func setLogKey(root *metadata.Metadata[metadata.RootType], text string) {
	if root.Signed.UnrecognizedFields == nil {
		root.Signed.UnrecognizedFields = map[string]any{}
	}
	root.Signed.UnrecognizedFields[logField] = map[string]any{"key": text}
}

// newLogName is the origin of a new log, which it keeps when its key changes. It
// is derived from the first key, so that no two fleets' logs have the same.
func newLogName(public crypto.PublicKey) (string, error) {
	id, err := KeyID(public)
	return "deimos-releases-" + id[:min(len(id), 16)], err
}

func logVerifierKey(name string, public crypto.PublicKey) (string, error) {
	p, ok := public.(ed25519.PublicKey)
	if !ok {
		return "", fmt.Errorf("the log is signed with Ed25519 alone, not with a key of type %T", public)
	}
	return note.NewEd25519VerifierKey(name, p)
}

// logSigner signs checkpoints with a key, wherever it is.
type logSigner struct {
	note.Verifier
	key crypto.Signer
}

func (s logSigner) Sign(message []byte) ([]byte, error) {
	return s.key.Sign(rand.Reader, message, crypto.Hash(0))
}

// logKeyID is the TUF id of the key that a verifier stands for.
func logKeyID(verifierKey string) (string, error) {
	parts := strings.SplitN(verifierKey, "+", 3)
	if len(parts) != 3 {
		return "", errors.New("it is no verifier key")
	}
	raw, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(raw) != 1+ed25519.PublicKeySize {
		return "", errors.New("it is no Ed25519 verifier key")
	}
	return KeyID(ed25519.PublicKey(raw[1:]))
}

func tilePath(t tlog.Tile) string { return logDir + t.Path() }

// dataTile is the tile of records that record n is in, of a tree of this size.
func dataTile(n, size int64) tlog.Tile {
	first := n / tileWidth
	return tlog.Tile{H: tileHeight, L: -1, N: first, W: int(min(tileWidth, size-first*tileWidth))}
}

// lookupPath is the file that tells which record has this digest, a hint that
// nobody needs to believe.
func lookupPath(sum string) string { return logDir + "lookup/" + sum }

// splitRecords are the lines of a tile of records.
func splitRecords(t tlog.Tile, raw []byte) ([][]byte, error) {
	lines := bytes.SplitAfter(raw, []byte("\n"))
	if last := len(lines) - 1; len(lines[last]) == 0 {
		lines = lines[:last]
	}
	if len(lines) != t.W {
		return nil, fmt.Errorf("it has %d records, not %d", len(lines), t.W)
	}
	return lines, nil
}

// ledger is a whole log in memory: a line for each release, and the hashes of the
// tree over them.
type ledger struct {
	lines  [][]byte
	at     map[string]int64 // digest of a manifest: its record
	hashes []tlog.Hash      // in the order in which tlog stores them
}

func (l *ledger) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		if x < 0 || x >= int64(len(l.hashes)) {
			return nil, fmt.Errorf("there is no hash %d in a log of %d records", x, len(l.lines))
		}
		out[i] = l.hashes[x]
	}
	return out, nil
}

func (l *ledger) add(line []byte) error {
	r, err := parseRecord(line)
	if err != nil {
		return err
	}
	more, err := tlog.StoredHashes(int64(len(l.lines)), line, l)
	if err != nil {
		return err
	}
	if l.at == nil {
		l.at = map[string]int64{}
	}
	if _, twice := l.at[r.SHA256]; !twice {
		l.at[r.SHA256] = int64(len(l.lines))
	}
	l.lines = append(l.lines, line)
	l.hashes = append(l.hashes, more...)
	return nil
}

// tree is the log as it was with so many records.
func (l *ledger) tree(size int64) (tlog.Tree, error) {
	h, err := tlog.TreeHash(size, l)
	return tlog.Tree{N: size, Hash: h}, err
}

func (l *ledger) size() int64 { return int64(len(l.lines)) }

// records are the lines, read.
func (l *ledger) records() ([]LogRecord, error) {
	out := make([]LogRecord, len(l.lines))
	for i, line := range l.lines {
		var err error
		if out[i], err = parseRecord(line); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readLedger reads all records of a log that has this checkpoint, and makes sure
// that they are those that it was signed for.
func readLedger(ctx context.Context, fetch func(ctx context.Context, path string, most int64) ([]byte, error), c checkpoint) (*ledger, error) {
	l := new(ledger)
	for l.size() < c.tree.N {
		t := dataTile(l.size(), c.tree.N)
		raw, err := fetch(ctx, tilePath(t), int64(t.W)*maxRecord)
		if err != nil {
			return nil, err
		}
		lines, err := splitRecords(t, raw)
		if err != nil {
			return nil, &Error{Condition: Malformed, File: tilePath(t), Reason: err.Error()}
		}
		for _, line := range lines {
			if err := l.add(line); err != nil {
				return nil, &Error{Condition: Malformed, File: tilePath(t), Reason: fmt.Sprintf("record %d: %v", l.size(), err)}
			}
		}
	}
	switch t, err := l.tree(c.tree.N); {
	case err != nil:
		return nil, err
	case t != c.tree:
		return nil, &Error{Condition: Digest, File: checkpointFile,
			Reason: fmt.Sprintf("the %d records that are there are not those that it was signed for", c.tree.N)}
	}
	return l, nil
}
