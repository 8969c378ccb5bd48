/* >>tokenizer: the ids of transformers 4.57's CLIPTokenizerFast for every text of
 * tests/golden/tokenizer.json, from all sources of a vocabulary; damage and short memory are
 * survived. Run from the project folder; makes and removes the folder test_tokenizer.d. */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

#include <sys/stat.h>
#include <unistd.h>

#define DIR "test_tokenizer.d"
#define EMOJI "examples/emoji/model/tokenizer"

static const char clip_merges[][97] = {
#include "../tools/clip_vocab.inc"
};

static sdq_ctx *ctx;

static void open_ctx(void) { SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK); }
static void close_ctx(void) { sdq_ctx_free(ctx); ctx = NULL; }

static void failed(sdq_status got, sdq_status want, const char *text) {
    SDQT_THAT(got == want && sdq_last_error(ctx) == want && strstr(sdq_error_text(ctx), text),
              "status %d, expected %d; \"%s\" should hold \"%s\"", (int)got, (int)want,
              sdq_error_text(ctx), text);
    sdq_clear_error(ctx);
}

/* The text's own ids are `list`, a JSON array. */
static void same_ids(const sdq_tokenizer *t, const char *text, const sdq__json *list) {
    static int32_t ids[65536];
    const sdq__json *v;
    size_t n = 0, i = 1, padded = sdq_tokenizer_length(t);
    SDQT_CHECK(sdq_tokenizer_encode(ctx, t, text, ids, sizeof ids / sizeof *ids, &n) == SDQ_OK);
    SDQT_THAT(n == list->count + 2, "\"%.60s\": %zu ids, expected %zu", text, n, list->count + 2);
    SDQT_CHECK(ids[0] == sdq_tokenizer_start(t));
    for (v = list->child; v && i < padded - 1; v = v->next, i++)
        SDQT_THAT((double)ids[i] == v->num, "\"%.60s\": id %zu is %d, expected %g", text, i, ids[i],
                  v->num);
    SDQT_CHECK(ids[i++] == sdq_tokenizer_end(t));
    for (; i < padded; i++) SDQT_CHECK(ids[i] == sdq_tokenizer_pad(t));
}

/* All ids of the padded form. */
static void same_padded(const sdq_tokenizer *t, const char *text, const sdq__json *list) {
    int32_t ids[128];
    const sdq__json *v;
    size_t i = 0;
    SDQT_CHECK(list->count == sdq_tokenizer_length(t) && list->count <= 128);
    if (list->count > 128) return;
    SDQT_CHECK(sdq_tokenizer_encode(ctx, t, text, ids, 128, NULL) == SDQ_OK);
    for (v = list->child; v; v = v->next, i++) SDQT_CHECK((double)ids[i] == v->num);
}

static void golden_texts(const sdq_tokenizer *t, const char *plain, const char *padded,
                         size_t length) {
    sdq__json *root = NULL;
    const sdq__json *c;
    SDQT_CHECK(sdq__js_load(ctx, "tests/golden/tokenizer.json", &root) == SDQ_OK);
    if (!root) return;
    c = sdq__js_get(root, "cases");
    SDQT_CHECK(c && c->count >= 100);
    for (c = c ? c->child : NULL; c; c = c->next) {
        const sdq__json *text = sdq__js_get(c, "text");
        if (!text || strlen(text->str) != text->len) continue;  /* a zero byte ends a C string */
        same_ids(t, text->str, sdq__js_get(c, plain));
        if (sdq_tokenizer_length(t) == length) same_padded(t, text->str, sdq__js_get(c, padded));
    }
    sdq__js_free(ctx, root);
}

static void test_clip_packed(int tier) {
    sdq_tokenizer *t = NULL;
    sdq_tokenizer_desc d;
    (void)tier;
    open_ctx();
    memset(&d, 0, sizeof d);
    SDQT_CHECK(sdq_tokenizer_create(ctx, clip_merges[0], sizeof clip_merges, NULL, &t) == SDQ_OK);
    SDQT_CHECK(t && sdq_tokenizer_vocab(t) == 49408 && sdq_tokenizer_length(t) == 77);
    SDQT_CHECK(t && sdq_tokenizer_start(t) == 49406 && sdq_tokenizer_end(t) == 49407);
    if (t) golden_texts(t, "clip", "clip_padded", 77);
    sdq_tokenizer_free(ctx, t);
    d.max_length = 60000;
    SDQT_CHECK(sdq_tokenizer_create(ctx, clip_merges[0], sizeof clip_merges, &d, &t) == SDQ_OK);
    if (t) golden_texts(t, "clip", "clip_padded", 77);
    sdq_tokenizer_free(ctx, t);
    close_ctx();
}

