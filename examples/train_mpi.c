/* Training on several machines: data parallel over MPI, data free, the float network teaches.
 *
 *     mpicc -O2 -fopenmp -I.. train_mpi.c -o train_mpi -lm         (Debian: libopenmpi-dev)
 *     mpirun -n 2 ./train_mpi emoji/model 20 2 unet-int8.safetensors "red apple" "grinning face" \
 *         "flag: japan" "night"
 *
 * sdq.h knows no network: it asks for sums, minima and maxima over all processes, and reduce()
 * below gives them. A step has a fixed number of micro-batches (here 2), shared out among the
 * processes, so that any number of processes that divides it does the same training: to the bit
 * with two processes and two micro-batches, else but for the order of a sum. Every process
 * draws the trajectories of its share of the prompts, calibrates on them and, at the end, compares
 * pictures of its share of the seeds. The last prompt is held out for validation.
 * OUT.state is the state: it must be on a disk that all machines see. OUT is written at the end.
 *
 * Expected output: a line per step, "validation loss X", "PSNR X dB over 4 pictures", "wrote .." */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include <limits.h>
#include <mpi.h>

enum { MOST_SPANS = 4096, PICTURES = 4 };

/* All arrays at once: the library sends small ones together and large ones in parts. The
 * algorithms of Open MPI add in an order that does not depend on the process. */
static int reduce(void *user, sdq_reduce how, const sdq_span *span, size_t n) {
    static MPI_Request request[MOST_SPANS];
    const MPI_Op op = how == SDQ_REDUCE_SUM ? MPI_SUM : how == SDQ_REDUCE_MIN ? MPI_MIN : MPI_MAX;
    size_t i;
    (void)user;
    for (i = 0; i < n; i++)
        if (n > MOST_SPANS || span[i].count > INT_MAX
            || MPI_Iallreduce(MPI_IN_PLACE, span[i].values, (int)span[i].count, MPI_FLOAT, op,
                              MPI_COMM_WORLD, &request[i]) != MPI_SUCCESS)
            return 1;
    return MPI_Waitall((int)n, request, MPI_STATUSES_IGNORE) != MPI_SUCCESS;
}

typedef struct work {
    sdq_ctx *ctx;
    sdq_group group;
    sdq_recipe recipe;
    sdq_pipeline *pipe;         /* the float network: the teacher */
    sdq_model *student;
    sdq_states *states, *held;
    const char *const *prompts; /* the last one is held out */
    size_t count;
} work;

static int show(void *user, const sdq_fit_info *info) {
    const work *w = (const work *)user;
    if (w->group.rank == 0 && info->step)
        printf("step %zu/%zu  loss %.6e  |g| %.3e\n", info->step, info->steps, info->loss,
               info->grad_norm);
    if (w->group.rank == 0 && info->validated && info->step == info->steps)
        printf("validation loss %.9e\n", info->validation);
    return SDQ_FIT_GO;
}

/* Trajectories and ranges: each process its share, then all have all. */
static sdq_status prepare(work *w, const char *model) {
    const size_t n = w->count - 1, rank = w->group.rank, ranks = w->group.ranks;
    const size_t first = rank * n / ranks, end = (rank + 1) * n / ranks;
    sdq_txt2img_desc desc;
    sdq_status st;
    memset(&desc, 0, sizeof desc);
    desc.steps = 10;
    desc.guidance = 4.0f;
    desc.seed = 1 + first;      /* prompt i has the seed 1 + i whoever draws it */
    st = sdq_pipeline_load(w->ctx, model, NULL, &w->pipe);
    if (st == SDQ_OK) st = sdq_model_load(w->ctx, model, SDQ_PART_UNET, &w->student);
    if (st == SDQ_OK) st = sdq_recipe_apply(w->ctx, w->student, &w->recipe, NULL);
    if (st == SDQ_OK)
        st = sdq_states_collect(w->ctx, w->pipe, w->prompts + first, end - first, &desc, &w->states);
    if (st == SDQ_OK) st = sdq_calibrate_states(w->ctx, w->student, w->states, 8, 0, NULL, NULL);
    if (st == SDQ_OK) st = sdq_model_reduce_ranges(w->ctx, w->student, &w->group);
    if (st == SDQ_OK) st = sdq_states_gather(w->ctx, &w->group, &w->states);
    desc.seed = 1 + n;
    if (st == SDQ_OK) st = sdq_states_collect(w->ctx, w->pipe, w->prompts + n, 1, &desc, &w->held);
    return st;
}

