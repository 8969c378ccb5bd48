/* sdq_study.h - part of tools/sdq.c: the command study, which changes one thing at a time in the way a
 * network is quantized and trained, and measures what it is worth on the same prompts and seeds.
 *
 * Rows, networks and pictures are kept as by the command eval (sdq_eval.h), whose measures it uses.
 * Every row is compared with another one, picture by picture: that is far sharper than the two
 * medians. Intervals are over prompts: the seeds of a prompt are drawn together.
 */

/* Flags come after those of all rows (study_net), so they win. A row with --steps is trained. */
static const eval_row study_rows[] = {
#define ROW(name, twin, flags) {name, flags, 0, NULL, twin, "int8", NULL},
#define STATIC "--range-conv static "
#define POSITION "--range-conv position "
#define BLOCK "--range-conv block --range-linear block "
#define ALL_STATIC "--range-conv static --range-linear static "
#define DATA "--range-conv static --bias-correction 0 --calibrate-on-data 1 --calib-batches 80 "
#define FOUR "--range-conv position --weight-bits 4 "
#define WEIGHTS "--train-set all --lr 3e-5 --schedule cosine --ema 0 --weight-decay 0 "
#define LORA "--train-set lora --lora-rank 8 --lr 1e-4 --scale-lr 100 --schedule cosine " \
             "--ema 0 --weight-decay 0 "
    {"fp32", NULL, 0, NULL, NULL, "fp32", NULL},
    /* the range of an input, and what training adds to each */
    ROW("static", NULL, STATIC)
    ROW("static-300", "static", STATIC "--steps 300")
    ROW("position", "static", POSITION)
    ROW("position-300", "position", POSITION "--steps 300")
    ROW("all-static", "static", ALL_STATIC)
    ROW("block", "position", BLOCK)
    /* weights of 4 bits */
    ROW("four", "position", FOUR)
    ROW("four-weights-300", "four", FOUR WEIGHTS "--steps 300")
    ROW("four-weights-1000", "four", FOUR WEIGHTS "--calib-prompts 32 --steps 1000")
    ROW("four-16", "four", FOUR "--weight-group 16")
    /* cheaper ways of training, and all weights, at 4 bits and with static ranges */
    ROW("four-scales", "four", FOUR "--train-set scales --steps 300")
    ROW("four-300", "four", FOUR "--steps 300")
    ROW("four-last-8", "four", FOUR WEIGHTS "--last-blocks 8 --steps 300")
    ROW("four-lora", "four", FOUR LORA "--steps 300")
    ROW("four-moments8", "four", FOUR WEIGHTS "--moments8 --steps 300")
    ROW("all-static-scales", "all-static", ALL_STATIC "--train-set scales --steps 300")
    ROW("all-static-300", "all-static", ALL_STATIC "--steps 300")
    ROW("all-static-last-8", "all-static", ALL_STATIC "--train-set all --last-blocks 8 --steps 300")
    ROW("all-static-lora", "all-static", ALL_STATIC "--train-set lora --lora-rank 8 --steps 300")
    ROW("all-static-weights", "all-static", ALL_STATIC "--train-set all --steps 300")
    /* calibration prompts, with and without training on them */
    ROW("prompts-1", "static", STATIC "--calib-prompts 1")
    ROW("prompts-1-300", "prompts-1", STATIC "--calib-prompts 1 --steps 300")
    ROW("prompts-4", "static", STATIC "--calib-prompts 4")
    ROW("prompts-4-300", "prompts-4", STATIC "--calib-prompts 4 --steps 300")
    ROW("prompts-16", "static", STATIC "--calib-prompts 16")
    /* training: what */
    ROW("static-100", "static", STATIC "--steps 100")
    ROW("static-weights", "static", STATIC "--steps 300 --train-set all")
    ROW("static-ranges", "static", STATIC "--steps 300 --train-set ranges")
    ROW("static-not-scales", "static", STATIC "--steps 300 --learn-scales 0")
    /* one ingredient of the default less, or one more */
    ROW("no-split", "position", POSITION "--split-skip 0")
    ROW("no-bias", "position", POSITION "--bias-correction 0")
    ROW("static-no-bias", "static", STATIC "--bias-correction 0")
    ROW("data", "static-no-bias", DATA)
    ROW("shortcuts", "position", POSITION "--quantize-shortcuts 1")
    ROW("last-self-float", "position", POSITION "--quantize-last-self 0")
    ROW("edges", "position", POSITION "--quantize-edges 1")
    ROW("attention", "position", POSITION "--attention-bits 8")
    ROW("outputs", "data", DATA "--quantize-outputs 1")
    ROW("time", "position", POSITION "--quantize-time 1")
    ROW("context", "position", POSITION "--quantize-context 1")
    ROW("picture", "static", "--range-conv picture ")
    ROW("static-no-split", "static", STATIC "--split-skip 0")
    /* training: how long, from what */
    ROW("static-1000", "static", STATIC "--steps 1000")
    ROW("static-coherent", "static", STATIC "--steps 75 --coherent 1 --batch 16")
    ROW("static-images", "static", STATIC "--steps 300 --noise-loss 1e-9")
    ROW("static-noise", "static", STATIC "--steps 300 --noise-loss 1 --teacher-loss 0")
    ROW("static-scales", "static", STATIC "--steps 300 --train-set scales")
    ROW("static-no-bias-300", "static-no-bias", STATIC "--bias-correction 0 --steps 300")
    /* the chance in it: the same with other seeds of calibration and training */
    ROW("static-seed-2", "static", STATIC "--seed 2")
    ROW("static-300-seed-2", "static-seed-2", STATIC "--seed 2 --steps 300")
    ROW("static-seed-3", "static", STATIC "--seed 3")
    ROW("static-300-seed-3", "static-seed-3", STATIC "--seed 3 --steps 300")
    ROW("all-static-seed-2", "all-static", ALL_STATIC "--seed 2")
    ROW("all-static-scales-seed-2", "all-static-seed-2",
        ALL_STATIC "--seed 2 --train-set scales --steps 300")
    ROW("four-seed-2", "four", FOUR "--seed 2")
    ROW("four-weights-300-seed-2", "four-seed-2", FOUR WEIGHTS "--seed 2 --steps 300")
    /* more of 4 bits */
    ROW("four-32", "four", FOUR "--weight-group 32")
    ROW("four-no-bias", "four", FOUR "--bias-correction 0")
    ROW("four-static", "static", STATIC "--weight-bits 4")
    ROW("four-static-weights", "four-static", STATIC "--weight-bits 4 " WEIGHTS "--steps 300")
    ROW("four-coherent", "four", FOUR WEIGHTS "--steps 75 --coherent 1 --batch 16")
    ROW("four-tap", "four", FOUR "--weight-group 4096")
    ROW("four-16-weights", "four-16", FOUR WEIGHTS "--weight-group 16 --steps 300")
    /* the rest */
    ROW("reference", "all-static", "--recipe reference")
    ROW("reference-300", "reference", "--recipe reference --steps 300")
    ROW("data-moving", "data", DATA "--moving 0.01")
    ROW("prompts-64", "static", STATIC "--calib-prompts 64")
    ROW("position-prompts-1", "position", POSITION "--calib-prompts 1")
    ROW("block-300", "block", BLOCK "--steps 300")
#undef ROW
};

