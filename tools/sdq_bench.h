/* sdq_bench.h - part of tools/sdq.c: the commands selftest and bench. */

/* ===========================================================================
 * selftest: the same bits on every instruction set and any number of threads
 * ======================================================================== */

static const flag selftest_flags[] = {
    {"verbose,v", NULL, NULL, "print every case, not only those that differ"},
};

/* Numbers for weights and inputs. */
static sdq_tensor *random_tensor(sdq_ctx *ctx, sdq_rng *rng, size_t n, size_t h, size_t w,
                                 size_t c) {
    sdq_tensor *t = sdq_tensor_4d(ctx, n, h, w, c);
    if (t) sdq_rng_normal(rng, sdq_f32(t), sdq_tensor_count(t));
    return t;
}

static sdq_status random_layer(sdq_ctx *ctx, sdq_rng *rng, size_t in, size_t out, int kernel,
                               int stride, sdq_range range, sdq_layer **l) {
    sdq_layer_desc d;
    sdq_quant q;
    size_t i;
    memset(&d, 0, sizeof d);
    d.name = "layer";
    d.in = in;
    d.out = out;
    d.kernel = kernel;
    d.stride = stride;
    d.pad[0] = d.pad[1] = d.pad[2] = d.pad[3] = kernel / 2;
    TRY(sdq_layer_create(ctx, &d, l));
    sdq_rng_normal(rng, sdq_f32(sdq_layer_weight(*l)), sdq_tensor_count(sdq_layer_weight(*l)));
    sdq_rng_normal(rng, sdq_f32(sdq_layer_bias(*l)), out);
    for (i = 0; i < sdq_tensor_count(sdq_layer_weight(*l)); i++)
        sdq_f32(sdq_layer_weight(*l))[i] *= 1.0f / (float)(in * (size_t)kernel);
    q = sdq_layer_quant(*l);
    q.enabled = 1;
    q.range = range;
    return sdq_layer_set_quant(ctx, *l, &q);
}

typedef struct check_case {
    const char *name;
    int kernel, stride;         /* 0: not a layer */
    sdq_range range;
    sdq_mode mode;
} check_case;

static const check_case check_cases[] = {
    {"linear float", 1, 1, SDQ_RANGE_POSITION, SDQ_FLOAT},
    {"linear int8 position", 1, 1, SDQ_RANGE_POSITION, SDQ_INT8},
    {"linear int8 block", 1, 1, SDQ_RANGE_BLOCK, SDQ_INT8},
    {"conv 3x3 float", 3, 1, SDQ_RANGE_POSITION, SDQ_FLOAT},
    {"conv 3x3 stride 2 float", 3, 2, SDQ_RANGE_POSITION, SDQ_FLOAT},
    {"conv 3x3 fake static", 3, 1, SDQ_RANGE_STATIC, SDQ_FAKE},
    {"conv 3x3 int8 static", 3, 1, SDQ_RANGE_STATIC, SDQ_INT8},
    {"conv 3x3 int8 picture", 3, 1, SDQ_RANGE_PICTURE, SDQ_INT8},
    {"conv 3x3 int8 position", 3, 1, SDQ_RANGE_POSITION, SDQ_INT8},
    {"conv 3x3 stride 2 int8 block", 3, 2, SDQ_RANGE_BLOCK, SDQ_INT8},
    {"group norm + SiLU", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"layer norm", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"GELU", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"quick GELU", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"GEGLU", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"softmax", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"attention", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"upsample + concat", 0, 0, SDQ_RANGE_DEFAULT, SDQ_FLOAT},
    {"training step", 3, 1, SDQ_RANGE_POSITION, SDQ_FAKE},
};

static uint64_t hash_bytes(uint64_t h, const void *data, size_t n) {        /* FNV-1a */
    const unsigned char *p = (const unsigned char *)data;
    while (n--) h = (h ^ *p++) * UINT64_C(0x100000001b3);
    return h;
}

static sdq_tensor *check_op(sdq_ctx *ctx, const char *name, sdq_rng *rng, sdq_tensor *x) {
    const size_t c = x->dim[3], tokens = x->dim[1] * x->dim[2];
    sdq_tensor *g = sdq_tensor_1d(ctx, c), *b = sdq_tensor_1d(ctx, c), *q;
    size_t dim[3];
    if (!g || !b) return NULL;
    sdq_rng_normal(rng, sdq_f32(g), c);
    sdq_rng_normal(rng, sdq_f32(b), c);
    dim[0] = x->dim[0]; dim[1] = tokens; dim[2] = c;
    if (name[0] == 'g') return sdq_group_norm(ctx, x, g, b, 7, 1e-5f, 1);
    if (name[0] == 'l') return sdq_layer_norm(ctx, x, g, b, 1e-5f);
    if (!strcmp(name, "GELU")) return sdq_gelu(ctx, x);
    if (name[0] == 'q') return sdq_quick_gelu(ctx, x);
    if (name[0] == 'G') return sdq_geglu(ctx, x);
    if (name[0] == 's') return sdq_softmax(ctx, x);
    q = sdq_reshape(ctx, x, 3, dim);
    if (name[0] == 'a') return sdq_attention(ctx, q, sdq_gelu(ctx, q), sdq_silu(ctx, q), 2, 0);
    return sdq_concat(ctx, sdq_upsample(ctx, x, 2 * x->dim[1], 2 * x->dim[2]),
                      sdq_upsample(ctx, x, 2 * x->dim[1], 2 * x->dim[2]));
}

