/* random_sd - write a Stable Diffusion checkpoint with random weights: for tests and for speed.
 *
 *     cc -O2 tools/random_sd.c -o build/random_sd -lm
 *     build/random_sd sd15|sd21|tiny1|tiny2 F32|F16 folder|single OUT [SEED]
 *
 * sd15 and sd21 have the shapes of Stable Diffusion 1.5 and 2.1 (768), tiny1 and tiny2 their
 * structure with few channels. OUT is a diffusers folder or one file with the names of the
 * original program, with what such files hold besides: copies of the averaged weights, tables,
 * the last layer of SD 2's text encoder, which nobody uses. Both layouts have the same numbers,
 * and the same seed gives the same bytes.
 *
 * The names of the single file are written here a second time, not taken from sdq.h: its tests
 * compare the two.
 */
#define SDQ_IMPLEMENTATION
#include "../sdq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* CLIP's merges, packed: see tools/clip_vocab.py. */
static const char clip_merges[][97] = {
#include "clip_vocab.inc"
};
enum { CLIP_MERGES = 48894, CLIP_ROW = 16 };

typedef struct rsd_spec {
    const char *name;
    int sd2;
    size_t layers;              /* resnets of a level on the way down */
    size_t levels, vae_levels;
    unsigned attends;           /* bit i: level i of the UNet has attention */
    size_t merges;              /* of the tokenizer: 48894 or a multiple of 16 */
    const char *text, *unet, *vae;      /* config.json */
} rsd_spec;

/* Arguments are expanded, then quoted. */
#define RSD_QUOTE(...) #__VA_ARGS__
#define RSD_JSON(...) RSD_QUOTE(__VA_ARGS__)
#define RSD_DOWN "CrossAttnDownBlock2D"
#define RSD_UP "CrossAttnUpBlock2D"
#define RSD_CLIP(vocab, width, wide, count, heads, act) \
    RSD_JSON({"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", \
              "vocab_size": vocab, "hidden_size": width, "intermediate_size": wide, \
              "num_hidden_layers": count, "num_attention_heads": heads, \
              "max_position_embeddings": 77, "hidden_act": act, "layer_norm_eps": 1e-05, \
              "projection_dim": width, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1})
#define RSD_UNET(...) \
    RSD_JSON({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.39.0", \
              "in_channels": 4, "out_channels": 4, "norm_num_groups": 32, __VA_ARGS__})
#define RSD_VAE(size, a, b, c, d, count) \
    RSD_JSON({"_class_name": "AutoencoderKL", "_diffusers_version": "0.39.0", \
              "sample_size": size, "in_channels": 3, "out_channels": 3, "latent_channels": 4, \
              "block_out_channels": [a, b, c, d], "layers_per_block": count, \
              "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", \
                                   "DownEncoderBlock2D", "DownEncoderBlock2D"], \
              "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", \
                                 "UpDecoderBlock2D"], \
              "norm_num_groups": 32, "scaling_factor": 0.18215})
#define RSD_LEVELS4 \
    "down_block_types": [RSD_DOWN, RSD_DOWN, RSD_DOWN, "DownBlock2D"], \
    "up_block_types": ["UpBlock2D", RSD_UP, RSD_UP, RSD_UP]
#define RSD_LEVELS3 \
    "down_block_types": [RSD_DOWN, RSD_DOWN, "DownBlock2D"], \
    "up_block_types": ["UpBlock2D", RSD_UP, RSD_UP]

