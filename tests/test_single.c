/* >>single-file and the layouts of folders: one model written in every layout by
 * tools/random_sd.c is the same model to the bit; what is something else, or damaged, is refused
 * with a sentence that says what it is. Run from the project folder; writes into
 * build/tests/single. Meant to be run under ASan and UBSan, too. */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#define RANDOM_SD_NO_MAIN
#include "../tools/random_sd.c"
#include "sdq_test.h"

#define DIR "build/tests/single"
#define VAE2(a, b, count) \
    RSD_JSON({"_class_name": "AutoencoderKL", "sample_size": 64, "in_channels": 3, \
              "out_channels": 3, "latent_channels": 4, "block_out_channels": [a, b], \
              "layers_per_block": count, \
              "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], \
              "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], \
              "norm_num_groups": 32, "scaling_factor": 0.18215})

/* Relatives of SD 1 and SD 2 with 480 merges. They differ in all that may differ: layers, levels,
 * which levels have attention, whether the upsampling convolutions come first or second. */
static const rsd_spec small[2] = {
    {"small1", 0, 2, 2, 2, 1, 480, RSD_CLIP(994, 32, 48, 2, 1, "quick_gelu"),
     RSD_UNET("sample_size": 64, "block_out_channels": [32, 64], "layers_per_block": 2,
              "down_block_types": [RSD_DOWN, "DownBlock2D"],
              "up_block_types": ["UpBlock2D", RSD_UP],
              "attention_head_dim": 8, "cross_attention_dim": 32),
     VAE2(32, 64, 1)},
    {"small2", 1, 1, 3, 2, 7, 480, RSD_CLIP(994, 64, 96, 2, 1, "gelu"),
     RSD_UNET("sample_size": 64, "block_out_channels": [32, 64, 128], "layers_per_block": 1,
              "down_block_types": [RSD_DOWN, RSD_DOWN, RSD_DOWN],
              "up_block_types": [RSD_UP, RSD_UP, RSD_UP],
              "attention_head_dim": [1, 1, 2], "cross_attention_dim": 64,
              "use_linear_projection": true),
     VAE2(32, 32, 2)},
};
#define MERGES_BYTES (sizeof clip_merges[0] * (1 + 480 / CLIP_ROW))

static sdq_ctx *ctx;

static void begin(void) {
    sdq_ctx_desc d;
    memset(&d, 0, sizeof d);
    d.threads = 1;
    SDQT_CHECK(sdq_ctx_create(&d, &ctx) == SDQ_OK);
    (void)mkdir("build", 0777);
    (void)mkdir("build/tests", 0777);
    (void)mkdir(DIR, 0777);
}
static void end(void) {
    SDQT_THAT(sdq_last_error(ctx) == SDQ_OK, "%s", sdq_error_text(ctx));
    sdq_ctx_free(ctx);
}

/* The call failed with that status and a sentence that holds both texts. Clears the error. */
static void failed(sdq_status got, sdq_status want, const char *text, const char *more) {
    SDQT_THAT(got == want && sdq_last_error(ctx) == want && strstr(sdq_error_text(ctx), text)
              && strstr(sdq_error_text(ctx), more),
              "status %d, expected %d; \"%s\" should hold \"%s\" and \"%s\"", (int)got, (int)want,
              sdq_error_text(ctx), text, more);
    sdq_clear_error(ctx);
}

static void make(int which, sdq_dtype dtype, int single, const char *out) {
    SDQT_THAT(rsd_make(ctx, &small[which], dtype, single, out, 5) == SDQ_OK, "%s",
              sdq_error_text(ctx));
}

static sdq_pipeline_desc desc_of(void) {
    sdq_pipeline_desc d;
    memset(&d, 0, sizeof d);
    d.merges = clip_merges[0];
    d.merges_bytes = MERGES_BYTES;
    return d;
}

static sdq_status load(const char *path, sdq_pipeline **p) {
    const sdq_pipeline_desc d = desc_of();
    return sdq_pipeline_load(ctx, path, &d, p);
}

/* Loading is refused, as a pipeline and, with part > 0, as that network. */
static void refused(const char *path, sdq_status want, const char *text, const char *more,
                    sdq_part part) {
    sdq_pipeline *p;
    sdq_model *m;
    failed(load(path, &p), want, text, more);
    SDQT_CHECK(p == NULL);
    if (!part) return;
    failed(sdq_model_load(ctx, path, part, &m), want, text, "");
    SDQT_CHECK(m == NULL);
}

/* --- the same model in every layout --- */

/* Packed as it is read, a network has the same numbers: layers by the floats of their panels. */
static void same_packed(const char *path, sdq_part part, const sdq_model *whole) {
    sdq_model *m = NULL;
    size_t i;
    SDQT_THAT(sdq_model_load_packed(ctx, path, part, &m) == SDQ_OK, "%s", sdq_error_text(ctx));
    SDQT_CHECK(m && m->source == whole->source);
    for (i = 0; m && i < m->params; i++) {
        const sdq__param *p = &m->param[i];
        const sdq_tensor *want = sdq__md_tensor(&whole->param[i]), *own = sdq__md_tensor(p);
        const sdq_mark mark = sdq_arena_mark(ctx);
        if (p->layer && p->rank > 1)
            SDQT_CHECK(!own && sdq__ly_frozen(p->layer));
        SDQT_THAT(memcmp(own ? sdq_f32(own) : sdq__ly_thaw(ctx, p->layer), want->data,
                         sdq_tensor_count(want) * sizeof(float)) == 0, "%s of %s, packed", p->name,
                  path);
        sdq_arena_release(ctx, mark);
    }
    sdq_model_free(ctx, m);
}