static const flag study_flags[] = {
    MEASURE_FLAGS,
    {"rows", "NAME,..", NULL, "only these and what they are compared with [all, unless there is --row]"},
    {"row", "\"NAME:OVER:FLAGS\"", NULL,
     "a row of your own, compared with the row OVER: flags of sdq quantize, or,\n"
     "                                        with --steps, of sdq train --what qat; repeatable"},
    {"over", "NAME", NULL, "compare all rows after this one with it, not each with its own"},
    {"out,o", "FOLDER", "build/study", "study.csv, study.md, networks, pictures: a stopped run goes on"},
    SAMPLER_FLAGS,
    {"seed,s", "N", "1000", "of the first picture; each has its own"},
    {"prompts-limit", "N", "24", "held-out prompts"},
    {"seeds", "N", "2", "pictures of a prompt"},
    {"trajectories", "N", "4", "float trajectories for the error of an evaluation"},
    {"calib-prompts", "N", "8", "training prompts to calibrate with, where the row does not say"},
};

typedef struct study {
    eval e;
    double (*seed_range)[2];    /* of a row: lowest and highest median of the pictures of one seed */
} study;

/* ---- rows and prompts ---- */

/* NAME:OVER:FLAGS */
static sdq_status study_own_row(job *j, const char *text, eval_row *row) {
    const char *part[3];
    TRY(eval_split(j, "row", text, "NAME:OVER:FLAGS", part));
    memset(row, 0, sizeof *row);
    row->name = part[0];
    row->twin = *part[1] ? part[1] : NULL;
    row->recipe = part[2];
    row->mode = "int8";
    return SDQ_OK;
}

