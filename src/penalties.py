"""What keeps the policy near its anchor: one function per penalty, chosen by `loss_type`.

A penalty is `fn(scores, batch, training) -> (value, metrics)`. The value is per token [N]; an episode's [E] is spread
over its tokens by `batch.spread`. The loop adds weight x value to the loss, and averages the metrics over the step. To
add one, write the function under @penalty("name") and use the name in a YAML: nothing else knows the names. The
decorator is also read as text (src/config.py), so its arguments are literals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.maxent import entropy, group_softmax, listwise_target, maxent_weights, weight_entropy_gradients
from src.records import Batch, Scores
from src.sinkhorn import sinkhorn_divergence

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: beyond it the estimate is worthless, and exp overflows fp32 at 88
OT_ITERATIONS = 10  # of Sinkhorn; equal paths have distance 0 after any number


@dataclass(frozen=True)
class Penalty:
    """A penalty, and what it needs; see `penalty`."""

    name: str
    function: Callable[..., Any]
    needs_anchor: bool
    is_objective: bool
    of_reward: bool
    exact_kl: bool
    of_logits: bool

    @property
    def over_vocabulary(self) -> bool:
        return self.exact_kl or self.of_logits

    def distance(self, training) -> Any:
        """What the engine is to measure over the vocabulary: the direction of a KL, or a function of logits."""
        return self.function if self.of_logits else training.kl_direction

    def __call__(self, scores: Scores, batch: Batch, training) -> tuple[Tensor, dict[str, Tensor]]:
        """The value of each token [N], and metrics."""
        return (scores.distances[self.name], {}) if self.of_logits else self.function(scores, batch, training)


PENALTIES: dict[str, Penalty] = {}


def penalty(
    name: str,
    *,
    anchor: bool = True,
    objective: bool = False,
    of_reward: bool = False,
    reads: tuple[str, ...] = (),
    exact_kl: bool = False,
    of_logits: bool = False,
):
    """Register a penalty, and say what it needs.

    An `objective` takes the place of the policy term, and sees each group whole. One `of_reward` is a constant that the
    loop takes from the advantage of each token. `reads`: keys of the config that only such penalties read.
    `of_logits`: the function is a distance of two distributions over the vocabulary, fn(logits, anchor_logits)
    [tokens, vocab] -> [tokens], and autograd differentiates it chunk by chunk.
    """

    def register(function: Any) -> Any:
        PENALTIES[name] = Penalty(name, function, anchor, objective, of_reward, exact_kl, of_logits)
        return function

    return register


def hinge(name: str, value: Tensor, target: float, batch: Batch) -> tuple[Tensor, dict]:
    """[N] what the mean of a completion exceeds the target by, weighed token by token as without a target.

    And the share of completions that do; the console warns where for long none does.
    """
    if target == 0:
        return value, {}
    beyond = batch.episode_mean(value.detach()) > target  # [E]
    return (value - target) * beyond[batch.episode_index], {f"train/beyond_target/{name}": beyond.float()}


@penalty("kl", exact_kl=True, reads=("kl_target", "kl_direction", "beta_kl_target"))
def exact_kl(scores: Scores, batch: Batch, training) -> tuple[Tensor, dict]:
    """KL over the whole vocabulary at every sampled position, in `kl_direction`."""
    return hinge("kl", scores.distances["kl"], training.kl_target, batch)


def kl_estimates(logprobs: Tensor, anchor_logprobs: Tensor) -> dict[str, Tensor]:
    """Schulman's estimators of KL(policy || anchor) from tokens sampled by the policy, each [N].

    As a loss (differentiated at the sampled tokens) their expected gradients differ: k1's is zero, k2's is that of the
    reverse KL(policy || anchor), k3's is that of the forward KL(anchor || policy). See Schulman, "Approximating KL
    divergence" (2020), and Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL" (2025).
    """
    log_ratio = anchor_logprobs - logprobs  # [N] log anchor/policy
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)  # for k3 only: k1 and k2 have no exp, and keep their gradient
    return {"k1": -log_ratio, "k2": 0.5 * log_ratio.square(), "k3": torch.expm1(bounded) - bounded}


@penalty("approx_kl", reads=("kl_target", "kl_estimator", "beta_kl_target"))
def approximate_kl(scores: Scores, batch: Batch, training) -> tuple[Tensor, dict]:
    """A sampled estimate, `kl_estimator`; tokens of an older policy are reweighted by the ratio, a constant.

    With k3_unbiased the ratio is differentiated too, which makes the gradient that of the reverse KL (DeepSeek-V3.2).
    """
    assert scores.anchor_logprobs is not None and batch.old_logprobs is not None
    name, differentiated = training.kl_estimator.removesuffix("_unbiased"), training.kl_estimator.endswith("_unbiased")
    estimate = kl_estimates(scores.logprobs, scores.anchor_logprobs)[name]  # [N]
    log_weight = (scores.logprobs - batch.old_logprobs).clamp(max=MAX_LOG_RATIO)
    weight = (log_weight if differentiated else log_weight.detach()).exp()
    return hinge("approx_kl", weight * estimate, training.kl_target, batch)


@penalty("kl_in_reward", of_reward=True, reads=("beta_kl_target",))
def kl_in_reward(scores: Scores, batch: Batch, training) -> tuple[Tensor, dict]:
    """The k1 of each sampled token; in the first update the gradient is on average that of the exact reverse KL there.

    That is of the KL at each position, what stands before it held fixed, as `kl` has it. "A Comedy of Estimators"
    (2512.21852) is about the KL of whole completions, whose estimate without bias is the sum of k1 in the reward.
    """
    assert scores.anchor_logprobs is not None and batch.old_logprobs is not None
    return (batch.old_logprobs - scores.anchor_logprobs).detach(), {}


@penalty("ot", reads=("ot_target", "ot_window", "ot_eps", "beta_kl_target"))
def optimal_transport(scores: Scores, batch: Batch, training) -> tuple[Tensor, dict]:
    """Sinkhorn divergence between the policy's and the anchor's last hidden states along each completion."""
    assert scores.anchor_hidden is not None
    value = sinkhorn_divergence(
        scores.hidden, scores.anchor_hidden, batch.episode_index, len(batch.lengths),
        window=training.ot_window, eps=training.ot_eps, iterations=OT_ITERATIONS, taper=True,
    )  # fmt: skip  # [E]
    if training.ot_target == 0:
        return batch.spread(value), {"train/ot": value}
    excess = (value - training.ot_target).clamp(min=0)  # [E]
    return batch.spread(excess), {"train/ot": value, "train/beyond_target/ot": (excess.detach() > 0).float()}


def has_variance(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """[groups, G] -> [groups, 1]: whether a group's rewards differ by more than 1e-4 of the largest (and of rounding).

    A group without variance teaches nothing.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    highest = rewards.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    lowest = rewards.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    largest = rewards.masked_fill(~mask, 0).abs().amax(1, keepdim=True)
    return highest - lowest > (1e-4 * largest).clamp(min=1e-12)


