/* >>model to >>model-file: the text encoder, UNet and VAE against diffusers, gradients, caches,
 * arena, files in and out, refused configurations and files, allocations that fail.
 * Run from the project folder. */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

#define GOLDEN "tests/golden/"
#define SCRATCH "tests/networks.tmp"
static const char *const models[] = {"sd1-a", "sd1-b", "sd2-a", "bk-a"};
#define SMALLEST 3      /* the scalar tier computes this one only: it is slow */

/* ---- one model with its goldens ---- */

typedef struct fixture {
    sdq_ctx *ctx;
    sdq_model *part[SDQ_PART_COUNT];
    sdq_file *gold;
} fixture;

static int open_fixture(fixture *f, const char *name, int tier, int threads) {
    sdq_ctx_desc d;
    char path[128];
    int p;
    memset(&d, 0, sizeof d);
    memset(f, 0, sizeof *f);
    d.tier = (sdq_tier)tier;
    d.threads = threads;
    if (!SDQT_CHECK(sdq_ctx_create(&d, &f->ctx) == SDQ_OK)) return 0;
    (void)snprintf(path, sizeof path, GOLDEN "%s.safetensors", name);
    (void)sdq_file_open(f->ctx, path, &f->gold);
    (void)snprintf(path, sizeof path, GOLDEN "models/%s", name);
    for (p = SDQ_PART_TEXT; p < SDQ_PART_COUNT; p++)
        (void)sdq_model_load(f->ctx, path, (sdq_part)p, &f->part[p]);
    return SDQT_THAT(sdq_last_error(f->ctx) == SDQ_OK, "%s", sdq_error_text(f->ctx));
}

static void close_fixture(fixture *f) {
    int p;
    for (p = SDQ_PART_TEXT; p < SDQ_PART_COUNT; p++) sdq_model_free(f->ctx, f->part[p]);
    if (f->gold) sdq_file_close(f->ctx, f->gold);
    sdq_ctx_free(f->ctx);
}

static const sdq_entry *entry(const fixture *f, const char *prefix, const char *name) {
    char full[160];
    const sdq_entry *e;
    (void)snprintf(full, sizeof full, "%s%s", prefix, name);
    e = sdq_file_find(f->gold, full);
    SDQT_THAT(e != NULL, "no golden tensor %s", full);
    return e;
}

/* A golden tensor in the arena; pictures are NCHW there. */
static sdq_tensor *load(const fixture *f, const char *prefix, const char *name) {
    const sdq_entry *e = entry(f, prefix, name);
    sdq_tensor *raw, *t;
    size_t dim[4], n, c, i;
    if (!e) return NULL;
    raw = sdq_tensor_new(f->ctx, e->dtype, e->rank, e->dim);
    if (!raw) return NULL;
    memcpy(raw->data, e->data, e->bytes);
    if (e->rank < 4) return raw;
    dim[0] = e->dim[0]; dim[1] = e->dim[2]; dim[2] = e->dim[3]; dim[3] = e->dim[1];
    t = sdq_tensor_new(f->ctx, SDQ_F32, 4, dim);
    for (n = 0; t && n < dim[0]; n++)
        for (c = 0; c < dim[3]; c++)
            for (i = 0; i < dim[1] * dim[2]; i++)
                sdq_f32(t)[(n * dim[1] * dim[2] + i) * dim[3] + c] =
                    sdq_f32(raw)[(n * dim[3] + c) * dim[1] * dim[2] + i];
    return t;
}

/* FNV-1a, 64 bits */
static uint64_t fnv(const void *data, size_t n, uint64_t seed) {
    uint64_t h = UINT64_C(14695981039346656037) ^ seed;
    size_t i;
    for (i = 0; i < n; i++) h = (h ^ ((const unsigned char *)data)[i]) * UINT64_C(1099511628211);
    return h;
}

/* ||a - b|| and ||b|| */
static double distance(const float *a, const float *b, size_t n, double *norm) {
    double s = 0, q = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        const double d = (double)a[i] - (double)b[i];
        s += d * d;
        q += (double)b[i] * (double)b[i];
    }
    *norm = sqrt(q);
    return sqrt(s);
}

/* Within 1e-5 of diffusers in double; measured: 1.5e-6 at most. */
static void same(const fixture *f, const char *what, const sdq_tensor *y, const sdq_tensor *want) {
    double d, norm;
    if (!SDQT_THAT(y && want, "%s: %s", what, sdq_error_text(f->ctx))) return;
    if (!SDQT_THAT(sdq__t_same(y, want), "%s: another shape", what)) return;
    d = distance(sdq_f32(y), sdq_f32(want), sdq_tensor_count(y), &norm);
    SDQT_THAT(d <= 1e-5 * norm, "%s: relative error %.2e", what, d / norm);
}

static void unet_input(const fixture *f, const char *prefix, sdq_unet_input *in) {
    sdq_tensor *t = load(f, prefix, "timestep"), *x;
    size_t i;
    memset(in, 0, sizeof *in);
    in->sample = load(f, prefix, "sample");
    in->context = load(f, prefix, "encoder_hidden_states");
    if (!t) return;
    x = sdq_tensor_1d(f->ctx, t->dim[0]);
    for (i = 0; i < t->dim[0]; i++) sdq_f32(x)[i] = (float)((const int32_t *)t->data)[i];
    in->timesteps = sdq_f32(x);
}

/* ---- numbers ---- */

static void modules(const fixture *f) {
    sdq_unet_input in;
    const sdq_tensor *m;
    const size_t c = sdq_model_get_info(f->part[SDQ_PART_VAE]).latent;
    same(f, "text", sdq_text_forward(f->ctx, f->part[SDQ_PART_TEXT], load(f, "text.", "input_ids")),
         load(f, "text.", "last_hidden_state"));
    unet_input(f, "unet.", &in);
    same(f, "unet", sdq_unet_forward(f->ctx, f->part[SDQ_PART_UNET], &in, SDQ_FLOAT),
         load(f, "unet.", "out"));
    unet_input(f, "unet-odd.", &in);
    same(f, "unet-odd", sdq_unet_forward(f->ctx, f->part[SDQ_PART_UNET], &in, SDQ_FLOAT),
         load(f, "unet-odd.", "out"));
    m = sdq_vae_encode(f->ctx, f->part[SDQ_PART_VAE], load(f, "vae-encoder.", "image"), SDQ_FLOAT);
    same(f, "mean", sdq_slice(f->ctx, (sdq_tensor *)m, 0, c), load(f, "vae-encoder.", "mean"));
    same(f, "logvar", sdq_slice(f->ctx, (sdq_tensor *)m, c, c), load(f, "vae-encoder.", "logvar"));
    same(f, "decoder",
         sdq_vae_decode(f->ctx, f->part[SDQ_PART_VAE], load(f, "vae-decoder.", "latent"),
                        SDQ_FLOAT), load(f, "vae-decoder.", "image"));
}

static void test_golden(int tier) {
    size_t i;
    for (i = tier == SDQ_TIER_SCALAR ? SMALLEST : 0; i < sizeof models / sizeof *models; i++) {
        fixture f;
        if (open_fixture(&f, models[i], tier, 0)) modules(&f);
        close_fixture(&f);
    }
}

/* All bits of every module, as one number. */
static uint64_t fingerprint(const char *name, int tier, int threads) {
    fixture f;
    sdq_unet_input in;
    const sdq_tensor *y[3];
    uint64_t h = 0;
    size_t i;
    memset(y, 0, sizeof y);
    if (open_fixture(&f, name, tier, threads)) {
        unet_input(&f, "unet-odd.", &in);
        y[0] = sdq_unet_forward(f.ctx, f.part[SDQ_PART_UNET], &in, SDQ_FLOAT);
        y[1] = sdq_vae_decode(f.ctx, f.part[SDQ_PART_VAE], load(&f, "vae-decoder.", "latent"),
                              SDQ_FLOAT);
        y[2] = sdq_text_forward(f.ctx, f.part[SDQ_PART_TEXT], load(&f, "text.", "input_ids"));
    }
    for (i = 0; i < 3; i++)
        if (SDQT_CHECK(y[i] != NULL)) h = fnv(y[i]->data, sdq_tensor_count(y[i]) * 4, h);
    close_fixture(&f);
    return h;
}

static void test_bits(int tier) {
    static uint64_t scalar;
    uint64_t h;
    if (!scalar) scalar = fingerprint(models[SMALLEST], SDQ_TIER_SCALAR, 1);
    h = fingerprint(models[SMALLEST], tier, 3);
    SDQT_THAT(h == scalar, "tier %s differs from scalar", sdq_tier_name((sdq_tier)tier));
}

/* Every parameter's gradient: ||a - b|| <= 1e-3 max(||b||, 1e-4 G), G the largest norm. */
static void compare_gradients(const fixture *f, const char *model) {
    const sdq_model *m = f->part[SDQ_PART_UNET];
    const size_t n = sdq_model_param_count(m);
    double largest = 0, norm, d;
    const char *name;
    size_t i;
    for (i = 0; i < n; i++) {
        const sdq_entry *e;
        (void)sdq_model_param(m, i, &name);
        e = entry(f, "unet.grad/", name);
        if (!e) continue;
        (void)distance((const float *)e->data, (const float *)e->data, e->bytes / 4, &norm);
        if (norm > largest) largest = norm;
    }
    for (i = 0; i < n; i++) {
        const sdq_tensor *g = sdq_model_param_copy(f->ctx, m, i, 1);
        const sdq_entry *e;
        (void)sdq_model_param(m, i, &name);
        e = entry(f, "unet.grad/", name);
        if (!e || !SDQT_CHECK(g && sdq_tensor_count(g) == e->bytes / 4)) continue;
        d = distance(sdq_f32(g), (const float *)e->data, e->bytes / 4, &norm);
        if (norm < 1e-4 * largest) norm = 1e-4 * largest;
        SDQT_THAT(d <= 1e-3 * norm, "%s: %s: relative error %.2e", model, name, d / norm);
    }
}

static void one_backward(const fixture *f, const char *model, int checkpoint) {
    sdq_model *m = f->part[SDQ_PART_UNET];
    const sdq_mark mark = sdq_arena_mark(f->ctx);
    sdq_tensor *loss, *noise = load(f, "unet.", "noise");
    sdq_unet_input in;
    size_t i;
    for (i = 0; i < sdq_model_param_count(m); i++) {
        sdq_tensor *p = sdq_model_param(m, i, NULL), *g = sdq__t_like(f->ctx, p);
        if (!SDQT_THAT(g != NULL, "%s", sdq_error_text(f->ctx))) return;
        p->needs_grad = 1;
        p->grad = sdq_f32(g);       /* a checkpoint wants memory that outlives its blocks */
        memset(p->grad, 0, sdq_tensor_count(p) * 4);
    }
    unet_input(f, "unet.", &in);
    in.checkpoint = checkpoint;
    sdq_tape_begin(f->ctx);
    loss = sdq_mse(f->ctx, sdq_unet_forward(f->ctx, m, &in, SDQ_FLOAT), noise, NULL);
    if (SDQT_THAT(loss && sdq_backward(f->ctx, loss) == SDQ_OK, "%s", sdq_error_text(f->ctx))) {
        SDQT_NEAR(sdq_f32(loss)[0], sdq_f32(load(f, "unet.", "loss"))[0], 1e-5);
        compare_gradients(f, model);
    }
    sdq_tape_end(f->ctx);
    for (i = 0; i < sdq_model_param_count(m); i++) {
        sdq_model_param(m, i, NULL)->grad = NULL;
        sdq_model_param(m, i, NULL)->needs_grad = 0;
    }
    sdq_arena_release(f->ctx, mark);
}

