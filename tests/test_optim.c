/* test_optim.c - AdamW, clipping, schedule, averages, state files, the training loop, two processes.
 * Run from the project folder; writes and removes test_optim.*.tmp there.
 */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define STATE_A "test_optim.a.tmp"
#define STATE_B "test_optim.b.tmp"
#define BEST "test_optim.best.tmp"

/* ---- golden values: torch's AdamW and clip_grad_norm_ in float64 ---- */

/* Measured, relative to the norm of the array: weights 1.3e-7, first moments 2.4e-7. torch's
 * 1 - 0.999 comes from doubles; that of the float 0.999 is 1.29e-5 smaller, and so is v. The
 * correction by 1 - beta2^t has the same factor: it does not reach the weights. */
#define ADAM_TOL 6e-7
#define SECOND_TOL 2e-5

static double distance(const float *a, const float *b, size_t n) {
    double d = 0, s = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        d += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        s += (double)b[i] * (double)b[i];
    }
    return d == 0 ? 0 : s > 0 && d < 1e300 ? sqrt(d / s) : 1e30;
}

static const float *golden(sdq_file *f, const char *op, const char *name, const char *role,
                           size_t n) {
    char path[96];
    const sdq_entry *e;
    (void)snprintf(path, sizeof path, "%s/%s/%s", op, name, role);
    e = sdq_file_find(f, path);
    if (!SDQT_THAT(e && sdq_entry_count(e) == n, "%s", path)) exit(2);
    return (const float *)e->data;
}

static void golden_adamw(sdq_ctx *ctx, sdq_file *f, const char *name) {
    const float *p = golden(f, "adamw", name, "p", 5),
                *grads = golden(f, "adamw", name, "grads", 95);
    const float *y = golden(f, "adamw", name, "y", 95);
    const size_t dim = 19;
    sdq_optim_desc d;
    sdq_optim *o;
    sdq_tensor t;
    int step;
    memset(&d, 0, sizeof d);
    d.lr = p[0]; d.beta1 = p[1]; d.beta2 = p[2]; d.eps = p[3]; d.weight_decay = p[4];
    SDQT_CHECK(sdq__t_init(ctx, &t, 1, &dim) == SDQ_OK);
    memcpy(t.data, golden(f, "adamw", name, "x", 19), 19 * 4);
    SDQT_CHECK(sdq_optim_create(ctx, &d, &o) == SDQ_OK);
    SDQT_CHECK(sdq_optim_add(ctx, o, &t, "w", 0, 0, 1) == SDQ_OK);
    for (step = 0; step < 5; step++) {
        double e;
        memcpy(t.grad, grads + 19 * step, 19 * 4);
        SDQT_CHECK(sdq_optim_step(ctx, o) == SDQ_OK);
        e = distance(sdq_f32(&t), y + 19 * step, 19);
        SDQT_THAT(e <= ADAM_TOL, "%s step %d: %.3g", name, step, e);
        SDQT_CHECK(t.grad[0] == 0 && t.grad[18] == 0);      /* cleared */
    }
    SDQT_THAT(distance(o->leaf[0].m, golden(f, "adamw", name, "m", 19), 19) <= ADAM_TOL,
              "%s m: %.3g", name, distance(o->leaf[0].m, golden(f, "adamw", name, "m", 19), 19));
    SDQT_THAT(distance(o->leaf[0].v, golden(f, "adamw", name, "v", 19), 19) <= SECOND_TOL,
              "%s v: %.3g", name, distance(o->leaf[0].v, golden(f, "adamw", name, "v", 19), 19));
    SDQT_CHECK(sdq_optim_steps_done(o) == 5);
    sdq_optim_free(ctx, o);
    SDQT_CHECK(!t.grad && !t.needs_grad);
    sdq__t_free(ctx, &t);
}

/* After one step with beta1 = 0.5 the first moment is half of the clipped gradient. */
static void golden_clip(sdq_ctx *ctx, sdq_file *f, const char *name) {
    static const int rank[] = {2, 1, 3};
    static const size_t dim[][3] = {{7, 3, 0}, {5, 0, 0}, {2, 2, 3}}, count[] = {21, 5, 12};
    const float norm = golden(f, "clip_grad_norm", name, "norm", 1)[0];
    sdq_optim_desc d;
    sdq_optim *o;
    sdq_tensor t[3];
    size_t i, j;
    char role[16];
    memset(&d, 0, sizeof d);
    d.clip = golden(f, "clip_grad_norm", name, "p", 1)[0];
    d.beta1 = 0.5f;
    SDQT_CHECK(sdq_optim_create(ctx, &d, &o) == SDQ_OK);
    for (i = 0; i < 3; i++) {
        (void)snprintf(role, sizeof role, "x%d", (int)i);
        SDQT_CHECK(sdq__t_init(ctx, &t[i], rank[i], dim[i]) == SDQ_OK);
        SDQT_CHECK(sdq_optim_add(ctx, o, &t[i], role, 0, 0, 0) == SDQ_OK);
        memcpy(t[i].grad, golden(f, "clip_grad_norm", name, role, count[i]), count[i] * 4);
    }
    SDQT_CHECK(sdq_optim_step(ctx, o) == SDQ_OK);
    SDQT_NEAR(sdq_optim_grad_norm(o), norm, 3e-7 * (double)norm);
    for (i = 0; i < 3; i++) {
        float got[21];
        (void)snprintf(role, sizeof role, "y%d", (int)i);
        for (j = 0; j < count[i]; j++) got[j] = 2.0f * o->leaf[i].m[j];
        SDQT_THAT(distance(got, golden(f, "clip_grad_norm", name, role, count[i]), count[i])
                      <= ADAM_TOL,
                  "%s/%s: %.3g", name, role,
                  distance(got, golden(f, "clip_grad_norm", name, role, count[i]), count[i]));
    }
    sdq_optim_free(ctx, o);
    for (i = 0; i < 3; i++) sdq__t_free(ctx, &t[i]);
}

static void test_golden(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 2);
    sdq_file *f = NULL;
    SDQT_CHECK(sdq_file_open(ctx, "tests/golden/ops.safetensors", &f) == SDQ_OK);
    if (f) {
        golden_adamw(ctx, f, "default");
        golden_adamw(ctx, f, "fast");
        golden_adamw(ctx, f, "nodecay");
        golden_clip(ctx, f, "clipped");
        golden_clip(ctx, f, "kept");
    }
    sdq_file_close(ctx, f);
    sdq_ctx_free(ctx);
}

/* ---- one leaf, driven by hand ---- */

typedef struct one { sdq_tensor t; sdq_optim *o; } one;

static void one_new(sdq_ctx *ctx, one *s, const sdq_optim_desc *d, size_t n, float lr_scale,
                    float floor, int decay) {
    size_t i;
    SDQT_CHECK(sdq__t_init(ctx, &s->t, 1, &n) == SDQ_OK);
    for (i = 0; i < n; i++) sdq_f32(&s->t)[i] = 0.1f * (float)i - 0.3f;
    SDQT_CHECK(sdq_optim_create(ctx, d, &s->o) == SDQ_OK);
    SDQT_CHECK(sdq_optim_add(ctx, s->o, &s->t, "leaf", lr_scale, floor, decay) == SDQ_OK);
}
static void one_free(sdq_ctx *ctx, one *s) {
    sdq_optim_free(ctx, s->o);
    sdq__t_free(ctx, &s->t);
}
static sdq_status one_step(sdq_ctx *ctx, one *s, float gradient) {
    size_t i;
    for (i = 0; i < sdq_tensor_count(&s->t); i++) s->t.grad[i] = gradient;
    return sdq_optim_step(ctx, s->o);
}

/* The rate: a line up to lr, then constant, or half a cosine to 0 at `steps`. */
static void test_schedule(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_optim_desc d;
    one s;
    size_t t;
    int cosine;
    for (cosine = 0; cosine < 2; cosine++) {
        memset(&d, 0, sizeof d);
        d.lr = 0.5f;
        d.warmup = 4;
        d.steps = 20;
        d.schedule = cosine ? SDQ_COSINE : SDQ_CONSTANT;
        one_new(ctx, &s, &d, 3, 0, 0, 0);
        for (t = 0; t < 25; t++) {
            const double x = (double)(t < 4 ? 0 : t - 4) / 16;
            const double want = t < 4 ? 0.5 * (double)(t + 1) / 4
                              : !cosine ? 0.5 : t >= 20 ? 0 : 0.25 * (1 + cos(acos(-1.0) * x));
            SDQT_CHECK(one_step(ctx, &s, 1) == SDQ_OK);
            SDQT_NEAR(sdq_optim_rate(s.o), want, 1e-7);
        }
        one_free(ctx, &s);
    }
    memset(&d, 0, sizeof d);            /* defaults */
    one_new(ctx, &s, NULL, 3, 0, 0, 0);
    SDQT_CHECK(one_step(ctx, &s, 1) == SDQ_OK);
    SDQT_NEAR(sdq_optim_rate(s.o), 1e-4, 1e-11);
    SDQT_CHECK(s.o->desc.beta1 == 0.9f && s.o->desc.beta2 == 0.999f && s.o->desc.eps == 1e-8f);
    one_free(ctx, &s);
    sdq_ctx_free(ctx);
}

