"""A parameter's AdamW step in one Triton kernel, which reads and writes what is stored and nothing else.

The formats are those of optim.py and optim_codes.py, bit for bit but for a block with NaN. Each operation is rounded by
itself, as in torch's operations one by one; torch's fused AdamW rounds some together, so that the last bit of an fp32
master may differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from src.engine.optim_chunks import PHASES, Chunk
from src.engine.optim_codes import BLOCK, LARGEST_BITS, LARGEST_ROOT, SMALLEST_SCALE, ratio_limit

ROWS = 8  # blocks of 128 parameters that a program steps


@triton.jit
def limited(x, low, high):
    """x between the two, as torch.clamp has it: NaN stays."""
    above = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dither_of(phases, place, use, shift, WHOLE: tl.constexpr):
    """The dither of these elements of a shard in 1/65536 of a unit, for one of three uses."""
    phase = tl.load(phases + (place + use * WHOLE // 3) % WHOLE)
    return (phase + shift) & (WHOLE - 1)


@triton.jit
def as_8bit(m, v, for_m, for_v, limit, SMALLEST: tl.constexpr, ROOT: tl.constexpr):
    """encode_8bit of optim_codes.py: codes [ROWS, BLOCK] and scales [ROWS] of both moments."""
    root = limited(tl.sqrt_rn(tl.sqrt_rn(v)), 0.0, ROOT)
    scale_v = limited(tl.max(root, 1) * (1 / 254.99), SMALLEST, ROOT)
    wide = tl.zeros_like(root) + scale_v[:, None]
    of_v = (limited(tl.div_rn(root, wide), 1.0, 256.0) + for_v).to(tl.int32) & 255
    root = of_v.to(tl.float32) * wide  # sqrt(sqrt(v)) as it will be decoded
    ratio = limited(tl.div_rn(m, root * root), -limit, limit)
    scale_m = limited(tl.max(tl.abs(ratio), 1) * (1 / 126.99), SMALLEST, ROOT)
    of_m = tl.floor(tl.div_rn(ratio, tl.zeros_like(ratio) + scale_m[:, None]) + for_m).to(tl.int32)
    return of_m, scale_m, of_v, scale_v


@triton.jit(do_not_specialize=("count", "start", "shift"))
def adamw(
    weights, gradients, correction, momentum, variance, momentum_scale, variance_scale, phases, coefficients,
    count, start, shift, shrinkage, new_momentum, beta2, new_variance, eps, limit,
    BITS: tl.constexpr, STATE: tl.constexpr, WHOLE: tl.constexpr, LARGEST: tl.constexpr, ROOT: tl.constexpr,
    SMALLEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some blocks of a parameter. BITS of the master, 0 where the weight is its own; STATE: bits of a moment."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None]  # [ROWS, BLOCK]
    inside, filled = at < count, rows * BLOCK < count
    place = (start + at) % WHOLE

    if BITS == 0:
        master = tl.load(weights + at, inside, 0.0)
    else:
        bits, low = tl.load(weights + at, inside, 0).to(tl.int32), tl.load(correction + at, inside, 0).to(tl.int32)
        bits = (bits << 16) + low if BITS == 32 else ((bits << 8) + low) << 8
        master = bits.to(tl.float32, bitcast=True)
    gradient = tl.load(gradients + at, inside, 0.0).to(tl.float32)
    m, v = tl.load(momentum + at, inside, 0), tl.load(variance + at, inside, 0)
    if STATE == 16:
        m = (m.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        v = (v.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if STATE == 8:
        m, v = m.to(tl.float32), v.to(tl.float32)
        root = v * tl.load(variance_scale + rows, filled, 0.0)[:, None]
        root = root * root
        m, v = m * tl.load(momentum_scale + rows, filled, 0.0)[:, None] * root, root * root

    step_size, correction2 = tl.load(coefficients), tl.load(coefficients + 1)
    master = master - shrinkage * master  # 1 - shrinkage would be rounded, and at small rates be another rate
    m = m + new_momentum * (gradient - m)
    v = beta2 * v + new_variance * gradient * gradient
    deviation = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + correction2) + eps
    master = master - tl.div_rn(step_size * m, deviation)

    if BITS == 0:
        tl.store(weights + at, master, inside)
    else:
        bits = tl.minimum(master.to(tl.int32, bitcast=True), LARGEST)
        if BITS == 32:
            tl.store(correction + at, bits.to(tl.int16), inside)
            bits = (bits + 32768) >> 16
        else:
            bits = (bits + (dither_of(phases, place, 0, shift, WHOLE) >> 8)) >> 8
            tl.store(correction + at, bits.to(tl.int8), inside)
            bits = (bits + 128) >> 8
        tl.store(weights + at, bits.to(tl.int16), inside)

    if STATE == 32:
        tl.store(momentum + at, m, inside)
        tl.store(variance + at, v, inside)
    if STATE == 16:
        for_m, for_v = dither_of(phases, place, 1, shift, WHOLE), dither_of(phases, place, 2, shift, WHOLE)
        tl.store(momentum + at, ((m.to(tl.int32, bitcast=True) + for_m) >> 16).to(tl.int16), inside)
        tl.store(variance + at, ((v.to(tl.int32, bitcast=True) + for_v) >> 16).to(tl.int16), inside)
    if STATE == 8:
        for_m = dither_of(phases, place, 1, shift, WHOLE).to(tl.float32) * (1 / 65536)
        for_v = dither_of(phases, place, 2, shift, WHOLE).to(tl.float32) * (1 / 65536)
        m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)  # a block's unused end must not hold up its scale
        of_m, scale_m, of_v, scale_v = as_8bit(m, v, for_m, for_v, limit, SMALLEST, ROOT)
        tl.store(momentum + at, of_m.to(tl.int8), inside)
        tl.store(variance + at, of_v.to(tl.uint8), inside)
        tl.store(momentum_scale + rows, scale_m, filled)
        tl.store(variance_scale + rows, scale_v, filled)


def step_chunk(bits: int, factors: Tensor, group: dict, chunk: Chunk, gradients: list[Tensor]) -> None:
    """As in optim.py, with one kernel for each piece of a parameter; bits of a master, factors [parameters, 2]."""
    beta1, beta2 = group["betas"]
    layout, work = chunk.states, chunk.work
    state = 8 if "momentum_scale" in layout else 8 * layout["momentum"].element_size()
    shift = work.updates * 40503 % PHASES
    for (index, first, last), weight, gradient, begin in zip(
        chunk.pieces, chunk.weights, gradients, chunk.begins, strict=True
    ):
        count, block = last - first, begin // BLOCK
        views = {name: one[block if name.endswith("_scale") else begin :] for name, one in layout.items()}
        moments = [views[name].view(torch.int16) if state == 16 else views[name] for name in ("momentum", "variance")]
        adamw[(triton.cdiv(count, ROWS * BLOCK),)](
            weight, gradient, views.get("correction"), *moments,
            views.get("momentum_scale"), views.get("variance_scale"), work.phases, factors[index],
            count, (chunk.start + begin) % PHASES, shift, float(group["lr"]) * group["weight_decay"],
            1 - beta1, beta2, 1 - beta2, group["eps"], ratio_limit(beta1, beta2),
            BITS=bits, STATE=state, WHOLE=PHASES, LARGEST=LARGEST_BITS, ROOT=LARGEST_ROOT, SMALLEST=SMALLEST_SCALE,
            ROWS=ROWS, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
