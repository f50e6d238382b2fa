"""Group Relative Policy Optimization, the whole method: prompts, completions, advantages, loss, update, evaluation.

Read it from top to bottom. The engine (src/engine) samples and differentiates; what it is told to do stands here. The
records that travel between the two (src/records.py) are frozen. N is a number of tokens that the policy wrote.
"""

import math
import random
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from src.config import Config, RunError, TrainingConfig
from src.maxent import seed_grpo_scale, semantic_entropy
from src.penalties import MAX_LOG_RATIO, PENALTIES, has_variance, kl_estimates, maxent_shares
from src.prepare import Run, prepare
from src.records import Batch, Episode, Group, Measured, Problem, Scores
from src.tasks import answers_of, solved

# ---------------------------------------------------------------------------------------------------------------------
# Prompts and advantages
# ---------------------------------------------------------------------------------------------------------------------


def rollout(run: Run, step: int) -> tuple[list[Group], dict[str, float]]:
    """The graded groups of a step, and what it took to get them.

    Dynamic sampling (DAPO, Yu et al. 2025, section 3.2): groups without variance make room for those of other prompts.
    """
    training, size, state = run.config.training, run.config.training.num_questions_per_batch, run.state
    state.setdefault("cursor", (step - 1) * size)
    groups: list[Group] = []
    useful: list[bool] = []  # before the length penalty: it makes wrong answers differ too
    drawn: set[int] = set()  # in this step, by index
    for _ in range(1 + training.dynamic_sampling):
        problems = next_problems(run, size - sum(useful), drawn)
        if not problems:
            break
        helping = run.sample(problems, training.batch_size // size, stream=step)
        groups, useful = groups + helping, useful + [group.varies() for group in helping]
        drawn |= {problem.index for problem in problems}
        if sum(useful) >= size:
            break
    if training.retire_solved is not None or training.curriculum:
        state["accuracy"] = with_running_accuracy(state.get("accuracy", {}), groups)
    state["barren_steps"] = state.get("barren_steps", 0) + (not any(useful))
    metrics = {
        "rollout/tokens": sum(episode.length for group in groups for episode in group.episodes),
        "rollout/prompts": len(groups),
        "rollout/useful_groups": sum(useful) / max(1, len(groups)),
        "train/barren_steps": state["barren_steps"],
    }
    if training.dynamic_sampling > 0:
        groups = sorted(groups, key=Group.varies, reverse=True)[:size]
    return with_length_penalty(groups, training), metrics


def next_problems(run: Run, count: int, drawn: set[int] | frozenset[int] = frozenset()) -> list[Problem]:
    """The next prompts, from where the cursor in run.state stands; each epoch is a new shuffle.

    Passed over are those `drawn` in this step, solved ones (retire_solved) and, by chance, what is nearly always right
    or wrong (curriculum).
    """
    training, problems, state = run.config.training, run.train_problems, run.state
    accuracy, limit = state.get("accuracy", {}), training.retire_solved or math.inf
    state.setdefault("cursor", 0)
    left = {problem.index for problem in problems if accuracy.get(problem.index, -1.0) < limit} - drawn
    if len(left) < count and not drawn:
        raise RunError(
            f"only {len(left)} of {len(problems)} training problems have an accuracy below training.retire_solved "
            f"({limit}), and {count} are wanted: raise it, give more or harder problems, or lower training.max_steps "
            f"to {run.done}, to finish here"
        )
    found: list[Problem] = []
    while len(found) < count and left:
        epoch, place = divmod(state["cursor"], len(problems))
        problem = problems[order_of_epoch(training.random_seed, epoch, len(problems))[place]]
        known = accuracy.get(problem.index)
        chance = 1.0 if known is None or not training.curriculum else max(0.1, 4 * known * (1 - known))
        turn = random.Random(f"turn {training.random_seed} {state['cursor']}").random()
        state["cursor"] += 1
        if turn < chance and problem.index in left:
            left.remove(problem.index)
            found.append(problem)
    return found


@cache
def order_of_epoch(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


def with_running_accuracy(accuracy: dict[int, float], groups: list[Group]) -> dict[int, float]:
    """Of each problem, by its index: half of what it was, half of what is new."""
    means = {g.problem.index: sum(map(solved, g.episodes)) / len(g.episodes) for g in groups}
    return accuracy | {index: (accuracy.get(index, mean) + mean) / 2 for index, mean in means.items()}


def with_length_penalty(groups: list[Group], training: TrainingConfig) -> list[Group]:
    """DAPO, equation 13: within `overlong_buffer` of the limit the reward falls towards -1, what a cut off one gets."""
    if training.overlong_buffer == 0:
        return groups

    def punish(episode: Episode) -> Episode:
        beyond = (episode.length - training.max_gen_len) / training.overlong_buffer + 1
        penalty = -min(max(beyond, 0.0), 1.0) if episode.finished else -1.0
        parts = {**episode.reward_parts, "overlong": penalty}
        rewards = (*episode.rewards, (1.0, penalty))
        return replace(episode, reward=episode.reward + penalty, reward_parts=parts, rewards=rewards)

    return [replace(group, episodes=tuple(map(punish, group.episodes))) for group in groups]


def with_advantages(groups: list[Group], training: TrainingConfig, task=None) -> list[Group]:
    """Reward minus a baseline, over a scale; exactly 0 in a group without variance (in a batch, if that is compared).

    DeepSeekMath (Shao et al. 2024), section 4.1.2, and the switches of RLOO, Dr. GRPO, MaxRL and GDPO. The deviation is
    that of the group itself; an estimate for the population (TRL) is larger, by 1.07 at 8 completions, by 1.41 at 2.
    """
    scores = [torch.tensor([e.reward for e in group.episodes], dtype=torch.float64) for group in groups]  # [G] each
    if training.scale_rewards == "parts":
        scores = [normalized_parts(group) for group in groups]
    batch = torch.cat(scores)  # [all]
    scales = torch.ones(len(groups))
    if training.seed_grpo_alpha > 0:
        scales = uncertainty_scale(groups, training.seed_grpo_alpha, task)  # [groups]
    finished = []
    for group, row, scale in zip(groups, scores, scales.tolist(), strict=True):
        advantages = torch.zeros_like(row)  # [G]
        if has_variance((batch if training.baseline == "batch" else row)[None]):
            others = (row.sum() - row) / max(1, len(row) - 1)  # [G] the mean of the others
            baseline = {"mean": row.mean(), "leave_one_out": others, "batch": batch.mean()}[training.baseline]
            advantages = scale * (row - baseline) / divisor(row, batch, training.scale_rewards)
        pairs = zip(group.episodes, advantages.tolist(), strict=True)
        finished.append(replace(group, episodes=tuple(replace(e, advantages=(a,) * e.length) for e, a in pairs)))
    return finished


def divisor(row: Tensor, batch: Tensor, scale_rewards: str) -> Tensor | float:
    """What advantages are divided by; infinite, where a mean of 0 or less is no scale."""
    if scale_rewards == "none":
        return 1.0
    if scale_rewards == "mean":  # MaxRL (2602.02710): for rewards of 0 and 1 the pass rate
        return row.mean() if row.mean() > 0 else math.inf
    return (row if scale_rewards == "group" else batch).std(correction=0)


def normalized_parts(group: Group) -> Tensor:
    """GDPO (2601.05242): each reward normalised in its group by itself, and their weighted sum [G]."""
    values = torch.tensor([[value for _, value in e.rewards] for e in group.episodes], dtype=torch.float64).T  # [K, G]
    weights = torch.tensor([weight for weight, _ in group.episodes[0].rewards], dtype=torch.float64)  # [K]
    centred = (values - values.mean(1, keepdim=True)) * has_variance(values)  # [K, G]
    return weights @ (centred / values.std(1, correction=0, keepdim=True).clamp_min(1e-12))


def uncertainty_scale(groups: list[Group], alpha: float, task) -> Tensor:
    """SEED-GRPO (Chen et al. 2025): prompts whose answers disagree move the policy less; clusters are equal answers.

    The form 1 / (1 + alpha x) on mean log-probs is that of MaxEnt-GRPO's package. No answer agrees with no other.
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
    kept = [group for group in kept if group.episodes]

    def weigh(group: Group, episode: Episode) -> Episode:
        denominator = {
            "token": sum(lengths),
            "sequence": len(lengths) * episode.length,
            "prompt": len(kept) * sum(other.length for other in group.episodes),
            "constant": len(lengths) * training.max_gen_len,
        }[training.loss_agg]
        return replace(episode, token_weight=1 / denominator, episode_weight=1 / len(lengths))

    return [replace(g, episodes=tuple(weigh(g, e) for e in g.episodes)) for g in kept]


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
    return -surrogate, binds.float()


def sampler_weights(batch: Batch, training: TrainingConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """For a sampler in lower precision: what each token [N] counts, and the share of completions that do not."""
    measured: dict[str, Tensor] = {}
    weights = torch.ones_like(batch.advantages)  # [N]
    if batch.sampled_logprobs is None or batch.old_logprobs is None:
        return weights, measured
    log_ratio = batch.old_logprobs - batch.sampled_logprobs  # [N]
    if training.importance_cap is not None:  # truncated, token by token
        weights = log_ratio.exp().clamp(max=training.importance_cap)
    if training.mismatch_mask is not None:  # masked, whole completions
        far = batch.episode_mean(log_ratio).abs() > math.log(training.mismatch_mask)  # [E]
        weights, measured["train/mismatch_masked"] = weights * ~far[batch.episode_index], far.float()
    return weights, measured


def objective(training: TrainingConfig, scores: Scores, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss + weight x penalty, for each, - entropy bonus: the share of one pass in the loss of the update.

    And what to log: shares of the loss without a dimension, anything else to be averaged over its elements.
    """
    if batch.old_logprobs is None:  # the only update of this rollout: the old policy is this one, its ratio exactly 1
        batch = replace(batch, old_logprobs=scores.logprobs.detach())
    penalties = {name: weight for name, weight in training.penalties().items() if weight > 0}
    measured, parts = measurements(scores, batch), {}
    if training.maxent_clipped and "maxent" in penalties:  # its weights take the place of advantages
        shares, found = maxent_shares(scores, batch, training)  # [E]
        batch = replace(batch, advantages=penalties.pop("maxent") * shares[batch.episode_index])
        measured |= found
    for name in [name for name in penalties if PENALTIES[name].of_reward]:
        value, found = PENALTIES[name](scores, batch, training)  # [N] a constant
        batch = replace(batch, advantages=batch.advantages - penalties.pop(name) * value)
        measured |= found
    if training.has_policy_term():
        weights, found = sampler_weights(batch, training)
        surrogate, measured["train/clip_fraction"] = policy_loss(scores.logprobs, batch, training)  # [N] each
        surrogate, measured = surrogate * weights, measured | found
        if training.maxent_clipped:  # its weights are those of whole completions
            surrogate = batch.spread(batch.episode_mean(surrogate))
        parts["train/policy_loss"] = batch.mean(surrogate)
    for name, weight in penalties.items():
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
    training = controllers.live(run.config.training)
    updates = training.minibatches * training.inner_epochs
    active = [PENALTIES[name] for name, weight in training.penalties().items() if weight > 0]
    pulls = any(penalty.needs_anchor for penalty in active)  # else the distance is only measured, now and then
    want = wanted(training, pulls or run.evaluates_at(step))
    # where nothing else has a gradient, a group that teaches nothing has none; objectives read rewards by themselves
    only_advantages = not pulls and training.entropy_coef == 0 and all(p.is_objective for p in active)
    teaches = Group.varies if any(p.is_objective for p in active) else Group.teaches
    if training.top_entropy_quantile < 1 or (updates > 1 and training.old_logprobs == "trainer"):
        groups = run.engine.score(groups)
    if training.top_entropy_quantile < 1:
        groups = with_advantages_where_uncertain(groups, training.top_entropy_quantile)
    if updates > 1 and training.old_logprobs == "sampler":
        groups = with_sampled_logprobs(groups)
    rate = learning_rate_at(step, run.max_steps, training)
    measured, norms = Measured(), []
    for index in range(updates):
        part = with_loss_weights(groups[index % training.minibatches :: training.minibatches], training)
        teaching = [group for group in part if teaches(group) or not only_advantages]
        idle = [group for group in part if only_advantages and not teaches(group)]
        found = run.engine.forward_backward(teaching, partial(objective, training), idle=idle, **want)
        measured.merge(found if index == 0 else found.without("rollout/mismatch"))  # later the policy has moved
        norms.append(run.engine.optim_step(rate) if teaching else 0.0)
    metrics = measured.means(updates)
    metrics |= {"train/grad_norm": sum(norms) / updates, "train/learning_rate": rate}
    metrics["train/skipped_updates"] = sum(not math.isfinite(norm) for norm in norms)
    return metrics | controllers.steer(metrics, step)


def with_sampled_logprobs(groups: list[Group]) -> list[Group]:
    """The ratios of several updates are to the sampler's log-probs, not to the trainer's own of an extra pass."""
    return [replace(g, episodes=tuple(replace(e, old_logprobs=e.logprobs) for e in g.episodes)) for g in groups]


def with_advantages_where_uncertain(groups: list[Group], share: float) -> list[Group]:
    """Wang et al. 2025 (2506.01939): of all tokens of the rollout those of highest entropy keep theirs."""
    entropies = torch.tensor([h for g in groups for e in g.episodes for h in e.entropies or ()], dtype=torch.float64)
    least = entropies.sort(descending=True).values[max(1, round(share * len(entropies))) - 1].item()

    def choose(episode: Episode) -> Episode:
        pairs = zip(episode.advantages, episode.entropies or (), strict=True)
        return replace(episode, advantages=tuple(a if entropy >= least else 0.0 for a, entropy in pairs))

    return [replace(group, episodes=tuple(map(choose, group.episodes))) for group in groups]


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
    groups, metrics = rollout(run, step)
    groups = with_advantages(groups, training, run.task)
    return metrics | update(run, groups, step), groups


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
