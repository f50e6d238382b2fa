"""What goes wrong in the middle of a run, in memory, gradients or by signals: nothing is lost by it."""

import json
import signal
import traceback
from pathlib import Path

import pytest
import torch

from src import train_grpo
from src.checkpoint import newest_checkpoint
from src.config import ConfigError, RunError, load_config
from src.memory import longest_microbatch, preflight
from src.offline import given_groups
from src.stop import StopSignal
from src.train_grpo import prepare, questions_of_step, run_training, sample, update

CONFIG = Path(__file__).parent.parent / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SMALL = [
    "training.batch_size=16", "training.num_questions_per_batch=4", "training.max_gen_len=24", "data.eval_size=4",
    "data.train_size=16", "data.eval_samples=1", "training.max_steps=3", "training.eval_interval=0",
]  # fmt: skip


def config_with(*overrides: str):
    return load_config(CONFIG, [*SMALL, *overrides])


def weights_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture
def memory_for(monkeypatch):
    """Scoring more tokens than given runs out of memory; returns the sizes of the batches that were tried."""
    tried, real = [], train_grpo.score

    def limit(tokens: int, error=torch.OutOfMemoryError) -> list[int]:
        def score(model, batch, *rest):
            tried.append(batch.input_ids.shape[1])
            if tried[-1] > tokens:
                raise error("CUDA out of memory. Tried to allocate 20.00 MiB\nmore lines")
            return real(model, batch, *rest)

        monkeypatch.setattr(train_grpo, "score", score)
        return tried

    return limit


