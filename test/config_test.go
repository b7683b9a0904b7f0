package test

import (
	"strings"
	"testing"

	"github.com/deimos-edge/deimos/coordinator/api"
	"github.com/deimos-edge/deimos/wire"
)

// TestConfiguration goes from an operator's command to a real agent and back:
// while it runs, across its death, and while it is away.
func TestConfiguration(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	owner := f.Write("agent.toml", []byte("[jobs]\nmax_memory_bytes = 268435456\n"))
	f.enrol(1, false, "--config", owner)
	d := f.devices[0]

	if said := f.Fails(nil, 1, "config", "set", "--all", "beat.second=5"); !strings.Contains(said, "beat.seconds") {
		t.Errorf("a misspelt key: %s", said)
	}
	f.OK(nil, "config", "set", "--all", "beat.seconds=60", "log.level=debug")
	f.OK(nil, "config", "set", "--group", "test", "beat.seconds=5", "jobs.enabled=false", "jobs.max_memory_bytes=1GiB")
	c := d.awaitConfig(api.ConfigPartly, map[string]string{wire.SettingBeat: "5", wire.SettingLogLevel: `"debug"`, wire.SettingJobs: "false", wire.SettingJobMemory: "268435456"})
	if r := c.Reported.Refused[wire.SettingJobMemory]; r.Code != wire.CodePolicy || !strings.Contains(r.Reason, "268435456") {
		t.Errorf("the owner's limit: %+v", c.Reported.Refused)
	}

	// Killed, it comes back with what it had; the refusal stands.
	d.kill()
	d.start()
	d.awaitOnline()
	f.OK(nil, "config", "unset", "--all", "log.level")
	d.awaitConfig(api.ConfigPartly, map[string]string{wire.SettingBeat: "5", wire.SettingLogLevel: `"info"`, wire.SettingJobs: "false"})

	// Away, it misses three versions and gets the last.
	d.stop()
	for _, memory := range []string{"64MiB", "100MiB", "128MiB"} {
		f.OK(nil, "config", "set", "--device", string(d.id), "jobs.max_memory_bytes="+memory, "jobs.enabled=true")
	}
	if s := d.config().State; s != api.ConfigWaiting {
		t.Errorf("a device that is away is %s", s)
	}
	d.start()
	d.awaitOnline()
	d.awaitConfig(api.ConfigApplied, map[string]string{wire.SettingBeat: "5", wire.SettingJobs: "true", wire.SettingJobMemory: "134217728"})
	f.OK(nil, "config", "list")
	f.OK(nil, "config", "keys")
	f.OK(nil, "config", "show", "--group", "test")
}

func (d *device) config() (c api.DeviceConfig) {
	d.f.T.Helper()
	d.f.OK(&c, "config", "show", "--device", string(d.id))
	return c
}

// awaitConfig waits until the device reports these values of the wanted version.
func (d *device) awaitConfig(state api.ConfigState, running map[string]string) (c api.DeviceConfig) {
	d.f.T.Helper()
	d.f.Until(d.name+" running its configuration", func() bool {
		c = d.config()
		if c.State != state || c.Reported == nil || c.Reported.Version != c.Wanted {
			return false
		}
		for k, v := range running {
			if string(c.Reported.Running[k]) != v {
				return false
			}
		}
		return true
	})
	return c
}
