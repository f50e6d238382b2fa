"""The policy term and what surrounds it: advantages, denominators, clipping, old policies, all by hand."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_penalties import (
    full_gradient,
    make_batch,
    make_run,
    on_policy,
    plain_completions,
    plain_copies,
    with_episodes,
    without_advantages,
)
from torch import Tensor

from src.config import TrainingConfig
from src.engine.packing import pack
from src.engine.scoring import score
from src.maxent import Controllers
from src.prepare import Run
from src.records import Batch, Episode, Group, Problem, Scores
from src.train_grpo import (
    objective,
    policy_loss,
    train_step,
    update,
    with_advantages,
    with_advantages_where_uncertain,
    with_length_penalty,
    with_loss_weights,
)

cases = pytest.mark.parametrize

# ---- The clipped surrogate


def surrogate(ratios: list[float], advantages: list[float], lengths: list[list[int]] | None = None, **keys):
    """Loss per token, its gradient in the token's own log-prob, where the clip binds, and the log-probs."""
    lengths = lengths or [[1] * len(ratios)]
    logprobs = -2 + 0.1 * torch.arange(len(ratios), dtype=torch.float64)
    old = logprobs - torch.tensor(ratios).double().log()
    batch = make_batch(torch.zeros(len(ratios)).long(), old, [0.0] * len(advantages), lengths)
    batch = replace(batch, advantages=torch.tensor(advantages, dtype=torch.float64)[batch.episode_index])
    logprobs.requires_grad_()
    loss, clipped = policy_loss(logprobs, batch, TrainingConfig(**keys))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.tolist(), gradient.tolist(), clipped.tolist(), logprobs.tolist()


HIGH, CISPO = {"epsilon_high": 0.28}, {"policy_loss": "cispo", "epsilon_high": 0.28}
PPO = {  # epsilon 0.2, epsilon_high 0.28: keys, ratio, advantage -> loss, gradient, whether clipped
    "on policy": ({}, 1.0, 1.5, -1.5, -1.5, 0),
    "on policy, worse than average": ({}, 1.0, -1.5, 1.5, 1.5, 0),
    "inside, above": ({}, 1.1, 2.0, -2.2, -2.2, 0),
    "inside, below": ({}, 0.9, -1.0, 0.9, 0.9, 0),
    "good and already likelier": ({}, 1.5, 2.0, -2.56, 0.0, 1),
    "good but less likely": ({}, 0.5, 2.0, -1.0, -1.0, 0),
    "bad and already less likely": ({}, 0.5, -2.0, 1.6, 0.0, 1),
    "bad but likelier": ({}, 1.5, -2.0, 3.0, 3.0, 0),
    "no advantage": ({}, 1.5, 0.0, 0.0, 0.0, 0),
    "without epsilon_high": ({"epsilon_high": None}, 1.25, 2.0, -2.4, 0.0, 1),
    "epsilon_high, inside": (HIGH, 1.25, 1.0, -1.25, -1.25, 0),
    "epsilon_high, above": (HIGH, 1.3, 1.0, -1.28, 0.0, 1),
    "epsilon_high is not for below": (HIGH, 0.75, -1.0, 0.8, 0.0, 1),
    "epsilon_high of 0": ({"epsilon_high": 0.0}, 1.1, 1.0, -1.0, 0.0, 1),
    "delta, above": ({"delta": 3.0}, 5.0, -1.0, 3.0, 0.0, 1),
    "delta, inside": ({"delta": 3.0}, 2.5, -1.0, 2.5, 2.5, 0),
    "delta is not for good ones": ({"delta": 3.0}, 5.0, 1.0, -1.28, 0.0, 1),
    "cispo, inside": (CISPO, 1.1, 2.0, None, -2.2, 0),
    "cispo, good beyond the clip": (CISPO, 4.0, 2.0, None, -2.56, 1),
    "cispo, bad beyond the clip": (CISPO, 4.0, -2.0, None, 2.56, 1),
    "cispo, below": (CISPO, 0.3, 2.0, None, -0.6, 0),
    "cispo with epsilon alone": ({"policy_loss": "cispo", "epsilon_high": None}, 4.0, 1.0, None, -1.2, 1),
}


@cases("case", PPO)
def test_one_token_by_hand(case):
    keys, ratio, advantage, loss, gradient, clipped = PPO[case]
    got_loss, got_gradient, got_clipped, logprobs = surrogate([ratio], [advantage], **keys)
    expected = gradient * logprobs[0] if loss is None else loss  # cispo: its weight times the log-prob
    assert got_loss == pytest.approx([expected], abs=1e-6) and got_gradient == pytest.approx([gradient], abs=1e-6)
    assert got_clipped == [clipped]


