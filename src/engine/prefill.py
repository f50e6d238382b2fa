"""The prompts of a rollout, each read once: the keys and values that all of its completions look at."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from src.engine.attention import PackedAttention
from src.engine.decoding import cache_shape
from src.engine.profiling import phase
from src.records import Problem

PREFILL_TOKENS = 16384  # prompt tokens of one prefill pass


class PromptCache(PackedAttention):
    """Attention of the prefill pass: that of a packed row of prompts, and every layer's keys and values are kept."""

    def __init__(self, lengths: np.ndarray, first: int, keys: Tensor, values: Tensor):
        super().__init__(np.cumsum(lengths) - lengths, lengths, 0 * lengths, 0 * lengths, keys.device, keys.dtype)
        self.keys, self.values = keys, values  # [layers, prompts, Hkv, longest, D]
        rows = np.repeat(np.arange(first, first + len(lengths)), lengths)
        places = np.concatenate([np.arange(length) for length in lengths])
        self.rows, self.places = torch.from_numpy(rows).to(keys.device), torch.from_numpy(places).to(keys.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.keys[layer][self.rows, :, self.places] = key[0].transpose(0, 1)  # [tokens, Hkv, D]
        self.values[layer][self.rows, :, self.places] = value[0].transpose(0, 1)
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
        chunk = lengths[first : first + count]
        ids = [token for problem in problems[first : first + count] for token in problem.prompt_ids]
        hidden = model.get_decoder()(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in chunk])).to(device)[None],
            use_cache=False,
            attention_plan=PromptCache(chunk, first, keys, values),
        ).last_hidden_state[0]  # [tokens, hidden]
        last_hidden.append(hidden[torch.from_numpy(np.cumsum(chunk) - 1).to(device)])
        first += count
    return torch.cat(last_hidden), (keys, values, lengths)