static const rsd_spec rsd_specs[] = {
    {"sd15", 0, 2, 4, 4, 7, CLIP_MERGES, RSD_CLIP(49408, 768, 3072, 12, 12, "quick_gelu"),
     RSD_UNET("sample_size": 64, "block_out_channels": [320, 640, 1280, 1280],
              "layers_per_block": 2, RSD_LEVELS4, "attention_head_dim": 8,
              "cross_attention_dim": 768),
     RSD_VAE(512, 128, 256, 512, 512, 2)},
    {"sd21", 1, 2, 4, 4, 7, CLIP_MERGES, RSD_CLIP(49408, 1024, 4096, 23, 16, "gelu"),
     RSD_UNET("sample_size": 96, "block_out_channels": [320, 640, 1280, 1280],
              "layers_per_block": 2, RSD_LEVELS4, "attention_head_dim": [5, 10, 20, 20],
              "cross_attention_dim": 1024, "use_linear_projection": true),
     RSD_VAE(768, 128, 256, 512, 512, 2)},
    {"tiny1", 0, 2, 3, 4, 3, CLIP_MERGES, RSD_CLIP(49408, 32, 64, 2, 1, "quick_gelu"),
     RSD_UNET("sample_size": 64, "block_out_channels": [32, 64, 64], "layers_per_block": 2,
              RSD_LEVELS3, "attention_head_dim": 8, "cross_attention_dim": 32),
     RSD_VAE(512, 32, 32, 64, 64, 1)},
    {"tiny2", 1, 1, 3, 4, 3, CLIP_MERGES, RSD_CLIP(49408, 64, 96, 3, 1, "gelu"),
     RSD_UNET("sample_size": 96, "block_out_channels": [32, 64, 128], "layers_per_block": 1,
              RSD_LEVELS3, "attention_head_dim": [1, 1, 2], "cross_attention_dim": 64,
              "use_linear_projection": true),
     RSD_VAE(768, 32, 32, 32, 64, 2)},
};

/* ===========================================================================
 * what is written: arrays, and where in them the parameters go
 * ======================================================================== */

typedef struct rsd_array {
    char name[192];
    sdq_dtype dtype;
    int rank;
    size_t dim[4], at, bytes;   /* at: place in the data */
} rsd_array;

/* A run of random numbers: normal, uniform, or around a constant. */
typedef struct rsd_run {
    char name[192];             /* the seed of its numbers */
    int init;
    double value;
    size_t array, at, count;    /* at: bytes into the array */
} rsd_run;

typedef struct rsd_file {
    sdq_ctx *ctx;
    const rsd_spec *spec;
    sdq_dtype dtype;
    int single;
    rsd_array *array;
    rsd_run *run;
    size_t arrays, array_cap, runs, run_cap, bytes;
} rsd_file;

static const char *rsd_config(const rsd_spec *s, sdq_part part) {
    return part == SDQ_PART_TEXT ? s->text : part == SDQ_PART_UNET ? s->unet : s->vae;
}

static size_t rsd_width(sdq_dtype dtype) { return sdq__u_dtype_size(dtype); }

/* The array of that name, which is new unless a third of it came before. */
static rsd_array *rsd_add(rsd_file *f, const char *name, sdq_dtype dtype, int rank,
                          const size_t *dim) {
    rsd_array *a;
    size_t i;
    for (i = f->arrays; i > 0 && i + 8 > f->arrays; i--)
        if (strcmp(f->array[i - 1].name, name) == 0) return &f->array[i - 1];
    if (!sdq__grow(f->ctx, (void **)(void *)&f->array, &f->array_cap, f->arrays + 1, sizeof *a))
        return NULL;
    a = &f->array[f->arrays++];
    memset(a, 0, sizeof *a);
    (void)snprintf(a->name, sizeof a->name, "%s", name);
    a->dtype = dtype;
    a->rank = rank;
    a->bytes = rsd_width(dtype);
    for (i = 0; i < 4; i++) {
        a->dim[i] = (int)i < rank ? dim[i] : 1;
        a->bytes *= a->dim[i];
    }
    a->at = f->bytes;
    f->bytes += a->bytes;
    return a;
}

static void rsd_fill(rsd_file *f, const rsd_array *a, const char *name, int init, double value,
                     size_t at, size_t count) {
    rsd_run *r;
    if (!a || !sdq__grow(f->ctx, (void **)(void *)&f->run, &f->run_cap, f->runs + 1, sizeof *r))
        return;
    r = &f->run[f->runs++];
    (void)snprintf(r->name, sizeof r->name, "%s", name);
    r->init = init;
    r->value = value;
    r->array = (size_t)(a - f->array);
    r->at = at;
    r->count = count;
}

