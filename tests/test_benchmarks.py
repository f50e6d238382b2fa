"""The benchmarks of a step and of the update run, and end with one JSON document that means what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def result_of(*command: str) -> dict:
    output = subprocess.run(
        [sys.executable, "-m", *command], cwd=PROJECT, capture_output=True, text=True, timeout=240, check=False
    )
    assert output.returncode == 0, output.stderr[-2000:]
    return json.loads(output.stdout.splitlines()[-1])


def test_the_packed_and_the_padded_update_have_the_same_gradient():
    result = result_of("benchmarks.update", "--shape", "tiny", "--quick", "--dtype", "float32")
    assert set(result["median"]) == {"ours", "padded"} and result["ours_over_padded"] > 0
    assert result["grad_norm"]["ours"] == pytest.approx(result["grad_norm"]["padded"], rel=1e-4)
    assert result["grad_norm"]["ours"] > 0.01


def test_a_step_is_timed_without_trl_too():
    result = result_of("benchmarks.step", "--shape", "tiny", "--quick", "--skip", "trl", "trl_allocator")
    assert set(result["median"]["ours"]) == {"rollout", "update", "step"}
    assert len(result["results"]["ours"]["seconds"]) == 2
