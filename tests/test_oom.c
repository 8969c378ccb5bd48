/* test_oom.c - every allocation fails once, from the scheduler to the schedule search: nothing
 * leaks, the error is SDQ_ERR_OOM, and with memory the call gives what it gave before.
 * Networks alone, layers, ops, files and the optimizer have such cases in their own tests.
 * Run from the project folder; writes and removes test_oom.*.tmp there.
 */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

#define FOLDER "tests/golden/models/bk-a"
#define FILE_A "test_oom.a.tmp"
#define FILE_B "test_oom.b.tmp"
#define PICTURES "test_oom.d.tmp"

/* What all cases use: made once, with memory. */
typedef struct env {
    sdq_ctx *ctx;
    sdqt_heap h;                /* off but for the calls that a case is about */
    sdq_pipeline *p;            /* float, and the int8 network */
    sdq_model *student;         /* static ranges, calibrated */
    sdq_recipe r;
    sdq_states *s;
    sdq_dataset *data;
    sdq_optim *o;
    sdq_txt2img_desc d;
    uint64_t hash;              /* of what a case computed */
    int coherent, checkpoint;
} env;

static const char *const prompts[] = {"a red apple"};

static void add(env *e, const void *p, size_t bytes) { e->hash = sdq__u_hash(e->hash, p, bytes); }
static void add_tensor(env *e, const sdq_tensor *t) { if (t) add(e, t->data, sdq_tensor_count(t) * 4); }

static void open_env(env *e, int tier) {
    memset(e, 0, sizeof *e);
    e->h.off = 1;
    e->d.steps = 1;
    e->d.prompt = prompts[0];
    e->d.guidance = 3;
    e->d.scheduler = SDQ_DDIM;
    e->r = sdq_recipe_default();
    e->r.range_linear = e->r.range_conv = SDQ_RANGE_STATIC;
    if (sdqt_ctx_of(&e->h, tier, 1, &e->ctx) != SDQ_OK
        || sdq_pipeline_load(e->ctx, FOLDER, NULL, &e->p) != SDQ_OK
        || sdq_model_load(e->ctx, FOLDER, SDQ_PART_UNET, &e->p->unet_int8) != SDQ_OK
        || sdq_recipe_apply(e->ctx, e->p->unet_int8, &e->r, NULL) != SDQ_OK
        || sdq_model_load(e->ctx, FOLDER, SDQ_PART_UNET, &e->student) != SDQ_OK
        || sdq_recipe_apply(e->ctx, e->student, &e->r, NULL) != SDQ_OK
        || sdq_states_collect(e->ctx, e->p, prompts, 1, &e->d, &e->s) != SDQ_OK
        || sdq_calibrate_states(e->ctx, e->p->unet_int8, e->s, 1, 0, NULL, NULL) != SDQ_OK
        || sdq_calibrate_states(e->ctx, e->student, e->s, 1, 0, NULL, NULL) != SDQ_OK
        || sdq_model_convert(e->ctx, e->p->unet_int8) != SDQ_OK) {
        printf("%s\n", sdq_error_text(e->ctx));
        exit(2);
    }
}

static void drop_arena(sdq_ctx *ctx) {
    sdq_mark bottom;
    memset(&bottom, 0, sizeof bottom);
    sdq_arena_release(ctx, bottom);
    while (ctx->chunk_count > 0) sdq__free(ctx, ctx->chunks[--ctx->chunk_count].base);
    sdq__free(ctx, ctx->chunks);
    ctx->chunks = NULL;
    ctx->chunk_cap = ctx->arena_size = ctx->arena_touched = 0;
}

static void close_env(env *e) {
    sdq_optim_free(e->ctx, e->o);
    sdq_dataset_free(e->ctx, e->data);
    sdq_states_free(e->ctx, e->s);
    sdq_model_free(e->ctx, e->student);
    sdq_pipeline_free(e->ctx, e->p);
    sdq_ctx_free(e->ctx);
    SDQT_THAT(e->h.live == 0, "%zu blocks leaked", e->h.live);
}

/* A case clears h.off around the calls that have to do without memory, frees what they made, and puts
 * what came out of them into the hash. */
typedef sdq_status (*case_fn)(env *e);

