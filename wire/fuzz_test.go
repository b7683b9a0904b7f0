package wire

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// The fuzz targets here hold decoders to more than "no panic": what is read is
// written and read again as the same, nothing opens that was not signed, and no
// text has two readings. The seeds in testdata/fuzz were made by this code
// (DEIMOS_GOLDEN=new makes those that are missing).

// again encodes v and decodes it, and wants the same bytes and the same value.
func again[T any](t *testing.T, v T) {
	t.Helper()
	first, err := json.Marshal(v)
	if err != nil {
		t.Fatalf("what was read cannot be written: %v: %+v", err, v)
	}
	var w, x T
	if err := json.Unmarshal(first, &w); err != nil {
		t.Fatalf("what was written cannot be read: %v: %s", err, first)
	}
	second, err := json.Marshal(w)
	if err != nil || !bytes.Equal(first, second) {
		t.Fatalf("it means something else the second time (%v):\n%s\n%s", err, first, second)
	}
	if err := json.Unmarshal(second, &x); err != nil || !reflect.DeepEqual(w, x) {
		t.Fatalf("the same bytes are read as two values (%v):\n%+v\n%+v", err, w, x)
	}
	if !utf8.Valid(first) {
		t.Fatalf("no UTF-8 is written: %q", first)
	}
}

// opens seals a payload as it is and opens it as a T. Both ways to open it, in
// one step and in two, must come to the same.
func opens[T any](t *testing.T, typ PayloadType, payload []byte) {
	t.Helper()
	raw, err := Seal(goldenKey, typ, json.RawMessage(payload))
	if errors.Is(err, ErrTooLarge) {
		return
	}
	if err != nil {
		t.Fatalf("JSON that cannot be sealed: %v", err)
	}
	if len(raw) > MaxMessage {
		t.Fatalf("a message of %d bytes", len(raw))
	}
	key := goldenKey.Public().(ed25519.PublicKey)
	got, err := OpenAs[T](raw, key, typ)
	signed, inside, err2 := Open(raw, key)
	if err2 != nil || signed != typ {
		t.Fatalf("what was sealed does not open: %v", err2)
	}
	var other T
	if err2 := json.Unmarshal(inside, &other); (err == nil) != (err2 == nil) || err == nil && !reflect.DeepEqual(got, other) {
		t.Fatalf("two readings: %+v (%v) and %+v (%v)", got, err, other, err2)
	}
	for _, wrong := range []PayloadType{TypeOrder, TypeReport, TypeAck, TypeWelcome, TypePresence, TypeBeat} {
		if wrong == typ {
			continue
		}
		if _, err := OpenAs[T](raw, key, wrong); err == nil {
			t.Fatalf("a %s passes as a %s", typ, wrong)
		}
	}
	if err == nil {
		again(t, got)
	}
}

// payloads is how each payload type is opened.
var payloads = []struct {
	typ  PayloadType
	name string // its golden messages begin so
	open func(*testing.T, PayloadType, []byte)
}{
	{TypeOrder, "order", opens[Order]},
	{TypeReport, "report", opens[Report]},
	{TypeAck, "ack", opens[Ack]},
	{TypeWelcome, "welcome", opens[Welcome]},
	{TypePresence, "presence", opens[Presence]},
	{TypeBeat, "beat", opens[Beat]},
}

// FuzzPayload is what a genuine sender could have signed, however odd.
func FuzzPayload(f *testing.F) {
	f.Fuzz(func(t *testing.T, which byte, payload []byte) {
		if !json.Valid(payload) {
			return // nobody can seal it
		}
		p := payloads[int(which)%len(payloads)]
		p.open(t, p.typ, payload)
	})
}

