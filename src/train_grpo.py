"""Group Relative Policy Optimization, the whole loop: rollout -> reward -> update, evaluate, run_training.

Read it from top to bottom. The records that travel (Problem, Episode, Group, PackedBatch, Scores) are frozen.
"""

import logging
import math
import random
import resource
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import (
    StopSignal,
    check_same_experiment,
    end_token_ids,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_tokenizer,
    resolve_device,
    save_checkpoint,
    save_model,
    set_aside,
)
from src.config import Config, ConfigError, TrainingConfig, dump_config
from src.maxent import Controllers, ControllerSettings, seed_grpo_scale, semantic_entropy
from src.optim import build_optimizer
from src.packing import Group, check_attention, pack, split_into_microbatches
from src.penalties import PENALTIES, PenaltyInputs, kl_estimates, policy_loss
from src.rl_datasets import Problem, get_task, last_answer, make_problems
from src.sampler import SamplingSettings, rollout
from src.scoring import score
from src.telemetry import Means, Telemetry, configure_logging, markdown_table

logger = logging.getLogger("grpo")


@dataclass
class Run:
    """Everything a run holds; the functions below take it and read from top to bottom."""

    config: Config
    task: object
    tokenizer: object
    train_problems: list[Problem]
    eval_problems: list[Problem]
    model: torch.nn.Module
    anchor: torch.nn.Module  # frozen: the initial policy, or with `anchor: rollout` the one that sampled
    optimizer: torch.optim.Optimizer
    controllers: Controllers  # the live values of tau and beta
    max_steps: int
    eos_ids: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Rollout and reward
# ---------------------------------------------------------------------------------------------------------------------