static void test_gradients(int tier) {
    size_t i;
    for (i = tier == SDQ_TIER_SCALAR ? SMALLEST : 0; i < sizeof models / sizeof *models; i++) {
        fixture f;
        if (open_fixture(&f, models[i], tier, 0)) {
            one_backward(&f, models[i], 0);
            one_backward(&f, models[i], 1);
        }
        close_fixture(&f);
    }
}

/* A wrong epsilon moves these well-scaled goldens by less than their tolerance; real networks have
 * channels where it shows. So the constants of diffusers are checked by themselves. */
static void test_epsilons(int tier) {
    fixture f;
    if (open_fixture(&f, "sd1-a", tier, 0)) {
        const sdq__unet *u = f.part[SDQ_PART_UNET]->unet;
        const sdq__vae *v = f.part[SDQ_PART_VAE]->vae;
        const sdq__text *t = f.part[SDQ_PART_TEXT]->text;
        SDQT_CHECK(u->down[0].resnet[0].norm1.eps == 1e-5f && u->norm_out.eps == 1e-5f);
        SDQT_CHECK(u->mid.attn[0].norm.eps == 1e-6f);
        SDQT_CHECK(u->mid.attn[0].block[0].norm3.eps == 1e-5f);
        SDQT_CHECK(v->encoder.attn_norm.eps == 1e-6f && v->decoder.norm_out.eps == 1e-6f);
        SDQT_CHECK(v->decoder.level[0].resnet[0].norm2.eps == 1e-6f);
        SDQT_CHECK(t->layer[0].norm1.eps == 1e-5f && t->norm.eps == 1e-5f);
    }
    close_fixture(&f);
}

/* ---- caches and memory ---- */

static int equal(const sdq_tensor *a, const float *b) {
    return a && memcmp(a->data, b, sdq_tensor_count(a) * sizeof(float)) == 0;
}

static void caches(fixture *f) {
    static const float steps[] = {500, 7, 981, 1};
    sdq_model *m = f->part[SDQ_PART_UNET];
    sdq_prompt_cache *prompt = NULL;
    sdq_time_table *times = NULL;
    sdq_unet_input in, one;
    sdq_tensor *y, *half;
    unet_input(f, "unet.", &in);
    y = sdq_unet_forward(f->ctx, m, &in, SDQ_FLOAT);
    if (!SDQT_CHECK(y && sdq_unet_prompt(f->ctx, m, in.context, SDQ_FLOAT, &prompt) == SDQ_OK)
        || !SDQT_CHECK(sdq_unet_times(f->ctx, m, steps, NULL, 4, SDQ_FLOAT, &times) == SDQ_OK))
        return;
    in.context = NULL;
    in.prompt = prompt;
    in.times = times;
    SDQT_CHECK(equal(sdq_unet_forward(f->ctx, m, &in, SDQ_FLOAT), sdq_f32(y)));
    one = in;                           /* the second entry alone */
    one.prompt_first = 1;
    one.timesteps = in.timesteps + 1;
    half = sdq_tensor_4d(f->ctx, 1, y->dim[1], y->dim[2], in.sample->dim[3]);
    memcpy(half->data, sdq_f32(in.sample) + sdq_tensor_count(half), sdq_tensor_count(half) * 4);
    one.sample = half;
    SDQT_CHECK(equal(sdq_unet_forward(f->ctx, m, &one, SDQ_FLOAT),
                     sdq_f32(y) + sdq_tensor_count(y) / 2));
    one.prompt_first = 2;               /* one too far */
    SDQT_CHECK(!sdq_unet_forward(f->ctx, m, &one, SDQ_FLOAT));
    SDQT_CHECK(sdq_last_error(f->ctx) == SDQ_ERR_SHAPE);
    sdq_clear_error(f->ctx);
    one.prompt_first = 0;
    one.timesteps = &steps[0];
    SDQT_CHECK(sdq_unet_forward(f->ctx, m, &one, SDQ_FLOAT) != NULL);
    {
        const float other = 2;
        one.timesteps = &other;
        SDQT_CHECK(!sdq_unet_forward(f->ctx, m, &one, SDQ_FLOAT));
        SDQT_CHECK(strstr(sdq_error_text(f->ctx), "time table has no row for timestep 2"));
        sdq_clear_error(f->ctx);
    }
    SDQT_CHECK(!sdq_unet_forward(f->ctx, m, &in, SDQ_INT8));
    SDQT_CHECK(strstr(sdq_error_text(f->ctx), "in another mode"));
    sdq_clear_error(f->ctx);
    sdq_prompt_cache_free(f->ctx, prompt);
    sdq_time_table_free(f->ctx, times);
}

static void test_caches(int tier) {
    size_t i;
    for (i = 0; i < sizeof models / sizeof *models; i++) {
        fixture f;
        if (open_fixture(&f, models[i], tier, 0)) caches(&f);
        close_fixture(&f);
    }
}

/* What a forward leaves in the arena: its result (a header and the data, in units of 64). */
static void left(const fixture *f, const char *what, const sdq_tensor *y, size_t before) {
    size_t want;
    if (!SDQT_THAT(y != NULL, "%s: %s", what, sdq_error_text(f->ctx))) return;
    want = sdq__u_round_up(sizeof *y, SDQ__ALIGN)
         + sdq__u_round_up(sdq_tensor_count(y) * 4, SDQ__ALIGN);
    SDQT_THAT(f->ctx->arena_now - before == want, "%s: %zu bytes left, its result has %zu", what,
              f->ctx->arena_now - before, want);
}

static void test_arena(int tier) {
    fixture f;
    sdq_unet_input in;
    sdq_tensor *x;
    size_t at;
    if (open_fixture(&f, "sd1-b", tier, 0)) {
        x = load(&f, "text.", "input_ids");
        at = f.ctx->arena_now;
        left(&f, "text", sdq_text_forward(f.ctx, f.part[SDQ_PART_TEXT], x), at);
        unet_input(&f, "unet.", &in);
        at = f.ctx->arena_now;
        left(&f, "unet", sdq_unet_forward(f.ctx, f.part[SDQ_PART_UNET], &in, SDQ_FLOAT), at);
        x = load(&f, "vae-encoder.", "image");
        at = f.ctx->arena_now;
        left(&f, "encoder", sdq_vae_encode(f.ctx, f.part[SDQ_PART_VAE], x, SDQ_FLOAT), at);
        x = load(&f, "vae-decoder.", "latent");
        at = f.ctx->arena_now;
        left(&f, "decoder", sdq_vae_decode(f.ctx, f.part[SDQ_PART_VAE], x, SDQ_FLOAT), at);
    }
    close_fixture(&f);
}

/* ---- files ---- */

static void drop_scratch(void) {
    (void)remove(SCRATCH "/config.json");
    (void)remove(SCRATCH "/model.safetensors");
    (void)remove(SCRATCH "/diffusion_pytorch_model.safetensors");
    SDQT_DROP_FOLDER(SCRATCH);
}

static void same_model(const sdq_model *a, const sdq_model *b, sdq_dtype dtype) {
    size_t i, k, wrong = 0;
    const char *an, *bn;
    SDQT_CHECK(strcmp(a->config, b->config) == 0);
    if (!SDQT_CHECK(sdq_model_param_count(a) == sdq_model_param_count(b))) return;
    for (i = 0; i < sdq_model_param_count(a); i++) {
        const sdq_tensor *x = sdq_model_param(a, i, &an), *y = sdq_model_param(b, i, &bn);
        wrong += strcmp(an, bn) != 0 || !sdq__t_same(x, y);
        for (k = 0; !wrong && k < sdq_tensor_count(x); k++) {
            const float v = sdq_f32(x)[k], w = sdq_f32(y)[k];
            wrong += w != (dtype == SDQ_F32 ? v : dtype == SDQ_F16
                           ? sdq__u_from_f16(sdq__u_to_f16(v))
                           : sdq__u_from_bf16(sdq__u_to_bf16(v)));
        }
    }
    SDQT_THAT(wrong == 0, "%zu parameters differ after saving", wrong);
}

static void test_round_trip(int tier) {
    static const sdq_dtype dtype[] = {SDQ_F32, SDQ_F16, SDQ_BF16};
    fixture f;
    int p, d;
    SDQT_MAKE_FOLDER(SCRATCH);
    if (open_fixture(&f, "sd1-b", tier, 0))
        for (p = SDQ_PART_TEXT; p < SDQ_PART_COUNT; p++)
            for (d = 0; d < 3; d++) {
                sdq_model *m = NULL;
                SDQT_THAT(sdq_model_save(f.ctx, f.part[p], SCRATCH, dtype[d]) == SDQ_OK
                          && sdq_model_load(f.ctx, SCRATCH, (sdq_part)p, &m) == SDQ_OK, "%s",
                          sdq_error_text(f.ctx));
                if (m) same_model(f.part[p], m, dtype[d]);
                sdq_model_free(f.ctx, m);
            }
    SDQT_CHECK(sdq_model_save(f.ctx, f.part[SDQ_PART_VAE], SCRATCH "/no/such", SDQ_F32)
               == SDQ_ERR_IO);
    close_fixture(&f);
    drop_scratch();
}

static void test_scaling(int tier) {
    static const char *const text[] = {"{\"scaling_factor\": 0.5, \"sample_size\": 32}", "{ }",
                                       "{\"act_fn\":\"silu\",\"scaling_factor\":1}",
                                       "{\"act_fn\":\"silu\"}"};
    static const char *const want[] = {"{\"scaling_factor\": 0.25, \"sample_size\": 32}",
                                       "{\n  \"scaling_factor\": 0.25 }",
                                       "{\"act_fn\":\"silu\",\"scaling_factor\":0.25}",
                                       "{\n  \"scaling_factor\": 0.25,\"act_fn\":\"silu\"}"};
    sdq_ctx *ctx;
    sdq_model *m;
    int i;
    (void)tier;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (i = 0; i < 4; i++) {
        SDQT_CHECK(sdq__md_create(ctx, "config.json", text[i], strlen(text[i]), SDQ_PART_VAE, NULL,
                                  SDQ__MD_WHOLE, &m) == SDQ_OK);
        SDQT_CHECK(sdq_model_set_scaling(ctx, m, 0.25f) == SDQ_OK);
        SDQT_THAT(strcmp(m->config, want[i]) == 0, "%s", m->config);
        SDQT_CHECK(sdq_model_get_info(m).scaling_factor == 0.25f);
        SDQT_CHECK(sdq_model_set_scaling(ctx, m, 0) == SDQ_ERR_ARGUMENT);
        sdq_clear_error(ctx);
        sdq_model_free(ctx, m);
    }
    sdq_ctx_free(ctx);
}

