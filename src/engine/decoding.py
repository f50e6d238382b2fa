"""Attention of a decode step, in two layouts of its key-value cache; cpu_layers.py has a third, for loops of C.

GroupedAttention, or MergedAttention in bf16 on a CPU, keeps a prompt's keys once for all of its completions.
JoinedAttention keeps prompt and completion of a slot side by side: more memory, but a few operations, whose shapes are
a number of slots and a width and nothing else. That is what a CUDA graph needs (cuda_decoding.py), and on a CPU it is
faster for the last few completions of a prompt.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FEW = 2  # live completions a prompt, from which a CPU joins them: the attention of so few is 1.6 to 3 times as fast


def cache_shape(model) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of the model."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads or config.num_attention_heads, head_dim


def as_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden [rows, width] -> [rows, 1, 1, width], -inf where it is true."""
    return torch.zeros(hidden.shape, device=hidden.device, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None, None]


class SlotCache:
    """Keys and values by slot, and those of the prompts [layers, prompts, Hkv, P, D] with their lengths [prompts]."""

    token_major = False  # whether in memory a slot is [width, Hkv, D] and not [Hkv, width, D]
    moves_freely = False  # whether slots move without a copy, and looking at them waits for nothing

    def __init__(self, prompt: tuple[Tensor, Tensor, np.ndarray], slots: int, width: int):
        self.renew(prompt)
        layers, _, kv_heads, _, head_dim = self.prompt_keys.shape
        # zeros: a place that is masked must still be finite, NaN from old memory would survive the mask
        inner = (width, kv_heads) if self.token_major else (kv_heads, width)
        parts = [[self.prompt_keys.new_zeros(slots, *inner, head_dim) for _ in range(layers)] for _ in range(2)]
        # each [slots, Hkv, width, D]
        self.keys, self.values = ([x.transpose(1, 2) if self.token_major else x for x in part] for part in parts)
        self.capacity = width
        self.width = 0  # places that a step reads
        self.reach = 0  # places that have ever been read or written
        self.device, self.dtype = self.prompt_keys.device, self.prompt_keys.dtype

    def renew(self, prompt: tuple) -> None:
        """Other prompts for the same slots."""
        self.prompt_keys, self.prompt_values, self.prompt_lengths = prompt

    def move(self, keep: Tensor) -> None:
        """Bring the kept slots to the front, as far as a slot before them may have left something."""
        for part in (*self.keys, *self.values):  # layer by layer: the copy in between stays small
            part[: len(keep), :, : self.reach] = part[keep, :, : self.reach]

    def start(self, slots: Tensor, prompts: Tensor) -> None:
        """Zeros for the next episodes: NaN that an episode has left would survive the mask."""
        for part in (*self.keys, *self.values):
            part[:, :, : self.reach].index_fill_(0, slots, 0)  # `[slots] = 0` would copy the 0 to the device, and wait


