"""MaxEnt-GRPO: per prompt, weights that trade listwise fit, entropy and trust in a reference, in closed form.

Everything here is small: one row per group, one column per completion, `mask` says which entries exist
(default all; an entry that does not exist gets weight 0). The projection of these weights onto tokens
(weighted maximum likelihood) is a penalty and lives in src/penalties.py.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.config import TrainingConfig

TINY = torch.finfo(torch.float32).tiny  # the smallest tau + beta we divide by; its inverse still fits fp32
# of the controllers; wide enough that a run does not meet them
TAU_RANGE, BETA_RANGE = (1e-3, 10.0), (1e-4, 10.0)
ENTROPY_DECAY = 0.9  # of the averaged weight entropy
KL_CLIP, KL_HORIZON = 0.2, 10.0  # at a clipped error beta grows by 0.2 / 10 an update
BONUS_STEP, BONUS_MOST = 0.005, 1.0  # of the weight of the entropy bonus a step; as in TRL


def group_softmax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of each row over its finite, existing entries.

    A row with nothing finite is uniform over what exists; a row with no entries at all is zero.
    """
    scores = _at_least_fp32(scores)
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    finite = mask & scores.isfinite()  # [groups, G]
    usable = torch.where(finite.any(dim=1, keepdim=True), finite, mask)  # [groups, G]
    logits = torch.where(finite, scores, 0.0).masked_fill(~usable, torch.finfo(scores.dtype).min)
    return logits.softmax(dim=1) * usable  # the product empties rows in which softmax saw only fill values


def entropy(weights: Tensor) -> Tensor:
    """Shannon entropy in nats of every row [groups, G] -> [groups], with 0 log 0 = 0 and never below 0."""
    return torch.special.entr(weights).sum(dim=1).clamp_min(0.0)