static void same_part(const char *a, const char *b, sdq_part part) {
    sdq_model *m[2] = {NULL, NULL};
    size_t i;
    const char *name[2];
    SDQT_THAT(sdq_model_load(ctx, a, part, &m[0]) == SDQ_OK
              && sdq_model_load(ctx, b, part, &m[1]) == SDQ_OK, "%s", sdq_error_text(ctx));
    if (m[0] && m[1]) {
        const size_t n = sdq_model_param_count(m[0]);
        SDQT_CHECK(n == sdq_model_param_count(m[1]) && m[0]->source == m[1]->source);
        for (i = 0; i < n && i < sdq_model_param_count(m[1]); i++) {
            const sdq_tensor *x = sdq_model_param(m[0], i, &name[0]);
            const sdq_tensor *y = sdq_model_param(m[1], i, &name[1]);
            SDQT_THAT(strcmp(name[0], name[1]) == 0 && sdq_tensor_count(x) == sdq_tensor_count(y)
                      && memcmp(x->data, y->data, sdq_tensor_count(x) * sizeof(float)) == 0,
                      "%s of %s and of %s differ", name[0], a, b);
        }
    }
    if (m[0]) same_packed(b, part, m[0]);
    sdq_model_free(ctx, m[0]);
    sdq_model_free(ctx, m[1]);
}

static void put(float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) x[i] = sdqt_normal();
}

/* Equal results of all networks, bit for bit. */
static void same_results(const sdq_pipeline *a, const sdq_pipeline *b) {
    static const char *const text[2] = {"a cat! on mars", "Dog"};
    const sdq_pipeline *p[2];
    const size_t latent[4] = {1, 6, 5, 4};
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *x = sdq_tensor_new(ctx, SDQ_F32, 4, latent), *ids[2], *y[4][2];
    const float when = 321;
    sdq_unet_input in;
    sdq_txt2img_desc d;
    int i, k;
    p[0] = a;
    p[1] = b;
    put(sdq_f32(x), sdq_tensor_count(x));
    memset(&in, 0, sizeof in);
    memset(&d, 0, sizeof d);
    d.prompt = text[0];
    d.negative = text[1];
    d.steps = 3;
    d.width = d.height = 16;
    for (i = 0; i < 2; i++) {
        ids[i] = sdq_pipeline_ids(ctx, p[i], text, 2);
        y[0][i] = sdq_text_forward(ctx, p[i]->text, ids[i]);
        in.sample = x;
        in.timesteps = &when;
        in.context = sdq_text_forward(ctx, p[i]->text, sdq_pipeline_ids(ctx, p[i], text, 1));
        y[1][i] = sdq_unet_forward(ctx, p[i]->unet, &in, SDQ_FLOAT);
        y[2][i] = sdq_vae_decode(ctx, p[i]->vae, x, SDQ_FLOAT);
        y[3][i] = sdq_txt2img_latents(ctx, p[i], &d, NULL, NULL);
    }
    if (!SDQT_THAT(sdq_last_error(ctx) == SDQ_OK, "%s", sdq_error_text(ctx))) return;
    SDQT_BYTES(ids[0]->data, ids[1]->data, sdq_tensor_count(ids[0]) * sizeof(int32_t));
    for (k = 0; k < 4; k++) {
        const size_t n = sdq_tensor_count(y[k][0]);
        double sum = 0;
        size_t j;
        for (j = 0; j < n; j++) sum += fabs((double)sdq_f32(y[k][0])[j]);
        SDQT_THAT(n == sdq_tensor_count(y[k][1])
                  && memcmp(y[k][0]->data, y[k][1]->data, n * sizeof(float)) == 0,
                  "result %d differs", k);
        SDQT_THAT(sum / (double)n > 0.01 && sum / (double)n < 100, "result %d: mean size %g", k,
                  sum / (double)n);
    }
    sdq_arena_release(ctx, mark);
}

static void test_same(int tier) {
    static const sdq_dtype dtype[4] = {SDQ_F16, SDQ_F32, SDQ_BF16, SDQ_F16};
    int k, part;
    (void)tier;
    begin();
    for (k = 0; k < 4; k++) {
        const int which = k % 2;
        sdq_pipeline *p[2] = {NULL, NULL};
        make(which, dtype[k], 0, DIR "/folder");
        make(which, dtype[k], 1, DIR "/single.safetensors");
        for (part = SDQ_PART_TEXT; part < SDQ_PART_COUNT; part++)
            same_part(DIR "/folder", DIR "/single.safetensors", (sdq_part)part);
        if (k > 1) continue;
        SDQT_THAT(load(DIR "/folder", &p[0]) == SDQ_OK
                  && load(DIR "/single.safetensors", &p[1]) == SDQ_OK, "%s", sdq_error_text(ctx));
        if (p[0] && p[1]) {
            same_results(p[0], p[1]);
            SDQT_CHECK(sdq_tokenizer_pad(p[1]->tokenizer) == (which ? 0 : 993));
            SDQT_CHECK(!p[0]->single && p[1]->single && strcmp(p[1]->because, "") != 0);
        }
        sdq_pipeline_free(ctx, p[0]);
        sdq_pipeline_free(ctx, p[1]);
    }
    end();
}

/* The same seed, the same bytes; another seed, others. */
static void test_generator(int tier) {
    char *text[3] = {NULL, NULL, NULL};
    size_t n[3] = {0, 0, 0};
    int i;
    (void)tier;
    begin();
    for (i = 0; i < 3; i++) {
        SDQT_CHECK(rsd_make(ctx, &small[0], SDQ_F16, 1, DIR "/g", i < 2 ? 8 : 9) == SDQ_OK);
        SDQT_CHECK(sdq__io_read(ctx, DIR "/g", (size_t)1 << 28, &text[i], &n[i]) == SDQ_OK);
    }
    SDQT_CHECK(n[0] > 1000 && n[0] == n[1] && memcmp(text[0], text[1], n[0]) == 0);
    SDQT_CHECK(n[0] == n[2] && memcmp(text[0], text[2], n[0]) != 0);
    for (i = 0; i < 3; i++) sdq__free(ctx, text[i]);
    SDQT_CHECK(!rsd_find("sd3") && rsd_find("sd15")->layers == 2);
    end();
}

