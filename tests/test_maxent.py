"""src/maxent.py: the closed form against optimisers and hand-worked numbers, the controllers in simulated loops."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from src.config import TrainingConfig, load_config
from src.maxent import (
    BETA_RANGE,
    TAU_RANGE,
    Controllers,
    entropy,
    group_softmax,
    listwise_target,
    maxent_objective,
    maxent_weights,
    seed_grpo_scale,
    semantic_entropy,
    weight_entropy_gradients,
)

CONFIGS = Path(__file__).parent.parent / "configs"
NAN, INF = math.nan, math.inf
cases = pytest.mark.parametrize


def double(*rows):
    """A float64 tensor of rows [groups, G]."""
    return torch.tensor(rows, dtype=torch.float64)


def random_groups(groups=6, size=5, seed=0):
    """q and reference log-probs [groups, G] of random groups, q with a floor."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(groups, size, generator=generator, dtype=torch.float64)
    reference = -3 * torch.rand(groups, size, generator=generator, dtype=torch.float64)
    return listwise_target(rewards, 0.3, 0.05), reference


# ---- the target q


def test_listwise_target_by_hand():
    q = listwise_target(double([math.log(3), 0.0], [1.0, 1.0]), temperature=1.0, epsilon=0.1)
    assert torch.allclose(q, double([0.9 * 0.75 + 0.05, 0.9 * 0.25 + 0.05], [0.5, 0.5]), atol=1e-15)
    sharper = listwise_target(double([math.log(3), 0.0]), temperature=0.5, epsilon=0.0)
    assert torch.allclose(sharper, double([0.9, 0.1]), atol=1e-15)  # 3^2 : 1
    underflows = listwise_target(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), temperature=1e-4, epsilon=0.02)
    assert torch.allclose(underflows, torch.tensor([[0.985, 0.005, 0.005, 0.005]]), atol=1e-7), "full support"
    ragged = listwise_target(double([math.log(3), 50.0, 0.0]), 1.0, 0.1, torch.tensor([[True, False, True]]))
    assert torch.allclose(ragged, double([0.725, 0.0, 0.275]), atol=1e-15)


@cases(("given_dtype", "wanted"), [("bfloat16", "float32"), ("int64", "float32"), ("float64",) * 2])
def test_dtypes_are_fp32_or_better(given_dtype, wanted):
    rewards = torch.tensor([[0, 1, 2]], dtype=getattr(torch, given_dtype))
    q = listwise_target(rewards, 1.0, 0.1)
    assert q.dtype == maxent_weights(q, -rewards, 0.1, 0.1).dtype == getattr(torch, wanted)
    assert abs(q.sum().item() - 1) < 1e-6


@cases(("temperature", "epsilon"), [(0.0, 0.1), (-1.0, 0.1), (NAN, 0.1), (1.0, -0.1), (1.0, 1.5)])
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


@cases("seed", range(12))
def test_closed_form_equals_a_numerical_optimiser(seed):
    """The program in numpy, written from the formula and sharing nothing with the module."""
    generator = np.random.default_rng(seed)
    tau, beta = generator.uniform(0.05, 2.0, size=2)
    if seed % 4 == 0:
        tau, beta = [(0.0, 0.5), (0.5, 0.0), (0.05, 0.05)][seed // 4]
    q, reference = (row[0] for row in random_groups(groups=1, size=int(generator.integers(2, 9)), seed=seed))
    log_q, log_anchor = q.log().numpy(), reference.log_softmax(0).numpy()

    def softmax(logits):
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    def loss(logits):
        weights = softmax(logits)
        logs = np.log(weights)
        slope = log_q - tau * logs - beta * (logs - log_anchor)
        return -float(weights @ slope), -weights * (slope - weights @ slope)

    found = minimize(loss, np.zeros(len(q)), jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 2000})
    weights = maxent_weights(q[None], reference[None], tau, beta)
    assert np.abs(weights[0].numpy() - softmax(found.x)).max() < 1e-6
    value = maxent_objective(weights, q[None], reference[None], tau, beta).item()
    assert value == pytest.approx(-found.fun, abs=1e-9)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
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


@cases("dtype", [torch.float32, torch.float64])
@cases("size", [1e-4, 1e-30, 1e-44, 5e-324, 0.0])
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
    assert torch.allclose(maxent_weights(q, reference, INF, 0.5, mask=some), some.double() / 3)


@cases("dtype", [torch.float32, torch.float64])
@cases("beta", [1e8, 1e38, 1e300, INF])
def test_beta_to_infinity_is_the_reference(beta, dtype):
    q, reference = (values.to(dtype) for values in random_groups())
    assert torch.allclose(maxent_weights(q, reference, 0.3, beta), reference.softmax(dim=1), atol=1e-6)


