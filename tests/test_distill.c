/* test_distill.c - states of trajectories, losses and train sets of distillation, learned static
 * ranges, the schedule search and what an int8 file keeps of it.
 * Run from the project folder; writes and removes test_distill.*.tmp there.
 */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"
#include <sys/stat.h>
#include <unistd.h>

#define FOLDER "tests/golden/models/bk-a"
#define FILE_A "test_distill.a.tmp"
#define FILE_B "test_distill.b.tmp"
#define SIZE 64             /* of a latent: 4 x 4 x 4 */
#define PROMPTS 2
#define STEPS 3
#define EVALS 4             /* PNDM: one more than steps */
#define STATES (PROMPTS * EVALS * 2)

static const char *const prompts[PROMPTS] = {"a red apple", "night"};

typedef struct fixture {
    sdq_ctx *ctx;
    sdq_pipeline *p;
    sdq_model *student;     /* quantized by the recipe, not trained */
    sdq_txt2img_desc d;
} fixture;

static void open_fixture(fixture *f, int tier, const sdq_recipe *r) {
    sdq_pipeline_desc pd;
    memset(f, 0, sizeof *f);
    memset(&pd, 0, sizeof pd);
    f->ctx = sdqt_ctx(tier, 1);
    if (sdq_pipeline_load(f->ctx, FOLDER, &pd, &f->p) != SDQ_OK
        || sdq_model_load(f->ctx, FOLDER, SDQ_PART_UNET, &f->student) != SDQ_OK
        || sdq_recipe_apply(f->ctx, f->student, r, NULL) != SDQ_OK) {
        printf("%s\n", sdq_error_text(f->ctx));
        exit(2);
    }
    f->d.steps = STEPS;
    f->d.seed = 40;
    f->d.guidance = 3;
}
static void close_fixture(fixture *f) {
    sdq_model_free(f->ctx, f->student);
    sdq_pipeline_free(f->ctx, f->p);
    sdq_ctx_free(f->ctx);
}
/* Static ranges for all layers, learned. */
static sdq_recipe static_recipe(void) {
    sdq_recipe r = sdq_recipe_default();
    r.range_linear = r.range_conv = SDQ_RANGE_STATIC;
    return r;
}
static sdq_states *collect(fixture *f) {
    sdq_states *s = NULL;
    SDQT_THAT(sdq_states_collect(f->ctx, f->p, prompts, PROMPTS, &f->d, &s) == SDQ_OK, "%s",
              sdq_error_text(f->ctx));
    if (!s) exit(2);
    return s;
}

enum { MOST_BYTES = 1 << 24 };
static unsigned char *file_bytes(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    unsigned char *p = (unsigned char *)malloc(MOST_BYTES);
    if (!p || !f) exit(2);
    *n = fread(p, 1, MOST_BYTES, f);
    fclose(f);
    if (*n == MOST_BYTES) exit(2);
    return p;
}

/* ---- states: what a step callback sees, in the order [prompt][evaluation][branch] ---- */

typedef struct seen {
    float x[STATES][SIZE], eps[STATES][SIZE], time[STATES], context[STATES][9 * 16];
    size_t n;
} seen;

static int look(void *user, const sdq_step_info *info) {
    seen *s = (seen *)user;
    size_t b;
    SDQT_CHECK(info->count == EVALS && sdq_tensor_count(info->input) == info->input->dim[0] * SIZE);
    for (b = 0; b < info->input->dim[0] && s->n < STATES; b++, s->n++) {
        memcpy(s->x[s->n], sdq_f32(info->input) + b * SIZE, SIZE * 4);
        memcpy(s->eps[s->n], sdq_f32(info->raw) + b * SIZE, SIZE * 4);
        memcpy(s->context[s->n], sdq_f32(info->context) + b * 9 * 16, 9 * 16 * 4);
        s->time[s->n] = info->timestep;
    }
    return 0;
}

static void states_of(fixture *f, float guidance, size_t branches) {
    static seen s;
    sdq_states *st;
    size_t i;
    memset(&s, 0, sizeof s);
    f->d.guidance = guidance;
    st = collect(f);
    for (i = 0; i < PROMPTS; i++) {
        sdq_txt2img_desc d = f->d;
        d.prompt = prompts[i];
        d.seed += i;
        d.step = look;
        d.user = &s;
        SDQT_CHECK(sdq_txt2img_latents(f->ctx, f->p, &d, NULL, NULL) != NULL);
    }
    SDQT_CHECK(sdq_states_count(st) == PROMPTS * EVALS * branches && s.n == st->count);
    SDQT_CHECK(st->branches == branches && st->evals == EVALS && st->size == SIZE);
    for (i = 0; i < s.n && i < st->count; i++) {
        SDQT_THAT(memcmp(s.x[i], st->x + i * SIZE, SIZE * 4) == 0, "x of state %zu", i);
        SDQT_THAT(memcmp(s.eps[i], st->eps + i * SIZE, SIZE * 4) == 0, "eps of state %zu", i);
        SDQT_CHECK(s.time[i] == st->time[i]);
        SDQT_CHECK(st->context_size == 9 * 16
                   && memcmp(s.context[i], st->context + st->context_of[i] * 9 * 16, 9 * 16 * 4)
                          == 0);
    }
    for (i = 0; i < st->count; i++) {           /* neighbours are not the same by chance */
        const size_t prompt = i / branches / EVALS, eval = i / branches % EVALS;
        SDQT_CHECK(st->time[i] == st->time[eval * branches]);
        if (eval) SDQT_CHECK(st->time[i] <= st->time[i - branches]);
        if (i % branches) SDQT_CHECK(memcmp(st->x + i * SIZE, st->x + (i - 1) * SIZE, SIZE * 4) == 0
                                     && memcmp(s.eps[i], s.eps[i - 1], SIZE * 4) != 0);
        if (prompt) SDQT_CHECK(memcmp(s.x[i], s.x[i - EVALS * branches], SIZE * 4) != 0);
    }
    sdq_states_free(f->ctx, st);
}

static void test_states(int tier) {
    const sdq_recipe r = sdq_recipe_default();
    fixture f;
    open_fixture(&f, tier, &r);
    states_of(&f, 3, 2);
    states_of(&f, 1, 1);
    sdq_states_free(f.ctx, NULL);
    close_fixture(&f);
}

/* ---- losses, in double from the student's answer to every state ---- */

/* y [count][SIZE]: what the student says in FAKE mode, every state alone. */
static void answers(sdq_ctx *ctx, const sdq_model *m, const sdq_states *s, sdq_mode mode,
                    float *y) {
    size_t i;
    for (i = 0; i < s->count; i++) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        sdq_unet_input in;
        sdq_tensor *target, *t = NULL;
        if (sdq__cal_batch(ctx, s, &i, 1, &in, &target) == SDQ_OK)
            t = sdq_unet_forward(ctx, m, &in, mode);
        if (!SDQT_THAT(t != NULL, "%s", sdq_error_text(ctx))) exit(2);
        memcpy(y + i * SIZE, t->data, SIZE * 4);
        sdq_arena_release(ctx, mark);
    }
}
static double mse_of(const float *a, const float *b, size_t n) {
    double d = 0;
    size_t i;
    for (i = 0; i < n; i++) d += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return d / (double)n;
}
/* mean (sum d_i)^2 / sum mean d_i^2 of `window` evaluations from state `first` on. */
static double coherent_of(const sdq_states *s, const float *y, size_t first, size_t window) {
    double up = 0, down = 0;
    size_t e, i;
    for (i = 0; i < SIZE; i++) {
        double sum = 0;
        for (e = 0; e < window; e++) {
            const size_t at = (first + e * s->branches) * SIZE + i;
            double d = (double)y[at] - (double)s->eps[at];
            if (s->branches == 2)
                d += (double)s->guidance * ((double)y[at + SIZE] - (double)s->eps[at + SIZE] - d);
            sum += d;
            down += d * d;
        }
        up += sum * sum;
    }
    return up / down;
}
/* The first states of all windows; returns how many there are. */
static size_t windows_of(const sdq_states *s, size_t window, size_t *first) {
    size_t run, e, n = 0;
    for (run = 0; run < PROMPTS; run++)
        for (e = 0; e + window <= EVALS; e++) first[n++] = (run * EVALS + e) * s->branches;
    return n;
}
static double loss_of(sdq_ctx *ctx, sdq_distill_task *t, uint64_t seed) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_rng rng;
    sdq_tensor *loss;
    double v;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, seed);
    loss = sdq_distill_task_loss(ctx, t, &rng, 0);
    if (!SDQT_THAT(loss && sdq_tensor_count(loss) == 1, "%s", sdq_error_text(ctx))) exit(2);
    v = (double)sdq_f32(loss)[0];
    sdq_arena_release(ctx, mark);
    return v;
}

/* Measured: plain 2e-7, coherent 2e-6. */
#define PLAIN_TOL 2e-6
#define COHERENT_TOL 2e-5

/* A loss is that of one of `n` candidates; mark it as seen. */
static void one_of(double loss, const double *want, size_t n, double tol, int *hit) {
    size_t i, best = 0;
    for (i = 1; i < n; i++)
        if (fabs(want[i] - loss) < fabs(want[best] - loss)) best = i;
    SDQT_NEAR(loss, want[best], tol * want[best]);
    hit[best] = 1;
}