@pytest.mark.parametrize("size", ["micro_batch_size=16", "max_tokens_per_microbatch=10000"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_an_update_that_runs_out_of_memory_is_done_again_in_smaller_parts(memory_for, size, error):
    gradients = []
    for limited in (False, True):
        run = prepare(config_with(f"training.{size}", "training.entropy_coef=0.1"), "countdown")
        groups = train_grpo.add_advantages(sample(run, questions_of_step(run, 1), 4, 1.0, 1), run.config.training)
        run.optimizer = torch.optim.SGD(run.model.parameters(), 1.0)
        run.config.training.learning_rate = 1.0
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        tried = memory_for(60, error) if limited else []
        metrics = update(run, groups, step=1)
        moved = [b - a.detach() for b, a in zip(before, run.model.parameters(), strict=True)]
        gradients.append((moved, metrics))
    assert tried[0] > 60 and max(tried[-2:]) <= 60, "it was too much at first and then fitted"
    for whole, parts in zip(gradients[0][0], gradients[1][0], strict=True):
        torch.testing.assert_close(whole, parts, atol=2e-6, rtol=1e-4)
    for name, value in gradients[0][1].items():
        assert gradients[1][1][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_the_longest_microbatch_is_tried_before_the_first_step_and_cut_smaller_if_it_does_not_fit(memory_for, tmp_path):
    config = config_with("training.max_tokens_per_microbatch=400", "training.max_prompt_len=60", "training.max_steps=1")
    tried = memory_for(250)
    run_training(config, "countdown", tmp_path)
    # 4 completions of 24 tokens after a prompt of 60, twice: the budget is 400, but two passes hold all four groups
    assert tried[0] == 2 * (60 + 4 * 24) and tried[1] <= tried[0] // 2
    assert max(tried[1:]) <= 250
    log = next(tmp_path.glob("runs/*/training.log")).read_text(encoding="utf-8")
    order = [
        "trying the longest micro-batch: 312",
        "done again with",
        "the update needs about",
        "evaluating 4 problems",
    ]
    places = [log.index(part) for part in order]
    assert places == sorted(places)


def test_the_largest_groups_of_an_update_come_first(memory_for):
    run = prepare(
        config_with(
            "training.loss_type=listwise_kl",
            "training.max_tokens_per_microbatch=1",
            "training.entropy_coef=0.1",
            "training.minibatches=1",  # one update with all groups of the step
        ),
        "countdown",
    )
    groups = train_grpo.add_advantages(sample(run, questions_of_step(run, 1), 4, 1.0, 1), run.config.training)
    groups.sort(key=lambda group: group.tokens())  # the wrong way round
    sizes = [group.tokens() for group in groups]
    assert sizes[0] < sizes[-1]
    tried = memory_for(10**9)
    update(run, groups, 1)
    assert tried == sorted(sizes, reverse=True)


def test_the_trial_before_the_first_step_leaves_no_trace():
    run = prepare(config_with("training.entropy_coef=0.1", "training.max_tokens_per_microbatch=320"), "countdown")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    random = torch.get_rng_state()
    passes = []

    def backward(groups):
        passes.append([len(group.episodes) for group in groups])
        return train_grpo.backward(run, groups, run.config.training, True, use_anchor=True, stoppable=True)

    preflight(run, backward)
    assert passes == [[4, 4]]
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert torch.equal(random, torch.get_rng_state()) and not run.optimizer.state


def test_a_file_of_scores_is_tried_with_its_longest_groups(tmp_path):
    rows = [
        {
            "prompt": f"{n}",
            "nums": [n, 2],
            "target": n,
            "completions": [{"text": "1" * n, "score": 1}, {"text": "2", "score": 0}],
        }
        for n in range(1, 17)
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data.train_size=12", "training.old_logprobs=trainer"]
    run = prepare(config_with(f"data.path={tmp_path / 'scored.jsonl'}", *settings), "scored")
    everything = given_groups(run.train_problems, run.tokenizer, run.eos_ids, run.config.training)
    sizes = sorted((group.tokens() for group in everything), reverse=True)
    assert [group.tokens() for group in longest_microbatch(run)] == sizes[:4] and sizes[0] > sizes[-1]


def test_an_evaluation_that_runs_out_of_memory_is_done_again_in_smaller_parts(memory_for, tmp_path):
    """--eval_only on a file of scores: a run without an optimizer scores the completions too."""
    completions = [{"text": "7 + 8 - " * count + "1", "score": count} for count in (1, 2, 3)]
    rows = [{"prompt": f"{n}", "nums": [n, 2], "target": n, "completions": completions} for n in range(1, 31)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_with(f"data.path={tmp_path / 'scored.jsonl'}", "training.old_logprobs=trainer")
    run = prepare(config, "scored", for_training=False)
    whole = train_grpo.evaluate(run)
    tried = memory_for(60)
    assert train_grpo.evaluate(run) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert tried[0] > 60 and tried[-1] <= 60, "it was too much at first and then fitted"


def test_memory_that_does_not_suffice_for_one_completion_is_an_error_that_says_so(memory_for):
    run = prepare(config_with(), "countdown")
    groups = train_grpo.add_advantages(sample(run, questions_of_step(run, 1), 4, 1.0, 1), run.config.training)
    tried = memory_for(0)
    with pytest.raises(ConfigError, match=r"a single completion .CUDA out of memory.*lower training.max_gen_len"):
        update(run, groups, step=1)
    assert len(tried) <= 6, "halved each time"


def test_another_error_in_the_update_is_not_taken_for_memory(memory_for, monkeypatch):
    def score(*arguments):
        raise RuntimeError("shapes do not match")

    run = prepare(config_with(), "countdown")
    groups = train_grpo.add_advantages(sample(run, questions_of_step(run, 1), 4, 1.0, 1), run.config.training)
    monkeypatch.setattr(train_grpo, "score", score)
    with pytest.raises(RuntimeError, match=r"shapes"):
        update(run, groups, step=1)


def poison(monkeypatch, steps: set[int]) -> None:
    """The loss of these steps is not a number."""
    real, step_of_update = train_grpo.loss_of_microbatch, {}
    real_update = train_grpo.update

    def remembering(run, groups, step):
        step_of_update["now"] = step
        return real_update(run, groups, step)

    def loss(*arguments):
        value, *rest = real(*arguments)
        return (value * float("nan") if step_of_update.get("now") in steps else value, *rest)

    monkeypatch.setattr(train_grpo, "update", remembering)
    monkeypatch.setattr(train_grpo, "loss_of_microbatch", loss)


def test_a_step_without_a_finite_gradient_is_skipped_counted_and_kept_to_look_at(tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    run_training(config_with("training.minibatches=1"), "countdown", tmp_path)
    folder = next((tmp_path / "runs").iterdir())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("train/skipped_updates") for row in rows] == [None, 0, 1, 0]
    (kept,) = (folder / "bad_steps").iterdir()
    episodes = [json.loads(line) for line in kept.read_text().splitlines()]
    assert kept.name == "step_000002.jsonl" and len(episodes) == 16
    assert all(e["text"] is not None and len(e["token_ids"]) == len(e["logprobs"]) for e in episodes)
    assert all(tensor.isfinite().all() for tensor in weights_of(folder).values())


def test_bad_steps_in_a_row_stop_the_run_with_a_good_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4, 5})
    config = config_with("training.max_steps=6", "training.max_bad_steps=3")
    with pytest.raises(RunError, match=r"3 steps in a row had no finite gradient.*saved as step 4.*learning_rate"):
        run_training(config, "countdown", tmp_path)
    monkeypatch.undo()
    folder = next((tmp_path / "runs").iterdir())
    assert newest_checkpoint(folder / "checkpoints").name == "step_000004"
    run_training(config, "countdown", tmp_path)  # and goes on from it
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    assert all(tensor.isfinite().all() for tensor in weights_of(folder).values())


@pytest.mark.parametrize(("where", "call"), [("rollout", 9), ("update", 4)])  # each in the middle of step 2 or 3
def test_a_signal_leaves_the_step_in_progress_and_the_run_goes_on_bit_for_bit(tmp_path, monkeypatch, where, call):
    config = config_with(
        "training.ckpt_save_interval=0", "training.minibatches=1", "training.max_tokens_per_microbatch=150"
    )
    run_training(config, "countdown", tmp_path / "whole")
    calls, real = {"rollout": 0, "update": 0}, StopSignal.check

    def check(self):
        names = {frame.name for frame in traceback.extract_stack()}
        if "train_step" in names:
            calls["update"] += "backward" in names
            calls["rollout"] += "rollout" in names
        if calls[where] == call:
            signal.raise_signal(signal.SIGINT)
        return real(self)

    monkeypatch.setattr(StopSignal, "check", check)
    with pytest.raises(SystemExit) as stop:
        run_training(config, "countdown", tmp_path / "cut")
    assert stop.value.code == 128 + signal.SIGINT
    monkeypatch.undo()
    saved = newest_checkpoint(next((tmp_path / "cut" / "runs").iterdir()) / "checkpoints")
    assert saved is not None and saved.name in ("step_000001", "step_000002")
    run_training(config, "countdown", tmp_path / "cut")
    whole, cut = (weights_of(next((tmp_path / name / "runs").iterdir())) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_same_config_and_seed_twice_give_the_same_weights_and_another_seed_others(tmp_path):
    overrides = {"first": [], "second": [], "other": ["training.random_seed=5"]}
    for name, more in overrides.items():
        torch.manual_seed(len(name))  # whatever ran before in this process
        run_training(config_with(*more), "countdown", tmp_path / name)
    first, second, other = (weights_of(next((tmp_path / name / "runs").iterdir())) for name in overrides)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def cut_in_evaluation(monkeypatch, number: int) -> None:
    """SIGTERM in the middle of the evaluation with this number, from 1."""
    calls, real_evaluate, real_check = {"evaluations": 0, "inside": False}, train_grpo.evaluate, StopSignal.check

    def evaluate(run, *rest):
        calls["evaluations"] += 1
        calls["inside"] = True
        try:
            return real_evaluate(run, *rest)
        finally:
            calls["inside"] = False

    def check(self):
        if calls["inside"] and calls["evaluations"] == number:
            signal.raise_signal(signal.SIGTERM)
        return real_check(self)

    monkeypatch.setattr(train_grpo, "evaluate", evaluate)
    monkeypatch.setattr(StopSignal, "check", check)


def rows_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = next((folder / "runs").iterdir()).joinpath("metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = ("time/", "memory/", "tokens_per_second")
    return [{n: v for n, v in json.loads(line).items() if not any(word in n for word in timed)} for line in lines]


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_signal_in_an_evaluation_keeps_the_steps_and_nothing_differs_afterwards(tmp_path, monkeypatch, evaluation):
    config = config_with("training.ckpt_save_interval=0", "training.eval_interval=2", "training.max_steps=4")
    run_training(config, "countdown", tmp_path / "whole")
    cut_in_evaluation(monkeypatch, evaluation)
    with pytest.raises(SystemExit) as stop:
        run_training(config, "countdown", tmp_path / "cut")
    assert stop.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    saved = newest_checkpoint(next((tmp_path / "cut" / "runs").iterdir()) / "checkpoints")
    assert (saved.name if saved else None) == {1: None, 2: "step_000002", 3: "step_000004"}[evaluation]
    run_training(config, "countdown", tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    whole, cut = (weights_of(next((tmp_path / name / "runs").iterdir())) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_error_in_a_rollout_keeps_the_steps_before_it_and_its_advice_can_be_followed(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "calls = 0\n\n\ndef moody(completions, **columns):\n    global calls\n    calls += 1\n"
        "    if calls == 6:\n        raise ValueError('no mood')\n    return [0.0] * len(completions)\n"
    )
    overrides = ["training.ckpt_save_interval=0", "training.max_steps=6", f"data.reward_functions={file}:moody"]
    with pytest.raises(ConfigError, match=r"moody.*no mood.*on_reward_error: zero"):
        run_training(config_with(*overrides, "data.on_reward_error=stop"), "countdown", tmp_path)
    saved = newest_checkpoint(next((tmp_path / "runs").iterdir()) / "checkpoints")
    assert saved.name == "step_000002", "one call in prepare, two in the first evaluation, two steps"
    run_training(config_with(*overrides, "data.on_reward_error=zero"), "countdown", tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(7))


def test_old_log_probs_that_run_out_of_memory_are_computed_again_in_smaller_parts(memory_for):
    run = prepare(config_with("training.micro_batch_size=16"), "countdown")
    groups = sample(run, questions_of_step(run, 1), 4, 1.0, 1)
    whole = train_grpo.add_old_logprobs(run, groups)
    tried = memory_for(90)
    parts = train_grpo.add_old_logprobs(run, groups)
    assert tried[0] > 90 >= tried[-1]
    for before, after in zip(whole, parts, strict=True):
        for a, b in zip(before.episodes, after.episodes, strict=True):
            assert a.old_logprobs == pytest.approx(b.old_logprobs, abs=1e-5)


def test_a_broken_gpu_is_not_taken_for_one_that_is_full(memory_for, monkeypatch):
    def score(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    run = prepare(config_with(), "countdown")
    groups = train_grpo.add_advantages(sample(run, questions_of_step(run, 1), 4, 1.0, 1), run.config.training)
    monkeypatch.setattr(train_grpo, "score", score)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        update(run, groups, step=1)


def test_a_second_evaluation_keeps_the_report_of_the_first(tmp_path):
    for _ in range(2):
        train_grpo.run_evaluation(config_with(), "countdown", tmp_path)
    reports = sorted(path.parent.name for path in tmp_path.glob("runs/*/report.json"))
    assert len(reports) == 2 and reports[1] == reports[0] + ".1"


def test_a_complete_run_is_pushed_when_the_hub_is_asked_for_afterwards(tmp_path, monkeypatch):
    run_training(config_with(), "countdown", tmp_path)
    pushed = []
    monkeypatch.setattr(train_grpo, "push_final", lambda folder, *rest: pushed.append(folder.name) or "there")
    monkeypatch.setattr("src.prepare.check_hub", lambda hub: None)
    run_training(config_with("hub.push_to_hub=true", "hub.hub_model_id=a/b"), "countdown", tmp_path)
    assert pushed == ["final"]


def test_an_adapter_given_as_a_model_is_one_sentence(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is a LoRA adapter; set lora.path to it"):
        prepare(config_with(f"model.pretrained_model_path={tmp_path}"), "countdown")


def test_a_model_of_the_hub_is_loaded_into_models_once_and_half_a_download_is_none(tmp_path, monkeypatch):
    import shutil

    from src import models

    calls = []

    def snapshot_download(path, local_dir, **options):
        calls.append(path)
        shutil.copytree(CONFIG.parent.parent.parent / "models" / "countdown-tiny", local_dir, dirs_exist_ok=True)
        if len(calls) == 1:
            raise ConnectionError("gone")

    monkeypatch.setattr(models, "PROJECT_FOLDER", tmp_path)
    monkeypatch.setattr(models, "snapshot_download", snapshot_download)
    monkeypatch.setattr(models.HfApi, "model_info", lambda self, path, timeout: None)
    config = config_with("model.pretrained_model_path=some/model")
    with pytest.raises(ConfigError, match="some/model cannot be loaded; check the name and the network"):
        prepare(config, "countdown")
    for _ in range(2):
        assert prepare(config, "countdown").train_problems
    assert calls == ["some/model"] * 2 and (tmp_path / "models" / "some" / "model" / "config.json").is_file()