/* An array that is in the file only: ids 0, 1, 2, .. when it is of integers, small numbers else. */
static void rsd_extra(rsd_file *f, const char *name, sdq_dtype dtype, int rank, size_t d0,
                      size_t d1) {
    size_t dim[2];
    const rsd_array *a;
    dim[0] = d0;
    dim[1] = d1;
    a = rsd_add(f, name, dtype, rank, dim);
    rsd_fill(f, a, name, SDQ__MD_NORMAL, 0.02, 0, d0 * d1);
}

/* ===========================================================================
 * the names of the original program
 * ======================================================================== */

static void rsd_replace(char *name, const char *from, const char *to) {
    char tail[192];
    char *at = strstr(name, from);
    if (!at) return;
    (void)snprintf(tail, sizeof tail, "%s", at + strlen(from));
    (void)sprintf(at, "%s%s", to, tail);
}

static void rsd_unet_name(const rsd_spec *s, const char *name, char *out) {
    const unsigned each = (unsigned)s->layers + 1;
    unsigned i = 0, j = 0;
    char rest[128] = "";
    if (sscanf(name, "down_blocks.%u.resnets.%u.%127s", &i, &j, rest) == 3)
        (void)sprintf(out, "input_blocks.%u.0.%s", 1 + i * each + j, rest);
    else if (sscanf(name, "down_blocks.%u.attentions.%u.%127s", &i, &j, rest) == 3)
        (void)sprintf(out, "input_blocks.%u.1.%s", 1 + i * each + j, rest);
    else if (sscanf(name, "down_blocks.%u.downsamplers.0.conv.%127s", &i, rest) == 2)
        (void)sprintf(out, "input_blocks.%u.0.op.%s", (i + 1) * each, rest);
    else if (sscanf(name, "up_blocks.%u.resnets.%u.%127s", &i, &j, rest) == 3)
        (void)sprintf(out, "output_blocks.%u.0.%s", i * each + j, rest);
    else if (sscanf(name, "up_blocks.%u.attentions.%u.%127s", &i, &j, rest) == 3)
        (void)sprintf(out, "output_blocks.%u.1.%s", i * each + j, rest);
    else if (sscanf(name, "up_blocks.%u.upsamplers.0.conv.%127s", &i, rest) == 2)
        (void)sprintf(out, "output_blocks.%u.%d.conv.%s", (i + 1) * each - 1,
                      s->attends >> (s->levels - 1 - i) & 1 ? 2 : 1, rest);
    else (void)sprintf(out, "%s", name);
    if (strstr(name, "resnets.")) {
        rsd_replace(out, "mid_block.resnets.0", "middle_block.0");
        rsd_replace(out, "mid_block.resnets.1", "middle_block.2");
        rsd_replace(out, "norm1", "in_layers.0");
        rsd_replace(out, "conv1", "in_layers.2");
        rsd_replace(out, "norm2", "out_layers.0");
        rsd_replace(out, "conv2", "out_layers.3");
        rsd_replace(out, "time_emb_proj", "emb_layers.1");
        rsd_replace(out, "conv_shortcut", "skip_connection");
    }
    rsd_replace(out, "mid_block.attentions.0", "middle_block.1");
    rsd_replace(out, "time_embedding.linear_1", "time_embed.0");
    rsd_replace(out, "time_embedding.linear_2", "time_embed.2");
    rsd_replace(out, "conv_in", "input_blocks.0.0");
    rsd_replace(out, "conv_norm_out", "out.0");
    rsd_replace(out, "conv_out", "out.2");
}

