/* >>scheduler: timesteps, sigmas and whole trajectories against diffusers 0.39 with torch 2.8 (the
 * 130 runs of tests/golden/schedulers.safetensors and the cases below), configs, refusals, order
 * of calls. The model of all runs is 0.25 * scaled input + 0.05 * fixed. Run from the project
 * folder. */
#define SDQ_IMPLEMENTATION
#include "sdq.h"
#include "sdq_test.h"

/* Relative to the largest value of a sample. 1,848 runs compared on one machine: at worst 8.3e-6
 * (Euler ancestral) and 5.5e-6 (DDIM), where steps cancel; 1.1e-6 for the others. */
#define TOL 1e-5
#define COUNT 60        /* [1,5,3,4] */

typedef struct setup {
    sdq_ctx *ctx;
    sdq_file *file;
    float noise[COUNT], fixed[COUNT];       /* NHWC */
} setup;

/* [.,4,5,3] as torch stores it -> [.,5,3,4] */
static void to_nhwc(const float *x, float *y) {
    size_t c, p;
    for (c = 0; c < 4; c++) for (p = 0; p < 15; p++) y[p * 4 + c] = x[c * 15 + p];
}

static const float *golden(const setup *u, const char *run, const char *what, size_t *n) {
    char name[96];
    const sdq_entry *e;
    (void)snprintf(name, sizeof name, "%s%s", run, what);
    e = sdq_file_find(u->file, name);
    *n = e ? sdq_entry_count(e) : 0;
    return e ? (const float *)e->data : NULL;
}

static void open_all(setup *u) {
    size_t n;
    const float *noise, *fixed;
    memset(u, 0, sizeof *u);
    SDQT_CHECK(sdq_ctx_create(NULL, &u->ctx) == SDQ_OK);
    SDQT_CHECK(sdq_file_open(u->ctx, "tests/golden/schedulers.safetensors", &u->file) == SDQ_OK);
    noise = golden(u, "", "noise", &n);
    fixed = golden(u, "", "fixed", &n);
    SDQT_CHECK(noise && fixed);
    if (noise) to_nhwc(noise, u->noise);
    if (fixed) to_nhwc(fixed, u->fixed);
}

static void close_all(setup *u) {
    sdq_file_close(u->ctx, u->file);
    sdq_ctx_free(u->ctx);
}

static double distance(const float *a, const float *b, size_t n) {
    double most = 1e-30, diff = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - (double)b[i]);
        if (!(d <= diff)) diff = d;
        if (fabs((double)b[i]) > most) most = fabs((double)b[i]);
    }
    return diff / most;
}

/* A whole run from seed 7; every sample in samples [count,60] if not NULL, the last one in x. */
static void run_all(const setup *u, sdq_scheduler *s, float *x, float *samples) {
    float in[COUNT], eps[COUNT];
    size_t i, j;
    sdq_rng rng;
    sdq_rng_init(&rng, SDQ_RNG_TORCH, 7);
    for (j = 0; j < COUNT; j++) x[j] = u->noise[j] * sdq_scheduler_init_sigma(s);
    for (i = 0; i < sdq_scheduler_count(s); i++) {
        sdq_scheduler_scale_input(s, i, x, in, COUNT);
        for (j = 0; j < COUNT; j++) eps[j] = 0.25f * in[j] + 0.05f * u->fixed[j];
        SDQT_CHECK(sdq_scheduler_step(u->ctx, s, i, eps, x, x, 1, 5, 3, 4, &rng) == SDQ_OK);
        if (samples) memcpy(samples + i * COUNT, x, sizeof eps);
    }
}

static int compare_run(const setup *u, const char *run, sdq_scheduler *s) {
    static float samples[51 * COUNT];
    float x[COUNT], want[COUNT];
    size_t n, i, count = sdq_scheduler_count(s);
    const float *g = golden(u, run, "/timesteps", &n);
    int good = g && n == count && count <= 51;
    for (i = 0; good && i < n; i++)
        good = fabs((double)sdq_scheduler_timestep(s, i) - (double)g[i]) <= 1e-3;
    g = golden(u, run, "/init_noise_sigma", &n);
    good = good && g && fabs((double)(sdq_scheduler_init_sigma(s) / g[0]) - 1) < 1e-6;
    g = golden(u, run, "/sigmas", &n);
    for (i = 0; good && g && i < n; i++)
        good = fabs((double)sdq_scheduler_sigma(s, i) - (double)g[i]) <= 2e-7 * (double)g[0];
    g = golden(u, run, "/samples", &n);
    if (!good || !g || n != count * COUNT) return 0;
    run_all(u, s, x, samples);
    for (i = 0; good && i < count; i++) {
        to_nhwc(g + i * COUNT, want);
        good = distance(samples + i * COUNT, want, COUNT) <= TOL;
    }
    return good;
}

