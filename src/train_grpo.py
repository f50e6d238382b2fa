"""Group Relative Policy Optimization, the whole loop: rollout -> reward -> update, evaluate, run_training.

Read it from top to bottom. The records that travel (Problem, Episode, Group, PackedBatch, Scores) are frozen.
"""

import logging
import math
import random
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import (
    check_same_experiment,
    finished_step,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_model,
    seed_everything,
)
from src.config import Config, ConfigError, RunError, TrainingConfig, dump_config
from src.console import RESULT, configure_logging, first_completions, log_block
from src.distributed import AloneError, from_main, gather, on_main, share, together, total, world
from src.evaluate import (
    accuracy_line,
    answers_of,
    best_line,
    completions_table,
    headline,
    keep_bad_batch,
    ranking_metrics,
    summarize,
    write_report,
)
from src.hub import push_final
from src.maxent import seed_grpo_scale, semantic_entropy
from src.memory import in_parts_that_fit, preflight
from src.offline import given_groups
from src.packing import Group, pack, split_into_microbatches
from src.penalties import PENALTIES, PenaltyInputs, kl_estimates, policy_loss
from src.prepare import Run, describe, is_lora, prepare
from src.profiling import phase
from src.rl_datasets import Problem
from src.sampler import SamplingSettings, rollout
from src.scoring import score
from src.sharding import evened, full, load_full_state, sum_gradients, whole
from src.stop import Stopped, StopSignal
from src.storage import RunLock, set_aside, write_file
from src.telemetry import Means, Telemetry, peak_memory
from src.token_choice import episode_key

logger = logging.getLogger("grpo")


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


def is_offline(run: Run) -> bool:
    """Whether the completions come from a file and not from the sampler."""
    return getattr(run.task, "offline", False)


