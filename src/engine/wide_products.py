"""Products of bf16 numbers in fp32, on a CPU that multiplies so faster.

Without tiles (AMX) a product in bf16 takes twice as long as one in fp32 on a processor of Intel, and eight times where
there is AVX2 alone. Sums are in fp32 either way, and rounded once.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.engine.compiler import X86

LARGEST = 2**24  # elements of a copy in fp32, beside that of the weights


def are_faster() -> bool:
    """Whether this processor multiplies in fp32 faster than in bf16."""
    return faster_with(torch.backends.cpu.get_cpu_capability())


@cache
def has_tiles() -> bool:
    """Whether there are tiles (AMX), and the system lets them be used."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


@cache
def faster_with(capability: str) -> bool:
    """The same of a processor that can so much; dot products of bf16 are slower than those of fp32 on Intel's."""
    if not X86 or has_tiles():
        return False
    has_dots = capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return not has_dots or "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))


def multiplied_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In what a product of such numbers is computed."""
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 and are_faster() else dtype


def times(left: Tensor, right: Tensor) -> Tensor:
    """left [..., rows, inner] @ right [..., inner, columns], in fp32 where that is faster."""
    if multiplied_in(left.device, left.dtype) == left.dtype:
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)


def parts(rows: int, width: int) -> list[slice]:
    """Rows at a time, whose copies in fp32 are not as large as the logits of a pass."""
    at_once = max(1, LARGEST // width)
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


class WideProduct(torch.autograd.Function):
    """x @ weight.T + bias; for the gradient it keeps the weight, and x where the weight wants one."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., inputs], weight [outputs, inputs], bias [outputs] -> [..., outputs]."""
        context.save_for_backward(x if context.needs_input_grad[1] else None, weight)  # a frozen weight needs no x
        context.shape = x.shape
        flat = x.reshape(-1, x.shape[-1])  # [rows, inputs]
        out, wide, bias = x.new_empty(len(flat), len(weight)), weight.float(), None if bias is None else bias.float()
        for rows in parts(len(flat), max(weight.shape)):
            out[rows] = F.linear(flat[rows].float(), wide, bias)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(context, slope: Tensor):
        x, weight = context.saved_tensors
        wants_x, wants_weight, wants_bias = context.needs_input_grad
        slopes = slope.reshape(-1, slope.shape[-1])  # [rows, outputs]
        flat = x.reshape(-1, x.shape[-1]) if wants_weight else slopes  # [rows, inputs]
        of_x = slopes.new_empty(len(slopes) if wants_x else 0, weight.shape[1])
        wide = weight.float() if wants_x else None
        of_weight = torch.zeros(weight.shape if wants_weight else 0)
        of_bias = torch.zeros(len(weight) if wants_bias else 0)
        for rows in parts(len(slopes), max(weight.shape)):
            some = slopes[rows].float()
            if wide is not None:
                of_x[rows] = some @ wide
            if wants_weight:
                torch.addmm(of_weight, some.t(), flat[rows].float(), out=of_weight)  # which --profile counts
            if wants_bias:
                of_bias += some.sum(0)
        return (
            of_x.view(context.shape) if wants_x else None,
            of_weight.to(weight.dtype) if wants_weight else None,
            of_bias.to(weight.dtype) if wants_bias else None,
        )


class WideLinear(nn.Linear):
    """A linear layer in bf16 that multiplies so. It becomes one by its class alone: weights and files stay theirs."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if x.dtype != self.weight.dtype:  # torch says that it does not fit
            return super().forward(x)
        return WideProduct.apply(x, self.weight, self.bias)


LINEAR = (nn.Linear, WideLinear)  # the classes of linear layers that are no adapter's


def widen(model) -> None:
    """Linear layers in bf16 multiply in fp32 from now on, where that is faster."""
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and multiplied_in(module.weight.device, module.weight.dtype) != module.weight.dtype
        ):
            module.__class__ = WideLinear
