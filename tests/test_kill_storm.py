"""benchmarks/kill_storm.py, short and long, and that its comparison sees what it is there to see."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.kill_storm import differences, run_folder, storm


def change_weights(run: Path) -> None:
    path = run / "final" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(torch.int32).flatten()[0] ^= 1  # the last bit of one number
    save_file(weights, path)


def change_state(run: Path) -> None:
    path = max((run / "checkpoints").iterdir()) / "engine_state.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"].view(torch.int32).flatten()[0] ^= 1
    torch.save(state, path)


def change_metrics(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    next(row for row in rows if "train/reward" in row)["train/reward"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lose_events(run: Path) -> None:
    newest = max((run / "tb").iterdir())
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])


DAMAGES = {
    "final weights": change_weights,
    "training state of the last checkpoint": change_state,
    "metrics.jsonl": change_metrics,
    "TensorBoard, killed run: ": lose_events,
    "checkpoints: ": lambda run: (run / "checkpoints" / "step_000009.partial").mkdir(),
}


def test_a_killed_run_ends_like_one_that_was_left_alone(tmp_path):
    result = storm(tmp_path, kills=2, steps=3, seed=0)
    assert result["kills_during_save"] >= 1 and result["kills_within_step"] >= 1
    assert result["different"] == [] and result["identical"] is True
    quiet = run_folder(tmp_path / "quiet")
    for number, (named, damage) in enumerate(DAMAGES.items()):
        copied = shutil.copytree(quiet, tmp_path / f"copy{number}")
        assert list(differences(quiet, copied)) == []
        damage(copied)
        found = list(differences(quiet, copied))
        assert found and all(difference.startswith(named) for difference in found), "the smallest difference is seen"


@pytest.mark.slow
def test_many_kills_leave_no_trace_either(tmp_path):
    result = storm(tmp_path, kills=24, steps=8, seed=1)
    assert result["kills_during_save"] >= 4 and result["kills_within_step"] >= 4 and result["different"] == []