@penalty(
    "maxent",
    objective=True,
    reads=("q_temperature", "q_epsilon", "length_normalized", "tau", "maxent_baseline", "maxent_clipped",
           "tau_target_entropy", "tau_lr", "tau_warmup_steps", "meta_lr"),
)  # fmt: skip
def maximum_entropy(scores: Scores, batch: Batch, training) -> tuple[Tensor, dict]:
    """Weighted maximum likelihood towards the closed-form weights of src/maxent.py, on mean token log-probs.

    With the baseline the weights are w - 1/G, so that uniform weights do nothing. With `maxent_clipped` the loop takes
    them as the advantages of the policy loss instead. A group whose rewards are all equal contributes nothing.
    """
    shares, metrics = maxent_shares(scores, batch, training)  # [E]
    return batch.spread(-shares * batch.episode_mean(scores.logprobs)), metrics


def maxent_shares(scores: Scores, batch: Batch, training) -> tuple[Tensor, dict]:
    """What each completion [E] is pulled by, such that the mean over episodes is that over groups of weighted sums."""
    assert scores.anchor_logprobs is not None
    reference = batch.episode_mean if training.length_normalized else batch.episode_sum
    reference_logprobs, mask = batch.by_group(reference(scores.anchor_logprobs))  # [groups, G]
    rewards = batch.by_group(batch.rewards)[0]
    q = listwise_target(rewards, training.q_temperature, training.q_epsilon, mask)
    weights = maxent_weights(q, reference_logprobs, training.tau, training.beta, mask)  # [groups, G]
    sizes = mask.sum(1, keepdim=True)
    signed = weights - mask.to(weights.dtype) / sizes if training.maxent_baseline else weights
    shares = (signed * sizes * has_variance(rewards, mask))[mask]  # [E]
    advantages = batch.by_group(batch.episode_mean(batch.advantages))[0]
    return shares, weight_metrics(weights, q, reference_logprobs, advantages, mask, training)


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


@penalty(
    "listwise_kl", anchor=False, objective=True,
    reads=("kl_direction", "q_temperature", "q_epsilon", "length_normalized"),
)  # fmt: skip
def listwise_kl(scores: Scores, batch: Batch, training) -> tuple[Tensor, dict]:
    """KL over a group between the softmax of the scores and the softmax of the policy's sequence log-probs.

    The target (from the scores) is a constant; a group whose scores are all equal contributes nothing.
    """
    sequence = batch.episode_mean if training.length_normalized else batch.episode_sum
    logprobs, mask = batch.by_group(sequence(scores.logprobs))  # [groups, G]
    rewards = batch.by_group(batch.rewards)[0]
    log_target = listwise_target(rewards, training.q_temperature, training.q_epsilon, mask).clamp(min=1e-30).log()
    log_policy = logprobs.masked_fill(~mask, -torch.inf).log_softmax(1).masked_fill(~mask, 0.0)
    p, q = (log_policy, log_target) if training.kl_direction == "reverse" else (log_target, log_policy)
    terms = p.exp() * (p - q) * mask  # [groups, G]
    shares = (terms * mask.sum(1, keepdim=True) * has_variance(rewards, mask))[mask]  # [E]
    return batch.spread(shares), {"train/listwise_kl": terms.sum(1).detach()}
