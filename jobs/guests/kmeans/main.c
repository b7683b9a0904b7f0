/* kmeans is a guest that finds k clusters of points: Lloyd's algorithm from seeds by
 * k-means++ (Arthur and Vassilvitskii, 2007).
 *
 *     kmeans -k K [-seed N] [-iterations N] [-f32 D] [-header] [-in NAME] [-out NAME] [-checkpoint N]
 *
 * The input (-in; otherwise standard input) is CSV, a point a line, numbers alone, -header
 * if its first line is none; or with -f32 D, points of D little-endian float32 each, one
 * after the other. It prints one line of JSON:
 *
 *     {"k":2,"points":4,"dimensions":1,"iterations":2,"converged":true,"inertia":1,
 *      "clusters":[{"count":2,"centroid":[0.5]},{"count":2,"centroid":[9.5]}]}
 *
 * inertia is the sum of the squares of the distances to the nearest centroid. At most
 * -iterations (100) are done; it has converged once a further one would change nothing.
 * The same input, k and -seed (0) give the same bytes on every processor: float32 and
 * float64 with +, -, * and / alone, each sum in one order, nothing fused, and no value from
 * which a NaN or an infinity could come.
 *
 * After every iteration (-checkpoint N: every Nth) what is needed to go on is kept by the
 * device; a job that was interrupted goes on from there and ends with the same bytes.
 *
 * The vectors below are those of the compiler, so that it also builds natively; with
 * KMEANS_SCALAR there are none, and the result is the same.
 */
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "deimos.h"

enum {
	MAX_K = 65535,
	MAX_DIMENSIONS = 4096,
	MAX_FIELD = 63, /* bytes of a number in CSV */
	LANES = 4,      /* centroids that are measured at once */
	BLOCK = 4,      /* points, too */
};

/* The greatest coordinate: MAX_DIMENSIONS squares of twice this fit a float. */
static const float MAX_VALUE = 1e15f;

static _Noreturn void fail(const char *format, ...)
{
	va_list args;
	fputs("kmeans: ", stderr);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(1);
}

static void *allocate(size_t count, size_t size)
{
	void *p = size == 0 || count <= SIZE_MAX / size ? calloc(count ? count : 1, size ? size : 1) : NULL;
	if (p == NULL)
		fail("there is not enough memory for this input; raise memory_bytes or use a smaller input");
	return p;
}

/* --- The order ------------------------------------------------------------ */

struct order {
	uint32_t k, iterations, every, dimensions; /* dimensions: 0 for CSV */
	uint64_t seed;
	bool header;
	const char *in, *out; /* NULL: the standard ones */
};

static uint64_t number(const char *flag, const char *text, uint64_t least, uint64_t most)
{
	uint64_t n = 0;
	const char *p = text;
	for (; *p >= '0' && *p <= '9'; p++) {
		if (n > (UINT64_MAX - 9) / 10)
			break;
		n = n * 10 + (uint64_t)(*p - '0');
	}
	if (p == text || *p != 0 || n < least || n > most)
		fail("%s \"%.30s\" is no number between %llu and %llu", flag, text, (unsigned long long)least, (unsigned long long)most);
	return n;
}

static const char *name_of(const char *flag, const char *text)
{
	if (*text == 0 || strlen(text) > 64 || strchr(text, '/') != NULL)
		fail("%s \"%.80s\" is no name of an input or output", flag, text);
	return text;
}

