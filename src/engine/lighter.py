"""Parts of a model that become lighter by their class alone: fewer kernels, or less kept for the backward pass.

Weights, names and files stay theirs, and whoever calls a part, sampler, trainer or reference, calls the same. A part is
changed only where it gives what it gave, tried on random numbers. On a CPU they are loops of C (training_loops.py).
"""

from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.engine.decode_loops import LONGEST_HEAD, apply_to
from src.engine.decoding import cache_shape
from src.engine.memory import out_of_memory
from src.engine.training_loops import LoopGatedProduct, LoopNorm, LoopTurn, gated
from src.engine.wide_products import LINEAR

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a result, relative
TURN = "apply_rotary_pos_emb"  # as all of transformers' models call it


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


def loop_norm(norm: Any, hidden: Tensor) -> Tensor:
    """The same by a loop of C."""
    if not apply_to(hidden, norm.weight):
        return getattr(norm, "plain", norm)(hidden)
    return LoopNorm.apply(hidden, norm.weight, norm.variance_epsilon)


def loop_mlp(mlp: Any, hidden: Tensor) -> Tensor:
    """The forward pass of a gated MLP with a loop of C."""
    down = mlp.down_proj
    if type(down) not in LINEAR or not apply_to(hidden, down.weight):
        return getattr(mlp, "plain", mlp)(hidden)
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    if not torch.is_grad_enabled():  # perhaps in a rollout, which multiplies in its own way
        return down(gated(gate, up))
    return LoopGatedProduct.apply(gate, up, down.weight)


def loop_turn(plain: Any, *given: Any, **named: Any) -> Any:
    """In place of transformers' rotary positions: query and key [B, heads, T, D], cosine and sine [B or 1, T, D]."""
    if named or len(given) != 4 or not turns(*given):
        return plain(*given, **named)
    query, key, cosine, sine = given
    cosine, sine = (x.expand(len(query), -1, -1) for x in (cosine, sine))
    return tuple(LoopTurn.apply(x.transpose(1, 2), cosine, sine).transpose(1, 2) for x in (query, key))


def turns(query: Any, key: Any, cosine: Any, sine: Any) -> bool:
    """Whether the loop is for these."""
    if any(not isinstance(x, Tensor) or x.dim() != 4 for x in (query, key)) or query.shape[::2] != key.shape[::2]:
        return False
    batch, _, length, dim = query.shape
    alike = cosine.shape == sine.shape in {(batch, length, dim), (1, length, dim)} and key.shape[-1] == dim
    return alike and dim <= LONGEST_HEAD and apply_to(query, key, cosine, sine)


@cache
def with_loop_turn(forward: Any) -> Any:
    """An attention's forward pass that calls it."""
    names = dict(forward.__globals__)
    names[TURN] = partial(loop_turn, names[TURN])
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def close(found: Any, expected: Any) -> bool:
    """Whether each of these tensors is what is expected but for rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        error, size = (ours.float() - theirs.float()).norm(), theirs.float().norm()
        if not error <= ROUNDING[theirs.dtype] * size or size == 0:  # NaN is wrong too
            return False
    return True


@torch.enable_grad()
def turns_the_same(plain: Any, dim: int, dtype: torch.dtype) -> bool:
    """Whether loop_turn gives what transformers' function for these heads gives, with its gradients."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 5, dim) for heads in (2, 1, 2, 1)]
    query, key, *slopes = (torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes)
    angle = torch.randn(1, 5, dim // 2, generator=draw).repeat(1, 1, 2)  # [1, T, D]
    found = []
    for function in (partial(loop_turn, plain), plain):
        turned = function(query, key, angle.cos().to(dtype), angle.sin().to(dtype))
        found.append([*turned, *torch.autograd.grad(turned, (query, key), slopes)])
    return close(*found)


@cache
def with_forward(kind: Any, forward: Any) -> Any:
    """A class of parts with that forward pass; `plain` is its own."""
    return type(kind.__name__, (kind,), {"forward": forward, "plain": kind.forward, "__module__": kind.__module__})


@torch.enable_grad()
def gives_the_same(part: nn.Module, other: Any, width: int, like: Tensor) -> bool:
    """Whether other(part, hidden) is part(hidden) but for rounding, of small numbers and large; the gradients too."""
    draw, weights = torch.Generator().manual_seed(0), [x for x in part.parameters() if x.requires_grad]
    for scale in (1, 100):
        hidden, slope = torch.randn(2, 3, width, generator=draw).to(like.device, like.dtype)  # [3, width] each
        hidden, found = (scale * hidden).requires_grad_(), []
        for function in (partial(other, part), part):
            result = function(hidden)
            found.append((result, *torch.autograd.grad(result, [hidden, *weights], slope)))
        if not close(*found):
            return False
    return True


def lighter_forward(part: Any, dtype: torch.dtype, in_loops: bool) -> Any:
    """Its forward pass as it can be lighter; None where it stays."""
    for_norm, for_mlp, gated_mlp = (
        (loop_norm, loop_mlp, loop_mlp) if in_loops else (one_kernel_norm, lean_mlp, gated_product)
    )
    down, weight, forward = getattr(part, "down_proj", None), getattr(part, "weight", None), type(part).forward
    if hasattr(part, "variance_epsilon") and isinstance(weight, nn.Parameter) and weight.dtype == dtype:
        return for_norm if gives_the_same(part, for_norm, len(weight), weight) else None
    if (
        isinstance(down, nn.Linear)
        and type(down) in LINEAR
        and down.bias is None
        and hasattr(part, "gate_proj")
        and hasattr(part, "up_proj")
    ):
        return for_mlp if gives_the_same(part, gated_mlp, part.gate_proj.in_features, down.weight) else None
    if in_loops and TURN in getattr(forward, "__globals__", ()) and TURN in forward.__code__.co_names:
        return with_loop_turn(forward) if turns_the_same(forward.__globals__[TURN], part.head_dim, dtype) else None
    return None


@torch.no_grad()
def lighten(model, in_loops: bool = False) -> int:
    """Norms become one kernel in place of six, gated MLPs keep half of what they kept; how many parts do.

    `in_loops`: they, and rotary positions, are loops of C.
    """
    changed = 0
    for part in [part for part in model.modules() if not hasattr(type(part), "plain")]:
        try:
            forward = lighter_forward(part, model.dtype, in_loops)
        except Exception as error:  # of a part that wants to be called in another way: it stays as it is
            if out_of_memory(error):
                raise
            continue
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