/* The first step of Adam moves a weight by the rate; lr_scale and decay are per leaf. */
static void test_leaf_settings(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_optim_desc d;
    one s;
    memset(&d, 0, sizeof d);
    d.lr = 0.01f;
    d.weight_decay = 0.5f;
    one_new(ctx, &s, &d, 7, 3, 0, 0);
    SDQT_CHECK(one_step(ctx, &s, 2) == SDQ_OK);
    SDQT_NEAR(sdq_f32(&s.t)[0], -0.3 - 0.03, 1e-6);
    one_free(ctx, &s);
    one_new(ctx, &s, &d, 7, 0, 0, 1);
    SDQT_CHECK(one_step(ctx, &s, 2) == SDQ_OK);
    SDQT_NEAR(sdq_f32(&s.t)[0], -0.3 * (1 - 0.005) - 0.01, 1e-6);
    one_free(ctx, &s);
    sdq_ctx_free(ctx);
}

/* Leaves with a floor are scales: AdamW on their logarithms u, w' = w (1 + du), in double. */
static void scale_step(double *w, double *m, double *v, double g, int t, double lr, double floor) {
    const double du = g * *w;
    *m += 0.1 * (du - *m);
    *v += 0.001 * (du * du - *v);
    *w *= 1 - lr * (*m / (1 - pow(0.9, t))) / (sqrt(*v / (1 - pow(0.999, t))) + 1e-12);
    if (*w < floor) *w = floor;
}

static void test_scales(int tier) {
    static const float size[] = {1e-6f, 3e-4f, 0.05f, 1, 17, 4e4f, 0.0011f};
    static const float slope[] = {3e-6f, -1e-3f, 2, -1e-5f, 500, -0.1f, 4e-4f};     /* of log w */
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_optim_desc d;
    one s;
    double w[7], m[7], v[7];
    float *x;
    size_t i;
    int t;
    memset(&d, 0, sizeof d);
    d.lr = 0.02f;
    d.weight_decay = 0.5f;              /* does not touch them */
    one_new(ctx, &s, &d, 7, 3, 1e-7f, 0);
    x = sdq_f32(&s.t);
    memcpy(x, size, sizeof size);
    for (i = 0; i < 7; i++) s.t.grad[i] = slope[i] / size[i];
    SDQT_CHECK(sdq_optim_step(ctx, s.o) == SDQ_OK);
    for (i = 0; i < 7; i++)             /* by 6 per cent, whatever the size of w and g */
        SDQT_NEAR(x[i] / size[i], i % 2 ? 1.06 : 0.94, 1e-6);
    SDQT_CHECK(s.t.grad[0] == 0 && s.t.grad[6] == 0);
    one_free(ctx, &s);

    one_new(ctx, &s, &d, 7, 0, 1e-3f, 0);       /* several steps, gradients that change */
    x = sdq_f32(&s.t);
    for (i = 0; i < 7; i++) {
        x[i] = size[i] > 1e-3f ? size[i] : 1e-3f;
        w[i] = (double)x[i];
        m[i] = v[i] = 0;
    }
    for (t = 1; t <= 12; t++) {
        for (i = 0; i < 7; i++) {
            const float g = (float)(i + 1) * 1e-4f * (t % 5 == 4 ? -0.5f : 1.0f);
            s.t.grad[i] = g;
            scale_step(&w[i], &m[i], &v[i], (double)g, t, 0.02, 1e-3);
        }
        SDQT_CHECK(sdq_optim_step(ctx, s.o) == SDQ_OK);
        for (i = 0; i < 7; i++) {
            SDQT_NEAR(x[i], w[i], 2e-6 * w[i]);
            SDQT_CHECK(x[i] >= 1e-3f);
        }
    }
    SDQT_CHECK(x[0] == 1e-3f && x[6] == 1e-3f && x[3] < 0.9f);      /* two are at the floor */
    one_free(ctx, &s);

    one_new(ctx, &s, &d, 7, 100, 0.25f, 0);     /* a step of more than all of it */
    x = sdq_f32(&s.t);
    for (i = 0; i < 7; i++) x[i] = 2;
    SDQT_CHECK(one_step(ctx, &s, 1) == SDQ_OK && x[0] == 0.25f && x[6] == 0.25f);
    SDQT_CHECK(one_step(ctx, &s, 0) == SDQ_OK && x[3] == 0.25f);
    one_free(ctx, &s);

    one_new(ctx, &s, &d, 7, 0, 1e-3f, 0);       /* a gradient that is no number changes nothing */
    x = sdq_f32(&s.t);
    for (i = 0; i < 7; i++) x[i] = 2;
    SDQT_CHECK(one_step(ctx, &s, (float)NAN) == SDQ_ERR_NUMERIC && x[0] == 2 && x[6] == 2);
    SDQT_CHECK(s.o->leaf[0].m[0] == 0 && s.o->leaf[0].v[0] == 0);
    one_free(ctx, &s);
    sdq_ctx_free(ctx);
}

/* average += (1 - decay)(w - average), decay = min((1+t)/(10+t), ema), t = 1, 2, .. */
static void test_ema(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_optim_desc d;
    one s;
    double want[7];
    float w[7], e[7];
    size_t t, i;
    memset(&d, 0, sizeof d);
    d.lr = 0.1f;
    d.ema = 0.5f;           /* from t = 8 on */
    one_new(ctx, &s, &d, 7, 0, 0, 0);
    for (i = 0; i < 7; i++) want[i] = (double)sdq_f32(&s.t)[i];
    for (t = 1; t < 15; t++) {
        const double ramp = (1.0 + (double)t) / (10.0 + (double)t), decay = ramp < 0.5 ? ramp : 0.5;
        SDQT_CHECK(one_step(ctx, &s, t % 3 ? 1.0f : -2.0f) == SDQ_OK);
        for (i = 0; i < 7; i++) want[i] += (1 - decay) * ((double)sdq_f32(&s.t)[i] - want[i]);
    }
    memcpy(w, s.t.data, sizeof w);
    sdq_optim_swap_ema(s.o);
    memcpy(e, s.t.data, sizeof e);
    for (i = 0; i < 7; i++) SDQT_NEAR(e[i], want[i], 1e-6);
    sdq_optim_swap_ema(s.o);
    SDQT_CHECK(memcmp(w, s.t.data, sizeof w) == 0 && memcmp(w, e, sizeof w) != 0);
    one_free(ctx, &s);
    d.ema = 0;              /* without averages a swap does nothing */
    one_new(ctx, &s, &d, 7, 0, 0, 0);
    SDQT_CHECK(one_step(ctx, &s, 1) == SDQ_OK);
    memcpy(w, s.t.data, sizeof w);
    sdq_optim_swap_ema(s.o);
    SDQT_CHECK(memcmp(w, s.t.data, sizeof w) == 0);
    one_free(ctx, &s);
    sdq_ctx_free(ctx);
}

