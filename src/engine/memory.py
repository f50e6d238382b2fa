"""How much memory a device has taken and how much it could still give."""

import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


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


def memory_of(device: torch.device, folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that there are, taken or free: the same each time that a run is started on this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(pages, int((folder / "memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit
        return pages


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


def causes(error: BaseException | None) -> Iterator[tuple[BaseException, str]]:
    """An error and what it came from, one after the other, each with its first line."""
    while error is not None:
        yield error, (str(error) or type(error).__name__).splitlines()[0]
        error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException) -> str | None:
    """The first line of an error that says so, or of one that it came from; on a CPU torch raises a RuntimeError."""
    words = ("out of memory", "allocate memory", "enough memory")
    for cause, reason in causes(error):
        if isinstance(cause, torch.OutOfMemoryError | MemoryError) or any(word in reason for word in words):
            return reason
    return None
