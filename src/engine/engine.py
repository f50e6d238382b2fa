"""The policy behind four verbs: `sample`, `forward_backward`, `optim_step`, and `state` with `load`.

What is fast, what fits, what several processes share and what a GPU needs is behind them. You need not enter. Beside
them are `score` (no gradient), `move_anchor` and `rehearse`.
"""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.config import Config, ConfigError
from src.engine.build import check_machine, is_lora, load_anchor, load_policy, optimizer_of
from src.engine.distributed import gather, share, together, world
from src.engine.memory import peak_memory
from src.engine.models import end_token_ids, load_tokenizer
from src.engine.movement import sampled_weights, share_changed
from src.engine.optim import MemoryEfficientAdamW
from src.engine.packing import Pass, apart, pack
from src.engine.plan import Limit, Rooms, cache_may_stay, in_parts_that_fit, limit_of, memory_line, tell_of_rehearsal
from src.engine.profiling import phase
from src.engine.sampler import draw_numbers, rollout
from src.engine.scoring import CHUNK_ELEMENTS, Distance, score
from src.engine.sharding import cut_states, evened, full, full_state, load_full_state, sliced, sum_gradients, whole
from src.engine.token_choice import SamplingSettings, episode_key
from src.engine.weights import load_weights, write_model
from src.records import Batch, Episode, Group, Measured, Problem, Scores, Told, Transcript