/* A gradient that is not finite changes nothing; nor do arguments that make no sense. */
static void test_refusals(int tier) {
    static const float bad[] = {(float)INFINITY, (float)NAN, -(float)INFINITY, 1e30f};
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_optim_desc d;
    one s;
    float w[7], m[7], v[7], e[7];
    sdq_tensor other;
    const size_t n = 3;
    size_t i;
    for (i = 0; i < 5; i++) {           /* settings that are none */
        sdq_optim *o;
        memset(&d, 0, sizeof d);
        *(i == 0 ? &d.lr : i == 1 ? &d.beta1 : i == 2 ? &d.beta2 : i == 3 ? &d.clip : &d.ema) =
            i == 0 ? -1.0f : i == 1 ? 2.0f : i == 2 ? 1.0f : i == 3 ? (float)NAN : 1.5f;
        SDQT_CHECK(sdq_optim_create(ctx, &d, &o) == SDQ_ERR_ARGUMENT && !o);
        sdq_clear_error(ctx);
    }
    memset(&d, 0, sizeof d);
    d.ema = 0.9f;
    d.clip = 1;
    one_new(ctx, &s, &d, 7, 0, 0, 1);
    SDQT_CHECK(one_step(ctx, &s, 1) == SDQ_OK);
    memcpy(w, s.t.data, 28); memcpy(m, s.o->leaf[0].m, 28); memcpy(v, s.o->leaf[0].v, 28);
    memcpy(e, s.o->leaf[0].ema, 28);
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        SDQT_CHECK(one_step(ctx, &s, bad[i]) == SDQ_ERR_NUMERIC);
        SDQT_CHECK(strstr(sdq_error_text(ctx), "step 1") != NULL && sdq_optim_steps_done(s.o) == 1);
        SDQT_CHECK(one_step(ctx, &s, 1) == SDQ_ERR_NUMERIC);        /* the error stays */
        sdq_clear_error(ctx);
    }
    SDQT_CHECK(memcmp(w, s.t.data, 28) == 0 && memcmp(m, s.o->leaf[0].m, 28) == 0
               && memcmp(v, s.o->leaf[0].v, 28) == 0 && memcmp(e, s.o->leaf[0].ema, 28) == 0);
    SDQT_CHECK(sdq_optim_add(ctx, s.o, NULL, "nothing", 0, 0, 0) == SDQ_ERR_ARGUMENT);
    SDQT_CHECK(strstr(sdq_error_text(ctx), "nothing") != NULL);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_optim_add(ctx, s.o, &s.t, "again", 0, 0, 0) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq__t_init(ctx, &other, 1, &n) == SDQ_OK);
    SDQT_CHECK(sdq_optim_add(ctx, s.o, &other, "leaf", 0, 0, 0) == SDQ_ERR_ARGUMENT
               && !other.needs_grad);
    sdq_clear_error(ctx);
    SDQT_CHECK(one_step(ctx, &s, 1) == SDQ_OK);
    one_free(ctx, &s);
    sdq__t_free(ctx, &other);
    sdq_optim_free(ctx, NULL);
    sdq_ctx_free(ctx);
}

/* ---- a small training: a float layer, one with learned scales, one with moving observers ---- */

#define IN 12
#define HIDDEN 20
#define OUT 5

typedef struct job {
    sdq_layer *a, *b, *c;
    sdq_optim *o;
    size_t calls, cancel_at, nan_at, null_at;   /* calls from 1 on; 0: never */
    double loss[64];
    size_t done;
} job;

static sdq_tensor *random_tensor(sdq_ctx *ctx, sdq_rng *rng, size_t n, size_t c) {
    sdq_tensor *t = sdq_tensor_2d(ctx, n, c);
    if (t) sdq_rng_normal(rng, sdq_f32(t), n * c);
    return t;
}
static sdq_tensor *job_loss(sdq_ctx *ctx, void *user, sdq_rng *rng, size_t step) {
    job *j = (job *)user;
    sdq_tensor *x = random_tensor(ctx, rng, 6, IN), *h, *y;
    (void)step;
    if (++j->calls == j->null_at) return NULL;
    h = sdq_silu(ctx, sdq_layer_forward(ctx, j->a, x, NULL, SDQ_FLOAT));
    y = sdq_layer_forward(ctx, j->b, h, NULL, SDQ_FAKE);
    y = sdq_layer_forward(ctx, j->c, y, NULL, SDQ_FAKE);
    if (j->calls == j->nan_at) y = sdq_scale(ctx, y, (float)NAN);
    return sdq_mse(ctx, y, random_tensor(ctx, rng, 6, OUT), NULL);
}
static int job_progress(void *user, const char *stage, size_t i, size_t n, double value) {
    job *j = (job *)user;
    SDQT_CHECK(strcmp(stage, "train") == 0 && i <= n && i == sdq_optim_steps_done(j->o));
    if (i <= 64) j->loss[i - 1] = value;
    j->done = i;
    return i == j->cancel_at;
}

static sdq_status job_layer(sdq_ctx *ctx, sdq_layer **l, size_t in, size_t out, uint64_t seed) {
    static const char *const name[] = {"none", "first", "second", "third"};
    sdq_layer_desc d;
    sdq_rng rng;
    memset(&d, 0, sizeof d);
    d.name = name[seed];
    d.in = in;
    d.out = out;
    SDQ__TRY(sdq_layer_create(ctx, &d, l));
    sdq_rng_init(&rng, SDQ_RNG_TORCH, seed);
    sdq_rng_normal(&rng, sdq_f32(sdq_layer_weight(*l)), in * out);
    return SDQ_OK;
}
static sdq_status job_new(sdq_ctx *ctx, job *j) {
    sdq_optim_desc d;
    sdq_quant q;
    memset(j, 0, sizeof *j);
    memset(&d, 0, sizeof d);
    d.lr = 0.02f;
    d.weight_decay = 0.01f;
    d.clip = 1.0f;
    d.ema = 0.9f;
    d.schedule = SDQ_COSINE;
    d.warmup = 3;
    d.steps = 12;
    SDQ__TRY(job_layer(ctx, &j->a, IN, HIDDEN, 1));
    SDQ__TRY(job_layer(ctx, &j->b, HIDDEN, OUT, 2));
    q = sdq_layer_quant(j->b);
    q.weight_scale = SDQ_WEIGHT_FIXED;
    q.learn_scales = 1;
    SDQ__TRY(sdq_layer_set_quant(ctx, j->b, &q));
    SDQ__TRY(sdq__ly_weight_scales(ctx, j->b, sdq_f32(&j->b->w)));
    SDQ__TRY(job_layer(ctx, &j->c, OUT, OUT, 3));
    q.range = SDQ_RANGE_STATIC;
    q.weight_scale = SDQ_WEIGHT_MOVING;
    q.moving = 0.1f;
    q.quantize_output = 1;
    q.split = 2;
    q.learn_scales = 0;
    SDQ__TRY(sdq_layer_set_quant(ctx, j->c, &q));
    SDQ__TRY(sdq__ly_with_weights(ctx, j->c, sdq__ly_observe_weights));
    sdq_layer_observe(j->c, 1);
    SDQ__TRY(sdq_optim_create(ctx, &d, &j->o));
    SDQ__TRY(sdq_optim_add(ctx, j->o, sdq_layer_weight(j->a), "a.weight", 0, 0, 1));
    SDQ__TRY(sdq_optim_add(ctx, j->o, sdq_layer_bias(j->a), "a.bias", 0, 0, 0));
    SDQ__TRY(sdq_optim_add(ctx, j->o, sdq_layer_weight(j->b), "b.weight", 0, 0, 1));
    SDQ__TRY(sdq_optim_add(ctx, j->o, sdq_layer_bias(j->b), "b.bias", 0, 0, 0));
    SDQ__TRY(sdq_optim_add(ctx, j->o, &j->b->sw, "b.scale", 0.1f, 1e-7f, 0));
    SDQ__TRY(sdq_optim_add(ctx, j->o, sdq_layer_weight(j->c), "c.weight", 0, 0, 1));
    return sdq__opt_add_state(ctx, j->o, "c.observers", sdq__ly_state_count(j->c), sdq__ly_state,
                              j->c, 1);
}
static void job_free(sdq_ctx *ctx, job *j) {
    sdq_optim_free(ctx, j->o);
    sdq_layer_free(ctx, j->a);
    sdq_layer_free(ctx, j->b);
    sdq_layer_free(ctx, j->c);
}

static sdq_fit_desc fit_desc(job *j, size_t steps, size_t accumulate, const char *state) {
    sdq_fit_desc d;
    memset(&d, 0, sizeof d);
    d.steps = steps;
    d.accumulate = accumulate;
    d.seed = 7;
    d.state = state;
    d.progress = job_progress;
    d.user = j;
    return d;
}
/* A training in a process of its own: everything new, then up to `steps`. */
static sdq_status train(int tier, int threads, size_t steps, size_t accumulate, const char *state,
                        size_t cancel_at, double *loss) {
    sdq_ctx *ctx = sdqt_ctx(tier, threads);
    job j;
    sdq_fit_desc d;
    sdq_status st;
    SDQT_CHECK(job_new(ctx, &j) == SDQ_OK);
    j.cancel_at = cancel_at;
    d = fit_desc(&j, steps, accumulate, state);
    st = sdq_fit(ctx, j.o, &d, job_loss, &j);
    SDQT_THAT(st == SDQ_OK || st == SDQ_ERR_CANCELLED, "%s", sdq_error_text(ctx));
    SDQT_CHECK(j.done == (cancel_at ? cancel_at : steps));
    if (loss) memcpy(loss, j.loss, sizeof j.loss);
    job_free(ctx, &j);
    sdq_ctx_free(ctx);
    return st;
}

