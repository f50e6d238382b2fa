"""The loop: one denominator, resuming, what a run leaves behind, and that it learns."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.config import ConfigError, load_config
from src.evaluate import pass_at_k
from src.train_grpo import (
    add_advantages,
    add_loss_weights,
    evaluate,
    given_groups,
    learning_rate_at,
    loss_of_microbatch,
    microbatches,
    prepare,
    questions_of_step,
    run_evaluation,
    run_training,
    sample,
    train_step,
    update,
)

CONFIGS = Path(__file__).parent.parent / "configs" / "configs_tiny"
SMALL = [
    "training.batch_size=24",
    "training.num_questions_per_batch=6",
    "training.minibatches=2",
    "data.eval_size=8",
    "data.train_size=20",
    "data.eval_samples=2",
    "training.max_steps=4",
    "training.eval_interval=2",
    "training.ckpt_save_interval=2",
    "training.inference_batch_size=16",
]


def small_config(*overrides: str, name: str = "config_kl_beta0.04_tiny"):
    return load_config(CONFIGS / f"{name}.yaml", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def kl_run():
    """A prepared run and one graded rollout of it."""
    run = prepare(small_config(), "countdown")
    with torch.no_grad():  # away from the reference, so that the penalty has a gradient
        for parameter in run.model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    training = run.config.training
    groups = add_advantages(sample(run, questions_of_step(run, 1), 8, 1.6, stream=1), training)
    assert any(e.advantage for g in groups for e in g.episodes), "without advantages the test would see nothing"
    assert len({len(e.token_ids) for g in groups for e in g.episodes}) > 3
    return run, groups


@pytest.mark.parametrize("loss_agg", ["token", "sequence", "constant"])
def test_the_gradient_is_the_same_for_every_micro_batch_size(kl_run, loss_agg):
    run, groups = kl_run
    gradients = []
    for size, tokens in ((1, None), (5, None), (1000, None), (1, 90)):
        run.config.training = replace(
            run.config.training,
            micro_batch_size=size,
            max_tokens_per_microbatch=tokens,
            loss_agg=loss_agg,
            entropy_coef=0.1,
        )
        weighted = add_loss_weights(groups, run.config.training)
        run.model.zero_grad()
        loss = 0.0
        for batch in microbatches(run, weighted):
            part, _, _ = loss_of_microbatch(run, batch, run.config.training, True, True)
            part.backward()
            loss += part.item()
        gradients.append((loss, torch.cat([p.grad.flatten() for p in run.model.parameters()])))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], abs=1e-6)
        torch.testing.assert_close(gradient, gradients[0][1], atol=2e-6, rtol=1e-4)
    assert gradients[0][1].norm() > 1e-3


def test_metrics_are_of_the_whole_step_not_of_a_micro_batch(kl_run):
    run, groups = kl_run
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    results = []
    for size in (2, 1000):
        run.model.load_state_dict(before)
        run.config.training = replace(
            run.config.training,
            micro_batch_size=size,
            max_tokens_per_microbatch=None,
            minibatches=1,
            learning_rate=1e-9,
        )
        run.model.zero_grad()
        results.append(update(run, groups, step=2))
    run.model.load_state_dict(before)
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-3, abs=1e-6), name


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    whole = run_training(small_config(), "countdown", tmp_path / "whole")
    part = small_config("training.max_steps=2")
    run_training(part, "countdown", tmp_path / "parts")
    rest = run_training(small_config(), "countdown", tmp_path / "parts")
    assert whole == rest
    folders = [tmp_path / name / "runs" / "config_kl_beta0.04_tiny_countdown" for name in ("whole", "parts")]
    states = [AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in folders]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    assert [line["step"] for line in lines[1]] == [0, 1, 2, 3, 4]
    for one, other in zip(*lines, strict=True):
        timed = {name for name in one if name.startswith(("time/", "memory/")) or "per_second" in name}
        assert {n: v for n, v in one.items() if n not in timed} == {n: v for n, v in other.items() if n not in timed}


def test_a_run_folder_holds_what_the_readme_says(tmp_path, capsys):
    config = small_config("training.max_steps=2")
    run_training(config, "countdown", tmp_path)
    folder = tmp_path / "runs" / "config_kl_beta0.04_tiny_countdown"
    for name in ("config.yaml", "training.log", "metrics.jsonl", "tb", "checkpoints/step_000002", "final/config.json"):
        assert (folder / name).exists(), name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = {"step", "eval/greedy", "eval/pass@1", "eval/pass@2", "eval/format", "eval/length"}
    assert wanted <= set(lines[0]) and wanted <= set(lines[2])
    assert {
        "train/reward",
        "train/answer",
        "train/format",
        "train/entropy",
        "train/kl_k1",
        "train/kl_k3",
        "train/loss",
        "train/policy_loss",
        "train/penalty",
        "train/grad_norm",
        "train/learning_rate",
        "train/clip_fraction",
        "train/groups_without_variance",
        "rollout/length",
        "rollout/finished",
        "rollout/mismatch",
        "rollout/tokens_per_second",
        "time/rollout",
        "time/update",
    } <= set(lines[1])
    assert lines[1]["rollout/mismatch"] < 1e-4
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    run_training(config, "countdown", tmp_path)  # the same command again
    assert "is complete" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match=r"training.beta = 0.04, this config says 0.5; use --fresh"):
        run_training(small_config("training.max_steps=2", "training.beta=0.5"), "countdown", tmp_path)
    run_training(config, "countdown", tmp_path, fresh=True)
    assert (folder.parent / f"{folder.name}.1" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("loss_type", ["none", "kl", "approx_kl", "ot", "maxent", "listwise_kl"])
def test_every_loss_type_trains_on_the_embedded_model(loss_type):
    """A few steps at the real settings, smaller: the sampled reward rises, and no number is missing or infinite."""
    config = load_config(
        CONFIGS / "config_none_tiny.yaml",
        [
            f"training.loss_type={loss_type}",
            "training.batch_size=128",
            "training.num_questions_per_batch=16",
            "training.learning_rate=1e-3" if loss_type == "listwise_kl" else "training.learning_rate=6e-4",
            "training.minibatches=2",
            "data.eval_size=64",
            "data.eval_samples=4",
            "data.train_size=16",
        ],
    )
    run = prepare(config, "countdown")
    rewards = []
    for step in range(1, 9):
        metrics, _ = train_step(run, step)
        assert all(math.isfinite(value) for value in metrics.values())
        rewards.append(metrics["train/answer"])
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1


def test_controllers_move_tau_and_beta_and_survive_a_restart(tmp_path):
    """maxent with both controllers: the run that was interrupted ends with the same tau and beta as the whole one."""
    moving = ["training.tau_target_entropy=1.9", "training.tau_lr=0.5", "training.beta_kl_target=1e-6"]
    for name, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for steps in lengths:
            config = small_config(*moving, f"training.max_steps={steps}", name="config_maxent_tau0.1_beta0.04_tiny")
            run_training(config, "countdown", tmp_path / name)
    states = []
    for name in ("whole", "parts"):
        folder = tmp_path / name / "runs" / "config_maxent_tau0.1_beta0.04_tiny_countdown"
        states.append((folder / "checkpoints" / "step_000004" / "controllers.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["maxent/tau"] > 0.1 and rows[-1]["train/beta"] > 0.04
    assert states[0] == states[1]


def test_maxent_without_a_reference_weight_trains():
    run = prepare(small_config("training.beta=0", name="config_maxent_tau0.1_beta0.04_tiny"), "countdown")
    metrics, _ = train_step(run, 1)
    assert metrics["train/grad_norm"] > 0


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(kl_run):
    run, groups = kl_run
    before = [parameter.clone() for parameter in run.model.parameters()]
    poisoned = [replace(g, episodes=tuple(replace(e, advantage=math.nan) for e in g.episodes)) for g in groups[:1]]
    run.config.training = replace(run.config.training, minibatches=1)
    metrics = update(run, [*poisoned, *groups[1:]], step=1)
    assert metrics["train/skipped_updates"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_the_anchor_follows_when_told_to():
    def distance(run) -> float:
        pairs = zip(run.model.parameters(), run.anchor.parameters(), strict=True)
        return sum(float((a.detach() - b).abs().sum()) for a, b in pairs)

    for overrides, moves in (
        ((), False),
        (("training.reference_sync_steps=1",), True),
        (("training.anchor=rollout",), True),
    ):
        run = prepare(small_config("training.loss_type=approx_kl", *overrides), "countdown")
        initial = [p.clone() for p in run.anchor.parameters()]
        train_step(run, 1)
        assert distance(run) > 0  # the policy moved
        train_step(run, 2)
        assert any(not torch.equal(a, b) for a, b in zip(initial, run.anchor.parameters(), strict=True)) == moves


def test_every_problem_comes_once_an_epoch_in_a_new_order():
    run = prepare(small_config("data.train_size=18"), "countdown")
    epochs = [[p.index for step in range(3 * e + 1, 3 * e + 4) for p in questions_of_step(run, step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(18))
    assert epochs[0] != epochs[1]


def test_evaluation_is_the_same_each_time_and_leaves_a_report(tmp_path):
    config = small_config()
    metrics = run_evaluation(config, "countdown", tmp_path)
    assert metrics == run_evaluation(config, "countdown", tmp_path)
    folder = tmp_path / "runs" / f"{Path(config.source).stem}_countdown_eval"
    assert {path.name for path in folder.iterdir()} == {".lock", "report.json", "completions.jsonl"}
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"] == metrics and report["about"]["config"]["training"]["temperature"] == 1.0
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for kind, number in (("greedy", 8), ("sampled", 16)):
        answers = [row["parts"]["answer"] for row in rows if row["kind"] == kind]
        assert len(answers) == number
        assert sum(answers) / number == pytest.approx(metrics["eval/greedy" if kind == "greedy" else "eval/pass@1"])


def test_evaluation_by_hand(monkeypatch):
    run = prepare(small_config("data.eval_samples=4", "data.eval_size=10"), "countdown")
    metrics = evaluate(run)
    groups = sample(run, run.eval_problems, 4, 1.0, stream=-1)
    correct = [sum(e.reward_parts["answer"] for e in g.episodes) for g in groups]
    assert metrics["eval/pass@1"] == pytest.approx(sum(correct) / 40)
    assert metrics["eval/pass@4"] == pytest.approx(sum(c > 0 for c in correct) / 10)


def test_pass_at_k_is_unbiased():
    assert pass_at_k(0, 8, 4) == 0.0
    assert pass_at_k(5, 8, 4) == 1.0  # any 4 of 8 hold one of the 5
    assert pass_at_k(2, 8, 1) == pytest.approx(0.25)
    assert pass_at_k(1, 4, 2) == pytest.approx(0.5)


def test_learning_rate_schedules_by_hand():
    training = small_config("training.warmup_steps=2", "training.learning_rate=1.0").training
    rates = [learning_rate_at(step, 6, training) for step in range(1, 7)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    linear = replace(training, lr_schedule="linear")
    assert [learning_rate_at(s, 6, linear) for s in range(1, 7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = replace(training, lr_schedule="cosine")
    assert learning_rate_at(5, 6, cosine) == pytest.approx(0.5)


def test_groups_of_a_file_are_cut_by_nothing_but_the_limits(tmp_path):
    file = tmp_path / "scored.jsonl"
    texts = ["1 + 2", "3", "4 - 1 + 0 * 7"]
    rows = [
        {"prompt": f"{n}", "nums": [n, 2], "target": n, "completions": [{"text": t, "score": n + s} for t in texts[:k]]}
        for n, k, s in [(number, 2 + number % 2, 0.5) for number in range(1, 13)]
    ]
    for row in rows:
        row["completions"][0]["score"] = 99
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.path={file}", "training.old_logprobs=trainer", "training.minibatches=1"]
    run = prepare(small_config(*overrides), "scored")
    assert len(run.train_problems) + len(run.eval_problems) == 12 and run.eval_problems
    arguments = (run.train_problems, run.tokenizer, run.eos_ids, run.config.training)
    groups = given_groups(*arguments)
    for group in groups:
        given = group.problem.reference["completions"]
        assert [e.text for e in group.episodes] == [item["text"] for item in given]
        assert [e.reward for e in group.episodes] == [item["score"] for item in given]
        assert [e.reward_parts["answer"] for e in group.episodes] == [1.0] + [0.0] * (len(given) - 1)
        for episode in group.episodes:
            assert episode.token_ids[-1] == run.tokenizer.eos_token_id and episode.finished
            assert run.tokenizer.decode(episode.token_ids[:-1]) == episode.text
    graded = add_advantages(groups, run.config.training)
    for group in graded:  # groups of two and of three: mean 0, variance 1, each by itself
        advantages = torch.tensor([e.advantage for e in group.episodes])
        assert advantages.mean().abs() < 1e-6 and advantages.std(correction=0) == pytest.approx(1)
    longest = max(len(e.token_ids) for g in groups for e in g.episodes)
    run.config.training.max_gen_len = longest - 1
    kept = [e.text for g in given_groups(*arguments) for e in g.episodes]
    assert kept and texts[2] not in kept and set(kept) == set(texts[:2])
    tight = ["training.max_gen_len=1", *overrides]
    with pytest.raises(ConfigError, match="no train prompt has two completions that fit"):
        prepare(small_config(*tight), "scored")
    run.config.training.max_gen_len, run.config.training.max_seq_length = 1000, len(groups[0].problem.prompt_ids) + 1
    assert not given_groups(*arguments)[0].episodes


@pytest.mark.parametrize(
    "override", ["training.importance_cap=2", "training.seed_grpo_alpha=1", "training.old_logprobs=sampler",
                 "training.anchor=rollout", "training.zero_truncated_rewards=true"])  # fmt: skip
def test_keys_about_the_policy_that_sampled_are_refused_where_none_did(tmp_path, override):
    file = tmp_path / "scored.jsonl"
    rows = [{"prompt": f"{n}", "completions": [{"text": "1", "score": 0}, {"text": "2", "score": 1}]} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name} is about the policy that sampled"):
        prepare(small_config(f"data.path={file}", "training.old_logprobs=trainer", override), "scored")


def test_dropout_of_an_adapter_is_on_in_the_update_alone_and_the_same_when_a_step_is_done_again(tmp_path):
    lora = ["lora.r=4", "training.minibatches=1"]
    runs = [prepare(small_config(*lora, f"lora.dropout={p}"), "countdown") for p in (0.0, 0.5, 0.5)]
    groups, moved = [], []
    for run in runs:
        with torch.no_grad():  # an adapter at zero has no gradient in its first matrix
            for name, parameter in run.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.02)
        sampled = sample(run, questions_of_step(run, 1), 4, 1.0, stream=1)
        groups.append([e.token_ids for g in sampled for e in g.episodes])
        before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
        torch.manual_seed(len(moved))  # whatever the state of torch's own generator is
        update(run, add_advantages(sampled, run.config.training), step=1)
        after = dict(run.model.named_parameters())
        moved.append(torch.cat([(after[name] - value).flatten() for name, value in before.items()]))
    assert groups[0] == groups[1] == groups[2], "no dropout in the rollout"
    assert torch.equal(moved[1], moved[2]) and not torch.equal(moved[0], moved[1])


def test_seed_grpo_reads_answers_as_the_task_does():
    run = prepare(small_config("training.seed_grpo_alpha=1", "training.eval_interval=0"), "countdown")
    asked = []
    run.task.answer_of = lambda text: asked.append(text) or text
    train_step(run, 1)
    assert len(asked) == 24, "every completion of the step"
