"""What is wanted of a distribution over the vocabulary: log-prob of a token, entropy, anchor's log-prob, exact KL.

The gradient of these is written out: autograd would go over the vocabulary a dozen times, and keep most of the results.
Any other distance goes through autograd (scoring.py).
"""

import logging
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger("grpo")
DIRECTIONS = ("reverse", "forward")  # of the KL: policy || anchor, anchor || policy
FUSED_ON = ("cuda",)  # devices on which the passes over the vocabulary are compiled into few
TRIAL_TOKENS = 512  # of the first chunk, for a trial; torch.compile would choose other kernels for fewer


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
    elif of_kl is not None and direction == "forward":
        gradient += of_kl[:, None] * (probabilities - anchor_logprobs.exp())
    elif of_kl is not None:
        raise ValueError(f"there is no gradient for a KL in direction {direction!r}")
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
    """What is wanted of a distribution, each [tokens]: log-prob of the target, entropy, anchor's log-prob, exact KL."""

    @staticmethod
    def forward(ctx, logits, target_ids, anchor_logits, kl_direction):
        ctx.set_materialize_grads(False)
        if kl_direction not in (None, *DIRECTIONS):
            raise ValueError(f"a KL has the direction {' or '.join(DIRECTIONS)}, not {kl_direction!r}")
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
