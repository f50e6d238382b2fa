/* A decode step in fp32: its products, its attention, and what lies between them (decode_loops.py, cpu_layers.py).

   Whatever the rows beside it, a row's sums are added up in the same order. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h> /* WIDTH, ROWS and LONGEST_HEAD are given by decode_loops.py */

#define LANES 8
#define VECTORS (WIDTH / LANES)
#define AT_ONCE 1024 /* inputs of a panel, so that it fits into a cache of 256 KiB */
#define KEYS 64      /* whose scores are held at a time */
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float *place) { Vector v; memcpy(&v, place, sizeof v); return v; }
INLINE void store(float *place, Vector v) { memcpy(place, &v, sizeof v); }

/* in a register from here on: the compiler would load it again for each use */
INLINE Vector held(Vector v) {
    __asm__("" : "+x"(v));
    return v;
}

INLINE float sum_of(Vector v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* four sums at once, to place[0] ... place[3] */
INLINE void store_sums(float *place, const Vector v[4]) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
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

/* ------------------------------------------------------------------------------------------------------------------
   x [rows, inputs] times weights [outputs, inputs], of which WIDTH outputs lie side by side: [panels, inputs, WIDTH].
   A panel stays in the cache while ROWS rows at a time pass it, their sums in registers; meanwhile the next panel is
   fetched from memory.
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    const float *x, *panel, *bias;
    float *out;
    int64_t row, inputs, outputs, columns; /* elements of a row of x, inputs at once, outputs, and those of this panel */
    int64_t stride;                        /* bytes of the next panel to fetch beside an input */
    const char *next;
} Tile;

INLINE void tile(const Tile t, const int rows, const int goes_on) {
    Vector sums[ROWS][VECTORS];
    for (int r = 0; r < rows; r++) {
        float before[WIDTH] = {0};
        const float *source = goes_on ? t.out + r * t.outputs : t.bias;
        if (source && t.columns == WIDTH) memcpy(before, source, sizeof before);
        else if (source) memcpy(before, source, 4 * t.columns);
        for (int v = 0; v < VECTORS; v++) sums[r][v] = load(before + v * LANES);
    }
    for (int64_t k = 0; k < t.inputs; k++) {
        Vector weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) weights[v] = held(load(t.panel + k * WIDTH + v * LANES));
        __builtin_prefetch(t.next + k * t.stride, 0, 2);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] += weights[v] * t.x[r * t.row + k];
    }
    for (int r = 0; r < rows; r++) {
        if (t.columns == WIDTH) memcpy(t.out + r * t.outputs, sums[r], sizeof sums[r]);
        else memcpy(t.out + r * t.outputs, sums[r], 4 * t.columns);
    }
}

static void some_rows(const Tile t, const int64_t rows, const int goes_on) {
    if (rows >= ROWS) tile(t, ROWS, goes_on);
    else if (rows == 3) tile(t, 3, goes_on);
    else if (rows == 2) tile(t, 2, goes_on);
    else tile(t, 1, goes_on);
}