static void losses(fixture *f, float guidance) {
    static const uint64_t draws[EVALS + 1] = {0, 4, 40, 24, 10};
    float *y;
    double want[STATES], sum;
    size_t first[STATES], i, n, window;
    uint64_t seed;
    sdq_distill_task t;
    sdq_states *s;
    sdq_rng rng;
    int hit[STATES];
    f->d.guidance = guidance;
    s = collect(f);
    y = (float *)malloc(s->count * SIZE * 4);
    if (!y) exit(2);
    answers(f->ctx, f->student, s, SDQ_FAKE, y);
    memset(&t, 0, sizeof t);
    t.student = f->student;
    t.states = s;
    t.teacher_loss = 1;
    t.batch = 1;                                /* one state: all of them come */
    memset(hit, 0, sizeof hit);
    for (i = 0; i < s->count; i++) want[i] = mse_of(y + i * SIZE, s->eps + i * SIZE, SIZE);
    for (seed = 0; seed < 100; seed++)
        one_of(loss_of(f->ctx, &t, seed), want, s->count, PLAIN_TOL, hit);
    for (i = 0; i < s->count; i++) SDQT_THAT(hit[i], "state %zu was never drawn", i);
    t.batch = 5;                                /* several, drawn one after the other */
    t.teacher_loss = 0.25f;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 77);
    for (sum = 0, i = 0; i < t.batch; i++) sum += want[sdq_rng_below(&rng, s->count)] / 5 * 0.25;
    SDQT_NEAR(loss_of(f->ctx, &t, 77), sum, PLAIN_TOL * sum);
    t.teacher_loss = 1;
    t.coherent = 1;
    for (window = 1; window <= EVALS; window++) {
        n = windows_of(s, window, first);
        memset(hit, 0, sizeof hit);
        for (i = 0; i < n; i++) want[i] = coherent_of(s, y, first[i], window);
        t.batch = window * s->branches;
        for (seed = 0; seed < draws[window]; seed++)
            one_of(loss_of(f->ctx, &t, seed), want, n, COHERENT_TOL, hit);
        for (i = 0; i < n && window > 1; i++)   /* of one evaluation: always 1 */
            SDQT_THAT(hit[i], "window %zu of %zu was never drawn", i, window);
        if (window == 1) SDQT_NEAR(want[0], 1, 1e-12);
    }
    free(y);
    sdq_states_free(f->ctx, s);
}

static void test_loss(int tier) {
    const sdq_recipe r = sdq_recipe_default();
    fixture f;
    open_fixture(&f, tier, &r);
    losses(&f, 3);
    losses(&f, 1);
    close_fixture(&f);
}

static void refused(fixture *f, sdq_distill_task *t, size_t batch, const char *says) {
    sdq_rng rng;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 1);
    t->batch = batch;
    SDQT_THAT(!sdq_distill_task_loss(f->ctx, t, &rng, 0)
              && sdq_last_error(f->ctx) == SDQ_ERR_ARGUMENT
              && strstr(sdq_error_text(f->ctx), says), "batch %zu: '%s'", batch,
              sdq_error_text(f->ctx));
    sdq_clear_error(f->ctx);
}

static void test_refusals(int tier) {
    const sdq_recipe r = sdq_recipe_default();
    sdq_distill_task t;
    fixture f;
    sdq_states *s;
    open_fixture(&f, tier, &r);
    s = collect(&f);
    memset(&t, 0, sizeof t);
    t.student = f.student;
    t.states = s;
    t.teacher_loss = 1;
    t.coherent = 1;
    refused(&f, &t, 0, "a batch of 0");
    refused(&f, &t, 1, "window");
    refused(&f, &t, 3, "a batch of 3 is not a window of 1..4 evaluations with 2 branches");
    refused(&f, &t, 2 * EVALS + 2, "window");
    refused(&f, &t, 65, "a batch of 65, 1..64 are possible");
    t.states = NULL;
    refused(&f, &t, 2, "states or data");
    sdq_states_free(f.ctx, s);
    f.d.guidance = 1;
    t.states = s = collect(&f);
    refused(&f, &t, EVALS + 1, "window");
    sdq_states_free(f.ctx, s);
    close_fixture(&f);
}

/* ---- what calibrating, converting and saving promise ---- */

static double bias_distance(const sdq_model *m, const float *was) {
    double sum = 0.0;
    size_t i, o;
    for (i = 0; i < m->layers; i++) {
        const sdq_layer *l = m->layer[i];
        for (o = 0; l->b.data && o < l->out; o++, was++) sum += fabs((double)(sdq_f32(&l->b)[o] - *was));
    }
    return sum;
}
static void copy_biases(const sdq_model *m, float *to) {
    size_t i;
    for (i = 0; i < m->layers; i++) {
        const sdq_layer *l = m->layer[i];
        if (!l->b.data) continue;
        memcpy(to, l->b.data, l->out * 4);
        to += l->out;
    }
}

static void said(fixture *f, sdq_status got, sdq_status want, const char *text) {
    SDQT_THAT(got == want && strstr(sdq_error_text(f->ctx), text), "status %d: %s", (int)got,
              sdq_error_text(f->ctx));
    sdq_clear_error(f->ctx);
}

/* Calibrating twice is calibrating once, and another recipe begins from the model's own biases. */
static void test_calibrate_again(int tier) {
    static float plain[1 << 14], once[1 << 14];
    sdq_recipe r = sdq_recipe_default(), four;
    double moved, again;
    sdq_states *s;
    fixture f;
    open_fixture(&f, tier, &r);
    s = collect(&f);
    copy_biases(f.student, plain);
    SDQT_CHECK(sdq_calibrate_states(f.ctx, f.student, s, 4, 1, NULL, NULL) == SDQ_OK);
    copy_biases(f.student, once);
    moved = bias_distance(f.student, plain);
    SDQT_CHECK(sdq_calibrate_states(f.ctx, f.student, s, 4, 1, NULL, NULL) == SDQ_OK);
    again = bias_distance(f.student, once);
    SDQT_THAT(moved > 1e-4 && again < 1e-4 * moved, "moved by %g, then by %g", moved, again);
    four = r;
    four.weight_bits = 4;
    SDQT_CHECK(sdq_recipe_apply(f.ctx, f.student, &four, NULL) == SDQ_OK);
    again = bias_distance(f.student, plain);
    SDQT_THAT(again < 1e-4 * moved, "%g of %g is left", again, moved);
    SDQT_CHECK(sdq_calibrate_states(f.ctx, f.student, s, 4, 1, NULL, NULL) == SDQ_OK
               && sdq_calibrate_states(f.ctx, f.student, s, 4, 0, NULL, NULL) == SDQ_OK);
    again = bias_distance(f.student, plain);
    SDQT_THAT(again < 1e-3 * moved, "without correction %g of %g is left", again, moved);
    sdq_states_free(f.ctx, s);
    close_fixture(&f);
}

/* A network is converted as a whole or not at all, and saved as int8 when it is. */
static void test_convert_refused(int tier) {
    static const char *const none[] = {"no.such", NULL};
    static const char *const dot[] = {"mid_block", NULL};
    static const char *const mid[] = {"up_blocks.", NULL};
    sdq_recipe r = static_recipe();
    sdq_optim *o = NULL;
    sdq_states *s;
    size_t i, lost = 0;
    fixture f;
    open_fixture(&f, tier, &r);
    s = collect(&f);
    said(&f, sdq_model_save_int8(f.ctx, f.student, FILE_A, NULL, NULL), SDQ_ERR_ARGUMENT,
         "call sdq_model_convert");
    said(&f, sdq_model_save_int8(f.ctx, f.p->unet, FILE_A, NULL, NULL), SDQ_ERR_ARGUMENT,
         "int8");
    SDQT_CHECK(access(FILE_A, F_OK) != 0);
    said(&f, sdq_model_convert(f.ctx, f.student), SDQ_ERR_NOT_CALIBRATED, "calibrate first");
    for (i = 0; i < f.student->layers; i++) lost += f.student->layer[i]->w.data == NULL;
    SDQT_THAT(lost == 0, "%zu layers lost their weights", lost);
    said(&f, sdq_recipe_apply(f.ctx, f.student, &r, none), SDQ_ERR_ARGUMENT, "no.such");
    said(&f, sdq_recipe_apply(f.ctx, f.student, &r, dot), SDQ_ERR_ARGUMENT, "mid_block");
    said(&f, sdq_recipe_apply(f.ctx, f.p->vae, &r, NULL), SDQ_ERR_ARGUMENT, "no UNet");
    said(&f, sdq_recipe_apply(f.ctx, NULL, &r, NULL), SDQ_ERR_ARGUMENT, "no UNet");
    SDQT_CHECK(sdq_recipe_apply(f.ctx, f.student, &r, mid) == SDQ_OK);
    r.train_set = (sdq_train_set)9;
    said(&f, sdq_recipe_apply(f.ctx, f.student, &r, NULL), SDQ_ERR_ARGUMENT, "train_set");
    r = static_recipe();
    r.moving = 2;
    said(&f, sdq_recipe_apply(f.ctx, f.student, &r, NULL), SDQ_ERR_ARGUMENT, "move by");
    r.moving = 0.01f;
    SDQT_CHECK(sdq_recipe_apply(f.ctx, f.student, &r, NULL) == SDQ_OK
               && sdq_optim_create(f.ctx, NULL, &o) == SDQ_OK);
    said(&f, sdq_optim_add_student(f.ctx, o, f.student, &r, 1), SDQ_ERR_ARGUMENT, "overwrite");
    sdq_optim_free(f.ctx, o);
    /* a range of NaN alone, and one that is infinite */
    r = static_recipe();
    SDQT_CHECK(sdq_recipe_apply(f.ctx, f.student, &r, NULL) == SDQ_OK
               && sdq_calibrate_states(f.ctx, f.student, s, 4, 0, NULL, NULL) == SDQ_OK);
    for (i = 0; i < f.student->layers && !f.student->layer[i]->quant.enabled; i++) { }
    f.student->layer[i]->part[0].mx = INFINITY;
    said(&f, sdq_model_convert(f.ctx, f.student), SDQ_ERR_NUMERIC, "not finite");
    sdq_states_free(f.ctx, s);
    close_fixture(&f);
}