def listwise_target(rewards: Tensor, temperature: float, epsilon: float, mask: Tensor | None = None) -> Tensor:
    """The target q [groups, G]: a softmax of rewards / temperature with a floor of epsilon / G under every entry.

    The floor keeps log q finite (full support), which the closed form's uniqueness needs.
    """
    if not temperature > 0:
        raise ValueError(f"q_temperature must be > 0, got {temperature}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"q_epsilon must lie in [0, 1], got {epsilon}")
    floor = group_softmax(torch.zeros_like(rewards), mask)  # [groups, G], 1 / G where an entry exists
    return (1 - epsilon) * group_softmax(_at_least_fp32(rewards) / temperature, mask) + epsilon * floor


def maxent_weights(
    q: Tensor,
    reference_logprobs: Tensor,
    tau: float,
    beta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Maximiser of `maxent_objective`, w_i ~ q_i^(1/(tau+beta)) ref_i^(beta/(tau+beta)), as [groups, G].

    tau = inf is uniform, beta = inf is the reference, tau + beta -> 0 is the argmax (ties share it). An entry
    whose score is not finite gets 0; a group with none that is falls back to uniform.
    """
    return group_softmax(_log_scores(q, reference_logprobs, tau, beta, mask), mask)  # [groups, G]


def maxent_objective(
    weights: Tensor, q: Tensor, reference_logprobs: Tensor, tau: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """E_w[log q] + tau H(w) - beta KL(w || ref) per group -> [groups], for finite tau and beta.

    ref is the softmax of the reference log-probs over the group.
    """
    reference = group_softmax(reference_logprobs, mask)  # [groups, G]
    fit = torch.where(weights > 0, weights * q.log(), 0.0).sum(dim=1)  # [groups]
    cross = torch.where(weights > 0, weights * reference.log(), 0.0).sum(dim=1)  # [groups]
    trust = beta * (-entropy(weights) - cross) if beta > 0 else 0.0
    return fit + tau * entropy(weights) - trust


def weight_entropy_gradients(
    weights: Tensor, q: Tensor, reference_logprobs: Tensor, tau: float, beta: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dH(w)/dtau and dH(w)/dbeta, each [groups], of weights that came from these q, reference, tau and beta.

    With s = (log q + beta log ref) / (tau + beta), dH = -Cov_w(log w, ds), and ds/dtau = -s / (tau + beta),
    ds/dbeta = (log ref - s) / (tau + beta).
    """
    scores = _log_scores(q, reference_logprobs, tau, beta, mask)  # [groups, G]
    live = (weights > 0) & scores.isfinite()  # a fallback group has no finite score, so both its gradients are 0
    log_weights = torch.where(live, weights, 1.0).log()  # [groups, G]
    scores = torch.where(live, scores, 0.0)
    reference = torch.where(live & reference_logprobs.isfinite(), reference_logprobs, 0.0)  # [groups, G]
    surprise = log_weights - (weights * log_weights).sum(dim=1, keepdim=True)  # [groups, G], mean 0 under w
    denominator = max(tau + beta, TINY)
    by_tau = (weights * surprise * scores).sum(dim=1) / denominator
    by_beta = (weights * surprise * (scores - reference)).sum(dim=1) / denominator
    return by_tau, by_beta


def semantic_entropy(answers: Sequence[Sequence[Hashable]], length_normalised_logprobs: Tensor) -> Tensor:
    """Entropy over the distinct final answers of each group -> [groups]; a row of answers may be shorter than G.

    A cluster's mass is the summed softmax, over the group, of its completions' mean token log-probs. Equal means
    `==`, so unparsed answers (None) are one cluster; give them distinct values to keep them apart.
    """
    groups, size = length_normalised_logprobs.shape
    if len(answers) != groups or any(len(row) > size for row in answers):
        raise ValueError(f"answers of sizes {[len(row) for row in answers]} do not fit log-probs [{groups}, {size}]")
    device = length_normalised_logprobs.device
    cluster = torch.zeros(groups, size, dtype=torch.long)  # [groups, G]; what does not exist adds 0 to cluster 0
    for index, row in enumerate(answers):
        seen: dict[Hashable, int] = {}
        cluster[index, : len(row)] = torch.tensor([seen.setdefault(answer, len(seen)) for answer in row]).long()
    counts = torch.tensor([len(row) for row in answers], device=device)  # [groups]
    mask = torch.arange(size, device=device) < counts[:, None]  # [groups, G]
    shares = group_softmax(length_normalised_logprobs, mask)  # [groups, G]
    return entropy(torch.zeros_like(shares).scatter_add(1, cluster.to(device), shares))


def seed_grpo_scale(semantic_entropy: Tensor, alpha: float, group_size: int | Tensor) -> Tensor:
    """SEED-GRPO's damping of uncertain prompts, 1 / (1 + alpha / log G * entropy) -> [groups]; 1 for a group of one."""
    group_size = torch.as_tensor(group_size).to(semantic_entropy)  # [] or [groups]
    return 1 / (1 + alpha * semantic_entropy / group_size.clamp_min(2).log())


@dataclass
class Controllers:
    """The live values of tau, beta and the entropy bonus, and what moves them; a value that is not finite does not."""

    training: TrainingConfig
    entropy_average: float | None = None
    entropy_before: float | None = None  # of the policy in the step before

    def __post_init__(self) -> None:
        self.tau, self.beta, self.entropy_coef = self.training.tau, self.training.beta, self.training.entropy_coef

    def live(self, training: TrainingConfig) -> TrainingConfig:
        """The config with the live values. The bonus acts only where the entropy was below its target."""
        target, before = training.entropy_target, self.entropy_before
        rests = target is not None and before is not None and before > target
        return replace(training, tau=self.tau, beta=self.beta, entropy_coef=0.0 if rests else self.entropy_coef)

    def steer(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """Move all by what the step has measured; returns their values, where the loss reads them."""
        training = self.training
        bonus = self.update_entropy_coef(metrics.get("train/entropy", math.nan))
        if "maxent/weight_entropy" in metrics:
            measured, target = metrics["maxent/weight_entropy"], training.tau_target_entropy
            if training.meta_lr > 0 and target is not None:
                error = 2 * (measured - target)
                self.meta_step(*(error * metrics[f"maxent/entropy_slope_{name}"] for name in ("tau", "beta")))
            else:
                self.update_tau(measured, step)
        if "train/kl_k3" in metrics:
            self.update_beta(metrics["train/kl_k3"])
        reads_beta = isinstance(training.loss_type, str) and training.loss_type not in ("none", "listwise_kl")
        live = bonus | ({"train/beta": self.beta} if reads_beta or "maxent" in training.penalties() else {})
        return live | {"maxent/tau": self.tau} if "maxent" in training.penalties() else live

    def update_entropy_coef(self, entropy: float) -> dict[str, float]:
        """Skywork-OR1 (He et al. 2025, 2505.22312): a fixed step up below the target, else down."""
        target = self.training.entropy_target
        if target is None:
            return {}
        if math.isfinite(entropy):
            moved = self.entropy_coef + (BONUS_STEP if entropy <= target else -BONUS_STEP)
            self.entropy_coef, self.entropy_before = min(max(moved, 0.0), BONUS_MOST), entropy
        return {"train/entropy_coef": self.entropy_coef}

    def update_tau(self, measured_entropy: float, step: int) -> None:
        """Move log tau by the distance of the averaged weight entropy from its target: too much entropy, less tau."""
        target = self.training.tau_target_entropy
        if target is None or not math.isfinite(measured_entropy):
            return
        previous = measured_entropy if self.entropy_average is None else self.entropy_average
        self.entropy_average = ENTROPY_DECAY * previous + (1 - ENTROPY_DECAY) * measured_entropy
        if step > self.training.tau_warmup_steps:  # in these steps the average warms, and tau waits
            self.tau = _log_step(self.tau, self.training.tau_lr * (target - self.entropy_average), *TAU_RANGE)

    def update_beta(self, measured_kl: float) -> None:
        """Ziegler et al. 2019, section 2.2: beta grows in proportion to the clipped relative error of the KL."""
        target = self.training.beta_kl_target
        if target is None or not math.isfinite(measured_kl):
            return
        error = min(max(measured_kl / target - 1, -KL_CLIP), KL_CLIP)
        self.beta = min(max(self.beta * (1 + error / KL_HORIZON), BETA_RANGE[0]), BETA_RANGE[1])

    def meta_step(self, tau_gradient: float, beta_gradient: float) -> None:
        """One descent step in tau and beta of a controller objective with these gradients.

        A gradient that is not finite leaves its parameter alone, and so does a parameter of 0 or inf.
        """
        for name, gradient, (low, high) in (("tau", tau_gradient, TAU_RANGE), ("beta", beta_gradient, BETA_RANGE)):
            value = getattr(self, name)
            if gradient and math.isfinite(gradient) and 0 < value < math.inf:
                setattr(self, name, min(max(value - self.training.meta_lr * gradient, low), high))

    def state_dict(self) -> dict[str, float | None]:
        names = ("tau", "beta", "entropy_coef", "entropy_average", "entropy_before")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _log_scores(q: Tensor, reference_logprobs: Tensor, tau: float, beta: float, mask: Tensor | None) -> Tensor:
    """(log q + beta log ref) / (tau + beta) [groups, G], each group's best at 0 so that tiny denominators are safe."""
    q, reference_logprobs = _at_least_fp32(q), _at_least_fp32(reference_logprobs)
    if not (tau >= 0 and beta >= 0) or (math.isinf(tau) and math.isinf(beta)):
        raise ValueError(f"tau and beta must be >= 0 and not both infinite, got tau={tau}, beta={beta}")
    if math.isinf(tau):
        return torch.zeros_like(q)
    if math.isinf(beta):
        return reference_logprobs
    scale = max(1.0, tau + beta)  # divide before adding where beta is large, after where the sum is small
    scores = q.log() / scale
    if beta > 0:  # at 0 the reference has no say, not even where it is -inf
        scores = scores + reference_logprobs * (beta / scale)
    known = scores.isfinite() if mask is None else mask & scores.isfinite()  # [groups, G]
    best = scores.masked_fill(~known, -math.inf).amax(dim=1, keepdim=True)  # [groups, 1]
    return (scores - best) * (scale / max(tau + beta, TINY))


def _log_step(value: float, log_step: float, low: float, high: float) -> float:
    """value * exp(log_step) kept in [low, high], without overflow on the way."""
    factor = math.exp(min(log_step, math.log(high / low)))
    return min(max(min(max(value, low), high) * factor, low), high)