static void rsd_vae_name(const rsd_spec *s, const char *name, char *out) {
    unsigned i = 0;
    char rest[128] = "";
    if (sscanf(name, "decoder.up_blocks.%u.%127s", &i, rest) == 2)
        (void)sprintf(out, "decoder.up.%u.%s", (unsigned)s->vae_levels - 1 - i, rest);
    else (void)sprintf(out, "%s", name);
    if (strstr(out, ".attentions.0.")) {
        rsd_replace(out, "group_norm", "norm");
        rsd_replace(out, "to_q", "q");
        rsd_replace(out, "to_k", "k");
        rsd_replace(out, "to_v", "v");
        rsd_replace(out, "to_out.0", "proj_out");
    }
    rsd_replace(out, "mid_block.attentions.0", "mid.attn_1");
    rsd_replace(out, "mid_block.resnets.0", "mid.block_1");
    rsd_replace(out, "mid_block.resnets.1", "mid.block_2");
    rsd_replace(out, "down_blocks", "down");
    rsd_replace(out, "resnets", "block");
    rsd_replace(out, "downsamplers.0", "downsample");
    rsd_replace(out, "upsamplers.0", "upsample");
    rsd_replace(out, "conv_shortcut", "nin_shortcut");
    rsd_replace(out, "conv_norm_out", "norm_out");
}

/* third: 0 for a whole array, or 1 + the third that it is: q, k, v. */
static void rsd_openclip_name(const char *name, char *out, int *third) {
    static const char *const part[3] = {"self_attn.q_proj.", "self_attn.k_proj.",
                                        "self_attn.v_proj."};
    int i;
    (void)sprintf(out, "%s", name);
    for (i = 0; i < 3; i++) {
        if (!strstr(out, part[i])) continue;
        rsd_replace(out, part[i], "attn.in_proj_");
        *third = i + 1;
    }
    rsd_replace(out, "text_model.encoder.layers", "transformer.resblocks");
    rsd_replace(out, "text_model.embeddings.token_embedding", "token_embedding");
    rsd_replace(out, "text_model.embeddings.position_embedding.weight", "positional_embedding");
    rsd_replace(out, "text_model.final_layer_norm", "ln_final");
    rsd_replace(out, "layer_norm", "ln_");
    rsd_replace(out, "mlp.fc1", "mlp.c_fc");
    rsd_replace(out, "mlp.fc2", "mlp.c_proj");
    rsd_replace(out, "self_attn.out_proj", "attn.out_proj");
}

static void rsd_single_name(const rsd_spec *s, sdq_part part, const char *name, char *out,
                            int *third) {
    char own[192] = "";
    if (part == SDQ_PART_UNET) rsd_unet_name(s, name, own);
    else if (part == SDQ_PART_VAE) rsd_vae_name(s, name, own);
    else if (s->sd2) rsd_openclip_name(name, own, third);
    else (void)sprintf(own, "%s", name);
    (void)sprintf(out, "%s%.160s", part == SDQ_PART_UNET ? "model.diffusion_model."
                  : part == SDQ_PART_VAE ? "first_stage_model."
                  : s->sd2 ? "cond_stage_model.model." : "cond_stage_model.transformer.", own);
}

/* ===========================================================================
 * arrays of a network
 * ======================================================================== */

/* One parameter of a network; last: the text encoder's unused layer, made from layer 0. */
static void rsd_param(rsd_file *f, sdq_part part, const sdq__param *p, const char *name) {
    char own[256];
    int third = 0, rank = p->rank;
    size_t dim[4], count = p->dim[0] * p->dim[1] * p->dim[2] * p->dim[3];
    const rsd_array *a;
    memcpy(dim, p->dim, sizeof dim);
    (void)snprintf(own, sizeof own, "%s", name);
    if (f->single) rsd_single_name(f->spec, part, name, own, &third);
    if (f->single && part == SDQ_PART_VAE && rank == 2) rank = 4;   /* attention by convolution */
    if (third) dim[0] *= 3;
    a = rsd_add(f, own, f->dtype, rank, dim);
    rsd_fill(f, a, name, p->init, p->value,
             third ? (size_t)(third - 1) * count * rsd_width(f->dtype) : 0, count);
}

