"""--profile: where the time of a step goes, and how much of what the machine can do is used in each phase.

`phase` marks functions and blocks of the loop; it costs one comparison as long as nobody profiles. Phases are
exclusive: one that begins within another interrupts it, so with "other" they add up to the step.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from src.engine.memory import peak_memory
from src.engine.wide_products import multiplied_in

PHASES = ("prefill", "decode", "head and sampling", "reward", "packing", "reference", "policy forward", "head", "loss",
          "backward", "optimizer", "other")  # fmt: skip
TIMED_STEPS = 2
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the ceiling of FLOPs
COPIED = 2**28  # bytes, more than any cache holds


def sums() -> Any:
    """A number for each phase."""
    return field(default_factory=lambda: defaultdict(float))


@dataclass
class Profile:
    """What the phases of one step took."""

    device: torch.device
    stack: list[str] = field(default_factory=lambda: ["other"])  # the phase that runs is the last
    since: float = field(default_factory=lambda: time.perf_counter())
    seconds: dict[str, float] = sums()
    flops: dict[str, float] = sums()
    moved: dict[str, float] = sums()  # bytes
    peak: dict[str, float] = sums()  # bytes

    def border(self) -> None:
        """What was since the last border belongs to the phase that runs."""
        name = self.stack[-1]
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():  # a CUDA graph, in which nothing may wait and nothing runs yet
                return
            torch.cuda.synchronize(self.device)
            self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        now = time.perf_counter()
        self.seconds[name] += now - self.since
        self.since = now


taken: Profile | None = None  # the profile that is being taken; of the process, as CUDA's backward pass has a thread


class phase(ContextDecorator):
    """A function or a block of the step, by name; nothing unless a profile is being taken."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        if taken is not None:
            taken.border()
            taken.stack.append(self.name)

    def __exit__(self, *_) -> None:
        if taken is not None:
            taken.border()
            taken.stack.pop()


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs and bytes
# ---------------------------------------------------------------------------------------------------------------------

aten = torch.ops.aten
FLOPS = {  # what torch's registry misses
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    # the weight is reordered (cpu_weights.py), so the sizes are taken from input and output
    getattr(torch.ops.mkldnn, "_linear_pointwise", None): lambda x, *_, out_val: 2 * x.numel() * out_val.shape[-1],
}
READS_ROWS = (aten.embedding, aten.index_select, aten.index, aten.gather)  # of its first input as much as it returns
WRITES_ROWS = (aten.index_put_, aten._index_put_impl_, aten.index_copy_, aten.scatter_, aten.scatter_add_)
OVERWRITES = (aten.copy_, aten.fill_, aten.zero_)  # its first input, unread
ALLOCATES = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


def tensors(tree: Any) -> list[Tensor]:
    """Those in a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tensor: Tensor) -> int:
    """Bytes; an expanded tensor repeats those of its storage."""
    every = tensor.numel() * tensor.element_size()
    return min(every, tensor.untyped_storage().nbytes()) if tensor.layout == torch.strided else every


def place(tensor: Tensor) -> int:
    """Where its storage lies, by which a view is known; 0 where that cannot be asked or there is none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def bytes_moved(function, arguments: tuple, keywords: dict, result: Any) -> int:
    """Bytes of a kernel that reads its inputs once and writes its outputs once; none for a view."""
    inputs, outputs = tensors((arguments, keywords)), tensors(result)
    schema, packet = function._schema, function._overloadpacket
    if schema.is_mutable:  # some return nothing
        given = {spec.name: value for spec, value in zip(schema.arguments, arguments, strict=False)} | keywords
        written = [spec.name for spec in schema.arguments if spec.alias_info and spec.alias_info.is_write]
        outputs = tensors([given.get(name) for name in written])
    elif packet in ALLOCATES or {place(x) for x in inputs} & {place(x) for x in outputs} - {0}:
        return 0
    if packet in READS_ROWS:
        inputs = inputs[1:] + outputs
    elif packet in WRITES_ROWS:  # indices are read, values are read and written
        inputs, outputs = inputs[1:], inputs[-1:]
    elif packet in OVERWRITES:
        inputs = inputs[1:]
    return sum(map(size, inputs + outputs))