/* The bytes of a file; NULL if there is none. */
static unsigned char *file_bytes(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    unsigned char *p = (unsigned char *)calloc(1 << 20, 1);
    *n = 0;
    if (!p) exit(2);
    if (!f) { free(p); return NULL; }
    *n = fread(p, 1, 1 << 20, f);
    fclose(f);
    return p;
}
static void write_bytes(const char *path, const void *p, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(p, 1, n, f) != n || fclose(f)) {
        printf("%s cannot be written\n", path);
        exit(2);
    }
}
static int same_files(const char *a, const char *b) {
    size_t na, nb;
    unsigned char *pa = file_bytes(a, &na), *pb = file_bytes(b, &nb);
    const int same = pa && pb && na == nb && na > 1000 && memcmp(pa, pb, na) == 0;
    free(pa);
    free(pb);
    return same;
}
static void clean(void) {
    (void)remove(STATE_A);
    (void)remove(STATE_B);
    SDQT_CHECK(remove(STATE_A ".tmp") != 0
               && remove(STATE_B ".tmp") != 0); /* none is left behind */
}

/* Stopped and continued, cancelled and continued: the same file, byte for byte, as in one go; the
 * same file also on every tier and thread count. */
static void test_resume(int tier) {
    double whole[64], part[64];
    size_t accumulate;
    for (accumulate = 0; accumulate <= 3; accumulate += 3) {
        clean();
        memset(whole, 0, sizeof whole);
        memset(part, 0, sizeof part);
        SDQT_CHECK(train(SDQ_TIER_SCALAR, 1, 10, accumulate, STATE_A, 0, whole) == SDQ_OK);
        SDQT_CHECK(train(tier, 2, 4, accumulate, STATE_B, 0, NULL) == SDQ_OK);
        SDQT_CHECK(!same_files(STATE_A, STATE_B));
        SDQT_CHECK(train(tier, 3, 10, accumulate, STATE_B, 7, NULL) == SDQ_ERR_CANCELLED);
        SDQT_CHECK(train(tier, 1, 10, accumulate, STATE_B, 0, part) == SDQ_OK);
        SDQT_THAT(same_files(STATE_A, STATE_B), "accumulate %d: the resumed run differs",
                  (int)accumulate);
        SDQT_CHECK(part[6] == 0 && memcmp(whole + 7, part + 7, 3 * sizeof whole[0]) == 0);
        SDQT_CHECK(whole[9] > 0 && whole[9] < whole[0]);        /* it learns */
    }
    clean();
}

/* Save, load into something new, save: equal bytes; the last save does not depend on save_every. */
static void test_save_load(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    job j, k;
    sdq_fit_desc d;
    size_t i, n;
    unsigned char *bytes;
    clean();
    SDQT_CHECK(job_new(ctx, &j) == SDQ_OK && job_new(ctx, &k) == SDQ_OK);
    d = fit_desc(&j, 5, 2, NULL);
    SDQT_CHECK(sdq_fit(ctx, j.o, &d, job_loss, &j) == SDQ_OK);
    bytes = file_bytes(STATE_A, &n);
    SDQT_CHECK(!bytes); /* no state asked for, none written */
    SDQT_CHECK(sdq_optim_save(ctx, j.o, STATE_A) == SDQ_OK
               && sdq_optim_save(ctx, j.o, STATE_B) == SDQ_OK);
    SDQT_CHECK(same_files(STATE_A, STATE_B));
    SDQT_CHECK(sdq_optim_load(ctx, k.o, STATE_A) == SDQ_OK);
    SDQT_CHECK(sdq_optim_steps_done(k.o) == 5);
    SDQT_CHECK(k.c->part[1].seen && k.c->part[0].z == j.c->part[0].z
               && k.c->part[1].z == j.c->part[1].z
               && sdq_f32(&k.c->part[1].s)[0] == sdq_f32(&j.c->part[1].s)[0]
               && sdq_layer_convert(ctx, k.c) == SDQ_OK);
    job_free(ctx, &k);
    SDQT_CHECK(job_new(ctx, &k) == SDQ_OK && sdq_optim_load(ctx, k.o, STATE_A) == SDQ_OK);
    for (i = 0; i < j.o->count; i++)
        SDQT_CHECK(
            memcmp(j.o->leaf[i].t->data, k.o->leaf[i].t->data, sdq_tensor_count(j.o->leaf[i].t) * 4)
            == 0);
    SDQT_CHECK(sdq_optim_save(ctx, k.o, STATE_B) == SDQ_OK && same_files(STATE_A, STATE_B));
    sdq_optim_swap_ema(k.o);
    sdq_optim_swap_ema(k.o);
    SDQT_CHECK(sdq_optim_save(ctx, k.o, STATE_B) == SDQ_OK && same_files(STATE_A, STATE_B));
    d = fit_desc(&k, 5, 2, STATE_B); /* all steps are done: nothing to do */
    SDQT_CHECK(sdq_fit(ctx, k.o, &d, job_loss, &k) == SDQ_OK && k.calls == 0);
    SDQT_CHECK(same_files(STATE_A, STATE_B));
    d.steps = 9;
    d.save_every = 2;
    k.cancel_at = 7;
    SDQT_CHECK(sdq_fit(ctx, k.o, &d, job_loss, &k) == SDQ_ERR_CANCELLED && k.done == 7);
    SDQT_CHECK(strstr(sdq_error_text(ctx), "after step 7") != NULL);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_optim_load(ctx, j.o, STATE_B) == SDQ_OK && sdq_optim_steps_done(j.o) == 7);
    SDQT_CHECK(sdq_optim_save(ctx, j.o, "no/such/folder/state") == SDQ_ERR_IO);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_optim_load(ctx, j.o, "test_optim.none.tmp") == SDQ_ERR_IO);
    sdq_clear_error(ctx);
    for (i = 0; i < 2; i++) {           /* a state that no training leaves behind */
        float *x = i ? k.o->leaf[0].m : k.o->leaf[1].v;
        const float was = x[0];
        x[0] = i ? (float)NAN : -1.0f;
        SDQT_CHECK(sdq_optim_save(ctx, k.o, STATE_B) == SDQ_OK);
        x[0] = was;
        SDQT_CHECK(sdq_optim_load(ctx, k.o, STATE_B) == SDQ_ERR_FORMAT
                   && strstr(sdq_error_text(ctx), "is damaged"));
        sdq_clear_error(ctx);
    }
    job_free(ctx, &j);
    job_free(ctx, &k);
    sdq_ctx_free(ctx);
    clean();
}

/* Two halves of a batch give the gradient of the whole batch. */
static sdq_tensor *half_loss(sdq_ctx *ctx, void *user, sdq_rng *rng, size_t step) {
    job *j = (job *)user;
    sdq_tensor *x;
    sdq_rng fixed;
    const size_t first = j->null_at == 2 ? 3 * (j->calls++ % 2) : 0, n = j->null_at == 2 ? 3 : 6;
    size_t i;
    (void)rng; (void)step;
    sdq_rng_init(&fixed, SDQ_RNG_TORCH, 99);
    x = random_tensor(ctx, &fixed, 6, IN);
    if (!x) return NULL;
    for (i = 0; i < n * IN; i++) sdq_f32(x)[i] = sdq_f32(x)[first * IN + i];
    x->dim[0] = n;
    x = sdq_layer_forward(ctx, j->a, x, NULL, SDQ_FLOAT);
    return x ? sdq_mse(ctx, x, sdq_tensor_2d(ctx, n, HIDDEN), NULL) : NULL;
}
static void test_accumulate(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    job whole, halves;
    sdq_fit_desc d;
    SDQT_CHECK(job_new(ctx, &whole) == SDQ_OK && job_new(ctx, &halves) == SDQ_OK);
    halves.null_at = 2;     /* here: that the batch comes in two halves */
    d = fit_desc(&whole, 1, 1, NULL);
    SDQT_CHECK(sdq_fit(ctx, whole.o, &d, half_loss, &whole) == SDQ_OK);
    d = fit_desc(&halves, 1, 2, NULL);
    SDQT_CHECK(sdq_fit(ctx, halves.o, &d, half_loss, &halves) == SDQ_OK);
    SDQT_NEAR(halves.loss[0], whole.loss[0], 1e-6 * whole.loss[0]);
    SDQT_NEAR(sdq_optim_grad_norm(halves.o), sdq_optim_grad_norm(whole.o),
              1e-6 * sdq_optim_grad_norm(whole.o));
    /* measured: 6e-8 */
    SDQT_CHECK(distance(halves.o->leaf[0].m, whole.o->leaf[0].m, IN * HIDDEN) <= 5e-7);
    job_free(ctx, &whole);
    job_free(ctx, &halves);
    sdq_ctx_free(ctx);
}

