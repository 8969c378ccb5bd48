/* test_layer.c - quantized layers: FAKE against INT8, both against integer loops written from the
 * definitions, gradients against plain loops, torch's golden values, errors, no memory.
 * Run from the project folder.
 */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

#if defined(__clang__)      /* the oracle rounds every product, also with -march=native */
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

static void *room(size_t n, size_t size) {
    void *p = calloc(n + 1, size);
    if (!p) exit(2);
    return p;
}

/* ---- a case: one layer, two batches to calibrate with ---- */

typedef struct layer_case {
    int kernel, stride, pad[4];
    size_t n, h, w, in, out;
    int rank;                   /* of the input: h*w tokens when 3, one row each when 2 */
    sdq_quant quant;
    int no_bias, residual, nan;
} layer_case;

enum { SPLIT = 1, RESIDUAL = 2, QUANTIZE_OUTPUT = 4, NO_BIAS = 8 };

/* Case i of the product of kernels, ranges, channels and options; 0 when there is none. */
static int case_at(size_t i, layer_case *c) {
    static const size_t in[] = {3, 20, 33, 70}, out[] = {33, 70, 5, 34};
    static const int option[] = {0,
                                 SPLIT,
                                 RESIDUAL,
                                 QUANTIZE_OUTPUT,
                                 NO_BIAS,
                                 SPLIT | RESIDUAL,
                                 QUANTIZE_OUTPUT | RESIDUAL | SPLIT,
                                 SPLIT | QUANTIZE_OUTPUT | NO_BIAS};
    static const int stride[] = {1, 1, 1, 2, 2};
    const size_t kind = i % 5, range = i / 5 % 4, chan = i / 20 % 4, opt = i / 80;
    int k;
    if (opt >= 8) return 0;
    memset(c, 0, sizeof *c);
    c->kernel = kind < 2 ? 1 : 3;
    c->stride = stride[kind];
    for (k = 0; k < 4 && kind >= 2; k++) c->pad[k] = kind < 4 || k >= 2;
    c->n = 2;
    c->h = 5;
    c->w = 6;
    c->rank = kind == 0 ? 3 : 4;
    c->in = in[chan];
    c->out = out[chan];
    c->quant.enabled = 1;
    c->quant.range = (sdq_range)(SDQ_RANGE_STATIC + (int)range);
    c->quant.split = option[opt] & SPLIT ? (c->in + 2) / 3 : 0;
    c->quant.quantize_output = (option[opt] & QUANTIZE_OUTPUT) != 0;
    c->quant.moving = i % 3 == 0 ? 0.01f : 0.0f;
    c->quant.weight_bits = i % 4 == 1 ? 4 : i % 4 == 2 ? 8 : 0;
    c->quant.weight_group = i % 8 == 1 ? 9 : 0;
    c->residual = (option[opt] & RESIDUAL) != 0;
    c->no_bias = (option[opt] & NO_BIAS) != 0;
    return 1;
}
static void case_text(const layer_case *c, char *s, size_t size) {
    (void)snprintf(s, size,
                   "%dx%d stride %d %zu->%zu rank %d range %d split %zu out %d res %d bias %d bits %d",
                   c->kernel, c->kernel, c->stride, c->in, c->out, c->rank, (int)c->quant.range,
                   c->quant.split, c->quant.quantize_output, c->residual, !c->no_bias,
                   c->quant.weight_bits);
}

static size_t case_oh(const layer_case *c) {
    return (c->h + (size_t)(c->pad[0] + c->pad[2]) - (size_t)c->kernel) / (size_t)c->stride + 1;
}
static size_t case_ow(const layer_case *c) {
    return (c->w + (size_t)(c->pad[1] + c->pad[3]) - (size_t)c->kernel) / (size_t)c->stride + 1;
}
static size_t case_k(const layer_case *c) { return (size_t)(c->kernel * c->kernel) * c->in; }

/* Random numbers of a case: two batches of inputs, weights, bias, residual, dy. */
typedef struct numbers {
    float *x[2], *w, *b, *res, *dy;
    size_t x_count, w_count, y_count;
} numbers;

static float *some(size_t n, float scale) {
    float *p = (float *)room(n, sizeof *p);
    size_t i;
    for (i = 0; i < n; i++) p[i] = scale * sdqt_normal();
    return p;
}
static void numbers_new(const layer_case *c, numbers *v) {
    const size_t k = case_k(c);
    size_t i;
    int b;
    v->x_count = c->n * c->h * c->w * c->in;
    v->y_count = c->n * case_oh(c) * case_ow(c) * c->out;
    v->w_count = c->out * k;
    for (b = 0; b < 2; b++) {
        v->x[b] = some(v->x_count, b ? 1.7f : 1.0f);
        for (i = 0; i < v->x_count; i++) {
            if (i % c->in == 1) v->x[b][i] *= 9.0f;                 /* one channel is an outlier */
            if (i % 7 == 3) v->x[b][i] = 0.25f * rintf(v->x[b][i]);  /* some are exact */
            if (i / c->in == 2) v->x[b][i] = 0;                     /* an empty position, */
            if (i / c->in == 4) v->x[b][i] = fabsf(v->x[b][i]) + 1; /* a positive and */
            if (i / c->in == 5) v->x[b][i] = -fabsf(v->x[b][i]);    /* a negative one */
            if (c->nan && i % 11 == 5) v->x[b][i] = (float)NAN;
            if (c->nan && i / c->in == 6) v->x[b][i] = (float)NAN;
        }
    }
    v->w = some(v->w_count, 1.0f / sqrtf((float)k));
    for (i = 0; i < k; i++) v->w[i] = 0;                            /* an empty channel */
    for (i = k; i < 2 * k && c->out > 1; i++) v->w[i] = -fabsf(v->w[i]);
    v->b = some(c->out, 1);
    v->res = some(v->y_count, 1);
    v->dy = some(v->y_count, 1);
}
static void numbers_free(numbers *v) {
    free(v->x[0]); free(v->x[1]); free(v->w); free(v->b); free(v->res); free(v->dy);
}

static sdq_tensor *input_of(sdq_ctx *ctx, const layer_case *c, const float *x, size_t n) {
    size_t dim[4];
    sdq_tensor *t;
    dim[0] = c->rank == 2 ? n * c->h * c->w : n;
    dim[1] = c->rank == 2 ? c->in : c->rank == 3 ? c->h * c->w : c->h;
    dim[2] = c->rank == 3 ? c->in : c->w;
    dim[3] = c->in;
    t = sdq_tensor_new(ctx, SDQ_F32, c->rank, dim);
    if (t) memcpy(t->data, x, sdq_tensor_count(t) * 4);
    return t;
}
static sdq_tensor *residual_of(sdq_ctx *ctx, const layer_case *c, const float *res, size_t n) {
    size_t dim[4];
    sdq_tensor *t;
    if (!c->residual) return NULL;
    dim[0] = c->rank == 2 ? n * c->h * c->w : n;
    dim[1] = c->rank == 2 ? c->out : c->rank == 3 ? c->h * c->w : case_oh(c);
    dim[2] = c->rank == 3 ? c->out : case_ow(c);
    dim[3] = c->out;
    t = sdq_tensor_new(ctx, SDQ_F32, c->rank, dim);
    if (t) memcpy(t->data, res, sdq_tensor_count(t) * 4);
    return t;
}
static sdq_layer *layer_of(sdq_ctx *ctx, const layer_case *c, const numbers *v) {
    sdq_layer_desc d;
    sdq_layer *l;
    memset(&d, 0, sizeof d);
    d.name = "tested";
    d.in = c->in;
    d.out = c->out;
    d.kernel = c->kernel;
    d.stride = c->stride;
    memcpy(d.pad, c->pad, sizeof d.pad);
    d.no_bias = c->no_bias;
    if (sdq_layer_create(ctx, &d, &l) != SDQ_OK) return NULL;
    memcpy(sdq_layer_weight(l)->data, v->w, v->w_count * 4);
    if (!c->no_bias) memcpy(sdq_layer_bias(l)->data, v->b, c->out * 4);
    (void)sdq_layer_set_quant(ctx, l, &c->quant);
    return l;
}

/* ---- the oracle: RECIPE 1 in plain loops, exact integers, the documented float epilogue ----
 * A range covers: everything (STATIC), an entry (PICTURE), a pixel's channels (POSITION) or 32 of
 * them (BLOCK); a split layer has these for each part. */

typedef struct oracle {
    const layer_case *c;
    const numbers *v;
    float mn[2], mx[2], out_mn, out_mx;     /* observed */
    int seen;
    /* of the last forward */
    uint8_t *q;             /* like x */
    float *s, *xh;          /* scale and dequantized value of every element of x */
    int32_t *z;
    int8_t *wq;
    int *wm;                /* what the integer of a weight was multiplied with */
    float *sw, *pre, *y;    /* pre: before the output is quantized; y: with the residual */
    uint8_t *pass;          /* output elements inside of their range */
} oracle;

static void oracle_new(oracle *o, const layer_case *c, const numbers *v) {
    memset(o, 0, sizeof *o);
    o->c = c;
    o->v = v;
    o->q = (uint8_t *)room(v->x_count, 1);
    o->s = (float *)room(v->x_count, 4);
    o->xh = (float *)room(v->x_count, 4);
    o->z = (int32_t *)room(v->x_count, 4);
    o->wq = (int8_t *)room(v->w_count, 1);
    o->wm = (int *)room(v->w_count, sizeof *o->wm);
    o->sw = (float *)room(c->out, 4);
    o->pre = (float *)room(v->y_count, 4);
    o->y = (float *)room(v->y_count, 4);
    o->pass = (uint8_t *)room(v->y_count, 1);
}
static void oracle_free(oracle *o) {
    free(o->q); free(o->s); free(o->xh); free(o->z); free(o->wq); free(o->wm); free(o->sw); free(o->pre);
    free(o->y); free(o->pass);
}

static void oracle_scale(float mn, float mx, float *s, int32_t *z) {
    float zero;
    if (!(mn < 0)) mn = 0;
    if (!(mx > 0)) mx = 0;
    *s = (mx - mn) / 255.0f;
    if (*s < 1.1920928955078125e-07f) *s = 1.1920928955078125e-07f;
    zero = 0.0f - nearbyintf(mn / *s);
    *z = zero < 0 ? 0 : zero > 255 ? 255 : (int32_t)zero;
}
static void oracle_track(const oracle *o, float now_mn, float now_mx, float *mn, float *mx) {
    const float m = o->c->quant.moving;
    if (!o->seen) { *mn = now_mn; *mx = now_mx; }
    else if (m > 0) { *mn = *mn + m * (now_mn - *mn); *mx = *mx + m * (now_mx - *mx); }
    else { *mn = fminf(*mn, now_mn); *mx = fmaxf(*mx, now_mx); }
}