static void rsd_text_extras(rsd_file *f, const sdq_model *m) {
    const unsigned layers = (unsigned)m->text->count;
    char name[192];
    size_t i;
    for (i = 0; f->single && f->spec->sd2 && i < m->params; i++) {
        if (strncmp(m->param[i].name, "text_model.encoder.layers.0.", 28) != 0) continue;
        (void)snprintf(name, sizeof name, "text_model.encoder.layers.%u.%s", layers,
                       m->param[i].name + 28);
        rsd_param(f, SDQ_PART_TEXT, &m->param[i], name);
    }
    if (f->single && f->spec->sd2)
        rsd_extra(f, "cond_stage_model.model.text_projection", f->dtype, 2, m->info.context,
                  m->info.context);
}

static sdq_status rsd_network(rsd_file *f, sdq_part part) {
    const char *text = rsd_config(f->spec, part);
    sdq_model *m = NULL;
    size_t i;
    SDQ__TRY(sdq__md_create(f->ctx, sdq_part_name(part), text, strlen(text), part, NULL,
                            SDQ__MD_NO_WEIGHTS, &m));
    for (i = 0; i < m->params; i++) rsd_param(f, part, &m->param[i], m->param[i].name);
    if (part == SDQ_PART_TEXT) rsd_text_extras(f, m);
    sdq_model_free(f->ctx, m);
    return f->ctx->status;
}

/* Training leaves these behind. Wide types first: every array is aligned. */
static void rsd_single_extras(rsd_file *f) {
    const int sd2 = f->spec->sd2;
    if (!sd2)
        rsd_extra(f, "cond_stage_model.transformer.text_model.embeddings.position_ids", SDQ_I64, 2,
                  1, 77);
    rsd_extra(f, "model_ema.num_updates", SDQ_I64, 0, 1, 1);
    rsd_extra(f, "model_ema.decay", SDQ_F32, 0, 1, 1);
    rsd_extra(f, "betas", SDQ_F32, 1, 1000, 1);
    rsd_extra(f, "alphas_cumprod", SDQ_F32, 1, 1000, 1);
    if (sd2) rsd_extra(f, "cond_stage_model.model.logit_scale", SDQ_F32, 0, 1, 1);
    rsd_extra(f, "model_ema.diffusion_modeltime_embed0weight", SDQ_F32, 2, 16, 4);
    rsd_extra(f, "model_ema.diffusion_modelinput_blocks00bias", SDQ_F32, 1, 4, 1);
}

/* ===========================================================================
 * writing
 * ======================================================================== */

static uint32_t rsd_seed(const char *name, uint64_t seed) {
    uint64_t h = seed ^ UINT64_C(0xcbf29ce484222325);
    for (; *name; name++) h = (h ^ (unsigned char)*name) * UINT64_C(0x100000001b3);
    return (uint32_t)(h ^ (h >> 32));
}

/* n numbers: PyTorch's distribution; what it starts as a constant varies a little, so that no two
 * arrays are equal. */
static void rsd_draw(const rsd_run *r, sdq_rng *rng, float *x, size_t n) {
    const float value = (float)r->value;
    size_t i;
    if (r->init == SDQ__MD_NORMAL) sdq_rng_normal(rng, x, n);
    else sdq_rng_uniform(rng, x, n);
    for (i = 0; i < n; i++) {
        if (r->init == SDQ__MD_NORMAL) x[i] *= value;
        else if (r->init == SDQ__MD_UNIFORM) x[i] = value * (2.0f * x[i] - 1.0f);
        else x[i] = value + 0.05f * (2.0f * x[i] - 1.0f);
    }
}

/* As the array stores them; first: the place of x[0] in the run. */
static size_t rsd_pack(sdq_dtype dtype, const float *x, size_t n, size_t first,
                       unsigned char *to) {
    size_t i;
    for (i = 0; i < n; i++) {
        const uint16_t h = sdq__u_to_f16(x[i]), b = sdq__u_to_bf16(x[i]);
        const int64_t id = (int64_t)(first + i);
        if (dtype == SDQ_F32) memcpy(to + 4 * i, &x[i], 4);
        else if (dtype == SDQ_I64) memcpy(to + 8 * i, &id, 8);
        else memcpy(to + 2 * i, dtype == SDQ_F16 ? &h : &b, 2);
    }
    return n * rsd_width(dtype);
}

