/* What lies between the products of a decode step: norms, positions, gated products, as layer_kernels.py has for a GPU.

   In bf16 they round where torch's operations round. */
#include "vectors.h"

INLINE float scale_of(const Number *x, int64_t width, float epsilon) {
    Vector sum = {0};
    for (int64_t i = 0; i < width; i += LANES) sum += read(x + i) * read(x + i);
    return 1 / sqrtf(sum_of(sum) / width + epsilon);
}

/* hidden += update, where there is one, and its RMS norm */
void add_norm(Number *hidden, const Number *update, const Number *weight, Number *normed,
              int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        Number *x = hidden + row * width;
        for (int64_t i = 0; update && i < width; i += LANES) write(x + i, read(x + i) + read(update + row * width + i));
        const float scale = scale_of(x, width, epsilon);
        for (int64_t i = 0; i < width; i += LANES)
            write(normed + row * width + i, read(weight + i) * rounded(read(x + i) * scale));
    }
}

typedef struct { /* cpu_layers.py has the same */
    const Number *source, *cosine, *sine, *weight; /* weight: of the norm of a head, where there is one */
    Number *target;
    const int64_t *slots, *places; /* of each row in `target`; NULL: its own, at the beginning */
    int64_t rows, heads, dim, source_row, target_row, target_head;
    float epsilon;
} Turn;

/* heads of each row to their place in `target`, normed and turned by their position where that is asked for */
void turn(const Turn *t) {
    const int64_t dim = t->dim, half = dim / 2;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < t->rows; row++)
        for (int64_t head = 0; head < t->heads; head++) {
            const Number *x = t->source + row * t->source_row + head * dim;
            Number *y = t->target + head * t->target_head;
            y += t->places ? t->slots[row] * t->target_row + t->places[row] * dim : row * t->target_row;
            if (!t->cosine) {
                memcpy(y, x, sizeof(Number) * dim);
                continue;
            }
            float normed[2 * LONGEST_HEAD]; /* from `half` on, with minus its second half before it: partners side by side */
            const float scale = t->weight ? scale_of(x, dim, t->epsilon) : 1;
            for (int64_t i = 0; i < dim; i += LANES) {
                const Vector v = read(x + i);
                store(normed + half + i, t->weight ? rounded(read(t->weight + i) * rounded(v * scale)) : v);
            }
            for (int64_t i = 0; i < half; i++) normed[i] = -normed[dim + i];
            for (int64_t i = 0; i < dim; i += LANES) {
                const Vector along = rounded(load(normed + half + i) * read(t->cosine + row * dim + i));
                write(y + i, along + rounded(load(normed + i) * read(t->sine + row * dim + i)));
            }
        }
}

/* silu(gate) * up, rows of both apart by `row` */
void gated(const Number *gate, const Number *up, Number *out, int64_t rows, int64_t width, int64_t row_gate, int64_t row_up) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            const Vector x = read(gate + row * row_gate + i);
            write(out + row * width + i, rounded(x / (1 + exponential(-x))) * read(up + row * row_up + i));
        }
}
