package qemu

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/deimos-edge/deimos/packaging/qemu"
	"github.com/deimos-edge/deimos/test/testbed"
)

// handedOver is the timeout with which an agent is handed the machine's watchdog.
const handedOver = 5 * time.Minute

// TestAMachineWhoseAgentHangsIsReset runs a firmware that is on nobody's trial, as it is
// the only one. Its agent hangs before it has armed the machine's watchdog.
func TestAMachineWhoseAgentHangsIsReset(t *testing.T) {
	hangs := os.Getenv("DEIMOS_QEMU_HANG")
	if hangs == "" {
		t.Skip("takes minutes; make qemu-hang runs it")
	}
	f := newFleet(t)
	d := newDevice(f)
	if err := os.Remove(d.disk()); err != nil {
		t.Fatal(err)
	}
	version := testbed.VersionOf(t, brokenAgent)
	if err := qemu.CopyDisk(hangs, d.disk(), diskSize); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf("coordinator = %q\n", address(f))
	d.options.Config = f.Write("config.toml", []byte(config))
	starts := "deimos-agent " + version + ": starting"

	d.powerOn()
	d.await("the machine's watchdog is armed")
	d.await(starts)
	began := time.Now()
	ctx, cancel := context.WithTimeout(f.Ctx, handedOver+bootLimit)
	defer cancel()
	if _, err := d.machine.Await(ctx, "Deimos starts", 2); err != nil {
		t.Fatal(err)
	}
	t.Logf("started anew %s after its agent was", time.Since(began).Round(time.Second))
	if said := d.console(); strings.Contains(said, "the machine is started anew") || strings.Contains(said, "Kernel panic") {
		t.Error("something else than the watchdog has started the machine anew")
	}
	if _, err := d.machine.Await(ctx, starts, 2); err != nil {
		t.Fatal(err)
	}
	d.powerOff()
	if strings.Count(d.console(), "Deimos starts") != 2 {
		t.Error("the machine was not switched off, but reset")
	}

	d.options.Config = f.Write("config.toml", []byte("watchdog = \"\"\n"+config))
	d.powerOn()
	d.await("the machine's watchdog is disarmed")
	d.await(starts)
}