static sdq_status with_memory(env *e, case_fn fn, uint64_t *hash) {
    sdq_status st;
    drop_arena(e->ctx);
    e->h.fails = e->h.calls = 0;
    e->hash = 1;
    e->h.off = 0;
    st = fn(e);
    e->h.off = 1;
    *hash = e->hash;
    return st;
}

/* Refuse about `most` of the allocations of a case, spread evenly, alone and with all that follow;
 * every `again`-th time the case is run with memory afterwards. */
static void starve(env *e, const char *name, case_fn fn, size_t most, size_t again) {
    uint64_t want, got;
    size_t total, live, k, step, n = 0;
    int all;
    if (!SDQT_THAT(with_memory(e, fn, &want) == SDQ_OK, "%s: %s", name, sdq_error_text(e->ctx)))
        return;
    total = e->h.calls;
    SDQT_THAT(with_memory(e, fn, &got) == SDQ_OK && got == want && e->h.calls == total,
              "%s: not the same when it is called again", name);
    drop_arena(e->ctx);
    live = e->h.live;
    step = total / most + 1;
    for (k = 0; k < total; k += step)
        for (all = 0; all < 2; all++) {
            sdq_status st;
            drop_arena(e->ctx);
            e->h.calls = 0;
            e->h.fail_at = k;
            e->h.fails = all ? SIZE_MAX : 1;
            e->h.off = 0;
            st = fn(e);
            e->h.off = 1;
            SDQT_THAT(st == SDQ_ERR_OOM && sdq_last_error(e->ctx) == SDQ_ERR_OOM
                      && strstr(sdq_error_text(e->ctx), "out of memory"),
                      "%s, allocation %zu of %zu: status %d, '%s'", name, k, total, (int)st,
                      sdq_error_text(e->ctx));
            SDQT_THAT(!e->ctx->recording && !e->ctx->replay && !e->ctx->taps,
                      "%s, allocation %zu: the context is not tidy", name, k);
            sdq_clear_error(e->ctx);
            drop_arena(e->ctx);
            SDQT_THAT(e->h.live == live, "%s, allocation %zu of %zu: %zu blocks, %zu before", name,
                      k, total, e->h.live, live);
            live = e->h.live;
            if (n++ % again == 0 || (k + step >= total && all))
                SDQT_THAT(with_memory(e, fn, &got) == SDQ_OK && got == want,
                          "%s, after allocation %zu: %s", name, k, sdq_error_text(e->ctx));
        }
}

/* The same with scratch memory that ends somewhere: `points` places, and the last 64 bytes. */
static void starve_arena(env *e, const char *name, case_fn fn, size_t points) {
    uint64_t want, got;
    size_t i, peak, live;
    e->ctx->arena_peak = 0;
    if (!SDQT_THAT(with_memory(e, fn, &want) == SDQ_OK, "%s: %s", name, sdq_error_text(e->ctx)))
        return;
    peak = e->ctx->arena_peak;
    drop_arena(e->ctx);
    live = e->h.live;
    for (i = 0; i <= points + 1; i++) {
        const size_t all = peak + SDQ__CHUNK;
        const size_t left = i == points ? peak - SDQ__ALIGN : i > points ? peak
                          : peak * i / points / SDQ__ALIGN * SDQ__ALIGN;
        sdq_mark bottom;
        sdq_status st;
        memset(&bottom, 0, sizeof bottom);
        drop_arena(e->ctx);
        (void)sdq__push(e->ctx, all);           /* one piece, all but `left` bytes taken */
        sdq_arena_release(e->ctx, bottom);
        (void)sdq__push(e->ctx, all - left);
        e->h.calls = e->h.fails = 0;
        e->h.limit = SDQ__CHUNK - 1;
        e->hash = 1;
        e->h.off = 0;
        st = fn(e);
        e->h.off = 1;
        e->h.limit = 0;
        SDQT_THAT(i > points ? st == SDQ_OK && e->hash == want
                             : st == SDQ_ERR_OOM && sdq_last_error(e->ctx) == SDQ_ERR_OOM,
                  "%s, %zu of %zu bytes: status %d, '%s'", name, left, peak, (int)st,
                  sdq_error_text(e->ctx));
        SDQT_THAT(!e->ctx->recording && !e->ctx->replay && !e->ctx->taps,
                  "%s, %zu of %zu bytes: the context is not tidy", name, left, peak);
        sdq_clear_error(e->ctx);
        drop_arena(e->ctx);
        SDQT_THAT(e->h.live == live, "%s, %zu of %zu bytes: %zu blocks, %zu before", name, left,
                  peak, e->h.live, live);
        live = e->h.live;
        if (i % 4 == 0)
            SDQT_THAT(with_memory(e, fn, &got) == SDQ_OK && got == want, "%s, after %zu bytes: %s",
                      name, left, sdq_error_text(e->ctx));
        drop_arena(e->ctx);
    }
}

