/* A parameter's AdamW step in one pass over memory, in the formats of optim.py: what optim_kernel.py is on a GPU.

   The arithmetic is rounded where torch's fused AdamW rounds, with fmaf where that rounds two operations together. The
   loops over a block have a length that a compiler knows, so that it makes vectors of them. */
#include <math.h>
#include <stdint.h>
#include <string.h> /* BLOCK and PHASES are those of optim_codes.py and optim_chunks.py, given by optim_loop.py */

typedef struct { /* optim_loop.py has the same */
    void *weights, *gradients, *correction, *momentum, *variance;
    float *momentum_scale, *variance_scale;
    const int32_t *phases;
    int64_t count, start;
    float kept, new_momentum, beta2, new_variance, eps, step_size, correction2, ratio_limit, largest_root, smallest_scale;
    int32_t largest_bits, shift, short_gradients;
} Step;

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int32_t bits_of(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float limited(float x, float low, float high) { x = x < low ? low : x; return x > high ? high : x; }

/* n elements of a state or a weight, and zeros behind them, which hold up no scale; a whole block has a known length */
static inline void take(void *target, const void *source, int64_t first, int n, int size) {
    const char *place = (const char *)source + first * size;
    if (n == BLOCK) memcpy(target, place, BLOCK * size);
    else {
        memcpy(target, place, n * size);
        memset((char *)target + n * size, 0, (BLOCK - n) * size);
    }
}

static inline void put(void *target, const void *source, int64_t first, int n, int size) {
    char *place = (char *)target + first * size;
    if (n == BLOCK) memcpy(place, source, BLOCK * size);
    else memcpy(place, source, n * size);
}

/* where the phases of a block begin, for one of three uses; its dither is dithered(...), in 1/65536 of a unit */
static inline const int32_t *phases_of(const Step *s, int64_t first, int use) {
    return s->phases + (s->start + first + use * PHASES / 3) % PHASES;
}

static inline int32_t dithered(int32_t phase, int32_t shift) { return (phase + shift) & (PHASES - 1); }

/* a block's scale: its largest number, by the bits without the sign, so that NaN is above all */
static inline float scale_of(const float *x, float share, float smallest) {
    int32_t most = 0;
    for (int i = 0; i < BLOCK; i++) {
        const int32_t bits = bits_of(x[i]) & INT32_MAX;
        most = bits > most ? bits : most;
    }
    const float scale = as_float(most) * share;
    return scale < smallest ? smallest : scale;
}

static inline void as_16bit(const Step *s, void *state, const float *moment, int64_t first, int n, int use) {
    const int32_t *phases = phases_of(s, first, use), shift = s->shift;
    int16_t codes[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        codes[i] = (int16_t)(((uint32_t)bits_of(moment[i]) + (uint32_t)dithered(phases[i], shift)) >> 16);
    put(state, codes, first, n, 2);
}

/* encode_8bit of optim_codes.py, of m and the square root of v */
static inline void as_8bit(const Step *s, float *m, float *v, int64_t block, int n) {
    const int32_t *for_m = phases_of(s, block * BLOCK, 1), *for_v = phases_of(s, block * BLOCK, 2), shift = s->shift;
    uint8_t of_v[BLOCK];
    int8_t of_m[BLOCK];
    const float limit = s->ratio_limit;
    for (int i = 0; i < BLOCK; i++) v[i] = limited(sqrtf(v[i]), 0, s->largest_root);
    const float scale_v = s->variance_scale[block] = scale_of(v, (float)(1 / 254.99), s->smallest_scale);
    for (int i = 0; i < BLOCK; i++) {
        of_v[i] = (uint8_t)(int32_t)(limited(v[i] / scale_v, 1, 256) + dithered(for_v[i], shift) * (1.0f / PHASES));
        const float root = of_v[i] * scale_v; /* sqrt(sqrt(v)) as it will be decoded */
        m[i] = limited(m[i] / (root * root), -limit, limit);
    }
    const float scale_m = s->momentum_scale[block] = scale_of(m, (float)(1 / 126.99), s->smallest_scale);
    for (int i = 0; i < BLOCK; i++)
        of_m[i] = (int8_t)(int32_t)floorf(m[i] / scale_m + dithered(for_m[i], shift) * (1.0f / PHASES));
    put(s->variance, of_v, block * BLOCK, n, 1);
    put(s->momentum, of_m, block * BLOCK, n, 1);
}

/* BITS of the master, 0 where the weight is its own; STATE: bits of a moment */
static inline __attribute__((always_inline)) void step_block(
    const Step *s, const int64_t block, const int BITS, const int STATE) {
    const int64_t first = block * BLOCK;
    const int n = s->count - first < BLOCK ? (int)(s->count - first) : BLOCK;
    float master[BLOCK], gradient[BLOCK], m[BLOCK], v[BLOCK], root[BLOCK];
    int16_t weight[BLOCK], low16[BLOCK], codes_m[BLOCK], codes_v[BLOCK];
    int8_t low8[BLOCK], of_m[BLOCK];
    uint8_t of_v[BLOCK];
    const int32_t *phases = phases_of(s, first, 0), shift = s->shift;

    if (BITS == 0) take(master, s->weights, first, n, 4);
    else take(weight, s->weights, first, n, 2);
    if (BITS == 32) {
        take(low16, s->correction, first, n, 2);
        for (int i = 0; i < BLOCK; i++) master[i] = as_float(((uint32_t)weight[i] << 16) + (uint32_t)low16[i]);
    }
    if (BITS == 24) {
        take(low8, s->correction, first, n, 1);
        for (int i = 0; i < BLOCK; i++) master[i] = as_float((((uint32_t)weight[i] << 8) + (uint32_t)low8[i]) << 8);
    }
    if (s->short_gradients) {
        take(codes_m, s->gradients, first, n, 2);
        for (int i = 0; i < BLOCK; i++) gradient[i] = as_float((uint32_t)codes_m[i] << 16);
    } else take(gradient, s->gradients, first, n, 4);
    if (STATE == 32) {
        take(m, s->momentum, first, n, 4);
        take(v, s->variance, first, n, 4);
    }
    if (STATE == 16) {
        take(codes_m, s->momentum, first, n, 2);
        take(codes_v, s->variance, first, n, 2);
        for (int i = 0; i < BLOCK; i++) m[i] = as_float((uint32_t)codes_m[i] << 16);
        for (int i = 0; i < BLOCK; i++) v[i] = as_float((uint32_t)codes_v[i] << 16);
    }
    if (STATE == 8) {
        const float scale_m = s->momentum_scale[block], scale_v = s->variance_scale[block];
        take(of_m, s->momentum, first, n, 1);
        take(of_v, s->variance, first, n, 1);
        for (int i = 0; i < BLOCK; i++) {
            const float root = of_v[i] * scale_v, deviation = root * root;
            m[i] = of_m[i] * scale_m * deviation;
            v[i] = deviation * deviation;
        }
    }

    const float share = s->new_momentum;
    for (int i = 0; i < BLOCK; i++) {
        const float g = gradient[i];
        m[i] = share < 0.5f ? fmaf(share, g - m[i], m[i]) : fmaf(share - 1, g - m[i], g); /* as torch.lerp */
        v[i] = fmaf(s->new_variance * g, g, v[i] * s->beta2);
        root[i] = sqrtf(v[i]);
        const float deviation = root[i] / s->correction2 + s->eps;
        master[i] = master[i] * s->kept + -s->step_size * m[i] / deviation;
    }

    for (int i = 0; BITS > 0 && i < BLOCK; i++) {
        int32_t bits = bits_of(master[i]);
        bits = bits < s->largest_bits ? bits : s->largest_bits;
        if (BITS == 32) {
            low16[i] = (int16_t)bits;
            weight[i] = (int16_t)((bits + 32768) >> 16);
        } else {
            bits = (bits + (dithered(phases[i], shift) >> 8)) >> 8;
            low8[i] = (int8_t)bits;
            weight[i] = (int16_t)((bits + 128) >> 8);
        }
    }
    if (BITS == 0) put(s->weights, master, first, n, 4);
    else put(s->weights, weight, first, n, 2);
    if (BITS == 32) put(s->correction, low16, first, n, 2);
    if (BITS == 24) put(s->correction, low8, first, n, 1);
    if (STATE == 32) {
        put(s->momentum, m, first, n, 4);
        put(s->variance, v, first, n, 4);
    }
    if (STATE == 16) {
        as_16bit(s, s->momentum, m, first, n, 1);
        as_16bit(s, s->variance, v, first, n, 2);
    }
    if (STATE == 8) as_8bit(s, m, root, block, n);
}

#define LOOP(BITS, STATE)                                                                                              \
    if (bits == BITS && state == STATE) {                                                                              \
        _Pragma("omp parallel for schedule(static)") for (int64_t block = 0; block < blocks; block++)                  \
            step_block(s, block, BITS, STATE);                                                                         \
    }

void step(const Step *s, int bits, int state) {
    const int64_t blocks = (s->count + BLOCK - 1) / BLOCK;
    LOOP(0, 8) LOOP(24, 8) LOOP(32, 8) LOOP(0, 16) LOOP(24, 16) LOOP(32, 16) LOOP(24, 32) LOOP(32, 32) LOOP(0, 32)
}
