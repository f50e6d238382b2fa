"""A decode step on a CPU in loops of C (decode_loops.c, layer_loops.c): attention, and what layer_kernels.py is for.

They give what torch's operations give but for the last bits, and a row does not depend on its neighbours.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import src.engine.decode_loops as decode_loops
from src.engine.cpu_step import step_for
from src.engine.decode_loops import LONGEST_HEAD, loops, shape_for
from src.engine.decoding import GroupedAttention, SlotCache, cache_shape
from src.engine.kernels import works
from src.engine.operations import Operations


def applies(model) -> bool:
    """Whether the loops are for this model, whose heads are to be whole vectors."""
    _, kv_heads, dim = cache_shape(model)
    fits = decode_loops.applies(model) and is_whole(dim, model.dtype) and dim <= LONGEST_HEAD
    return fits and attention_works(model.config.get_text_config().num_attention_heads, kv_heads, dim, model.dtype)


def is_whole(width: int, dtype: torch.dtype) -> bool:
    """Whether so many numbers are whole vectors."""
    shape = shape_for(dtype)
    return shape is not None and width % shape.lanes == 0


class AttentionArguments(ctypes.Structure):
    """As in decode_loops.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "prompt_keys", "prompt_values", "keys", "values", "out")),
        *((name, ctypes.c_void_p) for name in ("prompts", "prompt_lengths", "slots", "places")),
        *((name, ctypes.c_int64) for name in ("rows", "kv_heads", "repeats", "dim")),
        *((name, ctypes.c_int64) for name in ("prompt_stride", "prompt_head_stride", "slot_stride", "head_stride")),
        ("scaling", ctypes.c_float),
    ]


class TurnArguments(ctypes.Structure):
    """As in layer_loops.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "cosine", "sine", "weight", "target", "slots", "places")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "dim", "source_row", "target_row", "target_head")),
        ("epsilon", ctypes.c_float),
    ]


class LoopAttention(SlotCache):
    """Attention of one decode step: a row reads its prompt's keys and its own where they lie."""

    moves_freely = True

    def __init__(self, prompt: tuple[Tensor, Tensor, np.ndarray], slots: int, width: int):
        self.count = slots
        super().__init__(prompt, slots, width)
        self.longest = int(self.prompt_lengths.max()) + width  # no sequence grows longer

    def renew(self, prompt: tuple) -> None:
        """Other prompts for the same slots."""
        super().renew(prompt)
        self.slots = torch.arange(self.count)  # where each row's keys lie
        self.step: tuple | None = None  # of cpu_step.py, which keeps copies of the weights alive

    def move(self, keep: Tensor) -> None:
        """The kept rows become the first, and their keys stay."""
        self.slots = self.slots[keep]

    def start(self, slots: Tensor, prompts: Tensor) -> None:
        """Nothing: a row reads what its own episode wrote."""

    def arrange(self, prompt_rows: np.ndarray, lengths: np.ndarray, ended: np.ndarray) -> None:
        """Of each slot [n]: its prompt, own tokens in the cache, and whether it has ended."""
        self.prompts = torch.from_numpy(prompt_rows)  # [n]
        self.lengths = torch.from_numpy(self.prompt_lengths[prompt_rows])  # [n] of the prompts

    def begin_block(self, steps: int) -> None:
        """Nothing: a row reads as many places as it has."""

    def begin_step(self, lengths: Tensor, positions: Tensor) -> None:
        """lengths [n]: own tokens already in the cache; this step's goes to that place."""
        self.places = lengths.clamp(max=self.capacity - 1)  # a slot that ended keeps overwriting the last place

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [n, H, 1, D], key and value [n, Hkv, 1, D] -> [n, 1, H, D]."""
        place = (self.slots[: len(key)], slice(None), self.places)
        self.keys[layer][place], self.values[layer][place] = key[:, :, 0], value[:, :, 0]
        return self.read(layer, query[:, :, 0].contiguous(), scaling)

    def read(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """query [n, H, D] -> [n, 1, H, D]."""
        n, heads, dim = query.shape
        keys, prompt_keys = self.keys[layer], self.prompt_keys[layer]  # [slots, Hkv, width, D], [prompts, Hkv, P, D]
        output = torch.empty_like(query)
        loops(query.dtype).attend(ctypes.byref(AttentionArguments(
            query.data_ptr(), prompt_keys.data_ptr(), self.prompt_values[layer].data_ptr(),
            keys.data_ptr(), self.values[layer].data_ptr(), output.data_ptr(),
            self.prompts.data_ptr(), self.lengths.data_ptr(), self.slots.data_ptr(), self.places.data_ptr(),
            n, keys.shape[1], heads // keys.shape[1], dim, *prompt_keys.stride()[:2], *keys.stride()[:2], scaling,
        )))  # fmt: skip
        return output[:, None]


@cache
def attention_works(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether LoopAttention gives what GroupedAttention gives in fp32, on rows of different lengths; tells when not."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    prompt = draw(1, 2, kv_heads, 70, dim), draw(1, 2, kv_heads, 70, dim), np.array([70, 3])
    own, rows, lengths = draw(2, 3, kv_heads, 90, dim), np.array([0, 1, 1]), np.array([0, 80, 17])
    query, key, value = draw(3, heads, 1, dim), draw(3, kv_heads, 1, dim), draw(3, kv_heads, 1, dim)

    @torch.inference_mode()
    def output(layout: type[LoopAttention] | type[GroupedAttention], dtype: torch.dtype) -> Tensor:
        attention = layout((prompt[0].to(dtype), prompt[1].to(dtype), prompt[2]), 3, 90)
        attention.keys[0].copy_(own[0]), attention.values[0].copy_(own[1])
        attention.arrange(rows, lengths, np.zeros(3, dtype=bool))
        attention.begin_step(torch.from_numpy(lengths), torch.from_numpy(lengths + prompt[2][rows]))
        return attention.attend(0, query.to(dtype), key.to(dtype), value.to(dtype), dim**-0.5)

    def trial() -> None:
        worst = float((output(LoopAttention, dtype) - output(GroupedAttention, torch.float32)).abs().max())
        if not worst < (1e-4 if dtype == torch.float32 else 2e-2):  # NaN is wrong too
            raise ValueError(f"wrong by {worst:.2g}")

    return works("attention without loops in C", trial)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [n, wide] each, whose rows may lie apart."""
    product = gate.new_empty(gate.shape)
    places = gate.data_ptr(), up.data_ptr(), product.data_ptr()
    loops(gate.dtype).gated(*places, *gate.shape, gate.stride(0), up.stride(0))
    return product


