"""From a config to a run that is ready for its first step: data, rewards, engine.

Everything a user can get wrong is wrong here, before anything is written.
"""

import logging
from functools import partial
from pathlib import Path

from src.config import Config, ConfigError, TrainingConfig
from src.engine import Engine
from src.maxent import Controllers
from src.penalties import PENALTIES
from src.records import Episode, Group, Problem, Transcript
from src.rl_datasets import get_task
from src.run import Run, check_hub, check_hub_keys, check_same_experiment, configure_logging, progress, run_folder
from src.tasks import (
    Conversation,
    Rewards,
    given_groups,
    load_eval_rows,
    load_train_rows,
    make_problems,
    ranking_metrics,
    summarize,
)

logger = logging.getLogger("grpo")


def fitting_problems(config: Config, task, rows: list[dict], tokenizer, split: str) -> list[Problem]:
    """Every row of a split whose prompt fits."""
    limit = config.training.max_prompt_len
    problems = make_problems(task, rows, tokenizer, limit)
    if len(problems) < len(rows):
        logger.warning(
            f"{len(rows) - len(problems)} of {len(rows)} {split} prompts are longer than max_prompt_len: left out"
        )
    if not problems:
        raise ConfigError(f"{config.source}: no {split} prompt fits training.max_prompt_len ({limit} tokens); raise it")
    return problems


def warn_of_idle_penalty(training: TrainingConfig) -> None:
    """With one update a rollout the rollout anchor is the policy itself: distance and gradient are zero (k1: noise)."""
    active = [PENALTIES[name] for name in training.penalties()]
    idle = any(penalty.needs_anchor and not penalty.is_objective for penalty in active)
    if training.anchor == "rollout" and training.minibatches * training.inner_epochs == 1 and idle:
        logger.warning(
            "anchor: rollout with one update a rollout compares the policy with itself: the penalty does nothing; "
            "use anchor: reference, or minibatches or inner_epochs above 1"
        )


def warn_of_what_it_is_not(training: TrainingConfig) -> None:
    """Combinations that run, and are not what their names suggest."""
    if "approx_kl" in training.penalties() and training.kl_estimator == "k1":
        logger.warning("kl_estimator: k1 has no gradient on average as a loss; use k2 or k3_unbiased")
    if training.importance_sampling_level == "sequence" and training.loss_agg == "token":
        logger.warning("sequence-level ratios with loss_agg: token are not GSPO; use loss_agg: sequence")


def check_task(config: Config, task) -> None:
    """Keys that mean nothing where the completions come from a file."""
    training = config.training
    if not getattr(task, "offline", False):
        return
    for name, wrong in (
        ("importance_cap", training.importance_cap is not None),
        ("seed_grpo_alpha", training.seed_grpo_alpha > 0),
        ("old_logprobs", training.old_logprobs == "sampler"),
        ("anchor", training.anchor == "rollout"),
        ("zero_truncated_rewards", training.zero_truncated_rewards),
        ("mismatch_mask", training.mismatch_mask is not None),
        ("overlong_buffer", training.overlong_buffer > 0),
        ("dynamic_sampling", training.dynamic_sampling > 0),
        ("retire_solved", training.retire_solved is not None),
        ("curriculum", training.curriculum),
        ("loss_type: kl_in_reward", "kl_in_reward" in training.penalties()),
        ("scale_rewards", training.scale_rewards == "parts"),
    ):
        if wrong:
            raise ConfigError(
                f"{config.source}: training.{name} is about the policy that sampled, but here the completions come "
                f"from a file; remove the key"
            )
    if config.data.reward_functions:
        raise ConfigError(f"{config.source}: data.reward_functions does nothing where the file has the scores; remove")


def check_enough(config: Config, train_problems: list[Problem] | None) -> None:
    """A step must not hold a problem twice."""
    questions = config.training.num_questions_per_batch
    if train_problems is not None and len(train_problems) < questions:
        raise ConfigError(
            f"{config.source}: training.num_questions_per_batch ({questions}) is more than there are training problems "
            f"({len(train_problems)}); lower it"
        )


class SampledCompletions:
    """Completions of the engine, graded by the task."""

    def __init__(self, config: Config, engine: Engine, task, rewards: Rewards):
        self.config, self.engine, self.task, self.rewards = config, engine, task, rewards

    def sample(
        self, problems: list[Problem], samples: int, stream: int, temperature: float | None = None
    ) -> list[Group]:
        """`samples` completions for each problem, with their rewards; see Engine.sample."""
        grade = partial(self.rewards.grade, zero_truncated=self.config.training.zero_truncated_rewards)
        return self.engine.sample(problems, samples, stream, temperature, grade)

    def summarize(self, problems: list[Problem], greedy: list[Group], sampled: list[Group]) -> dict[str, float]:
        """Accuracies of an evaluation."""
        return summarize(len(problems), greedy, sampled, len(sampled[0].episodes), self.task)

    def longest(self, problems: list[Problem]) -> list[Group] | None:
        """What a step may be at its longest: as the config says."""
        return None