static int rsd_write_run(const rsd_file *f, const rsd_run *r, uint64_t seed, size_t data,
                         FILE *out) {
    static float x[8192];
    static unsigned char packed[sizeof x * 2];
    const rsd_array *a = &f->array[r->array];
    sdq_rng rng;
    size_t i, n;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, rsd_seed(r->name, seed));
    if (fseek(out, (long)(data + a->at + r->at), SEEK_SET) != 0) return 0;
    for (i = 0; i < r->count; i += n) {
        n = sdq__u_min(r->count - i, SDQ__COUNT(x));
        rsd_draw(r, &rng, x, n);
        n = rsd_pack(a->dtype, x, n, i, packed);
        if (fwrite(packed, 1, n, out) != n) return 0;
        n /= rsd_width(a->dtype);
    }
    return 1;
}

static void rsd_header(rsd_file *f, sdq__str *h) {
    size_t i;
    int k;
    sdq__str_format(f->ctx, h, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (i = 0; i < f->arrays; i++) {
        const rsd_array *a = &f->array[i];
        sdq__str_format(f->ctx, h, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", a->name,
                        sdq_dtype_name(a->dtype));
        for (k = 0; k < a->rank; k++) sdq__str_format(f->ctx, h, k ? ",%zu" : "%zu", a->dim[k]);
        sdq__str_format(f->ctx, h, "],\"data_offsets\":[%zu,%zu]}", a->at, a->at + a->bytes);
    }
    sdq__str_format(f->ctx, h, "}");
    while (h->len % 8 && !h->bad) sdq__str_add(f->ctx, h, " ", 1);
}

/* Number after number: the file is never in memory. */
static sdq_status rsd_write(rsd_file *f, const char *path, uint64_t seed) {
    FILE *out = fopen(path, "wb");
    unsigned char length[8];
    sdq__str h;
    size_t i;
    int ok;
    if (!out) return sdq__fail(f->ctx, SDQ_ERR_IO, "%s: cannot be written", path);
    memset(&h, 0, sizeof h);
    rsd_header(f, &h);
    for (i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)h.len >> (8 * i));
    ok = !h.bad && fwrite(length, 1, 8, out) == 8 && fwrite(h.s, 1, h.len, out) == h.len;
    for (i = 0; ok && i < f->runs; i++) ok = rsd_write_run(f, &f->run[i], seed, 8 + h.len, out);
    ok = fclose(out) == 0 && ok;
    sdq__str_free(f->ctx, &h);
    return ok ? SDQ_OK : sdq__fail(f->ctx, SDQ_ERR_IO, "%s: write error; is the disk full?", path);
}

static void rsd_clear(rsd_file *f) {
    sdq__free(f->ctx, f->array);
    sdq__free(f->ctx, f->run);
    f->array = NULL;
    f->run = NULL;
    f->arrays = f->runs = f->array_cap = f->run_cap = f->bytes = 0;
}

static sdq_status rsd_single(rsd_file *f, const char *path, uint64_t seed) {
    static const sdq_part order[3] = {SDQ_PART_UNET, SDQ_PART_VAE, SDQ_PART_TEXT};
    sdq_status st = SDQ_OK;
    size_t i;
    rsd_single_extras(f);
    for (i = 0; st == SDQ_OK && i < 3; i++) st = rsd_network(f, order[i]);
    return st == SDQ_OK ? rsd_write(f, path, seed) : st;
}

/* ===========================================================================
 * the rest of a folder
 * ======================================================================== */

static sdq_status rsd_text_file(sdq_ctx *ctx, const char *folder, const char *name,
                                const char *text) {
    char *path = sdq__io_join(ctx, folder, "/", name);
    sdq_status st = path ? sdq_bytes_write(ctx, path, text, strlen(text)) : ctx->status;
    sdq__free(ctx, path);
    return st;
}

