"""Logits -> tokens: exact sampling with random numbers that belong to the token, not to a generator.

A random number is a hash of (seed, step, problem, sample, position), so that what is chosen does not depend on which
completions are decoded together. torch.multinomial is not used: its draw on a CPU takes longer than a large head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.records import Problem, Told, Transcript

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
BLOCK = 256  # vocabulary entries whose probabilities are summed before the cumulative sum


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample. temperature 0 is greedy; `stream` keeps evaluation and training random numbers apart.

    A completion also ends with the token that completes one of `stop_strings`. With `reply` it may go on: it gets the
    problem, what there is so far, and the last token, up to `max_turns` turns and `told` tokens that are not sampled.
    """

    max_new_tokens: int
    temperature: float
    slots: int
    eos_ids: tuple[int, ...]
    seed: int
    stream: int = 0  # the training step, or a negative number for evaluation
    stop_strings: tuple[str, ...] = ()
    reply: Callable[[Problem, Transcript, int], Told | None] | None = None
    max_turns: int = 1
    told: int = 0

    @property
    def width(self) -> int:
        """Tokens of an episode at most."""
        return self.max_new_tokens + self.told


def mix64(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014) on a Python integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """The same 64 bits as torch's int64."""
    return value - (1 << 64) if value >> 63 else value


def episode_key(seed: int, stream: int, problem: int, sample: int) -> int:
    """Start of an episode's random stream, as a signed 64-bit integer."""
    value = 0
    for part in (seed, stream, problem, sample):
        value = mix64((value + GOLDEN + (part & WORD)) & WORD)
    return signed(value)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each key [S] at each position [S], float64: splitmix64 as a counter-based generator."""
    value = keys + (positions + 1) * signed(GOLDEN)  # int64 arithmetic wraps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)  # logical shift
    value = value ^ ((value >> 31) & ((1 << 33) - 1))
    return ((value >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first entry [S, 1] where the cumulative sum of weights [S, N] exceeds uniform [S, 1] of the total.

    Float64, and uniform is below 1: an entry of weight 0 is never chosen.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return chosen.clamp_(max=weights.shape[-1] - 1)  # NaN finds no place


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """invert_cdf for a large vocabulary, in two levels: blocks first, then inside the chosen block.

    One float64 cumulative sum over the whole vocabulary would take longer than the head.
    """
    vocabulary = weights.shape[-1]
    if vocabulary <= BLOCK:
        return invert_cdf(weights, uniform)
    blocks, whole = vocabulary // BLOCK, vocabulary // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (blocks, BLOCK)).sum(-1)
    sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1).double()  # [S, blocks + 1]
    block = invert_cdf(sums, uniform)  # [S, 1]
    of_block, cumulative = sums.gather(1, block), sums.cumsum(-1)
    before = cumulative.gather(1, block) - of_block
    rest = ((uniform * cumulative[:, -1:] - before) / of_block).clamp(0, 1 - 2.0**-52)  # the number inside the block
    columns = block * BLOCK + torch.arange(BLOCK, device=block.device)  # [S, BLOCK]
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1)).masked_fill_(columns >= vocabulary, 0)
    return columns.gather(1, invert_cdf(inside, rest)).clamp_(max=vocabulary - 1)


def choose_tokens(logits: Tensor, settings: SamplingSettings, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [S] and their log-probs [S], NaN where logits are not finite; fp32 logits [S, V] may be overwritten."""
    logits = logits.float()
    if settings.temperature == 0:
        best, tokens = logits.max(-1)
        return tokens, best - logits.logsumexp(-1)
    if settings.temperature != 1:
        logits.div_(settings.temperature)
    weights = logits.softmax(-1)  # [S, V] over a large vocabulary their sum is 1 only to some 1e-6
    tokens = draw(weights, uniforms(keys, positions)[:, None])  # [S, 1]
    return tokens[:, 0], (weights.gather(1, tokens) / weights.sum(-1, keepdim=True)).log()[:, 0]
