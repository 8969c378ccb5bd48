/* test_kernels.c - every kernel of sdq.h against an oracle that shares no code with it, and to
 * the bit against the scalar tier.
 *
 * Oracles compute in double, from the formula. An error is counted in units u = 2^-24 of the
 * magnitude of what was added up (`mag`), so that cancellation between exact inputs is not
 * charged to the kernel. The bound of each kernel stands in its row of the table; it is at most
 * three times the largest error that was seen (seeds 1 to 20; -DSHOW_ERRORS prints them).
 * All arrays lie between two pages that cannot be touched, and both ways: the first element at
 * the lower page, the last one at the upper page. The second makes every alignment occur.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE     /* mmap with MAP_ANONYMOUS under -std=c99 */
#endif
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"
#include <sys/mman.h>
#include <unistd.h>

#define U 5.9604644775390625e-8     /* 2^-24: half a unit in the last place of 1.0 */
#define SUBNORMAL 1.4e-45           /* absolute error that is always granted */
#define NORMAL 1.18e-38             /* where a result below the normal range may be 0 */
#define TINY 4e-34   /* x < -87, where sigmoid(x) may be 0 or constant: 87 sigmoid(-87) dy */
#define MAX_N 1000
#define MAX_MAT (64 * 80)

/* ---- memory between guard pages ---- */

typedef struct guarded { unsigned char *base, *lo; size_t bytes, page; } guarded;

static guarded guard_new(size_t bytes) {
    guarded g;
    void *p;
    g.page = (size_t)sysconf(_SC_PAGESIZE);
    g.bytes = (bytes + g.page - 1) / g.page * g.page;
    p = mmap(NULL, g.bytes + 2 * g.page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { printf("mmap failed\n"); exit(2); }
    g.base = (unsigned char *)p;
    g.lo = g.base + g.page;
    if (mprotect(g.lo, g.bytes, PROT_READ | PROT_WRITE)) { printf("mprotect failed\n"); exit(2); }
    return g;
}
static void guard_free(guarded *g) { munmap(g->base, g->bytes + 2 * g->page); }
/* `bytes` bytes at the upper guard page, or at the lower one; the rest is filled with 0xa5. */
static void *guard_place(guarded *g, size_t bytes, int at_end) {
    memset(g->lo, 0xa5, g->bytes);
    return at_end ? g->lo + g->bytes - bytes : g->lo;
}
/* Whether everything outside of the placed bytes is still 0xa5. */
static int guard_intact(const guarded *g, const void *placed, size_t bytes) {
    const unsigned char *p = (const unsigned char *)placed;
    size_t i;
    for (i = 0; i < g->bytes; i++)
        if ((g->lo + i < p || g->lo + i >= p + bytes) && g->lo[i] != 0xa5) return 0;
    return 1;
}

/* ---- inputs ---- */

static const float special[] = {
    0.0f, -0.0f, 1.0f, -1.0f, 0.5f, 1.5f, 2.5f, -2.5f, 1e-45f, -1e-45f, 1e-39f, 1.1754944e-38f,
    3.4028235e38f, -3.4028235e38f, 1e30f, -1e30f, 88.72283f, 88.72284f, -87.33654f, -103.97f,
    -104.1f, 127.5f, 255.5f, -128.5f, 14.5f, -14.6f, 16777217.0f, INFINITY, -INFINITY, NAN
};
enum { FILL_NORMAL, FILL_WIDE, FILL_SPECIAL, FILL_KINDS };

/* NORMAL: around 0 with deviation 2. WIDE: any exponent from 2^-40 to 2^7. SPECIAL: every
 * second one from the list above. */
static float random_value(int fill) {
    if (fill == FILL_SPECIAL && sdqt_below(2))
        return special[sdqt_below(sizeof special / sizeof special[0])];
    if (fill == FILL_WIDE) {
        const float x = sdqt_uniform(-1.0f, 1.0f);
        return ldexpf(x, (int)sdqt_below(48) - 40);
    }
    return 2.0f * sdqt_normal();
}

/* Same bits, or both NaN. */
static int same(float a, float b) {
    return (a != a && b != b) || memcmp(&a, &b, 4) == 0;
}

static double error_in_u(float got, double want, double mag, double granted) {
    if (want != want) return got != got ? 0.0 : INFINITY;
    if (fabs(want) > 3.4028234e38 || isinf(got))    /* at the edge both are right */
        return fabs(want) > 3.40282e38 && fabs((double)got) > 3.40282e38 && got * want > 0
                   ? 0.0 : INFINITY;
    return fabs((double)got - want) / (mag * U + granted);
}

/* ---- kernels on rows of floats: a table of how to call them and what to expect ---- */

typedef struct row {
    size_t n, rows, ld;
    const float *in[5];
    float *out[3];          /* old contents are random and count where a kernel adds */
    float p[8];
    double *want[3], *mag[3];
} row;

typedef struct row_kernel {
    const char *name;
    int ins, outs;
    unsigned mats, scalars;     /* bits: input is a matrix [rows][ld]; output has one element */
    double bound, granted;
    void (*run)(const sdq__kernels *k, const row *r);
    void (*oracle)(const row *r);   /* from in, out (old) and p to want, mag */
} row_kernel;

#define IN(a) ((double)r->in[a][i])
#define OLD(a) ((double)r->out[a][i])
#define P(a) ((double)r->p[a])
#define WANT(a, w, m) do { r->want[a][i] = (w); r->mag[a][i] = (m); } while (0)
#define ALL for (i = 0; i < r->n; i++)

#define RUN(name, ...) \
    static void run_##name(const sdq__kernels *k, const row *r) { k->name(__VA_ARGS__); }
/* One value per element; the magnitude is that of the sum of its terms. */
#define EACH(name, w, m) \
    static void oracle_##name(const row *r) { size_t i; ALL WANT(0, w, m); }
#define O(a) r->out[a]
#define I(a) r->in[a]
#define N r->n

RUN(add, O(0), I(0), I(1), N)
EACH(add, IN(0) + IN(1), fabs(IN(0) + IN(1)))
RUN(scale, O(0), I(0), N, r->p[0])
EACH(scale, IN(0) * P(0), fabs(IN(0) * P(0)))
RUN(axpy, O(0), I(0), N, r->p[0])
EACH(axpy, OLD(0) + P(0) * IN(0), fabs(OLD(0) + P(0) * IN(0)))
RUN(lerp, O(0), I(0), N, r->p[0])
EACH(lerp, OLD(0) + P(0) * (IN(0) - OLD(0)), fabs(OLD(0)) + fabs(P(0) * (IN(0) - OLD(0))))
RUN(vexp, O(0), I(0), N)
EACH(vexp, exp(IN(0)), exp(IN(0)))

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
static double phi(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
static double gelu(double x) { return x * phi(x); }
static double gelu_d(double x, double *mag) {
    const double t = x * exp(-0.5 * x * x) * 0.39894228040143267794;
    *mag = phi(x) + fabs(t);
    return phi(x) + t;
}
static double silu_d(double x, double *mag) {
    const double s = sigmoid(x), c = sigmoid(-x);
    *mag = s * (1 + fabs(x * c));
    return s * (1 + x * c);
}
RUN(silu, O(0), I(0), N)
EACH(silu, IN(0) * sigmoid(IN(0)), fabs(IN(0) * sigmoid(IN(0))))
RUN(gelu, O(0), I(0), N)
EACH(gelu, gelu(IN(0)), fabs(gelu(IN(0))))
/* 1.702 x is rounded before exp: an error of |1.702 x| u. */
RUN(quick_gelu, O(0), I(0), N)
EACH(quick_gelu, IN(0) * sigmoid((double)1.702f * IN(0)),
     fabs(IN(0) * sigmoid((double)1.702f * IN(0))) * (1 + fabs(IN(0))))
RUN(geglu, O(0), I(0), I(1), N)
EACH(geglu, IN(0) * gelu(IN(1)), fabs(IN(0) * gelu(IN(1))))

RUN(silu_bwd, O(0), I(0), I(1), N)
static void oracle_silu_bwd(const row *r) {
    size_t i;
    ALL {
        double m, d = silu_d(IN(1), &m);
        WANT(0, OLD(0) + IN(0) * d, fabs(OLD(0)) + fabs(IN(0)) * m);
    }
}
RUN(gelu_bwd, O(0), I(0), I(1), N)
static void oracle_gelu_bwd(const row *r) {
    size_t i;
    ALL {
        double m, d = gelu_d(IN(1), &m);
        WANT(0, OLD(0) + IN(0) * d, fabs(OLD(0)) + fabs(IN(0)) * m);
    }
}
RUN(quick_gelu_bwd, O(0), I(0), I(1), N)
static void oracle_quick_gelu_bwd(const row *r) {
    size_t i;
    ALL {
        double m, d = silu_d((double)1.702f * IN(1), &m);
        WANT(0, OLD(0) + IN(0) * d, fabs(OLD(0)) + fabs(IN(0)) * m * (1 + fabs(IN(1))));
    }
}
RUN(geglu_bwd, O(0), O(1), I(0), I(1), I(2), N)
static void oracle_geglu_bwd(const row *r) {
    size_t i;
    ALL {
        double m, d = gelu_d(IN(2), &m);
        WANT(0, OLD(0) + IN(0) * gelu(IN(2)), fabs(OLD(0)) + fabs(IN(0) * gelu(IN(2))));
        WANT(1, OLD(1) + IN(0) * IN(1) * d, fabs(OLD(1)) + fabs(IN(0) * IN(1)) * m);
    }
}

/* Sums: the magnitude is the sum of |terms|. */
#define SUM(name, term, ...) \
    static void run_##name(const sdq__kernels *k, const row *r) { \
        r->out[0][0] = k->name(__VA_ARGS__); \
    } \
    static void oracle_##name(const row *r) { \
        size_t i; \
        double s = 0, m = 0; \
        ALL { s += term; m += fabs(term); } \
        r->want[0][0] = s; \
        r->mag[0][0] = m; \
    }
