/* The library from C++: RAII around the C objects, errors as exceptions.
 *
 *     c++ -std=c++11 -O2 -fopenmp -I.. cpp.cc -o cpp
 *     ./cpp emoji/model "sun with face" out.png
 *
 * Expected output: "64 x 64 pixels on tier <name>; wrote out.png" */
#define SDQ_IMPLEMENTATION
#include "sdq.h"

#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

namespace {

struct context {
    sdq_ctx *p = nullptr;
    context() { if (sdq_ctx_create(nullptr, &p) != SDQ_OK) throw std::bad_alloc(); }
    ~context() { sdq_ctx_free(p); }
    context(const context &) = delete;
    context &operator=(const context &) = delete;
    void check(sdq_status st) const { if (st != SDQ_OK) throw std::runtime_error(sdq_error_text(p)); }
};

struct image {
    const context &ctx;
    sdq_image p;
    explicit image(const context &c) : ctx(c), p() {}
    ~image() { sdq_image_free(ctx.p, &p); }
    image(const image &) = delete;
    image &operator=(const image &) = delete;
};


void draw(const context &ctx, const std::string &model, const std::string &prompt,
          const std::string &out) {
    sdq_pipeline *raw = nullptr;
    ctx.check(sdq_pipeline_load(ctx.p, model.c_str(), nullptr, &raw));
    std::shared_ptr<sdq_pipeline> pipe(raw, [&ctx](sdq_pipeline *p) { sdq_pipeline_free(ctx.p, p); });
    sdq_txt2img_desc desc = sdq_txt2img_desc();
    desc.prompt = prompt.c_str();
    desc.steps = 20;
    desc.guidance = 4.0f;
    image img(ctx);
    ctx.check(sdq_txt2img(ctx.p, pipe.get(), &desc, &img.p));
    ctx.check(sdq_image_write(ctx.p, out.c_str(), &img.p, nullptr, 0));
    std::cout << img.p.w << " x " << img.p.h << " pixels on tier "
              << sdq_tier_name(sdq_ctx_tier(ctx.p)) << "; wrote " << out << "\n";
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 4) {
        std::cerr << "usage: " << argv[0] << " MODEL PROMPT OUT.png\n";
        return 2;
    }
    try {
        context ctx;
        draw(ctx, argv[1], argv[2], argv[3]);
    } catch (const std::exception &e) {
        std::cerr << e.what() << "\n";
        return 1;
    }
    return 0;
}
