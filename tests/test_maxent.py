"""src/maxent.py: the closed form against optimisers and hand-worked numbers, the controllers in simulated loops."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from src.maxent import (
    Controllers,
    ControllerSettings,
    entropy,
    entropy_target_gradients,
    group_softmax,
    length_normalise,
    listwise_target,
    maxent_objective,
    maxent_weights,
    seed_grpo_scale,
    semantic_entropy,
    weight_entropy_gradients,
    weight_statistics,
)

NAN, INF = math.nan, math.inf


def double(*rows):
    """A float64 tensor of rows [groups, G]."""
    return torch.tensor(rows, dtype=torch.float64)


def random_groups(groups=6, size=5, seed=0):
    """q and reference log-probs [groups, G] of random groups, q with a floor."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(groups, size, generator=generator, dtype=torch.float64)
    reference = -3 * torch.rand(groups, size, generator=generator, dtype=torch.float64)
    return listwise_target(rewards, 0.3, 0.05), reference


def objective_of_one(weights, q, reference, tau, beta):
    """The program's value for one group in numpy, written from the formula and sharing nothing with the module."""
    reference = np.exp(reference) / np.exp(reference).sum()
    logs = np.log(weights)
    return float(weights @ (np.log(q) - tau * logs - beta * (logs - np.log(reference))))


# ---- the target q


def test_listwise_target_by_hand():
    q = listwise_target(double([math.log(3), 0.0], [1.0, 1.0]), temperature=1.0, epsilon=0.1)
    assert torch.allclose(q, double([0.9 * 0.75 + 0.05, 0.9 * 0.25 + 0.05], [0.5, 0.5]), atol=1e-15)
    sharper = listwise_target(double([math.log(3), 0.0]), temperature=0.5, epsilon=0.0)
    assert torch.allclose(sharper, double([0.9, 0.1]), atol=1e-15)  # 3^2 : 1


def test_listwise_target_has_full_support_where_softmax_underflows():
    q = listwise_target(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), temperature=1e-4, epsilon=0.02)
    assert torch.allclose(q, torch.tensor([[0.985, 0.005, 0.005, 0.005]]), atol=1e-7)


@pytest.mark.parametrize(("given_dtype", "wanted"), [("bfloat16", "float32"), ("int64", "float32"), ("float64",) * 2])
def test_dtypes_are_fp32_or_better(given_dtype, wanted):
    rewards = torch.tensor([[0, 1, 2]], dtype=getattr(torch, given_dtype))
    q = listwise_target(rewards, 1.0, 0.1)
    assert q.dtype == getattr(torch, wanted)
    assert maxent_weights(q, -rewards, 0.1, 0.1).dtype == getattr(torch, wanted)
    assert abs(q.sum().item() - 1) < 1e-6


@pytest.mark.parametrize(("temperature", "epsilon"), [(0.0, 0.1), (-1.0, 0.1), (NAN, 0.1), (1.0, -0.1), (1.0, 1.5)])
def test_listwise_target_refuses_bad_parameters(temperature, epsilon):
    with pytest.raises(ValueError, match="q_"):
        listwise_target(double([0.0, 1.0]), temperature, epsilon)


# ---- the closed form


def test_weights_by_hand():
    q, reference = double([0.8, 0.2]), double([0.2, 0.8]).log()
    # q * sqrt(ref) = 0.8 sqrt(0.2) : 0.2 sqrt(0.8) = 2 : 1, whatever constant the log-probs carry
    assert torch.allclose(maxent_weights(q, reference, 0.5, 0.5), double([2 / 3, 1 / 3]), atol=1e-14)
    assert torch.allclose(maxent_weights(q, reference - 700.0, 0.5, 0.5), double([2 / 3, 1 / 3]), atol=1e-12)
    assert torch.allclose(maxent_weights(q, reference, 1.0, 0.0), q, atol=1e-14)
    assert torch.allclose(maxent_weights(q, reference, 0.5, 0.0), double([16 / 17, 1 / 17]), atol=1e-14)


