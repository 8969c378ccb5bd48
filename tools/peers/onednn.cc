/* onednn.cc - the int8 layers of Stable Diffusion 1.5's UNet in oneDNN, one by one.
 *
 *     c++ -O2 -fopenmp tools/peers/onednn.cc -ldnnl -o onednn      (Debian: libdnnl-dev, 2.6)
 *     OMP_NUM_THREADS=2 ./onednn [RUNS] > onednn.csv
 *
 * u8 x s8 -> f32 with a float bias and a scale per output channel. Every memory has the format
 * oneDNN likes best and weights are packed beforehand; the input is already u8. RUNS [5] rounds go
 * over all shapes, the median counts. The last line is a whole evaluation's sum. */
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <vector>

#include <dnnl.hpp>

#include "layers.h"

using namespace dnnl;
using dt = memory::data_type;
using tag = memory::format_tag;

struct Job {
    primitive work;
    std::unordered_map<int, memory> args;
    std::vector<double> seconds;
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
             {DNNL_ARG_DST, filled(p.dst_desc(), cpu)}},
            {}};
}

static Job linear(const layer_shape &s, const engine &cpu) {
    const memory::desc src({s.w, s.in}, dt::u8, tag::ab), wei({s.in, s.out}, dt::s8, tag::any);
    const memory::desc bias({1, s.out}, dt::f32, tag::ab), dst({s.w, s.out}, dt::f32, tag::ab);
    const matmul::primitive_desc p(matmul::desc(src, wei, bias, dst), scales(s.out, 1 << 1), cpu);
    return {matmul(p),
            {{DNNL_ARG_SRC, filled(p.src_desc(), cpu)},
             {DNNL_ARG_WEIGHTS, filled(p.weights_desc(), cpu)},
             {DNNL_ARG_BIAS, filled(p.bias_desc(), cpu)},
             {DNNL_ARG_DST, filled(p.dst_desc(), cpu)}},
            {}};
}

int main(int argc, char **argv) {
    const int runs = argc > 1 ? std::max(1, std::atoi(argv[1])) : 5;
    const dnnl_version_t *v = dnnl_version();
    engine cpu(engine::kind::cpu, 0);
    stream queue(cpu);
    std::vector<Job> jobs;
    double total = 0.0, work = 0.0;
    for (const layer_shape &s : layer_shapes)
        jobs.push_back(s.kernel ? convolution(s, cpu) : linear(s, cpu));
    for (int run = 0; run <= runs; run++)           /* the first round warms up */
        for (Job &job : jobs) {
            const auto start = std::chrono::steady_clock::now();
            job.work.execute(queue, job.args);
            queue.wait();
            const std::chrono::duration<double> t = std::chrono::steady_clock::now() - start;
            if (run) job.seconds.push_back(t.count());
        }
    std::fprintf(stderr, "oneDNN %d.%d.%d, median of %d runs\n", v->major, v->minor, v->patch,
                 runs);
    std::printf("layer,kernel,stride,height,width,in,out,layers,ms,gops,all_ms\n");
    for (int i = 0; i < LAYER_SHAPES; i++) {
        const layer_shape &s = layer_shapes[i];
        std::vector<double> &t = jobs[static_cast<size_t>(i)].seconds;
        std::sort(t.begin(), t.end());
        const double m = t[t.size() / 2];
        std::printf("%s,%d,%d,%d,%d,%d,%d,%d,%.3f,%.0f,%.2f\n", s.kernel ? "conv" : "linear",
                    s.kernel ? s.kernel : 1, s.stride, s.h, s.w, s.in, s.out, s.count, m * 1e3,
                    layer_work(&s) / m * 1e-9, m * s.count * 1e3);
        total += m * s.count;
        work += layer_work(&s) * s.count;
    }
    std::printf("sum,,,,,,,,,%.0f,%.2f\n", work / total * 1e-9, total * 1e3);
    return 0;
}
