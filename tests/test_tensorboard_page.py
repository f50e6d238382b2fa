"""A run on TensorBoard's own pages: what its server answers and, where there is a browser, what it shows."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from src.config import load_config
from src.run.reading import read_rows
from src.run.telemetry import HPARAM_COLUMNS, Telemetry
from src.train_grpo import run_training

PROJECT = Path(__file__).resolve().parent.parent
TINY = PROJECT / "configs" / "configs_tiny"
NAMES = {"kl": "config_kl_beta0.04_tiny", "none": "config_none_tiny"}
SHORT = ["training.batch_size=16", "training.num_questions_per_batch=4", "data.eval_size=4", "data.eval_samples=8",
         "data.train_size=16", "training.eval_interval=1", "training.max_steps=2",
         "training.ckpt_save_interval=1"]  # fmt: skip
GROUPS = {
    "experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
    "colParams": [{"metric": {"tag": "eval/pass@1"}, "order": "ORDER_DESC"}], "startIndex": 0, "sliceSize": 10,
}  # fmt: skip


class Server:
    """TensorBoard in this process, and its answers."""

    def __init__(self, folder: Path):
        from tensorboard import default, program

        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        board = program.TensorBoard(default.get_plugins())
        board.configure(argv=["", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--load_fast=false"])
        self.url = board.launch()

    def get(self, path: str, body: dict | None = None, **query: str):
        url = f"{self.url}data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs, one of them interrupted and resumed, so that it has two event files."""
    work = tmp_path_factory.mktemp("board")
    for name in NAMES.values():
        run_training(load_config(TINY / f"{name}.yaml", SHORT), "countdown", work)
    folder = work / "runs" / f"{NAMES['kl']}_countdown"
    shutil.rmtree(folder / "checkpoints" / "step_000002")
    shutil.rmtree(folder / "final")
    run_training(load_config(TINY / f"{NAMES['kl']}.yaml", SHORT), "countdown", work)
    assert len(list((folder / "tb").iterdir())) == 2
    return work / "runs"


@pytest.fixture(scope="module")
def server(runs) -> Server:
    server = Server(runs)
    for _ in range(600):  # it reads in the background
        if len(server.get("plugin/hparams/session_groups", GROUPS).get("sessionGroups", [])) == 2:
            return server
        time.sleep(0.1)
    pytest.fail("TensorBoard does not find the runs")


def rows_of(runs: Path, name: str) -> list[dict]:
    return read_rows(runs / f"{name}_countdown" / "metrics.jsonl")


def test_the_server_has_every_metric_of_every_step_once(server, runs):
    for name in NAMES.values():
        expected = {}
        for row in rows_of(runs, name):
            for tag in row.keys() - {"step"}:
                expected.setdefault(tag, []).append([row["step"], pytest.approx(row[tag], rel=1e-5)])
        run = f"{name}_countdown/tb"
        assert set(server.get("plugin/scalars/tags")[run]) == set(expected)
        for tag in ("eval/pass@1", "train/reward", "time/update"):
            found = server.get("plugin/scalars/scalars", run=run, tag=tag)
            assert [[step, value] for _, step, value in found] == expected[tag]


def test_every_chart_of_the_layout_is_there_once_and_has_the_lines_it_should(server):
    categories = server.get("plugin/custom_scalars/layout")["category"]
    assert [category["title"] for category in categories] == ["Does it learn?", "Is it healthy?", "Is it fast?"]
    titles = [chart["title"] for category in categories for chart in category["chart"]]
    assert len(titles) == len(set(titles)) == 13, "two runs, three processes, and every chart once"
    charts = {chart["title"]: chart["multiline"]["tag"] for category in categories for chart in category["chart"]}
    run = f"{NAMES['kl']}_countdown/tb"

    def lines(title: str) -> set[str]:
        answers = [server.get("plugin/custom_scalars/scalars", run=run, tag=tag) for tag in charts[title]]
        assert all(answer["regex_valid"] for answer in answers)
        return {tag for answer in answers for tag in answer["tag_to_events"]}

    found = {title: lines(title) for title in charts}
    assert all(found.values()), {title for title in found if not found[title]}
    assert found["held-out accuracy"] == {"eval/greedy", "eval/pass@1", "eval/pass@8"}
    assert found["reward and its parts, training"] == {"train/reward", "reward/answer", "reward/format"}
    assert found["KL to the anchor"] == {"train/kl", "train/kl_k3"}
    assert found["seconds"] == {"time/rollout", "time/update", "time/evaluate"}
    assert found["tokens a second"] == {"rollout/tokens_per_second", "update/tokens_per_second"}