def test_objective_by_hand():
    q, reference, even = double([0.8, 0.2]), double([0.2, 0.8]).log(), double([0.5, 0.5])
    without_trust = 0.5 * math.log(0.8 * 0.2) + math.log(2)
    assert maxent_objective(even, q, reference, 1.0, 0.0).item() == pytest.approx(without_trust, abs=1e-14)
    divergence = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    value = maxent_objective(even, q, reference - 9.0, 1.0, 3.0).item()
    assert value == pytest.approx(without_trust - 3 * divergence, abs=1e-13)
    corner = maxent_objective(double([1.0, 0.0]), double([1.0, 0.0]), double([0.0, -INF]), 2.0, 3.0)
    assert corner.item() == 0.0  # 0 log 0 = 0 in all three terms


@pytest.mark.parametrize(("tau", "beta"), [(0.1, 0.0), (0.0, 0.1), (0.3, 0.7), (2.0, 0.05), (0.02, 5.0)])
def test_closed_form_beats_random_simplex_points(tau, beta):
    q, reference = random_groups()
    best = maxent_objective(maxent_weights(q, reference, tau, beta), q, reference, tau, beta)  # [groups]
    points = torch.distributions.Dirichlet(torch.full((5,), 0.7, dtype=torch.float64))
    for point in points.sample((1000,)):
        rivals = maxent_objective(point.expand_as(q), q, reference, tau, beta)
        assert (best > rivals).all()


@pytest.mark.parametrize("seed", range(12))
def test_closed_form_equals_a_numerical_optimiser(seed):
    generator = np.random.default_rng(seed)
    tau, beta = generator.uniform(0.05, 2.0, size=2)
    if seed % 4 == 0:
        tau, beta = [(0.0, 0.5), (0.5, 0.0), (0.05, 0.05)][seed // 4]
    q, reference = (row[0] for row in random_groups(groups=1, size=int(generator.integers(2, 9)), seed=seed))

    def loss(logits):
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        anchor = np.exp(reference.numpy()) / np.exp(reference.numpy()).sum()
        slope = np.log(q.numpy()) - tau * np.log(weights) - beta * np.log(weights / anchor)
        return -objective_of_one(weights, q.numpy(), reference.numpy(), tau, beta), -weights * (slope - weights @ slope)

    found = minimize(loss, np.zeros(len(q)), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    numerical = np.exp(found.x - found.x.max())
    numerical /= numerical.sum()
    weights = maxent_weights(q[None], reference[None], tau, beta)[0].numpy()
    assert np.abs(weights - numerical).max() < 1e-6
    value = maxent_objective(torch.from_numpy(weights)[None], q[None], reference[None], tau, beta).item()
    assert value == pytest.approx(-found.fun, abs=1e-9)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(-30.0, 0.0)), min_size=2, max_size=8),
    tau=st.floats(0.0, 4.0),
    beta=st.floats(0.02, 4.0),
)
def test_soft_improvement(rows, tau, beta):
    """Phi(new) - Phi(old) >= beta KL(new || old); the surplus is exactly (tau + beta) KL(old || new)."""
    rewards, old_logprobs = torch.tensor(rows, dtype=torch.float64).T[:, None]  # two of [1, G]
    q, old = listwise_target(rewards, 0.5, 0.01), old_logprobs.softmax(dim=1)
    new = maxent_weights(q, old_logprobs, tau, beta)
    gain = maxent_objective(new, q, old_logprobs, tau, 0.0) - maxent_objective(old, q, old_logprobs, tau, 0.0)
    divergence = torch.xlogy(new, new / old).sum()
    assert gain.item() >= beta * divergence.item() - 1e-9
    surplus = (tau + beta) * (old * (old.log() - new.clamp_min(1e-300).log())).sum()
    if new.min() > 1e-280:
        assert (gain - beta * divergence).item() == pytest.approx(surplus.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-30, 1e-44, 5e-324, 0.0])
def test_tau_and_beta_to_zero_is_the_argmax(size, dtype):
    q = torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.2, 0.4]], dtype=dtype)
    reference = torch.tensor([[-1.0, -900.0, -2.0], [-5.0, -1.0, -5.0]], dtype=dtype)
    for tau, beta in [(size, 0.0), (size / 2, min(size / 2, 1e-9))]:  # beta vanishes faster than the reference is long
        for share in (1.0, 0.001):  # 0.001: as in a group so large that every log q is far below 0
            weights = maxent_weights(q * share, reference, tau, beta)
            assert torch.equal(weights, torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]], dtype=dtype))


