/* >>io >>json >>safetensors >>image >>dataset: what is valid is read exactly, what is damaged gives
 * an error with a sentence and leaks nothing. Run from the project folder; makes and removes the
 * folder test_files.d. Meant to be run under ASan and UBSan, too. */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

#include <fcntl.h>
#include <locale.h>
#include <sys/stat.h>
#include <unistd.h>

#define DIR "test_files.d"

static sdq_ctx *ctx;
static sdqt_heap count;

/* Allocation number fail_at from here on is refused, 0: none. The context has its own few; a leak
 * shows when it is freed. */
static void open_ctx(size_t fail_at) {
    memset(&count, 0, sizeof count);
    SDQT_CHECK(sdqt_ctx_of(&count, SDQ_TIER_AUTO, 1, &ctx) == SDQ_OK);
    if (fail_at) sdqt_refuse(&count, fail_at - 1, 1);
}

static void close_ctx(void) {
    sdq_ctx_free(ctx);
    ctx = NULL;
    SDQT_THAT(count.live == 0, "%zu allocations leaked", count.live);
}

static void put_file(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    SDQT_CHECK(f != NULL);
    if (!f) return;
    SDQT_CHECK(fwrite(data, 1, n, f) == n);
    fclose(f);
}

static unsigned char *get_file(const char *path, size_t *n) {
    static unsigned char buf[1 << 20];
    FILE *f = fopen(path, "rb");
    *n = f ? fread(buf, 1, sizeof buf, f) : 0;
    if (f) fclose(f);
    return buf;
}

/* The call failed with that status and a sentence that holds `text`. Clears the error. */
static void failed(sdq_status got, sdq_status want, const char *text) {
    SDQT_THAT(got == want && sdq_last_error(ctx) == want && strstr(sdq_error_text(ctx), text),
              "status %d, expected %d; \"%s\" should hold \"%s\"", (int)got, (int)want,
              sdq_error_text(ctx), text);
    sdq_clear_error(ctx);
}

/* --- json --- */

static void test_json_values(int tier) {
    static const char text[] = " {\"a\": [1, -2.5e3, 1e400, 0, 1E-2], "
        "\"b\": {\"c\": true, \"d\": null}, "
        "\"s\": \"\\u00e9\\ud83d\\ude00\\n\\\"\\/\\u0000x\", "
        "\"n\": 9007199254740992, \"e\": {}, \"l\": []}\n";
    sdq__json *root = NULL;
    const sdq__json *v;
    size_t n = 0;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq__js_parse(ctx, text, strlen(text), "text", &root) == SDQ_OK && root->count == 6);
    v = sdq__js_get(root, "a");
    SDQT_CHECK(v && v->count == 5 && v->child->num == 1 && v->child->next->num == -2500);
    SDQT_CHECK(v && v->child->next->next->num > 1e308);
    v = sdq__js_get(root, "s");
    SDQT_CHECK(v && v->len == 11 && memcmp(v->str, "\xc3\xa9\xf0\x9f\x98\x80\n\"/\0x", 12) == 0);
    SDQT_CHECK(sdq__js_bool(sdq__js_get(root, "b"), "c", 0) == 1);
    SDQT_CHECK(sdq__js_get(sdq__js_get(root, "b"), "d")->kind == SDQ__JS_NULL);
    SDQT_CHECK(sdq__js_size(sdq__js_get(root, "n"), &n) && n == (size_t)1 << 53);
    SDQT_CHECK(sdq__js_int(root, "n", 7) == 7 && sdq__js_int(root, "x", -3) == -3);
    SDQT_CHECK(sdq__js_double(root, "s", 0.5) == 0.5 && !sdq__js_string(root, "a", NULL));
    SDQT_CHECK(sdq__js_get(root, "e")->count == 0 && sdq__js_get(root, "l")->child == NULL);
    sdq__js_free(ctx, root);
    close_ctx();
}

static void test_json_refused(int tier) {
    static const char *const bad[] = {
        "", " ", "{", "}", "[1,]", "[,1]", "[1 2]", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{a:1}",
        "{\"a\":1,\"a\":2}", "{\"a\":1,\"\\u0061\":2}", "nul", "NaN", "-", "01", "-01", "1.", ".5",
        "1e", "+1", "0x1", "Infinity", "\"", "\"\\\"", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"",
        "\"\\udc00\"", "\"\\ud800\\u0041\"", "\"\t\"", "\"\x80\"", "\"\xc0\x80\"",
        "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xe2\x82\"", "1 2", "[1]]",
        "{\"a\\u0000\":1}", "[\"a\" \"b\"]",
        "/**/1", "'a'", "\xef\xbb\xbf{}", "[1}", "{\"a\":1]", "tru", "truefalse"};
    char deep[200];
    size_t i;
    sdq__json *root;
    (void)tier;
    open_ctx(0);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        const sdq_status st = sdq__js_parse(ctx, bad[i], strlen(bad[i]), "text", &root);
        SDQT_THAT(st == SDQ_ERR_FORMAT && !root, "accepted: %s", bad[i]);
        failed(st, SDQ_ERR_FORMAT, "text: not valid JSON");
    }
    memset(deep, '[', 64);
    memset(deep + 64, ']', 64);
    SDQT_CHECK(sdq__js_parse(ctx, deep, 128, "deep", &root) == SDQ_OK);
    sdq__js_free(ctx, root);
    memset(deep, '[', 65);
    failed(sdq__js_parse(ctx, deep, 200, "deep", &root), SDQ_ERR_FORMAT, "64 levels");
    failed(sdq__js_parse(ctx, "[1,\n2,\n3,x]", 11, "lines", &root), SDQ_ERR_FORMAT, "line 3");
    close_ctx();
}

static void test_json_writer(int tier) {
    static const double values[] = {0, -0.0, 1, 0.1, 1e300, -2.2250738585072014e-308, 5e-324,
                                    1.0 / 3};
    sdq__str b;
    sdq__json *root = NULL;
    const sdq__json *v;
    size_t i;
    (void)tier;
    open_ctx(0);
    memset(&b, 0, sizeof b);
    sdq__str_add(ctx, &b, "[", 1);
    sdq__str_json(ctx, &b, "q\" b\\ n\n t\t \x01 \xc3\xa9 \xff.");
    for (i = 0; i < sizeof values / sizeof *values; i++) {
        sdq__str_add(ctx, &b, ",", 1);
        sdq__str_number(ctx, &b, values[i], 17);
    }
    sdq__str_format(ctx, &b, ",%s]", "null");
    SDQT_CHECK(!b.bad && sdq__js_parse(ctx, b.s, b.len, "own", &root) == SDQ_OK);
    if (root) {
        v = root->child;
        SDQT_CHECK(strcmp(v->str, "q\" b\\ n\n t\t \x01 \xc3\xa9 \xef\xbf\xbd.") == 0);
        for (i = 0; i < sizeof values / sizeof *values; i++) {
            v = v->next;
            SDQT_BYTES(&v->num, &values[i], sizeof(double));
        }
    }
    sdq__str_free(ctx, &b);
    sdq__str_number(ctx, &b, HUGE_VAL, 9);
    SDQT_CHECK(strcmp(b.s, "null") == 0);
    sdq__str_free(ctx, &b);
    sdq__js_free(ctx, root);
    close_ctx();
}

/* --- safetensors --- */

static const float f32_data[6] = {1.0f, -2.5f, 65504.0f, 1e-7f, 0.1f, 3.0f};
static const uint16_t f16_data[3] = {0x3c00, 0xc000, 0x0001}, bf16_data[2] = {0x3f80, 0xc040};
static const double f64_data[1] = {0.5};
static const int64_t i64_data[2] = {-3, 1099511627776};
static const signed char i8_data[3] = {-128, 0, 127};
static const unsigned char bool_data[2] = {0, 1};

