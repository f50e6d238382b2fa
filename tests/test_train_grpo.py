"""The loop: one denominator, resuming, what a run leaves behind, and that it learns."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from src.commands import run_evaluation
from src.config import ConfigError, RunError, Stopped, load_config
from src.prepare import prepare
from src.run.reading import read_rows
from src.train_grpo import (
    evaluate,
    learning_rate_at,
    next_problems,
    run_training,
    train_step,
    update,
    with_advantages,
)

CONFIGS = Path(__file__).parent.parent / "configs" / "configs_tiny"
NAME = "config_kl_beta0.04_tiny"
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


def small_config(*overrides: str, name: str = NAME):
    return load_config(CONFIGS / f"{name}.yaml", [*SMALL, *overrides])


def weights_of(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


# ---- One step


def test_metrics_are_of_the_whole_step_and_a_gradient_that_is_not_finite_is_skipped_and_counted():
    run = prepare(small_config("training.minibatches=1", "training.learning_rate=1e-9"), "countdown")
    with torch.no_grad():  # away from the reference, so that the penalty has a gradient
        for parameter in run.engine.model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    groups = with_advantages(run.sample(next_problems(run, 6), 8, 1, 1.6), run.config.training)
    assert any(g.teaches() for g in groups) and len({e.length for g in groups for e in g.episodes}) > 3
    before, results = {name: value.clone() for name, value in run.engine.model.state_dict().items()}, []
    for size in (2, 1000):
        run.engine.limit = replace(run.engine.limit, completions=size, tokens=None)
        results.append(update(run, groups, step=2))
        run.engine.model.load_state_dict(before)
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-3, abs=1e-6), name
    episodes = tuple(replace(e, advantages=(math.nan,) * e.length) for e in groups[0].episodes)
    metrics = update(run, [replace(groups[0], episodes=episodes), *groups[1:]], step=1)
    assert (results[0]["train/skipped_updates"], metrics["train/skipped_updates"]) == (0, 1)
    assert all(torch.equal(before[name], value) for name, value in run.engine.model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "moves"),
    [((), False), (("training.reference_sync_steps=1",), True), (("training.anchor=rollout",), True)],
)
def test_the_anchor_follows_when_told_to(overrides, moves):
    run = prepare(small_config("training.loss_type=approx_kl", *overrides), "countdown")
    initial = weights_of(run.engine.anchor)
    train_step(run, 1)
    assert not torch.equal(weights_of(run.engine.model), weights_of(run.engine.anchor)), "the policy moved"
    train_step(run, 2)
    assert torch.equal(initial, weights_of(run.engine.anchor)) != moves


def test_every_problem_comes_once_an_epoch_in_a_new_order():
    run = prepare(small_config("data.train_size=18"), "countdown")
    epochs = [[p.index for step in range(3 * e + 1, 3 * e + 4) for p in next_problems(run, 6)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(18)) and epochs[0] != epochs[1]


def test_learning_rate_schedules_by_hand():
    training = small_config("training.warmup_steps=2", "training.learning_rate=1.0").training
    rates = [learning_rate_at(step, 6, training) for step in range(1, 7)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    linear = replace(training, lr_schedule="linear")
    assert [learning_rate_at(s, 6, linear) for s in range(1, 7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate_at(5, 6, replace(training, lr_schedule="cosine")) == pytest.approx(0.5)


def test_maxent_without_a_reference_weight_trains_and_seed_grpo_reads_answers_as_the_task_does():
    overrides = ("training.beta=0", "training.eval_interval=0")
    run = prepare(small_config(*overrides, name="config_maxent_tau0.1_beta0.04_tiny"), "countdown")
    assert train_step(run, 1)[0]["train/grad_norm"] > 0
    run = prepare(small_config("training.seed_grpo_alpha=1", *overrides), "countdown")
    asked = []
    run.task.answer_of = lambda text: asked.append(text) or text
    train_step(run, 1)
    assert len(asked) == 24, "every completion of the step"


ONE_OF_EACH_KIND = ["maxent", "listwise_kl", "{kl: 0.02, ot: 0.1}"]
ALL_ALONE = [pytest.param(name, marks=pytest.mark.slow) for name in ("none", "kl", "approx_kl", "ot")]


@pytest.mark.parametrize("loss_type", [*ONE_OF_EACH_KIND, *ALL_ALONE])
def test_every_loss_type_trains_on_the_embedded_model(loss_type):
    """A few steps at the real settings, smaller: the sampled reward rises, and no number is missing or infinite."""
    overrides = [
        f"training.loss_type={loss_type}",
        "training.batch_size=128",
        "training.num_questions_per_batch=16",
        "training.learning_rate=1e-3" if loss_type == "listwise_kl" else "training.learning_rate=6e-4",
        "training.minibatches=2",
        "data.eval_size=64",
        "data.train_size=16",
    ]
    run = prepare(load_config(CONFIGS / "config_none_tiny.yaml", overrides), "countdown")
    rewards = []
    for step in range(1, 9):
        run.engine.begin(step)
        metrics, groups = train_step(run, step)
        assert all(math.isfinite(value) for value in metrics.values())
        answers = [e.reward_parts["answer"] for g in groups for e in g.episodes]
        rewards.append(sum(answers) / len(answers))
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1


# ---- A run and its folder


def folder_of(work_dir: Path, name: str = NAME, dataset: str = "countdown") -> Path:
    return work_dir / "runs" / f"{name}_{dataset}"


EVERYTHING = (
    "training.dynamic_sampling=2", "training.curriculum=true", "training.retire_solved=0.99", "data.train_size=30",
    "training.entropy_target=0.5", "training.top_entropy_quantile=0.5", "training.overlong_buffer=8",
    "training.mismatch_mask=2", "training.old_logprobs=trainer", "training.loss_type={kl: 0.04, kl_in_reward: 0.05}",
    "training.loss_agg=prompt", "training.baseline=leave_one_out",
)  # fmt: skip


TURNS = ("data.task_file=examples/second_attempt.py", "model.pretrained_model_path=models/turns-tiny",
         "training.max_gen_len=72", "data.max_turns=2")  # fmt: skip


@pytest.mark.parametrize(
    "dataset, overrides",
    [
        pytest.param("countdown", (), id="plain", marks=pytest.mark.slow),
        pytest.param("countdown", EVERYTHING, id="everything"),
        pytest.param("second_attempt", (*EVERYTHING, *TURNS), id="everything in two turns"),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, dataset, overrides):
    whole = run_training(small_config(*overrides), dataset, tmp_path / "whole")
    run_training(small_config(*overrides, "training.max_steps=2"), dataset, tmp_path / "parts")
    assert whole == run_training(small_config(*overrides), dataset, tmp_path / "parts")
    folders = [folder_of(tmp_path / name, dataset=dataset) for name in ("whole", "parts")]
    states = [AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in folders]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    rows = [read_rows(folder / "metrics.jsonl") for folder in folders]
    assert [row["step"] for row in rows[1]] == [0, 1, 2, 3, 4]
    for one, other in zip(*rows, strict=True):
        timed = {name for name in one if name.startswith(("time/", "memory/")) or "per_second" in name}
        assert {n: v for n, v in one.items() if n not in timed} == {n: v for n, v in other.items() if n not in timed}


MOVING = {
    "config_maxent_tau0.1_beta0.04_tiny": (["training.tau_target_entropy=2.05", "training.tau_lr=0.5"], "tau", 0.1),
    "config_kl_beta0.04_tiny": (["training.beta_kl_target=1e-6"], "beta", 0.04),
}


@pytest.mark.parametrize("name", MOVING)
def test_controllers_move_tau_and_beta_and_survive_a_restart(tmp_path, name):
    """The run that was interrupted ends with the same value as the whole one."""
    (moving, value, start), states = MOVING[name], []
    for part, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for steps in lengths:
            config = small_config(*moving, f"training.max_steps={steps}", name=name)
            run_training(config, "countdown", tmp_path / part)
        folder = folder_of(tmp_path / part, name)
        states.append(torch.load(folder / "checkpoints" / "step_000004" / "training_state.pt")["state"]["controllers"])
        last = read_rows(folder / "metrics.jsonl")[-1]
        assert states[-1][value] == last[{"tau": "maxent/tau", "beta": "train/beta"}[value]] > start
    assert states[0] == states[1]


def test_a_value_in_run_state_survives_a_stop_as_of_the_last_finished_step(tmp_path):
    """Also where the step in progress had changed it: a number, and a list that is changed in place."""

    def go_on(stop_in: int) -> dict:
        overrides = ["training.eval_interval=0", "training.eval_first=false", "data.eval_size=1", "data.eval_samples=1"]
        run = prepare(small_config(*overrides), "countdown", tmp_path)
        run.state |= {"curriculum": 1.0, "seen": []}
        with run.opened():
            found = dict(run.state)
            for step in run.steps(evaluate):
                run.state["curriculum"] *= 2
                run.state["seen"].append(step)
                if step == stop_in:
                    raise Stopped(130)
                run.record(*train_step(run, step))
        return found

    with pytest.raises(Stopped):
        go_on(stop_in=2)
    with pytest.raises(Stopped):
        go_on(stop_in=4)
    found = go_on(stop_in=0)
    assert (found["curriculum"], found["seen"][:3]) == (8.0, [1, 2, 3])
    assert torch.load(folder_of(tmp_path) / "checkpoints/step_000004/training_state.pt")["state"]["seen"] == [
        1,
        2,
        3,
        4,
    ]


def test_a_run_folder_holds_what_the_readme_says(tmp_path, capsys):
    config = small_config("training.max_steps=2")
    run_training(config, "countdown", tmp_path)
    folder = folder_of(tmp_path)
    for name in ("config.yaml", "training.log", "metrics.jsonl", "tb", "checkpoints/step_000002", "final/config.json"):
        assert (folder / name).exists(), name
    rows = read_rows(folder / "metrics.jsonl")
    evaluation = {"eval/greedy", "eval/pass@1", "eval/pass@2", "eval/reward/format", "eval/length"}
    assert evaluation <= set(rows[0]) and evaluation <= set(rows[2]) and not evaluation & set(rows[1])
    assert {
        "step", "train/reward", "reward/answer", "reward/format", "train/entropy", "train/loss", "train/policy_loss",
        "penalty/kl", "train/grad_norm", "train/learning_rate", "train/clip_fraction", "train/groups_without_variance",
        "train/kl", "train/kl_k1", "train/kl_k3", "rollout/length", "rollout/finished", "rollout/mismatch",
        "rollout/tokens_per_second", "rewards/errors", "time/rollout", "time/update",
    } <= set(rows[1])  # fmt: skip
    assert rows[1]["rollout/mismatch"] < 1e-4
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    run_training(config, "countdown", tmp_path)  # the same command again
    assert "is complete" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before
    other = small_config("training.max_steps=2", "training.beta=0.5")
    with pytest.raises(ConfigError) as refusal:
        run_training(other, "countdown", tmp_path)
    message = str(refusal.value)
    assert "was made with training.beta = 0.04, this config says 0.5; use --name" in message and "--fresh" in message
    other.name = "stronger"
    run_training(other, "countdown", tmp_path)
    assert folder_of(tmp_path, "stronger").exists() and (folder / "metrics.jsonl").read_bytes() == before
    other.training.beta = 0.6
    with pytest.raises(ConfigError, match=r"stronger_countdown was made with .*--name .*--fresh"):
        run_training(other, "countdown", tmp_path)
    run_training(config, "countdown", tmp_path, fresh=True)
    assert (folder.parent / f"{folder.name}.1" / "metrics.jsonl").read_bytes() == before


# ---- Evaluation


def test_evaluations_in_between_take_fewer_samples_and_the_first_can_be_left_out(tmp_path):
    overrides = ["training.eval_first=false", "training.eval_interval=1", "training.max_steps=2", "data.eval_size=2"]
    config = small_config(*overrides, "data.eval_samples=4", "data.eval_samples_between=2")
    run_training(config, "countdown", tmp_path)
    rows = {row["step"]: set(row) for row in read_rows(folder_of(tmp_path) / "metrics.jsonl")}
    assert [step for step, names in rows.items() if "eval/greedy" in names] == [1, 2]
    assert "eval/pass@2" in rows[1] and "eval/pass@4" not in rows[1] and "eval/pass@4" in rows[2]


def test_evaluation_is_the_same_each_time_and_leaves_a_report(tmp_path):
    config = small_config()
    metrics = run_evaluation(config, "countdown", tmp_path)
    assert metrics == run_evaluation(config, "countdown", tmp_path)
    folder = tmp_path / "runs" / f"{NAME}_countdown_eval"
    assert {path.name for path in folder.iterdir()} == {".lock", "report.json", "completions.jsonl"}
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"] == metrics and report["about"]["config"]["training"]["temperature"] == 1.0
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for kind, number in (("greedy", 8), ("sampled", 16)):
        answers = [row["parts"]["answer"] for row in rows if row["kind"] == kind]
        assert len(answers) == number
        assert sum(answers) / number == pytest.approx(metrics["eval/greedy" if kind == "greedy" else "eval/pass@1"])


def test_evaluation_by_hand():
    run = prepare(small_config("data.eval_size=10"), "countdown")
    metrics = evaluate(run, 4)
    correct = [sum(e.reward_parts["answer"] for e in g.episodes) for g in run.sample(run.eval_problems, 4, -1)]
    assert metrics["eval/pass@1"] == pytest.approx(sum(correct) / 40)
    assert metrics["eval/pass@4"] == pytest.approx(sum(c > 0 for c in correct) / 10)


# ---- Completions from a file


def scored_config(tmp_path: Path, rows: list[dict], *overrides: str):
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = f"data.path={tmp_path / 'scored.jsonl'}"
    return small_config(path, "training.old_logprobs=trainer", "training.minibatches=1", *overrides)


def test_groups_of_a_file_are_cut_by_nothing_but_the_limits(tmp_path):
    texts = ["1 + 2", "3", "4 - 1 + 0 * 7"]
    rows = []
    for number in range(1, 13):
        scores = [99, *(number + 0.5 + number % 2 for _ in texts)]
        given = [{"text": t, "score": s} for t, s in zip(texts[: 2 + number % 2], scores, strict=False)]
        rows.append({"prompt": f"{number}", "nums": [number, 2], "target": number, "completions": given})
    run = prepare(scored_config(tmp_path, rows), "scored")
    assert len(run.train_problems) + len(run.eval_problems) == 12 and run.eval_problems
    given_groups = partial(run.sample, run.train_problems, 0, 1)
    groups, tokenizer, training = given_groups(), run.engine.tokenizer, run.config.training
    for group in groups:
        given = group.problem.row["completions"]
        assert [e.text for e in group.episodes] == [item["text"] for item in given]
        assert [e.reward for e in group.episodes] == [item["score"] for item in given]
        assert [e.reward_parts["answer"] for e in group.episodes] == [1.0] + [0.0] * (len(given) - 1)
        for episode in group.episodes:
            assert episode.token_ids[-1] == tokenizer.eos_token_id and episode.finished and episode.logprobs == ()
            assert tokenizer.decode(episode.token_ids[:-1]) == episode.text
    for group in with_advantages(groups, training):  # groups of two and of three: mean 0, variance 1, each by itself
        advantages = torch.tensor([e.advantages[0] for e in group.episodes])
        assert advantages.mean().abs() < 1e-6 and advantages.std(correction=0) == pytest.approx(1)
    training.max_gen_len = max(e.length for g in groups for e in g.episodes) - 1
    kept = [e.text for g in given_groups() for e in g.episodes]
    assert kept and texts[2] not in kept and set(kept) == set(texts[:2])
    training.max_gen_len, training.max_seq_length = 1000, len(groups[0].problem.prompt_ids) + 1
    assert not given_groups()[0].episodes
    with pytest.raises(ConfigError, match="no train prompt has two completions that fit"):
        prepare(scored_config(tmp_path, rows, "training.max_gen_len=1"), "scored")


@pytest.mark.parametrize(
    "override", ["training.importance_cap=2", "training.seed_grpo_alpha=1", "training.old_logprobs=sampler",
                 "training.anchor=rollout", "training.zero_truncated_rewards=true", "training.mismatch_mask=2",
                 "training.overlong_buffer=2", "training.dynamic_sampling=1", "training.retire_solved=0.9",
                 "training.curriculum=true", "training.scale_rewards=parts"])  # fmt: skip
def test_keys_about_the_policy_that_sampled_are_refused_where_none_did(tmp_path, override):
    rows = [{"prompt": f"{n}", "completions": [{"text": "1", "score": 0}, {"text": "2", "score": 1}]} for n in range(9)]
    with pytest.raises(ConfigError, match=f"{override.partition('=')[0]} is about the policy that sampled"):
        prepare(scored_config(tmp_path, rows, override), "scored")


def test_dropout_of_an_adapter_is_on_in_the_update_alone_and_the_same_when_a_step_is_done_again():
    sampled, moved = [], []
    for dropout in (0.0, 0.5, 0.5):
        run = prepare(small_config("lora.r=4", "training.minibatches=1", f"lora.dropout={dropout}"), "countdown")
        parameters = {name: p for name, p in run.engine.model.named_parameters() if p.requires_grad}
        with torch.no_grad():  # an adapter at zero has no gradient in its first matrix
            for name, parameter in parameters.items():
                if "lora_B" in name:
                    parameter.fill_(0.02)
        groups = run.sample(next_problems(run, 6), 4, 1)
        sampled.append([e.token_ids for g in groups for e in g.episodes])
        before = torch.cat([p.detach().flatten().clone() for p in parameters.values()])
        torch.manual_seed(len(moved))  # whatever the state of torch's own generator is
        run.engine.begin(1)
        update(run, with_advantages(groups, run.config.training), step=1)
        moved.append(torch.cat([p.detach().flatten() for p in parameters.values()]) - before)
    assert sampled[0] == sampled[1] == sampled[2], "no dropout in the rollout"
    assert torch.equal(moved[1], moved[2]) and not torch.equal(moved[0], moved[1])


def test_what_could_not_be_read_back_is_refused_when_it_is_put_into_run_state(tmp_path):
    import numpy as np

    for value in (np.float64(1.0), [np.zeros(2)], {"x": object()}):
        run = prepare(small_config(), "countdown", tmp_path)
        run.state["mine"] = value
        with pytest.raises(RunError, match=r"run.state\['mine'\] cannot be saved; use numbers"), run.opened():
            pass