/* Two AdamW steps of a layer; the hash covers its weights. */
static sdq_status check_train(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, uint64_t *hash) {
    sdq_optim *o = NULL;
    sdq_status st = sdq_optim_create(ctx, NULL, &o);
    int i;
    if (st == SDQ_OK) st = sdq_optim_add(ctx, o, sdq_layer_weight(l), "w", 0.0f, 0.0f, 1);
    for (i = 0; i < 2 && st == SDQ_OK; i++) {
        sdq_tensor *y;
        sdq_tape_begin(ctx);
        y = sdq_silu(ctx, sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE));
        st = y ? sdq_backward(ctx, sdq_mse(ctx, y, sdq_scale(ctx, y, 0.5f), NULL))
               : sdq_last_error(ctx);
        sdq_tape_end(ctx);
        if (st == SDQ_OK) st = sdq_optim_step(ctx, o);
    }
    *hash = hash_bytes(*hash, sdq_layer_weight(l)->data, sdq_tensor_count(sdq_layer_weight(l)) * 4);
    sdq_optim_free(ctx, o);
    return st;
}

static sdq_status check_run(sdq_ctx *ctx, const check_case *c, uint64_t *hash) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_layer *l = NULL;
    sdq_tensor *x, *y = NULL;
    sdq_status st = SDQ_OK;
    sdq_rng rng;
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 7);
    *hash = UINT64_C(0xcbf29ce484222325);
    x = random_tensor(ctx, &rng, 2, 9, 7, c->kernel ? 67 : 42);
    if (!x) return sdq_last_error(ctx);
    if (!c->kernel) y = check_op(ctx, c->name, &rng, x);
    else st = random_layer(ctx, &rng, 67, 75, c->kernel, c->stride, c->range, &l);
    if (l && st == SDQ_OK) {
        sdq_layer_observe(l, 1);
        y = sdq_layer_forward(ctx, l, x, NULL, SDQ_FLOAT);
        sdq_layer_observe(l, 0);
        if (c->mode == SDQ_INT8) st = sdq_layer_convert(ctx, l);
        if (st == SDQ_OK && c->mode != SDQ_FLOAT) y = sdq_layer_forward(ctx, l, x, NULL, c->mode);
        if (st == SDQ_OK && !strcmp(c->name, "training step")) st = check_train(ctx, l, x, hash);
    }
    if (st == SDQ_OK && !y) st = sdq_last_error(ctx);
    if (st == SDQ_OK) *hash = hash_bytes(*hash, y->data, sdq_tensor_count(y) * sizeof(float));
    if (l) sdq_layer_free(ctx, l);
    sdq_arena_release(ctx, mark);
    return st;
}

static sdq_status cmd_selftest(job *j) {
    const int verbose = arg_on(&j->a, "verbose");
    size_t i, passed = 0, failed = 0, tiers = 0;
    int tier, threads;
    for (tier = SDQ_TIER_SCALAR; tier < SDQ_TIER_COUNT; tier++)
        tiers += sdq_tier_available((sdq_tier)tier) != 0;
    for (i = 0; i < COUNT(check_cases); i++) {
        uint64_t first = 0, hash;
        int good = 1;
        for (tier = SDQ_TIER_SCALAR; tier < SDQ_TIER_COUNT; tier++)
            for (threads = 1; threads <= 2 && sdq_tier_available((sdq_tier)tier); threads++) {
                sdq_ctx_desc d;
                sdq_ctx *ctx;
                sdq_status st;
                memset(&d, 0, sizeof d);
                d.tier = (sdq_tier)tier;
                d.threads = threads;
                TRY(sdq_ctx_create(&d, &ctx));
                st = check_run(ctx, &check_cases[i], &hash);
                if (st != SDQ_OK)
                    printf("%s on %s: %s\n", check_cases[i].name, sdq_tier_name(d.tier),
                           sdq_error_text(ctx));
                sdq_ctx_free(ctx);
                if (tier == SDQ_TIER_SCALAR && threads == 1) first = hash;
                good &= st == SDQ_OK && hash == first;
                if (st == SDQ_OK && hash != first)
                    printf("%s: %s with %d threads differs from scalar\n", check_cases[i].name,
                           sdq_tier_name(d.tier), threads);
            }
        if (verbose)
            printf("%-4s %-30s %016llx\n", good ? "ok" : "FAIL", check_cases[i].name,
                   (unsigned long long)first);
        good ? passed++ : failed++;
    }
    printf("%zu instruction sets, 1 and 2 threads: %zu passed, %zu failed\n", tiers, passed,
           failed);
    return failed ? fail(j, "selftest: results differ") : SDQ_OK;
}

/* ===========================================================================
 * bench: shares of the machine's own peak; int8 against float
 *
 * The peak is the best run of a loop of multiply-adds that touches registers only, looked for again
 * between all others. Everything else is the median of alternating runs, so that a slow moment of
 * the machine hits both sides.
 * ======================================================================== */

static const flag bench_flags[] = {
    {"model,m", "FOLDER|FILE", NULL,
     "time the UNet of this folder (weights may be missing) or single file, layer by layer"},
    {"unet", "FILE", NULL, "its int8 UNet, for --hash"},
    {"hash", NULL, NULL,
     "only the hash of an int8 evaluation on every instruction set up to --tier: are they equal?"},
    {"batch", "N", NULL, "samples of a UNet evaluation [1, of less than 32 x 32 numbers 8]"},
    {"runs", "N", "21", "alternating runs; the median counts"},
    {"layers", "N|all", "12", "shapes of layers to list, those that take most time"},
    {"json", "FILE", NULL, "write the numbers there, too"},
};

