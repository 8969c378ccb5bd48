/* sdq - quantize, train and run Stable Diffusion on CPUs: the command line of sdq.h.
 *
 *     cc -O2 -fopenmp -I. tools/sdq.c -o sdq -lm          (or: make)
 *
 * Only the public interface of sdq.h is used here; beside it libc, libm, POSIX time, signals and
 * getrusage. Every command has one table of flags, which also prints its help. A job owns all
 * objects of a run and is freed at one place.
 * Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage.
 */
#define _DEFAULT_SOURCE     /* POSIX, and madvise for sdq.h, under -std=c99 */
#define SDQ_IMPLEMENTATION
#include "sdq.h"

#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define COUNT(a) (sizeof(a) / sizeof(a)[0])
#define TRY(x) do { const sdq_status try_ = (x); if (try_ != SDQ_OK) return try_; } while (0)

/* ===========================================================================
 * flags
 * ======================================================================== */

/* names: "guidance-scale,cfg-scale,..": the first one is looked up, single letters are -x.
 * arg: NULL for a switch. help: NULL = named in the last lines of the help only. */
typedef struct flag { const char *names, *arg, *fallback, *help; } flag;

enum { MAX_FLAGS = 96, MAX_GIVEN = 128 };

typedef struct args {
    const flag *flags[MAX_FLAGS];
    size_t count;
    const flag *given[MAX_GIVEN];       /* in the order of the command line */
    const char *value[MAX_GIVEN];
    size_t givens;
    const char *word[8];                /* what is not a flag */
    size_t words;
} args;

static const flag common_flags[] = {
    {"threads,t", "N", "0", NULL},
    {"tier", "scalar|avx2|avx512|avx512vnni", "auto", NULL},
    {"prediction", "epsilon|v", NULL, NULL},    /* of a model in a single file */
    {"quiet,q", NULL, NULL, NULL},
    {"verbose,v", NULL, NULL, NULL},
    {"help,h", NULL, NULL, NULL},
};

static int usage_error(const char *format, ...) {
    va_list a;
    va_start(a, format);
    fputs("sdq: ", stderr);
    vfprintf(stderr, format, a);
    fputc('\n', stderr);
    va_end(a);
    return 2;
}

/* Is `name` (n characters, '_' as '-') one of the comma-separated names? */
static int name_in(const char *names, const char *name, size_t n) {
    while (*names) {
        const size_t len = strcspn(names, ",");
        size_t i = 0;
        while (i < n && i < len && (name[i] == '_' ? '-' : name[i]) == names[i]) i++;
        if (i == n && i == len) return 1;
        names += len + (names[len] == ',');
    }
    return 0;
}

static const flag *flag_find(const args *a, const char *name, size_t n) {
    size_t i;
    for (i = 0; i < a->count; i++)
        if (name_in(a->flags[i]->names, name, n)) return a->flags[i];
    return NULL;
}

static void flags_add(args *a, const flag *f, size_t n) {
    size_t i;
    for (i = 0; f && i < n && f[i].names && a->count < MAX_FLAGS; i++) a->flags[a->count++] = &f[i];
}

/* 0, or the exit status of a usage error. */
static int args_parse(args *a, const char *command, int argc, char **argv) {
    int i;
    for (i = 0; i < argc; i++) {
        const char *s = argv[i], *value = NULL;
        const flag *f;
        size_t n;
        if (s[0] != '-' || !s[1] || isdigit((unsigned char)s[1])) {
            if (a->words == COUNT(a->word))
                return usage_error("%s: one argument too many: %s", command, s);
            a->word[a->words++] = s;
            continue;
        }
        s += s[1] == '-' ? 2 : 1;
        n = strcspn(s, "=");
        if (s[n] == '=') value = s + n + 1;
        f = flag_find(a, s, n);
        if (!f) return usage_error("%s: unknown flag %.*s (see sdq %s --help)", command,
                                   (int)strcspn(argv[i], "="), argv[i], command);
        if (!value && f->arg) {
            if (++i == argc)
                return usage_error("%s: %s needs a value: %s", command, argv[i - 1], f->arg);
            value = argv[i];
        }
        if (a->givens == MAX_GIVEN) return usage_error("%s: too many flags", command);
        a->given[a->givens] = f;
        a->value[a->givens++] = value ? value : "1";
    }
    return 0;
}

/* The last value given for a flag, NULL if none. */
static const char *arg_given(const args *a, const char *name) {
    const flag *f = flag_find(a, name, strlen(name));
    size_t i;
    for (i = a->givens; f && i-- > 0;)
        if (a->given[i] == f) return a->value[i];
    return NULL;
}
/* The value, or what the table says, or NULL. */
static const char *arg_text(const args *a, const char *name) {
    const char *v = arg_given(a, name);
    const flag *f = flag_find(a, name, strlen(name));
    return v ? v : f ? f->fallback : NULL;
}
static int arg_on(const args *a, const char *name) {
    const char *v = arg_text(a, name);
    return v && strcmp(v, "0") != 0 && strcmp(v, "false") != 0;
}

/* ===========================================================================
 * jobs: what a command works with, errors, numbers, text files
 * ======================================================================== */

typedef struct job {
    sdq_ctx *ctx;
    args a;
    const char *command;
    sdq_status said;            /* an error of the command's own was printed */
    int usage;
    int quiet, terminal;
    sdq_pipeline *pipe;
    sdq_dataset *data;
    sdq_samples *samples;
    sdq_tokenizer *tokenizer;
    sdq_scheduler *scheduler;
    sdq_model *vae, *text, *unet;       /* outside the pipeline */
    sdq_optim *optim;
    sdq_states *states, *held_states;   /* held out of training, for validation */
    sdq_samples *held_samples;
    void **owned;
    size_t owns, owned_room;
    double started, drawn, spoke;       /* of the progress bar */
    char more[160];                     /* at its end */
    const char *stage;
    size_t stage_first, stage_last;
} job;

static volatile sig_atomic_t stopped;
static void on_signal(int sig) { (void)sig; stopped = 1; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Say what is wrong; the command returns the result. */
static sdq_status fail(job *j, const char *format, ...) {
    va_list a;
    va_start(a, format);
    fputs("sdq: ", stderr);
    vfprintf(stderr, format, a);
    fputc('\n', stderr);
    va_end(a);
    return j->said = SDQ_ERR_ARGUMENT;
}

static void note(const job *j, const char *format, ...) {
    va_list a;
    if (j->quiet) return;
    va_start(a, format);
    vfprintf(stderr, format, a);
    va_end(a);
    fputc('\n', stderr);
}

/* Zeroed memory that lives as long as the job; ends the process when there is none. */
static void *own(job *j, size_t bytes) {
    void *p = calloc(bytes ? bytes : 1, 1);
    if (j->owns == j->owned_room) {
        void **more = (void **)realloc(j->owned, (j->owned_room * 2 + 64) * sizeof *more);
        if (more) { j->owned = more; j->owned_room = j->owned_room * 2 + 64; }
    }
    if (!p || j->owns == j->owned_room) {
        fputs("sdq: out of memory\n", stderr);
        exit(1);
    }
    return j->owned[j->owns++] = p;
}

static char *format_text(job *j, const char *format, ...) {
    char *s;
    va_list a;
    int n;
    va_start(a, format);
    n = vsnprintf(NULL, 0, format, a);
    va_end(a);
    s = (char *)own(j, (size_t)(n < 0 ? 0 : n) + 1);
    va_start(a, format);
    (void)vsnprintf(s, (size_t)(n < 0 ? 0 : n) + 1, format, a);
    va_end(a);
    return s;
}

static sdq_status need(job *j, const char *name, const char **out) {
    *out = arg_text(&j->a, name);
    if (*out) return SDQ_OK;
    j->usage = 1;
    return fail(j, "%s: --%s is needed (see sdq %s --help)", j->command, name, j->command);
}

static sdq_status bad_value(job *j, const char *name, const char *value, const char *expected) {
    j->usage = 1;
    return fail(j, "%s: --%s %s: expected %s", j->command, name, value, expected);
}

/* A number; NULL as value leaves *out as it is. */
static sdq_status arg_real(job *j, const char *name, double *out) {
    const char *v = arg_text(&j->a, name);
    char *end;
    if (!v) return SDQ_OK;
    *out = strtod(v, &end);
    if (end == v || *end || !(*out > -1e300 && *out < 1e300))
        return bad_value(j, name, v, "a number");
    return SDQ_OK;
}
static sdq_status arg_size(job *j, const char *name, size_t *out) {
    const char *v = arg_text(&j->a, name);
    char *end;
    unsigned long long n;
    if (!v) return SDQ_OK;
    errno = 0;
    n = strtoull(v, &end, 10);
    if (!isdigit((unsigned char)v[0]) || *end || errno || n > (1u << 30))
        return bad_value(j, name, v, "a whole number from 0 up");
    *out = (size_t)n;
    return SDQ_OK;
}
static sdq_status arg_float(job *j, const char *name, float *out) {
    double v = (double)*out;
    TRY(arg_real(j, name, &v));
    if (!(fabs(v) <= (double)FLT_MAX))
        return bad_value(j, name, arg_text(&j->a, name), "a number below 3.4e38");
    *out = (float)v;
    return SDQ_OK;
}
/* -1: from the clock. Other negative numbers count down from 2^64, as in torch. */
static sdq_status arg_seed(job *j, const char *name, uint64_t *out) {
    const char *v = arg_text(&j->a, name);
    const int minus = v && v[0] == '-';
    unsigned long long n;
    char *end;
    if (!v) return SDQ_OK;
    errno = 0;
    n = strtoull(v + minus, &end, 10);
    if (!isdigit((unsigned char)v[minus]) || *end || errno || (minus && n > 1ull << 63))
        return bad_value(j, name, v, "a whole number from -2^63 to 2^64 - 1");
    *out = minus ? 0 - (uint64_t)n : (uint64_t)n;
    if (minus && n == 1) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        *out = ((uint64_t)t.tv_sec * 1000003u + (uint64_t)t.tv_nsec / 1000u) & 0x7fffffffu;
    }
    return SDQ_OK;
}
/* One of `n` words; *out is its index. */
static sdq_status arg_choice(job *j, const char *name, const char *const *word, size_t n,
                             int *out) {
    const char *v = arg_text(&j->a, name);
    char expected[256] = "";
    size_t i;
    if (!v) return SDQ_OK;
    for (i = 0; i < n; i++) {
        if (name_in(word[i], v, strlen(v))) { *out = (int)i; return SDQ_OK; }
        if (strlen(expected) + strlen(word[i]) + 2 < sizeof expected)
            strcat(strcat(expected, i ? "|" : ""), word[i]);
    }
    return bad_value(j, name, v, expected);
}

/* A whole text file, NUL at its end. */
static sdq_status read_text(job *j, const char *path, char **out, size_t *len) {
    FILE *f = fopen(path, "rb");
    size_t cap = 1 << 16, n = 0, got;
    char *s = NULL;
    int whole = 0;
    if (!f) return fail(j, "%s: %s", path, strerror(errno));
    do {
        char *t = (char *)realloc(s, cap *= 2);
        whole = t != NULL;
        if (!t) break;
        s = t;
        got = fread(s + n, 1, cap - 1 - n, f);
        n += got;
        whole = n < cap - 1;
    } while (!whole && n < ((size_t)1 << 28));
    if (!whole || ferror(f)) {
        free(s);
        (void)fclose(f);
        return fail(j, "%s: could not be read", path);
    }
    (void)fclose(f);
    s[n] = 0;
    *out = (char *)own(j, n + 1);
    memcpy(*out, s, n + 1);
    free(s);
    if (len) *len = n;
    return SDQ_OK;
}

static int exists(const char *path) {
    struct stat s;
    return stat(path, &s) == 0;
}
/* That a file can be written: said before the work, not after it. */
static sdq_status check_output(job *j, const char *path) {
    char *real = realpath(path, NULL);      /* of a link: beside the file it leads to */
    const char *tmp = format_text(j, "%s.tmp", real ? real : path);     /* what sdq.h writes */
    const int there = exists(tmp);
    struct stat s;
    FILE *f;
    free(real);
    if (!*path) return fail(j, "an output has no name");
    if (stat(path, &s) == 0) {
        if (S_ISDIR(s.st_mode)) return fail(j, "%s: is a folder; name a file in it", path);
        if (access(path, W_OK) != 0) return fail(j, "%s: %s", path, strerror(errno));
        if (!S_ISREG(s.st_mode)) return SDQ_OK;     /* a device or pipe is written as it is */
    }
    f = fopen(tmp, "ab");
    if (!f) return fail(j, "%s: cannot be written: %s", path, strerror(errno));
    (void)fclose(f);
    if (!there) (void)remove(tmp);
    return SDQ_OK;
}
/* A report is put together out of sight and written at once. */
static sdq_status report_begin(job *j, const char *path, FILE **f) {
    TRY(check_output(j, path));
    *f = tmpfile();
    return *f ? SDQ_OK : fail(j, "%s: no room for a temporary file: %s", path, strerror(errno));
}
static sdq_status report_end(job *j, const char *path, FILE *f) {
    const long n = ftell(f);
    char *text = (char *)own(j, n > 0 ? (size_t)n : 1);
    int good = n >= 0 && fflush(f) == 0 && !ferror(f);
    rewind(f);
    good = good && fread(text, 1, (size_t)n, f) == (size_t)n;
    (void)fclose(f);
    if (!good) return fail(j, "%s: could not be written; is the disk full?", path);
    return sdq_bytes_write(j->ctx, path, text, (size_t)n);
}
static size_t file_bytes(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 ? (size_t)s.st_size : 0;
}

/* A folder and those above it. */
static sdq_status make_folder(job *j, const char *path) {
    char *p = format_text(j, "%s", path);
    size_t i;
    for (i = 1; p[i]; i++) {
        if (p[i] != '/') continue;
        p[i] = 0;
        (void)mkdir(p, 0777);
        p[i] = '/';
    }
    if (mkdir(p, 0777) != 0 && errno != EEXIST) return fail(j, "%s: %s", path, strerror(errno));
    return SDQ_OK;
}

static double peak_megabytes(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
#ifdef __APPLE__
    return (double)u.ru_maxrss / 1e6;
#else
    return (double)u.ru_maxrss * 1024.0 / 1e6;
#endif
}

