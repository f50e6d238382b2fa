/* The token of each row of logits by the random number of its place: token_choice.py does the same in torch's operations. */
#include "vectors.h"

#define LOGITS 256 /* logits whose weights are added up at once */

/* some logits as fp32, up to a block of them, and -inf behind the last; how many that are, whole vectors */
INLINE int64_t read_block(const Number *logits, int64_t count, float *x) {
    if (count > LOGITS) count = LOGITS;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(x + i, read(logits + i));
    if (i == count) return i;
    Number last[LANES] = {0};
    memcpy(last, logits + i, sizeof(Number) * (count - i));
    store(x + i, read(last));
    for (i += LANES; count % LANES; count++) x[count] = -INFINITY;
    return i;
}

/* e^(x - top), 0 where a float has no such number; NaN stays. Their sum */
INLINE float weigh(float *x, const int64_t count, const float top, const float inverse) {
    Vector sum = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const Vector difference = (load(x + i) - top) * inverse;
        const Integers nothing = difference < -87;
        const Vector weights = (Vector)((Integers)exponential(difference) & ~nothing);
        store(x + i, weights);
        sum += weights;
    }
    return sum_of(sum);
}

/* splitmix64, as uniforms of token_choice.py */
static double uniform(const uint64_t key, const uint64_t position) {
    uint64_t value = key + (position + 1) * 0x9E3779B97F4A7C15u;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    value ^= value >> 31;
    return (double)(value >> 11) * 0x1p-53;
}

/* the first place of the largest, which is stored; one that is NaN is none */
static int64_t place_of_largest(const Number *row, const int64_t count, float *largest) {
    float x[LOGITS], top = -INFINITY;
    int64_t place = 0;
    for (int64_t from = 0; from < count; from += LOGITS) {
        const int64_t wide = read_block(row + from, count - from, x);
        Vector most = (Vector){0} + top;
        for (int64_t i = 0; i < wide; i += LANES) most = larger(most, load(x + i));
        int is_above = 0;
        for (int i = 0; i < LANES; i++) is_above |= most[i] > top;
        for (int64_t i = 0; is_above && i < wide; i++)
            if (x[i] > top) top = x[i], place = from + i;
    }
    *largest = top;
    return place;
}

/* greedy where `inverse` of the temperature is 0; the log-prob of a row that is not finite is NaN */
void choose(const Number *logits, const int64_t *keys, const int64_t *positions, int64_t *tokens, float *logprobs,
            int64_t rows, int64_t vocabulary, int64_t row_stride, float inverse) {
    const int64_t blocks = (vocabulary + LOGITS - 1) / LOGITS;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const Number *row = logits + r * row_stride;
        float x[LOGITS], sums[blocks], top;
        int64_t token = place_of_largest(row, vocabulary, &top);
        double total = 0, before = 0;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t count = read_block(row + b * LOGITS, vocabulary - b * LOGITS, x);
            sums[b] = weigh(x, count, top, inverse ? inverse : 1);
            total += sums[b];
        }
        if (inverse) {
            const double share = uniform(keys[r], positions[r]) * total;
            int64_t block = 0;
            while (block < blocks - 1 && !(before + sums[block] > share)) before += sums[block++];
            const int64_t count = read_block(row + block * LOGITS, vocabulary - block * LOGITS, x);
            weigh(x, count, top, inverse);
            for (int64_t i = 0; i < count && !(before > share); i++) {
                if (x[i] > 0) token = block * LOGITS + i; /* sums of floats may end a little before their numbers' */
                before += x[i];
            }
        }
        read_block(row + token, 1, x);
        tokens[r] = token;
        logprobs[r] = (float)((x[0] - top) * (inverse ? inverse : 1) - log(total));
    }
}
