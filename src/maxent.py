"""MaxEnt-GRPO: per prompt, weights that trade listwise fit, entropy and trust in a reference, in closed form.

Everything here is small: one row per group, one column per completion, `mask` says which entries exist
(default all; an entry that does not exist gets weight 0). The projection of these weights onto tokens
(weighted maximum likelihood) is a penalty and lives in src/penalties.py.
"""

import json
import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # the smallest tau + beta we divide by; its inverse still fits fp32


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


def length_normalise(logprob_sums: Tensor, token_counts: Tensor) -> Tensor:
    """Mean log-prob per token from sums [groups, G]; an empty completion keeps its sum."""
    return logprob_sums / token_counts.clamp_min(1)


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
    token_counts: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Maximiser of `maxent_objective`, w_i ~ q_i^(1/(tau+beta)) ref_i^(beta/(tau+beta)), as [groups, G].

    tau = inf is uniform, beta = inf is the reference, tau + beta -> 0 is the argmax (ties share it). An entry
    whose score is not finite gets 0; a group with none that is falls back to uniform. `token_counts` divides
    each weight by its completion's length and renormalises: use it when the likelihood that follows sums over
    tokens, so that a completion pulls by its weight and not by weight x length; over token means leave it out.
    """
    weights = group_softmax(_log_scores(q, reference_logprobs, tau, beta, mask), mask)  # [groups, G]
    if token_counts is None:
        return weights
    per_token = weights / token_counts.clamp_min(1)  # [groups, G]
    return per_token / per_token.sum(dim=1, keepdim=True).clamp_min(TINY)


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
    ds/dbeta = (log ref - s) / (tau + beta). Token counts shift log w by what depends on neither, so it holds with them.
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


def entropy_target_gradients(
    weights: Tensor,
    q: Tensor,
    reference_logprobs: Tensor,
    tau: float,
    beta: float,
    target: float,
    mask: Tensor | None = None,
) -> tuple[float, float]:
    """Gradients w.r.t. tau and beta of (mean weight entropy - target)^2: what `Controllers.meta_step` is fed with."""
    present = weights.sum(dim=1) > 0  # [groups], a group without entries has no entropy to speak of
    by_tau, by_beta = weight_entropy_gradients(weights, q, reference_logprobs, tau, beta, mask)
    groups = present.sum().clamp_min(1)
    slope = 2 * (entropy(weights).sum() / groups - target) / groups
    return float(slope * by_tau.sum()), float(slope * by_beta.sum())


def weight_statistics(weights: Tensor, advantages: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """What is logged of a step's weights, in nats, over the groups that have entries.

    `weight_entropy_normalized` divides by log of the group's own size (0 for a group of one). Advantage entropy
    is that of softmax(advantages) over the group: near log G nothing stands out, near 0 one completion does.
    """
    mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    present = mask.any(dim=1)  # [groups]
    if not present.any():
        present = ~present  # no entries anywhere: every figure below is then 0
    of_weights = entropy(weights)[present]  # [groups that exist]
    of_advantages = entropy(group_softmax(advantages, mask))[present]
    sizes = mask.sum(dim=1)[present].to(of_weights.dtype)  # [groups that exist]
    return {
        "weight_entropy": of_weights.mean().item(),
        "weight_entropy_min": of_weights.min().item(),
        "weight_entropy_max": of_weights.max().item(),
        "weight_entropy_normalized": (of_weights / sizes.clamp_min(2).log()).mean().item(),
        "advantage_entropy_mean": of_advantages.mean().item(),
        "advantage_entropy_std": of_advantages.std(correction=0).item(),
    }


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


@dataclass(frozen=True)
class ControllerSettings:
    """How tau and beta are steered. A target of None leaves that controller off; entropies are in nats."""

    tau_target_entropy: float | None = None
    tau_target_entropy_start: float | None = None  # annealed linearly to the target, counted from the end of warm-up
    tau_target_anneal_steps: int = 0
    tau_lr: float = 0.05
    tau_min: float = 1e-3
    tau_max: float = 10.0
    tau_warmup_steps: int = 0
    entropy_decay: float = 0.9
    kl_target: float | None = None
    kl_horizon: float = 10.0  # in updates: at a clipped error, beta grows by kl_clip / kl_horizon each time
    kl_clip: float = 0.2
    beta_min: float = 1e-4
    beta_max: float = 10.0
    meta_lr: float = 0.1

    def __post_init__(self):
        """Refuse what would make a logarithm, a division or a sign go wrong later."""
        checks = {
            "0 < tau_min <= tau_max < inf": 0 < self.tau_min <= self.tau_max < math.inf,
            "0 < beta_min <= beta_max < inf": 0 < self.beta_min <= self.beta_max < math.inf,
            "0 <= entropy_decay < 1": 0 <= self.entropy_decay < 1,
            "kl_target > 0 (or None)": self.kl_target is None or self.kl_target > 0,
            "0 < kl_clip < kl_horizon": 0 < self.kl_clip < self.kl_horizon,
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise ValueError(f"controller settings must satisfy {' and '.join(broken)}")

    def target_entropy(self, step: int) -> float | None:
        """The weight entropy asked for at this step; None where none is."""
        start, end = self.tau_target_entropy_start, self.tau_target_entropy
        if start is None or end is None or self.tau_target_anneal_steps <= 0:
            return end
        done = min(max((step - self.tau_warmup_steps) / self.tau_target_anneal_steps, 0.0), 1.0)
        return (1 - done) * start + done * end


@dataclass
class Controllers:
    """tau and beta with the little memory their controllers need. Every update returns whether a value moved.

    A measurement that is not finite is skipped: one broken step must not poison an average for ten.
    """

    tau: float
    beta: float
    settings: ControllerSettings = field(default_factory=ControllerSettings)
    entropy_average: float | None = None
    tau_updates: int = 0
    beta_updates: int = 0
    meta_updates: int = 0

    def update_tau(self, measured_entropy: float, step: int, learning_rate_scale: float = 1.0) -> bool:
        """Move log tau by the distance of the averaged weight entropy from its target: too much entropy, less tau."""
        settings, target = self.settings, self.settings.target_entropy(step)
        if target is None or not math.isfinite(measured_entropy):
            return False
        previous = measured_entropy if self.entropy_average is None else self.entropy_average
        self.entropy_average = settings.entropy_decay * previous + (1 - settings.entropy_decay) * measured_entropy
        if step < settings.tau_warmup_steps:
            return False  # the average already warms, tau waits
        self.tau_updates += 1
        error = target - self.entropy_average
        before, log_step = self.tau, settings.tau_lr * learning_rate_scale * error
        self.tau = _log_step(before, log_step, settings.tau_min, settings.tau_max)
        return self.tau != before

    def update_beta(self, measured_kl: float) -> bool:
        """Ziegler et al. 2019, section 2.2: beta grows in proportion to the clipped relative error of the KL."""
        settings = self.settings
        if settings.kl_target is None or not math.isfinite(measured_kl):
            return False
        self.beta_updates += 1
        error = min(max(measured_kl / settings.kl_target - 1, -settings.kl_clip), settings.kl_clip)
        before = self.beta
        self.beta = min(max(before * (1 + error / settings.kl_horizon), settings.beta_min), settings.beta_max)
        return self.beta != before

    def meta_step(
        self, tau_gradient: float | None, beta_gradient: float | None, learning_rate_scale: float = 1.0
    ) -> bool:
        """One descent step in log tau and log beta, given a controller objective's gradients w.r.t. tau and beta.

        A gradient that is None, zero or not finite leaves its parameter alone, and so does a parameter of 0 or inf.
        """
        settings, before = self.settings, (self.tau, self.beta)
        learning_rate = settings.meta_lr * learning_rate_scale
        tau_slope = (tau_gradient or 0.0) * self.tau  # d/d log x = x d/dx
        beta_slope = (beta_gradient or 0.0) * self.beta
        if tau_slope and math.isfinite(tau_slope):
            self.tau = _log_step(self.tau, -learning_rate * tau_slope, settings.tau_min, settings.tau_max)
        if beta_slope and math.isfinite(beta_slope):
            self.beta = _log_step(self.beta, -learning_rate * beta_slope, settings.beta_min, settings.beta_max)
        moved = (self.tau, self.beta) != before
        self.meta_updates += moved
        return moved

    def state_dict(self) -> dict[str, float | int | None]:
        """Everything that changes during a run; the settings come from the config."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "settings"}

    def load_state_dict(self, state: dict) -> None:
        """Take over a state whole, or refuse it and stay as we were."""
        if set(state) != set(self.state_dict()):
            raise ValueError(f"controller state has keys {sorted(state)}, expected {sorted(self.state_dict())}")
        average = state["entropy_average"]
        loaded: dict[str, float | None] = {"tau": float(state["tau"]), "beta": float(state["beta"])}
        loaded["entropy_average"] = None if average is None else float(average)
        loaded |= {name: int(state[name]) for name in ("tau_updates", "beta_updates", "meta_updates")}
        for name, value in loaded.items():
            setattr(self, name, value)

    def save(self, path: str | Path) -> None:
        """Write the state as readable JSON, atomically: a reader sees the old file or the new one."""
        path = Path(path)
        # JSON has no infinity, and tau may be infinite: written as "inf", which float() reads back.
        state = {name: str(value) if value == math.inf else value for name, value in self.state_dict().items()}
        text = json.dumps(state, indent=2, allow_nan=False) + "\n"
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote; floats come back bit for bit, as JSON holds their shortest exact form."""
        self.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))


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
