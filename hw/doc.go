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
//     that is not a bus made for it, no watchdog (that would arm it) and no TPM, maps no registers (of periph only the drivers
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
//	clocks              /sys/class/rtc         Documentation/ABI/testing/sysfs-class-rtc
//	TPMs                /sys/class/tpm         Documentation/ABI/stable/sysfs-class-tpm
//	watchdogs           /sys/class/watchdog    Documentation/ABI/testing/sysfs-class-watchdog
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
// state says active, and, if the disk has a spindle or is behind USB, where one
// cannot tell, the disk itself answers CHECK POWER MODE, which does not spin it
// up. One that does not answer (many bridges pass no ATA commands on) is left
// alone, and USB sticks and card readers are not even asked. For the same reason
// the drivetemp chip of hwmon is not read.
//
// # The inventory's format
//
// [Inventory] is the format, field by field, in JSON. Sizes are bytes,
// temperatures °C, times RFC 3339. [Inventory.Digest] is a hash over what
// changes only if the machine changes, so that only changes need to travel.
// inventory.schema.json and docs/inventory.md are made from the types and their
// comments by a test, which fails if they are behind.
//
// # Recorded machines
//
// [Record] keeps what a probe has read as a directory, which [Probe] takes for
// the root of that machine: see recordFormat. Those of testdata were made with
// it, but for the Raspberry Pi's, which is hand-made and says so.
//
// # Not done yet
//
// SMART of disks behind USB is read without the drive database, so that what
// they have written and how worn they are is not known; RAID controllers that hide their disks; the sizes of
// filesystems and addresses in recorded machines.
package hw
