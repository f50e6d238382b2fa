"""All layers of a decode step on a CPU in one call (step_loops.c): what cpu_layers.py does one by one, to the bit.

From Python a layer's calls take 0.3 ms, whatever the rows: all the time of a small model, a fifth of 135M parameters'.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.engine.cpu_weights import PRODUCTS, Product
from src.engine.decode_loops import check_memory, loops, places, shape_for
from src.engine.decoding import SlotCache


class LayerArguments(ctypes.Structure):
    """As in step_loops.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "qkv", "qkv_bias", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("out", "out_bias", "mlp_norm", "gate_up", "gate_up_bias")),
        *((name, ctypes.c_void_p) for name in ("down", "down_bias", "prompt_keys", "prompt_values", "keys", "values")),
    ]


class StepArguments(ctypes.Structure):
    """As in step_loops.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "norm", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("hidden", "normed", "projected", "between", "update")),
        *((name, ctypes.c_void_p) for name in ("prompts", "prompt_lengths", "slots", "places")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "width", "inner", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("prompt_stride", "prompt_head_stride", "slot_stride", "head_stride")),
        *((name, ctypes.c_float) for name in ("epsilon", "scaling")),
    ]


def linear_layers(layer: Any) -> Iterator[list[Any]]:
    """Those that are one product each, in their order."""
    part, mlp = layer.self_attn, layer.mlp
    yield from ([part.q_proj, part.k_proj, part.v_proj], [part.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj])


def norms(layer: Any) -> list[Any]:
    """Before attention, of a head's queries and keys (or None), before the MLP."""
    heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [layer.input_layernorm, *heads, layer.post_attention_layernorm]


def one_shape(decoder: Any, products: dict[Any, Product]) -> tuple | None:
    """Sizes of the products, epsilon and scaling, where all layers have the same and are made of whole vectors."""
    found = set()
    for layer in decoder.layers:
        sizes = []
        for group in linear_layers(layer):
            product = products.get(group[0])
            if product is None or product.panels is None or product.layers != group:
                return None
            sizes.append(tuple(product.sizes))
        epsilons = {norm.variance_epsilon for norm in (*norms(layer), decoder.norm) if norm is not None}
        found.add((tuple(sizes), *epsilons, layer.self_attn.scaling))
    shape = shape_for(decoder.norm.weight.dtype)
    (of_all, *rest), *others = found
    whole = shape is not None and of_all[1][0] % shape.lanes == 0 and of_all[2][0] % shape.lanes == 0
    return (of_all, *rest) if whole and not others and len(rest) == 2 else None


class LoopStep:
    """For the weights of one rollout, and for one cache."""

    def __init__(self, decoder: Any, products: dict[Any, Product], shape: tuple, attention: Any):
        ((queries, keys, _), (width,), (inner, _), _), epsilon, scaling = shape
        layers = []
        for layer, place in zip(decoder.layers, self.caches(decoder, attention), strict=True):
            before, of_queries, of_keys, after = (None if norm is None else norm.weight for norm in norms(layer))
            qkv, out, gate_up, down = (products[group[0]] for group in linear_layers(layer))
            layers.append(LayerArguments(*places(
                before, qkv.panels, qkv.bias, of_queries, of_keys, out.panels, out.bias,
                after, gate_up.panels, gate_up.bias, down.panels, down.bias, *place,
            )))  # fmt: skip
        own, prompt = attention.keys[0], attention.prompt_keys[0]  # [slots, Hkv, width, D], [prompts, Hkv, P, D]
        dim, slots = own.shape[-1], len(own)
        self.kept = products, attention.prompt_keys, attention.prompt_values  # pointed at; not what refers to this
        self.layers = (LayerArguments * len(layers))(*layers)
        self.scratch = [own.new_empty(slots, size) for size in (
            max(queries + 2 * keys, 2 * inner), max(2 * queries, inner), width)]  # fmt: skip
        projected, between, update = places(*self.scratch)
        strides = zip(("prompt_stride", "prompt_head_stride", "slot_stride", "head_stride"),
                      (*prompt.stride()[:2], *own.stride()[:2]), strict=True)  # fmt: skip
        self.arguments = StepArguments(
            layers=ctypes.addressof(self.layers), norm=decoder.norm.weight.data_ptr(), projected=projected,
            between=between, update=update, count=len(layers), width=width, inner=inner, heads=queries // dim,
            kv_heads=keys // dim, dim=dim, epsilon=epsilon, scaling=scaling, **dict(strides),
        )  # fmt: skip

    @staticmethod
    def caches(decoder: Any, attention: SlotCache) -> Iterator[tuple[Tensor, ...]]:
        """Keys and values of the prompts, and the slots' own, of each layer."""
        for layer in decoder.layers:
            index = layer.self_attn.layer_idx
            yield (attention.prompt_keys[index], attention.prompt_values[index], attention.keys[index],
                   attention.values[index])  # fmt: skip

    def __call__(self, hidden: Tensor, cosine: Tensor, sine: Tensor, attention: Any) -> Tensor:
        """hidden [n, hidden], which is used up, cosine and sine [n, D] -> [n, hidden]."""
        given, normed = self.arguments, torch.empty_like(hidden)
        given.cosine, given.sine, given.hidden, given.normed = places(cosine, sine, hidden, normed)
        given.prompts, given.prompt_lengths, given.slots, given.places = places(
            attention.prompts, attention.lengths, attention.slots, attention.places
        )
        given.rows = len(hidden)
        check_memory(loops(hidden.dtype).step(ctypes.byref(given)))
        return normed


def step_for(decoder: Any, attention: Any) -> LoopStep | None:
    """That of this rollout, where its layers are such products."""
    products = vars(decoder).get(PRODUCTS)
    if products is None:
        return None
    known = attention.step
    if known is None or known[0] is not products:
        shape = one_shape(decoder, products)
        made = None if shape is None else LoopStep(decoder, products, shape, attention)
        attention.step = known = (products, made)
    return known[1]