/* The numbers that torch 2.8 and diffusers 0.39 make after manual_seed(7) for sd2-a, made with
 *   torch.manual_seed(7); m = UNet2DConditionModel.from_config(config)      (or AutoencoderKL)
 * by FNV-1a over all parameters by name; every bit is equal. */
static uint64_t hash_model(sdq_ctx *ctx, const sdq_model *m) {
    uint64_t h = 0;
    size_t i;
    for (i = 0; i < sdq_model_param_count(m); i++) {
        const char *name;
        const sdq_mark mark = sdq_arena_mark(ctx);
        const sdq_tensor *t = sdq_model_param_copy(ctx, m, i, 0);
        (void)sdq_model_param(m, i, &name);
        h ^= fnv(t->data, sdq_tensor_count(t) * 4, fnv(name, strlen(name), 0));
        sdq_arena_release(ctx, mark);
    }
    return h;
}

static void test_init(int tier) {
    static const uint64_t want[SDQ_PART_COUNT] = {0, 0, UINT64_C(0x696cc4ab9e7b376a),
                                                 UINT64_C(0xb9638240817ff646)};
    sdq_ctx *ctx;
    sdq_model *m = NULL;
    const sdq_tensor *t;
    double norm, sum = 0;
    size_t i;
    int p;
    (void)tier;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (p = SDQ_PART_UNET; p < SDQ_PART_COUNT; p++) {
        SDQT_CHECK(sdq_model_init(ctx, GOLDEN "models/sd2-a", (sdq_part)p, 7, &m) == SDQ_OK);
        SDQT_THAT(hash_model(ctx, m) == want[p], "%s: the weights are not torch's: 0x%016llx",
                  sdq_part_name((sdq_part)p), (unsigned long long)hash_model(ctx, m));
        sdq_model_free(ctx, m);
    }
    SDQT_CHECK(sdq_model_init(ctx, GOLDEN "models/sd2-a", SDQ_PART_TEXT, 7, &m) == SDQ_OK);
    t = sdq_model_param(m, 0, NULL);            /* token embedding: N(0, 0.02) */
    (void)distance(sdq_f32(t), sdq_f32(t), sdq_tensor_count(t), &norm);
    for (i = 0; i < sdq_tensor_count(t); i++) sum += (double)sdq_f32(t)[i];
    SDQT_NEAR(norm / sqrt((double)sdq_tensor_count(t)), 0.02, 0.0005);
    SDQT_NEAR(sum / (double)sdq_tensor_count(t), 0.0, 0.0005);
    sdq_model_free(ctx, m);
    sdq_ctx_free(ctx);
}

static void test_info(int tier) {
    fixture f;
    sdq_model_info u, v, t;
    const char *name;
    if (open_fixture(&f, "sd1-b", tier, 0)) {
        u = sdq_model_get_info(f.part[SDQ_PART_UNET]);
        v = sdq_model_get_info(f.part[SDQ_PART_VAE]);
        t = sdq_model_get_info(f.part[SDQ_PART_TEXT]);
        SDQT_CHECK(u.in == 4 && u.out == 4 && u.context == 20 && u.factor == 4);
        SDQT_CHECK(u.sample_size == 10 && u.guidance == 0);
        SDQT_CHECK(v.in == 3 && v.out == 3 && v.latent == 4 && v.factor == 4);
        SDQT_NEAR(v.scaling_factor, 0.439, 1e-7);
        SDQT_CHECK(t.context == 20 && t.tokens == 11);
        SDQT_CHECK(t.vocab == sdq_model_param(f.part[SDQ_PART_TEXT], 0, NULL)->dim[0]);
        (void)sdq_model_param(f.part[SDQ_PART_UNET], 0, &name);
        SDQT_CHECK(strcmp(name, "conv_in.weight") == 0);
        SDQT_CHECK(sdq_model_layer(f.part[SDQ_PART_UNET], 0, &name) != NULL);
        SDQT_CHECK(strcmp(name, "conv_in") == 0);
        SDQT_CHECK(!sdq_model_param(f.part[SDQ_PART_UNET], 99999, &name) && !*name);
        SDQT_CHECK(!sdq_model_layer(f.part[SDQ_PART_UNET], 99999, &name) && !*name);
    }
    close_fixture(&f);
}

/* ---- refusals ---- */

typedef struct refusal {
    sdq_part part;
    const char *add;        /* members put in front of a good configuration */
    sdq_status status;
    const char *says;
} refusal;

static const char *const good[SDQ_PART_COUNT] = {
    "",
    "\"vocab_size\": 9, \"hidden_size\": 8, \"intermediate_size\": 8, \"num_hidden_layers\": 1,"
    "\"num_attention_heads\": 2, \"max_position_embeddings\": 4}",
    "\"block_out_channels\": [4, 8], \"down_block_types\": [\"CrossAttnDownBlock2D\","
    "\"DownBlock2D\"], \"up_block_types\": [\"UpBlock2D\", \"CrossAttnUpBlock2D\"],"
    "\"layers_per_block\": 1, \"attention_head_dim\": 2, \"norm_num_groups\": 2,"
    "\"cross_attention_dim\": 4}",
    "\"block_out_channels\": [4, 8], \"down_block_types\": [\"DownEncoderBlock2D\","
    "\"DownEncoderBlock2D\"], \"up_block_types\": [\"UpDecoderBlock2D\","
    "\"UpDecoderBlock2D\"], \"norm_num_groups\": 2}"};

#define U SDQ_PART_UNET
#define V SDQ_PART_VAE
#define T SDQ_PART_TEXT
#define NO SDQ_ERR_UNSUPPORTED
static const refusal refusals[] = {
    {U, "\"class_embed_type\": \"timestep\"", NO, "\"class_embed_type\": \"timestep\" is not"},
    {U, "\"addition_embed_type\": \"text_time\"", NO, "\"addition_embed_type\": \"text_time\""},
    {U, "\"encoder_hid_dim\": 64", NO, "\"encoder_hid_dim\": 64"},
    {U, "\"encoder_hid_dim_type\": \"text_proj\"", NO, "it must be null"},
    {U, "\"resnet_time_scale_shift\": \"scale_shift\"", NO, "must be \"default\""},
    {U, "\"act_fn\": \"mish\"", NO, "\"act_fn\": \"mish\""},
    {U, "\"center_input_sample\": true", NO, "\"center_input_sample\": true"},
    {U, "\"conv_in_kernel\": 5", NO, "\"conv_in_kernel\": 5 is not supported; it must be 3"},
    {U, "\"conv_out_kernel\": 1", NO, "\"conv_out_kernel\": 1"},
    {U, "\"attention_type\": \"gated\"", NO, "\"attention_type\": \"gated\""},
    {U, "\"time_embedding_type\": \"fourier\"", NO, "must be \"positional\""},
    {U, "\"time_embedding_act_fn\": \"silu\"", NO, "\"time_embedding_act_fn\""},
    {U, "\"timestep_post_act\": \"silu\"", NO, "\"timestep_post_act\""},
    {U, "\"num_class_embeds\": 10", NO, "\"num_class_embeds\": 10"},
    {U, "\"class_embeddings_concat\": true", NO, "\"class_embeddings_concat\": true"},
    {U, "\"dual_cross_attention\": true", NO, "\"dual_cross_attention\": true"},
    {U, "\"only_cross_attention\": [false, true]", NO, "[false,true] is not supported"},
    {U, "\"cross_attention_norm\": \"group_norm\"", NO, "\"cross_attention_norm\""},
    {U, "\"mid_block_scale_factor\": 2", NO, "\"mid_block_scale_factor\": 2"},
    {U, "\"resnet_out_scale_factor\": 1.5", NO, "\"resnet_out_scale_factor\": 1.5"},
    {U, "\"resnet_skip_time_act\": true", NO, "\"resnet_skip_time_act\""},
    {U, "\"reverse_transformer_layers_per_block\": [[1], [1]]", NO, "reverse_transformer"},
    {U, "\"transformer_layers_per_block\": [[1], [1]]", NO, "[1] is not supported"},
    {U, "\"mid_block_type\": \"UNetMidBlock2D\"", NO, "\"UNetMidBlock2DCrossAttn\" or null"},
    {U, "\"_class_name\": \"UNet3DConditionModel\"", NO, "UNet3DConditionModel"},
    {U, "\"down_block_types\": [\"AttnDownBlock2D\", \"DownBlock2D\"]", NO, "AttnDownBlock2D"},
    {U, "\"down_block_types\": [\"DownBlock2D\"]", NO, "a list of 2, one per level"},
    {U, "\"up_block_types\": 3", NO, "\"up_block_types\": 3"},
    {U, "\"layers_per_block\": [1, 2, 3]", NO, "one value or a list of 2"},
    {U, "\"layers_per_block\": 1000", NO, "an integer of 1..15"},
    {U, "\"layers_per_block\": 0", NO, "\"layers_per_block\": 0"},
    {U, "\"layers_per_block\": 1.5", NO, "\"layers_per_block\": 1.5"},
    {U, "\"in_channels\": -4", NO, "\"in_channels\": -4"},
    {U, "\"in_channels\": \"4\"", NO, "\"in_channels\": \"4\""},
    {U, "\"in_channels\": 1e30", NO, "\"in_channels\": 1e+30"},
    {U, "\"block_out_channels\": [4, 8, 8, 8, 8, 8, 8, 8, 8]", NO, "a list of 1..8"},
    {U, "\"block_out_channels\": []", NO, "a list of 1..8"},
    {U, "\"attention_head_dim\": 3", NO, "3 heads do not divide the 4 channels of"},
    {U, "\"attention_head_dim\": null", NO, "\"attention_head_dim\": null"},
    {U, "\"norm_num_groups\": 3", NO, "3 does not divide the 4 channels of down_blocks.0"},
    {U, "\"norm_num_groups\": null", NO, "\"norm_num_groups\": null"},
    {U, "\"cross_attention_dim\": [4, 5]", NO, "the same for all levels"},
    {U, "\"freq_shift\": 2", NO, "\"freq_shift\": 2"},
    {U, "\"downsample_padding\": 2", NO, "\"downsample_padding\": 2"},
    {U, "\"flip_sin_to_cos\": 1", NO, "true or false"},
    {U, "\"sample_size\": \"\"", NO, "\"sample_size\": \"\""},
    {U, "\"sample_size\": {}", NO, "\"sample_size\": {..}"},
    {U, "\"sample_size\": 0.5", NO, "\"sample_size\": 0.5"},
    {U, "\"sample_size\": 1e19", NO, "\"sample_size\": 1e+19"},
    {U, "\"sample_size\": [8, 8, 8]", NO, "a side or [height, width]"},
    {V, "\"act_fn\": \"relu\"", NO, "\"act_fn\": \"relu\""},
    {V, "\"latents_mean\": [0.1, 0.2]", NO, "\"latents_mean\": [0.1,0.2]"},
    {V, "\"shift_factor\": 0.1", NO, "\"shift_factor\": 0.1"},
    {V, "\"_class_name\": \"AutoencoderTiny\"", NO, "AutoencoderTiny"},
    {V, "\"down_block_types\": [\"DownEncoderBlock2D\", \"AttnDownEncoderBlock2D\"]", NO,
     "AttnDown"},
    {V, "\"scaling_factor\": 0", NO, "\"scaling_factor\": 0"},
    {V, "\"latent_channels\": 100000", NO, "\"latent_channels\": 100000"},
    {T, "\"hidden_act\": \"relu\"", NO, "\"quick_gelu\" or \"gelu\""},
    {T, "\"architectures\": [\"T5EncoderModel\"]", NO, "T5EncoderModel"},
    {T, "\"model_type\": \"t5\"", NO, "\"model_type\": \"t5\""},
    {T, "\"num_attention_heads\": 3", NO, "does not divide \"hidden_size\": 8"},
    {T, "\"vocab_size\": 1e9", NO, "\"vocab_size\": 1e+09"},
    {T, "\"use_attention_mask\": true", NO, "\"use_attention_mask\": true"},
};
#undef U
#undef V
#undef T
#undef NO

