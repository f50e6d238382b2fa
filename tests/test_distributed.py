"""2 and 4 processes do what one does: gradients, weights, controllers, checkpoints; and what happens when one dies."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import pytest
import torch
from safetensors.torch import load_file

from src import distributed, sharding
from src.config import ConfigError, load_config
from src.distributed import AloneError, Nothing, from_main, gather, on_main, share, together, total
from src.packing import Episode, Group
from src.rl_datasets import Problem
from src.storage import StorageError

PROJECT = Path(__file__).resolve().parent.parent
TINY = PROJECT / "configs" / "configs_tiny"
SMALL = ["model.dtype=float32", "data.train_size=64", "data.eval_size=5", "data.eval_samples=2",
         "training.num_questions_per_batch=6", "training.batch_size=24", "training.max_steps=5",
         "training.eval_interval=0", "training.ckpt_save_interval=3", "training.max_tokens_per_microbatch=400",
         "training.minibatches=2"]  # fmt: skip
# a reward scaled over the batch, a moving beta, a reference that is synchronised, several updates a rollout
HARD = [*SMALL, "training.scale_rewards=batch", "training.beta_kl_target=0.001", "training.beta_horizon=5",
        "training.reference_sync_steps=2", "training.inner_epochs=2"]  # fmt: skip
# passes of two completions: a single process differs by 2e-6 from itself when other rows share a matrix product
GRADIENT = [*HARD, "training.max_tokens_per_microbatch=60"]
WHOLE_GROUPS = [*SMALL, "training.max_tokens_per_microbatch=60"]
EXACT = [*SMALL, "model.dtype=bfloat16", "training.learning_rate=0.002"]  # of int16 corrections
TWO_BYTES = [*EXACT, "training.memory_efficient_adamw=true"]
LORA = [*SMALL, "lora.r=4", "lora.alpha=8"]


def config_file(loss_type: str) -> str:
    (file,) = TINY.glob(f"config_{loss_type}_*.yaml")
    return str(file)


def launch(count: int, tasks: list, folder: Path, **options) -> subprocess.Popen:
    """torchrun with the worker; its output goes to <folder>/output.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"tasks": tasks, "folder": str(folder)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
               distributed_worker.__file__, str(plan)]  # fmt: skip
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, **options)


def results(count: int, tasks: list, folder: Path) -> list[list]:
    """Per task what each process found."""
    process = launch(count, tasks, folder)
    assert process.wait(240) == 0, (folder / "output.txt").read_text()[-6000:]
    return [[torch.load(folder / f"task_{t}_rank_{r}.pt") for r in range(count)] for t in range(len(tasks))]


def distance(ours: dict, theirs: dict) -> float:
    """Relative, of all tensors together; a single one may differ by ten times as much, or the largest is returned."""
    assert ours.keys() == theirs.keys() and ours
    sizes = torch.stack([theirs[name].double().norm() for name in theirs])
    errors = torch.stack([(ours[name].double() - theirs[name].double()).norm() for name in theirs])
    return float(max(errors.norm() / sizes.norm(), (errors / sizes).max() / 10))


