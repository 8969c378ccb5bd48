/* sdq_eval.h - part of tools/sdq.c: the command eval, which measures variants of a quantized
 * network against the float one, and writes tables, a strip of pictures and a page to look at.
 *
 * Everything that takes long is kept: networks in OUT/nets, pictures and errors in
 * OUT/pictures/ROW-KEY, where KEY is a hash of all that the pictures depend on. A run that was
 * stopped goes on where it was; what has changed gets another key and is made again.
 */

/* ===========================================================================
 * rows of the table
 * ======================================================================== */

typedef struct eval_row {
    const char *name;
    const char *recipe;     /* flags of quantize or train that make its network */
    int train;
    const char *net;        /* else: the row whose network it uses, or "best" */
    const char *twin;       /* the row that it is compared with, picture by picture */
    const char *mode;       /* fp32, int8, k=N, schedule */
    const char *file;       /* of --net */
} eval_row;

/* Rows are about ranges and training; the 16 bits of the default have one of their own. */
#define ATT32 "--attention-bits 32"
static const eval_row eval_rows[] = {
    {"fp32", NULL, 0, NULL, NULL, "fp32", NULL},
    {"reference-ptq", "--recipe reference", 0, NULL, NULL, "int8", NULL},
    {"reference-qat", "--recipe reference", 1, NULL, "reference-ptq", "int8", NULL},
    {"reference-qat-k3", NULL, 0, "reference-qat", "reference-qat", "k=3", NULL},
    {"reference-qat-k5", NULL, 0, "reference-qat", "reference-qat", "k=5", NULL},
    {"static-ptq", "--range-conv static " ATT32, 0, NULL, "reference-qat-k5", "int8", NULL},
    {"static-qat", "--range-conv static " ATT32, 1, NULL, "static-ptq", "int8", NULL},
    {"picture-ptq", "--range-conv picture " ATT32, 0, NULL, "reference-qat-k5", "int8", NULL},
    {"picture-qat", "--range-conv picture " ATT32, 1, NULL, "picture-ptq", "int8", NULL},
    {"position-ptq", "--range-conv position " ATT32, 0, NULL, "reference-qat-k5", "int8", NULL},
    {"position-qat", "--range-conv position " ATT32, 1, NULL, "position-ptq", "int8", NULL},
    {"block-ptq", "--range-conv block --range-linear block " ATT32, 0, NULL, "reference-qat-k5",
     "int8", NULL},
    {"block-qat", "--range-conv block --range-linear block " ATT32, 1, NULL, "block-ptq", "int8",
     NULL},
    {"attention-ptq", "--range-conv position --attention-bits 8", 0, NULL, "position-ptq", "int8",
     NULL},
    {"attention16-ptq", "--range-conv position --attention-bits 16", 0, NULL, "position-ptq",
     "int8", NULL},
    {"fine-ptq", "--range-conv block --range-linear block --quantize-last-self 0 " ATT32, 0,
     NULL, "block-ptq", "int8", NULL},
    {"best-k3", NULL, 0, "best", "best", "k=3", NULL},
    {"best-schedule", NULL, 0, "best", "best", "schedule", NULL},
};

enum { EVAL_ROWS = 128, EVAL_MAX = 1001 };

typedef struct eval_result {
    eval_row row;
    const char *file, *folder;          /* network; pictures */
    double *psnr;                       /* of the held-out names, against fp32 */
    double psnr_low, psnr_high, psnr_median, psnr_p10, ssim_median, ssim_p10;
    double gain, gain_low, gain_high;   /* PSNR over the twin, picture by picture: the median */
    double gain_mean[3];                /* and the mean with its interval */
    const char *twin;
    float *feature[2];                  /* of held-out and training prompts */
    double fd_float, fd_low, fd_high, fd_real;
    double nearest, nearest_low, nearest_high;
    double seconds, megabytes, mse[EVAL_MAX];
    float timestep[EVAL_MAX];
    size_t evals, floats;
} eval_result;

typedef struct eval {
    job *j;
    const char *model, *data, *out;
    const char **prompt[2];             /* held-out, training */
    size_t count[2], *train_at;         /* train_at: pictures that the training prompts belong to */
    size_t seeds;                       /* held-out pictures of a prompt: they follow each other */
    sdq_txt2img_desc d;
    uint64_t key;                       /* of everything that rows have in common */
    float *real[2];                     /* features of held-out and training pictures */
    size_t reals[2], dim, trajectories; /* dim: of a feature; 0: none are wanted */
    sdq_image *shown[EVAL_ROWS];        /* pictures of the strip */
    size_t strip;
    eval_result *r;
    size_t n;
} eval;

/* Of eval and study. */
#define MEASURE_FLAGS \
    {"model,m", "FOLDER|FILE", NULL, "the pipeline: a diffusers folder or a single file"}, \
    {"data", "FOLDER", NULL, "training pictures with captions"}, \
    {"held", "FOLDER,..", NULL, "held-out pictures with captions"}

static const flag eval_flags[] = {
    MEASURE_FLAGS,
    {"rows", "NAME,..", NULL,
     "fp32, reference-ptq, -qat, -qat-k3, -qat-k5; static-, picture-, position-,\n"
     "                                        block- with ptq, qat; attention-ptq,\n"
     "                                        attention16-ptq, fine-ptq; best-k3, best-schedule [all]"},
    {"net", "NAME:MODE:FILE", NULL,
     "a row for an int8 file of yours; MODE is int8, k=N or schedule; repeatable"},
    {"out,o", "FOLDER", "build/eval", "results, also of every picture: a stopped run goes on"},
    SAMPLER_FLAGS,
    {"seed,s", "N", "1000", "of the first prompt; each has its own"},
    {"prompts-limit", "N", "0", "prompts of each of the two sets; 0: all"},
    {"trajectories", "N", "8", "float trajectories for the error by timestep"},
    {"timing-runs", "N", "7", "pictures a row, rows in turn, for the seconds per evaluation"},
    {"train-steps", "N", "300", "of rows with training"},
    {"qat", "\"FLAGS\"", "", "flags of sdq train for the rows that are not the reference's"},
    {"calib-prompts", "N", "16", "training prompts to calibrate with"},
    {"target-psnr", "dB", "52", "of best-schedule"},
    {"max-float", "N", "10", "of best-schedule"},
    {"strip", "N", "6", "prompts in OUT/strip.png and OUT/report.html; 0: none"},
    {"log", "FILE.csv", NULL, "training log to draw in the report"},
};

/* ===========================================================================
 * files and keys
 * ======================================================================== */

static uint64_t hash_text(uint64_t h, const char *s) { return hash_bytes(h, s, strlen(s) + 1); }

static uint64_t hash_file(uint64_t h, const char *path) {
    FILE *f = fopen(path, "rb");
    char buf[4096];
    size_t n;
    if (!f) return h;
    while ((n = fread(buf, 1, sizeof buf, f)) > 0) h = hash_bytes(h, buf, n);
    (void)fclose(f);
    return h;
}

/* For the commands that are run: what this one was told about a single file. */
static const char *prediction_flag(job *j) {
    const char *v = arg_text(&j->a, "prediction");
    return v ? format_text(j, " --prediction %s", v) : "";
}

static uint64_t hash_model(job *j, const char *model) {
    static const char *const files[] = {"unet/config.json",
                                        "unet/diffusion_pytorch_model.safetensors",
                                        "unet/diffusion_pytorch_model.safetensors.index.json",
                                        "vae/diffusion_pytorch_model.safetensors",
                                        "vae/config.json",
                                        "text_encoder/model.safetensors",
                                        "scheduler/scheduler_config.json"};
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    struct stat s;
    size_t i;
    if (stat(model, &s) == 0 && S_ISREG(s.st_mode))     /* a single file */
        return hash_text(hash_file(h, model), prediction_flag(j));
    for (i = 0; i < COUNT(files); i++) h = hash_file(h, format_text(j, "%s/%s", model, files[i]));
    return h;
}