/* A member given in front replaces the one of the same key: the reader refuses doubles. */
static void build_config(char *out, size_t size, const char *add, const char *rest) {
    char key[64], copy[1024];
    const char *at, *end;
    size_t n = 0;
    int depth = 0;
    (void)snprintf(copy, sizeof copy, "%s", rest);
    while (add[n + 1] != '"') n++;
    (void)snprintf(key, sizeof key, "%.*s", (int)n + 2, add);
    at = strstr(copy, key);
    if (at) {
        for (end = at; depth > 0 || (*end != ',' && *end != '}'); end++)
            depth += (*end == '[') - (*end == ']');
        n = (size_t)(at - copy);
        memmove(copy + n, *end == ',' ? end + 1 : end, strlen(end) + (*end != ','));
        while (n > 0 && *end == '}' && copy[n - 1] != ',') n--;
        if (*end == '}' && n > 0) memmove(copy + n - 1, copy + n, strlen(copy + n) + 1);
    }
    (void)snprintf(out, size, "{%s, %s", add, copy);
}

static void test_refused_config(int tier) {
    sdq_ctx *ctx;
    sdq_model *m;
    char text[2048];
    size_t i;
    int p;
    (void)tier;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (p = SDQ_PART_TEXT; p < SDQ_PART_COUNT; p++) {
        (void)snprintf(text, sizeof text, "{\"unknown_key\": [1, {}], %s", good[p]);
        SDQT_THAT(sdq__md_create(ctx, "c.json", text, strlen(text), (sdq_part)p, NULL, SDQ__MD_WHOLE, &m)
                  == SDQ_OK, "%s", sdq_error_text(ctx));
        sdq_model_free(ctx, m);
    }
    for (i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        const refusal *r = &refusals[i];
        sdq_status st;
        build_config(text, sizeof text, r->add, good[r->part]);
        st = sdq__md_create(ctx, "c.json", text, strlen(text), r->part, NULL, SDQ__MD_WHOLE, &m);
        SDQT_THAT(st == r->status && !m, "%s: status %d: %s", r->add, (int)st, sdq_error_text(ctx));
        SDQT_THAT(strstr(sdq_error_text(ctx), r->says)
                  && strncmp(sdq_error_text(ctx), "c.json: ", 8) == 0,
                  "%s: says %s", r->add, sdq_error_text(ctx));
        sdq_model_free(ctx, m);
        sdq_clear_error(ctx);
    }
    for (i = 0; i < 3; i++) {
        static const char *const broken[] = {"[1]", "{\"in_channels\": 4", ""};
        SDQT_CHECK(sdq__md_create(ctx, "c.json", broken[i], strlen(broken[i]), SDQ_PART_UNET, NULL, SDQ__MD_WHOLE,
                                  &m) == SDQ_ERR_FORMAT && !m);
        sdq_clear_error(ctx);
    }
    sdq_ctx_free(ctx);
}

/* What diffusers takes as the same, and the sizes it draws. */
static void test_accepted_config(int tier) {
    static const struct { sdq_part part; const char *add; size_t h, w; } cases[] = {
        {SDQ_PART_UNET, "\"act_fn\": \"swish\"", 0, 0},
        {SDQ_PART_UNET, "\"act_fn\": \"SiLU\"", 0, 0},
        {SDQ_PART_VAE, "\"act_fn\": \"Swish\"", 32, 0},
        {SDQ_PART_VAE, "\"shift_factor\": 0.0", 32, 0},
        {SDQ_PART_TEXT, "\"use_attention_mask\": false", 0, 0},
        {SDQ_PART_TEXT, "\"architectures\": null", 0, 0},
        {SDQ_PART_TEXT, "\"architectures\": [\"CLIPTextModelWithProjection\"]", 0, 0},
        {SDQ_PART_UNET, "\"sample_size\": null", 0, 0},
        {SDQ_PART_UNET, "\"sample_size\": [8, 12]", 8, 12},
        {SDQ_PART_UNET, "\"sample_size\": 32, \"_diffusers_version\": \"0.8.1\"", 64, 64},
        {SDQ_PART_UNET, "\"sample_size\": 96, \"_diffusers_version\": \"0.6.0\"", 96, 96},
        {SDQ_PART_UNET, "\"sample_size\": 32, \"_diffusers_version\": \"0.9.0\"", 32, 32},
        {SDQ_PART_UNET, "\"sample_size\": [8, 12], \"_diffusers_version\": \"0.6.0\"", 8, 12}};
    sdq_ctx *ctx;
    char text[2048];
    size_t i;
    (void)tier;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (i = 0; i < SDQ__COUNT(cases); i++) {
        sdq_model *m = NULL;
        sdq_model_info info;
        build_config(text, sizeof text, cases[i].add, good[cases[i].part]);
        if (!SDQT_THAT(sdq__md_create(ctx, "c.json", text, strlen(text), cases[i].part, NULL, SDQ__MD_WHOLE, &m)
                       == SDQ_OK, "%s: %s", cases[i].add, sdq_error_text(ctx))) continue;
        info = sdq_model_get_info(m);
        SDQT_THAT(info.sample_size == cases[i].h && info.sample_width == cases[i].w,
                  "%s: %zu x %zu", cases[i].add, info.sample_size, info.sample_width);
        sdq_model_free(ctx, m);
    }
    sdq_ctx_free(ctx);
}

/* Networks of one folder that do not fit together are refused by the names of both keys. */
static void test_fitting(int tier) {
    static const struct { sdq_part part; const char *add, *says[2]; size_t length; } cases[] = {
        {SDQ_PART_UNET, "\"cross_attention_dim\": 8", {"", ""}, 4},
        {SDQ_PART_UNET, "\"cross_attention_dim\": 4", {"cross_attention_dim", "hidden_size"}, 4},
        {SDQ_PART_UNET, "\"in_channels\": 9", {"\"in_channels\" is 9", "out_channels"}, 4},
        {SDQ_PART_UNET, "\"out_channels\": 8", {"in_channels", "\"out_channels\" 8"}, 4},
        {SDQ_PART_VAE, "\"latent_channels\": 8", {"in_channels", "latent_channels"}, 4},
        {SDQ_PART_TEXT, "\"max_position_embeddings\": 4",
         {"model_max_length", "max_position_embeddings"}, 5}};
    static char folder[] = "somewhere";
    sdq_ctx *ctx;
    char text[2048], base[2048];
    size_t i;
    int k;
    (void)tier;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (i = 0; i < SDQ__COUNT(cases); i++) {
        sdq_model *m[SDQ_PART_COUNT] = {NULL, NULL, NULL, NULL};
        sdq_tokenizer_desc td;
        sdq_pipeline p;
        sdq_status st;
        memset(&p, 0, sizeof p);
        memset(&td, 0, sizeof td);
        td.max_length = cases[i].length;
        SDQT_CHECK(sdq_tokenizer_create(ctx, "", 0, &td, &p.tokenizer) == SDQ_OK);
        for (k = SDQ_PART_TEXT; k < SDQ_PART_COUNT; k++) {
            build_config(base, sizeof base, k == SDQ_PART_UNET ? "\"cross_attention_dim\": 8"
                                                               : "\"layers_per_block\": 1", good[k]);
            build_config(text, sizeof text, cases[i].part == (sdq_part)k ? cases[i].add
                                            : "\"layers_per_block\": 1", base + 1);
            SDQT_THAT(sdq__md_create(ctx, "c.json", text, strlen(text), (sdq_part)k, NULL, SDQ__MD_WHOLE,
                                    &m[k])
                      == SDQ_OK, "%s: %s", text, sdq_error_text(ctx));
        }
        for (k = SDQ_PART_TEXT; k < SDQ_PART_COUNT; k++)
            if (m[k]) p.info[k] = sdq_model_get_info(m[k]);
        p.folder = folder;
        st = m[SDQ_PART_UNET] ? sdq__pl_fits(ctx, &p) : SDQ_ERR_OOM;
        SDQT_CHECK((st == SDQ_OK) == (i == 0));
        SDQT_THAT(strstr(sdq_error_text(ctx), cases[i].says[0])
                  && strstr(sdq_error_text(ctx), cases[i].says[1]), "%s", sdq_error_text(ctx));
        for (k = 0; k < SDQ_PART_COUNT; k++) sdq_model_free(ctx, m[k]);
        sdq_tokenizer_free(ctx, p.tokenizer);
        sdq_clear_error(ctx);
    }
    sdq_ctx_free(ctx);
}

/* ---- the file of a quantized UNet ---- */

/* What is changed in a file that is written again, what loading it then says. All but BIT and
 * NO_HASH get a hash that fits: what is wrong with them must be seen all the same. */
enum { AS_IT_IS = 0, HALVES, BIT, NO_HASH, SURPLUS, RANK, NOT_FINITE, LOST, MULTIPLIER, INT8, WORDS };
typedef struct spoil {
    int kind, number;           /* number: a multiplier */
    sdq_status want;
    const char *says;
    const char *words;          /* settings of a layer */
} spoil;

#define SPOILT_LAYER "mid_block.attentions.0.proj_in"

static void spoil_entry(sdq_ctx *ctx, const spoil *d, sdq__cv_out *o) {
    static const float nan_pair[2] = {0, NAN};
    sdq_entry *e = &o->entry[o->n - 1];
    const int group = !strcmp(e->name, SPOILT_LAYER ".weight_group");
    char *copy = SDQ__PUSH_N(ctx, char, e->bytes);
    if (!copy) exit(2);
    if (d->kind == HALVES && e->dtype == SDQ_F16) {         /* as F32: equal values */
        float *f = SDQ__PUSH_N(ctx, float, sdq_entry_count(e));
        SDQT_CHECK(sdq_entry_to_f32(ctx, e, f) == SDQ_OK);
        e->dtype = SDQ_F32; e->data = f; e->bytes *= 2;
    }
    if (d->kind == RANK && !strcmp(e->name, SPOILT_LAYER ".input_scale")) e->rank = 2;
    if (d->kind == INT8 && !strcmp(e->name, SPOILT_LAYER ".weight")) e->dtype = SDQ_I8;
    if (d->kind == NOT_FINITE && !strcmp(e->name, "conv_norm_out.bias")) {
        e->dtype = SDQ_F32; e->data = nan_pair; e->bytes = 8; e->dim[0] = 2;
    }
    if ((d->kind == BIT && e->dtype == SDQ_I8) || (d->kind == MULTIPLIER && group)) {
        memcpy(copy, e->data, e->bytes);
        if (d->kind == BIT) copy[e->bytes / 2] ^= 4;
        else copy[e->bytes - 1] = (char)d->number;
        e->data = copy;
    }
    if (d->kind == LOST && group) o->n--;
}

