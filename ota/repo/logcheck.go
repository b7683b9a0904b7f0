package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/deimos-edge/deimos/internal/durable"
)

// LogProof is what a device has seen of the transparency log.
type LogProof struct {
	// Asked tells whether the root names a log. The roots of fleets from before
	// there were logs do not, and nothing is asked then.
	Asked bool `json:"asked"`
	// Record is the place of the release in the log, from 0.
	Record int64 `json:"record,omitempty"`
	// Checkpoint is the signed note that it was proved by.
	Checkpoint string `json:"checkpoint,omitempty"`
}

// Fork is what proves that a log shows two faces, or went back: two checkpoints
// that its key signed, and that cannot both be of one log that only grows.
type Fork struct {
	Seen  string `json:"seen"`  // signed note that this device had verified before
	Shown string `json:"shown"` // signed note that it was shown now
}

func (f *Fork) Error() string { return "two checkpoints of one log contradict each other" }

// Files of the log in a client's folder.
const (
	seenFile = "log.json"
	forkFile = "log-fork.json" // a [Fork], the last that was seen
)

// seenLog is the newest checkpoint that was verified, with the key that did: it
// can be opened again after the root has named another.
type seenLog struct {
	Key        string `json:"key"`
	Checkpoint string `json:"checkpoint"`
}

// Log is what the last [Client.Manifest] found in the transparency log.
func (c *Client) Log() LogProof { return c.proof }

// checkLog makes sure that the log has this manifest, and that it has only grown
// since this device looked last. Errors are of type [*Error] unless ctx ended or
// the disk failed.
func (c *Client) checkLog(ctx context.Context, name, sum string) error {
	c.proof = LogProof{}
	key, err := logKeyText(c.trusted.Root)
	if key == "" || err != nil {
		return err // checkRoot has looked at it
	}
	v, err := note.NewVerifier(key)
	if err != nil {
		return err
	}
	raw, err := c.fetch(ctx, checkpointFile, maxCheckpoint)
	if err != nil {
		return err
	}
	shown, err := openCheckpoint(raw, v)
	if err != nil {
		return &Error{Condition: Signature, File: checkpointFile, Reason: fmt.Sprintf("it is not signed by the key of the log that the root names (%v)", err), Err: err}
	}
	hashes := tlog.TileHashReader(shown.tree, &tiles{ctx: ctx, c: c})
	if err := c.checkGrown(shown, hashes); err != nil {
		return err
	}
	if err := c.keepSeen(seenLog{Key: key, Checkpoint: shown.signed}); err != nil {
		return err
	}
	record, err := c.findRecord(ctx, shown, hashes, name, sum)
	if err != nil {
		return err
	}
	c.proof = LogProof{Asked: true, Record: record, Checkpoint: shown.signed}
	return nil
}

// checkGrown compares a checkpoint with the one that was seen before.
func (c *Client) checkGrown(shown checkpoint, hashes tlog.HashReader) error {
	seen, ok := c.seen()
	if !ok || seen.tree.N == 0 || seen.tree == shown.tree {
		return nil
	}
	if shown.tree.N < seen.tree.N {
		return c.fork(Rollback, seen, shown, fmt.Sprintf("it goes back behind what this device has already seen: the log had %d records, and has %d now", seen.tree.N, shown.tree.N))
	}
	then, err := tlog.TreeHash(seen.tree.N, hashes)
	if err != nil {
		return logError(err)
	}
	if then != seen.tree.Hash {
		return c.fork(LogFork, seen, shown, fmt.Sprintf("the first %d records of the log are not those that this device has seen: somebody shows different devices different logs, or has rewritten it", seen.tree.N))
	}
	return nil
}

// fork keeps the evidence before it refuses.
func (c *Client) fork(condition Condition, seen, shown checkpoint, reason string) error {
	f := &Fork{Seen: seen.signed, Shown: shown.signed}
	raw, err := json.MarshalIndent(f, "", "\t")
	if err == nil {
		err = durable.WriteFile(c.local(forkFile), raw, 0o644)
	}
	if err != nil {
		c.o.Log.Error("the evidence against the log cannot be kept", "error", err)
	}
	return &Error{Condition: condition, File: checkpointFile, Reason: reason, Err: f}
}

// seen is the stored checkpoint; ok is false if there is none that is whole.
func (c *Client) seen() (s checkpoint, ok bool) {
	raw, err := durable.ReadFile(c.local(seenFile), 4*maxCheckpoint)
	if errors.Is(err, os.ErrNotExist) {
		return s, false
	}
	if err == nil {
		s, err = openSeen(raw)
	}
	if err != nil {
		c.o.Log.Warn("what was seen of the log is damaged; from here on it is watched anew", "reason", err)
	}
	return s, err == nil
}