/* Every micro-batch of a run sees other random numbers, and the same ones when run again. */
typedef struct seen { uint64_t value[256]; size_t count; sdq_tensor leaf; } seen;
static sdq_tensor *seen_loss(sdq_ctx *ctx, void *user, sdq_rng *rng, size_t step) {
    seen *s = (seen *)user;
    (void)step;
    s->value[s->count++] = sdq_rng_below(rng, UINT64_C(1) << 40);
    return sdq_scale(ctx, &s->leaf, 1.0f);
}
static void test_random(int tier) {
    static seen s;
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_optim *o;
    sdq_fit_desc d;
    const size_t one_dim = 1;
    size_t i, j, equal = 0;
    memset(&s, 0, sizeof s);
    memset(&d, 0, sizeof d);
    SDQT_CHECK(sdq__t_init(ctx, &s.leaf, 1, &one_dim) == SDQ_OK);
    SDQT_CHECK(sdq_optim_create(ctx, NULL, &o) == SDQ_OK
               && sdq_optim_add(ctx, o, &s.leaf, "x", 0, 0, 0) == SDQ_OK);
    d.steps = 50;
    d.accumulate = 4;
    SDQT_CHECK(sdq_fit(ctx, o, &d, seen_loss, &s) == SDQ_OK && s.count == 200);
    for (i = 0; i < s.count; i++)
        for (j = 0; j < i; j++) equal += s.value[i] == s.value[j];
    SDQT_CHECK(equal == 0);
    sdq_optim_free(ctx, o);
    SDQT_CHECK(sdq_optim_create(ctx, NULL, &o) == SDQ_OK
               && sdq_optim_add(ctx, o, &s.leaf, "x", 0, 0, 0) == SDQ_OK);
    d.steps = 1;
    SDQT_CHECK(sdq_fit(ctx, o, &d, seen_loss, &s) == SDQ_OK
               && memcmp(s.value, s.value + 200, 32) == 0);
    d.steps = 2;
    d.seed = 1;
    SDQT_CHECK(sdq_fit(ctx, o, &d, seen_loss, &s) == SDQ_OK && s.value[204] != s.value[4]);
    sdq_optim_free(ctx, o);
    sdq__t_free(ctx, &s.leaf);
    sdq_ctx_free(ctx);
}

/* A loss that is not finite, missing or in error stops the run; file and weights stay good. */
static void test_bad_loss(int tier) {
    static const sdq_status want[] = {SDQ_ERR_NUMERIC, SDQ_ERR_ARGUMENT};
    int kind;
    for (kind = 0; kind < 2; kind++) {
        sdq_ctx *ctx = sdqt_ctx(tier, 1);
        job j;
        sdq_fit_desc d;
        float w[IN * HIDDEN];
        clean();
        SDQT_CHECK(train(tier, 1, 3, 2, STATE_A, 0, NULL) == SDQ_OK
                   && train(tier, 1, 3, 2, STATE_B, 0, NULL) == SDQ_OK);
        SDQT_CHECK(job_new(ctx, &j) == SDQ_OK);
        if (kind) j.null_at = 2;        /* the second micro-batch of step 3 */
        else j.nan_at = 2;
        d = fit_desc(&j, 10, 2, STATE_A);
        SDQT_CHECK(sdq_fit(ctx, j.o, &d, job_loss, &j) == want[kind]
                   && j.calls == (kind ? 2u : 3u));     /* once more to see where it came from */
        SDQT_THAT(strstr(sdq_error_text(ctx), kind ? "gave no loss" : "step 3") != NULL, "%s",
                  sdq_error_text(ctx));
        SDQT_CHECK(same_files(STATE_A, STATE_B) && sdq_optim_steps_done(j.o) == 3);
        memcpy(w, sdq_layer_weight(j.a)->data, sizeof w);
        sdq_clear_error(ctx);
        SDQT_CHECK(sdq_optim_load(ctx, j.o, STATE_A) == SDQ_OK);
        SDQT_CHECK(memcmp(w, sdq_layer_weight(j.a)->data, sizeof w) == 0);
        d = fit_desc(&j, 5, 2, STATE_A); /* and it can go on: the bad gradient is forgotten */
        SDQT_CHECK(sdq_fit(ctx, j.o, &d, job_loss, &j) == SDQ_OK);
        SDQT_CHECK(train(tier, 1, 5, 2, STATE_B, 0, NULL) == SDQ_OK
                   && same_files(STATE_A, STATE_B));
        job_free(ctx, &j);
        sdq_ctx_free(ctx);
    }
    clean();
}

/* ---- long runs: validation, the best, causes, full disks ---- */

typedef struct long_run {
    job j;
    sdq_fit_info info[64];
    size_t infos, save_at;
    sdq_tensor *(*loss)(sdq_ctx *, void *, sdq_rng *, size_t);
} long_run;

static int keep_info(void *user, const sdq_fit_info *info) {
    long_run *r = (long_run *)user;
    SDQT_CHECK(r->infos < 64);
    r->info[r->infos++] = *info;
    return info->step == r->save_at ? SDQ_FIT_SAVE : SDQ_FIT_GO;
}
/* The loss of a job in two parts. */
static sdq_tensor *parts_loss(sdq_ctx *ctx, void *user, sdq_rng *rng, size_t step) {
    sdq_tensor *y = job_loss(ctx, user, rng, step);
    sdq_fit_note(ctx, "a quarter", y ? 0.25 * (double)sdq_f32(y)[0] : 0.0);
    sdq_fit_note(ctx, "the rest", y ? 0.75 * (double)sdq_f32(y)[0] : 0.0);
    return y;
}
static sdq_fit_desc long_desc(long_run *r, size_t steps, const char *state) {
    sdq_fit_desc d = fit_desc(&r->j, steps, 2, state);
    d.progress = NULL;
    d.after = keep_info;
    d.user = r;
    d.validate = job_loss;
    d.validate_user = &r->j;
    d.validate_every = 3;
    d.best = BEST;
    return d;
}

/* A job whose observers have seen something: validation does not move them. */
static sdq_status long_job(sdq_ctx *ctx, job *j) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_rng rng;
    SDQ__TRY(job_new(ctx, j));
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 5);
    (void)job_loss(ctx, j, &rng, 0);
    sdq_arena_release(ctx, mark);
    j->calls = 0;
    return sdq_last_error(ctx);
}

/* Held-out loss before the first step, every third and after the last; the best is kept, and a run
 * that was stopped in between knows it. */
