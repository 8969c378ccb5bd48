/* fuzz.c - damaged files: whatever they hold, reading ends with success or a status, never with a
 * wrong read, an endless loop or a leak. `make fuzz` builds it with sanitizers and runs it.
 *
 *   fuzz [SECONDS [SEED [FIRST]]]
 *
 * Case i is made from SEED + i alone by damaging a valid file: kind i % KINDS. The seed and case
 * being tried are in build/tests/fuzz/case; `fuzz 0 SEED I` tries that one case again. */
#define _DEFAULT_SOURCE
#define SDQ_IMPLEMENTATION
#include "sdq.h"

#include <sys/stat.h>
#include <time.h>

#define DIR "build/tests/fuzz"
#define MODEL "tests/golden/models/sd1-a"
#define ROOM ((size_t)1 << 20)          /* bytes of the largest damaged file */
#define HEAP ((size_t)96 << 20)         /* more than any of the valid files needs */

enum { PNG, SCANLINES, PPM, TENSORS, UNET, VAE, TEXT, SCHEDULER, VOCAB, MERGES, INT8, LIST, KINDS };
static const char *const kind_name[KINDS] = {
    "png", "scanlines", "ppm", "safetensors", "unet json", "vae json", "text json",
    "scheduler json", "vocabulary", "merges", "int8", "metadata"};

typedef struct bytes { unsigned char *p; size_t n; } bytes;
static bytes source[KINDS];
static unsigned char work[ROOM];
static uint64_t state;

