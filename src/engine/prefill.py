"""The prompts of a rollout, each read once: the keys and values that all of its completions look at.

What all prompts of a pass begin with is read once for all of them, as in an update (packing.py).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from src.engine.attention import PackedAttention
from src.engine.decoding import cache_shape
from src.engine.packing import shared_head
from src.engine.profiling import phase
from src.records import Problem

PREFILL_TOKENS = 16384  # prompt tokens of one prefill pass


class PromptCache(PackedAttention):
    """Attention of the prefill pass: that of a packed row of prompts, and every layer's keys and values are kept."""

    def __init__(self, lengths: np.ndarray, head: int, keys: Tensor, values: Tensor):
        """lengths [n] of the prompts, of which the first `head` tokens are the same; keys, values of these prompts."""
        segments = np.array([head] * bool(head) + [*(lengths - head)])  # [S]
        starts, none = np.cumsum(segments) - segments, 0 * segments
        super().__init__(starts, segments, none, none, keys.device, keys.dtype, head)
        self.keys, self.values, self.head = keys, values, head  # [layers, n, Hkv, longest, D]
        rows = np.repeat(np.arange(len(lengths)), lengths - head)
        places = np.concatenate([np.arange(head, length) for length in lengths])
        self.rows, self.places = torch.from_numpy(rows).to(keys.device), torch.from_numpy(places).to(keys.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        for kept, new in ((self.keys[layer], key[0]), (self.values[layer], value[0])):  # new [Hkv, tokens, D]
            kept[:, :, : self.head] = new[:, : self.head]
            kept[self.rows, :, self.places] = new[:, self.head :].transpose(0, 1)
        return super().attend(layer, query, key, value, scaling)


@phase("prefill")
def prefill(model, problems: Sequence[Problem]) -> tuple[Tensor, tuple[Tensor, Tensor, np.ndarray]]:
    """Last hidden state of every prompt [prompts, hidden], and the prompts' keys, values and lengths."""
    layers, heads, head_dim = cache_shape(model)
    lengths = np.array([len(problem.prompt_ids) for problem in problems])
    device, dtype = model.device, model.dtype
    shape = (layers, len(problems), heads, int(lengths.max()), head_dim)
    keys, values = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
    last_hidden, first = [], 0
    while first < len(problems):
        count = max(1, int(np.searchsorted(np.cumsum(lengths[first:]), PREFILL_TOKENS, side="right")))
        chunk = slice(first, first + count)
        prompts = [problem.prompt_ids for problem in problems[chunk]]
        head = shared_head(prompts)
        ids = [*prompts[0][:head], *(token for prompt in prompts for token in prompt[head:])]
        places = np.concatenate([np.arange(head), *(np.arange(head, len(prompt)) for prompt in prompts)])  # [tokens]
        hidden = model.get_decoder()(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.from_numpy(places).to(device)[None],
            use_cache=False,
            attention_plan=PromptCache(lengths[chunk], head, keys[:, chunk], values[:, chunk]),
        ).last_hidden_state[0]  # [tokens, hidden]
        last_hidden.append(hidden[torch.from_numpy(head + np.cumsum(lengths[chunk] - head) - 1).to(device)])
        first += count
    return torch.cat(last_hidden), (keys, values, lengths)
