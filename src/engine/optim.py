"""AdamW whose master weights and moments fit in 3 bytes a parameter beside the bf16 weight and its gradient.

A step walks over the parameters in flat chunks: decode the chunk to fp32 scratch, let torch's own fused
AdamW kernel do the arithmetic there, encode it again. So the mathematics is `torch.optim.AdamW(fused=True)` by
construction, and memory options change only how a number is stored between two steps. Where they can be compiled, and a
trial succeeds, optim_kernel.py (on a GPU) and optim_loop.c (on a CPU) do all of it at once:

  master   fp32 bits = (bf16 parameter's bits << 16) + signed correction, int16 (exact) or int8 (24-bit master)
  state 16 bf16 moments
  state 8  blocks of 128: v as 8 bits of v^(1/4), m as 8 linear bits of m / sqrt(v), an fp32 scale a block each

Whatever is not exact is rounded with dither, never to nearest: at beta2 = 0.999 a moment changes by 0.1% a step,
and at lr 1e-6 a weight above 1/8 by less than half a 24-bit unit; rounding to nearest would discard both for ever.
The dither is a Weyl sequence in time with a random phase for each element, so the errors of successive steps
largely cancel, and there is no generator's state to save.

m is stored as m / sqrt(v), unlike in 8-bit Adam (arXiv:2110.02861) and FlashOptim (arXiv:2602.23349, from which the
24-bit split is taken): the ratio is bounded (Cauchy-Schwarz), so a loud neighbour in its block can not turn an
element's small m over a smaller v into a huge step. The price of 8 bits is that sqrt(v) wanders around the exact one,
by 2-7% at beta2 = 0.99 and 5-13% at 0.999 for elements within a tenth of their block's largest; m does not follow it.

Left out: amsgrad, maximize, sparse gradients, fp16 parameters, capturing the step in a CUDA graph.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from src.engine.distributed import gather
from src.engine.kernels import wanted, works
from src.engine.optim_chunks import (
    CHUNK_ELEMENTS,
    STAGED_ELEMENTS,
    Shard,
    Workspace,
    coefficients,
    step_chunk,
    streamed,
)
from src.engine.optim_codes import (
    BLOCK,
    decode_master,
    decoded,
    encoded,
)
from src.engine.optim_loop import loop_fits
from src.engine.optim_loop import step_chunk as step_in_c
from src.engine.sharding import like, local

TRIAL_RATE = 0.01


def placed_like(parameter: DTensor, state: Tensor) -> Tensor:
    """A state of one entry an element as a tensor that is sharded like its parameter; a step count as it is."""
    if state.dim() == 0:
        return state
    here = state.view(parameter.to_local().shape)
    mesh, places = parameter.device_mesh, parameter.placements
    return DTensor.from_local(here, mesh, places, shape=parameter.shape, stride=parameter.stride())


def fitted(saved: dict[str, Tensor], parameter: Tensor, betas: tuple[float, float]) -> dict[str, Tensor]:
    """Saved states of a parameter, of any number of processes, as the flat states of what lies on this rank."""
    sharded = isinstance(parameter, DTensor)
    if not sharded and "decoded_momentum" not in saved and all(state.dim() < 2 for state in saved.values()):
        return saved
    cut = {}
    for name, state in (decoded(saved) if sharded else saved).items():
        if state.numel() not in (1, parameter.numel()):
            return saved  # of another model, as the caller will say
        cut[name] = state if state.dim() == 0 else local(like(state.reshape(parameter.shape), parameter)).reshape(-1)
    return encoded(cut, betas)


class MemoryEfficientAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on bf16 or fp32 parameters with small states; see the module's docstring for the formats.

    `master_bits` 24 or 32 concerns bf16 parameters (an fp32 one is its own master); `state_bits` is 8, 16 or 32.
    `offload` keeps the states in pinned host memory and streams them through the GPU; on a CPU it changes nothing.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        master_bits=24,
        state_bits=8,
        offload=False,
    ):
        if master_bits not in (24, 32) or state_bits not in (8, 16, 32):
            raise ValueError(f"master_bits is 24 or 32 and state_bits 8, 16 or 32, not {master_bits} and {state_bits}")
        self.master_bits, self.state_bits, self.offload = master_bits, state_bits, offload
        self.shards: list[list[Shard]] = []  # one list a parameter group
        self.workspaces: dict[tuple[torch.device, bool], Workspace] = {}  # with scratch and without
        self.chunk_elements: int | None = None  # None: CHUNK_ELEMENTS; results do not depend on it
        self.has_kernel: bool | None = None  # None: where it works
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, updates=0))

    def add_param_group(self, param_group) -> None:
        """Also allocates the group's states: all zero, which says that the bf16 weights are the masters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in group["params"]:
            by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        shards = [Shard(parameters, self._layout(dtype), self.offload) for (_, dtype), parameters in by_kind.items()]
        self.shards.append(shards)
        for shard in shards:
            for index, parameter in enumerate(shard.owners):
                self.state[parameter] = shard.state_of(index)

    def _layout(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, int]]:
        """The states kept: their dtype and the number of parameters that share an entry."""
        layout = {}
        if dtype == torch.bfloat16:
            layout["correction"] = (torch.int16 if self.master_bits == 32 else torch.int8, 1)
        if self.state_bits == 8:
            layout |= {
                "momentum": (torch.int8, 1),
                "momentum_scale": (torch.float32, BLOCK),
                "variance": (torch.uint8, 1),
                "variance_scale": (torch.float32, BLOCK),
            }
        else:
            moment = torch.bfloat16 if self.state_bits == 16 else torch.float32
            layout |= {"momentum": (moment, 1), "variance": (moment, 1)}
        return layout

    @torch.no_grad()
    def step(self, closure=None):
        """One AdamW step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, shards in zip(self.param_groups, self.shards, strict=True):
            group["updates"] += 1
            for shard in shards:
                self._step_shard(group, shard)
        return loss

    def _step_shard(self, group: dict, shard: Shard) -> None:
        bits = self.master_bits if shard.dtype == torch.bfloat16 else 0  # 0: a weight is its own master
        kernel = self.kernel_for(shard, bits)
        room = CHUNK_ELEMENTS[shard.device.type] if kernel is None else STAGED_ELEMENTS if shard.staged else shard.total
        size = min(self.chunk_elements or room, shard.total)
        kind = (shard.device, kernel is None)
        work = self.workspaces.get(kind)
        if work is None or work.size < size:
            work = self.workspaces[kind] = Workspace(shard.device, size, has_scratch=kernel is None)
        # An address is 0 without a gradient; it changes when someone assigns `parameter.data`.
        given = {index: owner.grad for index, owner in enumerate(shard.owners) if owner.grad is not None}
        gradients = {index: local(gradient).reshape(-1).contiguous() for index, gradient in given.items()}
        shard.parameters = [local(owner) for owner in shard.owners]
        addresses = tuple([one.data_ptr() if i in gradients else 0 for i, one in enumerate(shard.parameters)])
        if addresses != shard.addresses or work is not shard.work:
            shard.plan(addresses, work)
        if not shard.chunks:
            return
        shard.steps.add_(shard.active)
        work.advance(group["updates"])
        step = step_chunk if kernel is None else partial(kernel, bits, coefficients(group, shard.steps))
        for chunk in streamed(shard.chunks, work.copier) if shard.staged else shard.chunks:
            step(group, chunk, [gradients[index][first:last] for index, first, last in chunk.pieces])

    def kernel_for(self, shard: Shard, bits: int) -> Callable | None:
        """What steps a chunk there in place of `step_chunk`, where it works."""
        if self.has_kernel is None:  # not yet given
            tried = wanted(shard.device) or (shard.device.type == "cpu" and self._wants_loop(shard, bits))
            return kernel(shard.device) if tried and kernel_works(shard.device, bits, self.state_bits) else None
        return kernel(shard.device) if self.has_kernel else None

    def _wants_loop(self, shard: Shard, bits: int) -> bool:
        """Whether to try the loop in C: one answer for all processes, whose slices of a parameter differ in size."""
        if shard.wants_loop is None:
            packed = self.state_bits < 32 or bits > 0  # else the plain path is nothing but torch's own kernel
            shard.wants_loop = all(gather(packed and loop_fits(shard)))
        return shard.wants_loop

    def state_dict(self):
        """torch's form: tensors and plain numbers. The tensors are views of the states, not copies.

        Those of a sharded parameter are sharded like it; as no block of 8-bit moments may be cut, they are fp32 then.
        """
        self._wait()
        saved = super().state_dict()
        for key, parameter in enumerate(parameter for group in self.param_groups for parameter in group["params"]):
            if isinstance(parameter, DTensor):
                states = decoded(saved["state"][key])
                saved["state"][key] = {name: placed_like(parameter, state) for name, state in states.items()}
        return saved

    def load_state_dict(self, state_dict) -> None:
        """Copy the saved states into place, bit for bit; torch's own would cast them to the parameters' dtype.

        From one number of processes to another elements are the same, 8-bit moments within their precision.
        """
        saved_groups, saved_states = state_dict["param_groups"], state_dict["state"]
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the saved optimizer has other parameter groups than this one")
        self._wait()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        pairs = []
        betas = [group["betas"] for group in saved_groups for _ in group["params"]]
        keys = [key for group in saved_groups for key in group["params"]]
        for key, parameter, decay in zip(keys, parameters, betas, strict=True):
            fitting = fitted(saved_states.get(key, {}), parameter, decay)
            for name, state in self.state[parameter].items():
                saved = fitting.get(name)
                if saved is None or saved.shape != state.shape or saved.dtype != state.dtype:
                    raise ValueError(
                        f"saved state {key}.{name} does not fit: were master_bits, state_bits and the "
                        "parameters' dtypes the same when it was saved?"
                    )
                pairs.append((state, saved))
        for state, saved in pairs:
            state.copy_(saved)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})

    @torch.no_grad()
    def master_weights(self) -> list[Tensor]:
        """The master weights as new fp32 tensors, in the order of the parameters."""
        self._wait()
        masters = []
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            master = parameter.detach().to(torch.float32, copy=True)  # [*parameter.shape]
            if parameter.dtype == torch.bfloat16:
                bits = master.view(torch.int32).bitwise_right_shift_(16).view(-1)  # bf16 -> fp32 appended 16 zeros
                decode_master(self.state[parameter]["correction"].to(parameter.device), bits)
            masters.append(master)
        return masters

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the states by the place they are in: {"device": ..., "host": ...}; host means offloaded."""
        size = {"device": 0, "host": 0}
        for shard in (shard for shards in self.shards for shard in shards):
            size["host" if shard.staged else "device"] += sum(state.nbytes for state in shard.states.values())
        return size

    def _wait(self) -> None:
        """States in host memory may still be on their way there."""
        for work in self.workspaces.values():
            if work.copier is not None:
                work.copier.synchronize()


