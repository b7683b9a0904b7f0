package agent

import (
	"os"
	"path/filepath"
	"testing"
)

func TestStatusTellsHowADeviceStands(t *testing.T) {
	ca, id := newAuthority(t), newIdentity(t)
	state := t.TempDir()
	if s, err := ReadStatus(state); err != nil || s != (Status{Standing: New}) {
		t.Errorf("before the first start: %+v %v", s, err)
	}
	if left := must(os.ReadDir(state)); len(left) != 0 {
		t.Errorf("it made %v", left)
	}
	if _, err := ReadStatus(filepath.Join(state, "none")); err == nil {
		t.Error("a folder that is not there has a status")
	}
	dir := filepath.Join(state, "identity")
	if err := makeKey(dir, filepath.Join(dir, keyFile)); err != nil {
		t.Fatal(err)
	}
	id = must(LoadIdentity(dir))
	if s, err := ReadStatus(state); err != nil || s != (Status{Device: id.ID, Standing: New}) {
		t.Errorf("with a key: %+v %v", s, err)
	}
	p := pending{"https://c:1", ca.pem()}
	if err := p.save(dir); err != nil {
		t.Fatal(err)
	}
	if s, err := ReadStatus(state); err != nil || s != (Status{Device: id.ID, Standing: Waiting, Coordinator: "https://c:1", ClaimCode: code(id, ca.cert)}) {
		t.Errorf("while it waits: %+v %v", s, err)
	}
	m := &Membership{Coordinator: "https://c:2", EnrolReply: ca.reply(id)}
	if err := m.save(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(state, trafficFile), []byte(`{"month":"2026-11","bytes":7,"ahead":0,"limits":{"hours":"22:00-06:00"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := ReadStatus(state)
	if s.Line == nil || s.Line.Bytes != 7 || s.Line.Limits.Hours.String() != "22:00-06:00" || s.Line.Left != nil {
		t.Errorf("its line: %+v", s.Line)
	}
	if err != nil || s.Standing != Member || s.Coordinator != "https://c:2" || s.ClaimCode != "" || s.Until == nil || !s.Until.Equal(m.ends()) {
		t.Errorf("as a member: %+v %v", s, err)
	}
}