static void spoil_file(sdq_ctx *ctx, const sdq_file *file, const spoil *d) {
    sdq__cv_out o;
    uint64_t hash = 0;
    const sdq__json *v;
    size_t i;
    memset(&o, 0, sizeof o);
    o.ctx = ctx;
    o.entry = SDQ__PUSH_N(ctx, sdq_entry, file->count + 1);
    o.meta = SDQ__PUSH_N(ctx, sdq_pair, 1000);
    for (i = 0; i < file->count; i++) {
        o.entry[o.n++] = file->entries[i];
        spoil_entry(ctx, d, &o);
    }
    if (d->kind == SURPLUS) {
        o.entry[o.n] = o.entry[0];
        o.entry[o.n++].name = "odd.weight";
    }
    for (v = sdq__js_get(file->header, "__metadata__")->child; v; v = v->next)
        if (strcmp(v->key, "sdq.hash") != 0 || d->kind == BIT)
            sdq__cv_meta(&o, v->key, d->words && !strcmp(v->key, "sdq.layer." SPOILT_LAYER)
                                         ? d->words : v->str);
    SDQT_CHECK(sdq__cv_hash_out(&o, &hash) == SDQ_OK);
    if (d->kind != BIT && d->kind != NO_HASH) sdq__cv_meta_hash(&o, "sdq.hash", hash);
    SDQT_CHECK(sdq_file_write(ctx, SCRATCH "/spoilt.safetensors", o.entry, o.n, o.meta, o.metas)
               == SDQ_OK);
}

/* The UNet of a model by a recipe: its file, open. */
static sdq_file *int8_file(sdq_ctx *ctx, sdq_model *u, const sdq_recipe *r) {
    sdq_file *file = NULL;
    SDQT_THAT(sdq_recipe_apply(ctx, u, r, NULL) == SDQ_OK && sdq_model_convert(ctx, u) == SDQ_OK
              && sdq_model_save_int8(ctx, u, SCRATCH "/q", NULL, "test") == SDQ_OK
              && sdq_file_open(ctx, SCRATCH "/q", &file) == SDQ_OK, "%s", sdq_error_text(ctx));
    if (!file) exit(2);
    return file;
}

/* Every damage of a file is found; the file as it is gives the same bytes when it is written
 * again. */
static void spoil_all(sdq_ctx *ctx, const sdq_file *file, uint64_t source, const spoil *d,
                      size_t n) {
    unsigned char *bytes[2];
    size_t i, size[2];
    for (i = 0; i < n; i++) {
        sdq_model *m = NULL;
        sdq_status st;
        spoil_file(ctx, file, &d[i]);
        st = sdq_model_load_int8(ctx, GOLDEN "models/sd1-a", SCRATCH "/spoilt.safetensors", &m,
                                 NULL);
        SDQT_THAT(st == d[i].want && !m == (st != SDQ_OK), "damage %zu: status %d", i, (int)st);
        SDQT_THAT(strstr(sdq_error_text(ctx), d[i].says) != NULL, "damage %zu: %s", i,
                  sdq_error_text(ctx));
        if (m) SDQT_CHECK(m->source == source);
        if (m && d[i].kind == AS_IT_IS)
            SDQT_CHECK(sdq_model_save_int8(ctx, m, SCRATCH "/again", NULL, "test") == SDQ_OK);
        sdq_model_free(ctx, m);
        sdq_clear_error(ctx);
    }
    bytes[0] = sdqt_read(SCRATCH "/q", &size[0]);
    bytes[1] = sdqt_read(SCRATCH "/again", &size[1]);
    SDQT_CHECK(size[0] == size[1] && memcmp(bytes[0], bytes[1], size[0]) == 0);
    for (i = 0; i < 2; i++) free(bytes[i]);
}

static void drop_int8_files(void) {
    (void)remove(SCRATCH "/q");
    (void)remove(SCRATCH "/again");
    (void)remove(SCRATCH "/spoilt.safetensors");
    drop_scratch();
}

static void test_int8_file(int tier) {
    static const spoil damages[] = {
        {AS_IT_IS, 0, SDQ_OK, "", NULL},
        {HALVES, 0, SDQ_OK, "", NULL},
        {BIT, 0, SDQ_ERR_FORMAT, "its hash is", NULL},
        {NO_HASH, 0, SDQ_ERR_FORMAT, "quantize the network", NULL},
        {SURPLUS, 0, SDQ_ERR_FORMAT, "odd.weight has no place", NULL},
        {RANK, 0, SDQ_ERR_SHAPE, "proj_in.input_scale is F32 [1,1], expected F32 [1]", NULL},
        {NOT_FINITE, 0, SDQ_ERR_SHAPE, "conv_norm_out.bias is F32 [2], expected F32 [8]", NULL}};
    const sdq_recipe recipe = sdq_recipe_default();
    fixture f;
    sdq_model *m = NULL;
    SDQT_MAKE_FOLDER(SCRATCH);
    if (open_fixture(&f, "sd1-a", tier, 0)) {
        sdq_model *u = f.part[SDQ_PART_UNET];
        sdq_file *file = int8_file(f.ctx, u, &recipe);
        SDQT_CHECK(u->source != 0);
        spoil_all(f.ctx, file, u->source, damages, SDQ__COUNT(damages));
        sdq_file_close(f.ctx, file);
        sdq_f32(sdq_layer_bias(u->unet->conv_in))[0] = NAN;     /* a training that went wrong */
        SDQT_CHECK(sdq_model_save_int8(f.ctx, u, SCRATCH "/q", NULL, NULL) == SDQ_OK);
        SDQT_CHECK(sdq_model_load_int8(f.ctx, GOLDEN "models/sd1-a", SCRATCH "/q", &m, NULL)
                   == SDQ_ERR_NUMERIC && strstr(sdq_error_text(f.ctx), "conv_in.bias"));
    }
    close_fixture(&f);
    drop_int8_files();
}

static sdq_dtype dtype_of(const sdq_file *f, const char *name) {
    const sdq_entry *e = sdq_file_find(f, name);
    return e ? e->dtype : SDQ_DTYPE_COUNT;
}

/* A recipe makes halves of the weights of float layers, but not of those that halves can not
 * hold; packed or not. */
static void test_halves(int tier) {
    static const float by[3] = {1.0f, 1e9f, 1e-9f};
    const sdq_recipe recipe = sdq_recipe_default();
    size_t i, j, n;
    SDQT_MAKE_FOLDER(SCRATCH);
    for (j = 0; j < 6; j++) {
        float *before, most = 0;
        sdq_layer *l;
        sdq_file *file;
        fixture f;
        size_t moved = 0, wrong = 0;
        if (!open_fixture(&f, "sd1-a", tier, 0)) exit(2);
        l = f.part[SDQ_PART_UNET]->unet->conv_in;
        n = l->out * sdq__ly_k(l);
        before = (float *)malloc(n * sizeof(float));
        if (!before) exit(2);
        sdq_f32(&l->w)[0] = 1.0f / 3;
        for (i = 0; i < n; i++) {
            before[i] = sdq_f32(&l->w)[i] *= by[j % 3];
            most = fmaxf(most, fabsf(before[i]));
        }
        if (j >= 3) SDQT_CHECK(sdq_model_freeze(f.ctx, f.part[SDQ_PART_UNET]) == SDQ_OK);
        file = int8_file(f.ctx, f.part[SDQ_PART_UNET], &recipe);
        SDQT_CHECK(!l->quant.enabled && dtype_of(file, "conv_in.bias") == SDQ_F32);
        SDQT_CHECK(dtype_of(file, "conv_in.weight") == (j % 3 ? SDQ_F32 : SDQ_F16));
        SDQT_CHECK((l->wp != NULL) == (j > 3) && (l->wh != NULL) == (j == 3));
        for (i = 0; i < n; i++) {
            const float w = sdq__ly_thaw(f.ctx, l)[i];
            moved += w != before[i];
            wrong += fabsf(w - before[i]) > (j % 3 ? 0.0f : most / 2048)
                  || (j % 3 == 0 && w != sdq__u_from_f16(sdq__u_to_f16(before[i])));
        }
        SDQT_THAT(wrong == 0 && (moved > 0) == (j % 3 == 0), "case %zu: %zu of %zu moved, %zu wrong",
                  j, moved, n, wrong);
        sdq_file_close(f.ctx, file);
        free(before);
        close_fixture(&f);
    }
    drop_int8_files();
}

/* Bytes of the arrays of quantized weights and of their multipliers. */
static size_t weight_bytes(const sdq_file *f) {
    size_t i, n = 0;
    for (i = 0; i < f->count; i++)
        if (f->entries[i].dtype == SDQ_I8 || f->entries[i].dtype == SDQ_U8) n += f->entries[i].bytes;
    return n;
}

/* Weights of 4 bits: the file is half as large. */
static void test_four_file(int tier) {
    static const spoil damages[] = {
        {AS_IT_IS, 0, SDQ_OK, "", NULL},
        {MULTIPLIER, 0, SDQ_ERR_FORMAT, "has the multiplier 0", NULL},
        {MULTIPLIER, 17, SDQ_ERR_FORMAT, "has the multiplier 17", NULL},
        {LOST, 0, SDQ_ERR_MISSING, "proj_in.weight_group is missing", NULL},
        {INT8, 0, SDQ_ERR_SHAPE, "proj_in.weight is I8", NULL},
        {WORDS, 0, SDQ_ERR_SHAPE, "proj_in.weight_group is U8",
         "range=position split=0 bits=4 group=3"},
        {WORDS, 0, SDQ_ERR_FORMAT, "settings of layer", "range=position split=0 bits=3 group=64"},
        {WORDS, 0, SDQ_ERR_FORMAT, "has settings", "range=position split=0 bits=4 group=0"},
        {WORDS, 0, SDQ_ERR_FORMAT, "settings of layer", "range=position split=0 bits=four"}};
    sdq_recipe recipe = sdq_recipe_default();
    fixture f;
    SDQT_MAKE_FOLDER(SCRATCH);
    if (open_fixture(&f, "sd1-a", tier, 0)) {
        sdq_model *u[2] = {NULL, f.part[SDQ_PART_UNET]};
        size_t bytes[2], i;
        SDQT_CHECK(sdq_model_load(f.ctx, GOLDEN "models/sd1-a", SDQ_PART_UNET, &u[0]) == SDQ_OK);
        for (i = 0; i < 2; i++) {
            sdq_file *file = int8_file(f.ctx, u[i], &recipe);
            bytes[i] = weight_bytes(file);
            if (i) spoil_all(f.ctx, file, u[i]->source, damages, SDQ__COUNT(damages));
            sdq_file_close(f.ctx, file);
            recipe.weight_bits = 4;
        }
        SDQT_THAT(bytes[1] < 3 * bytes[0] / 4, "%zu bytes of weights, 8 bits %zu", bytes[1],
                  bytes[0]);
        sdq_model_free(f.ctx, u[0]);
    }
    close_fixture(&f);
    drop_int8_files();
}

