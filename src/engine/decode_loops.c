/* A decode step in fp32 or bf16: its products and its attention; layer_loops.c has what lies between them.

   Whatever the rows beside it, a row's sums are added up in the same order. */
#include "vectors.h"

#define VECTORS (WIDTH / LANES)
#define AT_ONCE 1024 /* inputs of a panel in fp32, so that it fits into a cache of 256 KiB */
#define FEW 16       /* panels, or groups of rows */
#define KEYS 64      /* whose scores are held at a time */
#define AHEAD 4096   /* numbers of a row's own keys, fetched while its prompt's are read */
#define HEADS 4      /* that read the same keys at once */

/* ------------------------------------------------------------------------------------------------------------------
   x [rows, inputs] times weights [outputs, inputs], of which WIDTH outputs lie side by side: [panels, inputs, WIDTH],
   in bf16 [panels, inputs / 2, WIDTH, 2], as its instructions multiply pairs. A panel stays in the cache while the rows
   pass it, some at a time, their sums in registers; meanwhile the next panel is fetched from memory.
   ------------------------------------------------------------------------------------------------------------------ */

#define WIDENS (HALF && !TILES && !DOTS) /* bf16 is multiplied in fp32 */
#if WIDENS
typedef float Input;
#else
typedef Number Input;
#endif

typedef struct {
    const Input *x;
    const Number *panel, *bias;
    Number *out;
    int64_t row, inputs, outputs, columns; /* elements of a row of x, inputs at once, outputs, and those of this panel */
    int64_t stride;                        /* bytes of the next panel to fetch beside an input, in bf16 beside two */
    const char *next;
} Tile;

#if HALF
/* the sums of some rows of this panel to their places, with what is added to them */
INLINE void finish(const Tile *t, const int rows, const float *sums) {
    Number bias[WIDTH] = {0}, found[WIDTH];
    if (t->bias) memcpy(bias, t->bias, 2 * t->columns);
    for (int row = 0; row < rows; row++) {
        Number *target = t->columns == WIDTH ? t->out + row * t->outputs : found;
        for (int v = 0; v < VECTORS; v++)
            write(target + v * LANES, load(sums + row * WIDTH + v * LANES) + read(bias + v * LANES));
        if (target == found) memcpy(t->out + row * t->outputs, found, 2 * t->columns);
    }
}
#endif

#if TILES
const int has_tiles = 1;
#define PASS 32 /* rows: two tiles of 16 */

typedef struct { /* as the processor reads it */
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Configuration;

/* tiles 0 to 3 for sums, 4 and 5 for rows, 6 and 7 for weights */
static void configure(const int rows) {
    const int upper = rows < 16 ? rows : 16, lower = rows > 16 ? rows - 16 : 16;
    const int of_tile[] = {upper, upper, lower, lower, upper, lower, 16, 16};
    Configuration c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = 64;
        c.rows[i] = of_tile[i];
    }
    __asm__ volatile("" : : "r"(&c) : "memory"); /* or gcc 12 leaves out what it thinks that nobody reads */
    _tile_loadconfig(&c);
}

static void release(void) { _tile_release(); }

