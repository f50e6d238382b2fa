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

FOLDER = Path(__file__).resolve().parent / "null_gpu"
SITE = Path(torch.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What worker.py has printed there."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no C compiler")
    if torch.cuda.is_available() or not (SITE / "nvidia" / "cu13" / "include").is_dir():
        pytest.skip("needs torch's CUDA build for CUDA 13, and no GPU")
    folder = tmp_path_factory.mktemp("null_gpu")
    subprocess.run([FOLDER / "build.sh", SITE, folder], check=True)
    there = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH"), str(folder))
    there |= {"LD_PRELOAD": str(folder / "nullgpu.so"), "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "worker.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment | there, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_decode_step_an_update_and_the_plan_of_memory_keep_to_their_budgets(found):
    """Qwen2.5-0.5B's shape with 4 of its layers; more layers have as many each (10 in a decode step).

    And the plan of 0.5b as shipped, against what torch's allocator gives out for the longest pass and its step.
    """
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