def test_tau_to_infinity_is_uniform():
    q, reference = random_groups()
    uniform = torch.full_like(q, 0.2)
    assert torch.equal(maxent_weights(q, reference, INF, 0.5), uniform)
    gaps = [(maxent_weights(q, reference, tau, 0.5) - uniform).abs().max().item() for tau in (1.0, 1e2, 1e4, 1e300)]
    assert gaps == sorted(gaps, reverse=True) and gaps[2] < 1e-3 and gaps[3] < 1e-15
    some = torch.tensor([[True, True, False, True, False]]).expand_as(q)
    assert torch.allclose(
        maxent_weights(q, reference, INF, 0.5, mask=some), some / some.sum(dim=1, keepdim=True).double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1e8, 1e38, 1e300, INF])
def test_beta_to_infinity_is_the_reference(beta, dtype):
    q, reference = (values.to(dtype) for values in random_groups())
    assert torch.allclose(maxent_weights(q, reference, 0.3, beta), reference.softmax(dim=1), atol=1e-6)


def test_degenerate_group_falls_back_to_uniform():
    q, nothing = double([0.7, 0.2, 0.1]), double([-INF, NAN, INF])
    assert torch.equal(maxent_weights(q, nothing, 0.1, 0.1), torch.full((1, 3), 1 / 3, dtype=torch.float64))
    by_tau, by_beta = weight_entropy_gradients(maxent_weights(q, nothing, 0.1, 0.1), q, nothing, 0.1, 0.1)
    assert by_tau.item() == 0.0 and by_beta.item() == 0.0
    two_left = maxent_weights(q, nothing, 0.1, 0.1, mask=torch.tensor([[True, False, True]]))
    assert torch.equal(two_left, double([0.5, 0.0, 0.5]))
    assert torch.equal(maxent_weights(torch.zeros(1, 3), torch.zeros(1, 3), 0.1, 0.1), torch.full((1, 3), 1 / 3))
    # one broken entry loses its weight and leaves the others theirs
    partly = maxent_weights(q, double([0.0, NAN, 0.0]), 1.0, 1.0)
    assert torch.allclose(
        partly, group_softmax(q.log() / 2) * double([1, 0, 1]) / group_softmax(q.log() / 2)[:, ::2].sum()
    )
    # without trust in the reference, it is not read
    assert torch.allclose(maxent_weights(q, nothing, 1.0, 0.0), q, atol=1e-15)


@pytest.mark.parametrize(("tau", "beta"), [(-0.1, 1.0), (1.0, -0.1), (NAN, 1.0), (1.0, NAN), (INF, INF)])
def test_weights_refuse_bad_tau_and_beta(tau, beta):
    with pytest.raises(ValueError, match="tau and beta"):
        maxent_weights(double([0.5, 0.5]), double([0.0, 0.0]), tau, beta)


def test_token_counts_make_pull_independent_of_length():
    q, reference = double([0.5, 0.5], [0.75, 0.25]), torch.zeros(2, 2, dtype=torch.float64)
    counts = torch.tensor([[10, 30], [30, 10]])
    weights = maxent_weights(q, reference, 1.0, 0.0, token_counts=counts)
    assert torch.allclose(weights, double([0.75, 0.25], [0.5, 0.5]), atol=1e-15)
    pull = weights * counts  # the weight a completion exerts when its token log-probs are summed
    plain = maxent_weights(q, reference, 1.0, 0.0)
    assert torch.allclose(pull / pull.sum(dim=1, keepdim=True), plain, atol=1e-15)
    assert torch.equal(maxent_weights(q, reference, 1.0, 0.0, token_counts=torch.full((2, 2), 7)), plain)
    empty = maxent_weights(q, reference, 1.0, 0.0, token_counts=torch.tensor([[0, 1], [1, 1]]))
    assert torch.allclose(empty, plain, atol=1e-15)  # an empty completion counts as one token, not as infinite weight
    assert torch.equal(length_normalise(double([-6.0, -1.0]), torch.tensor([[3, 0]])), double([-2.0, -1.0]))


