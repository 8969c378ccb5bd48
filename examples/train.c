/* Quantization-aware training with distillation, data free: the float network teaches.
 *
 *     cc -O2 -fopenmp -I.. train.c -o train -lm
 *     ./train emoji/model 20 unet-int8.safetensors "red apple" "grinning face" "flag: japan"
 *
 * The student runs its int8 forward on weights quantized at every step (FAKE mode); gradients pass
 * straight through the rounding. Weights, biases, norms and the scales of the weights learn. The
 * state file makes the run go on where it was stopped.
 *
 * Expected output: a line per 5 steps with the loss, then "wrote unet-int8.safetensors" */
#define SDQ_IMPLEMENTATION
#include "sdq.h"

static int show(void *user, const char *stage, size_t i, size_t n, double value) {
    (void)user;
    if (i % 5 == 0 || i == n) printf("%s %zu/%zu  loss %.3e\n", stage, i, n, value);
    return 0;
}

static sdq_status fit(sdq_ctx *ctx, sdq_model *student, const sdq_states *states,
                      const sdq_recipe *recipe, size_t steps) {
    sdq_optim_desc how;
    sdq_fit_desc run;
    sdq_distill_task task;
    sdq_optim *optim = NULL;
    sdq_status st;
    memset(&how, 0, sizeof how);
    memset(&run, 0, sizeof run);
    memset(&task, 0, sizeof task);
    how.lr = 1e-6f;
    how.clip = 1.0f;
    task.student = student;
    task.states = states;       /* they hold the teacher's answers */
    task.batch = 4;
    task.teacher_loss = 1.0f;
    run.steps = steps;
    run.seed = 1;
    run.state = "train.state";
    run.save_every = 10;
    run.progress = show;
    st = sdq_optim_create(ctx, &how, &optim);
    if (st == SDQ_OK) st = sdq_optim_add_student(ctx, optim, student, recipe, 1.0f);
    if (st == SDQ_OK) st = sdq_fit(ctx, optim, &run, sdq_distill_task_loss, &task);
    sdq_optim_free(ctx, optim);
    return st;
}

static sdq_status train(sdq_ctx *ctx, const char *model, size_t steps, const char *out,
                        const char *const *prompts, size_t n) {
    const sdq_recipe recipe = sdq_recipe_default();
    sdq_pipeline_desc load;
    sdq_txt2img_desc desc;
    sdq_pipeline *pipe = NULL;
    sdq_states *states = NULL;
    sdq_status st;
    memset(&load, 0, sizeof load);
    memset(&desc, 0, sizeof desc);
    load.trainable = 1;
    desc.steps = 10;
    desc.guidance = 4.0f;
    st = sdq_pipeline_load(ctx, model, &load, &pipe);
    if (st == SDQ_OK) st = sdq_recipe_apply(ctx, pipe->unet, &recipe, NULL);
    if (st == SDQ_OK) st = sdq_states_collect(ctx, pipe, prompts, n, &desc, &states);
    if (st == SDQ_OK) st = sdq_calibrate_states(ctx, pipe->unet, states, 8, 1, NULL, NULL);
    if (st == SDQ_OK) st = fit(ctx, pipe->unet, states, &recipe, steps);
    if (st == SDQ_OK) st = sdq_model_convert(ctx, pipe->unet);
    if (st == SDQ_OK) st = sdq_model_save_int8(ctx, pipe->unet, out, NULL, NULL);
    sdq_states_free(ctx, states);
    sdq_pipeline_free(ctx, pipe);
    return st;
}

int main(int argc, char **argv) {
    sdq_ctx *ctx;
    sdq_status st;
    if (argc < 5) {
        fprintf(stderr, "usage: %s MODEL STEPS OUT.safetensors PROMPT...\n", argv[0]);
        return 2;
    }
    if (sdq_ctx_create(NULL, &ctx) != SDQ_OK) return 1;
    st = train(ctx, argv[1], (size_t)strtoul(argv[2], NULL, 10), argv[3],
               (const char *const *)(argv + 4), (size_t)argc - 4);
    if (st != SDQ_OK) fprintf(stderr, "%s\n", sdq_error_text(ctx));
    else printf("wrote %s\n", argv[3]);
    sdq_ctx_free(ctx);
    return st != SDQ_OK;
}