/* Part of channel ch: 0 or 1, and its first channel. */
static int oracle_part(const layer_case *c, size_t ch, size_t *first) {
    const int part = c->quant.split && ch >= c->quant.split;
    *first = part ? c->quant.split : 0;
    return part;
}

/* Whether elements i and j of x share a range. */
static int oracle_shares(const layer_case *c, size_t i, size_t j) {
    size_t fi, fj;
    const size_t ci = i % c->in, cj = j % c->in, pixels = c->rank == 2 ? 1 : c->h * c->w;
    if (oracle_part(c, ci, &fi) != oracle_part(c, cj, &fj)) return 0;
    switch (c->quant.range) {
    case SDQ_RANGE_STATIC: return 1;
    case SDQ_RANGE_PICTURE: return i / c->in / pixels == j / c->in / pixels;
    case SDQ_RANGE_POSITION: return i / c->in == j / c->in;
    default: return i / c->in == j / c->in && (ci - fi) / 32 == (cj - fj) / 32;
    }
}

static void oracle_quantize(oracle *o, const float *x, int observe) {
    const layer_case *c = o->c;
    const size_t n = o->v->x_count;
    size_t i, j, first, later;
    int part;
    for (part = 0; part < 2 && observe; part++) {
        float mn = INFINITY, mx = -INFINITY;
        for (i = 0; i < n; i++)
            if (oracle_part(c, i % c->in, &first) == part) {
                mn = fminf(mn, x[i]);
                mx = fmaxf(mx, x[i]);
            }
        oracle_track(o, mn, mx, &o->mn[part], &o->mx[part]);
    }
    memset(o->z, 0xff, n * 4);
    for (i = 0; i < n; i++) {       /* the first element of a range finds it for all */
        float mn = INFINITY, mx = -INFINITY, s;
        int32_t z;
        if (o->z[i] >= 0) continue;
        part = oracle_part(c, i % c->in, &first);
        /* STATIC ranges interleave by parts; all others end within an entry */
        later = c->quant.range == SDQ_RANGE_STATIC ? n
                : i + c->h * c->w * c->in < n      ? i + c->h * c->w * c->in
                                                   : n;
        for (j = i; j < later; j++)
            if (oracle_shares(c, i, j)) { mn = fminf(mn, x[j]); mx = fmaxf(mx, x[j]); }
        if (c->quant.range == SDQ_RANGE_STATIC) { mn = o->mn[part]; mx = o->mx[part]; }
        oracle_scale(mn, mx, &s, &z);
        for (j = i; j < later; j++) {
            if (!oracle_shares(c, i, j)) continue;
            o->s[j] = s;
            o->z[j] = z;
        }
    }
    for (i = 0; i < n; i++) {
        float q = nearbyintf(x[i] * (1.0f / o->s[i])) + (float)o->z[i];
        if (x[i] != x[i]) q = (float)o->z[i];
        o->q[i] = (uint8_t)(q < 0 ? 0 : q > 255 ? 255 : q);
        o->xh[i] = (float)((int)o->q[i] - o->z[i]) * o->s[i];
    }
}

/* The integer, of 4 bits or of 8, that is nearest to a weight. */
static float oracle_integer(const oracle *o, float w, float step) {
    const int four = o->c->quant.weight_bits == 4;
    const float q = nearbyintf(w * (1.0f / step)), low = four ? -8.0f : -128.0f;
    return q < low ? low : q > -1.0f - low ? -1.0f - low : q;
}

/* 4 bits: the group of weight j of channel i is the channels of its tap with the same ch / size.
 * Each of its multipliers is tried on all of it. */
static void oracle_four(oracle *o, size_t i, size_t j) {
    const layer_case *c = o->c;
    const size_t k = case_k(c), ch = j % c->in;
    const size_t size = c->quant.weight_group ? c->quant.weight_group : 64;
    const float *w = o->v->w + i * k;
    double least = INFINITY;
    size_t n;
    int m;
    for (m = 16; m > 0; m--) {
        const float step = o->sw[i] * (float)m;
        double sum = 0;
        for (n = j - ch; n < j - ch + c->in; n++) {
            const float d = w[n] - oracle_integer(o, w[n], step) * step;
            if (n % c->in / size == ch / size) sum += (double)(d * d);
        }
        if (sum < least) { least = sum; o->wm[i * k + j] = m; }
    }
    m = o->wm[i * k + j];
    o->wq[i * k + j] = (int8_t)(m * (int)oracle_integer(o, w[j], o->sw[i] * (float)m));
}

static void oracle_weights(oracle *o) {
    const size_t k = case_k(o->c);
    size_t i, j;
    for (i = 0; i < o->c->out; i++) {
        const int four = o->c->quant.weight_bits == 4;
        float a = 0;
        for (j = 0; j < k; j++) a = fmaxf(a, fabsf(o->v->w[i * k + j]));
        o->sw[i] = fmaxf(a / (four ? 120.0f : 127.5f), 1.1920928955078125e-07f);
        for (j = 0; j < k && four; j++) oracle_four(o, i, j);
        if (four) continue;
        for (j = 0; j < k; j++) {
            o->wq[i * k + j] = (int8_t)oracle_integer(o, o->v->w[i * k + j], o->sw[i]);
            o->wm[i * k + j] = 1;
        }
    }
}

/* Source pixel of an output pixel and tap, or SIZE_MAX outside of the picture. */
static size_t oracle_source(const layer_case *c, size_t m, size_t tap) {
    const size_t ow = case_ow(c), oh = case_oh(c);
    const ptrdiff_t y = (ptrdiff_t)(m / ow % oh) * c->stride + (ptrdiff_t)tap / c->kernel
                        - c->pad[0];
    const ptrdiff_t x = (ptrdiff_t)(m % ow) * c->stride + (ptrdiff_t)tap % c->kernel - c->pad[1];
    if (y < 0 || x < 0 || y >= (ptrdiff_t)c->h || x >= (ptrdiff_t)c->w) return SIZE_MAX;
    return (m / (ow * oh) * c->h + (size_t)y) * c->w + (size_t)x;
}

/* f = sum over segments of s * (float)(sum of (q - z) w): the first segment that the product of a
 * part meets is its first tap; a segment ends where the scale may change. */
static float oracle_product(const oracle *o, size_t m, size_t oc, size_t c0, size_t c1) {
    const layer_case *c = o->c;
    const size_t taps = (size_t)(c->kernel * c->kernel);
    const int by_row = c->quant.range == SDQ_RANGE_POSITION || c->quant.range == SDQ_RANGE_BLOCK;
    const size_t step = c->quant.range == SDQ_RANGE_BLOCK ? 32 : c1 - c0;
    float f = 0, s = 0;
    int64_t sum = 0;
    size_t t, ch, at;
    for (t = 0; t < taps; t++) {
        const size_t src = oracle_source(c, m, t);
        for (ch = c0; ch < c1; ch++) {
            const size_t i = src * c->in + ch;
            if (src != SIZE_MAX) {
                at = (oc * taps + t) * c->in + ch;
                sum += (int64_t)((int)o->q[i] - o->z[i]) * o->wq[at];
                s = o->s[i];
            }
            if (by_row && ((ch - c0) % step == step - 1 || ch + 1 == c1)) {
                if (src != SIZE_MAX) f = fmaf(s, (float)sum, f);
                sum = 0;
            }
        }
    }
    return by_row ? f : fmaf(s, (float)sum, f);
}

static void oracle_output(oracle *o, int observe) {
    const size_t n = o->v->y_count;
    float mn = INFINITY, mx = -INFINITY, s;
    int32_t z;
    size_t i;
    for (i = 0; i < n && observe; i++) { mn = fminf(mn, o->pre[i]); mx = fmaxf(mx, o->pre[i]); }
    if (observe) oracle_track(o, mn, mx, &o->out_mn, &o->out_mx);
    oracle_scale(o->out_mn, o->out_mx, &s, &z);
    for (i = 0; i < n; i++) {
        const float q = nearbyintf(o->pre[i] * (1.0f / s)) + (float)z;
        o->pass[i] = q >= 0 && q <= 255;
        o->y[i] = ((q < 0 ? 0 : q > 255 ? 255 : q) - (float)z) * s;
        if (o->c->residual) o->y[i] += o->v->res[i];
    }
}

static void oracle_forward(oracle *o, const float *x, int observe) {
    const layer_case *c = o->c;
    const size_t split = c->quant.split ? c->quant.split : c->in, pixels = o->v->y_count / c->out;
    const int res = c->residual && !c->quant.quantize_output;
    size_t m, oc;
    oracle_quantize(o, x, observe);
    oracle_weights(o);
    for (m = 0; m < pixels; m++)
        for (oc = 0; oc < c->out; oc++) {
            const size_t at = m * c->out + oc;
            float f = oracle_product(o, m, oc, 0, split);
            f = c->no_bias ? f * o->sw[oc] : fmaf(f, o->sw[oc], o->v->b[oc]);
            if (res) f += o->v->res[at];
            if (split < c->in) f = oracle_product(o, m, oc, split, c->in) * o->sw[oc] + f;
            o->pre[at] = o->y[at] = f;
            o->pass[at] = 1;
        }
    if (c->quant.quantize_output) oracle_output(o, observe);
    o->seen |= observe;
}

/* ---- one run of the library through a case ---- */

typedef struct run {
    float *y, *y8, *dx, *dw, *db, *dres, *dsw, ds[2];
} run;

static void run_new(const layer_case *c, const numbers *v, run *r) {
    memset(r, 0, sizeof *r);
    r->y = (float *)room(v->y_count, 4);
    r->y8 = (float *)room(v->y_count, 4);
    r->dx = (float *)room(v->x_count, 4);
    r->dw = (float *)room(v->w_count, 4);
    r->db = (float *)room(c->out, 4);
    r->dres = (float *)room(v->y_count, 4);
    r->dsw = (float *)room(c->out, 4);
}
static void run_free(run *r) {
    free(r->y); free(r->y8); free(r->dx); free(r->dw); free(r->db); free(r->dres); free(r->dsw);
}
static int run_equal(const layer_case *c, const numbers *v, const run *a, const run *b) {
    return memcmp(a->y, b->y, v->y_count * 4) == 0 && memcmp(a->y8, b->y8, v->y_count * 4) == 0
        && memcmp(a->dx, b->dx, v->x_count * 4) == 0 && memcmp(a->dw, b->dw, v->w_count * 4) == 0
        && memcmp(a->db, b->db, c->out * 4) == 0 && memcmp(a->dres, b->dres, v->y_count * 4) == 0
        && memcmp(a->dsw, b->dsw, c->out * 4) == 0 && memcmp(a->ds, b->ds, sizeof a->ds) == 0;
}

static void copy_grad(float *to, const sdq_tensor *t) {
    if (t && t->grad) memcpy(to, t->grad, sdq_tensor_count(t) * 4);
}

