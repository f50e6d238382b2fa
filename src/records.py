"""What travels between engine, tasks and method. Every record is frozen: a changed one is made by `replace`.

N is a number of tokens that the policy wrote, E one of episodes. Nothing is padded, so there is no mask to forget.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, zip_longest

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A row of data with its prompt."""

    index: int  # position in its split: the sampler's random numbers are keyed by it
    prompt_ids: tuple[int, ...]
    prompt_text: str
    row: dict  # what the task grades an answer by


class Transcript(str):
    """An episode of several turns as one text: what the policy wrote in each, and what it was told after each."""

    turns: tuple[str, ...]
    told: tuple[str, ...]

    def __new__(cls, turns: Iterable[str], told: Iterable[str] = ()):
        turns, told = tuple(turns), tuple(told)
        text = super().__new__(cls, "".join(chain.from_iterable(zip_longest(turns, told, fillvalue=""))))
        text.turns, text.told = turns, told
        return text

    def __getnewargs__(self):
        return self.turns, self.told


@dataclass(frozen=True)
class Told:
    """What a task replies, as it is appended to an episode; `broken`: why it cannot."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    broken: str = ""


@dataclass(frozen=True)
class Episode:
    """What followed a prompt. The sampler fills the first block, the task the second, the method the third."""

    token_ids: tuple[int, ...]  # with the end-of-sequence token, if it came
    logprobs: tuple[float, ...]  # as sampled, of each written token; empty where the policy did not sample
    finished: bool
    text: str  # a Transcript, where there may be several turns
    written: tuple[bool, ...] | None = None  # which of token_ids the policy wrote and is trained on; None: all

    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    reward_errors: int = 0  # parts that are 0 because something went wrong
    rewards: tuple[tuple[float, float], ...] = ()  # weight and value of what the reward is the sum of
    broken: str = ""  # why its task could not reply: it is worth 0

    advantages: tuple[float, ...] = ()  # of each written token
    token_weight: float = 0.0  # weight of each written token in the loss: 1 / (denominator of the whole update)
    episode_weight: float = 0.0  # weight of the episode in the loss: 1 / (episodes of the whole update)
    old_logprobs: tuple[float, ...] | None = None  # of each written token, before the first of several updates
    entropies: tuple[float, ...] | None = None  # of each written token, when the old policy was scored

    @property
    def length(self) -> int:
        """How many tokens the policy wrote."""
        return len(self.token_ids) if self.written is None else sum(self.written)


@dataclass(frozen=True)
class Group:
    """The episodes of one prompt."""

    problem: Problem
    episodes: tuple[Episode, ...]

    def tokens(self) -> int:
        """Tokens of a packed row: the prompt's once, and those of all episodes."""
        return len(self.problem.prompt_ids) + sum(len(episode.token_ids) for episode in self.episodes)

    def varies(self) -> bool:
        """Whether its rewards differ by more than 1e-4 of the largest (and of rounding)."""
        rewards = [episode.reward for episode in self.episodes]
        return max(rewards) - min(rewards) > max(1e-4 * max(map(abs, rewards)), 1e-12)

    def teaches(self) -> bool:
        """Whether any token has an advantage."""
        return any(advantage != 0 for episode in self.episodes for advantage in episode.advantages)