def sample(
    run: Run, problems: list[Problem], samples: int, temperature: float, stream: int, check_stop=None, **truncation
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

    def mine() -> list[Group]:
        groups = rollout(run.model, run.tokenizer, share(problems), samples, settings, check_stop)
        with phase("reward"):
            return run.rewards.grade(groups, training.zero_truncated_rewards)[0]

    with whole(run.model, run.anchor):
        return together(mine)


def add_advantages(groups: list[Group], training: TrainingConfig, task=None) -> list[Group]:
    """Reward minus the group's mean, over the standard deviation; exactly 0 in a group without variance.

    DeepSeekMath (Shao et al. 2024), section 4.1.2; `scale_rewards: none` is Dr. GRPO (Liu et al. 2025).
    """
    rewards = [torch.tensor([e.reward for e in group.episodes], dtype=torch.float64) for group in groups]  # [G] each
    scales = torch.ones(len(groups))
    if training.seed_grpo_alpha > 0:
        scales = uncertainty_scale(groups, training.seed_grpo_alpha, task)  # [groups]
    finished = []
    for group, row, scale in zip(groups, rewards, scales.tolist(), strict=True):
        advantages = torch.zeros_like(row)
        if row.max() - row.min() > 1e-6:
            of = {"group": row, "batch": torch.cat(rewards)}.get(training.scale_rewards)
            advantages = scale * (row - row.mean()) / (1.0 if of is None else of.std(correction=0))
        pairs = zip(group.episodes, advantages.tolist(), strict=True)
        finished.append(replace(group, episodes=tuple(replace(e, advantage=a) for e, a in pairs)))
    return finished


def uncertainty_scale(groups: list[Group], alpha: float, task) -> Tensor:
    """SEED-GRPO (Chen et al. 2025): prompts whose answers disagree move the policy less; clusters are equal answers."""
    answers = [answers_of(task, [e.text for e in group.episodes]) for group in groups]
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
    """Packed batches of this process's share, of the configured size; a loss over a group keeps it whole."""
    training = run.config.training
    keep_whole = PENALTIES[training.loss_type].is_objective
    mine = share(groups, [sum(len(episode.token_ids) for episode in group.episodes) for group in groups])
    split = split_into_microbatches(mine, training.micro_batch_size, training.max_tokens_per_microbatch, keep_whole)
    for pieces, counts in evened(run.model, split, groups):
        yield replace(pack(pieces, run.model.device, run.model.dtype), counts=counts)


@phase("loss")
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
    means, norms, skipped = Means(), 0.0, 0
    sums: dict[str, float] = defaultdict(float)
    for index in range(updates):
        weighted = add_loss_weights(groups[index % training.minibatches :: training.minibatches], training)
        # a group without variance then has no gradient: it is computed only where the whole step is to be measured
        if not use_anchor and training.entropy_coef == 0:
            weighted = [g for g in weighted if any(e.advantage != 0 for e in g.episodes)]
        if not weighted:
            continue
        weighted.sort(key=Group.tokens, reverse=True)  # what needs most memory comes first, and like beside like
        with dropout_of_update(run, step, index):
            results = backward(run, weighted, training, updates == 1, use_anchor, stoppable=index == 0)
        for measured, parts in results:
            if index > 0 or is_offline(run):  # the policy has moved since it sampled, or did not sample
                measured.pop("rollout/mismatch")
            for name, values in measured.items():
                means.add(name, values)
            for name, value in parts.items():
                sums[name] += float(value) / updates
        sum_gradients(run.model)
        norm = clip_and_step(run, step)
        norms += norm / updates
        skipped += not math.isfinite(norm)
    metrics = means.result() | total(sums)
    metrics |= {"train/grad_norm": norms, "train/learning_rate": rate, "train/skipped_updates": skipped}
    metrics |= steer(run, metrics, step)
    run.mid_update = False
    return metrics


@phase("optimizer")
def clip_and_step(run: Run, step: int) -> float:
    """One optimizer step, skipped where the gradient is not finite; returns the gradient's norm before clipping."""
    norm = float(full(torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.training.max_grad_norm)))
    if math.isfinite(norm):
        run.mid_update = True  # until the end of the update the weights are of no step
        run.optimizer.step()
    else:
        logger.warning(f"step {step}: the gradient is not finite; this update is skipped")
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def dropout_of_update(run: Run, step: int, index: int):
    """LoRA's dropout, if there is any."""
    if not run.config.lora.dropout:
        return nullcontext()
    from src.lora import dropout_in_update  # here, because only a LoRA run needs peft

    return dropout_in_update(run.model, episode_key(run.config.training.random_seed, step, index, 0))


def backward(
    run: Run, groups: list[Group], training: TrainingConfig, on_policy: bool, use_anchor: bool, stoppable: bool
) -> list[list[dict[str, Tensor]]]:
    """Gradient of one optimizer step, micro-batch by micro-batch. Returns what loss_of_microbatch measured.

    Until the first optimizer step of a rollout it is `stoppable`, but nobody leaves where other processes wait.
    """

    def compute() -> list[list[dict[str, Tensor]]]:
        results = []
        run.optimizer.zero_grad(set_to_none=True)
        for batch in microbatches(run, groups):
            if stoppable and world() == 1:
                run.check_stop()
            loss, *measured_and_parts = loss_of_microbatch(run, batch, training, on_policy, use_anchor)
            with phase("backward"):
                loss.backward()
            if batch.counts:
                results.append([{name: value.detach() for name, value in d.items()} for d in measured_and_parts])
        return results

    return in_parts_that_fit(run, groups, compute)


def steer(run: Run, metrics: dict[str, float], step: int) -> dict[str, float]:
    """Move tau and beta by what the step measured; see Controllers in src/maxent.py."""
    training, controllers = run.config.training, run.controllers
    if "maxent/weight_entropy" in metrics:
        measured = metrics["maxent/weight_entropy"]
        if training.meta_lr > 0 and training.tau_target_entropy is not None:
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

    def compute() -> list[tuple[float, ...]]:
        episodes = []
        for batch in microbatches(run, groups):
            logprobs = score(run.model, batch, run.config.training.temperature).logprobs
            if batch.counts:
                episodes += [tuple(part.tolist()) for part in logprobs.split(batch.lengths.tolist())]
        return episodes

    rows = iter(together(lambda: in_parts_that_fit(run, groups, compute)))
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


