/* sdq_run.c - sdq's side of bench.py.
 *
 *     cc -O2 -fopenmp -I. tools/peers/sdq_run.c -o sdq_run -lm
 *     sdq_run MODEL CACHE THREADS      lines on stdin, an answer to each on stdout
 *
 * MODEL is a diffusers folder, THREADS a number. A line is a name of `works` or "quit". The first
 * time it loads what it needs; then it runs one evaluation (UNet: 512x512, batch 1, keys and values
 * of the prompt and time embeddings made before; VAE: decode to 512x512) and answers
 *
 *     SECONDS PEAK_BYTES BYTES     of this evaluation; the most memory that was ever resident in
 *                                  this process, and what is resident now
 *
 * "make unet-int8" writes CACHE/unet-int8.safetensors, which unet-int8 loads: the float network
 * with the ranges of one random input. On an error the program ends with 1 and a sentence. */
#define _DEFAULT_SOURCE     /* POSIX, and madvise for sdq.h */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SDQ_IMPLEMENTATION
#include "sdq.h"

enum { SIDE = 64, TOKENS = 77 };

typedef struct work {
    const char *name;
    sdq_part part;
    sdq_mode mode;
    sdq_range range;            /* int8: of the inputs; DEFAULT: what the default recipe says */
    int attention;              /* bits of its products */
    sdq_model *model;
    sdq_prompt_cache *prompt;
    sdq_time_table *times;
} work;

static work works[] = {
    {"unet-fp32", SDQ_PART_UNET, SDQ_FLOAT, SDQ_RANGE_DEFAULT, 32, NULL, NULL, NULL},
    {"unet-int8", SDQ_PART_UNET, SDQ_INT8, SDQ_RANGE_DEFAULT, 32, NULL, NULL, NULL},
    {"unet-int8-static", SDQ_PART_UNET, SDQ_INT8, SDQ_RANGE_STATIC, 32, NULL, NULL, NULL},
    {"unet-int8-attention16", SDQ_PART_UNET, SDQ_INT8, SDQ_RANGE_DEFAULT, 16, NULL, NULL, NULL},
    {"unet-int8-static-attention16", SDQ_PART_UNET, SDQ_INT8, SDQ_RANGE_STATIC, 16, NULL, NULL, NULL},
    {"unet-int8-attention", SDQ_PART_UNET, SDQ_INT8, SDQ_RANGE_DEFAULT, 8, NULL, NULL, NULL},
    {"vae-fp32", SDQ_PART_VAE, SDQ_FLOAT, SDQ_RANGE_DEFAULT, 32, NULL, NULL, NULL},
    {"vae-int8", SDQ_PART_VAE, SDQ_INT8, SDQ_RANGE_POSITION, 32, NULL, NULL, NULL},
};
enum { WORKS = sizeof works / sizeof works[0] };

#define TRY(e) do { const sdq_status try_ = (e); if (try_ != SDQ_OK) return try_; } while (0)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Resident memory: VmHWM is the most so far, VmRSS now. getrusage would count the parent's before
 * exec, too. */
static double resident(const char *what) {
    FILE *f = fopen("/proc/self/status", "r");
    const size_t n = strlen(what);
    char line[256];
    double kb = 0.0;
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, what, n) == 0) kb = atof(line + n + 1);
    if (f) fclose(f);
    return kb * 1024.0;
}

static sdq_tensor *noise(sdq_ctx *ctx, size_t n, size_t h, size_t w, size_t c) {
    sdq_tensor *t = sdq_tensor_4d(ctx, n, h, w, c);
    sdq_rng rng;
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 5);
    if (t) sdq_rng_normal(&rng, sdq_f32(t), sdq_tensor_count(t));
    return t;
}

/* A random latent, timestep and text for a UNet. */
static sdq_status unet_input(sdq_ctx *ctx, const sdq_model *unet, sdq_unet_input *in) {
    static const float time = 500.0f;
    const sdq_model_info info = sdq_model_get_info(unet);
    sdq_tensor *text = noise(ctx, 1, 1, TOKENS, info.context);
    const size_t dim[3] = {1, TOKENS, info.context};
    memset(in, 0, sizeof *in);
    in->sample = noise(ctx, 1, SIDE, SIDE, info.in);
    in->context = sdq_reshape(ctx, text, 3, dim);
    in->timesteps = &time;
    return in->sample && in->context ? SDQ_OK : sdq_last_error(ctx);
}

static void int8_path(char *path, size_t size, const char *cache, const work *w) {
    (void)snprintf(path, size, "%s/%s.safetensors", cache, w->name);
}