/* ---- drawing ---- */

static sdq_status scheduler_case(env *e) {
    sdq_status st = SDQ_OK;
    int kind;
    for (kind = SDQ_PNDM; kind < SDQ_SCHEDULER_COUNT && st == SDQ_OK; kind++) {
        sdq_scheduler_desc d;
        sdq_scheduler *s = NULL;
        float x[4] = {1, 2, 3, 4};
        sdq_rng rng;
        sdq_rng_init(&rng, SDQ_RNG_TORCH, 3);
        memset(&d, 0, sizeof d);
        d.kind = (sdq_scheduler_kind)kind;
        d.steps = 4;
        st = sdq_scheduler_create(e->ctx, &d, &s);
        if (st == SDQ_OK) st = sdq_scheduler_step(e->ctx, s, 0, x, x + 2, x + 2, 1, 1, 1, 2, &rng);
        if (st == SDQ_OK) st = sdq_scheduler_step(e->ctx, s, 1, x, x + 2, x + 2, 1, 1, 1, 2, &rng);
        if (st == SDQ_OK) add(e, x, sizeof x);
        SDQT_CHECK(s || st != SDQ_OK);
        sdq_scheduler_free(e->ctx, s);
    }
    return st;
}

static sdq_status load_case(env *e) {
    sdq_pipeline *p = NULL;
    sdq_pipeline_desc d;
    sdq_status st;
    memset(&d, 0, sizeof d);
    d.unet_int8 = FILE_A;
    st = sdq_pipeline_load(e->ctx, FOLDER, &d, &p);
    SDQT_CHECK((p != NULL) == (st == SDQ_OK));
    if (p) {
        add(e, p->scheduler, strlen(p->scheduler));
        add(e, &p->unet->source, 8);
        add(e, p->policy->timestep, sizeof p->policy->timestep);
    }
    sdq_pipeline_free(e->ctx, p);
    return st;
}

static sdq_status draw(env *e, sdq_precision precision) {
    sdq_txt2img_desc d = e->d;
    sdq_image img[2];
    sdq_status st;
    int i;
    d.precision = precision;
    d.k_first = 1;
    d.count = precision == SDQ_PRECISION_EDGES ? 2 : 1;
    d.steps = d.count;
    st = sdq_txt2img(e->ctx, e->p, &d, img);
    for (i = 0; st == SDQ_OK && i < (int)d.count; i++) {
        add(e, img[i].px, img[i].w * img[i].h * img[i].c);
        sdq_image_free(e->ctx, &img[i]);
    }
    return st;
}
static sdq_status draw_float_case(env *e) { return draw(e, SDQ_PRECISION_FLOAT); }
static sdq_status draw_mixed_case(env *e) { return draw(e, SDQ_PRECISION_EDGES); }

static void test_drawing(int tier) {
    env e;
    sdq_policy p;
    open_env(&e, tier);
    starve(&e, "scheduler", scheduler_case, 1000, 1);
    starve(&e, "float picture", draw_float_case, 40, 4);
    starve(&e, "mixed pictures", draw_mixed_case, 40, 8);
    starve_arena(&e, "float picture", draw_float_case, 24);
    starve_arena(&e, "mixed pictures", draw_mixed_case, 24);
    SDQT_CHECK(sdq_schedule_search(e.ctx, e.p, prompts, 1, &e.d, 0, 1, &p, NULL, NULL) == SDQ_OK);
    SDQT_CHECK(sdq_model_save_int8(e.ctx, e.p->unet_int8, FILE_A, &p, "words") == SDQ_OK);
    starve(&e, "pipeline", load_case, 60, 8);
    close_env(&e);
    (void)remove(FILE_A);
}

/* ---- quantizing ---- */