static void test_folder(int tier) {
    sdq_tokenizer *t = NULL, *u = NULL;
    sdq_tokenizer_desc d;
    char *merges = NULL;
    size_t bytes = 0;
    (void)tier;
    open_ctx();
    memset(&d, 0, sizeof d);
    SDQT_CHECK(sdq_tokenizer_load(ctx, EMOJI, &t) == SDQ_OK);
    if (t) golden_texts(t, "emoji", "emoji_padded", sdq_tokenizer_length(t));
    SDQT_CHECK(sdq__io_read(ctx, EMOJI "/merges.txt", 1 << 24, &merges, &bytes) == SDQ_OK);
    if (t) d.max_length = sdq_tokenizer_length(t);
    SDQT_CHECK(sdq_tokenizer_create(ctx, merges, bytes, &d, &u) == SDQ_OK);
    if (u) golden_texts(u, "emoji", "emoji_padded", sdq_tokenizer_length(u));
    SDQT_CHECK(t && u && sdq_tokenizer_vocab(t) == sdq_tokenizer_vocab(u));
    sdq_tokenizer_free(ctx, u);
    sdq_tokenizer_free(ctx, t);
    sdq__free(ctx, merges);
    failed(sdq_tokenizer_load(ctx, "tests/data", &t), SDQ_ERR_IO, "merges.txt");
    close_ctx();
}

static void copy_to(const char *from, const char *to) {
    char *text = NULL;
    size_t bytes = 0;
    SDQT_CHECK(sdq__io_read(ctx, from, 1 << 24, &text, &bytes) == SDQ_OK);
    SDQT_CHECK(text && sdq_bytes_write(ctx, to, text, bytes) == SDQ_OK);
    sdq__free(ctx, text);
}

static void put(const char *name, const char *text) {
    char path[64];
    (void)snprintf(path, sizeof path, DIR "/%s", name);
    SDQT_CHECK(sdq_bytes_write(ctx, path, text, strlen(text)) == SDQ_OK);
}

/* added_tokens.json counts unless the configuration lists its tokens, as in transformers; the
 * length is a whole number or says nothing. */
static void test_older_files(int tier) {
    static const char *const names[] = {"vocab.json", "merges.txt", "added_tokens.json",
                                        "tokenizer_config.json"};
    static const char *const lengths[][2] = {{"{\"model_max_length\": 1e30}", NULL},
        {"{\"model_max_length\": 0}", "model_max_length"},
        {"{\"model_max_length\": 100000}", "model_max_length"},
        {"{\"model_max_length\": \"77\"}", "model_max_length"}};
    sdq_tokenizer *t = NULL;
    int32_t ids[77] = {0};
    size_t i, n = 0;
    (void)tier;
    open_ctx();
    copy_to(EMOJI "/vocab.json", DIR "/vocab.json");
    copy_to(EMOJI "/merges.txt", DIR "/merges.txt");
    put("added_tokens.json", "{\"<cat-toy>\": 30000}");
    SDQT_CHECK(sdq_tokenizer_load(ctx, DIR, &t) == SDQ_OK);
    SDQT_CHECK(t && sdq_tokenizer_encode(ctx, t, "<Cat-toy> face", ids, 77, &n) == SDQ_OK);
    SDQT_CHECK(ids[1] == 30000 && n >= 4 && t && sdq_tokenizer_vocab(t) == 30001);
    sdq_tokenizer_free(ctx, t);
    put("tokenizer_config.json", "{\"added_tokens_decoder\": {}}");
    SDQT_CHECK(sdq_tokenizer_load(ctx, DIR, &t) == SDQ_OK);
    SDQT_CHECK(t && sdq_tokenizer_encode(ctx, t, "<cat-toy>", ids, 77, &n) == SDQ_OK);
    SDQT_CHECK(ids[1] != 30000);
    sdq_tokenizer_free(ctx, t);
    put("tokenizer_config.json", "{}");
    put("added_tokens.json", "{\"<cat-toy>\": -1}");
    failed(sdq_tokenizer_load(ctx, DIR, &t), SDQ_ERR_FORMAT, "added_tokens.json");
    (void)remove(DIR "/added_tokens.json");
    for (i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        put("tokenizer_config.json", lengths[i][0]);
        if (lengths[i][1]) {
            failed(sdq_tokenizer_load(ctx, DIR, &t), SDQ_ERR_UNSUPPORTED, lengths[i][1]);
            continue;
        }
        SDQT_CHECK(sdq_tokenizer_load(ctx, DIR, &t) == SDQ_OK && sdq_tokenizer_length(t) == 77);
        sdq_tokenizer_free(ctx, t);
    }
    for (i = 0; i < 4; i++) {
        char path[64];
        (void)snprintf(path, sizeof path, DIR "/%s", names[i]);
        (void)remove(path);
    }
    close_ctx();
}