/* Ranges of results come from states, too; without them nothing is converted. */
static void test_outputs(int tier) {
    static float range[64];
    sdq_recipe r = sdq_recipe_default();
    sdq_states *s;
    size_t i;
    int k;
    fixture f;
    r.quantize_outputs = 1;
    open_fixture(&f, tier, &r);
    s = collect(&f);
    said(&f, sdq_model_convert(f.ctx, f.student), SDQ_ERR_NOT_CALIBRATED, "output range");
    for (k = 0; k < 2; k++) {           /* the second time changes nothing but by rounding */
        SDQT_THAT(sdq_calibrate_states(f.ctx, f.student, s, 4, 1, NULL, NULL) == SDQ_OK, "%s",
                  sdq_error_text(f.ctx));
        for (i = 0; i < f.student->layers && i < 64; i++) {
            const sdq_layer *l = f.student->layer[i];
            if (k) SDQT_THAT(fabsf(range[i] - (l->part[0].mx - l->part[0].mn)) <= 1e-4f * range[i],
                             "%s", l->name);
            range[i] = l->part[0].mx - l->part[0].mn;
        }
    }
    SDQT_THAT(sdq_model_convert(f.ctx, f.student) == SDQ_OK, "%s", sdq_error_text(f.ctx));
    sdq_states_free(f.ctx, s);
    close_fixture(&f);
}

/* The denominator is a constant for the gradient: 2 sum_j / size / down * weight. */
static void test_coherent_gradient(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    sdq_states s;
    size_t e, i, branches;
    memset(&s, 0, sizeof s);
    s.guidance = 3;
    s.size = SIZE;
    for (branches = 1; branches <= 2; branches++) {
        const size_t n = 3 * branches;
        sdq_tensor *y = sdq_tensor_4d(ctx, n, 4, 4, 4), *t = sdq_tensor_4d(ctx, n, 4, 4, 4), *l;
        double down = 0, sum[SIZE], d;
        s.branches = branches;
        s.eps = sdq_f32(t);
        for (i = 0; i < n * SIZE; i++) {
            sdq_f32(t)[i] = sdqt_normal();
            sdq_f32(y)[i] = sdq_f32(t)[i] + 0.1f * sdqt_normal() + 0.03f;
        }
        sdq_tape_begin(ctx);
        y->needs_grad = 1;
        l = sdq__ds_coherent(ctx, &s, y, t);
        SDQT_CHECK(l && sdq_backward(ctx, l) == SDQ_OK && y->grad);
        sdq_tape_end(ctx);
        if (!l || !y->grad) exit(2);
        SDQT_NEAR(sdq_f32(l)[0], coherent_of(&s, sdq_f32(y), 0, 3), 1e-5);
        for (i = 0; i < SIZE; i++)
            for (sum[i] = 0, e = 0; e < 3; e++) {
                const size_t at = e * branches * SIZE + i;
                d = (double)sdq_f32(y)[at] - (double)s.eps[at];
                if (branches == 2)
                    d = -2 * d + 3 * ((double)sdq_f32(y)[at + SIZE] - (double)s.eps[at + SIZE]);
                sum[i] += d;
                down += d * d / SIZE;
            }
        for (i = 0; i < n * SIZE; i++) {
            const double weight = branches == 1 ? 1 : i / SIZE % 2 ? 3 : -2;
            if (!SDQT_NEAR(y->grad[i], 2 * sum[i % SIZE] / SIZE / down * weight, 1e-5)) break;
        }
    }
    sdq_ctx_free(ctx);
}

/* ---- what is trained ---- */

static size_t find_leaf(const sdq_optim *o, const char *name) {     /* one that is trained */
    size_t i;
    for (i = 0; i < o->count && (o->leaf[i].state || strcmp(o->leaf[i].name, name) != 0); i++) {}
    return i;
}
static size_t kept_leaves(const sdq_optim *o) {                     /* those that are only kept */
    size_t i, n = 0;
    for (i = 0; i < o->count; i++) n += o->leaf[i].state != NULL;
    return n;
}
/* The leaf is there exactly when it should be; its rate and floor. Counts those that are. */
static void leaf_is(const sdq_optim *o, int wanted, const char *name, float lr_scale, float floor,
                    size_t *count) {
    const size_t at = find_leaf(o, name);
    SDQT_THAT((at < o->count) == wanted, "%s is %sin the optimizer", name, wanted ? "not " : "");
    if (at == o->count) return;
    SDQT_THAT(fabsf(o->leaf[at].lr_scale - lr_scale) < 1e-4f && o->leaf[at].floor == floor,
              "%s: rate %g, floor %g", name, (double)o->leaf[at].lr_scale,
              (double)o->leaf[at].floor);
    SDQT_CHECK(o->leaf[at].decay == 0 || o->leaf[at].t->rank > 1);
    ++*count;
}

static void train_set_of(fixture *f, sdq_recipe r, const char *const *keep) {
    const int weights = r.train_set == SDQ_TRAIN_ALL;
    const int small = weights || r.train_set == SDQ_TRAIN_SMALL;
    const int fixed = r.learn_scales && r.train_set != SDQ_TRAIN_RANGES
                   && r.weight_scale == SDQ_WEIGHT_FIXED;
    const int ranges = r.learn_scales && r.range_conv == SDQ_RANGE_STATIC;
    char name[256];
    size_t i, p, count = 0, kept = 0, quantized = 0, parts2 = 0;
    sdq_optim *o = NULL;
    SDQT_CHECK(sdq_recipe_apply(f->ctx, f->student, &r, keep) == SDQ_OK);
    SDQT_CHECK(sdq_optim_create(f->ctx, NULL, &o) == SDQ_OK);
    SDQT_THAT(sdq_optim_add_student(f->ctx, o, f->student, &r, 500) == SDQ_OK, "%s",
              sdq_error_text(f->ctx));
    for (i = 0; i < sdq_model_param_count(f->student); i++) {
        const char *param;
        const sdq_tensor *t = sdq_model_param(f->student, i, &param);
        leaf_is(o, t->rank > 1 ? weights : small, param, 1, 0, &count);
    }
    for (i = 0; i < f->student->layers; i++) {
        const sdq_layer *l = f->student->layer[i];
        const int on = l->quant.enabled;
        quantized += on != 0;
        parts2 += on && l->parts == 2;
        (void)snprintf(name, sizeof name, "%s.weight_scale", l->name);
        leaf_is(o, on && fixed, name, 25, 1e-7f, &count);
        (void)snprintf(name, sizeof name, "%s.lora_a", l->name);
        leaf_is(o, on && r.train_set == SDQ_TRAIN_LORA, name, 1, 0, &count);
        (void)snprintf(name, sizeof name, "%s.lora_b", l->name);
        leaf_is(o, on && r.train_set == SDQ_TRAIN_LORA, name, 1, 0, &count);
        for (p = 0; p < 2; p++) {
            (void)snprintf(name, sizeof name, "%s.input_scale.%zu", l->name, p);
            leaf_is(o, on && ranges && p < l->parts, name, 500, 1e-7f, &count);
        }
        kept += (size_t)on + (on && !small && l->b.data);   /* ranges, biases that are not trained */
        if (keep && strncmp(l->name, keep[0], strlen(keep[0])) == 0) SDQT_CHECK(!on);
        if (strcmp(l->name, "conv_in") == 0 || strcmp(l->name, "conv_out") == 0) SDQT_CHECK(!on);
    }
    SDQT_THAT(kept_leaves(o) == kept && o->count == count + kept,
              "%zu leaves, of which %zu are known, and %zu that are kept", o->count, count, kept);
    SDQT_CHECK(quantized > 10 && quantized < f->student->layers && parts2 > 0);
    sdq_optim_free(f->ctx, o);
}

static void test_train_sets(int tier) {
    static const char *const keep[] = {"up_blocks.1.", NULL};
    const sdq_recipe first = sdq_recipe_default();
    int set, fixed;
    fixture f;
    open_fixture(&f, tier, &first);
    SDQT_CHECK(first.train_set == SDQ_TRAIN_SMALL && first.learn_scales);
    for (set = SDQ_TRAIN_ALL; set < SDQ_TRAIN_SET_COUNT; set++)
        for (fixed = 0; fixed < 4; fixed++) {
            sdq_recipe r = fixed & 1 ? static_recipe() : sdq_recipe_default();
            sdq_optim *o = NULL;
            r.train_set = (sdq_train_set)set;
            if (fixed & 2) r.weight_scale = SDQ_WEIGHT_CURRENT;
            if (set < SDQ_TRAIN_SCALES || set == SDQ_TRAIN_LORA || fixed & 1
                || (set == SDQ_TRAIN_SCALES && !(fixed & 2))) {
                train_set_of(&f, r, NULL);
                train_set_of(&f, r, keep);
                if (set > SDQ_TRAIN_SMALL && set != SDQ_TRAIN_LORA) r.learn_scales = 0;
                else { r.learn_scales = 0; train_set_of(&f, r, NULL); continue; }
            }
            SDQT_CHECK(sdq_recipe_apply(f.ctx, f.student, &r, NULL) == SDQ_OK
                       && sdq_optim_create(f.ctx, NULL, &o) == SDQ_OK);
            SDQT_CHECK(sdq_optim_add_student(f.ctx, o, f.student, &r, 500) == SDQ_ERR_ARGUMENT);
            SDQT_THAT(strstr(sdq_error_text(f.ctx), "nothing to train: train_set=")
                      && strstr(sdq_error_text(f.ctx), sdq__rc_train_set[set]), "%s",
                      sdq_error_text(f.ctx));
            sdq_clear_error(f.ctx);
            sdq_optim_free(f.ctx, o);
        }
    close_fixture(&f);
}