static sdq_entry entry(const char *name, sdq_dtype dtype, int rank, size_t a, size_t b,
                       const void *data, size_t bytes) {
    sdq_entry e;
    memset(&e, 0, sizeof e);
    e.name = name;
    e.dtype = dtype;
    e.rank = rank;
    e.dim[0] = a;
    e.dim[1] = b;
    e.data = data;
    e.bytes = bytes;
    return e;
}

static size_t some_entries(sdq_entry *e) {
    e[0] = entry("b.weight", SDQ_F32, 2, 2, 3, f32_data, 24);
    e[1] = entry("a", SDQ_F16, 1, 3, 0, f16_data, 6);
    e[2] = entry("bf", SDQ_BF16, 1, 2, 0, bf16_data, 4);
    e[3] = entry("scalar", SDQ_F64, 0, 0, 0, f64_data, 8);
    e[4] = entry("i64", SDQ_I64, 1, 2, 0, i64_data, 16);
    e[5] = entry("i8", SDQ_I8, 1, 3, 0, i8_data, 3);
    e[6] = entry("bool", SDQ_BOOL, 1, 2, 0, bool_data, 2);
    e[7] = entry("empty", SDQ_F32, 2, 0, 5, NULL, 0);
    e[8] = entry("half \"\xc3\xa9\"", SDQ_F32, 1, 6, 0, f32_data, 24);
    e[8].store = SDQ_F16;
    e[9] = entry("brain", SDQ_F32, 1, 6, 0, f32_data, 24);
    e[9].store = SDQ_BF16;
    return 10;
}

static void test_st_round_trip(int tier) {
    static const sdq_pair meta[2] = {{"format", "pt"}, {"note", "caf\xc3\xa9\n\"x\""}};
    sdq_entry e[10];
    const sdq_entry *r;
    const size_t n = some_entries(e);
    sdq_file *f = NULL;
    float x[6];
    size_t i;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_file_write(ctx, DIR "/a.safetensors", e, n, meta, 2) == SDQ_OK);
    SDQT_CHECK(sdq_file_open(ctx, DIR "/a.safetensors", &f) == SDQ_OK && sdq_file_count(f) == n);
    if (!f) return;
    for (i = 1; i < n; i++)
        SDQT_CHECK(strcmp(sdq_file_entry(f, i - 1)->name, sdq_file_entry(f, i)->name) < 0);
    for (i = 0; i < 8; i++) {
        r = sdq_file_find(f, e[i].name);
        SDQT_CHECK(r && r->dtype == e[i].dtype && r->rank == e[i].rank && r->bytes == e[i].bytes);
        if (r && r->bytes) SDQT_BYTES(r->data, e[i].data, r->bytes);
        if (r) SDQT_CHECK((uintptr_t)r->data % sdq__u_dtype_size(r->dtype) == 0);
    }
    r = sdq_file_find(f, e[8].name);
    SDQT_CHECK(r && r->dtype == SDQ_F16 && r->bytes == 12 && sdq_entry_to_f32(ctx, r, x) == SDQ_OK);
    for (i = 0; i < 6; i++) SDQT_CHECK(x[i] == sdq__u_from_f16(sdq__u_to_f16(f32_data[i])));
    r = sdq_file_find(f, "brain");
    SDQT_CHECK(r && r->dtype == SDQ_BF16 && sdq_entry_to_f32(ctx, r, x) == SDQ_OK && x[0] == 1.0f);
    r = sdq_file_find(f, "i64");
    SDQT_CHECK(r && sdq_entry_to_f32(ctx, r, x) == SDQ_OK);
    SDQT_CHECK(x[0] == -3 && x[1] == 1099511627776.0f);
    r = sdq_file_find(f, "i8");
    SDQT_CHECK(r && sdq_entry_to_f32(ctx, r, x) == SDQ_OK && x[0] == -128 && x[2] == 127);
    r = sdq_file_find(f, "empty");
    SDQT_CHECK(r && sdq_entry_count(r) == 0 && r->dim[1] == 5);
    SDQT_CHECK(sdq_file_find(f, "c") == NULL && sdq_file_entry(f, n) == NULL);
    SDQT_CHECK(strcmp(sdq_file_meta(f, "note"), meta[1].value) == 0 && !sdq_file_meta(f, "x"));
    sdq_file_close(ctx, f);
    close_ctx();
}

static void test_st_same_bytes(int tier) {
    sdq_entry e[10], swap;
    const size_t n = some_entries(e);
    unsigned char first[4096];
    size_t bytes, again;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_file_write(ctx, DIR "/a.safetensors", e, n, NULL, 0) == SDQ_OK);
    memcpy(first, get_file(DIR "/a.safetensors", &bytes), sizeof first);
    swap = e[0];
    e[0] = e[9];
    e[9] = swap;
    SDQT_CHECK(sdq_file_write(ctx, DIR "/a.safetensors", e, n, NULL, 0) == SDQ_OK);
    SDQT_BYTES(first, get_file(DIR "/a.safetensors", &again), bytes);
    SDQT_CHECK(bytes == again && bytes < sizeof first);
    SDQT_CHECK(access(DIR "/a.safetensors.tmp", F_OK) != 0);
    close_ctx();
}

/* A header and `data` zero bytes -> the status of opening it. */
static sdq_status open_header(const char *header, size_t data) {
    unsigned char buf[4096];
    const size_t n = strlen(header);
    sdq_file *f;
    sdq_status st;
    memset(buf, 0, sizeof buf);
    buf[0] = (unsigned char)n;
    buf[1] = (unsigned char)(n >> 8);
    memcpy(buf + 8, header, n);
    put_file(DIR "/h.safetensors", buf, 8 + n + data);
    st = sdq_file_open(ctx, DIR "/h.safetensors", &f);
    SDQT_CHECK((f != NULL) == (st == SDQ_OK));
    sdq_file_close(ctx, f);
    return st;
}

#define F32_AT(name, shape, from, to) \
    "\"" name "\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" from "," to "]}"

