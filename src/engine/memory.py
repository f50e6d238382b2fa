"""How much memory a device has taken and how much it could still give; and one copy to it in place of many."""

import ctypes
import math
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes in use so far: by torch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]  # fmt: skip


def kept_by_malloc() -> int:
    """Bytes that were freed and that malloc keeps (src/__init__.py): for the system they are in use."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if mallinfo2 is None:  # not glibc
        return 0
    mallinfo2.restype = MallocInfo
    return mallinfo2().fordblks


def free_in_group(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the control group still allows (a container, a job of a cluster); infinite where it sets no limit."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pages = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = next(int(size) for name, size in pages if name == "inactive_file")  # given back when asked for
        return math.inf if limit == "max" else int(limit) - int(used) + cached
    except (OSError, ValueError, StopIteration):
        return math.inf


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated, with those that were freed and are kept for the next time.

    On a GPU what is kept lies in pieces, in which a cache need not fit: whoever plans with it calls `give_back` before.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return min(free, free_in_group()) + kept_by_malloc()


def give_back(device: torch.device) -> None:
    """What torch has reserved on a GPU and does not use goes back to the driver, in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException | None) -> str | None:
    """The first line of an error that says so, or of one that it came from; on a CPU torch raises a RuntimeError."""
    words = ("out of memory", "allocate memory", "enough memory")
    while error is not None:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in reason for word in words):
            return reason
        error = error.__cause__ or error.__context__
    return None


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
