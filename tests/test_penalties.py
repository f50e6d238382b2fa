"""Every penalty: the textbook formula in float64 on a vocabulary of 11, zero at equality, sign, extremes; on a model.

In the small problems the hidden states ARE the logits (the head is the identity), so one leaf drives log-probs, exact
KL and transport alike, and src.scoring.score_chunk itself runs in float64.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from test_packing import RAGGED, make_groups, make_pair
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from src import scoring
from src.config import LOSS_TYPES, POLICY_KEYS, SEED_FORMAT_KEYS, ConfigError, LoraConfig, TrainingConfig, load_config
from src.packing import PackedBatch, pack
from src.penalties import PENALTIES, PenaltyInputs, kl_estimates
from src.scoring import Scores, score, score_chunk
from src.train_grpo import add_advantages, add_loss_weights, loss_of_microbatch, microbatches, weighted_sum

VOCABULARY = 11
LENGTHS = [[3, 1, 4], [2, 5]]  # completions of two groups, one of a single token
INF = math.inf

OT = {"ot_iters": 1000, "ot_eps": 0.3}
FORMS = {
    "none": ("none", {}),
    "kl reverse": ("kl", {}),
    "kl forward": ("kl", {"kl_direction": "forward"}),
    "kl hinge": ("kl", {"kl_target": 0.9}),
    "k1": ("approx_kl", {"kl_estimator": "k1"}),
    "k2": ("approx_kl", {"kl_estimator": "k2"}),
    "k3": ("approx_kl", {"kl_estimator": "k3"}),
    "k3 hinge": ("approx_kl", {"kl_estimator": "k3", "kl_target": 0.4}),
    "ot taper": ("ot", {**OT, "ot_window": 2}),
    "ot hard edge": ("ot", {**OT, "ot_window": 2, "ot_taper": False}),
    "ot whole": ("ot", {**OT, "ot_window": 16, "ot_taper": False}),
    "ot unrolled": ("ot", {**OT, "ot_window": 2, "ot_unroll": True}),
    "ot raw": ("ot", {**OT, "ot_window": 2, "ot_debias": False}),
    "ot hinge": ("ot", {**OT, "ot_window": 2, "ot_target": 0.75}),
    "maxent": ("maxent", {"tau": 0.3, "beta": 0.4}),
    "maxent no baseline": ("maxent", {"tau": 0.3, "beta": 0.4, "maxent_baseline": False}),
    "maxent sums": ("maxent", {"tau": 0.8, "beta": 0.4, "length_normalized": False}),
    "maxent token counts": ("maxent", {"tau": 0.8, "beta": 0.4, "maxent_token_counts": True}),
    "maxent clipped": ("maxent", {"tau": 0.3, "beta": 0.4, "maxent_clipped": True}),
    "maxent without reference": ("maxent", {"tau": 0.7, "beta": 0.0}),
    "maxent uniform": ("maxent", {"tau": INF, "beta": 0.4, "maxent_baseline": False}),
    "listwise reverse": ("listwise_kl", {"q_temperature": 0.5}),
    "listwise forward": ("listwise_kl", {"q_temperature": 0.5, "kl_direction": "forward"}),
    "listwise sums": ("listwise_kl", {"q_temperature": 0.5, "length_normalized": False}),
}
NO_TARGET = [name for name, (kind, _) in FORMS.items() if kind in ("kl", "approx_kl", "ot") and "hinge" not in name]
every_form = pytest.mark.parametrize("form", FORMS)


def test_every_loss_type_is_proven_here():
    proven = {kind for kind, _ in FORMS.values()}
    assert proven == set(LOSS_TYPES) == set(PENALTIES), "give each loss type an entry in FORMS and a textbook formula"


# ---------------------------------------------------------------------------------------------------------------------
# Small problems
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(form: str, **keys) -> TrainingConfig:
    loss_type, form_keys = FORMS[form]
    return TrainingConfig(loss_type=loss_type, **{"temperature": 1.0, **form_keys, **keys})


def make_batch(target_ids: Tensor, old_logprobs: Tensor, rewards: list[float], lengths=LENGTHS) -> PackedBatch:
    """What a penalty reads of a batch; the mean over completions of their token means as its weights."""
    flat = torch.tensor([length for group in lengths for length in group])
    count = len(flat)
    return PackedBatch(
        input_ids=None,
        position_ids=None,
        attention_plan=None,
        predictor_index=None,
        target_ids=target_ids,
        episode_index=torch.arange(count).repeat_interleave(flat),
        lengths=flat,
        group_index=torch.tensor([index for index, group in enumerate(lengths) for _ in group]),
        sampled_logprobs=old_logprobs,
        old_logprobs=old_logprobs,
        advantages=torch.zeros(count),
        groups=len(lengths),
        rewards=torch.tensor(rewards, dtype=old_logprobs.dtype),
        token_weight=(1 / (count * flat)).to(old_logprobs.dtype),
        episode_weight=torch.full((count,), 1 / count),
    )


def make_problem(seed: int = 0) -> tuple[Tensor, Tensor, PackedBatch]:
    """Random policy and anchor logits [N, 11] in float64, and tokens sampled by a third, nearby policy."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(map(sum, LENGTHS))
    logits, anchor, noise = torch.randn(3, tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    old = (logits + 0.5 * noise).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return logits.requires_grad_(), anchor, make_batch(ids, old, [1.0, 0.1, 0.0, 0.3, 1.1])


def scores_of(logits: Tensor, anchor: Tensor, batch: PackedBatch, direction: str = "reverse") -> Scores:
    """src.scoring with the identity for a head, in the precision of the logits."""
    with patch.object(scoring, "head_logits", lambda model, hidden, *_: hidden):
        parts = score_chunk(None, logits, batch.target_ids, 1.0, "anchor", anchor, direction)
    chosen, entropy, anchor_chosen, kl = parts
    return Scores(chosen, entropy, logits, anchor_chosen, anchor, kl)


def penalty_of(training: TrainingConfig, logits: Tensor, anchor: Tensor, batch: PackedBatch) -> Tensor:
    """[N] or [E], as the loop asks for it."""
    scores = scores_of(logits, anchor, batch, training.kl_direction)
    return PENALTIES[training.loss_type](PenaltyInputs(scores, batch), training)[0]


def value_and_gradient(training: TrainingConfig, logits: Tensor, anchor: Tensor, batch: PackedBatch):
    logits = logits.detach().clone().requires_grad_()
    value = weighted_sum(
        penalty_of(training, logits, anchor, batch), batch, PENALTIES[training.loss_type].per_episode(training)
    )
    gradient = torch.autograd.grad(value, logits, allow_unused=True)[0] if value.requires_grad else None
    return value.detach(), torch.zeros_like(logits) if gradient is None else gradient


# ---------------------------------------------------------------------------------------------------------------------
# The textbook, completion by completion
# ---------------------------------------------------------------------------------------------------------------------


class Completion(NamedTuple):
    """One completion of T tokens, with nothing around it."""

    policy: Tensor  # [T, V] logits
    anchor: Tensor  # [T, V]
    policy_hidden: Tensor  # [T, hidden]
    anchor_hidden: Tensor  # [T, hidden]
    ids: Tensor  # [T]
    old: Tensor  # [T]
    reward: float
    group: int

    def chosen(self) -> Tensor:
        return Categorical(logits=self.policy).log_prob(self.ids)

    def anchor_chosen(self) -> Tensor:
        return Categorical(logits=self.anchor).log_prob(self.ids)


def completions_of(logits: Tensor, anchor: Tensor, batch: PackedBatch) -> list[Completion]:
    rows = zip(
        *(x.split(batch.lengths.tolist()) for x in (logits, anchor, batch.target_ids, batch.old_logprobs)),
        batch.rewards.tolist(),
        batch.group_index.tolist(),
        strict=True,
    )
    return [Completion(policy, reference, policy, reference, *rest) for policy, reference, *rest in rows]


def textbook_kl(c: Completion, training) -> Tensor:
    policy, anchor = Categorical(logits=c.policy), Categorical(logits=c.anchor)
    pair = (policy, anchor) if training.kl_direction == "reverse" else (anchor, policy)
    mean = kl_divergence(*pair).mean()
    return torch.relu(mean - training.kl_target) if training.kl_target else mean


def textbook_approx_kl(c: Completion, training) -> Tensor:
    p, q = c.chosen(), c.anchor_chosen().detach()
    r = (q - p).exp()
    estimate = {"k1": -r.log(), "k2": r.log() ** 2 / 2, "k3": r - 1 - r.log()}[training.kl_estimator]
    mean = ((p - c.old).exp().detach() * estimate).mean()
    return torch.relu(mean - training.kl_target) if training.kl_target else mean


def dense_transport(x: Tensor, y: Tensor, training) -> Tensor:
    """<P, C> + eps KL(P || a x b) of the dense problem, solved by alternating updates; its derivative in C is P."""
    length, eps = len(x), training.ot_eps
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs().double()  # [T, T]
    cost = 1 - torch.cosine_similarity(x[:, None], y[None], dim=-1)  # [T, T]
    if training.ot_taper:
        cost = cost - eps * (1 - distance / (training.ot_window + 1)).clamp(min=1e-300).log()
    cost = cost + 1e4 * (distance > training.ot_window)
    g = torch.zeros(length, dtype=x.dtype)
    with torch.no_grad():
        for _ in range(20_000):
            f = eps * math.log(length) - eps * ((g - cost) / eps).logsumexp(1)
            g = eps * math.log(length) - eps * ((f[:, None] - cost) / eps).logsumexp(0)
            log_plan = (f[:, None] + g - cost) / eps - 2 * math.log(length)
            plan = log_plan.exp()  # [T, T]
            if (plan.sum(1) * length - 1).abs().max() < 1e-10:
                break
        else:
            raise AssertionError("the dense problem did not converge")
    return (plan * cost).sum() + eps * (plan * (log_plan + 2 * math.log(length))).sum()


def textbook_ot(c: Completion, training) -> Tensor:
    x, y = c.policy_hidden, c.anchor_hidden.detach()
    value = dense_transport(x, y, training)
    if training.ot_debias:
        value = value - dense_transport(x, x, training) / 2 - dense_transport(y, y, training) / 2
    return torch.relu(value - training.ot_target) if training.ot_target else value


def textbook_target(group: list[Completion], training) -> Tensor:
    rewards = torch.tensor([c.reward for c in group], dtype=torch.float64)
    powers = ((rewards - rewards.max()) / training.q_temperature).exp()
    return (1 - training.q_epsilon) * powers / powers.sum() + training.q_epsilon / len(group)  # [G]


def textbook_maxent(group: list[Completion], training) -> Tensor:
    reduced = Tensor.mean if training.length_normalized else Tensor.sum
    reference = torch.stack([reduced(c.anchor_chosen()) for c in group]).detach().double().exp()  # [G]
    total = training.tau + training.beta
    trust = training.beta / total if total < INF else 0.0
    weights = textbook_target(group, training) ** (1 / total) * reference**trust
    weights = weights / weights.sum()
    if training.maxent_token_counts:
        weights = weights / torch.tensor([len(c.ids) for c in group])
        weights = weights / weights.sum()
    if training.maxent_baseline:
        weights = weights - 1 / len(group)
    if not training.maxent_clipped:
        return -sum(w * c.chosen().mean() for w, c in zip(weights, group, strict=True))
    terms = []
    for w, c in zip(weights, group, strict=True):
        r = (c.chosen() - c.old).exp()
        terms.append(torch.min(r * w, r.clip(1 - training.epsilon, 1 + training.epsilon) * w).mean())
    return -sum(terms)


def textbook_listwise_kl(group: list[Completion], training) -> Tensor:
    reduced = Tensor.mean if training.length_normalized else Tensor.sum
    policy = Categorical(logits=torch.stack([reduced(c.chosen()) for c in group]))
    target = Categorical(probs=textbook_target(group, training).to(policy.logits.dtype))
    return kl_divergence(*((policy, target) if training.kl_direction == "reverse" else (target, policy)))


def textbook(training: TrainingConfig, completions: list[Completion]) -> Tensor:
    """Mean over completions; a loss over a group counts as often as it has completions."""
    if training.loss_type == "none":
        return completions[0].policy.sum() * 0
    alone = {"kl": textbook_kl, "approx_kl": textbook_approx_kl, "ot": textbook_ot}
    if training.loss_type in alone:
        return sum(alone[training.loss_type](c, training) for c in completions) / len(completions)
    together = {"maxent": textbook_maxent, "listwise_kl": textbook_listwise_kl}[training.loss_type]
    total = 0.0
    for index in sorted({c.group for c in completions}):
        group = [c for c in completions if c.group == index]
        total = total + len(group) * together(group, training)
    return total / len(completions)


@every_form
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_are_those_of_the_textbook_formula(form, seed):
    training = settings_of(form)
    logits, anchor, batch = make_problem(seed)
    expected = textbook(training, completions_of(logits, anchor, batch))
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    value, gradient = value_and_gradient(training, logits, anchor, batch)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)
    if form != "none":
        assert gradient.norm() > 1e-3, "nothing was compared"
    if "hinge" in form:
        per_completion = penalty_of(training, logits, anchor, batch)
        assert (per_completion == 0).any() and (per_completion > 0).any(), "one side of the hinge is not tried"