/* Gradients of the second batch; learn: of the scales, too. */
static void run_backward(sdq_ctx *ctx, const layer_case *c, const numbers *v, sdq_layer *l,
                         int learn, run *r) {
    sdq_tensor *leaf[5], *x, *res, *y;
    int i;
    sdq_tape_begin(ctx);
    x = input_of(ctx, c, v->x[1], c->n);
    res = residual_of(ctx, c, v->res, c->n);
    leaf[0] = sdq_layer_weight(l); leaf[1] = sdq_layer_bias(l); leaf[2] = &l->sw;
    leaf[3] = &l->part[0].s; leaf[4] = &l->part[1].s;
    for (i = 0; i < 5; i++)
        if (leaf[i]) leaf[i]->needs_grad = i < 2 || learn;
    x->needs_grad = 1;
    if (res) res->needs_grad = 1;
    y = sdq_layer_forward(ctx, l, x, res, SDQ_FAKE);
    if (y) {
        y->grad = SDQ__PUSH_N(ctx, float, v->y_count);
        memcpy(y->grad, v->dy, v->y_count * 4);
        sdq__tape_walk(ctx, ctx->tape);
        SDQT_CHECK(memcmp(y->data, r->y, v->y_count * 4) == 0);     /* recording changes nothing */
    }
    copy_grad(r->dx, x);
    copy_grad(r->dres, res);
    copy_grad(r->dw, leaf[0]);
    copy_grad(r->db, leaf[1]);
    copy_grad(r->dsw, leaf[2]);
    copy_grad(&r->ds[0], leaf[3]);
    copy_grad(&r->ds[1], leaf[4]);
    sdq_tape_end(ctx);
    for (i = 0; i < 5; i++)
        if (leaf[i]) { leaf[i]->needs_grad = 0; leaf[i]->grad = NULL; }
}

/* Calibrate with both batches, freeze, FAKE, backward, convert, INT8 on the second batch. */
static void run_case(sdq_ctx *ctx, const layer_case *c, const numbers *v, int learn, run *r) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_layer *l = layer_of(ctx, c, v);
    sdq_tensor *y;
    int b;
    if (!SDQT_THAT(l != NULL, "%s", sdq_error_text(ctx))) return;
    sdq_layer_observe(l, 1);
    for (b = 0; b < 2; b++)
        (void)sdq_layer_forward(ctx, l, input_of(ctx, c, v->x[b], c->n),
                                residual_of(ctx, c, v->res, c->n), SDQ_FAKE);
    sdq_layer_observe(l, 0);
    y = sdq_layer_forward(ctx, l, input_of(ctx, c, v->x[1], c->n),
                          residual_of(ctx, c, v->res, c->n), SDQ_FAKE);
    if (y) memcpy(r->y, y->data, v->y_count * 4);
    run_backward(ctx, c, v, l, learn, r);
    SDQT_THAT(sdq_layer_convert(ctx, l) == SDQ_OK, "%s", sdq_error_text(ctx));
    SDQT_CHECK(sdq_layer_weight(l) == NULL);
    y = sdq_layer_forward(ctx, l, input_of(ctx, c, v->x[1], c->n),
                          residual_of(ctx, c, v->res, c->n), SDQ_INT8);
    SDQT_THAT(y != NULL, "%s", sdq_error_text(ctx));
    if (y) memcpy(r->y8, y->data, v->y_count * 4);
    sdq_arena_release(ctx, mark);
    sdq_layer_free(ctx, l);
}

static int same_floats(const float *a, const float *b, size_t n) {  /* NaN equals NaN */
    size_t i;
    for (i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], 4) != 0 && !(a[i] != a[i] && b[i] != b[i])) return 0;
    return 1;
}

static void compare_case(sdq_ctx *ctx, const layer_case *c) {
    char text[160];
    numbers v;
    oracle o;
    run r;
    case_text(c, text, sizeof text);
    numbers_new(c, &v);
    run_new(c, &v, &r);
    oracle_new(&o, c, &v);
    run_case(ctx, c, &v, 0, &r);
    oracle_forward(&o, v.x[0], 1);
    oracle_forward(&o, v.x[1], 1);
    oracle_forward(&o, v.x[1], 0);
    SDQT_THAT(same_floats(r.y, o.y, v.y_count), "FAKE is not the oracle: %s", text);
    SDQT_THAT(same_floats(r.y8, r.y, v.y_count), "INT8 is not FAKE: %s", text);
    oracle_free(&o);
    run_free(&r);
    numbers_free(&v);
}

static void test_exact(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    layer_case c;
    size_t i;
    for (i = 0; case_at(i, &c); i++) compare_case(ctx, &c);
    SDQT_CHECK(i == 640);
    sdq_ctx_free(ctx);
}

/* Shapes that the product leaves out: one row each, one pixel, many rows, long sums, NaN. */
static void test_exact_shapes(int tier) {
    static const struct { int kernel, rank; size_t n, h, w, in, out; int nan; } shape[] = {
        {1, 2, 7, 1, 1, 33, 20, 0}, {1, 4, 1, 1, 1, 1, 1, 0}, {3, 4, 1, 1, 1, 70, 3, 0},
        {3, 4, 3, 2, 7, 33, 65, 0}, {1, 3, 1, 13, 15, 20, 33, 0}, {3, 4, 1, 13, 15, 3, 5, 0},
        {1, 3, 2, 3, 3, 1400, 7, 0}, {1, 3, 2, 5, 6, 33, 20, 1}, {3, 4, 2, 5, 6, 20, 33, 1}};
    sdq_ctx *ctx = sdqt_ctx(tier, 3);
    size_t i;
    int range, k;
    for (i = 0; i < sizeof shape / sizeof shape[0]; i++)
        for (range = SDQ_RANGE_STATIC; range < SDQ_RANGE_COUNT; range++) {
            layer_case c;
            memset(&c, 0, sizeof c);
            c.kernel = shape[i].kernel; c.rank = shape[i].rank; c.n = shape[i].n; c.h = shape[i].h;
            c.w = shape[i].w; c.in = shape[i].in; c.out = shape[i].out; c.nan = shape[i].nan;
            c.stride = 1;
            for (k = 0; k < 4; k++) c.pad[k] = c.kernel == 3;
            c.quant.enabled = 1;
            c.quant.range = (sdq_range)range;
            c.quant.split = i % 2 && c.in > 40 ? 33 : 0;
            compare_case(ctx, &c);
        }
    sdq_ctx_free(ctx);
}

/* Every tier and 1, 2, 3 threads give the bytes of the scalar tier on one thread. */
static void test_equal_bits(int tier) {
    sdq_ctx *base = sdqt_ctx(SDQ_TIER_SCALAR, 1), *ctx = sdqt_ctx(tier, 1);
    layer_case c;
    size_t i, threads = 1;
    for (i = 0; threads <= 3; i += 7) {     /* every 7th case: of each kind some */
        char text[160];
        numbers v;
        run a, b;
        if (!case_at(i, &c)) {
            sdq_ctx_free(ctx);
            ctx = sdqt_ctx(tier, (int)++threads);
            i = threads - 8;                /* the loop adds 7 */
            continue;
        }
        if (i % 2 == 0) { c.h = 11; c.w = 13; }     /* several blocks of rows */
        numbers_new(&c, &v);
        run_new(&c, &v, &a);
        run_new(&c, &v, &b);
        run_case(base, &c, &v, 1, &a);
        run_case(ctx, &c, &v, 1, &b);
        case_text(&c, text, sizeof text);
        SDQT_THAT(run_equal(&c, &v, &a, &b), "%zu threads differ: %s", threads, text);
        run_free(&a);
        run_free(&b);
        numbers_free(&v);
    }
    sdq_ctx_free(ctx);
    sdq_ctx_free(base);
}

/* An entry gives the same bytes alone and in a batch. */
static void test_batch(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    layer_case c;
    size_t i, e;
    for (i = 0; case_at(i, &c); i++) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        numbers v;
        sdq_layer *l;
        sdq_tensor *y, *one;
        int mode;
        numbers_new(&c, &v);
        l = layer_of(ctx, &c, &v);
        sdq_layer_observe(l, 1);
        (void)sdq_layer_forward(ctx, l, input_of(ctx, &c, v.x[0], 2),
                                residual_of(ctx, &c, v.res, 2), SDQ_FAKE);
        sdq_layer_observe(l, 0);
        for (mode = SDQ_FLOAT; mode <= SDQ_INT8; mode++) {
            if (mode == SDQ_INT8) SDQT_CHECK(sdq_layer_convert(ctx, l) == SDQ_OK);
            y = sdq_layer_forward(ctx, l, input_of(ctx, &c, v.x[1], 2),
                                  residual_of(ctx, &c, v.res, 2), (sdq_mode)mode);
            for (e = 0; e < 2 && y; e++) {
                one = sdq_layer_forward(ctx, l, input_of(ctx, &c, v.x[1] + e * v.x_count / 2, 1),
                                        residual_of(ctx, &c, v.res + e * v.y_count / 2, 1),
                                        (sdq_mode)mode);
                SDQT_THAT(
                    one
                        && memcmp(one->data, sdq_f32(y) + e * v.y_count / 2, v.y_count / 2 * 4)
                               == 0,
                    "mode %d, entry %zu differs alone (case %zu): %s", mode, e, i,
                    sdq_error_text(ctx));
            }
            SDQT_THAT(y != NULL, "%s", sdq_error_text(ctx));
        }
        sdq_layer_free(ctx, l);
        numbers_free(&v);
        sdq_arena_release(ctx, mark);
    }
    sdq_ctx_free(ctx);
}

/* ---- gradients of FAKE against plain loops in double ----
 * dxh = dy wh^T, dwh = dy^T xh with the oracle's xh and wh; then the straight-through masks and
 * LSQ. Measured over all cases, relative to the norm: dx 4.4e-7, dw 3.0e-7, db 4.7e-7. ds and
 * dsw are sums that cancel and are measured against the sum of absolute values: 4e-7. */

#define GRADIENT_TOL 1e-6
#define SCALE_TOL 1e-6

typedef struct slopes {
    double *dx, *dw, *dw_size, *db, *dsw, *dsw_size, ds[2], ds_size[2];
} slopes;

static void slopes_new(const layer_case *c, const numbers *v, slopes *g) {
    memset(g, 0, sizeof *g);
    g->dx = (double *)room(v->x_count, 8);
    g->dw = (double *)room(v->w_count, 8);
    g->dw_size = (double *)room(v->w_count, 8);
    g->db = (double *)room(c->out, 8);
    g->dsw = (double *)room(c->out, 8);
    g->dsw_size = (double *)room(c->out, 8);
}
static void slopes_free(slopes *g) {
    free(g->dx); free(g->dw); free(g->dw_size); free(g->db); free(g->dsw); free(g->dsw_size);
}

