"""The layers of a decode step, written out for the Llama family: one token a row, without transformers' wrappers.

transformers' own forward pass stays what defines a model: each model is tried, and one that gives something else here,
or is of another family, or has hooks, is decoded by its own. On a GPU the same in a third of the kernels: products of
the same input at once, and three kernels of layer_kernels.py for what lies between the products and the attention.
On a CPU loops of C, which are tried one by one; a rollout calls them at once (cpu_step.py).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from src.engine.cpu_layers import LoopAttention, LoopOperations
from src.engine.cuda_decoding import layout_for
from src.engine.decoding import cache_shape
from src.engine.kernels import wanted, works
from src.engine.operations import Operations

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")  # of these the decoder's class
# how far they may be off, relative: what is written out; of kernels and of loops each layer, and all of them together
SAME = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
KERNELS, LOOPS = (1e-2, 5e-2), (1e-4, 1e-3)
CHOSEN = "chosen_layers"  # of a decoder: what it was made of, and what was found good. It may refer to the decoder


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
    found = operations.at_once(decoder, hidden, cosine, sine, attention)
    if found is not None:
        return found
    for layer in decoder.layers:
        part = layer.self_attn
        hidden, normed = operations.add_norm(hidden, update, layer.input_layernorm)
        qkv = operations.siblings(normed, (part.q_proj, part.k_proj, part.v_proj))
        update = part.o_proj(operations.attend(part, qkv, cosine, sine, attention).flatten(1))
        hidden, normed = operations.add_norm(hidden, update, layer.post_attention_layernorm)
        update = operations.feed_forward(normed, layer.mlp)
    return operations.add_norm(hidden, update, decoder.norm)[1]


def made_of(decoder: Any) -> tuple:
    """What its forward pass is made of: that changes with whoever changes a class or an object's forward pass."""
    return tuple((type(part).forward, vars(part).get("forward")) for part in decoder.modules())


def has_hooks(parts: Iterable[Any]) -> bool:
    """Whether someone listens to these modules."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def attention_for(model, rows: int = 3, width: int = 4):
    """A cache as in a rollout, behind prompts of random keys, and the positions [rows] of the next tokens."""
    depth, kv_heads, head_dim = cache_shape(model)
    generator, device = torch.Generator().manual_seed(0), model.device
    keys, values = torch.randn(2, depth, 2, kv_heads, 40, head_dim, generator=generator).to(device, model.dtype)
    prompts, of_slots, lengths = np.array([40, 7]), np.arange(rows) % 2, np.zeros(rows, dtype=np.int64)
    attention = layout_for(model)((keys, values, prompts), rows, width)
    attention.start(torch.arange(rows, device=device), torch.from_numpy(of_slots).to(device))
    attention.arrange(of_slots, lengths, np.zeros(rows, dtype=bool))
    attention.begin_block(width)
    return attention, torch.from_numpy(prompts[of_slots]).to(device)


def outcome(model, layers) -> list[Tensor]:
    """Hidden states [rows, hidden] of two tokens a row."""
    (attention, positions), found = attention_for(model), []
    for step in (0, 1):
        attention.begin_step(torch.full_like(positions, step), positions + step)
        found.append(layers(model, torch.arange(3, device=model.device) + step, positions + step, attention))
    return found


def outcome_of_each(model, operations: Operations) -> list[Tensor]:
    """What the operations make of random numbers in each layer."""
    decoder, found = model.get_decoder(), []
    attention, positions = attention_for(model)
    numbers = torch.randn(2, 3, decoder.norm.weight.numel(), generator=torch.Generator().manual_seed(1))
    hidden, update = numbers.to(model.device, model.dtype)  # [rows, hidden] each
    cosine, sine = (part[0] for part in decoder.rotary_emb(hidden, positions[None]))
    attention.begin_step(torch.zeros_like(positions), positions)
    for layer in decoder.layers:
        part = layer.self_attn
        qkv = [project(hidden) for project in (part.q_proj, part.k_proj, part.v_proj)]
        found += [operations.attend(part, qkv, cosine, sine, attention), operations.feed_forward(hidden, layer.mlp)]
        found += operations.add_norm(hidden.clone(), update, layer.input_layernorm)
    return [*found, *attention.keys, *attention.values]


def differ(found: list[Tensor], expected: list[Tensor], limit: float) -> bool:
    """Whether one is further from what is expected than this, relative; broken weights give NaN here and there."""
    pairs = [(a.float().nan_to_num(), b.float().nan_to_num()) for a, b in zip(found, expected, strict=True)]
    return any(bool((a - b).norm() > limit * b.norm()) for a, b in pairs)


def check_plain(model) -> None:
    """ValueError where what is written out is not what the model computes."""
    if differ(outcome(model, partial(written_layers, Operations())), outcome(model, own_layers), SAME[model.dtype]):
        raise ValueError("it gives something else")


def check_fused(model) -> None:
    """ValueError where the kernels or loops compute something else than the plain operations."""
    plain, fused = Operations(), fused_operations(model)
    of_each, of_all = LOOPS if model.dtype == torch.float32 and not wanted(model.device) else KERNELS
    probe = torch.linspace(-4, 4, 9, device=model.device)  # of small numbers all activations are alike
    active = [layer.mlp.act_fn(probe) for layer in model.get_decoder().layers]
    if (
        differ(active, [torch.nn.functional.silu(probe)] * len(active), of_each)
        or differ(outcome_of_each(model, fused), outcome_of_each(model, plain), of_each)
        or differ(
            outcome(model, partial(written_layers, fused)), outcome(model, partial(written_layers, plain)), of_all
        )
    ):
        raise ValueError("they give something else")


def fused_operations(model) -> Operations:
    """Triton's kernels, or loops of C."""
    if not wanted(model.device):
        return LoopOperations()
    from src.engine.layer_kernels import FusedOperations  # here, because only torch's CUDA build brings triton

    return FusedOperations()


def layers_for(model):
    """(model, ids, positions, attention) -> hidden: what decodes this model, tried when it is new or was changed."""
    decoder = model.get_decoder()
    if type(decoder).__name__ not in FAMILIES or has_hooks((decoder, decoder.norm, *decoder.layers.modules())):
        return own_layers
    made, layers = vars(decoder).get(CHOSEN, (None, None))
    if is_in_torch_dispatch_mode():  # operations are looked at (--profile), perhaps not computed
        return own_layers if layers is own_layers else partial(written_layers, Operations())
    now = (*made_of(decoder), layout_for(model))
    if made != now:
        _, layers = vars(decoder)[CHOSEN] = now, first_good(model)
    return layers


@torch.inference_mode()
def first_good(model):
    """The fastest way that gives what the model gives."""
    if not works("decoding by the model's own forward pass", partial(check_plain, model)):
        return own_layers
    for has_them, kind in (
        (wanted(model.device), "Triton's kernels"),
        (layout_for(model) is LoopAttention, "the layers' loops in C"),
    ):
        if has_them and works(f"decoding without {kind}", partial(check_fused, model)):
            return partial(written_layers, fused_operations(model))
    return partial(written_layers, Operations())