/* Run another command in this process, as if typed: "quantize --model X ..". */
static sdq_status run_line(job *j, const char *line) {
    char *copy = format_text(j, "%s%s", line, j->quiet ? " --quiet" : ""), *word[64], *s;
    int n = 0;
    for (s = strtok(copy, " "); s && n < 64; s = strtok(NULL, " ")) word[n++] = s;
    note(j, "+ sdq %s", line);
    if (run_command(n, word) == 0) return SDQ_OK;
    return j->said = SDQ_ERR_ARGUMENT;
}

/* ===========================================================================
 * networks
 * ======================================================================== */

static eval_result *eval_find(eval *e, const char *name) {
    size_t i;
    if (!name) return NULL;
    for (i = 0; i < e->n; i++)
        if (!strcmp(e->r[i].row.name, name)) return &e->r[i];
    return NULL;
}

/* The best network made here without float evaluations, the reference's apart. */
static eval_result *eval_best(eval *e) {
    eval_result *best = NULL;
    size_t i;
    for (i = 0; i < e->n; i++) {
        eval_result *r = &e->r[i];
        if (!r->row.recipe || strstr(r->row.recipe, "reference") || !r->psnr) continue;
        if (!best || r->psnr_median > best->psnr_median) best = r;
    }
    return best;
}

/* r->file = OUT/nets/ROW-KEY.safetensors; returns it without its ending. */
static const char *eval_net_file(eval *e, eval_result *r, uint64_t key) {
    const char *base = format_text(e->j, "%s/nets/%s-%08llx", e->out, r->row.name,
                                   (unsigned long long)(key & 0xffffffffu));
    r->file = format_text(e->j, "%s.safetensors", base);
    return base;
}

static sdq_status eval_make_net(eval *e, eval_result *r) {
    job *j = e->j;
    const int reference = strstr(r->row.recipe, "reference") != NULL;
    const char *extra = r->row.train && !reference ? arg_text(&j->a, "qat") : "", *base;
    const char *common = format_text(
        j, "--model %s%s --data %s --calib-prompts %s --calib-guidance %g %s", e->model,
        prediction_flag(j), e->data, arg_text(&j->a, "calib-prompts"), (double)e->d.guidance,
        r->row.recipe);
    const char *steps = r->row.train ? format_text(j, " --what qat --steps %s %s",
                                                   arg_text(&j->a, "train-steps"), extra)
                                     : "";
    const int threads = sdq_ctx_threads(j->ctx); /* not in the key: results do not depend on it */
    uint64_t h = hash_text(hash_text(hash_model(j, e->model), common), steps);
    base = eval_net_file(e, r, h);
    if (exists(r->file)) return SDQ_OK;
    if (!r->row.train)
        return run_line(
            j, format_text(j, "quantize %s --threads %d --out %s", common, threads, r->file));
    return run_line(
        j, format_text(
               j, "train%s %s --threads %d --out %s --state %s.state --log %s.csv --save-every 20",
               steps, common, threads, r->file, base, base));
}

/* A copy of the best network, with a schedule searched for it on training prompts. */
static sdq_status eval_make_schedule(eval *e, eval_result *r, const char *from) {
    job *j = e->j;
    char *bytes;
    size_t n;
    const char *flags =
        format_text(j, "--steps %zu --guidance-scale %g --target-psnr %s --max-float %s --data %s",
                    e->d.steps, (double)e->d.guidance, arg_text(&j->a, "target-psnr"),
                    arg_text(&j->a, "max-float"), e->data);
    const uint64_t h = hash_text(hash_file(e->key, from), flags);
    const char *part = format_text(j, "%s.part", eval_net_file(e, r, h));
    if (exists(r->file)) return SDQ_OK;
    TRY(read_text(j, from, &bytes, &n));
    TRY(sdq_bytes_write(j->ctx, part, bytes, n));
    TRY(run_line(j, format_text(j, "schedule --model %s%s --unet %s %s --threads %d%s%s", e->model,
                                prediction_flag(j), part, flags, sdq_ctx_threads(j->ctx),
                                arg_text(&j->a, "scheduler") ? " --scheduler " : "",
                                arg_text(&j->a, "scheduler") ? arg_text(&j->a, "scheduler") : "")));
    return rename(part, r->file) == 0 ? SDQ_OK : fail(j, "%s: %s", r->file, strerror(errno));
}

/* The network of a row, and the row to compare it with. */
static sdq_status eval_net(eval *e, eval_result *r) {
    eval_result *of;
    r->twin = r->row.twin;
    r->file = r->row.file;
    if (r->file || !strcmp(r->row.mode, "fp32")) return SDQ_OK;
    if (r->row.recipe) return eval_make_net(e, r);
    of = !strcmp(r->row.net, "best") ? eval_best(e) : eval_find(e, r->row.net);
    if (!of) return fail(e->j, "eval: row %s needs the row %s before it", r->row.name,
                         !strcmp(r->row.net, "best") ? "of a network of its own" : r->row.net);
    r->twin = of->row.name;
    r->file = of->file;
    return strcmp(r->row.mode, "schedule") ? SDQ_OK : eval_make_schedule(e, r, of->file);
}

/* ===========================================================================
 * pictures and errors of a row
 * ======================================================================== */

static void eval_precision(const eval_result *r, sdq_txt2img_desc *d) {
    const char *m = r->row.mode;
    d->precision = !strcmp(m, "fp32")   ? SDQ_PRECISION_FLOAT
                   : !strcmp(m, "int8") ? SDQ_PRECISION_INT8
                   : m[0] == 'k'        ? SDQ_PRECISION_EDGES
                                        : SDQ_PRECISION_POLICY;
    if (m[0] == 'k') d->k_first = d->k_last = (size_t)strtoul(m + 2, NULL, 10);
}

static const char *eval_picture(eval *e, const eval_result *r, int set, size_t i) {
    return format_text(e->j, "%s/%s-%04zu.png", r->folder, set ? "train" : "held", i);
}

/* Pictures are drawn side by side, each by one thread in a context of its own: the pipeline is
 * shared, and the numbers do not depend on it. */
static sdq_status eval_draw_one(const eval *e, const eval_result *r, sdq_ctx *ctx, int set,
                                size_t i, const char *path) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_txt2img_desc d = e->d;
    sdq_image im;
    sdq_tensor *x;
    sdq_status st;
    d.prompt = e->prompt[set][i];
    d.seed = e->d.seed + (set ? 100000u : 0u) + i;
    eval_precision(r, &d);
    x = sdq_txt2img_latents(ctx, e->j->pipe, &d, NULL, NULL);
    st = x ? sdq_decode_latents(ctx, e->j->pipe, x, &im) : sdq_last_error(ctx);
    sdq_arena_release(ctx, mark);
    if (st != SDQ_OK) return st;
    st = sdq_image_write(ctx, path, &im, NULL, 0);
    sdq_image_free(ctx, &im);
    return st;
}