def test_ragged_mask_equals_the_dense_group_and_padding_is_inert():
    q_dense, reference_dense = random_groups(groups=1, size=3)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    q, reference = torch.full((2, 4), NAN, dtype=torch.float64), torch.full((2, 4), INF, dtype=torch.float64)
    q[0, mask[0]], reference[0, mask[0]] = q_dense[0], reference_dense[0]
    counts_dense, counts = torch.tensor([[4, 9, 2]]), torch.tensor([[4, 0, 9, 2], [0, 0, 0, 0]])
    for token_counts_dense, token_counts in [(None, None), (counts_dense, counts)]:
        weights = maxent_weights(q, reference, 0.2, 0.4, token_counts, mask)
        dense = maxent_weights(q_dense, reference_dense, 0.2, 0.4, token_counts_dense)
        assert torch.allclose(weights[0, mask[0]], dense[0], atol=1e-15)
        assert weights[0, 1] == 0 and (weights[1] == 0).all()
        pairs = [
            (maxent_objective, (weights, q, reference, 0.2, 0.4, mask), (dense, q_dense, reference_dense, 0.2, 0.4)),
            (lambda *a: weight_entropy_gradients(*a)[0], (weights, q, reference, 0.2, 0.4, mask),
             (dense, q_dense, reference_dense, 0.2, 0.4)),
            (lambda *a: weight_entropy_gradients(*a)[1], (weights, q, reference, 0.2, 0.4, mask),
             (dense, q_dense, reference_dense, 0.2, 0.4)),
        ]  # fmt: skip
        for function, ragged_arguments, dense_arguments in pairs:
            ragged, alone = function(*ragged_arguments), function(*dense_arguments)
            assert ragged[0].item() == pytest.approx(alone[0].item(), abs=1e-13)
            assert ragged[1].item() == 0.0
        ragged = entropy_target_gradients(weights, q, reference, 0.2, 0.4, 0.5, mask)
        assert ragged == pytest.approx(entropy_target_gradients(dense, q_dense, reference_dense, 0.2, 0.4, 0.5))
    rewards = double([math.log(3), 50.0, 0.0])
    assert torch.allclose(
        listwise_target(rewards, 1.0, 0.1, torch.tensor([[True, False, True]])), double([0.725, 0.0, 0.275]), atol=1e-15
    )


# ---- what is logged


def test_weight_statistics_by_hand():
    weights = double([0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, NAN, NAN], [1.0, 0, 0, 0], [0, 0, 0, 0])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False], [True, False, False, False], [False] * 4])
    weights = weights.where(mask, 0.0)
    advantages = double([0.0] * 4, [0.0, -900.0, -900.0, -900.0], [0.0, 0.0, 9.0, 9.0], [3.0, 9, 9, 9], [NAN] * 4)
    log2 = math.log(2)
    assert weight_statistics(weights, advantages, mask) == pytest.approx(
        {
            "weight_entropy": (1 + 2 + 1 + 0) * log2 / 4,
            "weight_entropy_min": 0.0,
            "weight_entropy_max": 2 * log2,
            "weight_entropy_normalized": (0.5 + 1 + 1 + 0) / 4,
            "advantage_entropy_mean": (2 + 0 + 1 + 0) * log2 / 4,
            "advantage_entropy_std": float(np.std([2, 0, 1, 0])) * log2,
        },
        abs=1e-12,
    )
    nothing = weight_statistics(weights[4:], advantages[4:], mask[4:])
    assert all(value == 0.0 for value in nothing.values())


# ---- the controllers