/* ---- progress: a bar on a terminal, a line now and then elsewhere ---- */

static void progress_time(char *buf, size_t size, double s) {
    const long t = (long)(s + 0.5);
    if (t >= 3600) (void)snprintf(buf, size, "%ld:%02ld:%02ld", t / 3600, t / 60 % 60, t % 60);
    else (void)snprintf(buf, size, "%ld:%02ld", t / 60, t % 60);
}

static void progress_line(job *j, size_t i, size_t n, double value) {
    const double t = now(), each = (t - j->started) / (double)(i - j->stage_first);
    char bar[31], left[32], extra[240] = "";
    size_t k;
    for (k = 0; k < 30; k++) bar[k] = k * n < i * 30 ? '=' : ' ';
    bar[30] = 0;
    progress_time(left, sizeof left, each * (double)(n - i));
    if (value != 0.0) (void)snprintf(extra, sizeof extra, "  loss %.5g%s", value, j->more);
    if (j->terminal)
        fprintf(stderr, "\r%-9s [%s] %zu/%zu  %.3g s/it  ETA %s%s\033[K%s", j->stage, bar, i, n,
                each, left, extra, i == n ? "\n" : "");
    else
        fprintf(stderr, "%s %zu/%zu  %.3g s/it  ETA %s%s\n", j->stage, i, n, each, left, extra);
    fflush(stderr);
}

/* An sdq_progress_fn. A stage's clock starts at the end of the one before. Without a terminal a
 * line is written every 20 seconds, and at the end of stages that took longer than that. */
static int progress(void *user, const char *stage, size_t i, size_t n, double value) {
    job *j = (job *)user;
    const double t = now();
    if (stopped) return 1;
    if (!j->stage || strcmp(j->stage, stage) != 0 || i <= j->stage_last) {
        j->started = j->drawn;
        if (j->terminal || !j->stage || strcmp(j->stage, stage) != 0) j->spoke = j->drawn;
        j->stage = stage;
        j->stage_first = i - 1;
    }
    j->drawn = t;
    j->stage_last = i;
    if (j->quiet) return 0;
    if (j->terminal ? i != n && t - j->spoke < 0.1
                    : t - j->spoke < 20.0 && (i != n || t - j->started < 20.0))
        return 0;
    j->spoke = t;
    progress_line(j, i, n, value);
    return 0;
}

/* The clock of the next stage starts here. */
static void progress_begin(job *j) { j->stage = NULL; j->drawn = j->started = now(); }

/* ===========================================================================
 * loading
 * ======================================================================== */

/* Single files carry no tokenizer: CLIP's, see tools/clip_vocab.py. */
static const char clip_merges[][97] = {
#include "clip_vocab.inc"
};

/* j->pipe or another: of a folder or a single file. desc NULL: zeros. */
static sdq_status complete_desc(job *j, sdq_pipeline_desc *d) {
    static const char *const word[] = {"epsilon", "v"};
    int prediction = -1;
    TRY(arg_choice(j, "prediction", word, COUNT(word), &prediction));
    d->prediction = (sdq_file_prediction)(prediction + 1);
    d->merges = clip_merges[0];
    d->merges_bytes = sizeof clip_merges;
    return SDQ_OK;
}
static sdq_status load_pipeline(job *j, const char *path, const sdq_pipeline_desc *desc,
                                sdq_pipeline **out) {
    sdq_pipeline_desc d;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    TRY(complete_desc(j, &d));
    TRY(sdq_pipeline_load(j->ctx, path, &d, out));
    if ((*out)->single && (*out)->prediction == SDQ_PREDICT_V && !d.prediction)
        note(j, "%s: its UNet is taken to predict velocity (%s); if pictures are noise, say "
             "--prediction epsilon", path, (*out)->because);
    return SDQ_OK;
}

static const char *const range_word[] = {"default", "static", "picture", "position", "block"};
static const char *const weight_word[] = {"current", "moving", "fixed"};

static sdq_status load_scheduler_desc(job *j, const char *folder, sdq_scheduler_desc *out) {
    char *path = format_text(j, "%s/scheduler/scheduler_config.json", folder), *text;
    size_t len;
    TRY(read_text(j, path, &text, &len));
    return sdq_scheduler_desc_from_json(j->ctx, text, len, path, SDQ_SCHEDULER_DEFAULT, out);
}

static sdq_status load_part(job *j, const char *folder, sdq_part part, int init, uint64_t seed,
                            sdq_model **out) {
    return init ? sdq_model_init(j->ctx, folder, part, seed, out)
                : sdq_model_load(j->ctx, folder, part, out);
}

static sdq_status load_tokenizer(job *j, const char *folder) {
    return sdq_tokenizer_load(j->ctx, format_text(j, "%s/tokenizer", folder), &j->tokenizer);
}

/* j->data and j->samples of --data, as large as the VAE says or --size. encode: the pictures as
 * latents, too, through --cache if there is one; text: a text encoder that is not trained. */
static sdq_status load_samples(job *j, const sdq_model *vae, const sdq_tokenizer *tokenizer,
                               const sdq_model *text, int encode) {
    const char *folder, *cache = encode ? arg_text(&j->a, "cache") : NULL;
    size_t size = sdq_model_get_info(vae).sample_size;
    TRY(need(j, "data", &folder));
    if (size == 0) size = 64;
    TRY(arg_size(j, "size", &size));
    TRY(sdq_dataset_open(j->ctx, folder, &j->data));
    note(j, "%zu pictures of %zu x %zu from %s", sdq_dataset_count(j->data), size, size, folder);
    progress_begin(j);
    if (cache)
        return sdq_samples_cache(j->ctx, j->data, size, tokenizer, vae, text,
                                 format_text(j, "%s.latents", cache), progress, j, &j->samples);
    TRY(sdq_samples_load(j->ctx, j->data, size, tokenizer, &j->samples));
    return encode ? sdq_samples_encode(j->ctx, j->samples, vae, progress, j) : SDQ_OK;
}

/* Copy a small file; it need not exist. */
static sdq_status copy_file(job *j, const char *from, const char *to, const char *name) {
    char *text;
    size_t len;
    const char *src = format_text(j, "%s/%s", from, name);
    if (!exists(src)) return SDQ_OK;
    TRY(read_text(j, src, &text, &len));
    return sdq_bytes_write(j->ctx, format_text(j, "%s/%s", to, name), text, len);
}

/* What a pipeline's folder has beside its networks. */
static sdq_status copy_pipeline(job *j, const char *from, const char *to) {
    static const char *const name[] = {
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
        "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json", "tokenizer/added_tokens.json"};
    size_t i;
    if (strcmp(from, to) == 0) return SDQ_OK;
    TRY(make_folder(j, format_text(j, "%s/scheduler", to)));
    TRY(make_folder(j, format_text(j, "%s/tokenizer", to)));
    for (i = 0; i < COUNT(name); i++) TRY(copy_file(j, from, to, name[i]));
    return SDQ_OK;
}

static sdq_status save_part(job *j, const sdq_model *m, const char *folder, sdq_dtype dtype) {
    const char *to = format_text(j, "%s/%s", folder, sdq_part_name(sdq_model_get_info(m).part));
    TRY(make_folder(j, to));
    TRY(sdq_model_save(j->ctx, m, to, dtype));
    note(j, "wrote %s", to);
    return SDQ_OK;
}

/* Lines of --prompts (not blank, not #..), or n captions of j->data spread over it; *n is what
 * there is. limit 0: all. */
static sdq_status load_prompts(job *j, size_t limit, const char *const **out, size_t *n) {
    const char *path = arg_text(&j->a, "prompts");
    const char **list;
    size_t i, count = 0, cap;
    if (path) {
        char *text, *s;
        TRY(read_text(j, path, &text, &cap));
        if (strncmp(text, "\xef\xbb\xbf", 3) == 0) text += 3;      /* byte order mark */
        list = (const char **)own(j, (cap / 2 + 2) * sizeof *list);
        for (s = strtok(text, "\r\n"); s; s = strtok(NULL, "\r\n"))
            if (*s != '#' && strspn(s, " \t") < strlen(s) && (limit == 0 || count < limit))
                list[count++] = s;
    } else {
        if (!j->data) {
            const char *folder = arg_text(&j->a, "data");
            j->usage = !folder;
            if (!folder)
                return fail(j, "%s: --prompts FILE or --data FOLDER is needed", j->command);
            TRY(sdq_dataset_open(j->ctx, folder, &j->data));
        }
        cap = sdq_dataset_count(j->data);
        count = limit && limit < cap ? limit : cap;
        list = (const char **)own(j, (count + 1) * sizeof *list);
        for (i = 0; i < count; i++) list[i] = sdq_dataset_caption(j->data, i * cap / count);
    }
    if (count == 0) return fail(j, "%s: no prompts", path ? path : "--data");
    *out = list;
    *n = count;
    return SDQ_OK;
}

/* ===========================================================================
 * recipes from flags
 * ======================================================================== */

static const flag recipe_flags[] = {
    {"recipe", "sdq|reference", "sdq", NULL},
    {"range-linear", "static|picture|position|block", NULL, NULL},
    {"range-conv", "static|picture|position|block", NULL, NULL},
    {"quantize-outputs", "0|1", NULL, NULL},
    {"quantize-edges", "0|1", NULL, NULL},
    {"quantize-time", "0|1", NULL, NULL},
    {"quantize-context", "0|1", NULL, NULL},
    {"quantize-shortcuts", "0|1", NULL, NULL},
    {"quantize-last-self", "0|1", NULL, NULL},
    {"attention-bits", "32|16|8", NULL, NULL},
    {"split-skip", "0|1", NULL, NULL},
    {"bias-correction", "0|1", NULL, NULL},
    {"learn-scales", "0|1", NULL, NULL},
    {"train-set", "all|small|scales|ranges|lora", NULL, NULL},
    {"lora-rank", "N", NULL, NULL},
    {"last-blocks", "N", NULL, NULL},
    {"moving", "X", NULL, NULL},
    {"weight-scale", "current|moving|fixed", NULL, NULL},
    {"weight-bits", "8|4", NULL, NULL},
    {"weight-group", "N", NULL, NULL},
    {"calibrate-on-data", "0|1", NULL, NULL},
    {"noise-loss", "X", NULL, NULL},
    {"teacher-loss", "X", NULL, NULL},
    {"coherent", "0|1", NULL, NULL},
    {"keep-float", "LAYER,PREFIX.,..", NULL, NULL},
};

static int index_of(const char *const *word, size_t n, const char *s) {
    size_t i;
    for (i = 0; i < n; i++)
        if (!strcmp(word[i], s)) return (int)i;
    return -1;
}

/* Set one field by its name; 0 when the value is not possible, -1 when there is no such field. */
static int recipe_set(sdq_recipe *r, const char *name, const char *value) {
    static const char *const number[] = {"quantize-outputs", "quantize-edges", "quantize-time",
        "quantize-context", "quantize-shortcuts", "quantize-last-self",
        "split-skip", "bias-correction", "learn-scales", "calibrate-on-data", "coherent"};
    int *const into[] = {&r->quantize_outputs, &r->quantize_edges, &r->quantize_time,
        &r->quantize_context, &r->quantize_shortcuts, &r->quantize_last_self,
        &r->split_skip, &r->bias_correction, &r->learn_scales, &r->calibrate_on_data, &r->coherent};
    static const char *const set_word[] = {"all", "small", "scales", "ranges", "lora"};
    static const char *const count[] = {"lora-rank", "last-blocks"};
    size_t *const counts[] = {&r->lora_rank, &r->last_blocks};
    static const char *const real[] = {"moving", "noise-loss", "teacher-loss"};
    float *const to[] = {&r->moving, &r->noise_loss, &r->teacher_loss};
    const int i = index_of(number, COUNT(number), name), k = index_of(real, COUNT(real), name);
    const int range = index_of(range_word, COUNT(range_word), value);
    const int weight = index_of(weight_word, COUNT(weight_word), value);
    const int set = index_of(set_word, COUNT(set_word), value);
    const int n = index_of(count, COUNT(count), name);
    char *end;
    if (!strcmp(name, "range-linear")) { r->range_linear = (sdq_range)range; return range >= 0; }
    if (!strcmp(name, "range-conv")) { r->range_conv = (sdq_range)range; return range >= 0; }
    if (!strcmp(name, "weight-scale")) {
        r->weight_scale = (sdq_weight_scale)weight;
        return weight >= 0;
    }
    if (!strcmp(name, "attention-bits")) {
        r->attention_bits = atoi(value);
        return !strcmp(value, "32") || !strcmp(value, "16") || !strcmp(value, "8");
    }
    if (!strcmp(name, "weight-bits")) {
        r->weight_bits = value[0] - '0';
        return (r->weight_bits == 4 || r->weight_bits == 8) && !value[1];
    }
    if (!strcmp(name, "weight-group")) {
        r->weight_group = (size_t)strtoul(value, &end, 10);
        return isdigit((unsigned char)value[0]) && !*end && r->weight_group > 0;
    }
    if (!strcmp(name, "train-set")) { r->train_set = (sdq_train_set)set; return set >= 0; }
    if (i >= 0) {
        *into[i] = value[0] == '1';
        return (value[0] == '0' || value[0] == '1') && !value[1];
    }
    if (n >= 0) {
        *counts[n] = (size_t)strtoul(value, &end, 10);
        return value[0] >= '0' && value[0] <= '9' && !*end;
    }
    if (k < 0) return -1;
    *to[k] = strtof(value, &end);
    return end != value && !*end;
}

static sdq_status recipe_from_args(job *j, sdq_recipe *r) {
    const char *base = arg_text(&j->a, "recipe");
    size_t i;
    if (!strcmp(base, "reference")) *r = sdq_recipe_reference();
    else if (!strcmp(base, "sdq")) *r = sdq_recipe_default();
    else return bad_value(j, "recipe", base, "sdq|reference");
    for (i = 1; i + 1 < COUNT(recipe_flags); i++) {
        const char *v = arg_given(&j->a, recipe_flags[i].names);
        if (v && recipe_set(r, recipe_flags[i].names, v) != 1)
            return bad_value(j, recipe_flags[i].names, v, recipe_flags[i].arg);
    }
    return SDQ_OK;
}

