/* Quantize a trained UNet: no pictures, only prompts.
 *
 *     cc -O2 -fopenmp -I.. quantize.c -o quantize -lm
 *     ./quantize emoji/model unet-int8.safetensors "red apple" "grinning face" "flag: japan"
 *
 * The sampler runs in float for every prompt; what the network saw on the way gives the ranges of
 * the activations, and the mean error of every layer is taken out through its bias.
 *
 * Expected output: "126 states from 3 prompts; wrote unet-int8.safetensors" */
#define SDQ_IMPLEMENTATION
#include "sdq.h"

static sdq_status quantize(sdq_ctx *ctx, const char *model, const char *out,
                           const char *const *prompts, size_t n, size_t *count) {
    const sdq_recipe recipe = sdq_recipe_default();
    sdq_pipeline_desc load;
    sdq_txt2img_desc desc;
    sdq_pipeline *pipe = NULL;
    sdq_states *states = NULL;
    char text[512];
    sdq_status st;
    memset(&load, 0, sizeof load);
    memset(&desc, 0, sizeof desc);
    load.trainable = 1;         /* keep the float weights of the UNet as they are in the file */
    desc.steps = 20;
    desc.guidance = 4.0f;
    sdq_recipe_to_str(&recipe, text, sizeof text);
    st = sdq_pipeline_load(ctx, model, &load, &pipe);
    if (st == SDQ_OK) st = sdq_recipe_apply(ctx, pipe->unet, &recipe, NULL);
    if (st == SDQ_OK) st = sdq_states_collect(ctx, pipe, prompts, n, &desc, &states);
    if (st == SDQ_OK)
        st = sdq_calibrate_states(ctx, pipe->unet, states, 8, recipe.bias_correction, NULL, NULL);
    if (st == SDQ_OK) st = sdq_model_convert(ctx, pipe->unet);
    if (st == SDQ_OK) st = sdq_model_save_int8(ctx, pipe->unet, out, NULL, text);
    if (states) *count = sdq_states_count(states);
    sdq_states_free(ctx, states);
    sdq_pipeline_free(ctx, pipe);
    return st;
}

int main(int argc, char **argv) {
    sdq_ctx *ctx;
    sdq_status st;
    size_t count = 0;
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL OUT.safetensors PROMPT...\n", argv[0]);
        return 2;
    }
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) return 1;
    st = quantize(ctx, argv[1], argv[2], (const char *const *)(argv + 3), (size_t)argc - 3, &count);
    if (st != SDQ_OK) fprintf(stderr, "%s\n", sdq_error_text(ctx));
    else printf("%zu states from %d prompts; wrote %s\n", count, argc - 3, argv[2]);
    sdq_ctx_free(ctx);
    return st != SDQ_OK;
}