/* Halves in the file or floats: the same weights, the same hash; one other bit, another. */
static void test_source_hash(int tier) {
    fixture f;
    sdq_model *m[3] = {NULL, NULL, NULL};
    uint64_t h;
    int i;
    (void)tier;
    SDQT_MAKE_FOLDER(SCRATCH);
    if (open_fixture(&f, "sd2-a", tier, 0)) {       /* its UNet is stored as F16 */
        sdq_tensor *t = sdq_model_param(f.part[SDQ_PART_UNET], 5, NULL);
        h = f.part[SDQ_PART_UNET]->source;
        for (i = 0; i < 3; i++) {
            if (i == 2) sdq_f32(t)[0] = sdq__u_float(sdq__u_bits(sdq_f32(t)[0]) ^ 1u);
            SDQT_CHECK(sdq_model_save(f.ctx, f.part[SDQ_PART_UNET], SCRATCH,
                                      i ? SDQ_F32 : SDQ_F16) == SDQ_OK);
            SDQT_CHECK(sdq_model_load(f.ctx, SCRATCH, SDQ_PART_UNET, &m[i]) == SDQ_OK);
            SDQT_CHECK(m[i] && (m[i]->source == h) == (i < 2));
            sdq_model_free(f.ctx, m[i]);
        }
    }
    close_fixture(&f);
    drop_scratch();
}

enum { MISSING = 0, EXTRA, SHAPE, DTYPE, FILE_DAMAGES };

/* Save a good VAE, spoil one entry of its file, load. */
static void one_damage(const fixture *f, int kind) {
    static const sdq_status want[FILE_DAMAGES] = {SDQ_ERR_MISSING, SDQ_ERR_UNSUPPORTED,
                                                  SDQ_ERR_SHAPE, SDQ_ERR_UNSUPPORTED};
    static const char *const says[FILE_DAMAGES] = {
        "decoder.conv_in.weight is missing; config.json asks for it as [12,4,3,3]",
        "decoder.odd [2] has no place in the network that config.json describes",
        "decoder.conv_in.weight is [12,4,9], but config.json asks for [12,4,3,3]",
        "decoder.conv_in.weight is stored as I32; a weight must be F32"};
    static const char *const path = SCRATCH "/diffusion_pytorch_model.safetensors";
    static const float two[2] = {1, 2};
    sdq_entry list[400];
    sdq_file *file = NULL;
    sdq_model *m = NULL;
    size_t i, n = 0;
    sdq_status st;
    SDQT_CHECK(sdq_model_save(f->ctx, f->part[SDQ_PART_VAE], SCRATCH, SDQ_F32) == SDQ_OK);
    if (!SDQT_CHECK(sdq_file_open(f->ctx, path, &file) == SDQ_OK)) return;
    for (i = 0; i < sdq_file_count(file) && n < 399; i++) {
        list[n] = *sdq_file_entry(file, i);
        if (strcmp(list[n].name, "decoder.conv_in.weight") == 0) {
            if (kind == MISSING) continue;
            if (kind == SHAPE) { list[n].rank = 3; list[n].dim[2] = 9; list[n].dim[3] = 1; }
            if (kind == DTYPE) list[n].dtype = SDQ_I32;
        }
        n++;
    }
    if (kind == EXTRA) {
        memset(&list[n], 0, sizeof list[n]);
        list[n].name = "decoder.odd";
        list[n].rank = 1;
        for (i = 0; i < 8; i++) list[n].dim[i] = i ? 1 : 2;
        list[n].data = two;
        list[n++].bytes = sizeof two;
    }
    st = sdq_file_write(f->ctx, SCRATCH "/spoilt.safetensors", list, n, NULL, 0);
    sdq_file_close(f->ctx, file);
    SDQT_THAT(st == SDQ_OK && rename(SCRATCH "/spoilt.safetensors", path) == 0, "%s",
              sdq_error_text(f->ctx));
    st = sdq_model_load(f->ctx, SCRATCH, SDQ_PART_VAE, &m);
    SDQT_THAT(st == want[kind] && !m, "damage %d: status %d", kind, (int)st);
    SDQT_THAT(strstr(sdq_error_text(f->ctx), says[kind]) && strstr(sdq_error_text(f->ctx), path),
              "%s", sdq_error_text(f->ctx));
    sdq_clear_error(f->ctx);
}

static void test_refused_file(int tier) {
    fixture f;
    sdq_model *m = NULL;
    int kind;
    SDQT_MAKE_FOLDER(SCRATCH);
    if (open_fixture(&f, "sd1-b", tier, 0)) {
        for (kind = 0; kind < FILE_DAMAGES; kind++) one_damage(&f, kind);
        SDQT_CHECK(sdq_model_load(f.ctx, SCRATCH, SDQ_PART_UNET, &m) != SDQ_OK && !m);
        SDQT_THAT(strstr(sdq_error_text(f.ctx), "config.json: \"_class_name\": \"AutoencoderKL\" "
                         "is not supported"), "%s", sdq_error_text(f.ctx));
        sdq_clear_error(f.ctx);
        SDQT_CHECK(sdq_model_load(f.ctx, GOLDEN, SDQ_PART_VAE, &m) == SDQ_ERR_MISSING && !m);
        SDQT_THAT(strstr(sdq_error_text(f.ctx), "holds no config.json"), "%s",
                  sdq_error_text(f.ctx));
        SDQT_CHECK(sdq_model_load(f.ctx, GOLDEN "models/bk-a", SDQ_PART_VAE, &m)
                   == SDQ_ERR_MISSING);     /* the error before is sticky */
        sdq_clear_error(f.ctx);
        SDQT_CHECK(sdq_model_load(f.ctx, NULL, SDQ_PART_VAE, &m) == SDQ_ERR_ARGUMENT);
        sdq_clear_error(f.ctx);
        SDQT_CHECK(sdq_model_load(f.ctx, GOLDEN, SDQ_PART_NONE, &m) == SDQ_ERR_ARGUMENT);
        sdq_clear_error(f.ctx);
    }
    close_fixture(&f);
    drop_scratch();
}

/* Inputs of the wrong kind, shape or value: a sentence and NULL, never a wrong read. */
static void refuse(const fixture *f, const sdq_tensor *y, sdq_status status, const char *says) {
    SDQT_THAT(!y && sdq_last_error(f->ctx) == status && strstr(sdq_error_text(f->ctx), says),
              "wanted \"%s\", got \"%s\"", says, sdq_error_text(f->ctx));
    sdq_clear_error(f->ctx);
}

static void refused_input(const fixture *f) {
    sdq_model *const *m = f->part;
    sdq_ctx *ctx = f->ctx;
    sdq_unet_input in, bad;
    sdq_tensor *image = sdq_tensor_4d(ctx, 1, 8, 3, 3), *ids = load(f, "text.", "input_ids");
    const float nan_step[2] = {1.0f, (float)NAN}, guidance[2] = {1, 1};
    unet_input(f, "unet.", &in);
    refuse(f, sdq_text_forward(ctx, m[SDQ_PART_UNET], ids), SDQ_ERR_ARGUMENT,
           "the model is unet, not text_encoder");
    refuse(f, sdq_text_forward(ctx, NULL, ids), SDQ_ERR_ARGUMENT, "the model is NULL");
    refuse(f, sdq_text_forward(ctx, m[SDQ_PART_TEXT], NULL), SDQ_ERR_ARGUMENT, "found NULL");
    refuse(f, sdq_text_forward(ctx, m[SDQ_PART_TEXT], image), SDQ_ERR_SHAPE, "found F32[1,8,3,3]");
    ((int32_t *)ids->data)[3] = (int32_t)sdq_model_get_info(m[SDQ_PART_TEXT]).vocab;
    refuse(f, sdq_text_forward(ctx, m[SDQ_PART_TEXT], ids), SDQ_ERR_ARGUMENT, "token");
    refuse(f, sdq_vae_encode(ctx, m[SDQ_PART_VAE], image, SDQ_FLOAT), SDQ_ERR_SHAPE,
           "a picture of 3x8, but this VAE needs at least 4 each way");
    refuse(f, sdq_vae_decode(ctx, m[SDQ_PART_VAE], image, SDQ_FLOAT), SDQ_ERR_SHAPE,
           "expected F32 [n,h,w,4], found F32[1,8,3,3]");
    refuse(f, sdq_unet_forward(ctx, m[SDQ_PART_UNET], NULL, SDQ_FLOAT), SDQ_ERR_ARGUMENT, "NULL");
    bad = in; bad.sample = image;
    refuse(f, sdq_unet_forward(ctx, m[SDQ_PART_UNET], &bad, SDQ_FLOAT), SDQ_ERR_SHAPE,
           "UNet: sample: expected F32 [n,h,w,4]");
    bad = in; bad.context = NULL;
    refuse(f, sdq_unet_forward(ctx, m[SDQ_PART_UNET], &bad, SDQ_FLOAT), SDQ_ERR_ARGUMENT,
           "UNet: context");
    bad = in; bad.context = sdq_tensor_3d(ctx, 1, 5, 20);
    refuse(f, sdq_unet_forward(ctx, m[SDQ_PART_UNET], &bad, SDQ_FLOAT), SDQ_ERR_SHAPE,
           "2 samples but 1 contexts");
    bad = in; bad.timesteps = nan_step;
    refuse(f, sdq_unet_forward(ctx, m[SDQ_PART_UNET], &bad, SDQ_FLOAT), SDQ_ERR_ARGUMENT,
           "UNet: timestep nan");
    bad = in; bad.timesteps = NULL;
    refuse(f, sdq_unet_forward(ctx, m[SDQ_PART_UNET], &bad, SDQ_FLOAT), SDQ_ERR_ARGUMENT,
           "timesteps is NULL");
    bad = in; bad.guidance = guidance;
    refuse(f, sdq_unet_forward(ctx, m[SDQ_PART_UNET], &bad, SDQ_FLOAT), SDQ_ERR_ARGUMENT,
           "has no guidance input");
}

static void test_refused_input(int tier) {
    fixture f;
    if (open_fixture(&f, "sd1-b", tier, 0)) refused_input(&f);
    close_fixture(&f);
}

/* ---- allocations that fail ---- */