#define SQ(x) ((x) * (x))
SUM(sum, IN(0), I(0), N)
SUM(dot, IN(0) * IN(1), I(0), I(1), N)
SUM(sqdist, SQ(IN(0) - IN(1)), I(0), I(1), N)
SUM(absdist, fabs(IN(0) - IN(1)), I(0), I(1), N)
SUM(sqdev, SQ(IN(0) - P(0)), I(0), N, r->p[0])

RUN(minmax, I(0), N, O(0), O(1))
static void oracle_minmax(const row *r) {
    double lo = (double)r->out[0][0], hi = (double)r->out[1][0];
    size_t i;
    ALL {
        if (IN(0) < lo) lo = IN(0);
        if (IN(0) > hi) hi = IN(0);
    }
    r->want[0][0] = lo;
    r->want[1][0] = hi;
    r->mag[0][0] = r->mag[1][0] = 0;
}

#define MAT(a) ((double)r->in[a][j * r->ld + i])
#define ROWS for (j = 0; j < r->rows; j++)
RUN(minmax_cols, I(0), r->rows, r->ld, N, O(0), O(1))
static void oracle_minmax_cols(const row *r) {
    size_t i, j;
    ALL {
        double lo = OLD(0), hi = OLD(1);
        ROWS {
            if (MAT(0) < lo) lo = MAT(0);
            if (MAT(0) > hi) hi = MAT(0);
        }
        WANT(0, lo, 0);
        WANT(1, hi, 0);
    }
}
RUN(colsum, O(0), I(0), r->rows, r->ld, N)
static void oracle_colsum(const row *r) {
    size_t i, j;
    ALL {
        double s = OLD(0), m = fabs(s);
        ROWS { s += MAT(0); m += fabs(MAT(0)); }
        WANT(0, s, m);
    }
}
RUN(colsqdev, O(0), I(0), I(1), r->rows, r->ld, N)
static void oracle_colsqdev(const row *r) {
    size_t i, j;
    ALL {
        double s = OLD(0), m = fabs(s);
        ROWS { s += SQ(MAT(0) - IN(1)); m += SQ(MAT(0) - IN(1)); }
        WANT(0, s, m);
    }
}
RUN(colsum2, O(0), O(1), I(0), I(1), r->rows, r->ld, N)
static void oracle_colsum2(const row *r) {
    size_t i, j;
    ALL {
        double s = OLD(0), m = fabs(s), s2 = OLD(1), m2 = fabs(s2);
        ROWS {
            s += MAT(0);
            m += fabs(MAT(0));
            s2 += MAT(0) * MAT(1);
            m2 += fabs(MAT(0) * MAT(1));
        }
        WANT(0, s, m);
        WANT(1, s2, m2);
    }
}

RUN(affine, O(0), I(0), I(1), I(2), N)
EACH(affine, IN(0) * IN(1) + IN(2), fabs(IN(0) * IN(1) + IN(2)))
/* z = fma(x, a, b) is rounded, and silu(z) is as wrong as exp(-z): |z| u. */
RUN(affine_silu, O(0), I(0), I(1), I(2), N)
static void oracle_affine_silu(const row *r) {
    size_t i;
    ALL {
        const double z = IN(0) * IN(1) + IN(2), y = z * sigmoid(z);
        WANT(0, y, fabs(y) * (1 + fabs(z)));
    }
}
RUN(affine_silu_bwd, O(0), I(0), I(1), I(2), I(3), N)
static void oracle_affine_silu_bwd(const row *r) {
    size_t i;
    ALL {
        const double z = IN(1) * IN(2) + IN(3);
        double m, d = silu_d(z, &m);
        WANT(0, IN(0) * d, fabs(IN(0)) * m * (1 + fabs(z)));
    }
}
RUN(norm_bwd, O(0), I(0), I(1), I(2), I(3), I(4), N)
EACH(norm_bwd, OLD(0) + IN(0) * IN(2) + IN(1) * IN(3) + IN(4),
     fabs(OLD(0)) + fabs(IN(0) * IN(2)) + fabs(IN(1) * IN(3)) + fabs(IN(4)))
RUN(layernorm, O(0), I(0), I(1), I(2), N, r->p[0], r->p[1])
EACH(layernorm, (IN(0) - P(0)) * P(1) * IN(1) + IN(2),
     fabs((IN(0) - P(0)) * P(1) * IN(1)) + fabs(IN(2)))
RUN(layernorm_bwd, O(0), O(1), O(2), I(0), I(1), I(2), N, r->p[0], r->p[1])
static void oracle_layernorm_bwd(const row *r) {
    double m1 = 0, m2 = 0, a1 = 0, a2 = 0;
    size_t i;
#define H ((IN(1) - P(0)) * P(1))
#define T (IN(0) * IN(2))
    ALL { m1 += T; a1 += fabs(T); m2 += T * H; a2 += fabs(T * H); }
    m1 /= (double)N; m2 /= (double)N; a1 /= (double)N; a2 /= (double)N;
    ALL {
        WANT(0, OLD(0) + P(1) * (T - m1 - H * m2),
             fabs(OLD(0)) + fabs(P(1)) * (fabs(T) + a1 + fabs(H) * a2));
        WANT(1, OLD(1) + IN(0) * H, fabs(OLD(1)) + fabs(IN(0) * H));
        WANT(2, OLD(2) + IN(0), fabs(OLD(2)) + fabs(IN(0)));
    }
#undef H
#undef T
}

/* out: s, its sum */
static void run_softmax(const sdq__kernels *k, const row *r) {
    r->out[1][0] = k->softmax(r->out[0], N);
}
static void oracle_softmax(const row *r) {
    double top = -1e30, sum = 0, mag = 0;
    size_t i;
    ALL top = fmax(top, OLD(0));
    ALL {
        const double v = OLD(0), e = exp(v - top);
        WANT(0, e, e * (1 + fabs(v) + fabs(top)));
        sum += e;
        mag += r->mag[0][i];
    }
    r->want[1][0] = sum;
    r->mag[1][0] = mag;
}
RUN(softmax_tile_bwd, O(0), O(1), N, r->p[0], r->p[1], r->p[2])
static void oracle_softmax_tile_bwd(const row *r) {
    size_t i;
    ALL {
        const double v = OLD(0) * P(0), p = exp(v - P(1)), w = 1 + fabs(v) + fabs(P(1));
        const double d = OLD(1) - P(2);
        WANT(0, p, p * w);
        WANT(1, p * d * P(0), fabs(p * d * P(0)) * w);
    }
}

static void run_adamw(const sdq__kernels *k, const row *r) {
    sdq__adamw_step s;
    size_t i;
    s.lr = 1e-2f; s.beta1 = 0.9f; s.beta2 = 0.999f; s.eps = 1e-8f; s.decay = 1e-3f;
    s.c1 = 3.6900369f; s.c2 = 333.66675f; s.clip = r->p[0];
    ALL r->out[2][i] = fabsf(r->out[2][i]);
    k->adamw(r->out[0], r->out[1], r->out[2], r->in[0], N, &s);
}
static void oracle_adamw(const row *r) {
    const double b1 = (double)0.9f, b2 = (double)0.999f, lr = (double)1e-2f;
    size_t i;
    ALL {
        const double g = IN(0) * P(0), v0 = fabs(OLD(2));
        const double m = b1 * OLD(1) + (1 - b1) * g, v = b2 * v0 + (1 - b2) * g * g;
        const double root = sqrt(v * (double)333.66675f) + (double)1e-8f;
        const double mm = fabs(OLD(1)) + fabs(g), c1 = (double)3.6900369f;
        WANT(0, OLD(0) - (double)1e-3f * OLD(0) - lr * (m * c1) / root,
             fabs(OLD(0)) + lr * mm * c1 / root);
        WANT(1, m, mm);
        WANT(2, v, v);
    }
}