static struct order read_order(int argc, char **argv)
{
	struct order o = {.iterations = 100, .every = 1};
	for (int i = 1; i < argc; i++) {
		const char *flag = argv[i], *value;
		if (strcmp(flag, "-header") == 0) {
			o.header = true;
			continue;
		}
		if (i + 1 == argc)
			fail("\"%.30s\" is no flag, or has no value; there are -k, -seed, -iterations, -f32, -header, -in, -out and -checkpoint", flag);
		value = argv[++i];
		if (strcmp(flag, "-k") == 0)
			o.k = (uint32_t)number(flag, value, 1, MAX_K);
		else if (strcmp(flag, "-seed") == 0)
			o.seed = number(flag, value, 0, UINT64_MAX - 9);
		else if (strcmp(flag, "-iterations") == 0)
			o.iterations = (uint32_t)number(flag, value, 1, 1000000);
		else if (strcmp(flag, "-f32") == 0)
			o.dimensions = (uint32_t)number(flag, value, 1, MAX_DIMENSIONS);
		else if (strcmp(flag, "-checkpoint") == 0)
			o.every = (uint32_t)number(flag, value, 1, 1000000);
		else if (strcmp(flag, "-in") == 0)
			o.in = name_of(flag, value);
		else if (strcmp(flag, "-out") == 0)
			o.out = name_of(flag, value);
		else
			fail("there is no flag \"%.30s\"; there are -k, -seed, -iterations, -f32, -header, -in, -out and -checkpoint", flag);
	}
	if (o.k == 0)
		fail("how many clusters? Say it with -k");
	if (o.header && o.dimensions > 0)
		fail("-header is for CSV, which -f32 says that this is not");
	return o;
}

#ifdef __wasm__
#define IN_FOLDER "/in/"
#define OUT_FOLDER "/out/"
#else
#define IN_FOLDER "in/"
#define OUT_FOLDER "out/"
#endif

static FILE *open_named(const char *folder, const char *name, const char *mode, FILE *otherwise)
{
	char path[80];
	FILE *f = otherwise;
	if (name != NULL) {
		snprintf(path, sizeof path, "%s%s", folder, name);
		if ((f = fopen(path, mode)) == NULL)
			fail("cannot open %s: %s", path, strerror(errno));
	}
	return f;
}

/* --- Points --------------------------------------------------------------- */

struct points {
	float *at; /* dimensions of the first, of the second, ... */
	size_t count, room;
	uint32_t dimensions;
};

/* Makes room for one more value than there are used. */
static void make_room(struct points *p, size_t used)
{
	if (used < p->room)
		return;
	size_t room = p->room == 0 ? 1024 : p->room * 2;
	float *more = room > p->room && room <= SIZE_MAX / sizeof *more ? realloc(p->at, room * sizeof *more) : NULL;
	if (more == NULL)
		fail("there is not enough memory for this input; raise memory_bytes or use a smaller input");
	p->at = more, p->room = room;
}

/* Is it within bounds? A NaN is not. */
static bool usable(float v) { return v >= -MAX_VALUE && v <= MAX_VALUE; }

static float parse(const char *field, size_t len, size_t line, uint32_t column)
{
	char *end;
	/* strtof also takes hex, names and blanks. */
	if (len == 0 || strspn(field, "+-.0123456789eE") != len)
		fail("line %zu, field %u: \"%.30s\" is no number", line, column, field);
	float v = strtof(field, &end);
	if (*end != 0)
		fail("line %zu, field %u: \"%.30s\" is no number", line, column, field);
	if (!usable(v))
		fail("line %zu, field %u: %.30s is beyond 1e15", line, column, field);
	return v;
}

static void read_csv(FILE *f, bool header, struct points *p)
{
	char field[MAX_FIELD + 1];
	size_t len = 0, used = 0, line = 1;
	uint32_t column = 0; /* fields of this line that have ended */
	bool begun = false;  /* this line */
	if (header) {
		int c;
		while ((c = getc(f)) != EOF && c != '\n')
			;
		line = 2;
	}
	for (int c;;) {
		c = getc(f);
		if (c == EOF && !begun)
			break;
		if (c != ',' && c != '\n' && c != EOF) {
			begun = true;
			if (len == MAX_FIELD || c == 0) {
				field[len] = 0;
				fail("line %zu, field %u: \"%.30s\"... is no number", line, column + 1, field);
			}
			field[len++] = (char)c;
			continue;
		}
		if (c != ',' && len > 0 && field[len - 1] == '\r')
			len--;
		field[len] = 0;
		if (column == MAX_DIMENSIONS)
			fail("line %zu has more than %d fields", line, MAX_DIMENSIONS);
		make_room(p, used);
		p->at[used++] = parse(field, len, line, column + 1);
		len = 0, column++, begun = true;
		if (c == ',')
			continue;
		if (p->count == 0)
			p->dimensions = column;
		else if (column != p->dimensions)
			fail("line %zu has %u fields, the first has %u", line, column, p->dimensions);
		p->count++, line++, column = 0, begun = false;
		if (c == EOF)
			break;
	}
}

