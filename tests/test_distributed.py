"""2 and 4 processes do what one does: gradients, weights, controllers, checkpoints; and what happens when one dies.

Each start of torchrun imports torch several times, so what runs by default is one start; the long form is slow.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import distributed_worker
import pytest
import torch
from safetensors.torch import load_file

from src.config import ConfigError, load_config
from src.engine import AloneError, distributed, from_main, on_main, sharding, together
from src.engine.distributed import Nothing, gather, share
from src.records import Episode, Group, Problem
from src.run.storage import StorageError

PROJECT = Path(__file__).resolve().parent.parent
TINY = PROJECT / "configs" / "configs_tiny"
SMALL = ["model.dtype=float32", "data.train_size=64", "data.eval_size=5", "data.eval_samples=2",
         "training.num_questions_per_batch=4", "training.batch_size=16", "training.max_steps=4",
         "training.eval_interval=0", "training.ckpt_save_interval=2", "training.max_tokens_per_microbatch=400",
         "training.minibatches=2"]  # fmt: skip
# a reward scaled over the batch, a moving beta, a reference that is synchronised, several updates a rollout
HARD = [*SMALL, "training.scale_rewards=batch", "training.beta_kl_target=0.001", "training.reference_sync_steps=2",
        "training.inner_epochs=2"]  # fmt: skip
# passes of two completions: a single process differs by 2e-6 from itself when other rows share a matrix product
GRADIENT = [*HARD, "training.max_tokens_per_microbatch=60"]
EXACT = [*SMALL, "model.dtype=bfloat16", "training.learning_rate=0.002"]  # of int16 corrections
REPLICATED = "training.parallel=replicate"


def config_file(loss_type: str) -> str:
    (file,) = TINY.glob(f"config_{loss_type}_*.yaml")
    return str(file)


KL = config_file("kl")
TASKS = {
    "gradient": ["gradient", KL, GRADIENT],
    "replicated gradient": ["gradient", KL, [*GRADIENT, REPLICATED]],
    "maxent": ["gradient", config_file("maxent"), [*SMALL, "training.max_tokens_per_microbatch=60"]],
    "run": ["train", KL, HARD],
    "replicated run": ["train", KL, [*HARD, REPLICATED]],
    # nothing pulls: groups without variance are measured without a gradient
    "plain": ["train", config_file("none"), SMALL],
    "lora": ["train", KL, [*SMALL, "lora.r=4", "lora.alpha=8"]],
    "exact": ["train", KL, EXACT],
    "two_bytes": ["train", KL, [*EXACT, "training.memory_efficient_adamw=true"]],
}


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


def run_folder(folder: Path) -> Path:
    (run,) = folder.glob("runs/*")
    return run


def final_weights(folder: Path) -> dict:
    (file,) = (run_folder(folder) / "final").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does, by the name of the task; its folder is alone.folder / name."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def found(name: str):
        what, file, overrides = TASKS[name]
        config = load_config(file, overrides)
        if what == "gradient":
            return distributed_worker.gradient_of_a_step(config)
        return distributed_worker.train(config, str(folder / name))

    found.folder = folder
    return found


def compare_steps(first: dict, second: dict, expected: dict) -> None:
    """Two ranks have measured the same, bit for bit, and nearly what one process measures."""
    for name, value in first.items():
        if not name.startswith(("time/", "memory/")) and "per_second" not in name:
            assert value == second[name], name
    assert first["controllers"]["beta"] != load_config(KL, HARD).training.beta
    for name, value in expected["controllers"].items():
        assert first["controllers"][name] == (value if value is None else pytest.approx(value, rel=1e-4)), name
    same = [m for m in expected if m.startswith(("train/", "eval/", "reward/", "rollout/length", "rollout/fin"))]
    assert {"train/kl_k3", "train/grad_norm", "eval/pass@1"} <= set(same) <= first.keys()
    for name in same:
        assert first[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


def test_two_processes_have_the_gradient_of_one_and_when_one_dies_another_number_goes_on(alone, tmp_path):
    names = {"gradient": "gradient", "replicated gradient": "gradient", "maxent": "maxent"}
    tasks = [[*TASKS[name], ""] for name in names] + [["die", KL, HARD, str(tmp_path / "run"), 4, 1]]
    process, work = launch(2, tasks, tmp_path / "work"), tmp_path / "work"
    expected = alone("run")
    assert process.wait(240) != 0
    output = (work / "output.txt").read_text()
    assert "lost another process" in output and "SIGKILL" in output, output[-6000:]
    for task, (name, same) in enumerate(names.items()):
        for rank in range(2):
            assert distance(torch.load(work / f"task_{task}_rank_{rank}.pt"), alone(same)) < 1e-6, name
    first, second = (torch.load(work / f"task_{len(names)}_rank_{rank}.pt")["steps"] for rank in range(2))
    assert list(first) == list(second) == [1, 2, 3]
    for step, measured in first.items():
        compare_steps(measured, second[step], expected["steps"][step])
    folder = run_folder(tmp_path / "run")  # only one process writes
    assert len(list((folder / "tb").iterdir())) == 1 and output.count("before training:") == 1
    again = distributed_worker.train(load_config(KL, HARD), str(tmp_path / "run"))
    assert list(again["steps"]) == [3, 4]
    log = (folder / "training.log").read_text()
    assert "going on after step 2" in log and log.count("before training:") == 1
    assert distance(again["weights"], expected["weights"]) < 1e-6
    assert distance(final_weights(tmp_path / "run"), final_weights(alone.folder / "run")) < 1e-6


def movement(weights: dict) -> dict:
    """What training has added to the embedded model."""
    start = load_file(PROJECT / "models" / "countdown-tiny" / "model.safetensors")
    return {name: weights[name].float() - start[name].float() for name in start}


@pytest.mark.slow
def test_two_processes_do_what_one_does(alone, tmp_path):
    from transformers import AutoModelForCausalLM

    begun = ["train", KL, [*HARD, "training.max_steps=2"]]
    tasks = {name: task for name, task in TASKS.items() if task[0] == "train"} | {"begun": begun}
    found = results(2, [[*task, str(tmp_path / name)] for name, task in tasks.items()], tmp_path)
    two = dict(zip(tasks, found, strict=True))
    for rank in two["plain"]:
        assert distance(rank["weights"], alone("plain")["weights"]) < 1e-6
        assert rank["steps"][4]["train/grad_norm"] == pytest.approx(
            alone("plain")["steps"][4]["train/grad_norm"], rel=1e-4
        )
    for name in ("run", "replicated run"):
        for rank in two[name]:
            assert distance(rank["weights"], alone("run")["weights"]) < 1e-6
        compare_steps(two[name][0]["steps"][4], two[name][1]["steps"][4], alone("run")["steps"][4])
    assert distance(two["lora"][1]["weights"], alone("lora")["weights"]) < 1e-4  # these began at zero
    assert distance(final_weights(tmp_path / "lora"), final_weights(alone.folder / "lora")) < 1e-4
    for name in ("two_bytes", "exact"):  # the order of rounding and the blocks of 8-bit moments differ: only nearly
        ours, theirs = movement(two[name][0]["weights"]), movement(alone(name)["weights"])
        assert all(float(change.norm()) > 0 for change in theirs.values() if change.dim() > 1)
        assert distance(ours, theirs) < 0.6, "1 would be no training at all"
    # a checkpoint is in the format of one process
    final = run_folder(tmp_path / "run") / "final"
    assert json.loads((final / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(final)
    assert distance(model.state_dict(), two["run"][0]["weights"]) == 0
    output = (tmp_path / "output.txt").read_text()
    assert output.count("\ncurves ") == 7, "one summary for each of the runs above"
    # four go on from what two have begun, and do what one does
    for name in ("begun", "two_bytes"):
        shutil.copytree(tmp_path / name, tmp_path / "four" / name)
    longer = [*TASKS["two_bytes"][2], "training.max_steps=6"]
    four = {
        "begun": TASKS["run"],
        "two_bytes": ["train", KL, longer],
        "replicated run": TASKS["replicated run"],
        "gradient": TASKS["gradient"],
        "replicated gradient": TASKS["replicated gradient"],
    }
    found = results(4, [[*task, str(tmp_path / "four" / name)] for name, task in four.items()], tmp_path / "four")
    resumed, small, copies, *gradients = found
    for rank in (*resumed, *copies):
        assert distance(rank["weights"], alone("run")["weights"]) < 1e-6
    for rank in (rank for ranks in gradients for rank in ranks):
        assert distance(rank, alone("gradient")) < 1e-6
    seven = distributed_worker.train(load_config(KL, longer), str(alone.folder / "two_bytes"))
    assert small[0]["steps"][6]["controllers"] == small[3]["steps"][6]["controllers"]
    assert distance(movement(small[0]["weights"]), movement(seven["weights"])) < 0.8


@pytest.mark.slow
def test_a_signal_saves_once_and_the_run_goes_on(alone, tmp_path):
    """SIGINT as a terminal sends it: to torchrun, which passes it on to its processes."""
    folder = tmp_path / "run"
    process = launch(2, [["train", KL, HARD, str(folder)]], tmp_path / "work", start_new_session=True)
    deadline = time.monotonic() + 120
    while "step 1/" not in "".join(log.read_text() for log in folder.glob("runs/*/training.log")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "work" / "output.txt").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert "steps are saved" in (tmp_path / "work" / "output.txt").read_text()
    again = distributed_worker.train(load_config(KL, HARD), str(folder))
    assert "going on after step" in (run_folder(folder) / "training.log").read_text()
    assert distance(again["weights"], alone("run")["weights"]) < 1e-6


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
    monkeypatch.setattr(distributed, "gather", lambda mine: pytest.fail("the others are somewhere else"))
    with pytest.raises(AloneError):  # nobody can be asked
        together(Mock(side_effect=AloneError("out of memory")))


def test_a_full_disk_can_be_told_to_the_other_processes():
    error = StorageError("the checkpoint", OSError(28, "No space left on device"), "step 3 is safe")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and "step 3 is safe" in str(error)


def test_an_idle_pass_is_one_completion_without_weight(monkeypatch):
    def episode(length):
        return Episode((1,) * length, (0.0,) * length, True, "", token_weight=1.0, episode_weight=1.0)

    groups = [Group(Problem(0, (1,), "", {}), tuple(map(episode, lengths))) for lengths in ((9, 8), (3, 5))]
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    monkeypatch.setattr(sharding, "gather", lambda mine: [mine, 3])
    first, *idle = sharding.evened(None, [[groups[0]]], groups)
    assert first == ([groups[0]], True) and len(idle) == 2
    for [group], counts in idle:
        assert not counts and [len(e.token_ids) for e in group.episodes] == [3]
        assert [(e.token_weight, e.episode_weight) for e in group.episodes] == [(0.0, 0.0)]


def test_one_process_is_alone(monkeypatch):
    assert gather(3) == [3] and share([1, 2], [5, 5]) == [1, 2] and from_main(lambda: 4) == 4 and on_main(int, "7") == 7
    assert together(lambda: ["x"]) == ["x"]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with on_main(int, "7") as nothing:
        assert nothing is None
    assert isinstance(on_main(int, "7"), Nothing) and on_main(int, "7").anything(1, key=2) is None
