/* >>random: torch's words exactly, its normals to a few units in the last place, Philox, and one
 * hash that must be the same on every machine and compiler. Run from the project folder. */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

/* Largest distance to torch 2.8's vectorised normals, measured over 8 x 65,536 draws: 3 units in
 * the last place, or 4.8e-7. */
#define TOL 1e-6

static const unsigned long long seeds[] = {0, 42, 123456789, 4294967301ull,
                                           18446744073709551615ull};
static const size_t lengths[] = {1, 3, 15, 16, 17, 31, 33, 1000};

static double worst(const float *a, const float *b, size_t n) {
    double w = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= w)) w = d;
    }
    return w;
}

static const void *golden(sdq_file *f, const char *name, size_t n) {
    const sdq_entry *e = sdq_file_find(f, name);
    if (!e || sdq_entry_count(e) != n) return NULL;
    return e->data;
}

static void one_length(sdq_file *f, unsigned long long seed, size_t n) {
    static float x[1000];
    char name[64];
    const void *g;
    sdq_rng r;
    size_t i, bad = 0;
    (void)snprintf(name, sizeof name, "randn/%llu/%zu", seed, n);
    g = golden(f, name, n);
    sdq_rng_init(&r, SDQ_RNG_TORCH, seed);
    sdq_rng_normal(&r, x, n);
    SDQT_CHECK(g != NULL);
    if (g) SDQT_CHECK(n < 16 ? memcmp(g, x, n * 4) == 0 : worst((const float *)g, x, n) <= TOL);
    (void)snprintf(name, sizeof name, "rand/%llu/%zu", seed, n);
    g = golden(f, name, n);
    sdq_rng_init(&r, SDQ_RNG_TORCH, seed);
    sdq_rng_uniform(&r, x, n);
    SDQT_CHECK(g && memcmp(g, x, n * 4) == 0);
    (void)snprintf(name, sizeof name, "randint1000/%llu/%zu", seed, n);
    g = golden(f, name, n);
    sdq_rng_init(&r, SDQ_RNG_TORCH, seed);
    for (i = 0; g && i < n; i++)
        bad += sdq_rng_below(&r, 1000) != (uint64_t)((const int32_t *)g)[i];
    SDQT_CHECK(g && bad == 0);
}

static void one_stream(sdq_file *f, unsigned long long seed) {
    static const size_t parts[] = {3, 1, 17, 2, 60, 5, 1, 16, 1};
    float x[60];
    char name[64];
    size_t i;
    sdq_rng r;
    sdq_rng_init(&r, SDQ_RNG_TORCH, seed);
    for (i = 0; i < 9; i++) {
        const void *g;
        (void)snprintf(name, sizeof name, "stream/%llu/%zu", seed, i);
        g = golden(f, name, parts[i]);
        sdq_rng_normal(&r, x, parts[i]);
        SDQT_CHECK(g && worst((const float *)g, x, parts[i]) <= TOL);
    }
}

static void philox(sdq_file *f) {
    static const struct { unsigned long long seed; unsigned offset; } at[] =
        {{0, 0}, {0, 1}, {42, 0}, {8589934601ull, 3}};
    float x[19];
    char name[64];
    size_t i;
    unsigned k;
    for (i = 0; i < 4; i++) {
        const void *g;
        sdq_rng r;
        sdq_rng_init(&r, SDQ_RNG_PHILOX, at[i].seed);
        for (k = 0; k <= at[i].offset; k++) sdq_rng_normal(&r, x, 19);
        (void)snprintf(name, sizeof name, "philox/%llu/%u", at[i].seed, at[i].offset);
        g = golden(f, name, 19);
        SDQT_CHECK(g && worst((const float *)g, x, 19) <= 2e-6);     /* 2 pi as a float: 1.7e-7 rad */
    }
}

static void random_golden(int tier) {
    (void)tier;
    sdq_ctx *ctx;
    sdq_file *f;
    size_t i, j;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    SDQT_CHECK(sdq_file_open(ctx, "tests/golden/random.safetensors", &f) == SDQ_OK);
    if (f) {
        for (i = 0; i < 5; i++) {
            for (j = 0; j < 8; j++) one_length(f, seeds[i], lengths[j]);
            one_stream(f, seeds[i]);
        }
        philox(f);
    }
    sdq_file_close(ctx, f);
    sdq_ctx_free(ctx);
}

/* Published values: torch seed 0 and 42, [1,4,64,64]; torch on CUDA seed 0. */
static void random_published(int tier) {
    (void)tier;
    static const float end0[] = {-1.0407f, 0.0908f, -1.3665f, -1.0782f};
    static const float end42[] = {-0.8111f, -0.6358f, 0.9728f, -0.2934f};
    static const float cuda[] = {-0.92466249f, -0.42534395f, -2.6438458f, 0.14518386f, -0.1208665f};
    static float x[16384];
    sdq_rng r;
    sdq_rng_init(&r, SDQ_RNG_TORCH, 0);
    sdq_rng_normal(&r, x, 16384);
    SDQT_CHECK(worst(x + 16380, end0, 4) < 6e-5);
    sdq_rng_init(&r, SDQ_RNG_TORCH, 42);
    sdq_rng_normal(&r, x, 16384);
    SDQT_CHECK(worst(x + 16380, end42, 4) < 6e-5);
    sdq_rng_init(&r, SDQ_RNG_PHILOX, 0);
    sdq_rng_normal(&r, x, 12);
    SDQT_CHECK(worst(x, cuda, 5) < 1e-6);
    SDQT_CHECK(fabs((double)x[11] - 2.26550495) < 1e-6);
}