def test_degenerate_group_falls_back_to_uniform():
    q, nothing = double([0.7, 0.2, 0.1]), double([-INF, NAN, INF])
    weights = maxent_weights(q, nothing, 0.1, 0.1)
    assert torch.equal(weights, torch.full((1, 3), 1 / 3, dtype=torch.float64))
    assert [slope.item() for slope in weight_entropy_gradients(weights, q, nothing, 0.1, 0.1)] == [0.0, 0.0]
    two_left = maxent_weights(q, nothing, 0.1, 0.1, mask=torch.tensor([[True, False, True]]))
    assert torch.equal(two_left, double([0.5, 0.0, 0.5]))
    assert torch.equal(maxent_weights(torch.zeros(1, 3), torch.zeros(1, 3), 0.1, 0.1), torch.full((1, 3), 1 / 3))
    # one broken entry loses its weight and leaves the others theirs
    partly, whole = maxent_weights(q, double([0.0, NAN, 0.0]), 1.0, 1.0), group_softmax(q.log() / 2)
    assert torch.allclose(partly, whole * double([1, 0, 1]) / whole[:, ::2].sum())
    # without trust in the reference, it is not read
    assert torch.allclose(maxent_weights(q, nothing, 1.0, 0.0), q, atol=1e-15)


@cases(("tau", "beta"), [(-0.1, 1.0), (1.0, -0.1), (NAN, 1.0), (1.0, NAN), (INF, INF)])
def test_weights_refuse_bad_tau_and_beta(tau, beta):
    with pytest.raises(ValueError, match="tau and beta"):
        maxent_weights(double([0.5, 0.5]), double([0.0, 0.0]), tau, beta)


def test_ragged_mask_equals_the_dense_group_and_padding_is_inert():
    q_dense, reference_dense = random_groups(groups=1, size=3)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    q, reference = torch.full((2, 4), NAN, dtype=torch.float64), torch.full((2, 4), INF, dtype=torch.float64)
    q[0, mask[0]], reference[0, mask[0]] = q_dense[0], reference_dense[0]
    weights, dense = maxent_weights(q, reference, 0.2, 0.4, mask), maxent_weights(q_dense, reference_dense, 0.2, 0.4)
    assert torch.allclose(weights[0, mask[0]], dense[0], atol=1e-15)
    assert weights[0, 1] == 0 and (weights[1] == 0).all()
    ragged, alone = (weights, q, reference, 0.2, 0.4, mask), (dense, q_dense, reference_dense, 0.2, 0.4)
    found = [maxent_objective(*ragged), *weight_entropy_gradients(*ragged)]
    for value, expected in zip(found, [maxent_objective(*alone), *weight_entropy_gradients(*alone)], strict=True):
        assert value.tolist() == pytest.approx([expected.item(), 0.0], abs=1e-13)


# ---- the controllers


def test_entropy_gradients_against_autograd():
    q, reference = random_groups()
    for tau, beta in [(0.3, 0.2), (0.05, 0.0), (0.0, 0.4), (2.0, 3.0)]:
        weights = maxent_weights(q, reference, tau, beta)
        leaves = [torch.full((len(q), 1), value, dtype=q.dtype, requires_grad=True) for value in (tau, beta)]
        textbook = q ** (1 / sum(leaves)) * reference.exp() ** (leaves[1] / sum(leaves))
        textbook = textbook / textbook.sum(dim=1, keepdim=True)
        assert torch.allclose(textbook, weights, atol=1e-12)
        wanted = torch.autograd.grad(-(textbook * textbook.log()).sum(), leaves)
        for found, expected in zip(weight_entropy_gradients(weights, q, reference, tau, beta), wanted, strict=True):
            assert torch.allclose(found, expected[:, 0], rtol=1e-9, atol=1e-12)


def test_entropy_gradients_are_zero_and_finite_in_the_limits():
    q, reference = random_groups()
    for tau, beta in [(INF, 0.5), (0.5, INF), (0.0, 0.0), (1e-12, 0.0)]:
        weights = maxent_weights(q, reference, tau, beta)
        for gradient in weight_entropy_gradients(weights, q, reference, tau, beta):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def controllers_of(tau=0.1, beta=0.1, **keys) -> Controllers:
    return Controllers(TrainingConfig(loss_type="maxent", tau=tau, beta=beta, **keys))


def values_of(controllers: Controllers) -> tuple:
    return controllers.tau, controllers.beta, controllers.entropy_average