def final_weights(folder: Path) -> dict:
    (final,) = folder.glob("runs/*/final")
    (file,) = final.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What one process does."""
    folder = tmp_path_factory.mktemp("alone")
    kl = load_config(config_file("kl"), HARD)
    return {
        "folder": folder,
        "gradient": distributed_worker.gradient_of_a_step(load_config(config_file("kl"), GRADIENT)),
        "maxent": distributed_worker.gradient_of_a_step(load_config(config_file("maxent"), WHOLE_GROUPS)),
        "run": distributed_worker.train(kl, str(folder / "kl")),
        "lora": distributed_worker.train(load_config(config_file("kl"), LORA), str(folder / "lora")),
        "exact": distributed_worker.train(load_config(config_file("kl"), EXACT), str(folder / "exact")),
        "two_bytes": distributed_worker.train(load_config(config_file("kl"), TWO_BYTES), str(folder / "two_bytes")),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """What two processes do."""
    folder, kl = tmp_path_factory.mktemp("two"), config_file("kl")
    replicated = [*HARD, "training.parallel=replicate"]
    tasks = {
        "gradient": ["gradient", kl, GRADIENT, ""],
        "replicated gradient": ["gradient", kl, [*GRADIENT, "training.parallel=replicate"], ""],
        "maxent": ["gradient", config_file("maxent"), WHOLE_GROUPS, ""],
        "run": ["train", kl, HARD, str(folder / "run")],
        "replicated run": ["train", kl, replicated, str(folder / "replicated")],
        "lora": ["train", kl, LORA, str(folder / "lora")],
        "two_bytes": ["train", kl, TWO_BYTES, str(folder / "two_bytes")],
        "exact": ["train", kl, EXACT, str(folder / "exact")],
        "begun": ["train", kl, [*HARD, "training.max_steps=3"], str(folder / "begun")],
    }
    return dict(zip(tasks, results(2, list(tasks.values()), folder), strict=True)) | {"folder": folder}


def test_two_processes_have_the_gradient_of_one(alone, two):
    for name, expected in (("gradient", "gradient"), ("replicated gradient", "gradient"), ("maxent", "maxent")):
        for found in two[name]:
            assert distance(found, alone[expected]) < 1e-6


def test_two_processes_end_with_the_weights_of_one(alone, two):
    for name in ("run", "replicated run"):
        for found in two[name]:
            assert distance(found["weights"], alone["run"]["weights"]) < 1e-6
    assert distance(final_weights(two["folder"] / "run"), final_weights(alone["folder"] / "kl")) < 1e-6
    assert distance(two["lora"][1]["weights"], alone["lora"]["weights"]) < 1e-4  # these began at zero
    assert distance(final_weights(two["folder"] / "lora"), final_weights(alone["folder"] / "lora")) < 1e-4


def test_controllers_and_metrics_agree_on_all_ranks_and_with_one_process(alone, two):
    for name in ("run", "replicated run", "two_bytes"):
        first, second = two[name]
        assert first["controllers"] == second["controllers"] and first["last"] == second["last"]
        for metric, value in first["metrics"].items():
            if not metric.startswith(("time/", "memory/")) and "per_second" not in metric:
                assert value == second["metrics"][metric], metric
    expected, found = alone["run"], two["run"][0]
    assert found["controllers"]["beta"] != load_config(config_file("kl"), HARD).training.beta
    for name, value in expected["controllers"].items():
        assert found["controllers"][name] == (value if value is None else pytest.approx(value, rel=1e-4)), name
    same = {m for m in expected["metrics"] if m.startswith(("train/", "eval/", "rollout/length", "rollout/fin"))}
    assert same <= found["metrics"].keys() and "train/kl_k3" in same
    for metric in same:
        assert found["metrics"][metric] == pytest.approx(expected["metrics"][metric], rel=1e-3, abs=1e-6), metric


def movement(weights: dict) -> dict:
    """What training has added to the embedded model."""
    start = load_file(PROJECT / "models" / "countdown-tiny" / "model.safetensors")
    return {name: weights[name].float() - start[name].float() for name in start}


def test_bf16_does_nearly_what_one_process_does(alone, two):
    """The order of rounding and the blocks of 8-bit moments differ, so only nearly."""
    for name in ("two_bytes", "exact"):
        ours, theirs = movement(two[name][0]["weights"]), movement(alone[name]["weights"])
        assert all(float(change.norm()) > 0 for change in theirs.values() if change.dim() > 1)
        assert distance(ours, theirs) < 0.6, "1 would be no training at all"


def test_only_one_process_writes(two):
    (folder,) = (two["folder"] / "run").glob("runs/*")
    assert len(list((folder / "tb").iterdir())) == 1
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(6))
    assert (folder / "training.log").read_text().count("before training:") == 1
    output = (two["folder"] / "output.txt").read_text()
    assert output.count("\ncurves ") == 6, "one summary for each of the runs above"


def test_a_checkpoint_is_in_the_format_of_one_process(two):
    from transformers import AutoModelForCausalLM

    (final,) = (two["folder"] / "run").glob("runs/*/final")
    assert json.loads((final / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(final)
    assert distance(model.state_dict(), two["run"][0]["weights"]) == 0


def test_a_run_of_two_is_resumed_by_one_and_by_four(alone, two, tmp_path):
    begun, kl = two["folder"] / "begun", config_file("kl")
    for name in ("one", "four"):
        shutil.copytree(begun, tmp_path / name)
    one = distributed_worker.train(load_config(kl, HARD), str(tmp_path / "one"))
    assert distance(one["weights"], alone["run"]["weights"]) < 1e-6
    tasks = [["train", kl, HARD, str(tmp_path / "four")], ["gradient", kl, GRADIENT, ""]]
    four, gradients = results(4, tasks, tmp_path / "work")
    for found in four:
        assert distance(found["weights"], alone["run"]["weights"]) < 1e-6
    for found in gradients:
        assert distance(found, alone["gradient"]) < 1e-6


@pytest.mark.slow
def test_four_processes_do_what_one_does(alone, two, tmp_path):
    shutil.copytree(two["folder"] / "two_bytes", tmp_path / "two_bytes")
    kl, longer = config_file("kl"), [*TWO_BYTES, "training.max_steps=7"]
    tasks = [
        ["train", kl, longer, str(tmp_path / "two_bytes")],
        ["train", kl, HARD, str(tmp_path / "new")],
        ["train", kl, [*HARD, "training.parallel=replicate"], str(tmp_path / "replicated")],
        ["gradient", kl, [*GRADIENT, "training.parallel=replicate"], ""],
    ]
    small, new, copies, gradients = results(4, tasks, tmp_path / "work")
    for found in (*new, *copies):
        assert distance(found["weights"], alone["run"]["weights"]) < 1e-6
    for found in gradients:
        assert distance(found, alone["gradient"]) < 1e-6
    seven = distributed_worker.train(load_config(kl, longer), str(alone["folder"] / "two_bytes"))
    assert small[0]["controllers"] == small[3]["controllers"]
    assert distance(movement(small[0]["weights"]), movement(seven["weights"])) < 0.8


def test_a_rank_that_dies_stops_all_and_the_run_goes_on(alone, tmp_path):
    task = ["die", config_file("kl"), HARD, str(tmp_path / "run"), 5, 1]
    began = time.monotonic()
    process = launch(2, [task], tmp_path / "work")
    assert process.wait(150) != 0
    output = (tmp_path / "work" / "output.txt").read_text()
    (training_log,) = (tmp_path / "run").glob("runs/*/training.log")
    last_step = training_log.stat().st_mtime
    assert time.time() - last_step < 30 + 5, f"nothing hangs; {time.monotonic() - began:.0f} s in all"
    assert "lost another process" in output and "SIGKILL" in output
    again = distributed_worker.train(load_config(config_file("kl"), HARD), str(tmp_path / "run"))
    assert "going on after step 3" in training_log.read_text()
    assert distance(again["weights"], alone["run"]["weights"]) < 1e-6


def test_a_signal_saves_once_and_the_run_goes_on(alone, tmp_path):
    """SIGINT as a terminal sends it: to torchrun, which passes it on to its processes."""
    folder = tmp_path / "run"
    process = launch(2, [["train", config_file("kl"), HARD, str(folder)]], tmp_path / "work", start_new_session=True)
    deadline = time.monotonic() + 120
    while "step 1/" not in "".join(log.read_text() for log in folder.glob("runs/*/training.log")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "work" / "output.txt").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert "steps are saved" in (tmp_path / "work" / "output.txt").read_text()
    again = distributed_worker.train(load_config(config_file("kl"), HARD), str(folder))
    assert "going on after step" in next(folder.glob("runs/*/training.log")).read_text()
    assert distance(again["weights"], alone["run"]["weights"]) < 1e-6


def pretend(monkeypatch, count: int, here: int) -> None:
    monkeypatch.setattr(distributed, "world", lambda: count)
    monkeypatch.setattr(distributed, "rank", lambda: here)


def test_shares_are_contiguous_whole_and_even(monkeypatch):
    items, sizes = list("abcdefgh"), [9, 1, 1, 1, 1, 1, 1, 9]
    for count in (1, 2, 3, 8, 11):
        pieces = []
        for here in range(count):
            pretend(monkeypatch, count, here)
            pieces.append(share(items, sizes))
        assert [item for piece in pieces for item in piece] == items
        if count == 2:
            assert pieces == [list("abcd"), list("efgh")]
    pretend(monkeypatch, 3, 0)
    assert share([]) == []


def test_what_one_process_raises_all_raise(monkeypatch):
    pretend(monkeypatch, 2, 0)
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, ConfigError("of rank 1")])
    with pytest.raises(ConfigError, match="of rank 1"):
        together(lambda: ["of rank 0"])
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, ["b"]])
    assert together(lambda: ["a"]) == ["a", "b"]
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, {"y": 2.0, "x": 1.0}])
    assert total({"x": 1.0}) == {"x": 2.0, "y": 2.0}


def test_an_error_that_nobody_can_be_asked_about_is_not_shared(monkeypatch):
    pretend(monkeypatch, 2, 0)
    monkeypatch.setattr(distributed, "gather", lambda mine: pytest.fail("the others are somewhere else"))

    def out_of_memory():
        raise AloneError("out of memory")

    with pytest.raises(AloneError):
        together(out_of_memory)


def test_a_full_disk_can_be_told_to_the_other_processes():
    error = StorageError("the checkpoint", OSError(28, "No space left on device"), "step 3 is safe")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and "step 3 is safe" in str(error)


def test_an_idle_pass_is_one_completion_without_weight(monkeypatch):
    def episode(length):
        return Episode((1,) * length, (0.0,) * length, True, "", token_weight=1.0, episode_weight=1.0)

    groups = [
        Group(Problem(i, (1,), "", {}), tuple(map(episode, lengths))) for i, lengths in enumerate([(9, 8), (3, 5)])
    ]
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    monkeypatch.setattr(sharding, "gather", lambda mine: [mine, 3])
    first, *idle = sharding.evened(None, [[groups[0]]], groups)
    assert first == ([groups[0]], True) and len(idle) == 2
    for [group], counts in idle:
        assert not counts and [len(e.token_ids) for e in group.episodes] == [3]
        assert [(e.token_weight, e.episode_weight) for e in group.episodes] == [(0.0, 0.0)]


def test_one_process_is_alone(monkeypatch):
    assert gather(3) == [3] and share([1, 2], [5, 5]) == [1, 2] and from_main(lambda: 4) == 4 and on_main(int, "7") == 7
    assert together(lambda: ["x"]) == ["x"] and total({"a": 1.0}) == {"a": 1.0}
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with on_main(int, "7") as nothing:
        assert nothing is None
    assert isinstance(on_main(int, "7"), Nothing) and on_main(int, "7").anything(1, key=2) is None