/* --keep-float a,b -> {"a", "b", NULL}, or NULL. */
static const char *const *keep_float(job *j) {
    const char *v = arg_text(&j->a, "keep-float");
    const char **list;
    char *s, *copy;
    size_t n = 0;
    if (!v) return NULL;
    copy = format_text(j, "%s", v);
    list = (const char **)own(j, (strlen(v) + 2) * sizeof *list);
    for (s = strtok(copy, ","); s; s = strtok(NULL, ",")) list[n++] = s;
    return list;
}

/* ===========================================================================
 * quantizing: what quantize, calibrate and train --what qat share
 * ======================================================================== */

#define CALIBRATION_FLAGS \
    {"calib-prompts", "N", "8", "prompts whose trajectories are used"}, \
    {"calib-steps", "N", "50", "sampler steps of a trajectory"}, \
    {"calib-batches", "N", "150", NULL}, \
    {"calib-guidance,guidance-scale,cfg-scale", "X", "7.5", NULL}, \
    {"cache", "PATH", NULL, "keep what was encoded or sampled in PATH.latents, PATH.states"}

typedef struct quantizer {
    const char *model;
    sdq_recipe recipe;
    const char *const *keep;
    size_t prompts, steps, batches, batch, held;
    float guidance;
    uint64_t seed;
    sdq_diffusion_task data;        /* with recipes that need pictures */
    int alone;                  /* no teacher: the networks of the pipeline come and go */
    int calibrated;             /* ranges and biases will come from the state of a training */
} quantizer;

static sdq_status quantizer_read_flags(job *j, quantizer *q, const char *model) {
    memset(q, 0, sizeof *q);
    q->model = model;
    q->batch = 4;
    q->keep = keep_float(j);
    TRY(recipe_from_args(j, &q->recipe));
    if (q->recipe.coherent && (q->recipe.calibrate_on_data || q->recipe.noise_loss > 0.0f))
        return bad_value(j, "coherent", "1", "trajectories: neither --calibrate-on-data 1 nor "
                         "--noise-loss");
    TRY(arg_size(j, "calib-prompts", &q->prompts));
    TRY(arg_size(j, "calib-steps", &q->steps));
    TRY(arg_size(j, "calib-batches", &q->batches));
    TRY(arg_seed(j, "seed", &q->seed));
    return arg_float(j, "calib-guidance", &q->guidance);
}

/* The part of a diffusion task that t2i and qat share. */
static sdq_status diffusion_task(job *j, const sdq_scheduler_desc *desc, const sdq_model *vae,
                                 size_t batch, sdq_diffusion_task *task) {
    memset(task, 0, sizeof *task);
    TRY(sdq_scheduler_create(j->ctx, desc, &j->scheduler));
    task->samples = j->samples;
    task->scheduler = j->scheduler;
    task->scaling = sdq_model_get_info(vae).scaling_factor;
    task->batch = batch;
    task->checkpoint = arg_on(&j->a, "checkpoint");
    return SDQ_OK;
}

/* Pictures as latents, for recipes that calibrate on them or whose loss needs noise. */
static sdq_status quantizer_data(job *j, quantizer *q) {
    sdq_scheduler_desc desc;
    if (!j->samples) TRY(load_samples(j, j->pipe->vae, j->pipe->tokenizer, j->pipe->text, 1));
    if (!j->scheduler) {
        TRY(sdq_pipeline_scheduler(j->ctx, j->pipe, NULL, &desc));
        TRY(diffusion_task(j, &desc, j->pipe->vae, q->batch, &q->data));
    }
    q->data.unet = j->unet;
    q->data.text = arg_text(&j->a, "cache") ? NULL : j->pipe->text;
    return SDQ_OK;
}

static sdq_status quantizer_states(job *j, quantizer *q) {
    const char *const *prompts = NULL;
    sdq_txt2img_desc d;
    size_t n = 0;
    memset(&d, 0, sizeof d);
    d.steps = q->steps;
    d.guidance = q->guidance;
    d.seed = q->seed;
    d.progress = progress;
    d.user = j;
    TRY(load_prompts(j, q->prompts, &prompts, &n));
    note(j, "%zu prompts, %zu steps, guidance %g", n, q->steps, (double)q->guidance);
    progress_begin(j);
    if (arg_text(&j->a, "cache"))
        return sdq_states_cache(j->ctx, j->pipe, prompts, n, &d,
                                format_text(j, "%s.states", arg_text(&j->a, "cache")), &j->states);
    return sdq_states_collect(j->ctx, j->pipe, prompts, n, &d, &j->states);
}

/* j->pipe and the student j->unet, with ranges if they are not in a file. */
static sdq_status quantizer_prepare(job *j, quantizer *q) {
    const int data = q->recipe.calibrate_on_data || q->recipe.noise_loss > 0.0f;
    sdq_pipeline_desc d;
    memset(&d, 0, sizeof d);
    d.on_demand = q->alone && !data && !arg_text(&j->a, "cache");   /* a cache hashes weights */
    if (!j->pipe) TRY(load_pipeline(j, q->model, &d, &j->pipe));
    /* before there is a second UNet */
    if (!q->recipe.calibrate_on_data && !j->states) TRY(quantizer_states(j, q));
    TRY(q->recipe.train_set == SDQ_TRAIN_LORA
            ? sdq_model_load_packed(j->ctx, q->model, SDQ_PART_UNET, &j->unet)
            : sdq_model_load(j->ctx, q->model, SDQ_PART_UNET, &j->unet));
    TRY(sdq_recipe_apply(j->ctx, j->unet, &q->recipe, q->keep));
    if (data) TRY(quantizer_data(j, q));
    if (data && q->held) TRY(sdq_samples_hold_out(j->ctx, j->samples, q->held, &j->held_samples));
    if (q->held && !data) TRY(sdq_states_hold_out(j->ctx, j->states, q->held, &j->held_states));
    if (q->calibrated) return SDQ_OK;
    progress_begin(j);
    if (q->recipe.calibrate_on_data)
        return sdq_calibrate_data(j->ctx, &q->data, q->batches, q->seed, progress, j);
    return sdq_calibrate_states(j->ctx, j->unet, j->states, 8, q->recipe.bias_correction, progress,
                                j);
}

static sdq_status quantizer_task(job *j, quantizer *q, size_t batch, sdq_distill_task *task) {
    memset(task, 0, sizeof *task);
    task->student = j->unet;
    task->teacher = j->pipe->unet;
    task->states = q->recipe.noise_loss > 0.0f || q->recipe.calibrate_on_data ? NULL : j->states;
    task->data = task->states ? NULL : &q->data;
    task->batch = batch;
    task->teacher_loss = q->recipe.teacher_loss;
    task->coherent = q->recipe.coherent;
    task->noise_loss = q->recipe.noise_loss;
    task->checkpoint = arg_on(&j->a, "checkpoint");
    return SDQ_OK;
}

static size_t layers_int8(const sdq_model *m) {
    size_t i, n = 0;
    for (i = 0; i < sdq_model_layer_count(m); i++)
        n += (size_t)(sdq_layer_quant(sdq_model_layer(m, i, NULL)).enabled != 0);
    return n;
}

/* Convert and write. steps, lr: of the training, 0 without. */
static sdq_status quantizer_save(job *j, const quantizer *q, const char *path, size_t steps,
                                 float lr) {
    char text[1024];
    const size_t n = layers_int8(j->unet);
    sdq_recipe_to_str(&q->recipe, text, sizeof text);
    TRY(sdq_model_convert(j->ctx, j->unet));
    TRY(sdq_model_save_int8(j->ctx, j->unet, path, NULL, steps
        ? format_text(j, "%s train_steps=%zu lr=%g", text, steps, (double)lr) : text));
    note(j, "wrote %s: %.2f MB, %zu of %zu layers int8", path, (double)file_bytes(path) / 1e6, n,
         sdq_model_layer_count(j->unet));
    return SDQ_OK;
}

static const flag quantize_flags[] = {
    {"model,m", "FOLDER|FILE", NULL, "the pipeline: a diffusers folder or a single file"},
    {"prompts", "FILE", NULL, "one prompt a line, to calibrate with"},
    {"data", "FOLDER", NULL, "or captions (and pictures, if the recipe wants them) of a folder"},
    {"out,o", "FILE", NULL, "int8 UNet to write, such as unet-int8.safetensors"},
    CALIBRATION_FLAGS,
    {"seed,s", "N", "1", NULL},
    {"size", "N", NULL, NULL},
};

static sdq_status cmd_quantize(job *j) {
    const char *model, *out;
    quantizer q;
    TRY(need(j, "model", &model));
    TRY(need(j, "out", &out));
    TRY(quantizer_read_flags(j, &q, model));
    TRY(check_output(j, out));
    q.alone = 1;
    TRY(quantizer_prepare(j, &q));
    return quantizer_save(j, &q, out, 0, 0.0f);
}

static const flag calibrate_flags[] = {
    {"model,m", "FOLDER|FILE", NULL, "the pipeline: a diffusers folder or a single file"},
    {"prompts", "FILE", NULL, "one prompt a line, to calibrate with"},
    {"data", "FOLDER", NULL, "or captions (and pictures, if the recipe wants them) of a folder"},
    {"json", "FILE", NULL, "write the ranges there, too"},
    CALIBRATION_FLAGS,
    {"seed,s", "N", "1", NULL},
    {"size", "N", NULL, NULL},
};

/* One line of the table and of the JSON for every input range of a layer. */
static void print_ranges(const sdq_layer *l, const char *name, FILE *json, size_t *rows) {
    const sdq_quant q = sdq_layer_quant(l);
    float s = 0.0f;
    int32_t z = 0;
    int part = 0, parts = 1;
    for (; part < parts; part++) {
        const int seen = sdq_layer_input_range(l, part, &s, &z);
        const double low = (double)s * (double)-z, high = (double)s * (double)(255 - z);
        if (seen > parts) parts = seen;
        printf("%-52s %d %-9s", name, part, q.enabled ? range_word[q.range] : "float");
        if (seen) printf(" %12.5g %4d %11.4g %11.4g", (double)s, (int)z, low, high);
        putchar('\n');
        if (!json) continue;
        fprintf(json, "%s\n  {\"layer\": \"%s\", \"part\": %d, \"int8\": %d, \"range\": \"%s\"",
                (*rows)++ ? "," : "", name, part, q.enabled != 0, range_word[q.range]);
        if (seen)
            fprintf(json, ", \"scale\": %.9g, \"zero\": %d, \"min\": %.6g, \"max\": %.6g",
                    (double)s, (int)z, low, high);
        fputc('}', json);
    }
}

static sdq_status cmd_calibrate(job *j) {
    const char *model, *path = arg_text(&j->a, "json"), *name;
    FILE *json = NULL;
    size_t i, rows = 0;
    quantizer q;
    TRY(need(j, "model", &model));
    TRY(quantizer_read_flags(j, &q, model));
    if (path) TRY(check_output(j, path));
    TRY(quantizer_prepare(j, &q));
    if (path) TRY(report_begin(j, path, &json));
    if (json) fputc('[', json);
    printf("%-52s %s %-9s %12s %4s %11s %11s\n", "layer", "#", "range", "scale", "zero", "min",
           "max");
    for (i = 0; i < sdq_model_layer_count(j->unet); i++) {
        const sdq_layer *l = sdq_model_layer(j->unet, i, &name);
        print_ranges(l, name, json, &rows);
    }
    if (json) fputs("\n]\n", json);
    return json ? report_end(j, path, json) : SDQ_OK;
}

/* ===========================================================================
 * train
 * ======================================================================== */

static const flag train_flags[] = {
    {"what", "vae|t2i|qat", "qat", "autoencoder, text-to-image, or quantization-aware training"},
    {"model,m", "FOLDER|FILE", NULL, "diffusers folder (--init: its config.json files); qat: or a file"},
    {"init", NULL, NULL, "begin with random weights"},
    {"vae", "FOLDER", NULL, "t2i: take the autoencoder from here (default: --model)"},
    {"data", "FOLDER", NULL, "pictures with captions (metadata.jsonl, metadata.csv or NAME.txt)"},
    {"prompts", "FILE", NULL, "qat: one prompt a line, instead of --data"},
    {"out,o", "FOLDER|FILE", NULL, "vae, t2i: folder to write; qat: int8 file"},
    {"steps", "N", NULL, "vae 2400, t2i 16000, qat 300"},
    {"batch", "N", NULL, "vae 16, t2i 32, qat 4"},
    {"accumulate", "N", "1", NULL},
    {"lr", "X", NULL, "vae 2e-3, t2i 8e-4, qat 1e-5"},
    {"scale-lr", "X", "1000", "qat: rate of learned scales, times --lr: relative steps"},
    {"schedule", "constant|cosine", NULL, "vae, t2i cosine; qat constant"},
    {"warmup", "N", NULL, "vae, t2i 200; qat 0"},
    {"beta1", "X", "0.9", NULL},
    {"beta2", "X", NULL, NULL},
    {"weight-decay", "X", NULL, NULL},
    {"clip", "X", "1", NULL},
    {"moments8", NULL, NULL, "the optimizer's moments in bytes: 6 bytes per weight less"},
    {"ema", "X", NULL, "average of the weights: t2i 0.999, qat 0.9999; 0: none"},
    {"snr-gamma", "X", "5", NULL},
    {"drop", "X", "0.1", NULL},
    {"edges", "X", "1", NULL},
    {"kl", "X", "1e-4", NULL},
    {"map", "LAYER:mse|l1:WEIGHT", NULL, "qat: also compare this layer's output; repeatable"},
    CALIBRATION_FLAGS,
    {"checkpoint", NULL, NULL, "recompute activations: less memory"},
    {"seed,s", "N", "1", NULL},
    {"size", "N", NULL, NULL},
    {"dtype", "f32|f16", "f16", NULL},
    {"state", "FILE", NULL, "optimizer state: written, and gone on from when it exists"},
    {"save-every", "N", "200", "steps between states"},
    {"save-minutes", "X", NULL, "also save when so many minutes have passed"},
    {"log", "FILE.csv", NULL, "losses, rate, gradient norm, seconds, memory of every step"},
    {"log-every", "N", "1", NULL},
    {"validate-every", "N", NULL, "steps between measurements of the loss on held-out data"},
    {"validate-batches", "N", "4", NULL},
    {"held", "N", "1", "prompts or pictures that are held out for it"},
    {"best", "FILE", NULL, "keep the weights of the lowest validation loss there, and end with them"},
    {"explode", "X", "1000", NULL},
};