static void read_floats(FILE *f, uint32_t dimensions, struct points *p)
{
	unsigned char raw[4];
	size_t used = 0, n;
	p->dimensions = dimensions;
	while ((n = fread(raw, 1, sizeof raw, f)) == sizeof raw) {
		uint32_t bits = raw[0] | (uint32_t)raw[1] << 8 | (uint32_t)raw[2] << 16 | (uint32_t)raw[3] << 24;
		make_room(p, used);
		memcpy(&p->at[used], &bits, sizeof bits);
		if (!usable(p->at[used]))
			fail("point %zu, value %zu is no number of at most 1e15", used / dimensions + 1, used % dimensions + 1);
		used++;
	}
	if (n != 0 || used % dimensions != 0)
		fail("the input ends in the middle of point %zu; -f32 %u is %u bytes a point", used / dimensions + 1, dimensions, dimensions * 4);
	p->count = used / dimensions;
}

static struct points read_points(const struct order *o)
{
	struct points p = {0};
	FILE *f = open_named(IN_FOLDER, o->in, "rb", stdin);
	static char buffer[256 << 10];
	setvbuf(f, buffer, _IOFBF, sizeof buffer);
	if (o->dimensions > 0)
		read_floats(f, o->dimensions, &p);
	else
		read_csv(f, o->header, &p);
	if (ferror(f))
		fail("cannot read the input: %s", strerror(errno));
	if (p.count < o->k)
		fail("there are %zu points, fewer than the %u clusters asked for", p.count, o->k);
	if (p.count > UINT32_MAX - BLOCK)
		fail("there are more points than can be counted");
	return p;
}

/* --- Distances ------------------------------------------------------------ */

/* The centroids lie in groups of LANES: of each group the first coordinates, then the
 * second, ... So one vector measures a dimension of four centroids, and each sum is in the
 * order of the dimensions, as without vectors. Lanes beyond k repeat the first centroid,
 * which wins against them, having the lower index. */
struct centroids {
	float *at;
	uint32_t k, groups, dimensions;
};

static float *coordinate(const struct centroids *c, uint32_t i, uint32_t d)
{
	return &c->at[((size_t)(i / LANES) * c->dimensions + d) * LANES + i % LANES];
}

static struct centroids new_centroids(uint32_t k, uint32_t dimensions)
{
	struct centroids c = {.k = k, .groups = (k + LANES - 1) / LANES, .dimensions = dimensions};
	c.at = allocate((size_t)c.groups * dimensions, LANES * sizeof *c.at);
	return c;
}

static void fill_lanes(struct centroids *c)
{
	for (uint32_t i = c->k; i < c->groups * LANES; i++)
		for (uint32_t d = 0; d < c->dimensions; d++)
			*coordinate(c, i, d) = *coordinate(c, 0, d);
}

/* For each of BLOCK points: which centroid is nearest (the first of those equally near),
 * and the square of its distance. */
