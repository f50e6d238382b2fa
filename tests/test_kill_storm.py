"""The short form of benchmarks/kill_storm.py, and that its comparison sees what it is there to see."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.kill_storm import differences, run_folder, storm


@pytest.fixture(scope="module")
def stormy(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("storm")
    return folder, storm(folder, kills=5, steps=3, seed=0)


def test_a_killed_run_ends_like_one_that_was_left_alone(stormy):
    _, result = stormy
    assert result["kills"] == 5 and result["kills_during_save"] >= 1
    assert result["different"] == [] and result["identical"] is True


def change_weights(run: Path) -> None:
    path = run / "final" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(torch.int32).flatten()[0] ^= 1  # the last bit of one number
    save_file(weights, path)


def change_state(run: Path) -> None:
    path = run / "checkpoints" / "step_000003" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"].view(torch.int32).flatten()[0] ^= 1
    torch.save(state, path)


def change_metrics(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["train/reward"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lose_events(run: Path) -> None:
    newest = max((run / "tb").iterdir())
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (change_weights, "final weights"),
        (change_state, "training state of the last checkpoint"),
        (change_metrics, "metrics.jsonl"),
        (lose_events, "TensorBoard, killed run: "),
        (lambda run: (run / "checkpoints" / "step_000009.partial").mkdir(), "checkpoints: "),
    ],
)
def test_the_comparison_sees_the_smallest_difference(stormy, tmp_path, damage, named):
    quiet = run_folder(stormy[0] / "quiet")
    copied = shutil.copytree(quiet, tmp_path / "copy")
    assert list(differences(quiet, copied)) == []
    damage(copied)
    found = list(differences(quiet, copied))
    assert found and all(difference.startswith(named) for difference in found)
