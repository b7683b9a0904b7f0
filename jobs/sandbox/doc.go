// Package sandbox runs one WebAssembly module over one input, in a process of
// its own that may do nothing else and is killed when it takes more than it
// was granted.
//
// # Parties
//
//   - The customer's module and its input are hostile.
//   - The worker is a child process: the running executable once more, with
//     the hidden first argument [WorkerArg]. It holds the engine (wazero) and
//     one job, and ends with it. Nothing is reused between jobs but compiled
//     code, see below.
//   - The parent ([Runner]) starts the worker, feeds it, meters it and kills
//     it. It never parses anything the module wrote, and of the worker's own
//     words it reads at most a few lines of JSON.
//
// A child process and not a goroutine, because wazero has no fuel: a deadline
// inside the engine costs 3.5 to 9 times the run time, whereas the kernel can
// stop a process at no cost, meters it exactly, and survives its crash.
//
// # What a module sees
//
// WASI preview 1 (wasi_snapshot_preview1): arguments ("job" first), the environment
// that the order gives, standard input, output and error; its named inputs as /in/NAME, read only; its named
// outputs as /out/NAME, written once from beginning to end. No other file or folder, no socket.
// Both folders are lists of descriptors that the parent opened: there is no
// file system behind them that a path could lead into. Files have a size, and no other property of the real ones.
//
// Beside WASI there is the host interface, deimos_v1 (host.go): progress, checkpoints,
// reads of inputs by name, SHA-256 and messages.
//
// Unless the job is live, both
// clocks are one fake that starts at a fixed time, steps 1 µs with each reading
// and jumps over every sleep; random bytes come from a fixed seed, and input
// arrives in reads as long as the module asks for: the same module, arguments
// and input give the same output on every device. The exception is the bit
// pattern of a NaN, which differs between processors. On 32-bit ARM wazero interprets, 60 to
// 75 times slower, with the same results.
//
// # Descriptors of the worker
//
//	0  task, then input    4 bytes of length (big endian), that much JSON, the input
//	1  output              as the module writes it
//	2  errors              the module's, and the Go runtime's last words
//	3  module              opened by the parent; the worker needs no path
//	4  events              JSON lines from the worker: walls, engine, progress and messages, how it ended
//	5  control             a page of memory that the parent writes: 1 asks for a checkpoint
//	6  checkpoints         each with its length in front, as the task
//	7  answers             a byte for each checkpoint
//	8… files               the checkpoint to go on from, the inputs, a pipe for each output
//
// # Standing still
//
// A job is suspended by stopping its process ([Control]); its wall time does not pass
// meanwhile. The owner's share of CPU is kept by stopping it a part of each second.
// A module is asked for a checkpoint first, which is durable when its call returns; a
// later run gets it. What that one wrote is not kept: outputs begin anew.
//
// # Bounds
//
//	memory   linear memory: a mapping of exactly the limit, whose refusals are
//	         noted; everything else (call stack, tables, engine) together:
//	         RLIMIT_DATA, [engineAllowance] above the limit. There the Go runtime
//	         crashes; now and then it does not say that memory was the reason,
//	         and the job ends as [WorkerFailed] instead of [LimitMemory]
//	         While it compiles: [Spec.CompileBytes], and [LimitMemory] too
//	CPU      the parent reads the child's process clock and kills; RLIMIT_CPU,
//	         set by the child, stands behind it; compiling counts
//	threads  64, with a cgroup
//	wall     the parent kills; starting and compiling count
//	output   of standard output and all named ones together: the parent stops reading and
//	         kills; standard error: 1 MiB alike
//	module   32 MiB; standard input 4 MiB; 32 named inputs of any size, 16 outputs
//	words    1 KiB a message and 64 KiB of them, 1,000 steps of progress; the rest is left out
//	checkpoint 64 MiB, and 128 MiB of them at once; beyond that 256 KiB a second: who writes
//	         more waits, as each wears the disk out
//
// The worker also has an empty environment, "/" as its directory, no inherited
// descriptor beyond these, no core dumps, no_new_privs, is not dumpable (its
// neighbours cannot trace it), offers itself first to the OOM killer, and leads
// a process group that is killed as a whole. It dies with its parent
// (PR_SET_PDEATHSIG). Before the module's first instruction it gives up opening
// descriptors (RLIMIT_NOFILE 0) and writing files (RLIMIT_FSIZE 0).
//
// # Walls
//
// Should a module break the engine, it is still in a process that the kernel holds.
// What follows stands before the worker reads a byte of the module, as parsing and
// compiling it are attacked as well, and denies more once that is done:
//
//	privileges  none: the parent's thread gives up its capabilities before it
//	            starts the worker, which no_new_privs keeps from having any. A
//	            worker of root cannot raise a limit again either
//	landlock    no file can be opened but in the module's own folder of compiled
//	            code; no TCP, no abstract socket and no signal to anybody
//	            else, as far as this kernel's Landlock goes
//	seccomp     an allow-list of system calls, which first has what the Go runtime,
//	            the compiler and its cache need. Before the module's first
//	            instruction a second one takes away opening files, limits and making
//	            more machine code. Any other call ends the job as [Breakout]
//
// A third wall is the parent's: a cgroup (version 2) for each worker, which it is put into
// before it has its task ([Cgroups]). It counts what no rlimit does: shared memory, what the
// kernel keeps on the worker's account, threads; there is no swap in it. It keeps the
// owner's share of CPU without letting the job stand still, all jobs together leave a
// quarter of the machine's memory alone, and it ends with everything in it, also what an
// agent that was killed has left. It takes the controllers of memory and processes, and
// a place that nobody else uses; where that is missing, all else holds as before.
//
// [Result.Walls] says which stood around a job, [Runner.Walls] which there are here. A
// kernel that has none still runs jobs, and the device says so, for who places
// work to judge.
//
// # Compiled code
//
// Compiling a Go module takes about a second, so machine code is kept below
// [Spec.CacheDir] in one directory a module, named by the module's SHA-256, so
// that Landlock can give a worker its own module's and no other. The worker
// writes it before the module runs, and can write nothing after. The least
// recently used are deleted beyond [Runner.CacheBytes], and what a killed worker left half
// written after an hour. An entry that does not load is deleted and compiled anew.
package sandbox
