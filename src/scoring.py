"""Hidden states -> log-probs, entropy, exact KL, without ever holding logits for more than one chunk of tokens.

The head runs chunk by chunk; when there is more than one chunk, the backward pass computes each chunk's logits again.
Everything behind the logits is fp32; the head itself multiplies in the precision of the weights.
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from src.packing import PackedBatch
from src.profiling import phase
from src.sharding import within

logger = logging.getLogger("grpo")
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}  # tokens x vocabulary of the largest logits tensor
FUSED_ON = ("cuda",)  # devices on which the passes over the vocabulary are compiled into few
TRIAL_TOKENS = 512  # of the first chunk, for a trial; torch.compile would choose other kernels for fewer


@dataclass(frozen=True)
class Scores:
    """What the policy, and the anchor where there is one, say about the N completion tokens of a packed batch."""

    logprobs: Tensor  # [N] fp32, of the tempered distribution that was sampled
    entropy: Tensor  # [N] exact
    hidden: Tensor  # [N, hidden] last hidden state at each predicting position
    anchor_logprobs: Tensor | None = None  # [N]
    anchor_hidden: Tensor | None = None  # [N, hidden]
    kl: Tensor | None = None  # [N] exact, over the whole vocabulary


def head_logits(model, hidden: Tensor, head=None) -> Tensor:
    """Logits [tokens, vocab] in fp32, with the soft cap (Gemma) or scaling (Granite, Cohere) of the model's forward."""
    head = model.get_output_embeddings() if head is None else head
    logits = head(hidden).float()
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


def statistics(logits, target, anchor_logits, kl_direction):
    """Log-prob of the target, entropy, anchor's log-prob, exact KL, each [tokens]; and what backward needs.

    That is logits and normalizer of the policy and, for a KL, of the anchor: here log-probs, which need no normalizer.
    """
    logprobs = logits.log_softmax(-1)  # [tokens, vocab]
    work = logprobs.exp()  # [tokens, vocab]
    entropy = -work.mul_(logprobs).sum(-1)
    anchor_logprobs = anchor_chosen = kl = None
    if anchor_logits is not None:
        anchor_logprobs = anchor_logits.log_softmax(-1)  # [tokens, vocab]
        anchor_chosen = anchor_logprobs.gather(-1, target)[:, 0]
        if kl_direction == "reverse":
            kl = (logprobs.exp() * (logprobs - anchor_logprobs)).sum(-1)
        elif kl_direction == "forward":
            kl = (anchor_logprobs.exp() * (anchor_logprobs - logprobs)).sum(-1)
    results = logprobs.gather(-1, target)[:, 0], entropy, anchor_chosen, kl
    return results, (logprobs, None, None if kl is None else anchor_logprobs, None)


def statistics_and_normalizers(logits, target, anchor_logits, kl_direction):
    """To be compiled: the same results, and nothing as large as the logits is written."""
    results, _ = statistics(logits, target, anchor_logits, kl_direction)
    given = logits, None if results[3] is None else anchor_logits
    return results, [None if x is None else x.logsumexp(-1, keepdim=True) for x in given]  # [tokens, 1] each


def logits_gradient(
    logits,
    normalizer,
    anchor_logits,
    anchor_normalizer,
    target,
    entropy,
    kl,
    of_chosen,
    of_entropy,
    of_kl,
    direction,
):
    """Gradient by the logits: [i is the target] - p_i, -p_i (log p_i + H), and those of the two KLs."""
    logprobs = logits if normalizer is None else logits - normalizer  # [tokens, vocab]
    anchor_logprobs = anchor_logits if anchor_normalizer is None else anchor_logits - anchor_normalizer
    probabilities = logprobs.exp()  # [tokens, vocab]
    gradient = torch.zeros_like(probabilities) if of_chosen is None else probabilities * -of_chosen[:, None]
    if of_entropy is not None:
        gradient -= of_entropy[:, None] * probabilities * (logprobs + entropy[:, None])
    if of_kl is not None and direction == "reverse":
        gradient += of_kl[:, None] * probabilities * (logprobs - anchor_logprobs - kl[:, None])
    elif of_kl is not None:
        gradient += of_kl[:, None] * (probabilities - anchor_logprobs.exp())
    if of_chosen is not None:  # last: what comes before is one pass when it is compiled
        gradient.scatter_add_(-1, target, of_chosen[:, None])
    return gradient


@cache
def compiled(function):
    """The function with its passes over the vocabulary fused, for any number of tokens."""
    return torch.compile(function, dynamic=True)