/* ---- the peak ---- */

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <immintrin.h>
#define PEAK 1
/* 14 sums in registers: more than latency (4) times units (2). */
#define PEAK_EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
/* The empty asm hides that all sums are equal: the compiler would compute them once. */
#define PEAK_BEGIN(n) s##n = start; __asm__ volatile("" : "+x"(s##n));
#define PEAK_STORE(n) memcpy((char *)out + 64 * n, &s##n, sizeof s##n);
#define PEAK_LOOP(name, isa, type, load, STEP) \
    __attribute__((target(isa))) static void name(size_t rounds, void *out) { \
        const type start = load(out), one = start; \
        type s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13; \
        PEAK_EACH(PEAK_BEGIN) \
        while (rounds--) { PEAK_EACH(STEP) __asm__ volatile("" : "+r"(rounds)); } \
        PEAK_EACH(PEAK_STORE) \
    }
#define LOAD_PS256(p) _mm256_loadu_ps((const float *)(p))
#define LOAD_PS512(p) _mm512_loadu_ps((const float *)(p))
#define LOAD_I256(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_I512(p) _mm512_loadu_si512(p)
#define FMA256(n) s##n = _mm256_fmadd_ps(s##n, one, one);
#define FMA512(n) s##n = _mm512_fmadd_ps(s##n, one, one);
#define MADD256(n) s##n = _mm256_add_epi32(s##n, _mm256_madd_epi16(s##n, one));
#define MADD512(n) s##n = _mm512_add_epi32(s##n, _mm512_madd_epi16(s##n, one));
#define DOT512(n) s##n = _mm512_dpbusd_epi32(s##n, one, one);
PEAK_LOOP(peak_fma_avx2, "avx2,fma", __m256, LOAD_PS256, FMA256)
PEAK_LOOP(peak_fma_avx512, "avx512f", __m512, LOAD_PS512, FMA512)
PEAK_LOOP(peak_madd_avx2, "avx2", __m256i, LOAD_I256, MADD256)
PEAK_LOOP(peak_madd_avx512, "avx512f,avx512bw", __m512i, LOAD_I512, MADD512)
PEAK_LOOP(peak_dot_avx512, "avx512f,avx512vnni", __m512i, LOAD_I512, DOT512)
#else
#define PEAK 0
#endif

/* The most operations per second that were seen; 0: not known. */
typedef struct peak { double fp32, int8; } peak;

/* One run of the loop on all threads of the context, timed by each of them: operations per second.
 * An operation is a multiplication or an addition; int8 products widened to int16 count as such. */
static double peak_run(sdq_tier tier, int threads, int int8) {
    double rate = 0.0;
#if PEAK
    static const size_t rounds = 1000000;
    void (*loop)(size_t, void *) = tier == SDQ_TIER_AVX2 ? (int8 ? peak_madd_avx2 : peak_fma_avx2)
        : !int8 ? peak_fma_avx512 : tier == SDQ_TIER_AVX512 ? peak_madd_avx512 : peak_dot_avx512;
    const double lanes = tier == SDQ_TIER_AVX2     ? (int8 ? 16 : 8)
                         : !int8                   ? 16
                         : tier == SDQ_TIER_AVX512 ? 32
                                                   : 64;
    if (tier == SDQ_TIER_SCALAR) return 0.0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(+ : rate)
#endif
    {
        char out[64 * 14];
        double t;
        memset(out, 0, sizeof out);
#ifdef _OPENMP
#pragma omp barrier
#endif
        t = now();
        loop(rounds, out);
        rate += 2.0 * lanes * 14.0 * (double)rounds / (now() - t);
    }
#endif
    (void)tier; (void)threads; (void)int8;
    return rate;
}
static void peak_look(job *j, peak *p) {
    const double f = peak_run(sdq_ctx_tier(j->ctx), sdq_ctx_threads(j->ctx), 0);
    const double q = peak_run(sdq_ctx_tier(j->ctx), sdq_ctx_threads(j->ctx), 1);
    if (f > p->fp32) p->fp32 = f;
    if (q > p->int8) p->int8 = q;
}
static double percent(double part, double all) { return all > 0.0 ? 100.0 * part / all : 0.0; }

static double median(job *j, const double *x, size_t n) {
    double m = 0.0;
    (void)sdq_percentile(j->ctx, x, n, 50.0, &m);
    return m;
}

/* ---- one product as a layer, float and int8 ---- */

typedef struct bench_shape {
    const char *name;
    size_t h, w, in, out;
    int kernel;
    sdq_range range;
} bench_shape;

static const bench_shape bench_shapes[] = {
    {"linear M=1024 N=640 K=640, static range", 1, 1024, 640, 640, 1, SDQ_RANGE_STATIC},
    {"linear M=1024 N=640 K=640, per position", 1, 1024, 640, 640, 1, SDQ_RANGE_POSITION},
    {"linear M=1024 N=640 K=640, per block", 1, 1024, 640, 640, 1, SDQ_RANGE_BLOCK},
    {"conv3x3 M=4096 N=320 K=2880, static range", 64, 64, 320, 320, 3, SDQ_RANGE_STATIC},
    {"conv3x3 M=4096 N=320 K=2880, per picture", 64, 64, 320, 320, 3, SDQ_RANGE_PICTURE},
    {"conv3x3 M=4096 N=320 K=2880, per position", 64, 64, 320, 320, 3, SDQ_RANGE_POSITION},
    {"conv3x3 M=4096 N=320 K=2880, per block", 64, 64, 320, 320, 3, SDQ_RANGE_BLOCK},
};

/* Layers of a shape: float, int8, and int8 with 32 outputs only, which is mostly quantizing. */
typedef struct bench_layers { sdq_layer *l[3]; } bench_layers;