/* Through the products only: gradients of xh and wh. */
static void oracle_products_back(const oracle *o, slopes *g) {
    const layer_case *c = o->c;
    const size_t taps = (size_t)(c->kernel * c->kernel);
    size_t m, oc, t, ch;
    for (m = 0; m < o->v->y_count / c->out; m++)
        for (oc = 0; oc < c->out; oc++) {
            const double dy = o->pass[m * c->out + oc] ? (double)o->v->dy[m * c->out + oc] : 0;
            g->db[oc] += dy;
            for (t = 0; t < taps; t++) {
                const size_t src = oracle_source(c, m, t), at = (oc * taps + t) * c->in;
                for (ch = 0; ch < c->in && src != SIZE_MAX; ch++) {
                    g->dx[src * c->in + ch] += dy * (double)o->wq[at + ch] * (double)o->sw[oc];
                    g->dw[at + ch] += dy * (double)o->xh[src * c->in + ch];
                    g->dw_size[at + ch] += fabs(dy * (double)o->xh[src * c->in + ch]);
                }
            }
        }
}

/* Masks, and the gradients of the scales. x: the input of the forward pass. */
static void oracle_quantizers_back(const oracle *o, const float *x, slopes *g) {
    const layer_case *c = o->c;
    const size_t k = case_k(c), entry = o->v->x_count / (c->rank == 2 ? c->n * c->h * c->w : c->n);
    size_t i, first;
    for (i = 0; i < o->v->x_count && c->quant.range == SDQ_RANGE_STATIC; i++) {
        const int part = oracle_part(c, i % c->in, &first);
        const double chans = part ? (double)(c->in - c->quant.split)
                                  : c->quant.split ? (double)c->quant.split : (double)c->in;
        const double norm = 1 / sqrt(255.0 * (double)(entry / c->in) * chans);
        const float u = x[i] * (1.0f / o->s[i]), q = nearbyintf(u) + (float)o->z[i];
        const double slope = q < 0     ? -o->z[i]
                             : q > 255 ? 255 - o->z[i]
                                       : (double)nearbyintf(u) - (double)u;
        g->ds[part] += g->dx[i] * slope * norm;
        g->ds_size[part] += fabs(g->dx[i] * slope * norm);
        if (q < 0 || q > 255) g->dx[i] = 0;
    }
    for (i = 0; i < o->v->w_count; i++) {
        const size_t oc = i / k;
        const float step = o->sw[oc] * (float)o->wm[i], u = o->v->w[i] * (1.0f / step);
        const float q = nearbyintf(u), in = oracle_integer(o, o->v->w[i], step);
        const double slope = (double)o->wm[i] * (q != in ? (double)in : (double)q - (double)u);
        g->dsw[oc] += g->dw[i] * slope / sqrt(127.0 * (double)k);
        g->dsw_size[oc] += g->dw_size[i] * fabs(slope) / sqrt(127.0 * (double)k);
        if (q != in) g->dw[i] = 0;
    }
}

static double distance(const float *a, const double *b, size_t n) {
    double d = 0, s = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        s += b[i] * b[i];
    }
    return d == 0 ? 0 : s > 0 && d < 1e300 ? sqrt(d / s) : 1e30;
}

static void gradient_case(sdq_ctx *ctx, const layer_case *c) {
    char text[160];
    numbers v;
    oracle o;
    slopes g;
    run r;
    double e;
    size_t i;
    int part;
    case_text(c, text, sizeof text);
    numbers_new(c, &v);
    run_new(c, &v, &r);
    oracle_new(&o, c, &v);
    slopes_new(c, &v, &g);
    run_case(ctx, c, &v, 1, &r);
    oracle_forward(&o, v.x[0], 1);
    oracle_forward(&o, v.x[1], 1);
    oracle_forward(&o, v.x[1], 0);
    oracle_products_back(&o, &g);
    oracle_quantizers_back(&o, v.x[1], &g);
    e = distance(r.dx, g.dx, v.x_count);
    SDQT_THAT(e <= GRADIENT_TOL, "dx error %.3g: %s", e, text);
    e = distance(r.dw, g.dw, v.w_count);
    SDQT_THAT(e <= GRADIENT_TOL, "dw error %.3g: %s", e, text);
    e = c->no_bias ? 0 : distance(r.db, g.db, c->out);
    SDQT_THAT(e <= GRADIENT_TOL, "db error %.3g: %s", e, text);
    SDQT_THAT(!c->residual || memcmp(r.dres, v.dy, v.y_count * 4) == 0, "dres: %s", text);
    for (i = 0; i < c->out; i++) {
        e = fabs((double)r.dsw[i] - g.dsw[i]) / (g.dsw_size[i] > 0 ? g.dsw_size[i] : 1);
        SDQT_THAT(e <= SCALE_TOL, "dsw error %.3g: %s", e, text);
    }
    for (part = 0; part < 2; part++) {
        e = fabs((double)r.ds[part] - g.ds[part]) / (g.ds_size[part] > 0 ? g.ds_size[part] : 1);
        SDQT_THAT(e <= SCALE_TOL, "ds error %.3g: %s", e, text);
    }
    slopes_free(&g);
    oracle_free(&o);
    run_free(&r);
    numbers_free(&v);
}

static void test_gradients(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    layer_case c;
    size_t i;
    for (i = 0; case_at(i, &c); i++) gradient_case(ctx, &c);
    sdq_ctx_free(ctx);
}

/* A range narrower than the input: both ends are cut, and gradients stop there. */
static void test_clipped(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 2);
    layer_case c;
    numbers v;
    sdq_layer *l;
    sdq_tensor *x, *y;
    size_t i, cut = 0;
    (void)case_at(22, &c);          /* 3x3, static, 20 channels */
    SDQT_CHECK(c.kernel == 3 && c.quant.range == SDQ_RANGE_STATIC && !c.quant.quantize_output);
    numbers_new(&c, &v);
    l = layer_of(ctx, &c, &v);
    sdq_layer_observe(l, 1);
    (void)sdq_layer_forward(ctx, l, input_of(ctx, &c, v.x[0], 2), NULL, SDQ_FLOAT);
    sdq_layer_observe(l, 0);
    sdq_f32(&l->part[0].s)[0] *= 0.25f;
    x = input_of(ctx, &c, v.x[0], 2);
    x->needs_grad = 1;
    sdq_tape_begin(ctx);
    y = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
    SDQT_CHECK(sdq_backward(ctx, sdq_mse(ctx, y, sdq_tensor_new(ctx, SDQ_F32, 4, y->dim), NULL))
               == SDQ_OK);
    sdq_tape_end(ctx);
    for (i = 0; i < v.x_count; i++) {
        const float q = nearbyintf(v.x[0][i] * (1.0f / sdq_f32(&l->part[0].s)[0]))
                        + (float)l->part[0].z;
        if (q < 0 || q > 255) cut++;
        SDQT_CHECK((x->grad[i] == 0) == (q < 0 || q > 255));
    }
    SDQT_THAT(cut > 20 && cut < v.x_count / 2, "%zu of %zu cut", cut, v.x_count);
    sdq_layer_free(ctx, l);
    numbers_free(&v);
    sdq_ctx_free(ctx);
}

/* ---- torch's golden values ---- */

static const sdq_entry *golden(sdq_file *f, const char *path, const char *role) {
    char name[96];
    const sdq_entry *e;
    (void)snprintf(name, sizeof name, "%s/%s", path, role);
    e = sdq_file_find(f, name);
    SDQT_THAT(e != NULL, "%s is missing", name);
    return e;
}
static const float *golden_f(sdq_file *f, const char *path, const char *role) {
    return (const float *)golden(f, path, role)->data;
}

/* torch computes ds in float as a difference of large sums; measured: 2.1e-5. */
#define LSQ_TOL 1e-4

/* -0 is 0. about: LSQ's dx is dy * s * (1/s) in torch, three roundings. */
static int equal(const float *a, const float *b, size_t n, int about) {
    size_t i;
    for (i = 0; i < n && fabsf(a[i] - b[i]) <= (about ? 2e-7f * fabsf(b[i]) : 0.0f); i++) {}
    return i == n;
}

/* Elements that differ; more than one step apart fails. Measured: none differs at all. */
static size_t apart(const float *a, const float *b, size_t n, const float *step, size_t per_step) {
    size_t i, count = 0;
    for (i = 0; i < n; i++) {
        count += a[i] != b[i];
        SDQT_NEAR(a[i], b[i], 1.001 * (double)step[i / per_step]);
    }
    return count;
}

static void golden_act(sdq_ctx *ctx, sdq_file *f, const char *path, int lsq) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_entry *ex = golden(f, path, "x");
    const size_t n = sdq_entry_count(ex);
    const float *s = golden_f(f, path, "s"), *dy = golden_f(f, path, "dy");
    const sdq__qparam p = sdq__q_from_scale(s[0], ((const int32_t *)golden(f, path, "z")->data)[0]);
    sdq_tensor *x = sdq_tensor_new(ctx, SDQ_F32, ex->rank, ex->dim);
    uint8_t *q = SDQ__PUSH_N(ctx, uint8_t, n);
    float *y = SDQ__PUSH_N(ctx, float, n), *dx = (float *)sdq_tensor_1d(ctx, n)->data, scale = p.s;
    int32_t zero = p.z;
    sdq__qinput in;
    sdq__qpart part;
    memset(&in, 0, sizeof in);
    memset(&part, 0, sizeof part);
    memcpy(x->data, ex->data, n * 4);
    ctx->k->quantize_u8(q, sdq_f32(x), n, p.inv, p.z);
    ctx->k->dequantize_u8(y, q, n, p.s, p.z);
    SDQT_CHECK(apart(y, golden_f(f, path, "y"), n, s, n) == 0);
    in.s = &scale;
    in.z = &zero;
    part.c = sdq__t_chan(x);
    part.s = *sdq_tensor_1d(ctx, 1);
    part.s.needs_grad = lsq;
    sdq__ly_ste_input(ctx, &part, &in, x, dy, dx);
    SDQT_THAT(equal(dx, golden_f(f, path, "dx"), n, lsq), "%s: mask", path);
    if (lsq)
        SDQT_NEAR(part.s.grad[0], golden_f(f, path, "ds")[0],
                  LSQ_TOL * fabs((double)golden_f(f, path, "ds")[0]));
    sdq_arena_release(ctx, mark);
}

/* The gradient g [out][k] of fake-quantized weights as the product of g and the identity. */
static void weight_gradient(sdq_ctx *ctx, sdq_layer *l, const float *g, size_t k) {
    float *x = sdq_f32(sdq_tensor_2d(ctx, k, k)), *dy = sdq_f32(sdq_tensor_2d(ctx, k, l->out));
    sdq__gemm_dw w;
    size_t i, o;
    for (i = 0; i < k; i++) {
        x[i * k + i] = 1.0f;
        for (o = 0; o < l->out; o++) dy[i * l->out + o] = g[o * k + i];
    }
    memset(&w, 0, sizeof w);
    w.g = sdq__gemm_rows_geom(k);
    w.x = x; w.dy = dy;
    w.m = w.c = w.ldx = w.ldw = k;
    w.n = w.ldy = l->out;
    w.w = sdq_f32(&l->w); w.sw = sdq_f32(&l->sw);
    w.dw = sdq__tape_grad(ctx, &l->w);
    w.ds = sdq__tape_grad(ctx, &l->sw);
    sdq__gemm_dw_run(ctx, &w);
}