def evaluate(run: Run, report: Path | None = None, dataset: str = "") -> dict[str, float]:
    """Accuracy on the fixed held-out problems, with random numbers of their own; see summarize in src/evaluate.py."""
    if is_offline(run):
        return evaluate_ranking(run, report, dataset)
    data, samples = run.config.data, run.config.data.eval_samples
    temperature = data.eval_temperature or run.config.training.temperature
    truncation = {"top_k": data.eval_top_k, "top_p": data.eval_top_p, "min_p": data.eval_min_p}
    greedy = sample(run, run.eval_problems, 1, 0.0, -1, run.check_stop)
    sampled = sample(run, run.eval_problems, samples, temperature, -1, run.check_stop, **truncation)
    metrics = summarize(len(run.eval_problems), greedy, sampled, samples, run.task)
    if report is not None:
        sampling = {"temperature": temperature, "samples": samples, "max_gen_len": run.config.training.max_gen_len}
        about = {"dataset": dataset, "split": data.eval_split, "sampling": sampling | truncation}
        about["config"] = asdict(run.config)
        on_main(write_report, report, about, metrics, greedy, sampled)
    return metrics


def evaluate_ranking(run: Run, report: Path | None, dataset: str) -> dict[str, float]:
    """Offline: does the policy prefer the completions of the held-out groups that have the better scores?"""
    groups = add_old_logprobs(run, given_groups(run.eval_problems, run.tokenizer, run.eos_ids, run.config.training))
    scores = [[e.reward for e in group.episodes] for group in groups]
    means = [[sum(e.old_logprobs) / len(e.old_logprobs) for e in group.episodes if e.old_logprobs] for group in groups]
    metrics = ranking_metrics(scores, means)
    if report is not None:
        about = {"dataset": dataset, "split": run.config.data.eval_split, "config": asdict(run.config)}
        on_main(write_report, report, about, metrics, [], groups)
    return metrics


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
    if is_offline(run):
        groups = given_groups(questions, run.tokenizer, run.eos_ids, training)
    else:
        groups = sample(run, questions, group_size, training.temperature, step, run.check_stop)
    groups = add_advantages(groups, training, run.task)
    rolled_out = time.perf_counter()
    metrics = update(run, groups, step)
    seconds = {"time/rollout": rolled_out - started, "time/update": time.perf_counter() - rolled_out}
    episodes = [episode for group in groups for episode in group.episodes]
    tokens = sum(len(episode.token_ids) for episode in episodes)
    for part in {part: None for e in episodes for part in e.reward_parts}:
        metrics[f"train/{part}"] = sum(e.reward_parts.get(part, 0.0) for e in episodes) / len(episodes)
    metrics["train/reward"] = sum(e.reward for e in episodes) / len(episodes)  # what was trained on
    flat = sum(all(e.advantage == 0 for e in group.episodes) for group in groups)
    metrics |= {
        "train/groups_without_variance": flat / len(groups),
        "rollout/failed_groups": len(questions) - len(groups),
        "rewards/errors": sum(gather(sum(run.rewards.faults.values()))),
        "rollout/length": tokens / len(episodes),
        "rollout/finished": sum(e.finished for e in episodes) / len(episodes),
        "rollout/tokens_per_second": tokens / seconds["time/rollout"],
        "update/tokens_per_second": tokens / seconds["time/update"],
    }
    metrics["memory/peak_gib"] = peak_memory(run.model.device) / 2**30
    return metrics | seconds, groups