def test_entropy_gradients_against_autograd():
    q, reference = random_groups()
    counts = torch.randint(1, 40, q.shape, generator=torch.Generator().manual_seed(1))
    for token_counts in (None, counts):
        for tau, beta in [(0.3, 0.2), (0.05, 0.0), (0.0, 0.4), (2.0, 3.0)]:
            weights = maxent_weights(q, reference, tau, beta, token_counts)
            by_tau, by_beta = weight_entropy_gradients(weights, q, reference, tau, beta)
            tau_leaf, beta_leaf = (torch.full((len(q), 1), x, dtype=q.dtype, requires_grad=True) for x in (tau, beta))
            textbook = q ** (1 / (tau_leaf + beta_leaf)) * reference.exp() ** (beta_leaf / (tau_leaf + beta_leaf))
            textbook = textbook if token_counts is None else textbook / token_counts
            textbook = textbook / textbook.sum(dim=1, keepdim=True)
            assert torch.allclose(textbook, weights, atol=1e-12)
            entropies = -(textbook * textbook.log()).sum(dim=1)
            objective = (entropies.mean() - 0.9) ** 2
            wanted = torch.autograd.grad(entropies.sum(), (tau_leaf, beta_leaf), retain_graph=True)
            assert torch.allclose(by_tau, wanted[0][:, 0], rtol=1e-9, atol=1e-12)
            assert torch.allclose(by_beta, wanted[1][:, 0], rtol=1e-9, atol=1e-12)
            wanted = [leaf.sum().item() for leaf in torch.autograd.grad(objective, (tau_leaf, beta_leaf))]
            found = entropy_target_gradients(weights, q, reference, tau, beta, target=0.9)
            assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_entropy_gradients_are_zero_and_finite_in_the_limits():
    q, reference = random_groups()
    for tau, beta in [(INF, 0.5), (0.5, INF), (0.0, 0.0), (1e-12, 0.0)]:
        weights = maxent_weights(q, reference, tau, beta)
        for gradient in weight_entropy_gradients(weights, q, reference, tau, beta):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_tau_update_by_hand():
    controllers = Controllers(1.0, 0.1, ControllerSettings(tau_target_entropy=0.5, tau_lr=0.1, tau_max=1.02))
    assert controllers.update_tau(1.0, step=0)
    assert controllers.tau == pytest.approx(math.exp(0.1 * (0.5 - 1.0)))  # too much entropy: tau falls
    controllers.update_tau(0.0, step=1, learning_rate_scale=0.5)
    assert controllers.entropy_average == pytest.approx(0.9)
    assert controllers.tau == pytest.approx(math.exp(0.1 * (0.5 - 1.0) + 0.05 * (0.5 - 0.9)))
    before = controllers.tau
    assert not controllers.update_tau(0.0, step=2, learning_rate_scale=0.0) and controllers.tau == before
    for step in range(100):
        controllers.update_tau(0.0, step)
    assert controllers.tau == 1.02  # clamped
    assert controllers.tau_updates == 103 and controllers.beta == 0.1


def test_tau_waits_in_warmup_and_its_target_is_annealed():
    settings = ControllerSettings(tau_target_entropy=0.4, tau_warmup_steps=10)
    controllers = Controllers(1.0, 0.1, settings)
    assert not any(controllers.update_tau(1.0, step) for step in range(10))
    assert controllers.tau == 1.0 and controllers.entropy_average == pytest.approx(1.0) and controllers.tau_updates == 0
    assert controllers.update_tau(1.0, 10) and controllers.tau < 1.0
    annealed = replace(settings, tau_target_entropy_start=1.4, tau_target_anneal_steps=20)
    targets = [annealed.target_entropy(step) for step in (0, 10, 15, 20, 30, 99)]
    assert targets == pytest.approx([1.4, 1.4, 1.15, 0.9, 0.4, 0.4])
    assert settings.target_entropy(0) == 0.4
    rising = Controllers(1.0, 0.1, annealed)
    rising.update_tau(1.0, 10)
    assert rising.tau > 1.0  # the annealed target, 1.4, is still above the measurement


def test_controllers_without_target_or_measurement_stay():
    off = Controllers(INF, 0.0)
    assert not off.update_tau(0.3, 5) and not off.update_beta(0.3) and (off.tau, off.beta) == (INF, 0.0)
    on = Controllers(1.0, 0.1, ControllerSettings(tau_target_entropy=0.4, kl_target=0.1))
    for broken in (NAN, INF):
        assert not on.update_tau(broken, 5) and not on.update_beta(broken)
        assert not on.meta_step(broken, None) and not on.meta_step(None, broken)
    assert on == Controllers(1.0, 0.1, on.settings)  # neither a value, nor the average, nor a counter


def simulate_tau(controllers, steps, first_step=0, groups=16):
    """The controller against the true weight entropy of fresh random groups; returns the entropies it saw."""
    seen = []
    for step in range(first_step, first_step + steps):
        q, reference = random_groups(groups=groups, size=8, seed=step)
        seen.append(entropy(maxent_weights(q, reference, controllers.tau, controllers.beta)).mean().item())
        controllers.update_tau(seen[-1], step)
    return seen


@pytest.mark.parametrize("start", [0.005, 5.0])
def test_tau_controller_reaches_its_target(start):
    controllers = Controllers(start, 0.05, ControllerSettings(tau_target_entropy=1.2, tau_lr=0.3, tau_warmup_steps=5))
    seen = simulate_tau(controllers, 150)
    assert abs(seen[0] - 1.2) > 0.5  # it had somewhere to go
    assert abs(np.mean(seen[-40:]) - 1.2) < 0.02