def test_tau_update_by_hand():
    controllers = controllers_of(1.0, tau_target_entropy=0.5, tau_lr=0.1)
    controllers.update_tau(1.0, step=1)
    assert controllers.tau == pytest.approx(math.exp(0.1 * (0.5 - 1.0)))  # too much entropy: tau falls
    controllers.update_tau(0.0, step=2)
    assert controllers.entropy_average == pytest.approx(0.9)
    assert controllers.tau == pytest.approx(math.exp(0.1 * (0.5 - 1.0) + 0.1 * (0.5 - 0.9)))
    for step in range(2000):
        controllers.update_tau(0.0, step)
    assert (controllers.tau, controllers.beta) == (TAU_RANGE[1], 0.1)  # clamped
    waiting = controllers_of(1.0, tau_target_entropy=0.4, tau_warmup_steps=10)
    for step in range(1, 11):
        waiting.update_tau(1.0, step)
    assert values_of(waiting) == pytest.approx((1.0, 0.1, 1.0)), "the average warms, tau waits"
    waiting.update_tau(1.0, 11)
    assert waiting.tau < 1.0


def test_beta_update_by_hand():
    controllers = controllers_of(0.1, 0.4, beta_kl_target=0.1)
    # the error is clipped to 0.2 either way; a noisy k1 may be negative
    for measured, error in ((0.11, 0.1), (9.0, 0.2), (-9.0, -0.2)):
        controllers.beta = 0.4
        controllers.update_beta(measured)
        assert controllers.beta == pytest.approx(0.4 * (1 + error / 10))
    for measured, bound in ((0.0, BETA_RANGE[0]), (1.0, BETA_RANGE[1])):
        for _ in range(1000):
            controllers.update_beta(measured)
        assert (controllers.beta, controllers.tau) == (bound, 0.1)


def test_meta_step_by_hand():
    controllers = controllers_of(2.0, 0.1, meta_lr=0.25)
    controllers.meta_step(0.2, -1.0)
    assert controllers.tau == pytest.approx(2.0 - 0.25 * 0.2)
    assert controllers.beta == pytest.approx(0.1 + 0.25 * 1.0)
    before = values_of(controllers)
    controllers.meta_step(0.0, 0.0)
    assert values_of(controllers) == before
    controllers.meta_step(-1e300, 1e300)
    assert (controllers.tau, controllers.beta) == (TAU_RANGE[1], BETA_RANGE[0])
    off = controllers_of(INF, 0.0, meta_lr=0.25)
    off.meta_step(0.0, 1.0)
    assert (off.tau, off.beta) == (INF, 0.0)


def test_controllers_without_target_or_measurement_stay():
    off = controllers_of(INF, 0.0)
    off.update_tau(0.3, 5)
    off.update_beta(0.3)
    assert values_of(off) == (INF, 0.0, None)
    on = controllers_of(1.0, tau_target_entropy=0.4, beta_kl_target=0.1, meta_lr=0.1)
    for broken in (NAN, INF):
        on.update_tau(broken, 5)
        on.update_beta(broken)
        on.meta_step(broken, broken)
    assert values_of(on) == (1.0, 0.1, None)  # neither a value nor the average


def test_the_entropy_bonus_grows_below_its_target_shrinks_above_and_then_rests():
    """A step of 0.005 (TRL); a measurement that is not finite moves nothing, and the state survives."""
    training = TrainingConfig(entropy_target=0.5, entropy_coef=0.01)
    controllers = Controllers(training)
    assert controllers.live(training).entropy_coef == 0.01
    weights = [controllers.steer({"train/entropy": entropy}, 1)["train/entropy_coef"] for entropy in (0.4, 0.5, NAN)]
    assert weights == pytest.approx([0.015, 0.02, 0.02])
    assert controllers.live(training).entropy_coef == pytest.approx(0.02)
    for _ in range(2):
        controllers.steer({"train/entropy": 0.6}, 2)
    assert controllers.entropy_coef == pytest.approx(0.01) and controllers.live(training).entropy_coef == 0
    again = Controllers(controllers.training)
    again.load_state_dict(controllers.state_dict())
    assert (again.entropy_coef, again.live(training).entropy_coef) == (controllers.entropy_coef, 0)
    for _ in range(9):
        controllers.steer({"train/entropy": 0.6}, 3)
    assert controllers.entropy_coef == 0
    off = Controllers(TrainingConfig(entropy_coef=0.3))
    assert "train/entropy_coef" not in off.steer({"train/entropy": 9.0}, 1)
    assert off.live(off.training).entropy_coef == 0.3


def simulate_tau(controllers: Controllers, steps, first_step=0):
    """The controller against the true weight entropy of fresh random groups; returns the entropies it saw."""
    seen = []
    for step in range(first_step, first_step + steps):
        q, reference = random_groups(groups=16, size=8, seed=step)
        seen.append(entropy(maxent_weights(q, reference, controllers.tau, controllers.beta)).mean().item())
        controllers.update_tau(seen[-1], step)
    return seen