static sdq_status bench_make(job *j, const bench_shape *s, sdq_tensor *x, bench_layers *b) {
    sdq_rng rng;
    int i;
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 3);
    for (i = 0; i < 3; i++) {
        const sdq_mark mark = sdq_arena_mark(j->ctx);
        TRY(random_layer(j->ctx, &rng, s->in, i == 2 ? 32 : s->out, s->kernel, 1, s->range,
                         &b->l[i]));
        if (i == 0) continue;
        sdq_layer_observe(b->l[i], 1);
        if (!sdq_layer_forward(j->ctx, b->l[i], x, NULL, SDQ_FLOAT)) return sdq_last_error(j->ctx);
        sdq_layer_observe(b->l[i], 0);
        TRY(sdq_layer_convert(j->ctx, b->l[i]));
        sdq_arena_release(j->ctx, mark);
    }
    return SDQ_OK;
}

static double bench_layer(job *j, sdq_layer *l, sdq_tensor *x, sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(j->ctx);
    const double t = now();
    (void)sdq_layer_forward(j->ctx, l, x, NULL, mode);
    sdq_arena_release(j->ctx, mark);
    return now() - t;
}

/* Times of one shape in ms and shares of the peaks; the peaks are looked for between the runs. */
static sdq_status bench_shape_run(job *j, const bench_shape *s, size_t runs, peak *p, FILE *json) {
    const sdq_mark mark = sdq_arena_mark(j->ctx);
    const double work =
        2.0 * (double)(s->h * s->w * s->in * s->out) * (double)(s->kernel * s->kernel);
    double *t[3], m[3], quantize, product;
    bench_layers b = {{NULL, NULL, NULL}};
    sdq_status st;
    sdq_rng rng;
    sdq_tensor *x;
    size_t i, k;
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 4);
    x = random_tensor(j->ctx, &rng, 1, s->h, s->w, s->in);
    st = x ? bench_make(j, s, x, &b) : sdq_last_error(j->ctx);
    for (k = 0; k < 3; k++) t[k] = (double *)own(j, (runs + 1) * sizeof(double));
    for (i = 0; st == SDQ_OK && i <= runs; i++) {       /* the first run warms up */
        const size_t at = i ? i - 1 : 0;
        for (k = 0; k < 3; k++) t[k][at] = bench_layer(j, b.l[k], x, k ? SDQ_INT8 : SDQ_FLOAT);
        peak_look(j, p);
    }
    for (k = 0; k < 3; k++)
        if (b.l[k]) sdq_layer_free(j->ctx, b.l[k]);
    sdq_arena_release(j->ctx, mark);
    if (st != SDQ_OK) return st;
    for (k = 0; k < 3; k++) m[k] = median(j, t[k], runs);
    /* time = quantizing + outputs * c, from the two numbers of outputs */
    product = (m[1] - m[2]) / (double)(s->out - 32) * (double)s->out;
    quantize = m[1] - product;
    printf("%-43s %8.2f %6.0f %4.0f%% %8.2f %6.0f %4.0f%% %5.2fx %8.2f %7.2f %4.0f%%\n", s->name,
           m[0] * 1e3, work / m[0] * 1e-9, percent(work / m[0], p->fp32), m[1] * 1e3,
           work / m[1] * 1e-9, percent(work / m[1], p->int8), m[0] / m[1], quantize * 1e3,
           product * 1e3, percent(work / product, p->int8));
    if (json)
        fprintf(json,
                "  {\"shape\": \"%s\", \"fp32_ms\": %.4f, \"int8_ms\": %.4f, \"quantize_ms\": "
                "%.4f, \"product_ms\": %.4f},\n",
                s->name, m[0] * 1e3, m[1] * 1e3, quantize * 1e3, product * 1e3);
    fflush(stdout);
    return SDQ_OK;
}

/* ---- an evaluation of a UNet, float and int8 ---- */

/* Weights, or random ones where the folder has only a configuration. */
static sdq_status bench_load(job *j, const char *folder, sdq_model **out) {
    if (sdq_model_load(j->ctx, folder, SDQ_PART_UNET, out) == SDQ_OK) return SDQ_OK;
    if (sdq_last_error(j->ctx) != SDQ_ERR_MISSING && sdq_last_error(j->ctx) != SDQ_ERR_IO)
        return sdq_last_error(j->ctx);
    sdq_clear_error(j->ctx);
    return sdq_model_init(j->ctx, folder, SDQ_PART_UNET, 1, out);
}

typedef struct bench_net {
    const char *name;
    sdq_mode mode;
    sdq_range conv, linear;     /* of an int8 network */
    int attention;              /* bits of its attention; 0: as the recipe says */
    sdq_model *m;
    sdq_prompt_cache *prompt;
    sdq_time_table *times;
} bench_net;

/* The first two are those whose time is told apart; DEFAULT ranges are the recipe's. */
static const bench_net bench_nets[] = {
    {"float", SDQ_FLOAT, SDQ_RANGE_DEFAULT, SDQ_RANGE_DEFAULT, 0, NULL, NULL, NULL},
    {"int8, the recipe", SDQ_INT8, SDQ_RANGE_DEFAULT, SDQ_RANGE_DEFAULT, 0, NULL, NULL, NULL},
    {"int8, static ranges for 3x3", SDQ_INT8, SDQ_RANGE_STATIC, SDQ_RANGE_POSITION, 0, NULL, NULL,
     NULL},
    {"int8, a range per picture", SDQ_INT8, SDQ_RANGE_PICTURE, SDQ_RANGE_POSITION, 0, NULL, NULL,
     NULL},
    {"int8, a range per block", SDQ_INT8, SDQ_RANGE_BLOCK, SDQ_RANGE_BLOCK, 0, NULL, NULL, NULL},
    {"int8, attention in float", SDQ_INT8, SDQ_RANGE_DEFAULT, SDQ_RANGE_DEFAULT, 32, NULL, NULL,
     NULL},
    {"int8, attention in 8 bits", SDQ_INT8, SDQ_RANGE_DEFAULT, SDQ_RANGE_DEFAULT, 8, NULL, NULL,
     NULL},
};

