"""The banded Sinkhorn divergence against POT, against finite differences, and against its own promises.

`python -m tests.test_sinkhorn` prints time and memory against the number of tokens.
"""

import time

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.sinkhorn import sinkhorn_divergence, transport_plan

cases = pytest.mark.parametrize
tapered = cases("taper", [False, True])
debiased = cases("debias", [False, True])
unrolled = cases("unroll", [False, True])


def random_path(*shape: int, seed: int, common: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows; with `common` they share a direction, as the hidden states of language models do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (noise + common * torch.randn(shape[-1], generator=generator, dtype=torch.float64)).to(dtype)


def divergence(policy: Tensor, anchor: Tensor, lengths: list[int] | None = None, **options) -> Tensor:
    """sinkhorn_divergence of completions of these lengths; without any it is one."""
    lengths = [len(policy)] if lengths is None else lengths
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    options = {"window": 4, "eps": 0.1, "iterations": 10, **options}
    return sinkhorn_divergence(policy, anchor, index, len(lengths), **options)


def with_gradient(policy: Tensor, anchor: Tensor, lengths: list[int] | None = None, **options) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of their sum in the policy's path."""
    policy = policy.clone().requires_grad_()
    values = divergence(policy, anchor, lengths, **options)
    return values.detach(), torch.autograd.grad(values.sum(), policy)[0]


def pot_plan(policy: Tensor, anchor: Tensor, window: int, eps: float, taper: bool = False):
    """(plan, cost) as numpy arrays, from POT alone; cost is infinite, in effect, outside the band."""
    policy, anchor = (path.numpy() / np.linalg.norm(path.numpy(), axis=1, keepdims=True) for path in (policy, anchor))
    distance = abs(np.subtract.outer(np.arange(len(policy)), np.arange(len(policy))))
    cost = 1 - policy @ anchor.T
    if taper:
        cost = cost - eps * np.log(np.maximum(1 - distance / (window + 1), 1e-300))
    cost = np.where(distance > window, 1e6, cost)
    mass = np.full(len(policy), 1 / len(policy))
    plan = ot.sinkhorn(mass, mass, cost, eps, "sinkhorn_log", numItermax=5000, stopThr=1e-12, warn=False)
    return plan, cost


def assert_equals_pot(policy, anchor, lengths, window, eps, iterations, taper=False) -> None:
    """The plan, <P, C> and <P, C> + eps KL(P || a x b) of every completion; the values in one packed call."""
    options = {"window": window, "eps": eps, "iterations": iterations, "taper": taper}
    values = divergence(policy, anchor, lengths, debias=False, **options)
    for x, y, value in zip(policy.split(lengths), anchor.split(lengths), values, strict=True):
        expected, cost = pot_plan(x, y, window, eps, taper)
        plan = transport_plan(x, y, **options).numpy()
        np.testing.assert_allclose(plan, expected, atol=1e-5)
        assert (plan * cost).sum() == pytest.approx((expected * cost).sum(), abs=1e-5)
        inside = expected > 0
        terms = (expected * cost + eps * expected * np.log(np.where(inside, expected, 1) * len(x) ** 2))[inside]
        assert value.item() == pytest.approx(terms.sum(), abs=1e-5)


# Against POT


@cases("problems", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_plan_cost_and_value_match_pot(problems):
    lengths = np.random.default_rng(0).integers(1, 20, size=problems).tolist()
    policy, anchor = random_path(sum(lengths), 6, seed=1), random_path(sum(lengths), 6, seed=2)
    assert_equals_pot(policy, anchor, lengths, window=20, eps=0.4, iterations=400)


@tapered
@cases("window", [0, 2, 100])
def test_band_matches_pot_on_a_masked_dense_cost(window, taper):
    lengths = [9, 1, 20, 4, 14, 6]  # a narrow band mixes slowly along its length: many iterations
    policy, anchor = random_path(sum(lengths), 5, seed=3, common=0.5), random_path(sum(lengths), 5, seed=4, common=0.5)
    assert_equals_pot(policy, anchor, lengths, window, eps=0.3, iterations=2000, taper=taper)


@tapered
@unrolled
@debiased
def test_pot_backend_gives_the_same_values_and_gradients(debias, unroll, taper):
    lengths = [7, 0, 1, 12]  # the second episode has no tokens
    options = {"window": 3, "eps": 0.5, "iterations": 300, "debias": debias, "unroll": unroll, "taper": taper}
    policy, anchor = random_path(20, 4, seed=6), random_path(20, 4, seed=5)
    band, pot = (with_gradient(policy, anchor, lengths, backend=backend, **options) for backend in ("band", "pot"))
    torch.testing.assert_close(band, pot, atol=1e-7, rtol=0)
    assert band[0][1] == 0


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend"):
        divergence(torch.ones(3, 4), torch.ones(3, 4), backend="geomloss")


# At equality, and one token


@cases("dtype", [torch.float32, torch.bfloat16])
@cases("eps", [1e-3, 0.05])
@unrolled
@cases("iterations", [1, 2, 10, 50])
def test_value_and_gradient_are_zero_at_equality(iterations, unroll, eps, dtype):
    """Converged or not. With alternating updates the plan is not symmetric and the gradient is not zero."""
    path = random_path(68, 16, seed=7, common=1.0, dtype=dtype)
    for taper in (False, True):
        options = {"window": 8, "eps": eps, "iterations": iterations, "unroll": unroll, "taper": taper}
        value, gradient = with_gradient(path, path.clone(), [40, 1, 25, 2], **options)
        assert value.abs().max() < 1e-6 and gradient.abs().max() < 1e-6
    assert divergence(path, path, iterations=50, debias=False) > 0.05, "without debiasing it is not"


@cases("iterations", [1, 7])
def test_one_token_costs_one_minus_cosine(iterations):
    policy, anchor = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    for debias in (False, True):
        values = divergence(policy, anchor, [1, 1], window=16, eps=0.05, iterations=iterations, debias=debias)
        torch.testing.assert_close(values, torch.tensor([0.4, 2.0]))


# Gradients


@debiased
@tapered
def test_implicit_gradient_is_the_finite_difference_of_the_converged_value(debias, taper):
    anchor, policy = random_path(12, 3, seed=9), random_path(12, 3, seed=10)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # episodes must not leak into one another

    def loss(policy: Tensor) -> Tensor:
        options = {"window": 2, "eps": 0.3, "iterations": 500, "debias": debias, "taper": taper}
        return weights @ divergence(policy, anchor, [6, 1, 5], **options)

    (gradient,) = torch.autograd.grad(loss(policy.requires_grad_()), policy)
    policy, step = policy.detach(), 1e-5
    for position in range(0, policy.numel(), 3):
        nudge = torch.zeros(policy.numel(), dtype=torch.float64)
        nudge[position] = step
        nudge = nudge.view_as(policy)
        difference = (loss(policy + nudge) - loss(policy - nudge)) / (2 * step)
        assert gradient.view(-1)[position].item() == pytest.approx(difference.item(), abs=1e-7)


@debiased
@cases("iterations", [1, 3])
def test_unrolled_gradient_is_exact_far_from_convergence(iterations, debias):
    anchor, policy = random_path(8, 3, seed=11), random_path(8, 3, seed=12).requires_grad_()
    options = {"window": 2, "iterations": iterations, "debias": debias, "unroll": True}
    assert torch.autograd.gradcheck(lambda policy: divergence(policy, anchor, [5, 1, 2], **options), policy)


def test_unrolled_and_implicit_gradients_differ_early_and_agree_late():
    policy, anchor = random_path(10, 4, seed=14), random_path(10, 4, seed=13)

    def gap(iterations: int) -> float:
        options = {"window": 3, "iterations": iterations}
        implicit, exact = (with_gradient(policy, anchor, unroll=unroll, **options)[1] for unroll in (False, True))
        return (implicit - exact).abs().max().item()

    assert gap(2) > 1e-3
    assert gap(2000) < 1e-8


@unrolled
@cases("backend", ["band", "pot"])
def test_the_anchor_never_receives_a_gradient(backend, unroll):
    policy, anchor = random_path(6, 4, seed=15).requires_grad_(), random_path(6, 4, seed=16).requires_grad_()
    divergence(policy, anchor, window=2, unroll=unroll, backend=backend).sum().backward()
    assert anchor.grad is None and policy.grad.abs().sum() > 0


# Promises about the value


@cases("window", [0, 3, 50])
def test_an_episode_does_not_see_its_neighbours(window):
    """Value and gradient, alone and packed between others; the window reaches far beyond the short ones."""
    lengths = [5, 1, 0, 18, 33]
    policy, anchor = random_path(57, 4, seed=17), random_path(57, 4, seed=18)
    options = {"window": window, "iterations": 7, "taper": True}
    values, gradient = with_gradient(policy, anchor, lengths, **options)
    rows = zip(values, *(path.split(lengths) for path in (gradient, policy, anchor)), strict=True)
    for value, row, x, y in rows:
        torch.testing.assert_close((value[None], row), with_gradient(x, y, **options), atol=1e-12, rtol=0)


def test_no_tokens_at_all():
    values, gradient = with_gradient(torch.zeros(0, 4), torch.zeros(0, 4), [0, 0])
    assert values.tolist() == [0, 0] and gradient.shape == (0, 4)


@cases("common", [0.0, 3.0])
@cases("eps", [0.01, 0.1, 1.0])
def test_debiased_value_is_not_negative(eps, common):
    """With the whole sequence in the window, and in a tapered band; 40 pairs from far apart to nearly equal."""
    lengths = [1 + episode % 20 for episode in range(40)]
    anchor = random_path(sum(lengths), 6, seed=19, common=common)
    spread = torch.logspace(-3, 1, 40, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))[:, None]
    policy = anchor + spread * random_path(sum(lengths), 6, seed=20)
    for band in ({"window": 20}, {"window": 3, "taper": True}, {"window": 20, "taper": True}):
        for iterations in (20, 200):
            assert divergence(policy, anchor, lengths, eps=eps, iterations=iterations, **band).min() > 0


def test_a_hard_band_can_be_negative_and_a_tapered_one_cannot():
    """Three tokens, window 1: the band [[1,1,0],[1,1,1],[0,1,1]] has the eigenvalue 1 - sqrt(2).

    Moving the tokens of one anchor along its eigenvector (1, -sqrt 2, 1) is cheaper, in the debiased sense, than
    not moving at all, so a policy that descends the hard band would leave the anchor.
    """
    anchor = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    policy = anchor + 0.3 * torch.tensor([[0.0, 1.0], [0.0, -(2**0.5)], [0.0, 1.0]], dtype=torch.float64)
    options = {"window": 1, "eps": 1.0, "iterations": 500}
    hard, soft = (divergence(policy, anchor, taper=taper, **options) for taper in (False, True))
    assert hard < -1e-3 and soft > 1e-3


def test_unconverged_value_is_a_lower_bound_that_grows():
    """The dual objective: never above the optimum, and the averaged updates climb."""
    paths, options = (random_path(30, 4, seed=21), random_path(30, 4, seed=22)), {"window": 5, "eps": 0.05}
    rounds = (1, 3, 10, 30, 100, 3000)
    values = [divergence(*paths, iterations=iterations, debias=False, **options).item() for iterations in rounds]
    assert values == sorted(values) and values[0] < values[-1] - 1e-2


@cases("iterations", [1, 2, 25])
def test_plan_is_symmetric_at_equality_and_bounded_everywhere(iterations):
    """f + g - C <= eps log T after every averaged update, so no entry passes 1 / T even with eps = 1e-3."""
    x, y = random_path(30, 4, seed=23), random_path(30, 4, seed=24)
    plan = transport_plan(x, y, window=4, eps=1e-3, iterations=iterations)
    assert plan.max() <= 1 / 30 + 1e-9
    assert (plan[(torch.arange(30)[:, None] - torch.arange(30)).abs() > 4] == 0).all()
    plan = transport_plan(x, x, window=4, eps=0.1, iterations=iterations)
    torch.testing.assert_close(plan, plan.T)


@cases("eps", [1e-3, 0.1])
@unrolled
@debiased
def test_never_nan(debias, unroll, eps):
    """Zero rows, equal rows, opposite rows, tiny and huge ones, a long episode: value and gradient stay finite."""
    policy, anchor = (random_path(2005, 8, seed=seed, dtype=torch.float32) for seed in (25, 26))
    policy[0] = 0
    anchor[[0, 2, 500]] = 0
    policy[100:200] = 0
    policy[300:350], policy[400:450] = anchor[300:350], -anchor[400:450]
    policy[600], policy[601], anchor[602] = 1e-30, 1e15, 1e-20
    for results in with_gradient(policy, anchor, [1, 3, 2000, 1], window=16, eps=eps, unroll=unroll, debias=debias):
        assert results.isfinite().all()


def test_arithmetic_is_fp32_for_bf16_inputs_also_under_autocast():
    policy, anchor = (random_path(50, 32, seed=seed, dtype=torch.bfloat16) for seed in (27, 28))
    options = {"window": 8, "eps": 0.05, "iterations": 20}
    exact = divergence(policy.double(), anchor.double(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = divergence(policy, anchor, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=0)


# Memory and time


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest storage any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def measure_memory(tokens: int, hidden: int, window: int) -> tuple[int, int]:
    """(elements of the largest tensor, bytes autograd keeps) of one forward and backward."""
    policy = random_path(tokens, hidden, seed=29, dtype=torch.float32).requires_grad_()
    anchor = random_path(tokens, hidden, seed=30, dtype=torch.float32)
    lengths, kept = [700] * (tokens // 700) + [tokens % 700], {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = divergence(policy, anchor, lengths, window=window, eps=0.05, iterations=5)
        kept_bytes = sum(kept.values())
        values.sum().backward()
    return largest.elements, kept_bytes


def test_memory_grows_with_tokens_and_not_with_their_square():
    hidden, window = 128, 16
    (largest, kept), (largest_twice, kept_twice) = (measure_memory(tokens, hidden, window) for tokens in (2048, 4096))
    assert kept_twice / 2 < 1.5 * kept and largest_twice / 2 < 1.5 * largest
    # three problems of 2w+1 columns, or the rows of one backward matmul: block + 2w of them for a block of 2w
    assert largest_twice <= 4096 * max(3 * (2 * window + 1), 2 * hidden) * 1.1
    # in floats: the policy's rows (input, unit, padded), the anchor's (padded), and a handful of bands
    assert kept_twice <= 4096 * 4 * (6 * hidden + 12 * (2 * window + 1))


def test_memory_does_not_hold_a_copy_of_the_hidden_states_for_every_offset():
    narrow, wide = (measure_memory(2048, 256, window)[1] for window in (2, 32))
    assert wide - narrow < 2048 * 4 * (60 * 12)  # 60 more columns of a few bands, not 60 x 256


def test_a_window_beyond_the_batch_costs_nothing():
    with LargestTensor() as largest:
        divergence(torch.ones(10, 4), torch.ones(10, 4), window=500)
    assert largest.elements < 10_000


def print_time_and_memory(hidden: int = 128, window: int = 16, iterations: int = 20) -> None:
    """Forward and backward of the debiased divergence against the number of tokens, in completions of 512."""
    for tokens in (1024, 2048, 4096, 8192):
        policy, anchor = (random_path(tokens, hidden, seed=seed, dtype=torch.float32) for seed in (31, 32))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            options = {"window": window, "eps": 0.05, "iterations": iterations, "taper": True}
            with_gradient(policy, anchor, [512] * (tokens // 512), **options)
            seconds.append(time.perf_counter() - start)
        largest, kept = measure_memory(tokens, hidden, window)
        print(
            f"{tokens:6d} tokens {1e3 * min(seconds):7.1f} ms  "
            f"largest tensor {largest / tokens:5.0f} elements a token, kept {kept / tokens:5.0f} bytes a token"
        )


if __name__ == "__main__":
    print_time_and_memory()
