/* Draw one picture.
 *
 *     cc -O2 -fopenmp -I.. txt2img.c -o txt2img -lm
 *     ./txt2img emoji/model "woman astronaut: medium-light skin tone" 7 out.png
 *
 * A fifth argument is optional: an int8 UNet made by quantize.c. Then the first and last three
 * evaluations are computed in float and the others in int8.
 *     ./txt2img emoji/model "red apple" 7 out.png unet-int8.safetensors
 *
 * Expected output: "51 evaluations, 51 in float; wrote out.png" */
#define SDQ_IMPLEMENTATION
#include "sdq.h"

static size_t evaluations, in_float;

static int count_step(void *user, const sdq_step_info *info) {
    (void)user;
    evaluations++;
    in_float += info->is_float != 0;
    return 0;       /* non-zero would cancel */
}

static sdq_status draw(sdq_ctx *ctx, int argc, char **argv) {
    sdq_pipeline_desc files;
    sdq_txt2img_desc desc;
    sdq_pipeline *pipe = NULL;
    sdq_image image;
    sdq_status st;
    memset(&files, 0, sizeof files);
    memset(&desc, 0, sizeof desc);
    files.unet_int8 = argc > 5 ? argv[5] : NULL;
    st = sdq_pipeline_load(ctx, argv[1], &files, &pipe);
    if (st != SDQ_OK) return st;
    desc.prompt = argv[2];
    desc.seed = strtoull(argv[3], NULL, 10);
    desc.guidance = 4.0f;
    desc.step = count_step;
    if (files.unet_int8) {
        desc.precision = SDQ_PRECISION_EDGES;
        desc.k_first = desc.k_last = 3;
    }
    st = sdq_txt2img(ctx, pipe, &desc, &image);
    if (st == SDQ_OK) {
        st = sdq_image_write(ctx, argv[4], &image, NULL, 0);
        sdq_image_free(ctx, &image);
    }
    sdq_pipeline_free(ctx, pipe);
    return st;
}

int main(int argc, char **argv) {
    sdq_ctx *ctx;
    sdq_status st;
    if (argc < 5) {
        fprintf(stderr, "usage: %s MODEL PROMPT SEED OUT.png [UNET-INT8]\n", argv[0]);
        return 2;
    }
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) return 1;
    st = draw(ctx, argc, argv);
    if (st != SDQ_OK) fprintf(stderr, "%s\n", sdq_error_text(ctx));
    else printf("%zu evaluations, %zu in float; wrote %s\n", evaluations, in_float, argv[4]);
    sdq_ctx_free(ctx);
    return st != SDQ_OK;
}
