package wire

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// goldenDir holds one message of each type as this version of the protocol
// writes it. Devices in the field will send and expect exactly these for as long
// as the topic says "deimos/1", so a file here is never changed: a new message
// gets a new file (DEIMOS_GOLDEN=new makes those that are missing).
const goldenDir = "testdata/golden"

var (
	goldenAt     = time.Date(2026, 5, 4, 3, 2, 1, 987654321, time.UTC)
	goldenKey    = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	goldenDevice = IDOf(goldenKey.Public().(ed25519.PublicKey))
	goldenRoot   = strings.Repeat("0123456789abcdef", 4)
)

// goldens is every message and body of the protocol, with each field set.
func goldens() map[string]any {
	hour := goldenAt.Add(time.Hour)
	hex16 := goldenRoot[:32]
	values := map[string]json.RawMessage{"jobs.slots": json.RawMessage(`4`), "beat.seconds": json.RawMessage(`60`)}
	return map[string]any{
		"order": Order{ID: "01J0000000000000000000000A", Device: goldenDevice, Kind: KindChunkDrop, Issued: goldenAt, Expires: hour, Body: json.RawMessage(`{"ids":["` + goldenRoot + `"]}`)},
		"report": Report{Order: "01J0000000000000000000000A", Device: goldenDevice, Seq: 1<<53 - 1, State: Failed, Progress: 0.5, Code: CodeNoSpace, Reason: "the disk is full; ünïcode <&>",
			At: goldenAt, TimeConfidence: ClockTrusted, Body: json.RawMessage(`{"a":1}`), Attachment: &Attachment{SHA256: goldenRoot, Size: 3, Inline: []byte{0, 1, 255}}, Dropped: true},
		"report_short": Report{Order: "01J0000000000000000000000A", Device: goldenDevice, Seq: 1, State: Queued, At: goldenAt, TimeConfidence: ClockUnknown},
		"ack":          Ack{Device: goldenDevice, Reports: []Acked{{Order: "01J0000000000000000000000A", Seq: 7}, {Order: "01J0000000000000000000000B", Seq: 8}}},
		"welcome":      Welcome{Device: goldenDevice, Nonce: hex16, Time: goldenAt},
		"presence": Presence{Device: goldenDevice, Online: true, Session: hex16, Nonce: hex16, Instance: hex16, BootID: "b", Agent: "1.2.3", OS: "linux", Arch: "arm64", Board: "pi5", Slot: "a",
			InventoryDigest: goldenRoot, Capacity: 1 << 40, Used: 1 << 30, ConfigVersion: 9, Dropped: []Dropped{{Class: "report", Count: 2, Bytes: 3, First: goldenAt, Last: hour}}, At: goldenAt, TimeConfidence: ClockFloor},
		"presence_will": Presence{Device: goldenDevice, Session: hex16, Nonce: hex16, Instance: hex16, BootID: "b", Agent: "1.2.3", OS: "linux", Arch: "arm", Board: "generic", At: goldenAt, TimeConfidence: ClockUnknown},
		"beat":          Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Uptime: 12.5, Telemetry: json.RawMessage(`{"load":1}`), Capacity: 5, Used: 4},

		"enrol_request": EnrolRequest{CSR: []byte{48, 0}, Token: "deimos_a_b", Agent: "1.2.3", OS: "linux", Arch: "arm64", Board: "pi5", Inventory: json.RawMessage(`{"cpu":{}}`)},
		"enrol_pending": EnrolPending{Device: goldenDevice, RetrySeconds: 30, Expires: hour},
		"enrol_reply": EnrolReply{Device: goldenDevice, Certificate: []byte("c"), CA: []byte("ca"), OrderKey: []byte{1}, Brokers: []string{"ssl://a:1"}, DataPlane: []string{"https://a:2"},
			UpdateRoot: []byte("{}"), BeatSeconds: 60},
		"api_error": APIError{Code: CodePolicy, Reason: "no"},

		"chunk_store":     ChunkStore{ID: goldenRoot, Size: 4 << 20, URL: "/data/v1/x"},
		"chunk_receipt":   Receipt{ID: goldenRoot, Size: 4 << 20, Volume: "v"},
		"chunk_serve":     ChunkServe{ID: goldenRoot, URL: "/data/v1/x"},
		"chunk_drop":      ChunkDrop{IDs: []string{goldenRoot}},
		"audit":           Audit{Items: []AuditItem{{Chunk: goldenRoot, Leaf: 1023}}, Nonce: hex16, Deadline: hour},
		"audit_answer":    AuditAnswer{Nonce: hex16, Lost: []string{goldenRoot}},
		"audit_leaf":      AuditLeaf{Chunk: goldenRoot, Leaf: 3, Data: []byte{1}, Path: [][]byte{{2}, {3}}},
		"audit_leaf_lost": AuditLeaf{Chunk: goldenRoot, Leaf: 3, Lost: true},
		"job_run":         JobRun{Module: Blob{SHA256: goldenRoot, Size: 9, URL: "/data/v1/m"}, Args: []string{"-n"}, Input: goldenRoot, Limits: JobLimits{MemoryBytes: 1, CPUSeconds: 1.5, WallSeconds: 2.5, OutputBytes: 4}},
		"job_result":      JobResult{Module: goldenRoot, Input: goldenRoot, Output: goldenRoot, OutputBytes: 1, CPUSeconds: 0.25, WallSeconds: 0.5, MaxRSSBytes: 2, Engine: "wazero", Stderr: "e"},
		"job_run_named": JobRun{Module: Blob{SHA256: goldenRoot, Size: 9, URL: "/data/v1/m"}, Env: map[string]string{"A": "b"}, Inputs: []JobInput{{Name: "in", Parts: []JobPart{{Chunk: goldenRoot, Size: 7, URL: "/data/v1/c"}}}, {Name: "photos", Dataset: "photos/2024"}, {Name: "heat", Sensors: &HistoryRequest{From: goldenAt, To: hour, Points: 9, Series: []string{"cpu.*"}}}},
			Outputs: []string{Stdout, "table"}, Rank: 3, Deadline: hour, Live: true},
		"job_run_listed":       JobRun{Module: Blob{SHA256: goldenRoot, Size: 9, URL: "/data/v1/m"}, Inputs: []JobInput{{Name: Stdin, List: &Blob{SHA256: goldenRoot, Size: 8, URL: "/data/v1/l"}}}},
		"beat_orders":          Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Jobs: &JobsState{Host: 1, Orders: 1, Engine: "wazero", Slots: 2}},
		"job_result_named":     JobResult{Module: goldenRoot, Output: goldenRoot, Engine: "wazero", Outputs: []JobOutput{{Name: "table", SHA256: goldenRoot, Size: 7, Parts: []JobPart{{Chunk: goldenRoot, Size: 7}}}}, Statement: json.RawMessage(`{"payload":""}`), Resumed: 1, SuspendedSeconds: 2.5},
		"job_result_disturbed": JobResult{Module: goldenRoot, Output: goldenRoot, Engine: "wazero", Disturbed: true},
		"job_statement": Statement{Type: StatementType, Subject: []Resource{{Name: Stdout, Digest: map[string]string{"sha256": goldenRoot}}}, PredicateType: JobPredicateType, Predicate: JobPredicate{Order: "01J0000000000000000000000A", Device: goldenDevice, Module: Resource{Name: "module", Digest: map[string]string{"sha256": goldenRoot}}, Args: []string{"-n"}, Env: map[string]string{"A": "b"},
			Inputs: []Resource{{Name: "stdin", Digest: map[string]string{"deimosChunk": goldenRoot, "sha256": goldenRoot}}}, Limits: JobLimits{MemoryBytes: 1, CPUSeconds: 1.5, WallSeconds: 2.5, OutputBytes: 4}, Live: true, Engine: "wazero", ExitCode: 1, Began: goldenAt, Ended: hour, CPUSeconds: 0.5, WallSeconds: 0.75}},
		"beat_jobs":      Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Jobs: &JobsState{Host: 1, Engine: "wazero", Walls: []string{"seccomp"}, Slots: 2, Running: 1, Waiting: 3, MemoryBytes: 4, WallSeconds: 5, Live: true, Sensors: true, Datasets: []string{"photos"}, Pause: &Pause{Code: "hours", Seconds: 60}}},
		"beat_room":      Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Jobs: &JobsState{Host: 1, Orders: 1, Engine: "wazero", Slots: 2, MemoryBytes: 4, WallSeconds: 5, InputBytes: 6, OutputBytes: 7, DiskBytes: new(int64(0))}},
		"report_waits":   Report{Order: "01J0000000000000000000000A", Device: goldenDevice, Seq: 2, State: Running, Progress: 0.25, Code: "hours", Reason: "the owner lets jobs run from 22:00", RetrySeconds: 60, At: goldenAt, TimeConfidence: ClockTrusted},
		"update_install": UpdateInstall{Version: "1.2.3", Target: "t"},
		"update_share":   UpdateInstall{Version: "1.2.3", Target: "t", Percentage: 12.5},
		"update_result":  UpdateResult{From: "1", To: "2", Running: "2", Slot: "b", Confirmed: true},
		"update_judged": UpdateResult{From: "1", To: "2", Running: "1", Form: "zstd", FetchedBytes: 9, TookSeconds: 1.5, Local: true, Checkpoint: "c",
			Gate: &UpdateGate{Before: UpdateFigures{Online: true, Volumes: 2, Sensors: 3}, After: UpdateFigures{Volumes: 1, Crashes: 1}, Worse: []string{"w"}}},
		"beat_update":   Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Update: &UpdateState{Phase: UpdateWaiting, Version: "2", Local: true, Code: "window", Seconds: 60}},
		"order_cancel":  OrderCancel{Order: "01J0000000000000000000000A", Expires: hour},
		"cancel_result": CancelResult{State: Canceled},
		"config_apply":  ConfigApply{Version: 3, Values: values},
		"config_report": ConfigReport{Version: 3, Running: values, Refused: map[string]Refusal{"x": {Code: CodePolicy, Reason: "r"}}},
		"ping_pong":     Pong{Agent: "1.2.3", Uptime: 1.5},
		"beat_warned": Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Uptime: 12.5, InventoryDigest: goldenRoot,
			Warnings: []Warning{{Code: "disk_failing", Subject: "sda", Severity: Critical, Title: "A disk is failing", Text: "Replace it.", Since: goldenAt}}},
		"beat_lossy": Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Uptime: 12.5, Losses: LossDigest([]string{goldenRoot}),
			Scrubs: []Scrub{{Volume: "v", Dir: "/mnt/a", Began: goldenAt, Share: 0.5, Bytes: 1 << 30, Lost: 1, Verified: goldenAt, Ends: hour, Late: true, Problem: "p"}}},
		"beat_paused": Beat{Device: goldenDevice, At: goldenAt, TimeConfidence: ClockTrusted, Uptime: 12.5, Pause: &Pause{Code: CodeQuietHours, Seconds: 3600}},
		"report_refused": Report{Order: "01J0000000000000000000000A", Device: goldenDevice, Seq: 1, State: Rejected, Code: CodeMetered, Reason: "the month's volume is used up", RetrySeconds: 86400,
			At: goldenAt, TimeConfidence: ClockTrusted},
		"presence_lossy":   Presence{Device: goldenDevice, Online: true, Session: hex16, Nonce: hex16, Instance: hex16, BootID: "b", Agent: "1.2.3", OS: "linux", Arch: "arm64", Board: "pi5", Losses: LossDigest([]string{goldenRoot}), At: goldenAt, TimeConfidence: ClockFloor},
		"loss_report":      LossReport{Digest: LossDigest([]string{goldenRoot}), Count: 12_000},
		"chunk_loss":       ChunkLoss{ID: goldenRoot, Size: 4 << 20, Volume: "v", Reason: "its bytes have changed on disk", Found: goldenAt},
		"chunk_holdings":   ChunkHoldings{Drained: &Drained{Began: goldenAt, Ended: hour, Chunks: 7, Bytes: 7 << 20}},
		"chunk_page":       ChunkHoldings{After: goldenRoot},
		"update_whole":     UpdateResult{From: "1", To: "2", Running: "2", Slot: "b", Confirmed: true, Form: "zstd", NoDelta: "none of its deltas is from what runs here"},
		"holdings":         Holdings{Count: 3, Bytes: 3 << 20},
		"chunk_drop_lost":  ChunkDrop{IDs: []string{goldenRoot}, OnlyLost: true},
		"identify":         Identify{Seconds: 60},
		"inventory_report": InventoryReport{Digest: goldenRoot},
		"history_request":  HistoryRequest{From: goldenAt, To: hour, Points: 100, Series: []string{"load1", "temperature.*"}},
		"history":          History{From: goldenAt, Step: 60, Count: 2, Series: map[string]Curve{"load1": {Unit: "°C", Mean: []*float64{nil, new(1.5)}, Min: []*float64{nil, new(1.0)}, Max: []*float64{nil, new(2.0)}}}},
		"history_cut":      History{From: goldenAt, Step: 60, Count: 1, Series: map[string]Curve{"load1": {Mean: []*float64{new(1.5)}}}, LeftOut: []string{"load15"}},
		"attachment_large": Attachment{SHA256: goldenRoot, Size: 1 << 20},
	}
}

