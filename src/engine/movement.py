"""Do the weights move? A sample of them before and after a step: a learning rate that is too small is seen here."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.engine.distributed import gather, rank, world
from src.engine.sharding import local, sliced

EVERY = 1009  # prime, so that a column of a matrix is not met again and again


def first_element(parameter: Tensor) -> int:
    """Where this rank's slice begins in the whole tensor: FSDP2 cuts rows as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return 0
    rows = parameter.shape[0]
    return min(rank() * -(-rows // world()), rows) * (parameter.numel() // rows)


def sampled_weights(model) -> Tensor:
    """Every 1,009th element of each trained tensor, from its first, of what lies on this rank [n].

    One process, a replicated and a sharded model sample the same elements.
    """
    sliced(model)  # an evaluation may have left weights whole
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pieces = [local(one).detach().reshape(-1)[-first_element(one) % EVERY :: EVERY].float() for one in trained]
    return torch.cat(pieces)


def share_changed(before: Tensor, after: Tensor) -> float:
    """Of all ranks; where each holds the whole model each counts the same."""
    counts = gather((int((before != after).sum()), before.numel()))
    return sum(changed for changed, _ in counts) / sum(total for _, total in counts)