/* --- files made of the arrays of another --- */

typedef struct edit { sdq_file *f; sdq_entry *e; size_t n; } edit;

static edit edit_open(const char *path) {
    edit w;
    size_t i;
    w.n = 0;
    w.e = NULL;
    if (!SDQT_THAT(sdq_file_open(ctx, path, &w.f) == SDQ_OK, "%s", sdq_error_text(ctx))) exit(1);
    w.e = (sdq_entry *)calloc(sdq_file_count(w.f) + 4, sizeof *w.e);
    if (!w.e) exit(1);
    for (; w.n < sdq_file_count(w.f); w.n++) w.e[w.n] = *sdq_file_entry(w.f, w.n);
    for (i = 0; i < w.n; i++) w.e[i].store = (sdq_dtype)0;
    return w;
}
/* Where an array is whose name holds `text`. */
static sdq_entry *edit_find(edit *w, const char *text) {
    size_t i;
    for (i = 0; i < w->n; i++)
        if (strstr(w->e[i].name, text)) return &w->e[i];
    SDQT_THAT(0, "no array %s", text);
    return w->e;
}
/* Drop, or keep, what has `prefix`. */
static void edit_drop(edit *w, const char *prefix, int keep) {
    size_t i, n = 0;
    for (i = 0; i < w->n; i++)
        if ((strncmp(w->e[i].name, prefix, strlen(prefix)) == 0) == keep) w->e[n++] = w->e[i];
    w->n = n;
}
static void edit_add(edit *w, const char *name, sdq_dtype dtype, size_t d0, size_t d1,
                     const void *data) {
    sdq_entry *e = &w->e[w->n++];
    size_t i;
    memset(e, 0, sizeof *e);
    e->name = name;
    e->dtype = dtype;
    e->rank = 2;
    for (i = 0; i < 8; i++) e->dim[i] = 1;
    e->dim[0] = d0;
    e->dim[1] = d1;
    e->bytes = d0 * d1 * rsd_width(dtype);
    e->data = data;
}
static void edit_save(edit *w, const char *path, const char *key, const char *value) {
    sdq_pair meta;
    meta.key = key;
    meta.value = value;
    SDQT_THAT(sdq_file_write(ctx, path, w->e, w->n, &meta, key != NULL) == SDQ_OK, "%s",
              sdq_error_text(ctx));
    sdq_file_close(ctx, w->f);
    free(w->e);
}

static sdq_file_info describe(const char *path) {
    sdq_file_info info;
    sdq_file *f;
    memset(&info, 0, sizeof info);
    if (SDQT_THAT(sdq_file_open(ctx, path, &f) == SDQ_OK, "%s", sdq_error_text(ctx))) {
        info = sdq_file_describe(f);
        sdq_file_close(ctx, f);
    }
    return info;
}

#define FIRST DIR "/sd1.safetensors"
#define SECOND DIR "/sd2.safetensors"
#define OUT DIR "/out.safetensors"

static void make_both(void) {
    static int made;
    begin();
    if (made) return;
    make(0, SDQ_F16, 1, FIRST);
    make(1, SDQ_F16, 1, SECOND);
    made = 1;
}

/* What the UNet predicts: the file's word, the step count, the family; the caller before all. */
static void predicts(const char *path, sdq_file_prediction asked, sdq_prediction want) {
    sdq_pipeline_desc d = desc_of();
    sdq_scheduler_desc s;
    sdq_pipeline *p = NULL;
    d.prediction = asked;
    if (!SDQT_THAT(sdq_pipeline_load(ctx, path, &d, &p) == SDQ_OK, "%s", sdq_error_text(ctx)))
        return;
    SDQT_CHECK(sdq_pipeline_scheduler(ctx, p, NULL, &s) == SDQ_OK);
    SDQT_THAT(s.prediction == want && p->prediction == want, "%s: predicts %d, expected %d", path,
              (int)s.prediction, (int)want);
    SDQT_CHECK(s.kind == SDQ_PNDM);
    SDQT_CHECK(sdq_model_get_info(p->unet).sample_size
               == (p->prediction == SDQ_PREDICT_V && strstr(path, "sd1") == NULL ? 384 : 256));
    sdq_pipeline_free(ctx, p);
}

static void test_prediction(int tier) {
    static const int64_t base = 875000, other = 110000;
    sdq_pipeline_desc d = desc_of();
    sdq_pipeline *p;
    edit w;
    (void)tier;
    make_both();
    predicts(FIRST, SDQ_FILE_PREDICTS_DEFAULT, SDQ_PREDICT_EPSILON);
    predicts(FIRST, SDQ_FILE_PREDICTS_V, SDQ_PREDICT_V);
    predicts(SECOND, SDQ_FILE_PREDICTS_DEFAULT, SDQ_PREDICT_V);
    predicts(SECOND, SDQ_FILE_PREDICTS_EPSILON, SDQ_PREDICT_EPSILON);
    w = edit_open(SECOND);
    edit_add(&w, "global_step", SDQ_I64, 1, 1, &base);
    edit_save(&w, OUT, NULL, NULL);
    predicts(OUT, SDQ_FILE_PREDICTS_DEFAULT, SDQ_PREDICT_EPSILON);
    predicts(OUT, SDQ_FILE_PREDICTS_V, SDQ_PREDICT_V);
    w = edit_open(SECOND);
    edit_add(&w, "global_step", SDQ_I64, 1, 1, &other);
    edit_save(&w, OUT, NULL, NULL);
    predicts(OUT, SDQ_FILE_PREDICTS_DEFAULT, SDQ_PREDICT_V);
    w = edit_open(SECOND);
    edit_save(&w, OUT, "modelspec.prediction_type", "epsilon");
    predicts(OUT, SDQ_FILE_PREDICTS_DEFAULT, SDQ_PREDICT_EPSILON);
    make(0, SDQ_F16, 0, DIR "/folder");
    d.prediction = SDQ_FILE_PREDICTS_V;
    failed(sdq_pipeline_load(ctx, DIR "/folder", &d, &p), SDQ_ERR_ARGUMENT, "is for single files",
           "scheduler_config.json");
    end();
}

