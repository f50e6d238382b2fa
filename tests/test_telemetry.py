"""What a run leaves to look at: metrics.jsonl and TensorBoard say the same, once for each step, also after a crash."""

import json
import logging
import math

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from src.telemetry import Telemetry, configure_logging, keep_lines_through, markdown_table


@pytest.fixture(autouse=True)
def close_log():
    yield
    configure_logging()


def metrics_of(step: int, run: int = 0) -> dict[str, float]:
    """Metrics as the loop writes them; `run` tells two processes apart."""
    metrics = {
        "train/reward": step + run / 10,
        "train/answer": 0.5,
        "train/entropy": 1.25,
        "train/kl_k3": 0.0,
        "rollout/tokens_per_second": 1000,
        "rollout/length": 20.0,
        "time/rollout": 0.5,
        "time/update": 0.25,
    }
    return {"eval/greedy": 0.25, "eval/pass@1": 0.2} if step == 0 else metrics


def write_run(folder, steps, first_step: int, run: int = 0) -> None:
    """One process of a run; older event files get older names, as if the processes were not in the same second."""
    for age, file in enumerate(sorted((folder / "tb").glob("*.[0-9]"))):
        file.rename(folder / "tb" / f"events.out.tfevents.00{first_step}{age}.old")
    telemetry = Telemetry(folder, first_step, 10)
    for step in steps:
        telemetry.write_step(step, metrics_of(step, run))
        telemetry.write_text("completions", f"step {step} run {run}", step)
    telemetry.close()


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def events_of(folder, accumulator=EventAccumulator):
    events = accumulator(str(folder / "tb"), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def scalars_of(folder) -> dict[str, list[tuple[int, float]]]:
    """Tag -> [(step, value), ...] as TensorBoard shows them."""
    events = events_of(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_and_metrics_file_say_the_same(tmp_path):
    write_run(tmp_path, range(4), first_step=0)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[2] == {"step": 2, **metrics_of(2)}
    expected = {}
    for line in lines:
        for name in line.keys() - {"step"}:
            expected.setdefault(name, []).append((line["step"], pytest.approx(line[name])))
    assert scalars_of(tmp_path) == expected


def test_a_number_that_is_none_is_null(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 1)
    telemetry.write_step(1, metrics_of(1) | {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    telemetry.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [line[name] for name in "abcd"] == [None, None, None, 0.0]
    assert math.isnan(scalars_of(tmp_path)["a"][0][1]), "TensorBoard can show it"


def test_every_step_is_on_the_disk_at_once(tmp_path):
    telemetry = Telemetry(tmp_path, 0, 10)
    telemetry.write_step(0, metrics_of(0))
    telemetry.write_step(1, metrics_of(1))
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1]
    telemetry.close()


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [0, 1, 3, 5])
def test_a_resumed_run_replaces_the_steps_it_takes_again(tmp_path, first_step):
    """Also a run killed before its first checkpoint, which begins again at step 0."""
    write_run(tmp_path, range(5), first_step=0)
    write_run(tmp_path, range(first_step, 6), first_step=first_step, run=1)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4, 5]
    expected = [(step, pytest.approx(step + (step >= first_step) / 10)) for step in range(1, 6)]
    assert [(line["step"], line["train/reward"]) for line in lines_of(tmp_path)[1:]] == expected
    scalars = scalars_of(tmp_path)
    assert scalars["train/reward"] == expected
    assert [step for step, _ in scalars["eval/greedy"]] == [0]
    shown = events_of(tmp_path, plugin_event_accumulator.EventAccumulator).Tensors("completions/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in shown]
    assert texts == [f"step {step} run {int(step >= first_step)}" for step in range(6)]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 4, "train/rew',
        b'{"step": 4, "train/reward": 1.0',
        b"\x00\x00\x00",
        b"\xff\xfe",
        b"5\n",
        b"[1]\n",
        b"null\n",
        b'{"reward": 1}\n',
        b'{"step": null}\n',
        b'{"step": "2"}\n',
        b"\n\n",
        b"",
    ],
)
def test_a_broken_last_line_is_dropped(tmp_path, tail):
    write_run(tmp_path, range(4), first_step=0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    write_run(tmp_path, (), first_step=4)
    assert path.read_bytes() == whole, "whole lines stay as they are"
    write_run(tmp_path, (4,), first_step=4)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_crash_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    write_run(tmp_path, range(4), first_step=0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        keep_lines_through(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_no_metrics_file_yet(tmp_path):
    keep_lines_through(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_hparams_are_written_with_the_final_metrics(tmp_path):
    settings = {
        "loss_type": "kl",
        "beta": 0.04,
        "batch_size": 64,
        "flag": True,
        "max_steps": None,
        "betas": [0.9, 0.95],
    }
    telemetry = Telemetry(tmp_path, 0, 1)
    telemetry.write_step(1, metrics_of(1))
    telemetry.write_hparams(settings, {"eval/greedy": 0.5, "train/reward": 0.25, "train/loss": 9.0})
    telemetry.close()
    events = events_of(tmp_path)
    start = metadata.parse_session_start_info_plugin_data(
        events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    kept = {name: value.string_value or value.bool_value or value.number_value for name, value in start.hparams.items()}
    assert kept == {
        "loss_type": "kl",
        "beta": 0.04,
        "batch_size": 64,
        "flag": True,
        "max_steps": "None",
        "betas": "[0.9, 0.95]",
    }
    experiment = metadata.parse_experiment_plugin_data(
        events.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    )
    assert {metric.name.tag for metric in experiment.metric_infos} == {"eval/greedy", "train/reward"}
    assert len(list((tmp_path / "tb").iterdir())) == 1, "hparams belong into the run's own event file"


def test_histograms_are_written(tmp_path):
    import torch

    telemetry = Telemetry(tmp_path, 0, 1)
    telemetry.write_histogram("rollout/lengths", torch.tensor([1, 2, 2, 9]), 3)
    telemetry.close()
    (event,) = events_of(tmp_path).Histograms("rollout/lengths")
    assert (event.step, event.histogram_value.num, event.histogram_value.max) == (3, 4, 9)


def test_training_log_gets_every_line_and_is_continued(tmp_path, capsys):
    write_run(tmp_path, range(2), first_step=0)
    logging.getLogger("grpo").info("between two runs")
    write_run(tmp_path, (2,), first_step=2)
    log = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert [line.split()[2:4] for line in log.splitlines()] == [["step", "1/10"], ["between", "two"], ["step", "2/10"]]
    shown = capsys.readouterr()
    assert "step 1/10  reward 1.000  answer 0.500  kl 0.0000" in shown.out
    assert shown.out.count("step 2/10") == 1, "one console handler, however many runs"
    assert shown.err == "", "no progress bar where the terminal is none"


def test_the_log_of_one_run_is_not_written_by_the_next(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, (1,), first_step=0)
    assert len((tmp_path / "a" / "training.log").read_text(encoding="utf-8").splitlines()) == 1


def test_markdown_table_shows_text_literally():
    table = markdown_table(["prompt", "completion"], [["a|b", "x\ny `code`"], ["", "z" * 5000]])
    lines = table.splitlines()
    assert lines[:3] == ["prompt | completion", "--- | ---", "`a\\|b` | `x \u21b5 y 'code'`"]
    assert len(lines) == 4 and len(lines[3]) < 2100
