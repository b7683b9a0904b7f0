package health

// The codes of this version. What an owner reads of each stands in kinds.
const (
	DiskFailing        Code = "disk_failing"
	DiskWearing        Code = "disk_wearing"
	DiskSlow           Code = "disk_slow"
	DiskHung           Code = "disk_hung"
	DiskGone           Code = "disk_gone"
	DiskRefused        Code = "disk_refused"  // self-test failed, or foreign data
	VolumeFailed       Code = "volume_failed" // its chunks cannot be reached
	FilesystemFull     Code = "filesystem_full"
	FilesystemReadOnly Code = "filesystem_read_only"
	Overheating        Code = "overheating"
	Throttled          Code = "throttled"
	MemoryPressure     Code = "memory_pressure"
	UnderVoltage       Code = "under_voltage"
	SensorSilent       Code = "sensor_silent"
	ClockUntrusted     Code = "clock_untrusted"
	ClockBattery       Code = "clock_battery"
	Offline            Code = "offline"
	CoordinatorRefuses Code = "coordinator_refuses"
	UpdateWaiting      Code = "update_waiting"
	UnsafeShutdown     Code = "unsafe_shutdown"
	WatchdogFired      Code = "watchdog_fired"
	Stalled            Code = "stalled" // a loop of the agent makes no progress
)