/* Draw what is not there yet. */
static sdq_status eval_draw(eval *e, eval_result *r, int set) {
    job *j = e->j;
    const int threads = sdq_ctx_threads(j->ctx);
    sdq_ctx **ctx = (sdq_ctx **)own(j, (size_t)threads * sizeof(sdq_ctx *));
    const char **path = (const char **)own(j, e->count[set] * sizeof *path);
    const char **said = (const char **)own(j, (size_t)threads * sizeof *said);
    size_t *todo = (size_t *)own(j, e->count[set] * sizeof *todo);
    ptrdiff_t n = 0, done = 0, i;
    size_t k;
    int t;
    sdq_ctx_desc cd;
    memset(&cd, 0, sizeof cd);
    cd.tier = sdq_ctx_tier(j->ctx);
    cd.threads = 1;
    for (t = 0; t < threads; t++) TRY(sdq_ctx_create(&cd, &ctx[t]));
    for (k = 0; k < e->count[set]; k++) {
        path[n] = eval_picture(e, r, set, k);
        if (!exists(path[n])) todo[n++] = k;
    }
    progress_begin(j);
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
    for (i = 0; i < n; i++) {
#ifdef _OPENMP
        const int me = omp_get_thread_num();
#else
        const int me = 0;
#endif
        if (stopped || said[me]) continue;
        if (eval_draw_one(e, r, ctx[me], set, todo[i], path[i]) != SDQ_OK)
            said[me] = sdq_error_text(ctx[me]);
#ifdef _OPENMP
#pragma omp atomic
#endif
        done++;
        if (me == 0) {      /* the one that reports */
            ptrdiff_t so_far;
#ifdef _OPENMP
#pragma omp atomic read
#endif
            so_far = done;
            (void)progress(j, r->row.name, (size_t)so_far, (size_t)n, 0.0);
        }
    }
    for (t = 0; t < threads; t++) {
        if (said[t] && j->said == SDQ_OK) (void)fail(j, "%s", said[t]);
        sdq_ctx_free(ctx[t]);
    }
    if (j->said != SDQ_OK) return j->said;
    return stopped ? fail(j, "stopped; the same command goes on") : SDQ_OK;
}

/* On a float trajectory: what would the row's network have said? */
typedef struct eval_walk {
    job *j;
    eval_result *r;
    unsigned char is_float[EVAL_MAX];
    int learn;                  /* note which evaluations are float, nothing else */
} eval_walk;

static int eval_step(void *user, const sdq_step_info *info) {
    eval_walk *w = (eval_walk *)user;
    const sdq_mark mark = sdq_arena_mark(w->j->ctx);
    const size_t all = info->input->dim[0], n = sdq_tensor_count(info->raw);
    float times[64];
    sdq_unet_input in;
    sdq_tensor *y;
    double sum = 0.0;
    size_t i;
    if (w->learn) {
        w->is_float[info->i] = info->is_float != 0;
        w->r->timestep[info->i] = info->timestep;
        w->r->evals = info->count;
        w->r->floats += info->is_float != 0;
    }
    if (stopped) return 1;
    if (w->learn || w->is_float[info->i] || all > 64) return 0;
    memset(&in, 0, sizeof in);
    for (i = 0; i < all; i++) times[i] = info->timestep;
    in.sample = sdq_tensor_4d(w->j->ctx, all, info->input->dim[1], info->input->dim[2],
                              info->input->dim[3]);
    in.context = sdq_tensor_3d(w->j->ctx, info->context->dim[0], info->context->dim[1],
                               info->context->dim[2]);
    if (!in.sample || !in.context) return 1;
    memcpy(in.sample->data, info->input->data, sdq_tensor_count(in.sample) * sizeof(float));
    memcpy(in.context->data, info->context->data, sdq_tensor_count(in.context) * sizeof(float));
    in.timesteps = times;
    in.guidance = info->guidance;
    y = sdq_unet_forward(w->j->ctx, w->j->pipe->unet_int8, &in, SDQ_INT8);
    if (!y) return 1;
    for (i = 0; i < n; i++) {
        const double d = (double)sdq_f32(y)[i] - (double)sdq_f32(info->raw)[i];
        sum += d * d;
    }
    w->r->mse[info->i] += sum / (double)n;
    sdq_arena_release(w->j->ctx, mark);
    return 0;
}

static sdq_status eval_walk_one(eval *e, eval_walk *w, size_t i, int learn) {
    const sdq_mark mark = sdq_arena_mark(e->j->ctx);
    sdq_txt2img_desc d = e->d;
    sdq_tensor *x;
    d.prompt = e->prompt[0][i];
    d.seed = e->d.seed + i;
    if (learn) eval_precision(w->r, &d);
    else d.precision = SDQ_PRECISION_FLOAT;
    d.step = eval_step;
    d.user = w;
    w->learn = learn;
    x = sdq_txt2img_latents(e->j->ctx, e->j->pipe, &d, NULL, NULL);
    sdq_arena_release(e->j->ctx, mark);
    return x ? SDQ_OK : sdq_last_error(e->j->ctx);
}

/* r->mse and which evaluations are float, from OUT/../errors.txt or measured now. */
static sdq_status eval_errors(eval *e, eval_result *r) {
    job *j = e->j;
    const char *path = format_text(j, "%s/errors.txt", r->folder);
    const size_t n = e->trajectories < e->count[0] ? e->trajectories : e->count[0];
    eval_walk *w = (eval_walk *)own(j, sizeof *w);
    char *text, *s;
    size_t i;
    w->j = j;
    w->r = r;
    TRY(eval_walk_one(e, w, 0, 1));
    if (exists(path)) {
        TRY(read_text(j, path, &text, NULL));
        for (i = 0, s = text; i < r->evals; i++) r->mse[i] = strtod(s, &s);
        return SDQ_OK;
    }
    progress_begin(j);
    for (i = 0; i < n && r->floats < r->evals; i++) {
        TRY(eval_walk_one(e, w, i, 0));
        (void)progress(j, "errors", i + 1, n, 0.0);
    }
    text = (char *)own(j, r->evals * 32 + 1);
    for (i = 0, s = text; i < r->evals; i++) {
        r->mse[i] /= (double)(n ? n : 1);
        s += sprintf(s, "%.9e\n", r->mse[i]);
    }
    return sdq_bytes_write(j->ctx, path, text, (size_t)(s - text));
}

/* ===========================================================================
 * measures
 * ======================================================================== */

/* The mean of the VAE's encoder, average-pooled to 4x4 per channel. */
static sdq_status eval_feature(eval *e, const sdq_image *im, float *out) {
    job *j = e->j;
    const sdq_mark mark = sdq_arena_mark(j->ctx);
    sdq_tensor *x = sdq_tensor_4d(j->ctx, 1, im->h, im->w, 3), *m;
    const size_t c = sdq_model_get_info(j->pipe->vae).latent;
    size_t i, k, y, col, py, px;
    if (!x) return sdq_last_error(j->ctx);
    for (i = 0; i < im->h * im->w * 3; i++) sdq_f32(x)[i] = (float)im->px[i] / 127.5f - 1.0f;
    m = sdq_vae_encode(j->ctx, j->pipe->vae, x, SDQ_FLOAT);
    if (!m) return sdq_last_error(j->ctx);
    for (py = 0; py < 4; py++)
        for (px = 0; px < 4; px++)
            for (k = 0; k < c; k++) {
                const size_t h = m->dim[1], w = m->dim[2], y1 = (py + 1) * h / 4,
                             x1 = (px + 1) * w / 4;
                double sum = 0.0, n = 0.0;
                for (y = py * h / 4; y < y1 || y == py * h / 4; y++)
                    for (col = px * w / 4; col < x1 || col == px * w / 4; col++, n += 1.0)
                        sum += (double)sdq_f32(m)[(y * w + col) * 2 * c + k];
                *out++ = (float)(sum / n);
            }
    sdq_arena_release(j->ctx, mark);
    return SDQ_OK;
}

/* Features of all pictures of a folder, fitted to the size that the model draws. */
static sdq_status eval_real(eval *e, const char *folder, float **out, size_t *n) {
    job *j = e->j;
    const sdq_model_info unet = sdq_model_get_info(j->pipe->unet);
    const size_t f = sdq_model_get_info(j->pipe->vae).factor;
    const size_t h = unet.sample_size ? unet.sample_size * f : 512;
    const size_t w = unet.sample_width ? unet.sample_width * f : 512;
    sdq_dataset *data;
    float *all;
    sdq_status st = SDQ_OK;
    size_t i, count;
    TRY(sdq_dataset_open(j->ctx, folder, &data));
    count = sdq_dataset_count(data);
    all = (float *)own(j, (*n + count) * e->dim * sizeof *all);
    if (*n) memcpy(all, *out, *n * e->dim * sizeof *all);
    progress_begin(j);
    for (i = 0; i < count && st == SDQ_OK; i++) {
        sdq_image raw, im;
        st = sdq_dataset_image(j->ctx, data, i, &raw);
        if (st == SDQ_OK) st = sdq_image_fit(j->ctx, &raw, w, h, &im);
        sdq_image_free(j->ctx, &raw);
        if (st == SDQ_OK) st = eval_feature(e, &im, all + (*n + i) * e->dim);
        sdq_image_free(j->ctx, &im);
        if (progress(j, "features", i + 1, count, 0.0) && st == SDQ_OK) st = fail(j, "stopped");
    }
    sdq_dataset_free(j->ctx, data);
    *out = all;
    *n += count;
    return st;
}