static uint32_t rnd(void) {             /* splitmix64 (Steele, Lea, Flood 2014) */
    uint64_t z = (state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}
static size_t below(size_t n) { return rnd() % n; }

static void need(int ok, const char *what) {
    if (ok) return;
    printf("fuzz: FAILED: %s; see " DIR "/case\n", what);
    exit(2);
}

/* An allocator with a limit, so that a damaged size is an error and not a swapping machine. */
static size_t heap_live;
static void *heap_alloc(void *user, size_t n) {
    size_t *p = NULL;
    (void)user;
    if (n <= HEAP - heap_live) p = (size_t *)malloc(n + 16);
    if (!p) return NULL;
    *p = n;
    heap_live += n;
    return (unsigned char *)p + 16;
}
static void heap_free(void *user, void *p) {
    size_t *q = (size_t *)(void *)((unsigned char *)p - 16);
    (void)user;
    heap_live -= *q;
    free(q);
}
static sdq_ctx *new_ctx(void) {
    sdq_ctx_desc d;
    sdq_ctx *ctx;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    d.alloc = heap_alloc;
    d.release = heap_free;
    need(sdq_ctx_create(&d, &ctx) == SDQ_OK, "no context");
    return ctx;
}

static bytes file_bytes(const char *path) {
    FILE *f = fopen(path, "rb");
    bytes b;
    need(f != NULL, path);
    b.p = (unsigned char *)malloc(ROOM);
    need(b.p != NULL, "memory");
    b.n = fread(b.p, 1, ROOM / 2, f);
    fclose(f);
    return b;
}
static void put_file(const char *path, const void *p, size_t n) {
    FILE *f = fopen(path, "wb");
    need(f && fwrite(p, 1, n, f) == n && fclose(f) == 0, path);
}
static void copy_file(const char *name) {
    char from[256], to[256];
    bytes b;
    (void)snprintf(from, sizeof from, MODEL "/%s", name);
    (void)snprintf(to, sizeof to, DIR "/%s", name);
    b = file_bytes(from);
    put_file(to, b.p, b.n);
    free(b.p);
}

/* ---- damage ---- */

static size_t damage_once(unsigned char *p, size_t n, size_t reach) {
    static const char *const word[] = {"-1", "0", "1e99", "4294967295", "18446744073709551615",
        "\"", "{", "[", "]", "}", ",", "null", "true", "NaN", "\\u0000", "\\ud800", "../", "\xff",
        "\xc0\x80", "1", "2", "33", "8.5", "\n", "[[[[[[[[", "{\"a\":", "99999"};
    const size_t at = below(n < reach ? n : reach);
    size_t m, i;
    switch (below(12)) {
    case 0: p[at] = (unsigned char)(p[at] ^ 1u << below(8)); return n;
    case 1: p[at] = (unsigned char)rnd(); return n;
    case 2: p[at] = (unsigned char)(rnd() % 2 ? 0 : 255); return n;
    case 3: return at + 1;                                              /* cut */
    case 4:                                                             /* take out */
        m = 1 + below(n - at < 40 ? n - at : 40);
        if (m >= n) return n;
        memmove(p + at, p + at + m, n - at - m);
        return n - m;
    case 5:                                                             /* double */
        m = 1 + below(n - at < 200 ? n - at : 200);
        if (n + m > ROOM) return n;
        memmove(p + at + m, p + at, n - at);
        return n + m;
    case 6:                                                             /* overwrite with a word */
    case 7: {                                                           /* a number becomes another */
        const char *w = word[below(sizeof word / sizeof *word)];
        size_t from = at, to;
        m = strlen(w);
        if (rnd() % 2) while (from < n && (p[from] < '0' || p[from] > '9')) from++;
        for (to = from; to < n && p[to] >= '0' && p[to] <= '9'; to++) { }
        if (from >= n || n + m > ROOM) return n;
        memmove(p + from + m, p + to, n - to);
        memcpy(p + from, w, m);
        return n - (to - from) + m;
    }
    case 8:
    case 9:
    case 10:                                                            /* a digit becomes another */
        for (i = at; i < n && (p[i] < '0' || p[i] > '9'); i++) { }
        if (i < n) p[i] = (unsigned char)('0' + below(10));
        return n;
    default:                                                            /* copy a piece over another */
        m = 1 + below(16);
        for (i = 0; i < m && at + i < n; i++) p[at + i] = p[below(n)];
        return n;
    }
}

static size_t damage(const bytes *b, size_t reach) {
    size_t n = b->n, k = 1 + below(rnd() % 4 ? 2 : 8);
    memcpy(work, b->p, n);
    while (k-- && n > 1) n = damage_once(work, n, reach);
    return n;
}

/* ---- pictures ---- */

static uint32_t crc_of(const unsigned char *p, size_t n) {
    uint32_t c = 0xffffffffu;
    int k;
    while (n--) for (c ^= *p++, k = 0; k < 8; k++) c = c & 1u ? c >> 1 ^ 0xedb88320u : c >> 1;
    return ~c;
}
static size_t big(const unsigned char *p) {
    return (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
}
static void put_big(unsigned char *p, size_t v) {
    int i;
    for (i = 0; i < 4; i++) p[i] = (unsigned char)(v >> (24 - 8 * i));
}
/* Damage must get past the checksums of the chunks. */
static void png_seal(unsigned char *p, size_t n) {
    size_t at = 8;
    while (at + 12 <= n && big(p + at) <= n - at - 12) {
        const size_t len = big(p + at);
        put_big(p + at + 8 + len, crc_of(p + at + 4, len + 4));
        at += 12 + len;
    }
}
static size_t png_chunk(size_t at, const char *name, const unsigned char *p, size_t n) {
    put_big(work + at, n);
    memcpy(work + at + 4, name, 4);
    memmove(work + at + 8, p, n);
    put_big(work + at + 8 + n, crc_of(work + at + 4, n + 4));
    return at + 12 + n;
}
/* Rows of w x h pixels of `bits` bits as noise, with the filter before each; its end. */
static size_t noise_rows(unsigned char *p, size_t at, size_t w, size_t h, size_t bits) {
    size_t y, i;
    for (y = 0; w && y < h; y++) {
        p[at++] = (unsigned char)(rnd() % 64 ? below(5) : 5);
        for (i = 0; i < (w * bits + 7) / 8; i++) p[at++] = (unsigned char)rnd();
    }
    return at;
}
/* A small PNG of random kind whose stored scanlines are noise: reaches filters and unpacking. */
static size_t png_noise(void) {
    static const unsigned char sign[8] = {137, 80, 78, 71, 13, 10, 26, 10};
    static const unsigned char depths[] = {8, 16, 1, 2, 4}, colours[] = {0, 3, 2, 4, 6};
    static const unsigned char channels[] = {1, 0, 3, 1, 2, 0, 4};
    static const unsigned char pass[7][4] = {{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4},
        {0, 2, 2, 4}, {1, 0, 2, 2}, {0, 1, 1, 2}};
    unsigned char head[13], body[4200], some[768];
    const size_t w = 1 + below(9), h = 1 + below(9), c = below(5), d = below(c > 1 ? 2 : 5);
    const size_t bits = (size_t)channels[colours[c]] * depths[d];
    size_t at = 8, end = 7, n, i;
    uint32_t a = 1, b = 0;
    memcpy(work, sign, 8);
    put_big(head, w);
    put_big(head + 4, h);
    head[8] = depths[d];
    head[9] = colours[c];
    head[10] = head[11] = 0;
    head[12] = (unsigned char)(rnd() % 2);
    at = png_chunk(at, "IHDR", head, 13);
    for (i = 0; i < sizeof some; i++) some[i] = (unsigned char)rnd();
    if (c == 1 || rnd() % 8 == 0) at = png_chunk(at, "PLTE", some, 3 * (1 + below(256)));
    if (rnd() % 2) at = png_chunk(at, "tRNS", some, c == 0 ? 2 : c == 2 ? 6 : 1 + below(12));
    if (!head[12]) end = noise_rows(body, end, w, h, bits);
    for (i = 0; head[12] && i < 7; i++)
        end = noise_rows(body, end, (w + pass[i][2] - 1 - pass[i][0]) / pass[i][2],
                         (h + pass[i][3] - 1 - pass[i][1]) / pass[i][3], bits);
    n = end - 7;
    if (rnd() % 8 == 0) n -= below(n);
    for (i = 0; i < n; i++) { a = (a + body[7 + i]) % 65521; b = (b + a) % 65521; }
    body[0] = 0x78; body[1] = 1; body[2] = 1;
    body[3] = (unsigned char)n; body[4] = (unsigned char)(n >> 8);
    body[5] = (unsigned char)~body[3]; body[6] = (unsigned char)~body[4];
    put_big(body + 7 + n, (size_t)b << 16 | a);
    at = png_chunk(at, "IDAT", body, n + 11);
    return png_chunk(at, "IEND", body, 0);
}

/* ---- reading, as a program would ---- */

/* work in memory of exactly its size: the sanitizer sees a read past its end. */
static unsigned char *exact(size_t n) {
    unsigned char *p = (unsigned char *)malloc(n ? n : 1);
    need(p != NULL, "memory");
    memcpy(p, work, n);
    return p;
}
static int read_image(sdq_ctx *ctx, size_t n) {
    unsigned char *p = exact(n);
    sdq_image m;
    const sdq_status st = sdq_image_decode(ctx, p, n, "case", &m);
    free(p);
    if (st != SDQ_OK) return 0;
    need(m.w && m.h && m.c && m.px[0] + m.px[m.w * m.h * m.c - 1] < 511, "picture");
    sdq_image_free(ctx, &m);
    return 1;
}
static int read_tensors(sdq_ctx *ctx, const char *path) {
    static const size_t size_of[SDQ_DTYPE_COUNT] = {4, 2, 2, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1};
    sdq_file *f;
    size_t i;
    if (sdq_file_open(ctx, path, &f) != SDQ_OK) return 0;
    (void)sdq_file_meta(f, "format");
    need(strlen(sdq_file_describe(f).title) > 0, "description");
    for (i = 0; i < sdq_file_count(f); i++) {
        const sdq_entry *e = sdq_file_entry(f, i);
        const size_t count = sdq_entry_count(e);
        float *x = (float *)malloc(count * sizeof *x + 1);
        need(x && sdq_file_find(f, e->name) != NULL, "entry");
        /* the file is mapped: a read past its end stays inside a page, so the sizes must fit */
        need(e->dtype == SDQ_DTYPE_COUNT || e->bytes == count * size_of[e->dtype], "size of an entry");
        (void)sdq_entry_to_f32(ctx, e, x);
        free(x);
    }
    sdq_file_close(ctx, f);
    return 1;
}
static int read_model(sdq_ctx *ctx, sdq_part part) {
    sdq_model *m;
    const int weights = rnd() % 2 != 0;
    if ((weights ? sdq_model_load(ctx, DIR, part, &m) : sdq_model_init(ctx, DIR, part, 1, &m)) != SDQ_OK)
        return 0;
    sdq_model_free(ctx, m);
    return 1;
}
static int read_scheduler(sdq_ctx *ctx, size_t n) {
    sdq_scheduler_desc d;
    sdq_scheduler *s;
    unsigned char *p = exact(n);
    const sdq_status st =
        sdq_scheduler_desc_from_json(ctx, (const char *)p, n, "case", SDQ_SCHEDULER_DEFAULT, &d);
    free(p);
    if (st != SDQ_OK) return 0;
    if (sdq_scheduler_create(ctx, &d, &s) != SDQ_OK) return 0;
    sdq_scheduler_free(ctx, s);
    return 1;
}
static int read_tokenizer(sdq_ctx *ctx) {
    sdq_tokenizer *t;
    int32_t ids[77];
    if (sdq_tokenizer_load(ctx, DIR "/tokenizer", &t) != SDQ_OK) return 0;
    (void)sdq_tokenizer_encode(ctx, t, "a Red apple's 12 \xc3\xa9\xf0\x9f\x98\x80", ids, 77, NULL);
    sdq_tokenizer_free(ctx, t);
    return 1;
}
static int read_int8(sdq_ctx *ctx) {
    const float time = 500;
    sdq_model *m;
    sdq_policy policy;
    sdq_unet_input in;
    if (sdq_model_load_int8(ctx, MODEL, DIR "/int8", &m, &policy) != SDQ_OK) return 0;
    memset(&in, 0, sizeof in);
    in.sample = sdq_tensor_4d(ctx, 1, 2, 2, sdq_model_get_info(m).in);
    in.context = sdq_tensor_3d(ctx, 1, 3, sdq_model_get_info(m).context);
    in.timesteps = &time;
    if (rnd() % 8 == 0) (void)sdq_unet_forward(ctx, m, &in, SDQ_INT8);
    sdq_model_free(ctx, m);
    return 1;
}
static int read_list(sdq_ctx *ctx) {
    sdq_dataset *d;
    sdq_image m;
    size_t i;
    if (sdq_dataset_open(ctx, DIR "/list", &d) != SDQ_OK) return 0;
    for (i = 0; i < sdq_dataset_count(d) && i < 4; i++)
        if (sdq_dataset_image(ctx, d, i, &m) == SDQ_OK) sdq_image_free(ctx, &m);
    sdq_dataset_free(ctx, d);
    return 1;
}

/* The header of a safetensors file: where damage does most. */
static size_t reach_of(const bytes *b) {
    return rnd() % 8 ? 8 + ((size_t)b->p[0] | (size_t)b->p[1] << 8 | (size_t)b->p[2] << 16) : b->n;
}

/* Damage must get past the hash of an int8 file, most of the time. */
static void int8_seal(sdq_ctx *ctx, const char *name, size_t n) {
    static const char key[] = "\"sdq.hash\":\"";
    const size_t digits = 16, len = sizeof key - 1;
    char text[17];
    uint64_t hash = 0;
    size_t i;
    sdq_file *f;
    if (sdq_file_open(ctx, name, &f) == SDQ_OK && sdq__cv_hash_file(ctx, f, &hash) == SDQ_OK) {
        for (i = 8; i + len + digits <= n && memcmp(work + i, key, len) != 0; i++) {}
        (void)snprintf(text, sizeof text, "%08lx%08lx", (unsigned long)(hash >> 32),
                       (unsigned long)(hash & 0xffffffffu));
        if (i + len + digits <= n) memcpy(work + i + len, text, digits);
    }
    sdq_file_close(ctx, f);
    sdq_clear_error(ctx);
    put_file(name, work, n);
}

/* Read a case of this kind; hurt = 0: the valid file. */
static int try_case(sdq_ctx *ctx, int kind, int hurt) {
    static const char *const path[KINDS] = {"", "", "", "tensors", "unet/config.json",
        "vae/config.json", "text_encoder/config.json", "", "tokenizer/vocab.json",
        "tokenizer/merges.txt", "int8", "list/metadata.jsonl"};
    const bytes *b = &source[kind];
    char name[128];
    size_t n;
    int ok = 0;
    if (kind == SCANLINES) return read_image(ctx, png_noise());
    memcpy(work, b->p, n = b->n);
    if (hurt) n = damage(b, kind == TENSORS || kind == INT8 ? reach_of(b) : b->n);
    if (kind == PNG) png_seal(work, n);
    if (kind == PNG || kind == PPM) return read_image(ctx, n);
    if (kind == SCHEDULER) return read_scheduler(ctx, n);
    (void)snprintf(name, sizeof name, DIR "/%s", path[kind]);
    put_file(name, work, n);
    if (kind == INT8 && rnd() % 8) int8_seal(ctx, name, n);
    if (kind == TENSORS) ok = read_tensors(ctx, name);
    else if (kind == INT8) ok = read_int8(ctx);
    else if (kind == LIST) ok = read_list(ctx);
    else if (kind == VOCAB || kind == MERGES) ok = read_tokenizer(ctx);
    else ok = read_model(ctx, kind == UNET ? SDQ_PART_UNET : kind == VAE ? SDQ_PART_VAE : SDQ_PART_TEXT);
    put_file(name, b->p, b->n);
    return ok;
}

/* ---- valid files to begin with ---- */

static void make_sources(void) {
    static const char *const copied[] = {"unet/config.json", "vae/config.json",
        "text_encoder/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json"};
    static const char *const folder[] = {"build", "build/tests", DIR, DIR "/unet", DIR "/vae",
        DIR "/text_encoder", DIR "/tokenizer", DIR "/list"};
    static const char list[] = "{\"file_name\": \"a.png\", \"text\": \"a cat\", \"weight\": 2}\n"
        "{\"file_name\": \"b.png\", \"text\": \"d\\u00f6g\"}\n";
    static const char ppm[] = "P6\n# a\n3 2\n255\nabcdefghijklmnopqr";
    static const sdq_dtype type[] = {SDQ_F32, SDQ_F16, SDQ_BF16, SDQ_F64, SDQ_I8, SDQ_I64, SDQ_BOOL};
    static const size_t size[] = {4, 2, 2, 8, 1, 8, 1};
    static const double zeros[8] = {0};
    sdq_ctx *ctx = new_ctx();
    sdq_recipe r = sdq_recipe_default();
    sdq_model *m;
    sdq_entry e[7];
    sdq_pair meta = {"format", "pt"};
    char names[7][8];
    size_t i;
    for (i = 0; i < sizeof folder / sizeof *folder; i++) (void)mkdir(folder[i], 0777);
    for (i = 0; i < sizeof copied / sizeof *copied; i++) copy_file(copied[i]);
    memset(e, 0, sizeof e);
    for (i = 0; i < 7; i++) {
        (void)snprintf(names[i], sizeof names[i], "a%d", (int)i);
        e[i].name = names[i];
        e[i].dtype = type[i];
        e[i].rank = 1 + (int)(i % 2);
        e[i].dim[0] = 1 + i % 3;
        e[i].dim[1] = e[i].rank == 2 ? 2 : 1;
        e[i].data = zeros;
        e[i].bytes = e[i].dim[0] * e[i].dim[1] * size[i];
    }
    need(sdq_file_write(ctx, DIR "/tensors", e, 7, &meta, 1) == SDQ_OK, sdq_error_text(ctx));
    r.range_conv = SDQ_RANGE_POSITION;      /* dynamic everywhere: no calibration is needed */
    need(sdq_model_load(ctx, MODEL, SDQ_PART_UNET, &m) == SDQ_OK
         && sdq_recipe_apply(ctx, m, &r, NULL) == SDQ_OK, sdq_error_text(ctx));
    for (i = 0; i < sdq_model_layer_count(m); i += 2) {         /* every other layer with 4 bits */
        sdq_quant q = sdq_layer_quant(sdq_model_layer(m, i, NULL));
        q.weight_bits = 4;
        need(sdq_layer_set_quant(ctx, sdq_model_layer(m, i, NULL), &q) == SDQ_OK, "4 bits");
    }
    need(sdq_model_convert(ctx, m) == SDQ_OK
         && sdq_model_save_int8(ctx, m, DIR "/int8", NULL, NULL) == SDQ_OK, sdq_error_text(ctx));
    sdq_model_free(ctx, m);
    sdq_ctx_free(ctx);
    source[PNG] = file_bytes("examples/emoji/data/train/0000.png");
    put_file(DIR "/list/a.png", source[PNG].p, source[PNG].n);
    put_file(DIR "/list/metadata.jsonl", list, sizeof list - 1);
    put_file(DIR "/ppm", ppm, sizeof ppm - 1);
    source[PPM] = file_bytes(DIR "/ppm");
    source[TENSORS] = file_bytes(DIR "/tensors");
    source[UNET] = file_bytes(DIR "/unet/config.json");
    source[VAE] = file_bytes(DIR "/vae/config.json");
    source[TEXT] = file_bytes(DIR "/text_encoder/config.json");
    source[SCHEDULER] = file_bytes(MODEL "/scheduler/scheduler_config.json");
    source[VOCAB] = file_bytes(DIR "/tokenizer/vocab.json");
    source[MERGES] = file_bytes(DIR "/tokenizer/merges.txt");
    source[INT8] = file_bytes(DIR "/int8");
    source[LIST] = file_bytes(DIR "/list/metadata.jsonl");
}

int main(int argc, char **argv) {
    const double seconds = argc > 1 ? atof(argv[1]) : 5;
    const uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    const time_t began = time(NULL);
    size_t i = argc > 3 ? (size_t)strtoull(argv[3], NULL, 0) : 0, read[KINDS] = {0}, tried[KINDS] = {0};
    int k, bad = 0;
    FILE *now;
    make_sources();
    for (k = 0; k < KINDS; k++) {
        sdq_ctx *ctx = new_ctx();
        need(k == SCANLINES || try_case(ctx, k, 0), sdq_error_text(ctx));
        sdq_ctx_free(ctx);
    }
    now = fopen(DIR "/case", "w");
    need(now != NULL, DIR "/case");
    do {
        sdq_ctx *ctx = new_ctx();
        const int kind = (int)(i % KINDS);
        const clock_t start = clock();
        int ok = 0, rounds = kind <= TENSORS || kind == SCHEDULER ? 10 : 1;     /* the quick ones */
        rewind(now);
        fprintf(now, "seed %llu case %zu %s        \n", (unsigned long long)seed, i, kind_name[kind]);
        fflush(now);
        state = (seed + i) * UINT64_C(0x9e3779b97f4a7c15);
        for (; rounds; rounds--) {
            sdq_clear_error(ctx);
            ok = try_case(ctx, kind, 1);
            tried[kind]++;
            read[kind] += (size_t)ok;
            if (ok || sdq_last_error(ctx) != SDQ_OK) continue;
            printf("case %zu: an error without a sentence\n", i);
            bad++;
        }
        sdq_ctx_free(ctx);
        if (heap_live) { printf("case %zu: %zu bytes were not freed\n", i, heap_live); bad++; heap_live = 0; }
        if ((double)(clock() - start) > 5.0 * CLOCKS_PER_SEC) { printf("case %zu takes too long\n", i); bad++; }
        i++;
    } while (difftime(time(NULL), began) < seconds && bad < 10);
    fclose(now);
    for (k = 0; k < KINDS; k++) {
        printf("%s: %zu tried, %zu could be read\n", kind_name[k], tried[k], read[k]);
        free(source[k].p);
    }
    printf("fuzz: %zu cases, seed %llu; 1 passed, %d failed\n", i, (unsigned long long)seed, bad);
    return bad != 0;
}