class GivenCompletions:
    """The completions of a file of scores in place of the sampler's; everything after that is the same."""

    def __init__(self, config: Config, engine: Engine):
        self.config, self.engine = config, engine

    def groups(self, problems: list[Problem]) -> list[Group]:
        """What the file has for these problems; completions that are too long are left out."""
        return given_groups(problems, self.engine.tokenizer, self.engine.eos_ids, self.config.training)

    def sample(
        self, problems: list[Problem], samples: int, stream: int, temperature: float | None = None
    ) -> list[Group]:
        """As if sampled. In an evaluation (stream below 0) with the policy's log-probs, and none are greedy."""
        if temperature == 0:
            return []
        with self.engine.timed("rollout"):
            groups = self.groups(problems)
        return self.engine.score(groups) if stream < 0 else groups

    def summarize(self, problems: list[Problem], greedy: list[Group], sampled: list[Group]) -> dict[str, float]:
        """Does the policy prefer the completions that have the better scores?"""
        scores = [[e.reward for e in group.episodes] for group in sampled]
        means = [[sum(e.old_logprobs) / len(e.old_logprobs) for e in g.episodes if e.old_logprobs] for g in sampled]
        return ranking_metrics(scores, means)

    def longest(self, problems: list[Problem]) -> list[Group] | None:
        """The groups of a step that would need most memory."""
        groups = sorted(self.groups(problems), key=Group.tokens, reverse=True)
        return groups[: self.config.training.num_questions_per_batch]

    def with_two(self, problems: list[Problem], split: str) -> list[Problem]:
        """The problems of which at least two completions fit: one alone teaches nothing."""
        groups = self.groups(problems)
        long = sum(len(group.problem.row["completions"]) - len(group.episodes) for group in groups)
        kept = [group.problem for group in groups if len(group.episodes) > 1]
        if long:
            logger.warning(
                f"{long} {split} completions are longer than max_gen_len or max_seq_length, and with them "
                f"{len(problems) - len(kept)} of {len(problems)} prompts: left out"
            )
        if problems and not kept:
            raise ConfigError(
                f"{self.config.source}: no {split} prompt has two completions that fit training.max_gen_len and "
                f"max_seq_length; raise them"
            )
        return kept


def prepare(
    config: Config, dataset_name: str, work_dir: str | Path = ".", fresh: bool = False, for_training: bool = True
) -> Run:
    """Load data and model; ConfigError for whatever is wrong with them."""
    configure_logging()
    training, data = config.training, config.data
    folder = run_folder(config, dataset_name, work_dir)
    if for_training and not fresh:
        check_same_experiment(folder, config)
    check_hub_keys(config.hub, config.source)
    if for_training:
        check_hub(config.hub)
    engine = Engine(config, for_training)
    engine.report = progress.report
    task = get_task(dataset_name, data)
    sampled = not getattr(task, "offline", False)
    check_task(config, task)
    rewards = Rewards(task, data)
    train_rows, eval_rows = load_train_rows(task) if for_training else [], load_eval_rows(task)
    train_problems = fitting_problems(config, task, train_rows, engine.tokenizer, "train") if for_training else []
    eval_problems = fitting_problems(config, task, eval_rows, engine.tokenizer, data.eval_split)
    rewards.check_columns([problem.row for problem in train_problems + eval_problems])
    config.replies = sampled and callable(getattr(task, "reply", None))
    if config.replies:
        engine.reply = Conversation(task, engine.tokenizer)
        engine.reply.check(eval_problems[0])
    if sampled:  # what is wrong with a reward itself shows with any completion
        text = Transcript(["no answer"]) if config.replies else "no answer"
        rewards.grade([Group(eval_problems[0], (Episode((), (), False, text),))])
    check_enough(config, train_problems if for_training else None)
    warn_of_idle_penalty(training)
    warn_of_what_it_is_not(training)
    engine.load_model()
    source: SampledCompletions | GivenCompletions = SampledCompletions(config, engine, task, rewards)
    if not sampled:
        source = GivenCompletions(config, engine)
        train_problems = source.with_two(train_problems, "train")
        eval_problems = source.with_two(eval_problems, data.eval_split)
        check_enough(config, train_problems if for_training else None)
    per_epoch = len(train_problems) // training.num_questions_per_batch
    left_out = (len(train_rows) - len(train_problems), len(eval_rows) - len(eval_problems))
    return Run(config, dataset_name, folder, engine, task, source, train_problems, eval_problems,
               max_steps=training.max_steps or per_epoch, left_out=left_out, sampled=sampled,
               state={"controllers": Controllers(training)})  # fmt: skip