// FuzzOpen gives envelopes from nowhere: what opens is one that was signed, to
// the byte.
func FuzzOpen(f *testing.F) {
	signed := map[string]bool{}
	for _, p := range payloads {
		raw, err := Seal(goldenKey, p.typ, goldens()[p.name])
		if err != nil {
			f.Fatal(err)
		}
		typ, payload, err := Open(raw, goldenKey.Public().(ed25519.PublicKey))
		if err != nil {
			f.Fatal(err)
		}
		signed[string(typ)+"\x00"+string(payload)] = true
		f.Add(raw)
	}
	other := newKey(f).Public().(ed25519.PublicKey)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, _, err := Open(raw, other); err == nil {
			t.Fatalf("it opens with a key that signed nothing: %q", raw)
		}
		typ, payload, err := Open(raw, goldenKey.Public().(ed25519.PublicKey))
		if err != nil {
			if typ != "" || payload != nil {
				t.Fatalf("refused (%v), and handed out all the same: %s %q", err, typ, payload)
			}
			return
		}
		if len(raw) > MaxMessage {
			t.Fatalf("%d bytes were opened", len(raw))
		}
		if !signed[string(typ)+"\x00"+string(payload)] {
			t.Fatalf("it was never signed: %s %q", typ, payload)
		}
	})
}

func decodesBody[T any](t *testing.T, o Order) {
	t.Helper()
	v, err := DecodeBody[T](o)
	if err != nil {
		if p := ProblemOf(err); p.State != Rejected || p.Code != CodeBadBody || p.Reason == "" || len(p.Reason) > len(o.Body)+1000 {
			t.Fatalf("refused as %+v", p)
		}
		return
	}
	again(t, v)
}

func decodesJSON[T any](t *testing.T, o Order) {
	t.Helper()
	var v T
	if json.Unmarshal(o.Body, &v) == nil {
		again(t, v)
	}
}

// bodies is every body, by the name of its golden message.
var bodies = []struct {
	name   string
	decode func(*testing.T, Order)
}{
	{"chunk_store", decodesBody[ChunkStore]},
	{"chunk_receipt", decodesBody[Receipt]},
	{"chunk_serve", decodesBody[ChunkServe]},
	{"chunk_drop", decodesBody[ChunkDrop]},
	{"audit", decodesBody[Audit]},
	{"audit_answer", decodesBody[AuditAnswer]},
	{"audit_leaf", decodesBody[AuditLeaf]},
	{"job_run", decodesBody[JobRun]},
	{"job_result", decodesBody[JobResult]},
	{"update_install", decodesBody[UpdateInstall]},
	{"update_result", decodesBody[UpdateResult]},
	{"order_cancel", decodesBody[OrderCancel]},
	{"cancel_result", decodesBody[CancelResult]},
	{"config_apply", decodesBody[ConfigApply]},
	{"config_report", decodesBody[ConfigReport]},
	{"ping_pong", decodesBody[Pong]},
	{"enrol_request", decodesJSON[EnrolRequest]},
	{"enrol_reply", decodesJSON[EnrolReply]},
	{"enrol_pending", decodesJSON[EnrolPending]},
	{"api_error", decodesJSON[APIError]},
}

// FuzzBody decodes bodies of orders, reports and of the enrolment's HTTP calls.
func FuzzBody(f *testing.F) {
	f.Fuzz(func(t *testing.T, which byte, body []byte) {
		b := bodies[int(which)%len(bodies)]
		b.decode(t, Order{Kind: "x", Body: body})
	})
}

func FuzzParseDeviceID(f *testing.F) {
	letters := regexp.MustCompile(`\A[a-z2-7]{24}\z`)
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseDeviceID(s)
		if (err == nil) != letters.MatchString(s) {
			t.Fatalf("%q: %v", s, err)
		}
		if err != nil {
			return
		}
		if again, err := ParseDeviceID(string(id)); err != nil || again != id || string(id) != s {
			t.Fatalf("%q is %q is %q, %v", s, id, again, err)
		}
		for _, c := range []Channel{ChannelOrder, ChannelReport, ChannelBeat, ChannelPresence} {
			if d, ch, err := ParseSubject(Subject(id, c)); err != nil || d != id || ch != c {
				t.Fatalf("%s comes back as %s %s, %v", Subject(id, c), d, ch, err)
			}
		}
	})
}

func FuzzParseSubject(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		d, c, err := ParseSubject(s)
		if err != nil {
			if d != "" || c != "" {
				t.Fatalf("refused, and handed out all the same: %q %q", d, c)
			}
			return
		}
		if Subject(d, c) != s {
			t.Fatalf("%q comes back as %q", s, Subject(d, c))
		}
		if strings.ContainsAny(string(d)+string(c), ".*>/+# \t") && strings.ContainsAny(string(d), ".*>/+# \t\r\n") {
			t.Fatalf("the device of %q is %q", s, d)
		}
	})
}

