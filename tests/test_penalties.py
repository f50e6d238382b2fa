"""Every penalty: the textbook formula in float64 on a vocabulary of 11, zero at equality, sign, extremes; on a model.

In the small problems the hidden states ARE the logits (the head is the identity), so one leaf drives log-probs,
distances over the vocabulary and transport alike, and score() itself runs in float64, in chunks that are computed
again. All goes through the loop's `objective` with advantages of 0, so that only the penalty is left.
"""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from test_packing import RAGGED, make_groups, make_pair
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import PretrainedConfig

import src.config
from src import penalties
from src.config import SEED_FORMAT_KEYS, Config, ConfigError, ModelConfig, TrainingConfig, known_penalties, load_config
from src.engine import Engine, scoring
from src.engine.packing import pack
from src.engine.scoring import score
from src.penalties import PENALTIES, kl_estimates
from src.records import Batch, Group, Scores
from src.train_grpo import objective, policy_loss, wanted, with_advantages, with_loss_weights

PROJECT = Path(__file__).resolve().parent.parent
VOCABULARY = 11
LENGTHS = [[3, 1, 4], [2, 5]]  # completions of two groups, one of a single token
INF = math.inf
JENSEN_SHANNON = """

@penalty("js", of_logits=True)
def jensen_shannon(logits, anchor_logits):
    p, q = logits.log_softmax(-1), anchor_logits.log_softmax(-1)  # [tokens, vocab]
    middle = torch.logaddexp(p, q) - torch.tensor(2.0, dtype=p.dtype).log()
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)
"""

FORMS = {
    "none": ("none", {}),
    "kl reverse": ("kl", {}),
    "kl forward": ("kl", {"kl_direction": "forward"}),
    "kl hinge": ("kl", {"kl_target": 0.9}),
    "k1": ("approx_kl", {"kl_estimator": "k1"}),
    "k2": ("approx_kl", {"kl_estimator": "k2"}),
    "k3": ("approx_kl", {"kl_estimator": "k3"}),
    "k3_unbiased": ("approx_kl", {"kl_estimator": "k3_unbiased"}),
    "k3 hinge": ("approx_kl", {"kl_estimator": "k3", "kl_target": 0.4}),
    "kl in reward": ("kl_in_reward", {}),
    "ot": ("ot", {"ot_eps": 0.3, "ot_window": 2}),
    "ot wide": ("ot", {"ot_eps": 0.3, "ot_window": 16}),
    "ot hinge": ("ot", {"ot_eps": 0.3, "ot_window": 2, "ot_target": 0.75}),
    "js": ("js", {}),
    "maxent": ("maxent", {"tau": 0.3, "beta": 0.4}),
    "maxent no baseline": ("maxent", {"tau": 0.3, "beta": 0.4, "maxent_baseline": False}),
    "maxent sums": ("maxent", {"tau": 0.8, "beta": 0.4, "length_normalized": False}),
    "maxent clipped": ("maxent", {"tau": 0.3, "beta": 0.4, "maxent_clipped": True}),
    "maxent without reference": ("maxent", {"tau": 0.7, "beta": 0.0}),
    "maxent uniform": ("maxent", {"tau": INF, "beta": 0.4, "maxent_baseline": False}),
    "listwise reverse": ("listwise_kl", {"q_temperature": 0.5}),
    "listwise forward": ("listwise_kl", {"q_temperature": 0.5, "kl_direction": "forward"}),
    "listwise sums": ("listwise_kl", {"q_temperature": 0.5, "length_normalized": False}),
}
OBJECTIVES = ("maxent", "listwise_kl")
DISTANCES = [form for form, (name, _) in FORMS.items() if name not in (*OBJECTIVES, "none") and "hinge" not in form]
cases = pytest.mark.parametrize
every_form = cases("form", FORMS)


def forms_of(*names: str) -> list[str]:
    return [form for form, (name, _) in FORMS.items() if name in names]


class Logits:
    """A model whose hidden states are its logits."""

    def __init__(self, logits: Tensor):
        self.logits = logits
        self.config = PretrainedConfig(vocab_size=logits.shape[-1])

    def get_output_embeddings(self) -> None:
        return None


@pytest.fixture(scope="module", autouse=True)
def laboratory(tmp_path_factory):
    """The identity as the head of Logits; and penalties.py with one more function, as a researcher would add it."""
    head_logits, hidden_states = scoring.head_logits, scoring.hidden_states
    folder = tmp_path_factory.mktemp("src")
    (folder / "penalties.py").write_text(
        (PROJECT / "src" / "penalties.py").read_text("utf-8") + JENSEN_SHANNON, "utf-8"
    )
    with pytest.MonkeyPatch.context() as change:
        change.setattr(
            scoring, "head_logits", lambda m, h, *head: h if isinstance(m, Logits) else head_logits(m, h, *head)
        )
        change.setattr(
            scoring, "hidden_states", lambda m, row: m.logits if isinstance(m, Logits) else hidden_states(m, row)
        )
        change.setattr(penalties, "OT_ITERATIONS", 1000)
        change.setattr(src.config, "__file__", str(folder / "config.py"))
        change.setitem(PENALTIES, "js", None)
        known_penalties.cache_clear()
        exec(JENSEN_SHANNON, vars(penalties))
        yield
    known_penalties.cache_clear()


