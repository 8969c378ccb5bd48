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
 *     step 1: teacher 1.90 forward 2.10 backward 7.60 optimizer 1.30 total 12.90 ...
 *
 *   steps=3            threads=0 (all)      side=64 (of the latent)   batch=1     seed=1
 *   recipe=default     or reference, or static: static ranges, and every layer is quantized
 *   set=all            or small, scales, ranges, lora      rank=8    last=0 (blocks; 0: all)
 *   noise=1            weight of MSE(student, noise)
 *   validate=0         batches that are not trained on: MSE(student, teacher) before, after every
 *                      tenth step and at the end
 *   packed=0           or 1: the student's weights stay packed halves; not with set=all
 *   mode=fake          or float: no quantization
 *   lr=1e-5            ema=0 (of the weights)    moments8=0 or 1
 *
 *     build/train_full MODEL in=FILE gradients=FILE
 *
 * is for tools/check_gradients.py: the gradient of MSE(unet(sample), target) in float with respect
 * to every parameter, as safetensors in diffusers' layout. in: F32 sample [1,c,h,w], timestep [1],
 * encoder_hidden_states [1,t,d], target [1,c,h,w].
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE     /* getrusage, clock_gettime */
#endif
#define SDQ_IMPLEMENTATION
#include "sdq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

typedef struct options {
    const char *model, *in, *gradients;
    long steps, threads, side, batch, seed, validate;
    double lr, ema, noise;
    int moments8, packed;
    sdq_recipe recipe;
    sdq_mode mode;
} options;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
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
    static const char *const sets[] = {"all", "small", "scales", "ranges", "lora"};
    const char *v = strchr(arg, '=');
    const size_t n = v ? (size_t)(v++ - arg) : 0;
