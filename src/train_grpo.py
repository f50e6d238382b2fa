"""Group Relative Policy Optimization, the whole method: prompts, completions, advantages, loss, update, evaluation.

Read it from top to bottom. The engine (src/engine) samples and differentiates; what it is told to do stands here. The
records that travel between the two (src/records.py) are frozen. N is a number of tokens that the policy wrote.
"""

import math
import random
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from src.config import Config, TrainingConfig
from src.maxent import seed_grpo_scale, semantic_entropy
from src.penalties import MAX_LOG_RATIO, PENALTIES, has_variance, kl_estimates, maxent_shares
from src.prepare import Run, prepare
from src.records import Batch, Episode, Group, Measured, Problem, Scores
from src.tasks import answers_of

# ---------------------------------------------------------------------------------------------------------------------
# Prompts and advantages
# ---------------------------------------------------------------------------------------------------------------------


def problems_of_step(run: Run, step: int) -> list[Problem]:
    """The prompts of a step (from 1): each epoch is a new shuffle, a function of seed and epoch alone."""
    training = run.config.training
    size = training.num_questions_per_batch
    per_epoch = max(1, len(run.train_problems) // size)
    epoch, place = divmod(step - 1, per_epoch)
    order = list(range(len(run.train_problems)))
    random.Random(f"order {training.random_seed} {epoch}").shuffle(order)
    return [run.train_problems[order[(place * size + index) % len(order)]] for index in range(size)]


def with_advantages(groups: list[Group], training: TrainingConfig, task=None) -> list[Group]:
    """Reward minus the group's mean, over the standard deviation; exactly 0 in a group without variance.

    DeepSeekMath (Shao et al. 2024), section 4.1.2; `scale_rewards: none` is Dr. GRPO (Liu et al. 2025). The deviation
    is that of the group itself; an estimate for the population (TRL) is larger, by 1.07 at 8 completions, by 1.41 at 2.
    """
    rewards = [torch.tensor([e.reward for e in group.episodes], dtype=torch.float64) for group in groups]  # [G] each
    scales = torch.ones(len(groups))
    if training.seed_grpo_alpha > 0:
        scales = uncertainty_scale(groups, training.seed_grpo_alpha, task)  # [groups]
    finished = []
    for group, row, scale in zip(groups, rewards, scales.tolist(), strict=True):
        advantages = torch.zeros_like(row)  # [G]
        if has_variance(row[None]):
            of = {"group": row, "batch": torch.cat(rewards)}.get(training.scale_rewards)
            advantages = scale * (row - row.mean()) / (1.0 if of is None else of.std(correction=0))
        pairs = zip(group.episodes, advantages.tolist(), strict=True)
        finished.append(replace(group, episodes=tuple(replace(e, advantages=(a,) * e.length) for e, a in pairs)))
    return finished


def uncertainty_scale(groups: list[Group], alpha: float, task) -> Tensor:
    """SEED-GRPO (Chen et al. 2025): prompts whose answers disagree move the policy less; clusters are equal answers.

    A completion without an answer agrees with no other.
    """
    texts = [[e.text for e in group.episodes] for group in groups]
    answers = [[answer or (index,) for index, answer in enumerate(answers_of(task, row))] for row in texts]
    logprobs = [[sum(e.logprobs) / len(e.logprobs) for e in group.episodes] for group in groups]
    return seed_grpo_scale(semantic_entropy(answers, torch.tensor(logprobs)), alpha, len(groups[0].episodes))


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def with_loss_weights(groups: list[Group], training: TrainingConfig) -> list[Group]:
    """One denominator for the whole update, before it is cut into passes; skipped episodes are dropped."""
    skips = training.skip_unfinished_episodes
    kept = [replace(g, episodes=tuple(e for e in g.episodes if e.length and (e.finished or not skips))) for g in groups]
    lengths = [e.length for g in kept for e in g.episodes]
    constants = {"token": sum(lengths), "constant": len(lengths) * training.max_gen_len}

    def weigh(episode: Episode) -> Episode:
        denominator = constants.get(training.loss_agg, len(lengths) * episode.length)
        return replace(episode, token_weight=1 / denominator, episode_weight=1 / len(lengths))

    return [replace(g, episodes=tuple(map(weigh, g.episodes))) for g in kept if g.episodes]


def policy_loss(logprobs: Tensor, batch: Batch, training: TrainingConfig) -> tuple[Tensor, Tensor]:
    """The clipped surrogate per token [N], and where the clip binds [N].

    PPO (Schulman et al. 2017, equation 7), with the switches of GSPO (one ratio a sequence), DAPO (epsilon_high),
    INTELLECT-2 (delta) and CISPO (MiniMax-M1: a clipped, constant weight of the log-prob).
    """
    assert batch.old_logprobs is not None
    advantages = batch.advantages  # [N]
    log_ratio = logprobs - batch.old_logprobs  # [N]
    if training.importance_sampling_level == "sequence":
        log_ratio = batch.episode_mean(log_ratio)[batch.episode_index]  # [N] the same for each token of an episode
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    high = training.epsilon if training.epsilon_high is None else training.epsilon_high
    if training.policy_loss == "cispo":
        surrogate = ratio.clamp(max=1 + high).detach() * advantages * logprobs
        binds = ratio > 1 + high
    else:
        bounded = ratio if training.delta is None else ratio.clamp(max=training.delta)
        surrogate = torch.minimum(bounded * advantages, ratio.clamp(1 - training.epsilon, 1 + high) * advantages)
        binds = surrogate != ratio * advantages
    if training.importance_cap is not None and batch.sampled_logprobs is not None:  # a sampler in lower precision
        correction = (batch.old_logprobs - batch.sampled_logprobs).exp()  # [N]
        surrogate = surrogate * correction.clamp(max=training.importance_cap)
    return -surrogate, binds.float()


def objective(training: TrainingConfig, scores: Scores, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss + weight x penalty, for each, - entropy bonus: the share of one pass in the loss of the update.

    And what to log: shares of the loss without a dimension, anything else to be averaged over its elements.
    """
    if batch.old_logprobs is None:  # the only update of this rollout: the old policy is this one, its ratio exactly 1
        batch = replace(batch, old_logprobs=scores.logprobs.detach())
    penalties, measured, parts = dict(training.penalties()), measurements(scores, batch), {}
    if training.maxent_clipped and "maxent" in penalties:  # its weights take the place of advantages
        shares, found = maxent_shares(scores, batch, training)  # [E]
        batch = replace(batch, advantages=penalties.pop("maxent") * shares[batch.episode_index])
        measured |= found
    if training.has_policy_term():
        surrogate, measured["train/clip_fraction"] = policy_loss(scores.logprobs, batch, training)  # [N] each
        if training.maxent_clipped:  # its weights are those of whole completions
            surrogate = batch.spread(batch.episode_mean(surrogate))
        parts["train/policy_loss"] = batch.mean(surrogate)
    for name, weight in penalties.items():
        if weight > 0 and (scores.anchor_logprobs is not None or not PENALTIES[name].needs_anchor):
            value, found = PENALTIES[name](scores, batch, training)  # [N]
            parts[f"penalty/{name}"] = weight * batch.mean(value)
            measured |= found
    if training.entropy_coef > 0:
        parts["train/entropy_bonus"] = -training.entropy_coef * batch.mean(scores.entropy)
    loss = sum(parts.values(), torch.zeros((), device=scores.logprobs.device))
    return loss, measured | parts | {"train/loss": loss}


def measurements(scores: Scores, batch: Batch) -> dict[str, Tensor]:
    """What is logged whatever the loss is, [N] each."""
    measured = {"train/entropy": scores.entropy}
    measured |= {f"train/{name}": distance for name, distance in scores.distances.items()}
    if scores.anchor_logprobs is not None:
        estimates = kl_estimates(scores.logprobs, scores.anchor_logprobs)
        measured |= {"train/kl_k1": estimates["k1"], "train/kl_k3": estimates["k3"]}
    if batch.sampled_logprobs is not None:
        measured["rollout/mismatch"] = (scores.logprobs - batch.sampled_logprobs).abs()
    return measured


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------


def wanted(training: TrainingConfig, anchor: bool) -> dict:
    """What the engine is to score for the penalties of this config."""
    active = {name: PENALTIES[name] for name in training.penalties()}
    distances = {name: p.distance(training) for name, p in active.items() if p.over_vocabulary and anchor}
    return {"anchor": anchor, "distances": distances, "whole_groups": any(p.is_objective for p in active.values())}


def update(run: Run, groups: list[Group], step: int) -> dict[str, float]:
    """Optimizer steps on one rollout; returns means over all of its tokens."""
    controllers = run.state["controllers"]
    training = replace(run.config.training, tau=controllers.tau, beta=controllers.beta)
    updates = training.minibatches * training.inner_epochs
    active = [PENALTIES[name] for name, weight in training.penalties().items() if weight > 0]
    pulls = any(penalty.needs_anchor for penalty in active)  # else the distance is only measured, now and then
    want = wanted(training, pulls or run.evaluates_at(step))
    # where nothing else has a gradient, a group without an advantage has none
    only_advantages = not pulls and training.entropy_coef == 0 and all(p.is_objective for p in active)
    if updates > 1:
        groups = with_old_logprobs(run, groups, training)
    rate = learning_rate_at(step, run.max_steps, training)
    measured, norms = Measured(), []
    for index in range(updates):
        part = with_loss_weights(groups[index % training.minibatches :: training.minibatches], training)
        teaching = [group for group in part if group.teaches() or not only_advantages]
        idle = [group for group in part if not group.teaches() and only_advantages]
        found = run.engine.forward_backward(teaching, partial(objective, training), idle=idle, **want)
        measured.merge(found if index == 0 else found.without("rollout/mismatch"))  # later the policy has moved
        norms.append(run.engine.optim_step(rate) if teaching else 0.0)
    metrics = measured.means(updates)
    metrics |= {"train/grad_norm": sum(norms) / updates, "train/learning_rate": rate}
    metrics["train/skipped_updates"] = sum(not math.isfinite(norm) for norm in norms)
    return metrics | controllers.steer(metrics, step)


def with_old_logprobs(run: Run, groups: list[Group], training: TrainingConfig) -> list[Group]:
    """The log-probs that the ratios of several updates are taken to: the trainer's own, or those of the sampler."""
    if training.old_logprobs == "trainer":
        return run.engine.score(groups)
    return [replace(g, episodes=tuple(replace(e, old_logprobs=e.logprobs) for e in g.episodes)) for g in groups]


def learning_rate_at(step: int, max_steps: int, training: TrainingConfig) -> float:
    """Linear warm-up, then constant, or decay to zero just after the last step."""
    if step <= training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    progress = (step - training.warmup_steps - 1) / max(1, max_steps - training.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return training.learning_rate * decay[training.lr_schedule]


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def train_step(run: Run, step: int) -> tuple[dict[str, float], list[Group]]:
    """One rollout and its updates."""
    training = run.config.training
    every = 1 if training.anchor == "rollout" else training.reference_sync_steps
    if every and (step - 1) % every == 0:
        run.engine.move_anchor()
    problems = problems_of_step(run, step)
    groups = run.sample(problems, training.batch_size // training.num_questions_per_batch, stream=step)
    groups = with_advantages(groups, training, run.task)
    metrics = update(run, groups, step)
    return metrics, groups


def evaluate(run: Run, samples: int) -> dict[str, float]:
    """Accuracy on the fixed held-out problems, greedy and over `samples`, with random numbers of their own."""
    greedy = run.sample(run.eval_problems, 1, stream=-1, temperature=0.0)
    sampled = run.sample(run.eval_problems, samples, stream=-1)
    return run.summarize(greedy, sampled)


def train(run: Run) -> None:
    """Step after step; run.steps knows where an earlier process stopped, and evaluates and saves when it is due."""
    training = run.config.training
    run.rehearse(partial(objective, training), **wanted(training, anchor=True))
    for step in run.steps(evaluate):
        metrics, groups = train_step(run, step)
        run.record(metrics, groups)


def run_training(config: Config, dataset_name: str, work_dir: str = ".", fresh: bool = False) -> dict:
    """Train, or go on with a run that was interrupted. Returns the last evaluation; the run is in work_dir/runs/."""
    run = prepare(config, dataset_name, work_dir, fresh)
    with run.opened(fresh):
        train(run)
    return run.last_evaluation