static sdq_status fit(work *w, size_t steps, size_t batches, const char *state) {
    sdq_optim_desc how;
    sdq_fit_desc run;
    sdq_distill_task task, held;
    sdq_optim *optim = NULL;
    sdq_status st;
    memset(&how, 0, sizeof how);
    memset(&run, 0, sizeof run);
    memset(&task, 0, sizeof task);
    how.lr = 2e-6f;
    task.student = w->student;
    task.states = w->states;    /* they hold the teacher's answers */
    task.batch = 4;
    task.teacher_loss = 1.0f;
    held = task;
    held.states = w->held;
    run.steps = steps;
    run.accumulate = batches / w->group.ranks;
    run.seed = 1;
    run.state = state;
    run.save_every = 10;
    run.after = show;
    run.user = w;
    run.validate = sdq_distill_task_loss;
    run.validate_user = &held;
    run.validate_every = steps ? steps : 1;
    run.validate_batches = 8;
    run.group = &w->group;
    st = sdq_optim_create(w->ctx, &how, &optim);
    if (st == SDQ_OK) st = sdq_optim_add_student(w->ctx, optim, w->student, &w->recipe, 1000.0f);
    if (st == SDQ_OK) st = sdq_fit(w->ctx, optim, &run, sdq_distill_task_loss, &task);
    sdq_optim_free(w->ctx, optim);
    return st;
}

/* How near the int8 pictures are to the float ones: each process its seeds. */
static sdq_status evaluate(work *w) {
    double sum = 0.0, all = 0.0;
    size_t i;
    w->pipe->unet_int8 = w->student;    /* the pipeline frees it */
    w->student = NULL;
    for (i = w->group.rank; i < PICTURES; i += w->group.ranks) {
        sdq_txt2img_desc desc;
        sdq_image a, b;
        sdq_status st;
        memset(&desc, 0, sizeof desc);
        desc.prompt = w->prompts[w->count - 1];
        desc.steps = 10;
        desc.guidance = 4.0f;
        desc.seed = 100 + i;
        st = sdq_txt2img(w->ctx, w->pipe, &desc, &a);
        if (st != SDQ_OK) return st;
        desc.precision = SDQ_PRECISION_INT8;
        st = sdq_txt2img(w->ctx, w->pipe, &desc, &b);
        if (st == SDQ_OK) sum += sdq_psnr(a.px, b.px, a.w * a.h * a.c);
        sdq_image_free(w->ctx, &a);
        if (st != SDQ_OK) return st;
        sdq_image_free(w->ctx, &b);
    }
    MPI_Reduce(&sum, &all, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    if (w->group.rank == 0) printf("PSNR %.4f dB over %d pictures\n", all / PICTURES, PICTURES);
    return SDQ_OK;
}

static sdq_status train(work *w, char **argv, size_t steps, size_t batches) {
    char state[1024];
    sdq_status st;
    (void)snprintf(state, sizeof state, "%s.state", argv[4]);
    w->recipe = sdq_recipe_default();
    w->recipe.range_conv = SDQ_RANGE_STATIC;
    w->recipe.bias_correction = 0;      /* it would need the states of all processes */
    st = prepare(w, argv[1]);
    if (st == SDQ_OK) st = fit(w, steps, batches, state);
    if (st == SDQ_OK) st = sdq_model_convert(w->ctx, w->student);
    if (st == SDQ_OK && w->group.rank == 0)
        st = sdq_model_save_int8(w->ctx, w->student, argv[4], NULL, NULL);
    if (st == SDQ_OK) st = evaluate(w);
    if (st == SDQ_OK && w->group.rank == 0) printf("wrote %s\n", argv[4]);
    return st;
}

int main(int argc, char **argv) {
    int rank, ranks;
    size_t steps, batches;
    work w;
    sdq_status st;
    memset(&w, 0, sizeof w);
    if (MPI_Init(&argc, &argv) != MPI_SUCCESS) return 1;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    steps = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
    batches = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
    if (argc < 6 + ranks || batches == 0 || batches % (size_t)ranks) {
        if (rank == 0)
            fprintf(stderr, "usage: %s MODEL STEPS BATCHES OUT.safetensors PROMPT...\nBATCHES: of a"
                    " step, a multiple of the number of processes; one prompt more than those\n",
                    argv[0]);
        MPI_Finalize();
        return 2;
    }
    w.group.rank = (size_t)rank;
    w.group.ranks = (size_t)ranks;
    w.group.reduce = reduce;
    w.prompts = (const char *const *)(argv + 5);
    w.count = (size_t)argc - 5;
    if (sdq_ctx_create(NULL, &w.ctx) != SDQ_OK) MPI_Abort(MPI_COMM_WORLD, 1);
    st = train(&w, argv, steps, batches);
    if (st != SDQ_OK) {         /* the others wait for this process: end them, too */
        fprintf(stderr, "process %d: %s\n", rank, sdq_error_text(w.ctx));
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    sdq_states_free(w.ctx, w.held);
    sdq_states_free(w.ctx, w.states);
    sdq_model_free(w.ctx, w.student);
    sdq_pipeline_free(w.ctx, w.pipe);
    sdq_ctx_free(w.ctx);
    MPI_Finalize();
    return 0;
}
