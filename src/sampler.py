"""Decode the completions of many prompts at once, with the training weights, in process.

Every prompt is prefilled once. Completions then decode together in slots of a preallocated key-value cache; a finished
one gives its slot to the next waiting one, and when none waits the live ones move together, so that the dead are not
decoded. A prompt's keys are read once for all of its completions, never copied per completion.
A completion does not depend on its neighbours, on its slot or on how many slots there are (src/token_choice.py). The
model's own generation_config is not read, but for the end tokens.
Not here: CUDA graphs, paged caches, speculative decoding. On a GPU every step launches its kernels one by one.
"""

import logging
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from src.config import ConfigError
from src.cpu_weights import in_order_of_the_processor
from src.packing import Episode, Group, PackedAttention
from src.profiling import phase
from src.rl_datasets import Problem
from src.scoring import head_logits
from src.token_choice import SamplingSettings, choose_tokens, episode_key

logger = logging.getLogger("grpo")

SYNC_EVERY = 4  # decode steps between looks at which completions have ended (each look waits for the device)
PREFILL_TOKENS = 16384  # prompt tokens of one prefill pass
WAVE = 4  # prompts are prefilled for up to this many completions a slot at a time; the end of a wave decodes few
PLAIN = {"skip_special_tokens": True}  # how tokens become the text that is graded
MEMORY_SHARE = 0.8  # of the free memory, for the caches; the rest is for activations


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