static void ids_are(const sdq_tokenizer *t, const char *text, const int32_t *want, size_t n) {
    int32_t ids[77];
    size_t count = 0;
    SDQT_CHECK(sdq_tokenizer_encode(ctx, t, text, ids, 77, &count) == SDQ_OK);
    SDQT_THAT(count == n + 2 && memcmp(ids + 1, want, n * sizeof *want) == 0,
              "ids of \"%s\" differ", text);
}

/* Values of FACTS.md's section 7 and of transformers, written out: an oracle beside the file. */
static void test_known_ids(int tier) {
    static const int32_t cafe[] = {320, 15304, 530, 45911, 21628}, cat[] = {320, 22979, 2368};
    static const int32_t caps[] = {171, 105, 223, 1422, 158, 227, 367, 328, 16384, 11231, 127, 509};
    static const int32_t special[] = {320, 49407, 321}, bang[] = {1883, 0, 997, 0, 0};
    static const int32_t bang_clip[] = {1883, 256, 997, 748}, marks[] = {568, 713, 568, 8445, 338};
    static const int32_t bad_byte[] = {39802};
    sdq_tokenizer_desc d;
    sdq_tokenizer *t = NULL;
    (void)tier;
    open_ctx();
    SDQT_CHECK(sdq_tokenizer_create(ctx, clip_merges[0], sizeof clip_merges, NULL, &t) == SDQ_OK);
    ids_are(t, "a caf\xc3\xa9 in S\xc3\xa3o Paulo", cafe, 5);
    ids_are(t, "a cafe\xcc\x81 in Sa\xcc\x83o  PAULO\t", cafe, 5);      /* decomposed: NFC joins */
    ids_are(t, "a \xf0\x9f\x90\xb1 cat", cat, 3);
    ids_are(t, "\xef\xac\x81ne \xe2\x85\xa3 \xc4\xb0stanbul \xc3\x9f", caps, 12);
    ids_are(t, "a <|EndOfText|>b", special, 3);
    ids_are(t, "hi! there!!", bang_clip, 4);
    ids_are(t, "'S 't's''s", marks, 5);
    ids_are(t, "\xff", bad_byte, 1);
    ids_are(t, "", cat, 0);
    ids_are(t, " \n\t\xc2\xa0\xe3\x80\x80", cat, 0);
    sdq_tokenizer_free(ctx, t);
    memset(&d, 0, sizeof d);
    d.pad = "!";                                                    /* Stable Diffusion 2 */
    SDQT_CHECK(sdq_tokenizer_create(ctx, clip_merges[0], sizeof clip_merges, &d, &t) == SDQ_OK);
    SDQT_CHECK(t && sdq_tokenizer_pad(t) == 0);
    ids_are(t, "hi! there!!", bang, 5);
    sdq_tokenizer_free(ctx, t);
    close_ctx();
}

/* NFC of Python's unicodedata, then lower case. The whole of NormalizationTest.txt was run through
 * the same function when the tables were made: 95,370 pairs, no difference. */