static sdq_status bench_net_make(job *j, bench_net *b, const char *folder, sdq_unet_input *in,
                                 size_t batch) {
    sdq_recipe r;
    TRY(bench_load(j, folder, &b->m));
    if (b->mode == SDQ_INT8) {
        TRY(recipe_from_args(j, &r));
        if (b->conv != SDQ_RANGE_DEFAULT) r.range_conv = b->conv;
        if (b->linear != SDQ_RANGE_DEFAULT) r.range_linear = b->linear;
        if (b->attention) r.attention_bits = b->attention;
        TRY(sdq_recipe_apply(j->ctx, b->m, &r, keep_float(j)));
        sdq_model_observe(b->m, 1);
        if (!sdq_unet_forward(j->ctx, b->m, in, SDQ_FLOAT)) return sdq_last_error(j->ctx);
        sdq_model_observe(b->m, 0);
        TRY(sdq_model_convert(j->ctx, b->m));
    }
    TRY(sdq_model_freeze(j->ctx, b->m));
    TRY(sdq_unet_prompt(j->ctx, b->m, in->context, b->mode, &b->prompt));
    return sdq_unet_times(j->ctx, b->m, in->timesteps, NULL, batch, b->mode, &b->times);
}

static double bench_net_run(job *j, const bench_net *b, const sdq_unet_input *input) {
    const sdq_mark mark = sdq_arena_mark(j->ctx);
    const double t = now();
    sdq_unet_input in = *input;
    in.prompt = b->prompt;
    in.times = b->times;
    (void)sdq_unet_forward(j->ctx, b->m, &in, b->mode);
    sdq_arena_release(j->ctx, mark);
    return now() - t;
}

/* Random latents and context for a UNet of the folder; *batch 0: chosen here. */
static sdq_status bench_input(job *j, const char *folder, size_t *batch, sdq_unet_input *in) {
    float *times;
    sdq_model_info info;
    size_t i, side, tokens = 77;
    sdq_rng rng;
    TRY(bench_load(j, folder, &j->unet));
    info = sdq_model_get_info(j->unet);
    sdq_model_free(j->ctx, j->unet);
    j->unet = NULL;
    side = info.sample_size ? info.sample_size : 64;
    if (*batch == 0) *batch = side < 32 ? 8 : 1;
    times = (float *)own(j, *batch * sizeof *times);
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 5);
    memset(in, 0, sizeof *in);
    in->sample = random_tensor(j->ctx, &rng, *batch, side, info.sample_width ? info.sample_width
                                                                            : side, info.in);
    if (load_tokenizer(j, folder) == SDQ_OK) tokens = sdq_tokenizer_length(j->tokenizer);
    sdq_clear_error(j->ctx);
    in->context = sdq_tensor_3d(j->ctx, *batch, tokens, info.context);
    if (!in->sample || !in->context) return sdq_last_error(j->ctx);
    sdq_rng_normal(&rng, sdq_f32(in->context), sdq_tensor_count(in->context));
    for (i = 0; i < *batch; i++) times[i] = 981.0f - 20.0f * (float)(i % 50);
    in->timesteps = times;
    return SDQ_OK;
}

/* ---- where the time of an evaluation goes: by layer and by kind of work ---- */

/* All layers of one shape. */
typedef struct bench_row {
    int kernel, stride, int8;
    size_t rows, in, out, count;
    double *all[2], *product[2];        /* seconds of a run; float, int8 */
    double all_s[2], product_s[2];      /* their medians */
} bench_row;

typedef struct bench_profile {
    bench_row *row;
    size_t n, *call, calls, at;         /* call i of an evaluation is of shape call[i] */
    double *kind[2][SDQ_WORK_COUNT], *prompt[2], *times[2];     /* seconds of a run */
    size_t run, runs;
    int net;                            /* 0: float, 1: int8; -1: an int8 run to find the shapes */
} bench_profile;

static double bench_now(void *user) {
    (void)user;
    return now();
}

static double bench_row_work(const bench_row *r) {
    return 2.0 * (double)(r->count * r->rows * r->in * r->out) * (double)(r->kernel * r->kernel);
}

/* The row of a layer's shape; a new one if there is none. Rows are as many as layers at most. */
static size_t bench_find(bench_profile *p, const sdq_layer_work *w) {
    const sdq_layer_desc *l = &w->layer;
    const size_t rows = sdq_tensor_count(w->y) / w->y->dim[w->y->rank - 1];
    bench_row *r;
    size_t i;
    for (i = 0; i < p->n; i++) {
        r = &p->row[i];
        if (r->kernel == l->kernel && r->stride == l->stride && r->rows == rows && r->in == l->in
            && r->out == l->out && r->int8 == w->int8) return i;
    }
    r = &p->row[p->n++];
    r->kernel = l->kernel;
    r->stride = l->stride;
    r->rows = rows;
    r->in = l->in;
    r->out = l->out;
    r->int8 = w->int8;
    return i;
}

static void bench_on_layer(void *user, const sdq_layer_work *w) {
    bench_profile *p = (bench_profile *)user;
    bench_row *r;
    size_t i;
    if (p->net < 0) {
        i = bench_find(p, w);
        p->row[i].count++;
        p->call[p->calls++] = i;
        return;
    }
    r = &p->row[p->call[p->at++]];
    for (i = 0; i < SDQ_WORK_COUNT; i++) r->all[p->net][p->run] += w->seconds[i];
    r->product[p->net][p->run] += w->seconds[w->int8 ? SDQ_WORK_INT8 : SDQ_WORK_FLOAT]
                                + w->seconds[SDQ_WORK_WAIT];     /* for the others' part of it */
}

/* One profiled evaluation, and what is made once for many: the prompt's keys and values, the time
 * path. */
