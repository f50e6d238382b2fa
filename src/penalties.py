"""What keeps the policy near its anchor: one function per penalty, chosen by `loss_type`.

A penalty is `fn(PenaltyInputs, training config) -> (value, metrics)`. The value is per token [N] or per episode [E]; the
loop weighs it (one denominator per update) and adds beta x value to the loss. To add one: write the function under
@penalty("name"), put the name into LOSS_TYPES in src/config.py, and use it in a YAML.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.config import LOSS_TYPES
from src.packing import PackedBatch
from src.scoring import Scores

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: beyond it the estimate is worthless, and exp overflows fp32 at 88


@dataclass(frozen=True)
class PenaltyInputs:
    """A packed batch and its scores: N completion tokens of E episodes. No padding, so there is no mask to forget."""

    scores: Scores
    batch: PackedBatch

    def episode_mean(self, values: Tensor) -> Tensor:
        """[N] -> [E]."""
        total = torch.zeros(len(self.batch.lengths), device=values.device, dtype=values.dtype)
        return total.index_add(0, self.batch.episode_index, values) / self.batch.lengths


Penalty = Callable[[PenaltyInputs, object], tuple[Tensor, dict[str, float]]]
PENALTIES: dict[str, Penalty] = {}


def penalty(name: str, anchor: bool = True, exact_kl: bool = False) -> Callable[[Penalty], Penalty]:
    """Register a penalty and say what it needs: scores of the anchor model, the exact KL."""

    def register(function: Penalty) -> Penalty:
        function.needs_anchor, function.needs_exact_kl = anchor, exact_kl
        PENALTIES[name] = function
        return function

    return register


def hinge(value: Tensor, target: float, inputs: PenaltyInputs) -> Tensor:
    """Per-token value [N] as it is, or, with a target, per episode [E] what its mean exceeds the target by."""
    return value if target == 0 else (inputs.episode_mean(value) - target).clamp(min=0)


@penalty("none", anchor=False)
def no_penalty(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """Plain policy gradient."""
    return torch.zeros_like(inputs.scores.logprobs), {}


@penalty("kl", exact_kl=True)
def exact_kl(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """KL over the whole vocabulary at every sampled position; src/scoring.py computes it in `kl_direction`."""
    return hinge(inputs.scores.kl, training.kl_target, inputs), {}


def kl_estimates(logprobs: Tensor, anchor_logprobs: Tensor) -> dict[str, Tensor]:
    """Schulman's estimators of KL(policy || anchor) from tokens sampled by the policy, each [N].

    As a loss (differentiated at the sampled tokens) their expected gradients differ: k1's is zero, k2's is that of the
    reverse KL(policy || anchor), k3's is that of the forward KL(anchor || policy). See Schulman, "Approximating KL
    divergence" (2020), and Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL" (2025).
    """
    log_ratio = (anchor_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)  # [N] log anchor/policy
    return {"k1": -log_ratio, "k2": 0.5 * log_ratio.square(), "k3": torch.expm1(log_ratio) - log_ratio}


@penalty("approx_kl")
def approximate_kl(inputs: PenaltyInputs, training) -> tuple[Tensor, dict]:
    """A sampled estimate, `kl_estimator`; tokens of an older policy are reweighted by the (constant) ratio."""
    scores = inputs.scores
    estimate = kl_estimates(scores.logprobs, scores.anchor_logprobs)[training.kl_estimator]  # [N]
    log_weight = (scores.logprobs - inputs.batch.old_logprobs).detach().clamp(max=MAX_LOG_RATIO)
    return hinge(log_weight.exp() * estimate, training.kl_target, inputs), {}


assert set(PENALTIES) == set(LOSS_TYPES), "every loss type of src/config.py is a penalty here, and the reverse"