void product(const float *x, const float *weights, const float *bias, float *out,
             int64_t rows, int64_t inputs, int64_t outputs) {
    const int64_t panels = rows ? (outputs + WIDTH - 1) / WIDTH : 0, blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t column = panel * WIDTH;
        for (int64_t from = 0; from < inputs; from += AT_ONCE) {
            const int64_t count = inputs - from < AT_ONCE ? inputs - from : AT_ONCE;
            const float *begin = weights + (panel * inputs + from) * WIDTH;
            const int64_t share = 4 * WIDTH * count / blocks; /* bytes that each block of rows fetches */
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t row = block * ROWS;
                some_rows((Tile){
                    .x = x + row * inputs + from, .panel = begin, .bias = bias ? bias + column : bias,
                    .out = out + row * outputs + column, .row = inputs, .inputs = count, .outputs = outputs,
                    .columns = outputs - column < WIDTH ? outputs - column : WIDTH, .stride = share / count,
                    .next = (const char *)(begin + count * WIDTH) + block * share,
                }, rows - row, from > 0);
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------
   The attention of a token a row to its prompt's keys and to its own, KEYS at a time (FlashAttention, 2205.14135).
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct { /* cpu_layers.py has the same */
    const float *query, *prompt_keys, *prompt_values, *keys, *values;
    float *out;
    const int64_t *prompts, *prompt_lengths, *slots, *places; /* of each row; its own keys end at a place of a slot */
    int64_t rows, kv_heads, repeats, dim;
    int64_t prompt_stride, prompt_head_stride, slot_stride, head_stride; /* elements */
    float scaling;
} Attention;

typedef struct {
    float most[ROWS], total[ROWS], sums[ROWS][LONGEST_HEAD];
} Softmax;

INLINE void add_values(Softmax *s, const float *values, float weights[][KEYS], const int64_t count, const int64_t dim,
                       const int heads, const int wide) {
    for (int64_t d = 0; d < dim; d += wide * LANES) {
        Vector sums[ROWS][2];
        for (int r = 0; r < heads; r++)
            for (int i = 0; i < wide; i++) sums[r][i] = load(s->sums[r] + d + i * LANES);
        for (int64_t j = 0; j < count; j++) {
            Vector value[2];
            for (int i = 0; i < wide; i++) value[i] = held(load(values + j * dim + d + i * LANES));
            for (int r = 0; r < heads; r++)
                for (int i = 0; i < wide; i++) sums[r][i] += value[i] * weights[r][j];
        }
        for (int r = 0; r < heads; r++)
            for (int i = 0; i < wide; i++) store(s->sums[r] + d + i * LANES, sums[r][i]);
    }
}

INLINE void read_keys(const Attention *a, Softmax *s, const float *query, const float *keys, const float *values,
                      const int64_t length, const int heads) {
    const int64_t dim = a->dim;
    for (int64_t from = 0; from < length; from += KEYS) {
        const int64_t count = length - from < KEYS ? length - from : KEYS;
        float scores[ROWS][KEYS];
        for (int64_t j = 0; j < count; j += 4) {
            const float *key[4];
            for (int i = 0; i < 4; i++) key[i] = keys + (from + (j + i < count ? j + i : j)) * dim;
            Vector partial[ROWS][4] = {0};
            for (int64_t d = 0; d < dim; d += LANES) {
                for (int r = 0; r < heads; r++)
                    for (int i = 0; i < 4; i++) partial[r][i] += load(key[i] + d) * load(query + r * dim + d);
                for (int i = 0; i < 4; i++) __builtin_prefetch(values + (key[i] - keys) + d, 0, 3);
            }
            for (int r = 0; r < heads; r++) store_sums(scores[r] + j, partial[r]);
        }
        for (int r = 0; r < heads; r++) {
            for (int64_t j = count; j % LANES > 0; j++) scores[r][j] = -INFINITY;
            Vector largest = (Vector){0} + s->most[r];
            for (int64_t j = 0; j < count; j += LANES) {
                store(scores[r] + j, load(scores[r] + j) * a->scaling);
                largest = larger(load(scores[r] + j), largest);
            }
            float most = largest[0];
            for (int i = 1; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
            const float kept = exponential((Vector){0} + (s->most[r] - most))[0];
            Vector total = {0};
            for (int64_t j = 0; j < count; j += LANES) {
                const Vector weights = exponential(load(scores[r] + j) - most);
                store(scores[r] + j, weights);
                total += weights; /* 1 of the largest, 1e-38 of what is behind the last */
            }
            s->most[r] = most;
            s->total[r] = s->total[r] * kept + sum_of(total);
            for (int64_t d = 0; d < dim; d += LANES) store(s->sums[r] + d, load(s->sums[r] + d) * kept);
        }
        if (dim % (2 * LANES)) add_values(s, values + from * dim, scores, count, dim, heads, 1);
        else add_values(s, values + from * dim, scores, count, dim, heads, 2);
    }
}

INLINE void attend_heads(const Attention *a, int64_t row, int64_t head, int64_t first, const int heads) {
    const int64_t place = (row * a->kv_heads + head) * a->repeats + first, dim = a->dim;
    const int64_t of_prompt = a->prompts[row] * a->prompt_stride + head * a->prompt_head_stride;
    const int64_t own = a->slots[row] * a->slot_stride + head * a->head_stride;
    const float *query = a->query + place * dim;
    Softmax s;
    for (int r = 0; r < heads; r++) {
        s.most[r] = -INFINITY;
        s.total[r] = 0;
        memset(s.sums[r], 0, 4 * dim);
    }
    const float *keys[] = {a->prompt_keys + of_prompt, a->keys + own};
    const float *values[] = {a->prompt_values + of_prompt, a->values + own};
    const int64_t lengths[] = {a->prompt_lengths[row], a->places[row] + 1};
    for (int part = 0; part < 2; part++) read_keys(a, &s, query, keys[part], values[part], lengths[part], heads);
    for (int r = 0; r < heads; r++)
        for (int64_t d = 0; d < dim; d += LANES)
            store(a->out + (place + r) * dim + d, load(s.sums[r] + d) / s.total[r]);
}

void attend(const Attention *a) {
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < a->rows * a->kv_heads; pair++)
        for (int64_t first = 0; first < a->repeats; first += ROWS) {
            const int64_t row = pair / a->kv_heads, head = pair % a->kv_heads, left = a->repeats - first;
            if (left >= ROWS) attend_heads(a, row, head, first, ROWS);
            else if (left == 3) attend_heads(a, row, head, first, 3);
            else if (left == 2) attend_heads(a, row, head, first, 2);
            else attend_heads(a, row, head, first, 1);
        }
}

/* ------------------------------------------------------------------------------------------------------------------
   Norms, positions, gated products: what layer_kernels.py has for a GPU.
   ------------------------------------------------------------------------------------------------------------------ */

INLINE float scale_of(const float *x, int64_t width, float epsilon) {
    Vector sum = {0};
    for (int64_t i = 0; i < width; i += LANES) sum += load(x + i) * load(x + i);
    return 1 / sqrtf(sum_of(sum) / width + epsilon);
}

/* hidden += update, where there is one, and its RMS norm */
void add_norm(float *hidden, const float *update, const float *weight, float *normed,
              int64_t rows, int64_t width, float epsilon) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *x = hidden + row * width;
        for (int64_t i = 0; update && i < width; i += LANES) store(x + i, load(x + i) + load(update + row * width + i));
        const float scale = scale_of(x, width, epsilon);
        for (int64_t i = 0; i < width; i += LANES) store(normed + row * width + i, load(weight + i) * (load(x + i) * scale));
    }
}