class LoopOperations(Operations):
    """What a layer does beside its products, in a loop each; hidden states are added to in place."""

    def add_norm(self, hidden: Tensor, update: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """hidden + update, and its norm, [n, hidden] each."""
        rows, width = hidden.shape
        if not is_whole(width, hidden.dtype):
            return super().add_norm(hidden, update, norm)
        update = None if update is None else update.contiguous()
        normed, added = torch.empty_like(hidden), None if update is None else update.data_ptr()
        weight, epsilon = norm.weight.data_ptr(), norm.variance_epsilon
        loops(hidden.dtype).add_norm(hidden.data_ptr(), added, weight, normed.data_ptr(), rows, width, epsilon)
        return hidden, normed

    def attend(self, part: Any, qkv: list[Tensor], cosine: Tensor, sine: Tensor, attention) -> Tensor:
        """Queries, keys and values [n, heads * D] -> [n, 1, H, D]; cosine and sine [n, D] of each row's position."""
        n, dim = cosine.shape
        query, keys, values = qkv[0].new_empty(n, qkv[0].shape[1] // dim, dim), attention.keys, attention.values
        norms = [getattr(part, name, None) for name in ("q_norm", "k_norm")]
        turned = cosine.data_ptr(), sine.data_ptr()
        place = attention.slots.data_ptr(), attention.places.data_ptr()
        for source, target, where, turn, norm in (
            (qkv[0], query, (None, None), turned, norms[0]),
            (qkv[1], keys[part.layer_idx], place, turned, norms[1]),
            (qkv[2], values[part.layer_idx], place, (None, None), None),
        ):
            weight, epsilon = (None, 0.0) if norm is None else (norm.weight.data_ptr(), norm.variance_epsilon)
            loops(query.dtype).turn(ctypes.byref(TurnArguments(
                source.data_ptr(), *turn, weight, target.data_ptr(), *where,
                n, source.shape[1] // dim, dim, source.stride(0), *target.stride()[:2], epsilon,
            )))  # fmt: skip
        return attention.read(part.layer_idx, query, part.scaling)

    def at_once(self, decoder: Any, hidden: Tensor, cosine: Tensor, sine: Tensor, attention) -> Tensor | None:
        """In a rollout, whose weights lie as the loops want them."""
        step = step_for(decoder, attention)
        return None if step is None else step(hidden, cosine, sine, attention)

    def feed_forward(self, hidden: Tensor, mlp: Any) -> Tensor:
        """[n, hidden] -> [n, hidden]."""
        gate, up = self.siblings(hidden, (mlp.gate_proj, mlp.up_proj))
        if not is_whole(gate.shape[-1], hidden.dtype):
            return mlp.down_proj(mlp.act_fn(gate) * up)
        return mlp.down_proj(gated(gate, up))