# two completions of two groups: geometric means 1.1 and 1.4; no single token has these ratios
SEQUENCES = ([1.1 * 1.5, 1.1 / 1.5, 1.4 * 0.5, 1.4 * 4, 1.4 / 2], [2.0, -1.0], [[2], [3]])
GSPO = [  # a token's gradient is 1 / length of the ratio's, and length tokens share one loss
    ({"epsilon": 0.3}, [-2.2] * 2 + [1.4] * 3, [-2.2] * 2 + [1.4] * 3, [0] * 5),
    # clipped as a whole, also its unlikelier token
    ({"epsilon": 0.05, "epsilon_high": None}, [-2.1] * 2 + [1.4] * 3, [0.0] * 2 + [1.4] * 3, [1, 1, 0, 0, 0]),
    ({"policy_loss": "cispo", "epsilon_high": 0.2}, None, [-2.2] * 2 + [1.2] * 3, [0, 0, 1, 1, 1]),
]


@cases(("keys", "loss", "gradient", "clipped"), GSPO)
def test_gspo_has_one_ratio_a_sequence_the_geometric_mean(keys, loss, gradient, clipped):
    got_loss, got_gradient, got_clipped, logprobs = surrogate(*SEQUENCES, importance_sampling_level="sequence", **keys)
    loss = loss or [g * p for g, p in zip(gradient, logprobs, strict=True)]  # cispo: the ratio weighs each token
    assert got_loss == pytest.approx(loss, abs=1e-6) and got_gradient == pytest.approx(gradient, abs=1e-6)
    assert got_clipped == clipped


def test_gspo_gradient_of_the_mean_over_a_sequence_is_ratio_times_mean_gradient():
    """Zheng et al. 2025, equation 10: every token of a sequence pulls alike."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    batch = make_batch(torch.zeros(3).long(), torch.tensor([-1.2, -2.1, -0.2]), [0.0], [[3]])
    batch = replace(batch, advantages=torch.full((3,), 1.5))
    loss = batch.mean(policy_loss(logprobs, batch, TrainingConfig(importance_sampling_level="sequence"))[0])
    loss.backward()
    ratio = math.exp((0.2 + 0.1 - 0.3) / 3)
    assert loss.item() == pytest.approx(-ratio * 1.5)
    assert logprobs.grad.tolist() == pytest.approx([-ratio * 1.5 / 3] * 3)


@cases("keys", [{}, {"delta": 3.0}, {"policy_loss": "cispo"}, {"importance_sampling_level": "sequence"}])
@cases("log_ratio", [80.0, -80.0, 300.0, -300.0])
@cases("advantage", [1.0, -1.0])
def test_log_ratios_of_80_and_more_stay_finite(keys, log_ratio, advantage):
    logprobs = torch.tensor([-0.1, -0.1 + min(log_ratio, 0)], requires_grad=True)
    batch = make_batch(torch.zeros(2).long(), logprobs.detach() - log_ratio, [0.0], [[2]])
    loss, _ = policy_loss(logprobs, replace(batch, advantages=torch.full((2,), advantage)), TrainingConfig(**keys))
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()


# ---- The loss of a pass, with scores made by hand


def hand_groups(shapes: list[list[int]], advantages: list[float], finished: list[bool] | None = None) -> list[Group]:
    values, ends = iter(advantages), iter(finished or [True] * len(advantages))
    return [
        Group(
            Problem(index, (5, 6), "", {}),
            tuple(Episode((7,) * n, (-1.0,) * n, next(ends), "", advantages=(next(values),) * n) for n in lengths),
        )
        for index, lengths in enumerate(shapes)
    ]


def hand_batch(training: TrainingConfig, groups: list[Group]) -> Batch:
    return pack(with_loss_weights(groups, training), "cpu", torch.float32).batch


def hand_loss(training: TrainingConfig, batch: Batch, logprobs: Tensor, **scores):
    """The objective of these scores; -> loss, its gradient in the log-probs, what is measured."""
    logprobs = logprobs.clone().requires_grad_()
    made = Scores(logprobs, scores.pop("entropy", torch.zeros_like(logprobs)), logprobs[:, None], **scores)
    loss, measured = objective(training, made, batch)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.tolist(), measured


SHAPES, ADVANTAGES = [[3, 1], [2, 4]], [1.0, -2.0, 0.5, 3.0]
WEIGHTS = {  # max_gen_len 8: weight of each token of the four completions
    "token": [1 / 10] * 4,
    "sequence": [1 / (4 * 3), 1 / (4 * 1), 1 / (4 * 2), 1 / (4 * 4)],
    "constant": [1 / (4 * 8)] * 4,
    "prompt": [1 / (2 * 4), 1 / (2 * 4), 1 / (2 * 6), 1 / (2 * 6)],
}
LOSSES = {
    "token": -(3 * 1 - 1 * 2 + 2 * 0.5 + 4 * 3) / 10,
    "sequence": -(1 - 2 + 0.5 + 3) / 4,
    "constant": -14 / 32,
    "prompt": -((3 * 1 - 1 * 2) / 4 + (2 * 0.5 + 4 * 3) / 6) / 2,
}


@cases("loss_agg", WEIGHTS)
@cases("first_update", [True, False])
def test_loss_aggregation_by_hand_and_on_policy_the_gradient_is_minus_advantage(loss_agg, first_update):
    """On policy the old log-probs are the policy's own, whatever the sampler said: the ratio is 1 to the last bit."""
    training = TrainingConfig(loss_type="none", loss_agg=loss_agg, max_gen_len=8)
    batch, logprobs = hand_batch(training, hand_groups(SHAPES, ADVANTAGES)), torch.full((10,), -1.0)
    sampled = logprobs + torch.linspace(-1, 1, 10)
    batch = replace(batch, sampled_logprobs=sampled, old_logprobs=None if first_update else logprobs)
    loss, gradient, measured = hand_loss(training, batch, logprobs)
    expected = [-a * w for n, a, w in zip([3, 1, 2, 4], ADVANTAGES, WEIGHTS[loss_agg], strict=True) for _ in range(n)]
    assert loss == pytest.approx(LOSSES[loss_agg]) and gradient == pytest.approx(expected)
    assert {name for name, value in measured.items() if value.dim() == 0} == {"train/policy_loss", "train/loss"}
    assert measured["rollout/mismatch"].tolist() == pytest.approx((sampled + 1).abs().tolist(), abs=1e-6)


