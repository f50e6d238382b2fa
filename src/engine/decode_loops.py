"""Loops of C for a decode step in fp32 on a processor with AVX2 (decode_loops.c), where there is a C compiler.

Products of 8 to 32 rows take about two thirds of the time that oneDNN needs, which is torch's, and less than MKL's.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from src.engine.compiler import loops_of
from src.engine.kernels import works

LANES = 8  # numbers of a vector
WIDTH, ROWS = 24, 4  # outputs and rows whose sums fill 12 of the 16 vector registers
LONGEST_HEAD = 256
WORTH_COMPILING = 2**19  # weights; a second of a compiler


@cache
def functions() -> ctypes.CDLL | None:
    """What is compiled of decode_loops.c."""
    flags = (f"-DWIDTH={WIDTH}", f"-DROWS={ROWS}", f"-DLONGEST_HEAD={LONGEST_HEAD}")
    found = loops_of(Path(__file__).with_suffix(".c"), "decoding without loops in C", flags)
    if found is None:
        return None
    place, count = ctypes.c_void_p, ctypes.c_int64
    found.product.argtypes = [place] * 4 + [count] * 3
    found.add_norm.argtypes = [place] * 4 + [count] * 2 + [ctypes.c_float]
    found.gated.argtypes = [place] * 3 + [count] * 4
    return found


@cache
def product_works() -> bool:
    """Whether they can be compiled, and multiply as torch does; tells when not."""

    def trial() -> None:
        x, weights = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0))  # [50, 40] each
        torch.testing.assert_close(product(x[:7], side_by_side(weights), None, 50), x[:7] @ weights.T)

    return functions() is not None and works("products without loops in C", trial)


def applies(model) -> bool:
    """Whether they are for this model and processor, can be compiled, and nobody looks at operations (--profile)."""
    parameters = list(model.parameters())
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and not is_in_torch_dispatch_mode()
        and all(type(one) is nn.Parameter and one.dtype == torch.float32 for one in parameters)  # not sharded
        and sum(parameter.numel() for parameter in parameters) >= WORTH_COMPILING
        and product_works()
    )


def loops() -> ctypes.CDLL:
    """They, where they apply."""
    found = functions()
    assert found is not None
    return found


def side_by_side(weights: Tensor) -> Tensor:
    """weights [outputs, inputs] -> [panels, inputs, WIDTH], zeros behind the last output."""
    filled = pad(weights, (0, 0, 0, -len(weights) % WIDTH))
    return filled.unflatten(0, (-1, WIDTH)).transpose(1, 2).contiguous()


def product(x: Tensor, weights: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [..., inputs] and weights of side_by_side -> [..., outputs]."""
    assert x.dtype == torch.float32
    x, inputs = x.contiguous(), x.shape[-1]
    result = x.new_empty(*x.shape[:-1], outputs)
    rows, of_bias = x.numel() // inputs, None if bias is None else bias.data_ptr()
    loops().product(x.data_ptr(), weights.data_ptr(), of_bias, result.data_ptr(), rows, inputs, outputs)
    return result
