"""What is wanted of a distribution over the vocabulary: log-prob of a token, entropy, anchor's log-prob, exact KL.

The gradient of these is written out: autograd would go over the vocabulary a dozen times, and keep most of the results.
Any other distance goes through autograd (scoring.py).
"""

import logging
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import src.engine.training_loops as training_loops
from src.engine.decode_loops import apply_to
from src.engine.kernels import works
from src.engine.training_loops import FEWEST

logger = logging.getLogger("grpo")
DIRECTIONS = ("reverse", "forward")  # of the KL: policy || anchor, anchor || policy
FUSED_ON = ("cuda",)  # devices on which the passes over the vocabulary are compiled into few
BLOCK = 2**18  # elements: of a vocabulary of 49,152 five tokens, 1 MiB in fp32
TRIAL_TOKENS = 512  # of the first chunk, for a trial; torch.compile would choose other kernels for fewer


def wide(logits: Tensor) -> Tensor:
    """In fp32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def softened(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logits [tokens, vocab] in fp32: below the largest, exp of that, log of its sum, normalizer [tokens, 1]."""
    largest = wide(logits.amax(-1, keepdim=True))  # [tokens, 1]
    below = logits.to(largest.dtype, copy=True).sub_(largest)  # [tokens, vocab]
    weights = below.exp()  # [tokens, vocab]
    rest = weights.sum(-1, keepdim=True).log()  # [tokens, 1]
    return below, weights, rest, largest + rest


def statistics(logits, target, anchor_logits, kl_direction):
    """Log-prob of the target, entropy, anchor's log-prob, exact KL, each [tokens]; both normalizers [tokens, 1]."""
    below, weights, rest, normalizer = softened(logits)
    chosen = (below.gather(-1, target) - rest)[:, 0]
    entropy = rest[:, 0] - (weights * below).sum(-1) / rest[:, 0].exp()
    if anchor_logits is None:
        return chosen, entropy, None, None, normalizer, None
    anchor_below, anchor_weights, anchor_rest, anchor_normalizer = softened(anchor_logits)
    anchor_chosen = (anchor_below.gather(-1, target) - anchor_rest)[:, 0]
    if kl_direction is None:
        return chosen, entropy, anchor_chosen, None, normalizer, None
    difference = (below - rest) - (anchor_below - anchor_rest)  # [tokens, vocab]
    if kl_direction == "reverse":
        kl = (weights * difference).sum(-1) / rest[:, 0].exp()
    else:
        kl = -(anchor_weights * difference).sum(-1) / anchor_rest[:, 0].exp()
    return chosen, entropy, anchor_chosen, kl, normalizer, anchor_normalizer