static void test_st_hostile(int tier) {
    static const struct { const char *header; size_t data; const char *error; } list[] = {
        {"[1]", 0, "InvalidHeaderStart"},
        {" {}", 0, "InvalidHeaderStart"},
        {"{", 0, "not valid JSON"},
        {"{" F32_AT("a", "[2]", "0", "8") "}", 7, "InvalidOffset"},
        {"{" F32_AT("a", "[2]", "0", "8") "}", 9, "MetadataIncompleteBuffer"},
        {"{" F32_AT("a", "[2]", "4", "12") "}", 12, "InvalidOffset"},
        {"{" F32_AT("a", "[2]", "8", "0") "}", 8, "InvalidOffset"},
        {"{" F32_AT("a", "[2]", "0", "4") "}", 4, "TensorInvalidInfo"},
        {"{" F32_AT("a", "[1]", "0", "4") "," F32_AT("b", "[1]", "2", "6") "}", 6, "InvalidOffset"},
        {"{" F32_AT("a", "[1]", "0", "4") "," F32_AT("b", "[1]", "0", "4") "}", 4, "InvalidOffset"},
        {"{" F32_AT("a", "[1]", "0", "4") "," F32_AT("b", "[1]", "8", "12") "}", 12,
         "InvalidOffset"},
        {"{" F32_AT("a", "[4294967296,4294967296]", "0", "4") "}", 4, "ValidationOverflow"},
        {"{" F32_AT("a", "[2305843009213693952]", "0", "4") "}", 4, "no size"},
        {"{" F32_AT("a", "[2251799813685248,1024]", "0", "4") "}", 4, "ValidationOverflow"},
        {"{" F32_AT("a", "[-1]", "0", "4") "}", 4, "no size"},
        {"{" F32_AT("a", "[1.5]", "0", "4") "}", 4, "no size"},
        {"{" F32_AT("a", "[\"1\"]", "0", "4") "}", 4, "no size"},
        {"{" F32_AT("a", "4", "0", "4") "}", 4, "has no shape"},
        {"{" F32_AT("a", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4, "dimensions"},
        {"{" F32_AT("a", "[1]", "0", "1e400") "}", 4, "data_offsets"},
        {"{" F32_AT("a", "[1]", "-4", "0") "}", 4, "data_offsets"},
        {"{" F32_AT("a", "[1]", "0", "4") "," F32_AT("a", "[1]", "0", "4") "}", 4, "twice"},
        {"{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unknown dtype"},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "MisalignedSlice"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unknown dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets"},
        {"{\"a\":[]}", 0, "unknown dtype"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "__metadata__"},
        {"{\"__metadata__\":[]}", 0, "__metadata__"},
        {"{\"a\xff\":1}", 0, "UTF-8"},
        {"{}x", 0, "text behind"}};
    static const unsigned char huge[16] = {0, 0, 0, 0, 0, 0, 0, 1, '{', '}'};
    static const unsigned char too_long[16] = {9, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
    static const unsigned char empty[8] = {0};
    sdq_file *f;
    size_t i;
    (void)tier;
    open_ctx(0);
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        const sdq_status st = open_header(list[i].header, list[i].data);
        failed(st, strcmp(list[i].error, "dimensions") ? SDQ_ERR_FORMAT : SDQ_ERR_UNSUPPORTED,
               list[i].error);
    }
    put_file(DIR "/h.safetensors", huge, 16);
    failed(sdq_file_open(ctx, DIR "/h.safetensors", &f), SDQ_ERR_FORMAT, "HeaderTooLarge");
    put_file(DIR "/h.safetensors", too_long, 16);
    failed(sdq_file_open(ctx, DIR "/h.safetensors", &f), SDQ_ERR_FORMAT, "InvalidHeaderLength");
    put_file(DIR "/h.safetensors", empty, 8);
    failed(sdq_file_open(ctx, DIR "/h.safetensors", &f), SDQ_ERR_FORMAT, "InvalidHeaderStart");
    put_file(DIR "/h.safetensors", empty, 7);
    failed(sdq_file_open(ctx, DIR "/h.safetensors", &f), SDQ_ERR_FORMAT, "HeaderTooSmall");
    put_file(DIR "/h.safetensors", empty, 0);
    failed(sdq_file_open(ctx, DIR "/h.safetensors", &f), SDQ_ERR_FORMAT, "HeaderTooSmall");
    failed(sdq_file_open(ctx, DIR "/none", &f), SDQ_ERR_IO, "none");
    failed(sdq_file_open(ctx, DIR, &f), SDQ_ERR_IO, DIR);
    SDQT_CHECK(open_header("{}    ", 0) == SDQ_OK);
    SDQT_CHECK(open_header("{" F32_AT("a", "[0,3]", "0", "0") ","
                           F32_AT("b", "[]", "0", "4") "}", 4) == SDQ_OK);
    SDQT_CHECK(open_header("{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[4],"
                           "\"data_offsets\":[0,4]}}", 4) == SDQ_OK);
    close_ctx();
}

/* Every file that lacks its end is refused; every changed byte is survived. */
static void test_st_damage(int tier) {
    sdq_entry e[10];
    const size_t n = some_entries(e);
    unsigned char good[4096], bad[4096];
    size_t bytes, i, k;
    sdq_file *f;
    float x[8];
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_file_write(ctx, DIR "/a.safetensors", e, n, NULL, 0) == SDQ_OK);
    memcpy(good, get_file(DIR "/a.safetensors", &bytes), sizeof good);
    for (i = 0; i < bytes; i++) {
        put_file(DIR "/h.safetensors", good, i);
        SDQT_CHECK(sdq_file_open(ctx, DIR "/h.safetensors", &f) == SDQ_ERR_FORMAT && !f);
        sdq_clear_error(ctx);
    }
    for (i = 0; i < 2 * bytes; i++) {
        memcpy(bad, good, bytes);
        bad[i % bytes] = (unsigned char)sdqt_rand();
        put_file(DIR "/h.safetensors", bad, bytes);
        if (sdq_file_open(ctx, DIR "/h.safetensors", &f) == SDQ_OK)
            for (k = 0; k < sdq_file_count(f); k++)
                if (sdq_entry_count(sdq_file_entry(f, k)) <= 8)
                    (void)sdq_entry_to_f32(ctx, sdq_file_entry(f, k), x);
        sdq_file_close(ctx, f);
        sdq_clear_error(ctx);
    }
    close_ctx();
}

static void test_st_write_errors(int tier) {
    sdq_entry e[10];
    const sdq_pair bad_meta[2] = {{"a", "1"}, {"a", "2"}};
    sdq_file *f;
    (void)tier;
    open_ctx(0);
    some_entries(e);
    e[1].name = e[0].name;
    failed(sdq_file_write(ctx, DIR "/w", e, 2, NULL, 0), SDQ_ERR_ARGUMENT, "two arrays named");
    some_entries(e);
    e[1].bytes = 5;
    failed(sdq_file_write(ctx, DIR "/w", e, 2, NULL, 0), SDQ_ERR_ARGUMENT, "do not fit");
    some_entries(e);
    e[0].dim[0] = SIZE_MAX / 2;
    failed(sdq_file_write(ctx, DIR "/w", e, 1, NULL, 0), SDQ_ERR_ARGUMENT, "do not fit");
    some_entries(e);
    failed(sdq_file_write(ctx, DIR "/w", e, 1, bad_meta, 2), SDQ_ERR_ARGUMENT, "twice");
    failed(sdq_file_write(ctx, DIR "/no/w", e, 1, NULL, 0), SDQ_ERR_IO, "cannot be created");
    SDQT_CHECK(access(DIR "/w", F_OK) != 0 && access(DIR "/w.tmp", F_OK) != 0);
    SDQT_CHECK(sdq_file_write(ctx, DIR "/w", NULL, 0, NULL, 0) == SDQ_OK);
    SDQT_CHECK(sdq_file_open(ctx, DIR "/w", &f) == SDQ_OK && sdq_file_count(f) == 0);
    sdq_file_close(ctx, f);
    close_ctx();
}

/* /dev/full accepts everything and then reports that the disk is full. */
static void test_disk_full(int tier) {
    sdq_entry e[10];
    const size_t n = some_entries(e);
    (void)tier;
    if (access("/dev/full", W_OK) != 0 || symlink("/dev/full", DIR "/full.tmp") != 0) SDQT_SKIP();
    open_ctx(0);
    failed(sdq_file_write(ctx, DIR "/full", e, n, NULL, 0), SDQ_ERR_IO, "disk full");
    SDQT_CHECK(access(DIR "/full", F_OK) != 0 && access(DIR "/full.tmp", F_OK) != 0);
    close_ctx();
}