/* Files that are something else are called by their name. */
static void test_kinds(int tier) {
    static float zeros[64 * 9 * 9 * 9];
    static const struct { const char *keep; sdq_file_kind kind; const char *title, *lacks; }
    alone[] = {
        {"first_stage_model.", SDQ_FILE_VAE, "a VAE alone", "without its VAE"},
        {"cond_stage_model.", SDQ_FILE_TEXT, "a text encoder alone", "without its text encoder"},
        {"model.diffusion_model.", SDQ_FILE_UNET, "a UNet alone", "without its UNet"}};
    static const struct { const char *name; sdq_file_kind kind; const char *title; } odd[] = {
        {"conditioner.embedders.0.transformer.x", SDQ_FILE_SDXL, "Stable Diffusion XL"},
        {"lora_unet_down_blocks_0.lora_down.weight", SDQ_FILE_LORA, "a LoRA"},
        {"unet.mid_block.to_q.lora_A.weight", SDQ_FILE_LORA, "a LoRA"},
        {"control_model.time_embed.0.weight", SDQ_FILE_CONTROLNET, "a ControlNet"},
        {"model.diffusion_model.joint_blocks.0.x", SDQ_FILE_OTHER, "another family"},
        {"model.diffusion_model.label_emb.0.0.weight", SDQ_FILE_OTHER, "another family"},
        {"emb_params", SDQ_FILE_EMBEDDING, "an embedding"},
        {"noise", SDQ_FILE_UNKNOWN, "sdq does not know"},
        {"encoder.x", SDQ_FILE_UNKNOWN, "sdq does not know"},
        {"text_model.embeddings.x", SDQ_FILE_TEXT, "a text encoder alone"},
        {"decoder.conv_in.weight", SDQ_FILE_VAE, "a VAE alone"}};
    size_t i;
    edit w;
    (void)tier;
    make_both();
    SDQT_CHECK(describe(FIRST).kind == SDQ_FILE_SD1 && describe(SECOND).kind == SDQ_FILE_SD2);
    SDQT_CHECK(describe(FIRST).dtype == SDQ_F16 && describe(FIRST).part[SDQ_PART_TEXT]);
    for (i = 0; i < SDQ__COUNT(alone); i++) {
        w = edit_open(FIRST);
        edit_drop(&w, alone[i].keep, 1);
        edit_save(&w, OUT, NULL, NULL);
        SDQT_CHECK(describe(OUT).kind == alone[i].kind);
        refused(OUT, SDQ_ERR_UNSUPPORTED, alone[i].title, "with UNet, VAE and text encoder",
                (sdq_part)0);
        w = edit_open(FIRST);
        edit_drop(&w, alone[i].keep, 0);
        edit_save(&w, OUT, NULL, NULL);
        SDQT_CHECK(describe(OUT).kind == SDQ_FILE_PARTS);
        refused(OUT, SDQ_ERR_UNSUPPORTED, alone[i].lacks, "a part of", (sdq_part)0);
    }
    for (i = 0; i < SDQ__COUNT(odd); i++) {
        const int whole = odd[i].kind != SDQ_FILE_EMBEDDING && odd[i].kind != SDQ_FILE_UNKNOWN
                       && odd[i].kind != SDQ_FILE_TEXT && odd[i].kind != SDQ_FILE_VAE;
        w = edit_open(SECOND);
        if (!whole) edit_drop(&w, "nothing", 1);
        edit_add(&w, odd[i].name, SDQ_F32, 2, 3, zeros);
        edit_save(&w, OUT, NULL, NULL);
        SDQT_THAT(describe(OUT).kind == odd[i].kind, "%s: %s", odd[i].name, describe(OUT).title);
        refused(OUT, SDQ_ERR_UNSUPPORTED, odd[i].title, "needs a single file", (sdq_part)0);
    }
    for (i = 8; i <= 9; i++) {
        sdq_entry *e;
        w = edit_open(FIRST);
        e = edit_find(&w, "model.diffusion_model.input_blocks.0.0.weight");
        e->dim[1] = i;
        e->bytes = 32 * i * 9 * 2;
        e->data = zeros;
        edit_save(&w, OUT, NULL, NULL);
        SDQT_CHECK(describe(OUT).kind == (i == 9 ? SDQ_FILE_INPAINT : SDQ_FILE_EDIT));
        refused(OUT, SDQ_ERR_UNSUPPORTED, i == 9 ? "inpainting model" : "editing model",
                "input channels", (sdq_part)0);
    }
    end();
}

/* --- damage --- */

