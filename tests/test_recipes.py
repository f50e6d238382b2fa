"""configs/recipes: each file's loss against its paper's formula, by hand in float64, and against TRL's own code."""

import math
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor

from src.config import TrainingConfig, load_config
from src.engine.packing import pack
from src.records import Batch, Episode, Group, Problem, Scores
from src.train_grpo import objective, with_advantages, with_length_penalty, with_loss_weights

RECIPES = Path(__file__).parent.parent / "configs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
REWARDS = [[1.1, 0.1, 0.0, 1.1], [0.0, 0.1, 0.0, 1.0]]
LENGTHS = [[3, 40, 5, 2], [4, 36, 1, 6]]  # one is cut off at 40, one in the buffer of DAPO
LIMIT, LOW, HIGH = 40, 0.2, 0.2
WORDS = [["7", "8", "8", "7"], ["1", "2", "3", "4"]]


def problem() -> tuple[list[Group], Tensor, Tensor, Tensor]:
    """Groups, and of each of their tokens the log-probs of policy, policy that sampled, and reference, [N]."""
    generator = torch.Generator().manual_seed(3)
    total = sum(map(sum, LENGTHS))
    old = -2 * torch.rand(total, generator=generator, dtype=torch.float64) - 0.1
    new = old + 0.3 * torch.randn(total, generator=generator, dtype=torch.float64)
    anchor = old + 0.5 * torch.randn(total, generator=generator, dtype=torch.float64)
    values = iter(old.tolist())
    groups = []
    for index, rows in enumerate(zip(REWARDS, LENGTHS, WORDS, strict=True)):
        episodes = []
        for reward, length, word in zip(*rows, strict=True):
            sampled, text = tuple(next(values) for _ in range(length)), f"<answer>{word}</answer>"
            episode = Episode((7,) * length, sampled, length < LIMIT, text, reward=reward, rewards=((1.0, reward),))
            episodes.append(replace(episode, old_logprobs=sampled))
        groups.append(Group(Problem(index, (5, 6), "", {}), tuple(episodes)))
    return groups, new.requires_grad_(), old, anchor


def doubled(batch: Batch) -> Batch:
    floats = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(
        batch, **{k: v.double() for k, v in floats.items() if isinstance(v, Tensor) and v.is_floating_point()}
    )


def loss_of(training: TrainingConfig) -> tuple[Tensor, Tensor]:
    """What the loop makes of it: loss, and its gradient by the policy's log-probs [N]."""
    groups, new, _, anchor = problem()
    groups = with_advantages(with_length_penalty(groups, training), training)
    weighed = with_loss_weights(groups, training)
    batch = doubled(pack(weighed, "cpu", torch.float32).batch)
    # float32 on the way into a batch: the exact values again
    exact = [e for g in weighed for e in g.episodes]
    weights = torch.tensor([e.token_weight for e in exact for _ in range(e.length)], dtype=torch.float64)
    advantages = torch.tensor([a for e in exact for a in e.advantages], dtype=torch.float64)
    old = torch.tensor([x for e in exact for x in e.old_logprobs], dtype=torch.float64)
    rewards = torch.tensor([e.reward for e in exact], dtype=torch.float64)
    shares = torch.full((len(exact),), 1 / len(exact), dtype=torch.float64)
    batch = replace(batch, weights=weights, advantages=advantages, old_logprobs=old, sampled_logprobs=old,
                    rewards=rewards, episode_weights=shares)  # fmt: skip
    hidden = torch.ones(len(new), 3, dtype=torch.float64)
    scores = Scores(new, torch.zeros_like(new), hidden, anchor, hidden)
    loss, _ = objective(training, scores, batch)
    return loss.detach(), torch.autograd.grad(loss, new)[0]


def by_completion(*columns: Tensor) -> list[list[tuple[Tensor, ...]]]:
    """[N] columns as tuples of [T], for each completion of each group."""
    parts = [iter(column.split([n for row in LENGTHS for n in row])) for column in columns]
    return [[tuple(next(part) for part in parts) for _ in row] for row in LENGTHS]


def clipped(new: Tensor, old: Tensor, advantage, low=LOW, high=HIGH) -> Tensor:
    ratio = (new - old).exp()
    return torch.min(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)


def spread_of(row: list[float]) -> tuple[float, float]:
    mean = sum(row) / len(row)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))


def normalised(row: list[float]) -> list[float]:
    mean, deviation = spread_of(row)
    return [(x - mean) / deviation for x in row]