@dataclass(frozen=True)
class Batch:
    """What an objective sees beside the scores: the N written tokens of E episodes of one pass."""

    token_ids: Tensor  # [N]
    episode_index: Tensor  # [N] 0..E-1, ascending
    group_index: Tensor  # [E] 0..groups-1, ascending
    lengths: Tensor  # [E] written tokens
    weights: Tensor  # [N] of each token in the loss
    episode_weights: Tensor  # [E] of each episode in the loss
    advantages: Tensor  # [N]
    rewards: Tensor  # [E]
    sampled_logprobs: Tensor | None  # [N]; None where the policy did not sample
    old_logprobs: Tensor | None  # [N]; None where this is the first and only update of a rollout
    groups: int

    def mean(self, values: Tensor) -> Tensor:
        """The share [] of this pass in the mean of [N] over the whole update, as `loss_agg` weighs tokens."""
        return (values * self.weights).sum()

    def spread(self, values: Tensor) -> Tensor:
        """[E] -> [N] by 1 / length, so that `mean` of it is the mean over episodes."""
        shares = (values * self.episode_weights / self.lengths)[self.episode_index]  # [N]
        return shares / self.weights.clamp_min(torch.finfo(torch.float32).tiny)  # a weight of 0: nothing counts

    def episode_sum(self, values: Tensor) -> Tensor:
        """[N] -> [E]."""
        total = torch.zeros(len(self.lengths), device=values.device, dtype=values.dtype)
        return total.index_add(0, self.episode_index, values)

    def episode_mean(self, values: Tensor) -> Tensor:
        """[N] -> [E]."""
        return self.episode_sum(values) / self.lengths

    def by_group(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values of episodes [E] as rows [groups, G] of the largest group, and a mask of which entries exist."""
        counts = torch.bincount(self.group_index, minlength=self.groups)  # [groups]
        mask = torch.arange(int(counts.max()), device=values.device)[None] < counts[:, None]  # [groups, G]
        return torch.zeros(mask.shape, device=values.device, dtype=values.dtype).masked_scatter(mask, values), mask


@dataclass(frozen=True)
class Scores:
    """What the policy, and the anchor if asked, say about the N tokens of a batch, in fp32."""

    logprobs: Tensor  # [N] of the tempered distribution that was sampled
    entropy: Tensor  # [N] exact
    hidden: Tensor  # [N, hidden] last hidden state from which each token is predicted
    anchor_logprobs: Tensor | None = None  # [N]
    anchor_hidden: Tensor | None = None  # [N, hidden]
    distances: Mapping[str, Tensor] = field(default_factory=dict)  # [N] each, over the whole vocabulary, by name


class Measured:
    """What passes have measured: means over all elements of a step, and shares of the loss, which add up.

    A tensor with elements is averaged over all of them, one without a dimension is a share. Of a name that ends in _min
    or _max the extreme is kept.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.counts: dict[str, int] = {}  # elements of a mean; 0: a share
        self.waiting: list[tuple[str, Tensor, int]] = []  # on the device, until somebody asks

    def add(self, values: Mapping[str, Tensor]) -> None:
        """What one pass has measured; does not wait for the device."""
        for name, value in values.items():
            if value.numel() > 0:
                extreme = name[-4:] in ("_min", "_max")
                total = getattr(value.detach(), name[-3:] if extreme else "sum")()
                self.waiting.append((name, total.double(), min(value.dim(), 1) * (1 if extreme else value.numel())))

    def settle(self) -> "Measured":
        """Everything on the host: here it waits for the device, once."""
        waiting, self.waiting = self.waiting, []
        numbers = torch.stack([total for _, total, _ in waiting]).tolist() if waiting else []
        for (name, _, count), number in zip(waiting, numbers, strict=True):
            self.put(name, number, count)
        return self

    def put(self, name: str, total: float, count: int) -> None:
        known = self.totals.get(name)
        if name[-4:] in ("_min", "_max"):
            choose = min if name.endswith("_min") else max
            self.totals[name], self.counts[name] = total if known is None else choose(known, total), count
        else:
            self.totals[name] = total + (known or 0.0)
            self.counts[name] = count + self.counts.get(name, 0)

    def merge(self, other: "Measured") -> None:
        """What was measured elsewhere, or in another update of the same step."""
        self.settle()
        for name, total in other.settle().totals.items():
            self.put(name, total, other.counts[name])

    def without(self, name: str) -> "Measured":
        """All but one of the names."""
        self.settle().totals.pop(name, None)
        return self

    def means(self, updates: int = 1) -> dict[str, float]:
        """One number a name; shares are those of a mean update."""
        return {name: total / (self.counts[name] or updates) for name, total in self.settle().totals.items()}
