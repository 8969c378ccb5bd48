/* train_full - a training step of a whole UNet: seconds of each part, and the peak of memory.
 *
 *     cc -O2 -fopenmp -I. tools/train_full.c -o build/train_full -lm
 *     build/train_full MODEL [key=value ..]
 *
 * MODEL is a diffusers folder, such as the random one of `random_sd`, or a single file. Every step
 * does what quantization-aware training with distillation does: the float teacher on a noisy
 * latent, the student in FAKE mode with checkpointing, the loss MSE(student, teacher)
 * + MSE(student, noise), backward, clipping, AdamW. One line per step, the times in seconds:
 *
 *     step 1: teacher 1.9 forward 2.1 backward 7.6 optimizer 1.3 total 12.9 loss 0.8 norm 1.2 peak 14.9 GiB
 *
 *   steps=3            threads=0 (all)      side=64 (of the latent)   batch=1     seed=1
 *   recipe=default     or reference, or static: static ranges, and every layer is quantized
 *   set=all            or small, scales, ranges
 *   mode=fake          or float: no quantization
 *   lr=1e-5            ema=0 (of the weights)    moments8=0 or 1
 */
#define SDQ_IMPLEMENTATION
#include "sdq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

typedef struct options {
    const char *model;
    long steps, threads, side, batch, seed;
    double lr, ema;
    int moments8;
    sdq_recipe recipe;
    sdq_mode mode;
} options;

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double peak_gib(void) {
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (double)r.ru_maxrss / (1024.0 * 1024.0);
}

static int word_of(const char *value, const char *const *words, int n) {
    int i;
    for (i = 0; i < n && strcmp(value, words[i]) != 0; i++) {}
    return i;
}

/* What the peer of tools/peers/train.py does. */
static void set_static(sdq_recipe *r) {
    r->range_linear = r->range_conv = SDQ_RANGE_STATIC;
    r->quantize_edges = r->quantize_time = r->quantize_context = r->quantize_shortcuts = 1;
    r->weight_scale = SDQ_WEIGHT_CURRENT;
    r->learn_scales = 0;
}

/* 0 when it is not an option. */
static int set_option(options *o, const char *arg) {
    static const char *const sets[] = {"all", "small", "scales", "ranges"};
    const char *v = strchr(arg, '=');
    const size_t n = v ? (size_t)(v++ - arg) : 0;
#define IS(key) (n == strlen(key) && memcmp(arg, key, n) == 0)
    if (!v) return 0;
    if (IS("steps")) o->steps = atol(v);
    else if (IS("threads")) o->threads = atol(v);
    else if (IS("side")) o->side = atol(v);
    else if (IS("batch")) o->batch = atol(v);
    else if (IS("seed")) o->seed = atol(v);
    else if (IS("lr")) o->lr = atof(v);
    else if (IS("ema")) o->ema = atof(v);
    else if (IS("moments8")) o->moments8 = atoi(v);
    else if (IS("recipe")) {
        const sdq_train_set set = o->recipe.train_set;
        o->recipe = strcmp(v, "reference") ? sdq_recipe_default() : sdq_recipe_reference();
        if (!strcmp(v, "static")) set_static(&o->recipe);
        o->recipe.train_set = set;
    } else if (IS("set")) {
        o->recipe.train_set = (sdq_train_set)word_of(v, sets, 4);
        return o->recipe.train_set < SDQ_TRAIN_SET_COUNT;
    } else if (IS("mode")) o->mode = strcmp(v, "float") ? SDQ_FAKE : SDQ_FLOAT;
    else return 0;
#undef IS
    return 1;
}

typedef struct run {
    sdq_ctx *ctx;
    sdq_model *teacher, *student;
    sdq_optim *optim;
    sdq_unet_input in;
    float time[64];
    sdq_tensor *noise;
} run;

static void fill_batch(run *r, const options *o, sdq_rng *rng) {
    const size_t n = (size_t)o->batch, side = (size_t)o->side;
    const sdq_model_info info = sdq_model_get_info(r->student);
    size_t i;
    memset(&r->in, 0, sizeof r->in);
    r->in.sample = sdq_tensor_4d(r->ctx, n, side, side, info.in);
    r->in.context = sdq_tensor_3d(r->ctx, n, 77, info.context);
    r->noise = sdq_tensor_4d(r->ctx, n, side, side, info.out);
    if (!r->in.sample || !r->in.context || !r->noise) return;
    sdq_rng_normal(rng, sdq_f32(r->in.sample), sdq_tensor_count(r->in.sample));
    sdq_rng_normal(rng, sdq_f32(r->in.context), sdq_tensor_count(r->in.context));
    sdq_rng_normal(rng, sdq_f32(r->noise), sdq_tensor_count(r->noise));
    for (i = 0; i < n; i++) r->time[i] = (float)sdq_rng_below(rng, 1000);
    r->in.timesteps = r->time;
}