def test_penalty_and_entropy_bonus_enter_with_their_weights():
    training = TrainingConfig(loss_type="kl", beta=0.5, entropy_coef=0.25, loss_agg="sequence")
    batch, logprobs = hand_batch(training, hand_groups([[1, 3]], [0.0, 0.0])), torch.full((4,), -1.0)
    distances, entropy = {"kl": torch.tensor([2.0, 1.0, 3.0, 8.0])}, torch.tensor([1.0, 2.0, 2.0, 5.0])
    loss, _, measured = hand_loss(
        training, batch, logprobs, distances=distances, entropy=entropy, anchor_logprobs=logprobs
    )
    assert measured["penalty/kl"].item() == pytest.approx(0.5 * (2 + 4) / 2)
    assert measured["train/entropy_bonus"].item() == pytest.approx(-0.25 * (1 + 3) / 2)
    assert loss == pytest.approx(1.5 - 0.5) and measured["train/kl"].tolist() == [2.0, 1.0, 3.0, 8.0]


def test_the_entropy_bonus_raises_the_entropy():
    engine, groups = make_run("none", entropy_coef=1.0)
    groups = without_advantages(groups)
    before = score(engine.model, pack(groups, "cpu", torch.float32), 1.0).entropy.mean()
    full_gradient(engine, groups)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert score(engine.model, pack(groups, "cpu", torch.float32), 1.0).entropy.mean() > before


@cases("first_update", [True, False])
def test_importance_cap_corrects_from_the_sampler_to_the_trainer(first_update):
    """Trainer / sampler is 1.5, 5 and 0.1; the cap of 2 bounds it from above only, and it has no gradient."""
    training = TrainingConfig(loss_type="none", loss_agg="token", importance_cap=2.0)
    batch, old = hand_batch(training, hand_groups([[3]], [4.0])), torch.tensor([-1.0, -2.0, -3.0])
    sampled = old - torch.tensor([1.5, 5.0, 0.1]).log()
    batch = replace(batch, sampled_logprobs=sampled, old_logprobs=None if first_update else old)
    moved = torch.tensor([1.0, 1.0, 1.0] if first_update else [1.1, 0.9, 1.0])
    loss, gradient, _ = hand_loss(training, batch, old if first_update else old + moved.log())
    expected = [-4.0 / 3 * correction * r for correction, r in zip([1.5, 2.0, 0.1], moved.tolist(), strict=True)]
    assert loss == pytest.approx(sum(expected)) and gradient == pytest.approx(expected)
    for free in ((replace(training, importance_cap=None), batch), (training, replace(batch, sampled_logprobs=None))):
        assert hand_loss(*free, old)[0] == pytest.approx(-4.0)