/* Number `at` of the packed merges: three digits of base 64 for each half. */
static int32_t rsd_half(size_t merge, int second) {
    const char *d = &clip_merges[1 + merge / CLIP_ROW][merge % CLIP_ROW * 6 + (second ? 3 : 0)];
    return (int32_t)((sdq__tok_digit(d[0]) * 64 + sdq__tok_digit(d[1])) * 64
                     + sdq__tok_digit(d[2]));
}

/* The text of every token but start and end: 256 bytes in GPT-2's signs, the same at a word's
 * end, the merges. */
static char **rsd_tokens(sdq_ctx *ctx, size_t merges) {
    char **token = SDQ__NEW_N(ctx, char *, 512 + merges), utf8[8];
    unsigned char order[256];
    uint32_t sign[256];
    size_t i;
    sdq__tok_alphabet(order, sign);
    for (i = 0; token && i < 512 + merges; i++) {
        if (i < 512) {
            utf8[sdq__js_put_utf8(utf8, sign[order[i % 256]])] = 0;
            token[i] = sdq__io_join(ctx, utf8, i < 256 ? "" : "</w>", "");
        } else
            token[i] = sdq__io_join(ctx, token[rsd_half(i - 512, 0)], token[rsd_half(i - 512, 1)],
                                    "");
        if (!token[i]) return NULL;
    }
    return token;
}

static sdq_status rsd_tokenizer(sdq_ctx *ctx, const rsd_spec *s, const char *folder) {
    char **token = rsd_tokens(ctx, s->merges);
    sdq__str vocab, merges;
    sdq_status st = ctx->status;
    size_t i;
    memset(&vocab, 0, sizeof vocab);
    memset(&merges, 0, sizeof merges);
    sdq__str_format(ctx, &vocab, "{");
    sdq__str_format(ctx, &merges, "#version: 0.2\n");
    for (i = 0; token && i < 512 + s->merges; i++) {
        sdq__str_json(ctx, &vocab, token[i]);
        sdq__str_format(ctx, &vocab, ": %zu, ", i);
        if (i >= 512)
            sdq__str_format(ctx, &merges, "%s %s\n", token[rsd_half(i - 512, 0)],
                            token[rsd_half(i - 512, 1)]);
    }
    sdq__str_format(ctx, &vocab, "\"<|startoftext|>\": %zu, \"<|endoftext|>\": %zu}\n", i, i + 1);
    for (i = 0; token && i < 512 + s->merges; i++) sdq__free(ctx, token[i]);
    sdq__free(ctx, (void *)token);
    if (vocab.bad || merges.bad) st = SDQ_ERR_OOM;
    if (st == SDQ_OK) st = rsd_text_file(ctx, folder, "tokenizer/vocab.json", vocab.s);
    if (st == SDQ_OK) st = rsd_text_file(ctx, folder, "tokenizer/merges.txt", merges.s);
    sdq__str_free(ctx, &vocab);
    sdq__str_free(ctx, &merges);
    return st;
}

static sdq_status rsd_small_files(sdq_ctx *ctx, const rsd_spec *s, const char *folder) {
    static const char index[] = RSD_JSON({
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.39.0",
        "feature_extractor": [null, null], "image_encoder": [null, null],
        "requires_safety_checker": false, "safety_checker": [null, null],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]});
    char text[1024];
    (void)snprintf(text, sizeof text, RSD_JSON({
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.39.0", "beta_start": 0.00085,
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": false,
        "num_train_timesteps": 1000, "prediction_type": "%s", "set_alpha_to_one": false,
        "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading",
        "trained_betas": null}), s->sd2 ? "v_prediction" : "epsilon");
    SDQ__TRY(rsd_text_file(ctx, folder, "model_index.json", index));
    SDQ__TRY(rsd_text_file(ctx, folder, "scheduler/scheduler_config.json", text));
    (void)snprintf(text, sizeof text, RSD_JSON({
        "add_prefix_space": false, "bos_token": "<|startoftext|>", "do_lower_case": true,
        "eos_token": "<|endoftext|>", "errors": "replace", "model_max_length": 77,
        "pad_token": "%s", "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"}),
        s->sd2 ? "!" : "<|endoftext|>");
    return rsd_text_file(ctx, folder, "tokenizer/tokenizer_config.json", text);
}

