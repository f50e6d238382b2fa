"""Reading runs back: what a crash, a resume or a second seed leaves behind, tables by hand, and the notebook."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from src.config import load_config
from src.run.reading import by_seed, frontier, markdown, mean_and_band, method, read_runs, series, smooth, summary

PROJECT = Path(__file__).parent.parent
NOTEBOOK = PROJECT / "results_reading.ipynb"


def write_run(folder: Path, rows=(), tail: str = "", seed: int = 0, model: str = "models/countdown-tiny", **training):
    """A fabricated run folder."""
    folder.mkdir(parents=True)
    training = {"random_seed": seed, "loss_type": "kl", "beta": 0.04, "max_steps": 2} | training
    config = {"model": {"pretrained_model_path": model}, "training": training}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def rewards(*values, first: int = 1) -> list[dict]:
    return [{"step": step, "train/reward": value} for step, value in enumerate(values, first)]


def test_lines_of_one_step_are_one_row_and_of_a_value_written_twice_the_later_counts(tmp_path):
    """A resumed run takes steps again; an evaluation has a line of its own, perhaps of a later process."""
    evaluation = {"step": 3, "eval/pass@1": 0.5}
    rows = [*rewards(0.1, 0.2, 0.3), *rewards(0.7, 0.8, first=2), evaluation, *rewards(0.9, first=4)]
    write_run(tmp_path / "a_countdown", rows)
    [run] = read_runs(tmp_path)
    steps, values = series(run, "train/reward")
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [0.1, 0.7, 0.8, 0.9]
    assert run.rows[2] == {"step": 3, "train/reward": 0.8, "eval/pass@1": 0.5} and run.last_step == 4


@pytest.mark.parametrize("tail", ['{"step": 3, "train/rew', "\x00\x00\x00", "null\n", '{"train/reward": 1}\n', "[3]\n"])
def test_a_broken_last_line_is_ignored(tmp_path, tail):
    write_run(tmp_path / "a_countdown", rewards(0.1, 0.2), tail)
    [run] = read_runs(tmp_path)
    assert series(run, "train/reward")[0].tolist() == [1, 2]


def test_missing_null_and_infinite_values_are_left_out(tmp_path):
    rows = [{"step": 0}, {"step": 1, "train/kl_k3": None}, {"step": 2, "train/kl_k3": 0.5}]
    write_run(tmp_path / "a_countdown", rows, '{"step": 3, "train/kl_k3": NaN}\n{"step": 4, "train/kl_k3": Infinity}\n')
    [run] = read_runs(tmp_path)
    assert [column.tolist() for column in series(run, "train/kl_k3")] == [[2], [0.5]]


def test_incomplete_runs_and_empty_folders_are_no_error(tmp_path):
    assert read_runs(tmp_path / "nowhere") == read_runs(tmp_path) == [] == summary([])
    assert by_seed([]) == {} and markdown([]) == "no runs"
    write_run(tmp_path / "begun_countdown")
    write_run(tmp_path / "stopped_countdown", rewards(0.5))
    write_run(tmp_path / "whole_countdown", rewards(0.5, 0.6))
    final = write_run(tmp_path / "without_max_steps_countdown", rewards(0.5), max_steps=None)
    for name, file, text in (("only_metrics", "metrics.jsonl", '{"step": 1, "train/reward": 1.0}\n'),
                             ("only_config", "config.yaml", "training: [broken")):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    runs = read_runs(tmp_path)
    assert {run.name: (run.last_step, run.complete) for run in runs} == {
        "begun_countdown": (-1, False), "only_config": (-1, False), "only_metrics": (1, False),
        "stopped_countdown": (1, False), "whole_countdown": (2, True), "without_max_steps_countdown": (1, False),
    }  # fmt: skip
    (final / "final").mkdir()
    assert read_runs(final)[0].complete, "the final model tells it"
    assert markdown(summary(runs)).count("\n") == 7
    groups = by_seed(runs)
    assert "only_metrics" in groups and any(label.startswith("kl beta 0.04") for label in groups)
    for group in groups.values():
        assert all(len(column) == 0 for column in mean_and_band(group, "eval/pass@1"))
        assert all(len(column) == 0 for column in frontier(group))


def test_runs_are_found_in_sub_folders_and_checkpoints_are_not_runs(tmp_path):
    for name in ("runs/a_countdown", "runs/a_countdown.1", "output/seed0/runs/b_gsm8k", "runs/.hidden/c_countdown"):
        write_run(tmp_path / name)
    write_run(tmp_path / "runs/a_countdown/checkpoints/step_000001")
    runs = read_runs(tmp_path)
    assert [(run.name, run.dataset) for run in runs] == [
        ("b_gsm8k", "gsm8k"), ("a_countdown", "countdown"), ("a_countdown.1", "countdown")]  # fmt: skip
    assert [run.name for run in read_runs(tmp_path / "runs" / "a_countdown")] == ["a_countdown"]


def test_seeds_belong_together_and_nothing_else_does(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"seed{seed}" / "kl_countdown", rewards(seed), seed=seed)
    write_run(tmp_path / "seed0" / "kl_countdown.1", rewards(9), seed=0)  # set aside: the same seed once more
    write_run(tmp_path / "seed2" / "kl_countdown.1", rewards(2, 9), seed=2)  # set aside, but it got farther
    write_run(tmp_path / "seed0" / "ot_countdown", loss_type="ot", beta=0.5, ot_window=8, ot_target=0.0)
    write_run(tmp_path / "seed0" / "both_countdown", loss_type={"kl": 0.04, "ot": 0.5})
    write_run(tmp_path / "seed0" / "none_countdown", loss_type="none")
    groups = by_seed(read_runs(tmp_path))
    sizes = {label: len(group) for label, group in groups.items()}
    assert sizes == {"kl 0.04 + ot 0.5": 1, "kl beta 0.04": 3, "none": 1, "ot beta 0.5 window 8": 1}
    assert [series(run, "train/reward")[1].tolist() for run in groups["kl beta 0.04"]] == [[0], [1], [2, 9]]


def test_labels_tell_groups_of_the_same_method_apart(tmp_path):
    write_run(tmp_path / "a_countdown", learning_rate=1e-4)
    write_run(tmp_path / "b_countdown", learning_rate=1e-5, seed=1)
    write_run(tmp_path / "d_countdown", learning_rate=1e-5, seed=2, delta=None)  # null is the same as not given
    groups = by_seed(read_runs(tmp_path))
    assert [len(group) for group in groups.values()] == [1, 2]
    assert list(groups) == ["kl beta 0.04, learning_rate 0.0001", "kl beta 0.04, learning_rate 1e-05"]
    write_run(tmp_path / "c_gsm8k", loss_type="none", model="other")
    assert list(by_seed(read_runs(tmp_path)))[-1] == "none, dataset gsm8k, model other"


def test_smoothing_by_hand():
    # (1-w) sum of w^k x over (1-w) sum of w^k: 4, (2 + 0.5 * 4) / 1.5, (1 + 0.5 * 2 + 0.25 * 4) / 1.75
    assert smooth([4.0, 2.0, 1.0], 0.5) == pytest.approx([4.0, 4 / 1.5, 3 / 1.75])
    assert smooth([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])  # no pull towards zero at the start
    assert smooth([1.0, 5.0], 0.0).tolist() == [1.0, 5.0] and smooth([], 0.9).tolist() == []
    with pytest.raises(ValueError, match="smoothing weight"):
        smooth([1.0], 1.0)


def test_mean_and_band_by_hand_at_the_steps_all_seeds_have(tmp_path):
    write_run(tmp_path / "0_countdown", rewards(1.0, 2.0, 3.0), seed=0)
    write_run(tmp_path / "1_countdown", rewards(3.0, 6.0), seed=1)
    write_run(tmp_path / "2_countdown", seed=2)  # has nothing yet, and takes nothing away
    columns = mean_and_band(read_runs(tmp_path), "train/reward")
    assert [column.tolist() for column in columns] == [[1, 2], [2.0, 4.0], [1.0, 2.0], [3.0, 6.0]]


EVALUATED = [
    {"step": 0, "eval/pass@1": 0.25, "eval/pass@1_ci95": 0.02},
    {"step": 1, "train/kl_k3": 0.1, "time/rollout": 1.0, "time/update": 2.0},
    {"step": 2, "train/kl_k3": 0.2, "time/rollout": 1.0, "time/update": 3.0},
    {"step": 2, "eval/pass@1": 0.75, "eval/pass@1_ci95": 0.03, "time/evaluate": 50.0},
    {"step": 3, "train/kl_k3": 0.3, "time/rollout": 2.0, "time/update": 3.0},
    {"step": 4, "train/kl_k3": 0.4, "time/rollout": 1.0, "time/update": 1.0},
    {"step": 4, "eval/pass@1": 0.5, "eval/pass@1_ci95": 0.04},
]


def test_summary_by_hand_with_only_the_options_that_a_method_reads(tmp_path):
    write_run(tmp_path / "a_countdown", EVALUATED, seed=7, loss_type="ot", beta=0.5, ot_window=8, max_steps=4)
    write_run(tmp_path / "b_countdown", loss_type="none", beta=0.04, ot_window=16)
    write_run(tmp_path / "c_countdown", loss_type="maxent", beta=0.04, tau=0.1)
    write_run(tmp_path / "d_countdown", loss_type={"maxent": 1.0, "js": 0.25}, beta=0.04, tau=0.1)
    row, *others = summary(read_runs(tmp_path))
    assert row == {
        "method": "ot", "beta": 0.5, "window": 8, "tau": None, "model": "countdown-tiny", "seed": 7, "steps": 4,
        "initial": (0.25, 0.02), "best": (0.75, 0.03), "final": (0.5, 0.04), "seconds a step": 3.5, "complete": True,
    }  # fmt: skip
    line = "| ot | 0.5 | 8 |  | countdown-tiny | 7 | 4 | 25.0% ± 2.0% | 75.0% ± 3.0% | 50.0% ± 4.0% | 3.5 | yes |"
    assert markdown([row]).splitlines()[2] == line
    assert [(row["method"], row["beta"], row["window"], row["tau"]) for row in others] == [
        ("none", None, None, None), ("maxent", 0.04, None, 0.1), ("js 0.25 + maxent 1", None, None, None)]  # fmt: skip
    assert method(read_runs(tmp_path / "d_countdown")[0]) == "js 0.25 + maxent 1"


def test_frontier_by_hand(tmp_path):
    write_run(tmp_path / "0_countdown", EVALUATED, seed=0)
    farther = [{**row, "train/kl_k3": 0.6} if "train/kl_k3" in row else row for row in EVALUATED]
    write_run(tmp_path / "1_countdown", farther, seed=1)
    steps, distance, accuracy = frontier(read_runs(tmp_path))
    assert steps.tolist() == [0, 2, 4] and accuracy.tolist() == [0.25, 0.75, 0.5]
    assert distance == pytest.approx([0.0, 0.4, 0.5])
    write_run(tmp_path / "2_countdown", EVALUATED, anchor="rollout")  # there the KL is to the policy that sampled
    assert len(frontier(read_runs(tmp_path)[2:])[0]) == 0


def run_here(code: list[str]) -> list[dict]:
    """The cells one after the other in this process, which has imported torch already; outputs as of nbconvert."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    outputs: list[dict] = []
    names = {"display": lambda shown: outputs.append({"text/markdown": shown.data})}

    def show() -> None:
        outputs.extend({"image/png": number} for number in pyplot.get_fignums())
        pyplot.close("all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "show", show)
        for source in code:
            exec(source.replace("import Markdown, display", "import Markdown"), names)
    return outputs


def run_in_a_kernel(_) -> list[dict]:
    """As a user does."""
    import nbformat
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = []
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(PROJECT)}})
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return [output.data for output in outputs if "data" in output]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib and POT
@pytest.mark.parametrize("execute", [run_here, pytest.param(run_in_a_kernel, marks=pytest.mark.slow)])
def test_the_notebook_reads_a_fresh_run(tmp_path, monkeypatch, execute):
    from src.train_grpo import run_training

    run_training(load_config(PROJECT / "configs" / "configs_tiny" / "config_ot_beta0.5_w8_tiny.yaml", [
        "training.batch_size=8", "training.num_questions_per_batch=2", "data.train_size=4", "data.eval_size=2",
        "data.eval_samples=2", "training.max_steps=1", "training.eval_interval=1", "training.minibatches=1",
    ]), "countdown", tmp_path)  # fmt: skip
    other = write_run(tmp_path / "runs" / "kl_countdown", EVALUATED, max_steps=4)
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("GRPO_RUNS", str(other.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = execute(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    tables = [data["text/markdown"] for data in outputs if "text/markdown" in data]
    assert tables[0] == markdown(sorted(summary(read_runs(tmp_path)), key=lambda row: row["method"]))
    assert "| ot | 0.5 | 8 |" in tables[0] and "kl beta 0.04" in tables[1]
    assert "| kl forward | none |" in tables[2] and "the same tokens, a trained policy" in tables[3]
    # what it learns, KL, penalty, time, both frontiers, and the plan of two answers
    assert sum("image/png" in data for data in outputs) == 8


def test_the_committed_notebook_is_executed_small_without_paths_of_a_machine_and_says_what_its_text_says():
    text = NOTEBOOK.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len(text) < 1_000_000
    for place in (*(f"/{name}/" for name in ("root", "home", "Users", "work", "tmp")), str(PROJECT), str(Path.home())):
        assert place not in text, place
    data = [output["data"] for cell in code for output in cell["outputs"] if "data" in output]
    tables = ["".join(each["text/markdown"]) for each in data if "text/markdown" in each]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in tables[3].splitlines()[2:]]
    values = {row[0]: np.array([float(part) for part in row[1:4]]) for row in rows}
    itself, reordered, alike = (values[name] for name in (
        "the reference itself", "the same sum, other words and order", "wrong, but begins alike"))  # fmt: skip
    assert (itself == 0).all() and (alike < reordered).all() and reordered[2] < 0.8 * reordered[1]