static sdq_status states_case(env *e) {
    sdq_states *s = NULL;
    const sdq_status st = sdq_states_collect(e->ctx, e->p, prompts, 1, &e->d, &s);
    SDQT_CHECK((s != NULL) == (st == SDQ_OK));
    if (s) { add(e, s->x, s->count * s->size * 4); add(e, s->eps, s->count * s->size * 4); }
    sdq_states_free(e->ctx, s);
    return st;
}

/* The same through a file, from nothing each time. */
static sdq_status states_cache_case(env *e) {
    sdq_states *s = NULL;
    sdq_status st;
    (void)remove(FILE_B);
    (void)remove(FILE_B ".part");
    st = sdq_states_cache(e->ctx, e->p, prompts, 1, &e->d, FILE_B, &s);
    SDQT_CHECK((s != NULL) == (st == SDQ_OK));
    if (s) { add(e, s->x, s->count * s->size * 4); add(e, s->eps, s->count * s->size * 4); }
    sdq_states_free(e->ctx, s);
    return st;
}

static void add_ranges(env *e, const sdq_model *m) {
    size_t i, k;
    for (i = 0; i < m->layers; i++) {
        const sdq_layer *l = m->layer[i];
        for (k = 0; k < l->parts; k++) add_tensor(e, &l->part[k].s);
        if (l->b.data) add_tensor(e, &l->b);
        SDQT_CHECK(!l->bias_sum);
    }
}

/* Biases change only when all of it went well; the case puts them back. */
static sdq_status calibrate_case(env *e) {
    const sdq_model *m = e->student;
    float *old = (float *)calloc(m->layers * 256, sizeof(float));
    sdq_status st;
    size_t i, changed = 0;
    if (!old) exit(2);
    for (i = 0; i < m->layers; i++)
        if (m->layer[i]->b.data) memcpy(old + i * 256, m->layer[i]->b.data, m->layer[i]->out * 4);
    st = sdq_recipe_apply(e->ctx, e->student, &e->r, NULL);
    if (st == SDQ_OK) st = sdq_calibrate_states(e->ctx, e->student, e->s, 2, 1, NULL, NULL);
    if (st == SDQ_OK) add_ranges(e, m);
    for (i = 0; i < m->layers; i++) {
        sdq_layer *l = m->layer[i];
        SDQT_CHECK(!l->observe && !l->bias_sum);
        if (!l->b.data) continue;
        changed += memcmp(old + i * 256, l->b.data, l->out * 4) != 0;
        memcpy(l->b.data, old + i * 256, l->out * 4);
        sdq__free(e->ctx, l->bias_fix);
        l->bias_fix = NULL;
    }
    SDQT_THAT((changed > 0) == (st == SDQ_OK), "status %d, %zu biases changed", (int)st, changed);
    free(old);
    return st;
}

/* Only the conversion is starved; what it left is converted with memory afterwards. */
static sdq_status convert_case(env *e) {
    sdq_model *m = NULL;
    sdq_unet_input in;
    sdq_tensor *target;
    const size_t first = 0;
    sdq_status st;
    const size_t calls = e->h.calls;
    e->h.off = 1;
    if (sdq_model_load(e->ctx, FOLDER, SDQ_PART_UNET, &m) != SDQ_OK
        || sdq_recipe_apply(e->ctx, m, &e->r, NULL) != SDQ_OK
        || sdq_calibrate_states(e->ctx, m, e->s, 2, 0, NULL, NULL) != SDQ_OK) exit(2);
    drop_arena(e->ctx);
    e->h.calls = calls;
    e->h.off = 0;
    st = sdq_model_convert(e->ctx, m);
    if (st == SDQ_OK) st = sdq_model_freeze(e->ctx, m);
    e->h.off = 1;
    if (st != SDQ_OK) {
        const sdq_status last = sdq_last_error(e->ctx);
        sdq_clear_error(e->ctx);
        SDQT_CHECK(last == st && sdq_model_convert(e->ctx, m) == SDQ_OK
                   && sdq_model_freeze(e->ctx, m) == SDQ_OK);
        e->ctx->status = last;
        strcpy(e->ctx->error, "out of memory, as it was");
    } else if (sdq__cal_batch(e->ctx, e->s, &first, 1, &in, &target) == SDQ_OK) {
        add_tensor(e, sdq_unet_forward(e->ctx, m, &in, SDQ_INT8));
    }
    sdq_model_free(e->ctx, m);
    return st;
}

