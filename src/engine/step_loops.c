/* The layers of a decode step one after the other: what cpu_layers.py calls one by one, to the same bits. */
#include "vectors.h"

typedef struct { /* cpu_step.py has the same, and of the next one */
    const Number *attention_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *out, *out_bias;
    const Number *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    const Number *prompt_keys, *prompt_values;
    Number *keys, *values;
} Layer;

typedef struct {
    const Layer *layers;
    const Number *norm, *cosine, *sine;
    Number *hidden, *normed, *projected, *between, *update; /* [rows, ...] each; hidden and normed are the result */
    const int64_t *prompts, *prompt_lengths, *slots, *places;
    int64_t count, rows, width, inner, heads, kv_heads, dim;
    int64_t prompt_stride, prompt_head_stride, slot_stride, head_stride;
    float epsilon, scaling;
} Step;

/* from queries, keys and values in `projected` to what the heads have read, in `between` behind the turned queries */
static Number *attended(const Step *s, const Layer *l) {
    const int64_t queries = s->heads * s->dim, keys = s->kv_heads * s->dim;
    Turn t = {.cosine = s->cosine, .sine = s->sine, .rows = s->rows, .dim = s->dim, .source_row = queries + 2 * keys,
              .epsilon = s->epsilon};
    t.source = s->projected, t.target = s->between, t.weight = l->query_norm, t.heads = s->heads;
    t.target_row = queries, t.target_head = s->dim;
    turn(&t);
    t.source += queries, t.target = l->keys, t.weight = l->key_norm, t.heads = s->kv_heads;
    t.slots = s->slots, t.places = s->places, t.target_row = s->slot_stride, t.target_head = s->head_stride;
    turn(&t);
    t.source += keys, t.target = l->values, t.weight = t.cosine = NULL;
    turn(&t);
    Number *found = s->between + s->rows * queries;
    attend(&(Attention){
        .query = s->between, .prompt_keys = l->prompt_keys, .prompt_values = l->prompt_values, .keys = l->keys,
        .values = l->values, .out = found, .prompts = s->prompts, .prompt_lengths = s->prompt_lengths,
        .slots = s->slots, .places = s->places, .rows = s->rows, .kv_heads = s->kv_heads,
        .repeats = s->heads / s->kv_heads, .dim = s->dim, .prompt_stride = s->prompt_stride,
        .prompt_head_stride = s->prompt_head_stride, .slot_stride = s->slot_stride, .head_stride = s->head_stride,
        .scaling = s->scaling,
    });
    return found;
}

/* 0, or 1 where there was no memory */
int step(const Step *s) {
    const int64_t rows = s->rows, width = s->width, inner = s->inner;
    const int64_t queries = s->heads * s->dim, keys = s->kv_heads * s->dim;
    int failed = 0;
    for (const Layer *l = s->layers; l < s->layers + s->count; l++) {
        add_norm(s->hidden, l == s->layers ? NULL : s->update, l->attention_norm, s->normed, rows, width, s->epsilon);
        failed |= product(s->normed, l->qkv, l->qkv_bias, s->projected, rows, width, queries + 2 * keys);
        failed |= product(attended(s, l), l->out, l->out_bias, s->update, rows, queries, width);
        add_norm(s->hidden, s->update, l->mlp_norm, s->normed, rows, width, s->epsilon);
        failed |= product(s->normed, l->gate_up, l->gate_up_bias, s->projected, rows, width, 2 * inner);
        gated(s->projected, s->projected + inner, s->between, rows, inner, 2 * inner, 2 * inner);
        failed |= product(s->between, l->down, l->down_bias, s->update, rows, inner, width);
    }
    add_norm(s->hidden, s->update, s->norm, s->normed, rows, width, s->epsilon);
    return failed;
}