/* A link keeps leading to its file, which is replaced; permissions stay; a pipe is written into. */
static void test_targets(int tier) {
    struct stat s;
    char got[8] = "";
    size_t n;
    int fd;
    (void)tier;
    open_ctx(0);
    put_file(DIR "/w", "old", 3);
    (void)chmod(DIR "/w", 0640);
    (void)remove(DIR "/link");
    SDQT_CHECK(symlink("w", DIR "/link") == 0);
    SDQT_CHECK(sdq_bytes_write(ctx, DIR "/link", "new!", 4) == SDQ_OK);
    SDQT_CHECK(lstat(DIR "/link", &s) == 0 && S_ISLNK(s.st_mode));
    SDQT_CHECK(stat(DIR "/w", &s) == 0 && (s.st_mode & 0777) == 0640);
    SDQT_CHECK(memcmp(get_file(DIR "/w", &n), "new!", 4) == 0 && n == 4);
    SDQT_CHECK(access(DIR "/w.tmp", F_OK) != 0 && access(DIR "/link.tmp", F_OK) != 0);
    (void)remove(DIR "/w");                      /* a link to what is not there yet */
    SDQT_CHECK(sdq_bytes_write(ctx, DIR "/link", "new", 3) == SDQ_OK);
    SDQT_CHECK(lstat(DIR "/link", &s) == 0 && S_ISLNK(s.st_mode) && access(DIR "/w", F_OK) == 0);
    (void)remove(DIR "/link");
    SDQT_CHECK(mkfifo(DIR "/link", 0600) == 0);
    fd = open(DIR "/link", O_RDONLY | O_NONBLOCK);
    SDQT_CHECK(fd >= 0 && sdq_bytes_write(ctx, DIR "/link", "piped", 5) == SDQ_OK);
    SDQT_CHECK(fd >= 0 && read(fd, got, sizeof got) == 5 && memcmp(got, "piped", 5) == 0);
    SDQT_CHECK(lstat(DIR "/link", &s) == 0 && S_ISFIFO(s.st_mode));
    if (fd >= 0) (void)close(fd);
    (void)remove(DIR "/link");
    failed(sdq_bytes_write(ctx, DIR, "x", 1), SDQ_ERR_IO, "is a folder");
    failed(sdq_bytes_write(ctx, "", "x", 1), SDQ_ERR_ARGUMENT, "no name");
    failed(sdq_bytes_write(ctx, NULL, "x", 1), SDQ_ERR_ARGUMENT, "no name");
    if (geteuid() != 0) {       /* nothing is protected from root */
        (void)chmod(DIR "/w", 0440);
        failed(sdq_bytes_write(ctx, DIR "/w", "x", 1), SDQ_ERR_IO, "write-protected");
    }
    (void)remove(DIR "/w");
    close_ctx();
}

/* Numbers have a point wherever the program lives. */
static void test_locale(int tier) {
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "fr_FR.utf8"};
    char buf[SDQ__U_NUMBER];
    double x = 0.0;
    size_t i;
    (void)tier;
    SDQT_CHECK(!strcmp(sdq__u_number(buf, -1.5e-7, 9), "-1.5e-07"));
    SDQT_CHECK(sdq__u_parse("7.25xy", 4, &x) && x == 7.25);
    SDQT_CHECK(!sdq__u_parse("7.25xy", 5, &x) && !sdq__u_parse("", 0, &x));
    for (i = 0; i < sizeof names / sizeof *names; i++)
        if (setlocale(LC_NUMERIC, names[i])) break;
    if (i == sizeof names / sizeof *names) SDQT_SKIP();
    SDQT_CHECK(!strcmp(sdq__u_number(buf, -1.5e-7, 9), "-1.5e-07"));
    SDQT_CHECK(sdq__u_parse("7.25", 4, &x) && x == 7.25);
    SDQT_CHECK(!sdq__u_parse("7,25", 4, &x) || x != 7.25);
    (void)setlocale(LC_NUMERIC, "C");
}

static void test_st_shards(int tier) {
    static const char index[] = "{\"metadata\":{\"total_size\":1},"
        "\"weight_map\":{\"b.weight\":\"m-1.safetensors\",\"i8\":\"m-2.safetensors\","
        "\"bool\":\"m-2.safetensors\"}}";
    static const char up[] = "{\"weight_map\":{\"a\":\"../m-1.safetensors\"}}";
    static const char deep[] = "{\"weight_map\":{\"a\":\"x/m-1.safetensors\"}}";
    static const char gone[] = "{\"weight_map\":{\"a\":\"m-3.safetensors\"}}";
    static const char lost[] = "{\"weight_map\":{\"zz\":\"m-1.safetensors\"}}";
    static const char path[] = DIR "/m.safetensors.index.json";
    sdq_entry e[10];
    sdq__st_set *s = NULL;
    (void)tier;
    open_ctx(0);
    some_entries(e);
    SDQT_CHECK(sdq_file_write(ctx, DIR "/m-1.safetensors", e, 1, NULL, 0) == SDQ_OK);
    SDQT_CHECK(sdq_file_write(ctx, DIR "/m-2.safetensors", e + 5, 2, NULL, 0) == SDQ_OK);
    put_file(path, index, strlen(index));
    SDQT_CHECK(sdq__st_set_open(ctx, DIR "/m", NULL, &s) == SDQ_OK && s->count == 2);
    SDQT_CHECK(sdq__st_set_find(s, "bool") && sdq__st_set_find(s, "b.weight"));
    SDQT_CHECK(!sdq__st_set_find(s, "x") && sdq__st_set_count(s) == 3 && sdq__st_set_entry(s, 2));
    sdq__st_set_close(ctx, s);
    put_file(path, up, strlen(up));
    failed(sdq__st_set_open(ctx, DIR "/m", NULL, &s), SDQ_ERR_FORMAT, "'..'");
    put_file(path, deep, strlen(deep));
    failed(sdq__st_set_open(ctx, DIR "/m", NULL, &s), SDQ_ERR_FORMAT, "'/'");
    put_file(path, gone, strlen(gone));
    failed(sdq__st_set_open(ctx, DIR "/m", NULL, &s), SDQ_ERR_MISSING, "m-3.safetensors");
    put_file(path, lost, strlen(lost));
    failed(sdq__st_set_open(ctx, DIR "/m", NULL, &s), SDQ_ERR_MISSING, "zz");
    failed(sdq__st_set_open(ctx, DIR "/nothing", NULL, &s), SDQ_ERR_MISSING, "nothing.safetensors");
    SDQT_CHECK(sdq_file_write(ctx, DIR "/m.fp16.safetensors", e + 1, 1, NULL, 0) == SDQ_OK);
    SDQT_CHECK(sdq__st_set_open(ctx, DIR "/m", "fp16", &s) == SDQ_OK && sdq__st_set_find(s, "a"));
    sdq__st_set_close(ctx, s);
    (void)remove(DIR "/m.fp16.safetensors");    /* shards of half precision and nothing else */
    (void)remove(path);
    put_file(DIR "/m.safetensors.index.fp16.json", index, strlen(index));
    SDQT_CHECK(sdq__st_set_open(ctx, DIR "/m", NULL, &s) == SDQ_OK && s->count == 2);
    sdq__st_set_close(ctx, s);
    (void)remove(DIR "/m.safetensors.index.fp16.json");
    close_ctx();
}

/* --- pictures --- */

static const sdq_entry *golden(sdq_file *f, const char *group, const char *name) {
    char full[128];
    (void)snprintf(full, sizeof full, "%s/%s", group, name);
    return sdq_file_find(f, full);
}

static int same(const sdq_image *m, const sdq_entry *e) {
    return e && m->px && e->rank == 3 && m->h == e->dim[0] && m->w == e->dim[1] &&
           m->c == e->dim[2] && memcmp(m->px, e->data, e->bytes) == 0;
}

/* Decoding, writing and decoding again all give the golden pixels. */
static void one_png(sdq_file *f, const sdq_entry *file) {
    const char *name = strchr(file->name, '/') + 1;
    const sdq_entry *want = golden(f, "pixels", name);
    sdq_image m, again;
    unsigned char *png = NULL;
    size_t bytes = 0;
    SDQT_THAT(sdq_image_decode(ctx, file->data, file->bytes, name, &m) == SDQ_OK && same(&m, want),
              "%s: %s", name, sdq_error_text(ctx));
    SDQT_CHECK(sdq_image_png_encode(ctx, &m, NULL, 0, &png, &bytes) == SDQ_OK);
    SDQT_CHECK(sdq_image_decode(ctx, png, bytes, name, &again) == SDQ_OK && same(&again, want));
    sdq_bytes_free(ctx, png);
    sdq_image_free(ctx, &m);
    sdq_image_free(ctx, &again);
}

