"""Loops of C on a processor of x86, where there is a C compiler, and the products of a decode step (decode_loops.c).

With AVX2 or AVX-512, in fp32 and bf16; that by tiles (AMX) or dot products, where they are faster. Products of few rows
take less time than oneDNN's, which are torch's, and what lies between them is one call in place of many.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import src.engine.wide_products as wide_products
from src.engine.compiler import loops_of
from src.engine.kernels import works

LONGEST_HEAD = 256
PARTS = 64  # of the rows, whose shares of the gradient of a norm's weight are added up afterwards
WORTH_COMPILING = 2**19  # weights; a second of a compiler
ARGUMENTS: dict[str, tuple] = {  # of functions that take no struct: places, then counts, then others
    "product": (4, 3),
    "add_norm": (4, 2, ctypes.c_float),
    "gated": (3, 4),
    "norm": (4, 2, ctypes.c_float),
    "norm_gradient": (6, 2),
    "gated_gradient": (6, 1),
    "choose": (5, 3, ctypes.c_float),
    "statistics": (5, 2),
    "statistics_gradient": (7, 2),
}


class Shape(NamedTuple):
    """Numbers of a vector; outputs and rows whose sums fill its registers; what inputs are to be a multiple of.

    `dots`: numbers in bf16 are multiplied in bf16, else in fp32.
    """

    lanes: int
    width: int
    rows: int
    inputs: int = 1
    dots: bool = False


def shape_for(dtype: torch.dtype) -> Shape | None:
    """That of this processor's vectors; None where the loops are not for it."""
    return shape_of(dtype, torch.backends.cpu.get_cpu_capability(), wide_products.are_faster())


@cache
def shape_of(dtype: torch.dtype, capability: str, wide: bool) -> Shape | None:
    """The same of a processor that can so much."""
    shape = {"AVX2": Shape(8, 24, 4), "AVX512": Shape(16, 48, 8)}.get(capability)
    if dtype == torch.float32 or shape is None:
        return shape
    if dtype != torch.bfloat16:
        return None
    return shape._replace(inputs=2) if wide else Shape(16, 32, 8, 32, dots=True)


@cache
def functions(dtype: torch.dtype, shape: Shape) -> ctypes.CDLL | None:
    """What is compiled of loops.c for numbers of this type."""
    sizes = {"HALF": int(dtype != torch.float32), "LANES": shape.lanes, "WIDTH": shape.width, "ROWS": shape.rows}
    sizes["TILES"] = int(shape.dots and wide_products.has_tiles())
    sizes["DOTS"] = int(shape.dots)
    flags = tuple(
        f"-D{name}={value}" for name, value in (sizes | {"LONGEST_HEAD": LONGEST_HEAD, "PARTS": PARTS}).items()
    )
    found = loops_of(Path(__file__).with_name("loops.c"), "decoding and training without loops in C", flags)
    for name, (places, counts, *floats) in ARGUMENTS.items() if found else ():
        getattr(found, name).argtypes = [ctypes.c_void_p] * places + [ctypes.c_int64] * counts + floats
    return found


@cache
def product_works(dtype: torch.dtype, shape: Shape) -> bool:
    """Whether they can be compiled, and multiply as torch does; tells when not."""

    def trial() -> None:
        x, weights = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(0)).to(dtype)  # [50, 96] each
        expected = (x.double() @ weights.double().T).to(dtype)
        torch.testing.assert_close(product(x, side_by_side(weights), None, 50), expected)

    return functions(dtype, shape) is not None and works("products without loops in C", trial)


def applies(model) -> bool:
    """Whether they are for this model and processor, can be compiled, and nobody looks at operations (--profile)."""
    parameters, shape = list(model.parameters()), shape_for(model.dtype)
    return (
        model.device.type == "cpu"
        and shape is not None
        and not is_in_torch_dispatch_mode()
        and all(type(one) is nn.Parameter and one.dtype == model.dtype for one in parameters)  # not sharded
        and sum(parameter.numel() for parameter in parameters) >= WORTH_COMPILING
        and product_works(model.dtype, shape)
    )


def loops(dtype: torch.dtype) -> ctypes.CDLL:
    """They, where they apply."""
    shape = shape_for(dtype)
    found = shape and functions(dtype, shape)
    assert found is not None
    return found


def apply_to(*tensors: Tensor, whole: bool = True) -> bool:
    """Whether they can be compiled, are for these tensors (of `whole` vectors), and nobody looks at operations."""
    first = tensors[0]
    shape = shape_for(first.dtype) if first.device.type == "cpu" else None
    return (
        shape is not None
        and all(type(x) in (Tensor, nn.Parameter) and x.dtype == first.dtype for x in tensors)  # not sharded
        and not (whole and any(x.shape[-1] % shape.lanes for x in tensors))
        and not is_in_torch_dispatch_mode()
        and functions(first.dtype, shape) is not None
    )


def places(*tensors: Tensor | None) -> list[int | None]:
    """Where they begin in memory."""
    return [None if x is None else x.data_ptr() for x in tensors]


def fits(weights: Tensor) -> bool:
    """Whether the loop of this processor multiplies with these weights [outputs, inputs]."""
    shape = shape_for(weights.dtype)
    return shape is not None and weights.shape[1] % shape.inputs == 0 and product_works(weights.dtype, shape)


def side_by_side(weights: Tensor) -> Tensor:
    """weights [outputs, inputs] -> [panels, inputs, width], zeros behind the last output.

    In bf16 two inputs of an output lie together: [panels, inputs / 2, 2 * width].
    """
    shape = shape_for(weights.dtype)
    assert shape is not None
    filled = pad(weights, (0, 0, 0, -len(weights) % shape.width))
    if weights.dtype == torch.bfloat16:
        filled = filled.view(torch.int32)  # [outputs, inputs / 2] pairs
    return filled.unflatten(0, (-1, shape.width)).transpose(1, 2).contiguous().view(weights.dtype)


def product(x: Tensor, weights: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [..., inputs] and weights of side_by_side -> [..., outputs]."""
    assert x.dtype == weights.dtype
    x, inputs = x.contiguous(), x.shape[-1]
    result = x.new_empty(*x.shape[:-1], outputs)
    rows, of_bias = x.numel() // inputs, None if bias is None else bias.data_ptr()
    places = x.data_ptr(), weights.data_ptr(), of_bias, result.data_ptr()
    check_memory(loops(x.dtype).product(*places, rows, inputs, outputs))
    return result


def check_memory(failed: int) -> None:
    """MemoryError where a loop says that it found none."""
    if failed:
        raise MemoryError("a product in loops of C found no memory; lower training.inference_batch_size")
