"""Hidden states -> log-probs, entropy, distances over the vocabulary, with logits for one chunk of tokens at a time.

The head runs chunk by chunk; where the logits of all chunks are large, the backward pass computes each chunk's again.
Everything behind the logits is fp32; the head itself multiplies in the precision of the weights, or with
`model.fp32_head` in fp32 (models.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.engine.packing import Pass
from src.engine.profiling import phase
from src.engine.sharding import within
from src.engine.statistics import TokenStatistics, wide
from src.records import Scores

CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**27}  # tokens x vocabulary of the largest logits tensor
KEPT = 8  # bytes for each of these: logits so large are kept for the backward pass
FUNCTIONS = 4  # so much smaller are chunks with functions: what autograd keeps for them is as large as several logits
# a distance of each token's distribution to the anchor's: the direction of an exact KL, or a function of the logits of
# policy and anchor [tokens, vocab] -> [tokens]
Distance = str | Callable[[Tensor, Tensor], Tensor]


def head_logits(model, hidden: Tensor, head=None) -> Tensor:
    """Logits [tokens, vocab], in fp32 with the soft cap (Gemma) or scaling (Granite, Cohere) of the model's forward."""
    head = model.get_output_embeddings() if head is None else head
    logits = head(hidden)
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")):
        logits = logits.float()
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


def decode(model, row: Pass) -> Tensor:
    """Last hidden states [1, T, hidden] of a packed row."""
    output = model.get_decoder()(
        input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, attention_plan=row.attention_plan
    )
    return output.last_hidden_state


def hidden_states(model, row: Pass) -> Tensor:
    """Hidden states [N, hidden] from which the written tokens are predicted."""
    return within(model, decode, row)[0].index_select(0, row.predictor_index)


@phase("head")
def score_chunk(model, hidden, target_ids, temperature, anchor, anchor_hidden, kl_direction, functions, *anchor_head):
    """Log-prob, entropy, anchor's log-prob, KL and what the functions give, of one chunk of tokens, each [tokens]."""
    logits, anchor_logits = head_logits(model, hidden), None  # [tokens, vocab]
    if anchor is not None:
        with torch.no_grad():
            anchor_logits = head_logits(anchor, anchor_hidden, *anchor_head)
    if temperature != 1 or functions:
        logits = wide(logits) / temperature
        anchor_logits = None if anchor_logits is None else wide(anchor_logits) / temperature
    distances = [function(logits, anchor_logits) for function in functions]
    return *TokenStatistics.apply(logits, target_ids, anchor_logits, kl_direction), *distances


def score(
    model,
    row: Pass,
    temperature: float,
    anchor=None,
    distances: Mapping[str, Distance] | None = None,
    elements: int | None = None,
) -> Scores:
    """Score a packed row; with an `anchor` model its log-probs too, and the `distances` to it.

    `elements`: tokens x vocabulary of a chunk's logits.
    """
    distances = distances or {}
    if distances and anchor is None:
        raise ValueError(f"the distances {', '.join(distances)} are to an anchor, and none was asked for")
    directions = [distance for distance in distances.values() if isinstance(distance, str)]
    functions = {name: distance for name, distance in distances.items() if not isinstance(distance, str)}
    if len(directions) > 1:
        raise ValueError("one exact KL at a time has a gradient of its own; write the other as a function of logits")
    with phase("policy forward"):
        hidden = hidden_states(model, row)  # [N, hidden]
    anchor_hidden = anchor_head = None
    if anchor is not None:
        anchor_head = anchor.get_output_embeddings()  # once for all chunks: a streamed one is copied to the device
        with phase("reference"), torch.no_grad():
            anchor_hidden = hidden_states(anchor, row)  # [N, hidden]
    vocabulary = model.config.get_text_config().vocab_size
    elements = elements or CHUNK_ELEMENTS[hidden.device.type]
    chunk_tokens = max(1, elements // (FUNCTIONS if functions else 1) // vocabulary)
    logits = len(hidden) * vocabulary * hidden.element_size() * (2 if directions else 1)  # bytes
    again = torch.is_grad_enabled() and (logits > KEPT * elements or bool(functions))
    parts = []
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        arguments = (
            model,
            hidden[chunk],
            row.batch.token_ids[chunk],
            temperature,
            anchor,
            None if anchor_hidden is None else anchor_hidden[chunk],
            directions[0] if directions else None,
            list(functions.values()),
            anchor_head,
        )
        parts.append(checkpoint(score_chunk, *arguments, use_reentrant=False) if again else score_chunk(*arguments))
    logprobs, entropy, anchor_logprobs, kl, *values = (
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    )
    assert logprobs is not None and entropy is not None
    found: dict[str, Any] = dict(zip(functions, values, strict=True))
    found |= {name: kl for name, distance in distances.items() if isinstance(distance, str)}
    return Scores(logprobs, entropy, hidden, anchor_logprobs, anchor_hidden, found)