def test_a_file_of_scores_has_a_chart_of_its_own(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    Telemetry(tmp_path, 0, 1, sampled=False).close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Does it learn?", "Is it healthy?", "Is it fast?"]
    assert layout.category[0].chart[0].multiline.tag == ["eval/pair_accuracy$", "eval/best_probability$"]


def test_the_server_has_the_completions_as_a_table_and_the_lengths_as_histograms(server):
    run = f"{NAMES['none']}_countdown/tb"
    assert server.get("plugin/text/tags")[run] == ["completions/text_summary"]
    (table, *_) = server.get("plugin/text/text", run=run, tag="completions/text_summary", markdown="true")
    assert table["step"] == 1
    assert table["text"].count("<tr>") == 1 + 1 + 4, "the server's own, the head, and a completion of each group"
    assert "&lt;|user|&gt;" in table["text"] and "&lt;answer&gt;" in table["text"], "as it is, without backslashes"
    assert list(server.get("plugin/histograms/tags")[run]) == ["rollout/lengths"]
    found = server.get("plugin/histograms/histograms", run=run, tag="rollout/lengths")
    assert [step for _, step, _ in found] == [1, 2]


def test_hparams_can_be_sorted_by_accuracy_and_show_what_varies(server, runs):
    experiment = server.get("plugin/hparams/experiment", {"experimentName": ""})
    names = [info["name"] for info in experiment["hparamInfos"]]
    assert tuple(names[:5]) == HPARAM_COLUMNS, "the page shows the first five"
    assert {"entropy_coef", "pretrained_model_path", "ot_window"} <= set(names)
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert metrics == ["eval/pass@1", "eval/greedy", "eval/pass@8", "train/reward"]
    for order, sign in (("ORDER_DESC", -1), ("ORDER_ASC", 1)):
        request = {**GROUPS, "colParams": [{"metric": {"tag": "eval/pass@1"}, "order": order}]}
        groups = server.get("plugin/hparams/session_groups", request)["sessionGroups"]
        shown = [
            (group["hparams"]["loss_type"], metric["value"])
            for group in groups
            for metric in group["metricValues"]
            if metric["name"]["tag"] == "eval/pass@1"
        ]
        expected = [(kind, pytest.approx(rows_of(runs, name)[-1]["eval/pass@1"])) for kind, name in NAMES.items()]
        assert sorted(shown) == expected
        assert [sign * value for _, value in shown] == sorted(sign * value for _, value in shown)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pages_show_it_all(tmp_path):
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("there is no chromium, so TensorBoard's pages cannot be looked at; `apt-get install chromium`")
    command = ["-m", "benchmarks.tensorboard_page", "--steps", "10", "--output", tmp_path / "page.png"]
    result = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    tabs = json.loads(result.stdout.splitlines()[-1])["tabs"]
    assert set(tabs) == {"timeseries", "custom_scalars", "text", "hparams"}
    assert all(tab["ok"] and tab["wanted"] and not tab["missing"] for tab in tabs.values())
    picture = (tmp_path / "page.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 50_000, "an empty page has a tenth of that"


def test_without_a_browser_it_says_what_to_install(tmp_path):
    command = [sys.executable, "-m", "benchmarks.tensorboard_page", "--output", tmp_path / "page.png"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "install" in result.stderr
    assert not list(tmp_path.iterdir())