def measure(fused: bool, logits, target, anchor_logits, kl_direction):
    """What `statistics` returns, computed by itself or by its compiled form."""
    if not fused:
        return statistics(logits, target, anchor_logits, kl_direction)
    results, (normalizer, anchor_normalizer) = compiled(statistics_and_normalizers)(
        logits, target, anchor_logits, kl_direction
    )
    return results, (logits, normalizer, None if anchor_normalizer is None else anchor_logits, anchor_normalizer)


def differentiate(fused: bool, *arguments) -> Tensor:
    """logits_gradient, by itself or by its compiled form."""
    return (compiled(logits_gradient) if fused else logits_gradient)(*arguments)


def try_fused(logits, target, anchor_logits, kl_direction) -> None:
    """An exception unless the compiled functions run here and agree with the plain ones."""
    outcomes = []
    slopes = torch.linspace(-1, 1, len(logits), device=logits.device)  # [tokens]
    for fused in (False, True):
        results, kept = measure(fused, logits, target, anchor_logits, kl_direction)
        _, entropy, _, kl = results
        of_kl = None if kl is None else slopes
        gradient = differentiate(fused, *kept, target, entropy, kl, slopes, slopes, of_kl, kl_direction)
        outcomes.append([x for x in (*results, gradient) if x is not None])
    torch.testing.assert_close(*outcomes, rtol=1e-3, atol=1e-4, equal_nan=True)


verdicts: dict[tuple, bool] = {}  # of the trials: whether there is an anchor, and which KL -> whether it went well


def fuses(logits, target, anchor_logits, kl_direction) -> bool:
    """Whether the compiled functions are used: on CUDA, unless a trial on the first chunk has failed."""
    if logits.device.type not in FUSED_ON or False in verdicts.values():
        return False
    kind = (anchor_logits is None, kl_direction)
    if kind not in verdicts:
        anchor_chunk = None if anchor_logits is None else anchor_logits[:TRIAL_TOKENS]
        try:
            try_fused(logits[:TRIAL_TOKENS], target[:TRIAL_TOKENS], anchor_chunk, kl_direction)
            verdicts[kind] = True
        except torch.OutOfMemoryError:  # says nothing about the compiler, and smaller micro-batches help
            raise
        except Exception as error:  # a compiler can raise nearly anything
            verdicts[kind] = False
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning(f"log-probs are computed without torch.compile, which takes longer ({reason})")
    return verdicts[kind]


class TokenStatistics(torch.autograd.Function):
    """What is wanted of a distribution, each [tokens]: log-prob of the target, entropy, anchor's log-prob, exact KL.

    The gradient is written out: autograd would go over the vocabulary a dozen times, and keep most of the results.
    """

    @staticmethod
    def forward(ctx, logits, target_ids, anchor_logits, kl_direction):
        ctx.set_materialize_grads(False)
        given = logits, target_ids[:, None], anchor_logits, kl_direction
        ctx.fused, ctx.kl_direction = fuses(*given), kl_direction
        results, kept = measure(ctx.fused, *given)
        _, entropy, anchor_chosen, kl = results
        if anchor_chosen is not None:
            ctx.mark_non_differentiable(anchor_chosen)
        ctx.save_for_backward(*kept, given[1], entropy, kl)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, of_chosen, of_entropy, _, of_kl):
        gradient = differentiate(ctx.fused, *ctx.saved_tensors, of_chosen, of_entropy, of_kl, ctx.kl_direction)
        return gradient, None, None, None


@phase("head")
def score_chunk(model, hidden, target_ids, temperature, anchor, anchor_hidden, kl_direction, *anchor_head):
    """Log-prob, entropy, anchor log-prob and KL of one chunk of tokens, each [tokens]."""
    logits, anchor_logits = head_logits(model, hidden), None  # [tokens, vocab]
    if anchor is not None:
        with torch.no_grad():
            anchor_logits = head_logits(anchor, anchor_hidden, *anchor_head)
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
    anchor_hidden = anchor_head = None
    if anchor is not None:
        anchor_head = anchor.get_output_embeddings()  # once for all chunks: a streamed one is copied to the device
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
            anchor_head,
        )
        if len(hidden) > chunk_tokens and torch.is_grad_enabled():
            parts.append(checkpoint(score_chunk, *arguments, use_reentrant=False))
        else:
            parts.append(score_chunk(*arguments))
    columns = list(zip(*parts, strict=True))
    logprobs, entropy = map(torch.cat, columns[:2])
    anchor_logprobs, kl = (None if column[0] is None else torch.cat(column) for column in columns[2:])
    return Scores(logprobs, entropy, hidden, anchor_logprobs, anchor_hidden, kl)
