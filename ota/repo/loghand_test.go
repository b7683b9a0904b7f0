package repo

import (
	"crypto"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// logElsewhere is a fleet of two releases whose log's key is on another machine, and
// what is written there for a third.
func logElsewhere(t *testing.T) (f *fleet, key string, o PublishOptions, file string) {
	t.Helper()
	f = newFleet(t)
	f.release("1.0.0", "zero")
	f.release("1.1.0", "one")
	key = f.elsewhere("log.pem")
	o = PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: f.pack("1.2.0"), Now: now, Unsigned: t.TempDir()}
	p, err := Publish(o)
	must(t, err)
	if p.Awaits == "" || !strings.Contains(p.Missing, "the key of the log") {
		t.Fatalf("%+v", p)
	}
	return f, key, o, p.Awaits
}

// TestTheLogIsSignedByHand: who signs sees what is new in it; the repository is what it
// was until it is there; and devices that saw the log before take it.
func TestTheLogIsSignedByHand(t *testing.T) {
	f, key, o, file := logElsewhere(t)
	before := tree(t, f.repo)
	dir := t.TempDir()
	must(t, take(t, f.client(dir), "1.1.0"))
	q := o
	q.Unsigned = ""
	if _, err := Publish(q); err == nil || !strings.Contains(err.Error(), "--unsigned") {
		t.Errorf("without the key: %v", err)
	}
	q.Signed = []string{file}
	if _, err := Publish(q); err == nil || !strings.Contains(err.Error(), "nobody has signed it yet") {
		t.Errorf("not signed: %v", err)
	}
	st := signWith(t, file, key)
	if st.Role != LogRole || st.Version != 3 || st.Previous != 2 || !st.PreviousMine || !st.Expires.IsZero() || len(st.Signed) != 0 ||
		len(st.Changes) != 1 || !strings.Contains(st.Changes[0], `release "bundles/1.2.0.json" is record 2`) {
		t.Errorf("%+v", st)
	}
	if st := signWith(t, file, key); len(st.Signed) != 1 { // once more is no more
		t.Errorf("signed before: %+v", st)
	}
	if now := tree(t, f.repo); now != before {
		t.Errorf("the repository has changed before it was published:\n%s\nit was\n%s", now, before)
	}
	q.Now = now.Add(time.Hour) // its records keep the time of when they were written
	_, err := Publish(q)
	must(t, err)
	c := f.client(dir)
	must(t, take(t, c, "1.2.0"))
	report, err := c.VerifyLog(t.Context(), nil)
	must(t, err)
	if len(report.Problems) > 0 || report.Size != 3 || !report.Records[2].Time.Equal(now) {
		t.Errorf("%+v", report)
	}
	_, err = Publish(q) // once more, as after an upload that was cut off
	must(t, err)
	f.publish("", now.Add(day)) // nothing new is logged: nobody is asked for the key
	must(t, take(t, f.client(dir), "1.2.0"))
}

// TestOneFileEachForLogAndReleases: the keys of both are elsewhere, and one trip after
// the other brings them.
func TestOneFileEachForLogAndReleases(t *testing.T) {
	f := newFleet(t)
	f.release("1.0.0", "zero")
	targets, log := f.elsewhere("targets.pem"), f.elsewhere("log.pem")
	o := PublishOptions{Keys: f.keys, Repo: f.repo, Bundle: f.pack("1.1.0"), Now: now, Unsigned: t.TempDir()}
	for _, key := range []string{targets, log} {
		p, err := Publish(o)
		must(t, err)
		signWith(t, p.Awaits, key)
		o.Signed = append(o.Signed, p.Awaits)
	}
	p, err := Publish(o)
	must(t, err)
	if p.Awaits != "" || p.Log != 2 {
		t.Errorf("%+v", p)
	}
	must(t, take(t, f.client(t.TempDir()), "1.1.0"))
}