/* Everything once with n allocations allowed: 1 when it got through. */
static int with_budget(size_t n) {
    sdqt_heap h;
    sdq_ctx *ctx;
    sdq_model *m = NULL;
    sdq_prompt_cache *prompt = NULL;
    sdq_time_table *times = NULL;
    sdq_unet_input in;
    const float step = 5;
    sdq_status st;
    memset(&h, 0, sizeof h);
    memset(&in, 0, sizeof in);
    sdqt_refuse(&h, n, SIZE_MAX);
    if (sdqt_ctx_of(&h, SDQ_TIER_AUTO, 1, &ctx) != SDQ_OK) return 0;
    st = sdq_model_load(ctx, GOLDEN "models/bk-a", SDQ_PART_UNET, &m);
    if (st == SDQ_OK) {
        in.sample = sdq_tensor_4d(ctx, 1, 3, 2, 4);
        in.timesteps = &step;
        in.context = sdq_tensor_3d(ctx, 1, 3, 16);
        if (in.context) (void)sdq_unet_prompt(ctx, m, in.context, SDQ_FLOAT, &prompt);
        if (prompt) (void)sdq_unet_times(ctx, m, &step, NULL, 1, SDQ_FLOAT, &times);
        in.prompt = prompt;
        in.times = times;
        if (times) (void)sdq_unet_forward(ctx, m, &in, SDQ_FLOAT);
        if (times) (void)sdq_model_save(ctx, m, SCRATCH, SDQ_F16);
        st = sdq_last_error(ctx);
    }
    SDQT_THAT(st == SDQ_OK || st == SDQ_ERR_OOM, "%zu allocations: status %d: %s", n, (int)st,
              sdq_error_text(ctx));
    sdq_prompt_cache_free(ctx, prompt);
    sdq_time_table_free(ctx, times);
    sdq_model_free(ctx, m);
    sdq_ctx_free(ctx);
    SDQT_THAT(h.live == 0, "%zu allocations: %zu of them leak", n, h.live);
    return st == SDQ_OK;
}

static void test_out_of_memory(int tier) {
    size_t n = 0;
    (void)tier;
    SDQT_MAKE_FOLDER(SCRATCH);
    while (!with_budget(n) && n < 100000) n++;
    SDQT_THAT(n > 300, "%zu allocations were enough", n);
    drop_scratch();
}

/* ---- the decoder in int8 ---- */

/* Measured on latents of unit size: 53.2 dB. */
static void test_vae_int8(int tier) {
    sdq_ctx *ctx;
    sdq_ctx_desc cd;
    sdq_pipeline *p[2] = {NULL, NULL};
    sdq_pipeline_desc d;
    sdq_image im[2];
    sdq_rng rng;
    size_t i;
    memset(&cd, 0, sizeof cd);
    cd.tier = (sdq_tier)tier;
    memset(&d, 0, sizeof d);
    if (sdq_ctx_create(&cd, &ctx) != SDQ_OK) exit(2);
    for (i = 0; i < 2; i++) {
        sdq_tensor *z = sdq_tensor_4d(ctx, 1, 16, 16, 4);
        d.vae_int8 = (int)i;
        SDQT_THAT(sdq_pipeline_load(ctx, "examples/emoji/model", &d, &p[i]) == SDQ_OK, "%s",
                  sdq_error_text(ctx));
        sdq_rng_init(&rng, SDQ_RNG_TORCH, 1);
        sdq_rng_normal(&rng, sdq_f32(z), 16 * 16 * 4);
        SDQT_THAT(sdq_decode_latents(ctx, p[i], z, &im[i]) == SDQ_OK, "%s", sdq_error_text(ctx));
    }
    if (ctx->status == SDQ_OK) {
        const double psnr = sdq_psnr(im[0].px, im[1].px, im[0].w * im[0].h * im[0].c);
        SDQT_THAT(psnr > 45 && psnr < 70, "%g dB", psnr);
        if (getenv("SDQT_SHOW")) printf("decoder: %g dB\n", psnr);
        for (i = 0; i < 2; i++) sdq_image_free(ctx, &im[i]);
    }
    for (i = 0; i < 2; i++) sdq_pipeline_free(ctx, p[i]);
    sdq_ctx_free(ctx);
}

/* ---- the decoder in bands ---- */

/* A decoder of that configuration with random weights, whole and in bands: the same bits, less
 * memory where the picture has more than a band. */
static sdq_status bands_vae(sdq_ctx *ctx, const char *path, sdq_model **vae) {
    sdq_status st;
    if (*path != '{') return sdq_model_load(ctx, path, SDQ_PART_VAE, vae);
    SDQT_MAKE_FOLDER(SCRATCH);
    st = sdq_bytes_write(ctx, SCRATCH "/config.json", path, strlen(path));
    if (st == SDQ_OK) st = sdq_model_init(ctx, SCRATCH, SDQ_PART_VAE, 5, vae);
    (void)remove(SCRATCH "/config.json");
    SDQT_DROP_FOLDER(SCRATCH);
    return st;
}
static void in_bands(int tier, const char *path, size_t h, size_t w, int int8, double less) {
    sdq_ctx *ctx[2] = {NULL, NULL};
    sdq_tensor *y[2] = {NULL, NULL};
    sdq_ctx_desc cd;
    sdq_rng rng;
    int i;
    memset(&cd, 0, sizeof cd);
    cd.tier = (sdq_tier)tier;
    for (i = 0; i < 2; i++) {
        sdq_model *vae = NULL;
        sdq_tensor *z;
        if (sdq_ctx_create(&cd, &ctx[i]) != SDQ_OK) exit(2);
        if (bands_vae(ctx[i], path, &vae) == SDQ_OK)
            (void)(int8 ? sdq_vae_quantize(ctx[i], vae, SDQ_RANGE_DEFAULT)
                        : sdq_model_freeze(ctx[i], vae));
        z = sdq_tensor_4d(ctx[i], 1, h, w, vae ? sdq_model_get_info(vae).latent : 1);
        sdq_rng_init(&rng, SDQ_RNG_PHILOX, 2);
        sdq_rng_normal(&rng, sdq_f32(z), sdq_tensor_count(z));
        y[i] = (i ? sdq_vae_decode_tiled : sdq_vae_decode)(ctx[i], vae, z,
                                                           int8 ? SDQ_INT8 : SDQ_FLOAT);
        SDQT_THAT(y[i] != NULL, "%s", sdq_error_text(ctx[i]));
        sdq_model_free(ctx[i], vae);
    }
    if (y[0] && y[1]) {
        const double part = (double)sdq_arena_peak(ctx[1]) / (double)sdq_arena_peak(ctx[0]);
        SDQT_CHECK(sdq__t_same(y[0], y[1]));
        SDQT_BYTES(y[0]->data, y[1]->data, sdq_tensor_count(y[0]) * 4);
        SDQT_THAT(part < less, "%s, %zu x %zu: in bands %.2f of the memory", path, h, w, part);
        if (getenv("SDQT_SHOW")) printf("%s, %zu x %zu: %.2f\n", path, h, w, part);
    }
    for (i = 0; i < 2; i++) sdq_ctx_free(ctx[i]);
}

#define TWICE(word) "\"" word "\", \"" word "\""

static void test_vae_bands(int tier) {
    static const char emoji[] = "examples/emoji/model";
    /* decoders that grow on the way, as no published one does */
    static const char *const grow[] = {"[12, 6]", "[6, 48, 6]", "[6, 6, 24, 6]", "[12, 11, 12]"};
    char config[512];
    size_t i;
    for (i = 0; i < SDQ__COUNT(grow); i++) {
        const size_t levels = i == 0 ? 2 : i == 2 ? 4 : 3;
        (void)snprintf(config, sizeof config, "{\"_class_name\": \"AutoencoderKL\", "
            "\"block_out_channels\": %s, \"norm_num_groups\": %d, \"layers_per_block\": 1, "
            "\"latent_channels\": 4, \"down_block_types\": [%s], \"up_block_types\": [%s]}",
            grow[i], i == 3 ? 1 : 3,
            levels == 2 ? TWICE("DownEncoderBlock2D") : levels == 3 ? TWICE("DownEncoderBlock2D")
                ", \"DownEncoderBlock2D\"" : TWICE("DownEncoderBlock2D") ", "
                TWICE("DownEncoderBlock2D"),
            levels == 2 ? TWICE("UpDecoderBlock2D") : levels == 3 ? TWICE("UpDecoderBlock2D")
                ", \"UpDecoderBlock2D\"" : TWICE("UpDecoderBlock2D") ", "
                TWICE("UpDecoderBlock2D"));
        in_bands(tier, config, 5, 7, 0, 2.0);
    }
    in_bands(tier, "tests/golden/models/bk-a", 9, 5, 0, 1.5);   /* less than a band: one band */
    if (tier == SDQ_TIER_SCALAR) return;
    in_bands(tier, "tests/golden/models/sd1-a", 13, 17, 0, 1.5);
    in_bands(tier, emoji, 130, 83, 0, 0.8);     /* odd sizes, a short last band */
    in_bands(tier, emoji, 41, 300, 0, 0.85);
    in_bands(tier, emoji, 67, 90, 1, 0.9);
}

static void test_vae_bands_refused(int tier) {
    sdq_ctx *ctx;
    sdq_model *vae = NULL;
    sdq_tensor *z;
    (void)tier;
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) exit(2);
    SDQT_CHECK(sdq_model_load(ctx, "tests/golden/models/bk-a", SDQ_PART_VAE, &vae) == SDQ_OK);
    z = sdq_tensor_4d(ctx, 2, 4, 4, sdq_model_get_info(vae).latent);
    SDQT_CHECK(!sdq_vae_decode_tiled(ctx, vae, z, SDQ_FLOAT)
               && sdq_last_error(ctx) == SDQ_ERR_UNSUPPORTED);
    sdq_clear_error(ctx);
    z->dim[0] = 1;
    SDQT_CHECK(!sdq_vae_decode_tiled(ctx, vae, z, SDQ_FAKE)
               && sdq_last_error(ctx) == SDQ_ERR_UNSUPPORTED);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_vae_quantize(ctx, vae, SDQ_RANGE_PICTURE) == SDQ_OK);
    SDQT_CHECK(!sdq_vae_decode_tiled(ctx, vae, z, SDQ_INT8)
               && strstr(sdq_error_text(ctx), "one range for the whole picture"));
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_model_save_int8(ctx, vae, "build/refused", NULL, NULL) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    sdq_model_free(ctx, vae);
    sdq_ctx_free(ctx);
}

/* ---- networks on demand, and the memory that a drawing needs ---- */

#define DEMAND_INT8 "test_networks.int8.tmp"

