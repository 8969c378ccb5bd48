/* layers.cc - the int8 layers of Stable Diffusion 1.5's UNet in sdq and in oneDNN, one by one.
 *
 *     c++ -O2 -fopenmp -I. tools/peers/layers.cc -ldnnl -o layers      (Debian: libdnnl-dev, 2.6)
 *     ./layers [RUNS [THREADS [SHARE]]] > layers.csv
 *
 * u8 x s8 -> f32 with a float bias and a scale per output channel; the input is u8 already, of sdq
 * with a range per position, as its default recipe, and with one range for all, as oneDNN's. In
 * oneDNN every memory has the format it likes best, and weights are packed beforehand. All three
 * alternate, layer by layer, in one process: a machine that is slow for a minute is slow for all.
 * RUNS [9] of each, the median counts. Only shapes with SHARE [0] of all work or more. */
#define _DEFAULT_SOURCE     /* madvise for sdq.h */
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#include <vector>

#include <dnnl.hpp>

#define SDQ_IMPLEMENTATION
#include "sdq.h"

#include "layers.h"

using namespace dnnl;
using dt = memory::data_type;
using tag = memory::format_tag;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/* ---- oneDNN ---- */

struct Job {
    primitive work;
    std::unordered_map<int, memory> args;
};

/* A memory of bytes that are small positive numbers, also as u8 and s8; floats are zeros. */
static memory filled(const memory::desc &desc, const engine &cpu) {
    memory m(desc, cpu);
    const bool bytes = desc.data_type() == dt::u8 || desc.data_type() == dt::s8;
    unsigned char *p = static_cast<unsigned char *>(m.get_data_handle());
    for (size_t i = 0; i < desc.get_size(); i++)
        p[i] = bytes ? static_cast<unsigned char>(i * 7 % 61) : 0;
    return m;
}

static primitive_attr scales(int n, int mask) {
    primitive_attr attr;
    attr.set_output_scales(mask, std::vector<float>(static_cast<size_t>(n), 0.01f));
    return attr;
}

static Job convolution(const layer_shape &s, const engine &cpu) {
    const int pad = s.kernel / 2, h = s.h / s.stride, w = s.w / s.stride;
    const memory::desc src({1, s.in, s.h, s.w}, dt::u8, tag::any);
    const memory::desc wei({s.out, s.in, s.kernel, s.kernel}, dt::s8, tag::any);
    const memory::desc bias({s.out}, dt::f32, tag::x), dst({1, s.out, h, w}, dt::f32, tag::any);
    const convolution_forward::desc d(prop_kind::forward_inference, algorithm::convolution_auto,
                                      src, wei, bias, dst, {s.stride, s.stride}, {pad, pad},
                                      {pad, pad});
    const convolution_forward::primitive_desc p(d, scales(s.out, 1 << 1), cpu);
    return {convolution_forward(p),
            {{DNNL_ARG_SRC, filled(p.src_desc(), cpu)},
             {DNNL_ARG_WEIGHTS, filled(p.weights_desc(), cpu)},
             {DNNL_ARG_BIAS, filled(p.bias_desc(), cpu)},
             {DNNL_ARG_DST, filled(p.dst_desc(), cpu)}}};
}

static Job linear(const layer_shape &s, const engine &cpu) {
    const memory::desc src({s.w, s.in}, dt::u8, tag::ab), wei({s.in, s.out}, dt::s8, tag::any);
    const memory::desc bias({1, s.out}, dt::f32, tag::ab), dst({s.w, s.out}, dt::f32, tag::ab);
    const matmul::primitive_desc p(matmul::desc(src, wei, bias, dst), scales(s.out, 1 << 1), cpu);
    return {matmul(p),
            {{DNNL_ARG_SRC, filled(p.src_desc(), cpu)},
             {DNNL_ARG_WEIGHTS, filled(p.weights_desc(), cpu)},
             {DNNL_ARG_BIAS, filled(p.bias_desc(), cpu)},
             {DNNL_ARG_DST, filled(p.dst_desc(), cpu)}}};
}

static double run(const Job &job, stream &queue) {
    const double t = now();
    job.work.execute(queue, job.args);
    queue.wait();
    return now() - t;
}

/* ---- sdq ---- */

struct Layer {
    sdq_layer *layer;
    sdq_tensor *x;
};

static void need(const sdq_ctx *ctx, bool fine) {
    if (fine) return;
    std::fprintf(stderr, "layers: %s\n", sdq_error_text(ctx));
    std::exit(1);
}

static void fill(float *x, size_t n, unsigned seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
    }
}