def simulate_beta(controllers, steps, noise):
    """A policy whose KL falls as beta rises, with a lag, and is measured with noise; returns the measurements."""
    kl, seen = 0.5, []
    for _ in range(steps):
        kl += 0.3 * (0.02 / (controllers.beta + 0.01) - kl)
        seen.append(kl * math.exp(0.1 * noise.standard_normal()))
        controllers.update_beta(seen[-1])
    return seen


@pytest.mark.parametrize("start", [0.001, 3.0])
def test_beta_controller_reaches_its_target(start):
    controllers = Controllers(0.1, start, ControllerSettings(kl_target=0.08, kl_horizon=3.0))
    seen = simulate_beta(controllers, 400, np.random.default_rng(0))
    assert abs(np.mean(seen[-100:]) - 0.08) < 0.008
    assert controllers.beta == pytest.approx(0.02 / 0.08 - 0.01, rel=0.15)


def test_beta_update_by_hand():
    settings = ControllerSettings(kl_target=0.1, kl_horizon=10.0, kl_clip=0.2, beta_min=0.39, beta_max=0.5)
    controllers = Controllers(0.1, 0.4, settings)
    assert controllers.update_beta(0.11) and controllers.beta == pytest.approx(0.4 * (1 + 0.1 / 10))
    controllers.beta = 0.4
    assert controllers.update_beta(9.0) and controllers.beta == pytest.approx(0.4 * 1.02)  # error clipped to +0.2
    controllers.beta = 0.4
    assert controllers.update_beta(-9.0) and controllers.beta == pytest.approx(0.4 * 0.98)  # a noisy k1 may be negative
    for _ in range(50):
        controllers.update_beta(0.0)
    assert controllers.beta == 0.39 and not controllers.update_beta(0.0)
    for _ in range(50):
        controllers.update_beta(1.0)
    assert controllers.beta == 0.5 and controllers.tau == 0.1


def test_meta_step_by_hand():
    settings = ControllerSettings(meta_lr=0.5, tau_max=3.0, beta_min=0.01)
    controllers = Controllers(2.0, 0.1, settings)
    assert controllers.meta_step(0.2, -1.0, learning_rate_scale=0.5)
    assert controllers.tau == pytest.approx(2.0 * math.exp(-0.25 * 0.2 * 2.0))
    assert controllers.beta == pytest.approx(0.1 * math.exp(0.25 * 0.1))
    before = (controllers.tau, controllers.beta)
    assert not controllers.meta_step(None, 0.0) and not controllers.meta_step(0.0, None)
    assert (controllers.tau, controllers.beta, controllers.meta_updates) == (*before, 1)
    assert controllers.meta_step(-1e300, 1e300) and (controllers.tau, controllers.beta) == (3.0, 0.01)
    assert not controllers.meta_step(-1e300, 1e300)  # already at both bounds: nothing changed
    off = Controllers(INF, 0.0)
    assert not off.meta_step(0.0, 1.0) and (off.tau, off.beta) == (INF, 0.0)


def test_meta_step_descends_to_the_target_entropy():
    q, reference = random_groups(groups=16, size=8)
    controllers = Controllers(0.02, 0.3, ControllerSettings(meta_lr=1.0))
    for _ in range(300):
        weights = maxent_weights(q, reference, controllers.tau, controllers.beta)
        gradients = entropy_target_gradients(weights, q, reference, controllers.tau, controllers.beta, target=1.7)
        controllers.meta_step(*gradients)
    weights = maxent_weights(q, reference, controllers.tau, controllers.beta)
    assert abs(entropy(weights).mean().item() - 1.7) < 1e-3
    assert controllers.meta_updates > 50


def test_controllers_survive_save_and_load_bit_for_bit(tmp_path):
    settings = ControllerSettings(tau_target_entropy=1.2, kl_target=0.08, kl_horizon=3.0, tau_lr=0.3)
    original = Controllers(0.7, 0.013, settings)
    simulate_tau(original, 17)
    simulate_beta(original, 17, np.random.default_rng(1))
    original.meta_step(0.123, -0.456)
    original.save(tmp_path / "controllers.json")
    resumed = Controllers(99.0, 99.0, settings)
    resumed.load(tmp_path / "controllers.json")
    assert resumed == original
    for controllers in (original, resumed):
        simulate_tau(controllers, 5, first_step=17)
        simulate_beta(controllers, 5, np.random.default_rng(2))
    assert (resumed.tau.hex(), resumed.beta.hex()) == (original.tau.hex(), original.beta.hex())
    assert resumed == original
    written = json.loads((tmp_path / "controllers.json").read_text())
    assert set(written) == {"tau", "beta", "entropy_average", "tau_updates", "beta_updates", "meta_updates"}
    assert (tmp_path / "controllers.json").read_text().count("\n") > 5  # readable: a line per entry
    assert os.listdir(tmp_path) == ["controllers.json"]


