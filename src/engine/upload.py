"""Many small tensors to the device in one copy: on a GPU each copy of its own would wait for all that runs there."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors on the device: to a GPU in one copy that does not wait for it, since each alone would."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return unpacked(packed(tensors).pin_memory().to(device, non_blocking=True), tensors)


def room_of(tensor: Tensor) -> int:
    """Bytes of a tensor in a buffer where each begins at a place for any type."""
    return -(-tensor.nbytes // 16) * 16


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors end to end as bytes."""
    whole = torch.zeros(sum(map(room_of, tensors)), dtype=torch.uint8)
    for piece, tensor in zip(whole.split([room_of(tensor) for tensor in tensors]), tensors, strict=True):
        piece[: tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    return whole


def unpacked(whole: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of packed bytes, of the tensors' types and shapes."""
    pieces = whole.split([room_of(tensor) for tensor in tensors])
    pairs = zip(pieces, tensors, strict=True)
    return [piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for piece, tensor in pairs]