def test_the_clip_of_clipped_maxent_binds_in_the_problem_above():
    logits, _, batch = make_problem()
    ratio = (logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0] - batch.old_logprobs).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and ((ratio > 0.8) & (ratio < 1.2)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Zero at equality
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "form",
    [name for name in FORMS if FORMS[name][0] in ("none", "kl", "approx_kl", "ot") and name not in ("k1", "ot raw")],
)
def test_value_and_gradient_are_zero_at_equality(form, dtype):
    logits, _, batch = make_problem()
    logits = logits.detach().to(dtype)
    batch = replace(batch, old_logprobs=batch.old_logprobs.to(dtype))
    for iterations in (1, 10):
        value, gradient = value_and_gradient(settings_of(form, ot_iters=iterations), logits, logits.clone(), batch)
        rounding = {"kl": 0.2, "ot": 10}.get(FORMS[form][0], 0) * torch.finfo(dtype).eps  # the estimators have none
        assert value.abs() <= rounding and gradient.abs().max() <= rounding


def test_k1_is_zero_at_equality_and_its_gradient_only_in_expectation():
    logits, _, batch = make_problem()
    value, gradient = value_and_gradient(settings_of("k1"), logits, logits.detach().clone(), batch)
    assert value == 0 and gradient.abs().max() > 1e-3  # for the expectation see the enumeration below


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("why", ["tau is infinite", "the target is uniform"])
def test_maxent_with_uniform_weights_and_the_baseline_does_nothing(why, clipped):
    keys = {"tau": INF, "beta": 0.4} if why == "tau is infinite" else {"tau": 0.3, "beta": 0.0, "q_epsilon": 1.0}
    training = TrainingConfig(loss_type="maxent", maxent_clipped=clipped, **keys)
    value, gradient = value_and_gradient(training, *make_problem())
    assert value.abs() < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_listwise_kl_is_zero_where_the_two_softmaxes_are_equal(direction, normalized):
    training = TrainingConfig(
        loss_type="listwise_kl", kl_direction=direction, q_temperature=0.7, q_epsilon=0.0, length_normalized=normalized
    )
    logits, anchor, batch = make_problem()
    inputs = PenaltyInputs(scores_of(logits, anchor, batch), batch)
    sequence = (inputs.episode_mean if normalized else inputs.episode_sum)(inputs.scores.logprobs).detach()
    batch = replace(batch, rewards=0.7 * sequence + torch.tensor([3.0, -5.0])[batch.group_index])
    value, gradient = value_and_gradient(training, logits, anchor, batch)
    assert value.abs() < 1e-14 and gradient.abs().max() < 1e-14
    value, gradient = value_and_gradient(training, logits, anchor, replace(batch, rewards=-batch.rewards))
    assert value > 1e-3 and gradient.abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", ["maxent", "listwise_kl"])