static sdq_status eval_read(eval *e, const eval_result *r, int set, size_t i, sdq_image *out) {
    return sdq_image_read(e->j->ctx, eval_picture(e, r, set, i), out);
}

/* 95 % interval of the median of a number of every held-out picture, by bootstrap over prompts: the
 * pictures of a prompt are drawn together. */
static sdq_status eval_median_interval(eval *e, const double *x, double *low, double *high) {
    enum { ROUNDS = 1000 };
    const size_t n = e->count[0], group = e->seeds;
    double *m = (double *)own(e->j, ROUNDS * sizeof *m), *s = (double *)own(e->j, n * sizeof *s);
    sdq_rng rng;
    size_t i, k;
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 1);
    for (k = 0; k < ROUNDS; k++) {
        for (i = 0; i < n; i += group)
            memcpy(s + i, x + (size_t)sdq_rng_below(&rng, n / group) * group, group * sizeof *s);
        TRY(sdq_percentile(e->j->ctx, s, n, 50.0, &m[k]));
    }
    TRY(sdq_percentile(e->j->ctx, m, ROUNDS, 2.5, low));
    return sdq_percentile(e->j->ctx, m, ROUNDS, 97.5, high);
}

/* Features of a row's pictures; PSNR and SSIM of the held-out ones against fp32. */
static sdq_status eval_pictures(eval *e, eval_result *r) {
    job *j = e->j;
    const eval_result *ref = &e->r[0];
    double *ssim = (double *)own(j, e->count[0] * sizeof *ssim);
    sdq_status st = SDQ_OK;
    size_t i, set;
    r->psnr = (double *)own(j, e->count[0] * sizeof *r->psnr);
    for (set = 0; set < 2; set++) {
        r->feature[set] = (float *)own(j, e->count[set] * e->dim * sizeof(float));
        for (i = 0; i < e->count[set] && st == SDQ_OK; i++) {
            sdq_image im, base;
            TRY(eval_read(e, r, (int)set, i, &im));
            if (e->dim) st = eval_feature(e, &im, r->feature[set] + i * e->dim);
            if (set == 0 && st == SDQ_OK && (st = eval_read(e, ref, 0, i, &base)) == SDQ_OK) {
                r->psnr[i] = sdq_psnr(im.px, base.px, im.w * im.h * im.c);
                st = sdq_ssim(j->ctx, im.px, base.px, im.h, im.w, im.c, &ssim[i]);
                sdq_image_free(j->ctx, &base);
            }
            sdq_image_free(j->ctx, &im);
        }
        TRY(st);
    }
    TRY(sdq_percentile(j->ctx, r->psnr, e->count[0], 50.0, &r->psnr_median));
    TRY(sdq_percentile(j->ctx, r->psnr, e->count[0], 10.0, &r->psnr_p10));
    TRY(eval_median_interval(e, r->psnr, &r->psnr_low, &r->psnr_high));
    TRY(sdq_percentile(j->ctx, ssim, e->count[0], 50.0, &r->ssim_median));
    return sdq_percentile(j->ctx, ssim, e->count[0], 10.0, &r->ssim_p10);
}

/* Both sets of a row as one list of features. */
static float *eval_both(eval *e, const eval_result *r) {
    const size_t a = e->count[0] * e->dim, b = e->count[1] * e->dim;
    float *x = (float *)own(e->j, (a + b) * sizeof *x);
    memcpy(x, r->feature[0], a * sizeof *x);
    memcpy(x + a, r->feature[1], b * sizeof *x);
    return x;
}

/* Frechet distances: to fp32's pictures of the same prompts, with an interval over prompts, and of
 * the held-out names to the real pictures. Samples drawn twice make a covariance poorer and the
 * distance larger, so the interval is moved by the mean of that excess. */
static sdq_status eval_frechet(eval *e, eval_result *r) {
    enum { ROUNDS = 100 };
    job *j = e->j;
    const size_t n = e->count[0] + e->count[1], row = e->dim * sizeof(float);
    float *a = eval_both(e, r), *b = eval_both(e, &e->r[0]);
    float *sa = (float *)own(j, n * row), *sb = (float *)own(j, n * row);
    double d[ROUNDS], mean = 0.0;
    sdq_rng rng;
    size_t i, k;
    TRY(sdq_frechet(j->ctx, a, n, b, n, e->dim, &r->fd_float));
    TRY(sdq_frechet(j->ctx, r->feature[0], e->count[0], e->real[0], e->reals[0], e->dim,
                    &r->fd_real));
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 2);
    for (k = 0; k < ROUNDS; k++) {
        for (i = 0; i < n; i++) {
            const size_t at = (size_t)sdq_rng_below(&rng, n);
            memcpy(sa + i * e->dim, a + at * e->dim, row);
            memcpy(sb + i * e->dim, b + at * e->dim, row);
        }
        TRY(sdq_frechet(j->ctx, sa, n, sb, n, e->dim, &d[k]));
        mean += d[k] / (double)ROUNDS;
    }
    TRY(sdq_percentile(j->ctx, d, ROUNDS, 2.5, &r->fd_low));
    TRY(sdq_percentile(j->ctx, d, ROUNDS, 97.5, &r->fd_high));
    r->fd_low = fmax(0.0, r->fd_low + r->fd_float - mean);
    r->fd_high += r->fd_float - mean;
    return SDQ_OK;
}

static sdq_status eval_nearest(eval *e, eval_result *r) {
    double *hit = (double *)own(e->j, e->count[1] * sizeof *hit);
    sdq_rng rng;
    size_t i;
    for (i = 0; i < e->count[1]; i++) {
        hit[i] = sdq_nearest(r->feature[1] + i * e->dim, e->real[1], e->reals[1], e->dim, NULL)
                 == e->train_at[i];
        r->nearest += hit[i] / (double)e->count[1];
    }
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 3);
    return sdq_bootstrap(e->j->ctx, hit, e->count[1], 0, 0.0, &rng, &r->nearest_low,
                         &r->nearest_high);
}

/* Picture by picture. The median counts; a few pictures that turn into others by a hair's breadth
 * make the mean uncertain. */
static sdq_status eval_gain(eval *e, eval_result *r) {
    const eval_result *twin = eval_find(e, r->twin);
    const size_t n = e->count[0];
    double *d = (double *)own(e->j, n * sizeof *d);
    sdq_rng rng;
    size_t i;
    if (!twin || twin >= r || !twin->psnr) { r->twin = NULL; return SDQ_OK; }
    for (i = 0; i < n; i++) {
        d[i] = r->psnr[i] - twin->psnr[i];
        r->gain_mean[0] += d[i] / (double)n;
    }
    sdq_rng_init(&rng, SDQ_RNG_PHILOX, 4);
    TRY(sdq_bootstrap(e->j->ctx, d, n, 0, 0.0, &rng, &r->gain_mean[1], &r->gain_mean[2]));
    TRY(sdq_percentile(e->j->ctx, d, n, 50.0, &r->gain));
    return eval_median_interval(e, d, &r->gain_low, &r->gain_high);
}

static void eval_size(eval *e, eval_result *r) {
    const double whole = (double)sdq_model_get_info(e->j->pipe->unet).weights * 4.0 / 1e6;
    r->megabytes = (r->file ? (double)file_bytes(r->file) / 1e6 : 0.0) + (r->floats ? whole : 0.0);
}