// changed is the file with another content, signed with the key, if one is named, by one
// who does not look.
func changed(t *testing.T, file, key string, change func(*handLog)) string {
	t.Helper()
	var h handLog
	must(t, json.Unmarshal(read(t, file), &h))
	change(&h)
	h.Checkpoint = ""
	other := filepath.Join(t.TempDir(), filepath.Base(file))
	must(t, h.write(other))
	if key != "" {
		s, err := LoadKey(key, nil)
		must(t, err)
		_, err = Sign(other, s)
		must(t, err)
	}
	return other
}

// rename changes the record of the new release, and not what it is of.
func rename(from, to string) func(*handLog) {
	return func(h *handLog) { h.Signed.Records[2] = strings.ReplaceAll(h.Signed.Records[2], from, to) }
}

// another is a record of something else.
func another(version string) string {
	return version + " " + TargetName(version) + " " + strings.Repeat("ab", 32) + " 2026-11-22T00:00:00Z\n"
}

// TestALogThatIsNotOursGrownIsNotTaken, though the log's key has signed it.
func TestALogThatIsNotOursGrownIsNotTaken(t *testing.T) {
	f, key, o, file := logElsewhere(t)
	o.Unsigned = ""
	before := tree(t, f.repo)
	add := func(lines ...string) func(*handLog) {
		return func(h *handLog) {
			h.Signed.Records = append(h.Signed.Records, lines...)
			h.Signed.Size = int64(len(h.Signed.Records))
		}
	}
	for what, c := range map[string]struct {
		files []string
		words string
	}{
		"another first record": {[]string{changed(t, file, key, func(h *handLog) { h.Signed.Records[0] = another("1.0.0") })}, "another record 0"},
		"a record too many":    {[]string{changed(t, file, key, add(another("6.6.6")))}, "not published now"},
		"another version":      {[]string{changed(t, file, key, rename("1.2.0 ", "9.9.9 "))}, "not published now"},
		"another name":         {[]string{changed(t, file, key, rename("1.2.0", "9.9.9"))}, "not published now"},
		"a record twice":       {[]string{changed(t, file, key, func(h *handLog) { add(h.Signed.Records[2])(h) })}, "there already"},
		"a record too few":     {[]string{changed(t, file, key, func(h *handLog) { h.Signed.Records, h.Signed.Size = h.Signed.Records[:2], 2 })}, "not for this bundle"},
		"what was before":      {[]string{changed(t, file, key, func(h *handLog) { h.Signed.Records, h.Signed.Size = h.Signed.Records[:1], 1 })}, "in between"},
		"another log":          {[]string{changed(t, file, key, func(h *handLog) { h.Signed.Origin = "deimos-releases-of-others" })}, "bears no signature"},
		"another's key":        {[]string{changed(t, file, filepath.Join(f.keys, "timestamp.pem"), func(*handLog) {})}, "bears no signature"},
		"two different files":  {[]string{changed(t, file, key, func(*handLog) {}), changed(t, file, key, add(another("6.6.6")))}, "sign copies of one file"},
	} {
		q := o
		q.Signed = c.files
		if _, err := Publish(q); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// Signed, and changed after that.
	signWith(t, file, key)
	must(t, os.WriteFile(file, []byte(strings.Replace(string(read(t, file)), "bundles/1.2.0.json", "bundles/1.2.1.json", 1)), 0o644))
	q := o
	q.Signed = []string{file}
	if _, err := Publish(q); err == nil || !strings.Contains(err.Error(), "signed for other records") {
		t.Errorf("changed after it was signed: %v", err)
	}
	if now := tree(t, f.repo); now != before {
		t.Error("what was refused has changed the repository")
	}
}

// TestWhoSignsTheLogIsToldWhatIsWrong with it.
func TestWhoSignsTheLogIsToldWhatIsWrong(t *testing.T) {
	f, key, _, file := logElsewhere(t)
	s, err := LoadKey(key, nil)
	must(t, err)
	examine := func(file, previous string) (Statement, error) { return Examine(file, previous, s.Public()) }
	for what, c := range map[string]struct {
		change func(*handLog)
		words  string
	}{
		"rewritten":       {func(h *handLog) { h.Signed.Records[0] = another("1.0.0") }, "written it anew"},
		"gone back":       {func(h *handLog) { h.Signed.Records, h.Signed.Size = h.Signed.Records[:1], 1 }, "would go back"},
		"miscounted":      {func(h *handLog) { h.Signed.Size++ }, "says that it has"},
		"empty":           {func(h *handLog) { h.Signed.Records, h.Signed.Size = nil, 0 }, "0 records"},
		"no records":      {func(h *handLog) { h.Signed.Records[1] = "x\n" }, "record 1"},
		"of another name": {func(h *handLog) { h.Signed.Origin = "x" }, "no checkpoint of this log"},
	} {
		if _, err := examine(changed(t, file, "", c.change), ""); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", what, err)
		}
	}
	twice := changed(t, file, "", func(h *handLog) { h.Signed.Records[2] = another("1.1.0") })
	if st, err := examine(twice, ""); err != nil || len(st.Changes) != 1 || !strings.Contains(st.Changes[0], "ONCE MORE") {
		t.Errorf("a version once more: %+v, %v", st, err)
	}
	// With the checkpoint left out nothing is known of before, and with a copy of one's own it is.
	bare := changed(t, file, "", func(h *handLog) { h.Previous = "" })
	if st, err := examine(bare, ""); err != nil || st.Previous != 0 || st.PreviousMine || len(st.Changes) != 3 {
		t.Errorf("without the checkpoint before: %+v, %v", st, err)
	}
	checkpoint := filepath.Join(f.repo, checkpointFile)
	if st, err := examine(bare, checkpoint); err != nil || st.Previous != 2 || !st.PreviousMine || len(st.Changes) != 1 {
		t.Errorf("with a copy of the checkpoint: %+v, %v", st, err)
	}
	// Another key has signed before, as when the log's key was changed.
	other, err := LoadKey(filepath.Join(f.keys, "timestamp.pem"), nil)
	must(t, err)
	if st, err := Examine(file, "", other.Public()); err != nil || st.Previous != 2 || st.PreviousMine {
		t.Errorf("with a key that signed nothing before: %+v, %v", st, err)
	}
	if _, err := Examine(changed(t, file, "", func(h *handLog) { h.Signed.Records[0] = another("1.0.0") }), "", other.Public()); err == nil || !strings.Contains(err.Error(), "written it anew") {
		t.Errorf("rewritten, for a key that signed nothing before: %v", err)
	}
}

