"""What keeps the policy near its anchor: one function per penalty, chosen by `loss_type`.

A penalty is `fn(PenaltyInputs, training config) -> (value, metrics)`. The value is per token [N], weighed as loss_agg
says, or per episode [E], averaged over episodes; the loop adds beta x value to the loss. Metrics are tensors that the
loop averages over the step. To add one: write the function under @penalty("name"), put the name into LOSS_TYPES in
src/config.py (and into RATIO_READERS beside it unless it takes the place of the policy loss), and use it in a YAML.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from src.config import LOSS_TYPES
from src.maxent import entropy, group_softmax, listwise_target, maxent_weights, weight_entropy_gradients
from src.packing import PackedBatch
from src.scoring import Scores
from src.sinkhorn import sinkhorn_divergence

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: beyond it the estimate is worthless, and exp overflows fp32 at 88


@dataclass(frozen=True)
class PenaltyInputs:
    """A packed batch and its scores: N completion tokens of E episodes. No padding, so there is no mask to forget."""

    scores: Scores
    batch: PackedBatch

    def episode_mean(self, values: Tensor) -> Tensor:
        """[N] -> [E]."""
        return self.episode_sum(values) / self.batch.lengths

    def episode_sum(self, values: Tensor) -> Tensor:
        """[N] -> [E]."""
        total = torch.zeros(len(self.batch.lengths), device=values.device, dtype=values.dtype)
        return total.index_add(0, self.batch.episode_index, values)

    def by_group(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Per-episode values [E] as rows [groups, G] of the largest group, and a mask of which entries exist."""
        counts = torch.bincount(self.batch.group_index, minlength=self.batch.groups)  # [groups]
        mask = torch.arange(int(counts.max()), device=values.device)[None] < counts[:, None]  # [groups, G]
        return torch.zeros(mask.shape, device=values.device, dtype=values.dtype).masked_scatter(mask, values), mask


PENALTIES: dict[str, Any] = {}  # functions, with what `penalty` notes on them


def penalty(name: str, anchor: bool = True, exact_kl: bool = False, objective: bool = False, per_episode=False):
    """Register a penalty, and say whether it needs the anchor's scores and the exact KL, and returns [E] and not [N].

    An `objective` takes the place of the policy term, with weight 1, and sees each group whole. `per_episode` may be a
    function of the training config.
    """

    def register(function: Any) -> Any:
        function.needs_anchor, function.needs_exact_kl, function.is_objective = anchor, exact_kl, objective
        function.per_episode = per_episode if callable(per_episode) else lambda training: per_episode
        PENALTIES[name] = function
        return function

    return register


def hinge(value: Tensor, target: float, inputs: PenaltyInputs) -> Tensor:
    """The value as it is, or, with a target, per episode [E] what its mean exceeds the target by."""
    if target == 0:
        return value
    return ((inputs.episode_mean(value) if len(value) == len(inputs.batch.target_ids) else value) - target).clamp(min=0)