static void scheduler_golden(int tier) {
    (void)tier;
    static const char *const names[] = {"pndm", "ddim", "euler", "euler_a", "dpmpp2m",
                                        "dpmpp2m_karras", "lcm"};
    static const char *const forms[] = {"epsilon/leading", "epsilon/linspace", "epsilon/trailing",
                                        "v_prediction/leading"};
    static const sdq_spacing spacing[] = {SDQ_SPACING_LEADING, SDQ_SPACING_LINSPACE,
                                          SDQ_SPACING_TRAILING, SDQ_SPACING_LEADING};
    static const size_t steps[] = {4, 10, 20, 25, 50};
    size_t k, f, n, runs = 0;
    setup u;
    open_all(&u);
    for (k = 0; u.file && k < 7; k++) for (f = 0; f < 4; f++) for (n = 0; n < 5; n++) {
        char run[64];
        sdq_scheduler_desc d;
        sdq_scheduler *s;
        if (k == 6 && (f == 1 || f == 2)) continue;
        memset(&d, 0, sizeof d);
        d.kind = k == 5 ? SDQ_DPMPP_2M : sdq_scheduler_kind_from_name(names[k]);
        d.karras = k == 5;
        d.steps = steps[n];
        d.spacing = spacing[f];
        d.prediction = f == 3 ? SDQ_PREDICT_V : SDQ_PREDICT_EPSILON;
        (void)snprintf(run, sizeof run, "%s/%s/%zu", names[k], forms[f], steps[n]);
        SDQT_CHECK(sdq_scheduler_create(u.ctx, &d, &s) == SDQ_OK);
        if (s) {
            const int good = compare_run(&u, run, s);
            if (!good) printf("    %s\n", run);
            SDQT_CHECK(good);
            runs++;
        }
        sdq_scheduler_free(u.ctx, s);
    }
    SDQT_CHECK(runs == 130);
    close_all(&u);
}

typedef struct row {
    sdq_scheduler_kind kind;
    sdq_prediction prediction;
    sdq_spacing spacing;
    int steps, karras, sigma_min;
    double eta;
    int count;
    float time[2];      /* first, last */
    float at[3];        /* final sample, torch's element 0, 29, 59 */
    double clip, scaling;
    int to_one, linear, no_lower, euler_last;
} row;