// TestTheLogsKeyIsChangedWhereNoneIsAtHand: the old key is lost, the new one is elsewhere.
func TestTheLogsKeyIsChangedWhereNoneIsAtHand(t *testing.T) {
	f := newFleet(t)
	f.release("1.0.0", "zero")
	dir, enrolled := t.TempDir(), f.root()
	must(t, take(t, f.clientOf(dir, enrolled), "1.0.0"))
	must(t, os.Remove(filepath.Join(f.keys, "log.pem")))
	key := filepath.Join(t.TempDir(), "log.pem")
	s, err := newKey(key, nil)
	must(t, err)
	_, err = Rotate(f.desk(), Rotation{Role: LogRole, Keys: []crypto.PublicKey{s.Public()}})
	must(t, err)
	o := PublishOptions{Keys: f.keys, Repo: f.repo, Now: now, Unsigned: t.TempDir()}
	p, err := Publish(o)
	must(t, err)
	if st := signWith(t, p.Awaits, key); st.Previous != 1 || st.PreviousMine || len(st.Changes) != 0 {
		t.Errorf("%+v", st)
	}
	o.Signed = []string{p.Awaits}
	_, err = Publish(o)
	must(t, err)
	must(t, take(t, f.clientOf(dir, enrolled), "1.0.0"))
}