def every(terms: list[list[Tensor]]) -> list[Tensor]:
    return [term for row in terms for term in row]


def surrogate(advantages: list[list], low=LOW, high=HIGH) -> list[Tensor]:
    """PPO's term of each completion [T]."""
    _, new, old, _ = PROBLEM
    rows = by_completion(new, old)
    return every(
        [[clipped(*c, a, low, high) for c, a in zip(*pair, strict=True)] for pair in zip(rows, advantages, strict=True)]
    )


def grpo() -> Tensor:
    """Equation 3 of DeepSeekMath; the k3 of tokens of an older policy is weighed by the ratio, a constant."""
    _, new, old, anchor = PROBLEM
    terms = surrogate([normalised(row) for row in REWARDS])
    for index, (n, o, a) in enumerate(every(by_completion(new, old, anchor))):
        k3 = (a - n).exp() - (a - n) - 1
        terms[index] = terms[index] - 0.04 * (n - o).exp().detach() * k3
    return -sum(term.mean() for term in terms) / len(terms)


def reinforce() -> Tensor:
    flat = [x for row in REWARDS for x in row]
    mean = sum(flat) / len(flat)
    return -torch.cat(surrogate([[x - mean for x in row] for row in REWARDS])).mean()


def rloo() -> Tensor:
    """The mean of the three others; the k1 of each token, times beta, off its advantage; sums, over 8 x 40."""
    _, _, old, anchor = PROBLEM
    k1 = by_completion(old - anchor)
    advantages = [
        [x - (sum(row) - x) / 3 - 0.05 * k for x, (k,) in zip(row, ks, strict=True)]
        for row, ks in zip(REWARDS, k1, strict=True)
    ]
    return -torch.cat(surrogate(advantages)).sum() / (8 * LIMIT)


def dr_grpo() -> Tensor:
    return -torch.cat(surrogate([[x - sum(row) / 4 for x in row] for row in REWARDS])).sum() / (8 * LIMIT)


def dapo() -> Tensor:
    """Equations 8 and 13: the one of 36 tokens loses (36 - 32) / 8, the one that was cut off 1."""
    rewards = [
        [x - {36: 0.5, 40: 1.0}.get(n, 0.0) for x, n in zip(*p, strict=True)]
        for p in zip(REWARDS, LENGTHS, strict=True)
    ]
    return -torch.cat(surrogate([normalised(row) for row in rewards], high=0.28)).mean()


def gspo() -> Tensor:
    """Equations 5 and 7: the geometric mean of the ratios, clipped as one."""
    _, new, old, _ = PROBLEM
    terms = []
    for row, rewards in zip(by_completion(new, old), REWARDS, strict=True):
        for (n, o), advantage in zip(row, normalised(rewards), strict=True):
            s = (n - o).mean().exp()
            terms.append(torch.min(s * advantage, s.clip(1 - 3e-4, 1 + 4e-4) * advantage))
    return -sum(terms) / len(terms)


def cispo() -> Tensor:
    _, new, old, _ = PROBLEM
    terms = []
    for row, rewards in zip(by_completion(new, old), REWARDS, strict=True):
        terms += [
            (n - o).exp().clip(max=5).detach() * a * n for (n, o), a in zip(row, normalised(rewards), strict=True)
        ]
    return -torch.cat(terms).mean()


def maxrl() -> Tensor:
    return -torch.cat(surrogate([[(x - sum(row) / 4) / (sum(row) / 4) for x in row] for row in REWARDS])).mean()


def maxent_grpo() -> Tensor:
    """Per prompt w ~ q^(1 / (tau + beta)) ref^(beta / (tau + beta)), less 1 / G, on mean token log-probs."""
    _, new, _, anchor = PROBLEM
    total, tau, beta = 0.0, 0.05, 0.04
    for row, rewards in zip(by_completion(new, anchor), REWARDS, strict=True):
        q = 0.99 * (torch.tensor(rewards, dtype=torch.float64) / 4).softmax(0) + 0.01 / 4
        reference = torch.stack([a.mean() for _, a in row])
        weights = ((q.log() + beta * reference) / (tau + beta)).softmax(0)
        total = total - sum((w - 0.25) * n.mean() for w, (n, _) in zip(weights, row, strict=True))
    return total / 2