/* Seconds per evaluation: complete runs of all rows in turn, so that a slow moment of the machine
 * hits all of them; the median counts. */
static sdq_status eval_times(eval *e) {
    job *j = e->j;
    sdq_pipeline **pipe = (sdq_pipeline **)own(j, e->n * sizeof *pipe);
    double *t;
    size_t i, k, rounds = 0;
    sdq_status st = SDQ_OK;
    TRY(arg_size(j, "timing-runs", &rounds));
    t = (double *)own(j, (e->n * rounds + 1) * sizeof *t);
    for (i = 0; i < e->n && rounds && st == SDQ_OK; i++) {
        sdq_pipeline_desc pd;
        memset(&pd, 0, sizeof pd);
        pd.unet_int8 = e->r[i].file;
        st = load_pipeline(j, e->model, &pd, &pipe[i]);
    }
    progress_begin(j);
    for (k = 0; k < rounds && st == SDQ_OK; k++)
        for (i = 0; i < e->n && st == SDQ_OK; i++) {
            const sdq_mark mark = sdq_arena_mark(j->ctx);
            sdq_txt2img_desc d = e->d;
            double start = now();
            d.prompt = e->prompt[0][0];
            eval_precision(&e->r[i], &d);
            if (!sdq_txt2img_latents(j->ctx, pipe[i], &d, NULL, NULL)) st = sdq_last_error(j->ctx);
            t[i * rounds + k] = (now() - start) / (double)e->r[i].evals;
            sdq_arena_release(j->ctx, mark);
            if (progress(j, "time", k * e->n + i + 1, rounds * e->n, 0.0) && st == SDQ_OK)
                st = fail(j, "stopped; the same command goes on");
        }
    for (i = 0; i < e->n; i++) {
        if (rounds && st == SDQ_OK)
            st = sdq_percentile(j->ctx, t + i * rounds, rounds, 50.0, &e->r[i].seconds);
        sdq_pipeline_free(j->ctx, pipe[i]);
    }
    return st;
}

/* Load the network of a row, measure its errors, draw its held-out pictures; key: of all that they
 * depend on but the network's file. */
static sdq_status eval_row_draw(eval *e, eval_result *r, uint64_t key) {
    job *j = e->j;
    sdq_pipeline_desc pd;
    memset(&pd, 0, sizeof pd);
    pd.unet_int8 = r->file;
    sdq_pipeline_free(j->ctx, j->pipe);
    j->pipe = NULL;
    TRY(load_pipeline(j, e->model, &pd, &j->pipe));
    if (r->file) key = hash_file(key, r->file);
    r->folder = format_text(j, "%s/pictures/%s-%08llx", e->out, r->row.name,
                            (unsigned long long)(key & 0xffffffffu));
    TRY(make_folder(j, r->folder));
    TRY(eval_errors(e, r));
    eval_size(e, r);
    return eval_draw(e, r, 0);
}

/* Everything about one row. */
static sdq_status eval_row_run(eval *e, eval_result *r) {
    note(e->j, "row %s", r->row.name);
    TRY(eval_net(e, r));
    TRY(eval_row_draw(e, r, hash_text(e->key, r->row.mode)));
    TRY(eval_draw(e, r, 1));
    TRY(eval_pictures(e, r));
    TRY(eval_frechet(e, r));
    TRY(eval_nearest(e, r));
    return eval_gain(e, r);
}

/* ===========================================================================
 * tables
 * ======================================================================== */

/* Mean error over a third of the evaluations: 0 first, 1 middle, 2 last. */
static double eval_third(const eval_result *r, size_t third) {
    const size_t a = third * r->evals / 3, b = (third + 1) * r->evals / 3;
    double sum = 0.0;
    size_t i;
    for (i = a; i < b; i++) sum += r->mse[i] / (double)(b > a ? b - a : 1);
    return sum;
}

static void eval_table_head(FILE *f) {
    fputs("| row | PSNR dB median [95 %] | p10 | SSIM median | p10 | Frechet to fp32 [95 %] "
          "| to held-out | nearest right % [95 %] | MSE 1e-4 early, middle, late "
          "| s/eval | float | MB | PSNR gain, median [95 %]; mean [95 %] |\n"
          "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n", f);
}

static const char *eval_equal(double low, double high) {
    return low <= 0.0 && high >= 0.0 ? " =" : "";
}

static void eval_table_row(FILE *f, const eval_result *r) {
    fprintf(f, "| %s | ", r->row.name);
    if (r->floats == r->evals) fprintf(f, "99 | 99 | 1 | 1 | 0 |");
    else
        fprintf(f, "%.2f [%.2f, %.2f] | %.2f | %.4f | %.4f | %.4g [%.3g, %.3g] |", r->psnr_median,
                r->psnr_low, r->psnr_high, r->psnr_p10, r->ssim_median, r->ssim_p10, r->fd_float,
                r->fd_low, r->fd_high);
    fprintf(f, " %.4g | %.1f [%.1f, %.1f] | %.3g, %.3g, %.3g | %.4f | %zu of %zu | %.2f |",
            r->fd_real, 100.0 * r->nearest, 100.0 * r->nearest_low, 100.0 * r->nearest_high,
            1e4 * eval_third(r, 0), 1e4 * eval_third(r, 1), 1e4 * eval_third(r, 2), r->seconds,
            r->floats, r->evals, r->megabytes);
    if (r->twin)
        fprintf(f, " %+.2f [%+.2f, %+.2f]%s; %+.2f [%+.2f, %+.2f]%s over %s |\n", r->gain,
                r->gain_low, r->gain_high, eval_equal(r->gain_low, r->gain_high), r->gain_mean[0],
                r->gain_mean[1], r->gain_mean[2], eval_equal(r->gain_mean[1], r->gain_mean[2]),
                r->twin);
    else fputs(" |\n", f);
}

static void eval_table_note(const eval *e, FILE *f) {
    fprintf(f,
            "\n%zu held-out and %zu training prompts, %zu steps, guidance %g. Nearest "
            "neighbour among %zu training pictures: chance %.2f %%.\n"
            "Errors: mean of %zu float trajectories, 0 where the evaluation is float. "
            "\"=\": not different within the 95 %% interval. "
            "MB: int8 file, plus the float UNet (F32) where it is used.\n",
            e->count[0], e->count[1], e->d.steps, (double)e->d.guidance, e->reals[1],
            100.0 / (double)e->reals[1], e->trajectories);
}

static void eval_json_row(FILE *f, const eval_result *r, int last) {
    size_t i;
    fprintf(f, "  {\"row\": \"%s\", ", r->row.name);
    fprintf(f, "\"psnr_median\": %.4f, \"psnr_interval\": [%.4f, %.4f], \"psnr_p10\": %.4f, ",
            r->psnr_median, r->psnr_low, r->psnr_high, r->psnr_p10);
    fprintf(f, "\"ssim_median\": %.6f, \"ssim_p10\": %.6f, ", r->ssim_median, r->ssim_p10);
    fprintf(f, "\"frechet_fp32\": %.6g, \"frechet_fp32_interval\": [%.6g, %.6g], ", r->fd_float,
            r->fd_low, r->fd_high);
    fprintf(f, "\"frechet_held\": %.6g, \"nearest\": %.5f, \"nearest_interval\": [%.5f, %.5f], ",
            r->fd_real, r->nearest, r->nearest_low, r->nearest_high);
    fprintf(f, "\"seconds_per_evaluation\": %.5f, \"evaluations\": %zu, \"float\": %zu, "
            "\"megabytes\": %.3f, ", r->seconds, r->evals, r->floats, r->megabytes);
    if (r->twin)
        fprintf(f, "\"twin\": \"%s\", \"gain\": %.4f, \"gain_interval\": [%.4f, %.4f], "
                "\"gain_mean\": %.4f, \"gain_mean_interval\": [%.4f, %.4f], ", r->twin, r->gain,
                r->gain_low, r->gain_high, r->gain_mean[0], r->gain_mean[1], r->gain_mean[2]);
    fputs("\"mse\": [", f);
    for (i = 0; i < r->evals; i++)
        fprintf(f, "%s[%g, %.5e]", i ? ", " : "", (double)r->timestep[i], r->mse[i]);
    fprintf(f, "]}%s\n", last ? "" : ",");
}