/* The last blocks: everything from some parameter on, whose block is the one asked for. */
static void test_last_blocks(int tier) {
    static const char *const from[] = {"conv_in.", "up_blocks.1.attentions.1.", "up_blocks.1.resnets.1.",
                                       "up_blocks.1.attentions.0.", "up_blocks.1.resnets.0.",
                                       "up_blocks.0.upsamplers.0."};
    sdq_recipe r = sdq_recipe_default();
    size_t blocks, i, total;
    fixture f;
    r.train_set = SDQ_TRAIN_ALL;
    open_fixture(&f, tier, &r);
    total = sdq_model_param_count(f.student);
    for (blocks = 0; blocks < 6; blocks++) {
        sdq_optim *o = NULL;
        size_t count = 0, scales = 0;
        int inside = blocks == 0;
        r.last_blocks = blocks;
        SDQT_CHECK(sdq_optim_create(f.ctx, NULL, &o) == SDQ_OK);
        SDQT_CHECK(sdq_optim_add_student(f.ctx, o, f.student, &r, 500) == SDQ_OK);
        for (i = 0; i < total; i++) {
            const char *name;
            (void)sdq_model_param(f.student, i, &name);
            inside = inside || strncmp(name, from[blocks], strlen(from[blocks])) == 0;
            leaf_is(o, inside, name, 1, 0, &count);
            if (f.student->param[i].layer && f.student->param[i].rank > 1)
                scales += inside && f.student->param[i].layer->quant.enabled;
        }
        SDQT_THAT(count > 0 && o->count == count + scales + kept_leaves(o),
                  "%zu blocks: %zu leaves, %zu + %zu", blocks, o->count, count, scales);
        sdq_optim_free(f.ctx, o);
    }
    r.last_blocks = 1000;       /* more than there are: all */
    {
        sdq_optim *o = NULL;
        SDQT_CHECK(sdq_optim_create(f.ctx, NULL, &o) == SDQ_OK);
        SDQT_CHECK(sdq_optim_add_student(f.ctx, o, f.student, &r, 500) == SDQ_OK);
        SDQT_CHECK(find_leaf(o, "conv_in.weight") < o->count);
        sdq_optim_free(f.ctx, o);
    }
    close_fixture(&f);
}

/* ---- deltas of low rank ---- */

#define RANK 3

/* A layer with weights w + b a, and the same as a delta of packed w: both compute the same, and
 * the gradients of a and b follow from that of the sum. */
static void delta_of(sdq_ctx *ctx, int kernel, sdq_range range) {
    const size_t k = 12 * (size_t)(kernel * kernel), out = 40;
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_layer *l[2];
    sdq_tensor *x = sdq_tensor_4d(ctx, 2, 5, 5, 12), *y[2], *none;
    sdq_layer_desc d;
    sdq_quant q;
    sdq_rng rng;
    size_t i, j, o, r;
    memset(&d, 0, sizeof d);
    d.name = "layer";
    d.in = 12; d.out = out; d.kernel = kernel;
    for (i = 0; i < 4; i++) d.pad[i] = kernel > 1;
    for (i = 0; i < sdq_tensor_count(x); i++) sdq_f32(x)[i] = sdqt_normal();
    x->needs_grad = 1;
    for (j = 0; j < 2; j++) {
        if (sdq_layer_create(ctx, &d, &l[j]) != SDQ_OK) exit(2);
        q = sdq_layer_quant(l[j]);
        q.range = range;
        SDQT_CHECK(sdq_layer_set_quant(ctx, l[j], &q) == SDQ_OK);
    }
    for (i = 0; i < out * k; i++) sdq_f32(&l[0]->w)[i] = sdq_f32(&l[1]->w)[i] = sdqt_normal();
    if (kernel == 3) SDQT_CHECK(sdq__ly_freeze(ctx, l[1]) == SDQ_OK);
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 3);
    SDQT_CHECK(sdq__ly_new_delta(ctx, l[1], RANK, &rng) == SDQ_OK);
    for (j = 0; j < 2; j++) {
        sdq_layer_observe(l[j], 1);
        SDQT_CHECK(sdq_layer_forward(ctx, l[j], x, NULL, SDQ_FLOAT) != NULL);
        sdq_layer_observe(l[j], 0);
        y[j] = sdq_layer_forward(ctx, l[j], x, NULL, SDQ_FAKE);
    }
    SDQT_BYTES(y[0]->data, y[1]->data, sdq_tensor_count(y[0]) * 4);     /* b = 0 */
    for (i = 0; i < out * RANK; i++) sdq_f32(&l[1]->lb)[i] = 0.3f * sdqt_normal();
    for (o = 0; o < out; o++)
        for (i = 0; i < k; i++) {
            float sum = 0;
            for (r = 0; r < RANK; r++)
                sum = fmaf(sdq_f32(&l[1]->lb)[o * RANK + r], sdq_f32(&l[1]->la)[r * k + i], sum);
            sdq_f32(&l[0]->w)[o * k + i] = sum + sdq_f32(&l[0]->w)[o * k + i];
        }
    l[0]->w.needs_grad = l[1]->la.needs_grad = l[1]->lb.needs_grad = 1;
    sdq_tape_begin(ctx);
    for (j = 0; j < 2; j++) y[j] = sdq_layer_forward(ctx, l[j], x, NULL, SDQ_FAKE);
    SDQT_BYTES(y[0]->data, y[1]->data, sdq_tensor_count(y[0]) * 4);
    none = sdq_tensor_new(ctx, SDQ_F32, 4, y[0]->dim);
    SDQT_CHECK(sdq_backward(ctx, sdq_add(ctx, sdq_mse(ctx, y[0], none, NULL),
                                         sdq_mse(ctx, y[1], none, NULL))) == SDQ_OK);
    sdq_tape_end(ctx);
    SDQT_CHECK(!l[1]->w.grad && l[0]->w.grad && l[1]->la.grad && l[1]->lb.grad);
    for (r = 0; r < RANK; r++) {
        for (i = 0; i < k; i++) {
            double sum = 0, mag = 0;
            for (o = 0; o < out; o++) {
                const double p = (double)sdq_f32(&l[1]->lb)[o * RANK + r]
                               * (double)l[0]->w.grad[o * k + i];
                sum += p;
                mag += fabs(p);
            }
            SDQT_NEAR(l[1]->la.grad[r * k + i], sum, 1e-5 * mag);
        }
        for (o = 0; o < out; o++) {
            double sum = 0, mag = 0;
            for (i = 0; i < k; i++) {
                const double p = (double)sdq_f32(&l[1]->la)[r * k + i]
                               * (double)l[0]->w.grad[o * k + i];
                sum += p;
                mag += fabs(p);
            }
            SDQT_NEAR(l[1]->lb.grad[o * RANK + r], sum, 1e-5 * mag);
        }
    }
    SDQT_CHECK(sdq_layer_convert(ctx, l[1]) == SDQ_OK);         /* merged */
    y[0] = sdq_layer_forward(ctx, l[1], x, NULL, SDQ_INT8);
    SDQT_BYTES(y[0]->data, y[1]->data, sdq_tensor_count(y[0]) * 4);
    SDQT_CHECK(!l[1]->la.data && !l[1]->lb.data && !sdq__ly_frozen(l[1]));
    SDQT_CHECK(sdq__ly_new_delta(ctx, l[1], RANK, &rng) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq__ly_new_delta(ctx, l[0], out + 1, &rng) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    for (j = 0; j < 2; j++) sdq_layer_free(ctx, l[j]);
    sdq_arena_release(ctx, mark);
}
static void test_delta(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    delta_of(ctx, 1, SDQ_RANGE_POSITION);
    delta_of(ctx, 3, SDQ_RANGE_POSITION);
    delta_of(ctx, 1, SDQ_RANGE_STATIC);
    delta_of(ctx, 3, SDQ_RANGE_STATIC);
    sdq_ctx_free(ctx);
}

/* ---- learned static ranges of one layer ---- */

#define IN 12
#define OUT 8
#define ROWS 5

/* Part 0, behind SiLU: one side; part 1: both sides. split 0: one part of that kind. */
static sdq_layer *range_layer(sdq_ctx *ctx, int kernel, size_t split, int one_sided,
                              sdq_tensor **input) {
    sdq_layer_desc d;
    sdq_layer *l;
    sdq_quant q;
    sdq_tensor *x = kernel > 1 ? sdq_tensor_4d(ctx, 2, ROWS, ROWS, IN)
                               : sdq_tensor_3d(ctx, 2, ROWS, IN);
    size_t i;
    memset(&d, 0, sizeof d);
    d.name = "layer";
    d.in = IN; d.out = OUT; d.kernel = kernel;
    for (i = 0; i < 4; i++) d.pad[i] = kernel > 1;
    if (!x || sdq_layer_create(ctx, &d, &l) != SDQ_OK) exit(2);
    q = sdq_layer_quant(l);
    q.range = SDQ_RANGE_STATIC;
    q.split = split;
    q.learn_scales = 1;
    SDQT_CHECK(sdq_layer_set_quant(ctx, l, &q) == SDQ_OK);
    sdqt.rng = 5;
    for (i = 0; i < sdq_tensor_count(&l->w); i++) sdq_f32(&l->w)[i] = sdqt_normal();
    for (i = 0; i < OUT; i++) sdq_f32(&l->b)[i] = sdqt_normal();
    for (i = 0; i < sdq_tensor_count(x); i++) {
        const float v = 2 * sdqt_normal();
        sdq_f32(x)[i] = (split ? i % IN < split : one_sided) ? v / (1 + expf(-v)) : v;
    }
    sdq_layer_observe(l, 1);
    SDQT_CHECK(sdq_layer_forward(ctx, l, x, NULL, SDQ_FLOAT) != NULL);
    sdq_layer_observe(l, 0);
    *input = x;
    return l;
}