static int is_png(const sdq_entry *e) { return strncmp(e->name, "file/", 5) == 0; }

static void test_png_kinds(int tier) {
    sdq_file *f = NULL;
    size_t i, n = 0;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_file_open(ctx, "tests/data/png.safetensors", &f) == SDQ_OK);
    for (i = 0; f && i < sdq_file_count(f); i++) {
        if (!is_png(sdq_file_entry(f, i))) continue;
        one_png(f, sdq_file_entry(f, i));
        n++;
    }
    SDQT_CHECK(n == 52);
    sdq_file_close(ctx, f);
    close_ctx();
}

static unsigned char *copy_of(const void *data, size_t n) {
    unsigned char *p = (unsigned char *)malloc(n ? n : 1);  /* exact size: ASan sees over-reads */
    if (p && n) memcpy(p, data, n);
    return p;
}

static void fix_crcs(unsigned char *p, size_t n) {
    size_t at = 8;
    while (at + 12 <= n) {
        const size_t len = sdq__img_be32(p + at);
        if (len > n - at - 12) return;
        sdq__img_put_be32(p + at + 8 + len, sdq__img_crc(0, p + at + 4, len + 4));
        at += len + 12;
    }
}

/* Cut at every byte: an error. Change a byte: an error from the CRC. Change it and mend the CRC:
 * no crash. */
static void test_png_damage(int tier) {
    sdq_file *f = NULL;
    size_t i, k;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_file_open(ctx, "tests/data/png.safetensors", &f) == SDQ_OK);
    for (i = 0; f && i < sdq_file_count(f); i++) {
        const sdq_entry *e = sdq_file_entry(f, i);
        for (k = 0; is_png(e) && k < e->bytes; k++) {
            unsigned char *p = copy_of(e->data, k);
            sdq_image m;
            sdq_status st = sdq_image_decode(ctx, p, k, "cut", &m);
            SDQT_CHECK(st == SDQ_ERR_FORMAT && !m.px);
            sdq_clear_error(ctx);
            free(p);
            p = copy_of(e->data, e->bytes);
            p[k] = (unsigned char)(p[k] ^ (1u + sdqt_below(255)));
            st = sdq_image_decode(ctx, p, e->bytes, "changed", &m);
            SDQT_CHECK(st == SDQ_ERR_FORMAT && !m.px);
            sdq_clear_error(ctx);
            fix_crcs(p, e->bytes);
            (void)sdq_image_decode(ctx, p, e->bytes, "mended", &m);
            sdq_image_free(ctx, &m);
            sdq_clear_error(ctx);
            free(p);
        }
    }
    sdq_file_close(ctx, f);
    close_ctx();
}

static size_t put_chunk(unsigned char *p, const char *type, const void *data, size_t n) {
    sdq__img_put_be32(p, (uint32_t)n);
    memcpy(p + 4, type, 4);
    if (n) memcpy(p + 8, data, n);
    sdq__img_put_be32(p + 8 + n, sdq__img_crc(0, p + 4, n + 4));
    return n + 12;
}

/* A PNG of that size and colour whose data is `z`. */
static sdq_status decode_made(uint32_t w, uint32_t h, unsigned depth, unsigned colour,
                              const void *z, size_t n) {
    static unsigned char buf[1 << 17];
    unsigned char header[13];
    size_t at = 8;
    sdq_image m;
    sdq_status st;
    memset(header, 0, sizeof header);
    sdq__img_put_be32(header, w);
    sdq__img_put_be32(header + 4, h);
    header[8] = (unsigned char)depth;
    header[9] = (unsigned char)colour;
    memcpy(buf, "\x89PNG\r\n\x1a\n", 8);
    at += put_chunk(buf + at, "IHDR", header, 13);
    at += put_chunk(buf + at, "IDAT", z, n);
    at += put_chunk(buf + at, "IEND", NULL, 0);
    st = sdq_image_decode(ctx, buf, at, "made", &m);
    SDQT_CHECK((m.px != NULL) == (st == SDQ_OK));
    sdq_image_free(ctx, &m);
    return st;
}

static void test_png_hostile(int tier) {
    static unsigned char zeros[1 << 20];
    static const unsigned char stored[] = {0x78, 1, 1, 2, 0, 0xfd, 0xff, 0, 7, 0, 9, 0, 8};
    static const unsigned char wrong_sum[] = {0x78, 1, 1, 2, 0, 0xfd, 0xff, 0, 7, 0, 9, 0, 9};
    static const unsigned char block3[] = {0x78, 1, 7, 0, 0, 0, 0, 0};
    static const unsigned char far_back[] = {0x78, 1, 0x03, 0x02, 0, 0, 0, 0, 0, 0};
    sdq__str z;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(decode_made(1, 1, 8, 0, stored, sizeof stored) == SDQ_OK);
    failed(decode_made(1, 1, 8, 0, wrong_sum, sizeof wrong_sum), SDQ_ERR_FORMAT, "Adler");
    failed(decode_made(1, 1, 8, 0, block3, sizeof block3), SDQ_ERR_FORMAT, "block type");
    failed(decode_made(1, 1, 8, 0, far_back, sizeof far_back), SDQ_ERR_FORMAT, "distance");
    failed(decode_made(2, 1, 8, 0, stored, sizeof stored), SDQ_ERR_FORMAT, "less data");
    memset(&z, 0, sizeof z);
    sdq__img_deflate(ctx, zeros, sizeof zeros, &z);         /* a bomb: 1 MB in 1 kB */
    SDQT_CHECK(!z.bad && z.len < 4096);
    count.largest = 0;
    failed(decode_made(1, 1, 8, 0, z.s, z.len), SDQ_ERR_FORMAT, "more data");
    failed(decode_made(8192, 8192, 16, 6, z.s, z.len), SDQ_ERR_FORMAT, "less data");
    SDQT_CHECK(count.largest < 1 << 20);        /* refused before memory for it is asked for */
    failed(decode_made(0x7fffffff, 0x7fffffff, 8, 2, z.s, z.len), SDQ_ERR_UNSUPPORTED, "2^26");
    failed(decode_made(0xffffffff, 1, 1, 0, z.s, z.len), SDQ_ERR_UNSUPPORTED, "2^26");
    failed(decode_made(0, 5, 8, 0, z.s, z.len), SDQ_ERR_FORMAT, "IHDR");
    failed(decode_made(1, 1, 3, 0, z.s, z.len), SDQ_ERR_FORMAT, "IHDR");
    failed(decode_made(1, 1, 16, 3, z.s, z.len), SDQ_ERR_FORMAT, "IHDR");
    failed(decode_made(1, 1, 8, 3, stored, sizeof stored), SDQ_ERR_FORMAT, "palette");
    failed(decode_made(1, 1, 8, 7, z.s, z.len), SDQ_ERR_FORMAT, "IHDR");
    sdq__str_free(ctx, &z);
    close_ctx();
}

/* Deflate and inflate agree on everything: noise, runs, long and far matches, all sizes. */
static void test_deflate(int tier) {
    static unsigned char in[100000], out[100000];
    int round;
    (void)tier;
    open_ctx(0);
    for (round = 0; round < 60; round++) {
        const size_t n = round < 20 ? (size_t)round : sdqt_below(sizeof in), kind = sdqt_below(4);
        const size_t period = 1 + sdqt_below(40000);
        size_t i;
        sdq__str z;
        const char *error;
        for (i = 0; i < n; i++)
            in[i] = (unsigned char)(kind == 0 ? sdqt_rand() : kind == 1 ? sdqt_below(3)
                  : i < period ? sdqt_rand() >> 60 : in[i - period]);
        memset(&z, 0, sizeof z);
        sdq__img_deflate(ctx, in, n, &z);
        error = sdq__img_inflate((const unsigned char *)z.s, z.len, out, n);
        SDQT_THAT(!error && memcmp(in, out, n) == 0, "%zu bytes of kind %zu: %s", n, kind,
                  error ? error : "differ");
        SDQT_CHECK(z.len < n + n / 50 + 200);
        sdq__str_free(ctx, &z);
    }
    close_ctx();
}