static sdq_status eval_write(eval *e) {
    job *j = e->j;
    const char *table = format_text(j, "%s/table.md", e->out);
    const char *json = format_text(j, "%s/table.json", e->out);
    FILE *f;
    size_t i;
    TRY(report_begin(j, table, &f));
    eval_table_head(f);
    for (i = 0; i < e->n; i++) eval_table_row(f, &e->r[i]);
    eval_table_note(e, f);
    TRY(report_end(j, table, f));
    TRY(report_begin(j, json, &f));
    fputs("[\n", f);
    for (i = 0; i < e->n; i++) eval_json_row(f, &e->r[i], i + 1 == e->n);
    fputs("]\n", f);
    return report_end(j, json, f);
}

/* ===========================================================================
 * the strip: one row of pictures per prompt, one column per variant
 * ======================================================================== */

/* A small alphabet, 5 x 7: each row of a letter is a character, '0' + bits. */
static const char font_chars[] = " abcdefghijklmnopqrstuvwxyz0123456789.,:-+=()'/%&!?";
static const char font_rows[] =
    "000000000>1?A?@@NAAAN00?@@@?11?AAA?00>AO@>68N888800?A?1>@@NAAAA40<444>20622B<@@BDHDB"
    "<44444>00JEEEE00NAAAA00>AAA>00NAN@@00?A?1100FH@@@00?@>1N88N888600AAAA?00AAA:400AEEE:"
    "00A:4:A00AA?1>00O248O>ACEIA>4<4444>>A168@O>A161A>26:BO22O@N11A>>@NAAA>O124488>AA>AA>"
    ">AA?11>00000<<0000<480<<0<<0000N000004>40000N0N00488888484444484400000122488@IJ248F6"
    "<BD8EB=4444404>A16404";

static void draw_text(sdq_image *im, size_t x, size_t y, size_t size, const char *s, size_t width) {
    size_t n, row, col, i, k;
    for (n = 0; s[n] && (n + 1) * 6 * size <= width; n++) {
        const char *at = strchr(font_chars, tolower((unsigned char)s[n]));
        const size_t g = at && *at ? (size_t)(at - font_chars) : 0;
        const size_t drop = at && *at && strchr("gpqy", *at) ? 2 : 0;       /* below the line */
        for (row = 0; row < 7; row++)
            for (col = 0; col < 5; col++) {
                if (!((font_rows[g * 7 + row] - '0') >> (4 - col) & 1)) continue;
                for (i = 0; i < size; i++)
                    for (k = 0; k < size; k++) {
                        const size_t px = x + (n * 6 + col) * size + k;
                        const size_t py = y + (row + drop) * size + i;
                        if (px < im->w && py < im->h)
                            memset(im->px + (py * im->w + px) * im->c, 40, im->c);
                    }
            }
    }
}

static void draw_picture(sdq_image *im, size_t x, size_t y, size_t scale, const sdq_image *src) {
    size_t i, k;
    for (i = 0; i < src->h * scale; i++)
        for (k = 0; k < src->w * scale; k++)
            if (x + k < im->w && y + i < im->h)
                memcpy(im->px + ((y + i) * im->w + x + k) * 3,
                       src->px + ((i / scale) * src->w + k / scale) * 3, 3);
}

/* Prompt p of the strip: held-out names and training prompts in turn, spread over both. */
static void strip_prompt(const eval *e, size_t p, int *set, size_t *i) {
    const size_t half = (e->strip + 1) / 2;
    *set = (int)(p % 2);
    *i = p / 2 * e->count[*set] / (half ? half : 1);
}

static sdq_status strip_load(eval *e) {
    size_t r, p, i;
    int set;
    for (r = 0; r < e->n; r++) {
        e->shown[r] = (sdq_image *)own(e->j, (e->strip + 1) * sizeof(sdq_image));
        for (p = 0; p < e->strip; p++) {
            strip_prompt(e, p, &set, &i);
            TRY(eval_read(e, &e->r[r], set, i, &e->shown[r][p]));
        }
    }
    return SDQ_OK;
}

static void strip_free(eval *e) {
    size_t r, p;
    for (r = 0; r < e->n; r++)
        for (p = 0; e->shown[r] && p < e->strip; p++) sdq_image_free(e->j->ctx, &e->shown[r][p]);
}

static sdq_status strip_write(eval *e) {
    const sdq_image *first = &e->shown[0][0];
    const size_t scale = first->w < 128 ? (127 + first->w) / first->w : 1;
    const size_t cell = first->w * scale + 8;
    const size_t high = first->h * scale + 22, left = 8, top = 24;
    sdq_image im;
    sdq_status st;
    size_t r, p, i;
    int set;
    TRY(sdq_image_new(e->j->ctx, left + e->n * cell, top + e->strip * high, 3, &im));
    memset(im.px, 255, im.w * im.h * 3);
    for (r = 0; r < e->n; r++) draw_text(&im, left + r * cell, 8, 1, e->r[r].row.name, cell);
    for (p = 0; p < e->strip; p++) {
        strip_prompt(e, p, &set, &i);
        draw_text(&im, left, top + p * high + 4, 1, e->prompt[set][i], im.w - left);
        for (r = 0; r < e->n; r++)
            draw_picture(&im, left + r * cell, top + p * high + 15, scale, &e->shown[r][p]);
    }
    st = sdq_image_write(e->j->ctx, format_text(e->j, "%s/strip.png", e->out), &im, NULL, 0);
    sdq_image_free(e->j->ctx, &im);
    return st;
}

/* ===========================================================================
 * the page
 * ======================================================================== */

static void html_text(FILE *f, const char *s) {
    for (; *s; s++) {
        if (*s == '<') fputs("&lt;", f);
        else if (*s == '&') fputs("&amp;", f);
        else fputc(*s, f);
    }
}

static void html_base64(FILE *f, const unsigned char *b, size_t n) {
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t i;
    for (i = 0; i < n; i += 3) {
        const unsigned v = (unsigned)b[i] << 16 | (i + 1 < n ? (unsigned)b[i + 1] << 8 : 0u)
                           | (i + 2 < n ? b[i + 2] : 0u);
        fputc(digit[v >> 18], f);
        fputc(digit[v >> 12 & 63], f);
        fputc(i + 1 < n ? digit[v >> 6 & 63] : '=', f);
        fputc(i + 2 < n ? digit[v & 63] : '=', f);
    }
}

static sdq_status html_image(eval *e, FILE *f, const sdq_image *im) {
    unsigned char *png;
    size_t n;
    TRY(sdq_image_png_encode(e->j->ctx, im, NULL, 0, &png, &n));
    fputs("<td><img src=\"data:image/png;base64,", f);
    html_base64(f, png, n);
    fputs("\"></td>", f);
    sdq_bytes_free(e->j->ctx, png);
    return SDQ_OK;
}

/* One line of a chart: points with y > 0, on a logarithmic scale. */
typedef struct series { const char *name; const double *x, *y; size_t n; } series;