class DecodeAttention:
    """Attention of one decode step: each slot's query against its prompt's keys and its own.

    `table` [A, M] lists the slots of each live prompt (padded with slot 0), so that a prompt's keys are multiplied once
    with the queries of all of its completions.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, width: int, head_dim: int, prompt: tuple, like: Tensor):
        # zeros: a place that is masked must still be finite, NaN from old memory would survive the mask
        self.keys = like.new_zeros(layers, slots, kv_heads, width, head_dim)
        self.values = torch.zeros_like(self.keys)
        self.prompt_keys, self.prompt_values, self.prompt_lengths = prompt  # [layers, prompts, Hkv, P, D] and [prompts]
        self.width = 1  # widest own part among the slots, this step's token included
        self.uniform = True  # all slots have the same own length
        self.longest = int(self.prompt_lengths.max()) + width  # no sequence grows longer
        self.device = like.device
        # bf16 products on a CPU copy a key matrix that is a slice, transposed and slowly: copy it in order before
        self.dense_keys = like.device.type == "cpu" and like.dtype == torch.bfloat16

    def arrange(self, prompt_rows: np.ndarray) -> None:
        """Group the live slots by prompt. prompt_rows [n]: the prompt of each slot."""
        prompts, member, counts = np.unique(prompt_rows, return_inverse=True, return_counts=True)
        most = int(counts.max())
        order = np.argsort(member, kind="stable")  # slots, prompt by prompt
        rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = member[order] * most + rank  # each slot's place in the flat table
        table = np.zeros(len(prompts) * most, dtype=np.int64)
        table[place] = np.arange(len(place))
        self.live, self.most = len(prompts), most
        dense = len(table) == len(place) and (place == np.arange(len(place))).all()
        self.table = None if dense else torch.from_numpy(table).to(self.device)  # [A * M]
        self.place = None if dense else torch.from_numpy(place).to(self.device)  # [n]
        lengths = self.prompt_lengths[prompts]
        width = int(lengths.max())
        all_of_them = len(prompts) == self.prompt_keys.shape[1]
        chosen = torch.from_numpy(prompts).to(self.device)
        self.live_keys, self.live_values = (
            (cache if all_of_them else cache.index_select(1, chosen))[..., :width, :].contiguous()
            for cache in (self.prompt_keys, self.prompt_values)
        )  # [layers, A, Hkv, P, D]
        hidden = torch.from_numpy(np.arange(width)[None] >= lengths[:, None]).to(self.device)  # [A, P]
        self.prompt_mask = None
        if (lengths != width).any():
            self.prompt_mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)[
                :, None, None
            ]

    def begin_step(self, lengths: Tensor) -> None:
        """lengths [n]: own tokens already in the cache; this step's goes to that place."""
        self.lengths = lengths.clamp(max=self.keys.shape[3] - 1)  # a slot that ended keeps overwriting its last place
        self.slots = torch.arange(len(lengths), device=self.device)
        self.own_mask = None
        if not self.uniform:
            hidden = torch.arange(self.width, device=self.device)[None] > self.lengths[:, None]  # [n, T]
            self.own_mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)[
                :, None, None
            ]

    def to_table(self, x: Tensor) -> Tensor:
        """[n, Hkv, R, d] -> [A, Hkv, M * R, d]."""
        x = x if self.table is None else x.index_select(0, self.table)
        return x.unflatten(0, (self.live, self.most)).transpose(1, 2).flatten(2, 3)

    def from_table(self, x: Tensor) -> Tensor:
        """[A, Hkv, M * R, d] -> [n, Hkv, R, d]."""
        x = x.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.place is None else x.index_select(0, self.place)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [n, H, 1, D], key and value [n, Hkv, 1, D] -> [n, 1, H, D]."""
        n, kv_heads = key.shape[:2]
        # in lockstep all write to the same place: a slice, which is faster than an index
        place = (slice(n), slice(None), self.width - 1) if self.uniform else (self.slots, slice(None), self.lengths)
        self.keys[layer][place], self.values[layer][place] = key[:, :, 0], value[:, :, 0]
        keys, values = self.keys[layer][:n, :, : self.width], self.values[layer][:n, :, : self.width]  # [n,Hkv,T,D]
        keys = keys.contiguous() if self.dense_keys else keys
        query = (query * scaling).reshape(n, kv_heads, -1, query.shape[-1])  # [n, Hkv, R, D]
        of_prompt = self.to_table(query) @ self.live_keys[layer].transpose(-1, -2)  # [A, Hkv, M * R, P]
        own = query @ keys.transpose(-1, -2)  # [n, Hkv, R, T]
        if self.prompt_mask is not None:
            of_prompt = of_prompt + self.prompt_mask
        if self.own_mask is not None:
            own = own + self.own_mask
        weights = torch.cat([self.from_table(of_prompt), own], dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
        of_prompt, own = weights.split([of_prompt.shape[-1], own.shape[-1]], dim=-1)
        output = own @ values + self.from_table(self.to_table(of_prompt) @ self.live_values[layer])  # [n, Hkv, R, D]
        return output.flatten(1, 2)[:, None]

    def move(self, keep: Tensor) -> None:
        """Bring the kept slots to the front."""
        for cache in (*self.keys, *self.values):  # layer by layer: the copy in between stays small
            cache[: len(keep), :, : self.width] = cache[keep, :, : self.width]

    def clear(self, slots: Tensor) -> None:
        """Zeros for the next episodes: NaN that an episode has left would survive the mask."""
        for cache in (*self.keys, *self.values):
            cache[slots, :, : self.width] = 0


def cache_shape(model) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of the model."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads or config.num_attention_heads, head_dim


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, but free
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def fit_to_memory(model, problems: Sequence[Problem], samples: int, settings: SamplingSettings) -> tuple[int, int]:
    """Slots to decode in and prompts to prefill at a time, so that the caches fit into the free memory."""
    wanted = min(settings.slots, len(problems) * samples)
    per_token = 2 * math.prod(cache_shape(model)) * model.dtype.itemsize
    # twice: the cache of all prompts of a wave, and the copy of the live ones
    prompt = 2 * per_token * max(len(problem.prompt_ids) for problem in problems)
    logits = 8 * model.config.get_text_config().vocab_size
    slot = per_token * settings.max_new_tokens + logits
    free = free_memory(model.device)
    room = MEMORY_SHARE * free - prompt  # one prompt must fit in any case
    slots = min(wanted, int(room // (slot + prompt / samples)))  # with a slot comes its share of a prompt
    need = (prompt + slot) / 2**30
    if slots < 1:
        raise ConfigError(
            f"the key-value cache of one completion needs {need:.2f} GiB, but only {free / 2**30:.2f} GiB are free; "
            f"lower training.max_gen_len or training.max_prompt_len, or take a smaller model"
        )
    if slots < wanted:
        logger.warning(
            f"decoding {slots} completions at once in place of {wanted}: a slot of the key-value cache takes "
            f"{slot / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free"
        )
    prompts = min(int(1 + (room - slots * slot) // prompt), max(1, WAVE * slots // samples), len(problems))
    return slots, prompts


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


class SlotDecoder:
    """The state of one generation: which episode sits in which slot, and what has been written so far."""

    def __init__(self, model, tokenizer, problems: Sequence[Problem], samples: int, slots: int, settings, attempt: int):
        self.model, self.tokenizer, self.settings, self.samples = model, tokenizer, settings, samples
        self.prompt_hidden, prompt = prefill(model, problems)
        keys, device = prompt[0], model.device
        self.total = total = len(problems) * samples
        slots = min(slots, total)
        self.attention = DecodeAttention(
            keys.shape[0], slots, keys.shape[2], settings.max_new_tokens, keys.shape[4], prompt, keys
        )
        episode_keys = [
            episode_key(settings.seed, settings.stream, problem.index, sample + attempt * samples)
            for problem in problems
            for sample in range(samples)
        ]
        self.episode_keys = torch.tensor(episode_keys, device=device)  # [episodes]
        self.eos = torch.tensor(settings.eos_ids, device=device)
        # one column more than needed: slots that ended keep writing there until the next look
        self.tokens = torch.zeros(total, settings.max_new_tokens + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(total, settings.max_new_tokens + 1, device=device)
        self.prompt_lengths = torch.from_numpy(prompt[2]).to(device)
        self.waiting = 0  # the next episode to start
        # of each slot [n]: its episode, own tokens in the cache, and last token
        self.episodes, self.lengths, self.current = torch.zeros(3, slots, dtype=torch.long, device=device)
        self.ended = torch.ones(slots, dtype=torch.bool, device=device)  # [n] nothing left to decode
        self.failed = torch.zeros(slots, dtype=torch.bool, device=device)  # [n] because its logits were not finite

    @phase("head and sampling")
    def choose(self, hidden: Tensor, slots: Tensor | slice) -> None:
        """Sample the next token of these slots from hidden [s, hidden] and write it down."""
        logits = head_logits(self.model, hidden)  # [s, V] fp32
        episodes, positions = self.episodes[slots], self.lengths[slots]
        tokens, logprobs = choose_tokens(logits, self.settings, self.episode_keys[episodes], positions)
        column = positions.clamp(max=self.settings.max_new_tokens)
        self.tokens[episodes, column] = tokens
        self.logprobs[episodes, column] = logprobs
        self.current[slots] = tokens
        failed = ~logprobs.isfinite()
        self.failed[slots] |= failed
        self.ended[slots] |= failed | torch.isin(tokens, self.eos) | (positions + 1 >= self.settings.max_new_tokens)

    def start(self, slots: Tensor) -> None:
        """Put the next waiting episodes into these slots and sample their first tokens from the prompts."""
        self.attention.clear(slots)
        self.episodes[slots] = torch.arange(self.waiting, self.waiting + len(slots), device=slots.device)
        self.waiting += len(slots)
        self.lengths[slots] = 0
        self.ended[slots] = self.failed[slots] = False
        self.choose(self.prompt_hidden[self.episodes[slots] // self.samples], slots)

    def look(self) -> tuple[Tensor, Tensor]:
        """Which slots have ended and which have failed, on the host: here it waits for the device."""
        ended, failed = torch.stack([self.ended, self.failed]).cpu()
        if self.settings.stop_strings and not ended.all():
            self.ended[self.stopped((~ended).nonzero()[:, 0])] = True
            ended = self.ended.cpu()
        return ended, failed

    def stopped(self, live: Tensor) -> list[int]:
        """Those of the live slots whose text contains a stop string, by the text of their last tokens."""
        stops = self.settings.stop_strings
        reach = SYNC_EVERY + max(len(stop.encode()) for stop in stops)  # a token is at least a byte
        slots = live.to(self.tokens.device)
        first = (self.lengths[slots] + 1 - reach).clamp(min=0)
        columns = first[:, None] + torch.arange(reach, device=first.device)  # [l, reach]
        written = columns <= self.lengths[slots, None]
        columns = columns.clamp(max=self.settings.max_new_tokens)
        tails = self.tokens[self.episodes[slots, None], columns].cpu().tolist()
        tails = [row[:count] for row, count in zip(tails, written.sum(1).tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(tails, **PLAIN)
        hits = [slot for slot, text in zip(live.tolist(), texts, strict=True) if any(stop in text for stop in stops)]
        full = {slot: self.tokens[self.episodes[slot], : self.lengths[slot] + 1].tolist() for slot in hits}
        return [slot for slot in hits if any(stop in self.tokenizer.decode(full[slot], **PLAIN) for stop in stops)]

    def refill(self) -> bool:
        """Give free slots to waiting episodes, or bring the live ones together. False when nothing is left to do."""
        attention = self.attention
        ended, failed = self.look()
        free = ended.nonzero()[:, 0]
        changed = False
        while len(free) and self.waiting < self.total:  # an episode may end with its first token: look again
            self.start(free[: self.total - self.waiting].to(self.tokens.device))
            changed = True
            ended, failed = self.look()
            free = ended.nonzero()[:, 0]
        if len(free) == len(ended):
            return False
        if len(free) * 8 >= len(ended) or failed.any():  # NaN must not stay in the cache
            keep = (~ended).nonzero()[:, 0].to(self.tokens.device)
            attention.move(keep)
            self.episodes, self.lengths, self.current, self.ended, self.failed = (
                state[keep] for state in (self.episodes, self.lengths, self.current, self.ended, self.failed)
            )
            changed = True
        if changed:
            lengths = self.lengths[~self.ended].cpu()
            attention.width = int(lengths.max()) + 1
            attention.uniform = bool((lengths == lengths[0]).all())
            attention.arrange((self.episodes // self.samples).cpu().numpy())
        return True

    @phase("decode")
    def step(self) -> None:
        """One token for every live slot."""
        attention = self.attention
        attention.begin_step(self.lengths)
        prompt_lengths = self.prompt_lengths[self.episodes // self.samples]
        hidden = (
            self.model.get_decoder()(
                input_ids=self.current[:, None],
                position_ids=(prompt_lengths + self.lengths)[:, None],
                use_cache=False,
                attention_plan=attention,
            ).last_hidden_state[:, 0]  # [n, hidden]
        )
        self.lengths += 1
        attention.width = min(attention.width + 1, attention.keys.shape[3])
        self.choose(hidden, slice(None))

    def run(self, check_stop: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        """Decode until every episode has ended: tokens and log-probs [episodes, max_new_tokens], junk after the end."""
        with in_order_of_the_processor(self.model, len(self.episodes), free_memory(self.model.device)):
            while self.refill():
                if check_stop is not None:
                    check_stop()
                for _ in range(SYNC_EVERY):
                    self.step()
        return self.tokens[:, :-1].cpu(), self.logprobs[:, :-1].cpu()


def cut_at_stop(tokenizer, token_ids: list[int], text: str, stops: tuple[str, ...]) -> tuple[list[int], str, bool]:
    """The tokens up to the one that completes a stop string, their text, and whether there was one."""

    def text_of(count: int) -> str:
        return tokenizer.decode(token_ids[:count], **PLAIN)

    if not any(stop in text for stop in stops):
        return token_ids, text, False
    counts = range(1, len(token_ids) + 1)
    count = 1 + bisect_left(counts, True, key=lambda count: any(stop in text_of(count) for stop in stops))
    return token_ids[:count], text_of(count), True


def cut_episodes(tokenizer, tokens: Tensor, logprobs: Tensor, settings: SamplingSettings) -> list[Episode]:
    """Rows of tokens and log-probs [episodes, max_new_tokens] -> episodes without what was written after their end."""
    is_end = torch.isin(tokens, torch.tensor(settings.eos_ids))
    finished = is_end.any(1)
    lengths = torch.where(finished, is_end.int().argmax(1) + 1, tokens.shape[1]).tolist()
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(rows, **PLAIN)
    episodes = []
    for row, text, scores, end in zip(rows, texts, logprobs.tolist(), finished.tolist(), strict=True):
        row, text, stopped = cut_at_stop(tokenizer, row, text, settings.stop_strings)
        episodes.append(Episode(tuple(row), tuple(scores[: len(row)]), end or stopped, text))
    return episodes


@torch.inference_mode()
def rollout(
    model, tokenizer, problems: Sequence[Problem], samples: int, settings: SamplingSettings, check_stop=None
) -> list[Group]:
    """`samples` completions for each problem, in the order of the problems; `check_stop` may raise to leave it.

    A problem with an episode whose logits were not finite is sampled again with other random numbers, and left out when
    that does not help. ConfigError when none is left.
    """
    if not problems:  # one of many processes may have none
        return []
    slots, prompts = fit_to_memory(model, problems, samples, settings)
    groups: dict[int, Group] = {}
    missing = list(range(len(problems)))  # places in the list of problems
    for attempt in range(settings.max_retry_rounds + 1):
        for start in range(0, len(missing), prompts):
            wave = missing[start : start + prompts]
            chosen = [problems[place] for place in wave]
            decoder = SlotDecoder(model, tokenizer, chosen, samples, slots, settings, attempt)
            episodes = cut_episodes(tokenizer, *decoder.run(check_stop), settings)
            del decoder  # its cache, before the next one is allocated
            for index, place in enumerate(wave):
                group = Group(problems[place], tuple(episodes[index * samples : (index + 1) * samples]))
                if all(math.isfinite(logprob) for episode in group.episodes for logprob in episode.logprobs):
                    groups[place] = group
        missing = [place for place in missing if place not in groups]
        if not missing:
            break
    if missing:
        logger.warning(
            f"{len(missing)} of {len(problems)} prompts are left out: their logits were not finite in "
            f"{settings.max_retry_rounds + 1} attempts"
        )
    if not groups:
        raise ConfigError(
            "no prompt has finite logits: the weights are broken; lower training.learning_rate, or take another model"
        )
    return [groups[place] for place in sorted(groups)]
