/* Your own small network: layers, tape, training in float, quantization-aware training, int8.
 *
 *     cc -O2 -fopenmp -I.. custom_network.c -o custom_network -lm
 *     ./custom_network
 *
 * Two layers with a SiLU between learn y = sin(3 x0) x1. The same function computes the network in
 * all three modes; the last line checks that INT8 gives what FAKE gave, to the bit.
 *
 * Expected output: four lines; the losses are below 0.01, and "fake == int8: yes" */
#define SDQ_IMPLEMENTATION
#include "sdq.h"

typedef struct network { sdq_layer *hidden, *out; sdq_mode mode; } network;

static sdq_tensor *forward(sdq_ctx *ctx, const network *net, sdq_tensor *x, sdq_mode mode) {
    x = sdq_silu(ctx, sdq_layer_forward(ctx, net->hidden, x, NULL, mode));
    return sdq_layer_forward(ctx, net->out, x, NULL, mode);
}

/* The loss of one batch. All randomness comes from rng. */
static sdq_tensor *loss(sdq_ctx *ctx, void *user, sdq_rng *rng, size_t step) {
    const network *net = (const network *)user;
    sdq_tensor *x = sdq_tensor_2d(ctx, 64, 2), *t = sdq_tensor_2d(ctx, 64, 1);
    size_t i;
    (void)step;
    if (!x || !t) return NULL;
    sdq_rng_uniform(rng, sdq_f32(x), 128);
    for (i = 0; i < 64; i++) {
        const float *v = sdq_f32(x) + 2 * i;
        sdq_f32(t)[i] = (float)sin(3.0 * (double)v[0]) * v[1];
    }
    return sdq_mse(ctx, forward(ctx, net, x, net->mode), t, NULL);
}

static double last_loss;
static int remember(void *user, const char *stage, size_t i, size_t n, double value) {
    (void)user; (void)stage; (void)i; (void)n;
    last_loss = value;
    return 0;
}

static sdq_status fit(sdq_ctx *ctx, network *net, sdq_mode mode, float lr, size_t steps) {
    sdq_optim_desc how;
    sdq_fit_desc run;
    sdq_optim *optim = NULL;
    sdq_status st;
    memset(&how, 0, sizeof how);
    memset(&run, 0, sizeof run);
    how.lr = lr;
    run.steps = steps;
    run.progress = remember;
    net->mode = mode;
    st = sdq_optim_create(ctx, &how, &optim);
    if (st == SDQ_OK) st = sdq_optim_add(ctx, optim, sdq_layer_weight(net->hidden), "hidden.w", 0, 0, 0);
    if (st == SDQ_OK) st = sdq_optim_add(ctx, optim, sdq_layer_bias(net->hidden), "hidden.b", 0, 0, 0);
    if (st == SDQ_OK) st = sdq_optim_add(ctx, optim, sdq_layer_weight(net->out), "out.w", 0, 0, 0);
    if (st == SDQ_OK) st = sdq_optim_add(ctx, optim, sdq_layer_bias(net->out), "out.b", 0, 0, 0);
    if (st == SDQ_OK) st = sdq_fit(ctx, optim, &run, loss, net);
    sdq_optim_free(ctx, optim);
    return st;
}

static void draw_weights(sdq_layer *layer, sdq_rng *rng) {
    sdq_tensor *w = sdq_layer_weight(layer);
    size_t i;
    sdq_rng_normal(rng, sdq_f32(w), sdq_tensor_count(w));
    for (i = 0; i < sdq_tensor_count(w); i++) sdq_f32(w)[i] *= 0.5f;
}

static sdq_status run(sdq_ctx *ctx, network *net) {
    sdq_tensor *x = sdq_tensor_2d(ctx, 5, 2), *fake, *int8;
    sdq_quant quant;
    sdq_rng rng;
    sdq_status st;
    memset(&quant, 0, sizeof quant);
    quant.enabled = 1;
    quant.range = SDQ_RANGE_POSITION;       /* every row its own range: nothing to calibrate */
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 1);
    draw_weights(net->hidden, &rng);
    draw_weights(net->out, &rng);
    st = fit(ctx, net, SDQ_FLOAT, 1e-2f, 1500);
    printf("float training        loss %.5f\n", last_loss);
    if (st == SDQ_OK) st = sdq_layer_set_quant(ctx, net->hidden, &quant);
    if (st == SDQ_OK) st = sdq_layer_set_quant(ctx, net->out, &quant);
    if (st == SDQ_OK) st = fit(ctx, net, SDQ_FAKE, 1e-4f, 200);
    printf("fake-quant training   loss %.5f\n", last_loss);
    if (st != SDQ_OK || !x) return sdq_last_error(ctx);
    sdq_rng_uniform(&rng, sdq_f32(x), 10);
    fake = forward(ctx, net, x, SDQ_FAKE);
    st = sdq_layer_convert(ctx, net->hidden);
    if (st == SDQ_OK) st = sdq_layer_convert(ctx, net->out);
    int8 = forward(ctx, net, x, SDQ_INT8);
    if (!fake || !int8) return sdq_last_error(ctx);
    printf("converted; f(%.3f, %.3f) = %.4f\n", (double)sdq_f32(x)[0], (double)sdq_f32(x)[1],
           (double)sdq_f32(int8)[0]);
    printf("fake == int8: %s\n", memcmp(fake->data, int8->data, 5 * sizeof(float)) ? "no" : "yes");
    return st;
}

int main(void) {
    sdq_layer_desc hidden, out;
    network net = {NULL, NULL, SDQ_FLOAT};
    sdq_ctx *ctx;
    sdq_status st;
    memset(&hidden, 0, sizeof hidden);
    memset(&out, 0, sizeof out);
    hidden.name = "hidden";
    hidden.in = 2;
    hidden.out = 32;
    out.name = "out";
    out.in = 32;
    out.out = 1;
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) return 1;
    st = sdq_layer_create(ctx, &hidden, &net.hidden);
    if (st == SDQ_OK) st = sdq_layer_create(ctx, &out, &net.out);
    if (st == SDQ_OK) st = run(ctx, &net);
    if (st != SDQ_OK) fprintf(stderr, "%s\n", sdq_error_text(ctx));
    sdq_layer_free(ctx, net.hidden);
    sdq_layer_free(ctx, net.out);
    sdq_ctx_free(ctx);
    return st != SDQ_OK;
}
