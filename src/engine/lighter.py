"""Parts of a model that become lighter by their class alone: fewer kernels, or less kept for the backward pass.

Weights, names and files stay theirs, and whoever calls a part, sampler, trainer or reference, calls the same. A part is
changed only where it gives what it gave, tried on random numbers.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.engine.decoding import cache_shape

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a result, relative


class GatedProduct(torch.autograd.Function):
    """linear(silu(gate) * up, weight), keeping gate and up: silu and the product are computed again when needed."""

    @staticmethod
    def forward(context, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """gate and up [..., wide], weight [hidden, wide] -> [..., hidden]."""
        context.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate) * up, weight)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """In the operations of autograd."""
        gate, up, weight = context.saved_tensors
        silu, of_weight = F.silu(gate), None
        if context.needs_input_grad[2]:
            of_weight = gradient.flatten(0, -2).t() @ (silu * up).flatten(0, -2)  # [hidden, wide]
        of_product = gradient @ weight  # [..., wide]
        return torch.ops.aten.silu_backward(of_product * up, gate), of_product * silu, of_weight


def gated_product(mlp: Any, hidden: Tensor) -> Tensor:
    """In place of the forward pass of transformers' gated MLPs."""
    return GatedProduct.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden), mlp.down_proj.weight)


def lean_mlp(mlp: Any, hidden: Tensor) -> Tensor:
    """The same where there is a backward pass, and where the last layer is no adapter's."""
    if torch.is_grad_enabled() and type(mlp.down_proj) is nn.Linear:
        return gated_product(mlp, hidden)
    return mlp.plain(hidden)


def one_kernel_norm(norm: Any, hidden: Tensor) -> Tensor:
    """In place of the forward pass of transformers' RMSNorm."""
    return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


@cache
def with_forward(kind: Any, forward: Any) -> Any:
    """A class of parts with that forward pass; `plain` is its own."""
    return type(kind.__name__, (kind,), {"forward": forward, "plain": kind.forward, "__module__": kind.__module__})


def gives_the_same(part: nn.Module, other: Any, width: int, like: Tensor) -> bool:
    """Whether other(part, hidden) is part(hidden) but for rounding, of small numbers and of large ones."""
    for scale in (1, 100):
        hidden = scale * torch.randn(3, width, generator=torch.Generator().manual_seed(0))  # [3, width]
        hidden = hidden.to(like.device, like.dtype)
        expected = part(hidden).float()
        error = (other(part, hidden).float() - expected).norm()
        if not error <= ROUNDING[like.dtype] * expected.norm() or expected.norm() == 0:
            return False
    return True


@torch.no_grad()
def lighten(model) -> int:
    """Norms become one kernel in place of six, gated MLPs keep half of what they kept; how many parts do."""
    changed = 0
    for part in [part for part in model.modules() if not hasattr(type(part), "plain")]:
        forward: Any = None
        down: Any = getattr(part, "down_proj", None)
        weight: Any = getattr(part, "weight", None)
        if hasattr(part, "variance_epsilon") and isinstance(weight, nn.Parameter) and weight.dtype == model.dtype:
            forward = one_kernel_norm if gives_the_same(part, one_kernel_norm, len(weight), weight) else None
        elif type(down) is nn.Linear and down.bias is None and hasattr(part, "gate_proj") and hasattr(part, "up_proj"):
            same = gives_the_same(part, gated_product, part.gate_proj.in_features, down.weight)
            forward = lean_mlp if same else None
        if forward is not None:
            part.__class__ = with_forward(type(part), forward)  # type: ignore[arg-type]  # a class can be hashed
            changed += 1
    return changed


def kept_of_layer(model) -> int:
    """Elements a token that a layer keeps for the backward pass."""
    shape = model.config.get_text_config()
    hidden = shape.hidden_size
    wide = max(getattr(shape, "intermediate_size", None) or 4 * hidden, hidden)
    parts = list(model.modules())
    lean = any(type(part).forward is lean_mlp and type(part.down_proj) is nn.Linear for part in parts)
    if not lean or all(type(part).forward is not one_kernel_norm for part in parts):
        return 12 * hidden + 4 * wide  # norms keep fp32 copies, adapters their inputs
    _, kv_heads, head_dim = cache_shape(model)
    heads = (shape.num_attention_heads + kv_heads) * head_dim  # of queries and keys, as of output and values
    normed = any(hasattr(part, "q_norm") for part in parts)  # queries and keys before and after
    return 4 * hidden + (2 + normed) * heads + 2 * wide
