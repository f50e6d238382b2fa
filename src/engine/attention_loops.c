/* Attention of a packed row with its gradient (attention_loops.py): rows are read and written where they lie.

   A group shares keys before its own: some completions their prompt's; a prompt is alone, and so is what all prompts begin
   with. A thread does a key-value head of a group at a time, in fp32, and what groups give to keys that they share is added
   up in their order: nothing depends on the number of threads. */
#include "vectors.h"

#define QUERIES 64 /* at once, with the weights of all their keys */
#define STEP 3     /* vectors */

typedef struct { /* attention_loops.py has the same */
    const Number *query, *key, *value, *out, *of_out; /* [tokens, heads, dim] each */
    Number *target;                                   /* `out` of a forward pass, gradient of the query of a backward */
    float *of_key, *of_value, *normalizer;            /* [tokens, kv heads, dim] twice, [tokens, heads] */
    float *shared;                                    /* [groups, kv heads, 2, most shared, dim] */
    const int64_t *groups, *prompts, *prompt_lengths; /* first segment of each group, and the prompt that it shares */
    const int64_t *starts, *lengths;                  /* of each segment */
    int64_t count, first, most, kv_heads, repeats, dim, longest; /* groups, tokens that all begin with, most keys */
    int64_t row_query, row_key, row_value;            /* elements between tokens */
    float scaling;
} Packed;

typedef struct { /* of a thread; keys are rows of `dim`, or columns of `wide` */
    float *keys, *values, *key_columns, *value_columns, *of_keys, *of_values, *query, *slope, *weights, *of_weights, *sums;
    int64_t wide;
} Room;

INLINE void some_sums(float *out, int64_t out_row, const float *left, int64_t left_row, int64_t left_column,
                      const float *right, int64_t right_row, int64_t inner, int adds, const int rows, const int vectors) {
    Vector sums[ROWS][STEP];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = adds ? load(out + r * out_row + v * LANES) : (Vector){0};
    for (int64_t k = 0; k < inner; k++) {
        Vector some[STEP];
        for (int v = 0; v < vectors; v++) some[v] = held(load(right + k * right_row + v * LANES));
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] += some[v] * left[r * left_row + k * left_column];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store(out + r * out_row + v * LANES, sums[r][v]);
}

/* out [rows, columns] = left [rows, inner] times right [inner, columns], added to it if it `adds`; whole vectors */
static void times(float *out, int64_t out_row, const float *left, int64_t left_row, int64_t left_column,
                  const float *right, int64_t right_row, int64_t rows, int64_t columns, int64_t inner, int adds) {
    for (int64_t column = 0, vectors; column < columns; column += vectors * LANES) {
        vectors = (columns - column) / LANES;
        vectors = vectors == 4 ? 2 : vectors < STEP ? vectors : STEP;
        for (int64_t row = 0, some; row < rows; row += some) {
            some = rows - row >= ROWS ? ROWS : rows - row >= 4 ? 4 : 1;
#define SOME(r, v) some_sums(out + row * out_row + column, out_row, left + row * left_row, left_row, left_column, \
                             right + column, right_row, inner, adds, r, v)
            if (some == ROWS && vectors == 3) SOME(ROWS, 3);
            else if (some == ROWS && vectors == 2) SOME(ROWS, 2);
            else if (some == ROWS) SOME(ROWS, 1);
            else if (some == 4 && vectors == 3) SOME(4, 3);
            else if (some == 4 && vectors == 2) SOME(4, 2);
            else if (some == 4) SOME(4, 1);
            else if (vectors == 3) SOME(1, 3);
            else if (vectors == 2) SOME(1, 2);
            else SOME(1, 1);
        }
    }
}

/* rows [count, dim] to columns; up to 7 rows more are read and written */
static void turn_over(const float *rows, float *columns, int64_t wide, int64_t count, int64_t dim) {
    for (int64_t row = 0; row < count; row += 8)
        for (int64_t d = 0; d < dim; d += 8) {
            __m256 a[8], b[8];
            for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(rows + (row + i) * dim + d);
            for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
            for (int i = 0; i < 8; i += 4) {
                a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
                a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
                a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
                a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
            }
            for (int i = 0; i < 4; i++) {
                _mm256_storeu_ps(columns + (d + i) * wide + row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
                _mm256_storeu_ps(columns + (d + i + 4) * wide + row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
            }
        }
}

INLINE void copy(float *to, const Number *from, int64_t row, int64_t count, int64_t dim, float scale) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d += LANES) store(to + i * dim + d, read(from + i * row + d) * scale);
}