static sdq_status bench_profile_run(job *j, bench_profile *p, const bench_net *b,
                                    const sdq_unet_input *in, size_t batch) {
    sdq_prompt_cache *prompt = NULL;
    sdq_time_table *times = NULL;
    sdq_profile profile;
    double t;
    size_t i;
    memset(&profile, 0, sizeof profile);
    profile.now = bench_now;
    profile.layer = bench_on_layer;
    profile.user = p;
    p->at = 0;
    TRY(sdq_ctx_profile(j->ctx, &profile));
    (void)bench_net_run(j, b, in);
    TRY(sdq_ctx_profile(j->ctx, NULL));
    if (p->net < 0) return sdq_last_error(j->ctx);
    for (i = 0; i < SDQ_WORK_COUNT; i++) p->kind[p->net][i][p->run] = profile.seconds[i];
    t = now();
    TRY(sdq_unet_prompt(j->ctx, b->m, in->context, b->mode, &prompt));
    p->prompt[p->net][p->run] = now() - t;
    sdq_prompt_cache_free(j->ctx, prompt);
    t = now();
    TRY(sdq_unet_times(j->ctx, b->m, in->timesteps, NULL, batch, b->mode, &times));
    p->times[p->net][p->run] = now() - t;
    sdq_time_table_free(j->ctx, times);
    return SDQ_OK;
}

