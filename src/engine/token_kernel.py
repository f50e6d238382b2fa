"""choose_tokens on a GPU: the logits are read once, and of the chosen block of each row once more.

Two Triton kernels in place of fifty of torch's; token_choice.py is their reference, and has the random numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from src.engine.token_choice import BLOCK, GOLDEN, SamplingSettings

GROUP = 16  # blocks of the vocabulary that a program sums


@triton.jit
def sum_blocks(logits, largest, sums, vocabulary, blocks, row, temperature, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Of some blocks of a row: the largest logit, and the sum of exp(logit - largest)."""
    block = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    columns = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None]  # [GROUP, BLOCK]
    places = tl.program_id(0).to(tl.int64) * row + columns
    x = tl.load(logits + places, columns < vocabulary, -float("inf")).to(tl.float32) / temperature
    top = tl.max(x, 1)
    weights = tl.where(x == -float("inf"), 0.0, tl.exp(x - top[:, None]))
    places = tl.program_id(0) * blocks + block
    tl.store(largest + places, top, block < blocks)
    tl.store(sums + places, tl.sum(weights, 1), block < blocks)


@triton.jit
def uniform(key, position, GOLDEN: tl.constexpr):
    """uniforms of token_choice.py."""
    value = key.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * GOLDEN
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    value = value ^ (value >> 31)
    return (value >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def place_of(weights, share, SIZE: tl.constexpr):
    """The first entry where the cumulative sum exceeds this share of it, its weight, what comes before, and the sum."""
    cumulative, is_last = tl.cumsum(weights, 0), tl.arange(0, SIZE) == SIZE - 1
    total = tl.sum(tl.where(is_last, cumulative, 0.0), 0)  # the largest, and NaN where one is: tl.max would not see it
    place = tl.minimum(tl.sum((cumulative <= share * total).to(tl.int32), 0), SIZE - 1)
    is_place = tl.arange(0, SIZE) == place
    weight = tl.sum(tl.where(is_place, weights, 0.0), 0)
    return place, weight, tl.sum(tl.where(is_place, cumulative, 0.0), 0) - weight, total


@triton.jit
def choose(
    logits, largest, sums, keys, positions, tokens, logprobs, vocabulary, blocks, row_stride, temperature,
    GOLDEN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's token: a block by the sums, then an entry of it; and the token's log-prob."""
    row, index, column = tl.program_id(0), tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    tops = tl.load(largest + row * blocks + index, index < blocks, -float("inf"))
    top = tl.max(tops, 0)
    weights = tl.load(sums + row * blocks + index, index < blocks, 0.0) * tl.exp(tops - top)
    share = uniform(tl.load(keys + row), tl.load(positions + row), GOLDEN)
    block, weight, before, total = place_of(weights.to(tl.float64), share, BLOCKS)

    columns = tl.minimum(block, blocks - 1) * BLOCK + column
    x = tl.load(logits + row.to(tl.int64) * row_stride + columns, columns < vocabulary, -float("inf")).to(tl.float32)
    x = x / temperature
    inside = tl.where(columns < vocabulary, tl.exp(x - top), 0.0).to(tl.float64)
    rest = (share * total - before) / weight  # the number inside the block
    rest = tl.minimum(tl.maximum(rest, 0.0), tl.full((), 1 - 2.220446049250313e-16, tl.float64))  # else it is fp32, 1
    place = place_of(inside, rest, BLOCK)[0]
    token = tl.minimum(tl.minimum(block, blocks - 1) * BLOCK + place, vocabulary - 1)
    chosen = tl.sum(tl.where(columns == token, x, 0.0), 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, chosen - top - tl.log(total).to(tl.float32))


def choose_tokens(logits: Tensor, settings: SamplingSettings, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [S] and their log-probs [S], NaN where logits [S, V] are not finite; temperature is not 0."""
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    largest, sums = torch.empty(2, rows, blocks, device=logits.device)  # [S, blocks] each
    sizes = (vocabulary, blocks, logits.stride(0), settings.temperature)
    sum_blocks[(rows, triton.cdiv(blocks, GROUP))](logits, largest, sums, *sizes, GROUP=GROUP, BLOCK=BLOCK)
    tokens, logprobs = torch.empty_like(positions), torch.empty(rows, device=logits.device)
    choose[(rows,)](
        logits, largest, sums, keys, positions, tokens, logprobs, *sizes,
        GOLDEN=GOLDEN, BLOCKS=triton.next_power_of_2(blocks), BLOCK=BLOCK,
    )  # fmt: skip
    return tokens, logprobs