static sdq_status save_case(env *e) {
    const sdq_status st = sdq_model_save_int8(e->ctx, e->p->unet_int8, FILE_B, e->p->policy, "all");
    FILE *f = fopen(FILE_B ".tmp", "rb");
    SDQT_THAT(!f, "a half-written file is left");
    if (f) fclose(f);
    f = fopen(FILE_B, "rb");            /* the old one or the new one, whole */
    SDQT_CHECK(f != NULL || st != SDQ_OK);
    if (f) {
        SDQT_CHECK(fseek(f, 0, SEEK_END) == 0 && ftell(f) > 10000);
        fclose(f);
    }
    return st;
}
static sdq_status load_int8_case(env *e) {
    sdq_model *m = NULL;
    sdq_policy p;
    const sdq_status st = sdq_model_load_int8(e->ctx, FOLDER, FILE_A, &m, &p);
    SDQT_CHECK((m != NULL) == (st == SDQ_OK));
    if (m) add_ranges(e, m);
    sdq_model_free(e->ctx, m);
    return st;
}

static sdq_status search_case(env *e) {
    sdq_policy p;
    double reached = 0;
    const sdq_status st =
        sdq_schedule_search(e->ctx, e->p, prompts, 1, &e->d, 20, 0, &p, NULL, &reached);
    if (st == SDQ_OK) { add(e, &p, sizeof p); add(e, &reached, sizeof reached); }
    return st;
}

static void test_quantizing(int tier) {
    env e;
    open_env(&e, tier);
    starve(&e, "states", states_case, 40, 4);
    starve(&e, "states in a file", states_cache_case, 60, 4);
    starve(&e, "calibration", calibrate_case, 60, 4);
    starve_arena(&e, "states", states_case, 16);
    starve_arena(&e, "calibration", calibrate_case, 24);
    starve(&e, "conversion", convert_case, 20, 8);
    SDQT_CHECK(sdq_model_save_int8(e.ctx, e.p->unet_int8, FILE_A, NULL, NULL) == SDQ_OK);
    starve(&e, "saving", save_case, 1000, 4);
    starve(&e, "loading", load_int8_case, 60, 8);
    starve(&e, "schedule", search_case, 40, 8);
    starve_arena(&e, "saving", save_case, 24);
    starve_arena(&e, "loading", load_int8_case, 8);
    starve_arena(&e, "schedule", search_case, 16);
    close_env(&e);
    (void)remove(FILE_A);
    (void)remove(FILE_B);
    (void)remove(FILE_B ".part");
}

/* ---- training ---- */

static sdq_status add_student_case(env *e) {
    sdq_optim *o = NULL;
    sdq_optim_desc d;
    sdq_status st;
    size_t i;
    memset(&d, 0, sizeof d);
    d.ema = 0.9f;
    st = sdq_optim_create(e->ctx, &d, &o);
    if (st == SDQ_OK) st = sdq_optim_add_student(e->ctx, o, e->student, &e->r, 100);
    if (st == SDQ_OK) add(e, &o->count, sizeof o->count);
    sdq_optim_free(e->ctx, o);
    for (i = 0; i < sdq_model_param_count(e->student); i++) {
        const sdq_tensor *t = sdq_model_param(e->student, i, NULL);
        SDQT_CHECK(!t->grad && !t->needs_grad);
    }
    return st;
}

/* One step of training. A step that failed is not counted; a step that went well is taken back. */
static sdq_status fit_case(env *e) {
    const size_t step = e->o->step;
    sdq_distill_task t;
    sdq_fit_desc d;
    sdq_status st;
    size_t i, k;
    float **old = (float **)calloc(e->o->count, sizeof *old);
    if (!old) exit(2);
    for (i = 0; i < e->o->count; i++) {
        const sdq_tensor *w = e->o->leaf[i].t;
        old[i] = (float *)malloc(sdq_tensor_count(w) * 4);
        if (!old[i]) exit(2);
        memcpy(old[i], w->data, sdq_tensor_count(w) * 4);
    }
    memset(&t, 0, sizeof t);
    memset(&d, 0, sizeof d);
    t.student = e->student;
    t.states = e->s;
    t.teacher_loss = 1;
    t.batch = 2;
    t.coherent = e->coherent;
    t.checkpoint = e->checkpoint;
    d.steps = step + 1;
    st = sdq_fit(e->ctx, e->o, &d, sdq_distill_task_loss, &t);
    SDQT_CHECK(e->o->step == step + (st == SDQ_OK));
    for (i = 0; i < e->o->count; i++) {
        sdq__leaf *l = &e->o->leaf[i];
        const size_t n = sdq_tensor_count(l->t);
        if (st == SDQ_OK) {
            add_tensor(e, l->t);
            if (l->m) memset(l->m, 0, n * 4);       /* ranges have no moments */
            if (l->v) memset(l->v, 0, n * 4);
        } else {
            for (k = 0; k < n && old[i][k] == sdq_f32(l->t)[k]; k++) {}
            SDQT_THAT(k == n, "%s changed in a step that failed", l->name);
        }
        memcpy(l->t->data, old[i], n * 4);
        free(old[i]);
    }
    free(old);
    e->o->step = 0;
    return st;
}

