/* Vectors of LANES numbers for the loops of C: fp32, or bf16 (HALF), which is computed in fp32 and rounded on its way out. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h> /* HALF, TILES, DOTS, LANES, WIDTH, ROWS, LONGEST_HEAD and PARTS are given by decode_loops.py */

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float *place) { Vector v; memcpy(&v, place, sizeof v); return v; }
INLINE void store(float *place, Vector v) { memcpy(place, &v, sizeof v); }

#if HALF
typedef uint16_t Number; /* the upper half of a float */

INLINE Integers nearest(Vector v) { /* the upper halves as numbers; ties to even, NaN stays */
    const Integers bits = (Integers)v, is_number = v == v;
    const Integers up = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff, nan = ((bits >> 16) & 0xffff) | 0x40;
    return (up & is_number) | (nan & ~is_number);
}
#if LANES == 16
typedef __m256i Halves;
INLINE Vector widened(Halves h) { return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
#ifdef __AVX512BF16__
INLINE Halves narrowed(Vector v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
#else
INLINE Halves narrowed(Vector v) { return _mm512_cvtepi32_epi16((__m512i)nearest(v)); }
#endif
#else
typedef __m128i Halves;
INLINE Vector widened(Halves h) { return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16); }
INLINE Halves narrowed(Vector v) {
    const __m256i words = (__m256i)nearest(v);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#endif
INLINE Vector read(const Number *place) { Halves h; memcpy(&h, place, sizeof h); return widened(h); }
INLINE void write(Number *place, Vector v) { const Halves h = narrowed(v); memcpy(place, &h, sizeof h); }
INLINE Vector rounded(Vector v) { return widened(narrowed(v)); }
#else
typedef float Number;
#define read load
#define write store
INLINE Vector rounded(Vector v) { return v; }
#endif

/* in a register from here on: the compiler would load it again for each use */
INLINE Vector held(Vector v) {
#if LANES == 16
    __asm__("" : "+v"(v));
#else
    __asm__("" : "+x"(v));
#endif
    return v;
}

INLINE float sum_of(Vector v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

INLINE __m256 folded(Vector v) {
#if LANES == 16
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    return (__m256)v;
#endif
}

/* four sums at once, to place[0] ... place[3] */
INLINE void store_sums(float *place, const Vector v[4]) {
    const __m256 some = _mm256_hadd_ps(folded(v[0]), folded(v[1])), others = _mm256_hadd_ps(folded(v[2]), folded(v[3]));
    const __m256 halves = _mm256_hadd_ps(some, others);
    _mm_storeu_ps(place, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

INLINE Vector larger(Vector a, Vector b) { /* of each pair, a where one is NaN */
    const Integers mask = a < b;
    return (Vector)(((Integers)b & mask) | ((Integers)a & ~mask));
}

/* e^x within two units of the last place, as in Cephes: 2^n times a polynomial; NaN stays */
INLINE Vector exponential(Vector x) {
    const Vector low = (Vector){0} - 87, high = (Vector){0} + 88, magic = (Vector){0} + 12582912;
    x = -larger(-larger(x, low), -high);
    const Vector shifted = x * 1.44269504f + magic, whole = shifted - magic; /* rounded to an integer */
    x = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    Vector y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1;
    return y * (Vector)(((Integers)shifted << 23) + 0x3f800000);
}