#ifdef KMEANS_SCALAR
static void nearest(const struct centroids *c, const float *const point[BLOCK], uint32_t index[BLOCK], float square[BLOCK])
{
	for (int b = 0; b < BLOCK; b++) {
		index[b] = 0, square[b] = 0;
		for (uint32_t i = 0; i < c->k; i++) {
			const float *at = coordinate(c, i, 0);
			float sum = 0;
			for (uint32_t d = 0; d < c->dimensions; d++) {
				float away = point[b][d] - at[(size_t)d * LANES];
				sum += away * away;
			}
			if (i == 0 || sum < square[b])
				index[b] = i, square[b] = sum;
		}
	}
}
#else
typedef float floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline ints choose(ints mask, ints yes, ints no) { return (mask & yes) | (~mask & no); }

static void nearest(const struct centroids *c, const float *const point[BLOCK], uint32_t index[BLOCK], float square[BLOCK])
{
	floats best[BLOCK];
	ints which[BLOCK], lane = {0, 1, 2, 3};
	for (uint32_t g = 0; g < c->groups; g++, lane += LANES) {
		const floats *at = (const floats *)&c->at[(size_t)g * c->dimensions * LANES];
		floats sum[BLOCK] = {{0}};
		for (uint32_t d = 0; d < c->dimensions; d++)
			for (int b = 0; b < BLOCK; b++) {
				floats away = point[b][d] - at[d];
				sum[b] += away * away;
			}
		for (int b = 0; b < BLOCK; b++) {
			ints nearer = g == 0 ? (ints){-1, -1, -1, -1} : sum[b] < best[b];
			best[b] = (floats)choose(nearer, (ints)sum[b], (ints)best[b]);
			which[b] = choose(nearer, lane, which[b]);
		}
	}
	for (int b = 0; b < BLOCK; b++) {
		index[b] = (uint32_t)which[b][0], square[b] = best[b][0];
		for (int l = 1; l < LANES; l++)
			if (best[b][l] < square[b] || (best[b][l] == square[b] && (uint32_t)which[b][l] < index[b]))
				index[b] = (uint32_t)which[b][l], square[b] = best[b][l];
	}
}
#endif

/* The nearest centroid of every point, and the square of the distance to it. */
static void assign(const struct points *p, const struct centroids *c, uint32_t *index, float *square)
{
	for (size_t i = 0; i < p->count; i += BLOCK) {
		const float *point[BLOCK];
		uint32_t block_index[BLOCK];
		float block_square[BLOCK];
		size_t n = p->count - i < BLOCK ? p->count - i : BLOCK;
		for (size_t b = 0; b < BLOCK; b++)
			point[b] = &p->at[(i + (b < n ? b : 0)) * p->dimensions];
		nearest(c, point, block_index, block_square);
		memcpy(&index[i], block_index, n * sizeof *index);
		memcpy(&square[i], block_square, n * sizeof *square);
	}
}

/* --- The algorithm -------------------------------------------------------- */

/* The next of a sequence of random numbers (SplitMix64; Steele, Lea and Flood, 2014). */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

/* Uniform in [0, 1), exact. */
static double uniform(uint64_t *state) { return (double)(next_random(state) >> 11) * 0x1p-53; }

/* k-means++: the first seed is any point, each further one a point by chance in proportion
 * to the square of its distance from the seeds before. */
static void seed_centroids(const struct points *p, struct centroids *c, uint64_t seed)
{
	float *square = allocate(p->count, sizeof *square);
	uint64_t random = seed;
	size_t chosen = (size_t)(uniform(&random) * (double)p->count);
	for (uint32_t k = 0;; ) {
		const float *s = &p->at[chosen * p->dimensions];
		double total = 0;
		for (uint32_t d = 0; d < p->dimensions; d++)
			*coordinate(c, k, d) = s[d];
		if (++k == c->k)
			break;
		for (size_t i = 0; i < p->count; i++) {
			float sum = 0;
			for (uint32_t d = 0; d < p->dimensions; d++) {
				float away = p->at[i * p->dimensions + d] - s[d];
				sum += away * away;
			}
			if (k == 1 || sum < square[i])
				square[i] = sum;
			total += square[i];
		}
		if (total == 0)
			fail("there are only %u different points, fewer than the %u clusters asked for", k, c->k);
		double target = uniform(&random) * total, below = 0;
		for (size_t i = 0; i < p->count; i++) {
			if (square[i] == 0)
				continue;
			chosen = i; /* the last one stands if rounding leaves the target above all */
			if ((below += square[i]) > target)
				break;
		}
	}
	free(square);
	fill_lanes(c);
}