static void svg_chart(FILE *f, const char *title, const char *xname, const series *s, size_t n) {
    static const char *const color[] = {"#1f77b4", "#d62728", "#2ca02c", "#9467bd",
                                        "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f"};
    double x0 = 1e300, x1 = -1e300, y0 = 1e300, y1 = -1e300, y;
    size_t i, k;
    for (i = 0; i < n; i++)
        for (k = 0; k < s[i].n; k++) {
            if (!(s[i].y[k] > 0.0)) continue;
            x0 = fmin(x0, s[i].x[k]); x1 = fmax(x1, s[i].x[k]);
            y0 = fmin(y0, log10(s[i].y[k])); y1 = fmax(y1, log10(s[i].y[k]));
        }
    if (x1 < x0) return;
    if (x1 - x0 < 1e-9) x1 = x0 + 1.0;
    if (y1 - y0 < 0.05) { y0 -= 0.05; y1 += 0.05; }
    fprintf(f,
            "<h2>%s</h2><svg width=\"720\" height=\"%zu\" font-size=\"12\" "
            "font-family=\"sans-serif\"><rect x=\"60\" y=\"10\" width=\"640\" height=\"250\" "
            "fill=\"none\" stroke=\"#999\"/>",
            title, 300 + 16 * n);
    for (y = ceil(y0 * 5.0) / 5.0; y <= y1; y += y1 - y0 > 2.0 ? 1.0 : y1 - y0 > 0.8 ? 0.4 : 0.2) {
        const double at = 260.0 - 250.0 * (y - y0) / (y1 - y0);
        fprintf(f,
                "<line x1=\"60\" x2=\"700\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#eee\"/>"
                "<text x=\"54\" y=\"%.1f\" text-anchor=\"end\">%.2g</text>",
                at, at, at + 4.0, pow(10.0, y));
    }
    fprintf(f, "<text x=\"60\" y=\"276\">%g</text>"
            "<text x=\"700\" y=\"276\" text-anchor=\"end\">%g</text>"
            "<text x=\"380\" y=\"276\" text-anchor=\"middle\">%s</text>", x0, x1, xname);
    for (i = 0; i < n; i++) {
        const char *c = color[i % COUNT(color)];
        fprintf(f, "<polyline fill=\"none\" stroke=\"%s\" points=\"", c);
        for (k = 0; k < s[i].n; k++)
            if (s[i].y[k] > 0.0)
                fprintf(f, "%.1f,%.1f ", 60.0 + 640.0 * (s[i].x[k] - x0) / (x1 - x0),
                        260.0 - 250.0 * (log10(s[i].y[k]) - y0) / (y1 - y0));
        fprintf(f, "\"/><text x=\"66\" y=\"%zu\" fill=\"%s\">%s</text>", 292 + 16 * i, c,
                s[i].name);
    }
    fputs("</svg>\n", f);
}

/* The column of a row of the training log as a number; 0 when it is empty or not there. */
static int log_column(const char *row, int column, double *out) {
    for (; column > 0; column--) {
        row += strcspn(row, ",\n");
        if (*row++ != ',') return 0;
    }
    return sscanf(row, "%lf", out) == 1 && !strchr(",\n", *row);
}

/* step and loss of a training log, the mean of the loss over the last 5 % of the steps, and the loss
 * on held-out data where it was measured. */
static sdq_status html_loss(eval *e, FILE *f, const char *path) {
    char *text, *s;
    size_t cap, n = 0, held = 0, i, w;
    double *x, *y, *mean, *hx, *hy, sum = 0.0;
    series line[3];
    if (!path || !exists(path)) return SDQ_OK;
    TRY(read_text(e->j, path, &text, &cap));
    x = (double *)own(e->j, (cap / 4 + 1) * sizeof *x);
    y = (double *)own(e->j, (cap / 4 + 1) * sizeof *y);
    mean = (double *)own(e->j, (cap / 4 + 1) * sizeof *mean);
    hx = (double *)own(e->j, (cap / 4 + 1) * sizeof *hx);
    hy = (double *)own(e->j, (cap / 4 + 1) * sizeof *hy);
    for (s = text; *s; s += strcspn(s, "\n"), s += *s == '\n') {
        if (!isdigit((unsigned char)*s)) continue;
        x[n] = hx[held] = strtod(s, NULL);
        if (log_column(s, 7, &hy[held])) held++;
        if (log_column(s, 1, &y[n])) n++;
    }
    w = n / 20 + 1;
    for (i = 0; i < n; i++) {
        sum += y[i] - (i >= w ? y[i - w] : 0.0);
        mean[i] = sum / (double)(i < w ? i + 1 : w);
    }
    line[0].name = "loss of a step"; line[1].name = "mean";
    line[0].x = line[1].x = x;
    line[0].y = y; line[1].y = mean;
    line[0].n = line[1].n = n;
    line[2].name = "on held-out data";
    line[2].x = hx; line[2].y = hy; line[2].n = held;
    svg_chart(f, "Training: loss by step", "step", line, held ? 3 : 2);
    return SDQ_OK;
}

static void html_errors(eval *e, FILE *f) {
    series s[EVAL_ROWS];
    size_t i, k, n = 0;
    for (i = 0; i < e->n; i++) {
        double *x = (double *)own(e->j, EVAL_MAX * sizeof *x);
        if (e->r[i].floats == e->r[i].evals) continue;
        for (k = 0; k < e->r[i].evals; k++) x[k] = (double)e->r[i].timestep[k];
        s[n].name = e->r[i].row.name;
        s[n].x = x;
        s[n].y = e->r[i].mse;
        s[n++].n = e->r[i].evals;
    }
    svg_chart(f, "Error by timestep (mean square, on the float trajectory)", "timestep", s, n);
}

static void html_table(const eval *e, FILE *f) {
    size_t i;
    fputs("<table class=\"t\"><tr><th>variant<th>PSNR dB, median [95 %]<th>10th percentile"
          "<th>SSIM<th>Frechet to fp32<th>to held-out pictures<th>nearest right %"
          "<th>s per evaluation<th>float<th>MB</tr>\n", f);
    for (i = 0; i < e->n; i++) {
        const eval_result *r = &e->r[i];
        fprintf(f, "<tr><td>%s<td>%.2f [%.2f, %.2f]<td>%.2f<td>%.4f<td>%.4g<td>%.4g", r->row.name,
                r->psnr_median, r->psnr_low, r->psnr_high, r->psnr_p10, r->ssim_median, r->fd_float,
                r->fd_real);
        fprintf(f, "<td>%.1f<td>%.4f<td>%zu of %zu<td>%.2f</tr>\n", 100.0 * r->nearest, r->seconds,
                r->floats, r->evals, r->megabytes);
    }
    fprintf(f, "</table><p>%zu held-out names, %zu training prompts, %zu steps, guidance %g; "
            "pictures are compared with those of fp32 from the same seed. "
            "Chance level of the nearest neighbour: %.2f %%.</p>\n", e->count[0], e->count[1],
            e->d.steps, (double)e->d.guidance, 100.0 / (double)e->reals[1]);
}

static sdq_status html_write(eval *e) {
    const char *path = format_text(e->j, "%s/report.html", e->out);
    FILE *f;
    sdq_status st = SDQ_OK;
    size_t r, p, i;
    int set;
    TRY(report_begin(e->j, path, &f));
    fputs("<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">"
          "<title>sdq: quantized Stable Diffusion</title><style>"
          "body{font:15px sans-serif;margin:24px;max-width:1100px}"
          "img{width:128px;image-rendering:pixelated}table{border-collapse:collapse}"
          ".t td,.t th{border:1px solid #ccc;padding:3px 8px;text-align:right}"
          "td{padding:2px 6px}</style><h1>sdq: float, int8 and mixed precision</h1>\n", f);
    html_table(e, f);
    fputs("<h2>Pictures</h2><table><tr>", f);
    for (r = 0; r < e->n; r++) fprintf(f, "<th>%s", e->r[r].row.name);
    fputs("</tr>\n", f);
    for (p = 0; p < e->strip && st == SDQ_OK; p++) {
        strip_prompt(e, p, &set, &i);
        fputs("<tr>", f);
        for (r = 0; r < e->n && st == SDQ_OK; r++) st = html_image(e, f, &e->shown[r][p]);
        fputs("<td>", f);
        html_text(f, e->prompt[set][i]);
        fprintf(f, " <small>(%s)</small></tr>\n", set ? "training prompt" : "never seen");
    }
    fputs("</table>\n", f);
    html_errors(e, f);
    if (st == SDQ_OK) st = html_loss(e, f, arg_text(&e->j->a, "log"));
    fputs("</html>\n", f);
    if (st == SDQ_OK) st = report_end(e->j, path, f);
    else (void)fclose(f);
    if (st == SDQ_OK) note(e->j, "wrote %s/strip.png, report.html, table.md, table.json", e->out);
    return st;
}

