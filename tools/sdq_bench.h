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
 * The peak is a loop of multiply-adds that touches registers only. Everything is the median of
 * alternating runs, so that a slow moment of the machine hits both sides.
 * ======================================================================== */

static const flag bench_flags[] = {
    {"model,m", "FOLDER|FILE", NULL,
     "also time the UNet of this folder (weights may be missing) or single file"},
    {"unet", "FILE", NULL, "its int8 UNet, for --hash"},
    {"hash", NULL, NULL,
     "only the hash of an int8 evaluation on every instruction set up to --tier: are they equal?"},
    {"batch", "N", "8", "samples of a UNet evaluation"},
    {"runs", "N", "21", "alternating runs; the median counts"},
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

/* One timed run of the loop on all threads of the context: operations per second; 0: not known.
 * An operation is a multiplication or an addition; int8 products widened to int16 count as such. */
static double peak_run(sdq_tier tier, int threads, int int8) {
#if PEAK
    static const size_t rounds = 1000000;
    void (*loop)(size_t, void *) = tier == SDQ_TIER_AVX2 ? (int8 ? peak_madd_avx2 : peak_fma_avx2)
        : !int8 ? peak_fma_avx512 : tier == SDQ_TIER_AVX512 ? peak_madd_avx512 : peak_dot_avx512;
    const double lanes = tier == SDQ_TIER_AVX2     ? (int8 ? 16 : 8)
                         : !int8                   ? 16
                         : tier == SDQ_TIER_AVX512 ? 32
                                                   : 64;
    double t;
    int i;
    if (tier == SDQ_TIER_SCALAR) return 0.0;
    t = now();
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (i = 0; i < threads; i++) {
        char out[64 * 14];
        memset(out, 0, sizeof out);
        loop(rounds, out);
    }
    return 2.0 * lanes * 14.0 * (double)rounds * (double)threads / (now() - t);
#else
    (void)tier; (void)threads; (void)int8;
    return 0.0;
#endif
}

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

/* Times of one shape in ms and shares of the peaks; the peaks are measured between the runs. */
static sdq_status bench_shape_run(job *j, const bench_shape *s, size_t runs, FILE *json) {
    const sdq_mark mark = sdq_arena_mark(j->ctx);
    const sdq_tier tier = sdq_ctx_tier(j->ctx);
    const int threads = sdq_ctx_threads(j->ctx);
    const double work =
        2.0 * (double)(s->h * s->w * s->in * s->out) * (double)(s->kernel * s->kernel);
    double *t[5], m[5], quantize, product;
    bench_layers b = {{NULL, NULL, NULL}};
    sdq_status st;
    sdq_rng rng;
    sdq_tensor *x;
    size_t i, k;
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 4);
    x = random_tensor(j->ctx, &rng, 1, s->h, s->w, s->in);
    st = x ? bench_make(j, s, x, &b) : sdq_last_error(j->ctx);
    for (k = 0; k < 5; k++) t[k] = (double *)own(j, (runs + 1) * sizeof(double));
    for (i = 0; st == SDQ_OK && i <= runs; i++) {       /* the first run warms up */
        const size_t at = i ? i - 1 : 0;
        for (k = 0; k < 3; k++) t[k][at] = bench_layer(j, b.l[k], x, k ? SDQ_INT8 : SDQ_FLOAT);
        t[3][at] = peak_run(tier, threads, 0);
        t[4][at] = peak_run(tier, threads, 1);
    }
    for (k = 0; k < 3; k++)
        if (b.l[k]) sdq_layer_free(j->ctx, b.l[k]);
    sdq_arena_release(j->ctx, mark);
    if (st != SDQ_OK) return st;
    for (k = 0; k < 5; k++) m[k] = median(j, t[k], runs);
    /* time = quantizing + outputs * c, from the two numbers of outputs */
    product = (m[1] - m[2]) / (double)(s->out - 32) * (double)s->out;
    quantize = m[1] - product;
    printf("%-43s %8.2f %6.0f %4.0f%% %8.2f %6.0f %4.0f%% %5.2fx %8.2f %7.2f %4.0f%%\n", s->name,
           m[0] * 1e3, work / m[0] * 1e-9, m[3] > 0.0 ? 100.0 * work / m[0] / m[3] : 0.0,
           m[1] * 1e3, work / m[1] * 1e-9, m[4] > 0.0 ? 100.0 * work / m[1] / m[4] : 0.0,
           m[0] / m[1], quantize * 1e3, product * 1e3,
           m[4] > 0.0 ? 100.0 * work / product / m[4] : 0.0);
    if (json)
        fprintf(json,
                "  {\"shape\": \"%s\", \"fp32_ms\": %.4f, \"int8_ms\": %.4f, \"quantize_ms\": "
                "%.4f, \"product_ms\": %.4f, "
                "\"fp32_peak_gflops\": %.1f, \"int8_peak_gops\": %.1f},\n",
                s->name, m[0] * 1e3, m[1] * 1e3, quantize * 1e3, product * 1e3, m[3] * 1e-9,
                m[4] * 1e-9);
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

static const bench_net bench_nets[] = {
    {"float", SDQ_FLOAT, SDQ_RANGE_DEFAULT, SDQ_RANGE_DEFAULT, 0, NULL, NULL, NULL},
    {"int8, static ranges for 3x3", SDQ_INT8, SDQ_RANGE_STATIC, SDQ_RANGE_POSITION, 0, NULL, NULL,
     NULL},
    {"int8, a range per picture", SDQ_INT8, SDQ_RANGE_PICTURE, SDQ_RANGE_POSITION, 0, NULL, NULL,
     NULL},
    {"int8, a range per position", SDQ_INT8, SDQ_RANGE_POSITION, SDQ_RANGE_POSITION, 0, NULL, NULL,
     NULL},
    {"int8, a range per block", SDQ_INT8, SDQ_RANGE_BLOCK, SDQ_RANGE_BLOCK, 0, NULL, NULL, NULL},
    {"static ranges, attention int8", SDQ_INT8, SDQ_RANGE_STATIC, SDQ_RANGE_POSITION, 8, NULL,
     NULL, NULL},
    {"per position, attention int8", SDQ_INT8, SDQ_RANGE_POSITION, SDQ_RANGE_POSITION, 8, NULL,
     NULL, NULL},
};

static sdq_status bench_net_make(job *j, bench_net *b, const char *folder, sdq_unet_input *in,
                                 size_t batch) {
    sdq_recipe r;
    TRY(bench_load(j, folder, &b->m));
    if (b->mode == SDQ_INT8) {
        TRY(recipe_from_args(j, &r));
        r.range_conv = b->conv;
        r.range_linear = b->linear;
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

/* Random latents and context for a UNet of the folder. */
static sdq_status bench_input(job *j, const char *folder, size_t batch, sdq_unet_input *in) {
    float *times = (float *)own(j, batch * sizeof *times);
    sdq_model_info info;
    size_t i, side, tokens = 77;
    sdq_rng rng;
    TRY(bench_load(j, folder, &j->unet));
    info = sdq_model_get_info(j->unet);
    sdq_model_free(j->ctx, j->unet);
    j->unet = NULL;
    side = info.sample_size ? info.sample_size : 64;
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 5);
    memset(in, 0, sizeof *in);
    in->sample = random_tensor(j->ctx, &rng, batch, side, side, info.in);
    if (load_tokenizer(j, folder) == SDQ_OK) tokens = sdq_tokenizer_length(j->tokenizer);
    sdq_clear_error(j->ctx);
    in->context = sdq_tensor_3d(j->ctx, batch, tokens, info.context);
    if (!in->sample || !in->context) return sdq_last_error(j->ctx);
    sdq_rng_normal(&rng, sdq_f32(in->context), sdq_tensor_count(in->context));
    for (i = 0; i < batch; i++) times[i] = 981.0f - 20.0f * (float)(i % 50);
    in->timesteps = times;
    return SDQ_OK;
}

static sdq_status bench_unet(job *j, const char *folder, size_t batch, size_t runs, FILE *json) {
    enum { NETS = COUNT(bench_nets) };
    bench_net net[NETS];
    double *t[NETS], m[NETS];
    sdq_unet_input in;
    sdq_status st;
    size_t i, k;
    memcpy(net, bench_nets, sizeof net);
    st = bench_input(j, folder, batch, &in);
    for (k = 0; k < NETS && st == SDQ_OK; k++) st = bench_net_make(j, &net[k], folder, &in, batch);
    for (k = 0; k < NETS; k++) t[k] = (double *)own(j, (runs + 1) * sizeof(double));
    for (i = 0; st == SDQ_OK && i <= runs; i++)         /* the first run warms up */
        for (k = 0; k < NETS; k++) t[k][i ? i - 1 : 0] = bench_net_run(j, &net[k], &in);
    for (k = 0; k < NETS; k++) {
        m[k] = median(j, t[k], runs);
        sdq_prompt_cache_free(j->ctx, net[k].prompt);
        sdq_time_table_free(j->ctx, net[k].times);
        sdq_model_free(j->ctx, net[k].m);
    }
    if (st != SDQ_OK) return st;
    printf("\nUNet of %s, %zu samples of %zu x %zu, an evaluation:\n", folder, batch,
           in.sample->dim[1], in.sample->dim[2]);
    for (k = 0; k < NETS; k++) {
        printf("  %-30s %8.2f ms  %5.2fx\n", net[k].name, m[k] * 1e3, m[0] / m[k]);
        if (json)
            fprintf(json, "  {\"unet\": \"%s\", \"batch\": %zu, \"net\": \"%s\", \"ms\": %.4f},\n",
                    folder, batch, net[k].name, m[k] * 1e3);
    }
    return SDQ_OK;
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

static sdq_status cmd_bench(job *j) {
    const char *model = arg_text(&j->a, "model"), *path = arg_text(&j->a, "json");
    const sdq_tier tier = sdq_ctx_tier(j->ctx);
    const int threads = sdq_ctx_threads(j->ctx);
    size_t batch = 8, runs = 21, i;
    FILE *json = NULL;
    sdq_status st = SDQ_OK;
    double *f, *q;
    TRY(arg_size(j, "batch", &batch));
    TRY(arg_size(j, "runs", &runs));
    if (batch == 0 || runs == 0) return bad_value(j, "batch, --runs", "0", "1 or more");
    if (arg_on(&j->a, "hash")) return bench_hash(j, model);
    if (path && !(json = fopen(path, "wb"))) return fail(j, "%s: %s", path, strerror(errno));
    f = (double *)own(j, runs * sizeof *f);
    q = (double *)own(j, runs * sizeof *q);
    for (i = 0; i < runs; i++) {
        f[i] = peak_run(tier, threads, 0);
        q[i] = peak_run(tier, threads, 1);
    }
    printf("%s, %d threads, median of %zu alternating runs; peak: fp32 %.0f GFLOP/s, int8 %.0f "
           "GOP/s\n",
           sdq_tier_name(tier), threads, runs, median(j, f, runs) * 1e-9,
           median(j, q, runs) * 1e-9);
    if (json) fprintf(json, "[\n");
    if (model) st = bench_unet(j, model, batch, runs, json);
    printf("\n%-43s %8s %6s %5s %8s %6s %5s %6s %8s %7s %5s\n%-43s %8s %6s %5s %8s %6s %5s %6s %8s "
           "%7s %5s\n",
           "int8 quantizes a float input, writes float", "fp32", "GFLOP", "of", "int8", "GOP", "of",
           "speed", "quantize", "product", "of", "and is split into its two parts", "ms", "/s",
           "peak", "ms", "/s", "peak", "-up", "ms", "ms", "peak");
    for (i = 0; i < COUNT(bench_shapes) && st == SDQ_OK; i++)
        st = bench_shape_run(j, &bench_shapes[i], runs, json);
    if (json)
        fprintf(json, "  {\"tier\": \"%s\", \"threads\": %d, \"runs\": %zu}\n]\n",
                sdq_tier_name(tier), threads, runs);
    if (json && fclose(json) != 0 && st == SDQ_OK) st = fail(j, "%s: could not be written", path);
    return st;
}