def logits_gradient(
    logits,
    anchor_logits,
    normalizer,
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
    logprobs = wide(logits) - normalizer  # [tokens, vocab]
    probabilities = logprobs.exp()  # [tokens, vocab]
    gradient = torch.zeros_like(probabilities) if of_chosen is None else probabilities * -of_chosen[:, None]
    if of_entropy is not None:
        gradient -= of_entropy[:, None] * probabilities * (logprobs + entropy[:, None])
    if of_kl is not None:
        anchor_logprobs = wide(anchor_logits) - anchor_normalizer  # [tokens, vocab]
        if direction == "reverse":
            gradient += of_kl[:, None] * probabilities * (logprobs - anchor_logprobs - kl[:, None])
        else:
            gradient += of_kl[:, None] * (probabilities - anchor_logprobs.exp())
    if of_chosen is not None:  # last: what comes before is one pass when it is compiled
        gradient.scatter_add_(-1, target, of_chosen[:, None])
    return gradient.to(logits.dtype)


def blocks(logits: Tensor) -> list[slice]:
    """Rows at a time: on a CPU so few that what is computed of them stays in its cache."""
    rows = max(1, BLOCK // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(start, start + rows) for start in range(0, max(1, len(logits)), rows)]


def cut(arguments: tuple, rows: slice) -> list:
    """These rows of what has rows."""
    return [x[rows] if isinstance(x, Tensor) else x for x in arguments]


@cache
def compiled(function):
    """The function with its passes over the vocabulary fused, for any number of tokens."""
    return torch.compile(function, dynamic=True)


def measure(fused: bool, *arguments) -> list:
    """What `statistics` returns, by itself or by its compiled form."""
    function = compiled(statistics) if fused else statistics
    columns = zip(*(function(*cut(arguments, rows)) for rows in blocks(arguments[0])), strict=True)
    return [column[0] if len(column) == 1 or column[0] is None else torch.cat(column) for column in columns]


def measure_in_loops(logits, target, anchor_logits, kl_direction) -> list:
    """The same in loops of C; without a KL."""
    chosen, entropy, normalizer = training_loops.statistics(logits, target)
    anchor_chosen = None if anchor_logits is None else training_loops.statistics(anchor_logits, target)[0]
    return [chosen, entropy, anchor_chosen, None, normalizer, None]


def loops_work(logits, anchor_logits) -> bool:
    """Whether they are for so many logits, tried once."""
    tensors = [logits] if anchor_logits is None else [logits, anchor_logits]
    return logits.numel() >= FEWEST and apply_to(*tensors, whole=False) and loops_agree(logits.dtype)


@cache
def loops_agree(dtype: torch.dtype) -> bool:
    """Whether the loops give what torch gives; tells when not."""

    def trial() -> None:
        draw, outcomes = torch.Generator().manual_seed(0), []
        logits, target = 5 * torch.randn(7, 1001, generator=draw).to(dtype), torch.arange(0, 1001, 166)[:, None]
        slopes = torch.randn(2, 7, generator=draw)
        for in_loops in (True, False):
            measured = measure_in_loops if in_loops else partial(measure, False)
            chosen, entropy, anchor_chosen, _, normalizer, _ = measured(logits, target, logits, None)
            if in_loops:
                gradient = training_loops.statistics_gradient(logits, target, normalizer, entropy, *slopes)
            else:
                kept = logits, None, normalizer, None, target, entropy, None
                gradient = differentiate(False, *kept, *slopes, None, None)
            outcomes.append([chosen, entropy, anchor_chosen, normalizer, gradient])
        torch.testing.assert_close(*outcomes, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)

    return works("statistics of logits without loops in C", trial)


def differentiate(fused: bool, *arguments) -> Tensor:
    """logits_gradient, by itself or by its compiled form."""
    if fused:
        return compiled(logits_gradient)(*arguments)
    gradient = arguments[0].new_empty(arguments[0].shape)  # [tokens, vocab]
    for rows in blocks(gradient):
        gradient[rows] = logits_gradient(*cut(arguments, rows))
    return gradient


def try_fused(logits, target, anchor_logits, kl_direction) -> None:
    """An exception unless the compiled functions run here and agree with the plain ones."""
    outcomes = []
    slopes = torch.linspace(-1, 1, len(logits), device=logits.device)  # [tokens]
    for fused in (False, True):
        *results, normalizer, anchor_normalizer = measure(fused, logits, target, anchor_logits, kl_direction)
        _, entropy, _, kl = results
        kept = logits, anchor_logits, normalizer, anchor_normalizer, target, entropy, kl
        of_kl = None if kl is None else slopes
        gradient = differentiate(fused, *kept, slopes, slopes, of_kl, kl_direction)
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
        target = target_ids[:, None]
        ctx.fused, ctx.kl_direction = fuses(logits, target, anchor_logits, kl_direction), kl_direction
        ctx.in_loops = kl_direction is None and loops_work(logits, anchor_logits)
        measured = measure_in_loops if ctx.in_loops else partial(measure, ctx.fused)
        *results, normalizer, anchor_normalizer = measured(logits, target, anchor_logits, kl_direction)
        _, entropy, anchor_chosen, kl = results
        if anchor_chosen is not None:
            ctx.mark_non_differentiable(anchor_chosen)
        anchor_logits = None if kl is None else anchor_logits
        ctx.save_for_backward(logits, anchor_logits, normalizer, anchor_normalizer, target, entropy, kl)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_chosen, of_entropy, _, of_kl):
        if ctx.in_loops:
            logits, _, normalizer, _, target, entropy, _ = ctx.saved_tensors
            gradient = training_loops.statistics_gradient(logits, target, normalizer, entropy, of_chosen, of_entropy)
        else:
            gradient = differentiate(ctx.fused, *ctx.saved_tensors, of_chosen, of_entropy, of_kl, ctx.kl_direction)
        return gradient, None, None, None
