/* sdq_test.h - the test framework: a list of cases, checks that count, a seed that is printed.
 *
 *   #define SDQ_IMPLEMENTATION
 *   #include "sdq.h"
 *   #include "sdq_test.h"
 *
 *   static void test_add(int tier) { SDQT_CHECK(1 + 1 == 2); (void)tier; }
 *   static const sdqt_case cases[] = { {"add", test_add, 0} };
 *   int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
 *
 * A case with by_tier = 1 runs once for each instruction set, with that sdq_tier as its argument
 * and "/name" after its own name; a tier that this processor lacks is skipped and counted. Other
 * cases get SDQ_TIER_AUTO, or the tier of --tier.
 * Options: --filter TEXT  --tier NAME  --seed N  --list  --times (of the processor, a case each).
 * The process returns 0 if nothing failed and something passed. Random numbers depend on the seed
 * and the case's name only.
 */
#ifndef SDQ_TEST_H
#define SDQ_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct sdqt_case {
    const char *name;
    void (*fn)(int tier);
    int by_tier;
} sdqt_case;

/* The state of a test process: one static object, for tests only. */
static struct sdqt_state {
    const char *filter, *name;
    int list, times, tier, passed, failed, skipped, checks, errors, skip;
    uint64_t seed, rng;
} sdqt;

#if defined(__GNUC__)
#define SDQT_PRINTF(f, a) __attribute__((format(printf, f, a), unused))
#define SDQT_UNUSED __attribute__((unused))
#else
#define SDQT_PRINTF(f, a)
#define SDQT_UNUSED
#endif