/* An index that is just beside the palette: one colour, pixels 0 and 1. */
static void test_png_palette(int tier) {
    static const unsigned char head[13] = {0, 0, 0, 2, 0, 0, 0, 1, 1, 3, 0, 0, 0}, red[3] = {255, 1, 2};
    /* one stored row: filter 0 and a byte of two pixels; the Adler-32 of {0, v} is 1+v, 2+v */
    unsigned char z[] = {0x78, 1, 1, 2, 0, 0xfd, 0xff, 0, 0, 0, 2, 0, 1}, buf[200];
    unsigned v;
    (void)tier;
    open_ctx(0);
    for (v = 0; v < 256; v += 64) {     /* the four pairs of pixels */
        size_t at = 8;
        sdq_image m;
        z[8] = (unsigned char)v;
        z[10] = (unsigned char)(2 + v);
        z[9] = (unsigned char)((2 + v) >> 8);
        z[11] = (unsigned char)((1 + v) >> 8);
        z[12] = (unsigned char)(1 + v);
        memcpy(buf, "\x89PNG\r\n\x1a\n", 8);
        at += put_chunk(buf + at, "IHDR", head, 13);
        at += put_chunk(buf + at, "PLTE", red, 3);
        at += put_chunk(buf + at, "IDAT", z, sizeof z);
        at += put_chunk(buf + at, "IEND", NULL, 0);
        if (v) failed(sdq_image_decode(ctx, buf, at, "made", &m), SDQ_ERR_FORMAT, "colour");
        else SDQT_CHECK(sdq_image_decode(ctx, buf, at, "made", &m) == SDQ_OK && m.c == 3 && m.px[5] == 2);
        sdq_image_free(ctx, &m);
    }
    close_ctx();
}

/* The hash in files: four lanes, by its definition in the manual, however the bytes come. */
static void test_hash(int tier) {
    unsigned char bytes[200];
    size_t n, i;
    (void)tier;
    for (i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)(i * i + 7);
    for (n = 0; n <= sizeof bytes; n++) {
        sdq__hash s = sdq__u_hash_begin(5);
        uint64_t lane[4] = {5, 6, 7, 8}, h = 5, w;
        for (i = 0; i < n / 32 * 32 + 32; i += 8) {
            w = 0;
            if (i < n) memcpy(&w, bytes + i, n - i < 8 ? n - i : 8);
            lane[i / 8 % 4] = sdq__u_mix(lane[i / 8 % 4], w);
        }
        for (i = 0; i < 4; i++) h = sdq__u_mix(h, lane[i]);
        h = sdq__u_mix(h, n);
        SDQT_CHECK(sdq__u_hash(5, bytes, n) == h);
        for (i = 0; i + 64 <= n; i += 64) sdq__u_hash_add(&s, bytes + i, 64);
        sdq__u_hash_add(&s, bytes + i, n - i);
        SDQT_CHECK(sdq__u_hash_end(&s) == h);
    }
}

/* Half precision and bfloat16: every finite value is itself, the middle of two goes to the even
 * one, a hair beside the middle to the nearer one; what is past the largest becomes infinite. */
static void test_half(int tier) {
    unsigned h, wrong = 0;
    (void)tier;
    for (h = 0; h < 0x7c00; h++) {
        const int e = (int)(h >> 10), m = (int)(h & 1023u);
        const float x = (float)ldexp(e ? 1024 + m : m, (e ? e : 1) - 25);
        const float next = x + (float)ldexp(1, (e ? e : 1) - 25), mid = x + 0.5f * (next - x);
        const uint16_t even = (uint16_t)(h + (h & 1u));
        wrong += sdq__u_from_f16((uint16_t)h) != x || sdq__u_to_f16(x) != h;
        wrong += sdq__u_to_f16(-x) != (h | 0x8000u) || sdq__u_to_f16(mid) != even;
        wrong += sdq__u_to_f16(nextafterf(mid, 0)) != h || sdq__u_to_f16(nextafterf(mid, 1e9f)) != h + 1;
    }
    SDQT_THAT(!wrong, "f16: %u wrong", wrong);
    for (h = 0; h < 0x7f80; h += 7) {
        const uint32_t low = h << 16, mid = low + 0x8000u;
        float x, y, a, b;
        memcpy(&x, &low, 4);
        memcpy(&y, &mid, 4);
        a = nextafterf(y, 0);
        b = nextafterf(y, INFINITY);
        wrong += sdq__u_from_bf16((uint16_t)h) != x || sdq__u_to_bf16(x) != h;
        wrong += sdq__u_to_bf16(y) != h + (h & 1u) || sdq__u_to_bf16(a) != h || sdq__u_to_bf16(b) != h + 1;
    }
    SDQT_THAT(!wrong, "bf16: %u wrong", wrong);
}

static void test_png_text(int tier) {
    static const sdq_pair text[2] = {{"parameters", "a cat\nSteps: 5"}, {"Title", "caf\xc3\xa9"}};
    static const sdq_pair bad[3] = {{"", "x"}, {"k\n", "x"}, {"k", "\xff"}};
    sdq_image m, r;
    unsigned char *png;
    size_t n, i;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_image_new(ctx, 3, 2, 3, &m) == SDQ_OK);
    SDQT_CHECK(sdq_image_write(ctx, DIR "/t.png", &m, text, 2) == SDQ_OK);
    png = get_file(DIR "/t.png", &n);
    SDQT_CHECK(n > 100 && memcmp(png + 37, "tEXtparameters\0a cat\nSteps: 5", 29) == 0);
    SDQT_CHECK(memcmp(png + 74, "iTXtTitle\0\0\0\0\0caf\xc3\xa9", 19) == 0);
    SDQT_CHECK(sdq_image_read(ctx, DIR "/t.png", &r) == SDQ_OK && r.w == 3 && r.h == 2 && r.c == 3);
    sdq_image_free(ctx, &r);
    for (i = 0; i < 3; i++)
        failed(sdq_image_write(ctx, DIR "/t.png", &m, &bad[i], 1), SDQ_ERR_ARGUMENT, "PNG text");
    failed(sdq_image_write(ctx, DIR "/no/t.png", &m, NULL, 0), SDQ_ERR_IO, "cannot be created");
    sdq_image_free(ctx, &m);
    failed(sdq_image_write(ctx, DIR "/t.png", &m, NULL, 0), SDQ_ERR_ARGUMENT, "not a picture");
    failed(sdq_image_new(ctx, 0, 1, 3, &m), SDQ_ERR_ARGUMENT, "0 x 1");
    failed(sdq_image_new(ctx, SIZE_MAX, 2, 3, &m), SDQ_ERR_ARGUMENT, "2^26");
    failed(sdq_image_new(ctx, 1, 1, 5, &m), SDQ_ERR_ARGUMENT, "channels");
    close_ctx();
}