static void test_nfc(int tier) {
    static const char *const list[][2] = {
        {"a\314\205\314\200", "a\314\205\314\200"},
        {"\341\204\200\314\200\341\205\241", "\341\204\200\314\200\341\205\241"},
        {"a\314\225\314\200\326\256\314\200b", "\303\240\326\256\314\200\314\225b"},
        {"a\314\247\314\201", "\303\241\314\247"},
        {"a\314\250\314\204", "\304\205\314\204"},
        {"e\314\202\314\201", "\341\272\277"},
        {"\341\204\200\341\205\241\341\206\250", "\352\260\201"},
        {"\352\260\200\341\206\250", "\352\260\201"},
        {"\341\204\200\341\205\241\341\204\200", "\352\260\200\341\204\200"},
        {"\342\204\253\342\204\246", "\303\245\317\211"},
        {"\340\245\230", "\340\244\225\340\244\274"},
        {"\315\204", "\314\210\314\201"},
        {"\341\272\233\314\243", "\341\272\233\314\243"},
        {"s\314\243\314\207", "\341\271\251"},
        {"\340\263\206\340\263\202\340\263\225", "\340\263\213"},
        {"\357\244\200\360\257\240\200", "\350\261\210\344\270\275"},
        {"\314\201a\314\201", "\314\201\303\241"},
        {"\341\200\246\341\200\256", "\341\200\246\341\200\256"},
        {"q\314\207\314\243", "q\314\243\314\207"},
        {"\360\235\205\236", "\360\235\205\227\360\235\205\245"},
    };
    size_t i;
    (void)tier;
    open_ctx();
    for (i = 0; i < sizeof list / sizeof *list; i++) {
        sdq__str s;
        memset(&s, 0, sizeof s);
        SDQT_CHECK(sdq__tok_normalise(ctx, list[i][0], list[i][0] + strlen(list[i][0]), &s)
                   == SDQ_OK);
        SDQT_THAT(s.s && strcmp(s.s, list[i][1]) == 0, "NFC %zu differs", i);
        sdq__str_free(ctx, &s);
    }
    close_ctx();
}

static void test_lengths(int tier) {
    static const int32_t want[6] = {49406, 320, 2165, 2368, 49407, 49407};
    static const int32_t cut[3] = {49406, 320, 49407};
    sdq_tokenizer_desc d;
    sdq_tokenizer *t = NULL;
    int32_t ids[8], one;
    size_t n = 0;
    (void)tier;
    open_ctx();
    memset(&d, 0, sizeof d);
    d.max_length = 6;
    SDQT_CHECK(sdq_tokenizer_create(ctx, clip_merges[0], sizeof clip_merges, &d, &t) == SDQ_OK);
    ids[6] = -7;
    SDQT_CHECK(sdq_tokenizer_encode(ctx, t, "a lovely cat", ids, 8, &n) == SDQ_OK && n == 5);
    SDQT_BYTES(ids, want, sizeof want);
    SDQT_CHECK(ids[6] == -7);
    ids[3] = -7;
    SDQT_CHECK(sdq_tokenizer_encode(ctx, t, "a lovely cat", ids, 3, &n) == SDQ_OK && n == 5);
    SDQT_BYTES(ids, cut, sizeof cut);
    SDQT_CHECK(ids[3] == -7);
    SDQT_CHECK(sdq_tokenizer_encode(ctx, t, "a lovely cat", NULL, 0, &n) == SDQ_OK && n == 5);
    failed(sdq_tokenizer_encode(ctx, t, "a", &one, 1, &n), SDQ_ERR_ARGUMENT, "room for one");
    sdq_tokenizer_free(ctx, t);
    d.max_length = 1;
    failed(sdq_tokenizer_create(ctx, "", 0, &d, &t), SDQ_ERR_ARGUMENT, "max_length");
    d.max_length = 0;
    d.pad = "pad";
    failed(sdq_tokenizer_create(ctx, "", 0, &d, &t), SDQ_ERR_ARGUMENT, "pad");
    close_ctx();
}

static void test_bad_merges(int tier) {
    static const char *const bad[] = {"a", "a b c", "a bb", "a  b", "xy z", "a b\nc",
                                      "#sdq-merges-64AAAAA", "#sdq-merges-64AAAAAA////AA"};
    sdq_tokenizer *t;
    size_t i;
    (void)tier;
    open_ctx();
    for (i = 0; i < sizeof bad / sizeof *bad; i++)
        failed(sdq_tokenizer_create(ctx, bad[i], strlen(bad[i]), NULL, &t), SDQ_ERR_FORMAT,
               "merge");
    SDQT_CHECK(sdq_tokenizer_create(ctx, "#version: 0.2\r\na b</w>\r\n", 23, NULL, &t) == SDQ_OK);
    SDQT_CHECK(t && sdq_tokenizer_vocab(t) == 515);
    sdq_tokenizer_free(ctx, t);
    SDQT_CHECK(sdq_tokenizer_create(ctx, "", 0, NULL, &t) == SDQ_OK);
    sdq_tokenizer_free(ctx, t);
    close_ctx();
}

