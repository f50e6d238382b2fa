"""The benchmarks of step, update, head and OT run, end with one JSON document, and it means what it says."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fp32_head, gpu_first, in_turn, ot_figure, ot_scale, step, turns, update
from src.records import Episode, Group, Problem

SMALLEST = ["--shape", "tiny", "--prompts", "2", "--samples", "2", "--new_tokens", "4", "--quick", "--dtype", "float32"]


def result_of(module, monkeypatch, capsys, *options: str, smallest=SMALLEST) -> dict:
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(sys, "argv", [module.__name__, *smallest, *options])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_packed_and_the_padded_update_have_the_same_gradient(monkeypatch, capsys):
    monkeypatch.setattr(update, "SCORED_TOKENS", 512)
    monkeypatch.setattr(update, "VOCABULARIES", (64, 128))
    result = result_of(update, monkeypatch, capsys)
    assert set(result["median"]) == {"ours", "padded"} and result["ours_over_padded"] > 0
    assert result["grad_norm"]["ours"] == pytest.approx(result["grad_norm"]["padded"], rel=1e-4)
    assert result["grad_norm"]["ours"] > 0.01 and set(result["scoring_bytes"]) == {"64", "128"}


def test_a_step_is_timed_without_trl_too(monkeypatch, capsys):
    result = result_of(step, monkeypatch, capsys, "--skip", "trl", "trl_allocator")
    assert set(result["median"]["ours"]) == {"rollout", "update", "step"}
    assert len(result["results"]["ours"]["seconds"]) == 2


def test_the_benchmark_of_the_head_compares_log_probs_and_seconds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fp32_head", "--quick"])
    fp32_head.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["cost"]) == {"rollout", "score", "forward_backward", "step"}
    assert all(value > 0 for times in result["median"].values() for value in times.values())
    for found in result["mismatch"].values():
        assert 8 <= found["tokens"] <= 128 and 0 < found["mean"] < found["max"] < 0.5
    assert result["mismatch"]["bf16"] != result["mismatch"]["fp32_head"]


def test_a_ratio_is_outside_from_a_fifth_more_or_less():
    logprobs = [math.log(ratio) for ratio in (1.0, 1.19, 1.21, 0.81, 0.79)]
    episode = Episode((1,) * 5, (0.0,) * 5, True, "", old_logprobs=tuple(logprobs))
    found = fp32_head.mismatch([Group(Problem(0, (1,), "", {}), (episode,))])
    assert found == pytest.approx(
        {"tokens": 5, "mean": sum(map(abs, logprobs)) / 5, "max": -logprobs[4], "outside": 0.4}
    )


def test_kl_and_ot_are_zero_at_the_reference_and_grow_away_from_it(monkeypatch, capsys):
    result = result_of(ot_scale, monkeypatch, capsys, "--quick", smallest=[])
    noise, steps = result["rows"]["noise"], result["rows"]["steps"]
    assert [row["noise"] for row in noise] == [0, 0.05, 0.2] and [row["steps"] for row in steps] == [0, 1]
    for name in ("kl", "ot_w8", "ot_w16"):
        first, near, far = (row[name] for row in noise)
        assert abs(first) < 1e-6 and 1e-4 < near < 0.1 * far, name
        assert abs(steps[0][name]) < 1e-6 < steps[1][name], "a step moves, and the noise starts without it"
    assert noise[0]["raw_cost"] == steps[0]["raw_cost"] > 0.005, "undebiased it is not zero where nothing has moved"
    assert noise[2]["beyond_w8"] > 0.9 and result["kl_where"]["steps"]["ot_w8 0.05"] is None


def test_the_kl_where_ot_reaches_a_distance_is_read_on_a_line_of_logarithms():
    rows = [{"kl": 0.0, "ot": 0.0}, {"kl": 0.01, "ot": 0.001}, {"kl": 0.1, "ot": 0.1}]
    assert ot_scale.kl_where(rows, "ot", 0.01) == pytest.approx(0.01 * 10**0.5)
    assert ot_scale.kl_where(rows, "ot", 0.2) is None and ot_scale.kl_where(rows, "ot", 1e-4) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and POT
def test_the_figure_of_ot_is_what_the_notebook_draws(tmp_path, monkeypatch):
    from matplotlib import image, pyplot

    pyplot.close("all")
    monkeypatch.setattr(ot_figure, "DOTS_PER_INCH", 50)
    monkeypatch.setattr(pyplot, "close", lambda *_: None)  # so that it can be looked at
    monkeypatch.setattr(sys, "argv", ["ot_figure", "--output", str(tmp_path / "plan.png")])
    ot_figure.main()
    axes = {axis.get_title(): axis for axis in pyplot.gcf().axes}
    monkeypatch.undo()
    (plan,) = axes["transport plan, share of a row's mass"].images
    shares = np.asarray(plan.get_array())  # [tokens, tokens]
    assert np.abs(shares.sum(1) - 1).max() < 1e-3 and len(shares) > 10, "each token's mass is transported, whole"
    assert len(axes["KL of each place, nats"].patches) == len(shares)
    picture = image.imread(tmp_path / "plan.png")
    assert picture.shape[:2] == (300, 520) and picture[..., :3].std() > 0.1
    pyplot.close("all")


def test_a_renamed_cell_of_the_notebook_ends_the_figure(tmp_path):
    renamed = ot_figure.NOTEBOOK.read_text(encoding="utf-8").replace("def draw(", "def paint(")
    (tmp_path / "renamed.ipynb").write_text(renamed, encoding="utf-8")
    with pytest.raises(SystemExit, match="0 cells define 'draw'"):
        ot_figure.drawn_by(tmp_path / "renamed.ipynb")


def test_the_three_ways_to_a_second_turn_make_as_many_tokens_and_are_timed(monkeypatch, capsys):
    """The benchmark itself fails where one makes other lengths."""
    result = result_of(turns, monkeypatch, capsys, "--shape", "tiny", "--quick", smallest=[])
    assert set(result["median"]) == {"reply", "again", "one turn"} and min(result["median"].values()) > 0


def test_the_first_minutes_on_a_gpu_run_on_a_cpu_too_and_what_fails_is_written_down(tmp_path, monkeypatch, capsys):
    words = ["--output", str(tmp_path), "--quick", "--device", "cpu", "--dtype", "float32"]
    for stage in ("mismatch", "decode", "update", "optimizer", "peaks"):
        gpu_first.STAGES[stage](gpu_first.parse_arguments([*words, "--stage", stage]))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {stage: [row for row in rows if row["stage"] == stage] for stage in gpu_first.STAGES}
    assert [row["mean"] < 1e-5 for row in found["mismatch"][:4]] == [True] * 4
    assert found["mismatch"][4]["graphs_sample_the_same"] == {"flash": True, "padded": True}
    assert [row["rows"] for row in found["decode"]] == [16, 4, 1] and found["decode"][0]["floor_ms"] > 0
    assert [row["tokens"] for row in found["update"]] == [2 * (16 + 2 * 16)] * 2
    assert [row["optimizer"] for row in found["optimizer"]] == ["24/8", "24/16", "24/8, offloaded", "torch, fused"]
    assert [row["size"] for row in found["peaks"]] == ["3b", "3b", "7b", "7b"]
    words += ["--device", "cuda:99", "--stages", "decode"]
    monkeypatch.setattr(sys, "argv", ["gpu_first", *words])
    with pytest.raises(SystemExit, match="give another --output"):
        gpu_first.main()
    monkeypatch.setattr(sys, "argv", ["gpu_first", *words, "--output", str(tmp_path / "decode")])
    gpu_first.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["codes"] == {"decode": 1} and "cuda:99 is not there" in document["results"][-1]["error"]
    assert "--- decode" in (tmp_path / "decode" / "log.txt").read_text()


def test_a_stage_that_takes_too_long_is_stopped_with_what_it_has_started(tmp_path, monkeypatch):
    pid, real = tmp_path / "pid", gpu_first.subprocess.Popen
    command = ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]
    monkeypatch.setattr(gpu_first.subprocess, "Popen", lambda _, **keys: real(command, **keys))
    options = gpu_first.parse_arguments(["--output", str(tmp_path)])
    assert gpu_first.run_stage(options, "tests", 2) == "stopped after 2 s"
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    for _ in range(100):
        if not state.exists() or " Z " in state.read_text():
            return
        time.sleep(0.05)
    pytest.fail("what it has started goes on")


STEPS = """
import pathlib
def train_step(run, step):
    with pathlib.Path({log!r}).open("a") as log:
        log.write({name!r})
    return step