static void follows(sdq_ctx *ctx, int kernel, size_t split, int one_sided, float by) {
    sdq_tensor *x, *fake, *later, *int8;
    sdq_layer *l = range_layer(ctx, kernel, split, one_sided, &x);
    sdq_layer *other = range_layer(ctx, kernel, split, one_sided, &x);
    int32_t before[2];
    size_t i;
    for (i = 0; i < l->parts; i++) {
        before[i] = l->part[i].z;
        sdq_f32(&l->part[i].s)[0] *= by;
        sdq_f32(&other->part[i].s)[0] *= by;
    }
    fake = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
    for (i = 0; i < l->parts; i++) {
        const sdq__qpart *p = &l->part[i];
        const double s = (double)sdq_f32(&p->s)[0];
        if (split ? i == 0 : one_sided) {       /* the low end stays where it was observed */
            SDQT_CHECK(p->z == (int32_t)nearbyintf(-p->mn / (float)s) && p->z != before[i]);
            SDQT_NEAR(-p->z * s, p->mn, 0.501 * s);
            SDQT_CHECK(p->mn < -0.2f && p->mn > -0.3f);
        } else {
            SDQT_CHECK(p->z == before[i]);
        }
    }
    SDQT_CHECK(sdq_layer_convert(ctx, l) == SDQ_OK);
    int8 = sdq_layer_forward(ctx, l, x, NULL, SDQ_INT8);
    SDQT_CHECK(sdq_layer_convert(ctx, other) == SDQ_OK);    /* never seen by a FAKE forward */
    later = sdq_layer_forward(ctx, other, x, NULL, SDQ_INT8);
    if (SDQT_CHECK(fake && int8 && later)) {
        SDQT_BYTES(fake->data, int8->data, sdq_tensor_count(fake) * 4);
        SDQT_BYTES(fake->data, later->data, sdq_tensor_count(fake) * 4);
    }
    sdq_layer_free(ctx, l);
    sdq_layer_free(ctx, other);
}

static void test_follow(int tier) {
    static const float by[] = {0.6f, 1.7f, 0.85f};
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    size_t i;
    for (i = 0; i < 3; i++) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        follows(ctx, 1, 0, 1, by[i]);
        follows(ctx, 1, 0, 0, by[i]);
        follows(ctx, 3, 7, 1, by[i]);
        follows(ctx, 3, 0, 1, by[i]);
        sdq_arena_release(ctx, mark);
    }
    sdq_ctx_free(ctx);
}

/* Sum of all results in FAKE mode; grad: NULL or receives that of the input scale. */
static double sum_of(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, double *grad) {
    sdq_tensor *y;
    double sum = 0;
    size_t i;
    l->part[0].s.needs_grad = grad != NULL;
    l->part[0].s.grad = NULL;
    sdq_tape_begin(ctx);
    y = sdq_layer_forward(ctx, l, x, NULL, SDQ_FAKE);
    if (!SDQT_THAT(y != NULL, "%s", sdq_error_text(ctx))) exit(2);
    for (i = 0; i < sdq_tensor_count(y); i++) sum += (double)sdq_f32(y)[i];
    if (grad) {
        y->grad = SDQ__PUSH_N(ctx, float, sdq_tensor_count(y));
        for (i = 0; i < sdq_tensor_count(y); i++) y->grad[i] = 1;
        sdq__tape_walk(ctx, ctx->tape);
        *grad = l->part[0].s.grad ? (double)l->part[0].s.grad[0] : NAN;
    }
    sdq_tape_end(ctx);
    l->part[0].s.grad = NULL;
    l->part[0].s.needs_grad = 0;
    return sum;
}

/* All inputs beyond one end of the range: the gradient is LSQ's, 255 (or what the zero point
 * leaves) per element, over the root of 255 elements of an entry, and the slope that is seen when
 * the scale moves by ten per cent. The zero point that follows jumps by one: 2 per cent of 255. */
static void beyond(sdq_ctx *ctx, int one_sided, int above) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *x;
    sdq_layer *l = range_layer(ctx, 1, 0, one_sided, &x);
    const int32_t z = l->part[0].z;
    const double per = (above ? 255 : 0) - (one_sided ? 0 : z);
    const int8_t *q;
    float *s = sdq_f32(&l->part[0].s), s0 = s[0];
    double grad, up, down, slope, weights = 0, size = 0;
    size_t i;
    for (i = 0; i < sdq_tensor_count(x); i++)
        sdq_f32(x)[i] = above ? 2 * l->part[0].mx + sdqt_uniform(0, 1)
                              : -2 * l->part[0].mx - sdqt_uniform(0, 1);
    (void)sum_of(ctx, l, x, &grad);
    q = sdq__ly_quantize_weights(ctx, l, sdq_f32(&l->w));
    for (i = 0; i < OUT * IN; i++) {
        weights += (double)q[i] * (double)sdq_f32(&l->sw)[i / IN];
        size += fabs((double)q[i] * (double)sdq_f32(&l->sw)[i / IN]);
    }
    SDQT_NEAR(grad, per * 2 * ROWS * weights / sqrt(255.0 * ROWS * IN),
              1e-5 * 255 * 2 * ROWS * size / sqrt(255.0 * ROWS * IN));
    s[0] = s0 * 1.1f;
    up = sum_of(ctx, l, x, NULL);
    s[0] = s0 * 0.9f;
    down = sum_of(ctx, l, x, NULL);
    slope = (up - down) / ((double)(s0 * 1.1f) - (double)(s0 * 0.9f));
    SDQT_CHECK(fabs(weights) > 1);
    SDQT_NEAR(grad * sqrt(255.0 * ROWS * IN), slope,
              (one_sided ? 5.5 : 0.01) * fabs(2 * ROWS * weights));
    sdq_layer_free(ctx, l);
    sdq_arena_release(ctx, mark);
}

static void test_range_gradient(int tier) {
    sdq_ctx *ctx = sdqt_ctx(tier, 1);
    int i;
    for (i = 0; i < 4; i++) beyond(ctx, i & 1, i & 2);
    sdq_ctx_free(ctx);
}

/* ---- training ---- */

/* The mean loss of all states, or of all windows of two evaluations. */
static double mean_loss(fixture *f, const sdq_model *m, const sdq_states *s, int coherent) {
    float *y = (float *)malloc(s->count * SIZE * 4);
    size_t first[STATES], i, n = s->count;
    double sum = 0;
    if (!y) exit(2);
    answers(f->ctx, m, s, SDQ_FAKE, y);
    if (coherent) n = windows_of(s, 2, first);
    for (i = 0; i < n; i++)
        sum += coherent ? coherent_of(s, y, first[i], 2)
                        : mse_of(y + i * SIZE, s->eps + i * SIZE, SIZE);
    free(y);
    return sum / (double)n;
}

static void trains(int tier, sdq_recipe r, int coherent, float lr, double below) {
    fixture f;
    sdq_states *s;
    sdq_optim_desc od;
    sdq_optim *o = NULL;
    sdq_fit_desc fd;
    sdq_distill_task t;
    double before, after;
    size_t i, j;
    float *fake = (float *)malloc(STATES * SIZE * 4), *int8 = (float *)malloc(STATES * SIZE * 4);
    if (!fake || !int8) exit(2);
    open_fixture(&f, tier, &r);
    s = collect(&f);
    if (r.train_set == SDQ_TRAIN_LORA) SDQT_CHECK(sdq_model_freeze(f.ctx, f.student) == SDQ_OK);
    SDQT_THAT(sdq_calibrate_states(f.ctx, f.student, s, 5, 1, NULL, NULL) == SDQ_OK, "%s",
              sdq_error_text(f.ctx));
    for (i = 0; i < f.student->layers; i++)         /* something to repair */
        for (j = 0; j < sdq_tensor_count(&f.student->layer[i]->b); j++)
            if (f.student->layer[i]->b.data)
                sdq_f32(&f.student->layer[i]->b)[j] += 0.05f * sdqt_normal();
    memset(&od, 0, sizeof od);
    memset(&fd, 0, sizeof fd);
    memset(&t, 0, sizeof t);
    od.lr = lr;
    t.student = f.student;
    t.states = s;
    t.teacher_loss = 1;
    t.coherent = coherent;
    t.batch = coherent ? 4 : 8;
    fd.steps = coherent ? 24 : 12;
    SDQT_CHECK(sdq_optim_create(f.ctx, &od, &o) == SDQ_OK);
    SDQT_CHECK(sdq_optim_add_student(f.ctx, o, f.student, &r, 20) == SDQ_OK);
    before = mean_loss(&f, f.student, s, coherent);
    SDQT_THAT(sdq_fit(f.ctx, o, &fd, sdq_distill_task_loss, &t) == SDQ_OK, "%s",
              sdq_error_text(f.ctx));
    after = mean_loss(&f, f.student, s, coherent);
    SDQT_THAT(after < below * before, "coherent %d, ranges %d: the loss went from %.4g to %.4g",
              coherent, (int)r.range_conv, before, after);
    sdq_optim_free(f.ctx, o);
    answers(f.ctx, f.student, s, SDQ_FAKE, fake);   /* what was trained is what ships */
    SDQT_CHECK(sdq_model_convert(f.ctx, f.student) == SDQ_OK);
    answers(f.ctx, f.student, s, SDQ_INT8, int8);
    SDQT_BYTES(fake, int8, s->count * SIZE * 4);
    if (!coherent) {
        sdq_model *m = NULL;
        SDQT_CHECK(sdq_model_save_int8(f.ctx, f.student, FILE_A, NULL, NULL) == SDQ_OK);
        SDQT_THAT(sdq_model_load_int8(f.ctx, FOLDER, FILE_A, &m, NULL) == SDQ_OK, "%s",
                  sdq_error_text(f.ctx));
        if (m) answers(f.ctx, m, s, SDQ_INT8, int8);
        SDQT_BYTES(fake, int8, s->count * SIZE * 4);
        sdq_model_free(f.ctx, m);
        (void)remove(FILE_A);
    }
    free(fake);
    free(int8);
    sdq_states_free(f.ctx, s);
    close_fixture(&f);
}

