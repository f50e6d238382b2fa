"""How weights and gradients lie on the processes of a run; with one process everything here is idle.

`training.parallel: shard` keeps a slice of weights, gradients and optimizer states on each rank (FSDP2): a layer is
gathered while it computes, and in a rollout all of them at once. `replicate` keeps everything everywhere.
Checkpoints hold whole tensors in the format of one process, so any number of ranks goes on from them.
"""

import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from src.engine.distributed import gather, world
from src.engine.models import decoder_layers


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def shard(model, device: torch.device) -> Any:
    """Keep only this rank's slice of each weight. What calls decoder or head then goes through `within`."""
    mesh, policy = init_device_mesh(device.type, (world(),)), MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*decoder_layers(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the denominators are global: a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
    # FSDP's hooks sit on the root's forward, which we do not call: they get a method of their own
    model.within = types.MethodType(lambda model, function, *arguments: function(model, *arguments), model)
    register_fsdp_forward_method(model, "within")
    model.within(lambda model: None)  # the first call makes it the root
    model.reshard()  # parameters() are the slices now
    return model


def within(model, function: Callable, *arguments) -> Any:
    """function(model, ...), which finds whole weights; those of the head stay whole until the backward pass."""
    return model.within(function, *arguments) if is_sharded(model) else function(model, *arguments)


@contextmanager
def whole(model, anchor) -> Iterator[None]:
    """All weights on every rank: in a rollout each does another number of steps and cannot wait for the others.

    What `within` has left whole of the anchor, and what FSDP has noted for its backward pass, goes first.
    """
    sliced(anchor)
    parts: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        # FSDP would note every pass, to gather in the same order in the backward pass, which never comes
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, (before, after) in zip(parts, hooks, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def sliced(model) -> None:
    """After passes without a backward one, which would have done it: parameters() are the slices again."""
    if is_sharded(model):
        getattr(model, "reset_iter_state", model.reshard)()  # torch >= 2.13


def evened(model, mine: list[list], groups: Sequence) -> Iterator[tuple[list, bool]]:
    """This rank's micro-batches, then idle ones until every rank of a sharded model has made as many passes."""
    passes = max(gather(len(mine))) if is_sharded(model) else len(mine)  # before the first pass: it is an exchange too
    yield from ((pieces, True) for pieces in mine)
    smallest = min(groups, key=lambda group: sum(len(episode.token_ids) for episode in group.episodes))
    shortest = min(smallest.episodes, key=lambda episode: len(episode.token_ids))
    idle = replace(smallest, episodes=(replace(shortest, token_weight=0.0, episode_weight=0.0),))
    yield from [([idle], False)] * (passes - len(mine))


def sum_gradients(model) -> None:
    """Over the ranks of a replicated model; of a sharded one FSDP has already done it."""
    if world() == 1 or is_sharded(model):
        return
    parameters = list(model.parameters())
    used = gather([index for index, parameter in enumerate(parameters) if parameter.grad is not None])
    for index, parameter in enumerate(parameters):
        if any(index in indices for indices in used):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            exact = gradient.float()  # bf16 would be rounded once a rank
            dist.all_reduce(exact)
            parameter.grad = exact.to(gradient.dtype)


def local(tensor: Tensor) -> Tensor:
    """The slice of a tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(value: Any) -> Any:
    """Every sharded tensor in a nest of dicts and lists made whole, on the CPU. All ranks must take part."""
    if isinstance(value, dict):
        return {name: full(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [full(entry) for entry in value]
    if not isinstance(value, DTensor):
        return value
    if value.dtype == torch.int16:  # neither gloo nor NCCL knows it
        wider: Any = value.int()
        return wider.full_tensor().short().cpu()
    return value.full_tensor().cpu()


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, cut as `target` is."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def cut_states(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """A saved optimizer's whole states, cut as the parameters are."""
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    return saved | {
        "state": {
            key: {
                name: like(value, parameters[key]) if getattr(value, "shape", None) == parameters[key].shape else value
                for name, value in states.items()
            }
            for key, states in saved["state"].items()
        }
    }


def full_state(model) -> dict[str, Any]:
    """What save_pretrained needs to be told of a sharded model: its weights, whole, on rank 0."""
    if not is_sharded(model):
        return {}
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    live = {name: local(tensor).data_ptr() for name, tensor in model.state_dict().items()}
    first = {place: name for name, place in reversed(live.items())}  # tied weights are one tensor and must stay one
    return {"state_dict": {name: state[first[live[name]]] for name in state}}


def load_full_state(model, state: dict[str, Tensor]) -> None:
    """Whole tensors into a model, on every rank."""
    live = model.state_dict()
    model.load_state_dict({name: like(tensor, live[name]) for name, tensor in state.items()})