typedef enum what { WHAT_VAE, WHAT_T2I, WHAT_QAT } what;

/* What differs between the three kinds of training; flags change it. */
typedef struct plan {
    size_t steps, batch;
    float lr, beta2, weight_decay, ema;
    sdq_schedule schedule;
    size_t warmup;
} plan;
static const plan plans[] = {
    {2400, 16, 2e-3f, 0.99f, 1e-4f, 0.0f, SDQ_COSINE, 200},
    {16000, 32, 8e-4f, 0.99f, 1e-3f, 0.999f, SDQ_COSINE, 200},
    {300, 4, 1e-5f, 0.999f, 1e-2f, 0.9999f, SDQ_CONSTANT, 0},
};

/* The trainer's own part of a job. */
typedef struct trainer {
    job *j;
    what kind;
    plan p;
    sdq_optim_desc optim;
    sdq_fit_desc fit;
    FILE *log;
    size_t log_every, logged;
    double loss_sum, part_sum[SDQ_FIT_PARTS], last;
    double save_seconds, saved;         /* by the clock */
    size_t held;
    const char *model, *out;
    sdq_dtype dtype;
} trainer;

static sdq_status train_read_flags(job *j, trainer *t) {
    static const char *const whats[] = {"vae", "t2i", "qat"};
    static const char *const schedules[] = {"constant", "cosine"}, *const dtypes[] = {"f32", "f16"};
    const char *text;
    int kind = 0, schedule, dtype = 1;
    TRY(need(j, "what", &text));
    TRY(arg_choice(j, "what", whats, 3, &kind));
    t->kind = (what)kind;
    t->p = plans[kind];
    schedule = (int)t->p.schedule;
    TRY(need(j, "model", &t->model));
    TRY(need(j, "out", &t->out));
    TRY(arg_size(j, "steps", &t->p.steps));
    TRY(arg_size(j, "batch", &t->p.batch));
    TRY(arg_float(j, "lr", &t->p.lr));
    TRY(arg_float(j, "beta2", &t->p.beta2));
    TRY(arg_float(j, "weight-decay", &t->p.weight_decay));
    TRY(arg_float(j, "ema", &t->p.ema));
    TRY(arg_choice(j, "schedule", schedules, 2, &schedule));
    TRY(arg_size(j, "warmup", &t->p.warmup));
    TRY(arg_choice(j, "dtype", dtypes, 2, &dtype));
    t->dtype = dtype ? SDQ_F16 : SDQ_F32;
    if (t->p.steps == 0 || t->p.batch == 0) return bad_value(j, "steps, --batch", "0", "1 or more");
    t->optim.lr = t->p.lr;
    t->optim.beta2 = t->p.beta2;
    t->optim.weight_decay = t->p.weight_decay;
    t->optim.ema = t->p.ema;
    t->optim.schedule = schedule ? SDQ_COSINE : SDQ_CONSTANT;
    t->optim.warmup = t->p.warmup;
    t->optim.steps = t->p.steps;
    TRY(arg_float(j, "beta1", &t->optim.beta1));
    TRY(arg_float(j, "clip", &t->optim.clip));
    t->optim.moments8 = arg_on(&j->a, "moments8");
    t->fit.steps = t->p.steps;
    TRY(arg_size(j, "accumulate", &t->fit.accumulate));
    TRY(arg_seed(j, "seed", &t->fit.seed));
    TRY(arg_size(j, "save-every", &t->fit.save_every));
    t->fit.state = arg_text(&j->a, "state");
    TRY(arg_size(j, "validate-every", &t->fit.validate_every));
    TRY(arg_size(j, "validate-batches", &t->fit.validate_batches));
    TRY(arg_real(j, "explode", &t->fit.explode));
    TRY(arg_real(j, "save-minutes", &t->save_seconds));
    TRY(arg_size(j, "held", &t->held));
    t->save_seconds *= 60.0;
    t->fit.best = arg_text(&j->a, "best");
    if (t->fit.best) TRY(check_output(j, t->fit.best));
    if (t->fit.best && !t->fit.validate_every)
        return bad_value(j, "best", t->fit.best, "--validate-every N along with it");
    if (!t->fit.validate_every) t->held = 0;
    else if (t->kind == WHAT_VAE || t->held == 0)
        return bad_value(j, "validate-every", arg_text(&j->a, "validate-every"),
                         "t2i or qat, and --held of 1 or more");
    t->log_every = 1;
    TRY(arg_size(j, "log-every", &t->log_every));
    if (t->log_every == 0 || (t->fit.save_every && t->fit.save_every % t->log_every))
        return bad_value(j, "log-every", arg_text(&j->a, "log-every"),
                         "1 or more, and a divisor of --save-every, so that a resumed log is equal");
    return SDQ_OK;
}

/* ---- the log: rows after the checkpoint's step are dropped before a run goes on ---- */

static sdq_status state_step(job *j, const char *path, size_t *step) {
    sdq_file *f;
    const char *text;
    *step = 0;
    if (!path || !exists(path)) return SDQ_OK;
    TRY(sdq_file_open(j->ctx, path, &f));
    text = sdq_file_meta(f, "step");
    if (text) *step = (size_t)strtoull(text, NULL, 10);
    sdq_file_close(j->ctx, f);
    return SDQ_OK;
}

/* The columns that are the same when a run is repeated come first. */
static const char log_head[] =
    "step,loss,rate,grad_norm,teacher,noise,maps,validation,seconds,megabytes\n";
static const char *const log_parts[] = {"teacher", "noise", "maps"};

/* The length of the rows up to a step, for all of them begin with it. */
static size_t log_keep(const char *text, size_t step) {
    const char *s = text;
    while (strchr(s, '\n')
           && !(isdigit((unsigned char)*s) && strtoull(s, NULL, 10) > step))
        s = strchr(s, '\n') + 1;
    return (size_t)(s - text);
}

static sdq_status log_open(job *j, trainer *t) {
    const char *path = arg_text(&j->a, "log");
    char *text;
    size_t step;
    TRY(state_step(j, t->fit.state, &step));
    t->logged = step;
    if (step) note(j, "going on from step %zu of %s", step, t->fit.state);
    if (!path) return SDQ_OK;
    if (step && exists(path)) {
        TRY(read_text(j, path, &text, NULL));
        if (strncmp(text, log_head, sizeof log_head - 1) != 0)
            return fail(j, "%s: is not a log with the columns %.*s; name another file", path,
                        (int)sizeof log_head - 2, log_head);
        TRY(sdq_bytes_write(j->ctx, path, text, log_keep(text, step)));
    } else {
        TRY(sdq_bytes_write(j->ctx, path, log_head, sizeof log_head - 1));
    }
    t->log = fopen(path, "ab");
    return t->log ? SDQ_OK : fail(j, "%s: %s", path, strerror(errno));
}

/* A row: the means since the row before; a step that was only validated has no losses. */
static void log_row(trainer *t, const sdq_fit_info *info) {
    const double time = now(), n = (double)(info->step - t->logged);
    size_t i, k;
    fprintf(t->log, "%zu,", info->step);
    if (info->step)
        fprintf(t->log, "%.6g,%.6g,%.5g,", t->loss_sum / n, info->rate, info->grad_norm);
    else fputs(",,,", t->log);
    for (i = 0; i < COUNT(log_parts); i++) {
        for (k = 0; k < info->parts && strcmp(info->part[k], log_parts[i]) != 0; k++) {}
        if (info->step && k < info->parts) fprintf(t->log, "%.6g", t->part_sum[k] / n);
        fputc(',', t->log);
    }
    if (info->validated) fprintf(t->log, "%.9g", info->validation);
    fprintf(t->log, ",%.2f,%.0f\n", time - t->last, peak_megabytes());
    (void)fflush(t->log);
    t->last = time;
    t->loss_sum = 0.0;
    memset(t->part_sum, 0, sizeof t->part_sum);
    t->logged = info->step;
}

/* After every step: the log, the end of the progress line, saving by the clock, signals. */
static int train_after(void *user, const sdq_fit_info *info) {
    trainer *t = (trainer *)user;
    job *j = t->j;
    size_t i, n = 0;
    t->loss_sum += info->loss;
    for (i = 0; i < info->parts; i++) t->part_sum[i] += info->part_loss[i];
    if (t->log && (info->step % t->log_every == 0 || info->step == info->steps || info->validated))
        log_row(t, info);
    for (i = 0; info->parts > 1 && i < info->parts; i++)
        n += (size_t)snprintf(j->more + n, n < sizeof j->more ? sizeof j->more - n : 0, "%s%s %.4g",
                              i ? " " : " (", info->part[i], info->part_loss[i]);
    if (n < sizeof j->more)
        (void)snprintf(j->more + n, sizeof j->more - n, "%s  |g| %.3g  %.0f MB",
                       info->parts > 1 ? ")" : "", info->grad_norm, peak_megabytes());
    if (info->validated)
        note(j, "%sstep %zu: validation loss %.6g, best %.6g of step %zu", j->terminal ? "\n" : "",
             info->step, info->validation, info->best, info->best_step);
    if (info->step) (void)progress(j, "train", info->step, info->steps, info->loss);
    if (t->log && ferror(t->log)) {
        (void)fail(j, "%s: write error; is the disk full?", arg_text(&j->a, "log"));
        return SDQ_FIT_STOP;
    }
    if (t->log && info->step % t->log_every) return SDQ_FIT_GO;     /* stop at whole rows */
    if (stopped) return SDQ_FIT_STOP;
    if (!(t->save_seconds > 0.0) || now() - t->saved < t->save_seconds) return SDQ_FIT_GO;
    t->saved = now();
    return SDQ_FIT_SAVE;
}

static sdq_status train_fit(job *j, trainer *t, sdq_loss_fn loss, void *task) {
    sdq_status st;
    TRY(log_open(j, t));
    if (j->said != SDQ_OK) return j->said;
    t->fit.after = train_after;
    t->fit.user = t;
    progress_begin(j);
    t->last = t->saved = j->started;
    st = sdq_fit(j->ctx, j->optim, &t->fit, loss, task);
    j->more[0] = 0;
    if (t->log && fclose(t->log) != 0 && st == SDQ_OK) st = fail(j, "the log could not be written");
    t->log = NULL;
    if (st == SDQ_ERR_CANCELLED && t->fit.state)
        note(j, "\nthe state is in %s: the same command goes on", t->fit.state);
    return st;
}

/* Leave in the model what is to be written: the best weights, the averages or the last ones. */
static sdq_status train_take(job *j, const trainer *t) {
    if (t->fit.best) {
        note(j, "taking the best weights, %s", t->fit.best);
        return sdq_optim_load_weights(j->ctx, j->optim, t->fit.best);
    }
    if (t->p.ema > 0.0f) sdq_optim_swap_ema(j->optim);
    return SDQ_OK;
}

static sdq_status train_begin(job *j, trainer *t, sdq_model *m, const char *prefix) {
    if (!j->optim) TRY(sdq_optim_create(j->ctx, &t->optim, &j->optim));
    return m ? sdq_optim_add_model(j->ctx, j->optim, m, prefix) : SDQ_OK;
}

static sdq_status train_vae(job *j, trainer *t) {
    sdq_vae_task task;
    memset(&task, 0, sizeof task);
    TRY(load_part(j, t->model, SDQ_PART_VAE, arg_on(&j->a, "init"), t->fit.seed, &j->vae));
    TRY(load_samples(j, j->vae, NULL, NULL, 0));
    TRY(train_begin(j, t, j->vae, "vae."));
    task.vae = j->vae;
    task.samples = j->samples;
    task.batch = t->p.batch;
    TRY(arg_float(j, "edges", &task.edges));
    TRY(arg_float(j, "kl", &task.kl));
    TRY(train_fit(j, t, sdq_vae_task_loss, &task));
    TRY(train_take(j, t));
    progress_begin(j);
    TRY(sdq_samples_encode(j->ctx, j->samples, j->vae, progress, j));
    TRY(sdq_model_set_scaling(j->ctx, j->vae, sdq_samples_scaling(j->samples)));
    note(j, "scaling factor %.5f", (double)sdq_samples_scaling(j->samples));
    return save_part(j, j->vae, t->out, t->dtype);
}

static sdq_status train_t2i(job *j, trainer *t) {
    const int init = arg_on(&j->a, "init");
    const char *vae = arg_text(&j->a, "vae");
    sdq_scheduler_desc desc;
    sdq_diffusion_task task, held;
    TRY(load_part(j, vae ? vae : t->model, SDQ_PART_VAE, 0, 0, &j->vae));
    TRY(load_tokenizer(j, t->model));
    TRY(load_scheduler_desc(j, t->model, &desc));
    TRY(load_part(j, t->model, SDQ_PART_UNET, init, t->fit.seed, &j->unet));
    TRY(load_part(j, t->model, SDQ_PART_TEXT, init, t->fit.seed, &j->text));
    TRY(load_samples(j, j->vae, j->tokenizer, NULL, 1));
    if (t->held) TRY(sdq_samples_hold_out(j->ctx, j->samples, t->held, &j->held_samples));
    TRY(diffusion_task(j, &desc, j->vae, t->p.batch, &task));
    task.unet = j->unet;
    task.text = j->text;
    TRY(arg_float(j, "drop", &task.drop));
    TRY(arg_real(j, "snr-gamma", &task.snr_gamma));
    TRY(train_begin(j, t, j->unet, "unet."));
    TRY(train_begin(j, t, j->text, "text."));
    held = task;
    held.samples = j->held_samples;
    t->fit.validate = sdq_diffusion_task_loss;
    t->fit.validate_user = &held;
    TRY(train_fit(j, t, sdq_diffusion_task_loss, &task));
    TRY(train_take(j, t));
    TRY(copy_pipeline(j, t->model, t->out));
    if (strcmp(vae ? vae : t->model, t->out) != 0) TRY(save_part(j, j->vae, t->out, t->dtype));
    TRY(save_part(j, j->text, t->out, t->dtype));
    return save_part(j, j->unet, t->out, t->dtype);
}