static void test_ppm(int tier) {
    static const char wide[] = "P5\n# a comment\n2 1 # another\n65535\n\xff\xff\x80\x00";
    static const char low[] = "P6 1 1 3 \1\2\3";
    static const char *const bad[] = {
        "P6", "P6 1", "P6 1 1 0 abc", "P6 0 1 255 abc", "P6 x", "P6 1 1 70000 abcdef", "P6 1 1 255",
        "P6 99999999 99999999 255 a"};
    sdq_image m, r;
    size_t i, n;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_image_decode(ctx, wide, sizeof wide - 1, "wide", &m) == SDQ_OK && m.c == 1);
    SDQT_CHECK(m.px && m.px[0] == 255 && m.px[1] == 128);
    sdq_image_free(ctx, &m);
    SDQT_CHECK(sdq_image_decode(ctx, low, sizeof low - 1, "low", &m) == SDQ_OK && m.c == 3);
    SDQT_CHECK(m.px && m.px[0] == 85 && m.px[1] == 170 && m.px[2] == 255);
    SDQT_CHECK(sdq_image_write(ctx, DIR "/t.ppm", &m, NULL, 0) == SDQ_OK);
    SDQT_BYTES(get_file(DIR "/t.ppm", &n), "P6\n1 1\n255\n\x55\xaa\xff", 14);
    SDQT_CHECK(n == 14);
    SDQT_CHECK(sdq_image_read(ctx, DIR "/t.ppm", &r) == SDQ_OK && memcmp(r.px, m.px, 3) == 0);
    sdq_image_free(ctx, &r);
    sdq_image_free(ctx, &m);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        unsigned char *p = copy_of(bad[i], strlen(bad[i]));
        const sdq_status st = sdq_image_decode(ctx, p, strlen(bad[i]), "bad", &m);
        SDQT_THAT((st == SDQ_ERR_FORMAT || st == SDQ_ERR_UNSUPPORTED) && !m.px, "read: %s", bad[i]);
        sdq_clear_error(ctx);
        free(p);
    }
    failed(sdq_image_decode(ctx, "GIF89a", 6, "a gif", &m), SDQ_ERR_FORMAT, "a gif");
    failed(sdq_image_decode(ctx, "\xff\xd8\xff\xe0", 4, "photo", &m), SDQ_ERR_UNSUPPORTED, "JPEG");
    failed(sdq_image_read(ctx, DIR "/none.png", &m), SDQ_ERR_IO, "none.png");
    close_ctx();
}

static void test_resize(int tier) {
    static const size_t size[5][2] = {{16, 16}, {43, 29}, {100, 7}, {11, 60}, {1, 1}};
    static const char *const white[2] = {"6-8", "4-8"};
    const sdq_entry *source;
    sdq_file *f = NULL;
    sdq_image m, r;
    char name[32];
    size_t i;
    (void)tier;
    open_ctx(0);
    SDQT_CHECK(sdq_file_open(ctx, "tests/data/png.safetensors", &f) == SDQ_OK);
    if (!f) return;
    source = sdq_file_find(f, "source");
    SDQT_CHECK(sdq_image_new(ctx, source->dim[1], source->dim[0], 3, &m) == SDQ_OK);
    memcpy(m.px, source->data, source->bytes);
    for (i = 0; i < 5; i++) {
        (void)snprintf(name, sizeof name, "%zux%zu", size[i][0], size[i][1]);
        SDQT_CHECK(sdq_image_resize(ctx, &m, size[i][0], size[i][1], &r) == SDQ_OK);
        SDQT_THAT(same(&r, golden(f, "resize", name)), "resize to %s differs", name);
        sdq_image_free(ctx, &r);
        SDQT_CHECK(sdq_image_fit(ctx, &m, size[i][0], size[i][1], &r) == SDQ_OK);
        SDQT_THAT(same(&r, golden(f, "fit", name)), "fit to %s differs", name);
        sdq_image_free(ctx, &r);
    }
    failed(sdq_image_resize(ctx, &m, 0, 5, &r), SDQ_ERR_ARGUMENT, "0 x 5");
    failed(sdq_image_fit(ctx, &m, SIZE_MAX, 5, &r), SDQ_ERR_ARGUMENT, "cannot be made");
    sdq_image_free(ctx, &m);
    for (i = 0; i < 2; i++) {
        const sdq_entry *e = golden(f, "file", white[i]);
        SDQT_CHECK(e && sdq_image_decode(ctx, e->data, e->bytes, white[i], &m) == SDQ_OK);
        SDQT_CHECK(sdq_image_rgb(ctx, &m, &r) == SDQ_OK && same(&r, golden(f, "white", white[i])));
        sdq_image_free(ctx, &r);
        sdq_image_free(ctx, &m);
    }
    sdq_file_close(ctx, f);
    close_ctx();
}

/* --- datasets --- */

static void clear_folder(void) {
    static const char *const names[] = {
        "a.safetensors", "h.safetensors", "w", "m-1.safetensors", "m-2.safetensors",
        "m.fp16.safetensors", "m.safetensors.index.json", "t.png", "t.ppm", "metadata.jsonl",
        "metadata.csv", "b.ppm", "b.txt", "a.ppm", "a.txt", "c.ppm", "oom.png", "full.tmp"};
    char path[64];
    size_t i;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        (void)snprintf(path, sizeof path, DIR "/%s", names[i]);
        (void)remove(path);
    }
}

static void put_text(const char *path, const char *text) { put_file(path, text, strlen(text)); }

static void put_pictures(void) {
    put_text(DIR "/a.ppm", "P6 1 1 255 abc");
    put_text(DIR "/b.ppm", "P5 1 1 255 x");
    put_text(DIR "/c.ppm", "P6 1 1 255 abc");
}

static void test_dataset_layouts(int tier) {
    sdq_dataset *d = NULL;
    sdq_image m;
    (void)tier;
    open_ctx(0);
    clear_folder();
    failed(sdq_dataset_open(ctx, DIR, &d), SDQ_ERR_MISSING, "no picture");
    failed(sdq_dataset_open(ctx, DIR "/none", &d), SDQ_ERR_IO, "none");
    put_pictures();
    put_text(DIR "/b.txt", "second \n");
    put_text(DIR "/a.txt", "first");
    SDQT_CHECK(sdq_dataset_open(ctx, DIR, &d) == SDQ_OK && sdq_dataset_count(d) == 2);
    SDQT_CHECK(d && strcmp(sdq_dataset_caption(d, 0), "first") == 0);
    SDQT_CHECK(d && strcmp(sdq_dataset_caption(d, 1), "second") == 0);
    SDQT_CHECK(d && sdq_dataset_weight(d, 1) == 1);
    sdq_dataset_free(ctx, d);
    put_text(DIR "/a.txt", "\xef\xbb\xbf" "first");        /* as some editors save it */
    put_text(DIR "/12:30.PPM", "P6 1 1 255 abc");
    put_text(DIR "/12:30.txt", "a clock");
    SDQT_CHECK(sdq_dataset_open(ctx, DIR, &d) == SDQ_OK && sdq_dataset_count(d) == 3);
    SDQT_CHECK(d && strcmp(sdq_dataset_caption(d, 0), "a clock") == 0);
    SDQT_CHECK(d && strcmp(sdq_dataset_caption(d, 1), "first") == 0);
    sdq_dataset_free(ctx, d);
    (void)remove(DIR "/12:30.PPM");
    (void)remove(DIR "/12:30.txt");
    SDQT_CHECK(sdq_dataset_open(ctx, DIR, &d) == SDQ_OK && sdq_dataset_count(d) == 2);
    SDQT_CHECK(sdq_dataset_image(ctx, d, 1, &m) == SDQ_OK && m.c == 3);
    SDQT_CHECK(m.px && memcmp(m.px, "xxx", 3) == 0);
    sdq_image_free(ctx, &m);
    failed(sdq_dataset_image(ctx, d, 2, &m), SDQ_ERR_ARGUMENT, "there are 2");
    sdq_dataset_free(ctx, d);
    put_text(DIR "/metadata.csv", "\xef\xbb\xbftext,file_name,weight\r\n"
             "\"a, \"\"b\"\"\nc\",c.ppm,0.5\r\n\r\nplain,sub/a.ppm,\n");
    SDQT_CHECK(sdq_dataset_open(ctx, DIR, &d) == SDQ_OK && sdq_dataset_count(d) == 2);
    SDQT_CHECK(d && strcmp(sdq_dataset_caption(d, 0), "a, \"b\"\nc") == 0);
    SDQT_CHECK(d && sdq_dataset_weight(d, 0) == 0.5f && sdq_dataset_weight(d, 1) == 1);
    SDQT_CHECK(d && strcmp(sdq_dataset_path(d, 1), DIR "/sub/a.ppm") == 0);
    failed(sdq_dataset_image(ctx, d, 1, &m), SDQ_ERR_IO, "sub/a.ppm");
    sdq_dataset_free(ctx, d);
    put_text(DIR "/metadata.jsonl",
             "\xef\xbb\xbf{\"file_name\":\"a.ppm\",\"text\":\"one \\u00e9\",\"weight\":2}\n\n"
             "{\"text\":\"two\",\"file_name\":\"b.ppm\"}");
    SDQT_CHECK(sdq_dataset_open(ctx, DIR, &d) == SDQ_OK && sdq_dataset_count(d) == 2);
    SDQT_CHECK(d && strcmp(sdq_dataset_caption(d, 0), "one \xc3\xa9") == 0);
    SDQT_CHECK(d && sdq_dataset_weight(d, 0) == 2);
    SDQT_CHECK(d && strcmp(sdq_dataset_caption(d, 2), "") == 0);
    sdq_dataset_free(ctx, d);
    close_ctx();
}