class Counter(TorchDispatchMode):
    """Adds FLOPs and bytes of every kernel to the phase that runs; the backward pass inherits it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flops_of = flop_registry.get(func._overloadpacket) or FLOPS.get(func._overloadpacket)
        if flops_of is None:
            with self:  # in inference mode aten.linear and the like arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if taken is not None:
            name = taken.stack[-1]
            taken.flops[name] += flops_of(*args, **kwargs, out_val=result) if flops_of else 0
            taken.moved[name] += bytes_moved(func, args, kwargs, result)
        return result


def moves(read: Sequence[Tensor], updated: Sequence[Tensor]) -> None:
    """Count the bytes of a loop that torch does not see."""
    if taken is not None and is_in_torch_dispatch_mode():
        taken.moved[taken.stack[-1]] += sum(map(size, read)) + 2 * sum(map(size, updated))


# ---------------------------------------------------------------------------------------------------------------------
# Steps, ceilings, table
# ---------------------------------------------------------------------------------------------------------------------


def measured(take_step: Callable[[], int], device: torch.device, counting: bool = False) -> tuple[Profile, int]:
    """The profile of one step, and its completion tokens, which take_step returns."""
    global taken
    taken = Profile(device)
    try:
        with Counter() if counting else nullcontext():
            tokens = take_step()
        taken.border()
        return taken, tokens
    finally:
        taken = None


def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of five times, the first of which also warms up."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large square product, and bytes/s, read and written, of a large copy."""
    side = SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=multiplied_in(device, dtype))  # [side, side]
    product = torch.empty_like(matrix)
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        2 * side**3 / best_seconds(lambda: torch.mm(matrix, matrix, out=product), device),
        2 * COPIED / best_seconds(lambda: target.copy_(source), device),
    )


def three_digits(value: float) -> str:
    """0.0123, 1.23, 12.3, 4,321; a dash for nothing."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "-"


def table(counted: Profile, timed: Sequence[Profile], tokens: float, limits: tuple[float, float]) -> str:
    """A line a phase: mean seconds of the timed steps, and what the counted step did over those seconds."""
    seconds = {name: sum(profile.seconds[name] for profile in timed) / len(timed) for name in PHASES}
    peak = {name: max(profile.peak[name] for profile in timed) for name in PHASES}
    rows = [(name, seconds[name], counted.flops[name], counted.moved[name], peak[name]) for name in PHASES]
    rows = [row for row in rows if row[1] > 0]
    step = sum(seconds.values())
    rows.append(("step", step, sum(counted.flops.values()), sum(counted.moved.values()), max(peak.values())))
    on_cuda = counted.device.type == "cuda"
    lines = [f"{'phase':<18}{'seconds':>9}{'share':>8}{'tokens/s':>11}{'TFLOP/s':>10}{'%':>6}{'GB/s':>9}{'%':>6}"]
    lines[0] += f"{'peak GiB':>10}" * on_cuda
    for name, duration, flops, moved, largest in rows:
        line = f"{name:<18}{duration:>9.4f}{duration / step:>8.1%}{tokens / duration:>11,.0f}"
        for rate, unit, limit, width in ((flops, 1e12, limits[0], 10), (moved, 1e9, limits[1], 9)):
            line += f"{three_digits(rate / duration / unit):>{width}}{100 * rate / duration / limit:>6.1f}"
        lines.append(line + f"{largest / 2**30:>10.2f}" * on_cuda)
    return "\n".join(lines)


def caption(model, tokens: float, limits: tuple[float, float]) -> str:
    """What the numbers of the table are."""
    device, dtype = model.device, str(multiplied_in(model.device, model.dtype)).removeprefix("torch.")
    lines = [
        f"mean of {TIMED_STEPS} steps of {tokens:,.0f} completion tokens; tokens/s are these over a phase's seconds",
        f"100% here: {three_digits(limits[0] / 1e12)} TFLOP/s in a {dtype} product of {SIDE[device.type]:,} x "
        f"{SIDE[device.type]:,}, {three_digits(limits[1] / 1e9)} GB/s in a copy, read and written",
        "FLOPs are those of matrix products and attention; bytes, if every kernel reads its inputs and writes its",
        "outputs once: over 100% they came from a cache",
    ]
    if device.type == "cpu":
        lines.append(f"largest resident set of the process so far: {peak_memory(device) / 2**30:.2f} GiB")
    else:
        lines.append("where Triton's kernels run they are those of the operations that a kernel replaces")
    return "\n".join(lines)