/* Random bytes and random Unicode: an id for everything, the same every time, in fair time. */
static void test_any_text(int tier) {
    static char text[(1 << 20) + 2];
    sdq_tokenizer *t = NULL;
    int32_t ids[77], again[77];
    int round;
    (void)tier;
    open_ctx();
    SDQT_CHECK(sdq_tokenizer_create(ctx, clip_merges[0], sizeof clip_merges, NULL, &t) == SDQ_OK);
    for (round = 0; round < 2000; round++) {
        size_t n = 0, i, len = sdqt_below(60);
        while (n < len) {
            const uint32_t c = 1 + (uint32_t)sdqt_below(round % 2 ? 0x2fff : 0x10fffe);
            if (round % 5 == 0) text[n++] = (char)(unsigned char)(1 + sdqt_below(255));
            else n += sdq__js_put_utf8(text + n, c);
        }
        text[n] = 0;
        SDQT_CHECK(sdq_tokenizer_encode(ctx, t, text, ids, 77, NULL) == SDQ_OK);
        SDQT_CHECK(sdq_tokenizer_encode(ctx, t, text, again, 77, NULL) == SDQ_OK);
        SDQT_BYTES(ids, again, sizeof ids);
        for (i = 0; i < 77; i++) SDQT_CHECK(ids[i] >= 0 && ids[i] < 49408);
    }
    for (round = 0; round < 3; round++) {       /* one word or one heap of marks of a megabyte */
        size_t i, n = 0;
        for (i = 0; n < (1 << 20) - 1 && i < 1 << 20; i++) {
            if (round < 2) text[n++] = (char)('a' + (round ? sdqt_below(26) : 0));
            else n += sdq__js_put_utf8(text + n, (uint32_t)(0x300 + sdqt_below(40)));
        }
        text[n] = 0;
        SDQT_CHECK(sdq_tokenizer_encode(ctx, t, text, ids, 77, &i) == SDQ_OK && i > 77);
    }
    memset(text, 'a', sizeof text - 1);
    failed(sdq_tokenizer_encode(ctx, t, text, ids, 77, NULL), SDQ_ERR_ARGUMENT, "2^20");
    sdq_tokenizer_free(ctx, t);
    close_ctx();
}

/* --- damaged folders, short memory --- */

static void put_text(const char *path, const char *text, size_t n) {
    FILE *f = fopen(path, "wb");
    SDQT_CHECK(f && fwrite(text, 1, n, f) == n);
    if (f) fclose(f);
}

static void remove_files(void) {
    (void)remove(DIR "/vocab.json");
    (void)remove(DIR "/merges.txt");
    (void)remove(DIR "/tokenizer_config.json");
    (void)remove(DIR "/special_tokens_map.json");
}

static const char small_vocab[] =
    "{\"a\":0,\"b\":1,\"a</w>\":2,\"b</w>\":3,\"ab</w>\":4,\"<s>\":5,\"</s>\":6}";
static const char small_config[] = "{\"model_max_length\":5,\"bos_token\":{\"content\":\"<s>\"},"
    "\"eos_token\":\"</s>\",\"unk_token\":\"</s>\",\"pad_token\":\"b</w>\","
    "\"added_tokens_decoder\":{\"9\":{\"content\":\"<style>\"}}}";
static const char raw_config[] = "{\"model_max_length\":5,\"bos_token\":\"<s>\","
    "\"eos_token\":\"</s>\",\"unk_token\":\"</s>\",\"pad_token\":\"b</w>\","
    "\"added_tokens_decoder\":{\"9\":{\"content\":\"<New>\",\"normalized\":false}}}";
static const char word_config[] = "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\","
    "\"added_tokens_decoder\":{\"9\":{\"content\":\"new\",\"single_word\":true}}}";
static const char small_merges[] = "#version: 0.2\na b</w>\n";

static void put_small(void) {
    put_text(DIR "/vocab.json", small_vocab, strlen(small_vocab));
    put_text(DIR "/merges.txt", small_merges, strlen(small_merges));
    put_text(DIR "/tokenizer_config.json", small_config, strlen(small_config));
}

