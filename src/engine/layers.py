"""The layers of a decode step, written out for the Llama family: one token a row, without transformers' wrappers.

transformers' own forward pass stays what defines a model: each model is tried, and one that gives something else here,
or is of another family, or has hooks, is decoded by its own. On a GPU the same in a third of the kernels: products of
the same input at once, and three kernels of layer_kernels.py for what lies between the products and the attention.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from src.engine.decoding import JoinedAttention, cache_shape
from src.engine.kernels import wanted, works
from src.engine.operations import Operations

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")  # of these the decoder's class
CLOSE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # rounding through all layers, relative
chosen: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # by decoder: what was tried and found good


def own_layers(model, ids: Tensor, positions: Tensor, attention) -> Tensor:
    """ids and positions [n] -> hidden [n, hidden], by the model's own forward pass."""
    decoder, places = model.get_decoder(), positions[:, None]
    found = decoder(input_ids=ids[:, None], position_ids=places, use_cache=False, attention_plan=attention)
    return found.last_hidden_state[:, 0]


def written_layers(operations: Operations, model, ids: Tensor, positions: Tensor, attention) -> Tensor:
    """The same, written out."""
    decoder = model.get_decoder()
    hidden, update = decoder.embed_tokens(ids), None  # [n, hidden]
    cosine, sine = (part[0] for part in decoder.rotary_emb(hidden, positions[None]))  # [n, D] each
    for layer in decoder.layers:
        part = layer.self_attn
        hidden, normed = operations.add_norm(hidden, update, layer.input_layernorm)
        qkv = operations.siblings(normed, (part.q_proj, part.k_proj, part.v_proj))
        update = part.o_proj(operations.attend(part, qkv, cosine, sine, attention).flatten(1))
        hidden, normed = operations.add_norm(hidden, update, layer.post_attention_layernorm)
        update = operations.feed_forward(normed, layer.mlp)
    return operations.add_norm(hidden, update, decoder.norm)[1]


def has_hooks(decoder: Any) -> bool:
    """Whether someone listens inside the layers, whom what is written out would not call."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return any(getattr(part, name) for part in decoder.modules() for name in hooks)


def gives_the_same(model, layers) -> bool:
    """Whether these layers give what the model's own do, but for rounding: two rows, one of them a token ahead."""
    depth, kv_heads, head_dim = cache_shape(model)
    device = model.device
    shape = (depth, 2, kv_heads, 1, head_dim)
    keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)
    ids, positions = torch.tensor([1, 0], device=device), torch.tensor([1, 2], device=device)
    found = []
    for forward in (own_layers, layers):
        attention = JoinedAttention((keys, values, np.array([1, 1])), 2, 2)
        attention.start(torch.arange(2, device=device), torch.arange(2, device=device))
        attention.arrange(np.arange(2), np.array([0, 1]), np.zeros(2, dtype=bool))
        attention.begin_block(1)
        attention.begin_step(positions - 1, positions)
        found.append(
            forward(model, ids, positions, attention).float().nan_to_num()
        )  # broken weights are told elsewhere
    expected, given = found
    return bool((given - expected).norm() <= CLOSE[model.dtype] * expected.norm())


def fused_operations() -> Operations:
    """Triton's kernels."""
    from src.engine.layer_kernels import FusedOperations  # here, because only torch's CUDA build brings triton

    return FusedOperations()


def check(model, make: Callable[[], Operations]) -> None:
    """ValueError where a decode step gives something else with these operations."""
    if not gives_the_same(model, partial(written_layers, make())):
        raise ValueError("it gives something else")


def layers_for(model):
    """(model, ids, positions, attention) -> hidden: what decodes this model, tried when it comes first."""
    decoder = model.get_decoder()
    if type(decoder).__name__ not in FAMILIES or has_hooks(decoder):
        return own_layers
    if is_in_torch_dispatch_mode():  # operations are looked at (--profile), perhaps not computed
        return partial(written_layers, Operations())
    if decoder not in chosen:
        chosen[decoder] = first_good(model)
    return chosen[decoder]


@torch.inference_mode()
def first_good(model):
    """The fastest way that gives what the model gives."""
    if wanted(model.device) and works("decoding without Triton's kernels", partial(check, model, fused_operations)):
        return partial(written_layers, fused_operations())
    if works("decoding by the model's own forward pass", partial(check, model, Operations)):
        return partial(written_layers, Operations())
    return own_layers
