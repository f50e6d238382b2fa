"""What a run leaves to look at: metrics.jsonl and TensorBoard say the same, once for each step, also after a crash."""

import errno
import json
import logging
import math
import os
import resource
import sys
import time

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from src.run import telemetry as module
from src.run.console import configure_logging
from src.run.storage import StorageError
from src.run.telemetry import Telemetry, keep_lines_through, markdown_table

grpo = logging.getLogger("grpo")


@pytest.fixture(autouse=True)
def close_log():
    yield
    configure_logging()


def metrics_of(step: int, run: int = 0) -> dict[str, float]:
    """Metrics as the loop writes them; `run` tells two processes apart."""
    return {
        "train/reward": step + run / 10, "reward/answer": 0.5, "train/entropy": 1.25, "train/kl_k3": 0.0,
        "rollout/tokens_per_second": 1000, "rollout/length": 20.0, "time/rollout": 0.5, "time/update": 0.25,
        "memory/peak_gib": 0.5,
    }  # fmt: skip


def evaluation_of(step: int) -> dict[str, float]:
    return {"eval/greedy": 0.25, "eval/pass@1": 0.2 + step / 10, "time/evaluate": 1.0}


def write(telemetry: Telemetry, *steps: int, run: int = 0) -> None:
    """Steps as the loop writes them: an evaluation before the first, and one after the third."""
    for step in steps:
        if step > 0:
            telemetry.write_text("completions", f"step {step} run {run}", step)
            telemetry.write_step(step, metrics_of(step, run))
        if step in (0, 3):
            telemetry.write_evaluation(step, evaluation_of(step))


def write_run(folder, steps, first_step: int, run: int = 0) -> None:
    """One process of a run."""
    telemetry = Telemetry(folder, first_step, 10)
    write(telemetry, *steps, run=run)
    telemetry.close()


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_of(folder) -> list[int]:
    """The steps of the lines, without those of evaluations."""
    return [line["step"] for line in lines_of(folder) if "eval/greedy" not in line]