static void test_small_folder(int tier) {
    static const int32_t want[5] = {5, 4, 9, 6, 3}, raw_want[5] = {5, 2, 9, 4, 6};
    sdq_tokenizer *t = NULL;
    int32_t ids[5] = {0};
    size_t i;
    (void)tier;
    open_ctx();
    put_small();
    SDQT_CHECK(sdq_tokenizer_load(ctx, DIR, &t) == SDQ_OK && sdq_tokenizer_vocab(t) == 10);
    SDQT_CHECK(t && sdq_tokenizer_encode(ctx, t, "AB<style>", ids, 5, NULL) == SDQ_OK);
    SDQT_BYTES(ids, want, sizeof want);
    SDQT_CHECK(t && sdq_tokenizer_encode(ctx, t, "z", ids, 5, NULL) == SDQ_OK && ids[1] == 6);
    sdq_tokenizer_free(ctx, t);
    /* a token that is found before the text is made lower case, and one that asks for too much */
    put_text(DIR "/tokenizer_config.json", raw_config, strlen(raw_config));
    SDQT_CHECK(sdq_tokenizer_load(ctx, DIR, &t) == SDQ_OK);
    SDQT_CHECK(t && sdq_tokenizer_encode(ctx, t, "a<New>AB", ids, 5, NULL) == SDQ_OK);
    SDQT_BYTES(ids, raw_want, sizeof raw_want);
    SDQT_CHECK(t && sdq_tokenizer_encode(ctx, t, "<new>", ids, 5, &i) == SDQ_OK && i > 3);
    sdq_tokenizer_free(ctx, t);
    put_text(DIR "/tokenizer_config.json", word_config, strlen(word_config));
    failed(sdq_tokenizer_load(ctx, DIR, &t), SDQ_ERR_UNSUPPORTED, "single_word");
    put_small();
    for (i = 0; i < strlen(small_vocab); i++) {
        put_text(DIR "/vocab.json", small_vocab, i);
        SDQT_CHECK(sdq_tokenizer_load(ctx, DIR, &t) == SDQ_ERR_FORMAT && !t);
        sdq_clear_error(ctx);
    }
    put_small();
    for (i = 0; i < strlen(small_config); i++) {
        put_text(DIR "/tokenizer_config.json", small_config, i);
        SDQT_CHECK(sdq_tokenizer_load(ctx, DIR, &t) == SDQ_ERR_FORMAT && !t);
        sdq_clear_error(ctx);
    }
    put_text(DIR "/tokenizer_config.json", "{}", 2);
    failed(sdq_tokenizer_load(ctx, DIR, &t), SDQ_ERR_MISSING, "<|startoftext|>");
    put_small();
    put_text(DIR "/vocab.json", "{\"a\":-1}", 8);
    failed(sdq_tokenizer_load(ctx, DIR, &t), SDQ_ERR_FORMAT, "vocab.json");
    put_text(DIR "/vocab.json", "[1]", 3);
    failed(sdq_tokenizer_load(ctx, DIR, &t), SDQ_ERR_FORMAT, "no JSON object");
    remove_files();
    close_ctx();
}

static void test_oom(int tier) {
    sdq_status st = SDQ_ERR_OOM;
    size_t k;
    (void)tier;
    put_small();
    for (k = 0; k < 500 && st != SDQ_OK; k++) {
        sdq_tokenizer *t = NULL, *u = NULL;
        sdqt_heap h;
        int32_t ids[8];
        memset(&h, 0, sizeof h);
        SDQT_CHECK(sdqt_ctx_of(&h, SDQ_TIER_AUTO, 0, &ctx) == SDQ_OK);
        sdqt_refuse(&h, k, 1);
        st = sdq_tokenizer_load(ctx, DIR, &t);
        if (st == SDQ_OK)
            st = sdq_tokenizer_create(ctx, small_merges, strlen(small_merges), NULL, &u);
        if (st == SDQ_OK) st = sdq_tokenizer_encode(ctx, u, "ab \xc3\xa9 z", ids, 8, NULL);
        SDQT_CHECK(st == SDQ_OK || (st == SDQ_ERR_OOM && sdq_last_error(ctx) == SDQ_ERR_OOM));
        sdq_tokenizer_free(ctx, u);
        sdq_tokenizer_free(ctx, t);
        close_ctx();
        SDQT_THAT(h.live == 0, "allocation %zu: %zu leaked", k, h.live);
    }
    SDQT_CHECK(st == SDQ_OK && k > 20);
    remove_files();
}

static const sdqt_case cases[] = {
    {"clip_packed", test_clip_packed, 0},
    {"folder", test_folder, 0},
    {"older_files", test_older_files, 0},
    {"known_ids", test_known_ids, 0},
    {"nfc", test_nfc, 0},
    {"lengths", test_lengths, 0},
    {"bad_merges", test_bad_merges, 0},
    {"any_text", test_any_text, 0},
    {"small_folder", test_small_folder, 0},
    {"oom", test_oom, 0},
};

int main(int argc, char **argv) {
    int bad;
    (void)mkdir(DIR, 0777);
    bad = SDQT_MAIN(argc, argv, cases);
    remove_files();
    (void)rmdir(DIR);
    return bad;
}
