// Package test is the tests of the whole: a coordinator, devices and the
// command line as processes, the binaries that users start; test/testbed finds
// and starts them.
//
// Each file is one kind of claim:
//
//   - line_test.go: what a fleet is for, from enrolment to a rolled-back update,
//     on the embedded NATS and on a stock nats-server;
//   - attack_test.go: what somebody with the broker in hand can send to a
//     device, and what a device with a good key can tell the coordinator;
//   - crash_test.go: agents and the coordinator killed in the middle of work;
//   - chaos_test.go: twenty devices in a storm of kills and bad lines, at the end
//     of which every effect stands once; CHAOS=30m makes it longer;
//   - kill_test.go: agents killed in the middle of each kind of work with chunks, and
//     what they signed for afterwards; KILLS=200 makes it longer;
//   - job_resume_test.go: an agent killed in the middle of a job, without a coordinator,
//     and while its owner has paused it;
//   - storage_fleet_test.go: devices destroyed, a disk that lies, a slow one, and all
//     files back; FLEET=2048 makes it as large in MiB;
//   - campaign_test.go: a release on its way to simulated devices, some of which fail or
//     fall silent; CAMPAIGN=1000 makes the fleet larger;
//   - members_test.go: who gets in, who is sent away, who may give orders, and
//     the life of an order, as the command line shows it;
//   - fault_test.go: what goes wrong at users' and owners' hands, and the
//     sentence and the exit code that they get for it.
//
// fleet_test.go starts and ends a fleet. No process outlives its test, as
// test/testbed has it. Tests wait for events or poll with a deadline; where chance has a part, the seed is logged, and
// DEIMOS_TEST_SEED repeats it. A negative ("nothing happened") is followed by a
// fence: a valid order that succeeds, after which there is nothing to wait for.
//
// Not here: the image of a device (test/qemu has it), power cuts, real boards.
package test