def seed_grpo() -> Tensor:
    """The groups' answers: two clusters in the first; in the second each its own."""
    _, _, old, _ = PROBLEM
    advantages = []
    for row, rewards, words in zip(by_completion(old), REWARDS, WORDS, strict=True):
        shares = torch.stack([o.mean() for (o,) in row]).softmax(0)
        masses = [sum(s for s, w in zip(shares, words, strict=True) if w == word) for word in sorted(set(words))]
        entropy = -sum(m * m.log() for m in masses)
        scale = 1 / (1 + 0.0417 / math.log(4) * float(entropy))
        advantages.append([scale * a for a in normalised(rewards)])
    terms = surrogate(advantages)
    return -sum(term.mean() for term in terms) / len(terms)


def ot_grpo() -> Tensor:
    """The hidden states are those of the reference here, where the divergence is 0; test_penalties.py has the rest."""
    return -torch.cat(surrogate([normalised(row) for row in REWARDS])).mean()


def listwise() -> Tensor:
    """KL(policy || target) over a group, of mean token log-probs."""
    _, new, _, _ = PROBLEM
    total = 0.0
    for row, rewards in zip(by_completion(new), REWARDS, strict=True):
        target = 0.99 * (torch.tensor(rewards, dtype=torch.float64) / 0.1).softmax(0) + 0.01 / 4
        policy = torch.stack([n.mean() for (n,) in row]).log_softmax(0)
        total = total + (policy.exp() * (policy - target.log())).sum()
    return total / 2


PROBLEM = problem()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_formula_of_its_paper(name):
    expected = globals()[name]()
    gradient = torch.autograd.grad(expected, PROBLEM[1])[0]
    got, got_gradient = loss_of(load_config(RECIPES / f"{name}.yaml").training)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    assert gradient.norm() > 1e-3 and (got_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_a_recipe_says_its_paper_and_only_in_what_it_differs():
    whole = yaml.safe_load((RECIPES / "grpo.yaml").read_text())
    for name in NAMES:
        text = (RECIPES / f"{name}.yaml").read_text()
        assert text.startswith("# ") and len(text.splitlines()[0]) <= 120
        if name != "grpo":
            raw = yaml.safe_load(text)
            assert raw.pop("base") == "grpo.yaml" and set(raw) == {"training"}
            assert not raw["training"].items() & whole["training"].items(), "says again what its base says"


TRL = {  # recipe -> options of TRL's trainer
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRL)
def test_a_recipe_is_what_trl_computes(name):
    """GRPOTrainer._compute_loss of TRL 1.16.0 itself, on our advantages and log-probs, in padded rows."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="uv sync --group benchmarks has trl")
    training = load_config(RECIPES / f"{name}.yaml").training
    if name == "grpo":  # TRL weighs the KL by a ratio that is differentiated, or not at all
        training = replace(training, loss_type="none")
    groups, new, old, anchor = problem()
    groups = with_advantages(with_length_penalty(groups, training), training)
    advantages = torch.tensor([e.advantages[0] for g in groups for e in g.episodes], dtype=torch.float64)
    sizes = [n for row in LENGTHS for n in row]
    padded = {
        key: torch.nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True)
        for key, x in {"new": new, "old": old, "anchor": anchor}.items()
    }
    mask = torch.arange(LIMIT)[None] < torch.tensor(sizes)[:, None]
    options = {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token", **TRL[name]}
    arguments = SimpleNamespace(delta=None, steps_per_generation=1, entropy_target=None, **options)
    metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=True,
    )
    trainer = SimpleNamespace(
        args=arguments, accelerator=accelerator, _metrics=metrics, model=SimpleNamespace(training=True),
        beta=options["beta"],
        epsilon_low=options["epsilon"], epsilon_high=options["epsilon_high"], loss_type=options["loss_type"],
        importance_sampling_level=options["importance_sampling_level"], max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, vllm_importance_sampling_correction=False, aux_loss_enabled=False, use_adaptive_entropy=False,
        _entropy_bonus_enabled=False, entropy_coef=0.0,
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded["new"], torch.zeros_like(padded["new"]), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(8, 2).long(), "prompt_mask": torch.ones(8, 2), "completion_mask": mask.double(),
        "completion_ids": torch.zeros(8, LIMIT).long(), "advantages": advantages,
        "old_per_token_logps": padded["old"], "ref_per_token_logps": padded["anchor"],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    gradient = torch.autograd.grad(theirs, new)[0]
    loss, ours = loss_of(training)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert gradient.norm() > 1e-3 and (ours - gradient).norm() < 1e-5 * gradient.norm()
