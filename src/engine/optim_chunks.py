"""The optimizer's states in flat tensors, the pieces of them that are stepped at once, and the step of one."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from src.engine.optim_codes import (
    BLOCK,
    decode_8bit,
    decode_master,
    encode_8bit,
    encode_bf16,
    encode_master,
    padded,
    ratio_limit,
)
from src.engine.sharding import local

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}  # multiples of BLOCK; 28 bytes of scratch each, on a CPU in its caches
STAGED_ELEMENTS = 2**24  # where a kernel needs no scratch, and only what comes from host memory is cut
PHASES = 2**16  # period of the dither's phases along a flat tensor


class Workspace:
    """What all chunks of a device share: the dither's phases, staging, and for a kernel (optim_kernel.py) no more."""

    def __init__(self, device: torch.device, size: int, has_scratch: bool):
        self.device, self.size, self.has_scratch = device, size, has_scratch
        phases = torch.randint(PHASES, (PHASES,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        self.phases = torch.cat((phases, phases[:BLOCK])).to(device)  # [PHASES + BLOCK]: a block needs not look behind
        self.updates = -1
        self.slots: dict[tuple, list[dict[str, Tensor]]] = {}
        self.copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        if has_scratch:
            self.allocate(size)

    def allocate(self, size: int) -> None:
        """Four fp32 buffers, and the dither of the current update."""
        device = self.device
        self.master, self.gradient, self.momentum, self.variance = torch.zeros(4, size, device=device)  # [size] each
        self.phases = self.phases[:PHASES].repeat(-(-size // PHASES) + 1)[: PHASES + size]  # [PHASES + size]
        self.dither16 = torch.zeros_like(self.phases)  # [PHASES + size] dither in 1/65536 of a unit
        self.dither8 = torch.zeros_like(self.phases)  # [PHASES + size] the same in 1/256 of a unit
        self.dither_unit = torch.zeros(self.phases.shape, device=device)  # [PHASES + size] the same in units

    def advance(self, updates: int) -> None:
        """Move every element's dither on by the golden ratio of a unit, the Weyl sequence of least discrepancy."""
        if updates != self.updates:
            self.updates = updates
            if not self.has_scratch:
                return
            torch.add(self.phases, updates * 40503 % PHASES, out=self.dither16).bitwise_and_(PHASES - 1)
            torch.bitwise_right_shift(self.dither16, 8, out=self.dither8)
            self.dither_unit.copy_(self.dither16).mul_(1 / PHASES)

    def dither(self, table: Tensor, start: int, stop: int, use: int) -> Tensor:
        """The dither of elements start..stop of a shard, however it is cut; `use` keeps three uses independent."""
        place = (start + use * PHASES // 3) % PHASES
        return table[place : place + stop - start]

    def slot(self, layout: dict[str, tuple[torch.dtype, int]], parity: int) -> dict[str, Tensor]:
        """One of the two device buffers through which states in host memory pass."""
        key = tuple(layout.items())
        if key not in self.slots:
            self.slots[key] = [
                {
                    name: torch.zeros(self.size // per, dtype=dtype, device=self.device)
                    for name, (dtype, per) in layout.items()
                }
                for _ in range(2)
            ]
        return self.slots[key][parity]


class Chunk:
    """A range of a shard that is stepped at once, with every view of it made beforehand: none is made in a step."""

    def __init__(self, shard: "Shard", work: Workspace, parity: int, start: int, pieces: list[tuple[int, int, int]]):
        self.pieces = pieces  # (parameter, its first element here, one past its last)
        self.work, self.start = work, start
        places, stop = [], start  # where in this chunk each piece lies
        for _, first, last in pieces:
            places.append(slice(stop - start, stop - start + last - first))
            stop += padded(last - first)
        self.home = {name: shard.states[name][start // per : stop // per] for name, (_, per) in shard.layout.items()}
        self.states = self.home
        if shard.staged:
            slot = work.slot(shard.layout, parity)
            self.states = {name: slot[name][: home.numel()] for name, home in self.home.items()}
        flat = [shard.parameters[index].detach().view(-1)[first:last] for index, first, last in pieces]
        self.weights = [one.view(torch.int16) for one in flat] if shard.dtype == torch.bfloat16 else flat
        self.steps = [shard.steps[index] for index, _, _ in pieces]
        self.begins = [place.start for place in places]
        if work.has_scratch:
            self.take_scratch(shard, work, places, stop)

    def take_scratch(self, shard: "Shard", work: Workspace, places: list[slice], stop: int) -> None:
        """Views of the scratch for this chunk and its pieces."""
        start = self.start
        count = stop - start
        self.master, self.gradient = work.master[:count], work.gradient[:count]  # [n]
        exact = shard.layout["momentum"][0] == torch.float32
        self.momentum = self.states["momentum"] if exact else work.momentum[:count]  # [n]
        self.variance = self.states["variance"] if exact else work.variance[:count]  # [n]
        self.bits = self.master.view(torch.int32)  # [n]
        self.dither_master = work.dither(work.dither8, start, stop, 0)  # [n]
        moments = work.dither_unit if "momentum_scale" in shard.layout else work.dither16
        self.dither_momentum = work.dither(moments, start, stop, 1)  # [n]
        self.dither_variance = work.dither(moments, start, stop, 2)  # [n]
        self.master_pieces, self.bits_pieces, self.gradient_pieces, self.momentum_pieces, self.variance_pieces = (
            [whole[place] for place in places]
            for whole in (self.master, self.bits, self.gradient, self.momentum, self.variance)
        )
        self.tails = [self.variance[place.stop : place.start + padded(place.stop - place.start)] for place in places]
        self.tails = [tail for tail in self.tails if tail.numel()]


class Shard:
    """The states of a group's parameters of one dtype on one device, each kind in one flat tensor.

    Every parameter starts at a multiple of BLOCK, so that no block is shared and a skipped one stays untouched.
    """

    def __init__(self, owners: list[Tensor], layout: dict[str, tuple[torch.dtype, int]], offload: bool):
        self.owners, self.layout = owners, layout  # layout: name -> (dtype, parameters that share an entry)
        self.parameters = parameters = [local(owner) for owner in owners]  # of sharded ones what lies here
        self.device, self.dtype = parameters[0].device, parameters[0].dtype
        self.starts, self.total = [], 0
        for parameter in parameters:
            self.starts.append(self.total)
            self.total += padded(parameter.numel())
        self.staged = offload and self.device.type == "cuda"
        # One allocation a state: torch rounds pinned ones up to a power of two, so this may cost host memory.
        home = {"device": "cpu", "pin_memory": True} if self.staged else {"device": self.device}
        self.states = {
            name: torch.zeros(self.total // per, dtype=dtype, **home) for name, (dtype, per) in layout.items()
        }
        self.steps = torch.zeros(len(parameters), device=self.device)  # [parameters]
        self.active = torch.zeros(len(parameters), device=self.device)  # [parameters] 1 where there is a gradient
        self.addresses: tuple[int, ...] = ()
        self.wants_loop: bool | None = None  # not asked yet
        self.work: Workspace | None = None
        self.chunks: list[Chunk] = []

    def state_of(self, index: int) -> dict[str, Tensor]:
        """Views of one parameter's states, for `optimizer.state` and hence for `state_dict`."""
        start, count = self.starts[index], self.parameters[index].numel()
        views = {
            name: self.states[name][start // per : start // per + -(-count // per)]
            for name, (_, per) in self.layout.items()
        }
        return {"step": self.steps[index], **views}

    def plan(self, addresses: tuple[int, ...], work: Workspace) -> None:
        """Cut the parameters that have a gradient (an address that is not 0) into chunks of the scratch's size."""
        self.addresses, self.work, self.chunks = addresses, work, []
        self.active = torch.tensor([float(address != 0) for address in addresses], device=self.device)
        ranges: list[tuple[int, int, list]] = []  # (start, stop, pieces)
        for index, parameter in enumerate(self.parameters):
            first, count = 0, parameter.numel() if addresses[index] else 0
            while first < count:
                position = self.starts[index] + first
                start, stop, pieces = ranges.pop() if ranges else (position, position, [])
                if stop != position or stop - start == work.size:
                    ranges.append((start, stop, pieces))
                    start, pieces = position, []
                last = min(count, first + work.size - (position - start))
                ranges.append((start, position + padded(last - first), pieces + [(index, first, last)]))
                first = last
        self.chunks = [Chunk(self, work, parity % 2, start, pieces) for parity, (start, _, pieces) in enumerate(ranges)]


def streamed(chunks: list[Chunk], copier: "torch.cuda.Stream | None"):
    """Yield chunks whose states live in host memory, fetching the next one's while one is being stepped.

    All copies run in order on one side stream, so a staging buffer is refilled only after its store has left it.
    (Without a stream, as on the CPU of the tests, the same copies run in the same order.)
    """
    compute: Any = torch.cuda.current_stream(copier.device) if copier else None

    def copy(pairs) -> "torch.cuda.Event | None":
        with torch.cuda.stream(copier) if copier else nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return copier.record_event() if copier else None

    def fetch(chunk: Chunk) -> "torch.cuda.Event | None":
        return copy((chunk.states[name], home) for name, home in chunk.home.items())

    if copier:
        copier.wait_stream(compute)
    arrived = fetch(chunks[0])
    for index, chunk in enumerate(chunks):
        if copier:
            compute.wait_event(arrived)
        if index + 1 < len(chunks):
            arrived = fetch(chunks[index + 1])
        yield chunk
        if copier:
            copier.wait_stream(compute)
        copy((home, chunk.states[name]) for name, home in chunk.home.items())
    if copier:
        compute.wait_stream(copier)  # so that whatever follows on the main stream may free or reuse the buffers


def step_chunk(group: dict, chunk: Chunk, gradients: list[Tensor]) -> None:
    """Decode, step, encode. gradients: one flat [k] for each piece of a parameter."""
    states, weights, (beta1, beta2) = chunk.states, chunk.weights, group["betas"]
    if "correction" in states:
        torch._foreach_copy_(chunk.bits_pieces, chunk.weights)
        decode_master(states["correction"], chunk.bits)
        torch._foreach_copy_(chunk.gradient_pieces, gradients)
        weights, gradients = chunk.master_pieces, chunk.gradient_pieces
    if "momentum_scale" in states:
        decode_8bit(states, chunk.momentum, chunk.variance)
    elif chunk.momentum is not states["momentum"]:
        chunk.momentum.copy_(states["momentum"])
        chunk.variance.copy_(states["variance"])
    torch._fused_adamw_(
        weights,
        gradients,
        chunk.momentum_pieces,
        chunk.variance_pieces,
        [],
        chunk.steps,
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    if "correction" in states:
        encode_master(states["correction"], chunk.bits, chunk.dither_master)
        torch._foreach_copy_(chunk.weights, chunk.bits_pieces)
    if "momentum_scale" in states:
        if chunk.tails:
            torch._foreach_zero_(chunk.tails)  # a block's unused end must not hold up its scale
        encode_8bit(
            states,
            chunk.momentum,
            chunk.variance,
            (chunk.master, chunk.gradient),
            (chunk.dither_variance, chunk.dither_momentum),
            ratio_limit(beta1, beta2),
        )
    elif chunk.momentum is not states["momentum"]:
        encode_bf16(states["momentum"], chunk.momentum, chunk.dither_momentum)
        encode_bf16(states["variance"], chunk.variance, chunk.dither_variance)


def coefficients(group: dict, steps: Tensor) -> Tensor:
    """For steps [parameters]: the step's size and the square root of v's bias correction, fp32 [parameters, 2]."""
    beta1, beta2 = group["betas"]
    steps = steps.double()
    size = float(group["lr"]) / (1 - beta1**steps)  # [parameters]
    return torch.stack((size, (1 - beta2**steps).sqrt()), 1).float()