@cases("first_update", [True, False])
def test_a_completion_whose_mean_ratio_to_the_sampler_is_far_from_1_is_masked_and_counted(first_update):
    """Geometric means 2 and 1/2 are kept by a bound of 2.1, 4 and 1/4 are not; single tokens may be further away."""
    training = TrainingConfig(loss_type="none", loss_agg="token", mismatch_mask=2.1)
    batch, old = hand_batch(training, hand_groups([[2, 1, 2, 1]], [1.0, 2.0, 3.0, 4.0])), torch.full((6,), -1.0)
    sampled = old - torch.tensor([20, 0.2, 0.5, 8, 2, 0.25]).log()
    batch = replace(batch, sampled_logprobs=sampled, old_logprobs=None if first_update else old)
    loss, gradient, measured = hand_loss(training, batch, old)
    assert gradient == pytest.approx([-1 / 6, -1 / 6, -2 / 6, 0, 0, 0]) and loss == pytest.approx(-4 / 6)
    assert measured["train/mismatch_masked"].tolist() == [0, 0, 1, 1]
    both = replace(training, importance_cap=1.5)
    assert hand_loss(both, batch, old)[1] == pytest.approx([-1.5 / 6, -0.2 / 6, -2 * 0.5 / 6, 0, 0, 0])
    free, _, measured = hand_loss(replace(training, mismatch_mask=None), batch, old)
    assert free == pytest.approx(-(2 * 1 + 2 + 2 * 3 + 4) / 6) and "train/mismatch_masked" not in measured


@cases("loss_agg", ["token", "sequence"])
def test_advantages_of_each_token_have_the_gradient_of_a_loss_written_by_hand(loss_agg):
    """From records to the gradient of every parameter; an episode's tokens pull in opposite directions."""
    engine, groups = make_run("none", loss_agg=loss_agg)
    generator = torch.Generator().manual_seed(4)
    groups = with_episodes(
        on_policy(groups), lambda e: replace(e, advantages=tuple(torch.randn(e.length, generator=generator).tolist()))
    )
    gradient = full_gradient(engine, groups)[1:]
    plain, plain_anchor = plain_copies(engine)
    rows = zip(plain_completions(plain, plain_anchor, groups), (e for g in groups for e in g.episodes), strict=True)
    terms = [torch.tensor(e.advantages, dtype=torch.float64) * c.chosen() for c, e in rows]
    loss = torch.cat(terms).mean() if loss_agg == "token" else sum(term.mean() for term in terms) / len(terms)
    (-loss).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


# ---- Advantages and rewards


def rewarded(rows: list[list[float]], texts: list[list[str]] | None = None) -> list[Group]:
    texts = texts or [[""] * len(row) for row in rows]
    return [
        Group(
            Problem(i, (1,), "", {}),
            tuple(Episode((2,), (-1.0,), True, text, reward=r) for r, text in zip(row, words, strict=True)),
        )
        for i, (row, words) in enumerate(zip(rows, texts, strict=True))
    ]


def advantages_of(groups: list[Group], **keys) -> list[list[float]]:
    """Of the first token of each episode; they are those of all its tokens."""
    groups = with_advantages(groups, TrainingConfig(**keys))
    assert all(e.advantages == e.advantages[:1] * e.length for g in groups for e in g.episodes)
    return [[e.advantages[0] for e in g.episodes] for g in groups]


ROOT = math.sqrt(0.75)  # standard deviation of 0, 0, 0, 2
SPREAD = math.sqrt(10 / 12 - (8 / 12) ** 2)  # of all twelve rewards below
CENTRED = [[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [-0.5, -0.5, -0.5, 1.5]]
SCALES = {"group": (0.5, 1, ROOT), "batch": (SPREAD,) * 3, "none": (1, 1, 1)}


@cases("scale", SCALES)
def test_advantages_by_hand(scale):
    got = advantages_of(rewarded([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 2]]), scale_rewards=scale)
    for row, centred, divisor in zip(got, CENTRED, SCALES[scale], strict=True):
        assert row == pytest.approx([a / divisor for a in centred], abs=1e-12)