/* Weights of 4 bits: scales, biases and the weights themselves are trained. */
static void test_training_four(int tier) {
    sdq_recipe r = sdq_recipe_default();
    r.weight_bits = 4;
    trains(tier, r, 0, 5e-3f, 0.7);
    r.weight_group = 5;
    r.train_set = SDQ_TRAIN_ALL;
    trains(tier, r, 0, 1e-3f, 0.8);
}

static void test_training(int tier) {
    sdq_recipe r = sdq_recipe_default();
    trains(tier, sdq_recipe_default(), 0, 5e-3f, 0.6);
    trains(tier, sdq_recipe_default(), 1, 5e-3f, 0.95);
    trains(tier, static_recipe(), 0, 5e-3f, 0.6);
    r.attention_bits = 8;
    trains(tier, r, 0, 5e-3f, 0.6);
    r = sdq_recipe_default();
    r.train_set = SDQ_TRAIN_LORA;
    r.lora_rank = 2;
    trains(tier, r, 0, 5e-3f, 0.75);
    r.train_set = SDQ_TRAIN_ALL;
    r.last_blocks = 5;
    trains(tier, r, 0, 1e-3f, 0.9);
    r = sdq_recipe_default();
    r.attention_bits = 16;
    trains(tier, r, 0, 5e-3f, 0.6);
}

/* ---- going on without calibrating again ---- */

/* A run of a process of its own, to `steps`; then the int8 file. */
static sdq_status resume_run(int tier, const sdq_recipe *r, int calibrate, size_t steps,
                             const char *state, const char *out) {
    fixture f;
    sdq_states *s;
    sdq_optim_desc od;
    sdq_optim *o = NULL;
    sdq_fit_desc fd;
    sdq_distill_task t;
    sdq_status st;
    open_fixture(&f, tier, r);
    s = collect(&f);
    memset(&od, 0, sizeof od);
    memset(&fd, 0, sizeof fd);
    memset(&t, 0, sizeof t);
    if (r->train_set == SDQ_TRAIN_LORA) SDQT_CHECK(sdq_model_freeze(f.ctx, f.student) == SDQ_OK);
    if (calibrate)
        SDQT_CHECK(sdq_calibrate_states(f.ctx, f.student, s, 5, r->bias_correction, NULL, NULL)
                   == SDQ_OK);
    od.lr = 1e-3f;
    od.ema = 0.9f;
    t.student = f.student;
    t.states = s;
    t.teacher_loss = 1;
    t.batch = 4;
    fd.steps = steps;
    fd.seed = 3;
    fd.state = state;
    SDQT_CHECK(sdq_optim_create(f.ctx, &od, &o) == SDQ_OK);
    SDQT_CHECK(sdq_optim_add_student(f.ctx, o, f.student, r, 20) == SDQ_OK);
    sdq_model_observe(f.student, r->moving > 0.0f);
    st = sdq_fit(f.ctx, o, &fd, sdq_distill_task_loss, &t);
    sdq_optim_free(f.ctx, o);
    if (st != SDQ_OK)
        SDQT_THAT(strstr(sdq_error_text(f.ctx), "another model or recipe: ")
                  && strstr(sdq_error_text(f.ctx), "teacher_loss=1 there, teacher_loss=2 here"),
                  "%s", sdq_error_text(f.ctx));
    if (st == SDQ_OK && out)
        SDQT_CHECK(sdq_model_convert(f.ctx, f.student) == SDQ_OK
                   && sdq_model_save_int8(f.ctx, f.student, out, NULL, NULL) == SDQ_OK);
    sdq_states_free(f.ctx, s);
    close_fixture(&f);
    return st;
}
static void same_files(const char *a, const char *b, const char *what) {
    size_t n, m;
    unsigned char *x = file_bytes(a, &n), *y = file_bytes(b, &m);
    SDQT_THAT(n > 0 && n == m && memcmp(x, y, n) == 0, "%s: %zu and %zu bytes", what, n, m);
    free(x);
    free(y);
}

/* Stopped before the first step, and after two: the ranges and biases come from the state. */
static void resumes(int tier, sdq_recipe r) {
    static const char *const state[2] = {"test_distill.s.tmp", "test_distill.t.tmp"};
    const char *const out[2] = {FILE_A, FILE_B};
    SDQT_CHECK(resume_run(tier, &r, 1, 4, state[0], out[0]) == SDQ_OK);
    SDQT_CHECK(resume_run(tier, &r, 1, 0, state[1], NULL) == SDQ_OK);
    SDQT_CHECK(resume_run(tier, &r, 0, 2, state[1], NULL) == SDQ_OK);
    SDQT_CHECK(resume_run(tier, &r, 0, 4, state[1], out[1]) == SDQ_OK);
    same_files(state[0], state[1], "state");
    same_files(out[0], out[1], "int8 file");
    r.teacher_loss = 2;
    SDQT_CHECK(resume_run(tier, &r, 1, 5, state[1], NULL) == SDQ_ERR_FORMAT);
    (void)remove(state[0]);
    (void)remove(state[1]);
    (void)remove(out[0]);
    (void)remove(out[1]);
}
static void test_resume(int tier) {
    sdq_recipe r = sdq_recipe_default();
    resumes(tier, r);
    r = static_recipe();                /* learned scales, whose zero points are fixed */
    resumes(tier, r);
    r.train_set = SDQ_TRAIN_SCALES;     /* biases are corrected and not trained */
    resumes(tier, r);
    r.train_set = SDQ_TRAIN_ALL;        /* scales of 4 bits are made of the weights before training */
    r.last_blocks = 3;
    r.learn_scales = 0;
    r.bias_correction = 0;
    r.weight_bits = 4;
    resumes(tier, r);
    r = static_recipe();
    r.train_set = SDQ_TRAIN_LORA;
    r.lora_rank = 2;
    resumes(tier, r);
    r.train_set = SDQ_TRAIN_ALL;        /* ranges of inputs and weights go on moving */
    r.moving = 0.1f;
    r.weight_scale = SDQ_WEIGHT_MOVING;
    r.learn_scales = 0;
    resumes(tier, r);
}

/* ---- the schedule ---- */

static double sigma_of(const sdq_scheduler *s, float t) {
    const double a = (double)sdq_scheduler_alphas_cumprod(s)[t > 0 ? (size_t)t : 0];
    return sqrt((1 - a) / a);
}

/* Half of the sum of both prompts' PSNR against float, drawn as the list says. */
static double psnr_of(fixture *f, const sdq_image *ref, const unsigned char *is_float) {
    double sum = 0;
    size_t i;
    for (i = 0; i < PROMPTS; i++) {
        sdq_txt2img_desc d = f->d;
        sdq_image img;
        d.prompt = prompts[i];
        d.seed += i;
        d.precision = SDQ_PRECISION_LIST;
        d.is_float = is_float;
        if (sdq_txt2img(f->ctx, f->p, &d, &img) != SDQ_OK) exit(2);
        sum += sdq_psnr(img.px, ref[i].px, img.w * img.h * img.c);
        sdq_image_free(f->ctx, &img);
    }
    return sum / PROMPTS;
}
static size_t floats_of(const sdq_policy *p) {
    size_t i, n = 0;
    for (i = 0; i < p->count; i++) n += p->is_float[i];
    return n;
}

/* The `take` evaluations with the largest error times step^power, in float. */
static void worst(const double *error, const double *step, int power, size_t take,
                  unsigned char *is_float) {
    size_t i, k, best;
    memset(is_float, 0, EVALS);
    for (k = 0; k < take; k++) {
        for (i = 0, best = EVALS; i < EVALS; i++)
            if (!is_float[i] && (best == EVALS || error[i] * pow(step[i], power)
                                                      > error[best] * pow(step[best], power)))
                best = i;
        is_float[best] = 1;
    }
}

