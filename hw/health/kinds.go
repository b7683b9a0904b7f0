package health

import (
	"time"

	"github.com/deimos-edge/deimos/wire"
)

// The codes of this version. What an owner reads of each stands in kinds. The
// subject of each is a disk (see [Subject]), unless said otherwise.
const (
	DiskFailing        Code = "disk_failing"
	DiskWearing        Code = "disk_wearing"
	DiskSlow           Code = "disk_slow"
	DiskHung           Code = "disk_hung"
	DiskGone           Code = "disk_gone"
	DiskErrors         Code = "disk_errors"
	DiskCable          Code = "disk_cable"
	DiskRefused        Code = "disk_refused"         // self-test failed, or foreign data; of a disk or a folder on it
	ScrubLate          Code = "scrub_late"           // its chunks were not all verified in time; of the volume's folder
	VolumeFailed       Code = "volume_failed"        // its chunks cannot be reached; of the volume's folder
	FilesystemFull     Code = "filesystem_full"      // of a mount point
	FilesystemReadOnly Code = "filesystem_read_only" // of a mount point
	Overheating        Code = "overheating"          // of a sensor or a disk
	Throttled          Code = "throttled"            // no subject
	MemoryPressure     Code = "memory_pressure"      // no subject
	UnderVoltage       Code = "under_voltage"        // no subject
	SensorSilent       Code = "sensor_silent"        // of a declared sensor
	ClockUntrusted     Code = "clock_untrusted"      // no subject
	ClockBattery       Code = "clock_battery"        // no subject
	Offline            Code = "offline"              // no subject
	CoordinatorRefuses Code = "coordinator_refuses"  // no subject
	UpdateWaiting      Code = "update_waiting"       // no subject
	UnsafeShutdown     Code = "unsafe_shutdown"      // no subject, or a disk that has counted one
	AgentKilled        Code = "agent_killed"         // no subject
	WatchdogFired      Code = "watchdog_fired"       // no subject
	Stalled            Code = "stalled"              // a loop of the agent makes no progress; its name
)