INLINE void copy_back(Number *to, int64_t row, const float *from, int64_t count, int64_t dim, float scale) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d += LANES) write(to + i * row + d, load(from + i * dim + d) * scale);
}

/* keys and values of `count` tokens from `start` on become those of place `at` */
static void read_tokens(const Packed *p, Room *s, int64_t head, int64_t start, int64_t count, int64_t at, int backward) {
    const int64_t dim = p->dim;
    copy(s->keys + at * dim, p->key + start * p->row_key + head * dim, p->row_key, count, dim, 1);
    copy(s->values + at * dim, p->value + start * p->row_value + head * dim, p->row_value, count, dim, 1);
    turn_over(s->keys + at * dim, s->key_columns + at, s->wide, count, dim);
    if (!backward) return;
    turn_over(s->values + at * dim, s->value_columns + at, s->wide, count, dim);
    memset(s->of_keys + at * dim, 0, 4 * count * dim);
    memset(s->of_values + at * dim, 0, 4 * count * dim);
}

/* `count` weights of a row, and zeros up to `end`: exp(x - normalizer) where that is known, else a softmax, and it is noted */
INLINE void soften(float *row, int64_t count, int64_t end, float *normalizer, int known) {
    float most = -INFINITY;
    for (int64_t j = count; j < end; j++) row[j] = -INFINITY;
    if (known) most = *normalizer;
    else {
        Vector largest = (Vector){0} - INFINITY;
        for (int64_t j = 0; j < end; j += LANES) largest = larger(load(row + j), largest);
        for (int i = 0; i < LANES; i++) most = largest[i] > most || largest[i] != largest[i] ? largest[i] : most;
    }
    Vector total = {0};
    for (int64_t j = 0; j < end; j += LANES) {
        const Vector weight = exponential(load(row + j) - most);
        store(row + j, weight);
        total += weight;
    }
    for (int64_t j = count; j < end; j++) row[j] = 0;
    if (known) return;
    const float sum = sum_of(total);
    *normalizer = most + logf(sum);
    for (int64_t j = 0; j < end; j += LANES) store(row + j, load(row + j) / sum);
}

/* `rows` queries of a head, of which the first sees `seen` keys, and each next one more */
static void some_queries(const Packed *p, Room *s, int64_t kv_head, int64_t head, int64_t token, int64_t rows, int64_t seen,
                         int backward) {
    const int64_t dim = p->dim, heads = p->kv_heads * p->repeats, row = heads * dim, place = token * row + head * dim;
    const int64_t keys = seen + rows - 1, end = (keys + LANES - 1) / LANES * LANES, wide = s->wide;
    copy(s->query, p->query + token * p->row_query + head * dim, p->row_query, rows, dim, p->scaling);
    times(s->weights, wide, s->query, dim, 1, s->key_columns, wide, rows, end, dim, 0);
    for (int64_t i = 0; i < rows; i++)
        soften(s->weights + i * wide, seen + i, end, p->normalizer + (token + i) * heads + head, backward);
    if (!backward) {
        times(s->sums, dim, s->weights, wide, 1, s->values, dim, rows, dim, keys, 0);
        copy_back(p->target + place, row, s->sums, rows, dim, 1);
        return;
    }
    copy(s->slope, p->of_out + place, row, rows, dim, 1);
    times(s->of_weights, wide, s->slope, dim, 1, s->value_columns, wide, rows, end, dim, 0);
    for (int64_t i = 0; i < rows; i++) {
        float *weights = s->weights + i * wide, *of_weights = s->of_weights + i * wide;
        Vector along = {0};
        for (int64_t d = 0; d < dim; d += LANES) along += load(s->slope + i * dim + d) * read(p->out + place + i * row + d);
        const float mean = sum_of(along);
        for (int64_t j = seen + i; j < end; j++) of_weights[j] = mean;
        for (int64_t j = 0; j < end; j += LANES)
            store(of_weights + j, (load(of_weights + j) - mean) * load(weights + j));
    }
    times(s->of_values, dim, s->weights, 1, wide, s->slope, dim, keys, dim, rows, 1);
    times(s->of_keys, dim, s->of_weights, 1, wide, s->query, dim, keys, dim, rows, 1);
    times(s->sums, dim, s->of_weights, wide, 1, s->keys, dim, rows, dim, keys, 0);
    copy_back(p->target + place, row, s->sums, rows, dim, p->scaling);
}

