package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/hw"
	"github.com/deimos-edge/deimos/internal/cli"
	"github.com/deimos-edge/deimos/internal/proc"
	"github.com/deimos-edge/deimos/test/testbed"
	"github.com/deimos-edge/deimos/wire"
)

// onDevice runs the agent's program beside the agent, as its owner does.
func (d *device) onDevice(args ...string) proc.Result {
	d.f.T.Helper()
	r, err := testbed.RunToEnd(d.f.Ctx, proc.Command{Argv: append([]string{testbed.Program("deimos-agent")}, append(args, "--state", d.state())...)})
	if err != nil {
		d.f.T.Fatal(err)
	}
	return r
}

// TestADeviceTellsOfItself: what it has, how it was, and which one it is.
func TestADeviceTellsOfItself(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(1, false)
	d := f.devices[0]

	var shown struct {
		InventoryDigest string          `json:"inventory_digest"`
		Inventory       json.RawMessage `json:"inventory"`
	}
	f.Until("the coordinator asking what the device has", func() bool {
		f.OK(&shown, "device", "show", string(d.id))
		return shown.InventoryDigest != ""
	})
	var inv hw.Inventory
	if err := json.Unmarshal(shown.Inventory, &inv); err != nil || inv.Digest() != shown.InventoryDigest {
		t.Errorf("the inventory on record has the digest %s, the device said %s (%v)", inv.Digest(), shown.InventoryDigest, err)
	}

	var h wire.History
	f.Until("a first figure in its history", func() bool {
		f.OK(&h, "device", "history", string(d.id), "load1", "--since", "1h")
		return slices.ContainsFunc(h.Series["load1"].Mean, func(v *float64) bool { return v != nil })
	})
	f.Fails(nil, cli.ExitUsage, "device", "history", string(d.id), "--since", "nonsense")

	var s struct {
		Running  bool   `json:"running"`
		Standing string `json:"standing"`
		Machine  struct {
			Online bool `json:"online"`
		} `json:"machine"`
	}
	f.Until("its own status", func() bool { // which is noted a moment later
		r := d.onDevice("status", "-o", "json")
		if err := json.Unmarshal(r.Stdout, &s); err != nil {
			t.Fatalf("its own status: %s (%v)", r.Stdout, err)
		}
		return s.Running && s.Standing == "member" && s.Machine.Online
	})
	if len(inv.LEDs) == 0 { // else it would blink
		if said := f.Fails(nil, cli.ExitFailed, "device", "identify", string(d.id)); !strings.Contains(said, "no light") {
			t.Errorf("identify without a light: %s", said)
		}
	}
}

// TestAKilledAgentIsNoSecret: the next start says what happened to the last, to
// the owner and to the fleet manager.
func TestAKilledAgentIsNoSecret(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(1, false)
	d := f.devices[0]
	killed := func(all []wire.Warning) bool {
		return slices.ContainsFunc(all, func(w wire.Warning) bool { return w.Code == "agent_killed" })
	}
	d.stop()
	d.start()
	d.awaitOnline()
	f.Until("a heartbeat", func() bool { return len(d.now().Telemetry) > 0 })
	if all := d.now().Health; killed(all) {
		t.Errorf("after a stop in good order: %+v", all)
	}
	d.kill()
	d.start()
	f.Until("the warning", func() bool { return killed(d.now().Health) })
	f.Until("the owner reading it", func() bool {
		return bytes.Contains(d.onDevice("status").Stdout, []byte("The agent was killed"))
	})
	var list []api.Device
	f.OK(&list, "device", "list")
	if len(list) != 1 || !killed(list[0].Health) {
		t.Errorf("the list: %+v", list)
	}
}

// TestAServiceManagerIsFed by systemd's protocol, also through the launcher, which
// is the process that systemd knows.
func TestAServiceManagerIsFed(t *testing.T) {
	t.Parallel()
	for _, launched := range []bool{false, true} {
		t.Run(fmt.Sprintf("launched %v", launched), func(t *testing.T) { t.Parallel(); checkFed(t, launched) })
	}
}

func checkFed(t *testing.T, launched bool) {
	f := newFleet(t)
	sock, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: f.Path("notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	var tok api.Token
	f.OK(&tok, "token", "create", "--uses", "1")
	f.token = tok.Token
	lines := make(chan string, 10_000) // read at once: the kernel keeps ten messages for who does not
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := sock.Read(buf)
			if err != nil {
				return // closed with the test
			}
			for line := range strings.Lines(string(buf[:n])) {
				lines <- strings.TrimSpace(line)
			}
		}
	}()
	d := f.add(device{launcher: launched, env: []string{"NOTIFY_SOCKET=" + f.Path("notify"), "WATCHDOG_USEC=2000000"}})
	if launched {
		d.env = append(d.env, "WATCHDOG_PID=1") // any but the agent's
	}
	d.start()
	d.awaitOnline()
	heard := map[string]int{}
	listen := func(want string) {
		t.Helper()
		limit := time.After(testbed.Patience)
		for heard[want] == 0 {
			select {
			case line := <-lines:
				heard[line]++
			case <-limit:
				t.Fatalf("no %s after %v", want, heard)
			}
		}
	}
	listen("READY=1")
	listen("STATUS=online")
	heard["WATCHDOG=1"] = 0
	listen("WATCHDOG=1")
	d.stop()
	if !launched {
		listen("STOPPING=1")
	}
}

// TestAResetDeviceIsANewOne: what it was comes back to nobody.
func TestAResetDeviceIsANewOne(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	f.enrol(1, false)
	d := f.devices[0]
	o := f.Put("kept", []byte(strings.Repeat("chunk ", 10000)), "--replicas", "1")
	old := d.id
	if r := d.onDevice("reset", "--yes"); r.Code == 0 {
		t.Fatal("a device was reset while its agent runs")
	}
	d.stop()
	if r := d.onDevice("reset"); r.Code != cli.ExitUsage {
		t.Fatalf("without --yes: code %d, %s", r.Code, r.Said())
	}
	if r := d.onDevice("reset", "--yes"); r.Code != 0 {
		t.Fatalf("reset: %s", r.Said())
	}
	entries, err := os.ReadDir(d.state())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "agent.lock" && e.Name() != "slots" {
			t.Errorf("%s is left", e.Name())
		}
	}
	var tok api.Token
	f.OK(&tok, "token", "create", "--uses", "1")
	f.token, d.id = tok.Token, ""
	d.start()
	d.awaitOnline()
	if d.id == old {
		t.Error("it is the same device")
	}
	if v := d.now(); v.Used != 0 {
		t.Errorf("it still holds %d bytes of %s", v.Used, o.Name)
	}
}