/* The float network -> CACHE/NAME.safetensors. */
static sdq_status make(sdq_ctx *ctx, const char *folder, const char *cache, const work *w) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_recipe r = sdq_recipe_default();
    char path[4096], about[1024];
    sdq_unet_input in;
    sdq_model *m;
    sdq_status st;
    if (w->range != SDQ_RANGE_DEFAULT) r.range_conv = r.range_linear = w->range;
    r.attention_bits = w->attention;
    int8_path(path, sizeof path, cache, w);
    sdq_recipe_to_str(&r, about, sizeof about);
    TRY(sdq_model_load(ctx, folder, SDQ_PART_UNET, &m));
    st = sdq_recipe_apply(ctx, m, &r, NULL);
    if (st == SDQ_OK) st = unet_input(ctx, m, &in);
    sdq_model_observe(m, 1);
    if (st == SDQ_OK && !sdq_unet_forward(ctx, m, &in, SDQ_FLOAT)) st = sdq_last_error(ctx);
    sdq_model_observe(m, 0);
    if (st == SDQ_OK) st = sdq_model_convert(ctx, m);
    if (st == SDQ_OK) st = sdq_model_save_int8(ctx, m, path, NULL, about);
    sdq_model_free(ctx, m);
    sdq_arena_release(ctx, mark);
    return st;
}

static sdq_status load(sdq_ctx *ctx, const char *folder, const char *cache, work *w) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    char path[4096];
    sdq_unet_input in;
    int8_path(path, sizeof path, cache, w);
    if (w->mode == SDQ_INT8 && w->part == SDQ_PART_UNET)
        TRY(sdq_model_load_int8(ctx, folder, path, &w->model, NULL));
    else TRY(sdq_model_load(ctx, folder, w->part, &w->model));
    if (w->mode == SDQ_INT8 && w->part == SDQ_PART_VAE)
        TRY(sdq_vae_quantize(ctx, w->model, w->range));
    TRY(sdq_model_freeze(ctx, w->model));
    if (w->part == SDQ_PART_UNET) {
        TRY(unet_input(ctx, w->model, &in));
        TRY(sdq_unet_prompt(ctx, w->model, in.context, w->mode, &w->prompt));
        TRY(sdq_unet_times(ctx, w->model, in.timesteps, NULL, 1, w->mode, &w->times));
    }
    sdq_arena_release(ctx, mark);
    return SDQ_OK;
}

static sdq_status run(sdq_ctx *ctx, const work *w, double *seconds) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_unet_input in;
    sdq_tensor *latent = NULL, *out;
    double t;
    if (w->part == SDQ_PART_UNET) TRY(unet_input(ctx, w->model, &in));
    else latent = noise(ctx, 1, SIDE, SIDE, sdq_model_get_info(w->model).latent);
    t = now();
    if (w->part == SDQ_PART_UNET) {
        in.prompt = w->prompt;
        in.times = w->times;
        out = sdq_unet_forward(ctx, w->model, &in, w->mode);
    } else {
        out = sdq_vae_decode(ctx, w->model, latent, w->mode);
    }
    *seconds = now() - t;
    sdq_arena_release(ctx, mark);
    return out ? SDQ_OK : sdq_last_error(ctx);
}

static sdq_status answer(sdq_ctx *ctx, const char *folder, const char *cache, const char *line) {
    const int making = strncmp(line, "make ", 5) == 0;
    const char *name = making ? line + 5 : line;
    double seconds = 0.0;
    size_t i;
    for (i = 0; i < WORKS && strcmp(name, works[i].name) != 0; i++) continue;
    if (i == WORKS || (making && (works[i].mode != SDQ_INT8 || works[i].part != SDQ_PART_UNET))) {
        fprintf(stderr, "sdq_run: no such work: %s\n", line);
        return SDQ_ERR_ARGUMENT;
    }
    if (making) {
        seconds = now();
        TRY(make(ctx, folder, cache, &works[i]));
        seconds = now() - seconds;
    } else {
        if (!works[i].model) TRY(load(ctx, folder, cache, &works[i]));
        TRY(run(ctx, &works[i], &seconds));
    }
    printf("%.6f %.0f %.0f\n", seconds, resident("VmHWM"), resident("VmRSS"));
    fflush(stdout);
    return SDQ_OK;
}

int main(int argc, char **argv) {
    sdq_status st = SDQ_OK;
    sdq_ctx_desc d;
    sdq_ctx *ctx;
    char line[256];
    size_t i;
    if (argc != 4) {
        fprintf(stderr, "usage: sdq_run MODEL CACHE THREADS\n");
        return 2;
    }
    memset(&d, 0, sizeof d);
    d.threads = atoi(argv[3]);
    if (sdq_ctx_create(&d, &ctx) != SDQ_OK) return 1;
    while (st == SDQ_OK && fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\r\n")] = '\0';
        if (strcmp(line, "quit") == 0) break;
        st = answer(ctx, argv[1], argv[2], line);
    }
    if (st != SDQ_OK) fprintf(stderr, "sdq_run: %s\n", sdq_error_text(ctx));
    for (i = 0; i < WORKS; i++) {
        sdq_prompt_cache_free(ctx, works[i].prompt);
        sdq_time_table_free(ctx, works[i].times);
        sdq_model_free(ctx, works[i].model);
    }
    sdq_ctx_free(ctx);
    return st != SDQ_OK;
}