def events_of(folder, accumulator=EventAccumulator):
    events = accumulator(str(folder / "tb"), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def scalars_of(folder) -> dict[str, list[tuple[int, float]]]:
    """Tag -> [(step, value), ...] as TensorBoard shows them."""
    events = events_of(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_and_metrics_file_say_the_same(tmp_path):
    """An evaluation is a line of its own; a number that is none is null, and TensorBoard can show it."""
    telemetry = Telemetry(tmp_path, 0, 10)
    write(telemetry, *range(4))
    telemetry.write_step(4, metrics_of(4) | {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    telemetry.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in text.split("\n")[:-1]
    ]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4]
    assert lines[2] == {"step": 2, **metrics_of(2)} and lines[4] == {"step": 3, **evaluation_of(3)}
    assert [lines[-1][name] for name in "abcd"] == [None, None, None, 0.0]
    shown, expected = scalars_of(tmp_path), {}
    assert [str(shown.pop(name)[0][1]) for name in "abcd"] == ["nan", "inf", "-inf", "0.0"]
    for line in lines:
        for name in line.keys() - {"step", *"abcd"}:
            expected.setdefault(name, []).append((line["step"], pytest.approx(line[name])))
    assert shown == expected


def test_every_step_is_on_the_disk_at_once(tmp_path, monkeypatch):
    """In both files, as nothing is written after a SIGKILL; metrics.jsonl in one piece, and past the system's cache."""
    calls = []
    for name in ("write", "fsync"):
        real = getattr(os, name)

        def call(descriptor, *rest, real=real, name=name):
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
                calls.append(name)
            return real(descriptor, *rest)

        monkeypatch.setattr(os, name, call)
    telemetry = Telemetry(tmp_path, 0, 10)
    write(telemetry, 0, 1)
    telemetry.write_histogram("rollout/lengths", [1, 2, 2, 9], 1)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1] and calls == ["write", "fsync"] * 2
    assert [step for step, _ in scalars_of(tmp_path)["train/reward"]] == [1]
    assert events_of(tmp_path).Tags()["tensors"] == ["custom_scalars__config__", "completions/text_summary"]
    (event,) = events_of(tmp_path).Histograms("rollout/lengths")
    assert (event.step, event.histogram_value.num, event.histogram_value.max) == (1, 4, 9)
    telemetry.close()


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [0, 1, 3, 5])
def test_a_resumed_run_replaces_the_steps_it_takes_again(tmp_path, first_step):
    """Also a run killed before its first checkpoint, which begins again at step 0."""
    write_run(tmp_path, range(5), first_step=0)
    write_run(tmp_path, range(first_step, 6), first_step=first_step, run=1)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 3, 4, 5]
    expected = [(step, pytest.approx(step + (step >= first_step) / 10)) for step in range(1, 6)]
    found = [(line["step"], line["train/reward"]) for line in lines_of(tmp_path) if "train/reward" in line]
    scalars = scalars_of(tmp_path)
    assert found == expected == scalars["train/reward"]
    assert [step for step, _ in scalars["eval/greedy"]] == [0, 3]
    shown = events_of(tmp_path, plugin_event_accumulator.EventAccumulator).Tensors("completions/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in shown]
    assert texts == [f"step {step} run {int(step >= first_step)}" for step in range(1, 6)]


def test_an_evaluation_that_was_owed_is_written_after_its_step(tmp_path):
    """Its step was written, and saved, by an earlier process."""
    write_run(tmp_path, range(5), first_step=0)
    telemetry = Telemetry(tmp_path, 5, 10)
    telemetry.write_evaluation(4, evaluation_of(4))
    write(telemetry, 5)
    telemetry.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 3, 3, 4, 4, 5]
    assert [step for step, _ in scalars_of(tmp_path)["eval/greedy"]] == [0, 3, 4]
    assert [step for step, _ in scalars_of(tmp_path)["train/reward"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 4, "train/rew', b'{"step": 4, "train/reward": 1.0', b"\x00\x00\x00", b"\xff\xfe", b"5\n", b"[1]\n",
        b"null\n", b'{"reward": 1}\n', b'{"step": null}\n', b'{"step": "2"}\n', b"\n\n", b"",
    ],
)  # fmt: skip
def test_a_broken_last_line_is_dropped(tmp_path, tail):
    write_run(tmp_path, range(4), first_step=0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    write_run(tmp_path, (), first_step=4)
    assert path.read_bytes() == whole, "whole lines stay as they are"
    write_run(tmp_path, (4,), first_step=4)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_crash_while_lines_are_dropped_loses_none_and_a_file_in_order_is_not_written_again(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    keep_lines_through(path, 3)
    assert not list(tmp_path.iterdir()), "there are none yet"
    write_run(tmp_path, range(4), first_step=0)
    before, inode = path.read_bytes(), path.stat().st_ino
    keep_lines_through(path, 3)
    assert path.stat().st_ino == inode

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        keep_lines_through(path, 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("clock", ["the same second", "backwards", "forwards"])
def test_every_step_is_shown_once_after_many_crashes(tmp_path, monkeypatch, clock):
    """TensorBoard reads event files in the order of their names, which come from the clock."""
    now = time.time()
    for life, (first, last) in enumerate([(0, 4), (3, 5), (3, 3), (2, 6), (7, 9), (9, 9), (1, 8), (8, 11)]):
        shift = {"the same second": 0, "backwards": -100_000 * life, "forwards": 100_000 * life}[clock]
        monkeypatch.setattr(time, "time", lambda shift=shift: now + shift)
        write_run(tmp_path, range(first, last + 1), first_step=first, run=life)
    monkeypatch.undo()
    last_life = [6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7]  # of steps 1 to 11, by hand: who wrote it last
    expected = [(step, pytest.approx(step + life / 10)) for step, life in zip(range(1, 12), last_life, strict=True)]
    found = [(line["step"], line["train/reward"]) for line in lines_of(tmp_path) if "train/reward" in line]
    assert scalars_of(tmp_path)["train/reward"] == expected == found
    assert scalars_of(tmp_path)["eval/greedy"] == [(0, 0.25), (3, 0.25)]


@pytest.mark.parametrize("lost", [1, 5, 30, 200])
def test_a_record_that_was_cut_by_a_crash_hides_no_later_one(tmp_path, lost):
    write_run(tmp_path, range(5), first_step=0)
    (file,) = (tmp_path / "tb").iterdir()
    file.write_bytes(file.read_bytes()[:-lost])
    write_run(tmp_path, range(4, 7), first_step=4, run=1)
    expected = [(step, pytest.approx(step + (step >= 4) / 10)) for step in range(1, 7)]
    assert scalars_of(tmp_path)["train/reward"] == expected


def test_events_of_torch_s_own_writer_are_gone_on_from(tmp_path):
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events.out.tfevents.4000000000.host.12.0").write_bytes(b"")
    write_run(tmp_path, range(3), first_step=0)
    assert max(path.name for path in (tmp_path / "tb").iterdir()) == f"events.out.tfevents.4000000001.{os.getpid()}"


# --- a disk that does not take it -------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, "")


def cannot_begin(telemetry, monkeypatch):
    """The folder is a file: it has failed before anything was written."""


def fail_in_the_middle(telemetry, monkeypatch):
    monkeypatch.setattr(telemetry.events.records, "write", full)


def fail_at_the_disk(telemetry, monkeypatch):
    monkeypatch.setattr(telemetry.events, "file", open("/dev/full", "wb"))  # noqa: SIM115
    telemetry.events.records = module.RecordWriter(telemetry.events.file)


def fail_in_torch(telemetry, monkeypatch):
    monkeypatch.setattr(module, "scalar", lambda *_: 1 / 0)


@pytest.mark.parametrize("fail", [cannot_begin, fail_in_the_middle, fail_at_the_disk, fail_in_torch])
def test_training_goes_on_where_tensorboard_fails(tmp_path, monkeypatch, fail):
    if fail is cannot_begin:
        (tmp_path / "tb").write_text("a file where the folder should be")
    telemetry = Telemetry(tmp_path, 0, 5)
    write(telemetry, 0, 1)
    fail(telemetry, monkeypatch)
    write(telemetry, 2, 3)
    telemetry.write_histogram("lengths", [1], 3)
    telemetry.write_hparams({"a": 1}, {"train/reward": 1.0})
    telemetry.close()
    monkeypatch.undo()
    assert steps_of(tmp_path) == [1, 2, 3]
    log = (tmp_path / "training.log").read_text(encoding="utf-8").splitlines()
    (warning,) = [line for line in log if "TensorBoard" in line]
    assert warning.endswith("the run goes on without it, see metrics.jsonl")
    if fail is cannot_begin:
        assert "TensorBoard's file cannot be written (File exists): the run goes on without it" in warning
    else:
        assert scalars_of(tmp_path)["train/reward"] == [(1, 1.0)]


@pytest.mark.parametrize("taken", [0, 1, 50, "a limit of the system"])
def test_a_full_disk_stops_the_run_and_leaves_whole_lines(tmp_path, monkeypatch, taken):
    """`taken`: bytes of the line for which there was still room."""
    telemetry = Telemetry(tmp_path, 0, 5)
    write(telemetry, 0)
    before, real, calls = (tmp_path / "metrics.jsonl").read_bytes(), os.write, []
    limits, reason = resource.getrlimit(resource.RLIMIT_FSIZE), "No space left on device"

    def nearly_full(descriptor, line):
        calls.append(line)
        return real(descriptor, line[:taken]) if taken and len(calls) == 1 else full()

    try:
        with monkeypatch.context() as patch, pytest.raises(StorageError) as failure:
            if isinstance(taken, int):
                patch.setattr(os, "write", nearly_full)
            else:
                reason = "File too large"
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
            telemetry.write_step(1, metrics_of(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(failure.value).startswith(
        f"{tmp_path / 'metrics.jsonl'} could not be written ({reason}); the last checkpoint is safe;"
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    telemetry.close()


def test_metrics_that_cannot_be_opened_are_said(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl could not be written \(Is a directory\)"):
        Telemetry(tmp_path, 0, 5)


def test_training_goes_on_when_the_terminal_is_gone(tmp_path, monkeypatch):
    configure_logging(tmp_path / "training.log")
    handlers = list(grpo.handlers)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        for text in ("one", "two"):
            grpo.info(text)
        monkeypatch.undo()
        assert len(grpo.handlers) == len(handlers) - 1
        assert [line.split()[-1] for line in (tmp_path / "training.log").read_text().splitlines()] == ["one", "two"]
        grpo.handlers = handlers
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # where the rest of its buffer can go


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_hparams_are_written_with_the_final_metrics(tmp_path):
    plain = {"loss_type": "kl", "beta": 0.04, "batch_size": 64, "flag": True}
    telemetry = Telemetry(tmp_path, 0, 1)
    telemetry.write_step(1, metrics_of(1))
    final = {"eval/greedy": 0.5, "train/reward": 0.25, "train/loss": 9.0}
    telemetry.write_hparams(plain | {"max_steps": None, "betas": [0.9, 0.95]}, final)
    telemetry.close()
    events = events_of(tmp_path)

    def content(tag: str) -> bytes:
        return events.SummaryMetadata(tag).plugin_data.content

    start = metadata.parse_session_start_info_plugin_data(content(metadata.SESSION_START_INFO_TAG))
    kept = {name: value.string_value or value.bool_value or value.number_value for name, value in start.hparams.items()}
    assert kept == plain | {"max_steps": "None", "betas": "[0.9, 0.95]"}
    experiment = metadata.parse_experiment_plugin_data(content(metadata.EXPERIMENT_TAG))
    assert {metric.name.tag for metric in experiment.metric_infos} == {"eval/greedy", "train/reward"}
    assert len(list((tmp_path / "tb").iterdir())) == 1, "hparams belong into the run's own event file"


def test_training_log_gets_every_line_is_continued_and_is_not_written_by_another_run(tmp_path, capsys):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    write_run(tmp_path / "run", range(2), first_step=0)
    grpo.info("between two runs")
    write_run(tmp_path / "run", (2,), first_step=2)
    write_run(tmp_path / "other", (5,), first_step=5)
    log = (tmp_path / "run" / "training.log").read_text(encoding="utf-8")
    assert [line.split()[2:4] for line in log.splitlines()] == [["step", "1/10"], ["between", "two"], ["step", "2/10"]]
    shown = capsys.readouterr()
    assert "step 1/10  reward 1.000  answer 0.500  kl 0.0000" in shown.out
    assert shown.out.count("step 2/10") == 1, "one console handler, however many runs"
    assert shown.err == "", "no progress bar where the terminal is none"


def test_markdown_table_shows_text_literally():
    table = markdown_table(["prompt", "completion"], [["a|b", "x\ny `code`"], ["", "z" * 5000]])
    lines = table.splitlines()
    assert lines[:3] == ["prompt | completion", "--- | ---", "`a|b` | `x \u21b5 y 'code'`"]
    assert len(lines) == 4 and len(lines[3]) < 2100