def run_training(config: Config, dataset_name: str, work_dir: str | Path = ".", fresh: bool = False) -> dict:
    """Train, or go on with a run that was interrupted. Returns the last evaluation; the run is in work_dir/runs/."""
    configure_logging()
    folder = run_folder(config, dataset_name, work_dir)
    if not fresh:
        check_same_experiment(folder, config)
    run = prepare(config, dataset_name)
    if fresh and folder.exists():  # only now: a config that cannot run moves nothing
        with on_main(RunLock, folder):
            on_main(set_aside, folder)
    with on_main(RunLock, folder):
        newest = from_main(newest_checkpoint, folder / "checkpoints")
        trust = config.model.trust_remote_code
        state = load_checkpoint(newest, run.model, run.optimizer, run.controllers, trust) if newest else None
        if state and state["step"] >= run.max_steps and from_main(finished_step, folder / "final") == state["step"]:
            logger.log(RESULT, f"{folder} is complete: {accuracy_line(state['last_evaluation'])}; --fresh starts over")
            on_main(push, run, folder, state["first_evaluation"], state["last_evaluation"])
            return state["last_evaluation"]
        if state is None:  # nothing here draws from these, but a reward function of the user's may
            seed_everything(config.training.random_seed)
        on_main(write_file, folder / "config.yaml", dump_config(config))
        telemetry = on_main(Telemetry, folder, state["step"] + 1 if state else 0, run.max_steps, is_offline(run))
        describe(run, dataset_name)
        logger.info(f"{'folder':<12}{folder}")
        try:
            with StopSignal() as stop:
                run.check_stop = stop.check
                training = run.config.training
                once = training.minibatches * training.inner_epochs == 1
                preflight(run, lambda groups: backward(run, groups, training, once, use_anchor=True, stoppable=True))
                return train_loop(run, folder, telemetry, state)
        finally:
            telemetry.close()


def run_folder(config: Config, dataset_name: str, work_dir: str | Path = ".") -> Path:
    """Where a run of this config lives."""
    return Path(work_dir) / "runs" / f"{Path(config.source).stem}_{dataset_name}"


