"""Decode the completions of many prompts at once, with the training weights, in process.

Every prompt is prefilled once. Completions then decode together in slots of a preallocated key-value cache; a finished
one gives its slot to the next waiting one, and when none waits the live ones move together, so that the dead are not
decoded. decoding.py has the cache in two layouts; on a GPU a step is a CUDA graph (cuda_decoding.py).
A completion does not depend on its neighbours, on its slot or on how many slots there are (token_choice.py). The
model's own generation_config is not read, but for the end tokens.
Not here: paged caches, speculative decoding.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from src.config import ConfigError
from src.engine.attention import PackedAttention
from src.engine.cpu_weights import in_order_of_the_processor
from src.engine.cuda_decoding import StepRunner, layout_for, own_stream, uses_graphs
from src.engine.decoding import FEW, GroupedAttention, JoinedAttention, cache_shape, join
from src.engine.ending import PLAIN, cut_episodes
from src.engine.memory import free_memory
from src.engine.profiling import phase
from src.engine.scoring import head_logits
from src.engine.token_choice import SamplingSettings, choose_tokens, episode_key
from src.records import Group, Problem

logger = logging.getLogger("grpo")

SYNC_EVERY = 4  # decode steps between looks at which completions have ended (each look waits for the device)
PREFILL_TOKENS = 16384  # prompt tokens of one prefill pass
WAVE = 4  # prompts are prefilled for up to this many completions a slot at a time; the end of a wave decodes few
MEMORY_SHARE = 0.8  # of the free memory, for the caches; the rest is for activations
ATTEMPTS = 3  # at a prompt whose logits are not finite, before it is left out


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


def cache_bytes(model, prompt: int, new_tokens: int) -> tuple[int, int]:
    """Bytes of a slot, with its logits, and of a prompt: its keys, and where slots do not hold them the live copy."""
    per_token = 2 * math.prod(cache_shape(model)) * model.dtype.itemsize
    logits = 8 * model.config.get_text_config().vocab_size
    if uses_graphs(model.device):  # graphs have memory of their own for what a step computes
        return per_token * (prompt + new_tokens) + 2 * logits, per_token * prompt
    return per_token * new_tokens + logits, 2 * per_token * prompt


def fit_to_memory(model, problems: Sequence[Problem], samples: int, settings: SamplingSettings) -> tuple[int, int]:
    """Slots to decode in and prompts to prefill at a time, so that the caches fit into the free memory."""
    wanted = min(settings.slots, len(problems) * samples)
    longest = max(len(problem.prompt_ids) for problem in problems)
    slot, prompt = cache_bytes(model, longest, settings.max_new_tokens)
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

    def __init__(
        self,
        model,
        tokenizer,
        problems: Sequence[Problem],
        samples: int,
        slots: int,
        settings,
        draws: Sequence[int] | None = None,
    ):
        """`draws`: the how manieth time the same prompt is sampled from, for each problem; None: the first."""
        self.model, self.tokenizer, self.settings, self.samples = model, tokenizer, settings, samples
        self.prompt_hidden, prompt = prefill(model, problems)
        device = model.device
        self.total = total = len(problems) * samples
        self.rows = min(slots, total)  # the slots that are decoded, the first of them all
        self.attention: GroupedAttention | JoinedAttention = layout_for(model)(
            prompt, self.rows, settings.max_new_tokens
        )
        self.runner = StepRunner(device)
        episode_keys = [
            episode_key(settings.seed, settings.stream, problem.index, sample + draw * samples)
            for problem, draw in zip(problems, draws or [0] * len(problems), strict=True)
            for sample in range(samples)
        ]
        self.episode_keys = torch.tensor(episode_keys, device=device)  # [episodes]
        self.eos = torch.tensor(settings.eos_ids, device=device)
        # one column more than needed: slots that ended keep writing there until the next look
        self.tokens = torch.zeros(total, settings.max_new_tokens + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(total, settings.max_new_tokens + 1, device=device)
        self.prompt_lengths = torch.from_numpy(prompt[2]).to(device)
        self.waiting = 0  # the next episode to start
        # of each slot [slots]: its episode, own tokens in the cache, and last token; changed in place, for the graphs
        self.episodes, self.lengths, self.current = torch.zeros(3, self.rows, dtype=torch.long, device=device)
        self.ended = torch.ones(self.rows, dtype=torch.bool, device=device)  # [slots] nothing left to decode

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
        is_end = (tokens[:, None] == self.eos).any(1)  # not isin, which waits for the device when there are many
        self.ended[slots] |= is_end | ~logprobs.isfinite() | (positions + 1 >= self.settings.max_new_tokens)

    def start(self, slots: Tensor) -> None:
        """Put the next waiting episodes into these slots and sample their first tokens from the prompts."""
        episodes = torch.arange(self.waiting, self.waiting + len(slots), device=slots.device)
        self.attention.start(slots, episodes // self.samples)
        self.episodes[slots] = episodes
        self.waiting += len(slots)
        self.lengths[slots] = 0
        self.ended[slots] = False
        self.choose(self.prompt_hidden[episodes // self.samples], slots)

    def look(self) -> Tensor:
        """Which slots have ended, on the host: here it waits for the device."""
        ended = self.ended[: self.rows].cpu()
        if self.settings.stop_strings and not ended.all():
            self.ended[self.stopped((~ended).nonzero()[:, 0])] = True
            ended = self.ended[: self.rows].cpu()
        return ended

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
        ended = self.look()
        changed = False
        while self.waiting < self.total and ended.any():  # an episode may end with its first token: look again
            self.start(ended.nonzero()[: self.total - self.waiting, 0].to(self.tokens.device))
            changed = True
            ended = self.look()
        live = len(ended) - int(ended.sum())
        if live == 0:
            return False
        rows = self.runner.rows(live, self.rows)
        if rows < self.rows:
            # the live ones to the front; behind them, where a graph has more rows, slots that ended, as they are
            keep = ended.int().argsort(stable=True)[:rows].to(self.tokens.device)
            self.attention.move(keep)
            for state in (self.episodes, self.lengths, self.current, self.ended):
                state[:rows] = state[keep]
            self.rows = rows
            changed = True
        if changed:
            self.arrange(live)
        return True

    def arrange(self, live: int) -> None:
        """Tell the attention which slots it has now, in the joined layout when few are left and none waits."""
        state = torch.stack([self.episodes, self.lengths, self.ended.long()])[:, : self.rows].cpu().numpy()
        prompts, lengths, ended = state[0] // self.samples, state[1], state[2] > 0
        grouped = self.attention
        if isinstance(grouped, GroupedAttention) and self.waiting == self.total:
            fits = self.rows * grouped.longest <= len(grouped.keys[0]) * grouped.capacity
            if fits and live <= FEW * len(np.unique(prompts[~ended])):
                self.attention = join(grouped, prompts, lengths)
        self.attention.arrange(prompts, lengths, ended)

    def step(self) -> None:
        """One token for every slot. May be captured: no shape depends on the data, and nothing waits for the device."""
        slots = slice(self.rows)
        lengths = self.lengths[slots]  # [n]
        positions = self.prompt_lengths[self.episodes[slots] // self.samples] + lengths
        self.attention.begin_step(lengths, positions)
        hidden = (
            self.model.get_decoder()(
                input_ids=self.current[slots, None],
                position_ids=positions[:, None],
                use_cache=False,
                attention_plan=self.attention,
            ).last_hidden_state[:, 0]  # [n, hidden]
        )
        lengths += 1
        self.choose(hidden, slots)

    @phase("decode")
    def block(self) -> None:
        """SYNC_EVERY steps."""
        self.attention.begin_block(SYNC_EVERY)
        self.runner.run(self.step, (self.rows, self.attention.width), SYNC_EVERY)

    def progress(self) -> float:
        """The share of the longest possible work that is done."""
        live = self.lengths[: self.rows][~self.ended[: self.rows]]
        finished = self.waiting - len(live)
        return (finished + float(live.sum()) / self.settings.max_new_tokens) / self.total

    def run(self, report: Callable[[Callable[[], float]], None] | None = None) -> tuple[Tensor, Tensor]:
        """Decode until every episode has ended: tokens and log-probs [episodes, max_new_tokens], junk after the end."""
        device = self.model.device
        with in_order_of_the_processor(self.model, len(self.episodes), free_memory(device)), own_stream(device):
            while self.refill():
                if report is not None:
                    report(self.progress)  # which asks the device: whoever hears it decides whether to look
                self.block()
        return self.tokens[:, :-1].cpu(), self.logprobs[:, :-1].cpu()


def draw_numbers(problems: Sequence[Problem], seen: Counter[int]) -> list[int]:
    """0, 1, ... for the same prompt again: another draw, with random numbers of its own. Counts on in `seen`."""
    numbers = []
    for problem in problems:
        numbers.append(seen[problem.index])
        seen[problem.index] += 1
    return numbers


@torch.inference_mode()
def rollout(
    model,
    tokenizer,
    problems: Sequence[Problem],
    samples: int,
    settings: SamplingSettings,
    report: Callable[[Callable[[], float]], None] | None = None,
    draws: Sequence[int] | None = None,
    room: tuple[int, int] | None = None,
) -> list[Group]:
    """`samples` completions for each problem, in the order of the problems; `report` hears the share that is done, and
    may raise to leave it. `room`: slots and prompts at a time; None: what fits.

    A problem with an episode whose logits were not finite is sampled again with other random numbers, and left out when
    that does not help. ConfigError when none is left.
    """
    if not problems:  # one of many processes may have none
        return []
    draws = draw_numbers(problems, Counter()) if draws is None else draws
    slots, prompts = room or fit_to_memory(model, problems, samples, settings)
    groups: dict[int, Group] = {}
    missing = list(range(len(problems)))  # places in the list of problems
    for attempt in range(ATTEMPTS):
        for start in range(0, len(missing), prompts):
            wave = missing[start : start + prompts]
            chosen, numbers = [problems[place] for place in wave], [attempt + ATTEMPTS * draws[place] for place in wave]
            decoder = SlotDecoder(model, tokenizer, chosen, samples, slots, settings, numbers)
            tell = report and partial(of_wave, report, start / len(missing), len(wave) / len(missing))
            episodes = cut_episodes(tokenizer, *decoder.run(tell), settings)
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
            f"{len(missing)} of {len(problems)} prompts are left out: their logits were not finite in {ATTEMPTS} "
            f"attempts"
        )
    if not groups:
        raise ConfigError(
            "no prompt has finite logits: the weights are broken; lower training.learning_rate, or take another model"
        )
    return [groups[place] for place in sorted(groups)]


def of_wave(report: Callable, before: float, width: float, share: Callable[[], float]) -> None:
    """The share of all waves that is done, from that of one."""
    report(lambda: before + width * share())