def test_every_loss_type_is_proven_here_and_one_mention_of_a_name_makes_a_penalty(tmp_path):
    proven = {name for name, _ in FORMS.values()}
    assert proven == set(known_penalties()) == {"none", *PENALTIES}, (
        "give each penalty an entry in FORMS and a textbook"
    )
    assert JENSEN_SHANNON.count("js") == 1
    (tmp_path / "config.yaml").write_text("training:\n  loss_type: js\n  beta: 0.5\n")
    assert load_config(tmp_path / "config.yaml").training.penalties() == {"js": 0.5}
    assert load_config(tmp_path / "config.yaml", ["training.loss_type={js: 1, ot: 2}"]).training.has_policy_term()


# ---- Small problems


def settings_of(form: str, **keys) -> TrainingConfig:
    name, form_keys = FORMS[form]
    return TrainingConfig(loss_type=name, **{"beta": 1.0, **form_keys, **keys})


def make_batch(token_ids: Tensor, old_logprobs: Tensor, rewards: list[float], lengths=LENGTHS) -> Batch:
    """The mean over completions of their token means as its weights."""
    flat = torch.tensor([length for group in lengths for length in group])
    count = len(flat)
    return Batch(
        token_ids=token_ids,
        episode_index=torch.arange(count).repeat_interleave(flat),
        group_index=torch.tensor([index for index, group in enumerate(lengths) for _ in group]),
        lengths=flat,
        weights=(1 / (count * flat.to(old_logprobs.dtype))).repeat_interleave(flat),
        episode_weights=torch.full((count,), 1 / count, dtype=old_logprobs.dtype),
        advantages=torch.zeros(len(token_ids)),
        rewards=torch.tensor(rewards, dtype=old_logprobs.dtype),
        sampled_logprobs=old_logprobs,
        old_logprobs=old_logprobs,
        groups=len(lengths),
    )


def make_problem(seed: int = 0) -> tuple[Tensor, Tensor, Batch]:
    """Random policy and anchor logits [N, 11] in float64, and tokens sampled by a third, nearby policy."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(map(sum, LENGTHS))
    logits, anchor, noise = torch.randn(3, tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    old = (logits + 0.5 * noise).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return logits.requires_grad_(), anchor, make_batch(ids, old, [1.0, 0.1, 0.0, 0.3, 1.1])


def scores_of(training: TrainingConfig, logits: Tensor, anchor: Tensor, batch: Batch) -> Scores:
    distances = wanted(training, True)["distances"]
    row = SimpleNamespace(batch=batch)
    return score(Logits(logits), row, 1.0, Logits(anchor), distances, elements=6 * logits.shape[-1])


def penalty_of(training: TrainingConfig, logits: Tensor, anchor: Tensor, batch: Batch) -> Tensor:
    """[N]"""
    return PENALTIES[training.loss_type](scores_of(training, logits, anchor, batch), batch, training)[0]


def of_episodes(value: Tensor, batch: Batch) -> Tensor:
    """[N] -> [E] what each completion counts, in the mean over completions."""
    return batch.episode_sum(value * batch.weights) / batch.episode_weights


def value_and_gradient(training: TrainingConfig, logits: Tensor, anchor: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    loss, _ = objective(training, scores_of(training, logits, anchor, batch), batch)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


# ---- The textbook, completion by completion


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

    def pair(self) -> tuple[Categorical, Categorical]:
        return Categorical(logits=self.policy), Categorical(logits=self.anchor)

    def chosen(self) -> Tensor:
        return self.pair()[0].log_prob(self.ids)

    def anchor_chosen(self) -> Tensor:
        return self.pair()[1].log_prob(self.ids)


def completions_of(logits: Tensor, anchor: Tensor, batch: Batch) -> list[Completion]:
    rows = zip(
        *(x.split(batch.lengths.tolist()) for x in (logits, anchor, batch.token_ids, batch.old_logprobs)),
        batch.rewards.tolist(),
        batch.group_index.tolist(),
        strict=True,
    )
    return [Completion(policy, reference, policy, reference, *rest) for policy, reference, *rest in rows]


def textbook_kl(c: Completion, training) -> Tensor:
    mean = kl_divergence(*(c.pair() if training.kl_direction == "reverse" else c.pair()[::-1])).mean()
    return torch.relu(mean - training.kl_target) if training.kl_target else mean


def textbook_js(c: Completion, training) -> Tensor:
    middle = Categorical(probs=sum(distribution.probs for distribution in c.pair()) / 2)
    return sum(kl_divergence(distribution, middle).mean() for distribution in c.pair()) / 2


def textbook_approx_kl(c: Completion, training) -> Tensor:
    p, q = c.chosen(), c.anchor_chosen().detach()
    r = (q - p).exp()
    estimates = {"k1": -r.log(), "k2": r.log() ** 2 / 2, "k3": r - 1 - r.log()}
    ratio = (p - c.old).exp()
    if training.kl_estimator == "k3_unbiased":
        mean = (ratio * estimates["k3"]).mean()
    else:
        mean = (ratio.detach() * estimates[training.kl_estimator]).mean()
    return torch.relu(mean - training.kl_target) if training.kl_target else mean


def textbook_kl_in_reward(c: Completion, training) -> Tensor:
    """PPO's clip with minus the k1 of the policy that sampled as advantage."""
    advantage = (c.anchor_chosen() - c.old).detach()
    r = (c.chosen() - c.old).exp()
    return -torch.min(r * advantage, r.clip(0.8, 1.28) * advantage).mean()