def test_infinite_tau_is_saved_as_strict_json(tmp_path):
    Controllers(INF, 0.1).save(tmp_path / "state.json")
    assert json.loads((tmp_path / "state.json").read_text(), parse_constant=pytest.fail)["tau"] == "inf"
    resumed = Controllers(1.0, 1.0)
    resumed.load(tmp_path / "state.json")
    assert resumed == Controllers(INF, 0.1)


def test_a_save_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    Controllers(1.0, 0.1).save(path)
    before = path.read_bytes()

    def dies(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dies)
        with pytest.raises(OSError, match="no space"):
            Controllers(2.0, 0.2).save(path)
    assert path.read_bytes() == before
    Controllers(2.0, 0.2).save(path)
    assert path.read_bytes() != before


def test_a_foreign_state_is_refused_whole():
    controllers = Controllers(1.0, 0.1)
    good = controllers.state_dict()
    spoiled = [{**good, "gamma": 1.0}, {"tau": 3.0}, {**good, "tau": 3.0, "beta": "large"}]
    for state in spoiled:
        with pytest.raises(ValueError):
            controllers.load_state_dict(state)
        assert controllers == Controllers(1.0, 0.1)


@pytest.mark.parametrize(
    "broken",
    [
        {"tau_min": 0.0},
        {"tau_min": 2.0, "tau_max": 1.0},
        {"tau_max": INF},
        {"beta_min": -1.0},
        {"entropy_decay": 1.0},
        {"kl_target": 0.0},
        {"kl_clip": 0.2, "kl_horizon": 0.1},
    ],
)
def test_settings_refuse_what_would_break_later(broken):
    with pytest.raises(ValueError, match=next(iter(broken))):
        ControllerSettings(**broken)


# ---- SEED-GRPO


def test_semantic_entropy_by_hand():
    logprobs = double([0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]).log() - 2.0
    answers = [["12", "7", "12", None], [4, 4, 4, 4], [(1,), (2,), (1,), (3,)]]
    masses = [[0.625, 0.25, 0.125], [1.0], [0.4, 0.2, 0.4]]  # the third row's 1 : 2 : 3 : 4 over 10
    wanted = [-sum(mass * math.log(mass) for mass in row) for row in masses]
    assert semantic_entropy(answers, logprobs).tolist() == pytest.approx(wanted, abs=1e-12)


def test_semantic_entropy_of_ragged_and_broken_groups():
    logprobs = double([-1.0, -1.0, 5.0], [-1.0, -INF, -1.0], [NAN, NAN, NAN], [0.0, 0.0, 0.0])
    found = semantic_entropy([["a", "b"], ["a", "b", "a"], ["a", "b", "b"], []], logprobs).tolist()
    thirds = -(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)  # nothing finite: uniform shares
    assert found == pytest.approx([math.log(2), 0.0, thirds, 0.0], abs=1e-12)
    for wrong in ([["a"]], [["a"] * 4, ["a"], ["a"], ["a"]]):
        with pytest.raises(ValueError, match="do not fit"):
            semantic_entropy(wrong, logprobs)


def test_seed_grpo_scale_by_hand():
    entropies = torch.tensor([0.0, math.log(2), math.log(4)])
    assert seed_grpo_scale(entropies, 0.5, 4).tolist() == pytest.approx([1.0, 1 / 1.25, 1 / 1.5])
    assert seed_grpo_scale(entropies.double(), 0.5, 4).dtype == torch.float64
    ragged = seed_grpo_scale(entropies, 0.5, torch.tensor([1, 2, 4]))
    assert ragged.tolist() == pytest.approx([1.0, 1 / 1.5, 1 / 1.5])
    assert torch.equal(seed_grpo_scale(entropies, 0.0, 4), torch.ones(3))