/* Stable Diffusion 1.5's config without timestep_spacing where that is DEFAULT; diffusers 0.39. */
static const row rows[] = {
    {SDQ_PNDM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 0, 0, 0, 1,
     {1.0f, 1.0f}, {-0.502892315f, -1.14868999f, 0.209446982f}, 0, 0, 0, 0, 0, 0},
    {SDQ_PNDM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 2, 0, 0, 0, 3,
     {501.0f, 1.0f}, {-0.697882354f, -1.68613243f, 0.366673142f}, 0, 0, 0, 0, 0, 0},
    {SDQ_PNDM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 3, 0, 0, 0, 4,
     {667.0f, 1.0f}, {-0.939392865f, -2.29982209f, 0.518489718f}, 0, 0, 0, 0, 0, 0},
    {SDQ_PNDM, SDQ_PREDICT_V, SDQ_SPACING_TRAILING, 7, 0, 0, 0, 8,
     {999.0f, 142.0f}, {-0.279199451f, -0.71878922f, 0.183213174f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 0, 0, 0, 1,
     {1.0f, 1.0f}, {-0.502892375f, -1.14868999f, 0.209446982f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 2, 0, 0, 0, 2,
     {501.0f, 1.0f}, {-0.746279836f, -1.81952834f, 0.405697495f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 3, 0, 0, 0, 3,
     {667.0f, 1.0f}, {-1.07068169f, -2.63139415f, 0.599335849f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_V, SDQ_SPACING_TRAILING, 7, 0, 0, 0, 7,
     {999.0f, 142.0f}, {-0.274649411f, -0.710081637f, 0.182710037f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_SAMPLE, SDQ_SPACING_DEFAULT, 6, 0, 0, 0, 6,
     {831.0f, 1.0f}, {-0.0909121633f, -0.116981603f, -0.0370161198f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 0, 0, 0, 1,
     {0.0f, 0.0f}, {-0.0143587664f, -0.0349056982f, 0.00772086158f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 2, 0, 0, 0, 2,
     {999.0f, 0.0f}, {-5.37423801f, -13.3272648f, 3.1066916f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 3, 0, 0, 0, 3,
     {999.0f, 0.0f}, {-4.40638924f, -10.9212437f, 2.54232717f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_V, SDQ_SPACING_TRAILING, 7, 0, 0, 0, 7,
     {999.0f, 142.0f}, {-0.266852349f, -0.693307877f, 0.180318058f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_SAMPLE, SDQ_SPACING_DEFAULT, 6, 0, 0, 0, 6,
     {999.0f, 0.0f}, {-0.0368244648f, 0.0114436597f, -0.0635726303f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 1, 0, 0, 1,
     {0.0f, 0.0f}, {-0.0143587664f, -0.0349056982f, 0.00772086158f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_LEADING, 2, 1, 0, 0, 2,
     {501.0f, 1.00000012f}, {-0.740897f, -1.80858207f, 0.404569685f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_LINSPACE, 5, 1, 1, 0, 5,
     {999.0f, 0.0f}, {-3.92373586f, -9.71731472f, 2.25751734f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 20, 1, 0, 0, 20,
     {999.0f, 0.0f}, {-3.27402806f, -8.10237122f, 1.87882566f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_EPSILON, SDQ_SPACING_TRAILING, 20, 1, 1, 0, 20,
     {999.0f, 49.0f}, {-3.25603533f, -8.05524635f, 1.86635792f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_V, SDQ_SPACING_LINSPACE, 9, 0, 1, 0, 9,
     {999.0f, 0.0f}, {-0.280669421f, -0.724825442f, 0.186037302f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER, SDQ_PREDICT_V, SDQ_SPACING_LEADING, 16, 1, 1, 0, 16,
     {931.0f, 1.00000012f}, {-0.310065567f, -0.79379195f, 0.199783757f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER_A, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 0, 0, 0, 1,
     {0.0f, 0.0f}, {-0.0143587664f, -0.0349056982f, 0.00772086158f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER_A, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 2, 0, 0, 0, 2,
     {999.0f, 0.0f}, {-5.39410925f, -13.301013f, 3.10266042f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER_A, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 3, 0, 0, 0, 3,
     {999.0f, 0.0f}, {-5.27454281f, -9.70789909f, 2.35878253f}, 0, 0, 0, 0, 0, 0},
    {SDQ_EULER_A, SDQ_PREDICT_V, SDQ_SPACING_TRAILING, 7, 0, 0, 0, 7,
     {999.0f, 142.0f}, {0.0292698406f, -1.02393246f, -0.548982501f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 0, 0, 0, 1,
     {999.0f, 999.0f}, {-5.42296505f, -13.4462557f, 3.13333535f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 2, 0, 0, 0, 2,
     {999.0f, 500.0f}, {-4.42741871f, -10.9718714f, 2.55322599f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 3, 0, 0, 0, 3,
     {999.0f, 333.0f}, {-3.82457042f, -9.47282887f, 2.20137334f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_V, SDQ_SPACING_TRAILING, 7, 0, 0, 0, 7,
     {999.0f, 142.0f}, {-0.301668853f, -0.774116039f, 0.195876867f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_SAMPLE, SDQ_SPACING_DEFAULT, 6, 0, 0, 0, 6,
     {999.0f, 166.0f}, {-0.0904914811f, -0.115023583f, -0.0380147472f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 1, 0, 0, 1,
     {999.0f, 999.0f}, {-5.42296505f, -13.4462557f, 3.13333535f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_LEADING, 2, 1, 0, 0, 2,
     {999.0f, 0.0f}, {-5.38708639f, -13.3565922f, 3.11202407f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_LINSPACE, 5, 1, 1, 0, 5,
     {999.0f, 0.0f}, {-2.9360199f, -7.25905228f, 1.67921293f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 20, 1, 0, 0, 20,
     {999.0f, 0.0f}, {-3.09644794f, -7.65834236f, 1.77315044f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_TRAILING, 20, 1, 1, 0, 20,
     {999.0f, 0.0f}, {-3.11810184f, -7.70970392f, 1.78373802f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_V, SDQ_SPACING_LINSPACE, 9, 0, 1, 0, 9,
     {999.0f, 111.0f}, {-0.319744796f, -0.816212118f, 0.204072237f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_V, SDQ_SPACING_LEADING, 16, 1, 1, 0, 16,
     {999.0f, 0.0f}, {-0.347992361f, -0.884901464f, 0.219278172f}, 0, 0, 0, 0, 0, 0},
    {SDQ_LCM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 1, 0, 0, 0, 1,
     {999.0f, 999.0f}, {-5.42296505f, -13.4462557f, 3.13333535f}, 0, 0, 0, 0, 0, 0},
    {SDQ_LCM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 2, 0, 0, 0, 2,
     {999.0f, 499.0f}, {-5.29898262f, -9.820261f, 2.37657285f}, 0, 0, 0, 0, 0, 0},
    {SDQ_LCM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 3, 0, 0, 0, 3,
     {999.0f, 339.0f}, {-5.26998806f, -5.86130142f, 1.94812846f}, 0, 0, 0, 0, 0, 0},
    {SDQ_LCM, SDQ_PREDICT_V, SDQ_SPACING_DEFAULT, 7, 0, 0, 0, 7,
     {999.0f, 159.0f}, {0.160571501f, -0.841666877f, -0.441402733f}, 0, 0, 0, 0, 0, 0},
    {SDQ_LCM, SDQ_PREDICT_SAMPLE, SDQ_SPACING_DEFAULT, 6, 0, 0, 0, 6,
     {999.0f, 179.0f}, {0.0614810474f, -0.0080373995f, -0.251396894f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_EPSILON, SDQ_SPACING_LEADING, 9, 0, 0, 0.7, 9,
     {889.0f, 1.0f}, {-3.02668881f, -3.77856827f, 0.159529194f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_V, SDQ_SPACING_LINSPACE, 9, 0, 0, 1, 9,
     {999.0f, 0.0f}, {0.229777351f, -0.734561801f, -0.612321436f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_LEADING, 13, 0, 1, 0, 13,
     {924.0f, 72.0f}, {-2.28575039f, -5.64529324f, 1.30232584f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_LEADING, 14, 0, 1, 0, 14,
     {925.0f, 67.0f}, {-2.29300833f, -5.66323614f, 1.30647588f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_LEADING, 15, 0, 1, 0, 15,
     {931.0f, 63.0f}, {-2.34174705f, -5.78220463f, 1.33308554f}, 0, 0, 0, 0, 0, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_V, SDQ_SPACING_DEFAULT, 6, 0, 1, 0, 6,
     {999.0f, 166.0f}, {-0.448069572f, -1.12025189f, 0.266538888f}, 0, 0, 0, 0, 1, 0},
    {SDQ_DPMPP_2M, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 17, 0, 1, 0, 17,
     {999.0f, 59.0f}, {-18.834404f, -46.6912231f, 10.8751097f}, 0, 0, 0, 1, 0, 1},
    {SDQ_DDIM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 8, 0, 0, 0, 8,
     {876.0f, 1.0f}, {-0.838284552f, -0.884767056f, 0.78744173f}, 1, 0, 0, 0, 0, 0},
    {SDQ_DDIM, SDQ_PREDICT_V, SDQ_SPACING_TRAILING, 5, 0, 0, 0.5, 5,
     {999.0f, 199.0f}, {-0.346780896f, -0.5f, -0.0186873823f}, 0.5, 0, 1, 1, 0, 0},
    {SDQ_LCM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 5, 0, 0, 0, 5,
     {999.0f, 199.0f}, {-0.960118711f, -1.12371397f, 0.124191627f}, 0.75, 0.001, 0, 0, 0, 0},
    {SDQ_PNDM, SDQ_PREDICT_EPSILON, SDQ_SPACING_DEFAULT, 6, 0, 0, 0, 7,
     {831.0f, 1.0f}, {-5.1311717f, -12.7054892f, 2.95048618f}, 0, 0, 1, 1, 0, 0}
};

static void scheduler_cases(int tier) {
    (void)tier;
    size_t i;
    setup u;
    open_all(&u);
    for (i = 0; u.file && i < SDQ__COUNT(rows); i++) {
        const row *r = &rows[i];
        float x[COUNT], got[3];
        sdq_scheduler_desc d;
        sdq_scheduler *s;
        memset(&d, 0, sizeof d);
        d.kind = r->kind;
        d.prediction = r->prediction;
        d.spacing = r->spacing;
        d.steps = (size_t)r->steps;
        d.karras = r->karras;
        d.final_sigma_min = r->sigma_min;
        d.eta = r->eta;
        d.clip_sample = r->clip > 0;
        d.clip_range = r->clip;
        d.timestep_scaling = r->scaling;
        d.alpha_to_one = r->to_one;
        d.no_lower_order_final = r->no_lower;
        d.euler_at_final = r->euler_last;
        d.beta_schedule = r->linear ? SDQ_BETA_LINEAR : SDQ_BETA_SCALED_LINEAR;
        d.beta_start = r->linear ? 0.0001 : 0;
        d.beta_end = r->linear ? 0.02 : 0;
        SDQT_CHECK(sdq_scheduler_create(u.ctx, &d, &s) == SDQ_OK);
        if (!s) continue;
        SDQT_CHECK(sdq_scheduler_count(s) == (size_t)r->count);
        SDQT_CHECK(fabs((double)(sdq_scheduler_timestep(s, 0) - r->time[0])) < 1e-3);
        SDQT_CHECK(fabs((double)(sdq_scheduler_timestep(s, (size_t)r->count - 1) - r->time[1])) < 1e-3);
        run_all(&u, s, x, NULL);
        got[0] = x[0]; got[1] = x[14 * 4 + 1]; got[2] = x[59];  /* 29 is c 1, pixel 14 */
        if (!(distance(got, r->at, 3) <= TOL)) printf("    row %zu\n", i);
        SDQT_CHECK(distance(got, r->at, 3) <= TOL);
        sdq_scheduler_reset(s);                                 /* a second run is the same */
        run_all(&u, s, x, NULL);
        SDQT_CHECK(x[0] == got[0] && x[59] == got[2]);
        sdq_scheduler_free(u.ctx, s);
    }
    close_all(&u);
}

static void scheduler_training(int tier) {
    (void)tier;
    setup u;
    sdq_scheduler *s;
    const float *g, *x, *noise, *velocity;
    float y[24], e[10];
    static const float embed[] = {
        -0.04478474f, 0.30481133f, 0.82682866f, 0.21511953f, 0.60518634f,
        -0.99899668f, -0.95241278f, -0.56245387f, 0.97658771f, 0.79608387f};
    static const size_t t[] = {0, 1, 499, 981, 999};
    size_t n, i;
    open_all(&u);
    SDQT_CHECK(sdq_scheduler_create(u.ctx, NULL, &s) == SDQ_OK);
    g = golden(&u, "", "alphas_cumprod", &n);
    SDQT_CHECK(g && n == 1000 && memcmp(g, sdq_scheduler_alphas_cumprod(s), 4000) == 0);
    x = golden(&u, "", "add_noise/x", &n);
    noise = golden(&u, "", "add_noise/noise", &n);
    velocity = golden(&u, "", "add_noise/velocity", &n);
    g = golden(&u, "", "add_noise/y", &n);
    SDQT_CHECK(x && noise && velocity && g && n == 5 * 24);
    for (i = 0; g && velocity && i < 5; i++) {
        sdq_scheduler_add_noise(s, t[i], x + i * 24, noise + i * 24, y, 24);
        SDQT_CHECK(distance(y, g + i * 24, 24) < 2e-7);
        sdq_scheduler_velocity(s, t[i], x + i * 24, noise + i * 24, y, 24);
        SDQT_CHECK(distance(y, velocity + i * 24, 24) < 2e-7);
    }
    SDQT_CHECK(fabs(sdq_scheduler_snr_weight(s, 0, 5.0) * 1175.440361825959 / 5.0 - 1) < 1e-9);
    SDQT_CHECK(sdq_scheduler_snr_weight(s, 999, 5.0) == 1.0 && sdq_scheduler_snr_weight(s, 5, 0) == 1.0);
    sdq_guidance_embedding(7.5, e, 10);
    SDQT_CHECK(distance(e, embed, 10) < 1.8e-7);     /* measured 6e-8 */
    SDQT_CHECK(sdq_scheduler_first(s, 0.75) == 13 && sdq_scheduler_first(s, 1.0) == 0);
    SDQT_CHECK(sdq_scheduler_first(s, 0.0) == 50);
    sdq_scheduler_free(u.ctx, s);
    close_all(&u);
}

static sdq_status read_json(sdq_ctx *ctx, const char *text, sdq_scheduler_kind kind,
                            sdq_scheduler_desc *d) {
    sdq_clear_error(ctx);
    return sdq_scheduler_desc_from_json(ctx, text, strlen(text), NULL, kind, d);
}

/* The file of Stable Diffusion 1.5, and what diffusers makes of it for other classes. */
static void scheduler_json(int tier) {
    (void)tier;
    static const char sd15[] =
        "{\"_class_name\": \"PNDMScheduler\", \"_diffusers_version\": \"0.6.0\","
        "\"beta_end\": 0.012, \"beta_schedule\": \"scaled_linear\", \"beta_start\": 0.00085,"
        "\"num_train_timesteps\": 1000, \"set_alpha_to_one\": false, \"skip_prk_steps\": true,"
        "\"steps_offset\": 1, \"trained_betas\": null, \"clip_sample\": false}";
    sdq_ctx *ctx;
    sdq_scheduler_desc d;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    SDQT_CHECK(read_json(ctx, sd15, SDQ_SCHEDULER_DEFAULT, &d) == SDQ_OK);
    SDQT_CHECK(d.kind == SDQ_PNDM && d.beta_start == 0.00085 && d.beta_end == 0.012);
    SDQT_CHECK(d.steps_offset == 1 && !d.alpha_to_one && d.beta_schedule == SDQ_BETA_SCALED_LINEAR);
    SDQT_CHECK(read_json(ctx, sd15, SDQ_EULER, &d) == SDQ_OK);
    SDQT_CHECK(d.kind == SDQ_EULER && d.spacing == SDQ_SPACING_DEFAULT);     /* linspace */
    SDQT_CHECK(read_json(ctx, "{\"_class_name\":\"DDIMScheduler\"}", SDQ_SCHEDULER_DEFAULT, &d)
          == SDQ_OK);
    SDQT_CHECK(d.kind == SDQ_DDIM && d.alpha_to_one && d.clip_sample && d.steps_offset == -1);
    SDQT_CHECK(d.beta_start == 0.0001 && d.beta_schedule == SDQ_BETA_LINEAR);
    SDQT_CHECK(read_json(ctx, "{\"_class_name\":\"LCMScheduler\",\"original_inference_steps\":25}",
                    SDQ_SCHEDULER_DEFAULT, &d) == SDQ_OK);
    SDQT_CHECK(d.lcm_steps == 25 && d.beta_schedule == SDQ_BETA_SCALED_LINEAR && !d.clip_sample);
    /* diffusers itself writes -Infinity */
    SDQT_CHECK(read_json(ctx, "{\"_class_name\":\"DPMSolverMultistepScheduler\",\"solver_order\":2,"
                    "\"lambda_min_clipped\": -Infinity, \"use_karras_sigmas\":true,"
                    "\"algorithm_type\":\"dpmsolver++\",\"final_sigmas_type\":\"sigma_min\","
                    "\"timestep_spacing\":\"trailing\",\"prediction_type\":\"v_prediction\"}",
                    SDQ_SCHEDULER_DEFAULT, &d) == SDQ_OK);
    SDQT_CHECK(d.karras && d.final_sigma_min && d.spacing == SDQ_SPACING_TRAILING);
    SDQT_CHECK(d.prediction == SDQ_PREDICT_V);
    sdq_ctx_free(ctx);
}

static void scheduler_refused(int tier) {
    (void)tier;
    static const struct { const char *text; sdq_scheduler_kind kind; const char *key; } cases[] = {
        {"{\"skip_prk_steps\":false}", SDQ_PNDM, "skip_prk_steps"},
        {"{}", SDQ_PNDM, "skip_prk_steps"},
        {"{}", SDQ_SCHEDULER_DEFAULT, "_class_name"},
        {"{\"_class_name\":\"UniPCMultistepScheduler\"}", SDQ_SCHEDULER_DEFAULT, "UniPC"},
        {"{\"trained_betas\":[0.1]}", SDQ_DDIM, "trained_betas"},
        {"{\"thresholding\":true}", SDQ_DPMPP_2M, "thresholding"},
        {"{\"rescale_betas_zero_snr\":true}", SDQ_EULER, "rescale_betas_zero_snr"},
        {"{\"beta_schedule\":\"squaredcos_cap_v2\"}", SDQ_LCM, "beta_schedule"},
        {"{\"solver_order\":3}", SDQ_DPMPP_2M, "solver_order"},
        {"{\"solver_type\":\"heun\"}", SDQ_DPMPP_2M, "solver_type"},
        {"{\"algorithm_type\":\"sde-dpmsolver++\"}", SDQ_DPMPP_2M, "algorithm_type"},
        {"{\"interpolation_type\":\"log_linear\"}", SDQ_EULER, "interpolation_type"},
        {"{\"use_exponential_sigmas\":true}", SDQ_EULER, "use_exponential_sigmas"},
        {"{\"sigma_max\":10}", SDQ_EULER, "sigma_max"},
        {"{\"num_train_timesteps\":0}", SDQ_EULER, "num_train_timesteps"},
        {"{\"beta_start\":\"x\"}", SDQ_EULER, "beta_start"},
        {"{\"use_karras_sigmas\":\"no\"}", SDQ_EULER, "use_karras_sigmas"},
        {"{\"_class_name\":\"DEISMultistepScheduler\"}", SDQ_SCHEDULER_DEFAULT, "choose another"},
        {"{\"timestep_spacing\":3}", SDQ_EULER, "timestep_spacing"},
        {"[]", SDQ_EULER, "object"},
        {"", SDQ_EULER, "JSON"},
        {"{\"a\":-Infinit}", SDQ_EULER, "JSON"}};
    sdq_scheduler_desc d;
    sdq_ctx *ctx;
    size_t i;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (i = 0; i < SDQ__COUNT(cases); i++) {
        SDQT_CHECK(read_json(ctx, cases[i].text, cases[i].kind, &d) != SDQ_OK);
        if (!strstr(sdq_error_text(ctx), cases[i].key)) printf("    %s\n", sdq_error_text(ctx));
        SDQT_CHECK(strstr(sdq_error_text(ctx), cases[i].key) != NULL);
    }
    /* truths as Python takes them */
    SDQT_CHECK(read_json(ctx, "{\"use_karras_sigmas\":1}", SDQ_EULER, &d) == SDQ_OK && d.karras);
    SDQT_CHECK(read_json(ctx, "{\"lower_order_final\":null}", SDQ_DPMPP_2M, &d) == SDQ_OK
               && d.no_lower_order_final);
    SDQT_CHECK(read_json(ctx, "{\"set_alpha_to_one\":0}", SDQ_DDIM, &d) == SDQ_OK
               && !d.alpha_to_one);
    /* what another class knows does not matter */
    SDQT_CHECK(read_json(ctx, "{\"thresholding\":true,\"solver_order\":3}", SDQ_EULER, &d) == SDQ_OK);
    sdq_ctx_free(ctx);
}

/* What StableDiffusionPipeline makes of a configuration, by the rules of diffusers 0.39. */
static void scheduler_adopted(int tier) {
    static const struct {
        const char *text;
        sdq_scheduler_kind kind;
        int offset, clip, changed;      /* offset -1: none */
    } cases[] = {
        {"{\"_class_name\":\"DDIMScheduler\",\"steps_offset\":1,\"clip_sample\":false}", SDQ_DDIM, 1, 0, 0},
        {"{\"_class_name\":\"DDIMScheduler\"}", SDQ_DDIM, 1, 0, 1},
        {"{\"_class_name\":\"DDIMScheduler\",\"steps_offset\":3,\"clip_sample\":true}", SDQ_DDIM, 1, 0, 1},
        {"{\"_class_name\":\"PNDMScheduler\"}", SDQ_DDIM, -1, 1, 0},    /* DDIM's own defaults */
        {"{\"_class_name\":\"PNDMScheduler\",\"steps_offset\":0,\"clip_sample\":true}", SDQ_DDIM, 1, 0, 1},
        {"{\"_class_name\":\"UniPCMultistepScheduler\"}", SDQ_LCM, -1, 0, 0}};
    sdq_scheduler_desc d;
    sdq_ctx *ctx;
    size_t i;
    (void)tier;
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    for (i = 0; i < SDQ__COUNT(cases); i++) {
        int changed = -1;
        SDQT_CHECK(sdq__sch_from_json(ctx, cases[i].text, strlen(cases[i].text), "s.json", NULL,
                                      cases[i].kind, &changed, &d) == SDQ_OK);
        SDQT_THAT(d.steps_offset == cases[i].offset && d.clip_sample == cases[i].clip
                  && changed == cases[i].changed, "case %zu: offset %d clip %d changed %d", i,
                  d.steps_offset, d.clip_sample, changed);
    }
    sdq_ctx_free(ctx);
}

static int refused(sdq_ctx *ctx, const sdq_scheduler_desc *d) {
    sdq_scheduler *s;
    const sdq_status st = sdq_scheduler_create(ctx, d, &s);
    sdq_clear_error(ctx);
    if (s) sdq_scheduler_free(ctx, s);
    return st != SDQ_OK && !s;
}

static void scheduler_arguments(int tier) {
    (void)tier;
    float x[COUNT], y[COUNT];
    sdq_scheduler_desc d;
    sdq_scheduler *s;
    sdq_ctx *ctx;
    int overruns = 0;
    memset(x, 0, sizeof x);
    SDQT_CHECK(sdq_ctx_create(NULL, &ctx) == SDQ_OK);
    memset(&d, 0, sizeof d); d.steps = 1001; SDQT_CHECK(refused(ctx, &d));
    memset(&d, 0, sizeof d); d.steps = 1000; SDQT_CHECK(refused(ctx, &d));   /* 999 + offset 1 */
    d.steps_offset = -1; SDQT_CHECK(!refused(ctx, &d));
    memset(&d, 0, sizeof d); d.prediction = SDQ_PREDICT_SAMPLE; SDQT_CHECK(refused(ctx, &d));
    memset(&d, 0, sizeof d); d.kind = SDQ_LCM; d.steps = 51; SDQT_CHECK(refused(ctx, &d));
    memset(&d, 0, sizeof d); d.beta_start = -1; SDQT_CHECK(refused(ctx, &d));
    memset(&d, 0, sizeof d); d.train_steps = 1; SDQT_CHECK(refused(ctx, &d));
    memset(&d, 0, sizeof d); d.eta = (double)NAN; SDQT_CHECK(refused(ctx, &d));
    memset(&d, 0, sizeof d); d.kind = SDQ_DDIM; d.spacing = SDQ_SPACING_TRAILING;
    for (d.steps = 1; d.steps <= 1000; d.steps++) overruns += refused(ctx, &d);
    SDQT_CHECK(overruns == 62);                 /* where numpy makes one too many, ending at -1 */
    d.steps = 61; SDQT_CHECK(refused(ctx, &d));
    d.kind = SDQ_LCM; d.steps = 4; SDQT_CHECK(!refused(ctx, &d));
    memset(&d, 0, sizeof d); d.kind = SDQ_EULER_A; d.steps = 3;
    SDQT_CHECK(sdq_scheduler_create(ctx, &d, &s) == SDQ_OK);
    SDQT_CHECK(sdq_scheduler_step(ctx, s, 0, x, x, y, 1, 5, 3, 4, NULL) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    sdq_scheduler_free(ctx, s);
    SDQT_CHECK(sdq_scheduler_create(ctx, NULL, &s) == SDQ_OK);
    SDQT_CHECK(sdq_scheduler_step(ctx, s, 51, x, x, y, 1, 5, 3, 4, NULL) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_scheduler_step(ctx, s, 0, x, x, y, SIZE_MAX, 5, 3, 4, NULL) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_scheduler_step(ctx, s, 20, x, x, y, 1, 5, 3, 4, NULL) == SDQ_OK);
    SDQT_CHECK(sdq_scheduler_step(ctx, s, 22, x, x, y, 1, 5, 3, 4, NULL) == SDQ_ERR_ARGUMENT);
    sdq_clear_error(ctx);
    SDQT_CHECK(sdq_scheduler_step(ctx, s, 21, x, x, y, 1, 3, 5, 4, NULL) == SDQ_ERR_SHAPE);
    sdq_clear_error(ctx);
    sdq_scheduler_reset(s);
    SDQT_CHECK(sdq_scheduler_step(ctx, s, 7, x, x, y, 1, 2, 2, 4, NULL) == SDQ_OK);
    sdq_scheduler_free(ctx, s);
    sdq_scheduler_free(ctx, NULL);
    sdq_ctx_free(ctx);
}

static const sdqt_case cases[] = {
    {"scheduler_golden", scheduler_golden, 0},
    {"scheduler_cases", scheduler_cases, 0},
    {"scheduler_training", scheduler_training, 0},
    {"scheduler_json", scheduler_json, 0},
    {"scheduler_refused", scheduler_refused, 0},
    {"scheduler_adopted", scheduler_adopted, 0},
    {"scheduler_arguments", scheduler_arguments, 0},
};
int main(int argc, char **argv) { return SDQT_MAIN(argc, argv, cases); }