def dense_transport(x: Tensor, y: Tensor, training) -> Tensor:
    """<P, C> + eps KL(P || a x b) of the dense problem, solved by alternating updates; its derivative in C is P."""
    length, eps = len(x), training.ot_eps
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs().double()  # [T, T]
    cost = 1 - torch.cosine_similarity(x[:, None], y[None], dim=-1)  # [T, T]
    cost = cost - eps * (1 - distance / (training.ot_window + 1)).clamp(min=1e-300).log()  # the taper
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
    own = dense_transport(x, x, training) / 2 + dense_transport(y, y, training) / 2
    value = dense_transport(x, y, training) - own
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
    weights = weights / weights.sum() - training.maxent_baseline / len(group)
    terms = []
    for w, c in zip(weights, group, strict=True):
        r = (c.chosen() - c.old).exp()
        clipped = torch.min(r * w, r.clip(0.8, 1.28) * w)
        terms.append((clipped if training.maxent_clipped else w * c.chosen()).mean())
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
    formula = globals()[f"textbook_{training.loss_type}"]
    if training.loss_type not in OBJECTIVES:
        return sum(formula(c, training) for c in completions) / len(completions)
    groups = [[c for c in completions if c.group == index] for index in sorted({c.group for c in completions})]
    return sum(len(group) * formula(group, training) for group in groups) / len(completions)


@every_form
@cases("seed", [0, 1])
def test_value_and_gradient_are_those_of_the_textbook_formula(form, seed):
    training = settings_of(form)
    logits, anchor, batch = make_problem(seed)
    expected = textbook(training, completions_of(logits, anchor, batch))
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    value, gradient = value_and_gradient(training, logits, anchor, batch)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)
    assert form == "none" or gradient.norm() > 1e-3, "nothing was compared"
    if "hinge" in form:
        each = of_episodes(penalty_of(training, logits, anchor, batch), batch)
        assert (each == 0).any() and (each > 0).any(), "one side of the hinge is not tried"
    if form == "maxent clipped":
        ratio = torch.cat([(c.chosen() - c.old).exp() for c in completions_of(logits, anchor, batch)])
        assert (ratio > 1.28).any() and (ratio < 0.8).any() and ((ratio > 0.8) & (ratio < 1.2)).any(), "no clip binds"


def test_kl_in_the_reward_has_the_gradient_of_the_exact_reverse_kl():
    """Every token of the vocabulary once, weighed by its probability: k1 in the loss has the gradient 0 there."""
    logits, anchor = make_problem()[0][:1].detach(), make_problem()[1][:1]
    probabilities = logits.softmax(-1)[0]
    ids = torch.arange(VOCABULARY)
    gradients = {}
    for loss_type, estimator in (("kl_in_reward", "k3"), ("approx_kl", "k1"), ("kl", "k3")):
        training = TrainingConfig(loss_type=loss_type, kl_estimator=estimator, beta=0.7)
        rows = logits.expand(VOCABULARY, -1).clone().requires_grad_()
        batch = make_batch(ids, probabilities.log(), [0.0] * VOCABULARY, [[1] * VOCABULARY])
        batch = replace(batch, weights=probabilities)
        loss, _ = objective(training, scores_of(training, rows, anchor.expand(VOCABULARY, -1), batch), batch)
        gradients[loss_type] = torch.autograd.grad(loss, rows)[0].sum(0)
    torch.testing.assert_close(gradients["kl_in_reward"], gradients["kl"], rtol=1e-9, atol=1e-12)
    assert gradients["kl"].norm() > 1e-2 and gradients["approx_kl"].norm() < 1e-12


# ---- Zero at equality


@cases("dtype", [torch.float64, torch.float32])
@cases("form", forms_of("none", "kl", "approx_kl", "ot", "js"))
def test_value_and_gradient_are_zero_at_equality(form, dtype):
    """k1's gradient only in expectation, for which see the enumeration below."""
    logits, _, batch = make_problem()
    logits = logits.detach().to(dtype)
    batch = replace(batch, old_logprobs=batch.old_logprobs.to(dtype))
    for iterations in (1, 10):
        with patch.object(penalties, "OT_ITERATIONS", iterations):
            value, gradient = value_and_gradient(settings_of(form), logits, logits.clone(), batch)
        # the estimators have no rounding
        rounding = {"kl": 0.2, "js": 1, "ot": 10}.get(FORMS[form][0], 0) * torch.finfo(dtype).eps
        assert value.abs() <= rounding and (gradient.abs().max() <= rounding) == (form != "k1")


@cases("clipped", [False, True])
@cases("keys", [{"tau": INF, "beta": 0.4}, {"tau": 0.3, "beta": 0.0, "q_epsilon": 1.0}])
def test_maxent_with_uniform_weights_and_the_baseline_does_nothing(keys, clipped):
    training = TrainingConfig(loss_type="maxent", maxent_clipped=clipped, **keys)
    value, gradient = value_and_gradient(training, *make_problem())
    assert value.abs() < 1e-14 and gradient.abs().max() < 1e-14