// kinds is every warning there is, in the order in which those of one severity are shown.
var kinds = []Kind{
	{DiskGone, wire.Trouble, "A disk is gone",
		"Check its power and its cable, then restart the device. If you took it out on purpose, there is nothing to do: it is forgotten after a week, or after 30 days if it held chunks.",
		0, 0, []Code{DiskHung, DiskFailing, DiskErrors, DiskCable, DiskSlow, DiskWearing, DiskRefused, VolumeFailed, ScrubLate, FilesystemReadOnly, FilesystemFull}},
	{DiskHung, wire.Critical, "A disk does not answer",
		"Restart the device. If it happens again, replace the cable, then the disk.",
		0, 5 * time.Minute, []Code{DiskSlow, VolumeFailed, ScrubLate}},
	{DiskFailing, wire.Critical, "A disk is failing",
		"Copy what matters to you off this disk, and replace it soon.",
		0, time.Hour, []Code{DiskErrors, DiskSlow}},
	{VolumeFailed, wire.Critical, "A volume cannot be used",
		"Check that its disk is there and mounted, and look into the agent's log.",
		time.Minute, 0, []Code{ScrubLate}},
	{FilesystemReadOnly, wire.Critical, "A filesystem has become read-only",
		"The kernel does this when a disk returns errors. Look into the kernel's log (dmesg), check the disk, repair the filesystem and restart.",
		time.Minute, 0, []Code{VolumeFailed}},
	{DiskErrors, wire.Trouble, "A disk returns errors",
		"Look into the kernel's log (dmesg). Check cable and power; if it goes on, replace the disk.",
		0, time.Hour, []Code{DiskSlow}},
	{DiskCable, wire.Trouble, "A disk's cable is bad",
		"Replace the cable, or use another port.",
		0, time.Hour, nil},
	{DiskSlow, wire.Trouble, "A disk has become slow",
		"If nothing else is busy on this disk, it may be about to fail: watch it, check its cable, have a replacement ready.",
		2 * time.Minute, 10 * time.Minute, nil},
	{DiskWearing, wire.Trouble, "A disk wears out",
		"Plan its replacement. Until then, what writes to it less makes it last longer.",
		0, time.Hour, nil},
	{DiskRefused, wire.Trouble, "A disk is not used",
		"deimos-agent disks shows each disk, the reason, and what would change it.",
		time.Minute, 0, nil},
	{ScrubLate, wire.Trouble, "Chunks wait to be verified",
		"It reads on at once and catches up by itself. If this stays for days, the disk is too slow, or [scrub] in the agent's file asks for too much.",
		time.Hour, 0, nil},
	{FilesystemFull, wire.Trouble, "A filesystem is nearly full",
		"Remove what is not needed. Chunks do not grow beyond their floor; something else has taken the space.",
		time.Minute, 5 * time.Minute, nil},
	{Overheating, wire.Trouble, "It is too hot",
		"Check the fan and the air around the device, remove dust, and keep it out of the sun.",
		time.Minute, 5 * time.Minute, []Code{Throttled}},
	{UnderVoltage, wire.Trouble, "The power supply is too weak",
		"Use the power supply made for this board and a short, thick cable. Data can be lost otherwise.",
		0, time.Hour, []Code{Throttled}},
	{Throttled, wire.Trouble, "The processor is slowed down",
		"Check cooling and power supply.",
		2 * time.Minute, 10 * time.Minute, nil},
	{MemoryPressure, wire.Trouble, "Memory is short",
		"Stop other programs on this device, or allow jobs less memory.",
		time.Minute, 5 * time.Minute, nil},
	{Stalled, wire.Critical, "A part of the agent is stuck",
		"It is started anew by itself, where a watchdog is set up. If this stays, restart the agent and report it with its log.",
		0, time.Minute, nil},
	{CoordinatorRefuses, wire.Critical, "The coordinator refuses this device",
		"Ask your fleet manager whether it was retired, or join again.",
		time.Minute, 0, []Code{Offline}}, // who was sent away is offline for that reason
	{Offline, wire.Trouble, "The coordinator cannot be reached",
		"Check network and power of your router. The device goes on with what it has and reports later.",
		2 * time.Minute, 30 * time.Second, []Code{ClockUntrusted}},
	{ClockUntrusted, wire.Trouble, "The clock cannot be trusted",
		"Connect the device to a network with a time server. Until then it takes the coordinator's time.",
		5 * time.Minute, 0, nil},
	{SensorSilent, wire.Trouble, "A sensor does not answer",
		"Check its wires and its address, or remove it from the configuration.",
		5 * time.Minute, 5 * time.Minute, nil},
	{WatchdogFired, wire.Trouble, "The watchdog has restarted the machine",
		"The machine had stopped. Once is no harm; if it returns, look at power, heat and memory. Shown for a day.",
		0, 0, []Code{UnsafeShutdown}},
	{UnsafeShutdown, wire.Trouble, "The power was cut",
		"Nothing that was acknowledged is lost. If you did not pull the plug, check the power supply. Shown for a day.",
		0, 0, nil},
	{AgentKilled, wire.Info, "The agent was killed",
		"Often the system does this when memory runs out: look into its log (journalctl -k). Shown for a day.",
		0, 0, nil},
	{ClockBattery, wire.Info, "The clock's battery is empty",
		"Replace it, or fit one. Without it the time is wrong after each start until the network has told it.",
		0, 0, nil},
	{UpdateWaiting, wire.Info, "An update waits",
		"Nothing: it is installed by itself. If this stays for days, look into the agent's log.",
		time.Hour, 0, nil},
}

var (
	byCode = map[Code]Kind{}
	order  = map[Code]int{}
)

func init() {
	for i, k := range kinds {
		byCode[k.Code], order[k.Code] = k, i
	}
}

// kindOf makes one up for a code that is not known: a mistake of ours must not
// hide what is wrong, nor stop the agent.
func kindOf(c Code) Kind {
	if k, ok := byCode[c]; ok {
		return k
	}
	return Kind{Code: c, Severity: wire.Trouble, Title: string(c)}
}