class GroupedAttention(SlotCache):
    """Attention of one decode step: each slot's query against its prompt's keys and its own.

    The slots of each of the A live prompts are gathered, up to M of them and slot 0 in the places left over, so that a
    prompt's keys are multiplied once with the queries of all of its completions.
    """

    def __init__(self, prompt: tuple[Tensor, Tensor, np.ndarray], slots: int, width: int):
        super().__init__(prompt, slots, width)
        self.longest = int(self.prompt_lengths.max()) + width  # no sequence grows longer

    def arrange(self, prompt_rows: np.ndarray, lengths: np.ndarray, ended: np.ndarray) -> None:
        """Group the slots by prompt. Of each [n]: its prompt, own tokens in the cache, and whether it has ended."""
        self.width = int(lengths[~ended].max())
        self.uniform = len(np.unique(lengths[~ended])) == 1  # all live slots have the same own length
        prompts, member, counts = np.unique(prompt_rows, return_inverse=True, return_counts=True)
        self.live, self.most, heads = len(prompts), int(counts.max()), self.prompt_keys.shape[2]
        order = np.argsort(member, kind="stable")  # slots, prompt by prompt
        rank = np.empty_like(order)  # each slot's place among those of its prompt
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        table = np.zeros((len(prompts), self.most), dtype=np.int64)
        table[member, rank] = np.arange(len(order))  # [A, M]
        head = np.arange(heads)
        to_table = table[:, None] * heads + head[None, :, None]  # [A, Hkv, M]
        from_table = (member[:, None] * heads + head) * self.most + rank[:, None]  # [n, Hkv]
        self.to_table, self.from_table = (torch.from_numpy(x.ravel()).to(self.device) for x in (to_table, from_table))
        of_prompts = self.prompt_lengths[prompts]
        width = int(of_prompts.max())
        all_of_them = len(prompts) == self.prompt_keys.shape[1]
        chosen = torch.from_numpy(prompts).to(self.device)
        self.live_keys, self.live_values = (
            (part if all_of_them else part.index_select(1, chosen))[..., :width, :].contiguous()
            for part in (self.prompt_keys, self.prompt_values)
        )  # [layers, A, Hkv, P, D]
        hidden = np.arange(width)[None] >= self.prompt_lengths[prompt_rows][:, None]  # [n, P]
        self.ragged = bool(hidden.any())  # some live prompts are shorter than others
        self.prompt_mask = as_mask(torch.from_numpy(hidden).to(self.device), self.dtype)

    def begin_block(self, steps: int) -> None:
        """The width grows with every step."""

    def begin_step(self, lengths: Tensor, positions: Tensor) -> None:
        """lengths [n]: own tokens already in the cache; this step's goes to that place."""
        self.width = min(self.width + 1, self.capacity)
        self.reach = max(self.reach, self.width)
        self.lengths = lengths.clamp(max=self.width - 1)  # a slot that ended keeps overwriting the last place
        self.slots = torch.arange(len(lengths), device=self.device)
        self.mask = None
        if self.ragged or not self.uniform:
            hidden = torch.arange(self.width, device=self.device)[None] > self.lengths[:, None]  # [n, T]
            self.mask = torch.cat([self.prompt_mask, as_mask(hidden, self.dtype)], dim=-1)  # [n, 1, 1, P + T]

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [n, Hkv, 1, D] of this step; the slots' own up to here, [n, Hkv, T, D]."""
        n = len(key)
        # in lockstep all write to the same place: a slice, which is faster than an index
        place = (slice(n), slice(None), self.width - 1) if self.uniform else (self.slots, slice(None), self.lengths)
        self.keys[layer][place], self.values[layer][place] = key[:, :, 0], value[:, :, 0]
        return self.keys[layer][:n, :, : self.width], self.values[layer][:n, :, : self.width]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [n, H, 1, D], key and value [n, Hkv, 1, D] -> [n, 1, H, D]."""
        n, kv_heads = key.shape[:2]
        keys, values = self.store(layer, key, value)
        query = (query * scaling).reshape(n, kv_heads, -1, query.shape[-1])  # [n, Hkv, R, D]
        of_prompt = self.by_prompt(query) @ self.live_keys[layer].transpose(-1, -2)  # [A, Hkv, M * R, P]
        own = query @ keys.transpose(-1, -2)  # [n, Hkv, R, T]
        scores = torch.cat([self.by_slot(of_prompt), own], dim=-1)  # [n, Hkv, R, P + T]
        if self.mask is not None:
            scores += self.mask
        weights = scores.softmax(-1)  # computed in fp32, also from bf16
        longest = of_prompt.shape[-1]
        output = weights[..., longest:] @ values  # [n, Hkv, R, D]
        output += self.by_slot(self.by_prompt(weights)[..., :longest] @ self.live_values[layer])
        return output.flatten(1, 2)[:, None]

    def by_prompt(self, x: Tensor) -> Tensor:
        """[n, Hkv, R, d] -> [A, Hkv, M * R, d]."""
        return x.flatten(0, 1).index_select(0, self.to_table).view(self.live, x.shape[1], -1, x.shape[3])

    def by_slot(self, x: Tensor) -> Tensor:
        """[A, Hkv, M * R, d] -> [n, Hkv, R, d]."""
        rows = x.reshape(-1, x.shape[2] // self.most, x.shape[3])  # [A * Hkv * M, R, d]
        return rows.index_select(0, self.from_table).view(-1, x.shape[1], *rows.shape[1:])


class MergedAttention(GroupedAttention):
    """The same in bf16 on a CPU: a prompt's part and a slot's own by flash attention, merged by their weights' sums.

    It reads keys where they lie: a fifth faster than products of slices, and with a smaller error.
    """

    def arrange(self, prompt_rows: np.ndarray, lengths: np.ndarray, ended: np.ndarray) -> None:
        """Group the slots by prompt. Of each [n]: its prompt, own tokens in the cache, and whether it has ended."""
        super().arrange(prompt_rows, lengths, ended)
        first = torch.from_numpy(np.unique(prompt_rows, return_index=True)[1])  # [A] a slot of each prompt
        self.live_mask = self.prompt_mask[first] if self.ragged else None  # [A, 1, 1, P]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [n, H, 1, D], key and value [n, Hkv, 1, D] -> [n, 1, H, D]."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # output, and logarithms of the sums
        keys, values = self.store(layer, key, value)
        query = query.reshape(len(key), key.shape[1], -1, query.shape[-1])  # [n, Hkv, R, D]
        mask = None if self.uniform else self.mask[..., -self.width :]  # type: ignore[index]  # [n, 1, 1, T]
        own, sums = flash(query, keys, values, 0.0, False, attn_mask=mask, scale=scaling)  # [n, Hkv, R, D], [n, Hkv, R]
        of_prompt, prompt_sums = flash(
            self.by_prompt(query), self.live_keys[layer], self.live_values[layer], 0.0, False,
            attn_mask=self.live_mask, scale=scaling,
        )  # [A, Hkv, M * R, D], [A, Hkv, M * R]  # fmt: skip
        share = (self.by_slot(prompt_sums[..., None]) - sums[..., None]).sigmoid_().to(own.dtype)  # [n, Hkv, R, 1]
        return torch.lerp(own, self.by_slot(of_prompt), share).flatten(1, 2)[:, None]


class JoinedAttention(SlotCache):
    """The same attention with prompt and completion side by side: a token's place in its slot is its position."""

    width_step = 1  # the width is a multiple of it

    def __init__(self, prompt: tuple[Tensor, Tensor, np.ndarray], slots: int, width: int):
        self.longest = prompt[0].shape[3] + width
        # a multiple: else rounding would depend on the longest of the prompts that it was made for
        super().__init__(prompt, slots, -(-self.longest // self.width_step) * self.width_step)

    def start(self, slots: Tensor, prompts: Tensor) -> None:
        """The prompts [s] of the next episodes, and zeros behind them."""
        super().start(slots, prompts)
        longest = self.prompt_keys.shape[3]
        for parts, sources in ((self.keys, self.prompt_keys), (self.values, self.prompt_values)):
            for part, source in zip(parts, sources, strict=True):
                part[slots, :, :longest] = source[prompts]
        self.reach = max(self.reach, longest)

    def arrange(self, prompt_rows: np.ndarray, lengths: np.ndarray, ended: np.ndarray) -> None:
        """Of each slot [n]: its prompt, own tokens in the cache, and whether it has ended."""
        self.filled = int((self.prompt_lengths[prompt_rows] + lengths)[~ended].max())  # places of the longest

    def begin_block(self, steps: int) -> None:
        """One width for all of these steps."""
        self.filled += steps
        self.width = min(-(-self.filled // self.width_step) * self.width_step, self.capacity)
        self.reach = max(self.reach, self.width)

    def begin_step(self, lengths: Tensor, positions: Tensor) -> None:
        """positions [n]: tokens already in the cache, the prompt's included; this step's goes to that place."""
        self.places = positions.clamp(max=self.width - 1)  # a slot that ended keeps overwriting the last place
        self.slots = torch.arange(len(positions), device=self.device)
        hidden = torch.arange(self.width, device=self.device)[None] > self.places[:, None]  # [n, T]
        self.mask = as_mask(hidden, self.dtype)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [n, H, 1, D], key and value [n, Hkv, 1, D] of this step, which are written down -> [n, 1, H, D]."""
        place = (self.slots, slice(None), self.places)
        self.keys[layer][place], self.values[layer][place] = key[:, :, 0], value[:, :, 0]
        return self.read(layer, query.unflatten(1, (key.shape[1], -1))[:, :, :, 0], scaling)

    def so_far(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all places up to here, [n, Hkv, T, D]."""
        return self.keys[layer][:rows, :, : self.width], self.values[layer][:rows, :, : self.width]

    def read(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """query [n, Hkv, R, D] -> [n, 1, H, D]."""
        keys, values = self.so_far(layer, len(query))
        output = scaled_dot_product_attention(query, keys, values, self.mask, scale=scaling)  # [n, Hkv, R, D]
        return output.flatten(1, 2)[:, None]


def join(grouped: GroupedAttention, prompt_rows: np.ndarray, lengths: np.ndarray) -> JoinedAttention:
    """The same cache in the joined layout; the grouped one is taken apart on the way, so that no memory is added."""
    slots, device = len(prompt_rows), grouped.device
    prompt = (grouped.prompt_keys, grouped.prompt_values, grouped.prompt_lengths)
    joined = JoinedAttention(prompt, 0, grouped.capacity)
    starts = torch.from_numpy(grouped.prompt_lengths[prompt_rows]).to(device)  # [n]
    places = starts[:, None] + torch.arange(grouped.width, device=device)  # [n, T]
    rows, chosen = torch.arange(slots, device=device)[:, None], torch.from_numpy(prompt_rows).to(device)
    for old, new, source in (
        (grouped.keys, joined.keys, joined.prompt_keys),
        (grouped.values, joined.values, joined.prompt_values),
    ):
        for layer, of_prompts in enumerate(source):
            part = of_prompts.new_zeros(slots, of_prompts.shape[1], joined.capacity, of_prompts.shape[3])
            part[:, :, : source.shape[3]] = of_prompts[chosen]
            own = old[layer][:slots, :, : grouped.width]  # [n, Hkv, T, D]
            part.transpose(1, 2)[rows, places] = own.transpose(1, 2)
            old[layer], new[layer] = torch.empty(0), part
    joined.reach = joined.capacity
    return joined