@cases("normalized", [True, False])
@cases("direction", ["reverse", "forward"])
def test_listwise_kl_is_zero_where_the_two_softmaxes_are_equal(direction, normalized):
    training = TrainingConfig(
        loss_type="listwise_kl", kl_direction=direction, q_temperature=0.7, q_epsilon=0.0, length_normalized=normalized
    )
    logits, anchor, batch = make_problem()
    logprobs = scores_of(training, logits, anchor, batch).logprobs.detach()
    sequence = (batch.episode_mean if normalized else batch.episode_sum)(logprobs)
    batch = replace(batch, rewards=0.7 * sequence + torch.tensor([3.0, -5.0])[batch.group_index])
    value, gradient = value_and_gradient(training, logits, anchor, batch)
    assert value.abs() < 1e-14 and gradient.abs().max() < 1e-14
    value, gradient = value_and_gradient(training, logits, anchor, replace(batch, rewards=-batch.rewards))
    assert value > 1e-3 and gradient.abs().max() > 1e-3


@cases("name", OBJECTIVES)
def test_a_group_without_variance_contributes_exactly_nothing_to_an_objective(name):
    logits, anchor, batch = make_problem()
    batch = replace(batch, rewards=torch.tensor([1.0, 1.0, 1.0, 0.3, 1.1], dtype=torch.float64))
    _, gradient = value_and_gradient(TrainingConfig(loss_type=name, maxent_baseline=False), logits, anchor, batch)
    assert (gradient[:8] == 0).all() and gradient[8:].abs().max() > 1e-3