typedef struct { /* cpu_layers.py has the same */
    const float *source, *cosine, *sine, *weight; /* weight: of the norm of a head, where there is one */
    float *target;
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
            const float *x = t->source + row * t->source_row + head * dim, *cosine = t->cosine + row * dim;
            const float *sine = t->sine + row * dim;
            float *y = t->target + head * t->target_head;
            y += t->places ? t->slots[row] * t->target_row + t->places[row] * dim : row * t->target_row;
            float normed[LONGEST_HEAD];
            if (!t->cosine) {
                memcpy(y, x, 4 * dim);
                continue;
            }
            const float scale = t->weight ? scale_of(x, dim, t->epsilon) : 1;
            for (int64_t i = 0; i < dim; i++) normed[i] = t->weight ? t->weight[i] * (x[i] * scale) : x[i];
            for (int64_t i = 0; i < half; i++) {
                y[i] = normed[i] * cosine[i] - normed[half + i] * sine[i];
                y[half + i] = normed[half + i] * cosine[half + i] + normed[i] * sine[half + i];
            }
        }
}

/* silu(gate) * up, rows of both apart by `row` */
void gated(const float *gate, const float *up, float *out, int64_t rows, int64_t width, int64_t row_gate, int64_t row_up) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            const Vector x = load(gate + row * row_gate + i);
            store(out + row * width + i, x / (1 + exponential(-x)) * load(up + row * row_up + i));
        }
}