static void test_damage(int tier) {
    static const float zeros[4096];
    static const struct { const char *name; sdq_part part; } gone[] = {
        {"model.diffusion_model.output_blocks.1.0.skip_connection.bias", SDQ_PART_UNET},
        {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight",
         SDQ_PART_UNET},
        {"model.diffusion_model.middle_block.2.emb_layers.1.weight", SDQ_PART_UNET},
        {"first_stage_model.decoder.up.1.upsample.conv.weight", SDQ_PART_VAE},
        {"first_stage_model.encoder.mid.attn_1.proj_out.bias", SDQ_PART_VAE},
        {"cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias", SDQ_PART_TEXT},
        {"cond_stage_model.model.ln_final.weight", SDQ_PART_TEXT}};
    static const struct { const char *name; sdq_part part; } told[] = {
        {"model.diffusion_model.out.2.weight", SDQ_PART_UNET},
        {"model.diffusion_model.time_embed.0.weight", SDQ_PART_UNET},
        {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight", SDQ_PART_UNET},
        {"first_stage_model.encoder.conv_in.weight", SDQ_PART_VAE},
        {"first_stage_model.decoder.conv_out.weight", SDQ_PART_VAE},
        {"first_stage_model.encoder.down.0.block.0.conv1.weight", SDQ_PART_VAE},
        {"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
         SDQ_PART_TEXT},
        {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
         SDQ_PART_TEXT}};
    size_t i;
    edit w;
    sdq_entry *e;
    (void)tier;
    make_both();
    for (i = 0; i < SDQ__COUNT(gone); i++) {
        w = edit_open(SECOND);
        *edit_find(&w, gone[i].name) = w.e[w.n - 1];
        w.n--;
        edit_save(&w, OUT, NULL, NULL);
        refused(OUT, SDQ_ERR_MISSING, gone[i].name, "is missing", gone[i].part);
        w = edit_open(SECOND);
        e = edit_find(&w, gone[i].name);
        e->dim[0] -= e->dim[0] / 2;             /* for in_proj: no multiple of 3 any more */
        e->bytes = sdq_entry_count(e) * rsd_width(e->dtype);
        edit_save(&w, OUT, NULL, NULL);
        refused(OUT, SDQ_ERR_SHAPE, gone[i].name, "the rest of the file asks for", gone[i].part);
        w = edit_open(SECOND);
        e = edit_find(&w, gone[i].name);
        e->dtype = SDQ_I16;
        edit_save(&w, OUT, NULL, NULL);
        refused(OUT, SDQ_ERR_UNSUPPORTED, gone[i].name, "stored as I16", gone[i].part);
    }
    for (i = 0; i < SDQ__COUNT(told); i++) {        /* what the configuration is read from */
        w = edit_open(FIRST);
        *edit_find(&w, told[i].name) = w.e[w.n - 1];
        w.n--;
        edit_save(&w, OUT, NULL, NULL);
        refused(OUT, SDQ_ERR_MISSING, told[i].name, "is missing", told[i].part);
    }
    w = edit_open(FIRST);
    edit_add(&w, "model.diffusion_model.input_blocks.1.0.extra", SDQ_F32, 2, 2, zeros);
    edit_save(&w, OUT, NULL, NULL);
    refused(OUT, SDQ_ERR_UNSUPPORTED, "input_blocks.1.0.extra [2,2]", "has no place",
            SDQ_PART_UNET);
    w = edit_open(FIRST);           /* channels that 32 groups do not divide, and no channel */
    e = edit_find(&w, "first_stage_model.encoder.down.0.block.0.conv1.weight");
    e->dim[0] = 0;
    e->bytes = 0;
    edit_save(&w, OUT, NULL, NULL);
    refused(OUT, SDQ_ERR_UNSUPPORTED, "block_out_channels", "out.safetensors", SDQ_PART_VAE);
    end();
}

/* Names without "text_model.", ids of another type, training's leftovers: read as usual. */
static void test_variants(int tier) {
    static char name[512][128];
    static const float ids[77];
    size_t i, n = 0;
    edit w;
    (void)tier;
    make_both();
    w = edit_open(FIRST);
    for (i = 0; i < w.n; i++) {
        const char *rest = strstr(w.e[i].name, ".text_model.");
        if (!rest || n == 512) continue;
        (void)snprintf(name[n], sizeof name[n], "cond_stage_model.transformer.%s", rest + 12);
        w.e[i].name = name[n++];
    }
    SDQT_CHECK(n > 30);
    *edit_find(&w, "position_ids") = w.e[w.n - 1];
    w.n--;
    edit_add(&w, "cond_stage_model.transformer.embeddings.position_ids", SDQ_F32, 1, 77, ids);
    edit_add(&w, "first_stage_model.loss.logvar", SDQ_F32, 1, 1, ids);
    edit_add(&w, "first_stage_model.model_ema.decay", SDQ_F32, 1, 1, ids);
    edit_add(&w, "cond_stage_model.transformer.visual_projection.weight", SDQ_F32, 1, 1, ids);
    edit_save(&w, OUT, NULL, NULL);
    for (i = SDQ_PART_TEXT; i < SDQ_PART_COUNT; i++) same_part(FIRST, OUT, (sdq_part)i);
    w = edit_open(SECOND);          /* attention as linear layers, as some programs save it */
    for (i = 0; i < w.n; i++)
        if (strstr(w.e[i].name, ".attn_1.") && w.e[i].rank == 4) w.e[i].rank = 2;
    edit_save(&w, OUT, NULL, NULL);
    same_part(SECOND, OUT, SDQ_PART_VAE);
    for (i = SDQ_PART_TEXT; i < SDQ_PART_COUNT; i++) {      /* the structure alone, new weights */
        sdq_model *m = NULL, *of = NULL;
        SDQT_CHECK(sdq_model_init(ctx, FIRST, (sdq_part)i, 1, &m) == SDQ_OK
                   && sdq_model_load(ctx, FIRST, (sdq_part)i, &of) == SDQ_OK);
        SDQT_CHECK(m && of && sdq_model_get_info(m).weights == sdq_model_get_info(of).weights);
        sdq_model_free(ctx, m);
        sdq_model_free(ctx, of);
    }
    end();
}

static void put_file(const char *path, const char *data, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!SDQT_CHECK(f != NULL)) return;
    SDQT_CHECK(fwrite(data, 1, n, f) == n);
    (void)fclose(f);
}

