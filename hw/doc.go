// Package hw tells what this machine has ([Probe]) and how it feels ([Sampler]).
//
// # What is promised
//
//   - A probe ends. Hardware hangs: a dying disk keeps a read in the kernel for
//     minutes, and no signal gets it out. So every reading that touches a device
//     runs in a goroutine of its own, is waited for within a limit, and is left
//     behind when the limit passes. What was left behind is remembered: the same
//     thing is not asked again until it has answered, so that a daemon that
//     probes for months holds one stuck thread for it and not thousands.
//   - A probe never fails as a whole. What could not be read is a [Note] that
//     says what is missing, why, and what to do about it.
//   - A probe does not disturb. It writes nothing, opens no device for writing
//     that is not a bus made for it, maps no registers (of periph only the drivers
//     that go through the kernel are linked, not those that map /dev/mem), and wakes no disk:
//     health is read only from disks that are known to be awake.
//   - Numbers are believable or absent. A temperature of 200 °C or a negative
//     counter is dropped, with a note.
//   - Texts are printable. A USB stick chooses its own model name; what a
//     terminal could take for a command is removed where it is read.
//
// # Where it comes from
//
// Linux only. Kernel interfaces are read below a root directory ("/", or a
// recorded machine):
//
//	disks, partitions   /sys/block             Documentation/ABI/stable/sysfs-block
//	health              SMART, NVMe log page 2 github.com/anatol/smart.go
//	                    eMMC life time         JESD84-B51, device/life_time
//	filesystems         /proc/self/mountinfo   proc(5), statfs(2)
//	network             /sys/class/net         Documentation/ABI/testing/sysfs-class-net
//	sensors             /sys/class/hwmon       Documentation/hwmon/sysfs-interface
//	                    /sys/class/thermal     Documentation/driver-api/thermal/sysfs-api
//	LEDs                /sys/class/leds        Documentation/ABI/testing/sysfs-class-led
//	buses, GPIO         /sys/bus, /dev         and periph.io/x/host
//	processor, memory   /proc                  github.com/shirou/gopsutil
//
// Sensors and LEDs are not read through gopsutil or periph, for a reason each: gopsutil
// leaves thermal zones out as soon as there is any hwmon chip, and gives two
// disks' sensors one name; both block on a sensor that hangs; periph guesses
// the unit from the size of the number; neither can read a recorded machine.
// gopsutil's list of mounts is not used either: it is that of process 1, which
// in a service with a mount namespace is not ours.
//
// # Disks that sleep
//
// Health is read from a disk only if it is awake: the kernel's runtime power
// state says active, and, if the disk has a spindle, the disk itself answers
// CHECK POWER MODE, which does not spin it up. A disk that cannot be asked (behind a USB
// bridge) is left alone. For the same reason the drivetemp chip of hwmon is not read.
//
// # The inventory's format
//
// [Inventory] is the format, field by field, in JSON. Sizes are bytes,
// temperatures °C, times RFC 3339. [Inventory.Digest] is a hash over what
// changes only if the machine changes, so that only changes need to travel.
//
// # Not done yet
//
// Drivers for sensors on I²C and 1-wire; health as warnings with severity;
// watchdog, TPM and RTC; LED patterns; rings of telemetry; SMART behind USB bridges.
package hw