def kernel(device: torch.device) -> Callable:
    """A chunk's step in one kernel a parameter, or on a CPU in one loop."""
    if device.type == "cpu":
        return step_in_c
    from src.engine.optim_kernel import step_chunk  # here, because only torch's CUDA build brings triton

    return step_chunk


@cache
def kernel_works(device: torch.device, bits: int, state_bits: int) -> bool:
    """Whether it steps as `step_chunk` does, on random numbers."""

    def trial() -> None:
        numbers = torch.randn(4, 9, 301, generator=torch.Generator().manual_seed(0)).to(device)  # of two parameters
        masters = []
        for has_kernel in (False, True):
            numbers = numbers.bfloat16() if bits else numbers.clone()
            pair = [torch.nn.Parameter(numbers[0, :7].clone()), torch.nn.Parameter(numbers[0, 7:].clone())]
            options = {"weight_decay": 1.0, "master_bits": bits or 32, "state_bits": state_bits}
            optimizer = MemoryEfficientAdamW(pair, TRIAL_RATE, **options)
            optimizer.has_kernel = has_kernel
            for gradient in numbers[1:]:
                pair[0].grad, pair[1].grad = gradient[:7].contiguous(), gradient[7:].contiguous()
                optimizer.step()
            masters += optimizer.master_weights()
        for plain, fused in zip(masters[:2], masters[2:], strict=True):
            torch.testing.assert_close(fused, plain, atol=0.05 * TRIAL_RATE, rtol=1e-4)

    # all processes alike: their replicas must not differ by a rounding
    name = "its loop in C" if kernel(device) is step_in_c else "Triton's kernel"
    with _disable_current_modes():  # else --profile would count it
        return all(gather(works(f"the optimizer steps without {name}", trial)))


