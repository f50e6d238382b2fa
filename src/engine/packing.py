"""Groups of completions -> one row of tokens without padding, and the cutting of an update into such rows.

A group lies in the row as [prompt | completion 1 | completion 2 | ...]; positions of each completion start again at
len(prompt). A completion attends to its prompt and to itself, never to its siblings, so a prompt is computed once. What
all prompts of a row begin with, a system message or solved examples, is its first segment and computed once too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.engine.attention import PackedAttention
from src.engine.profiling import phase
from src.engine.upload import upload
from src.records import Batch, Episode, Group

LEAST_HEAD = 16  # tokens that all prompts begin with, from which they are a segment of their own


@dataclass(frozen=True)
class Pass:
    """One forward pass: T tokens in a row, and the batch of those N among them that the policy wrote."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    attention_plan: PackedAttention
    predictor_index: Tensor  # [N] place in the row of the token whose output predicts this written token
    batch: Batch
    counts: bool = True  # False: without any weight, only to keep step with other processes (sharding.py)


def shared_head(prompts: Sequence[tuple[int, ...]]) -> int:
    """With how many same tokens all of several prompts begin, never a whole prompt; 0 where it is hardly any."""
    first, last = min(prompts), max(prompts)  # what they share all share
    differs = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    head = min(next(differs, len(first)), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    return head if head >= LEAST_HEAD else 0


def apart(groups: list[Group]) -> list[Group]:
    """The same by their size, with prompts that begin unlike the next one's: in a pass none is shortened by another."""
    ordered = sorted(groups, key=Group.tokens, reverse=True)
    first = [replace(g.problem, prompt_ids=(i % 2, *g.problem.prompt_ids[1:])) for i, g in enumerate(ordered)]
    return [replace(group, problem=problem) for group, problem in zip(ordered, first, strict=True)]


@phase("packing")
def pack(pieces: list[Group], device: torch.device | str, dtype: torch.dtype) -> Pass:
    """Lay groups (or parts of groups) end to end in one row."""
    predictors: list[int] = []
    targets: list[int] = []
    head = shared_head([piece.problem.prompt_ids for piece in pieces])
    ids = list(pieces[0].problem.prompt_ids[:head])
    positions = list(range(head))
    segments = [(0, head, 0, 0)] * bool(head)  # start, length, prefix start, prefix length
    for piece in pieces:
        prompt = piece.problem.prompt_ids[head:]
        prompt_start, begin = len(ids), head + len(prompt)
        segments.append((prompt_start, len(prompt), prompt_start, 0))
        ids.extend(prompt)
        positions.extend(range(head, begin))
        for episode in piece.episodes:
            start, length = len(ids), len(episode.token_ids)
            segments.append((start, length, prompt_start, len(prompt)))
            ids.extend(episode.token_ids)
            positions.extend(range(begin, begin + length))
            # the first token is predicted by the prompt's last, every other by the one before it
            before = [prompt_start + len(prompt) - 1, *range(start, start + length - 1)]
            predictors.extend(of_written(episode, before))
            targets.extend(of_written(episode, episode.token_ids))
    whole = [torch.tensor(row, dtype=torch.long) for row in ([ids], [positions], predictors, targets)]
    columns = columns_of(pieces)
    input_ids, position_ids, predictor_index, token_ids, *there = upload([*whole, *columns.values()], device)
    found: dict[str, Any] = {"sampled_logprobs": None, "old_logprobs": None}
    found |= dict(zip(columns, there, strict=True))
    starts, sizes, prefix_starts, prefix_sizes = np.array(segments).T
    plan = PackedAttention(starts, sizes, prefix_starts, prefix_sizes, device, dtype, head)
    return Pass(input_ids, position_ids, plan, predictor_index, Batch(token_ids=token_ids, groups=len(pieces), **found))


def columns_of(pieces: list[Group]) -> dict[str, Tensor]:
    """What a Batch has of its episodes; of log-probs those that there are."""
    episodes = [episode for piece in pieces for episode in piece.episodes]
    lengths = torch.tensor([episode.length for episode in episodes])  # [E]
    episode_index = torch.arange(len(episodes)).repeat_interleave(lengths)  # [N]

    def flat(rows: Iterable[tuple[float, ...] | None]) -> Tensor | None:
        """[N], or None where an episode has none."""
        filled = [row for row in rows if row]
        if 0 < len(filled) < len(episodes):
            raise ValueError("either each episode of a pass has log-probs and advantages, or none has")
        return torch.tensor([value for row in filled for value in row]) if filled else None

    optional = {
        "advantages": flat(episode.advantages for episode in episodes),
        "sampled_logprobs": flat(episode.logprobs for episode in episodes),
        "old_logprobs": flat(episode.old_logprobs for episode in episodes),
    }
    return {
        "episode_index": episode_index,
        "group_index": torch.tensor([index for index, piece in enumerate(pieces) for _ in piece.episodes]),
        "lengths": lengths,
        "weights": torch.tensor([float(episode.token_weight) for episode in episodes])[episode_index],
        "episode_weights": torch.tensor([float(episode.episode_weight) for episode in episodes]),
        "advantages": torch.zeros(len(episode_index)),
        "rewards": torch.tensor([float(episode.reward) for episode in episodes]),
    } | {name: column for name, column in optional.items() if column is not None}


def of_written(episode: Episode, values: Sequence[int]) -> Sequence[int]:
    """Those of one value a token that belong to written tokens."""
    return values if episode.written is None else list(compress(values, episode.written))


def split_into_microbatches(
    groups: list[Group], micro_batch_size: int, max_tokens: int | None = None, whole_groups: bool = False
) -> list[list[Group]]:
    """Cut groups into passes of at most micro_batch_size completions, or max_tokens tokens when that is given.

    Of the cuts into so few passes it is the one with the smallest passes: two that are half full take as long as a full
    one and an empty one, and less memory.
    """
    low, high = 0, max_tokens or micro_batch_size  # rooms that are too small, and large enough

    def passes(room: int) -> list[list[Group]]:
        return list(fill_microbatches(groups, room, max_tokens is not None, whole_groups))

    best = passes(high)
    while high - low > 1:
        middle = (low + high) // 2
        smaller = passes(middle)
        if len(smaller) <= len(best):
            best, high = smaller, middle
        else:
            low = middle
    return best


def fill_microbatches(groups: list[Group], room: int, count_tokens: bool, whole_groups: bool) -> Iterator[list[Group]]:
    """Fill one pass after the other with `room` completions or tokens, in order; more only where one does not fit.

    A group that is cut repeats its prompt; `whole_groups` forbids the cut (losses over a group need all of it).
    """
    batch: list[Group] = []
    used = 0
    for group in groups:
        prompt_cost = len(group.problem.prompt_ids) if count_tokens else 0
        costs = [len(episode.token_ids) if count_tokens else 1 for episode in group.episodes]
        if batch and whole_groups and used + prompt_cost + sum(costs) > room:
            yield batch
            batch, used = [], 0
        chosen: list[Episode] = []
        used += prompt_cost
        for episode, cost in zip(group.episodes, costs, strict=True):
            if (batch or chosen) and used + cost > room and not whole_groups:
                if chosen:
                    batch.append(replace(group, episodes=tuple(chosen)))
                yield batch
                batch, chosen, used = [], [], prompt_cost
            chosen.append(episode)
            used += cost
        if chosen:
            batch.append(replace(group, episodes=tuple(chosen)))
    if batch:
        yield batch