@cases("scale", SCALES)
@cases("same", [[0.1] * 7, [0.1, 0.1 + 1e-8] * 3 + [0.1], [1, 1 + 1e-5] * 3 + [1], [1e6] * 7, [-1 / 3] * 7, [0] * 7])
def test_a_group_without_variance_has_advantages_of_exactly_zero(scale, same):
    got = advantages_of(rewarded([same, [0, 1, 0, 0, 1, 0, 0]]), scale_rewards=scale)
    assert got[0] == [0.0] * 7 and all(a != 0 for a in got[1])
    assert advantages_of(rewarded([same]), scale_rewards=scale) == [[0.0] * 7]


GROUPS = [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 2]]  # of means 0.5, 1, 0.5, together 2/3
KINDS = {
    "leave one out": (
        {"baseline": "leave_one_out", "scale_rewards": "none"},
        [[1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3], [0.0] * 4, [-2 / 3, -2 / 3, -2 / 3, 2.0]],
    ),
    "batch": (
        {"baseline": "batch", "scale_rewards": "none"},
        [[1 / 3, -2 / 3, -2 / 3, 1 / 3], [1 / 3] * 4, [-2 / 3, -2 / 3, -2 / 3, 4 / 3]],
    ),
    "batch, over its deviation": (
        {"baseline": "batch", "scale_rewards": "batch"},
        [[1 / 3 / SPREAD, -2 / 3 / SPREAD, -2 / 3 / SPREAD, 1 / 3 / SPREAD], [1 / 3 / SPREAD] * 4,
         [-2 / 3 / SPREAD, -2 / 3 / SPREAD, -2 / 3 / SPREAD, 4 / 3 / SPREAD]],
    ),
    "over the mean": ({"scale_rewards": "mean"}, [[1, -1, -1, 1], [0.0] * 4, [-1, -1, -1, 3]]),
}  # fmt: skip


@cases("kind", KINDS)
def test_other_baselines_and_scales_by_hand(kind):
    keys, expected = KINDS[kind]
    got = advantages_of(rewarded(GROUPS), **keys)
    assert [x for row in got for x in row] == pytest.approx([x for row in expected for x in row], abs=1e-12)


def test_rewards_of_a_mean_of_0_or_less_have_no_scale_in_maxrl():
    got = advantages_of(rewarded([[1, -1, 0, 0], [-1, -2, -1, -2], [0, 0, 0, 1]]), scale_rewards="mean")
    assert got[:2] == [[0.0] * 4] * 2 and got[2] == pytest.approx([-1, -1, -1, 3])


def test_gdpo_normalises_each_reward_by_itself_before_the_weighted_sum():
    """The first reward varies in one group only; the second is 1,000 times as large, and has half the weight."""
    first, second = [[1, 0, 0, 1], [1, 1, 1, 1]], [[0, 3000, 0, 3000], [1000, 1000, 1000, 5000]]
    groups = [
        replace(
            g,
            episodes=tuple(replace(e, rewards=((1.0, a), (0.5, b))) for e, a, b in zip(g.episodes, x, y, strict=True)),
        )
        for g, x, y in zip(rewarded(first), first, second, strict=True)
    ]
    summed = [[1 - 0.5, -1 + 0.5, -1 - 0.5, 1 + 0.5], [0.5 * a for a in (-1 / 3**0.5,) * 3 + (3**0.5,)]]
    flat = [x for row in summed for x in row]
    deviation = math.sqrt(sum(x * x for x in flat) / 8)
    got = advantages_of(groups, scale_rewards="parts")
    assert [x for row in got for x in row] == pytest.approx([x / deviation for x in flat], abs=1e-9)


def test_the_overlong_penalty_falls_over_the_buffer_and_is_1_for_what_was_cut_off():
    """DAPO, equation 13, at a limit of 20 and a buffer of 4."""
    training = TrainingConfig(max_gen_len=20, overlong_buffer=4, loss_type="none")
    lengths, finished = [3, 16, 17, 19, 20, 20], [True, True, True, True, True, False]
    (group,) = with_length_penalty(hand_groups([lengths], [0.0] * 6, finished), training)
    assert [e.reward for e in group.episodes] == pytest.approx([0, 0, -0.25, -0.75, -1, -1])
    assert [e.reward_parts["overlong"] for e in group.episodes] == [e.reward for e in group.episodes]
    assert [e.rewards for e in group.episodes] == [((1.0, e.reward),) for e in group.episodes]
    untouched = hand_groups([lengths], [0.0] * 6, finished)
    assert with_length_penalty(untouched, replace(training, overlong_buffer=0)) is untouched