static void test_validation(int tier) {
    static long_run a, b, c;
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_fit_desc d;
    size_t i;
    double low = 1e300;
    clean();
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    memset(&c, 0, sizeof c);
    SDQT_CHECK(long_job(ctx, &a.j) == SDQ_OK && long_job(ctx, &b.j) == SDQ_OK
               && long_job(ctx, &c.j) == SDQ_OK);
    d = long_desc(&a, 10, STATE_A);
    SDQT_CHECK(sdq_fit(ctx, a.j.o, &d, parts_loss, &a.j) == SDQ_OK && a.infos == 11);
    for (i = 0; i < a.infos; i++) {
        const sdq_fit_info *info = &a.info[i];
        SDQT_CHECK(info->step == i && info->steps == 10);
        SDQT_CHECK(info->validated == (i % 3 == 0 || i == 10));
        if (info->validated && info->validation < low) low = info->validation;
        SDQT_CHECK(info->best == low && info->best_step <= i);
        if (i == 0) continue;
        SDQT_CHECK(info->parts == 2 && strcmp(info->part[0], "a quarter") == 0
                   && strcmp(info->part[1], "the rest") == 0);
        SDQT_NEAR(info->part_loss[0], 0.25 * info->loss, 1e-6 * info->loss);
        SDQT_NEAR(info->part_loss[1], 0.75 * info->loss, 1e-6 * info->loss);
        SDQT_CHECK(info->grad_norm > 0.0 && info->rate > 0.0);
    }
    SDQT_CHECK(a.info[10].validation < a.info[0].validation);      /* it learns */
    /* stopped in the middle and gone on with: the same bytes, the same best */
    SDQT_CHECK(remove(BEST) == 0);
    d = long_desc(&b, 4, STATE_B);
    SDQT_CHECK(sdq_fit(ctx, b.j.o, &d, parts_loss, &b.j) == SDQ_OK);
    d = long_desc(&c, 10, STATE_B);
    SDQT_CHECK(sdq_fit(ctx, c.j.o, &d, parts_loss, &c.j) == SDQ_OK && c.infos == 6);
    for (i = 0; i < 6; i++) {       /* the shorter run also validated after its last step */
        SDQT_CHECK(c.info[i].loss == a.info[i + 5].loss);
        SDQT_CHECK(!c.info[i].validated || c.info[i].validation == a.info[i + 5].validation);
    }
    /* the best weights are what was validated: they give the same loss */
    SDQT_CHECK(sdq_optim_load_weights(ctx, b.j.o, BEST) == SDQ_OK);
    sdq_optim_swap_ema(b.j.o);
    SDQT_CHECK(sdq_optim_load_weights(ctx, b.j.o, BEST) == SDQ_OK);
    b.infos = 0;
    b.j.o->step = 0;
    d = long_desc(&b, 0, NULL);
    d.best = NULL;
    SDQT_CHECK(sdq_fit(ctx, b.j.o, &d, parts_loss, &b.j) == SDQ_OK && b.infos == 1);
    SDQT_NEAR(b.info[0].validation, c.info[5].best, 1e-12);
    SDQT_CHECK(remove(BEST) == 0);
    SDQT_CHECK(sdq_optim_load_weights(ctx, b.j.o, STATE_A) == SDQ_ERR_SHAPE);
    sdq_clear_error(ctx);
    /* saving when the caller asks */
    (void)remove(STATE_B);
    d = long_desc(&a, 12, STATE_B);
    d.best = NULL;
    a.infos = 0;
    a.save_at = 11;
    d.validate_every = 0;
    a.j.nan_at = a.j.calls + 3;             /* step 10 is good and saved, step 11 is not */
    SDQT_CHECK(sdq_fit(ctx, a.j.o, &d, parts_loss, &a.j) == SDQ_ERR_NUMERIC);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_optim_load(ctx, a.j.o, STATE_B) == SDQ_OK && sdq_optim_steps_done(a.j.o) == 11);
    job_free(ctx, &a.j);
    job_free(ctx, &b.j);
    job_free(ctx, &c.j);
    sdq_ctx_free(ctx);
    clean();
}

/* The sentence of a run that breaks names what broke. */
static void test_causes(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    int kind;
    for (kind = 0; kind < 4; kind++) {
        static const char *const want[] = {
            "step 3 is not finite (the first layer with such an output is second)",
            "step 3 is not finite (no layer's output is",
            "gradient of step 3 is not finite in 1 of 7 tensors, first b.bias",
            "the loss of step 11 is"};
        job j;
        sdq_fit_desc d;
        size_t i;
        SDQT_CHECK(job_new(ctx, &j) == SDQ_OK);
        d = fit_desc(&j, kind == 3 ? 11 : 3, 2, NULL);
        SDQT_CHECK(sdq_fit(ctx, j.o, &d, job_loss, &j) == SDQ_OK);
        d.steps = 20;
        if (kind == 0) sdq_f32(sdq_layer_bias(j.b))[1] = INFINITY;
        if (kind == 1) j.nan_at = j.calls + 1;
        if (kind == 3) {
            d.explode = 30.0;
            for (i = 0; i < IN * HIDDEN; i++) sdq_f32(sdq_layer_weight(j.a))[i] *= 300.0f;
            for (i = 0; i < OUT * OUT; i++) sdq_f32(sdq_layer_weight(j.c))[i] *= 300.0f;
        }
        if (kind == 2) {
            sdq_layer_bias(j.b)->grad[0] = INFINITY;
            SDQT_CHECK(sdq_optim_step(ctx, j.o) == SDQ_ERR_NUMERIC);
        } else {
            SDQT_CHECK(sdq_fit(ctx, j.o, &d, job_loss, &j) == SDQ_ERR_NUMERIC);
        }
        SDQT_THAT(strstr(sdq_error_text(ctx), want[kind]) != NULL, "%s", sdq_error_text(ctx));
        if (kind == 3)
            SDQT_THAT(strstr(sdq_error_text(ctx), " is that of ") != NULL, "%s",
                      sdq_error_text(ctx));
        sdq_clear_error(ctx);
        job_free(ctx, &j);
    }
    sdq_ctx_free(ctx);
}

/* A disk that is full in the middle of a state: the run stops, the state of before is whole. */
static void test_disk_full(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    struct rlimit before, small;
    job j;
    sdq_fit_desc d;
    size_t n;
    clean();
    SDQT_CHECK(train(tier, 1, 3, 1, STATE_A, 0, NULL) == SDQ_OK
               && train(tier, 1, 3, 1, STATE_B, 0, NULL) == SDQ_OK);
    free(file_bytes(STATE_A, &n));
    SDQT_CHECK(job_new(ctx, &j) == SDQ_OK);
    SDQT_CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    (void)signal(SIGXFSZ, SIG_IGN);
    small = before;
    small.rlim_cur = (rlim_t)(n / 2);
    d = fit_desc(&j, 6, 1, STATE_B);
    d.save_every = 1;
    (void)fflush(stdout);
    SDQT_CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    SDQT_CHECK(sdq_fit(ctx, j.o, &d, job_loss, &j) == SDQ_ERR_IO && j.done == 4);
    SDQT_CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    SDQT_THAT(strstr(sdq_error_text(ctx), "disk full") != NULL
              && strstr(sdq_error_text(ctx), "earlier step is still there") != NULL, "%s",
              sdq_error_text(ctx));
    SDQT_CHECK(same_files(STATE_A, STATE_B));
    job_free(ctx, &j);
    sdq_ctx_free(ctx);
    SDQT_CHECK(train(tier, 1, 6, 1, STATE_A, 0, NULL) == SDQ_OK    /* and the run goes on from it */
               && train(tier, 1, 6, 1, STATE_B, 0, NULL) == SDQ_OK && same_files(STATE_A, STATE_B));
    clean();
}

/* ---- two processes, joined by a socket ---- */

static int move_bytes(int fd, char *p, size_t n, int out) {
    while (n > 0) {
        const ssize_t done = out ? write(fd, p, n) : read(fd, p, n);
        if (done <= 0) return -1;
        p += done;
        n -= (size_t)done;
    }
    return 0;
}
typedef struct wire { int fd; size_t rank, calls, spans; } wire;
static int wire_reduce(void *user, sdq_reduce how, const sdq_span *span, size_t n) {
    static float other[4096];
    wire *l = (wire *)user;
    size_t i, j;
    l->calls++;
    l->spans += n;
    for (i = 0; i < n; i++) {
        float *v = span[i].values;
        const size_t bytes = span[i].count * sizeof(float);
        int bad;
        if (bytes > sizeof other) return 1;
        bad = l->rank ? move_bytes(l->fd, (char *)other, bytes, 0) : 0;
        bad |= move_bytes(l->fd, (char *)v, bytes, 1);
        if (!l->rank) bad |= move_bytes(l->fd, (char *)other, bytes, 0);
        if (bad) return 1;
        for (j = 0; j < span[i].count; j++)
            v[j] = how == SDQ_REDUCE_SUM ? v[j] + other[j]
                 : (how == SDQ_REDUCE_MIN) == (other[j] < v[j]) ? other[j] : v[j];
    }
    return 0;
}
/* Moving observers off: a range that follows every micro-batch is another one with two processes. */
static sdq_status pair_job(sdq_ctx *ctx, job *j) {
    SDQ__TRY(job_new(ctx, j));
    sdq_layer_observe(j->c, 0);
    j->c->part[0].seen = j->c->part[1].seen = j->c->out_seen = 1;
    j->c->part[0].mn = j->c->part[1].mn = j->c->out_mn = -30.0f;
    j->c->part[0].mx = j->c->part[1].mx = j->c->out_mx = 30.0f;
    sdq_f32(&j->c->part[0].s)[0] = sdq_f32(&j->c->part[1].s)[0] = 60.0f / 255.0f;
    j->c->part[0].z = j->c->part[1].z = 128;
    return SDQ_OK;
}
/* One of two; its exit code is 0 when all went well. */
static int pair_run(int tier, int fd, size_t rank, const char *state, size_t steps,
                    double *validation) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    static long_run r;
    wire l;
    sdq_group g;
    sdq_fit_desc d;
    sdq_status st;
    memset(&r, 0, sizeof r);
    memset(&l, 0, sizeof l);
    l.fd = fd; l.rank = rank;
    g.rank = rank; g.ranks = 2; g.reduce = wire_reduce; g.user = &l;
    st = pair_job(ctx, &r.j);
    d = long_desc(&r, steps, state);
    d.accumulate = 1;
    d.best = NULL;
    d.validate_every = 100;
    d.group = &g;
    if (st == SDQ_OK && rank == 1 && steps == 99)
        sdq_f32(sdq_layer_weight(r.j.a))[0] += 1.0f;            /* another network */
    if (st == SDQ_OK) st = sdq_fit(ctx, r.j.o, &d, parts_loss, &r.j);
    if (st != SDQ_OK && steps != 99) printf("rank %zu: %s\n", rank, sdq_error_text(ctx));
    if (steps == 99)
        st = st == SDQ_ERR_ARGUMENT && strstr(sdq_error_text(ctx), "different weights")
           ? SDQ_OK : SDQ_ERR_IO;
    else if (st == SDQ_OK && (r.infos != steps + 1 || r.info[steps].parts != 2 || l.spans < 7))
        st = SDQ_ERR_SHAPE;
    *validation = r.infos ? r.info[r.infos - 1].validation : 0.0;
    job_free(ctx, &r.j);
    sdq_ctx_free(ctx);
    return st != SDQ_OK;
}
static int pair(int tier, const char *state, size_t steps, double *validation) {
    int fd[2], code = 1, here;
    pid_t child;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd) != 0) return 1;
    (void)fflush(stdout);
    child = fork();
    if (child == 0) _exit(pair_run(tier, fd[1], 1, state, steps, validation));
    here = pair_run(tier, fd[0], 0, state, steps, validation);
    if (child < 0 || waitpid(child, &code, 0) != child) return 1;
    close(fd[0]);
    close(fd[1]);
    return here | code;
}
/* Two processes with one micro-batch each are one process with two: every byte of the state, which
 * has weights, moments and the running mean of the loss, and the validation loss. */