/* name, inputs, outputs, matrices, one-element outputs, bound in u, granted */
#define ROW(name, ins, outs, mats, scalars, bound, granted) \
    {#name, ins, outs, mats, scalars, bound, granted, run_##name, oracle_##name},
static const row_kernel row_kernels[] = {
    ROW(add, 2, 1, 0, 0, 1.0, SUBNORMAL)
    ROW(scale, 1, 1, 0, 0, 1.0, SUBNORMAL)
    ROW(axpy, 1, 1, 0, 0, 1.0, SUBNORMAL)
    ROW(lerp, 1, 1, 0, 0, 2.0, SUBNORMAL)
    ROW(vexp, 1, 1, 0, 0, 2.0, SUBNORMAL)
    ROW(silu, 1, 1, 0, 0, 6.0, TINY)
    ROW(gelu, 1, 1, 0, 0, 8.0, NORMAL)
    ROW(quick_gelu, 1, 1, 0, 0, 6.0, TINY)
    ROW(geglu, 2, 1, 0, 0, 9.0, NORMAL)
    ROW(silu_bwd, 2, 1, 0, 0, 9.0, TINY)
    ROW(gelu_bwd, 2, 1, 0, 0, 9.0, NORMAL)
    ROW(quick_gelu_bwd, 2, 1, 0, 0, 9.0, TINY)
    ROW(geglu_bwd, 3, 2, 0, 0, 9.0, NORMAL)
    ROW(sum, 1, 1, 0, 1, 6.0, SUBNORMAL)
    ROW(dot, 2, 1, 0, 1, 8.0, SUBNORMAL)
    ROW(sqdist, 2, 1, 0, 1, 9.0, SUBNORMAL)
    ROW(absdist, 2, 1, 0, 1, 7.0, SUBNORMAL)
    ROW(sqdev, 1, 1, 0, 1, 12.0, SUBNORMAL)
    ROW(minmax, 1, 2, 0, 3, 0.0, SUBNORMAL)
    ROW(minmax_cols, 1, 2, 1, 0, 0.0, SUBNORMAL)
    ROW(colsum, 1, 1, 1, 0, 12.0, SUBNORMAL)
    ROW(colsqdev, 2, 1, 1, 0, 36.0, SUBNORMAL)
    ROW(colsum2, 2, 2, 3, 0, 15.0, SUBNORMAL)
    ROW(affine, 3, 1, 0, 0, 1.0, SUBNORMAL)
    ROW(affine_silu, 3, 1, 0, 0, 6.0, TINY)
    ROW(affine_silu_bwd, 4, 1, 0, 0, 9.0, TINY)
    ROW(norm_bwd, 5, 1, 0, 0, 6.0, SUBNORMAL)
    ROW(layernorm, 3, 1, 0, 0, 6.0, SUBNORMAL)
    ROW(layernorm_bwd, 3, 3, 0, 0, 10.0, SUBNORMAL)
    ROW(softmax, 0, 2, 0, 2, 5.0, NORMAL)
    ROW(softmax_tile_bwd, 0, 2, 0, 0, 6.0, NORMAL)
    ROW(adamw, 1, 3, 0, 0, 9.0, SUBNORMAL)
};

static size_t out_len(const row_kernel *rk, const row *r, int o) {
    return rk->scalars >> o & 1 ? 1 : r->n;
}
static size_t in_len(const row_kernel *rk, const row *r, int a) {
    return rk->mats >> a & 1 ? (r->rows - 1) * r->ld + r->n : r->n;
}

typedef struct row_memory {
    guarded in[5], out[3];
    float data[5][MAX_MAT], old[3][MAX_MAT], ref[3][MAX_MAT];
    double want[3][MAX_MAT], mag[3][MAX_MAT];
    double worst;
} row_memory;

static void row_fill(row_memory *w, const row_kernel *rk, row *r, int fill) {
    size_t i;
    int a;
    for (a = 0; a < rk->ins; a++)
        for (i = 0; i < in_len(rk, r, a); i++) w->data[a][i] = random_value(fill);
    for (a = 0; a < rk->outs; a++)
        for (i = 0; i < out_len(rk, r, a); i++) w->old[a][i] = random_value(fill);
    for (a = 0; a < 8; a++) r->p[a] = sdqt_uniform(0.25f, 2.0f);
}

static void row_place(row_memory *w, const row_kernel *rk, row *r, int at_end) {
    int a;
    for (a = 0; a < rk->ins; a++) {
        float *p = (float *)guard_place(&w->in[a], 4 * in_len(rk, r, a), at_end);
        memcpy(p, w->data[a], 4 * in_len(rk, r, a));
        r->in[a] = p;
    }
    for (a = 0; a < rk->outs; a++) {
        r->out[a] = (float *)guard_place(&w->out[a], 4 * out_len(rk, r, a), at_end);
        memcpy(r->out[a], w->old[a], 4 * out_len(rk, r, a));
        r->want[a] = w->want[a];
        r->mag[a] = w->mag[a];
    }
}

static void row_compare(row_memory *w, const row_kernel *rk, const row *r, int fill) {
    size_t i;
    int a;
    for (a = 0; a < rk->ins; a++)
        SDQT_THAT(memcmp(r->in[a], w->data[a], 4 * in_len(rk, r, a)) == 0, "input %d changed", a);
    for (a = 0; a < rk->outs; a++) {
        SDQT_THAT(guard_intact(&w->out[a], r->out[a], 4 * out_len(rk, r, a)),
                  "n=%zu: output %d written outside", r->n, a);
        for (i = 0; i < out_len(rk, r, a); i++) {
            const float got = r->out[a][i];
            if (!SDQT_THAT(same(got, w->ref[a][i]), "n=%zu fill=%d: output %d[%zu] is %a, "
                           "scalar %a", r->n, fill, a, i, (double)got, (double)w->ref[a][i]))
                return;
            if (fill != FILL_SPECIAL || rk->bound == 0.0) {
                const double e = error_in_u(got, w->want[a][i], w->mag[a][i], rk->granted);
                if (e > w->worst) w->worst = e;
                if (!SDQT_THAT(e <= rk->bound, "n=%zu fill=%d: output %d[%zu] is %.9g, "
                               "oracle %.17g, error %g u", r->n, fill, a, i, (double)got,
                               w->want[a][i], e))
                    return;
            }
        }
    }
}

static void row_once(row_memory *w, const row_kernel *rk, row *r, int tier, int fill) {
    int at_end, a;
    row_fill(w, rk, r, fill);
    row_place(w, rk, r, 1);
    rk->oracle(r);
    rk->run(sdq__k_table(SDQ_TIER_SCALAR), r);
    for (a = 0; a < rk->outs; a++) memcpy(w->ref[a], r->out[a], 4 * out_len(rk, r, a));
    for (at_end = 0; at_end < 2; at_end++) {
        row_place(w, rk, r, at_end);
        rk->run(sdq__k_table((sdq_tier)tier), r);
        row_compare(w, rk, r, fill);
    }
}

static void test_row(const row_kernel *rk, int tier) {
    row_memory *w = (row_memory *)malloc(sizeof *w);
    row r;
    size_t n;
    int a, fill;
    if (!SDQT_CHECK(w != NULL)) return;
    w->worst = 0;
    for (a = 0; a < 5; a++) w->in[a] = guard_new(4 * MAX_MAT);
    for (a = 0; a < 3; a++) w->out[a] = guard_new(4 * MAX_MAT);
    for (n = 1; n <= MAX_N; n = n < 70 ? n + 1 : n == 70 ? 127 : n == 127 ? 128 : n + 872)
        for (fill = 0; fill < FILL_KINDS; fill++) {
            memset(&r, 0, sizeof r);
            r.n = n;
            r.rows = n > 70 ? 4 : 1 + sdqt_below(33);
            r.ld = n + sdqt_below(5);
            row_once(w, rk, &r, tier, fill);
        }
#ifdef SHOW_ERRORS
    printf("%-18s %8.3f u (bound %g)\n", rk->name, w->worst, rk->bound);
#endif
    for (a = 0; a < 5; a++) guard_free(&w->in[a]);
    for (a = 0; a < 3; a++) guard_free(&w->out[a]);
    free(w);
}

static void test_rows(int tier) {
    size_t i;
    for (i = 0; i < sizeof row_kernels / sizeof row_kernels[0]; i++) {
        const int before = sdqt.errors;
        test_row(&row_kernels[i], tier);
        SDQT_THAT(sdqt.errors == before, "kernel %s", row_kernels[i].name);
    }
}

/* ---- functions over their whole range ---- */

/* Every 997th float: NaNs and infinities, subnormals, both signs. */
static void test_functions(int tier) {
    static const struct { const char *name; double bound, granted; } f[] = {
        {"exp", 2.0, SUBNORMAL}, {"silu", 6.0, TINY}, {"gelu", 9.0, NORMAL}
    };
    const sdq__kernels *k = sdq__k_table((sdq_tier)tier), *s = sdq__k_table(SDQ_TIER_SCALAR);
    enum { BLOCK = 4096 };
    float x[BLOCK], y[BLOCK], z[BLOCK];
    double worst[3] = {0, 0, 0};
    uint64_t u = sdqt_below(997);
    while (u < UINT64_C(0x100000000)) {
        size_t n = 0, i;
        int a;
        for (; n < BLOCK && u < UINT64_C(0x100000000); n++, u += 997)
            x[n] = sdq__u_float((uint32_t)u);
        for (a = 0; a < 3; a++) {
            (a == 0 ? k->vexp : a == 1 ? k->silu : k->gelu)(y, x, n);
            (a == 0 ? s->vexp : a == 1 ? s->silu : s->gelu)(z, x, n);
            for (i = 0; i < n; i++) {
                const double v = (double)x[i];
                const double w = a == 0 ? exp(v) : isinf(v) && v < 0 ? (a == 1 ? (double)NAN : 0.0)
                                 : a == 1 ? v * sigmoid(v) : gelu(v);
                const double e = error_in_u(y[i], w, fabs(w), f[a].granted);
                if (e > worst[a]) worst[a] = e;
                if (!SDQT_THAT(e <= f[a].bound, "%s(%.9g) is %.9g, oracle %.17g, error %g u",
                               f[a].name, v, (double)y[i], w, e)) return;
                if (!SDQT_THAT(same(y[i], z[i]), "%s(%.9g): %a, scalar %a", f[a].name, v,
                               (double)y[i], (double)z[i])) return;
            }
        }
    }
#ifdef SHOW_ERRORS
    printf("whole range: exp %.3f u, silu %.3f u, gelu %.3f u\n", worst[0], worst[1], worst[2]);
#endif
    x[0] = 0.0f; x[1] = -0.0f; x[2] = INFINITY; x[3] = -INFINITY; x[4] = 89.0f; x[5] = -104.0f;
    k->vexp(y, x, 6);
    SDQT_CHECK(y[0] == 1.0f && y[1] == 1.0f && isinf(y[2]) && y[3] == 0.0f);
    SDQT_CHECK(isinf(y[4]) && y[5] == 0.0f && !signbit(y[5]));
}

/* ---- quantization ---- */

static int quantize_oracle(float x, float inv, int32_t z, int lo, int hi) {
    const float t = x * inv;        /* one float product, as defined; rint and the rest in double */
    double v;
    if (t != t) v = 0;
    else v = (double)t;
    v = rint(v) + (double)z;
    return v < lo ? lo : v > hi ? hi : (int)v;
}
static void quantize_once(const sdq__kernels *k, guarded *gx, guarded *gq, size_t n, int at_end) {
    const size_t xb = 4 * n;
    float *x = (float *)guard_place(gx, xb, at_end);
    unsigned char *q = (unsigned char *)guard_place(gq, n, at_end);
    const float inv = sdqt_below(8) ? sdqt_uniform(0.01f, 40.0f) : 1.0f;
    const int32_t z = (int32_t)sdqt_below(256);
    size_t i;
    for (i = 0; i < n; i++) {
        x[i] = random_value(FILL_SPECIAL);
        if (inv == 1.0f && sdqt_below(2)) x[i] = (float)((int)sdqt_below(700) - 350) * 0.5f;
    }
    k->quantize_u8(q, x, n, inv, z);
    for (i = 0; i < n; i++)
        SDQT_THAT(q[i] == quantize_oracle(x[i], inv, z, 0, 255), "u8: n=%zu %.9g * %.9g z=%d: %d",
                  n, (double)x[i], (double)inv, (int)z, q[i]);
    SDQT_THAT(guard_intact(gq, q, n), "quantize_u8 n=%zu writes outside", n);
    k->quantize_s8((int8_t *)q, x, n, inv);
    for (i = 0; i < n; i++)
        SDQT_THAT((int8_t)q[i] == quantize_oracle(x[i], inv, 0, -128, 127),
                  "s8: n=%zu %.9g * %.9g: %d", n, (double)x[i], (double)inv, (int8_t)q[i]);
    SDQT_THAT(guard_intact(gq, q, n), "quantize_s8 n=%zu writes outside", n);
    for (i = 0; i < n; i++) q[i] = (unsigned char)sdqt_rand();
    k->dequantize_u8(x, q, n, inv, z);
    for (i = 0; i < n; i++)
        SDQT_THAT(x[i] == (float)((double)(q[i] - z) * (double)inv), "dequantize n=%zu", n);
    SDQT_THAT(guard_intact(gx, x, xb), "dequantize_u8 n=%zu writes outside", n);
    k->dequantize_s8(x, (const int8_t *)q, n, inv);
    for (i = 0; i < n; i++)
        SDQT_THAT(x[i] == (float)((double)(int8_t)q[i] * (double)inv), "dequantize s8 n=%zu", n);
    SDQT_THAT(guard_intact(gx, x, xb), "dequantize_s8 n=%zu writes outside", n);
}
static void quantize_s16_once(const sdq__kernels *k, guarded *gx, guarded *gq, size_t n,
                              int at_end) {
    float *x = (float *)guard_place(gx, 4 * n, at_end);
    int16_t *q = (int16_t *)guard_place(gq, 2 * n, at_end);
    const float inv = sdqt_uniform(0.01f, 20000.0f);
    const int most = sdqt_below(2) ? 32767 : (int)sdqt_below(32767) + 1;
    size_t i;
    for (i = 0; i < n; i++) x[i] = random_value(FILL_SPECIAL);
    k->quantize_s16(q, x, n, inv, (float)most);
    for (i = 0; i < n; i++)
        SDQT_THAT(q[i] == quantize_oracle(x[i], inv, 0, -most, most), "s16: n=%zu %.9g * %.9g: %d",
                  n, (double)x[i], (double)inv, q[i]);
    SDQT_THAT(guard_intact(gq, q, 2 * n), "quantize_s16 n=%zu writes outside", n);
}

/* Straight through a quantizer of weights. The sum is compared with one in double: n products, of
 * which each lane adds n/16 and the tree 4 more. */
static void ste_once(const sdq__kernels *k, guarded *gd, guarded *gg, guarded *gw, size_t n,
                     int at_end) {
    float *dw = (float *)guard_place(gd, 4 * n, at_end);
    float *g = (float *)guard_place(gg, 4 * n, at_end);
    float *w = (float *)guard_place(gw, 4 * n, at_end);
    const float high = n % 2 ? 127.0f : 7.0f, low = -high - 1.0f;
    const float inv = high * sdqt_uniform(0.1f, 1.5f);
    float old[MAX_N], sum;
    double want = 0, mag = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        g[i] = sdqt_normal();
        w[i] = sdqt_normal();
        old[i] = dw[i] = sdqt_normal();
        if (i % 7 == 0) w[i] = (i % 2 ? low : high) / inv;
    }
    sum = k->ste(dw, g, w, n, inv, low, high);
    for (i = 0; i < n; i++) {
        const float v = w[i] * inv;
        const double t = rint((double)v), in = t >= (double)low && t <= (double)high;
        const double slope = in ? (double)(float)(t - (double)v) : (double)(t < 0 ? low : high);
        SDQT_THAT(dw[i] == (in ? old[i] + g[i] : old[i]), "ste n=%zu %.9g", n, (double)v);
        want += (double)g[i] * slope;
        mag += fabs((double)g[i] * slope);
    }
    SDQT_THAT(fabs((double)sum - want) <= 8.0 * U * mag + SUBNORMAL, "ste n=%zu sum %.9g want %.9g",
              n, (double)sum, want);
    SDQT_THAT(guard_intact(gd, dw, 4 * n), "ste n=%zu writes outside", n);
}
static void test_ste(int tier) {
    guarded gd = guard_new(4 * MAX_N), gg = guard_new(4 * MAX_N), gw = guard_new(4 * MAX_N);
    size_t n;
    for (n = 1; n <= 40; n++) {
        ste_once(sdq__k_table((sdq_tier)tier), &gd, &gg, &gw, n, 0);
        ste_once(sdq__k_table((sdq_tier)tier), &gd, &gg, &gw, n, 1);
    }
    guard_free(&gd);
    guard_free(&gg);
    guard_free(&gw);
}