static void golden_weight(sdq_ctx *ctx, sdq_file *f, const char *path, int lsq) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_entry *ex = golden(f, path, "x");
    const size_t n = sdq_entry_count(ex), out = ex->dim[0], k = n / out;
    const float *s = golden_f(f, path, "s"), *ds = lsq ? golden_f(f, path, "ds") : NULL;
    float *y = SDQ__PUSH_N(ctx, float, n);
    sdq_layer_desc d;
    sdq_layer *l;
    const int8_t *q;
    size_t i;
    memset(&d, 0, sizeof d);
    d.out = out;
    d.in = ex->dim[ex->rank - 1];
    d.kernel = ex->rank == 4 ? 3 : 1;
    SDQT_CHECK(sdq_layer_create(ctx, &d, &l) == SDQ_OK);
    memcpy(l->w.data, ex->data, n * 4);
    SDQT_CHECK(sdq__ly_weight_scales(ctx, l, sdq_f32(&l->w)) == SDQ_OK);
    for (i = 0; i < out && !lsq; i++) SDQT_CHECK(sdq_f32(&l->sw)[i] == s[i]);
    memcpy(l->sw.data, s, out * 4);
    q = sdq__ly_quantize_weights(ctx, l, sdq_f32(&l->w));
    for (i = 0; i < n; i++) y[i] = (float)q[i] * s[i / k];
    SDQT_CHECK(apart(y, golden_f(f, path, "y"), n, s, k) == 0);
    l->w.needs_grad = 1;
    l->sw.needs_grad = lsq;
    weight_gradient(ctx, l, golden_f(f, path, "dy"), k);
    SDQT_THAT(equal(l->w.grad, golden_f(f, path, "dx"), n, lsq), "%s: mask", path);
    for (i = 0; i < out && lsq; i++) SDQT_NEAR(l->sw.grad[i], ds[i], LSQ_TOL * fabs((double)ds[i]));
    sdq_layer_free(ctx, l);
    sdq_arena_release(ctx, mark);
}

static void golden_observer(sdq_ctx *ctx, sdq_file *f, const char *name, int weight) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    char path[64], role[16];
    const float *mn, *mx, *s;
    const int32_t *z;
    sdq_layer *l = NULL;
    sdq_quant quant;
    int batch;
    (void)snprintf(path, sizeof path, "observer/%s", name);
    mn = golden_f(f, path, "min"); mx = golden_f(f, path, "max"); s = golden_f(f, path, "s");
    z = (const int32_t *)golden(f, path, "z")->data;
    for (batch = 0; batch < 4; batch++) {
        const sdq_entry *ex;
        sdq_tensor *x;
        size_t o, n;
        (void)snprintf(role, sizeof role, "x%d", batch);
        ex = golden(f, path, role);
        n = sdq_entry_count(ex);
        if (!l) {
            sdq_layer_desc d;
            memset(&d, 0, sizeof d);
            d.in = ex->dim[ex->rank - 1];
            d.out = weight ? ex->dim[0] : 1;
            d.kernel = weight ? 3 : 1;
            SDQT_CHECK(sdq_layer_create(ctx, &d, &l) == SDQ_OK);
            quant = sdq_layer_quant(l);
            quant.range = SDQ_RANGE_STATIC;
            quant.moving = golden_f(f, path, "p")[0];
            quant.weight_scale = SDQ_WEIGHT_MOVING;
            SDQT_CHECK(sdq_layer_set_quant(ctx, l, &quant) == SDQ_OK);
            sdq_layer_observe(l, 1);
        }
        if (weight) {
            memcpy(l->w.data, ex->data, n * 4);
            x = sdq_tensor_4d(ctx, 1, 3, 3, ex->dim[3]);
        } else {
            x = sdq_tensor_new(ctx, SDQ_F32, ex->rank, ex->dim);
            memcpy(x->data, ex->data, n * 4);
        }
        SDQT_CHECK(sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE) != NULL);
        (void)snprintf(role, sizeof role, "y%d", batch);
        if (weight) {
            const int8_t *q = sdq__ly_quantize_weights(ctx, l, sdq_f32(&l->w));
            float *y = SDQ__PUSH_N(ctx, float, n);
            for (o = 0; o < 5; o++)
                SDQT_CHECK(l->w_mn[o] == mn[batch * 5 + (int)o]
                           && l->w_mx[o] == mx[batch * 5 + (int)o]
                           && sdq_f32(&l->sw)[o] == s[batch * 5 + (int)o]);
            for (o = 0; o < n; o++) y[o] = (float)q[o] * sdq_f32(&l->sw)[o / (n / 5)];
            SDQT_CHECK(apart(y, golden_f(f, path, role), n, s + batch * 5, n / 5) == 0);
        } else {
            float scale = 0;
            int32_t zero = -1;
            sdq__qinput in;
            float *y = SDQ__PUSH_N(ctx, float, n);
            SDQT_CHECK(sdq_layer_input_range(l, 0, &scale, &zero) == 1);
            SDQT_THAT(fminf(l->part[0].mn, 0) == fminf(mn[batch], 0)
                          && fmaxf(l->part[0].mx, 0) == fmaxf(mx[batch], 0),
                      "%s batch %d: range %.9g %.9g, torch %.9g %.9g", path, batch,
                      (double)l->part[0].mn, (double)l->part[0].mx, (double)mn[batch],
                      (double)mx[batch]);
            SDQT_CHECK(scale == s[batch] && zero == z[batch]);
            SDQT_CHECK(sdq__ly_quantize_input(ctx, l, &l->part[0], x, &in) == SDQ_OK);
            for (o = 0; o < n; o++)
                y[o] = (float)((int)in.q[o / l->in * in.ld + o % l->in] - zero) * scale;
            SDQT_CHECK(apart(y, golden_f(f, path, role), n, s + batch, n) == 0);
        }
    }
    sdq_layer_free(ctx, l);
    sdq_arena_release(ctx, mark);
}

static void test_golden(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 2);
    sdq_file *f = NULL;
    SDQT_CHECK(sdq_file_open(ctx, "tests/golden/ops.safetensors", &f) == SDQ_OK);
    if (f) {
        golden_act(ctx, f, "fake_quant_u8/clipped", 0);
        golden_act(ctx, f, "fake_quant_u8/positive", 0);
        golden_act(ctx, f, "fake_quant_u8/ties", 0);
        golden_act(ctx, f, "fake_quant_u8/tiny", 0);
        golden_act(ctx, f, "lsq/act", 1);
        golden_weight(ctx, f, "fake_quant_s8/conv", 0);
        golden_weight(ctx, f, "fake_quant_s8/linear", 0);
        golden_weight(ctx, f, "lsq/weight", 1);
        golden_observer(ctx, f, "act", 0);
        golden_observer(ctx, f, "positive", 0);
        golden_observer(ctx, f, "zero", 0);
        golden_observer(ctx, f, "weight", 1);
    }
    sdq_file_close(ctx, f);
    sdq_ctx_free(ctx);
}

/* ---- settings ---- */

/* FAKE and INT8 agree for every source of the weight scales, after the weights have moved; so they
 * do with 4 bits, where nothing moves on average. */
static void test_weight_scales(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 2);
    int i_case;
    for (i_case = 0; i_case < 6; i_case++) {
        const int source = i_case % 3, four = i_case >= 3;
        const sdq_mark mark = sdq_arena_mark(ctx);
        layer_case c;
        numbers v;
        sdq_layer *l;
        sdq_tensor *x, *a, *b;
        float first[2];
        size_t i;
        (void)case_at(22 + 80, &c);         /* 3x3, static, split */
        c.quant.weight_scale = (sdq_weight_scale)source;
        c.quant.weight_bits = four ? 4 : 8;
        c.quant.weight_group = 7;
        c.quant.moving = 0.5f;
        if (four && source == SDQ_WEIGHT_MOVING) continue;
        numbers_new(&c, &v);
        l = layer_of(ctx, &c, &v);
        x = input_of(ctx, &c, v.x[0], 2);
        sdq_layer_observe(l, 1);
        (void)sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
        memcpy(first, sdq_f32(&l->sw) + 1, sizeof first);
        for (i = 0; i < v.w_count; i++) sdq_f32(&l->w)[i] *= 3.0f;
        (void)sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
        sdq_layer_observe(l, 0);
        a = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
        SDQT_NEAR(sdq_f32(&l->sw)[1] / first[0],
                  source == SDQ_WEIGHT_CURRENT  ? 3
                  : source == SDQ_WEIGHT_MOVING ? 2
                                                : 1,
                  1e-6);
        if (source == SDQ_WEIGHT_FIXED) sdq_f32(&l->sw)[1] *= 2.5f;     /* as learning does */
        if (source == SDQ_WEIGHT_FIXED) a = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
        SDQT_CHECK(sdq_layer_convert(ctx, l) == SDQ_OK);
        b = sdq_layer_forward(ctx, l, x, NULL, SDQ_INT8);
        SDQT_THAT(a && b && memcmp(a->data, b->data, v.y_count * 4) == 0, "source %d differs: %s",
                  source, sdq_error_text(ctx));
        sdq_layer_free(ctx, l);
        numbers_free(&v);
        sdq_arena_release(ctx, mark);
    }
    sdq_ctx_free(ctx);
}