func openSeen(raw []byte) (checkpoint, error) {
	var l seenLog
	if err := json.Unmarshal(raw, &l); err != nil {
		return checkpoint{}, err
	}
	v, err := note.NewVerifier(l.Key)
	if err != nil {
		return checkpoint{}, err
	}
	return openCheckpoint([]byte(l.Checkpoint), v)
}

func (c *Client) keepSeen(l seenLog) error {
	raw, err := json.Marshal(l)
	if err != nil {
		return err
	}
	if there, err := os.ReadFile(c.local(seenFile)); err == nil && string(there) == string(raw) {
		return nil // flash wears
	}
	return c.keep(seenFile, raw)
}

// findRecord proves that the log has this manifest, and tells where.
func (c *Client) findRecord(ctx context.Context, shown checkpoint, hashes tlog.HashReader, name, sum string) (int64, error) {
	file := lookupPath(sum)
	unlogged := func(why string) error {
		return &Error{Condition: Unlogged, File: file, Reason: "the release is not in the log of releases that the fleet's owners can check: " + why}
	}
	raw, err := c.fetch(ctx, file, maxLookup)
	if conditionOf(err) == Missing {
		return 0, unlogged("nobody says where")
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil || n < 0 || n >= shown.tree.N {
		return 0, unlogged(fmt.Sprintf("it has %d records, and this would be record %.20q", shown.tree.N, raw))
	}
	proved, err := hashes.ReadHashes([]int64{tlog.StoredHashIndex(0, n)})
	if err != nil {
		return 0, logError(err)
	}
	t := dataTile(n, shown.tree.N)
	if raw, err = c.fetch(ctx, tilePath(t), int64(t.W)*maxRecord); err != nil {
		return 0, err
	}
	lines, err := splitRecords(t, raw)
	if err != nil {
		return 0, &Error{Condition: Malformed, File: tilePath(t), Reason: err.Error()}
	}
	line := lines[n%tileWidth]
	if tlog.RecordHash(line) != proved[0] {
		return 0, &Error{Condition: Digest, File: tilePath(t), Reason: fmt.Sprintf("record %d is not the one that the log was signed for", n)}
	}
	r, err := parseRecord(line)
	if err != nil || r.SHA256 != sum || r.Target != name || TargetName(r.Version) != name {
		return 0, unlogged(fmt.Sprintf("record %d is of another release", n))
	}
	return n, nil
}

// logError says what tlog found in the tiles; what a fetch found goes as it is.
func logError(err error) error {
	var e *Error
	if errors.As(err, &e) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &Error{Condition: Digest, File: logDir + "tile", Reason: fmt.Sprintf("its hashes are not those that the log was signed for (%v)", err), Err: err}
}

// tiles fetches what a proof needs of the tree.
type tiles struct {
	ctx context.Context
	c   *Client
}

func (t *tiles) Height() int { return tileHeight }

func (t *tiles) ReadTiles(want []tlog.Tile) ([][]byte, error) {
	out := make([][]byte, len(want))
	for i, w := range want {
		size := int64(w.W) * tlog.HashSize
		raw, err := t.c.fetch(t.ctx, tilePath(w), size)
		if err != nil {
			return nil, err
		}
		if int64(len(raw)) != size {
			return nil, &Error{Condition: Size, File: tilePath(w), Reason: fmt.Sprintf("it has %d bytes, not %d", len(raw), size)}
		}
		out[i] = raw
	}
	return out, nil
}

func (t *tiles) SaveTiles([]tlog.Tile, [][]byte) {}

// LogReport is what [VerifyLog] has found.
type LogReport struct {
	Name     string      `json:"name"` // of the log
	Size     int64       `json:"size"` // records
	Hash     string      `json:"hash"` // of its tree, base64
	Records  []LogRecord `json:"records"`
	Compared int         `json:"compared"` // checkpoints of others that fit
	// Problems says, a sentence each, what contradicts the log; empty if nothing does.
	Problems []string `json:"problems,omitempty"`
}

// VerifyLog reads the whole log of a repository, computes it anew, and compares
// it with the releases that the client's metadata names, after [Client.Refresh],
// and with signed checkpoints that others have seen, by who that was. An error
// means that the log cannot be read, or is not what was signed; what else is wrong
// with it is in the report.
func (c *Client) VerifyLog(ctx context.Context, seen map[string]string) (LogReport, error) {
	if c.trusted == nil {
		return LogReport{}, errors.New("the update metadata has not been refreshed")
	}
	v, err := logKey(c.trusted.Root)
	if err != nil {
		return LogReport{}, err
	}
	if v == nil {
		return LogReport{}, errors.New("the update root names no log; \"deimos release keys rotate --role log\" begins one")
	}
	raw, err := c.fetch(ctx, checkpointFile, maxCheckpoint)
	if err != nil {
		return LogReport{}, err
	}
	shown, err := openCheckpoint(raw, v)
	if err != nil {
		return LogReport{}, &Error{Condition: Signature, File: checkpointFile, Reason: fmt.Sprintf("it is not signed by the key of the log that the root names (%v)", err), Err: err}
	}
	l, err := readLedger(ctx, c.fetch, shown)
	if err != nil {
		return LogReport{}, err
	}
	r := LogReport{Name: v.Name(), Size: l.size(), Hash: shown.tree.Hash.String()}
	if r.Records, err = l.records(); err != nil {
		return r, err
	}
	if err := c.checkTiles(ctx, l, &r); err != nil {
		return r, err
	}
	c.compareTargets(l, &r)
	c.compareSeen(l, seen, &r)
	return r, nil
}

// checkTiles compares the tree's hashes that are stored with those computed.
func (c *Client) checkTiles(ctx context.Context, l *ledger, r *LogReport) error {
	for _, t := range tlog.NewTiles(tileHeight, 0, l.size()) {
		want, err := tlog.ReadTileData(t, l)
		if err != nil {
			return err
		}
		got, err := (&tiles{ctx: ctx, c: c}).ReadTiles([]tlog.Tile{t})
		switch {
		case err != nil && ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			r.Problems = append(r.Problems, err.Error())
		case string(got[0]) != string(want):
			r.Problems = append(r.Problems, tilePath(t)+": its hashes are not those of the records")
		}
	}
	return nil
}

// compareTargets looks for releases that are signed and not logged, and for
// versions that are logged twice, which no honest signer does.
func (c *Client) compareTargets(l *ledger, r *LogReport) {
	for _, name := range c.Targets() {
		sum, err := targetSum(name, c.trusted.Targets[metadata.TARGETS].Signed.Targets[name])
		if err != nil {
			r.Problems = append(r.Problems, err.Error())
			continue
		}
		if n, ok := l.at[sum]; !ok || r.Records[n].Target != name {
			r.Problems = append(r.Problems, fmt.Sprintf("%s is signed as a release (SHA-256 %s), and the log has it not: no device that asks for the log installs it", name, sum))
		}
	}
	first := map[string]int{}
	for n, record := range r.Records {
		if TargetName(record.Version) != record.Target {
			r.Problems = append(r.Problems, fmt.Sprintf("record %d names version %s and target %s, which do not go together", n, record.Version, record.Target))
		}
		if at, ok := first[record.Version]; ok {
			r.Problems = append(r.Problems, fmt.Sprintf("version %s is logged twice, as records %d and %d, with contents %s and %s: if you did not build it twice, somebody else signs with your keys",
				record.Version, at, n, short(r.Records[at].SHA256), short(record.SHA256)))
			continue
		}
		first[record.Version] = n
	}
}

// compareSeen looks at what others were shown.
func (c *Client) compareSeen(l *ledger, seen map[string]string, r *LogReport) {
	verdicts := map[string]string{} // a fleet has seen few different ones
	for _, who := range slices.Sorted(maps.Keys(seen)) {
		verdict, ok := verdicts[seen[who]]
		if !ok {
			verdict = c.contradiction(l, seen[who])
			verdicts[seen[who]] = verdict
		}
		if verdict != "" {
			r.Problems = append(r.Problems, who+" was shown "+verdict)
			continue
		}
		r.Compared++
	}
}

// contradiction says why a checkpoint cannot be one of this log; "" if it can.
func (c *Client) contradiction(l *ledger, signed string) string {
	var seen checkpoint
	err := errors.New("the root names no log")
	for _, v := range c.logKeys {
		if seen, err = openCheckpoint([]byte(signed), v); err == nil {
			break
		}
	}
	if err != nil {
		return fmt.Sprintf("a checkpoint that no key of the log has signed (%v)", err)
	}
	if seen.tree.N > l.size() {
		return fmt.Sprintf("a log of %d records, this one has %d: it went back, or there are two", seen.tree.N, l.size())
	}
	if t, err := l.tree(seen.tree.N); err != nil || t != seen.tree {
		return fmt.Sprintf("another log: its first %d records are not these", seen.tree.N)
	}
	return ""
}