static void test_no_single(int tier) {
    static const char zip[] = "PK\3\4\0\0\10\10\0\0archive/data.pkl";
    static const char old[] = "\200\2\212\nl\374\234F\371 j\250P\31.";
    char *text = NULL;
    size_t n = 0;
    sdq_pipeline *p;
    sdq_pipeline_desc d = desc_of();
    (void)tier;
    make_both();
    SDQT_CHECK(sdq__io_read(ctx, FIRST, (size_t)1 << 28, &text, &n) == SDQ_OK);
    put_file(OUT, text, n - 1);
    refused(OUT, SDQ_ERR_FORMAT, "is the file complete?", OUT, SDQ_PART_UNET);
    put_file(OUT, text, 1000);
    refused(OUT, SDQ_ERR_FORMAT, "InvalidHeaderLength", OUT, SDQ_PART_UNET);
    put_file(OUT, text, 0);
    refused(OUT, SDQ_ERR_FORMAT, "HeaderTooSmall", OUT, SDQ_PART_UNET);
    sdq__free(ctx, text);
    put_file(DIR "/x.ckpt", zip, sizeof zip);
    refused(DIR "/x.ckpt", SDQ_ERR_UNSUPPORTED, "is a pickle", "torch.load('" DIR "/x.ckpt'",
            SDQ_PART_VAE);
    put_file(OUT, old, sizeof old);
    refused(OUT, SDQ_ERR_UNSUPPORTED, "is a pickle", "save_file", SDQ_PART_VAE);
    refused(DIR "/none.safetensors", SDQ_ERR_MISSING, "none.safetensors", "", (sdq_part)0);
    d.merges = NULL;
    failed(sdq_pipeline_load(ctx, FIRST, &d, &p), SDQ_ERR_MISSING, "holds no tokenizer",
           "clip_vocab.inc");
    d.merges = clip_merges[0];      /* all of CLIP's: more ids than this text encoder has */
    d.merges_bytes = sizeof clip_merges;
    failed(sdq_pipeline_load(ctx, FIRST, &d, &p), SDQ_ERR_SHAPE, "has 994 ids", "49408");
    end();
}

/* Bytes of the header changed at random: success or a sentence, never a wrong read. */
static void test_fuzz(int tier) {
    char *text = NULL;
    size_t n = 0, header, i, k, fine = 0;
    (void)tier;
    make_both();
    SDQT_CHECK(sdq__io_read(ctx, SECOND, (size_t)1 << 28, &text, &n) == SDQ_OK);
    header = text ? (unsigned char)text[0] + 256u * (unsigned char)text[1] : 0;
    put_file(OUT, text, n);
    for (i = 0; text && i < 90; i++) {
        FILE *f = fopen(OUT, "r+b");
        long at[3];
        sdq_model *m = NULL;
        if (!SDQT_CHECK(f != NULL)) break;
        for (k = 0; k < 3; k++) {
            at[k] = (long)(8 + sdqt_below(header));
            (void)fseek(f, at[k], SEEK_SET);
            (void)fputc("0123456789x.[]"[sdqt_below(14)], f);
        }
        (void)fclose(f);
        if (sdq_model_load(ctx, OUT, (sdq_part)(1 + i % 3), &m) == SDQ_OK) fine++;
        else SDQT_CHECK(m == NULL && strlen(sdq_error_text(ctx)) > 20);
        sdq_clear_error(ctx);
        sdq_model_free(ctx, m);
        f = fopen(OUT, "r+b");
        for (k = 0; f && k < 3; k++) {
            (void)fseek(f, at[k], SEEK_SET);
            (void)fputc(text[at[k]], f);
        }
        if (f) (void)fclose(f);
    }
    SDQT_THAT(fine < 90, "%zu of 90 damaged files were read", fine);
    same_part(SECOND, OUT, SDQ_PART_TEXT);      /* and whole again */
    sdq__free(ctx, text);
    end();
}

/* --- folders --- */

#define UNET DIR "/folder/unet/diffusion_pytorch_model"

/* The UNet's arrays in two shards, as diffusers names them; the index is written, or `index`. */
static void make_shards(const char *variant, const char *index_path, const char *index) {
    char path[2][128], *text;
    sdq__str s;
    edit w = edit_open(UNET ".safetensors");
    const size_t half = w.n / 2;
    size_t i;
    memset(&s, 0, sizeof s);
    sdq__str_format(ctx, &s, "{\"metadata\": {\"total_size\": 1}, \"weight_map\": {");
    for (i = 0; i < 2; i++) {
        (void)snprintf(path[i], sizeof path[i], "%s%s-%05u-of-00002.safetensors", UNET, variant,
                       (unsigned)i + 1);
        SDQT_CHECK(sdq_file_write(ctx, path[i], w.e + i * half, i ? w.n - half : half, NULL, 0)
                   == SDQ_OK);
    }
    for (i = 0; i < w.n; i++)
        sdq__str_format(ctx, &s, "%s\"%s\": \"%s\"", i ? ", " : "", w.e[i].name,
                        strrchr(path[i >= half], '/') + 1);
    sdq__str_format(ctx, &s, "}}");
    text = s.s;
    put_file(index_path, index ? index : text, strlen(index ? index : text));
    sdq__str_free(ctx, &s);
    sdq_file_close(ctx, w.f);
    free(w.e);
}