def questions_of_step(run: Run, step: int) -> list[Problem]:
    """The prompts of a step (from 1): each epoch is a new shuffle, a function of seed and epoch alone."""
    training = run.config.training
    size = training.num_questions_per_batch
    per_epoch = max(1, len(run.train_problems) // size)
    epoch, place = divmod(step - 1, per_epoch)
    order = list(range(len(run.train_problems)))
    random.Random(f"order {training.random_seed} {epoch}").shuffle(order)
    return [run.train_problems[order[(place * size + index) % len(order)]] for index in range(size)]


def sample(
    run: Run, problems: list[Problem], samples: int, temperature: float, stream: int, **truncation: float
) -> list[Group]:
    """Completions of the current policy, graded. Only evaluation may truncate: the update scores all tokens."""
    training = run.config.training
    settings = SamplingSettings(
        training.max_gen_len,
        temperature,
        training.inference_batch_size,
        run.eos_ids,
        training.random_seed,
        stream,
        stop_strings=tuple(training.stop_strings or ()),
        max_retry_rounds=training.max_retry_rounds,
        **truncation,
    )
    return grade(run.task, rollout(run.model, run.tokenizer, problems, samples, settings), training)


def grade(task, groups: list[Group], training: TrainingConfig) -> list[Group]:
    """Every episode with its reward and the parts it is made of."""
    graded = []
    for group in groups:
        episodes = []
        for episode in group.episodes:
            parts = task.reward(episode.text, group.problem.reference)
            truncated = training.zero_truncated_rewards and not episode.finished
            episodes.append(replace(episode, reward=0.0 if truncated else parts["reward"], reward_parts=parts))
        graded.append(replace(group, episodes=tuple(episodes)))
    return graded


def add_advantages(groups: list[Group], training: TrainingConfig) -> list[Group]:
    """Reward minus the group's mean, over the standard deviation; exactly 0 in a group without variance.

    DeepSeekMath (Shao et al. 2024), section 4.1.2; `scale_rewards: none` is Dr. GRPO (Liu et al. 2025).
    """
    rewards = torch.tensor([[e.reward for e in group.episodes] for group in groups], dtype=torch.float64)  # [groups, G]
    centered = rewards - rewards.mean(1, keepdim=True)
    varied = (rewards.max(1).values - rewards.min(1).values > 1e-6)[:, None]  # [groups, 1]
    spread = torch.ones_like(centered[:, :1])
    if training.scale_rewards == "group":
        spread = rewards.std(1, keepdim=True, correction=0)
    elif training.scale_rewards == "batch":
        spread = rewards.std(correction=0).expand_as(spread)
    advantages = torch.where(varied, centered / torch.where(varied, spread, 1.0), 0.0)
    if training.seed_grpo_alpha > 0:
        advantages = advantages * uncertainty_scale(groups, training.seed_grpo_alpha)[:, None]
    advantages = advantages.tolist()
    return [
        replace(group, episodes=tuple(replace(e, advantage=a) for e, a in zip(group.episodes, row, strict=True)))
        for group, row in zip(groups, advantages, strict=True)
    ]


def uncertainty_scale(groups: list[Group], alpha: float) -> Tensor:
    """SEED-GRPO (Chen et al. 2025): prompts whose answers disagree move the policy less; clusters are equal answers."""
    answers = [[last_answer(e.text) for e in group.episodes] for group in groups]
    logprobs = [[sum(e.logprobs) / len(e.logprobs) for e in group.episodes] for group in groups]
    return seed_grpo_scale(semantic_entropy(answers, torch.tensor(logprobs)), alpha, len(groups[0].episodes))


# ---------------------------------------------------------------------------------------------------------------------
# Update
# ---------------------------------------------------------------------------------------------------------------------


def add_loss_weights(groups: list[Group], training: TrainingConfig) -> list[Group]:
    """One denominator for the whole update, before it is cut into micro-batches; skipped episodes are dropped."""
    kept = [
        replace(g, episodes=tuple(e for e in g.episodes if e.finished or not training.skip_unfinished_episodes))
        for g in groups
    ]
    lengths = [len(e.token_ids) for g in kept for e in g.episodes]
    constants = {"token": sum(lengths), "constant": len(lengths) * training.max_gen_len}

    def weigh(episode):
        denominator = constants.get(training.loss_agg, len(lengths) * len(episode.token_ids))
        return replace(episode, token_weight=1 / denominator, episode_weight=1 / len(lengths))

    return [replace(g, episodes=tuple(map(weigh, g.episodes))) for g in kept if g.episodes]


def weighted_sum(value: Tensor, batch, per_episode: bool = False) -> Tensor:
    """A micro-batch's share of the mean of a per-token [N] or per-episode [E] value over the whole update."""
    return (value * (batch.episode_weight if per_episode else batch.token_weight[batch.episode_index])).sum()


def microbatches(run: Run, groups: list[Group]):
    """Packed batches of the configured size; a loss over a group keeps it whole."""
    training = run.config.training
    whole = PENALTIES[training.loss_type].is_objective
    for pieces in split_into_microbatches(groups, training.micro_batch_size, training.max_tokens_per_microbatch, whole):
        yield pack(pieces, run.model.device, run.model.dtype)


def loss_of_microbatch(run: Run, batch, training: TrainingConfig, on_policy: bool, use_anchor: bool):
    """Policy loss + beta x penalty - entropy bonus of one packed batch; and what to log, averaged over its elements."""
    penalty = PENALTIES[training.loss_type]
    direction = training.kl_direction if penalty.needs_exact_kl and use_anchor else None
    scores = score(run.model, batch, training.temperature, run.anchor if use_anchor else None, direction)
    if on_policy:  # the first and only update of this rollout: the old policy is this one, its ratio exactly 1
        batch = replace(batch, old_logprobs=scores.logprobs.detach())
    inputs = PenaltyInputs(scores, batch)
    measured = {"train/entropy": scores.entropy, "rollout/mismatch": (scores.logprobs - batch.sampled_logprobs).abs()}
    parts = {}
    if not penalty.is_objective:
        surrogate, measured["train/clip_fraction"] = policy_loss(scores.logprobs, batch, training)
        if training.importance_cap is not None:
            correction = (batch.old_logprobs - batch.sampled_logprobs).exp().clamp(max=training.importance_cap)
            surrogate = surrogate * correction
        parts["train/policy_loss"] = weighted_sum(surrogate, batch)
    if penalty.is_objective or (training.beta > 0 and use_anchor and training.loss_type != "none"):
        value, penalty_metrics = penalty(inputs, training)
        measured |= penalty_metrics
        share = weighted_sum(value, batch, penalty.per_episode(training))
        parts["train/penalty"] = share if penalty.is_objective else training.beta * share
    if training.entropy_coef > 0:
        parts["train/entropy_bonus"] = -training.entropy_coef * weighted_sum(scores.entropy, batch)
    if scores.anchor_logprobs is not None:
        estimates = kl_estimates(scores.logprobs, scores.anchor_logprobs)
        measured |= {"train/kl_k1": estimates["k1"], "train/kl_k3": estimates["k3"]}
    if scores.kl is not None:
        measured["train/kl"] = scores.kl
    loss = sum(parts.values())
    return loss, measured, parts | {"train/loss": loss}


def update(run: Run, groups: list[Group], step: int) -> dict[str, float]:
    """Optimizer steps on one rollout; returns means over all of its tokens."""
    training = replace(run.config.training, tau=run.controllers.tau, beta=run.controllers.beta)
    penalty = PENALTIES[training.loss_type]
    updates = training.minibatches * training.inner_epochs
    pulls = penalty.needs_anchor and (training.beta > 0 or penalty.is_objective)
    use_anchor = pulls or evaluates_at(run, step)  # without a pull the distance is only measured, now and then
    if updates > 1 and training.old_logprobs == "trainer":
        groups = add_old_logprobs(run, groups)
    rate = learning_rate_at(step, run.max_steps, training)
    for parameter_group in run.optimizer.param_groups:
        parameter_group["lr"] = rate
    means, sums, skipped = Means(), defaultdict(float), 0
    for index in range(updates):
        weighted = add_loss_weights(groups[index % training.minibatches :: training.minibatches], training)
        # a group without variance then has no gradient: it is computed only where the whole step is to be measured
        if not use_anchor and training.entropy_coef == 0:
            weighted = [g for g in weighted if any(e.advantage != 0 for e in g.episodes)]
        for batch in microbatches(run, weighted):
            loss, measured, parts = loss_of_microbatch(run, batch, training, updates == 1, use_anchor)
            loss.backward()
            if index > 0:  # the policy has moved since it sampled: the difference is not the sampler's any more
                measured.pop("rollout/mismatch")
            for name, values in measured.items():
                means.add(name, values)
            for name, value in parts.items():
                sums[name] += float(value.detach()) / updates
        if not weighted:
            continue
        norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), training.max_grad_norm))
        sums["train/grad_norm"] += norm / updates
        if math.isfinite(norm):
            run.optimizer.step()
        else:
            skipped += 1
            logger.warning(f"step {step}: the gradient is not finite; this update is skipped")
        run.optimizer.zero_grad(set_to_none=True)
    metrics = means.result() | dict(sums) | {"train/learning_rate": rate, "train/skipped_updates": skipped}
    return metrics | steer(run, metrics, step)