/* ===========================================================================
 * the command
 * ======================================================================== */

static sdq_status eval_add(eval *e, const eval_row *row) {
    if (e->n == EVAL_ROWS) return fail(e->j, "eval: more than %d rows", (int)EVAL_ROWS);
    e->r[e->n++].row = *row;
    return SDQ_OK;
}

/* take[i] = 1 for the rows of a list of names. */
static sdq_status eval_take(eval *e, const char *names, const eval_row *rows, size_t n,
                            unsigned char *take) {
    size_t i, k, len;
    for (i = 0; names[i]; i += len + (names[i + len] == ',')) {
        len = strcspn(names + i, ",");
        for (k = 0; k < n; k++) if (name_in(rows[k].name, names + i, len)) break;
        if (k == n) {
            const char *known = rows[0].name;
            for (k = 1; k < n; k++) known = format_text(e->j, "%s, %s", known, rows[k].name);
            return bad_value(e->j, "rows", names, known);
        }
        take[k] = 1;
    }
    return SDQ_OK;
}

/* A:B:C in three. */
static sdq_status eval_split(job *j, const char *name, const char *text, const char *form,
                             const char *part[3]) {
    char *a = format_text(j, "%s", text), *b = strchr(a, ':');
    char *c = b ? strchr(b + 1, ':') : NULL;
    if (!c) return bad_value(j, name, text, form);
    *b++ = *c++ = 0;
    part[0] = a; part[1] = b; part[2] = c;
    return SDQ_OK;
}

/* NAME:MODE:FILE */
static sdq_status eval_net_row(eval *e, const char *text) {
    const char *part[3];
    eval_row row;
    TRY(eval_split(e->j, "net", text, "NAME:MODE:FILE", part));
    if (strcmp(part[1], "int8") && strcmp(part[1], "schedule") && strncmp(part[1], "k=", 2))
        return bad_value(e->j, "net", text, "int8, k=N or schedule in the middle");
    memset(&row, 0, sizeof row);
    row.name = part[0]; row.mode = part[1]; row.file = part[2];
    return eval_add(e, &row);
}

/* --rows and --net; fp32 is always the first. */
static sdq_status eval_choose(eval *e) {
    job *j = e->j;
    const char *rows = arg_text(&j->a, "rows");
    const flag *net = flag_find(&j->a, "net", 3);
    const int all = rows ? !strcmp(rows, "all") : !arg_given(&j->a, "net");
    unsigned char take[COUNT(eval_rows)];
    size_t i;
    memset(take, all, sizeof take);
    if (rows && !all) TRY(eval_take(e, rows, eval_rows, COUNT(eval_rows), take));
    for (i = 0; i < COUNT(eval_rows); i++)
        if (take[i] || i == 0) TRY(eval_add(e, &eval_rows[i]));
    for (i = 0; i < j->a.givens; i++)
        if (j->a.given[i] == net) TRY(eval_net_row(e, j->a.value[i]));
    return SDQ_OK;
}

/* Captions of one folder at the end of set; for training prompts spread over all pictures. */
static sdq_status eval_captions(eval *e, int set, const char *folder, size_t want) {
    job *j = e->j;
    sdq_dataset *data;
    size_t i, n, take;
    const char **list;
    TRY(sdq_dataset_open(j->ctx, folder, &data));
    n = sdq_dataset_count(data);
    take = want && want < n ? want : n;
    list = (const char **)own(j, (e->count[set] + take) * sizeof *list);
    if (e->count[set]) memcpy(list, e->prompt[set], e->count[set] * sizeof *list);
    if (set) e->train_at = (size_t *)own(j, take * sizeof *e->train_at);
    for (i = 0; i < take; i++) {
        list[e->count[set] + i] = format_text(j, "%s", sdq_dataset_caption(data, i * n / take));
        if (set) e->train_at[i] = i * n / take;
        e->key = hash_text(e->key, list[e->count[set] + i]);
    }
    e->prompt[set] = list;
    e->count[set] += take;
    sdq_dataset_free(j->ctx, data);
    return SDQ_OK;
}

/* Captions of the held-out folders, spread evenly, and features of their pictures if wanted. */
static sdq_status eval_held(eval *e) {
    job *j = e->j;
    char *copy = format_text(j, "%s", arg_text(&j->a, "held")), *s;
    size_t folders = 1, limit = 0;
    TRY(arg_size(j, "prompts-limit", &limit));
    for (s = copy; *s; s++) folders += *s == ',';
    for (s = strtok(copy, ","); s; s = strtok(NULL, ",")) {
        TRY(eval_captions(e, 0, s, limit ? (limit + folders - 1) / folders : 0));
        if (e->dim) TRY(eval_real(e, s, &e->real[0], &e->reals[0]));
    }
    return e->count[0] >= 2 ? SDQ_OK : fail(j, "%s: at least 2 held-out prompts are needed",
                                            arg_text(&j->a, "held"));
}

/* Prompts of both sets and features of the real pictures. */
static sdq_status eval_data(eval *e) {
    job *j = e->j;
    e->dim = 16 * sdq_model_get_info(j->pipe->vae).latent;
    TRY(eval_held(e));
    TRY(eval_captions(e, 1, e->data, e->count[0]));
    if (e->count[1] < 2) return fail(j, "%s: at least 2 training prompts are needed", e->data);
    return eval_real(e, e->data, &e->real[1], &e->reals[1]);
}

/* What eval and study begin with: arguments, the pipeline, the key, the folders. */
static sdq_status eval_open(eval *e) {
    job *j = e->j;
    const char *held;
    sdq_scheduler_kind kind;
    size_t evals;
    TRY(need(j, "model", &e->model));
    TRY(need(j, "data", &e->data));
    TRY(need(j, "held", &held));
    e->out = arg_text(&j->a, "out");
    TRY(sampler_from_args(j, &e->d));
    TRY(arg_size(j, "trajectories", &e->trajectories));
    TRY(load_pipeline(j, e->model, NULL, &j->pipe));
    TRY(evaluations(j, j->pipe, &e->d, &evals, &kind));
    e->key = hash_text(hash_model(j, e->model),
                       format_text(j, "%d %zu %g %d %llu%s", (int)kind, e->d.steps,
                                   (double)e->d.guidance, e->d.karras,
                                   (unsigned long long)e->d.seed,
                                   e->seeds > 1 ? format_text(j, " %zu", e->seeds) : ""));
    return make_folder(j, format_text(j, "%s/nets", e->out));
}

static sdq_status cmd_eval(job *j) {
    eval *e = (eval *)own(j, sizeof *e);
    sdq_status st = SDQ_OK;
    size_t i;
    e->j = j;
    e->r = (eval_result *)own(j, EVAL_ROWS * sizeof *e->r);
    e->seeds = 1;
    TRY(arg_size(j, "strip", &e->strip));
    TRY(eval_choose(e));
    TRY(eval_open(e));
    TRY(eval_data(e));
    for (i = 0; i < e->n; i++) {
        TRY(eval_row_run(e, &e->r[i]));
        note(j, "%s: PSNR %.2f dB", e->r[i].row.name, e->r[i].psnr_median);
    }
    TRY(eval_times(e));
    eval_table_head(stdout);
    for (i = 0; i < e->n; i++) eval_table_row(stdout, &e->r[i]);
    eval_table_note(e, stdout);
    TRY(eval_write(e));
    if (e->strip == 0) return SDQ_OK;
    st = strip_load(e);
    if (st == SDQ_OK) st = strip_write(e);
    if (st == SDQ_OK) st = html_write(e);
    strip_free(e);
    return st;
}