def test_only_the_tokens_of_highest_entropy_of_the_whole_rollout_keep_their_advantage():
    groups = hand_groups([[2, 3], [5]], [1.0, -1.0, 2.0])
    entropies = iter([(0.1, 0.9), (0.5, 0.2, 0.3), (0.0, 0.8, 0.05, 0.7, 0.6)])
    groups = with_episodes(groups, lambda e: replace(e, entropies=next(entropies)))
    kept = [e.advantages for g in with_advantages_where_uncertain(groups, 0.4) for e in g.episodes]
    assert kept == [(0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 2.0, 0.0, 2.0, 2.0)]
    assert [e.advantages for g in with_advantages_where_uncertain(groups, 1.0) for e in g.episodes] == [
        e.advantages for g in groups for e in g.episodes
    ]


@cases("size", [1, 1000])
def test_top_entropy_quantile_does_not_depend_on_the_size_of_a_pass(size):
    """The threshold is that of the rollout; a pass alone would choose others. The gradient is that of a masked loss."""
    run, groups = updatable("none", top_entropy_quantile=0.3)
    run.engine.limit = replace(run.engine.limit, completions=size)
    scored_groups = run.engine.score(groups)
    entropies = sorted((h for g in scored_groups for e in g.episodes for h in e.entropies), reverse=True)
    least = entropies[round(0.3 * len(entropies)) - 1]
    masked = with_episodes(
        scored_groups,
        lambda e: replace(
            e, advantages=tuple(a * (h >= least) for a, h in zip(e.advantages, e.entropies, strict=True))
        ),
    )
    expected = full_gradient(run.engine, masked)[1:]
    before = torch.cat([p.detach().flatten().clone() for p in run.engine.model.parameters()])
    update(run, groups, step=1)
    moved = before - torch.cat([p.detach().flatten() for p in run.engine.model.parameters()])
    assert expected.norm() > 1e-3 and (moved - expected).norm() < 1e-4 * expected.norm()


@cases("unit", [1e-8, 1e-3, 1.0, 1e8])
def test_what_counts_as_variance_does_not_depend_on_the_unit_of_rewards(unit):
    assert advantages_of(rewarded([[unit, 0, 0, unit]]))[0] == pytest.approx([1, -1, -1, 1])
    assert advantages_of(rewarded([[unit, unit * (1 + 1e-3)] * 2]))[0] == pytest.approx([-1, 1, -1, 1])


def test_seed_grpo_counts_each_completion_without_an_answer_as_a_cluster_of_its_own():
    groups = rewarded([[1, 0, 0, 1]] * 2, [["no answer"] * 4, [f"<answer>{x}</answer>" for x in "1234"]])
    without, different = advantages_of(groups, seed_grpo_alpha=3.0)
    assert without == pytest.approx(different)


def test_seed_grpo_scales_by_semantic_entropy():
    """Two answers of equal mass: entropy log 2 of log 4, half. One answer: untouched. Four answers: all of alpha."""
    answer = "<answer>{}</answer>".format
    groups = rewarded([[1, 0, 0, 1]] * 3, [[answer(x) for x in word] for word in ("1122", "1111", "1234")])
    plain, scaled = advantages_of(groups), advantages_of(groups, seed_grpo_alpha=3.0)
    for row, expected, factor in zip(scaled, plain, (1 / (1 + 3 / 2), 1.0, 1 / (1 + 3)), strict=True):
        assert row == pytest.approx([factor * a for a in expected], rel=1e-6)
    assert plain[0] == [1, -1, -1, 1]
    # one answer likelier by half a nat a token, but three times as long: masses e^-1 : e^-1.5, not e^-3 : e^-1.5
    episodes = (Episode((2, 2, 2), (-1.0,) * 3, True, answer(1), reward=1.0), Episode((2,), (-1.5,), True, answer(2)))
    (row,) = advantages_of([Group(Problem(0, (1,), "", {}), episodes)], seed_grpo_alpha=1.0)
    p = 1 / (1 + math.exp(-0.5))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert row == pytest.approx([1 / (1 + entropy / math.log(2)), -1 / (1 + entropy / math.log(2))], rel=1e-6)


# ---- Denominators, and what has no gradient