def steer(run: Run, metrics: dict[str, float], step: int) -> dict[str, float]:
    """Move tau and beta by what the step measured; see Controllers in src/maxent.py."""
    training, controllers = run.config.training, run.controllers
    if "maxent/weight_entropy" in metrics:
        measured = metrics["maxent/weight_entropy"]
        if training.meta_lr > 0:
            error = 2 * (measured - training.tau_target_entropy)
            slopes = [error * metrics[f"maxent/entropy_slope_{name}"] for name in ("tau", "beta")]
            controllers.meta_step(*slopes)
        else:
            controllers.update_tau(measured, step)
    if "train/kl_k3" in metrics:
        controllers.update_beta(metrics["train/kl_k3"])
    live = {"train/beta": controllers.beta} if training.loss_type not in ("none", "listwise_kl") else {}
    return live | {"maxent/tau": controllers.tau} if training.loss_type == "maxent" else live


def evaluates_at(run: Run, step: int) -> bool:
    """Every eval_interval steps and after the last one."""
    interval = run.config.training.eval_interval
    return step == run.max_steps or (interval > 0 and step % interval == 0)


@torch.no_grad()
def add_old_logprobs(run: Run, groups: list[Group]) -> list[Group]:
    """The trainer's own log-probs of every episode before the first of several updates."""
    episodes = []
    for batch in microbatches(run, groups):
        logprobs = score(run.model, batch, run.config.training.temperature).logprobs
        episodes += [tuple(part.tolist()) for part in logprobs.split(batch.lengths.tolist())]
    rows = iter(episodes)
    return [replace(g, episodes=tuple(replace(e, old_logprobs=next(rows)) for e in g.episodes)) for g in groups]