logger = logging.getLogger("grpo")
STATE_FILE = "engine_state.pt"
Objective = Callable[[Scores, Batch], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass
class EngineState:
    """Everything of an engine that changes, whole and on this machine; `write` puts it into a folder."""

    model: Any
    tokenizer: Any
    weights: dict[str, Any]
    tensors: dict[str, Any] | None  # None: of the finished model, from which nobody goes on

    def write(self, folder: Path) -> None:
        """The model in Hugging Face format, and beside it what training needs to go on."""
        write_model(self.model, self.weights, self.tokenizer, folder)
        if self.tensors is not None:
            with (folder / STATE_FILE).open("wb") as file:  # opened here, for the system's own errors
                torch.save(self.tensors, file)


class Engine:
    """One policy, the anchor that it is measured from, and the optimizer that moves it."""

    def __init__(self, config: Config, for_training: bool = True):
        """Checks the machine and loads the tokenizer; `load_model` does the rest, once the data are good."""
        self.config, self.for_training = config, for_training
        self.device = check_machine(config, for_training)
        self.tokenizer = load_tokenizer(config)
        self.configured = self.limit = Limit(1, None, CHUNK_ELEMENTS[self.device.type])  # load_model sees what fits
        self.report: Callable[[str, Callable[[], float]], None] = lambda verb, share: None  # hears what is done
        self.reply: Callable[[Problem, Transcript, int], Told | None] | None = None  # of a task of several turns
        self.check_stop: Callable[[], None] = lambda: None  # raises where the step in progress may be given up
        self.rooms = Rooms()
        self.drawn: Counter[int] = Counter()  # how often each problem was sampled from in this step
        self.step = self.updates = self.failed = 0  # failed: problems whose logits were not finite
        self.untouched = True  # no weight has moved in this step
        self.seconds: dict[str, float] = defaultdict(float)  # of this step, by purpose
        self.model: Any = None  # of transformers, or of peft around it
        self.anchor: Any = None
        self.optimizer: Any = None
        self.eos_ids: tuple[int, ...] = ()

    def load_model(self) -> None:
        """The weights; seconds for a small model, minutes for a large one."""
        self.model = load_policy(self.config, self.device, self.for_training)
        self.eos_ids = end_token_ids(self.model, self.tokenizer)
        if self.for_training:
            self.anchor = load_anchor(self.config, self.model, self.device)
            self.optimizer = optimizer_of(self.model, self.config.training)
            base = self.config.training.learning_rate
            self.ratios = [group["lr"] / base for group in self.optimizer.param_groups]
        self.configured = limit_of(self.config, self.model, self.anchor)
        self.limit = replace(self.configured)  # a copy, which changes
        self.rooms.kept.may_stay = self.for_training and cache_may_stay(self.config, self.model, self.anchor)

    def begin(self, step: int) -> None:
        """Step number `step` begins; its random numbers are its own, and until an optimizer step it can be given up."""
        self.step, self.updates, self.failed, self.untouched = step, 0, 0, True
        self.seconds, self.drawn = defaultdict(float), Counter()
        self.before = sampled_weights(self.model)  # to see at its end what has moved

    @contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Add what passes inside to the seconds of the step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[purpose] += time.perf_counter() - started

    # -- sample --------------------------------------------------------------------------------------------------------

    def sample(
        self,
        problems: Sequence[Problem],
        samples: int,
        stream: int,
        temperature: float | None = None,
        grade: Callable[[list[Group]], list[Group]] = lambda groups: groups,
    ) -> list[Group]:
        """`samples` completions for each problem by the current policy, graded; their log-probs are those they had.

        `stream` keeps the random numbers of training steps (their number) and evaluations (below 0) apart. A
        temperature of 0 is greedy. A problem whose logits are not finite is left out.
        """
        training = self.config.training
        settings = SamplingSettings(
            training.max_gen_len, training.temperature if temperature is None else temperature,
            training.inference_batch_size, self.eos_ids, training.random_seed, stream,
            tuple(training.stop_strings or ()), self.reply, self.config.data.max_turns, self.config.most_told(),
        )  # fmt: skip
        # the same prompt again in one step is another draw; an evaluation always draws the same
        numbers = draw_numbers(problems, self.drawn if stream >= 0 and settings.temperature > 0 else Counter())

        def tell(done: Callable[[], float]) -> None:
            self.check_stop()
            self.report("evaluation" if stream < 0 else "rollout", done)

        def mine() -> list[Group]:
            mine, draws = share(problems), share(numbers)
            sample = partial(rollout, self.model, self.tokenizer, mine, samples, settings, tell, draws)
            groups = self.rooms.rollout(self.model, mine, samples, settings, sample) if mine else []
            with phase("reward"):
                return grade(groups)

        with self.timed("rollout"), whole(self.model, self.anchor):
            groups = together(mine)
        self.failed += len(problems) - len(groups)
        return groups

    # -- forward_backward ----------------------------------------------------------------------------------------------

    def passes(self, groups: list[Group], whole_groups: bool) -> Iterator[Pass]:
        """Packed rows of this process's share, of the size that fits."""
        mine = share(groups, [sum(len(episode.token_ids) for episode in group.episodes) for group in groups])
        for pieces, counts in evened(self.model, self.limit.cut(mine, whole_groups), groups):
            yield replace(pack(pieces, self.model.device, self.model.dtype), counts=counts)

    def scored(self, groups: list[Group], whole_groups: bool, verb: str, **want: Any) -> Iterator[tuple[Pass, Scores]]:
        """Each pass over the groups with its scores; between two of them a step may be given up."""
        if not groups:
            return
        total, done = sum(len(group.episodes) for group in groups), 0
        for row in self.passes(groups, whole_groups):
            if self.untouched and world() == 1:  # where others wait nobody leaves
                self.check_stop()
            self.report(verb, partial(min, 1.0, done * world() / max(1, total)))
            yield row, score(self.model, row, self.config.training.temperature, elements=self.limit.head, **want)
            done += len(row.batch.lengths)

    def in_parts(self, groups: list[Group], whole_groups: bool, compute: Callable[[], Any]) -> Any:
        """compute() over passes that fit."""
        return in_parts_that_fit(self.model, self.limit, self.rooms.kept, groups, whole_groups, compute)

    def forward_backward(
        self,
        groups: list[Group],
        objective: Objective,
        anchor: bool = False,
        distances: Mapping[str, Distance] | None = None,
        whole_groups: bool = False,
        idle: Sequence[Group] = (),
    ) -> Measured:
        """The gradient of the objective over all groups, in place of the one before; returns what was measured.

        The objective gets each pass's scores and batch and returns its share of the loss, and values to log. `anchor`
        asks for the anchor's scores, `distances` for distances to it over the vocabulary by name, `whole_groups` for
        passes that cut no group. `idle` groups are measured in the same way and have no gradient.
        """
        want = {"anchor": self.anchor if anchor else None, "distances": distances}
        groups = sorted(groups, key=Group.tokens, reverse=True)  # what needs most memory first, and like beside like

        def compute() -> Measured:
            with self.dropout():  # the same when it is done again
                measured = Measured()
                self.optimizer.zero_grad(set_to_none=True)
                for row, scores in self.scored(groups, whole_groups, "update", **want):
                    with phase("loss"):
                        loss, values = objective(scores, row.batch)
                    with phase("backward"):
                        loss.backward()
                    if row.counts:
                        measured.add(values)
                    del scores, loss, values
                with torch.no_grad():
                    for row, scores in self.scored(list(idle), whole_groups, "update", **want):
                        if row.counts:
                            measured.add(objective(scores, row.batch)[1])
                        del scores
                if idle:
                    sliced(self.model)
                return measured.settle()

        measured = Measured()
        with self.timed("update"):
            mine = self.in_parts([*groups, *idle], whole_groups, compute)
            sum_gradients(self.model)
            for theirs in gather(mine):
                measured.merge(theirs)
        return measured

    def dropout(self):
        """LoRA's, if there is any; what it draws is a function of seed, step and update."""
        if not self.config.lora.dropout:
            return nullcontext()
        from src.engine.lora import dropout_in_update  # here, because only a LoRA run needs peft

        seed = self.config.training.random_seed
        return dropout_in_update(self.model, episode_key(seed, self.step, self.updates, 0))

    @torch.no_grad()
    def score(self, groups: list[Group]) -> list[Group]:
        """The groups with the current policy's log-probs as those of the old policy, and its entropies."""

        def compute() -> list[dict[str, tuple[float, ...]]]:
            episodes = []
            for row, scores in self.scored(groups, False, "scoring"):
                lengths = row.batch.lengths.tolist()  # of the episodes
                pairs = zip(scores.logprobs.split(lengths), scores.entropy.split(lengths), strict=True)
                if row.counts:
                    episodes += [{"old_logprobs": tuple(p.tolist()), "entropies": tuple(h.tolist())} for p, h in pairs]
            return episodes

        with self.timed("update"):
            rows = iter(together(lambda: self.in_parts(groups, False, compute)))
        return [replace(g, episodes=tuple(replace(e, **next(rows)) for e in g.episodes)) for g in groups]

    # -- optim_step ----------------------------------------------------------------------------------------------------

    @phase("optimizer")
    def optim_step(self, learning_rate: float) -> float:
        """Clip the gradient and take a step, skipped where it is not finite; returns its norm before clipping."""
        limit = self.config.training.max_grad_norm
        with self.timed("update"):
            for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
                group["lr"] = learning_rate * ratio
            norm = float(full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
            if math.isfinite(norm):
                self.untouched = False
                self.optimizer.step()
            else:
                logger.warning(f"step {self.step}: the gradient is not finite; this update is skipped")
            self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def weights_moved(self) -> float:
        """The share of a sample of the trained weights that this step has changed."""
        return share_changed(self.before, sampled_weights(self.model))

    def move_anchor(self) -> None:
        """The anchor becomes the current policy."""
        self.anchor.load_state_dict(self.model.state_dict())

    # -- state and load ------------------------------------------------------------------------------------------------

    def state(self, finished: bool = False) -> EngineState:
        """Everything that changes; of a `finished` run the model alone. All processes take part."""
        model = self.model
        if finished:
            if is_lora(self.config) and self.config.lora.merge_on_save:
                from src.engine.lora import merged_model

                model = merged_model(model)
            return EngineState(model, self.tokenizer, full_state(model), None)
        tensors: dict[str, Any] = {"optimizer": full(self.optimizer.state_dict()), "rooms": self.rooms.sizes}
        if self.limit != self.configured:  # memory has run out
            tensors["limit"] = asdict(self.limit)
        if self.config.training.reference_sync_steps:
            tensors["anchor"] = full(self.anchor.state_dict())
        return EngineState(model, self.tokenizer, full_state(model), tensors)

    def load(self, folder: Path) -> None:
        """Go on from what `state().write(folder)` wrote, bit for bit, with any number of processes."""
        tensors = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        load_weights(folder, self.model, self.config.model.trust_remote_code)
        saved, ours = tensors["optimizer"], isinstance(self.optimizer, MemoryEfficientAdamW)  # which cuts them itself
        try:
            if [set(group) for group in saved["param_groups"]] != [set(group) for group in self.optimizer.param_groups]:
                raise ValueError("it was written with another optimizer")
            self.optimizer.load_state_dict(saved if ours else cut_states(self.optimizer, saved))
        except ValueError as error:
            raise ConfigError(f"{folder} does not fit this config: {error}; use --fresh to start over") from error
        self.rooms.sizes = tensors["rooms"]
        if "limit" in tensors:
            self.limit = self.limit.least(tensors["limit"])
            logger.info(f"memory had run out before: passes are of at most {self.limit}")
        if "anchor" in tensors:
            load_full_state(self.anchor, tensors["anchor"])

    # -- what will fit -------------------------------------------------------------------------------------------------

    def longest_groups(self) -> list[Group]:
        """Groups as long as the config allows."""
        training = self.config.training
        questions, length = training.num_questions_per_batch, training.max_gen_len + self.config.most_told()
        weight = 1 / (training.batch_size * length)
        episode = Episode((0,) * length, (0.0,) * length, True, "", token_weight=weight, episode_weight=weight * length)
        problem = Problem(0, (0,) * training.max_prompt_len, "", {})
        return [Group(problem, (episode,) * (training.batch_size // questions))] * questions

    def rehearse(self, objective: Objective, longest: list[Group] | None = None, **want: Any) -> None:
        """Run the longest pass before the first step: what does not fit is cut smaller now, not late in the run."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        batches = self.limit.cut(longest or self.longest_groups(), want.get("whole_groups", False))
        batch = max(batches, key=lambda batch: sum(group.tokens() for group in batch))
        logger.info(f"trying the longest micro-batch: {sum(group.tokens() for group in batch):,} tokens")
        started = time.perf_counter()
        # one for each process; on a GPU two, where there are two: the second has the gradients of the first beside it
        times = 2 if len(batches) > world() and self.device.type == "cuda" else 1
        self.forward_backward(apart(batch * world() * times), objective, **want)
        self.model.zero_grad(set_to_none=True)
        seconds, begun = time.perf_counter() - started, bool(self.optimizer.state)
        tell_of_rehearsal(self.config, self.model, self.anchor, seconds, begun)

    def facts(self) -> dict[str, str]:
        """What the log says at the start of model and memory."""
        parameters = list(self.model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device
        return {
            "model": f"{self.config.model.pretrained_model_path}: {trained:,} of "
            f"{sum(parameter.numel() for parameter in parameters):,} parameters are trained, "
            f"{self.config.model.dtype} on {where}",
            "memory": memory_line(self.config, self.model, self.anchor),
        }

    def peak_gib(self) -> float:
        """The largest amount of memory in use so far."""
        return peak_memory(self.device) / 2**30