/* Count a check. The first ten failures of a case are printed; returns ok. */
SDQT_PRINTF(4, 5)
static int sdqt_check(int ok, const char *file, int line, const char *format, ...) {
    va_list args;
    sdqt.checks++;
    if (ok) return 1;
    if (++sdqt.errors > 10) return 0;
    printf("%s:%d: %s: ", file, line, sdqt.name);
    va_start(args, format);
    (void)vprintf(format, args);
    va_end(args);
    printf("\n");
    return 0;
}
#define SDQT_CHECK(cond) sdqt_check((cond) != 0, __FILE__, __LINE__, "%s", #cond)
/* SDQT_THAT(cond, "format", ...): the same with a sentence of your own. */
#define SDQT_THAT(cond, ...) sdqt_check((cond) != 0, __FILE__, __LINE__, __VA_ARGS__)
/* |a - b| <= tol; NaN fails. */
#define SDQT_NEAR(a, b, tol) \
    sdqt_check(fabs((double)(a) - (double)(b)) <= (tol), __FILE__, __LINE__, \
               "%s = %.9g, expected %.9g +- %g", #a, (double)(a), (double)(b), (double)(tol))
#define SDQT_BYTES(a, b, bytes) \
    sdqt_check(memcmp(a, b, bytes) == 0, __FILE__, __LINE__, "%s and %s differ", #a, #b)
/* The rest of this case cannot be tested here. Not a pass. */
#define SDQT_SKIP() do { sdqt.skip = 1; return; } while (0)

/* splitmix64 (Steele, Lea, Flood 2014) */
SDQT_UNUSED static uint64_t sdqt_rand(void) {
    uint64_t z = (sdqt.rng += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}
/* 0 .. n-1 */
SDQT_UNUSED static size_t sdqt_below(size_t n) { return (size_t)(sdqt_rand() % n); }
SDQT_UNUSED static float sdqt_uniform(float lo, float hi) {
    return lo + (hi - lo) * (float)(sdqt_rand() >> 40) / 16777216.0f;
}
/* mean 0, variance 1, roughly normal: a sum of 12 uniforms */
SDQT_UNUSED static float sdqt_normal(void) {
    float s = -6.0f;
    int i;
    for (i = 0; i < 12; i++) s += sdqt_uniform(0.0f, 1.0f);
    return s;
}

/* ---- files ---- */

#if defined(__unix__) || defined(__APPLE__)
#include <sys/stat.h>
#include <unistd.h>
#define SDQT_MAKE_FOLDER(path) ((void)mkdir(path, 0777))
#define SDQT_DROP_FOLDER(path) ((void)rmdir(path))
#else
#define SDQT_MAKE_FOLDER(path) ((void)(path))       /* elsewhere it must exist */
#define SDQT_DROP_FOLDER(path) ((void)(path))
#endif

/* A whole file; free it. The test ends where there is none. */
SDQT_UNUSED static unsigned char *sdqt_read(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    unsigned char *p;
    long size;
    if (!f || fseek(f, 0, SEEK_END) != 0 || (size = ftell(f)) < 0) {
        printf("%s: cannot be read\n", path);
        exit(2);
    }
    rewind(f);
    *n = (size_t)size;
    p = (unsigned char *)malloc(*n + 1);
    if (!p || fread(p, 1, *n, f) != *n) exit(2);
    (void)fclose(f);
    return p;
}
SDQT_UNUSED static void sdqt_write(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) {
        printf("%s: cannot be written\n", path);
        exit(2);
    }
}

/* ---- memory that is counted, and refused ---- */

/* An allocator's state; zeroed, it refuses nothing. */
typedef struct sdqt_heap {
    size_t live, bytes, most;   /* blocks and bytes that are given out now, bytes at most */
    size_t calls, largest;      /* allocations so far, the largest one */
    size_t fail_at, fails;      /* refused: calls fail_at .. fail_at + fails - 1, from 0 */
    size_t limit;               /* and more bytes than this at once; 0: any */
    int off;                    /* while set, calls are not counted, and nothing is refused */
} sdqt_heap;

/* What comes is full of NaN: who reads it before writing it is seen. user: sdqt_heap or NULL. */
SDQT_UNUSED static void *sdqt_alloc(void *user, size_t bytes) {
    const size_t head = 16;     /* the size, and malloc's alignment */
    sdqt_heap *h = (sdqt_heap *)user;
    char *p;
    if (h && !h->off) {
        const size_t call = h->calls++;
        if (bytes > h->largest) h->largest = bytes;
        if (call >= h->fail_at && call - h->fail_at < h->fails) return NULL;
        if (h->limit && bytes > h->limit) return NULL;
    }
    p = (char *)malloc(head + bytes);
    if (!p) return NULL;
    memcpy(p, &bytes, sizeof bytes);
    memset(p + head, 0xff, bytes);
    if (h) {
        h->live++;
        h->bytes += bytes;
        if (h->bytes > h->most) h->most = h->bytes;
    }
    return p + head;
}
SDQT_UNUSED static void sdqt_release(void *user, void *block) {
    sdqt_heap *h = (sdqt_heap *)user;
    char *p = (char *)block - 16;
    size_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    free(p);
    if (!h) return;
    h->live--;
    h->bytes -= bytes;
}

/* From here on, after k more calls, refuse n of them. */
SDQT_UNUSED static void sdqt_refuse(sdqt_heap *h, size_t k, size_t n) {
    h->fail_at = h->calls + k;
    h->fails = n;
}

/* A context with such memory. It can be refused, too. */
SDQT_UNUSED static sdq_status sdqt_ctx_of(sdqt_heap *h, int tier, int threads, sdq_ctx **out) {
    sdq_ctx_desc d;
    memset(&d, 0, sizeof d);
    d.tier = (sdq_tier)tier;
    d.threads = threads;
    d.alloc = sdqt_alloc;
    d.release = sdqt_release;
    d.user = h;
    return sdq_ctx_create(&d, out);
}
/* One for a case that cannot do without. */
SDQT_UNUSED static sdq_ctx *sdqt_ctx(int tier, int threads) {
    sdq_ctx *ctx;
    if (sdqt_ctx_of(NULL, tier, threads, &ctx) != SDQ_OK) { printf("no context\n"); exit(2); }
    return ctx;
}

static void sdqt_run(const sdqt_case *c, int tier, const char *suffix) {
    char name[128];
    const char *p;
    clock_t begin;
    (void)snprintf(name, sizeof name, "%s%s%s", c->name, *suffix ? "/" : "", suffix);
    if (sdqt.filter && !strstr(name, sdqt.filter)) return;
    if (sdqt.list) { printf("%s\n", name); return; }
    if (!sdq_tier_available((sdq_tier)tier)) {
        printf("skipped %s: not on this processor\n", name);
        sdqt.skipped++;
        return;
    }
    sdqt.name = name;
    sdqt.errors = sdqt.checks = sdqt.skip = 0;
    sdqt.rng = sdqt.seed;       /* by the case's own name: all tiers see the same numbers */
    for (p = c->name; *p; p++) sdqt.rng = (sdqt.rng ^ (unsigned char)*p) * UINT64_C(1099511628211);
    begin = clock();
    c->fn(tier);
    if (sdqt.times) printf("%8.2f s %s\n", (double)(clock() - begin) / CLOCKS_PER_SEC, name);
    if (sdqt.errors) { printf("FAILED %s: %d of %d checks\n", name, sdqt.errors, sdqt.checks); }
    else if (sdqt.skip) printf("skipped %s\n", name);
    else if (!sdqt.checks) printf("FAILED %s: it checks nothing\n", name);
    if (sdqt.errors || (!sdqt.skip && !sdqt.checks)) sdqt.failed++;
    else if (sdqt.skip) sdqt.skipped++;
    else sdqt.passed++;
}

static int sdqt_usage(const char *program) {
    int t;
    printf("usage: %s [--filter TEXT] [--tier NAME] [--seed N] [--list] [--times]\ntiers:", program);
    for (t = SDQ_TIER_SCALAR; t < SDQ_TIER_COUNT; t++) printf(" %s", sdq_tier_name((sdq_tier)t));
    printf("\n");
    return 2;
}

static int sdqt_options(int argc, char **argv) {
    int i, t;
    for (i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argv[i], "--list")) { sdqt.list = 1; continue; }
        if (!strcmp(argv[i], "--times")) { sdqt.times = 1; continue; }
        if (!value) return 0;
        if (!strcmp(argv[i], "--filter")) sdqt.filter = value;
        else if (!strcmp(argv[i], "--seed")) sdqt.seed = strtoull(value, NULL, 0);
        else if (!strcmp(argv[i], "--tier")) {
            for (t = SDQ_TIER_SCALAR; t < SDQ_TIER_COUNT; t++)
                if (!strcmp(value, sdq_tier_name((sdq_tier)t))) sdqt.tier = t;
            if (!sdqt.tier) return 0;
        } else return 0;
        i++;
    }
    return 1;
}

static int sdqt_main(int argc, char **argv, const sdqt_case *cases, size_t count) {
    size_t i;
    int t;
    sdqt.seed = 1;
    if (!sdqt_options(argc, argv)) return sdqt_usage(argv[0]);
    for (i = 0; i < count; i++) {
        if (!cases[i].by_tier) { sdqt_run(&cases[i], sdqt.tier, ""); continue; }
        for (t = SDQ_TIER_SCALAR; t < SDQ_TIER_COUNT; t++)
            if (!sdqt.tier || sdqt.tier == t)
                sdqt_run(&cases[i], t, sdq_tier_name((sdq_tier)t));
    }
    if (sdqt.list) return 0;
    printf("%s: %d passed, %d failed, %d skipped (seed %llu)\n", argv[0], sdqt.passed, sdqt.failed,
           sdqt.skipped, (unsigned long long)sdqt.seed);
    return sdqt.failed || !sdqt.passed;
}
#define SDQT_MAIN(argc, argv, cases) \
    sdqt_main(argc, argv, cases, sizeof(cases) / sizeof((cases)[0]))

#endif /* SDQ_TEST_H */