static void test_dataset_refused(int tier) {
    static const struct { const char *name, *text, *error; } list[] = {
        {"jsonl", "{\"file_name\":\"../a.ppm\",\"text\":\"\"}", "leaves the folder"},
        {"jsonl", "{\"file_name\":\"x/../../a.ppm\",\"text\":\"\"}", "leaves the folder"},
        {"jsonl", "{\"file_name\":\"/etc/passwd\",\"text\":\"\"}", "leaves the folder"},
        {"jsonl", "{\"file_name\":\"a\\\\b\",\"text\":\"\"}", "leaves the folder"},
        {"jsonl", "{\"file_name\":\"\",\"text\":\"\"}", "leaves the folder"},
        {"jsonl", "{\"text\":\"\"}", "file_name or text"},
        {"jsonl", "{\"file_name\":\"a.ppm\"}", "file_name or text"},
        {"jsonl", "{\"file_name\":\"a.ppm\",\"text\":5}", "file_name or text"},
        {"jsonl", "{\"file_name\":\"a.ppm\",\"text\":\"\",\"weight\":-1}", "weight"},
        {"jsonl", "{\"file_name\":\"a.ppm\",\"text\":\"\",\"weight\":\"2\"}", "weight"},
        {"jsonl", "{\"file_name\":\"a.ppm\",\"text\":\"\"}\n{", "record 2"},
        {"jsonl", "[]", "file_name or text"},
        {"jsonl", "", "no picture"},
        {"csv", "file_name,text\n\"a.ppm,x\n", "not closed"},
        {"csv", "file,text\na.ppm,x\n", "file_name or text"},
        {"csv", "file_name,text\na.ppm\n", "file_name or text"},
        {"csv", "file_name,text\n..,x\n", "leaves the folder"},
        {"csv", "file_name,text,weight\na.ppm,x,much\n", "record 2"},
        {"csv", "", "no picture"}};
    sdq_dataset *d;
    char path[64];
    size_t i;
    (void)tier;
    open_ctx(0);
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        clear_folder();
        (void)snprintf(path, sizeof path, DIR "/metadata.%s", list[i].name);
        put_text(path, list[i].text);
        failed(sdq_dataset_open(ctx, DIR, &d), strcmp(list[i].error, "no picture") ? SDQ_ERR_FORMAT
               : SDQ_ERR_MISSING, list[i].error);
        SDQT_CHECK(d == NULL);
    }
    clear_folder();
    close_ctx();
}

/* --- memory --- */

/* Everything once; the first error ends it. */
static sdq_status use_all(void) {
    static const sdq_pair meta[1] = {{"k", "v"}};
    sdq_entry e[10];
    const size_t n = some_entries(e);
    sdq_file *f = NULL;
    sdq_dataset *d = NULL;
    sdq_image m, r;
    sdq_status st;
    memset(&m, 0, sizeof m);
    memset(&r, 0, sizeof r);
    st = sdq_file_write(ctx, DIR "/a.safetensors", e, n, meta, 1);
    if (st == SDQ_OK) st = sdq_file_open(ctx, DIR "/a.safetensors", &f);
    if (st == SDQ_OK) st = sdq_image_new(ctx, 20, 30, 4, &m);
    if (st == SDQ_OK) st = sdq_image_write(ctx, DIR "/oom.png", &m, meta, 1);
    if (st == SDQ_OK) { sdq_image_free(ctx, &m); st = sdq_image_read(ctx, DIR "/oom.png", &m); }
    if (st == SDQ_OK) st = sdq_image_fit(ctx, &m, 7, 7, &r);
    if (st == SDQ_OK) st = sdq_image_write(ctx, DIR "/t.ppm", &r, NULL, 0);
    if (st == SDQ_OK) st = sdq_dataset_open(ctx, DIR, &d);
    if (st == SDQ_OK) { sdq_image_free(ctx, &r); st = sdq_dataset_image(ctx, d, 0, &r); }
    sdq_dataset_free(ctx, d);
    sdq_image_free(ctx, &r);
    sdq_image_free(ctx, &m);
    sdq_file_close(ctx, f);
    return st;
}

static void test_oom(int tier) {
    size_t k;
    sdq_status st = SDQ_ERR_OOM;
    (void)tier;
    clear_folder();
    put_pictures();
    put_text(DIR "/metadata.jsonl", "{\"file_name\":\"a.ppm\",\"text\":\"one\"}\n");
    for (k = 1; k < 1000 && st != SDQ_OK; k++) {
        open_ctx(k);
        st = use_all();
        SDQT_THAT(st == SDQ_OK || (st == SDQ_ERR_OOM && sdq_last_error(ctx) == SDQ_ERR_OOM),
                  "allocation %zu: %s", k, sdq_error_text(ctx));
        close_ctx();
    }
    SDQT_CHECK(st == SDQ_OK && k > 30);
    SDQT_CHECK(access(DIR "/a.safetensors.tmp", F_OK) != 0);
    clear_folder();
}

static const sdqt_case cases[] = {
    {"hash", test_hash, 0},
    {"json_values", test_json_values, 0},
    {"json_refused", test_json_refused, 0},
    {"json_writer", test_json_writer, 0},
    {"st_round_trip", test_st_round_trip, 0},
    {"st_same_bytes", test_st_same_bytes, 0},
    {"st_hostile", test_st_hostile, 0},
    {"st_damage", test_st_damage, 0},
    {"st_write_errors", test_st_write_errors, 0},
    {"targets", test_targets, 0},
    {"locale", test_locale, 0},
    {"disk_full", test_disk_full, 0},
    {"st_shards", test_st_shards, 0},
    {"png_kinds", test_png_kinds, 0},
    {"png_damage", test_png_damage, 0},
    {"png_hostile", test_png_hostile, 0},
    {"deflate", test_deflate, 0},
    {"png_text", test_png_text, 0},
    {"ppm", test_ppm, 0},
    {"resize", test_resize, 0},
    {"dataset_layouts", test_dataset_layouts, 0},
    {"dataset_refused", test_dataset_refused, 0},
    {"half", test_half, 0},
    {"png_palette", test_png_palette, 0},
    {"oom", test_oom, 0},
};

int main(int argc, char **argv) {
    int bad;
    (void)mkdir(DIR, 0777);
    bad = SDQT_MAIN(argc, argv, cases);
    clear_folder();
    (void)rmdir(DIR);
    return bad;
}