@cases(
    ("loss_agg", "skipped", "all_of_them"),
    [
        ("token", [1 / 11] * 4, [1 / 15] * 5),
        ("sequence", [1 / 4 / n for n in (3, 1, 2, 5)], [1 / 5 / n for n in (3, 1, 4, 2, 5)]),
        ("constant", [1 / 32] * 4, [1 / 40] * 5),
        ("prompt", [1 / 2 / 4] * 2 + [1 / 2 / 7] * 2, [1 / 2 / 8] * 3 + [1 / 2 / 7] * 2),
    ],
)
def test_skipping_unfinished_episodes_changes_the_denominators(loss_agg, skipped, all_of_them):
    groups = hand_groups([[3, 1, 4], [2, 5]], [1.0] * 5, [True, True, False, True, True])
    for skip, expected in ((True, skipped), (False, all_of_them)):
        training = TrainingConfig(loss_agg=loss_agg, skip_unfinished_episodes=skip, max_gen_len=8)
        episodes = [e for g in with_loss_weights(groups, training) for e in g.episodes]
        assert [e.token_weight for e in episodes] == pytest.approx(expected)
        assert [e.episode_weight for e in episodes] == pytest.approx([1 / len(expected)] * len(expected))
    training = TrainingConfig(skip_unfinished_episodes=True)
    groups = hand_groups([[3, 1], [2, 5]], [1.0] * 4, [False, False, True, True])
    assert [g.problem.index for g in with_loss_weights(groups, training)] == [1], "a group without any disappears"
    assert with_loss_weights(groups[:1], training) == []
    (left,) = with_loss_weights(groups, replace(training, loss_agg="prompt"))
    assert [e.token_weight for e in left.episodes] == pytest.approx([1 / 7] * 2), "nor does it count as a prompt"


def updatable(form: str, **keys) -> tuple[Run, list[Group]]:
    """A run that update() takes: plain gradient descent with rate 1, nothing clipped, one group without variance."""
    keys = {"learning_rate": 1.0, "max_grad_norm": 1e9, "eval_interval": 0, **keys}
    engine, groups = make_run(form, **keys)
    groups = on_policy(groups[:3])
    groups[1:2] = without_advantages(with_episodes(groups[1:2], lambda e: replace(e, reward=0.7)))
    source = SimpleNamespace(sample=lambda *arguments: groups)
    problems, state = [g.problem for g in groups], {"controllers": Controllers(engine.config.training)}
    run = Run(engine.config, "toy", Path(), engine, None, source, problems, problems, max_steps=100, state=state)
    assert sum(e.length for g in groups for e in g.episodes) == ALL and [g.teaches() for g in groups] == [1, 0, 1]
    return run, groups


@pytest.fixture
def scored(monkeypatch) -> list[tuple[int, bool, bool]]:
    """Of every forward pass: tokens, whether an anchor was scored too, whether it has a gradient."""
    calls = []

    def counted(model, row, temperature, anchor=None, **more):
        calls.append((len(row.batch.token_ids), anchor is not None, torch.is_grad_enabled()))
        return score(model, row, temperature, anchor, **more)

    monkeypatch.setattr("src.engine.engine.score", counted)
    return calls


ALL, VARIED = 23 + 4 + 35, 23 + 35


@cases(
    ("form", "keys", "tokens", "anchored"),
    [
        ("none", {"beta": 0.3}, VARIED, False),
        ("kl reverse", {"beta": 0.0}, VARIED, False),
        ("k3", {"beta": 0.0}, VARIED, False),
        ("ot", {"beta": 0.0}, VARIED, False),
        ("listwise reverse", {}, VARIED, False),
        ("kl reverse", {"beta": 0.1}, ALL, True),
        ("none", {"entropy_coef": 0.1}, ALL, False),
    ],
)
def test_a_group_without_variance_has_no_gradient_when_nothing_pulls_on_it(scored, form, keys, tokens, anchored):
    """It is measured all the same: metrics are over all tokens of the step."""
    run, groups = updatable(form, **keys)
    update(run, groups, step=1)
    assert sum(count for count, _, gradient in scored if gradient) == tokens
    assert sum(count for count, _, _ in scored) == ALL
    assert {anchor for _, anchor, _ in scored} == {anchored}