static sdq_status save_state_case(env *e) {
    sdq_status st = sdq_optim_save(e->ctx, e->o, FILE_B);
    FILE *f = fopen(FILE_B ".tmp", "rb");
    SDQT_THAT(!f, "a half-written file is left");
    if (f) fclose(f);
    if (st == SDQ_OK) st = sdq_optim_load(e->ctx, e->o, FILE_B);
    return st;
}

static void test_training(int tier) {
    env e;
    open_env(&e, tier);
    starve(&e, "train set", add_student_case, 100, 8);
    e.r.train_set = SDQ_TRAIN_ALL;
    SDQT_CHECK(sdq_optim_create(e.ctx, NULL, &e.o) == SDQ_OK
               && sdq_optim_add_student(e.ctx, e.o, e.student, &e.r, 100) == SDQ_OK);
    starve(&e, "training", fit_case, 40, 1);
    starve_arena(&e, "training", fit_case, 48);
    e.coherent = e.checkpoint = 1;
    starve(&e, "training with checkpoints", fit_case, 40, 1);
    starve_arena(&e, "training with checkpoints", fit_case, 48);
    starve(&e, "state file", save_state_case, 30, 8);
    starve_arena(&e, "state file", save_state_case, 8);
    close_env(&e);
    (void)remove(FILE_B);
}

/* ---- pictures ---- */

static void write_pictures(void) {
    int i, k;
    FILE *f;
    SDQT_MAKE_FOLDER(PICTURES);
    for (i = 0; i < 2; i++) {
        f = fopen(i ? PICTURES "/b.ppm" : PICTURES "/a.ppm", "wb");
        if (!f) exit(2);
        fprintf(f, "P6\n9 12\n255\n");
        for (k = 0; k < 9 * 12 * 3; k++) fputc((i * 31 + k * k * 7) & 255, f);
        fclose(f);
        f = fopen(i ? PICTURES "/b.txt" : PICTURES "/a.txt", "wb");
        if (!f) exit(2);
        fputs(i ? "a moon" : "an apple", f);
        fclose(f);
    }
}
static void drop_pictures(void) {
    (void)remove(PICTURES "/a.ppm");
    (void)remove(PICTURES "/a.txt");
    (void)remove(PICTURES "/b.ppm");
    (void)remove(PICTURES "/b.txt");
    SDQT_DROP_FOLDER(PICTURES);
}

static sdq_status samples_case(env *e) {
    sdq_dataset *data = NULL;
    sdq_samples *s = NULL;
    sdq_status st = sdq_dataset_open(e->ctx, PICTURES, &data);
    if (st == SDQ_OK) st = sdq_samples_load(e->ctx, data, 8, e->p->tokenizer, &s);
    SDQT_CHECK(st == SDQ_OK || !s);
    if (st == SDQ_OK) st = sdq_samples_encode(e->ctx, s, e->p->vae, NULL, NULL);
    if (st == SDQ_OK) {
        add(e, s->moments, s->count * 4 * s->lh * s->lw * s->lc * sizeof(float));
        add(e, s->ids, s->count * s->tokens * 4);
        add(e, &s->scaling, sizeof s->scaling);
    }
    sdq_samples_free(e->ctx, s);
    sdq_dataset_free(e->ctx, data);
    return st;
}