def learning_rate_at(step: int, max_steps: int, training: TrainingConfig) -> float:
    """Linear warm-up, then constant, or decay to zero just after the last step."""
    if step <= training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    progress = (step - training.warmup_steps - 1) / max(1, max_steps - training.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return training.learning_rate * decay[training.lr_schedule]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct), Chen et al. 2021, equation 1."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def confidence(values: list[float]) -> float:
    """Half width of the 95% interval of the mean over problems (normal approximation)."""
    return 1.96 * float(torch.tensor(values).std(correction=0)) / math.sqrt(len(values))


def evaluate(run: Run) -> dict[str, float]:
    """Greedy accuracy, pass@1 and pass@k on the fixed held-out problems, with random numbers of their own."""
    data, samples = run.config.data, run.config.data.eval_samples
    temperature = data.eval_temperature or run.config.training.temperature
    truncation = {"top_k": data.eval_top_k, "top_p": data.eval_top_p, "min_p": data.eval_min_p}
    greedy = sample(run, run.eval_problems, 1, 0.0, stream=-1)
    sampled = sample(run, run.eval_problems, samples, temperature, stream=-1, **truncation)
    greedy_answers = [float(group.episodes[0].reward_parts["answer"]) for group in greedy]
    correct = [sum(e.reward_parts["answer"] > 0.5 for e in group.episodes) for group in sampled]
    greedy_answers += [0.0] * (len(run.eval_problems) - len(greedy))  # left out by the sampler: not solved
    correct += [0] * (len(run.eval_problems) - len(sampled))
    rates = [count / samples for count in correct]
    episodes = [episode for group in sampled for episode in group.episodes]
    metrics = {"eval/greedy": sum(greedy_answers) / len(greedy_answers), "eval/greedy_ci95": confidence(greedy_answers)}
    metrics |= {"eval/pass@1": sum(rates) / len(rates), "eval/pass@1_ci95": confidence(rates)}
    for k in sorted({k for k in (2, 4, 8, 16, 32, 64) if k < samples} | {samples} - {1}):
        metrics[f"eval/pass@{k}"] = sum(pass_at_k(count, samples, k) for count in correct) / len(correct)
    for part in episodes[0].reward_parts:
        if part not in ("reward", "answer"):
            metrics[f"eval/{part}"] = sum(e.reward_parts[part] for e in episodes) / len(episodes)
    metrics["eval/length"] = sum(len(e.token_ids) for e in episodes) / len(episodes)
    metrics["eval/finished"] = sum(e.finished for e in episodes) / len(episodes)
    return metrics


def accuracy_line(metrics: dict[str, float]) -> str:
    """The headline of an evaluation."""
    passes = [
        f"{name[5:]} {value:.1%}"
        for name, value in metrics.items()
        if name.startswith("eval/pass@") and not name.endswith("_ci95") and name != "eval/pass@1"
    ]
    return (
        f"greedy {metrics['eval/greedy']:.1%} (+-{metrics['eval/greedy_ci95']:.1%}), "
        f"pass@1 {metrics['eval/pass@1']:.1%} (+-{metrics['eval/pass@1_ci95']:.1%}), "
        + ", ".join(passes[-1:] + [f"length {metrics['eval/length']:.1f}"])
    )


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[Group]]:
    """One rollout, its rewards, its updates; every number is over the whole step."""
    training = run.config.training
    sync = 1 if training.anchor == "rollout" else training.reference_sync_steps
    if sync and (step - 1) % sync == 0:
        run.anchor.load_state_dict(run.model.state_dict())
    started = time.perf_counter()
    questions = questions_of_step(run, step)
    group_size = training.batch_size // training.num_questions_per_batch
    groups = add_advantages(sample(run, questions, group_size, training.temperature, stream=step), training)
    rolled_out = time.perf_counter()
    metrics = update(run, groups, step)
    seconds = {"time/rollout": rolled_out - started, "time/update": time.perf_counter() - rolled_out}
    episodes = [episode for group in groups for episode in group.episodes]
    tokens = sum(len(episode.token_ids) for episode in episodes)
    for part in episodes[0].reward_parts:
        metrics[f"train/{part}"] = sum(e.reward_parts[part] for e in episodes) / len(episodes)
    metrics["train/reward"] = sum(e.reward for e in episodes) / len(episodes)  # what was trained on
    flat = sum(all(e.advantage == 0 for e in group.episodes) for group in groups)
    metrics |= {
        "train/groups_without_variance": flat / len(groups),
        "rollout/failed_groups": len(questions) - len(groups),
        "rollout/length": tokens / len(episodes),
        "rollout/finished": sum(e.finished for e in episodes) / len(episodes),
        "rollout/tokens_per_second": tokens / seconds["time/rollout"],
        "update/tokens_per_second": tokens / seconds["time/update"],
    }
    on_gpu = run.model.device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated(run.model.device)
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    metrics["memory/peak_gib"] = peak / 2**30
    return metrics | seconds, groups