/* Ranges: what is observed, when, and what the settings change. */
static void test_ranges(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    layer_case c;
    numbers v;
    sdq_layer *l;
    sdq_tensor *x, *y, *z;
    sdq_quant q;
    float s = -1, s2 = -1;
    int32_t zero = -1, zero2 = -1;
    (void)case_at(0, &c);
    numbers_new(&c, &v);
    c.quant.range = SDQ_RANGE_STATIC;
    c.quant.moving = 0;
    l = layer_of(ctx, &c, &v);
    x = input_of(ctx, &c, v.x[0], 2);
    SDQT_CHECK(sdq_layer_input_range(l, 0, &s, &zero) == 0 && s == -1 && zero == -1);
    SDQT_CHECK(!sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE)
               && sdq_last_error(ctx) == SDQ_ERR_NOT_CALIBRATED);
    SDQT_CHECK(strstr(sdq_error_text(ctx), "layer tested: its input range was never observed")
               != NULL);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_layer_convert(ctx, l) == SDQ_ERR_NOT_CALIBRATED && sdq_layer_weight(l) != NULL);
    sdq_clear_error(ctx);
    sdq_layer_observe(l, 1);                                /* FLOAT observes, too */
    SDQT_CHECK(sdq_layer_forward(ctx, l, x, NULL, SDQ_FLOAT) != NULL);
    SDQT_CHECK(sdq_layer_input_range(l, 0, &s, &zero) == 1 && s > 0);
    y = sdq_layer_forward(ctx, l, sdq_scale(ctx, x, 2.0f), NULL, SDQ_FLOAT);
    SDQT_CHECK(y && sdq_layer_input_range(l, 0, &s2, &zero2) == 1 && s2 == 2 * s && zero == zero2);
    sdq_layer_observe(l, 0);
    (void)sdq_layer_forward(ctx, l, sdq_scale(ctx, x, 3.0f), NULL, SDQ_FLOAT);
    SDQT_CHECK(sdq_layer_input_range(l, 0, &s, &zero) == 1 && s == s2);     /* off is off */
    q = sdq_layer_quant(l);
    SDQT_CHECK(q.range == SDQ_RANGE_STATIC && q.enabled);
    q.split = 1;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);                  /* forgets */
    SDQT_CHECK(sdq_layer_input_range(l, 0, &s, &zero) == 0
               && sdq_layer_input_range(l, 1, &s, &zero) == 0);
    sdq_layer_observe(l, 1);
    (void)sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
    SDQT_CHECK(sdq_layer_input_range(l, 0, &s, &zero) == 2
               && sdq_layer_input_range(l, 1, &s2, &zero) == 2 && s != s2);
    q.quantize_output = 1;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);
    sdq_layer_observe(l, 0);
    q.range = SDQ_RANGE_POSITION;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);
    SDQT_CHECK(!sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE)
               && sdq_last_error(ctx) == SDQ_ERR_NOT_CALIBRATED);
    SDQT_CHECK(strstr(sdq_error_text(ctx), "output range") != NULL);
    sdq_clear_error(ctx);
    q.quantize_output = 0;
    q.range = SDQ_RANGE_DEFAULT;                            /* of a linear layer: POSITION */
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);
    y = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
    q.range = SDQ_RANGE_POSITION;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);
    z = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
    SDQT_CHECK(y && z && memcmp(y->data, z->data, v.y_count * 4) == 0);
    q.enabled = 0;                                          /* float in every mode */
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK && sdq_layer_convert(ctx, l) == SDQ_OK);
    y = sdq_layer_forward(ctx, l, x, NULL, SDQ_INT8);
    z = sdq_layer_forward(ctx, l, x, NULL, SDQ_FLOAT);
    SDQT_CHECK(y && z && memcmp(y->data, z->data, v.y_count * 4) == 0 && sdq_layer_weight(l));
    q.enabled = 1;
    q.range = SDQ_RANGE_COUNT;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_ERR_ARGUMENT);
    sdq_layer_free(ctx, l);
    numbers_free(&v);
    sdq_ctx_free(ctx);
}

/* An observer that moves between forward and backward does not change the gradient. */
static void test_late_observer(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    layer_case c;
    numbers v;
    float *dx[2];
    int late;
    (void)case_at(22, &c);
    numbers_new(&c, &v);
    for (late = 0; late < 2; late++) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        sdq_layer *l = layer_of(ctx, &c, &v);
        sdq_tensor *x = input_of(ctx, &c, v.x[1], 2), *y;
        sdq_layer_observe(l, 1);
        (void)sdq_layer_forward(ctx, l, input_of(ctx, &c, v.x[0], 2), NULL, SDQ_FAKE);
        sdq_layer_observe(l, 0);
        x->needs_grad = 1;
        sdq_tape_begin(ctx);
        y = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
        sdq_layer_observe(l, late);
        (void)sdq_layer_forward(ctx, l, input_of(ctx, &c, v.x[1], 2), NULL, SDQ_FAKE);
        SDQT_CHECK(sdq_backward(ctx, sdq_mse(ctx, y, sdq_tensor_new(ctx, SDQ_F32, 4, y->dim), NULL))
                   == SDQ_OK);
        sdq_tape_end(ctx);
        dx[late] = (float *)room(v.x_count, 4);
        copy_grad(dx[late], x);
        sdq_layer_free(ctx, l);
        sdq_arena_release(ctx, mark);
    }
    SDQT_CHECK(memcmp(dx[0], dx[1], v.x_count * 4) == 0);
    free(dx[0]);
    free(dx[1]);
    numbers_free(&v);
    sdq_ctx_free(ctx);
}

/* A converted layer in FLOAT mode computes with its int8 weights as floats. */
static void test_float_of_int8(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 2);
    layer_case c;
    size_t i;
    for (i = 15; i < 640; i += 37) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        numbers v, w;
        sdq_layer *a, *b;
        sdq_tensor *x, *y, *z;
        oracle o;
        size_t j;
        if (!SDQT_CHECK(case_at(i, &c))) break;
        c.quant.range = SDQ_RANGE_POSITION;
        c.quant.quantize_output = 0;        /* nothing is observed */
        numbers_new(&c, &v);
        oracle_new(&o, &c, &v);
        oracle_weights(&o);
        w = v;
        w.w = (float *)room(v.w_count, 4);
        for (j = 0; j < v.w_count; j++) w.w[j] = (float)o.wq[j] * o.sw[j / case_k(&c)];
        a = layer_of(ctx, &c, &v);
        b = layer_of(ctx, &c, &w);
        x = input_of(ctx, &c, v.x[0], 2);
        SDQT_CHECK(sdq_layer_convert(ctx, a) == SDQ_OK);
        y = sdq_layer_forward(ctx, a, x, NULL, SDQ_FLOAT);
        z = sdq_layer_forward(ctx, b, x, NULL, SDQ_FLOAT);
        SDQT_THAT(y && z && memcmp(y->data, z->data, v.y_count * 4) == 0, "case %zu", i);
        sdq_tape_begin(ctx);                        /* it cannot be trained */
        x->needs_grad = 1;
        SDQT_CHECK(!sdq_layer_forward(ctx, a, x, NULL, SDQ_FLOAT)
                   && sdq_last_error(ctx) == SDQ_ERR_ARGUMENT);
        sdq_tape_end(ctx);
        sdq_clear_error(ctx);
        SDQT_CHECK(!sdq_layer_forward(ctx, a, x, NULL, SDQ_FAKE)
                   && sdq_last_error(ctx) == SDQ_ERR_ARGUMENT);
        SDQT_CHECK(strstr(sdq_error_text(ctx), "needs float weights") != NULL);
        sdq_clear_error(ctx);
        SDQT_CHECK(!sdq_layer_forward(ctx, b, x, NULL, SDQ_INT8)
                   && sdq_last_error(ctx) == SDQ_ERR_ARGUMENT);
        SDQT_CHECK(strstr(sdq_error_text(ctx), "convert") != NULL);
        sdq_clear_error(ctx);
        SDQT_CHECK(sdq_layer_set_quant(ctx, a, &c.quant) == SDQ_ERR_ARGUMENT);
        sdq_clear_error(ctx);
        SDQT_CHECK(sdq_layer_convert(ctx, a) == SDQ_OK);    /* twice is once */
        sdq_layer_free(ctx, a);
        sdq_layer_free(ctx, b);
        oracle_free(&o);
        free(w.w);
        numbers_free(&v);
        sdq_arena_release(ctx, mark);
    }
    sdq_ctx_free(ctx);
}

/* One vector [in] is one entry, in every mode and range. */
static void test_vector(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    int range, mode;
    for (range = SDQ_RANGE_STATIC; range < SDQ_RANGE_COUNT; range++) {
        layer_case c;
        numbers v;
        sdq_layer *l;
        sdq_tensor *x1, *x2, *y1, *y2;
        memset(&c, 0, sizeof c);
        c.kernel = c.stride = 1;
        c.n = c.h = c.w = 1;
        c.in = 37;
        c.out = 19;
        c.rank = 2;
        c.quant.enabled = 1;
        c.quant.range = (sdq_range)range;
        numbers_new(&c, &v);
        l = layer_of(ctx, &c, &v);
        x1 = sdq_tensor_1d(ctx, 37);
        memcpy(x1->data, v.x[0], 37 * 4);
        x2 = input_of(ctx, &c, v.x[0], 1);
        sdq_layer_observe(l, 1);
        for (mode = SDQ_FLOAT; mode <= SDQ_INT8; mode++) {
            if (mode == SDQ_INT8) SDQT_CHECK(sdq_layer_convert(ctx, l) == SDQ_OK);
            y1 = sdq_layer_forward(ctx, l, x1, NULL, (sdq_mode)mode);
            y2 = sdq_layer_forward(ctx, l, x2, NULL, (sdq_mode)mode);
            SDQT_THAT(y1 && y2 && y1->rank == 1 && memcmp(y1->data, y2->data, 19 * 4) == 0,
                      "range %d mode %d", range, mode);
        }
        sdq_layer_free(ctx, l);
        numbers_free(&v);
    }
    sdq_ctx_free(ctx);
}

static void test_arguments(int tier) {
    static const struct { size_t in, out; int kernel, stride; } bad[] = {
        {0, 1, 1, 1}, {1, 0, 1, 1}, {1, 1, 4, 1}, {1, 1, -1, 1}, {1, 1, 3, -1}, {1, 1, 1, 2}};
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_layer_desc d;
    sdq_layer *l;
    sdq_quant q;
    sdq_tensor *x;
    size_t i;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memset(&d, 0, sizeof d);
        d.name = "wrong";
        d.in = bad[i].in; d.out = bad[i].out; d.kernel = bad[i].kernel; d.stride = bad[i].stride;
        SDQT_CHECK(sdq_layer_create(ctx, &d, &l) == SDQ_ERR_ARGUMENT && !l);
        SDQT_CHECK(strstr(sdq_error_text(ctx), "layer wrong") != NULL);
        sdq_clear_error(ctx);
    }
    d.in = d.out = d.stride = 1;
    for (i = 0; i < 2; i++) {           /* padding where it does nothing, and less than none */
        d.kernel = i ? 3 : 1;
        d.pad[2] = i ? -1 : 1;
        SDQT_CHECK(sdq_layer_create(ctx, &d, &l) == SDQ_ERR_ARGUMENT && !l);
        sdq_clear_error(ctx);
    }
    d.pad[2] = 0;
    d.in = 7311;                        /* 9 x 7311 products with one range: a few too many */
    SDQT_CHECK(sdq_layer_create(ctx, &d, &l) == SDQ_OK);
    q = sdq_layer_quant(l);
    q.range = SDQ_RANGE_STATIC;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_ERR_UNSUPPORTED
               && strstr(sdq_error_text(ctx), "65799 products"));
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_layer_convert(ctx, l) == SDQ_ERR_UNSUPPORTED);   /* as it was created, too */
    sdq_clear_error(ctx);
    q.range = SDQ_RANGE_POSITION;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);
    sdq_layer_free(ctx, l);
    d.in = (size_t)1 << 40; d.out = (size_t)1 << 40; d.kernel = 3; d.stride = 1;
    SDQT_CHECK(sdq_layer_create(ctx, &d, &l) != SDQ_OK && !l);
    sdq_clear_error(ctx);
    d.in = 5; d.out = 7;
    SDQT_CHECK(sdq_layer_create(ctx, &d, &l) == SDQ_OK && strcmp(sdq_layer_name(l), "wrong") == 0);
    SDQT_CHECK(!sdq_layer_forward(ctx, l, NULL, NULL, SDQ_FLOAT) && sdq_last_error(ctx) == SDQ_OK);
    x = sdq_tensor_4d(ctx, 1, 4, 4, 5);
    SDQT_CHECK(!sdq_layer_forward(ctx, l, x, x, SDQ_FLOAT) && sdq_last_error(ctx) == SDQ_ERR_SHAPE);
    SDQT_CHECK(strstr(sdq_error_text(ctx), "result [1,2,2,7], residual [1,4,4,5]") != NULL);
    sdq_clear_error(ctx);
    x = sdq_tensor_4d(ctx, 1, 4, 4, 6);
    SDQT_CHECK(!sdq_layer_forward(ctx, l, x, NULL, SDQ_FLOAT)
               && sdq_last_error(ctx) == SDQ_ERR_SHAPE);
    SDQT_CHECK(strstr(sdq_error_text(ctx), "input [1,4,4,6], expected 5 channels in [n,h,w,c]")
               != NULL);
    sdq_layer_free(ctx, l);
    sdq_layer_free(ctx, NULL);
    sdq_ctx_free(ctx);
}

