"""Without a GPU: torch's CUDA build on a stand-in for the driver, tests/null_gpu/nullgpu.c, which computes nothing.

All host code is real, also the caching allocator and what may be captured; kernels are counted and not executed. So
these are budgets: how many kernels and waits a decode step and an update have, and what memory is planned.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "tests" / "null_gpu"
SITE = Path(torch.__file__).resolve().parents[1]


def on_stand_in(script: str, *words: str, gib: float = 80) -> dict:
    """What a script of tests/null_gpu prints there, on a card of this size."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler")
    if torch.cuda.is_available() or not (SITE / "nvidia" / "cu13" / "include").is_dir():
        pytest.skip("needs torch's CUDA build for CUDA 13, and no GPU")
    command, environment = [FOLDER / "run.sh", sys.executable, script, *words], {**os.environ, "NULLGPU_GIB": str(gib)}
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_decode_step_an_update_and_the_plan_of_memory_keep_to_their_budgets():
    """Qwen2.5-0.5B's shape with 4 of its layers; more layers have as many each (10 in a decode step).

    And the plan of 0.5b as shipped, against what torch's allocator gives out for the longest pass and its step.
    """
    found = on_stand_in("worker.py")
    for layout, most in (("flash", 81), ("padded", 100)):
        step = found["decode"][layout]
        assert step["captured"] and step["waits"] == 0, step
        assert 4 * 10 < step["kernels"] <= most, "more kernels a step than when it was measured"
    assert found["decode"]["flash"]["layout"] == "FlashAttention"
    assert found["decode"]["padded"]["layout"] == "PaddedAttention"
    update = found["update"]
    assert 4 * 50 < update["kernels"] <= 481 and update["waits"] <= 1, update
    assert update["optimizer"] <= 76 and update["optimizer_waits"] <= 1, update
    assert update["without_head"] == 20
    assert found["peak"]["taken"] <= found["peak"]["planned"] <= 1.05 * found["peak"]["taken"], found["peak"]


@pytest.mark.slow  # the plan of memory is tested above
def test_whole_steps_go_on_in_a_card_that_is_too_small_for_the_longest_pass():
    """The config of 0.5b, whose update wants 17 GiB, in 12: the passes become half as long, before the first step."""
    found = on_stand_in("fits.py", "0.5b", "qwen2.5-0.5b", gib=12)
    assert found["card"] == 12 and found["tokens"] < 16384 / 2
    assert found["graphs"] and found["slots"] == [256], "captures go on, and the cache is as large as it should be"
    assert min(found["captures"]) > 4, "there is no memory for the cache beside an update"
    for step in (1, 2):
        assert 5 < found[f"rollout {step}"][0] < 12 and 8 < found[f"update {step}"][0] < 12, found


@pytest.mark.slow  # what is kept is tested in test_decoding.py, and what is captured above
def test_where_there_is_memory_for_both_a_rollout_captures_what_the_next_one_repeats():
    found = on_stand_in("fits.py", "0.5b", "qwen2.5-0.5b", gib=40)
    first, second = found["captures"]
    assert first > 4 and second == 0 and found["slots"] == [256]
    assert found["update 2"][0] > found["rollout 1"][0] + 8, "the cache stays beside the update"
