// Package qemu is the tests of the image: what "make image" builds, run as a
// virtual machine (packaging/qemu), with a coordinator as users start it, and the
// command line as they type it. "make qemu-test" runs them and names the image in
// DEIMOS_QEMU_IMAGE; without that there are no tests here.
//
// Each file is one kind of claim:
//
//   - life_test.go: a device from power-on to power-off: how soon it is online,
//     that it stores, proves and computes, what it is after a power cut, what the
//     power button does, that its console keeps secrets;
//   - jobs_test.go: a job that the power is cut in the middle of;
//   - sandbox_test.go: the tests of the sandbox that need a kernel of their own;
//   - update_test.go: new firmware, one that works and one that does not;
//   - watchdog_test.go: a firmware that is on nobody's trial, whose agent hangs;
//   - config_test.go: deimos.toml on the ESP, as a person edits it;
//   - lan_test.go: a device without any configuration, on a network of its own;
//   - device_test.go: a machine with its disk, and how one is watched.
//
// No machine outlives its test: test/testbed tells how that is kept. The consoles of a
// failed test's machines are printed. Machines run one after the other: two would
// only take each other's cores.
//
// Not here: power cuts at every moment of the disk (test/powercut), real boards,
// UEFI other than QEMU's.
package qemu
