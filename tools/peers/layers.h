/* layers.h - the layers of Stable Diffusion 1.5's UNet at 512x512 that sdq's default recipe makes
 * int8: 221 of 282, 668 of 677 GOP of an evaluation of batch 1. The others are conv_in, conv_out,
 * the time path, keys and values of the text, and the shortcuts of the last up block.
 *
 *     X(kernel, stride, height, width, input channels, output channels, layers of this shape)
 *
 * Kernel 3 is padded by 1. Linear layers have kernel 0 and height 1: width is the rows. */
#define LAYERS(X) \
    X(3, 1, 64, 64, 320, 320, 7) \
    X(3, 1, 64, 64, 640, 320, 2) \
    X(3, 1, 64, 64, 960, 320, 1) \
    X(3, 1, 64, 64, 640, 640, 1) \
    X(3, 2, 64, 64, 320, 320, 1) \
    X(3, 1, 32, 32, 320, 640, 1) \
    X(3, 1, 32, 32, 640, 640, 6) \
    X(3, 1, 32, 32, 960, 640, 1) \
    X(3, 1, 32, 32, 1280, 640, 1) \
    X(3, 1, 32, 32, 1920, 640, 1) \
    X(3, 1, 32, 32, 1280, 1280, 1) \
    X(3, 2, 32, 32, 640, 640, 1) \
    X(3, 1, 16, 16, 640, 1280, 1) \
    X(3, 1, 16, 16, 1280, 1280, 7) \
    X(3, 1, 16, 16, 1920, 1280, 1) \
    X(3, 1, 16, 16, 2560, 1280, 2) \
    X(3, 2, 16, 16, 1280, 1280, 1) \
    X(3, 1, 8, 8, 1280, 1280, 11) \
    X(3, 1, 8, 8, 2560, 1280, 3) \
    X(1, 1, 64, 64, 320, 320, 10) \
    X(1, 1, 32, 32, 320, 640, 1) \
    X(1, 1, 32, 32, 640, 640, 10) \
    X(1, 1, 32, 32, 960, 640, 1) \
    X(1, 1, 32, 32, 1280, 640, 1) \
    X(1, 1, 32, 32, 1920, 640, 1) \
    X(1, 1, 16, 16, 640, 1280, 1) \
    X(1, 1, 16, 16, 1280, 1280, 10) \
    X(1, 1, 16, 16, 1920, 1280, 1) \
    X(1, 1, 16, 16, 2560, 1280, 2) \
    X(1, 1, 8, 8, 1280, 1280, 2) \
    X(1, 1, 8, 8, 2560, 1280, 3) \
    X(0, 1, 1, 4096, 320, 320, 30) \
    X(0, 1, 1, 4096, 320, 2560, 5) \
    X(0, 1, 1, 4096, 1280, 320, 5) \
    X(0, 1, 1, 1024, 640, 640, 30) \
    X(0, 1, 1, 1024, 640, 5120, 5) \
    X(0, 1, 1, 1024, 2560, 640, 5) \
    X(0, 1, 1, 256, 1280, 1280, 30) \
    X(0, 1, 1, 256, 1280, 10240, 5) \
    X(0, 1, 1, 256, 5120, 1280, 5) \
    X(0, 1, 1, 64, 1280, 1280, 6) \
    X(0, 1, 1, 64, 1280, 10240, 1) \
    X(0, 1, 1, 64, 5120, 1280, 1)

typedef struct layer_shape { int kernel, stride, h, w, in, out, count; } layer_shape;
#define LAYER_ROW(kernel, stride, h, w, in, out, count) {kernel, stride, h, w, in, out, count},
static const layer_shape layer_shapes[] = {LAYERS(LAYER_ROW)};
enum { LAYER_SHAPES = sizeof layer_shapes / sizeof layer_shapes[0] };

/* Multiplications and additions of one layer. */
static double layer_work(const layer_shape *s) {
    const double taps = s->kernel == 3 ? 9.0 : 1.0;
    return 2.0 * taps * s->in * s->out * s->h * s->w / (s->stride * s->stride);
}