func FuzzParseFleetToken(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseFleetToken(s)
		if err != nil {
			return
		}
		if back, err := ParseFleetToken(tok.String()); err != nil || back != tok {
			t.Fatalf("%q is %v, its text %v, %v", s, tok, back, err)
		}
		if len(s) > 10*len(tok.String()) && len(strings.TrimSpace(s)) > 10*len(tok.String()) {
			t.Fatalf("%d bytes are a token", len(s))
		}
	})
}

func FuzzParseClaimCode(f *testing.F) {
	form := regexp.MustCompile(`\A[a-z2-7]{5}-[a-z2-7]{5}-[a-z2-7]{5}\z`)
	f.Fuzz(func(t *testing.T, s string) {
		code, err := ParseClaimCode(s)
		if err != nil {
			if code != "" {
				t.Fatalf("refused, and handed out all the same: %q", code)
			}
			return
		}
		if !form.MatchString(code) {
			t.Fatalf("%q is read as %q", s, code)
		}
		for _, typed := range []string{code, strings.ToUpper(code), strings.ReplaceAll(code, "-", ""), " " + strings.ReplaceAll(code, "-", " ") + "\n"} {
			if same, err := ParseClaimCode(typed); err != nil || same != code {
				t.Fatalf("%q is read as %q (%v), want %q", typed, same, err, code)
			}
		}
	})
}

// FuzzCheckFor: no order passes that is not for the device, whole, and in time.
func FuzzCheckFor(f *testing.F) {
	f.Fuzz(func(t *testing.T, id, kind, device string, expires, now int64) {
		o := Order{ID: id, Kind: Kind(kind), Device: DeviceID(device), Expires: time.Unix(expires, 0)}
		at := time.Unix(now, 0)
		err := o.CheckFor(goldenDevice, at)
		good := id != "" && kind != "" && o.Device == goldenDevice && !o.Expires.IsZero() && !at.After(o.Expires)
		if (err == nil) != good {
			t.Fatalf("%+v at %s: %v", o, at, err)
		}
		if p := ProblemOf(err); err != nil && (p.State != Rejected || p.Code == "" || p.Code == CodeInternal || p.Reason == "") {
			t.Fatalf("refused as %+v", p)
		}
	})
}