/* The errors are those of int8 on the float trajectory; the best of three rankings is taken. */
static void ranking(fixture *f, const sdq_image *ref) {
    double errors[EVALS], want[EVALS], step[EVALS], reached = -1, best;
    unsigned char list[EVALS];
    float *y = (float *)malloc(STATES * SIZE * 4);
    sdq_states *s = collect(f);
    sdq_scheduler_desc sd;
    sdq_scheduler *sch = NULL;
    sdq_policy p;
    size_t i, take, same, power;
    if (!y) exit(2);
    answers(f->ctx, f->p->unet_int8, s, SDQ_INT8, y);
    SDQT_CHECK(sdq_pipeline_scheduler(f->ctx, f->p, &f->d, &sd) == SDQ_OK
               && sdq_scheduler_create(f->ctx, &sd, &sch) == SDQ_OK);
    memset(want, 0, sizeof want);
    for (i = 0; i < s->count; i++)
        want[i / 2 % EVALS] += mse_of(y + i * SIZE, s->eps + i * SIZE, SIZE) / (2 * PROMPTS);
    for (take = 2; take <= EVALS; take += 2) {
        SDQT_THAT(sdq_schedule_search(f->ctx, f->p, prompts, PROMPTS, &f->d, 0, take, &p, errors,
                                      &reached) == SDQ_OK, "%s", sdq_error_text(f->ctx));
        SDQT_CHECK(p.count == EVALS && p.steps == STEPS && p.scheduler == SDQ_PNDM
                   && p.guidance == f->d.guidance && floats_of(&p) == take);
        SDQT_NEAR(reached, psnr_of(f, ref, p.is_float), 1e-9);
        for (i = 0; i < EVALS; i++) {
            const double next = i + 1 < EVALS ? sigma_of(sch, s->time[(i + 1) * 2]) : 0;
            SDQT_NEAR(errors[i], want[i], 1e-5 * want[i]);
            SDQT_CHECK(p.timestep[i] == s->time[i * 2] && want[i] > 0);
            step[i] = fabs(sigma_of(sch, s->time[i * 2]) - next);
        }
        for (power = same = 0, best = -1; power < 3; power++) {
            double psnr;
            worst(want, step, (int)power, take, list);
            psnr = psnr_of(f, ref, list);
            same += fabs(psnr - reached) < 1e-9 && !memcmp(list, p.is_float, EVALS);
            best = psnr > best ? psnr : best;
        }
        SDQT_THAT(same > 0 && fabs(best - reached) < 1e-9, "%zu float: %g, best ranking %g", take, reached,
                  best);
    }
    SDQT_CHECK(reached == 99);                  /* all of them */
    sdq_scheduler_free(f->ctx, sch);
    sdq_states_free(f->ctx, s);
    free(y);
}

/* The policy comes back; a file with one changed bit does not. */
static void round_trip(fixture *f, const sdq_policy *p, size_t damages) {
    sdq_model *m = NULL;
    sdq_policy back;
    unsigned char *bytes;
    size_t n, i, at, header = 0, refusals = 0;
    SDQT_CHECK(sdq_model_save_int8(f->ctx, f->p->unet_int8, FILE_B, p, "words") == SDQ_OK);
    memset(&back, 0xa5, sizeof back);
    SDQT_THAT(sdq_model_load_int8(f->ctx, FOLDER, FILE_B, &m, &back) == SDQ_OK, "%s",
              sdq_error_text(f->ctx));
    SDQT_CHECK(back.scheduler == p->scheduler && back.steps == p->steps && back.count == p->count
               && back.guidance == p->guidance);
    for (i = 0; i < 1001; i++)
        SDQT_CHECK(back.timestep[i] == p->timestep[i] && back.is_float[i] == p->is_float[i]);
    sdq_model_free(f->ctx, m);
    bytes = sdqt_read(FILE_B, &n);
    for (i = 0; i < 8; i++) header |= (size_t)bytes[i] << (8 * i);
    SDQT_CHECK(n > header + 5000 && header > 1000);
    for (i = 0; i < damages; i++) {          /* the length, the header, the arrays, the last byte */
        const unsigned char bit = (unsigned char)(1u << sdqt_below(8));
        at = i < 4 ? i : i == 4 ? n - 1 : i % 2 ? 8 + sdqt_below(header)
           : 8 + header + sdqt_below(n - 8 - header);
        bytes[at] ^= bit;
        sdqt_write(FILE_A, bytes, n);
        bytes[at] ^= bit;
        m = NULL;
        refusals += sdq_model_load_int8(f->ctx, FOLDER, FILE_A, &m, &back) != SDQ_OK && !m;
        SDQT_THAT(!m && strstr(sdq_error_text(f->ctx), FILE_A), "byte %zu ^ %d of %zu: '%s'", at,
                  bit, n, sdq_error_text(f->ctx));
        sdq_model_free(f->ctx, m);
        sdq_clear_error(f->ctx);
    }
    SDQT_CHECK(refusals == damages);
    free(bytes);
    (void)remove(FILE_A);
    (void)remove(FILE_B);
}

static void test_schedule(int tier) {
    static const double target[] = {10, 40, 50, 60, 98.9};
    const sdq_recipe r = sdq_recipe_default();
    fixture f;
    sdq_policy p;
    sdq_image a, b, ref[PROMPTS];
    double reached;
    size_t i, some = 0;
    open_fixture(&f, tier, &r);
    SDQT_CHECK(sdq_schedule_search(f.ctx, f.p, prompts, PROMPTS, &f.d, 30, 0, &p, NULL, NULL)
               == SDQ_ERR_ARGUMENT && strstr(sdq_error_text(f.ctx), "int8"));
    sdq_clear_error(f.ctx);
    SDQT_CHECK(sdq_model_convert(f.ctx, f.student) == SDQ_OK);
    f.p->unet_int8 = f.student;
    f.student = NULL;
    for (i = 0; i < PROMPTS; i++) {
        sdq_txt2img_desc d = f.d;
        d.prompt = prompts[i];
        d.seed += i;
        if (sdq_txt2img(f.ctx, f.p, &d, &ref[i]) != SDQ_OK) exit(2);
    }
    ranking(&f, ref);
    for (i = 0; i < sizeof target / sizeof target[0]; i++) {
        SDQT_CHECK(sdq_schedule_search(f.ctx, f.p, prompts, PROMPTS, &f.d, target[i], 0, &p, NULL,
                                       &reached) == SDQ_OK);
        SDQT_THAT(reached >= target[i] || floats_of(&p) == EVALS, "target %g: %g", target[i],
                  reached);
        SDQT_NEAR(reached, psnr_of(&f, ref, p.is_float), 1e-9);
        some += floats_of(&p) > 0 && floats_of(&p) < EVALS;
        if (i == 0) SDQT_CHECK(floats_of(&p) == 0);
    }
    SDQT_THAT(some > 0, "no target needs some evaluations in float");
    SDQT_CHECK(sdq_schedule_search(f.ctx, f.p, prompts, PROMPTS, &f.d, 98.9, 2, &p, NULL, &reached)
               == SDQ_OK && floats_of(&p) == 2 && reached < 98.9);       /* a limit is a limit */
    round_trip(&f, &p, 28);
    f.d.scheduler = SDQ_EULER;          /* timesteps that are not integers */
    f.d.karras = 1;
    SDQT_CHECK(sdq_schedule_search(f.ctx, f.p, prompts, PROMPTS, &f.d, 0, 1, &p, NULL, NULL)
               == SDQ_OK && floats_of(&p) == 1 && p.scheduler == SDQ_EULER && p.count == STEPS);
    SDQT_CHECK(p.timestep[1] != floorf(p.timestep[1]));
    round_trip(&f, &p, 0);
    f.p->policy = SDQ__NEW(f.ctx, sdq_policy);      /* drawing by the policy is drawing by the list */
    *f.p->policy = p;
    f.d.precision = SDQ_PRECISION_POLICY;
    SDQT_CHECK(sdq_txt2img(f.ctx, f.p, &f.d, &a) == SDQ_OK);
    f.d.precision = SDQ_PRECISION_LIST;
    f.d.is_float = p.is_float;
    SDQT_CHECK(sdq_txt2img(f.ctx, f.p, &f.d, &b) == SDQ_OK);
    SDQT_BYTES(a.px, b.px, a.w * a.h * a.c);
    sdq_image_free(f.ctx, &a);
    sdq_image_free(f.ctx, &b);
    for (i = 0; i < PROMPTS; i++) sdq_image_free(f.ctx, &ref[i]);
    close_fixture(&f);
}

/* ---- caches ---- */

#define CACHE "test_distill.cache.tmp"
#define PICTURES "test_distill.pictures.tmp"

typedef struct counter { size_t calls, stop_at; } counter;
static int count_calls(void *user, const char *stage, size_t i, size_t n, double value) {
    counter *c = (counter *)user;
    (void)stage; (void)i; (void)n; (void)value;
    return ++c->calls == c->stop_at;
}
static int same_states(const sdq_states *a, const sdq_states *b) {
    size_t i;
    if (!a || !b || a->count != b->count || a->size != b->size || a->branches != b->branches)
        return 0;
    for (i = 0; i < a->count; i++)
        if (memcmp(a->context + a->context_of[i] * a->context_size,
                   b->context + b->context_of[i] * b->context_size, a->context_size * 4) != 0)
            return 0;
    return memcmp(a->x, b->x, a->count * a->size * 4) == 0
        && memcmp(a->eps, b->eps, a->count * a->size * 4) == 0
        && memcmp(a->time, b->time, a->count * 4) == 0;
}
/* Change one byte of a file, so many from its end. */
static void damage(const char *path, long from_end) {
    FILE *f = fopen(path, "r+b");
    int c;
    if (!f || fseek(f, -from_end, SEEK_END) != 0) exit(2);
    c = fgetc(f);
    (void)fseek(f, -from_end, SEEK_END);
    (void)fputc(c ^ 1, f);
    (void)fclose(f);
}
static sdq_states *cached(fixture *f, counter *c, sdq_status want, const char *text) {
    sdq_states *s = NULL;
    sdq_status st;
    f->d.progress = count_calls;
    f->d.user = c;
    c->calls = 0;
    st = sdq_states_cache(f->ctx, f->p, prompts, PROMPTS, &f->d, CACHE, &s);
    SDQT_THAT(st == want && (st == SDQ_OK) == (s != NULL)
              && strstr(sdq_error_text(f->ctx), text) != NULL, "status %d: %s", (int)st,
              sdq_error_text(f->ctx));
    sdq_clear_error(f->ctx);
    return s;
}