static void test_two_processes(int tier) {
    static long_run alone;
    double validation = 0.0;
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_fit_desc d;
    size_t i;
    clean();
    for (i = 1; i <= 12; i += 11) {
        memset(&alone, 0, sizeof alone);
        SDQT_CHECK(pair_job(ctx, &alone.j) == SDQ_OK);
        d = long_desc(&alone, i, STATE_B);
        d.best = NULL;
        d.validate_every = 100;
        SDQT_CHECK(sdq_fit(ctx, alone.j.o, &d, parts_loss, &alone.j) == SDQ_OK);
        SDQT_CHECK(pair(tier, STATE_A, i, &validation) == 0);
        SDQT_THAT(validation > 0 && validation == alone.info[i].validation, "%.17g and %.17g",
                  validation, alone.info[i].validation);
        SDQT_THAT(same_files(STATE_A, STATE_B), "%zu steps: the states differ", i);
        job_free(ctx, &alone.j);
        (void)remove(STATE_A);
        (void)remove(STATE_B);
    }
    SDQT_CHECK(pair(tier, NULL, 99, &validation) == 0);      /* networks that differ are refused */
    sdq_ctx_free(ctx);
    clean();
}

/* ---- damaged state files ---- */

/* Everything of the job that a state file can change. */
static void snapshot(const job *j, float *out) {
    size_t i;
    for (i = 0; i < j->o->count; i++) {
        const sdq__leaf *l = &j->o->leaf[i];
        const size_t n = sdq_tensor_count(l->t);
        if (l->state) l->state(l->user, sdq_f32(l->t), 0);
        memcpy(out, l->t->data, n * 4);
        if (l->state) { out += n; continue; }
        memcpy(out + n, l->m, n * 4);
        memcpy(out + 2 * n, l->v, n * 4);
        memcpy(out + 3 * n, l->ema, n * 4);
        out += 4 * n;
    }
}
#define SNAPSHOT (4 * (IN * HIDDEN + HIDDEN + HIDDEN * OUT + 2 * OUT + OUT * OUT) + 9 + 2 * OUT)

static void refused(sdq_ctx *ctx, job *j, const char *what) {
    static float before[SNAPSHOT], after[SNAPSHOT];
    const size_t step = sdq_optim_steps_done(j->o);
    size_t n, m;
    unsigned char *a = file_bytes(STATE_B, &n), *b;
    sdq_fit_desc d = fit_desc(j, 99, 1, STATE_B);
    sdq_status st;
    snapshot(j, before);
    st = sdq_optim_load(ctx, j->o, STATE_B);
    SDQT_THAT(st != SDQ_OK && strstr(sdq_error_text(ctx), STATE_B), "%s: status %d, '%s'", what,
              (int)st, sdq_error_text(ctx));
    sdq_clear_error(ctx);
    SDQT_THAT(sdq_fit(ctx, j->o, &d, job_loss, j) == st, "%s: fit", what);
    sdq_clear_error(ctx);
    snapshot(j, after);
    SDQT_THAT(memcmp(before, after, sizeof before) == 0 && sdq_optim_steps_done(j->o) == step,
              "%s: changed", what);
    b = file_bytes(STATE_B, &m);
    SDQT_THAT(a && b && n == m && memcmp(a, b, n) == 0, "%s: the file changed", what);
    free(a);
    free(b);
}

/* The state file with some arrays changed by `edit`, and another step text. */
static void refused_edit(sdq_ctx *ctx, job *j, const char *what,
                         void (*edit)(sdq_entry *e, size_t *n), const char *step) {
    sdq_file *f;
    sdq_entry e[64];
    sdq_pair meta;
    size_t i, n;
    SDQT_CHECK(sdq_file_open(ctx, STATE_A, &f) == SDQ_OK);
    n = sdq_file_count(f);
    for (i = 0; i < n; i++) e[i] = *sdq_file_entry(f, i);
    if (edit) edit(e, &n);
    meta.key = "step";
    meta.value = step;
    SDQT_CHECK(sdq_file_write(ctx, STATE_B, e, n, &meta, step ? 1 : 0) == SDQ_OK);
    sdq_file_close(ctx, f);
    refused(ctx, j, what);
}
static void edit_drop(sdq_entry *e, size_t *n) { (void)e; (*n)--; }
static void edit_name(sdq_entry *e, size_t *n) { e[*n / 2].name = "m/another"; }
static void edit_shape(sdq_entry *e, size_t *n) { /* the transposed weight has as many bytes */
    size_t i;
    for (i = 0; i < *n; i++)
        if (strcmp(e[i].name, "m/a.weight") == 0) { e[i].dim[0] = IN; e[i].dim[3] = HIDDEN; }
}
static void edit_kind(sdq_entry *e, size_t *n) { (void)n; e[3].dtype = SDQ_I32; }
static void edit_more(sdq_entry *e, size_t *n) {
    e[*n] = e[0];
    e[*n].name = "weight/more";
    (*n)++;
}

static void test_damaged(int tier) {
    static const char *const steps[] = {
        "", "x", "-1", "3 ", "0x3", "1e2", "99999999999999999999999"};
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    size_t n, i;
    unsigned char *good, *bad;
    sdq_fit_desc d;
    job j;
    clean();
    SDQT_CHECK(train(tier, 1, 3, 1, STATE_A, 0, NULL) == SDQ_OK);
    SDQT_CHECK(job_new(ctx, &j) == SDQ_OK);
    d = fit_desc(&j, 2, 1, NULL);       /* elsewhere than the file: loading a part would be seen */
    SDQT_CHECK(sdq_fit(ctx, j.o, &d, job_loss, &j) == SDQ_OK);
    good = file_bytes(STATE_A, &n);
    bad = (unsigned char *)malloc(n + 8);
    if (!good || !bad) exit(2);
    for (i = 0; i < n; i += i < 12 || i + 12 > n ? 1 : n / 9) {     /* cut off */
        write_bytes(STATE_B, good, i);
        refused(ctx, &j, "cut");
    }
    memcpy(bad, good, n);
    bad[n] = 0;
    write_bytes(STATE_B, bad, n + 1);
    refused(ctx, &j, "a byte more");
    for (i = 0; i < 8; i++) {                                       /* the length of the header */
        memcpy(bad, good, n);
        bad[i] ^= 0x41;
        write_bytes(STATE_B, bad, n);
        refused(ctx, &j, "header length");
    }
    for (i = 8; i < 200; i += 3) {              /* any byte of the header becomes something else */
        memcpy(bad, good, n);
        bad[i] = 1;
        write_bytes(STATE_B, bad, n);
        refused(ctx, &j, "header byte");
    }
    for (i = 0; i < sizeof steps / sizeof steps[0]; i++)
        refused_edit(ctx, &j, "step text", NULL, steps[i]);
    refused_edit(ctx, &j, "no step", NULL, NULL);
    refused_edit(ctx, &j, "an array less", edit_drop, "3");
    refused_edit(ctx, &j, "an array more", edit_more, "3");
    refused_edit(ctx, &j, "another name", edit_name, "3");
    refused_edit(ctx, &j, "another shape", edit_shape, "3");
    refused_edit(ctx, &j, "integers", edit_kind, "3");
    SDQT_CHECK(sdq_optim_load(ctx, j.o, STATE_A) == SDQ_OK && sdq_optim_steps_done(j.o) == 3);
    free(good);
    free(bad);
    job_free(ctx, &j);
    sdq_ctx_free(ctx);
    clean();
}