/* The latents of one drawing; *most: the most the allocator gave. */
static uint64_t demand_draw(const char *path, const sdq_pipeline_desc *pd,
                            const sdq_txt2img_desc *d, size_t *most, size_t *estimate) {
    sdqt_heap h;
    sdq_ctx *ctx;
    sdq_pipeline *p = NULL;
    sdq_image im;
    uint64_t hash = 0;
    memset(&h, 0, sizeof h);
    if (sdqt_ctx_of(&h, SDQ_TIER_AUTO, 1, &ctx) != SDQ_OK) exit(2);
    SDQT_THAT(sdq_txt2img_memory(ctx, path, pd, d, estimate) == SDQ_OK, "%s", sdq_error_text(ctx));
    SDQT_THAT(h.most < 65536, "estimating took %zu bytes", h.most);
    if (SDQT_THAT(sdq_pipeline_load(ctx, path, pd, &p) == SDQ_OK
                  && sdq_txt2img(ctx, p, d, &im) == SDQ_OK, "%s", sdq_error_text(ctx))) {
        SDQT_CHECK(!p->text == (pd->on_demand != 0));
        hash = sdq__u_hash(1, im.px, im.w * im.h * im.c);
        sdq_image_free(ctx, &im);
    }
    *most = h.most;
    sdq_pipeline_free(ctx, p);
    sdq_ctx_free(ctx);
    SDQT_THAT(h.live == 0, "%zu blocks, %zu bytes leaked", h.live, h.bytes);
    return hash;
}

/* Networks that come and go draw the same picture in less memory. What an allocator gives is more
 * than what is touched: test_cli.sh compares the estimate with the memory of a process. */
static void test_demand(int tier) {
    static const char path[] = "examples/emoji/model";
    static const unsigned char turns[] = {1, 0, 1, 0, 1};
    static const struct { size_t width, k; int vae_int8, int8_only, tiling, list; } runs[] = {
        {64, 1, 0, 0, 0, 0}, {64, 0, 1, 1, 0, 0}, {128, 2, 0, 1, 1, 0}, {64, 0, 0, 0, 0, 1}};
    const int slow = !sdq_tier_available(SDQ_TIER_AVX2);    /* scalar kernels: smaller pictures */
    sdq_recipe r = sdq_recipe_default();
    sdq_ctx *ctx;
    sdq_model *m = NULL;
    size_t i;
    (void)tier;
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) exit(2);
    SDQT_THAT(sdq_model_load(ctx, path, SDQ_PART_UNET, &m) == SDQ_OK
              && sdq_recipe_apply(ctx, m, &r, NULL) == SDQ_OK
              && sdq_model_convert(ctx, m) == SDQ_OK
              && sdq_model_save_int8(ctx, m, DEMAND_INT8, NULL, "test") == SDQ_OK, "%s",
              sdq_error_text(ctx));
    sdq_model_free(ctx, m);
    for (i = 0; i < SDQ__COUNT(runs); i++) {
        size_t most[2], estimate[2], k;
        uint64_t hash[2];
        sdq_pipeline_desc pd;
        sdq_txt2img_desc d;
        memset(&pd, 0, sizeof pd);
        memset(&d, 0, sizeof d);
        pd.unet_int8 = DEMAND_INT8;
        pd.vae_int8 = runs[i].vae_int8;
        pd.int8_only = runs[i].int8_only;
        pd.vae_tiling = runs[i].tiling;
        d.prompt = "red apple";
        d.width = d.height = slow ? runs[i].width / 2 : runs[i].width;
        d.guidance = slow ? 1.0f : 0.0f;                    /* 0: as usual */
        d.steps = runs[i].list ? 4 : 2;
        d.precision = runs[i].list ? SDQ_PRECISION_LIST : SDQ_PRECISION_EDGES;
        d.is_float = turns;
        d.k_first = d.k_last = runs[i].k;
        for (k = 0; k < 2; k++) {
            pd.on_demand = (int)k;
            hash[k] = demand_draw(path, &pd, &d, &most[k], &estimate[k]);
            SDQT_THAT(estimate[k] <= most[k] && estimate[k] > most[k] / 2,
                      "run %zu, on demand %zu: %zu bytes estimated, %zu given", i, k, estimate[k],
                      most[k]);
        }
        SDQT_THAT(hash[0] == hash[1], "run %zu: another picture on demand", i);
        SDQT_THAT(estimate[1] < estimate[0], "run %zu: %zu bytes on demand, %zu at once", i,
                  estimate[1], estimate[0]);
    }
    sdq_ctx_free(ctx);
    (void)remove(DEMAND_INT8);
}

/* What sdq_txt2img refuses, the estimate refuses with the same sentence. */
static void test_estimate_refuses(int tier) {
    sdq_pipeline_desc pd;
    sdq_txt2img_desc d;
    sdq_ctx *ctx;
    size_t bytes = 1;
    (void)tier;
    memset(&pd, 0, sizeof pd);
    memset(&d, 0, sizeof d);
    d.precision = SDQ_PRECISION_INT8;
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) exit(2);
    SDQT_CHECK(sdq_txt2img_memory(ctx, "nowhere", &pd, &d, &bytes) == SDQ_ERR_MISSING
               && bytes == 0 && strstr(sdq_error_text(ctx), "nowhere"));
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_txt2img_memory(ctx, "tests/golden/models/bk-a", &pd, &d, &bytes)
               == SDQ_ERR_MISSING && strstr(sdq_error_text(ctx), "no int8 UNet"));
    sdq_clear_error(ctx);
    sdq_ctx_free(ctx);
}

/* ---- where the time goes ---- */

/* A clock that moves on by one second whenever it is asked. */
typedef struct watch {
    size_t calls, layers, int8, strangers;
    int alone;                  /* one thread: it does some of everything */
    double seconds;             /* of all layers */
} watch;
static double watch_now(void *user) {
    watch *w = (watch *)user;
#ifdef _OPENMP
    w->strangers += omp_get_thread_num() != 0;
#endif
    return (double)++w->calls;
}
static void watch_layer(void *user, const sdq_layer_work *l) {
    watch *w = (watch *)user;
    int i;
    w->layers++;
    w->int8 += l->int8 != 0;
    for (i = 0; i < SDQ_WORK_COUNT; i++) w->seconds += l->seconds[i];
    SDQT_THAT(l->layer.name[0] && sdq__t_chan(l->x) == l->layer.in
              && (sdq__t_chan(l->y) == l->layer.out || 2 * sdq__t_chan(l->y) == l->layer.out),
              "%s: its shape", l->layer.name);
    SDQT_THAT(!w->alone || l->seconds[l->int8 ? SDQ_WORK_INT8 : SDQ_WORK_FLOAT] > 0.0,
              "%s: no product", l->layer.name);
    SDQT_THAT(l->seconds[l->int8 ? SDQ_WORK_FLOAT : SDQ_WORK_INT8] == 0.0, "%s: both products",
              l->layer.name);
}

/* An evaluation with and without a profile: the same bits; every tick is accounted for, every
 * layer reported once; kinds of work that this mode has, and no others. */
static void profiled(fixture *f, sdq_mode mode, int bits) {
    const sdq_model *m = f->part[SDQ_PART_UNET];
    sdq_profile p;
    sdq_unet_input in;
    sdq_tensor *y[2];
    watch w;
    double sum = 0.0;
    size_t calls;
    int i;
    memset(&p, 0, sizeof p);
    memset(&w, 0, sizeof w);
    p.now = watch_now;
    p.layer = watch_layer;
    p.user = &w;
    w.alone = sdq_ctx_threads(f->ctx) == 1;
    unet_input(f, "unet.", &in);
    y[0] = sdq_unet_forward(f->ctx, m, &in, mode);
    SDQT_CHECK(sdq_ctx_profile(f->ctx, &p) == SDQ_OK);
    y[1] = sdq_unet_forward(f->ctx, m, &in, mode);
    SDQT_CHECK(sdq_ctx_profile(f->ctx, NULL) == SDQ_OK);
    calls = w.calls;
    (void)sdq_unet_forward(f->ctx, m, &in, mode);
    SDQT_CHECK(w.calls == calls && w.strangers == 0);
    if (!SDQT_THAT(y[0] && y[1], "%s", sdq_error_text(f->ctx))) return;
    SDQT_BYTES(y[0]->data, y[1]->data, sdq_tensor_count(y[0]) * 4);
    for (i = 0; i < SDQ_WORK_COUNT; i++) {
        const int none = mode == SDQ_FLOAT && (i == SDQ_WORK_INT8 || i == SDQ_WORK_QUANTIZE);
        SDQT_THAT(none ? p.seconds[i] == 0.0 : p.seconds[i] > 0.0 || !w.alone, "mode %d, %d bits: %g s of %s", (int)mode, bits,
                  p.seconds[i], sdq_work_name((sdq_work)i));
        sum += p.seconds[i];
    }
    SDQT_THAT(sum == (double)(calls - 1), "%g of %zu seconds", sum, calls - 1);
    SDQT_THAT(w.seconds < sum, "%g of %g s in layers", w.seconds, sum);
    SDQT_THAT(w.layers == sdq_model_layer_count(m), "%zu layers reported", w.layers);
    SDQT_CHECK((w.int8 > 0) == (mode == SDQ_INT8) && w.int8 < w.layers);
}

static void test_profile(int tier) {
    sdq_recipe r = sdq_recipe_default();
    sdq_profile none;
    sdq_unet_input in;
    fixture f;
    int i;
    for (i = 0; i < 4; i++) {
        const int bits = i % 2 ? 8 : 32;
        if (open_fixture(&f, "sd1-a", tier, 1 + i / 2)) {
            sdq_model *m = f.part[SDQ_PART_UNET];
            profiled(&f, SDQ_FLOAT, bits);
            r.attention_bits = bits;
            unet_input(&f, "unet.", &in);
            SDQT_CHECK(sdq_recipe_apply(f.ctx, m, &r, NULL) == SDQ_OK);
            sdq_model_observe(m, 1);
            SDQT_CHECK(sdq_unet_forward(f.ctx, m, &in, SDQ_FLOAT) != NULL);
            sdq_model_observe(m, 0);
            SDQT_CHECK(sdq_model_convert(f.ctx, m) == SDQ_OK);
            profiled(&f, SDQ_INT8, bits);
            memset(&none, 0, sizeof none);
            SDQT_CHECK(sdq_ctx_profile(f.ctx, &none) == SDQ_ERR_ARGUMENT);
        }
        close_fixture(&f);
    }
    SDQT_CHECK(!strcmp(sdq_work_name(SDQ_WORK_COUNT), "?"));
}

static const sdqt_case cases[] = {
    {"golden", test_golden, 1},
    {"bits", test_bits, 1},
    {"gradients", test_gradients, 1},
    {"epsilons", test_epsilons, 0},
    {"caches", test_caches, 0},
    {"arena", test_arena, 0},
    {"round_trip", test_round_trip, 0},
    {"scaling", test_scaling, 0},
    {"init", test_init, 0},
    {"info", test_info, 0},
    {"refused_config", test_refused_config, 0},
    {"accepted_config", test_accepted_config, 0},
    {"fitting", test_fitting, 0},
    {"halves", test_halves, 0},
    {"int8_file", test_int8_file, 0},
    {"four_file", test_four_file, 0},
    {"source_hash", test_source_hash, 0},
    {"refused_file", test_refused_file, 0},
    {"refused_input", test_refused_input, 0},
    {"out_of_memory", test_out_of_memory, 0},
    {"vae_int8", test_vae_int8, 1},
    {"vae_bands", test_vae_bands, 1},
    {"vae_bands_refused", test_vae_bands_refused, 0},
    {"demand", test_demand, 0},
    {"estimate_refuses", test_estimate_refuses, 0},
    {"profile", test_profile, 0},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