@penalty("none", anchor=False)
def no_penalty(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """Plain policy gradient."""
    return torch.zeros_like(inputs.scores.logprobs), {}


@penalty("kl", exact_kl=True, per_episode=lambda training: training.kl_target > 0)
def exact_kl(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """KL over the whole vocabulary at every sampled position; src/scoring.py computes it in `kl_direction`."""
    assert inputs.scores.kl is not None  # exact_kl=True asks for it
    return hinge(inputs.scores.kl, training.kl_target, inputs), {}


def kl_estimates(logprobs: Tensor, anchor_logprobs: Tensor) -> dict[str, Tensor]:
    """Schulman's estimators of KL(policy || anchor) from tokens sampled by the policy, each [N].

    As a loss (differentiated at the sampled tokens) their expected gradients differ: k1's is zero, k2's is that of the
    reverse KL(policy || anchor), k3's is that of the forward KL(anchor || policy). See Schulman, "Approximating KL
    divergence" (2020), and Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL" (2025).
    """
    log_ratio = anchor_logprobs - logprobs  # [N] log anchor/policy
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)  # for k3 only: k1 and k2 have no exp, and keep their gradient
    return {"k1": -log_ratio, "k2": 0.5 * log_ratio.square(), "k3": torch.expm1(bounded) - bounded}


@penalty("approx_kl", per_episode=lambda training: training.kl_target > 0)
def approximate_kl(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """A sampled estimate, `kl_estimator`; tokens of an older policy are reweighted by the (constant) ratio."""
    scores = inputs.scores
    assert scores.anchor_logprobs is not None  # anchor=True asks for it
    estimate = kl_estimates(scores.logprobs, scores.anchor_logprobs)[training.kl_estimator]  # [N]
    log_weight = (scores.logprobs - inputs.batch.old_logprobs).detach().clamp(max=MAX_LOG_RATIO)
    return hinge(log_weight.exp() * estimate, training.kl_target, inputs), {}


@penalty("ot", per_episode=True)
def optimal_transport(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """Sinkhorn divergence between the policy's and the anchor's last hidden states along each completion, [E]."""
    assert inputs.scores.anchor_hidden is not None  # anchor=True asks for it
    value = sinkhorn_divergence(
        inputs.scores.hidden, inputs.scores.anchor_hidden, inputs.batch.episode_index, len(inputs.batch.lengths),
        window=training.ot_window, eps=training.ot_eps, iterations=training.ot_iters, debias=training.ot_debias,
        taper=training.ot_taper, unroll=training.ot_unroll, backend=training.ot_backend,
    )  # fmt: skip
    return hinge(value, training.ot_target, inputs), {"train/ot": value.detach()}


def has_variance(rewards: Tensor, mask: Tensor) -> Tensor:
    """[groups, G] -> [groups, 1]: whether a group's rewards differ; one without variance teaches nothing."""
    highest = rewards.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    lowest = rewards.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    return highest - lowest > 1e-6


def policy_loss(logprobs: Tensor, batch: PackedBatch, training) -> tuple[Tensor, Tensor]:
    """The clipped surrogate per token [N], and where the clip binds [N].

    PPO (Schulman et al. 2017, equation 7), with the switches of GSPO (one ratio a sequence), DAPO (epsilon_high),
    INTELLECT-2 (delta) and CISPO (MiniMax-M1: a clipped, constant weight of the log-prob).
    """
    advantages = batch.advantages[batch.episode_index]  # [N]
    log_ratio = logprobs - batch.old_logprobs  # [N]
    if training.importance_sampling_level == "sequence":
        total = log_ratio.new_zeros(len(batch.lengths)).index_add(0, batch.episode_index, log_ratio)
        log_ratio = (total / batch.lengths)[batch.episode_index]  # [N] the same for each token of an episode
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    high = training.epsilon if training.epsilon_high is None else training.epsilon_high
    clipped = ratio.clamp(1 - training.epsilon, 1 + high)
    if training.policy_loss == "cispo":
        weight = ratio.clamp(max=1 + high).detach()
        return -weight * advantages * logprobs, (ratio > 1 + high).float()
    bounded = ratio if training.delta is None else ratio.clamp(max=training.delta)
    surrogate = torch.minimum(bounded * advantages, clipped * advantages)
    return -surrogate, (surrogate != ratio * advantages).float()


@penalty("maxent", objective=True, per_episode=True)
def maximum_entropy(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """Weighted maximum likelihood towards the closed-form weights of src/maxent.py, on mean token log-probs, [E].

    With the baseline the weights are w - 1/G, so that uniform weights do nothing. `maxent_clipped` uses them as the
    advantages of the clipped policy loss. A group whose rewards are all equal contributes nothing.
    """
    scores, batch = inputs.scores, inputs.batch
    assert scores.anchor_logprobs is not None  # anchor=True asks for it
    reference = inputs.episode_mean if training.length_normalized else inputs.episode_sum
    reference_logprobs, mask = inputs.by_group(reference(scores.anchor_logprobs))  # [groups, G]
    rewards = inputs.by_group(batch.rewards)[0]
    counts = inputs.by_group(batch.lengths.float())[0] if training.maxent_token_counts else None
    q = listwise_target(rewards, training.q_temperature, training.q_epsilon, mask)
    weights = maxent_weights(q, reference_logprobs, training.tau, training.beta, counts, mask)  # [groups, G]
    sizes = mask.sum(1, keepdim=True)
    signed = weights - mask.to(weights.dtype) / sizes if training.maxent_baseline else weights
    # times G: the mean over episodes is then the mean over groups (of equal size) of their weighted sums
    shares = (signed * sizes * has_variance(rewards, mask))[mask]  # [E]
    metrics = weight_metrics(weights, q, reference_logprobs, inputs.by_group(batch.advantages)[0], mask, training)
    if training.maxent_clipped:
        value, _ = policy_loss(scores.logprobs, replace(batch, advantages=shares), training)
        return inputs.episode_mean(value), metrics
    return -shares * inputs.episode_mean(scores.logprobs), metrics


def weight_metrics(weights, q, reference_logprobs, advantages, mask, training) -> dict[str, Tensor]:
    """Entropies of the weights and of the softmax of the advantages, and what the meta-controller needs.

    Of the groups whose weights are used, those with variance: the others would steer tau and do nothing else.
    """
    used = has_variance(advantages, mask)[:, 0]
    weights, q, reference_logprobs, advantages, mask = (
        rows[used] for rows in (weights, q, reference_logprobs, advantages, mask)
    )
    entropies = entropy(weights)
    metrics = {
        "maxent/weight_entropy": entropies,
        "maxent/weight_entropy_min": entropies,
        "maxent/weight_entropy_max": entropies,
        "maxent/weight_entropy_normalized": entropies / mask.sum(1).log(),
        "maxent/advantage_entropy": entropy(group_softmax(advantages, mask)),
    }
    if training.meta_lr > 0:
        slopes = weight_entropy_gradients(weights, q, reference_logprobs, training.tau, training.beta, mask)
        metrics |= {"maxent/entropy_slope_tau": slopes[0], "maxent/entropy_slope_beta": slopes[1]}
    return metrics


@penalty("listwise_kl", anchor=False, objective=True, per_episode=True)
def listwise_kl(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """KL over a group between the softmax of the scores and the softmax of the policy's sequence log-probs, [E].

    The target (from the scores) is a constant; a group whose scores are all equal contributes nothing.
    """
    sequence = inputs.episode_mean if training.length_normalized else inputs.episode_sum
    logprobs, mask = inputs.by_group(sequence(inputs.scores.logprobs))  # [groups, G]
    rewards = inputs.by_group(inputs.batch.rewards)[0]
    log_target = listwise_target(rewards, training.q_temperature, training.q_epsilon, mask).clamp(min=1e-30).log()
    log_policy = logprobs.masked_fill(~mask, -torch.inf).log_softmax(1).masked_fill(~mask, 0.0)
    p, q = (log_policy, log_target) if training.kl_direction == "reverse" else (log_target, log_policy)
    terms = p.exp() * (p - q) * mask  # [groups, G]
    shares = (terms * mask.sum(1, keepdim=True) * has_variance(rewards, mask))[mask]  # [E]
    return shares, {"train/listwise_kl": terms.sum(1).detach()}


assert set(PENALTIES) == set(LOSS_TYPES), "every loss type of src/config.py is a penalty here, and the reverse"
