"""Attention of a packed row and its gradient in loops of C, which read and write the row where it lies.

A rectangle of padded segments (attention.py) is gathered and scattered by torch, which takes longer than its products
where texts are short. Not in bf16 on a processor with tiles (AMX), whose products are faster: cpu_attention.py.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from src.engine.decode_loops import Shape, apply_to, loops, places, shape_for
from src.engine.kernels import works

FEWEST = 2**16  # numbers of the queries that are worth a compiler's second
AT_ONCE = 4  # completions of a prompt, whose keys a thread reads once for them


class Groups(NamedTuple):
    """Segments of a packed row that share keys: a few completions, or a prompt alone, or what all begin with."""

    first_segments: Tensor  # [groups + 1]
    prompts: Tensor  # [groups] where what each shares begins
    prompt_lengths: Tensor  # [groups]
    starts: Tensor  # [segments]
    lengths: Tensor  # [segments]
    first: int  # tokens that all begin with, which are the first segment; 0 where there is none
    most: int  # most keys that a group shares, those included
    longest: int  # most keys of a query


def groups_of(starts, lengths, prefix_starts, prefix_lengths, first: int) -> Groups:
    """At most AT_ONCE segments with the same prefix, one after the other, are a group; without one each is alone."""
    begins: list[int] = []
    for segment, (place, length) in enumerate(zip(prefix_starts.tolist(), prefix_lengths.tolist(), strict=True)):
        same = begins and (place, length) == (prefix_starts[begins[-1]], prefix_lengths[begins[-1]])
        if not same or not length or segment - begins[-1] == AT_ONCE:
            begins.append(segment)

    def column(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))

    columns = np.r_[begins, len(starts)], prefix_starts[begins], prefix_lengths[begins], starts, lengths
    most = first + int(prefix_lengths.max())
    longest = first + int((prefix_lengths + lengths).max())
    return Groups(*map(column, columns), first, most, longest)  # type: ignore[arg-type, call-arg]


class Arguments(ctypes.Structure):
    """As in attention_loops.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "of_out")),
        *((name, ctypes.c_void_p) for name in ("target", "of_key", "of_value", "normalizer", "shared")),
        *((name, ctypes.c_void_p) for name in ("groups", "prompts", "prompt_lengths", "starts", "lengths")),
        *((name, ctypes.c_int64) for name in ("count", "first", "most", "kv_heads", "repeats", "dim", "longest")),
        *((name, ctypes.c_int64) for name in ("row_query", "row_key", "row_value")),
        ("scaling", ctypes.c_float),
    ]


def call(tensors: tuple[Tensor | None, ...], groups: Groups, scaling: float, backward: bool) -> None:
    """`tensors` as the fields of Arguments begin, of which queries, keys and values [tokens, heads, D]."""
    query, key, value = (x for x in tensors[:3] if x is not None)
    _, kv_heads, dim = key.shape
    arguments = Arguments(
        *places(*tensors, *groups[:5]), len(groups.prompts), groups.first, groups.most, kv_heads,
        query.shape[1] // kv_heads, dim, groups.longest, query.stride(0), key.stride(0), value.stride(0), scaling,
    )  # fmt: skip
    if loops(query.dtype).packed_attention(ctypes.byref(arguments), ctypes.c_int64(backward)):
        raise MemoryError(
            "attention in loops of C found no memory; lower the tokens of a pass (training.max_tokens_per_microbatch)"
        )


def in_rows(x: Tensor) -> Tensor:
    """[tokens, heads, D], whose tokens may lie apart, but no numbers of one."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


class LoopPackedAttention(torch.autograd.Function):
    """For the gradient it keeps what it got and gave, and the logarithm of each sum of a softmax."""

    @staticmethod
    def forward(context, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scaling: float) -> Tensor:
        """query [T, H, D], key and value [T, Hkv, D] -> [T, H, D]."""
        query, key, value = (in_rows(x) for x in (query, key, value))
        out = query.new_empty(query.shape)
        normalizer = query.new_empty(query.shape[:2], dtype=torch.float32)  # [T, H]
        call((query, key, value, None, None, out, None, None, normalizer, None), groups, scaling, backward=False)
        context.save_for_backward(query, key, value, out, normalizer)
        context.groups, context.scaling = groups, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(context, slope: Tensor):
        query, key, value, out, normalizer = context.saved_tensors
        groups, (_, kv_heads, dim) = context.groups, key.shape
        of_query = torch.empty_like(out)
        of_key, of_value = normalizer.new_zeros(2, *key.shape)  # in fp32
        shared = normalizer.new_empty(len(groups.prompts), kv_heads, 2, groups.most, dim)
        gradients = of_query, of_key, of_value, normalizer, shared
        call((query, key, value, out, slope.contiguous(), *gradients), groups, context.scaling, backward=True)
        return of_query, of_key.to(key.dtype), of_value.to(key.dtype), None, None


def applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the loops are for these [T, heads, D], tried once."""
    if query.numel() < FEWEST or value.shape != key.shape or not apply_to(query, key, value):
        return False
    if ctypes.c_int.in_dll(loops(query.dtype), "has_tiles").value:
        return False
    return agrees(query.shape[1], key.shape[1], query.shape[2], query.dtype, shape_for(query.dtype))


@cache
def agrees(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether LoopPackedAttention gives what torch gives in fp32, and its gradients; tells when not."""

    @torch.inference_mode(False)
    def trial() -> None:
        draw, length = torch.Generator().manual_seed(0), 90
        shapes = [(length, count, dim) for count in (heads, kv_heads, kv_heads, heads)]
        *given, slope = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
        one = groups_of(np.array([0]), np.array([length]), np.array([0]), np.array([0]), 0)

        def plain(*inputs: Tensor) -> Tensor:
            query, key, value = (x.transpose(0, 1)[None] for x in inputs)  # [1, heads, T, D]
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        def in_loops(*inputs: Tensor) -> Tensor:
            return LoopPackedAttention.apply(*inputs, one, dim**-0.5)

        outcomes = []
        for kind, attention in ((dtype, in_loops), (torch.float32, plain)):
            with torch.enable_grad():
                inputs = [x.to(kind).requires_grad_() for x in given]
                out = attention(*inputs)
                outcomes.append([out.detach(), *torch.autograd.grad(out, inputs, slope.to(kind))])
        for ours, theirs in zip(*outcomes, strict=True):
            error = float((ours.float() - theirs).norm() / theirs.norm())
            if not error < (1e-5 if dtype == torch.float32 else 1e-2):  # NaN is wrong too
                raise ValueError(f"wrong by {error:.2g}")

    return works("attention of an update without loops in C", trial)