def check_group(group: dict) -> None:
    """Refuse what the flat layout or AdamW can not step, by name."""
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 < beta2 < 1 and group["eps"] > 0 and group["lr"] >= 0 and group["weight_decay"] >= 0):
        raise ValueError(
            f"AdamW needs 0 <= beta1 < 1, 0 < beta2 < 1, eps > 0, lr >= 0 and weight_decay >= 0, not "
            f"{ {name: value for name, value in group.items() if name != 'params'} }"
        )
    for parameter in group["params"]:
        if parameter.dtype not in (torch.bfloat16, torch.float32) or not parameter.is_contiguous():
            raise ValueError(
                f"MemoryEfficientAdamW needs contiguous bfloat16 or float32 parameters, not a "
                f"{parameter.dtype} of shape {tuple(parameter.shape)} and stride {parameter.stride()}"
            )


def build_optimizer(
    params, learning_rate, betas, weight_decay, *, eps=1e-8, memory_efficient, master_bits=24, state_bits, offload
) -> torch.optim.Optimizer:
    """MemoryEfficientAdamW as configured, or else exact AdamW: torch's fused one on fp32 master weights.

    With a bf16 parameter the exact one is MemoryEfficientAdamW with 32/32 bits: exact fp32 masters, on a CPU bit for
    bit what torch's fused kernel gives with separate copies, in 2 bytes a parameter less.
    """
    params = list(params)  # parameters, or groups whose "params" is a list
    flat = [one for entry in params for one in (entry["params"] if isinstance(entry, dict) else [entry])]
    options = dict(lr=learning_rate, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
    if memory_efficient:
        return MemoryEfficientAdamW(params, **options, master_bits=master_bits, state_bits=state_bits, offload=offload)
    if all(parameter.dtype == torch.float32 for parameter in flat):
        return torch.optim.AdamW(params, **options, fused=True)
    return MemoryEfficientAdamW(params, **options, master_bits=32, state_bits=32)