@cases("start", [0.005, 5.0])
def test_tau_controller_reaches_its_target(start):
    controllers = controllers_of(start, 0.05, tau_target_entropy=1.2, tau_lr=0.3, tau_warmup_steps=5)
    seen = simulate_tau(controllers, 150)
    assert abs(seen[0] - 1.2) > 0.5  # it had somewhere to go
    assert abs(np.mean(seen[-40:]) - 1.2) < 0.02


def simulate_beta(controllers: Controllers, steps, noise):
    """A policy whose KL falls as beta rises, with a lag, and is measured with noise; returns the measurements."""
    kl, seen = 0.5, []
    for _ in range(steps):
        kl += 0.3 * (0.02 / (controllers.beta + 0.01) - kl)
        seen.append(kl * math.exp(0.1 * noise.standard_normal()))
        controllers.update_beta(seen[-1])
    return seen


@cases("start", [0.01, 3.0])
def test_beta_controller_reaches_its_target(start):
    controllers = controllers_of(0.1, start, beta_kl_target=0.08)
    seen = simulate_beta(controllers, 600, np.random.default_rng(0))
    assert abs(np.mean(seen[-100:]) - 0.08) < 0.008
    assert controllers.beta == pytest.approx(0.02 / 0.08 - 0.01, rel=0.15)


def test_the_meta_controller_descends_to_the_target_entropy_by_what_a_step_measures():
    q, reference = random_groups(groups=16, size=8)
    controllers = controllers_of(0.02, 0.3, meta_lr=0.2, tau_target_entropy=1.7)

    def measured() -> dict[str, float]:
        weights = maxent_weights(q, reference, controllers.tau, controllers.beta)
        slopes = weight_entropy_gradients(weights, q, reference, controllers.tau, controllers.beta)
        names = ("maxent/weight_entropy", "maxent/entropy_slope_tau", "maxent/entropy_slope_beta")
        return {name: x.mean().item() for name, x in zip(names, (entropy(weights), *slopes), strict=True)}

    for step in range(300):
        live = controllers.steer(measured(), step)
    assert abs(measured()["maxent/weight_entropy"] - 1.7) < 1e-3
    assert live == {"maxent/tau": controllers.tau, "train/beta": controllers.beta}


def test_controllers_survive_their_state_bit_for_bit():
    keys = {"tau_target_entropy": 1.2, "beta_kl_target": 0.08, "tau_lr": 0.3, "meta_lr": 0.1}
    original, resumed = controllers_of(0.7, 0.013, **keys), controllers_of(99.0, 99.0, **keys)
    simulate_tau(original, 17)
    simulate_beta(original, 17, np.random.default_rng(1))
    original.meta_step(0.123, -0.456)
    resumed.load_state_dict(original.state_dict())
    for controllers in (original, resumed):
        simulate_tau(controllers, 5, first_step=17)
        simulate_beta(controllers, 5, np.random.default_rng(2))
    assert values_of(resumed) == values_of(original)


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


@pytest.mark.parametrize("rewards", [[1.0, 1, 0, 0, 0, 0, 0, 0], [1.1, 1.1, 1.0, 0.1, 0.1, 0.0, 0.0, 0.0]])
def test_tau_is_a_knob_at_the_default_temperature(rewards):
    """Over its useful range the entropy of the weights moves by 0.3 nats, and right answers keep most of the weight."""
    training, reference = TrainingConfig(loss_type="maxent"), torch.zeros(1, 8)
    q = listwise_target(torch.tensor([rewards]), training.q_temperature, training.q_epsilon)
    weights = [maxent_weights(q, reference, tau, training.beta)[0] for tau in (0.01, 0.05, 0.1, 0.5)]
    entropies = [float(entropy(row[None])) for row in weights]
    assert entropies == sorted(entropies) and entropies[-1] - entropies[0] > 0.3
    for row in weights[:3]:
        assert row[torch.tensor(rewards) >= 1].sum() > 0.9
    # right, but without the format: not pushed down like a wrong one
    if 1.1 in rewards:
        assert weights[2][2] > 1 / 8 > weights[2][3]


@pytest.mark.parametrize("file", ["recipes/maxent_grpo.yaml", "configs_0.5b/config_maxent_tau0.1_beta0.04_0.5b.yaml"])
def test_as_shipped_each_tau_is_another_place(file):
    """The entropy of the weights, averaged over groups of 1 to 7 right answers of 8, differs by 0.2 nats and more."""
    training = load_config(CONFIGS / file).training
    rewards = torch.tensor([[1.1] * right + [0.1] * (8 - right) for right in range(1, 8)])
    q = listwise_target(rewards, training.q_temperature, training.q_epsilon)
    found = [entropy(maxent_weights(q, torch.zeros(7, 8), tau, 0.04)).mean() for tau in (0.01, 0.05, 0.1, 0.5)]
    assert all(after - before > 0.2 for before, after in pairwise(found)) and found[-1] < 2.075
