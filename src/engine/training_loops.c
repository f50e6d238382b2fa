/* Norms and gated products of an update with their gradients, and the statistics of logits (training_loops.py).

   Sums do not depend on the number of threads. In bf16 a gradient is rounded once, at its end. */
#include "vectors.h"

#define BLOCK (64 * LANES) /* of a row, added up by itself: beside a large number many small ones would vanish */

/* x * its scale, which is kept for the gradient, * weight */
void norm(const Number *x, const Number *weight, Number *out, float *scales, int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const Number *from = x + row * width;
        const float scale = scales[row] = scale_of(from, width, epsilon);
        for (int64_t i = 0; i < width; i += LANES)
            write(out + row * width + i, read(weight + i) * rounded(read(from + i) * scale));
    }
}

/* of_weight [PARTS, width] begins with zeros; whoever called adds up the parts of the rows */
void norm_gradient(const Number *x, const Number *weight, const float *scales, const Number *of_out, Number *of_x,
                   float *of_weight, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++)
        for (int64_t row = part * rows / PARTS; row < (part + 1) * rows / PARTS; row++) {
            const Number *from = x + row * width, *slope = of_out + row * width;
            const float scale = scales[row];
            float *sums = of_weight + part * width;
            Vector along = {0};
            for (int64_t i = 0; i < width; i += LANES) {
                const Vector normed = read(from + i) * scale * read(slope + i);
                store(sums + i, load(sums + i) + normed);
                along += normed * read(weight + i);
            }
            const float mean = sum_of(along) / width * scale;
            for (int64_t i = 0; i < width; i += LANES)
                write(of_x + row * width + i, (read(slope + i) * read(weight + i) - read(from + i) * mean) * scale);
        }
}

/* gradients of silu(gate) * up by both, and the product once more */
void gated_gradient(const Number *gate, const Number *up, const Number *of_product, Number *of_gate, Number *of_up,
                    Number *product, int64_t count) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i += LANES) {
        const Vector x = read(gate + i), y = read(up + i), slope = read(of_product + i);
        const Vector share = 1 / (1 + exponential(-x)), silu = rounded(x * share);
        write(product + i, silu * y);
        write(of_up + i, slope * silu);
        write(of_gate + i, slope * y * share * (1 + x * (1 - share)));
    }
}

/* the same vector with `fill` from place `left` on; what is behind the row is not read */
INLINE Vector some(const Number *place, const int64_t left, const Number fill) {
    if (left >= LANES) return read(place);
    Number numbers[LANES];
    for (int i = 0; i < LANES; i++) numbers[i] = i < left ? place[i] : fill;
    return read(numbers);
}

INLINE Vector inside(Vector v, const int64_t left) { /* and 0 behind it */
    for (int i = 0; left < LANES && i < LANES; i++) v[i] = i < left ? v[i] : 0;
    return v;
}

/* of each row: log-prob of the target, entropy, logarithm of the sum of exponentials */
void statistics(const Number *logits, const int64_t *targets, float *chosen, float *entropy, float *normalizer,
                int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const Number *x = logits + row * width;
        Vector largest = (Vector){0} - INFINITY, sum = {0}, moment = {0};
        for (int64_t i = 0; i < width; i += LANES) largest = larger(some(x + i, width - i, x[0]), largest);
        float most = largest[0];
        for (int i = 1; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
        for (int64_t from = 0; from < width; from += BLOCK) {
            Vector some_sum = {0}, some_moment = {0};
            for (int64_t i = from; i < width && i < from + BLOCK; i += LANES) {
                const Vector below = some(x + i, width - i, x[0]) - most;
                const Vector weight = inside(exponential(below), width - i);
                some_sum += weight;
                some_moment += weight * below;
            }
            sum += some_sum;
            moment += some_moment;
        }
        const float total = sum_of(sum), rest = logf(total);
        chosen[row] = some(x + targets[row], 1, 0)[0] - most - rest;
        entropy[row] = rest - sum_of(moment) / total;
        normalizer[row] = most + rest;
    }
}

/* their gradient by the logits: of_chosen ([i is the target] - p) - of_entropy p (log p + entropy) */
void statistics_gradient(const Number *logits, const int64_t *targets, const float *normalizer, const float *entropy,
                         const float *of_chosen, const float *of_entropy, Number *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const Number *x = logits + row * width;
        const float first = of_chosen ? of_chosen[row] : 0;
        for (int64_t i = 0; i < width; i += LANES) {
            const Vector logprob = some(x + i, width - i, x[0]) - normalizer[row], p = exponential(logprob);
            Vector gradient = p * -first;
            if (of_entropy) gradient -= p * (logprob + entropy[row]) * of_entropy[row];
            const int64_t target = targets[row] - i;
            if (0 <= target && target < LANES) gradient[target] += first;
            Number numbers[LANES];
            write(numbers, gradient);
            memcpy(out + row * width + i, numbers, sizeof(Number) * (width - i < LANES ? width - i : LANES));
        }
    }
}
