/* deimos.h: the host interface "deimos", version 1, for guests in C.
 *
 * A guest is a WASI preview 1 command. Beside WASI, which gives it arguments,
 * standard input and output and the files /in/NAME and /out/NAME, a device
 * offers the functions below as imports of the module "deimos_v1". They never
 * change: what is added later gets a module of its own, "deimos_v2". A guest
 * that imports them does not start on a device whose heartbeat says
 * "host": 0 (docs/guests.md); one that calls none of them imports none and runs
 * anywhere.
 *
 *     clang --target=wasm32-wasi -O2 -Ijobs/guests/include -o mine.wasm mine.c
 *
 * Compiled for anything but WebAssembly, or with DEIMOS_NO_HOST defined, the
 * same calls do what a host without any work to save would: progress and logs
 * go nowhere, there is no checkpoint, inputs are files below ./in or /in.
 * deimos_sha256 is not declared then, as there is nobody to compute it.
 *
 * Numbers are in host byte order, texts are UTF-8 without a final 0. Nothing
 * here keeps a pointer after it returns. A pointer that does not lie inside the
 * guest's memory ends the job.
 */
#ifndef DEIMOS_H
#define DEIMOS_H

#include <stddef.h>
#include <stdint.h>

#define DEIMOS_VERSION 1

/* Most bytes of a checkpoint. */
#define DEIMOS_MAX_CHECKPOINT (64 << 20)

/* Levels of deimos_log. */
enum deimos_level {
	DEIMOS_DEBUG = 0,
	DEIMOS_INFO = 1,
	DEIMOS_WARNING = 2,
	DEIMOS_ERROR = 3
};

/* What deimos_checkpoint and deimos_restore return beside what is said there. */
#define DEIMOS_OK 0
#define DEIMOS_NONE (-1)

#if defined(__wasm__) && !defined(DEIMOS_NO_HOST)

#define DEIMOS_IMPORT(name) \
	__attribute__((import_module("deimos_v1"), import_name(name)))

/* Says how far the job is, in thousandths of all its work, 0 to 1000. Cheap, but
 * not free: call it a few times a second of work, not in an inner loop. */
DEIMOS_IMPORT("progress")
void deimos_progress(int32_t permille);

/* Keeps len bytes at state in place of the former checkpoint. They are durable on
 * this device when it returns 0. A job that was interrupted begins again from main,
 * with the same arguments and inputs, and finds them by deimos_restore. Otherwise a
 * WASI errno, and the former checkpoint still stands. */
DEIMOS_IMPORT("checkpoint")
int32_t deimos_checkpoint(const void *state, size_t len);

/* Length in bytes of the newest checkpoint, which is copied to state if it is not
 * longer than cap; DEIMOS_NONE if there is none. To learn the length, pass 0 and 0. */
DEIMOS_IMPORT("restore")
int32_t deimos_restore(void *state, size_t cap);

/* 1 if this job is about to be stopped, by its owner's policy or because the agent
 * ends: what is not in a checkpoint within seconds is lost. Otherwise 0. */
DEIMOS_IMPORT("should_checkpoint")
int32_t deimos_should_checkpoint(void);

/* Bytes of the input that the order names so; -1 if it names none so. */
DEIMOS_IMPORT("input_size")
int64_t deimos_input_size(const char *name, size_t name_len);

/* Reads up to len bytes at off of an input to buf: how many it were, 0 at the end,
 * -1 if there is no such input or it cannot be read. */
DEIMOS_IMPORT("input_read")
int32_t deimos_input_read(const char *name, size_t name_len, int64_t off, void *buf, size_t len);

/* The SHA-256 of len bytes at data, 32 bytes to digest, at the processor's own speed. */
DEIMOS_IMPORT("sha256")
void deimos_sha256(const void *data, size_t len, uint8_t digest[32]);

/* A line for the owner's log, without a newline. The device cuts what is too long and
 * leaves out what is too much. */
DEIMOS_IMPORT("log")
void deimos_log(enum deimos_level level, const char *text, size_t len);

#undef DEIMOS_IMPORT

#else /* there is no such host */

#include <stdio.h>

static inline void deimos_progress(int32_t permille) { (void)permille; }

static inline int32_t deimos_checkpoint(const void *state, size_t len)
{
	(void)state, (void)len;
	return DEIMOS_OK;
}

static inline int32_t deimos_restore(void *state, size_t cap)
{
	(void)state, (void)cap;
	return DEIMOS_NONE;
}

static inline int32_t deimos_should_checkpoint(void) { return 0; }

static inline FILE *deimos_input_file(const char *name, size_t name_len)
{
	char path[80];
	if (name_len > 64)
		return NULL;
#ifdef __wasm__
	snprintf(path, sizeof path, "/in/%.*s", (int)name_len, name);
#else
	snprintf(path, sizeof path, "in/%.*s", (int)name_len, name);
#endif
	return fopen(path, "rb");
}

static inline int64_t deimos_input_size(const char *name, size_t name_len)
{
	FILE *f = deimos_input_file(name, name_len);
	long size = -1;
	if (f == NULL)
		return -1;
	if (fseek(f, 0, SEEK_END) == 0)
		size = ftell(f);
	fclose(f);
	return size;
}

static inline int32_t deimos_input_read(const char *name, size_t name_len, int64_t off, void *buf, size_t len)
{
	FILE *f = deimos_input_file(name, name_len);
	int32_t n = -1;
	if (f == NULL)
		return -1;
	if (len > INT32_MAX)
		len = INT32_MAX;
	if (fseek(f, (long)off, SEEK_SET) == 0) {
		n = (int32_t)fread(buf, 1, len, f);
		if (ferror(f))
			n = -1;
	}
	fclose(f);
	return n;
}

static inline void deimos_log(enum deimos_level level, const char *text, size_t len)
{
	(void)level, (void)text, (void)len;
}

#endif
#endif
