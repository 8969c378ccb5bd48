/* sdq.h - Stable Diffusion, quantized: one header that makes it fast and small on ordinary CPUs.
 * v0.1 - public interface may still change - MIT licence, at the end of this file
 * SPDX-License-Identifier: MIT
 *
 * It loads a Stable Diffusion model (diffusers folder or single file), makes its UNet int8 by
 * calibration, quantization-aware training and distillation, and draws pictures with it, some
 * evaluations of the network in float and the rest in int8. No dependency but libc and libm.
 *
 * Do this in exactly ONE .c or .cpp file of your program, never in a header:
 *
 *     #define SDQ_IMPLEMENTATION
 *     #include "sdq.h"
 *
 * and include sdq.h without the define wherever else you need it. Build with
 *
 *     cc -O2 -fopenmp prog.c -lm         (leave out -fopenmp for one thread)
 *
 * No -m flags: the kernels for AVX2, AVX-512 and VNNI are in the same object and are chosen at
 * run time.
 *
 * A complete program:
 *
 *     #define SDQ_IMPLEMENTATION
 *     #include "sdq.h"
 *     int main(void) {
 *         sdq_ctx *ctx;
 *         sdq_pipeline *pipe;
 *         sdq_image image;
 *         sdq_txt2img_desc desc = {0};
 *         desc.prompt = "woman astronaut: medium-light skin tone";
 *         if (sdq_ctx_create(NULL, &ctx)) return 1;
 *         if (sdq_pipeline_load(ctx, "examples/emoji/model", NULL, &pipe)
 *             || sdq_txt2img(ctx, pipe, &desc, &image)
 *             || sdq_image_write(ctx, "out.png", &image, NULL, 0))
 *             return fprintf(stderr, "%s\n", sdq_error_text(ctx)), 1;
 *         return 0;
 *     }
 *
 * What sdq.h does NOT do: SDXL, inpainting, LoRA files, prompt weighting, pickles (.ckpt, .bin),
 * GPUs, big-endian machines. It prints nothing, never exits, reads no environment variables and
 * has no mutable globals.
 *
 * Contents (search for the marks):
 *
 *     >>manual        the book: load, draw, calibrate, train, convert; numerics, memory, errors
 *     >>api-config >>api-types >>api-context >>api-tensor >>api-ops >>api-layer >>api-quant
 *     >>api-profile
 *     >>api-files (also pictures, datasets, tokenizers) >>api-random >>api-scheduler >>api-report
 *     >>api-model >>api-train >>api-tasks >>api-pipeline >>api-recipe
 *     >>impl          includes, compiler detection
 *     >>util >>error >>memory >>parallel >>cpu >>qmath
 *     >>kernel-list   every kernel, its definition, one table per instruction set
 *     >>random        torch's generators
 *     >>tensor
 *     >>gemm >>attention                  one driver for every product, float and int8
 *     >>tape >>ops >>layer                forward, backward and int8 rule of every operation
 *     >>io >>json >>safetensors >>image >>dataset >>tokenizer
 *     >>optim         AdamW and the training loop
 *     >>single-file   a whole model in one file: what it is, its names, its configuration
 *     >>model >>blocks >>text >>unet >>vae >>model-file     the networks, each written once
 *     >>scheduler >>pipeline >>report
 *     >>tasks >>recipe >>calibrate >>distill >>convert >>schedule
 *     >>kernel-text   the kernels, compiled once per instruction set
 *     >>changes >>licence
 *
 * ===========================================================================
 * >>manual
 *
 * One network, three modes
 *     A convolution or linear layer is an sdq_layer: weights, quantizer. An evaluation of a network
 *     is told its mode:
 *       SDQ_FLOAT   fp32
 *       SDQ_FAKE    the int8 forward on weights quantized at this moment; the float weights stay
 *                   and get straight-through gradients. For calibration and training.
 *       SDQ_INT8    packed int8 weights, input quantized on the fly, int32 sums, float results
 *     FAKE runs the int8 kernels, so FAKE and INT8 are equal to the bit and converting changes no
 *     number. (The weights of layers that stay float are rounded to halves before, by
 *     sdq_recipe_apply, so that int8 files are small; what came from F16 does not change.)
 *
 * Drawing
 *     sdq_pipeline_load reads a diffusers folder (tokenizer/, text_encoder/, unet/, vae/,
 *     scheduler/) or a single file of SD 1 or SD 2; sdq_txt2img draws. desc.precision says which
 *     evaluations of the denoising loop are float: all, none, the first and last k, or the schedule
 *     stored with the int8 file. The same seed gives the picture that diffusers gives on a CPU (up
 *     to float rounding). Prompts become the ids of transformers' CLIPTokenizerFast. Its slow
 *     CLIPTokenizer, which some installations of diffusers load, differs on ideographs, on control
 *     and invisible characters and on a final sigma: the picture is then another one.
 *
 * Quantizing
 *     sdq_recipe_default() or _reference() -> sdq_recipe_apply(unet) -> sdq_states_collect (the
 *     sampler's own trajectories; prompts only) -> sdq_calibrate_states -> [training] ->
 *     sdq_model_convert -> sdq_model_save_int8. Finer ranges are worth more than anything else
 *     (range_conv, range_linear: STATIC, PICTURE, POSITION, BLOCK), then float layers near the end
 *     of the network (quantize_shortcuts, quantize_last_self). attention_bits is for speed: the
 *     default of 16 loses nothing that can be measured against 32 (float), 8 a third of a decibel.
 *     The decoder needs no calibration: sdq_pipeline_desc.vae_int8.
 *     weight_bits 4 makes a file of half the size and costs a good part of the likeness (28 dB for
 *     46 in the emoji model, 29 to 30 with weight_group 16 and training); it is as fast as 8 bits
 *     and takes the same memory.
 *
 * Training
 *     Any function that computes a loss with ops can be trained by sdq_fit: it must draw its
 *     randomness from the generator it is given. Ready-made losses: sdq_vae_task_loss,
 *     sdq_diffusion_task_loss, sdq_distill_task_loss. With a state file a run that was killed goes
 *     on from its last save and ends in the same bytes. The state has the ranges of calibration,
 *     too, and is written before the first step: going on does not calibrate again.
 *
 * Long runs
 *     The state file is written to a temporary name, flushed and renamed, every save_every steps,
 *     when the callback `after` says SDQ_FIT_SAVE (the library reads no clock) and when it says
 *     SDQ_FIT_STOP (it catches no signal: a program's handler sets a flag that the callback reads).
 *     A write error stops the run and leaves the state of before. A loss or gradient that is not
 *     finite, or a loss far above its running mean, stops it with the step and the layer. With
 *     `validate` the loss on held-out data is measured with the same noise every time, on the
 *     averages if there are any, and `best` keeps the weights of its minimum. What costs minutes
 *     before the first step is kept in files that grow record by record and are refused when
 *     they are stale: sdq_samples_cache, sdq_states_cache. No file has a time in it.
 *
 * More than one machine
 *     sdq_fit_desc.group joins processes; examples/train_mpi.c is how with MPI. Each draws its own
 *     micro-batches (numbers rank, rank + ranks, ..: together those of one process with ranks times
 *     the accumulation), the gradients are added up after the last one, before clipping, and every
 *     process makes the same update. Two processes with one micro-batch each do what one process
 *     does with two, to the bit; with more, sums are in another order and equal but for rounding.
 *     Ranges observed on shares are joined by minimum and maximum
 *     (sdq_model_reduce_ranges), trajectories in order (sdq_states_gather). Observers that move
 *     while training are joined after every step; one process would move them after every
 *     micro-batch. Calibrating, drawing and measuring need no joining but at their end: share out
 *     prompts or seeds.
 *     Planning, for P trained parameters and N machines: a step sends and receives 2 (N-1)/N 4 P
 *     bytes per machine (a ring). A UNet of SD 1.5, P = 860e6: 3.4 GB for two machines, 5.2 GB for
 *     four, 6.9 GB at most; 3.4 to 6.9 s at 1 GB/s (10 Gbit Ethernet), ten times that at 1 Gbit.
 *     A micro-batch takes C seconds, the exchange X, the update U: a step of k micro-batches per
 *     machine takes k C + X + U, its efficiency is k C / (k C + X + U). For C = 25 s at 1 GB/s
 *     (X = 5, U = 3) one micro-batch gives 76 %, four 93 %: accumulate before buying a network.
 *     The exchange begins when all gradients are there; reduce() gets them in one call and can keep
 *     many messages in flight, but does not overlap with backward: at most min(X, C/2) seconds are
 *     lost by that. train_set SMALL (0.7e6 numbers there) sends 3 MB: any network will do.
 *     Memory is that of one machine on each; nothing is shared out but the batch.
 *
 * Training a quantized network
 *     The float network teaches the FAKE one on states of its own trajectories, from prompts alone.
 *     At 8 bits with dynamic ranges calibration leaves little to repair, and training all weights
 *     does more harm than good: Adam moves every weight by the rate, however small its gradient,
 *     and the network drifts. What is safe is to train few parameters (train_set SMALL: biases,
 *     norms and scales, which move in relative steps). A low error of single evaluations does not
 *     make the same picture: rounding averages out over a run, errors that point the same way add
 *     up. The coherent loss is that of the sum of neighbouring evaluations. What was tried and what
 *     it brought is told in examples/emoji/README.md.
 *
 *     A step of Stable Diffusion 1.5 (860 million weights, 512x512, batch 1, checkpoint 1, teacher
 *     in halves) takes, on two Zen 5 cores, and needs at most (tools/train_full.c):
 *         train_set ALL                     9-11 s   15.5 GiB   weights, gradients, two moments
 *         ALL, moments8                     9-11 s   10.7 GiB   moments in a byte each
 *         ALL, last_blocks 8                 5.5 s    5.9 GiB   gradients of 8 blocks
 *         LORA of rank 8, packed            11.7 s    4.4 GiB   the weights stay halves
 *         SCALES, packed                    10.3 s    4.2 GiB
 *     An average of the weights (ema) is 3.2 GiB more. packed: sdq_model_load_packed.
 *     So many weights want a small rate, for Adam moves all of them at once: with random weights,
 *     static ranges and batches of one, 30 steps of lr 3e-8 took the validation loss from 1.679e-4
 *     to 1.634e-4 (train_full recipe=static noise=0 validate=4 lr=3e-8 steps=30), while 30 steps
 *     of sdq train with 3e-7, learned scales and batches of two made one rise from 1.1e-4 to
 *     6.7e-4. tools/kill_full.sh kills a training and compares what it ends in.
 *
 * What to do with a model of your own (measured in tools/STUDY.md)
 *     1. Quantize with the defaults and 8 prompts of the kind you draw; look at pictures of others.
 *     2. Not near enough: range_conv and range_linear BLOCK, the last evaluations in float
 *        (sdq_schedule_search). Nothing else gives as much, and neither needs training.
 *     3. Few steps: a scheduler that does not amplify rounding. PNDM does: 34 dB in 20 steps, where
 *        DPM-Solver++, DDIM and Euler give 46 to 48.
 *     4. Static ranges everywhere: train the scales (train_set SCALES) a few hundred steps: +1.5
 *        dB. With finer ranges training changes no picture.
 *     5. 4 bits: weight_group 16 (+1.3 dB), and train all weights (train_set ALL, lr 3e-5, cosine,
 *        no average and no decay; +0.7, moments8 as good); scales or biases alone make it worse.
 *
 * Numerics and determinism
 *     The same input gives the same bits on every instruction set, with any number of threads, and
 *     whether a picture is drawn alone or in a batch. int8 sums are exact. Every float sum has a
 *     fixed order: a product is one chain of fused multiply-adds over k, a reduction runs in 16
 *     lanes joined as a tree. exp, erf and their relatives are this file's own polynomials.
 *     Large 3x3 convolutions (32x32 pixels and more) of layers whose float weights cannot change
 *     any more are done by Winograd's method: faster, and equal to the direct sum but for 5e-6.
 *     So the float UNet of a pipeline that is loaded for training differs in the last bits.
 *     Rounding is half to even. Compile without -ffast-math; the header refuses it.
 *
 * Memory and ownership
 *     Results of ops live in the context's arena until you release it to a mark. Objects made by
 *     *_create, *_load and *_open are on the heap and freed by their *_free with the same context
 *     (or one with the same allocator). Nothing that is passed in is kept unless the text says so.
 *     sdq_pipeline_desc.on_demand holds one network at a time, vae_tiling decodes in bands of rows;
 *     neither changes a bit. sdq_txt2img_memory tells what a drawing will need.
 *
 * Threads
 *     A context belongs to one thread at a time. Loaded models do not change in FLOAT and INT8 mode
 *     and may be shared by several contexts. FAKE mode changes a model's observers: one user.
 *
 * Speed
 *     sdq_ctx_profile tells where the time of a context goes, by kind of work and by layer, with
 *     a clock that the program gives. `sdq bench` prints both for a model.
 *
 * Errors
 *     Functions return sdq_status; ops return NULL. The first error stays in the context with one
 *     sentence that names file, tensor, what was expected and what was found, until
 *     sdq_clear_error. While an error stands, ops do nothing, so a formula needs one check at its
 *     end.
 *
 * Files
 *     Float models are diffusers folders (F32, F16, BF16; whole or in shards; where there is
 *     nothing else, the variant fp16), or single files of SD 1 and SD 2 as web interfaces save
 *     them. A single file has no configuration: its names and shapes are one, and what they do not
 *     tell is as in the published models (>>single-file). Nothing in it says for certain what an SD
 *     2 network predicts: velocity is assumed, as the models for 768 pixels do, unless the file has
 *     the step count of the base model, the key modelspec.prediction_type, or the caller says so.
 *     Nor has it a tokenizer: give CLIP's merges along (tools/clip_vocab.inc). Pickles (.ckpt,
 *     .bin) are refused, with the line of Python that converts them. sdq_file_describe tells what
 *     else a file is.
 *
 *     A quantized UNet is one safetensors file; >>convert lists its arrays. Its metadata says
 *     sdq.config, sdq.layer.NAME, sdq.recipe, sdq.schedule, and two hashes of 16 hexadecimal
 *     digits: sdq.source of the float UNet's weights as they were loaded (F32, F16 and BF16 copies
 *     of equal values are the same; zeros: they came from no file), and sdq.hash of all arrays and
 *     all other metadata. Both are sums, modulo 2^64, of one hash per array (name, shape, values,
 *     floats as F32) and per pair, so no order matters. The hash takes words w of 8 bytes, little
 *     endian, the last filled with zeros, into four lanes in turn:
 *         h = (h ^ w) 0x9e3779b97f4a7c15,  h ^= h >> 32
 *     and joins the lanes and the length in the same way: sdq__u_hash is the definition.
 *
 * Options, defined before the implementation is included
 *     SDQ_STATIC         all functions private to this file
 *     SDQ_SELF "name.h"  if you renamed this file
 *     SDQ_NO_SIMD        scalar kernels only (slow: for reference)
 *     SDQ_NO_MMAP        files are read instead of mapped
 *     SDQ_ASSERT(x)      replaces assert for this file's own invariants
 *
 * Words
 *     n,c,h,w entry, channels, height, width; oc,kh,kw output channels and kernel; m,n,k rows,
 *     columns and depth of a product; t timestep; q int8 value, s scale, z zero point, acc int32
 *     sum; d<name> gradient of <name>; sigma noise level.
 * ======================================================================== */
#ifndef SDQ__KERNEL_PASS /* the file proper; it includes itself for >>kernel-text */
/* ===========================================================================
 * >>api-config   version and linkage
 * ======================================================================== */
#ifndef SDQ_H
#define SDQ_H

#include <stddef.h>
#include <stdint.h>

#define SDQ_VERSION_MAJOR 0
#define SDQ_VERSION_MINOR 1
#define SDQ_VERSION_PATCH 0

/* Linkage of the public functions. SDQ_STATIC makes them private to the
 * translation unit that defines SDQ_IMPLEMENTATION. */
#ifndef SDQ_API
#ifdef SDQ_STATIC
#define SDQ_API static
#else
#define SDQ_API extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ===========================================================================
 * >>api-types   status, data types, tiers, modes
 * ======================================================================== */

/* Every status: name, value, what it means. 0 is success, errors are negative. */
#define SDQ_STATUS_LIST(X) \
    X(SDQ_OK, 0, "ok") \
    X(SDQ_ERR_ARGUMENT, -1, "invalid argument") \
    X(SDQ_ERR_OOM, -2, "out of memory") \
    X(SDQ_ERR_IO, -3, "file could not be read or written") \
    X(SDQ_ERR_FORMAT, -4, "file is damaged or not of the expected format") \
    X(SDQ_ERR_UNSUPPORTED, -5, "not supported") \
    X(SDQ_ERR_SHAPE, -6, "shapes do not fit") \
    X(SDQ_ERR_MISSING, -7, "a required tensor, key or file is missing") \
    X(SDQ_ERR_NOT_CALIBRATED, -8, "a quantizer has no range yet: calibrate first") \
    X(SDQ_ERR_CANCELLED, -9, "cancelled by the progress callback") \
    X(SDQ_ERR_NUMERIC, -10, "a value is not finite")

typedef enum sdq_status {
#define SDQ__X(name, value, text) name = value,
    SDQ_STATUS_LIST(SDQ__X)
#undef SDQ__X
    SDQ_STATUS_LAST = -11
} sdq_status;

typedef enum sdq_dtype {
    SDQ_F32 = 0, SDQ_F16, SDQ_BF16, SDQ_F64, SDQ_I8, SDQ_U8, SDQ_I16, SDQ_U16,
    SDQ_I32, SDQ_U32, SDQ_I64, SDQ_U64, SDQ_BOOL, SDQ_DTYPE_COUNT
} sdq_dtype;

/* Instruction sets a context can be made to use. Results are equal on all of them. */
typedef enum sdq_tier {
    SDQ_TIER_AUTO = 0, SDQ_TIER_SCALAR, SDQ_TIER_AVX2, SDQ_TIER_AVX512,
    SDQ_TIER_AVX512VNNI, SDQ_TIER_COUNT
} sdq_tier;

/* The number mode of one evaluation. See the manual, "One network, three modes". */
typedef enum sdq_mode { SDQ_FLOAT = 0, SDQ_FAKE, SDQ_INT8, SDQ_MODE_COUNT } sdq_mode;

/* Progress of a long call: stage name, item i of n, a value that belongs to the stage
 * (a loss, seconds). Called on the caller's thread. Non-zero cancels the call. */
typedef int (*sdq_progress_fn)(void *user, const char *stage, size_t i, size_t n, double value);

/* ===========================================================================
 * >>api-context   contexts, errors, memory
 * ======================================================================== */

typedef struct sdq_ctx sdq_ctx;

typedef struct sdq_ctx_desc {
    sdq_tier tier;      /* AUTO: the best one this CPU and OS can run; others are caps */
    int threads;        /* 0: all processors OpenMP reports; without OpenMP always 1; <= 1024 */
    void *(*alloc)(void *user, size_t bytes);   /* NULL: malloc, free */
    void (*release)(void *user, void *p);
    void *user;
} sdq_ctx_desc;

/* Create a context: allocator, thread count, instruction set, error, scratch memory.
 * A context belongs to one thread at a time; different contexts never interact.
 *   desc   NULL or zero-initialised = defaults. Not kept.
 *   out    the context, NULL on failure; free with sdq_ctx_free */
SDQ_API sdq_status sdq_ctx_create(const sdq_ctx_desc *desc, sdq_ctx **out);
SDQ_API void sdq_ctx_free(sdq_ctx *ctx);
/* The first error since the last sdq_clear_error and its sentence ("" if none). */
SDQ_API sdq_status sdq_last_error(const sdq_ctx *ctx);
SDQ_API const char *sdq_error_text(const sdq_ctx *ctx);
SDQ_API void sdq_clear_error(sdq_ctx *ctx);
SDQ_API const char *sdq_status_name(sdq_status status);
SDQ_API sdq_tier sdq_ctx_tier(const sdq_ctx *ctx);
SDQ_API int sdq_ctx_threads(const sdq_ctx *ctx);
SDQ_API const char *sdq_tier_name(sdq_tier tier);
/* Whether this CPU and operating system can run the tier. */
SDQ_API int sdq_tier_available(sdq_tier tier);

/* Tensors live in the context's arena: a stack of memory. sdq_arena_mark remembers its height,
 * sdq_arena_release frees everything that was made since, and forgets the tape's part of it. */
typedef struct sdq_mark { size_t chunk, used; void *tape; } sdq_mark;
SDQ_API sdq_mark sdq_arena_mark(sdq_ctx *ctx);
SDQ_API void sdq_arena_release(sdq_ctx *ctx, sdq_mark mark);
/* The most bytes the arena has held since the context was made. */
SDQ_API size_t sdq_arena_peak(const sdq_ctx *ctx);

/* ===========================================================================
 * >>api-tensor   tensors
 *
 * Channels are innermost: pictures are [n,h,w,c], token sequences [n,t,c], vectors [n,c].
 * ======================================================================== */

typedef struct sdq_tensor {
    sdq_dtype dtype;    /* F32 for everything that ops compute; I32 for token ids */
    int rank;           /* 1..4 */
    size_t dim[4];      /* unused dims are 1 */
    void *data;
    float *grad;        /* NULL until a backward pass wrote to it */
    int needs_grad;     /* set by the user on leaves, inherited by results while recording */
    struct sdq__qinput *q;      /* private: the same numbers as bytes, for the layers that follow */
} sdq_tensor;

/* A tensor of zeros in the arena. NULL (and a sticky error) when memory is short. */
SDQ_API sdq_tensor *sdq_tensor_new(sdq_ctx *ctx, sdq_dtype dtype, int rank, const size_t *dim);
SDQ_API sdq_tensor *sdq_tensor_1d(sdq_ctx *ctx, size_t a);
SDQ_API sdq_tensor *sdq_tensor_2d(sdq_ctx *ctx, size_t a, size_t b);
SDQ_API sdq_tensor *sdq_tensor_3d(sdq_ctx *ctx, size_t a, size_t b, size_t c);
SDQ_API sdq_tensor *sdq_tensor_4d(sdq_ctx *ctx, size_t n, size_t h, size_t w, size_t c);
SDQ_API size_t sdq_tensor_count(const sdq_tensor *t);
static inline float *sdq_f32(const sdq_tensor *t) { return (float *)t->data; }

/* ===========================================================================
 * >>api-ops   operations and the tape
 *
 * An op computes at once and returns a new tensor in the arena. NULL in, NULL out: the first
 * error stays in the context, so that a formula needs no checks inside.
 * While the tape records, an op also notes what its backward needs.
 * ======================================================================== */

/* a + b of one shape. */
SDQ_API sdq_tensor *sdq_add(sdq_ctx *ctx, sdq_tensor *a, sdq_tensor *b);
/* s x */
SDQ_API sdq_tensor *sdq_scale(sdq_ctx *ctx, sdq_tensor *x, float s);
/* x [n,...,c] + v [n,c], the same vector at every position of an entry. */
SDQ_API sdq_tensor *sdq_add_vector(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *v);
/* x [n,t,c] + p [t' >= t, c], the same table for every entry (position embeddings). */
SDQ_API sdq_tensor *sdq_add_rows(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *p);
SDQ_API sdq_tensor *sdq_silu(sdq_ctx *ctx, sdq_tensor *x);
SDQ_API sdq_tensor *sdq_gelu(sdq_ctx *ctx, sdq_tensor *x);         /* erf form */
SDQ_API sdq_tensor *sdq_quick_gelu(sdq_ctx *ctx, sdq_tensor *x);   /* x sigmoid(1.702 x) */
/* [.., 2d] -> [.., d]: first half times gelu(second half). */
SDQ_API sdq_tensor *sdq_geglu(sdq_ctx *ctx, sdq_tensor *x);
SDQ_API sdq_tensor *sdq_softmax(sdq_ctx *ctx, sdq_tensor *x);      /* last dim */
/* gamma, beta: [c]. silu: apply SiLU to the result. */
SDQ_API sdq_tensor *sdq_group_norm(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *gamma,
                                   sdq_tensor *beta, int groups, float eps, int silu);
SDQ_API sdq_tensor *sdq_layer_norm(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *gamma,
                                   sdq_tensor *beta, float eps);
/* softmax(q k^T / sqrt(d)) v per head. q [n,tq,heads d], k and v [n,tk,heads d] -> like q.
 * causal: position i sees keys 0..i (tq == tk). */
SDQ_API sdq_tensor *sdq_attention(sdq_ctx *ctx, sdq_tensor *q, sdq_tensor *k, sdq_tensor *v,
                                  int heads, int causal);
/* The same with integer products of 8 or 16 bits, forward; backward is that of sdq_attention
 * (straight through). 16 bits are off by a tenth of what 8 are. Not causal. Heads of more than 640
 * channels are computed in float. */
SDQ_API sdq_tensor *sdq_attention_int(sdq_ctx *ctx, sdq_tensor *q, sdq_tensor *k, sdq_tensor *v,
                                      int heads, int bits);
SDQ_API sdq_tensor *sdq_upsample(sdq_ctx *ctx, sdq_tensor *x, size_t h, size_t w); /* nearest */
SDQ_API sdq_tensor *sdq_concat(sdq_ctx *ctx, sdq_tensor *a, sdq_tensor *b);        /* channels */
SDQ_API sdq_tensor *sdq_slice(sdq_ctx *ctx, sdq_tensor *x, size_t first, size_t count);
/* Entries of a batch, weighted and added up: x [n,..], weight [n] -> [1,..]. weight is copied. */
SDQ_API sdq_tensor *sdq_combine(sdq_ctx *ctx, sdq_tensor *x, const float *weight);
/* ids: I32 [n,t]; table [rows,c] -> [n,t,c]. An id outside the table is SDQ_ERR_ARGUMENT. */
SDQ_API sdq_tensor *sdq_embedding(sdq_ctx *ctx, sdq_tensor *ids, sdq_tensor *table);
/* Same data, another shape. */
SDQ_API sdq_tensor *sdq_reshape(sdq_ctx *ctx, sdq_tensor *x, int rank, const size_t *dim);

/* Losses: scalars [1], the mean over all elements (and over weight[n] per entry if not NULL). */
SDQ_API sdq_tensor *sdq_mse(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *target, const float *weight);
SDQ_API sdq_tensor *sdq_l1(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *target);
/* L1 of the horizontal plus L1 of the vertical differences of x - target. */
SDQ_API sdq_tensor *sdq_l1_edges(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *target);
/* KL of N(mean, exp(logvar)) from N(0,1), mean over elements; moments [n,h,w,2c]. */
SDQ_API sdq_tensor *sdq_kl(sdq_ctx *ctx, sdq_tensor *moments);
/* mean + exp(logvar/2) noise, logvar clamped to [-30,20]; noise [n,h,w,c]. */
SDQ_API sdq_tensor *sdq_sample_gaussian(sdq_ctx *ctx, sdq_tensor *moments, sdq_tensor *noise);

/* Record from here on. Until sdq_tape_end nothing that ops made may be released. */
SDQ_API void sdq_tape_begin(sdq_ctx *ctx);
/* Gradients of a scalar into every tensor that needs them. Adds to what .grad holds. */
SDQ_API sdq_status sdq_backward(sdq_ctx *ctx, sdq_tensor *loss);
SDQ_API void sdq_tape_end(sdq_ctx *ctx);
/* Run fn without recording and run it again, recorded, in the backward pass: the memory of one
 * block instead of all (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174).
 * fn(ctx, user, in, n) must be a pure function of its inputs; user must live until backward. */
typedef sdq_tensor *(*sdq_block_fn)(sdq_ctx *ctx, void *user, sdq_tensor **in, int n);
SDQ_API sdq_tensor *sdq_checkpoint(sdq_ctx *ctx, sdq_block_fn fn, void *user,
                                   sdq_tensor **in, int n);

/* ===========================================================================
 * >>api-layer   convolution and linear layers and their three modes
 * ======================================================================== */

/* What share of a layer's input has its own quantization range. Finer is better and slower. */
typedef enum sdq_range {
    SDQ_RANGE_DEFAULT = 0,
    SDQ_RANGE_STATIC,       /* one range for all pictures: calibrated, learnable */
    SDQ_RANGE_PICTURE,      /* each entry of the batch its own, found at run time */
    SDQ_RANGE_POSITION,     /* each pixel or token its own */
    SDQ_RANGE_BLOCK,        /* each pixel or token and block of 32 channels its own */
    SDQ_RANGE_COUNT
} sdq_range;

typedef struct sdq_layer sdq_layer;

typedef struct sdq_layer_desc {
    const char *name;       /* for messages and files; copied. NULL: "" */
    size_t in, out;         /* channels */
    int kernel;             /* 0 or 1: 1x1 or linear; 3: 3x3 */
    int stride;             /* 0 = 1 */
    int pad[4];             /* top, left, bottom, right */
    int no_bias;
} sdq_layer_desc;

/* A layer of zeros with int8 enabled and no ranges yet; on the heap.
 *   out   the layer, NULL on failure; free with sdq_layer_free
 * SDQ_ERR_ARGUMENT: no channels, a kernel over 3, a stride with a 1x1 kernel. */
SDQ_API sdq_status sdq_layer_create(sdq_ctx *ctx, const sdq_layer_desc *desc, sdq_layer **out);
/* layer may be NULL. */
SDQ_API void sdq_layer_free(sdq_ctx *ctx, sdq_layer *layer);
/* y = conv(x, w) + b (+ residual). x [..,in] for a 1x1 kernel, [n,h,w,in] otherwise; residual
 * NULL or shaped like y. The mode decides which weights and which kernels are used. */
SDQ_API sdq_tensor *sdq_layer_forward(sdq_ctx *ctx, sdq_layer *layer, sdq_tensor *x,
                                      sdq_tensor *residual, sdq_mode mode);
/* The float weights [out,kh,kw,in] and bias [out]: leaves for the optimizer, NULL when the layer
 * holds int8 weights only. Owned by the layer. */
SDQ_API sdq_tensor *sdq_layer_weight(sdq_layer *layer);
SDQ_API sdq_tensor *sdq_layer_bias(sdq_layer *layer);

/* ===========================================================================
 * >>api-quant   how a layer is quantized
 * ======================================================================== */

/* Where the scales of the weights come from. */
typedef enum sdq_weight_scale {
    SDQ_WEIGHT_CURRENT = 0,     /* max|w| / 127.5 of the weights as they are */
    SDQ_WEIGHT_MOVING,          /* moving average of the range (the published recipe) */
    SDQ_WEIGHT_FIXED            /* kept as they are; learnable */
} sdq_weight_scale;

/* The quantization settings of one layer. The names say what a 1 or the value does. */
typedef struct sdq_quant {
    int enabled;                /* 0: the layer computes in float in every mode */
    sdq_range range;            /* of the input; DEFAULT is POSITION for 1x1, STATIC for 3x3 */
    size_t split;               /* input channels [0,split) have ranges of their own; 0: no split */
    int quantize_output;        /* the published recipe: the result is quantized again */
    float moving;               /* observers: 0 = true min and max, else the moving constant */
    sdq_weight_scale weight_scale;
    int learn_scales;           /* static input scales and fixed weight scales get gradients */
    int weight_bits;            /* 4: weights of 4 bits, run by the int8 kernels; 0: 8 */
    size_t weight_group;        /* 4 bits: input channels of a tap that share a multiplier of the
                                 * channel's scale; 0: 64 */
} sdq_quant;

/* The settings of a layer. */
SDQ_API sdq_quant sdq_layer_quant(const sdq_layer *layer);
/* Change the settings; forgets the observed ranges. Only for a layer with float weights,
 * which may be packed.
 * SDQ_ERR_ARGUMENT: an unknown range, weight_bits other than 0, 4, 8, or 4 with
 * SDQ_WEIGHT_MOVING. */
SDQ_API sdq_status sdq_layer_set_quant(sdq_ctx *ctx, sdq_layer *layer, const sdq_quant *quant);
/* While on, every forward (FLOAT or FAKE) updates the observers of the layer. */
SDQ_API void sdq_layer_observe(sdq_layer *layer, int on);
/* Number of input ranges (2 when split, else 1), and one of them. 0 if it was never observed. */
SDQ_API int sdq_layer_input_range(const sdq_layer *layer, int part, float *scale, int32_t *zero);
/* Quantize and pack the weights as FAKE mode does at this moment; float weights are dropped. */
SDQ_API sdq_status sdq_layer_convert(sdq_ctx *ctx, sdq_layer *layer);
SDQ_API const char *sdq_layer_name(const sdq_layer *layer);

/* ===========================================================================
 * >>api-profile   where the time goes
 * ======================================================================== */

/* Kinds of work. Those of a backward pass are not told apart: OTHER, but for some products. */
typedef enum sdq_work {
    SDQ_WORK_OTHER = 0,     /* what has no kind of its own */
    SDQ_WORK_INT8,          /* products of int8 layers, to their float results */
    SDQ_WORK_FLOAT,         /* products of float layers */
    SDQ_WORK_QUANTIZE,      /* inputs of int8 layers, from float to bytes */
    SDQ_WORK_ATTENTION,     /* products of attention, packing and rounding for them */
    SDQ_WORK_SOFTMAX,       /* of attention */
    SDQ_WORK_NORM,
    SDQ_WORK_GEGLU,         /* alone or at the end of the product that makes its input */
    SDQ_WORK_ELEMENTS,      /* sums, activations */
    SDQ_WORK_COPY,          /* concatenation, upsampling, results moved down in the arena */
    SDQ_WORK_WAIT,          /* beginning and ending loops, waiting for the other threads */
    SDQ_WORK_COUNT
} sdq_work;
/* "int8 products", ..; "?" when unknown. */
SDQ_API const char *sdq_work_name(sdq_work work);

/* One forward pass of a layer, as it was. */
typedef struct sdq_layer_work {
    sdq_layer_desc layer;           /* its name lives with the layer */
    const sdq_tensor *x, *y;        /* input and result; y half as wide: with GEGLU */
    int int8;                       /* 0: computed in float */
    double seconds[SDQ_WORK_COUNT]; /* an input that several layers share was quantized before */
} sdq_layer_work;

/* Seconds of each kind of work. They are those of the thread that calls, which does its share of
 * the loops, so that they add up to the time that passed. */
typedef struct sdq_profile {
    double (*now)(void *user);      /* a clock in seconds; called by the thread that calls only */
    void (*layer)(void *user, const sdq_layer_work *work);      /* NULL, or called for each */
    void *user;
    double seconds[SDQ_WORK_COUNT]; /* added to */
    sdq_work work;                  /* private: what is going on, and since when */
    double since;
} sdq_profile;

/* Measure what the context does from here on.
 *   profile   must live until the next call. NULL: measure no longer, which costs nothing; the
 *             seconds are complete then.
 * SDQ_ERR_ARGUMENT: a profile without a clock. */
SDQ_API sdq_status sdq_ctx_profile(sdq_ctx *ctx, sdq_profile *profile);

/* ===========================================================================
 * >>api-files   safetensors files, pictures, datasets, tokenizers
 *
 * Every function that reads a file checks it completely first: a damaged or hostile file gives an
 * error, never a wrong read. Files are written under path + ".tmp" and renamed when complete.
 * ======================================================================== */

/* A key and its value, both UTF-8 and not NULL. */
typedef struct sdq_pair {
    const char *key, *value;
} sdq_pair;

/* One named array of a safetensors file, row-major. */
typedef struct sdq_entry {
    const char *name;
    sdq_dtype dtype;    /* SDQ_DTYPE_COUNT: listed, but of a kind sdq cannot read (F8, F4, ..) */
    int rank;           /* 0..8 */
    size_t dim[8];      /* unused dims are 1 */
    const void *data;   /* not aligned when the file was written by old programs */
    size_t bytes;
    sdq_dtype store;    /* writing F32 only: SDQ_F16 or SDQ_BF16 to round; else 0 */
} sdq_entry;

typedef struct sdq_file sdq_file;

/* Open and validate a safetensors file.
 *   out    the file, NULL on failure; close with sdq_file_close
 * The file is mapped into memory (read whole without mmap): do not change it while it is open.
 * Errors: SDQ_ERR_IO, _FORMAT (the sentence begins with safetensors' own error name), _OOM,
 * _UNSUPPORTED (rank above 8). An open file is constant and may be shared between threads. */
SDQ_API sdq_status sdq_file_open(sdq_ctx *ctx, const char *path, sdq_file **out);
/* Free the file and everything that entries of it point to. NULL is allowed. */
SDQ_API void sdq_file_close(sdq_ctx *ctx, sdq_file *file);
/* The number of arrays, and array i of them, sorted by name (NULL when i is too large). */
SDQ_API size_t sdq_file_count(const sdq_file *file);
SDQ_API const sdq_entry *sdq_file_entry(const sdq_file *file, size_t i);
/* The array of that name, or NULL. */
SDQ_API const sdq_entry *sdq_file_find(const sdq_file *file, const char *name);
/* The value of a key of the file's metadata, or NULL. Valid until the file is closed. */
SDQ_API const char *sdq_file_meta(const sdq_file *file, const char *key);

/* Write a safetensors file: equal input gives equal bytes, in the order safetensors uses.
 *   entries  n of them, any order; data may be NULL when bytes is 0
 *   meta     nmeta pairs, written in this order; NULL when nmeta is 0
 * Errors: SDQ_ERR_ARGUMENT (two equal names, sizes that do not fit), _IO (disk full, too), _OOM. */
SDQ_API sdq_status sdq_file_write(sdq_ctx *ctx, const char *path, const sdq_entry *entries,
                                  size_t n, const sdq_pair *meta, size_t nmeta);

/* Convert an array of any supported dtype to float. Large integers and F64 are rounded.
 *   out    one float per element
 * Errors: SDQ_ERR_UNSUPPORTED. */
SDQ_API sdq_status sdq_entry_to_f32(sdq_ctx *ctx, const sdq_entry *entry, float *out);
/* The number of elements. */
SDQ_API size_t sdq_entry_count(const sdq_entry *entry);
/* "F32", "BF16", .. as safetensors spells it; "?" when unknown. */
SDQ_API const char *sdq_dtype_name(sdq_dtype dtype);

/* A picture of 8-bit samples: [h,w,c] with c = 1 grey, 2 grey+alpha, 3 RGB, 4 RGB+alpha. */
typedef struct sdq_image { size_t w, h, c; unsigned char *px; } sdq_image;

/* A black (transparent) picture. *out is zeroed on failure; free with sdq_image_free. */
SDQ_API sdq_status sdq_image_new(sdq_ctx *ctx, size_t w, size_t h, size_t c, sdq_image *out);
/* Free the samples and zero the struct. NULL and an empty picture are allowed. */
SDQ_API void sdq_image_free(sdq_ctx *ctx, sdq_image *image);
/* Read a PNG (every colour type and depth, interlaced too; 16 bits are rounded to 8) or a binary
 * PPM/PGM (P6, P5); the kind is told by the content, not by the name. At most 2^26 pixels.
 * Errors: SDQ_ERR_IO, _FORMAT, _UNSUPPORTED, _OOM. */
SDQ_API sdq_status sdq_image_read(sdq_ctx *ctx, const char *path, sdq_image *out);
/* The same from memory; `what` names the picture in error sentences. */
SDQ_API sdq_status sdq_image_decode(sdq_ctx *ctx, const void *data, size_t bytes,
                                    const char *what, sdq_image *out);
/* Write a PNG, or a PPM/PGM when path ends in .ppm/.pgm (alpha is put over white).
 *   text   ntext pairs for the PNG's text chunks (key: 1..79 printable ASCII characters), such as
 *          "parameters"; NULL when ntext is 0
 * Errors: SDQ_ERR_ARGUMENT, _IO, _OOM. Equal input gives equal bytes. */
SDQ_API sdq_status sdq_image_write(sdq_ctx *ctx, const char *path, const sdq_image *image,
                                   const sdq_pair *text, size_t ntext);
/* A PNG in memory. *png is freed with sdq_bytes_free. */
SDQ_API sdq_status sdq_image_png_encode(sdq_ctx *ctx, const sdq_image *image,
                                        const sdq_pair *text, size_t ntext,
                                        unsigned char **png, size_t *bytes);
SDQ_API void sdq_bytes_free(sdq_ctx *ctx, unsigned char *bytes);
/* Resize to w x h: bilinear, the filter widened when shrinking (as Pillow's BILINEAR and
 * torchvision's antialias do). src and dst must differ; dst is new. */
SDQ_API sdq_status sdq_image_resize(sdq_ctx *ctx, const sdq_image *src, size_t w, size_t h,
                                    sdq_image *dst);
/* Resize so that the picture covers w x h, then cut the middle out of it. */
SDQ_API sdq_status sdq_image_fit(sdq_ctx *ctx, const sdq_image *src, size_t w, size_t h,
                                 sdq_image *dst);
/* To 3 channels: grey is repeated, alpha is put over white. */
SDQ_API sdq_status sdq_image_rgb(sdq_ctx *ctx, const sdq_image *src, sdq_image *dst);

typedef struct sdq_dataset sdq_dataset;

/* Open a folder of pictures with captions: metadata.jsonl ({"file_name", "text", "weight"} per
 * line, weight optional), else metadata.csv (with a header line naming these columns), else every
 * .png/.ppm/.pgm of the folder that has a NAME.txt beside it, sorted by name.
 *   out    NULL on failure; free with sdq_dataset_free
 * Names that leave the folder are refused. Pictures are read only when asked for.
 * Errors: SDQ_ERR_IO, _FORMAT, _MISSING (no picture), _OOM. Constant once open. */
SDQ_API sdq_status sdq_dataset_open(sdq_ctx *ctx, const char *folder, sdq_dataset **out);
SDQ_API void sdq_dataset_free(sdq_ctx *ctx, sdq_dataset *dataset);
SDQ_API size_t sdq_dataset_count(const sdq_dataset *dataset);
/* Caption, weight (1 unless given) and full path of item i < count; "" and 0 beyond. */
SDQ_API const char *sdq_dataset_caption(const sdq_dataset *dataset, size_t i);
SDQ_API float sdq_dataset_weight(const sdq_dataset *dataset, size_t i);
SDQ_API const char *sdq_dataset_path(const sdq_dataset *dataset, size_t i);
/* Read picture i as RGB, alpha over white. Free it with sdq_image_free. */
SDQ_API sdq_status sdq_dataset_image(sdq_ctx *ctx, const sdq_dataset *dataset, size_t i,
                                     sdq_image *out);

typedef struct sdq_tokenizer sdq_tokenizer;

typedef struct sdq_tokenizer_desc {
    size_t max_length;          /* ids per prompt with start and end; 0: 77 */
    const char *start, *end;    /* NULL: "<|startoftext|>", "<|endoftext|>" */
    const char *pad;            /* the token that fills up; NULL: end */
    const char *word_end;       /* mark of a word's last symbol; NULL: "</w>" */
} sdq_tokenizer_desc;

/* Load a CLIP tokenizer folder: vocab.json and merges.txt; tokenizer_config.json,
 * special_tokens_map.json and added_tokens.json when they are there. Ids are those of
 * transformers' CLIPTokenizerFast; see the manual for where CLIPTokenizer differs.
 *   out    NULL on failure; free with sdq_tokenizer_free. Constant, may be shared.
 * Errors: SDQ_ERR_IO, _FORMAT, _MISSING, _OOM. */
SDQ_API sdq_status sdq_tokenizer_load(sdq_ctx *ctx, const char *folder, sdq_tokenizer **out);
/* Make a tokenizer from the text of a merges file alone: ids are 256 bytes, 256 bytes at a word's
 * end, the merges in order, start, end - the numbering of CLIP. merges is not kept.
 *   desc   NULL or zeros: CLIP's own tokens, 77 ids */
SDQ_API sdq_status sdq_tokenizer_create(sdq_ctx *ctx, const char *merges, size_t bytes,
                                        const sdq_tokenizer_desc *desc, sdq_tokenizer **out);
SDQ_API void sdq_tokenizer_free(sdq_ctx *ctx, sdq_tokenizer *tokenizer);
/* Ids of a text: start, the text, end; cut to the model's length, then padded to it.
 *   utf8   invalid bytes count as U+FFFD
 *   ids    room for max; max 0 or ids NULL: only count
 *   count  NULL or receives the number of ids up to and including end, before cutting: more than
 *          sdq_tokenizer_length means that the end of the text was lost
 * Writes min(max, length) ids. Errors: SDQ_ERR_OOM, _ARGUMENT (max is 1). */
SDQ_API sdq_status sdq_tokenizer_encode(sdq_ctx *ctx, const sdq_tokenizer *tokenizer,
                                        const char *utf8, int32_t *ids, size_t max,
                                        size_t *count);
/* Ids per prompt; entries in the vocabulary; the ids that frame and fill. */
SDQ_API size_t sdq_tokenizer_length(const sdq_tokenizer *tokenizer);
SDQ_API size_t sdq_tokenizer_vocab(const sdq_tokenizer *tokenizer);
SDQ_API int32_t sdq_tokenizer_start(const sdq_tokenizer *tokenizer);
SDQ_API int32_t sdq_tokenizer_end(const sdq_tokenizer *tokenizer);
SDQ_API int32_t sdq_tokenizer_pad(const sdq_tokenizer *tokenizer);

/* ===========================================================================
 * >>api-random   reproducible random numbers
 *
 * A generator is a plain struct: keep it on the stack, copy it to fork the stream, write its
 * bytes to a checkpoint (it has no padding and no pointers; check it with sdq_rng_valid after
 * reading it back). Every number is the same to the bit on every machine, compiler and libm.
 * One generator belongs to one thread at a time. Nothing allocates.
 * ======================================================================== */

typedef enum sdq_rng_kind {
    SDQ_RNG_TORCH = 0,      /* torch's CPU generator: mt19937 */
    SDQ_RNG_PHILOX,         /* Philox4x32-10: torch on CUDA, AUTOMATIC1111's default */
    SDQ_RNG_COUNT
} sdq_rng_kind;

typedef struct sdq_rng {
    uint64_t seed;
    double spare;           /* torch, n < 16: the second normal of the last pair */
    uint32_t kind;          /* sdq_rng_kind */
    uint32_t has_spare;
    uint32_t pos;           /* mt19937: words of state already used, 624 = all */
    uint32_t offset;        /* Philox: calls made */
    uint32_t state[624];    /* mt19937 */
} sdq_rng;

/* Start a stream, as torch.Generator().manual_seed(seed) does. torch's CPU generator uses the
 * low 32 bits of the seed only, Philox all 64. A zeroed struct is not a generator. */
SDQ_API void sdq_rng_init(sdq_rng *rng, sdq_rng_kind kind, uint64_t seed);
/* Whether a struct that came from a file can be used: 1 or 0. */
SDQ_API int sdq_rng_valid(const sdq_rng *rng);
/* n draws of N(0,1), as one torch.randn(n) draws them. Two calls of 8 are not one call of 16. */
SDQ_API void sdq_rng_normal(sdq_rng *rng, float *out, size_t n);
/* The same draws for a tensor torch would shape [n,c,h,w], stored as [n,h,w,c]. */
SDQ_API void sdq_rng_normal_nchw(sdq_rng *rng, float *out, size_t n, size_t h, size_t w, size_t c);
/* n draws from [0,1) with 24 bits, as torch.rand(n). */
SDQ_API void sdq_rng_uniform(sdq_rng *rng, float *out, size_t n);
/* One draw from 0..n-1, as torch.randint(n, (1,)); 0 if n < 2. It is the remainder of a 32-bit word
 * (64-bit from n = 2^28 on): small values are favoured by less than n / 2^32 of their share. */
SDQ_API uint64_t sdq_rng_below(sdq_rng *rng, uint64_t n);
/* A permutation of 0..n-1, as torch.randperm(n) for n < 2^32 / 20. */
SDQ_API void sdq_rng_permutation(sdq_rng *rng, size_t *out, size_t n);

/* ===========================================================================
 * >>api-scheduler   from noise to a picture: PNDM, DDIM, Euler, DPM-Solver++, LCM
 *
 *     for (i = 0; i < sdq_scheduler_count(s); i++) {
 *         sdq_scheduler_scale_input(s, i, latent, in, count);
 *         eps = network(in, sdq_scheduler_timestep(s, i)), guidance;
 *         sdq_scheduler_step(ctx, s, i, eps, latent, latent, n, h, w, c, &rng);
 *     }
 * with latent = noise * sdq_scheduler_init_sigma(s) to begin with. Numbers are those of
 * diffusers 0.39 on a CPU. A scheduler holds the history of one run and belongs to one thread.
 * ======================================================================== */

typedef enum sdq_scheduler_kind {
    SDQ_SCHEDULER_DEFAULT = 0,  /* PNDM; in sdq_scheduler_desc_from_json the file's own class */
    SDQ_PNDM,                   /* PLMS; one evaluation more than steps */
    SDQ_DDIM,
    SDQ_EULER,
    SDQ_EULER_A,                /* ancestral: noise at every step */
    SDQ_DPMPP_2M,               /* DPM-Solver++, second order multistep, midpoint */
    SDQ_LCM,                    /* latent consistency models: noise at every step but the last */
    SDQ_SCHEDULER_COUNT
} sdq_scheduler_kind;

/* How beta grows with t: its square root linearly, or itself. */
typedef enum sdq_beta_schedule { SDQ_BETA_SCALED_LINEAR = 0, SDQ_BETA_LINEAR, SDQ_BETA_COUNT }
    sdq_beta_schedule;

/* What the network's output is: the noise e, v = a e - s x0, or x0. PNDM and Euler ancestral do
 * not take x0. */
typedef enum sdq_prediction {
    SDQ_PREDICT_EPSILON = 0, SDQ_PREDICT_V, SDQ_PREDICT_SAMPLE, SDQ_PREDICT_COUNT
} sdq_prediction;

/* Which timesteps: i T/N + offset; T - i T/N - 1; evenly from T-1 to 0. LCM has its own. */
typedef enum sdq_spacing {
    SDQ_SPACING_DEFAULT = 0,    /* leading for PNDM, DDIM; linspace for Euler, DPM-Solver++ */
    SDQ_SPACING_LEADING, SDQ_SPACING_TRAILING, SDQ_SPACING_LINSPACE, SDQ_SPACING_COUNT
} sdq_spacing;

/* All zeros: Stable Diffusion 1.5's PNDM with 50 steps. */
typedef struct sdq_scheduler_desc {
    sdq_scheduler_kind kind;
    size_t steps;               /* 0: 50 (LCM: 4) */
    size_t train_steps;         /* T; 0: 1000 */
    double beta_start;          /* 0: 0.00085 */
    double beta_end;            /* 0: 0.012 */
    sdq_beta_schedule beta_schedule;
    sdq_prediction prediction;
    sdq_spacing spacing;
    int steps_offset;           /* leading: added to every timestep. 0: 1; negative: none */
    int alpha_to_one;           /* PNDM, DDIM: after the last step no noise is left, not alpha[0] */
    int clip_sample;            /* DDIM, LCM: clip the predicted x0 ... */
    double clip_range;          /* ... to +- this. 0: 1 */
    double eta;                 /* DDIM: noise per step, 1 = DDPM's amount */
    int karras;                 /* Euler, DPM-Solver++: the sigmas of Karras et al. 2022, rho 7 */
    int final_sigma_min;        /* Euler, DPM-Solver++: end at training's smallest sigma, not 0 */
    int no_lower_order_final;   /* DPM-Solver++: second order at the end even below 15 steps */
    int euler_at_final;         /* DPM-Solver++: last step of first order */
    size_t lcm_steps;           /* LCM: steps that were distilled. 0: 50 */
    double timestep_scaling;    /* LCM: 0: 10 */
} sdq_scheduler_desc;

typedef struct sdq_scheduler sdq_scheduler;

/* Make the tables of a run.
 *   desc   NULL or zeros: see the struct. Not kept. Options that the kind does not know are ignored
 *   out    NULL on failure; free with sdq_scheduler_free
 * Errors: SDQ_ERR_ARGUMENT (values that do not fit, said which), _UNSUPPORTED, _OOM. */
SDQ_API sdq_status sdq_scheduler_create(sdq_ctx *ctx, const sdq_scheduler_desc *desc,
                                        sdq_scheduler **out);
SDQ_API void sdq_scheduler_free(sdq_ctx *ctx, sdq_scheduler *s);
/* Read a scheduler_config.json as diffusers' from_config does: keys that are absent get the
 * defaults of the class, keys of other classes are ignored.
 *   text   len bytes of JSON; `what` names them in error sentences (NULL: "scheduler_config.json")
 *   kind   SDQ_SCHEDULER_DEFAULT: the class named in the file; else this class, whatever the file
 *          was written for
 * Settings that would change the pictures and are not implemented are refused by name:
 * trained_betas, thresholding, rescale_betas_zero_snr, skip_prk_steps false for PNDM, ..
 * A bare scheduler: see sdq_pipeline_scheduler for what a pipeline makes of it.
 * steps stays 0. Errors: SDQ_ERR_FORMAT, _UNSUPPORTED, _ARGUMENT, _OOM. */
SDQ_API sdq_status sdq_scheduler_desc_from_json(sdq_ctx *ctx, const char *text, size_t len,
                                                const char *what, sdq_scheduler_kind kind,
                                                sdq_scheduler_desc *out);
/* "pndm", "ddim", "euler", "euler_a", "dpmpp2m", "lcm". */
SDQ_API const char *sdq_scheduler_name(sdq_scheduler_kind kind);
/* The kind of that name, SDQ_SCHEDULER_COUNT if none has it. */
SDQ_API sdq_scheduler_kind sdq_scheduler_kind_from_name(const char *name);

/* The description with all defaults filled in (steps_offset: 0 is none here). */
SDQ_API const sdq_scheduler_desc *sdq_scheduler_get_desc(const sdq_scheduler *s);
/* Evaluations of the network in a whole run (PNDM: steps + 1 from 2 steps on). */
SDQ_API size_t sdq_scheduler_count(const sdq_scheduler *s);
/* What evaluation i < count is told as its time. Not always an integer (Euler). */
SDQ_API float sdq_scheduler_timestep(const sdq_scheduler *s, size_t i);
/* The noise level sigma of evaluation i <= count; i == count is where the run ends. Euler and
 * DPM-Solver++ only, others give 0. */
SDQ_API float sdq_scheduler_sigma(const sdq_scheduler *s, size_t i);
/* The first latent is N(0,1) times this. */
SDQ_API float sdq_scheduler_init_sigma(const sdq_scheduler *s);
/* out = what evaluation i of the network sees of a sample: x / sqrt(sigma^2 + 1) for Euler, x for
 * others. out may be x. */
SDQ_API void sdq_scheduler_scale_input(const sdq_scheduler *s, size_t i, const float *x,
                                       float *out, size_t count);
/* The evaluation to begin with when a picture is redrawn with a strength of 0..1:
 * N - floor(N strength). Equal to the count or above: nothing to do. */
SDQ_API size_t sdq_scheduler_first(const sdq_scheduler *s, double strength);
/* out = x with the noise of evaluation i (picture to picture, inpainting). out may be x. */
SDQ_API void sdq_scheduler_noise_at(const sdq_scheduler *s, size_t i, const float *x,
                                    const float *noise, float *out, size_t count);
/* One step.
 *   i        evaluations are taken in order; the first after create or reset may be any
 *   eps      the network's output, after guidance [n,h,w,c]
 *   sample   what sdq_scheduler_scale_input was given [n,h,w,c]
 *   prev     the next sample; may be sample, not eps
 *   rng      needed by Euler ancestral, LCM and DDIM with eta (NULL else); draws in [n,c,h,w] order
 * Errors: SDQ_ERR_ARGUMENT (order, rng missing), _SHAPE (changed within a run), _OOM. */
SDQ_API sdq_status sdq_scheduler_step(sdq_ctx *ctx, sdq_scheduler *s, size_t i, const float *eps,
                                      const float *sample, float *prev, size_t n, size_t h,
                                      size_t w, size_t c, sdq_rng *rng);
/* Forget the history: the next step begins a new run, of any shape. */
SDQ_API void sdq_scheduler_reset(sdq_scheduler *s);

/* Training. t < train_steps; a larger t is taken as the last one. */
/* The table of train_steps values: the share of the picture's variance that is left at t. */
SDQ_API const float *sdq_scheduler_alphas_cumprod(const sdq_scheduler *s);
/* out = sqrt(a) x + sqrt(1-a) noise. out may be x or noise. */
SDQ_API void sdq_scheduler_add_noise(const sdq_scheduler *s, size_t t, const float *x,
                                     const float *noise, float *out, size_t count);
/* The target of v prediction: out = sqrt(a) noise - sqrt(1-a) x. out may be x or noise. */
SDQ_API void sdq_scheduler_velocity(const sdq_scheduler *s, size_t t, const float *x,
                                    const float *noise, float *out, size_t count);
/* Loss weight of timestep t (min-SNR, Hang et al. 2023, arXiv 2303.09556), SNR = a / (1-a):
 * min(SNR,gamma) / SNR for epsilon, / (SNR + 1) for v, min(SNR,gamma) for x0. gamma <= 0: 1. */
SDQ_API double sdq_scheduler_snr_weight(const sdq_scheduler *s, size_t t, double gamma);
/* The guidance embedding of latent consistency models for guidance scale g (w = g - 1):
 * sin(1000 w f_j), then cos, f_j = 10000^(-j / (dim/2 - 1)); an odd dim ends with 0. */
SDQ_API void sdq_guidance_embedding(double g, float *out, size_t dim);

/* ===========================================================================
 * >>api-report   how far two pictures, or two sets of them, are apart
 *
 * All sums are double and in a fixed order. Nothing here depends on threads or instruction sets.
 * ======================================================================== */

/* Peak signal to noise ratio in dB of count 8-bit samples: 10 log10(255^2 / mean squared error),
 * at most 99 (equal pictures). */
SDQ_API double sdq_psnr(const unsigned char *a, const unsigned char *b, size_t count);
/* Mean structural similarity of two 8-bit pictures [h,w,c] (Wang et al., IEEE TIP 13(4), 2004):
 * 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, over windows that lie inside.
 * c of 3 or 4: on the luma 0.299 R + 0.587 G + 0.114 B (not rounded); else on the first channel.
 *   out    -1..1, 1 for equal pictures
 * Errors: SDQ_ERR_SHAPE (smaller than 11x11), _OOM. */
SDQ_API sdq_status sdq_ssim(sdq_ctx *ctx, const unsigned char *a, const unsigned char *b, size_t h,
                            size_t w, size_t c, double *out);
/* Frechet distance of two sets of feature vectors, each set taken as a normal distribution:
 * |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), covariances with n - 1 in the denominator.
 * With n1 or n2 below about dim the covariances are singular and the distance is biased upward.
 *   x, y   [nx,dim], [ny,dim]; nx, ny >= 2
 * Time grows with dim^3 times about 10. Errors: SDQ_ERR_ARGUMENT, _NUMERIC (not finite), _OOM. */
SDQ_API sdq_status sdq_frechet(sdq_ctx *ctx, const float *x, size_t nx, const float *y, size_t ny,
                               size_t dim, double *out);
/* The p-th percentile, 0..100, of n values, interpolated linearly between ranks (numpy's default);
 * 50 is the median. n 0 gives 0; values must not be NaN. Errors: SDQ_ERR_ARGUMENT, _OOM. */
SDQ_API sdq_status sdq_percentile(sdq_ctx *ctx, const double *x, size_t n, double p, double *out);
/* A confidence interval of the mean of n values by the percentile bootstrap (Efron 1979).
 *   rounds      samples with replacement; 0: 2000
 *   confidence  0..1, exclusive; 0: 0.95
 *   rng         seeded by the caller, so that a report can be repeated
 * Errors: SDQ_ERR_ARGUMENT, _OOM. */
SDQ_API sdq_status sdq_bootstrap(sdq_ctx *ctx, const double *x, size_t n, size_t rounds,
                                 double confidence, sdq_rng *rng, double *low, double *high);
/* The row of table [n,dim] with the largest cosine to query [dim]; the first among equals.
 *   cosine  NULL or receives it; a vector of zeros has cosine 0
 * Returns the row, 0 when n is 0. */
SDQ_API size_t sdq_nearest(const float *query, const float *table, size_t n, size_t dim,
                           double *cosine);
/* ===========================================================================
 * >>api-model   the three networks of Stable Diffusion
 *
 * CLIPTextModel, UNet2DConditionModel and AutoencoderKL, built from the config.json of a diffusers
 * folder or from the shapes in a single file. A loaded model does not change: contexts of several
 * threads may share it. Training writes to its parameters through sdq_model_param, on one thread.
 * ======================================================================== */

typedef struct sdq_model sdq_model;

typedef enum sdq_part {
    SDQ_PART_NONE = 0,
    SDQ_PART_TEXT,          /* text_encoder/  CLIPTextModel */
    SDQ_PART_UNET,          /* unet/          UNet2DConditionModel */
    SDQ_PART_VAE,           /* vae/           AutoencoderKL */
    SDQ_PART_COUNT
} sdq_part;

/* "text_encoder", "unet", "vae"; "?" for anything else. */
SDQ_API const char *sdq_part_name(sdq_part part);

/* What a safetensors file is, told by the names and shapes of its arrays. */
typedef enum sdq_file_kind {
    SDQ_FILE_UNKNOWN = 0,
    SDQ_FILE_SD1, SDQ_FILE_SD2,         /* single files: sdq_pipeline_load takes these two */
    SDQ_FILE_INPAINT, SDQ_FILE_EDIT,    /* single files whose UNet has 9 or 8 input channels */
    SDQ_FILE_SDXL,
    SDQ_FILE_OTHER,                     /* SD 3, Flux, unCLIP, .. */
    SDQ_FILE_PARTS,                     /* two of the three networks of a single file */
    SDQ_FILE_LORA, SDQ_FILE_CONTROLNET, SDQ_FILE_EMBEDDING,
    SDQ_FILE_UNET, SDQ_FILE_VAE, SDQ_FILE_TEXT,     /* one network alone, in any layout */
    SDQ_FILE_INT8,                      /* of sdq_model_save_int8 */
    SDQ_FILE_COUNT
} sdq_file_kind;

typedef struct sdq_file_info {
    sdq_file_kind kind;
    const char *title;              /* the kind in words */
    int part[SDQ_PART_COUNT];       /* 1: the network is in it, under a single file's names */
    sdq_dtype dtype;                /* of most bytes */
    sdq_prediction prediction;      /* SD1, SD2: what the UNet predicts .. */
    const char *because;            /* .. and how that is known; "" for other kinds */
} sdq_file_info;
SDQ_API sdq_file_info sdq_file_describe(const sdq_file *file);

/* Load one network: config.json and its safetensors file, whole or sharded, plain or, where there
 * is nothing else, of the variant fp16. Or its part of a single file (SDQ_FILE_SD1, SDQ_FILE_SD2).
 *   path    a pipeline's folder (the network is in unet/, vae/ or text_encoder/), the folder that
 *           itself holds config.json, or a single file, whose shapes stand for config.json
 *   out     the model, NULL on failure; free with sdq_model_free and the same ctx
 * Weights in F32, F16 or BF16 become float. Every shape is checked against the configuration.
 * Errors: SDQ_ERR_MISSING (file, key or tensor), _UNSUPPORTED (a configuration value), _SHAPE,
 * _FORMAT, _IO, _OOM. */
SDQ_API sdq_status sdq_model_load(sdq_ctx *ctx, const char *path, sdq_part part, sdq_model **out);
/* The same, packed for the float kernels at once: weights that the file has as halves stay halves.
 * For teachers, and for students whose weights themselves are not trained (see sdq_train_set). */
SDQ_API sdq_status sdq_model_load_packed(sdq_ctx *ctx, const char *path, sdq_part part,
                                         sdq_model **out);
/* The same structure from config.json alone, with random weights as PyTorch, diffusers and
 * transformers draw them. The UNet's and the VAE's are those of torch.manual_seed(seed). */
SDQ_API sdq_status sdq_model_init(sdq_ctx *ctx, const char *path, sdq_part part, uint64_t seed,
                                  sdq_model **out);
/* NULL is allowed. */
SDQ_API void sdq_model_free(sdq_ctx *ctx, sdq_model *model);
/* Write config.json and diffusion_pytorch_model.safetensors (text encoder: model.safetensors),
 * which diffusers and transformers load.
 *   folder  the network's own folder; it must exist
 *   dtype   SDQ_F32, SDQ_F16 or SDQ_BF16
 * Errors: SDQ_ERR_ARGUMENT, _IO, _OOM, _UNSUPPORTED (a layer that holds int8 weights only). */
SDQ_API sdq_status sdq_model_save(sdq_ctx *ctx, const sdq_model *model, const char *folder,
                                  sdq_dtype dtype);

/* What a network is made for. Fields that do not belong to its part are 0. */
typedef struct sdq_model_info {
    sdq_part part;
    size_t weights;         /* trainable numbers */
    size_t in, out;         /* channels of a UNet's latent, of a VAE's picture */
    size_t context;         /* channels of the text: text encoder, UNet */
    size_t latent;          /* VAE: channels of the latent */
    size_t factor;          /* VAE: pixels per latent pixel; UNet: halvings, as a factor */
    size_t sample_size;     /* side of the samples it is made for; 0 when not said */
    size_t sample_width;    /* UNet: the same, unless sample_size is the height of a list */
    size_t vocab, tokens;   /* text encoder: ids and positions */
    size_t guidance;        /* UNet: > 0 when it takes the guidance scale as an input (LCM) */
    float scaling_factor;   /* VAE: latents are multiplied by it for the UNet */
} sdq_model_info;
SDQ_API sdq_model_info sdq_model_get_info(const sdq_model *model);

/* Make the latents of a VAE in training unit-sized for the UNet: 1 / standard deviation, > 0.
 * Saved with the model. Not while the model is shared. */
SDQ_API sdq_status sdq_model_set_scaling(sdq_ctx *ctx, sdq_model *model, float scaling_factor);

/* The parameters, in the order in which PyTorch creates them.
 *   name   NULL or receives the diffusers name, such as "conv_in.weight"; lives with the model
 * Returns the leaf that ops use: convolutions are [out,kh,kw,in]. NULL when i is too large or
 * when the layer holds int8 weights only. */
SDQ_API size_t sdq_model_param_count(const sdq_model *model);
SDQ_API sdq_tensor *sdq_model_param(const sdq_model *model, size_t i, const char **name);
/* A copy of parameter i in the arena, in diffusers' layout: convolutions are [out,in,kh,kw].
 *   gradient  0: the values; 1: the gradient, zeros if there is none yet */
SDQ_API sdq_tensor *sdq_model_param_copy(sdq_ctx *ctx, const sdq_model *model, size_t i,
                                         int gradient);
/* The convolution and linear layers, in the order of creation; NULL when i is too large.
 *   name   NULL or receives the diffusers name of the module, such as "conv_in" */
SDQ_API size_t sdq_model_layer_count(const sdq_model *model);
SDQ_API sdq_layer *sdq_model_layer(const sdq_model *model, size_t i, const char **name);

/* ids I32 [n,t], t up to the model's positions -> [n,t,c], after the final layer norm. Position i
 * sees positions 0..i; padding is not masked (as Stable Diffusion uses it). Always float. */
SDQ_API sdq_tensor *sdq_text_forward(sdq_ctx *ctx, const sdq_model *model, sdq_tensor *ids);

/* Cross-attention keys and values of one text, and time embeddings of a list of timesteps: made
 * once per picture, used by every evaluation. Results are equal to the bit with and without.
 * They belong to one model and one mode. Gradients do not flow through them. */
typedef struct sdq_prompt_cache sdq_prompt_cache;
typedef struct sdq_time_table sdq_time_table;

/* context [n,t,c]; out: free with sdq_prompt_cache_free. */
SDQ_API sdq_status sdq_unet_prompt(sdq_ctx *ctx, const sdq_model *model, sdq_tensor *context,
                                   sdq_mode mode, sdq_prompt_cache **out);
SDQ_API void sdq_prompt_cache_free(sdq_ctx *ctx, sdq_prompt_cache *cache);
/* timesteps [n]; guidance NULL or [n], see sdq_unet_input; out: free with sdq_time_table_free. */
SDQ_API sdq_status sdq_unet_times(sdq_ctx *ctx, const sdq_model *model, const float *timesteps,
                                  const float *guidance, size_t n, sdq_mode mode,
                                  sdq_time_table **out);
SDQ_API void sdq_time_table_free(sdq_ctx *ctx, sdq_time_table *table);

typedef struct sdq_unet_input {
    sdq_tensor *sample;             /* [n,h,w,in]; any h, w from 1 */
    const float *timesteps;         /* [n] */
    sdq_tensor *context;            /* [n,t,c]; not read, may be NULL, when prompt is given */
    const float *guidance;          /* NULL or [n] guidance scales: LCM (info.guidance > 0) */
    const sdq_prompt_cache *prompt; /* NULL: computed from context */
    size_t prompt_first;            /* entry of prompt that belongs to the first sample */
    const sdq_time_table *times;    /* NULL: computed. Must hold every timestep asked for */
    int checkpoint;                 /* recording: keep block inputs only, recompute the rest */
} sdq_unet_input;

/* One evaluation of the UNet -> [n,h,w,out]: the noise or velocity that it was trained to give.
 * Without recording the arena holds the skip connections and one block at a time. */
SDQ_API sdq_tensor *sdq_unet_forward(sdq_ctx *ctx, const sdq_model *model,
                                     const sdq_unet_input *input, sdq_mode mode);

/* image [n,h,w,in] in [-1,1], h and w at least info.factor -> [n,h/f,w/f,2c]: mean, then
 * logarithm of the variance (not clamped), not scaled by scaling_factor. */
SDQ_API sdq_tensor *sdq_vae_encode(sdq_ctx *ctx, const sdq_model *model, sdq_tensor *image,
                                   sdq_mode mode);
/* latent [n,h,w,c], already divided by scaling_factor -> [n,h f,w f,out], about [-1,1]. */
SDQ_API sdq_tensor *sdq_vae_decode(sdq_ctx *ctx, const sdq_model *model, sdq_tensor *latent,
                                   sdq_mode mode);
/* The same numbers to the bit, in about two thirds of the memory and a tenth more time: large
 * layers work in bands of rows. Not a blend of tiles: attention and the norms' statistics are those
 * of the whole picture, so there is nothing to see where bands meet. n is 1. Not while recording;
 * not in FAKE mode, nor with static ranges or ranges per picture in INT8 mode
 * (SDQ_ERR_UNSUPPORTED). */
SDQ_API sdq_tensor *sdq_vae_decode_tiled(sdq_ctx *ctx, const sdq_model *model, sdq_tensor *latent,
                                         sdq_mode mode);


/* ===========================================================================
 * >>api-train   optimizer and training loop
 * ======================================================================== */

typedef enum sdq_schedule { SDQ_CONSTANT = 0, SDQ_COSINE } sdq_schedule;

typedef struct sdq_optim_desc {
    float lr;               /* 0: 1e-4 */
    float beta1, beta2;     /* 0: 0.9, 0.999 */
    float eps;              /* 0: 1e-8 */
    float weight_decay;
    float clip;             /* largest global L2 norm of the gradient; 0: no clipping */
    float ema; /* keep an average of the weights: decay min((1+t)/(10+t), ema); 0: none */
    int moments8;           /* moments of tensors of 4096 and more in a byte each, not in 4: a
                             * step of a large network needs 6 bytes less per weight, and its
                             * moments are rounded; see >>optim */
    sdq_schedule schedule;  /* COSINE: falls to 0 at `steps` */
    size_t warmup, steps;   /* steps of a linear rise; length of the cosine */
} sdq_optim_desc;

/* AdamW (Loshchilov and Hutter, arXiv 1711.05101) with clipping, a schedule and an average. */
typedef struct sdq_optim sdq_optim;
SDQ_API sdq_status sdq_optim_create(sdq_ctx *ctx, const sdq_optim_desc *desc, sdq_optim **out);
SDQ_API void sdq_optim_free(sdq_ctx *ctx, sdq_optim *optim);
/* Train a leaf: it gets a gradient on the heap and needs_grad. The tensor must outlive the
 * optimizer. name: in state files, unique; copied. lr_scale: 0 = 1. decay: 0 takes the tensor out
 * of weight decay. floor > 0: the values are scales, positive and of very different sizes: AdamW
 * moves their logarithm (a step of 0.01 is one per cent), and they are kept >= floor. */
SDQ_API sdq_status sdq_optim_add(sdq_ctx *ctx, sdq_optim *optim, sdq_tensor *leaf, const char *name,
                                 float lr_scale, float floor, int decay);
/* Clip, update, clear the gradients. SDQ_ERR_NUMERIC if the gradient is not finite: nothing was
 * changed then. */
SDQ_API sdq_status sdq_optim_step(sdq_ctx *ctx, sdq_optim *optim);
SDQ_API void sdq_optim_zero(sdq_optim *optim);
SDQ_API size_t sdq_optim_steps_done(const sdq_optim *optim);
/* L2 norm of the last gradient before clipping, and the rate of the last step. */
SDQ_API double sdq_optim_grad_norm(const sdq_optim *optim);
SDQ_API double sdq_optim_rate(const sdq_optim *optim);
/* Exchange weights and averages: evaluate or save the averages, exchange back to go on. */
SDQ_API void sdq_optim_swap_ema(sdq_optim *optim);
/* Everything that resuming needs: weights, moments, averages, step; of a student also the ranges
 * and biases that calibration made. Written atomically; equal states give equal bytes. Loading
 * wants the same leaves in the optimizer and, of a student, the same float weights and recipe:
 * SDQ_ERR_FORMAT, _SHAPE. */
SDQ_API sdq_status sdq_optim_save(sdq_ctx *ctx, const sdq_optim *optim, const char *path);
SDQ_API sdq_status sdq_optim_load(sdq_ctx *ctx, sdq_optim *optim, const char *path);
/* The weights alone (the averages, where there are any), and back into the weights. */
SDQ_API sdq_status sdq_optim_save_weights(sdq_ctx *ctx, const sdq_optim *optim, const char *path);
SDQ_API sdq_status sdq_optim_load_weights(sdq_ctx *ctx, sdq_optim *optim, const char *path);

/* The loss of one micro-batch, recorded. All randomness must come from rng, which depends on the
 * seed, the step and the micro-batch only: that is what makes a resumed run equal. */
typedef sdq_tensor *(*sdq_loss_fn)(sdq_ctx *ctx, void *user, sdq_rng *rng, size_t step);

/* Called by a loss function: `value` is the part `name` of the loss. The means over the
 * micro-batches of a step are in sdq_fit_info. name is not copied; up to SDQ_FIT_PARTS names. */
SDQ_API void sdq_fit_note(sdq_ctx *ctx, const char *name, double value);

enum { SDQ_FIT_PARTS = 8 };

/* What a step of training was like. */
typedef struct sdq_fit_info {
    size_t step, steps;         /* done, of all; step 0: only validated, before the first one */
    double loss;                /* mean over the micro-batches of all processes; 0 in step 0 */
    size_t parts;
    const char *part[SDQ_FIT_PARTS];
    double part_loss[SDQ_FIT_PARTS];
    double grad_norm, rate;     /* before clipping */
    int validated;              /* `validation` was measured after this step */
    double validation;
    double best;                /* the lowest so far and its step; HUGE_VAL before the first */
    size_t best_step;
} sdq_fit_info;

/* What the caller wants after a step. */
typedef enum sdq_fit_then {
    SDQ_FIT_GO = 0,
    SDQ_FIT_STOP,               /* save the state and end with SDQ_ERR_CANCELLED */
    SDQ_FIT_SAVE                /* save the state and go on: for saving by the clock */
} sdq_fit_then;

/* How the numbers of several processes are joined; see the manual, "More than one machine". */
typedef enum sdq_reduce { SDQ_REDUCE_SUM = 0, SDQ_REDUCE_MIN, SDQ_REDUCE_MAX } sdq_reduce;
typedef struct sdq_span {
    const char *name;
    float *values;
    size_t count;
} sdq_span;
/* The processes that work on one thing. Every process makes the same calls in the same order. */
typedef struct sdq_group {
    size_t rank, ranks;         /* this process, of so many; ranks 0 or 1: alone */
    /* Put the sum, minimum or maximum over all processes in place of the n arrays of values, whose
     * sizes are equal everywhere. All processes must receive the same bits. Non-zero: it failed. */
    int (*reduce)(void *user, sdq_reduce how, const sdq_span *span, size_t n);
    void *user;
} sdq_group;

typedef struct sdq_fit_desc {
    size_t steps;               /* train until the optimizer has done so many */
    size_t accumulate;          /* micro-batches per step in each process; 0: 1 */
    uint64_t seed;
    const char *state;          /* file of the optimizer's state; NULL: none is written or read */
    size_t save_every;          /* steps; 0: only before the first step and at the end */
    sdq_progress_fn progress;   /* stage "train", i = steps done, n = steps, value = loss */
    int (*after)(void *user, const sdq_fit_info *info); /* returns sdq_fit_then; NULL: none */
    void *user;                 /* of both */
    size_t validate_every;      /* steps; 0: never; also before the first and after the last step */
    sdq_loss_fn validate;       /* a loss on held-out data; its rng is the same every time */
    void *validate_user;
    size_t validate_batches;    /* calls of it, step = 0, 1, ..; 0: 4 */
    const char *best;           /* sdq_optim_save_weights whenever validation was lowest; or NULL */
    double explode;             /* stop at a loss so many times the running mean; 0: 1000 */
    const sdq_group *group;     /* NULL: one process */
} sdq_fit_desc;

/* Train. If the state file exists the run goes on from it and ends in the same bytes as a run that
 * was never stopped. What is validated, and saved as the best, are the averages where there are
 * any. Process `rank` of a group computes micro-batches rank, rank + ranks, ..: the sum of the
 * gradients over the group is that of one process with ranks times `accumulate`. Process 0 alone
 * writes files; all read them.
 * SDQ_ERR_NUMERIC: a loss or gradient that is not finite or explodes; the sentence names the step
 * and the layer. SDQ_ERR_IO: a file could not be written. The last state file stays in both. */
SDQ_API sdq_status sdq_fit(sdq_ctx *ctx, sdq_optim *optim, const sdq_fit_desc *desc,
                           sdq_loss_fn loss, void *loss_user);

/* ===========================================================================
 * >>api-tasks   what Stable Diffusion trains: an autoencoder, a text-to-image model
 * ======================================================================== */

/* Pictures of a dataset, decoded, cut to one size and kept as bytes, with their captions as ids. */
typedef struct sdq_samples sdq_samples;
/*   size       pictures become size x size: short side resized, middle cut out
 *   tokenizer  NULL: no captions are kept */
SDQ_API sdq_status sdq_samples_load(sdq_ctx *ctx, const sdq_dataset *data, size_t size,
                                    const sdq_tokenizer *tokenizer, sdq_samples **out);
SDQ_API void sdq_samples_free(sdq_ctx *ctx, sdq_samples *samples);
SDQ_API size_t sdq_samples_count(const sdq_samples *samples);
/* Encode every picture and its mirror image once; draws then take latents from this cache. */
SDQ_API sdq_status sdq_samples_encode(sdq_ctx *ctx, sdq_samples *samples, const sdq_model *vae,
                                      sdq_progress_fn progress, void *user);
/* The same through a file, for networks that are not trained: pictures and captions are encoded
 * once, a record each, and the file is mapped, so that neither pictures nor encoders are needed
 * in memory afterwards. A call that is stopped goes on where it was when made again.
 *   size   as for sdq_samples_load; a multiple of the VAE's factor
 *   text   NULL: captions are kept as ids only, for a text encoder that is trained
 *   path   the cache; PATH.part while it grows. Every picture is read to tell whether it is stale:
 *          it belongs to these files' bytes, captions, this size and these networks
 *   progress   stage "encode"
 * Errors: SDQ_ERR_FORMAT (stale, or another file), _IO, _CANCELLED, those of reading pictures. */
SDQ_API sdq_status sdq_samples_cache(sdq_ctx *ctx, const sdq_dataset *data, size_t size,
                                     const sdq_tokenizer *tokenizer, const sdq_model *vae,
                                     const sdq_model *text, const char *path,
                                     sdq_progress_fn progress, void *user, sdq_samples **out);
/* Take n pictures, spread over all of them, out of the draws, for validation: only `held` draws
 * them. It shares the data of `samples`; free it before them. SDQ_ERR_ARGUMENT: n is 0 or all. */
SDQ_API sdq_status sdq_samples_hold_out(sdq_ctx *ctx, sdq_samples *samples, size_t n,
                                        sdq_samples **held);
/* 1 / standard deviation of the encoded latents: the scaling factor of the autoencoder. Only after
 * sdq_samples_encode. */
SDQ_API float sdq_samples_scaling(const sdq_samples *samples);

/* Autoencoder: L1 + edges * L1 of differences + kl * KL (the mean over elements). */
typedef struct sdq_vae_task {
    sdq_model *vae;
    const sdq_samples *samples;
    size_t batch;
    float edges, kl;            /* 0: 1, 1e-4 */
} sdq_vae_task;
SDQ_API sdq_tensor *sdq_vae_task_loss(sdq_ctx *ctx, void *task, sdq_rng *rng, size_t step);

/* Noise or velocity prediction on encoded pictures; the text encoder is trained along when its
 * parameters are in the optimizer. */
typedef struct sdq_diffusion_task {
    sdq_model *unet, *text;             /* text NULL: the samples hold the states of the captions */
    const sdq_samples *samples;         /* encoded */
    const sdq_scheduler *scheduler;     /* noise levels and prediction type */
    float scaling;                      /* latents are multiplied by it */
    size_t batch;
    float drop;                         /* share of empty captions */
    double snr_gamma;                   /* min-SNR weighting; 0: none */
    sdq_mode mode;
    int checkpoint;
} sdq_diffusion_task;
SDQ_API sdq_tensor *sdq_diffusion_task_loss(sdq_ctx *ctx, void *task, sdq_rng *rng, size_t step);

/* Put all parameters of a model into the optimizer; prefix goes before their names. */
SDQ_API sdq_status sdq_optim_add_model(sdq_ctx *ctx, sdq_optim *optim, sdq_model *model,
                                       const char *prefix);

/* ===========================================================================
 * >>api-pipeline   from a prompt to a picture, with a precision per evaluation
 * ======================================================================== */

/* The networks of a model and what belongs to them; for reading once loaded. */
typedef struct sdq_pipeline {
    sdq_tokenizer *tokenizer;
    sdq_model *text, *vae;      /* these four are NULL where they are loaded on demand */
    sdq_model *unet;            /* the float network; NULL if only the int8 one was loaded */
    sdq_model *unet_int8;       /* NULL: not quantized */
    sdq_model_info info[SDQ_PART_COUNT];    /* of the networks, loaded or not */
    struct sdq__pl_source *source;          /* private: where they are loaded from */
    char *scheduler;            /* text of scheduler_config.json: sdq_pipeline_scheduler reads it */
    struct sdq_policy *policy;  /* of the int8 file: its precision schedule; may be NULL */
    char *folder;               /* or the single file */
    int vae_int8;               /* the decoder is int8 */
    int vae_tiling;             /* the decoder works in bands */
    int single;                 /* it is a single file */
    sdq_prediction prediction;  /* single file: what its UNet is taken to predict */
    const char *because;        /* single file: why */
} sdq_pipeline;

/* Which evaluations of the denoising loop are computed in float, for one scheduler and number of
 * steps. Stored with the int8 network. */
typedef struct sdq_policy {
    sdq_scheduler_kind scheduler;
    size_t steps, count;        /* count: evaluations */
    float guidance;
    float timestep[1001];       /* of evaluation i */
    unsigned char is_float[1001];
} sdq_policy;

/* What the UNet of a single file predicts: nothing in the file has to say it. */
typedef enum sdq_file_prediction {
    SDQ_FILE_PREDICTS_DEFAULT = 0, SDQ_FILE_PREDICTS_EPSILON, SDQ_FILE_PREDICTS_V,
    SDQ_FILE_PREDICTS_COUNT
} sdq_file_prediction;

typedef struct sdq_pipeline_desc {
    const char *unet_int8;      /* file of a quantized UNet; NULL: none */
    int vae_int8;               /* the decoder in int8: faster; nothing has to be calibrated */
    int vae_tiling;             /* decode with sdq_vae_decode_tiled: less memory, same picture */
    int int8_only;              /* do not load the float UNet: float evaluations use the int8
                                 * network's own weights */
    int on_demand;              /* load no network now: every drawing loads each one when it needs
                                 * it and frees it when it needs another. Least memory; a few
                                 * seconds per drawing at full size. Only for drawing */
    int trainable;              /* keep the weights of the float UNet as they are: for training,
                                 * FAKE mode and saving. 0: they are packed for the kernels */
    const char *merges;         /* for single files, which have no tokenizer: CLIP's merges, as */
    size_t merges_bytes;        /* sdq_tokenizer_create takes them (tools/clip_vocab.inc) */
    sdq_file_prediction prediction;     /* of a single file; 0: as sdq_file_describe tells */
} sdq_pipeline_desc;
/* Load everything that drawing needs.
 *   path   a diffusers folder with tokenizer/, text_encoder/, vae/, unet/ and scheduler/, or a
 *          single file of SD 1 or SD 2 (SDQ_FILE_SD1, SDQ_FILE_SD2). That one gets the scheduler
 *          of Stable Diffusion (PNDM, scaled_linear 0.00085..0.012) and CLIP's tokenizer, padded
 *          with its end in SD 1 and with "!" in SD 2.
 *   desc   NULL or zeros: the float UNet alone. Not kept.
 *   out    NULL on failure; free with sdq_pipeline_free
 * Networks that do not fit together are refused; a scheduler that cannot be had only when it is
 * asked for. Errors: those of sdq_model_load, sdq_tokenizer_load, sdq_model_load_int8. */
SDQ_API sdq_status sdq_pipeline_load(sdq_ctx *ctx, const char *path,
                                     const sdq_pipeline_desc *desc, sdq_pipeline **out);
SDQ_API void sdq_pipeline_free(sdq_ctx *ctx, sdq_pipeline *pipeline);

typedef enum sdq_precision {
    SDQ_PRECISION_FLOAT = 0,    /* every evaluation in float */
    SDQ_PRECISION_INT8,         /* every evaluation in int8 */
    SDQ_PRECISION_EDGES,        /* float for evaluation i < k_first or i > count - 1 - k_last */
    SDQ_PRECISION_POLICY,       /* as the file's schedule says */
    SDQ_PRECISION_LIST          /* as `is_float` says, one byte per evaluation */
} sdq_precision;

/* Seen after every evaluation of the loop. x: the latent the network was given the noise of,
 * eps: what the guided network said; [n,h,w,c], valid during the call. Non-zero cancels. */
typedef struct sdq_step_info {
    size_t i, count;
    float timestep;
    int is_float;
    const sdq_tensor *x, *eps;      /* after guidance */
    const sdq_tensor *input, *raw;  /* both guidance branches, as the network saw and said it */
    const sdq_tensor *context;      /* of both branches */
    const float *guidance;          /* what the network was told as guidance scale; mostly NULL */
} sdq_step_info;
typedef int (*sdq_step_fn)(void *user, const sdq_step_info *info);

typedef struct sdq_txt2img_desc {
    const char *prompt, *negative;      /* NULL: "" */
    size_t width, height;               /* pixels; 0: the model's own size */
    size_t steps;                       /* 0: 50 */
    float guidance;                     /* 0: 7.5; 1 or less than 1: no guidance. Networks that
                                         * take it as an input (info.guidance > 0) see any value */
    uint64_t seed;
    sdq_rng_kind rng;
    sdq_scheduler_kind scheduler;       /* DEFAULT: the folder's */
    int karras;                         /* Euler and DPM-Solver++; other kinds are refused */
    size_t count; /* pictures; 0: 1. Drawn from one stream, as diffusers does */
    sdq_precision precision;
    size_t k_first, k_last;
    const unsigned char *is_float;
    const float *init_latents;          /* NULL, or [count,h,w,4] noise instead of the seed's */
    sdq_mode mode;                      /* of evaluations that are not float: 0 and INT8: int8
                                         * network; FAKE: the float network's layers in FAKE mode */
    sdq_step_fn step;                   /* NULL or called after every evaluation */
    sdq_progress_fn progress;           /* stages "text", "unet", "vae" */
    void *user;
} sdq_txt2img_desc;

/* The scheduler of a drawing: desc->scheduler reads the folder's scheduler_config.json as
 * diffusers' from_config does in StableDiffusionPipeline, where steps_offset has become 1 and
 * clip_sample false; steps and karras are those of desc.
 *   desc   NULL: the folder's own scheduler with its default steps
 * Errors: SDQ_ERR_UNSUPPORTED, _ARGUMENT, _FORMAT, _OOM: see sdq_scheduler_desc_from_json. */
SDQ_API sdq_status sdq_pipeline_scheduler(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                                          const sdq_txt2img_desc *desc, sdq_scheduler_desc *out);

/* Denoise: the latents of the pictures, [count,h,w,4] in the arena. *float_count: NULL or receives
 * the number of float evaluations. notice: NULL or receives a sentence worth showing, or "". */
SDQ_API sdq_tensor *sdq_txt2img_latents(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                                        const sdq_txt2img_desc *desc, size_t *float_count,
                                        const char **notice);
/* Latents to pictures of 8 bits; images: `count` structs to fill, free each with sdq_image_free.
 * Values that are not finite are SDQ_ERR_NUMERIC, here and above. */
SDQ_API sdq_status sdq_decode_latents(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                                      sdq_tensor *latents, sdq_image *images);
/* Both. */
SDQ_API sdq_status sdq_txt2img(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                               const sdq_txt2img_desc *desc, sdq_image *images);
/* The most memory that loading a pipeline and drawing will take, found in a fraction of a second:
 * the same calls are made, but nothing is computed and no weight is read. It is what the process
 * grows by where memory is zero until it is touched (Linux, macOS), with the allocator, the threads
 * and the tier of ctx.
 *   path, pipeline  as in sdq_pipeline_load
 *   desc            as in sdq_txt2img; step and progress are not called
 * Errors: those of the two functions. */
SDQ_API sdq_status sdq_txt2img_memory(sdq_ctx *ctx, const char *path,
                                      const sdq_pipeline_desc *pipeline,
                                      const sdq_txt2img_desc *desc, size_t *bytes);
/* The ids of one or more texts as a tensor I32 [n,t]. */
SDQ_API sdq_tensor *sdq_pipeline_ids(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                                     const char *const *texts, size_t n);

/* ===========================================================================
 * >>api-recipe   calibrate, distill, convert, choose the precision of every evaluation
 * ======================================================================== */

/* What training changes. Fewer parameters drift less: see the manual, "Train". */
typedef enum sdq_train_set {
    SDQ_TRAIN_ALL = 0,          /* weights, biases, norms; with learn_scales scales, too */
    SDQ_TRAIN_SMALL,            /* the same without weights */
    SDQ_TRAIN_SCALES,           /* scales of weights and of static input ranges */
    SDQ_TRAIN_RANGES,           /* static input ranges alone */
    SDQ_TRAIN_LORA,             /* deltas of low rank of the quantized weights (LoRA, arXiv
                                 * 2106.09685), merged into the int8 weights when converting; with
                                 * learn_scales scales, too. Sets without weights, and this one,
                                 * also train a student of sdq_model_load_packed */
    SDQ_TRAIN_SET_COUNT
} sdq_train_set;

/* How a UNet is quantized and trained. sdq_recipe_default is this library's own way,
 * sdq_recipe_reference the published one; every field can be changed alone. */
typedef struct sdq_recipe {
    sdq_range range_linear;     /* linear layers and 1x1 convolutions */
    sdq_range range_conv;       /* 3x3 convolutions */
    int quantize_outputs;       /* results are quantized, too */
    int quantize_edges;         /* conv_in and conv_out in int8 */
    int quantize_time;          /* time embedding and its projections in int8 */
    int quantize_context;       /* keys and values of cross-attention in int8 */
    int quantize_shortcuts;     /* shortcuts of the last up block in int8 */
    int quantize_last_self;     /* self-attention layers of the last up block in int8 */
    int attention_bits;         /* products of self-attention: 32 (float), 16 (faster where pictures
                                 * are large, and as good) or 8 (faster still); 0: 32 */
    int split_skip;             /* halves of concat(hidden, skip) get their own ranges */
    int bias_correction;
    int learn_scales;           /* LSQ: weight scales and static input scales are trained */
    sdq_train_set train_set;
    size_t lora_rank;           /* of SDQ_TRAIN_LORA; 0: 8 */
    size_t last_blocks;         /* train only what lies in so many last blocks (a residual block, a
                                 * transformer, a resampling convolution) and behind; 0: all */
    float moving;               /* moving constant of the observers; 0: true min and max */
    sdq_weight_scale weight_scale;
    int weight_bits;            /* 4: half the file, see >>qmath; 0: 8 */
    size_t weight_group;        /* of sdq_quant; 0: 64 */
    int calibrate_on_data;      /* noised pictures in FAKE mode; else the sampler's trajectories */
    float noise_loss;           /* weight of MSE(student, noise); needs pictures */
    float teacher_loss;         /* weight of MSE(student, teacher) */
    int coherent;               /* see sdq_distill_task */
} sdq_recipe;
SDQ_API sdq_recipe sdq_recipe_default(void);
SDQ_API sdq_recipe sdq_recipe_reference(void);
/* Write the settings into every layer of a UNet with float weights; ranges are forgotten. The
 * weights of layers that stay float become halves, as the int8 file will have them: rounded half
 * to even, where the largest of a layer is a normal half, 2^-14 to 65504, so that none moves by
 * more than 2^-11 of the largest; else, and where training moves them, they are F32 in the file.
 * Biases and norms stay F32.
 *   keep_float   NULL, or layers (or prefixes ending in '.') that stay float, NULL at the end */
SDQ_API sdq_status sdq_recipe_apply(sdq_ctx *ctx, sdq_model *unet, const sdq_recipe *recipe,
                                    const char *const *keep_float);
/* "range_conv=block split_skip=1 ...": for reports and files. Writes at most size bytes. */
SDQ_API void sdq_recipe_to_str(const sdq_recipe *recipe, char *buf, size_t size);

/* What the network saw and said along the sampler's own trajectories, both guidance branches:
 * data-free training and calibration (as EfficientDM, arXiv 2310.03270). On the heap. */
typedef struct sdq_states sdq_states;
/* Run desc's denoising loop in float for every prompt and keep the states.
 *   seed of prompt i = desc->seed + i; desc->prompt is ignored */
SDQ_API sdq_status sdq_states_collect(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                                      const char *const *prompts, size_t n,
                                      const sdq_txt2img_desc *desc, sdq_states **out);
/* The same through a file that keeps the trajectory of every prompt: a call that is stopped goes on
 * where it was when made again, and a complete file is only read.
 *   path   PATH.part while it grows; it belongs to these prompts, this desc and these weights
 * Errors: SDQ_ERR_FORMAT (stale, or another file), _IO, _CANCELLED. */
SDQ_API sdq_status sdq_states_cache(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                                    const char *const *prompts, size_t n,
                                    const sdq_txt2img_desc *desc, const char *path,
                                    sdq_states **out);
/* Take the last n prompts out, for validation. `held` shares the data; free it before `states`.
 * SDQ_ERR_ARGUMENT: n is 0 or all prompts. */
SDQ_API sdq_status sdq_states_hold_out(sdq_ctx *ctx, sdq_states *states, size_t n,
                                       sdq_states **held);
/* Join the states that the processes of a group collected, in the order of their ranks: afterwards
 * all of them have all. *states is replaced; it must not be held out from yet. */
SDQ_API sdq_status sdq_states_gather(sdq_ctx *ctx, const sdq_group *group, sdq_states **states);
SDQ_API void sdq_states_free(sdq_ctx *ctx, sdq_states *states);
SDQ_API size_t sdq_states_count(const sdq_states *states);

/* Observe the input ranges of all layers on the states (FLOAT mode: what the float network sees),
 * then correct biases if asked. */
SDQ_API sdq_status sdq_calibrate_states(sdq_ctx *ctx, sdq_model *unet, const sdq_states *states,
                                        size_t batch, int bias_correction,
                                        sdq_progress_fn progress, void *user);
/* The published way: `batches` of noised pictures in FAKE mode with moving observers. */
SDQ_API sdq_status sdq_calibrate_data(sdq_ctx *ctx, const sdq_diffusion_task *task, size_t batches,
                                      uint64_t seed, sdq_progress_fn progress, void *user);
/* Join the ranges that the processes of a group observed, each on its share of the states: the
 * widest of them, so that they are those of one process that saw all. */
SDQ_API sdq_status sdq_model_reduce_ranges(sdq_ctx *ctx, sdq_model *unet, const sdq_group *group);
/* Observers of all layers on or off. The published recipe leaves them on while training. */
SDQ_API void sdq_model_observe(sdq_model *model, int on);

/* Compare the output of a layer of the student with that of the same layer of the teacher. */
typedef struct sdq_distill_map {
    const char *layer;          /* name, such as "mid_block.resnets.1.conv2" */
    int l1;                     /* 0: MSE, 1: L1 */
    float weight;
} sdq_distill_map;

/* Distillation: teacher_loss MSE(student, teacher) + noise_loss MSE(student, target)
 * + sum of the mapped layers' losses. */
typedef struct sdq_distill_task {
    sdq_model *student;             /* runs in FAKE mode */
    const sdq_model *teacher;       /* float; not needed for states without maps */
    const sdq_states *states;       /* data free; NULL: batches of `data` */
    const sdq_diffusion_task *data; /* samples, text encoder, scheduler; its unet is not used */
    size_t batch;
    int coherent;                   /* states: the batch is a run of consecutive evaluations, and
                                     * the loss that of the sum of their errors after guidance */
    float teacher_loss, noise_loss;
    const sdq_distill_map *map;
    size_t maps;
    int checkpoint;
} sdq_distill_task;
SDQ_API sdq_tensor *sdq_distill_task_loss(sdq_ctx *ctx, void *task, sdq_rng *rng, size_t step);
/* Put what a recipe trains (its train_set) into the optimizer.
 *   scale_lr   rate of static input ranges, times the optimizer's; weight scales get a twentieth.
 *              Both are relative: with lr 1e-5 and scale_lr 1000 a step is about one per cent.
 * What calibration made is kept in the state, so that a student whose state will be loaded need not
 * be calibrated: weights must be those of the float model, as they were when the run began. */
SDQ_API sdq_status sdq_optim_add_student(sdq_ctx *ctx, sdq_optim *optim, sdq_model *unet,
                                         const sdq_recipe *recipe, float scale_lr);

/* Convert every quantized layer to packed int8; float weights of these layers are dropped. */
SDQ_API sdq_status sdq_model_convert(sdq_ctx *ctx, sdq_model *unet);
/* Give up training: weights are packed for the float kernels, one copy stays. */
SDQ_API sdq_status sdq_model_freeze(sdq_ctx *ctx, sdq_model *model);
/* The decoder of a VAE in int8, which needs no calibration: its ends and the products of its
 * attention stay float, and so does the encoder. The model is frozen as well.
 *   range   of the inputs; DEFAULT: POSITION. STATIC cannot be had: SDQ_ERR_NOT_CALIBRATED */
SDQ_API sdq_status sdq_vae_quantize(sdq_ctx *ctx, sdq_model *vae, sdq_range range);
/* One safetensors file: int8 weights [out,kh,kw,in] or 4-bit ones, two in a byte, scales, ranges,
 * everything float, the settings and the schedule in the metadata.
 *   policy, recipe   NULL or stored along */
SDQ_API sdq_status sdq_model_save_int8(sdq_ctx *ctx, const sdq_model *unet, const char *path,
                                       const sdq_policy *policy, const char *recipe);
/*   folder   of the pipeline, or the single file: its UNet must have the structure of the one that
 *            the file was made from
 *   policy   NULL or receives the schedule (count 0 if there is none)
 * A file whose hash is missing or wrong, with values that are not finite or arrays that have no
 * place is refused: SDQ_ERR_FORMAT, _MISSING, _SHAPE, _NUMERIC. Whether it was made from the float
 * weights of that folder is checked by sdq_pipeline_load, where both are used. */
SDQ_API sdq_status sdq_model_load_int8(sdq_ctx *ctx, const char *folder, const char *path,
                                       sdq_model **out, sdq_policy *policy);
/* What such a file says of itself, its arrays unread: the network, the hash of the float weights it
 * was made from, its schedule. Errors: as above, but for what is wrong inside the arrays. */
SDQ_API sdq_status sdq_model_peek_int8(sdq_ctx *ctx, const char *folder, const char *path,
                                       sdq_model_info *info, uint64_t *source,
                                       sdq_policy *policy);

/* Search the evaluations that must be float: rank them by the error of the int8 network on the
 * float trajectory, weighted by the step that follows in three ways; take the fewest of the best
 * ranking whose complete runs reach the target.
 *   target_psnr   dB, median over the prompts against the float pictures; 0: only max_float counts
 *   max_float     at most so many float evaluations; 0: no limit
 *   errors        NULL or room for one number per evaluation: the mean square error
 *   reached       NULL or receives the median PSNR of the result */
SDQ_API sdq_status sdq_schedule_search(sdq_ctx *ctx, const sdq_pipeline *pipeline,
                                       const char *const *prompts, size_t n,
                                       const sdq_txt2img_desc *desc, double target_psnr,
                                       size_t max_float, sdq_policy *policy, double *errors,
                                       double *reached);

#ifdef __cplusplus
}
#endif
#endif /* SDQ_H */

/* ===========================================================================
 * >>impl   the implementation: one translation unit defines SDQ_IMPLEMENTATION
 * ======================================================================== */
#ifdef SDQ_IMPLEMENTATION
#ifndef SDQ_IMPLEMENTATION_ONCE
#define SDQ_IMPLEMENTATION_ONCE

#ifndef SDQ_SELF
#define SDQ_SELF "sdq.h"    /* renamed the file? define SDQ_SELF as its new name */
#endif

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__FAST_MATH__) && !defined(SDQ_ALLOW_FAST_MATH)
#error "sdq.h promises equal bits on every CPU; -ffast-math breaks that. Compile without it."
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "sdq.h needs a little-endian machine"
#endif

#if !defined(SDQ_NO_SIMD) && defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SDQ__X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define SDQ__X86 0
#endif

#if !defined(SDQ_NO_MMAP) && (defined(__unix__) || defined(__APPLE__))
#define SDQ__MMAP 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#define SDQ__MMAP 0
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")     /* a*b+c rounds twice unless fmaf says otherwise */
#elif defined(__clang__)
#pragma clang fp contract(off)
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#define SDQ__PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define SDQ__PRINTF(f, a)
#endif

#ifndef SDQ_ASSERT
#include <assert.h>
#define SDQ_ASSERT(x) assert(x)     /* guards this file's own invariants, never user input */
#endif

/* Return the status of a failed call to the caller. */
#define SDQ__TRY(call) do { sdq_status st_ = (call); if (st_ != SDQ_OK) return st_; } while (0)
/* The same in a function that owns something: goto its one label. */
#define SDQ__TRY_DONE(call) do { st = (call); if (st != SDQ_OK) goto done; } while (0)

/* ===========================================================================
 * >>util   checked sizes, bit casts, half precision
 * ======================================================================== */

#define SDQ__COUNT(a) (sizeof(a) / sizeof((a)[0]))
#if defined(__GNUC__)       /* what kernels call: gcc inlines nothing that is tuned otherwise */
#define SDQ__INLINE static inline __attribute__((always_inline))
#else
#define SDQ__INLINE static inline
#endif

SDQ__INLINE size_t sdq__u_min(size_t a, size_t b) { return a < b ? a : b; }
static size_t sdq__u_max(size_t a, size_t b) { return a > b ? a : b; }
static size_t sdq__u_div_up(size_t a, size_t b) { return (a + b - 1) / b; }
static size_t sdq__u_round_up(size_t a, size_t b) { return sdq__u_div_up(a, b) * b; }

/* *out = a * b; 0 when it does not fit. */
static int sdq__u_mul(size_t a, size_t b, size_t *out) {
    if (b != 0 && a > SIZE_MAX / b) return 0;
    *out = a * b;
    return 1;
}

static uint32_t sdq__u_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static float sdq__u_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* IEEE binary16 -> binary32, exact, subnormals and NaN included. */
static float sdq__u_from_f16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 0x3ffu;
    if (exp == 31) return sdq__u_float(sign | 0x7f800000u | (man << 13));
    if (exp == 0) {
        const float v = (float)man * (1.0f / 16777216.0f);      /* man * 2^-24 */
        return sign ? -v : v;
    }
    return sdq__u_float(sign | ((exp + 112u) << 23) | (man << 13));
}

/* binary32 -> binary16, round half to even, overflow to infinity. */
static uint16_t sdq__u_to_f16(float x) {
    const uint32_t u = sdq__u_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);    /* >= 65520 rounds to inf */
    if (a < 0x38800000u) {                                      /* below 2^-14: subnormal */
        /* adding 0.5 puts the unit of 2^-24 in the last place and rounds half to even */
        const uint32_t r = sdq__u_bits(sdq__u_float(a) + 0.5f) - 0x3f000000u;
        return (uint16_t)(sign | r);
    }
    return (uint16_t)(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}

static float sdq__u_from_bf16(uint16_t h) { return sdq__u_float((uint32_t)h << 16); }
static uint16_t sdq__u_to_bf16(float x) {
    const uint32_t u = sdq__u_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

/* One word into a hash: a bijection of the word, and of the hash. */
static uint64_t sdq__u_mix(uint64_t h, uint64_t word) {
    h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);      /* 2^64 / golden ratio */
    return h ^ (h >> 32);
}

/* 64-bit hash of bytes, from a start value: words of 8 bytes (little endian, the last filled with
 * zeros) go into four lanes in turn, so that processors can overlap them; the lanes and the length
 * are joined at the end. A change within one word can not go unseen. No protection against malice.
 * The bytes may come in pieces: all but the last of a multiple of 32. */
typedef struct sdq__hash { uint64_t h, lane[4], tail[4], bytes; } sdq__hash;

static sdq__hash sdq__u_hash_begin(uint64_t h) {
    sdq__hash s;
    size_t k;
    memset(&s, 0, sizeof s);
    s.h = h;
    for (k = 0; k < 4; k++) s.lane[k] = h + k;
    return s;
}
static uint64_t sdq__u_word(const unsigned char *p) { uint64_t w; memcpy(&w, p, 8); return w; }

static void sdq__u_hash_add(sdq__hash *s, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t a = s->lane[0], b = s->lane[1], c = s->lane[2], d = s->lane[3];    /* registers */
    SDQ_ASSERT(s->bytes % 32 == 0);
    s->bytes += n;
    for (; n >= 32; n -= 32, p += 32) {
        a = sdq__u_mix(a, sdq__u_word(p));
        b = sdq__u_mix(b, sdq__u_word(p + 8));
        c = sdq__u_mix(c, sdq__u_word(p + 16));
        d = sdq__u_mix(d, sdq__u_word(p + 24));
    }
    s->lane[0] = a; s->lane[1] = b; s->lane[2] = c; s->lane[3] = d;
    if (n) memcpy(s->tail, p, n);
}
static uint64_t sdq__u_hash_end(const sdq__hash *s) {
    uint64_t h = s->h;
    size_t k;
    for (k = 0; k < 4; k++) h = sdq__u_mix(h, sdq__u_mix(s->lane[k], s->tail[k]));
    return sdq__u_mix(h, s->bytes);
}
static uint64_t sdq__u_hash(uint64_t h, const void *data, size_t n) {
    sdq__hash s = sdq__u_hash_begin(h);
    sdq__u_hash_add(&s, data, n);
    return sdq__u_hash_end(&s);
}

/* The start of the hash of an array's values: its name and shape. Sums of such hashes do not
 * depend on an order. */
static sdq__hash sdq__u_hash_array(const char *name, size_t rank, const size_t *dim) {
    uint64_t h = sdq__u_hash(0, name, strlen(name));
    size_t i;
    for (i = 0; i < rank; i++) h = sdq__u_mix(h, (uint64_t)dim[i]);
    return sdq__u_hash_begin(sdq__u_mix(h, (uint64_t)rank));
}

static size_t sdq__u_dtype_size(sdq_dtype d) {
    static const unsigned char size[SDQ_DTYPE_COUNT] = {4, 2, 2, 8, 1, 1, 2, 2, 4, 4, 8, 8, 1};
    return (unsigned)d < SDQ_DTYPE_COUNT ? size[d] : 0;
}

/* ===========================================================================
 * >>error   one status, one sentence; the first error stays
 * ======================================================================== */

/* Scratch memory: a list of chunks used as a stack. Releasing keeps the chunks. */
typedef struct sdq__chunk { char *base; size_t size, used, most; } sdq__chunk;

struct sdq__node;
struct sdq__kernels;
struct sdq__taps;

struct sdq_ctx {
    sdq_ctx_desc desc;
    const struct sdq__kernels *k;   /* kernels of the chosen tier */
    sdq_tier tier;
    int threads;
    sdq_status status;
    char error[512];
    sdq__chunk *chunks;
    size_t chunk_count, chunk_cap, chunk_at, arena_now, arena_peak, arena_size;
    size_t arena_touched;           /* bytes of the chunks that were in use since they were made */
    struct sdq__dry *dry;           /* not NULL: nothing is computed, memory is counted */
    struct sdq__node *tape;         /* newest node */
    struct sdq__taps *taps;         /* layers whose output is wanted, or NULL */
    struct sdq__notes *notes;       /* parts of the loss, while training */
    const char **watch;             /* receives the first layer whose output is not finite */
    sdq_profile *profile;           /* NULL: nobody asks where the time goes */
    int recording, replay;          /* replay: a checkpoint runs a block again */
};

/* Keep the first error and return its code: `return sdq__fail(ctx, SDQ_ERR_SHAPE, "...")`. */
SDQ__PRINTF(3, 4)
static sdq_status sdq__fail(sdq_ctx *ctx, sdq_status status, const char *format, ...) {
    va_list args;
    if (ctx->status != SDQ_OK) return status;
    ctx->status = status;
    va_start(args, format);
    (void)vsnprintf(ctx->error, sizeof ctx->error, format, args);
    va_end(args);
    return status;
}

SDQ_API sdq_status sdq_last_error(const sdq_ctx *ctx) { return ctx ? ctx->status : SDQ_ERR_OOM; }
SDQ_API const char *sdq_error_text(const sdq_ctx *ctx) { return ctx ? ctx->error : ""; }
SDQ_API void sdq_clear_error(sdq_ctx *ctx) { ctx->status = SDQ_OK; ctx->error[0] = 0; }
SDQ_API const char *sdq_status_name(sdq_status status) {
    switch (status) {
#define SDQ__X(name, value, text) case name: return text;
    SDQ_STATUS_LIST(SDQ__X)
#undef SDQ__X
    default: return "unknown status";
    }
}

/* ===========================================================================
 * >>memory   heap through the user's allocator, scratch through the arena
 *
 * Long-lived things (models, datasets, optimizer state) come from the heap. What ops compute
 * comes from the arena: pushed, and released together by going back to a mark.
 * ======================================================================== */

#define SDQ__LARGE ((size_t)1 << 18)    /* bytes of a block that is worth a mapping of its own */

/* Zeros that take no memory until they are touched, and that go back to the system at once when
 * they are freed; NULL where there is nothing of that kind. */
static void *sdq__mem_map(size_t bytes) {
#if SDQ__MMAP && defined(MAP_ANONYMOUS)
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
#else
    (void)bytes;
    return NULL;
#endif
}
static void sdq__mem_unmap(void *p, size_t bytes) {
#if SDQ__MMAP && defined(MAP_ANONYMOUS)
    (void)munmap(p, bytes);
#else
    (void)p; (void)bytes;
#endif
}

#define SDQ__HUGE ((size_t)1 << 22)     /* of one that is worth pages of 2 MiB */

/* Such pages are touched with fewer faults and found with fewer misses. */
static void sdq__mem_want_huge(void *p, size_t bytes) {
#if SDQ__MMAP && defined(MADV_HUGEPAGE)
    if (bytes >= SDQ__HUGE) (void)madvise(p, bytes, MADV_HUGEPAGE);
#else
    (void)p; (void)bytes;
#endif
}

#define SDQ__HEAD 64        /* in front of a block: its mapped size, 0: malloc's. A cache line */

/* The default allocator. malloc may keep what is freed, and a pipeline that loads one network after
 * the other would hold them all: so large blocks are mappings. */
static void *sdq__mem_malloc(void *user, size_t bytes) {
    char *p = NULL;
    size_t mapped = 0;
    (void)user;
    if (bytes > SIZE_MAX - SDQ__HEAD) return NULL;
    bytes += SDQ__HEAD;
    if (bytes >= SDQ__LARGE) p = (char *)sdq__mem_map(bytes);
    if (p) sdq__mem_want_huge(p, mapped = bytes);
    else p = (char *)malloc(bytes);
    if (!p) return NULL;
    memcpy(p, &mapped, sizeof mapped);
    return p + SDQ__HEAD;
}
static size_t sdq__mem_mapped(const void *block) {
    size_t mapped;
    memcpy(&mapped, (const char *)block - SDQ__HEAD, sizeof mapped);
    return mapped;
}
static void sdq__mem_release(void *user, void *block) {
    char *p = (char *)block - SDQ__HEAD;
    const size_t mapped = sdq__mem_mapped(block);
    (void)user;
    if (mapped) sdq__mem_unmap(p, mapped);
    else free(p);
}

/* A dry run: the same calls with the same sizes, but loops over data are left out and large blocks
 * stay untouched, so that what a drawing will need is known in milliseconds, from the very code
 * that will do it. What the program would hold is all blocks, but of the arena only what was ever
 * used of its chunks. Contexts of this kind are made by sdq_txt2img_memory alone. */
typedef struct sdq__dry_block { void *p; size_t bytes; } sdq__dry_block;
typedef struct sdq__dry {
    size_t held, most;          /* bytes now and at most */
    sdq__dry_block *large;
    size_t n, cap;
} sdq__dry;

/* Large blocks are listed: not even a size is written to them. */
static void *sdq__mem_dry_alloc(void *user, size_t bytes) {
    sdq__dry *d = (sdq__dry *)user;
    void *p = NULL, *more;
    if (d->n == d->cap) {
        more = realloc(d->large, (2 * d->cap + 64) * sizeof *d->large);
        if (!more) return NULL;
        d->large = (sdq__dry_block *)more;
        d->cap = 2 * d->cap + 64;
    }
    if (bytes >= SDQ__LARGE) p = sdq__mem_map(bytes);
    if (p) {
        d->large[d->n].p = p;
        d->large[d->n++].bytes = bytes;
    } else {
        p = calloc(1, bytes + SDQ__HEAD);
        if (!p) return NULL;
        memcpy(p, &bytes, sizeof bytes);
        p = (char *)p + SDQ__HEAD;
    }
    d->held += bytes;
    return p;
}
static void sdq__mem_dry_release(void *user, void *block) {
    sdq__dry *d = (sdq__dry *)user;
    char *p = (char *)block - SDQ__HEAD;
    size_t i = d->n, bytes;
    while (i > 0 && d->large[i - 1].p != block) i--;
    if (i > 0) {
        bytes = d->large[i - 1].bytes;
        sdq__mem_unmap(block, bytes);
        d->large[i - 1] = d->large[--d->n];
    } else {
        memcpy(&bytes, p, sizeof bytes);
        free(p);
    }
    d->held -= bytes;
}
static void sdq__mem_note(sdq_ctx *ctx, size_t extra) {
    if (!ctx->dry) return;
    ctx->dry->most = sdq__u_max(ctx->dry->most, ctx->dry->held + extra + ctx->arena_touched
                                                    - ctx->arena_size);
}

/* Whether a new block is of zeros as it is: mappings are, and dry runs must not touch theirs. */
static int sdq__mem_is_zero(const sdq_ctx *ctx, const void *p) {
    return ctx->dry || (ctx->desc.alloc == sdq__mem_malloc && sdq__mem_mapped(p));
}

/* count * size bytes of zeros; NULL and a sticky error when that is too much. */
static void *sdq__alloc(sdq_ctx *ctx, size_t count, size_t size) {
    size_t bytes;
    void *p = NULL;
    if (sdq__u_mul(count, size, &bytes)) p = ctx->desc.alloc(ctx->desc.user, bytes ? bytes : 1);
    else bytes = SIZE_MAX;
    if (!p) {
        sdq__fail(ctx, SDQ_ERR_OOM, "out of memory: %zu bytes asked for", bytes);
        return NULL;
    }
    sdq__mem_note(ctx, 0);
    if (!sdq__mem_is_zero(ctx, p)) memset(p, 0, bytes ? bytes : 1);
    return p;
}
static void sdq__free(sdq_ctx *ctx, void *p) {
    if (p) ctx->desc.release(ctx->desc.user, p);
}
#define SDQ__NEW(ctx, type) ((type *)sdq__alloc(ctx, 1, sizeof(type)))
#define SDQ__NEW_N(ctx, type, n) ((type *)sdq__alloc(ctx, n, sizeof(type)))

static char *sdq__strdup(sdq_ctx *ctx, const char *s) {
    const size_t n = strlen(s) + 1;
    char *p = SDQ__NEW_N(ctx, char, n);
    if (p) memcpy(p, s, n);
    return p;
}

/* Room for at least `need` items of `size` bytes in a growing heap array; 0 when out of memory. */
static int sdq__grow(sdq_ctx *ctx, void **items, size_t *cap, size_t need, size_t size) {
    size_t want = *cap ? *cap : 8;
    void *p;
    if (need <= *cap) return 1;
    while (want < need) want = want > SIZE_MAX / 2 ? need : want * 2;
    p = sdq__alloc(ctx, want, size);
    if (!p) return 0;
    if (*items) memcpy(p, *items, *cap * size);
    sdq__free(ctx, *items);
    *items = p;
    *cap = want;
    return 1;
}

#define SDQ__ALIGN 64               /* a cache line, a 512-bit vector */
#define SDQ__CHUNK ((size_t)1 << 22)   /* the first chunk; each new one doubles the arena */

/* Free the last chunk. */
static void sdq__mem_drop(sdq_ctx *ctx) {
    const sdq__chunk *c = &ctx->chunks[--ctx->chunk_count];
    sdq__free(ctx, c->base);
    ctx->arena_size -= c->size;
    ctx->arena_touched -= c->most;
}

/* Give back the chunks above the present height. */
static void sdq__mem_trim(sdq_ctx *ctx) {
    while (ctx->chunk_count > ctx->chunk_at && ctx->chunks[ctx->chunk_count - 1].used == 0)
        sdq__mem_drop(ctx);
}

/* Uninitialised scratch, 64-byte aligned, until the arena is released to an older mark. */
static void *sdq__push(sdq_ctx *ctx, size_t bytes) {
    sdq__chunk *c;
    if (bytes > SIZE_MAX / 2) {
        sdq__fail(ctx, SDQ_ERR_OOM, "out of memory: %zu bytes", bytes);
        return NULL;
    }
    bytes = sdq__u_round_up(bytes ? bytes : 1, SDQ__ALIGN);
    for (;;) {
        if (ctx->chunk_at < ctx->chunk_count) {
            c = &ctx->chunks[ctx->chunk_at];
            if (c->size - c->used >= bytes) break;
            if (c->used == 0 && ctx->chunk_at + 1 == ctx->chunk_count) {   /* too small: replace */
                sdq__mem_drop(ctx);
                continue;
            }
            ctx->chunk_at++;
            continue;
        }
        if (!sdq__grow(ctx, (void **)(void *)&ctx->chunks, &ctx->chunk_cap, ctx->chunk_count + 1,
                       sizeof(sdq__chunk))) return NULL;
        c = &ctx->chunks[ctx->chunk_count];
        c->size = sdq__u_max(sdq__u_max(bytes, SDQ__CHUNK), ctx->arena_size);
        c->used = c->most = 0;
        c->base = (char *)ctx->desc.alloc(ctx->desc.user, c->size + SDQ__ALIGN);
        if (!c->base) {
            sdq__fail(ctx, SDQ_ERR_OOM, "out of memory: %zu bytes of scratch", c->size);
            return NULL;
        }
        ctx->arena_size += c->size;
        ctx->chunk_count++;
    }
    {
        const size_t pad = (SDQ__ALIGN - (size_t)((uintptr_t)c->base % SDQ__ALIGN)) % SDQ__ALIGN;
        void *p = c->base + pad + c->used;
        c->used += bytes;
        if (c->used > c->most) { ctx->arena_touched += c->used - c->most; c->most = c->used; }
        sdq__mem_note(ctx, 0);
        ctx->arena_now += bytes;
        ctx->arena_peak = sdq__u_max(ctx->arena_peak, ctx->arena_now);
        return p;
    }
}
#define SDQ__PUSH_N(ctx, type, n) ((type *)sdq__push(ctx, (size_t)(n) * sizeof(type)))

SDQ_API sdq_mark sdq_arena_mark(sdq_ctx *ctx) {
    sdq_mark m;
    m.chunk = ctx->chunk_at;
    m.used = ctx->chunk_at < ctx->chunk_count ? ctx->chunks[ctx->chunk_at].used : 0;
    m.tape = ctx->tape;
    return m;
}

SDQ_API void sdq_arena_release(sdq_ctx *ctx, sdq_mark m) {
    size_t i;
    for (i = m.chunk; i < ctx->chunk_count && i <= ctx->chunk_at; i++) {
        const size_t keep = i == m.chunk ? m.used : 0;
        ctx->arena_now -= ctx->chunks[i].used - keep;
        ctx->chunks[i].used = keep;
    }
    ctx->chunk_at = m.chunk;
    ctx->tape = (struct sdq__node *)m.tape;
}

SDQ_API size_t sdq_arena_peak(const sdq_ctx *ctx) { return ctx->arena_peak; }

/* ===========================================================================
 * >>parallel   one loop over independent tasks
 *
 * Every task writes its own outputs and no sum is split between tasks, so the thread count
 * cannot change a result. OpenMP when the compiler has it, a plain loop otherwise.
 * ======================================================================== */

typedef void (*sdq__task_fn)(void *arg, size_t task, int thread);

/* ---- where the time goes: only the thread that calls is asked, in loops, too ---- */

/* From here on that thread does this; returns what it did. */
static sdq_work sdq__par_work(sdq_profile *p, int thread, sdq_work work) {
    sdq_work was;
    double t;
    if (!p || thread != 0) return SDQ_WORK_OTHER;
    t = p->now(p->user);
    p->seconds[p->work] += t - p->since;
    p->since = t;
    was = p->work;
    p->work = work;
    return was;
}

SDQ_API sdq_status sdq_ctx_profile(sdq_ctx *ctx, sdq_profile *profile) {
    if (profile && !profile->now)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "sdq_ctx_profile: the profile has no clock");
    if (ctx->profile) (void)sdq__par_work(ctx->profile, 0, SDQ_WORK_OTHER);
    ctx->profile = profile;
    if (profile) {
        profile->work = SDQ_WORK_OTHER;
        profile->since = profile->now(profile->user);
    }
    return SDQ_OK;
}

SDQ_API const char *sdq_work_name(sdq_work work) {
    static const char *const name[SDQ_WORK_COUNT] = {
        "other", "int8 products", "float products", "quantizing", "attention's products",
        "softmax", "norms", "GEGLU", "sums, activations", "copies", "waiting"};
    return (unsigned)work < SDQ_WORK_COUNT ? name[work] : "?";
}

/* ---- the loop ---- */

static void sdq__par_task(sdq_profile *p, sdq_work work, sdq__task_fn fn, void *arg, size_t task,
                          int thread) {
    (void)sdq__par_work(p, thread, work);
    fn(arg, task, thread);
    (void)sdq__par_work(p, thread, SDQ_WORK_WAIT);
}

static void sdq__par_for(sdq_ctx *ctx, size_t tasks, sdq__task_fn fn, void *arg) {
    sdq_profile *p = ctx->profile;
    sdq_work work;
    if (ctx->dry) return;
    work = sdq__par_work(p, 0, SDQ_WORK_WAIT);
#ifdef _OPENMP
    if (ctx->threads > 1 && tasks > 1) {
        const ptrdiff_t n = (ptrdiff_t)tasks;
        ptrdiff_t i;
#pragma omp parallel for schedule(dynamic) num_threads(ctx->threads)
        for (i = 0; i < n; i++)
            sdq__par_task(p, work, fn, arg, (size_t)i, omp_get_thread_num());
    } else
#endif
    {
        size_t i;
        for (i = 0; i < tasks; i++) sdq__par_task(p, work, fn, arg, i, 0);
    }
    (void)sdq__par_work(p, 0, work);
}

/* ===========================================================================
 * >>cpu   which tier this processor and this operating system can run
 *
 * A vector register file is usable only if the CPU has it (CPUID) and the OS saves it on a
 * task switch (XCR0: bits 1,2 for AVX, 5,6,7 as well for AVX-512).
 * ======================================================================== */

#if SDQ__X86
static uint64_t sdq__cpu_xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return ((uint64_t)hi << 32) | lo;
}
#endif

static sdq_tier sdq__cpu_best(void) {
#if SDQ__X86
    unsigned a, b, c, d;
    uint64_t xcr0;
    const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  /* F DQ BW VL */
    if (!__get_cpuid(1, &a, &b, &c, &d)) return SDQ_TIER_SCALAR;
    if (!(c & (1u << 27)) || !(c & (1u << 12)) || !(c & (1u << 28))) return SDQ_TIER_SCALAR;
    xcr0 = sdq__cpu_xcr0();                         /* OSXSAVE, FMA, AVX are there */
    if ((xcr0 & 0x6) != 0x6) return SDQ_TIER_SCALAR;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & (1u << 5))) return SDQ_TIER_SCALAR;
    if ((xcr0 & 0xe6) != 0xe6 || (b & avx512) != avx512) return SDQ_TIER_AVX2;
    return (c & (1u << 11)) ? SDQ_TIER_AVX512VNNI : SDQ_TIER_AVX512;
#else
    return SDQ_TIER_SCALAR;
#endif
}

SDQ_API int sdq_tier_available(sdq_tier tier) { return tier <= sdq__cpu_best(); }
SDQ_API const char *sdq_tier_name(sdq_tier tier) {
    static const char *const name[SDQ_TIER_COUNT] = {"auto", "scalar", "avx2", "avx512",
                                                     "avx512vnni"};
    return (unsigned)tier < SDQ_TIER_COUNT ? name[tier] : "?";
}
/* ===========================================================================
 * >>qmath   rounding, ranges and scales: the only definition
 *
 * Activations: u8, affine.  Range [mn,mx] with 0 inside,
 *     s = max((mx - mn) / 255, 1.19e-7),  z = clamp(0 - rint(mn / s), 0, 255)
 *     q = clamp(rint(x * (1/s)) + z, 0, 255),  x ~ (q - z) s
 * Weights: s8 per output channel, symmetric,
 *     s = max|w| / 127.5,  q = clamp(rint(w * (1/s)), -128, 127)
 * Weights of 4 bits: s per output channel, an integer m per group of input channels within a tap
 * (two-level scales as in VS-Quant, Dai et al., arXiv 2102.04503),
 *     s = max|w| / 120,  q = m clamp(rint(w * (1/(s m))), -8, 7),  m in 1..16
 * m is the one of least square error, which also finds where to clip. q is in [-128, 112]: an int8
 * number like any other, so the int8 kernels run it, and w ~ q s holds for both.
 * Rounding is half to even; the reciprocal is rounded to float first, as PyTorch does.
 * ======================================================================== */

#define SDQ__Q_EPS 1.1920928955078125e-07f      /* 2^-23: torch.finfo(float32).eps */

typedef struct sdq__qparam { float s, inv; int32_t z; } sdq__qparam;

/* rint by adding and subtracting 1.5 * 2^23: half to even for |x| < 2^22; for the others the
 * clamp that follows decides. */
static float sdq__q_rint(float x) {
    const float big = 12582912.0f;
    if (!(x < 4194304.0f && x > -4194304.0f)) return x;
    return (x + big) - big;
}

static sdq__qparam sdq__q_from_scale(float s, int32_t z) {
    sdq__qparam p;
    p.s = s;
    p.inv = 1.0f / s;
    p.z = z;
    return p;
}

static sdq__qparam sdq__q_from_range(float mn, float mx) {
    float s, z;
    mn = mn < 0.0f ? mn : 0.0f;
    mx = mx > 0.0f ? mx : 0.0f;
    s = (mx - mn) / 255.0f;
    if (!(s > SDQ__Q_EPS)) s = SDQ__Q_EPS;
    z = 0.0f - sdq__q_rint(mn / s);
    z = !(z > 0.0f) ? 0.0f : z > 255.0f ? 255.0f : z;      /* infinite ranges give NaN: 0 */
    return sdq__q_from_scale(s, (int32_t)z);
}

static float sdq__q_weight_scale(float mn, float mx) {
    const float a = -mn > mx ? -mn : mx, s = a / 127.5f;
    return s > SDQ__Q_EPS ? s : SDQ__Q_EPS;
}

/* ---- weights of 4 bits ---- */

#define SDQ__Q_MULTIPLIERS 16                  /* largest multiplier m: -8 m is an int8 */
#define SDQ__Q_GROUP 64                /* input channels that share one, unless told otherwise */

static float sdq__q_scale4(float mn, float mx) {
    const float a = -mn > mx ? -mn : mx, s = a / (7.5f * (float)SDQ__Q_MULTIPLIERS);
    return s > SDQ__Q_EPS ? s : SDQ__Q_EPS;
}

/* What a group of weights loses with steps of this size: the square error. */
static double sdq__q_error4(const float *w, size_t n, float step) {
    const float inv = 1.0f / step;
    double sum = 0.0;
    size_t i;
    for (i = 0; i < n; i++) {
        const float t = sdq__q_rint(w[i] * inv), q = t < -8.0f ? -8.0f : t > 7.0f ? 7.0f : t;
        const float d = w[i] - q * step;
        sum += (double)(d * d);
    }
    return sum;
}

/* The multiplier that loses least; of equals the largest. */
static uint8_t sdq__q_multiplier4(const float *w, size_t n, float s) {
    double best = INFINITY;
    int m, found = SDQ__Q_MULTIPLIERS;
    for (m = SDQ__Q_MULTIPLIERS; m >= 1; m--) {
        const double e = sdq__q_error4(w, n, s * (float)m);
        if (e < best) { best = e; found = m; }
    }
    return (uint8_t)found;
}

/* Multiples of s m, rounded, to multiples of s: clipped to 4 bits, times m. In place. */
static void sdq__q_expand4(int8_t *q, size_t n, int m) {
    size_t i;
    for (i = 0; i < n; i++) q[i] = (int8_t)((q[i] < -8 ? -8 : q[i] > 7 ? 7 : q[i]) * m);
}

/* ===========================================================================
 * >>kernel-list   the kernels: one list, one struct, one const table per tier
 *
 * A vector is always 16 floats, whatever the registers are ("16 lanes"). Element i of a row is
 * handled by lane i % 16. What a kernel computes is defined to the bit:
 *   element-wise   the same IEEE operations in the same order, fmaf where written
 *   sums           lane l adds elements l, l+16, l+32, ... in order (from +0; a missing element
 *                  of the last vector adds nothing); lanes are joined as a tree:
 *                  lane[l] += lane[l+8] (l < 8), then +4, +2, +1
 *   GEMM           every output is one chain over k in order: c = fmaf(a, b, c)
 *   int8           int32 sums are exact; the float epilogue is written out below
 * exp, erf and friends are our own polynomials. The scalar tier is the definition; each other
 * tier must give the same bits.
 * ======================================================================== */

#define SDQ__MR 12      /* rows of a GEMM tile: 12 x 2 zmm accumulators + 2 of b + 1 of a */
#define SDQ__NR 32      /* columns of a GEMM tile and of a packed panel, on every tier */

/* One fp32 tile: y[i][j] = sum over taps t, channels k of a[t*mr+i][k*astep] * b[t*kc+k][j].
 * The chain starts at +0, or at y if `more`. Then, in this order and only where given:
 * + bias[j], + res[i][j]. Columns nr..31 of y are not touched; b is always 32 wide. */
typedef struct sdq__ftile {
    const float *const *a;      /* [taps][mr] row pointers */
    size_t astep;               /* distance of consecutive k in a row */
    const float *b;             /* [taps*kc][32] */
    size_t mr, nr, taps, kc;    /* mr <= 12, nr <= 32 */
    const float *bias, *res;    /* NULL or [32] (nr of them valid), [mr][ldr] */
    float *y;
    size_t ldr, ldy;
    int more;
} sdq__ftile;

/* One int8 tile. Input rows are u8 in groups of 4 channels ("quads"); weights s8, packed as
 * [taps*quads][32][4]. The quads of all taps are cut into segments of `seg` quads; each segment g
 * and row i has a scale s[g*mr+i] and zero point z[g*mr+i], each segment and column a weight sum
 * wsum[g*32+j]. Definition, with acc the exact int32 sum of the segment's products:
 *   f = +0;  for g: f = fmaf(s[g][i], (float)(acc[g] - z[g][i] * wsum[g][j]), f)
 *   y = fmaf(f, sw[j], bias[j])  (bias NULL: f * sw[j]),  then + res[line[i]+j] where given
 * and the result is y[line[i]+j]. taps*quads is a multiple of seg. If `more`, + the old y comes
 * last. wsum NULL: there are no zero points.
 * gemm_s8u8: rows are s8, "weights" u8. gemm_s16: groups of two s16 instead, and no sum of a
 * segment leaves int32. */
typedef enum sdq__group { SDQ__U8S8, SDQ__S8U8, SDQ__S16 } sdq__group;
typedef struct sdq__qtile {
    const uint8_t *const *a;    /* [taps][mr] row pointers; a tap of NULLs adds nothing */
    const int8_t *b;
    size_t mr, nr, taps, quads, seg;
    const float *s;
    const int32_t *z;
    const int32_t *wsum;
    const float *sw, *bias, *res;
    float *y;
    const size_t *line;         /* [mr]: where rows begin in y and res */
    int more;
} sdq__qtile;

typedef struct sdq__adamw_step {
    float lr, beta1, beta2, eps, decay;     /* decay = lr * weight_decay */
    float c1, c2;                           /* 1 / (1 - beta1^t), 1 / (1 - beta2^t) */
    float clip;                             /* gradients are multiplied by this first */
} sdq__adamw_step;

#define SDQ__MOMENT_BLOCK 256   /* moments in bytes: elements that share their scales */

/* X(return type, name, arguments, class). n: elements of a row; no alignment is assumed and
 * nothing past n is read or written. All EXACT: equal to the bit on all tiers. */
#define SDQ__KERNEL_LIST(X) \
    /* GEMM tiles */ \
    X(void, gemm_f32, (const sdq__ftile *t), EXACT) \
    X(void, gemm_u8s8, (const sdq__qtile *t), EXACT) \
    X(void, gemm_s8u8, (const sdq__qtile *t), EXACT) \
    X(void, gemm_s16, (const sdq__qtile *t), EXACT) \
    /* Winograd's transforms, see >>gemm; element by element of n: 36 numbers B^T d B of the 6x6 \
       pixels at d; 36 numbers G g G^T of the 9 at g, ldg apart; 16 numbers A^T m A of the 36 at \
       m, ldm apart, to the rows y (NULL: left out), + bias (or NULL), + res (or NULL) */ \
    X(void, win_input, (float *v, size_t ldv, const float *const *d, size_t n), EXACT) \
    X(void, win_weight, (float *u, size_t ldu, const float *g, size_t ldg, size_t n), EXACT) \
    X(void, win_output, \
      (float *const *y, const float *m, size_t ldm, const float *bias, const float *const *res, \
       size_t n), EXACT) \
    /* *mn = min(*mn, x...), *mx = max(*mx, x...); NaN elements are skipped */ \
    X(void, minmax, (const float *x, size_t n, float *mn, float *mx), EXACT) \
    /* the same per column: mn[j], mx[j] over rows of length n, ld apart */ \
    X(void, minmax_cols, \
      (const float *x, size_t rows, size_t ld, size_t n, float *mn, float *mx), EXACT) \
    /* q = clamp(rint(x * inv) + z, 0, 255), half to even; NaN gives z */ \
    X(void, quantize_u8, (uint8_t *q, const float *x, size_t n, float inv, int32_t z), EXACT) \
    /* q = clamp(rint(x * inv), -128, 127); NaN gives 0 */ \
    X(void, quantize_s8, (int8_t *q, const float *x, size_t n, float inv), EXACT) \
    /* q = clamp(rint(x * inv), -most, most), most <= 32767; NaN gives 0 */ \
    X(void, quantize_s16, (int16_t *q, const float *x, size_t n, float inv, float most), EXACT) \
    /* quantize_u8 of rows of n, ldx and ldq apart, each by the range of its own elements: scale \
       and zero point as in >>qmath go to s[r*lds], z[r*lds] */ \
    X(void, quantize_rows, \
      (uint8_t *q, size_t ldq, const float *x, size_t ldx, size_t rows, size_t n, float *s, \
       int32_t *z, size_t lds), EXACT) \
    /* straight through a quantizer to low..high, with v = w * inv and t = rint(v): \
       dw += inside ? g : 0; returns the sum of g * (inside ? t - v : t < 0 ? low : high) */ \
    X(float, ste, \
      (float *dw, const float *g, const float *w, size_t n, float inv, float low, float high), \
      EXACT) \
    /* y = q * s */ \
    X(void, dequantize_s8, (float *y, const int8_t *q, size_t n, float s), EXACT) \
    /* y = (q - z) * s */ \
    X(void, dequantize_u8, (float *y, const uint8_t *q, size_t n, float s, int32_t z), EXACT) \
    /* element-wise */ \
    X(void, add, (float *y, const float *a, const float *b, size_t n), EXACT) \
    /* y[n][32] *= a[j] */ \
    X(void, mul_cols, (float *y, const float *a, size_t n), EXACT) \
    /* y = x*s */ \
    X(void, scale, \
      (float *y, const float *x, size_t n, float s), EXACT) \
    /* y = fma(s,x,y) */ \
    X(void, axpy, \
      (float *y, const float *x, size_t n, float s), EXACT) \
    /* y = fma(t, x-y, y) */ \
    X(void, lerp, \
      (float *y, const float *x, size_t n, float t), EXACT) \
    X(void, vexp, (float *y, const float *x, size_t n), EXACT) \
    X(void, silu, (float *y, const float *x, size_t n), EXACT) \
    /* erf form */ \
    X(void, gelu, \
      (float *y, const float *x, size_t n), EXACT) \
    X(void, quick_gelu, (float *y, const float *x, size_t n), EXACT) \
    /* h*gelu(g) */ \
    X(void, geglu, \
      (float *y, const float *h, const float *g, size_t n), EXACT) \
    /* backward, all adding: dx += dy * f'(x), one rounding of the product, one of the sum */ \
    X(void, silu_bwd, (float *dx, const float *dy, const float *x, size_t n), EXACT) \
    X(void, gelu_bwd, (float *dx, const float *dy, const float *x, size_t n), EXACT) \
    X(void, quick_gelu_bwd, (float *dx, const float *dy, const float *x, size_t n), EXACT) \
    X(void, geglu_bwd, \
      (float *dh, float *dg, const float *dy, const float *h, const float *g, size_t n), EXACT) \
    /* sums over a row: 16 lanes and the tree */ \
    X(float, sum, (const float *x, size_t n), EXACT) \
    /* fmaf per lane */ \
    X(float, dot, \
      (const float *a, const float *b, size_t n), EXACT) \
    /* sum (a-b)^2, fmaf */ \
    X(float, sqdist, \
      (const float *a, const float *b, size_t n), EXACT) \
    /* sum |a-b| */ \
    X(float, absdist, \
      (const float *a, const float *b, size_t n), EXACT) \
    /* sum (x-mean)^2, fmaf */ \
    X(float, sqdev, \
      (const float *x, size_t n, float mean), EXACT) \
    /* per column, a chain over rows in order; acc is added to: acc += x; \
       acc = fma(x-mean[j], x-mean[j], acc); a1 += dy, a2 = fma(dy, x, a2) */ \
    X(void, colsum, (float *acc, const float *x, size_t rows, size_t ld, size_t n), EXACT) \
    X(void, colsqdev, \
      (float *acc, const float *x, const float *mean, size_t rows, size_t ld, size_t n), EXACT) \
    X(void, colsum2, \
      (float *a1, float *a2, const float *dy, const float *x, size_t rows, size_t ld, \
       size_t n), EXACT) \
    /* y = fma(x, a[j], b[j]); silu variant applies SiLU to it; one row */ \
    X(void, affine, (float *y, const float *x, const float *a, const float *b, size_t n), EXACT) \
    X(void, affine_silu, \
      (float *y, const float *x, const float *a, const float *b, size_t n), EXACT) \
    /* dz = dy * silu'(fma(x, a, b)) (not adding) */ \
    X(void, affine_silu_bwd, \
      (float *dz, const float *dy, const float *x, const float *a, const float *b, size_t n), \
       EXACT) \
    /* dx += fma(dz, a[j], fma(x, p[j], q[j])) */ \
    X(void, norm_bwd, \
      (float *dx, const float *dz, const float *x, const float *a, const float *p, \
       const float *q, size_t n), EXACT) \
    /* y = (x - mean) * rstd * g + b as fma((x-mean)*rstd, g, b) */ \
    X(void, layernorm, \
      (float *y, const float *x, const float *g, const float *b, size_t n, float mean, \
       float rstd), EXACT) \
    /* one row of the backward pass, with h = (x-mean)*rstd: dx += rstd*(dy*g - m1 - h*m2), \
       m1 = mean(dy*g), m2 = mean(dy*g*h); dgamma[j] += dy*h; dbeta[j] += dy */ \
    X(void, layernorm_bwd, \
      (float *dx, float *dgamma, float *dbeta, const float *dy, const float *x, \
       const float *g, size_t n, float mean, float rstd), EXACT) \
    /* s = exp(s - m) with m = max s, whose sum is returned; n > 0 */ \
    X(float, softmax, (float *s, size_t n), EXACT) \
    /* an online softmax to the base 2 down the 32 columns of s[n][32], n > 0: \
       m' = max(m, (max s)*scale); s = 2^fma(s, scale, -m'); alpha = 2^(m - m'); \
       l = fma(l, alpha, sum s); m = m'. 2^x below -127 is 0 */ \
    X(void, softmax_cols, \
      (float *s, size_t n, float scale, float *m, float *l, float *alpha), EXACT) \
    /* the same with bytes for the product that follows, p[n / 4][32][4], where the last group is \
       filled up with zeros: t = (max s)*scale; p = rint(255 2^fma(s, scale, -t)), 2^x to 1.1 in \
       10^4, NaN gives 0; m' = max(m, t); alpha = 2^(m - m'); beta = 2^(t - m'); \
       l = fma(l, alpha, beta * sum p); m = m' */ \
    X(void, softmax_cols_u8, \
      (uint8_t *p, const float *s, size_t n, float scale, float *m, float *l, float *alpha, \
       float *beta), EXACT) \
    /* the same with p[n / 2][32][2] = rint(2048 2^fma(s, scale, -t)), 2^x to 3 in 10^6 */ \
    X(void, softmax_cols_s16, \
      (int16_t *p, const float *s, size_t n, float scale, float *m, float *l, float *alpha, \
       float *beta), EXACT) \
    /* backward of a tile row: p = exp(s*scale - lse); s = p; dp = (p*(dp - delta))*scale */ \
    X(void, softmax_tile_bwd, \
      (float *s, float *dp, size_t n, float scale, float lse, float delta), EXACT) \
    /* PyTorch's AdamW: g = grad*clip; m, v; w -= decay*w; \
       w -= lr * (m*c1) / (sqrt(v*c2) + eps) */ \
    X(void, adamw, \
      (float *w, float *m, float *v, const float *grad, size_t n, const sdq__adamw_step *s), \
       EXACT) \
    /* the same for at most 256 elements with moments in bytes, before and after it \
       m = s[0] |a| a, a = m8/127, v = s[1] b^4, b = v8/255; new s: largest |m| and v, \
       m8 = rint(127 sqrt(|m|/s[0])) with the sign of m, v8 = rint(255 (v/s[1])^(1/4)), \
       but at least 1 where v is not 0 */ \
    X(void, adamw8, \
      (float *w, int8_t *m8, uint8_t *v8, float *s, const float *grad, size_t n, \
       const sdq__adamw_step *step), EXACT) \
    /* half precision to float, exact */ \
    X(void, from_f16, (float *y, const uint16_t *x, size_t n), EXACT) \
    X(void, from_bf16, (float *y, const uint16_t *x, size_t n), EXACT)

typedef struct sdq__kernels {
#define SDQ__X(ret, name, args, cls) ret (*name) args;
    SDQ__KERNEL_LIST(SDQ__X)
#undef SDQ__X
} sdq__kernels;

/* gcc keeps row pointers that find no register in vector registers, unless it is told that it is
 * for an Intel processor. On the way back they wait behind the products, on AMD's, too: tiles of 40
 * channels were 9 % slower. */
#if defined(__clang__)
#define SDQ__TUNE
#else
#define SDQ__TUNE ",tune=haswell"
#endif

/* The passes: this file includes itself once per tier and compiles >>kernel-text for it. */
#define SDQ__KERNEL_PASS 1
#define SDQ__SUFFIX scalar
#define SDQ__TARGET
#define SDQ__TIER 1
#include SDQ_SELF
#if SDQ__X86
#define SDQ__KERNEL_PASS 1
#define SDQ__SUFFIX avx2
#define SDQ__TARGET __attribute__((target("avx2,fma" SDQ__TUNE)))
#define SDQ__TIER 2
#include SDQ_SELF
#define SDQ__KERNEL_PASS 1
#define SDQ__SUFFIX avx512
#define SDQ__TARGET \
    __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl" SDQ__TUNE)))
#define SDQ__TIER 3
#include SDQ_SELF
#define SDQ__KERNEL_PASS 1
#define SDQ__SUFFIX avx512vnni
#define SDQ__TARGET \
    __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512vnni" SDQ__TUNE)))
#define SDQ__TIER 4
#include SDQ_SELF
#endif

static const sdq__kernels *sdq__k_table(sdq_tier tier) {
    switch (tier) {
#if SDQ__X86
    case SDQ_TIER_AVX512VNNI: return &sdq__k_table_avx512vnni;
    case SDQ_TIER_AVX512: return &sdq__k_table_avx512;
    case SDQ_TIER_AVX2: return &sdq__k_table_avx2;
#endif
    default: return &sdq__k_table_scalar;
    }
}

SDQ_API sdq_status sdq_ctx_create(const sdq_ctx_desc *desc, sdq_ctx **out) {
    sdq_ctx_desc d;
    sdq_ctx *ctx;
    sdq_tier best = sdq__cpu_best();
    memset(&d, 0, sizeof d);
    if (!out) return SDQ_ERR_ARGUMENT;
    *out = NULL;
    if (desc) d = *desc;
    if (!d.alloc != !d.release || (unsigned)d.tier >= SDQ_TIER_COUNT || d.threads < 0)
        return SDQ_ERR_ARGUMENT;
    if (!d.alloc) { d.alloc = sdq__mem_malloc; d.release = sdq__mem_release; }
    ctx = (sdq_ctx *)d.alloc(d.user, sizeof *ctx);
    if (!ctx) return SDQ_ERR_OOM;
    memset(ctx, 0, sizeof *ctx);
    ctx->desc = d;
    ctx->tier = d.tier == SDQ_TIER_AUTO || d.tier > best ? best : d.tier;
    ctx->k = sdq__k_table(ctx->tier);
#ifdef _OPENMP
    ctx->threads = d.threads ? d.threads : omp_get_num_procs();
    if (ctx->threads > 1024) ctx->threads = 1024;       /* libgomp ends the process when it fails */
#else
    ctx->threads = 1;
#endif
    *out = ctx;
    return SDQ_OK;
}

SDQ_API void sdq_ctx_free(sdq_ctx *ctx) {
    size_t i;
    if (!ctx) return;
    for (i = 0; i < ctx->chunk_count; i++) sdq__free(ctx, ctx->chunks[i].base);
    sdq__free(ctx, ctx->chunks);
    ctx->desc.release(ctx->desc.user, ctx);
}
SDQ_API sdq_tier sdq_ctx_tier(const sdq_ctx *ctx) { return ctx->tier; }
SDQ_API int sdq_ctx_threads(const sdq_ctx *ctx) { return ctx->threads; }

/* ===========================================================================
 * >>random   torch's CPU generator, Philox, and the normals made from them
 *
 * mt19937: Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8(1), 1998.
 * Philox4x32-10: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
 * Both become normal by Box and Muller (1958): sqrt(-2 ln u1) (cos 2 pi u2, sin 2 pi u2).
 *
 * The words, the uniforms and their order are torch's exactly. The functions ln, sin, cos below
 * are sums of their series in double precision, with +, -, *, / and sqrt only, which IEEE 754
 * fixes to the bit; so are, therefore, all numbers of this section. torch itself computes the
 * normals of n >= 16 with vector approximations in float that differ between its own builds:
 * the distance to them is a few units in the last place (tests/test_random.c states it).
 * ======================================================================== */

#define SDQ__PI 3.14159265358979323846

/* ln x for finite x > 0. x = 2^e m, sqrt(1/2) <= m < sqrt(2), s = (m-1)/(m+1):
 * ln m = 2 (s + s^3/3 + s^5/5 + ...); |s| < 0.172, so term 11 is below 2^-56 of the sum. */
static double sdq__rng_log(double x) {
    int e, k;
    double m = frexp(x, &e), s, s2, sum = 0.0;
    if (m < 0.70710678118654752440) { m *= 2.0; e--; }
    s = (m - 1.0) / (m + 1.0);
    s2 = s * s;
    for (k = 23; k >= 3; k -= 2) sum = (sum + 1.0 / k) * s2;
    sum = 2.0 * (s + s * sum);
    /* ln 2 in two parts: the first has 33 bits, so that its product with e is exact */
    return (double)e * 6.93147180369123816490e-01 + (sum + (double)e * 1.90821492927058770002e-10);
}

/* sin and cos of 0 <= x < 2^20: the nearest multiple of pi/2 is taken away (pi/2 in two
 * parts, the first of 33 bits, so that its multiples are exact), then Taylor on [-pi/4, pi/4],
 * where the first term left out is below 2^-62. */
static void sdq__rng_sincos(double x, double *sine, double *cosine) {
    const int quarter = (int)(x * (2.0 / SDQ__PI) + 0.5);
    const double r = (x - quarter * 1.57079632673412561417) - quarter * 6.07710050650619224932e-11;
    const double r2 = r * r;
    double s = 0.0, c = 0.0;
    int k;
    for (k = 18; k >= 2; k -= 2) {      /* s = sin(r)/r - 1, c = cos(r) - 1, by Horner */
        s = (1.0 + s) * -r2 / (double)(k * (k + 1));
        c = (1.0 + c) * -r2 / (double)(k * (k - 1));
    }
    s = r + r * s;
    c = 1.0 + c;
    switch (quarter & 3) {
    case 0: *sine = s; *cosine = c; break;
    case 1: *sine = c; *cosine = -s; break;
    case 2: *sine = -s; *cosine = -c; break;
    default: *sine = -c; *cosine = s; break;
    }
}

static void sdq__rng_twist(uint32_t *mt) {
    size_t i;
    for (i = 0; i < 624; i++) {
        const uint32_t y = (mt[i] & 0x80000000u) | (mt[(i + 1) % 624] & 0x7fffffffu);
        mt[i] = mt[(i + 397) % 624] ^ (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
    }
}

static uint32_t sdq__rng_mt(sdq_rng *rng) {
    uint32_t y;
    if (rng->pos >= 624) { sdq__rng_twist(rng->state); rng->pos = 0; }
    y = rng->state[rng->pos++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* Words 0..3 of block `index` of call number `offset`. */
static void sdq__rng_philox(const sdq_rng *rng, uint64_t index, uint32_t *out) {
    uint32_t c0 = rng->offset, c1 = 0, c2 = (uint32_t)index, c3 = (uint32_t)(index >> 32);
    uint32_t k0 = (uint32_t)rng->seed, k1 = (uint32_t)(rng->seed >> 32);
    int round;
    for (round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)c0 * 0xd2511f53u, b = (uint64_t)c2 * 0xcd9e8d57u;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

/* 64 bits; torch takes the high word first. */
static uint64_t sdq__rng_u64(sdq_rng *rng) {
    const uint64_t high = sdq__rng_mt(rng);
    return (high << 32) | sdq__rng_mt(rng);
}

static float sdq__rng_u24(uint32_t word) {
    return (float)(word & 0xffffffu) * (1.0f / 16777216.0f);
}

SDQ_API void sdq_rng_init(sdq_rng *rng, sdq_rng_kind kind, uint64_t seed) {
    uint32_t i;
    memset(rng, 0, sizeof *rng);
    rng->seed = seed;
    rng->kind = (uint32_t)kind;
    rng->pos = 624;
    if (kind != SDQ_RNG_TORCH) return;
    rng->state[0] = (uint32_t)seed;
    for (i = 1; i < 624; i++) {
        const uint32_t before = rng->state[i - 1];
        rng->state[i] = 1812433253u * (before ^ (before >> 30)) + i;
    }
}

SDQ_API int sdq_rng_valid(const sdq_rng *rng) {
    return rng->kind < (uint32_t)SDQ_RNG_COUNT && rng->pos <= 624 && rng->has_spare <= 1
        && rng->spare > -40.0 && rng->spare < 40.0;
}

/* Where draw i of a [n,c,plane] tensor is stored: [n,plane,c]. */
static size_t sdq__rng_at(size_t i, size_t c, size_t plane) {
    const size_t p = i % plane, rest = i / plane;
    return (rest / c * plane + p) * c + rest % c;
}

/* torch, n < 16: pairs of doubles from 53-bit uniforms, the second of a pair waits in the state.
 * torch's log1p(-u) is ln(1 - u): u is a multiple of 2^-53, so that 1 - u is exact. */
static double sdq__rng_normal_pair(sdq_rng *rng) {
    const double unit = 1.0 / 9007199254740992.0;
    double u1, u2, r, sine, cosine;
    if (rng->has_spare) { rng->has_spare = 0; return rng->spare; }
    u1 = (double)(sdq__rng_u64(rng) & 0x1fffffffffffffu) * unit;
    u2 = (double)(sdq__rng_u64(rng) & 0x1fffffffffffffu) * unit;
    r = sqrt(-2.0 * sdq__rng_log(1.0 - u2));
    sdq__rng_sincos(2.0 * SDQ__PI * u1, &sine, &cosine);
    rng->spare = r * sine;
    rng->has_spare = 1;
    return r * cosine;
}

/* torch, n >= 16: sixteen uniforms u[0..15] become normals in place, u[j] and u[j+8] a pair.
 * Radius, angle, sine and cosine are rounded to float, as torch's vector code rounds them. */
static void sdq__rng_normal_16(float *u) {
    int j;
    for (j = 0; j < 8; j++) {
        const float log_u = (float)sdq__rng_log((double)(1.0f - u[j]));
        const float r = sqrtf(-2.0f * log_u), angle = (float)(2.0 * SDQ__PI) * u[j + 8];
        double sine, cosine;
        sdq__rng_sincos((double)angle, &sine, &cosine);
        u[j] = r * (float)cosine;
        u[j + 8] = r * (float)sine;
    }
}

static void sdq__rng_draw_16(sdq_rng *rng, float *u) {
    int j;
    for (j = 0; j < 16; j++) u[j] = sdq__rng_u24(sdq__rng_mt(rng));
    sdq__rng_normal_16(u);
}

/* torch draws all n uniforms before it transforms any; drawing block by block gives the same
 * words. When n is no multiple of 16 it has drawn the rest in vain: the last sixteen
 * positions are drawn once more after them, over what was there. */
static void sdq__rng_normal_torch(sdq_rng *rng, float *out, size_t n, size_t c, size_t plane) {
    float u[16];
    size_t i, j;
    for (i = 0; i + 16 <= n; i += 16) {
        sdq__rng_draw_16(rng, u);
        for (j = 0; j < 16; j++) out[sdq__rng_at(i + j, c, plane)] = u[j];
    }
    if (i == n) return;
    for (; i < n; i++) (void)sdq__rng_mt(rng);
    sdq__rng_draw_16(rng, u);
    for (j = 0; j < 16; j++) out[sdq__rng_at(n - 16 + j, c, plane)] = u[j];
}

/* Philox: u1 = x 2^-32 + 2^-33 (never 0), angle = (y 2^-32 + 2^-33) 2 pi with 2 pi as a float;
 * the sine is used and the cosine is not (CUDA keeps one number per thread and call). */
static float sdq__rng_normal_philox(const sdq_rng *rng, size_t i) {
    const double unit = 1.0 / 4294967296.0, tau = (double)(float)(2.0 * SDQ__PI);
    uint32_t x[4];
    double sine, cosine;
    sdq__rng_philox(rng, i, x);
    sdq__rng_sincos(((double)x[1] * unit + unit / 2.0) * tau, &sine, &cosine);
    return (float)(sqrt(-2.0 * sdq__rng_log((double)x[0] * unit + unit / 2.0)) * sine);
}

/* n draws for [.., c, plane], stored as [.., plane, c]. */
static void sdq__rng_normal_any(sdq_rng *rng, float *out, size_t n, size_t c, size_t plane) {
    size_t i;
    if (n == 0) return;
    if (rng->kind == (uint32_t)SDQ_RNG_PHILOX) {
        for (i = 0; i < n; i++) out[sdq__rng_at(i, c, plane)] = sdq__rng_normal_philox(rng, i);
        rng->offset++;
    } else if (n >= 16) {
        sdq__rng_normal_torch(rng, out, n, c, plane);
    } else {
        for (i = 0; i < n; i++) out[sdq__rng_at(i, c, plane)] = (float)sdq__rng_normal_pair(rng);
    }
}

SDQ_API void sdq_rng_normal(sdq_rng *rng, float *out, size_t n) {
    sdq__rng_normal_any(rng, out, n, 1, 1);
}

SDQ_API void sdq_rng_normal_nchw(sdq_rng *rng, float *out, size_t n, size_t h, size_t w, size_t c) {
    sdq__rng_normal_any(rng, out, n * h * w * c, c, h * w);
}

SDQ_API void sdq_rng_uniform(sdq_rng *rng, float *out, size_t n) {
    size_t i;
    if (rng->kind == (uint32_t)SDQ_RNG_PHILOX) {
        for (i = 0; i < n; i++) {
            uint32_t x[4];
            sdq__rng_philox(rng, i, x);
            out[i] = sdq__rng_u24(x[0]);
        }
        if (n > 0) rng->offset++;
        return;
    }
    for (i = 0; i < n; i++) out[i] = sdq__rng_u24(sdq__rng_mt(rng));
}

SDQ_API uint64_t sdq_rng_below(sdq_rng *rng, uint64_t n) {
    const int wide = n >= ((uint64_t)1 << 28);
    uint64_t word;
    if (rng->kind == (uint32_t)SDQ_RNG_PHILOX) {
        uint32_t x[4];
        sdq__rng_philox(rng, 0, x);
        rng->offset++;
        word = wide ? ((uint64_t)x[0] << 32) | x[1] : x[0];
    } else {
        word = wide ? sdq__rng_u64(rng) : sdq__rng_mt(rng);
    }
    return n > 1 ? word % n : 0;
}

/* Fisher and Yates, from the front: position i gets one of i..n-1. */
SDQ_API void sdq_rng_permutation(sdq_rng *rng, size_t *out, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) out[i] = i;
    for (i = 0; i + 1 < n; i++) {
        const size_t j = i + (size_t)sdq_rng_below(rng, n - i), keep = out[i];
        out[i] = out[j];
        out[j] = keep;
    }
}
/* ===========================================================================
 * >>tensor   shapes and storage
 *
 * A tensor is a small header and its data, both in the arena. Parameters are headers inside the
 * objects that own them, with data on the heap.
 * ======================================================================== */

SDQ_API size_t sdq_tensor_count(const sdq_tensor *t) {
    return t->dim[0] * t->dim[1] * t->dim[2] * t->dim[3];
}

/* Number of channel vectors: the product of all dims but the last. */
static size_t sdq__t_rows(const sdq_tensor *t) {
    return sdq_tensor_count(t) / t->dim[t->rank - 1];
}
static size_t sdq__t_chan(const sdq_tensor *t) { return t->dim[t->rank - 1]; }
/* Entries of the batch; a lone vector is one. */
static size_t sdq__t_entries(const sdq_tensor *t) { return t->rank > 1 ? t->dim[0] : 1; }

/* A header with checked dims and uninitialised data. */
static sdq_tensor *sdq__t_raw(sdq_ctx *ctx, sdq_dtype dtype, int rank, const size_t *dim) {
    sdq_tensor *t;
    size_t bytes = sdq__u_dtype_size(dtype);
    int i, fits = 1;
    if (ctx->status != SDQ_OK) return NULL;
    if (rank < 1 || rank > 4 || bytes == 0) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "tensor: rank %d or dtype %d is not valid", rank,
                  (int)dtype);
        return NULL;
    }
    for (i = 0; i < rank; i++) fits = fits && dim[i] > 0 && sdq__u_mul(bytes, dim[i], &bytes);
    if (!fits) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "tensor: a dimension is 0 or the size overflows");
        return NULL;
    }
    t = SDQ__PUSH_N(ctx, sdq_tensor, 1);
    if (!t) return NULL;
    memset(t, 0, sizeof *t);
    t->dtype = dtype;
    t->rank = rank;
    for (i = 0; i < 4; i++) t->dim[i] = i < rank ? dim[i] : 1;
    t->data = sdq__push(ctx, bytes);
    return t->data ? t : NULL;
}

static sdq_tensor *sdq__t_like(sdq_ctx *ctx, const sdq_tensor *x) {
    return sdq__t_raw(ctx, SDQ_F32, x->rank, x->dim);
}

/* Like x but with another number of channels. */
static sdq_tensor *sdq__t_chans(sdq_ctx *ctx, const sdq_tensor *x, size_t c) {
    size_t dim[4];
    memcpy(dim, x->dim, sizeof dim);
    dim[x->rank - 1] = c;
    return sdq__t_raw(ctx, SDQ_F32, x->rank, dim);
}

SDQ_API sdq_tensor *sdq_tensor_new(sdq_ctx *ctx, sdq_dtype dtype, int rank, const size_t *dim) {
    sdq_tensor *t = sdq__t_raw(ctx, dtype, rank, dim);
    if (t && !ctx->dry) memset(t->data, 0, sdq_tensor_count(t) * sdq__u_dtype_size(dtype));
    return t;
}
SDQ_API sdq_tensor *sdq_tensor_1d(sdq_ctx *ctx, size_t a) {
    return sdq_tensor_new(ctx, SDQ_F32, 1, &a);
}
SDQ_API sdq_tensor *sdq_tensor_2d(sdq_ctx *ctx, size_t a, size_t b) {
    size_t d[2]; d[0] = a; d[1] = b;
    return sdq_tensor_new(ctx, SDQ_F32, 2, d);
}
SDQ_API sdq_tensor *sdq_tensor_3d(sdq_ctx *ctx, size_t a, size_t b, size_t c) {
    size_t d[3]; d[0] = a; d[1] = b; d[2] = c;
    return sdq_tensor_new(ctx, SDQ_F32, 3, d);
}
SDQ_API sdq_tensor *sdq_tensor_4d(sdq_ctx *ctx, size_t n, size_t h, size_t w, size_t c) {
    size_t d[4]; d[0] = n; d[1] = h; d[2] = w; d[3] = c;
    return sdq_tensor_new(ctx, SDQ_F32, 4, d);
}

static int sdq__t_same(const sdq_tensor *a, const sdq_tensor *b) {
    return a->rank == b->rank && memcmp(a->dim, b->dim, sizeof a->dim) == 0;
}

/* Shape as text for error sentences; buf of at least 96 bytes. */
static const char *sdq__t_shape(const sdq_tensor *t, char *buf) {
    size_t at = 0;
    int i;
    buf[at++] = '[';
    for (i = 0; i < t->rank; i++)
        at += (size_t)snprintf(buf + at, 96 - at, "%s%zu", i ? "," : "", t->dim[i]);
    buf[at++] = ']';
    buf[at] = 0;
    return buf;
}

/* Copy rows of `bytes` bytes; ldd and lds lie between their beginnings. Threads take turns: a copy
 * waits for memory, and two wait for half as long. */
#define SDQ__COPY_BYTES ((size_t)1 << 16)   /* of a task */
typedef struct sdq__t_rowcopy {
    char *dst;
    const char *src;
    size_t ldd, lds, bytes, rows;
} sdq__t_rowcopy;
static size_t sdq__t_copy_rows(const sdq__t_rowcopy *w) {
    return sdq__u_div_up(SDQ__COPY_BYTES, w->bytes ? w->bytes : 1);
}
static void sdq__t_copy_task(void *arg, size_t task, int thread) {
    const sdq__t_rowcopy *w = (const sdq__t_rowcopy *)arg;
    const size_t per = sdq__t_copy_rows(w), end = sdq__u_min(w->rows, (task + 1) * per);
    const int dense = w->ldd == w->bytes && w->lds == w->bytes;
    const size_t step = dense ? per : 1;
    size_t r;
    (void)thread;
    for (r = task * per; r < end; r += step)
        memcpy(w->dst + r * w->ldd, w->src + r * w->lds, w->bytes * sdq__u_min(step, end - r));
}
static void sdq__t_copy(sdq_ctx *ctx, void *dst, size_t ldd, const void *src, size_t lds,
                        size_t bytes, size_t rows) {
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_COPY);
    sdq__t_rowcopy w;
    w.dst = (char *)dst; w.src = (const char *)src;
    w.ldd = ldd; w.lds = lds; w.bytes = bytes; w.rows = rows;
    sdq__par_for(ctx, sdq__u_div_up(rows, sdq__t_copy_rows(&w)), sdq__t_copy_task, &w);
    (void)sdq__par_work(ctx->profile, 0, was);
}

/* Release the arena to the mark but keep y: its data moves down to where the mark is, unless that
 * would win less than a quarter of its size. While the tape records everything stays where it is,
 * because backward needs it, and so does a tensor that is there as bytes only. */
static sdq_tensor *sdq__keep(sdq_ctx *ctx, sdq_mark mark, sdq_tensor *y) {
    sdq_tensor old, *head;
    size_t bytes;
    if (ctx->recording || (y && !y->data)) return y;
    if (!y) { sdq_arena_release(ctx, mark); return NULL; }
    old = *y;
    bytes = sdq_tensor_count(y) * sdq__u_dtype_size(y->dtype);
    sdq_arena_release(ctx, mark);
    head = SDQ__PUSH_N(ctx, sdq_tensor, 1);
    y = head;
    if (y) {
        char *data = (char *)sdq__push(ctx, bytes), *from = (char *)old.data;
        if (!data) return NULL;
        if (from > data && from <= data + bytes / 4) {      /* y ends within the same chunk */
            if (!sdq__push(ctx, (size_t)(from - data))) return NULL;
            data = from;
        } else if (from >= data + bytes || data >= from + bytes)
            sdq__t_copy(ctx, data, 1, from, 1, 1, bytes);
        else if (from != data && !ctx->dry) memmove(data, from, bytes);
        old.data = data;
        *y = old;
        y->q = NULL;
    }
    return y;
}

/* A heap tensor without data. */
static sdq_status sdq__t_set_shape(sdq_ctx *ctx, sdq_tensor *t, int rank, const size_t *dim) {
    size_t count = 1;
    int i;
    memset(t, 0, sizeof *t);
    t->rank = rank;
    for (i = 0; i < 4; i++) t->dim[i] = i < rank ? dim[i] : 1;
    for (i = 0; i < rank; i++)
        if (!sdq__u_mul(count, dim[i], &count))
            return sdq__fail(ctx, SDQ_ERR_SHAPE, "parameter too large");
    return SDQ_OK;
}
/* Its data, zeroed. */
static sdq_status sdq__t_alloc(sdq_ctx *ctx, sdq_tensor *t) {
    t->data = SDQ__NEW_N(ctx, float, sdq__u_round_up(sdq_tensor_count(t), SDQ__NR)); /* tiles */
    return t->data ? SDQ_OK : SDQ_ERR_OOM;
}
/* Both; used for parameters. */
static sdq_status sdq__t_init(sdq_ctx *ctx, sdq_tensor *t, int rank, const size_t *dim) {
    SDQ__TRY(sdq__t_set_shape(ctx, t, rank, dim));
    return sdq__t_alloc(ctx, t);
}
/* The gradient belongs to who made it: the arena or an optimizer. */
static void sdq__t_free(sdq_ctx *ctx, sdq_tensor *t) {
    sdq__free(ctx, t->data);
    memset(t, 0, sizeof *t);
}

/* ===========================================================================
 * >>gemm   one driver for every product: linear, convolution, their gradients
 *
 * A convolution is a GEMM whose rows are found through pointers (Dukhan, "The Indirect
 * Convolution Algorithm", arXiv 1907.02129): output pixel m and tap t read the channel vector of
 * one input pixel, or a row of zeros in the padding. A linear layer has one tap. The gradient
 * with respect to the input is the same with the geometry transposed.
 *
 * Weights are packed in panels of 32 output channels: [panel][tap][channel][32]. One panel and a
 * block of rows stay in the second level cache; k is cut so that a piece of a panel does, too.
 * Cutting k continues the same chain of fmaf, so block sizes never change a result.
 * ======================================================================== */

/* Where the rows of a convolution are. Output (y,x), tap (ky,kx) read input
 * (y*stride + ky - top, x*stride + kx - left); transposed: the other way round. */
typedef struct sdq__geom {
    size_t n, h, w, oh, ow;             /* source and destination picture sizes */
    size_t kh, kw, stride, top, left;
    int transposed;
} sdq__geom;

static sdq__geom sdq__gemm_rows_geom(size_t rows) {     /* a linear layer: rows are rows */
    sdq__geom g;
    memset(&g, 0, sizeof g);
    g.n = 1; g.h = g.oh = 1; g.w = g.ow = rows; g.kh = g.kw = g.stride = 1;
    return g;
}

/* A destination pixel; stepping through pixels in order needs no division. */
typedef struct sdq__pixel { size_t b, y, x; } sdq__pixel;

static sdq__pixel sdq__gemm_pixel(const sdq__geom *g, size_t m) {
    sdq__pixel p;
    p.x = m % g->ow;
    p.y = m / g->ow % g->oh;
    p.b = m / g->ow / g->oh;
    return p;
}
static void sdq__gemm_next(const sdq__geom *g, sdq__pixel *p) {
    if (++p->x < g->ow) return;
    p->x = 0;
    if (++p->y < g->oh) return;
    p->y = 0;
    p->b++;
}

/* Source row of a pixel and tap, or SIZE_MAX in the padding. */
static size_t sdq__gemm_src(const sdq__geom *g, const sdq__pixel *p, size_t ky, size_t kx) {
    size_t y, x;
    if (!g->transposed) {
        y = p->y * g->stride + ky - g->top;         /* wraps around above the first row */
        x = p->x * g->stride + kx - g->left;
    } else {
        y = p->y + g->top - ky;
        x = p->x + g->left - kx;
        if (g->stride > 1) {
            if (y % g->stride || x % g->stride) return SIZE_MAX;
            y = y > SIZE_MAX / 2 ? y : y / g->stride;
            x = x > SIZE_MAX / 2 ? x : x / g->stride;
        }
    }
    return y < g->h && x < g->w ? (p->b * g->h + y) * g->w + x : SIZE_MAX;
}

#define SDQ__MAX_TAPS 9         /* 3x3 is the largest kernel */

/* Source rows of mr outputs from m0 on, all taps: src[t][i]. Where the whole window lies inside
 * the picture, taps are at fixed distances. */
static void sdq__gemm_gather(const sdq__geom *g, size_t m0, size_t mr, size_t *src) {
    const size_t taps = g->kh * g->kw;
    size_t t, i, at[SDQ__MAX_TAPS];
    sdq__pixel p;
    if (taps == 1 && g->stride == 1) {
        for (i = 0; i < mr; i++) src[i] = m0 + i;
        return;
    }
    for (t = 0; t < taps; t++) {
        const size_t k = g->transposed ? taps - 1 - t : t;
        at[t] = k / g->kw * g->w + k % g->kw;
    }
    p = sdq__gemm_pixel(g, m0);
    for (i = 0; i < mr; i++, sdq__gemm_next(g, &p)) {
        const size_t y = g->transposed ? p.y + g->top + 1 - g->kh : p.y * g->stride - g->top;
        const size_t x = g->transposed ? p.x + g->left + 1 - g->kw : p.x * g->stride - g->left;
        if (y < g->h && g->kh <= g->h - y && x < g->w && g->kw <= g->w - x
            && (!g->transposed || g->stride == 1)) {
            const size_t row = (p.b * g->h + y) * g->w + x;
            for (t = 0; t < taps; t++) src[t * mr + i] = row + at[t];
        } else {
            for (t = 0; t < taps; t++)
                src[t * mr + i] = sdq__gemm_src(g, &p, t / g->kw, t % g->kw);
        }
    }
}

#define SDQ__GEMM_MB 96         /* rows of a block: 8 tiles, 240 kB at 640 channels */
#define SDQ__GEMM_KB 1536       /* k of a piece of a panel: 192 kB */
#define SDQ__GEMM_MB_MOST 264   /* the same where the weights are larger than the input: */
#define SDQ__GEMM_KB_LEAST 512  /*   540 kB of rows, 64 kB of a panel */

/* How a product is cut into tasks: blocks of rows times groups of panels. What is larger, input or
 * weights, is read once; the other one comes from a cache again and again. */
typedef struct sdq__plan {
    size_t m, rows, blocks;         /* rows of a block, the largest */
    size_t all, panels, groups;     /* panels of a group */
    int weights_first;              /* consecutive tasks share a group, else a block */
} sdq__plan;

/* most: rows of a block where weights are read once. Every thread gets several tasks; blocks have
 * as many tiles as their neighbours, or one more. */
static sdq__plan sdq__gemm_plan(const sdq_ctx *ctx, size_t m, size_t panels, size_t panel_bytes,
                                size_t input_bytes, size_t most) {
    const size_t threads = (size_t)ctx->threads, tasks = 8 * threads;
    const size_t tiles = sdq__u_div_up(m, SDQ__MR);
    sdq__plan p;
    memset(&p, 0, sizeof p);
    p.m = m;
    p.all = panels;
    p.weights_first = panels * panel_bytes > input_bytes;
    p.blocks = sdq__u_div_up(m, p.weights_first ? most : SDQ__GEMM_MB);
    if (p.blocks > 1) p.blocks = sdq__u_min(sdq__u_round_up(p.blocks, threads), tiles);
    p.rows = sdq__u_div_up(tiles, p.blocks) * SDQ__MR;
    if (p.weights_first) {
        p.panels = sdq__u_min(8, sdq__u_max(1, panels * p.blocks / (2 * tasks)));
    } else {
        const size_t want = sdq__u_div_up(tasks / 2, p.blocks);
        p.panels = sdq__u_div_up(panels, sdq__u_min(panels, want));
    }
    p.groups = sdq__u_div_up(panels, p.panels);
    return p;
}

/* Rows m0..m1 and panels p0..p1 of a task. */
typedef struct sdq__part { size_t m0, m1, p0, p1; } sdq__part;

static sdq__part sdq__gemm_part(const sdq__plan *p, size_t task) {
    const size_t block = p->weights_first ? task % p->blocks : task / p->groups;
    const size_t group = p->weights_first ? task / p->blocks : task % p->groups;
    const size_t tiles = sdq__u_div_up(p->m, SDQ__MR);
    sdq__part t;
    t.m0 = tiles * block / p->blocks * SDQ__MR;
    t.m1 = sdq__u_min(tiles * (block + 1) / p->blocks * SDQ__MR, p->m);
    t.p0 = group * p->panels;
    t.p1 = sdq__u_min(t.p0 + p->panels, p->all);
    return t;
}

/* The work of one product, shared by its tasks. With geglu, panels p and p + plan.all are the
 * two halves of the result, and y receives h gelu(g): half as wide, and the product itself, the
 * largest tensor of a transformer, never leaves the caches. */
typedef struct sdq__gemm {
    const struct sdq__kernels *k;
    sdq__geom g;
    const float *x, *zero;      /* rows of ldx floats; at least kc zeros */
    const float *b;             /* packed panels, */
    const uint16_t *bh;         /* or halves, which become floats a piece at a time, */
    const int8_t *bq;           /* or bytes [kc][taps][n], not packed: a layer's weights on the */
    const float *bs;            /*   way back, with a scale for each of the kc */
    const float *bias, *res;
    float *y, *piece;           /* piece: SDQ__GEMM_KB * 32 floats per thread, for bh, bq */
    size_t *rows;               /* source rows of a block, plan.rows * taps per thread */
    float *pair;                /* geglu: [plan.rows][64] per thread, else NULL */
    sdq_profile *profile;
    size_t m, n, kc, ldx, ldr, ldy;
    sdq__plan plan;
    int more;
} sdq__gemm;

static size_t sdq__gemm_panels(size_t n) { return sdq__u_div_up(n, SDQ__NR); }
static size_t sdq__gemm_packed_count(size_t n, size_t k) {
    return sdq__gemm_panels(n) * SDQ__NR * k;
}

/* Panels from b[n][k] (transposing): dst[panel][k][32], the last panel padded with zeros. */
static void sdq__gemm_pack_t(float *dst, const float *b, size_t ldb, size_t n, size_t k) {
    size_t p, i, j, k0;
    for (p = 0; p < n; p += SDQ__NR)
        for (k0 = 0; k0 < k; k0 += 64) {            /* 64 x 32 floats stay in the first cache */
            const size_t kn = sdq__u_min(64, k - k0);
            for (j = 0; j < SDQ__NR; j++) {
                if (p + j >= n) for (i = 0; i < kn; i++) dst[i * SDQ__NR + j] = 0.0f;
                else for (i = 0; i < kn; i++) dst[i * SDQ__NR + j] = b[(p + j) * ldb + k0 + i];
            }
            dst += kn * SDQ__NR;
        }
}

/* Panels from b[k][n]: dst[panel][k][32]. */
static void sdq__gemm_pack(float *dst, const float *b, size_t ldb, size_t n, size_t k) {
    size_t p, i, j;
    for (p = 0; p < n; p += SDQ__NR) {
        const size_t nr = sdq__u_min(SDQ__NR, n - p);
        for (i = 0; i < k; i++, dst += SDQ__NR) {
            const float *from = b + i * ldb + p;
            if (nr == 32) memcpy(dst, from, 32 * sizeof *dst);      /* fixed sizes are inlined */
            else if (nr == 16) memcpy(dst, from, 16 * sizeof *dst);
            else memcpy(dst, from, nr * sizeof *dst);
            if (nr <= 16) memset(dst + 16, 0, 16 * sizeof *dst);
            for (j = nr; j < (nr <= 16 ? 16 : 32); j++) dst[j] = 0.0f;
        }
    }
}

/* A piece of panel p from bytes. */
static void sdq__gemm_weights_s8(const sdq__gemm *w, float *to, size_t p, size_t t0, size_t taps,
                                 size_t c0, size_t cn) {
    const size_t all = w->g.kh * w->g.kw, n = sdq__u_min(SDQ__NR, w->n - p * SDQ__NR);
    size_t t, c;
    if (n < SDQ__NR) memset(to, 0, taps * cn * SDQ__NR * sizeof *to);
    for (t = t0; t < t0 + taps; t++)
        for (c = c0; c < c0 + cn; c++, to += SDQ__NR)
            w->k->dequantize_s8(to, w->bq + (c * all + t) * w->n + p * SDQ__NR, n, w->bs[c]);
}

/* Panel p of the weights: taps t0.., channels c0... */
static const float *sdq__gemm_weights(const sdq__gemm *w, int thread, size_t p, size_t t0,
                                      size_t taps, size_t c0, size_t cn) {
    const size_t from = ((p * w->g.kh * w->g.kw + t0) * w->kc + c0) * SDQ__NR;
    float *piece;
    if (w->b) return w->b + from;
    piece = w->piece + (size_t)thread * SDQ__GEMM_KB * SDQ__NR;
    if (w->bh) w->k->from_f16(piece, w->bh + from, taps * cn * SDQ__NR);
    else sdq__gemm_weights_s8(w, piece, p, t0, taps, c0, cn);
    return piece;
}

/* One piece (taps t0.., channels c0..) of a block of rows, for the panels of a group, to y. src:
 * source rows of the block's tiles, [tile][tap][row]. */
static void sdq__gemm_piece(const sdq__gemm *w, const sdq__part *at, int thread, const size_t *src,
                            float *y, size_t ldy, size_t t0, size_t taps, size_t c0, size_t cn) {
    const size_t all = w->g.kh * w->g.kw;
    const int first = t0 == 0 && c0 == 0, last = t0 + taps == all && c0 + cn == w->kc;
    size_t p, m, i;
    for (p = at->p0; p < at->p1; p++) {
        const float *b = sdq__gemm_weights(w, thread, p, t0, taps, c0, cn);
        for (m = at->m0; m < at->m1; m += SDQ__MR) {
            const float *a[SDQ__MAX_TAPS * SDQ__MR];
            const size_t *s = src + (m - at->m0) / SDQ__MR * all * SDQ__MR;
            sdq__ftile t;
            t.mr = sdq__u_min(SDQ__MR, at->m1 - m);
            t.nr = sdq__u_min(SDQ__NR, w->n - p * SDQ__NR);
            t.taps = taps;
            t.kc = cn;
            for (i = 0; i < taps * t.mr; i++) {
                const size_t row = s[t0 * t.mr + i];
                a[i] = row == SIZE_MAX ? w->zero : w->x + row * w->ldx + c0;
            }
            t.a = a;
            t.astep = 1;
            t.b = b;
            t.bias = last && w->bias ? w->bias + p * SDQ__NR : NULL;
            t.res = last && w->res ? w->res + m * w->ldr + p * SDQ__NR : NULL;
            t.ldr = w->ldr;
            t.y = y + (m - at->m0) * ldy + (p - at->p0) * SDQ__NR;
            t.ldy = ldy;
            t.more = w->more || !first;
            w->k->gemm_f32(&t);
        }
    }
}

/* All pieces. */
static void sdq__gemm_block(const sdq__gemm *w, const sdq__part *at, int thread, const size_t *src,
                            float *y, size_t ldy) {
    const size_t taps = w->g.kh * w->g.kw;
    const size_t kb = w->plan.weights_first && !w->pair ? SDQ__GEMM_KB_LEAST : SDQ__GEMM_KB;
    size_t t, c;
    if (w->kc <= kb) {
        const size_t step = sdq__u_max(1, kb / w->kc);
        for (t = 0; t < taps; t += step)
            sdq__gemm_piece(w, at, thread, src, y, ldy, t, sdq__u_min(step, taps - t), 0, w->kc);
        return;
    }
    for (t = 0; t < taps; t++)
        for (c = 0; c < w->kc; c += kb)
            sdq__gemm_piece(w, at, thread, src, y, ldy, t, 1, c, sdq__u_min(kb, w->kc - c));
}

/* h gelu(g) of rows of 64 products, h and g, to y. */
static void sdq__gemm_geglu(const struct sdq__kernels *k, sdq_profile *profile, int thread,
                            float *y, size_t ldy, const float *pair, size_t rows) {
    const sdq_work was = sdq__par_work(profile, thread, SDQ_WORK_GEGLU);
    size_t r;
    for (r = 0; r < rows; r++, pair += 2 * SDQ__NR)
        k->geglu(y + r * ldy, pair, pair + SDQ__NR, SDQ__NR);
    (void)sdq__par_work(profile, thread, was);
}

static void sdq__gemm_task(void *arg, size_t task, int thread) {
    const sdq__gemm *w = (const sdq__gemm *)arg;
    const size_t taps = w->g.kh * w->g.kw;
    const sdq__part at = sdq__gemm_part(&w->plan, task);
    size_t *src = w->rows + (size_t)thread * w->plan.rows * taps, m, p;
    for (m = at.m0; m < at.m1; m += SDQ__MR)
        sdq__gemm_gather(&w->g, m, sdq__u_min(SDQ__MR, at.m1 - m), src + (m - at.m0) * taps);
    if (!w->pair) {
        sdq__gemm_block(w, &at, thread, src, w->y + at.m0 * w->ldy + at.p0 * SDQ__NR, w->ldy);
        return;
    }
    for (p = at.p0; p < at.p1; p++) {
        float *pair = w->pair + (size_t)thread * w->plan.rows * 2 * SDQ__NR;
        size_t half;
        for (half = 0; half < 2; half++) {
            sdq__part one = at;
            one.p0 = p + half * w->plan.all;
            one.p1 = one.p0 + 1;
            sdq__gemm_block(w, &one, thread, src, pair + half * SDQ__NR, 2 * SDQ__NR);
        }
        sdq__gemm_geglu(w->k, w->profile, thread, w->y + at.m0 * w->ldy + p * SDQ__NR, w->ldy,
                        pair, at.m1 - at.m0);
    }
}

/* Memory of the pairs of geglu, per thread. */
static float *sdq__gemm_pairs(sdq_ctx *ctx, size_t rows) {
    return SDQ__PUSH_N(ctx, float, (size_t)ctx->threads * rows * 2 * SDQ__NR);
}

static void sdq__gemm_run(sdq_ctx *ctx, sdq__gemm *w, int geglu) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t taps = w->g.kh * w->g.kw, row = w->kc * sizeof(float);
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_FLOAT);
    w->k = ctx->k;
    w->profile = ctx->profile;
    w->plan = sdq__gemm_plan(ctx, w->m, sdq__gemm_panels(w->n) / (geglu ? 2 : 1),
                             taps * row * SDQ__NR, w->g.n * w->g.h * w->g.w * row,
                             SDQ__GEMM_MB_MOST);
    w->rows = SDQ__PUSH_N(ctx, size_t, (size_t)ctx->threads * w->plan.rows * taps);
    w->pair = geglu ? sdq__gemm_pairs(ctx, w->plan.rows) : NULL;
    if (!w->b)
        w->piece = SDQ__PUSH_N(ctx, float, (size_t)ctx->threads * SDQ__GEMM_KB * SDQ__NR);
    if (ctx->status == SDQ_OK)
        sdq__par_for(ctx, w->plan.blocks * w->plan.groups, sdq__gemm_task, w);
    sdq_arena_release(ctx, mark);
    (void)sdq__par_work(ctx->profile, 0, was);
}

/* A product of small matrices inside a task: y[m][n] (+)= a[m][k] b, a strided, b one set of
 * panels [n/32][bk][32] of which rows k0.. are used. */
static void sdq__gemm_small(const struct sdq__kernels *kern, const float *a, size_t lda,
                            size_t astep, const float *b, size_t bk, float *y, size_t ldy, size_t m,
                            size_t n, size_t k, int more) {
    const float *row[SDQ__MR];
    sdq__ftile t;
    size_t p, i, r;
    memset(&t, 0, sizeof t);
    t.a = row;
    t.astep = astep;
    t.taps = 1;
    t.kc = k;
    t.ldy = ldy;
    t.more = more;
    for (p = 0; p * SDQ__NR < n; p++) {
        t.nr = sdq__u_min(SDQ__NR, n - p * SDQ__NR);
        t.b = b + p * bk * SDQ__NR;
        for (i = 0; i < m; i += SDQ__MR) {
            t.mr = sdq__u_min(SDQ__MR, m - i);
            for (r = 0; r < t.mr; r++) row[r] = a + (i + r) * lda;
            t.y = y + i * ldy + p * SDQ__NR;
            kern->gemm_f32(&t);
        }
    }
}

/* ---- Winograd's convolution -------------------------------------------------------------------
 * F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv
 * 1509.09308): 4x4 results of a 3x3 convolution from 6x6 pixels d and weights g as
 *     A^T ((G g G^T) * (B^T d B)) A
 * which are 36 products instead of 144: of all tiles and channels, 36 products of matrices. Float
 * only, and for large pictures: the weights, four times as many then, are transformed again at
 * every call, a panel at a time. The error is about five times that of the direct sum. */

#define SDQ__WIN_TILES 48               /* tiles of a block: 4 GEMM tiles */
#define SDQ__WIN_BYTES ((size_t)16 << 20)       /* transformed pixels at a time: a third cache */

typedef struct sdq__win {
    const struct sdq__kernels *k;
    const float *x, *zero;              /* [n][h][w][c]; c zeros */
    const float *b, *bias, *res;        /* panels [panel][9][c][32], */
    const uint16_t *bh;                 /* or halves */
    float *y;                           /* [n][h][w][oc] */
    float *v, *scratch;                 /* v: [36][count][c] */
    size_t n, h, w, c, oc, th, tw;      /* th, tw: tiles down and across */
    size_t first, count, parts;         /* tiles of this pass; parts of a panel's work */
} sdq__win;

static size_t sdq__win_scratch(size_t c) { return 36 * SDQ__NR * (c + SDQ__WIN_TILES); }

/* Tile t: entry, first row, first column. */
static sdq__pixel sdq__win_tile(const sdq__win *w, size_t t) {
    sdq__pixel p;
    p.b = t / (w->th * w->tw);
    p.y = t / w->tw % w->th * 4;
    p.x = t % w->tw * 4;
    return p;
}

static void sdq__win_input_task(void *arg, size_t task, int thread) {
    const sdq__win *w = (const sdq__win *)arg;
    const sdq__pixel p = sdq__win_tile(w, w->first + task);
    const float *d[36];
    size_t i;
    (void)thread;
    for (i = 0; i < 36; i++) {          /* a row or column before the first wraps around */
        const size_t y = p.y + i / 6 - 1, x = p.x + i % 6 - 1;
        d[i] = y < w->h && x < w->w ? w->x + ((p.b * w->h + y) * w->w + x) * w->c : w->zero;
    }
    w->k->win_input(w->v + task * w->c, w->count * w->c, d, w->c);
}

/* Tiles of a block back to pixels: m[36][block][32]. */
static void sdq__win_output(const sdq__win *w, const float *m, size_t t0, size_t tiles, size_t p) {
    const size_t col = p * SDQ__NR, nr = sdq__u_min(SDQ__NR, w->oc - col);
    size_t t, i;
    for (t = 0; t < tiles; t++) {
        const sdq__pixel at = sdq__win_tile(w, w->first + t0 + t);
        float *y[16];
        const float *res[16];
        for (i = 0; i < 16; i++) {
            const size_t r = at.y + i / 4, x = at.x + i % 4;
            const size_t to = ((at.b * w->h + r) * w->w + x) * w->oc + col;
            const int in = r < w->h && x < w->w;
            y[i] = in ? w->y + to : NULL;
            res[i] = in && w->res ? w->res + to : NULL;
        }
        w->k->win_output(y, m + t * SDQ__NR, SDQ__WIN_TILES * SDQ__NR,
                         w->bias ? w->bias + col : NULL, w->res ? res : NULL, nr);
    }
}

/* The weights of a panel, transformed: u[36][c][32]. */
static void sdq__win_weights(const sdq__win *w, float *u, size_t p) {
    const size_t step = w->c * SDQ__NR, at = p * 9 * step;
    float g[9 * SDQ__NR];
    size_t i, j;
    for (i = 0; i < step; i += SDQ__NR) {
        for (j = 0; w->bh && j < 9; j++)
            w->k->from_f16(g + j * SDQ__NR, w->bh + at + j * step + i, SDQ__NR);
        w->k->win_weight(u + i, step, w->bh ? g : w->b + at + i, w->bh ? SDQ__NR : step, SDQ__NR);
    }
}

/* A part of the tiles, one panel of results. */
static void sdq__win_product_task(void *arg, size_t task, int thread) {
    const sdq__win *w = (const sdq__win *)arg;
    const size_t p = task / w->parts, part = task % w->parts;
    const size_t blocks = sdq__u_div_up(w->count, SDQ__WIN_TILES);
    const size_t last = (part + 1) * blocks / w->parts;
    float *u = w->scratch + (size_t)thread * sdq__win_scratch(w->c), *m = u + 36 * SDQ__NR * w->c;
    size_t b, i;
    sdq__win_weights(w, u, p);
    for (b = part * blocks / w->parts; b < last; b++) {
        const size_t t0 = b * SDQ__WIN_TILES, tiles = sdq__u_min(SDQ__WIN_TILES, w->count - t0);
        for (i = 0; i < 36; i++)
            sdq__gemm_small(w->k, w->v + (i * w->count + t0) * w->c, w->c, 1,
                            u + i * w->c * SDQ__NR, w->c, m + i * SDQ__WIN_TILES * SDQ__NR, SDQ__NR,
                            tiles, SDQ__NR, w->c, 0);
        sdq__win_output(w, m, t0, tiles, p);
    }
}

/* Worth it? A 3x3 convolution of stride 1 that keeps the size, of a large picture. */
static int sdq__win_fits(const sdq__geom *g, size_t c, size_t oc) {
    return g->kh == 3 && g->kw == 3 && g->stride == 1 && g->top == 1 && g->left == 1
        && g->oh == g->h && g->ow == g->w && g->h >= 32 && g->w >= 32 && c >= SDQ__NR
        && oc >= SDQ__NR;
}

static void sdq__win_run(sdq_ctx *ctx, const sdq__gemm *f) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_FLOAT);
    size_t tiles, most, tasks;
    sdq__win w;
    memset(&w, 0, sizeof w);
    w.k = ctx->k;
    w.x = f->x; w.zero = f->zero; w.b = f->b; w.bh = f->bh;
    w.bias = f->bias; w.res = f->res; w.y = f->y;
    w.n = f->g.n; w.h = f->g.h; w.w = f->g.w;
    w.c = f->kc;
    w.oc = f->n;
    w.th = sdq__u_div_up(w.h, 4);
    w.tw = sdq__u_div_up(w.w, 4);
    tiles = w.n * w.th * w.tw;
    most = sdq__u_max(SDQ__WIN_BYTES / (36 * w.c * sizeof(float)), 2 * SDQ__WIN_TILES);
    most = sdq__u_min(tiles, most / SDQ__WIN_TILES * SDQ__WIN_TILES);
    w.v = SDQ__PUSH_N(ctx, float, 36 * most * w.c);
    w.scratch = SDQ__PUSH_N(ctx, float, (size_t)ctx->threads * sdq__win_scratch(w.c));
    for (w.first = 0; ctx->status == SDQ_OK && w.first < tiles; w.first += w.count) {
        w.count = sdq__u_min(most, tiles - w.first);
        tasks = sdq__gemm_panels(w.oc);
        w.parts = sdq__u_min(sdq__u_div_up(4 * (size_t)ctx->threads, tasks),
                             sdq__u_div_up(w.count, 4 * SDQ__WIN_TILES));
        sdq__par_for(ctx, w.count, sdq__win_input_task, &w);
        sdq__par_for(ctx, tasks * w.parts, sdq__win_product_task, &w);
    }
    sdq_arena_release(ctx, mark);
    (void)sdq__par_work(ctx->profile, 0, was);
}

/* ---- weight gradient: dw[n][t][c] += sum over output pixels m of dy[m][n] x[src(m,t)][c] ----
 * One task is one tap and one panel of input channels. The rows of x that the tap reads are
 * packed, SDQ__DW_MB at a time; every output is one chain over m in order. If q is given the
 * rows are (q - z) s instead: the input of a fake-quantized layer, kept as bytes.
 * The sums stay in the caches until they are complete, and are then added to dw, so that the
 * gradients of several micro-batches are the plain sum of theirs. If sw is given they are those of
 * fake-quantized weights: what passes straight through (see >>layer) is added to dw, and the
 * scales' share to ds, by task. */

#define SDQ__DW_MB 512

typedef struct sdq__gemm_dw {
    const struct sdq__kernels *k;
    sdq__geom g;
    const float *x;             /* [rows][ldx], or NULL: use q */
    const uint8_t *q;           /* [rows][ldq] */
    const float *qs;            /* scale and zero point of row r, block j: */
    const int32_t *qz;          /*   [r / rows_per_scale * blocks + j] */
    const float *dy;
    float *dw, *scratch;        /* scratch: (SDQ__DW_MB + n) * 32 floats per thread */
    size_t m, n, c, ldx, ldq, ldy, ldw, blocks, rows_per_scale;
    size_t first;               /* channel of dw column 0 */
    const float *w, *sw;        /* NULL, or float weights, laid out as dw, and their scales [n]; */
    const uint8_t *mult;        /* 4 bits: scales times these [n][taps][groups], else NULL */
    size_t group;               /* channels of a group of mult */
    float *ds, *part;           /* NULL, or gradient of sw; its parts [task][n] */
} sdq__gemm_dw;

static void sdq__gemm_dw_pack(const sdq__gemm_dw *w, float *dst, size_t m0, size_t rows, size_t tap,
                              size_t c0, size_t cn) {
    const size_t ky = tap / w->g.kw, kx = tap % w->g.kw;
    const int flat = w->g.kh * w->g.kw == 1;
    sdq__pixel p = sdq__gemm_pixel(&w->g, m0);
    size_t i, j;
    for (i = 0; i < rows; i++, dst += SDQ__NR, sdq__gemm_next(&w->g, &p)) {
        const size_t s = flat ? m0 + i : sdq__gemm_src(&w->g, &p, ky, kx);
        if (s == SIZE_MAX) { memset(dst, 0, SDQ__NR * sizeof *dst); continue; }
        if (w->x && cn == SDQ__NR) {
            memcpy(dst, w->x + s * w->ldx + c0, sizeof *dst * SDQ__NR);
            continue;
        }
        if (w->x) {
            for (j = 0; j < cn; j++) dst[j] = w->x[s * w->ldx + c0 + j];
        } else {
            const size_t at =
                s / w->rows_per_scale * w->blocks + (w->blocks > 1 ? c0 / SDQ__NR : 0);
            w->k->dequantize_u8(dst, w->q + s * w->ldq + c0, cn, w->qs[at], w->qz[at]);
        }
        for (j = cn; j < SDQ__NR; j++) dst[j] = 0.0f;
    }
}

static size_t sdq__gemm_dw_tasks(const sdq__gemm_dw *w) {
    return w->g.kh * w->g.kw * sdq__gemm_panels(w->c);
}
static size_t sdq__gemm_dw_scratch(const sdq__gemm_dw *w) {     /* floats per thread */
    return (SDQ__DW_MB + w->n) * SDQ__NR;
}

/* The sums g[cn] of weights that begin at channel c of a tap and output o, through the quantizer;
 * returns their share of ds[o]. */
static float sdq__gemm_dw_ste(const sdq__gemm_dw *w, const float *g, size_t o, size_t tap, size_t c,
                              size_t cn) {
    const size_t taps = w->g.kh * w->g.kw, at = (o * taps + tap) * w->ldw + c;
    const size_t groups = w->mult ? sdq__u_div_up(w->ldw, w->group) : 1;
    float none[SDQ__NR] = {0}, sum = 0.0f;
    size_t j, n;
    if (!w->mult)
        return w->k->ste(w->dw ? w->dw + at : none, g, w->w + at, cn, 1.0f / w->sw[o], -128.0f,
                         127.0f);
    for (j = 0; j < cn; j += n) {
        const size_t i = (c + j) / w->group;
        const float m = (float)w->mult[(o * taps + tap) * groups + i];
        n = sdq__u_min(cn - j, (i + 1) * w->group - (c + j));
        sum += m * w->k->ste(w->dw ? w->dw + at + j : none, g + j, w->w + at + j, n,
                             1.0f / (w->sw[o] * m), -8.0f, 7.0f);
    }
    return sum;
}

static void sdq__gemm_dw_task(void *arg, size_t task, int thread) {
    const sdq__gemm_dw *w = (const sdq__gemm_dw *)arg;
    const size_t panels = sdq__gemm_panels(w->c), tap = task / panels, c0 = task % panels * SDQ__NR;
    const size_t cn = sdq__u_min(SDQ__NR, w->c - c0), row = w->g.kh * w->g.kw * w->ldw;
    float *b = w->scratch + (size_t)thread * sdq__gemm_dw_scratch(w);
    float *g = b + SDQ__DW_MB * SDQ__NR;
    size_t m, o;
    for (m = 0; m < w->m; m += SDQ__DW_MB) {
        const size_t rows = sdq__u_min(SDQ__DW_MB, w->m - m);
        sdq__gemm_dw_pack(w, b, m, rows, tap, c0, cn);
        sdq__gemm_small(w->k, w->dy + m * w->ldy, 1, w->ldy, b, rows, g, SDQ__NR, w->n, cn, rows,
                        m > 0);
    }
    for (o = 0; o < w->n; o++, g += SDQ__NR) {
        float *dw = w->dw ? w->dw + o * row + tap * w->ldw + w->first + c0 : NULL, ds;
        if (!w->sw) { w->k->add(dw, dw, g, cn); continue; }
        ds = sdq__gemm_dw_ste(w, g, o, tap, w->first + c0, cn);
        if (w->part) w->part[task * w->n + o] = ds;
    }
}

/* ds += the sum of its parts, in the order of the tasks, / sqrt(127 k). */
static void sdq__gemm_dw_scales(sdq_ctx *ctx, const sdq__gemm_dw *w) {
    const double root = sqrt(127.0 * (double)(w->g.kh * w->g.kw * w->ldw));
    const size_t tasks = sdq__gemm_dw_tasks(w);
    double *sum = SDQ__PUSH_N(ctx, double, w->n);
    size_t o, i;
    if (!sum) return;
    for (o = 0; o < w->n; o++) sum[o] = 0.0;
    for (i = 0; i < tasks; i++)
        for (o = 0; o < w->n; o++) sum[o] += (double)w->part[i * w->n + o];
    for (o = 0; o < w->n; o++) w->ds[o] += (float)(sum[o] / root);
}

static void sdq__gemm_dw_run(sdq_ctx *ctx, sdq__gemm_dw *w) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t tasks = sdq__gemm_dw_tasks(w);
    w->k = ctx->k;
    w->scratch = SDQ__PUSH_N(ctx, float, (size_t)ctx->threads * sdq__gemm_dw_scratch(w));
    w->part = w->ds ? SDQ__PUSH_N(ctx, float, tasks * w->n) : NULL;
    if (ctx->status == SDQ_OK) {
        sdq__par_for(ctx, tasks, sdq__gemm_dw_task, w);
        if (w->ds) sdq__gemm_dw_scales(ctx, w);
    }
    sdq_arena_release(ctx, mark);
}

/* out[j] += sum over rows of x[r][j], a chain per column; the bias gradient. */
typedef struct sdq__colsum {
    const struct sdq__kernels *k;
    const float *x;
    float *out;
    size_t rows, n;
} sdq__colsum;
static void sdq__gemm_colsum_task(void *arg, size_t task, int thread) {
    const sdq__colsum *w = (const sdq__colsum *)arg;
    const size_t j = task * 64, n = sdq__u_min(64, w->n - j);
    float sum[64] = {0};
    (void)thread;
    w->k->colsum(sum, w->x + j, w->rows, w->n, n);
    w->k->add(w->out + j, w->out + j, sum, n);
}
static void sdq__gemm_colsum(sdq_ctx *ctx, float *out, const float *x, size_t rows, size_t n) {
    sdq__colsum w;
    w.k = ctx->k; w.x = x; w.out = out; w.rows = rows; w.n = n;
    sdq__par_for(ctx, sdq__u_div_up(n, 64), sdq__gemm_colsum_task, &w);
}
/* ---- the int8 product -----------------------------------------------------------------------
 * Same loops, bytes instead of floats. A quantized input has rows of ldq bytes and scales either
 * per entry of the batch (one range for a picture, or a static one) or per row and block of
 * channels. With scales per entry one int32 sum runs over all taps, and the padding is filled
 * with the zero point; with scales per row each tap (and block) is a segment of its own.
 *
 * The result can be a quarter of the pixels of a picture twice as large (see >>layer, upsampling):
 * pixel (y,x) of the product is then pixel (2y+dy, 2x+dx) of that picture. */

typedef struct sdq__qinput {    /* a quantized tensor */
    uint8_t *q;                 /* [rows][ld] */
    float *s;                   /* [entries] or [rows*blocks] */
    int32_t *z;
    uint8_t *pad;               /* per entry: [entries][ld] filled with z; per row: [ld] zeros */
    size_t rows, entries, ld, blocks;
    int per_row;
    const sdq_layer *of;        /* NULL, or whose ranges these are */
} sdq__qinput;

typedef struct sdq__qweight {   /* packed for the kernels */
    int8_t *b;                  /* [panel][tap][quad][32][4] */
    int32_t *sum;               /* [panel][sums][32]: sums of the weights of a segment; of a tap if
                                 * all taps are one segment */
    size_t n, taps, quads, seg, segs, sums;
} sdq__qweight;

/* A 3x3 window at the border covers padding: 16 % of all products at 8x8, 2 % at 64x64. So tiles
 * of such a product take pixels in another order, zone by zone: the first row of every picture, the
 * last one, what is left of the first column and of the last, what is inside. Each zone begins a
 * new tile; taps that are padding for the whole zone are left out, of the sums of weights, too. */
typedef struct sdq__zone {
    size_t first;               /* row of the product where it begins, a multiple of 12 */
    size_t y, x, h, w;          /* its pixels, of every picture */
    unsigned char out[9];       /* taps that are left out */
} sdq__zone;

#define SDQ__ZONES 5
#define SDQ__LEFT_OUT (SIZE_MAX - 1)    /* a source row that no row of the tile needs */

typedef struct sdq__qgemm {
    const struct sdq__kernels *k;
    sdq__geom g;
    const sdq__qinput *x;
    const sdq__qweight *w;
    const float *sw, *bias, *res;
    float *y;
    void *scratch;
    void (*fill)(void *arg, size_t first, size_t rows);     /* NULL, or makes rows of x->q */
    void *fill_arg;
    int geglu;                  /* as in sdq__gemm */
    int spread;                 /* the result is a quarter, dy, dx in {0,1}, of a picture */
    size_t dy, dx;
    int sorted;                 /* pixels are in the order of zones */
    sdq__zone zone[SDQ__ZONES];
    const int32_t *sum;         /* NULL, or of all taps of a zone: [zone][panel][32] */
    sdq_profile *profile;
    size_t m, ldy;
    sdq__plan plan;
    int more;
} sdq__qgemm;

/* What a task finds out once for its block of rows and uses for every panel: for each tile of 12
 * rows the row pointers [taps][mr], scales and zero points [segs][mr], where rows of the result
 * begin; and the sums of weights [panel][segs][32]. */
typedef struct sdq__qrows {
    const uint8_t **a;
    size_t *line;
    float *s;
    int32_t *z;
    const int32_t *sum;
} sdq__qrows;

static size_t sdq__qgemm_scratch(const sdq__qgemm *w) {         /* bytes per thread */
    return w->plan.rows
         * sdq__u_round_up(w->w->taps * sizeof(uint8_t *) + sizeof(size_t) + w->w->segs * 8,
                           SDQ__ALIGN);
}

/* Zones, and m: their rows, each filled up to whole tiles. */
static void sdq__qgemm_sort(sdq__qgemm *w) {
    const size_t h = w->g.oh, v = w->g.ow;
    const size_t zones[SDQ__ZONES][4] = {       /* y, x, height, width */
        {0, 0, 1, v}, {h - 1, 0, 1, v}, {1, 0, h - 2, 1}, {1, v - 1, h - 2, 1},
        {1, 1, h - 2, v - 2}};
    size_t i, t;
    w->sorted = 1;
    w->m = 0;
    for (i = 0; i < SDQ__ZONES; i++) {
        sdq__zone *z = &w->zone[i];
        z->first = w->m;
        z->y = zones[i][0];
        z->x = zones[i][1];
        z->h = zones[i][2];
        z->w = zones[i][3];
        for (t = 0; t < 9; t++)
            z->out[t] = (i == 0 && t / 3 == 0) || (i == 1 && t / 3 == 2) || (i == 2 && t % 3 == 0)
                        || (i == 3 && t % 3 == 2);
        w->m += sdq__u_round_up(w->g.n * z->h * z->w, SDQ__MR);
    }
}
static int sdq__qgemm_sortable(const sdq__qgemm *w) {
    const sdq__geom *g = &w->g;
    return g->kh == 3 && g->kw == 3 && g->stride == 1 && !g->transposed
        && g->top == 1 && g->left == 1 && g->oh == g->h && g->ow == g->w && g->oh > 1 && g->ow > 1
        && !w->geglu && !w->spread;
}
static const sdq__zone *sdq__qgemm_zone(const sdq__qgemm *w, size_t m) {
    size_t i = SDQ__ZONES - 1;
    while (w->zone[i].first > m) i--;
    return &w->zone[i];
}
/* Sums over the taps of a zone, or over all. */
static void sdq__qgemm_sums(sdq_ctx *ctx, sdq__qgemm *w) {
    const size_t panels = sdq__gemm_panels(w->w->n), taps = w->w->taps;
    const size_t zones = w->sorted ? SDQ__ZONES : 1;
    int32_t *to = SDQ__PUSH_N(ctx, int32_t, zones * panels * SDQ__NR);
    size_t i, p, t, j;
    w->sum = to;
    for (i = 0; i < zones && to; i++)
        for (p = 0; p < panels; p++, to += SDQ__NR) {
            memset(to, 0, SDQ__NR * sizeof *to);
            for (t = 0; t < taps; t++) {
                const int32_t *from = w->w->sum + (p * taps + t) * SDQ__NR;
                if (w->sorted && w->zone[i].out[t]) continue;
                for (j = 0; j < SDQ__NR; j++) to[j] += from[j];
            }
        }
}

/* Of the tile that begins at m, `row` rows behind the block. */
static sdq__qrows sdq__qgemm_tile_rows(const sdq__qgemm *w, int thread, size_t m, size_t row) {
    const size_t zone = w->sorted ? (size_t)(sdq__qgemm_zone(w, m) - w->zone) : 0;
    char *at = (char *)w->scratch + (size_t)thread * sdq__qgemm_scratch(w);
    sdq__qrows r;
    r.a = (const uint8_t **)(void *)at + row * w->w->taps;
    at += w->plan.rows * w->w->taps * sizeof(uint8_t *);
    r.line = (size_t *)(void *)at + row;
    at += w->plan.rows * sizeof(size_t);
    r.s = (float *)(void *)at + row * w->w->segs;
    at += w->plan.rows * w->w->segs * sizeof(float);
    r.z = (int32_t *)(void *)at + row * w->w->segs;
    r.sum = w->sum ? w->sum + zone * sdq__gemm_panels(w->w->n) * SDQ__NR : w->w->sum;
    return r;
}
/* Rows of the tile that begins at m. */
static size_t sdq__qgemm_mr(const sdq__qgemm *w, size_t m) {
    const sdq__zone *z;
    if (!w->sorted) return sdq__u_min(SDQ__MR, w->m - m);
    z = sdq__qgemm_zone(w, m);
    return sdq__u_min(SDQ__MR, z->first + w->g.n * z->h * z->w - m);
}

/* As sdq__gemm_gather; and the rows of the result. */
static void sdq__qgemm_gather_sorted(const sdq__qgemm *w, size_t m, size_t mr, size_t *src,
                                     size_t *to) {
    const sdq__zone *z = sdq__qgemm_zone(w, m);
    const size_t row = w->g.ow, at = m - z->first;
    const int inside = z == w->zone + SDQ__ZONES - 1;
    size_t i, t;
    sdq__pixel p;
    p.x = z->x + at % z->w;
    p.y = z->y + at / z->w % z->h;
    p.b = at / z->w / z->h;
    for (i = 0; i < mr; i++) {
        to[i] = (p.b * w->g.oh + p.y) * row + p.x;
        for (t = 0; t < 9; t++) {
            size_t *from = src + t * mr + i;
            if (inside) *from = to[i] + t / 3 * row + t % 3 - row - 1;
            else *from = z->out[t] ? SDQ__LEFT_OUT : sdq__gemm_src(&w->g, &p, t / 3, t % 3);
        }
        if (++p.x < z->x + z->w) continue;
        p.x = z->x;
        if (++p.y < z->y + z->h) continue;
        p.y = z->y;
        p.b++;
    }
}
static void sdq__qgemm_gather(const sdq__qgemm *w, size_t m, size_t mr, size_t *src, size_t *to) {
    sdq__pixel at;
    size_t i;
    if (w->sorted) { sdq__qgemm_gather_sorted(w, m, mr, src, to); return; }
    sdq__gemm_gather(&w->g, m, mr, src);
    for (i = 0; i < mr; i++) to[i] = m + i;
    if (!w->spread) return;
    at = sdq__gemm_pixel(&w->g, m);
    for (i = 0; i < mr; i++, sdq__gemm_next(&w->g, &at))
        to[i] = ((at.b * w->g.oh + at.y) * 2 + w->dy) * 2 * w->g.ow + at.x * 2 + w->dx;
}

/* One range per entry: padding reads the entry's zero point, or is left out. */
static void sdq__qgemm_entry_rows(const sdq__qgemm *w, size_t m, size_t mr, const size_t *src,
                                  const sdq__qrows *r) {
    const sdq__qinput *x = w->x;
    const size_t per_entry = w->g.n * w->g.oh * w->g.ow / x->entries, taps = w->w->taps;
    size_t i, t;
    for (i = 0; i < mr; i++) {
        const size_t e = (w->sorted ? r->line[i] : m + i) / per_entry;
        r->s[i] = x->s[e];
        r->z[i] = x->z[e];
        for (t = 0; t < taps; t++) {
            const size_t row = src[t * mr + i];
            const uint8_t *pad = row == SIZE_MAX ? x->pad + e * x->ld : NULL;
            r->a[t * mr + i] = row < SDQ__LEFT_OUT ? x->q + row * x->ld : pad;
        }
    }
}
/* One range per row and block: padding reads zeros with scale 0, or is left out. */
static void sdq__qgemm_row_rows(const sdq__qgemm *w, size_t mr, const size_t *src,
                                const sdq__qrows *r) {
    const sdq__qinput *x = w->x;
    size_t i, t, j;
    if (w->w->segs == 1) {          /* a linear layer: rows are in order, and so are the scales */
        for (i = 0; i < mr; i++) r->a[i] = x->q + src[i] * x->ld;
        memcpy(r->s, x->s + src[0], mr * sizeof *r->s);
        memcpy(r->z, x->z + src[0], mr * sizeof *r->z);
        return;
    }
    for (t = 0; t < w->w->taps; t++)
        for (i = 0; i < mr; i++) {
            const size_t row = src[t * mr + i];
            const int pad = row >= SDQ__LEFT_OUT;
            r->a[t * mr + i] = !pad ? x->q + row * x->ld : row == SIZE_MAX ? x->pad : NULL;
            for (j = 0; j < x->blocks; j++) {
                r->s[(t * x->blocks + j) * mr + i] = pad ? 0.0f : x->s[row * x->blocks + j];
                r->z[(t * x->blocks + j) * mr + i] = pad ? 0 : x->z[row * x->blocks + j];
            }
        }
}

/* Panel p of a tile of rows, to y. */
static void sdq__qgemm_panel(const sdq__qgemm *w, sdq__qtile *t, const sdq__qrows *r, size_t p,
                             float *y) {
    const sdq__qweight *b = w->w;
    const size_t col = p * SDQ__NR;
    t->nr = sdq__u_min(SDQ__NR, b->n - col);
    t->b = b->b + col * b->taps * b->quads * 4;
    t->wsum = r->sum + col * b->segs;
    t->sw = w->sw + col;
    t->bias = w->bias ? w->bias + col : NULL;
    t->y = y;
    w->k->gemm_u8s8(t);
}

/* Panel p and its gate, of a tile of rows that begins at m. */
static void sdq__qgemm_geglu(const sdq__qgemm *w, sdq__qtile *t, const sdq__qrows *r, int thread,
                             size_t m, size_t p) {
    float pair[SDQ__MR * 2 * SDQ__NR];
    sdq__qgemm_panel(w, t, r, p, pair);
    sdq__qgemm_panel(w, t, r, p + w->plan.all, pair + SDQ__NR);
    sdq__gemm_geglu(w->k, w->profile, thread, w->y + m * w->ldy + p * SDQ__NR, w->ldy, pair,
                    t->mr);
}

/* A tile of rows meets a group of panels that stays in the second cache before the next one comes:
 * whole lines of the result are written one after another. */
#define SDQ__QGEMM_KEEP (512 * 1024)

static void sdq__qgemm_panels(const sdq__qgemm *w, int thread, const sdq__part *at, size_t p0,
                              size_t p1) {
    sdq__qtile t;
    size_t m, p, pairs[SDQ__MR];
    t.taps = w->w->taps;
    t.quads = w->w->quads;
    t.seg = w->w->seg;
    t.more = w->more;
    t.res = NULL;
    for (m = 0; m < SDQ__MR; m++) pairs[m] = m * 2 * SDQ__NR;
    for (m = at->m0; m < at->m1; m += SDQ__MR) {
        const sdq__qrows r = sdq__qgemm_tile_rows(w, thread, m, m - at->m0);
        t.mr = sdq__qgemm_mr(w, m);
        t.a = r.a;
        t.s = r.s;
        t.z = r.z;
        t.line = w->geglu ? pairs : r.line;
        for (p = p0; p < p1; p++) {
            if (w->geglu) { sdq__qgemm_geglu(w, &t, &r, thread, m, p); continue; }
            if (w->res) t.res = w->res + p * SDQ__NR;
            sdq__qgemm_panel(w, &t, &r, p, w->y + p * SDQ__NR);
        }
    }
}

static void sdq__qgemm_task(void *arg, size_t task, int thread) {
    const sdq__qgemm *w = (const sdq__qgemm *)arg;
    const sdq__part at = sdq__gemm_part(&w->plan, task);
    const size_t panel = w->w->taps * w->w->quads * 4 * SDQ__NR * (w->geglu ? 2 : 1);
    const size_t keep = sdq__u_max(1, SDQ__QGEMM_KEEP / panel);
    size_t p, m, i, src[SDQ__MAX_TAPS * SDQ__MR];
    if (w->fill) {
        const sdq_work was = sdq__par_work(w->profile, thread, SDQ_WORK_QUANTIZE);
        w->fill(w->fill_arg, at.m0, at.m1 - at.m0);
        (void)sdq__par_work(w->profile, thread, was);
    }
    for (m = at.m0; m < at.m1; m += SDQ__MR) {
        const size_t mr = sdq__qgemm_mr(w, m);
        const sdq__qrows r = sdq__qgemm_tile_rows(w, thread, m, m - at.m0);
        sdq__qgemm_gather(w, m, mr, src, r.line);
        if (w->x->per_row) sdq__qgemm_row_rows(w, mr, src, &r);
        else sdq__qgemm_entry_rows(w, m, mr, src, &r);
        for (i = 0; i < mr; i++) r.line[i] *= w->ldy;
    }
    for (p = at.p0; p < at.p1; p += keep)
        sdq__qgemm_panels(w, thread, &at, p, sdq__u_min(p + keep, at.p1));
}

#define SDQ__FILL_ROWS 16       /* rows of a task that quantizes only */

static void sdq__qgemm_fill_task(void *arg, size_t task, int thread) {
    const sdq__qgemm *w = (const sdq__qgemm *)arg;
    const size_t r = task * SDQ__FILL_ROWS;
    (void)thread;
    w->fill(w->fill_arg, r, sdq__u_min(SDQ__FILL_ROWS, w->x->rows - r));
}
static void sdq__qgemm_fill(sdq_ctx *ctx, sdq__qgemm *w) {
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_QUANTIZE);
    sdq__par_for(ctx, sdq__u_div_up(w->x->rows, SDQ__FILL_ROWS), sdq__qgemm_fill_task, w);
    (void)sdq__par_work(ctx->profile, 0, was);
}

/* Rows that only one task reads are quantized there, just before they are used. */
static void sdq__qgemm_run(sdq_ctx *ctx, sdq__qgemm *w, int geglu) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t row = w->w->quads * 4;
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_INT8);
    w->k = ctx->k;
    w->profile = ctx->profile;
    w->geglu = geglu;
    if (sdq__qgemm_sortable(w)) sdq__qgemm_sort(w);
    if (w->w->sums > w->w->segs) sdq__qgemm_sums(ctx, w);
    w->plan = sdq__gemm_plan(ctx, w->m, sdq__gemm_panels(w->w->n) / (geglu ? 2 : 1),
                             w->w->taps * row * SDQ__NR, w->x->rows * row,
                             w->w->segs > w->w->taps ? SDQ__GEMM_MB : SDQ__GEMM_MB_MOST);
    w->scratch = sdq__push(ctx, (size_t)ctx->threads * sdq__qgemm_scratch(w));
    if (w->fill && (w->w->taps > 1 || w->plan.groups > 1)) {
        sdq__qgemm_fill(ctx, w);
        w->fill = NULL;
    }
    if (ctx->status == SDQ_OK)
        sdq__par_for(ctx, w->plan.blocks * w->plan.groups, sdq__qgemm_task, w);
    sdq_arena_release(ctx, mark);
    (void)sdq__par_work(ctx->profile, 0, was);
}

/* Pack q[n][taps][ldq] channels c0..c0+c (int8, padded to quads*4 channels with zeros) into the
 * panels of w, whose sizes and pointers are set, and sum the segments. */
typedef struct sdq__qpack {
    sdq__qweight *w;
    const int8_t *q;
    size_t ldq, c0, c;
} sdq__qpack;

/* Quads k.. of column j of a panel, n of them within a segment, from its numbers of a tap; returns
 * their sum. */
static int32_t sdq__qgemm_pack_quads(int8_t *to, const int8_t *from, size_t c, size_t k, size_t n) {
    int32_t sum = 0;
    size_t i, l;
    for (i = k; i < k + n; i++) {
        int8_t quad[4] = {0, 0, 0, 0};
        if (4 * i + 4 <= c) memcpy(quad, from + 4 * i, 4);
        else for (l = 4 * i; l < c; l++) quad[l % 4] = from[l];
        memcpy(to + i * SDQ__NR * 4, quad, 4);
        sum += quad[0] + quad[1] + quad[2] + quad[3];
    }
    return sum;
}
/* Of blocks of 64 channels, which are a cache line, column after column. */
static void sdq__qgemm_pack_task(void *arg, size_t panel, int thread) {
    const sdq__qpack *a = (const sdq__qpack *)arg;
    const sdq__qweight *w = a->w;
    const size_t columns = sdq__u_min(SDQ__NR, w->n - panel * SDQ__NR);
    int8_t *to = w->b + panel * w->taps * w->quads * SDQ__NR * 4;
    int32_t *sum = w->sum + panel * w->sums * SDQ__NR;
    size_t tap, k, n, j;
    (void)thread;
    if (columns < SDQ__NR) memset(to, 0, w->taps * w->quads * SDQ__NR * 4);
    memset(sum, 0, w->sums * SDQ__NR * sizeof *sum);
    for (tap = 0; tap < w->taps; tap++, to += w->quads * SDQ__NR * 4)
        for (k = 0; k < w->quads; k += n) {
            const size_t seg = w->segs > 1 ? (tap * w->quads + k) / w->seg : tap;
            n = sdq__u_min(sdq__u_min(16, w->seg), w->quads - k);
            for (j = 0; j < columns; j++)
                sum[seg * SDQ__NR + j] += sdq__qgemm_pack_quads(
                    to + j * 4, a->q + ((panel * SDQ__NR + j) * w->taps + tap) * a->ldq + a->c0,
                    a->c, k, n);
        }
}
static void sdq__qgemm_pack(sdq_ctx *ctx, sdq__qweight *w, const int8_t *q, size_t ldq, size_t c0,
                            size_t c) {
    sdq__qpack a;
    a.w = w; a.q = q; a.ldq = ldq; a.c0 = c0; a.c = c;
    sdq__par_for(ctx, sdq__gemm_panels(w->n), sdq__qgemm_pack_task, &a);
}

/* ===========================================================================
 * >>attention   softmax(q k^T / sqrt(d)) v without a score matrix
 *
 * Tiles of 256 keys and 32 queries with a running maximum and sum per query (Dao et al.,
 * "FlashAttention", arXiv 2205.14135; Milakov and Gimelshein, arXiv 1805.02867). What belongs to
 * a query is a column of panels [..][32]: its channels, its scores, the sum of its values. So
 * softmax needs no sums across lanes, keys and values are read where they are (a row of the
 * product is a key, then a channel of the values), and heads of 40 channels leave no lane empty.
 * The tile of 256 keys is part of the definition: it fixes where the running maximum is taken.
 * Backward computes the scores again from the stored log-sum-exp.
 * ======================================================================== */

#define SDQ__ATT_K 256          /* keys of a tile */
#define SDQ__ATT_PANELS 4       /* panels of a task: all read a tile of keys and values */
#define SDQ__ATT_BQ 48          /* queries */
#define SDQ__ATT_BK 64          /* and keys of a tile of the backward pass */

typedef struct sdq__att {
    const struct sdq__kernels *k;
    const float *q, *key, *v;           /* [n][t][heads*d] */
    float *y, *lse;                     /* lse: [n][heads][tq] */
    float *scratch;
    size_t n, tq, tk, heads, d, scratch_size;
    float scale, scale2;                /* 1 / sqrt(d); the same / ln 2: softmax is to the base 2 */
    int causal;
    const struct sdq__qatt *ints;       /* NULL, or integer products */
    sdq_profile *profile;
    /* backward */
    const float *dy;
    float *dq, *dk, *dv, *delta;
    float *kp;                          /* packed keys: per (n, head) */
    size_t kp_size;
} sdq__att;

/* 32 queries of a task. */
typedef struct sdq__att_panel {
    float m[SDQ__NR], l[SDQ__NR];       /* largest score / ln 2; sum of weights relative to it */
    float alpha[SDQ__NR];               /* what the last tile made of sums before it */
    float *q, *y;                       /* [d][32]: queries, weighted sums of values */
    float qs[SDQ__NR], beta[SDQ__NR];   /* integers: scales of queries, of the tile's weights */
    int32_t qz[SDQ__NR];                /* zero points of queries */
    int thread;
} sdq__att_panel;

/* Of a thread: scores and weights of a tile, then q and y of the panels. */
static size_t sdq__att_scratch(const sdq__att *w) {
    return SDQ__NR * (2 * SDQ__ATT_K + SDQ__ATT_PANELS * 2 * sdq__u_round_up(w->d, 4));
}

static void sdq__att_begin(const sdq__att *w, sdq__att_panel *a, float *scratch, int thread) {
    size_t i;
    a->thread = thread;
    for (i = 0; i < SDQ__NR; i++) { a->m[i] = -INFINITY; a->l[i] = 0.0f; }
    a->q = scratch;
    a->y = scratch + SDQ__NR * sdq__u_round_up(w->d, 4);
}

/* Causality hides keys j.. of a tile from earlier queries i... */
static void sdq__att_hide(float *s, size_t i, size_t j, size_t nk) {
    size_t k, l;
    for (k = 0; k < nk; k++)
        for (l = 0; l < SDQ__NR; l++)
            if (j + k > i + l) s[k * SDQ__NR + l] = -INFINITY;
}

/* The sums of values, relative to a new maximum. */
static void sdq__att_rescale(const sdq__att *w, const sdq__att_panel *a) {
    size_t i;
    for (i = 0; i < SDQ__NR && a->alpha[i] == 1.0f; i++) {}
    if (i < SDQ__NR) w->k->mul_cols(a->y, a->alpha, w->d);
}

/* Queries i.. of a panel against nk keys from j on; key and v: of the head. */
static void sdq__att_tile(const sdq__att *w, sdq__att_panel *a, const float *key, const float *v,
                          size_t i, size_t j, size_t nk, float *s) {
    const size_t c = w->heads * w->d;
    sdq_work was;
    sdq__gemm_small(w->k, key + j * c, c, 1, a->q, w->d, s, SDQ__NR, nk, SDQ__NR, w->d, 0);
    if (w->causal) sdq__att_hide(s, i, j, nk);
    was = sdq__par_work(w->profile, a->thread, SDQ_WORK_SOFTMAX);
    w->k->softmax_cols(s, nk, w->scale2, a->m, a->l, a->alpha);
    (void)sdq__par_work(w->profile, a->thread, was);
    if (j > 0) sdq__att_rescale(w, a);
    sdq__gemm_small(w->k, v + j * c, 1, c, s, nk, a->y, SDQ__NR, w->d, SDQ__NR, nk, j > 0);
}

/* log of the sum of exp of the scores of query i; its weights add up to l. */
static float sdq__att_lse(const sdq__att_panel *a, size_t i, float l) {
    return (float)(0.69314718055994531 * (double)a->m[i] + log((double)l));
}
/* n queries of a panel: y[i][c] = the sums over their weights. */
static void sdq__att_end(const sdq__att *w, const sdq__att_panel *a, float *y, float *lse,
                         size_t n) {
    size_t i, j;
    for (i = 0; i < n; i++) {
        const float inv = 1.0f / a->l[i];
        for (j = 0; j < w->d; j++) y[i * w->heads * w->d + j] = a->y[j * SDQ__NR + i] * inv;
        if (lse) lse[i] = sdq__att_lse(a, i, a->l[i]);
    }
}

/* ---- the same with integer products -----------------------------------------------------------
 * As SageAttention does (Zhang et al., arXiv 2410.02367), in 8 or 16 bits. Softmax does not see
 * what is added to all keys, and the weights of the values add up to one: so keys and values are
 * centered per channel by the middle of their range, and the values' middle is added to the result.
 *               8 bits                      16 bits
 *   queries     u8, a range per token       +-sqrt((2^31 - 1) / d), a scale per token
 *   keys        +-127, a scale per token    the same: d products fit into an int32
 *   weights     0..255                      0..2048
 *   values      +-127, a scale per channel  +-4095: 256 products fit into an int32
 * The largest score of a tile of 256 keys gets the largest weight, so that one large score does
 * not round those of other tiles to zero; the sum of the weights is that of the rounded ones.
 * 16 bits are for speed: a processor does twice as many of these products as of float ones, and
 * they are off by 2e-4 to 2e-3, a tenth of what 8 bits are. */

typedef struct sdq__qatt {
    const sdq__att *f;          /* sizes, sources and destinations */
    int bits;
    size_t size;                /* bytes of a number; a group of the product has 4 bytes */
    float key_most, value_most, weight_most;
    char *kb, *vb;              /* [head][token][group][4], [head][tile][channel][256] */
    float *ks, *vs;             /* scales of keys [head][token], of values [head][channel] */
    float *kmid, *vmid;         /* [head][channel] */
    int32_t *ksum;              /* 8 bits: sums of keys; else NULL */
    struct sdq__qatt_block *block;
    size_t kgroups, tiles;
} sdq__qatt;

#define SDQ__QATT_D 640         /* largest head */

/* Scratch of a thread: packing a group of tokens, or the queries of a panel. */
typedef struct sdq__qatt_block {
    int16_t q[SDQ__NR * SDQ__QATT_D];                                   /* or bytes */
    float by[2][SDQ__QATT_D], plus[2][SDQ__QATT_D];     /* centering keys, values */
    float x[4 * SDQ__QATT_D];
    int16_t xq[4 * SDQ__QATT_D];                                        /* or bytes */
} sdq__qatt_block;

static float sdq__qatt_scale(float largest, float most) {
    return largest > 0.0f && largest <= FLT_MAX ? largest / most : 1.0f;
}
/* 16 bits: the largest number of which d squares fit into an int32. */
static float sdq__qatt_most(size_t d) {
    const float most = floorf(sqrtf(2147483647.0f / (float)d)) - 1.0f;  /* - 1: sqrtf rounds */
    return most < 32767.0f ? most : 32767.0f;
}
/* most: even for what is not finite, so that no sum overflows. */
static void sdq__qatt_round(const sdq__qatt *w, void *q, const float *x, float inv, float most) {
    if (w->bits == 8) w->f->k->quantize_s8((int8_t *)q, x, w->f->d, inv);
    else w->f->k->quantize_s16((int16_t *)q, x, w->f->d, inv, most);
}
/* The scale of a token's numbers x, rounded to q and filled up with zeros to whole groups. */
static float sdq__qatt_token(const sdq__qatt *w, char *q, const float *x) {
    const size_t bytes = w->f->d * w->size;
    float mn = 0.0f, mx = 0.0f, s;
    w->f->k->minmax(x, w->f->d, &mn, &mx);
    s = sdq__qatt_scale(mx > -mn ? mx : -mn, w->key_most);
    sdq__qatt_round(w, q, x, 1.0f / s, w->key_most);
    memset(q + bytes, 0, 4 * w->kgroups - bytes);
    return s;
}

/* Per channel a and b so that fma(x, a, b) is centered; with scales, between -most and most. */
static void sdq__qatt_center(const sdq__att *f, const float *x, float *a, float *b, float *scale,
                             float most, float *middle) {
    size_t j;
    for (j = 0; j < f->d; j++) { a[j] = INFINITY; b[j] = -INFINITY; }
    f->k->minmax_cols(x, f->tk, f->heads * f->d, f->d, a, b);
    for (j = 0; j < f->d; j++) {
        const float mid = 0.5f * a[j] + 0.5f * b[j], s = sdq__qatt_scale(b[j] - mid, most);
        a[j] = scale ? 1.0f / s : 1.0f;
        b[j] = -mid * a[j];
        if (scale) scale[j] = s;
        middle[j] = mid;
    }
}

/* Key j of a head, centered. */
static void sdq__qatt_key(const sdq__qatt *w, size_t head, size_t j, const float *x) {
    const size_t at = head * w->f->tk + j;
    char *q = w->kb + at * w->kgroups * 4;
    size_t i;
    w->ks[at] = sdq__qatt_token(w, q, x);
    if (!w->ksum) return;
    w->ksum[at] = 0;
    for (i = 0; i < w->f->d; i++) w->ksum[at] += ((const int8_t *)q)[i];
}

/* n values of a head from j on, centered and scaled: a group of every channel. */
static void sdq__qatt_value(const sdq__qatt *w, size_t head, size_t j, size_t n, const float *x,
                            char *q) {
    const size_t d = w->f->d, size = w->size, per = 4 / size, row = SDQ__ATT_K * size;
    char *to = w->vb + (head * w->tiles + j / SDQ__ATT_K) * d * row + j % SDQ__ATT_K * size;
    size_t c, l;
    for (l = 0; l < per; l++) {
        if (l < n) sdq__qatt_round(w, q + l * d * size, x + l * d, 1.0f, w->value_most);
        else memset(q + l * d * size, 0, d * size);
    }
    for (c = 0; c < d; c++, to += row)
        for (l = 0; l < per; l++) {
            const char *from = q + (l * d + c) * size;
            if (size == 1) to[l] = *from;
            else memcpy(to + 2 * l, from, 2);
        }
}

static void sdq__qatt_pack_task(void *arg, size_t head, int thread) {
    const sdq__qatt *w = (const sdq__qatt *)arg;
    const sdq__att *f = w->f;
    const size_t d = f->d, c = f->heads * d, per = 4 / w->size;
    const size_t at = head / f->heads * f->tk * c + head % f->heads * d;
    sdq__qatt_block *s = w->block + thread;
    size_t j, i;
    sdq__qatt_center(f, f->key + at, s->by[0], s->plus[0], NULL, w->key_most, w->kmid + head * d);
    sdq__qatt_center(f, f->v + at, s->by[1], s->plus[1], w->vs + head * d, w->value_most,
                     w->vmid + head * d);
    for (j = 0; j < f->tk; j += per) {
        const size_t n = sdq__u_min(per, f->tk - j);
        for (i = 0; i < n; i++) {
            f->k->affine(s->x, f->key + at + (j + i) * c, s->by[0], s->plus[0], d);
            sdq__qatt_key(w, head, j + i, s->x);
        }
        for (i = 0; i < n; i++)
            f->k->affine(s->x + i * d, f->v + at + (j + i) * c, s->by[1], s->plus[1], d);
        sdq__qatt_value(w, head, j, n, s->x, (char *)s->xq);
    }
}

/* y[m][32] (+)= (scale of row) (scale of column) a b: a has rows of lda bytes, scales s and, of
 * 8-bit keys, sums z. In t is what belongs to the columns. */
static void sdq__qatt_product(const sdq__qatt *w, sdq__qtile t, const char *a, size_t lda,
                              const float *s, const int32_t *z, size_t m) {
    const uint8_t *row[SDQ__MR];
    float *y = t.y;
    size_t i, r, line[SDQ__MR];
    for (r = 0; r < SDQ__MR; r++) line[r] = r * SDQ__NR;
    t.taps = 1;
    t.seg = t.quads;
    t.nr = SDQ__NR;
    t.line = line;
    t.a = row;
    for (i = 0; i < m; i += SDQ__MR) {
        t.mr = sdq__u_min(SDQ__MR, m - i);
        for (r = 0; r < t.mr; r++) row[r] = (const uint8_t *)a + (i + r) * lda;
        t.s = s + i;
        t.z = z ? z + i : NULL;
        t.y = y + i * SDQ__NR;
        if (w->bits == 8) w->f->k->gemm_s8u8(&t);
        else w->f->k->gemm_s16(&t);
    }
}

/* n queries of a panel in integers: groups of 4 bytes, [group][32][4]. */
static void sdq__qatt_queries(const sdq__qatt *w, sdq__att_panel *a, const float *q, size_t n) {
    const size_t c = w->f->heads * w->f->d, ld = 4 * w->kgroups;
    char *from = (char *)w->block[a->thread].q, *to = (char *)a->q;
    size_t i, g;
    memset(to, 0, ld * SDQ__NR);
    memset(a->qz, 0, sizeof a->qz);
    for (i = 0; i < SDQ__NR; i++) a->qs[i] = 0.0f;
    if (w->bits == 8) {
        memset(from, 0, n * ld);
        w->f->k->quantize_rows((uint8_t *)from, ld, q, c, n, w->f->d, a->qs, a->qz, 1);
    }
    for (i = 0; i < n; i++, from += ld) {
        if (w->bits == 16) a->qs[i] = sdq__qatt_token(w, from, q + i * c);
        for (g = 0; g < w->kgroups; g++) memcpy(to + (g * SDQ__NR + i) * 4, from + 4 * g, 4);
    }
}

/* The queries of a panel against nk keys from j on; s: scores, then weights. */
static void sdq__qatt_tile(const sdq__qatt *w, sdq__att_panel *a, size_t head, size_t j, size_t nk,
                           float *s) {
    const struct sdq__kernels *k = w->f->k;
    const size_t key = head * w->f->tk + j, d = w->f->d, row = SDQ__ATT_K * w->size;
    void *p = s + SDQ__ATT_K * SDQ__NR;
    sdq_work was;
    sdq__qtile t;
    memset(&t, 0, sizeof t);
    t.b = (const int8_t *)a->q;
    t.quads = w->kgroups;
    t.sw = a->qs;
    t.wsum = w->ksum ? a->qz : NULL;
    t.y = s;
    sdq__qatt_product(w, t, w->kb + key * w->kgroups * 4, w->kgroups * 4, w->ks + key,
                      w->ksum ? w->ksum + key : NULL, nk);
    was = sdq__par_work(w->f->profile, a->thread, SDQ_WORK_SOFTMAX);
    if (w->bits == 8)
        k->softmax_cols_u8((uint8_t *)p, s, nk, w->f->scale2, a->m, a->l, a->alpha, a->beta);
    else k->softmax_cols_s16((int16_t *)p, s, nk, w->f->scale2, a->m, a->l, a->alpha, a->beta);
    (void)sdq__par_work(w->f->profile, a->thread, was);
    if (j > 0) sdq__att_rescale(w->f, a);
    t.b = (const int8_t *)p;
    t.quads = sdq__u_div_up(nk * w->size, 4);
    t.sw = a->beta;
    t.wsum = NULL;
    t.y = a->y;
    t.more = j > 0;
    sdq__qatt_product(w, t, w->vb + (head * w->tiles + j / SDQ__ATT_K) * d * row, row,
                      w->vs + head * d, NULL, d);
}

/* What centering took away: the middle of the values; lse is of the scores before. */
static void sdq__qatt_end(const sdq__qatt *w, const sdq__att_panel *a, size_t head, const float *q,
                          float *y, float *lse, size_t n) {
    const size_t d = w->f->d, c = w->f->heads * d;
    const float *kmid = w->kmid + head * d, *vmid = w->vmid + head * d;
    size_t i;
    for (i = 0; i < n; i++) {
        w->f->k->add(y + i * c, y + i * c, vmid, d);
        if (lse)
            lse[i] = fmaf(w->f->scale, w->f->k->dot(q + i * c, kmid, d),
                          sdq__att_lse(a, i, a->l[i] / w->weight_most));
    }
}

/* ---- forward ---- */

static void sdq__att_task(void *arg, size_t task, int thread) {
    const sdq__att *w = (const sdq__att *)arg;
    const size_t rows = SDQ__ATT_PANELS * SDQ__NR, groups = sdq__u_div_up(w->tq, rows);
    const size_t c = w->heads * w->d, head = task / groups, i0 = task % groups * rows;
    const size_t n = sdq__u_min(rows, w->tq - i0), in_c = head % w->heads * w->d;
    const size_t at = (head / w->heads * w->tq + i0) * c + in_c;
    const size_t from = head / w->heads * w->tk * c + in_c;
    float *s = w->scratch + (size_t)thread * w->scratch_size, *more = s + 2 * SDQ__ATT_K * SDQ__NR;
    sdq__att_panel a[SDQ__ATT_PANELS];
    size_t i, j;
    for (i = 0; i < n; i += SDQ__NR, more += 2 * SDQ__NR * sdq__u_round_up(w->d, 4)) {
        const float *q = w->q + at + i * c;
        const size_t nq = sdq__u_min(SDQ__NR, n - i);
        sdq__att_begin(w, &a[i / SDQ__NR], more, thread);
        if (w->ints) sdq__qatt_queries(w->ints, &a[i / SDQ__NR], q, nq);
        else sdq__gemm_pack_t(a[i / SDQ__NR].q, q, c, nq, w->d);
    }
    for (j = 0; j < w->tk; j += SDQ__ATT_K)
        for (i = 0; i < n; i += SDQ__NR) {
            const size_t tk = w->causal ? sdq__u_min(w->tk, i0 + i + SDQ__NR) : w->tk;
            const size_t nk = j < tk ? sdq__u_min(SDQ__ATT_K, tk - j) : 0;
            if (nk > 0 && w->ints) sdq__qatt_tile(w->ints, &a[i / SDQ__NR], head, j, nk, s);
            else if (nk > 0)
                sdq__att_tile(w, &a[i / SDQ__NR], w->key + from, w->v + from, i0 + i, j, nk, s);
        }
    for (i = 0; i < n; i += SDQ__NR) {
        float *y = w->y + at + i * c, *lse = w->lse ? w->lse + head * w->tq + i0 + i : NULL;
        const size_t nq = sdq__u_min(SDQ__NR, n - i);
        sdq__att_end(w, &a[i / SDQ__NR], y, w->ints ? NULL : lse, nq);
        if (w->ints)
            sdq__qatt_end(w->ints, &a[i / SDQ__NR], head, w->q + at + i * c, y, lse, nq);
    }
}

static void sdq__att_forward(sdq_ctx *ctx, sdq__att *w) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_ATTENTION);
    w->profile = ctx->profile;
    w->k = ctx->k;
    w->scale = 1.0f / sqrtf((float)w->d);
    w->scale2 = w->scale * 1.44269504f;
    w->scratch_size = sdq__att_scratch(w);
    w->scratch = SDQ__PUSH_N(ctx, float, (size_t)ctx->threads * w->scratch_size);
    if (w->scratch)
        sdq__par_for(ctx, w->n * w->heads * sdq__u_div_up(w->tq, SDQ__ATT_PANELS * SDQ__NR),
                     sdq__att_task, w);
    sdq_arena_release(ctx, mark);
    (void)sdq__par_work(ctx->profile, 0, was);
}

static void sdq__qatt_forward(sdq_ctx *ctx, sdq__att *f, int bits) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t heads = f->n * f->heads;
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_ATTENTION);
    sdq__qatt w;
    memset(&w, 0, sizeof w);
    w.f = f;
    f->k = ctx->k;
    w.bits = bits;
    w.size = (size_t)bits / 8;
    w.key_most = bits == 8 ? 127.0f : sdq__qatt_most(f->d);
    w.value_most = bits == 8 ? 127.0f : 4095.0f;
    w.weight_most = bits == 8 ? 255.0f : 2048.0f;
    w.kgroups = sdq__u_div_up(f->d * w.size, 4);
    w.tiles = sdq__u_div_up(f->tk, SDQ__ATT_K);
    w.kb = SDQ__PUSH_N(ctx, char, heads * f->tk * w.kgroups * 4);
    w.vb = SDQ__PUSH_N(ctx, char, heads * w.tiles * f->d * SDQ__ATT_K * w.size);
    w.ks = SDQ__PUSH_N(ctx, float, heads * f->tk);
    w.vs = SDQ__PUSH_N(ctx, float, heads * f->d);
    w.kmid = SDQ__PUSH_N(ctx, float, heads * f->d);
    w.vmid = SDQ__PUSH_N(ctx, float, heads * f->d);
    if (bits == 8) w.ksum = SDQ__PUSH_N(ctx, int32_t, heads * f->tk);
    w.block = SDQ__PUSH_N(ctx, sdq__qatt_block, (size_t)ctx->threads);
    if (ctx->status == SDQ_OK) {
        sdq__par_for(ctx, heads, sdq__qatt_pack_task, &w);
        f->ints = &w;
        sdq__att_forward(ctx, f);
        f->ints = NULL;
    }
    sdq_arena_release(ctx, mark);
    (void)sdq__par_work(ctx->profile, 0, was);
}

/* ---- backward ---- */

static void sdq__att_pack_task(void *arg, size_t task, int thread) {
    const sdq__att *w = (const sdq__att *)arg;
    const size_t c = w->heads * w->d, at = task / w->heads * w->tk * c + task % w->heads * w->d;
    (void)thread;
    sdq__gemm_pack_t(w->kp + task * w->kp_size, w->key + at, c, w->tk, w->d);
}

/* Scores of queries i0.. against keys j0..: s[i*lds + 0..nk), -inf where causality hides a key. */
static void sdq__att_scores(const sdq__att *w, const float *q, const float *kp, size_t i0,
                            size_t nq, size_t j0, size_t nk, float *s, size_t lds) {
    const size_t c = w->heads * w->d;
    size_t i, j;
    sdq__gemm_small(w->k, q + i0 * c, c, 1, kp + j0 * w->d, w->d, s, lds, nq, nk, w->d, 0);
    if (!w->causal || j0 + nk <= i0 + 1) return;
    for (i = 0; i < nq; i++)
        for (j = 0; j < nk; j++)
            if (j0 + j > i0 + i) s[i * lds + j] = -INFINITY;
}

/* Backward of one head, with P = exp(S scale - lse), D_i = sum(dy_i y_i), dP = dy V^T:
 *   dV = P^T dy,  dS = P (dP - D) scale,  dQ = dS K,  dK = dS^T Q.
 * Scratch: Q, dy, K as row panels, V as column panels (K's are packed), two tiles. */
static void sdq__att_bwd_task(void *arg, size_t head, int thread) {
    const sdq__att *w = (const sdq__att *)arg;
    const size_t c = w->heads * w->d, d = w->d;
    const size_t aq = head / w->heads * w->tq * c + head % w->heads * d;
    const size_t ak = head / w->heads * w->tk * c + head % w->heads * d;
    const size_t qn = sdq__gemm_packed_count(d, w->tq);
    float *qp = w->scratch + (size_t)thread * w->scratch_size, *dyp = qp + qn, *kr = dyp + qn;
    float *vt = kr + sdq__gemm_packed_count(d, w->tk), *s = vt + w->kp_size;
    float *dp = s + SDQ__ATT_BQ * SDQ__ATT_BK;
    const float *lse = w->lse + head * w->tq;
    const float *kp = w->kp + head * w->kp_size;
    size_t i0, j0, i;
    sdq__gemm_pack(qp, w->q + aq, c, d, w->tq);
    sdq__gemm_pack(dyp, w->dy + aq, c, d, w->tq);
    sdq__gemm_pack(kr, w->key + ak, c, d, w->tk);
    sdq__gemm_pack_t(vt, w->v + ak, c, w->tk, d);
    for (j0 = 0; j0 < w->tk; j0 += SDQ__ATT_BK) {
        const size_t nk = sdq__u_min(SDQ__ATT_BK, w->tk - j0);
        for (i0 = 0; i0 < w->tq; i0 += SDQ__ATT_BQ) {
            const size_t nq = sdq__u_min(SDQ__ATT_BQ, w->tq - i0);
            if (w->causal && j0 > i0 + nq - 1) continue;
            sdq__att_scores(w, w->q + aq, kp, i0, nq, j0, nk, s, SDQ__ATT_BK);
            sdq__gemm_small(w->k, w->dy + aq + i0 * c, c, 1, vt + j0 * d, d, dp, SDQ__ATT_BK,
                            nq, nk, d, 0);
            for (i = 0; i < nq; i++)
                w->k->softmax_tile_bwd(s + i * SDQ__ATT_BK, dp + i * SDQ__ATT_BK, nk, w->scale,
                                       lse[i0 + i], w->delta[head * w->tq + i0 + i]);
            if (w->dv)
                sdq__gemm_small(w->k, s, 1, SDQ__ATT_BK, dyp + i0 * SDQ__NR, w->tq,
                                w->dv + ak + j0 * c, c, nk, d, nq, 1);
            if (w->dk)
                sdq__gemm_small(w->k, dp, 1, SDQ__ATT_BK, qp + i0 * SDQ__NR, w->tq,
                                w->dk + ak + j0 * c, c, nk, d, nq, 1);
            if (w->dq)
                sdq__gemm_small(w->k, dp, SDQ__ATT_BK, 1, kr + j0 * SDQ__NR, w->tk,
                                w->dq + aq + i0 * c, c, nq, d, nk, 1);
        }
    }
}

static void sdq__att_backward(sdq_ctx *ctx, sdq__att *w) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t c = w->heads * w->d;
    size_t e, h, i;
    w->scratch_size = 2 * sdq__gemm_packed_count(w->d, w->tq) + sdq__gemm_packed_count(w->d, w->tk)
                    + sdq__gemm_packed_count(w->tk, w->d) + 2 * SDQ__ATT_BQ * SDQ__ATT_BK;
    w->k = ctx->k;
    w->scale = 1.0f / sqrtf((float)w->d);
    w->kp_size = sdq__gemm_packed_count(w->tk, w->d);
    w->kp = SDQ__PUSH_N(ctx, float, w->n * w->heads * w->kp_size);
    w->scratch = SDQ__PUSH_N(ctx, float, (size_t)ctx->threads * w->scratch_size);
    w->delta = SDQ__PUSH_N(ctx, float, w->n * w->heads * w->tq);
    if (w->kp && w->scratch && w->delta) {
        for (e = 0; e < w->n; e++)
            for (h = 0; h < w->heads; h++)
                for (i = 0; i < w->tq; i++) {
                    const size_t at = (e * w->tq + i) * c + h * w->d;
                    w->delta[(e * w->heads + h) * w->tq + i] =
                        w->k->dot(w->dy + at, w->y + at, w->d);
                }
        sdq__par_for(ctx, w->n * w->heads, sdq__att_pack_task, w);
        sdq__par_for(ctx, w->n * w->heads, sdq__att_bwd_task, w);
    }
    sdq_arena_release(ctx, mark);
}
/* ===========================================================================
 * >>tape   what backward needs, newest first
 *
 * A node knows the result, the inputs and a function that adds the inputs' gradients. Nodes lie
 * in the arena beside the tensors. sdq_backward walks the list once; a result without a gradient
 * was not used by the loss and is skipped. The first run of a checkpoint records nothing, but its
 * own node lies on the tape already, without a result: ops note there that a gradient is needed.
 * ======================================================================== */

typedef struct sdq__node {
    struct sdq__node *prev;
    void (*back)(sdq_ctx *ctx, struct sdq__node *n);
    sdq_tensor *y, *x[4];
    void *p[4];             /* saved: op-specific pointers, sizes, numbers */
    size_t i[4];
    float f[2];
    sdq_block_fn fn;        /* of a checkpoint */
} sdq__node;

/* Note an op if it must be differentiated; NULL if not. The caller fills in what it saves. */
static sdq__node *sdq__tape_push(sdq_ctx *ctx, void (*back)(sdq_ctx *, sdq__node *), sdq_tensor *y,
                                 sdq_tensor *a, sdq_tensor *b, sdq_tensor *c, sdq_tensor *d) {
    sdq__node *n;
    if (!y) return NULL;
    if (!((a && a->needs_grad) || (b && b->needs_grad) || (c && c->needs_grad)
          || (d && d->needs_grad)))
        return NULL;
    if (!ctx->recording) {
        if (ctx->tape && !ctx->tape->y) ctx->tape->i[1] = 1;
        return NULL;
    }
    n = SDQ__PUSH_N(ctx, sdq__node, 1);
    if (!n) return NULL;
    memset(n, 0, sizeof *n);
    n->back = back;
    n->y = y;
    n->x[0] = a; n->x[1] = b; n->x[2] = c; n->x[3] = d;
    n->prev = ctx->tape;
    ctx->tape = n;
    y->needs_grad = 1;
    return n;
}

/* The gradient of t to add to, made of zeros at first use; NULL if t needs none. What an op gives a
 * leaf is summed up elsewhere and added once: the gradients of micro-batches that several processes
 * add up are then those of one process, to the bit. */
static float *sdq__tape_grad(sdq_ctx *ctx, sdq_tensor *t) {
    if (!t || !t->needs_grad) return NULL;
    if (!t->grad) {
        const size_t n = sdq_tensor_count(t);
        t->grad = SDQ__PUSH_N(ctx, float, n);
        if (t->grad) memset(t->grad, 0, n * sizeof(float));
    }
    return t->grad;
}

/* The same for a product that can write instead of adding: *more tells which. */
static float *sdq__tape_grad_raw(sdq_ctx *ctx, sdq_tensor *t, int *more) {
    if (!t || !t->needs_grad) return NULL;
    *more = t->grad != NULL;
    if (!t->grad) t->grad = SDQ__PUSH_N(ctx, float, sdq_tensor_count(t));
    return t->grad;
}

static void sdq__tape_walk(sdq_ctx *ctx, sdq__node *n) {
    const int recording = ctx->recording;
    ctx->recording = 0;
    for (; n && ctx->status == SDQ_OK; n = n->prev)
        if (n->y->grad) n->back(ctx, n);
    ctx->recording = recording;
}

SDQ_API void sdq_tape_begin(sdq_ctx *ctx) { ctx->recording = 1; ctx->tape = NULL; }
SDQ_API void sdq_tape_end(sdq_ctx *ctx) { ctx->recording = 0; ctx->tape = NULL; }

SDQ_API sdq_status sdq_backward(sdq_ctx *ctx, sdq_tensor *loss) {
    if (ctx->status != SDQ_OK) return ctx->status;
    if (!loss || sdq_tensor_count(loss) != 1)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "backward: the loss must be one number");
    if (!loss->needs_grad)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                         "backward: nothing that was recorded leads to the loss");
    loss->grad = SDQ__PUSH_N(ctx, float, 1);
    if (!loss->grad) return ctx->status;
    loss->grad[0] = 1.0f;
    sdq__tape_walk(ctx, ctx->tape);
    return ctx->status;
}

/* Whether every gradient that the tape of a checkpoint needs outlives it: made by the tape itself,
 * an input of the block (which has one), or a leaf with memory of its own. */
static int sdq__tape_closed(const sdq__node *tape) {
    const sdq__node *n, *m;
    int i;
    for (n = tape; n; n = n->prev)
        for (i = 0; i < 4; i++) {
            const sdq_tensor *t = n->x[i];
            if (!t || !t->needs_grad || t->grad) continue;
            for (m = n->prev; m && m->y != t; m = m->prev) {}
            if (!m) return 0;
        }
    return 1;
}

/* Backward of a checkpoint: run the block again, recorded, on stand-ins of the inputs that share
 * their data and gradients, then walk that piece of tape and drop it. Gradients of the inputs
 * are made before the mark, so that they survive it. */
static void sdq__tape_checkpoint_back(sdq_ctx *ctx, sdq__node *n) {
    sdq_tensor in[4], *ptr[4];
    sdq__node *tape = ctx->tape;
    sdq_tensor *y;
    sdq_mark mark;
    int i, count = (int)n->i[0];
    for (i = 0; i < count; i++) {
        ptr[i] = NULL;
        if (!n->x[i]) continue;
        (void)sdq__tape_grad(ctx, n->x[i]);
        in[i] = *n->x[i];
        ptr[i] = &in[i];
    }
    if (ctx->status != SDQ_OK) return;
    mark = sdq_arena_mark(ctx);
    ctx->recording = ctx->replay = 1;
    ctx->tape = NULL;
    y = n->fn(ctx, n->p[0], ptr, count);
    ctx->replay = 0;
    if (y && !sdq__tape_closed(ctx->tape)) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                  "checkpoint: a block trains a tensor that is not one of its inputs"
                  " and has no gradient memory; give the tensor to an optimizer first");
    } else if (y) {
        if (y->grad)
            ctx->k->add(y->grad, y->grad, n->y->grad, sdq_tensor_count(y)); /* y is an input */
        else y->grad = n->y->grad;
        sdq__tape_walk(ctx, ctx->tape);
    }
    ctx->recording = 0;
    sdq_arena_release(ctx, mark);
    ctx->tape = tape;
}

SDQ_API sdq_tensor *sdq_checkpoint(sdq_ctx *ctx, sdq_block_fn fn, void *user, sdq_tensor **in,
                                   int n) {
    sdq_mark mark;
    sdq_tensor *y;
    sdq__node *node;
    int i;
    if (n < 1 || n > 4) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "checkpoint: %d inputs, 1 to 4 are possible", n);
        return NULL;
    }
    if (!ctx->recording) return fn(ctx, user, in, n);
    node = SDQ__PUSH_N(ctx, sdq__node, 1);
    if (!node) return NULL;
    memset(node, 0, sizeof *node);
    node->back = sdq__tape_checkpoint_back;
    node->fn = fn;
    node->p[0] = user;
    node->i[0] = (size_t)n;
    for (i = 0; i < n; i++) node->x[i] = in[i];
    node->prev = ctx->tape;
    ctx->tape = node;
    ctx->recording = 0;
    mark = sdq_arena_mark(ctx);
    y = sdq__keep(ctx, mark, fn(ctx, user, in, n));
    ctx->recording = 1;
    if (y) y->needs_grad = y->needs_grad || node->i[1] != 0;     /* fn may return its input */
    if (y && y->needs_grad) node->y = y;
    else ctx->tape = node->prev;
    return y;
}

/* ===========================================================================
 * >>ops   each op: shapes, forward, backward
 *
 * Long rows are cut into pieces of SDQ__PIECE elements, one task each; a sum over a tensor is the
 * sum of its pieces in order, in double.
 * ======================================================================== */

#define SDQ__PIECE 16384

static int sdq__op_same(sdq_ctx *ctx, const char *op, const sdq_tensor *a, const sdq_tensor *b) {
    char sa[96], sb[96];
    if (!a || !b) return 0;
    if (sdq__t_same(a, b)) return 1;
    sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: %s and %s differ", op, sdq__t_shape(a, sa),
              sdq__t_shape(b, sb));
    return 0;
}

/* An element-wise loop: y = f(a, b) or y += ..., cut into pieces. */
typedef struct sdq__ew {
    const struct sdq__kernels *k;
    void (*unary)(float *, const float *, size_t);
    void (*binary)(float *, const float *, const float *, size_t);
    void (*scaled)(float *, const float *, size_t, float);
    float *y;
    const float *a, *b;
    float s;
    size_t n;
} sdq__ew;

static void sdq__op_ew_task(void *arg, size_t task, int thread) {
    const sdq__ew *w = (const sdq__ew *)arg;
    const size_t i = task * SDQ__PIECE, n = sdq__u_min(SDQ__PIECE, w->n - i);
    (void)thread;
    if (w->unary) w->unary(w->y + i, w->a + i, n);
    else if (w->binary) w->binary(w->y + i, w->a + i, w->b + i, n);
    else w->scaled(w->y + i, w->a + i, n, w->s);
}
static void sdq__op_ew(sdq_ctx *ctx, sdq__ew *w) {
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_ELEMENTS);
    sdq__par_for(ctx, sdq__u_div_up(w->n, SDQ__PIECE), sdq__op_ew_task, w);
    (void)sdq__par_work(ctx->profile, 0, was);
}
static void sdq__op_unary(sdq_ctx *ctx, void (*f)(float *, const float *, size_t), float *y,
                          const float *x, size_t n) {
    sdq__ew w;
    memset(&w, 0, sizeof w);
    w.unary = f; w.y = y; w.a = x; w.n = n;
    sdq__op_ew(ctx, &w);
}
static void sdq__op_binary(sdq_ctx *ctx, void (*f)(float *, const float *, const float *, size_t),
                           float *y, const float *a, const float *b, size_t n) {
    sdq__ew w;
    memset(&w, 0, sizeof w);
    w.binary = f; w.y = y; w.a = a; w.b = b; w.n = n;
    sdq__op_ew(ctx, &w);
}
static void sdq__op_scaled(sdq_ctx *ctx, void (*f)(float *, const float *, size_t, float), float *y,
                           const float *x, size_t n, float s) {
    sdq__ew w;
    memset(&w, 0, sizeof w);
    w.scaled = f; w.y = y; w.a = x; w.s = s; w.n = n;
    sdq__op_ew(ctx, &w);
}

/* ---- y = a + b;  da += dy, db += dy ---- */
static void sdq__op_add_back(sdq_ctx *ctx, sdq__node *n) {
    int i;
    for (i = 0; i < 2; i++) {
        float *d = sdq__tape_grad(ctx, n->x[i]);
        if (d) sdq__op_binary(ctx, ctx->k->add, d, d, n->y->grad, sdq_tensor_count(n->y));
    }
}
SDQ_API sdq_tensor *sdq_add(sdq_ctx *ctx, sdq_tensor *a, sdq_tensor *b) {
    sdq_tensor *y;
    if (!sdq__op_same(ctx, "add", a, b)) return NULL;
    y = sdq__t_like(ctx, a);
    if (!y) return NULL;
    sdq__op_binary(ctx, ctx->k->add, sdq_f32(y), sdq_f32(a), sdq_f32(b), sdq_tensor_count(y));
    (void)sdq__tape_push(ctx, sdq__op_add_back, y, a, b, NULL, NULL);
    return y;
}

/* ---- y = s x;  dx += s dy ---- */
static void sdq__op_scale_back(sdq_ctx *ctx, sdq__node *n) {
    float *d = sdq__tape_grad(ctx, n->x[0]);
    if (d) sdq__op_scaled(ctx, ctx->k->axpy, d, n->y->grad, sdq_tensor_count(n->y), n->f[0]);
}
SDQ_API sdq_tensor *sdq_scale(sdq_ctx *ctx, sdq_tensor *x, float s) {
    sdq_tensor *y = x ? sdq__t_like(ctx, x) : NULL;
    sdq__node *n;
    if (!y) return NULL;
    sdq__op_scaled(ctx, ctx->k->scale, sdq_f32(y), sdq_f32(x), sdq_tensor_count(x), s);
    n = sdq__tape_push(ctx, sdq__op_scale_back, y, x, NULL, NULL, NULL);
    if (n) n->f[0] = s;
    return y;
}

/* ---- y[e][p][c] = x[e][p][c] + v[e][c];  dx += dy, dv[e] += sum over p of dy ---- */
static void sdq__op_add_vector_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t e = n->y->dim[0], c = sdq__t_chan(n->y), rows = sdq__t_rows(n->y) / e;
    float *dx = sdq__tape_grad(ctx, n->x[0]), *dv = sdq__tape_grad(ctx, n->x[1]);
    size_t i;
    if (dx) sdq__op_binary(ctx, ctx->k->add, dx, dx, n->y->grad, sdq_tensor_count(n->y));
    for (i = 0; dv && i < e; i++)
        sdq__gemm_colsum(ctx, dv + i * c, n->y->grad + i * rows * c, rows, c);
}
SDQ_API sdq_tensor *sdq_add_vector(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *v) {
    sdq_tensor *y;
    sdq_work was;
    size_t e, r, rows, c;
    if (!x || !v) return NULL;
    c = sdq__t_chan(x);
    if (x->rank < 2 || v->rank != 2 || v->dim[0] != x->dim[0] || v->dim[1] != c) {
        char a[96], b[96];
        sdq__fail(ctx, SDQ_ERR_SHAPE, "add_vector: %s does not fit %s", sdq__t_shape(v, a),
                  sdq__t_shape(x, b));
        return NULL;
    }
    y = sdq__t_like(ctx, x);
    if (!y) return NULL;
    was = sdq__par_work(ctx->profile, 0, SDQ_WORK_ELEMENTS);
    rows = sdq__t_rows(x) / x->dim[0];
    for (e = 0; !ctx->dry && e < x->dim[0]; e++)
        for (r = 0; r < rows; r++)
            ctx->k->add(sdq_f32(y) + (e * rows + r) * c, sdq_f32(x) + (e * rows + r) * c,
                        sdq_f32(v) + e * c, c);
    (void)sdq__par_work(ctx->profile, 0, was);
    (void)sdq__tape_push(ctx, sdq__op_add_vector_back, y, x, v, NULL, NULL);
    return y;
}

/* ---- y[e][t] = x[e][t] + p[t];  dx += dy, dp[t] += sum over e of dy ---- */
static void sdq__op_add_rows_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t size = sdq_tensor_count(n->y) / n->y->dim[0];
    float *dx = sdq__tape_grad(ctx, n->x[0]), *dp = sdq__tape_grad(ctx, n->x[1]);
    if (dx) sdq__op_binary(ctx, ctx->k->add, dx, dx, n->y->grad, sdq_tensor_count(n->y));
    if (dp) sdq__gemm_colsum(ctx, dp, n->y->grad, n->y->dim[0], size);
}
SDQ_API sdq_tensor *sdq_add_rows(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *p) {
    sdq_tensor *y;
    size_t e, size;
    if (!x || !p) return NULL;
    if (x->rank != 3 || p->rank != 2 || p->dim[0] < x->dim[1] || p->dim[1] != x->dim[2]) {
        char a[96], b[96];
        sdq__fail(ctx, SDQ_ERR_SHAPE, "add_rows: table %s does not fit %s", sdq__t_shape(p, a),
                  sdq__t_shape(x, b));
        return NULL;
    }
    y = sdq__t_like(ctx, x);
    if (!y) return NULL;
    size = x->dim[1] * x->dim[2];
    for (e = 0; e < x->dim[0]; e++)
        sdq__op_binary(ctx, ctx->k->add, sdq_f32(y) + e * size, sdq_f32(x) + e * size, sdq_f32(p),
                       size);
    (void)sdq__tape_push(ctx, sdq__op_add_rows_back, y, x, p, NULL, NULL);
    return y;
}

/* ---- activations: y = f(x);  dx += dy f'(x) ---- */
static void sdq__op_silu_back(sdq_ctx *ctx, sdq__node *n) {
    float *d = sdq__tape_grad(ctx, n->x[0]);
    if (d)
        sdq__op_binary(ctx, ctx->k->silu_bwd, d, n->y->grad, sdq_f32(n->x[0]),
                       sdq_tensor_count(n->y));
}
static void sdq__op_gelu_back(sdq_ctx *ctx, sdq__node *n) {
    float *d = sdq__tape_grad(ctx, n->x[0]);
    if (d)
        sdq__op_binary(ctx, ctx->k->gelu_bwd, d, n->y->grad, sdq_f32(n->x[0]),
                       sdq_tensor_count(n->y));
}
static void sdq__op_quick_gelu_back(sdq_ctx *ctx, sdq__node *n) {
    float *d = sdq__tape_grad(ctx, n->x[0]);
    if (d)
        sdq__op_binary(ctx, ctx->k->quick_gelu_bwd, d, n->y->grad, sdq_f32(n->x[0]),
                       sdq_tensor_count(n->y));
}
static sdq_tensor *sdq__op_activation(sdq_ctx *ctx, sdq_tensor *x,
                                      void (*f)(float *, const float *, size_t),
                                      void (*back)(sdq_ctx *, sdq__node *)) {
    sdq_tensor *y = x ? sdq__t_like(ctx, x) : NULL;
    if (!y) return NULL;
    sdq__op_unary(ctx, f, sdq_f32(y), sdq_f32(x), sdq_tensor_count(x));
    (void)sdq__tape_push(ctx, back, y, x, NULL, NULL, NULL);
    return y;
}
SDQ_API sdq_tensor *sdq_silu(sdq_ctx *ctx, sdq_tensor *x) {
    return sdq__op_activation(ctx, x, ctx->k->silu, sdq__op_silu_back);
}
SDQ_API sdq_tensor *sdq_gelu(sdq_ctx *ctx, sdq_tensor *x) {
    return sdq__op_activation(ctx, x, ctx->k->gelu, sdq__op_gelu_back);
}
SDQ_API sdq_tensor *sdq_quick_gelu(sdq_ctx *ctx, sdq_tensor *x) {
    return sdq__op_activation(ctx, x, ctx->k->quick_gelu, sdq__op_quick_gelu_back);
}

/* ---- y = h gelu(g), x = [h | g];  dh += dy gelu(g), dg += dy h gelu'(g) ---- */
static void sdq__op_geglu_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t d = sdq__t_chan(n->y), rows = sdq__t_rows(n->y);
    float *dx = sdq__tape_grad(ctx, n->x[0]);
    const float *x = sdq_f32(n->x[0]);
    size_t r;
    for (r = 0; dx && r < rows; r++)
        ctx->k->geglu_bwd(dx + r * 2 * d, dx + r * 2 * d + d, n->y->grad + r * d, x + r * 2 * d,
                          x + r * 2 * d + d, d);
}
typedef struct sdq__geglu {
    const struct sdq__kernels *k;
    float *y;
    const float *x;
    size_t d, rows;
} sdq__geglu;
static void sdq__op_geglu_task(void *arg, size_t task, int thread) {
    const sdq__geglu *w = (const sdq__geglu *)arg;
    size_t r = task * 16;
    const size_t end = sdq__u_min(r + 16, w->rows);
    (void)thread;
    for (; r < end; r++)
        w->k->geglu(w->y + r * w->d, w->x + r * 2 * w->d, w->x + r * 2 * w->d + w->d, w->d);
}
SDQ_API sdq_tensor *sdq_geglu(sdq_ctx *ctx, sdq_tensor *x) {
    sdq_tensor *y;
    sdq_work was;
    sdq__geglu w;
    if (!x) return NULL;
    if (sdq__t_chan(x) % 2) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "geglu: %zu channels are not even", sdq__t_chan(x));
        return NULL;
    }
    y = sdq__t_chans(ctx, x, sdq__t_chan(x) / 2);
    if (!y) return NULL;
    w.k = ctx->k; w.y = sdq_f32(y); w.x = sdq_f32(x); w.d = sdq__t_chan(y); w.rows = sdq__t_rows(y);
    was = sdq__par_work(ctx->profile, 0, SDQ_WORK_GEGLU);
    sdq__par_for(ctx, sdq__u_div_up(w.rows, 16), sdq__op_geglu_task, &w);
    (void)sdq__par_work(ctx->profile, 0, was);
    (void)sdq__tape_push(ctx, sdq__op_geglu_back, y, x, NULL, NULL, NULL);
    return y;
}

/* ---- softmax over the last dim;  dx += y (dy - sum(dy y)) ---- */
static void sdq__op_softmax_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t c = sdq__t_chan(n->y), rows = sdq__t_rows(n->y);
    float *dx = sdq__tape_grad(ctx, n->x[0]);
    size_t r, j;
    for (r = 0; dx && r < rows; r++) {
        const float *y = sdq_f32(n->y) + r * c, *dy = n->y->grad + r * c;
        const float d = ctx->k->dot(dy, y, c);
        for (j = 0; j < c; j++) dx[r * c + j] += y[j] * (dy[j] - d);
    }
}
SDQ_API sdq_tensor *sdq_softmax(sdq_ctx *ctx, sdq_tensor *x) {
    sdq_tensor *y = x ? sdq__t_like(ctx, x) : NULL;
    size_t r, c, rows;
    if (!y) return NULL;
    c = sdq__t_chan(x);
    rows = sdq__t_rows(x);
    memcpy(y->data, x->data, rows * c * sizeof(float));
    for (r = 0; r < rows; r++) {
        float *row = sdq_f32(y) + r * c;
        ctx->k->scale(row, row, c, 1.0f / ctx->k->softmax(row, c));
    }
    (void)sdq__tape_push(ctx, sdq__op_softmax_back, y, x, NULL, NULL, NULL);
    return y;
}

/* ---- group norm (Wu and He, arXiv 1803.08494) -------------------------------------------------
 * With the statistics of an entry and group, y = a[c] x + b[c]:
 *   a = gamma rstd,  b = beta - mean a,  rstd = 1 / sqrt(var + eps), var over N = pixels * c/groups
 * Sums run over chunks of SDQ__GN_ROWS pixels in float, over chunks and channels in double.
 * Backward, with dz the gradient before the affine (through SiLU first), h = (x - mean) rstd:
 *   dgamma = sum dz h,  dbeta = sum dz
 *   dx = a dz + p x + q,  p = -rstd^2 S2 / N,  q = -rstd S1 / N - mean p,
 *   S1 = sum gamma dz,  S2 = sum gamma dz h over the group                                      */

#define SDQ__GN_ROWS 64

typedef struct sdq__gn {
    const struct sdq__kernels *k;
    const float *x, *dy, *mean, *a, *b;     /* mean, a, b: [entries][c] */
    float *y, *part, *part2;                /* partial sums: [entries][chunks][c] */
    const float *p, *q;
    size_t entries, rows, c, chunks;
    int stage, silu;
} sdq__gn;

enum { SDQ__GN_SUM, SDQ__GN_DEV, SDQ__GN_APPLY, SDQ__GN_DZ, SDQ__GN_SUM2, SDQ__GN_DX };

static void sdq__op_gn_task(void *arg, size_t task, int thread) {
    const sdq__gn *w = (const sdq__gn *)arg;
    const size_t e = task / w->chunks, r0 = task % w->chunks * SDQ__GN_ROWS, c = w->c;
    const size_t rows = sdq__u_min(SDQ__GN_ROWS, w->rows - r0), at = (e * w->rows + r0) * c;
    const float *x = w->x + at;             /* a, b and part are not there at every stage */
    const float *a = w->a ? w->a + e * c : NULL, *b = w->b ? w->b + e * c : NULL;
    float *part = w->part ? w->part + task * c : NULL;
    size_t r;
    (void)thread;
    switch (w->stage) {
    case SDQ__GN_SUM:
        memset(part, 0, c * sizeof(float));
        w->k->colsum(part, x, rows, c, c);
        break;
    case SDQ__GN_DEV:
        memset(part, 0, c * sizeof(float));
        w->k->colsqdev(part, x, w->mean + e * c, rows, c, c);
        break;
    case SDQ__GN_APPLY:
        for (r = 0; r < rows; r++) {
            if (w->silu) w->k->affine_silu(w->y + at + r * c, x + r * c, a, b, c);
            else w->k->affine(w->y + at + r * c, x + r * c, a, b, c);
        }
        break;
    case SDQ__GN_DZ:
        for (r = 0; r < rows; r++)
            w->k->affine_silu_bwd(w->y + at + r * c, w->dy + at + r * c, x + r * c, a, b, c);
        break;
    case SDQ__GN_SUM2:
        memset(part, 0, c * sizeof(float));
        memset(w->part2 + task * c, 0, c * sizeof(float));
        w->k->colsum2(part, w->part2 + task * c, w->dy + at, x, rows, c, c);
        break;
    default:
        for (r = 0; r < rows; r++)
            w->k->norm_bwd(w->y + at + r * c, w->dy + at + r * c, x + r * c, a, w->p + e * c,
                           w->q + e * c, c);
    }
}
static void sdq__op_gn_run(sdq_ctx *ctx, sdq__gn *w, int stage) {
    w->stage = stage;
    sdq__par_for(ctx, w->entries * w->chunks, sdq__op_gn_task, w);
}

/* Sum of the partial sums of channels c0..c0+n of entry e. */
static double sdq__op_gn_total(const sdq__gn *w, const float *part, size_t e, size_t c0, size_t n) {
    double sum = 0.0;
    size_t i, j;
    for (i = 0; i < w->chunks; i++)
        for (j = 0; j < n; j++) sum += (double)part[(e * w->chunks + i) * w->c + c0 + j];
    return sum;
}

static void sdq__op_gn_back(sdq_ctx *ctx, sdq__node *n) {
    sdq_tensor *x = n->x[0], *gamma = n->x[1], *beta = n->x[2];
    const float *mean = (const float *)n->p[0], *rstd = (const float *)n->p[1];
    const size_t groups = n->i[0], c = sdq__t_chan(x), cg = c / groups;
    float *dx = sdq__tape_grad(ctx, x), *dg = sdq__tape_grad(ctx, gamma),
          *db = sdq__tape_grad(ctx, beta);
    const sdq_mark mark = sdq_arena_mark(ctx);
    float *p, *q;
    double *sum;                        /* of dgamma and dbeta over the entries */
    sdq__gn w;
    size_t e, g, j;
    memset(&w, 0, sizeof w);
    w.k = ctx->k; w.x = sdq_f32(x); w.dy = n->y->grad; w.c = c; w.entries = sdq__t_entries(x);
    w.rows = sdq__t_rows(x) / w.entries;
    w.chunks = sdq__u_div_up(w.rows, SDQ__GN_ROWS);
    w.a = (const float *)n->p[2]; w.b = (const float *)n->p[3];
    w.part = SDQ__PUSH_N(ctx, float, w.entries * w.chunks * c);
    w.part2 = SDQ__PUSH_N(ctx, float, w.entries * w.chunks * c);
    p = SDQ__PUSH_N(ctx, float, w.entries * c);
    q = SDQ__PUSH_N(ctx, float, w.entries * c);
    sum = SDQ__PUSH_N(ctx, double, 2 * c);
    if (n->i[1]) w.y = SDQ__PUSH_N(ctx, float, sdq_tensor_count(x));
    if (ctx->status != SDQ_OK) return;
    if (n->i[1]) {
        sdq__op_gn_run(ctx, &w, SDQ__GN_DZ);
        w.dy = w.y;
    }
    sdq__op_gn_run(ctx, &w, SDQ__GN_SUM2);
    for (j = 0; j < 2 * c; j++) sum[j] = 0.0;
    for (e = 0; e < w.entries; e++) {
        for (g = 0; g < groups; g++) {
            const double m = (double)mean[e * groups + g], r = (double)rstd[e * groups + g];
            double s1 = 0.0, s2 = 0.0, pv;
            const double count = (double)(w.rows * cg);
            for (j = g * cg; j < (g + 1) * cg; j++) {
                const double a1 = sdq__op_gn_total(&w, w.part, e, j, 1);
                const double a2 = (sdq__op_gn_total(&w, w.part2, e, j, 1) - m * a1) * r;
                s1 += (double)sdq_f32(gamma)[j] * a1;
                s2 += (double)sdq_f32(gamma)[j] * a2;
                sum[j] += a2;
                sum[c + j] += a1;
            }
            pv = -r * r * s2 / count;
            for (j = g * cg; j < (g + 1) * cg; j++) {
                p[e * c + j] = (float)pv;
                q[e * c + j] = (float)(-r * s1 / count - m * pv);
            }
        }
    }
    for (j = 0; j < c; j++) {
        if (dg) dg[j] += (float)sum[j];
        if (db) db[j] += (float)sum[c + j];
    }
    if (dx) {
        w.p = p; w.q = q; w.y = dx;
        sdq__op_gn_run(ctx, &w, SDQ__GN_DX);
    }
    sdq_arena_release(ctx, mark);
}

/* The statistics of x in w, from partial sums in w->part: mean and rstd [entries][groups], and per
 * channel a, b and mc, the mean again. */
static void sdq__op_gn_stats(sdq_ctx *ctx, sdq__gn *w, size_t groups, float eps,
                             const float *gamma, const float *beta, float *mean, float *rstd,
                             float *a, float *b, float *mc) {
    const size_t cg = w->c / groups;
    const double count = (double)(w->rows * cg);
    sdq_work was;
    size_t e, g, j;
    if (ctx->dry) return;
    was = sdq__par_work(ctx->profile, 0, SDQ_WORK_NORM);
    w->mean = mc;
    sdq__op_gn_run(ctx, w, SDQ__GN_SUM);
    for (e = 0; e < w->entries; e++)
        for (g = 0; g < groups; g++) {
            const float m = (float)(sdq__op_gn_total(w, w->part, e, g * cg, cg) / count);
            mean[e * groups + g] = m;
            for (j = g * cg; j < (g + 1) * cg; j++) mc[e * w->c + j] = m;
        }
    sdq__op_gn_run(ctx, w, SDQ__GN_DEV);
    for (e = 0; e < w->entries; e++)
        for (g = 0; g < groups; g++) {
            const double var = sdq__op_gn_total(w, w->part, e, g * cg, cg) / count;
            const float r = (float)(1.0 / sqrt(var + (double)eps));
            rstd[e * groups + g] = r;
            for (j = g * cg; j < (g + 1) * cg; j++) {
                a[e * w->c + j] = gamma[j] * r;
                b[e * w->c + j] = beta[j] - mean[e * groups + g] * a[e * w->c + j];
            }
        }
    (void)sdq__par_work(ctx->profile, 0, was);
}

static void sdq__op_gn_begin(sdq_ctx *ctx, sdq__gn *w, const sdq_tensor *x, int silu) {
    memset(w, 0, sizeof *w);
    w->k = ctx->k;
    w->x = sdq_f32(x);
    w->c = sdq__t_chan(x);
    w->entries = sdq__t_entries(x);
    w->rows = sdq__t_rows(x) / w->entries;
    w->chunks = sdq__u_div_up(w->rows, SDQ__GN_ROWS);
    w->silu = silu;
}

/* y = a x + b, through SiLU if asked for. */
static void sdq__op_gn_apply(sdq_ctx *ctx, sdq__gn *w, const float *a, const float *b,
                             sdq_tensor *y) {
    const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_NORM);
    w->a = a;
    w->b = b;
    w->y = sdq_f32(y);
    sdq__op_gn_run(ctx, w, SDQ__GN_APPLY);
    (void)sdq__par_work(ctx->profile, 0, was);
}

SDQ_API sdq_tensor *sdq_group_norm(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *gamma, sdq_tensor *beta,
                                   int groups, float eps, int silu) {
    sdq_tensor *y;
    float *mean, *rstd, *mc, *a, *b;
    size_t c, ng;
    sdq_mark mark;
    sdq__node *node;
    sdq__gn w;
    if (!x || !gamma || !beta) return NULL;
    c = sdq__t_chan(x);
    ng = groups > 0 ? (size_t)groups : 0;
    if (ng == 0 || c % ng || sdq_tensor_count(gamma) != c || sdq_tensor_count(beta) != c) {
        sdq__fail(ctx, SDQ_ERR_SHAPE,
                  "group_norm: %zu channels, %d groups, %zu weights, %zu biases", c, groups,
                  sdq_tensor_count(gamma), sdq_tensor_count(beta));
        return NULL;
    }
    y = sdq__t_like(ctx, x);
    if (!y) return NULL;
    sdq__op_gn_begin(ctx, &w, x, silu);
    mark = sdq_arena_mark(ctx);
    mean = SDQ__PUSH_N(ctx, float, w.entries * ng);
    rstd = SDQ__PUSH_N(ctx, float, w.entries * ng);
    a = SDQ__PUSH_N(ctx, float, w.entries * c);
    b = SDQ__PUSH_N(ctx, float, w.entries * c);
    node = sdq__tape_push(ctx, sdq__op_gn_back, y, x, gamma, beta, NULL);
    if (node) {     /* statistics stay for backward */
        node->p[0] = mean; node->p[1] = rstd; node->p[2] = a; node->p[3] = b;
        node->i[0] = ng; node->i[1] = (size_t)silu;
        mark = sdq_arena_mark(ctx);
    }
    mc = SDQ__PUSH_N(ctx, float, w.entries * c);
    w.part = SDQ__PUSH_N(ctx, float, w.entries * w.chunks * c);
    if (!mean || !rstd || !a || !b || !mc || !w.part) return NULL;
    sdq__op_gn_stats(ctx, &w, ng, eps, sdq_f32(gamma), sdq_f32(beta), mean, rstd, a, b, mc);
    sdq__op_gn_apply(ctx, &w, a, b, y);
    sdq_arena_release(ctx, mark);
    return y;
}

/* ---- layer norm (Ba et al., arXiv 1607.06450): every row by itself ---------------------------
 * dgamma and dbeta are sums over rows: chunks of SDQ__GN_ROWS rows, then over chunks in order. */
typedef struct sdq__ln {
    const struct sdq__kernels *k;
    const float *x, *gamma, *beta, *dy;
    float *y, *stat, *part;     /* stat: mean, rstd per row */
    size_t rows, c;
    float eps;
} sdq__ln;

static void sdq__op_ln_task(void *arg, size_t task, int thread) {
    const sdq__ln *w = (const sdq__ln *)arg;
    const size_t c = w->c, end = sdq__u_min((task + 1) * SDQ__GN_ROWS, w->rows);
    size_t r;
    (void)thread;
    for (r = task * SDQ__GN_ROWS; r < end; r++) {
        const float *x = w->x + r * c;
        const float mean = w->k->sum(x, c) / (float)c, var = w->k->sqdev(x, c, mean) / (float)c;
        const float rstd = 1.0f / sqrtf(var + w->eps);
        if (w->stat) { w->stat[2 * r] = mean; w->stat[2 * r + 1] = rstd; }
        w->k->layernorm(w->y + r * c, x, w->gamma, w->beta, c, mean, rstd);
    }
}
static void sdq__op_ln_back_task(void *arg, size_t task, int thread) {
    const sdq__ln *w = (const sdq__ln *)arg;
    const size_t c = w->c, end = sdq__u_min((task + 1) * SDQ__GN_ROWS, w->rows);
    float *part = w->part + task * 2 * c;
    size_t r;
    (void)thread;
    memset(part, 0, 2 * c * sizeof(float));
    for (r = task * SDQ__GN_ROWS; r < end; r++)
        w->k->layernorm_bwd(w->y + r * c, part, part + c, w->dy + r * c, w->x + r * c, w->gamma, c,
                            w->stat[2 * r], w->stat[2 * r + 1]);
}
static void sdq__op_ln_back(sdq_ctx *ctx, sdq__node *n) {
    sdq_tensor *x = n->x[0];
    float *dg = sdq__tape_grad(ctx, n->x[1]), *db = sdq__tape_grad(ctx, n->x[2]);
    float *dx = sdq__tape_grad(ctx, x);
    const size_t chunks = sdq__u_div_up(sdq__t_rows(x), SDQ__GN_ROWS), c = sdq__t_chan(x);
    const sdq_mark mark = sdq_arena_mark(ctx);
    size_t i;
    sdq__ln w;
    memset(&w, 0, sizeof w);
    w.k = ctx->k; w.x = sdq_f32(x); w.dy = n->y->grad; w.gamma = sdq_f32(n->x[1]); w.c = c;
    w.rows = sdq__t_rows(x);
    w.stat = (float *)n->p[0];
    w.part = SDQ__PUSH_N(ctx, float, chunks * 2 * c);
    w.y = dx ? dx : SDQ__PUSH_N(ctx, float, sdq_tensor_count(x));
    if (!w.part || !w.y) return;
    if (!dx) memset(w.y, 0, sdq_tensor_count(x) * sizeof(float));
    sdq__par_for(ctx, chunks, sdq__op_ln_back_task, &w);
    for (i = 1; i < chunks; i++) ctx->k->add(w.part, w.part, w.part + i * 2 * c, 2 * c);
    if (dg) ctx->k->add(dg, dg, w.part, c);
    if (db) ctx->k->add(db, db, w.part + c, c);
    sdq_arena_release(ctx, mark);
}
SDQ_API sdq_tensor *sdq_layer_norm(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *gamma, sdq_tensor *beta,
                                   float eps) {
    sdq_tensor *y;
    sdq_work was;
    sdq__node *n;
    sdq__ln w;
    if (!x || !gamma || !beta) return NULL;
    memset(&w, 0, sizeof w);
    w.c = sdq__t_chan(x);
    if (sdq_tensor_count(gamma) != w.c || sdq_tensor_count(beta) != w.c) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "layer_norm: %zu channels, %zu weights, %zu biases", w.c,
                  sdq_tensor_count(gamma), sdq_tensor_count(beta));
        return NULL;
    }
    y = sdq__t_like(ctx, x);
    if (!y) return NULL;
    w.k = ctx->k; w.x = sdq_f32(x); w.gamma = sdq_f32(gamma); w.beta = sdq_f32(beta);
    w.y = sdq_f32(y); w.rows = sdq__t_rows(x); w.eps = eps;
    n = sdq__tape_push(ctx, sdq__op_ln_back, y, x, gamma, beta, NULL);
    if (n) {
        w.stat = SDQ__PUSH_N(ctx, float, 2 * w.rows);
        if (!w.stat) return NULL;
        n->p[0] = w.stat;
    }
    was = sdq__par_work(ctx->profile, 0, SDQ_WORK_NORM);
    sdq__par_for(ctx, sdq__u_div_up(w.rows, SDQ__GN_ROWS), sdq__op_ln_task, &w);
    (void)sdq__par_work(ctx->profile, 0, was);
    return y;
}

/* ---- attention ---- */
static void sdq__op_att_setup(sdq__att *w, sdq_tensor *q, sdq_tensor *k, sdq_tensor *v,
                              size_t heads, int causal) {
    memset(w, 0, sizeof *w);
    w->q = sdq_f32(q); w->key = sdq_f32(k); w->v = sdq_f32(v);
    w->n = q->dim[0]; w->tq = q->dim[1]; w->tk = k->dim[1];
    w->heads = heads; w->d = q->dim[2] / heads;
    w->causal = causal;
}
static void sdq__op_att_back(sdq_ctx *ctx, sdq__node *n) {
    sdq__att w;
    sdq__op_att_setup(&w, n->x[0], n->x[1], n->x[2], n->i[0], (int)n->i[1]);
    w.y = sdq_f32(n->y);
    w.lse = (float *)n->p[0];
    w.dy = n->y->grad;
    w.dq = sdq__tape_grad(ctx, n->x[0]);
    w.dk = sdq__tape_grad(ctx, n->x[1]);
    w.dv = sdq__tape_grad(ctx, n->x[2]);
    sdq__att_backward(ctx, &w);
}
static sdq_tensor *sdq__op_attention(sdq_ctx *ctx, sdq_tensor *q, sdq_tensor *k, sdq_tensor *v,
                                     int heads, int causal, int bits) {
    sdq_tensor *y;
    sdq__node *n;
    sdq__att w;
    if (!q || !k || !v) return NULL;
    if (q->rank != 3 || !sdq__t_same(k, v) || k->rank != 3 || q->dim[0] != k->dim[0]
        || q->dim[2] != k->dim[2] || heads < 1 || q->dim[2] % (size_t)heads
        || (causal && q->dim[1] != k->dim[1])) {
        char a[96], b[96], c[96];
        sdq__fail(ctx, SDQ_ERR_SHAPE, "attention: q %s, k %s, v %s with %d heads do not fit",
                  sdq__t_shape(q, a), sdq__t_shape(k, b), sdq__t_shape(v, c), heads);
        return NULL;
    }
    y = sdq__t_like(ctx, q);
    if (!y) return NULL;
    sdq__op_att_setup(&w, q, k, v, (size_t)heads, causal);
    w.y = sdq_f32(y);
    n = sdq__tape_push(ctx, sdq__op_att_back, y, q, k, v, NULL);
    if (n) {
        n->i[0] = (size_t)heads;
        n->i[1] = (size_t)causal;
        n->p[0] = w.lse = SDQ__PUSH_N(ctx, float, w.n * w.heads * w.tq);
        if (!w.lse) return NULL;
    }
    if (bits < 32) sdq__qatt_forward(ctx, &w, bits);
    else sdq__att_forward(ctx, &w);
    return ctx->status == SDQ_OK ? y : NULL;
}
SDQ_API sdq_tensor *sdq_attention(sdq_ctx *ctx, sdq_tensor *q, sdq_tensor *k, sdq_tensor *v,
                                  int heads, int causal) {
    return sdq__op_attention(ctx, q, k, v, heads, causal, 32);
}
SDQ_API sdq_tensor *sdq_attention_int(sdq_ctx *ctx, sdq_tensor *q, sdq_tensor *k, sdq_tensor *v,
                                      int heads, int bits) {
    const int large = q && heads > 0 && q->dim[2] / (size_t)heads > SDQ__QATT_D;
    if (bits != 8 && bits != 16) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "attention with products of %d bits: expected 8 or 16",
                  bits);
        return NULL;
    }
    return sdq__op_attention(ctx, q, k, v, heads, 0, large ? 32 : bits);
}

/* ---- nearest upsampling: y[i][j] = x[i h/H][j w/W];  dx[..] += dy ---- */
static size_t sdq__op_up_src(size_t i, size_t from, size_t to) { return i * from / to; }
static void sdq__op_upsample_back(sdq_ctx *ctx, sdq__node *n) {
    float *dx = sdq__tape_grad(ctx, n->x[0]);
    const sdq_tensor *x = n->x[0], *y = n->y;
    size_t e, i, j, c = x->dim[3];
    for (e = 0; dx && e < y->dim[0]; e++)
        for (i = 0; i < y->dim[1]; i++)
            for (j = 0; j < y->dim[2]; j++) {
                const size_t si = sdq__op_up_src(i, x->dim[1], y->dim[1]);
                const size_t sj = sdq__op_up_src(j, x->dim[2], y->dim[2]);
                float *d = dx + ((e * x->dim[1] + si) * x->dim[2] + sj) * c;
                ctx->k->add(d, d, y->grad + ((e * y->dim[1] + i) * y->dim[2] + j) * c, c);
            }
}
/* A row of y. */
static void sdq__op_upsample_task(void *arg, size_t row, int thread) {
    sdq_tensor *const *t = (sdq_tensor *const *)arg;
    const sdq_tensor *x = t[0], *y = t[1];
    const size_t h = y->dim[1], w = y->dim[2], c = x->dim[3];
    const size_t i = row / h * x->dim[1] + sdq__op_up_src(row % h, x->dim[1], h);
    size_t j;
    (void)thread;
    for (j = 0; j < w; j++)
        memcpy(sdq_f32(y) + (row * w + j) * c,
               sdq_f32(x) + (i * x->dim[2] + sdq__op_up_src(j, x->dim[2], w)) * c,
               c * sizeof(float));
}
SDQ_API sdq_tensor *sdq_upsample(sdq_ctx *ctx, sdq_tensor *x, size_t h, size_t w) {
    size_t dim[4];
    sdq_tensor *t[2];
    sdq_work was;
    if (!x) return NULL;
    if (x->rank != 4 || h < x->dim[1] || w < x->dim[2]) {
        char s[96];
        sdq__fail(ctx, SDQ_ERR_SHAPE, "upsample: %s to %zu x %zu", sdq__t_shape(x, s), h, w);
        return NULL;
    }
    memcpy(dim, x->dim, sizeof dim);
    dim[1] = h;
    dim[2] = w;
    t[0] = x;
    t[1] = sdq__t_raw(ctx, SDQ_F32, 4, dim);
    if (!t[1]) return NULL;
    was = sdq__par_work(ctx->profile, 0, SDQ_WORK_COPY);
    sdq__par_for(ctx, dim[0] * h, sdq__op_upsample_task, t);
    (void)sdq__par_work(ctx->profile, 0, was);
    (void)sdq__tape_push(ctx, sdq__op_upsample_back, t[1], x, NULL, NULL, NULL);
    return t[1];
}

/* ---- concat and slice of channels ---- */
static void sdq__op_concat_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t c = sdq__t_chan(n->y), rows = sdq__t_rows(n->y);
    size_t part, at = 0, r;
    for (part = 0; part < 2; part++) {
        const size_t pc = sdq__t_chan(n->x[part]);
        float *d = sdq__tape_grad(ctx, n->x[part]);
        for (r = 0; d && r < rows; r++)
            ctx->k->add(d + r * pc, d + r * pc, n->y->grad + r * c + at, pc);
        at += pc;
    }
}
SDQ_API sdq_tensor *sdq_concat(sdq_ctx *ctx, sdq_tensor *a, sdq_tensor *b) {
    sdq_tensor *y;
    size_t ca, cb, rows;
    int fits, i;
    if (!a || !b) return NULL;
    ca = sdq__t_chan(a);
    cb = sdq__t_chan(b);
    rows = sdq__t_rows(a);
    fits = a->rank == b->rank;
    for (i = 0; i + 1 < a->rank; i++) fits = fits && a->dim[i] == b->dim[i];
    if (!fits) {
        char sa[96], sb[96];
        sdq__fail(ctx, SDQ_ERR_SHAPE, "concat: %s and %s", sdq__t_shape(a, sa),
                  sdq__t_shape(b, sb));
        return NULL;
    }
    y = sdq__t_chans(ctx, a, ca + cb);
    if (!y) return NULL;
    sdq__t_copy(ctx, sdq_f32(y), (ca + cb) * 4, sdq_f32(a), ca * 4, ca * 4, rows);
    sdq__t_copy(ctx, sdq_f32(y) + ca, (ca + cb) * 4, sdq_f32(b), cb * 4, cb * 4, rows);
    (void)sdq__tape_push(ctx, sdq__op_concat_back, y, a, b, NULL, NULL);
    return y;
}
static void sdq__op_slice_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t c = sdq__t_chan(n->x[0]), pc = sdq__t_chan(n->y), rows = sdq__t_rows(n->y);
    float *d = sdq__tape_grad(ctx, n->x[0]);
    size_t r;
    for (r = 0; d && r < rows; r++)
        ctx->k->add(d + r * c + n->i[0], d + r * c + n->i[0], n->y->grad + r * pc, pc);
}
SDQ_API sdq_tensor *sdq_slice(sdq_ctx *ctx, sdq_tensor *x, size_t first, size_t count) {
    sdq_tensor *y;
    sdq__node *n;
    size_t c;
    if (!x) return NULL;
    c = sdq__t_chan(x);
    if (first > c || count > c - first || count == 0) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "slice: channels %zu + %zu of %zu", first, count, c);
        return NULL;
    }
    y = sdq__t_chans(ctx, x, count);
    if (!y) return NULL;
    sdq__t_copy(ctx, sdq_f32(y), count * 4, sdq_f32(x) + first, c * 4, count * 4,
                   sdq__t_rows(x));
    n = sdq__tape_push(ctx, sdq__op_slice_back, y, x, NULL, NULL, NULL);
    if (n) n->i[0] = first;
    return y;
}

/* ---- rows of a table;  dtable[id] += sum of dy over the tokens of that id, in order ---- */
static void sdq__op_embedding_back(sdq_ctx *ctx, sdq__node *n) {
    const int32_t *ids = (const int32_t *)n->x[1]->data;
    const size_t count = sdq_tensor_count(n->x[1]), c = sdq__t_chan(n->y);
    float *d = sdq__tape_grad(ctx, n->x[0]);
    const sdq_mark mark = sdq_arena_mark(ctx);
    float *sum = SDQ__PUSH_N(ctx, float, c);
    size_t i, j;
    for (i = 0; d && sum && i < count; i++) {
        float *row = d + (size_t)ids[i] * c;
        for (j = 0; j < i && ids[j] != ids[i]; j++) {}
        if (j < i) continue;            /* added with the first token of its id */
        memcpy(sum, n->y->grad + i * c, c * sizeof *sum);
        for (j = i + 1; j < count; j++)
            if (ids[j] == ids[i]) ctx->k->add(sum, sum, n->y->grad + j * c, c);
        ctx->k->add(row, row, sum, c);
    }
    sdq_arena_release(ctx, mark);
}
SDQ_API sdq_tensor *sdq_embedding(sdq_ctx *ctx, sdq_tensor *ids, sdq_tensor *table) {
    size_t dim[3], i, c, count;
    const int32_t *id;
    sdq_tensor *y;
    if (!ids || !table) return NULL;
    if (ids->dtype != SDQ_I32 || ids->rank != 2 || table->rank != 2) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "embedding: ids must be I32 [n,t], the table [rows,c]");
        return NULL;
    }
    dim[0] = ids->dim[0]; dim[1] = ids->dim[1]; dim[2] = c = table->dim[1];
    y = sdq__t_raw(ctx, SDQ_F32, 3, dim);
    if (!y) return NULL;
    id = (const int32_t *)ids->data;
    count = sdq_tensor_count(ids);
    for (i = 0; i < count; i++) {
        if (id[i] < 0 || (size_t)id[i] >= table->dim[0]) {
            sdq__fail(ctx, SDQ_ERR_ARGUMENT, "embedding: token %ld is not in a table of %zu rows",
                      (long)id[i], table->dim[0]);
            return NULL;
        }
        memcpy(sdq_f32(y) + i * c, sdq_f32(table) + (size_t)id[i] * c, c * sizeof(float));
    }
    (void)sdq__tape_push(ctx, sdq__op_embedding_back, y, table, ids, NULL, NULL);
    return y;
}

/* ---- the same data under another shape ---- */
static void sdq__op_reshape_back(sdq_ctx *ctx, sdq__node *n) {
    float *d = sdq__tape_grad(ctx, n->x[0]);
    if (d) sdq__op_binary(ctx, ctx->k->add, d, d, n->y->grad, sdq_tensor_count(n->y));
}
SDQ_API sdq_tensor *sdq_reshape(sdq_ctx *ctx, sdq_tensor *x, int rank, const size_t *dim) {
    sdq_tensor *y;
    size_t count = 1;
    int i;
    if (!x) return NULL;
    for (i = 0; i < rank && i < 4; i++) count *= dim[i];
    if (rank < 1 || rank > 4 || count != sdq_tensor_count(x)) {
        char s[96];
        sdq__fail(ctx, SDQ_ERR_SHAPE, "reshape: %s to %zu elements", sdq__t_shape(x, s), count);
        return NULL;
    }
    y = SDQ__PUSH_N(ctx, sdq_tensor, 1);
    if (!y) return NULL;
    *y = *x;
    y->grad = NULL;
    y->needs_grad = 0;
    y->rank = rank;
    for (i = 0; i < 4; i++) y->dim[i] = i < rank ? dim[i] : 1;
    (void)sdq__tape_push(ctx, sdq__op_reshape_back, y, x, NULL, NULL, NULL);
    return y;
}

/* ---- losses ---------------------------------------------------------------------------------- */

/* Sum over a tensor by pieces: kind 0 squared, 1 absolute differences. */
static double sdq__op_distance(sdq_ctx *ctx, const float *a, const float *b, size_t n,
                               int absolute) {
    double sum = 0.0;
    size_t i;
    for (i = 0; i < n; i += SDQ__PIECE) {
        const size_t m = sdq__u_min(SDQ__PIECE, n - i);
        sum +=
            (double)(absolute ? ctx->k->absdist(a + i, b + i, m) : ctx->k->sqdist(a + i, b + i, m));
    }
    return sum;
}

static sdq_tensor *sdq__op_scalar(sdq_ctx *ctx, double v) {
    sdq_tensor *y = sdq_tensor_1d(ctx, 1);
    if (y) sdq_f32(y)[0] = (float)v;
    return y;
}

/* mse = mean over e of weight[e] mean((x - t)^2);
 * dx += 2 weight[e] (x - t) / count dy, dt -= the same */
static void sdq__op_mse_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t size = sdq_tensor_count(n->x[0]) / n->x[0]->dim[0];
    const float *weight = (const float *)n->p[0], *x = sdq_f32(n->x[0]), *t = sdq_f32(n->x[1]);
    float *dx = sdq__tape_grad(ctx, n->x[0]), *dt = sdq__tape_grad(ctx, n->x[1]);
    size_t e, i;
    for (e = 0; e < n->x[0]->dim[0]; e++) {
        const float s =
            n->y->grad[0] * 2.0f * (weight ? weight[e] : 1.0f) / (float)sdq_tensor_count(n->x[0]);
        for (i = e * size; dx && i < (e + 1) * size; i++) dx[i] += s * (x[i] - t[i]);
        for (i = e * size; dt && i < (e + 1) * size; i++) dt[i] -= s * (x[i] - t[i]);
    }
}
SDQ_API sdq_tensor *sdq_mse(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *t, const float *weight) {
    sdq_tensor *y;
    sdq__node *n;
    double sum = 0.0;
    size_t e, size;
    if (!sdq__op_same(ctx, "mse", x, t)) return NULL;
    size = sdq_tensor_count(x) / x->dim[0];
    for (e = 0; e < x->dim[0]; e++)
        sum += (weight ? (double)weight[e] : 1.0)
             * sdq__op_distance(ctx, sdq_f32(x) + e * size, sdq_f32(t) + e * size, size, 0);
    y = sdq__op_scalar(ctx, sum / (double)sdq_tensor_count(x));
    n = sdq__tape_push(ctx, sdq__op_mse_back, y, x, t, NULL, NULL);
    if (n && weight) {
        float *w = SDQ__PUSH_N(ctx, float, x->dim[0]);
        if (!w) return NULL;
        memcpy(w, weight, x->dim[0] * sizeof(float));
        n->p[0] = w;
    }
    return y;
}

/* ---- y = sum over entries e of weight[e] x[e];  dx[e] += weight[e] dy ---- */
static void sdq__op_combine_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t size = sdq_tensor_count(n->y);
    const float *weight = (const float *)n->p[0];
    float *dx = sdq__tape_grad(ctx, n->x[0]);
    size_t e;
    for (e = 0; dx && e < n->x[0]->dim[0]; e++)
        sdq__op_scaled(ctx, ctx->k->axpy, dx + e * size, n->y->grad, size, weight[e]);
}
SDQ_API sdq_tensor *sdq_combine(sdq_ctx *ctx, sdq_tensor *x, const float *weight) {
    size_t dim[4], e, size;
    sdq_tensor *y;
    sdq__node *n;
    float *w;
    if (!x || !weight) return NULL;
    memcpy(dim, x->dim, sizeof dim);
    dim[0] = 1;
    y = sdq_tensor_new(ctx, SDQ_F32, x->rank, dim);
    w = SDQ__PUSH_N(ctx, float, x->dim[0]);
    if (!y || !w) return NULL;
    memcpy(w, weight, x->dim[0] * sizeof(float));
    size = sdq_tensor_count(y);
    for (e = 0; e < x->dim[0]; e++)
        sdq__op_scaled(ctx, ctx->k->axpy, sdq_f32(y), sdq_f32(x) + e * size, size, w[e]);
    n = sdq__tape_push(ctx, sdq__op_combine_back, y, x, NULL, NULL, NULL);
    if (n) n->p[0] = w;
    return y;
}

static float sdq__op_sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

static void sdq__op_l1_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t count = sdq_tensor_count(n->x[0]);
    const float s = n->y->grad[0] / (float)count, *x = sdq_f32(n->x[0]), *t = sdq_f32(n->x[1]);
    float *dx = sdq__tape_grad(ctx, n->x[0]), *dt = sdq__tape_grad(ctx, n->x[1]);
    size_t i;
    for (i = 0; dx && i < count; i++) dx[i] += s * sdq__op_sign(x[i] - t[i]);
    for (i = 0; dt && i < count; i++) dt[i] -= s * sdq__op_sign(x[i] - t[i]);
}
SDQ_API sdq_tensor *sdq_l1(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *t) {
    sdq_tensor *y;
    size_t count;
    if (!sdq__op_same(ctx, "l1", x, t)) return NULL;
    count = sdq_tensor_count(x);
    y = sdq__op_scalar(ctx,
                       sdq__op_distance(ctx, sdq_f32(x), sdq_f32(t), count, 1) / (double)count);
    (void)sdq__tape_push(ctx, sdq__op_l1_back, y, x, t, NULL, NULL);
    return y;
}

/* Mean |e[i][j+1] - e[i][j]| + mean |e[i+1][j] - e[i][j]|, e = x - t; the sign is the gradient. */
static double sdq__op_edges(const sdq_tensor *x, const sdq_tensor *t, size_t dy, size_t dx,
                            float *grad, float g) {
    const size_t h = x->dim[1], w = x->dim[2], c = x->dim[3];
    const size_t count = x->dim[0] * (h - dy) * (w - dx) * c, step = (dy * w + dx) * c;
    const float *a = sdq_f32(x), *b = sdq_f32(t), s = g / (float)count;
    double sum = 0.0;
    size_t e, i, j;
    for (e = 0; e < x->dim[0]; e++)
        for (i = 0; i + dy < h; i++) {
            const size_t at = (e * h + i) * w * c;
            float row = 0.0f;
            for (j = at; j < at + (w - dx) * c; j++) {
                const float d = (a[j + step] - b[j + step]) - (a[j] - b[j]);
                row += d < 0.0f ? -d : d;
                if (grad) {
                    grad[j + step] += s * sdq__op_sign(d);
                    grad[j] -= s * sdq__op_sign(d);
                }
            }
            sum += (double)row;
        }
    return sum / (double)count;
}
static void sdq__op_edges_back(sdq_ctx *ctx, sdq__node *n) {
    int i;
    for (i = 0; i < 2; i++) {
        float *d = sdq__tape_grad(ctx, n->x[i]);
        const float g = i ? -n->y->grad[0] : n->y->grad[0];
        if (!d) continue;
        (void)sdq__op_edges(n->x[0], n->x[1], 0, 1, d, g);
        (void)sdq__op_edges(n->x[0], n->x[1], 1, 0, d, g);
    }
}
SDQ_API sdq_tensor *sdq_l1_edges(sdq_ctx *ctx, sdq_tensor *x, sdq_tensor *t) {
    sdq_tensor *y;
    if (!sdq__op_same(ctx, "l1_edges", x, t)) return NULL;
    if (x->rank != 4 || x->dim[1] < 2 || x->dim[2] < 2) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "l1_edges: needs [n,h,w,c] with h, w of at least 2");
        return NULL;
    }
    y = sdq__op_scalar(ctx, sdq__op_edges(x, t, 0, 1, NULL, 0.0f)
                                + sdq__op_edges(x, t, 1, 0, NULL, 0.0f));
    (void)sdq__tape_push(ctx, sdq__op_edges_back, y, x, t, NULL, NULL);
    return y;
}

/* kl = mean of (mu^2 + exp(lv) - 1 - lv) / 2;  dmu += mu / count, dlv += (exp(lv) - 1) / 2 / count.
 * logvar is clamped to [-30,20]; outside, its gradient is 0. */
static float sdq__op_logvar(float lv, int *inside) {
    *inside = lv >= -30.0f && lv <= 20.0f;
    return lv < -30.0f ? -30.0f : lv > 20.0f ? 20.0f : lv;
}
static void sdq__op_kl_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t c = sdq__t_chan(n->x[0]) / 2, rows = sdq__t_rows(n->x[0]);
    const float s = n->y->grad[0] / (float)(rows * c), *x = sdq_f32(n->x[0]);
    float *d = sdq__tape_grad(ctx, n->x[0]);
    size_t r, j;
    int in;
    for (r = 0; d && r < rows; r++)
        for (j = 0; j < c; j++) {
            const size_t at = r * 2 * c + j;
            const float lv = sdq__op_logvar(x[at + c], &in);
            d[at] += s * x[at];
            if (in) d[at + c] += s * 0.5f * ((float)exp((double)lv) - 1.0f);
        }
}
SDQ_API sdq_tensor *sdq_kl(sdq_ctx *ctx, sdq_tensor *moments) {
    sdq_tensor *y;
    double sum = 0.0;
    size_t r, j, c, rows;
    int in;
    if (!moments) return NULL;
    c = sdq__t_chan(moments) / 2;
    rows = sdq__t_rows(moments);
    if (sdq__t_chan(moments) % 2) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "kl: %zu channels are not even", sdq__t_chan(moments));
        return NULL;
    }
    for (r = 0; r < rows; r++)
        for (j = 0; j < c; j++) {
            const float *x = sdq_f32(moments) + r * 2 * c + j;
            const double lv = (double)sdq__op_logvar(x[c], &in), mu = (double)x[0];
            sum += 0.5 * (mu * mu + exp(lv) - 1.0 - lv);
        }
    y = sdq__op_scalar(ctx, sum / (double)(rows * c));
    (void)sdq__tape_push(ctx, sdq__op_kl_back, y, moments, NULL, NULL, NULL);
    return y;
}

/* z = mu + exp(lv/2) noise;  dmu += dz, dlv += dz noise exp(lv/2) / 2 */
static void sdq__op_gaussian_back(sdq_ctx *ctx, sdq__node *n) {
    const size_t c = sdq__t_chan(n->y), rows = sdq__t_rows(n->y);
    const float *x = sdq_f32(n->x[0]), *noise = sdq_f32(n->x[1]), *dz = n->y->grad;
    float *d = sdq__tape_grad(ctx, n->x[0]);
    size_t r, j;
    int in;
    for (r = 0; d && r < rows; r++)
        for (j = 0; j < c; j++) {
            const size_t at = r * 2 * c + j, i = r * c + j;
            const float lv = sdq__op_logvar(x[at + c], &in);
            d[at] += dz[i];
            if (in) d[at + c] += dz[i] * noise[i] * 0.5f * (float)exp(0.5 * (double)lv);
        }
}
SDQ_API sdq_tensor *sdq_sample_gaussian(sdq_ctx *ctx, sdq_tensor *moments, sdq_tensor *noise) {
    sdq_tensor *y;
    size_t r, j, c, rows;
    int in;
    if (!moments || !noise) return NULL;
    c = sdq__t_chan(moments) / 2;
    rows = sdq__t_rows(moments);
    if (sdq__t_chan(moments) % 2 || sdq_tensor_count(noise) != rows * c
        || sdq__t_chan(noise) != c) {
        char a[96], b[96];
        sdq__fail(ctx, SDQ_ERR_SHAPE, "sample_gaussian: moments %s, noise %s",
                  sdq__t_shape(moments, a), sdq__t_shape(noise, b));
        return NULL;
    }
    y = sdq__t_chans(ctx, moments, c);
    if (!y) return NULL;
    for (r = 0; r < rows; r++)
        for (j = 0; j < c; j++) {
            const float *x = sdq_f32(moments) + r * 2 * c + j;
            const float sd = (float)exp(0.5 * (double)sdq__op_logvar(x[c], &in));
            sdq_f32(y)[r * c + j] = x[0] + sd * sdq_f32(noise)[r * c + j];
        }
    (void)sdq__tape_push(ctx, sdq__op_gaussian_back, y, moments, noise, NULL, NULL);
    return y;
}
/* ===========================================================================
 * >>layer   convolution and linear layers: one geometry, three modes
 *
 *   FLOAT  y = conv(x, w) + b
 *   FAKE   the INT8 forward on weights quantized now; the float weights stay and get gradients
 *   INT8   y = sum over segments s_x (acc - z sum(q_w)) times s_w, + b
 *
 * FAKE runs the int8 kernels, so what is trained is what ships, to the bit. Its backward is the
 * straight-through estimator (Bengio et al., arXiv 1308.3432): with xh = (q - z) s and wh = q s_w,
 *   dxh = dy wh^T,  dx = dxh where x is inside its range, else 0  (dynamic ranges: everywhere)
 *   dwh = dy^T xh,  dw = dwh where rint(w / s_w) is in [-128,127], else 0
 *   (4 bits: rint(w / (s_w m)) in [-8,7], and m times as much into ds)
 * and for learned scales (LSQ, arXiv 1902.08153; LSQ+, 2004.09576), N elements sharing s:
 *   ds = sum dxh (rint(v) - v | inside, -z below, 255 - z above) / sqrt(255 N),  v = x / s
 * (0 below and 255 above where the zero point follows the scale: sdq__ly_follow).
 *
 * A layer can carry a delta of low rank (LoRA, arXiv 2106.09685): FAKE mode then quantizes
 * w + b a, b [out,rank] and a [rank,k], and only b and a get gradients: with dw that of the sum,
 * da = b^T dw and db = dw a^T. FLOAT mode stays w alone, the teacher; w may be packed halves.
 *
 * A part is a range of input channels with its own activation ranges: one, or two when the input
 * is a concatenation whose halves differ (Q-Diffusion, arXiv 2302.04304). The second part's
 * product adds to the first's.
 *
 * A 3x3 convolution can have its input upsampled by 2 first, nearest: pixel (i,j) of what it reads
 * is x[i/2][j/2]. Of result (2y+p, 2x+q) tap (a,b) reads x[y + (p+a-1)/2][x + (q+b-1)/2], rounded
 * down: two rows, two columns. INT8 therefore computes four convolutions of 2x2 on x itself, one
 * for each phase (p,q), with 4/9 of the products, and the upsampled picture is never made:
 *   y[2y+p][2x+q] = sum over u, v in {0,1} of x[y+p-1+u][x+q-1+v] wpq[u][v] + b
 *   wpq[u][v] = sum of w[a][b] over (a+1-p)/2 = u and (b+1-q)/2 = v
 * Each is a layer of its own, wpq quantized like any weights. FLOAT upsamples: Winograd needs
 * fewer products (2.25 of each result, not 4). FAKE would not be INT8, so there is none.
 * ======================================================================== */

typedef struct sdq__qpart {
    size_t c0, c;               /* channels */
    float mn, mx;               /* observed range */
    int seen;
    sdq_tensor s;               /* static scale [1]; a leaf when learned */
    int32_t z;
    sdq__qweight w;             /* INT8: packed weights, on the heap */
} sdq__qpart;

struct sdq_layer {
    char *name;
    size_t in, out, kh, kw, stride, pad[4];
    size_t concat;              /* channels of the first half of a concatenated input; 0: none */
    int upsamples;              /* by 2, before it convolves */
    sdq_layer *phase[4];        /* then INT8 is these: phase (p,q) at 2p + q, without a bias, */
    int spreads;                /*   whose results go to every second pixel each way */
    sdq_tensor w, b;            /* [out,kh,kw,in], [out]; data NULL when absent */
    float *wp;                  /* FLOAT: packed once, when w is not there to change, */
    uint16_t *wh;               /* or the same as halves, if that is exact: what the file had */
    sdq_tensor la, lb;          /* a delta b a of the weights: [rank,k], [out,rank]; or no data */
    sdq_quant quant;
    sdq__qpart part[2];
    size_t parts;
    sdq_tensor sw;              /* weight scales [out] */
    uint8_t *mult;              /* 4 bits: multipliers of the scales [out][taps][groups] */
    float *w_mn, *w_mx;         /* moving ranges of the weights */
    float out_mn, out_mx;
    int out_seen, observe;
    double *bias_sum;           /* bias correction: sum of FLOAT - FAKE per channel, and rows */
    double bias_rows;
};

static size_t sdq__ly_taps(const sdq_layer *l) { return l->kh * l->kw; }
static int sdq__ly_frozen(const sdq_layer *l) { return l->wp || l->wh; }
static int sdq__ly_is_int8(const sdq_layer *l) { return l->part[0].w.b || l->phase[0]; }
static size_t sdq__ly_k(const sdq_layer *l) { return sdq__ly_taps(l) * l->in; }

SDQ_API sdq_tensor *sdq_layer_weight(sdq_layer *l) { return l->w.data ? &l->w : NULL; }
SDQ_API sdq_tensor *sdq_layer_bias(sdq_layer *l) { return l->b.data ? &l->b : NULL; }
SDQ_API const char *sdq_layer_name(const sdq_layer *l) { return l->name; }
SDQ_API void sdq_layer_observe(sdq_layer *l, int on) { l->observe = on; }

static void sdq__ly_free_weight(sdq_ctx *ctx, sdq__qweight *w) {
    sdq__free(ctx, w->b);
    sdq__free(ctx, w->sum);
    w->b = NULL;
    w->sum = NULL;
}

SDQ_API void sdq_layer_free(sdq_ctx *ctx, sdq_layer *l) {
    size_t i;
    if (!l) return;
    for (i = 0; i < 4; i++) sdq_layer_free(ctx, l->phase[i]);
    for (i = 0; i < 2; i++) {
        sdq__ly_free_weight(ctx, &l->part[i].w);
        sdq__t_free(ctx, &l->part[i].s);
    }
    sdq__t_free(ctx, &l->w);
    sdq__t_free(ctx, &l->b);
    sdq__t_free(ctx, &l->la);
    sdq__t_free(ctx, &l->lb);
    sdq__t_free(ctx, &l->sw);
    sdq__free(ctx, l->wp);
    sdq__free(ctx, l->wh);
    sdq__free(ctx, l->mult);
    sdq__free(ctx, l->w_mn);
    sdq__free(ctx, l->w_mx);
    sdq__free(ctx, l->bias_sum);
    sdq__free(ctx, l->name);
    sdq__free(ctx, l);
}

static sdq_range sdq__ly_range(const sdq_layer *l) {
    if (l->quant.range != SDQ_RANGE_DEFAULT) return l->quant.range;
    return sdq__ly_taps(l) == 1 ? SDQ_RANGE_POSITION : SDQ_RANGE_STATIC;
}

/* Cut the input channels into parts and size the packed weights of each. */
static void sdq__ly_set_parts(sdq_layer *l) {
    const size_t taps = sdq__ly_taps(l);
    const sdq_range range = sdq__ly_range(l);
    size_t i;
    l->parts = l->quant.split > 0 && l->quant.split < l->in ? 2 : 1;
    for (i = 0; i < l->parts; i++) {
        sdq__qpart *p = &l->part[i];
        p->c0 = i ? l->quant.split : 0;
        p->c = l->parts == 2 ? (i ? l->in - l->quant.split : l->quant.split) : l->in;
        p->seen = 0;
        p->w.n = l->out;
        p->w.taps = taps;
        p->w.quads = sdq__u_round_up(p->c, range == SDQ_RANGE_BLOCK ? SDQ__NR : 4) / 4;
        p->w.seg = range == SDQ_RANGE_BLOCK ? SDQ__NR / 4
                 : range == SDQ_RANGE_POSITION ? p->w.quads : taps * p->w.quads;
        p->w.segs = taps * p->w.quads / p->w.seg;
        p->w.sums = p->w.segs > 1 ? p->w.segs : taps;
    }
}

/* bare: without float weights, for int8 ones to come. */
static sdq_status sdq__ly_create(sdq_ctx *ctx, const sdq_layer_desc *desc, int bare,
                                 sdq_layer **out) {
    const size_t one = 1;
    sdq_layer *l;
    size_t dim[4], i;
    *out = NULL;
    if (ctx->status != SDQ_OK) return ctx->status;
    if (desc->in == 0 || desc->out == 0 || desc->kernel < 0 || desc->kernel > 3 || desc->stride < 0
        || (desc->kernel <= 1 && desc->stride > 1))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                         "layer %s: %zu -> %zu channels, kernel %d, stride %d is not"
                         " possible",
                         desc->name ? desc->name : "", desc->in, desc->out, desc->kernel,
                         desc->stride);
    l = SDQ__NEW(ctx, sdq_layer);
    if (!l) return ctx->status;
    l->name = sdq__strdup(ctx, desc->name ? desc->name : "");
    l->in = desc->in;
    l->out = desc->out;
    l->kh = l->kw = desc->kernel > 1 ? (size_t)desc->kernel : 1;
    l->stride = desc->stride ? (size_t)desc->stride : 1;
    for (i = 0; i < 4; i++) l->pad[i] = desc->pad[i] > 0 ? (size_t)desc->pad[i] : 0;
    dim[0] = l->out; dim[1] = l->kh; dim[2] = l->kw; dim[3] = l->in;
    if (l->name && sdq__t_set_shape(ctx, &l->w, 4, dim) == SDQ_OK
        && (bare || sdq__t_alloc(ctx, &l->w) == SDQ_OK)
        && sdq__t_init(ctx, &l->sw, 1, dim) == SDQ_OK
        && sdq__t_init(ctx, &l->part[0].s, 1, &one) == SDQ_OK
        && sdq__t_init(ctx, &l->part[1].s, 1, &one) == SDQ_OK
        && (desc->no_bias || sdq__t_init(ctx, &l->b, 1, dim) == SDQ_OK)) {
        l->quant.enabled = 1;
        sdq__ly_set_parts(l);
        *out = l;
        return SDQ_OK;
    }
    sdq_layer_free(ctx, l);
    return ctx->status;
}

SDQ_API sdq_status sdq_layer_create(sdq_ctx *ctx, const sdq_layer_desc *desc, sdq_layer **out) {
    return sdq__ly_create(ctx, desc, 0, out);
}

SDQ_API sdq_quant sdq_layer_quant(const sdq_layer *l) { return l->quant; }
SDQ_API sdq_status sdq_layer_set_quant(sdq_ctx *ctx, sdq_layer *l, const sdq_quant *quant) {
    if (sdq__ly_is_int8(l))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: has no float weights any more", l->name);
    if ((unsigned)quant->range >= SDQ_RANGE_COUNT)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: range %d", l->name, (int)quant->range);
    if (quant->weight_bits != 0 && quant->weight_bits != 4 && quant->weight_bits != 8)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: weights of %d bits, expected 4 or 8",
                         l->name, quant->weight_bits);
    if (quant->weight_bits == 4 && quant->weight_scale == SDQ_WEIGHT_MOVING)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: weights of 4 bits have no moving scales;"
                         " choose current or fixed ones", l->name);
    if (l->upsamples && quant->enabled && (quant->split || quant->quantize_output))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: upsamples its input, which cannot be"
                         " split, nor can its result be quantized", l->name);
    l->quant = *quant;
    l->out_seen = 0;
    memset(l->sw.data, 0, l->out * sizeof(float));      /* fixed scales are made anew */
    sdq__free(ctx, l->w_mn);
    sdq__free(ctx, l->w_mx);
    sdq__free(ctx, l->mult);
    l->w_mn = l->w_mx = NULL;
    l->mult = NULL;
    sdq__ly_set_parts(l);
    return SDQ_OK;
}
static void sdq__ly_set_split(sdq_layer *l, size_t hidden) {    /* input = concat(hidden, skip) */
    l->quant.split = l->concat = hidden;
    sdq__ly_set_parts(l);
}
/* A 3x3 convolution with a row of zeros around its input convolves the upsampled input. */
static void sdq__ly_set_upsamples(sdq_layer *l) { l->upsamples = 1; }
SDQ_API int sdq_layer_input_range(const sdq_layer *l, int part, float *scale, int32_t *zero) {
    const sdq__qpart *p = &l->part[part > 0];
    if (!p->seen) return 0;
    *scale = sdq_f32(&p->s)[0];
    *zero = p->z;
    return (int)l->parts;
}

/* ---- geometry ---- */

static sdq__geom sdq__ly_geom(const sdq_layer *l, const sdq_tensor *x) {
    sdq__geom g;
    if (sdq__ly_taps(l) == 1) return sdq__gemm_rows_geom(sdq__t_rows(x));
    memset(&g, 0, sizeof g);
    g.n = x->dim[0]; g.h = x->dim[1]; g.w = x->dim[2];
    g.kh = l->kh; g.kw = l->kw; g.stride = l->stride;
    g.top = l->pad[0]; g.left = l->pad[1];
    g.oh = (g.h + l->pad[0] + l->pad[2] - l->kh) / l->stride + 1;
    g.ow = (g.w + l->pad[1] + l->pad[3] - l->kw) / l->stride + 1;
    return g;
}

static sdq__geom sdq__ly_geom_back(sdq__geom g) {
    sdq__geom t = g;
    t.h = g.oh; t.w = g.ow; t.oh = g.h; t.ow = g.w;
    t.transposed = 1;
    return t;
}

/* The result tensor, or NULL when x does not fit. geglu: of h gelu(g), half as wide. */
static sdq_tensor *sdq__ly_result(sdq_ctx *ctx, const sdq_layer *l, sdq_tensor *x,
                                  sdq_tensor *res, int geglu) {
    char sx[96], sr[96];
    sdq_tensor *y;
    int fits = x->dtype == SDQ_F32 && sdq__t_chan(x) == l->in;
    if (sdq__ly_taps(l) > 1)
        fits = fits && x->rank == 4 && x->dim[1] + l->pad[0] + l->pad[2] >= l->kh
            && x->dim[2] + l->pad[1] + l->pad[3] >= l->kw;
    if (!fits) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "layer %s: input %s, expected %zu channels%s", l->name,
                  sdq__t_shape(x, sx), l->in, sdq__ly_taps(l) > 1 ? " in [n,h,w,c]" : "");
        return NULL;
    }
    if (sdq__ly_taps(l) > 1) {
        const sdq__geom g = sdq__ly_geom(l, x);
        const size_t up = l->upsamples ? 2 : 1;
        size_t dim[4];
        dim[0] = g.n; dim[1] = up * g.oh; dim[2] = up * g.ow; dim[3] = l->out;
        y = sdq__t_raw(ctx, SDQ_F32, 4, dim);
    } else {
        y = sdq__t_chans(ctx, x, geglu ? l->out / 2 : l->out);
    }
    if (y && res && !sdq__t_same(y, res)) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "layer %s: result %s, residual %s", l->name,
                  sdq__t_shape(y, sx), sdq__t_shape(res, sr));
        return NULL;
    }
    return y;
}

/* ---- the float product and its gradients ---- */

typedef struct sdq__pack {
    float *dst;
    const float *w;
    size_t out, taps, in;
} sdq__pack;

/* Panels of output channels: dst[panel][tap][in][32]. */
static void sdq__ly_pack_task(void *arg, size_t p, int thread) {
    const sdq__pack *w = (const sdq__pack *)arg;
    const size_t k = w->taps * w->in, n = sdq__u_min(SDQ__NR, w->out - p * SDQ__NR);
    (void)thread;
    sdq__gemm_pack_t(w->dst + p * SDQ__NR * k, w->w + p * SDQ__NR * k, k, n, k);
}
/* Panels of input channels for the input gradient: dst[panel][tap][out][32]. */
static void sdq__ly_pack_back_task(void *arg, size_t p, int thread) {
    const sdq__pack *w = (const sdq__pack *)arg;
    const size_t n = sdq__u_min(SDQ__NR, w->in - p * SDQ__NR);
    float *dst = w->dst + p * SDQ__NR * w->taps * w->out;
    size_t t, o, j;
    (void)thread;
    for (t = 0; t < w->taps; t++)
        for (o = 0; o < w->out; o++, dst += SDQ__NR) {
            const size_t at = (o * w->taps + t) * w->in + p * SDQ__NR;
            for (j = 0; j < n; j++) dst[j] = w->w[at + j];
            for (; j < SDQ__NR; j++) dst[j] = 0.0f;
        }
}

/* INT8 weights as float panels: the FLOAT mode of a layer that has no float weights. */
static void sdq__ly_unpack_int8(const sdq_layer *l, float *dst) {
    const size_t taps = sdq__ly_taps(l);
    size_t i, o, t, c;
    for (i = 0; i < l->parts; i++) {
        const sdq__qpart *p = &l->part[i];
        for (o = 0; o < l->out; o++)
            for (t = 0; t < taps; t++)
                for (c = 0; c < p->c; c++) {
                    const size_t panel = o / SDQ__NR, j = o % SDQ__NR;
                    const size_t quad = (panel * taps + t) * p->w.quads + c / 4;
                    const int8_t q = p->w.b[(quad * SDQ__NR + j) * 4 + c % 4];
                    dst[((panel * taps + t) * l->in + p->c0 + c) * SDQ__NR + j]
                        = (float)q * sdq_f32(&l->sw)[o];
                }
    }
}

static const float *sdq__ly_panels(sdq_ctx *ctx, const sdq_layer *l) {
    float *dst;
    sdq__pack w;
    if (l->wp) return l->wp;
    dst = SDQ__PUSH_N(ctx, float, sdq__gemm_packed_count(l->out, sdq__ly_k(l)));
    if (!dst) return NULL;
    memset(&w, 0, sizeof w);
    w.dst = dst; w.w = sdq_f32(&l->w); w.out = l->out; w.taps = sdq__ly_taps(l); w.in = l->in;
    if (l->w.data) {
        sdq__par_for(ctx, sdq__gemm_panels(l->out), sdq__ly_pack_task, &w);
    } else if (!ctx->dry) {
        memset(dst, 0, sdq__gemm_packed_count(l->out, sdq__ly_k(l)) * sizeof(float));
        sdq__ly_unpack_int8(l, dst);
    }
    return dst;
}

/* Room for packed weights, of zeros. halves: they all are values of halves. */
static sdq_status sdq__ly_new_packed(sdq_ctx *ctx, sdq_layer *l, int halves) {
    const size_t count = sdq__gemm_packed_count(l->out, sdq__ly_k(l));
    if (halves) l->wh = SDQ__NEW_N(ctx, uint16_t, count);
    else l->wp = SDQ__NEW_N(ctx, float, count);
    return ctx->status;
}
/* Panel p of them from its rows [out][k], floats or halves. */
static void sdq__ly_pack_panel(sdq_layer *l, size_t p, const void *rows) {
    const size_t k = sdq__ly_k(l), n = sdq__u_min(SDQ__NR, l->out - p * SDQ__NR);
    const uint16_t *half = (const uint16_t *)rows;
    uint16_t *to;
    size_t k0, i, j;
    if (l->wp) {
        sdq__gemm_pack_t(l->wp + p * SDQ__NR * k, (const float *)rows, k, n, k);
        return;
    }
    for (k0 = 0; k0 < k; k0 += 64)              /* as sdq__gemm_pack_t does it */
        for (j = 0; j < n; j++) {
            to = l->wh + (p * k + k0) * SDQ__NR + j;
            for (i = 0; i < sdq__u_min(64, k - k0); i++) to[i * SDQ__NR] = half[j * k + k0 + i];
        }
}
static void sdq__ly_freeze_task(void *arg, size_t p, int thread) {
    sdq_layer *l = (sdq_layer *)arg;
    (void)thread;
    sdq__ly_pack_panel(l, p, sdq_f32(&l->w) + p * SDQ__NR * sdq__ly_k(l));
}

/* Give up float weights that can change for packed ones. */
static sdq_status sdq__ly_freeze(sdq_ctx *ctx, sdq_layer *l) {
    if (!l->w.data || sdq__ly_frozen(l)) return ctx->status;
    SDQ__TRY(sdq__ly_new_packed(ctx, l, 0));
    sdq__par_for(ctx, sdq__gemm_panels(l->out), sdq__ly_freeze_task, l);
    sdq__free(ctx, l->w.data);
    l->w.data = NULL;
    return SDQ_OK;
}

/* The other way: panel p as rows of the weights. */
typedef struct sdq__thaw {
    const struct sdq__kernels *k;
    const sdq_layer *l;
    float *dst;
} sdq__thaw;
static void sdq__ly_thaw_task(void *arg, size_t p, int thread) {
    const sdq__thaw *w = (const sdq__thaw *)arg;
    const size_t k = sdq__ly_k(w->l), n = sdq__u_min(SDQ__NR, w->l->out - p * SDQ__NR);
    float buf[64 * SDQ__NR];
    size_t k0, i, j;
    (void)thread;
    for (k0 = 0; k0 < k; k0 += 64) {
        const size_t kn = sdq__u_min(64, k - k0), at = (p * k + k0) * SDQ__NR;
        const float *from = w->l->wh ? buf : w->l->wp + at;
        if (w->l->wh) w->k->from_f16(buf, w->l->wh + at, kn * SDQ__NR);
        for (j = 0; j < n; j++)
            for (i = 0; i < kn; i++)
                w->dst[(p * SDQ__NR + j) * k + k0 + i] = from[i * SDQ__NR + j];
    }
}
/* The float weights [out][k] without a delta: the layer's, or in the arena. */
static float *sdq__ly_thaw(sdq_ctx *ctx, const sdq_layer *l) {
    sdq__thaw w;
    if (l->w.data) return sdq_f32(&l->w);
    w.k = ctx->k; w.l = l;
    w.dst = SDQ__PUSH_N(ctx, float, l->out * sdq__ly_k(l));
    if (w.dst) sdq__par_for(ctx, sdq__gemm_panels(l->out), sdq__ly_thaw_task, &w);
    return w.dst;
}

/* w + b a, in the arena. */
static const float *sdq__ly_add_delta(sdq_ctx *ctx, const sdq_layer *l, const float *weights) {
    const size_t k = sdq__ly_k(l), rank = l->la.dim[0];
    float *y = SDQ__PUSH_N(ctx, float, l->out * k);
    const sdq_mark mark = sdq_arena_mark(ctx);
    float *panels = SDQ__PUSH_N(ctx, float, sdq__gemm_packed_count(k, rank));
    sdq__gemm w;
    if (!y || !panels) return NULL;
    sdq__gemm_pack(panels, sdq_f32(&l->la), k, k, rank);
    memset(&w, 0, sizeof w);
    w.g = sdq__gemm_rows_geom(l->out);
    w.x = sdq_f32(&l->lb);
    w.b = panels;
    w.res = weights;
    w.y = y;
    w.m = l->out;
    w.kc = w.ldx = rank;
    w.n = w.ldr = w.ldy = k;
    sdq__gemm_run(ctx, &w, 0);
    sdq_arena_release(ctx, mark);
    return y;
}
/* The weights that FAKE mode quantizes. */
static const float *sdq__ly_weights(sdq_ctx *ctx, const sdq_layer *l) {
    const float *w = sdq__ly_thaw(ctx, l);
    return w && l->la.data ? sdq__ly_add_delta(ctx, l, w) : w;
}

/* da += b^T dw, db += dw a^T. */
static void sdq__ly_delta_gradient(sdq_ctx *ctx, sdq_layer *l, const float *dw) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t k = sdq__ly_k(l), rank = l->la.dim[0];
    float *panels = SDQ__PUSH_N(ctx, float, sdq__gemm_packed_count(rank, k));
    float *db = sdq__tape_grad(ctx, &l->lb);
    sdq__gemm_dw a;
    sdq__gemm b;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    a.dw = sdq__tape_grad(ctx, &l->la);
    b.y = SDQ__PUSH_N(ctx, float, l->out * rank);
    if (!panels || !a.dw || !db || !b.y) return;
    a.g = b.g = sdq__gemm_rows_geom(l->out);
    a.x = b.x = dw;
    a.dy = sdq_f32(&l->lb);
    a.m = b.m = l->out;
    a.n = a.ldy = b.n = b.ldy = rank;
    a.c = a.ldx = a.ldw = b.kc = b.ldx = k;
    sdq__gemm_dw_run(ctx, &a);
    sdq__gemm_pack_t(panels, sdq_f32(&l->la), k, rank, k);
    b.b = panels;
    sdq__gemm_run(ctx, &b, 0);
    sdq__op_binary(ctx, ctx->k->add, db, db, b.y, l->out * rank);
    sdq_arena_release(ctx, mark);
}

/* Give the layer a delta of zeros: b = 0 and a from N(0, 1/rank), so that a first step of b moves
 * the weights as far as the same step of all of them would. */
static sdq_status sdq__ly_new_delta(sdq_ctx *ctx, sdq_layer *l, size_t rank, sdq_rng *rng) {
    const size_t a[2] = {rank, sdq__ly_k(l)}, b[2] = {l->out, rank};
    const float sd = 1.0f / sqrtf((float)rank);
    size_t i;
    if (!l->w.data && !sdq__ly_frozen(l))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: has no float weights any more", l->name);
    if (rank > sdq__u_min(l->out, a[1]))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: its weights are %zu x %zu: a delta of"
                         " rank %zu would be no smaller", l->name, l->out, a[1], rank);
    sdq__t_free(ctx, &l->la);
    sdq__t_free(ctx, &l->lb);
    SDQ__TRY(sdq__t_init(ctx, &l->la, 2, a));
    SDQ__TRY(sdq__t_init(ctx, &l->lb, 2, b));
    sdq_rng_normal(rng, sdq_f32(&l->la), rank * a[1]);
    for (i = 0; i < rank * a[1]; i++) sdq_f32(&l->la)[i] *= sd;
    return SDQ_OK;
}

static float *sdq__ly_zeros(sdq_ctx *ctx, size_t n) {
    float *z = SDQ__PUSH_N(ctx, float, n);
    if (z) memset(z, 0, n * sizeof(float));
    return z;
}

static void sdq__ly_forward_float(sdq_ctx *ctx, const sdq_layer *l, const sdq_tensor *x,
                                  const sdq_tensor *res, sdq_tensor *y) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__gemm w;
    memset(&w, 0, sizeof w);
    w.g = sdq__ly_geom(l, x);
    w.x = sdq_f32(x);
    w.bh = l->wh;
    w.b = w.bh ? NULL : sdq__ly_panels(ctx, l);
    w.zero = sdq__ly_zeros(ctx, l->in);
    w.bias = l->b.data ? sdq_f32(&l->b) : NULL;
    w.res = res ? sdq_f32(res) : NULL;
    w.y = sdq_f32(y);
    w.m = sdq__t_rows(y);
    w.n = w.ldr = l->out;
    w.ldy = sdq__t_chan(y);
    w.kc = w.ldx = l->in;
    if ((!w.b && !w.bh) || !w.zero) return;
    if (sdq__ly_frozen(l) && sdq__win_fits(&w.g, l->in, l->out)) sdq__win_run(ctx, &w);
    else sdq__gemm_run(ctx, &w, w.ldy < l->out);
    sdq_arena_release(ctx, mark);
}

/* dx (+)= dy wh^T for all input channels; wh the float weights, or q s when q is given. */
static void sdq__ly_input_gradient(sdq_ctx *ctx, const sdq_layer *l, const sdq_tensor *x,
                                   const sdq_tensor *y, const float *dy, const int8_t *q, float *dx,
                                   int more) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__pack p;
    sdq__gemm w;
    memset(&p, 0, sizeof p);
    p.w = q ? NULL : sdq__ly_thaw(ctx, l);
    p.out = l->out; p.taps = sdq__ly_taps(l); p.in = l->in;
    if (p.w) p.dst = SDQ__PUSH_N(ctx, float, sdq__gemm_packed_count(l->in, p.taps * l->out));
    memset(&w, 0, sizeof w);
    w.g = sdq__ly_geom(l, x);
    if (p.taps > 1) w.g = sdq__ly_geom_back(w.g);
    w.x = dy;
    w.b = p.dst;
    w.bq = q;
    w.bs = sdq_f32(&l->sw);
    w.zero = sdq__ly_zeros(ctx, l->out);
    w.y = dx;
    w.m = sdq__t_rows(x);
    w.n = w.ldy = l->in;
    w.kc = w.ldx = sdq__t_chan(y);
    w.more = more;
    if ((p.dst || q) && w.zero) {
        if (p.dst) sdq__par_for(ctx, sdq__gemm_panels(l->in), sdq__ly_pack_back_task, &p);
        sdq__gemm_run(ctx, &w, 0);
    }
    sdq_arena_release(ctx, mark);
}

static void sdq__ly_float_back(sdq_ctx *ctx, sdq__node *n) {
    sdq_layer *l = (sdq_layer *)n->p[0];
    sdq_tensor *x = n->x[0], *res = n->x[1];
    const float *dy = n->y->grad;
    int more = 0;
    float *dx = sdq__tape_grad_raw(ctx, x, &more);
    float *dw = sdq__tape_grad(ctx, &l->w), *db = sdq__tape_grad(ctx, l->b.data ? &l->b : NULL);
    float *dres = sdq__tape_grad(ctx, res);
    if (ctx->status != SDQ_OK) return;
    if (dx) sdq__ly_input_gradient(ctx, l, x, n->y, dy, NULL, dx, more);
    if (dw) {
        sdq__gemm_dw w;
        memset(&w, 0, sizeof w);
        w.g = sdq__ly_geom(l, x);
        w.x = sdq_f32(x); w.dy = dy; w.dw = dw;
        w.m = sdq__t_rows(n->y); w.n = w.ldy = l->out;
        w.c = w.ldx = w.ldw = l->in;
        sdq__gemm_dw_run(ctx, &w);
    }
    if (db) sdq__gemm_colsum(ctx, db, dy, sdq__t_rows(n->y), l->out);
    if (dres) sdq__op_binary(ctx, ctx->k->add, dres, dres, dy, sdq_tensor_count(n->y));
}

/* ---- observers ---- */

static void sdq__ly_range_rows(sdq_ctx *ctx, const sdq_tensor *x, size_t c0, size_t c, size_t r0,
                               size_t r1, float *mn, float *mx) {
    const size_t ld = sdq__t_chan(x);
    size_t r;
    if (c == ld) { ctx->k->minmax(sdq_f32(x) + r0 * ld, (r1 - r0) * ld, mn, mx); return; }
    for (r = r0; r < r1; r++) ctx->k->minmax(sdq_f32(x) + r * ld + c0, c, mn, mx);
}

/* New range from the old one and that of a batch: true min/max, or m += moving (now - m). */
static void sdq__ly_track(const sdq_layer *l, int seen, float now_mn, float now_mx, float *mn,
                          float *mx) {
    if (!seen) { *mn = now_mn; *mx = now_mx; return; }
    if (l->quant.moving > 0.0f) {
        *mn += l->quant.moving * (now_mn - *mn);
        *mx += l->quant.moving * (now_mx - *mx);
        return;
    }
    if (now_mn < *mn) *mn = now_mn;
    if (now_mx > *mx) *mx = now_mx;
}

static void sdq__ly_observe_input(sdq_ctx *ctx, sdq_layer *l, const sdq_tensor *x) {
    size_t i;
    for (i = 0; i < l->parts; i++) {
        sdq__qpart *p = &l->part[i];
        float mn = INFINITY, mx = -INFINITY;
        sdq__qparam q;
        sdq__ly_range_rows(ctx, x, p->c0, p->c, 0, sdq__t_rows(x), &mn, &mx);
        sdq__ly_track(l, p->seen, mn, mx, &p->mn, &p->mx);
        p->seen = 1;
        q = sdq__q_from_range(p->mn, p->mx);
        sdq_f32(&p->s)[0] = q.s;
        p->z = q.z;
    }
}

static sdq_status sdq__ly_observe_weights(sdq_ctx *ctx, sdq_layer *l, const float *w) {
    const size_t k = sdq__ly_k(l);
    const int seen = l->w_mn != NULL;
    size_t o;
    if (!seen) {
        float *mn = SDQ__NEW_N(ctx, float, l->out), *mx = SDQ__NEW_N(ctx, float, l->out);
        if (!mn || !mx) {
            sdq__free(ctx, mn);
            sdq__free(ctx, mx);
            return ctx->status;
        }
        l->w_mn = mn;
        l->w_mx = mx;
    }
    for (o = 0; o < l->out; o++) {
        float mn = INFINITY, mx = -INFINITY;
        ctx->k->minmax(w + o * k, k, &mn, &mx);
        sdq__ly_track(l, seen, mn, mx, &l->w_mn[o], &l->w_mx[o]);
    }
    return SDQ_OK;
}

/* A function of the weights as they are now, packed or not. */
static sdq_status sdq__ly_with_weights(sdq_ctx *ctx, sdq_layer *l,
                                       sdq_status (*fn)(sdq_ctx *, sdq_layer *, const float *)) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const float *w = sdq__ly_weights(ctx, l);
    const sdq_status st = w ? fn(ctx, l, w) : ctx->status;
    sdq_arena_release(ctx, mark);
    return st;
}

/* A piece of the weights of an output channel whose steps have one size, s_w m: with 8 bits all of
 * them, with 4 bits a group of input channels within a tap. */
typedef struct sdq__wgroup {
    size_t at, n;               /* in w, the count */
    int m;
    float low, high;            /* of the integers before they are multiplied */
} sdq__wgroup;

static size_t sdq__ly_group_size(const sdq_layer *l) {
    const size_t g = l->quant.weight_group ? l->quant.weight_group : SDQ__Q_GROUP;
    return l->quant.weight_bits == 4 ? sdq__u_min(g, l->in) : l->in;
}
/* Groups of a tap; pieces of a channel's weights. */
static size_t sdq__ly_tap_groups(const sdq_layer *l) {
    return sdq__u_div_up(l->in, sdq__ly_group_size(l));
}
static size_t sdq__ly_groups(const sdq_layer *l) {
    return l->quant.weight_bits == 4 ? sdq__ly_taps(l) * sdq__ly_tap_groups(l) : 1;
}
static sdq__wgroup sdq__ly_group(const sdq_layer *l, size_t o, size_t i) {
    const size_t size = sdq__ly_group_size(l), groups = sdq__ly_tap_groups(l);
    const size_t c0 = i % groups * size;
    sdq__wgroup g;
    if (l->quant.weight_bits != 4) {
        g.at = o * sdq__ly_k(l);
        g.n = sdq__ly_k(l);
        g.m = 1;
        g.low = -128.0f;
        g.high = 127.0f;
        return g;
    }
    g.at = (o * sdq__ly_taps(l) + i / groups) * l->in + c0;
    g.n = sdq__u_min(size, l->in - c0);
    g.m = l->mult ? l->mult[o * sdq__ly_groups(l) + i] : 1;
    g.low = -8.0f;
    g.high = 7.0f;
    return g;
}

typedef struct sdq__multiply { const sdq_layer *l; const float *w; } sdq__multiply;

static void sdq__ly_multiplier_task(void *arg, size_t o, int thread) {
    const sdq__multiply *a = (const sdq__multiply *)arg;
    const sdq_layer *l = a->l;
    size_t i;
    (void)thread;
    for (i = 0; i < sdq__ly_groups(l); i++) {
        const sdq__wgroup g = sdq__ly_group(l, o, i);
        l->mult[o * sdq__ly_groups(l) + i] =
            sdq__q_multiplier4(a->w + g.at, g.n, sdq_f32(&l->sw)[o]);
    }
}

/* Weight scales as the settings say, with 4 bits multipliers, too; FIXED ones are made once. */
static sdq_status sdq__ly_weight_scales(sdq_ctx *ctx, sdq_layer *l, const float *w) {
    const size_t k = sdq__ly_k(l);
    float *s = sdq_f32(&l->sw);
    sdq__multiply run;
    size_t o;
    if (ctx->dry) return SDQ_OK;
    if (l->quant.weight_scale == SDQ_WEIGHT_FIXED && s[0] > 0.0f
        && (l->mult || l->quant.weight_bits != 4))
        return SDQ_OK;
    if (l->quant.weight_scale == SDQ_WEIGHT_MOVING && !l->w_mn)
        SDQ__TRY(sdq__ly_observe_weights(ctx, l, w));
    for (o = 0; o < l->out; o++) {
        float mn = INFINITY, mx = -INFINITY;
        if (l->quant.weight_scale == SDQ_WEIGHT_MOVING) { mn = l->w_mn[o]; mx = l->w_mx[o]; }
        else ctx->k->minmax(w + o * k, k, &mn, &mx);
        s[o] = l->quant.weight_bits == 4 ? sdq__q_scale4(mn, mx)
                                         : sdq__q_weight_scale(mn, mx);
    }
    if (l->quant.weight_bits != 4) return SDQ_OK;
    if (!l->mult) l->mult = SDQ__NEW_N(ctx, uint8_t, l->out * sdq__ly_groups(l));
    run.l = l;
    run.w = w;
    if (l->mult) sdq__par_for(ctx, l->out, sdq__ly_multiplier_task, &run);
    return l->mult ? SDQ_OK : ctx->status;
}

/* A learned scale moves the ends of its range. Behind SiLU a range is -0.28 .. much: there the low
 * end must stay, or a smaller scale would cut off what is negative, so the zero point follows.
 * Ranges to both sides keep their zero point, as in LSQ. */
static int sdq__ly_one_sided(const sdq__qpart *p) { return p->seen && -p->mn < 0.25f * p->mx; }
static void sdq__ly_follow(sdq_layer *l) {
    size_t i;
    for (i = 0; i < l->parts; i++) {
        sdq__qpart *p = &l->part[i];
        float z;
        if (!sdq__ly_one_sided(p)) continue;
        z = 0.0f - sdq__q_rint(p->mn / sdq_f32(&p->s)[0]);
        p->z = (int32_t)(!(z > 0.0f) ? 0.0f : z > 255.0f ? 255.0f : z);
    }
}

/* What training must remember of the observers: ranges of both parts and of the output as
 * (min, max, seen), then the moving ranges of the weights when there are any. */
static size_t sdq__ly_state_count(const sdq_layer *l) { return 9 + (l->w_mn ? 2 * l->out : 0); }
/* Whether value i of n of such a state is a minimum; the others are maxima and flags. */
static int sdq__ly_state_is_min(size_t n, size_t i) {
    return i < 9 ? i % 3 == 0 : i < 9 + (n - 9) / 2;
}
static void sdq__ly_state(void *user, float *v, int load) {
    sdq_layer *l = (sdq_layer *)user;
    float *range[6];
    int *seen[3], i;
    for (i = 0; i < 2; i++) {
        range[2 * i] = &l->part[i].mn;
        range[2 * i + 1] = &l->part[i].mx;
        seen[i] = &l->part[i].seen;
    }
    range[4] = &l->out_mn;
    range[5] = &l->out_mx;
    seen[2] = &l->out_seen;
    for (i = 0; i < 3; i++, v += 3) {
        if (load) { *range[2 * i] = v[0]; *range[2 * i + 1] = v[1]; *seen[i] = v[2] != 0.0f; }
        else { v[0] = *range[2 * i]; v[1] = *range[2 * i + 1]; v[2] = *seen[i] ? 1.0f : 0.0f; }
    }
    for (i = 0; load && i < 2; i++) {           /* zero point and scale follow from the range */
        const sdq__qparam q = sdq__q_from_range(l->part[i].mn, l->part[i].mx);
        if (!l->part[i].seen) continue;
        l->part[i].z = q.z;
        if (!l->part[i].s.needs_grad) sdq_f32(&l->part[i].s)[0] = q.s;  /* learned: a leaf */
    }
    if (!l->w_mn) return;
    memcpy(load ? l->w_mn : v, load ? v : l->w_mn, l->out * sizeof(float));
    memcpy(load ? l->w_mx : v + l->out, load ? v + l->out : l->w_mx, l->out * sizeof(float));
}

/* ---- quantizing input and weights ---- */

typedef struct sdq__qrun {
    const struct sdq__kernels *k;
    const sdq_layer *l;
    const sdq__qpart *part;
    const float *x;             /* the input, or weights */
    sdq__qinput *out;
    int8_t *q;
    float *mn, *mx;             /* per entry and chunk, for ranges per picture */
    size_t ldx, chunks;
    sdq_range range;
} sdq__qrun;

#define SDQ__Q_ROWS 16          /* rows of a task */

/* Ranges of one chunk of rows of one entry. */
static void sdq__ly_minmax_task(void *arg, size_t task, int thread) {
    const sdq__qrun *w = (const sdq__qrun *)arg;
    const size_t rows = w->out->rows / w->out->entries, e = task / w->chunks;
    size_t r = task % w->chunks * SDQ__Q_ROWS;
    const size_t end = sdq__u_min(r + SDQ__Q_ROWS, rows);
    (void)thread;
    w->mn[task] = INFINITY;
    w->mx[task] = -INFINITY;
    for (; r < end; r++)
        w->k->minmax(w->x + (e * rows + r) * w->ldx + w->part->c0, w->part->c, &w->mn[task],
                     &w->mx[task]);
}

/* Rows r..r+rows, which begin at x, by the scale of their entry. */
static void sdq__ly_quantize_entry(const sdq__qrun *w, const float *x, size_t r, size_t rows) {
    sdq__qinput *o = w->out;
    for (; rows > 0; r++, rows--, x += w->ldx) {
        const size_t e = r / (o->rows / o->entries);
        const sdq__qparam p = sdq__q_from_scale(o->s[e], o->z[e]);
        w->k->quantize_u8(o->q + r * o->ld, x, w->part->c, p.inv, p.z);
    }
}
/* Each of them, and each block of its channels, by a scale of its own. */
static void sdq__ly_quantize_own(const sdq__qrun *w, const float *x, size_t r, size_t rows) {
    sdq__qinput *o = w->out;
    const size_t c = w->part->c, step = w->range == SDQ_RANGE_BLOCK ? SDQ__NR : c;
    size_t b;
    for (b = 0; b < o->blocks; b++) {
        const size_t at = r * o->blocks + b, j = b * step;
        w->k->quantize_rows(o->q + r * o->ld + j, o->ld, x + j, w->ldx, rows,
                            sdq__u_min(step, c - j), o->s + at, o->z + at, o->blocks);
    }
}
static void sdq__ly_quantize_from(const sdq__qrun *w, const float *x, size_t r, size_t rows) {
    const size_t c = w->part->c, ld = w->out->ld;
    size_t i;
    if (w->out->per_row) sdq__ly_quantize_own(w, x + w->part->c0, r, rows);
    else sdq__ly_quantize_entry(w, x + w->part->c0, r, rows);
    for (i = r; c < ld && i < r + rows; i++) memset(w->out->q + i * ld + c, 0, ld - c);
}
static void sdq__ly_quantize_rows(void *arg, size_t r, size_t rows) {
    const sdq__qrun *w = (const sdq__qrun *)arg;
    sdq__ly_quantize_from(w, w->x + r * w->ldx, r, rows);
}

/* Scales per entry: the static one, or that of each picture. */
static sdq_status sdq__ly_entry_scales(sdq_ctx *ctx, sdq__qrun *w) {
    sdq__qinput *o = w->out;
    size_t e, i;
    if (w->range == SDQ_RANGE_STATIC) {
        if (!w->part->seen)
            return sdq__fail(ctx, SDQ_ERR_NOT_CALIBRATED,
                             "layer %s: its input range was never observed;"
                             " calibrate first",
                             w->l->name);
        for (e = 0; e < o->entries; e++) {
            o->s[e] = sdq_f32(&w->part->s)[0];
            o->z[e] = w->part->z;
        }
    } else {
        const sdq_mark mark = sdq_arena_mark(ctx);
        const sdq_work was = sdq__par_work(ctx->profile, 0, SDQ_WORK_QUANTIZE);
        w->chunks = sdq__u_div_up(o->rows / o->entries, SDQ__Q_ROWS);
        w->mn = SDQ__PUSH_N(ctx, float, o->entries * w->chunks);
        w->mx = SDQ__PUSH_N(ctx, float, o->entries * w->chunks);
        if (!w->mn || !w->mx) return ctx->status;
        sdq__par_for(ctx, o->entries * w->chunks, sdq__ly_minmax_task, w);
        for (e = 0; e < o->entries; e++) {
            float mn = INFINITY, mx = -INFINITY;
            sdq__qparam p;
            for (i = e * w->chunks; i < (e + 1) * w->chunks; i++) {
                mn = w->mn[i] < mn ? w->mn[i] : mn;
                mx = w->mx[i] > mx ? w->mx[i] : mx;
            }
            p = sdq__q_from_range(mn, mx);
            o->s[e] = p.s;
            o->z[e] = p.z;
        }
        sdq_arena_release(ctx, mark);
        (void)sdq__par_work(ctx->profile, 0, was);
    }
    for (e = 0; e < o->entries; e++) memset(o->pad + e * o->ld, o->z[e], o->ld);
    return SDQ_OK;
}

/* Prepare to quantize the channels of a part of x: memory, from the arena, and scales that are not
 * a row's own. sdq__ly_quantize_rows does the rest. */
static sdq_status sdq__ly_quantize_begin(sdq_ctx *ctx, const sdq_layer *l, const sdq__qpart *part,
                                         const sdq_tensor *x, sdq__qrun *w, sdq__qinput *out) {
    size_t scales;
    memset(w, 0, sizeof *w);
    memset(out, 0, sizeof *out);
    w->k = ctx->k; w->l = l; w->part = part; w->x = sdq_f32(x); w->out = out;
    w->ldx = sdq__t_chan(x);
    w->range = sdq__ly_range(l);
    out->rows = sdq__t_rows(x);
    out->entries = sdq__t_entries(x);
    out->ld = part->w.quads * 4;
    out->blocks = w->range == SDQ_RANGE_BLOCK ? out->ld / SDQ__NR : 1;
    out->per_row = w->range == SDQ_RANGE_POSITION || w->range == SDQ_RANGE_BLOCK;
    scales = out->per_row ? out->rows * out->blocks : out->entries;
    out->q = SDQ__PUSH_N(ctx, uint8_t, out->rows * out->ld);
    out->s = SDQ__PUSH_N(ctx, float, scales);
    out->z = SDQ__PUSH_N(ctx, int32_t, scales);
    out->pad = SDQ__PUSH_N(ctx, uint8_t, out->entries * out->ld);
    if (!out->q || !out->s || !out->z || !out->pad) return ctx->status;
    if (!out->per_row) return sdq__ly_entry_scales(ctx, w);
    memset(out->pad, 0, out->ld);
    return SDQ_OK;
}

/* All of it at once. */
static sdq_status sdq__ly_quantize_input(sdq_ctx *ctx, const sdq_layer *l, const sdq__qpart *part,
                                         const sdq_tensor *x, sdq__qinput *out) {
    sdq__qgemm w;
    sdq__qrun run;
    SDQ__TRY(sdq__ly_quantize_begin(ctx, l, part, x, &run, out));
    memset(&w, 0, sizeof w);
    w.x = out;
    w.fill = sdq__ly_quantize_rows;
    w.fill_arg = &run;
    sdq__qgemm_fill(ctx, &w);
    return ctx->status;
}

/* Whether an input that was quantized before is what this layer would make of it: by its own
 * ranges, or by ranges that come from the numbers alone, cut the same way. */
static int sdq__ly_takes(const sdq_layer *l, const sdq__qinput *q) {
    const size_t ld = l->part[0].w.quads * 4;
    const sdq_range range = sdq__ly_range(l);
    if (!q || l->parts > 1 || q->ld != ld) return 0;
    return q->of == l
        || (q->per_row && range == SDQ_RANGE_POSITION && q->blocks == 1)
        || (q->per_row && range == SDQ_RANGE_BLOCK && q->blocks == ld / SDQ__NR);
}

/* Whether l takes what was quantized before, for it alone or for others that read x, too. */
static int sdq__ly_takes_bytes(const sdq_layer *l, const sdq_tensor *x, sdq_mode mode, int alone) {
    const sdq_range range = sdq__ly_range(l);
    return mode == SDQ_INT8 && l->quant.enabled && l->parts == 1 && sdq__t_chan(x) == l->in
        && (range == SDQ_RANGE_POSITION || range == SDQ_RANGE_BLOCK
            || (range == SDQ_RANGE_STATIC && alone));
}

/* Several layers are going to read x: quantize it once, if it will be done the same way by all. */
static sdq_tensor *sdq__ly_share(sdq_ctx *ctx, const sdq_layer *l, sdq_tensor *x, sdq_mode mode) {
    sdq__qinput *q;
    if (!x || !sdq__ly_takes_bytes(l, x, mode, 0)) return x;
    q = SDQ__PUSH_N(ctx, sdq__qinput, 1);
    if (!q || sdq__ly_quantize_input(ctx, l, &l->part[0], x, q) != SDQ_OK) return NULL;
    x->q = q;
    return x;
}

/* silu(a x + b), a and b [entries][c], for a layer that takes bytes: floats of a few rows at a time
 * only, which stay in the first cache. */
typedef struct sdq__qaffine {
    sdq__qrun run;
    const float *a, *b;
    float *rows;                /* SDQ__Q_ROWS of them per thread */
} sdq__qaffine;

static void sdq__ly_affine_task(void *arg, size_t task, int thread) {
    const sdq__qaffine *w = (const sdq__qaffine *)arg;
    const sdq__qinput *o = w->run.out;
    const size_t c = w->run.ldx, r = task * SDQ__Q_ROWS, n = sdq__u_min(SDQ__Q_ROWS, o->rows - r);
    float *x = w->rows + (size_t)thread * SDQ__Q_ROWS * c;
    size_t i;
    for (i = 0; i < n; i++) {
        const size_t e = (r + i) / (o->rows / o->entries);
        w->run.k->affine_silu(x + i * c, w->run.x + (r + i) * c, w->a + e * c, w->b + e * c, c);
    }
    sdq__ly_quantize_from(&w->run, x, r, n);
}

/* The result has bytes, by the ranges of l, and no floats. */
static sdq_tensor *sdq__ly_affine(sdq_ctx *ctx, const sdq_layer *l, const sdq_tensor *x,
                                  const float *a, const float *b) {
    sdq_tensor *y = SDQ__PUSH_N(ctx, sdq_tensor, 1);
    sdq__qinput *q = SDQ__PUSH_N(ctx, sdq__qinput, 1);
    sdq__qaffine w;
    sdq_mark mark;
    sdq_work was;
    if (!y || !q || sdq__ly_quantize_begin(ctx, l, &l->part[0], x, &w.run, q) != SDQ_OK)
        return NULL;
    q->of = l;
    w.a = a;
    w.b = b;
    mark = sdq_arena_mark(ctx);
    w.rows = SDQ__PUSH_N(ctx, float, (size_t)ctx->threads * SDQ__Q_ROWS * w.run.ldx);
    if (!w.rows) return NULL;
    was = sdq__par_work(ctx->profile, 0, SDQ_WORK_NORM);
    sdq__par_for(ctx, sdq__u_div_up(q->rows, SDQ__Q_ROWS), sdq__ly_affine_task, &w);
    (void)sdq__par_work(ctx->profile, 0, was);
    sdq_arena_release(ctx, mark);
    *y = *x;
    y->data = NULL;
    y->grad = NULL;
    y->q = q;
    return y;
}

static void sdq__ly_quantize_weight_task(void *arg, size_t o, int thread) {
    const sdq__qrun *w = (const sdq__qrun *)arg;
    const float s = sdq_f32(&w->l->sw)[o];
    size_t i;
    (void)thread;
    for (i = 0; i < sdq__ly_groups(w->l); i++) {
        const sdq__wgroup g = sdq__ly_group(w->l, o, i);
        w->k->quantize_s8(w->q + g.at, w->x + g.at, g.n, 1.0f / (s * (float)g.m));
        if (w->l->quant.weight_bits == 4) sdq__q_expand4(w->q + g.at, g.n, g.m);
    }
}
/* The weights as int8 [out,kh,kw,in] by the scales in sw and, with 4 bits, the multipliers. */
static int8_t *sdq__ly_quantize_weights(sdq_ctx *ctx, const sdq_layer *l, const float *weights) {
    sdq__qrun w;
    memset(&w, 0, sizeof w);
    w.k = ctx->k;
    w.l = l;
    w.x = weights;
    w.q = SDQ__PUSH_N(ctx, int8_t, l->out * sdq__ly_k(l));
    if (w.q) sdq__par_for(ctx, l->out, sdq__ly_quantize_weight_task, &w);
    return w.q;
}

/* ---- INT8 and FAKE forward ---- */

/* run: what quantizes the rows of `in`, NULL if they are there. y half as wide: geglu. */
static void sdq__ly_product(sdq_ctx *ctx, const sdq_layer *l, const sdq_tensor *x, size_t part,
                            const sdq__qinput *in, sdq__qrun *run, const sdq__qweight *weight,
                            const sdq_tensor *res, sdq_tensor *y) {
    sdq__qgemm w;
    memset(&w, 0, sizeof w);
    w.fill = run ? sdq__ly_quantize_rows : NULL;
    w.fill_arg = run;
    w.g = sdq__ly_geom(l, x);
    w.x = in;
    w.w = weight;
    w.sw = sdq_f32(&l->sw);
    w.bias = part == 0 && l->b.data ? sdq_f32(&l->b) : NULL;
    w.res = part == 0 && res ? sdq_f32(res) : NULL;
    w.y = sdq_f32(y);
    w.ldy = sdq__t_chan(y);
    w.m = w.g.n * w.g.oh * w.g.ow;
    w.more = part > 0;
    w.spread = l->spreads;
    w.dy = l->pad[2];           /* of a phase (p,q): p and q, see sdq__ly_phase */
    w.dx = l->pad[3];
    sdq__qgemm_run(ctx, &w, w.ldy < l->out);
}

static sdq_status sdq__ly_alloc_weight(sdq_ctx *ctx, sdq__qweight *w, int heap) {
    const size_t panels = sdq__gemm_panels(w->n);
    const size_t bytes = panels * w->taps * w->quads * SDQ__NR * 4,
                 sums = panels * w->sums * SDQ__NR;
    w->b = heap ? SDQ__NEW_N(ctx, int8_t, bytes) : SDQ__PUSH_N(ctx, int8_t, bytes);
    w->sum = heap ? SDQ__NEW_N(ctx, int32_t, sums) : SDQ__PUSH_N(ctx, int32_t, sums);
    return w->b && w->sum ? SDQ_OK : ctx->status;
}

/* The four phases of a layer that upsamples. */
static sdq_status sdq__ly_forward_phases(sdq_ctx *ctx, const sdq_layer *l, const sdq_tensor *x,
                                         sdq_tensor *y) {
    sdq__qinput in;
    sdq__qrun run;
    size_t i;
    SDQ__TRY(sdq__ly_quantize_begin(ctx, l->phase[0], &l->phase[0]->part[0], x, &run, &in));
    for (i = 0; i < 4; i++) {
        sdq_layer phase = *l->phase[i];
        phase.b = l->b;
        sdq__ly_product(ctx, &phase, x, 0, &in, i ? NULL : &run, &phase.part[0].w, NULL, y);
    }
    return ctx->status;
}

/* The published recipe quantizes results: y = (clamp(rint(y/s) + z) - z) s, in place. While the
 * tape records, mask[i] tells where the gradient passes. */
static sdq_status sdq__ly_quantize_output(sdq_ctx *ctx, const sdq_layer *l, sdq_tensor *y,
                                          uint8_t *mask) {
    const size_t n = sdq_tensor_count(y);
    const sdq__qparam p = sdq__q_from_range(l->out_mn, l->out_mx);
    float *v = sdq_f32(y);
    size_t i;
    if (!l->out_seen)
        return sdq__fail(ctx, SDQ_ERR_NOT_CALIBRATED,
                         "layer %s: its output range was never observed;"
                         " calibrate first",
                         l->name);
    for (i = 0; i < n; i++) {
        const float q = sdq__q_rint(v[i] * p.inv) + (float)p.z;
        const float c = q < 0.0f ? 0.0f : q > 255.0f ? 255.0f : q;
        if (mask) mask[i] = (uint8_t)(q >= 0.0f && q <= 255.0f);
        v[i] = (c - (float)p.z) * p.s;
    }
    return SDQ_OK;
}

static void sdq__ly_observe_output(sdq_ctx *ctx, sdq_layer *l, const sdq_tensor *y) {
    float mn = INFINITY, mx = -INFINITY;
    ctx->k->minmax(sdq_f32(y), sdq_tensor_count(y), &mn, &mx);
    sdq__ly_track(l, l->out_seen, mn, mx, &l->out_mn, &l->out_mx);
    l->out_seen = 1;
}

/* What a FAKE forward leaves for its backward. */
typedef struct sdq__fake { sdq__qinput in[2]; uint8_t *mask; } sdq__fake;

static sdq_status sdq__ly_forward_quant(sdq_ctx *ctx, sdq_layer *l, const sdq_tensor *x,
                                        const sdq_tensor *res, sdq_tensor *y, int fake,
                                        sdq__fake *keep) {
    const int late = l->quant.quantize_output && res;   /* the residual is added afterwards */
    const int ready = sdq__ly_takes(l, x->q);
    sdq__qinput in[2];
    sdq__qrun run[2];
    size_t i;
    const int8_t *q = NULL;
    sdq_mark mark;
    for (i = 0; i < l->parts; i++) {
        if (ready) in[i] = *x->q;
        else SDQ__TRY(sdq__ly_quantize_begin(ctx, l, &l->part[i], x, &run[i], &in[i]));
        if (keep) keep->in[i] = in[i];
    }
    mark = sdq_arena_mark(ctx);     /* packed weights are dropped again, also while recording */
    if (fake) {
        const float *w = sdq__ly_weights(ctx, l);
        if (!w) return ctx->status;
        SDQ__TRY(sdq__ly_weight_scales(ctx, l, w));
        q = sdq__ly_quantize_weights(ctx, l, w);
        if (!q) return ctx->status;
    }
    for (i = 0; i < l->parts; i++) {
        sdq__qweight w = l->part[i].w;
        if (fake) {
            SDQ__TRY(sdq__ly_alloc_weight(ctx, &w, 0));
            sdq__qgemm_pack(ctx, &w, q, l->in, l->part[i].c0, l->part[i].c);
        }
        sdq__ly_product(ctx, l, x, i, &in[i], ready ? NULL : &run[i], &w, late ? NULL : res, y);
    }
    sdq_arena_release(ctx, mark);
    if (l->quant.quantize_output) {
        if (l->observe && fake && !ctx->replay) sdq__ly_observe_output(ctx, l, y);
        SDQ__TRY(sdq__ly_quantize_output(ctx, l, y, keep ? keep->mask : NULL));
        if (late)
            sdq__op_binary(ctx, ctx->k->add, sdq_f32(y), sdq_f32(y), sdq_f32(res),
                           sdq_tensor_count(y));
    }
    return ctx->status;
}

/* ---- FAKE backward ---- */

/* Straight-through through the input quantizer of a static range, with the scale of the forward
 * pass (an observer may have moved on): g = gradient of xh. */
static void sdq__ly_ste_input(sdq_ctx *ctx, sdq__qpart *p, const sdq__qinput *in8,
                              const sdq_tensor *x, const float *g, float *dx) {
    const size_t ld = sdq__t_chan(x), rows = sdq__t_rows(x);
    const float inv = 1.0f / in8->s[0], z = (float)in8->z[0];
    const float at = sdq__ly_one_sided(p) ? 0.0f : z;
    float *ds = sdq__tape_grad(ctx, &p->s);
    double sum = 0.0;
    size_t r, j;
    for (r = 0; r < rows; r++) {
        float row = 0.0f;
        for (j = r * ld + p->c0; j < r * ld + p->c0 + p->c; j++) {
            const float v = sdq_f32(x)[j] * inv, t = sdq__q_rint(v), q = t + z;
            const int in = q >= 0.0f && q <= 255.0f;
            if (in && dx) dx[j] += g[j];
            row += g[j] * (in ? t - v : (q < 0.0f ? 0.0f : 255.0f) - at);
        }
        sum += (double)row;
    }
    if (ds) ds[0] += (float)(sum / sqrt(255.0 * (double)(rows / sdq__t_entries(x) * p->c)));
}

/* And through that of the weights that were quantized, see sdq__gemm_dw_ste. */
static void sdq__ly_fake_weight_gradient(sdq_ctx *ctx, sdq_layer *l, const float *weights,
                                         const sdq_tensor *x, const sdq_tensor *y, const float *dy,
                                         const sdq__fake *keep) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const int delta = l->la.needs_grad || l->lb.needs_grad;
    float *dw = delta ? sdq__ly_zeros(ctx, l->out * sdq__ly_k(l)) : sdq__tape_grad(ctx, &l->w);
    float *ds = sdq__tape_grad(ctx, &l->sw), *sum = ds ? sdq__ly_zeros(ctx, l->out) : NULL;
    size_t i;
    for (i = 0; ctx->status == SDQ_OK && i < l->parts; i++) {
        const sdq__qinput *in = &keep->in[i];
        const sdq__qpart *p = &l->part[i];
        sdq__gemm_dw w;
        memset(&w, 0, sizeof w);
        w.g = sdq__ly_geom(l, x);
        w.q = in->q; w.ldq = in->ld; w.qs = in->s; w.qz = in->z;
        w.blocks = in->blocks;
        w.rows_per_scale = in->per_row ? 1 : in->rows / in->entries;
        w.dy = dy; w.dw = dw; w.ds = sum;
        w.m = sdq__t_rows(y); w.n = w.ldy = l->out;
        w.c = p->c; w.first = p->c0; w.ldw = l->in;
        w.w = weights;
        w.sw = sdq_f32(&l->sw);
        w.mult = l->quant.weight_bits == 4 ? l->mult : NULL;
        w.group = sdq__ly_group_size(l);
        sdq__gemm_dw_run(ctx, &w);
    }
    if (ds && sum) sdq__op_binary(ctx, ctx->k->add, ds, ds, sum, l->out);
    if (delta && ctx->status == SDQ_OK) sdq__ly_delta_gradient(ctx, l, dw);
    sdq_arena_release(ctx, mark);
}

/* Gradients of leaves that have no memory of their own are made before anything is dropped. */
static void sdq__ly_leaf_gradients(sdq_ctx *ctx, sdq_layer *l) {
    size_t i;
    (void)sdq__tape_grad(ctx, &l->w);
    (void)sdq__tape_grad(ctx, &l->la);
    (void)sdq__tape_grad(ctx, &l->lb);
    (void)sdq__tape_grad(ctx, &l->sw);
    for (i = 0; i < l->parts; i++) (void)sdq__tape_grad(ctx, &l->part[i].s);
}

static void sdq__ly_fake_back(sdq_ctx *ctx, sdq__node *n) {
    sdq_layer *l = (sdq_layer *)n->p[0];
    const sdq__fake *keep = (const sdq__fake *)n->p[1];
    sdq_tensor *x = n->x[0], *res = n->x[1];
    const int fixed = sdq__ly_range(l) == SDQ_RANGE_STATIC;
    float *dx = sdq__tape_grad(ctx, x), *db = sdq__tape_grad(ctx, l->b.data ? &l->b : NULL);
    float *dres = sdq__tape_grad(ctx, res), *dy = n->y->grad;
    const size_t count = sdq_tensor_count(n->y);
    const float *weights;
    sdq_mark mark;
    size_t i;
    sdq__ly_leaf_gradients(ctx, l);
    mark = sdq_arena_mark(ctx);
    weights = sdq__ly_weights(ctx, l);
    if (ctx->status != SDQ_OK) return;
    if (dres) sdq__op_binary(ctx, ctx->k->add, dres, dres, dy, count);
    if (keep->mask) {
        float *m = SDQ__PUSH_N(ctx, float, count);
        if (!m) return;
        for (i = 0; i < count; i++) m[i] = keep->mask[i] ? dy[i] : 0.0f;
        dy = m;
    }
    if (dx || (fixed && l->part[0].s.needs_grad)) {
        const int8_t *q = sdq__ly_quantize_weights(ctx, l, weights);
        float *g = fixed ? SDQ__PUSH_N(ctx, float, sdq_tensor_count(x)) : dx;
        if (!q || !g) return;
        sdq__ly_input_gradient(ctx, l, x, n->y, dy, q, g, !fixed);
        for (i = 0; fixed && i < l->parts; i++)
            sdq__ly_ste_input(ctx, &l->part[i], &keep->in[i], x, g, dx);
    }
    if (l->w.needs_grad || l->sw.needs_grad || l->lb.needs_grad)
        sdq__ly_fake_weight_gradient(ctx, l, weights, x, n->y, dy, keep);
    if (db) sdq__gemm_colsum(ctx, db, dy, sdq__t_rows(n->y), l->out);
    sdq_arena_release(ctx, mark);
}

/* ---- forward ---- */

/* Bias correction (Nagel et al., "Data-Free Quantization", arXiv 1906.04721, section 4.2): collect
 * the mean of FLOAT - FAKE per output channel on the same input. */
static void sdq__ly_collect_bias(sdq_ctx *ctx, sdq_layer *l, const sdq_tensor *x,
                                 const sdq_tensor *res, const sdq_tensor *y) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *f = sdq__t_like(ctx, y);
    size_t r, o;
    if (f) {
        sdq__ly_forward_float(ctx, l, x, res, f);
        for (r = 0; r < sdq__t_rows(y); r++)
            for (o = 0; o < l->out; o++)
                l->bias_sum[o] +=
                    (double)sdq_f32(f)[r * l->out + o] - (double)sdq_f32(y)[r * l->out + o];
        l->bias_rows += (double)sdq__t_rows(y);
    }
    sdq_arena_release(ctx, mark);
}

static sdq_tensor *sdq__ly_forward_fake(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, sdq_tensor *res,
                                        sdq_tensor *y) {
    sdq__node *n = NULL;
    sdq__fake *keep = NULL;
    sdq_tensor *leaf = l->w.needs_grad ? &l->w : l->lb.needs_grad ? &l->lb
                     : l->sw.needs_grad ? &l->sw : &l->part[0].s;
    const sdq_mark mark = sdq_arena_mark(ctx);
    n = sdq__tape_push(ctx, sdq__ly_fake_back, y, x, res, leaf, l->b.data ? &l->b : NULL);
    if (n) {
        keep = SDQ__PUSH_N(ctx, sdq__fake, 1);
        if (!keep) return NULL;
        memset(keep, 0, sizeof *keep);
        n->p[0] = l;
        n->p[1] = keep;
        if (l->quant.quantize_output) {
            keep->mask = SDQ__PUSH_N(ctx, uint8_t, sdq_tensor_count(y));
            if (!keep->mask) return NULL;
        }
    }
    if (l->observe && !ctx->replay) {
        sdq__ly_observe_input(ctx, l, x);
        if (l->quant.weight_scale == SDQ_WEIGHT_MOVING
            && sdq__ly_with_weights(ctx, l, sdq__ly_observe_weights) != SDQ_OK)
            return NULL;
    }
    sdq__ly_follow(l);
    if (sdq__ly_forward_quant(ctx, l, x, res, y, 1, keep) != SDQ_OK) return NULL;
    if (l->bias_sum) sdq__ly_collect_bias(ctx, l, x, res, y);
    if (!n) sdq_arena_release(ctx, mark);
    return y;
}

/* What a layer that upsamples cannot do. */
static int sdq__ly_upsample_fits(sdq_ctx *ctx, const sdq_layer *l, const sdq_tensor *res,
                                 sdq_mode mode) {
    const int quantized = mode != SDQ_FLOAT && l->quant.enabled;
    const char *why = mode == SDQ_FAKE && quantized ? "there is no FAKE mode of it"
                    : res && quantized ? "INT8 mode adds no residual to it"
                    : l->phase[0] && !quantized ? "its float weights are gone, INT8 mode is left"
                    : NULL;
    if (why) sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "layer %s: upsamples its input; %s", l->name, why);
    return !why;
}

static sdq_tensor *sdq__ly_evaluate(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, sdq_tensor *res,
                                    sdq_mode mode, int geglu) {
    sdq_tensor *y;
    sdq_mark mark;
    if (!x || ctx->status != SDQ_OK) return NULL;
    if (l->upsamples && !sdq__ly_upsample_fits(ctx, l, res, mode)) return NULL;
    y = sdq__ly_result(ctx, l, x, res, geglu);
    if (!y) return NULL;
    mark = sdq_arena_mark(ctx);
    if (mode == SDQ_FLOAT || !l->quant.enabled) {
        sdq__node *n;
        if (l->upsamples) x = sdq_upsample(ctx, x, y->dim[1], y->dim[2]);
        if (!x) return NULL;
        n = sdq__tape_push(ctx, sdq__ly_float_back, y, x, res, &l->w, l->b.data ? &l->b : NULL);
        if (n) n->p[0] = l;
        if (n && !l->w.data && !sdq__ly_frozen(l) && x->needs_grad) {
            sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: gradients need float weights", l->name);
            return NULL;
        }
        if (l->observe && !ctx->replay && l->quant.enabled) sdq__ly_observe_input(ctx, l, x);
        sdq__ly_forward_float(ctx, l, x, res, y);
        if (!ctx->recording) sdq_arena_release(ctx, mark);
        return ctx->status == SDQ_OK ? y : NULL;
    }
    if (mode == SDQ_FAKE) {
        if (l->w.data || sdq__ly_frozen(l)) return sdq__ly_forward_fake(ctx, l, x, res, y);
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: FAKE mode needs float weights", l->name);
        return NULL;
    }
    if (!sdq__ly_is_int8(l)) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "layer %s: has no int8 weights; convert the model first",
                  l->name);
        return NULL;
    }
    if (l->upsamples ? sdq__ly_forward_phases(ctx, l, x, y) != SDQ_OK
                     : sdq__ly_forward_quant(ctx, l, x, res, y, 0, NULL) != SDQ_OK) return NULL;
    sdq_arena_release(ctx, mark);
    return y;
}

/* What was seen of a layer: its shape, and seconds from before to now. */
static void sdq__ly_report(sdq_profile *p, const sdq_layer *l, sdq_mode mode, const sdq_tensor *x,
                           const sdq_tensor *y, const double *before) {
    sdq_layer_work w;
    size_t i;
    memset(&w, 0, sizeof w);
    w.layer.name = l->name;
    w.layer.in = l->in;
    w.layer.out = l->out;
    w.layer.kernel = (int)l->kh;
    w.layer.stride = (int)l->stride;
    for (i = 0; i < 4; i++) w.layer.pad[i] = (int)l->pad[i];
    w.layer.no_bias = !l->b.data;
    w.x = x;
    w.y = y;
    w.int8 = mode != SDQ_FLOAT && l->quant.enabled;
    for (i = 0; i < SDQ_WORK_COUNT; i++) w.seconds[i] = p->seconds[i] - before[i];
    p->layer(p->user, &w);
}

/* y = layer(x), half as wide through geglu; reported if somebody listens. */
static sdq_tensor *sdq__ly_forward(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, sdq_tensor *res,
                                   sdq_mode mode, int geglu) {
    sdq_profile *p = ctx->profile && ctx->profile->layer ? ctx->profile : NULL;
    double before[SDQ_WORK_COUNT];
    sdq_tensor *y;
    if (!p) return sdq__ly_evaluate(ctx, l, x, res, mode, geglu);
    (void)sdq__par_work(p, 0, p->work);         /* bring the seconds up to now */
    memcpy(before, p->seconds, sizeof before);
    y = sdq__ly_evaluate(ctx, l, x, res, mode, geglu);
    (void)sdq__par_work(p, 0, p->work);
    if (y) sdq__ly_report(p, l, mode, x, y, before);
    return y;
}

/* Outputs of named layers that somebody wants to see: distillation of inner layers. */
typedef struct sdq__tap { const char *name; sdq_tensor *y; } sdq__tap;
typedef struct sdq__taps { sdq__tap *tap; size_t n; } sdq__taps;

/* Whether a sum or a product of these numbers can still be finite. */
static int sdq__ly_finite(const float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i++)
        if (!(x[i] > -1e30f && x[i] < 1e30f)) return 0;
    return 1;
}

SDQ_API sdq_tensor *sdq_layer_forward(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, sdq_tensor *res,
                                      sdq_mode mode) {
    sdq_tensor *y = sdq__ly_forward(ctx, l, x, res, mode, 0);
    size_t i;
    if (ctx->watch && !*ctx->watch && y && !sdq__ly_finite(sdq_f32(y), sdq_tensor_count(y)))
        *ctx->watch = l->name;
    for (i = 0; ctx->taps && i < ctx->taps->n; i++) {
        sdq__tap *t = &ctx->taps->tap[i];
        if (!y || strcmp(t->name, l->name) != 0) continue;
        t->y = y;
    }
    return y;
}

/* sdq_geglu(layer(x)), at once where nobody needs the product itself. */
static sdq_tensor *sdq__ly_geglu(sdq_ctx *ctx, sdq_layer *l, sdq_tensor *x, sdq_mode mode) {
    const int at_once = !ctx->recording && !ctx->taps && !ctx->watch && mode != SDQ_FAKE
                     && l->parts == 1 && !l->quant.quantize_output && sdq__ly_taps(l) == 1
                     && l->out % (2 * SDQ__NR) == 0 && l->in <= SDQ__GEMM_KB;
    return at_once ? sdq__ly_forward(ctx, l, x, NULL, mode, 1)
                   : sdq_geglu(ctx, sdq_layer_forward(ctx, l, x, NULL, mode));
}

/* What the int8 weights were made from. */
static void sdq__ly_drop_weights(sdq_ctx *ctx, sdq_layer *l) {
    size_t i;
    sdq__free(ctx, l->w.data);
    sdq__free(ctx, l->wp);
    sdq__free(ctx, l->wh);
    l->wp = NULL;
    l->wh = NULL;
    for (i = 0; i < 3; i++) {
        sdq_tensor *t = i == 0 ? &l->w : i == 1 ? &l->la : &l->lb;
        if (i) sdq__free(ctx, t->data);
        t->data = NULL;
        t->needs_grad = 0;
    }
}

/* Pack the int8 weights q [out,kh,kw,in] into the parts; all of them or none. */
static sdq_status sdq__ly_set_int8(sdq_ctx *ctx, sdq_layer *l, const int8_t *q) {
    sdq_status st = SDQ_OK;
    size_t i;
    for (i = 0; i < l->parts && st == SDQ_OK; i++) {
        sdq__ly_free_weight(ctx, &l->part[i].w);
        st = sdq__ly_alloc_weight(ctx, &l->part[i].w, 1);
        if (st == SDQ_OK)
            sdq__qgemm_pack(ctx, &l->part[i].w, q, l->in, l->part[i].c0, l->part[i].c);
    }
    if (st != SDQ_OK) {
        for (i = 0; i < l->parts; i++) sdq__ly_free_weight(ctx, &l->part[i].w);
        return st;
    }
    sdq__ly_drop_weights(ctx, l);
    return SDQ_OK;
}

/* ---- the phases of a layer that upsamples ---- */

/* Phase (p,q) without weights: as the layer is, with the range of its input. Its padding lets row
 * y read y+p-1 and y+p: 1-p rows above, p below. */
static sdq_status sdq__ly_phase(sdq_ctx *ctx, const sdq_layer *l, int p, int q, sdq_layer **out) {
    sdq_layer_desc d;
    sdq__qpart *part;
    memset(&d, 0, sizeof d);
    d.name = l->name;
    d.in = l->in;
    d.out = l->out;
    d.kernel = 2;
    d.pad[0] = 1 - p; d.pad[1] = 1 - q; d.pad[2] = p; d.pad[3] = q;
    d.no_bias = 1;
    SDQ__TRY(sdq__ly_create(ctx, &d, 1, out));
    (*out)->spreads = 1;
    (*out)->quant = l->quant;
    (*out)->quant.range = sdq__ly_range(l);
    sdq__ly_set_parts(*out);
    part = &(*out)->part[0];
    part->seen = l->part[0].seen;
    part->z = l->part[0].z;
    if (!ctx->dry) sdq_f32(&part->s)[0] = sdq_f32(&l->part[0].s)[0];
    return SDQ_OK;
}

typedef struct sdq__fold {
    const struct sdq__kernels *k;
    const float *w;
    float *dst;
    size_t in, p, q;
} sdq__fold;

/* Output channel o of w[out][3][3][in] -> dst[out][2][2][in]. */
static void sdq__ly_fold_task(void *arg, size_t o, int thread) {
    const sdq__fold *f = (const sdq__fold *)arg;
    float *dst = f->dst + o * 4 * f->in;
    size_t a, b;
    (void)thread;
    memset(dst, 0, 4 * f->in * sizeof *dst);
    for (a = 0; a < 3; a++)
        for (b = 0; b < 3; b++) {
            float *to = dst + ((a + 1 - f->p) / 2 * 2 + (b + 1 - f->q) / 2) * f->in;
            f->k->add(to, to, f->w + (o * 9 + a * 3 + b) * f->in, f->in);
        }
}

/* All four of them or none. */
static sdq_status sdq__ly_set_phases(sdq_ctx *ctx, sdq_layer *l, const float *w) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__fold f;
    size_t i;
    f.k = ctx->k; f.w = w; f.in = l->in;
    f.dst = SDQ__PUSH_N(ctx, float, l->out * 4 * l->in);
    for (i = 0; i < 4 && ctx->status == SDQ_OK; i++) {
        const int8_t *q = NULL;
        f.p = i / 2;
        f.q = i % 2;
        if (sdq__ly_phase(ctx, l, (int)f.p, (int)f.q, &l->phase[i]) != SDQ_OK) break;
        sdq__par_for(ctx, l->out, sdq__ly_fold_task, &f);
        if (sdq__ly_weight_scales(ctx, l->phase[i], f.dst) == SDQ_OK)
            q = sdq__ly_quantize_weights(ctx, l->phase[i], f.dst);
        if (q) (void)sdq__ly_set_int8(ctx, l->phase[i], q);
    }
    sdq_arena_release(ctx, mark);
    if (ctx->status == SDQ_OK) {
        sdq__ly_drop_weights(ctx, l);
        return SDQ_OK;
    }
    for (i = 0; i < 4; i++) {
        sdq_layer_free(ctx, l->phase[i]);
        l->phase[i] = NULL;
    }
    return ctx->status;
}

SDQ_API sdq_status sdq_layer_convert(sdq_ctx *ctx, sdq_layer *l) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const float *w;
    const int8_t *q;
    sdq_status st;
    if (!l->quant.enabled || (!l->w.data && !sdq__ly_frozen(l))) return SDQ_OK;
    if (sdq__ly_range(l) == SDQ_RANGE_STATIC && !l->part[0].seen)
        return sdq__fail(ctx, SDQ_ERR_NOT_CALIBRATED,
                         "layer %s: its input range was never observed;"
                         " calibrate first",
                         l->name);
    sdq__ly_follow(l);
    w = sdq__ly_weights(ctx, l);
    if (l->upsamples) {
        st = w ? sdq__ly_set_phases(ctx, l, w) : ctx->status;
    } else {
        st = w ? sdq__ly_weight_scales(ctx, l, w) : ctx->status;
        q = st == SDQ_OK ? sdq__ly_quantize_weights(ctx, l, w) : NULL;
        if (q) st = sdq__ly_set_int8(ctx, l, q);
    }
    sdq_arena_release(ctx, mark);
    return st == SDQ_OK ? ctx->status : st;
}

/* ===========================================================================
 * >>io   whole files in, whole files out
 *
 * Reading takes a file at once, up to a limit. Writing goes to path + ".tmp", is flushed to the
 * disk where the platform has fsync, and replaces `path` by a rename only when everything
 * succeeded: a reader sees the old file or the new one, never half of one.
 * ======================================================================== */

#if SDQ__MMAP
#include <dirent.h>
/* -std=c99 hides fsync unless POSIX is asked for; fflush and fclose still see a full disk */
#if defined(_DEFAULT_SOURCE) || defined(__APPLE__) || \
    (defined(_POSIX_C_SOURCE) && _POSIX_C_SOURCE >= 200112L)
#define SDQ__FSYNC(file) fsync(fileno(file))
#endif
#endif
#ifndef SDQ__FSYNC
#define SDQ__FSYNC(file) 0
#endif

static int sdq__io_exists(const char *path) {
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

/* Something that can be read, not a folder: those open, but give no byte and no end. */
static int sdq__io_is_file(const char *path) {
    FILE *f = fopen(path, "rb");
    const int is = f && (fgetc(f) != EOF || feof(f));
    if (f) fclose(f);
    return is;
}

/* a + b + c as a new string. */
static char *sdq__io_join(sdq_ctx *ctx, const char *a, const char *b, const char *c) {
    const size_t na = strlen(a), nb = strlen(b), nc = strlen(c);
    char *s = SDQ__NEW_N(ctx, char, na + nb + nc + 1);
    if (!s) return NULL;
    memcpy(s, a, na);
    memcpy(s + na, b, nb);
    memcpy(s + na + nb, c, nc);
    return s;
}

static int sdq__io_starts(const char *s, const char *with) {
    return strncmp(s, with, strlen(with)) == 0;
}
static int sdq__io_ends(const char *s, const char *end) {
    const size_t n = strlen(s), m = strlen(end);
    return n >= m && memcmp(s + n - m, end, m) == 0;
}

/* A name from a file that stays inside its folder: relative, no "..", no drive, no backslash. */
static int sdq__io_safe_name(const char *name, int allow_folders) {
    const char *p;
    if (!*name || *name == '/' || strchr(name, '\\') || strchr(name, ':')) return 0;
    if (!allow_folders && strchr(name, '/')) return 0;
    for (p = name; (p = strstr(p, "..")) != NULL; p += 2) {
        const int starts = p == name || p[-1] == '/', ends = p[2] == 0 || p[2] == '/';
        if ((starts && ends) || !allow_folders) return 0;
    }
    return 1;
}

/* Everything f holds, growing as it comes, so that a lying file size cannot hurt. */
static sdq_status sdq__io_slurp(sdq_ctx *ctx, FILE *f, const char *path, size_t limit,
                                char **out, size_t *len) {
    char *buf = NULL;
    size_t cap = 0, n = 0, got;
    sdq_status st = SDQ_OK;
    do {
        if (!sdq__grow(ctx, (void **)(void *)&buf, &cap, n + 65536, 1)) {
            st = SDQ_ERR_OOM;
            goto done;
        }
        got = fread(buf + n, 1, cap - n - 1, f);
        n += got;
        if (n > limit) {
            st = sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: larger than the limit of %zu bytes",
                           path, limit);
            goto done;
        }
    } while (got);
    if (ferror(f)) st = sdq__fail(ctx, SDQ_ERR_IO, "%s: read error", path);
done:
    if (st != SDQ_OK) { sdq__free(ctx, buf); return st; }
    buf[n] = 0;
    *out = buf;
    *len = n;
    return SDQ_OK;
}

/* The file as a new buffer with a 0 behind its last byte. */
static sdq_status sdq__io_read(sdq_ctx *ctx, const char *path, size_t limit,
                               char **out, size_t *len) {
    FILE *f = fopen(path, "rb");
    sdq_status st;
    *out = NULL;
    *len = 0;
    if (!f) return sdq__fail(ctx, SDQ_ERR_IO, "%s: cannot be opened for reading", path);
    st = sdq__io_slurp(ctx, f, path, limit, out, len);
    fclose(f);
    return st;
}

/* A file that is being written. `bad` is sticky: check once, in sdq__io_finish. */
typedef struct sdq__io_out { FILE *f; const char *path; char *tmp; int bad; } sdq__io_out;

static sdq_status sdq__io_create(sdq_ctx *ctx, const char *path, sdq__io_out *o) {
    memset(o, 0, sizeof *o);
    o->path = path;
    o->tmp = sdq__io_join(ctx, path, ".tmp", "");
    if (!o->tmp) return SDQ_ERR_OOM;
    o->f = fopen(o->tmp, "wb");
    if (o->f) return SDQ_OK;
    sdq__fail(ctx, SDQ_ERR_IO, "%s: cannot be created (folder missing or not writable?)", o->tmp);
    sdq__free(ctx, o->tmp);
    o->tmp = NULL;
    return SDQ_ERR_IO;
}

static void sdq__io_put(sdq__io_out *o, const void *data, size_t bytes) {
    if (bytes && !o->bad && fwrite(data, 1, bytes, o->f) != bytes) o->bad = 1;
}

/* Close; rename when st and every write were fine, remove the temporary file otherwise. */
static sdq_status sdq__io_finish(sdq_ctx *ctx, sdq__io_out *o, sdq_status st) {
    if (!o->f) return st;
    if (st == SDQ_OK && !o->bad && (fflush(o->f) != 0 || SDQ__FSYNC(o->f) != 0)) o->bad = 1;
    if (fclose(o->f) != 0) o->bad = 1;
    if (st == SDQ_OK && o->bad)
        st = sdq__fail(ctx, SDQ_ERR_IO, "%s: write error; is the disk full?", o->path);
#ifdef _WIN32
    if (st == SDQ_OK) (void)remove(o->path);    /* rename does not replace there */
#endif
    if (st == SDQ_OK && rename(o->tmp, o->path) != 0)
        st = sdq__fail(ctx, SDQ_ERR_IO, "%s: cannot be renamed from %s", o->path, o->tmp);
    if (st != SDQ_OK) (void)remove(o->tmp);
    sdq__free(ctx, o->tmp);
    memset(o, 0, sizeof *o);
    return st;
}

/* Write a finished buffer. */
static sdq_status sdq__io_write(sdq_ctx *ctx, const char *path, const void *data, size_t bytes) {
    sdq__io_out o;
    SDQ__TRY(sdq__io_create(ctx, path, &o));
    sdq__io_put(&o, data, bytes);
    return sdq__io_finish(ctx, &o, SDQ_OK);
}

/* ===========================================================================
 * >>json   a strict reader and a string builder
 *
 * Reads RFC 8259 and nothing more: no comments, no trailing commas, no NaN. Text must be valid
 * UTF-8, \u surrogates must pair, equal keys in one object are an error. Values are nodes of a
 * tree in one allocation: a first pass counts them, so that the size is known. Depth is limited
 * to 64, the number of values to 2^22. Numbers are doubles: integers are exact up to 2^53.
 * ======================================================================== */

#define SDQ__JSON_DEPTH 64
#define SDQ__JSON_NODES ((size_t)1 << 22)

enum { SDQ__JS_NULL = 0, SDQ__JS_BOOL, SDQ__JS_NUMBER, SDQ__JS_STRING, SDQ__JS_ARRAY,
       SDQ__JS_OBJECT };

typedef struct sdq__json {
    int kind;
    double num;                 /* NUMBER; BOOL: 0 or 1 */
    const char *str;            /* STRING: UTF-8 with a 0 behind it; else NULL */
    size_t len;                 /* bytes of str */
    const char *key;            /* name inside an object; else NULL */
    struct sdq__json *child, *next, *parent;
    size_t count;               /* ARRAY, OBJECT: number of children */
} sdq__json;

typedef struct sdq__js_reader {
    sdq_ctx *ctx;
    const char *text, *p, *end, *what;
    sdq__json *node;            /* next unused node */
    char *str;                  /* next unused byte for strings */
    const sdq__json **seen;     /* hash set of (parent, key) */
    size_t seen_mask;
} sdq__js_reader;

static sdq_status sdq__js_fail(sdq__js_reader *r, const char *why) {
    size_t line = 1;
    const char *c;
    for (c = r->text; c < r->p && c < r->end; c++) line += *c == '\n';
    return sdq__fail(r->ctx, SDQ_ERR_FORMAT, "%s: not valid JSON: %s in line %zu (byte %zu)",
                     r->what, why, line, (size_t)(r->p - r->text));
}

static void sdq__js_space(sdq__js_reader *r) {
    while (r->p < r->end && *r->p && strchr(" \n\r\t", *r->p)) r->p++;
}

static int sdq__js_accept(sdq__js_reader *r, char c) {
    if (r->p == r->end || *r->p != c) return 0;
    r->p++;
    return 1;
}

/* Values in the text, at most: every value but the first follows one of [ { , outside strings. */
static size_t sdq__js_count(const char *text, size_t len) {
    size_t i, n = 1;
    int quoted = 0;
    for (i = 0; i < len; i++) {
        const char c = text[i];
        if (quoted && c == '\\') i++;
        else if (c == '"') quoted = !quoted;
        else if (!quoted) n += c == ',' || c == '[' || c == '{';
    }
    return n;
}

/* Length of the valid UTF-8 sequence at p (Unicode table 3-7), 0 when there is none. */
static size_t sdq__js_utf8(const char *p, const char *end, uint32_t *code) {
    const unsigned char *s = (const unsigned char *)p;
    const size_t left = (size_t)(end - p);
    size_t n, i;
    uint32_t c, low;
    if (left == 0) return 0;
    c = s[0];
    if (c < 0x80) { *code = c; return 1; }
    if (c < 0xc2 || c > 0xf4) return 0;
    n = c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    low = n == 2 ? 0x80u : n == 3 ? 0x800u : 0x10000u;
    if (left < n) return 0;
    c &= n == 2 ? 0x1fu : n == 3 ? 0x0fu : 0x07u;
    for (i = 1; i < n; i++) {
        if ((s[i] & 0xc0u) != 0x80u) return 0;
        c = (c << 6) | (s[i] & 0x3fu);
    }
    if (c < low || c > 0x10ffffu || (c >= 0xd800u && c < 0xe000u)) return 0;
    *code = c;
    return n;
}

static int sdq__js_is_utf8(const char *s) {
    const char *end = s + strlen(s);
    uint32_t code;
    while (s < end) {
        const size_t n = sdq__js_utf8(s, end, &code);
        if (!n) return 0;
        s += n;
    }
    return 1;
}

/* Write a code point, return its bytes (1..4). */
static size_t sdq__js_put_utf8(char *out, uint32_t c) {
    unsigned char *o = (unsigned char *)out;
    if (c < 0x80) { o[0] = (unsigned char)c; return 1; }
    if (c < 0x800) {
        o[0] = (unsigned char)(0xc0u | (c >> 6));
        o[1] = (unsigned char)(0x80u | (c & 0x3fu));
        return 2;
    }
    if (c < 0x10000) {
        o[0] = (unsigned char)(0xe0u | (c >> 12));
        o[1] = (unsigned char)(0x80u | ((c >> 6) & 0x3fu));
        o[2] = (unsigned char)(0x80u | (c & 0x3fu));
        return 3;
    }
    o[0] = (unsigned char)(0xf0u | (c >> 18));
    o[1] = (unsigned char)(0x80u | ((c >> 12) & 0x3fu));
    o[2] = (unsigned char)(0x80u | ((c >> 6) & 0x3fu));
    o[3] = (unsigned char)(0x80u | (c & 0x3fu));
    return 4;
}

static int sdq__js_hex4(sdq__js_reader *r, uint32_t *out) {
    int i;
    uint32_t v = 0;
    if (r->end - r->p < 4) return 0;
    for (i = 0; i < 4; i++) {
        const char c = *r->p++;
        if (c >= '0' && c <= '9') v = v * 16 + (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f') v = v * 16 + (uint32_t)(c - 'a' + 10);
        else if (c >= 'A' && c <= 'F') v = v * 16 + (uint32_t)(c - 'A' + 10);
        else return 0;
    }
    *out = v;
    return 1;
}

/* The escape behind a backslash. */
static sdq_status sdq__js_escape(sdq__js_reader *r) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    uint32_t c, low;
    const char *at;
    if (r->p == r->end) return sdq__js_fail(r, "the text ends inside a string");
    if (*r->p != 'u') {
        at = *r->p ? strchr(from, *r->p) : NULL;
        if (!at) return sdq__js_fail(r, "unknown escape");
        *r->str++ = to[at - from];
        r->p++;
        return SDQ_OK;
    }
    r->p++;
    if (!sdq__js_hex4(r, &c)) return sdq__js_fail(r, "\\u needs four hexadecimal digits");
    if (c >= 0xd800u && c < 0xe000u) {
        if (c >= 0xdc00u || r->end - r->p < 2 || r->p[0] != '\\' || r->p[1] != 'u')
            return sdq__js_fail(r, "half of a surrogate pair");
        r->p += 2;
        if (!sdq__js_hex4(r, &low) || low < 0xdc00u || low > 0xdfffu)
            return sdq__js_fail(r, "half of a surrogate pair");
        c = 0x10000u + ((c - 0xd800u) << 10) + (low - 0xdc00u);
    }
    r->str += sdq__js_put_utf8(r->str, c);
    return SDQ_OK;
}

/* A string whose opening quote has been read. Decoding never makes it longer. */
static sdq_status sdq__js_read_string(sdq__js_reader *r, const char **str, size_t *len) {
    char *const start = r->str;
    uint32_t code;
    for (;;) {
        size_t n;
        if (r->p == r->end) return sdq__js_fail(r, "the text ends inside a string");
        if (*r->p == '"') break;
        if (*r->p == '\\') {
            r->p++;
            SDQ__TRY(sdq__js_escape(r));
            continue;
        }
        n = sdq__js_utf8(r->p, r->end, &code);
        if (n == 0) return sdq__js_fail(r, "a byte that is not UTF-8");
        if (code < 0x20) return sdq__js_fail(r, "a control character inside a string");
        memcpy(r->str, r->p, n);
        r->str += n;
        r->p += n;
    }
    r->p++;
    *str = start;
    *len = (size_t)(r->str - start);
    *r->str++ = 0;
    return SDQ_OK;
}

/* Convert digits that are known to be a JSON number. strtod wants the locale's decimal point. */
static sdq_status sdq__js_convert(sdq__js_reader *r, const char *from, double *out) {
    char buf[512], half[16];
    size_t n = 0, point;
    (void)snprintf(half, sizeof half, "%.1f", 0.5);
    point = strlen(half) - 2;                               /* "0.5": what stands between */
    if ((size_t)(r->p - from) > sizeof buf - sizeof half)
        return sdq__js_fail(r, "a number of more than 490 characters");
    for (; from < r->p; from++) {
        if (*from != '.') { buf[n++] = *from; continue; }
        memcpy(buf + n, half + 1, point);
        n += point;
    }
    buf[n] = 0;
    *out = strtod(buf, NULL);
    return SDQ_OK;
}

static size_t sdq__js_digits(sdq__js_reader *r) {
    const char *from = r->p;
    while (r->p < r->end && *r->p >= '0' && *r->p <= '9') r->p++;
    return (size_t)(r->p - from);
}

static sdq_status sdq__js_read_number(sdq__js_reader *r, double *out) {
    const char *from = r->p, *digits;
    (void)sdq__js_accept(r, '-');
    digits = r->p;
    if (sdq__js_digits(r) == 0) return sdq__js_fail(r, "a value is missing");
    if (*digits == '0' && r->p - digits > 1) return sdq__js_fail(r, "a number with leading zeros");
    if (sdq__js_accept(r, '.') && sdq__js_digits(r) == 0)
        return sdq__js_fail(r, "no digit behind a decimal point");
    if (sdq__js_accept(r, 'e') || sdq__js_accept(r, 'E')) {
        if (!sdq__js_accept(r, '+')) (void)sdq__js_accept(r, '-');
        if (sdq__js_digits(r) == 0) return sdq__js_fail(r, "no digit in an exponent");
    }
    return sdq__js_convert(r, from, out);
}

static int sdq__js_word(sdq__js_reader *r, const char *word) {
    const size_t n = strlen(word);
    if ((size_t)(r->end - r->p) < n || memcmp(r->p, word, n) != 0) return 0;
    r->p += n;
    return 1;
}

/* FNV-1a, the usual 64-bit constants, with its high half mixed down. */
static uint64_t sdq__js_hash(const void *data, size_t n, uint64_t seed) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t h = UINT64_C(14695981039346656037) ^ seed;
    size_t i;
    for (i = 0; i < n; i++) h = (h ^ p[i]) * UINT64_C(1099511628211);
    return h ^ (h >> 29);
}

/* Enter a member's key; 0 if its object has that key already. */
static int sdq__js_enter_key(sdq__js_reader *r, const sdq__json *v) {
    uint64_t h = sdq__js_hash(v->key, strlen(v->key), (uint64_t)(uintptr_t)v->parent);
    for (;; h++) {
        const sdq__json **slot = &r->seen[(size_t)h & r->seen_mask];
        if (!*slot) { *slot = v; return 1; }
        if ((*slot)->parent == v->parent && strcmp((*slot)->key, v->key) == 0) return 0;
    }
}

static sdq_status sdq__js_read_key(sdq__js_reader *r, sdq__json *v) {
    size_t len;
    sdq__js_space(r);
    if (!sdq__js_accept(r, '"')) return sdq__js_fail(r, "a key in quotes is missing");
    SDQ__TRY(sdq__js_read_string(r, &v->key, &len));
    if (strlen(v->key) != len) return sdq__js_fail(r, "a zero byte in a key");
    if (!sdq__js_enter_key(r, v)) return sdq__js_fail(r, "the same key twice in one object");
    sdq__js_space(r);
    if (!sdq__js_accept(r, ':')) return sdq__js_fail(r, "a ':' is missing behind a key");
    return SDQ_OK;
}

/* The value at r->p; an array or object is only opened. */
static sdq_status sdq__js_read_value(sdq__js_reader *r, sdq__json *v) {
    sdq__js_space(r);
    if (sdq__js_accept(r, '{')) { v->kind = SDQ__JS_OBJECT; return SDQ_OK; }
    if (sdq__js_accept(r, '[')) { v->kind = SDQ__JS_ARRAY; return SDQ_OK; }
    if (sdq__js_accept(r, '"')) {
        v->kind = SDQ__JS_STRING;
        return sdq__js_read_string(r, &v->str, &v->len);
    }
    if (sdq__js_word(r, "null")) return SDQ_OK;
    v->kind = SDQ__JS_BOOL;
    if (sdq__js_word(r, "false")) return SDQ_OK;
    v->num = 1;
    if (sdq__js_word(r, "true")) return SDQ_OK;
    v->kind = SDQ__JS_NUMBER;
    return sdq__js_read_number(r, &v->num);
}

/* Read all values in order; `open` is the innermost array or object that is not closed yet. */
static sdq_status sdq__js_read_tree(sdq__js_reader *r) {
    sdq__json *open = NULL, *last = NULL;       /* last: the newest child of open */
    size_t depth = 0;
    do {
        sdq__json *v;
        int closes;
        sdq__js_space(r);
        closes = open && sdq__js_accept(r, open->kind == SDQ__JS_OBJECT ? '}' : ']');
        if (closes) {
            last = open;
            open = open->parent;
            depth--;
            continue;
        }
        if (last && !sdq__js_accept(r, ','))
            return sdq__js_fail(r, "a ',' or a bracket is missing");
        v = r->node++;
        v->parent = open;
        if (open && open->kind == SDQ__JS_OBJECT) SDQ__TRY(sdq__js_read_key(r, v));
        SDQ__TRY(sdq__js_read_value(r, v));
        if (last) last->next = v;
        else if (open) open->child = v;
        if (open) open->count++;
        last = v;
        if (v->kind >= SDQ__JS_ARRAY) {
            if (++depth > SDQ__JSON_DEPTH) return sdq__js_fail(r, "more than 64 levels");
            open = v;
            last = NULL;
        }
    } while (open);
    sdq__js_space(r);
    return r->p == r->end ? SDQ_OK : sdq__js_fail(r, "text behind the value");
}

static void sdq__js_free(sdq_ctx *ctx, sdq__json *root) { sdq__free(ctx, root); }

/* Parse len bytes; `what` names the text in error sentences. Free the tree with sdq__js_free. */
static sdq_status sdq__js_parse(sdq_ctx *ctx, const char *text, size_t len, const char *what,
                                sdq__json **out) {
    const size_t nodes = sdq__js_count(text, len);
    size_t slots = 16, bytes;
    sdq__js_reader r;
    sdq__json *root = NULL;
    sdq_status st = SDQ_ERR_OOM;
    *out = NULL;
    memset(&r, 0, sizeof r);
    r.ctx = ctx;
    r.text = r.p = text;
    r.end = text + len;
    r.what = what;
    if (nodes > SDQ__JSON_NODES) return sdq__js_fail(&r, "more than 4194304 values");
    while (slots < 2 * nodes) slots *= 2;
    r.seen_mask = slots - 1;
    bytes = nodes * sizeof(sdq__json);
    if (len > SIZE_MAX / 2) return sdq__js_fail(&r, "a text too long");
    root = (sdq__json *)sdq__alloc(ctx, bytes + len + 1, 1);    /* nodes, then all strings */
    r.seen = SDQ__NEW_N(ctx, const sdq__json *, slots);
    if (!root || !r.seen) goto done;
    r.node = root;
    r.str = (char *)root + bytes;
    st = sdq__js_read_tree(&r);
done:
    sdq__free(ctx, (void *)r.seen);
    if (st == SDQ_OK) *out = root;
    else sdq__js_free(ctx, root);
    return st;
}

/* Read and parse a file of at most 2^27 bytes. */
static sdq_status sdq__js_load(sdq_ctx *ctx, const char *path, sdq__json **out) {
    char *text;
    size_t len;
    sdq_status st;
    *out = NULL;
    SDQ__TRY(sdq__io_read(ctx, path, (size_t)1 << 27, &text, &len));
    st = sdq__js_parse(ctx, text, len, path, out);
    sdq__free(ctx, text);
    return st;
}

/* The member of that key; NULL when there is none or obj is no object (or NULL). */
static const sdq__json *sdq__js_get(const sdq__json *obj, const char *key) {
    const sdq__json *v;
    if (!obj || obj->kind != SDQ__JS_OBJECT) return NULL;
    for (v = obj->child; v; v = v->next) if (strcmp(v->key, key) == 0) return v;
    return NULL;
}

/* Members by type; def when missing or of another type. */
static double sdq__js_double(const sdq__json *obj, const char *key, double def) {
    const sdq__json *v = sdq__js_get(obj, key);
    return v && v->kind == SDQ__JS_NUMBER ? v->num : def;
}
static int sdq__js_int(const sdq__json *obj, const char *key, int def) {
    const double v = sdq__js_double(obj, key, def);
    return v >= INT_MIN && v <= INT_MAX && v == floor(v) ? (int)v : def;
}
static int sdq__js_bool(const sdq__json *obj, const char *key, int def) {
    const sdq__json *v = sdq__js_get(obj, key);
    return v && v->kind == SDQ__JS_BOOL ? v->num != 0 : def;
}
static const char *sdq__js_string(const sdq__json *obj, const char *key, const char *def) {
    const sdq__json *v = sdq__js_get(obj, key);
    return v && v->kind == SDQ__JS_STRING ? v->str : def;
}
/* v as a size up to 2^53; 0 and *out untouched when it is none. */
static int sdq__js_size(const sdq__json *v, size_t *out) {
    if (!v || v->kind != SDQ__JS_NUMBER) return 0;
    if (!(v->num >= 0) || v->num > 9007199254740992.0 || v->num != floor(v->num)) return 0;
    if (v->num >= (double)SIZE_MAX) return 0;
    *out = (size_t)v->num;
    return 1;
}

/* A growing string, always ending in 0 once something was added (s is NULL before).
 * When memory is short the context holds the error and `bad` is set. */
typedef struct sdq__str { char *s; size_t len, cap; int bad; } sdq__str;

static void sdq__str_add(sdq_ctx *ctx, sdq__str *b, const char *data, size_t n) {
    if (b->bad) return;
    if (n > SIZE_MAX / 4 || !sdq__grow(ctx, (void **)(void *)&b->s, &b->cap, b->len + n + 1, 1)) {
        b->bad = 1;
        return;
    }
    if (n) memcpy(b->s + b->len, data, n);
    b->len += n;
    b->s[b->len] = 0;
}

SDQ__PRINTF(3, 4)
static void sdq__str_format(sdq_ctx *ctx, sdq__str *b, const char *format, ...) {
    va_list args;
    int n;
    va_start(args, format);
    n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0 || b->bad) { b->bad = 1; return; }
    if (!sdq__grow(ctx, (void **)(void *)&b->s, &b->cap, b->len + (size_t)n + 1, 1)) {
        b->bad = 1;
        return;
    }
    va_start(args, format);
    (void)vsnprintf(b->s + b->len, (size_t)n + 1, format, args);
    va_end(args);
    b->len += (size_t)n;
}

/* A number with `digits` significant digits (17: a double comes back equal, 9: a float) and a
 * decimal point in every locale; null when it is not finite. */
static void sdq__str_number(sdq_ctx *ctx, sdq__str *b, double x, int digits) {
    char buf[64];
    size_t i, n = 0;
    if (!(x - x == 0)) { sdq__str_add(ctx, b, "null", 4); return; }
    (void)snprintf(buf, sizeof buf, "%.*g", digits, x);
    for (i = 0; buf[i]; i++) {
        if (strchr("0123456789+-e", buf[i])) buf[n++] = buf[i];
        else if (n == 0 || buf[n - 1] != '.') buf[n++] = '.';   /* may have several bytes */
    }
    sdq__str_add(ctx, b, buf, n);
}

/* A JSON string in quotes. Bytes that are not UTF-8 become U+FFFD. */
static void sdq__str_json(sdq_ctx *ctx, sdq__str *b, const char *s) {
    const char *end = s + strlen(s), *from = s;
    uint32_t code;
    sdq__str_add(ctx, b, "\"", 1);
    while (s < end) {
        const size_t n = sdq__js_utf8(s, end, &code);
        if (n && code >= 0x20 && code != '"' && code != '\\') { s += n; continue; }
        sdq__str_add(ctx, b, from, (size_t)(s - from));
        if (n == 0) sdq__str_add(ctx, b, "\xef\xbf\xbd", 3);
        else if (code >= 0x20) sdq__str_format(ctx, b, "\\%c", (int)code);
        else if (code == '\n') sdq__str_add(ctx, b, "\\n", 2);
        else sdq__str_format(ctx, b, "\\u%04x", (unsigned)code);
        s += n ? n : 1;
        from = s;
    }
    sdq__str_add(ctx, b, from, (size_t)(s - from));
    sdq__str_add(ctx, b, "\"", 1);
}

static void sdq__str_free(sdq_ctx *ctx, sdq__str *b) {
    sdq__free(ctx, b->s);
    memset(b, 0, sizeof *b);
}

/* ===========================================================================
 * >>safetensors   named arrays in a file
 *
 * Format (safetensors tensor.rs): u64 length of a JSON header, the header (it may end in spaces),
 * the data. The header maps a name to {"dtype", "shape", "data_offsets": [begin, end]} and
 * "__metadata__" to strings. The arrays must fill the data without holes or overlap, and each
 * must have exactly the bytes of its shape. All of that is checked before an entry is given out;
 * the sentences use the error names of the reference implementation.
 * ======================================================================== */

#define SDQ__ST_HEADER_MAX ((size_t)100000000)

struct sdq_file {
    char *path;
    char *bytes;                /* the mapping or the heap copy */
    size_t size;
    int mapped;
    sdq__json *header;
    sdq_entry *entries;         /* by name */
    size_t count;
};

/* Bits per element, sdq's dtype (SDQ_DTYPE_COUNT: none) and the place in the reference's enum,
 * whose descending order is the order of the data in files that it writes. */
typedef struct sdq__st_kind { const char *name; unsigned bits; sdq_dtype dtype; int order; }
    sdq__st_kind;

static const sdq__st_kind sdq__st_kinds[] = {
    {"BOOL", 8, SDQ_BOOL, 0},           {"F4", 4, SDQ_DTYPE_COUNT, 1},
    {"F6_E2M3", 6, SDQ_DTYPE_COUNT, 2}, {"F6_E3M2", 6, SDQ_DTYPE_COUNT, 3},
    {"U8", 8, SDQ_U8, 4},               {"I8", 8, SDQ_I8, 5},
    {"F8_E5M2", 8, SDQ_DTYPE_COUNT, 6}, {"F8_E4M3", 8, SDQ_DTYPE_COUNT, 7},
    {"F8_E8M0", 8, SDQ_DTYPE_COUNT, 8}, {"F8_E4M3FNUZ", 8, SDQ_DTYPE_COUNT, 8},
    {"F8_E5M2FNUZ", 8, SDQ_DTYPE_COUNT, 8},
    {"I16", 16, SDQ_I16, 9},            {"U16", 16, SDQ_U16, 10},
    {"F16", 16, SDQ_F16, 11},           {"BF16", 16, SDQ_BF16, 12},
    {"I32", 32, SDQ_I32, 13},           {"U32", 32, SDQ_U32, 14},
    {"F32", 32, SDQ_F32, 15},           {"C64", 64, SDQ_DTYPE_COUNT, 16},
    {"F64", 64, SDQ_F64, 17},           {"I64", 64, SDQ_I64, 18},
    {"U64", 64, SDQ_U64, 19}
};

static const sdq__st_kind *sdq__st_kind_named(const char *name) {
    size_t i;
    for (i = 0; i < SDQ__COUNT(sdq__st_kinds); i++)
        if (strcmp(sdq__st_kinds[i].name, name) == 0) return &sdq__st_kinds[i];
    return NULL;
}

static const sdq__st_kind *sdq__st_kind_of(sdq_dtype dtype) {
    size_t i;
    for (i = 0; i < SDQ__COUNT(sdq__st_kinds) && dtype != SDQ_DTYPE_COUNT; i++)
        if (sdq__st_kinds[i].dtype == dtype) return &sdq__st_kinds[i];
    return NULL;
}

SDQ_API const char *sdq_dtype_name(sdq_dtype dtype) {
    const sdq__st_kind *k = sdq__st_kind_of(dtype);
    return k ? k->name : "?";
}

SDQ_API size_t sdq_entry_count(const sdq_entry *entry) {
    size_t n = 1;
    int i;
    for (i = 0; i < entry->rank; i++) n *= entry->dim[i];
    return n;
}

/* Map or read the file; f owns the bytes. */
static sdq_status sdq__st_bytes(sdq_ctx *ctx, sdq_file *f) {
#if SDQ__MMAP
    struct stat info;
    void *p = MAP_FAILED;
    const int fd = open(f->path, O_RDONLY);
    if (fd < 0) return sdq__fail(ctx, SDQ_ERR_IO, "%s: cannot be opened for reading", f->path);
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        return sdq__fail(ctx, SDQ_ERR_IO, "%s: not a regular file", f->path);
    }
    f->size = (size_t)info.st_size;
    if (f->size) p = mmap(NULL, f->size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    f->mapped = p != MAP_FAILED;
    if (f->mapped) { f->bytes = (char *)p; return SDQ_OK; }
#endif
    return sdq__io_read(ctx, f->path, SIZE_MAX / 2, &f->bytes, &f->size);
}

static sdq_status sdq__st_shape(sdq_ctx *ctx, const sdq_file *f, const sdq__json *shape,
                                sdq_entry *e, size_t *elements) {
    const sdq__json *d;
    size_t n = 1, i;
    if (!shape || shape->kind != SDQ__JS_ARRAY)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidHeaderDeserialization: %s has no shape",
                         f->path, e->name);
    if (shape->count > SDQ__COUNT(e->dim))
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: %s has %zu dimensions, at most 8 can be "
                         "read", f->path, e->name, shape->count);
    for (i = 0; i < SDQ__COUNT(e->dim); i++) e->dim[i] = 1;
    for (d = shape->child, i = 0; d; d = d->next, i++) {
        if (!sdq__js_size(d, &e->dim[i]))
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidHeaderDeserialization: a dimension "
                             "of %s is no size", f->path, e->name);
        if (!sdq__u_mul(n, e->dim[i], &n))
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: ValidationOverflow: the shape of %s",
                             f->path, e->name);
    }
    e->rank = (int)shape->count;
    *elements = n;
    return SDQ_OK;
}

/* One header member -> entry. data holds the offset for now, as a pointer into the file. */
static sdq_status sdq__st_entry(sdq_ctx *ctx, const sdq_file *f, const sdq__json *v,
                                const char *data, size_t data_bytes, sdq_entry *e) {
    const sdq__json *offsets = sdq__js_get(v, "data_offsets");
    const sdq__st_kind *kind = sdq__st_kind_named(sdq__js_string(v, "dtype", ""));
    size_t elements = 0, bits, begin, end;
    e->name = v->key;
    if (v->kind != SDQ__JS_OBJECT || !kind)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidHeaderDeserialization: unknown dtype "
                         "'%s' of %s", f->path, sdq__js_string(v, "dtype", ""), e->name);
    e->dtype = kind->dtype;
    SDQ__TRY(sdq__st_shape(ctx, f, sdq__js_get(v, "shape"), e, &elements));
    if (!offsets || offsets->kind != SDQ__JS_ARRAY || offsets->count != 2 ||
        !sdq__js_size(offsets->child, &begin) || !sdq__js_size(offsets->child->next, &end))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidHeaderDeserialization: %s has no "
                         "data_offsets", f->path, e->name);
    if (begin > end || end > data_bytes)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidOffset: %s is at %zu..%zu of %zu bytes; "
                         "is the file complete?", f->path, e->name, begin, end, data_bytes);
    if (!sdq__u_mul(elements, kind->bits, &bits))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: ValidationOverflow: the size of %s", f->path,
                         e->name);
    if (bits % 8)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: MisalignedSlice: %s ends inside a byte",
                         f->path, e->name);
    if (bits / 8 != end - begin)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: TensorInvalidInfo: %s has %zu bytes, its shape "
                         "and dtype ask for %zu", f->path, e->name, end - begin, bits / 8);
    e->data = data + begin;
    e->bytes = end - begin;
    return SDQ_OK;
}

static sdq_status sdq__st_metadata(sdq_ctx *ctx, const sdq_file *f, const sdq__json *meta) {
    const sdq__json *v;
    int ok = meta->kind == SDQ__JS_OBJECT;
    for (v = meta->child; v; v = v->next) ok = ok && v->kind == SDQ__JS_STRING;
    if (ok) return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidHeaderDeserialization: __metadata__ may "
                     "only map strings to strings", f->path);
}

static int sdq__st_by_place(const void *a, const void *b) {
    const sdq_entry *x = (const sdq_entry *)a, *y = (const sdq_entry *)b;
    const char *px = (const char *)x->data, *py = (const char *)y->data;
    if (px != py) return px < py ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int sdq__st_by_name(const void *a, const void *b) {
    return strcmp(((const sdq_entry *)a)->name, ((const sdq_entry *)b)->name);
}

/* What torch.save writes: a zip archive, or in old files a pickle of protocol 2. */
static int sdq__st_is_pickle(const sdq_file *f) {
    return memcmp(f->bytes, "PK\3\4", 4) == 0 || memcmp(f->bytes, "\200\2\212\n", 4) == 0;
}
static sdq_status sdq__st_no_pickle(sdq_ctx *ctx, const char *path) {
    return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: is a pickle of PyTorch, which can run code "
        "when it is read; convert it in Python: import torch, safetensors.torch as s; "
        "d = torch.load('%s', weights_only=True, map_location='cpu'); d = d.get('state_dict', d); "
        "s.save_file({k: v.contiguous().clone() for k, v in d.items() if torch.is_tensor(v)}, "
        "'model.safetensors')", path, strlen(path) < 80 ? path : "model.ckpt");
}

/* The header as a tree, all its rules but the arrays'. */
static sdq_status sdq__st_header(sdq_ctx *ctx, sdq_file *f, size_t *length) {
    uint64_t n = 0;
    int i;
    if (f->size < 8)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: HeaderTooSmall: the file has %zu bytes",
                         f->path, f->size);
    for (i = 7; i >= 0; i--) n = (n << 8) | (unsigned char)f->bytes[i];
    if (sdq__st_is_pickle(f)) return sdq__st_no_pickle(ctx, f->path);
    if (n > SDQ__ST_HEADER_MAX)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: HeaderTooLarge: not a safetensors file, or a "
                         "header above 100 MB", f->path);
    if (n > f->size - 8)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidHeaderLength: %zu bytes of header in a "
                         "file of %zu", f->path, (size_t)n, f->size);
    *length = (size_t)n;
    if (n == 0 || f->bytes[8] != '{')
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidHeaderStart: the header does not begin "
                         "with '{'", f->path);
    return sdq__js_parse(ctx, f->bytes + 8, *length, f->path, &f->header);
}

/* Fill f->entries from the header and check that they tile the data. */
static sdq_status sdq__st_entries(sdq_ctx *ctx, sdq_file *f, size_t header) {
    const char *data = f->bytes + 8 + header, *at = data;
    const size_t bytes = f->size - 8 - header;
    const sdq__json *v;
    size_t i;
    f->entries = SDQ__NEW_N(ctx, sdq_entry, f->header->count);
    if (!f->entries) return SDQ_ERR_OOM;
    for (v = f->header->child; v; v = v->next) {
        if (strcmp(v->key, "__metadata__") == 0) SDQ__TRY(sdq__st_metadata(ctx, f, v));
        else SDQ__TRY(sdq__st_entry(ctx, f, v, data, bytes, &f->entries[f->count++]));
    }
    qsort(f->entries, f->count, sizeof(sdq_entry), sdq__st_by_place);
    for (i = 0; i < f->count; i++) {
        if ((const char *)f->entries[i].data != at)
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: InvalidOffset: a hole or an overlap before "
                             "%s", f->path, f->entries[i].name);
        at += f->entries[i].bytes;
    }
    if (at != data + bytes)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: MetadataIncompleteBuffer: %zu bytes belong to "
                         "no array", f->path, (size_t)(data + bytes - at));
    qsort(f->entries, f->count, sizeof(sdq_entry), sdq__st_by_name);
    return SDQ_OK;
}

/* What has been read for the last time need not stay in memory beside its copy. From 64 KiB before
 * it on: reading a page maps its neighbours, too, and what is needed after all is read again. */
static void sdq__st_forget(const sdq_file *f, const sdq_entry *e) {
#if SDQ__MMAP && defined(MADV_DONTNEED)
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t at = (size_t)((const char *)e->data - f->bytes);
    const size_t to = (at + e->bytes) / page * page, near = sdq__u_max(page, 65536);
    const size_t from = (at - sdq__u_min(at, near)) / page * page;
    if (f->mapped && to > from) (void)madvise(f->bytes + from, to - from, MADV_DONTNEED);
#else
    (void)f; (void)e;
#endif
}

SDQ_API void sdq_file_close(sdq_ctx *ctx, sdq_file *f) {
    if (!f) return;
#if SDQ__MMAP
    if (f->mapped) { (void)munmap(f->bytes, f->size); f->bytes = NULL; }
#endif
    sdq__free(ctx, f->bytes);
    sdq__js_free(ctx, f->header);
    sdq__free(ctx, f->entries);
    sdq__free(ctx, f->path);
    sdq__free(ctx, f);
}

SDQ_API sdq_status sdq_file_open(sdq_ctx *ctx, const char *path, sdq_file **out) {
    sdq_file *f = SDQ__NEW(ctx, sdq_file);
    size_t header = 0;
    sdq_status st = SDQ_ERR_OOM;
    *out = NULL;
    if (!f) return st;
    f->path = sdq__strdup(ctx, path);
    if (!f->path) goto done;
    SDQ__TRY_DONE(sdq__st_bytes(ctx, f));
    SDQ__TRY_DONE(sdq__st_header(ctx, f, &header));
    SDQ__TRY_DONE(sdq__st_entries(ctx, f, header));
    *out = f;
    f = NULL;
done:
    sdq_file_close(ctx, f);
    return st;
}

SDQ_API size_t sdq_file_count(const sdq_file *f) { return f->count; }
SDQ_API const sdq_entry *sdq_file_entry(const sdq_file *f, size_t i) {
    return i < f->count ? &f->entries[i] : NULL;
}
SDQ_API const sdq_entry *sdq_file_find(const sdq_file *f, const char *name) {
    sdq_entry key;
    memset(&key, 0, sizeof key);
    key.name = name;
    return (const sdq_entry *)bsearch(&key, f->entries, f->count, sizeof key, sdq__st_by_name);
}
SDQ_API const char *sdq_file_meta(const sdq_file *f, const char *key) {
    return sdq__js_string(sdq__js_get(f->header, "__metadata__"), key, NULL);
}

static double sdq__st_element(sdq_dtype dtype, const unsigned char *p) {
    union { uint16_t u16; int16_t i16; uint32_t u32; int32_t i32; uint64_t u64; int64_t i64;
            float f; double d; } v;
    memcpy(&v, p, sdq__u_dtype_size(dtype));    /* the data may be unaligned */
    switch (dtype) {
    case SDQ_F32: return (double)v.f;
    case SDQ_F16: return (double)sdq__u_from_f16(v.u16);
    case SDQ_BF16: return (double)sdq__u_from_bf16(v.u16);
    case SDQ_F64: return v.d;
    case SDQ_I8: return (double)(signed char)*p;
    case SDQ_U8: return (double)*p;
    case SDQ_I16: return (double)v.i16;
    case SDQ_U16: return (double)v.u16;
    case SDQ_I32: return (double)v.i32;
    case SDQ_U32: return (double)v.u32;
    case SDQ_I64: return (double)v.i64;
    case SDQ_U64: return (double)v.u64;
    default: return *p ? 1.0 : 0.0;             /* BOOL */
    }
}

/* n numbers, at any address, of a dtype that has a size. */
static void sdq__st_to_f32(const struct sdq__kernels *k, sdq_dtype dtype, const void *data,
                           size_t n, float *out) {
    const unsigned char *p = (const unsigned char *)data;
    const size_t size = sdq__u_dtype_size(dtype);
    uint16_t half[1024];
    size_t i, m;
    if (dtype == SDQ_F32) {                     /* the common kinds without a switch per element */
        if (n) memcpy(out, p, n * 4);
    } else if (dtype == SDQ_F16 || dtype == SDQ_BF16) {
        for (i = 0; i < n; i += m) {
            m = sdq__u_min(SDQ__COUNT(half), n - i);
            memcpy(half, p + 2 * i, 2 * m);
            (dtype == SDQ_F16 ? k->from_f16 : k->from_bf16)(out + i, half, m);
        }
    } else {
        for (i = 0; i < n; i++) out[i] = (float)sdq__st_element(dtype, p + size * i);
    }
}

SDQ_API sdq_status sdq_entry_to_f32(sdq_ctx *ctx, const sdq_entry *e, float *out) {
    const size_t size = sdq__u_dtype_size(e->dtype);
    if (!size)
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: stored in a dtype that cannot be read "
                         "(8-bit float?); convert it to F16 first", e->name);
    sdq__st_to_f32(ctx->k, e->dtype, e->data, e->bytes / size, out);
    return SDQ_OK;
}

/* The dtype that an entry gets in the file. */
static sdq_dtype sdq__st_stored(const sdq_entry *e) {
    const int shrink = e->dtype == SDQ_F32 && (e->store == SDQ_F16 || e->store == SDQ_BF16);
    return shrink ? e->store : e->dtype;
}

static int sdq__st_by_order(const void *a, const void *b) {
    const sdq_entry *x = *(const sdq_entry *const *)a, *y = *(const sdq_entry *const *)b;
    const int ox = sdq__st_kind_of(sdq__st_stored(x))->order;
    const int oy = sdq__st_kind_of(sdq__st_stored(y))->order;
    return ox != oy ? oy - ox : strcmp(x->name, y->name);
}

static sdq_status sdq__st_check(sdq_ctx *ctx, const char *path, const sdq_entry *e) {
    size_t bytes = sdq__u_dtype_size(e->dtype);
    int i, ok;
    ok = e->name && bytes && e->rank >= 0 && e->rank <= 8;
    ok = ok && sdq__js_is_utf8(e->name) && strcmp(e->name, "__metadata__") != 0;
    for (i = 0; ok && i < e->rank; i++) ok = sdq__u_mul(bytes, e->dim[i], &bytes);
    if (ok && bytes == e->bytes && (e->data || !bytes)) return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: cannot write array %s: dtype, shape and bytes do "
                     "not fit, or the name is missing", path, e->name ? e->name : "(no name)");
}

static int sdq__st_by_pointed_name(const void *a, const void *b) {
    return strcmp((*(const sdq_entry *const *)a)->name, (*(const sdq_entry *const *)b)->name);
}

/* Check the arrays and the metadata; sorted receives pointers in the order of the file. */
static sdq_status sdq__st_sort(sdq_ctx *ctx, const char *path, const sdq_entry *entries, size_t n,
                               const sdq_pair *meta, size_t nmeta, const sdq_entry **sorted) {
    size_t i, j;
    for (i = 0; i < n; i++) {
        SDQ__TRY(sdq__st_check(ctx, path, &entries[i]));
        sorted[i] = &entries[i];
    }
    qsort((void *)sorted, n, sizeof *sorted, sdq__st_by_pointed_name);
    for (i = 1; i < n; i++)
        if (strcmp(sorted[i]->name, sorted[i - 1]->name) == 0)
            return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: cannot write two arrays named %s", path,
                             sorted[i]->name);
    for (i = 0; i < nmeta; i++) {
        int ok = meta[i].key && meta[i].value && sdq__js_is_utf8(meta[i].key);
        for (j = 0; ok && j < i; j++) ok = strcmp(meta[i].key, meta[j].key) != 0;
        if (!ok) return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: cannot write metadata: key %zu is "
                                  "missing, not UTF-8 or there twice", path, i);
    }
    qsort((void *)sorted, n, sizeof *sorted, sdq__st_by_order);
    return SDQ_OK;
}

/* The JSON header of the sorted entries, padded so that the data begins on a multiple of 8. */
static void sdq__st_format(sdq_ctx *ctx, sdq__str *h, const sdq_entry *const *sorted, size_t n,
                           const sdq_pair *meta, size_t nmeta) {
    size_t i, at = 0;
    int d;
    sdq__str_add(ctx, h, "{", 1);
    if (nmeta) sdq__str_add(ctx, h, "\"__metadata__\":{", 16);
    for (i = 0; i < nmeta; i++) {
        if (i) sdq__str_add(ctx, h, ",", 1);
        sdq__str_json(ctx, h, meta[i].key);
        sdq__str_add(ctx, h, ":", 1);
        sdq__str_json(ctx, h, meta[i].value);
    }
    if (nmeta) sdq__str_add(ctx, h, n ? "}," : "}", n ? 2 : 1);
    for (i = 0; i < n; i++) {
        const sdq_entry *e = sorted[i];
        const sdq_dtype dtype = sdq__st_stored(e);
        const size_t bytes = e->bytes / sdq__u_dtype_size(e->dtype) * sdq__u_dtype_size(dtype);
        if (i) sdq__str_add(ctx, h, ",", 1);
        sdq__str_json(ctx, h, e->name);
        sdq__str_format(ctx, h, ":{\"dtype\":\"%s\",\"shape\":[", sdq_dtype_name(dtype));
        for (d = 0; d < e->rank; d++) sdq__str_format(ctx, h, d ? ",%zu" : "%zu", e->dim[d]);
        sdq__str_format(ctx, h, "],\"data_offsets\":[%zu,%zu]}", at, at + bytes);
        at += bytes;
    }
    sdq__str_add(ctx, h, "}", 1);
    while (h->len % 8 && !h->bad) sdq__str_add(ctx, h, " ", 1);
}

/* The data of one entry, rounded to half precision in pieces where that is asked for. */
static void sdq__st_put(sdq__io_out *o, const sdq_entry *e) {
    const sdq_dtype dtype = sdq__st_stored(e);
    const unsigned char *p = (const unsigned char *)e->data;
    size_t left = e->bytes / 4, i, n;
    uint16_t half[1024];
    float x;
    if (dtype == e->dtype) { sdq__io_put(o, p, e->bytes); return; }
    for (; left && !o->bad; left -= n) {
        n = sdq__u_min(left, SDQ__COUNT(half));
        for (i = 0; i < n; i++, p += 4) {
            memcpy(&x, p, 4);
            half[i] = dtype == SDQ_F16 ? sdq__u_to_f16(x) : sdq__u_to_bf16(x);
        }
        sdq__io_put(o, half, n * 2);
    }
}

SDQ_API sdq_status sdq_file_write(sdq_ctx *ctx, const char *path, const sdq_entry *entries,
                                  size_t n, const sdq_pair *meta, size_t nmeta) {
    const sdq_entry **sorted = SDQ__NEW_N(ctx, const sdq_entry *, n);
    unsigned char length[8];
    sdq__str header;
    sdq__io_out o;
    size_t i;
    sdq_status st = SDQ_ERR_OOM;
    memset(&header, 0, sizeof header);
    memset(&o, 0, sizeof o);
    if (!sorted) goto done;
    SDQ__TRY_DONE(sdq__st_sort(ctx, path, entries, n, meta, nmeta, sorted));
    sdq__st_format(ctx, &header, sorted, n, meta, nmeta);
    if (header.bad) { st = SDQ_ERR_OOM; goto done; }
    if (header.len > SDQ__ST_HEADER_MAX) {
        st = sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: names and metadata above 100 MB", path);
        goto done;
    }
    SDQ__TRY_DONE(sdq__io_create(ctx, path, &o));
    for (i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header.len >> (8 * i));
    sdq__io_put(&o, length, 8);
    sdq__io_put(&o, header.s, header.len);
    for (i = 0; i < n; i++) sdq__st_put(&o, sorted[i]);
done:
    st = sdq__io_finish(ctx, &o, st);
    sdq__str_free(ctx, &header);
    sdq__free(ctx, (void *)sorted);
    return st;
}

/* One checkpoint component: a file, or shards listed by an index. */
typedef struct sdq__st_set { sdq_file **files; size_t count; char *path; } sdq__st_set;

static void sdq__st_set_close(sdq_ctx *ctx, sdq__st_set *s) {
    size_t i;
    if (!s) return;
    for (i = 0; i < s->count; i++) sdq_file_close(ctx, s->files[i]);
    sdq__free(ctx, (void *)s->files);
    sdq__free(ctx, s->path);
    sdq__free(ctx, s);
}

/* The file that e is an entry of, or a part of one. */
static const sdq_file *sdq__st_set_file_of(const sdq__st_set *s, const sdq_entry *e) {
    const uintptr_t at = (uintptr_t)e->data;
    size_t i = 0;
    while (i + 1 < s->count && at - (uintptr_t)s->files[i]->bytes >= s->files[i]->size) i++;
    return s->files[i];
}

/* The entry of that name in any of the files, or NULL. */
static const sdq_entry *sdq__st_set_find(const sdq__st_set *s, const char *name) {
    size_t i;
    for (i = 0; i < s->count; i++) {
        const sdq_entry *e = sdq_file_find(s->files[i], name);
        if (e) return e;
    }
    return NULL;
}

/* The number of entries, and entry i over all files in order. */
static size_t sdq__st_set_count(const sdq__st_set *s) {
    size_t i, n = 0;
    for (i = 0; i < s->count; i++) n += s->files[i]->count;
    return n;
}
static const sdq_entry *sdq__st_set_entry(const sdq__st_set *s, size_t i) {
    size_t k;
    for (k = 0; k < s->count; k++) {
        if (i < s->files[k]->count) return &s->files[k]->entries[i];
        i -= s->files[k]->count;
    }
    return NULL;
}

/* The number that sdq__st_set_entry gives to the entry of that name, which must be there. */
static size_t sdq__st_set_place(const sdq__st_set *s, const char *name) {
    size_t i, at = 0;
    for (i = 0; i < s->count; i++) {
        const sdq_entry *e = sdq_file_find(s->files[i], name);
        if (e) return at + (size_t)(e - s->files[i]->entries);
        at += s->files[i]->count;
    }
    return 0;
}

/* The metadata value of a key in the first file that has it, or NULL. */
static const char *sdq__st_set_meta(const sdq__st_set *s, const char *key) {
    size_t i;
    const char *v = NULL;
    for (i = 0; i < s->count && !v; i++) v = sdq_file_meta(s->files[i], key);
    return v;
}

/* Open the shard of that name, unless it is open already. */
static sdq_status sdq__st_set_shard(sdq_ctx *ctx, sdq__st_set *s, const sdq__json *v) {
    const char *slash = strrchr(s->path, '/');
    char *folder, *path;
    size_t i;
    sdq_status st;
    if (v->kind != SDQ__JS_STRING || strlen(v->str) != v->len || !sdq__io_safe_name(v->str, 0))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: the shard of %s must be a file name without "
                         "'/' or '..'", s->path, v->key);
    folder = sdq__strdup(ctx, s->path);
    if (!folder) return SDQ_ERR_OOM;
    folder[slash ? slash - s->path + 1 : 0] = 0;
    path = sdq__io_join(ctx, folder, v->str, "");
    sdq__free(ctx, folder);
    if (!path) return SDQ_ERR_OOM;
    for (i = 0; i < s->count; i++)
        if (strcmp(s->files[i]->path, path) == 0) { sdq__free(ctx, path); return SDQ_OK; }
    if (!sdq__io_exists(path))
        st = sdq__fail(ctx, SDQ_ERR_MISSING, "%s: a shard is missing: %s", s->path, path);
    else if (s->count == 1024)
        st = sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: more than 1024 shards", s->path);
    else st = sdq_file_open(ctx, path, &s->files[s->count]);
    if (st == SDQ_OK) s->count++;
    sdq__free(ctx, path);
    return st;
}

/* Every array is in one shard only. */
static sdq_status sdq__st_set_unique(sdq_ctx *ctx, const sdq__st_set *s) {
    size_t i, j, k;
    for (i = 1; i < s->count; i++)
        for (j = 0; j < s->files[i]->count; j++)
            for (k = 0; k < i; k++)
                if (sdq_file_find(s->files[k], s->files[i]->entries[j].name))
                    return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: %s is in two shards, %s and %s",
                                     s->path, s->files[i]->entries[j].name, s->files[k]->path,
                                     s->files[i]->path);
    return SDQ_OK;
}

static sdq_status sdq__st_set_index(sdq_ctx *ctx, sdq__st_set *s) {
    sdq__json *index = NULL;
    const sdq__json *map, *v;
    sdq_status st = sdq__js_load(ctx, s->path, &index);
    if (st != SDQ_OK) return st;
    map = sdq__js_get(index, "weight_map");
    if (!map || map->kind != SDQ__JS_OBJECT) {
        st = sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: has no weight_map", s->path);
        goto done;
    }
    for (v = map->child; v; v = v->next) SDQ__TRY_DONE(sdq__st_set_shard(ctx, s, v));
    SDQ__TRY_DONE(sdq__st_set_unique(ctx, s));
    for (v = map->child; v; v = v->next) {
        if (sdq__st_set_find(s, v->key)) continue;
        st = sdq__fail(ctx, SDQ_ERR_MISSING, "%s: %s is not in %s", s->path, v->key, v->str);
        goto done;
    }
done:
    sdq__js_free(ctx, index);
    return st;
}

/* The first of the names under which a checkpoint may be stored; *path NULL when none exists. */
static sdq_status sdq__st_set_path(sdq_ctx *ctx, const char *stem, const char *variant,
                                   char **path) {
    static const char *const pattern[6][2] = {
        {".", ".safetensors"}, {".safetensors.index.", ".json"},    /* with the variant */
        {".safetensors", ""}, {".safetensors.index.json", ""},
        {".fp16.safetensors", ""}, {".safetensors.index.fp16.json", ""}     /* nothing else */
    };
    size_t i;
    *path = NULL;
    if (sdq__io_ends(stem, ".safetensors") || sdq__io_ends(stem, ".json")) {
        *path = sdq__strdup(ctx, stem);
        return *path ? SDQ_OK : SDQ_ERR_OOM;
    }
    for (i = variant && *variant ? 0 : 2; i < SDQ__COUNT(pattern); i++) {
        sdq__str s;
        memset(&s, 0, sizeof s);
        sdq__str_format(ctx, &s, "%s%s%s%s", stem, pattern[i][0], i < 2 ? variant : "",
                        pattern[i][1]);
        if (s.bad) { sdq__str_free(ctx, &s); return SDQ_ERR_OOM; }
        if (sdq__io_exists(s.s)) { *path = s.s; return SDQ_OK; }
        sdq__str_free(ctx, &s);
    }
    return SDQ_OK;
}

/* Nothing that can be read is there: say which pickle is, if one is. */
static sdq_status sdq__st_set_missing(sdq_ctx *ctx, const char *stem) {
    static const char *const name[] = {".bin", ".fp16.bin", ".ckpt", "pytorch_model.bin",
                                       "pytorch_model.fp16.bin"};
    const char *slash = strrchr(stem, '/');
    size_t i;
    for (i = 0; i < SDQ__COUNT(name); i++) {
        const size_t folder = slash ? (size_t)(slash - stem) + 1 : 0;
        const size_t keep = name[i][0] == '.' ? strlen(stem) : folder;
        sdq__str s;
        int there;
        memset(&s, 0, sizeof s);
        sdq__str_add(ctx, &s, stem, keep);
        sdq__str_add(ctx, &s, name[i], strlen(name[i]));
        if (s.bad) { sdq__str_free(ctx, &s); return SDQ_ERR_OOM; }
        there = sdq__io_exists(s.s);
        if (there)
            sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: is a pickle of PyTorch, which can run code "
                      "when it is read; convert the folder in Python: import diffusers; "
                      "diffusers.StableDiffusionPipeline.from_pretrained('FOLDER')"
                      ".save_pretrained('NEW', safe_serialization=True)", s.s);
        sdq__str_free(ctx, &s);
        if (there) return SDQ_ERR_UNSUPPORTED;
    }
    return sdq__fail(ctx, SDQ_ERR_MISSING, "%s.safetensors: not found, nor its .index.json, nor "
                     "those of the variant fp16; is the folder complete?", stem);
}

static sdq_status sdq__st_set_new(sdq_ctx *ctx, sdq__st_set **out) {
    sdq__st_set *s = SDQ__NEW(ctx, sdq__st_set);
    *out = s;
    if (!s) return SDQ_ERR_OOM;
    s->files = SDQ__NEW_N(ctx, sdq_file *, 1024);
    return s->files ? SDQ_OK : SDQ_ERR_OOM;
}

/* The checkpoint of that one file, whatever its name. */
static sdq_status sdq__st_set_file(sdq_ctx *ctx, const char *path, sdq__st_set **out) {
    sdq__st_set *s;
    sdq_status st;
    *out = NULL;
    SDQ__TRY_DONE(sdq__st_set_new(ctx, &s));
    s->path = sdq__strdup(ctx, path);
    st = SDQ_ERR_OOM;
    if (!s->path) goto done;
    SDQ__TRY_DONE(sdq_file_open(ctx, path, &s->files[0]));
    s->count = 1;
    *out = s;
    s = NULL;
done:
    sdq__st_set_close(ctx, s);
    return st;
}

/* Open STEM.VARIANT.safetensors (variant not NULL), STEM.safetensors, their .index.json of shards,
 * or STEM itself when it ends in .safetensors or .json; last, those of the variant fp16. */
static sdq_status sdq__st_set_open(sdq_ctx *ctx, const char *stem, const char *variant,
                                   sdq__st_set **out) {
    sdq__st_set *s = NULL;
    char *path = NULL;
    sdq_status st;
    *out = NULL;
    SDQ__TRY_DONE(sdq__st_set_path(ctx, stem, variant, &path));
    if (!path) return sdq__st_set_missing(ctx, stem);
    if (!sdq__io_ends(path, ".json")) {
        st = sdq__st_set_file(ctx, path, out);
        goto done;
    }
    SDQ__TRY_DONE(sdq__st_set_new(ctx, &s));
    s->path = path;
    path = NULL;
    SDQ__TRY_DONE(sdq__st_set_index(ctx, s));
    *out = s;
    s = NULL;
done:
    sdq__st_set_close(ctx, s);
    sdq__free(ctx, path);
    return st;
}

/* ---- caches: one array of equal records, written as they come ----
 *
 * A safetensors file with one array "records", U8 [count, bytes], and the metadata "kind" and
 * "key", a hash of everything the records were made from. It grows as PATH.part, whose header is
 * complete from the start, and is renamed after the last record. A run that is stopped goes on
 * after the last record whose own hash, its last 8 bytes, is right. */

typedef struct sdq__st_cache {
    sdq_file *file;             /* complete: mapped; NULL while it grows */
    const unsigned char *data;  /* of file */
    FILE *f;
    char *part;
    const char *path, *kind;
    uint64_t key;
    size_t count, bytes, done;  /* bytes of a record, with its hash */
} sdq__st_cache;

static void sdq__st_cache_close(sdq_ctx *ctx, sdq__st_cache *c) {
    sdq_file_close(ctx, c->file);
    if (c->f) (void)fclose(c->f);
    sdq__free(ctx, c->part);
    memset(c, 0, sizeof *c);
}

static void sdq__st_cache_key(uint64_t key, char text[17]) {
    (void)snprintf(text, 17, "%08lx%08lx", (unsigned long)(key >> 32),
                   (unsigned long)(key & 0xffffffffu));
}

/* The complete file: is it the one that is wanted? */
static sdq_status sdq__st_cache_map(sdq_ctx *ctx, sdq__st_cache *c) {
    const sdq_entry *e;
    const char *kind, *key;
    char want[17];
    SDQ__TRY(sdq_file_open(ctx, c->path, &c->file));
    e = sdq_file_find(c->file, "records");
    kind = sdq_file_meta(c->file, "kind");
    key = sdq_file_meta(c->file, "key");
    sdq__st_cache_key(c->key, want);
    if (!e || !kind || strcmp(kind, c->kind) != 0)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: is not a cache of %s; name another file",
                         c->path, c->kind);
    if (!key || strcmp(key, want) != 0 || e->dtype != SDQ_U8 || e->rank != 2
        || e->dim[0] != c->count || e->dim[1] != c->bytes)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: is stale: its %s were made from other inputs,"
                         " settings or networks (key %s, expected %s); delete it or name another"
                         " file", c->path, c->kind, key ? key : "missing", want);
    c->data = (const unsigned char *)e->data;
    c->done = c->count;
    return SDQ_OK;
}

static sdq_status sdq__st_cache_header(sdq_ctx *ctx, const sdq__st_cache *c, sdq__str *out) {
    sdq_entry e;
    const sdq_entry *sorted[1];
    sdq_pair meta[2];
    sdq__str h;
    char key[17], length[8];
    size_t i;
    memset(&e, 0, sizeof e);
    memset(&h, 0, sizeof h);
    sdq__st_cache_key(c->key, key);
    meta[0].key = "kind"; meta[0].value = c->kind;
    meta[1].key = "key"; meta[1].value = key;
    e.name = "records";
    e.dtype = SDQ_U8;
    e.rank = 2;
    e.dim[0] = c->count;
    e.dim[1] = c->bytes;
    sorted[0] = &e;
    if (!sdq__u_mul(c->count, c->bytes, &e.bytes))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: %zu records of %zu bytes are too large",
                         c->path, c->count, c->bytes);
    sdq__st_format(ctx, &h, sorted, 1, meta, 2);
    for (i = 0; i < 8; i++) length[i] = (char)(unsigned char)((uint64_t)h.len >> (8 * i));
    sdq__str_add(ctx, out, length, 8);
    if (!h.bad) sdq__str_add(ctx, out, h.s, h.len);
    sdq__str_free(ctx, &h);
    return h.bad || out->bad ? SDQ_ERR_OOM : SDQ_OK;
}

/* Count the good records behind the right header; 0 when the header is another. */
static size_t sdq__st_cache_survey(FILE *f, const sdq__str *header, unsigned char *record,
                                   size_t bytes, size_t count, int *same) {
    size_t i, n = 0;
    uint64_t hash;
    for (i = 0; i < header->len; i++)
        if (fgetc(f) != (int)(unsigned char)header->s[i]) return 0;
    *same = 1;
    while (n < count && fread(record, 1, bytes, f) == bytes) {
        memcpy(&hash, record + bytes - 8, 8);
        if (hash != sdq__u_hash(0, record, bytes - 8)) break;
        n++;
    }
    return n;
}

static sdq_status sdq__st_cache_grow(sdq_ctx *ctx, sdq__st_cache *c) {
    unsigned char *record = SDQ__NEW_N(ctx, unsigned char, c->bytes);
    sdq__str header;
    int same = 0;
    sdq_status st = ctx->status;
    memset(&header, 0, sizeof header);
    c->part = sdq__io_join(ctx, c->path, ".part", "");
    if (!record || !c->part) { st = SDQ_ERR_OOM; goto done; }
    SDQ__TRY_DONE(sdq__st_cache_header(ctx, c, &header));
    c->f = fopen(c->part, "r+b");
    if (c->f) c->done = sdq__st_cache_survey(c->f, &header, record, c->bytes, c->count, &same);
    if (c->f && !same) { (void)fclose(c->f); c->f = NULL; }
    if (!c->f) c->f = fopen(c->part, "w+b");
    if (!c->f)
        st = sdq__fail(ctx, SDQ_ERR_IO, "%s: cannot be created (folder missing or not writable?)",
                       c->part);
    else if (same ? fseek(c->f, (long)(header.len + c->done * c->bytes), SEEK_SET) != 0
                  : fwrite(header.s, 1, header.len, c->f) != header.len)
        st = sdq__fail(ctx, SDQ_ERR_IO, "%s: write error; is the disk full?", c->part);
done:
    sdq__str_free(ctx, &header);
    sdq__free(ctx, record);
    return st;
}

/* Open the cache at path: complete (c->data), or growing with c->done records there.
 *   kind   what it holds, for messages; path and kind are kept
 *   bytes  of a record without its hash, a multiple of 4 */
static sdq_status sdq__st_cache_open(sdq_ctx *ctx, const char *path, const char *kind, uint64_t key,
                                     size_t count, size_t bytes, sdq__st_cache *c) {
    memset(c, 0, sizeof *c);
    c->path = path;
    c->kind = kind;
    c->key = key;
    c->count = count;
    c->bytes = sdq__u_round_up(bytes, 8) + 8;
    return sdq__io_exists(path) ? sdq__st_cache_map(ctx, c) : sdq__st_cache_grow(ctx, c);
}

/* Append a record: n floats. The caller's buffer has room for c->bytes. */
static sdq_status sdq__st_cache_put(sdq_ctx *ctx, sdq__st_cache *c, float *record, size_t n) {
    unsigned char *p = (unsigned char *)record;
    uint64_t hash;
    memset(p + n * 4, 0, c->bytes - 8 - n * 4);
    hash = sdq__u_hash(0, p, c->bytes - 8);
    memcpy(p + c->bytes - 8, &hash, 8);
    if (fwrite(p, 1, c->bytes, c->f) != c->bytes || fflush(c->f) != 0)
        return sdq__fail(ctx, SDQ_ERR_IO, "%s: write error; is the disk full? %zu of %zu records"
                         " are kept", c->part, c->done, c->count);
    c->done++;
    return SDQ_OK;
}

/* All records are there: give the file its name and map it. */
static sdq_status sdq__st_cache_finish(sdq_ctx *ctx, sdq__st_cache *c) {
    const int synced = SDQ__FSYNC(c->f) == 0, closed = fclose(c->f) == 0;
    c->f = NULL;
    if (!synced || !closed || rename(c->part, c->path) != 0)
        return sdq__fail(ctx, SDQ_ERR_IO, "%s: could not be completed; is the disk full?", c->path);
    return sdq__st_cache_map(ctx, c);
}

static const float *sdq__st_cache_record(const sdq__st_cache *c, size_t i) {
    return (const float *)(const void *)(c->data + i * c->bytes);
}

/* ===========================================================================
 * >>image   PNG and PPM, resizing
 *
 * PNG (W3C REC-PNG, 2nd edition) with its own inflate and deflate (RFC 1950, 1951). The reader
 * checks every CRC and the Adler sum and takes all colour types, depths and interlacing; colour
 * space chunks are ignored. What a picture may cost is known before memory is asked for: at most
 * 2^26 pixels, and no more bytes than its compressed data can make (deflate's limit is 1032 to 1).
 * The writer's bytes depend on its input alone. Resizing follows Pillow's BILINEAR.
 * ======================================================================== */

#define SDQ__IMG_PIXELS ((size_t)1 << 26)
#define SDQ__IMG_FILE ((size_t)1 << 30)

SDQ_API void sdq_image_free(sdq_ctx *ctx, sdq_image *image) {
    if (!image) return;
    sdq__free(ctx, image->px);
    memset(image, 0, sizeof *image);
}

SDQ_API sdq_status sdq_image_new(sdq_ctx *ctx, size_t w, size_t h, size_t c, sdq_image *out) {
    size_t n = 0;
    memset(out, 0, sizeof *out);
    if (!w || !h || c < 1 || c > 4 || !sdq__u_mul(w, h, &n) || n > SDQ__IMG_PIXELS)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "a picture of %zu x %zu with %zu channels; allowed "
                         "are 1..4 channels and 2^26 pixels", w, h, c);
    out->px = SDQ__NEW_N(ctx, unsigned char, n * c);
    if (!out->px) return SDQ_ERR_OOM;
    out->w = w;
    out->h = h;
    out->c = c;
    return SDQ_OK;
}

/* --- checksums --- */

/* CRC-32 (polynomial 0xedb88320), four bits at a time. Start with 0, chain the results. */
static uint32_t sdq__img_crc(uint32_t crc, const unsigned char *p, size_t n) {
    static const uint32_t table[16] = {
        0x00000000u, 0x1db71064u, 0x3b6e20c8u, 0x26d930acu, 0x76dc4190u, 0x6b6b51f4u,
        0x4db26158u, 0x5005713cu, 0xedb88320u, 0xf00f9344u, 0xd6d6a3e8u, 0xcb61b38cu,
        0x9b64c2b0u, 0x86d3d2d4u, 0xa00ae278u, 0xbdbdf21cu};
    size_t i;
    crc = ~crc;
    for (i = 0; i < n; i++) {
        crc = (crc >> 4) ^ table[(crc ^ p[i]) & 15u];
        crc = (crc >> 4) ^ table[(crc ^ (uint32_t)(p[i] >> 4)) & 15u];
    }
    return ~crc;
}

/* Adler-32. 5552 bytes are the most before the sums must be reduced (RFC 1950: 32 bits). */
static uint32_t sdq__img_adler(const unsigned char *p, size_t n) {
    uint32_t a = 1, b = 0;
    while (n) {
        size_t k = sdq__u_min(n, 5552);
        n -= k;
        while (k--) { a += *p++; b += a; }
        a %= 65521u;
        b %= 65521u;
    }
    return (b << 16) | a;
}

static uint32_t sdq__img_be32(const unsigned char *p) {
    return ((uint32_t)p[0] << 24) | ((uint32_t)p[1] << 16) | ((uint32_t)p[2] << 8) | p[3];
}

/* --- inflate --- */

/* Lengths 3..258 and distances 1..32768 are a base and extra bits (RFC 1951, 3.2.5). */
static const uint16_t sdq__img_len_base[29] = {
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131,
    163, 195, 227, 258};
static const unsigned char sdq__img_len_bits[29] = {
    0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
static const uint16_t sdq__img_dist_base[30] = {
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537,
    2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
static const unsigned char sdq__img_clen_order[19] = {
    16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

static unsigned sdq__img_dist_bits(unsigned code) { return code < 4 ? 0 : code / 2 - 1; }

#define SDQ__IMG_FAST 9

/* A canonical code. fast: symbol << 4 | length by the next 9 bits, 0 when the code is longer. */
typedef struct sdq__img_huff { uint16_t count[16], symbol[288], fast[1 << SDQ__IMG_FAST]; }
    sdq__img_huff;

typedef struct sdq__img_inflate_state {
    const unsigned char *p, *end;
    uint64_t bits;
    unsigned nbits;
    unsigned char *out;
    size_t n, cap;
    const char *error;
} sdq__img_inflate_state;

static void sdq__img_need(sdq__img_inflate_state *s, unsigned n) {
    while (s->nbits < 32 && s->p < s->end) {
        s->bits |= (uint64_t)*s->p++ << s->nbits;
        s->nbits += 8;
    }
    if (s->nbits < n && !s->error) s->error = "compressed data ends too early";
}

static unsigned sdq__img_get(sdq__img_inflate_state *s, unsigned n) {
    unsigned v;
    sdq__img_need(s, n);
    if (s->error) return 0;
    v = (unsigned)(s->bits & ((UINT64_C(1) << n) - 1));
    s->bits >>= n;
    s->nbits -= n;
    return v;
}

static unsigned sdq__img_reverse(unsigned code, unsigned n) {
    unsigned r = 0;
    while (n--) { r = (r << 1) | (code & 1u); code >>= 1; }
    return r;
}

/* Canonical codes from lengths. 0 when they are no complete prefix code; a single code of one
 * bit, or none at all, is allowed where `sparse`. */
static int sdq__img_build(sdq__img_huff *h, const unsigned char *len, size_t n, int sparse) {
    unsigned next[16], at[16], i, left = 1;
    size_t k;
    memset(h, 0, sizeof *h);
    for (k = 0; k < n; k++) h->count[len[k]]++;
    for (i = 1; i < 16; i++) {
        left <<= 1;
        if (h->count[i] > left) return 0;
        left -= h->count[i];
    }
    if (left && !(sparse && n - h->count[0] <= 1 && h->count[1] + h->count[0] == n)) return 0;
    h->count[0] = 0;
    next[0] = at[0] = 0;
    for (i = 1; i < 16; i++) {
        next[i] = (next[i - 1] + h->count[i - 1]) << 1;
        at[i] = at[i - 1] + h->count[i - 1];
    }
    for (k = 0; k < n; k++) {
        const unsigned l = len[k];
        unsigned code;
        if (!l) continue;
        h->symbol[at[l]++] = (uint16_t)k;
        code = next[l]++;
        if (l > SDQ__IMG_FAST) continue;
        for (i = sdq__img_reverse(code, l); i < 1u << SDQ__IMG_FAST; i += 1u << l)
            h->fast[i] = (uint16_t)((k << 4) | l);
    }
    return 1;
}

static unsigned sdq__img_symbol(sdq__img_inflate_state *s, const sdq__img_huff *h) {
    unsigned len, code = 0, first = 0, index = 0;
    const unsigned quick = (sdq__img_need(s, 0), h->fast[s->bits & ((1u << SDQ__IMG_FAST) - 1)]);
    if (quick) {
        (void)sdq__img_get(s, quick & 15u);
        return quick >> 4;
    }
    for (len = 1; len < 16 && len <= s->nbits; len++) {
        code |= (unsigned)(s->bits >> (len - 1)) & 1u;
        if (code - first < h->count[len]) {
            (void)sdq__img_get(s, len);
            return h->symbol[index + code - first];
        }
        index += h->count[len];
        first = (first + h->count[len]) << 1;
        code <<= 1;
    }
    if (!s->error) s->error = len < 16 ? "compressed data ends too early" : "invalid code";
    return 0;
}

/* Literals and matches until the end-of-block symbol. */
static void sdq__img_inflate_codes(sdq__img_inflate_state *s, const sdq__img_huff *lit,
                                   const sdq__img_huff *dist) {
    for (;;) {
        unsigned sym = sdq__img_symbol(s, lit), d;
        size_t len, back;
        if (s->error || sym == 256) return;
        if (s->n == s->cap) { s->error = "more data than the picture has"; return; }
        if (sym < 256) { s->out[s->n++] = (unsigned char)sym; continue; }
        if (sym > 285) { s->error = "invalid length"; return; }
        len = sdq__img_len_base[sym - 257] + sdq__img_get(s, sdq__img_len_bits[sym - 257]);
        d = sdq__img_symbol(s, dist);
        if (d > 29) { s->error = "invalid distance"; return; }
        back = sdq__img_dist_base[d] + sdq__img_get(s, sdq__img_dist_bits(d));
        if (s->error) return;
        if (back > s->n) { s->error = "invalid distance"; return; }
        if (len > s->cap - s->n) { s->error = "more data than the picture has"; return; }
        for (; len; len--, s->n++) s->out[s->n] = s->out[s->n - back];
    }
}

static void sdq__img_inflate_stored(sdq__img_inflate_state *s) {
    unsigned len, check;
    (void)sdq__img_get(s, s->nbits & 7u);
    len = sdq__img_get(s, 16);
    check = sdq__img_get(s, 16);
    if (s->error) return;
    if (len != (check ^ 0xffffu)) { s->error = "invalid stored block"; return; }
    if (len > s->cap - s->n) { s->error = "more data than the picture has"; return; }
    for (; len && !s->error; len--) s->out[s->n++] = (unsigned char)sdq__img_get(s, 8);
}

/* Read the code lengths of a dynamic block (RFC 1951, 3.2.7) and build both codes. */
static void sdq__img_inflate_tables(sdq__img_inflate_state *s, sdq__img_huff *lit,
                                    sdq__img_huff *dist) {
    unsigned char len[288 + 32];
    const unsigned nlit = sdq__img_get(s, 5) + 257, ndist = sdq__img_get(s, 5) + 1;
    const unsigned nclen = sdq__img_get(s, 4) + 4;
    unsigned i, n = 0;
    memset(len, 0, sizeof len);
    for (i = 0; i < nclen; i++) len[sdq__img_clen_order[i]] = (unsigned char)sdq__img_get(s, 3);
    if (!s->error && (nlit > 286 || ndist > 30 || !sdq__img_build(lit, len, 19, 1)))
        s->error = "invalid code lengths";
    while (!s->error && n < nlit + ndist) {
        const unsigned sym = sdq__img_symbol(s, lit);
        unsigned repeat = 1, value = sym;
        if (sym >= 16) {
            repeat = sym == 16 ? 3 + sdq__img_get(s, 2) : sym == 17 ? 3 + sdq__img_get(s, 3)
                   : 11 + sdq__img_get(s, 7);
            value = sym > 16 ? 0 : n ? len[n - 1] : 16;
        }
        if (value > 15 || repeat > nlit + ndist - n) { s->error = "invalid code lengths"; return; }
        for (; repeat; repeat--) len[n++] = (unsigned char)value;
    }
    if (s->error) return;
    if (!len[256] || !sdq__img_build(lit, len, nlit, 1) ||
        !sdq__img_build(dist, len + nlit, ndist, 1)) s->error = "invalid code lengths";
}

static void sdq__img_inflate_fixed(sdq__img_huff *lit, sdq__img_huff *dist) {
    unsigned char len[288];
    memset(len, 8, sizeof len);
    memset(len + 144, 9, 112);
    memset(len + 256, 7, 24);
    (void)sdq__img_build(lit, len, 288, 0);
    memset(len, 5, 32);
    (void)sdq__img_build(dist, len, 32, 0);
}

/* Decompress a zlib stream that must give exactly cap bytes. NULL, or what is wrong. */
static const char *sdq__img_inflate(const unsigned char *in, size_t bytes, unsigned char *out,
                                    size_t cap) {
    sdq__img_inflate_state s;
    sdq__img_huff lit, dist;
    unsigned last = 0, type, i;
    uint32_t sum = 0;
    memset(&s, 0, sizeof s);
    s.p = in;
    s.end = in + bytes;
    s.out = out;
    s.cap = cap;
    if (bytes < 6 || (in[0] & 15) != 8 || in[0] >> 4 > 7 || (in[0] * 256u + in[1]) % 31 ||
        (in[1] & 32))
        return "invalid zlib header";
    s.p += 2;
    while (!last && !s.error) {
        last = sdq__img_get(&s, 1);
        type = sdq__img_get(&s, 2);
        if (s.error) break;
        if (type == 0) { sdq__img_inflate_stored(&s); continue; }
        if (type == 3) { s.error = "invalid block type"; break; }
        if (type == 1) sdq__img_inflate_fixed(&lit, &dist);
        else sdq__img_inflate_tables(&s, &lit, &dist);
        if (!s.error) sdq__img_inflate_codes(&s, &lit, &dist);
    }
    if (s.error) return s.error;
    if (s.n != cap) return "less data than the picture needs";
    (void)sdq__img_get(&s, s.nbits & 7u);
    for (i = 0; i < 4; i++) sum = (sum << 8) | sdq__img_get(&s, 8);
    if (s.error) return s.error;
    return sum == sdq__img_adler(out, cap) ? NULL : "wrong Adler checksum";
}

/* --- reading PNG --- */

typedef struct sdq__img_png {
    sdq_ctx *ctx;
    const char *what;
    const unsigned char *p, *end;
    size_t w, h;
    unsigned depth, colour, interlace;
    unsigned samples;               /* per pixel in the file */
    unsigned char palette[256][4];
    unsigned palette_size;
    unsigned key[3];                /* tRNS of grey and RGB: this colour is transparent */
    int has_alpha;                  /* tRNS was there */
    unsigned char *idat;
    size_t idat_size, idat_cap;
} sdq__img_png;

static sdq_status sdq__img_bad(sdq__img_png *g, const char *why) {
    return sdq__fail(g->ctx, SDQ_ERR_FORMAT, "%s: damaged PNG: %s", g->what, why);
}

static sdq_status sdq__img_header(sdq__img_png *g, const unsigned char *d, size_t n) {
    static const unsigned char samples[7] = {1, 0, 3, 1, 2, 0, 4};
    /* allowed depths as a set of bits: 1 2 4 8 16 */
    static const unsigned depths[7] = {0x10116, 0, 0x10100, 0x116, 0x10100, 0, 0x10100};
    size_t pixels;
    if (n != 13) return sdq__img_bad(g, "wrong IHDR");
    g->w = sdq__img_be32(d);
    g->h = sdq__img_be32(d + 4);
    g->depth = d[8];
    g->colour = d[9];
    g->interlace = d[12];
    if (g->colour > 6 || g->depth > 16 || !((depths[g->colour] >> g->depth) & 1u) || d[10] ||
        d[11] || g->interlace > 1 || !g->w || !g->h) return sdq__img_bad(g, "wrong IHDR");
    g->samples = samples[g->colour];
    if (!sdq__u_mul(g->w, g->h, &pixels) || pixels > SDQ__IMG_PIXELS)
        return sdq__fail(g->ctx, SDQ_ERR_UNSUPPORTED, "%s: %zu x %zu pixels; at most 2^26 can be "
                         "read", g->what, g->w, g->h);
    return SDQ_OK;
}

static sdq_status sdq__img_palette(sdq__img_png *g, const unsigned char *d, size_t n) {
    size_t i;
    if (n == 0 || n % 3 || n > 768 || g->palette_size) return sdq__img_bad(g, "wrong PLTE");
    g->palette_size = (unsigned)(n / 3);
    for (i = 0; i < n / 3; i++) {
        memcpy(g->palette[i], d + 3 * i, 3);
        g->palette[i][3] = 255;
    }
    return SDQ_OK;
}

static sdq_status sdq__img_transparency(sdq__img_png *g, const unsigned char *d, size_t n) {
    size_t i;
    if (g->colour == 3) {
        if (n > g->palette_size) return sdq__img_bad(g, "wrong tRNS");
        for (i = 0; i < n; i++) g->palette[i][3] = d[i];
    } else {
        if (g->colour > 2 || n != 2 * g->samples) return sdq__img_bad(g, "wrong tRNS");
        for (i = 0; i < g->samples; i++) g->key[i] = d[2 * i] * 256u + d[2 * i + 1];
    }
    g->has_alpha = 1;
    return SDQ_OK;
}

static sdq_status sdq__img_data(sdq__img_png *g, const unsigned char *d, size_t n) {
    if (!sdq__grow(g->ctx, (void **)(void *)&g->idat, &g->idat_cap, g->idat_size + n, 1))
        return SDQ_ERR_OOM;
    if (n) memcpy(g->idat + g->idat_size, d, n);
    g->idat_size += n;
    return SDQ_OK;
}

/* Read all chunks. `stage`: 0 before IHDR, 1 before the data, 2 in it, 3 behind it. */
static sdq_status sdq__img_chunks(sdq__img_png *g) {
    int stage = 0;
    for (;;) {
        size_t n;
        const unsigned char *type, *d;
        if (g->end - g->p < 12) return sdq__img_bad(g, "the file ends too early");
        n = sdq__img_be32(g->p);
        type = g->p + 4;
        d = g->p + 8;
        if (n > (size_t)(g->end - d) - 4) return sdq__img_bad(g, "the file ends inside a chunk");
        if (sdq__img_crc(0, type, n + 4) != sdq__img_be32(d + n))
            return sdq__img_bad(g, "wrong CRC");
        g->p = d + n + 4;
        if ((stage == 0) != (memcmp(type, "IHDR", 4) == 0)) return sdq__img_bad(g, "wrong order");
        if (stage == 2 && memcmp(type, "IDAT", 4) != 0) stage = 3;
        if (stage == 0) { SDQ__TRY(sdq__img_header(g, d, n)); stage = 1; }
        else if (memcmp(type, "IDAT", 4) == 0) {
            if (stage == 3) return sdq__img_bad(g, "wrong order");
            stage = 2;
            SDQ__TRY(sdq__img_data(g, d, n));
        }
        else if (memcmp(type, "PLTE", 4) == 0 && stage == 1)
            SDQ__TRY(sdq__img_palette(g, d, n));
        else if (memcmp(type, "tRNS", 4) == 0 && stage == 1)
            SDQ__TRY(sdq__img_transparency(g, d, n));
        else if (memcmp(type, "IEND", 4) == 0) break;
        else if (!(type[0] & 32u)) return sdq__img_bad(g, "an unknown critical chunk");
    }
    if (g->colour == 3 && !g->palette_size) return sdq__img_bad(g, "no palette");
    return SDQ_OK;
}

/* a, b, c are left, above and above left; the one nearest to a + b - c (PNG 9.4). */
static unsigned char sdq__img_paeth(unsigned char a, unsigned char b, unsigned char c) {
    const int pa = abs(b - c), pb = abs(a - c), pc = abs(a + b - 2 * c);
    return pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
}

/* Undo the filter of a row in place. up: the row above (zeros at the top); bpp: bytes a pixel. */
static int sdq__img_unfilter(unsigned char *row, const unsigned char *up, size_t n, size_t bpp,
                             unsigned filter) {
    size_t i;
    if (filter > 4) return 0;
    for (i = 0; i < n && filter; i++) {
        const unsigned char a = i >= bpp ? row[i - bpp] : 0, b = up[i];
        const unsigned char c = i >= bpp ? up[i - bpp] : 0;
        const unsigned add = filter == 1 ? a : filter == 2 ? b : filter == 3 ? (a + b) / 2u
                           : sdq__img_paeth(a, b, c);
        row[i] = (unsigned char)(row[i] + add);
    }
    return 1;
}

/* Sample i of a row at its full depth. */
static unsigned sdq__img_sample(const unsigned char *row, size_t i, unsigned depth) {
    const size_t bit = i * depth;
    if (depth == 16) return row[2 * i] * 256u + row[2 * i + 1];
    if (depth == 8) return row[i];
    return ((unsigned)row[bit / 8] >> (8 - depth - bit % 8)) & ((1u << depth) - 1);
}

static unsigned char sdq__img_to8(unsigned v, unsigned depth) {
    if (depth == 16) return (unsigned char)((v + 128) / 257);
    return (unsigned char)(v * 255 / ((1u << depth) - 1));
}

/* Pixel x of a row -> c bytes. 0 when it is not in the palette. */
static int sdq__img_pixel(const sdq__img_png *g, const unsigned char *row, size_t x, size_t c,
                          unsigned char *out) {
    unsigned i, v, same = 0;
    if (g->colour == 3) {
        v = sdq__img_sample(row, x, g->depth);
        if (v >= g->palette_size) return 0;
        memcpy(out, g->palette[v], c);
        return 1;
    }
    for (i = 0; i < g->samples; i++) {
        v = sdq__img_sample(row, x * g->samples + i, g->depth);
        if (i < 3) same += v == g->key[i];
        out[i] = sdq__img_to8(v, g->depth);
    }
    if (g->has_alpha) out[g->samples] = same == g->samples ? 0 : 255;
    return 1;
}

/* Where Adam7's pass begins and how far its pixels are apart; pass 7 is the whole picture. */
static const unsigned char sdq__img_adam[8][4] = {      /* x, y, step x, step y */
    {0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4}, {0, 2, 2, 4}, {1, 0, 2, 2},
    {0, 1, 1, 2}, {0, 0, 1, 1}};

static size_t sdq__img_pass_size(size_t n, unsigned first, unsigned step) {
    return n > first ? (n - first + step - 1) / step : 0;
}

static size_t sdq__img_row_bytes(const sdq__img_png *g, size_t w) {
    return (w * g->samples * g->depth + 7) / 8;
}

/* Decompressed size: a filter byte and the samples of each row of each pass. At most 2^26 pixels
 * of 8 bytes and as many filter bytes: no overflow. */
static size_t sdq__img_raw_size(const sdq__img_png *g) {
    size_t total = 0;
    unsigned pass;
    for (pass = g->interlace ? 0 : 7; pass < (g->interlace ? 7u : 8u); pass++) {
        const unsigned char *a = sdq__img_adam[pass];
        const size_t w = sdq__img_pass_size(g->w, a[0], a[2]);
        if (w) total += (sdq__img_row_bytes(g, w) + 1) * sdq__img_pass_size(g->h, a[1], a[3]);
    }
    return total;
}

/* Unfilter one pass and spread its pixels. Returns the bytes used, 0 on damage. */
static size_t sdq__img_pass(const sdq__img_png *g, unsigned pass, unsigned char *raw,
                            const unsigned char *zeros, sdq_image *out) {
    const unsigned char *a = sdq__img_adam[pass], *up = zeros;
    const size_t w = sdq__img_pass_size(g->w, a[0], a[2]), h = sdq__img_pass_size(g->h, a[1], a[3]);
    const size_t n = sdq__img_row_bytes(g, w), bpp = sdq__u_max(g->samples * g->depth / 8, 1);
    const int plain = pass == 7 && g->depth == 8 && g->colour != 3 && !g->has_alpha;
    size_t x, y;
    for (y = 0; y < h; y++, raw += n + 1) {
        const size_t line = (a[1] + y * a[3]) * g->w;
        if (!sdq__img_unfilter(raw + 1, up, n, bpp, raw[0])) return 0;
        up = raw + 1;
        if (plain) { memcpy(out->px + line * out->c, up, n); continue; }
        for (x = 0; x < w; x++)
            if (!sdq__img_pixel(g, up, x, out->c, out->px + (line + a[0] + x * a[2]) * out->c))
                return 0;
    }
    return h * (n + 1);
}

static sdq_status sdq__img_unpack(sdq__img_png *g, sdq_image *out) {
    const size_t size = sdq__img_raw_size(g), row = sdq__img_row_bytes(g, g->w);
    const unsigned colours = g->colour == 3 ? 3 : g->samples;
    unsigned char *raw = NULL;
    size_t at = 0;
    unsigned pass;
    const char *error;
    sdq_status st = SDQ_ERR_OOM;
    if (size / 1032 > g->idat_size) return sdq__img_bad(g, "less data than the picture needs");
    raw = SDQ__NEW_N(g->ctx, unsigned char, size + row);        /* a row of zeros at its end */
    if (!raw) return st;
    error = sdq__img_inflate(g->idat, g->idat_size, raw, size);
    if (error) { st = sdq__img_bad(g, error); goto done; }
    SDQ__TRY_DONE(sdq_image_new(g->ctx, g->w, g->h, colours + (g->has_alpha ? 1u : 0u), out));
    for (pass = g->interlace ? 0 : 7; pass < (g->interlace ? 7u : 8u); pass++) {
        size_t used;
        if (!sdq__img_pass_size(g->w, sdq__img_adam[pass][0], sdq__img_adam[pass][2]) ||
            !sdq__img_pass_size(g->h, sdq__img_adam[pass][1], sdq__img_adam[pass][3])) continue;
        used = sdq__img_pass(g, pass, raw + at, raw + size, out);
        if (!used) { st = sdq__img_bad(g, "unknown filter or colour"); goto done; }
        at += used;
    }
done:
    sdq__free(g->ctx, raw);
    if (st != SDQ_OK) sdq_image_free(g->ctx, out);
    return st;
}

static sdq_status sdq__img_read_png(sdq_ctx *ctx, const unsigned char *data, size_t bytes,
                                    const char *what, sdq_image *out) {
    sdq__img_png g;
    sdq_status st;
    memset(&g, 0, sizeof g);
    g.ctx = ctx;
    g.what = what;
    g.p = data + 8;
    g.end = data + bytes;
    st = sdq__img_chunks(&g);
    if (st == SDQ_OK) st = sdq__img_unpack(&g, out);
    sdq__free(ctx, g.idat);
    return st;
}

/* --- reading PPM --- */

/* The next number of the header; comments run from # to the end of the line. 0 when missing. */
static size_t sdq__img_ppm_number(const unsigned char **p, const unsigned char *end) {
    size_t v = 0;
    for (; *p < end && (**p == '#' || **p == ' ' || (**p >= 9 && **p <= 13)); ++*p)
        if (**p == '#') while (*p + 1 < end && **p != '\n') ++*p;
    for (; *p < end && **p >= '0' && **p <= '9' && v < 100000000; ++*p)
        v = v * 10 + (size_t)(**p - '0');
    return v;
}

static sdq_status sdq__img_read_ppm(sdq_ctx *ctx, const unsigned char *data, size_t bytes,
                                    const char *what, sdq_image *out) {
    const unsigned char *p = data + 2, *end = data + bytes;
    const size_t w = sdq__img_ppm_number(&p, end), h = sdq__img_ppm_number(&p, end);
    const size_t top = sdq__img_ppm_number(&p, end), c = data[1] == '6' ? 3 : 1;
    const size_t wide = top > 255 ? 2 : 1;
    size_t n, i;
    if (!w || !h || !top || top > 65535 || p == end)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: damaged PPM header", what);
    p++;                                        /* one white space byte ends the header */
    if (!sdq__u_mul(w, h, &n) || n > SDQ__IMG_PIXELS)
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: %zu x %zu pixels; at most 2^26 can be read",
                         what, w, h);
    n *= c;
    if ((size_t)(end - p) < n * wide)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: damaged PPM: %zu bytes of samples, expected %zu",
                         what, (size_t)(end - p), n * wide);
    SDQ__TRY(sdq_image_new(ctx, w, h, c, out));
    for (i = 0; i < n; i++, p += wide) {
        const size_t v = sdq__u_min(wide == 2 ? p[0] * 256u + p[1] : p[0], top);
        out->px[i] = (unsigned char)((v * 255 + top / 2) / top);
    }
    return SDQ_OK;
}

SDQ_API sdq_status sdq_image_decode(sdq_ctx *ctx, const void *data, size_t bytes,
                                    const char *what, sdq_image *out) {
    const unsigned char *d = (const unsigned char *)data;
    memset(out, 0, sizeof *out);
    if (bytes >= 8 && memcmp(d, "\x89PNG\r\n\x1a\n", 8) == 0)
        return sdq__img_read_png(ctx, d, bytes, what, out);
    if (bytes >= 2 && d[0] == 'P' && (d[1] == '5' || d[1] == '6'))
        return sdq__img_read_ppm(ctx, d, bytes, what, out);
    if (bytes >= 2 && d[0] == 0xff && d[1] == 0xd8)
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: a JPEG; convert it to PNG first", what);
    return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: neither a PNG nor a binary PPM/PGM", what);
}

SDQ_API sdq_status sdq_image_read(sdq_ctx *ctx, const char *path, sdq_image *out) {
    char *data;
    size_t bytes;
    sdq_status st;
    memset(out, 0, sizeof *out);
    SDQ__TRY(sdq__io_read(ctx, path, SDQ__IMG_FILE, &data, &bytes));
    st = sdq_image_decode(ctx, data, bytes, path, out);
    sdq__free(ctx, data);
    return st;
}

/* --- deflate ---
 *
 * LZ77 with hash chains and one step of lazy matching, then blocks of up to 2^15 tokens with
 * their own Huffman codes. A token is a literal, or length << 16 | distance. */

#define SDQ__IMG_WINDOW 32768u
#define SDQ__IMG_TOKENS 32768u
#define SDQ__IMG_CHAIN 64           /* places tried per match: more gains under 1 % on pictures */
#define SDQ__IMG_NEAR 64            /* farther back, less than 6 bytes cost more than literals */

typedef struct sdq__img_deflate_state {
    sdq_ctx *ctx;
    sdq__str *out;
    uint64_t bits;
    unsigned nbits;
    const unsigned char *in;
    size_t n;
    size_t head[SDQ__IMG_WINDOW], prev[SDQ__IMG_WINDOW];    /* position + 1, 0: none */
    uint32_t token[SDQ__IMG_TOKENS], tokens;
    uint32_t lit_freq[286], dist_freq[30];
} sdq__img_deflate_state;

static void sdq__img_put(sdq__img_deflate_state *s, uint32_t v, unsigned n) {
    s->bits |= (uint64_t)v << s->nbits;
    s->nbits += n;
    while (s->nbits >= 8) {
        const char byte = (char)(unsigned char)(s->bits & 255u);
        sdq__str_add(s->ctx, s->out, &byte, 1);
        s->bits >>= 8;
        s->nbits -= 8;
    }
}

/* One Huffman tree over n <= 286 frequencies -> lengths; returns the longest. n^2 is cheap here. */
static unsigned sdq__img_tree(const uint32_t *freq, size_t n, unsigned char *len) {
    uint32_t weight[2 * 286];
    uint16_t parent[2 * 286];
    size_t nodes = n, i;
    unsigned longest = 0;
    memset(parent, 0, sizeof parent);
    memcpy(weight, freq, n * sizeof *freq);
    for (;;) {
        size_t a = SIZE_MAX, b = SIZE_MAX;              /* the two lightest without a parent */
        for (i = 0; i < nodes; i++) {
            if (!weight[i] || parent[i]) continue;
            if (a == SIZE_MAX || weight[i] < weight[a]) { b = a; a = i; }
            else if (b == SIZE_MAX || weight[i] < weight[b]) b = i;
        }
        if (b == SIZE_MAX) break;
        weight[nodes] = weight[a] + weight[b];
        parent[a] = parent[b] = (uint16_t)nodes;
        nodes++;
    }
    for (i = 0; i < n; i++) {
        size_t k = i;
        unsigned depth = 0;
        for (; weight[i] && parent[k]; k = parent[k]) depth++;
        len[i] = (unsigned char)depth;
        if (depth > longest) longest = depth;
    }
    return longest;
}

/* Code lengths of at most `limit` bits: flatten the frequencies until they fit. At least two
 * symbols get a code, as old decoders want. Codes come bit-reversed, as deflate sends them. */
static void sdq__img_make_codes(uint32_t *freq, size_t n, unsigned limit, unsigned char *len,
                                uint16_t *code) {
    unsigned next[17], count[16], i;
    size_t k;
    if (!freq[0]) freq[0] = 1;
    for (k = 1; k < n && !freq[k]; k++) {}
    if (k == n) freq[1] = 1;
    while (sdq__img_tree(freq, n, len) > limit)
        for (k = 0; k < n; k++) if (freq[k]) freq[k] = freq[k] / 2 + 1;
    memset(count, 0, sizeof count);
    for (k = 0; k < n; k++) count[len[k]]++;
    count[0] = 0;
    next[0] = 0;
    for (i = 1; i < 16; i++) next[i] = (next[i - 1] + count[i - 1]) << 1;
    for (k = 0; k < n; k++)
        code[k] = len[k] ? (uint16_t)sdq__img_reverse(next[len[k]]++, len[k]) : (uint16_t)0;
}

static unsigned sdq__img_len_code(unsigned len) {
    unsigned c = 28;
    while (sdq__img_len_base[c] > len) c--;
    return c;
}
static unsigned sdq__img_dist_code(unsigned dist) {
    unsigned c = 29;
    while (sdq__img_dist_base[c] > dist) c--;
    return c;
}

/* Code lengths as symbols 0..15, 16 (repeat 3..6), 17 (zeros 3..10), 18 (zeros 11..138); extra
 * bits in the high byte. Returns how many. */
static size_t sdq__img_run_lengths(const unsigned char *len, size_t n, uint16_t *out) {
    size_t i = 0, m = 0;
    while (i < n) {
        const unsigned v = len[i];
        size_t run = 1;
        while (i + run < n && len[i + run] == v) run++;
        i += run;
        if (v) { out[m++] = (uint16_t)v; run--; }
        while (run >= 3) {
            const size_t k = sdq__u_min(run, v ? 6 : 138), sym = v ? 16 : k > 10 ? 18 : 17;
            out[m++] = (uint16_t)(sym | ((k - (sym == 18 ? 11 : 3)) << 8));
            run -= k;
        }
        while (run--) out[m++] = (uint16_t)v;
    }
    return m;
}

/* The header of a dynamic block: both codes' lengths, run-length and Huffman coded. */
static void sdq__img_put_tables(sdq__img_deflate_state *s, const unsigned char *lit,
                                const unsigned char *dist) {
    unsigned char both[286 + 30], len[19];
    uint16_t runs[286 + 30], code[19];
    uint32_t freq[19];
    size_t n, i, used = 19;
    memcpy(both, lit, 286);
    memcpy(both + 286, dist, 30);
    n = sdq__img_run_lengths(both, 286 + 30, runs);
    memset(freq, 0, sizeof freq);
    for (i = 0; i < n; i++) freq[runs[i] & 255u]++;
    sdq__img_make_codes(freq, 19, 7, len, code);
    while (used > 4 && !len[sdq__img_clen_order[used - 1]]) used--;
    sdq__img_put(s, 286 - 257, 5);
    sdq__img_put(s, 30 - 1, 5);
    sdq__img_put(s, (uint32_t)used - 4, 4);
    for (i = 0; i < used; i++) sdq__img_put(s, len[sdq__img_clen_order[i]], 3);
    for (i = 0; i < n; i++) {
        const unsigned sym = runs[i] & 255u;
        sdq__img_put(s, code[sym], len[sym]);
        if (sym >= 16) sdq__img_put(s, runs[i] >> 8, sym == 16 ? 2 : sym == 17 ? 3 : 7);
    }
}

static void sdq__img_put_block(sdq__img_deflate_state *s, unsigned last) {
    unsigned char lit_len[286], dist_len[30];
    uint16_t lit[286], dist[30];
    uint32_t i;
    s->lit_freq[256] = 1;
    sdq__img_make_codes(s->lit_freq, 286, 15, lit_len, lit);
    sdq__img_make_codes(s->dist_freq, 30, 15, dist_len, dist);
    sdq__img_put(s, last | 4u, 3);                          /* type 2: dynamic */
    sdq__img_put_tables(s, lit_len, dist_len);
    for (i = 0; i < s->tokens; i++) {
        const uint32_t t = s->token[i], len = t >> 16, d = t & 0xffffu;
        unsigned c;
        if (!len) { sdq__img_put(s, lit[t], lit_len[t]); continue; }
        c = sdq__img_len_code(len);
        sdq__img_put(s, lit[257 + c], lit_len[257 + c]);
        sdq__img_put(s, len - sdq__img_len_base[c], sdq__img_len_bits[c]);
        c = sdq__img_dist_code(d);
        sdq__img_put(s, dist[c], dist_len[c]);
        sdq__img_put(s, d - sdq__img_dist_base[c], sdq__img_dist_bits(c));
    }
    sdq__img_put(s, lit[256], lit_len[256]);
    s->tokens = 0;
    memset(s->lit_freq, 0, sizeof s->lit_freq);
    memset(s->dist_freq, 0, sizeof s->dist_freq);
}

static void sdq__img_put_token(sdq__img_deflate_state *s, uint32_t len, uint32_t value) {
    if (s->tokens == SDQ__IMG_TOKENS) sdq__img_put_block(s, 0);
    s->token[s->tokens++] = (len << 16) | value;
    if (!len) { s->lit_freq[value]++; return; }
    s->lit_freq[257 + sdq__img_len_code(len)]++;
    s->dist_freq[sdq__img_dist_code(value)]++;
}

static size_t sdq__img_hash(const unsigned char *p) {
    const uint32_t v = p[0] | ((uint32_t)p[1] << 8) | ((uint32_t)p[2] << 16);
    return (v * 2654435761u) >> 17;                         /* Knuth's multiplier, 15 bits */
}

/* Longest earlier match of what stands at i, then enter i into the chains. */
static size_t sdq__img_match(sdq__img_deflate_state *s, size_t i, size_t *dist) {
    const size_t most = sdq__u_min(s->n - i, 258);
    size_t best = 2, at, h;
    int tries = SDQ__IMG_CHAIN;
    if (most < 3) return 0;
    h = sdq__img_hash(s->in + i);
    for (at = s->head[h]; at && i - (at - 1) < SDQ__IMG_WINDOW && tries-- && best < most;
         at = s->prev[(at - 1) % SDQ__IMG_WINDOW]) {
        const unsigned char *a = s->in + at - 1, *b = s->in + i;
        size_t len = 0;
        if (a[best] != b[best]) continue;
        while (len < most && a[len] == b[len]) len++;
        if (len > best) { best = len; *dist = i - (at - 1); }
    }
    s->prev[i % SDQ__IMG_WINDOW] = s->head[h];
    s->head[h] = i + 1;
    return best >= (*dist > SDQ__IMG_NEAR ? 6u : 3u) ? best : 0;
}

/* Append a zlib stream of n bytes to out. */
static void sdq__img_deflate(sdq_ctx *ctx, const unsigned char *in, size_t n, sdq__str *out) {
    sdq__img_deflate_state *s = SDQ__NEW(ctx, sdq__img_deflate_state);
    const uint32_t sum = sdq__img_adler(in, n);
    size_t i = 0, len = 0, dist = 0, next, next_dist = 0;
    int k;
    if (!s) { out->bad = 1; return; }
    s->ctx = ctx;
    s->out = out;
    s->in = in;
    s->n = n;
    sdq__str_add(ctx, out, "\x78\x9c", 2);
    if (n) len = sdq__img_match(s, 0, &dist);
    while (i < n) {
        next = i + 1 < n ? sdq__img_match(s, i + 1, &next_dist) : 0;
        if (len && len >= next) {                           /* else the match one later is longer */
            sdq__img_put_token(s, (uint32_t)len, (uint32_t)dist);
            for (i += 2, len--; --len; i++) (void)sdq__img_match(s, i, &dist);
            len = i < n ? sdq__img_match(s, i, &dist) : 0;
            continue;
        }
        sdq__img_put_token(s, 0, in[i++]);
        len = next;
        dist = next_dist;
    }
    sdq__img_put_block(s, 1);
    sdq__img_put(s, 0, (8 - s->nbits) & 7u);
    for (k = 24; k >= 0; k -= 8) sdq__img_put(s, (sum >> k) & 255u, 8);
    sdq__free(ctx, s);
}

/* --- writing --- */

static void sdq__img_put_be32(unsigned char *p, uint32_t v) {
    p[0] = (unsigned char)(v >> 24);
    p[1] = (unsigned char)(v >> 16);
    p[2] = (unsigned char)(v >> 8);
    p[3] = (unsigned char)v;
}

/* Begin a chunk: returns where; sdq__img_chunk_end fills in length and CRC. */
static size_t sdq__img_chunk(sdq_ctx *ctx, sdq__str *b, const char *type) {
    const size_t at = b->len;
    sdq__str_add(ctx, b, "\0\0\0\0", 4);
    sdq__str_add(ctx, b, type, 4);
    return at;
}

static void sdq__img_chunk_end(sdq_ctx *ctx, sdq__str *b, size_t at) {
    unsigned char crc[4];
    unsigned char *p;
    if (b->bad) return;
    p = (unsigned char *)b->s + at;
    sdq__img_put_be32(p, (uint32_t)(b->len - at - 8));
    sdq__img_put_be32(crc, sdq__img_crc(0, p + 4, b->len - at - 4));
    sdq__str_add(ctx, b, (const char *)crc, 4);
}

static unsigned char sdq__img_predict(const unsigned char *row, const unsigned char *up, size_t i,
                                      size_t bpp, unsigned filter) {
    const unsigned char a = i >= bpp ? row[i - bpp] : 0, b = up ? up[i] : 0;
    const unsigned char c = i >= bpp && up ? up[i - bpp] : 0;
    switch (filter) {
    case 0: return 0;
    case 1: return a;
    case 2: return b;
    case 3: return (unsigned char)((a + b) / 2);
    default: return sdq__img_paeth(a, b, c);
    }
}

/* The filter whose differences, as signed bytes, have the least sum of magnitudes (PNG 12.8). */
static void sdq__img_filter(unsigned char *out, const unsigned char *row, const unsigned char *up,
                            size_t n, size_t bpp) {
    size_t best = SIZE_MAX, i;
    unsigned filter, use = 0;
    for (filter = 0; filter < 5; filter++) {
        size_t sum = 0;
        for (i = 0; i < n && sum < best; i++) {
            const unsigned d = (row[i] - sdq__img_predict(row, up, i, bpp, filter)) & 255u;
            sum += d < 128 ? d : 256 - d;
        }
        if (sum < best) { best = sum; use = filter; }
    }
    out[0] = (unsigned char)use;
    for (i = 0; i < n; i++)
        out[1 + i] = (unsigned char)(row[i] - sdq__img_predict(row, up, i, bpp, use));
}

static void sdq__img_put_data(sdq_ctx *ctx, sdq__str *b, const sdq_image *m) {
    const size_t n = m->w * m->c;
    unsigned char *raw = SDQ__NEW_N(ctx, unsigned char, (n + 1) * m->h);
    size_t y, at;
    if (!raw) { b->bad = 1; return; }
    for (y = 0; y < m->h; y++)
        sdq__img_filter(raw + (n + 1) * y, m->px + n * y, y ? m->px + n * (y - 1) : NULL, n, m->c);
    at = sdq__img_chunk(ctx, b, "IDAT");
    sdq__img_deflate(ctx, raw, (n + 1) * m->h, b);
    sdq__img_chunk_end(ctx, b, at);
    sdq__free(ctx, raw);
}

/* tEXt holds Latin-1, iTXt UTF-8: plain ASCII goes into the older chunk, which all tools read. */
static void sdq__img_put_text(sdq_ctx *ctx, sdq__str *b, const sdq_pair *t) {
    const char *c;
    size_t at;
    int ascii = 1;
    for (c = t->value; *c; c++) ascii = ascii && (unsigned char)*c < 128;
    at = sdq__img_chunk(ctx, b, ascii ? "tEXt" : "iTXt");
    sdq__str_add(ctx, b, t->key, strlen(t->key) + 1);
    if (!ascii) sdq__str_add(ctx, b, "\0\0\0\0", 4);    /* not compressed, no language, no title */
    sdq__str_add(ctx, b, t->value, strlen(t->value));
    sdq__img_chunk_end(ctx, b, at);
}

static sdq_status sdq__img_check_text(sdq_ctx *ctx, const sdq_pair *text, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) {
        const char *k = text[i].key;
        size_t len = 0;
        int ok = k && text[i].value && strlen(text[i].value) < 0x7fffff00u;
        for (; ok && k[len]; len++) ok = k[len] >= 32 && k[len] < 127;
        if (!ok || len < 1 || len > 79 || !sdq__js_is_utf8(text[i].value))
            return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "PNG text %zu: the key must have 1..79 "
                             "printable ASCII characters, the value must be UTF-8", i);
    }
    return SDQ_OK;
}

static sdq_status sdq__img_check(sdq_ctx *ctx, const sdq_image *m) {
    size_t n;
    if (m && m->px && m->w && m->h && m->c >= 1 && m->c <= 4 && sdq__u_mul(m->w, m->h, &n) &&
        n <= SDQ__IMG_PIXELS) return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "not a picture: 1..4 channels, 1..2^26 pixels and "
                     "samples are needed");
}

SDQ_API void sdq_bytes_free(sdq_ctx *ctx, unsigned char *bytes) { sdq__free(ctx, bytes); }

SDQ_API sdq_status sdq_image_png_encode(sdq_ctx *ctx, const sdq_image *m, const sdq_pair *text,
                                        size_t ntext, unsigned char **png, size_t *bytes) {
    static const unsigned char colour[5] = {0, 0, 4, 2, 6};
    unsigned char header[13];
    sdq__str b;
    size_t i, at;
    *png = NULL;
    *bytes = 0;
    SDQ__TRY(sdq__img_check(ctx, m));
    SDQ__TRY(sdq__img_check_text(ctx, text, ntext));
    memset(&b, 0, sizeof b);
    memset(header, 0, sizeof header);
    sdq__img_put_be32(header, (uint32_t)m->w);
    sdq__img_put_be32(header + 4, (uint32_t)m->h);
    header[8] = 8;
    header[9] = colour[m->c];
    sdq__str_add(ctx, &b, "\x89PNG\r\n\x1a\n", 8);
    at = sdq__img_chunk(ctx, &b, "IHDR");
    sdq__str_add(ctx, &b, (const char *)header, 13);
    sdq__img_chunk_end(ctx, &b, at);
    for (i = 0; i < ntext; i++) sdq__img_put_text(ctx, &b, &text[i]);
    sdq__img_put_data(ctx, &b, m);
    sdq__img_chunk_end(ctx, &b, sdq__img_chunk(ctx, &b, "IEND"));
    if (b.bad) { sdq__str_free(ctx, &b); return SDQ_ERR_OOM; }
    *png = (unsigned char *)b.s;
    *bytes = b.len;
    return SDQ_OK;
}

/* v over white. */
static unsigned char sdq__img_over_white(unsigned v, unsigned alpha) {
    return (unsigned char)((v * alpha + 255 * (255 - alpha) + 127) / 255);
}

SDQ_API sdq_status sdq_image_rgb(sdq_ctx *ctx, const sdq_image *src, sdq_image *dst) {
    size_t i, k;
    const unsigned char *s;
    unsigned char *d;
    memset(dst, 0, sizeof *dst);
    SDQ__TRY(sdq__img_check(ctx, src));
    SDQ__TRY(sdq_image_new(ctx, src->w, src->h, 3, dst));
    s = src->px;
    d = dst->px;
    for (i = src->w * src->h; i; i--, s += src->c, d += 3) {
        const unsigned alpha = src->c % 2 ? 255u : s[src->c - 1];
        for (k = 0; k < 3; k++) d[k] = sdq__img_over_white(s[src->c > 2 ? k : 0], alpha);
    }
    return SDQ_OK;
}

static sdq_status sdq__img_write_ppm(sdq_ctx *ctx, const char *path, const sdq_image *m) {
    sdq_image rgb;
    sdq__io_out o;
    char header[64];
    size_t i;
    const int n = snprintf(header, sizeof header, "P%c\n%zu %zu\n255\n", m->c > 2 ? '6' : '5',
                           m->w, m->h);
    sdq_status st = sdq_image_rgb(ctx, m, &rgb);
    if (st != SDQ_OK) return st;
    st = sdq__io_create(ctx, path, &o);
    if (st == SDQ_OK) {
        sdq__io_put(&o, header, (size_t)n);
        if (m->c > 2) sdq__io_put(&o, rgb.px, m->w * m->h * 3);
        else for (i = 0; i < m->w * m->h; i++) sdq__io_put(&o, rgb.px + 3 * i, 1);
        st = sdq__io_finish(ctx, &o, SDQ_OK);
    }
    sdq_image_free(ctx, &rgb);
    return st;
}

SDQ_API sdq_status sdq_image_write(sdq_ctx *ctx, const char *path, const sdq_image *m,
                                   const sdq_pair *text, size_t ntext) {
    unsigned char *png;
    size_t bytes;
    sdq_status st;
    SDQ__TRY(sdq__img_check(ctx, m));
    if (sdq__io_ends(path, ".ppm") || sdq__io_ends(path, ".pgm"))
        return sdq__img_write_ppm(ctx, path, m);
    SDQ__TRY(sdq_image_png_encode(ctx, m, text, ntext, &png, &bytes));
    st = sdq__io_write(ctx, path, png, bytes);
    sdq__free(ctx, png);
    return st;
}

/* --- resizing ---
 *
 * Along one axis, output i is a weighted mean of inputs around (i + 1/2) scale with a triangle of
 * half-width max(scale, 1), weights in 22-bit fixed point; first rows, then columns, rounded to
 * 8 bits between. These are Pillow's steps (Resample.c), so the results are equal, but for one
 * case: since version 13 it takes columns first where the height shrinks by more than twice what
 * the width does. A sample may then differ by 1. */

#define SDQ__IMG_FIX 22

typedef struct sdq__img_taps { size_t *first, *count; int32_t *w; size_t most; } sdq__img_taps;

static void sdq__img_taps_free(sdq_ctx *ctx, sdq__img_taps *t) {
    sdq__free(ctx, t->first);
    sdq__free(ctx, t->count);
    sdq__free(ctx, t->w);
    memset(t, 0, sizeof *t);
}

/* The weights of output i, normalised to 1 in double and then rounded to fixed point. */
static void sdq__img_tap(sdq__img_taps *t, size_t i, size_t in, double scale, double *k) {
    const double wide = scale < 1 ? 1 : scale, centre = ((double)i + 0.5) * scale;
    const double lo = centre - wide + 0.5, hi = centre + wide + 0.5;
    const size_t first = lo < 0 ? 0 : (size_t)lo, end = sdq__u_min((size_t)hi, in);
    double sum = 0;
    size_t j;
    t->first[i] = first;
    t->count[i] = end - first;
    for (j = 0; j < end - first; j++) {
        const double x = fabs(((double)(j + first) - centre + 0.5) * (1.0 / wide));
        k[j] = x < 1 ? 1 - x : 0;
        sum += k[j];
    }
    if (sum == 0) sum = 1;
    for (j = 0; j < end - first; j++)
        t->w[i * t->most + j] = (int32_t)(0.5 + k[j] / sum * (1 << SDQ__IMG_FIX));
}

static sdq_status sdq__img_taps_make(sdq_ctx *ctx, size_t in, size_t out, sdq__img_taps *t) {
    const double scale = (double)in / (double)out;
    size_t i, n;
    double *k;
    memset(t, 0, sizeof *t);
    t->most = (size_t)ceil(scale < 1 ? 1 : scale) * 2 + 1;
    if (!sdq__u_mul(t->most, out, &n)) n = SIZE_MAX;
    t->first = SDQ__NEW_N(ctx, size_t, out);
    t->count = SDQ__NEW_N(ctx, size_t, out);
    t->w = SDQ__NEW_N(ctx, int32_t, n);
    k = SDQ__NEW_N(ctx, double, t->most);
    if (t->first && t->count && t->w && k)
        for (i = 0; i < out; i++) sdq__img_tap(t, i, in, scale, k);
    sdq__free(ctx, k);
    if (k && t->w && t->first && t->count) return SDQ_OK;
    sdq__img_taps_free(ctx, t);
    return SDQ_ERR_OOM;
}

/* One axis: `outer` groups of `in` elements that are `inner` bytes apart -> out of them. */
static void sdq__img_axis(const sdq__img_taps *t, const unsigned char *src, unsigned char *dst,
                          size_t outer, size_t in, size_t out, size_t inner) {
    size_t o, i, j, k;
    for (o = 0; o < outer; o++)
        for (i = 0; i < out; i++)
            for (k = 0; k < inner; k++) {
                const unsigned char *s = src + (o * in + t->first[i]) * inner + k;
                const int32_t *w = t->w + i * t->most;
                int32_t sum = 1 << (SDQ__IMG_FIX - 1);
                for (j = 0; j < t->count[i]; j++) sum += w[j] * s[j * inner];
                sum >>= SDQ__IMG_FIX;
                dst[(o * out + i) * inner + k] = (unsigned char)(sum > 255 ? 255 : sum);
            }
}

SDQ_API sdq_status sdq_image_resize(sdq_ctx *ctx, const sdq_image *src, size_t w, size_t h,
                                    sdq_image *dst) {
    sdq__img_taps x, y;
    sdq_image wide;
    sdq_status st;
    memset(&x, 0, sizeof x);
    memset(&y, 0, sizeof y);
    memset(&wide, 0, sizeof wide);
    memset(dst, 0, sizeof *dst);
    SDQ__TRY(sdq__img_check(ctx, src));
    SDQ__TRY_DONE(sdq_image_new(ctx, w, h, src->c, dst));
    SDQ__TRY_DONE(sdq_image_new(ctx, w, src->h, src->c, &wide));
    SDQ__TRY_DONE(sdq__img_taps_make(ctx, src->w, w, &x));
    SDQ__TRY_DONE(sdq__img_taps_make(ctx, src->h, h, &y));
    sdq__img_axis(&x, src->px, wide.px, src->h, src->w, w, src->c);
    sdq__img_axis(&y, wide.px, dst->px, 1, src->h, h, w * src->c);
done:
    sdq__img_taps_free(ctx, &y);
    sdq__img_taps_free(ctx, &x);
    sdq_image_free(ctx, &wide);
    if (st != SDQ_OK) sdq_image_free(ctx, dst);
    return st;
}

/* Half of what is cut away, halves to even: torchvision's CenterCrop (Python's round). */
static size_t sdq__img_half(size_t d) { return d % 2 ? d / 2 + (d / 2 & 1u) : d / 2; }

SDQ_API sdq_status sdq_image_fit(sdq_ctx *ctx, const sdq_image *src, size_t w, size_t h,
                                 sdq_image *dst) {
    sdq_image big;
    size_t bw = w, bh = h, y, x0, y0;
    sdq_status st;
    memset(dst, 0, sizeof *dst);
    SDQ__TRY(sdq__img_check(ctx, src));
    if (!w || !h || w > SDQ__IMG_PIXELS || h > SDQ__IMG_PIXELS / w)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "a picture of %zu x %zu pixels cannot be made; "
                         "1..2^26 pixels are allowed", w, h);
    if ((uint64_t)w * src->h >= (uint64_t)h * src->w)       /* the width decides */
        bh = sdq__u_max(h, (size_t)((uint64_t)w * src->h / src->w));
    else bw = sdq__u_max(w, (size_t)((uint64_t)h * src->w / src->h));
    SDQ__TRY(sdq_image_resize(ctx, src, bw, bh, &big));
    st = sdq_image_new(ctx, w, h, src->c, dst);
    x0 = sdq__img_half(bw - w);
    y0 = sdq__img_half(bh - h);
    for (y = 0; y < h && st == SDQ_OK; y++)
        memcpy(dst->px + y * w * src->c, big.px + ((y0 + y) * bw + x0) * src->c, w * src->c);
    sdq_image_free(ctx, &big);
    return st;
}

/* ===========================================================================
 * >>dataset   folders of pictures with captions
 *
 * Three layouts, tried in this order: metadata.jsonl (one JSON object per line, as Hugging Face's
 * imagefolder), metadata.csv (RFC 4180, quoted fields may hold commas and line ends), NAME.txt
 * beside NAME.png. Only the list is kept; a picture is decoded each time that it is asked for.
 * ======================================================================== */

#define SDQ__DATA_TEXT ((size_t)1 << 28)        /* bytes of a metadata file */

typedef struct sdq__data_item { char *path, *caption; float weight; } sdq__data_item;

struct sdq_dataset { char *folder; sdq__data_item *items; size_t count, cap; };

SDQ_API void sdq_dataset_free(sdq_ctx *ctx, sdq_dataset *d) {
    size_t i;
    if (!d) return;
    for (i = 0; i < d->count; i++) {
        sdq__free(ctx, d->items[i].path);
        sdq__free(ctx, d->items[i].caption);
    }
    sdq__free(ctx, d->items);
    sdq__free(ctx, d->folder);
    sdq__free(ctx, d);
}

/* Add an item; `where` names its source in error sentences. */
static sdq_status sdq__data_add(sdq_ctx *ctx, sdq_dataset *d, const char *where, const char *name,
                                const char *caption, double weight) {
    sdq__data_item *item;
    if (!name || !caption)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: file_name or text is missing", where);
    if (!sdq__io_safe_name(name, 1))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: the file name '%s' leaves the folder", where,
                         name);
    if (!(weight >= 0) || weight > 1e30)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: a weight must be a number from 0 up", where);
    if (!sdq__grow(ctx, (void **)(void *)&d->items, &d->cap, d->count + 1, sizeof *d->items))
        return SDQ_ERR_OOM;
    item = &d->items[d->count++];               /* counted first: freed with the rest on failure */
    item->path = sdq__io_join(ctx, d->folder, "/", name);
    item->caption = sdq__strdup(ctx, caption);
    item->weight = (float)weight;
    return item->path && item->caption ? SDQ_OK : SDQ_ERR_OOM;
}

static sdq_status sdq__data_jsonl(sdq_ctx *ctx, sdq_dataset *d, const char *path, char *text,
                                  size_t len) {
    char *p = text, *end = text + len;
    size_t line = 1;
    for (; p < end; line++) {
        char *stop = (char *)memchr(p, '\n', (size_t)(end - p)), *from = p;
        char where[512];
        sdq__json *v;
        sdq_status st;
        if (!stop) stop = end;
        p = stop + 1;
        while (from < stop && strchr(" \t\r", *from)) from++;
        if (from == stop) continue;
        (void)snprintf(where, sizeof where, "%.400s, record %zu", path, line);
        SDQ__TRY(sdq__js_parse(ctx, from, (size_t)(stop - from), where, &v));
        st = sdq__data_add(ctx, d, where, sdq__js_string(v, "file_name", NULL),
                           sdq__js_string(v, "text", NULL), sdq__js_double(v, "weight", 1));
        sdq__js_free(ctx, v);
        if (st != SDQ_OK) return st;
    }
    return SDQ_OK;
}

/* Cut the next field out of *p, decoded in place. Returns ',' or '\n' for what ended it, 0 for
 * the end of the text, -1 for a quote that is never closed. */
static int sdq__data_field(char **p, char **field) {
    char *s = *p, *o = *p;
    int quoted = *s == '"', end;
    *field = o;
    if (quoted) s++;
    for (;; s++) {
        if (quoted && *s == 0) return -1;
        if (quoted && *s == '"') {
            if (s[1] != '"') { quoted = 0; continue; }
            s++;
        } else if (!quoted && (*s == ',' || *s == '\n' || *s == 0)) break;
        *o++ = *s;
    }
    end = *s;
    *p = end ? s + 1 : s;
    if (end != ',' && o > *field && o[-1] == '\r') o--;
    *o = 0;
    return end;
}

static sdq_status sdq__data_number(sdq_ctx *ctx, const char *text, const char *where, double *out) {
    sdq__json *v;
    SDQ__TRY(sdq__js_parse(ctx, text, strlen(text), where, &v));
    *out = v->kind == SDQ__JS_NUMBER ? v->num : -1;
    sdq__js_free(ctx, v);
    return SDQ_OK;
}

/* text ends in a 0; its first record names the columns. */
static sdq_status sdq__data_csv(sdq_ctx *ctx, sdq_dataset *d, const char *path, char *text) {
    int column[3] = {-1, -1, -1}, end, i;
    static const char *const name[3] = {"file_name", "text", "weight"};
    size_t record = 0;
    char *p = text;
    if (strncmp(p, "\xef\xbb\xbf", 3) == 0) p += 3;         /* byte order mark of spreadsheets */
    while (*p) {
        char *value[3] = {NULL, NULL, NULL}, *field, *first = p;
        char where[512];
        double weight = 1;
        int at = 0;
        (void)snprintf(where, sizeof where, "%.400s, record %zu", path, record + 1);
        do {
            end = sdq__data_field(&p, &field);
            for (i = 0; i < 3; i++) {
                if (record == 0 && strcmp(field, name[i]) == 0) column[i] = at;
                if (record > 0 && column[i] == at) value[i] = field;
            }
            at++;
        } while (end == ',');
        if (end < 0) return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: a quote is not closed", where);
        if (record++ == 0 || (at == 1 && !*first)) continue;
        if (value[2] && *value[2]) SDQ__TRY(sdq__data_number(ctx, value[2], where, &weight));
        SDQ__TRY(sdq__data_add(ctx, d, where, value[0], value[1], weight));
    }
    return SDQ_OK;
}

static int sdq__data_is_picture(const char *name) {
    return sdq__io_ends(name, ".png") || sdq__io_ends(name, ".ppm") || sdq__io_ends(name, ".pgm");
}

/* The picture of that name if a caption stands beside it. */
static sdq_status sdq__data_pair(sdq_ctx *ctx, sdq_dataset *d, const char *name) {
    char *path = sdq__io_join(ctx, d->folder, "/", name), *text = NULL;
    size_t len;
    sdq_status st = SDQ_ERR_OOM;
    if (!path) return st;
    memcpy(path + strlen(path) - 4, ".txt", 4);
    st = SDQ_OK;
    if (!sdq__io_exists(path)) goto done;
    SDQ__TRY_DONE(sdq__io_read(ctx, path, SDQ__DATA_TEXT, &text, &len));
    while (len && strchr(" \t\r\n", text[len - 1])) text[--len] = 0;
    st = sdq__data_add(ctx, d, path, name, text, 1);
done:
    sdq__free(ctx, text);
    sdq__free(ctx, path);
    return st;
}

static int sdq__data_by_path(const void *a, const void *b) {
    return strcmp(((const sdq__data_item *)a)->path, ((const sdq__data_item *)b)->path);
}

static sdq_status sdq__data_list(sdq_ctx *ctx, sdq_dataset *d) {
#if SDQ__MMAP
    DIR *dir = opendir(d->folder);
    struct dirent *e;
    sdq_status st = SDQ_OK;
    if (!dir) return sdq__fail(ctx, SDQ_ERR_IO, "%s: cannot be opened as a folder", d->folder);
    while (st == SDQ_OK && (e = readdir(dir)) != NULL)
        if (sdq__data_is_picture(e->d_name)) st = sdq__data_pair(ctx, d, e->d_name);
    closedir(dir);
    if (d->count) qsort(d->items, d->count, sizeof *d->items, sdq__data_by_path);
    return st;
#else
    return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: has no metadata.jsonl or metadata.csv, and "
                     "folders cannot be listed on this platform", d->folder);
#endif
}

/* Read the metadata file of that name; *found 0 when there is none. */
static sdq_status sdq__data_metadata(sdq_ctx *ctx, sdq_dataset *d, const char *name, int *found) {
    char *path = sdq__io_join(ctx, d->folder, "/", name), *text = NULL;
    size_t len;
    sdq_status st = SDQ_ERR_OOM;
    if (!path) return st;
    st = SDQ_OK;
    *found = sdq__io_exists(path);
    if (!*found) goto done;
    SDQ__TRY_DONE(sdq__io_read(ctx, path, SDQ__DATA_TEXT, &text, &len));
    st = sdq__io_ends(name, ".csv") ? sdq__data_csv(ctx, d, path, text)
                                    : sdq__data_jsonl(ctx, d, path, text, len);
done:
    sdq__free(ctx, text);
    sdq__free(ctx, path);
    return st;
}

SDQ_API sdq_status sdq_dataset_open(sdq_ctx *ctx, const char *folder, sdq_dataset **out) {
    sdq_dataset *d = SDQ__NEW(ctx, sdq_dataset);
    int found = 0;
    sdq_status st = SDQ_ERR_OOM;
    *out = NULL;
    if (!d) return st;
    d->folder = sdq__strdup(ctx, folder);
    if (!d->folder) goto done;
    SDQ__TRY_DONE(sdq__data_metadata(ctx, d, "metadata.jsonl", &found));
    if (!found) SDQ__TRY_DONE(sdq__data_metadata(ctx, d, "metadata.csv", &found));
    if (!found) SDQ__TRY_DONE(sdq__data_list(ctx, d));
    if (d->count) { *out = d; d = NULL; }
    else st = sdq__fail(ctx, SDQ_ERR_MISSING, "%s: no picture with a caption found "
                        "(metadata.jsonl, metadata.csv, or NAME.png with NAME.txt)", folder);
done:
    sdq_dataset_free(ctx, d);
    return st;
}

SDQ_API size_t sdq_dataset_count(const sdq_dataset *d) { return d->count; }
SDQ_API const char *sdq_dataset_caption(const sdq_dataset *d, size_t i) {
    return i < d->count ? d->items[i].caption : "";
}
SDQ_API float sdq_dataset_weight(const sdq_dataset *d, size_t i) {
    return i < d->count ? d->items[i].weight : 0;
}
SDQ_API const char *sdq_dataset_path(const sdq_dataset *d, size_t i) {
    return i < d->count ? d->items[i].path : "";
}

SDQ_API sdq_status sdq_dataset_image(sdq_ctx *ctx, const sdq_dataset *d, size_t i, sdq_image *out) {
    sdq_image m;
    sdq_status st;
    memset(out, 0, sizeof *out);
    if (i >= d->count)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: picture %zu asked for, there are %zu",
                         d->folder, i, d->count);
    SDQ__TRY(sdq_image_read(ctx, d->items[i].path, &m));
    st = sdq_image_rgb(ctx, &m, out);
    sdq_image_free(ctx, &m);
    return st;
}

/* ===========================================================================
 * >>tokenizer   prompts to ids: byte-pair encoding as CLIP does it
 *
 * Follows transformers' CLIPTokenizerFast: NFC; lower case, letter by letter; special tokens
 * anywhere in the text; then the pieces of
 *   's|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+
 * Each piece is a row of bytes, the last one marked as the word's end, whose neighbours are joined
 * in the order of the merges list (Sennrich et al. 2016, arXiv 1508.07909): always the pair of the
 * lowest rank, the leftmost of equals. No length or id is built in: they come from the files, or
 * from the order of the merges. Texts of more than 2^20 bytes are refused.
 * ======================================================================== */

#define SDQ__TOK_TEXT ((size_t)1 << 20)
#define SDQ__TOK_MERGES ((size_t)1 << 18)

/* unicode tables: begin (tools/unicode_tables.py) */
/* Unicode 15.0.0 */
static const int32_t sdq__tok_u_class[1562] = {
    36,23,72,7,60,42,28,105,24,105,40,7,104,7,36,5,28,10,4,5,12,6,5,4,14,4,93,4,125,4,1833,16,49,
    56,21,28,5,4,5,516,21,4,9,8,17,4,5,24,5,4,13,4,5,4,81,4,333,4,557,32,665,4,153,8,5,24,165,284,
    109,16,17,180,173,84,42,16,9,4,397,4,5,60,9,28,9,42,13,8,5,64,5,4,121,116,357,44,5,56,42,133,
    36,9,16,5,20,89,16,5,36,5,12,5,92,101,28,45,20,97,4,25,68,169,232,217,12,5,72,5,28,41,16,42,4,
    65,16,33,8,9,8,89,4,29,4,5,12,17,12,5,64,5,52,9,4,13,16,42,9,8,26,8,5,32,25,16,9,8,89,4,29,4,9,
    4,9,4,9,124,17,4,5,28,42,8,13,64,37,4,13,4,89,4,29,4,9,4,21,12,5,72,5,60,9,16,42,36,5,44,33,8,
    9,8,89,4,29,4,9,4,21,12,5,120,9,4,13,16,42,4,5,26,44,5,4,25,12,13,4,17,12,9,4,5,4,9,12,9,12,13,
    12,49,88,5,84,54,72,33,4,13,4,93,4,65,12,5,104,13,8,5,8,9,16,42,32,30,4,5,16,33,4,13,4,93,4,41,
    4,21,12,5,124,9,4,9,16,42,4,9,68,37,4,13,4,165,8,5,64,5,20,13,4,30,13,16,78,4,25,20,73,12,97,4,
    37,4,5,8,29,124,42,68,193,4,9,48,29,36,42,156,9,4,5,4,21,4,97,4,5,4,41,4,9,36,5,8,21,4,5,36,42,
    8,17,128,5,124,82,48,33,4,145,108,21,460,173,80,5,42,24,25,16,17,12,5,12,9,28,13,16,53,48,5,4,
    42,24,153,4,5,20,5,8,173,4,1333,4,17,8,29,4,5,4,17,8,165,4,17,8,133,4,17,8,29,4,5,4,17,8,61,4,
    229,4,17,8,269,56,82,12,65,64,345,8,25,12,2481,8,69,7,105,20,301,12,14,33,28,73,52,77,56,73,56,
    53,4,13,60,209,140,5,16,5,12,42,24,42,88,42,24,357,28,21,8,137,4,5,20,281,40,125,156,42,121,8,
    21,44,177,16,105,24,46,148,93,36,213,172,42,24,42,52,5,372,189,68,33,12,42,164,121,52,9,42,177,
    104,145,112,42,12,13,42,145,8,37,28,173,8,13,164,17,4,25,4,9,12,5,20,769,256,1113,8,25,8,153,8,
    25,8,33,4,5,4,5,4,5,4,125,8,213,4,29,4,5,12,13,4,29,12,17,8,25,16,53,20,13,4,29,12,47,116,11,
    20,7,188,7,64,6,5,8,26,20,5,42,24,53,404,5,16,5,8,41,4,5,12,21,24,5,4,5,4,5,4,17,4,45,8,17,20,
    21,16,5,4,206,9,22,2904,242,312,90,2520,122,4528,917,24,17,12,9,36,6,8,153,4,5,20,5,8,225,28,5,
    64,93,36,29,4,29,4,29,4,29,4,29,4,29,4,29,4,29,320,5,1856,7,16,9,6,100,38,28,21,8,14,9,16,345,
    24,13,4,361,4,17,20,173,4,377,12,18,40,129,192,65,128,42,120,34,4,62,128,42,156,62,1280,26369,
    256,88629,268,185,8,1077,12,65,42,9,80,189,64,125,8,281,42,156,37,8,413,8,257,20,9,4,5,4,21,96,
    65,4,13,4,17,4,93,52,26,40,209,56,201,112,42,96,25,12,5,4,9,4,42,113,40,93,100,117,28,189,112,
    5,42,24,21,4,41,42,21,4,165,92,13,4,33,16,42,24,93,12,5,12,201,4,5,12,9,8,21,8,5,4,5,96,13,8,
    45,28,13,48,25,8,25,8,25,36,29,4,29,4,173,4,57,24,461,52,42,24,44689,48,93,16,197,33808,1465,8,
    425,152,29,48,21,20,5,4,41,4,53,4,21,4,5,4,9,4,9,4,433,132,1453,72,257,8,217,160,49,464,21,4,
    541,76,42,28,105,24,105,44,357,12,25,8,25,8,25,8,13,140,49,4,105,4,77,4,9,4,61,8,57,136,493,48,
    182,48,230,68,10,976,117,12,197,64,110,16,129,18,36,81,6,33,6,20,153,40,121,8,145,16,33,4,22,
    168,633,8,42,24,145,16,145,16,161,32,209,48,45,4,61,4,29,4,9,4,45,4,61,4,29,4,9,268,1245,36,89,
    40,33,96,25,4,169,4,37,276,25,8,5,4,177,4,9,12,5,8,93,8,34,93,8,30,125,32,38,192,77,4,9,20,22,
    89,26,16,105,280,225,16,10,9,66,8,186,5,60,17,4,13,4,117,40,38,92,117,10,4,117,14,128,33,4,113,
    24,22,64,217,40,89,8,34,77,20,34,73,92,30,320,293,220,205,52,205,28,26,145,48,42,1176,126,4,
    169,24,9,312,117,42,5,32,89,44,18,108,73,184,85,30,80,93,48,213,104,122,4,9,8,5,52,181,128,101,
    28,42,36,145,60,42,16,5,8,5,32,141,12,5,48,193,56,17,44,42,5,4,5,16,82,44,73,4,101,76,9,252,29,
    4,5,4,17,4,61,4,41,28,189,68,42,44,33,8,9,8,89,4,29,4,9,4,21,12,5,72,5,48,21,632,213,72,17,20,
    42,20,13,120,193,80,9,4,5,32,42,664,189,164,17,144,193,80,5,44,42,152,173,52,5,28,42,216,109,
    84,50,16,29,740,177,464,257,78,48,33,8,5,8,33,4,9,4,97,60,5,4,5,56,42,280,33,8,157,64,5,4,5,
    112,5,40,161,28,5,84,5,44,185,76,5,72,293,1052,37,4,149,68,5,60,118,20,121,448,29,4,9,4,153,84,
    5,36,42,24,25,4,9,4,129,56,5,28,42,1240,77,60,5,4,53,4,137,112,42,344,5,60,86,172,3689,408,446,
    68,785,10544,389,60,4289,68,25,16100,2333,34532,2277,28,125,4,42,24,317,4,42,24,121,72,193,64,
    17,48,42,4,30,4,85,20,77,2752,257,94,420,301,20,5,264,53,256,9,4,5,112,24545,32,4953,168,37,
    35740,17,4,29,4,9,4,1165,60,5,116,13,8,5,56,17,32,1585,9232,429,20,53,12,37,28,41,22680,82,48,
    82,432,102,540,341,4,285,4,9,8,5,8,9,8,17,4,49,4,5,4,29,4,261,4,17,8,33,4,29,4,113,4,17,4,21,4,
    5,12,29,4,1361,8,101,4,101,4,125,4,101,4,125,4,101,4,125,4,101,4,125,4,101,4,33,8,202,7168,125,
    24,25,1044,249,584,181,40,29,8,42,16,5,1284,121,72,177,16,42,1880,113,16,42,2968,29,4,17,4,9,4,
    61,4,789,8,38,192,273,28,5,16,42,3164,238,4,14,4,18,304,182,4,62,776,17,4,109,4,9,4,5,8,5,4,41,
    4,17,4,5,4,5,24,5,16,5,4,5,4,5,4,13,4,9,4,5,8,5,4,5,4,5,4,5,4,5,4,9,4,5,8,17,4,29,4,17,4,17,4,
    5,4,41,4,69,20,13,4,21,4,69,2320,54,11148,42,4120,170881,128,16617,24,889,8,23049,56,29893,
    12412,2169,6024,19757,20,16769,3633472};
static const int32_t sdq__tok_u_ccc[1164] = {
    768,21,230,0,1,232,0,4,220,0,1,232,0,1,216,0,5,220,0,2,202,0,4,220,0,2,202,0,11,220,0,5,1,0,4,
    220,0,8,230,0,1,240,0,1,230,0,3,220,0,3,230,0,2,220,1,3,230,0,4,220,0,1,230,0,1,232,0,2,220,0,
    1,230,0,1,233,0,2,234,0,1,233,0,2,234,0,1,233,0,13,230,275,5,230,265,1,220,0,4,230,0,1,220,0,3,
    230,0,1,222,0,1,220,0,6,230,0,6,220,0,2,230,0,1,220,0,2,230,0,1,222,0,1,228,0,1,230,0,1,10,0,1,
    11,0,1,12,0,1,13,0,1,14,0,1,15,0,1,16,0,1,17,0,1,18,0,2,19,0,1,20,0,1,21,0,1,22,1,1,23,1,1,24,
    0,1,25,1,1,230,0,1,220,1,1,18,72,8,230,0,1,30,0,1,31,0,1,32,48,1,27,0,1,28,0,1,29,0,1,30,0,1,
    31,0,1,32,0,1,33,0,1,34,0,2,230,0,2,220,0,5,230,0,1,220,0,2,230,0,1,220,16,1,35,101,7,230,2,4,
    230,0,1,220,0,1,230,2,2,230,1,1,220,0,2,230,0,1,220,35,1,36,30,1,230,0,1,220,0,2,230,0,1,220,0,
    2,230,0,3,220,0,1,230,0,2,220,0,1,230,0,1,220,0,3,230,0,1,220,0,1,230,0,1,220,0,1,230,0,1,220,
    0,1,230,0,1,220,0,2,230,160,7,230,0,1,220,0,1,230,9,1,220,24,4,230,1,9,230,1,3,230,1,5,230,43,
    3,220,60,1,230,0,3,220,0,4,230,42,5,230,0,5,220,0,14,230,1,1,220,0,2,230,0,1,220,0,2,230,0,1,
    220,0,3,230,0,3,220,0,1,27,0,1,28,0,1,29,0,3,230,0,1,220,0,2,230,0,2,220,0,5,230,60,1,7,16,1,9,
    3,1,230,0,1,220,0,2,230,103,1,7,16,1,9,48,1,230,61,1,7,16,1,9,110,1,7,16,1,9,110,1,7,16,1,9,
    127,1,9,110,1,7,16,1,9,7,1,84,0,1,91,101,1,7,16,1,9,109,2,9,16,1,9,124,1,9,109,2,103,0,1,9,13,
    4,107,108,2,118,0,1,9,13,4,122,76,2,220,27,1,220,1,1,220,1,1,216,55,1,129,0,1,130,1,1,132,5,4,
    130,2,1,130,1,2,230,0,1,9,1,2,230,62,1,220,112,1,7,1,2,9,82,1,220,719,3,230,948,2,9,30,1,9,157,
    1,9,10,1,230,203,1,228,143,1,222,0,1,230,0,1,220,219,1,230,0,1,220,71,1,9,20,8,230,2,1,220,48,
    5,230,0,6,220,0,2,230,0,1,220,1,2,220,0,2,230,0,2,220,0,5,230,0,1,220,0,4,230,101,1,7,15,1,9,
    38,1,230,0,1,220,0,7,230,54,2,9,58,1,7,11,2,9,67,1,7,152,3,230,1,1,1,0,5,220,0,2,230,0,4,220,0,
    1,230,1,7,1,4,1,220,6,1,230,3,2,230,198,2,230,0,1,220,0,7,230,0,1,220,0,2,230,0,1,234,0,1,214,
    0,1,220,0,1,202,0,37,230,0,1,232,0,2,228,0,1,220,0,1,218,0,1,230,0,1,233,0,1,220,0,1,230,0,1,
    220,720,2,230,0,2,1,0,4,230,0,3,1,0,2,230,4,1,230,3,2,1,0,1,230,0,1,220,0,1,230,0,2,1,0,4,220,
    0,1,230,3070,3,230,141,1,9,96,32,230,554,1,218,0,1,228,0,1,232,0,1,222,0,2,224,105,2,8,30164,1,
    230,4,10,230,32,2,230,80,2,230,276,1,9,37,1,9,151,1,9,27,18,230,57,3,220,37,1,9,95,1,7,12,1,9,
    239,1,230,1,2,230,0,1,220,2,2,230,5,2,230,1,1,230,52,1,9,246,1,9,20272,1,26,769,7,230,0,7,220,
    0,2,230,973,1,220,226,1,220,149,5,230,1682,1,220,1,1,230,40,1,230,0,1,1,0,1,220,4,1,9,165,1,
    230,0,1,220,573,4,230,387,2,230,80,3,220,70,2,220,0,3,230,0,1,220,0,1,230,0,4,220,49,1,230,0,1,
    220,0,1,230,0,1,220,192,1,9,41,1,9,14,1,9,57,1,9,0,1,7,69,3,230,48,2,9,62,1,7,76,1,9,9,1,7,106,
    1,9,0,1,7,178,1,7,0,1,9,80,2,7,16,1,9,24,7,230,3,5,230,205,1,9,3,1,7,23,1,230,99,1,9,0,1,7,251,
    1,9,0,1,7,126,1,9,118,1,9,0,1,7,115,1,9,269,1,9,0,1,7,258,2,9,4,1,7,156,1,9,83,1,9,18,1,9,81,1,
    9,421,1,9,258,1,7,1,2,9,81,1,9,425,2,9,19373,5,1,59,7,230,1209,2,6,19628,1,1,5318,2,216,0,3,1,
    3,1,226,0,5,216,8,8,220,2,5,230,0,2,220,30,4,230,148,3,230,3515,7,230,1,17,230,2,7,230,1,2,230,
    1,5,230,100,1,230,160,7,230,375,1,230,61,4,230,508,2,232,0,1,220,0,1,230,992,7,220,109,6,230,0,
    1,7};
static const int32_t sdq__tok_u_lower[732] = {
    65,26,1,32,102,23,1,32,2,7,1,32,34,24,2,1,2,1,1,-199,2,3,2,1,3,8,2,1,3,23,2,1,2,1,1,-121,1,3,2,
    1,4,1,1,210,1,2,2,1,2,1,1,206,1,1,1,1,2,2,1,205,1,1,1,1,3,1,1,79,1,1,1,202,1,1,1,203,1,1,1,1,2,
    1,1,205,1,1,1,207,2,1,1,211,1,1,1,209,1,1,1,1,4,1,1,211,1,1,1,213,2,1,1,214,1,3,2,1,2,1,1,218,
    1,1,1,1,2,1,1,218,3,1,1,1,2,1,1,218,1,1,1,1,2,2,1,217,1,2,2,1,2,1,1,219,1,1,1,1,4,1,1,1,8,1,1,
    2,1,1,1,1,2,1,1,2,1,1,1,1,2,1,1,2,1,9,2,1,3,9,2,1,3,1,1,2,1,2,2,1,2,1,1,-97,1,1,1,-56,1,20,2,1,
    2,1,1,-130,2,9,2,1,8,1,1,10795,1,1,1,1,2,1,1,-163,1,1,1,10792,3,1,1,1,2,1,1,-195,1,1,1,69,1,1,
    1,71,1,5,2,1,290,2,2,1,4,1,1,1,9,1,1,116,7,1,1,38,2,3,1,37,2,1,1,64,2,2,1,63,2,17,1,32,2,9,1,
    32,36,1,1,8,9,12,2,1,6,1,1,-60,3,1,1,1,2,1,1,-7,1,1,1,1,3,3,1,-130,1,16,1,80,1,32,1,32,49,17,2,
    1,10,27,2,1,2,1,1,15,1,7,2,1,3,48,2,1,3,38,1,48,2890,38,1,7264,2,1,1,7264,6,1,1,7264,723,80,1,
    38864,1,6,1,8,2203,43,1,-3008,3,3,1,-3008,321,75,2,1,10,1,1,-7615,2,48,2,1,10,8,1,-8,9,6,1,-8,
    11,8,1,-8,9,8,1,-8,9,6,1,-8,12,4,2,-8,9,8,1,-8,25,8,1,-8,9,8,1,-8,9,8,1,-8,9,2,1,-8,1,2,1,-74,
    1,1,1,-9,12,4,1,-86,1,1,1,-9,12,2,1,-8,1,2,1,-100,13,2,1,-8,1,2,1,-112,1,1,1,-7,12,2,1,-128,1,
    2,1,-126,1,1,1,-9,298,1,1,-7517,4,1,1,-8383,1,1,1,-8262,7,1,1,28,46,16,1,16,20,1,1,1,819,26,1,
    26,1841,48,1,48,49,1,1,1,2,1,1,-10743,1,1,1,-3814,1,1,1,-10727,3,3,2,1,2,1,1,-10780,1,1,1,
    -10749,1,1,1,-10783,1,1,1,-10782,2,1,1,1,3,1,1,1,9,2,1,-10815,1,50,2,1,9,2,2,1,5,1,1,1,31054,
    23,2,1,20,14,2,1,136,7,2,1,4,31,2,1,11,2,2,1,2,1,1,-35332,1,5,2,1,5,1,1,1,2,1,1,-42280,3,2,2,1,
    4,10,2,1,2,1,1,-42308,1,1,1,-42319,1,1,1,-42315,1,1,1,-42305,1,1,1,-42308,2,1,1,-42258,1,1,1,
    -42282,1,1,1,-42261,1,1,1,928,1,8,2,1,2,1,1,-48,1,1,1,-42307,1,1,1,-35384,1,2,2,1,7,1,1,1,6,2,
    2,1,29,1,1,1,22316,26,1,32,1222,40,1,40,137,36,1,40,157,19,2,39,-35,10,1,39,3,14,1,39,3,6,1,39,
    3,1,1,39,1771,51,1,64,3054,32,1,32,21889,32,1,32,31393,34,1,34};
static const int32_t sdq__tok_u_marks[85] = {
    768,1,1,1,1,2,1,1,1,1,1,1,3,2,2,1,7,8,1,1,1,1,1,5,1,2,1,7,10,3,623,3,1,1,3,3,2,1,145,1,1,743,
    128,2,25,101,256,2,24,1,103,25,127,108,19,1,104,25,115,5,16,403,2,12,53,2,119,2823,5476,1,
    57376,109,535,25,345,10,3,242,897,47157,9,1,1,1,1};
static const int32_t sdq__tok_u_decomp[3617] = {
    192,6,65,1,0,2,0,3,0,4,0,8,0,10,1,9,67,22,2,1,0,2,0,3,0,8,4,1,0,2,0,3,0,8,1,6,78,4,1,1,0,2,0,3,
    0,4,0,8,2,5,85,1,0,2,0,3,0,8,4,2,2,6,97,1,0,2,0,3,0,4,0,8,0,10,1,9,99,22,2,1,0,2,0,3,0,8,4,1,0,
    2,0,3,0,8,1,6,110,4,1,1,0,2,0,3,0,4,0,8,2,5,117,1,0,2,0,3,0,8,4,2,1,17,121,8,-56,5,32,5,-32,6,
    32,6,-32,23,32,23,-30,2,32,2,-32,3,32,3,-32,7,32,7,-32,12,32,12,-31,12,32,12,2,20,69,5,32,5,
    -32,6,32,6,-32,7,32,7,-32,23,32,23,-32,12,32,12,-30,3,32,3,-32,6,32,6,-32,7,32,7,-32,22,32,22,
    -31,3,32,3,2,9,73,4,32,4,-32,5,32,5,-32,6,32,6,-32,23,32,23,-32,7,3,4,74,3,32,3,-31,22,32,22,1,
    6,76,2,32,2,-32,22,32,22,-32,12,32,12,4,6,78,2,32,2,-32,22,32,22,-32,12,32,12,3,6,79,5,32,5,
    -32,6,32,6,-32,11,32,11,2,18,82,2,32,2,-32,22,32,22,-32,12,32,12,-31,2,32,2,-32,3,32,3,-32,22,
    32,22,-32,12,32,12,-31,22,32,22,-32,12,32,12,2,23,85,4,32,4,-32,5,32,5,-32,6,32,6,-32,10,32,10,
    -32,11,32,11,-32,23,32,23,-30,3,32,3,-30,3,32,3,-32,8,1,2,32,2,-32,7,32,7,-32,12,32,12,33,2,79,
    17,32,17,13,2,85,17,32,17,28,16,65,12,32,12,-24,12,32,12,-26,12,32,12,-26,12,32,12,103,5,32,5,
    -32,2,32,2,-32,12,32,12,-32,1,32,1,1,6,196,5,32,5,322,5,1,5,-353,5,32,5,2,11,71,12,32,12,-28,
    12,32,12,-28,23,32,23,379,5,1,5,-52,12,219,12,-552,12,3,2,71,2,32,2,2,36,78,1,32,1,87,2,32,2,
    -31,2,32,2,-14,2,32,2,-183,13,32,13,-32,14,32,14,-28,13,32,13,-32,14,32,14,-28,13,32,13,-32,14,
    32,14,-26,13,32,13,-32,14,32,14,-29,13,32,13,-32,14,32,14,-29,13,32,13,-32,14,32,14,-34,21,32,
    21,-31,21,32,21,2,2,72,12,32,12,6,14,65,7,32,7,-28,22,32,22,113,5,32,5,-33,5,32,5,-166,7,32,7,
    447,5,1,5,-470,5,32,5,268,-2,768,1,1,-1,787,0,1,776,-2,47,-1,697,9,-1,59,6,2,168,2,745,2,0,-1,
    183,0,3,917,2,2,2,2,2,1,1,927,2,1,3,933,2,4,2,33,2,25,7,921,8,12,8,12,2,4,2,2,2,2,2,18,2,25,5,
    953,8,12,8,-6,2,6,2,4,2,4,2,978,2,0,8,43,2,1045,1,0,8,1,1,1043,2,3,1,1030,8,4,3,1050,2,-2,1,11,
    6,10,1,1048,6,31,1,1080,6,22,2,1077,1,0,8,1,1,1075,2,3,1,1110,8,4,3,1082,2,-2,1,11,6,23,2,1140,
    13,1,13,73,2,1046,6,32,6,13,4,1040,6,32,6,-32,8,32,8,2,2,1045,6,32,6,2,6,1240,8,1,8,-195,8,32,
    8,-31,8,32,8,2,6,1048,5,32,5,-32,8,32,8,-26,8,32,8,2,12,1256,8,1,8,-188,8,32,8,-42,5,32,5,-32,
    8,32,8,-32,11,32,11,-28,8,32,8,2,2,1067,8,32,8,296,5,1575,39,0,40,33,40,-33,41,35,40,153,1,
    1749,40,1,1,1729,40,16,1,1746,40,597,1,2344,42,7,1,2352,42,2,1,2355,42,35,8,2325,-42,1,-42,1,
    -42,5,-42,5,-42,1,-42,9,-42,4,-42,107,2,2503,44,0,45,15,2,2465,-43,1,-43,1,1,2479,-43,83,1,
    2610,-46,2,1,2616,-46,34,3,2582,-46,1,-46,5,-46,2,1,2603,-46,233,1,2887,49,2,2,2887,48,0,50,15,
    2,2849,-47,1,-47,54,1,2962,52,53,3,3014,51,1,51,-1,52,123,1,3142,53,119,1,3263,55,6,2,3270,55,
    0,56,1,2,3270,54,4,55,126,3,3398,57,1,57,-1,58,141,1,3545,59,1,3,3545,60,3,59,-3,61,356,1,3906,
    -66,9,1,3916,-66,4,1,3921,-66,4,1,3926,-66,4,1,3931,-66,12,1,3904,-65,9,1,3953,-62,1,2,3953,
    -63,65,-64,1,1,4019,-64,8,1,3953,-64,17,1,3986,-66,9,1,3996,-66,4,1,4001,-66,4,1,4006,-66,4,1,
    4011,-66,12,1,3984,-65,108,1,4133,67,2783,1,6917,68,1,1,6919,68,1,1,6921,68,1,1,6923,68,1,1,
    6925,68,3,1,6929,68,40,1,6970,68,1,1,6972,68,2,2,6974,68,1,68,1,1,6978,68,700,154,65,20,32,20,
    -31,7,32,7,-32,18,32,18,-32,27,32,27,101,2,32,2,-163,7,32,7,-32,18,32,18,-32,27,32,27,-32,22,
    32,22,-32,24,32,24,174,1,1,1,-1,2,1,2,-206,24,32,24,-32,26,32,26,451,6,1,6,-483,7,32,7,-31,5,
    32,5,-31,7,32,7,-32,18,32,18,-32,8,32,8,-32,22,32,22,-32,25,32,25,-31,26,32,26,102,2,32,2,-164,
    2,32,2,-32,18,32,18,-32,27,32,27,-31,18,32,18,7626,5,1,5,-7659,27,32,27,-32,24,32,24,-31,2,32,
    2,-32,7,32,7,-32,18,32,18,-31,7,32,7,-32,18,32,18,-32,27,32,27,-32,24,32,24,103,2,32,2,-32,8,
    32,8,87,1,1,1,-1,2,1,2,-253,2,32,2,-32,7,32,7,-30,7,32,7,-32,18,32,18,7656,5,1,5,-7689,27,32,
    27,-31,7,32,7,-32,18,32,18,231,7,1,7,5,7,1,7,7425,7,1,7,-7695,7,32,7,-32,18,32,18,-32,27,32,27,
    -32,24,32,24,-31,19,32,19,-32,26,32,26,-32,24,32,24,243,2,1,2,1,8,1,8,-277,4,32,4,-32,18,32,18,
    -31,1,32,1,-32,2,32,2,-32,8,32,8,-32,7,32,7,-32,18,32,18,-31,7,32,7,-32,8,32,8,-31,7,32,7,-31,
    3,32,3,-32,18,32,18,-32,27,32,27,-18,27,12,8,3,10,2,10,1,1,383,7,4,90,65,18,32,18,-32,9,32,9,
    97,2,32,2,-32,1,32,1,-32,9,32,9,-32,4,32,4,7614,3,1,3,-7583,2,1,2,-1,1,1,1,-1,9,1,9,-1,4,1,4,
    7581,6,1,6,-7772,18,32,18,-32,9,32,9,-32,4,32,4,101,2,32,2,-32,1,32,1,-32,9,32,9,-32,4,32,4,
    7630,3,1,3,-7792,9,32,9,-32,18,32,18,-26,18,32,18,-32,9,32,9,101,2,32,2,-32,1,32,1,-32,9,32,9,
    -32,4,32,4,7640,3,1,3,-7469,2,1,2,-1,1,1,1,-1,9,1,9,-1,4,1,4,-1,18,1,18,-332,18,32,18,-32,9,32,
    9,314,2,1,2,-1,1,1,1,-1,9,1,9,-1,4,1,4,-1,18,1,18,-343,1,32,1,-32,18,32,18,-32,9,32,9,-32,4,32,
    4,6,22,945,15,0,16,6991,1,1,1,-1,2,1,2,-1,29,1,29,-7024,15,0,16,7031,1,1,1,-1,2,1,2,-1,29,1,29,
    -6996,15,0,16,7003,1,1,1,-1,2,1,2,2,6,917,15,0,16,7043,1,1,1,-1,2,1,2,2,38,951,15,0,16,7017,1,
    1,1,-1,2,1,2,-1,29,1,29,-7050,15,0,16,7057,1,1,1,-1,2,1,2,-1,29,1,29,-7024,15,0,16,7031,1,1,1,
    -1,2,1,2,-1,29,1,29,-7064,15,0,16,7071,1,1,1,-1,2,1,2,-1,29,1,29,-7034,15,0,16,7041,1,1,1,-1,2,
    1,2,2,6,927,15,0,16,7081,1,1,1,-1,2,1,2,2,8,965,15,0,16,7051,1,1,1,-1,2,1,2,-1,29,1,29,1,1,933,
    16,1,1,8025,1,1,1,8025,2,1,18,8025,29,-7056,15,0,16,7063,1,1,1,-1,2,1,2,-1,29,1,29,-7096,15,0,
    16,7103,1,1,1,-1,2,1,2,-1,29,1,29,-7096,1,0,-1,940,0,1,949,1,0,-1,941,0,1,951,1,0,-1,942,0,1,
    953,1,0,-1,943,0,1,959,1,0,-1,972,0,1,965,1,0,-1,973,0,1,969,1,0,-1,974,2,53,7936,30,1,30,1,30,
    1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,17,30,1,30,1,30,1,30,1,30,1,
    30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,49,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,
    1,30,1,30,1,30,1,30,1,30,1,30,1,30,1,30,-7102,6,0,5,7103,30,-7103,30,-5,30,1,5,945,29,7173,30,
    -7205,6,0,5,0,1,0,-1,902,0,1,913,30,1,-1,953,2,4,168,29,7884,30,-7101,30,-9,30,1,3,951,29,7183,
    30,-7217,1,0,-1,904,0,1,919,1,0,-1,905,0,7,919,30,7208,1,0,2,0,29,-7174,6,0,5,17,1,0,-1,912,2,
    5,953,29,17,29,-49,6,0,5,0,1,0,-1,906,1,6,8190,1,0,2,0,29,-7225,6,0,5,6,1,0,-1,944,0,7,961,15,
    0,16,4,29,6,29,-38,6,0,5,0,1,0,-1,910,0,2,929,16,-761,1,0,-2,901,-805,2,3,8060,30,-7091,30,5,
    30,1,3,969,29,7213,30,-7255,1,0,-1,908,0,1,937,1,0,-1,911,0,1,937,30,0,-1,180,2,-2,8194,1,292,
    -1,937,3,-2,75,122,110,2,8592,28,2,28,18,1,8596,28,30,3,8656,28,4,28,-2,28,52,1,8707,28,4,1,
    8712,28,2,1,8715,28,23,1,8739,28,1,1,8741,28,26,1,8764,28,2,1,8771,28,2,1,8773,28,1,1,8776,28,
    22,1,61,28,1,1,8801,28,10,5,8781,28,-8721,28,2,28,8742,28,1,28,2,2,8818,28,1,28,2,2,8822,28,1,
    28,6,2,8826,28,1,28,2,2,8834,28,1,28,2,2,8838,28,1,28,34,4,8866,28,6,28,1,28,2,28,48,4,8828,28,
    1,28,20,28,1,28,6,4,8882,28,1,28,1,28,1,28,59,-2,12296,1,1969,1,10973,-28,1391,1,12363,69,1,1,
    12365,69,1,1,12367,69,1,1,12369,69,1,1,12371,69,1,1,12373,69,1,1,12375,69,1,1,12377,69,1,1,
    12379,69,1,1,12381,69,1,1,12383,69,1,1,12385,69,2,1,12388,69,1,1,12390,69,1,1,12392,69,6,2,
    12399,69,0,70,1,2,12402,69,0,70,1,2,12405,69,0,70,1,2,12408,69,0,70,1,2,12411,69,0,70,22,1,
    12358,69,9,1,12445,69,13,1,12459,69,1,1,12461,69,1,1,12463,69,1,1,12465,69,1,1,12467,69,1,1,
    12469,69,1,1,12471,69,1,1,12473,69,1,1,12475,69,1,1,12477,69,1,1,12479,69,1,1,12481,69,2,1,
    12484,69,1,1,12486,69,1,1,12488,69,6,2,12495,69,0,70,1,2,12498,69,0,70,1,2,12501,69,0,70,1,2,
    12504,69,0,70,1,2,12507,69,0,70,22,1,12454,69,2,4,12527,69,1,69,1,69,1,69,3,1,12541,69,51201,
    -270,35912,-9556,10198,-514,-7671,-8351,1459,19383,0,-17995,14464,-15434,961,2222,5235,2332,
    1722,379,318,1943,-9869,793,958,773,4191,3373,2183,-19311,1267,6031,1815,5138,6129,-16590,4763,
    5602,919,-9883,7951,1607,-10581,2125,1619,1426,7634,-16712,561,295,4582,1551,1853,1239,2330,
    1541,86,1939,2371,1085,651,-9582,243,1057,1577,3899,2939,-5033,-12791,1573,7516,1054,-3612,
    1640,5112,2613,-15903,906,3505,967,309,3616,264,6164,-17273,11705,-11951,-16,10320,930,1587,
    4740,-2805,-10417,1843,8444,-15557,3502,1067,4981,489,-8793,9700,-10556,4074,-4508,7871,-1876,
    6058,-10591,1179,7843,3400,1633,-7920,9206,-9000,-2442,8167,-8005,4549,-9911,699,96,5816,5222,
    1416,2147,1789,-16090,333,1329,1401,1753,2617,2348,7299,1213,1069,55,-19507,5163,1201,9195,
    -12526,796,112,666,2697,550,832,1345,1066,635,3767,-2616,2869,807,-16691,140,538,7179,6138,488,
    -11233,300,902,2099,4240,-2249,-9361,2069,1262,467,610,5014,183,2865,172,4590,1218,82,208,
    -18573,10787,6150,1284,-13783,-4699,596,2836,81,2394,1129,1996,1140,3770,2944,3857,-14597,
    12198,-17317,5362,120,1358,347,1389,336,786,1189,6990,-18161,4289,13386,-17997,3310,4305,8512,
    -12191,441,1747,2928,8959,-17501,486,2134,2478,315,346,1085,1825,476,2455,2390,18,2283,1302,
    -17315,7035,-6813,7603,712,4450,4265,1460,584,-14088,1588,5149,-1821,85,370,-2514,-551,6847,
    -15512,13430,-12540,-51,3231,1069,6659,-8529,4505,-1642,10375,-1775,3585,-3266,-10936,-3475,
    1152,2,-1,22618,1,-1,26228,2,-10,20958,8524,928,626,34,7,42,7623,-6808,767,1,-1,34322,1,-1,
    35576,2,-2,36920,197,3,-68,39151,13,44,1164,-3286,1497,-18185,313,102,380,27,109,588,105,98,
    472,104,956,10,1062,212,38,100,861,147,175,500,1266,163,264,588,189,503,1135,173,11,-1,8,6,7,
    48,1,178,65,319,564,21,56,305,147,488,140,0,478,1209,134,363,56,410,53,686,130,1707,284,60,
    -14278,123513,-114902,2,-106,20006,911,-77,-488,453,59,327,51,675,-72,68,73,632,89,145,16,270,
    198,938,7,144,68,299,118,-70,134,-46,146,66,400,88,54,260,286,163,4,59,1059,65,391,410,-16,87,
    252,336,1593,-1394,122,123,327,149,53,226,2,171,17,25,86,-10,396,485,271,187,224,153,330,199,
    845,157,906,456,69,16,297,57,-45,54,-3,-17,76,81,382,560,314,295,221,1030,103,115,133,36,12,48,
    727,1162,100526,-6,2961,-129080,1147,33,135696,2695,8707,-122768,75,67,1,1497,-31,1,1,1522,-32,
    10,13,1513,-37,0,-38,62816,-37,0,-38,-62841,-32,0,-33,0,-35,1,-35,1,-35,1,-35,1,-35,1,-35,1,
    -35,1,5,1496,-35,1,-35,1,-35,1,-35,1,-35,1,1,1502,-35,1,2,1504,-35,1,-35,1,2,1507,-35,1,-35,1,
    9,1510,-35,1,-35,1,-35,1,-35,1,-35,-21,-34,-4,-36,10,-36,9,-36,5451,1,69785,71,1,1,69787,71,14,
    1,69797,71,130,2,69937,72,1,72,539,2,70471,73,0,74,366,2,70841,76,0,75,1,1,70841,77,251,2,
    71096,78,1,78,892,1,71989,79,47141,7,119127,-80,1,-80,7,-81,0,-82,0,-83,0,-84,0,-85,86,6,
    119225,-80,1,-80,1,-81,1,-81,-1,-82,1,-82,75327,-542,20029,-5,9,111329,-111042,78,13,71,120,31,
    78,-24,-7217,119196,-111853,7,16,19,111525,-118883,7342,38,111550,-111540,13,-728,736,9,147498,
    -147434,14,-7460,7516,11,44,5,-7522,7602,2,27,22,11,1,17,50,8,9,25,10,2,0,0,112301,-104892,
    -7334,21,112516,-112504,6,21,152,-102,16,32,58,84,26,67,16,33,0,21,18,8,15,340,-272,273,-198,
    35,-1133,1767,-288,38,25,-130,167,-1,123,113720,-113650,5,15,20,8,64,113990,66,-113918,47,12,
    -79,142,-9080,14,9228,54,0,114314,-114181,21,15,12,114469,-114457,7,845,-817,-9377,9439,14,82,
    -51,115031,-114849,114851,-114808,-3,17,101,1,-9651,9678,43,21,44,-9735,125217,-125191,9780,3,
    3,20,148680,-148628,115763,0,-106800,-8927,0,-9819,129521,12066,-131704,9,-9864,9911,51,10,34,
    136,-10055,-30,10104,116288,-116237,129,4,2,-2,46,20,36,-14,11,47,20,4,26,11,66,84,35,124,
    116668,-116687,-65,108,27,97,116749,-116687,-93,-28,-10619,10811,21,31,-38,-10763,10979,29,
    117406,-117287,277,-175,-11056,11128,-11145,-36,5806,3,5483,-100,6673,-15572,9022,4,6,61,-11,
    117872,-129146,11441,-117,205,51,117736,-117727,-111,245,-11639,11685,97,71,190,117755,-117704,
    -11971,12041,118150,-118099,-12038,12068,45,27,1,118482,-7554,7663,-118444,118894,-118781,14,
    -102,175,40,57,-54,40,15,13,118681,-118762,251,63,-12603,12696,-4,118794,-119000,373,118768,48,
    -118728,115,-27,-3,-12933,12980,51,-6,54,103544,-103392,119070,-118983,119311,-119171,13,27,
    119736,-119688,21,119968,223,-119962,17,-13535,13561,-13549,0,13711,21,21,20,69,-13743,13833,
    120594,-120568,120660,-120610,109615,-109455,121233,23,140,-135240,12,14060,121343,-1,39,26,
    -121365,1,0,43,-14097,14162,-14149,80,136071,-121807,62,64,-14313,136515,-122064,122180,43,
    -122166,92,-14524,14609,10,5,122669,299,0,-122809,-14572,137641,-122853,3,-14754,137817,
    -122798,-14898,14920,-5,29,123526,-123427,-14946,15046,59,67,-15121,138996,31,-138990,139136,
    -123743,123844,-123817,101,11,124117,73,-124099,124232,-124216,111343,-126858,15581,81,-15608,
    15667,-9865,134386,14,-13346,9,-111003,3,3482,-19251,15910,-6,18,-12266,12286,2,10,41,125014,
    -125015,56,70,74,-138,154,42,112,-260,119,2,16,125018,309,-150,-141226,16326,2,35,126644,
    -126566,125384,-141775,4,141904,289,-142183,16613,12,11,2,64,-33,134,-44,151,-81,67,27,-16815,
    16906,32,-16904,16999,3,126468,-126352,7,-17065,17093,-21567,148467,184,-144040,9,17369,77,157,
    203,127059,-126973,22,90,92,127416,-30507,-96825,-15,52,97006,-96778,100,128666,27,-128345,93,
    32,128541,-128531,285,159,1,-92,381,28,128997,-128623,-19446,19490,128960,-148369,19677,-14609,
    14705,129570,213,-149420,8,19818,130090,-149848,149988,-130187,0,30,130445,-130260,-19887,
    19958,126,27,60,-20016,151394,-131102,302,189,-20527,31,20602,131943,-152534,152589,265,131,
    -132054,-20837,20899,5,7,10,7,37,132805};
/* unicode tables: end */

/* The tables are read as they lie: a lookup walks the runs. Prompts are short, and most of their
 * characters are ASCII, which never comes here. */

enum { SDQ__TOK_OTHER = 0, SDQ__TOK_LETTER, SDQ__TOK_NUMBER, SDQ__TOK_SPACE };

static int sdq__tok_class(uint32_t c) {
    uint32_t at = 0;
    size_t i;
    for (i = 0; i < SDQ__COUNT(sdq__tok_u_class); i++) {
        at += (uint32_t)sdq__tok_u_class[i] / 4;
        if (c < at) return (int)(sdq__tok_u_class[i] % 4);
    }
    return SDQ__TOK_OTHER;
}

/* Canonical combining class: 0 for everything that starts a character. */
static uint32_t sdq__tok_ccc(uint32_t c) {
    uint32_t at = 0;
    size_t i;
    for (i = 0; i < SDQ__COUNT(sdq__tok_u_ccc) && at <= c; i += 3) {
        at += (uint32_t)sdq__tok_u_ccc[i];
        if (c < at) return 0;
        at += (uint32_t)sdq__tok_u_ccc[i + 1];
        if (c < at) return (uint32_t)sdq__tok_u_ccc[i + 2];
    }
    return 0;
}

static uint32_t sdq__tok_lower(uint32_t c) {
    uint32_t at = 0, n, step;
    size_t i;
    if (c < 128) return c >= 'A' && c <= 'Z' ? c + 32 : c;
    for (i = 0; i < SDQ__COUNT(sdq__tok_u_lower); i += 4) {
        at += (uint32_t)sdq__tok_u_lower[i];
        n = (uint32_t)sdq__tok_u_lower[i + 1];
        step = (uint32_t)sdq__tok_u_lower[i + 2];
        if (c < at) return c;
        if ((c - at) % step == 0 && (c - at) / step < n)
            return (uint32_t)((int32_t)c + sdq__tok_u_lower[i + 3]);
        at += (n - 1) * step;
    }
    return c;
}

static uint32_t sdq__tok_mark(size_t index) {
    uint32_t c = 0;
    size_t i;
    for (i = 0; i <= index; i++) c += (uint32_t)sdq__tok_u_marks[i];
    return c;
}

/* One level of canonical decomposition: c -> *a, *b (0 for a singleton). 0 when c has none. */
static int sdq__tok_split(uint32_t c, uint32_t *a, uint32_t *b) {
    uint32_t at = 0, n, k;
    size_t i = 0;
    while (i < SDQ__COUNT(sdq__tok_u_decomp)) {
        const int32_t *run = sdq__tok_u_decomp + i + 2;
        const int single = run[-1] < 0;
        int32_t first = 0;
        at += (uint32_t)run[-2];
        n = (uint32_t)(single ? -run[-1] : run[-1]);
        if (c < at) return 0;
        if (c < at + n) {
            for (k = 0; k <= c - at; k++) first += run[single ? k : 2 * k];
            *a = (uint32_t)first;
            *b = single ? 0 : sdq__tok_mark((size_t)abs(run[2 * (c - at) + 1]) - 1);
            return 1;
        }
        at += n;
        i += 2 + (size_t)n * (single ? 1 : 2);
    }
    return 0;
}

/* The primary composite of a and b, 0 when there is none. */
static uint32_t sdq__tok_join(uint32_t a, uint32_t b) {
    uint32_t mark = 0, at = 0;
    int32_t want = 0;
    size_t i, k;
    if (a >= 0x1100u && a < 0x1113u && b >= 0x1161u && b < 0x1176u)        /* Hangul L + V */
        return 0xac00u + ((a - 0x1100u) * 21 + (b - 0x1161u)) * 28;
    if (a >= 0xac00u && a < 0xd7a4u && (a - 0xac00u) % 28 == 0 && b > 0x11a7u && b < 0x11c3u)
        return a + (b - 0x11a7u);                                          /* LV + T */
    for (i = 0; i < SDQ__COUNT(sdq__tok_u_marks) && !want; i++) {
        mark += (uint32_t)sdq__tok_u_marks[i];
        if (mark == b) want = (int32_t)i + 1;
    }
    if (!want) return 0;
    for (i = 0; i < SDQ__COUNT(sdq__tok_u_decomp);) {
        const int32_t *run = sdq__tok_u_decomp + i + 2;
        const int single = run[-1] < 0;
        const size_t n = (size_t)(single ? -run[-1] : run[-1]);
        int32_t first = 0;
        at += (uint32_t)run[-2];
        for (k = 0; k < n && !single; k++) {
            first += run[2 * k];
            if ((uint32_t)first == a && run[2 * k + 1] == want) return at + (uint32_t)k;
        }
        at += (uint32_t)n;
        i += 2 + n * (single ? 1 : 2);
    }
    return 0;
}

/* --- normalisation --- */

/* Characters as class << 53 | position << 21 | code point: sorting them as numbers is the stable
 * sort by combining class that normalisation asks for. */
typedef struct sdq__tok_chars { uint64_t *c; size_t n, cap; } sdq__tok_chars;

#define SDQ__TOK_CODE(x) ((uint32_t)((x) & 0x1fffffu))
#define SDQ__TOK_CLASS(x) ((uint32_t)((x) >> 53))

static int sdq__tok_push(sdq_ctx *ctx, sdq__tok_chars *t, uint32_t c) {
    const uint64_t ccc = c < 0x300 ? 0 : sdq__tok_ccc(c);
    if (!sdq__grow(ctx, (void **)(void *)&t->c, &t->cap, t->n + 1, sizeof *t->c)) return 0;
    t->c[t->n] = (ccc << 53) | ((uint64_t)t->n << 21) | c;
    t->n++;
    return 1;
}

/* Append the full canonical decomposition: first parts decompose again, second parts never do. */
static int sdq__tok_decompose(sdq_ctx *ctx, sdq__tok_chars *t, uint32_t c) {
    uint32_t second[8], b;
    size_t n = 0;
    if (c >= 0xac00u && c < 0xd7a4u) {                      /* Hangul: L, V and perhaps T */
        const uint32_t s = c - 0xac00u;
        if (!sdq__tok_push(ctx, t, 0x1100u + s / 588) ||
            !sdq__tok_push(ctx, t, 0x1161u + s % 588 / 28)) return 0;
        return s % 28 == 0 || sdq__tok_push(ctx, t, 0x11a7u + s % 28);
    }
    while (c >= 0xc0 && n < SDQ__COUNT(second) && sdq__tok_split(c, &c, &b))
        if (b) second[n++] = b;
    if (!sdq__tok_push(ctx, t, c)) return 0;
    while (n) if (!sdq__tok_push(ctx, t, second[--n])) return 0;
    return 1;
}

static int sdq__tok_by_number(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Sort every run of combining characters by class (Unicode 3.11, D109). */
static void sdq__tok_reorder(sdq__tok_chars *t) {
    size_t i = 0, end;
    while (i < t->n) {
        for (end = i; end < t->n && SDQ__TOK_CLASS(t->c[end]); end++) {}
        if (end - i > 1) qsort(t->c + i, end - i, sizeof *t->c, sdq__tok_by_number);
        i = end + 1;
    }
}

/* Join each character with the last starter unless one of the same or a higher class is between
 * (Unicode 3.11, D117). */
static void sdq__tok_compose(sdq__tok_chars *t) {
    size_t i, n = 0, starter = SIZE_MAX;
    for (i = 0; i < t->n; i++) {
        const uint64_t c = t->c[i];
        const int blocked = starter == SIZE_MAX || (n - 1 != starter &&
                            SDQ__TOK_CLASS(t->c[n - 1]) >= SDQ__TOK_CLASS(c));
        const uint32_t both = blocked || SDQ__TOK_CODE(c) < 0x300 ? 0
                            : sdq__tok_join(SDQ__TOK_CODE(t->c[starter]), SDQ__TOK_CODE(c));
        if (both) { t->c[starter] = both; continue; }
        if (SDQ__TOK_CLASS(c) == 0) starter = n;
        t->c[n++] = c;
    }
    t->n = n;
}

/* NFC and lower case, as UTF-8; bytes that are none become U+FFFD. Rust's to_lowercase, which the
 * reference uses, knows one letter that becomes two: U+0130. */
static sdq_status sdq__tok_normalise(sdq_ctx *ctx, const char *p, const char *end, sdq__str *out) {
    sdq__tok_chars t;
    char utf8[4];
    size_t i;
    sdq_status st = SDQ_ERR_OOM;
    memset(&t, 0, sizeof t);
    while (p < end) {
        uint32_t c = 0xfffdu;
        const size_t n = sdq__js_utf8(p, end, &c);
        if (!sdq__tok_decompose(ctx, &t, c)) goto done;
        p += n ? n : 1;
    }
    sdq__tok_reorder(&t);
    sdq__tok_compose(&t);
    for (i = 0; i < t.n; i++) {
        const uint32_t c = SDQ__TOK_CODE(t.c[i]);
        if (c == 0x130) sdq__str_add(ctx, out, "i\xcc\x87", 3);
        else sdq__str_add(ctx, out, utf8, sdq__js_put_utf8(utf8, sdq__tok_lower(c)));
    }
    if (!out->bad) st = SDQ_OK;
done:
    sdq__free(ctx, t.c);
    return st;
}

/* --- vocabulary --- */

typedef struct sdq__tok_merge { uint64_t pair; int32_t rank, id; } sdq__tok_merge;
typedef struct sdq__tok_special {
    char *text;
    size_t len;
    int32_t id;
    int raw;            /* found in the prompt as it is, before it is normalised */
} sdq__tok_special;

#define SDQ__TOK_EMPTY UINT64_MAX

struct sdq_tokenizer {
    int32_t byte[256], last[256];       /* ids of a byte, inside and at the end of a word; -1 */
    sdq__tok_merge *merges;             /* hash table */
    size_t mask;
    sdq__tok_special *specials;
    size_t special_count, special_cap;
    int32_t start, end, pad, unknown;
    size_t length, vocab;
};

static uint64_t sdq__tok_pair(int32_t a, int32_t b) {
    return ((uint64_t)(uint32_t)a << 32) | (uint32_t)b;
}

/* The slot of a pair, or the empty one where it belongs. */
static sdq__tok_merge *sdq__tok_slot(const sdq_tokenizer *t, uint64_t pair) {
    uint64_t h = pair * UINT64_C(0x9e3779b97f4a7c15);       /* 2^64 / golden ratio */
    h ^= h >> 32;
    for (;; h++) {
        sdq__tok_merge *m = &t->merges[h & t->mask];
        if (m->pair == SDQ__TOK_EMPTY || m->pair == pair) return m;
    }
}

static sdq_status sdq__tok_reserve(sdq_ctx *ctx, sdq_tokenizer *t, size_t merges) {
    size_t slots = 16, i;
    if (merges > SDQ__TOK_MERGES)
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "a tokenizer with %zu merges; at most 2^18 can "
                         "be read", merges);
    while (slots < 2 * merges) slots *= 2;
    t->merges = SDQ__NEW_N(ctx, sdq__tok_merge, slots);
    if (!t->merges) return SDQ_ERR_OOM;
    for (i = 0; i < slots; i++) t->merges[i].pair = SDQ__TOK_EMPTY;
    t->mask = slots - 1;
    return SDQ_OK;
}

/* A pair that is listed twice has its later rank, as in the reference. */
static void sdq__tok_add_merge(sdq_tokenizer *t, int32_t a, int32_t b, size_t rank, int32_t id) {
    sdq__tok_merge *m = sdq__tok_slot(t, sdq__tok_pair(a, b));
    m->pair = sdq__tok_pair(a, b);
    m->rank = (int32_t)rank;
    m->id = id;
}

/* Token text -> id while a vocabulary is being read. The texts belong to the caller. */
typedef struct sdq__tok_name { const char *s; size_t len; int32_t id; } sdq__tok_name;
typedef struct sdq__tok_map { sdq__tok_name *slot; size_t mask; } sdq__tok_map;

static sdq_status sdq__tok_map_make(sdq_ctx *ctx, sdq__tok_map *m, size_t names) {
    size_t slots = 16;
    while (slots < 2 * names) slots *= 2;
    m->slot = SDQ__NEW_N(ctx, sdq__tok_name, slots);
    m->mask = slots - 1;
    return m->slot ? SDQ_OK : SDQ_ERR_OOM;
}

static sdq__tok_name *sdq__tok_map_slot(const sdq__tok_map *m, const char *s, size_t len) {
    uint64_t h = sdq__js_hash(s, len, 0);
    for (;; h++) {
        sdq__tok_name *n = &m->slot[h & m->mask];
        if (!n->s || (n->len == len && memcmp(n->s, s, len) == 0)) return n;
    }
}

static void sdq__tok_map_add(sdq__tok_map *m, const char *s, size_t len, int32_t id) {
    sdq__tok_name *n = sdq__tok_map_slot(m, s, len);
    if (n->s) return;
    n->s = s;
    n->len = len;
    n->id = id;
}

static int32_t sdq__tok_map_find(const sdq__tok_map *m, const char *s, size_t len) {
    const sdq__tok_name *n = sdq__tok_map_slot(m, s, len);
    return n->s ? n->id : -1;
}

/* GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 on, in
 * order. Ids 0..255 list the printable ones first. */
static int sdq__tok_printable(unsigned b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
}

/* order[i]: the byte of id i; sign[b]: the character of byte b. */
static void sdq__tok_alphabet(unsigned char *order, uint32_t *sign) {
    unsigned b, n = 0, other = 0;
    for (b = 0; b < 256; b++) if (sdq__tok_printable(b)) order[n++] = (unsigned char)b;
    for (b = 0; b < 256; b++) if (!sdq__tok_printable(b)) order[n++] = (unsigned char)b;
    for (b = 0; b < 256; b++) sign[b] = sdq__tok_printable(b) ? b : 256 + other++;
}

/* Recognise `text`, normalised if not raw, as the token of that id wherever it stands. */
static sdq_status sdq__tok_add_special(sdq_ctx *ctx, sdq_tokenizer *t, const char *text,
                                       int32_t id, int raw) {
    sdq__str s;
    sdq_status st;
    size_t i;
    memset(&s, 0, sizeof s);
    if (raw) sdq__str_add(ctx, &s, text, strlen(text));
    st = raw ? s.bad ? SDQ_ERR_OOM : SDQ_OK
             : sdq__tok_normalise(ctx, text, text + strlen(text), &s);
    if (st == SDQ_OK && !sdq__grow(ctx, (void **)(void *)&t->specials, &t->special_cap,
                                   t->special_count + 1, sizeof *t->specials)) st = SDQ_ERR_OOM;
    for (i = 0; i < t->special_count && st == SDQ_OK && s.len; i++)
        if (strcmp(t->specials[i].text, s.s) == 0) { sdq__str_free(ctx, &s); return SDQ_OK; }
    if (st != SDQ_OK || !s.len) { sdq__str_free(ctx, &s); return st; }
    t->specials[t->special_count].text = s.s;
    t->specials[t->special_count].len = s.len;
    t->specials[t->special_count++].id = id;
    return SDQ_OK;
}

SDQ_API void sdq_tokenizer_free(sdq_ctx *ctx, sdq_tokenizer *t) {
    size_t i;
    if (!t) return;
    for (i = 0; i < t->special_count; i++) sdq__free(ctx, t->specials[i].text);
    sdq__free(ctx, t->specials);
    sdq__free(ctx, t->merges);
    sdq__free(ctx, t);
}

/* The texts that a vocabulary is made from. */
typedef struct sdq__tok_source {
    const char *what;               /* names the merges in error sentences */
    const char *word_end;
    sdq__tok_map map;
    char *pool;                     /* room for the texts of joined tokens */
    int numbered;                   /* ids follow from the order; else they are in the map */
} sdq__tok_source;

/* The text of a byte's symbol, with `tail` behind it: returns its length. */
static size_t sdq__tok_symbol(char *out, uint32_t sign, const char *tail) {
    const size_t n = sdq__js_put_utf8(out, sign), m = strlen(tail);
    if (m) memcpy(out + n, tail, m);
    return n + m;
}

/* Enter the 256 bytes and the 256 bytes at a word's end under ids 0..511. */
static void sdq__tok_number_bytes(sdq__tok_source *s) {
    unsigned char order[256];
    uint32_t sign[256];
    int32_t i;
    sdq__tok_alphabet(order, sign);
    for (i = 0; i < 512; i++) {
        const size_t n = sdq__tok_symbol(s->pool, sign[order[i & 255]], i < 256 ? "" : s->word_end);
        sdq__tok_map_add(&s->map, s->pool, n, i);
        s->pool += n;
    }
}

/* Look the bytes' ids up. The pool has room for one symbol. */
static void sdq__tok_find_bytes(sdq_tokenizer *t, const sdq__tok_source *s) {
    unsigned char order[256];
    uint32_t sign[256];
    unsigned b;
    sdq__tok_alphabet(order, sign);
    for (b = 0; b < 256; b++) {
        t->byte[b] = sdq__tok_map_find(&s->map, s->pool, sdq__tok_symbol(s->pool, sign[b], ""));
        t->last[b] = sdq__tok_map_find(&s->map, s->pool,
                                       sdq__tok_symbol(s->pool, sign[b], s->word_end));
    }
}

static int sdq__tok_is_version(const char *line, const char *stop) {
    for (; stop - line >= 8; line++) if (memcmp(line, "#version", 8) == 0) return 1;
    return 0;
}

/* One line "a b": find both, join them, find or number the result. */
static sdq_status sdq__tok_read_merge(sdq_ctx *ctx, sdq_tokenizer *t, sdq__tok_source *s,
                                      const char *line, const char *stop, size_t rank) {
    const char *space = (const char *)memchr(line, ' ', (size_t)(stop - line)), *b;
    size_t na, nb;
    int32_t ia, ib, id;
    if (!space || memchr(space + 1, ' ', (size_t)(stop - space - 1)))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: merge %zu is not two symbols", s->what,
                         rank + 1);
    b = space + 1;
    na = (size_t)(space - line);
    nb = (size_t)(stop - b);
    memcpy(s->pool, line, na);
    memcpy(s->pool + na, b, nb);
    if (s->numbered) sdq__tok_map_add(&s->map, s->pool, na + nb, (int32_t)(512 + rank));
    ia = sdq__tok_map_find(&s->map, line, na);
    ib = sdq__tok_map_find(&s->map, b, nb);
    id = sdq__tok_map_find(&s->map, s->pool, na + nb);
    if (ia < 0 || ib < 0 || id < 0)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: merge %zu names a token that is not in the "
                         "vocabulary", s->what, rank + 1);
    if (s->numbered) s->pool += na + nb;
    sdq__tok_add_merge(t, ia, ib, rank, id);
    return SDQ_OK;
}

/* All merges of a text; *count receives how many. A first line may name the version. */
static sdq_status sdq__tok_read_merges(sdq_ctx *ctx, sdq_tokenizer *t, sdq__tok_source *s,
                                       const char *text, size_t bytes, size_t *count) {
    const char *p = text, *end = text + bytes;
    *count = 0;
    while (p < end) {
        const char *line = p, *stop = (const char *)memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        p = stop < end ? stop + 1 : end;
        if (stop > line && stop[-1] == '\r') stop--;
        if (stop == line || (line == text && sdq__tok_is_version(line, stop))) continue;
        SDQ__TRY(sdq__tok_read_merge(ctx, t, s, line, stop, (*count)++));
    }
    return SDQ_OK;
}

static size_t sdq__tok_count_lines(const char *text, size_t bytes) {
    size_t i, n = 1;
    for (i = 0; i < bytes; i++) n += text[i] == '\n';
    return n;
}

/* --- from memory --- */

/* The packed form that tools/clip_vocab.py writes: this mark, then for each merge the ids of its
 * two parts, three digits of base 64 each, the high one first; other characters do not count. */
#define SDQ__TOK_PACKED "#sdq-merges-64"

static int sdq__tok_digit(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

static sdq_status sdq__tok_unpack(sdq_ctx *ctx, sdq_tokenizer *t, const char *text, size_t bytes,
                                  size_t *count) {
    unsigned char order[256];
    uint32_t sign[256], pair[2] = {0, 0};
    size_t i = strlen(SDQ__TOK_PACKED), digits = 0, n = 0;
    SDQ__TRY(sdq__tok_reserve(ctx, t, bytes / 6));
    for (; i < bytes; i++) {
        const int d = sdq__tok_digit(text[i]);
        if (d < 0) continue;
        pair[digits / 3] = pair[digits / 3] * 64 + (uint32_t)d;
        if (++digits < 6) continue;
        if (pair[0] >= 512 + n || pair[1] >= 512 + n)
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "packed merges: merge %zu joins later tokens",
                             n + 1);
        sdq__tok_add_merge(t, (int32_t)pair[0], (int32_t)pair[1], n, (int32_t)(512 + n));
        n++;
        pair[0] = pair[1] = 0;
        digits = 0;
    }
    if (digits) return sdq__fail(ctx, SDQ_ERR_FORMAT, "packed merges: the last one is cut off");
    sdq__tok_alphabet(order, sign);
    for (i = 0; i < 256; i++) {
        t->byte[order[i]] = (int32_t)i;
        t->last[order[i]] = (int32_t)i + 256;
    }
    *count = n;
    return SDQ_OK;
}

static sdq_status sdq__tok_number(sdq_ctx *ctx, sdq_tokenizer *t, const char *text, size_t bytes,
                                  const char *word_end, size_t *count) {
    const size_t lines = sdq__tok_count_lines(text, bytes);
    sdq__tok_source s;
    char *pool = NULL;
    sdq_status st;
    memset(&s, 0, sizeof s);
    s.what = "merges";
    s.word_end = word_end;
    s.numbered = 1;
    SDQ__TRY(sdq__tok_reserve(ctx, t, lines));
    SDQ__TRY(sdq__tok_map_make(ctx, &s.map, lines + 512));
    st = SDQ_ERR_OOM;
    if (strlen(word_end) > 64 || bytes > SIZE_MAX / 2) {
        st = sdq__fail(ctx, SDQ_ERR_ARGUMENT, "the mark of a word's end is longer than 64 bytes");
        goto done;
    }
    /* 512 symbols of at most 2 + 64 bytes, every merge less than its line, one symbol to look up */
    pool = s.pool = SDQ__NEW_N(ctx, char, bytes + 513 * (2 + strlen(word_end)) + 1);
    if (!pool) goto done;
    sdq__tok_number_bytes(&s);
    SDQ__TRY_DONE(sdq__tok_read_merges(ctx, t, &s, text, bytes, count));
    sdq__tok_find_bytes(t, &s);
done:
    sdq__free(ctx, pool);
    sdq__free(ctx, s.map.slot);
    return st;
}

/* The pad token of a numbered vocabulary: start, end, or one byte. */
static int32_t sdq__tok_pad_id(const sdq_tokenizer *t, const char *pad, const char *start,
                               const char *end) {
    if (!pad || strcmp(pad, end) == 0) return t->end;
    if (strcmp(pad, start) == 0) return t->start;
    return pad[0] && !pad[1] ? t->byte[(unsigned char)pad[0]] : -1;
}

static sdq_status sdq__tok_create(sdq_ctx *ctx, sdq_tokenizer *t, const char *merges, size_t bytes,
                                  const sdq_tokenizer_desc *d) {
    const char *start = d->start ? d->start : "<|startoftext|>";
    const char *end = d->end ? d->end : "<|endoftext|>";
    const size_t mark = strlen(SDQ__TOK_PACKED);
    size_t n = 0;
    t->length = d->max_length ? d->max_length : 77;
    if (t->length < 2 || t->length > 65536)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "max_length %zu: 2..65536 are allowed", t->length);
    if (bytes >= mark && memcmp(merges, SDQ__TOK_PACKED, mark) == 0)
        SDQ__TRY(sdq__tok_unpack(ctx, t, merges, bytes, &n));
    else
        SDQ__TRY(sdq__tok_number(ctx, t, merges, bytes, d->word_end ? d->word_end : "</w>", &n));
    t->vocab = 512 + n + 2;
    t->start = (int32_t)t->vocab - 2;
    t->end = t->unknown = (int32_t)t->vocab - 1;
    t->pad = sdq__tok_pad_id(t, d->pad, start, end);
    if (t->pad < 0)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "the pad token must be start, end or one byte");
    SDQ__TRY(sdq__tok_add_special(ctx, t, start, t->start, 0));
    SDQ__TRY(sdq__tok_add_special(ctx, t, end, t->end, 0));
    return d->pad ? sdq__tok_add_special(ctx, t, d->pad, t->pad, 0) : SDQ_OK;
}

SDQ_API sdq_status sdq_tokenizer_create(sdq_ctx *ctx, const char *merges, size_t bytes,
                                        const sdq_tokenizer_desc *desc, sdq_tokenizer **out) {
    sdq_tokenizer *t = SDQ__NEW(ctx, sdq_tokenizer);
    sdq_tokenizer_desc d;
    sdq_status st;
    *out = NULL;
    if (!t) return SDQ_ERR_OOM;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    st = sdq__tok_create(ctx, t, merges, bytes, &d);
    t->specials[t->special_count].raw = raw;
    if (st == SDQ_OK) *out = t;
    else sdq_tokenizer_free(ctx, t);
    return st;
}

/* --- from a folder --- */

typedef struct sdq__tok_folder {
    const char *path;
    sdq__json *vocab, *config, *special, *added;    /* the last three may be missing */
    char *merges;
    size_t bytes;
} sdq__tok_folder;

static sdq_status sdq__tok_open_json(sdq_ctx *ctx, const char *folder, const char *name,
                                     int required, sdq__json **out) {
    char *path = sdq__io_join(ctx, folder, "/", name);
    sdq_status st = SDQ_ERR_OOM;
    if (!path) return st;
    if (required || sdq__io_exists(path)) st = sdq__js_load(ctx, path, out);
    else st = SDQ_OK;
    if (st == SDQ_OK && *out && (*out)->kind != SDQ__JS_OBJECT)
        st = sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: is no JSON object", path);
    sdq__free(ctx, path);
    return st;
}

static sdq_status sdq__tok_open(sdq_ctx *ctx, sdq__tok_folder *f) {
    char *path = sdq__io_join(ctx, f->path, "/", "merges.txt");
    sdq_status st = SDQ_ERR_OOM;
    if (!path) return st;
    st = sdq__io_read(ctx, path, (size_t)1 << 27, &f->merges, &f->bytes);
    sdq__free(ctx, path);
    if (st != SDQ_OK) return st;
    SDQ__TRY(sdq__tok_open_json(ctx, f->path, "vocab.json", 1, &f->vocab));
    SDQ__TRY(sdq__tok_open_json(ctx, f->path, "tokenizer_config.json", 0, &f->config));
    SDQ__TRY(sdq__tok_open_json(ctx, f->path, "added_tokens.json", 0, &f->added));
    return sdq__tok_open_json(ctx, f->path, "special_tokens_map.json", 0, &f->special);
}

/* A member that is a string, or an object with "content". */
static const char *sdq__tok_content(const sdq__json *obj, const char *key) {
    const sdq__json *v = sdq__js_get(obj, key);
    return v && v->kind == SDQ__JS_OBJECT ? sdq__js_string(v, "content", NULL)
                                          : sdq__js_string(obj, key, NULL);
}

/* The text of a special token. The map of older versions wins unless the configuration lists its
 * tokens with ids; that is transformers' order. */
static const char *sdq__tok_special_text(const sdq__tok_folder *f, const char *key,
                                         const char *def) {
    const char *map = sdq__tok_content(f->special, key), *own = sdq__tok_content(f->config, key);
    if (sdq__js_get(f->config, "added_tokens_decoder")) map = NULL;
    return map ? map : own ? own : def;
}

static sdq_status sdq__tok_resolve(sdq_ctx *ctx, sdq_tokenizer *t, const sdq__tok_folder *f,
                                   const sdq__tok_map *map, const char *key, const char *def,
                                   int32_t *id) {
    const char *text = sdq__tok_special_text(f, key, def);
    *id = sdq__tok_map_find(map, text, strlen(text));
    if (*id < 0)
        return sdq__fail(ctx, SDQ_ERR_MISSING, "%s: %s '%s' is not in the vocabulary", f->path,
                         key, text);
    return sdq__tok_add_special(ctx, t, text, *id, 0);
}

/* {"token": id, ..} -> the map; added: a token that the vocabulary's merges do not make. */
static sdq_status sdq__tok_list(sdq_ctx *ctx, sdq_tokenizer *t, const sdq__tok_folder *f,
                                const char *file, const sdq__json *list, int added,
                                sdq__tok_map *map) {
    const sdq__json *v;
    size_t id;
    for (v = list ? list->child : NULL; v; v = v->next) {
        if (!sdq__js_size(v, &id) || id >= SDQ__JSON_NODES)
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s/%s: the id of '%s' is none", f->path, file,
                             v->key);
        sdq__tok_map_add(map, v->key, strlen(v->key), (int32_t)id);
        t->vocab = sdq__u_max(t->vocab, id + 1);
        if (added) SDQ__TRY(sdq__tok_add_special(ctx, t, v->key, (int32_t)id, 0));
    }
    return SDQ_OK;
}

/* vocab.json and the tokens added to it -> the map. added_tokens.json is older than
 * added_tokens_decoder in the configuration and counts only without it, as in transformers. */
static sdq_status sdq__tok_names(sdq_ctx *ctx, sdq_tokenizer *t, const sdq__tok_folder *f,
                                 sdq__tok_map *map) {
    const sdq__json *added = sdq__js_get(f->config, "added_tokens_decoder"), *v;
    const sdq__json *older = added ? NULL : f->added;
    size_t id;
    SDQ__TRY(sdq__tok_map_make(ctx, map, f->vocab->count + (added ? added->count : 0)
                                             + (older ? older->count : 0)));
    SDQ__TRY(sdq__tok_list(ctx, t, f, "vocab.json", f->vocab, 0, map));
    SDQ__TRY(sdq__tok_list(ctx, t, f, "added_tokens.json", older, 1, map));
    for (v = added ? added->child : NULL; v; v = v->next) {
        const char *text = sdq__js_string(v, "content", NULL), *digit = v->key;
        for (id = 0; *digit >= '0' && *digit <= '9' && id < SDQ__JSON_NODES; digit++)
            id = id * 10 + (size_t)(*digit - '0');
        if (!text || *digit || id >= SDQ__JSON_NODES)
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s/tokenizer_config.json: added token '%s' has "
                             "no content or no id", f->path, v->key);
        sdq__tok_map_add(map, text, strlen(text), (int32_t)id);
        t->vocab = sdq__u_max(t->vocab, id + 1);
        if (sdq__js_bool(v, "single_word", 0))
            return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s/tokenizer_config.json: added token '%s' "
                             "is to be found as a whole word only (\"single_word\"), which sdq "
                             "does not do", f->path, text);
        SDQ__TRY(sdq__tok_add_special(ctx, t, text, (int32_t)id,
                                      !sdq__js_bool(v, "normalized", 1)));
    }
    return SDQ_OK;
}

/* Ids per prompt: 77 when the file says nothing, or transformers' 10^30 for "unknown". */
static sdq_status sdq__tok_max_length(sdq_ctx *ctx, sdq_tokenizer *t, const sdq__tok_folder *f) {
    const sdq__json *v = sdq__js_get(f->config, "model_max_length");
    t->length = 77;
    if (!v || v->kind == SDQ__JS_NULL || (v->kind == SDQ__JS_NUMBER && v->num >= 1e29))
        return SDQ_OK;
    if (v->kind != SDQ__JS_NUMBER || !(v->num >= 2 && v->num <= 65536) || v->num != floor(v->num))
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s/tokenizer_config.json: \"model_max_length\" "
                         "must be a whole number of 2..65536", f->path);
    t->length = (size_t)v->num;
    return SDQ_OK;
}

static sdq_status sdq__tok_build(sdq_ctx *ctx, sdq_tokenizer *t, const sdq__tok_folder *f,
                                 sdq__tok_source *s) {
    size_t count;
    SDQ__TRY(sdq__tok_max_length(ctx, t, f));
    SDQ__TRY(sdq__tok_names(ctx, t, f, &s->map));
    SDQ__TRY(sdq__tok_reserve(ctx, t, sdq__tok_count_lines(f->merges, f->bytes)));
    SDQ__TRY(sdq__tok_read_merges(ctx, t, s, f->merges, f->bytes, &count));
    sdq__tok_find_bytes(t, s);
    SDQ__TRY(sdq__tok_resolve(ctx, t, f, &s->map, "bos_token", "<|startoftext|>", &t->start));
    SDQ__TRY(sdq__tok_resolve(ctx, t, f, &s->map, "eos_token", "<|endoftext|>", &t->end));
    SDQ__TRY(sdq__tok_resolve(ctx, t, f, &s->map, "unk_token", "<|endoftext|>", &t->unknown));
    return sdq__tok_resolve(ctx, t, f, &s->map, "pad_token", "<|endoftext|>", &t->pad);
}

SDQ_API sdq_status sdq_tokenizer_load(sdq_ctx *ctx, const char *folder, sdq_tokenizer **out) {
    sdq_tokenizer *t = SDQ__NEW(ctx, sdq_tokenizer);
    sdq__tok_folder f;
    sdq__tok_source s;
    char *pool = NULL;
    sdq_status st = SDQ_ERR_OOM;
    *out = NULL;
    memset(&f, 0, sizeof f);
    memset(&s, 0, sizeof s);
    f.path = s.what = folder;
    s.word_end = "</w>";
    if (!t) goto done;
    SDQ__TRY_DONE(sdq__tok_open(ctx, &f));
    st = SDQ_ERR_OOM;
    pool = s.pool = SDQ__NEW_N(ctx, char, f.bytes + 16);    /* one joined token, or one symbol */
    if (!pool) goto done;
    SDQ__TRY_DONE(sdq__tok_build(ctx, t, &f, &s));
    *out = t;
    t = NULL;
done:
    sdq__free(ctx, s.map.slot);
    sdq__free(ctx, pool);
    sdq__free(ctx, f.merges);
    sdq__js_free(ctx, f.added);
    sdq__js_free(ctx, f.special);
    sdq__js_free(ctx, f.config);
    sdq__js_free(ctx, f.vocab);
    sdq_tokenizer_free(ctx, t);
    return st;
}

/* --- encoding --- */

/* Where ids go: room for `room` ids between start and end; total counts those beyond it, too. */
typedef struct sdq__tok_ids { int32_t *ids; size_t room, total; } sdq__tok_ids;

static void sdq__tok_emit(sdq__tok_ids *o, int32_t id) {
    if (o->total < o->room) o->ids[1 + o->total] = id;
    o->total++;
}

/* A piece being merged: a linked list of symbols and a heap of pairs that could be joined. A pair
 * whose symbols have changed since is recognised by its ids and dropped when it comes up. */
#define SDQ__TOK_NONE UINT32_MAX
typedef struct sdq__tok_part { int32_t id; uint32_t prev, next; } sdq__tok_part;
typedef struct sdq__tok_cand { int32_t rank; uint32_t at; int32_t left, right, id; } sdq__tok_cand;
typedef struct sdq__tok_work {
    sdq__tok_part *part;
    sdq__tok_cand *heap;
    size_t parts, part_cap, heap_n, heap_cap;
} sdq__tok_work;

static int sdq__tok_before(const sdq__tok_cand *a, const sdq__tok_cand *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

/* Put the pair that begins at part `at` on the heap if there is a merge for it. The heap has room:
 * a piece of n parts never sees more than 3 n pairs. */
static void sdq__tok_offer(const sdq_tokenizer *t, sdq__tok_work *w, uint32_t at) {
    const sdq__tok_part *p = &w->part[at];
    sdq__tok_cand c;
    const sdq__tok_merge *m;
    size_t i;
    if (p->next == SDQ__TOK_NONE) return;
    c.left = p->id;
    c.right = w->part[p->next].id;
    m = sdq__tok_slot(t, sdq__tok_pair(c.left, c.right));
    if (m->pair == SDQ__TOK_EMPTY) return;
    c.rank = m->rank;
    c.id = m->id;
    c.at = at;
    for (i = w->heap_n++; i && sdq__tok_before(&c, &w->heap[(i - 1) / 2]); i = (i - 1) / 2)
        w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = c;
}

static sdq__tok_cand sdq__tok_take(sdq__tok_work *w) {
    const sdq__tok_cand top = w->heap[0], last = w->heap[--w->heap_n];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < w->heap_n) {
        if (child + 1 < w->heap_n && sdq__tok_before(&w->heap[child + 1], &w->heap[child])) child++;
        if (!sdq__tok_before(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return top;
}

/* Join the pair of a candidate unless it is outdated; then its new neighbours are candidates. */
static void sdq__tok_apply(const sdq_tokenizer *t, sdq__tok_work *w, const sdq__tok_cand *c) {
    sdq__tok_part *p = &w->part[c->at], *q;
    if (p->id != c->left || p->next == SDQ__TOK_NONE) return;
    q = &w->part[p->next];
    if (q->id != c->right) return;
    p->id = c->id;
    p->next = q->next;
    q->id = -1;                             /* no pair begins here any more */
    if (p->next != SDQ__TOK_NONE) w->part[p->next].prev = c->at;
    if (p->prev != SDQ__TOK_NONE) sdq__tok_offer(t, w, p->prev);
    sdq__tok_offer(t, w, c->at);
}

/* The ids of one piece of n > 0 bytes. */
static sdq_status sdq__tok_piece(sdq_ctx *ctx, const sdq_tokenizer *t, sdq__tok_work *w,
                                 const char *piece, size_t n, sdq__tok_ids *o) {
    uint32_t i;
    if (!sdq__grow(ctx, (void **)(void *)&w->part, &w->part_cap, n, sizeof *w->part) ||
        !sdq__grow(ctx, (void **)(void *)&w->heap, &w->heap_cap, 3 * n, sizeof *w->heap))
        return SDQ_ERR_OOM;
    for (i = 0; i < n; i++) {
        const unsigned char b = (unsigned char)piece[i];
        const int32_t id = i + 1 < n ? t->byte[b] : t->last[b];
        w->part[i].id = id < 0 ? t->unknown : id;
        w->part[i].prev = i ? i - 1 : SDQ__TOK_NONE;
        w->part[i].next = i + 1 < n ? i + 1 : SDQ__TOK_NONE;
    }
    w->heap_n = 0;
    for (i = 0; i < n; i++) sdq__tok_offer(t, w, i);
    while (w->heap_n) {
        const sdq__tok_cand c = sdq__tok_take(w);
        sdq__tok_apply(t, w, &c);
    }
    for (i = 0; i != SDQ__TOK_NONE; i = w->part[i].next) sdq__tok_emit(o, w->part[i].id);
    return SDQ_OK;
}

/* The longest special token at p, or NULL: of those found in raw text, or in normalised. */
static const sdq__tok_special *sdq__tok_special_at(const sdq_tokenizer *t, const char *p,
                                                   const char *end, int raw) {
    const sdq__tok_special *best = NULL;
    size_t i;
    for (i = 0; i < t->special_count; i++) {
        const sdq__tok_special *s = &t->specials[i];
        if (s->raw != raw || s->len > (size_t)(end - p) || memcmp(s->text, p, s->len) != 0)
            continue;
        if (!best || s->len > best->len) best = s;
    }
    return best;
}

static size_t sdq__tok_contraction(const char *p, const char *end) {
    static const char *const list[7] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    size_t i;
    for (i = 0; i < 7 && *p == '\''; i++) {
        const size_t n = strlen(list[i]);
        if ((size_t)(end - p) >= n && memcmp(p, list[i], n) == 0) return n;
    }
    return 0;
}

static int sdq__tok_kind(const char *p, const char *end, size_t *n) {
    uint32_t c = 0;
    *n = sdq__js_utf8(p, end, &c);
    if (c >= 128) return sdq__tok_class(c);
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return SDQ__TOK_LETTER;
    if (c >= '0' && c <= '9') return SDQ__TOK_NUMBER;
    return c == ' ' || (c >= 9 && c <= 13) ? SDQ__TOK_SPACE : SDQ__TOK_OTHER;
}

/* Length of the piece at p, whose first character has n bytes and that kind. */
static size_t sdq__tok_run(const sdq_tokenizer *t, const char *p, const char *end, int kind,
                           size_t n) {
    const size_t contraction = sdq__tok_contraction(p, end);
    size_t len = n, more;
    if (contraction) return contraction;
    if (kind == SDQ__TOK_NUMBER) return len;
    while (p + len < end && !sdq__tok_special_at(t, p + len, end, 0) &&
           sdq__tok_kind(p + len, end, &more) == kind) len += more;
    return len;
}

static sdq_status sdq__tok_text(sdq_ctx *ctx, const sdq_tokenizer *t, const char *p,
                                const char *end, sdq__tok_ids *o) {
    sdq__tok_work w;
    sdq_status st = SDQ_OK;
    memset(&w, 0, sizeof w);
    while (p < end && st == SDQ_OK) {
        const sdq__tok_special *special = sdq__tok_special_at(t, p, end, 0);
        size_t n;
        int kind;
        if (special) {
            sdq__tok_emit(o, special->id);
            p += special->len;
            continue;
        }
        kind = sdq__tok_kind(p, end, &n);
        if (kind != SDQ__TOK_SPACE) {
            n = sdq__tok_run(t, p, end, kind, n);
            st = sdq__tok_piece(ctx, t, &w, p, n, o);
        }
        p += n;
    }
    sdq__free(ctx, w.part);
    sdq__free(ctx, w.heap);
    return st;
}

SDQ_API sdq_status sdq_tokenizer_encode(sdq_ctx *ctx, const sdq_tokenizer *t, const char *utf8,
                                        int32_t *ids, size_t max, size_t *count) {
    const size_t length = ids ? sdq__u_min(max, t->length) : 0;
    sdq__tok_ids o;
    size_t i;
    sdq_status st;
    if (count) *count = 0;
    if (length == 1)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "room for one id; a prompt has at least two");
    o.ids = ids;
    o.room = length ? length - 2 : 0;
    o.total = 0;
    st = sdq__tok_prompt(ctx, t, utf8, utf8 + bytes, &o);
    if (st != SDQ_OK) return st;
    if (count) *count = o.total + 2;
    if (!length) return SDQ_OK;
    ids[0] = t->start;
    i = 1 + sdq__u_min(o.total, o.room);
    ids[i++] = t->end;
    for (; i < length; i++) ids[i] = t->pad;
    return SDQ_OK;
}

SDQ_API size_t sdq_tokenizer_length(const sdq_tokenizer *t) { return t->length; }
SDQ_API size_t sdq_tokenizer_vocab(const sdq_tokenizer *t) { return t->vocab; }
SDQ_API int32_t sdq_tokenizer_start(const sdq_tokenizer *t) { return t->start; }
SDQ_API int32_t sdq_tokenizer_end(const sdq_tokenizer *t) { return t->end; }
SDQ_API int32_t sdq_tokenizer_pad(const sdq_tokenizer *t) { return t->pad; }
/* ===========================================================================
 * >>optim   AdamW, clipping, schedule, average of the weights, the training loop
 *
 * Weights, gradients and two moments are 16 bytes per weight. With moments8 they are 10: moments
 * are bytes with a scale per block of 256, as in Dettmers et al., "8-bit Optimizers via Block-wise
 * Quantization" (arXiv 2110.02861); tensors of less than 4096 elements and scales keep floats.
 * The code is a root instead of their tables: a first moment x of a block with the largest a is
 * kept as 127 sqrt(|x| / a) and its sign, a second one as 255 (x / a)^(1/4), which reaches down to
 * 2e-10 a and never becomes 0, since the root of it is divided by. A step computes with floats
 * and rounds what it leaves behind; the decay of a whole block is in its scale, which is exact.
 * ======================================================================== */

/* Copy what must survive a stop into v (load 0), or back (load 1). */
typedef void (*sdq__state_fn)(void *user, float *v, int load);

typedef struct sdq__leaf {
    sdq_tensor *t;
    char *name;
    float *m, *v, *ema;
    int8_t *m8;                 /* or moments in bytes, */
    uint8_t *v8;
    float *scale;               /*   with scales [block][2] */
    float lr_scale, floor;
    int decay;
    sdq__state_fn state;        /* values that are only kept, such as ranges: no moments */
    void *user;
    int moving;                 /* kept ones that change from step to step */
} sdq__leaf;

struct sdq_optim {
    sdq_optim_desc desc;
    sdq__leaf *leaf;
    size_t count, cap, step;
    double norm, rate;
    double mean, best;          /* running mean of the loss; lowest validation loss, its step */
    size_t best_step;
    char *of;                   /* "key=value ..": what is trained, for the state; NULL: not told */
};

SDQ_API sdq_status sdq_optim_create(sdq_ctx *ctx, const sdq_optim_desc *desc, sdq_optim **out) {
    sdq_optim *o = SDQ__NEW(ctx, sdq_optim);
    *out = NULL;
    if (!o) return ctx->status;
    if (desc) o->desc = *desc;
    o->best = HUGE_VAL;
    if (o->desc.lr == 0.0f) o->desc.lr = 1e-4f;
    if (o->desc.beta1 == 0.0f) o->desc.beta1 = 0.9f;
    if (o->desc.beta2 == 0.0f) o->desc.beta2 = 0.999f;
    if (o->desc.eps == 0.0f) o->desc.eps = 1e-8f;
    *out = o;
    return SDQ_OK;
}

static void sdq__opt_leaf_free(sdq_ctx *ctx, sdq__leaf *l) {
    sdq__free(ctx, l->name);
    sdq__free(ctx, l->m);
    sdq__free(ctx, l->v);
    sdq__free(ctx, l->m8);
    sdq__free(ctx, l->v8);
    sdq__free(ctx, l->scale);
    sdq__free(ctx, l->ema);
}

#define SDQ__OPT_SMALL 4096     /* below it moments are never bytes */

static void sdq__opt_moments(sdq_ctx *ctx, const sdq_optim *o, sdq__leaf *l) {
    const size_t n = sdq_tensor_count(l->t);
    if (o->desc.moments8 && n >= SDQ__OPT_SMALL && l->floor <= 0.0f) {
        l->m8 = SDQ__NEW_N(ctx, int8_t, n);
        l->v8 = SDQ__NEW_N(ctx, uint8_t, n);
        l->scale = SDQ__NEW_N(ctx, float, 2 * sdq__u_div_up(n, SDQ__MOMENT_BLOCK));
    } else {
        l->m = SDQ__NEW_N(ctx, float, n);
        l->v = SDQ__NEW_N(ctx, float, n);
    }
}

SDQ_API void sdq_optim_free(sdq_ctx *ctx, sdq_optim *o) {
    size_t i;
    if (!o) return;
    for (i = 0; i < o->count; i++) {
        sdq__leaf *l = &o->leaf[i];
        sdq__free(ctx, l->t->grad);
        l->t->grad = NULL;
        l->t->needs_grad = 0;
        if (l->state) { sdq__t_free(ctx, l->t); sdq__free(ctx, l->t); }
        sdq__opt_leaf_free(ctx, l);
    }
    sdq__free(ctx, o->leaf);
    sdq__free(ctx, o->of);
    sdq__free(ctx, o);
}

SDQ_API sdq_status sdq_optim_add(sdq_ctx *ctx, sdq_optim *o, sdq_tensor *t, const char *name,
                                 float lr_scale, float floor, int decay) {
    sdq__leaf l;
    float *grad;
    size_t n, i;
    if (ctx->status != SDQ_OK) return ctx->status;
    if (!t)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "optimizer: %s has no float values to train", name);
    for (i = 0; i < o->count; i++)
        if (o->leaf[i].t == t || strcmp(o->leaf[i].name, name) == 0)
            return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "optimizer: %s was added twice", name);
    n = sdq_tensor_count(t);
    memset(&l, 0, sizeof l);
    if (!sdq__grow(ctx, (void **)(void *)&o->leaf, &o->cap, o->count + 1, sizeof l))
        return ctx->status;
    l.t = t;
    l.name = sdq__strdup(ctx, name);
    l.ema = o->desc.ema > 0.0f ? SDQ__NEW_N(ctx, float, n) : NULL;
    l.lr_scale = lr_scale == 0.0f ? 1.0f : lr_scale;
    l.floor = floor;
    l.decay = decay;
    sdq__opt_moments(ctx, o, &l);
    grad = SDQ__NEW_N(ctx, float, n);
    if (ctx->status != SDQ_OK) {
        sdq__opt_leaf_free(ctx, &l);
        sdq__free(ctx, grad);
        return ctx->status;
    }
    t->grad = grad;
    t->needs_grad = 1;
    if (l.ema) memcpy(l.ema, t->data, n * sizeof(float));
    o->leaf[o->count++] = l;
    return SDQ_OK;
}

/* n values that go into the state file and come back from it, untrained.
 *   moving   observers that go on: the processes of a group join them after every step */
static sdq_status sdq__opt_add_state(sdq_ctx *ctx, sdq_optim *o, const char *name, size_t n,
                                     sdq__state_fn fn, void *user, int moving) {
    sdq__leaf l;
    memset(&l, 0, sizeof l);
    l.moving = moving;
    if (!sdq__grow(ctx, (void **)(void *)&o->leaf, &o->cap, o->count + 1, sizeof l))
        return ctx->status;
    l.state = fn;
    l.user = user;
    l.name = sdq__strdup(ctx, name);
    l.t = SDQ__NEW(ctx, sdq_tensor);
    if (!l.name || !l.t || sdq__t_init(ctx, l.t, 1, &n) != SDQ_OK) {
        sdq__free(ctx, l.name);
        sdq__free(ctx, l.t);
        return ctx->status;
    }
    o->leaf[o->count++] = l;
    return SDQ_OK;
}

SDQ_API void sdq_optim_zero(sdq_optim *o) {
    size_t i;
    for (i = 0; i < o->count; i++)
        if (!o->leaf[i].state)
            memset(o->leaf[i].t->grad, 0, sdq_tensor_count(o->leaf[i].t) * sizeof(float));
}
SDQ_API size_t sdq_optim_steps_done(const sdq_optim *o) { return o->step; }
SDQ_API double sdq_optim_grad_norm(const sdq_optim *o) { return o->norm; }
SDQ_API double sdq_optim_rate(const sdq_optim *o) { return o->rate; }

/* Rate of step t (from 0): linear warm-up, then constant or half a cosine down to 0. */
static double sdq__opt_rate(const sdq_optim_desc *d, size_t t) {
    const double lr = (double)d->lr;
    if (t < d->warmup) return lr * (double)(t + 1) / (double)d->warmup;
    if (d->schedule == SDQ_COSINE && d->steps > d->warmup) {
        const double x = (double)(t - d->warmup) / (double)(d->steps - d->warmup);
        return x >= 1.0 ? 0.0 : lr * 0.5 * (1.0 + cos(3.14159265358979323846 * x));
    }
    return lr;
}

/* A leaf's step or its share of the norm, a piece at a time. */
typedef struct sdq__opt_run {
    const struct sdq__kernels *k;
    const sdq__leaf *l;
    const sdq__adamw_step *step;
    float ema, *part;           /* part: sums of squares of the pieces */
    size_t n;
} sdq__opt_run;

static void sdq__opt_norm_task(void *arg, size_t task, int thread) {
    const sdq__opt_run *w = (const sdq__opt_run *)arg;
    const float *g = w->l->t->grad + task * SDQ__PIECE;
    (void)thread;
    w->part[task] = w->k->dot(g, g, sdq__u_min(SDQ__PIECE, w->n - task * SDQ__PIECE));
}
static double sdq__opt_norm(sdq_ctx *ctx, const sdq_optim *o, float *scratch) {
    double sum = 0.0;
    size_t i, j;
/* A prompt, cut at its raw special tokens; what is between them is normalised piece by piece. */
static sdq_status sdq__tok_prompt(sdq_ctx *ctx, const sdq_tokenizer *t, const char *p,
                                  const char *end, sdq__tok_ids *o) {
    sdq_status st = SDQ_OK;
    while (p < end && st == SDQ_OK) {
        const sdq__tok_special *special = NULL;
        const char *stop = p;
        sdq__str text;
        memset(&text, 0, sizeof text);
        while (stop < end && (special = sdq__tok_special_at(t, stop, end, 1)) == NULL) stop++;
        st = sdq__tok_normalise(ctx, p, stop, &text);
        if (st == SDQ_OK && text.s) st = sdq__tok_text(ctx, t, text.s, text.s + text.len, o);
        sdq__str_free(ctx, &text);
        if (special) sdq__tok_emit(o, special->id);
        p = stop + (special ? special->len : 0);
    }
    return st;
}

    for (i = 0; i < o->count; i++) {
        sdq__opt_run w;
        if (!o->leaf[i].t->grad) continue;
    const size_t bytes = strlen(utf8);
        w.k = ctx->k; w.l = &o->leaf[i]; w.part = scratch;
        w.n = sdq_tensor_count(w.l->t);
        sdq__par_for(ctx, sdq__u_div_up(w.n, SDQ__PIECE), sdq__opt_norm_task, &w);
        for (j = 0; j * SDQ__PIECE < w.n; j++) sum += (double)scratch[j];
    }
    if (bytes > SDQ__TOK_TEXT)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "a prompt of %zu bytes; at most 2^20 are allowed",
                         bytes);
    return sqrt(sum);
}

/* n elements from i on, a multiple of blocks. */
static void sdq__opt_step_bytes(const sdq__opt_run *w, size_t i, size_t n) {
    const sdq__leaf *l = w->l;
    const size_t end = i + n;
    for (; i < end; i += SDQ__MOMENT_BLOCK)
        w->k->adamw8(sdq_f32(l->t) + i, l->m8 + i, l->v8 + i,
                     l->scale + 2 * (i / SDQ__MOMENT_BLOCK), l->t->grad + i,
                     sdq__u_min(SDQ__MOMENT_BLOCK, end - i), w->step);
}
/* Step, average, and the gradient back to zeros while it is in the caches. */
static void sdq__opt_step_task(void *arg, size_t task, int thread) {
    const sdq__opt_run *w = (const sdq__opt_run *)arg;
    const sdq__leaf *l = w->l;
    const size_t i = task * SDQ__PIECE, n = sdq__u_min(SDQ__PIECE, w->n - i);
    float *x = sdq_f32(l->t) + i, *g = l->t->grad + i;
    (void)thread;
    if (l->m8) sdq__opt_step_bytes(w, i, n);
    else if (l->floor <= 0.0f) w->k->adamw(x, l->m + i, l->v + i, g, n, w->step);
    if (l->ema) w->k->lerp(l->ema + i, x, n, w->ema);
    memset(g, 0, n * sizeof *g);
}

/* The number of leaves whose gradient is not finite; *name: the first of them. */
static size_t sdq__opt_bad_gradients(const sdq_optim *o, const char **name) {
    size_t i, n = 0;
    for (i = 0; i < o->count; i++) {
        const sdq_tensor *t = o->leaf[i].t;
        if (t->grad && !sdq__ly_finite(t->grad, sdq_tensor_count(t)) && n++ == 0)
            *name = o->leaf[i].name;
    }
    return n;
}

/* AdamW on u = log w: du = dw w, w' = w (1 + step) to first order. Such gradients are small (LSQ
 * divides them by the root of the number of elements), so is their eps. */
static void sdq__opt_scale_step(sdq_ctx *ctx, sdq__leaf *l, const sdq__adamw_step *step,
                                float *u) {
    const size_t n = sdq_tensor_count(l->t);
    float *w = sdq_f32(l->t);
    sdq__adamw_step s = *step;
    size_t j;
    s.eps *= 1e-4f;
    memset(u, 0, n * sizeof(float));
    for (j = 0; j < n; j++) l->t->grad[j] *= w[j];
    ctx->k->adamw(u, l->m, l->v, l->t->grad, n, &s);
    for (j = 0; j < n; j++) {
        const float v = w[j] * (1.0f + u[j]);
        w[j] = v > l->floor ? v : l->floor;
    }
}
/* Scratch for the largest of them, and for the norm of the largest leaf. */
static float *sdq__opt_scratch(sdq_ctx *ctx, const sdq_optim *o) {
    size_t n = 1, i;
    for (i = 0; i < o->count; i++) {
        const size_t count = sdq_tensor_count(o->leaf[i].t);
        n = sdq__u_max(n, o->leaf[i].floor > 0.0f ? count : sdq__u_div_up(count, SDQ__PIECE));
    }
    return SDQ__PUSH_N(ctx, float, n);
}

SDQ_API sdq_status sdq_optim_step(sdq_ctx *ctx, sdq_optim *o) {
    const sdq_optim_desc *d = &o->desc;
    const double t = (double)(o->step + 1);
    double decay = (1.0 + t) / (10.0 + t);
    const sdq_mark mark = sdq_arena_mark(ctx);
    float *scratch = sdq__opt_scratch(ctx, o);
    sdq__adamw_step s;
    size_t i;
    if (ctx->status != SDQ_OK) return ctx->status;
    sdq_arena_release(ctx, mark);       /* nothing else is pushed before the end */
    o->norm = sdq__opt_norm(ctx, o, scratch);
    if (!(o->norm < 1e30)) {
        const char *name = "their sum";
        const size_t bad = sdq__opt_bad_gradients(o, &name);
        return sdq__fail(ctx, SDQ_ERR_NUMERIC,
                         "training: the gradient of step %zu is not finite in %zu of %zu tensors,"
                         " first %s; the last checkpoint is good, lower the learning rate",
                         o->step, bad, o->count, name);
    }
    o->rate = sdq__opt_rate(d, o->step);
    if (decay > (double)d->ema) decay = (double)d->ema;
    s.beta1 = d->beta1; s.beta2 = d->beta2; s.eps = d->eps;
    s.c1 = (float)(1.0 / (1.0 - pow((double)d->beta1, t)));
    s.c2 = (float)(1.0 / (1.0 - pow((double)d->beta2, t)));
    s.clip = d->clip > 0.0f && o->norm > (double)d->clip
                 ? (float)((double)d->clip / (o->norm + 1e-6))
                 : 1.0f;
    for (i = 0; i < o->count; i++) {
        sdq__leaf *l = &o->leaf[i];
        sdq__opt_run w;
        if (l->state) continue;
        s.lr = (float)(o->rate * (double)l->lr_scale);
        s.decay = l->decay ? s.lr * d->weight_decay : 0.0f;
        if (l->floor > 0.0f) sdq__opt_scale_step(ctx, l, &s, scratch);
        memset(&w, 0, sizeof w);
        w.k = ctx->k; w.l = l; w.step = &s;
        w.ema = (float)(1.0 - decay);
        w.n = sdq_tensor_count(l->t);
        sdq__par_for(ctx, sdq__u_div_up(w.n, SDQ__PIECE), sdq__opt_step_task, &w);
    }
    o->step++;
    return SDQ_OK;
}

SDQ_API void sdq_optim_swap_ema(sdq_optim *o) {
    size_t i, j;
    for (i = 0; i < o->count; i++) {
        float *w = sdq_f32(o->leaf[i].t), *e = o->leaf[i].ema;
        for (j = 0; e && j < sdq_tensor_count(o->leaf[i].t); j++) {
            const float x = w[j];
            w[j] = e[j];
            e[j] = x;
        }
    }
}

/* ---- state files: weight/NAME, its moments m/ and v/, or m8/, v8/ and their scales, ema/, the
 * step, and of what model and recipe ---- */

typedef struct sdq__opt_slot { const char *kind; sdq_dtype dtype; void *data; } sdq__opt_slot;

/* What a leaf keeps; returns how many. */
static size_t sdq__opt_slots(const sdq__leaf *l, sdq__opt_slot *slot) {
    size_t n = 0, i;
    sdq__opt_slot all[7];
    memset(all, 0, sizeof all);
    for (i = 0; i < 7; i++) all[i].dtype = SDQ_F32;
    all[0].kind = "weight"; all[0].data = l->t->data;
    all[1].kind = "m"; all[1].data = l->m;
    all[2].kind = "v"; all[2].data = l->v;
    all[3].kind = "m8"; all[3].data = l->m8; all[3].dtype = SDQ_I8;
    all[4].kind = "v8"; all[4].data = l->v8; all[4].dtype = SDQ_U8;
    all[5].kind = "scales"; all[5].data = l->scale;
    all[6].kind = "ema"; all[6].data = l->ema;
    for (i = 0; i < 7; i++)
        if (all[i].data) slot[n++] = all[i];
    return n;
}
static size_t sdq__opt_arrays(const sdq_optim *o) {
    sdq__opt_slot slot[7];
    size_t i, n = 0;
    for (i = 0; i < o->count; i++) n += sdq__opt_slots(&o->leaf[i], slot);
    return n;
}
/* The array of a slot in a file, without its data. name: room for 256. */
static void sdq__opt_entry(const sdq__leaf *l, const sdq__opt_slot *slot, char *name,
                           sdq_entry *e) {
    const sdq_tensor *t = l->t;
    const size_t n = sdq_tensor_count(t);
    size_t i;
    memset(e, 0, sizeof *e);
    (void)snprintf(name, 256, "%s/%s", slot->kind, l->name);
    e->name = name;
    e->dtype = slot->dtype;
    e->rank = t->rank;
    for (i = 0; i < 8; i++) e->dim[i] = i < 4 ? t->dim[i] : 1;
    e->bytes = n * sdq__u_dtype_size(slot->dtype);
    if (slot->data != l->scale) return;
    e->rank = 2;
    e->dim[0] = sdq__u_div_up(n, SDQ__MOMENT_BLOCK);
    e->dim[1] = 2;
    e->dim[2] = e->dim[3] = 1;
    e->bytes = 2 * e->dim[0] * sizeof(float);
}

/* What the loop must remember: the running mean of the loss and the best validation loss as the
 * bits of a double, and the step of the best. */
enum { SDQ__OPT_FIT = 64 };
static void sdq__opt_put_fit(const sdq_optim *o, char buf[SDQ__OPT_FIT]) {
    uint64_t u[2];
    memcpy(&u[0], &o->mean, 8);
    memcpy(&u[1], &o->best, 8);
    (void)snprintf(buf, SDQ__OPT_FIT, "%08lx%08lx %08lx%08lx %lu",
                   (unsigned long)(u[0] >> 32), (unsigned long)(u[0] & 0xffffffffu),
                   (unsigned long)(u[1] >> 32), (unsigned long)(u[1] & 0xffffffffu),
                   (unsigned long)o->best_step);
}
/* text NULL: a state without; 0 when it is not what sdq__opt_put_fit writes. */
static int sdq__opt_get_fit(const char *text, sdq_optim *o) {
    unsigned long v[5];
    uint64_t u[2];
    char again[SDQ__OPT_FIT];
    o->mean = 0.0;
    o->best = HUGE_VAL;
    o->best_step = 0;
    if (!text) return 1;
    if (sscanf(text, "%8lx%8lx %8lx%8lx %lu", &v[0], &v[1], &v[2], &v[3], &v[4]) != 5) return 0;
    u[0] = (uint64_t)v[0] << 32 | v[1];
    u[1] = (uint64_t)v[2] << 32 | v[3];
    memcpy(&o->mean, &u[0], 8);
    memcpy(&o->best, &u[1], 8);
    o->best_step = v[4];
    sdq__opt_put_fit(o, again);
    return strcmp(text, again) == 0 && o->mean == o->mean && o->best == o->best;
}

SDQ_API sdq_status sdq_optim_save(sdq_ctx *ctx, const sdq_optim *o, const char *path) {
    const size_t arrays = sdq__opt_arrays(o);
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_entry *e = SDQ__PUSH_N(ctx, sdq_entry, arrays + 1);
    char *names = SDQ__PUSH_N(ctx, char, (arrays + 1) * 256), step[32], fit[SDQ__OPT_FIT];
    sdq__opt_slot slot[7];
    sdq_pair meta[3];
    sdq_status st = ctx->status;
    size_t i, k, n = 0;
    if (e && names) {
        for (i = 0; i < o->count; i++) {
            const sdq__leaf *l = &o->leaf[i];
            const size_t slots = sdq__opt_slots(l, slot);
            if (l->state) l->state(l->user, sdq_f32(l->t), 0);
            for (k = 0; k < slots; k++, n++) {
                sdq__opt_entry(l, &slot[k], names + n * 256, &e[n]);
                e[n].data = slot[k].data;
            }
        }
        (void)snprintf(step, sizeof step, "%zu", o->step);
        sdq__opt_put_fit(o, fit);
        meta[0].key = "step"; meta[0].value = step;
        meta[1].key = "fit"; meta[1].value = fit;
        meta[2].key = "of"; meta[2].value = o->of;
        st = sdq_file_write(ctx, path, e, n, meta, o->of ? 3 : 2);
    }
    sdq_arena_release(ctx, mark);
    return st;
}

/* The step is digits and nothing else; 0 when it is not. */
static int sdq__opt_parse_step(const char *text, size_t *step) {
    size_t i, v = 0;
    for (i = 0; text[i] >= '0' && text[i] <= '9' && i < 18; i++)
        v = v * 10 + (size_t)(text[i] - '0');
    *step = v;
    return i > 0 && text[i] == 0;
}

/* Is the state that of this model and recipe? If not, the first word that differs tells why. */
static sdq_status sdq__opt_check_of(sdq_ctx *ctx, const sdq_optim *o, const char *path,
                                    const char *of) {
    const char *here = o->of ? o->of : "nothing is said of it", *there = of ? of : "unknown";
    size_t i, first = 0;
    if (strcmp(here, there) == 0 || (!o->of && !of)) return SDQ_OK;
    for (i = 0; here[i] && here[i] == there[i]; i++)
        if (here[i] == ' ') first = i + 1;
    return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: is the state of another model or recipe: %.*s there,"
                     " %.*s here; use another state file or delete it", path,
                     (int)strcspn(there + first, " "), there + first,
                     (int)strcspn(here + first, " "), here + first);
}

SDQ_API sdq_status sdq_optim_load(sdq_ctx *ctx, sdq_optim *o, const char *path) {
    const size_t arrays = sdq__opt_arrays(o);
    sdq_file *f = NULL;
    sdq_status st = sdq_file_open(ctx, path, &f);
    const char *text;
    size_t i, k, pass, step = 0;
    sdq__opt_slot slot[7];
    sdq_optim fit = *o;
    char name[256];
    if (st != SDQ_OK) return st;
    text = sdq_file_meta(f, "step");
    if (!text || !sdq__opt_parse_step(text, &step)
        || !sdq__opt_get_fit(sdq_file_meta(f, "fit"), &fit)) {
        st = sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: is not the state of a training; use another state"
                       " file or delete it", path);
        goto done;
    }
    SDQ__TRY_DONE(sdq__opt_check_of(ctx, o, path, sdq_file_meta(f, "of")));
    if (sdq_file_count(f) != arrays) {
        st = sdq__fail(ctx, SDQ_ERR_FORMAT,
                       "%s: is not the state of this training (%zu arrays, expected %zu);"
                       " use another state file or delete it",
                       path, sdq_file_count(f), arrays);
        goto done;
    }
    for (pass = 0; pass < 2; pass++)        /* check everything before anything changes */
        for (i = 0; i < o->count; i++) {
            const size_t slots = sdq__opt_slots(&o->leaf[i], slot);
            for (k = 0; k < slots; k++) {
                const sdq_entry *e;
                sdq_entry want;
                sdq_tensor t;
                char shape[96];
                sdq__opt_entry(&o->leaf[i], &slot[k], name, &want);
                e = sdq_file_find(f, name);
                if (!e || e->dtype != want.dtype || e->rank != want.rank
                    || memcmp(e->dim, want.dim, sizeof want.dim) != 0) {
                    t.rank = want.rank;
                    memcpy(t.dim, want.dim, sizeof t.dim);
                    st = sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: array %s is missing or is not %s %s;"
                                   " use another state file or delete it", path, name,
                                   sdq_dtype_name(want.dtype), sdq__t_shape(&t, shape));
                    goto done;
                }
                if (pass) memcpy(slot[k].data, e->data, e->bytes);
            }
        }
    for (i = 0; i < o->count; i++)
        if (o->leaf[i].state) o->leaf[i].state(o->leaf[i].user, sdq_f32(o->leaf[i].t), 1);
    o->step = step;
    o->mean = fit.mean;
    o->best = fit.best;
    o->best_step = fit.best_step;
done:
    sdq_file_close(ctx, f);
    return st;
}

SDQ_API sdq_status sdq_optim_save_weights(sdq_ctx *ctx, const sdq_optim *o, const char *path) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_entry *e = SDQ__PUSH_N(ctx, sdq_entry, o->count + 1);
    sdq_status st = ctx->status;
    size_t i;
    for (i = 0; e && i < o->count; i++) {
        const sdq__leaf *l = &o->leaf[i];
        memset(&e[i], 0, sizeof e[i]);
        if (l->state) l->state(l->user, sdq_f32(l->t), 0);
        e[i].name = l->name;
        e[i].rank = l->t->rank;
        memcpy(e[i].dim, l->t->dim, sizeof l->t->dim);
        e[i].data = l->ema ? l->ema : sdq_f32(l->t);
        e[i].bytes = sdq_tensor_count(l->t) * sizeof(float);
    }
    if (e) st = sdq_file_write(ctx, path, e, o->count, NULL, 0);
    sdq_arena_release(ctx, mark);
    return st;
}

SDQ_API sdq_status sdq_optim_load_weights(sdq_ctx *ctx, sdq_optim *o, const char *path) {
    sdq_file *f = NULL;
    sdq_status st = sdq_file_open(ctx, path, &f);
    size_t i, pass;
    if (st != SDQ_OK) return st;
    for (pass = 0; pass < 2; pass++)        /* check everything before anything changes */
        for (i = 0; i < o->count && st == SDQ_OK; i++) {
            sdq__leaf *l = &o->leaf[i];
            const sdq_entry *e = sdq_file_find(f, l->name);
            char shape[96];
            if (!e || e->dtype != SDQ_F32 || e->rank != l->t->rank
                || memcmp(e->dim, l->t->dim, sizeof l->t->dim) != 0)
                st = sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: array %s is missing or is not F32 %s: it"
                               " belongs to another training", path, l->name,
                               sdq__t_shape(l->t, shape));
            else if (pass) memcpy(l->t->data, e->data, e->bytes);
            if (st == SDQ_OK && pass && l->state) l->state(l->user, sdq_f32(l->t), 1);
        }
    sdq_file_close(ctx, f);
    return st;
}

/* ---- the loop ---- */

/* Every micro-batch has its own generator: a run can stop and go on anywhere. */
static void sdq__opt_rng(sdq_rng *rng, uint64_t seed, size_t step, size_t micro) {
    const uint64_t mix = (seed * 1000003u + (uint64_t)step) * 64u + (uint64_t)micro % 64u
                       + (uint64_t)(micro / 64) * UINT64_C(0x9e3779b97f4a7c15);
    sdq_rng_init(rng, SDQ_RNG_TORCH, mix ^ (mix >> 32));
}

/* The parts of a loss, added up over micro-batches. */
typedef struct sdq__notes {
    const char *name[SDQ_FIT_PARTS];
    double sum[SDQ_FIT_PARTS], share;
    size_t n;
} sdq__notes;

SDQ_API void sdq_fit_note(sdq_ctx *ctx, const char *name, double value) {
    sdq__notes *n = ctx->notes;
    size_t i;
    if (!n) return;
    for (i = 0; i < n->n && strcmp(n->name[i], name) != 0; i++) {}
    if (i == SDQ_FIT_PARTS) return;
    if (i == n->n) { n->name[n->n++] = name; n->sum[i] = 0.0; }
    n->sum[i] += n->share * value;
}

typedef struct sdq__opt_loop {
    sdq_optim *o;
    const sdq_fit_desc *d;
    sdq_loss_fn fn;
    void *user;
    size_t micros, rank, ranks; /* micro-batches of this process */
    sdq__notes notes;
    sdq_fit_info info;
} sdq__opt_loop;

/* ---- several processes ---- */

static sdq_status sdq__opt_reduce(sdq_ctx *ctx, const sdq_group *g, sdq_reduce how,
                                  const sdq_span *span, size_t n) {
    if (ctx->status != SDQ_OK || !g || g->ranks < 2 || n == 0) return ctx->status;
    if (g->reduce(g->user, how, span, n) != 0)
        sdq__fail(ctx, SDQ_ERR_IO, "process %zu of %zu: %s could not be joined with the others",
                  g->rank, g->ranks, span->name);
    return ctx->status;
}
static sdq_status sdq__opt_reduce_one(sdq_ctx *ctx, const sdq_group *g, sdq_reduce how,
                                      const char *name, float *v, size_t n) {
    sdq_span span;
    span.name = name; span.values = v; span.count = n;
    return sdq__opt_reduce(ctx, g, how, &span, 1);
}

/* Each number is known to one process and 0 in the others; afterwards all know all, to the bit: a
 * double is the sum of three floats. Then every process adds them up in one order. */
static sdq_status sdq__opt_share(sdq_ctx *ctx, const sdq_group *g, const char *name, double *v,
                                 size_t n) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    float *p;
    size_t i;
    if (ctx->status != SDQ_OK || !g || g->ranks < 2) return ctx->status;
    p = SDQ__PUSH_N(ctx, float, 3 * n);
    for (i = 0; p && i < n; i++) {
        p[3 * i] = (float)v[i];
        p[3 * i + 1] = (float)(v[i] - (double)p[3 * i]);
        p[3 * i + 2] = (float)(v[i] - (double)p[3 * i] - (double)p[3 * i + 1]);
    }
    if (p) (void)sdq__opt_reduce_one(ctx, g, SDQ_REDUCE_SUM, name, p, 3 * n);
    for (i = 0; p && i < n; i++)
        v[i] = (double)p[3 * i] + (double)p[3 * i + 1] + (double)p[3 * i + 2];
    sdq_arena_release(ctx, mark);
    return ctx->status;
}

/* The widest range of all processes, in the values of sdq__ly_state. */
static sdq_status sdq__opt_reduce_range(sdq_ctx *ctx, const sdq_group *g, const char *name,
                                        float *v, size_t n) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    float *low = SDQ__PUSH_N(ctx, float, n);
    size_t i;
    if (!low) return ctx->status;
    memcpy(low, v, n * sizeof *v);
    (void)sdq__opt_reduce_one(ctx, g, SDQ_REDUCE_MIN, name, low, n);
    (void)sdq__opt_reduce_one(ctx, g, SDQ_REDUCE_MAX, name, v, n);
    for (i = 0; i < n; i++)
        if (sdq__ly_state_is_min(n, i)) v[i] = low[i];
    sdq_arena_release(ctx, mark);
    return ctx->status;
}

/* All gradients in one call, so that the user can overlap them; then the moving ranges. */
static sdq_status sdq__opt_reduce_gradients(sdq_ctx *ctx, const sdq_group *g, sdq_optim *o) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_span *span;
    size_t i, n = 0;
    if (!g || g->ranks < 2) return SDQ_OK;
    span = SDQ__PUSH_N(ctx, sdq_span, o->count + 1);
    if (!span) return ctx->status;
    for (i = 0; i < o->count; i++) {
        const sdq__leaf *l = &o->leaf[i];
        if (l->state) continue;
        span[n].name = l->name;
        span[n].values = l->t->grad;
        span[n++].count = sdq_tensor_count(l->t);
    }
    (void)sdq__opt_reduce(ctx, g, SDQ_REDUCE_SUM, span, n);
    sdq_arena_release(ctx, mark);
    for (i = 0; i < o->count && ctx->status == SDQ_OK; i++) {
        sdq__leaf *l = &o->leaf[i];
        if (!l->moving) continue;
        l->state(l->user, sdq_f32(l->t), 0);
        SDQ__TRY(sdq__opt_reduce_range(ctx, g, l->name, sdq_f32(l->t), sdq_tensor_count(l->t)));
        l->state(l->user, sdq_f32(l->t), 1);
    }
    return ctx->status;
}

/* All processes begin at one step with one set of weights: 24 bits each of step and hash. */
static sdq_status sdq__opt_agree(sdq_ctx *ctx, const sdq_group *g, const sdq_optim *o) {
    uint64_t hash = 0;
    float low[3], high[3];
    size_t i;
    if (!g || g->ranks < 2) return SDQ_OK;
    if (g->rank >= g->ranks || !g->reduce)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: process %zu of %zu, or no way to join"
                         " them", g->rank, g->ranks);
    for (i = 0; i < o->count; i++) {
        const sdq_tensor *t = o->leaf[i].t;
        if (!o->leaf[i].state)
            hash = sdq__u_mix(hash, sdq__u_hash(0, t->data, sdq_tensor_count(t) * sizeof(float)));
    }
    low[0] = (float)(o->step & 0xffffffu);
    low[1] = (float)(hash & 0xffffffu);
    low[2] = (float)(hash >> 40);
    memcpy(high, low, sizeof low);
    SDQ__TRY(sdq__opt_reduce_one(ctx, g, SDQ_REDUCE_MIN, "the step", low, 3));
    SDQ__TRY(sdq__opt_reduce_one(ctx, g, SDQ_REDUCE_MAX, "the step", high, 3));
    if (low[0] != high[0])
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: the processes are at steps %.0f to"
                         " %.0f; the state file must be one that all of them can read",
                         (double)low[0], (double)high[0]);
    if (memcmp(low, high, sizeof low) != 0)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: the processes begin with different"
                         " weights; they must load the same model, ranges and states");
    return SDQ_OK;
}

/* A loss without its gradient; observers stay as they are. The tape is on all the same, for losses
 * that look at outputs of inner layers: the arena then keeps them. */
static double sdq__opt_forward(sdq_ctx *ctx, sdq_loss_fn fn, void *user, sdq_rng *rng,
                               size_t step) {
    const sdq_tensor *y;
    double loss = 0.0;
    sdq_tape_begin(ctx);
    ctx->replay = 1;
    y = fn(ctx, user, rng, step);
    if (y) loss = (double)sdq_f32(y)[0];
    else sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: the loss function gave no loss");
    ctx->replay = 0;
    sdq_tape_end(ctx);
    return loss;
}

/* ---- what went wrong ---- */

/* A loss that is not finite: run the micro-batch again and name the first layer whose output is
 * not; else the first trained tensor whose values are not. */
static sdq_status sdq__opt_explain(sdq_ctx *ctx, sdq__opt_loop *r, size_t micro) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const char *layer = NULL, *what = "no layer's output is: look at the loss function";
    sdq_optim *o = r->o;
    sdq_rng rng;
    size_t i;
    sdq__opt_rng(&rng, r->d->seed, o->step, micro);
    ctx->watch = &layer;
    (void)sdq__opt_forward(ctx, r->fn, r->user, &rng, o->step);
    ctx->watch = NULL;
    sdq_arena_release(ctx, mark);
    for (i = 0; !layer && i < o->count; i++)
        if (!sdq__ly_finite(sdq_f32(o->leaf[i].t), sdq_tensor_count(o->leaf[i].t)))
            break;
    if (layer) what = "the first layer with such an output is ";
    else if (i < o->count) { what = "already so are values of "; layer = o->leaf[i].name; }
    return sdq__fail(ctx, SDQ_ERR_NUMERIC, "training: the loss of step %zu is not finite (%s%s);"
                     " the last checkpoint is good, lower the learning rate",
                     o->step, what, layer ? layer : "");
}

/* A loss far above its running mean: the largest gradient tells where. */
static sdq_status sdq__opt_exploded(sdq_ctx *ctx, const sdq_optim *o, double loss) {
    double most = -1.0;
    const char *name = "";
    size_t i, j;
    for (i = 0; i < o->count; i++) {
        const float *g = o->leaf[i].t->grad;
        const size_t n = g ? sdq_tensor_count(o->leaf[i].t) : 0;
        double sum = 0.0;
        for (j = 0; j < n; j++) sum += (double)g[j] * (double)g[j];
        if (!(sum <= most)) { most = sum; name = o->leaf[i].name; }
    }
    return sdq__fail(ctx, SDQ_ERR_NUMERIC, "training: the loss of step %zu is %g, its running mean"
                     " %g; the largest gradient, %g, is that of %s; the last checkpoint is good,"
                     " lower the learning rate", o->step, loss, o->mean, sqrt(most), name);
}

/* ---- a step ---- */

static sdq_status sdq__opt_micro(sdq_ctx *ctx, const sdq__opt_loop *r, sdq_rng *rng, float share,
                                 double *loss) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *y;
    sdq_tape_begin(ctx);
    y = r->fn(ctx, r->user, rng, r->o->step);
    if (y) {
        *loss = (double)(sdq_f32(y)[0] * share);
        if (share != 1.0f) y = sdq_scale(ctx, y, share);
        (void)sdq_backward(ctx, y);
    } else {    /* says nothing if an op has told its reason */
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: the loss function gave no loss");
    }
    sdq_tape_end(ctx);
    sdq_arena_release(ctx, mark);
    return ctx->status;
}

static int sdq__opt_real(double x) { return x > -1e30 && x < 1e30; }

/* Loss and parts of the micro-batches of this process: value[micro-batch][SDQ__FIT_VALUES]. */
enum { SDQ__FIT_VALUES = SDQ_FIT_PARTS + 1 };
static sdq_status sdq__opt_micros(sdq_ctx *ctx, sdq__opt_loop *r, double *value) {
    const size_t all = r->micros * r->ranks;
    sdq__notes *n = &r->notes;
    size_t m;
    n->share = 1.0 / (double)all;
    for (m = r->rank; m < all && ctx->status == SDQ_OK; m += r->ranks) {
        double *v = value + m * SDQ__FIT_VALUES;
        sdq_rng rng;
        sdq__opt_rng(&rng, r->d->seed, r->o->step, m);
        memset(n->sum, 0, sizeof n->sum);
        ctx->notes = n;
        (void)sdq__opt_micro(ctx, r, &rng, 1.0f / (float)all, &v[0]);
        ctx->notes = NULL;
        memcpy(v + 1, n->sum, sizeof n->sum);
    }
    return ctx->status;
}

/* The gradient of all micro-batches of all processes; the mean of their losses to info. */
static sdq_status sdq__opt_gradient(sdq_ctx *ctx, sdq__opt_loop *r) {
    const size_t all = r->micros * r->ranks, n = all * SDQ__FIT_VALUES;
    const sdq_mark mark = sdq_arena_mark(ctx);
    double *value = SDQ__PUSH_N(ctx, double, n), sum[SDQ__FIT_VALUES] = {0.0};
    size_t i, bad = all;
    if (!value) return ctx->status;
    for (i = 0; i < n; i++) value[i] = 0.0;
    if (sdq__opt_micros(ctx, r, value) == SDQ_OK)
        (void)sdq__opt_share(ctx, r->d->group, "the loss", value, n);
    for (i = 0; i < n; i++) sum[i % SDQ__FIT_VALUES] += value[i];
    for (i = all; i-- > 0;)
        if (!sdq__opt_real(value[i * SDQ__FIT_VALUES])) bad = i;        /* the first of them */
    sdq_arena_release(ctx, mark);
    if (ctx->status != SDQ_OK) return ctx->status;
    memcpy(r->info.part_loss, sum + 1, sizeof r->info.part_loss);
    memcpy(r->info.part, r->notes.name, sizeof r->notes.name);
    r->info.parts = r->notes.n;
    r->info.loss = sum[0];
    if (bad < all && bad % r->ranks == r->rank) return sdq__opt_explain(ctx, r, bad);
    if (bad < all)
        return sdq__fail(ctx, SDQ_ERR_NUMERIC, "training: the loss of step %zu is not finite in"
                         " process %zu; the last checkpoint is good", r->o->step, bad % r->ranks);
    return sdq__opt_reduce_gradients(ctx, r->d->group, r->o);
}

/* After ten steps a loss is compared with the mean over about the last hundred. */
static sdq_status sdq__opt_watch_loss(sdq_ctx *ctx, const sdq__opt_loop *r) {
    const sdq_optim *o = r->o;
    const double most = r->d->explode > 0.0 ? r->d->explode : 1000.0, loss = r->info.loss;
    if (o->step >= 10 && o->mean > 0.0 && loss > most * o->mean)
        return sdq__opt_exploded(ctx, o, loss);
    return SDQ_OK;
}

/* Mean loss of the held-out batches, always the same ones, without gradients and observing. */
static sdq_status sdq__opt_validate(sdq_ctx *ctx, sdq__opt_loop *r) {
    const sdq_fit_desc *d = r->d;
    const size_t n = d->validate_batches ? d->validate_batches : 4;
    const sdq_mark start = sdq_arena_mark(ctx);
    double *loss = SDQ__PUSH_N(ctx, double, n), sum = 0.0;
    sdq_optim *o = r->o;
    size_t i;
    if (!loss) return ctx->status;
    for (i = 0; i < n; i++) loss[i] = 0.0;
    sdq_optim_swap_ema(o);
    for (i = r->rank; i < n && ctx->status == SDQ_OK; i += r->ranks) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        sdq_rng rng;
        sdq__opt_rng(&rng, ~d->seed, 0, i);     /* not a stream that training draws from */
        loss[i] = sdq__opt_forward(ctx, d->validate, d->validate_user, &rng, i) / (double)n;
        sdq_arena_release(ctx, mark);
    }
    sdq_optim_swap_ema(o);
    (void)sdq__opt_share(ctx, d->group, "the validation loss", loss, n);
    for (i = 0; i < n; i++) sum += loss[i];
    sdq_arena_release(ctx, start);
    if (ctx->status != SDQ_OK) return ctx->status;
    r->info.validated = 1;
    r->info.validation = sum;
    if (!(sum < o->best)) return SDQ_OK;
    o->best = sum;
    o->best_step = o->step;
    return d->best && r->rank == 0 ? sdq_optim_save_weights(ctx, o, d->best) : SDQ_OK;
}

/* Write the state; when that fails, say what is left. */
static sdq_status sdq__opt_checkpoint(sdq_ctx *ctx, const sdq__opt_loop *r) {
    const char *path = r->d->state;
    if (!path || r->rank != 0 || sdq_optim_save(ctx, r->o, path) == SDQ_OK) return ctx->status;
    if (sdq__io_exists(path)) {
        const size_t n = strlen(ctx->error);
        (void)snprintf(ctx->error + n, sizeof ctx->error - n,
                       "; the state of an earlier step is still there, the same command goes on"
                       " from it");
    }
    return ctx->status;
}

/* Tell the caller; what one process decides all of them do. */
static sdq_status sdq__opt_after(sdq_ctx *ctx, sdq__opt_loop *r, int *then) {
    const sdq_fit_desc *d = r->d;
    float want = 0.0f, save = 0.0f, both[2];
    r->info.step = r->o->step;
    r->info.steps = d->steps;
    r->info.grad_norm = r->o->norm;
    r->info.rate = r->o->rate;
    r->info.best = r->o->best;
    r->info.best_step = r->o->best_step;
    if (d->after) {
        const int go = d->after(d->user, &r->info);
        want = go == (int)SDQ_FIT_STOP ? 1.0f : 0.0f;
        save = go == (int)SDQ_FIT_SAVE ? 1.0f : 0.0f;
    }
    if (r->o->step && d->progress
        && d->progress(d->user, "train", r->o->step, d->steps, r->info.loss))
        want = 1.0f;
    both[0] = want; both[1] = save;
    SDQ__TRY(sdq__opt_reduce_one(ctx, d->group, SDQ_REDUCE_MAX, "the decision to go on", both, 2));
    *then = both[0] > 0.0f ? SDQ_FIT_STOP : both[1] > 0.0f ? SDQ_FIT_SAVE : SDQ_FIT_GO;
    return SDQ_OK;
}

static sdq_status sdq__opt_stopped(sdq_ctx *ctx, const sdq_optim *o) {
    return sdq__fail(ctx, SDQ_ERR_CANCELLED, "training: cancelled after step %zu", o->step);
}

/* From the state file; or write it at once: a disk that is full or a folder that is not there shows
 * before the work, and what was calibrated is kept. */
static sdq_status sdq__opt_resume(sdq_ctx *ctx, sdq__opt_loop *r) {
    const char *path = r->d->state;
    const int there = path && sdq__io_exists(path);
    if (there) SDQ__TRY(sdq_optim_load(ctx, r->o, path));
    SDQ__TRY(sdq__opt_agree(ctx, r->d->group, r->o));
    return there ? SDQ_OK : sdq__opt_checkpoint(ctx, r);
}

static sdq_status sdq__opt_begin(sdq_ctx *ctx, sdq__opt_loop *r) {
    const sdq_fit_desc *d = r->d;
    int then;
    if (ctx->status != SDQ_OK) return ctx->status;
    SDQ__TRY(sdq__opt_resume(ctx, r));
    if (d->best && r->o->best < HUGE_VAL && !sdq__io_exists(d->best)) r->o->best = HUGE_VAL;
    sdq_optim_zero(r->o);
    if (r->o->step > 0 || !d->validate_every || !d->validate) return SDQ_OK;
    SDQ__TRY(sdq__opt_validate(ctx, r));
    SDQ__TRY(sdq__opt_after(ctx, r, &then));
    return then == SDQ_FIT_STOP ? sdq__opt_stopped(ctx, r->o) : SDQ_OK;
}

SDQ_API sdq_status sdq_fit(sdq_ctx *ctx, sdq_optim *o, const sdq_fit_desc *d, sdq_loss_fn fn,
                           void *user) {
    sdq__opt_loop r;
    memset(&r, 0, sizeof r);
    r.o = o; r.d = d; r.fn = fn; r.user = user;
    r.micros = d->accumulate ? d->accumulate : 1;
    r.ranks = d->group && d->group->ranks > 1 ? d->group->ranks : 1;
    r.rank = r.ranks > 1 ? d->group->rank : 0;
    SDQ__TRY(sdq__opt_begin(ctx, &r));
    while (o->step < d->steps) {
        int then = SDQ_FIT_GO;
        SDQ__TRY(sdq__opt_gradient(ctx, &r));
        SDQ__TRY(sdq__opt_watch_loss(ctx, &r));
        SDQ__TRY(sdq_optim_step(ctx, o));
        o->mean += (r.info.loss - o->mean) / (double)(o->step < 100 ? o->step : 100);
        r.info.validated = 0;
        if (d->validate && d->validate_every
            && (o->step % d->validate_every == 0 || o->step == d->steps))
            SDQ__TRY(sdq__opt_validate(ctx, &r));
        SDQ__TRY(sdq__opt_after(ctx, &r, &then));
        if (then != SDQ_FIT_GO || o->step == d->steps
            || (d->save_every && o->step % d->save_every == 0))
            SDQ__TRY(sdq__opt_checkpoint(ctx, &r));
        if (then == SDQ_FIT_STOP) return sdq__opt_stopped(ctx, o);
    }
    return SDQ_OK;
}
/* ===========================================================================
 * >>single-file   a whole Stable Diffusion in one file, under the names of its first program
 *
 * Networks are written once, with diffusers' names and configuration (>>model). What web
 * interfaces save is one file with other names for the same arrays, and no configuration:
 *
 *   model.diffusion_model.   the UNet         first_stage_model.   the VAE
 *   cond_stage_model.transformer.  the text encoder of SD 1;  cond_stage_model.model.  of SD 2
 *
 * This section tells what a file is, writes the config.json that its names and shapes imply, and
 * finds the array that has a diffusers name: the loader asks for nothing else. Names are those of
 * CompVis/latent-diffusion, Stability-AI/stablediffusion and open_clip; the same map is in
 * diffusers' loaders/single_file_utils.py.
 *
 * What shapes do not tell is as in every published model: 32 groups, 8 heads in the UNet of SD 1,
 * heads of 64 channels in that of SD 2 and in text encoders, scaling factor 0.18215.
 * ======================================================================== */

enum { SDQ__SF_LEVELS = 8 };

/* Where the arrays of one network are. prefix NULL: a checkpoint with diffusers' own names. */
typedef struct sdq__sf_source {
    const sdq__st_set *set;
    const char *prefix;
    sdq_part part;
    int sd2, openclip;
    size_t levels, layers[SDQ__SF_LEVELS];
    size_t down[SDQ__SF_LEVELS], up[SDQ__SF_LEVELS];    /* numbers of the levels' first blocks */
} sdq__sf_source;

static const char sdq__sf_unet[] = "model.diffusion_model.";
static const char sdq__sf_vae[] = "first_stage_model.";
static const char sdq__sf_clip[] = "cond_stage_model.transformer.";
static const char sdq__sf_openclip[] = "cond_stage_model.model.";

/* The array of that name, which is put together like a printed line. */
SDQ__PRINTF(2, 3)
static const sdq_entry *sdq__sf_at(const sdq_file *f, const char *format, ...) {
    char name[256];
    va_list args;
    int n;
    va_start(args, format);
    n = vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return n > 0 && (size_t)n < sizeof name ? sdq_file_find(f, name) : NULL;
}

/* --- what a file is --- */

/* Some array has `text` in its name; at: 0 anywhere, 1 at the start. */
static int sdq__sf_any(const sdq_file *f, const char *text, int at_start) {
    const size_t n = strlen(text);
    size_t i;
    for (i = 0; i < f->count; i++) {
        const char *name = f->entries[i].name;
        if (at_start ? strncmp(name, text, n) == 0 : strstr(name, text) != NULL) return 1;
    }
    return 0;
}

static int sdq__sf_any_of(const sdq_file *f, const char *const *text, size_t n, int at_start) {
    size_t i;
    for (i = 0; i < n; i++)
        if (sdq__sf_any(f, text[i], at_start)) return 1;
    return 0;
}

/* An array of the first transformer that the UNet has: the middle's, or one on the way down. */
static const sdq_entry *sdq__sf_transformer(const sdq_file *f, const char *name) {
    const sdq_entry *e = sdq__sf_at(f, "%smiddle_block.1.%s", sdq__sf_unet, name);
    size_t i;
    for (i = 1; !e && i < 64; i++)
        e = sdq__sf_at(f, "%sinput_blocks.%zu.1.%s", sdq__sf_unet, i, name);
    return e;
}

/* The width of the text decides; widths of neither family go by what came with SD 2: projections
 * that are linear layers, and OpenCLIP. */
static int sdq__sf_is_sd2(const sdq_file *f) {
    const sdq_entry *k = sdq__sf_transformer(f, "transformer_blocks.0.attn2.to_k.weight");
    const sdq_entry *proj = sdq__sf_transformer(f, "proj_in.weight");
    const sdq_entry *token =
        sdq__sf_at(f, "%stext_model.embeddings.token_embedding.weight", sdq__sf_clip);
    const size_t width = k && k->rank == 2 ? k->dim[1] : token ? token->dim[1] : 0;
    if (width == 768 || width == 1024) return width == 1024;
    return proj ? proj->rank == 2 : sdq__sf_any(f, sdq__sf_openclip, 1);
}

static int sdq__sf_has(const sdq_file *f, sdq_part part) {
    if (part == SDQ_PART_UNET) return sdq__sf_at(f, "%sinput_blocks.0.0.weight", sdq__sf_unet) != 0;
    if (part == SDQ_PART_VAE) return sdq__sf_at(f, "%sdecoder.conv_in.weight", sdq__sf_vae) != 0;
    return sdq__sf_at(f, "%stoken_embedding.weight", sdq__sf_openclip)
        || sdq__sf_at(f, "%stext_model.embeddings.token_embedding.weight", sdq__sf_clip)
        || sdq__sf_at(f, "%sembeddings.token_embedding.weight", sdq__sf_clip);
}

/* What the UNet predicts, and how that is known. Nothing in the arrays tells; the number of
 * training steps is how diffusers recognizes the base model of SD 2. */
static sdq_prediction sdq__sf_prediction(const sdq_file *f, int sd2, const char **because) {
    const char *said = sdq_file_meta(f, "modelspec.prediction_type");
    const sdq_entry *step = sdq_file_find(f, "global_step");
    *because = "the file says so";
    if (said && strcmp(said, "v") == 0) return SDQ_PREDICT_V;
    if (said && strcmp(said, "epsilon") == 0) return SDQ_PREDICT_EPSILON;
    *because = sd2 ? "as the models of 768 pixels; those of 512 predict epsilon"
                   : "as all models of SD 1";
    if (!sd2) return SDQ_PREDICT_EPSILON;
    if (!step || step->dtype >= SDQ_DTYPE_COUNT || sdq_entry_count(step) != 1
        || sdq__st_element(step->dtype, (const unsigned char *)step->data) != 875000.0)
        return SDQ_PREDICT_V;
    *because = "its global_step is that of the base model";
    return SDQ_PREDICT_EPSILON;
}

/* One network, or something that belongs to one, by itself. */
static sdq_file_kind sdq__sf_alone(const sdq_file *f) {
    if (sdq__sf_at(f, "conv_in.weight") && sdq__sf_any(f, "time_emb_proj", 0))
        return SDQ_FILE_UNET;
    if (sdq__sf_at(f, "input_blocks.0.0.weight")) return SDQ_FILE_UNET;
    if (sdq__sf_at(f, "decoder.conv_in.weight")) return SDQ_FILE_VAE;
    if (sdq__sf_any(f, "text_model.", 1) || sdq__sf_at(f, "token_embedding.weight"))
        return SDQ_FILE_TEXT;
    if (f->count <= 4 && (sdq__sf_at(f, "emb_params") || sdq__sf_at(f, "clip_l")))
        return SDQ_FILE_EMBEDDING;
    return SDQ_FILE_UNKNOWN;
}

static sdq_file_kind sdq__sf_kind(const sdq_file *f) {
    static const char *const lora[] = {"lora_down", "lora_up", ".lora_A.", ".lora_B.", ".lora.down",
                                       ".lora.up", "hada_w1", "lokr_w1"};
    static const char *const control[] = {"control_model.", "controlnet_", "input_hint_block."};
    static const char *const other[] = {
        "model.diffusion_model.joint_blocks.", "model.diffusion_model.double_blocks.",
        "joint_blocks.", "double_blocks.", "model.diffusion_model.label_emb.",
        "text_encoders.", "transformer_blocks."};
    const sdq_entry *in = sdq__sf_at(f, "%sinput_blocks.0.0.weight", sdq__sf_unet);
    const sdq_entry *k = sdq__sf_transformer(f, "transformer_blocks.0.attn2.to_k.weight");
    const int unet = sdq__sf_has(f, SDQ_PART_UNET), vae = sdq__sf_has(f, SDQ_PART_VAE);
    const int text = sdq__sf_has(f, SDQ_PART_TEXT);
    if (sdq_file_meta(f, "sdq.config")) return SDQ_FILE_INT8;
    if (sdq__sf_any_of(f, lora, SDQ__COUNT(lora), 0)) return SDQ_FILE_LORA;
    if (sdq__sf_any_of(f, control, SDQ__COUNT(control), 1)) return SDQ_FILE_CONTROLNET;
    if (sdq__sf_any(f, "conditioner.embedders.", 1) || sdq__sf_any(f, "add_embedding.", 1)
        || (k && (k->dim[1] == 2048 || k->dim[1] == 1280))) return SDQ_FILE_SDXL;
    if (sdq__sf_any_of(f, other, SDQ__COUNT(other), 1)) return SDQ_FILE_OTHER;
    if (in && in->dim[1] == 9) return SDQ_FILE_INPAINT;
    if (in && in->dim[1] == 8) return SDQ_FILE_EDIT;
    if (unet && vae && text) return sdq__sf_is_sd2(f) ? SDQ_FILE_SD2 : SDQ_FILE_SD1;
    if (unet + vae + text > 1) return SDQ_FILE_PARTS;
    return unet ? SDQ_FILE_UNET : vae ? SDQ_FILE_VAE : text ? SDQ_FILE_TEXT : sdq__sf_alone(f);
}

/* The type of most bytes. */
static sdq_dtype sdq__sf_dtype(const sdq_file *f) {
    size_t bytes[SDQ_DTYPE_COUNT + 1] = {0}, i, best = 0;
    for (i = 0; i < f->count; i++) bytes[f->entries[i].dtype] += f->entries[i].bytes;
    for (i = 1; i <= SDQ_DTYPE_COUNT; i++)
        if (bytes[i] > bytes[best]) best = i;
    return (sdq_dtype)best;
}

SDQ_API sdq_file_info sdq_file_describe(const sdq_file *f) {
    static const char *const title[SDQ_FILE_COUNT] = {
        "a safetensors file that sdq does not know", "Stable Diffusion 1 in a single file",
        "Stable Diffusion 2 in a single file", "an inpainting model (9 input channels)",
        "an editing model such as InstructPix2Pix (8 input channels)", "Stable Diffusion XL",
        "a network of another family (SD 3, Flux, unCLIP, ..)",
        "a part of Stable Diffusion in a single file", "a LoRA, changes to the weights of a model",
        "a ControlNet", "an embedding (textual inversion)", "a UNet alone", "a VAE alone",
        "a text encoder alone", "a UNet quantized to int8 by sdq"};
    sdq_file_info info;
    int i;
    memset(&info, 0, sizeof info);
    info.kind = sdq__sf_kind(f);
    info.title = title[info.kind];
    info.dtype = sdq__sf_dtype(f);
    for (i = SDQ_PART_NONE + 1; i < SDQ_PART_COUNT; i++)
        info.part[i] = sdq__sf_has(f, (sdq_part)i);
    info.because = "";
    if (info.kind == SDQ_FILE_SD1 || info.kind == SDQ_FILE_SD2)
        info.prediction = sdq__sf_prediction(f, info.kind == SDQ_FILE_SD2, &info.because);
    return info;
}

/* --- names --- */

/* '#' in the pattern stands for a number. The place behind the pattern, or NULL. */
static const char *sdq__sf_match(const char *name, const char *pattern, size_t *number) {
    for (; *pattern; pattern++) {
        if (*pattern != '#') {
            if (*name++ != *pattern) return NULL;
            continue;
        }
        if (*name < '0' || *name > '9') return NULL;
        for (*number = 0; *name >= '0' && *name <= '9' && *number < 10000; name++)
            *number = *number * 10 + (size_t)(*name - '0');
        number++;
    }
    return name;
}

/* The first pair whose left side begins `name`: its right side and the rest, else name itself. */
static const char *sdq__sf_swap(const char *const (*pair)[2], size_t n, const char *name,
                                char *buf, size_t size) {
    size_t i;
    for (i = 0; i < n; i++) {
        const size_t len = strlen(pair[i][0]);
        if (strncmp(name, pair[i][0], len) != 0) continue;
        (void)snprintf(buf, size, "%s%s", pair[i][1], name + len);
        return buf;
    }
    return name;
}

/* UNet: blocks are numbered through, a resampling layer counts as one on the way down and belongs
 * to the last one on the way up. */
static void sdq__sf_unet_name(const sdq__sf_source *s, const char *name, char *out, size_t size) {
    static const char *const resnet[][2] = {
        {"norm1.", "in_layers.0."}, {"conv1.", "in_layers.2."}, {"time_emb_proj.", "emb_layers.1."},
        {"norm2.", "out_layers.0."}, {"conv2.", "out_layers.3."},
        {"conv_shortcut.", "skip_connection."}};
    static const char *const outer[][2] = {
        {"conv_in.", "input_blocks.0.0."}, {"conv_norm_out.", "out.0."}, {"conv_out.", "out.2."},
        {"time_embedding.linear_1.", "time_embed.0."},
        {"time_embedding.linear_2.", "time_embed.2."}};
    char buf[256];
    const char *rest;
    size_t n[2] = {0, 0};
#define SDQ__SF_INNER sdq__sf_swap(resnet, SDQ__COUNT(resnet), rest, buf, sizeof buf)
#define SDQ__SF_LEVEL (n[0] < s->levels ? n[0] : 0)
    if ((rest = sdq__sf_match(name, "down_blocks.#.resnets.#.", n)) != NULL)
        (void)snprintf(out, size, "input_blocks.%zu.0.%s", s->down[SDQ__SF_LEVEL] + n[1],
                       SDQ__SF_INNER);
    else if ((rest = sdq__sf_match(name, "down_blocks.#.attentions.#.", n)) != NULL)
        (void)snprintf(out, size, "input_blocks.%zu.1.%s", s->down[SDQ__SF_LEVEL] + n[1], rest);
    else if ((rest = sdq__sf_match(name, "down_blocks.#.downsamplers.0.conv.", n)) != NULL)
        (void)snprintf(out, size, "input_blocks.%zu.0.op.%s",
                       s->down[SDQ__SF_LEVEL] + s->layers[SDQ__SF_LEVEL], rest);
    else if ((rest = sdq__sf_match(name, "mid_block.resnets.#.", n)) != NULL)
        (void)snprintf(out, size, "middle_block.%zu.%s", 2 * n[0], SDQ__SF_INNER);
    else if ((rest = sdq__sf_match(name, "mid_block.attentions.0.", n)) != NULL)
        (void)snprintf(out, size, "middle_block.1.%s", rest);
    else if ((rest = sdq__sf_match(name, "up_blocks.#.resnets.#.", n)) != NULL)
        (void)snprintf(out, size, "output_blocks.%zu.0.%s", s->up[SDQ__SF_LEVEL] + n[1],
                       SDQ__SF_INNER);
    else if ((rest = sdq__sf_match(name, "up_blocks.#.attentions.#.", n)) != NULL)
        (void)snprintf(out, size, "output_blocks.%zu.1.%s", s->up[SDQ__SF_LEVEL] + n[1], rest);
    else if ((rest = sdq__sf_match(name, "up_blocks.#.upsamplers.0.conv.", n)) != NULL) {
        const size_t last = s->up[SDQ__SF_LEVEL] + s->layers[s->levels - 1 - SDQ__SF_LEVEL];
        const int attends = sdq__sf_at(s->set->files[0], "%soutput_blocks.%zu.1.norm.weight",
                                       s->prefix, last) != NULL;
        (void)snprintf(out, size, "output_blocks.%zu.%d.conv.%s", last, attends ? 2 : 1, rest);
    } else (void)snprintf(out, size, "%s", sdq__sf_swap(outer, SDQ__COUNT(outer), name, buf,
                                                        sizeof buf));
#undef SDQ__SF_INNER
#undef SDQ__SF_LEVEL
}

/* VAE: the decoder's levels are numbered from the last to the first. */
static void sdq__sf_vae_name(const sdq__sf_source *s, const char *name, char *out, size_t size) {
    static const char *const inner[][2] = {
        {"conv_shortcut.", "nin_shortcut."}, {"group_norm.", "norm."}, {"to_q.", "q."},
        {"to_k.", "k."}, {"to_v.", "v."}, {"to_out.0.", "proj_out."},
        {"conv_norm_out.", "norm_out."}};
    char buf[256];
    const char *half = strncmp(name, "encoder.", 8) == 0 ? "encoder."
                     : strncmp(name, "decoder.", 8) == 0 ? "decoder." : "", *rest;
    size_t n[2] = {0, 0};
    name += strlen(half);
#define SDQ__SF_INNER sdq__sf_swap(inner, SDQ__COUNT(inner), rest, buf, sizeof buf)
    if ((rest = sdq__sf_match(name, "down_blocks.#.resnets.#.", n)) != NULL)
        (void)snprintf(out, size, "%sdown.%zu.block.%zu.%s", half, n[0], n[1], SDQ__SF_INNER);
    else if ((rest = sdq__sf_match(name, "down_blocks.#.downsamplers.0.", n)) != NULL)
        (void)snprintf(out, size, "%sdown.%zu.downsample.%s", half, n[0], rest);
    else if ((rest = sdq__sf_match(name, "up_blocks.#.resnets.#.", n)) != NULL)
        (void)snprintf(out, size, "%sup.%zu.block.%zu.%s", half, s->levels - 1 - n[0], n[1],
                       SDQ__SF_INNER);
    else if ((rest = sdq__sf_match(name, "up_blocks.#.upsamplers.0.", n)) != NULL)
        (void)snprintf(out, size, "%sup.%zu.upsample.%s", half, s->levels - 1 - n[0], rest);
    else if ((rest = sdq__sf_match(name, "mid_block.resnets.#.", n)) != NULL)
        (void)snprintf(out, size, "%smid.block_%zu.%s", half, n[0] + 1, SDQ__SF_INNER);
    else if ((rest = sdq__sf_match(name, "mid_block.attentions.0.", n)) != NULL)
        (void)snprintf(out, size, "%smid.attn_1.%s", half, SDQ__SF_INNER);
    else {
        rest = name;
        (void)snprintf(out, size, "%s%s", half, SDQ__SF_INNER);
    }
#undef SDQ__SF_INNER
}

/* SD 1 has transformers' names; some programs lost "text_model." on the way. SD 2 has OpenCLIP's,
 * where q, k and v are thirds of one array: *third is 1..3, 0 for a whole array. */
static void sdq__sf_text_name(const sdq__sf_source *s, const char *name, char *out, size_t size,
                              int *third) {
    static const char *const outer[][2] = {
        {"text_model.embeddings.token_embedding.", "token_embedding."},
        {"text_model.embeddings.position_embedding.weight", "positional_embedding"},
        {"text_model.final_layer_norm.", "ln_final."}};
    static const char *const inner[][2] = {
        {"layer_norm1.", "ln_1."}, {"layer_norm2.", "ln_2."}, {"mlp.fc1.", "mlp.c_fc."},
        {"mlp.fc2.", "mlp.c_proj."}, {"self_attn.q_proj.", "attn.in_proj_"},
        {"self_attn.k_proj.", "attn.in_proj_"}, {"self_attn.v_proj.", "attn.in_proj_"},
        {"self_attn.out_proj.", "attn.out_proj."}};
    char buf[256];
    const char *rest;
    size_t n = 0;
    if (!s->openclip) {
        const int lost = sdq__io_starts(name, "text_model.")
            && !sdq__sf_at(s->set->files[0], "%stext_model.embeddings.token_embedding.weight",
                           s->prefix);
        (void)snprintf(out, size, "%s", lost ? name + 11 : name);
    } else if ((rest = sdq__sf_match(name, "text_model.encoder.layers.#.", &n)) != NULL) {
        const char *to = sdq__sf_swap(inner, SDQ__COUNT(inner), rest, buf, sizeof buf);
        (void)snprintf(out, size, "transformer.resblocks.%zu.%s", n, to);
        if (strncmp(to, "attn.in_proj_", 13) == 0)
            *third = rest[10] == 'q' ? 1 : rest[10] == 'k' ? 2 : 3;     /* self_attn.q_proj */
    } else (void)snprintf(out, size, "%s", sdq__sf_swap(outer, SDQ__COUNT(outer), name, buf,
                                                        sizeof buf));
}

/* The name that a parameter has in the file. */
static void sdq__sf_name(const sdq__sf_source *s, const char *name, char *out, size_t size,
                         int *third) {
    const size_t n = s->prefix ? strlen(s->prefix) : 0;
    *third = 0;
    (void)snprintf(out, size, "%s", s->prefix ? s->prefix : name);
    if (!s->prefix || n >= size) return;
    if (s->part == SDQ_PART_UNET) sdq__sf_unet_name(s, name, out + n, size - n);
    else if (s->part == SDQ_PART_VAE) sdq__sf_vae_name(s, name, out + n, size - n);
    else sdq__sf_text_name(s, name, out + n, size - n, third);
}

/* The array of a parameter with that diffusers name; 0 when there is none. */
static int sdq__sf_find(const sdq__sf_source *s, const char *name, sdq_entry *out) {
    char own[320];
    int third;
    const sdq_entry *e;
    sdq__sf_name(s, name, own, sizeof own, &third);
    e = sdq__st_set_find(s->set, own);
    if (!e) return 0;
    *out = *e;
    if (third && e->rank > 0 && e->dim[0] % 3 == 0) {   /* else the shape will be found wrong */
        out->dim[0] /= 3;
        out->bytes /= 3;
        out->data = (const char *)e->data + out->bytes * (size_t)(third - 1);
    }
    return 1;
}

/* An array that no network needs: it belongs to another part or to training, or it is a table of
 * numbers 0, 1, 2, ... SD 2 uses the last but one layer of its text encoder, and a folder's
 * config.json may ask for fewer layers than there are. */
static int sdq__sf_dead(const sdq__sf_source *s, const char *name) {
    static const char *const other[] = {"text_projection", "visual_projection", "vision_model.",
                                        "visual."};
    size_t n = 0, i;
    if (s->prefix && strncmp(name, s->prefix, strlen(s->prefix)) != 0) return 1;
    name += s->prefix ? strlen(s->prefix) : 0;
    if (s->part == SDQ_PART_VAE)
        return s->prefix && (sdq__io_starts(name, "loss.") || sdq__io_starts(name, "model_ema."));
    if (s->part != SDQ_PART_TEXT) return 0;
    if (sdq__io_ends(name, "embeddings.position_ids") || !strcmp(name, "logit_scale")
        || !strcmp(name, "attn_mask")) return 1;
    return (sdq__sf_match(name, s->openclip ? "transformer.resblocks.#."
                                            : "text_model.encoder.layers.#.", &n)
            || (s->prefix && sdq__sf_match(name, "encoder.layers.#.", &n)))
        && n >= s->layers[0];
}

/* --- configuration --- */

/* A dimension of an array that the configuration is read from: `name` behind the prefix. */
static size_t sdq__sf_need(sdq_ctx *ctx, const sdq__sf_source *s, const char *name, int i) {
    const sdq_entry *e = sdq__sf_at(s->set->files[0], "%s%s", s->prefix, name);
    if (e) return e->dim[i];
    sdq__fail(ctx, SDQ_ERR_MISSING, "%s: %s%s is missing; is the file complete?", s->set->path,
              s->prefix, name);
    return 0;
}

/* "key": [a, b, ..], */
static void sdq__sf_put_sizes(sdq_ctx *ctx, sdq__str *t, const char *key, const size_t *v,
                              size_t n) {
    size_t i;
    sdq__str_format(ctx, t, "  \"%s\": [", key);
    for (i = 0; i < n; i++) sdq__str_format(ctx, t, "%s%zu", i ? ", " : "", v[i]);
    sdq__str_format(ctx, t, "],\n");
}
/* One size, when that is all there is to say. */
static void sdq__sf_put_same(sdq_ctx *ctx, sdq__str *t, const char *key, const size_t *v,
                             size_t n) {
    size_t i = 1;
    while (i < n && v[i] == v[0]) i++;
    if (i < n) sdq__sf_put_sizes(ctx, t, key, v, n);
    else sdq__str_format(ctx, t, "  \"%s\": %zu,\n", key, v[0]);
}
static void sdq__sf_put_kinds(sdq_ctx *ctx, sdq__str *t, const char *key, const char *no,
                              const char *yes, const int *which, size_t n) {
    size_t i;
    sdq__str_format(ctx, t, "  \"%s\": [", key);
    for (i = 0; i < n; i++)
        sdq__str_format(ctx, t, "%s\"%s\"", i ? ", " : "", which && which[i] ? yes : no);
    sdq__str_format(ctx, t, "],\n");
}

typedef struct sdq__sf_plan {
    size_t channels[SDQ__SF_LEVELS], depth[SDQ__SF_LEVELS];
    int cross_down[SDQ__SF_LEVELS], cross_up[SDQ__SF_LEVELS];
} sdq__sf_plan;

/* The transformer blocks under that name. */
static size_t sdq__sf_depth(const sdq_file *f, const char *block, size_t i) {
    size_t n = 0;
    while (n < 1000 && sdq__sf_at(f, "%s%s.%zu.1.transformer_blocks.%zu.norm1.weight",
                                  sdq__sf_unet, block, i, n)) n++;
    return n;
}

/* Walk down the UNet's blocks: a resampling convolution ends a level. 0: more levels than 8. */
static int sdq__sf_scan_unet(sdq__sf_source *s, sdq__sf_plan *p) {
    const sdq_file *f = s->set->files[0];
    const sdq_entry *e;
    size_t n, i = 0, at = 0;
    s->down[0] = 1;
    for (n = 1; n <= f->count; n++) {
        if (sdq__sf_at(f, "%sinput_blocks.%zu.0.op.weight", s->prefix, n)) {
            if (++i == SDQ__SF_LEVELS) return 0;
            s->down[i] = n + 1;
            continue;
        }
        e = sdq__sf_at(f, "%sinput_blocks.%zu.0.in_layers.2.weight", s->prefix, n);
        if (!e) break;
        p->channels[i] = e->dim[0];
        s->layers[i]++;
        if (sdq__sf_at(f, "%sinput_blocks.%zu.1.norm.weight", s->prefix, n)) {
            p->cross_down[i] = 1;
            p->depth[i] = sdq__sf_depth(f, "input_blocks", n);
        }
    }
    s->levels = i + 1;
    for (n = 0; n < s->levels; n++) {
        s->up[n] = at;
        p->cross_up[n] =
            sdq__sf_at(f, "%soutput_blocks.%zu.1.norm.weight", s->prefix, at) != NULL;
        at += s->layers[i - n] + 1;
    }
    return 1;
}

static size_t sdq__sf_vae_levels(const sdq_file *f) {
    size_t n = 0;
    while (n <= SDQ__SF_LEVELS
           && sdq__sf_at(f, "%sencoder.down.%zu.block.0.norm1.weight", sdq__sf_vae, n)) n++;
    return n;
}

/* Pixels of the pictures that the model was made for. */
static size_t sdq__sf_pixels(const sdq_file *f, int sd2) {
    const char *because;
    return sd2 && sdq__sf_prediction(f, sd2, &because) == SDQ_PREDICT_V ? 768 : 512;
}

static void sdq__sf_put_heads(sdq_ctx *ctx, sdq__str *t, const sdq__sf_source *s,
                              const sdq__sf_plan *p) {
    size_t heads[SDQ__SF_LEVELS], i;
    for (i = 0; i < s->levels; i++) {
        heads[i] = s->sd2 ? sdq__u_max(p->channels[i] / 64, 1) : 8;
        if (s->sd2 && p->channels[i] > 64 && p->channels[i] % 64)
            sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: the UNet has a level of %zu channels, but SD "
                      "2 has heads of 64; save the model as a diffusers folder, whose config.json "
                      "says how many heads there are", s->set->path, p->channels[i]);
    }
    sdq__sf_put_same(ctx, t, "attention_head_dim", heads, s->levels);
}

static void sdq__sf_unet_config(sdq_ctx *ctx, sdq__sf_source *s, sdq__str *t) {
    const sdq_file *f = s->set->files[0];
    const size_t vae = sdq__sf_vae_levels(f), shrink = (size_t)1 << (vae ? vae - 1 : 3);
    const sdq_entry *proj = sdq__sf_transformer(f, "proj_in.weight");
    const sdq_entry *key = sdq__sf_transformer(f, "transformer_blocks.0.attn2.to_k.weight");
    const int mid = sdq__sf_at(f, "%smiddle_block.0.in_layers.0.weight", s->prefix) != NULL;
    size_t i, time = sdq__sf_need(ctx, s, "time_embed.0.weight", 0);
    sdq__sf_plan p;
    memset(&p, 0, sizeof p);
    if (!sdq__sf_scan_unet(s, &p)) {
        sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: the UNet has more than 8 levels", s->set->path);
        return;
    }
    if (!p.cross_down[s->levels - 1]) p.depth[s->levels - 1] = sdq__sf_depth(f, "middle_block", 1);
    for (i = 0; i < s->levels; i++) {
        p.depth[i] = sdq__u_max(p.depth[i], 1);
        if (s->layers[i] == 0)
            sdq__fail(ctx, SDQ_ERR_MISSING, "%s: %sinput_blocks.%zu.0.in_layers.2.weight is "
                      "missing; is the file complete?", s->set->path, s->prefix, s->down[i]);
    }
    sdq__str_format(ctx, t, "{\n  \"_class_name\": \"UNet2DConditionModel\",\n");
    sdq__str_format(ctx, t, "  \"sample_size\": %zu,\n", sdq__sf_pixels(f, s->sd2) / shrink);
    sdq__str_format(ctx, t, "  \"in_channels\": %zu,\n  \"out_channels\": %zu,\n",
                    sdq__sf_need(ctx, s, "input_blocks.0.0.weight", 1),
                    sdq__sf_need(ctx, s, "out.2.weight", 0));
    sdq__sf_put_sizes(ctx, t, "block_out_channels", p.channels, s->levels);
    sdq__sf_put_same(ctx, t, "layers_per_block", s->layers, s->levels);
    sdq__sf_put_same(ctx, t, "transformer_layers_per_block", p.depth, s->levels);
    sdq__sf_put_kinds(ctx, t, "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D",
                      p.cross_down, s->levels);
    sdq__sf_put_kinds(ctx, t, "up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", p.cross_up,
                      s->levels);
    sdq__sf_put_heads(ctx, t, s, &p);
    if (!mid) sdq__str_format(ctx, t, "  \"mid_block_type\": null,\n");
    if (time != 4 * p.channels[0])
        sdq__str_format(ctx, t, "  \"time_embedding_dim\": %zu,\n", time);
    sdq__str_format(ctx, t, "  \"cross_attention_dim\": %zu,\n  \"use_linear_projection\": %s\n}\n",
                    key ? key->dim[1] : 0, proj && proj->rank == 2 ? "true" : "false");
}

static void sdq__sf_vae_config(sdq_ctx *ctx, sdq__sf_source *s, sdq__str *t) {
    const sdq_file *f = s->set->files[0];
    size_t channels[SDQ__SF_LEVELS], layers = 0, i;
    s->levels = sdq__sf_vae_levels(f);
    if (s->levels > SDQ__SF_LEVELS) {
        sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: the VAE has more than 8 levels", s->set->path);
        return;
    }
    if (s->levels == 0) (void)sdq__sf_need(ctx, s, "encoder.down.0.block.0.norm1.weight", 0);
    for (i = 0; i < s->levels; i++) {
        char name[48];
        (void)snprintf(name, sizeof name, "encoder.down.%zu.block.0.conv1.weight", i);
        channels[i] = sdq__sf_need(ctx, s, name, 0);
    }
    while (layers < 64
           && sdq__sf_at(f, "%sencoder.down.0.block.%zu.norm1.weight", s->prefix, layers)) layers++;
    sdq__str_format(ctx, t, "{\n  \"_class_name\": \"AutoencoderKL\",\n");
    sdq__str_format(ctx, t, "  \"in_channels\": %zu,\n  \"out_channels\": %zu,\n",
                    sdq__sf_need(ctx, s, "encoder.conv_in.weight", 1),
                    sdq__sf_need(ctx, s, "decoder.conv_out.weight", 0));
    sdq__sf_put_sizes(ctx, t, "block_out_channels", channels, s->levels);
    sdq__sf_put_kinds(ctx, t, "down_block_types", "DownEncoderBlock2D", "", NULL, s->levels);
    sdq__sf_put_kinds(ctx, t, "up_block_types", "UpDecoderBlock2D", "", NULL, s->levels);
    sdq__str_format(ctx, t, "  \"layers_per_block\": %zu,\n  \"latent_channels\": %zu,\n", layers,
                    sdq__sf_need(ctx, s, "decoder.conv_in.weight", 1));
    if (!sdq__sf_at(f, "%squant_conv.weight", s->prefix))
        sdq__str_format(ctx, t, "  \"use_quant_conv\": false,\n");
    if (!sdq__sf_at(f, "%spost_quant_conv.weight", s->prefix))
        sdq__str_format(ctx, t, "  \"use_post_quant_conv\": false,\n");
    if (!sdq__sf_at(f, "%sdecoder.mid.attn_1.norm.weight", s->prefix))
        sdq__str_format(ctx, t, "  \"mid_block_add_attention\": false,\n");
    sdq__str_format(ctx, t, "  \"sample_size\": %zu,\n  \"scaling_factor\": 0.18215\n}\n",
                    sdq__sf_pixels(f, s->sd2));
}

/* The same of the text encoder, by its transformers name. */
static size_t sdq__sf_text_dim(sdq_ctx *ctx, const sdq__sf_source *s, const char *name, int i) {
    char own[320];
    int third;
    sdq__sf_name(s, name, own, sizeof own, &third);
    return sdq__sf_need(ctx, s, own + strlen(s->prefix), i);
}

static void sdq__sf_text_config(sdq_ctx *ctx, sdq__sf_source *s, sdq__str *t) {
    static const char token[] = "text_model.embeddings.token_embedding.weight";
    const size_t width = sdq__sf_text_dim(ctx, s, token, 1);
    size_t layers = 0;
    char name[96];
    sdq_entry e;
    do {
        (void)snprintf(name, sizeof name, "text_model.encoder.layers.%zu.layer_norm1.weight",
                       layers++);
    } while (layers < 1000 && sdq__sf_find(s, name, &e));
    layers--;
    if (s->openclip)        /* ViT-H without its last layer, which some programs do not save */
        layers = width == 1024 && layers <= 24 ? 23 : layers ? layers - 1 : 0;
    s->layers[0] = layers;
    sdq__str_format(ctx, t, "{\n  \"architectures\": [\"CLIPTextModel\"],\n"
                    "  \"model_type\": \"clip_text_model\",\n  \"vocab_size\": %zu,\n"
                    "  \"hidden_size\": %zu,\n  \"intermediate_size\": %zu,\n",
                    sdq__sf_text_dim(ctx, s, token, 0), width,
                    sdq__sf_text_dim(ctx, s, "text_model.encoder.layers.0.mlp.fc1.weight", 0));
    sdq__str_format(ctx, t, "  \"num_hidden_layers\": %zu,\n  \"num_attention_heads\": %zu,\n"
                    "  \"max_position_embeddings\": %zu,\n  \"hidden_act\": \"%s\"\n}\n", layers,
                    sdq__u_max(width / 64, 1),
                    sdq__sf_text_dim(ctx, s, "text_model.embeddings.position_embedding.weight", 0),
                    s->sd2 ? "gelu" : "quick_gelu");
}

/* --- a part of a single file as a source of arrays --- */

static sdq_status sdq__sf_refuse(sdq_ctx *ctx, const char *path, const sdq_file_info *info,
                                 const char *wanted) {
    char has[96] = "";
    int i;
    for (i = SDQ_PART_NONE + 1; i < SDQ_PART_COUNT && info->kind == SDQ_FILE_PARTS; i++)
        if (!info->part[i])
            (void)snprintf(has, sizeof has, " without its %s", i == SDQ_PART_TEXT ? "text encoder"
                           : i == SDQ_PART_UNET ? "UNet" : "VAE");
    return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: is %s%s; %s", path, info->title, has, wanted);
}

/* set: of one file. config receives the text that stands for config.json. */
static sdq_status sdq__sf_open(sdq_ctx *ctx, const sdq__st_set *set, sdq_part part,
                               sdq__sf_source *s, sdq__str *config) {
    const sdq_file *f = set->files[0];
    const sdq_file_info info = sdq_file_describe(f);
    memset(s, 0, sizeof *s);
    s->set = set;
    s->part = part;
    if (!info.part[part] || info.kind == SDQ_FILE_SDXL || info.kind == SDQ_FILE_OTHER)
        return sdq__sf_refuse(ctx, set->path, &info, part == SDQ_PART_UNET
            ? "needed is a single file of SD 1 or 2 that holds a UNet, or a diffusers folder"
            : part == SDQ_PART_VAE
            ? "needed is a single file of SD 1 or 2 that holds a VAE, or a diffusers folder"
            : "needed is a single file of SD 1 or 2 that holds a text encoder, or a diffusers "
              "folder");
    s->sd2 = sdq__sf_is_sd2(f);
    s->openclip = sdq__sf_at(f, "%stoken_embedding.weight", sdq__sf_openclip) != NULL;
    s->prefix = part == SDQ_PART_UNET ? sdq__sf_unet : part == SDQ_PART_VAE ? sdq__sf_vae
              : s->openclip ? sdq__sf_openclip : sdq__sf_clip;
    if (part == SDQ_PART_UNET) sdq__sf_unet_config(ctx, s, config);
    else if (part == SDQ_PART_VAE) sdq__sf_vae_config(ctx, s, config);
    else sdq__sf_text_config(ctx, s, config);
    return config->bad ? SDQ_ERR_OOM : ctx->status;
}

/* ===========================================================================
 * >>model   what a network is made of: parameters, layers, configuration
 *
 * The structure of each network is written once, as a builder (sdq__tx_build, sdq__un_build,
 * sdq__va_build) that creates its layers from the values of config.json. Everything it creates
 * is entered into two lists under its diffusers name, in the order in which PyTorch creates the
 * same modules. Loading, random initialisation, saving and listing are loops over these lists.
 *
 * A key that the file lacks has the value that diffusers 0.39 gives it. Keys that change
 * what is computed in a way not written here are refused; keys that no version of the
 * class knows are ignored, as diffusers does: a structure they might mean shows up as tensors
    for (i = 0; i < SDQ__COUNT(other); i++)
        if (sdq__io_starts(name, other[i])) return 1;
 * without a place, and those are refused.
 * ======================================================================== */

enum { SDQ__MD_LEVELS = 8, SDQ__MD_LAYERS = 16, SDQ__MD_DEPTH = 64 };
#define SDQ__MD_CHANNELS ((size_t)1 << 16)

/* How a parameter starts when there is no file: a constant, U(-v,v), or N(0,v). */
enum { SDQ__MD_CONSTANT = 0, SDQ__MD_UNIFORM, SDQ__MD_NORMAL };

typedef struct sdq__param {
    char *name;
    sdq_layer *layer;       /* whose weight (rank > 1) or bias it is; NULL: own */
    sdq_tensor *own;        /* a norm's vector or a table */
    int rank;               /* shape in diffusers' layout, unused dims are 1 */
    size_t dim[4];
    int init;
    double value;
} sdq__param;

struct sdq_model {
    sdq_model_info info;
    char *config;                       /* the text of config.json */
    uint64_t source;                    /* hash of the float weights it was loaded or made from */
    sdq__param *param;
    size_t params, param_cap;
    sdq_layer **layer;
    size_t layers, layer_cap;
    struct sdq__text *text;             /* one of the three */
    struct sdq__unet *unet;
    struct sdq__vae *vae;
};

/* What of a new network is left out. */
typedef enum sdq__md_bare {
    SDQ__MD_WHOLE = 0,
    SDQ__MD_NO_WEIGHTS,     /* layers have no float weights: they come one by one, or never */
    SDQ__MD_SHAPES          /* nor do other parameters have numbers: to look at, not to use */
} sdq__md_bare;

/* A model under construction. Errors are sticky in ctx; whatever fails leaves NULL behind. */
typedef struct sdq__builder {
    sdq_ctx *ctx;
    sdq_model *model;
    const char *file;                   /* config.json, for sentences */
    const sdq__json *root, *defaults;
    const sdq__sf_source *src;          /* where the weights are; NULL: nowhere */
    double std;                         /* > 0: N(0,std) weights, zero bias; 0: PyTorch's */
    sdq__md_bare bare;
    size_t len;
    char path[256];                     /* name of the module being built, ends in '.' */
} sdq__builder;

/* Defaults are written as JSON in the source; the preprocessor quotes them. */
#define SDQ__MD_JSON(...) #__VA_ARGS__

static const sdq__json *sdq__md_get(const sdq__builder *b, const char *key) {
    const sdq__json *v = sdq__js_get(b->root, key);
    return v ? v : sdq__js_get(b->defaults, key);
}

/* A value as it is shown in sentences; long ones are cut. */
static const char *sdq__md_show(const sdq__json *v, char *buf, size_t size) {
    const sdq__json *item;
    size_t at = 1;
    if (!v || v->kind == SDQ__JS_NULL) (void)snprintf(buf, size, "null");
    else if (v->kind == SDQ__JS_BOOL) (void)snprintf(buf, size, v->num != 0 ? "true" : "false");
    else if (v->kind == SDQ__JS_NUMBER) (void)snprintf(buf, size, "%g", v->num);
    else if (v->kind == SDQ__JS_STRING) (void)snprintf(buf, size, "\"%s\"", v->str);
    else if (v->kind == SDQ__JS_OBJECT) (void)snprintf(buf, size, "{..}");
    else {
        buf[0] = '[';
        for (item = v->child; item && at + 8 < size; item = item->next) {
            if (item->kind == SDQ__JS_ARRAY) (void)snprintf(buf + at, size - at, "[..]");
            else (void)sdq__md_show(item, buf + at, size - at - 2);
            at += strlen(buf + at);
            if (item->next) buf[at++] = ',';
        }
        buf[at] = ']';
        buf[at + 1] = 0;
    }
    return buf;
}

static void sdq__md_refuse(const sdq__builder *b, const char *key, const sdq__json *v,
                           const char *wanted) {
    char shown[96];
    sdq__fail(b->ctx, v ? SDQ_ERR_UNSUPPORTED : SDQ_ERR_MISSING,
              "%s: \"%s\": %s is not supported; it must be %s", b->file, key,
              v ? sdq__md_show(v, shown, sizeof shown) : "(missing)", wanted);
}

/* A number in min..max; integer: it must be whole. */
static double sdq__md_number(const sdq__builder *b, const char *key, const sdq__json *v,
                             double min, double max, int integer) {
    char wanted[96];
    if (v && v->kind == SDQ__JS_NUMBER && v->num >= min && v->num <= max
        && (!integer || v->num == floor(v->num))) return v->num;
    (void)snprintf(wanted, sizeof wanted, "%s of %g..%g", integer ? "an integer" : "a number",
                   min, max);
    sdq__md_refuse(b, key, v, wanted);
    return min;
}
static size_t sdq__md_size(const sdq__builder *b, const char *key, size_t max) {
    return (size_t)sdq__md_number(b, key, sdq__md_get(b, key), 1, (double)max, 1);
}
/* The same, 0 when the value is null. */
static size_t sdq__md_size_or_null(const sdq__builder *b, const char *key, size_t max) {
    const sdq__json *v = sdq__md_get(b, key);
    return !v || v->kind == SDQ__JS_NULL ? 0 : sdq__md_size(b, key, max);
}
static float sdq__md_float(const sdq__builder *b, const char *key, double min, double max) {
    return (float)sdq__md_number(b, key, sdq__md_get(b, key), min, max, 0);
}
/* act_fn: SiLU, which diffusers also calls swish; capitals do not matter to it. */
static void sdq__md_silu(const sdq__builder *b) {
    const sdq__json *v = sdq__md_get(b, "act_fn");
    const char *s = v && v->kind == SDQ__JS_STRING ? v->str : "";
    char low[8] = "";
    size_t i;
    for (i = 0; s[i] && i + 1 < sizeof low; i++)
        low[i] = s[i] >= 'A' && s[i] <= 'Z' ? (char)(s[i] - 'A' + 'a') : s[i];
    if (strcmp(low, "silu") != 0 && strcmp(low, "swish") != 0)
        sdq__md_refuse(b, "act_fn", v, "\"silu\" or \"swish\"");
}
static int sdq__md_flag(const sdq__builder *b, const char *key) {
    const sdq__json *v = sdq__md_get(b, key);
    if (!v || v->kind != SDQ__JS_BOOL) { sdq__md_refuse(b, key, v, "true or false"); return 0; }
    return v->num != 0;
}

/* One size for all n levels, or a list of n. */
static void sdq__md_sizes(const sdq__builder *b, const char *key, size_t max, size_t n,
                          size_t *out) {
    const sdq__json *v = sdq__md_get(b, key), *item = v ? v->child : NULL;
    char wanted[64];
    size_t i;
    const int list = v && v->kind == SDQ__JS_ARRAY;
    for (i = 0; i < n; i++) out[i] = 1;
    if (list && v->count != n) {
        (void)snprintf(wanted, sizeof wanted, "one value or a list of %zu, one per level", n);
        sdq__md_refuse(b, key, v, wanted);
        return;
    }
    for (i = 0; i < n; i++) {
        out[i] = (size_t)sdq__md_number(b, key, list ? item : v, 1, (double)max, 1);
        if (list) item = item->next;
    }
}

/* A list of n names out of two: out[i] says whether item i is `yes` (else it is `no`). */
static void sdq__md_kinds(const sdq__builder *b, const char *key, const char *no,
                          const char *yes, size_t n, int *out) {
    const sdq__json *v = sdq__md_get(b, key), *item;
    char wanted[160];
    size_t i;
    int good = v && v->kind == SDQ__JS_ARRAY && v->count == n;
    for (i = 0, item = good ? v->child : NULL; good && i < n; i++, item = item->next) {
        good = item->kind == SDQ__JS_STRING;
        if (!good) break;
        out[i] = strcmp(item->str, yes) == 0;
        good = out[i] || strcmp(item->str, no) == 0;
    }
    if (good) return;
    for (i = 0; i < n; i++) out[i] = 0;
    (void)snprintf(wanted, sizeof wanted, "a list of %zu, one per level, of \"%s\"%s%s%s", n, no,
                   no == yes ? "" : " or \"", no == yes ? "" : yes, no == yes ? "" : "\"");
    sdq__md_refuse(b, key, v, wanted);
}

/* null, false and 0 mean the same: off. */
static int sdq__md_off(const sdq__json *v) {
    return !v || v->kind == SDQ__JS_NULL
        || ((v->kind == SDQ__JS_BOOL || v->kind == SDQ__JS_NUMBER) && v->num == 0);
}
static int sdq__md_equal(const sdq__json *a, const sdq__json *b) {
    if (sdq__md_off(a) || sdq__md_off(b)) return sdq__md_off(a) && sdq__md_off(b);
    if (a->kind != b->kind) return 0;
    return a->kind == SDQ__JS_STRING ? strcmp(a->str, b->str) == 0 : a->num == b->num;
}

/* Keys that must have their default value, alone or in every item of a list. */
static void sdq__md_fixed(const sdq__builder *b, const char *const *keys, size_t n) {
    char shown[64];
    size_t i;
    for (i = 0; i < n; i++) {
        const sdq__json *v = sdq__js_get(b->root, keys[i]);
        const sdq__json *only = sdq__js_get(b->defaults, keys[i]), *item;
        int good = 1;
        if (!v) continue;
        if (v->kind == SDQ__JS_ARRAY)
            for (item = v->child; item; item = item->next) good = good && sdq__md_equal(item, only);
        else good = v->kind != SDQ__JS_OBJECT && sdq__md_equal(v, only);
        if (!good) sdq__md_refuse(b, keys[i], v, sdq__md_show(only, shown, sizeof shown));
    }
}

/* --- names and lists --- */

/* Append "name." or "name.i." to the path; leave with what it returned. */
static size_t sdq__md_enter(sdq__builder *b, const char *name) {
    const size_t at = b->len, left = sizeof b->path - at;
    const int n = snprintf(b->path + at, left, "%s.", name);
    SDQ_ASSERT(n > 0 && (size_t)n < left);
    b->len += (size_t)n;
    return at;
}
static size_t sdq__md_enter_item(sdq__builder *b, const char *name, size_t i) {
    char item[64];
    (void)snprintf(item, sizeof item, "%s.%zu", name, i);
    return sdq__md_enter(b, item);
}
static void sdq__md_leave(sdq__builder *b, size_t at) {
    b->len = at;
    b->path[at] = 0;
}

/* --- the checkpoint file --- */

static void sdq__md_shape(int rank, const size_t *dim, char *buf, size_t size) {
    size_t at = 0;
    int i;
    buf[at++] = '[';
    for (i = 0; i < rank && at + 24 < size; i++)
        at += (size_t)snprintf(buf + at, size - at, "%s%zu", i ? "," : "", dim[i]);
    buf[at++] = ']';
    buf[at] = 0;
}

/* Old names of the VAE's attention, which diffusers still reads: 1 when buf got one. */
static int sdq__md_old_name(const char *name, char *buf, size_t size) {
    static const char *const pair[4][2] = {{".to_q.", ".query."}, {".to_k.", ".key."},
                                           {".to_v.", ".value."}, {".to_out.0.", ".proj_attn."}};
    size_t i;
    for (i = 0; i < 4; i++) {
        const char *at = strstr(name, pair[i][0]);
        if (!at || strlen(name) + 8 > size) continue;
        (void)snprintf(buf, size, "%.*s%s%s", (int)(at - name), name, pair[i][1],
                       at + strlen(pair[i][0]));
        return 1;
    }
    return 0;
}

static int sdq__md_find(const sdq__sf_source *src, const char *name, sdq_entry *e) {
    char old[320];
    if (sdq__sf_find(src, name, e)) return 1;
    if (src->prefix || src->part != SDQ_PART_VAE || !sdq__md_old_name(name, old, sizeof old))
        return 0;
    return sdq__sf_find(src, old, e);
}

/* What says which shapes the arrays must have. */
static const char *sdq__md_asks(const sdq__sf_source *src) {
    return src->prefix ? "the rest of the file" : "config.json";
}

/* Linear [o,i] and 1x1 convolution [o,i,1,1] are the same numbers: either is read as either. */
static sdq_status sdq__md_fits(sdq_ctx *ctx, const sdq__sf_source *src, const sdq__param *p,
                               const sdq_entry *e) {
    char want[128], found[192];
    int i, same = p->rank == 1 ? e->rank == 1 : e->rank >= 2;
    for (i = 0; i < 8; i++) same = same && e->dim[i] == (i < 4 ? p->dim[i] : 1);
    if (!same) {
        sdq__md_shape(p->rank, p->dim, want, sizeof want);
        sdq__md_shape(e->rank, e->dim, found, sizeof found);
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: %s is %s, but %s asks for %s",
                         src->set->path, e->name, found, sdq__md_asks(src), want);
    }
    if (e->dtype == SDQ_F32 || e->dtype == SDQ_F16 || e->dtype == SDQ_BF16 || e->dtype == SDQ_F64)
        return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: %s is stored as %s; a weight must be F32, F16, "
                     "BF16 or F64", src->set->path, e->name, e->dtype == SDQ_DTYPE_COUNT
                     ? "a type that sdq cannot read (F8, F4, ..)" : sdq_dtype_name(e->dtype));
}

/* The entry of a parameter exists and has its shape. */
static sdq_status sdq__md_match(sdq_ctx *ctx, const sdq__sf_source *src, const sdq__param *p) {
    char want[128], name[320];
    int third;
    sdq_entry e;
    if (sdq__md_find(src, p->name, &e)) return sdq__md_fits(ctx, src, p, &e);
    sdq__sf_name(src, p->name, name, sizeof name, &third);
    sdq__md_shape(p->rank, p->dim, want, sizeof want);
    return sdq__fail(ctx, SDQ_ERR_MISSING, "%s: %s is missing; %s asks for it as %s%s; is the file "
                     "complete?", src->set->path, name, sdq__md_asks(src), want,
                     third ? ", three times" : "");
}

/* A new entry of the parameter list, named path + name + suffix; NULL on failure. When the weights
 * come from a file it is checked here, before memory for it is taken: a hostile configuration
 * can ask for no more than the file has. */
static sdq__param *sdq__md_param(sdq__builder *b, const char *name, const char *suffix, int rank,
                                 size_t d0, size_t d1, size_t k) {
    sdq_model *m = b->model;
    sdq__param *p;
    size_t count = 1;
    if (b->ctx->status != SDQ_OK) return NULL;
    if (!sdq__grow(b->ctx, (void **)(void *)&m->param, &m->param_cap, m->params + 1,
                   sizeof(sdq__param))) return NULL;
    p = &m->param[m->params];
    memset(p, 0, sizeof *p);
    p->rank = rank;
    p->dim[0] = d0; p->dim[1] = d1; p->dim[2] = k; p->dim[3] = k;
    if (!sdq__u_mul(d0, d1, &count) || !sdq__u_mul(count, k * k, &count)
        || count > SIZE_MAX / 8 - m->info.weights) {
        sdq__fail(b->ctx, SDQ_ERR_UNSUPPORTED, "%s: %s%s is too large", b->file, b->path, name);
        return NULL;
    }
    p->name = SDQ__NEW_N(b->ctx, char, b->len + strlen(name) + strlen(suffix) + 1);
    if (!p->name) return NULL;
    memcpy(p->name, b->path, b->len);
    (void)sprintf(p->name + b->len, "%s%s", name, suffix);
    m->params++;
    m->info.weights += count;
    if (b->src && sdq__md_match(b->ctx, b->src, p) != SDQ_OK) return NULL;
    return p;
}

/* A parameter that is not part of a layer: [a] or [a,b], constant or normal. */
static sdq_tensor *sdq__md_own(sdq__builder *b, const char *name, const char *suffix, int rank,
                               size_t d0, size_t d1, int init, double value) {
    sdq__param *p = sdq__md_param(b, name, suffix, rank, d0, d1, 1);
    if (!p) return NULL;
    p->init = init;
    p->value = value;
    p->own = SDQ__NEW(b->ctx, sdq_tensor);
    if (!p->own || sdq__t_set_shape(b->ctx, p->own, rank, p->dim) != SDQ_OK) return NULL;
    if (b->bare != SDQ__MD_SHAPES && sdq__t_alloc(b->ctx, p->own) != SDQ_OK) return NULL;
    return p->own;
}

typedef struct sdq__norm {
    sdq_tensor *gamma, *beta;
    int groups;             /* 0: a layer norm */
    float eps;
} sdq__norm;

static sdq__norm sdq__md_norm(sdq__builder *b, const char *name, size_t c, size_t groups,
                              float eps) {
    sdq__norm n;
    n.gamma = sdq__md_own(b, name, ".weight", 1, c, 1, SDQ__MD_CONSTANT, 1.0);
    n.beta = sdq__md_own(b, name, ".bias", 1, c, 1, SDQ__MD_CONSTANT, 0.0);
    n.groups = (int)groups;
    n.eps = eps;
    if (groups && c % groups != 0)
        sdq__fail(b->ctx, SDQ_ERR_UNSUPPORTED, "%s: \"norm_num_groups\": %zu does not divide the "
                  "%zu channels of %s%s", b->file, groups, c, b->path, name);
    return n;
}

static sdq_tensor *sdq__md_normalize(sdq_ctx *ctx, const sdq__norm *n, sdq_tensor *x, int silu) {
    if (!n->groups) return sdq_layer_norm(ctx, x, n->gamma, n->beta, n->eps);
    return sdq_group_norm(ctx, x, n->gamma, n->beta, n->groups, n->eps, silu);
}

/* A group norm as y = a x + b, each [entries][c]. */
typedef struct sdq__md_affine { float *a, *b; } sdq__md_affine;

static int sdq__md_stats(sdq_ctx *ctx, const sdq__norm *n, const sdq_tensor *x,
                         sdq__md_affine *out) {
    const size_t groups = (size_t)n->groups, entries = sdq__t_entries(x);
    const size_t count = entries * sdq__t_chan(x);
    sdq_mark mark;
    float *mean, *rstd, *mc;
    sdq__gn w;
    sdq__op_gn_begin(ctx, &w, x, 1);
    out->a = SDQ__PUSH_N(ctx, float, count);
    out->b = SDQ__PUSH_N(ctx, float, count);
    mark = sdq_arena_mark(ctx);
    mean = SDQ__PUSH_N(ctx, float, entries * groups);
    rstd = SDQ__PUSH_N(ctx, float, entries * groups);
    mc = SDQ__PUSH_N(ctx, float, count);
    w.part = SDQ__PUSH_N(ctx, float, w.chunks * count);
    if (ctx->status != SDQ_OK) return 0;
    sdq__op_gn_stats(ctx, &w, groups, n->eps, sdq_f32(n->gamma), sdq_f32(n->beta), mean, rstd,
                     out->a, out->b, mc);
    sdq_arena_release(ctx, mark);
    return 1;
}

/* silu(group norm(x)) as layer l wants to read it: as bytes if it can. */
static sdq_tensor *sdq__md_normalize_for(sdq_ctx *ctx, const sdq_layer *l, const sdq__norm *n,
                                         sdq_tensor *x, sdq_mode mode) {
    sdq__md_affine f;
    if (!x || ctx->recording || !sdq__ly_takes_bytes(l, x, mode, 1))
        return sdq__md_normalize(ctx, n, x, 1);
    return sdq__md_stats(ctx, n, x, &f) ? sdq__ly_affine(ctx, l, x, f.a, f.b) : NULL;
}

/* PyTorch starts a Linear or Conv2d with U(-v,v), v = sqrt(3) gain / sqrt(fan in), and
 * gain = sqrt(2 / (1 + 5)) (He et al. 2015 with slope sqrt(5)); its bias with 1/sqrt(fan in). */
static void sdq__md_layer_params(sdq__builder *b, const char *name, const sdq_layer_desc *d,
                                 int rank) {
    const size_t k = (size_t)d->kernel;
    const double fan = (double)d->in * (double)(k * k);
    sdq__param *p = sdq__md_param(b, name, ".weight", rank, d->out, d->in, k);
    if (!p) return;
    p->init = b->std > 0 ? SDQ__MD_NORMAL : SDQ__MD_UNIFORM;
    p->value = b->std > 0 ? b->std : sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(fan));
    if (d->no_bias) return;
    p = sdq__md_param(b, name, ".bias", 1, d->out, 1, 1);
    if (!p) return;
    p->init = b->std > 0 ? SDQ__MD_CONSTANT : SDQ__MD_UNIFORM;
    p->value = b->std > 0 ? 0.0 : 1.0 / sqrt(fan);
}

/* rank 2: a Linear, 4: a Conv2d, which differ only in how their weight is stored. */
static sdq_layer *sdq__md_layer(sdq__builder *b, const char *name, const sdq_layer_desc *desc,
                                int rank) {
    sdq_model *m = b->model;
    sdq_layer_desc d = *desc;
    sdq_layer *layer = NULL;
    const size_t first = m->params;
    char full[sizeof b->path + 64];
    size_t i;
    (void)snprintf(full, sizeof full, "%s%s", b->path, name);
    d.name = full;
    if (d.kernel == 0) d.kernel = 1;
    sdq__md_layer_params(b, name, &d, rank);
    if (b->ctx->status != SDQ_OK
        || !sdq__grow(b->ctx, (void **)(void *)&m->layer, &m->layer_cap, m->layers + 1,
                      sizeof *m->layer)
        || sdq__ly_create(b->ctx, &d, b->bare != SDQ__MD_WHOLE, &layer) != SDQ_OK) return NULL;
    m->layer[m->layers++] = layer;
    for (i = first; i < m->params; i++) m->param[i].layer = layer;
    return layer;
}

static sdq_layer *sdq__md_linear(sdq__builder *b, const char *name, size_t in, size_t out,
                                 int bias) {
    sdq_layer_desc d;
    memset(&d, 0, sizeof d);
    d.in = in;
    d.out = out;
    d.no_bias = !bias;
    return sdq__md_layer(b, name, &d, 2);
}
static sdq_layer *sdq__md_conv1(sdq__builder *b, const char *name, size_t in, size_t out) {
    sdq_layer_desc d;
    memset(&d, 0, sizeof d);
    d.in = in;
    d.out = out;
    return sdq__md_layer(b, name, &d, 4);
}
/* 3x3. first: zeros above and to the left, 1 or 0; below and to the right there is always one. */
static sdq_layer *sdq__md_conv3(sdq__builder *b, const char *name, size_t in, size_t out,
                                int stride, int first) {
    sdq_layer_desc d;
    memset(&d, 0, sizeof d);
    d.in = in;
    d.out = out;
    d.kernel = 3;
    d.stride = stride;
    d.pad[0] = d.pad[1] = first;
    d.pad[2] = d.pad[3] = 1;
    return sdq__md_layer(b, name, &d, 4);
}

/* Token form of a picture and back: the same numbers in the same order. */
static sdq_tensor *sdq__md_tokens(sdq_ctx *ctx, sdq_tensor *x) {
    size_t dim[3];
    if (!x) return NULL;
    dim[0] = x->dim[0]; dim[1] = x->dim[1] * x->dim[2]; dim[2] = x->dim[3];
    return sdq_reshape(ctx, x, 3, dim);
}

/* The input of a public forward function: a float tensor of that rank and channel count. */
static int sdq__md_check(sdq_ctx *ctx, const char *what, const sdq_tensor *x, int rank, size_t c) {
    char shape[96];
    if (ctx->status != SDQ_OK) return 0;
    if (x && x->dtype == SDQ_F32 && x->rank == rank && x->dim[rank - 1] == c) return 1;
    sdq__fail(ctx, x ? SDQ_ERR_SHAPE : SDQ_ERR_ARGUMENT, "%s: expected F32 [%s,%zu], found %s%s",
              what, rank == 4 ? "n,h,w" : "n,t", c, x ? sdq_dtype_name(x->dtype) : "NULL",
              x ? sdq__t_shape(x, shape) : "");
    return 0;
}

static int sdq__md_is(sdq_ctx *ctx, const char *what, const sdq_model *m, sdq_part part) {
    if (ctx->status != SDQ_OK) return 0;
    if (m && m->info.part == part) return 1;
    sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: the model is %s, not %s", what,
              m ? sdq_part_name(m->info.part) : "NULL", sdq_part_name(part));
    return 0;
}

/* ===========================================================================
 * >>blocks   residual block, attention, transformer
 *
 * What the networks have in common. Without recording, a block leaves nothing in the arena but
 * its result: sdq__keep moves it down to where the block began.
 *
 *   resnet       y = conv2(silu(gn(conv1(silu(gn(x))) + time))) + shortcut(x)
 *   attention    y = out(softmax(q k^T / sqrt(d)) v) + x                  (Vaswani et al. 2017)
 *   transformer  y = proj_out(blocks(proj_in(gn(x)))) + x, in a block:
 *                x += self(ln(x)); x += cross(ln(x), text); x += ff(ln(x)), ff with GEGLU
 * ======================================================================== */

typedef struct sdq__resnet {
    sdq__norm norm1, norm2;
    sdq_layer *conv1, *conv2;
    sdq_layer *time;        /* NULL: no time input */
    sdq_layer *shortcut;    /* NULL: x itself */
    size_t out, index;      /* index: place in a time table */
} sdq__resnet;

/* split > 0: the input is the concatenation of `split` channels and a skip connection. */
static void sdq__bk_resnet_build(sdq__builder *b, sdq__resnet *r, size_t in, size_t out,
                                 size_t time, size_t groups, float eps, size_t split) {
    r->out = out;
    r->norm1 = sdq__md_norm(b, "norm1", in, groups, eps);
    r->conv1 = sdq__md_conv3(b, "conv1", in, out, 1, 1);
    if (time) r->time = sdq__md_linear(b, "time_emb_proj", time, out, 1);
    r->norm2 = sdq__md_norm(b, "norm2", out, groups, eps);
    r->conv2 = sdq__md_conv3(b, "conv2", out, out, 1, 1);
    if (in != out) r->shortcut = sdq__md_conv1(b, "conv_shortcut", in, out);
    if (r->shortcut && split) sdq__ly_set_split(r->shortcut, split);
}

/* time: NULL or [n,out], the projected time embedding. */
static sdq_tensor *sdq__bk_resnet(sdq_ctx *ctx, const sdq__resnet *r, sdq_tensor *x,
                                  sdq_tensor *time, sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *h, *shortcut;
    h = sdq__md_normalize_for(ctx, r->conv1, &r->norm1, x, mode);
    h = sdq__keep(ctx, mark, sdq_layer_forward(ctx, r->conv1, h, NULL, mode));
    if (r->time) h = sdq_add_vector(ctx, h, time);
    h = sdq__keep(ctx, mark, sdq__md_normalize_for(ctx, r->conv2, &r->norm2, h, mode));
    shortcut = r->shortcut ? sdq_layer_forward(ctx, r->shortcut, x, NULL, mode) : x;
    return sdq__keep(ctx, mark, sdq_layer_forward(ctx, r->conv2, h, shortcut, mode));
}

typedef struct sdq__attn {
    sdq_layer *q, *k, *v, *out;
    int heads;
    int bits;               /* of its products where the layers are int8; 0: float */
} sdq__attn;

static void sdq__bk_attn_build(sdq__builder *b, sdq__attn *a, size_t c, size_t context,
                               size_t heads, int bias) {
    a->q = sdq__md_linear(b, "to_q", c, c, bias);
    a->k = sdq__md_linear(b, "to_k", context, c, bias);
    a->v = sdq__md_linear(b, "to_v", context, c, bias);
    a->out = sdq__md_linear(b, "to_out.0", c, c, 1);
    a->heads = (int)heads;
}

/* q from x [n,t,c], k and v given: + residual. */
static sdq_tensor *sdq__bk_attend(sdq_ctx *ctx, const sdq__attn *a, sdq_tensor *x, sdq_tensor *k,
                                  sdq_tensor *v, sdq_tensor *residual, sdq_mode mode) {
    sdq_tensor *q = sdq_layer_forward(ctx, a->q, x, NULL, mode);
    sdq_tensor *y = a->bits && mode != SDQ_FLOAT
                  ? sdq_attention_int(ctx, q, k, v, a->heads, a->bits)
                  : sdq_attention(ctx, q, k, v, a->heads, 0);
    return sdq_layer_forward(ctx, a->out, y, residual, mode);
}
static sdq_tensor *sdq__bk_self(sdq_ctx *ctx, const sdq__attn *a, sdq_tensor *x,
                                sdq_tensor *residual, sdq_mode mode) {
    sdq_tensor *k, *v;
    x = sdq__ly_share(ctx, a->q, x, mode);
    k = sdq_layer_forward(ctx, a->k, x, NULL, mode);
    v = sdq_layer_forward(ctx, a->v, x, NULL, mode);
    return sdq__bk_attend(ctx, a, x, k, v, residual, mode);
}

typedef struct sdq__tblock {
    sdq__norm norm1, norm2, norm3;
    sdq__attn self, cross;
    sdq_layer *ff_in, *ff_out;
    size_t index;           /* place in a prompt cache */
} sdq__tblock;

static void sdq__bk_tblock_build(sdq__builder *b, sdq__tblock *t, size_t c, size_t context,
                                 size_t heads) {
    size_t at;
    t->norm1 = sdq__md_norm(b, "norm1", c, 0, 1e-5f);
    at = sdq__md_enter(b, "attn1");
    sdq__bk_attn_build(b, &t->self, c, c, heads, 0);
    sdq__md_leave(b, at);
    t->norm2 = sdq__md_norm(b, "norm2", c, 0, 1e-5f);
    at = sdq__md_enter(b, "attn2");
    sdq__bk_attn_build(b, &t->cross, c, context, heads, 0);
    sdq__md_leave(b, at);
    t->norm3 = sdq__md_norm(b, "norm3", c, 0, 1e-5f);
    t->ff_in = sdq__md_linear(b, "ff.net.0.proj", c, 8 * c, 1);
    t->ff_out = sdq__md_linear(b, "ff.net.2", 4 * c, c, 1);
}

/* x [n,t,c]; k, v: the text's keys and values for the cross attention. */
static sdq_tensor *sdq__bk_tblock(sdq_ctx *ctx, const sdq__tblock *t, sdq_tensor *x,
                                  sdq_tensor *k, sdq_tensor *v, sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *h = sdq__md_normalize(ctx, &t->norm1, x, 0);
    x = sdq__keep(ctx, mark, sdq__bk_self(ctx, &t->self, h, x, mode));
    h = sdq__md_normalize(ctx, &t->norm2, x, 0);
    x = sdq__keep(ctx, mark, sdq__bk_attend(ctx, &t->cross, h, k, v, x, mode));
    h = sdq__md_normalize(ctx, &t->norm3, x, 0);
    h = sdq__ly_geglu(ctx, t->ff_in, h, mode);
    return sdq__keep(ctx, mark, sdq_layer_forward(ctx, t->ff_out, h, x, mode));
}

typedef struct sdq__transformer {
    sdq__norm norm;
    sdq_layer *proj_in, *proj_out;
    sdq__tblock *block;
    size_t count;
} sdq__transformer;

/* linear: proj_in and proj_out are stored as Linear, otherwise as 1x1 Conv2d. */
static void sdq__bk_transformer_build(sdq__builder *b, sdq__transformer *t, size_t c,
                                      size_t context, size_t heads, size_t depth, size_t groups,
                                      int linear) {
    size_t i;
    if (c % heads != 0)
        sdq__fail(b->ctx, SDQ_ERR_UNSUPPORTED, "%s: \"attention_head_dim\": %zu heads do not "
                  "divide the %zu channels of %s", b->file, heads, c, b->path);
    t->norm = sdq__md_norm(b, "norm", c, groups, 1e-6f);
    t->proj_in = linear ? sdq__md_linear(b, "proj_in", c, c, 1) : sdq__md_conv1(b, "proj_in", c, c);
    t->block = SDQ__NEW_N(b->ctx, sdq__tblock, depth);
    if (!t->block) return;
    t->count = depth;
    for (i = 0; i < depth; i++) {
        const size_t at = sdq__md_enter_item(b, "transformer_blocks", i);
        sdq__bk_tblock_build(b, &t->block[i], c, context, heads);
        sdq__md_leave(b, at);
    }
    t->proj_out = linear ? sdq__md_linear(b, "proj_out", c, c, 1)
                         : sdq__md_conv1(b, "proj_out", c, c);
}

/* One resolution of a network: resnets, each with a transformer behind it or none, and a
 * convolution to the next resolution. */
typedef struct sdq__level {
    sdq__resnet *resnet;
    sdq__transformer *attn;     /* NULL: none; else one per resnet (one in the middle) */
    size_t count, attns;
    sdq_layer *resample;        /* NULL at the end */
} sdq__level;

static int sdq__bk_level_new(sdq__builder *b, sdq__level *l, size_t count, size_t attns) {
    l->resnet = SDQ__NEW_N(b->ctx, sdq__resnet, count);
    l->attn = attns ? SDQ__NEW_N(b->ctx, sdq__transformer, attns) : NULL;
    if (!l->resnet || (attns && !l->attn)) return 0;
    l->count = count;
    l->attns = attns;
    return 1;
}
static void sdq__bk_level_free(sdq_ctx *ctx, sdq__level *l) {
    size_t i;
    for (i = 0; i < l->attns; i++) sdq__free(ctx, l->attn[i].block);
    sdq__free(ctx, l->attn);
    sdq__free(ctx, l->resnet);
}

/* ===========================================================================
 * >>text   CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020)
 *
 *   x = token[id] + position;  per layer: x += self(ln1(x)), causal;  x += fc2(act(fc1(ln2(x))))
 *   y = final_layer_norm(x)
 * act: x sigmoid(1.702 x) in OpenAI's networks, gelu (erf) in OpenCLIP's (SD 2).
 * ======================================================================== */

typedef struct sdq__text_layer {
    sdq__norm norm1, norm2;
    sdq__attn attn;
    sdq_layer *fc1, *fc2;
} sdq__text_layer;

typedef struct sdq__text {
    sdq_tensor *token, *position;
    sdq__text_layer *layer;
    size_t count;
    int quick;              /* quick_gelu, not gelu */
    sdq__norm norm;
} sdq__text;

static const char sdq__tx_defaults[] = SDQ__MD_JSON({
    "architectures": "CLIPTextModel", "vocab_size": 49408, "hidden_size": 512,
    "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "initializer_factor": 1.0, "model_type": "clip_text_model", "use_attention_mask": false});

/* Normal weights: transformers' deviations for CLIP, smaller where layers add up. */
static void sdq__tx_layer_build(sdq__builder *b, sdq__text_layer *l, size_t c, size_t wide,
                                size_t heads, float eps, double factor) {
    const double in_std = factor / sqrt((double)c) / sqrt(2.0 * (double)b->model->text->count);
    size_t at = sdq__md_enter(b, "self_attn");
    b->std = in_std;
    l->attn.k = sdq__md_linear(b, "k_proj", c, c, 1);
    l->attn.v = sdq__md_linear(b, "v_proj", c, c, 1);
    l->attn.q = sdq__md_linear(b, "q_proj", c, c, 1);
    b->std = factor / sqrt((double)c);
    l->attn.out = sdq__md_linear(b, "out_proj", c, c, 1);
    l->attn.heads = (int)heads;
    sdq__md_leave(b, at);
    l->norm1 = sdq__md_norm(b, "layer_norm1", c, 0, eps);
    at = sdq__md_enter(b, "mlp");
    b->std = factor / sqrt(2.0 * (double)c);
    l->fc1 = sdq__md_linear(b, "fc1", c, wide, 1);
    b->std = in_std;
    l->fc2 = sdq__md_linear(b, "fc2", wide, c, 1);
    sdq__md_leave(b, at);
    l->norm2 = sdq__md_norm(b, "layer_norm2", c, 0, eps);
}

static void sdq__tx_build(sdq__builder *b) {
    static const char *const fixed[] = {"architectures", "model_type", "use_attention_mask"};
    sdq_model_info *info = &b->model->info;
    const size_t c = sdq__md_size(b, "hidden_size", SDQ__MD_CHANNELS);
    const size_t wide = sdq__md_size(b, "intermediate_size", SDQ__MD_CHANNELS);
    const size_t heads = sdq__md_size(b, "num_attention_heads", c);
    const size_t layers = sdq__md_size(b, "num_hidden_layers", 256);
    const float eps = sdq__md_float(b, "layer_norm_eps", 0, 1);
    const double factor = (double)sdq__md_float(b, "initializer_factor", 1e-6, 1e6);
    const sdq__json *act = sdq__md_get(b, "hidden_act");
    const sdq__json *named = sdq__js_get(b->root, "architectures");
    const sdq__json *head = named && named->kind == SDQ__JS_ARRAY ? named->child : NULL;
    const int unnamed = named   /* a configuration saved alone, or one whose projection is unused */
        && (named->kind == SDQ__JS_NULL || (head && !head->next && head->kind == SDQ__JS_STRING
            && !strcmp(head->str, "CLIPTextModelWithProjection")));
    sdq__text *t = b->model->text = SDQ__NEW(b->ctx, sdq__text);
    size_t i, at;
    sdq__md_fixed(b, fixed + unnamed, SDQ__COUNT(fixed) - (size_t)unnamed);
    info->context = c;
    info->vocab = sdq__md_size(b, "vocab_size", (size_t)1 << 24);
    info->tokens = sdq__md_size(b, "max_position_embeddings", (size_t)1 << 16);
    if (!t) return;
    t->quick = act && act->kind == SDQ__JS_STRING && strcmp(act->str, "quick_gelu") == 0;
    if (!t->quick && !(act && act->kind == SDQ__JS_STRING && strcmp(act->str, "gelu") == 0))
        sdq__md_refuse(b, "hidden_act", act, "\"quick_gelu\" or \"gelu\"");
    if (c % heads != 0)
        sdq__fail(b->ctx, SDQ_ERR_UNSUPPORTED, "%s: \"num_attention_heads\": %zu does not divide "
                  "\"hidden_size\": %zu", b->file, heads, c);
    t->layer = SDQ__NEW_N(b->ctx, sdq__text_layer, layers);
    if (!t->layer || b->ctx->status != SDQ_OK) return;
    t->count = layers;
    at = sdq__md_enter(b, "text_model");
    t->token = sdq__md_own(b, "embeddings.token_embedding", ".weight", 2, info->vocab, c,
                           SDQ__MD_NORMAL, 0.02 * factor);
    t->position = sdq__md_own(b, "embeddings.position_embedding", ".weight", 2, info->tokens, c,
                              SDQ__MD_NORMAL, 0.02 * factor);
    for (i = 0; i < layers; i++) {
        const size_t inner = sdq__md_enter_item(b, "encoder.layers", i);
        sdq__tx_layer_build(b, &t->layer[i], c, wide, heads, eps, factor);
        sdq__md_leave(b, inner);
    }
    t->norm = sdq__md_norm(b, "final_layer_norm", c, 0, eps);
    sdq__md_leave(b, at);
}

static void sdq__tx_free(sdq_ctx *ctx, sdq__text *t) {
    if (t) sdq__free(ctx, t->layer);
    sdq__free(ctx, t);
}

static sdq_tensor *sdq__tx_layer(sdq_ctx *ctx, const sdq__text *t, const sdq__text_layer *l,
                                 sdq_tensor *x) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_mode mode = SDQ_FLOAT;
    sdq_tensor *h = sdq__md_normalize(ctx, &l->norm1, x, 0), *q, *k, *v;
    q = sdq_layer_forward(ctx, l->attn.q, h, NULL, mode);
    k = sdq_layer_forward(ctx, l->attn.k, h, NULL, mode);
    v = sdq_layer_forward(ctx, l->attn.v, h, NULL, mode);
    h = sdq_attention(ctx, q, k, v, l->attn.heads, 1);
    x = sdq__keep(ctx, mark, sdq_layer_forward(ctx, l->attn.out, h, x, mode));
    h = sdq__md_normalize(ctx, &l->norm2, x, 0);
    h = sdq_layer_forward(ctx, l->fc1, h, NULL, mode);
    h = t->quick ? sdq_quick_gelu(ctx, h) : sdq_gelu(ctx, h);
    return sdq__keep(ctx, mark, sdq_layer_forward(ctx, l->fc2, h, x, mode));
}

SDQ_API sdq_tensor *sdq_text_forward(sdq_ctx *ctx, const sdq_model *m, sdq_tensor *ids) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq__text *t;
    sdq_tensor *x;
    size_t i;
    if (!sdq__md_is(ctx, "sdq_text_forward", m, SDQ_PART_TEXT)) return NULL;
    if (!ids || ids->dtype != SDQ_I32 || ids->rank != 2 || ids->dim[1] > m->info.tokens) {
        char shape[96];
        sdq__fail(ctx, ids ? SDQ_ERR_SHAPE : SDQ_ERR_ARGUMENT, "sdq_text_forward: ids must be I32 "
                  "[n,t] with t up to %zu, found %s%s", m->info.tokens,
                  ids ? sdq_dtype_name(ids->dtype) : "NULL", ids ? sdq__t_shape(ids, shape) : "");
        return NULL;
    }
    t = m->text;
    x = sdq_add_rows(ctx, sdq_embedding(ctx, ids, t->token), t->position);
    for (i = 0; i < t->count; i++) x = sdq__keep(ctx, mark, sdq__tx_layer(ctx, t, &t->layer[i], x));
    return sdq__keep(ctx, mark, sdq__md_normalize(ctx, &t->norm, x, 0));
}

/* ===========================================================================
 * >>unet   the denoising network (Rombach et al. 2022, arXiv 2112.10752)
 *
 * Down: at every level resnets (and transformers), then a convolution of stride 2. Every
 * intermediate result is a skip connection, a stack that the way up takes from its top:
 * resnet(concat(hidden, skip)). Sizes need not be even: going up, the picture gets the size of
 * the skip it meets next.
 *
 * Time: t -> (cos, sin)(t f_i), f_i = 10000^(-i / (half - shift)), -> linear, SiLU, linear, SiLU,
 * and in every resnet a linear of its own, added between its convolutions. It depends
 * on the timestep only (time table), keys and values of the cross attention on the text only
 * (prompt cache).
 *
 * attention_head_dim in config.json is the number of heads: the misnomer is diffusers' own
 * (issue 2011), and every published UNet relies on it.
 * ======================================================================== */

#define SDQ__UN_SKIPS (SDQ__MD_LEVELS * (SDQ__MD_LAYERS + 1) + 1)

typedef struct sdq__unet {
    size_t levels, time_in, least;          /* least: height and width that a sample must have */
    int flip;                               /* cosines before sines */
    double shift;
    sdq_layer *conv_in, *conv_out;
    sdq_layer *time1, *time2, *cond;        /* cond: NULL or the guidance input of LCM */
    sdq__norm norm_out;
    sdq__level down[SDQ__MD_LEVELS], mid, up[SDQ__MD_LEVELS];
    sdq__resnet **resnet;                   /* all of them, by index */
    sdq__tblock **block;
    size_t resnets, resnet_cap, blocks, block_cap;
} sdq__unet;

static const char sdq__un_defaults[] = SDQ__MD_JSON({
    "_class_name": "UNet2DConditionModel", "sample_size": null, "in_channels": 4,
    "out_channels": 4, "center_input_sample": false, "flip_sin_to_cos": true, "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                         "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
                       "CrossAttnUpBlock2D"],
    "only_cross_attention": false, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": null,
    "encoder_hid_dim": null, "encoder_hid_dim_type": null, "attention_head_dim": 8,
    "num_attention_heads": null, "dual_cross_attention": false, "use_linear_projection": false,
    "class_embed_type": null, "addition_embed_type": null, "num_class_embeds": null,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": false,
    "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "time_embedding_dim": null, "time_embedding_act_fn": null, "timestep_post_act": null,
    "time_cond_proj_dim": null, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "class_embeddings_concat": false,
    "mid_block_only_cross_attention": null, "cross_attention_norm": null});

static const char *const sdq__un_fixed[] = {
    "_class_name", "addition_embed_type", "attention_type", "center_input_sample",
    "class_embed_type", "class_embeddings_concat", "conv_in_kernel", "conv_out_kernel",
    "cross_attention_norm", "dual_cross_attention", "encoder_hid_dim", "encoder_hid_dim_type",
    "mid_block_only_cross_attention", "mid_block_scale_factor", "num_class_embeds",
    "only_cross_attention", "resnet_out_scale_factor", "resnet_skip_time_act",
    "resnet_time_scale_shift", "reverse_transformer_layers_per_block", "time_embedding_act_fn",
    "time_embedding_type", "timestep_post_act"};

/* What the builder needs of config.json, and the channels of the skips pushed so far. */
typedef struct sdq__un_plan {
    size_t levels, channels[SDQ__MD_LEVELS], layers[SDQ__MD_LEVELS], heads[SDQ__MD_LEVELS];
    size_t depth[SDQ__MD_LEVELS], context, time, groups;
    int cross_down[SDQ__MD_LEVELS], cross_up[SDQ__MD_LEVELS], mid, linear, pad;
    float eps;
    size_t skip[SDQ__UN_SKIPS], skips;
} sdq__un_plan;

/* The number of levels: items of block_out_channels. */
static size_t sdq__md_levels(const sdq__builder *b, size_t *channels) {
    const sdq__json *v = sdq__md_get(b, "block_out_channels");
    if (!v || v->kind != SDQ__JS_ARRAY || v->count < 1 || v->count > SDQ__MD_LEVELS) {
        sdq__md_refuse(b, "block_out_channels", v, "a list of 1..8 channel counts");
        channels[0] = 1;
        return 1;
    }
    sdq__md_sizes(b, "block_out_channels", SDQ__MD_CHANNELS, v->count, channels);
    return v->count;
}

/* One text feeds all levels: a list of widths must repeat one. */
static size_t sdq__un_context(const sdq__builder *b, size_t levels) {
    size_t dim[SDQ__MD_LEVELS], i;
    sdq__md_sizes(b, "cross_attention_dim", SDQ__MD_CHANNELS, levels, dim);
    for (i = 1; i < levels; i++)
        if (dim[i] != dim[0])
            sdq__md_refuse(b, "cross_attention_dim", sdq__md_get(b, "cross_attention_dim"),
                           "the same for all levels");
    return dim[0];
}

static void sdq__un_read(const sdq__builder *b, sdq__un_plan *p, sdq__unet *u) {
    const sdq__json *mid = sdq__md_get(b, "mid_block_type");
    const sdq__json *heads = sdq__md_get(b, "num_attention_heads");
    const int named = heads && heads->kind != SDQ__JS_NULL;
    const size_t n = p->levels = u->levels = sdq__md_levels(b, p->channels);
    sdq__md_fixed(b, sdq__un_fixed, SDQ__COUNT(sdq__un_fixed));
    sdq__md_silu(b);
    sdq__md_kinds(b, "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D", n, p->cross_down);
    sdq__md_kinds(b, "up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", n, p->cross_up);
    sdq__md_sizes(b, "layers_per_block", SDQ__MD_LAYERS - 1, n, p->layers);
    sdq__md_sizes(b, named ? "num_attention_heads" : "attention_head_dim", SDQ__MD_CHANNELS, n,
                  p->heads);
    sdq__md_sizes(b, "transformer_layers_per_block", SDQ__MD_DEPTH, n, p->depth);
    p->context = sdq__un_context(b, n);
    p->mid = mid && mid->kind == SDQ__JS_STRING && !strcmp(mid->str, "UNetMidBlock2DCrossAttn");
    if (!p->mid && mid && mid->kind != SDQ__JS_NULL)
        sdq__md_refuse(b, "mid_block_type", mid, "\"UNetMidBlock2DCrossAttn\" or null");
    p->linear = sdq__md_flag(b, "use_linear_projection");
    p->groups = sdq__md_size(b, "norm_num_groups", SDQ__MD_CHANNELS);
    p->eps = sdq__md_float(b, "norm_eps", 0, 1);
    p->pad = (int)sdq__md_number(b, "downsample_padding", sdq__md_get(b, "downsample_padding"),
                                 0, 1, 1);
    p->time = sdq__md_size_or_null(b, "time_embedding_dim", SDQ__MD_CHANNELS);
    if (p->time == 0) p->time = 4 * p->channels[0];
    u->least = p->pad ? 1 : (size_t)1 << (n - 1);   /* without it every level halves downwards */
    u->time_in = p->channels[0];
    u->flip = sdq__md_flag(b, "flip_sin_to_cos");
    u->shift = (double)sdq__md_float(b, "freq_shift", 0, (double)(u->time_in / 2) - 0.5);
}

/* One side, a list of height and width, or null. StableDiffusionPipeline takes a side below 64 in
 * a file of diffusers before 0.9 for a mistake that those versions made. */
static void sdq__un_sample_size(const sdq__builder *b, sdq_model_info *info) {
    const sdq__json *v = sdq__md_get(b, "sample_size");
    const char *version = sdq__js_string(b->root, "_diffusers_version", "1");
    size_t side[2] = {0, 0};
    unsigned major = 0, minor = 0;
    const int list = v && v->kind == SDQ__JS_ARRAY;
    if (list && v->count != 2) sdq__md_refuse(b, "sample_size", v, "a side or [height, width]");
    else if (list) sdq__md_sizes(b, "sample_size", SDQ__MD_CHANNELS, 2, side);
    else side[0] = side[1] = sdq__md_size_or_null(b, "sample_size", SDQ__MD_CHANNELS);
    if (!list && side[0] && side[0] < 64 && sscanf(version, "%u.%u", &major, &minor) == 2
        && major == 0 && minor < 9) side[0] = side[1] = 64;
    info->sample_size = side[0];
    info->sample_width = side[1];
}

static void sdq__un_info(const sdq__builder *b, const sdq__un_plan *p, sdq_model_info *info) {
    info->in = sdq__md_size(b, "in_channels", SDQ__MD_CHANNELS);
    info->out = sdq__md_size(b, "out_channels", SDQ__MD_CHANNELS);
    info->context = p->context;
    info->factor = (size_t)1 << (p->levels - 1);
    info->guidance = sdq__md_size_or_null(b, "time_cond_proj_dim", SDQ__MD_CHANNELS);
    sdq__un_sample_size(b, info);
}

/* resnets.j of the current level, entered into the list of all. */
static void sdq__un_resnet_build(sdq__builder *b, const sdq__un_plan *p, sdq__level *l, size_t j,
                                 size_t in, size_t out, size_t split) {
    sdq__unet *u = b->model->unet;
    const size_t at = sdq__md_enter_item(b, "resnets", j);
    sdq__resnet *r = &l->resnet[j];
    sdq__bk_resnet_build(b, r, in, out, p->time, p->groups, p->eps, split);
    if (sdq__grow(b->ctx, (void **)(void *)&u->resnet, &u->resnet_cap, u->resnets + 1,
                  sizeof *u->resnet)) {
        r->index = u->resnets;
        u->resnet[u->resnets++] = r;
    }
    sdq__md_leave(b, at);
}

/* attentions.j of the current level, which has the settings of `level`. */
static void sdq__un_attn_build(sdq__builder *b, const sdq__un_plan *p, sdq__level *l, size_t j,
                               size_t level) {
    sdq__unet *u = b->model->unet;
    const size_t at = sdq__md_enter_item(b, "attentions", j);
    sdq__transformer *t = &l->attn[j];
    size_t i;
    sdq__bk_transformer_build(b, t, p->channels[level], p->context, p->heads[level],
                              p->depth[level], p->groups, p->linear);
    for (i = 0; i < t->count; i++) {
        if (!sdq__grow(b->ctx, (void **)(void *)&u->block, &u->block_cap, u->blocks + 1,
                       sizeof *u->block)) break;
        t->block[i].index = u->blocks;
        u->block[u->blocks++] = &t->block[i];
    }
    sdq__md_leave(b, at);
}

static void sdq__un_down_build(sdq__builder *b, sdq__un_plan *p, size_t i, size_t in) {
    sdq__level *l = &b->model->unet->down[i];
    const size_t out = p->channels[i], at = sdq__md_enter_item(b, "down_blocks", i);
    size_t j;
    if (!sdq__bk_level_new(b, l, p->layers[i], p->cross_down[i] ? p->layers[i] : 0)) return;
    for (j = 0; j < l->count; j++) {
        sdq__un_resnet_build(b, p, l, j, j ? out : in, out, 0);
        if (l->attn) sdq__un_attn_build(b, p, l, j, i);
        p->skip[p->skips++] = out;
    }
    if (i + 1 < p->levels) {
        l->resample = sdq__md_conv3(b, "downsamplers.0.conv", out, out, 2, p->pad);
        p->skip[p->skips++] = out;
    }
    sdq__md_leave(b, at);
}

static void sdq__un_mid_build(sdq__builder *b, const sdq__un_plan *p) {
    sdq__level *l = &b->model->unet->mid;
    const size_t last = p->levels - 1, c = p->channels[last], at = sdq__md_enter(b, "mid_block");
    if (!sdq__bk_level_new(b, l, 2, 1)) return;
    sdq__un_resnet_build(b, p, l, 0, c, c, 0);
    sdq__un_attn_build(b, p, l, 0, last);
    sdq__un_resnet_build(b, p, l, 1, c, c, 0);
    sdq__md_leave(b, at);
}

/* Returns the channels that leave the level. */
static size_t sdq__un_up_build(sdq__builder *b, sdq__un_plan *p, size_t i, size_t hidden) {
    sdq__level *l = &b->model->unet->up[i];
    const size_t level = p->levels - 1 - i, out = p->channels[level];
    const size_t count = p->layers[level] + 1, at = sdq__md_enter_item(b, "up_blocks", i);
    size_t j;
    if (!sdq__bk_level_new(b, l, count, p->cross_up[i] ? count : 0)) return out;
    for (j = 0; j < count; j++) {
        sdq__un_resnet_build(b, p, l, j, hidden + p->skip[--p->skips], out, hidden);
        if (l->attn) sdq__un_attn_build(b, p, l, j, level);
        hidden = out;
    }
    if (i + 1 < p->levels) l->resample = sdq__md_conv3(b, "upsamplers.0.conv", out, out, 1, 1);
    sdq__md_leave(b, at);
    return out;
}

static void sdq__un_build(sdq__builder *b) {
    sdq_model_info *info = &b->model->info;
    sdq__unet *u = b->model->unet = SDQ__NEW(b->ctx, sdq__unet);
    sdq__un_plan p;
    size_t i, c;
    if (!u) return;
    memset(&p, 0, sizeof p);
    sdq__un_read(b, &p, u);
    sdq__un_info(b, &p, info);
    if (b->ctx->status != SDQ_OK) return;
    c = p.channels[0];
    u->conv_in = sdq__md_conv3(b, "conv_in", info->in, c, 1, 1);
    u->time1 = sdq__md_linear(b, "time_embedding.linear_1", c, p.time, 1);
    if (info->guidance)
        u->cond = sdq__md_linear(b, "time_embedding.cond_proj", info->guidance, c, 0);
    u->time2 = sdq__md_linear(b, "time_embedding.linear_2", p.time, p.time, 1);
    p.skip[p.skips++] = c;
    for (i = 0; i < p.levels && b->ctx->status == SDQ_OK; i++)
        sdq__un_down_build(b, &p, i, i ? p.channels[i - 1] : c);
    if (p.mid && b->ctx->status == SDQ_OK) sdq__un_mid_build(b, &p);
    c = p.channels[p.levels - 1];
    for (i = 0; i < p.levels && b->ctx->status == SDQ_OK; i++) c = sdq__un_up_build(b, &p, i, c);
    u->norm_out = sdq__md_norm(b, "conv_norm_out", c, p.groups, p.eps);
    u->conv_out = sdq__md_conv3(b, "conv_out", c, info->out, 1, 1);
}

/* Self-attention with products of 8 or 16 bits, or, 0, in float. */
static void sdq__un_attention(sdq__unet *u, int bits) {
    size_t i;
    for (i = 0; i < u->blocks; i++) u->block[i]->self.bits = bits;
}

static void sdq__un_free(sdq_ctx *ctx, sdq__unet *u) {
    size_t i;
    if (!u) return;
    for (i = 0; i < SDQ__MD_LEVELS; i++) {
        sdq__bk_level_free(ctx, &u->down[i]);
        sdq__bk_level_free(ctx, &u->up[i]);
    }
    sdq__bk_level_free(ctx, &u->mid);
    sdq__free(ctx, (void *)u->resnet);
    sdq__free(ctx, (void *)u->block);
    sdq__free(ctx, u);
}

/* --- time --- */

/* e^x in double from +, -, *, / and ldexp only, as >>random does and for the same reason: equal on
 * every machine. x = k ln 2 + r, |r| <= 0.35; 0.35^17 / 17! < 2^-74. */
static double sdq__un_exp(double x) {
    const int k = (int)(x * 1.44269504088896340736 + (x < 0 ? -0.5 : 0.5));
    const double r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
    double y = 1.0;
    int i;
    for (i = 16; i >= 1; i--) y = 1.0 + y * r / i;
    return ldexp(y, k);
}

/* Sine and cosine waves of t in `dim` frequencies. Angles are rounded to float where torch does. */
static void sdq__un_waves(float *out, size_t dim, float t, double shift, int flip) {
    const size_t half = dim / 2;
    size_t i;
    for (i = 0; i < half; i++) {
        const float e = -9.2103403719761836f * (float)i / (float)((double)half - shift);
        const float angle = t * (float)sdq__un_exp((double)e);
        double sine, cosine;
        sdq__rng_sincos((double)(angle < 0 ? -angle : angle), &sine, &cosine);
        if (angle < 0) sine = -sine;
        out[flip ? half + i : i] = (float)sine;
        out[flip ? i : half + i] = (float)cosine;
    }
    if (dim % 2) out[dim - 1] = 0.0f;
}

/* silu of the time embedding of n timesteps: [n,time]. guidance NULL: without it. */
static sdq_tensor *sdq__un_time(sdq_ctx *ctx, const sdq_model *m, const float *timesteps,
                                const float *guidance, size_t n, sdq_mode mode) {
    const sdq__unet *u = m->unet;
    sdq_tensor *x = sdq_tensor_2d(ctx, n, u->time_in), *w;
    size_t i;
    if (!x) return NULL;
    /* beyond 10^6 the reduction of the angle is not exact any more; NaN fails as well */
    for (i = 0; i < n; i++)
        if (!(timesteps[i] >= -1e6f && timesteps[i] <= 1e6f)) {
            sdq__fail(ctx, SDQ_ERR_ARGUMENT, "UNet: timestep %g is not within +-10^6",
                      (double)timesteps[i]);
            return NULL;
        }
    for (i = 0; i < n; i++)
        sdq__un_waves(sdq_f32(x) + i * u->time_in, u->time_in, timesteps[i], u->shift, u->flip);
    if (guidance && u->cond) {      /* LCM, arXiv 2310.04378: waves of 1000 (scale - 1) */
        w = sdq_tensor_2d(ctx, n, m->info.guidance);
        if (!w) return NULL;
        for (i = 0; i < n; i++) {
            const float g = guidance[i];
            if (!(g >= -900.0f && g <= 900.0f)) {   /* 1000 g: the same limit as a timestep's */
                sdq__fail(ctx, SDQ_ERR_ARGUMENT, "UNet: guidance scale %g is not within +-900",
                          (double)g);
                return NULL;
            }
            sdq__un_waves(sdq_f32(w) + i * w->dim[1], w->dim[1], (g - 1.0f) * 1000.0f, 1.0, 0);
        }
        x = sdq_layer_forward(ctx, u->cond, w, x, mode);
    }
    x = sdq_silu(ctx, sdq_layer_forward(ctx, u->time1, x, NULL, mode));
    return sdq_silu(ctx, sdq_layer_forward(ctx, u->time2, x, NULL, mode));
}

/* --- caches --- */

struct sdq_prompt_cache {
    const sdq_model *model;
    sdq_mode mode;
    size_t n, blocks;
    sdq_tensor *kv;             /* keys, values of block 0, of block 1, .. */
};

struct sdq_time_table {
    const sdq_model *model;
    sdq_mode mode;
    size_t n, resnets;
    float *timestep;            /* [n] */
    float *guidance;            /* [n] or NULL */
    sdq_tensor *row;            /* per resnet [n,out] */
};

/* A heap copy of an arena tensor. */
static sdq_status sdq__un_store(sdq_ctx *ctx, sdq_tensor *to, const sdq_tensor *from) {
    if (!from) return ctx->status;
    SDQ__TRY(sdq__t_init(ctx, to, from->rank, from->dim));
    memcpy(to->data, from->data, sdq_tensor_count(from) * sizeof(float));
    return SDQ_OK;
}

SDQ_API void sdq_prompt_cache_free(sdq_ctx *ctx, sdq_prompt_cache *c) {
    size_t i;
    if (!c) return;
    for (i = 0; c->kv && i < 2 * c->blocks; i++) sdq__t_free(ctx, &c->kv[i]);
    sdq__free(ctx, c->kv);
    sdq__free(ctx, c);
}

SDQ_API sdq_status sdq_unet_prompt(sdq_ctx *ctx, const sdq_model *m, sdq_tensor *context,
                                   sdq_mode mode, sdq_prompt_cache **out) {
    const int recording = ctx->recording;
    sdq_mark mark;
    sdq_prompt_cache *c;
    sdq_status st = SDQ_ERR_OOM;
    size_t i;
    *out = NULL;
    if (!sdq__md_is(ctx, "sdq_unet_prompt", m, SDQ_PART_UNET)
        || !sdq__md_check(ctx, "sdq_unet_prompt: context", context, 3, m->info.context))
        return ctx->status;
    c = SDQ__NEW(ctx, sdq_prompt_cache);
    if (!c) return SDQ_ERR_OOM;
    ctx->recording = 0;
    c->model = m;
    c->mode = mode;
    c->n = context->dim[0];
    c->blocks = m->unet->blocks;
    c->kv = SDQ__NEW_N(ctx, sdq_tensor, 2 * c->blocks);
    if (!c->kv) goto done;
    for (i = 0; i < 2 * c->blocks; i++) {
        const sdq__attn *a = &m->unet->block[i / 2]->cross;
        mark = sdq_arena_mark(ctx);
        st = sdq__un_store(ctx, &c->kv[i],
                           sdq_layer_forward(ctx, i % 2 ? a->v : a->k, context, NULL, mode));
        sdq_arena_release(ctx, mark);
        if (st != SDQ_OK) goto done;
    }
    st = SDQ_OK;
done:
    ctx->recording = recording;
    if (st == SDQ_OK) *out = c;
    else sdq_prompt_cache_free(ctx, c);
    return st;
}

SDQ_API void sdq_time_table_free(sdq_ctx *ctx, sdq_time_table *t) {
    size_t i;
    if (!t) return;
    for (i = 0; t->row && i < t->resnets; i++) sdq__t_free(ctx, &t->row[i]);
    sdq__free(ctx, t->row);
    sdq__free(ctx, t->timestep);
    sdq__free(ctx, t->guidance);
    sdq__free(ctx, t);
}

static sdq_status sdq__un_fill_times(sdq_ctx *ctx, sdq_time_table *t) {
    const sdq__unet *u = t->model->unet;
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *time = sdq__un_time(ctx, t->model, t->timestep, t->guidance, t->n, t->mode);
    sdq_status st = time ? SDQ_OK : ctx->status;
    size_t i;
    for (i = 0; i < t->resnets && st == SDQ_OK; i++)
        st = sdq__un_store(ctx, &t->row[i],
                           sdq_layer_forward(ctx, u->resnet[i]->time, time, NULL, t->mode));
    sdq_arena_release(ctx, mark);
    return st;
}

SDQ_API sdq_status sdq_unet_times(sdq_ctx *ctx, const sdq_model *m, const float *timesteps,
                                  const float *guidance, size_t n, sdq_mode mode,
                                  sdq_time_table **out) {
    const int recording = ctx->recording;
    sdq_time_table *t;
    sdq_status st = SDQ_ERR_OOM;
    *out = NULL;
    if (!sdq__md_is(ctx, "sdq_unet_times", m, SDQ_PART_UNET)) return ctx->status;
    if (!timesteps || n == 0)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "sdq_unet_times: no timesteps given");
    t = SDQ__NEW(ctx, sdq_time_table);
    if (!t) return SDQ_ERR_OOM;
    ctx->recording = 0;
    t->model = m;
    t->mode = mode;
    t->n = n;
    t->resnets = m->unet->resnets;
    t->timestep = SDQ__NEW_N(ctx, float, n);
    t->row = SDQ__NEW_N(ctx, sdq_tensor, t->resnets);
    if (guidance) t->guidance = SDQ__NEW_N(ctx, float, n);
    if (!t->timestep || !t->row || (guidance && !t->guidance)) goto done;
    memcpy(t->timestep, timesteps, n * sizeof(float));
    if (guidance) memcpy(t->guidance, guidance, n * sizeof(float));
    st = sdq__un_fill_times(ctx, t);
done:
    ctx->recording = recording;
    if (st == SDQ_OK) *out = t;
    else sdq_time_table_free(ctx, t);
    return st;
}

/* --- forward --- */

typedef struct sdq__un_skip { sdq_tensor *t; sdq_mark mark; } sdq__un_skip;

/* One evaluation. It lives in the arena: with checkpointing the backward pass uses it again. */
typedef struct sdq__un_run {
    const sdq__unet *net;
    sdq_mode mode;
    int checkpoint;
    sdq_tensor *time;                   /* silu(embedding); a place holder with a table */
    sdq_tensor *context;                /* a place holder with a prompt cache */
    const sdq_prompt_cache *prompt;
    size_t prompt_first;
    const sdq_time_table *times;
    size_t *row;                        /* row of the time table, per entry */
    size_t n;
    sdq__un_skip skip[SDQ__UN_SKIPS];
    size_t skips;
} sdq__un_run;

typedef struct sdq__un_use { const sdq__un_run *run; const void *part; } sdq__un_use;

/* Run a block, through the tape's checkpoint if asked for. */
static sdq_tensor *sdq__un_call(sdq_ctx *ctx, const sdq__un_run *run, sdq_block_fn fn,
                                const void *part, sdq_tensor *x, sdq_tensor *extra) {
    sdq__un_use here, *use = &here;
    sdq_tensor *in[2];
    const int checkpoint = run->checkpoint && ctx->recording;
    if (!x || !extra) return NULL;
    if (checkpoint) use = SDQ__PUSH_N(ctx, sdq__un_use, 1);
    if (!use) return NULL;
    use->run = run;
    use->part = part;
    in[0] = x;
    in[1] = extra;
    return checkpoint ? sdq_checkpoint(ctx, fn, use, in, 2) : fn(ctx, use, in, 2);
}

/* The rows of a time table that belong to the entries. */
static sdq_tensor *sdq__un_gather(sdq_ctx *ctx, const sdq__un_run *run, const sdq_tensor *table) {
    const size_t c = table->dim[1];
    sdq_tensor *y = sdq_tensor_2d(ctx, run->n, c);
    size_t i;
    if (!y) return NULL;
    for (i = 0; i < run->n; i++)
        memcpy(sdq_f32(y) + i * c, sdq_f32(table) + run->row[i] * c, c * sizeof(float));
    return y;
}

static sdq_tensor *sdq__un_resnet_fn(sdq_ctx *ctx, void *user, sdq_tensor **in, int n) {
    const sdq__un_use *use = (const sdq__un_use *)user;
    const sdq__un_run *run = use->run;
    const sdq__resnet *r = (const sdq__resnet *)use->part;
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *time;
    (void)n;
    if (run->times) time = sdq__un_gather(ctx, run, &run->times->row[r->index]);
    else time = sdq_layer_forward(ctx, r->time, in[1], NULL, run->mode);
    return sdq__keep(ctx, mark, sdq__bk_resnet(ctx, r, in[0], time, run->mode));
}

/* Entries first.. of a cached tensor, not copied. */
static sdq_tensor *sdq__un_view(sdq_ctx *ctx, const sdq_tensor *t, size_t first, size_t n) {
    sdq_tensor *v = SDQ__PUSH_N(ctx, sdq_tensor, 1);
    if (!v) return NULL;
    *v = *t;
    v->data = sdq_f32(t) + first * t->dim[1] * t->dim[2];
    v->dim[0] = n;
    return v;
}

static sdq_tensor *sdq__un_tblock_fn(sdq_ctx *ctx, void *user, sdq_tensor **in, int n) {
    const sdq__un_use *use = (const sdq__un_use *)user;
    const sdq__un_run *run = use->run;
    const sdq__tblock *t = (const sdq__tblock *)use->part;
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *k, *v;
    (void)n;
    if (run->prompt) {
        k = sdq__un_view(ctx, &run->prompt->kv[2 * t->index], run->prompt_first, run->n);
        v = sdq__un_view(ctx, &run->prompt->kv[2 * t->index + 1], run->prompt_first, run->n);
    } else {
        k = sdq_layer_forward(ctx, t->cross.k, in[1], NULL, run->mode);
        v = sdq_layer_forward(ctx, t->cross.v, in[1], NULL, run->mode);
    }
    return sdq__keep(ctx, mark, sdq__bk_tblock(ctx, t, in[0], k, v, run->mode));
}

static sdq_tensor *sdq__un_transformer(sdq_ctx *ctx, const sdq__un_run *run,
                                       const sdq__transformer *t, sdq_tensor *x) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *h = sdq__md_normalize(ctx, &t->norm, x, 0), *y;
    size_t i;
    h = sdq__keep(ctx, mark, sdq_layer_forward(ctx, t->proj_in, h, NULL, run->mode));
    h = sdq__md_tokens(ctx, h);
    for (i = 0; i < t->count; i++) {
        const sdq_mark inner = sdq_arena_mark(ctx);
        h = sdq__keep(ctx, inner,
                      sdq__un_call(ctx, run, sdq__un_tblock_fn, &t->block[i], h, run->context));
    }
    if (!h || !x) return NULL;
    h = sdq_reshape(ctx, h, 4, x->dim);
    y = sdq_layer_forward(ctx, t->proj_out, h, x, run->mode);
    return sdq__keep(ctx, mark, y);
}

static void sdq__un_push(sdq__un_run *run, sdq_tensor *t, sdq_mark mark) {
    SDQ_ASSERT(run->skips < SDQ__UN_SKIPS);
    run->skip[run->skips].t = t;
    run->skip[run->skips++].mark = mark;
}

static sdq_tensor *sdq__un_down(sdq_ctx *ctx, sdq__un_run *run, const sdq__level *l,
                                sdq_tensor *x) {
    size_t j;
    for (j = 0; j < l->count; j++) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        x = sdq__un_call(ctx, run, sdq__un_resnet_fn, &l->resnet[j], x, run->time);
        if (l->attn) x = sdq__keep(ctx, mark, sdq__un_transformer(ctx, run, &l->attn[j], x));
        sdq__un_push(run, x, mark);
    }
    if (l->resample) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        x = sdq__keep(ctx, mark, sdq_layer_forward(ctx, l->resample, x, NULL, run->mode));
        sdq__un_push(run, x, mark);
    }
    return x;
}

static sdq_tensor *sdq__un_mid(sdq_ctx *ctx, const sdq__un_run *run, const sdq__level *l,
                               sdq_tensor *x) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    x = sdq__un_call(ctx, run, sdq__un_resnet_fn, &l->resnet[0], x, run->time);
    x = sdq__keep(ctx, mark, sdq__un_transformer(ctx, run, &l->attn[0], x));
    x = sdq__un_call(ctx, run, sdq__un_resnet_fn, &l->resnet[1], x, run->time);
    return sdq__keep(ctx, mark, x);
}

/* A skip lies below everything newer: when it has been used, the arena goes back to where the
 * skip began, and the result takes its place. */
static sdq_tensor *sdq__un_up(sdq_ctx *ctx, sdq__un_run *run, const sdq__level *l, sdq_tensor *x) {
    sdq__un_skip skip;
    size_t j;
    memset(&skip, 0, sizeof skip);
    for (j = 0; j < l->count; j++) {
        skip = run->skip[--run->skips];
        x = sdq__keep(ctx, skip.mark, sdq_concat(ctx, x, skip.t));
        x = sdq__un_call(ctx, run, sdq__un_resnet_fn, &l->resnet[j], x, run->time);
        x = sdq__keep(ctx, skip.mark, x);
        if (l->attn) x = sdq__keep(ctx, skip.mark, sdq__un_transformer(ctx, run, &l->attn[j], x));
    }
    if (!l->resample || !x) return x;
    {
        const sdq_tensor *next = run->skip[run->skips - 1].t;
        if (!next) return NULL;
        x = sdq_upsample(ctx, x, next->dim[1], next->dim[2]);
        return sdq__keep(ctx, skip.mark, sdq_layer_forward(ctx, l->resample, x, NULL, run->mode));
    }
}

/* Find the rows of the time table; the guidance must be what the table was made with. */
static sdq_status sdq__un_rows(sdq_ctx *ctx, sdq__un_run *run, const sdq_unet_input *in) {
    const sdq_time_table *t = in->times;
    size_t i, k;
    run->row = SDQ__PUSH_N(ctx, size_t, run->n);
    if (!run->row) return SDQ_ERR_OOM;
    for (i = 0; i < run->n; i++) {
        for (k = 0; k < t->n; k++)
            if (t->timestep[k] == in->timesteps[i] && !in->guidance == !t->guidance
                && (!t->guidance || t->guidance[k] == in->guidance[i])) break;
        if (k == t->n)
            return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "UNet: the time table has no row for timestep "
                             "%g with this guidance; make it with every timestep of the run",
                             (double)in->timesteps[i]);
        run->row[i] = k;
    }
    return SDQ_OK;
}

static sdq_status sdq__un_check(sdq_ctx *ctx, const sdq_model *m, const sdq_unet_input *in,
                                sdq_mode mode) {
    const sdq_prompt_cache *p = in ? in->prompt : NULL;
    size_t n;
    if (!in) return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "UNet: the input is NULL");
    if (!sdq__md_check(ctx, "UNet: sample", in->sample, 4, m->info.in)) return ctx->status;
    n = in->sample->dim[0];
    if (sdq__u_min(in->sample->dim[1], in->sample->dim[2]) < m->unet->least)
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "UNet: a sample of %zux%zu; this network "
                         "(\"downsample_padding\" 0) needs at least %zu each way",
                         in->sample->dim[1], in->sample->dim[2], m->unet->least);
    if (!in->timesteps) return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "UNet: timesteps is NULL");
    if (in->guidance && !m->info.guidance)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "UNet: this network has no guidance input "
                         "(time_cond_proj_dim in its config.json); leave guidance NULL");
    if ((p && (p->model != m || p->mode != mode))
        || (in->times && (in->times->model != m || in->times->mode != mode)))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "UNet: the prompt cache or the time table was made "
                         "with another model or in another mode");
    if (p) {
        if (in->prompt_first <= p->n && n <= p->n - in->prompt_first) return SDQ_OK;
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "UNet: entries %zu..%zu of a prompt cache of %zu",
                         in->prompt_first, in->prompt_first + n - 1, p->n);
    }
    if (!sdq__md_check(ctx, "UNet: context", in->context, 3, m->info.context)) return ctx->status;
    if (in->context->dim[0] == n) return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_SHAPE, "UNet: %zu samples but %zu contexts", n,
                     in->context->dim[0]);
}

static sdq_tensor *sdq__un_eval(sdq_ctx *ctx, sdq__un_run *run, sdq_tensor *sample) {
    const sdq__unet *u = run->net;
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *x = sdq_layer_forward(ctx, u->conv_in, sample, NULL, run->mode);
    size_t i;
    sdq__un_push(run, x, mark);
    for (i = 0; i < u->levels; i++) x = sdq__un_down(ctx, run, &u->down[i], x);
    if (u->mid.count) x = sdq__un_mid(ctx, run, &u->mid, x);
    for (i = 0; i < u->levels; i++) x = sdq__un_up(ctx, run, &u->up[i], x);
    x = sdq__md_normalize(ctx, &u->norm_out, x, 1);
    return sdq__keep(ctx, mark, sdq_layer_forward(ctx, u->conv_out, x, NULL, run->mode));
}

SDQ_API sdq_tensor *sdq_unet_forward(sdq_ctx *ctx, const sdq_model *m, const sdq_unet_input *in,
                                     sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__un_run *run;
    if (!sdq__md_is(ctx, "sdq_unet_forward", m, SDQ_PART_UNET)
        || sdq__un_check(ctx, m, in, mode) != SDQ_OK) return NULL;
    run = SDQ__PUSH_N(ctx, sdq__un_run, 1);
    if (!run) return NULL;
    memset(run, 0, sizeof *run);
    run->net = m->unet;
    run->mode = mode;
    run->checkpoint = in->checkpoint;
    run->prompt = in->prompt;
    run->prompt_first = in->prompt_first;
    run->times = in->times;
    run->n = in->sample->dim[0];
    run->context = in->prompt ? in->sample : in->context;
    if (!in->times) run->time = sdq__un_time(ctx, m, in->timesteps, in->guidance, run->n, mode);
    else if (sdq__un_rows(ctx, run, in) == SDQ_OK) run->time = in->sample;
    return sdq__keep(ctx, mark, run->time ? sdq__un_eval(ctx, run, in->sample) : NULL);
}

/* ===========================================================================
 * >>vae   picture to latent and back (AutoencoderKL; Kingma and Welling 2013, arXiv 1312.6114)
 *
 * encoder  conv_in, per level resnets and a convolution of stride 2 (zeros below and to the right
 *          only), middle, GroupNorm, SiLU, conv_out, quant_conv -> mean | log variance
 * decoder  post_quant_conv, conv_in, middle, per level one resnet more and nearest x 2 with a
 *          convolution, GroupNorm, SiLU, conv_out
 * middle   resnet, attention with one head over all pixels, resnet
 * ======================================================================== */

typedef struct sdq__vae_half {
    sdq_layer *conv_in, *conv_out, *quant;  /* quant: NULL when the configuration has none */
    sdq__level level[SDQ__MD_LEVELS], mid;
    sdq__norm attn_norm, norm_out;
    sdq__attn attn;
    int attends;
} sdq__vae_half;

typedef struct sdq__vae {
    size_t levels;
    sdq__vae_half encoder, decoder;
} sdq__vae;

static const char sdq__va_defaults[] = SDQ__MD_JSON({
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu", "latent_channels": 4,
    "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": null,
    "latents_mean": null, "latents_std": null, "use_quant_conv": true,
    "use_post_quant_conv": true, "mid_block_add_attention": true});

typedef struct sdq__va_plan {
    size_t levels, channels[SDQ__MD_LEVELS], layers, groups;
    int attends;
} sdq__va_plan;

static void sdq__va_resnet_build(sdq__builder *b, const sdq__va_plan *p, sdq__level *l, size_t j,
                                 size_t in, size_t out) {
    const size_t at = sdq__md_enter_item(b, "resnets", j);
    sdq__bk_resnet_build(b, &l->resnet[j], in, out, 0, p->groups, 1e-6f, 0);
    sdq__md_leave(b, at);
}

static void sdq__va_mid_build(sdq__builder *b, const sdq__va_plan *p, sdq__vae_half *h) {
    const size_t c = p->channels[p->levels - 1], at = sdq__md_enter(b, "mid_block");
    if (!sdq__bk_level_new(b, &h->mid, 2, 0)) return;
    sdq__va_resnet_build(b, p, &h->mid, 0, c, c);
    h->attends = p->attends;
    if (h->attends) {
        const size_t inner = sdq__md_enter_item(b, "attentions", 0);
        h->attn_norm = sdq__md_norm(b, "group_norm", c, p->groups, 1e-6f);
        sdq__bk_attn_build(b, &h->attn, c, c, 1, 1);
        sdq__md_leave(b, inner);
    }
    sdq__va_resnet_build(b, p, &h->mid, 1, c, c);
    sdq__md_leave(b, at);
}

/* Level i in the order of evaluation: `count` resnets, then `resample` unless it is the last. */
static void sdq__va_level_build(sdq__builder *b, const sdq__va_plan *p, sdq__vae_half *h,
                                size_t i, size_t in, size_t out, int up) {
    sdq__level *l = &h->level[i];
    const size_t at = sdq__md_enter_item(b, up ? "up_blocks" : "down_blocks", i);
    size_t j;
    if (!sdq__bk_level_new(b, l, p->layers + (up ? 1 : 0), 0)) return;
    for (j = 0; j < l->count; j++) sdq__va_resnet_build(b, p, l, j, j ? out : in, out);
    if (i + 1 < p->levels && up)
        l->resample = sdq__md_conv3(b, "upsamplers.0.conv", out, out, 1, 1);
    else if (i + 1 < p->levels)
        l->resample = sdq__md_conv3(b, "downsamplers.0.conv", out, out, 2, 0);
    if (l->resample && up) sdq__ly_set_upsamples(l->resample);
    sdq__md_leave(b, at);
}

static void sdq__va_encoder_build(sdq__builder *b, const sdq__va_plan *p, sdq__vae_half *h) {
    const sdq_model_info *info = &b->model->info;
    const size_t at = sdq__md_enter(b, "encoder"), top = p->channels[p->levels - 1];
    size_t i;
    h->conv_in = sdq__md_conv3(b, "conv_in", info->in, p->channels[0], 1, 1);
    for (i = 0; i < p->levels && b->ctx->status == SDQ_OK; i++)
        sdq__va_level_build(b, p, h, i, p->channels[i ? i - 1 : 0], p->channels[i], 0);
    if (b->ctx->status == SDQ_OK) sdq__va_mid_build(b, p, h);
    h->norm_out = sdq__md_norm(b, "conv_norm_out", top, p->groups, 1e-6f);
    h->conv_out = sdq__md_conv3(b, "conv_out", top, 2 * info->latent, 1, 1);
    sdq__md_leave(b, at);
}

static void sdq__va_decoder_build(sdq__builder *b, const sdq__va_plan *p, sdq__vae_half *h) {
    const sdq_model_info *info = &b->model->info;
    const size_t at = sdq__md_enter(b, "decoder"), n = p->levels;
    size_t i;
    h->conv_in = sdq__md_conv3(b, "conv_in", info->latent, p->channels[n - 1], 1, 1);
    if (b->ctx->status == SDQ_OK) sdq__va_mid_build(b, p, h);
    for (i = 0; i < n && b->ctx->status == SDQ_OK; i++)
        sdq__va_level_build(b, p, h, i, p->channels[i ? n - i : n - 1], p->channels[n - 1 - i], 1);
    h->norm_out = sdq__md_norm(b, "conv_norm_out", p->channels[0], p->groups, 1e-6f);
    h->conv_out = sdq__md_conv3(b, "conv_out", p->channels[0], info->out, 1, 1);
    sdq__md_leave(b, at);
}

static void sdq__va_read(sdq__builder *b, sdq__va_plan *p) {
    static const char *const fixed[] = {"_class_name", "latents_mean", "latents_std",
                                        "shift_factor"};
    sdq_model_info *info = &b->model->info;
    int same[SDQ__MD_LEVELS];
    sdq__md_fixed(b, fixed, SDQ__COUNT(fixed));
    sdq__md_silu(b);
    p->levels = sdq__md_levels(b, p->channels);
    sdq__md_kinds(b, "down_block_types", "DownEncoderBlock2D", "DownEncoderBlock2D", p->levels,
                  same);
    sdq__md_kinds(b, "up_block_types", "UpDecoderBlock2D", "UpDecoderBlock2D", p->levels, same);
    p->layers = sdq__md_size(b, "layers_per_block", SDQ__MD_LAYERS - 1);
    p->groups = sdq__md_size(b, "norm_num_groups", SDQ__MD_CHANNELS);
    p->attends = sdq__md_flag(b, "mid_block_add_attention");
    info->in = sdq__md_size(b, "in_channels", SDQ__MD_CHANNELS);
    info->out = sdq__md_size(b, "out_channels", SDQ__MD_CHANNELS);
    info->latent = sdq__md_size(b, "latent_channels", SDQ__MD_CHANNELS);
    info->factor = (size_t)1 << (p->levels - 1);
    info->scaling_factor = sdq__md_float(b, "scaling_factor", 1e-6, 1e6);
    (void)sdq__js_size(sdq__md_get(b, "sample_size"), &info->sample_size);
}

static void sdq__va_build(sdq__builder *b) {
    sdq__vae *v = b->model->vae = SDQ__NEW(b->ctx, sdq__vae);
    sdq__va_plan p;
    size_t c;
    int quant, post;
    if (!v) return;
    memset(&p, 0, sizeof p);
    sdq__va_read(b, &p);
    quant = sdq__md_flag(b, "use_quant_conv");
    post = sdq__md_flag(b, "use_post_quant_conv");
    if (b->ctx->status != SDQ_OK) return;
    v->levels = p.levels;
    c = b->model->info.latent;
    sdq__va_encoder_build(b, &p, &v->encoder);
    sdq__va_decoder_build(b, &p, &v->decoder);
    if (quant) v->encoder.quant = sdq__md_conv1(b, "quant_conv", 2 * c, 2 * c);
    if (post) v->decoder.quant = sdq__md_conv1(b, "post_quant_conv", c, c);
}

static void sdq__va_free(sdq_ctx *ctx, sdq__vae *v) {
    size_t i;
    if (!v) return;
    for (i = 0; i < SDQ__MD_LEVELS; i++) {
        sdq__bk_level_free(ctx, &v->encoder.level[i]);
        sdq__bk_level_free(ctx, &v->decoder.level[i]);
    }
    sdq__bk_level_free(ctx, &v->encoder.mid);
    sdq__bk_level_free(ctx, &v->decoder.mid);
    sdq__free(ctx, v);
}

static sdq_tensor *sdq__va_mid(sdq_ctx *ctx, const sdq__vae_half *v, sdq_tensor *x,
                               sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    x = sdq__bk_resnet(ctx, &v->mid.resnet[0], x, NULL, mode);
    if (v->attends && x) {
        sdq_tensor *t = sdq__md_tokens(ctx, x), *h = sdq__md_normalize(ctx, &v->attn_norm, x, 0);
        h = sdq__bk_self(ctx, &v->attn, sdq__md_tokens(ctx, h), t, mode);
        x = sdq__keep(ctx, mark, sdq_reshape(ctx, h, 4, x->dim));
    }
    return sdq__keep(ctx, mark, sdq__bk_resnet(ctx, &v->mid.resnet[1], x, NULL, mode));
}

static sdq_tensor *sdq__va_level(sdq_ctx *ctx, const sdq__level *l, sdq_tensor *x,
                                 sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    size_t j;
    for (j = 0; j < l->count; j++)
        x = sdq__keep(ctx, mark, sdq__bk_resnet(ctx, &l->resnet[j], x, NULL, mode));
    if (!l->resample || !x) return x;
    return sdq__keep(ctx, mark, sdq_layer_forward(ctx, l->resample, x, NULL, mode));
}

static sdq_tensor *sdq__va_out(sdq_ctx *ctx, const sdq__vae_half *v, sdq_tensor *x,
                               sdq_mode mode) {
    x = sdq__md_normalize(ctx, &v->norm_out, x, 1);
    return sdq_layer_forward(ctx, v->conv_out, x, NULL, mode);
}

SDQ_API sdq_tensor *sdq_vae_encode(sdq_ctx *ctx, const sdq_model *m, sdq_tensor *image,
                                   sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq__vae_half *v;
    sdq_tensor *x;
    size_t i;
    if (!sdq__md_is(ctx, "sdq_vae_encode", m, SDQ_PART_VAE)
        || !sdq__md_check(ctx, "sdq_vae_encode: image", image, 4, m->info.in)) return NULL;
    if (image->dim[1] < m->info.factor || image->dim[2] < m->info.factor) {
        sdq__fail(ctx, SDQ_ERR_SHAPE, "sdq_vae_encode: a picture of %zux%zu, but this VAE needs at "
                  "least %zu each way", image->dim[2], image->dim[1], m->info.factor);
        return NULL;
    }
    v = &m->vae->encoder;
    x = sdq_layer_forward(ctx, v->conv_in, image, NULL, mode);
    for (i = 0; i < m->vae->levels; i++)
        x = sdq__keep(ctx, mark, sdq__va_level(ctx, &v->level[i], x, mode));
    x = sdq__keep(ctx, mark, sdq__va_mid(ctx, v, x, mode));
    x = sdq__va_out(ctx, v, x, mode);
    if (v->quant) x = sdq_layer_forward(ctx, v->quant, x, NULL, mode);
    return sdq__keep(ctx, mark, x);
}

/* ---- decoding in bands ------------------------------------------------------------------------
 * The largest tensors of a decoder are the inputs and results of its last layers, and most of them
 * live for one layer only. In bands of rows they never exist whole: what stays is x and one more
 * tensor, between the two convolutions of a resnet, because the statistics of a group norm are
 * those of all pixels. The result takes the place of x, row by row.
 *
 * A 3x3 convolution sees one row beyond its band. Bands overlap by four: then Winograd's tiles, of
 * four rows, are those of the whole picture, and so is every bit. */

#define SDQ__VA_BAND ((size_t)32 << 20)     /* bytes of a band, about, at most */

/* Bytes of a band: an eighth of the largest tensor, the input of the last level. */
static size_t sdq__va_band_bytes(const sdq_model *m, const sdq_tensor *latent) {
    const sdq__level *last = &m->vae->decoder.level[m->vae->levels - 1];
    const size_t pixels = latent->dim[1] * latent->dim[2] * m->info.factor * m->info.factor;
    return sdq__u_min(SDQ__VA_BAND, pixels * last->resnet[0].conv1->in * sizeof(float) / 8);
}

/* Rows from..to are wanted; first..last are computed. */
typedef struct sdq__va_band { size_t from, to, first, last; } sdq__va_band;

/* The next band, of about so many bytes, of x or of a picture `scale` times as large; 0: there is
 * none. It has 32 rows at least, without which there would be no Winograd. */
static int sdq__va_cut(const sdq_tensor *x, size_t scale, size_t bytes, sdq__va_band *b) {
    const size_t h = x->dim[1] * scale, row = x->dim[2] * scale * x->dim[3] * sizeof(float);
    const size_t step = sdq__u_max(bytes / row / 4 * 4, 32), from = b->to;
    b->from = from;
    b->to = sdq__u_min(from + step, h);
    b->first = from < 4 ? 0 : from - 4;
    b->last = sdq__u_min(b->to + 4, h);
    if (b->last - b->first < 32) b->first = b->last < 32 ? 0 : (b->last - 32) / 4 * 4;
    return from < h;
}

/* Rows of a picture, not copied. */
static sdq_tensor *sdq__va_rows(sdq_ctx *ctx, const sdq_tensor *x, size_t first, size_t last) {
    sdq_tensor *v = x ? SDQ__PUSH_N(ctx, sdq_tensor, 1) : NULL;
    if (!v) return NULL;
    *v = *x;
    v->data = sdq_f32(x) + first * x->dim[2] * x->dim[3];
    v->dim[1] = last - first;
    return v;
}

/* The wanted rows of t, which holds first..last, to where y's rows are. */
static int sdq__va_put(const sdq_ctx *ctx, float *y, const sdq_tensor *t, const sdq__va_band *b) {
    const size_t row = t ? t->dim[2] * t->dim[3] : 0;
    if (t && !ctx->dry)
        memcpy(y + b->from * row, sdq_f32(t) + (b->from - b->first) * row,
               (b->to - b->from) * row * sizeof(float));
    return t != NULL;
}

/* Rows first..last of x, normalized and through SiLU, for layer l. */
static sdq_tensor *sdq__va_normed(sdq_ctx *ctx, const sdq_layer *l, const sdq_tensor *x,
                                  const sdq__va_band *b, const sdq__md_affine *f, sdq_mode mode) {
    const sdq_tensor *rows = sdq__va_rows(ctx, x, b->first, b->last);
    const int bytes = rows && sdq__ly_takes_bytes(l, rows, mode, 1);
    sdq_tensor *y = bytes ? sdq__ly_affine(ctx, l, rows, f->a, f->b)
                  : rows ? sdq__t_like(ctx, rows) : NULL;
    sdq__gn w;
    if (bytes) return y;
    if (!y) return NULL;
    sdq__op_gn_begin(ctx, &w, rows, 1);
    sdq__op_gn_apply(ctx, &w, f->a, f->b, y);
    return y;
}

/* layer(silu(norm(x))) to y. */
static int sdq__va_band_layer(sdq_ctx *ctx, const sdq__norm *n, sdq_layer *l, const sdq_tensor *x,
                              float *y, size_t bytes, sdq_mode mode) {
    sdq__md_affine f;
    sdq__va_band b;
    int ok = sdq__md_stats(ctx, n, x, &f);
    for (b.to = 0; ok && sdq__va_cut(x, 1, bytes, &b);) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        sdq_tensor *t = sdq__va_normed(ctx, l, x, &b, &f, mode);
        ok = sdq__va_put(ctx, y, sdq_layer_forward(ctx, l, t, NULL, mode), &b);
        sdq_arena_release(ctx, mark);
    }
    return ok;
}

/* A resnet; the result takes the place of x, whose channels are as many or more. */
static sdq_tensor *sdq__va_band_resnet(sdq_ctx *ctx, const sdq__resnet *r, sdq_tensor *x,
                                       size_t bytes, sdq_mode mode) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *h = sdq__t_chans(ctx, x, r->out);
    sdq__md_affine f;
    sdq__va_band b;
    int ok;
    SDQ_ASSERT(x->dim[3] >= r->out);
    ok = h && sdq__va_band_layer(ctx, &r->norm1, r->conv1, x, sdq_f32(h), bytes,
                                     mode)
          && sdq__md_stats(ctx, &r->norm2, h, &f);
    for (b.to = 0; ok && sdq__va_cut(h, 1, bytes, &b);) {
        const sdq_mark inner = sdq_arena_mark(ctx);
        sdq_tensor *t = sdq__va_normed(ctx, r->conv2, h, &b, &f, mode);
        /* the rows before b.from have been replaced: what they become here is not wanted */
        sdq_tensor *res = sdq__va_rows(ctx, x, b.first, b.last);
        if (r->shortcut) res = sdq_layer_forward(ctx, r->shortcut, res, NULL, mode);
        ok = res && sdq__va_put(ctx, sdq_f32(x),
                                sdq_layer_forward(ctx, r->conv2, t, res, mode), &b);
        sdq_arena_release(ctx, inner);
    }
    sdq_arena_release(ctx, mark);
    x->dim[3] = r->out;
    return ok ? x : NULL;
}

static sdq_tensor *sdq__va_band_up(sdq_ctx *ctx, sdq_layer *l, const sdq_tensor *x, size_t bytes,
                                   sdq_mode mode) {
    sdq_tensor *y = sdq_tensor_4d(ctx, 1, 2 * x->dim[1], 2 * x->dim[2], l->out);
    sdq__va_band b;
    int ok = y != NULL;
    for (b.to = 0; ok && sdq__va_cut(x, 2, bytes, &b);) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        sdq_tensor *t = sdq__va_rows(ctx, x, b.first / 2, b.last / 2);
        ok = sdq__va_put(ctx, sdq_f32(y), sdq_layer_forward(ctx, l, t, NULL, mode), &b);
        sdq_arena_release(ctx, mark);
    }
    return ok ? y : NULL;
}

static sdq_tensor *sdq__va_band_level(sdq_ctx *ctx, const sdq__level *l, sdq_tensor *x,
                                      sdq_mark mark, size_t bytes, sdq_mode mode) {
    size_t j;
    for (j = 0; x && j < l->count; j++) {
        const sdq__resnet *r = &l->resnet[j];   /* published decoders never grow on the way */
        x = sdq__keep(ctx, mark, x->dim[3] >= r->out
                                     ? sdq__va_band_resnet(ctx, r, x, bytes, mode)
                                     : sdq__bk_resnet(ctx, r, x, NULL, mode));
    }
    if (!x || !l->resample) return x;
    return sdq__keep(ctx, mark, sdq__va_band_up(ctx, l->resample, x, bytes, mode));
}

static sdq_tensor *sdq__va_band_out(sdq_ctx *ctx, const sdq__vae_half *v, const sdq_tensor *x,
                                    size_t bytes, sdq_mode mode) {
    sdq_tensor *y = x ? sdq__t_chans(ctx, x, v->conv_out->out) : NULL;
    int ok = y && sdq__va_band_layer(ctx, &v->norm_out, v->conv_out, x, sdq_f32(y), bytes, mode);
    return ok ? y : NULL;
}

/* A pixel's result does not depend on pixels that its layer does not read. */
static int sdq__va_bands_fit(sdq_ctx *ctx, const sdq_model *m, const sdq_tensor *latent,
                             sdq_mode mode) {
    size_t i;
    if (ctx->recording || mode == SDQ_FAKE || latent->dim[0] != 1) {
        sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "sdq_vae_decode_tiled: one picture at a time, in FLOAT "
                  "or INT8 mode, and not while the tape records");
        return 0;
    }
    for (i = 0; mode == SDQ_INT8 && i < m->layers; i++) {
        const sdq_layer *l = m->layer[i];
        const sdq_range range = sdq__ly_range(l);
        if (!sdq__ly_is_int8(l) || range == SDQ_RANGE_POSITION || range == SDQ_RANGE_BLOCK)
            continue;
        sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "sdq_vae_decode_tiled: layer %s has one range for the "
                  "whole picture; use ranges per position or block", l->name);
        return 0;
    }
    return 1;
}

/* bytes: of a band; 0: no bands. */
static sdq_tensor *sdq__va_decode(sdq_ctx *ctx, const sdq_model *m, sdq_tensor *latent,
                                  sdq_mode mode, size_t bytes) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq__vae_half *v = &m->vae->decoder;
    sdq_tensor *x = latent;
    size_t i;
    if (v->quant) x = sdq_layer_forward(ctx, v->quant, x, NULL, mode);
    x = sdq_layer_forward(ctx, v->conv_in, x, NULL, mode);
    x = sdq__keep(ctx, mark, sdq__va_mid(ctx, v, x, mode));
    for (i = 0; i < m->vae->levels; i++)
        x = bytes ? sdq__va_band_level(ctx, &v->level[i], x, mark, bytes, mode)
                  : sdq__keep(ctx, mark, sdq__va_level(ctx, &v->level[i], x, mode));
    x = bytes ? sdq__va_band_out(ctx, v, x, bytes, mode) : sdq__va_out(ctx, v, x, mode);
    return sdq__keep(ctx, mark, x);
}

SDQ_API sdq_tensor *sdq_vae_decode(sdq_ctx *ctx, const sdq_model *m, sdq_tensor *latent,
                                   sdq_mode mode) {
    if (!sdq__md_is(ctx, "sdq_vae_decode", m, SDQ_PART_VAE)
        || !sdq__md_check(ctx, "sdq_vae_decode: latent", latent, 4, m->info.latent)) return NULL;
    return sdq__va_decode(ctx, m, latent, mode, 0);
}

SDQ_API sdq_tensor *sdq_vae_decode_tiled(sdq_ctx *ctx, const sdq_model *m, sdq_tensor *latent,
                                         sdq_mode mode) {
    if (!sdq__md_is(ctx, "sdq_vae_decode_tiled", m, SDQ_PART_VAE)
        || !sdq__md_check(ctx, "sdq_vae_decode_tiled: latent", latent, 4, m->info.latent)
        || !sdq__va_bands_fit(ctx, m, latent, mode)) return NULL;
    return sdq__va_decode(ctx, m, latent, mode, sdq__va_band_bytes(m, latent));
}

/* ===========================================================================
 * >>model-file   load, start from random numbers, save, list
 * ======================================================================== */

/* What belongs to each part. weights: the name of its file without .safetensors. */
typedef struct sdq__md_kind {
    const char *name, *weights, *defaults;
    void (*build)(sdq__builder *b);
} sdq__md_kind;

static const sdq__md_kind sdq__md_kinds_of[SDQ_PART_COUNT] = {
    {"?", "", "{}", NULL},
    {"text_encoder", "model", sdq__tx_defaults, sdq__tx_build},
    {"unet", "diffusion_pytorch_model", sdq__un_defaults, sdq__un_build},
    {"vae", "diffusion_pytorch_model", sdq__va_defaults, sdq__va_build}};

SDQ_API const char *sdq_part_name(sdq_part part) {
    return sdq__md_kinds_of[(unsigned)part < SDQ_PART_COUNT ? part : SDQ_PART_NONE].name;
}

static sdq_tensor *sdq__md_tensor(const sdq__param *p) {
    if (!p->layer) return p->own;
    return p->rank > 1 ? sdq_layer_weight(p->layer) : sdq_layer_bias(p->layer);
}

SDQ_API void sdq_model_free(sdq_ctx *ctx, sdq_model *m) {
    size_t i;
    if (!m) return;
    for (i = 0; i < m->params; i++) {
        if (m->param[i].own) sdq__t_free(ctx, m->param[i].own);
        sdq__free(ctx, m->param[i].own);
        sdq__free(ctx, m->param[i].name);
    }
    for (i = 0; i < m->layers; i++) sdq_layer_free(ctx, m->layer[i]);
    sdq__tx_free(ctx, m->text);
    sdq__un_free(ctx, m->unet);
    sdq__va_free(ctx, m->vae);
    sdq__free(ctx, m->param);
    sdq__free(ctx, (void *)m->layer);
    sdq__free(ctx, m->config);
    sdq__free(ctx, m);
}

/* The network with zero weights from the text of its configuration; file names it in sentences.
 * src: NULL, or the checkpoint that must have all of its tensors. */
static sdq_status sdq__md_create(sdq_ctx *ctx, const char *file, const char *text, size_t len,
                                 sdq_part part, const sdq__sf_source *src,
                                 sdq__md_bare bare, sdq_model **out) {
    const sdq__md_kind *kind = &sdq__md_kinds_of[part];
    sdq__builder b;
    sdq__json *root = NULL, *defaults = NULL;
    sdq_status st = SDQ_ERR_OOM;
    *out = NULL;
    memset(&b, 0, sizeof b);
    b.ctx = ctx;
    b.file = file;
    b.src = src;
    b.bare = bare;
    b.model = SDQ__NEW(ctx, sdq_model);
    if (!b.model) return st;
    b.model->info.part = part;
    b.model->config = sdq__strdup(ctx, text);
    if (!b.model->config) goto done;
    SDQ__TRY_DONE(sdq__js_parse(ctx, text, len, file, &root));
    SDQ__TRY_DONE(sdq__js_parse(ctx, kind->defaults, strlen(kind->defaults), kind->name,
                                &defaults));
    if (root->kind != SDQ__JS_OBJECT) {
        st = sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: not a JSON object", file);
        goto done;
    }
    b.root = root;
    b.defaults = defaults;
    kind->build(&b);
    st = ctx->status;
done:
    sdq__js_free(ctx, root);
    sdq__js_free(ctx, defaults);
    if (st == SDQ_OK) *out = b.model;
    else sdq_model_free(ctx, b.model);
    return st;
}

/* The network's own folder with a '/' behind it: the subfolder of that name, or `folder` itself. (A
 * pipeline's folder may have a config.json, too, which belongs to none of its networks.) */
static sdq_status sdq__md_folder(sdq_ctx *ctx, const char *folder, sdq_part part, char **out) {
    const char *name = sdq_part_name(part), *slash;
    int i;
    *out = NULL;
    slash = *folder && !sdq__io_ends(folder, "/") ? "/" : "";
    for (i = 0; i < 2; i++) {
        char sub[32] = "", *dir, *config;
        int found;
        if (i == 0) (void)snprintf(sub, sizeof sub, "%s/", name);
        dir = sdq__io_join(ctx, folder, slash, sub);
        config = dir ? sdq__io_join(ctx, dir, "config.json", "") : NULL;
        if (!config) { sdq__free(ctx, dir); return SDQ_ERR_OOM; }
        found = sdq__io_exists(config);
        sdq__free(ctx, config);
        if (found) { *out = dir; return SDQ_OK; }
        sdq__free(ctx, dir);
    }
    return sdq__fail(ctx, SDQ_ERR_MISSING, "%s: holds no config.json, nor does its folder %s: not "
                     "a diffusers model", *folder ? folder : "(empty path)", name);
}

/* A network's configuration and, when asked for, its arrays: of a folder or of a single file. */
typedef struct sdq__md_place {
    char *file;             /* what the configuration is from, for sentences */
    sdq__str config;
    sdq__st_set *set;       /* NULL: not asked for */
    sdq__sf_source src;
} sdq__md_place;

static void sdq__md_place_close(sdq_ctx *ctx, sdq__md_place *p) {
    sdq__st_set_close(ctx, p->set);
    sdq__str_free(ctx, &p->config);
    sdq__free(ctx, p->file);
}

static sdq_status sdq__md_place_folder(sdq_ctx *ctx, const char *folder, sdq_part part,
                                       int weights, sdq__md_place *p) {
    char *dir = NULL, *stem = NULL;
    sdq_status st;
    SDQ__TRY(sdq__md_folder(ctx, folder, part, &dir));
    st = SDQ_ERR_OOM;
    p->src.part = part;
    p->file = sdq__io_join(ctx, dir, "config.json", "");
    stem = sdq__io_join(ctx, dir, sdq__md_kinds_of[part].weights, "");
    if (!p->file || !stem) goto done;
    if (weights) SDQ__TRY_DONE(sdq__st_set_open(ctx, stem, NULL, &p->set));
    p->src.set = p->set;
    st = sdq__io_read_text(ctx, p->file, (size_t)1 << 20, &p->config.s, &p->config.len);
done:
    sdq__free(ctx, stem);
    sdq__free(ctx, dir);
    return st;
}

/* Close it whatever is returned. */
static sdq_status sdq__md_place_open(sdq_ctx *ctx, const char *path, sdq_part part, int weights,
                                     sdq__md_place *p) {
    memset(p, 0, sizeof *p);
    if (ctx->status != SDQ_OK) return ctx->status;
    if (!path || part <= SDQ_PART_NONE || part >= SDQ_PART_COUNT)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "model: path is NULL or part %d is not valid",
                         (int)part);
    if (!sdq__io_is_file(path)) return sdq__md_place_folder(ctx, path, part, weights, p);
    p->file = sdq__strdup(ctx, path);
    if (!p->file) return SDQ_ERR_OOM;
    SDQ__TRY(sdq__st_set_file(ctx, path, &p->set));
    return sdq__sf_open(ctx, p->set, part, &p->src, &p->config);
}

/* One output channel's kernel between [ic][plane] (diffusers) and [plane][ic] (here): numbers of 2,
 * 4 or 8 bytes, at any address. */
static void sdq__md_turn(void *to, const void *from, size_t rows, size_t cols, size_t size) {
    const char *p = (const char *)from;
    char *q = (char *)to;
    size_t i, j;
#define SDQ__TURN(bytes) \
    for (i = 0; i < rows; i++) \
        for (j = 0; j < cols; j++, p += bytes) memcpy(q + (j * rows + i) * bytes, p, bytes)
    if (rows == 1 || cols == 1) memcpy(to, from, rows * cols * size);
    else if (size == 2) SDQ__TURN(2);
    else if (size == 4) SDQ__TURN(4);
    else SDQ__TURN(8);
#undef SDQ__TURN
}

/* ---- the numbers of a file: a task per parameter ----
 * Panels of 32 output channels are turned, made floats, hashed and stored or packed while they are
 * in the cache, and their pages are let go. So reading needs no memory beside what it makes. */

/* An entry that has been checked and the parameter that it becomes. */
typedef struct sdq__md_job {
    const sdq__param *p;
    const sdq_file *file;
    sdq_entry e;
    size_t rows, panel;         /* a vector is one row; numbers in a panel */
    uint64_t hash;              /* of the parameter as it was loaded: float, in the order of this
                                 * library. How the file stored it does not matter. */
} sdq__md_job;

typedef struct sdq__md_reader {
    const struct sdq__kernels *k;
    sdq__md_job *job;
    size_t jobs, raw, floats;   /* bytes of the largest panel as it is in the file, and as floats */
    char *scratch;              /* both, per thread */
} sdq__md_reader;

static sdq_status sdq__md_reader_open(sdq_ctx *ctx, const sdq_model *m, sdq__md_reader *r) {
    memset(r, 0, sizeof *r);
    r->k = ctx->k;
    r->job = SDQ__PUSH_N(ctx, sdq__md_job, m->params);
    return ctx->status;
}

/* pack: the weights of a layer that has none yet. Those of halves stay halves. */
static sdq_status sdq__md_reader_add(sdq_ctx *ctx, sdq__md_reader *r, const sdq__param *p,
                                     const sdq_file *file, const sdq_entry *e, int pack) {
    sdq__md_job *j = &r->job[r->jobs++];
    if (pack) SDQ__TRY(sdq__ly_new_packed(ctx, p->layer, e->dtype == SDQ_F16));
    j->p = p;
    j->file = file;
    j->e = *e;
    j->rows = p->rank == 1 ? 1 : p->dim[0];
    j->panel = sdq__u_min(SDQ__NR, j->rows) * (sdq_entry_count(e) / j->rows);
    r->raw = sdq__u_max(r->raw, sdq__u_round_up(j->panel * sdq__u_dtype_size(e->dtype),
                                                SDQ__ALIGN));
    r->floats = sdq__u_max(r->floats, sdq__u_round_up(j->panel * sizeof(float), SDQ__ALIGN));
    return SDQ_OK;
}

static void sdq__md_read_task(void *arg, size_t task, int thread) {
    const sdq__md_reader *r = (const sdq__md_reader *)arg;
    sdq__md_job *job = &r->job[task];
    const sdq__param *p = job->p;
    const sdq_tensor *t = sdq__md_tensor(p);    /* NULL: to be packed */
    const size_t plane = p->dim[2] * p->dim[3], k = sdq_entry_count(&job->e) / job->rows;
    const size_t size = sdq__u_dtype_size(job->e.dtype);
    char *raw = r->scratch + (size_t)thread * (r->raw + r->floats);
    sdq__hash hash = sdq__u_hash_array(p->name, (size_t)p->rank, p->dim);
    sdq_entry e = job->e;
    size_t o, i, n;
    for (o = 0; o < job->rows; o += n, e.data = (const char *)e.data + e.bytes) {
        float *x = t ? sdq_f32(t) + o * k : (float *)(void *)(raw + r->raw);
        n = sdq__u_min(SDQ__NR, job->rows - o);
        e.bytes = n * k * size;
        for (i = 0; i < n; i++)
            sdq__md_turn(raw + i * k * size, (const char *)e.data + i * k * size, k / plane, plane,
                         size);
        sdq__st_to_f32(r->k, e.dtype, raw, n * k, x);
        sdq__u_hash_add(&hash, x, n * k * sizeof(float));
        if (!t) sdq__ly_pack_panel(p->layer, o / SDQ__NR, p->layer->wh ? (const void *)raw : x);
        sdq__st_forget(job->file, &e);
    }
    job->hash = sdq__u_hash_end(&hash);
}

static sdq_status sdq__md_reader_run(sdq_ctx *ctx, sdq__md_reader *r) {
    const size_t threads = (size_t)ctx->threads;
    r->scratch = SDQ__PUSH_N(ctx, char, threads * (r->raw + r->floats));
    if (!r->scratch) return ctx->status;
    sdq__mem_note(ctx, threads * r->raw);       /* the file's pages */
    sdq__par_for(ctx, r->jobs, sdq__md_read_task, r);
    return SDQ_OK;
}

/* Some entry has no parameter: name the first that is not known to be dead weight. */
static sdq_status sdq__md_surplus(sdq_ctx *ctx, const sdq__sf_source *src, const sdq_model *m) {
    const size_t n = sdq__st_set_count(src->set);
    char *used = SDQ__NEW_N(ctx, char, n), shape[192];
    sdq_status st = used ? SDQ_OK : SDQ_ERR_OOM;
    sdq_entry e;
    size_t i;
    for (i = 0; used && i < m->params; i++)
        if (sdq__md_find(src, m->param[i].name, &e)) used[sdq__st_set_place(src->set, e.name)] = 1;
    for (i = 0; st == SDQ_OK && i < n; i++) {
        const sdq_entry *left = sdq__st_set_entry(src->set, i);
        if (used[i] || sdq__sf_dead(&s, left->name)) continue;
        sdq__md_shape(left->rank, left->dim, shape, sizeof shape);
        st = sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: %s %s has no place in the network that %s "
                       "describes", src->set->path, left->name, shape, sdq__md_asks(src));
    }
    sdq__free(ctx, used);
    return st;
}

/* frozen: layers are packed as they are read. The hash, for int8 files and caches, is never 0,
 * which says that weights came from no file. */
static sdq_status sdq__md_fill(sdq_ctx *ctx, sdq_model *m, const sdq__sf_source *src, int frozen) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__md_reader r;
    uint64_t hash = 0;
    sdq_entry e;
    size_t i;
    SDQ__TRY(sdq__md_reader_open(ctx, m, &r));
    for (i = 0; i < m->params; i++) {
        const sdq__param *p = &m->param[i];
        if (sdq__md_find(src, p->name, &e))
            SDQ__TRY(sdq__md_reader_add(ctx, &r, p, sdq__st_set_file_of(src->set, &e), &e,
                                        frozen && p->layer && p->rank > 1));
    }
    SDQ__TRY(sdq__md_reader_run(ctx, &r));
    for (i = 0; i < r.jobs && !ctx->dry; i++) hash += r.job[i].hash;
    m->source = hash ? hash : 1;
    sdq_arena_release(ctx, mark);
    return sdq__md_surplus(ctx, src, m);
}

static sdq_status sdq__md_load(sdq_ctx *ctx, const char *path, sdq_part part, int frozen,
                               sdq_model **out) {
    sdq__md_place p;
    sdq_model *m = NULL;
    sdq_status st;
    *out = NULL;
    SDQ__TRY_DONE(sdq__md_place_open(ctx, path, part, 1, &p));
    SDQ__TRY_DONE(sdq__md_create(ctx, p.file, p.config.s, p.config.len, part, &p.src,
                                 frozen ? SDQ__MD_NO_WEIGHTS : SDQ__MD_WHOLE, &m));
    st = sdq__md_fill(ctx, m, &p.src, frozen);
done:
    sdq__md_place_close(ctx, &p);
    if (st == SDQ_OK) *out = m;
    else sdq_model_free(ctx, m);
    return st;
}
/* What loading would give, and whether the checkpoint has everything that is asked for. */
static sdq_status sdq__md_look(sdq_ctx *ctx, const char *path, sdq_part part,
                               sdq_model_info *info) {
    sdq__md_place p;
    sdq_model *m = NULL;
    sdq_status st;
    SDQ__TRY_DONE(sdq__md_place_open(ctx, path, part, 1, &p));
    SDQ__TRY_DONE(sdq__md_create(ctx, p.file, p.config.s, p.config.len, part, &p.src,
                                 SDQ__MD_SHAPES, &m));
    *info = m->info;
    st = sdq__md_surplus(ctx, &p.src, m);
done:
    sdq__md_place_close(ctx, &p);
    sdq_model_free(ctx, m);
    return st;
}
SDQ_API sdq_status sdq_model_load(sdq_ctx *ctx, const char *path, sdq_part part,
                                  sdq_model **out) {
    return out ? sdq__md_load(ctx, path, part, 0, out) : SDQ_ERR_ARGUMENT;
}
SDQ_API sdq_status sdq_model_load_packed(sdq_ctx *ctx, const char *path, sdq_part part,
                                         sdq_model **out) {
    return out ? sdq__md_load(ctx, path, part, 1, out) : SDQ_ERR_ARGUMENT;
}

SDQ_API sdq_status sdq_model_freeze(sdq_ctx *ctx, sdq_model *m) {
    size_t i;
    for (i = 0; i < m->layers; i++) SDQ__TRY(sdq__ly_freeze(ctx, m->layer[i]));
    return SDQ_OK;
}

/* (Emoji model: 56 dB from the float decoder.) */
SDQ_API sdq_status sdq_vae_quantize(sdq_ctx *ctx, sdq_model *vae, sdq_range range) {
    size_t i;
    if (!sdq__md_is(ctx, "sdq_vae_quantize", vae, SDQ_PART_VAE)) return ctx->status;
    for (i = 0; i < vae->layers; i++) {
        sdq_layer *l = vae->layer[i];
        sdq_quant q = sdq_layer_quant(l);
        q.enabled = sdq__io_starts(l->name, "decoder.") && !sdq__io_ends(l->name, ".conv_in")
                 && !sdq__io_ends(l->name, ".conv_out");
        q.range = range == SDQ_RANGE_DEFAULT ? SDQ_RANGE_POSITION : range;
        SDQ__TRY(sdq_layer_set_quant(ctx, l, &q));
        SDQ__TRY(sdq_layer_convert(ctx, l));
    }
    return sdq_model_freeze(ctx, vae);
}

/* The network as its configuration describes it, no number of its checkpoint read. */
static sdq_status sdq__md_structure(sdq_ctx *ctx, const char *path, sdq_part part,
                                    sdq__md_bare bare, sdq_model **out) {
    sdq__md_place p;
    sdq_status st = sdq__md_place_open(ctx, path, part, 0, &p);
    *out = NULL;
    if (st == SDQ_OK)
        st = sdq__md_create(ctx, p.file, p.config.s, p.config.len, part,
                            p.set ? &p.src : NULL, bare, out);
    sdq__md_place_close(ctx, &p);
    return st;
}

/* Numbers are drawn in diffusers' layout, output channel after output channel. */
static sdq_status sdq__md_draw(sdq_ctx *ctx, const sdq__param *p, sdq_rng *rng) {
    float *x = sdq_f32(sdq__md_tensor(p)), *buf;
    const size_t plane = p->dim[2] * p->dim[3], ic = p->dim[1], row = ic * plane;
    const float low = (float)-p->value, width = (float)p->value - low;
    const sdq_mark mark = sdq_arena_mark(ctx);
    size_t i, o;
    if (p->init == SDQ__MD_NORMAL) {
        sdq_rng_normal(rng, x, p->dim[0] * row);
        for (i = 0; i < p->dim[0] * row; i++) x[i] *= (float)p->value;
        return SDQ_OK;
    }
    if (p->init == SDQ__MD_CONSTANT) {
        for (i = 0; i < p->dim[0] * row; i++) x[i] = (float)p->value;
        return SDQ_OK;
    }
    buf = SDQ__PUSH_N(ctx, float, row);
    if (!buf) return SDQ_ERR_OOM;
    for (o = 0; o < p->dim[0]; o++) {
        sdq_rng_uniform(rng, buf, row);
        for (i = 0; i < row; i++) buf[i] = fmaf(buf[i], width, low);   /* one rounding, as torch */
        sdq__md_turn(x + o * row, buf, ic, plane, sizeof(float));
    }
    sdq_arena_release(ctx, mark);
    return SDQ_OK;
}

SDQ_API sdq_status sdq_model_init(sdq_ctx *ctx, const char *path, sdq_part part, uint64_t seed,
                                  sdq_model **out) {
    sdq_model *m = NULL;
    sdq_rng rng;
    sdq_status st;
    size_t i;
    if (!out) return SDQ_ERR_ARGUMENT;
    *out = NULL;
    st = sdq__md_structure(ctx, path, part, SDQ__MD_WHOLE, &m);
    if (st != SDQ_OK) return st;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, seed);
    for (i = 0; i < m->params && st == SDQ_OK; i++) st = sdq__md_draw(ctx, &m->param[i], &rng);
    if (st == SDQ_OK) *out = m;
    else sdq_model_free(ctx, m);
    return st;
}

SDQ_API sdq_model_info sdq_model_get_info(const sdq_model *m) { return m->info; }

SDQ_API size_t sdq_model_param_count(const sdq_model *m) { return m->params; }

SDQ_API sdq_tensor *sdq_model_param(const sdq_model *m, size_t i, const char **name) {
    if (name) *name = i < m->params ? m->param[i].name : "";
    return i < m->params ? sdq__md_tensor(&m->param[i]) : NULL;
}

SDQ_API size_t sdq_model_layer_count(const sdq_model *m) { return m->layers; }

SDQ_API sdq_layer *sdq_model_layer(const sdq_model *m, size_t i, const char **name) {
    if (name) *name = i < m->layers ? sdq_layer_name(m->layer[i]) : "";
    return i < m->layers ? m->layer[i] : NULL;
}

/* src in our layout to diffusers'. */
static void sdq__md_export(const sdq__param *p, float *to, const float *from) {
    const size_t plane = p->dim[2] * p->dim[3], row = p->dim[1] * plane;
    size_t o;
    for (o = 0; o < p->dim[0]; o++)
        sdq__md_turn(to + o * row, from + o * row, plane, p->dim[1], 4);
}

SDQ_API sdq_tensor *sdq_model_param_copy(sdq_ctx *ctx, const sdq_model *m, size_t i,
                                         int gradient) {
    const sdq_tensor *t = sdq_model_param(m, i, NULL);
    sdq_tensor *y;
    if (!t) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, i < m->params
                  ? "model: parameter %zu of %zu is int8 or packed: it has no float values"
                  : "model: parameter %zu of %zu is not there", i, m->params);
        return NULL;
    }
    y = sdq_tensor_new(ctx, SDQ_F32, m->param[i].rank, m->param[i].dim);
    if (!y) return NULL;
    if (!gradient) sdq__md_export(&m->param[i], sdq_f32(y), sdq_f32(t));
    else if (t->grad) sdq__md_export(&m->param[i], sdq_f32(y), t->grad);
    return y;
}

/* --- save --- */

/* Entries for all parameters; those stored in another order here get a copy, listed in `copy`. */
static sdq_status sdq__md_entries(sdq_ctx *ctx, const sdq_model *m, sdq_dtype dtype,
                                  sdq_entry *entry, float **copy) {
    size_t i;
    for (i = 0; i < m->params; i++) {
        const sdq__param *p = &m->param[i];
        const sdq_tensor *t = sdq__md_tensor(p);
        const size_t count = p->dim[0] * p->dim[1] * p->dim[2] * p->dim[3];
        size_t k;
        if (!t)
            return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: the layer's weights are int8 or packed;"
                             " to save a network as float load it with sdq_model_load, or the "
                             "pipeline with `trainable`", p->name);
        entry[i].name = p->name;
        entry[i].dtype = SDQ_F32;
        entry[i].store = dtype == SDQ_F32 ? SDQ_F32 : dtype;
        entry[i].rank = p->rank;
        for (k = 0; k < 8; k++) entry[i].dim[k] = k < 4 ? p->dim[k] : 1;
        entry[i].bytes = count * sizeof(float);
        entry[i].data = t->data;
        if (p->dim[2] * p->dim[3] == 1) continue;
        copy[i] = SDQ__NEW_N(ctx, float, count);
        if (!copy[i]) return SDQ_ERR_OOM;
        sdq__md_export(p, copy[i], sdq_f32(t));
        entry[i].data = copy[i];
    }
    return SDQ_OK;
}

static sdq_status sdq__md_write(sdq_ctx *ctx, const sdq_model *m, const char *path,
                                sdq_dtype dtype) {
    sdq_entry *entry = SDQ__NEW_N(ctx, sdq_entry, m->params);
    float **copy = SDQ__NEW_N(ctx, float *, m->params);
    sdq_pair meta;
    sdq_status st = SDQ_ERR_OOM;
    size_t i;
    meta.key = "format";
    meta.value = "pt";
    if (!entry || !copy) goto done;
    SDQ__TRY_DONE(sdq__md_entries(ctx, m, dtype, entry, copy));
    st = sdq_file_write(ctx, path, entry, m->params, &meta, 1);
done:
    for (i = 0; copy && i < m->params; i++) sdq__free(ctx, copy[i]);
    sdq__free(ctx, (void *)copy);
    sdq__free(ctx, entry);
    return st;
}

SDQ_API sdq_status sdq_model_save(sdq_ctx *ctx, const sdq_model *m, const char *folder,
                                  sdq_dtype dtype) {
    char *config = NULL, *weights = NULL, *dir = NULL;
    sdq_status st = SDQ_ERR_OOM;
    if (ctx->status != SDQ_OK) return ctx->status;
    if (!m || !folder || (dtype != SDQ_F32 && dtype != SDQ_F16 && dtype != SDQ_BF16))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "sdq_model_save: model or folder is NULL, or the "
                         "dtype is not F32, F16 or BF16");
    dir = sdq__io_join(ctx, folder, *folder && !sdq__io_ends(folder, "/") ? "/" : "", "");
    if (!dir) goto done;
    config = sdq__io_join(ctx, dir, "config.json", "");
    weights = sdq__io_join(ctx, dir, sdq__md_kinds_of[m->info.part].weights, ".safetensors");
    if (!config || !weights) goto done;
    SDQ__TRY_DONE(sdq__md_write(ctx, m, weights, dtype));
    sdq__sf_source s = *src;
    st = sdq_bytes_write(ctx, config, m->config, strlen(m->config));
done:
    if (m->text) s.layers[0] = m->text->count;
    sdq__free(ctx, config);
    sdq__free(ctx, weights);
    sdq__free(ctx, dir);
    return st;
}

/* Where the value of a key stands in the text of a flat JSON object: its first byte and the
 * byte behind it; 0 when the key is not there. The text has been parsed: it is valid. */
static int sdq__md_value_at(const char *text, const char *key, size_t *from, size_t *to) {
    char quoted[64];
    const char *p = text;
    (void)snprintf(quoted, sizeof quoted, "\"%s\"", key);
    while ((p = strstr(p, quoted)) != NULL) {
        p += strlen(quoted);
        p += strspn(p, " \t\r\n");
        if (*p != ':') continue;
        p += 1 + strspn(p + 1, " \t\r\n");
        *from = (size_t)(p - text);
        *to = *from + strcspn(p, ",} \t\r\n");
        return 1;
    }
    return 0;
}

SDQ_API sdq_status sdq_model_set_scaling(sdq_ctx *ctx, sdq_model *m, float scaling_factor) {
    size_t from = 0, to = 0;
    sdq__str s;
    if (!sdq__md_is(ctx, "sdq_model_set_scaling", m, SDQ_PART_VAE)) return ctx->status;
    if (!(scaling_factor >= 1e-6f && scaling_factor <= 1e6f))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "sdq_model_set_scaling: %g is not a usable factor",
                         (double)scaling_factor);
    memset(&s, 0, sizeof s);
    if (sdq__md_value_at(m->config, "scaling_factor", &from, &to)) {
        sdq__str_add(ctx, &s, m->config, from);
        sdq__str_number(ctx, &s, (double)scaling_factor, 9);
    } else {                                    /* a new first member */
        const char *first;
        to = strcspn(m->config, "{") + 1;
        first = m->config + to + strspn(m->config + to, " \t\r\n");
        sdq__str_add(ctx, &s, m->config, to);
        sdq__str_format(ctx, &s, "\n  \"scaling_factor\": ");
        sdq__str_number(ctx, &s, (double)scaling_factor, 9);
        if (*first != '}') sdq__str_add(ctx, &s, ",", 1);
    }
    sdq__str_add(ctx, &s, m->config + to, strlen(m->config + to));
    if (s.bad) { sdq__str_free(ctx, &s); return SDQ_ERR_OOM; }
    sdq__free(ctx, m->config);
    m->config = s.s;
    m->info.scaling_factor = scaling_factor;
    return SDQ_OK;
}

/* ===========================================================================
 * >>scheduler   noise schedules and the solvers that walk down them
 *
 * Training adds noise e to a picture x0 in T small steps; with beta[t] the variance of one step,
 *     a[t] = product of (1 - beta[0..t]),   x_t = sqrt(a) x0 + sqrt(1-a) e.
 * A network predicts e, v = sqrt(a) e - sqrt(1-a) x0, or x0. A solver goes from t = T to 0:
 *     PNDM    linear multistep on the gradient field of DDIM (Liu et al. 2022, arXiv 2202.09778)
 *     DDIM    (Song et al. 2020, arXiv 2010.02502), eq. 12 and 16
 *     Euler   in sigma = sqrt((1-a)/a), x over sqrt(a) (Karras et al. 2022, arXiv 2206.00364)
 *     DPM++   second order multistep in lambda = ln(alpha/sigma) (Lu et al. 2022, arXiv 2211.01095)
 *     LCM     jumps to x0 and adds new noise (Luo et al. 2023, arXiv 2310.04378)
 *
 * Tables and steps are float and follow diffusers 0.39 with torch 2.8 operation by operation; where
 * these compute in double (cumulative product, interpolation, Karras sigmas) so does this.
 * Logarithms and exponentials are the exact ones of >>random, rounded to float, so that
 * the numbers are equal on every machine. No Runge-Kutta start for PNDM (Stable Diffusion does not
 * use it), no thresholding, no third order.
 * ======================================================================== */

#define SDQ__SCH_TRAIN_MAX ((size_t)1 << 20)
enum { SDQ__SCH_KEPT = 4, SDQ__SCH_SLOTS = 6 };     /* history, saved sample, noise */

struct sdq_scheduler {
    sdq_scheduler_desc d;       /* resolved: no field means "default" any more */
    size_t count;
    float *alpha;               /* [train_steps] cumulative product a[t] */
    float *time;                /* [count] */
    float *sigma;               /* [count + 1] */
    float init;
    size_t ratio;               /* train_steps / steps: what DDIM and PNDM step back */
    /* one run */
    float *slot[SDQ__SCH_SLOTS];    /* slot[0] newest output .. slot[3]; [4] sample; [5] noise */
    float *store;
    size_t size, shape[4];      /* elements per slot; n, h, w, c of this run */
    size_t calls, kept, next;   /* steps taken; outputs in the history; evaluation expected */
};

static const char *const sdq__sch_names[SDQ_SCHEDULER_COUNT] =
    {"default", "pndm", "ddim", "euler", "euler_a", "dpmpp2m", "lcm"};

SDQ_API const char *sdq_scheduler_name(sdq_scheduler_kind kind) {
    return (unsigned)kind < (unsigned)SDQ_SCHEDULER_COUNT ? sdq__sch_names[kind] : "?";
}

SDQ_API sdq_scheduler_kind sdq_scheduler_kind_from_name(const char *name) {
    int k;
    for (k = SDQ_PNDM; k < SDQ_SCHEDULER_COUNT; k++)
        if (strcmp(name, sdq__sch_names[k]) == 0) return (sdq_scheduler_kind)k;
    return SDQ_SCHEDULER_COUNT;
}

/* e^x: x = k ln 2 + r, |r| < 0.347, Taylor to r^14/14! (below 2^-60), then 2^k exactly. */
static double sdq__sch_exp(double x) {
    double r, sum = 0.0;
    int k, j;
    if (x < -700.0) return 0.0;
    if (x > 700.0) return (double)HUGE_VAL;
    k = (int)floor(x * 1.44269504088896340736 + 0.5);
    r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
    for (j = 14; j >= 1; j--) sum = (1.0 + sum) * r / j;
    return ldexp(1.0 + sum, k);
}

/* ln x with ln 0 = -infinity: the last sigma may be 0. */
static float sdq__sch_logf(float x) {
    return x > 0.0f ? (float)sdq__rng_log((double)x) : -(float)HUGE_VAL;
}

static int sdq__sch_has_sigma(sdq_scheduler_kind k) {
    return k == SDQ_EULER || k == SDQ_EULER_A || k == SDQ_DPMPP_2M;
}

static sdq_scheduler_desc sdq__sch_defaults(const sdq_scheduler_desc *desc) {
    sdq_scheduler_desc d;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (d.kind == SDQ_SCHEDULER_DEFAULT) d.kind = SDQ_PNDM;
    if (d.steps == 0) d.steps = d.kind == SDQ_LCM ? 4 : 50;
    if (d.train_steps == 0) d.train_steps = 1000;
    if (d.beta_start == 0) d.beta_start = 0.00085;
    if (d.beta_end == 0) d.beta_end = 0.012;
    if (d.spacing == SDQ_SPACING_DEFAULT)
        d.spacing = sdq__sch_has_sigma(d.kind) ? SDQ_SPACING_LINSPACE : SDQ_SPACING_LEADING;
    d.steps_offset = d.steps_offset < 0 ? 0 : d.steps_offset == 0 ? 1 : d.steps_offset;
    if (d.clip_range == 0) d.clip_range = 1.0;
    if (d.lcm_steps == 0) d.lcm_steps = 50;
    if (d.timestep_scaling == 0) d.timestep_scaling = 10.0;
    return d;
}

/* Which numbers of a description cannot be; NULL when all can. */
static const char *sdq__sch_wrong(const sdq_scheduler_desc *d) {
    const size_t points = d->steps + (d->kind == SDQ_DPMPP_2M ? 1 : 0);
    if ((unsigned)d->kind >= (unsigned)SDQ_SCHEDULER_COUNT) return "kind is unknown";
    if ((unsigned)d->beta_schedule >= (unsigned)SDQ_BETA_COUNT) return "beta_schedule is unknown";
    if ((unsigned)d->prediction >= (unsigned)SDQ_PREDICT_COUNT) return "prediction is unknown";
    if ((unsigned)d->spacing >= (unsigned)SDQ_SPACING_COUNT) return "spacing is unknown";
    if (d->train_steps < 2 || d->train_steps > SDQ__SCH_TRAIN_MAX)
        return "train_steps must be 2..1048576";
    if (d->steps > d->train_steps) return "steps must not be more than train_steps";
    if (!(d->beta_start > 0 && d->beta_start < 1 && d->beta_end > 0 && d->beta_end < 1))
        return "beta_start and beta_end must lie between 0 and 1";
    if (!(d->clip_range > 0)) return "clip_range must be positive";
    if (!(d->eta >= 0 && d->eta <= 1)) return "eta must be 0..1";
    if (d->kind != SDQ_LCM && d->spacing == SDQ_SPACING_LEADING && points > d->train_steps)
        return "DPM-Solver++ with leading timesteps needs steps below train_steps";
    if (d->kind == SDQ_LCM && d->lcm_steps > d->train_steps)
        return "lcm_steps must not be more than train_steps";
    if (d->kind == SDQ_LCM && d->steps > d->lcm_steps)
        return "LCM can take at most lcm_steps steps";
    if (!(d->timestep_scaling > 0)) return "timestep_scaling must be positive";
    return NULL;
}

/* numpy.arange(T, 0, -T/N) has ceil(T / (T/N)) numbers: in floating point one more than N for 62 of
 * the N up to 1000 (61, 103, ..). diffusers then evaluates once more, at timestep -1. */
static int sdq__sch_overruns(const sdq_scheduler_desc *d) {
    const double total = (double)d->train_steps, steps = (double)d->steps;
    return d->kind != SDQ_LCM && d->spacing == SDQ_SPACING_TRAILING
        && ceil(total / (total / steps)) != steps;
}

/* What is possible but not here. */
static sdq_status sdq__sch_unsupported(sdq_ctx *ctx, const sdq_scheduler_desc *d) {
    if (d->prediction == SDQ_PREDICT_SAMPLE && (d->kind == SDQ_PNDM || d->kind == SDQ_EULER_A))
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "scheduler %s: a network that predicts the "
                         "sample is not supported; use ddim, euler, dpmpp2m or lcm",
                         sdq_scheduler_name(d->kind));
    if (sdq__sch_overruns(d))
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "scheduler %s: \"timestep_spacing\" trailing "
                         "with %zu steps has a timestep too many, -1, by a rounding error in "
                         "diffusers; use another number of steps", sdq_scheduler_name(d->kind),
                         d->steps);
    return SDQ_OK;
}

/* beta as torch.linspace in float: from both ends towards the middle; a[t] as torch.cumprod: summed
 * up in double, stored as float. */
static void sdq__sch_make_alpha(sdq_scheduler *s) {
    const int square = s->d.beta_schedule == SDQ_BETA_SCALED_LINEAR;
    const float first = (float)(square ? sqrt(s->d.beta_start) : s->d.beta_start);
    const float last = (float)(square ? sqrt(s->d.beta_end) : s->d.beta_end);
    const size_t n = s->d.train_steps;
    const float step = (last - first) / (float)(n - 1);
    double product = 1.0;
    size_t i;
    for (i = 0; i < n; i++) {
        float beta = i < n / 2 ? fmaf(step, (float)i, first)
                               : fmaf(-step, (float)(n - 1 - i), last);
        if (square) beta = beta * beta;
        product *= (double)(1.0f - beta);
        s->alpha[i] = (float)product;
    }
}

/* Timestep number k counted from the noisy end, for N steps. */
static double sdq__sch_grid(const sdq_scheduler *s, size_t k) {
    const int dpm = s->d.kind == SDQ_DPMPP_2M;
    const size_t total = s->d.train_steps, points = s->d.steps + (dpm ? 1 : 0);
    const size_t i = points - 1 - k;        /* DPM-Solver++ has one point more and drops i = 0 */
    double t;
    if (s->d.spacing == SDQ_SPACING_TRAILING) {
        const double step = -((double)total / (double)s->d.steps);
        const double delta = ((double)total + step) - (double)total;    /* numpy.arange's */
        return rint((double)total + (double)k * delta) - 1.0;
    }
    if (s->d.spacing == SDQ_SPACING_LEADING)
        return (double)(i * (total / points)) + (double)s->d.steps_offset;
    if (points == 1) return 0.0;
    t = i + 1 == points ? (double)(total - 1)
                        : (double)i * ((double)(total - 1) / (double)(points - 1));
    return s->d.kind == SDQ_EULER || s->d.kind == SDQ_EULER_A ? (double)(float)t : rint(t);
}

/* k-th of N entries, picked evenly from the lcm_steps that were distilled (999, 979, .. 19). */
static double sdq__sch_lcm_time(const sdq_scheduler *s, size_t k) {
    const double each = (double)s->d.lcm_steps / (double)s->d.steps;
    const size_t at = (size_t)floor((double)k * each);
    return (double)((s->d.lcm_steps - at) * (s->d.train_steps / s->d.lcm_steps) - 1);
}

static float sdq__sch_sigma_of(float alpha) { return sqrtf((1.0f - alpha) / alpha); }

/* sigma at a time between timesteps, linear, in double as numpy.interp. */
static double sdq__sch_sigma_at(const sdq_scheduler *s, double t) {
    const size_t last = s->d.train_steps - 1;
    size_t j;
    double low, high;
    if (t <= 0) return (double)sdq__sch_sigma_of(s->alpha[0]);
    if (t >= (double)last) return (double)sdq__sch_sigma_of(s->alpha[last]);
    j = (size_t)t;
    low = (double)sdq__sch_sigma_of(s->alpha[j]);
    high = (double)sdq__sch_sigma_of(s->alpha[j + 1]);
    return (high - low) * (t - (double)j) + low;
}

/* The inverse, linear in ln sigma. sigma grows with t: bisect for the last one not above. */
static double sdq__sch_time_of(const sdq_scheduler *s, double sigma) {
    const double want = sdq__rng_log(sigma > 1e-10 ? sigma : 1e-10);
    size_t low = 0, high = s->d.train_steps - 1;
    float a, b;
    double w;
    while (high - low > 1) {
        const size_t mid = (low + high) / 2;
        if ((double)sdq__sch_logf(sdq__sch_sigma_of(s->alpha[mid])) <= want) low = mid;
        else high = mid;
    }
    a = sdq__sch_logf(sdq__sch_sigma_of(s->alpha[low]));
    b = sdq__sch_logf(sdq__sch_sigma_of(s->alpha[low + 1]));
    w = ((double)a - want) / (double)(a - b);
    w = w < 0 ? 0 : w > 1 ? 1 : w;
    return (1.0 - w) * (double)low + w * (double)(low + 1);
}

/* sigma_k = (max^(1/7) + k/(N-1) (min^(1/7) - max^(1/7)))^7, Karras et al. eq. 5. */
static double sdq__sch_karras(double max, double min, size_t k, size_t n) {
    const double a = sdq__sch_exp(sdq__rng_log(max) / 7.0);
    const double b = sdq__sch_exp(sdq__rng_log(min) / 7.0);
    const double ramp = n < 2 ? 0.0 : k + 1 == n ? 1.0 : (double)k * (1.0 / (double)(n - 1));
    const double r = a + ramp * (b - a), r2 = r * r;
    return r2 * r2 * r2 * r;
}

/* Euler takes the ends of the Karras sigmas from this run, DPM-Solver++ from training. */
static void sdq__sch_make_sigma(sdq_scheduler *s) {
    const size_t n = s->count;
    const int euler = s->d.kind == SDQ_EULER, dpm = s->d.kind == SDQ_DPMPP_2M;
    const int karras = s->d.karras && (euler || dpm);
    const double max = euler ? sdq__sch_sigma_at(s, (double)s->time[0])
                             : sdq__sch_sigma_at(s, (double)s->d.train_steps);
    const double min = euler ? sdq__sch_sigma_at(s, (double)s->time[n - 1])
                             : sdq__sch_sigma_at(s, 0);
    size_t k;
    for (k = 0; k < n; k++) {
        double sigma;
        if (karras) {
            sigma = sdq__sch_karras(max, min, k, n);
            s->time[k] = (float)sdq__sch_time_of(s, sigma);
            if (dpm) s->time[k] = (float)rint(sdq__sch_time_of(s, sigma));
        } else {
            sigma = sdq__sch_sigma_at(s, (double)s->time[k]);
        }
        s->sigma[k] = (float)sigma;
    }
    if (s->d.final_sigma_min && s->d.kind != SDQ_EULER_A)
        s->sigma[n] = sdq__sch_sigma_of(s->alpha[0]);
}

/* PNDM evaluates its second timestep twice: t0 t1 t1 t2 t3 .. */
static sdq_status sdq__sch_make_times(sdq_ctx *ctx, sdq_scheduler *s) {
    size_t i;
    for (i = 0; i < s->count; i++) {
        const size_t k = s->d.kind == SDQ_PNDM && i >= 2 ? i - 1 : i;
        const double t = s->d.kind == SDQ_LCM ? sdq__sch_lcm_time(s, k) : sdq__sch_grid(s, k);
        if (!(t >= 0 && t <= (double)(s->d.train_steps - 1)))
            return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler %s: evaluation %zu is at timestep "
                             "%.0f, outside 0..%zu: use fewer steps or a smaller steps_offset",
                             sdq_scheduler_name(s->d.kind), i, t, s->d.train_steps - 1);
        s->time[i] = (float)t;
    }
    return SDQ_OK;
}

static void sdq__sch_make_init(sdq_scheduler *s) {
    s->init = 1.0f;
    if (s->d.kind != SDQ_EULER && s->d.kind != SDQ_EULER_A) return;
    s->init = s->sigma[0];
    if (s->d.spacing == SDQ_SPACING_LEADING) s->init = sqrtf(s->init * s->init + 1.0f);
}

SDQ_API sdq_status sdq_scheduler_create(sdq_ctx *ctx, const sdq_scheduler_desc *desc,
                                        sdq_scheduler **out) {
    const sdq_scheduler_desc d = sdq__sch_defaults(desc);
    const char *wrong = sdq__sch_wrong(&d);
    sdq_scheduler *s = NULL;
    sdq_status st = SDQ_ERR_OOM;
    *out = NULL;
    if (wrong) return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler: %s", wrong);
    SDQ__TRY(sdq__sch_unsupported(ctx, &d));
    s = SDQ__NEW(ctx, sdq_scheduler);
    if (!s) return SDQ_ERR_OOM;
    s->d = d;
    s->ratio = d.train_steps / d.steps;
    s->count = d.kind == SDQ_PNDM && d.steps > 1 ? d.steps + 1 : d.steps;
    s->alpha = SDQ__NEW_N(ctx, float, d.train_steps);
    s->time = SDQ__NEW_N(ctx, float, s->count);
    s->sigma = SDQ__NEW_N(ctx, float, s->count + 1);
    if (!s->alpha || !s->time || !s->sigma) goto done;
    sdq__sch_make_alpha(s);
    SDQ__TRY_DONE(sdq__sch_make_times(ctx, s));
    if (sdq__sch_has_sigma(d.kind)) sdq__sch_make_sigma(s);
    sdq__sch_make_init(s);
    sdq_scheduler_reset(s);
    st = SDQ_OK;
done:
    if (st == SDQ_OK) *out = s;
    else sdq_scheduler_free(ctx, s);
    return st;
}

SDQ_API void sdq_scheduler_free(sdq_ctx *ctx, sdq_scheduler *s) {
    if (!s) return;
    sdq__free(ctx, s->store);
    sdq__free(ctx, s->sigma);
    sdq__free(ctx, s->time);
    sdq__free(ctx, s->alpha);
    sdq__free(ctx, s);
}

SDQ_API void sdq_scheduler_reset(sdq_scheduler *s) { s->calls = s->kept = s->next = 0; }

SDQ_API const sdq_scheduler_desc *sdq_scheduler_get_desc(const sdq_scheduler *s) { return &s->d; }
SDQ_API size_t sdq_scheduler_count(const sdq_scheduler *s) { return s->count; }
SDQ_API float sdq_scheduler_timestep(const sdq_scheduler *s, size_t i) {
    return s->time[sdq__u_min(i, s->count - 1)];
}
SDQ_API float sdq_scheduler_sigma(const sdq_scheduler *s, size_t i) {
    return s->sigma[sdq__u_min(i, s->count)];
}
SDQ_API float sdq_scheduler_init_sigma(const sdq_scheduler *s) { return s->init; }

SDQ_API void sdq_scheduler_scale_input(const sdq_scheduler *s, size_t i, const float *x,
                                       float *out, size_t count) {
    const float sigma = sdq_scheduler_sigma(s, i), divisor = sqrtf(sigma * sigma + 1.0f);
    size_t j;
    if (s->d.kind == SDQ_EULER || s->d.kind == SDQ_EULER_A)
        for (j = 0; j < count; j++) out[j] = x[j] / divisor;
    else if (out != x)
        memcpy(out, x, count * sizeof(float));
}

SDQ_API size_t sdq_scheduler_first(const sdq_scheduler *s, double strength) {
    const double n = (double)s->d.steps, keep = n * (strength > 0 ? strength : 0);
    return keep >= n ? 0 : s->d.steps - (size_t)keep;
}

SDQ_API void sdq_scheduler_noise_at(const sdq_scheduler *s, size_t i, const float *x,
                                    const float *noise, float *out, size_t count) {
    const float sigma = sdq_scheduler_sigma(s, i);
    size_t j;
    if (s->d.kind == SDQ_EULER || s->d.kind == SDQ_EULER_A) {
        for (j = 0; j < count; j++) out[j] = x[j] + noise[j] * sigma;
    } else if (s->d.kind == SDQ_DPMPP_2M) {
        const float alpha = 1.0f / sqrtf(sigma * sigma + 1.0f), part = sigma * alpha;
        for (j = 0; j < count; j++) out[j] = alpha * x[j] + part * noise[j];
    } else {
        sdq_scheduler_add_noise(s, (size_t)sdq_scheduler_timestep(s, i), x, noise, out, count);
    }
}

/* One call of sdq_scheduler_step. */
typedef struct sdq__sch_step {
    const float *eps, *x;
    float *prev;
    const float *noise;         /* NULL when the step draws none */
    size_t i, count;
} sdq__sch_step;

/* The oldest slot of the history becomes the newest and receives the output. */
static float *sdq__sch_push(sdq_scheduler *s, const float *eps, size_t count) {
    float *const oldest = s->slot[SDQ__SCH_KEPT - 1];
    memmove(&s->slot[1], &s->slot[0], (SDQ__SCH_KEPT - 1) * sizeof s->slot[0]);
    s->slot[0] = oldest;
    if (eps) memcpy(oldest, eps, count * sizeof(float));
    if (s->kept < SDQ__SCH_KEPT) s->kept++;
    return oldest;
}

/* a at timestep t, also for the t < 0 that comes after the last step. */
static float sdq__sch_alpha_before(const sdq_scheduler *s, ptrdiff_t t) {
    if (t >= 0) return s->alpha[t];
    return s->d.alpha_to_one ? 1.0f : s->alpha[0];
}

/* Adams-Bashforth of order `kept` on the history; e1 is the newest. */
static float sdq__sch_adams(const sdq_scheduler *s, size_t j) {
    const float e1 = s->slot[0][j], e2 = s->slot[1][j];
    float e3, e4;
    if (s->kept == 2) return (3.0f * e1 - e2) / 2.0f;
    e3 = s->slot[2][j];
    if (s->kept == 3) return (23.0f * e1 - 16.0f * e2 + 5.0f * e3) / 12.0f;
    e4 = s->slot[3][j];
    return (float)(1.0 / 24.0) * (55.0f * e1 - 59.0f * e2 + 37.0f * e3 - 9.0f * e4);
}

/* PLMS. The first step is taken twice: forward with e(t0), then again from the saved sample with
 * the mean of e(t0) and e(t1); that second output is not kept. Paper, eq. 9:
 *   x' = sqrt(a'/a) x - (a' - a) e / (a sqrt(1-a') + sqrt(a (1-a) a')) */
static sdq_status sdq__sch_pndm(sdq_ctx *ctx, sdq_scheduler *s, const sdq__sch_step *p) {
    ptrdiff_t t = (ptrdiff_t)s->time[p->i], to = t - (ptrdiff_t)s->ratio;
    const int again = s->calls == 1;
    const float *x = again ? s->slot[4] : p->x;
    float a, b, at, coef, denom, root_a, root_b;
    size_t j;
    if (again) { to = t; t += (ptrdiff_t)s->ratio; }
    else sdq__sch_push(s, p->eps, p->count);
    if (t > (ptrdiff_t)(s->d.train_steps - 1))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler pndm: the second evaluation of a run "
                         "would go back to timestep %zd of %zu", t, s->d.train_steps);
    if (s->calls == 0) memcpy(s->slot[4], p->x, p->count * sizeof(float));
    a = s->alpha[t];
    at = sdq__sch_alpha_before(s, to);
    b = 1.0f - a;
    root_a = sqrtf(a);
    root_b = sqrtf(b);
    coef = sqrtf(at / a);
    denom = a * sqrtf(1.0f - at) + sqrtf(a * b * at);
    for (j = 0; j < p->count; j++) {
        float e = s->calls == 0 ? p->eps[j] : again ? (p->eps[j] + s->slot[0][j]) / 2.0f
                                                    : sdq__sch_adams(s, j);
        if (s->d.prediction == SDQ_PREDICT_V) e = root_a * e + root_b * x[j];
        p->prev[j] = coef * x[j] - (at - a) * e / denom;
    }
    return SDQ_OK;
}

static float sdq__sch_clip(const sdq_scheduler *s, float x0) {
    const float r = (float)s->d.clip_range;
    if (!s->d.clip_sample) return x0;
    return x0 < -r ? -r : x0 > r ? r : x0;
}

/* x' = sqrt(a') x0 + sqrt(1 - a' - sd^2) e + sd z, sd = eta sqrt((1-a')/(1-a) (1 - a/a')) */
static void sdq__sch_ddim(sdq_scheduler *s, const sdq__sch_step *p) {
    const ptrdiff_t t = (ptrdiff_t)s->time[p->i];
    const float a = s->alpha[t], at = sdq__sch_alpha_before(s, t - (ptrdiff_t)s->ratio);
    const float b = 1.0f - a, root_a = sqrtf(a), root_b = sqrtf(b), root_at = sqrtf(at);
    const float sd = (float)s->d.eta * sqrtf((1.0f - at) / b * (1.0f - a / at));
    const float direction = sqrtf(1.0f - at - sd * sd);
    size_t j;
    for (j = 0; j < p->count; j++) {
        const float x = p->x[j], m = p->eps[j];
        float x0, e, next;
        switch (s->d.prediction) {
        case SDQ_PREDICT_V: x0 = root_a * x - root_b * m; e = root_a * m + root_b * x; break;
        case SDQ_PREDICT_SAMPLE: x0 = m; e = (x - root_a * m) / root_b; break;
        default: x0 = (x - root_b * m) / root_a; e = m; break;
        }
        next = root_at * sdq__sch_clip(s, x0) + direction * e;
        p->prev[j] = p->noise ? next + sd * p->noise[j] : next;
    }
}

/* dx/dsigma = (x - x0) / sigma; ancestral: down to sigma_down, then noise of sigma_up, so that
 * sigma_down^2 + sigma_up^2 = sigma'^2. */
static void sdq__sch_euler(sdq_scheduler *s, const sdq__sch_step *p) {
    const float sigma = s->sigma[p->i], to = s->sigma[p->i + 1];
    const float from2 = sigma * sigma, to2 = to * to;
    const float up = p->noise ? sqrtf(to2 * (from2 - to2) / from2) : 0.0f;
    const float down = p->noise ? sqrtf(to2 - up * up) : to;
    const float c_out = -sigma / sqrtf(from2 + 1.0f), dt = down - sigma;
    size_t j;
    for (j = 0; j < p->count; j++) {
        const float x = p->x[j], m = p->eps[j];
        float x0, next;
        switch (s->d.prediction) {
        case SDQ_PREDICT_V: x0 = m * c_out + x / (from2 + 1.0f); break;
        case SDQ_PREDICT_SAMPLE: x0 = m; break;
        default: x0 = x - sigma * m; break;
        }
        next = x + (x - x0) / sigma * dt;
        p->prev[j] = p->noise ? next + p->noise[j] * up : next;
    }
}

/* sigma of the variance-exploding form -> alpha, sigma of x = alpha x0 + sigma e, lambda. */
typedef struct sdq__sch_point { float alpha, sigma, lambda; } sdq__sch_point;

static sdq__sch_point sdq__sch_point_at(const sdq_scheduler *s, size_t i) {
    const float sigma = s->sigma[i];
    sdq__sch_point p;
    p.alpha = 1.0f / sqrtf(sigma * sigma + 1.0f);
    p.sigma = sigma * p.alpha;
    p.lambda = sdq__sch_logf(p.alpha) - sdq__sch_logf(p.sigma);
    return p;
}

/* DPM-Solver++(2M), midpoint form, h = lambda' - lambda, r = h_before / h:
 *   x' = sigma'/sigma x - alpha' (e^-h - 1) (m0 + (m0 - m1) / (2 r)),   m: predicted x0.
 * First order (without m1) at the start, at a last step to sigma 0 where h is infinite, and at the
 * last step of runs below 15 steps. */
static void sdq__sch_dpm(sdq_scheduler *s, const sdq__sch_step *p) {
    const size_t i = p->i;
    const int last = i + 1 == s->count;
    const int lower = last && (s->d.euler_at_final || !s->d.final_sigma_min
                               || (!s->d.no_lower_order_final && s->count < 15));
    const sdq__sch_point now = sdq__sch_point_at(s, i), to = sdq__sch_point_at(s, i + 1);
    const float h = to.lambda - now.lambda, ratio = to.sigma / now.sigma;
    const float gain = to.alpha * ((float)sdq__sch_exp(-(double)h) - 1.0f);
    float *const m0 = sdq__sch_push(s, NULL, 0);
    const float *const m1 = s->slot[1];
    float inverse = 0.0f;
    size_t j;
    const int second = s->kept > 1 && !lower;
    if (second) inverse = 1.0f / ((now.lambda - sdq__sch_point_at(s, i - 1).lambda) / h);
    for (j = 0; j < p->count; j++) {
        const float x = p->x[j], m = p->eps[j];
        float next;
        switch (s->d.prediction) {
        case SDQ_PREDICT_V: m0[j] = now.alpha * x - now.sigma * m; break;
        case SDQ_PREDICT_SAMPLE: m0[j] = m; break;
        default: m0[j] = (x - now.sigma * m) / now.alpha; break;
        }
        next = ratio * x - gain * m0[j];
        p->prev[j] = second ? next - 0.5f * gain * (inverse * (m0[j] - m1[j])) : next;
    }
}

/* denoised = c_out x0 + c_skip x with c_skip = d^2 / (t'^2 + d^2), c_out = t' / sqrt(t'^2 + d^2),
 * d = 1/2, t' = 10 t; then noise of the next timestep. */
static void sdq__sch_lcm(sdq_scheduler *s, const sdq__sch_step *p) {
    const size_t t = (size_t)s->time[p->i];
    const size_t to = (size_t)s->time[p->i + 1 < s->count ? p->i + 1 : p->i];
    const float scaled = s->time[p->i] * (float)s->d.timestep_scaling;
    const float sum = scaled * scaled + 0.25f, c_skip = 0.25f / sum, c_out = scaled / sqrtf(sum);
    const float root_a = sqrtf(s->alpha[t]), root_b = sqrtf(1.0f - s->alpha[t]);
    const float next_a = sqrtf(s->alpha[to]), next_b = sqrtf(1.0f - s->alpha[to]);
    size_t j;
    for (j = 0; j < p->count; j++) {
        const float x = p->x[j], m = p->eps[j];
        float x0, y;
        switch (s->d.prediction) {
        case SDQ_PREDICT_V: x0 = root_a * x - root_b * m; break;
        case SDQ_PREDICT_SAMPLE: x0 = m; break;
        default: x0 = (x - root_b * m) / root_a; break;
        }
        y = c_out * sdq__sch_clip(s, x0) + c_skip * x;
        p->prev[j] = p->noise ? next_a * y + next_b * p->noise[j] : y;
    }
}

/* The first step of a run fixes its shape and makes room for the history. */
static sdq_status sdq__sch_begin(sdq_ctx *ctx, sdq_scheduler *s, const size_t *shape, size_t i) {
    size_t count, all, k;
    if (s->calls > 0) {
        if (memcmp(shape, s->shape, sizeof s->shape) != 0)
            return sdq__fail(ctx, SDQ_ERR_SHAPE, "scheduler: [%zu,%zu,%zu,%zu] in a run of "
                             "[%zu,%zu,%zu,%zu]; call sdq_scheduler_reset before another picture",
                             shape[0], shape[1], shape[2], shape[3], s->shape[0], s->shape[1],
                             s->shape[2], s->shape[3]);
        if (i != s->next)
            return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler: evaluation %zu after %zu; they go "
                             "in order, sdq_scheduler_reset begins a new run", i, s->next - 1);
        return SDQ_OK;
    }
    if (!sdq__u_mul(shape[0], shape[1], &count) || !sdq__u_mul(count, shape[2], &count)
        || !sdq__u_mul(count, shape[3], &count) || !sdq__u_mul(count, SDQ__SCH_SLOTS, &all))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler: [%zu,%zu,%zu,%zu] is too large",
                         shape[0], shape[1], shape[2], shape[3]);
    if (count > s->size || !s->store) {
        sdq__free(ctx, s->store);
        s->size = 0;
        s->store = SDQ__NEW_N(ctx, float, all);
        if (!s->store) return SDQ_ERR_OOM;
        s->size = count;
    }
    for (k = 0; k < SDQ__SCH_SLOTS; k++) s->slot[k] = s->store + k * s->size;
    memcpy(s->shape, shape, sizeof s->shape);
    return SDQ_OK;
}

static int sdq__sch_draws(const sdq_scheduler *s, size_t i) {
    return s->d.kind == SDQ_EULER_A || (s->d.kind == SDQ_LCM && i + 1 < s->count)
        || (s->d.kind == SDQ_DDIM && s->d.eta > 0);
}

SDQ_API sdq_status sdq_scheduler_step(sdq_ctx *ctx, sdq_scheduler *s, size_t i, const float *eps,
                                      const float *sample, float *prev, size_t n, size_t h,
                                      size_t w, size_t c, sdq_rng *rng) {
    size_t shape[4];
    sdq__sch_step p;
    shape[0] = n; shape[1] = h; shape[2] = w; shape[3] = c;
    if (i >= s->count)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler %s: evaluation %zu of %zu",
                         sdq_scheduler_name(s->d.kind), i, s->count);
    if (sdq__sch_draws(s, i) && !rng)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler %s: draws noise and needs a generator",
                         sdq_scheduler_name(s->d.kind));
    SDQ__TRY(sdq__sch_begin(ctx, s, shape, i));
    memset(&p, 0, sizeof p);
    p.eps = eps; p.x = sample; p.prev = prev; p.i = i; p.count = n * h * w * c;
    if (sdq__sch_draws(s, i)) {
        sdq_rng_normal_nchw(rng, s->slot[5], n, h, w, c);
        p.noise = s->slot[5];
    }
    switch (s->d.kind) {
    case SDQ_DDIM: sdq__sch_ddim(s, &p); break;
    case SDQ_EULER: case SDQ_EULER_A: sdq__sch_euler(s, &p); break;
    case SDQ_DPMPP_2M: sdq__sch_dpm(s, &p); break;
    case SDQ_LCM: sdq__sch_lcm(s, &p); break;
    default: SDQ__TRY(sdq__sch_pndm(ctx, s, &p)); break;
    }
    s->calls++;
    s->next = i + 1;
    return SDQ_OK;
}

SDQ_API const float *sdq_scheduler_alphas_cumprod(const sdq_scheduler *s) { return s->alpha; }

static float sdq__sch_alpha(const sdq_scheduler *s, size_t t) {
    return s->alpha[sdq__u_min(t, s->d.train_steps - 1)];
}

SDQ_API void sdq_scheduler_add_noise(const sdq_scheduler *s, size_t t, const float *x,
                                     const float *noise, float *out, size_t count) {
    const float a = sdq__sch_alpha(s, t), root_a = sqrtf(a), root_b = sqrtf(1.0f - a);
    size_t j;
    for (j = 0; j < count; j++) out[j] = root_a * x[j] + root_b * noise[j];
}

SDQ_API void sdq_scheduler_velocity(const sdq_scheduler *s, size_t t, const float *x,
                                    const float *noise, float *out, size_t count) {
    const float a = sdq__sch_alpha(s, t), root_a = sqrtf(a), root_b = sqrtf(1.0f - a);
    size_t j;
    for (j = 0; j < count; j++) out[j] = root_a * noise[j] - root_b * x[j];
}

SDQ_API double sdq_scheduler_snr_weight(const sdq_scheduler *s, size_t t, double gamma) {
    const double a = (double)sdq__sch_alpha(s, t), snr = a / (1.0 - a);
    const double least = snr < gamma ? snr : gamma;
    if (!(gamma > 0)) return 1.0;
    switch (s->d.prediction) {
    case SDQ_PREDICT_V: return least / (snr + 1.0);
    case SDQ_PREDICT_SAMPLE: return least;
    default: return least / snr;
    }
}

SDQ_API void sdq_guidance_embedding(double g, float *out, size_t dim) {
    const size_t half = dim / 2;
    const float w = (float)((g - 1.0) * 1000.0);
    const float step = half > 1 ? (float)sdq__rng_log(10000.0) / (float)(half - 1) : 0.0f;
    size_t j;
    for (j = 0; j < half; j++) {
        const float angle = w * (float)sdq__sch_exp(-(double)((float)j * step));
        double sine, cosine;
        sdq__rng_sincos(fabs((double)angle), &sine, &cosine);
        out[j] = (float)(angle < 0 ? -sine : sine);
        out[half + j] = (float)cosine;
    }
    if (dim % 2) out[dim - 1] = 0.0f;
}

/* ---- scheduler_config.json ---------------------------------------------------------------- */

#define SDQ__SCH_BIT(kind) (1u << (unsigned)(kind))
#define SDQ__SCH_ALL 0x7eu
#define SDQ__SCH_SIG (SDQ__SCH_BIT(SDQ_EULER) | SDQ__SCH_BIT(SDQ_DPMPP_2M))
#define SDQ__SCH_CLIPS (SDQ__SCH_BIT(SDQ_DDIM) | SDQ__SCH_BIT(SDQ_LCM))

/* Settings that sdq does not implement: for which kinds they matter and the value that is the same
 * as not having them (text: the string; NULL: false, null or absent; a number: that number). */
typedef struct sdq__sch_rule { const char *key; unsigned kinds; const char *text; int number; }
    sdq__sch_rule;

static const sdq__sch_rule sdq__sch_rules[] = {
    {"algorithm_type", SDQ__SCH_BIT(SDQ_DPMPP_2M), "dpmsolver++", 0},
    {"interpolation_type", SDQ__SCH_BIT(SDQ_EULER), "linear", 0},
    {"lambda_min_clipped", SDQ__SCH_BIT(SDQ_DPMPP_2M), NULL, 0},
    {"rescale_betas_zero_snr", SDQ__SCH_ALL & ~SDQ__SCH_BIT(SDQ_PNDM), NULL, 0},
    {"sigma_max", SDQ__SCH_BIT(SDQ_EULER), NULL, 0},
    {"sigma_min", SDQ__SCH_BIT(SDQ_EULER), NULL, 0},
    {"solver_order", SDQ__SCH_BIT(SDQ_DPMPP_2M), NULL, 2},
    {"solver_type", SDQ__SCH_BIT(SDQ_DPMPP_2M), "midpoint", 0},
    {"thresholding", SDQ__SCH_CLIPS | SDQ__SCH_BIT(SDQ_DPMPP_2M), NULL, 0},
    {"timestep_type", SDQ__SCH_BIT(SDQ_EULER), "discrete", 0},
    {"trained_betas", SDQ__SCH_ALL, NULL, 0},
    {"use_beta_sigmas", SDQ__SCH_SIG, NULL, 0},
    {"use_dynamic_shifting", SDQ__SCH_BIT(SDQ_DPMPP_2M), NULL, 0},
    {"use_exponential_sigmas", SDQ__SCH_SIG, NULL, 0},
    {"use_flow_sigmas", SDQ__SCH_BIT(SDQ_DPMPP_2M), NULL, 0},
    {"use_lu_lambdas", SDQ__SCH_BIT(SDQ_DPMPP_2M), NULL, 0},
    {"variance_type", SDQ__SCH_BIT(SDQ_DPMPP_2M), NULL, 0}
};

static int sdq__sch_neutral(const sdq__json *v, const sdq__sch_rule *rule) {
    if (!v || v->kind == SDQ__JS_NULL) return 1;
    if (v->kind == SDQ__JS_STRING && rule->text) return strcmp(v->str, rule->text) == 0;
    if (v->kind == SDQ__JS_NUMBER && rule->number) return v->num == (double)rule->number;
    return v->kind == SDQ__JS_BOOL && v->num == 0;
}

/* A word of the file as its number in a list; the sentence names key and word. */
static sdq_status sdq__sch_word(sdq_ctx *ctx, const sdq__json *root, const char *what,
                                const char *key, const char *const *words, int count, int *value) {
    const sdq__json *v = sdq__js_get(root, key);
    int i;
    if (!v || v->kind == SDQ__JS_NULL) return SDQ_OK;
    if (v->kind == SDQ__JS_STRING)
        for (i = 0; i < count; i++)
            if (words[i] && strcmp(words[i], v->str) == 0) { *value = i; return SDQ_OK; }
    return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: \"%s\" is %s%s, which sdq does not have", what,
                     key, v->kind == SDQ__JS_STRING ? "" : "no string but a value",
                     v->kind == SDQ__JS_STRING ? v->str : "");
}

static const char *const sdq__sch_classes[SDQ_SCHEDULER_COUNT] = {
    NULL, "PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"};

static sdq_status sdq__sch_kind_of(sdq_ctx *ctx, const sdq__json *root, const char *what,
                                   sdq_scheduler_kind *kind) {
    int k = 0;
    if (*kind != SDQ_SCHEDULER_DEFAULT) return SDQ_OK;
    if (sdq__sch_word(ctx, root, what, "_class_name", sdq__sch_classes, SDQ_SCHEDULER_COUNT, &k)
        == SDQ_ERR_UNSUPPORTED) {
        sdq_clear_error(ctx);
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: sdq does not have the scheduler \"%s\"; "
                         "choose another (--scheduler, sdq_txt2img_desc.scheduler)", what,
                         sdq__js_string(root, "_class_name", "(no string)"));
    }
    if (k == 0) return sdq__fail(ctx, SDQ_ERR_MISSING, "%s: \"_class_name\" is missing; name the "
                                 "scheduler yourself", what);
    *kind = (sdq_scheduler_kind)k;
    return SDQ_OK;
}

static sdq_status sdq__sch_refuse(sdq_ctx *ctx, const sdq__json *root, const char *what,
                                  sdq_scheduler_kind kind) {
    size_t i;
    for (i = 0; i < SDQ__COUNT(sdq__sch_rules); i++) {
        const sdq__sch_rule *r = &sdq__sch_rules[i];
        if (!(r->kinds & SDQ__SCH_BIT(kind)) || sdq__sch_neutral(sdq__js_get(root, r->key), r))
            continue;
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: \"%s\" has a value that sdq does not "
                         "implement for %s; remove it or choose another scheduler", what, r->key,
                         sdq_scheduler_name(kind));
    }
    SDQ__TRY(sdq__sch_flag(ctx, root, what, "skip_prk_steps", 0, &skip));
    if (kind == SDQ_PNDM && !skip)
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: \"skip_prk_steps\" must be true: sdq has "
                         "no Runge-Kutta start", what);
    return SDQ_OK;
}

/* A number that must be one if it is there: def if absent or null. */
static sdq_status sdq__sch_number(sdq_ctx *ctx, const sdq__json *root, const char *what,
                                  const char *key, double def, double low, double high,
                                  int whole, double *out) {
    const sdq__json *v = sdq__js_get(root, key);
    *out = def;
    if (!v || v->kind == SDQ__JS_NULL) return SDQ_OK;
    if (v->kind != SDQ__JS_NUMBER || !(v->num >= low && v->num <= high)
        || (whole && v->num != floor(v->num)))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: \"%s\" must be a %snumber from %g to %g", what,
                         key, whole ? "whole " : "", low, high);
    *out = v->num;
    return SDQ_OK;
}

static sdq_status sdq__sch_read_words(sdq_ctx *ctx, const sdq__json *root, const char *what,
                                      sdq_scheduler_desc *d) {
    static const char *const betas[] = {"scaled_linear", "linear"};
    static const char *const predictions[] = {"epsilon", "v_prediction", "sample"};
    static const char *const spacings[] = {NULL, "leading", "trailing", "linspace"};
    static const char *const finals[] = {"zero", "sigma_min"};
    int beta = d->kind == SDQ_LCM ? 0 : 1, prediction = 0, spacing = 0;
    SDQ__TRY(sdq__sch_word(ctx, root, what, "beta_schedule", betas, 2, &beta));
    SDQ__TRY(sdq__sch_word(ctx, root, what, "prediction_type", predictions, 3, &prediction));
    if (d->kind != SDQ_LCM)
        SDQ__TRY(sdq__sch_word(ctx, root, what, "timestep_spacing", spacings, 4, &spacing));
    if (SDQ__SCH_SIG & SDQ__SCH_BIT(d->kind))
        SDQ__TRY(sdq__sch_word(ctx, root, what, "final_sigmas_type", finals, 2,
                               &d->final_sigma_min));
    d->beta_schedule = (sdq_beta_schedule)beta;
    d->prediction = (sdq_prediction)prediction;
    d->spacing = (sdq_spacing)spacing;
    return SDQ_OK;
}

/* Defaults are those of the class's constructor, not of Stable Diffusion. */
static sdq_status sdq__sch_read(sdq_ctx *ctx, const sdq__json *root, const char *what,
                                sdq_scheduler_desc *d) {
    const int lcm = d->kind == SDQ_LCM, ddim = d->kind == SDQ_DDIM;
    double train, offset, steps;
    SDQ__TRY(sdq__sch_read_words(ctx, root, what, d));
    SDQ__TRY(sdq__sch_number(ctx, root, what, "num_train_timesteps", 1000, 2,
                             (double)SDQ__SCH_TRAIN_MAX, 1, &train));
    SDQ__TRY(sdq__sch_number(ctx, root, what, "beta_start", lcm ? 0.00085 : 0.0001, 1e-12, 1, 0,
                             &d->beta_start));
    SDQ__TRY(sdq__sch_number(ctx, root, what, "beta_end", lcm ? 0.012 : 0.02, 1e-12, 1, 0,
                             &d->beta_end));
    SDQ__TRY(sdq__sch_number(ctx, root, what, "steps_offset", 0, 0, 1e6, 1, &offset));
    SDQ__TRY(sdq__sch_number(ctx, root, what, "clip_sample_range", 1, 1e-12, 1e12, 0,
                             &d->clip_range));
    SDQ__TRY(sdq__sch_number(ctx, root, what, "original_inference_steps", 50, 1,
                             (double)SDQ__SCH_TRAIN_MAX, 1, &steps));
    SDQ__TRY(sdq__sch_number(ctx, root, what, "timestep_scaling", 10, 1e-12, 1e12, 0,
                             &d->timestep_scaling));
    d->train_steps = (size_t)train;
    d->steps_offset = offset > 0 ? (int)offset : -1;
    d->lcm_steps = (size_t)steps;
    SDQ__TRY(sdq__sch_flag(ctx, root, what, "set_alpha_to_one", ddim, &d->alpha_to_one));
    SDQ__TRY(sdq__sch_flag(ctx, root, what, "clip_sample", ddim, &d->clip_sample));
    SDQ__TRY(sdq__sch_flag(ctx, root, what, "use_karras_sigmas", 0, &d->karras));
    SDQ__TRY(sdq__sch_flag(ctx, root, what, "lower_order_final", 1, &lower));
    SDQ__TRY(sdq__sch_flag(ctx, root, what, "euler_at_final", 0, &d->euler_at_final));
    d->clip_sample = d->clip_sample && (ddim || lcm);
    d->karras = d->karras && (SDQ__SCH_SIG & SDQ__SCH_BIT(d->kind)) != 0;
    d->no_lower_order_final = !lower;
    return SDQ_OK;
}

/* What StableDiffusionPipeline does to the scheduler that it is given: steps_offset becomes 1 and
 * clip_sample false, whether the file says otherwise or the defaults of its class do. from_config
 * then hands on what the file says, corrected, but to another class not the defaults of the first.
 * Returns whether that changes anything. */
static int sdq__sch_adopt(const sdq__json *root, sdq_scheduler_desc *d) {
    const sdq_scheduler_desc before = *d;
    const int own = !strcmp(sdq__js_string(root, "_class_name", ""), sdq__sch_classes[d->kind]);
    if (own || sdq__js_get(root, "steps_offset")) d->steps_offset = 1;
    if (own || sdq__js_get(root, "clip_sample")) d->clip_sample = 0;
    return d->steps_offset != before.steps_offset || d->clip_sample != before.clip_sample;
}

/* diffusers writes "lambda_min_clipped": -Infinity, its default, which is not JSON. A copy of the
 * text with that word, outside strings, as null; NULL when out of memory. */
static char *sdq__sch_plain_json(sdq_ctx *ctx, const char *text, size_t len) {
    static const char word[] = "-Infinity";
    const size_t n = sizeof word - 1;
    char *copy = SDQ__NEW_N(ctx, char, sdq__u_max(len, 1));
    size_t i;
    int quoted = 0;
    if (!copy) return NULL;
    if (len) memcpy(copy, text, len);
    for (i = 0; i < len; i++) {
        if (quoted && copy[i] == '\\') i++;
        else if (copy[i] == '"') quoted = !quoted;
        else if (!quoted && len - i >= n && memcmp(copy + i, word, n) == 0)
            memcpy(copy + i, "null     ", n);
    }
    return copy;
}

/* adopted: NULL, or as StableDiffusionPipeline has it; receives whether that differs. */
static sdq_status sdq__sch_from_json(sdq_ctx *ctx, const char *text, size_t len, const char *what,
                                     sdq_scheduler_kind kind, int *adopted,
                                     sdq_scheduler_desc *out) {
    sdq__json *root = NULL;
    char *plain = NULL;
    sdq_scheduler_desc d;
    sdq_status st;
    memset(out, 0, sizeof *out);
    memset(&d, 0, sizeof d);
    if ((unsigned)kind >= (unsigned)SDQ_SCHEDULER_COUNT)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: unknown scheduler kind %d", what, (int)kind);
    d.kind = kind;
    plain = sdq__sch_plain_json(ctx, text, len);
    if (!plain) return SDQ_ERR_OOM;
    SDQ__TRY_DONE(sdq__js_parse(ctx, plain, len, what, &root));
    if (root->kind != SDQ__JS_OBJECT) {
        st = sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: not a JSON object", what);
        goto done;
    }
    SDQ__TRY_DONE(sdq__sch_kind_of(ctx, root, what, &d.kind));
    SDQ__TRY_DONE(sdq__sch_refuse(ctx, root, what, d.kind));
    SDQ__TRY_DONE(sdq__sch_read(ctx, root, what, &d));
    if (adopted) *adopted = sdq__sch_adopt(root, &d);
    *out = d;
done:
    sdq__js_free(ctx, root);
    sdq__free(ctx, plain);
    return st;
}

SDQ_API sdq_status sdq_scheduler_desc_from_json(sdq_ctx *ctx, const char *text, size_t len,
                                                const char *what, sdq_scheduler_kind kind,
                                                sdq_scheduler_desc *out) {
    return sdq__sch_from_json(ctx, text, len, what ? what : "scheduler_config.json", kind, NULL,
                              out);
}
/* ===========================================================================
 * >>pipeline   prompt -> tokens -> context -> denoising loop -> picture
 *
 * Guidance (Ho and Salimans, arXiv 2207.12598): eps = u + g (c - u); both branches are one batch
 * of two, negative prompt first. A network distilled to take g as an input (LCM) has one branch
 * and no negative prompt. The order of random draws is that of diffusers on a CPU.
 * ======================================================================== */

/* What a pipeline remembers of its description, to load networks by. */
struct sdq__pl_source {
    char *unet_int8;            /* NULL: none */
    uint64_t made_from;         /* hash of the float weights that the int8 ones were made from */
    int float_unet;             /* there is to be one */
    int trainable, on_demand;
    int sd2;                    /* of a single file */
};

SDQ_API void sdq_pipeline_free(sdq_ctx *ctx, sdq_pipeline *p) {
    if (!p) return;
    sdq_tokenizer_free(ctx, p->tokenizer);
    sdq_model_free(ctx, p->text);
    sdq_model_free(ctx, p->vae);
    sdq_model_free(ctx, p->unet);
    sdq_model_free(ctx, p->unet_int8);
    if (p->source) sdq__free(ctx, p->source->unet_int8);
    sdq__free(ctx, p->source);
    sdq__free(ctx, p->policy);
    sdq__free(ctx, p->scheduler);
    sdq__free(ctx, p->folder);
    sdq__free(ctx, p);
}

static const char sdq__pl_config[] = "/scheduler/scheduler_config.json";

/* The text is kept: each kind of scheduler reads it in its own way. */
static sdq_status sdq__pl_load_scheduler(sdq_ctx *ctx, const char *folder, char **out) {
    char *path = sdq__io_join(ctx, folder, sdq__pl_config, "");
    size_t len = 0;
    sdq_status st = path ? SDQ_OK : ctx->status;
    if (st == SDQ_OK && !sdq__io_exists(path))
        st = sdq__fail(ctx, SDQ_ERR_MISSING, "%s: is missing; it says how the network is to be "
                       "used, so a pipeline's folder must have it", path);
    if (st == SDQ_OK) st = sdq__io_read_text(ctx, path, (size_t)1 << 20, out, &len);
    if (st == SDQ_OK) st = sdq__pl_scheduler_class(ctx, folder, out);
    sdq__free(ctx, path);
    return st;
}

/* What sentences call the text of the scheduler. */
static char *sdq__pl_scheduler_name(sdq_ctx *ctx, const sdq_pipeline *p) {
    return sdq__io_join(ctx, p->folder, p->single ? "" : sdq__pl_config, "");
}

static sdq_status sdq__pl_scheduler(sdq_ctx *ctx, const sdq_pipeline *p,
                                    const sdq_txt2img_desc *d, sdq_scheduler_desc *out,
                                    int *adopted) {
    char *path = sdq__pl_scheduler_name(ctx, p);
    sdq_status st = path ? SDQ_OK : ctx->status;
    if (st == SDQ_OK)
        st = sdq__sch_from_json(ctx, p->scheduler, strlen(p->scheduler), path,
                                d ? d->scheduler : SDQ_SCHEDULER_DEFAULT, adopted, out);
    sdq__free(ctx, path);
    if (st != SDQ_OK || !d) return st;
    out->steps = d->steps ? d->steps : 50;
    if (!d->karras) return st;
    out->karras = 1;
    if (SDQ__SCH_SIG & SDQ__SCH_BIT(out->kind)) return st;
    return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "scheduler %s: has no Karras sigmas; use them with "
                     "euler or dpmpp2m", sdq_scheduler_name(out->kind));
}

SDQ_API sdq_status sdq_pipeline_scheduler(sdq_ctx *ctx, const sdq_pipeline *p,
                                          const sdq_txt2img_desc *desc, sdq_scheduler_desc *out) {
    int adopted;
    memset(out, 0, sizeof *out);
    return sdq__pl_scheduler(ctx, p, desc, out, &adopted);
}

/* The networks of a pipeline work on the same latents and texts. */
static sdq_status sdq__pl_fits(sdq_ctx *ctx, const sdq_pipeline *p) {
    const sdq_model_info u = p->info[SDQ_PART_UNET], t = p->info[SDQ_PART_TEXT];
    const sdq_model_info v = p->info[SDQ_PART_VAE];
    const size_t length = sdq_tokenizer_length(p->tokenizer);
    const char *in = p->single ? "its UNet" : "unet/config.json";
    const char *vae = p->single ? "its VAE" : "vae/config.json";
    const char *text = p->single ? "its text encoder" : "text_encoder/config.json";
    if (u.in != u.out)
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s%s: \"in_channels\" is %zu, "
                         "\"out_channels\" %zu; text to picture needs them equal (this may be an "
                         "inpainting or upscaling model)", p->folder,
                         p->single ? "" : "/unet/config.json", u.in, u.out);
    if (u.in != v.latent)
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: \"in_channels\" of %s is %zu, "
                         "\"latent_channels\" of %s %zu; they must be equal",
                         p->folder, in, u.in, vae, v.latent);
    if (u.context != t.context)
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: \"cross_attention_dim\" of %s is "
                         "%zu, \"hidden_size\" of %s %zu; they must be equal",
                         p->folder, in, u.context, text, t.context);
    if (length > t.tokens)
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: \"model_max_length\" of "
                         "tokenizer/tokenizer_config.json is %zu (77 if it says nothing), "
                         "\"max_position_embeddings\" of text_encoder/config.json only %zu",
                         p->folder, length, t.tokens);
/* A truth as Python takes it: null and 0 are false. def if absent. */
static sdq_status sdq__sch_flag(sdq_ctx *ctx, const sdq__json *root, const char *what,
                                const char *key, int def, int *out) {
    const sdq__json *v = sdq__js_get(root, key);
    *out = v ? v->kind != SDQ__JS_NULL && v->num != 0 : def;
    if (!v || v->kind == SDQ__JS_NULL || v->kind == SDQ__JS_BOOL || v->kind == SDQ__JS_NUMBER)
        return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: \"%s\" must be true or false", what, key);
}

    if (p->single && sdq_tokenizer_vocab(p->tokenizer) > t.vocab)
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: its text encoder has %zu ids, but the tokenizer "
                         "that was given for it has %zu; give the one it was trained with",
    int skip;
                         p->folder, t.vocab, sdq_tokenizer_vocab(p->tokenizer));
    return SDQ_OK;
}

static sdq_status sdq__pl_is_folder(sdq_ctx *ctx, const char *folder) {
    char *path = sdq__io_join(ctx, folder, "/tokenizer/vocab.json", "");
    char *fast = sdq__io_join(ctx, folder, "/tokenizer/tokenizer.json", "");
    sdq_status st = path && fast ? SDQ_OK : ctx->status;
    if (st == SDQ_OK && !sdq__io_exists(path))
        st = sdq__fail(ctx, SDQ_ERR_MISSING, sdq__io_exists(fast)
                       ? "%s/tokenizer: vocab.json and merges.txt are missing; tokenizer.json "
                         "holds the same, but is not read: save the tokenizer with transformers 4"
                       : "%s: is not a file and not the folder of a pipeline, which holds "
                         "tokenizer/ (with vocab.json), text_encoder/, unet/, vae/ and scheduler/",
                       *folder ? folder : "(empty path)");
    sdq__free(ctx, path);
    return st;
}

/* Tokenizer and scheduler of a folder. */
static sdq_status sdq__pl_open_folder(sdq_ctx *ctx, sdq_pipeline *p) {
    char *tok = sdq__io_join(ctx, p->folder, "/tokenizer", "");
    sdq_status st = tok ? sdq__pl_is_folder(ctx, p->folder) : ctx->status;
    if (st == SDQ_OK) st = sdq_tokenizer_load(ctx, tok, &p->tokenizer);
    if (st == SDQ_OK) st = sdq__pl_load_scheduler(ctx, p->folder, &p->scheduler);
    sdq__free(ctx, tok);
    return st;
}

/* What diffusers gives to Stable Diffusion from a single file. */
static sdq_status sdq__pl_single_scheduler(sdq_ctx *ctx, sdq_pipeline *p) {
    sdq__str s;
    memset(&s, 0, sizeof s);
    sdq__str_format(ctx, &s, "{\n  \"_class_name\": \"PNDMScheduler\",\n"
                    "  \"beta_start\": 0.00085,\n  \"beta_end\": 0.012,\n"
                    "  \"beta_schedule\": \"scaled_linear\",\n  \"clip_sample\": false,\n"
                    "  \"num_train_timesteps\": 1000,\n  \"prediction_type\": \"%s\",\n"
                    "  \"set_alpha_to_one\": false,\n  \"skip_prk_steps\": true,\n"
                    "  \"steps_offset\": 1,\n  \"timestep_spacing\": \"leading\",\n"
                    "  \"trained_betas\": null\n}\n",
                    p->prediction == SDQ_PREDICT_V ? "v_prediction" : "epsilon");
    p->scheduler = s.s;
    return s.bad ? SDQ_ERR_OOM : SDQ_OK;
}

static sdq_status sdq__pl_single_tokenizer(sdq_ctx *ctx, sdq_pipeline *p,
                                           const sdq_pipeline_desc *d) {
    sdq_tokenizer_desc t;
    if (!d->merges || !d->merges_bytes)
        return sdq__fail(ctx, SDQ_ERR_MISSING, "%s: a single file holds no tokenizer and none was "
                         "given; set \"merges\" of sdq_pipeline_desc to CLIP's, which are in "
                         "tools/clip_vocab.inc", p->folder);
    memset(&t, 0, sizeof t);
    t.max_length = sdq__u_min(p->info[SDQ_PART_TEXT].tokens, 77);
    if (p->source->sd2) t.pad = "!";
    return sdq_tokenizer_create(ctx, d->merges, d->merges_bytes, &t, &p->tokenizer);
}

    int lower;
/* What the file is, and so what its UNet predicts. */
static sdq_status sdq__pl_open_single(sdq_ctx *ctx, sdq_pipeline *p, const sdq_pipeline_desc *d) {
    sdq_file *f = NULL;
    sdq_file_info info;
    SDQ__TRY(sdq_file_open(ctx, p->folder, &f));
    info = sdq_file_describe(f);
    sdq_file_close(ctx, f);
    if (info.kind != SDQ_FILE_SD1 && info.kind != SDQ_FILE_SD2)
        return sdq__sf_refuse(ctx, p->folder, &info, "drawing needs a single file of Stable "
                              "Diffusion 1 or 2 with UNet, VAE and text encoder, or a diffusers "
                              "folder");
    p->source->sd2 = info.kind == SDQ_FILE_SD2;
    p->prediction = info.prediction;
    p->because = info.because;
    if (d->prediction == SDQ_FILE_PREDICTS_DEFAULT) return SDQ_OK;
    p->prediction = d->prediction == SDQ_FILE_PREDICTS_V ? SDQ_PREDICT_V : SDQ_PREDICT_EPSILON;
    p->because = "as was asked for";
    return SDQ_OK;
}

/* The models of SD 2 for 512 and for 768 pixels differ in what they predict and in nothing else:
 * whoever says the one says the other. */
static void sdq__pl_single_size(const sdq_pipeline *p, sdq_model_info *unet) {
    const int large = p->source->sd2 && p->prediction == SDQ_PREDICT_V;
    if (p->single)
        unet->sample_size = unet->sample_width = (large ? 768 : 512) / p->info[SDQ_PART_VAE].factor;
}

/* Look at everything, load nothing: the networks' shapes and whether they fit together. */
static sdq_status sdq__pl_look(sdq_ctx *ctx, sdq_pipeline *p, const sdq_pipeline_desc *d) {
    sdq_model_info *unet = &p->info[SDQ_PART_UNET];
    SDQ__TRY(sdq__md_look(ctx, p->folder, SDQ_PART_TEXT, &p->info[SDQ_PART_TEXT]));
    SDQ__TRY(sdq__md_look(ctx, p->folder, SDQ_PART_VAE, &p->info[SDQ_PART_VAE]));
    if (p->source->float_unet) SDQ__TRY(sdq__md_look(ctx, p->folder, SDQ_PART_UNET, unet));
    if (d->unet_int8) {
        p->source->unet_int8 = sdq__strdup(ctx, d->unet_int8);
        p->policy = SDQ__NEW(ctx, sdq_policy);
        if (!p->policy || !p->source->unet_int8) return ctx->status;
        SDQ__TRY(sdq_model_peek_int8(ctx, p->folder, d->unet_int8, unet, &p->source->made_from,
                                     p->policy));
    }
    if (p->single) {
        SDQ__TRY(sdq__pl_single_scheduler(ctx, p));
        SDQ__TRY(sdq__pl_single_tokenizer(ctx, p, d));
        sdq__pl_single_size(p, unet);
    }
    if (!p->source->float_unet && !d->unet_int8)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: neither a float nor an int8 UNet was asked "
                         "for", p->folder);
    return sdq__pl_fits(ctx, p);
}

/* ---- the networks, at once or on demand ---- */

typedef enum sdq__pl_which {
    SDQ__PL_TEXT = 0, SDQ__PL_VAE, SDQ__PL_UNET, SDQ__PL_INT8, SDQ__PL_NETWORKS
} sdq__pl_which;

static sdq_status sdq__pl_load_unet(sdq_ctx *ctx, const sdq_pipeline *p, sdq_model **out) {
    const struct sdq__pl_source *src = p->source;
    SDQ__TRY(sdq__md_load(ctx, p->folder, SDQ_PART_UNET, !src->trainable, out));
    if (ctx->dry || !src->unet_int8 || (*out)->source == src->made_from) return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: was made from other float weights than those in "
                     "%s%s; quantize these, or load the int8 network alone", src->unet_int8,
                     p->folder, p->single ? "" : "/unet");
}

static sdq_status sdq__pl_load_one(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_which which,
                                   sdq_model **out) {
    switch (which) {
    case SDQ__PL_TEXT:
        return sdq__md_load(ctx, p->folder, SDQ_PART_TEXT, 1, out);
    case SDQ__PL_VAE:
        SDQ__TRY(sdq__md_load(ctx, p->folder, SDQ_PART_VAE, !p->vae_int8, out));
        return p->vae_int8 ? sdq_vae_quantize(ctx, *out, SDQ_RANGE_DEFAULT) : SDQ_OK;
    case SDQ__PL_UNET:
        SDQ__TRY(sdq__pl_load_unet(ctx, p, out));
        break;
    default:
        SDQ__TRY(sdq_model_load_int8(ctx, p->folder, p->source->unet_int8, out, NULL));
    }
    sdq__pl_single_size(p, &(*out)->info);
    return SDQ_OK;
}

static sdq_model *sdq__pl_loaded(const sdq_pipeline *p, sdq__pl_which which) {
    return which == SDQ__PL_TEXT ? p->text : which == SDQ__PL_VAE ? p->vae
         : which == SDQ__PL_UNET ? p->unet : p->unet_int8;
}
static int sdq__pl_has(const sdq_pipeline *p, sdq__pl_which which) {
    const struct sdq__pl_source *src = p->source;
    if (sdq__pl_loaded(p, which)) return 1;
    if (!src->on_demand) return 0;
    return which == SDQ__PL_INT8 ? src->unet_int8 != NULL
         : which == SDQ__PL_UNET ? src->float_unet : 1;
}

/* Networks that a call has loaded for itself. */
typedef struct sdq__pl_held { sdq_model *m[SDQ__PL_NETWORKS]; } sdq__pl_held;

static void sdq__pl_drop(sdq_ctx *ctx, sdq__pl_held *held, sdq__pl_which which) {
    if (!held->m[which]) return;
    sdq_model_free(ctx, held->m[which]);
    held->m[which] = NULL;
    sdq__mem_trim(ctx);
}
/* A network: the pipeline's, or one that is loaded now. */
static sdq_status sdq__pl_take(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_held *held,
                               sdq__pl_which which, const sdq_model **out) {
    *out = sdq__pl_loaded(p, which);
    if (*out) return SDQ_OK;
    if (!held->m[which]) SDQ__TRY(sdq__pl_load_one(ctx, p, which, &held->m[which]));
    *out = held->m[which];
    return SDQ_OK;
}

static sdq_status sdq__pl_load(sdq_ctx *ctx, sdq_pipeline *p, const sdq_pipeline_desc *d) {
    if ((unsigned)d->prediction >= SDQ_FILE_PREDICTS_COUNT || (d->prediction && !p->single))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: \"prediction\" is for single files; what the "
                         "UNet of a folder predicts is in its scheduler_config.json", p->folder);
    if (p->single) SDQ__TRY(sdq__pl_open_single(ctx, p, d));
    else SDQ__TRY(sdq__pl_open_folder(ctx, p));
    SDQ__TRY(sdq__pl_look(ctx, p, d));
    if (d->on_demand) return SDQ_OK;
    SDQ__TRY(sdq__pl_load_one(ctx, p, SDQ__PL_TEXT, &p->text));
    SDQ__TRY(sdq__pl_load_one(ctx, p, SDQ__PL_VAE, &p->vae));
    if (p->source->float_unet) SDQ__TRY(sdq__pl_load_one(ctx, p, SDQ__PL_UNET, &p->unet));
    return d->unet_int8 ? sdq__pl_load_one(ctx, p, SDQ__PL_INT8, &p->unet_int8) : SDQ_OK;
/* diffusers takes the scheduler's class from model_index.json, whatever "_class_name" says. */
static sdq_status sdq__pl_scheduler_class(sdq_ctx *ctx, const char *folder, char **text) {
    char *path = sdq__io_join(ctx, folder, "/model_index.json", "");
    sdq__json *root = NULL;
    const sdq__json *pair;
    sdq__str s;
    size_t from, to;
    sdq_status st = path ? SDQ_OK : ctx->status;
    memset(&s, 0, sizeof s);
    if (st == SDQ_OK && sdq__io_exists(path)) st = sdq__js_load(ctx, path, &root);
    pair = root ? sdq__js_get(root, "scheduler") : NULL;
    pair = pair && pair->kind == SDQ__JS_ARRAY && pair->child ? pair->child->next : NULL;
    if (pair && pair->kind == SDQ__JS_STRING && **text == '{') {
        const int named = sdq__md_value_at(*text, "_class_name", &from, &to);
        if (!named) from = to = 1;
        sdq__str_add(ctx, &s, *text, from);
        if (!named) sdq__str_format(ctx, &s, "\"_class_name\": ");
        sdq__str_json(ctx, &s, pair->str);
        if (!named && (*text)[1 + strspn(*text + 1, " \t\r\n")] != '}')
            sdq__str_add(ctx, &s, ",", 1);
        sdq__str_add(ctx, &s, *text + to, strlen(*text + to));
        if (s.bad) st = SDQ_ERR_OOM;
        else { sdq__free(ctx, *text); *text = s.s; s.s = NULL; }
        sdq__str_free(ctx, &s);
    }
    sdq__js_free(ctx, root);
    sdq__free(ctx, path);
    return st;
}

}

SDQ_API sdq_status sdq_pipeline_load(sdq_ctx *ctx, const char *path,
                                     const sdq_pipeline_desc *desc, sdq_pipeline **out) {
    sdq_pipeline *p;
    sdq_pipeline_desc d;
    sdq_status st;
    *out = NULL;
    if (!p) return ctx->status;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    p->because = "";
    p->folder = sdq__strdup(ctx, path);
    p->single = sdq__io_is_file(path);
    p->vae_int8 = d.vae_int8;
    p->vae_tiling = d.vae_tiling;
    p->source = SDQ__NEW(ctx, struct sdq__pl_source);
    st = ctx->status;
    if (st == SDQ_OK) {
        p->source->float_unet = !d.int8_only;
        p->source->trainable = d.trainable;
        p->source->on_demand = d.on_demand;
        st = sdq__pl_load(ctx, p, &d);
    }
    if (st == SDQ_OK) *out = p;
    else sdq_pipeline_free(ctx, p);
    return st;
}

SDQ_API sdq_tensor *sdq_pipeline_ids(sdq_ctx *ctx, const sdq_pipeline *p, const char *const *texts,
                                     size_t n) {
    const size_t t = sdq_tokenizer_length(p->tokenizer);
    size_t dim[2], i, count;
    sdq_tensor *ids;
    dim[0] = n; dim[1] = t;
    ids = sdq_tensor_new(ctx, SDQ_I32, 2, dim);
    for (i = 0; ids && i < n; i++)
        if (sdq_tokenizer_encode(ctx, p->tokenizer, texts[i] ? texts[i] : "",
                                 (int32_t *)ids->data + i * t, t, &count) != SDQ_OK) return NULL;
    return ids;
}

/* ---- the precision of every evaluation ---- */

static int sdq__pl_policy_fits(const sdq_policy *p, const sdq_scheduler *s) {
    return p->count == sdq_scheduler_count(s) && p->scheduler == sdq_scheduler_get_desc(s)->kind;
}

/* A schedule found for other settings: every evaluation takes the precision of the nearest
 * timestep. */
static void sdq__pl_map_policy(const sdq_policy *p, const sdq_scheduler *s,
                               unsigned char *is_float) {
    size_t i, j;
    if (sdq__pl_policy_fits(p, s)) { memcpy(is_float, p->is_float, p->count); return; }
    for (i = 0; i < sdq_scheduler_count(s); i++) {
        size_t best = 0;
        for (j = 1; j < p->count; j++) {
            const double t = (double)sdq_scheduler_timestep(s, i);
            if (fabs((double)p->timestep[j] - t) < fabs((double)p->timestep[best] - t)) best = j;
        }
    if (v.out > 4)
        return sdq__fail(ctx, SDQ_ERR_UNSUPPORTED, "%s: \"out_channels\" of %s is %zu; pictures"
                         " have at most 4", p->folder, vae, v.out);
        is_float[i] = p->is_float[best];
    }
}

static sdq_status sdq__pl_precision(sdq_ctx *ctx, const sdq_pipeline *p, const sdq_txt2img_desc *d,
                                    const sdq_scheduler *s, unsigned char *is_float,
                                    const char **notice) {
    const size_t n = sdq_scheduler_count(s);
    size_t i;
    switch (d->precision) {
    case SDQ_PRECISION_FLOAT: memset(is_float, 1, n); return SDQ_OK;
    case SDQ_PRECISION_INT8: memset(is_float, 0, n); return SDQ_OK;
    case SDQ_PRECISION_EDGES:
        for (i = 0; i < n; i++)
            is_float[i] = (unsigned char)(i < d->k_first || i + d->k_last > n - 1);
        return SDQ_OK;
    case SDQ_PRECISION_LIST:
        if (!d->is_float) return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "precision list: none was given");
        memcpy(is_float, d->is_float, n);
        return SDQ_OK;
    default:
        if (!p->policy || p->policy->count == 0)
            return sdq__fail(ctx, SDQ_ERR_MISSING,
                             "the int8 network has no precision schedule; make one with"
    sdq__free(ctx, fast);
                             " sdq schedule, or choose first and last evaluations");
        sdq__pl_map_policy(p->policy, s, is_float);
        if (notice && !sdq__pl_policy_fits(p->policy, s))
            *notice = "the precision schedule was made for other steps or another scheduler;"
                      " it was mapped by timestep";
        return SDQ_OK;
    }
}

/* ---- the loop ---- */

/* One of the two networks with its caches. */
typedef struct sdq__pl_net {
    sdq__pl_which which;
    const sdq_model *model;         /* NULL: not there yet, or not any more */
    sdq_mode mode;
    sdq_prompt_cache *prompt;
    sdq_time_table *times;
} sdq__pl_net;

typedef struct sdq__pl_run {
    const sdq_txt2img_desc *d;
    sdq_scheduler *s;
    sdq__pl_net net[2];             /* [0] int8, [1] float */
    sdq__pl_held held;
    int both;                       /* they stay in memory together */
    sdq_tensor *context;            /* [branches * count, t, c] */
    sdq_tensor *x;
    sdq_rng rng;
    size_t branches, count;
    float *guidance;                /* of every entry, for networks that are told; else NULL */
    unsigned char is_float[1001];
} sdq__pl_run;

/* Two evaluations per step, with and without the prompt, unless the network takes the guidance
 * scale as an input (time_cond_proj_dim) or there is no guidance. */
static size_t sdq__pl_branches(const sdq_pipeline *p, float guidance) {
    return guidance > 1.0f && !p->info[SDQ_PART_UNET].guidance ? 2 : 1;
}

static sdq_status sdq__pl_caches(sdq_ctx *ctx, sdq__pl_run *r, sdq__pl_net *net) {
    const size_t n = sdq_scheduler_count(r->s);
    const sdq_mark mark = sdq_arena_mark(ctx);
    float *t = SDQ__PUSH_N(ctx, float, n), *g = SDQ__PUSH_N(ctx, float, n);
    sdq_status st = ctx->status;
    size_t i;
    for (i = 0; st == SDQ_OK && i < n; i++) {
        t[i] = sdq_scheduler_timestep(r->s, i);
        g[i] = r->d->guidance;
    }
    if (st == SDQ_OK) st = sdq_unet_prompt(ctx, net->model, r->context, net->mode, &net->prompt);
    if (st == SDQ_OK)
        st = sdq_unet_times(ctx, net->model, t, r->guidance ? g : NULL, n, net->mode, &net->times);
    sdq_arena_release(ctx, mark);
    return st;
}

/* Forget a network: its caches, and its weights if they were loaded for this drawing. */
static void sdq__pl_leave(sdq_ctx *ctx, sdq__pl_run *r, sdq__pl_net *net) {
    sdq_prompt_cache_free(ctx, net->prompt);
    sdq_time_table_free(ctx, net->times);
    net->prompt = NULL;
    net->times = NULL;
    net->model = NULL;
    sdq__pl_drop(ctx, &r->held, net->which);
}

/* Make a network ready; the other one leaves the memory first, if it was loaded on demand. */
static sdq_status sdq__pl_enter(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_run *r,
                                sdq__pl_net *net) {
    sdq__pl_net *other = &r->net[net == &r->net[0]];
    if (net->prompt) return SDQ_OK;
    if (!r->both && other->which != net->which && r->held.m[other->which])
        sdq__pl_leave(ctx, r, other);
    SDQ__TRY(sdq__pl_take(ctx, p, &r->held, net->which, &net->model));
    return sdq__pl_caches(ctx, r, net);
}

static sdq_status sdq__pl_advance(sdq_ctx *ctx, sdq__pl_run *r, size_t i, const sdq_tensor *eps) {
    return sdq_scheduler_step(ctx, r->s, i, sdq_f32(eps), sdq_f32(r->x), sdq_f32(r->x), r->count,
                              r->x->dim[1], r->x->dim[2], r->x->dim[3], &r->rng);
}

/* Evaluation i: input for both branches, network, guidance, scheduler. */
static sdq_status sdq__pl_step(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_run *r, size_t i) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__pl_net *net = &r->net[r->is_float[i] != 0];
    const size_t n = sdq_tensor_count(r->x), all = r->branches * r->count;
    const float g = r->d->guidance;
    sdq_tensor *in, *raw, *eps;
    sdq_unet_input u;
    float *times;
    size_t j;
    memset(&u, 0, sizeof u);
    SDQ__TRY(sdq__pl_enter(ctx, p, r, net));
    in = sdq_tensor_4d(ctx, all, r->x->dim[1], r->x->dim[2], r->x->dim[3]);
    times = SDQ__PUSH_N(ctx, float, all);
    if (!in || !times) return ctx->status;
    for (j = 0; j < all; j++) times[j] = sdq_scheduler_timestep(r->s, i);
    for (j = 0; j < r->branches; j++)
        sdq_scheduler_scale_input(r->s, i, sdq_f32(r->x), sdq_f32(in) + j * n, n);
    u.sample = in;
    u.timesteps = times;
    u.guidance = r->guidance;
    u.prompt = net->prompt;
    u.times = net->times;
    raw = eps = sdq_unet_forward(ctx, net->model, &u, net->mode);
    if (!raw) return ctx->status;
    if (r->branches == 2) {
        eps = sdq__t_like(ctx, r->x);
        if (!eps) return ctx->status;
        for (j = 0; j < n; j++) {
            const float un = sdq_f32(raw)[j];
            sdq_f32(eps)[j] = un + g * (sdq_f32(raw)[n + j] - un);
        }
    }
    if (r->d->step) {
        sdq_step_info info;
        info.i = i; info.count = sdq_scheduler_count(r->s); info.timestep = times[0];
        info.is_float = r->is_float[i];
        info.x = r->x; info.eps = eps; info.input = in; info.raw = raw; info.context = r->context;
        info.guidance = r->guidance;
        if (r->d->step(r->d->user, &info))
            return sdq__fail(ctx, SDQ_ERR_CANCELLED, "drawing: cancelled at evaluation %zu", i);
    }
    SDQ__TRY(sdq__pl_advance(ctx, r, i, eps));
    sdq_arena_release(ctx, mark);
    return SDQ_OK;
}

/* The context of both branches: negative prompt first, each repeated for every picture. */
static sdq_tensor *sdq__pl_context(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_run *r) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_model *encoder;
    const char *text[2];
    sdq_tensor *c, *all;
    size_t dim[3], i, size;
    text[0] = r->d->negative;
    text[1] = r->d->prompt;
    if (sdq__pl_take(ctx, p, &r->held, SDQ__PL_TEXT, &encoder) != SDQ_OK) return NULL;
    c = sdq_text_forward(ctx, encoder,
                         sdq_pipeline_ids(ctx, p, text + (2 - r->branches), r->branches));
    sdq__pl_drop(ctx, &r->held, SDQ__PL_TEXT);
    if (!c) return NULL;
    memcpy(dim, c->dim, sizeof dim);
    size = dim[1] * dim[2];
    dim[0] *= r->count;
    all = sdq__t_raw(ctx, SDQ_F32, 3, dim);
    for (i = 0; all && i < dim[0]; i++)
        memcpy(sdq_f32(all) + i * size, sdq_f32(c) + i / r->count * size, size * sizeof(float));
    return sdq__keep(ctx, mark, all);
}

/* Height and width of the latents: of the picture asked for, or the UNet's own, or 512 pixels. */
static void sdq__pl_latent_size(const sdq_pipeline *p, const sdq_txt2img_desc *d, size_t *h,
                                size_t *w) {
    const sdq_model_info unet = p->info[SDQ_PART_UNET];
    const size_t f = p->info[SDQ_PART_VAE].factor, other = sdq__u_max(512 / f, 1);
    *h = d->height ? d->height / f : unet.sample_size ? unet.sample_size : other;
    *w = d->width ? d->width / f : unet.sample_width ? unet.sample_width : other;
}

static sdq_status sdq__pl_noise(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_run *r) {
    const sdq_txt2img_desc *d = r->d;
    const size_t f = p->info[SDQ_PART_VAE].factor, c = p->info[SDQ_PART_VAE].latent;
    const float sigma = sdq_scheduler_init_sigma(r->s);
    size_t i, n, h, w;
    if (d->width % f || d->height % f || d->width > 65536 || d->height > 65536)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                         "a picture of %zu x %zu: sides must be multiples of %zu and"
                         " at most 65536",
                         d->width ? d->width : w * f, d->height ? d->height : h * f, f);
    r->x = sdq_tensor_4d(ctx, r->count, h, w, c);
    if (!r->x) return ctx->status;
    n = sdq_tensor_count(r->x);
    if (d->init_latents) memcpy(r->x->data, d->init_latents, n * sizeof(float));
    else sdq_rng_normal_nchw(&r->rng, sdq_f32(r->x), r->count, h, w, c);
    if (!path) return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "sdq_pipeline_load: path is NULL");
    p = SDQ__NEW(ctx, sdq_pipeline);
    for (i = 0; i < n; i++) sdq_f32(r->x)[i] *= sigma;
    return SDQ_OK;
}

static sdq_status sdq__pl_networks(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_run *r) {
    const int fake = r->d->mode == SDQ_FAKE;
    size_t i, turns = 0;
    r->net[1].which = sdq__pl_has(p, SDQ__PL_UNET) ? SDQ__PL_UNET : SDQ__PL_INT8;
    r->net[1].mode = SDQ_FLOAT;
    r->net[0].which = fake ? SDQ__PL_UNET : SDQ__PL_INT8;
    r->net[0].mode = fake ? SDQ_FAKE : SDQ_INT8;
    for (i = 0; i < sdq_scheduler_count(r->s); i++) {
        if (i && !r->is_float[i] != !r->is_float[i - 1]) turns++;
        if (!sdq__pl_has(p, r->net[r->is_float[i] != 0].which))
            return sdq__fail(ctx, SDQ_ERR_MISSING,
                             r->is_float[i] || fake ? "no float UNet is loaded" :
                             "no int8 UNet is loaded: name one in sdq_pipeline_desc.unet_int8 "
                             "(--unet); sdq quantize makes them");
    }
    r->both = turns > 2;        /* float edges are two; a schedule that turns more would load for
                                 * longer than it computes */
    return SDQ_OK;
}

static int sdq__pl_finite(const sdq_tensor *x) {
    const size_t n = sdq_tensor_count(x);
    size_t i;
    for (i = 0; i < n; i++)
        if (!(fabsf(sdq_f32(x)[i]) <= FLT_MAX)) return 0;
    return 1;
}

static sdq_status sdq__pl_denoise(sdq_ctx *ctx, const sdq_pipeline *p, sdq__pl_run *r,
                                  const char **notice) {
    size_t i, n;
    int adopted = 0;
    sdq_scheduler_desc sd;
    const sdq_txt2img_desc *d = r->d;
    SDQ__TRY(sdq__pl_scheduler(ctx, p, d, &sd, &adopted));
    SDQ__TRY(sdq_scheduler_create(ctx, &sd, &r->s));
    if (notice && adopted)
        *notice = "scheduler_config.json: \"steps_offset\" is taken as 1 and \"clip_sample\" as"
                  " false, as StableDiffusionPipeline does";
    n = sdq_scheduler_count(r->s);
    if (n > 1001)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%zu evaluations: at most 1001 are possible", n);
    SDQ__TRY(sdq__pl_precision(ctx, p, d, r->s, r->is_float, notice));
    SDQ__TRY(sdq__pl_networks(ctx, p, r));
    sdq_rng_init(&r->rng, d->rng, d->seed);
    SDQ__TRY(sdq__pl_noise(ctx, p, r));
    r->context = sdq__pl_context(ctx, p, r);
    if (!r->context) return ctx->status;
    if (p->info[SDQ_PART_UNET].guidance) {
        r->guidance = SDQ__PUSH_N(ctx, float, r->count);
        if (!r->guidance) return ctx->status;
        for (i = 0; i < r->count; i++) r->guidance[i] = d->guidance;
    }
    for (i = 0; i < n; i++) {
        const int like_before = i && !r->is_float[i] == !r->is_float[i - 1];
        if (ctx->dry && like_before) SDQ__TRY(sdq__pl_advance(ctx, r, i, r->x));
        else SDQ__TRY(sdq__pl_step(ctx, p, r, i));
        if (!ctx->dry && !sdq__pl_finite(r->x))
            return sdq__fail(ctx, SDQ_ERR_NUMERIC, "drawing: evaluation %zu at timestep %g with "
                             "guidance %g gave latents that are not finite; are the weights and "
                             "initial latents sound?", i, (double)sdq_scheduler_timestep(r->s, i),
                             (double)d->guidance);
        if (d->progress && d->progress(d->user, "unet", i + 1, n, 0.0))
            return sdq__fail(ctx, SDQ_ERR_CANCELLED, "drawing: cancelled after evaluation %zu", i);
    }
    return SDQ_OK;
}

SDQ_API sdq_tensor *sdq_txt2img_latents(sdq_ctx *ctx, const sdq_pipeline *p,
                                        const sdq_txt2img_desc *desc, size_t *float_count,
                                        const char **notice) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_txt2img_desc d;
    sdq__pl_run *r;
    sdq_tensor *x = NULL;
    size_t i;
    if (notice) *notice = "";
    if (d.guidance == 0.0f) d.guidance = 7.5f;
    if (d.steps == 0) d.steps = 50;
    r->d = &d;
    r->count = d.count ? d.count : 1;
    r->branches = sdq__pl_branches(p, d.guidance);
    if (sdq__pl_denoise(ctx, p, r, notice) == SDQ_OK) x = r->x;
    for (i = 0; float_count && r->s && i < sdq_scheduler_count(r->s); i++) {
        if (i == 0) *float_count = 0;
        *float_count += r->is_float[i] != 0;
    }
    if (r->s) sdq_scheduler_free(ctx, r->s);
    x = sdq__keep(ctx, mark, x);
    for (i = 0; i < 2; i++) sdq__pl_leave(ctx, r, &r->net[i]);
    sdq__pl_drop(ctx, &r->held, SDQ__PL_TEXT);
    sdq__free(ctx, r);
    return x;
}

/* Picture i of the latents, 8 bits. */
static sdq_status sdq__pl_decode(sdq_ctx *ctx, const sdq_pipeline *p, const sdq_model *vae,
                                 const sdq_tensor *latents, size_t i, sdq_image *image) {
    const float scaling = vae->info.scaling_factor;
    const size_t size = sdq_tensor_count(latents) / latents->dim[0];
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_mode mode = p->vae_int8 ? SDQ_INT8 : SDQ_FLOAT;
    sdq_tensor *y,
        *z = sdq_tensor_4d(ctx, 1, latents->dim[1], latents->dim[2], latents->dim[3]);
    size_t j;
    for (j = 0; z && j < size; j++) sdq_f32(z)[j] = sdq_f32(latents)[i * size + j] / scaling;
    y = p->vae_tiling ? sdq_vae_decode_tiled(ctx, vae, z, mode) : sdq_vae_decode(ctx, vae, z, mode);
    if (!y) return ctx->status;
    if (!ctx->dry && !sdq__pl_finite(y))
        return sdq__fail(ctx, SDQ_ERR_NUMERIC, "decoding: picture %zu has values that are not "
                         "finite; are the latents and the VAE's weights sound?", i);
    SDQ__TRY(sdq_image_new(ctx, y->dim[2], y->dim[1], y->dim[3], image));
    for (j = 0; !ctx->dry && j < sdq_tensor_count(y); j++) {
        float v = sdq_f32(y)[j] * 0.5f + 0.5f;
        v = v < 0.0f ? 0.0f : v > 1.0f ? 1.0f : v;
        image->px[j] = (unsigned char)sdq__q_rint(v * 255.0f);
    }
    sdq_arena_release(ctx, mark);
    return SDQ_OK;
}

SDQ_API sdq_status sdq_decode_latents(sdq_ctx *ctx, const sdq_pipeline *p, sdq_tensor *latents,
                                      sdq_image *images) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_model *vae = NULL;
    sdq__pl_held held;
    sdq_status st = ctx->status;
    size_t i, done;
    if (st != SDQ_OK) return st;
    if (!sdq__md_check(ctx, "decoding", latents, 4, c)) return ctx->status;
    memset(images, 0, latents->dim[0] * sizeof *images);
    memset(&held, 0, sizeof held);
    st = sdq__pl_take(ctx, p, &held, SDQ__PL_VAE, &vae);
    for (done = 0; done < latents->dim[0] && st == SDQ_OK; done += st == SDQ_OK)
        st = sdq__pl_decode(ctx, p, vae, latents, done, &images[done]);
    for (i = 0; st != SDQ_OK && i < done; i++) sdq_image_free(ctx, &images[i]);
    sdq_arena_release(ctx, mark);
    sdq__pl_drop(ctx, &held, SDQ__PL_VAE);
    return st;
}

SDQ_API sdq_status sdq_txt2img(sdq_ctx *ctx, const sdq_pipeline *p, const sdq_txt2img_desc *d,
                               sdq_image *images) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_tensor *x = sdq_txt2img_latents(ctx, p, d, NULL, NULL);
    sdq_status st;
    if (!x && d) memset(images, 0, (d->count ? d->count : 1) * sizeof *images);
    st = x ? sdq_decode_latents(ctx, p, x, images) : ctx->status;
    sdq_arena_release(ctx, mark);
    return st;
}

/* A context like ctx that runs dry. */
static sdq_status sdq__pl_dry(const sdq_ctx *ctx, sdq__dry *dry, sdq_ctx **out) {
    sdq_ctx_desc d = ctx->desc;
    memset(dry, 0, sizeof *dry);
    d.tier = ctx->tier;
    d.threads = ctx->threads;
    d.alloc = sdq__mem_dry_alloc;
    d.release = sdq__mem_dry_release;
    d.user = dry;
    SDQ__TRY(sdq_ctx_create(&d, out));
    (*out)->dry = dry;
    return SDQ_OK;
}

SDQ_API sdq_status sdq_txt2img_memory(sdq_ctx *ctx, const char *path,
                                      const sdq_pipeline_desc *pipeline,
                                      const sdq_txt2img_desc *desc, size_t *bytes) {
    sdq_txt2img_desc d = *desc;
    sdq_pipeline *p = NULL;
    sdq_image *images;
    sdq_status st;
    sdq_ctx *run;
    sdq__dry dry;
    *bytes = 0;
    if (ctx->status != SDQ_OK) return ctx->status;
    if (sdq__pl_dry(ctx, &dry, &run) != SDQ_OK)
        return sdq__fail(ctx, SDQ_ERR_OOM, "out of memory");
    d.step = NULL;
    d.progress = NULL;
    if (d.count == 0) d.count = 1;
    st = sdq_pipeline_load(run, path, pipeline, &p);
    images = st == SDQ_OK ? SDQ__NEW_N(run, sdq_image, d.count) : NULL;
    if (images) {
        size_t i;
        st = sdq_txt2img(run, p, &d, images);
        for (i = 0; st == SDQ_OK && i < d.count; i++) sdq_image_free(run, &images[i]);
    }
    sdq__free(run, images);
    sdq_pipeline_free(run, p);
    if (st == SDQ_OK) *bytes = dry.most;
    else (void)sdq__fail(ctx, st, "%s", sdq_error_text(run));
    sdq_ctx_free(run);
    free(dry.large);
    return st;
}

/* ===========================================================================
 * >>report   PSNR, SSIM, Frechet distance, percentiles, bootstrap, nearest neighbour
 *
 * Everything is computed in double, in one fixed order, with the ln and exp of this file: equal
 * inputs give equal bits. Nothing here is tuned for speed; a report is made once.
 *
 * PSNR and SSIM compare two pictures pixel by pixel and say how far an int8 picture is from the
 * float one of the same seed. The Frechet distance compares two sets of pictures by features that
 * the caller computes; with another feature network than Inception it is not "the FID".
 * ======================================================================== */

SDQ_API double sdq_psnr(const unsigned char *a, const unsigned char *b, size_t count) {
    double sum = 0.0, db;
    size_t i;
    for (i = 0; i < count; i++) {
        const int d = (int)a[i] - (int)b[i];
        sum += (double)(d * d);
    }
    if (sum <= 0.0) return 99.0;
    db = 10.0 / 2.30258509299404568402 * sdq__rng_log(65025.0 * (double)count / sum);  /* ln 10 */
    return db < 99.0 ? db : 99.0;
}

enum { SDQ__REP_WINDOW = 11 };

static void sdq__rep_gauss(double *g) {
    double sum = 0.0;
    int i;
    for (i = 0; i < SDQ__REP_WINDOW; i++) {
        const double x = (i - SDQ__REP_WINDOW / 2) / 1.5;
        g[i] = sdq__sch_exp(-0.5 * x * x);
        sum += g[i];
    }
    for (i = 0; i < SDQ__REP_WINDOW; i++) g[i] /= sum;
}

static double sdq__rep_luma(const unsigned char *px, size_t c) {
    return c < 3 ? (double)px[0] : 0.299 * px[0] + 0.587 * px[1] + 0.114 * px[2];
}

/* out [h-10,w-10] = the window's weighted mean of a*b [h,w]; b NULL: of a. line: [h,w-10]. */
static void sdq__rep_blur(const double *g, const double *a, const double *b, size_t h, size_t w,
                          double *line, double *out) {
    const size_t ow = w - SDQ__REP_WINDOW + 1, oh = h - SDQ__REP_WINDOW + 1;
    size_t x, y, k;
    for (y = 0; y < h; y++)
    sdq__pl_latent_size(p, d, &h, &w);
        for (x = 0; x < ow; x++) {
            double sum = 0.0;
            for (k = 0; k < SDQ__REP_WINDOW; k++) {
                const size_t at = y * w + x + k;
                sum += g[k] * (b ? a[at] * b[at] : a[at]);
            }
            line[y * ow + x] = sum;
        }
    for (y = 0; y < oh; y++)
        for (x = 0; x < ow; x++) {
            double sum = 0.0;
            for (k = 0; k < SDQ__REP_WINDOW; k++) sum += g[k] * line[(y + k) * ow + x];
            out[y * ow + x] = sum;
        }
}

/* Mean of (2 ma mb + C1)(2 sab + C2) / ((ma^2 + mb^2 + C1)(saa + sbb + C2)), Wang eq. 13;
 * the variances are E[xy] - E[x] E[y]. m: ma, mb, E[aa], E[bb], E[ab], each of n values. */
static double sdq__rep_ssim_mean(const double *m, size_t n) {
    const double c1 = 0.01 * 255 * (0.01 * 255), c2 = 0.03 * 255 * (0.03 * 255);
    double sum = 0.0;
    size_t i;
    for (i = 0; i < n; i++) {
        const double ma = m[i], mb = m[n + i], aa = m[2 * n + i] - ma * ma;
        const double bb = m[3 * n + i] - mb * mb, ab = m[4 * n + i] - ma * mb;
        sum += (2.0 * ma * mb + c1) * (2.0 * ab + c2)
             / ((ma * ma + mb * mb + c1) * (aa + bb + c2));
    }
    return sum / (double)n;
}

SDQ_API sdq_status sdq_ssim(sdq_ctx *ctx, const unsigned char *a, const unsigned char *b, size_t h,
                            size_t w, size_t c, double *out) {
    double g[SDQ__REP_WINDOW], *all, *pa, *pb, *line, *m;
    size_t n, pixels, room, i;
    *out = 0.0;
    if (h < SDQ__REP_WINDOW || w < SDQ__REP_WINDOW || c == 0)
        return sdq__fail(ctx, SDQ_ERR_SHAPE, "ssim: %zux%zux%zu; at least 11x11 pixels of one "
                         "channel are needed", h, w, c);
    if (!sdq__u_mul(h, w, &pixels) || !sdq__u_mul(pixels, 8, &room))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "ssim: %zux%zu is too large", h, w);
    all = SDQ__NEW_N(ctx, double, room);        /* two pictures, one buffer, five maps */
    if (!all) return SDQ_ERR_OOM;
    n = (h - SDQ__REP_WINDOW + 1) * (w - SDQ__REP_WINDOW + 1);
    pa = all; pb = all + pixels; line = all + 2 * pixels; m = all + 3 * pixels;
    for (i = 0; i < pixels; i++) {
        pa[i] = sdq__rep_luma(a + i * c, c);
        pb[i] = sdq__rep_luma(b + i * c, c);
    }
    sdq__rep_gauss(g);
    sdq__rep_blur(g, pa, NULL, h, w, line, m);
    sdq__rep_blur(g, pb, NULL, h, w, line, m + n);
    sdq__rep_blur(g, pa, pa, h, w, line, m + 2 * n);
    sdq__rep_blur(g, pb, pb, h, w, line, m + 3 * n);
    sdq__rep_blur(g, pa, pb, h, w, line, m + 4 * n);
    *out = sdq__rep_ssim_mean(m, n);
    sdq__free(ctx, all);
    return SDQ_OK;
}

/* Mean [d] and covariance [d,d] of n rows. */
static void sdq__rep_moments(const float *x, size_t n, size_t d, double *mean, double *cov) {
    size_t i, j, k;
    memset(mean, 0, d * sizeof(double));
    memset(cov, 0, d * d * sizeof(double));
    for (i = 0; i < n; i++)
        for (j = 0; j < d; j++) mean[j] += (double)x[i * d + j];
    for (j = 0; j < d; j++) mean[j] /= (double)n;
    for (i = 0; i < n; i++)
        for (j = 0; j < d; j++) {
            const double dj = (double)x[i * d + j] - mean[j];
            for (k = 0; k <= j; k++) cov[j * d + k] += dj * ((double)x[i * d + k] - mean[k]);
        }
    for (j = 0; j < d; j++)
        for (k = 0; k <= j; k++) {
            cov[j * d + k] /= (double)(n - 1);
            cov[k * d + j] = cov[j * d + k];
        }
}

/* One rotation in the plane (p,q) that makes a[p][q] zero; rows p, q of v turn along. */
static sdq_status sdq__pl_arguments(sdq_ctx *ctx, const sdq_pipeline *p,
                                    const sdq_txt2img_desc *d) {
    if (ctx->status != SDQ_OK) return ctx->status;
    if (!p || !d)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "drawing: pipeline or description is NULL");
    if ((unsigned)d->precision > SDQ_PRECISION_LIST || (unsigned)d->rng >= SDQ_RNG_COUNT
        || (unsigned)d->mode >= SDQ_MODE_COUNT || !(fabsf(d->guidance) <= FLT_MAX))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "drawing: precision %d, rng %d, mode %d or "
                         "guidance %g is none", (int)d->precision, (int)d->rng, (int)d->mode,
                         (double)d->guidance);
    return SDQ_OK;
}

static void sdq__rep_rotate(double *a, double *v, size_t n, size_t p, size_t q) {
    const double apq = a[p * n + q], theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
    const double root = fabs(theta) + sqrt(theta * theta + 1.0);
    const double t = (theta < 0 ? -1.0 : 1.0) / root, c = 1.0 / sqrt(t * t + 1.0), s = t * c;
    size_t k;
    for (k = 0; k < n; k++) {
        const double x = a[k * n + p], y = a[k * n + q];
        a[k * n + p] = c * x - s * y;
        a[k * n + q] = s * x + c * y;
    }
    if (sdq__pl_arguments(ctx, p, desc) != SDQ_OK) return NULL;
    r = SDQ__NEW(ctx, sdq__pl_run);
    if (!r) return NULL;
    d = *desc;
    for (k = 0; k < n; k++) {
        const double x = a[p * n + k], y = a[q * n + k];
        a[p * n + k] = c * x - s * y;
        a[q * n + k] = s * x + c * y;
    }
    a[p * n + q] = a[q * n + p] = 0.0;
    for (k = 0; v && k < n; k++) {
        const double x = v[p * n + k], y = v[q * n + k];
        v[p * n + k] = c * x - s * y;
        v[q * n + k] = s * x + c * y;
    }
}

/* Eigenvalues of the symmetric a onto its diagonal by cyclic Jacobi (Golub and Van Loan, 8.5), the
 * vectors into the rows of v if not NULL. 0 when it does not converge: not finite. */
static int sdq__rep_jacobi(double *a, double *v, size_t n) {
    double scale = 0.0;
    size_t i, p, q;
    int sweep;
    for (i = 0; i < n * n; i++) scale += a[i] * a[i];
    if (!(scale < (double)HUGE_VAL)) return 0;
    if (v) {
        memset(v, 0, n * n * sizeof(double));
        for (i = 0; i < n; i++) v[i * n + i] = 1.0;
    }
    for (sweep = 0; sweep < 60; sweep++) {
        double off = 0.0;
        for (p = 0; p < n; p++)
            for (q = p + 1; q < n; q++) off += a[p * n + q] * a[p * n + q];
        if (off <= 1e-30 * scale) return 1;
        for (p = 0; p < n; p++)
            for (q = p + 1; q < n; q++)
                if (a[p * n + q] * a[p * n + q] > 1e-36 * scale) sdq__rep_rotate(a, v, n, p, q);
    }
    return 0;
}

/* c = a b, all [n,n]. */
static void sdq__rep_product(const double *a, const double *b, double *c, size_t n) {
    size_t i, j, k;
    memset(c, 0, n * n * sizeof(double));
    for (i = 0; i < n; i++)
        for (k = 0; k < n; k++)
            for (j = 0; j < n; j++) c[i * n + j] += a[i * n + k] * b[k * n + j];
}

/* root = V^T sqrt(L) V of the symmetric a = V^T L V (rows of v are eigenvectors). Destroys a. */
static int sdq__rep_root(double *a, double *v, double *root, size_t n) {
    size_t i, j, k;
    if (!sdq__rep_jacobi(a, v, n)) return 0;
    const size_t c = p->info[SDQ_PART_VAE].latent;
    memset(root, 0, n * n * sizeof(double));
    for (k = 0; k < n; k++) {
        const double l = a[k * n + k], r = l > 0 ? sqrt(l) : 0.0;
        for (i = 0; i < n; i++)
            for (j = 0; j < n; j++) root[i * n + j] += v[k * n + i] * r * v[k * n + j];
    }
    return 1;
}

/* tr (C1 C2)^(1/2) = tr (S C2 S)^(1/2) with S = C1^(1/2): the right one is symmetric and has the
 * same eigenvalues. m: 4 matrices, C1 and C2 first; all are overwritten. -1 when not finite. */
static double sdq__rep_cross_trace(double *m, size_t n) {
    const size_t nn = n * n;
    double *c1 = m, *c2 = m + nn, *v = m + 2 * nn, *s = m + 3 * nn, sum = 0.0;
    size_t i, j;
    if (!sdq__rep_root(c1, v, s, n)) return -1.0;
    sdq__rep_product(s, c2, v, n);
    sdq__rep_product(v, s, c1, n);
    for (i = 0; i < n; i++)             /* rounding left it a little unsymmetric */
        for (j = 0; j < i; j++)
            c1[i * n + j] = c1[j * n + i] = 0.5 * (c1[i * n + j] + c1[j * n + i]);
    if (!sdq__rep_jacobi(c1, NULL, n)) return -1.0;
    for (i = 0; i < n; i++) sum += c1[i * n + i] > 0 ? sqrt(c1[i * n + i]) : 0.0;
    return sum;
}

SDQ_API sdq_status sdq_frechet(sdq_ctx *ctx, const float *x, size_t nx, const float *y, size_t ny,
                               size_t dim, double *out) {
    double *m, *mean, cross, sum = 0.0;
    size_t nn, room, i;
    *out = 0.0;
    if (nx < 2 || ny < 2 || dim == 0)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "frechet: sets of %zu and %zu vectors of %zu "
                         "numbers; 2 vectors and 1 number are the least", nx, ny, dim);
    if (!sdq__u_mul(dim, dim, &nn) || !sdq__u_mul(nn, 6, &room))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "frechet: %zu numbers per vector", dim);
    m = SDQ__NEW_N(ctx, double, room);          /* 4 [dim,dim] and 2 [dim] <= 2 [dim,dim] */
    if (!m) return SDQ_ERR_OOM;
    mean = m + 4 * nn;
    sdq__rep_moments(x, nx, dim, mean, m);
    sdq__rep_moments(y, ny, dim, mean + dim, m + nn);
    for (i = 0; i < dim; i++) {
        const double d = mean[i] - mean[dim + i];
        sum += d * d + m[i * dim + i] + m[nn + i * dim + i];
    }
    cross = sdq__rep_cross_trace(m, dim);
    sdq__free(ctx, m);
    if (cross < 0 || !(sum < (double)HUGE_VAL))
        return sdq__fail(ctx, SDQ_ERR_NUMERIC, "frechet: a feature is not finite");
    sum -= 2.0 * cross;
    *out = sum > 0 ? sum : 0.0;
    return SDQ_OK;
}
    if (st == SDQ_OK && !images) st = sdq_last_error(run);

static int sdq__rep_compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Rank p/100 (n-1), between ranks linear. */
static double sdq__rep_rank(const double *sorted, size_t n, double p) {
    const double at = p / 100.0 * (double)(n - 1);
    const size_t low = sdq__u_min((size_t)at, n - 1), high = sdq__u_min(low + 1, n - 1);
    return sorted[low] + (sorted[high] - sorted[low]) * (at - (double)low);
}

SDQ_API sdq_status sdq_percentile(sdq_ctx *ctx, const double *x, size_t n, double p, double *out) {
    double *sorted;
    *out = 0.0;
    if (!(p >= 0 && p <= 100))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "percentile: %g is not within 0..100", p);
    if (n == 0) return SDQ_OK;
    sorted = SDQ__NEW_N(ctx, double, n);
    if (!sorted) return SDQ_ERR_OOM;
    memcpy(sorted, x, n * sizeof(double));
    qsort(sorted, n, sizeof(double), sdq__rep_compare);
    *out = sdq__rep_rank(sorted, n, p);
    sdq__free(ctx, sorted);
    return SDQ_OK;
}

SDQ_API sdq_status sdq_bootstrap(sdq_ctx *ctx, const double *x, size_t n, size_t rounds,
                                 double confidence, sdq_rng *rng, double *low, double *high) {
    double *means;
    size_t i, j;
    *low = *high = 0.0;
    if (rounds == 0) rounds = 2000;
    if (confidence == 0) confidence = 0.95;
    if (n == 0 || !(confidence > 0 && confidence < 1))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "bootstrap: %zu values, confidence %g; needed are "
                         "one value and a confidence between 0 and 1", n, confidence);
    means = SDQ__NEW_N(ctx, double, rounds);
    if (!means) return SDQ_ERR_OOM;
    for (i = 0; i < rounds; i++) {
        double sum = 0.0;
        for (j = 0; j < n; j++) sum += x[sdq_rng_below(rng, n)];
        means[i] = sum / (double)n;
    }
    qsort(means, rounds, sizeof(double), sdq__rep_compare);
    *low = sdq__rep_rank(means, rounds, 50.0 * (1.0 - confidence));
    *high = sdq__rep_rank(means, rounds, 50.0 * (1.0 + confidence));
    sdq__free(ctx, means);
    return SDQ_OK;
}

SDQ_API size_t sdq_nearest(const float *query, const float *table, size_t n, size_t dim,
                           double *cosine) {
    double best = -2.0, length = 0.0;
    size_t i, j, at = 0;
    for (j = 0; j < dim; j++) length += (double)query[j] * (double)query[j];
    for (i = 0; i < n; i++) {
        const float *row = table + i * dim;
        double dot = 0.0, square = 0.0, cos_i;
        for (j = 0; j < dim; j++) {
            dot += (double)query[j] * (double)row[j];
            square += (double)row[j] * (double)row[j];
        }
        cos_i = length > 0 && square > 0 ? dot / (sqrt(length) * sqrt(square)) : 0.0;
        if (cos_i > best) { best = cos_i; at = i; }
    }
    if (cosine) *cosine = n > 0 ? best : 0.0;
    return at;
}
/* ===========================================================================
 * >>tasks   batches and losses of the autoencoder and of the diffusion model
 * ======================================================================== */

struct sdq_samples {
    size_t count, size, tokens;
    unsigned char *px;          /* [count][size][size][3] */
    int32_t *ids, *empty;       /* [count][tokens], [tokens] */
    double *sum;                /* cumulative weights: samples are drawn in proportion */
    float *moments;             /* [count][2][lh][lw][2c]: as it is, mirrored */
    size_t lh, lw, lc;
    float scaling;
    /* from a cache file: records of two moments as above and the states of the caption */
    sdq__st_cache cache;
    char *path;
    size_t channels;            /* of the text states [tokens][channels]; 0: there are none */
    float *empty_context;
    int view;                   /* everything but sum belongs to other samples */
};

SDQ_API void sdq_samples_free(sdq_ctx *ctx, sdq_samples *s) {
    if (!s) return;
    sdq__free(ctx, s->sum);
    if (!s->view) {
        sdq__free(ctx, s->px);
        sdq__free(ctx, s->ids);
        sdq__free(ctx, s->empty);
        sdq__free(ctx, s->moments);
        sdq__free(ctx, s->empty_context);
        sdq__st_cache_close(ctx, &s->cache);
        sdq__free(ctx, s->path);
    }
    sdq__free(ctx, s);
}
SDQ_API size_t sdq_samples_count(const sdq_samples *s) { return s->count; }
SDQ_API float sdq_samples_scaling(const sdq_samples *s) { return s->scaling; }

/* Picture i as the recipe cuts it; free it with sdq_image_free. */
static sdq_status sdq__task_picture(sdq_ctx *ctx, const sdq_dataset *data, size_t i, size_t size,
                                    sdq_image *fit) {
    sdq_image raw;
    sdq_status st = sdq_dataset_image(ctx, data, i, &raw);
    if (st != SDQ_OK) return st;
    st = sdq_image_fit(ctx, &raw, size, size, fit);
    sdq_image_free(ctx, &raw);
    return st;
}

/* Weight and caption of item i. */
static sdq_status sdq__task_label(sdq_ctx *ctx, const sdq_dataset *data, size_t i, sdq_samples *s,
                                  const sdq_tokenizer *tok) {
    size_t count;
    s->sum[i] = (i ? s->sum[i - 1] : 0.0) + (double)sdq_dataset_weight(data, i);
    if (!tok) return SDQ_OK;
    return sdq_tokenizer_encode(ctx, tok, sdq_dataset_caption(data, i), s->ids + i * s->tokens,
                                s->tokens, &count);
}

/* Samples without pictures: weights and captions of all items. */
static sdq_status sdq__task_labels(sdq_ctx *ctx, const sdq_dataset *data, size_t size,
                                   const sdq_tokenizer *tok, sdq_samples *s) {
    size_t i;
    s->count = sdq_dataset_count(data);
    s->size = size;
    s->tokens = tok ? sdq_tokenizer_length(tok) : 0;
    if (s->count == 0 || size == 0 || size > 65536)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "dataset: no pictures, or a size of %zu", size);
    s->sum = SDQ__NEW_N(ctx, double, s->count);
    if (tok) {
        s->ids = (int32_t *)sdq__alloc(ctx, s->count, s->tokens * sizeof(int32_t));
        s->empty = SDQ__NEW_N(ctx, int32_t, s->tokens);
    }
    if (ctx->status != SDQ_OK) return ctx->status;
    if (tok) SDQ__TRY(sdq_tokenizer_encode(ctx, tok, "", s->empty, s->tokens, &i));
    for (i = 0; i < s->count; i++) SDQ__TRY(sdq__task_label(ctx, data, i, s, tok));
    if (s->sum[s->count - 1] > 0.0) return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "dataset: the weights of the pictures sum to 0");
}

SDQ_API sdq_status sdq_samples_load(sdq_ctx *ctx, const sdq_dataset *data, size_t size,
                                    const sdq_tokenizer *tok, sdq_samples **out) {
    sdq_samples *s = SDQ__NEW(ctx, sdq_samples);
    const size_t bytes = size * size * 3;
    size_t i;
    sdq_status st;
    *out = NULL;
    if (!s) return ctx->status;
    SDQ__TRY_DONE(sdq__task_labels(ctx, data, size, tok, s));
    s->px = (unsigned char *)sdq__alloc(ctx, s->count, bytes);
    st = ctx->status;
    for (i = 0; st == SDQ_OK && i < s->count; i++) {
        sdq_image fit;
        st = sdq__task_picture(ctx, data, i, size, &fit);
        if (st != SDQ_OK) break;
        memcpy(s->px + i * bytes, fit.px, bytes);
        sdq_image_free(ctx, &fit);
    }
done:
    if (st == SDQ_OK) *out = s;
    else sdq_samples_free(ctx, s);
    return st;
}

/* One picture of size x size, mirrored or not, to [-1,1]. */
static void sdq__task_pixels(const unsigned char *px, size_t size, int mirror, float *out) {
    size_t y, x, c;
    for (y = 0; y < size; y++)
        for (x = 0; x < size; x++)
            for (c = 0; c < 3; c++) {
                const size_t sx = mirror ? size - 1 - x : x;
                *out++ = (float)px[(y * size + sx) * 3 + c] / 127.5f - 1.0f;
            }
}

SDQ_API sdq_status sdq_samples_hold_out(sdq_ctx *ctx, sdq_samples *s, size_t n,
                                        sdq_samples **held) {
    sdq_samples *h = SDQ__NEW(ctx, sdq_samples);
    double *train = SDQ__NEW_N(ctx, double, s->count);
    double *held_sum = SDQ__NEW_N(ctx, double, s->count);
    size_t i;
    *held = NULL;
    for (i = 0; h && train && held_sum && i < s->count; i++) {
        const double w = s->sum[i] - (i ? s->sum[i - 1] : 0.0);
        const int out = (i + 1) * n / s->count > i * n / s->count;
        train[i] = (i ? train[i - 1] : 0.0) + (out ? 0.0 : w);
        held_sum[i] = (i ? held_sum[i - 1] : 0.0) + (out ? w : 0.0);
    }
    if (ctx->status == SDQ_OK
        && (n == 0 || !(train[s->count - 1] > 0.0) || !(held_sum[s->count - 1] > 0.0)))
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "validation: %zu of %zu pictures cannot be held out", n,
                  s->count);
    if (ctx->status != SDQ_OK) {
        sdq__free(ctx, h);
        sdq__free(ctx, train);
        sdq__free(ctx, held_sum);
        return ctx->status;
    }
    *h = *s;
    h->sum = held_sum;
    h->view = 1;
    sdq__free(ctx, s->sum);
    s->sum = train;
    *held = h;
    return SDQ_OK;
}

/* Draw an index in proportion to the weights. */
static size_t sdq__task_draw(const sdq_samples *s, sdq_rng *rng) {
    const double at = (double)sdq_rng_below(rng, (uint64_t)1 << 53) / 9007199254740992.0
                    * s->sum[s->count - 1];
    size_t lo = 0, hi = s->count - 1;
    while (lo < hi) {
        const size_t mid = (lo + hi) / 2;
        if (s->sum[mid] > at) hi = mid;
        else lo = mid + 1;
    }
    return lo;
}

/* The moments of a picture, as it is and mirrored, to out[2][lh][lw][2c]. */
static sdq_status sdq__task_encode(sdq_ctx *ctx, const sdq_samples *s, const sdq_model *vae,
                                   const unsigned char *px, float *out) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const size_t size = 2 * s->lh * s->lw * s->lc;
    int mirror;
    for (mirror = 0; mirror < 2 && ctx->status == SDQ_OK; mirror++) {
        sdq_tensor *x = sdq_tensor_4d(ctx, 1, s->size, s->size, 3), *m;
        if (!x) break;
        sdq__task_pixels(px, s->size, mirror, sdq_f32(x));
        m = sdq_vae_encode(ctx, vae, x, SDQ_FLOAT);
        if (m && sdq_tensor_count(m) != size)
            sdq__fail(ctx, SDQ_ERR_SHAPE, "encoding: %zu numbers of a picture, expected %zu",
                      sdq_tensor_count(m), size);
        else if (m)
            memcpy(out + (size_t)mirror * size, m->data, size * sizeof(float));
        sdq_arena_release(ctx, mark);
    }
    return ctx->status;
}

/* The latent that a VAE makes of the pictures. */
static sdq_status sdq__task_latent(sdq_ctx *ctx, sdq_samples *s, const sdq_model *vae) {
    const sdq_model_info info = sdq_model_get_info(vae);
    if (s->size % info.factor)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "encoding: pictures of %zu pixels; their size must"
                         " be a multiple of %zu", s->size, info.factor);
    s->lh = s->lw = s->size / info.factor;
    s->lc = info.latent;
    return SDQ_OK;
}

SDQ_API sdq_status sdq_samples_encode(sdq_ctx *ctx, sdq_samples *s, const sdq_model *vae,
                                      sdq_progress_fn progress, void *user) {
    double sum[3] = {0.0, 0.0, 0.0};
    size_t i, j, size;
    sdq_status st;
    if (!s->px)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "encoding: these samples are encoded in a cache");
    sdq__free(ctx, s->moments);
    s->moments = NULL;
    SDQ__TRY(sdq__task_latent(ctx, s, vae));
    size = 4 * s->lh * s->lw * s->lc;
    s->moments = (float *)sdq__alloc(ctx, s->count, size * sizeof(float));
    st = ctx->status;
    for (i = 0; i < s->count && st == SDQ_OK; i++) {
        float *m = s->moments + i * size;
        st = sdq__task_encode(ctx, s, vae, s->px + i * s->size * s->size * 3, m);
        for (j = 0; st == SDQ_OK && j < size; j++) {
            const double v = (double)m[j];
            if (j % (2 * s->lc) >= s->lc) continue;     /* means only */
            sum[0] += v; sum[1] += v * v; sum[2] += 1.0;
        }
        if (st == SDQ_OK && progress && progress(user, "encode", i + 1, s->count, 0.0))
            st = sdq__fail(ctx, SDQ_ERR_CANCELLED, "encoding: cancelled");
    }
    if (st != SDQ_OK) {         /* all of them or none */
        sdq__free(ctx, s->moments);
        s->moments = NULL;
        return st;
    }
    sum[0] /= sum[2];
    s->scaling = (float)(1.0 / sqrt(sum[1] / sum[2] - sum[0] * sum[0]));
    return SDQ_OK;
}

/* What the records of a cache depend on. */
static sdq_status sdq__task_key(sdq_ctx *ctx, const sdq_dataset *data, const sdq_samples *s,
                                const sdq_model *vae, const sdq_model *text, uint64_t *key) {
    uint64_t h = sdq__u_mix(sdq__u_mix(vae->source, text ? text->source : 0), (uint64_t)s->size);
    size_t i;
    for (i = 0; i < s->count; i++) {
        char *bytes;
        size_t n;
        SDQ__TRY(sdq__io_read(ctx, sdq_dataset_path(data, i), (size_t)1 << 30, &bytes, &n));
        h = sdq__u_mix(h, sdq__u_hash(0, bytes, n));
        sdq__free(ctx, bytes);
    }
    if (s->ids && text)
        h = sdq__u_mix(h, sdq__u_hash(0, s->ids, s->count * s->tokens * sizeof(int32_t)));
    *key = h;
    return SDQ_OK;
}

/* The states of one caption to out[tokens][channels]. */
static sdq_status sdq__task_caption(sdq_ctx *ctx, const sdq_samples *s, const sdq_model *text,
                                    const int32_t *ids, float *out) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    size_t dim[2];
    sdq_tensor *t, *y = NULL;
    dim[0] = 1; dim[1] = s->tokens;
    t = sdq_tensor_new(ctx, SDQ_I32, 2, dim);
    if (t) {
        memcpy(t->data, ids, s->tokens * sizeof(int32_t));
        y = sdq_text_forward(ctx, text, t);
    }
    if (y && sdq_tensor_count(y) == s->tokens * s->channels)
        memcpy(out, y->data, s->tokens * s->channels * sizeof(float));
    else sdq__fail(ctx, SDQ_ERR_SHAPE, "encoding: a caption has no %zu states of %zu channels",
                   s->tokens, s->channels);
    sdq_arena_release(ctx, mark);
    return ctx->status;
}

/* Append the records that are missing. */
static sdq_status sdq__task_fill(sdq_ctx *ctx, const sdq_dataset *data, sdq_samples *s,
                                 const sdq_model *vae, const sdq_model *text,
                                 sdq_progress_fn progress, void *user) {
    const size_t moments = 4 * s->lh * s->lw * s->lc, states = s->tokens * s->channels;
    float *record = (float *)sdq__alloc(ctx, 1, s->cache.bytes);
    sdq_status st = ctx->status;
    while (st == SDQ_OK && s->cache.done < s->count) {
        const size_t i = s->cache.done;
        sdq_image fit;
        SDQ__TRY_DONE(sdq__task_picture(ctx, data, i, s->size, &fit));
        st = sdq__task_encode(ctx, s, vae, fit.px, record);
        sdq_image_free(ctx, &fit);
        if (st == SDQ_OK && text)
            st = sdq__task_caption(ctx, s, text, s->ids + i * s->tokens, record + moments);
        if (st == SDQ_OK) st = sdq__st_cache_put(ctx, &s->cache, record, moments + states);
        if (st == SDQ_OK && progress && progress(user, "encode", i + 1, s->count, 0.0))
            st = sdq__fail(ctx, SDQ_ERR_CANCELLED, "encoding: cancelled; %s is gone on with",
                           s->cache.part);
    }
    if (st == SDQ_OK) st = sdq__st_cache_finish(ctx, &s->cache);
done:
    sdq__free(ctx, record);
    return st;
}

SDQ_API sdq_status sdq_samples_cache(sdq_ctx *ctx, const sdq_dataset *data, size_t size,
                                     const sdq_tokenizer *tok, const sdq_model *vae,
                                     const sdq_model *text, const char *path,
                                     sdq_progress_fn progress, void *user, sdq_samples **out) {
    sdq_samples *s = SDQ__NEW(ctx, sdq_samples);
    uint64_t key;
    sdq_status st;
    *out = NULL;
    if (!s) return ctx->status;
    SDQ__TRY_DONE(sdq__task_labels(ctx, data, size, tok, s));
    SDQ__TRY_DONE(sdq__task_latent(ctx, s, vae));
    if (text && !tok) {
        st = sdq__fail(ctx, SDQ_ERR_ARGUMENT, "encoding: captions need a tokenizer");
        goto done;
    }
    s->channels = text ? sdq_model_get_info(text).context : 0;
    s->path = sdq__strdup(ctx, path);
    s->empty_context = SDQ__NEW_N(ctx, float, s->tokens * s->channels + 1);
    if (!s->path || !s->empty_context) { st = ctx->status; goto done; }
    if (text) SDQ__TRY_DONE(sdq__task_caption(ctx, s, text, s->empty, s->empty_context));
    SDQ__TRY_DONE(sdq__task_key(ctx, data, s, vae, text, &key));
    SDQ__TRY_DONE(sdq__st_cache_open(ctx, s->path, "latents", key, s->count,
        (4 * s->lh * s->lw * s->lc + s->tokens * s->channels) * sizeof(float), &s->cache));
    if (!s->cache.data) st = sdq__task_fill(ctx, data, s, vae, text, progress, user);
done:
    if (st == SDQ_OK) *out = s;
    else sdq_samples_free(ctx, s);
    return st;
}

/* The moments of picture i, mirrored or not, and the states of its caption. */
static int sdq__task_encoded(const sdq_samples *s) { return s->moments || s->cache.data; }
static const float *sdq__task_moments(const sdq_samples *s, size_t i, size_t mirror) {
    const size_t size = 2 * s->lh * s->lw * s->lc;
    return (s->moments ? s->moments + i * 2 * size : sdq__st_cache_record(&s->cache, i))
         + mirror * size;
}
static const float *sdq__task_states(const sdq_samples *s, size_t i) {
    return sdq__st_cache_record(&s->cache, i) + 4 * s->lh * s->lw * s->lc;
}

SDQ_API sdq_tensor *sdq_vae_task_loss(sdq_ctx *ctx, void *arg, sdq_rng *rng, size_t step) {
    const sdq_vae_task *t = (const sdq_vae_task *)arg;
    const size_t size = t->samples->size, pixels = size * size * 3;
    sdq_tensor *x = sdq_tensor_4d(ctx, t->batch, size, size, 3), *moments, *noise, *y, *loss;
    size_t i;
    (void)step;
    if (!t->samples->px) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: the autoencoder needs the pictures themselves");
        return NULL;
    }
    if (!x) return NULL;
    for (i = 0; i < t->batch; i++) {
        const size_t at = sdq__task_draw(t->samples, rng);
        sdq__task_pixels(t->samples->px + at * pixels, size, (int)sdq_rng_below(rng, 2),
                         sdq_f32(x) + i * pixels);
    }
    moments = sdq_vae_encode(ctx, t->vae, x, SDQ_FLOAT);
    if (!moments) return NULL;
    noise = sdq_tensor_4d(ctx, t->batch, moments->dim[1], moments->dim[2], moments->dim[3] / 2);
    if (!noise) return NULL;
    sdq_rng_normal(rng, sdq_f32(noise), sdq_tensor_count(noise));
    y = sdq_vae_decode(ctx, t->vae, sdq_sample_gaussian(ctx, moments, noise), SDQ_FLOAT);
    loss = sdq_add(ctx, sdq_l1(ctx, y, x),
                   sdq_scale(ctx, sdq_l1_edges(ctx, y, x), t->edges == 0.0f ? 1.0f : t->edges));
    return sdq_add(ctx, loss, sdq_scale(ctx, sdq_kl(ctx, moments), t->kl == 0.0f ? 1e-4f : t->kl));
}

/* A batch of noised latents with its times, ids and loss weights; all in the arena. */
typedef struct sdq__batch {
    sdq_tensor *noisy, *target, *ids;
    sdq_tensor *context;        /* what the samples know of it; NULL: the text encoder is asked */
    float *times, *weight;
} sdq__batch;

static sdq_status sdq__task_batch(sdq_ctx *ctx, const sdq_diffusion_task *t, sdq_rng *rng,
                                  sdq__batch *b) {
    const sdq_samples *s = t->samples;
    const size_t size = s->lh * s->lw * s->lc;
    const sdq_scheduler_desc *d = sdq_scheduler_get_desc(t->scheduler);
    size_t dim[2], i, j;
    float *noise;
    dim[0] = t->batch; dim[1] = s->tokens;
    b->noisy = sdq_tensor_4d(ctx, t->batch, s->lh, s->lw, s->lc);
    b->target = sdq_tensor_4d(ctx, t->batch, s->lh, s->lw, s->lc);
    b->ids = sdq_tensor_new(ctx, SDQ_I32, 2, dim);
    b->times = SDQ__PUSH_N(ctx, float, t->batch);
    b->weight = SDQ__PUSH_N(ctx, float, t->batch);
    noise = SDQ__PUSH_N(ctx, float, 2 * size);
    b->context = !t->text && s->channels
               ? sdq_tensor_3d(ctx, t->batch, s->tokens, s->channels) : NULL;
    if (!b->noisy || !b->target || !b->ids || !b->times || !b->weight || !noise) return ctx->status;
    if (!t->text && !b->context)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: no text encoder, and the samples have no"
                         " states of their captions");
    for (i = 0; i < t->batch; i++) {
        const size_t at = sdq__task_draw(s, rng), flip = (size_t)sdq_rng_below(rng, 2);
        const size_t time = (size_t)sdq_rng_below(rng, (uint64_t)d->train_steps);
        const float *m = sdq__task_moments(s, at, flip);
        float *x = sdq_f32(b->noisy) + i * size, *target = sdq_f32(b->target) + i * size;
        float drop;
        sdq_rng_uniform(rng, &drop, 1);
        sdq_rng_normal(rng, noise, 2 * size);
        for (j = 0; j < size; j++) {            /* a draw from the posterior, scaled */
            const size_t p = j / s->lc * 2 * s->lc + j % s->lc;
            int in;
            const float sd = (float)exp(0.5 * (double)sdq__op_logvar(m[p + s->lc], &in));
            x[j] = (m[p] + sd * noise[size + j]) * t->scaling;
        }
        if (d->prediction == SDQ_PREDICT_V)
            sdq_scheduler_velocity(t->scheduler, time, x, noise, target, size);
        else
            memcpy(target, d->prediction == SDQ_PREDICT_SAMPLE ? x : noise, size * sizeof(float));
        sdq_scheduler_add_noise(t->scheduler, time, x, noise, x, size);
        b->times[i] = (float)time;
        b->weight[i] = t->snr_gamma > 0.0
                     ? (float)sdq_scheduler_snr_weight(t->scheduler, time, t->snr_gamma) : 1.0f;
        memcpy((int32_t *)b->ids->data + i * s->tokens,
               drop < t->drop ? s->empty : s->ids + at * s->tokens, s->tokens * sizeof(int32_t));
        if (b->context)
            memcpy(sdq_f32(b->context) + i * s->tokens * s->channels,
                   drop < t->drop ? s->empty_context : sdq__task_states(s, at),
                   s->tokens * s->channels * sizeof(float));
    }
    if (!b->context) b->context = sdq_text_forward(ctx, t->text, b->ids);
    return ctx->status;
}

SDQ_API sdq_tensor *sdq_diffusion_task_loss(sdq_ctx *ctx, void *arg, sdq_rng *rng, size_t step) {
    const sdq_diffusion_task *t = (const sdq_diffusion_task *)arg;
    sdq_unet_input in;
    sdq__batch b;
    (void)step;
    memset(&in, 0, sizeof in);
    if (!sdq__task_encoded(t->samples) || !t->samples->ids) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "training: the samples have no latents or no captions");
        return NULL;
    }
    if (sdq__task_batch(ctx, t, rng, &b) != SDQ_OK) return NULL;
    in.sample = b.noisy;
    in.timesteps = b.times;
    in.context = b.context;
    in.checkpoint = t->checkpoint;
    return sdq_mse(ctx, sdq_unet_forward(ctx, t->unet, &in, t->mode), b.target, b.weight);
}

/* Parameters of a model, with or without the weights of its layers. */
static sdq_status sdq__task_add_params(sdq_ctx *ctx, sdq_optim *o, sdq_model *m,
                                       const char *prefix, int weights, size_t first) {
    size_t i;
    for (i = first; i < sdq_model_param_count(m); i++) {
        const char *name;
        char full[256];
        sdq_tensor *t = sdq_model_param(m, i, &name);
        const size_t n = strlen(name);
        const int weight = n > 7 && strcmp(name + n - 7, ".weight") == 0 && m->param[i].rank > 1;
        if (weight && !weights) continue;
        (void)snprintf(full, sizeof full, "%s%s", prefix, name);
        SDQ__TRY(sdq_optim_add(ctx, o, t, full, 0.0f, 0.0f, weight));
    }
    return SDQ_OK;
}
SDQ_API sdq_status sdq_optim_add_model(sdq_ctx *ctx, sdq_optim *o, sdq_model *m,
                                       const char *prefix) {
    return sdq__task_add_params(ctx, o, m, prefix, 1, 0);
}
/* ===========================================================================
 * >>recipe   which layers are quantized, and how
 *
 * Kept float by the default recipe: conv_in, conv_out (under 1 % of the work, much of the
 * quality), the time path (depends on the timestep only: a table per run), the keys and values of
 * cross-attention (depend on the prompt only: once per picture) and the shortcuts of the last up
 * block: 1x1 convolutions (2 % of the work of Stable Diffusion 1.5) that carry the sum of all
 * blocks before them to conv_out, so that their rounding reaches the result undiminished. In the
 * emoji model two such layers of 103 made a third of the error of the late evaluations. With the
 * finest ranges the eight self-attention layers of that block are the next: an option.
 * ======================================================================== */

SDQ_API sdq_recipe sdq_recipe_default(void) {
    sdq_recipe r;
    memset(&r, 0, sizeof r);
    r.range_linear = SDQ_RANGE_POSITION;
    r.range_conv = SDQ_RANGE_POSITION;
    r.quantize_last_self = 1;
    r.attention_bits = 16;
    r.split_skip = 1;
    r.bias_correction = 1;
    r.learn_scales = 1;
    r.train_set = SDQ_TRAIN_SMALL;
    r.weight_scale = SDQ_WEIGHT_FIXED;
    r.teacher_loss = 1.0f;
    return r;
}

SDQ_API sdq_recipe sdq_recipe_reference(void) {
    sdq_recipe r;
    memset(&r, 0, sizeof r);
    r.range_linear = r.range_conv = SDQ_RANGE_STATIC;
    r.quantize_outputs = r.quantize_edges = r.quantize_time = r.quantize_context = 1;
    r.quantize_shortcuts = r.quantize_last_self = 1;
    r.moving = 0.01f;
    r.weight_scale = SDQ_WEIGHT_MOVING;
    r.calibrate_on_data = 1;
    r.noise_loss = r.teacher_loss = 1.0f;
    return r;
}

static const char *const sdq__rc_range[SDQ_RANGE_COUNT] = {"default", "static", "picture",
                                                           "position", "block"};
static const char *const sdq__rc_train_set[SDQ_TRAIN_SET_COUNT] = {"all", "small", "scales",
                                                                   "ranges", "lora"};

static size_t sdq__rc_rank(const sdq_recipe *r) { return r->lora_rank ? r->lora_rank : 8; }

SDQ_API void sdq_recipe_to_str(const sdq_recipe *r, char *buf, size_t size) {
    (void)snprintf(
        buf, size,
        "range_linear=%s range_conv=%s quantize_outputs=%d quantize_edges=%d "
        "quantize_time=%d quantize_context=%d quantize_shortcuts=%d quantize_last_self=%d "
        "attention_bits=%d split_skip=%d bias_correction=%d learn_scales=%d train_set=%s "
        "lora_rank=%zu last_blocks=%zu moving=%g weight_scale=%d weight_bits=%d weight_group=%zu "
        "calibrate_on_data=%d noise_loss=%g teacher_loss=%g coherent=%d",
        sdq__rc_range[r->range_linear], sdq__rc_range[r->range_conv], r->quantize_outputs,
        r->quantize_edges, r->quantize_time, r->quantize_context, r->quantize_shortcuts,
        r->quantize_last_self, r->attention_bits ? r->attention_bits : 32, r->split_skip,
        r->bias_correction, r->learn_scales, sdq__rc_train_set[r->train_set],
        r->train_set == SDQ_TRAIN_LORA ? sdq__rc_rank(r) : (size_t)0, r->last_blocks,
        (double)r->moving, (int)r->weight_scale, r->weight_bits == 4 ? 4 : 8,
        r->weight_bits == 4 ? r->weight_group ? r->weight_group : (size_t)SDQ__Q_GROUP
                            : (size_t)0,
        r->calibrate_on_data, (double)r->noise_loss, (double)r->teacher_loss, r->coherent);
}

/* "up_blocks.N." with N the last one. */
static void sdq__rc_last_up(const sdq_model *unet, char *prefix, size_t size) {
    (void)snprintf(prefix, size, "up_blocks.%zu.", unet->unet ? unet->unet->levels - 1 : 0);
}

static int sdq__rc_quantized(const sdq_recipe *r, const char *name, const char *last_up,
                             const char *const *keep) {
    size_t i;
    if (!r->quantize_edges && (!strcmp(name, "conv_in") || !strcmp(name, "conv_out"))) return 0;
    if (!r->quantize_time
        && (sdq__io_starts(name, "time_embedding.") || sdq__io_ends(name, ".time_emb_proj")))
        return 0;
    if (!r->quantize_context
        && (sdq__io_ends(name, ".attn2.to_k") || sdq__io_ends(name, ".attn2.to_v")))
        return 0;
    if (sdq__io_starts(name, last_up)
        && ((!r->quantize_shortcuts && sdq__io_ends(name, ".conv_shortcut"))
            || (!r->quantize_last_self && strstr(name, ".attn1."))))
        return 0;
    for (i = 0; keep && keep[i]; i++)
        if (!strcmp(name, keep[i]) || (sdq__io_ends(keep[i], ".") && sdq__io_starts(name, keep[i])))
            return 0;
    return 1;
}

/* The largest number is a normal half; one that rounds to infinity and NaN are not. */
static int sdq__rc_half_range(const float *x, size_t n) {
    float largest = 0.0f;
    size_t i;
    for (i = 0; i < n; i++) {
        if (!(fabsf(x[i]) < 65520.0f)) return 0;
        largest = fmaxf(largest, fabsf(x[i]));
    }
    return largest >= 1.0f / 16384.0f;
}
/* The weights of a float layer as halves, packed or not, where they are in range. */
static sdq_status sdq__rc_to_halves(sdq_ctx *ctx, sdq_layer *l) {
    float *w = l->w.data ? sdq_f32(&l->w) : l->wp;
    const size_t k = sdq__ly_k(l);
    const size_t n = l->w.data ? l->out * k : sdq__gemm_packed_count(l->out, k);
    size_t i;
    if (!w || !sdq__rc_half_range(w, n)) return SDQ_OK;
    if (l->wp) SDQ__TRY(sdq__ly_new_packed(ctx, l, 1));
    for (i = 0; i < n; i++) {
        const uint16_t half = sdq__u_to_f16(w[i]);
        if (l->wh) l->wh[i] = half;
        else w[i] = sdq__u_from_f16(half);
    }
    sdq__free(ctx, l->wp);
    l->wp = NULL;
    return SDQ_OK;
}

SDQ_API sdq_status sdq_recipe_apply(sdq_ctx *ctx, sdq_model *unet, const sdq_recipe *r,
                                    const char *const *keep_float) {
    char last_up[40];
    size_t i;
    const int bits = r->attention_bits;
    if (bits != 0 && bits != 8 && bits != 16 && bits != 32)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                         "recipe: attention_bits is %d, expected 32, 16 or 8", bits);
    sdq__rc_last_up(unet, last_up, sizeof last_up);
    for (i = 0; i < unet->layers; i++) {
        sdq_layer *l = unet->layer[i];
        sdq_quant q;
        memset(&q, 0, sizeof q);
        q.enabled = sdq__rc_quantized(r, l->name, last_up, keep_float);
        q.range = sdq__ly_taps(l) == 1 ? r->range_linear : r->range_conv;
        q.split = r->split_skip ? l->concat : 0;
        q.quantize_output = r->quantize_outputs;
        q.moving = r->moving;
        q.weight_scale = r->weight_scale;
        q.learn_scales = r->learn_scales;
        q.weight_bits = r->weight_bits;
        q.weight_group = r->weight_group;
        SDQ__TRY(sdq_layer_set_quant(ctx, l, &q));
        if (!q.enabled) SDQ__TRY(sdq__rc_to_halves(ctx, l));
    }
    if (unet->unet) sdq__un_attention(unet->unet, bits % 32);
    return SDQ_OK;
}

SDQ_API void sdq_model_observe(sdq_model *m, int on) {
    size_t i;
    for (i = 0; i < m->layers; i++) sdq_layer_observe(m->layer[i], on);
}

/* ===========================================================================
 * >>calibrate   ranges before training: on the sampler's trajectories or on noised pictures
 * ======================================================================== */

struct sdq_states {
    size_t count, cap, size, context_size, contexts, context_cap;
    size_t h, w, c, t, d;
    size_t branches, evals;     /* states are [prompt][evaluation][branch] */
    float guidance;
    int guided;
    float *x, *eps;             /* [count][size]: what the network saw and said */
    float *time;
    size_t *context_of;
    float *context;             /* [contexts][t*d] */
    int view;                   /* the arrays belong to other states */
};

SDQ_API void sdq_states_free(sdq_ctx *ctx, sdq_states *s) {
    if (!s) return;
    if (!s->view) {
        sdq__free(ctx, s->x);
        sdq__free(ctx, s->eps);
        sdq__free(ctx, s->time);
        sdq__free(ctx, s->context_of);
        sdq__free(ctx, s->context);
    }
    sdq__free(ctx, s);
}
SDQ_API size_t sdq_states_count(const sdq_states *s) { return s->count; }

/* The states of one evaluation: one per branch. */
typedef struct sdq__cal_collect {
    sdq_states *s;
    const sdq_txt2img_desc *d;
    size_t at;
} sdq__cal_collect;

static int sdq__cal_keep(void *user, const sdq_step_info *info) {
    sdq__cal_collect *w = (sdq__cal_collect *)user;
    sdq_states *s = w->s;
    const size_t branches = info->input->dim[0];
    size_t b;
    for (b = 0; b < branches && s->count < s->cap; b++, s->count++) {
        memcpy(s->x + s->count * s->size, sdq_f32(info->input) + b * s->size,
               s->size * sizeof(float));
        memcpy(s->eps + s->count * s->size, sdq_f32(info->raw) + b * s->size,
               s->size * sizeof(float));
        s->time[s->count] = info->timestep;
        s->context_of[s->count] = w->at + b;
        if (info->i == 0)
            memcpy(s->context + (w->at + b) * s->context_size,
                   sdq_f32(info->context) + b * s->context_size, s->context_size * sizeof(float));
    }
    return w->d->progress ? w->d->progress(w->d->user, "states", s->count, s->cap, 0.0) : 0;
}

/* Evaluations of one run. */
static sdq_status sdq__cal_evals(sdq_ctx *ctx, const sdq_pipeline *p, const sdq_txt2img_desc *desc,
                                 size_t *evals) {
    sdq_scheduler_desc d;
    sdq_scheduler *s;
    SDQ__TRY(sdq_pipeline_scheduler(ctx, p, desc, &d));
    SDQ__TRY(sdq_scheduler_create(ctx, &d, &s));
    *evals = sdq_scheduler_count(s);
    sdq_scheduler_free(ctx, s);
    return SDQ_OK;
}

/* Room for `cap` states and `contexts` texts of the sizes that s says. */
static sdq_status sdq__cal_room(sdq_ctx *ctx, sdq_states *s, size_t cap, size_t contexts) {
    s->cap = cap;
    s->contexts = contexts;
    s->x = (float *)sdq__alloc(ctx, cap, s->size * sizeof(float));
    s->eps = (float *)sdq__alloc(ctx, cap, s->size * sizeof(float));
    s->time = SDQ__NEW_N(ctx, float, cap);
    s->context_of = SDQ__NEW_N(ctx, size_t, cap);
    s->context = (float *)sdq__alloc(ctx, contexts, s->context_size * sizeof(float));
    return ctx->status;
}

static sdq_status sdq__cal_new(sdq_ctx *ctx, const sdq_pipeline *p, size_t n,
                               const sdq_txt2img_desc *desc, sdq_states *s) {
    const sdq_model_info unet = p->info[SDQ_PART_UNET];
    if (n == 0) return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "states: no prompts given");
    SDQ__TRY(sdq__cal_evals(ctx, p, desc, &s->evals));
    s->guidance = desc->guidance == 0.0f ? 7.5f : desc->guidance;
    s->branches = sdq__pl_branches(p, s->guidance);
    sdq__pl_latent_size(p, desc, &s->h, &s->w);
    s->c = unet.in;
    s->guided = unet.guidance > 0;
    s->t = sdq_tokenizer_length(p->tokenizer);
    s->d = unet.context;
    s->size = s->h * s->w * s->c;
    s->context_size = s->t * s->d;
    return sdq__cal_room(ctx, s, n * s->branches * s->evals, n * s->branches);
}

/* Run prompt i and keep what its evaluations saw and said. */
static sdq_status sdq__cal_prompt(sdq_ctx *ctx, const sdq_pipeline *p, const char *prompt, size_t i,
                                  const sdq_txt2img_desc *desc, sdq_states *s) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_txt2img_desc d = *desc;
    sdq__cal_collect w;
    w.s = s; w.d = desc; w.at = i * s->branches;
    d.prompt = prompt;
    d.seed = desc->seed + i;
    d.precision = SDQ_PRECISION_FLOAT;
    d.count = 1;
    d.progress = NULL;
    d.step = sdq__cal_keep;
    d.user = &w;
    (void)sdq_txt2img_latents(ctx, p, &d, NULL, NULL);
    sdq_arena_release(ctx, mark);
    return ctx->status;
}

SDQ_API sdq_status sdq_states_collect(sdq_ctx *ctx, const sdq_pipeline *p,
                                      const char *const *prompts, size_t n,
                                      const sdq_txt2img_desc *desc, sdq_states **out) {
    sdq_states *s = SDQ__NEW(ctx, sdq_states);
    size_t i;
    *out = NULL;
    if (!s) return ctx->status;
    (void)sdq__cal_new(ctx, p, n, desc, s);
    for (i = 0; i < n && ctx->status == SDQ_OK; i++)
        (void)sdq__cal_prompt(ctx, p, prompts[i], i, desc, s);
    if (ctx->status == SDQ_OK) *out = s;
    else sdq_states_free(ctx, s);
    return ctx->status;
}

/* ---- through a file: a record is x, eps, time and context of one prompt ---- */

static size_t sdq__cal_record(const sdq_states *s) {
    const size_t per = s->evals * s->branches;
    return per * (2 * s->size + 1) + s->branches * s->context_size;
}

/* What the trajectories depend on. */
static uint64_t sdq__cal_key(const sdq_pipeline *p, const char *const *prompts, size_t n,
                             const sdq_txt2img_desc *d, const sdq_states *s) {
    const char *negative = d->negative ? d->negative : "";
    const sdq_model *unet = p->unet ? p->unet : p->unet_int8;
    uint64_t word[12], h;
    float guidance = s->guidance;
    size_t i;
    memset(word, 0, sizeof word);
    word[0] = unet->source; word[1] = p->text->source; word[2] = s->h; word[3] = s->w;
    word[4] = s->evals; word[5] = d->seed; word[6] = (uint64_t)d->rng;
    word[7] = (uint64_t)d->scheduler; word[8] = (uint64_t)(d->karras != 0);
    word[9] = (uint64_t)p->prediction; word[10] = d->steps;
    memcpy(&word[11], &guidance, sizeof guidance);
    h = sdq__u_hash(0, word, sizeof word);
    h = sdq__u_hash(h, negative, strlen(negative));
    if (p->scheduler) h = sdq__u_hash(h, p->scheduler, strlen(p->scheduler));
    for (i = 0; i < n; i++) h = sdq__u_hash(h, prompts[i], strlen(prompts[i]));
    return h;
}

/* Prompt i between its record and the arrays. */
static void sdq__cal_move(sdq_states *s, size_t i, float *record, int load) {
    const size_t per = s->evals * s->branches, at = i * per;
    float *part[4];
    size_t count[4], k;
    part[0] = s->x + at * s->size; count[0] = per * s->size;
    part[1] = s->eps + at * s->size; count[1] = per * s->size;
    part[2] = s->time + at; count[2] = per;
    part[3] = s->context + i * s->branches * s->context_size;
    count[3] = s->branches * s->context_size;
    for (k = 0; k < 4; record += count[k++])
        memcpy(load ? part[k] : record, load ? record : part[k], count[k] * sizeof(float));
    if (!load) return;
    for (k = 0; k < per; k++) s->context_of[at + k] = i * s->branches + k % s->branches;
    s->count = at + per;
}

/* The records that the file has, then the others. A growing file is read from its start. */
static sdq_status sdq__cal_fill(sdq_ctx *ctx, const sdq_pipeline *p, const char *const *prompts,
                                const sdq_txt2img_desc *desc, sdq__st_cache *c, sdq_states *s) {
    float *record = (float *)sdq__alloc(ctx, 1, c->bytes);
    const size_t n = sdq__cal_record(s);
    const long end = c->f ? ftell(c->f) : 0;
    size_t i, have = c->done;
    int bad = c->f && fseek(c->f, end - (long)(have * c->bytes), SEEK_SET) != 0;
    for (i = 0; record && i < have && !bad; i++) {
        if (c->f) bad = fread(record, 1, c->bytes, c->f) != c->bytes;
        else memcpy(record, sdq__st_cache_record(c, i), n * sizeof(float));
        sdq__cal_move(s, i, record, 1);
    }
    if (bad || (c->f && fseek(c->f, end, SEEK_SET) != 0))
        sdq__fail(ctx, SDQ_ERR_IO, "%s: read error", c->part);
    for (; record && i < c->count && ctx->status == SDQ_OK; i++) {
        if (sdq__cal_prompt(ctx, p, prompts[i], i, desc, s) != SDQ_OK) break;
        sdq__cal_move(s, i, record, 0);
        (void)sdq__st_cache_put(ctx, c, record, n);
    }
    if (c->f && ctx->status == SDQ_OK) (void)sdq__st_cache_finish(ctx, c);
    sdq__free(ctx, record);
    return ctx->status;
}

SDQ_API sdq_status sdq_states_cache(sdq_ctx *ctx, const sdq_pipeline *p, const char *const *prompts,
                                    size_t n, const sdq_txt2img_desc *desc, const char *path,
                                    sdq_states **out) {
    sdq_states *s = SDQ__NEW(ctx, sdq_states);
    sdq__st_cache c;
    sdq_status st;
    memset(&c, 0, sizeof c);
    *out = NULL;
    if (!s) return ctx->status;
    if (!p->text || (!p->unet && !p->unet_int8)) {
        sdq__free(ctx, s);
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "%s: a cache of states needs a pipeline whose "
                         "networks are loaded, not one on demand", path);
    }
    SDQ__TRY_DONE(sdq__cal_new(ctx, p, n, desc, s));
    SDQ__TRY_DONE(sdq__st_cache_open(ctx, path, "states", sdq__cal_key(p, prompts, n, desc, s), n,
                                     sdq__cal_record(s) * sizeof(float), &c));
    st = sdq__cal_fill(ctx, p, prompts, desc, &c, s);
done:
    sdq__st_cache_close(ctx, &c);
    if (st == SDQ_OK) *out = s;
    else sdq_states_free(ctx, s);
    return st;
}

/* ---- parts of the states ---- */

SDQ_API sdq_status sdq_states_hold_out(sdq_ctx *ctx, sdq_states *s, size_t n, sdq_states **held) {
    const size_t per = s->evals * s->branches, prompts = s->count / per, keep = (prompts - n) * per;
    sdq_states *h;
    *held = NULL;
    if (n == 0 || n >= prompts)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "validation: %zu of %zu prompts cannot be held out;"
                         " give more prompts", n, prompts);
    h = SDQ__NEW(ctx, sdq_states);
    if (!h) return ctx->status;
    *h = *s;
    h->view = 1;
    h->count = s->count - keep;
    h->x += keep * s->size;
    h->eps += keep * s->size;
    h->time += keep;
    h->context_of += keep;      /* numbers of texts in the array that both share */
    s->count = keep;
    *held = h;
    return SDQ_OK;
}

SDQ_API sdq_status sdq_states_gather(sdq_ctx *ctx, const sdq_group *g, sdq_states **states) {
    const sdq_states *s = *states;
    const size_t per = s->evals * s->branches, mine = s->count / per;
    size_t first = 0, all = 0, i;
    float *prompts;
    sdq_span span[4];
    sdq_states *j;
    if (!g || g->ranks < 2) return ctx->status;
    prompts = SDQ__NEW_N(ctx, float, g->ranks);
    j = SDQ__NEW(ctx, sdq_states);
    if (!prompts || !j) goto done;
    prompts[g->rank] = (float)mine;
    (void)sdq__opt_reduce_one(ctx, g, SDQ_REDUCE_SUM, "the states", prompts, g->ranks);
    for (i = 0; i < g->ranks; i++) {
        if (i < g->rank) first += (size_t)prompts[i];
        all += (size_t)prompts[i];
    }
    *j = *s;
    j->x = j->eps = j->time = j->context = NULL;
    j->context_of = NULL;
    j->count = all * per;
    if (ctx->status != SDQ_OK || sdq__cal_room(ctx, j, all * per, all * s->branches) != SDQ_OK)
        goto done;
    memcpy(j->x + first * per * s->size, s->x, s->count * s->size * sizeof(float));
    memcpy(j->eps + first * per * s->size, s->eps, s->count * s->size * sizeof(float));
    memcpy(j->time + first * per, s->time, s->count * sizeof(float));
    memcpy(j->context + first * s->branches * s->context_size, s->context,
           mine * s->branches * s->context_size * sizeof(float));
    for (i = 0; i < j->count; i++)
        j->context_of[i] = i / per * s->branches + i % s->branches;
    span[0].values = j->x; span[0].count = j->count * s->size;
    span[1].values = j->eps; span[1].count = j->count * s->size;
    span[2].values = j->time; span[2].count = j->count;
    span[3].values = j->context; span[3].count = j->contexts * s->context_size;
    for (i = 0; i < 4; i++) span[i].name = "the states";
    if (sdq__opt_reduce(ctx, g, SDQ_REDUCE_SUM, span, 4) != SDQ_OK) goto done;
    sdq_states_free(ctx, *states);
    *states = j;
    j = NULL;
done:
    sdq__free(ctx, prompts);
    sdq_states_free(ctx, j);
    return ctx->status;
}

/* States idx[0..n) as a batch; target: what the teacher said. */
static sdq_status sdq__cal_batch(sdq_ctx *ctx, const sdq_states *s, const size_t *idx, size_t n,
                                 sdq_unet_input *in, sdq_tensor **target) {
    float *times = SDQ__PUSH_N(ctx, float, n), *guidance = SDQ__PUSH_N(ctx, float, n);
    size_t i;
    memset(in, 0, sizeof *in);
    in->sample = sdq_tensor_4d(ctx, n, s->h, s->w, s->c);
    in->context = sdq_tensor_3d(ctx, n, s->t, s->d);
    *target = sdq_tensor_4d(ctx, n, s->h, s->w, s->c);
    if (!times || !guidance || !in->sample || !in->context || !*target) return ctx->status;
    for (i = 0; i < n; i++) {
        memcpy(sdq_f32(in->sample) + i * s->size, s->x + idx[i] * s->size, s->size * sizeof(float));
        memcpy(sdq_f32(*target) + i * s->size, s->eps + idx[i] * s->size, s->size * sizeof(float));
        memcpy(sdq_f32(in->context) + i * s->context_size,
               s->context + s->context_of[idx[i]] * s->context_size,
               s->context_size * sizeof(float));
        times[i] = s->time[idx[i]];
        guidance[i] = s->guidance;
    }
    in->timesteps = times;
    if (s->guided) in->guidance = guidance;
    return SDQ_OK;
}

/* One pass over all states in a mode. */
static sdq_status sdq__cal_pass(sdq_ctx *ctx, const sdq_model *unet, const sdq_states *s,
                                size_t batch, sdq_mode mode, const char *stage,
                                sdq_progress_fn progress, void *user) {
    size_t i, j, idx[64];
    batch = batch == 0 ? 8 : batch > 64 ? 64 : batch;
    for (i = 0; i < s->count; i += batch) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        const size_t n = sdq__u_min(batch, s->count - i);
        sdq_unet_input in;
        sdq_tensor *target;
        for (j = 0; j < n; j++) idx[j] = i + j;
        SDQ__TRY(sdq__cal_batch(ctx, s, idx, n, &in, &target));
        if (!sdq_unet_forward(ctx, unet, &in, mode)) return ctx->status;
        sdq_arena_release(ctx, mark);
        if (progress && progress(user, stage, i + n, s->count, 0.0))
            return sdq__fail(ctx, SDQ_ERR_CANCELLED, "calibration: cancelled");
    }
    return SDQ_OK;
}

SDQ_API sdq_status sdq_model_reduce_ranges(sdq_ctx *ctx, sdq_model *m, const sdq_group *g) {
    size_t i;
    for (i = 0; i < m->layers; i++) {
        const sdq_mark mark = sdq_arena_mark(ctx);
        sdq_layer *l = m->layer[i];
        const size_t n = sdq__ly_state_count(l);
        float *v = SDQ__PUSH_N(ctx, float, n);
        if (!v) return ctx->status;
        sdq__ly_state(l, v, 0);
        SDQ__TRY(sdq__opt_reduce_range(ctx, g, l->name, v, n));
        sdq__ly_state(l, v, 1);
        sdq_arena_release(ctx, mark);
    }
    return ctx->status;
}

/* b += mean(FLOAT - FAKE) of every quantized layer, measured on the quantized network's inputs. */
static sdq_status sdq__cal_bias(sdq_ctx *ctx, sdq_model *m, const sdq_states *s, size_t batch,
                                sdq_progress_fn progress, void *user) {
    sdq_status st = SDQ_OK;
    size_t i, o;
    for (i = 0; i < m->layers && st == SDQ_OK; i++) {
        sdq_layer *l = m->layer[i];
        if (!l->quant.enabled || !l->b.data) continue;
        l->bias_rows = 0.0;
        l->bias_sum = SDQ__NEW_N(ctx, double, l->out);
        if (!l->bias_sum) st = ctx->status;
    }
    if (st == SDQ_OK) st = sdq__cal_pass(ctx, m, s, batch, SDQ_FAKE, "bias", progress, user);
    for (i = 0; i < m->layers; i++) {
        sdq_layer *l = m->layer[i];
        for (o = 0; st == SDQ_OK && l->bias_sum && l->bias_rows > 0.0 && o < l->out; o++)
            sdq_f32(&l->b)[o] += (float)(l->bias_sum[o] / l->bias_rows);
        sdq__free(ctx, l->bias_sum);
        l->bias_sum = NULL;
    }
    return st;
}

SDQ_API sdq_status sdq_calibrate_states(sdq_ctx *ctx, sdq_model *unet, const sdq_states *s,
                                        size_t batch, int bias_correction, sdq_progress_fn progress,
                                        void *user) {
    sdq_status st;
    sdq_model_observe(unet, 1);
    st = sdq__cal_pass(ctx, unet, s, batch, SDQ_FLOAT, "calibrate", progress, user);
    sdq_model_observe(unet, 0);
    if (st == SDQ_OK && bias_correction) st = sdq__cal_bias(ctx, unet, s, batch, progress, user);
    return st;
}

SDQ_API sdq_status sdq_calibrate_data(sdq_ctx *ctx, const sdq_diffusion_task *task, size_t batches,
                                      uint64_t seed, sdq_progress_fn progress, void *user) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_diffusion_task t = *task;
    size_t i;
    t.mode = SDQ_FAKE;
    sdq_model_observe(t.unet, 1);
    for (i = 0; i < batches && ctx->status == SDQ_OK; i++) {
        sdq_rng rng;
        sdq__opt_rng(&rng, seed, i, 0);
        (void)sdq_diffusion_task_loss(ctx, &t, &rng, i);
        sdq_arena_release(ctx, mark);
        if (ctx->status == SDQ_OK && progress && progress(user, "calibrate", i + 1, batches, 0.0))
            sdq__fail(ctx, SDQ_ERR_CANCELLED, "calibration: cancelled");
    }
    sdq_model_observe(t.unet, 0);
    return ctx->status;
}

/* ===========================================================================
 * >>distill   the float network teaches the fake-quantized one
 * ======================================================================== */

static sdq_tensor *sdq__ds_forward(sdq_ctx *ctx, const sdq_model *m, const sdq_unet_input *in,
                                   sdq_mode mode, const sdq_distill_task *t, sdq__tap *tap) {
    sdq__taps taps;
    sdq_tensor *y;
    size_t i;
    for (i = 0; i < t->maps; i++) tap[i].name = t->map[i].layer;
    taps.tap = tap;
    taps.n = t->maps;
    ctx->taps = t->maps ? &taps : NULL;
    y = sdq_unet_forward(ctx, m, in, mode);
    ctx->taps = NULL;
    return y;
}

/* Run the teacher: none of its tensors needs a gradient, so nothing is noted. Where outputs of
 * inner layers are wanted the tape stays on all the same: the arena then keeps everything. */
static sdq_tensor *sdq__ds_teacher(sdq_ctx *ctx, const sdq_distill_task *t,
                                   const sdq_unet_input *in, sdq__tap *tap) {
    const int recording = ctx->recording;
    sdq_unet_input i = *in;
    sdq_tensor *y;
    i.checkpoint = 0;
    if (!t->maps) ctx->recording = 0;
    y = sdq__ds_forward(ctx, t->teacher, &i, SDQ_FLOAT, t, tap);
    ctx->recording = recording;
    return y;
}

static sdq_tensor *sdq__ds_add(sdq_ctx *ctx, sdq_tensor *sum, const char *part, sdq_tensor *loss,
                               float weight) {
    if (weight != 1.0f) loss = sdq_scale(ctx, loss, weight);
    if (loss) sdq_fit_note(ctx, part, (double)sdq_f32(loss)[0]);
    return sum ? sdq_add(ctx, sum, loss) : loss;
}

/* Consecutive evaluations of one trajectory, from a random one on. */
static sdq_status sdq__ds_window(sdq_ctx *ctx, const sdq_distill_task *t, sdq_rng *rng,
                                 size_t *idx) {
    const sdq_states *s = t->states;
    const size_t w = t->batch / s->branches, runs = s->count / s->branches / s->evals;
    size_t i, first;
    if (t->batch % s->branches || w > s->evals || w == 0)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "distillation: a batch of %zu is not a window of "
                         "1..%zu evaluations with %zu branches each", t->batch, s->evals,
                         s->branches);
    first = (size_t)sdq_rng_below(rng, runs) * s->evals;
    first += (size_t)sdq_rng_below(rng, s->evals - w + 1);
    for (i = 0; i < t->batch; i++) idx[i] = first * s->branches + i;
    return SDQ_OK;
}

/* What a run is off by is the sum of its errors, and those of neighbouring evaluations that point
 * the same way add up, while rounding averages out. With d_i the error of evaluation i after
 * guidance: loss = mean (sum d_i)^2 / sum mean d_i^2, the denominator taken as constant. It is 1
 * for errors that have nothing to do with each other, and the same early and late in a run. */
static sdq_tensor *sdq__ds_coherent(sdq_ctx *ctx, const sdq_states *s, sdq_tensor *y,
                                    sdq_tensor *teacher) {
    const size_t n = y->dim[0], size = sdq_tensor_count(y) / n, step = s->branches;
    float weight[64];
    double sum = 0.0;
    size_t e, i;
    for (e = 0; e < n; e++)
        weight[e] = step < 2 ? 1.0f : e % step ? s->guidance : 1.0f - s->guidance;
    for (e = 0; e < n; e += step)
        for (i = e * size; i < (e + 1) * size; i++) {
            double d = (double)(weight[e] * (sdq_f32(y)[i] - sdq_f32(teacher)[i]));
            if (step > 1)
                d += (double)(weight[e + 1] * (sdq_f32(y)[i + size] - sdq_f32(teacher)[i + size]));
            sum += d * d;
        }
    sum = sqrt(sum / (double)size) + 1e-30;
    for (e = 0; e < n; e++) weight[e] = (float)((double)weight[e] / sum);
    return sdq_mse(ctx, sdq_combine(ctx, y, weight), sdq_combine(ctx, teacher, weight), NULL);
}

static sdq_status sdq__ds_batch(sdq_ctx *ctx, const sdq_distill_task *t, sdq_rng *rng,
                                sdq_unet_input *in, sdq_tensor **noise, sdq_tensor **teacher) {
    size_t i, idx[64];
    if (t->batch == 0 || t->batch > 64 || (t->states && t->states->count == 0))
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT, "distillation: a batch of %zu, 1..64 are possible;"
                         " %zu states", t->batch, t->states ? t->states->count : (size_t)0);
    if (t->states) {
        for (i = 0; i < t->batch; i++) idx[i] = (size_t)sdq_rng_below(rng, t->states->count);
        if (t->coherent) SDQ__TRY(sdq__ds_window(ctx, t, rng, idx));
        return sdq__cal_batch(ctx, t->states, idx, t->batch, in, teacher);
    } else {
        sdq_diffusion_task d = *t->data;
        sdq__batch b;
        d.batch = t->batch;
        SDQ__TRY(sdq__task_batch(ctx, &d, rng, &b));
        memset(in, 0, sizeof *in);
        in->sample = b.noisy;
        in->timesteps = b.times;
        in->context = b.context;
        *noise = b.target;
        return SDQ_OK;
    }
}

SDQ_API sdq_tensor *sdq_distill_task_loss(sdq_ctx *ctx, void *arg, sdq_rng *rng, size_t step) {
    const sdq_distill_task *t = (const sdq_distill_task *)arg;
    sdq_tensor *noise = NULL, *teacher = NULL, *y, *sum = NULL;
    sdq__tap tap[2][16];
    sdq_unet_input in;
    size_t i;
    (void)step;
    memset(tap, 0, sizeof tap);
    if (t->maps > 16 || (t->maps && t->checkpoint) || (!t->states && !t->data)) {
        sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                  "distillation: at most 16 mapped layers, none with checkpointing,"
                  " and states or data must be given");
        return NULL;
    }
    if (sdq__ds_batch(ctx, t, rng, &in, &noise, &teacher) != SDQ_OK) return NULL;
    if (t->teacher && (!teacher || t->maps)) teacher = sdq__ds_teacher(ctx, t, &in, tap[0]);
    in.checkpoint = t->checkpoint;
    y = sdq__ds_forward(ctx, t->student, &in, SDQ_FAKE, t, tap[1]);
    if (y && t->teacher_loss != 0.0f && !teacher && ctx->status == SDQ_OK)
        sdq__fail(ctx, SDQ_ERR_ARGUMENT, "distillation: teacher_loss %g without teacher or states",
                  (double)t->teacher_loss);
    if (!y || ctx->status != SDQ_OK) return NULL;
    if (t->teacher_loss != 0.0f && t->states && t->coherent)
        sum = sdq__ds_add(ctx, sum, "teacher", sdq__ds_coherent(ctx, t->states, y, teacher),
                          t->teacher_loss);
    else if (t->teacher_loss != 0.0f)
        sum = sdq__ds_add(ctx, sum, "teacher", sdq_mse(ctx, y, teacher, NULL), t->teacher_loss);
    if (t->noise_loss != 0.0f && noise)
        sum = sdq__ds_add(ctx, sum, "noise", sdq_mse(ctx, y, noise, NULL), t->noise_loss);
    for (i = 0; i < t->maps; i++) {
        sdq_tensor *a = tap[1][i].y, *b = tap[0][i].y;
        if (!a || !b) {
            sdq__fail(ctx, SDQ_ERR_MISSING, "distillation: no layer %s in student and teacher",
                      t->map[i].layer);
            return NULL;
        }
        sum = sdq__ds_add(ctx, sum, "maps",
                          t->map[i].l1 ? sdq_l1(ctx, a, b) : sdq_mse(ctx, a, b, NULL),
                          t->map[i].weight);
    }
    return sum;
}

/* Length of the name of the block that a parameter is in; 0: in none. */
static size_t sdq__ds_block(const char *name) {
    static const char *const kinds[] = {"resnets.", "attentions.", "samplers."};
    size_t i;
    for (i = 0; i < SDQ__COUNT(kinds); i++) {
        const char *at = strstr(name, kinds[i]);
        if (!at) continue;
        at += strlen(kinds[i]);
        return (size_t)(at - name) + strcspn(at, ".");
    }
    return 0;
}
/* The first parameter of the last blocks; parameters are in the order of evaluation. */
static size_t sdq__ds_first(const sdq_model *m, size_t blocks) {
    const char *last = "";
    size_t i, len = 0, count = 0;
    for (i = m->params; blocks && i > 0; i--) {
        const char *name = m->param[i - 1].name;
        const size_t n = sdq__ds_block(name);
        if (n == 0 && count < blocks) continue;
        if (n && n == len && strncmp(name, last, n) == 0) continue;
        if (count++ == blocks) return i;
        last = name;
        len = n;
    }
    return 0;
}

/* Deltas for the quantized layers from `first` on, always from the same random numbers. */
static sdq_status sdq__ds_add_deltas(sdq_ctx *ctx, sdq_optim *o, sdq_model *m, size_t rank,
                                     size_t first) {
    char name[256];
    sdq_rng rng;
    size_t i;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 0);
    for (i = first; i < m->layers; i++) {
        sdq_layer *l = m->layer[i];
        if (!l->quant.enabled) continue;
        SDQ__TRY(sdq__ly_new_delta(ctx, l, sdq__u_min(rank, sdq__u_min(l->out, l->in)), &rng));
        (void)snprintf(name, sizeof name, "%s.lora_a", l->name);
        SDQ__TRY(sdq_optim_add(ctx, o, &l->la, name, 0.0f, 0.0f, 1));
        (void)snprintf(name, sizeof name, "%s.lora_b", l->name);
        SDQ__TRY(sdq_optim_add(ctx, o, &l->lb, name, 0.0f, 0.0f, 1));
    }
    return SDQ_OK;
}

static void sdq__ds_bias(void *user, float *v, int load) {
    const sdq_layer *l = (const sdq_layer *)user;
    float *b = sdq_f32(&l->b);
    memcpy(load ? b : v, load ? v : b, l->out * sizeof(float));
}
/* What calibration made goes into the state as well, so that a run that goes on need not calibrate:
 * ranges, and corrected biases that are not trained. */
static sdq_status sdq__ds_add_calibrated(sdq_ctx *ctx, sdq_optim *o, sdq_model *m,
                                         const sdq_recipe *r) {
    char name[256];
    size_t i;
    for (i = 0; i < m->layers; i++) {
        sdq_layer *l = m->layer[i];
        if (!l->quant.enabled) continue;
        if (l->quant.weight_scale == SDQ_WEIGHT_MOVING && !l->w_mn)
            SDQ__TRY(sdq__ly_with_weights(ctx, l, sdq__ly_observe_weights));
        if (l->quant.weight_scale == SDQ_WEIGHT_FIXED)      /* of the weights as they are now */
            SDQ__TRY(sdq__ly_with_weights(ctx, l, sdq__ly_weight_scales));
        (void)snprintf(name, sizeof name, "%s.observers", l->name);
        SDQ__TRY(sdq__opt_add_state(ctx, o, name, sdq__ly_state_count(l), sdq__ly_state, l,
                                    r->moving > 0.0f));
        if (!l->b.data || l->b.needs_grad) continue;
        (void)snprintf(name, sizeof name, "%s.bias", l->name);
        SDQ__TRY(sdq__opt_add_state(ctx, o, name, l->out, sdq__ds_bias, l, 0));
    }
    return SDQ_OK;
}

/* Say in the state what is trained: the float weights, the layers that stay float, the recipe. */
static sdq_status sdq__ds_tell(sdq_ctx *ctx, sdq_optim *o, const sdq_model *m,
                               const sdq_recipe *r) {
    uint64_t kept = 0;
    char text[1024], recipe[900];
    size_t i;
    for (i = 0; i < m->layers; i++)
        kept = sdq__u_mix(kept, (uint64_t)(m->layer[i]->quant.enabled != 0));
    sdq_recipe_to_str(r, recipe, sizeof recipe);
    (void)snprintf(text, sizeof text, "model=%08lx%08lx layers=%08lx%08lx %s",
                   (unsigned long)(m->source >> 32), (unsigned long)(m->source & 0xffffffffu),
                   (unsigned long)(kept >> 32), (unsigned long)(kept & 0xffffffffu), recipe);
    sdq__free(ctx, o->of);
    o->of = sdq__strdup(ctx, text);
    return ctx->status;
}

SDQ_API sdq_status sdq_optim_add_student(sdq_ctx *ctx, sdq_optim *o, sdq_model *m,
                                         const sdq_recipe *r, float scale_lr) {
    const size_t first = sdq__ds_first(m, r->last_blocks);
    char name[256];
    size_t i, p, first_layer = 0;
    SDQ__TRY(sdq__ds_tell(ctx, o, m, r));
    for (i = 0; i < first; i++) first_layer += m->param[i].layer && m->param[i].rank > 1;
    if (r->train_set <= SDQ_TRAIN_SMALL)
        SDQ__TRY(sdq__task_add_params(ctx, o, m, "", r->train_set == SDQ_TRAIN_ALL, first));
    if (r->train_set == SDQ_TRAIN_LORA)
        SDQ__TRY(sdq__ds_add_deltas(ctx, o, m, sdq__rc_rank(r), first_layer));
    SDQ__TRY(sdq__ds_add_calibrated(ctx, o, m, r));
    for (i = first_layer; r->learn_scales && i < m->layers; i++) {
        sdq_layer *l = m->layer[i];
        if (!l->quant.enabled) continue;
        if (l->quant.weight_scale == SDQ_WEIGHT_FIXED && r->train_set != SDQ_TRAIN_RANGES) {
            (void)snprintf(name, sizeof name, "%s.weight_scale", l->name);
            SDQ__TRY(sdq_optim_add(ctx, o, &l->sw, name, scale_lr / 20.0f, 1e-7f, 0));
        }
        for (p = 0; sdq__ly_range(l) == SDQ_RANGE_STATIC && p < l->parts; p++) {
            (void)snprintf(name, sizeof name, "%s.input_scale.%zu", l->name, p);
            SDQ__TRY(sdq_optim_add(ctx, o, &l->part[p].s, name, scale_lr, 1e-7f, 0));
        }
    }
    for (i = 0; i < o->count && o->leaf[i].state; i++) {}
    if (i == o->count)
        return sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                         "training: nothing to train: train_set=%s, but no input range is static or"
                         " learn_scales is 0; choose static ranges or another set",
                         sdq__rc_train_set[r->train_set]);
    return SDQ_OK;
}

/* ===========================================================================
 * >>convert   float weights to packed int8; the file of a quantized network
 *
 * Of a quantized layer NAME the file holds
 *   NAME.weight        I8 [out,kh,kw,in]    NAME.weight_scale  F32 [out]
 *   NAME.bias          F32                  NAME.input_scale   F32 [parts], NAME.input_zero I32
 *   NAME.output_range  F32 [2], the published recipe only
 * With weights of 4 bits (>>qmath) instead of the first one
 *   NAME.weight        U8 [out,kh,kw,(in+1)/2]: channel 2i in the low, 2i+1 in the high half of
 *                      byte i, two's complement, a half without a channel 0
 *   NAME.weight_group  U8 [out,kh,kw,groups]: the multipliers 1..16; the int8 weight is the product
 * The int8 network in memory is the same size: packed files are expanded when they are loaded.
 * Everything else has its diffusers name and shape: vectors as F32, weights as F16 where
 * that is exact, as sdq_recipe_apply made it unless they were trained or are out of range.
 * The metadata: sdq.config (config.json of the UNet), sdq.layer.NAME ("range=R split=N", with 4
 * bits " bits=4 group=N" behind it), sdq.recipe, sdq.schedule, sdq.attention ("int8", "int16", or
 * missing: float), sdq.source (hash of the float UNet's weights), sdq.hash (of all else).
 * ======================================================================== */

SDQ_API sdq_status sdq_model_convert(sdq_ctx *ctx, sdq_model *m) {
    size_t i;
    for (i = 0; i < m->layers; i++) SDQ__TRY(sdq_layer_convert(ctx, m->layer[i]));
    return SDQ_OK;
}

/* The packed weights of a layer as [out,kh,kw,in]. */
static void sdq__cv_unpack(const sdq_layer *l, int8_t *dst) {
    const size_t taps = sdq__ly_taps(l);
    size_t i, o, t, c;
    for (i = 0; i < l->parts; i++) {
        const sdq__qpart *p = &l->part[i];
        for (o = 0; o < l->out; o++)
            for (t = 0; t < taps; t++)
                for (c = 0; c < p->c; c++) {
                    const size_t quad = (o / SDQ__NR * taps + t) * p->w.quads + c / 4;
                    dst[(o * taps + t) * l->in + p->c0 + c] =
                        p->w.b[(quad * SDQ__NR + o % SDQ__NR) * 4 + c % 4];
                }
    }
}

/* A file under construction: entries, their names and metadata, all in the arena. */
typedef struct sdq__cv_out {
    sdq_ctx *ctx;
    sdq_entry *entry;
    sdq_pair *meta;
    size_t n, metas;
} sdq__cv_out;

static char *sdq__cv_text(sdq_ctx *ctx, const char *a, const char *b) {
    char *s = SDQ__PUSH_N(ctx, char, strlen(a) + strlen(b) + 1);
    if (s) { strcpy(s, a); strcat(s, b); }
    return s;
}

static void sdq__cv_meta(sdq__cv_out *o, const char *key, const char *value) {
    if (!key || !value) return;
    o->meta[o->metas].key = key;
    o->meta[o->metas++].value = value;
}

static void sdq__cv_meta_hash(sdq__cv_out *o, const char *key, uint64_t hash) {
    char *text = SDQ__PUSH_N(o->ctx, char, 17);
    if (!text) return;
    (void)snprintf(text, 17, "%08lx%08lx", (unsigned long)(hash >> 32),
                   (unsigned long)(hash & 0xffffffffu));
    sdq__cv_meta(o, key, text);
}

/* 16 digits of base 16, as sdq__cv_meta_hash writes them; 0 when they are not. */
static int sdq__cv_read_hash(const char *text, uint64_t *hash) {
    static const char digits[] = "0123456789abcdef";
    size_t i;
    *hash = 0;
    if (!text || strlen(text) != 16) return 0;
    for (i = 0; i < 16; i++) {
        const char *at = strchr(digits, text[i]);
        if (!at) return 0;
        *hash = *hash * 16 + (uint64_t)(at - digits);
    }
    return 1;
}

/* The hash of an array does not see whether floats are stored as F32 or exactly as F16. */
typedef struct sdq__cv_hashes {
    const struct sdq__kernels *k;
    const sdq_entry *entry;
    uint64_t *hash;
} sdq__cv_hashes;

static void sdq__cv_hash_task(void *arg, size_t i, int thread) {
    const sdq__cv_hashes *w = (const sdq__cv_hashes *)arg;
    const sdq_entry *e = &w->entry[i];
    const size_t count = sdq_entry_count(e);
    sdq__hash hash = sdq__u_hash_array(e->name, (size_t)e->rank, e->dim);
    float x[1024];
    size_t at, n;
    (void)thread;
    if (e->dtype != SDQ_F16) sdq__u_hash_add(&hash, e->data, e->bytes);
    else for (at = 0; at < count; at += n) {
        n = sdq__u_min(SDQ__COUNT(x), count - at);
        sdq__st_to_f32(w->k, SDQ_F16, (const char *)e->data + 2 * at, n, x);
        sdq__u_hash_add(&hash, x, n * sizeof(float));
    }
    w->hash[i] = sdq__u_hash_end(&hash);
}

/* Add the hashes of the arrays to the sum. */
static sdq_status sdq__cv_hash_arrays(sdq_ctx *ctx, const sdq_entry *entry, size_t n,
                                      uint64_t *sum) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__cv_hashes w;
    size_t i;
    w.k = ctx->k;
    w.entry = entry;
    w.hash = SDQ__PUSH_N(ctx, uint64_t, n);
    if (!w.hash) return ctx->status;
    sdq__par_for(ctx, n, sdq__cv_hash_task, &w);
    for (i = 0; i < n; i++) *sum += w.hash[i];
    sdq_arena_release(ctx, mark);
    return SDQ_OK;
}

static uint64_t sdq__cv_hash_pair(const char *key, const char *value) {
    if (!strcmp(key, "sdq.hash")) return 0;
    return sdq__u_hash(sdq__u_hash(1, key, strlen(key)), value, strlen(value));
}

static sdq_status sdq__cv_hash_out(const sdq__cv_out *o, uint64_t *sum) {
    size_t i;
    *sum = 0;
    for (i = 0; i < o->metas; i++) *sum += sdq__cv_hash_pair(o->meta[i].key, o->meta[i].value);
    return sdq__cv_hash_arrays(o->ctx, o->entry, o->n, sum);
}

static sdq_status sdq__cv_hash_file(sdq_ctx *ctx, const sdq_file *f, uint64_t *sum) {
    const sdq__json *meta = sdq__js_get(f->header, "__metadata__"), *v;
    *sum = 0;
    for (v = meta ? meta->child : NULL; v; v = v->next) *sum += sdq__cv_hash_pair(v->key, v->str);
    return sdq__cv_hash_arrays(ctx, f->entries, f->count, sum);
}

static void sdq__cv_add(sdq__cv_out *o, const char *name, const char *suffix, sdq_dtype dtype,
                        sdq_dtype store, int rank, const size_t *dim, const void *data) {
    sdq_entry *e = &o->entry[o->n];
    size_t count = 1;
    int i;
    memset(e, 0, sizeof *e);
    e->name = sdq__cv_text(o->ctx, name, suffix);
    e->dtype = dtype;
    e->store = store;
    e->rank = rank;
    for (i = 0; i < 8; i++) e->dim[i] = i < rank ? dim[i] : 1;
    for (i = 0; i < rank; i++) count *= dim[i];
    e->data = data;
    e->bytes = count * sdq__u_dtype_size(dtype);
    if (e->name && data) o->n++;
}

static sdq_dtype sdq__cv_exact(const float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i++)
        if (sdq__u_bits(sdq__u_from_f16(sdq__u_to_f16(x[i]))) != sdq__u_bits(x[i])) return SDQ_F32;
    return SDQ_F16;
}

/* int8 weights q, products of 4 bits and multipliers, as halves of bytes: row by row of [in]. */
static void sdq__cv_pack4(const sdq_layer *l, const int8_t *q, uint8_t *dst) {
    const size_t rows = l->out * sdq__ly_taps(l), groups = sdq__ly_tap_groups(l);
    const size_t ld = (l->in + 1) / 2, size = sdq__ly_group_size(l);
    size_t r, c;
    memset(dst, 0, rows * ld);
    for (r = 0; r < rows; r++)
        for (c = 0; c < l->in; c++) {
            const int v = q[r * l->in + c] / (int)l->mult[r * groups + c / size];
            uint8_t *byte = dst + r * ld + c / 2;
            *byte = (uint8_t)(*byte | ((unsigned)v & 15u) << (c % 2 ? 4 : 0));
        }
}
static void sdq__cv_unpack4(const sdq_layer *l, const uint8_t *src, int8_t *q) {
    const size_t rows = l->out * sdq__ly_taps(l), groups = sdq__ly_tap_groups(l);
    const size_t ld = (l->in + 1) / 2, size = sdq__ly_group_size(l);
    size_t r, c;
    for (r = 0; r < rows; r++)
        for (c = 0; c < l->in; c++) {
            const int half = src[r * ld + c / 2] >> (c % 2 ? 4 : 0) & 15;
            q[r * l->in + c] =
                (int8_t)((half < 8 ? half : half - 16) * (int)l->mult[r * groups + c / size]);
        }
}

/* The array of the int8 weights q [out,kh,kw,in], or its two arrays of 4 bits. */
static void sdq__cv_weight(sdq__cv_out *o, const sdq_layer *l, const int8_t *q) {
    size_t dim[4];
    uint8_t *packed;
    dim[0] = l->out; dim[1] = l->kh; dim[2] = l->kw; dim[3] = l->in;
    if (l->quant.weight_bits != 4) {
        sdq__cv_add(o, l->name, ".weight", SDQ_I8, SDQ_I8, 4, dim, q);
        return;
    }
    dim[3] = (l->in + 1) / 2;
    packed = SDQ__PUSH_N(o->ctx, uint8_t, dim[0] * dim[1] * dim[2] * dim[3]);
    if (!packed) return;
    sdq__cv_pack4(l, q, packed);
    sdq__cv_add(o, l->name, ".weight", SDQ_U8, SDQ_U8, 4, dim, packed);
    dim[3] = sdq__ly_tap_groups(l);
    sdq__cv_add(o, l->name, ".weight_group", SDQ_U8, SDQ_U8, 4, dim, l->mult);
}

static void sdq__cv_layer(sdq__cv_out *o, const sdq_layer *l) {
    size_t i;
    int8_t *q = SDQ__PUSH_N(o->ctx, int8_t, l->out * sdq__ly_k(l));
    float *s = SDQ__PUSH_N(o->ctx, float, 4);
    int32_t *z = SDQ__PUSH_N(o->ctx, int32_t, 2);
    char *text = SDQ__PUSH_N(o->ctx, char, 128);
    const size_t two = 2;
    if (!q || !s || !z || !text) return;
    sdq__cv_unpack(l, q);
    sdq__cv_weight(o, l, q);
    sdq__cv_add(o, l->name, ".weight_scale", SDQ_F32, SDQ_F32, 1, &l->out, l->sw.data);
    for (i = 0; i < l->parts; i++) { s[i] = sdq_f32(&l->part[i].s)[0]; z[i] = l->part[i].z; }
    sdq__cv_add(o, l->name, ".input_scale", SDQ_F32, SDQ_F32, 1, &l->parts, s);
    sdq__cv_add(o, l->name, ".input_zero", SDQ_I32, SDQ_I32, 1, &l->parts, z);
    if (l->quant.quantize_output) {
        s[2] = l->out_mn; s[3] = l->out_mx;
        sdq__cv_add(o, l->name, ".output_range", SDQ_F32, SDQ_F32, 1, &two, s + 2);
    }
    (void)snprintf(text, 64, "range=%s split=%zu", sdq__rc_range[sdq__ly_range(l)],
                   l->parts == 2 ? l->quant.split : 0);
    if (l->quant.weight_bits == 4)
        (void)snprintf(text + strlen(text), 64, " bits=4 group=%zu", sdq__ly_group_size(l));
    sdq__cv_meta(o, sdq__cv_text(o->ctx, "sdq.layer.", l->name), text);
}

static int sdq__cv_is_int8(const sdq_layer *l) { return l && sdq__ly_is_int8(l); }

static void sdq__cv_param(sdq__cv_out *o, const sdq__param *p) {
    const int packed = p->rank > 1 && p->layer && sdq__ly_frozen(p->layer);
    const sdq_tensor *t = packed ? NULL : sdq__md_tensor(p);
    const size_t n = p->dim[0] * p->dim[1] * p->dim[2] * p->dim[3];
    const int bias = p->rank == 1;
    const float *data = packed ? sdq__ly_thaw(o->ctx, p->layer) : t ? sdq_f32(t) : NULL;
    float *copy;
    if (!data) return;      /* an int8 weight: written by its layer */
    if (p->dim[2] * p->dim[3] > 1) {
        copy = SDQ__PUSH_N(o->ctx, float, n);
        if (!copy) return;
        sdq__md_export(p, copy, data);
        data = copy;
    }
    sdq__cv_add(o, p->name, "", SDQ_F32, bias ? SDQ_F32 : sdq__cv_exact(data, n), p->rank, p->dim,
                data);
}

/* "pndm 50 4 51 981:1 961:0 ...": scheduler, steps, guidance, count, timestep:float */
static char *sdq__cv_policy_text(sdq_ctx *ctx, const sdq_policy *p) {
    char *s = SDQ__PUSH_N(ctx, char, 128 + p->count * 32);
    size_t i, at;
    if (!s) return NULL;
    at = (size_t)sprintf(s, "%s %zu %.9g %zu", sdq_scheduler_name(p->scheduler), p->steps,
                         (double)p->guidance, p->count);
    for (i = 0; i < p->count; i++)
        at += (size_t)sprintf(s + at, " %.9g:%d", (double)p->timestep[i], p->is_float[i] != 0);
    return s;
}

SDQ_API sdq_status sdq_model_save_int8(sdq_ctx *ctx, const sdq_model *m, const char *path,
                                       const sdq_policy *policy, const char *recipe) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__cv_out o;
    uint64_t hash = 0;
    sdq_status st;
    size_t i;
    if (!sdq__md_is(ctx, "sdq_model_save_int8", m, SDQ_PART_UNET)) return ctx->status;
    memset(&o, 0, sizeof o);
    o.ctx = ctx;
    o.entry = SDQ__PUSH_N(ctx, sdq_entry, m->params + 5 * m->layers);
    o.meta = SDQ__PUSH_N(ctx, sdq_pair, m->layers + 6);
    if (!o.entry || !o.meta) return ctx->status;
    sdq__cv_meta(&o, "sdq.config", m->config);
    sdq__cv_meta(&o, "sdq.recipe", recipe);
    sdq__cv_meta_hash(&o, "sdq.source", m->source);
    if (m->unet->blocks && m->unet->block[0]->self.bits)
        sdq__cv_meta(&o, "sdq.attention", m->unet->block[0]->self.bits == 8 ? "int8" : "int16");
    if (policy && policy->count)
        sdq__cv_meta(&o, "sdq.schedule", sdq__cv_policy_text(ctx, policy));
    for (i = 0; i < m->params; i++) sdq__cv_param(&o, &m->param[i]);
    for (i = 0; i < m->layers; i++)
        if (sdq__cv_is_int8(m->layer[i])) sdq__cv_layer(&o, m->layer[i]);
    st = ctx->status;
    if (st == SDQ_OK) st = sdq__cv_hash_out(&o, &hash);
    if (st == SDQ_OK) sdq__cv_meta_hash(&o, "sdq.hash", hash);
    if (st == SDQ_OK) st = ctx->status;
    if (st == SDQ_OK) st = sdq_file_write(ctx, path, o.entry, o.n, o.meta, o.metas);
    sdq_arena_release(ctx, mark);
    return st;
}

/* ---- reading it back ---- */

/* No number of exponent ones: neither infinite nor NaN. Integers are finite. */
static int sdq__cv_finite(const sdq_entry *e) {
    const char *p = (const char *)e->data;
    const size_t n = sdq_entry_count(e);
    size_t i;
    uint32_t u;
    uint16_t h;
    for (i = 0; e->dtype == SDQ_F32 && i < n; i++) {
        memcpy(&u, p + 4 * i, 4);
        if ((u & 0x7f800000u) == 0x7f800000u) return 0;
    }
    for (i = 0; e->dtype == SDQ_F16 && i < n; i++) {
        memcpy(&h, p + 2 * i, 2);
        if ((h & 0x7c00u) == 0x7c00u) return 0;
    }
    return 1;
}

/* The array NAME + suffix, which must have that type and shape and finite values. */
static const sdq_entry *sdq__cv_need(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                     const char *name, const char *suffix, sdq_dtype dtype,
                                     int rank, const size_t *dim) {
    char full[320], want[128], found[192];
    const sdq_entry *e;
    int i, same;
    (void)snprintf(full, sizeof full, "%s%s", name, suffix);
    e = sdq_file_find(f, full);
    if (!e) {
        sdq__fail(ctx, SDQ_ERR_MISSING, "%s: %s is missing; the file is not complete", path, full);
        return NULL;
    }
    same = e->dtype == dtype && e->rank == rank;
    for (i = 0; i < rank; i++) same = same && e->dim[i] == dim[i];
    if (!same) {
        sdq__md_shape(rank, dim, want, sizeof want);
        sdq__md_shape(e->rank, e->dim, found, sizeof found);
        sdq__fail(ctx, SDQ_ERR_SHAPE, "%s: %s is %s %s, expected %s %s", path, full,
                  sdq_dtype_name(e->dtype), found, sdq_dtype_name(dtype), want);
        return NULL;
    }
    if (sdq__cv_finite(e)) return e;
    sdq__fail(ctx, SDQ_ERR_NUMERIC, "%s: %s has a value that is not finite", path, full);
    return NULL;
}

static int sdq__cv_good_scale(const float *s, size_t n) {
    size_t i;
    for (i = 0; i < n; i++)
        if (!(s[i] > 0.0f && s[i] < 1e30f)) return 0;
    return 1;
}

static sdq_status sdq__cv_read_settings(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                        sdq_layer *l) {
    char key[320], word[16];
    const char *text;
    unsigned long split = 0, group = 1;
    sdq_quant q;
    int r, bits = 8, at = 0;
    memset(&q, 0, sizeof q);
    (void)snprintf(key, sizeof key, "sdq.layer.%s", l->name);
    text = sdq_file_meta(f, key);
    if (!text || sscanf(text, "range=%15s split=%lu%n", word, &split, &at) != 2
        || (text[at] && (sscanf(text + at, " bits=%d group=%lu", &bits, &group) != 2 || bits != 4)))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: the settings of layer %s are missing or damaged",
                         path, l->name);
    for (r = 1; r < SDQ_RANGE_COUNT; r++)
        if (!strcmp(word, sdq__rc_range[r])) q.range = (sdq_range)r;
    if (q.range == SDQ_RANGE_DEFAULT || split >= l->in || group < 1 || group > l->in)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: layer %s has settings \"%s\"", path, l->name,
                         text);
    q.enabled = 1;
    q.split = (size_t)split;
    q.weight_bits = bits;
    q.weight_group = (size_t)group;
    (void)snprintf(key, sizeof key, "%s.output_range", l->name);
    q.quantize_output = sdq_file_find(f, key) != NULL;
    return sdq_layer_set_quant(ctx, l, &q);
}

/* The int8 weights of a layer [out,kh,kw,in], as they are in the file or made from 4 bits. */
static const int8_t *sdq__cv_read_weight(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                         sdq_layer *l, const sdq_entry **weight) {
    const int four = l->quant.weight_bits == 4;
    const sdq_entry *g;
    size_t dim[4], i, n;
    int8_t *q;
    dim[0] = l->out; dim[1] = l->kh; dim[2] = l->kw; dim[3] = four ? (l->in + 1) / 2 : l->in;
    *weight = sdq__cv_need(ctx, f, path, l->name, ".weight", four ? SDQ_U8 : SDQ_I8, 4, dim);
    if (!*weight || !four) return *weight ? (const int8_t *)(*weight)->data : NULL;
    dim[3] = sdq__ly_tap_groups(l);
    n = l->out * sdq__ly_groups(l);
    g = sdq__cv_need(ctx, f, path, l->name, ".weight_group", SDQ_U8, 4, dim);
    if (!g) return NULL;
    l->mult = SDQ__NEW_N(ctx, uint8_t, n);
    q = SDQ__PUSH_N(ctx, int8_t, l->out * sdq__ly_k(l));
    if (!l->mult || !q) return NULL;
    memcpy(l->mult, g->data, n);
    for (i = 0; i < n; i++)
        if (l->mult[i] < 1 || l->mult[i] > SDQ__Q_MULTIPLIERS) {
            sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: %s.weight_group has the multiplier %d, expected"
                      " 1..%d", path, l->name, (int)l->mult[i], SDQ__Q_MULTIPLIERS);
            return NULL;
        }
    sdq__cv_unpack4(l, (const uint8_t *)(*weight)->data, q);
    return q;
}

static sdq_status sdq__cv_read_layer(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                     sdq_layer *l) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    const sdq_entry *w, *sw, *s, *z, *r;
    const size_t two = 2;
    const int8_t *q;
    size_t i;
    SDQ__TRY(sdq__cv_read_settings(ctx, f, path, l));
    q = sdq__cv_read_weight(ctx, f, path, l, &w);
    sw = sdq__cv_need(ctx, f, path, l->name, ".weight_scale", SDQ_F32, 1, &l->out);
    s = sdq__cv_need(ctx, f, path, l->name, ".input_scale", SDQ_F32, 1, &l->parts);
    z = sdq__cv_need(ctx, f, path, l->name, ".input_zero", SDQ_I32, 1, &l->parts);
    if (!q || !sw || !s || !z) return ctx->status;
    memcpy(l->sw.data, sw->data, sw->bytes);
    for (i = 0; i < l->parts; i++) {
        sdq__qpart *p = &l->part[i];
        memcpy(p->s.data, (const char *)s->data + 4 * i, 4);
        memcpy(&p->z, (const char *)z->data + 4 * i, 4);
        p->seen = sdq_f32(&p->s)[0] > 0.0f;
        if (p->z < 0 || p->z > 255
            || (sdq__ly_range(l) == SDQ_RANGE_STATIC && !sdq__cv_good_scale(sdq_f32(&p->s), 1)))
            return sdq__fail(ctx, SDQ_ERR_FORMAT,
                             "%s: layer %s has an input scale or zero point that is not"
                             " valid",
                             path, l->name);
    }
    if (!sdq__cv_good_scale(sdq_f32(&l->sw), l->out))
        return sdq__fail(ctx, SDQ_ERR_FORMAT,
                         "%s: layer %s has a weight scale that is not positive", path, l->name);
    if (l->quant.quantize_output) {
        r = sdq__cv_need(ctx, f, path, l->name, ".output_range", SDQ_F32, 1, &two);
        if (!r) return ctx->status;
        memcpy(&l->out_mn, r->data, 4);
        memcpy(&l->out_mx, (const char *)r->data + 4, 4);
        l->out_seen = 1;
    }
    SDQ__TRY(sdq__ly_set_int8(ctx, l, q));
    sdq_arena_release(ctx, mark);
    sdq__st_forget(f, w);
    return SDQ_OK;
}

static sdq_status sdq__cv_read_policy(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                      sdq_policy *p) {
    const char *text = sdq_file_meta(f, "sdq.schedule");
    unsigned long steps, count;
    char kind[16];
    float guidance;
    int at = 0;
    size_t i;
    memset(p, 0, sizeof *p);
    if (!text) return SDQ_OK;
    if (sscanf(text, "%15s %lu %f %lu%n", kind, &steps, &guidance, &count, &at) != 4 || count > 1001
        || (p->scheduler = sdq_scheduler_kind_from_name(kind)) == SDQ_SCHEDULER_COUNT)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: sdq.schedule is damaged", path);
    for (i = 0; i < count; i++) {
        int n = 0, is_float;
        if (sscanf(text + at, " %f:%d%n", &p->timestep[i], &is_float, &n) != 2)
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: sdq.schedule has %zu evaluations, not %lu",
                             path, i, count);
        p->is_float[i] = is_float != 0;
        at += n;
    }
    p->steps = (size_t)steps;
    p->guidance = guidance;
    p->count = (size_t)count;
    return SDQ_OK;
}

static sdq_status sdq__cv_read_attention(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                         sdq_model *m) {
    const char *text = sdq_file_meta(f, "sdq.attention");
    const int bits = !text ? 0 : !strcmp(text, "int8") ? 8 : !strcmp(text, "int16") ? 16 : -1;
    if (bits < 0)
        return sdq__fail(ctx, SDQ_ERR_FORMAT,
                         "%s: sdq.attention is \"%.40s\", expected \"int8\" or \"int16\"", path,
                         text);
    sdq__un_attention(m->unet, bits);
    return SDQ_OK;
}

/* A parameter under its own name: float, F16 or F32. */
static sdq_status sdq__cv_read_float(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                     const sdq__param *p, sdq__md_reader *r) {
    const sdq_entry *e = sdq_file_find(f, p->name);
    e = sdq__cv_need(ctx, f, path, p->name, "", e && e->dtype == SDQ_F16 ? SDQ_F16 : SDQ_F32,
                     p->rank, p->dim);
    return e ? sdq__md_reader_add(ctx, r, p, f, e, p->layer && p->rank > 1) : ctx->status;
}

/* The file has more arrays than were read: name one. */
static sdq_status sdq__cv_surplus(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                  const sdq_model *m) {
    static const char *const suffix[] = {".weight_scale", ".input_scale", ".input_zero",
                                         ".output_range", ".weight_group"};
    size_t i, k;
    for (i = 0; i < f->count; i++) {
        const char *name = f->entries[i].name;
        int known = 0;
        for (k = 0; k < m->params && !known; k++) known = !strcmp(name, m->param[k].name);
        for (k = 0; k < 5 * m->layers && !known; k++) {
            const sdq_layer *l = m->layer[k / 5];
            const size_t n = strlen(l->name);
            known = sdq__cv_is_int8(l) && !strncmp(name, l->name, n)
                 && !strcmp(name + n, suffix[k % 5]);
        }
        if (!known)
            return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: %s has no place in the network", path, name);
    }
    return SDQ_OK;
}

static sdq_status sdq__cv_read_params(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                      sdq_model *m) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    size_t i, used = m->params;
    sdq__md_reader r;
    SDQ__TRY(sdq__md_reader_open(ctx, m, &r));
    for (i = 0; i < m->params; i++) {
        const sdq__param *p = &m->param[i];
        const sdq_entry *e = sdq_file_find(f, p->name);
        if (!e || (e->dtype != SDQ_I8 && e->dtype != SDQ_U8) || p->rank == 1 || !p->layer) {
            SDQ__TRY(sdq__cv_read_float(ctx, f, path, p, &r));
            continue;
        }
        SDQ__TRY(sdq__cv_read_layer(ctx, f, path, p->layer));
        used += 3 + (size_t)(p->layer->quant.quantize_output != 0)
              + (size_t)(p->layer->quant.weight_bits == 4);
    }
    SDQ__TRY(sdq__md_reader_run(ctx, &r));
    sdq_arena_release(ctx, mark);
    return used == f->count ? SDQ_OK : sdq__cv_surplus(ctx, f, path, m);
}

/* Values that mean the same: one for all levels may be written once or for each. */
static int sdq__cv_same_value(const sdq__json *a, const sdq__json *b) {
    const int list_a = a->kind == SDQ__JS_ARRAY, list_b = b->kind == SDQ__JS_ARRAY;
    const size_t n = list_a ? a->count : list_b ? b->count : 1;
    size_t i;
    if (n == 0 || (list_a && list_b && b->count != n)) return 0;
    if (list_a) a = a->child;
    if (list_b) b = b->child;
    for (i = 0; i < n; i++) {
        if (!sdq__md_equal(a, b)) return 0;
        if (list_a) a = a->next;
        if (list_b) b = b->next;
    }
    return 1;
}

/* Two texts of config.json, the first from the file `path`, describe the same UNet. Keys that the
 * builder does not read do not matter, nor does the size of pictures: the model may have been a
 * folder and now be one file. */
static sdq_status sdq__cv_same_config(sdq_ctx *ctx, const char *path, const char *a,
                                      const char *b, int *same) {
    sdq__json *ja = NULL, *jb = NULL, *defaults = NULL;
    const sdq__json *key, *va, *vb;
    sdq_status st;
    *same = 1;
    if (strcmp(a, b) == 0) return SDQ_OK;
    SDQ__TRY_DONE(sdq__js_parse(ctx, a, strlen(a), path, &ja));
    SDQ__TRY_DONE(sdq__js_parse(ctx, b, strlen(b), "config.json", &jb));
    SDQ__TRY_DONE(sdq__js_parse(ctx, sdq__un_defaults, strlen(sdq__un_defaults), "unet",
                                &defaults));
    for (key = defaults->child; key; key = key->next) {
        if (strcmp(key->key, "sample_size") == 0) continue;
        va = sdq__js_get(ja, key->key);
        vb = sdq__js_get(jb, key->key);
        *same = *same && sdq__cv_same_value(va ? va : key, vb ? vb : key);
    }
done:
    sdq__js_free(ctx, ja);
    sdq__js_free(ctx, jb);
    sdq__js_free(ctx, defaults);
    return st;
}

/* The file is of the network that `m` is: same configuration; and whole: same hash as written.
 * look: the second is not asked for. */
static sdq_status sdq__cv_check(sdq_ctx *ctx, const sdq_file *f, const char *path,
                                const char *folder, int look, sdq_model *m) {
    const char *config = sdq_file_meta(f, "sdq.config");
    uint64_t want, hash = 0;
    int same = 1;
    if (!config)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: is not a network quantized by sdq: "
                         "\"sdq.config\" is missing", path);
    if (!sdq__cv_read_hash(sdq_file_meta(f, "sdq.hash"), &want)
        || !sdq__cv_read_hash(sdq_file_meta(f, "sdq.source"), &m->source))
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: has no valid \"sdq.hash\" and \"sdq.source\": "
                         "it is damaged or of an older version; quantize the network again", path);
    if (!look) SDQ__TRY(sdq__cv_hash_file(ctx, f, &hash));
    if (!look && hash != want)
        return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: is damaged: its hash is %08lx%08lx, but "
                         "\"sdq.hash\" says %s; copy or make it again", path,
                         (unsigned long)(hash >> 32), (unsigned long)(hash & 0xffffffffu),
                         sdq_file_meta(f, "sdq.hash"));
    SDQ__TRY(sdq__cv_same_config(ctx, path, config, m->config, &same));
    if (same) return SDQ_OK;
    return sdq__fail(ctx, SDQ_ERR_FORMAT, "%s: was made from another UNet than the one in %s",
                     path, folder);
}

SDQ_API sdq_status sdq_model_peek_int8(sdq_ctx *ctx, const char *folder, const char *path,
                                       sdq_model_info *info, uint64_t *source,
                                       sdq_policy *policy) {
    sdq_file *f = NULL;
    sdq_model *m = NULL;
    sdq_status st;
    SDQ__TRY(sdq_file_open(ctx, path, &f));
    SDQ__TRY_DONE(sdq__md_structure(ctx, folder, SDQ_PART_UNET, SDQ__MD_SHAPES, &m));
    SDQ__TRY_DONE(sdq__cv_check(ctx, f, path, folder, 1, m));
    *info = m->info;
    *source = m->source;
    st = sdq__cv_read_policy(ctx, f, path, policy);
done:
    sdq_model_free(ctx, m);
    sdq_file_close(ctx, f);
    return st;
}

SDQ_API sdq_status sdq_model_load_int8(sdq_ctx *ctx, const char *folder, const char *path,
                                       sdq_model **out, sdq_policy *policy) {
    sdq_file *f = NULL;
    sdq_model *m = NULL;
    sdq_policy unused;
    size_t i;
    sdq_status st;
    *out = NULL;
    st = sdq_file_open(ctx, path, &f);
    if (st != SDQ_OK) return st;
    SDQ__TRY_DONE(sdq__md_structure(ctx, folder, SDQ_PART_UNET, SDQ__MD_NO_WEIGHTS, &m));
    SDQ__TRY_DONE(sdq__cv_check(ctx, f, path, folder, ctx->dry != NULL, m));
    for (i = 0; i < m->layers; i++) m->layer[i]->quant.enabled = 0;
    SDQ__TRY_DONE(sdq__cv_read_attention(ctx, f, path, m));
    SDQ__TRY_DONE(sdq__cv_read_params(ctx, f, path, m));
    SDQ__TRY_DONE(sdq__cv_read_policy(ctx, f, path, policy ? policy : &unused));
    *out = m;
    m = NULL;
done:
    sdq_model_free(ctx, m);
    sdq_file_close(ctx, f);
    return st;
}

/* ===========================================================================
 * >>schedule   which evaluations must be float
 *
 * In units where the picture is x / sqrt(a), a step subtracts (sigma_i - sigma_{i+1}) eps, with
 * sigma = sqrt((1 - a) / a). An error of eps at evaluation i moves x by that much, and if it stayed
 * there, (sigma_i - sigma_{i+1})^2 MSE_i, the error measured on the float trajectory, would rank
 * the evaluations. But the evaluations that follow see the moved x and correct most of it, the more
 * of them there are. So there are several rankings,
 *     score_i = |sigma_i - sigma_{i+1}|^p MSE_i    for p = 0, 1, 2
 * and complete runs decide which one serves this model and how many of it are needed, by
 * bisection. (Emoji model, 10 of 51: p = 0 gives 51.4 dB, 1 48.9, 2 47.5; all int8 46.4.)
 * ======================================================================== */

typedef struct sdq__search {
    sdq_ctx *ctx;
    const sdq_pipeline *p;
    const char *const *prompts;
    size_t n;                       /* prompts */
    const sdq_txt2img_desc *desc;
    sdq_image *ref;                 /* their float pictures */
    double target;
    double mse[1001];
    float time[1001];
    size_t count;                   /* evaluations */
} sdq__search;

/* On the float trajectory: what would the int8 network have said? */
static int sdq__se_measure(void *user, const sdq_step_info *info) {
    sdq__search *s = (sdq__search *)user;
    const sdq_mark mark = sdq_arena_mark(s->ctx);
    const size_t n = sdq_tensor_count(info->raw), all = info->input->dim[0];
    sdq_unet_input in;
    sdq_tensor *y;
    float *times = SDQ__PUSH_N(s->ctx, float, all);
    size_t i;
    memset(&in, 0, sizeof in);
    if (!times) return 1;
    for (i = 0; i < all; i++) times[i] = info->timestep;
    in.sample = (sdq_tensor *)(uintptr_t)info->input;
    in.context = (sdq_tensor *)(uintptr_t)info->context;
    in.timesteps = times;
    in.guidance = info->guidance;
    y = sdq_unet_forward(s->ctx, s->p->unet_int8, &in, SDQ_INT8);
    if (!y) return 1;
    s->mse[info->i] += (double)s->ctx->k->sqdist(sdq_f32(y), sdq_f32(info->raw), n) / (double)n;
    s->time[info->i] = info->timestep;
    s->count = info->count;
    sdq_arena_release(s->ctx, mark);
    return 0;
}

/* Prompt i with the settings of the search. */
static sdq_txt2img_desc sdq__se_desc(const sdq__search *s, size_t i) {
    sdq_txt2img_desc d = *s->desc;
    d.prompt = s->prompts[i];
    d.seed = s->desc->seed + i;
    d.count = 1;
    return d;
}

/* Median PSNR of the prompts' pictures under a list of float evaluations. */
static sdq_status sdq__se_psnr(const sdq__search *s, const unsigned char *is_float,
                               double *median) {
    double *psnr = SDQ__NEW_N(s->ctx, double, s->n);
    sdq_status st = s->ctx->status;
    size_t i;
    for (i = 0; i < s->n && st == SDQ_OK; i++) {
        sdq_txt2img_desc d = sdq__se_desc(s, i);
        sdq_image img;
        d.precision = SDQ_PRECISION_LIST;
        d.is_float = is_float;
        st = sdq_txt2img(s->ctx, s->p, &d, &img);
        if (st != SDQ_OK) break;
        psnr[i] = sdq_psnr(img.px, s->ref[i].px, img.w * img.h * img.c);
        sdq_image_free(s->ctx, &img);
    }
    if (st == SDQ_OK) st = sdq_percentile(s->ctx, psnr, s->n, 50.0, median);
    sdq__free(s->ctx, psnr);
    return st;
}

/* The float pictures, and the errors on the way to them. */
static sdq_status sdq__se_reference(sdq__search *s, size_t *done) {
    size_t i;
    for (i = 0; i < s->n; i++, *done = i) {
        sdq_txt2img_desc d = sdq__se_desc(s, i);
        d.precision = SDQ_PRECISION_FLOAT;
        d.step = sdq__se_measure;
        d.progress = NULL;
        d.user = s;
        SDQ__TRY(sdq_txt2img(s->ctx, s->p, &d, &s->ref[i]));
    }
    return SDQ_OK;
}

static double sdq__se_sigma(const sdq_scheduler *s, float t) {
    const size_t last = sdq_scheduler_get_desc(s)->train_steps - 1;
    const double i = (double)t < 0.0 ? 0.0 : (double)t;
    const double a = (double)sdq_scheduler_alphas_cumprod(s)[sdq__u_min((size_t)i, last)];
    return sqrt((1.0 - a) / a);
}

/* Order of the evaluations, most harmful first. */
static void sdq__se_rank(const sdq__search *s, const sdq_scheduler *sch, int power,
                         size_t *order) {
    double score[1001];
    size_t i, j;
    for (i = 0; i < s->count; i++) {
        const double next = i + 1 < s->count ? sdq__se_sigma(sch, s->time[i + 1]) : 0.0;
        const double step = fabs(sdq__se_sigma(sch, s->time[i]) - next);
        score[i] = s->mse[i] * (power == 0 ? 1.0 : power == 1 ? step : step * step);
        order[i] = i;
    }
    for (i = 1; i < s->count; i++)
        for (j = i; j > 0 && score[order[j]] > score[order[j - 1]]; j--) {
            const size_t o = order[j];
            order[j] = order[j - 1];
            order[j - 1] = o;
        }
}

static void sdq__se_take(unsigned char *is_float, const size_t *order, size_t count, size_t take) {
    size_t i;
    memset(is_float, 0, count);
    for (i = 0; i < take; i++) is_float[order[i]] = 1;
}

/* The fewest of one order that reach the target, at most `most`; `most` if it is out of reach. */
static sdq_status sdq__se_bisect(const sdq__search *s, const size_t *order, size_t most,
                                 unsigned char *is_float, size_t *count, double *psnr) {
    size_t lo = s->target > 0.0 ? 0 : most, hi = most;
    *count = most;
    sdq__se_take(is_float, order, s->count, most);
    SDQ__TRY(sdq__se_psnr(s, is_float, psnr));
    if (*psnr < s->target) return SDQ_OK;
    while (lo < hi) {
        const size_t mid = (lo + hi) / 2;
        double reached;
        sdq__se_take(is_float, order, s->count, mid);
        SDQ__TRY(sdq__se_psnr(s, is_float, &reached));
        if (reached >= s->target) *psnr = reached, hi = mid;
        else lo = mid + 1;
    }
    *count = hi;
    sdq__se_take(is_float, order, s->count, hi);
    return SDQ_OK;
}

/* The best of all rankings: fewest evaluations if the target is reached, else the highest PSNR. */
static sdq_status sdq__se_best(const sdq__search *s, const sdq_scheduler *sch, size_t most,
                               unsigned char *is_float, double *psnr) {
    size_t order[1001], best = 0, count;
    unsigned char list[1001];
    double reached;
    int power;
    for (power = 0; power < 3; power++) {
        sdq__se_rank(s, sch, power, order);
        SDQ__TRY(sdq__se_bisect(s, order, most, list, &count, &reached));
        if (power > 0 && (count > best || (count == best && reached <= *psnr))) continue;
        memcpy(is_float, list, s->count);
        *psnr = reached;
        best = count;
        if (reached >= s->target && s->target > 0.0) most = count;
    }
    return SDQ_OK;
}

SDQ_API sdq_status sdq_schedule_search(sdq_ctx *ctx, const sdq_pipeline *p,
                                       const char *const *prompts, size_t n,
                                       const sdq_txt2img_desc *desc, double target_psnr,
                                       size_t max_float, sdq_policy *policy, double *errors,
                                       double *reached) {
    sdq__search *s = SDQ__NEW(ctx, sdq__search);
    sdq_image *ref = SDQ__NEW_N(ctx, sdq_image, n);
    sdq_scheduler *sch = NULL;
    sdq_scheduler_desc sd;
    size_t i, done = 0;
    double psnr = 0.0;
    sdq_status st = ctx->status;
    memset(policy, 0, sizeof *policy);
    if (!p->unet || !p->unet_int8 || n == 0)
        st = sdq__fail(ctx, SDQ_ERR_ARGUMENT,
                       "schedule: needs prompts and both the float and the int8 UNet");
    if (st != SDQ_OK) goto done;
    s->ctx = ctx;
    s->p = p;
    s->prompts = prompts;
    s->n = n;
    s->desc = desc;
    s->ref = ref;
    s->target = target_psnr;
    SDQ__TRY_DONE(sdq__se_reference(s, &done));
    SDQ__TRY_DONE(sdq_pipeline_scheduler(ctx, p, desc, &sd));
    SDQ__TRY_DONE(sdq_scheduler_create(ctx, &sd, &sch));
    policy->scheduler = sdq_scheduler_get_desc(sch)->kind;
    policy->steps = desc->steps ? desc->steps : 50;
    policy->guidance = desc->guidance == 0.0f ? 7.5f : desc->guidance;
    policy->count = s->count;
    for (i = 0; i < s->count; i++) {
        policy->timestep[i] = s->time[i];
        if (errors) errors[i] = s->mse[i] / (double)n;
    }
    st = sdq__se_best(s, sch, max_float && max_float < s->count ? max_float : s->count,
                      policy->is_float, &psnr);
    if (reached) *reached = psnr;
done:
    for (i = 0; i < done; i++) sdq_image_free(ctx, &ref[i]);
    if (sch) sdq_scheduler_free(ctx, sch);
    sdq__free(ctx, ref);
    sdq__free(ctx, s);
    return st;
}

/* ===========================================================================
 * >>impl-end
 * ======================================================================== */
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
#endif /* SDQ_IMPLEMENTATION_ONCE */
#endif /* SDQ_IMPLEMENTATION */

#else /* SDQ__KERNEL_PASS */
/* ===========================================================================
 * >>kernel-text   the kernels, written once and compiled once per tier
 *
 * Above, >>kernel-list includes this file again for each tier, with SDQ__SUFFIX, SDQ__TARGET and
 * SDQ__TIER set. The text has two halves:
 *   vocabulary   what a tier is: one type of 16 floats and some 35 words on it. The first body
 *                of each word is plain C and defines it; the others give the same bits.
 *   kernels      written once, in the vocabulary, for all tiers - the GEMM tiles, too.
 * Because a kernel is the same sequence of IEEE operations on every tier, no result depends on
 * the processor. Of a NaN only the fact is promised, not sign and payload: x86 passes on the
 * first of two NaN operands, and a compiler may swap the operands of + and *.
 *
 * All loads and stores may be unaligned; their last argument n tells how many lanes exist: 16 or
 * more for all. Rounding is to nearest even, the processor's default; subnormals are kept.
 * One compiler option breaks the promise and cannot be detected or overruled from here: clang's
 * -ffp-contract=fast (its code generator then fuses any product with any sum; clang 14).
 * ======================================================================== */

#define SDQ__CAT3_(a, b, c) a##b##c
#define SDQ__CAT3(a, b, c) SDQ__CAT3_(a, b, c)
#define SDQ__N(word) SDQ__CAT3(sdq__v_##word, _, SDQ__SUFFIX)       /* a word or helper */
#define SDQ__K(kernel) SDQ__CAT3(sdq__k_##kernel, _, SDQ__SUFFIX)   /* a kernel of the list */
#define SDQ__V SDQ__N(float)            /* 16 floats */
#define SDQ__I SDQ__N(int)              /* 16 int32 */
#define SDQ__QA SDQ__N(group_of_a)      /* 4 bytes of a row, in the form dot wants them */
#define SDQ__QB SDQ__N(group_of_b)      /* 16 columns of 4 bytes */
#define SDQ__KERNEL SDQ__TARGET static
#if defined(__GNUC__)
#if SDQ__TIER == 1                      /* loops: inlining is left to the compiler */
#define SDQ__WORD static inline
#else
#define SDQ__WORD SDQ__TARGET static inline __attribute__((always_inline))
#endif
#define SDQ__ALIGNED __attribute__((aligned(64)))
#pragma GCC diagnostic push
#if !defined(__clang__)                 /* gcc PR105593: "undefined" operands of intrinsics */
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wsign-conversion"      /* intrinsics that are macros at -O0 */
#endif
#else
#define SDQ__WORD SDQ__TARGET static inline
#define SDQ__ALIGNED
#endif

/* ---- vocabulary: the definition ---- */
#if SDQ__TIER == 1

typedef struct SDQ__V { float f[16]; } SDQ__V;

/* Each lane l of r is set to an expression of l. */
#define SDQ__LANES(expr) SDQ__V r; size_t l; for (l = 0; l < 16; l++) r.f[l] = (expr); return r

/* A missing lane (l >= n) is loaded as +0 and not stored. */
SDQ__WORD SDQ__V SDQ__N(load)(const float *p, size_t n) { SDQ__LANES(l < n ? p[l] : 0.0f); }
SDQ__WORD void SDQ__N(store)(float *p, SDQ__V v, size_t n) {
    size_t l;
    for (l = 0; l < 16 && l < n; l++) p[l] = v.f[l];
}
SDQ__WORD SDQ__V SDQ__N(set1)(float x) { SDQ__LANES(x); }
SDQ__WORD SDQ__V SDQ__N(add)(SDQ__V a, SDQ__V b) { SDQ__LANES(a.f[l] + b.f[l]); }
SDQ__WORD SDQ__V SDQ__N(sub)(SDQ__V a, SDQ__V b) { SDQ__LANES(a.f[l] - b.f[l]); }
SDQ__WORD SDQ__V SDQ__N(mul)(SDQ__V a, SDQ__V b) { SDQ__LANES(a.f[l] * b.f[l]); }
SDQ__WORD SDQ__V SDQ__N(div)(SDQ__V a, SDQ__V b) { SDQ__LANES(a.f[l] / b.f[l]); }
SDQ__WORD SDQ__V SDQ__N(fma)(SDQ__V a, SDQ__V b, SDQ__V c) {
    SDQ__LANES(fmaf(a.f[l], b.f[l], c.f[l]));
}
/* b when either is NaN or both are zero: what the SSE instruction does. */
SDQ__WORD SDQ__V SDQ__N(min)(SDQ__V a, SDQ__V b) { SDQ__LANES(a.f[l] < b.f[l] ? a.f[l] : b.f[l]); }
SDQ__WORD SDQ__V SDQ__N(max)(SDQ__V a, SDQ__V b) { SDQ__LANES(a.f[l] > b.f[l] ? a.f[l] : b.f[l]); }
SDQ__WORD SDQ__V SDQ__N(sqrt)(SDQ__V a) { SDQ__LANES(sqrtf(a.f[l])); }
SDQ__WORD SDQ__V SDQ__N(abs)(SDQ__V a) { SDQ__LANES(fabsf(a.f[l])); }
SDQ__WORD SDQ__V SDQ__N(rint)(SDQ__V a) { SDQ__LANES(nearbyintf(a.f[l])); }     /* half to even */
/* a < b ? x : y */
SDQ__WORD SDQ__V SDQ__N(if_less)(SDQ__V a, SDQ__V b, SDQ__V x, SDQ__V y) {
    SDQ__LANES(a.f[l] < b.f[l] ? x.f[l] : y.f[l]);
}
/* +0 in the place of NaN */
SDQ__WORD SDQ__V SDQ__N(nan_to_0)(SDQ__V a) { SDQ__LANES(a.f[l] == a.f[l] ? a.f[l] : 0.0f); }
/* the first n lanes of v, the others of w */
SDQ__WORD SDQ__V SDQ__N(first_n)(SDQ__V v, size_t n, SDQ__V w) {
    SDQ__LANES(l < n ? v.f[l] : w.f[l]);
}
/* Lanes n..2n-1 come down to 0..n-1 (n: 8, 4, 2, 1); the others are not defined. */
SDQ__WORD SDQ__V SDQ__N(down)(SDQ__V v, int n) {
    SDQ__LANES(l < (size_t)n ? v.f[l + (size_t)n] : v.f[l]);
}
SDQ__WORD float SDQ__N(lane0)(SDQ__V v) { return v.f[0]; }
/* p * 2^n with one rounding; n integral, |n| <= 200, 0.5 < p < 2. Adding 1.5 * 2^23 puts n into
 * the low bits, which cannot trap on NaN as a conversion does. Two factors, because 2^n alone
 * may be out of range; the first product is exact. */
SDQ__WORD float SDQ__N(two_to)(float n) {
    return sdq__u_float((sdq__u_bits(n + 12582912.0f) - 0x4b400000u + 127u) << 23);
}
/* q 2^n for t = n + 1.5 * 2^23: n is added to the exponent of q. Exact where q and the result are
 * normal numbers. */
SDQ__WORD SDQ__V SDQ__N(shift2)(SDQ__V q, SDQ__V t) {
    SDQ__LANES(sdq__u_float(sdq__u_bits(q.f[l]) + (sdq__u_bits(t.f[l]) << 23)));
}
SDQ__WORD SDQ__V SDQ__N(scale2)(SDQ__V p, SDQ__V n) {
    SDQ__LANES(p.f[l] * SDQ__N(two_to)(nearbyintf(n.f[l] * 0.5f))
               * SDQ__N(two_to)(n.f[l] - nearbyintf(n.f[l] * 0.5f)));
}
SDQ__WORD SDQ__V SDQ__N(load_u8)(const uint8_t *p, size_t n) {
    SDQ__LANES(l < n ? (float)p[l] : 0.0f);
}
SDQ__WORD SDQ__V SDQ__N(load_s8)(const int8_t *p, size_t n) {
    SDQ__LANES(l < n ? (float)p[l] : 0.0f);
}
/* The lanes hold integers that the type can hold. */
SDQ__WORD void SDQ__N(store_u8)(uint8_t *p, SDQ__V v, size_t n) {
    size_t l;
    for (l = 0; l < 16 && l < n; l++) p[l] = (uint8_t)v.f[l];
}
SDQ__WORD void SDQ__N(store_s8)(int8_t *p, SDQ__V v, size_t n) {
    size_t l;
    for (l = 0; l < 16 && l < n; l++) p[l] = (int8_t)v.f[l];
}
SDQ__WORD void SDQ__N(store_s16)(int16_t *p, SDQ__V v, size_t n) {
    size_t l;
    for (l = 0; l < 16 && l < n; l++) p[l] = (int16_t)v.f[l];
}
/* p[16][2] int16, p[16][4] bytes; no lane is negative. */
SDQ__WORD void SDQ__N(store_pairs)(char *p, SDQ__V a, SDQ__V b) {
    size_t l;
    for (l = 0; l < 16; l++) {
        const uint32_t u = (uint32_t)a.f[l] | (uint32_t)b.f[l] << 16;
        memcpy(p + 4 * l, &u, 4);
    }
}
SDQ__WORD void SDQ__N(store_quads)(char *p, SDQ__V a, SDQ__V b, SDQ__V c, SDQ__V d) {
    size_t l;
    for (l = 0; l < 16; l++) {
        const uint32_t u = (uint32_t)a.f[l] | (uint32_t)b.f[l] << 8 | (uint32_t)c.f[l] << 16
                         | (uint32_t)d.f[l] << 24;
        memcpy(p + 4 * l, &u, 4);
    }
}
/* A signaling NaN becomes quiet, as in the conversion instruction. */
SDQ__WORD float SDQ__N(quiet_f16)(uint16_t h) {
    const uint32_t u = sdq__u_bits(sdq__u_from_f16(h));
    return sdq__u_float((u & 0x7fffffffu) > 0x7f800000u ? u | 0x400000u : u);
}
SDQ__WORD SDQ__V SDQ__N(load_f16)(const uint16_t *p, size_t n) {
    SDQ__LANES(l < n ? SDQ__N(quiet_f16)(p[l]) : 0.0f);
}
SDQ__WORD SDQ__V SDQ__N(load_bf16)(const uint16_t *p, size_t n) {
    SDQ__LANES(l < n ? sdq__u_from_bf16(p[l]) : 0.0f);
}
#undef SDQ__LANES

/* ---- vocabulary: AVX2 and FMA ----
 * Two registers of 8 lanes. vfmadd 4 cycles latency, 2 per cycle; of 16 registers the fp32 tile
 * takes 12 (6 rows) + 2 of b + 1 of a, the int8 tile 8 (4 rows) + 4 of b + 2 of a. */
#elif SDQ__TIER == 2

#define SDQ__FTILE_ROWS 6       /* rows of gemm_f32 and of gemm_u8s8 at a time, */
#define SDQ__QTILE_ROWS 4
#define SDQ__TILE_VECS 1        /* and vectors of 16 columns */

typedef struct SDQ__V { __m256 a, b; } SDQ__V;              /* lanes 0-7, 8-15 */
typedef struct SDQ__I { __m256i a, b; } SDQ__I;
typedef struct SDQ__QA { __m256i even, odd; } SDQ__QA;      /* int16: a0 a2, a1 a3, repeated */
typedef struct SDQ__QB { SDQ__QA a, b; } SDQ__QB;

SDQ__WORD SDQ__V SDQ__N(pair)(__m256 a, __m256 b) { SDQ__V r; r.a = a; r.b = b; return r; }
/* All ones in the lanes below n of the half that starts at lane `from`. */
SDQ__WORD __m256i SDQ__N(mask)(size_t n, int from) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((n < 16 ? (int)n : 16) - from), lane);
}
SDQ__WORD SDQ__V SDQ__N(load)(const float *p, size_t n) {
    if (n >= 16) return SDQ__N(pair)(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
    return SDQ__N(pair)(_mm256_maskload_ps(p, SDQ__N(mask)(n, 0)),
                        _mm256_maskload_ps(p + (n > 8 ? 8 : 0), SDQ__N(mask)(n, 8)));
}
SDQ__WORD void SDQ__N(store)(float *p, SDQ__V v, size_t n) {
    if (n >= 16) {
        _mm256_storeu_ps(p, v.a);
        _mm256_storeu_ps(p + 8, v.b);
    } else {
        _mm256_maskstore_ps(p, SDQ__N(mask)(n, 0), v.a);
        if (n > 8) _mm256_maskstore_ps(p + 8, SDQ__N(mask)(n, 8), v.b);
    }
}
SDQ__WORD SDQ__V SDQ__N(set1)(float x) {
    return SDQ__N(pair)(_mm256_set1_ps(x), _mm256_set1_ps(x));
}
/* A word that applies one instruction to both halves. */
#define SDQ__BOTH(word, op) \
    SDQ__WORD SDQ__V SDQ__N(word)(SDQ__V x, SDQ__V y) { \
        return SDQ__N(pair)(op(x.a, y.a), op(x.b, y.b)); \
    }
SDQ__BOTH(add, _mm256_add_ps)
SDQ__BOTH(sub, _mm256_sub_ps)
SDQ__BOTH(mul, _mm256_mul_ps)
SDQ__BOTH(div, _mm256_div_ps)
SDQ__BOTH(min, _mm256_min_ps)
SDQ__BOTH(max, _mm256_max_ps)
#undef SDQ__BOTH
SDQ__WORD SDQ__V SDQ__N(fma)(SDQ__V x, SDQ__V y, SDQ__V z) {
    return SDQ__N(pair)(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
SDQ__WORD SDQ__V SDQ__N(sqrt)(SDQ__V x) {
    return SDQ__N(pair)(_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b));
}
SDQ__WORD SDQ__V SDQ__N(abs)(SDQ__V x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return SDQ__N(pair)(_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}
SDQ__WORD SDQ__V SDQ__N(rint)(SDQ__V x) {
    return SDQ__N(pair)(_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                        _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SDQ__WORD SDQ__V SDQ__N(if_less)(SDQ__V a, SDQ__V b, SDQ__V x, SDQ__V y) {
    return SDQ__N(pair)(_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
                        _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ)));
}
SDQ__WORD SDQ__V SDQ__N(nan_to_0)(SDQ__V x) {
    return SDQ__N(pair)(_mm256_and_ps(x.a, _mm256_cmp_ps(x.a, x.a, _CMP_ORD_Q)),
                        _mm256_and_ps(x.b, _mm256_cmp_ps(x.b, x.b, _CMP_ORD_Q)));
}
SDQ__WORD SDQ__V SDQ__N(first_n)(SDQ__V v, size_t n, SDQ__V w) {
    if (n >= 16) return v;
    return SDQ__N(pair)(
        _mm256_blendv_ps(w.a, v.a, _mm256_castsi256_ps(SDQ__N(mask)(n, 0))),
        _mm256_blendv_ps(w.b, v.b, _mm256_castsi256_ps(SDQ__N(mask)(n, 8))));
}
SDQ__WORD SDQ__V SDQ__N(down)(SDQ__V v, int n) {
    switch (n) {
    case 8: return SDQ__N(pair)(v.b, v.b);
    case 4: return SDQ__N(pair)(_mm256_permute2f128_ps(v.a, v.a, 1), v.b);
    case 2: return SDQ__N(pair)(_mm256_permute_ps(v.a, 0x4e), v.b);
    default: return SDQ__N(pair)(_mm256_permute_ps(v.a, 0xb1), v.b);
    }
}
SDQ__WORD float SDQ__N(lane0)(SDQ__V v) { return _mm256_cvtss_f32(v.a); }
SDQ__WORD __m256 SDQ__N(two_to)(__m256 n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
SDQ__WORD __m256 SDQ__N(shift2_of)(__m256 q, __m256 t) {
    const __m256i e = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(q), e));
}
SDQ__WORD SDQ__V SDQ__N(shift2)(SDQ__V q, SDQ__V t) {
    return SDQ__N(pair)(SDQ__N(shift2_of)(q.a, t.a), SDQ__N(shift2_of)(q.b, t.b));
}
SDQ__WORD SDQ__V SDQ__N(scale2)(SDQ__V p, SDQ__V n) {
    const SDQ__V h = SDQ__N(rint)(SDQ__N(mul)(n, SDQ__N(set1)(0.5f))), g = SDQ__N(sub)(n, h);
    const SDQ__V x = SDQ__N(pair)(SDQ__N(two_to)(h.a), SDQ__N(two_to)(h.b));
    const SDQ__V y = SDQ__N(pair)(SDQ__N(two_to)(g.a), SDQ__N(two_to)(g.b));
    return SDQ__N(mul)(SDQ__N(mul)(p, x), y);
}
SDQ__WORD SDQ__V SDQ__N(load_u8)(const uint8_t *p, size_t n) {
    __m128i q = _mm_setzero_si128();
    if (n >= 16) q = _mm_loadu_si128((const __m128i *)(const void *)p);
    else memcpy(&q, p, n);
    return SDQ__N(pair)(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q)),
                        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(q, 8))));
}
SDQ__WORD SDQ__V SDQ__N(load_s8)(const int8_t *p, size_t n) {
    __m128i q = _mm_setzero_si128();
    if (n >= 16) q = _mm_loadu_si128((const __m128i *)(const void *)p);
    else memcpy(&q, p, n);
    return SDQ__N(pair)(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)),
                        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8))));
}
/* The 16 lanes as int16, in order. */
SDQ__WORD __m256i SDQ__N(int16)(SDQ__V v) {
    const __m256i x = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
    return _mm256_permute4x64_epi64(x, 0xd8);
}
SDQ__WORD void SDQ__N(store_bytes)(void *p, __m128i q, size_t n) {
    if (n >= 16) _mm_storeu_si128((__m128i *)p, q);
    else memcpy(p, &q, n);
}
SDQ__WORD void SDQ__N(store_u8)(uint8_t *p, SDQ__V v, size_t n) {
    const __m256i x = SDQ__N(int16)(v);
    const __m128i q = _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    SDQ__N(store_bytes)(p, q, n);
}
SDQ__WORD void SDQ__N(store_s8)(int8_t *p, SDQ__V v, size_t n) {
    const __m256i x = SDQ__N(int16)(v);
    const __m128i q = _mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    SDQ__N(store_bytes)(p, q, n);
}
SDQ__WORD void SDQ__N(store_s16)(int16_t *p, SDQ__V v, size_t n) {
    const __m256i x = SDQ__N(int16)(v);
    if (n >= 16) _mm256_storeu_si256((__m256i *)(void *)p, x);
    else memcpy(p, &x, 2 * n);
}
/* a | b << shift, as integers */
SDQ__WORD __m256i SDQ__N(beside)(__m256i a, __m256 b, int shift) {
    return _mm256_or_si256(a, _mm256_slli_epi32(_mm256_cvtps_epi32(b), shift));
}
SDQ__WORD void SDQ__N(store_pairs)(char *p, SDQ__V a, SDQ__V b) {
    const __m256i lo = SDQ__N(beside)(_mm256_cvtps_epi32(a.a), b.a, 16);
    const __m256i hi = SDQ__N(beside)(_mm256_cvtps_epi32(a.b), b.b, 16);
    _mm256_storeu_si256((__m256i *)(void *)p, lo);
    _mm256_storeu_si256((__m256i *)(void *)(p + 32), hi);
}
SDQ__WORD void SDQ__N(store_quads)(char *p, SDQ__V a, SDQ__V b, SDQ__V c, SDQ__V d) {
    __m256i lo = SDQ__N(beside)(_mm256_cvtps_epi32(a.a), b.a, 8);
    __m256i hi = SDQ__N(beside)(_mm256_cvtps_epi32(a.b), b.b, 8);
    lo = SDQ__N(beside)(SDQ__N(beside)(lo, c.a, 16), d.a, 24);
    hi = SDQ__N(beside)(SDQ__N(beside)(hi, c.b, 16), d.b, 24);
    _mm256_storeu_si256((__m256i *)(void *)p, lo);
    _mm256_storeu_si256((__m256i *)(void *)(p + 32), hi);
}
/* Exponent and mantissa, moved 13 bits up, are the number times 2^-112 (normal), too small by
 * the implicit one (subnormal: made from the integer instead) or inf/NaN (exponent all ones). */
SDQ__WORD __m256 SDQ__N(from_f16)(__m128i h) {
    const __m256i u = _mm256_cvtepu16_epi32(h);
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x8000)), 16);
    const __m256i em = _mm256_and_si256(u, _mm256_set1_epi32(0x7fff));
    const __m256i up = _mm256_slli_epi32(em, 13);
    const __m256i normal = _mm256_add_epi32(up, _mm256_set1_epi32(112 << 23));
    const __m256i sub = _mm256_castps_si256(
        _mm256_mul_ps(_mm256_cvtepi32_ps(em), _mm256_set1_ps(1.0f / 16777216.0f)));
    const __m256i quiet = _mm256_and_si256(
        _mm256_cmpgt_epi32(em, _mm256_set1_epi32(0x7c00)), _mm256_set1_epi32(0x400000));
    const __m256i inf = _mm256_or_si256(_mm256_or_si256(up, _mm256_set1_epi32(0x7f800000)), quiet);
    __m256i r = _mm256_blendv_epi8(normal, sub, _mm256_cmpgt_epi32(_mm256_set1_epi32(0x400), em));
    r = _mm256_blendv_epi8(r, inf, _mm256_cmpgt_epi32(em, _mm256_set1_epi32(0x7bff)));
    return _mm256_castsi256_ps(_mm256_or_si256(r, sign));
}
SDQ__WORD __m256i SDQ__N(load_u16)(const uint16_t *p, size_t n) {
    __m256i h = _mm256_setzero_si256();
    if (n >= 16) return _mm256_loadu_si256((const __m256i *)(const void *)p);
    memcpy(&h, p, 2 * n);
    return h;
}
SDQ__WORD SDQ__V SDQ__N(load_f16)(const uint16_t *p, size_t n) {
    const __m256i h = SDQ__N(load_u16)(p, n);
    return SDQ__N(pair)(SDQ__N(from_f16)(_mm256_castsi256_si128(h)),
                        SDQ__N(from_f16)(_mm256_extracti128_si256(h, 1)));
}
SDQ__WORD __m256 SDQ__N(from_bf16)(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
SDQ__WORD SDQ__V SDQ__N(load_bf16)(const uint16_t *p, size_t n) {
    const __m256i h = SDQ__N(load_u16)(p, n);
    return SDQ__N(pair)(SDQ__N(from_bf16)(_mm256_castsi256_si128(h)),
                        SDQ__N(from_bf16)(_mm256_extracti128_si256(h, 1)));
}

/* Integer products: dot adds a[0] b[4l] + .. + a[3] b[4l + 3] to lane l, exactly, or of int16
 * a[0] b[2l] + a[1] b[2l + 1]; kind tells which bytes are signed, and is a constant at every use.
 * vpmaddwd of bytes widened to int16 makes a0 b0 + a2 b2 and a1 b1 + a3 b3; 2 * 255 * 128 is far
 * from overflow. (vpmaddubsw would need no widening, but its int16 sums saturate.) */
SDQ__WORD SDQ__I SDQ__N(int0)(void) {
    SDQ__I r;
    r.a = r.b = _mm256_setzero_si256();
    return r;
}
/* even and odd bytes of groups as int16; int16 themselves stay. */
SDQ__WORD SDQ__QA SDQ__N(group)(__m256i x, sdq__group kind, sdq__group signed_kind) {
    SDQ__QA r;
    r.even = r.odd = x;
    if (kind == SDQ__S16) return r;
    r.even = kind == signed_kind ? _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)
                                 : _mm256_and_si256(x, _mm256_set1_epi32(0x00ff00ff));
    r.odd = kind == signed_kind ? _mm256_srai_epi16(x, 8) : _mm256_srli_epi16(x, 8);
    return r;
}
SDQ__WORD SDQ__QA SDQ__N(load_a)(const uint8_t *p, sdq__group kind) {
    int32_t q;
    memcpy(&q, p, 4);
    return SDQ__N(group)(_mm256_set1_epi32(q), kind, SDQ__S8U8);
}
SDQ__WORD SDQ__QB SDQ__N(load_b)(const int8_t *p, sdq__group kind) {
    const __m256i *from = (const __m256i *)(const void *)p;
    SDQ__QB r;
    r.a = SDQ__N(group)(_mm256_loadu_si256(from), kind, SDQ__U8S8);
    r.b = SDQ__N(group)(_mm256_loadu_si256(from + 1), kind, SDQ__U8S8);
    return r;
}
SDQ__WORD SDQ__I SDQ__N(dot)(SDQ__I acc, SDQ__QA a, SDQ__QB b, sdq__group kind) {
    acc.a = _mm256_add_epi32(acc.a, _mm256_madd_epi16(a.even, b.a.even));
    acc.b = _mm256_add_epi32(acc.b, _mm256_madd_epi16(a.even, b.b.even));
    if (kind == SDQ__S16) return acc;
    acc.a = _mm256_add_epi32(acc.a, _mm256_madd_epi16(a.odd, b.a.odd));
    acc.b = _mm256_add_epi32(acc.b, _mm256_madd_epi16(a.odd, b.b.odd));
    return acc;
}
SDQ__WORD SDQ__I SDQ__N(int_load)(const int32_t *p) {
    SDQ__I r;
    r.a = _mm256_loadu_si256((const __m256i *)(const void *)p);
    r.b = _mm256_loadu_si256((const __m256i *)(const void *)(p + 8));
    return r;
}
SDQ__WORD SDQ__V SDQ__N(to_float)(SDQ__I v) {
    return SDQ__N(pair)(_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b));
}
/* (float)(acc - z * w) */
SDQ__WORD SDQ__V SDQ__N(unbias)(SDQ__I acc, int32_t z, SDQ__I x) {
    const __m256i zv = _mm256_set1_epi32(z);
    const __m256i a = _mm256_sub_epi32(acc.a, _mm256_mullo_epi32(zv, x.a));
    const __m256i b = _mm256_sub_epi32(acc.b, _mm256_mullo_epi32(zv, x.b));
    return SDQ__N(pair)(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b));
}

/* ---- vocabulary: AVX-512 F, DQ, BW, VL, and VNNI for the int8 products ----
 * One register. Both tiles: 24 accumulators + 2 of b + 1 of a and what the compiler needs (of
 * 32); without VNNI the int8 tile has 4 of b and 2 of a. */
#else

#define SDQ__FTILE_ROWS 12
#define SDQ__QTILE_ROWS 12
#define SDQ__TILE_VECS 2

typedef __m512 SDQ__V;
typedef __m512i SDQ__I;

SDQ__WORD __mmask16 SDQ__N(mask)(size_t n) {
    return n < 16 ? (__mmask16)((1u << n) - 1u) : (__mmask16)0xffffu;
}
SDQ__WORD SDQ__V SDQ__N(load)(const float *p, size_t n) {
    if (n >= 16) return _mm512_loadu_ps(p);
    return _mm512_maskz_loadu_ps(SDQ__N(mask)(n), p);
}
SDQ__WORD void SDQ__N(store)(float *p, SDQ__V v, size_t n) {
    if (n >= 16) _mm512_storeu_ps(p, v);
    else _mm512_mask_storeu_ps(p, SDQ__N(mask)(n), v);
}
SDQ__WORD SDQ__V SDQ__N(set1)(float x) { return _mm512_set1_ps(x); }
SDQ__WORD SDQ__V SDQ__N(add)(SDQ__V a, SDQ__V b) { return _mm512_add_ps(a, b); }
SDQ__WORD SDQ__V SDQ__N(sub)(SDQ__V a, SDQ__V b) { return _mm512_sub_ps(a, b); }
SDQ__WORD SDQ__V SDQ__N(mul)(SDQ__V a, SDQ__V b) { return _mm512_mul_ps(a, b); }
SDQ__WORD SDQ__V SDQ__N(div)(SDQ__V a, SDQ__V b) { return _mm512_div_ps(a, b); }
SDQ__WORD SDQ__V SDQ__N(min)(SDQ__V a, SDQ__V b) { return _mm512_min_ps(a, b); }
SDQ__WORD SDQ__V SDQ__N(max)(SDQ__V a, SDQ__V b) { return _mm512_max_ps(a, b); }
SDQ__WORD SDQ__V SDQ__N(fma)(SDQ__V a, SDQ__V b, SDQ__V c) { return _mm512_fmadd_ps(a, b, c); }
SDQ__WORD SDQ__V SDQ__N(sqrt)(SDQ__V a) { return _mm512_sqrt_ps(a); }
SDQ__WORD SDQ__V SDQ__N(abs)(SDQ__V a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
SDQ__WORD SDQ__V SDQ__N(rint)(SDQ__V a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SDQ__WORD SDQ__V SDQ__N(if_less)(SDQ__V a, SDQ__V b, SDQ__V x, SDQ__V y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
SDQ__WORD SDQ__V SDQ__N(nan_to_0)(SDQ__V a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a);
}
SDQ__WORD SDQ__V SDQ__N(first_n)(SDQ__V v, size_t n, SDQ__V w) {
    return _mm512_mask_blend_ps(SDQ__N(mask)(n), w, v);
}
SDQ__WORD SDQ__V SDQ__N(down)(SDQ__V v, int n) {
    const __m512i x = _mm512_castps_si512(v);
    switch (n) {
    case 8: return _mm512_castsi512_ps(_mm512_alignr_epi32(x, x, 8));
    case 4: return _mm512_castsi512_ps(_mm512_alignr_epi32(x, x, 4));
    case 2: return _mm512_castsi512_ps(_mm512_alignr_epi32(x, x, 2));
    default: return _mm512_castsi512_ps(_mm512_alignr_epi32(x, x, 1));
    }
}
SDQ__WORD float SDQ__N(lane0)(SDQ__V v) { return _mm512_cvtss_f32(v); }
SDQ__WORD SDQ__V SDQ__N(shift2)(SDQ__V q, SDQ__V t) {
    const __m512i e = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(q), e));
}
SDQ__WORD SDQ__V SDQ__N(scale2)(SDQ__V p, SDQ__V n) { return _mm512_scalef_ps(p, n); }
SDQ__WORD SDQ__V SDQ__N(load_u8)(const uint8_t *p, size_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(SDQ__N(mask)(n), p)));
}
SDQ__WORD SDQ__V SDQ__N(load_s8)(const int8_t *p, size_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(SDQ__N(mask)(n), p)));
}
SDQ__WORD void SDQ__N(store_bytes)(void *p, __m128i q, size_t n) {
    if (n >= 16) _mm_storeu_si128((__m128i *)p, q);
    else _mm_mask_storeu_epi8(p, SDQ__N(mask)(n), q);
}
SDQ__WORD void SDQ__N(store_u8)(uint8_t *p, SDQ__V v, size_t n) {
    SDQ__N(store_bytes)(p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)), n);
}
SDQ__WORD void SDQ__N(store_s8)(int8_t *p, SDQ__V v, size_t n) {
    SDQ__N(store_bytes)(p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)), n);
}
SDQ__WORD void SDQ__N(store_s16)(int16_t *p, SDQ__V v, size_t n) {
    const __m256i q = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v));
    if (n >= 16) _mm256_storeu_si256((__m256i *)(void *)p, q);
    else _mm256_mask_storeu_epi16(p, SDQ__N(mask)(n), q);
}
/* a | b << shift, as integers */
SDQ__WORD __m512i SDQ__N(beside)(__m512i a, SDQ__V b, unsigned shift) {
    return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_cvtps_epi32(b), shift));
}
SDQ__WORD void SDQ__N(store_pairs)(char *p, SDQ__V a, SDQ__V b) {
    _mm512_storeu_si512(p, SDQ__N(beside)(_mm512_cvtps_epi32(a), b, 16));
}
SDQ__WORD void SDQ__N(store_quads)(char *p, SDQ__V a, SDQ__V b, SDQ__V c, SDQ__V d) {
    __m512i q = SDQ__N(beside)(_mm512_cvtps_epi32(a), b, 8);
    q = SDQ__N(beside)(SDQ__N(beside)(q, c, 16), d, 24);
    _mm512_storeu_si512(p, q);
}
SDQ__WORD SDQ__V SDQ__N(load_f16)(const uint16_t *p, size_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(SDQ__N(mask)(n), p));
}
SDQ__WORD SDQ__V SDQ__N(load_bf16)(const uint16_t *p, size_t n) {
    const __m512i u = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(SDQ__N(mask)(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}

SDQ__WORD SDQ__I SDQ__N(int0)(void) { return _mm512_setzero_si512(); }
SDQ__WORD __m512i SDQ__N(set4)(const uint8_t *p) {
    int32_t q;
    memcpy(&q, p, 4);
    return _mm512_set1_epi32(q);
}
#if SDQ__TIER == 4      /* vpdpbusd: u8 * s8, four products added to an int32, no saturation */
typedef __m512i SDQ__QA;
typedef __m512i SDQ__QB;
SDQ__WORD SDQ__QA SDQ__N(load_a)(const uint8_t *p, sdq__group kind) {
    (void)kind;
    return SDQ__N(set4)(p);
}
SDQ__WORD SDQ__QB SDQ__N(load_b)(const int8_t *p, sdq__group kind) {
    (void)kind;
    return _mm512_loadu_si512(p);
}
SDQ__WORD SDQ__I SDQ__N(dot)(SDQ__I acc, SDQ__QA a, SDQ__QB b, sdq__group kind) {
    if (kind == SDQ__S16) return _mm512_dpwssd_epi32(acc, a, b);
    return kind == SDQ__U8S8 ? _mm512_dpbusd_epi32(acc, a, b) : _mm512_dpbusd_epi32(acc, b, a);
}
#else                   /* vpmaddwd, as in the AVX2 tier */
typedef struct SDQ__QA { __m512i even, odd; } SDQ__QA;
typedef SDQ__QA SDQ__QB;
SDQ__WORD SDQ__QA SDQ__N(group)(__m512i x, sdq__group kind, sdq__group signed_kind) {
    SDQ__QA r;
    r.even = r.odd = x;
    if (kind == SDQ__S16) return r;
    r.even = kind == signed_kind ? _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8)
                                 : _mm512_and_si512(x, _mm512_set1_epi32(0x00ff00ff));
    r.odd = kind == signed_kind ? _mm512_srai_epi16(x, 8) : _mm512_srli_epi16(x, 8);
    return r;
}
SDQ__WORD SDQ__QA SDQ__N(load_a)(const uint8_t *p, sdq__group kind) {
    return SDQ__N(group)(SDQ__N(set4)(p), kind, SDQ__S8U8);
}
SDQ__WORD SDQ__QB SDQ__N(load_b)(const int8_t *p, sdq__group kind) {
    return SDQ__N(group)(_mm512_loadu_si512(p), kind, SDQ__U8S8);
}
SDQ__WORD SDQ__I SDQ__N(dot)(SDQ__I acc, SDQ__QA a, SDQ__QB b, sdq__group kind) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a.even, b.even));
    if (kind == SDQ__S16) return acc;
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a.odd, b.odd));
}
#endif
SDQ__WORD SDQ__I SDQ__N(int_load)(const int32_t *p) { return _mm512_loadu_si512(p); }
SDQ__WORD SDQ__V SDQ__N(to_float)(SDQ__I v) { return _mm512_cvtepi32_ps(v); }
SDQ__WORD SDQ__V SDQ__N(unbias)(SDQ__I acc, int32_t z, SDQ__I w) {
    const __m512i zw = _mm512_mullo_epi32(_mm512_set1_epi32(z), w);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, zw));
}
#endif

/* ---- GEMM tiles: the definition ---- */
#if SDQ__TIER == 1

SDQ__KERNEL void SDQ__K(gemm_f32)(const sdq__ftile *t) {
    size_t i, j, tap, k;
    for (i = 0; i < t->mr; i++) {
        float *y = t->y + i * t->ldy, c[SDQ__NR];
        const float *b = t->b;
        for (j = 0; j < SDQ__NR; j++) c[j] = t->more && j < t->nr ? y[j] : 0.0f;
        for (tap = 0; tap < t->taps; tap++)
            for (k = 0; k < t->kc; k++, b += SDQ__NR) {
                const float a = t->a[tap * t->mr + i][k * t->astep];
                for (j = 0; j < SDQ__NR; j++) c[j] = fmaf(a, b[j], c[j]);
            }
        for (j = 0; j < t->nr; j++) {
            if (t->bias) c[j] += t->bias[j];
            if (t->res) c[j] += t->res[i * t->ldr + j];
            y[j] = c[j];
        }
    }
}

/* acc[j] += the products of a group: four bytes of a row, or two int16. */
static void SDQ__N(quads)(int32_t *acc, const uint8_t *a, const int8_t *b, sdq__group kind) {
    size_t j;
    for (j = 0; j < 4 * SDQ__NR; j++) {
        const uint8_t x = a[j % 4];
        acc[j / 4] += kind == SDQ__U8S8 ? x * b[j] : (int8_t)x * (uint8_t)b[j];
    }
}
/* Columns that do not exist (nr..31) may hold anything: their sums wrap, as in the instructions. */
static void SDQ__N(pairs)(int32_t *acc, const uint8_t *a, const int8_t *b) {
    int16_t x[2], y[2 * SDQ__NR];
    size_t j;
    memcpy(x, a, sizeof x);
    memcpy(y, b, sizeof y);
    for (j = 0; j < 2 * SDQ__NR; j++)
        acc[j / 2] = (int32_t)((uint32_t)acc[j / 2] + (uint32_t)((int32_t)x[j % 2] * y[j]));
}
/* f[j] += the scaled integer sum of row i over segment g. */
static void SDQ__N(qrow)(const sdq__qtile *t, size_t g, size_t i, sdq__group kind, float *f) {
    int32_t acc[SDQ__NR];
    size_t n, j;
    memset(acc, 0, sizeof acc);
    for (n = g * t->seg; n < (g + 1) * t->seg; n++) {
        const uint8_t *a = t->a[n / t->quads * t->mr + i];
        const int8_t *b = t->b + n * 4 * SDQ__NR;
        if (!a) continue;
        a += n % t->quads * 4;
        if (kind == SDQ__S16) SDQ__N(pairs)(acc, a, b);
        else SDQ__N(quads)(acc, a, b, kind);
    }
    for (j = 0; j < SDQ__NR; j++) {
        if (t->wsum) acc[j] -= t->z[g * t->mr + i] * t->wsum[g * SDQ__NR + j];
        f[j] = fmaf(t->s[g * t->mr + i], (float)acc[j], f[j]);
    }
}
static void SDQ__N(qtile)(const sdq__qtile *t, sdq__group kind) {
    size_t g, i, j;
    for (i = 0; i < t->mr; i++) {
        float *y = t->y + t->line[i], f[SDQ__NR];
        memset(f, 0, sizeof f);
        for (g = 0; g < t->taps * t->quads / t->seg; g++) SDQ__N(qrow)(t, g, i, kind, f);
        for (j = 0; j < t->nr; j++) {
            f[j] = t->bias ? fmaf(f[j], t->sw[j], t->bias[j]) : f[j] * t->sw[j];
            if (t->res) f[j] += t->res[t->line[i] + j];
            y[j] = t->more ? f[j] + y[j] : f[j];
        }
    }
}
SDQ__KERNEL void SDQ__K(gemm_u8s8)(const sdq__qtile *t) { SDQ__N(qtile)(t, SDQ__U8S8); }
SDQ__KERNEL void SDQ__K(gemm_s8u8)(const sdq__qtile *t) { SDQ__N(qtile)(t, SDQ__S8U8); }
SDQ__KERNEL void SDQ__K(gemm_s16)(const sdq__qtile *t) { SDQ__N(qtile)(t, SDQ__S16); }

#else
/* ---- GEMM tiles: vectors ----
 * A tile keeps its sums in registers: f0..f11 for columns j..j+15 and g0..g11 for the next 16
 * (l0.., h0.. while they are integers), named and not an array, because gcc -O2 does not put
 * arrays of vectors into registers. SDQ__ROWS repeats a statement for the rows; `rows`, `wide` and
 * `full` are constants at every use, so the compiler drops what a smaller tile does not need:
 * tiles have 2, 4, 8 or all rows, of which n exist; one that does not is replaced by the first.
 * Every step of the end is one run through all rows, with a pointer that moves: conditions and
 * multiples of a line per row cost more than the step. */
#define SDQ__ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

/* The smallest tile that covers n rows. */
#define SDQ__PICK(tile, limit) \
    const int pair = SDQ__TILE_VECS == 2; \
    const int both = pair && t->nr - j > 16; \
    const int full = n == limit && t->nr - j >= (both ? 32 : 16); \
    if (full && both) tile(limit, pair, 1); \
    else if (full) tile(limit, 0, 1); \
    else if (pair && !both) tile(limit, 0, 0); \
    else if (limit > 2 && n <= 2) tile(2, pair, 0); \
    else if (limit > 4 && n <= 4) tile(4, pair, 0); \
    else if (limit > 8 && n <= 8) tile(8, pair, 0); \
    else tile(limit, pair, 0)

/* Of row r: add or store a line of 32 columns, of which nl, nh exist. */
#define SDQ__ADD_LINE(r, from) do { \
        f##r = SDQ__N(add)(f##r, SDQ__N(load)(from, nl)); \
        if (wide) g##r = SDQ__N(add)(g##r, SDQ__N(load)((from) + 16, nh)); \
    } while (0)
#define SDQ__STORE_LINE(r, to) do { \
        SDQ__N(store)(to, f##r, nl); \
        if (wide) SDQ__N(store)((to) + 16, g##r, nh); \
    } while (0)

/* Ask for the 128 bytes that are `ahead` bytes behind p; they need not exist. Panels come from
 * memory or a far cache in one stream; SDQ__AHEAD is as far as was best. */
#define SDQ__AHEAD 8192
SDQ__WORD void SDQ__N(fetch)(const void *p, size_t ahead) {
    const char *at = (const char *)((uintptr_t)p + ahead);
    _mm_prefetch(at, _MM_HINT_T0);
    _mm_prefetch((const char *)((uintptr_t)at + 64), _MM_HINT_T0);
}

/* Where a segment begins: segment g, quad q of the tap that a points to. */
typedef struct SDQ__N(segment) {
    const uint8_t *const *a;
    const int8_t *b;
    size_t g, q;
    int last;
} SDQ__N(segment);

/* One segment of rows i..i+n-1, columns j... Segments and taps are two cuts of one sequence of
 * quads: a run of quads ends where either does. From the first segment to the last the float sums
 * are in sum. */
SDQ__WORD void SDQ__N(qtile)(const sdq__qtile *t, const SDQ__N(segment) *s, size_t i, size_t j,
                             float *sum, sdq__group kind, size_t n, size_t rows, int wide,
                             int full) {
    const size_t nl = full ? 16 : t->nr - j, nh = full ? 16 : t->nr - j - 16;
    const int8_t *b = s->b + 4 * j;
    const uint8_t *const *a = s->a + i;
    size_t left, run, k, q = s->q;
#define SDQ__ROW(r) SDQ__I l##r = SDQ__N(int0)(), h##r = l##r; SDQ__V f##r, g##r;
    SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    for (left = t->seg; left > 0; left -= run, q = 0, a += t->mr) {
        run = sdq__u_min(left, t->quads - q);
        if (!*a) { b += run * 4 * SDQ__NR; continue; }
#define SDQ__ROW(r) const uint8_t *a##r = a[rows > r && n > r ? r : 0] + 4 * q;
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        for (k = 0; k < run; k++, b += 4 * SDQ__NR) {
            const SDQ__QB bl = SDQ__N(load_b)(b, kind);
            const SDQ__QB bh = wide ? SDQ__N(load_b)(b + 64, kind) : bl;
            SDQ__N(fetch)(b, SDQ__AHEAD);
#define SDQ__ROW(r) if (rows > r) { \
                const SDQ__QA x = SDQ__N(load_a)(a##r + 4 * k, kind); \
                l##r = SDQ__N(dot)(l##r, x, bl, kind); \
                if (wide) h##r = SDQ__N(dot)(h##r, x, bh, kind); \
            }
            SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        }
    }
    {   /* float sums (+)= scale (integer sums - zero point * sum of weights) */
        const size_t g = s->g, at = g * t->mr + i;
        const float *scale = t->s + at;
        const int32_t *z = t->wsum ? t->z + at : NULL, *w = z ? t->wsum + g * SDQ__NR + j : NULL;
        const SDQ__I none = SDQ__N(int0)(), wl = z ? SDQ__N(int_load)(w) : none;
        const SDQ__I wh = z && wide ? SDQ__N(int_load)(w + 16) : none;
#define SDQ__ROW(r) if (rows > r) { \
            const size_t row = n > r ? r : 0; \
            const SDQ__V x = SDQ__N(set1)(scale[row]); \
            float *to = sum + r * SDQ__NR; \
            f##r = z ? SDQ__N(unbias)(l##r, z[row], wl) : SDQ__N(to_float)(l##r); \
            f##r = g ? SDQ__N(fma)(x, f##r, SDQ__N(load)(to, 16)) : SDQ__N(mul)(x, f##r); \
            if (!s->last) SDQ__N(store)(to, f##r, 16); \
            if (wide) { \
                g##r = z ? SDQ__N(unbias)(h##r, z[row], wh) : SDQ__N(to_float)(h##r); \
                g##r = g ? SDQ__N(fma)(x, g##r, SDQ__N(load)(to + 16, 16)) : SDQ__N(mul)(x, g##r); \
                if (!s->last) SDQ__N(store)(to + 16, g##r, 16); \
            } \
        }
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    }
    if (!s->last) return;
    {
        const SDQ__V l = SDQ__N(load)(t->sw + j, nl);
        const SDQ__V h = wide ? SDQ__N(load)(t->sw + j + 16, nh) : l;
        if (t->bias) {
            const SDQ__V bl = SDQ__N(load)(t->bias + j, nl);
            const SDQ__V bh = wide ? SDQ__N(load)(t->bias + j + 16, nh) : bl;
#define SDQ__ROW(r) if (rows > r) { \
                f##r = SDQ__N(fma)(f##r, l, bl); \
                if (wide) g##r = SDQ__N(fma)(g##r, h, bh); \
            }
            SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        } else {
#define SDQ__ROW(r) if (rows > r) { \
                f##r = SDQ__N(mul)(f##r, l); \
                if (wide) g##r = SDQ__N(mul)(g##r, h); \
            }
            SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        }
    }
    {
        const size_t *line = t->line + i;
        float *y = t->y + j;
        if (t->res) {
            const float *res = t->res + j;
#define SDQ__ROW(r) if (rows > r && n > r) SDQ__ADD_LINE(r, res + line[r]);
            SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        }
        if (t->more) {
#define SDQ__ROW(r) if (rows > r && n > r) SDQ__ADD_LINE(r, y + line[r]);
            SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        }
#define SDQ__ROW(r) if (rows > r && n > r) SDQ__STORE_LINE(r, y + line[r]);
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    }
}

SDQ__WORD void SDQ__N(qtile_of)(const sdq__qtile *t, const SDQ__N(segment) *s, size_t i, size_t j,
                                float *sum, size_t n, sdq__group kind) {
    size_t r;
    for (r = 0; r < n && s->last; r++) SDQ__N(fetch)(t->y + t->line[i + r] + j, 0);
#define SDQ__QTILE(rows, wide, full) \
    SDQ__N(qtile)(t, s, i, j, sum, kind, full ? rows : n, rows, wide, full)
    SDQ__PICK(SDQ__QTILE, SDQ__QTILE_ROWS);
#undef SDQ__QTILE
}

SDQ__WORD void SDQ__N(qtiles)(const sdq__qtile *t, sdq__group kind) {
    SDQ__ALIGNED float sum[SDQ__MR][SDQ__NR];
    size_t left = t->taps * t->quads, i, j;
    SDQ__N(segment) s;
    s.a = t->a;
    s.b = t->b;
    s.q = 0;
    for (s.g = 0; left > 0; s.g++) {
        left -= t->seg;
        s.last = left == 0;
        for (j = 0; j < t->nr; j += 16 * SDQ__TILE_VECS)
            for (i = 0; i < t->mr; i += SDQ__QTILE_ROWS)
                SDQ__N(qtile_of)(t, &s, i, j, sum[i] + j, sdq__u_min(t->mr - i, SDQ__QTILE_ROWS),
                                 kind);
        s.b += t->seg * 4 * SDQ__NR;
        for (s.q += t->seg; s.q >= t->quads; s.q -= t->quads) s.a += t->mr;
    }
}
SDQ__KERNEL void SDQ__K(gemm_u8s8)(const sdq__qtile *t) { SDQ__N(qtiles)(t, SDQ__U8S8); }
SDQ__KERNEL void SDQ__K(gemm_s8u8)(const sdq__qtile *t) { SDQ__N(qtiles)(t, SDQ__S8U8); }
SDQ__KERNEL void SDQ__K(gemm_s16)(const sdq__qtile *t) { SDQ__N(qtiles)(t, SDQ__S16); }

/* The VNNI tier is the AVX-512 tier with other integer products: it ends here. */
#if SDQ__TIER < 4

SDQ__WORD void SDQ__N(ftile)(const sdq__ftile *t, size_t i, size_t j, size_t n, size_t rows,
                             int wide, int full) {
    const size_t astep = t->astep;
    const size_t nl = full ? 16 : t->nr - j, nh = full ? 16 : t->nr - j - 16;
    const float *b = t->b + j, *const *a = t->a + i;
    size_t tap, k, at;
#define SDQ__ROW(r) SDQ__V f##r = SDQ__N(set1)(0.0f), g##r = f##r;
    SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    if (t->more) {
        const float *from = t->y + i * t->ldy + j;
#define SDQ__ROW(r) if (rows > r && n > r) { \
            f##r = SDQ__N(load)(from, nl); \
            if (wide) g##r = SDQ__N(load)(from + 16, nh); \
            from += t->ldy; \
        }
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    }
    for (tap = 0; tap < t->taps; tap++, a += t->mr) {
#define SDQ__ROW(r) const float *a##r = a[rows > r && n > r ? r : 0];
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        for (k = t->kc, at = 0; k > 0; k--, at += astep, b += SDQ__NR) {
            const SDQ__V bl = SDQ__N(load)(b, 16), bh = wide ? SDQ__N(load)(b + 16, 16) : bl;
            SDQ__N(fetch)(b, SDQ__AHEAD);
#define SDQ__ROW(r) if (rows > r) { \
                const SDQ__V x = SDQ__N(set1)(a##r[at]); \
                f##r = SDQ__N(fma)(x, bl, f##r); \
                if (wide) g##r = SDQ__N(fma)(x, bh, g##r); \
            }
            SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
        }
    }
    if (t->bias) {
        const SDQ__V l = SDQ__N(load)(t->bias + j, nl);
        const SDQ__V h = wide ? SDQ__N(load)(t->bias + j + 16, nh) : l;
#define SDQ__ROW(r) if (rows > r) { \
            f##r = SDQ__N(add)(f##r, l); \
            if (wide) g##r = SDQ__N(add)(g##r, h); \
        }
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    }
    if (t->res) {
        const float *from = t->res + i * t->ldr + j;
#define SDQ__ROW(r) if (rows > r && n > r) { SDQ__ADD_LINE(r, from); from += t->ldr; }
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    }
    {
        float *to = t->y + i * t->ldy + j;
#define SDQ__ROW(r) if (rows > r && n > r) { SDQ__STORE_LINE(r, to); to += t->ldy; }
        SDQ__ROWS(SDQ__ROW)
#undef SDQ__ROW
    }
}
SDQ__KERNEL void SDQ__N(ftile_of)(const sdq__ftile *t, size_t i, size_t j, size_t n) {
#define SDQ__FTILE(rows, wide, full) SDQ__N(ftile)(t, i, j, full ? rows : n, rows, wide, full)
    SDQ__PICK(SDQ__FTILE, SDQ__FTILE_ROWS);
#undef SDQ__FTILE
}
SDQ__KERNEL void SDQ__K(gemm_f32)(const sdq__ftile *t) {
    size_t i, j;
    for (j = 0; j < t->nr; j += 16 * SDQ__TILE_VECS)
        for (i = 0; i < t->mr; i += SDQ__FTILE_ROWS)
            SDQ__N(ftile_of)(t, i, j, sdq__u_min(t->mr - i, SDQ__FTILE_ROWS));
}
#endif      /* tier < 4 */
#endif      /* tier > 1 */
#if SDQ__TIER < 4

/* ---- words made of words: trees, exp, the normal distribution ---- */

SDQ__WORD SDQ__V SDQ__N(neg)(SDQ__V a) { return SDQ__N(sub)(SDQ__N(set1)(0.0f), a); }
/* The sum, minimum, maximum of the lanes: l with l + 8, then + 4, + 2, + 1. */
SDQ__WORD float SDQ__N(sum)(SDQ__V v) {
    v = SDQ__N(add)(v, SDQ__N(down)(v, 8));
    v = SDQ__N(add)(v, SDQ__N(down)(v, 4));
    v = SDQ__N(add)(v, SDQ__N(down)(v, 2));
    return SDQ__N(lane0)(SDQ__N(add)(v, SDQ__N(down)(v, 1)));
}
SDQ__WORD float SDQ__N(lowest)(SDQ__V v) {
    v = SDQ__N(min)(v, SDQ__N(down)(v, 8));
    v = SDQ__N(min)(v, SDQ__N(down)(v, 4));
    v = SDQ__N(min)(v, SDQ__N(down)(v, 2));
    return SDQ__N(lane0)(SDQ__N(min)(v, SDQ__N(down)(v, 1)));
}
SDQ__WORD float SDQ__N(highest)(SDQ__V v) {
    v = SDQ__N(max)(v, SDQ__N(down)(v, 8));
    v = SDQ__N(max)(v, SDQ__N(down)(v, 4));
    v = SDQ__N(max)(v, SDQ__N(down)(v, 2));
    return SDQ__N(lane0)(SDQ__N(max)(v, SDQ__N(down)(v, 1)));
}
/* min(hi, max(lo, v)); NaN stays NaN. */
SDQ__WORD SDQ__V SDQ__N(clamp)(SDQ__V v, float lo, float hi) {
    return SDQ__N(min)(SDQ__N(set1)(hi), SDQ__N(max)(SDQ__N(set1)(lo), v));
}

/* exp(x) = 2^n exp(r), n = rint(x / ln 2), |r| <= ln(2) / 2 = 0.347. ln 2 is subtracted in two
 * parts (Cody and Waite 1980): the upper one has 15 bits, so n times it is exact.
 * exp(r) = 1 + r + r^2 q(r), q of degree 4 by minimax of the relative error: 3.1e-9.
 * exp(89) overflows to inf, exp(-104) rounds to 0, exp(0) is 1 exactly. Error: at most 1.01 ulp. */
SDQ__WORD SDQ__V SDQ__N(exp)(SDQ__V x) {
    const SDQ__V y = SDQ__N(clamp)(x, -104.0f, 89.0f);
    const SDQ__V n = SDQ__N(rint)(SDQ__N(mul)(y, SDQ__N(set1)(1.44269504f)));
    const SDQ__V h = SDQ__N(fma)(n, SDQ__N(set1)(-0.693145752f), y);
    const SDQ__V r = SDQ__N(fma)(n, SDQ__N(set1)(-1.42860677e-6f), h);
    SDQ__V q = SDQ__N(set1)(0.00138145394f);
    q = SDQ__N(fma)(q, r, SDQ__N(set1)(0.00836874545f));
    q = SDQ__N(fma)(q, r, SDQ__N(set1)(0.041668389f));
    q = SDQ__N(fma)(q, r, SDQ__N(set1)(0.166665211f));
    q = SDQ__N(fma)(q, r, SDQ__N(set1)(0.49999994f));
    q = SDQ__N(fma)(q, SDQ__N(mul)(r, r), r);
    return SDQ__N(scale2)(SDQ__N(add)(SDQ__N(set1)(1.0f), q), n);
}

/* x + 1.5 * 2^23, whose low bits are rint(x); *r receives x - rint(x). */
SDQ__WORD SDQ__V SDQ__N(split2)(SDQ__V x, SDQ__V *r) {
    const SDQ__V magic = SDQ__N(set1)(12582912.0f), t = SDQ__N(add)(x, magic);
    *r = SDQ__N(sub)(x, SDQ__N(sub)(t, magic));
    return t;
}
/* 2^x[0..3] for x <= 127, to 1.5e-7; 2^0 is 1 exactly, and what is below 2^-126 is between 0 and
 * that, up to -127 it is 0. 2^r, |r| <= 0.5, by minimax of the relative error. Of 12 operations 5
 * need the units that multiply. Each waits for the one before, 40 cycles in all: vectors one after
 * another fill a processor's queues before the next can begin, so four take every step together. */
#define SDQ__FOUR(v, step) \
    do { \
        { enum { v = 0 }; step; } { enum { v = 1 }; step; } \
        { enum { v = 2 }; step; } { enum { v = 3 }; step; } \
    } while (0)
SDQ__WORD void SDQ__N(exp2_four)(SDQ__V x[4]) {
    const SDQ__V least = SDQ__N(set1)(-127.0f), c5 = SDQ__N(set1)(0.00132647262f);
    const SDQ__V c4 = SDQ__N(set1)(0.00967151262f), c3 = SDQ__N(set1)(0.0555073375f);
    const SDQ__V c2 = SDQ__N(set1)(0.240222421f), c1 = SDQ__N(set1)(0.693146978f);
    const SDQ__V c0 = SDQ__N(set1)(1.0f);
    SDQ__V t[4], r[4];
    SDQ__FOUR(v, t[v] = SDQ__N(split2)(SDQ__N(max)(least, x[v]), &r[v]));
    SDQ__FOUR(v, x[v] = SDQ__N(fma)(c5, r[v], c4));
    SDQ__FOUR(v, x[v] = SDQ__N(fma)(x[v], r[v], c3));
    SDQ__FOUR(v, x[v] = SDQ__N(fma)(x[v], r[v], c2));
    SDQ__FOUR(v, x[v] = SDQ__N(fma)(x[v], r[v], c1));
    SDQ__FOUR(v, x[v] = SDQ__N(fma)(x[v], r[v], c0));
    SDQ__FOUR(v, x[v] = SDQ__N(shift2)(x[v], t[v]));
}
SDQ__WORD SDQ__V SDQ__N(exp2)(SDQ__V x) {
    SDQ__V y[4];
    y[0] = y[1] = y[2] = y[3] = x;
    SDQ__N(exp2_four)(y);
    return y[0];
}

/* x sigmoid(x) = x / (1 + exp(-x)). -inf gives NaN, as inf / inf does. */
SDQ__WORD SDQ__V SDQ__N(swish)(SDQ__V x) {
    const SDQ__V e = SDQ__N(exp)(SDQ__N(neg)(x));
    return SDQ__N(div)(x, SDQ__N(add)(SDQ__N(set1)(1.0f), e));
}
/* Its derivative s (1 + x (1 - s)), s = sigmoid(x) = 1 / (1 + e), 1 - s = e s, e = exp(-x).
 * Beyond +-87, where it is 0 or 1 to 1e-35, x is clamped: e stays finite, s normal. */
SDQ__WORD SDQ__V SDQ__N(swish_slope)(SDQ__V x) {
    const SDQ__V one = SDQ__N(set1)(1.0f), y = SDQ__N(clamp)(x, -87.0f, 87.0f);
    const SDQ__V e = SDQ__N(exp)(SDQ__N(neg)(y));
    const SDQ__V s = SDQ__N(div)(one, SDQ__N(add)(one, e));
    return SDQ__N(mul)(s, SDQ__N(fma)(y, SDQ__N(mul)(e, s), one));
}

/* Phi(-a) = (1 - erf(a / sqrt 2)) / 2 for 0 <= a <= 14.5, and *e = exp(-a^2 / 2).
 * Phi(-a) exp(a^2 / 2) is smooth, so P4(a) / Q5(a) gives it to 6e-9; all coefficients are
 * positive, nothing cancels. a^2 / 2 is rounded: d is what was lost, exp(s + d) = e (1 + d). */
SDQ__WORD SDQ__V SDQ__N(normal_tail)(SDQ__V a, SDQ__V *e) {
    const SDQ__V g = SDQ__N(mul)(a, SDQ__N(set1)(-0.5f)), s = SDQ__N(mul)(g, a);
    const SDQ__V d = SDQ__N(fma)(g, a, SDQ__N(neg)(s)), f = SDQ__N(exp)(s);
    SDQ__V p = SDQ__N(set1)(0.00411629723f), q = SDQ__N(set1)(0.0103179067f);
    p = SDQ__N(fma)(p, a, SDQ__N(set1)(0.0406331457f));
    p = SDQ__N(fma)(p, a, SDQ__N(set1)(0.1832349f));
    p = SDQ__N(fma)(p, a, SDQ__N(set1)(0.438294619f));
    p = SDQ__N(fma)(p, a, SDQ__N(set1)(0.5f));
    q = SDQ__N(fma)(q, a, SDQ__N(set1)(0.101858638f));
    q = SDQ__N(fma)(q, a, SDQ__N(set1)(0.469469994f));
    q = SDQ__N(fma)(q, a, SDQ__N(set1)(1.20250213f));
    q = SDQ__N(fma)(q, a, SDQ__N(set1)(1.67447424f));
    q = SDQ__N(fma)(q, a, SDQ__N(set1)(1.0f));
    *e = SDQ__N(fma)(f, d, f);
    return SDQ__N(mul)(SDQ__N(div)(p, q), *e);
}
/* x Phi(x) = max(x, 0) - a Phi(-a) with a = |x|: no cancellation for x < 0. Error: at most
 * 1.2 ulp for x > 1, 4 ulp for x > -1, 8 ulp in the tail. */
SDQ__WORD SDQ__V SDQ__N(gelu_of)(SDQ__V x, SDQ__V a, SDQ__V tail) {
    return SDQ__N(fma)(SDQ__N(neg)(a), tail, SDQ__N(max)(x, SDQ__N(set1)(0.0f)));
}
SDQ__WORD SDQ__V SDQ__N(gelu)(SDQ__V x) {
    const SDQ__V a = SDQ__N(min)(SDQ__N(set1)(14.5f), SDQ__N(abs)(x));
    SDQ__V e;
    const SDQ__V tail = SDQ__N(normal_tail)(a, &e);
    return SDQ__N(gelu_of)(x, a, tail);
}
/* Phi(x) + x phi(x), phi(x) = exp(-x^2 / 2) / sqrt(2 pi); *y = gelu(x). */
SDQ__WORD SDQ__V SDQ__N(gelu_slope)(SDQ__V x, SDQ__V *y) {
    const SDQ__V c = SDQ__N(clamp)(x, -14.5f, 14.5f), a = SDQ__N(abs)(c);
    SDQ__V e;
    const SDQ__V tail = SDQ__N(normal_tail)(a, &e);
    const SDQ__V body = SDQ__N(sub)(SDQ__N(set1)(1.0f), tail);
    const SDQ__V phi = SDQ__N(if_less)(x, SDQ__N(set1)(0.0f), tail, body);
    *y = SDQ__N(gelu_of)(x, a, tail);
    return SDQ__N(fma)(SDQ__N(mul)(c, SDQ__N(set1)(0.398942280f)), e, phi);
}

/* ---- ranges and quantization ---- */

/* min(x, m) keeps m when x is NaN: NaN elements are skipped. */
SDQ__WORD void SDQ__N(minmax)(const float *x, size_t n, float *mn, float *mx) {
    SDQ__V lo = SDQ__N(set1)(*mn), hi = SDQ__N(set1)(*mx);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(load)(x + i, n - i);
        lo = SDQ__N(min)(SDQ__N(first_n)(v, n - i, lo), lo);
        hi = SDQ__N(max)(SDQ__N(first_n)(v, n - i, hi), hi);
    }
    *mn = SDQ__N(lowest)(lo);
    *mx = SDQ__N(highest)(hi);
}
SDQ__KERNEL void SDQ__K(minmax)(const float *x, size_t n, float *mn, float *mx) {
    SDQ__N(minmax)(x, n, mn, mx);
}

/* Kernels over columns take 8 rows at a time: x is read in order, and the accumulators, which
 * are in the first cache, are loaded and stored once for 8 rows. */
SDQ__KERNEL void SDQ__K(minmax_cols)(const float *x, size_t rows, size_t ld, size_t n, float *mn,
                                     float *mx) {
    size_t r, k, i;
    for (r = 0; r < rows; r += 8) {
        const size_t block = rows - r < 8 ? rows - r : 8;
        for (i = 0; i < n; i += 16) {
            SDQ__V lo = SDQ__N(load)(mn + i, n - i), hi = SDQ__N(load)(mx + i, n - i);
            for (k = 0; k < block; k++) {
                const SDQ__V v = SDQ__N(load)(x + (r + k) * ld + i, n - i);
                lo = SDQ__N(min)(v, lo);
                hi = SDQ__N(max)(v, hi);
            }
            SDQ__N(store)(mn + i, lo, n - i);
            SDQ__N(store)(mx + i, hi, n - i);
        }
    }
}

/* Beyond 2^24 adding z may round, but there the result is clamped anyway. */
SDQ__WORD void SDQ__N(quantize)(uint8_t *q, const float *x, size_t n, float inv, float z) {
    const SDQ__V s = SDQ__N(set1)(inv), zero = SDQ__N(set1)(z);
    size_t i;
    for (i = 0; i < n; i += 16) {
        SDQ__V v = SDQ__N(nan_to_0)(SDQ__N(mul)(SDQ__N(load)(x + i, n - i), s));
        v = SDQ__N(clamp)(SDQ__N(add)(SDQ__N(rint)(v), zero), 0.0f, 255.0f);
        SDQ__N(store_u8)(q + i, v, n - i);
    }
}
SDQ__KERNEL void SDQ__K(quantize_u8)(uint8_t *q, const float *x, size_t n, float inv, int32_t z) {
    SDQ__N(quantize)(q, x, n, inv, (float)z);
}
/* Scales and zero points of 16 rows at once: a division costs as much for one as for 16. */
SDQ__KERNEL void SDQ__K(quantize_rows)(uint8_t *q, size_t ldq, const float *x, size_t ldx,
                                       size_t rows, size_t n, float *s, int32_t *z, size_t lds) {
    const SDQ__V none = SDQ__N(set1)(0.0f), eps = SDQ__N(set1)(SDQ__Q_EPS);
    size_t r, i;
    for (r = 0; r < rows; r += 16) {
        const size_t block = rows - r < 16 ? rows - r : 16;
        float mn[16], mx[16], scale[16], inv[16], zero[16];
        SDQ__V lo, d;
        for (i = 0; i < block; i++) {
            mn[i] = INFINITY;
            mx[i] = -INFINITY;
            SDQ__N(minmax)(x + (r + i) * ldx, n, &mn[i], &mx[i]);
        }
        lo = SDQ__N(min)(SDQ__N(load)(mn, block), none);
        d = SDQ__N(sub)(SDQ__N(max)(SDQ__N(load)(mx, block), none), lo);
        d = SDQ__N(div)(d, SDQ__N(set1)(255.0f));
        d = SDQ__N(if_less)(eps, d, d, eps);
        SDQ__N(store)(scale, d, 16);
        SDQ__N(store)(inv, SDQ__N(div)(SDQ__N(set1)(1.0f), d), 16);
        d = SDQ__N(neg)(SDQ__N(rint)(SDQ__N(div)(lo, d)));
        SDQ__N(store)(zero, SDQ__N(clamp)(SDQ__N(nan_to_0)(d), 0.0f, 255.0f), 16);
        for (i = 0; i < block; i++) {
            s[(r + i) * lds] = scale[i];
            z[(r + i) * lds] = (int32_t)zero[i];
            SDQ__N(quantize)(q + (r + i) * ldq, x + (r + i) * ldx, n, inv[i], zero[i]);
        }
    }
}
SDQ__KERNEL void SDQ__K(quantize_s8)(int8_t *q, const float *x, size_t n, float inv) {
    const SDQ__V s = SDQ__N(set1)(inv);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(nan_to_0)(SDQ__N(mul)(SDQ__N(load)(x + i, n - i), s));
        SDQ__N(store_s8)(q + i, SDQ__N(clamp)(SDQ__N(rint)(v), -128.0f, 127.0f), n - i);
    }
}
SDQ__KERNEL void SDQ__K(quantize_s16)(int16_t *q, const float *x, size_t n, float inv,
                                      float most) {
    const SDQ__V s = SDQ__N(set1)(inv);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(nan_to_0)(SDQ__N(mul)(SDQ__N(load)(x + i, n - i), s));
        SDQ__N(store_s16)(q + i, SDQ__N(clamp)(SDQ__N(rint)(v), -most, most), n - i);
    }
}
SDQ__KERNEL float SDQ__K(ste)(float *dw, const float *g, const float *w, size_t n, float inv,
                              float low, float high) {
    const SDQ__V lo = SDQ__N(set1)(low - 1.0f), hi = SDQ__N(set1)(high + 1.0f);
    const SDQ__V least = SDQ__N(set1)(low), most = SDQ__N(set1)(high);
    const SDQ__V s = SDQ__N(set1)(inv), zero = SDQ__N(set1)(0.0f);
    SDQ__V sum = zero;
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V d = SDQ__N(load)(g + i, n - i);
        const SDQ__V v = SDQ__N(mul)(SDQ__N(load)(w + i, n - i), s), t = SDQ__N(rint)(v);
        const SDQ__V pass = SDQ__N(if_less)(lo, t, SDQ__N(if_less)(t, hi, d, zero), zero);
        SDQ__V slope = SDQ__N(if_less)(t, hi, SDQ__N(sub)(t, v), most);
        slope = SDQ__N(if_less)(lo, t, slope, least);
        sum = SDQ__N(fma)(d, slope, sum);
        SDQ__N(store)(dw + i, SDQ__N(add)(SDQ__N(load)(dw + i, n - i), pass), n - i);
    }
    return SDQ__N(sum)(sum);
}
SDQ__KERNEL void SDQ__K(dequantize_s8)(float *y, const int8_t *q, size_t n, float s) {
    const SDQ__V scale = SDQ__N(set1)(s);
    size_t i;
    for (i = 0; i < n; i += 16)
        SDQ__N(store)(y + i, SDQ__N(mul)(SDQ__N(load_s8)(q + i, n - i), scale), n - i);
}
SDQ__KERNEL void SDQ__K(dequantize_u8)(float *y, const uint8_t *q, size_t n, float s, int32_t z) {
    const SDQ__V scale = SDQ__N(set1)(s), zero = SDQ__N(set1)((float)z);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(sub)(SDQ__N(load_u8)(q + i, n - i), zero);
        SDQ__N(store)(y + i, SDQ__N(mul)(v, scale), n - i);
    }
}

/* ---- element-wise ---- */

SDQ__KERNEL void SDQ__K(add)(float *y, const float *a, const float *b, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V va = SDQ__N(load)(a + i, n - i), vb = SDQ__N(load)(b + i, n - i);
        SDQ__N(store)(y + i, SDQ__N(add)(va, vb), n - i);
    }
}
SDQ__KERNEL void SDQ__K(mul_cols)(float *y, const float *a, size_t n) {
    const SDQ__V l = SDQ__N(load)(a, 16), h = SDQ__N(load)(a + 16, 16);
    size_t i;
    for (i = 0; i < n; i++, y += SDQ__NR) {
        SDQ__N(store)(y, SDQ__N(mul)(SDQ__N(load)(y, 16), l), 16);
        SDQ__N(store)(y + 16, SDQ__N(mul)(SDQ__N(load)(y + 16, 16), h), 16);
    }
}
SDQ__KERNEL void SDQ__K(scale)(float *y, const float *x, size_t n, float s) {
    const SDQ__V vs = SDQ__N(set1)(s);
    size_t i;
    for (i = 0; i < n; i += 16)
        SDQ__N(store)(y + i, SDQ__N(mul)(SDQ__N(load)(x + i, n - i), vs), n - i);
}
SDQ__KERNEL void SDQ__K(axpy)(float *y, const float *x, size_t n, float s) {
    const SDQ__V vs = SDQ__N(set1)(s);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V vx = SDQ__N(load)(x + i, n - i), vy = SDQ__N(load)(y + i, n - i);
        SDQ__N(store)(y + i, SDQ__N(fma)(vs, vx, vy), n - i);
    }
}
SDQ__KERNEL void SDQ__K(lerp)(float *y, const float *x, size_t n, float t) {
    const SDQ__V vt = SDQ__N(set1)(t);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V vx = SDQ__N(load)(x + i, n - i), vy = SDQ__N(load)(y + i, n - i);
        SDQ__N(store)(y + i, SDQ__N(fma)(vt, SDQ__N(sub)(vx, vy), vy), n - i);
    }
}
SDQ__KERNEL void SDQ__K(vexp)(float *y, const float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16)
        SDQ__N(store)(y + i, SDQ__N(exp)(SDQ__N(load)(x + i, n - i)), n - i);
}
SDQ__KERNEL void SDQ__K(silu)(float *y, const float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16)
        SDQ__N(store)(y + i, SDQ__N(swish)(SDQ__N(load)(x + i, n - i)), n - i);
}
SDQ__KERNEL void SDQ__K(gelu)(float *y, const float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16)
        SDQ__N(store)(y + i, SDQ__N(gelu)(SDQ__N(load)(x + i, n - i)), n - i);
}
/* x sigmoid(1.702 x) */
SDQ__KERNEL void SDQ__K(quick_gelu)(float *y, const float *x, size_t n) {
    const SDQ__V one = SDQ__N(set1)(1.0f), c = SDQ__N(set1)(-1.702f);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(load)(x + i, n - i), e = SDQ__N(exp)(SDQ__N(mul)(c, v));
        SDQ__N(store)(y + i, SDQ__N(div)(v, SDQ__N(add)(one, e)), n - i);
    }
}
SDQ__KERNEL void SDQ__K(geglu)(float *y, const float *h, const float *g, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(gelu)(SDQ__N(load)(g + i, n - i));
        SDQ__N(store)(y + i, SDQ__N(mul)(SDQ__N(load)(h + i, n - i), v), n - i);
    }
}

/* Backward of y = f(x): dx += dy * f'(x). */
SDQ__WORD void SDQ__N(add_to)(float *dx, SDQ__V dy, SDQ__V slope, size_t n) {
    const SDQ__V d = SDQ__N(mul)(dy, slope);
    SDQ__N(store)(dx, SDQ__N(add)(SDQ__N(load)(dx, n), d), n);
}
SDQ__KERNEL void SDQ__K(silu_bwd)(float *dx, const float *dy, const float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(load)(x + i, n - i), d = SDQ__N(load)(dy + i, n - i);
        SDQ__N(add_to)(dx + i, d, SDQ__N(swish_slope)(v), n - i);
    }
}
SDQ__KERNEL void SDQ__K(gelu_bwd)(float *dx, const float *dy, const float *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(load)(x + i, n - i), d = SDQ__N(load)(dy + i, n - i);
        SDQ__V y;
        SDQ__N(add_to)(dx + i, d, SDQ__N(gelu_slope)(v, &y), n - i);
    }
}
/* With u = 1.702 x: d/dx x sigmoid(u) = d/du u sigmoid(u), the slope of SiLU at u. */
SDQ__KERNEL void SDQ__K(quick_gelu_bwd)(float *dx, const float *dy, const float *x, size_t n) {
    const SDQ__V c = SDQ__N(set1)(1.702f);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V u = SDQ__N(mul)(c, SDQ__N(load)(x + i, n - i));
        SDQ__N(add_to)(dx + i, SDQ__N(load)(dy + i, n - i), SDQ__N(swish_slope)(u), n - i);
    }
}
/* y = h gelu(g): dh += dy gelu(g), dg += (dy h) gelu'(g) */
SDQ__KERNEL void SDQ__K(geglu_bwd)(float *dh, float *dg, const float *dy, const float *h,
                                   const float *g, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V vh = SDQ__N(load)(h + i, n - i), d = SDQ__N(load)(dy + i, n - i);
        SDQ__V y;
        const SDQ__V slope = SDQ__N(gelu_slope)(SDQ__N(load)(g + i, n - i), &y);
        SDQ__N(add_to)(dh + i, d, y, n - i);
        SDQ__N(add_to)(dg + i, SDQ__N(mul)(d, vh), slope, n - i);
    }
}

/* ---- sums ---- */

SDQ__KERNEL float SDQ__K(sum)(const float *x, size_t n) {
    SDQ__V acc = SDQ__N(set1)(0.0f);
    size_t i;
    for (i = 0; i < n; i += 16) acc = SDQ__N(add)(acc, SDQ__N(load)(x + i, n - i));
    return SDQ__N(sum)(acc);
}
SDQ__KERNEL float SDQ__K(dot)(const float *a, const float *b, size_t n) {
    SDQ__V acc = SDQ__N(set1)(0.0f);
    size_t i;
    for (i = 0; i < n; i += 16)
        acc = SDQ__N(fma)(SDQ__N(load)(a + i, n - i), SDQ__N(load)(b + i, n - i), acc);
    return SDQ__N(sum)(acc);
}
SDQ__KERNEL float SDQ__K(sqdist)(const float *a, const float *b, size_t n) {
    SDQ__V acc = SDQ__N(set1)(0.0f);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V d = SDQ__N(sub)(SDQ__N(load)(a + i, n - i), SDQ__N(load)(b + i, n - i));
        acc = SDQ__N(fma)(d, d, acc);
    }
    return SDQ__N(sum)(acc);
}
SDQ__KERNEL float SDQ__K(absdist)(const float *a, const float *b, size_t n) {
    SDQ__V acc = SDQ__N(set1)(0.0f);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V d = SDQ__N(sub)(SDQ__N(load)(a + i, n - i), SDQ__N(load)(b + i, n - i));
        acc = SDQ__N(add)(acc, SDQ__N(abs)(d));
    }
    return SDQ__N(sum)(acc);
}
SDQ__KERNEL float SDQ__K(sqdev)(const float *x, size_t n, float mean) {
    const SDQ__V m = SDQ__N(set1)(mean);
    SDQ__V acc = SDQ__N(set1)(0.0f);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(first_n)(SDQ__N(load)(x + i, n - i), n - i, m);
        const SDQ__V d = SDQ__N(first_n)(SDQ__N(sub)(v, m), n - i, SDQ__N(set1)(0.0f));
        acc = SDQ__N(fma)(d, d, acc);
    }
    return SDQ__N(sum)(acc);
}
SDQ__KERNEL void SDQ__K(colsum)(float *acc, const float *x, size_t rows, size_t ld, size_t n) {
    size_t r, k, i;
    for (r = 0; r < rows; r += 8) {
        const size_t block = rows - r < 8 ? rows - r : 8;
        for (i = 0; i < n; i += 16) {
            SDQ__V v = SDQ__N(load)(acc + i, n - i);
            for (k = 0; k < block; k++)
                v = SDQ__N(add)(v, SDQ__N(load)(x + (r + k) * ld + i, n - i));
            SDQ__N(store)(acc + i, v, n - i);
        }
    }
}
SDQ__KERNEL void SDQ__K(colsqdev)(float *acc, const float *x, const float *mean, size_t rows,
                                  size_t ld, size_t n) {
    size_t r, k, i;
    for (r = 0; r < rows; r += 8) {
        const size_t block = rows - r < 8 ? rows - r : 8;
        for (i = 0; i < n; i += 16) {
            const SDQ__V m = SDQ__N(load)(mean + i, n - i);
            SDQ__V v = SDQ__N(load)(acc + i, n - i);
            for (k = 0; k < block; k++) {
                const SDQ__V d = SDQ__N(sub)(SDQ__N(load)(x + (r + k) * ld + i, n - i), m);
                v = SDQ__N(fma)(d, d, v);
            }
            SDQ__N(store)(acc + i, v, n - i);
        }
    }
}
SDQ__KERNEL void SDQ__K(colsum2)(float *a1, float *a2, const float *dy, const float *x,
                                 size_t rows, size_t ld, size_t n) {
    size_t r, k, i;
    for (r = 0; r < rows; r += 8) {
        const size_t block = rows - r < 8 ? rows - r : 8;
        for (i = 0; i < n; i += 16) {
            SDQ__V v1 = SDQ__N(load)(a1 + i, n - i), v2 = SDQ__N(load)(a2 + i, n - i);
            for (k = 0; k < block; k++) {
                const SDQ__V d = SDQ__N(load)(dy + (r + k) * ld + i, n - i);
                v1 = SDQ__N(add)(v1, d);
                v2 = SDQ__N(fma)(d, SDQ__N(load)(x + (r + k) * ld + i, n - i), v2);
            }
            SDQ__N(store)(a1 + i, v1, n - i);
            SDQ__N(store)(a2 + i, v2, n - i);
        }
    }
}

/* ---- normalization ---- */

SDQ__WORD SDQ__V SDQ__N(affine_at)(const float *x, const float *a, const float *b, size_t n) {
    return SDQ__N(fma)(SDQ__N(load)(x, n), SDQ__N(load)(a, n), SDQ__N(load)(b, n));
}
SDQ__KERNEL void SDQ__K(affine)(float *y, const float *x, const float *a, const float *b,
                                size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16)
        SDQ__N(store)(y + i, SDQ__N(affine_at)(x + i, a + i, b + i, n - i), n - i);
}
SDQ__KERNEL void SDQ__K(affine_silu)(float *y, const float *x, const float *a, const float *b,
                                     size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(affine_at)(x + i, a + i, b + i, n - i);
        SDQ__N(store)(y + i, SDQ__N(swish)(v), n - i);
    }
}
SDQ__KERNEL void SDQ__K(affine_silu_bwd)(float *dz, const float *dy, const float *x,
                                         const float *a, const float *b, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(affine_at)(x + i, a + i, b + i, n - i);
        const SDQ__V d = SDQ__N(load)(dy + i, n - i);
        SDQ__N(store)(dz + i, SDQ__N(mul)(d, SDQ__N(swish_slope)(v)), n - i);
    }
}
SDQ__KERNEL void SDQ__K(norm_bwd)(float *dx, const float *dz, const float *x, const float *a,
                                  const float *p, const float *q, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(affine_at)(x + i, p + i, q + i, n - i);
        const SDQ__V d = SDQ__N(fma)(SDQ__N(load)(dz + i, n - i), SDQ__N(load)(a + i, n - i), v);
        SDQ__N(store)(dx + i, SDQ__N(add)(SDQ__N(load)(dx + i, n - i), d), n - i);
    }
}
/* h = (x - mean) * rstd */
SDQ__WORD SDQ__V SDQ__N(standard)(const float *x, float mean, float rstd, size_t n) {
    const SDQ__V d = SDQ__N(sub)(SDQ__N(load)(x, n), SDQ__N(set1)(mean));
    return SDQ__N(mul)(d, SDQ__N(set1)(rstd));
}
SDQ__KERNEL void SDQ__K(layernorm)(float *y, const float *x, const float *g, const float *b,
                                   size_t n, float mean, float rstd) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V h = SDQ__N(standard)(x + i, mean, rstd, n - i);
        const SDQ__V vg = SDQ__N(load)(g + i, n - i), vb = SDQ__N(load)(b + i, n - i);
        SDQ__N(store)(y + i, SDQ__N(fma)(h, vg, vb), n - i);
    }
}
/* With t = dy * g: m1 = (sum t) / n, m2 = (sum fma(t, h)) / n, u = fma(-h, m2, t - m1),
 * dx = fma(rstd, u, dx); dgamma = fma(dy, h, dgamma). */
SDQ__KERNEL void SDQ__K(layernorm_bwd)(float *dx, float *dgamma, float *dbeta, const float *dy,
                                       const float *x, const float *g, size_t n, float mean,
                                       float rstd) {
    const SDQ__V zero = SDQ__N(set1)(0.0f), r = SDQ__N(set1)(rstd);
    SDQ__V s1 = zero, s2 = zero, m1, m2;
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V d = SDQ__N(load)(dy + i, n - i);
        const SDQ__V t = SDQ__N(mul)(d, SDQ__N(load)(g + i, n - i));
        const SDQ__V h = SDQ__N(first_n)(SDQ__N(standard)(x + i, mean, rstd, n - i), n - i, zero);
        s1 = SDQ__N(add)(s1, t);
        s2 = SDQ__N(fma)(t, h, s2);
        SDQ__N(store)(dgamma + i, SDQ__N(fma)(d, h, SDQ__N(load)(dgamma + i, n - i)), n - i);
        SDQ__N(store)(dbeta + i, SDQ__N(add)(SDQ__N(load)(dbeta + i, n - i), d), n - i);
    }
    m1 = SDQ__N(set1)(SDQ__N(sum)(s1) / (float)n);
    m2 = SDQ__N(set1)(SDQ__N(sum)(s2) / (float)n);
    for (i = 0; i < n; i += 16) {
        const SDQ__V d = SDQ__N(load)(dy + i, n - i);
        const SDQ__V t = SDQ__N(mul)(d, SDQ__N(load)(g + i, n - i));
        const SDQ__V h = SDQ__N(standard)(x + i, mean, rstd, n - i);
        const SDQ__V u = SDQ__N(fma)(SDQ__N(neg)(h), m2, SDQ__N(sub)(t, m1));
        SDQ__N(store)(dx + i, SDQ__N(fma)(r, u, SDQ__N(load)(dx + i, n - i)), n - i);
    }
}

/* ---- Winograd's transforms ---- */

/* t = B^T x of 6 vectors, each `step` behind the one before. */
SDQ__WORD void SDQ__N(win_in)(SDQ__V *t, const SDQ__V *x, size_t step) {
    const SDQ__V four = SDQ__N(set1)(4.0f), five = SDQ__N(set1)(-5.0f), less = SDQ__N(neg)(four);
    const SDQ__V x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
    const SDQ__V a = SDQ__N(fma)(less, x2, x4), b = SDQ__N(fma)(less, x1, x3);
    const SDQ__V c = SDQ__N(sub)(x4, x2), h = SDQ__N(sub)(x3, x1), d = SDQ__N(add)(h, h);
    t[0] = SDQ__N(fma)(four, x[0], SDQ__N(fma)(five, x2, x4));
    t[step] = SDQ__N(add)(a, b);
    t[2 * step] = SDQ__N(sub)(a, b);
    t[3 * step] = SDQ__N(add)(c, d);
    t[4 * step] = SDQ__N(sub)(c, d);
    t[5 * step] = SDQ__N(fma)(four, x1, SDQ__N(fma)(five, x3, x[5 * step]));
}
SDQ__KERNEL void SDQ__K(win_input)(float *v, size_t ldv, const float *const *d, size_t n) {
    SDQ__V x[36], t[36];
    size_t i, j;
    for (i = 0; i < n; i += 16) {
        for (j = 0; j < 36; j++) x[j] = SDQ__N(load)(d[j] + i, n - i);
        for (j = 0; j < 6; j++) SDQ__N(win_in)(t + j, x + j, 6);
        for (j = 0; j < 6; j++) SDQ__N(win_in)(x + 6 * j, t + 6 * j, 1);
        for (j = 0; j < 36; j++) SDQ__N(store)(v + j * ldv + i, x[j], n - i);
    }
}
/* u = G g: 6 vectors of 3. */
SDQ__WORD void SDQ__N(win_w)(SDQ__V *u, size_t ldu, const SDQ__V *g, size_t ldg) {
    const SDQ__V g0 = g[0], g1 = g[ldg], g2 = g[2 * ldg];
    const SDQ__V e = SDQ__N(mul)(SDQ__N(add)(g0, g2), SDQ__N(set1)(-1.0f / 6.0f));
    const SDQ__V f = SDQ__N(mul)(g1, SDQ__N(set1)(-1.0f / 6.0f));
    const SDQ__V h = SDQ__N(fma)(g0, SDQ__N(set1)(1.0f / 24.0f),
                                 SDQ__N(mul)(g2, SDQ__N(set1)(1.0f / 6.0f)));
    const SDQ__V k = SDQ__N(mul)(g1, SDQ__N(set1)(1.0f / 12.0f));
    u[0] = SDQ__N(mul)(g0, SDQ__N(set1)(0.25f));
    u[ldu] = SDQ__N(add)(e, f);
    u[2 * ldu] = SDQ__N(sub)(e, f);
    u[3 * ldu] = SDQ__N(add)(h, k);
    u[4 * ldu] = SDQ__N(sub)(h, k);
    u[5 * ldu] = g2;
}
SDQ__KERNEL void SDQ__K(win_weight)(float *u, size_t ldu, const float *g, size_t ldg, size_t n) {
    SDQ__V x[9], t[18], r[36];
    size_t i, j;
    for (i = 0; i < n; i += 16) {
        for (j = 0; j < 9; j++) x[j] = SDQ__N(load)(g + j * ldg + i, n - i);
        for (j = 0; j < 3; j++) SDQ__N(win_w)(t + j, 3, x + j, 3);
        for (j = 0; j < 6; j++) SDQ__N(win_w)(r + 6 * j, 1, t + 3 * j, 1);
        for (j = 0; j < 36; j++) SDQ__N(store)(u + j * ldu + i, r[j], n - i);
    }
}
/* o = A^T m: 4 vectors of 6. */
SDQ__WORD void SDQ__N(win_out)(SDQ__V *o, const SDQ__V *m, size_t step) {
    const SDQ__V m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step];
    const SDQ__V s1 = SDQ__N(add)(m1, m2), d1 = SDQ__N(sub)(m1, m2);
    const SDQ__V s2 = SDQ__N(add)(m3, m4), d2 = SDQ__N(sub)(m3, m4);
    o[0] = SDQ__N(add)(SDQ__N(add)(m[0], s1), s2);
    o[step] = SDQ__N(fma)(SDQ__N(set1)(2.0f), d2, d1);
    o[2 * step] = SDQ__N(fma)(SDQ__N(set1)(4.0f), s2, s1);
    o[3 * step] = SDQ__N(add)(SDQ__N(fma)(SDQ__N(set1)(8.0f), d2, d1), m[5 * step]);
}
SDQ__KERNEL void SDQ__K(win_output)(float *const *y, const float *m, size_t ldm, const float *bias,
                                    const float *const *res, size_t n) {
    SDQ__V x[36], t[24], o[16];
    size_t i, j;
    for (i = 0; i < n; i += 16) {
        for (j = 0; j < 36; j++) x[j] = SDQ__N(load)(m + j * ldm + i, n - i);
        for (j = 0; j < 6; j++) SDQ__N(win_out)(t + j, x + j, 6);
        for (j = 0; j < 4; j++) SDQ__N(win_out)(o + 4 * j, t + 6 * j, 1);
        for (j = 0; j < 16; j++) {
            if (!y[j]) continue;
            if (bias) o[j] = SDQ__N(add)(o[j], SDQ__N(load)(bias + i, n - i));
            if (res) o[j] = SDQ__N(add)(o[j], SDQ__N(load)(res[j] + i, n - i));
            SDQ__N(store)(y[j] + i, o[j], n - i);
        }
    }
}

/* ---- softmax ---- */

/* NaN scores are skipped by the maximum and come out as NaN. */
SDQ__KERNEL float SDQ__K(softmax)(float *s, size_t n) {
    SDQ__V top = SDQ__N(set1)(-INFINITY), sum = SDQ__N(set1)(0.0f), e;
    const SDQ__V none = sum;
    size_t i;
    for (i = 0; i < n; i += 16)
        top = SDQ__N(max)(SDQ__N(first_n)(SDQ__N(load)(s + i, n - i), n - i, top), top);
    top = SDQ__N(set1)(SDQ__N(highest)(top));
    for (i = 0; i < n; i += 16) {
        e = SDQ__N(exp)(SDQ__N(sub)(SDQ__N(load)(s + i, n - i), top));
        SDQ__N(store)(s + i, e, n - i);
        sum = SDQ__N(add)(sum, SDQ__N(first_n)(e, n - i, none));
    }
    return SDQ__N(sum)(sum);
}

/* The maxima of 16 columns of s[n][32], in four chains, as each waits for its last maximum. */
SDQ__WORD SDQ__V SDQ__N(highest_rows)(const float *s, size_t n) {
    SDQ__V a = SDQ__N(set1)(-INFINITY), b = a, c = a, d = a;
    size_t i;
    for (i = 0; i + 4 <= n; i += 4, s += 4 * SDQ__NR) {
        a = SDQ__N(max)(SDQ__N(load)(s, 16), a);
        b = SDQ__N(max)(SDQ__N(load)(s + SDQ__NR, 16), b);
        c = SDQ__N(max)(SDQ__N(load)(s + 2 * SDQ__NR, 16), c);
        d = SDQ__N(max)(SDQ__N(load)(s + 3 * SDQ__NR, 16), d);
    }
    for (; i < n; i++, s += SDQ__NR) a = SDQ__N(max)(SDQ__N(load)(s, 16), a);
    return SDQ__N(max)(SDQ__N(max)(a, b), SDQ__N(max)(c, d));
}
/* Milakov and Gimelshein 2018 (arXiv 1805.02867). m may be -inf (no tile yet) if a score of the
 * column is finite. */
SDQ__KERNEL void SDQ__K(softmax_cols)(float *s, size_t n, float scale, float *m, float *l,
                                      float *alpha) {
    const SDQ__V vs = SDQ__N(set1)(scale);
    size_t c, i;
    for (c = 0; c < SDQ__NR; c += 16) {
        const SDQ__V old = SDQ__N(load)(m + c, 16), sums = SDQ__N(load)(l + c, 16);
        const SDQ__V top = SDQ__N(max)(SDQ__N(mul)(SDQ__N(highest_rows)(s + c, n), vs), old);
        const SDQ__V a = SDQ__N(exp2)(SDQ__N(sub)(old, top)), shift = SDQ__N(neg)(top);
        SDQ__V sum = SDQ__N(set1)(0.0f), e[4];
        float *at = s + c;
        for (i = n; i >= 4; i -= 4, at += 4 * SDQ__NR) {
            SDQ__FOUR(v, e[v] = SDQ__N(fma)(SDQ__N(load)(at + v * SDQ__NR, 16), vs, shift));
            SDQ__N(exp2_four)(e);
            SDQ__FOUR(v, SDQ__N(store)(at + v * SDQ__NR, e[v], 16));
            SDQ__FOUR(v, sum = SDQ__N(add)(sum, e[v]));
        }
        for (; i > 0; i--, at += SDQ__NR) {
            e[0] = SDQ__N(exp2)(SDQ__N(fma)(SDQ__N(load)(at, 16), vs, shift));
            SDQ__N(store)(at, e[0], 16);
            sum = SDQ__N(add)(sum, e[0]);
        }
        SDQ__N(store)(m + c, top, 16);
        SDQ__N(store)(alpha + c, a, 16);
        SDQ__N(store)(l + c, SDQ__N(fma)(sums, a, sum), 16);
    }
}
/* rint(most 2^x), x <= 0; NaN gives 0. 2^x to 1.1 in 10^4, which is enough for bytes, or, fine, to
 * 3 in 10^6. */
SDQ__WORD SDQ__V SDQ__N(weight)(SDQ__V x, float most, int fine) {
    const SDQ__V magic = SDQ__N(set1)(12582912.0f);
    SDQ__V r, q = SDQ__N(set1)(most * (fine ? 0.00958285574f : 0.0549809409f));
    const SDQ__V t = SDQ__N(split2)(SDQ__N(max)(x, SDQ__N(set1)(-30.0f)), &r);
    if (fine) q = SDQ__N(fma)(q, r, SDQ__N(set1)(most * 0.0559064299f));
    q = SDQ__N(fma)(q, r, SDQ__N(set1)(most * (fine ? 0.240240991f : 0.242214225f)));
    q = SDQ__N(fma)(q, r, SDQ__N(set1)(most * (fine ? 0.693124175f : 0.693287098f)));
    q = SDQ__N(fma)(q, r, SDQ__N(set1)(most));
    return SDQ__N(sub)(SDQ__N(add)(SDQ__N(shift2)(q, t), magic), magic);
}
/* Weight i of 16 columns; those behind the last are 0. Adds it to *sum. */
SDQ__WORD SDQ__V SDQ__N(weight_row)(const float *s, size_t i, size_t n, SDQ__V scale, SDQ__V shift,
                                    SDQ__V *sum, int fine) {
    SDQ__V w;
    if (i >= n) return SDQ__N(set1)(0.0f);
    w = SDQ__N(load)(s + i * SDQ__NR, 16);
    w = SDQ__N(weight)(SDQ__N(fma)(w, scale, shift), fine ? 2048.0f : 255.0f, fine);
    *sum = SDQ__N(add)(*sum, w);
    return w;
}
/* 16 columns: the weights, in groups of 4 bytes; returns their sums. top: the maxima, scaled. */
SDQ__WORD SDQ__V SDQ__N(weights)(char *p, const float *s, size_t n, SDQ__V scale, SDQ__V top,
                                 int fine) {
    const SDQ__V shift = SDQ__N(neg)(top);
    SDQ__V sum = SDQ__N(set1)(0.0f);
    size_t i;
    for (i = 0; i < n; i += fine ? 2 : 4, p += 4 * SDQ__NR) {
        const SDQ__V a = SDQ__N(weight_row)(s, i, n, scale, shift, &sum, fine);
        const SDQ__V b = SDQ__N(weight_row)(s, i + 1, n, scale, shift, &sum, fine);
        SDQ__V c, d;
        if (fine) { SDQ__N(store_pairs)(p, a, b); continue; }
        c = SDQ__N(weight_row)(s, i + 2, n, scale, shift, &sum, fine);
        d = SDQ__N(weight_row)(s, i + 3, n, scale, shift, &sum, fine);
        SDQ__N(store_quads)(p, a, b, c, d);
    }
    return sum;
}
SDQ__WORD void SDQ__N(softmax_int)(char *p, const float *s, size_t n, float scale, float *m,
                                   float *l, float *alpha, float *beta, int fine) {
    const SDQ__V vs = SDQ__N(set1)(scale);
    size_t c;
    for (c = 0; c < SDQ__NR; c += 16) {
        const SDQ__V t = SDQ__N(mul)(SDQ__N(highest_rows)(s + c, n), vs);
        const SDQ__V sum = SDQ__N(weights)(p + 4 * c, s + c, n, vs, t, fine);
        const SDQ__V old = SDQ__N(load)(m + c, 16), top = SDQ__N(max)(t, old);
        const SDQ__V a = SDQ__N(exp2)(SDQ__N(sub)(old, top)), b = SDQ__N(exp2)(SDQ__N(sub)(t, top));
        const SDQ__V sums = SDQ__N(fma)(SDQ__N(load)(l + c, 16), a, SDQ__N(mul)(b, sum));
        SDQ__N(store)(m + c, top, 16);
        SDQ__N(store)(alpha + c, a, 16);
        SDQ__N(store)(beta + c, b, 16);
        SDQ__N(store)(l + c, sums, 16);
    }
}
SDQ__KERNEL void SDQ__K(softmax_cols_u8)(uint8_t *p, const float *s, size_t n, float scale,
                                         float *m, float *l, float *alpha, float *beta) {
    SDQ__N(softmax_int)((char *)p, s, n, scale, m, l, alpha, beta, 0);
}
SDQ__KERNEL void SDQ__K(softmax_cols_s16)(int16_t *p, const float *s, size_t n, float scale,
                                          float *m, float *l, float *alpha, float *beta) {
    SDQ__N(softmax_int)((char *)p, s, n, scale, m, l, alpha, beta, 1);
}
SDQ__KERNEL void SDQ__K(softmax_tile_bwd)(float *s, float *dp, size_t n, float scale, float lse,
                                          float delta) {
    const SDQ__V vs = SDQ__N(set1)(scale), vl = SDQ__N(set1)(lse), vd = SDQ__N(set1)(delta);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V v = SDQ__N(mul)(SDQ__N(load)(s + i, n - i), vs);
        const SDQ__V p = SDQ__N(exp)(SDQ__N(sub)(v, vl));
        const SDQ__V d = SDQ__N(sub)(SDQ__N(load)(dp + i, n - i), vd);
        SDQ__N(store)(s + i, p, n - i);
        SDQ__N(store)(dp + i, SDQ__N(mul)(SDQ__N(mul)(p, d), vs), n - i);
    }
}

/* ---- optimizer ---- */

/* Loshchilov and Hutter 2019 (arXiv 1711.05101), in the order of torch.optim.AdamW:
 *   g = grad * clip
 *   w = fma(-decay, w, w)                       torch: w *= 1 - lr * weight_decay
 *   m = fma(1 - beta1, g - m, m)                torch: m.lerp_(g, 1 - beta1)
 *   v = fma((1 - beta2) * g, g, beta2 * v)      torch: v.mul_(beta2).addcmul_(g, g, 1 - beta2)
 *   w = fma(-lr, (m * c1) / (sqrt(v * c2) + eps), w)
 * c1, c2 multiply where torch divides by 1 - beta^t: equal but for rounding. */
typedef struct SDQ__N(adamw_const) { SDQ__V beta1, beta2, rest2, clip, c1, c2, eps, lr, decay; }
    SDQ__N(adamw_const);
SDQ__WORD SDQ__N(adamw_const) SDQ__N(adamw_set)(const sdq__adamw_step *s) {
    SDQ__N(adamw_const) c;
    c.beta1 = SDQ__N(set1)(1.0f - s->beta1); c.beta2 = SDQ__N(set1)(s->beta2);
    c.rest2 = SDQ__N(set1)(1.0f - s->beta2); c.clip = SDQ__N(set1)(s->clip);
    c.c1 = SDQ__N(set1)(s->c1); c.c2 = SDQ__N(set1)(s->c2); c.eps = SDQ__N(set1)(s->eps);
    c.lr = SDQ__N(set1)(-s->lr); c.decay = SDQ__N(set1)(-s->decay);
    return c;
}
/* Returns the new w; m and v are renewed in place. */
SDQ__WORD SDQ__V SDQ__N(adamw_lanes)(const SDQ__N(adamw_const) *c, SDQ__V w, SDQ__V *m, SDQ__V *v,
                                     SDQ__V grad) {
    const SDQ__V g = SDQ__N(mul)(grad, c->clip);
    SDQ__V root;
    w = SDQ__N(fma)(c->decay, w, w);
    *m = SDQ__N(fma)(c->beta1, SDQ__N(sub)(g, *m), *m);
    *v = SDQ__N(fma)(SDQ__N(mul)(c->rest2, g), g, SDQ__N(mul)(c->beta2, *v));
    root = SDQ__N(add)(SDQ__N(sqrt)(SDQ__N(mul)(*v, c->c2)), c->eps);
    return SDQ__N(fma)(c->lr, SDQ__N(div)(SDQ__N(mul)(*m, c->c1), root), w);
}
SDQ__KERNEL void SDQ__K(adamw)(float *w, float *m, float *v, const float *grad, size_t n,
                               const sdq__adamw_step *s) {
    const SDQ__N(adamw_const) c = SDQ__N(adamw_set)(s);
    size_t i;
    for (i = 0; i < n; i += 16) {
        SDQ__V vm = SDQ__N(load)(m + i, n - i), vv = SDQ__N(load)(v + i, n - i);
        const SDQ__V vw = SDQ__N(adamw_lanes)(&c, SDQ__N(load)(w + i, n - i), &vm, &vv,
                                              SDQ__N(load)(grad + i, n - i));
        SDQ__N(store)(m + i, vm, n - i);
        SDQ__N(store)(v + i, vv, n - i);
        SDQ__N(store)(w + i, vw, n - i);
    }
}

/* Moments to bytes; a block of zeros has scale 0 and is divided by 1. */
SDQ__WORD void SDQ__N(moments8)(int8_t *m8, uint8_t *v8, const float *m, const float *v,
                                const float *s, size_t n) {
    const SDQ__V ms = SDQ__N(set1)(s[0] > 0.0f ? s[0] : 1.0f), zero = SDQ__N(set1)(0.0f);
    const SDQ__V vs = SDQ__N(set1)(s[1] > 0.0f ? s[1] : 1.0f), one = SDQ__N(set1)(1.0f);
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V x = SDQ__N(load)(m + i, n - i), y = SDQ__N(load)(v + i, n - i);
        SDQ__V a = SDQ__N(sqrt)(SDQ__N(div)(SDQ__N(abs)(x), ms));
        SDQ__V b = SDQ__N(sqrt)(SDQ__N(sqrt)(SDQ__N(div)(y, vs)));
        a = SDQ__N(rint)(SDQ__N(mul)(a, SDQ__N(set1)(127.0f)));
        b = SDQ__N(rint)(SDQ__N(mul)(b, SDQ__N(set1)(255.0f)));
        b = SDQ__N(max)(b, SDQ__N(if_less)(zero, y, one, zero));
        SDQ__N(store_s8)(m8 + i, SDQ__N(if_less)(x, zero, SDQ__N(sub)(zero, a), a), n - i);
        SDQ__N(store_u8)(v8 + i, b, n - i);
    }
}
SDQ__KERNEL void SDQ__K(adamw8)(float *w, int8_t *m8, uint8_t *v8, float *s, const float *grad,
                                size_t n, const sdq__adamw_step *step) {
    const SDQ__N(adamw_const) c = SDQ__N(adamw_set)(step);
    const SDQ__V ms = SDQ__N(set1)(s[0]), vs = SDQ__N(set1)(s[1]);
    SDQ__V m_most = SDQ__N(set1)(0.0f), v_most = m_most;
    float m[SDQ__MOMENT_BLOCK], v[SDQ__MOMENT_BLOCK];
    size_t i;
    for (i = 0; i < n; i += 16) {
        const SDQ__V a = SDQ__N(mul)(SDQ__N(load_s8)(m8 + i, n - i), SDQ__N(set1)(1.0f / 127.0f));
        const SDQ__V b = SDQ__N(mul)(SDQ__N(load_u8)(v8 + i, n - i), SDQ__N(set1)(1.0f / 255.0f));
        const SDQ__V b2 = SDQ__N(mul)(b, b);
        SDQ__V vm = SDQ__N(mul)(SDQ__N(mul)(a, SDQ__N(abs)(a)), ms);
        SDQ__V vv = SDQ__N(mul)(SDQ__N(mul)(b2, b2), vs);
        const SDQ__V vw = SDQ__N(adamw_lanes)(&c, SDQ__N(load)(w + i, n - i), &vm, &vv,
                                              SDQ__N(load)(grad + i, n - i));
        SDQ__N(store)(m + i, vm, n - i);
        SDQ__N(store)(v + i, vv, n - i);
        SDQ__N(store)(w + i, vw, n - i);
        m_most = SDQ__N(max)(m_most, SDQ__N(abs)(vm));
        v_most = SDQ__N(max)(v_most, vv);
    }
    s[0] = SDQ__N(highest)(m_most);
    s[1] = SDQ__N(highest)(v_most);
    SDQ__N(moments8)(m8, v8, m, v, s, n);
}

/* ---- half precision ---- */

SDQ__KERNEL void SDQ__K(from_f16)(float *y, const uint16_t *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) SDQ__N(store)(y + i, SDQ__N(load_f16)(x + i, n - i), n - i);
}
SDQ__KERNEL void SDQ__K(from_bf16)(float *y, const uint16_t *x, size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) SDQ__N(store)(y + i, SDQ__N(load_bf16)(x + i, n - i), n - i);
}

#define SDQ__X(ret, name, args, cls) SDQ__K(name),
static const sdq__kernels SDQ__K(table) = { SDQ__KERNEL_LIST(SDQ__X) };
#undef SDQ__X
#else
#define sdq__k_gemm_u8s8_avx512 SDQ__K(gemm_u8s8)
#define sdq__k_gemm_s8u8_avx512 SDQ__K(gemm_s8u8)
#define sdq__k_gemm_s16_avx512 SDQ__K(gemm_s16)
#define SDQ__X(ret, name, args, cls) sdq__k_##name##_avx512,
static const sdq__kernels SDQ__K(table) = { SDQ__KERNEL_LIST(SDQ__X) };
#undef SDQ__X
#undef sdq__k_gemm_u8s8_avx512
#undef sdq__k_gemm_s8u8_avx512
#undef sdq__k_gemm_s16_avx512
#endif

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#undef SDQ__CAT3_
#undef SDQ__CAT3
#undef SDQ__N
#undef SDQ__K
#undef SDQ__V
#undef SDQ__I
#undef SDQ__QA
#undef SDQ__QB
#undef SDQ__KERNEL
#undef SDQ__WORD
#undef SDQ__ALIGNED
#undef SDQ__FTILE_ROWS
#undef SDQ__QTILE_ROWS
#undef SDQ__TILE_VECS
#undef SDQ__PICK
#undef SDQ__ROWS
#undef SDQ__KERNEL_PASS
#undef SDQ__SUFFIX
#undef SDQ__TARGET
#undef SDQ__TIER
#endif /* SDQ__KERNEL_PASS */

/* ===========================================================================
 * >>changes
 *
 * 0.1   first version
 *
 * >>licence
 *
 * MIT License
 *
 * Copyright (c) 2026 the sdq.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
 * associated documentation files (the "Software"), to deal in the Software without restriction,
 * including without limitation the rights to use, copy, modify, merge, publish, distribute,
 * sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
 * furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or
 * substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
 * NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
 * NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
 * DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 * ======================================================================== */