def test_a_group_without_variance_contributes_exactly_nothing_to_an_objective(loss_type):
    logits, anchor, batch = make_problem()
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.3, 1.1], dtype=torch.float64)
    training = TrainingConfig(loss_type=loss_type, maxent_baseline=False)
    _, gradient = value_and_gradient(training, logits, anchor, replace(batch, rewards=rewards))
    assert (gradient[:8] == 0).all() and gradient[8:].abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Sign
# ---------------------------------------------------------------------------------------------------------------------


def small_step(training: TrainingConfig, logits: Tensor, anchor: Tensor, batch: PackedBatch) -> Tensor:
    _, gradient = value_and_gradient(training, logits, anchor, batch)
    return (logits - 1e-3 * gradient / gradient.norm()).detach()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", [name for name in NO_TARGET if name not in ("k1", "ot raw")])
def test_a_small_step_brings_the_policy_closer_to_the_anchor(form, seed):
    """Distances that do not come from the code under test; those of ot in angles, between all pairs in its window."""
    training = settings_of(form)
    logits, anchor, batch = make_problem(seed)
    moved = small_step(training, logits, anchor, batch)

    def distance(policy: Tensor) -> Tensor:
        if training.loss_type == "kl":
            return kl_divergence(Categorical(logits=policy), Categorical(logits=anchor)).sum()
        if training.loss_type == "approx_kl":
            chosen, wanted = (Categorical(logits=x).log_prob(batch.target_ids) for x in (policy, anchor))
            return (chosen - wanted).abs().sum()
        return sum(textbook_ot(c, training) for c in completions_of(policy, anchor, batch))

    assert distance(moved) < distance(logits.detach())