static int by_int8_time(const void *a, const void *b) {
    const double x = ((const bench_row *)a)->all_s[1], y = ((const bench_row *)b)->all_s[1];
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Alternating runs of the first two networks. */
static sdq_status bench_profile_all(job *j, bench_profile *p, const bench_net *net,
                                    const sdq_unet_input *in, size_t batch, peak *top) {
    const size_t most = sdq_model_layer_count(net[1].m), bytes = p->runs * sizeof(double);
    size_t i;
    int k;
    p->row = (bench_row *)own(j, most * sizeof *p->row);
    p->call = (size_t *)own(j, most * sizeof *p->call);
    p->net = -1;
    TRY(bench_profile_run(j, p, &net[1], in, batch));
    for (k = 0; k < 2; k++) {
        for (i = 0; i < p->n; i++) {
            p->row[i].all[k] = (double *)own(j, bytes);
            p->row[i].product[k] = (double *)own(j, bytes);
        }
        for (i = 0; i < SDQ_WORK_COUNT; i++) p->kind[k][i] = (double *)own(j, bytes);
        p->prompt[k] = (double *)own(j, bytes);
        p->times[k] = (double *)own(j, bytes);
    }
    for (p->run = 0; p->run < p->runs; p->run++)
        for (p->net = 0; p->net < 2; p->net++) {
            TRY(bench_profile_run(j, p, &net[p->net], in, batch));
            peak_look(j, top);
        }
    for (i = 0; i < p->n; i++)
        for (k = 0; k < 2; k++) {
            p->row[i].all_s[k] = median(j, p->row[i].all[k], p->runs);
            p->row[i].product_s[k] = median(j, p->row[i].product[k], p->runs);
        }
    return SDQ_OK;
}

static void bench_print_row(const char *name, const bench_row *r, double work, const peak *top,
                            const double *whole, FILE *json) {
    const double most = r->int8 ? top->int8 : top->fp32;
    printf("%-36s %5zu %8.2f %6.0f %4.0f%% %5.1f%%", name, r->count, r->all_s[0] * 1e3,
           work / r->all_s[0] * 1e-9, percent(work / r->all_s[0], top->fp32),
           percent(r->all_s[0], whole[0]));
    printf(" %8.2f %6.0f %4.0f%% %7.0f%% %5.1f%%%s\n", r->all_s[1] * 1e3,
           work / r->all_s[1] * 1e-9, percent(work / r->all_s[1], most),
           percent(work / r->product_s[1], most), percent(r->all_s[1], whole[1]),
           r->int8 ? "" : " float");
    if (json)
        fprintf(json,
                "  {\"layers\": \"%s\", \"count\": %zu, \"gop\": %.6f, \"fp32_ms\": %.4f, "
                "\"int8_ms\": %.4f, \"product_ms\": %.4f, \"int8\": %d},\n",
                name, r->count, work * 1e-9, r->all_s[0] * 1e3, r->all_s[1] * 1e3,
                r->product_s[1] * 1e3, r->int8);
}

/* Rows first..last as one. */
static void bench_print_sum(const char *name, const bench_profile *p, size_t first, size_t last,
                            int int8, const peak *top, const double *whole, FILE *json) {
    bench_row sum;
    double work = 0.0;
    size_t i;
    int k;
    memset(&sum, 0, sizeof sum);
    sum.int8 = int8;
    for (i = first; i < last; i++) {
        const bench_row *r = &p->row[i];
        if (r->int8 != int8) continue;
        sum.count += r->count;
        work += bench_row_work(r);
        for (k = 0; k < 2; k++) {
            sum.all_s[k] += r->all_s[k];
            sum.product_s[k] += r->product_s[k];
        }
    }
    if (sum.count) bench_print_row(name, &sum, work, top, whole, json);
}

static void bench_print_layers(bench_profile *p, size_t most, const peak *top, const double *whole,
                               FILE *json) {
    char name[64];
    size_t i;
    qsort(p->row, p->n, sizeof *p->row, by_int8_time);
    if (most > p->n) most = p->n;
    printf("\nits layers, %zu shapes, time of all layers of a shape; peak: fp32 %.0f GFLOP/s, int8 "
           "%.0f GOP/s\n%-36s %5s %8s %6s %5s %6s %8s %6s %5s %8s %6s\n",
           p->n, top->fp32 * 1e-9, top->int8 * 1e-9, "a product counts as direct, Winograd's, too",
           "", "fp32", "GFLOP", "of", "of", "int8", "GOP", "of", "product", "of");
    printf("%-36s %5s %8s %6s %5s %6s %8s %6s %5s %8s %6s\n", "", "count", "ms", "/s", "peak",
           "time", "ms", "/s", "peak", "of peak", "time");
    for (i = 0; i < most; i++) {
        const bench_row *r = &p->row[i];
        (void)snprintf(name, sizeof name, "%s%s M=%zu N=%zu K=%zu",
                       r->kernel > 1 ? "conv3x3" : "linear", r->stride > 1 ? "/2" : "", r->rows,
                       r->out, r->in * (size_t)(r->kernel * r->kernel));
        bench_print_row(name, r, bench_row_work(r), top, whole, json);
    }
    if (most < p->n) {
        bench_print_sum("the other int8 ones", p, most, p->n, 1, top, whole, json);
        bench_print_sum("the other float ones", p, most, p->n, 0, top, whole, json);
    }
    bench_print_sum("all int8 ones", p, 0, p->n, 1, top, whole, json);
    bench_print_sum("all float ones", p, 0, p->n, 0, top, whole, json);
}

static void bench_print_kind(const char *name, const double *s, const double *whole, FILE *json) {
    printf("  %-36s %9.2f %5.1f%% %9.2f %5.1f%%\n", name, s[0] * 1e3, percent(s[0], whole[0]),
           s[1] * 1e3, percent(s[1], whole[1]));
    if (json)
        fprintf(json, "  {\"kind\": \"%s\", \"fp32_ms\": %.4f, \"int8_ms\": %.4f},\n", name,
                s[0] * 1e3, s[1] * 1e3);
}

/* Both tables; whole: the medians of all kinds of work, added up. */
static void bench_print_profile(job *j, bench_profile *p, size_t most, const peak *top,
                                FILE *json) {
    static const sdq_work order[] = {
        SDQ_WORK_INT8, SDQ_WORK_FLOAT, SDQ_WORK_ATTENTION, SDQ_WORK_SOFTMAX, SDQ_WORK_QUANTIZE,
        SDQ_WORK_NORM, SDQ_WORK_GEGLU, SDQ_WORK_ELEMENTS, SDQ_WORK_COPY, SDQ_WORK_OTHER,
        SDQ_WORK_WAIT};
    double kind[SDQ_WORK_COUNT][2], whole[2] = {0.0, 0.0}, once[2];
    size_t i;
    int k;
    for (i = 0; i < SDQ_WORK_COUNT; i++)
        for (k = 0; k < 2; k++) whole[k] += kind[i][k] = median(j, p->kind[k][i], p->runs);
    printf("\nwhere its time goes %18s %9s %6s %9s %6s\n", "", "fp32 ms", "", "int8 ms", "");
    for (i = 0; i < COUNT(order); i++)
        bench_print_kind(sdq_work_name(order[i]), kind[order[i]], whole, json);
    bench_print_kind("all of it", whole, whole, json);
    for (k = 0; k < 2; k++) once[k] = median(j, p->prompt[k], p->runs);
    bench_print_kind("before: keys, values of a prompt", once, whole, json);
    for (k = 0; k < 2; k++) once[k] = median(j, p->times[k], p->runs);
    bench_print_kind("before: time path", once, whole, json);
    bench_print_layers(p, most, top, whole, json);
}

/* What bench was asked to do. */
typedef struct bench_plan {
    const char *model;
    size_t batch, runs, layers;         /* layers: rows of the table */
    peak top;
    FILE *json;
} bench_plan;

static void bench_print_nets(const bench_plan *b, const sdq_unet_input *in, const bench_net *net,
                             const double *m, size_t n) {
    size_t k;
    printf("\nUNet of %s, %zu sample%s of %zu x %zu, an evaluation:\n", b->model, b->batch,
           b->batch > 1 ? "s" : "", in->sample->dim[1], in->sample->dim[2]);
    for (k = 0; k < n; k++) {
        printf("  %-31s %8.2f ms  %5.2fx\n", net[k].name, m[k] * 1e3, m[0] / m[k]);
        if (b->json)
            fprintf(b->json, "  {\"unet\": \"%s\", \"batch\": %zu, \"net\": \"%s\", \"ms\": "
                    "%.4f},\n", b->model, b->batch, net[k].name, m[k] * 1e3);
    }
}

static sdq_status bench_unet(job *j, bench_plan *b) {
    enum { NETS = COUNT(bench_nets) };
    bench_net net[NETS];
    double *t[NETS], m[NETS];
    bench_profile p;
    sdq_unet_input in;
    sdq_status st;
    size_t i, k;
    memcpy(net, bench_nets, sizeof net);
    memset(&p, 0, sizeof p);
    p.runs = b->runs;
    st = bench_input(j, b->model, &b->batch, &in);
    for (k = 0; k < NETS && st == SDQ_OK; k++)
        st = bench_net_make(j, &net[k], b->model, &in, b->batch);
    for (k = 0; k < NETS; k++) t[k] = (double *)own(j, (b->runs + 1) * sizeof(double));
    for (i = 0; st == SDQ_OK && i <= b->runs; i++) {    /* the first run warms up */
        for (k = 0; k < NETS; k++) t[k][i ? i - 1 : 0] = bench_net_run(j, &net[k], &in);
        st = sdq_last_error(j->ctx);
    }
    for (k = 0; k < NETS; k++) m[k] = median(j, t[k], b->runs);
    if (st == SDQ_OK) bench_print_nets(b, &in, net, m, NETS);
    if (st == SDQ_OK) st = bench_profile_all(j, &p, net, &in, b->batch, &b->top);
    if (st == SDQ_OK) bench_print_profile(j, &p, b->layers, &b->top, b->json);
    for (k = 0; k < NETS; k++) {
        sdq_prompt_cache_free(j->ctx, net[k].prompt);
        sdq_time_table_free(j->ctx, net[k].times);
        sdq_model_free(j->ctx, net[k].m);
    }
    return st;
}

/* ---- the same bits at full size ---- */

/* One evaluation of the int8 network on one instruction set, and the hash of what it gives. */
static sdq_status hash_tier(job *j, sdq_tier tier, const sdq_model *m, uint64_t *hash) {
    static const float time = 500.0f;
    const sdq_model_info info = sdq_model_get_info(m);
    const size_t side = info.sample_size ? info.sample_size : 64, dim[3] = {1, 77, info.context};
    sdq_unet_input in;
    sdq_ctx_desc d;
    sdq_tensor *y = NULL;
    sdq_status st;
    sdq_ctx *ctx;
    sdq_rng rng;
    memset(&d, 0, sizeof d);
    memset(&in, 0, sizeof in);
    d.tier = tier;
    d.threads = sdq_ctx_threads(j->ctx);
    TRY(sdq_ctx_create(&d, &ctx));
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 5);
    in.sample = random_tensor(ctx, &rng, 1, side, side, info.in);
    in.context = sdq_reshape(ctx, random_tensor(ctx, &rng, 1, 1, dim[1], dim[2]), 3, dim);
    in.timesteps = &time;
    if (in.sample && in.context) y = sdq_unet_forward(ctx, m, &in, SDQ_INT8);
    *hash = y ? hash_bytes(UINT64_C(0xcbf29ce484222325), y->data, sdq_tensor_count(y) * 4) : 0;
    st = y ? SDQ_OK : fail(j, "%s", sdq_error_text(ctx));
    sdq_ctx_free(ctx);
    return st;
}