// TestFuzzSeedsAreThere makes missing seeds on demand, and fails if a target has
// too few: "go test" alone runs the seeds only.
func TestFuzzSeedsAreThere(t *testing.T) {
	for target, list := range seeds(t) {
		dir := filepath.Join("testdata", "fuzz", target)
		if os.Getenv("DEIMOS_GOLDEN") == "new" {
			for name, args := range list {
				path := filepath.Join(dir, name)
				if _, err := os.Stat(path); err == nil {
					continue
				}
				if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(path, []byte("go test fuzz v1\n"+strings.Join(args, "\n")+"\n"), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for name := range list {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				t.Error(err)
			}
		}
	}
}

// seeds by target and name, each the lines of a corpus file.
func seeds(t *testing.T) map[string]map[string][]string {
	t.Helper()
	raw := func(b []byte) string { return fmt.Sprintf("[]byte(%q)", b) }
	text := func(s string) string { return fmt.Sprintf("string(%q)", s) }
	num := func(n int64) string { return fmt.Sprintf("int64(%d)", n) }
	which := func(n int) string { return fmt.Sprintf("byte('\\x%02x')", n) }
	all := goldens()
	out := map[string]map[string][]string{}
	add := func(target, name string, args ...string) {
		if out[target] == nil {
			out[target] = map[string][]string{}
		}
		out[target][name] = args
	}
	odd := map[string]string{
		"null": `null`, "empty": `{}`, "list": `[]`, "twice": `{"id":"a","id":"b","device":"x","DEVICE":"y","order":"o","ORDER":"p"}`,
		"case": `{"ID":"a","Device":"b","KIND":"c","Online":true}`, "utf8": "{\"reason\":\"\xff\xfe\",\"id\":\"\\ud800\",\"nonce\":\"\\u0000\"}",
		"deep": `{"body":` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + `}`, "time": `{"at":"9999-12-31T23:59:59.999999999+14:00","expires":"0001-01-01T00:00:00Z","time":"2026-01-01T00:00:00-23:59"}`,
		"number": `{"seq":18446744073709551615,"progress":1e-320,"uptime":-0,"capacity":-9223372036854775808}`,
	}
	for i, p := range payloads {
		for name, v := range all {
			if name == p.name || strings.HasPrefix(name, p.name+"_") && reflect.TypeOf(v) == reflect.TypeOf(all[p.name]) {
				b, err := json.Marshal(v)
				if err != nil {
					t.Fatal(err)
				}
				add("FuzzPayload", name, which(i), raw(b))
			}
		}
		for name, s := range odd {
			add("FuzzPayload", p.name+"-"+name, which(i), raw([]byte(s)))
		}
	}
	for i, b := range bodies {
		v, err := json.Marshal(all[b.name])
		if err != nil {
			t.Fatal(err)
		}
		add("FuzzBody", b.name, which(i), raw(v))
		add("FuzzBody", b.name+"-twice", which(i), raw(append(append(bytes.TrimSuffix(v, []byte("}")), ','), v[1:]...)))
	}
	for name, s := range odd {
		add("FuzzBody", "odd-"+name, which(len(name)), raw([]byte(s)))
	}
	env, err := Seal(goldenKey, TypeOrder, all["order"])
	if err != nil {
		t.Fatal(err)
	}
	add("FuzzOpen", "order", raw(env))
	add("FuzzOpen", "unsigned", raw(bytes.Replace(env, []byte(`"signatures":[`), []byte(`"signatures":[],"x":[`), 1)))
	add("FuzzOpen", "two-payloads", raw(bytes.Replace(env, []byte(`{`), []byte(`{"payload":"e30=",`), 1)))
	add("FuzzOpen", "payload-after", raw(append(bytes.TrimSuffix(env, []byte("}")), []byte(`,"PAYLOAD":"e30="}`)...)))
	add("FuzzOpen", "signature-twice", raw(bytes.Replace(env, []byte(`"signatures":[`), []byte(`"signatures":[{"keyid":"","sig":"AAAA"},`), 1)))
	add("FuzzOpen", "nothing", raw([]byte(`{"payloadType":"x","payload":"e30=","signatures":[]}`)))
	id, tok := string(goldenDevice), NewFleetToken([]byte("seed"))
	tok.Secret = [16]byte{1, 2, 3}
	for name, s := range map[string]string{"good": id, "upper": strings.ToUpper(id), "short": id[1:], "digit": id[1:] + "1", "nul": id[1:] + "\x00", "wide": id[2:] + "é"} {
		add("FuzzParseDeviceID", name, text(s))
		add("FuzzParseSubject", name, text("deimos.1."+s+".order"))
	}
	for name, s := range map[string]string{"wildcard": "deimos.1.*.order", "deep": "deimos.1." + id + ".order.x", "none": "deimos.1." + id + ".", "other": "deimos.2." + id + ".order"} {
		add("FuzzParseSubject", name, text(s))
	}
	for name, s := range map[string]string{"good": tok.String(), "space": " " + tok.String() + "\n", "short": tok.String()[:40], "parts": tok.String() + "_a", "bits": tok.String()[:len(tok.String())-1] + "7", "lines": strings.Replace(tok.String(), "_", "_\n", 2)} {
		add("FuzzParseFleetToken", name, text(s))
	}
	code := ClaimCode(goldenKey.Public().(ed25519.PublicKey), [16]byte{})
	for name, s := range map[string]string{"good": code, "upper": strings.ToUpper(code), "spaces": strings.ReplaceAll(code, "-", " "), "plain": strings.ReplaceAll(code, "-", ""), "digit": "1" + code[1:], "kelvin": "\u212a" + code[3:], "long": code + code} {
		add("FuzzParseClaimCode", name, text(s))
	}
	for name, o := range map[string]struct {
		id, kind, device string
		expires, now     int64
	}{
		"good": {"a", "b", id, 100, 100}, "expired": {"a", "b", id, 100, 101}, "other": {"a", "b", id[1:] + "a", 100, 1}, "no-id": {"", "b", id, 100, 1},
		"no-kind": {"a", "", id, 100, 1}, "zero": {"a", "b", id, -62135596800, -62135596801}, "far": {"a", "b", id, 1<<62 - 1, -1 << 62},
	} {
		add("FuzzCheckFor", name, text(o.id), text(o.kind), text(o.device), num(o.expires), num(o.now))
	}
	return out
}