@pytest.mark.parametrize("form", [name for name in FORMS if FORMS[name][0] == "ot" and name != "ot hard edge"])
def test_descent_on_transport_turns_every_hidden_state_to_the_anchors(form):
    training = settings_of(form, ot_target=0.0, ot_iters=20)
    generator = torch.Generator().manual_seed(3)
    _, anchor, batch = make_problem()
    policy = anchor + 0.3 * torch.randn(anchor.shape, generator=generator, dtype=torch.float64)
    before = torch.cosine_similarity(policy, anchor, dim=1)
    for _ in range(40):
        policy = policy - 2.0 * value_and_gradient(training, policy, anchor, batch)[1]
    assert (1 - torch.cosine_similarity(policy, anchor, dim=1)).mean() < 0.5 * (1 - before).mean()


@pytest.mark.parametrize("form", [name for name in FORMS if FORMS[name][0] in ("maxent", "listwise_kl")])
def test_a_small_step_raises_the_better_completions_over_the_worse(form):
    """Reward is all that distinguishes: the reference likes all completions alike. Uniform weights raise all."""
    training = settings_of(form)
    logits, anchor, batch = make_problem()
    logits, anchor = torch.zeros_like(anchor), torch.zeros_like(anchor)
    batch = replace(batch, old_logprobs=torch.full_like(batch.old_logprobs, -math.log(VOCABULARY)))
    moved = small_step(training, logits, anchor, batch)
    completions = completions_of(moved, anchor, batch)
    rise = torch.stack([(c.chosen() + math.log(VOCABULARY)).sum() for c in completions])
    if form == "maxent uniform":
        assert (rise > 0).all()
    elif form not in ("maxent token counts", "maxent sums", "listwise sums"):  # there length distinguishes as well
        assert rise[0] > rise[2] and rise[4] > rise[3]  # rewards 1 and 0; 1.1 and 0.3
    if form in ("maxent", "maxent clipped", "listwise reverse", "listwise forward"):
        assert rise[0] > 0 and rise[2] < 0


@pytest.mark.parametrize("form", [name for name in FORMS if FORMS[name][0] == "maxent"])
def test_a_small_step_raises_the_weighted_likelihood(form):
    training = settings_of(form)
    logits, anchor, batch = make_problem()
    moved = small_step(training, logits, anchor, batch)
    likelihood = [-textbook(training, completions_of(x, anchor, batch)) for x in (logits.detach(), moved)]
    assert likelihood[1] > likelihood[0]


# ---------------------------------------------------------------------------------------------------------------------
# The estimators of the KL
# ---------------------------------------------------------------------------------------------------------------------


