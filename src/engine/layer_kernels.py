"""What lies between the products of a decode step on a GPU, in three Triton kernels; operations.py is their reference.

Each rounds where torch's operations round, so that the sampler stays as near to the trainer as it is without them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from src.engine.operations import Operations, side_by_side

WIDTH = 1024  # of a piece of a gated product
LONGEST = 16384  # a row that one program still holds


@triton.jit
def add_norm(hidden, update, weight, normed, width, epsilon, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    """A row: hidden += update, and its RMS norm."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    places = tl.program_id(0).to(tl.int64) * width + columns
    total = tl.load(hidden + places, inside, 0.0)
    if HAS_UPDATE:
        wide = total.to(tl.float32) + tl.load(update + places, inside, 0.0).to(tl.float32)
        total = wide.to(total.dtype)
        tl.store(hidden + places, total, inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    tl.store(normed + places, wide * scale * tl.load(weight + columns, inside, 0.0).to(tl.float32), inside)


@triton.jit
def turn(source, target, cosine, sine, weight, epsilon, NORMED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A head of a row: its norm where the model has one, then its position."""
    column = tl.arange(0, BLOCK)
    inside, other = column < DIM, (column + DIM // 2) % DIM
    here, there = tl.load(source + column, inside, 0.0), tl.load(source + other, inside, 0.0)
    if NORMED:
        wide = here.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + epsilon)
        there = (there.to(tl.float32) * scale * tl.load(weight + other, inside, 0.0).to(tl.float32)).to(here.dtype)
        here = (wide * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)).to(here.dtype)
    sign = tl.where(column < DIM // 2, -1.0, 1.0)
    along = here.to(tl.float32) * tl.load(cosine + column, inside, 0.0).to(tl.float32)
    across = sign * there.to(tl.float32) * tl.load(sine + column, inside, 0.0).to(tl.float32)
    tl.store(target + column, along.to(here.dtype).to(tl.float32) + across.to(here.dtype).to(tl.float32), inside)


@triton.jit
def turn_and_store(
    query, key, value, cosine, sine, places, query_weight, key_weight, turned, keys, values,
    query_row, key_row, value_row, angle_row, group_stride, member_stride,
    slot_stride, head_stride, place_stride, epsilon,
    REPEATS: tl.constexpr, KV_HEADS: tl.constexpr, NORMED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A head of a row: a query to `turned`, a key or a value to its place in the cache."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle = row * angle_row
    slot = row * slot_stride + tl.load(places + row) * place_stride
    if head < KV_HEADS * REPEATS:
        target = turned + row * (KV_HEADS * REPEATS * DIM)
        target += (head // REPEATS) * group_stride + (head % REPEATS) * member_stride
        source = query + row * query_row + head * DIM
        turn(source, target, cosine + angle, sine + angle, query_weight, epsilon, NORMED, DIM, BLOCK)
    elif head < KV_HEADS * (REPEATS + 1):
        head -= KV_HEADS * REPEATS
        source, target = key + row * key_row + head * DIM, keys + slot + head * head_stride
        turn(source, target, cosine + angle, sine + angle, key_weight, epsilon, NORMED, DIM, BLOCK)
    else:
        column, head = tl.arange(0, BLOCK), head - KV_HEADS * (REPEATS + 1)
        kept = tl.load(value + row * value_row + head * DIM + column, column < DIM, 0.0)
        tl.store(values + slot + head * head_stride + column, kept, column < DIM)


@triton.jit
def gated(gate, up, product, width, gate_row, up_row, BLOCK: tl.constexpr):
    """A piece of a row: silu(gate) * up."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(gate + row * gate_row + columns, inside, 0.0)
    silu = (x.to(tl.float32) / (1 + tl.exp(-x.to(tl.float32)))).to(x.dtype).to(tl.float32)
    tl.store(product + row * width + columns, silu * tl.load(up + row * up_row + columns, inside, 0.0), inside)


class FusedOperations(Operations):
    """The same operations in one kernel each; hidden states are added to in place."""

    def add_norm(self, hidden: Tensor, update: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """hidden + update, and its norm, [n, hidden] each."""
        normed, width = torch.empty_like(hidden), hidden.shape[-1]
        if width > LONGEST:
            return super().add_norm(hidden, update, norm)
        options = {"HAS_UPDATE": update is not None, "BLOCK": triton.next_power_of_2(width), "num_warps": 8}
        add_norm[(len(hidden),)](hidden, update, norm.weight, normed, width, norm.variance_epsilon, **options)
        return hidden, normed

    def siblings(self, hidden: Tensor, layers: tuple) -> list[Tensor]:
        """What layers make of the same input, by one product where their weights lie side by side."""
        if any(type(layer) is not nn.Linear or "forward" in vars(layer) for layer in layers):
            return super().siblings(hidden, layers)
        weight, biases = side_by_side([layer.weight for layer in layers]), [layer.bias for layer in layers]
        bias = None if None in biases else side_by_side(biases)
        if weight is None or (bias is None and biases != [None] * len(layers)):
            return super().siblings(hidden, layers)
        product = nn.functional.linear(hidden, weight, bias)  # [n, all outputs]
        return list(product.split([layer.out_features for layer in layers], -1))

    def attend(self, part: Any, qkv: list[Tensor], cosine: Tensor, sine: Tensor, attention) -> Tensor:
        """Queries, keys and values [n, heads * D] -> [n, 1, H, D]; cosine and sine [n, D] of each row's position."""
        query, key, value = qkv
        n, dim = cosine.shape
        keys, values = attention.keys[part.layer_idx], attention.values[part.layer_idx]  # [slots, Hkv, width, D] each
        kv_heads, repeats = key.shape[1] // dim, query.shape[1] // key.shape[1]
        if attention.token_major:
            turned = query.new_empty(n, repeats, kv_heads, dim).transpose(1, 2)  # [n, Hkv, R, D] as it will be read
        else:
            turned = query.new_empty(n, kv_heads, repeats, dim)
        norms = [getattr(part, name, None) for name in ("q_norm", "k_norm")]
        weights = [norm if norm is None else norm.weight for norm in norms]
        epsilon = 0.0 if norms[0] is None else norms[0].variance_epsilon
        turn_and_store[(n, kv_heads * (repeats + 2))](
            query, key, value, cosine, sine, attention.places, *weights, turned, keys, values,
            query.stride(0), key.stride(0), value.stride(0), cosine.stride(0), *turned.stride()[1:3],
            *keys.stride()[:3], epsilon,
            REPEATS=repeats, KV_HEADS=kv_heads, NORMED=norms[0] is not None, DIM=dim, BLOCK=triton.next_power_of_2(dim),
            num_warps=1,
        )  # fmt: skip
        return attention.read(part.layer_idx, turned, part.scaling)

    def feed_forward(self, hidden: Tensor, mlp: Any) -> Tensor:
        """[n, hidden] -> [n, hidden]."""
        gate, up = self.siblings(hidden, (mlp.gate_proj, mlp.up_proj))
        n, width = gate.shape
        product = torch.empty_like(gate, memory_format=torch.contiguous_format)
        grid = (n, triton.cdiv(width, WIDTH))
        gated[grid](gate, up, product, width, gate.stride(0), up.stride(0), BLOCK=WIDTH)
        return mlp.down_proj(product)