/* AdamW with moments in bytes: the weights are those of the float kernel from the decoded moments,
 * to the bit, and the new bytes are the nearest codes of its moments. */
static float code_m(int8_t q, float s) { return (float)q / 127.0f * fabsf((float)q / 127.0f) * s; }
static float code_v(uint8_t q, float s) {
    const float b = (float)q / 255.0f;
    return b * b * (b * b) * s;
}
static void adamw8_once(const sdq__kernels *k, size_t n, int first) {
    float w[256], w2[256], m[256], v[256], g[256], s[2] = {0, 0}, most[2] = {0, 0};
    int8_t m8[257];
    uint8_t v8[257];
    sdq__adamw_step step;
    size_t i;
    step.lr = 1e-2f; step.beta1 = 0.9f; step.beta2 = 0.999f; step.eps = 1e-8f; step.decay = 1e-3f;
    step.c1 = 3.6900369f; step.c2 = 333.66675f; step.clip = 0.5f;
    for (i = 0; i < n; i++) {
        w[i] = w2[i] = sdqt_normal();
        g[i] = sdqt_below(9) ? sdqt_normal() : 0.0f;
        m8[i] = (int8_t)(first ? 0 : (int)sdqt_below(255) - 127);
        v8[i] = (uint8_t)(first ? 0 : sdqt_below(256));
    }
    if (!first) { s[0] = sdqt_uniform(0.01f, 2.0f); s[1] = sdqt_uniform(0.01f, 2.0f); }
    for (i = 0; i < n; i++) {       /* decoded as the kernel does, operation by operation */
        const float a = (float)m8[i] * (1.0f / 127.0f), b = (float)v8[i] * (1.0f / 255.0f);
        m[i] = a * fabsf(a) * s[0];
        v[i] = b * b * (b * b) * s[1];
    }
    m8[n] = 77;
    v8[n] = 99;
    k->adamw8(w, m8, v8, s, g, n, &step);
    sdq__k_table(SDQ_TIER_SCALAR)->adamw(w2, m, v, g, n, &step);
    SDQT_CHECK(m8[n] == 77 && v8[n] == 99);
    for (i = 0; i < n; i++) {
        SDQT_THAT(w[i] == w2[i], "adamw8 n=%zu: weight %zu is %.9g, not %.9g", n, i, (double)w[i],
                  (double)w2[i]);
        most[0] = fabsf(m[i]) > most[0] ? fabsf(m[i]) : most[0];
        most[1] = v[i] > most[1] ? v[i] : most[1];
    }
    SDQT_CHECK(s[0] == most[0] && s[1] == most[1]);
    for (i = 0; i < n; i++) {       /* half a step of the code: sqrt and its root are off by 0.5 */
        const double a = sqrt(fabs((double)m[i]) / (double)s[0]) * 127;
        const double b = sqrt(sqrt((double)v[i] / (double)s[1])) * 255;
        SDQT_THAT(s[0] == 0 || (fabs(fabs((double)m8[i]) - a) <= 0.5001 && m8[i] * m[i] >= 0),
                  "m8 %d for %g", m8[i], a);
        SDQT_THAT(s[1] == 0 || fabs((double)v8[i] - b) <= 0.5001 || (v8[i] == 1 && b > 0),
                  "v8 %d for %g", v8[i], b);
        SDQT_CHECK(v[i] == 0 || v8[i] > 0);
        SDQT_NEAR(code_m(m8[i], s[0]), m[i], 0.0081 * (double)s[0]);
        SDQT_NEAR(code_v(v8[i], s[1]), v[i], 0.0081 * (double)s[1]);
    }
}
static void test_adamw8(int tier) {
    size_t n;
    for (n = 1; n <= 256; n = n < 40 ? n + 1 : n + 27) {
        adamw8_once(sdq__k_table((sdq_tier)tier), n, 1);
        adamw8_once(sdq__k_table((sdq_tier)tier), n, 0);
    }
    adamw8_once(sdq__k_table((sdq_tier)tier), 256, 0);
}