def two_distributions(distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits [11] of a policy and an anchor."""
    logits, noise = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return logits, logits + distance * noise


def test_monte_carlo_means_of_the_estimators_against_the_exact_kl():
    policy, anchor = (logits.log_softmax(0) for logits in two_distributions())
    samples = 400_000
    ids = torch.multinomial(policy.exp(), samples, replacement=True, generator=torch.Generator().manual_seed(9))
    estimates = kl_estimates(policy[ids], anchor[ids])
    exact = kl_divergence(Categorical(logits=policy), Categorical(logits=anchor))
    biased = (policy.exp() * (policy - anchor) ** 2).sum() / 2  # what k2 estimates without error
    errors = {name: float(values.std() / samples**0.5) for name, values in estimates.items()}
    assert abs(estimates["k1"].mean() - exact) < 4 * errors["k1"] < 0.02 * exact
    assert abs(estimates["k3"].mean() - exact) < 4 * errors["k3"] < 0.02 * exact
    assert abs(estimates["k2"].mean() - biased) < 4 * errors["k2"] < 0.05 * abs(biased - exact)
    assert errors["k3"] < errors["k1"] and (estimates["k3"] >= 0).all() and (estimates["k1"] < 0).any()


def test_the_bias_of_k2_is_of_third_order():
    """Halving a small distance divides the KL by 4 and the bias by 8."""
    exact, bias = [], []
    for distance in (0.02, 0.01):
        policy, anchor = (logits.log_softmax(0) for logits in two_distributions(distance))
        exact.append(kl_divergence(Categorical(logits=policy), Categorical(logits=anchor)))
        bias.append((policy.exp() * kl_estimates(policy, anchor)["k2"]).sum() - exact[-1])
    assert exact[0] / exact[1] == pytest.approx(4, rel=0.05)
    assert bias[0] / bias[1] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("sampler", ["policy", "an older policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_expected_value_and_gradient_by_enumeration_of_the_vocabulary(estimator, sampler):
    """The penalty at every token of the vocabulary, weighed by the probability that the sampler draws it."""
    policy, anchor = two_distributions()
    policy.requires_grad_()
    older = policy.detach() if sampler == "policy" else two_distributions(-0.7)[1]
    tokens = torch.arange(VOCABULARY)
    batch = make_batch(tokens, older.log_softmax(0), [0.0] * VOCABULARY, [[1] * VOCABULARY])
    rows = [logits.expand(VOCABULARY, -1) for logits in (policy, anchor)]
    values = penalty_of(settings_of(estimator), *rows, batch)  # [11]
    expectation = (older.softmax(0) * values).sum()
    (gradient,) = torch.autograd.grad(expectation, policy)
    p, q = Categorical(logits=policy), Categorical(logits=anchor)
    log_ratio = p.logits - q.logits
    value = {"k1": kl_divergence(p, q), "k2": (p.probs * log_ratio**2).sum() / 2, "k3": kl_divergence(p, q)}[estimator]
    # what the docstring of kl_estimates says: nothing, reverse, forward
    meant = {"k1": 0 * policy.sum(), "k2": kl_divergence(p, q), "k3": kl_divergence(q, p)}[estimator]
    (expected,) = torch.autograd.grad(meant, policy)
    torch.testing.assert_close(expectation.detach(), value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    assert estimator == "k1" or gradient.norm() > 0.1


def test_the_gradients_of_reverse_and_forward_kl_differ_in_the_enumeration_above():
    policy, anchor = two_distributions()
    policy.requires_grad_()
    pair = Categorical(logits=policy), Categorical(logits=anchor)
    reverse, forward = (
        torch.autograd.grad(kl_divergence(*p), policy, retain_graph=True)[0] for p in (pair, pair[::-1])
    )
    assert (reverse - forward).norm() > 0.2 * reverse.norm()


# ---------------------------------------------------------------------------------------------------------------------
# The hinge
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["kl reverse", "kl forward", "k1", "k2", "k3", "ot taper"])
def test_the_hinge_is_the_mean_of_a_completion_minus_the_target_and_zero_below(form):
    """Per completion: a token above the target in a completion below it costs nothing."""
    logits, anchor, batch = make_problem(3)
    scores = scores_of(logits, anchor, batch, settings_of(form).kl_direction)
    inputs = PenaltyInputs(scores, batch)
    free, _ = PENALTIES[FORMS[form][0]](inputs, settings_of(form))
    means = free if FORMS[form][0] == "ot" else inputs.episode_mean(free)  # [5]
    target = float(means.detach().clamp(min=0).sort().values[2:4].mean())  # two or three completions are above
    key = "ot_target" if FORMS[form][0] == "ot" else "kl_target"
    hinged, _ = PENALTIES[FORMS[form][0]](inputs, settings_of(form, **{key: target}))
    above = means > target
    assert above.any() and not above.all()
    if FORMS[form][0] != "ot":
        assert ((free > target) & ~above[batch.episode_index]).any(), "no token is above in a completion below"
    torch.testing.assert_close(hinged, torch.where(above, means - target, 0.0))
    (gradient,) = torch.autograd.grad(hinged.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(means[above].sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[~above[batch.episode_index]] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Extremes
# ---------------------------------------------------------------------------------------------------------------------


def make_extreme_problem() -> tuple[Tensor, Tensor, PackedBatch]:
    """fp32; policy and anchor, policy and old policy are 80 nats apart at the sampled token, in all combinations."""
    tokens = sum(map(sum, LENGTHS))
    ids = torch.arange(tokens) % VOCABULARY
    signs = torch.tensor([[1, -1, 1], [-1, 1, 1], [1, -1, -1], [-1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    logits = torch.nn.functional.one_hot(ids, VOCABULARY)[None] * 80.0 * signs[torch.arange(tokens) % 6].T[:, :, None]
    policy, anchor, old = logits  # [N, 11] each
    return policy, anchor, make_batch(ids, old.log_softmax(-1).gather(1, ids[:, None])[:, 0], [1.0, 0.1, 0.0, 0.3, 1.1])


def test_the_extreme_problem_has_log_ratios_of_80_of_both_signs():
    policy, anchor, batch = make_extreme_problem()
    scores = scores_of(policy, anchor, batch)
    for log_ratio in (scores.logprobs - scores.anchor_logprobs, scores.logprobs - batch.old_logprobs):
        assert log_ratio.max() > 80 and log_ratio.min() < -80


@every_form
def test_log_ratios_of_80_give_neither_nan_nor_infinity(form):
    policy, anchor, batch = make_extreme_problem()
    for iterations in (1, 10):
        value, gradient = value_and_gradient(settings_of(form, ot_iters=iterations), policy, anchor, batch)
        assert value.dtype == torch.float32 and value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("form", ["kl forward", "k2", "listwise forward", "maxent"])
def test_log_ratios_of_80_still_move_the_policy(form):
    """A clamp must not take the gradient where the policy is furthest away."""
    policy, anchor, batch = make_extreme_problem()
    batch = replace(batch, old_logprobs=scores_of(policy, anchor, batch).logprobs)
    _, gradient = value_and_gradient(settings_of(form, q_epsilon=0.1), policy, anchor, batch)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("log_ratio", [80.0, -80.0, 300.0, -300.0])  # exp(80) alone still fits fp32
def test_k1_and_k2_are_exact_far_away_k3_is_finite_and_their_gradients_have_the_right_sign(log_ratio):
    anchor = torch.tensor([-90.0])
    logprobs = (anchor + log_ratio).requires_grad_()
    estimates = kl_estimates(logprobs, anchor)
    assert estimates["k1"].item() == log_ratio and estimates["k2"].item() == log_ratio**2 / 2
    assert torch.autograd.grad(estimates["k2"].sum(), logprobs)[0].item() == log_ratio
    assert estimates["k3"].isfinite() and estimates["k3"].item() >= 79
    assert torch.autograd.grad(estimates["k3"].sum(), logprobs)[0].item() * log_ratio >= 0  # never away from the anchor


# ---------------------------------------------------------------------------------------------------------------------
# On a real model
# ---------------------------------------------------------------------------------------------------------------------


def perturbed(model, size: float, seed: int):
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def make_run(form: str, **keys) -> tuple[SimpleNamespace, list]:
    """A tiny model, an anchor and an old policy near it, and ragged groups, the last of completions of one token."""
    packed, _ = make_pair("llama")
    training = settings_of(form, max_gen_len=32, **{"ot_iters": 20, **keys})
    run = SimpleNamespace(
        model=packed, anchor=perturbed(packed, 0.05, 1), config=SimpleNamespace(training=training, lora=LoraConfig())
    )
    groups = make_groups(torch.Generator().manual_seed(6), [*RAGGED, (3, [1, 1])])
    old = score(perturbed(packed, 0.02, 2), pack(groups, "cpu", torch.float32), 1.0).logprobs.split(
        [len(e.token_ids) for g in groups for e in g.episodes]
    )
    rows = iter(part.tolist() for part in old)
    rewards = iter([1.0, 0.0, 0.1, 1.1, 0.0, 1.0, 0.1, 0.4, 1.0, 0.0, 1.0])
    groups = [
        replace(g, episodes=tuple(replace(e, logprobs=tuple(next(rows)), reward=next(rewards)) for e in g.episodes))
        for g in groups
    ]
    return run, [advantaged for g in groups for advantaged in add_advantages([g], training)]


def full_gradient(run, groups, size: int = 1000, tokens: int | None = None, on_policy: bool = False) -> Tensor:
    """The gradient of the whole update, cut into micro-batches, with its value in front."""
    training = replace(run.config.training, micro_batch_size=size, max_tokens_per_microbatch=tokens)
    run.config.training = training
    run.model.zero_grad()
    total = 0.0
    for batch in microbatches(run, add_loss_weights(groups, training)):
        loss, _, _ = loss_of_microbatch(run, batch, training, on_policy, use_anchor=True)
        loss.backward()
        total += loss.item()
    return torch.cat([torch.tensor([total])] + [p.grad.flatten() for p in run.model.parameters()])


# targets that some completions are above and some below, among them of one token
TARGETS = {"kl hinge": {"kl_target": 0.6}, "k3 hinge": {"kl_target": 0.5}, "ot hinge": {"ot_target": 0.19}}
MODEL_FORMS = [name for name in FORMS if name not in ("ot whole", "ot hard edge", "ot unrolled", "ot raw")]


@pytest.mark.parametrize("loss_agg", ["token", "sequence", "constant"])
@pytest.mark.parametrize("form", MODEL_FORMS)
def test_the_gradient_does_not_depend_on_micro_batches_neighbours_or_order(form, loss_agg):
    run, groups = make_run(form, loss_agg=loss_agg, **TARGETS.get(form, {}))
    expected = full_gradient(run, groups)
    assert expected[1:].abs().max() > 1e-2
    shuffled = [replace(g, episodes=g.episodes[::-1]) for g in (groups[2], groups[0], groups[3], groups[1])]
    cuts = {
        "1": (groups, 1),
        "3": (groups, 3),
        "token budget": (groups, 1, 25),
        "order": (shuffled, 1000),
        "order and 2": (shuffled, 2),
    }
    for name, arguments in cuts.items():
        gradient = full_gradient(run, *arguments)
        assert (gradient - expected).abs().max() < 3e-5 * expected.abs().max(), f"{name}: differs by more than rounding"


def plain_completions(plain, plain_anchor, groups) -> list[Completion]:
    """Every completion through the models as transformers ships them: one row, no packing, no sharing."""
    completions = []
    for index, group in enumerate(groups):
        prompt = group.problem.prompt_ids
        for e in group.episodes:
            rows = []
            for model in (plain, plain_anchor):
                output = model(torch.tensor([prompt + e.token_ids]), use_cache=False, output_hidden_states=True)
                part = slice(len(prompt) - 1, len(prompt) + len(e.token_ids) - 1)
                rows.append((output.logits[0, part], output.hidden_states[-1][0, part]))
            (policy, hidden), (anchor, anchor_hidden) = rows
            completions.append(
                Completion(
                    policy,
                    anchor.detach(),
                    hidden,
                    anchor_hidden,
                    torch.tensor(e.token_ids),
                    torch.tensor(e.logprobs),
                    e.reward,
                    index,
                )
            )
    return completions


@every_form
def test_a_real_models_gradient_is_that_of_the_textbook_over_plain_forwards(form):
    """From the loop's records to the gradient of every parameter; advantages are 0, so only the penalty is left."""
    # iterations to convergence, in fp32: a narrow band would need thousands along 30 tokens
    ot = {"ot_iters": 400, "ot_window": 40 if form == "ot whole" else 9} if FORMS[form][0] == "ot" else {}
    beta = {} if FORMS[form][0] == "maxent" else {"beta": 1.0}
    run, groups = make_run(form, loss_agg="sequence", **ot, **beta, **TARGETS.get(form, {}))
    training = run.config.training
    groups = [replace(g, episodes=tuple(replace(e, advantage=0.0) for e in g.episodes)) for g in groups]
    gradient = full_gradient(run, groups)[1:]
    _, plain = make_pair("llama")
    _, plain_anchor = make_pair("llama")
    plain_anchor.load_state_dict(run.anchor.state_dict())
    plain, plain_anchor = plain.double(), plain_anchor.double()
    completions = plain_completions(plain, plain_anchor, groups)
    textbook(training, completions).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert form == "none" or expected.norm() > 1e-4
    assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6
    if "hinge" in form:
        assert {bool(textbook(training, [c]) > 0) for c in completions} == {True, False}, "one side is not tried"


@pytest.mark.parametrize("form", ["kl reverse", "kl forward", "k2", "k3", "ot taper", "k1"])
def test_the_rollout_anchor_has_no_gradient_at_the_first_update(form):
    """What the project warns of: the anchor then IS the policy. k1 is no exception, only noise about zero."""
    run, groups = make_run(form, beta=1.0)
    groups = [replace(g, episodes=tuple(replace(e, advantage=0.0) for e in g.episodes)) for g in groups]
    assert full_gradient(run, groups, on_policy=True).norm() > 1e-3
    run.anchor = copy.deepcopy(run.model)
    largest = full_gradient(run, groups, on_policy=True).abs().max()
    if form == "k1":
        assert largest > 1e-3
    else:  # the exact KL and the transport leave rounding: sum(p) is not 1 to the last bit
        assert largest <= (0 if form in ("k2", "k3") else 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What a penalty reads, and odd groups
# ---------------------------------------------------------------------------------------------------------------------


class Recorder:
    """A training section that remembers what was read of it."""

    def __init__(self, training):
        self.training, self.names = training, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.training, name)


# read by the loop or the controllers instead of the penalty itself
ELSEWHERE = {"seed_grpo_alpha", "kl_direction", "beta_kl_target", "beta_horizon", "beta_min", "beta_max", "beta"}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_config_says_truly_which_keys_a_loss_type_reads(loss_type):
    claims = {
        name: field.metadata["read_by"]
        for name, field in TrainingConfig.__dataclass_fields__.items()
        if "read_by" in field.metadata
    }
    read = set()
    for keys in ({}, {"maxent_clipped": True} if loss_type == "maxent" else {}):
        logits, anchor, batch = make_problem()
        recorder = Recorder(TrainingConfig(loss_type=loss_type, **keys))
        PENALTIES[loss_type](PenaltyInputs(scores_of(logits, anchor, batch), batch), recorder)
        read |= recorder.names
    assert {name for name in read if name in claims and loss_type not in claims[name]} == set()
    claimed = {name for name, types in claims.items() if loss_type in types and not name.startswith("tau_")}
    # the policy term is the loop's own, but for maxent, whose clipped form calls it
    policy_term = set() if loss_type == "maxent" else POLICY_KEYS | {"importance_cap"}
    assert claimed - read - ELSEWHERE - {"meta_lr"} - policy_term == set()


@pytest.mark.parametrize("loss_type", ["maxent", "listwise_kl"])
def test_a_group_with_one_completion_left_is_inert_and_its_metrics_are_finite(loss_type):
    """skip_unfinished_episodes can leave a single one."""
    lengths = [[3], [2, 5]]
    logits, anchor = torch.randn(2, 10, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    batch = make_batch(torch.arange(10), torch.zeros(10, dtype=torch.float64), [1.0, 0.0, 1.0], lengths)
    value, metrics = PENALTIES[loss_type](
        PenaltyInputs(scores_of(logits, anchor, batch), batch),
        TrainingConfig(loss_type=loss_type, **({"meta_lr": 0.1} if loss_type == "maxent" else {})),
    )
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value[0] == 0 and (gradient[:3] == 0).all() and gradient[3:].isfinite().all() and gradient[3:].norm() > 1e-3
    assert all(values.isfinite().all() for values in metrics.values())
    if loss_type == "listwise_kl":
        torch.testing.assert_close(metrics["train/listwise_kl"], torch.stack([value[0], value[1:].mean()]).detach())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

BAD = {  # loss type, the wrong line, what the message must say besides the file
    "none, unknown penalty": (
        "nuclear",
        "beta: 1",
        "training.loss_type: 'nuclear' is not known; known are: " + ", ".join(sorted(LOSS_TYPES)),
    ),
    "kl, below 0": ("kl", "beta: -0.1", "training.beta must be at least 0, not -0.1"),
    "kl, target below 0": ("kl", "kl_target: -1", "training.kl_target must be at least 0, not -1.0"),
    "kl, direction": (
        "kl",
        "kl_direction: sideways",
        "training.kl_direction: 'sideways' is not known; known are: forward, reverse",
    ),
    "anchor": ("kl", "anchor: yesterday", "training.anchor: 'yesterday' is not known; known are: reference, rollout"),
    "sync": ("kl", "reference_sync_steps: -1", "training.reference_sync_steps must be at least 0, not -1"),
    "estimator": ("approx_kl", "kl_estimator: k4", "training.kl_estimator: 'k4' is not known; known are: k1, k2, k3"),
    "window 0": ("ot", "ot_window: 0", "training.ot_window must be at least 1, not 0"),
    "window not whole": ("ot", "ot_window: 2.5", "training.ot_window must be a whole number, not 2.5"),
    "eps 0": ("ot", "ot_eps: 0", "training.ot_eps must be greater than 0, not 0.0"),
    "eps below 0": ("ot", "ot_eps: -0.1", "training.ot_eps must be greater than 0, not -0.1"),
    "iterations 0": ("ot", "ot_iters: 0", "training.ot_iters must be at least 1, not 0"),
    "ot target below 0": ("ot", "ot_target: -0.1", "training.ot_target must be at least 0, not -0.1"),
    "backend": ("ot", "ot_backend: dense", "training.ot_backend: 'dense' is not known; known are: band, pot"),
    "tau + beta 0": ("maxent", "tau: 0\n  beta: 0", "training.tau + training.beta must be greater than 0"),
    "tau below 0": ("maxent", "tau: -1", "training.tau must be at least 0, not -1.0"),
    "beta infinite": ("maxent", "beta: .inf", "training.beta must be a finite number, not inf"),
    "q_temperature 0": ("maxent", "q_temperature: 0", "training.q_temperature must be greater than 0, not 0.0"),
    "q_epsilon above 1": ("listwise_kl", "q_epsilon: 1.5", "training.q_epsilon must be at most 1, not 1.5"),
    "q_epsilon below 0": ("listwise_kl", "q_epsilon: -0.5", "training.q_epsilon must be at least 0, not -0.5"),
    "tau_lr 0": ("maxent", "tau_lr: 0", "training.tau_lr must be greater than 0, not 0.0"),
    "tau_min above tau_max": ("maxent", "tau_min: 2\n  tau_max: 1", "tau_min and beta_min must not exceed tau_max"),
    "meta without target": ("maxent", "meta_lr: 0.1", "training.meta_lr needs training.tau_target_entropy"),
    "kl controller target 0": ("kl", "beta_kl_target: 0", "training.beta_kl_target must be greater than 0, not 0.0"),
    "delta 1": ("kl", "delta: 1", "training.delta must be greater than 1, not 1.0"),
    "epsilon below 0": ("kl", "epsilon: -0.1", "training.epsilon must be at least 0, not -0.1"),
    "epsilon_high below 0": ("kl", "epsilon_high: -0.1", "training.epsilon_high must be at least 0, not -0.1"),
    "cap 0": ("kl", "importance_cap: 0", "training.importance_cap must be greater than 0, not 0.0"),
    "surrogate": ("kl", "policy_loss: trpo", "training.policy_loss: 'trpo' is not known; "),
    "level": ("kl", "importance_sampling_level: word", "'word' is not known; known are: sequence, token"),
    "aggregation": ("kl", "loss_agg: median", "'median' is not known; known are: constant, sequence, token"),
    "scaling": ("kl", "scale_rewards: max", "'max' is not known; "),
    "entropy below 0": ("kl", "entropy_coef: -0.1", "training.entropy_coef must be at least 0, not -0.1"),
    "alpha below 0": ("kl", "seed_grpo_alpha: -1", "training.seed_grpo_alpha must be at least 0, not -1.0"),
    "old log-probs": ("kl", "old_logprobs: nobody", "'nobody' is not known; known are: sampler, trainer"),
}


def refusal(tmp_path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_in_one_line_that_names_file_and_key(tmp_path, name):
    loss_type, line, words = BAD[name]
    assert words in refusal(tmp_path, f"training:\n  loss_type: {loss_type}\n  {line}\n")


UNREAD = [
    (loss_type, name, field.metadata["read_by"])
    for name, field in TrainingConfig.__dataclass_fields__.items()
    for loss_type in LOSS_TYPES
    if "read_by" in field.metadata and loss_type not in field.metadata["read_by"]
]


def test_every_key_that_a_loss_type_does_not_read_is_refused_and_says_who_reads_it(tmp_path):
    """All pairs of loss type and key; the keys of the GRPO-mini format pass with every loss type."""
    for loss_type, name, read_by in UNREAD:
        value = getattr(TrainingConfig(), name)
        text = f"training:\n  loss_type: {loss_type}\n  {name}: {'' if value is None else value}\n"
        if name in SEED_FORMAT_KEYS:
            path = tmp_path / "seed.yaml"
            path.write_text(text, encoding="utf-8")
            load_config(path)
            continue
        words = f"training.{name} is not read by loss_type {loss_type}; it belongs to {', '.join(read_by)}; remove"
        assert words in refusal(tmp_path, text)
    assert len({name for _, name, _ in UNREAD}) > 20