static Layer layer(sdq_ctx *ctx, const layer_shape &s, sdq_range range) {
    sdq_layer_desc d = sdq_layer_desc();
    Layer l;
    d.in = static_cast<size_t>(s.in);
    d.out = static_cast<size_t>(s.out);
    d.kernel = s.kernel;
    d.stride = s.stride == 1 ? 0 : s.stride;
    for (int &pad : d.pad) pad = s.kernel / 2;
    need(ctx, sdq_layer_create(ctx, &d, &l.layer) == SDQ_OK);
    sdq_tensor *w = sdq_layer_weight(l.layer);
    fill(sdq_f32(w), sdq_tensor_count(w), 1);
    sdq_quant q = sdq_layer_quant(l.layer);
    q.enabled = 1;
    q.range = range;
    need(ctx, sdq_layer_set_quant(ctx, l.layer, &q) == SDQ_OK);
    l.x = sdq_tensor_4d(ctx, 1, static_cast<size_t>(s.h), static_cast<size_t>(s.w), d.in);
    need(ctx, l.x != nullptr);
    fill(sdq_f32(l.x), sdq_tensor_count(l.x), 2);
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq_layer_observe(l.layer, 1);
    need(ctx, sdq_layer_forward(ctx, l.layer, l.x, nullptr, SDQ_FLOAT) != nullptr);
    sdq_layer_observe(l.layer, 0);
    sdq_arena_release(ctx, mark);
    need(ctx, sdq_layer_convert(ctx, l.layer) == SDQ_OK);
    return l;
}

static double run(const Layer &l, sdq_ctx *ctx) {
    const sdq_mark mark = sdq_arena_mark(ctx);
    sdq__qinput bytes;
    need(ctx, sdq__ly_quantize_input(ctx, l.layer, &l.layer->part[0], l.x, &bytes) == SDQ_OK);
    bytes.of = l.layer;
    l.x->q = &bytes;
    const double t = now();
    need(ctx, sdq_layer_forward(ctx, l.layer, l.x, nullptr, SDQ_INT8) != nullptr);
    const double seconds = now() - t;
    l.x->q = nullptr;
    sdq_arena_release(ctx, mark);
    return seconds;
}

/* ---- */

static double median(std::vector<double> &t) {
    std::sort(t.begin(), t.end());
    return t[t.size() / 2];
}

int main(int argc, char **argv) {
    const int runs = argc > 1 ? std::max(1, std::atoi(argv[1])) : 9;
    const int threads = argc > 2 ? std::max(1, std::atoi(argv[2])) : omp_get_max_threads();
    const double share = argc > 3 ? std::atof(argv[3]) : 0.0;
    double work = 0.0, part = 0.0, total[3] = {0.0};
    sdq_ctx_desc d = sdq_ctx_desc();
    sdq_ctx *ctx;
    omp_set_num_threads(threads);
    d.threads = threads;
    if (sdq_ctx_create(&d, &ctx) != SDQ_OK) return 1;
    engine cpu(engine::kind::cpu, 0);
    stream queue(cpu);
    for (const layer_shape &s : layer_shapes) work += layer_work(&s) * s.count;
    const dnnl_version_t *v = dnnl_version();
    std::fprintf(stderr, "sdq %s; oneDNN %d.%d.%d; %d threads, median of %d runs\n",
                 sdq_tier_name(sdq_ctx_tier(ctx)), v->major, v->minor, v->patch, threads, runs);
    std::printf("layer,kernel,stride,height,width,in,out,layers,position_ms,static_ms,onednn_ms,"
                "position_gops,static_gops,onednn_gops,position_gain,static_gain,share\n");
    for (const layer_shape &s : layer_shapes) {
        if (layer_work(&s) * s.count < share * work) continue;
        const sdq_mark mark = sdq_arena_mark(ctx);
        const Layer position = layer(ctx, s, SDQ_RANGE_POSITION);
        const Layer fixed = layer(ctx, s, SDQ_RANGE_STATIC);
        const Job job = s.kernel ? convolution(s, cpu) : linear(s, cpu);
        std::vector<double> t[3];
        double m[3];
        for (int r = -1; r < runs; r++) {           /* the first round warms up */
            const double a = run(position, ctx), b = run(fixed, ctx), c = run(job, queue);
            if (r < 0) continue;
            t[0].push_back(a);
            t[1].push_back(b);
            t[2].push_back(c);
        }
        sdq_layer_free(ctx, position.layer);
        sdq_layer_free(ctx, fixed.layer);
        sdq_arena_release(ctx, mark);
        part += layer_work(&s) * s.count;
        std::printf("%s,%d,%d,%d,%d,%d,%d,%d", s.kernel ? "conv" : "linear",
                    s.kernel ? s.kernel : 1, s.stride, s.h, s.w, s.in, s.out, s.count);
        for (int i = 0; i < 3; i++) {
            m[i] = median(t[i]);
            total[i] += m[i] * s.count;
            std::printf(",%.3f", m[i] * 1e3);
        }
        for (double x : m) std::printf(",%.0f", layer_work(&s) / x * 1e-9);
        std::printf(",%.2f,%.2f,%.3f\n", m[2] / m[0], m[2] / m[1],
                    layer_work(&s) * s.count / work);
        std::fflush(stdout);
    }
    std::printf("all,,,,,,,,%.2f,%.2f,%.2f,%.0f,%.0f,%.0f,%.3f,%.3f,%.3f\n", total[0] * 1e3,
                total[1] * 1e3, total[2] * 1e3, part / total[0] * 1e-9, part / total[1] * 1e-9,
                part / total[2] * 1e-9, total[2] / total[0], total[2] / total[1], part / work);
    sdq_ctx_free(ctx);
    return 0;
}