/* Moves each centroid into the mean of its points, and one that has none to the point that
 * is farthest from its own. Says whether anything has changed. */
static bool move(const struct points *p, struct centroids *c, const uint32_t *index, float *square, double *sum, uint32_t *count)
{
	bool changed = false;
	memset(sum, 0, (size_t)c->k * p->dimensions * sizeof *sum);
	memset(count, 0, c->k * sizeof *count);
	for (size_t i = 0; i < p->count; i++) {
		double *s = &sum[(size_t)index[i] * p->dimensions];
		const float *point = &p->at[i * p->dimensions];
		for (uint32_t d = 0; d < p->dimensions; d++)
			s[d] += point[d];
		count[index[i]]++;
	}
	for (uint32_t k = 0; k < c->k; k++) {
		const float *farthest = NULL;
		if (count[k] == 0) {
			size_t far = 0;
			for (size_t i = 1; i < p->count; i++)
				if (square[i] > square[far])
					far = i;
			square[far] = 0;
			farthest = &p->at[far * p->dimensions];
		}
		for (uint32_t d = 0; d < p->dimensions; d++) {
			float was = *coordinate(c, k, d);
			float now = farthest != NULL ? farthest[d] : (float)(sum[(size_t)k * p->dimensions + d] / count[k]);
			changed |= now != was;
			*coordinate(c, k, d) = now;
		}
	}
	fill_lanes(c);
	return changed;
}

/* --- Checkpoints ---------------------------------------------------------- */

/* What a checkpoint begins with; the centroids follow, one after the other. It fits only
 * the order and the points that it was made from. */
struct checkpoint {
	uint32_t magic, k, dimensions, done;
	uint64_t seed, count, points; /* points: a hash of all coordinates */
};

enum { MAGIC = 0x314d4b44 }; /* "DKM1" */

/* FNV-1a, a float at a time. */
static uint64_t hash_points(const struct points *p)
{
	uint64_t h = 0xcbf29ce484222325;
	for (size_t i = 0; i < p->count * p->dimensions; i++) {
		uint32_t bits;
		memcpy(&bits, &p->at[i], sizeof bits);
		h = (h ^ bits) * 0x100000001b3;
	}
	return h;
}

struct keeper {
	struct checkpoint head;
	unsigned char *buffer;
	size_t size; /* 0: checkpoints would be too large, and there are none */
	bool complained;
};

static void say(enum deimos_level level, const char *text) { deimos_log(level, text, strlen(text)); }

static struct keeper new_keeper(const struct order *o, const struct points *p)
{
	struct keeper k = {.head = {.magic = MAGIC, .k = o->k, .dimensions = p->dimensions, .seed = o->seed, .count = p->count}};
	uint64_t size = sizeof k.head + (uint64_t)o->k * p->dimensions * sizeof(float);
	if (size > DEIMOS_MAX_CHECKPOINT) {
		say(DEIMOS_WARNING, "kmeans: the centroids are too many for a checkpoint; an interruption begins anew");
		return k;
	}
	k.head.points = hash_points(p);
	k.size = (size_t)size;
	k.buffer = allocate(k.size, 1);
	return k;
}