def load_problems(config: Config, task, tokenizer, split: str) -> list[Problem]:
    """Every problem of a split whose prompt fits."""
    limit = config.training.max_prompt_len
    rows = task.load(split)
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
    idle = training.loss_type in ("kl", "approx_kl") or (training.loss_type == "ot" and training.ot_debias)
    if training.anchor == "rollout" and training.minibatches * training.inner_epochs == 1 and idle:
        logger.warning(
            "anchor: rollout with one update a rollout compares the policy with itself: the penalty does nothing; "
            "use anchor: reference, or minibatches or inner_epochs above 1"
        )


def build_controllers(training: TrainingConfig) -> Controllers:
    """tau and beta with what moves them, if anything does."""
    same = ("tau_target_entropy", "tau_target_entropy_start", "tau_target_anneal_steps", "tau_lr", "tau_min", "tau_max",
            "tau_warmup_steps", "beta_min", "beta_max")  # fmt: skip
    settings = {name: getattr(training, name) for name in same}
    settings |= {"kl_target": training.beta_kl_target, "kl_horizon": training.beta_horizon}
    return Controllers(training.tau, training.beta, ControllerSettings(**settings, meta_lr=training.meta_lr or 0.1))


def prepare(config: Config, dataset_name: str, for_training: bool = True) -> Run:
    """Load data and model. Everything a user can get wrong is wrong here, before anything is written."""
    training = config.training
    device = resolve_device(config.model.device)
    tokenizer = load_tokenizer(config)
    task = get_task(dataset_name, config.data)
    train_problems = load_problems(config, task, tokenizer, "train") if for_training else []
    eval_problems = load_problems(config, task, tokenizer, config.data.eval_split)
    if for_training and len(train_problems) < training.num_questions_per_batch:
        raise ConfigError(
            f"{config.source}: training.num_questions_per_batch ({training.num_questions_per_batch}) is more than "
            f"there are training problems ({len(train_problems)}); lower it"
        )
    warn_of_idle_penalty(training)
    model = load_model(config, device)
    check_attention(model, training.max_prompt_len + training.max_gen_len)
    anchor = optimizer = None
    if for_training:
        anchor = load_model(config, device).requires_grad_(False)
        optimizer = build_optimizer(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            learning_rate=training.learning_rate,
            betas=tuple(training.betas),
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            memory_efficient=training.memory_efficient_adamw,
            master_bits=24,
            state_bits=8,
            offload=False,
        )
    per_epoch = len(train_problems) // training.num_questions_per_batch
    max_steps = training.max_steps or per_epoch * training.num_epochs
    eos_ids = end_token_ids(model, tokenizer)
    return Run(config, task, tokenizer, train_problems, eval_problems, model, anchor, optimizer,
               build_controllers(training), max_steps, eos_ids)  # fmt: skip


