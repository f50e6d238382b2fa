"""Several processes, one experiment: `torchrun --nproc_per_node N main.py ...`. With one process all of this is idle.

A process (rank) samples and grades its share of a step's prompts. Then all exchange the graded groups, so advantages,
denominators, metrics and controllers are computed by everyone from the same numbers, with the code of one process. In
the update a rank computes the gradient of its share; the denominators are already global, so gradients are summed.

How the weights lie on the ranks is in sharding.py.
Left out: tensor and pipeline parallelism, and numbers of processes that change during a run.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from src.config import ConfigError, RunError, Stopped

PATIENCE = timedelta(hours=2)  # ranks wait this long for the slowest rollout; a death is noticed at once
LOST = ("closed by peer", "reset by peer", "refused", "broken pipe", "unhandled system error", "remote process exited")


class AloneError(RunError):
    """Where the other processes are in the middle of something and cannot be asked: torchrun will end them."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def session() -> Iterator[None]:
    """Join the other processes that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    if rank() > 0:  # the others say the same; what goes wrong on one alone is a warning or an error
        logging.getLogger("grpo").addFilter(lambda record: record.levelno >= logging.WARNING)
    try:
        yield
        dist.barrier()  # nobody hangs up while another one still reads
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LOST):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, who has noticed it too: the reason comes first
        raise RunError(
            f"rank {rank()} has lost another process of this run; the last checkpoint is safe, and the same command "
            f"goes on from there ({str(error).splitlines()[0]})"
        ) from error
    dist.destroy_process_group()  # not after an error: it would wait for the others


class Nothing:
    """Stands on the other ranks for what only rank 0 has; every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None

    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...


def on_main(function: Callable, *arguments) -> Any:
    """Call it on rank 0 alone: no other writes."""
    return function(*arguments) if rank() == 0 else Nothing()


def gather(value: Any) -> list:
    """What each rank has, in the order of the ranks, on all of them."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], list | None]) -> Any:
    """The lists that work() gives on all ranks, one after the other. Where one must stop, all stop."""
    if world() == 1:
        return work()
    try:
        mine: Any = work()
    except AloneError:
        raise
    except (Stopped, RunError, ConfigError) as error:
        mine = error
    everything = gather(mine)
    for theirs in everything:
        if isinstance(theirs, BaseException):
            raise theirs
    return [item for theirs in everything for item in theirs or ()]


def from_main(function: Callable, *arguments) -> Any:
    """What it returns, or raises, on rank 0: the same on all of them."""
    return together(lambda: [function(*arguments)] if rank() == 0 else [])[0]


def share(items: Sequence, sizes: Sequence[int] | None = None) -> list:
    """This rank's piece of a list: contiguous, and about equal in the sum of sizes."""
    if world() == 1:
        return list(items)
    sizes = sizes or [1] * len(items)
    ends = list(accumulate(sizes))
    middles = [end - size / 2 for end, size in zip(ends, sizes, strict=True)]
    return [item for item, middle in zip(items, middles, strict=True) if int(middle * world() / ends[-1]) == rank()]