/* --map mid_block.resnets.1.conv2:mse:0.5 */
static sdq_status read_maps(job *j, sdq_distill_task *task) {
    const flag *f = flag_find(&j->a, "map", 3);
    sdq_distill_map *map = (sdq_distill_map *)own(j, (j->a.givens + 1) * sizeof *map);
    size_t i;
    task->map = map;
    for (i = 0; i < j->a.givens; i++) {
        char *text, *kind, *weight, *end;
        if (j->a.given[i] != f) continue;
        text = format_text(j, "%s", j->a.value[i]);
        kind = strchr(text, ':');
        weight = kind ? strchr(kind + 1, ':') : NULL;
        if (!weight) return bad_value(j, "map", text, f->arg);
        *kind++ = *weight++ = 0;
        map->layer = text;
        map->l1 = !strcmp(kind, "l1");
        map->weight = strtof(weight, &end);
        if ((!map->l1 && strcmp(kind, "mse")) || end == weight || *end)
            return bad_value(j, "map", j->a.value[i], f->arg);
        map++;
        task->maps++;
    }
    return SDQ_OK;
}

static sdq_status train_qat(job *j, trainer *t) {
    sdq_distill_task task, held;
    sdq_diffusion_task held_data;
    float scale_lr = 1000.0f;
    quantizer q;
    TRY(quantizer_read_flags(j, &q, t->model));
    q.batch = t->p.batch;
    q.seed = t->fit.seed;
    if (!arg_given(&j->a, "calib-batches")) {       /* the published rule */
        q.batches = t->p.steps / 2 < 300 ? t->p.steps / 2 : 300;
        if (q.batches == 0) q.batches = 1;
    }
    q.held = t->held;
    q.calibrated = t->fit.state && exists(t->fit.state);
    TRY(arg_float(j, "scale-lr", &scale_lr));
    TRY(check_output(j, t->out));
    TRY(quantizer_prepare(j, &q));
    if (!j->optim) TRY(sdq_optim_create(j->ctx, &t->optim, &j->optim));
    TRY(sdq_optim_add_student(j->ctx, j->optim, j->unet, &q.recipe, scale_lr));
    TRY(quantizer_task(j, &q, t->p.batch, &task));
    TRY(read_maps(j, &task));
    held = task;
    held_data = q.data;
    held_data.samples = j->held_samples;
    if (held.states) held.states = j->held_states;
    else held.data = &held_data;
    t->fit.validate = sdq_distill_task_loss;
    t->fit.validate_user = &held;
    sdq_model_observe(j->unet, q.recipe.moving > 0.0f);
    TRY(train_fit(j, t, sdq_distill_task_loss, &task));
    sdq_model_observe(j->unet, 0);
    TRY(train_take(j, t));
    return quantizer_save(j, &q, t->out, t->p.steps, t->p.lr);
}

static sdq_status cmd_train(job *j) {
    trainer t;
    memset(&t, 0, sizeof t);
    t.j = j;
    TRY(train_read_flags(j, &t));
    note(j, "%s, %d thread%s", sdq_tier_name(sdq_ctx_tier(j->ctx)), sdq_ctx_threads(j->ctx),
         sdq_ctx_threads(j->ctx) == 1 ? "" : "s");
    if (t.kind == WHAT_VAE) return train_vae(j, &t);
    return t.kind == WHAT_T2I ? train_t2i(j, &t) : train_qat(j, &t);
}

/* ===========================================================================
 * tensors of files: NCHW there, NHWC here
 * ======================================================================== */

static void to_nhwc(const float *src, float *dst, size_t n, size_t h, size_t w, size_t c) {
    size_t i, p, k;
    for (i = 0; i < n; i++)
        for (k = 0; k < c; k++)
            for (p = 0; p < h * w; p++) dst[(i * h * w + p) * c + k] = src[(i * c + k) * h * w + p];
}
static void to_nchw(const float *src, float *dst, size_t n, size_t h, size_t w, size_t c,
                    size_t from, size_t all) {
    size_t i, p, k;
    for (i = 0; i < n; i++)
        for (k = 0; k < c; k++)
            for (p = 0; p < h * w; p++)
                dst[(i * c + k) * h * w + p] = src[(i * h * w + p) * all + from + k];
}

/* An array called `name` or `part.name`. */
static sdq_status find_entry(job *j, const sdq_file *f, const char *path, const char *part,
                             const char *name, int rank, const sdq_entry **out) {
    *out = sdq_file_find(f, format_text(j, "%s.%s", part, name));
    if (!*out) *out = sdq_file_find(f, name);
    if (!*out) return fail(j, "%s: has no array %s", path, name);
    if (rank && (*out)->rank != rank)
        return fail(j, "%s: %s has %d dimensions, expected %d", path, name, (*out)->rank, rank);
    return SDQ_OK;
}

/* A float array as a tensor; 4 dimensions: NCHW to NHWC. channels: 0 or how many it must have. */
static sdq_status read_tensor(job *j, const sdq_file *f, const char *path, const char *part,
                              const char *name, int rank, size_t channels, sdq_tensor **out) {
    const int at = rank == 4 ? 1 : rank - 1;
    const sdq_entry *e;
    sdq_tensor *raw;
    TRY(find_entry(j, f, path, part, name, rank, &e));
    if (sdq_entry_count(e) == 0) return fail(j, "%s: %s is empty: a dimension is 0", path, name);
    if (channels && e->dim[at] != channels)
        return fail(j, "%s: dimension %d of %s is %zu, the model has %zu channels there", path, at,
                    name, e->dim[at], channels);
    raw = sdq_tensor_new(j->ctx, SDQ_F32, rank, e->dim);
    if (!raw) return sdq_last_error(j->ctx);
    TRY(sdq_entry_to_f32(j->ctx, e, sdq_f32(raw)));
    *out = raw;
    if (rank != 4) return SDQ_OK;
    *out = sdq_tensor_4d(j->ctx, e->dim[0], e->dim[2], e->dim[3], e->dim[1]);
    if (!*out) return sdq_last_error(j->ctx);
    to_nhwc(sdq_f32(raw), sdq_f32(*out), e->dim[0], e->dim[2], e->dim[3], e->dim[1]);
    return SDQ_OK;
}

/* Channels [from, from+c) of a tensor as an array to write. */
static sdq_status set_entry(job *j, sdq_entry *e, const char *name, const sdq_tensor *t,
                            size_t from, size_t c) {
    float *copy;
    size_t i;
    if (!t) return sdq_last_error(j->ctx);
    memset(e, 0, sizeof *e);
    e->name = name;
    e->rank = t->rank;
    for (i = 0; i < 8; i++) e->dim[i] = i < 4 ? t->dim[i] : 1;
    e->data = t->data;
    if (t->rank == 4) {
        e->dim[1] = c; e->dim[2] = t->dim[1]; e->dim[3] = t->dim[2];
        copy = (float *)own(j, t->dim[0] * c * t->dim[1] * t->dim[2] * sizeof *copy);
        to_nchw(sdq_f32(t), copy, t->dim[0], t->dim[1], t->dim[2], c, from, t->dim[3]);
        e->data = copy;
    }
    e->bytes = sdq_entry_count(e) * sizeof(float);
    return SDQ_OK;
}

/* ===========================================================================
 * forward: one bare network, from safetensors to safetensors
 * ======================================================================== */

static const flag forward_flags[] = {
    {"part", "text|unet|vae-encoder|vae-decoder", NULL, "which network"},
    {"in,i", "FILE", NULL,
     "text: input_ids; unet: sample, timestep, encoder_hidden_states;\n"
     "                                        vae-encoder: image; vae-decoder: latent (NCHW)"},
    {"out,o", "FILE", NULL,
     "text: last_hidden_state; unet: out; vae-encoder: mean, logvar;\n"
     "                                        vae-decoder: image"},
    {"precision", "fp32|fake|int8", "fp32",
     "unet: int8 wants --unet FILE, fake takes the recipe's flags;\n"
     "                                        its static ranges are those of this input"},
    {"unet", "FILE", NULL, "int8 UNet"},
    {"grad", "noise", NULL, "unet: gradients of mean((out - noise)^2), one array per parameter"},
    {"prefix", "TEXT", NULL, "input arrays may be called TEXT.name (default: the part)"},
};

static sdq_status forward_text(job *j, const sdq_file *f, const char *path, const char *prefix,
                               sdq_entry *out) {
    const sdq_entry *e;
    sdq_tensor *ids;
    float *value;
    size_t i, vocab;
    TRY(find_entry(j, f, path, prefix, "input_ids", 2, &e));
    if (sdq_entry_count(e) == 0) return fail(j, "%s: input_ids is empty: a dimension is 0", path);
    TRY(sdq_model_load(j->ctx, j->a.word[0], SDQ_PART_TEXT, &j->text));
    vocab = sdq_model_get_info(j->text).vocab;
    ids = sdq_tensor_new(j->ctx, SDQ_I32, 2, e->dim);
    if (!ids) return sdq_last_error(j->ctx);
    value = (float *)own(j, sdq_entry_count(e) * sizeof *value);
    TRY(sdq_entry_to_f32(j->ctx, e, value));        /* exact: ids are below 2^24 */
    for (i = 0; i < sdq_entry_count(e); i++) {
        if (!(value[i] >= 0.0f && value[i] < (float)vocab && value[i] == floorf(value[i])))
            return fail(j, "%s: input_ids holds %g; the model has whole numbers from 0 to %zu",
                        path, (double)value[i], vocab - 1);
        ((int32_t *)ids->data)[i] = (int32_t)value[i];
    }
    return set_entry(j, out, "last_hidden_state", sdq_text_forward(j->ctx, j->text, ids), 0, 0);
}

static sdq_status forward_vae(job *j, const sdq_file *f, const char *path, const char *prefix,
                              int encode, sdq_entry *out, size_t *n) {
    sdq_tensor *x = NULL, *y;
    sdq_model_info info;
    size_t i, c;
    TRY(sdq_model_load(j->ctx, j->a.word[0], SDQ_PART_VAE, &j->vae));
    info = sdq_model_get_info(j->vae);
    TRY(read_tensor(j, f, path, prefix, encode ? "image" : "latent", 4,
                    encode ? info.in : info.latent, &x));
    y = encode ? sdq_vae_encode(j->ctx, j->vae, x, SDQ_FLOAT)
               : sdq_vae_decode(j->ctx, j->vae, x, SDQ_FLOAT);
    if (!y) return sdq_last_error(j->ctx);
    if (!encode) return set_entry(j, out, "image", y, 0, y->dim[3]);
    c = y->dim[3] / 2;
    for (i = 0; i < sdq_tensor_count(y); i++) { /* diffusers clamps the logarithm of the variance */
        float *v = sdq_f32(y) + i;
        if (i % (2 * c) >= c) *v = *v < -30.0f ? -30.0f : *v > 20.0f ? 20.0f : *v;
    }
    *n = 2;
    TRY(set_entry(j, &out[0], "mean", y, 0, c));
    return set_entry(j, &out[1], "logvar", y, c, c);
}

/* A scalar or [1] timestep is repeated for all entries. */
static sdq_status read_timesteps(job *j, const sdq_file *f, const char *path, const char *prefix,
                                 size_t n, float **out) {
    const sdq_entry *e;
    size_t i, count;
    TRY(find_entry(j, f, path, prefix, "timestep", 0, &e));
    count = sdq_entry_count(e);
    if (count != 1 && count != n)
        return fail(j, "%s: %zu timesteps for %zu samples", path, count, n);
    *out = (float *)own(j, n * sizeof **out);
    TRY(sdq_entry_to_f32(j->ctx, e, *out));
    for (i = count; i < n; i++) (*out)[i] = (*out)[0];
    return SDQ_OK;
}

/* The mean square error against `noise`, its gradients as the arrays to write. */
static sdq_status unet_gradients(job *j, const sdq_unet_input *in, sdq_mode mode, sdq_tensor *noise,
                                 sdq_entry **out, size_t *n) {
    const char *name;
    sdq_tensor *loss;
    size_t i;
    TRY(sdq_optim_create(j->ctx, NULL, &j->optim));
    TRY(sdq_optim_add_model(j->ctx, j->optim, j->unet, ""));
    sdq_tape_begin(j->ctx);
    loss = sdq_mse(j->ctx, sdq_unet_forward(j->ctx, j->unet, in, mode), noise, NULL);
    if (!loss) return sdq_last_error(j->ctx);
    TRY(sdq_backward(j->ctx, loss));
    sdq_tape_end(j->ctx);
    *n = sdq_model_param_count(j->unet);
    *out = (sdq_entry *)own(j, *n * sizeof **out);
    for (i = 0; i < *n; i++) {
        sdq_tensor *g = sdq_model_param_copy(j->ctx, j->unet, i, 1);
        sdq_entry *e = &(*out)[i];
        if (!g) return sdq_last_error(j->ctx);
        (void)sdq_model_param(j->unet, i, &name);
        e->name = name;
        e->rank = g->rank;
        memcpy(e->dim, g->dim, sizeof g->dim);
        e->dim[4] = e->dim[5] = e->dim[6] = e->dim[7] = 1;
        e->data = g->data;
        e->bytes = sdq_tensor_count(g) * sizeof(float);
    }
    return SDQ_OK;
}

static sdq_status forward_load_unet(job *j, int precision) {
    const char *folder = j->a.word[0], *file;
    sdq_recipe recipe;
    if (precision == SDQ_INT8) {
        TRY(need(j, "unet", &file));
        return sdq_model_load_int8(j->ctx, folder, file, &j->unet, NULL);
    }
    TRY(sdq_model_load(j->ctx, folder, SDQ_PART_UNET, &j->unet));
    if (precision == SDQ_FLOAT) return SDQ_OK;
    TRY(recipe_from_args(j, &recipe));
    TRY(sdq_recipe_apply(j->ctx, j->unet, &recipe, keep_float(j)));
    sdq_model_observe(j->unet, 1);
    return SDQ_OK;
}