static void keep(struct keeper *k, const struct centroids *c, uint32_t done)
{
	if (k->size == 0)
		return;
	unsigned char *to = k->buffer + sizeof k->head;
	k->head.done = done;
	memcpy(k->buffer, &k->head, sizeof k->head);
	for (uint32_t i = 0; i < c->k; i++)
		for (uint32_t d = 0; d < c->dimensions; d++, to += sizeof(float))
			memcpy(to, coordinate(c, i, d), sizeof(float));
	if (deimos_checkpoint(k->buffer, k->size) != DEIMOS_OK && !k->complained) {
		k->complained = true;
		say(DEIMOS_WARNING, "kmeans: a checkpoint was not kept; going on without");
	}
}

/* Takes the centroids of the newest checkpoint; 0 if there is none of this order, otherwise
 * how many iterations they have behind them. */
static uint32_t resume(struct keeper *k, struct centroids *c)
{
	struct checkpoint head;
	if (k->size == 0 || deimos_restore(k->buffer, k->size) != (int32_t)k->size)
		return 0;
	memcpy(&head, k->buffer, sizeof head);
	k->head.done = head.done;
	if (memcmp(&head, &k->head, sizeof head) != 0) {
		say(DEIMOS_WARNING, "kmeans: the checkpoint is of another order; beginning anew");
		return 0;
	}
	const unsigned char *from = k->buffer + sizeof head;
	for (uint32_t i = 0; i < c->k; i++)
		for (uint32_t d = 0; d < c->dimensions; d++, from += sizeof(float))
			memcpy(coordinate(c, i, d), from, sizeof(float));
	fill_lanes(c);
	return head.done;
}

/* --- The result ----------------------------------------------------------- */

static void print(FILE *f, const struct points *p, const struct centroids *c, const uint32_t *index, const float *square, uint32_t *count, uint32_t iterations, bool converged)
{
	double inertia = 0;
	memset(count, 0, c->k * sizeof *count);
	for (size_t i = 0; i < p->count; i++)
		count[index[i]]++, inertia += square[i];
	/* As many digits as tell each value from its neighbours. */
	fprintf(f, "{\"k\":%u,\"points\":%zu,\"dimensions\":%u,\"iterations\":%u,\"converged\":%s,\"inertia\":%.17g,\"clusters\":[",
		c->k, p->count, p->dimensions, iterations, converged ? "true" : "false", inertia);
	for (uint32_t i = 0; i < c->k; i++) {
		fprintf(f, "%s{\"count\":%u,\"centroid\":[", i ? "," : "", count[i]);
		for (uint32_t d = 0; d < c->dimensions; d++)
			fprintf(f, "%s%.9g", d ? "," : "", *coordinate(c, i, d) + 0.0f); /* no -0 */
		fputs("]}", f);
	}
	fputs("]}\n", f);
	if (fflush(f) != 0 || ferror(f) || (f != stdout && fclose(f) != 0))
		fail("cannot write the output: %s", strerror(errno));
}

int main(int argc, char **argv)
{
	struct order o = read_order(argc, argv);
	struct points p = read_points(&o);
	struct centroids c = new_centroids(o.k, p.dimensions);
	uint32_t *index = allocate(p.count, sizeof *index), *count = allocate(o.k, sizeof *count);
	float *square = allocate(p.count, sizeof *square);
	double *sum = allocate((size_t)o.k * p.dimensions, sizeof *sum);
	struct keeper keeper = new_keeper(&o, &p);

	uint32_t done = resume(&keeper, &c);
	bool changed = true;
	if (done == 0)
		seed_centroids(&p, &c, o.seed);
	while (done < o.iterations) {
		deimos_progress((int32_t)((uint64_t)done * 1000 / o.iterations));
		assign(&p, &c, index, square);
		done++;
		if (!(changed = move(&p, &c, index, square, sum, count)))
			break;
		if (done % o.every == 0 || deimos_should_checkpoint())
			keep(&keeper, &c, done);
	}
	if (changed)
		assign(&p, &c, index, square); /* to where they have moved at last */
	deimos_progress(1000);
	print(open_named(OUT_FOLDER, o.out, "ab", stdout), &p, &c, index, square, count, done, !changed);
	return 0;
}