static void step(run *r, const options *o, long number) {
    const sdq_mark mark = sdq_arena_mark(r->ctx);
    double t[5], loss = 0.0;
    sdq_tensor *target, *y;
    sdq_rng rng;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, (uint64_t)(o->seed * 1000 + number));
    fill_batch(r, o, &rng);
    t[0] = seconds();
    target = sdq_unet_forward(r->ctx, r->teacher, &r->in, SDQ_FLOAT);
    t[1] = seconds();
    sdq_tape_begin(r->ctx);
    r->in.checkpoint = 1;
    y = sdq_unet_forward(r->ctx, r->student, &r->in, o->mode);
    y = sdq_add(r->ctx, sdq_mse(r->ctx, y, target, NULL), sdq_mse(r->ctx, y, r->noise, NULL));
    if (y) loss = (double)sdq_f32(y)[0];
    t[2] = seconds();
    (void)sdq_backward(r->ctx, y);
    sdq_tape_end(r->ctx);
    sdq_arena_release(r->ctx, mark);
    t[3] = seconds();
    (void)sdq_optim_step(r->ctx, r->optim);
    t[4] = seconds();
    printf("step %ld: teacher %.2f forward %.2f backward %.2f optimizer %.2f total %.2f "
           "loss %.6f norm %.4f peak %.2f GiB\n", number, t[1] - t[0], t[2] - t[1], t[3] - t[2],
           t[4] - t[3], t[4] - t[0], loss, sdq_optim_grad_norm(r->optim), peak_gib());
    fflush(stdout);
}

static sdq_status prepare(run *r, const options *o) {
    const sdq_mark mark = sdq_arena_mark(r->ctx);
    sdq_optim_desc d;
    sdq_rng rng;
    sdq_status st = sdq__md_load(r->ctx, o->model, SDQ_PART_UNET, 1, &r->teacher);
    if (st == SDQ_OK) st = sdq_model_load(r->ctx, o->model, SDQ_PART_UNET, &r->student);
    if (st == SDQ_OK) st = sdq_recipe_apply(r->ctx, r->student, &o->recipe, NULL);
    if (st != SDQ_OK) return st;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, (uint64_t)o->seed);
    fill_batch(r, o, &rng);
    sdq_model_observe(r->student, 1);       /* ranges, where they are static */
    (void)sdq_unet_forward(r->ctx, r->student, &r->in,
                           o->recipe.calibrate_on_data ? SDQ_FAKE : SDQ_FLOAT);
    sdq_model_observe(r->student, o->recipe.moving > 0.0f);
    sdq_arena_release(r->ctx, mark);
    memset(&d, 0, sizeof d);
    d.lr = (float)o->lr;
    d.clip = 1.0f;
    d.weight_decay = 1e-2f;
    d.ema = (float)o->ema;
    d.moments8 = o->moments8;
    st = sdq_optim_create(r->ctx, &d, &r->optim);
    if (st != SDQ_OK) return st;
    return sdq_optim_add_student(r->ctx, r->optim, r->student, &o->recipe, 1000.0f);
}

int main(int argc, char **argv) {
    sdq_ctx_desc d;
    options o;
    run r;
    long i;
    memset(&o, 0, sizeof o);
    memset(&r, 0, sizeof r);
    memset(&d, 0, sizeof d);
    o.steps = 3; o.side = 64; o.batch = 1; o.seed = 1;
    o.lr = 1e-5;
    o.mode = SDQ_FAKE;
    o.recipe = sdq_recipe_default();
    o.recipe.train_set = SDQ_TRAIN_ALL;
    for (i = 2; i < argc; i++)
        if (!set_option(&o, argv[i])) {
            fprintf(stderr, "train_full: %s is no option; they are listed in %s\n", argv[i],
                    __FILE__);
            return 2;
        }
    if (argc < 2 || o.batch < 1 || o.batch > 64) {
        fprintf(stderr, "usage: train_full MODEL [key=value ..]\n");
        return 2;
    }
    o.model = argv[1];
    d.threads = (int)o.threads;
    if (sdq_ctx_create(&d, &r.ctx) != SDQ_OK) return 1;
    if (prepare(&r, &o) == SDQ_OK) printf("loaded: peak %.2f GiB\n", peak_gib());
    for (i = 1; i <= o.steps && sdq_last_error(r.ctx) == SDQ_OK; i++) step(&r, &o, i);
    if (sdq_last_error(r.ctx) != SDQ_OK)
        fprintf(stderr, "train_full: %s\n", sdq_error_text(r.ctx));
    i = sdq_last_error(r.ctx) != SDQ_OK;
    sdq_optim_free(r.ctx, r.optim);
    sdq_model_free(r.ctx, r.student);
    sdq_model_free(r.ctx, r.teacher);
    sdq_ctx_free(r.ctx);
    return (int)i;
}
