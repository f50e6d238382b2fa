"""The banded Sinkhorn divergence against POT, against finite differences, and against its own promises.

`python -m tests.test_sinkhorn` prints time and memory against the number of tokens.
"""

import time

import numpy as np
import ot
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.sinkhorn import sinkhorn_divergence, transport_plan


def random_path(*shape: int, seed: int, common: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random rows; with `common` they share a direction, as the hidden states of language models do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (noise + common * torch.randn(shape[-1], generator=generator, dtype=torch.float64)).to(dtype)


def index_of(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def pot_plan(policy: torch.Tensor, anchor: torch.Tensor, window: int, eps: float, taper: bool = False):
    """(plan, cost) as numpy arrays, from POT alone; cost is infinite, in effect, outside the band."""
    policy, anchor = policy.numpy(), anchor.numpy()
    unit_policy = policy / np.linalg.norm(policy, axis=1, keepdims=True)
    unit_anchor = anchor / np.linalg.norm(anchor, axis=1, keepdims=True)
    length = len(policy)
    distance = abs(np.subtract.outer(np.arange(length), np.arange(length)))
    cost = 1 - unit_policy @ unit_anchor.T
    if taper:
        cost = cost - eps * np.log(np.maximum(1 - distance / (window + 1), 1e-300))
    cost = np.where(distance > window, 1e6, cost)
    mass = np.full(length, 1 / length)
    plan = ot.sinkhorn(mass, mass, cost, eps, "sinkhorn_log", numItermax=5000, stopThr=1e-12, warn=False)
    return plan, cost


def pot_value(plan: np.ndarray, cost: np.ndarray, eps: float) -> float:
    """<P, C> + eps KL(P || a x b), uniform marginals."""
    inside = plan > 0
    return (plan * cost)[inside].sum() + eps * (plan[inside] * np.log(plan[inside] * len(plan) ** 2)).sum()


# Against POT


def test_plan_cost_and_value_match_pot_on_200_problems():
    """Full window: the plan, <P, C> and the regularised value of every problem; the values in one packed call."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 20, size=200).tolist()
    hidden, eps = 6, 0.4
    policy, anchor = random_path(sum(lengths), hidden, seed=1), random_path(sum(lengths), hidden, seed=2)
    values = sinkhorn_divergence(
        policy, anchor, index_of(lengths), 200, window=max(lengths), eps=eps, iterations=400, debias=False
    )
    for x, y, value in zip(policy.split(lengths), anchor.split(lengths), values, strict=True):
        expected, cost = pot_plan(x, y, len(x), eps)
        plan = transport_plan(x, y, window=len(x), eps=eps, iterations=400).numpy()
        np.testing.assert_allclose(plan, expected, atol=1e-5)
        assert (plan * cost).sum() == pytest.approx((expected * cost).sum(), abs=1e-5)
        assert value.item() == pytest.approx(pot_value(expected, cost, eps), abs=1e-5)


@pytest.mark.parametrize("taper", [False, True])
@pytest.mark.parametrize("window", [0, 2, 5, 100])
def test_band_matches_pot_on_a_masked_dense_cost(window, taper):
    lengths, eps = [9, 1, 20, 4, 14, 6], 0.3  # a narrow band mixes slowly along its length: many iterations
    policy, anchor = random_path(sum(lengths), 5, seed=3, common=0.5), random_path(sum(lengths), 5, seed=4, common=0.5)
    options = {"window": window, "eps": eps, "iterations": 2000, "taper": taper}
    values = sinkhorn_divergence(policy, anchor, index_of(lengths), len(lengths), debias=False, **options)
    for x, y, value in zip(policy.split(lengths), anchor.split(lengths), values, strict=True):
        expected, cost = pot_plan(x, y, window, eps, taper)
        np.testing.assert_allclose(transport_plan(x, y, **options).numpy(), expected, atol=1e-5)
        assert value.item() == pytest.approx(pot_value(expected, cost, eps), abs=1e-5)


@pytest.mark.parametrize("taper", [False, True])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("debias", [False, True])
def test_pot_backend_gives_the_same_values_and_gradients(debias, unroll, taper):
    lengths = [7, 0, 1, 12]  # the second episode has no tokens
    anchor = random_path(sum(lengths), 4, seed=5)
    options = {"window": 3, "eps": 0.5, "iterations": 300, "debias": debias, "unroll": unroll, "taper": taper}
    results = {}
    for backend in ("band", "pot"):
        policy = random_path(sum(lengths), 4, seed=6).requires_grad_()
        values = sinkhorn_divergence(policy, anchor, index_of(lengths), 4, backend=backend, **options)
        values.sum().backward()
        results[backend] = values.detach(), policy.grad
    torch.testing.assert_close(results["band"], results["pot"], atol=1e-7, rtol=0)
    assert results["band"][0][1] == 0


def test_unknown_backend_is_refused():
    x = random_path(3, 4, seed=0)
    with pytest.raises(ValueError, match="backend"):
        sinkhorn_divergence(x, x, index_of([3]), 1, window=1, eps=0.1, iterations=1, backend="geomloss")


# At equality, and one token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-3, 0.05])
@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 10, 50])
def test_value_and_gradient_are_zero_at_equality(iterations, unroll, eps, dtype):
    """Converged or not. With alternating updates the plan is not symmetric and the gradient is not zero."""
    lengths = [40, 1, 25, 2]
    anchor = random_path(sum(lengths), 16, seed=7, common=1.0, dtype=dtype)
    policy = anchor.clone().requires_grad_()
    options = {"window": 8, "eps": eps, "iterations": iterations, "unroll": unroll}
    for taper in (False, True):
        values = sinkhorn_divergence(policy, anchor, index_of(lengths), 4, taper=taper, **options)
        (gradient,) = torch.autograd.grad(values.sum(), policy)
        assert values.abs().max() < 1e-6
        assert gradient.abs().max() < 1e-6


def test_without_debiasing_equality_is_not_zero():
    x = random_path(20, 8, seed=8)
    assert sinkhorn_divergence(x, x, index_of([20]), 1, window=4, eps=0.1, iterations=50, debias=False) > 0.05


@pytest.mark.parametrize("iterations", [1, 7])
def test_one_token_costs_one_minus_cosine(iterations):
    policy, anchor = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    for debias in (False, True):
        values = sinkhorn_divergence(
            policy, anchor, index_of([1, 1]), 2, window=16, eps=0.05, iterations=iterations, debias=debias
        )
        torch.testing.assert_close(values, torch.tensor([0.4, 2.0]))


# Gradients


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("taper", [False, True])
def test_implicit_gradient_is_the_finite_difference_of_the_converged_value(debias, taper):
    lengths = [6, 1, 5]
    anchor, policy = random_path(12, 3, seed=9), random_path(12, 3, seed=10)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # episodes must not leak into one another

    def loss(policy: torch.Tensor) -> torch.Tensor:
        options = {"window": 2, "eps": 0.3, "iterations": 500, "debias": debias, "taper": taper}
        return weights @ sinkhorn_divergence(policy, anchor, index_of(lengths), 3, **options)

    (gradient,) = torch.autograd.grad(loss(policy.requires_grad_()), policy)
    policy, step = policy.detach(), 1e-5
    for position in range(0, policy.numel(), 3):
        nudge = torch.zeros(policy.numel(), dtype=torch.float64)
        nudge[position] = step
        nudge = nudge.view_as(policy)
        difference = (loss(policy + nudge) - loss(policy - nudge)) / (2 * step)
        assert gradient.view(-1)[position].item() == pytest.approx(difference.item(), abs=1e-7)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_unrolled_gradient_is_exact_far_from_convergence(iterations, debias):
    anchor = random_path(8, 3, seed=11)
    options = {"window": 2, "eps": 0.1, "iterations": iterations, "debias": debias, "unroll": True}

    def values(policy: torch.Tensor) -> torch.Tensor:
        return sinkhorn_divergence(policy, anchor, index_of([5, 1, 2]), 3, **options)

    assert torch.autograd.gradcheck(values, random_path(8, 3, seed=12).requires_grad_())


def test_unrolled_and_implicit_gradients_differ_early_and_agree_late():
    anchor, policy = random_path(10, 4, seed=13), random_path(10, 4, seed=14).requires_grad_()

    def gap(iterations: int) -> float:
        gradients = []
        for unroll in (False, True):
            options = {"window": 3, "eps": 0.1, "iterations": iterations, "unroll": unroll}
            value = sinkhorn_divergence(policy, anchor, index_of([10]), 1, **options)
            gradients += torch.autograd.grad(value.sum(), policy)
        return (gradients[0] - gradients[1]).abs().max().item()

    assert gap(2) > 1e-3
    assert gap(2000) < 1e-8


def test_the_anchor_never_receives_a_gradient():
    policy, anchor = random_path(6, 4, seed=15).requires_grad_(), random_path(6, 4, seed=16).requires_grad_()
    for backend in ("band", "pot"):
        for unroll in (False, True):
            options = {"window": 2, "eps": 0.1, "iterations": 5, "unroll": unroll, "backend": backend}
            sinkhorn_divergence(policy, anchor, index_of([6]), 1, **options).sum().backward()
    assert anchor.grad is None
    assert policy.grad.abs().sum() > 0


# Promises about the value


@pytest.mark.parametrize("window", [0, 3, 50])
def test_an_episode_does_not_see_its_neighbours(window):
    """Value and gradient, alone and packed between others; the window reaches far beyond the short ones."""
    lengths = [5, 1, 0, 18, 33]
    policy, anchor = random_path(57, 4, seed=17), random_path(57, 4, seed=18)
    options = {"window": window, "eps": 0.1, "iterations": 7, "taper": True}
    packed = policy.clone().requires_grad_()
    values = sinkhorn_divergence(packed, anchor, index_of(lengths), 5, **options)
    values.sum().backward()
    for episode, (x, y) in enumerate(zip(policy.split(lengths), anchor.split(lengths), strict=True)):
        alone = x.clone().requires_grad_()
        value = sinkhorn_divergence(alone, y, index_of([len(x)]), 1, **options)
        value.sum().backward()
        torch.testing.assert_close(values[episode], value[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(packed.grad.split(lengths)[episode], alone.grad, atol=1e-12, rtol=0)


def test_no_tokens_at_all():
    empty = torch.zeros(0, 4, requires_grad=True)
    values = sinkhorn_divergence(empty, empty, index_of([0, 0]), 2, window=4, eps=0.1, iterations=3)
    assert values.tolist() == [0, 0]
    values.sum().backward()


@pytest.mark.parametrize("common", [0.0, 3.0])
@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0])
def test_debiased_value_is_not_negative(eps, common):
    """With the whole sequence in the window, and in a tapered band; 40 pairs from far apart to nearly equal."""
    lengths = [1 + episode % 20 for episode in range(40)]
    tokens, index = sum(lengths), index_of(lengths)
    anchor = random_path(tokens, 6, seed=19, common=common)
    spread = torch.logspace(-3, 1, 40, dtype=torch.float64)[index][:, None]  # [tokens, 1]
    policy = anchor + spread * random_path(tokens, 6, seed=20)
    for band in ({"window": 20}, {"window": 3, "taper": True}, {"window": 20, "taper": True}):
        for iterations in (20, 500):
            values = sinkhorn_divergence(policy, anchor, index, 40, eps=eps, iterations=iterations, **band)
            assert values.min() > 0


def test_a_hard_band_can_be_negative_and_a_tapered_one_cannot():
    """Three tokens, window 1: the band [[1,1,0],[1,1,1],[0,1,1]] has the eigenvalue 1 - sqrt(2).

    Moving the tokens of one anchor along its eigenvector (1, -sqrt 2, 1) is cheaper, in the debiased sense, than
    not moving at all, so a policy that descends the hard band would leave the anchor.
    """
    anchor = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    policy = anchor + 0.3 * torch.tensor([[0.0, 1.0], [0.0, -(2**0.5)], [0.0, 1.0]], dtype=torch.float64)
    options = {"window": 1, "eps": 1.0, "iterations": 500}
    hard, tapered = (
        sinkhorn_divergence(policy, anchor, index_of([3]), 1, taper=taper, **options) for taper in (False, True)
    )
    assert hard < -1e-3
    assert tapered > 1e-3


def test_unconverged_value_is_a_lower_bound_that_grows():
    """The dual objective: never above the optimum, and the averaged updates climb."""
    policy, anchor = random_path(30, 4, seed=21), random_path(30, 4, seed=22)
    values = [
        sinkhorn_divergence(
            policy, anchor, index_of([30]), 1, window=5, eps=0.05, iterations=iterations, debias=False
        ).item()
        for iterations in (1, 3, 10, 30, 100, 3000)
    ]
    assert values == sorted(values)
    assert values[0] < values[-1] - 1e-2


@pytest.mark.parametrize("iterations", [1, 2, 25])
def test_plan_is_symmetric_at_equality_and_bounded_everywhere(iterations):
    """f + g - C <= eps log T after every averaged update, so no entry passes 1 / T even with eps = 1e-3."""
    x, y = random_path(30, 4, seed=23), random_path(30, 4, seed=24)
    plan = transport_plan(x, y, window=4, eps=1e-3, iterations=iterations)
    assert plan.max() <= 1 / 30 + 1e-9
    outside = (torch.arange(30)[:, None] - torch.arange(30)).abs() > 4
    assert (plan[outside] == 0).all()
    plan = transport_plan(x, x, window=4, eps=0.1, iterations=iterations)
    torch.testing.assert_close(plan, plan.T)


@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize("unroll", [False, True])
def test_never_nan(unroll, eps):
    """Zero rows, equal rows, opposite rows, tiny and huge ones, a long episode: value and gradient stay finite."""
    lengths = [1, 3, 2000, 1]
    policy, anchor = (random_path(2005, 8, seed=seed, dtype=torch.float32) for seed in (25, 26))
    policy[0] = 0
    anchor[[0, 2, 500]] = 0
    policy[100:200] = 0
    policy[300:350], policy[400:450] = anchor[300:350], -anchor[400:450]
    policy[600], policy[601], anchor[602] = 1e-30, 1e15, 1e-20
    policy.requires_grad_()
    for debias in (False, True):
        options = {"window": 16, "eps": eps, "iterations": 10, "unroll": unroll, "debias": debias}
        values = sinkhorn_divergence(policy, anchor, index_of(lengths), 4, **options)
        (gradient,) = torch.autograd.grad(values.sum(), policy)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


def test_arithmetic_is_fp32_for_bf16_inputs_also_under_autocast():
    policy, anchor = (random_path(50, 32, seed=seed, dtype=torch.bfloat16) for seed in (27, 28))
    options = {"window": 8, "eps": 0.05, "iterations": 20}
    exact = sinkhorn_divergence(policy.double(), anchor.double(), index_of([50]), 1, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sinkhorn_divergence(policy, anchor, index_of([50]), 1, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=0)


# Memory and time


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest storage any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def measure_memory(tokens: int, hidden: int, window: int) -> tuple[int, int]:
    """(elements of the largest tensor, bytes autograd keeps) of one forward and backward."""
    policy = random_path(tokens, hidden, seed=29, dtype=torch.float32).requires_grad_()
    anchor = random_path(tokens, hidden, seed=30, dtype=torch.float32)
    index = torch.arange(tokens) // 700
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = sinkhorn_divergence(policy, anchor, index, tokens // 700 + 1, window=window, eps=0.05, iterations=5)
        kept_bytes = sum(kept.values())
        values.sum().backward()
    return largest.elements, kept_bytes


def test_memory_grows_with_tokens_and_not_with_their_square():
    hidden, window = 128, 16
    (largest, kept), (largest_twice, kept_twice) = (measure_memory(tokens, hidden, window) for tokens in (4096, 8192))
    assert kept_twice / 8192 < 1.5 * kept / 4096
    assert largest_twice / 8192 < 1.5 * largest / 4096
    # Three problems of 2w+1 columns, or the rows of one backward matmul: block + 2w of them for a block of 2w.
    assert largest_twice <= 8192 * max(3 * (2 * window + 1), 2 * hidden) * 1.1
    # In floats: the policy's rows (input, unit, padded), the anchor's (padded), and a handful of bands.
    assert kept_twice <= 8192 * 4 * (6 * hidden + 12 * (2 * window + 1))


def test_memory_does_not_hold_a_copy_of_the_hidden_states_for_every_offset():
    _, narrow = measure_memory(2048, 256, 2)
    _, wide = measure_memory(2048, 256, 32)
    assert wide - narrow < 2048 * 4 * (60 * 12)  # 60 more columns of a few bands, not 60 x 256


def test_a_window_beyond_the_batch_costs_nothing():
    x = random_path(10, 4, seed=33)
    with LargestTensor() as largest:
        sinkhorn_divergence(x, x, index_of([10]), 1, window=500, eps=0.1, iterations=2)
    assert largest.elements < 10_000


def print_time_and_memory(hidden: int = 128, window: int = 16, iterations: int = 20) -> None:
    """Forward and backward of the debiased divergence against the number of tokens, in completions of 512."""
    for tokens in (1024, 2048, 4096, 8192):
        policy = random_path(tokens, hidden, seed=31, dtype=torch.float32).requires_grad_()
        anchor = random_path(tokens, hidden, seed=32, dtype=torch.float32)
        index, seconds = torch.arange(tokens) // 512, []
        for _ in range(5):
            start = time.perf_counter()
            options = {"window": window, "eps": 0.05, "iterations": iterations, "taper": True}
            sinkhorn_divergence(policy, anchor, index, tokens // 512, **options).sum().backward()
            seconds.append(time.perf_counter() - start)
        largest, kept = measure_memory(tokens, hidden, window)
        print(
            f"{tokens:6d} tokens {1e3 * min(seconds):7.1f} ms  "
            f"largest tensor {largest / tokens:5.0f} elements a token, kept {kept / tokens:5.0f} bytes a token"
        )


if __name__ == "__main__":
    print_time_and_memory()