/* The rows asked for, each after the row that it is compared with. */
static sdq_status study_choose(study *s) {
    eval *e = &s->e;
    const args *a = &e->j->a;
    const char *rows = arg_text(a, "rows");
    const flag *own_row = flag_find(a, "row", 3);
    eval_row *mine = (eval_row *)own(e->j, (a->givens + 1) * sizeof *mine);
    unsigned char take[COUNT(study_rows)];
    size_t i, k, n = 0;
    memset(take, !rows && !arg_given(a, "row"), sizeof take);
    if (rows) TRY(eval_take(e, rows, study_rows, COUNT(study_rows), take));
    for (i = 0; i < a->givens; i++) {
        if (a->given[i] != own_row) continue;
        TRY(study_own_row(e->j, a->value[i], &mine[n]));
        for (k = 0; k < COUNT(study_rows); k++)
            take[k] = take[k] || (mine[n].twin && !strcmp(study_rows[k].name, mine[n].twin));
        n++;
    }
    for (i = COUNT(study_rows); i-- > 0;)
        for (k = 0; k < i && take[i] && study_rows[i].twin; k++)
            take[k] = take[k] || !strcmp(study_rows[k].name, study_rows[i].twin);
    for (i = 0; i < COUNT(study_rows); i++)
        if (take[i] || i == 0) TRY(eval_add(e, &study_rows[i]));
    for (i = 0; i < n; i++) TRY(eval_add(e, &mine[i]));
    return SDQ_OK;
}

/* With --over: the row that the rows after it are compared with. */
static sdq_status study_over(study *s) {
    const char *over = arg_text(&s->e.j->a, "over");
    eval_result *r = eval_find(&s->e, over);
    if (!over) return SDQ_OK;
    if (!r) return bad_value(s->e.j, "over", over, "one of the rows chosen");
    while (++r < s->e.r + s->e.n) r->row.twin = over;
    return SDQ_OK;
}

/* Every held-out caption as often as there are seeds. */
static void study_repeat(eval *e) {
    const char **list = (const char **)own(e->j, e->count[0] * e->seeds * sizeof *list);
    size_t i;
    for (i = 0; i < e->count[0] * e->seeds; i++) list[i] = e->prompt[0][i / e->seeds];
    e->prompt[0] = list;
    e->count[0] *= e->seeds;
}

/* ---- a row ---- */

static sdq_status study_net(eval *e, eval_result *r) {
    job *j = e->j;
    const int train = strstr(r->row.recipe, "--steps") != NULL;
    const char *line = format_text(
        j, "--model %s%s --data %s --calib-prompts %s --calib-steps %zu --calib-guidance %g "
           ATT32 " %s",
        e->model, prediction_flag(j), e->data, arg_text(&j->a, "calib-prompts"), e->d.steps,
        (double)e->d.guidance, r->row.recipe);
    const uint64_t h = hash_text(hash_model(j, e->model), line);
    const char *base = eval_net_file(e, r, h);
    if (exists(r->file)) return SDQ_OK;
    line = format_text(j, "%s --threads %d --out %s", line, sdq_ctx_threads(j->ctx), r->file);
    if (!train) return run_line(j, format_text(j, "quantize %s", line));
    return run_line(j, format_text(j, "train --what qat %s --state %s.state --save-every 100", line,
                                   base));
}

/* Lowest and highest median of the pictures of one seed. */
static sdq_status study_seeds(study *s, const eval_result *r, double range[2]) {
    const size_t prompts = s->e.count[0] / s->e.seeds;
    double *x = (double *)own(s->e.j, prompts * sizeof *x), m;
    size_t i, k;
    range[0] = 1e9;
    range[1] = -1e9;
    for (k = 0; k < s->e.seeds; k++) {
        for (i = 0; i < prompts; i++) x[i] = r->psnr[i * s->e.seeds + k];
        TRY(sdq_percentile(s->e.j->ctx, x, prompts, 50.0, &m));
        range[0] = fmin(range[0], m);
        range[1] = fmax(range[1], m);
    }
    return SDQ_OK;
}

static sdq_status study_row_run(study *s, size_t at) {
    eval *e = &s->e;
    eval_result *r = &e->r[at];
    if (r->row.recipe) TRY(study_net(e, r));
    TRY(eval_row_draw(e, r, e->key));
    TRY(eval_pictures(e, r));
    TRY(study_seeds(s, r, s->seed_range[at]));
    r->twin = r->row.twin;
    return eval_gain(e, r);
}

/* ---- tables ---- */