@cases("form", ["none", "kl reverse", "maxent", "maxent without reference", "listwise reverse"])
def test_leaving_it_out_changes_nothing_and_an_update_steps_along_the_whole_gradient(form):
    run, groups = updatable(form, **({} if "maxent" in form else {"beta": 0.0}))
    expected = full_gradient(run.engine, groups)[1:]  # all three groups
    before = torch.cat([p.detach().flatten().clone() for p in run.engine.model.parameters()])
    run.engine.limit = replace(run.engine.limit, completions=2)
    metrics = update(run, groups, step=1)
    moved = before - torch.cat([p.detach().flatten() for p in run.engine.model.parameters()])
    torch.testing.assert_close(moved, expected, atol=2e-6, rtol=1e-4)
    assert metrics["train/grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)


@cases("form", ["none", "kl reverse", "maxent", "listwise reverse"])
def test_an_update_without_any_episode_left_moves_nothing(form):
    run, groups = updatable(form, skip_unfinished_episodes=True)
    before = copy.deepcopy(run.engine.model.state_dict())
    metrics = update(run, with_episodes(groups, lambda e: replace(e, finished=False)), step=1)
    assert all(torch.equal(before[name], value) for name, value in run.engine.model.state_dict().items())
    assert all(math.isfinite(value) for value in metrics.values())


def test_neither_metrics_nor_weights_depend_on_when_an_evaluation_comes():
    """Where it comes the anchor is scored too. A minibatch without variance takes no optimizer step either way."""
    outcomes = []
    for interval in (1, 2):
        run, groups = updatable("none", minibatches=3, learning_rate=1e-3, eval_interval=interval)
        run.engine.optimizer = torch.optim.AdamW(run.engine.model.parameters(), 1e-3)
        steps, seen = [], []
        run.engine.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        for step in range(1, 5):
            metrics = update(run, groups, step)
            assert len(steps) == 2 * step and ("train/kl_k3" in metrics) == (step % interval == 0)
            seen += [metrics[name] for name in ("train/entropy", "train/clip_fraction", "rollout/mismatch")]
        outcomes.append((seen, torch.cat([p.detach().flatten() for p in run.engine.model.parameters()])))
    assert outcomes[0][0] == outcomes[1][0] and torch.equal(outcomes[0][1], outcomes[1][1])


# ---- Old policies and anchors over several updates


def own(run: Run, group: Group) -> list[Episode]:
    """Episodes whose log-probs are the policy's own."""
    logprobs = score(run.engine.model, pack([group], "cpu", torch.float32), 1.0).logprobs.detach()
    rows = logprobs.split([e.length for e in group.episodes])
    return [replace(e, logprobs=tuple(row.tolist())) for e, row in zip(group.episodes, rows, strict=True)]


@cases("size", [1, 4, 100])
def test_old_log_probs_are_the_trainers_own_for_every_size_of_a_pass(size):
    run, groups = updatable("none", micro_batch_size=size)
    for before, after in zip(groups, run.engine.score(groups), strict=True):
        assert [e.logprobs for e in after.episodes] == [e.logprobs for e in before.episodes]
        for e, expected in zip(after.episodes, own(run, before), strict=True):
            assert e.old_logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@cases(("old", "passes"), [("trainer", [ALL, VARIED, 4, VARIED, 4]), ("sampler", [VARIED, 4, VARIED, 4])])
def test_several_updates_take_old_log_probs_from_where_they_are_told_to(scored, old, passes):
    run, groups = updatable("none", inner_epochs=2, old_logprobs=old, micro_batch_size=1000)
    update(run, groups, step=1)
    assert [count for count, _, _ in scored] == passes


def trained_weights(form: str, **keys) -> Tensor:
    """All weights after one train_step on a given rollout, from an anchor that is not the policy."""
    run, groups = updatable(form, batch_size=6, num_questions_per_batch=3, learning_rate=0.01, **keys)
    groups[:] = [replace(g, episodes=tuple((own(run, g) * 2)[:4])) for g in groups]
    train_step(run, 1)
    return torch.cat([p.detach().flatten() for p in run.engine.model.parameters()])


@cases("form", ["kl reverse", "kl forward", "k2", "k3", "ot"])
def test_with_one_update_a_rollout_the_rollout_anchor_is_no_penalty_at_all(form):
    """What the warning in prepare() says; the reference anchor, or a second update, makes it one."""

    def effect(**keys) -> float:
        weights = [trained_weights(form, beta=beta, **keys) for beta in (0.0, 5.0)]
        return float((weights[0] - weights[1]).abs().max())

    assert effect(anchor="rollout") <= 3e-7  # rounding: without a penalty the flat group is left out of the row
    assert effect(anchor="reference") > 1e-4
    assert effect(anchor="rollout", inner_epochs=2) > 1e-6