/* ---- no memory: the k-th allocation fails, or all from the k-th on; or the arena is full ---- */

/* A layer's whole life. Returns the first status that is not SDQ_OK. */
static sdq_status life(sdq_ctx *ctx, const layer_case *c, const numbers *v, sdq_layer **keep,
                       size_t left) {
    sdq_layer_desc d;
    sdq_layer *l = NULL;
    sdq_optim *o = NULL;
    sdq_tensor *x, *y, *leaf[5];
    sdq_optim_desc od;
    int i;
    memset(&d, 0, sizeof d);
    memset(&od, 0, sizeof od);
    d.name = "tested";
    d.in = c->in; d.out = c->out; d.kernel = c->kernel; d.stride = c->stride;
    memcpy(d.pad, c->pad, sizeof d.pad);
    od.ema = 0.9f;
    SDQ__TRY(sdq_layer_create(ctx, &d, &l));
    *keep = l;
    memcpy(l->w.data, v->w, v->w_count * 4);
    SDQ__TRY(sdq_layer_set_quant(ctx, l, &c->quant));
    x = input_of(ctx, c, v->x[0], c->n);
    if (left < SIZE_MAX && x) {             /* the arena gets no second chunk of 4 MiB */
        (void)sdq__push(ctx, ctx->chunks[0].size - ctx->chunks[0].used - left);
        ((sdqt_heap *)ctx->desc.user)->limit = SDQ__CHUNK / 2;
    }
    SDQ__TRY(sdq_optim_create(ctx, &od, &o));
    leaf[0] = sdq_layer_weight(l); leaf[1] = sdq_layer_bias(l); leaf[2] = &l->sw;
    leaf[3] = &l->part[0].s; leaf[4] = &l->part[1].s;
    for (i = 0; i < 5; i++) {
        char name[16];
        (void)snprintf(name, sizeof name, "%d", i);
        (void)sdq_optim_add(ctx, o, leaf[i], name, 1, i > 1 ? 1e-7f : 0, i == 0);
    }
    sdq_layer_observe(l, 1);
    sdq_tape_begin(ctx);
    y = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
    y = sdq_mse(ctx, y, y ? sdq_tensor_new(ctx, SDQ_F32, y->rank, y->dim) : NULL, NULL);
    if (y) (void)sdq_backward(ctx, y);
    sdq_tape_end(ctx);
    (void)sdq_optim_step(ctx, o);
    sdq_optim_free(ctx, o);
    SDQ__TRY(sdq_last_error(ctx));
    SDQ__TRY(sdq_layer_convert(ctx, l));
    (void)sdq_layer_forward(ctx, l, x, NULL, SDQ_INT8);
    return sdq_last_error(ctx);
}

static int life_with(const layer_case *c, const numbers *v, int tier, sdqt_heap *h, size_t left) {
    sdq_ctx *ctx;
    sdq_layer *l = NULL;
    sdq_tensor *a, *b;
    sdq_status st = sdqt_ctx_of(h, tier, 1, &ctx);
    if (st == SDQ_OK) {
        st = life(ctx, c, v, &l, left);
        h->fail_at = SIZE_MAX;              /* memory is back: what is left must work */
        h->limit = 0;
        sdq_clear_error(ctx);
        if (l && !l->w.data && SDQT_CHECK(l->part[l->parts - 1].w.sum != NULL))
            SDQT_CHECK(sdq_layer_forward(ctx, l, input_of(ctx, c, v->x[0], c->n), NULL, SDQ_INT8));
        if (l && l->w.data) {               /* not converted is not converted by half */
            SDQT_CHECK(!sdq_layer_forward(ctx, l, input_of(ctx, c, v->x[0], c->n), NULL, SDQ_INT8)
                       && sdq_last_error(ctx) == SDQ_ERR_ARGUMENT);
            sdq_clear_error(ctx);
        }
        if (l && l->w.data && l->part[0].seen && (!c->quant.quantize_output || l->out_seen)) {
            a = sdq_layer_forward(ctx, l, input_of(ctx, c, v->x[0], c->n), NULL, SDQ_FAKE);
            SDQT_CHECK(a && sdq_layer_convert(ctx, l) == SDQ_OK);
            b = sdq_layer_forward(ctx, l, input_of(ctx, c, v->x[0], c->n), NULL, SDQ_INT8);
            SDQT_CHECK(a && b && memcmp(a->data, b->data, v->y_count * 4) == 0);
        }
        sdq_layer_free(ctx, l);
        sdq_ctx_free(ctx);
    }
    SDQT_THAT(st == SDQ_OK || st == SDQ_ERR_OOM, "status %d", (int)st);
    SDQT_THAT(h->live == 0, "%zu blocks leaked", h->live);
    return st == SDQ_OK;
}

static void test_no_memory(int tier) {
    layer_case c;
    size_t i, k;
    for (i = 2; i < 640; i += 5 * 16 + 5) {         /* 3x3: every range, each with other options */
        numbers v;
        sdqt_heap h;
        int ok;
        if (!SDQT_CHECK(case_at(i, &c))) break;
        c.quant.weight_scale = c.quant.weight_bits == 4 ? SDQ_WEIGHT_FIXED : SDQ_WEIGHT_MOVING;
        c.residual = c.no_bias = 0;
        numbers_new(&c, &v);
        for (ok = 0, k = 0; !ok && k < 200; k++) {
            memset(&h, 0, sizeof h);
            h.fail_at = k;
            h.fails = 1;
            ok = life_with(&c, &v, tier, &h, SIZE_MAX);
            memset(&h, 0, sizeof h);
            h.fail_at = k;
            h.fails = SIZE_MAX / 2;
            SDQT_CHECK(life_with(&c, &v, tier, &h, SIZE_MAX) == ok);
        }
        SDQT_THAT(k > 20 && ok, "%zu allocations", k);
        for (ok = 0, k = 0; !ok && k < ((size_t)1 << 21);
             k += k < 8192 ? 64 : sdq__u_round_up(k / 32, 64)) {
            memset(&h, 0, sizeof h);
            h.fail_at = SIZE_MAX;
            ok = life_with(&c, &v, tier, &h, k);
        }
        SDQT_THAT(k > 20000 && ok, "%zu bytes", k);
        numbers_free(&v);
    }
}

/* ---- large 3x3 convolutions of a frozen layer ---- */

typedef struct large_case { size_t n, h, w, in, out; int bias, res; } large_case;

/* The layer's result for a batch, or for one entry of it, as new numbers. */
static float *large_run(sdq_ctx *ctx, sdq_layer *l, const large_case *c, const float *x,
                        const float *res, size_t first, size_t n) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t pixels = c->h * c->w;
    sdq_tensor *tx = sdq_tensor_4d(ctx, n, c->h, c->w, c->in);
    sdq_tensor *tr = sdq_tensor_4d(ctx, n, c->h, c->w, c->out), *y;
    float *copy = (float *)room(n * pixels * c->out, sizeof(float));
    memcpy(sdq_f32(tx), x + first * pixels * c->in, n * pixels * c->in * sizeof(float));
    memcpy(sdq_f32(tr), res + first * pixels * c->out, n * pixels * c->out * sizeof(float));
    y = sdq_layer_forward(ctx, l, tx, c->res ? tr : NULL, SDQ_FLOAT);
    SDQT_THAT(y != NULL, "%s", sdq_error_text(ctx));
    if (y) memcpy(copy, sdq_f32(y), n * pixels * c->out * sizeof(float));
    sdq_arena_release(ctx, mark);
    return copy;
}

static void winograd_once(int tier, const large_case *c) {
    sdq_ctx *ctx = sdqt_ctx(tier, 2), *plain = sdqt_ctx(SDQ_TIER_SCALAR, 1);
    const size_t in = c->n * c->h * c->w * c->in, out = c->n * c->h * c->w * c->out;
    float *x = (float *)room(in, sizeof *x), *res = (float *)room(out, sizeof *res);
    float *direct, *fast, *same, *last;
    double off = 0, size = 0;
    sdq_layer_desc d;
    sdq_layer *l;
    size_t i;
    memset(&d, 0, sizeof d);
    d.in = c->in; d.out = c->out; d.kernel = 3; d.no_bias = !c->bias;
    d.pad[0] = d.pad[1] = d.pad[2] = d.pad[3] = 1;
    if (sdq_layer_create(ctx, &d, &l) != SDQ_OK) exit(2);
    for (i = 0; i < c->in * c->out * 9; i++) sdq_f32(sdq_layer_weight(l))[i] = sdqt_normal();
    for (i = 0; c->bias && i < c->out; i++) sdq_f32(sdq_layer_bias(l))[i] = 20 * sdqt_normal();
    for (i = 0; i < in; i++) x[i] = sdqt_normal();
    for (i = 0; i < out; i++) res[i] = 20 * sdqt_normal();
    direct = large_run(ctx, l, c, x, res, 0, c->n);
    SDQT_CHECK(sdq__ly_freeze(ctx, l) == SDQ_OK);
    fast = large_run(ctx, l, c, x, res, 0, c->n);
    same = large_run(plain, l, c, x, res, 0, c->n);
    last = large_run(ctx, l, c, x, res, c->n - 1, 1);
    for (i = 0; i < out; i++) {
        off += pow((double)fast[i] - (double)direct[i], 2);
        size += pow((double)direct[i], 2);
    }
    SDQT_THAT(off > 0 && off <= 1e-10 * size, "%zu x %zu, %zu -> %zu: error %g", c->h, c->w, c->in,
              c->out, sqrt(off / size));
    SDQT_BYTES(fast, same, out * sizeof(float));
    SDQT_BYTES(fast + out - out / c->n, last, out / c->n * sizeof(float));
    sdq_layer_free(ctx, l);
    sdq_ctx_free(plain);
    sdq_ctx_free(ctx);
    free(x); free(res); free(direct); free(fast); free(same); free(last);
}