static sdq_status forward_unet(job *j, const sdq_file *f, const char *path, const char *prefix,
                               sdq_entry **out, size_t *n) {
    static const char *const words[] = {"fp32,float", "fake", "int8"};
    const char *grad = arg_text(&j->a, "grad");
    sdq_tensor *noise = NULL, *y;
    sdq_unet_input in;
    sdq_model_info info;
    float *times = NULL;
    int mode = 0;
    memset(&in, 0, sizeof in);
    TRY(arg_choice(j, "precision", words, 3, &mode));
    if (grad && (strcmp(grad, "noise") || mode == SDQ_INT8))
        return bad_value(j, "grad", grad, "noise, with --precision fp32 or fake");
    TRY(forward_load_unet(j, mode));
    info = sdq_model_get_info(j->unet);
    TRY(read_tensor(j, f, path, prefix, "sample", 4, info.in, &in.sample));
    TRY(read_tensor(j, f, path, prefix, "encoder_hidden_states", 3, info.context, &in.context));
    if (in.context->dim[0] != in.sample->dim[0])
        return fail(j, "%s: %zu samples, but %zu entries of encoder_hidden_states", path,
                    in.sample->dim[0], in.context->dim[0]);
    TRY(read_timesteps(j, f, path, prefix, in.sample->dim[0], &times));
    if (grad) TRY(read_tensor(j, f, path, prefix, "noise", 4, info.out, &noise));
    if (noise && memcmp(noise->dim, in.sample->dim, 3 * sizeof noise->dim[0]) != 0)
        return fail(j, "%s: noise and sample differ in number, height or width", path);
    in.timesteps = times;
    if (grad) return unet_gradients(j, &in, (sdq_mode)mode, noise, out, n);
    y = sdq_unet_forward(j->ctx, j->unet, &in, (sdq_mode)mode);
    return set_entry(j, *out, "out", y, 0, y ? y->dim[3] : 0);
}

static sdq_status cmd_forward(job *j) {
    static const char *const parts[] = {"text", "unet", "vae-encoder", "vae-decoder"};
    sdq_entry two[2], *out = two;
    const char *in, *to, *text, *prefix;
    sdq_file *f = NULL;
    sdq_status st;
    size_t n = 1;
    int part = 0;
    j->usage = j->a.words != 1;
    if (j->usage) return fail(j, "forward: one model folder is needed (see sdq forward --help)");
    TRY(need(j, "part", &text));
    TRY(arg_choice(j, "part", parts, 4, &part));
    TRY(need(j, "in", &in));
    TRY(need(j, "out", &to));
    prefix = arg_text(&j->a, "prefix") ? arg_text(&j->a, "prefix") : parts[part];
    TRY(sdq_file_open(j->ctx, in, &f));
    st = part == 0 ? forward_text(j, f, in, prefix, two)
       : part == 1 ? forward_unet(j, f, in, prefix, &out, &n)
                   : forward_vae(j, f, in, prefix, part == 2, two, &n);
    sdq_file_close(j->ctx, f);
    return st != SDQ_OK ? st : sdq_file_write(j->ctx, to, out, n, NULL, 0);
}

/* ===========================================================================
 * txt2img
 * ======================================================================== */

#define SAMPLER_FLAGS \
    {"steps,num-inference-steps,sample-steps", "N", "50", "denoising steps"}, \
    {"guidance-scale,cfg-scale,cfg,guidance", "X", "7.5", "classifier-free guidance; 1: none"}, \
    {"scheduler,sampling-method,sampler", "NAME", NULL, \
     "pndm ddim euler euler_a dpm++2m lcm [the model's]"}, \
    {"karras", NULL, NULL, "Karras sigmas (euler, dpm++2m)"}

static const flag txt2img_flags[] = {
    {"model,m,pretrained-model-name-or-path", "FOLDER", NULL,
     "the pipeline, in diffusers' layout"},
    {"prompt,p", "TEXT", NULL, "what to draw"},
    {"negative-prompt,n", "TEXT", "", "what not to draw"},
    SAMPLER_FLAGS,
    {"seed,s,manual-seed", "N", "42", "-1: from the clock"},
    {"width,W", "N", NULL, "pixels [the model's own]"},
    {"height,H", "N", NULL, NULL},
    {"batch-count,b,num-images-per-prompt", "N", "1", "pictures, each with the next seed"},
    {"out,o,output", "FILE.png", NULL, "picture to write, also .ppm"},
    {"rng", "cpu|cuda", "cpu", "whose random numbers: torch's on CPU, or Philox as on CUDA"},
    {"unet", "FILE", NULL, "int8 UNet, of sdq quantize or sdq train --what qat"},
    {"precision", "fp32|int8|mixed|schedule", NULL,
     "with --unet: mixed if -k is given, the file's schedule, or int8"},
    {"k", "N", "3", "mixed: float evaluations at the beginning and at the end"},
    {"k-first", "N", NULL, NULL},
    {"k-last", "N", NULL, NULL},
    {"float-evals", "LIST", NULL, "float evaluations, such as 0,1,45-50 or -1 for the last"},
    {"vae", "fp32|int8", "fp32", "the decoder of the pictures"},
    {"vae-tiling", NULL, NULL, "decode in bands of rows: less memory, the same picture to the bit"},
    {"int8-only", NULL, NULL, "do not use the float UNet; float evaluations use int8 weights"},
    {"keep-loaded", NULL, NULL,
     "hold all networks in memory: saves seconds where there are many pictures"},
    {"save-latents", "FILE", NULL, "write `latents` (NCHW), as diffusers' output_type=\"latent\""},
    {"init-latents,latents", "FILE", NULL, "begin with `latents` of a file, diffusers' latents="},
};

/* "DPM++ 2M Karras", "DPMSolverMultistepScheduler", "euler-a", ..: letters and digits, + as p. */
static sdq_scheduler_kind scheduler_of(const char *name, int *karras) {
    static const struct { const char *words; sdq_scheduler_kind kind; } known[] = {
        {"pndm,pndmscheduler,plms", SDQ_PNDM}, {"ddim,ddimscheduler", SDQ_DDIM},
        {"euler,eulerdiscrete,eulerdiscretescheduler", SDQ_EULER},
        {"eulera,eulerancestral,eulerancestraldiscretescheduler", SDQ_EULER_A},
        {"dpmpp2m,dpmsolverpp,dpmsolvermultistep,dpmsolvermultistepscheduler", SDQ_DPMPP_2M},
        {"lcm,lcmscheduler", SDQ_LCM}};
    char plain[64];
    size_t i, n = 0;
    for (i = 0; name[i] && n + 1 < sizeof plain; i++) {
        if (name[i] == '+') plain[n++] = 'p';
        else if (isalnum((unsigned char)name[i]))
            plain[n++] = (char)tolower((unsigned char)name[i]);
    }
    if (n > 6 && !memcmp(plain + n - 6, "karras", 6)) { *karras = 1; n -= 6; }
    for (i = 0; i < COUNT(known); i++)
        if (name_in(known[i].words, plain, n)) return known[i].kind;
    return SDQ_SCHEDULER_COUNT;
}

/* In the library 0 stands for the default; this number works as 0. */
#define NO_GUIDANCE FLT_MIN

static sdq_status sampler_from_args(job *j, sdq_txt2img_desc *d) {
    const char *name = arg_text(&j->a, "scheduler");
    memset(d, 0, sizeof *d);
    TRY(arg_size(j, "steps", &d->steps));
    if (d->steps == 0) return bad_value(j, "steps", "0", "1 or more");
    TRY(arg_float(j, "guidance-scale", &d->guidance));
    if (d->guidance == 0.0f) d->guidance = NO_GUIDANCE;
    TRY(arg_seed(j, "seed", &d->seed));
    d->karras = arg_on(&j->a, "karras");
    if (!name) return SDQ_OK;
    d->scheduler = scheduler_of(name, &d->karras);
    if (d->scheduler == SDQ_SCHEDULER_COUNT)
        return bad_value(j, "scheduler", name, "pndm, ddim, euler, euler_a, dpm++2m or lcm");
    return SDQ_OK;
}

/* The evaluations of a run. */
static sdq_status evaluations(job *j, const sdq_pipeline *p, const sdq_txt2img_desc *d, size_t *n,
                              sdq_scheduler_kind *kind) {
    sdq_scheduler_desc desc;
    sdq_scheduler *s;
    TRY(sdq_pipeline_scheduler(j->ctx, p, d, &desc));
    TRY(sdq_scheduler_create(j->ctx, &desc, &s));
    *n = sdq_scheduler_count(s);
    if (kind) *kind = desc.kind;
    sdq_scheduler_free(j->ctx, s);
    return SDQ_OK;
}

/* "0,1,45-50,-1" to one byte per evaluation. */
static sdq_status float_list(job *j, const char *text, size_t n, unsigned char **out) {
    const char *s = text;
    *out = (unsigned char *)own(j, n + 1001);
    while (*s) {
        char *end;
        long a = strtol(s, &end, 10), b;
        int bad = end == s;
        if (a < 0) a += (long)n;
        b = a;
        if (*end == '-') {
            const char *t = end + 1;
            b = strtol(t, &end, 10);
            bad |= end == t;
        }
        if (bad || a < 0 || b < a || b >= (long)n || (*end && *end != ','))
            return bad_value(j, "float-evals", text, format_text(j, "evaluations 0..%zu", n - 1));
        for (; a <= b; a++) (*out)[a] = 1;
        s = end + (*end == ',');
    }
    return SDQ_OK;
}

static sdq_status precision_from_args(job *j, sdq_txt2img_desc *d) {
    static const char *const words[] = {"fp32,float,f32", "int8", "mixed", "schedule,policy"};
    const char *list = arg_text(&j->a, "float-evals");
    const int quantized = arg_text(&j->a, "unet") != NULL;
    const int stored = quantized && j->pipe->policy && j->pipe->policy->count;
    const args *a = &j->a;
    const int k = arg_given(a, "k") || arg_given(a, "k-first") || arg_given(a, "k-last");
    int p = !quantized ? 0 : k ? 2 : stored ? 3 : 1;
    unsigned char *is_float = NULL;
    size_t n;
    TRY(arg_choice(j, "precision", words, 4, &p));
    if (k && !quantized)
        return fail(j, "-k says which evaluations are float and which int8: name an int8 UNet with "
                    "--unet");
    TRY(arg_size(j, "k", &d->k_first));
    d->k_last = d->k_first;
    TRY(arg_size(j, "k-first", &d->k_first));
    TRY(arg_size(j, "k-last", &d->k_last));
    d->precision = p == 0 ? SDQ_PRECISION_FLOAT : p == 1 ? SDQ_PRECISION_INT8
                 : p == 2 ? SDQ_PRECISION_EDGES : SDQ_PRECISION_POLICY;
    if (!list) return SDQ_OK;
    TRY(evaluations(j, j->pipe, d, &n, NULL));
    TRY(float_list(j, list, n, &is_float));
    d->is_float = is_float;
    d->precision = SDQ_PRECISION_LIST;
    return SDQ_OK;
}

static sdq_status read_latents(job *j, sdq_txt2img_desc *d) {
    const char *path = arg_text(&j->a, "init-latents");
    const sdq_model_info vae = j->pipe->info[SDQ_PART_VAE];
    sdq_tensor *t = NULL;
    sdq_file *f;
    sdq_status st;
    if (!path) return SDQ_OK;
    TRY(sdq_file_open(j->ctx, path, &f));
    st = read_tensor(j, f, path, "init", "latents", 4, vae.latent, &t);
    sdq_file_close(j->ctx, f);
    TRY(st);
    if ((d->width && d->width != t->dim[2] * vae.factor)
        || (d->height && d->height != t->dim[1] * vae.factor))
        return fail(j, "%s: latents of a picture %zu wide and %zu high, not as --width and "
                    "--height say; leave these out", path, t->dim[2] * vae.factor, t->dim[1] * vae.factor);
    d->init_latents = sdq_f32(t);
    d->count = t->dim[0];
    d->width = t->dim[2] * vae.factor;
    d->height = t->dim[1] * vae.factor;
    return SDQ_OK;
}

static const char *scheduler_title(sdq_scheduler_kind k) {
    return k == SDQ_DDIM ? "DDIM" : k == SDQ_EULER ? "Euler" : k == SDQ_EULER_A ? "Euler a"
         : k == SDQ_DPMPP_2M ? "DPM++ 2M" : k == SDQ_LCM ? "LCM" : "PNDM";
}

/* The PNG text that AUTOMATIC1111 and others read. */
static const char *parameters_text(job *j, const sdq_txt2img_desc *d, const sdq_image *im,
                                   size_t floats, size_t evals, const sdq_scheduler_desc *sd) {
    const char *model = arg_text(&j->a, "model"), *base = strrchr(model, '/');
    return format_text(
        j,
        "%s\nNegative prompt: %s\n"
        "Steps: %zu, Sampler: %s%s, CFG scale: %g, Seed: %llu, "
        "Size: %zux%zu, Model: %s, RNG: %s, Float evaluations: %zu of %zu, Version: sdq %d.%d.%d",
        d->prompt, d->negative, d->steps, scheduler_title(sd->kind), sd->karras ? " Karras" : "",
        d->guidance == NO_GUIDANCE ? 0.0 : (double)d->guidance, (unsigned long long)d->seed, im->w,
        im->h,
        base && base[1] ? base + 1 : model, d->rng == SDQ_RNG_TORCH ? "CPU" : "GPU", floats, evals,
        SDQ_VERSION_MAJOR, SDQ_VERSION_MINOR, SDQ_VERSION_PATCH);
}

/* out.png, out_1.png, ..: the name of picture i. */
static const char *picture_name(job *j, const char *out, size_t i) {
    const char *dot = strrchr(out, '.');
    if (i == 0) return out;
    if (!dot || strchr(dot, '/')) dot = out + strlen(out);
    return format_text(j, "%.*s_%zu%s", (int)(dot - out), out, i, dot);
}

/* Say how much memory it will take, before it is taken: what the process has without networks, and
 * what it will grow by. */
static sdq_status announce(job *j, const char *model, const sdq_pipeline_desc *pipeline,
                           const sdq_txt2img_desc *d) {
    const double start = peak_megabytes();
    sdq_pipeline_desc p = *pipeline;
    size_t bytes;
    TRY(complete_desc(j, &p));
    TRY(sdq_txt2img_memory(j->ctx, model, &p, d, &bytes));
    note(j, "memory needed: %.0f MB", (double)bytes / 1e6 + start);
    return SDQ_OK;
}