static void rsd_make_folder(const char *folder, const char *name) {
    char path[512];
    (void)snprintf(path, sizeof path, "%s%s%s", folder, *name ? "/" : "", name);
    (void)mkdir(path, 0777);            /* a failure shows when a file is written into it */
}

static sdq_status rsd_folder(rsd_file *f, const char *folder, uint64_t seed) {
    char path[512];
    sdq_status st;
    int i;
    rsd_make_folder(folder, "");
    rsd_make_folder(folder, "scheduler");
    rsd_make_folder(folder, "tokenizer");
    st = rsd_small_files(f->ctx, f->spec, folder);
    if (st == SDQ_OK) st = rsd_tokenizer(f->ctx, f->spec, folder);
    for (i = SDQ_PART_NONE + 1; st == SDQ_OK && i < SDQ_PART_COUNT; i++) {
        const char *name = sdq_part_name((sdq_part)i);
        rsd_make_folder(folder, name);
        st = rsd_network(f, (sdq_part)i);
        (void)snprintf(path, sizeof path, "%s/%s/%s.safetensors", folder, name,
                       sdq__md_kinds_of[i].weights);
        if (st == SDQ_OK) st = rsd_write(f, path, seed);
        (void)snprintf(path, sizeof path, "%s/config.json", name);
        if (st == SDQ_OK)
            st = rsd_text_file(f->ctx, folder, path, rsd_config(f->spec, (sdq_part)i));
        rsd_clear(f);
    }
    return st;
}

/* Write the checkpoint `out`. The context keeps the sentence of what went wrong. */
static sdq_status rsd_make(sdq_ctx *ctx, const rsd_spec *spec, sdq_dtype dtype, int single,
                           const char *out, uint64_t seed) {
    rsd_file f;
    sdq_status st;
    memset(&f, 0, sizeof f);
    f.ctx = ctx;
    f.spec = spec;
    f.dtype = dtype;
    f.single = single;
    st = single ? rsd_single(&f, out, seed) : rsd_folder(&f, out, seed);
    rsd_clear(&f);
    return st;
}

static const rsd_spec *rsd_find(const char *name) {
    size_t i;
    for (i = 0; i < SDQ__COUNT(rsd_specs); i++)
        if (strcmp(rsd_specs[i].name, name) == 0) return &rsd_specs[i];
    return NULL;
}

#ifndef RANDOM_SD_NO_MAIN       /* the tests have a main of their own */
int main(int argc, char **argv) {
    const rsd_spec *spec = argc > 4 ? rsd_find(argv[1]) : NULL;
    const int f16 = argc > 4 && strcmp(argv[2], "F16") == 0;
    const int single = argc > 4 && strcmp(argv[3], "single") == 0;
    sdq_ctx *ctx = NULL;
    sdq_status st;
    if (!spec || argc > 6 || (!f16 && strcmp(argv[2], "F32") != 0)
        || (!single && strcmp(argv[3], "folder") != 0)) {
        fputs("usage: random_sd sd15|sd21|tiny1|tiny2 F32|F16 folder|single OUT [SEED]\n", stderr);
        return 2;
    }
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) return 1;
    st = rsd_make(ctx, spec, f16 ? SDQ_F16 : SDQ_F32, single, argv[4],
                  argc > 5 ? strtoull(argv[5], NULL, 10) : 0);
    if (st != SDQ_OK) fprintf(stderr, "random_sd: %s\n", sdq_error_text(ctx));
    sdq_ctx_free(ctx);
    return st != SDQ_OK;
}
#endif
