"""A parameter's AdamW step on a CPU in one loop of C (optim_loop.c), where there is a C compiler.

It gives what the operations of optim_chunks.py give, bit for bit where torch's square root is rounded correctly, which
MKL's is not: of 8-bit moments the last bit of a scale may differ, and hence a code.
"""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from src.engine.optim_chunks import PHASES, Chunk
from src.engine.optim_codes import BLOCK, LARGEST_BITS, LARGEST_ROOT, SMALLEST_SCALE, ratio_limit
from src.engine.profiling import moves

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
PROCESSORS = (("-march=native", "-fopenmp"), ("-mcpu=native",))  # the second for a Mac's compiler, without threads
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


@cache
def compiled() -> ctypes.CDLL:
    """The loop for this processor; in a second, once a process. Its threads are torch's own, whose OpenMP is loaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise OSError("there is no C compiler")
    problem = ""
    with tempfile.TemporaryDirectory() as folder:
        for flags in PROCESSORS:
            made, target = f"{folder}/loop.o", f"{folder}/loop{flags[0]}.so"
            try:
                subprocess.run([compiler, *FLAGS, *flags, "-c", SOURCE, "-o", made], check=True, capture_output=True)
                # linked without -fopenmp, which would bring threads beside torch's
                subprocess.run([compiler, "-shared", made, "-o", target], check=True, capture_output=True)
                return ctypes.CDLL(target)
            except (OSError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stderr", b"").decode(errors="replace").strip()
                problem = problem or output or str(error)
    raise OSError(problem)


def step_chunk(bits: int, factors: Tensor, group: dict, chunk: Chunk, gradients: list[Tensor]) -> None:
    """As in optim_kernel.py."""
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
        compiled().step(ctypes.byref(what), bits, state)
    moves(gradients, [*chunk.weights, *layout.values()])