// TestGoldenMessagesAreReadAsEver: each committed message decodes to the value
// it was made from, and that value is still written with everything in the
// message. A field more is no break, because unknown fields are ignored.
func TestGoldenMessagesAreReadAsEver(t *testing.T) {
	all := goldens()
	for name, want := range all {
		t.Run(name, func(t *testing.T) {
			raw := golden(t, name, want)
			got := reflect.New(reflect.TypeOf(want))
			if err := json.Unmarshal(raw, got.Interface()); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got.Elem().Interface(), want) {
				t.Errorf("the message is read as\n%+v, it was made from\n%+v", got.Elem().Interface(), want)
			}
			now, err := json.Marshal(want)
			if err != nil {
				t.Fatal(err)
			}
			within(t, name, plain(t, raw), plain(t, now))
		})
	}
	entries, err := filepath.Glob(filepath.Join(goldenDir, "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range entries {
		if name := strings.TrimSuffix(filepath.Base(path), ".json"); all[name] == nil && name != "envelope" {
			t.Errorf("%s is a message that no test reads any more", path)
		}
	}
}

// TestGoldenEnvelopeOpens: signatures made long ago verify, and are made the
// same way (Ed25519 over DSSE's pre-authentication encoding is deterministic).
func TestGoldenEnvelopeOpens(t *testing.T) {
	want := goldens()["order"].(Order)
	sealed, err := Seal(goldenKey, TypeOrder, want)
	if err != nil {
		t.Fatal(err)
	}
	raw := golden(t, "envelope", json.RawMessage(sealed))
	got, err := OpenAs[Order](raw, goldenKey.Public().(ed25519.PublicKey), TypeOrder)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("it opens as %+v", got)
	}
}