INLINE void tile(const Tile *t, const int rows, const int both) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < t->inputs; k += 32) {
        const Number *weights = t->panel + k * WIDTH;
        _tile_loadd(6, weights, 4 * WIDTH);
        _tile_loadd(7, weights + 32, 4 * WIDTH);
        for (int i = 0; t->stride && i < 16; i++) __builtin_prefetch(t->next + (k / 2 + i) * t->stride, 0, 2);
        _tile_loadd(4, t->x + k, 2 * t->row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, t->x + 16 * t->row + k, 2 * t->row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    float sums[PASS][WIDTH];
    _tile_stored(0, sums[0], 4 * WIDTH);
    _tile_stored(1, sums[0] + 16, 4 * WIDTH);
    if (both) {
        _tile_stored(2, sums[16], 4 * WIDTH);
        _tile_stored(3, sums[16] + 16, 4 * WIDTH);
    }
    finish(t, rows, sums[0]);
}

static void some_rows(const Tile t, const int rows, const int goes_on) {
    if (rows > 16) tile(&t, rows, 1);
    else tile(&t, rows, 0);
}

#else
const int has_tiles = 0;
#define PASS ROWS
static void configure(int rows) {}
static void release(void) {}

#if DOTS
INLINE void tile(const Tile t, const int rows, const int goes_on) {
    Vector sums[ROWS][VECTORS] = {0};
    for (int64_t k = 0; k < t.inputs; k += 2) {
        __m512bh weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) weights[v] = (__m512bh)held(load((const float *)(t.panel + k * WIDTH) + v * LANES));
        __builtin_prefetch(t.next + k / 2 * t.stride, 0, 2);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, t.x + r * t.row + k, 4);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < VECTORS; v++) sums[r][v] = (Vector)_mm512_dpbf16_ps((__m512)sums[r][v], x, weights[v]);
        }
    }
    finish(&t, rows, (const float *)sums);
}
#elif HALF
INLINE void tile(const Tile t, const int rows, const int goes_on) {
    Vector sums[ROWS][VECTORS] = {0};
    for (int64_t k = 0; k < t.inputs; k += 2) {
        __builtin_prefetch(t.next + k / 2 * t.stride, 0, 2);
        for (int odd = 0; odd < 2; odd++) {
            Vector weights[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                const Integers pairs = (Integers)load((const float *)(t.panel + k * WIDTH) + v * LANES);
                weights[v] = held((Vector)(odd ? pairs & ~0xffff : pairs << 16));
            }
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECTORS; v++) sums[r][v] += weights[v] * t.x[r * t.row + k + odd];
        }
    }
    finish(&t, rows, (const float *)sums);
}
#else
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
#endif

static void some_rows(Tile t, int rows, const int goes_on) {
    for (int done; rows > 0; rows -= done, t.x += done * t.row, t.out += done * t.outputs) {
        if (rows >= ROWS) tile(t, done = ROWS, goes_on);
        else if (rows >= 4) tile(t, done = 4, goes_on);
        else if (rows == 3) tile(t, done = 3, goes_on);
        else if (rows == 2) tile(t, done = 2, goes_on);
        else tile(t, done = 1, goes_on);
    }
}
#endif

/* 0, or 1 where there was no memory */
int product(const Number *x, const Number *weights, const Number *bias, Number *out,
            int64_t rows, int64_t inputs, int64_t outputs) {
    const int64_t panels = rows ? (outputs + WIDTH - 1) / WIDTH : 0, blocks = (rows + PASS - 1) / PASS;
    const int64_t at_once = HALF ? inputs : AT_ONCE;
    /* few panels are shared by the threads: then each takes some of the rows */
    const int64_t groups = panels >= FEW || blocks < 2 ? 1 : blocks < FEW ? blocks : FEW;
#if WIDENS
    float *given = malloc(4 * rows * inputs + 1);
    if (!given) return 1;
#else
    const Number *given = x;
#endif
#pragma omp parallel
    {
        int64_t configured = 0;
#if WIDENS
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * inputs; i++) {
            const uint32_t bits = (uint32_t)x[i] << 16;
            memcpy(given + i, &bits, 4);
        }
#endif
#pragma omp for schedule(static)
        for (int64_t task = 0; task < panels * groups; task++) {
            const int64_t panel = task / groups, column = panel * WIDTH;
            const int64_t first = task % groups * blocks / groups, end = (task % groups + 1) * blocks / groups;
            for (int64_t from = 0; from < inputs; from += at_once) {
                const int64_t count = inputs - from < at_once ? inputs - from : at_once;
                const Number *begin = weights + (panel * inputs + from) * WIDTH;
                const int64_t share = (int64_t)sizeof(Number) * WIDTH * count / blocks; /* bytes that a block fetches */
                for (int64_t block = first; block < end; block++) {
                    const int64_t row = block * PASS, left = rows - row < PASS ? rows - row : PASS;
                    if (left != configured) configure(configured = left);
                    some_rows((Tile){
                        .x = given + row * inputs + from, .panel = begin, .bias = bias ? bias + column : bias,
                        .out = out + row * outputs + column, .row = inputs, .inputs = count, .outputs = outputs,
                        .columns = outputs - column < WIDTH ? outputs - column : WIDTH,
                        .stride = share * (HALF ? 2 : 1) / count,
                        .next = (const char *)(begin + count * WIDTH) + block * share,
                    }, left, from > 0);
                }
            }
        }
        release();
    }