static void test_quantize(int tier) {
    guarded gx = guard_new(4 * MAX_N), gq = guard_new(2 * MAX_N);
    size_t n;
    for (n = 1; n <= MAX_N; n = n < 70 ? n + 1 : n == 70 ? 127 : n + 873) {
        quantize_once(sdq__k_table((sdq_tier)tier), &gx, &gq, n, 0);
        quantize_once(sdq__k_table((sdq_tier)tier), &gx, &gq, n, 1);
        quantize_s16_once(sdq__k_table((sdq_tier)tier), &gx, &gq, n, 0);
        quantize_s16_once(sdq__k_table((sdq_tier)tier), &gx, &gq, n, 1);
    }
    guard_free(&gx);
    guard_free(&gq);
}

/* Rows quantized by the range of their own elements: scale and zero point from the formula, in
 * float as it is defined; what is between the rows stays. */
static void quantize_rows_once(const sdq__kernels *k, guarded *gx, guarded *gq, size_t rows,
                               size_t n, int at_end) {
    const size_t ldx = n + sdqt_below(5), ldq = n + sdqt_below(5), lds = 1 + sdqt_below(3);
    const size_t nx = (rows - 1) * ldx + n, nq = (rows - 1) * ldq + n;
    float *x = (float *)guard_place(gx, 4 * nx, at_end), s[40 * 3];
    unsigned char *q = (unsigned char *)guard_place(gq, nq, at_end);
    const int fill = (int)sdqt_below(FILL_KINDS);
    int32_t z[40 * 3];
    size_t r, i;
    for (i = 0; i < nx; i++) x[i] = random_value(fill);
    for (i = 0; i < 40 * 3; i++) { s[i] = -1.0f; z[i] = -1; }
    for (r = 0; fill == FILL_SPECIAL && r < rows; r++) x[r * ldx] = sdqt_below(2) ? NAN : INFINITY;
    k->quantize_rows(q, ldq, x, ldx, rows, n, s, z, lds);
    for (r = 0; r < rows; r++) {
        float lo = 0.0f, hi = 0.0f, scale;
        double zero;
        for (i = 0; i < n; i++) {
            if (x[r * ldx + i] < lo) lo = x[r * ldx + i];
            if (x[r * ldx + i] > hi) hi = x[r * ldx + i];
        }
        scale = (hi - lo) / 255.0f;
        if (!(scale > 1.1920928955078125e-7f)) scale = 1.1920928955078125e-7f;
        zero = -rint((double)(lo / scale));
        zero = !(zero > 0) ? 0 : zero > 255 ? 255 : zero;
        SDQT_THAT(same(s[r * lds], scale) && z[r * lds] == (int)zero,
                  "rows=%zu n=%zu row %zu: scale %.9g zero %d, expected %.9g %d", rows, n, r,
                  (double)s[r * lds], (int)z[r * lds], (double)scale, (int)zero);
        for (i = 0; i < n; i++)
            SDQT_THAT(q[r * ldq + i] == quantize_oracle(x[r * ldx + i], 1.0f / scale, (int)zero, 0,
                                                        255),
                      "rows=%zu n=%zu row %zu: %.9g is %d", rows, n, r, (double)x[r * ldx + i],
                      q[r * ldq + i]);
        for (i = n; i < ldq && r + 1 < rows; i++) SDQT_CHECK(q[r * ldq + i] == 0xa5);
    }
    for (i = 0; i < 40 * 3; i++)
        if (i % lds != 0 || i / lds >= rows) SDQT_CHECK(s[i] == -1.0f && z[i] == -1);
    SDQT_THAT(guard_intact(gq, q, nq), "quantize_rows rows=%zu n=%zu writes outside", rows, n);
}
static void test_quantize_rows(int tier) {
    guarded gx = guard_new(4 * 40 * 140), gq = guard_new(40 * 140);
    size_t n, i;
    for (n = 1; n <= 130; n = n < 40 ? n + 1 : n + 45)
        for (i = 0; i < 4; i++)
            quantize_rows_once(sdq__k_table((sdq_tier)tier), &gx, &gq, 1 + sdqt_below(40), n,
                               (int)i & 1);
    guard_free(&gx);
    guard_free(&gq);
}

/* ---- Winograd's transforms: L x L^T of every element, against matrices in doubles ---- */