/* ---- no memory: every allocation of a training fails once, and all after it ---- */

static int train_with(int tier, sdqt_heap *h) {
    sdq_ctx *ctx;
    job j;
    sdq_fit_desc d;
    sdq_status st;
    memset(&j, 0, sizeof j);
    st = sdqt_ctx_of(h, tier, 1, &ctx);
    if (st == SDQ_OK) {
        st = job_new(ctx, &j);
        d = fit_desc(&j, 2, 2, STATE_B);
        if (st == SDQ_OK) st = sdq_fit(ctx, j.o, &d, job_loss, &j);
        if (st == SDQ_OK) st = sdq_optim_load(ctx, j.o, STATE_B);
        SDQT_CHECK(st == sdq_last_error(ctx));
        h->fail_at = SIZE_MAX;              /* memory is back: what was made still works */
        sdq_clear_error(ctx);
        if (j.o && j.o->count == 7) {
            sdq_optim_zero(j.o);
            SDQT_CHECK(sdq_optim_step(ctx, j.o) == SDQ_OK);
        }
        job_free(ctx, &j);
        sdq_ctx_free(ctx);
    }
    SDQT_THAT(st == SDQ_OK || st == SDQ_ERR_OOM, "status %d", (int)st);
    SDQT_THAT(h->live == 0, "%zu blocks leaked", h->live);
    return st == SDQ_OK;
}

static void test_no_memory(int tier) {
    sdqt_heap h;
    size_t k;
    int ok = 0, again;
    for (k = 0; !ok && k < 500; k++) {
        clean();
        memset(&h, 0, sizeof h);
        h.fail_at = k;
        h.fails = 1;
        ok = train_with(tier, &h);
        clean();
        memset(&h, 0, sizeof h);
        h.fail_at = k;
        h.fails = SIZE_MAX / 2;
        again = train_with(tier, &h);
        SDQT_CHECK(again == ok);
    }
    SDQT_THAT(ok && k > 40, "%zu allocations", k);
    clean();
}

/* ---- moments in bytes ---- */

#define BIG 5000        /* above SDQ__OPT_SMALL, not a multiple of a block */

/* f = sum c (w - target)^2 / 2 with very different c and noise: `steps` steps from 0. */
static void descend(sdq_ctx *ctx, sdq_optim *o, sdq_tensor *t, uint64_t seed, size_t steps) {
    size_t i;
    while (o->step < steps) {
        sdqt.rng = seed * 1000 + o->step;
        for (i = 0; i < BIG; i++) {
            const float c = powf(10.0f, -3.0f * (float)(i % 101) / 100.0f);
            const float target = sinf((float)i);
            t->grad[i] = c * (sdq_f32(t)[i] - target + 0.3f * sdqt_normal());
        }
        if (!SDQT_THAT(sdq_optim_step(ctx, o) == SDQ_OK, "%s", sdq_error_text(ctx))) return;
    }
}
static double far_from_target(const sdq_tensor *t) {
    double sum = 0;
    size_t i;
    for (i = 0; i < BIG; i++) {
        const double d = (double)sdq_f32(t)[i] - sin((double)i);
        sum += d * d;
    }
    return sqrt(sum / BIG);
}
typedef struct descent { sdq_ctx *ctx; sdq_optim *o; sdq_tensor t, small; } descent;

/* In place: the optimizer keeps the tensors' addresses. */
static void descent_new(descent *r, int tier, int threads, int bytes) {
    const size_t big = BIG, small = 10;
    sdq_optim_desc d;
    memset(&d, 0, sizeof d);
    d.lr = 1e-2f;
    d.ema = 0.9f;
    d.clip = 100.0f;
    d.moments8 = bytes;
    r->ctx = sdqt_ctx(tier, threads);
    SDQT_CHECK(sdq__t_init(r->ctx, &r->t, 1, &big) == SDQ_OK
               && sdq__t_init(r->ctx, &r->small, 1, &small) == SDQ_OK
               && sdq_optim_create(r->ctx, &d, &r->o) == SDQ_OK
               && sdq_optim_add(r->ctx, r->o, &r->t, "w", 0, 0, 1) == SDQ_OK
               && sdq_optim_add(r->ctx, r->o, &r->small, "small", 0, 0, 1) == SDQ_OK);
    SDQT_CHECK((r->o->leaf[0].m == NULL) == bytes && (r->o->leaf[0].m8 == NULL) == !bytes);
    SDQT_CHECK(r->o->leaf[1].m != NULL);
}
static void descent_free(descent *r) {
    sdq_optim_free(r->ctx, r->o);
    sdq__t_free(r->ctx, &r->t);
    sdq__t_free(r->ctx, &r->small);
    sdq_ctx_free(r->ctx);
}

/* The weights of a run with float moments and of one with bytes are close (measured: 0.0138 of their
 * length), the second ends a little farther from the minimum (measured: 1.10 times; curvatures of
 * 1 to 1/1000 share a block here), and a run that was stopped goes on to the same bytes. */
static void test_moments8(int tier) {
    descent a, b, c;
    double e, end[2];
    clean();
    descent_new(&a, SDQ_TIER_SCALAR, 1, 0);
    descent_new(&b, tier, 2, 1);
    descend(a.ctx, a.o, &a.t, 3, 300);
    descend(b.ctx, b.o, &b.t, 3, 300);
    e = distance(sdq_f32(&b.t), sdq_f32(&a.t), BIG);
    end[0] = far_from_target(&a.t);
    end[1] = far_from_target(&b.t);
    SDQT_THAT(e > 0 && e < 0.02, "moments in bytes: weights are off by %.3g", e);
    SDQT_THAT(end[1] < 1.2 * end[0], "distances from the minimum: float %.4g, bytes %.4g", end[0],
              end[1]);
    SDQT_CHECK(sdq_optim_save(b.ctx, b.o, STATE_A) == SDQ_OK);
    descent_new(&c, SDQ_TIER_SCALAR, 1, 1);
    descend(c.ctx, c.o, &c.t, 3, 120);
    SDQT_CHECK(sdq_optim_save(c.ctx, c.o, STATE_B) == SDQ_OK);
    descent_free(&c);
    descent_new(&c, tier, 1, 1);
    SDQT_THAT(sdq_optim_load(c.ctx, c.o, STATE_B) == SDQ_OK, "%s", sdq_error_text(c.ctx));
    SDQT_CHECK(sdq_optim_steps_done(c.o) == 120);
    descend(c.ctx, c.o, &c.t, 3, 300);
    SDQT_CHECK(sdq_optim_save(c.ctx, c.o, STATE_B) == SDQ_OK);
    SDQT_THAT(same_files(STATE_A, STATE_B), "moments in bytes: the resumed run differs%s", "");
    SDQT_CHECK(sdq_optim_load(a.ctx, a.o, STATE_A) != SDQ_OK);      /* other arrays */
    SDQT_THAT(strstr(sdq_error_text(a.ctx), "is not the state of this training"), "%s",
              sdq_error_text(a.ctx));
    descent_free(&a);
    descent_free(&b);
    descent_free(&c);
    clean();
}

static const sdqt_case cases[] = {
    {"golden", test_golden, 1},
    {"schedule", test_schedule, 0},
    {"leaf_settings", test_leaf_settings, 0},
    {"scales", test_scales, 1},
    {"ema", test_ema, 1},
    {"refusals", test_refusals, 1},
    {"resume", test_resume, 1},
    {"moments8", test_moments8, 1},
    {"save_load", test_save_load, 0},
    {"accumulate", test_accumulate, 0},
    {"random", test_random, 0},
    {"bad_loss", test_bad_loss, 0},
    {"validation", test_validation, 0},
    {"causes", test_causes, 0},
    {"disk_full", test_disk_full, 0},
    {"two_processes", test_two_processes, 0},
    {"damaged", test_damaged, 0},
    {"no_memory", test_no_memory, 0},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