static double study_error(const eval_result *r) {
    double sum = 0.0;
    size_t i;
    for (i = 0; i < r->evals; i++) sum += r->mse[i] / (double)r->evals;
    return 1e4 * sum;
}

/* Tables of the rows that are there; written after every row. */
static sdq_status study_csv(study *s) {
    eval *e = &s->e;
    const char *path = format_text(e->j, "%s/study.csv", e->out);
    FILE *f;
    size_t i;
    TRY(report_begin(e->j, path, &f));
    fputs("row,psnr,psnr_low,psnr_high,psnr_p10,psnr_seed_low,psnr_seed_high,ssim,error_1e4,mb,"
          "over,gain,gain_low,gain_high,gain_mean,flags\n", f);
    for (i = 1; i < e->n && e->r[i].psnr; i++) {
        const eval_result *r = &e->r[i];
        fprintf(f, "%s,%.3f,%.3f,%.3f,%.3f,%.3f,%.3f,%.5f,%.5f,%.2f,", r->row.name, r->psnr_median,
                r->psnr_low, r->psnr_high, r->psnr_p10, s->seed_range[i][0], s->seed_range[i][1],
                r->ssim_median, study_error(r), r->megabytes);
        if (r->twin)
            fprintf(f, "%s,%.3f,%.3f,%.3f,%.3f,%s\n", r->twin, r->gain, r->gain_low, r->gain_high,
                    r->gain_mean[0], r->row.recipe);
        else fprintf(f, ",,,,,%s\n", r->row.recipe);
    }
    return report_end(e->j, path, f);
}

static void study_table(study *s, FILE *f) {
    size_t i;
    fputs("| row | PSNR dB median [95 %] | by seed | p10 | SSIM | error 1e-4 | MB "
          "| gain, median [95 %]; mean | over |\n|---|---|---|---|---|---|---|---|---|\n", f);
    for (i = 1; i < s->e.n && s->e.r[i].psnr; i++) {
        const eval_result *r = &s->e.r[i];
        fprintf(f, "| %s | %.2f [%.2f, %.2f] | %.2f..%.2f | %.2f | %.4f | %.3g | %.2f |",
                r->row.name, r->psnr_median, r->psnr_low, r->psnr_high, s->seed_range[i][0],
                s->seed_range[i][1], r->psnr_p10, r->ssim_median, study_error(r), r->megabytes);
        if (r->twin)
            fprintf(f, " %+.2f [%+.2f, %+.2f]%s; %+.2f | %s |\n", r->gain, r->gain_low,
                    r->gain_high, eval_equal(r->gain_low, r->gain_high), r->gain_mean[0], r->twin);
        else fputs(" | |\n", f);
    }
    fprintf(f, "\n%zu held-out prompts with %zu seeds each, %zu steps, guidance %g; calibrated with "
            "%s training prompts unless the row says otherwise. \"=\": not different within the "
            "95 %% interval. Error: mean square of an evaluation on %zu float trajectories.\n",
            s->e.count[0] / s->e.seeds, s->e.seeds, s->e.d.steps, (double)s->e.d.guidance,
            arg_text(&s->e.j->a, "calib-prompts"), s->e.trajectories);
}

static sdq_status study_write(study *s) {
    const char *path = format_text(s->e.j, "%s/study.md", s->e.out);
    FILE *f;
    TRY(report_begin(s->e.j, path, &f));
    study_table(s, f);
    TRY(report_end(s->e.j, path, f));
    return study_csv(s);
}

static sdq_status cmd_study(job *j) {
    study *s = (study *)own(j, sizeof *s);
    eval *e = &s->e;
    size_t i;
    e->j = j;
    e->r = (eval_result *)own(j, EVAL_ROWS * sizeof *e->r);
    s->seed_range = (double (*)[2])own(j, EVAL_ROWS * sizeof *s->seed_range);
    TRY(arg_size(j, "seeds", &e->seeds));
    if (e->seeds == 0) return bad_value(j, "seeds", "0", "1 or more");
    TRY(study_choose(s));
    TRY(study_over(s));
    TRY(eval_open(e));
    TRY(eval_held(e));
    study_repeat(e);
    for (i = 0; i < e->n; i++) {
        TRY(study_row_run(s, i));
        note(j, "%s: PSNR %.2f dB, gain %+.2f over %s", e->r[i].row.name, e->r[i].psnr_median,
             e->r[i].gain, e->r[i].twin ? e->r[i].twin : "nothing");
        TRY(study_write(s));
    }
    study_table(s, stdout);
    return SDQ_OK;
}
