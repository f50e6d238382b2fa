"""How numbers are stored between two optimizer steps: master weights and moments as codes (optim.py says which).

Whatever is not exact is rounded with dither, never to nearest.
"""

import math

import torch
from torch import Tensor

BLOCK = 128  # elements that share one 8-bit scale
LARGEST_BITS = 0x7FFF7E00  # above lie only NaNs that rounding up would carry into the sign bit
LARGEST_ROOT = 4e9  # v^(1/4) just below fp32's maximum: an overflown v must not make its block's scale infinite
SMALLEST_SCALE = 1e-10  # of v^(1/4), i.e. sqrt(v) = 1e-20, far below any eps: keeps 0 / 0 out of empty blocks


def padded(count: int) -> int:
    """The next multiple of BLOCK."""
    return -(-count // BLOCK) * BLOCK


def decode_master(correction: Tensor, bits: Tensor) -> None:
    """bits, int32 [n]: in, the bf16 parameter's bits; out, the fp32 master's."""
    if correction.dtype == torch.int16:
        bits.bitwise_left_shift_(16).add_(correction)
    else:
        bits.bitwise_left_shift_(8).add_(correction).bitwise_left_shift_(8)


def encode_master(correction: Tensor, bits: Tensor, dither: Tensor) -> None:
    """bits, int32 [n]: in, the fp32 master's; out, those of the nearest bf16. The rest goes into `correction`.

    Ties go away from zero: then the difference is the low half read as a signed number, and 16 bits suffice.
    """
    bits.clamp_(max=LARGEST_BITS)
    if correction.dtype == torch.int16:
        correction.copy_(bits)  # the cast keeps the low 16 bits
        bits.add_(2**15).bitwise_right_shift_(16)
    else:
        bits.add_(dither).bitwise_right_shift_(8)  # the master rounded to 24 bits
        correction.copy_(bits)  # its low 8 bits
        bits.add_(2**7).bitwise_right_shift_(8)


def encode_bf16(stored: Tensor, moment: Tensor, dither: Tensor) -> None:
    """Dithered rounding to bf16, in place on the bits: bf16 to nearest would never let v decay."""
    bits = moment.view(torch.int32).add_(dither).bitwise_right_shift_(16)  # [n]
    stored.view(torch.int16).copy_(bits)


def decode_8bit(states: dict[str, Tensor], momentum: Tensor, variance: Tensor) -> None:
    """momentum and variance, fp32 [n], from their blockwise codes."""
    variance.copy_(states["variance"]).view(-1, BLOCK).mul_(states["variance_scale"][:, None])
    variance.square_()  # sqrt(v)
    momentum.copy_(states["momentum"]).view(-1, BLOCK).mul_(states["momentum_scale"][:, None])
    momentum.mul_(variance)
    variance.square_()


def encode_8bit(
    states: dict[str, Tensor],
    momentum: Tensor,
    variance: Tensor,
    scratch: tuple[Tensor, Tensor],
    dithers: tuple[Tensor, Tensor],
    ratio_limit: float,
) -> None:
    """The inverse; destroys momentum and variance. Codes of v start at 1: sqrt(v) = 0 would lose m with it."""
    integers, magnitude = scratch[0].view(torch.int32), scratch[1]  # [n] each
    root, root_scale = variance.sqrt_().sqrt_().clamp_(max=LARGEST_ROOT), states["variance_scale"]
    torch.amax(root.view(-1, BLOCK), dim=1, out=root_scale)
    root_scale.mul_(1 / 254.99).clamp_(min=SMALLEST_SCALE)  # 0.01 below the last code: dither must not overflow it
    root.view(-1, BLOCK).div_(root_scale[:, None])
    states["variance"].copy_(integers.copy_(root.clamp_(min=1).add_(dithers[0])))  # float -> int32 -> uint8 is faster

    deviation = variance.copy_(states["variance"])  # sqrt(v) as it will be decoded
    deviation.view(-1, BLOCK).mul_(root_scale[:, None]).square_()
    ratio, ratio_scale = momentum.div_(deviation).clamp_(-ratio_limit, ratio_limit), states["momentum_scale"]
    torch.amax(torch.abs(ratio, out=magnitude).view(-1, BLOCK), dim=1, out=ratio_scale)
    ratio_scale.mul_(1 / 126.99).clamp_(min=SMALLEST_SCALE)
    ratio.view(-1, BLOCK).div_(ratio_scale[:, None])
    states["momentum"].copy_(integers.copy_(ratio.add_(dithers[1]).floor_()))


def decoded(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """States of one parameter with 8-bit moments as fp32 [n] under names of their own; other states as they are."""
    if "momentum_scale" not in states:
        return states
    count = states["momentum"].numel()
    momentum, variance = torch.zeros(2, padded(count), device=states["momentum"].device)  # [padded] each
    if count:
        rest = (0, padded(count) - count)
        codes = {name: torch.nn.functional.pad(states[name], rest) for name in ("momentum", "variance")}
        decode_8bit(states | codes, momentum, variance)
    kept = {name: state for name, state in states.items() if name in ("step", "correction")}
    return kept | {"decoded_momentum": momentum[:count], "decoded_variance": variance[:count]}


def encoded(states: dict[str, Tensor], betas: tuple[float, float]) -> dict[str, Tensor]:
    """The inverse, rounded to nearest."""
    if "decoded_momentum" not in states:
        return states
    count, device = states["decoded_momentum"].numel(), states["decoded_momentum"].device
    size = padded(count)
    momentum = torch.nn.functional.pad(states["decoded_momentum"], (0, size - count))  # [padded]
    variance = torch.nn.functional.pad(states["decoded_variance"], (0, size - count))  # [padded]
    codes = {
        "momentum": torch.zeros(size, dtype=torch.int8, device=device),
        "variance": torch.zeros(size, dtype=torch.uint8, device=device),
        "momentum_scale": torch.zeros(size // BLOCK, device=device),
        "variance_scale": torch.zeros(size // BLOCK, device=device),
    }
    half = torch.full((size,), 0.5, device=device)
    if count:
        scratch = (torch.zeros_like(half), torch.zeros_like(half))
        encode_8bit(codes, momentum, variance, scratch, (half, half), ratio_limit(*betas))
    return states | {name: code[:count] if len(code) == size else code for name, code in codes.items()}


def ratio_limit(beta1: float, beta2: float) -> float:
    """Twice the largest |m| / sqrt(v) there is, by Cauchy-Schwarz over the two sums of past gradients."""
    return 2 * (1 - beta1) / math.sqrt((1 - beta2) * max(1 - beta1**2 / beta2, 0.01))