// golden reads a committed message, compact. It makes a missing one on demand.
func golden(t *testing.T, name string, v any) []byte {
	t.Helper()
	path := filepath.Join(goldenDir, name+".json")
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && os.Getenv("DEIMOS_GOLDEN") == "new" {
		if raw, err = json.MarshalIndent(v, "", "  "); err == nil {
			err = errors.Join(os.MkdirAll(goldenDir, 0o755), os.WriteFile(path, append(raw, '\n'), 0o644))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// plain reads JSON with numbers as they are written.
func plain(t *testing.T, raw []byte) (v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// within wants everything of old in new, in the same place.
func within(t *testing.T, where string, old, now any) {
	t.Helper()
	switch old := old.(type) {
	case map[string]any:
		m, ok := now.(map[string]any)
		if !ok {
			t.Errorf("%s was an object and is written as %v", where, now)
		}
		for k, v := range old {
			if w, ok := m[k]; !ok {
				t.Errorf("%s.%s is not written any more", where, k)
			} else {
				within(t, where+"."+k, v, w)
			}
		}
	case []any:
		l, ok := now.([]any)
		if !ok || len(l) != len(old) {
			t.Errorf("%s was %v and is written as %v", where, old, now)
			return
		}
		for i := range old {
			within(t, where+"[]", old[i], l[i])
		}
	default:
		if !reflect.DeepEqual(old, now) {
			t.Errorf("%s was %v and is written as %v", where, old, now)
		}
	}
}

// TestEveryFieldOfTheProtocolIsInAGoldenMessage: a field that no golden message
// sets could change its name unnoticed.
func TestEveryFieldOfTheProtocolIsInAGoldenMessage(t *testing.T) {
	set := map[string]bool{}
	seen := map[reflect.Type]bool{}
	for _, v := range goldens() {
		note(reflect.ValueOf(v), set, seen)
	}
	for typ := range seen {
		for i := range typ.NumField() {
			if f := typ.Field(i); f.IsExported() && !set[typ.Name()+"."+f.Name] {
				t.Errorf("%s.%s is set in no golden message", typ.Name(), f.Name)
			}
		}
	}
}

func note(v reflect.Value, set map[string]bool, seen map[reflect.Type]bool) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			note(v.Elem(), set, seen)
		}
	case reflect.Slice:
		for i := range v.Len() {
			note(v.Index(i), set, seen)
		}
	case reflect.Map:
		for _, k := range v.MapKeys() {
			note(v.MapIndex(k), set, seen)
		}
	case reflect.Struct:
		if v.Type().PkgPath() != reflect.TypeFor[Order]().PkgPath() {
			return // time.Time
		}
		seen[v.Type()] = true
		for i := range v.NumField() {
			if f := v.Field(i); !f.IsZero() {
				set[v.Type().Name()+"."+v.Type().Field(i).Name] = true
				note(f, set, seen)
			}
		}
	}
}