/* All of them, the scalar one only if it is asked for: it takes minutes at full size. */
static sdq_status bench_hash(job *j, const char *model) {
    const sdq_tier most = sdq_ctx_tier(j->ctx);
    uint64_t first = 0, hash = 0;
    const char *unet;
    int tier, same = 1;
    TRY(need(j, "unet", &unet));
    if (!model) return need(j, "model", &model);
    TRY(sdq_model_load_int8(j->ctx, model, unet, &j->unet, NULL));
    for (tier = (int)(most < SDQ_TIER_AVX2 ? most : SDQ_TIER_AVX2); tier <= (int)most; tier++) {
        const double t = now();
        TRY(hash_tier(j, (sdq_tier)tier, j->unet, &hash));
        printf("%-11s %016llx  %.2f s\n", sdq_tier_name((sdq_tier)tier), (unsigned long long)hash,
               now() - t);
        fflush(stdout);
        if (!first) first = hash;
        same &= hash == first;
    }
    return same ? SDQ_OK : fail(j, "the instruction sets differ");
}

/* Without a model: a few shapes and kinds of ranges. */
static sdq_status bench_few(job *j, bench_plan *b) {
    size_t i;
    printf("\n%-43s %8s %6s %5s %8s %6s %5s %6s %8s %7s %5s\n%-43s %8s %6s %5s %8s %6s %5s %6s %8s "
           "%7s %5s\n",
           "int8 quantizes a float input, writes float", "fp32", "GFLOP", "of", "int8", "GOP", "of",
           "speed", "quantize", "product", "of", "and is split into its two parts", "ms", "/s",
           "peak", "ms", "/s", "peak", "-up", "ms", "ms", "peak");
    for (i = 0; i < COUNT(bench_shapes); i++)
        TRY(bench_shape_run(j, &bench_shapes[i], b->runs, &b->top, b->json));
    return SDQ_OK;
}

static sdq_status bench_args(job *j, bench_plan *b) {
    const char *batch = arg_text(&j->a, "batch"), *layers = arg_text(&j->a, "layers");
    memset(b, 0, sizeof *b);
    b->model = arg_text(&j->a, "model");
    b->runs = 21;
    b->layers = 12;
    TRY(arg_size(j, "batch", &b->batch));
    TRY(arg_size(j, "runs", &b->runs));
    if ((batch && b->batch == 0) || b->runs == 0)
        return bad_value(j, "batch, --runs", "0", "1 or more");
    if (!layers || strcmp(layers, "all") != 0) return arg_size(j, "layers", &b->layers);
    b->layers = SIZE_MAX;
    return SDQ_OK;
}

static sdq_status cmd_bench(job *j) {
    const char *path = arg_text(&j->a, "json");
    const char *tier = sdq_tier_name(sdq_ctx_tier(j->ctx));
    const int threads = sdq_ctx_threads(j->ctx);
    bench_plan b;
    sdq_status st;
    size_t i;
    TRY(bench_args(j, &b));
    if (arg_on(&j->a, "hash")) return bench_hash(j, b.model);
    if (path) TRY(report_begin(j, path, &b.json));
    for (i = 0; i < b.runs + 4; i++) peak_look(j, &b.top);
    printf("%s, %d threads, median of %zu alternating runs; peak: fp32 %.0f GFLOP/s, int8 %.0f "
           "GOP/s\n", tier, threads, b.runs, b.top.fp32 * 1e-9, b.top.int8 * 1e-9);
    if (b.json) fprintf(b.json, "[\n");
    st = b.model ? bench_unet(j, &b) : bench_few(j, &b);
    if (b.json)
        fprintf(b.json, "  {\"tier\": \"%s\", \"threads\": %d, \"runs\": %zu, "
                "\"fp32_peak_gflops\": %.1f, \"int8_peak_gops\": %.1f}\n]\n", tier, threads, b.runs,
                b.top.fp32 * 1e-9, b.top.int8 * 1e-9);
    if (b.json && st == SDQ_OK) st = report_end(j, path, b.json);
    else if (b.json) (void)fclose(b.json);
    return st;
}