/* gradients of `count` keys and values from `token` on += these */
static void add_tokens(const Packed *p, const float *keys, const float *values, int64_t head, int64_t token, int64_t count) {
    const int64_t dim = p->dim, row = p->kv_heads * dim;
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d += LANES) {
            float *key = p->of_key + (token + i) * row + head * dim + d, *value = p->of_value + (key - p->of_key);
            store(key, load(key) + load(keys + i * dim + d));
            store(value, load(value) + load(values + i * dim + d));
        }
}

/* how many tokens all begin with that are before a group, which is none for themselves */
INLINE int64_t first_of(const Packed *p, int64_t group) { return p->starts[p->groups[group]] < p->first ? 0 : p->first; }

static void a_group(const Packed *p, Room *s, int64_t group, int64_t head, int backward) {
    const int64_t dim = p->dim, first = first_of(p, group), before = first + p->prompt_lengths[group];
    read_tokens(p, s, head, 0, first, 0, backward);
    read_tokens(p, s, head, p->prompts[group], p->prompt_lengths[group], first, backward);
    for (int64_t segment = p->groups[group]; segment < p->groups[group + 1]; segment++) {
        const int64_t start = p->starts[segment], length = p->lengths[segment];
        read_tokens(p, s, head, start, length, before, backward);
        for (int64_t repeat = 0; repeat < p->repeats; repeat++)
            for (int64_t i = 0; i < length; i += QUERIES)
                some_queries(p, s, head, head * p->repeats + repeat, start + i, length - i < QUERIES ? length - i : QUERIES,
                             before + i + 1, backward);
        if (backward) add_tokens(p, s->of_keys + before * dim, s->of_values + before * dim, head, start, length);
    }
    if (!backward) return;
    float *shared = p->shared + (group * p->kv_heads + head) * 2 * p->most * dim;
    memcpy(shared, s->of_keys, 4 * before * dim);
    memcpy(shared + p->most * dim, s->of_values, 4 * before * dim);
}

static float *room_for(const Packed *p, Room *s, int backward) {
    const int64_t wide = (p->longest + 2 * LANES - 1) / LANES * LANES, dim = p->dim; /* 7 more than the keys at least */
    float **const parts[] = {&s->keys, &s->values, &s->key_columns, &s->query, &s->sums, &s->weights,
                             &s->of_keys, &s->of_values, &s->value_columns, &s->slope, &s->of_weights};
    const int64_t sizes[] = {wide * dim, wide * dim, wide * dim, QUERIES * dim, QUERIES * dim, QUERIES * wide,
                             wide * dim, wide * dim, wide * dim, QUERIES * dim, QUERIES * wide};
    const int count = backward ? 11 : 6;
    int64_t all = 0;
    for (int i = 0; i < count; i++) all += sizes[i];
    float *memory = calloc(all, 4);
    for (int64_t i = 0, from = 0; memory && i < count; from += sizes[i++]) *parts[i] = memory + from;
    s->wide = wide;
    return memory;
}

/* 0, or 1 where there was no memory; of_key and of_value begin with zeros */
int packed_attention(const Packed *p, int64_t backward) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Room s;
        float *memory = NULL; /* of a thread that has something to do */
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p->count * p->kv_heads; task++) {
            if (memory || (memory = room_for(p, &s, backward))) a_group(p, &s, task / p->kv_heads, task % p->kv_heads, backward);
            else failed = 1;
        }
        free(memory);
#pragma omp for schedule(static)
        for (int64_t head = 0; head < p->kv_heads; head++)
            for (int64_t group = 0; backward && group < p->count; group++) {
                const int64_t first = first_of(p, group), dim = p->dim;
                const float *keys = p->shared + (group * p->kv_heads + head) * 2 * p->most * dim, *values = keys + p->most * dim;
                add_tokens(p, keys, values, head, 0, first);
                add_tokens(p, keys + first * dim, values + first * dim, head, p->prompts[group], p->prompt_lengths[group]);
            }
    }
    return failed;
}