def run_training(config: Config, dataset_name: str, work_dir: str | Path = ".", fresh: bool = False) -> dict:
    """Train, or go on with a run that was interrupted. Returns the last evaluation; the run is in work_dir/runs/."""
    configure_logging()
    folder = Path(work_dir) / "runs" / f"{Path(config.source).stem}_{dataset_name}"
    final = folder / "final"
    if not fresh:
        check_same_experiment(folder, config)
    run = prepare(config, dataset_name)
    if fresh and folder.exists():  # only now: a config that cannot run moves nothing
        set_aside(folder)
    checkpoints = list_checkpoints(folder / "checkpoints")
    state = load_checkpoint(checkpoints[-1], run.model, run.optimizer, run.controllers) if checkpoints else None
    first_step = state["step"] + 1 if state else 0
    if final.exists() and first_step > run.max_steps:
        logger.info(f"{folder} is complete: {accuracy_line(state['last_evaluation'])}; --fresh starts over")
        return state["last_evaluation"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    telemetry = Telemetry(folder, first_step, run.max_steps)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    logger.info(
        f"{config.model.pretrained_model_path}: {parameters:,} parameters, {config.model.dtype}, "
        f"{run.model.device}; {len(run.train_problems)} training and {len(run.eval_problems)} evaluation "
        f"problems of {dataset_name}; {run.max_steps} steps; run folder {folder}"
    )
    try:
        return train_loop(run, folder, telemetry, state, StopSignal())
    finally:
        telemetry.close()


def train_loop(run: Run, folder: Path, telemetry: Telemetry, state: dict | None, stop: StopSignal) -> dict:
    """Evaluate, then step after step; save and stop when asked to."""
    training = run.config.training
    if state:
        logger.info(f"going on after step {state['step']}")
        if "anchor" in state:
            run.anchor.load_state_dict(state["anchor"])
        first, last = state["first_evaluation"], state["last_evaluation"]
        start = state["step"] + 1
    else:
        first = last = evaluate(run)
        logger.info(f"before training: {accuracy_line(first)}")
        telemetry.write_step(0, first)
        start = 1
    metrics = last
    for step in range(start, run.max_steps + 1):
        metrics, groups = train_step(run, step)
        at_end, looks = step == run.max_steps, evaluates_at(run, step)
        if looks:
            started = time.perf_counter()
            last = evaluate(run)
            metrics |= last | {"time/evaluate": time.perf_counter() - started}
        if looks or step == 1:
            telemetry.write_text("completions", completions_table(groups), step)
            telemetry.write_histogram(
                "rollout/lengths", torch.tensor([len(e.token_ids) for g in groups for e in g.episodes]), step
            )
        telemetry.write_step(step, metrics)
        if looks:
            logger.info(f"step {step}/{run.max_steps}: {accuracy_line(last)}")
        due = training.ckpt_save_interval and step % training.ckpt_save_interval == 0
        if at_end or due or stop.number:
            extra = {"first_evaluation": first, "last_evaluation": last}
            if training.reference_sync_steps:
                extra["anchor"] = run.anchor.state_dict()
            save_checkpoint(
                folder / "checkpoints",
                step,
                run.model,
                run.tokenizer,
                run.optimizer,
                run.controllers,
                extra,
                training.keep_checkpoints,
            )
        if stop.number and not at_end:
            logger.info(f"stopped after step {step} and saved; the same command goes on from here")
            raise SystemExit(128 + stop.number)
    save_model(run.model, run.tokenizer, folder / "final")
    telemetry.write_hparams({**asdict(run.config.model), **asdict(training)}, metrics)
    logger.info(f"before training: {accuracy_line(first)}")
    logger.info(f"after training:  {accuracy_line(last)}")
    logger.info(f"model in {folder / 'final'}; curves: tensorboard --logdir {folder.parent}")
    return last


def completions_table(groups: list[Group], shown: int = 8) -> str:
    """Prompts, completions and rewards of the first episodes, one of each group."""
    rows = [[g.problem.prompt_text, g.episodes[0].text, f"{g.episodes[0].reward:.2f}"] for g in groups[:shown]]
    return markdown_table(["prompt", "completion", "reward"], rows)


def run_evaluation(config: Config, dataset_name: str) -> dict[str, float]:
    """--eval_only: evaluate the config's model and print the result."""
    configure_logging()
    metrics = evaluate(prepare(config, dataset_name, for_training=False))
    logger.info(accuracy_line(metrics))
    return metrics
