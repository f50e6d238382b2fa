"""The benchmarks of a step and of the update run, and end with one JSON document that means what it says."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import step, update

SMALLEST = ["--shape", "tiny", "--prompts", "2", "--samples", "2", "--new_tokens", "4", "--quick"]


def result_of(module, monkeypatch, capsys, *options: str) -> dict:
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(sys, "argv", [module.__name__, *SMALLEST, *options])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_packed_and_the_padded_update_have_the_same_gradient(monkeypatch, capsys):
    monkeypatch.setattr(update, "SCORED_TOKENS", 512)
    monkeypatch.setattr(update, "VOCABULARIES", (64, 128))
    result = result_of(update, monkeypatch, capsys, "--dtype", "float32")
    assert set(result["median"]) == {"ours", "padded"} and result["ours_over_padded"] > 0
    assert result["grad_norm"]["ours"] == pytest.approx(result["grad_norm"]["padded"], rel=1e-4)
    assert result["grad_norm"]["ours"] > 0.01 and set(result["scoring_bytes"]) == {"64", "128"}


def test_a_step_is_timed_without_trl_too(monkeypatch, capsys):
    result = result_of(step, monkeypatch, capsys, "--skip", "trl", "trl_allocator")
    assert set(result["median"]["ours"]) == {"rollout", "update", "step"}
    assert len(result["results"]["ours"]["seconds"]) == 2
