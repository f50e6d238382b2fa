"""Decode the completions of many prompts at once, with the training weights, in process.

Every prompt is prefilled once (prefill.py). Completions then decode together in slots of a preallocated key-value
cache; a finished one gives its slot to the next waiting one, and when none waits the live ones move together, so that
the dead are not decoded. decoding.py has the cache in two layouts, layers.py the layers; on a GPU a step is a CUDA
graph (cuda_decoding.py), which stays for the next rollout where there is memory (room.py).
Between two turns of an episode (turns.py) a slot reads what it is told, token by token, beside those that write.
A completion does not depend on its neighbours, on its slot or on how many slots there are (token_choice.py). The
model's own generation_config is not read, but for the end tokens.
Not here: paged caches, speculative decoding.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from src.config import ConfigError
from src.engine.cpu_weights import in_order_of_the_processor
from src.engine.cuda_decoding import Layout, StepRunner, layout_for, own_stream
from src.engine.decoding import FEW, GroupedAttention, join
from src.engine.ending import PLAIN, cut_episodes
from src.engine.layers import layers_for
from src.engine.memory import free_memory
from src.engine.prefill import prefill
from src.engine.profiling import phase
from src.engine.room import Kept, fit_to_memory
from src.engine.scoring import head_logits
from src.engine.token_choice import SamplingSettings, episode_key
from src.engine.token_loops import token_chooser
from src.engine.turns import Turns
from src.records import Episode, Group, Problem

logger = logging.getLogger("grpo")

SYNC_EVERY = 4  # decode steps between looks at which completions have ended, where a look waits for a device
ATTEMPTS = 3  # at a prompt whose logits are not finite, before it is left out


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
        self.model, self.tokenizer, self.samples = model, tokenizer, samples
        device, total = model.device, len(problems) * samples
        self.prompt_hidden, prompt = prefill(model, problems)
        self.slots = min(slots, total)
        self.attention: Layout = layout_for(model)(prompt, self.slots, settings.width)
        self.layers, self.choose_tokens = layers_for(model), token_chooser(model, settings)
        self.runner = StepRunner(device)
        self.eos = torch.tensor(settings.eos_ids, device=device)
        # changed in place, for the graphs; a column more than needed: ended slots keep writing there until a look
        self.tokens = torch.zeros(total, settings.width + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(total, settings.width + 1, device=device)
        self.prompt_lengths = torch.zeros(len(problems), dtype=torch.long, device=device)
        # of each episode [episodes]: its random stream, where the turn that it is in begins, and where it ends
        self.episode_keys, self.begins, self.limits = torch.zeros(3, total, dtype=torch.long, device=device)
        # of each slot [slots]: its episode, own tokens in the cache, and last token
        self.episodes, self.lengths, self.current = torch.zeros(3, self.slots, dtype=torch.long, device=device)
        self.ended = torch.ones(self.slots, dtype=torch.bool, device=device)  # [slots] nothing left to decode
        self.begin(problems, settings, draws, prompt[2])

    def begin(self, problems: Sequence[Problem], settings: SamplingSettings, draws, prompt_lengths: np.ndarray) -> None:
        """Nothing is written yet."""
        self.settings, self.total = settings, len(problems) * self.samples
        self.rows = min(self.slots, self.total)  # the slots that are decoded, the first of them all
        self.waiting = 0  # the next episode to start
        self.moved = False  # the attention does not know yet what is in which slot
        keys = [
            episode_key(settings.seed, settings.stream, problem.index, sample + draw * self.samples)
            for problem, draw in zip(problems, draws or [0] * len(problems), strict=True)
            for sample in range(self.samples)
        ]
        self.episode_keys[: self.total] = torch.tensor(keys, device=self.episode_keys.device)
        self.prompt_lengths[: len(problems)] = torch.from_numpy(prompt_lengths).to(self.prompt_lengths.device)
        for state in (self.tokens, self.logprobs, self.begins, self.episodes, self.lengths, self.current):
            state.zero_()
        self.ended.fill_(True)
        self.turns: Turns | None = None
        if settings.reply is not None:
            positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            each = [problem for problem in problems for _ in range(self.samples)]
            self.turns = Turns(self.tokenizer, each, settings, positions)
            limits = [state.limit for state in self.turns.states]
            self.limits[: self.total] = torch.tensor(limits, device=self.limits.device)

    def serves(self, problems: Sequence[Problem], samples: int, settings: SamplingSettings) -> bool:
        """Whether its steps are those of another rollout, and its places enough."""
        alike = replace(settings, seed=self.settings.seed, stream=self.settings.stream) == self.settings
        longest = max(len(problem.prompt_ids) for problem in problems) + settings.width
        fits = len(problems) * samples <= len(self.tokens) and longest <= self.attention.capacity
        return alike and fits and samples == self.samples and self.layers is layers_for(self.model)

    def again(self, problems: Sequence[Problem], settings: SamplingSettings, draws) -> None:
        """For a rollout that it `serves`, with the graphs that there are."""
        self.prompt_hidden, prompt = prefill(self.model, problems)
        self.attention.renew(prompt)
        self.begin(problems, settings, draws, prompt[2])

    def rest(self) -> None:
        """Let go of the prompts."""
        del self.prompt_hidden
        self.attention.renew((None, None, None))

    @phase("head and sampling")
    def choose(self, hidden: Tensor, slots: Tensor | slice) -> None:
        """Sample the next token of these slots from hidden [s, hidden] and write it down."""
        logits = head_logits(self.model, hidden)  # [s, V]
        episodes, positions = self.episodes[slots], self.lengths[slots]
        tokens, logprobs = self.choose_tokens(logits, self.settings, self.episode_keys[episodes], positions)
        column = positions.clamp(max=self.settings.width)
        limits: Tensor | int = self.settings.max_new_tokens
        if self.turns is not None:  # before its turn begins an episode reads what it is told
            limits, is_told = self.limits[episodes], column < self.begins[episodes]
            tokens = torch.where(is_told, self.tokens[episodes, column], tokens)
        self.tokens[episodes, column] = tokens
        self.logprobs[episodes, column] = logprobs
        self.current[slots] = tokens
        is_end = (tokens[:, None] == self.eos).any(1)  # not isin, which waits for the device when there are many
        ended = is_end | ~logprobs.isfinite() | (positions + 1 >= limits)
        self.ended[slots] |= ended if self.turns is None else ended & ~is_told

    def start(self, slots: Tensor) -> None:
        """Put the next waiting episodes into these slots and sample their first tokens from the prompts."""
        episodes = torch.arange(self.waiting, self.waiting + len(slots), device=slots.device)
        self.attention.start(slots, episodes // self.samples)
        self.episodes[slots] = episodes
        self.waiting += len(slots)
        self.lengths.index_fill_(0, slots, 0)  # `[slots] = 0` would copy the 0 to the device, and wait
        self.ended.index_fill_(0, slots, False)
        if self.turns is not None:
            self.turns.start(episodes.tolist())
        self.choose(self.prompt_hidden[episodes // self.samples], slots)

    def look(self) -> Tensor:
        """Which slots have ended, on the host: here it waits for the device."""
        ended = self.ended[: self.rows].cpu()
        if self.settings.stop_strings and not ended.all():
            self.ended[self.stopped((~ended).nonzero()[:, 0])] = True
            ended = self.ended[: self.rows].cpu()
        return ended if self.turns is None else self.replied(ended, self.turns)

    def replied(self, ended: Tensor, turns: Turns) -> Tensor:
        """The ended slots without those that go on, told something: from the cached keys of what they have read."""
        occupied = self.episodes[: self.rows].tolist()
        slots = [slot for slot in ended.nonzero()[:, 0].tolist() if turns.states[occupied[slot]].is_open]
        places: list[tuple[int, int]] = []  # episode and column of every token that is told
        ids: list[int] = []
        going: list[tuple[int, ...]] = []
        rows = self.tokens[[occupied[slot] for slot in slots]].tolist() if slots else []
        for slot, row in zip(slots, rows, strict=True):
            episode = occupied[slot]
            found = turns.end_turn(episode, row)
            if found is not None:
                last, told = found
                state = turns.states[episode]
                places += [(episode, column) for column in range(last + 1, state.begin)]
                ids += told.token_ids
                going.append((slot, episode, last, row[last], state.begin, state.limit))
        if going:
            again, episodes, last, current, begins, limits = torch.tensor(going, device=self.tokens.device).T
            if places:
                rows_told, columns = torch.tensor(places, device=self.tokens.device).T
                self.tokens[rows_told, columns] = torch.tensor(ids, device=self.tokens.device)
            # the last token of a turn is in the row, not yet in the cache; what was sampled after it is overwritten
            self.lengths[again], self.current[again] = last, current
            self.begins[episodes], self.limits[episodes] = begins, limits
            self.ended.index_fill_(0, again, False)
            self.moved = True
            ended[[entry[0] for entry in going]] = False
        return ended

    def stopped(self, live: Tensor) -> list[int]:
        """Those of the live slots whose text contains a stop string, by the text of their last tokens."""
        stops = self.settings.stop_strings
        reach = SYNC_EVERY + max(len(stop.encode()) for stop in stops)  # a token is at least a byte
        slots = live.to(self.tokens.device)
        first = (self.lengths[slots] + 1 - reach).clamp(min=0)
        columns = first[:, None] + torch.arange(reach, device=first.device)  # [l, reach]
        written = columns <= self.lengths[slots, None]
        columns = columns.clamp(max=self.settings.width)
        tails = self.tokens[self.episodes[slots, None], columns].cpu().tolist()
        tails = [row[:count] for row, count in zip(tails, written.sum(1).tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(tails, **PLAIN)
        hits = [slot for slot, text in zip(live.tolist(), texts, strict=True) if any(stop in text for stop in stops)]
        full = {slot: self.turn_so_far(slot) for slot in hits}
        return [slot for slot in hits if any(stop in self.tokenizer.decode(full[slot], **PLAIN) for stop in stops)]

    def turn_so_far(self, slot: int) -> list[int]:
        """What is written in the turn that a slot is in."""
        episode = self.episodes[slot]
        begin = 0 if self.turns is None else self.begins[episode]
        return self.tokens[episode, begin : self.lengths[slot] + 1].tolist()

    def refill(self) -> bool:
        """Give free slots to waiting episodes, or bring the live ones together. False when nothing is left to do."""
        ended = self.look()
        while self.waiting < self.total and ended.any():  # an episode may end with its first token: look again
            self.start(ended.nonzero()[: self.total - self.waiting, 0].to(self.tokens.device))
            self.moved = True
            ended = self.look()
        live = len(ended) - int(ended.sum())
        if live == 0:
            return False
        rows = live if self.attention.moves_freely else self.runner.rows(live, self.rows)
        if rows < self.rows:
            # the live ones to the front; behind them, where a graph has more rows, slots that ended, as they are
            keep = ended.int().argsort(stable=True)[:rows].to(self.tokens.device)
            self.attention.move(keep)
            for state in (self.episodes, self.lengths, self.current, self.ended):
                state[:rows] = state[keep]
            self.rows = rows
            self.moved = True
        if self.moved:
            self.arrange(live)
        return True

    def arrange(self, live: int) -> None:
        """Tell the attention which slots it has now, in the joined layout when few are left and none waits."""
        self.moved = False
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
        hidden = self.layers(self.model, self.current[slots], positions, self.attention)  # [n, hidden]
        lengths += 1
        self.choose(hidden, slots)

    @phase("decode")
    def block(self) -> None:
        """The steps between two looks."""
        steps = 1 if self.attention.moves_freely and not self.settings.stop_strings else SYNC_EVERY
        self.attention.begin_block(steps)
        self.runner.run(self.step, (self.rows, self.attention.width), steps)

    def progress(self) -> float:
        """The share of the longest possible work that is done."""
        live = self.lengths[: self.rows][~self.ended[: self.rows]]
        finished = self.waiting - len(live)
        return (finished + float(live.sum()) / self.settings.width) / self.total

    def run(self, report: Callable[[Callable[[], float]], None] | None = None) -> list[Episode]:
        """Decode until every episode has ended."""
        device = self.model.device
        with in_order_of_the_processor(self.model, len(self.episodes), free_memory(device)), own_stream(device):
            while self.refill():
                if report is not None:
                    report(self.progress)  # which asks the device: whoever hears it decides whether to look
                self.block()
        written = self.tokens[: self.total, :-1], self.logprobs[: self.total, :-1]
        rows = written[0].cpu(), written[1].cpu()  # [episodes, width] junk after the end
        return cut_episodes(self.tokenizer, *rows, self.settings) if self.turns is None else self.turns.episodes(*rows)


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
    kept: Kept | None = None,
) -> list[Group]:
    """`samples` completions for each problem, in the order of the problems; `report` hears the share that is done, and
    may raise to leave it. `room`: slots and prompts at a time; None: what fits. `kept`: a decoder that may serve again.

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
            decoder = kept.take(model, chosen, samples, settings, slots) if kept else None
            if decoder is None:
                decoder = SlotDecoder(model, tokenizer, chosen, samples, slots, settings, numbers)
            else:
                decoder.again(chosen, settings, numbers)
            tell = report and partial(of_wave, report, start / len(missing), len(wave) / len(missing))
            episodes = decoder.run(tell)
            if kept:
                kept.put(decoder)
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