#if WIDENS
    free(given);
#endif
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------------
   The attention of a token a row to its prompt's keys and to its own, KEYS at a time (FlashAttention, 2205.14135).
   ------------------------------------------------------------------------------------------------------------------ */

typedef struct { /* cpu_layers.py has the same */
    const Number *query, *prompt_keys, *prompt_values, *keys, *values;
    Number *out;
    const int64_t *prompts, *prompt_lengths, *slots, *places; /* of each row; its own keys end at a place of a slot */
    int64_t rows, kv_heads, repeats, dim;
    int64_t prompt_stride, prompt_head_stride, slot_stride, head_stride; /* elements */
    float scaling;
} Attention;

typedef struct {
    float most[HEADS], total[HEADS], sums[HEADS][LONGEST_HEAD];
} Softmax;

INLINE void add_values(Softmax *s, const Number *values, float weights[][KEYS], const int64_t count, const int64_t dim,
                       const int heads, const int wide) {
    for (int64_t d = 0; d < dim; d += wide * LANES) {
        Vector sums[HEADS][2];
        for (int r = 0; r < heads; r++)
            for (int i = 0; i < wide; i++) sums[r][i] = load(s->sums[r] + d + i * LANES);
        for (int64_t j = 0; j < count; j++) {
            Vector value[2];
            for (int i = 0; i < wide; i++) value[i] = held(read(values + j * dim + d + i * LANES));
            for (int r = 0; r < heads; r++)
                for (int i = 0; i < wide; i++) sums[r][i] += value[i] * weights[r][j];
        }
        for (int r = 0; r < heads; r++)
            for (int i = 0; i < wide; i++) store(s->sums[r] + d + i * LANES, sums[r][i]);
    }
}

INLINE void read_keys(const Attention *a, Softmax *s, const Number *query, const Number *keys, const Number *values,
                      const int64_t length, const int heads) {
    const int64_t dim = a->dim;
    for (int64_t from = 0; from < length; from += KEYS) {
        const int64_t count = length - from < KEYS ? length - from : KEYS;
        float scores[HEADS][KEYS];
        for (int64_t j = 0; j < count; j += 4) {
            const Number *key[4];
            for (int i = 0; i < 4; i++) key[i] = keys + (from + (j + i < count ? j + i : j)) * dim;
            Vector partial[HEADS][4] = {0};
            for (int64_t d = 0; d < dim; d += LANES) {
                for (int r = 0; r < heads; r++)
                    for (int i = 0; i < 4; i++) partial[r][i] += read(key[i] + d) * read(query + r * dim + d);
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
    const Number *query = a->query + place * dim;
    Softmax s;
    for (int r = 0; r < heads; r++) {
        s.most[r] = -INFINITY;
        s.total[r] = 0;
        memset(s.sums[r], 0, 4 * dim);
    }
    const Number *keys[] = {a->prompt_keys + of_prompt, a->keys + own};
    const Number *values[] = {a->prompt_values + of_prompt, a->values + own};
    const int64_t lengths[] = {a->prompt_lengths[row], a->places[row] + 1};
    for (int64_t i = 0; i < lengths[1] * dim && i < AHEAD; i += LANES) __builtin_prefetch(keys[1] + i, 0, 2);
    for (int part = 0; part < 2; part++) read_keys(a, &s, query, keys[part], values[part], lengths[part], heads);
    for (int r = 0; r < heads; r++)
        for (int64_t d = 0; d < dim; d += LANES)
            write(a->out + (place + r) * dim + d, load(s.sums[r] + d) / s.total[r]);
}

void attend(const Attention *a) {
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < a->rows * a->kv_heads; pair++)
        for (int64_t first = 0; first < a->repeats; first += HEADS) {
            const int64_t row = pair / a->kv_heads, head = pair % a->kv_heads, left = a->repeats - first;
            if (left >= HEADS) attend_heads(a, row, head, first, HEADS);
            else if (left == 3) attend_heads(a, row, head, first, 3);
            else if (left == 2) attend_heads(a, row, head, first, 2);
            else attend_heads(a, row, head, first, 1);
        }
}