/* Measured against the direct sum: 1.3e-6 to 3e-6 of the size of the result. */
static void test_winograd(int tier) {
    static const large_case cases_[] = {
        {1, 32, 32, 32, 32, 1, 1}, {2, 33, 38, 45, 70, 1, 0}, {1, 35, 65, 33, 40, 0, 1},
        {3, 32, 36, 40, 33, 0, 0}, {1, 64, 60, 700, 32, 1, 1}};        /* the last: two passes */
    size_t i;
    for (i = 0; i < sizeof cases_ / sizeof cases_[0]; i++) winograd_once(tier, &cases_[i]);
}

/* ---- a convolution of the upsampled input ---- */

typedef struct up_case { size_t n, h, w, in, out; sdq_range range; } up_case;

/* x as the layer sees it: quantized by the range of each pixel, block of channels or picture, or
 * the one observed, and back. */
static float *up_input(const up_case *c, const float *x) {
    const size_t all = c->n * c->h * c->w * c->in;
    const size_t len = c->range == SDQ_RANGE_STATIC ? all
                     : c->range == SDQ_RANGE_PICTURE ? all / c->n : c->in;
    const size_t step = c->range == SDQ_RANGE_BLOCK ? 32 : len;
    float *y = (float *)room(all, sizeof *y);
    size_t row, i, j;
    for (row = 0; row < all; row += len)
        for (i = 0; i < len; i += step) {
            const size_t end = row + (i + step < len ? i + step : len);
            float mn = INFINITY, mx = -INFINITY, s;
            int32_t z;
            for (j = row + i; j < end; j++) { mn = fminf(mn, x[j]); mx = fmaxf(mx, x[j]); }
            oracle_scale(mn, mx, &s, &z);
            for (j = row + i; j < end; j++) {
                const float q = nearbyintf(x[j] * (1.0f / s)) + (float)z;
                y[j] = ((q < 0 ? 0 : q > 255 ? 255 : q) - (float)z) * s;
            }
        }
    return y;
}

/* The weights of result row Y, column X, channel o: those of taps that read the same pixel are
 * summed, then quantized with one scale: w[2][2][in]. The first row read is (Y + 1) / 2 - 1. */
static void up_weights(const up_case *c, const float *weights, size_t Y, size_t X, size_t o,
                       float *w) {
    const size_t y0 = (Y + 1) / 2, x0 = (X + 1) / 2;
    float most = 0, s;
    size_t a, b, i;
    memset(w, 0, 4 * c->in * sizeof *w);
    for (a = 0; a < 3; a++)
        for (b = 0; b < 3; b++)
            for (i = 0; i < c->in; i++)
                w[(((Y + a + 1) / 2 - y0) * 2 + (X + b + 1) / 2 - x0) * c->in + i] +=
                    weights[((o * 3 + a) * 3 + b) * c->in + i];
    for (i = 0; i < 4 * c->in; i++) most = fmaxf(most, fabsf(w[i]));
    s = most / 127.5f;
    for (i = 0; i < 4 * c->in; i++) {
        const float q = nearbyintf(w[i] * (1.0f / s));
        w[i] = (q < -128 ? -128 : q > 127 ? 127 : q) * s;
    }
}

/* Result (Y,X,o) of entry e: taps of the upsampled picture, zeros around it. */
static double up_result(const up_case *c, const float *x, const float *w, size_t e, size_t Y,
                        size_t X) {
    double sum = 0;
    size_t a, b, i;
    for (a = 0; a < 2; a++)
        for (b = 0; b < 2; b++) {
            const size_t y = (Y + 1) / 2 + a, u = (X + 1) / 2 + b;  /* one too large */
            if (y < 1 || y > c->h || u < 1 || u > c->w) continue;
            for (i = 0; i < c->in; i++)
                sum += (double)x[((e * c->h + y - 1) * c->w + u - 1) * c->in + i]
                     * (double)w[(a * 2 + b) * c->in + i];
        }
    return sum;
}

static sdq_layer *up_layer(sdq_ctx *ctx, const up_case *c, const float *w, const float *b,
                           int upsamples) {
    sdq_layer_desc d;
    sdq_layer *l;
    sdq_quant q;
    memset(&d, 0, sizeof d);
    d.name = "up";
    d.in = c->in; d.out = c->out; d.kernel = 3;
    d.pad[0] = d.pad[1] = d.pad[2] = d.pad[3] = 1;
    if (sdq_layer_create(ctx, &d, &l) != SDQ_OK) exit(2);
    if (upsamples) sdq__ly_set_upsamples(l);
    memcpy(l->w.data, w, c->out * 9 * c->in * 4);
    memcpy(l->b.data, b, c->out * 4);
    q = sdq_layer_quant(l);
    q.range = c->range;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);
    return l;
}

/* What it cannot do, said in a sentence. */
static void up_refuses(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, sdq_tensor *y, int converted) {
    sdq_quant q = sdq_layer_quant(l);
    SDQT_CHECK(!sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE)
               && strstr(sdq_error_text(ctx), "layer up: upsamples its input; there is no FAKE"));
    sdq_clear_error(ctx);
    SDQT_CHECK(!sdq_layer_forward(ctx, l, x, y, SDQ_INT8)
               && strstr(sdq_error_text(ctx), "no residual"));
    sdq_clear_error(ctx);
    if (converted) {
        SDQT_CHECK(!sdq_layer_forward(ctx, l, x, NULL, SDQ_FLOAT)
                   && strstr(sdq_error_text(ctx), "float weights are gone"));
        sdq_clear_error(ctx);
        SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_ERR_ARGUMENT);
    } else {
        SDQT_CHECK(!sdq_layer_forward(ctx, l, x, NULL, SDQ_INT8)
                   && strstr(sdq_error_text(ctx), "convert"));
        sdq_clear_error(ctx);
        q.split = 1;
        SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_ERR_ARGUMENT);
    }
    sdq_clear_error(ctx);
}

static void up_compare(const up_case *c, const float *x, const float *w, const float *b,
                       const float *y) {
    float *xh = up_input(c, x), *wh = (float *)room(4 * c->in, sizeof *wh);
    double most = 0, error = 0;
    size_t e, o, Y, X;
    for (o = 0; o < c->out; o++)
        for (Y = 0; Y < 2 * c->h; Y++)
            for (X = 0; X < 2 * c->w; X++) {
                up_weights(c, w, Y, X, o, wh);
                for (e = 0; e < c->n; e++) {
                    const double is = (double)y[((e * 2 * c->h + Y) * 2 * c->w + X) * c->out + o];
                    const double want = up_result(c, xh, wh, e, Y, X) + (double)b[o];
                    most = fmax(most, fabs(want));
                    error = fmax(error, fabs(is - want));
                }
            }
    SDQT_THAT(error < 2e-6 * most, "[%zu,%zu,%zu,%zu] -> %zu, range %d: error %g of %g", c->n, c->h,
              c->w, c->in, c->out, (int)c->range, error, most);
    free(xh);
    free(wh);
}

static void test_upsamples(int tier) {
    static const up_case cases_[] = {{1, 1, 1, 5, 3, SDQ_RANGE_POSITION},
                                     {2, 5, 7, 36, 33, SDQ_RANGE_POSITION},
                                     {1, 3, 26, 70, 40, SDQ_RANGE_BLOCK},
                                     {2, 6, 1, 7, 65, SDQ_RANGE_PICTURE},
                                     {2, 1, 9, 4, 34, SDQ_RANGE_STATIC},
                                     {1, 17, 19, 8, 70, SDQ_RANGE_POSITION}};
    size_t i;
    for (i = 0; i < sizeof cases_ / sizeof cases_[0]; i++) {
        const up_case *c = &cases_[i];
        const size_t count = c->n * c->h * c->w * c->in, most = 4 * c->n * c->h * c->w * c->out;
        float *x = some(count, 1.0f), *w = some(c->out * 9 * c->in, 0.2f), *b = some(c->out, 1.0f);
        float *first = NULL;
        int threads;
        for (threads = 1; threads <= 3; threads += 2) {     /* this tier, and the scalar one */
            sdq_ctx *ctx = sdqt_ctx(threads == 1 ? tier : SDQ_TIER_SCALAR, threads);
            sdq_layer *l = up_layer(ctx, c, w, b, 1), *plain = up_layer(ctx, c, w, b, 0);
            sdq_tensor *t = sdq_tensor_4d(ctx, c->n, c->h, c->w, c->in), *y, *z;
            memcpy(t->data, x, count * 4);
            sdq_layer_observe(l, 1);
            y = sdq_layer_forward(ctx, l, t, NULL, SDQ_FLOAT);
            sdq_layer_observe(l, 0);
            z = sdq_layer_forward(ctx, plain, sdq_upsample(ctx, t, 2 * c->h, 2 * c->w), NULL,
                                  SDQ_FLOAT);
            SDQT_CHECK(y && z && sdq__t_same(y, z) && memcmp(y->data, z->data, most * 4) == 0);
            up_refuses(ctx, l, t, z, 0);
            SDQT_CHECK(sdq_layer_convert(ctx, l) == SDQ_OK && !sdq_layer_weight(l));
            up_refuses(ctx, l, t, z, 1);
            y = sdq_layer_forward(ctx, l, t, NULL, SDQ_INT8);
            if (SDQT_THAT(y && sdq__t_same(y, z), "case %zu: %s", i, sdq_error_text(ctx))) {
                if (threads == 1) up_compare(c, x, w, b, sdq_f32(y));
                if (first) SDQT_BYTES(first, y->data, most * 4);
                else first = (float *)memcpy(room(most, 4), y->data, most * 4);
            }
            sdq_layer_free(ctx, l);
            sdq_layer_free(ctx, plain);
            sdq_ctx_free(ctx);
        }
        free(first); free(x); free(w); free(b);
    }
}

static const sdqt_case cases[] = {
    {"exact", test_exact, 1},
    {"exact_shapes", test_exact_shapes, 1},
    {"equal_bits", test_equal_bits, 1},
    {"batch", test_batch, 1},
    {"gradients", test_gradients, 0},
    {"clipped", test_clipped, 1},
    {"golden", test_golden, 1},
    {"weight_scales", test_weight_scales, 0},
    {"ranges", test_ranges, 0},
    {"late_observer", test_late_observer, 0},
    {"float_of_int8", test_float_of_int8, 1},
    {"vector", test_vector, 1},
    {"arguments", test_arguments, 0},
    {"no_memory", test_no_memory, 0},
    {"winograd", test_winograd, 1},
    {"upsamples", test_upsamples, 1},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