/* torch.Generator().manual_seed(7) of torch 2.8. */
static void random_integers(int tier) {
    (void)tier;
    static const uint64_t narrow[] = {59306160, 171107527, 128500261};      /* below 2^28 - 1 */
    static const uint64_t wide[] = {171107524, 27798006, 174903507};        /* below 2^28 */
    static const uint64_t huge[] = {752595690692ull, 108744157686ull, 291964244179ull};
    static const size_t order[] = {5, 0, 3, 4, 1, 7, 9, 6, 8, 2};
    size_t i, p[10];
    sdq_rng a, b, c;
    sdq_rng_init(&a, SDQ_RNG_TORCH, 7);
    b = c = a;
    for (i = 0; i < 3; i++) {
        SDQT_CHECK(sdq_rng_below(&a, 268435455u) == narrow[i]);
        SDQT_CHECK(sdq_rng_below(&b, 268435456u) == wide[i]);
        SDQT_CHECK(sdq_rng_below(&c, (uint64_t)1 << 40) == huge[i]);
    }
    sdq_rng_init(&a, SDQ_RNG_TORCH, 7);
    sdq_rng_permutation(&a, p, 10);
    SDQT_CHECK(memcmp(p, order, sizeof p) == 0);
    sdq_rng_permutation(&a, p, 0);
    SDQT_CHECK(sdq_rng_below(&a, 0) == 0 && sdq_rng_below(&a, 1) == 0);
}

static void random_layout(int tier) {
    (void)tier;
    float flat[2 * 3 * 4 * 5], at[2 * 3 * 4 * 5];
    size_t n, h, w, c, bad = 0;
    int kind;
    for (kind = 0; kind < SDQ_RNG_COUNT; kind++) {
        sdq_rng a, b;
        sdq_rng_init(&a, (sdq_rng_kind)kind, 3);
        b = a;
        sdq_rng_normal(&a, flat, 120);
        sdq_rng_normal_nchw(&b, at, 2, 3, 4, 5);        /* torch shape [2,5,3,4] */
        for (n = 0; n < 2; n++) for (h = 0; h < 3; h++) for (w = 0; w < 4; w++)
            for (c = 0; c < 5; c++)
                bad += at[((n * 3 + h) * 4 + w) * 5 + c] != flat[((n * 5 + c) * 3 + h) * 4 + w];
        SDQT_CHECK(memcmp(&a, &b, sizeof a) == 0);
    }
    SDQT_CHECK(bad == 0);
}

/* A copy of the bytes continues the stream; damaged bytes are told. */
static void random_state(int tier) {
    (void)tier;
    unsigned char bytes[sizeof(sdq_rng)];
    float x[40], y[40];
    sdq_rng a, b;
    SDQT_CHECK(sizeof(sdq_rng) == 8 + 8 + 16 + 4 * 624);
    sdq_rng_init(&a, SDQ_RNG_TORCH, 5);
    sdq_rng_normal(&a, x, 7);
    memcpy(bytes, &a, sizeof a);
    sdq_rng_normal(&a, x, 5);
    sdq_rng_normal(&a, x + 5, 35);
    memcpy(&b, bytes, sizeof b);
    SDQT_CHECK(sdq_rng_valid(&b));
    sdq_rng_normal(&b, y, 5);
    sdq_rng_normal(&b, y + 5, 35);
    SDQT_CHECK(memcmp(x, y, sizeof x) == 0);
    b.pos = 625;
    SDQT_CHECK(!sdq_rng_valid(&b));
    b.pos = 624; b.kind = 9;
    SDQT_CHECK(!sdq_rng_valid(&b));
    b.kind = 0; b.spare = (double)NAN;
    SDQT_CHECK(!sdq_rng_valid(&b));
}

static uint64_t fnv(const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t h = UINT64_C(14695981039346656037);
    size_t i;
    for (i = 0; i < n; i++) h = (h ^ p[i]) * UINT64_C(1099511628211);
    return h;
}

/* The promise of equal bits: these hashes hold for gcc and clang, C and C++, -O0 to -O3. */
static void random_bits(int tier) {
    (void)tier;
    static float x[100003];
    sdq_rng r;
    sdq_rng_init(&r, SDQ_RNG_TORCH, 1);
    sdq_rng_normal(&r, x, 100003);
    SDQT_CHECK(fnv(x, sizeof x) == UINT64_C(0xaa1279b9c3ac9f15));
    sdq_rng_normal(&r, x, 11);
    SDQT_CHECK(fnv(x, 44) == UINT64_C(0x982de1a1316d65a4));
    sdq_rng_init(&r, SDQ_RNG_PHILOX, 1);
    sdq_rng_normal(&r, x, 100003);
    SDQT_CHECK(fnv(x, sizeof x) == UINT64_C(0xfcab96c0297d9ec1));
}

/* ln, sin, cos against libm, relative (ln near 1, sin near pi absolute). */
static void random_functions(int tier) {
    (void)tier;
    double bad = 0;
    int i;
    for (i = 1; i < 200000; i++) {
        const double x = i / 200000.0, t = x * 6.5;
        double s, c, d;
        sdq__rng_sincos(t, &s, &c);
        d = fabs(s - sin(t)); if (!(d <= bad)) bad = d;
        d = fabs(c - cos(t)); if (!(d <= bad)) bad = d;
        d = fabs(sdq__rng_log(x) / log(x) - 1.0); if (!(d <= bad)) bad = d;
    }
    SDQT_CHECK(bad < 1e-15);     /* measured 3.3e-16 */
}

static const sdqt_case cases[] = {
    {"random_golden", random_golden, 0},
    {"random_published", random_published, 0},
    {"random_integers", random_integers, 0},
    {"random_layout", random_layout, 0},
    {"random_state", random_state, 0},
    {"random_bits", random_bits, 0},
    {"random_functions", random_functions, 0},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
