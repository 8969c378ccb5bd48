/* >>report: values of numpy 2.4 (the formulas written out in Python), and what must hold anyway. */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

static uint32_t next_byte(uint32_t *s) {
    *s = *s * 1664525u + 1013904223u;
    return *s >> 24;
}

static int near_to(double a, double b, double tol) { return fabs(a - b) <= tol * fabs(b); }

static void report_pictures(int tier) {
    (void)tier;
    unsigned char a[17 * 20 * 3], b[17 * 20 * 3], first[17 * 20], grey[17 * 20 * 2];
    uint32_t s = 1;
    double v, w;
    size_t i;
    sdq_ctx *ctx;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (i = 0; i < sizeof a; i++) a[i] = (unsigned char)next_byte(&s);
    for (i = 0; i < sizeof a; i++) b[i] = (unsigned char)((3u * a[i] + next_byte(&s)) / 4u);
    SDQT_CHECK(near_to(sdq_psnr(a, b, sizeof a), 19.804080549403672, 1e-12));
    SDQT_CHECK(sdq_psnr(a, a, sizeof a) == 99.0);
    SDQT_CHECK(sdq_ssim(ctx, a, b, 17, 20, 3, &v) == SDQ_OK && near_to(v, 0.9199754627873631, 1e-12));
    SDQT_CHECK(sdq_ssim(ctx, b, a, 17, 20, 3, &w) == SDQ_OK && near_to(w, v, 1e-14));
    SDQT_CHECK(sdq_ssim(ctx, a, a, 17, 20, 3, &v) == SDQ_OK && near_to(v, 1.0, 1e-12));
    for (i = 0; i < sizeof first; i++) {
        first[i] = a[i]; grey[2 * i] = a[i]; grey[2 * i + 1] = b[i];
    }
    SDQT_CHECK(sdq_ssim(ctx, first, b, 17, 20, 1, &v) == SDQ_OK && v < 1.0);
    SDQT_CHECK(sdq_ssim(ctx, grey, grey, 17, 20, 2, &v) == SDQ_OK && near_to(v, 1.0, 1e-12));
    SDQT_CHECK(sdq_ssim(ctx, a, b, 11, 11, 3, &v) == SDQ_OK);
    SDQT_CHECK(sdq_ssim(ctx, a, b, 10, 20, 3, &v) == SDQ_ERR_SHAPE && v == 0.0);
    sdq_ctx_free(ctx);
}

static void features(float *x, size_t n, uint32_t *s, float scale, float shift) {
    size_t i;
    for (i = 0; i < n; i++) x[i] = (float)next_byte(s) / 256.0f * scale + shift;
}

static void report_frechet(int tier) {
    (void)tier;
    float x[40 * 6], y[30 * 6];
    uint32_t s = 9;
    double v, w;
    sdq_ctx *ctx;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    features(x, 240, &s, 1.0f, 0.0f);
    features(y, 180, &s, 1.5f, 0.25f);
    SDQT_CHECK(sdq_frechet(ctx, x, 40, y, 30, 6, &v) == SDQ_OK && near_to(v, 1.7688692174662441, 1e-10));
    SDQT_CHECK(sdq_frechet(ctx, y, 30, x, 40, 6, &w) == SDQ_OK && near_to(w, v, 1e-10));
    SDQT_CHECK(sdq_frechet(ctx, x, 40, x, 40, 6, &v) == SDQ_OK && v < 1e-12);
    s = 9;                                          /* fewer vectors than numbers: singular */
    features(x, 30, &s, 1.0f, 0.0f);
    features(y, 24, &s, 1.5f, 0.25f);
    SDQT_CHECK(sdq_frechet(ctx, x, 5, y, 4, 6, &v) == SDQ_OK && near_to(v, 3.829890844779146, 1e-6));
    SDQT_CHECK(sdq_frechet(ctx, x, 5, y, 4, 1, &v) == SDQ_OK);
    SDQT_CHECK(sdq_frechet(ctx, x, 1, y, 4, 6, &v) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    x[3] = (float)NAN;
    SDQT_CHECK(sdq_frechet(ctx, x, 5, y, 4, 6, &v) == SDQ_ERR_NUMERIC && v == 0.0);
    sdq_ctx_free(ctx);
}

static void report_statistics(int tier) {
    (void)tier;
    static const double x[] = {60, 187, 62, 218, 183, 92, 127, 56, 13};
    static const double p[] = {0, 2.5, 50, 90, 100}, want[] = {13, 21.6, 92, 193.2, 218};
    double v, low, high, low2, high2;
    size_t i;
    sdq_rng r;
    sdq_ctx *ctx;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (i = 0; i < 5; i++)
        SDQT_CHECK(sdq_percentile(ctx, x, 9, p[i], &v) == SDQ_OK && near_to(v, want[i], 1e-14));
    SDQT_CHECK(sdq_percentile(ctx, x, 0, 50, &v) == SDQ_OK && v == 0);
    SDQT_CHECK(sdq_percentile(ctx, x, 9, 101, &v) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    sdq_rng_init(&r, SDQ_RNG_TORCH, 1);
    SDQT_CHECK(sdq_bootstrap(ctx, x, 9, 0, 0, &r, &low, &high) == SDQ_OK);
    /* mean 110.9, standard error of the mean 22.3: a normal interval would be 67.2 .. 154.6 */
    SDQT_CHECK(low > 62 && low < 74 && high > 148 && high < 160);
    sdq_rng_init(&r, SDQ_RNG_TORCH, 1);
    SDQT_CHECK(sdq_bootstrap(ctx, x, 9, 0, 0.95, &r, &low2, &high2) == SDQ_OK);
    SDQT_CHECK(low == low2 && high == high2);
    SDQT_CHECK(sdq_bootstrap(ctx, x, 9, 500, 0.5, &r, &low2, &high2) == SDQ_OK);
    SDQT_CHECK(low2 > low && high2 < high);
    SDQT_CHECK(sdq_bootstrap(ctx, x, 0, 0, 0, &r, &low, &high) == SDQ_ERR_ARGUMENT);
    sdq_ctx_free(ctx);
}

static void report_nearest(int tier) {
    (void)tier;
    static const float table[] = {1, 0, 0,  0, 2, 0,  -1, -1, 0,  0, 0, 0,  0, 4, 0};
    static const float q[] = {0.1f, 3, 0}, away[] = {-2, -3, 0}, none[] = {0, 0, 0};
    double c;
    SDQT_CHECK(sdq_nearest(q, table, 5, 3, &c) == 1 && near_to(c, 0.99944490, 1e-6));
    SDQT_CHECK(sdq_nearest(away, table, 5, 3, NULL) == 2);
    SDQT_CHECK(sdq_nearest(none, table, 5, 3, &c) == 0 && c == 0.0);
    SDQT_CHECK(sdq_nearest(q, table, 0, 3, &c) == 0 && c == 0.0);
}

static const sdqt_case cases[] = {
    {"report_pictures", report_pictures, 0},
    {"report_frechet", report_frechet, 0},
    {"report_statistics", report_statistics, 0},
    {"report_nearest", report_nearest, 0},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