static const double win_b[6][6] = {{4, 0, -5, 0, 1, 0}, {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
    {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
static const double win_g[6][6] = {{.25}, {-1 / 6., -1 / 6., -1 / 6.}, {-1 / 6., 1 / 6., -1 / 6.},
    {1 / 24., 1 / 12., 1 / 6.}, {1 / 24., -1 / 12., 1 / 6.}, {0, 0, 1}};
static const double win_a[6][6] = {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0},
    {0, 1, -1, 8, -8, 1}};

/* Element (i,j) of L x L^T, x of k x k; *mag: the same of absolute values. */
static double sandwich(const double l[6][6], const double *x, size_t k, size_t i, size_t j,
                       double *mag) {
    double sum = 0;
    size_t r, c;
    *mag = 0;
    for (r = 0; r < k; r++)
        for (c = 0; c < k; c++) {
            sum += l[i][r] * x[r * k + c] * l[j][c];
            *mag += fabs(l[i][r] * x[r * k + c] * l[j][c]);
        }
    return sum;
}

typedef struct win_buffers { guarded in, out; float *x, *y; } win_buffers;

/* Which: 0 input, 1 weight, 2 output. in and out: numbers on one side of a square. */
static void winograd_once(int tier, win_buffers *w, int which, size_t n) {
    static const size_t in[] = {6, 3, 6}, out[] = {6, 6, 4};
    static const double (*const matrix[])[6] = {win_b, win_g, win_a};
    const size_t k = in[which], m = out[which], ld = n + 3;
    const size_t nx = (k * k - 1) * ld + n, ny = (m * m - 1) * ld + n;
    float plain[36 * 64], bias[64], res[16 * 64];
    const float *d[36], *r[16];
    float *to[2][16];
    size_t i, j, c, t;
    w->x = (float *)guard_place(&w->in, 4 * nx, 1);
    w->y = (float *)guard_place(&w->out, 4 * ny, 1);
    for (i = 0; i < nx; i++) w->x[i] = sdqt_normal();
    for (i = 0; i < 64; i++) bias[i] = which == 2 ? sdqt_normal() : 0;
    for (i = 0; i < 16 * 64; i++) res[i] = which == 2 ? sdqt_normal() : 0;
    for (i = 0; i < 36; i++) d[i] = w->x + (i < k * k ? i : 0) * ld;
    for (i = 0; i < 16; i++) {
        r[i] = res + i * 64;
        to[0][i] = i == 5 ? NULL : plain + i * ld;      /* a pixel outside the picture */
        to[1][i] = i == 5 ? NULL : w->y + (i < m * m ? i : 0) * ld;
    }
    memset(plain, 0xa5, sizeof plain);
    for (t = 0; t < 2; t++) {
        const sdq__kernels *f = sdq__k_table(t ? (sdq_tier)tier : SDQ_TIER_SCALAR);
        float *y = t ? w->y : plain;
        if (which == 0) f->win_input(y, ld, d, n);
        else if (which == 1) f->win_weight(y, ld, w->x, ld, n);
        else f->win_output(to[t], w->x, ld, bias, r, n);
    }
    SDQT_THAT(memcmp(plain, w->y, 4 * ny) == 0, "transform %d, n=%zu: tiers differ", which, n);
    SDQT_CHECK(guard_intact(&w->out, w->y, 4 * ny));
    for (i = 0; i < m * m; i++)
        for (c = 0; c < n; c++) {
            double x[36], mag, want;
            if (which == 2 && i == 5) continue;
            for (j = 0; j < k * k; j++) x[j] = (double)w->x[j * ld + c];
            want = sandwich(matrix[which], x, k, i / m, i % m, &mag)
                 + (double)bias[c] + (double)res[(i % 16) * 64 + c];
            mag += fabs((double)bias[c]) + fabs((double)res[(i % 16) * 64 + c]);
            SDQT_NEAR(w->y[i * ld + c], want, 8 * 6e-8 * mag);
        }
}
static void test_winograd(int tier) {
    win_buffers w;
    size_t n;
    int which;
    w.in = guard_new(4 * 36 * 64);
    w.out = guard_new(4 * 36 * 64);
    for (n = 1; n <= 50; n += n < 34 ? 1 : 16)
        for (which = 0; which < 3; which++) winograd_once(tier, &w, which, n);
    guard_free(&w.in);
    guard_free(&w.out);
}

/* softmax_cols, _u8 and _s16 against their definition, and the same bits as on the scalar tier;
 * nothing is written behind the rows. top 2^x may fall to either side of an edge. */
typedef enum { COLS_F32, COLS_U8, COLS_S16 } cols_kind;
typedef struct cols { float m[32], l[32], alpha[32], beta[32]; } cols;

static void cols_call(const sdq__kernels *k, cols_kind kind, void *p, float *s, size_t n, cols *c) {
    if (kind == COLS_F32) k->softmax_cols(s, n, 0.7f, c->m, c->l, c->alpha);
    else if (kind == COLS_U8)
        k->softmax_cols_u8((uint8_t *)p, s, n, 0.7f, c->m, c->l, c->alpha, c->beta);
    else k->softmax_cols_s16((int16_t *)p, s, n, 0.7f, c->m, c->l, c->alpha, c->beta);
}
/* Weight of row i, column j. */
static int cols_weight(const void *p, cols_kind kind, size_t i, size_t j) {
    if (kind == COLS_S16) return ((const int16_t *)p)[(i / 2 * 32 + j) * 2 + i % 2];
    return ((const uint8_t *)p)[(i / 4 * 32 + j) * 4 + i % 4];
}
/* Column j of integer weights: c after, old before. */
static void cols_check_int(cols_kind kind, const void *p, const float *s, size_t n, size_t j,
                           const cols *c, const cols *before) {
    const double most = kind == COLS_S16 ? 2048 : 255, error = kind == COLS_S16 ? 6e-6 : 1.3e-4;
    const double old = (double)before->m[j];
    const size_t per = kind == COLS_S16 ? 2 : 4;
    double top = -1e30, sum = 0, all;
    size_t i;
    for (i = 0; i < n; i++) top = fmax(top, (double)s[i * 32 + j]);
    top *= (double)0.7f;
    all = fmax(top, old);
    for (i = 0; i < n; i++) {
        const double v = (double)s[i * 32 + j];
        const double e = isnan(v) ? 0 : most * exp2(v * (double)0.7f - top);
        const int q = cols_weight(p, kind, i, j);
        SDQT_THAT(fabs(q - e) < 0.5 + error * e, "weight %d for %g", q, e);
        sum += q;
    }
    for (; i % per; i++) SDQT_CHECK(cols_weight(p, kind, i, j) == 0);
    SDQT_NEAR(c->m[j], all, 1e-6 * fabs(all));
    SDQT_NEAR(c->alpha[j], exp2(old - all), 2e-6 * (1 + fabs(all)));
    SDQT_NEAR(c->beta[j], exp2(top - all), 2e-6 * (1 + fabs(all)));
    SDQT_NEAR(c->l[j], (double)before->l[j] * exp2(old - all) + sum * exp2(top - all),
              3e-6 * (most + 45 + sum) * 20);
}
/* The same of floats: e are the weights, s the scores they were. */
static void cols_check(const float *e, const float *s, size_t n, size_t j, const cols *c,
                       const cols *before) {
    const double old = (double)before->m[j];
    double top = old, sum = 0, w;
    size_t i;
    for (i = 0; i < n; i++) top = fmax(top, (double)(s[i * 32 + j] * 0.7f));
    for (i = 0; i < n; i++) {
        const double v = (double)s[i * 32 + j], x = exp2(v * (double)0.7f - top);
        if (isnan(v)) SDQT_CHECK(isnan(e[i * 32 + j]));
        else SDQT_NEAR(e[i * 32 + j], x, 6e-7 * x * (1 + fabs(v < -1e30 ? 0 : v) + fabs(top)));
        sum += x;
    }
    w = 1 + fabs(old > -1e30 ? old : 0) + fabs(top);
    SDQT_NEAR(c->m[j], top, 0);
    SDQT_NEAR(c->alpha[j], exp2(old - top), 6e-7 * w);
    if (isnan(sum)) SDQT_CHECK(isnan(c->l[j]));
    else SDQT_NEAR(c->l[j], (double)before->l[j] * exp2(old - top) + sum,
                   1e-6 * w * ((double)before->l[j] + sum) * 5);
}
static void cols_once(const sdq__kernels *k, cols_kind kind, guarded *gs, guarded *gp, size_t n) {
    static float scores[256 * 32], ref[256 * 32];
    static uint8_t want[256 * 64];
    const size_t per = kind == COLS_S16 ? 2 : 4, bytes = (n + per - 1) / per * 128;
    float *s = (float *)guard_place(gs, 128 * n, 1);
    uint8_t *p = (uint8_t *)guard_place(gp, bytes, 1);
    cols old, c[2];
    size_t i, j;
    memset(&old, 0, sizeof old);
    for (j = 0; j < 32; j++) {
        old.m[j] = sdqt_below(3) ? sdqt_normal() : -INFINITY;
        old.l[j] = old.m[j] > -1e30f ? 1 + fabsf(sdqt_normal()) : 0;
        for (i = 0; i < n; i++) scores[i * 32 + j] = 4 * sdqt_normal();
        if (n > 3 && sdqt_below(8) == 0) scores[sdqt_below(n) * 32 + j] = NAN;
        if (n > 3 && sdqt_below(8) == 0) scores[sdqt_below(n) * 32 + j] = -INFINITY;
    }
    c[0] = c[1] = old;
    memcpy(s, scores, 128 * n);
    memcpy(ref, scores, 128 * n);
    cols_call(sdq__k_table(SDQ_TIER_SCALAR), kind, want, ref, n, &c[1]);
    for (j = 0; j < 32; j++)
        if (kind == COLS_F32) cols_check(ref, scores, n, j, &c[1], &old);
        else cols_check_int(kind, want, scores, n, j, &c[1], &old);
    cols_call(k, kind, p, s, n, &c[0]);
    for (j = 0; j < 32; j++)
        SDQT_THAT(same(c[0].m[j], c[1].m[j]) && same(c[0].l[j], c[1].l[j])
                  && same(c[0].alpha[j], c[1].alpha[j]) && same(c[0].beta[j], c[1].beta[j]),
                  "softmax_cols %d: column %zu, n=%zu differs", (int)kind, j, n);
    for (i = 0; i < 32 * n; i++) SDQT_CHECK(same(s[i], ref[i]));
    if (kind != COLS_F32) SDQT_CHECK(memcmp(p, want, bytes) == 0);
    SDQT_CHECK(guard_intact(gs, s, 128 * n));
    SDQT_CHECK(guard_intact(gp, p, bytes));
}
static void test_softmax_cols(int tier) {
    const sdq__kernels *k = sdq__k_table((sdq_tier)tier);
    guarded gs = guard_new(128 * 256), gp = guard_new(64 * 256);
    size_t n;
    for (n = 1; n <= 256; n = n < 40 ? n + 1 : n + 27) {
        cols_once(k, COLS_F32, &gs, &gp, n);
        cols_once(k, COLS_U8, &gs, &gp, n);
        cols_once(k, COLS_S16, &gs, &gp, n);
    }
    guard_free(&gs);
    guard_free(&gp);
}

static void test_mul_cols(int tier) {
    const sdq__kernels *k = sdq__k_table((sdq_tier)tier);
    guarded g = guard_new(128 * 50);
    float a[32], old[32 * 50];
    size_t n, i;
    for (n = 1; n <= 50; n++) {
        float *y = (float *)guard_place(&g, 128 * n, 1);
        for (i = 0; i < 32; i++) a[i] = sdqt_normal();
        for (i = 0; i < 32 * n; i++) old[i] = y[i] = sdqt_normal();
        k->mul_cols(y, a, n);
        for (i = 0; i < 32 * n; i++)
            SDQT_THAT(same(y[i], old[i] * a[i % 32]), "mul_cols: column %zu of %zu", i % 32, n);
        SDQT_CHECK(guard_intact(&g, y, 128 * n));
    }
    guard_free(&g);
}

/* ---- half precision: all 65536 values ---- */

static double f16_oracle(unsigned h) {
    const int e = (int)(h >> 10 & 31), m = (int)(h & 1023);
    const double v = e == 31 ? (m ? (double)NAN : (double)INFINITY)
                     : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}
static void test_half(int tier) {
    const sdq__kernels *k = sdq__k_table((sdq_tier)tier), *s = sdq__k_table(SDQ_TIER_SCALAR);
    guarded gx = guard_new(2 * 70), gy = guard_new(4 * 70);
    unsigned h = 0;
    size_t n = 1, i;
    for (; h < 65536; h += (unsigned)n, n = n % 70 + 1) {
        uint16_t *x = (uint16_t *)guard_place(&gx, 2 * n, 1);
        float *y = (float *)guard_place(&gy, 4 * n, 1), z[70];
        for (i = 0; i < n; i++) x[i] = (uint16_t)(h + i);
        k->from_f16(y, x, n);
        s->from_f16(z, x, n);
        SDQT_THAT(memcmp(y, z, 4 * n) == 0, "from_f16 from %#x: not the scalar bits", h);
        for (i = 0; i < n; i++)
            SDQT_THAT(same(y[i], (float)f16_oracle(x[i])), "from_f16(%#x)", x[i]);
        k->from_bf16(y, x, n);
        for (i = 0; i < n; i++)
            SDQT_THAT(sdq__u_bits(y[i]) == (uint32_t)x[i] << 16, "from_bf16(%#x)", x[i]);
        SDQT_THAT(guard_intact(&gy, y, 4 * n), "from_bf16 n=%zu writes outside", n);
    }
    guard_free(&gx);
    guard_free(&gy);
}

/* ---- GEMM tiles: the definitions as plain loops ---- */

enum { A_ROWS = 12 * 9, A_LEN = 160, B_LEN = 9 * 40 * 32, Y_LEN = 12 * 37 };

typedef struct tile_memory {
    guarded a[A_ROWS], b, bias, res, y, s, z, wsum, sw;
    float old[Y_LEN], want[Y_LEN];
} tile_memory;

static tile_memory *tile_new(void) {
    tile_memory *w = (tile_memory *)malloc(sizeof *w);
    int i;
    if (!w) { printf("out of memory\n"); exit(2); }
    for (i = 0; i < A_ROWS; i++) w->a[i] = guard_new(4 * A_LEN);
    w->b = guard_new(4 * B_LEN);
    w->bias = guard_new(4 * 32);
    w->res = guard_new(4 * Y_LEN);
    w->y = guard_new(4 * Y_LEN);
    w->s = guard_new(4 * 12 * 360);
    w->z = guard_new(4 * 12 * 360);
    w->wsum = guard_new(4 * 32 * 360);
    w->sw = guard_new(4 * 32);
    return w;
}
static void tile_free(tile_memory *w) {
    guarded *g[8];
    int i;
    g[0] = &w->b; g[1] = &w->bias; g[2] = &w->res; g[3] = &w->y;
    g[4] = &w->s; g[5] = &w->z; g[6] = &w->wsum; g[7] = &w->sw;
    for (i = 0; i < A_ROWS; i++) guard_free(&w->a[i]);
    for (i = 0; i < 8; i++) guard_free(g[i]);
    free(w);
}
static float *tile_floats(guarded *g, size_t n, int at_end) {
    float *p = (float *)guard_place(g, 4 * n, at_end);
    size_t i;
    for (i = 0; i < n; i++) p[i] = random_value(FILL_NORMAL);
    return p;
}
/* y, with what was there before in w->old and w->want. */
static float *tile_y(tile_memory *w, size_t len, int at_end) {
    float *y = tile_floats(&w->y, len, at_end);
    memcpy(w->old, y, 4 * len);
    memcpy(w->want, y, 4 * len);
    return y;
}
/* To the bit, and columns nr.. of y and all around it untouched. */
static void tile_compare(const tile_memory *w, const float *y, size_t len, size_t mr, size_t nr,
                         const char *what) {
    size_t i;
    for (i = 0; i < len; i++)
        if (!SDQT_THAT(same(y[i], w->want[i]), "%s mr=%zu nr=%zu: y[%zu] is %a, not %a (was %a)",
                       what, mr, nr, i, (double)y[i], (double)w->want[i], (double)w->old[i]))
            return;
    SDQT_THAT(guard_intact(&w->y, y, 4 * len), "%s writes outside y", what);
}

static void ftile_oracle(const sdq__ftile *t, float *y) {
    size_t i, j, tap, k;
    for (i = 0; i < t->mr; i++)
        for (j = 0; j < t->nr; j++) {
            float c = t->more ? y[i * t->ldy + j] : 0.0f;
            for (tap = 0; tap < t->taps; tap++)
                for (k = 0; k < t->kc; k++)
                    c = fmaf(t->a[tap * t->mr + i][k * t->astep], t->b[(tap * t->kc + k) * 32 + j],
                             c);
            if (t->bias) c += t->bias[j];
            if (t->res) c += t->res[i * t->ldr + j];
            y[i * t->ldy + j] = c;
        }
}
/* flags: 1 bias, 2 res, 4 more. */
static void ftile_once(tile_memory *w, const sdq__kernels *k, size_t mr, size_t nr,
                       unsigned flags) {
    static const size_t tap_choice[] = {1, 1, 2, 9}, step_choice[] = {1, 1, 3};
    const int at_end = (int)sdqt_below(4) != 0;
    const float *rows[A_ROWS];
    sdq__ftile t;
    size_t i, len;
    memset(&t, 0, sizeof t);
    t.mr = mr;
    t.nr = nr;
    t.taps = tap_choice[sdqt_below(4)];
    t.kc = 1 + sdqt_below(40);
    t.astep = step_choice[sdqt_below(3)];
    for (i = 0; i < t.taps * mr; i++)
        rows[i] = tile_floats(&w->a[i], (t.kc - 1) * t.astep + 1, at_end);
    t.a = rows;
    t.b = tile_floats(&w->b, t.taps * t.kc * 32, at_end);
    if (flags & 1) t.bias = tile_floats(&w->bias, nr, at_end);
    t.ldr = nr + sdqt_below(6);
    t.ldy = nr + sdqt_below(6);
    if (flags & 2) t.res = tile_floats(&w->res, (mr - 1) * t.ldr + nr, at_end);
    t.more = (flags & 4) != 0;
    len = (mr - 1) * t.ldy + nr;
    t.y = tile_y(w, len, at_end);
    ftile_oracle(&t, w->want);
    k->gemm_f32(&t);
    tile_compare(w, t.y, len, mr, nr, "gemm_f32");
}
static void test_gemm_f32(int tier) {
    tile_memory *w = tile_new();
    size_t mr, nr;
    for (mr = 1; mr <= 12; mr++)
        for (nr = 1; nr <= 32; nr++) {
            ftile_once(w, sdq__k_table((sdq_tier)tier), mr, nr, (unsigned)sdqt_below(8));
            ftile_once(w, sdq__k_table((sdq_tier)tier), mr, nr, (unsigned)(mr + nr) & 7u);
        }
    tile_free(w);
}

/* The products of a group of 4 bytes: of four u8 and s8, of four s8 and u8, or of two s16. */
static int64_t group_oracle(const uint8_t *a, const int8_t *b, sdq__group kind) {
    int16_t x[2], y[2];
    int64_t sum = 0;
    size_t l;
    for (l = 0; l < 4; l++)
        sum += kind == SDQ__U8S8 ? a[l] * b[l] : (int8_t)a[l] * (uint8_t)b[l];
    if (kind != SDQ__S16) return sum;
    memcpy(x, a, 4);
    memcpy(y, b, 4);
    return (int64_t)x[0] * y[0] + (int64_t)x[1] * y[1];
}
static void qtile_oracle(const sdq__qtile *t, sdq__group kind, float *y) {
    const size_t segs = t->taps * t->quads / t->seg;
    size_t i, j, g, n;
    for (i = 0; i < t->mr; i++)
        for (j = 0; j < t->nr; j++) {
            float f = 0.0f;
            for (g = 0; g < segs; g++) {
                int64_t acc = 0;
                for (n = g * t->seg; n < (g + 1) * t->seg; n++) {
                    const uint8_t *from = t->a[n / t->quads * t->mr + i];
                    if (!from) continue;        /* a tap that is left out */
                    acc += group_oracle(from + n % t->quads * 4, t->b + (n * 32 + j) * 4, kind);
                }
                if (t->wsum) acc -= (int64_t)t->z[g * t->mr + i] * t->wsum[g * 32 + j];
                SDQT_CHECK(acc >= INT32_MIN && acc <= INT32_MAX);
                f = fmaf(t->s[g * t->mr + i], (float)acc, f);
            }
            f = t->bias ? fmaf(f, t->sw[j], t->bias[j]) : f * t->sw[j];
            if (t->res) f += t->res[t->line[i] + j];
            if (t->more) f += y[t->line[i] + j];
            y[t->line[i] + j] = f;
        }
}
static void bytes_fill(void *p, size_t n) {
    unsigned char *q = (unsigned char *)p;
    size_t i;
    for (i = 0; i < n; i++) q[i] = (unsigned char)sdqt_rand();
}
/* n bytes of int16 between -most and most, or all at an end. */
static void words_fill(void *p, size_t n, int most, int extreme) {
    size_t i;
    for (i = 0; i < n; i += 2) {
        const int v = extreme ? most : (int)sdqt_below(2 * (size_t)most + 1) - most;
        const int16_t x = (int16_t)v;
        memcpy((char *)p + i, &x, 2);
    }
}
/* One time in four every product is as large as can be (255 * -128; with int16 the sum is just
 * below 2^31): where saturating instructions go wrong. */
static void qtile_once(tile_memory *w, const sdq__kernels *k, sdq__group kind, size_t mr, size_t nr,
                       unsigned flags) {
    static const char *const names[] = {"gemm_u8s8", "gemm_s8u8", "gemm_s16"};
    const int u8 = kind == SDQ__U8S8, pairs = kind == SDQ__S16;
    static const size_t tap_choice[] = {1, 1, 2, 9};
    const int at_end = (int)sdqt_below(4) != 0, extreme = sdqt_below(4) == 0;
    const uint8_t *rows[A_ROWS];
    sdq__qtile t;
    int8_t *b;
    int32_t *z, *wsum;
    float *s;
    size_t i, total, len, segs, ld, line[12];
    int most;
    memset(&t, 0, sizeof t);
    t.mr = mr;
    t.nr = nr;
    t.line = line;
    t.taps = tap_choice[sdqt_below(4)];
    t.quads = 1 + sdqt_below(40);
    total = t.taps * t.quads;
    for (t.seg = 1 + sdqt_below(total); total % t.seg; t.seg++) {}
    if (sdqt_below(2)) t.seg = total;
    segs = total / t.seg;
    most = (int)fmin(32767, floor(sqrt(2147440000.0 / (2 * (double)t.seg))));
    for (i = 0; i < t.taps * mr; i++) {
        uint8_t *p = (uint8_t *)guard_place(&w->a[i], 4 * t.quads, at_end);
        bytes_fill(p, 4 * t.quads);
        if (extreme) memset(p, u8 ? 255 : -128, 4 * t.quads);
        if (pairs) words_fill(p, 4 * t.quads, most, extreme);
        rows[i] = p;
    }
    if (t.taps > 1 && sdqt_below(2))
        for (i = 0, len = sdqt_below(t.taps) * mr; i < mr; i++) rows[len + i] = NULL;
    t.a = rows;
    b = (int8_t *)guard_place(&w->b, total * 128, at_end);
    bytes_fill(b, total * 128);
    if (extreme) memset(b, u8 ? -128 : 255, total * 128);
    if (pairs) words_fill(b, total * 128, most, extreme);
    t.b = b;
    t.s = s = tile_floats(&w->s, segs * mr, at_end);
    t.z = z = (int32_t *)guard_place(&w->z, 4 * segs * mr, at_end);
    t.wsum = wsum = (int32_t *)guard_place(&w->wsum, 4 * segs * 32, at_end);
    if (pairs || sdqt_below(4) == 0) t.wsum = NULL;
    for (i = 0; i < segs * mr; i++) z[i] = (int32_t)sdqt_below(256);
    for (i = 0; i < segs * 32; i++) wsum[i] = (int32_t)sdqt_below(40000) - 20000;
    t.sw = tile_floats(&w->sw, nr, at_end);
    if (flags & 1) t.bias = tile_floats(&w->bias, nr, at_end);
    ld = nr + sdqt_below(6);
    len = (mr - 1) * ld + nr;
    for (i = 0; i < mr; i++) line[i] = i * ld;
    for (i = 0; i < mr; i++) {              /* in any order */
        const size_t j = sdqt_below(mr), old = line[i];
        line[i] = line[j];
        line[j] = old;
    }
    if (flags & 2) t.res = tile_floats(&w->res, len, at_end);
    t.more = (flags & 4) != 0;
    t.y = tile_y(w, len, at_end);
    qtile_oracle(&t, kind, w->want);
    if (pairs) k->gemm_s16(&t);
    else if (u8) k->gemm_u8s8(&t);
    else k->gemm_s8u8(&t);
    tile_compare(w, t.y, len, mr, nr, names[kind]);
}
static void qtiles(int tier, sdq__group kind) {
    tile_memory *w = tile_new();
    size_t mr, nr;
    for (mr = 1; mr <= 12; mr++)
        for (nr = 1; nr <= 32; nr++) {
            qtile_once(w, sdq__k_table((sdq_tier)tier), kind, mr, nr, (unsigned)sdqt_below(8));
            qtile_once(w, sdq__k_table((sdq_tier)tier), kind, mr, nr, (unsigned)(mr + nr) & 7u);
        }
    tile_free(w);
}

static void test_gemm_u8s8(int tier) { qtiles(tier, SDQ__U8S8); }
static void test_gemm_s8u8(int tier) { qtiles(tier, SDQ__S8U8); }
static void test_gemm_s16(int tier) { qtiles(tier, SDQ__S16); }

/* ---- the table and the guards themselves ---- */

/* Every kernel of the list is there, and each is tested above: the list and the table of rows
 * must have the same names, apart from those with tests of their own. */
static void test_list(int tier) {
    static const char *const own[] = {
        "gemm_f32", "gemm_u8s8", "gemm_s8u8", "gemm_s16", "quantize_u8", "quantize_s8",
        "quantize_s16", "quantize_rows", "dequantize_u8", "dequantize_s8", "ste", "adamw8",
        "from_f16", "from_bf16", "softmax_cols", "softmax_cols_u8", "softmax_cols_s16",
        "mul_cols", "win_input", "win_weight", "win_output"};
    static const char *const names[] = {
#define SDQ__X(ret, name, args, cls) #name,
        SDQ__KERNEL_LIST(SDQ__X)
#undef SDQ__X
    };
    size_t i, j, found;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        found = 0;
        for (j = 0; j < sizeof own / sizeof own[0]; j++) found += !strcmp(names[i], own[j]);
        for (j = 0; j < sizeof row_kernels / sizeof row_kernels[0]; j++)
            found += !strcmp(names[i], row_kernels[j].name);
        SDQT_THAT(found == 1, "kernel %s has %zu tests", names[i], found);
    }
#define SDQ__X(ret, name, args, cls) \
    SDQT_THAT(sdq__k_table((sdq_tier)tier)->name != NULL, "%s is missing", #name);
    SDQ__KERNEL_LIST(SDQ__X)
#undef SDQ__X
}

static const sdqt_case cases[] = {
    {"list", test_list, 1},
    {"rows", test_rows, 1},
    {"functions", test_functions, 1},
    {"quantize", test_quantize, 1},
    {"quantize_rows", test_quantize_rows, 1},
    {"softmax_cols", test_softmax_cols, 1},
    {"mul_cols", test_mul_cols, 1},
    {"ste", test_ste, 1},
    {"adamw8", test_adamw8, 1},
    {"winograd", test_winograd, 1},
    {"half", test_half, 1},
    {"gemm_f32", test_gemm_f32, 1},
    {"gemm_u8s8", test_gemm_u8s8, 1},
    {"gemm_s8u8", test_gemm_s8u8, 1},
    {"gemm_s16", test_gemm_s16, 1},
};

int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