/* A text encoder of which config.json wants fewer layers, saved with what others need. */
static void more_text(void) {
    static const char from[] = DIR "/folder/text_encoder/model.safetensors";
    edit w = edit_open(from);
    edit_add(&w, "text_model.encoder.layers.7.mlp.fc1.bias", SDQ_F32, 1, 1, "0000");
    edit_add(&w, "text_projection.weight", SDQ_F32, 1, 1, "0000");
    edit_add(&w, "logit_scale", SDQ_F32, 1, 1, "0000");
    edit_save(&w, OUT, NULL, NULL);
    (void)rename(from, DIR "/kept2");
    (void)rename(OUT, from);
    same_part(DIR "/same", DIR "/folder", SDQ_PART_TEXT);
    w = edit_open(from);
    edit_add(&w, "text_model.encoder.layers.0.mlp.fc9.bias", SDQ_F32, 1, 1, "0000");
    edit_save(&w, OUT, NULL, NULL);
    (void)rename(OUT, from);
    refused(DIR "/folder", SDQ_ERR_UNSUPPORTED, "layers.0.mlp.fc9.bias", "has no place",
            SDQ_PART_TEXT);
    (void)rename(DIR "/kept2", from);
}

static void test_folders(int tier) {
    static const char index[] = UNET ".safetensors.index.json";
    static const char half[] = UNET ".safetensors.index.fp16.json";
    sdq_model *m;
    (void)tier;
    make_both();
    make(0, SDQ_F16, 0, DIR "/folder");
    make(0, SDQ_F16, 0, DIR "/same");
    make_shards("", index, NULL);
    make_shards(".fp16", half, NULL);
    (void)rename(UNET ".safetensors", DIR "/kept");
    (void)remove(half);
    same_part(DIR "/same", DIR "/folder", SDQ_PART_UNET);           /* shards */
    same_part(FIRST, DIR "/folder/unet", SDQ_PART_UNET);            /* the network's own folder */
    put_file(DIR "/folder/config.json", "{}", 2);                   /* nobody's */
    same_part(FIRST, DIR "/folder", SDQ_PART_UNET);
    (void)remove(DIR "/folder/config.json");
    more_text();
    (void)rename(DIR "/kept", UNET ".safetensors");
    make_shards("", index, "{\"weight_map\": {\"conv_in.weight\": \"../x.safetensors\"}}");
    (void)rename(UNET ".safetensors", DIR "/kept");
    refused(DIR "/folder", SDQ_ERR_FORMAT, "'..'", index, SDQ_PART_UNET);
    put_file(index, "{\"weight_map\": {\"a\": \"b/x.safetensors\"}}", 40);
    refused(DIR "/folder", SDQ_ERR_FORMAT, "'/'", index, SDQ_PART_UNET);
    put_file(index, "{\"weight_map\": {\"a\": \"x.safetensors\"}}", 38);
    refused(DIR "/folder", SDQ_ERR_MISSING, "a shard is missing", "unet/x.safetensors",
            SDQ_PART_UNET);
    put_file(index, "{\"weight_map\": {\"a\": \"x\", \"a\": \"y\"}}", 36);
    refused(DIR "/folder", SDQ_ERR_FORMAT, "not valid JSON", index, SDQ_PART_UNET);
    (void)rename(DIR "/kept", UNET ".safetensors");
    make_shards(".fp16", half, NULL);
    (void)remove(index);
    (void)rename(UNET ".safetensors", UNET ".fp16.safetensors");    /* half precision alone */
    same_part(DIR "/same", DIR "/folder", SDQ_PART_UNET);
    (void)rename(UNET ".fp16.safetensors", DIR "/kept");            /* and its shards */
    same_part(DIR "/same", DIR "/folder", SDQ_PART_UNET);
    (void)rename(UNET ".fp16-00002-of-00002.safetensors", UNET ".x");
    refused(DIR "/folder", SDQ_ERR_MISSING, "a shard is missing", "00002-of-00002", SDQ_PART_UNET);
    {   /* an array in two shards */
        edit w = edit_open(UNET ".x");
        edit_add(&w, "conv_in.bias", SDQ_F32, 1, 1, "0000");
        edit_save(&w, UNET ".fp16-00002-of-00002.safetensors", NULL, NULL);
        refused(DIR "/folder", SDQ_ERR_FORMAT, "conv_in.bias is in two shards", "00001-of-00002",
                SDQ_PART_UNET);
    }
    (void)remove(half);
    refused(DIR "/folder", SDQ_ERR_MISSING, "diffusion_pytorch_model.safetensors: not found",
            "fp16", SDQ_PART_UNET);
    put_file(UNET ".safetensors", "version https://git-lfs.github.com/spec/v1\n", 43);
    refused(DIR "/folder", SDQ_ERR_FORMAT, "git-lfs", "git lfs pull", SDQ_PART_UNET);
    (void)remove(UNET ".safetensors");
    put_file(UNET ".bin", "PK\3\4", 4);
    refused(DIR "/folder", SDQ_ERR_UNSUPPORTED, UNET ".bin: is a pickle", "save_pretrained",
            SDQ_PART_UNET);
    (void)rename(DIR "/folder/text_encoder/model.safetensors", DIR "/kept2");
    put_file(DIR "/folder/text_encoder/pytorch_model.bin", "PK\3\4", 4);
    failed(sdq_model_load(ctx, DIR "/folder", SDQ_PART_TEXT, &m), SDQ_ERR_UNSUPPORTED,
           "pytorch_model.bin: is a pickle", "save_pretrained");
    (void)remove(UNET ".bin");
    (void)remove(DIR "/folder/text_encoder/pytorch_model.bin");
    end();
}

/* --- quantized --- */

/* The UNet of the single file quantized: the file belongs to this model, in both layouts, and says
 * what it is. */
