"""Attention of a padded rectangle of segments on a CPU in bf16, by matrix products.

torch's own kernel takes about twice as long there, since it does not use the matrix units of the processor. As it does,
this one keeps scores, softmax and its gradient in fp32, and keeps nothing for the backward pass but query, key, value
and output: the weights are computed again. Only one call's weights exist at a time, at most LARGEST elements.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGEST = 2**25  # weights [segments, heads, queries, keys] of one call


def applies(query: Tensor, key: Tensor) -> bool:
    """Whether these [S, heads, L or K, D] are for this file: longer ones are for a kernel that holds no weights."""
    in_bf16 = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return in_bf16 and query.shape[1] * query.shape[2] * key.shape[2] <= LARGEST


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, without rounding, of bf16 numbers: an fp32 product that may take its inputs as bf16."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        return left.float() @ right.float()
    finally:
        settings.fp32_precision = before


def weights_of(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """query [S, Hkv, R * L, D], key [S, Hkv, K, D], mask [S, 1, L, K] in fp32 -> softmax [S, Hkv, R * L, K] in fp32."""
    scores = product(query, key.transpose(-1, -2)).unflatten(2, (-1, mask.shape[2]))  # [S, Hkv, R, L, K]
    return torch.add(mask[:, :, None], scores, alpha=scaling).flatten(2, 3).softmax(-1)


class TileAttention(torch.autograd.Function):
    """The R query heads of a key-value head lie one after the other, so that they are multiplied at once."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling):
        ctx.scaling = scaling
        output = weights_of(query, key, mask, scaling).to(value.dtype) @ value  # [S, Hkv, R * L, D]
        ctx.save_for_backward(query, key, value, mask, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output):
        query, key, value, mask, output = ctx.saved_tensors
        weights = weights_of(query, key, mask, ctx.scaling)  # [S, Hkv, R * L, K]
        of_value = weights.to(value.dtype).transpose(-1, -2) @ of_output  # [S, Hkv, K, D]
        mean = (of_output.float() * output.float()).sum(-1, keepdim=True)  # [S, Hkv, R * L, 1]
        of_weights = product(of_output, value.transpose(-1, -2))
        of_scores = of_weights.sub_(mean).mul_(weights).mul_(ctx.scaling).to(query.dtype)  # [S, Hkv, R * L, K]
        return of_scores @ key, of_scores.transpose(-1, -2) @ query, of_value, None, None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """query [S, H, L, D], key and value [S, Hkv, K, D], mask [S, 1, L, K] 0 or -inf -> [S, H, L, D]."""
    segments, heads, width, _ = query.shape
    query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [S, Hkv, R * L, D]
    at_once = max(1, LARGEST // (heads * width * key.shape[2]))
    parts = [
        TileAttention.apply(query[i : i + at_once], key[i : i + at_once], value[i : i + at_once],
                            mask[i : i + at_once].float(), scaling)
        for i in range(0, segments, at_once)
    ]  # fmt: skip
    return torch.cat(parts).unflatten(2, (-1, width)).flatten(1, 2)
