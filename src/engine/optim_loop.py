"""A parameter's AdamW step on a CPU in one loop of C (optim_loop.c), where there is a C compiler.

It gives what the operations of optim_chunks.py give, bit for bit where torch's square root is rounded correctly, which
MKL's is not: of 8-bit moments the last bit of a scale may differ, and hence a code.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from src.engine.compiler import loops_of
from src.engine.optim_chunks import PHASES, Chunk, Shard
from src.engine.optim_codes import BLOCK, LARGEST_BITS, LARGEST_ROOT, SMALLEST_SCALE, ratio_limit
from src.engine.profiling import moves

WORTH_COMPILING = 2**22  # elements; a step of them takes some 20 ms without
EVEN = 16  # torch's kernel steps what is left of a multiple of its vectors in another order of rounding


class Step(ctypes.Structure):
    """As in optim_loop.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "gradients", "correction", "momentum", "variance")),
        *((name, ctypes.c_void_p) for name in ("momentum_scale", "variance_scale", "phases")),
        *((name, ctypes.c_int64) for name in ("count", "start")),
        *((name, ctypes.c_float) for name in ("kept", "new_momentum", "beta2", "new_variance", "eps", "step_size")),
        *((name, ctypes.c_float) for name in ("correction2", "ratio_limit", "largest_root", "smallest_scale")),
        *((name, ctypes.c_int32) for name in ("largest_bits", "shift", "short_gradients")),
    ]


def functions() -> ctypes.CDLL | None:
    """What is compiled of optim_loop.c."""
    flags = (f"-DBLOCK={BLOCK}", f"-DPHASES={PHASES}", "-ffp-contract=off")
    return loops_of(Path(__file__).with_suffix(".c"), "the optimizer steps without its loop in C", flags)


def loop_fits(shard: Shard) -> bool:
    """Whether the loop saves more than its compilation takes, gives the same bits, and can be compiled."""
    even = all(one.numel() % EVEN == 0 for one in shard.parameters)
    return even and shard.total >= WORTH_COMPILING and functions() is not None


def step_chunk(bits: int, factors: Tensor, group: dict, chunk: Chunk, gradients: list[Tensor]) -> None:
    """As in optim_kernel.py."""
    loop = functions()
    assert loop is not None
    gradients = [one if one.dtype in (torch.bfloat16, torch.float32) else one.float() for one in gradients]
    beta1, beta2 = group["betas"]
    layout, work = chunk.states, chunk.work
    state = 8 if "momentum_scale" in layout else 8 * layout["momentum"].element_size()
    sizes = factors.tolist()
    for (index, first, last), weight, gradient, begin in zip(
        chunk.pieces, chunk.weights, gradients, chunk.begins, strict=True
    ):
        places = {
            name: one[begin // BLOCK if name.endswith("_scale") else begin :].data_ptr() for name, one in layout.items()
        }
        step_size, correction2 = sizes[index]
        what = Step(
            weights=weight.data_ptr(), gradients=gradient.data_ptr(), phases=work.phases.data_ptr(), **places,
            count=last - first, start=(chunk.start + begin) % PHASES, shift=work.updates * 40503 % PHASES,
            kept=1 - float(group["lr"]) * group["weight_decay"], new_momentum=1 - beta1, beta2=beta2,
            new_variance=1 - beta2, eps=group["eps"], step_size=step_size, correction2=correction2,
            ratio_limit=ratio_limit(beta1, beta2), largest_root=LARGEST_ROOT, smallest_scale=SMALLEST_SCALE,
            largest_bits=LARGEST_BITS, short_gradients=gradient.dtype == torch.bfloat16,
        )  # fmt: skip
        loop.step(ctypes.byref(what), bits, state)
    moves(gradients, [*chunk.weights, *layout.values()])