/* Latents and captions through a file, from nothing each time. */
static sdq_status samples_cache_case(env *e) {
    sdq_samples *s = NULL;
    sdq_status st;
    (void)remove(FILE_B);
    (void)remove(FILE_B ".part");
    st = sdq_samples_cache(e->ctx, e->data, 8, e->p->tokenizer, e->p->vae, e->p->text, FILE_B,
                           NULL, NULL, &s);
    SDQT_CHECK((s != NULL) == (st == SDQ_OK));
    if (s) add(e, s->cache.data, s->count * s->cache.bytes);
    sdq_samples_free(e->ctx, s);
    return st;
}

/* The published recipe's calibration and a loss of noised pictures. */
static sdq_status data_case(env *e) {
    sdq_samples *s = NULL;
    sdq_scheduler *sch = NULL;
    sdq_diffusion_task t;
    sdq_status st;
    const size_t calls = e->h.calls;
    e->h.off = 1;
    memset(&t, 0, sizeof t);
    if (sdq_samples_load(e->ctx, e->data, 8, e->p->tokenizer, &s) != SDQ_OK
        || sdq_samples_encode(e->ctx, s, e->p->vae, NULL, NULL) != SDQ_OK
        || sdq_scheduler_create(e->ctx, NULL, &sch) != SDQ_OK
        || sdq_recipe_apply(e->ctx, e->student, &e->r, NULL) != SDQ_OK) exit(2);
    t.unet = e->student;
    t.text = e->p->text;
    t.samples = s;
    t.scheduler = sch;
    t.scaling = 1;
    t.batch = 2;
    drop_arena(e->ctx);
    e->h.calls = calls;
    e->h.off = 0;
    st = sdq_calibrate_data(e->ctx, &t, 2, 1, NULL, NULL);
    e->h.off = 1;
    if (st == SDQ_OK) add_ranges(e, e->student);
    sdq_model_observe(e->student, 0);
    if (sdq_recipe_apply(e->ctx, e->student, &e->r, NULL) != SDQ_OK) exit(2);   /* forgets ranges */
    sdq_samples_free(e->ctx, s);
    sdq_scheduler_free(e->ctx, sch);
    return st;
}

static void test_pictures(int tier) {
    env e;
    write_pictures();
    open_env(&e, tier);
    starve(&e, "samples", samples_case, 60, 4);
    starve_arena(&e, "samples", samples_case, 24);
    SDQT_CHECK(sdq_dataset_open(e.ctx, PICTURES, &e.data) == SDQ_OK);
    starve(&e, "samples in a file", samples_cache_case, 60, 4);
    (void)remove(FILE_B);
    (void)remove(FILE_B ".part");
    e.r = sdq_recipe_reference();
    starve(&e, "calibration on pictures", data_case, 40, 4);
    close_env(&e);
    drop_pictures();
}

/* ---- reports ---- */

static sdq_status report_case(env *e) {
    unsigned char a[12 * 12 * 3], b[12 * 12 * 3];
    float x[6 * 3], y[6 * 3];
    double v[8], out[5];
    sdq_status st;
    sdq_rng rng;
    size_t i;
    for (i = 0; i < sizeof a; i++) { a[i] = (unsigned char)(i * 7); b[i] = (unsigned char)(i * 5); }
    for (i = 0; i < 18; i++) { x[i] = (float)(i * i % 13); y[i] = (float)(i * i % 11); }
    for (i = 0; i < 8; i++) v[i] = (double)(i * 5 % 8);
    memset(out, 0, sizeof out);
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 1);
    st = sdq_ssim(e->ctx, a, b, 12, 12, 3, &out[0]);
    if (st == SDQ_OK) st = sdq_frechet(e->ctx, x, 6, y, 6, 3, &out[1]);
    if (st == SDQ_OK) st = sdq_percentile(e->ctx, v, 8, 50, &out[2]);
    if (st == SDQ_OK) st = sdq_bootstrap(e->ctx, v, 8, 50, 0.9, &rng, &out[3], &out[4]);
    if (st == SDQ_OK) add(e, out, sizeof out);
    else SDQT_CHECK(out[4] == 0);
    return st;
}
static void test_reports(int tier) {
    env e;
    open_env(&e, tier);
    starve(&e, "report", report_case, 100, 1);
    close_env(&e);
}

static const sdqt_case cases[] = {
    {"drawing", test_drawing, 0},
    {"quantizing", test_quantizing, 0},
    {"training", test_training, 0},
    {"pictures", test_pictures, 0},
    {"reports", test_reports, 0},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
