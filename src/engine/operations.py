"""What a layer of a decode step does between its attention and its products, and weights that are multiplied at once.

The operations are torch's and round as transformers does; layer_kernels.py has them for a GPU, cpu_layers.py for a CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn

from src.engine.cpu_weights import gathered


class Operations:
    """What a layer does beside its products: in torch's operations, rounded as in transformers."""

    def add_norm(self, hidden: Tensor, update: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """hidden + update, and its norm, [n, hidden] each."""
        hidden = hidden if update is None else hidden + update
        return hidden, norm(hidden)

    def siblings(self, hidden: Tensor, layers: tuple) -> list[Tensor]:
        """What layers make of the same input."""
        return [layer(hidden) for layer in layers]

    def attend(self, part: Any, qkv: list[Tensor], cosine: Tensor, sine: Tensor, attention) -> Tensor:
        """Queries, keys and values [n, heads * D] -> [n, 1, H, D]; cosine and sine [n, D] of each row's position."""
        query, key, value = (x.unflatten(-1, (-1, cosine.shape[-1]))[:, :, None] for x in qkv)  # [n, heads, 1, D]
        if hasattr(part, "q_norm"):
            query, key = part.q_norm(query), part.k_norm(key)
        query, key = (turned(x, cosine[:, None, None], sine[:, None, None]) for x in (query, key))
        return attention.attend(part.layer_idx, query, key, value, part.scaling)

    def at_once(self, decoder: Any, hidden: Tensor, cosine: Tensor, sine: Tensor, attention) -> Tensor | None:
        """All layers, hidden [n, hidden] -> [n, hidden]; None: one by one."""
        return None

    def feed_forward(self, hidden: Tensor, mlp: Any) -> Tensor:
        """[n, hidden] -> [n, hidden]."""
        return mlp(hidden)


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions, arXiv:2104.09864: the halves of the last dimension are the two coordinates."""
    one, other = x.chunk(2, -1)
    return x * cosine + torch.cat((-other, one), -1) * sine


def put_side_by_side(model) -> None:
    """The weights of layers that read the same input, one behind the other: so one product needs no copy of them."""
    for layers in (group for group in gathered(model) if len(group) > 1):
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in layers]
            if parts[0] is not None:
                whole = torch.cat([part.detach() for part in parts])
                for layer, old, new in zip(layers, parts, whole.split([len(part) for part in parts]), strict=True):
                    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))


def side_by_side(parts: list[Tensor]) -> Tensor | None:
    """The tensor that these are one behind the other, without a copy; None where they lie apart."""
    ends = [part.data_ptr() + part.nbytes for part in parts]
    first = parts[0]
    if [part.data_ptr() for part in parts[1:]] != ends[:-1] or not all(part.is_contiguous() for part in parts):
        return None
    if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() < ends[-1]:
        return None  # neighbours by chance
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