def train_loop(run: Run, folder: Path, telemetry: Telemetry, state: dict | None) -> dict:
    """Evaluate, then step after step; save when it is time, and before leaving."""
    training = run.config.training
    if state:
        logger.info(f"going on after step {state['step']}")
        if "anchor" in state:
            load_full_state(run.anchor, state["anchor"])
        first, last = state["first_evaluation"], state["last_evaluation"]
    else:
        logger.info(f"evaluating {len(run.eval_problems):,} problems before the first step")
        first = last = evaluate(run)
        logger.info(f"before training: {accuracy_line(first)}")
        telemetry.write_step(0, first)
        state = {"step": 0, "bad_steps": 0, "unwritten": None}
    done = saved = state["step"]
    # metrics of a step that was taken, and saved, but not yet evaluated and written
    bad, unwritten = state["bad_steps"], state["unwritten"]
    groups: list[Group] = []
    metrics = last

    def save() -> None:
        extra = {"first_evaluation": first, "last_evaluation": last, "bad_steps": bad, "unwritten": unwritten}
        if training.reference_sync_steps:
            extra["anchor"] = full(run.anchor.state_dict())
        evaluated = unwritten is None and evaluates_at(run, done)
        save_checkpoint(folder / "checkpoints", done, run.model, run.tokenizer, run.optimizer, run.controllers, extra,
                        training.keep_checkpoints, headline(last) if evaluated else None)  # fmt: skip

    while done < run.max_steps or unwritten is not None:
        try:
            together(run.check_stop)
            if unwritten is None:
                unwritten, groups = train_step(run, done + 1)
                done += 1
            looks = evaluates_at(run, done)
            if looks:
                started = time.perf_counter()
                last = evaluate(run)
                unwritten |= last | {"time/evaluate": time.perf_counter() - started}
        except (Stopped, RunError, ConfigError) as error:
            if done > saved and not run.mid_update and not isinstance(error, AloneError):
                save()
                saved = done
            logger.log(RESULT, f"stopped; the first {saved} steps are saved, the same command goes on from there")
            raise
        metrics, unwritten = unwritten, None
        if groups and (looks or done == 1):
            telemetry.write_text("completions", completions_table(groups), done)
            telemetry.write_histogram(
                "rollout/lengths", torch.tensor([len(e.token_ids) for g in groups for e in g.episodes]), done
            )
        if groups and done == 1:
            log_block(first_completions(done, groups))
        telemetry.write_step(done, metrics)
        if looks:
            logger.info(f"step {done}/{run.max_steps}: {accuracy_line(last)}")
        bad = bad + 1 if metrics["train/skipped_updates"] else 0
        if bad:
            on_main(keep_bad_batch, folder / "bad_steps", done, groups)
        if done == run.max_steps or bad >= training.max_bad_steps or due(done, training.ckpt_save_interval):
            save()
            saved = done
        if bad >= training.max_bad_steps and done < run.max_steps:
            raise RunError(
                f"{bad} steps in a row had no finite gradient; what they were computed on is in "
                f"{folder / 'bad_steps'}; the weights are those from before them, saved as step {done}; go on with a "
                f"lower training.learning_rate, or start over with model.dtype: float32"
            )
    finish(run, folder, telemetry, done, first, last, metrics)
    return last


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps, 0 for never, happens at this one."""
    return interval > 0 and step % interval == 0


def finish(run: Run, folder: Path, telemetry: Telemetry, step: int, first: dict, last: dict, metrics: dict) -> None:
    """final/, the hyperparameters with the result, and the push to the hub."""
    config, model, final = run.config, run.model, folder / "final"
    if is_lora(config) and config.lora.merge_on_save:
        from src.lora import merged_model

        model = merged_model(model)
    save_model(model, run.tokenizer, final, step)
    lora = {f"lora.{name}": value for name, value in asdict(config.lora).items()} if is_lora(config) else {}
    telemetry.write_hparams({**asdict(config.model), **asdict(config.training), **lora}, metrics)
    best = on_main(best_line, folder / "metrics.jsonl")
    telemetry.log_summary(accuracy_line(first), accuracy_line(last), best, final)
    on_main(push, run, folder, first, last)


def push(run: Run, folder: Path, first: dict, last: dict) -> None:
    """final/ to the hub, if the config says so."""
    config = run.config
    if not config.hub.push_to_hub:
        return
    source = config.data.path or getattr(run.task, "hub_id", None)
    about = {
        "model": config.model.pretrained_model_path,
        "dataset": folder.name.removeprefix(f"{Path(config.source).stem}_"),
        "datasets": [source] if source and not Path(source).exists() else [],
        "config": dump_config(config),
    }
    evaluations = {"before": first, "after": last}
    logger.info(f"pushed to {push_final(folder / 'final', config.hub, about, evaluations, folder / 'metrics.jsonl')}")


def run_evaluation(config: Config, dataset_name: str, work_dir: str | Path = ".") -> dict[str, float]:
    """--eval_only: evaluate the config's model; report and completions go to the run folder's name + _eval."""
    configure_logging()
    run = prepare(config, dataset_name, for_training=False)
    folder = run_folder(config, f"{dataset_name}_eval", work_dir)
    if (folder / "report.json").exists():  # perhaps of another model
        with on_main(RunLock, folder):
            on_main(set_aside, folder)
    with on_main(RunLock, folder):
        metrics = evaluate(run, folder, dataset_name)
    logger.log(RESULT, f"{config.model.pretrained_model_path}: {accuracy_line(metrics)}\nthe report is in {folder}")
    return metrics


def run_check(config: Config, dataset_name: str, work_dir: str | Path = ".") -> None:
    """--check: load config, data and model, say what would happen, and write nothing."""
    configure_logging()
    check_same_experiment(run_folder(config, dataset_name, work_dir), config, refuse=False)
    describe(prepare(config, dataset_name), dataset_name)
    logger.log(RESULT, "everything is in order; nothing was written")