static void test_int8(int tier) {
    sdq_pipeline_desc d = desc_of();
    sdq_pipeline *p = NULL;
    sdq_recipe r = sdq_recipe_default();
    sdq_model *m = NULL;
    size_t i;
    (void)tier;
    make_both();
    SDQT_CHECK(sdq_model_load(ctx, SECOND, SDQ_PART_UNET, &m) == SDQ_OK);
    r.range_linear = r.range_conv = SDQ_RANGE_PICTURE;
    SDQT_CHECK(m && sdq_recipe_apply(ctx, m, &r, NULL) == SDQ_OK);
    SDQT_CHECK(m && sdq_model_convert(ctx, m) == SDQ_OK);
    SDQT_THAT(m && sdq_model_save_int8(ctx, m, OUT, NULL, "test") == SDQ_OK, "%s",
              sdq_error_text(ctx));
    sdq_model_free(ctx, m);
    SDQT_CHECK(describe(OUT).kind == SDQ_FILE_INT8);
    d.unet_int8 = OUT;
    for (i = 0; i < 2; i++) {
        d.int8_only = (int)i;
        SDQT_THAT(sdq_pipeline_load(ctx, SECOND, &d, &p) == SDQ_OK && p->unet_int8, "%s",
                  sdq_error_text(ctx));
        sdq_pipeline_free(ctx, p);
    }
    make(1, SDQ_F16, 0, DIR "/folder");
    SDQT_THAT(sdq_pipeline_load(ctx, DIR "/folder", &d, &p) == SDQ_OK, "%s", sdq_error_text(ctx));
    sdq_pipeline_free(ctx, p);
    failed(sdq_pipeline_load(ctx, FIRST, &d, &p), SDQ_ERR_FORMAT, "another UNet", FIRST);
    refused(OUT, SDQ_ERR_UNSUPPORTED, "quantized to int8", "needs a single file", (sdq_part)0);
    end();
}

/* --- memory --- */

/* Loading `path` with allocation number fail_at refused: 1 when it succeeded all the same. */
static int load_short(const char *path, sdq_part part, size_t fail_at) {
    sdq_pipeline *p = NULL;
    sdq_model *m = NULL;
    sdq_status st;
    sdqt_heap h;
    memset(&h, 0, sizeof h);
    SDQT_CHECK(sdqt_ctx_of(&h, SDQ_TIER_AUTO, 1, &ctx) == SDQ_OK);
    sdqt_refuse(&h, fail_at, 1);
    st = part ? sdq_model_load(ctx, path, part, &m) : load(path, &p);
    SDQT_THAT(st == SDQ_OK || (st == SDQ_ERR_OOM && !p && !m), "allocation %zu: status %d, %s",
              fail_at, (int)st, sdq_error_text(ctx));
    sdq_model_free(ctx, m);
    sdq_pipeline_free(ctx, p);
    sdq_ctx_free(ctx);
    SDQT_THAT(h.live == 0, "allocation %zu: %zu leaked", fail_at, h.live);
    return st == SDQ_OK;
}

static void test_memory(int tier) {
    size_t i;
    int part;
    (void)tier;
    make_both();
    make(0, SDQ_F16, 0, DIR "/folder");
    end();
    for (part = 0; part < SDQ_PART_COUNT; part++) {
        for (i = 0; i < 100000 && !load_short(SECOND, (sdq_part)part, i); i += 1 + i / 16) {}
        SDQT_THAT(i > 50, "part %d: only %zu allocations", part, i);
    }
    for (i = 0; i < 100000 && !load_short(DIR "/folder", (sdq_part)0, i); i += 1 + i / 8) {}
}

/* Texts of config.json that mean the same UNet, and such that do not. */
static void test_config(int tier) {
    static const struct { const char *a, *b; int same; } pair[] = {
        {"{}", "{\"sample_size\": 32, \"dropout\": 1, \"in_channels\": 4}", 1},
        {"{\"attention_head_dim\": 8}", "{\"attention_head_dim\": [8, 8, 8, 8]}", 1},
        {"{\"attention_head_dim\": [5, 8]}", "{\"attention_head_dim\": 5}", 0},
        {"{\"layers_per_block\": [2, 1]}", "{\"layers_per_block\": [2]}", 0},
        {"{\"layers_per_block\": []}", "{\"layers_per_block\": 2}", 0},
        {"{\"use_linear_projection\": true}", "{}", 0},
        {"{\"mid_block_type\": null}", "{}", 0},
        {"{\"mid_block_type\": \"UNetMidBlock2DCrossAttn\"}", "{}", 1},
        {"{\"down_block_types\": [\"DownBlock2D\"]}", "{\"down_block_types\": [\"DownBlock2D\"]} ",
         1}};
    size_t i;
    int same;
    (void)tier;
    begin();
    for (i = 0; i < SDQ__COUNT(pair); i++) {
        SDQT_CHECK(sdq__cv_same_config(ctx, "q", pair[i].a, pair[i].b, &same) == SDQ_OK);
        SDQT_THAT(same == pair[i].same, "%s and %s", pair[i].a, pair[i].b);
        SDQT_CHECK(sdq__cv_same_config(ctx, "q", pair[i].b, pair[i].a, &same) == SDQ_OK);
        SDQT_THAT(same == pair[i].same, "%s and %s", pair[i].b, pair[i].a);
    }
    failed(sdq__cv_same_config(ctx, "q", "{}", "{", &same), SDQ_ERR_FORMAT, "config.json", "JSON");
    end();
}

static const sdqt_case cases[] = {
    {"generator", test_generator, 0}, {"same", test_same, 0}, {"prediction", test_prediction, 0},
    {"kinds", test_kinds, 0}, {"damage", test_damage, 0}, {"variants", test_variants, 0},
    {"no-single", test_no_single, 0}, {"fuzz", test_fuzz, 0}, {"folders", test_folders, 0},
    {"int8", test_int8, 0}, {"memory", test_memory, 0}, {"config", test_config, 0}};

int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