#define IS(key) (n == strlen(key) && memcmp(arg, key, n) == 0)
    if (!v) return 0;
    if (IS("in")) o->in = v;
    else if (IS("gradients")) o->gradients = v;
    else if (IS("steps")) o->steps = atol(v);
    else if (IS("threads")) o->threads = atol(v);
    else if (IS("side")) o->side = atol(v);
    else if (IS("batch")) o->batch = atol(v);
    else if (IS("seed")) o->seed = atol(v);
    else if (IS("lr")) o->lr = atof(v);
    else if (IS("ema")) o->ema = atof(v);
    else if (IS("noise")) o->noise = atof(v);
    else if (IS("validate")) o->validate = atol(v);
    else if (IS("rank")) o->recipe.lora_rank = (size_t)atol(v);
    else if (IS("last")) o->recipe.last_blocks = (size_t)atol(v);
    else if (IS("packed")) o->packed = atoi(v);
    else if (IS("moments8")) o->moments8 = atoi(v);
    else if (IS("recipe")) {
        const sdq_recipe old = o->recipe;
        o->recipe = strcmp(v, "reference") ? sdq_recipe_default() : sdq_recipe_reference();
        if (!strcmp(v, "static")) set_static(&o->recipe);
        o->recipe.train_set = old.train_set;
        o->recipe.lora_rank = old.lora_rank;
        o->recipe.last_blocks = old.last_blocks;
    } else if (IS("set")) {
        o->recipe.train_set = (sdq_train_set)word_of(v, sets, 5);
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
    {
        sdq_tensor *wanted = sdq_mse(r->ctx, y, target, NULL);
        y = sdq_scale(r->ctx, sdq_mse(r->ctx, y, r->noise, NULL), (float)o->noise);
        y = sdq_add(r->ctx, wanted, y);
    }
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

/* The mean over batches of their own seeds, far from those of the steps. */
static void validate(run *r, const options *o, long steps) {
    double sum = 0.0;
    long i;
    for (i = 0; i < o->validate; i++) {
        const sdq_mark mark = sdq_arena_mark(r->ctx);
        sdq_tensor *target, *y;
        sdq_rng rng;
        sdq_rng_init(&rng, SDQ_RNG_TORCH, (uint64_t)(1000000 + i));
        fill_batch(r, o, &rng);
        target = sdq_unet_forward(r->ctx, r->teacher, &r->in, SDQ_FLOAT);
        y = sdq_mse(r->ctx, sdq_unet_forward(r->ctx, r->student, &r->in, o->mode), target, NULL);
        if (y) sum += (double)sdq_f32(y)[0];
        sdq_arena_release(r->ctx, mark);
    }
    if (o->validate) printf("validation after %ld: %.6e\n", steps, sum / (double)o->validate);
    fflush(stdout);
}

static sdq_status prepare(run *r, const options *o) {
    const sdq_mark mark = sdq_arena_mark(r->ctx);
    sdq_optim_desc d;
    sdq_rng rng;
    sdq_status st = sdq_model_load_packed(r->ctx, o->model, SDQ_PART_UNET, &r->teacher);
    if (st == SDQ_OK)
        st = o->packed ? sdq_model_load_packed(r->ctx, o->model, SDQ_PART_UNET, &r->student)
                       : sdq_model_load(r->ctx, o->model, SDQ_PART_UNET, &r->student);
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

/* An array of a file; [1,c,h,w] becomes [1,h,w,c]. */
static sdq_tensor *read_array(sdq_ctx *ctx, const sdq_file *f, const char *name) {
    const sdq_entry *e = sdq_file_find(f, name);
    const size_t *d = e ? e->dim : NULL;
    sdq_tensor *t = NULL;
    size_t c, i;
    if (e && e->dtype == SDQ_F32 && e->rank == 4 && d[0] == 1)
        t = sdq_tensor_4d(ctx, 1, d[2], d[3], d[1]);
    else if (e && e->dtype == SDQ_F32 && e->rank > 0 && e->rank < 4)
        t = sdq_tensor_new(ctx, SDQ_F32, e->rank, d);
    if (!t) {
        fprintf(stderr, "train_full: no F32 array %s that can be used\n", name);
        exit(1);
    }
    if (e->rank < 4) memcpy(t->data, e->data, e->bytes);
    for (c = 0; e->rank == 4 && c < d[1]; c++)
        for (i = 0; i < d[2] * d[3]; i++)
            memcpy(sdq_f32(t) + i * d[1] + c, (const float *)e->data + c * d[2] * d[3] + i, 4);
    return t;
}

static sdq_status write_gradients(sdq_ctx *ctx, const sdq_model *m, const char *path) {
    const size_t n = sdq_model_param_count(m);
    sdq_entry *e = (sdq_entry *)calloc(n, sizeof *e);
    sdq_status st;
    size_t i, k;
    if (!e) return SDQ_ERR_OOM;
    for (i = 0; i < n; i++) {
        const sdq_tensor *g = sdq_model_param_copy(ctx, m, i, 1);
        (void)sdq_model_param(m, i, &e[i].name);
        e[i].dtype = SDQ_F32;
        e[i].rank = g ? g->rank : 0;
        for (k = 0; k < 8; k++) e[i].dim[k] = g && k < 4 ? g->dim[k] : 1;
        e[i].data = g ? g->data : NULL;
        e[i].bytes = g ? sdq_tensor_count(g) * sizeof(float) : 0;
    }
    st = sdq_last_error(ctx) == SDQ_OK ? sdq_file_write(ctx, path, e, n, NULL, 0)
                                       : sdq_last_error(ctx);
    free(e);
    return st;
}

static sdq_status gradients(sdq_ctx *ctx, const options *o) {
    sdq_file *f = NULL;
    sdq_model *m = NULL;
    sdq_unet_input in;
    sdq_tensor *target;
    sdq_status st = sdq_file_open(ctx, o->in, &f);
    size_t i;
    if (st == SDQ_OK) st = sdq_model_load(ctx, o->model, SDQ_PART_UNET, &m);
    if (st != SDQ_OK) return st;
    for (i = 0; i < sdq_model_param_count(m); i++) {
        sdq_tensor *p = sdq_model_param(m, i, NULL);
        p->grad = (float *)calloc(sdq_tensor_count(p), sizeof(float));
        p->needs_grad = 1;
    }
    memset(&in, 0, sizeof in);
    in.sample = read_array(ctx, f, "sample");
    in.timesteps = sdq_f32(read_array(ctx, f, "timestep"));
    in.context = read_array(ctx, f, "encoder_hidden_states");
    in.checkpoint = 1;
    target = read_array(ctx, f, "target");
    sdq_tape_begin(ctx);
    st = sdq_backward(ctx, sdq_mse(ctx, sdq_unet_forward(ctx, m, &in, SDQ_FLOAT), target, NULL));
    sdq_tape_end(ctx);
    if (st == SDQ_OK) st = write_gradients(ctx, m, o->gradients);
    for (i = 0; i < sdq_model_param_count(m); i++) free(sdq_model_param(m, i, NULL)->grad);
    sdq_model_free(ctx, m);
    sdq_file_close(ctx, f);
    return st;
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
    o.noise = 1.0;
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
    if (o.in && o.gradients) {
        if (gradients(r.ctx, &o) != SDQ_OK)
            fprintf(stderr, "train_full: %s\n", sdq_error_text(r.ctx));
        i = sdq_last_error(r.ctx) != SDQ_OK;
        sdq_ctx_free(r.ctx);
        return (int)i;
    }
    if (prepare(&r, &o) == SDQ_OK) printf("loaded: peak %.2f GiB\n", peak_gib());
    validate(&r, &o, 0);
    for (i = 1; i <= o.steps && sdq_last_error(r.ctx) == SDQ_OK; i++) {
        step(&r, &o, i);
        if (i % 10 == 0 || i == o.steps) validate(&r, &o, i);
    }
    if (sdq_last_error(r.ctx) != SDQ_OK)
        fprintf(stderr, "train_full: %s\n", sdq_error_text(r.ctx));
    i = sdq_last_error(r.ctx) != SDQ_OK;
    sdq_optim_free(r.ctx, r.optim);
    sdq_model_free(r.ctx, r.student);
    sdq_model_free(r.ctx, r.teacher);
    sdq_ctx_free(r.ctx);
    return (int)i;
}