@cases("name", OBJECTIVES)
def test_a_group_with_one_completion_left_is_inert_and_its_metrics_are_finite(name):
    """skip_unfinished_episodes can leave a single one."""
    logits, anchor = torch.randn(2, 10, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    batch = make_batch(torch.arange(10), torch.zeros(10, dtype=torch.float64), [1.0, 0.0, 1.0], [[3], [2, 5]])
    batch = replace(batch, advantages=torch.tensor([0.0] * 3 + [-1.0] * 2 + [1.0] * 5))
    training = TrainingConfig(loss_type=name, meta_lr=0.1)
    value, metrics = PENALTIES[name](scores_of(training, logits, anchor, batch), batch, training)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert (value[:3] == 0).all() and (gradient[:3] == 0).all()
    assert gradient[3:].isfinite().all() and gradient[3:].norm() > 1e-3
    assert all(len(values) > 0 and values.isfinite().all() for values in metrics.values())
    if name == "listwise_kl":
        each = of_episodes(value, batch).detach()
        torch.testing.assert_close(metrics["train/listwise_kl"], torch.stack([each[0], each[1:].mean()]))


# ---- Sign


def small_step(training: TrainingConfig, logits: Tensor, anchor: Tensor, batch: Batch) -> Tensor:
    _, gradient = value_and_gradient(training, logits, anchor, batch)
    return (logits - 1e-3 * gradient / gradient.norm()).detach()


@cases("seed", range(4))
@cases("form", [form for form in DISTANCES if form != "k1"])
def test_a_small_step_brings_the_policy_closer_to_the_anchor(form, seed):
    """Distances that do not come from the code under test; those of ot in angles, between all pairs in its window."""
    training = settings_of(form)
    logits, anchor, batch = make_problem(seed)

    def distance(policy: Tensor) -> Tensor:
        completions = completions_of(policy, anchor, batch)
        if training.loss_type == "approx_kl":
            return sum((c.chosen() - c.anchor_chosen()).abs().sum() for c in completions)
        if training.loss_type == "kl":
            return sum(kl_divergence(*c.pair()).sum() for c in completions)
        return sum(globals()[f"textbook_{training.loss_type}"](c, training) for c in completions)

    assert distance(small_step(training, logits, anchor, batch)) < distance(logits.detach())


@cases("form", forms_of("ot"))
def test_descent_on_transport_turns_every_hidden_state_to_the_anchors(form):
    _, anchor, batch = make_problem()
    generator = torch.Generator().manual_seed(3)
    policy = anchor + 0.3 * torch.randn(anchor.shape, generator=generator, dtype=torch.float64)
    before = torch.cosine_similarity(policy, anchor, dim=1)
    with patch.object(penalties, "OT_ITERATIONS", 20):
        for _ in range(40):
            policy = policy - 2.0 * value_and_gradient(settings_of(form, ot_target=0.0), policy, anchor, batch)[1]
    assert (1 - torch.cosine_similarity(policy, anchor, dim=1)).mean() < 0.5 * (1 - before).mean()


@cases("form", forms_of(*OBJECTIVES))
def test_a_small_step_raises_the_better_completions_over_the_worse_and_the_likelihood_that_is_meant(form):
    """Reward is all that distinguishes: the reference likes all completions alike. Uniform weights raise all."""
    training = settings_of(form)
    logits, anchor, batch = make_problem()
    meant = [
        textbook(training, completions_of(x, anchor, batch)) for x in (logits, small_step(training, *make_problem()))
    ]
    assert meant[1] < meant[0]
    flat = torch.zeros_like(anchor)
    batch = replace(batch, old_logprobs=torch.full_like(batch.old_logprobs, -math.log(VOCABULARY)))
    moved = small_step(training, flat, flat, batch)
    rise = torch.stack([(c.chosen() + math.log(VOCABULARY)).sum() for c in completions_of(moved, flat, batch)])
    if form == "maxent uniform":
        assert (rise > 0).all()
    elif form not in ("maxent sums", "listwise sums"):  # there length distinguishes as well
        assert rise[0] > rise[2] and rise[4] > rise[3]  # rewards 1 and 0; 1.1 and 0.3
    if form in ("maxent", "maxent clipped", "listwise reverse", "listwise forward"):
        assert rise[0] > 0 and rise[2] < 0


# ---- The estimators of the KL


def two_distributions(distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits [11] of a policy and an anchor."""
    logits, noise = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return logits, logits + distance * noise


def test_the_bias_of_k2_is_of_third_order():
    """Halving a small distance divides the KL by 4 and the bias by 8."""
    exact, bias = [], []
    for distance in (0.02, 0.01):
        policy, anchor = (logits.log_softmax(0) for logits in two_distributions(distance))
        exact.append(kl_divergence(Categorical(logits=policy), Categorical(logits=anchor)))
        bias.append((policy.exp() * kl_estimates(policy, anchor)["k2"]).sum() - exact[-1])
    assert exact[0] / exact[1] == pytest.approx(4, rel=0.05)
    assert bias[0] / bias[1] == pytest.approx(8, rel=0.1)


@cases("sampler", ["policy", "an older policy"])
@cases("estimator", ["k1", "k2", "k3", "k3_unbiased"])
def test_expected_value_and_gradient_by_enumeration_of_the_vocabulary(estimator, sampler):
    """The penalty at every token of the vocabulary, weighed by the probability that the sampler draws it."""
    policy, anchor = two_distributions()
    policy.requires_grad_()
    older = policy.detach() if sampler == "policy" else two_distributions(-0.7)[1]
    batch = make_batch(torch.arange(VOCABULARY), older.log_softmax(0), [0.0] * VOCABULARY, [[1] * VOCABULARY])
    rows = [logits.expand(VOCABULARY, -1) for logits in (policy, anchor)]
    expectation = (older.softmax(0) * penalty_of(settings_of(estimator), *rows, batch)).sum()
    (gradient,) = torch.autograd.grad(expectation, policy)
    p, q = Categorical(logits=policy), Categorical(logits=anchor)
    squared = (p.probs * (p.logits - q.logits) ** 2).sum() / 2
    value = squared if estimator == "k2" else kl_divergence(p, q)
    reverse, forward = (
        torch.autograd.grad(kl_divergence(*pair), policy, retain_graph=True)[0] for pair in ((p, q), (q, p))
    )
    # what the key's docstring says: nothing, reverse, forward, reverse
    none = torch.zeros_like(policy)
    expected = {"k1": none, "k2": reverse, "k3": forward, "k3_unbiased": reverse}[estimator]
    torch.testing.assert_close(expectation.detach(), value.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    assert (reverse - forward).norm() > 0.2 * reverse.norm() > 0.02, "they could not be told apart"
    estimates = {name: x.detach() for name, x in kl_estimates(p.logits, q.logits).items()}  # [11]
    spread = {name: (p.probs * x**2).sum() - (p.probs * x).sum() ** 2 for name, x in estimates.items()}
    assert spread["k3"] < spread["k1"] and (estimates["k3"] >= 0).all() and (estimates["k1"] < 0).any()


# ---- The hinge

HINGED = ["kl reverse", "kl forward", "k1", "k2", "k3", "ot"]


def target_key(form: str) -> str:
    return "ot_target" if form == "ot" else "kl_target"


@cases("form", HINGED)
def test_the_hinge_is_the_mean_of_a_completion_minus_the_target_and_zero_below(form):
    """Per completion: a token above the target in a completion below it costs nothing."""
    logits, anchor, batch = make_problem(3)
    free = penalty_of(settings_of(form), logits, anchor, batch)  # [N]
    means = of_episodes(free, batch)  # [5]
    target = float(means.detach().clamp(min=0).sort().values[2:4].mean())  # two or three completions are above
    hinged = penalty_of(settings_of(form, **{target_key(form): target}), logits, anchor, batch)
    above = means > target
    assert above.any() and not above.all()
    if form != "ot":
        assert ((free > target) & ~above[batch.episode_index]).any(), "no token is above in a completion below"
    torch.testing.assert_close(of_episodes(hinged, batch), torch.where(above, means - target, 0.0))
    (gradient,) = torch.autograd.grad(of_episodes(hinged, batch).sum(), logits)
    (expected,) = torch.autograd.grad(means[above].sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[~above[batch.episode_index]] == 0).all()


# ---- Extremes


def make_extreme_problem() -> tuple[Tensor, Tensor, Batch]:
    """fp32; policy and anchor, policy and old policy are 80 nats apart at the sampled token, in all combinations."""
    tokens = sum(map(sum, LENGTHS))
    ids = torch.arange(tokens) % VOCABULARY
    signs = torch.tensor([[1, -1, 1], [-1, 1, 1], [1, -1, -1], [-1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    logits = torch.nn.functional.one_hot(ids, VOCABULARY)[None] * 80.0 * signs[torch.arange(tokens) % 6].T[:, :, None]
    policy, anchor, old = logits  # [N, 11] each
    return policy, anchor, make_batch(ids, old.log_softmax(-1).gather(1, ids[:, None])[:, 0], [1.0, 0.1, 0.0, 0.3, 1.1])


@every_form
def test_log_ratios_of_80_give_neither_nan_nor_infinity_and_still_move_the_policy(form):
    """A clamp must not take the gradient where the policy is furthest away."""
    policy, anchor, batch = make_extreme_problem()
    scores = scores_of(settings_of(form), policy, anchor, batch)
    for log_ratio in (scores.logprobs - scores.anchor_logprobs, scores.logprobs - batch.old_logprobs):
        assert log_ratio.max() > 80 and log_ratio.min() < -80
    for iterations in (1, 10):
        with patch.object(penalties, "OT_ITERATIONS", iterations):
            value, gradient = value_and_gradient(settings_of(form), policy, anchor, batch)
        assert value.dtype == torch.float32 and value.isfinite() and gradient.isfinite().all()
    if form in ("kl forward", "k2", "listwise forward", "maxent"):
        batch = replace(batch, old_logprobs=scores.logprobs)
        assert value_and_gradient(settings_of(form, q_epsilon=0.1), policy, anchor, batch)[1].norm() > 1e-3


@cases("log_ratio", [80.0, -80.0, 300.0, -300.0])  # exp(80) alone still fits fp32
def test_k1_and_k2_are_exact_far_away_k3_is_finite_and_their_gradients_have_the_right_sign(log_ratio):
    anchor = torch.tensor([-90.0])
    logprobs = (anchor + log_ratio).requires_grad_()
    estimates = kl_estimates(logprobs, anchor)
    assert estimates["k1"].item() == log_ratio and estimates["k2"].item() == log_ratio**2 / 2
    assert torch.autograd.grad(estimates["k2"].sum(), logprobs)[0].item() == log_ratio
    assert estimates["k3"].isfinite() and estimates["k3"].item() >= 79
    assert torch.autograd.grad(estimates["k3"].sum(), logprobs)[0].item() * log_ratio >= 0  # never away from the anchor


# ---- On a real model, from the loop's records to the gradient of every parameter


def perturbed(model, scale: float, seed: int):
    """A model near another one."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def with_episodes(groups: list[Group], change) -> list[Group]:
    return [replace(g, episodes=tuple(map(change, g.episodes))) for g in groups]


def on_policy(groups: list[Group]) -> list[Group]:
    """As of the first and only update of a rollout."""
    return with_episodes(groups, lambda e: replace(e, old_logprobs=None))


def without_advantages(groups: list[Group]) -> list[Group]:
    return with_episodes(groups, lambda e: replace(e, advantages=(0.0,) * e.length))


def make_engine(training: TrainingConfig) -> tuple[Engine, list[Group]]:
    """A tiny model, an anchor and an old policy near it, and ragged groups, the last of completions of one token."""
    path = str(PROJECT / "models" / "countdown-tiny")  # of its tokenizer
    engine = Engine(Config(ModelConfig(path, device="cpu", dtype="float32"), training=training))
    engine.limit = replace(engine.limit, completions=training.micro_batch_size or 8)  # no load_model sees what fits
    engine.model = make_pair("llama")[0]
    engine.anchor = perturbed(engine.model, 0.05, 1)
    engine.optimizer, engine.ratios = torch.optim.SGD(engine.model.parameters(), 1.0), [1.0]
    groups = make_groups(torch.Generator().manual_seed(6), [*RAGGED, (3, [1, 1])])
    batch = pack(groups, "cpu", torch.float32)
    old = score(perturbed(engine.model, 0.02, 2), batch, 1.0).logprobs.split(batch.batch.lengths.tolist())
    rows, rewards = iter(old), iter([1.0, 0.0, 0.1, 1.1, 0.0, 1.0, 0.1, 0.4, 1.0, 0.0, 1.0])

    def filled(episode):
        logprobs = tuple(next(rows).tolist())
        return replace(episode, logprobs=logprobs, old_logprobs=logprobs, reward=next(rewards))

    return engine, [found for g in with_episodes(groups, filled) for found in with_advantages([g], training)]


def make_run(form: str, **keys) -> tuple[Engine, list[Group]]:
    return make_engine(settings_of(form, **{"max_gen_len": 32, **keys}))


def measured_and_gradient(engine: Engine, groups: list[Group], training=None, size=1000, tokens=None):
    """What the whole update measures and its gradient, cut into passes of a size."""
    training = training or engine.config.training
    engine.limit = replace(engine.limit, completions=size, tokens=tokens)
    weighted = with_loss_weights(groups, training)
    measured = engine.forward_backward(weighted, partial(objective, training), **wanted(training, anchor=True))
    return measured.means(), torch.cat([p.grad.flatten() for p in engine.model.parameters()])


def full_gradient(engine: Engine, groups: list[Group], *arguments, **keys) -> Tensor:
    """The gradient with the loss in front."""
    measured, gradient = measured_and_gradient(engine, groups, *arguments, **keys)
    return torch.cat([torch.tensor([measured["train/loss"]]), gradient])


# targets that some completions are above and some below, among them of one token
TARGETS = {"kl hinge": {"kl_target": 0.6}, "k3 hinge": {"kl_target": 0.5}, "ot hinge": {"ot_target": 0.19}}


@cases("loss_agg", ["token", "sequence", "constant"])
@cases("form", [form for form in FORMS if form != "ot wide"])
def test_the_gradient_does_not_depend_on_passes_neighbours_or_order(form, loss_agg):
    beta = FORMS[form][1].get("beta", 0.04)
    engine, groups = make_run(form, loss_agg=loss_agg, beta=beta, entropy_coef=0.1, **TARGETS.get(form, {}))
    shuffled = [replace(g, episodes=g.episodes[::-1]) for g in (groups[2], groups[0], groups[3], groups[1])]
    with patch.object(penalties, "OT_ITERATIONS", 20):
        expected = full_gradient(engine, groups)
        assert expected[1:].abs().max() > 1e-2
        every = ((groups, {"size": 1}), (groups, {"size": 3}), (shuffled, {"tokens": 25}), (shuffled, {}))
        for order, cut in every if loss_agg == "token" else every[1:3]:
            gradient = full_gradient(engine, order, **cut)
            assert (gradient - expected).abs().max() < 3e-5 * expected.abs().max(), f"{cut}: more than rounding"


def plain_completions(plain, plain_anchor, groups, temperature: float = 1.0) -> list[Completion]:
    """Every completion through the models as transformers ships them: one row, no packing, no sharing."""
    completions = []
    for index, group in enumerate(groups):
        prompt = group.problem.prompt_ids
        for e in group.episodes:
            rows = []
            for model in (plain, plain_anchor):
                output = model(torch.tensor([prompt + e.token_ids]), use_cache=False, output_hidden_states=True)
                part = slice(len(prompt) - 1, len(prompt) + len(e.token_ids) - 1)
                rows.append((output.logits[0, part] / temperature, output.hidden_states[-1][0, part]))
            (policy, hidden), (anchor, anchor_hidden) = rows
            ids, old = torch.tensor(e.token_ids), torch.tensor(e.logprobs)
            completions.append(Completion(policy, anchor.detach(), hidden, anchor_hidden, ids, old, e.reward, index))
    return completions


def plain_copies(engine: Engine):
    """The models of an engine as transformers ships them, in float64."""
    copies = [make_pair("llama")[1] for _ in range(2)]
    for plain, packed in zip(copies, (engine.model, engine.anchor), strict=True):
        plain.load_state_dict(packed.state_dict())
    return [plain.double() for plain in copies]


@every_form
def test_a_real_models_gradient_is_that_of_the_textbook_over_plain_forwards(form, monkeypatch):
    """In float64 over whole logits; here chunk by chunk. A narrow band would need thousands of iterations."""
    ot = {"ot_window": 40 if form == "ot wide" else 9} if FORMS[form][0] == "ot" else {}
    temperature = 0.7 if form == "js" else 1.0
    engine, groups = make_run(form, loss_agg="sequence", temperature=temperature, **ot, **TARGETS.get(form, {}))
    training, groups = engine.config.training, without_advantages(groups)
    monkeypatch.setattr(penalties, "OT_ITERATIONS", 400)
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cpu", 7 * engine.model.config.vocab_size)
    measured, gradient = measured_and_gradient(engine, groups)
    plain, plain_anchor = plain_copies(engine)
    completions = plain_completions(plain, plain_anchor, groups, temperature)
    expected_loss = textbook(training, completions)
    expected_loss.backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert form == "none" or expected.norm() > 1e-4
    assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6
    assert measured["train/loss"] == pytest.approx(expected_loss.item(), rel=1e-4, abs=1e-5)
    if "hinge" in form:
        assert {bool(textbook(training, [c]) > 0) for c in completions} == {True, False}, "one side is not tried"


@cases("form", ["kl reverse", "kl forward", "k2", "k3", "ot", "k1", "js"])
def test_the_rollout_anchor_has_no_gradient_at_the_first_update(form):
    """What the project warns of: the anchor then IS the policy. k1 is no exception, only noise about zero."""
    engine, groups = make_run(form)
    groups = on_policy(without_advantages(groups))
    assert full_gradient(engine, groups).norm() > 1e-3
    engine.anchor = copy.deepcopy(engine.model)
    largest = full_gradient(engine, groups).abs().max()
    if form == "k1":
        assert largest > 1e-3
    else:  # what is summed over the vocabulary, and the transport, leave rounding: sum(p) is not 1 to the last bit
        assert largest <= (0 if form in ("k2", "k3") else 1e-6)


@cases("loss_agg", ["token", "sequence", "constant"])
@cases("form", ["kl reverse", "kl forward", "k2", "k3", "ot"])
def test_a_target_of_almost_nothing_changes_nothing_beyond_rounding(form, loss_agg):
    engine, groups = make_run(form, loss_agg=loss_agg)
    training, groups = engine.config.training, without_advantages(groups)
    free, hinged = (full_gradient(engine, groups, replace(training, **{target_key(form): x})) for x in (0.0, 1e-9))
    assert free[1:].abs().max() > 1e-3
    torch.testing.assert_close(hinged, free, rtol=1e-4, atol=1e-6 * free.abs().max().item())


MIXTURES = [
    ({"kl": 0.3, "ot": 0.5}, {}),
    ({"js": 0.2, "kl": 0.3, "approx_kl": 0.0}, {"kl_target": 0.3}),
    ({"maxent": 0.7, "approx_kl": 0.5}, {"tau": 0.3, "beta": 0.4}),
    ({"maxent": 0.7, "js": 0.5}, {"tau": 0.3, "beta": 0.4, "maxent_clipped": True}),
    ({"listwise_kl": 2.0, "kl": 0.1}, {"entropy_coef": 0.1}),
]


@cases(("mixture", "keys"), MIXTURES)
def test_several_penalties_are_the_sum_of_each_and_their_shares_are_logged(mixture, keys):
    training = TrainingConfig(loss_type=mixture, max_gen_len=32, **keys)
    engine, groups = make_engine(training)
    groups = without_advantages(groups)
    measured, gradient = measured_and_gradient(engine, groups)
    alone = {name: measured_and_gradient(engine, groups, replace(training, loss_type={name: 1.0}, entropy_coef=0.0))
             for name, weight in mixture.items() if weight > 0}  # fmt: skip
    expected = sum(mixture[name] * found for name, (_, found) in alone.items())
    if training.entropy_coef:
        expected = expected + measured_and_gradient(engine, groups, replace(training, loss_type="none"))[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-6)
    shares = {f"penalty/{name}": mixture[name] * found["train/loss"] for name, (found, _) in alone.items()}
    if training.maxent_clipped:
        assert shares.pop("penalty/maxent") == pytest.approx(measured["train/policy_loss"], abs=1e-6)
    assert {name: value for name, value in measured.items() if name[:8] == "penalty/"} == pytest.approx(
        shares, abs=1e-6
    )
    parts = [*shares, "train/policy_loss", "train/entropy_bonus"]
    assert measured["train/loss"] == pytest.approx(sum(measured.get(name, 0.0) for name in parts), abs=1e-6)


# ---- What a penalty reads, and bad values


class Recorder:
    """A training section that remembers what was read of it."""

    def __init__(self, training):
        self.training, self.names = training, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.training, name)


CLAIMS = {
    key: [n for n, d in known_penalties().items() if key in d.reads]
    for d in known_penalties().values()
    for key in d.reads
}
FIELDS = TrainingConfig.__dataclass_fields__
# read by the loop or the controllers in place of the penalty itself
ELSEWHERE = {"beta_kl_target", "tau_target_entropy", "tau_lr", "tau_warmup_steps", "maxent_clipped"}


@cases("name", [name for name in known_penalties() if name != "none"])
def test_a_penalty_says_truly_which_keys_it_reads(name):
    logits, anchor, batch = make_problem()
    recorder = Recorder(TrainingConfig(loss_type=name))
    PENALTIES[name](scores_of(recorder.training, logits, anchor, batch), batch, recorder)
    if PENALTIES[name].over_vocabulary:
        PENALTIES[name].distance(recorder)
    claimed = {key for key, names in CLAIMS.items() if name in names}
    assert recorder.names & CLAIMS.keys() <= claimed
    assert claimed - recorder.names - ELSEWHERE == set()


def test_the_policy_term_reads_the_keys_that_are_marked_as_its_own():
    logits, anchor, batch = make_problem()
    names = set()
    for keys in ({}, {"policy_loss": "cispo"}):
        recorder = Recorder(TrainingConfig(loss_type="none", **keys))
        policy_loss(scores_of(recorder.training, logits, anchor, batch).logprobs, batch, recorder)
        names |= recorder.names
    assert names == {name for name, field in FIELDS.items() if field.metadata.get("policy")}


def refusal(tmp_path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
    return message


def test_every_key_that_a_loss_type_does_not_read_is_refused_and_says_who_reads_it(tmp_path):
    """All pairs of loss type and key; the keys of the GRPO-mini format pass with every loss type."""
    known, refused = known_penalties(), set()
    with_policy_term = [name for name, declared in known.items() if not declared.objective]
    readers = {**CLAIMS}
    for name, field in FIELDS.items():
        if field.metadata.get("policy"):
            readers[name] = [*with_policy_term, "maxent with maxent_clipped: true"]
        elif field.metadata.get("advantages"):
            readers[name] = with_policy_term
    for loss_type in known:
        for name, read_by in readers.items():
            value = getattr(TrainingConfig(), name)
            text = f"training:\n  loss_type: {loss_type}\n  {name}: {'' if value is None else value}\n"
            if loss_type in read_by or name in SEED_FORMAT_KEYS:
                (tmp_path / "good.yaml").write_text(text, encoding="utf-8")
                load_config(tmp_path / "good.yaml")
                continue
            words = f"training.{name} is not read by loss_type {loss_type}; it belongs to {', '.join(read_by)}; remove"
            assert words in refusal(tmp_path, text)
            refused.add(name)
    assert len(refused) > 20


def test_an_unknown_penalty_is_answered_by_those_that_are_known(tmp_path):
    known = ", ".join(sorted(known_penalties()))
    assert f"'nuclear' is not known; known are: {known}" in refusal(tmp_path, "training:\n  loss_type: nuclear\n")