/* The pipeline again, now with its networks. */
static sdq_status reload(job *j, const char *model, const sdq_pipeline_desc *pipeline) {
    sdq_pipeline_desc p = *pipeline;
    TRY(complete_desc(j, &p));
    sdq_pipeline_free(j->ctx, j->pipe);
    j->pipe = NULL;
    return sdq_pipeline_load(j->ctx, model, &p, &j->pipe);
}

/* What a drawing writes: pictures, latents or both. */
typedef struct output {
    const char *picture, *latents;
    size_t runs, pictures;      /* drawings in all; pictures written so far */
    sdq_tensor all;             /* latents of all drawings, and how many numbers there are so far */
    size_t kept;
} output;

static void keep_latents(job *j, output *o, const sdq_tensor *x) {
    const size_t size = sdq_tensor_count(x);
    if (!o->all.data) {
        o->all = *x;
        o->all.dim[0] *= o->runs;
        o->all.data = own(j, o->runs * size * sizeof(float));
    }
    memcpy(sdq_f32(&o->all) + o->kept, x->data, size * sizeof(float));
    o->kept += size;
}

static sdq_status save_latents(job *j, const output *o) {
    sdq_entry e;
    TRY(set_entry(j, &e, "latents", &o->all, 0, o->all.dim[3]));
    return sdq_file_write(j->ctx, o->latents, &e, 1, NULL, 0);
}

static sdq_status write_pictures(job *j, const sdq_txt2img_desc *d, output *o, sdq_tensor *x,
                                 const sdq_scheduler_desc *sd, size_t floats, size_t evals) {
    const size_t count = x->dim[0];
    sdq_image *im = (sdq_image *)own(j, count * sizeof *im);
    sdq_status st = sdq_decode_latents(j->ctx, j->pipe, x, im);
    sdq_pair text;
    size_t i;
    text.key = "parameters";
    for (i = 0; i < count && st == SDQ_OK; i++) {
        text.value = parameters_text(j, d, &im[i], floats, evals, sd);
        st = sdq_image_write(j->ctx, picture_name(j, o->picture, o->pictures++), &im[i], &text, 1);
    }
    for (i = 0; i < count; i++) sdq_image_free(j->ctx, &im[i]);
    return st;
}

static sdq_status draw(job *j, const sdq_txt2img_desc *d, output *o) {
    const sdq_mark mark = sdq_arena_mark(j->ctx);
    const char *notice = "", *name = o->latents;
    size_t floats = 0, evals;
    sdq_scheduler_desc sd;
    sdq_tensor *x;
    double t;
    TRY(sdq_pipeline_scheduler(j->ctx, j->pipe, d, &sd));
    TRY(evaluations(j, j->pipe, d, &evals, NULL));
    progress_begin(j);
    t = now();
    x = sdq_txt2img_latents(j->ctx, j->pipe, d, &floats, &notice);
    if (!x) return sdq_last_error(j->ctx);
    t = now() - t;
    if (*notice) note(j, "%s", notice);
    if (o->latents) keep_latents(j, o, x);
    if (o->picture) {
        TRY(write_pictures(j, d, o, x, &sd, floats, evals));
        name = picture_name(j, o->picture, o->pictures - 1);
    }
    printf(
        "seed %llu  %s, %zu evaluations, %zu float  %.3g s/it  %.3g s  peak memory %.0f MB  %s\n",
        (unsigned long long)d->seed, scheduler_title(sd.kind), evals, floats, t / (double)evals, t,
        peak_megabytes(), name);
    fflush(stdout);
    sdq_arena_release(j->ctx, mark);
    return SDQ_OK;
}

static sdq_status check_length(job *j, const char *prompt) {
    const size_t most = sdq_tokenizer_length(j->pipe->tokenizer);
    size_t n = 0;
    TRY(sdq_tokenizer_encode(j->ctx, j->pipe->tokenizer, prompt, NULL, 0, &n));
    if (n > most)
        note(j, "the prompt has %zu tokens, %zu are read: its end is lost", n - 2, most - 2);
    return SDQ_OK;
}

/* The texts go into the picture's file: try that on a picture of one pixel. */
static sdq_status check_text(job *j, const char *name, const char *value) {
    unsigned char px[1] = {0}, *png;
    sdq_image one;
    sdq_pair text;
    size_t bytes;
    one.w = one.h = one.c = 1;
    one.px = px;
    text.key = "parameters";
    text.value = value;
    if (sdq_image_png_encode(j->ctx, &one, &text, 1, &png, &bytes) != SDQ_OK) {
        sdq_clear_error(j->ctx);
        return bad_value(j, name, value, "text in UTF-8");
    }
    sdq_bytes_free(j->ctx, png);
    return SDQ_OK;
}

static sdq_status output_from_args(job *j, output *o) {
    static const char *const endings[] = {".png", ".PNG", ".ppm", ".pgm"};
    const char *dot;
    memset(o, 0, sizeof *o);
    o->picture = arg_text(&j->a, "out");
    o->latents = arg_text(&j->a, "save-latents");
    if (!o->picture && !o->latents) o->picture = "out.png";
    TRY(arg_size(j, "batch-count", &o->runs));
    if (o->runs == 0) return bad_value(j, "batch-count", "0", "1 or more");
    if (o->latents) TRY(check_output(j, o->latents));
    if (!o->picture) return SDQ_OK;
    dot = strrchr(o->picture, '.');
    if (dot && !strchr(dot, '/') && index_of(endings, COUNT(endings), dot) < 0)
        return bad_value(j, "out", o->picture, "a name ending in .png, .ppm or .pgm");
    return check_output(j, o->picture);
}

static sdq_status cmd_txt2img(job *j) {
    static const char *const rngs[] = {"cpu,torch,std-default", "cuda,philox,gpu"};
    static const char *const vaes[] = {"fp32,float", "int8"};
    const char *model;
    sdq_pipeline_desc pd;
    sdq_txt2img_desc d;
    output o;
    size_t i;
    int rng = 0;
    memset(&pd, 0, sizeof pd);
    TRY(need(j, "model", &model));
    TRY(sampler_from_args(j, &d));
    TRY(arg_size(j, "width", &d.width));
    TRY(arg_size(j, "height", &d.height));
    TRY(arg_choice(j, "rng", rngs, 2, &rng));
    d.rng = (sdq_rng_kind)rng;
    TRY(need(j, "prompt", &d.prompt));
    d.negative = arg_text(&j->a, "negative-prompt");
    TRY(check_text(j, "prompt", d.prompt));
    TRY(check_text(j, "negative-prompt", d.negative));
    TRY(check_text(j, "model", model));
    TRY(output_from_args(j, &o));
    pd.unet_int8 = arg_text(&j->a, "unet");
    pd.int8_only = arg_on(&j->a, "int8-only");
    pd.vae_tiling = arg_on(&j->a, "vae-tiling");
    pd.on_demand = 1;
    TRY(arg_choice(j, "vae", vaes, 2, &pd.vae_int8));
    TRY(load_pipeline(j, model, &pd, &j->pipe));
    TRY(check_length(j, d.prompt));
    TRY(precision_from_args(j, &d));
    TRY(read_latents(j, &d));
    pd.on_demand = !arg_on(&j->a, "keep-loaded");
    TRY(announce(j, model, &pd, &d));
    if (!pd.on_demand) TRY(reload(j, model, &pd));
    d.progress = progress;
    d.user = j;
    for (i = 0; i < o.runs; i++, d.seed++) TRY(draw(j, &d, &o));
    return o.latents ? save_latents(j, &o) : SDQ_OK;
}

/* ===========================================================================
 * schedule: which evaluations must be float
 * ======================================================================== */

static const flag schedule_flags[] = {
    {"model,m", "FOLDER|FILE", NULL, "the pipeline: a diffusers folder or a single file"},
    {"unet", "FILE", NULL, "int8 UNet; the schedule is stored in it"},
    {"prompts", "FILE", NULL, "training prompts, one a line"},
    {"data", "FOLDER", NULL, "or captions of a folder"},
    {"count", "N", "16", "prompts to take"},
    SAMPLER_FLAGS,
    {"target-psnr", "dB", "52", "median against the float pictures; 0: as many as --max-float"},
    {"max-float", "N", "0", "at most so many float evaluations; 0: no limit"},
    {"dry-run", NULL, NULL, "print the table, leave the file as it is"},
    {"seed,s", "N", "1", NULL},
};

static void print_schedule(const sdq_policy *p, const double *errors) {
    size_t i, n = 0;
    printf("evaluation  timestep  error (MSE)  precision\n");
    for (i = 0; i < p->count; i++) {
        printf("%10zu  %8g  %11.3e  %s\n", i, (double)p->timestep[i], errors[i],
               p->is_float[i] ? "fp32" : "int8");
        n += p->is_float[i] != 0;
    }
    printf("%zu of %zu evaluations in float\n", n, p->count);
}

/* Write the int8 network again, with a schedule and the recipe it had. The new file is read back
 * before it takes the place of the old one. */
static sdq_status store_schedule(job *j, const char *path, const sdq_policy *policy) {
    const char *recipe, *fresh = format_text(j, "%s.new", path);
    sdq_model *check = NULL;
    sdq_status st;
    sdq_file *f;
    TRY(sdq_file_open(j->ctx, path, &f));
    recipe = sdq_file_meta(f, "sdq.recipe");
    if (recipe) recipe = format_text(j, "%s", recipe);
    sdq_file_close(j->ctx, f);
    st = sdq_model_save_int8(j->ctx, j->pipe->unet_int8, fresh, policy, recipe);
    if (st == SDQ_OK) st = sdq_model_load_int8(j->ctx, j->pipe->folder, fresh, &check, NULL);
    sdq_model_free(j->ctx, check);
    if (st == SDQ_OK && rename(fresh, path) != 0) st = fail(j, "%s: %s", path, strerror(errno));
    if (st == SDQ_OK) note(j, "stored in %s", path);
    else (void)remove(fresh);
    return st;
}

static sdq_status cmd_schedule(job *j) {
    const char *model;
    const char *const *prompts = NULL;
    double target = 0.0, reached = 0.0, *errors = (double *)own(j, 1001 * sizeof *errors);
    sdq_policy *policy = (sdq_policy *)own(j, sizeof *policy);
    size_t count = 0, n = 0, max = 0;
    sdq_pipeline_desc pd;
    sdq_txt2img_desc d;
    memset(&pd, 0, sizeof pd);
    TRY(need(j, "model", &model));
    TRY(need(j, "unet", &pd.unet_int8));
    TRY(sampler_from_args(j, &d));
    TRY(arg_size(j, "count", &count));
    TRY(arg_size(j, "max-float", &max));
    TRY(arg_real(j, "target-psnr", &target));
    TRY(load_prompts(j, count, &prompts, &n));
    TRY(load_pipeline(j, model, &pd, &j->pipe));
    d.progress = progress;
    d.user = j;
    progress_begin(j);
    TRY(sdq_schedule_search(j->ctx, j->pipe, prompts, n, &d, target, max, policy, errors,
                            &reached));
    print_schedule(policy, errors);
    printf("median PSNR of %zu training prompts against float: %.2f dB\n", n, reached);
    return arg_on(&j->a, "dry-run") ? SDQ_OK : store_schedule(j, pd.unet_int8, policy);
}

/* ===========================================================================
 * info
 * ======================================================================== */

static const flag info_flags[] = {
    {"tensors", NULL, NULL, "list every array of a file, every layer of a folder"},
    {"compare", NULL, NULL, "two files A B: |a - b| / |b| of every array of A"},
    {"prefix", "TEXT", "", "compare: array x of A is called TEXTx in B"},
    {"limit", "X", "0", "compare: an error above it is a failure"},
};

static const char *prediction_word(sdq_prediction p) {
    return p == SDQ_PREDICT_V ? "velocity" : p == SDQ_PREDICT_SAMPLE ? "the sample" : "noise";
}

/* What the file is, and which networks are in it. */
static void info_kind(const sdq_file *f) {
    static const char *const part[SDQ_PART_COUNT] = {"", "text encoder", "UNet", "VAE"};
    const sdq_file_info info = sdq_file_describe(f);
    const char *before = "  holds: ";
    int i;
    printf("  %s, mostly %s\n", info.title,
           info.dtype == SDQ_DTYPE_COUNT ? "of a type that sdq cannot read"
                                         : sdq_dtype_name(info.dtype));
    for (i = SDQ_PART_NONE + 1; i < SDQ_PART_COUNT; i++) {
        if (!info.part[i]) continue;
        printf("%s%s", before, part[i]);
        before = ", ";
    }
    if (*before == ',') puts("");
    if (*info.because)
        printf("  predicts: %s (%s)\n", prediction_word(info.prediction), info.because);
}

static sdq_status info_file(job *j, const char *path, int all) {
    static const char *const keys[] = {"sdq.recipe", "sdq.schedule", "sdq.source",
                                        "sdq.hash", "format", "step"};
    size_t i, k, count[SDQ_DTYPE_COUNT + 1] = {0}, bytes[SDQ_DTYPE_COUNT + 1] = {0};
    sdq_file *f;
    TRY(sdq_file_open(j->ctx, path, &f));
    for (i = 0; i < sdq_file_count(f); i++) {
        const sdq_entry *e = sdq_file_entry(f, i);
        count[e->dtype]++;
        bytes[e->dtype] += e->bytes;
        if (!all) continue;
        printf("%-64s %-4s [", e->name, sdq_dtype_name(e->dtype));
        for (k = 0; k < (size_t)e->rank; k++) printf("%s%zu", k ? "," : "", e->dim[k]);
        puts("]");
    }
    printf("%s: %.2f MB, %zu arrays\n", path, (double)file_bytes(path) / 1e6, sdq_file_count(f));
    info_kind(f);
    for (i = 0; i <= SDQ_DTYPE_COUNT; i++)
        if (count[i])
            printf("  %-4s %6zu arrays %10.3f MB\n", sdq_dtype_name((sdq_dtype)i), count[i],
                   (double)bytes[i] / 1e6);
    for (i = 0; i < COUNT(keys); i++)
        if (sdq_file_meta(f, keys[i])) printf("  %s: %s\n", keys[i], sdq_file_meta(f, keys[i]));
    sdq_file_close(j->ctx, f);
    return SDQ_OK;
}