/* States through a file are those without; what is there is not computed again; a file of other
 * states is refused. */
static void test_state_cache(int tier) {
    const sdq_recipe r = sdq_recipe_default();
    fixture f;
    counter c = {0, 0};
    sdq_states *s, *t, *held;
    (void)remove(CACHE);
    (void)remove(CACHE ".part");
    open_fixture(&f, tier, &r);
    s = collect(&f);
    c.stop_at = EVALS + 1;              /* in the second prompt */
    sdq_states_free(f.ctx, cached(&f, &c, SDQ_ERR_CANCELLED, ""));
    SDQT_CHECK(c.calls == EVALS + 1);
    c.stop_at = 0;
    t = cached(&f, &c, SDQ_OK, "");
    SDQT_THAT(c.calls == EVALS && same_states(s, t), "%zu evaluations after a stop", c.calls);
    sdq_states_free(f.ctx, t);
    t = cached(&f, &c, SDQ_OK, "");
    SDQT_THAT(c.calls == 0 && same_states(s, t), "%zu evaluations of a complete file", c.calls);
    sdq_states_free(f.ctx, t);
    SDQT_CHECK(rename(CACHE, CACHE ".part") == 0);      /* as if it had stopped before the name */
    damage(CACHE ".part", 100);
    t = cached(&f, &c, SDQ_OK, "");
    SDQT_THAT(c.calls == EVALS && same_states(s, t), "%zu evaluations for a bad record", c.calls);
    f.d.seed++;
    sdq_states_free(f.ctx, cached(&f, &c, SDQ_ERR_FORMAT, "stale"));
    f.d.seed--;
    damage(CACHE, 100);                 /* of the last record */
    sdq_states_free(f.ctx, cached(&f, &c, SDQ_ERR_FORMAT, "record 1 is damaged"));
    damage(CACHE, 100);
    SDQT_CHECK(sdq_states_hold_out(f.ctx, t, PROMPTS, &held) == SDQ_ERR_ARGUMENT && !held);
    sdq_clear_error(f.ctx);
    SDQT_CHECK(sdq_states_hold_out(f.ctx, t, 1, &held) == SDQ_OK
               && sdq_states_count(t) == STATES / 2 && sdq_states_count(held) == STATES / 2);
    SDQT_BYTES(held->x, s->x + STATES / 2 * SIZE, STATES / 2 * SIZE * 4);
    SDQT_BYTES(held->context + held->context_of[1] * 144, s->context + 3 * 144, 144 * 4);
    sdq_states_free(f.ctx, held);
    sdq_states_free(f.ctx, t);
    sdq_states_free(f.ctx, s);
    close_fixture(&f);
    SDQT_CHECK(remove(CACHE) == 0 && remove(CACHE ".part") != 0);
}

/* Three pictures that are not square, with captions. */
static void draw_pictures(int other) {
    size_t i, k;
    char name[64];
    (void)mkdir(PICTURES, 0777);
    for (i = 0; i < 3; i++) {
        FILE *f;
        (void)snprintf(name, sizeof name, PICTURES "/%zu.ppm", i);
        if (!(f = fopen(name, "wb"))) exit(2);
        fprintf(f, "P6\n19 26\n255\n");
        for (k = 0; k < 19 * 26 * 3; k++)
            fputc((int)((i * 31 + k * k * 7 + (i == 2 && other)) & 255), f);
        fclose(f);
        (void)snprintf(name, sizeof name, PICTURES "/%zu.txt", i);
        if (!(f = fopen(name, "wb"))) exit(2);
        fprintf(f, "picture %zu", i);
        fclose(f);
    }
}
static void drop_pictures(void) {
    size_t i;
    char name[64];
    for (i = 0; i < 6; i++) {
        (void)snprintf(name, sizeof name, PICTURES "/%zu.%s", i / 2, i % 2 ? "txt" : "ppm");
        (void)remove(name);
    }
    (void)rmdir(PICTURES);
}

/* Latents and text states from a file give the batches of pictures and encoders in memory. */
static void test_latent_cache(int tier) {
    const sdq_recipe r = sdq_recipe_default();
    fixture f;
    counter c = {0, 2};
    sdq_dataset *data = NULL;
    sdq_samples *a = NULL, *b = NULL, *held = NULL;
    sdq_scheduler *sch = NULL;
    sdq_diffusion_task t;
    sdq__batch x, y;
    sdq_rng rng;
    size_t i, drawn[3] = {0, 0, 0};
    (void)remove(CACHE);
    (void)remove(CACHE ".part");
    draw_pictures(0);
    open_fixture(&f, tier, &r);
    memset(&t, 0, sizeof t);
    SDQT_CHECK(sdq_dataset_open(f.ctx, PICTURES, &data) == SDQ_OK
               && sdq_scheduler_create(f.ctx, NULL, &sch) == SDQ_OK
               && sdq_samples_load(f.ctx, data, 16, f.p->tokenizer, &a) == SDQ_OK
               && sdq_samples_encode(f.ctx, a, f.p->vae, NULL, NULL) == SDQ_OK);
    SDQT_CHECK(sdq_samples_cache(f.ctx, data, 16, f.p->tokenizer, f.p->vae, f.p->text, CACHE,
                                 count_calls, &c, &b) == SDQ_ERR_CANCELLED && !b);
    sdq_clear_error(f.ctx);
    c.calls = c.stop_at = 0;
    SDQT_THAT(sdq_samples_cache(f.ctx, data, 16, f.p->tokenizer, f.p->vae, f.p->text, CACHE,
                                count_calls, &c, &b) == SDQ_OK && c.calls == 1, "%s",
              sdq_error_text(f.ctx));
    t.scheduler = sch;
    t.scaling = 0.2f;
    t.batch = 8;
    t.drop = 0.3f;
    for (i = 0; a && b && i < 2; i++) {
        sdq_rng_init(&rng, SDQ_RNG_TORCH, 3);
        t.samples = i ? b : a;
        t.text = i ? NULL : f.p->text;
        SDQT_CHECK(sdq__task_batch(f.ctx, &t, &rng, i ? &y : &x) == SDQ_OK);
    }
    SDQT_BYTES(x.noisy->data, y.noisy->data, sdq_tensor_count(x.noisy) * 4);
    SDQT_BYTES(x.target->data, y.target->data, sdq_tensor_count(x.target) * 4);
    SDQT_BYTES(x.context->data, y.context->data, sdq_tensor_count(x.context) * 4);
    t.samples = a;              /* without a text encoder, samples without states are refused */
    SDQT_CHECK(sdq__task_batch(f.ctx, &t, &rng, &x) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(f.ctx);
    SDQT_CHECK(sdq_samples_hold_out(f.ctx, b, 3, &held) == SDQ_ERR_ARGUMENT && !held);
    sdq_clear_error(f.ctx);
    SDQT_CHECK(sdq_samples_hold_out(f.ctx, b, 1, &held) == SDQ_OK);
    for (i = 0; i < 60 && held; i++) {
        drawn[sdq__task_draw(b, &rng)]++;
        SDQT_CHECK(sdq__task_draw(held, &rng) == 2);
    }
    SDQT_CHECK(drawn[0] > 10 && drawn[1] > 10 && drawn[2] == 0);
    sdq_samples_free(f.ctx, held);
    sdq_samples_free(f.ctx, b);
    draw_pictures(1);           /* a byte of a picture is another one: the file is stale */
    SDQT_CHECK(sdq_samples_cache(f.ctx, data, 16, f.p->tokenizer, f.p->vae, f.p->text, CACHE, NULL,
                                 NULL, &b) == SDQ_ERR_FORMAT
               && strstr(sdq_error_text(f.ctx), "stale") != NULL);
    sdq_clear_error(f.ctx);
    sdq_states_free(f.ctx, cached(&f, &c, SDQ_ERR_FORMAT, "not a cache of states"));
    sdq_samples_free(f.ctx, a);
    sdq_scheduler_free(f.ctx, sch);
    sdq_dataset_free(f.ctx, data);
    close_fixture(&f);
    drop_pictures();
    SDQT_CHECK(remove(CACHE) == 0);
}

static const sdqt_case cases[] = {
    {"state_cache", test_state_cache, 0},
    {"latent_cache", test_latent_cache, 0},
    {"states", test_states, 0},
    {"loss", test_loss, 0},
    {"calibrate_again", test_calibrate_again, 0},
    {"convert_refused", test_convert_refused, 0},
    {"outputs", test_outputs, 0},
    {"refusals", test_refusals, 0},
    {"coherent_gradient", test_coherent_gradient, 0},
    {"train_sets", test_train_sets, 0},
    {"last_blocks", test_last_blocks, 0},
    {"delta", test_delta, 1},
    {"follow", test_follow, 1},
    {"range_gradient", test_range_gradient, 1},
    {"training", test_training, 0},
    {"training_four", test_training_four, 0},
    {"resume", test_resume, 0},
    {"schedule", test_schedule, 0},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