"""
MAIN = """
import sys, pathlib
import src.train_grpo as method
words = dict(word.split("=") for word in sys.argv if "=" in word)
for step in range(int(words["training.max_steps"]) - {fewer}):
    method.train_step(None, step)
pathlib.Path("runs").mkdir()
"""


@pytest.mark.parametrize("fewer", [0, 2])
def test_checkouts_make_their_steps_in_turn_and_nothing_is_left_in_them(fewer, tmp_path, monkeypatch, capsys):
    for name in ("before", "now"):
        (tmp_path / name / "src").mkdir(parents=True)
        (tmp_path / name / "src" / "train_grpo.py").write_text(STEPS.format(log=str(tmp_path / "log"), name=name[0]))
        (tmp_path / name / "main.py").write_text(MAIN.format(fewer=fewer if name == "before" else 0))
    monkeypatch.setattr(in_turn, "PROJECT", tmp_path / "now")
    monkeypatch.setattr(sys, "argv", ["in_turn", str(tmp_path / "before"), "--steps", "5", "--warm_up", "1"])
    if fewer:
        with pytest.raises(SystemExit, match="a run has ended: "):
            in_turn.main()
        return
    in_turn.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["pairs"] == 4 and found["ratio_of_seconds"][1] <= found["ratio_of_seconds"][0]
    assert (tmp_path / "log").read_text() == "bnnbbnnbbn"
    assert {file.name for file in (tmp_path / "now").iterdir()} == {"src", "main.py"}
    assert in_turn.mean_ratio([2.0, 2.0]) == [2.0, 2.0, 2.0]
    assert in_turn.mean_ratio([1.0, 4.0, 2.0, 2.0]) == [2.0, 0.813, 4.922]  # 2 e^(+- 3.182 ln 2 sqrt(2 / 3) / 2)


def test_checkouts_want_two_pairs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["in_turn", "before", "--steps", "5"])
    with pytest.raises(SystemExit):
        in_turn.main()
    assert "let --steps be --warm_up + 2 at least" in capsys.readouterr().err