static sdq_status read_floats(job *j, const sdq_entry *e, double **out) {
    const size_t n = sdq_entry_count(e);
    float *f = (float *)own(j, n * sizeof *f);
    size_t i;
    TRY(sdq_entry_to_f32(j->ctx, e, f));
    *out = (double *)own(j, n * sizeof **out);
    for (i = 0; i < n; i++) (*out)[i] = (double)f[i];
    return SDQ_OK;
}

/* Euclidean norms. Arrays much smaller than the largest are measured against 1e-4 of that one, so
 * that gradients which are zero but for rounding do not count. */
static sdq_status compare_files(job *j, const sdq_file *fa, const sdq_file *fb) {
    const size_t n = sdq_file_count(fa);
    double *diff = (double *)own(j, n * sizeof *diff), *norm = (double *)own(j, n * sizeof *norm);
    double *a = NULL, *b = NULL, largest = 0.0, worst = 0.0, limit = 0.0;
    size_t i, k;
    TRY(arg_real(j, "limit", &limit));
    for (i = 0; i < n; i++) {
        const sdq_entry *ea = sdq_file_entry(fa, i);
        const sdq_entry *eb =
            sdq_file_find(fb, format_text(j, "%s%s", arg_text(&j->a, "prefix"), ea->name));
        if (!eb)
            return fail(j, "%s: has no array %s%s", j->a.word[1], arg_text(&j->a, "prefix"),
                        ea->name);
        if (ea->rank != eb->rank || memcmp(ea->dim, eb->dim, sizeof ea->dim) != 0)
            return fail(j, "%s: the shapes of both files differ", ea->name);
        TRY(read_floats(j, ea, &a));
        TRY(read_floats(j, eb, &b));
        for (k = 0; k < sdq_entry_count(ea); k++) {
            diff[i] += (a[k] - b[k]) * (a[k] - b[k]);
            norm[i] += b[k] * b[k];
        }
        largest = fmax(largest, sqrt(norm[i]));
    }
    for (i = 0; i < n; i++) {
        const double base = fmax(sqrt(norm[i]), 1e-4 * largest),
                     error = base > 0.0 ? sqrt(diff[i]) / base : sqrt(diff[i]);
        if (n <= 16) printf("%-40s %.3e\n", sdq_file_entry(fa, i)->name, error);
        if (!(error <= worst)) worst = error;       /* not-a-number counts */
    }
    printf("%zu arrays, largest relative error %.3e\n", n, worst);
    return limit > 0.0 && !(worst <= limit)
               ? fail(j, "%s: the error is above %g", j->a.word[0], limit)
               : SDQ_OK;
}

static sdq_status info_compare(job *j) {
    sdq_file *fa, *fb;
    sdq_status st;
    j->usage = j->a.words != 2;
    if (j->usage) return fail(j, "info: --compare wants two files");
    TRY(sdq_file_open(j->ctx, j->a.word[0], &fa));
    st = sdq_file_open(j->ctx, j->a.word[1], &fb);
    if (st == SDQ_OK) {
        st = compare_files(j, fa, fb);
        sdq_file_close(j->ctx, fb);
    }
    sdq_file_close(j->ctx, fa);
    return st;
}

static void info_part(const sdq_model *m, int all) {
    const sdq_model_info i = sdq_model_get_info(m);
    const char *name;
    size_t k;
    printf("%-13s %10.3f M weights, %zu layers", sdq_part_name(i.part), (double)i.weights / 1e6,
           sdq_model_layer_count(m));
    if (i.part == SDQ_PART_TEXT)
        printf(", %zu ids, %zu positions, %zu wide\n", i.vocab, i.tokens, i.context);
    if (i.part == SDQ_PART_VAE)
        printf(", %zu channels, %zu x smaller, scaling %g\n", i.latent, i.factor,
               (double)i.scaling_factor);
    if (i.part == SDQ_PART_UNET)
        printf(", %zu -> %zu channels, text of %zu, %zu high, %zu wide\n", i.in, i.out, i.context,
               i.sample_size, i.sample_width);
    for (k = 0; all && k < sdq_model_layer_count(m); k++)
        if (sdq_model_layer(m, k, &name)) printf("  %s\n", name);
}

static sdq_status info_folder(job *j, const char *path, int all) {
    sdq_scheduler_desc desc;
    TRY(load_pipeline(j, path, NULL, &j->pipe));
    info_part(j->pipe->text, all);
    info_part(j->pipe->unet, all);
    info_part(j->pipe->vae, all);
    printf("tokenizer     %zu entries, %zu ids per prompt\n",
           sdq_tokenizer_vocab(j->pipe->tokenizer), sdq_tokenizer_length(j->pipe->tokenizer));
    TRY(sdq_pipeline_scheduler(j->ctx, j->pipe, NULL, &desc));
    printf("scheduler     %s, predicts %s\n", scheduler_title(desc.kind),
           prediction_word(desc.prediction));
    return SDQ_OK;
}

static sdq_status cmd_info(job *j) {
    const int all = arg_on(&j->a, "tensors");
    struct stat s;
    size_t i;
    if (arg_on(&j->a, "compare")) return info_compare(j);
    if (j->a.words == 0) {
        printf("sdq %d.%d.%d on %s, %d threads\n", SDQ_VERSION_MAJOR, SDQ_VERSION_MINOR,
               SDQ_VERSION_PATCH, sdq_tier_name(sdq_ctx_tier(j->ctx)), sdq_ctx_threads(j->ctx));
        for (i = SDQ_TIER_SCALAR; i < SDQ_TIER_COUNT; i++)
            printf("  %-12s %s\n", sdq_tier_name((sdq_tier)i),
                   sdq_tier_available((sdq_tier)i) ? "yes" : "no");
    }
    for (i = 0; i < j->a.words; i++) {
        if (stat(j->a.word[i], &s) != 0) return fail(j, "%s: %s", j->a.word[i], strerror(errno));
        if (j->pipe) { sdq_pipeline_free(j->ctx, j->pipe); j->pipe = NULL; }
        TRY(S_ISDIR(s.st_mode) ? info_folder(j, j->a.word[i], all)
                               : info_file(j, j->a.word[i], all));
    }
    return SDQ_OK;
}

static int run_command(int argc, char **argv);
#include "sdq_bench.h"
#include "sdq_eval.h"
#include "sdq_study.h"

/* ===========================================================================
 * main
 * ======================================================================== */

typedef struct command {
    const char *name, *words, *about;
    sdq_status (*run)(job *j);
    const flag *flags;
    size_t count;
    int recipe;
} command;

#define COMMAND(name, words, about, recipe)                                                        \
    { #name, words, about, cmd_##name, name##_flags, COUNT(name##_flags), recipe }
static const command commands[] = {
    COMMAND(txt2img, "", "draw pictures of a prompt", 0),
    COMMAND(train, "", "train an autoencoder, a text-to-image model, or a quantized one", 1),
    COMMAND(calibrate, "", "print the input range of every layer", 1),
    COMMAND(quantize, "", "calibrate a UNet and write it as int8", 1),
    COMMAND(schedule, "", "search the evaluations that must be float", 0),
    COMMAND(eval, "", "measure variants against float: table, pictures, report", 0),
    COMMAND(study, "", "what each part of quantizing and training is worth: a table", 0),
    COMMAND(forward, "MODEL ", "run one bare network, from safetensors to safetensors", 1),
    COMMAND(info, "[FILE|FOLDER ..] ", "what a file, a model, this machine is; compare two files",
            0),
    COMMAND(selftest, "", "compare the results of all instruction sets, some seconds", 0),
    COMMAND(bench, "", "speed of products and of a UNet, float and int8", 1),
};

static void help_flag(const flag *f) {
    const char *name = f->names;
    char left[160] = "";
    int k = 0;
    for (; *name && k < 2; k++) {
        const size_t n = strcspn(name, ",");
        (void)snprintf(left + strlen(left), sizeof left - strlen(left), "%s%s%.*s",
                       *left ? ", " : "", n == 1 ? "-" : "--", (int)n, name);
        name += n + (name[n] == ',');
    }
    if (f->arg) (void)snprintf(left + strlen(left), sizeof left - strlen(left), " %s", f->arg);
    printf("  %-37s %s%s%s%s\n", left, f->help, f->fallback && *f->fallback ? " [" : "",
           f->fallback ? f->fallback : "", f->fallback && *f->fallback ? "]" : "");
}

/* Flags without an explanation of their own: names and values, filled into lines. */
static void help_rest(const args *a) {
    size_t i, at = 0;
    for (i = 0; i < a->count; i++) {
        const flag *f = a->flags[i];
        char item[128];
        const size_t n = strcspn(f->names, ",");
        if (f->help) continue;
        (void)snprintf(item, sizeof item, "--%.*s%s%s", (int)n, f->names, f->arg ? " " : "",
                       f->arg ? f->arg : "");
        if (at + strlen(item) > 94) { putchar('\n'); at = 0; }
        at += (size_t)printf("%s%s", at ? ", " : "  ", item);
    }
    putchar('\n');
}

static void help_command(const command *c, const args *a) {
    size_t i;
    printf("sdq %s %s[flags]: %s\n", c->name, c->words, c->about);
    for (i = 0; i < a->count; i++)
        if (a->flags[i]->help) help_flag(a->flags[i]);
    help_rest(a);
}

static void help_all(void) {
    size_t i;
    puts("sdq: quantize, train and run Stable Diffusion on CPUs\n\nusage: sdq COMMAND [flags]\n");
    for (i = 0; i < COUNT(commands); i++)
        printf("  %-11s %s\n", commands[i].name, commands[i].about);
    puts("\nsdq COMMAND --help lists the flags of a command. A model is a folder in "
         "diffusers' layout or a\nsingle file (.safetensors) of Stable Diffusion 1 or 2.");
}

static void job_free(job *j) {
    size_t i;
    if (j->ctx) {
        sdq_optim_free(j->ctx, j->optim);
        sdq_states_free(j->ctx, j->held_states);
        sdq_states_free(j->ctx, j->states);
        sdq_samples_free(j->ctx, j->held_samples);
        sdq_samples_free(j->ctx, j->samples);
        sdq_dataset_free(j->ctx, j->data);
        sdq_tokenizer_free(j->ctx, j->tokenizer);
        if (j->scheduler) sdq_scheduler_free(j->ctx, j->scheduler);
        sdq_model_free(j->ctx, j->vae);
        sdq_model_free(j->ctx, j->text);
        sdq_model_free(j->ctx, j->unet);
        sdq_pipeline_free(j->ctx, j->pipe);
        sdq_ctx_free(j->ctx);
    }
    for (i = 0; i < j->owns; i++) free(j->owned[i]);
    free(j->owned);
    free(j);
}

static sdq_status job_context(job *j) {
    static const char *const tiers[] = {"auto", "scalar", "avx2", "avx512", "avx512vnni"};
    sdq_ctx_desc desc;
    size_t threads = 0;
    int tier = 0;
    memset(&desc, 0, sizeof desc);
    TRY(arg_size(j, "threads", &threads));
    if (threads > 1024) return bad_value(j, "threads", arg_text(&j->a, "threads"), "0..1024");
    TRY(arg_choice(j, "tier", tiers, COUNT(tiers), &tier));
    desc.tier = (sdq_tier)tier;
    desc.threads = (int)threads;
    j->quiet = arg_on(&j->a, "quiet");
    j->terminal = isatty(2);
    if (desc.tier != SDQ_TIER_AUTO && !sdq_tier_available(desc.tier))
        return fail(j, "this processor has no %s", tiers[tier]);
    TRY(sdq_ctx_create(&desc, &j->ctx));
    if (arg_on(&j->a, "verbose"))
        note(j, "sdq %d.%d.%d, %s, %d thread(s)", SDQ_VERSION_MAJOR, SDQ_VERSION_MINOR,
             SDQ_VERSION_PATCH, sdq_tier_name(sdq_ctx_tier(j->ctx)), sdq_ctx_threads(j->ctx));
    return SDQ_OK;
}

static int run(const command *c, int argc, char **argv) {
    job *j = (job *)calloc(1, sizeof *j);
    sdq_status st;
    int code;
    if (!j) return usage_error("out of memory");
    j->command = c->name;
    flags_add(&j->a, c->flags, c->count);
    if (c->recipe) flags_add(&j->a, recipe_flags, COUNT(recipe_flags));
    flags_add(&j->a, common_flags, COUNT(common_flags));
    code = args_parse(&j->a, c->name, argc, argv);
    if (code || arg_on(&j->a, "help")) {
        if (!code) help_command(c, &j->a);
        free(j);
        return code;
    }
    if (j->a.words && !*c->words) {
        code = usage_error("%s: %s is no flag (a text with spaces needs quotes; see sdq %s --help)",
                           c->name, j->a.word[0], c->name);
        free(j);
        return code;
    }
    st = job_context(j);
    if (st == SDQ_OK) st = c->run(j);
    if (st != SDQ_OK && !j->said)
        fprintf(stderr, "%ssdq: %s\n", j->terminal && j->stage ? "\n" : "",
                j->ctx && *sdq_error_text(j->ctx) ? sdq_error_text(j->ctx) : sdq_status_name(st));
    code = j->usage ? 2 : st != SDQ_OK;
    job_free(j);
    return code;
}

/* argv[0] is the command. */
static int run_command(int argc, char **argv) {
    size_t i;
    for (i = 0; i < COUNT(commands); i++)
        if (!strcmp(argv[0], commands[i].name)) return run(&commands[i], argc - 1, argv + 1);
    return usage_error("unknown command %s (see sdq --help)", argv[0]);
}

int main(int argc, char **argv) {
    struct sigaction action;
    int code;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    (void)sigaction(SIGINT, &action, NULL);
    (void)sigaction(SIGTERM, &action, NULL);
    if (argc < 2) { help_all(); return 2; }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        help_all();
        return 0;
    }
    if (!strcmp(argv[1], "--version")) {
        printf("sdq %d.%d.%d\n", SDQ_VERSION_MAJOR, SDQ_VERSION_MINOR, SDQ_VERSION_PATCH);
        return 0;
    }
    code = run_command(argc - 1, argv + 1);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "sdq: what was printed could not be written: %s\n", strerror(errno));
        return code ? code : 1;
    }
    return code;
}
