"""Hidden states -> log-probs, entropy, exact KL, without ever holding logits for more than one chunk of tokens.

The head runs chunk by chunk; when there is more than one chunk, the backward pass computes each chunk's logits again.
Everything behind the logits is fp32; the head itself multiplies in the precision of the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from src.packing import PackedBatch
from src.profiling import phase
from src.sharding import within

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}  # tokens x vocabulary of the largest logits tensor


@dataclass(frozen=True)
class Scores:
    """What the policy, and the anchor where there is one, say about the N completion tokens of a packed batch."""

    logprobs: Tensor  # [N] fp32, of the tempered distribution that was sampled
    entropy: Tensor  # [N] exact
    hidden: Tensor  # [N, hidden] last hidden state at each predicting position
    anchor_logprobs: Tensor | None = None  # [N]
    anchor_hidden: Tensor | None = None  # [N, hidden]
    kl: Tensor | None = None  # [N] exact, over the whole vocabulary


def head_logits(model, hidden: Tensor) -> Tensor:
    """Logits [tokens, vocab] in fp32, with the soft cap (Gemma) or scaling (Granite, Cohere) of the model's forward."""
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config.get_text_config()
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


def decode(model, batch: PackedBatch) -> Tensor:
    """Last hidden states [1, T, hidden] of a packed row."""
    output = model.get_decoder()(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, attention_plan=batch.attention_plan
    )
    return output.last_hidden_state


def hidden_states(model, batch: PackedBatch) -> Tensor:
    """Hidden states [N, hidden] from which the completion tokens are predicted."""
    return within(model, decode, batch)[0].index_select(0, batch.predictor_index)


class TokenStatistics(torch.autograd.Function):
    """What is wanted of a distribution, each [tokens]: log-prob of the target, entropy, anchor's log-prob, exact KL.

    The gradient is written out: autograd would go over the vocabulary a dozen times, and keep most of the results.
    """

    @staticmethod
    def forward(ctx, logits, target_ids, anchor_logits, kl_direction):
        ctx.set_materialize_grads(False)
        target = target_ids[:, None]  # [tokens, 1]
        logprobs = logits.log_softmax(-1)  # [tokens, vocab]
        work = logprobs.exp()  # [tokens, vocab]
        entropy = -work.mul_(logprobs).sum(-1)
        anchor_logprobs = anchor_chosen = kl = None
        if anchor_logits is not None:
            anchor_logprobs = anchor_logits.log_softmax(-1)  # [tokens, vocab]
            anchor_chosen = anchor_logprobs.gather(-1, target)[:, 0]
            ctx.mark_non_differentiable(anchor_chosen)
            if kl_direction == "reverse":
                kl = (logprobs.exp() * (logprobs - anchor_logprobs)).sum(-1)
            elif kl_direction == "forward":
                kl = (anchor_logprobs.exp() * (anchor_logprobs - logprobs)).sum(-1)
        ctx.kl_direction = kl_direction
        ctx.save_for_backward(logprobs, target, entropy, None if kl is None else anchor_logprobs, kl)
        return logprobs.gather(-1, target)[:, 0], entropy, anchor_chosen, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, of_chosen, of_entropy, _, of_kl):
        """Gradients by the logits: [i is the target] - p_i, -p_i (log p_i + H), and those of the two KLs."""
        logprobs, target, entropy, anchor_logprobs, kl = ctx.saved_tensors
        probabilities = logprobs.exp()  # [tokens, vocab]
        gradient = torch.zeros_like(probabilities) if of_chosen is None else probabilities * -of_chosen[:, None]
        if of_chosen is not None:
            gradient.scatter_add_(-1, target, of_chosen[:, None])
        if of_entropy is not None:
            gradient -= of_entropy[:, None] * probabilities * (logprobs + entropy[:, None])
        if of_kl is not None and ctx.kl_direction == "reverse":
            gradient += of_kl[:, None] * probabilities * (logprobs - anchor_logprobs - kl[:, None])
        elif of_kl is not None:
            gradient += of_kl[:, None] * (probabilities - anchor_logprobs.exp())
        return gradient, None, None, None


@phase("head")
def score_chunk(model, hidden, target_ids, temperature, anchor, anchor_hidden, kl_direction):
    """Log-prob, entropy, anchor log-prob and KL of one chunk of tokens, each [tokens]."""
    logits, anchor_logits = head_logits(model, hidden), None  # [tokens, vocab]
    if anchor is not None:
        with torch.no_grad():
            anchor_logits = head_logits(anchor, anchor_hidden)
    if temperature != 1:
        logits = logits / temperature
        anchor_logits = None if anchor_logits is None else anchor_logits / temperature
    return TokenStatistics.apply(logits, target_ids, anchor_logits, kl_direction)


def score(
    model,
    batch: PackedBatch,
    temperature: float,
    anchor=None,
    kl_direction: str | None = None,
    chunk_tokens: int | None = None,
) -> Scores:
    """Score a packed batch; with an `anchor` model its log-probs too, and the exact KL in `kl_direction` if given."""
    with phase("policy forward"):
        hidden = hidden_states(model, batch)  # [N, hidden]
    anchor_hidden = None
    if anchor is not None:
        with phase("reference"), torch.no_grad():
            anchor_hidden = hidden_states(anchor, batch)  # [N, hidden]
    if chunk_tokens is None:
        vocabulary = model.config.get_text_config().vocab_size
        chunk_tokens = max(1, CHUNK_ELEMENTS[hidden.device.type] // vocabulary)
    parts = []
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        arguments = (
            model,
            hidden[chunk],
            batch.target_ids[chunk],
            temperature,
            anchor,
            None if anchor_hidden is None else anchor_hidden[chunk],
            kl_direction,
        )
        if len(hidden) > chunk_tokens and torch.is_grad_enabled():
            parts.append(checkpoint(score_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(score_chunk(*arguments))
    columns = list(zip(*parts, strict=True))
    logprobs, entropy = map(torch.cat, columns[:2])
    anchor_logprobs, kl = (None if column[0] is None else torch.cat(column) for column in columns[2:])
    return Scores(logprobs, entropy, hidden, anchor_logprobs, anchor_hidden, kl)
