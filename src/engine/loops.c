/* All of them, to be compiled at once. */
#include "decode_loops.c"
#include "layer_loops.c"
#include "training_loops.c"
#include "attention_loops.c"
#include "step_loops.c"
#include "token_loops.c"
