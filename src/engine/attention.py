"""Who sees whom in a packed row: the attention function that reads rows of several texts without padding.

It is registered with transformers, so every AutoModelForCausalLM calls it: no model code here.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import src.engine.attention_loops as attention_loops
import src.engine.cpu_attention as cpu_attention
from src.config import ConfigError
from src.engine.upload import upload

varlen_attn: Any  # None where torch has none
try:  # torch >= 2.10; CUDA only
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch >= 2.12
except ImportError:
    varlen_attn = None

ATTENTION_NAME = "grpo_packed"


@dataclass(frozen=True)
class Tile:
    """Segments of similar shape, padded to a rectangle for scaled_dot_product_attention."""

    query_index: Tensor  # [S * L] places in the row
    key_index: Tensor  # [S * K]
    mask: Tensor  # [S, 1, L, K] 0 or -inf
    segments: int  # S


class PackedAttention:
    """Who sees whom in a packed row. Segments are contiguous and cover the row; each may have a prefix to look at.

    Before its prefix all but the first see `head` tokens, which are that first segment.
    """

    def __init__(
        self,
        starts: np.ndarray,
        lengths: np.ndarray,
        prefix_starts: np.ndarray,
        prefix_lengths: np.ndarray,
        device: torch.device | str,
        dtype: torch.dtype,
        head: int = 0,
    ):
        heads = np.where(starts < head, 0, head)  # [S]
        self.longest = int((heads + prefix_lengths + lengths).max())
        self.use_varlen = torch.device(device).type == "cuda" and varlen_attn is not None and dtype != torch.float32
        if self.use_varlen:
            keys = [
                np.r_[:h, p : p + m, s : s + n]
                for h, s, n, p, m in zip(heads, starts, lengths, prefix_starts, prefix_lengths, strict=True)
            ]
            sizes = np.array([len(row) for row in keys])
            whole = [torch.from_numpy(np.concatenate(keys)), cumulative(lengths), cumulative(sizes)]
            # [keys], [S + 1], [S + 1]
            self.key_index, self.cumulative_queries, self.cumulative_keys = upload(whole, device)
            self.longest_query = int(lengths.max())
            return
        self.segments, self.head, self.place = (starts, lengths, prefix_starts, prefix_lengths), head, (device, dtype)
        self.groups = attention_loops.groups_of(*self.segments, head)

    @cached_property
    def tiles(self) -> list[tuple[Tile, np.ndarray]]:
        """With the place in the row of each of their queries, -1 for padding.

        A head sees nothing before itself, prompts see it, completions a prompt too: a tile of each keeps a long prompt
        from padding short completions.
        """
        starts, lengths, prefix_starts, prefix_lengths = self.segments
        device, dtype = self.place
        tiles = []
        for first, with_prefix in ((True, False), (False, False), (False, True)):
            chosen = np.flatnonzero(((starts < self.head) == first) & ((prefix_lengths > 0) == with_prefix))
            if len(chosen):
                tile, rows = build_tile(
                    starts[chosen],
                    lengths[chosen],
                    prefix_starts[chosen],
                    prefix_lengths[chosen],
                    0 if first else self.head,
                )
                there = {name: getattr(tile, name).to(device) for name in ("query_index", "key_index")}
                tiles.append((replace(tile, **there, mask=tile.mask.to(device, dtype)), rows))
        return tiles

    @cached_property
    def output_index(self) -> Tensor:
        """[T] where each token's output lies among those of the tiles."""
        rows = np.concatenate([rows for _, rows in self.tiles])  # [tile rows]
        real = np.flatnonzero(rows >= 0)
        output_index = np.empty(len(real), dtype=np.int64)
        output_index[rows[real]] = real
        return torch.from_numpy(output_index).to(self.place[0])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D]."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
        if self.use_varlen:
            return self.attend_varlen(query, key, value, scaling)[None]
        if attention_loops.applies(query, key, value):
            return attention_loops.LoopPackedAttention.apply(query, key, value, self.groups, scaling)[None]
        outputs = []
        for tile, _ in self.tiles:
            tiled_query, tiled_key, tiled_value = (
                x.index_select(0, index).unflatten(0, (tile.segments, -1)).transpose(1, 2)
                for x, index in ((query, tile.query_index), (key, tile.key_index), (value, tile.key_index))
            )  # [S, heads, L or K, D]
            grouped = query.shape[1] != key.shape[1]
            if cpu_attention.applies(tiled_query, tiled_key):
                output = cpu_attention.attend(tiled_query, tiled_key, tiled_value, tile.mask, scaling)
            else:
                output = scaled_dot_product_attention(
                    tiled_query, tiled_key, tiled_value, attn_mask=tile.mask, scale=scaling, enable_gqa=grouped
                )
            outputs.append(output.transpose(1, 2).flatten(0, 1))  # [S * L, H, D]
        return torch.cat(outputs).index_select(0, self.output_index)[None]

    def attend_varlen(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """CUDA: every segment's queries against what is before it and itself, causal aligned to the bottom right."""
        key, value = key.index_select(0, self.key_index), value.index_select(0, self.key_index)  # [keys, Hkv, D]
        options = {"enable_gqa": True} if VARLEN_HAS_GQA else {}
        if not VARLEN_HAS_GQA and query.shape[1] != key.shape[1]:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return varlen_attn(
            query.contiguous(),
            key,
            value,
            self.cumulative_queries,
            self.cumulative_keys,
            self.longest_query,
            self.longest,
            scale=scaling,
            window_size=(-1, 0),
            **options,
        )


def cumulative(lengths: np.ndarray) -> Tensor:
    """[0, l0, l0 + l1, ...] as int32."""
    return torch.from_numpy(np.r_[0, np.cumsum(lengths)].astype(np.int32))


def build_tile(starts, lengths, prefix_starts, prefix_lengths, head: int) -> tuple[Tile, np.ndarray]:
    """The tile of these segments, and the place in the row of each of its S * L query rows (-1 for padding).

    P is head and prefix together.
    """
    width, prefix_width = int(lengths.max()), head + int(prefix_lengths.max())
    prefix_lengths, prefix_starts = head + prefix_lengths, prefix_starts - head
    own = np.arange(width)[None]  # [1, L]
    before = np.arange(prefix_width)[None]  # [1, P]
    queries = starts[:, None] + np.minimum(own, lengths[:, None] - 1)  # [S, L] padding repeats the last token
    prefix = prefix_starts[:, None] + np.minimum(before, np.maximum(prefix_lengths[:, None] - 1, 0))  # [S, P]
    prefix[:, :head] = before[:, :head]
    rows = np.where(own < lengths[:, None], queries, -1)
    sees_prefix = np.broadcast_to((before < prefix_lengths[:, None])[:, None], (len(starts), width, prefix_width))
    sees_own = np.broadcast_to(own[:, None] <= own[:, :, None], (len(starts), width, width))  # causal
    visible = torch.from_numpy(np.concatenate([sees_prefix, sees_own], axis=2))[:, None]  # [S, 1, L, P + L]
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    keys = np.concatenate([prefix, queries], axis=1)  # [S, P + L]
    return Tile(torch.from_numpy(queries.ravel()), torch.from_numpy(keys.ravel()), mask, len(starts)), rows.ravel()


def grpo_packed_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    attention_plan=None,
    **extras,
):
    """What transformers calls in every layer. The plan travels as a keyword of model(...) and knows who sees whom."""
    if attention_plan is None:
        raise ValueError(f"{ATTENTION_NAME} needs attention_plan=...; call the model through src.engine")
    for name in ("softcap", "s_aux"):
        if extras.get(name) is not None:
            raise NotImplementedError(f"this model's attention uses {name}, which {ATTENTION_NAME} does not compute")
    if sliding_window is not None and attention_plan.longest > sliding_window:
        raise NotImplementedError(
            f"this model attends to {sliding_window} tokens, but sequences have up to {attention_plan.longest}; "
            f"lower max_prompt_len + max_gen_len"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_plan.attend(module.layer_idx, query, key, value, scaling), None


class ProbeAttention(PackedAttention):
    """Notes which layers call the attention function, for sequences as long as they may become."""

    def __init__(self, longest: int, device, dtype):
        start, length = np.array([0]), np.array([2])
        super().__init__(start, length, start, start, device, dtype)
        self.longest = longest
        self.layers: set[int] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.layers.add(layer)
        return super().attend(layer, query, key, value, scaling)


@torch.no_grad()
def check_attention(model, longest: int) -> None:
    """ConfigError unless every layer mixes tokens through this file's attention alone.

    A recurrent or convolutional layer would see a packed row as one text, and leak between completions.
    """
    probe = ProbeAttention(longest, model.device, model.dtype)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    name = model.config.model_type
    try:
        model.get_decoder()(
            input_ids=ids,
            position_ids=torch.arange(2, device=model.device)[None],
            use_cache=False,
            attention_plan=probe,
        )
    except (NotImplementedError, AttributeError, TypeError) as error:
        raise ConfigError(f"models of type {name} cannot be used: {error}") from error
    if len(probe.layers) != model.config.get_text_config().num_hidden_layers:
        raise ConfigError(
            f"models of type {name} cannot be used: only {len(probe.layers)} of their layers are attention that can be "
            f"packed, and other layers would mix the completions of a row"
        )


AttentionInterface.register(ATTENTION_NAME, grpo_packed_attention)
