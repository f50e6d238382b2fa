"""Norms, gated products, positions and the statistics of logits with their gradients in loops of C, for a CPU.

torch computes each by five to ten operations, which go over memory one after the other: a fifth of an update.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import src.engine.cpu_layers as cpu_layers
from src.engine.cpu_layers import TurnArguments
from src.engine.decode_loops import PARTS, loops, places
from src.engine.wide_products import times

FEWEST = 2**18  # logits that are worth a compiler's second


class LoopNorm(torch.autograd.Function):
    """The RMS norm of the last dimension; for the gradient it keeps what it got, and a number a row."""

    @staticmethod
    def forward(context, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """hidden [..., width], weight [width] -> [..., width]."""
        hidden, weight, width = hidden.contiguous(), weight.contiguous(), hidden.shape[-1]
        out, scales = torch.empty_like(hidden), hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
        loops(hidden.dtype).norm(*places(hidden, weight, out, scales), scales.numel(), width, epsilon)
        context.save_for_backward(hidden, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(context, slope: Tensor):
        hidden, weight, scales = context.saved_tensors
        slope, width = slope.contiguous(), hidden.shape[-1]
        of_hidden, of_weight = torch.empty_like(hidden), scales.new_zeros(PARTS, width)
        loops(hidden.dtype).norm_gradient(
            *places(hidden, weight, scales, slope, of_hidden, of_weight), scales.numel(), width
        )
        return of_hidden, of_weight.sum(0).to(weight.dtype) if context.needs_input_grad[1] else None, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., wide] each."""
    return cpu_layers.gated(gate.flatten(0, -2).contiguous(), up.flatten(0, -2).contiguous()).view(gate.shape)


class LoopGatedProduct(torch.autograd.Function):
    """As GatedProduct of lighter.py, which has it for a GPU."""

    @staticmethod
    def forward(context, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """gate and up [..., wide], weight [hidden, wide] -> [..., hidden]."""
        gate, up = gate.contiguous(), up.contiguous()
        context.save_for_backward(gate, up, weight)
        return times(gated(gate, up), weight.t())

    @staticmethod
    @once_differentiable
    def backward(context, slope: Tensor):
        gate, up, weight = context.saved_tensors
        of_product, of_weight = times(slope, weight).contiguous(), None
        of_gate, of_up, product = (torch.empty_like(gate) for _ in range(3))
        loops(gate.dtype).gated_gradient(*places(gate, up, of_product, of_gate, of_up, product), gate.numel())
        if context.needs_input_grad[2]:
            of_weight = times(slope.flatten(0, -2).t(), product.flatten(0, -2))  # [hidden, wide]
        return of_gate, of_up, of_weight


class LoopTurn(torch.autograd.Function):
    """Rotary positions. The gradient turns back: both halves of a head have the same angles."""

    @staticmethod
    def forward(context, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x [..., heads, D], cosine and sine [..., D] -> [..., heads, D]."""
        context.save_for_backward(cosine, sine)
        x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
        turned, (heads, dim) = torch.empty_like(x), x.shape[-2:]
        row = heads * dim
        loops(x.dtype).turn(ctypes.byref(TurnArguments(
            *places(x, cosine, sine, None, turned, None, None), x.numel() // row, heads, dim, row, row, dim, 0.0
        )))  # fmt: skip
        return turned

    @staticmethod
    @once_differentiable
    def backward(context, slope: Tensor):
        cosine, sine = context.saved_tensors
        return LoopTurn.apply(slope, cosine, -sine), None, None


def statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [tokens, vocab], target [tokens, 1] -> log-prob and entropy [tokens], normalizer [tokens, 1]."""
    logits, target = logits.contiguous(), target.contiguous()
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:  # C would read what is there
        raise IndexError(
            f"a target is no token of a vocabulary of {logits.shape[1]}; take the tokenizer that belongs to the model"
        )
    chosen, entropy, normalizer = torch.empty(3, len(logits))  # [tokens] each
    loops(logits.dtype).statistics(*places(logits, target, chosen, entropy, normalizer), *logits.shape)
    return chosen, entropy, normalizer[:, None]


def statistics_gradient(logits, target, normalizer, entropy, of_chosen, of_entropy) -> Tensor:
    """Gradient by the logits [tokens, vocab] of what `statistics` gives; of_entropy may be None."""
    logits, target, normalizer, entropy = (x.contiguous() for x in (logits, target, normalizer, entropy))
    slopes = [None if slope is None else slope.float().contiguous() for slope in (of_chosen, of_entropy)]
    gradient = torch.empty_like(logits)
    loops(logits.dtype).statistics_gradient(
        *places(logits, target, normalizer, entropy, *slopes, gradient), *logits.shape
    )
    return gradient
