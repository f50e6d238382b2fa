"""Tasks and their data: every kind of source, what each task makes of it, and the sentence of every error."""

import csv
import json
import os
import random
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.config import ConfigError, DataConfig, TrainingConfig
from src.rl_datasets import GENERATED_EVAL_SIZE, TASKS, get_task, split_of
from src.tasks import given_groups, load_eval_rows, load_train_rows, make_problems

PROJECT = Path(__file__).parent.parent


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def gsm8k_rows(count: int, start: int = 0) -> list[dict]:
    """Questions named by their number, whose answer is the number times 1,000."""
    return [
        {"question": f"What is {n} thousand?", "answer": f"It is {n} * 1000.\n#### {n * 1000:,}"}
        for n in range(start, start + count)
    ]


def questions(rows: list[dict]) -> list[str]:
    return [row["question"] for row in rows]


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def both(name: str, **settings) -> tuple[list[dict], list[dict]]:
    """All training and all evaluation rows of a task."""
    task = get_task(name, DataConfig(**{"eval_size": 10**6} | settings))
    return load_train_rows(task), load_eval_rows(task)


def refused(name: str, load=load_train_rows, **settings) -> str:
    """The sentence with which loading the training or evaluation rows is refused."""
    with pytest.raises(ConfigError) as error:
        load(get_task(name, DataConfig(**settings)))
    return sentence(error)


def test_importing_tasks_loads_nothing_heavy():
    heavy = {"torch", "numpy", "datasets", "transformers", "sympy", "math_verify", "pyarrow"}
    code = f"import sys, src.rl_datasets; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout == "set()\n"


class Tokenizer:
    """Letters are tokens; a chat is role:content|; counts its calls."""

    eos_token_id = None

    def __init__(self, chat_template: str | None):
        self.chat_template, self.calls, self.problems = chat_template, 0, []

    def __call__(self, texts, add_special_tokens, **_):
        self.calls += 1
        return SimpleNamespace(input_ids=[[0] * add_special_tokens + [*map(ord, text)] for text in texts])

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, problem, date_string):
        assert not tokenize and add_generation_prompt and date_string
        self.problems.append(problem)
        return "".join(f"{message['role']}:{message['content']}|" for message in messages)


# --- folders in the hub's layout --------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k_folder(tmp_path):
    """The layout of openai/gsm8k: two subsets, each with a train and a test file."""
    for subset, start in (("main", 0), ("socratic", 100)):
        write_parquet(tmp_path / "hub" / subset / "train-00000-of-00001.parquet", gsm8k_rows(8, start))
        write_parquet(tmp_path / "hub" / subset / "test-00000-of-00001.parquet", gsm8k_rows(4, start + 50))
    return tmp_path / "hub"


README = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: teacher
  data_files:
  - split: train
    path: socratic/train-*
---
"""


@pytest.mark.parametrize("readme", [None, README])
def test_a_folder_in_the_hubs_layout_gives_the_tasks_own_subset(gsm8k_folder, readme):
    if readme:
        (gsm8k_folder / "README.md").write_text(readme)
    train, held_out = both("gsm8k", path=str(gsm8k_folder))
    assert questions(train) == questions(gsm8k_rows(8))
    assert sorted(questions(held_out)) == sorted(questions(gsm8k_rows(4, 50)))


def test_another_subset_is_a_subfolder_or_a_config_of_the_readme(gsm8k_folder):
    (gsm8k_folder / ".cache").mkdir()
    data = {"path": str(gsm8k_folder)}
    assert questions(both("gsm8k", subset="socratic", **data)[0]) == questions(gsm8k_rows(8, 100))
    text = refused("gsm8k", subset="teacher", **data)
    assert "there is no subset teacher; set data.subset to one there is: main, socratic" in text
    (gsm8k_folder / "README.md").write_text(README)
    rows = load_train_rows(get_task("gsm8k", DataConfig(subset="teacher", **data)))
    assert questions(rows) == questions(gsm8k_rows(8, 100))
    text = refused("gsm8k", load_eval_rows, subset="teacher", **data)
    assert f"{gsm8k_folder}: there is no split test, only train; set data.train_split" in text
    assert "there is: main, socratic, teacher" in refused("gsm8k", subset="nope", **data)
    (gsm8k_folder / "README.md").write_text(README.replace("path: main/", "path: socratic/"))
    assert questions(both("gsm8k", **data)[0]) == questions(gsm8k_rows(8, 100)), "the README before the subfolder"


def test_without_path_the_tasks_own_hub_id_and_subset_are_loaded(gsm8k_folder, monkeypatch):
    """A local folder of that name stands in for the hub, as it does in the datasets library."""
    (gsm8k_folder.parent / "openai").mkdir()
    gsm8k_folder.rename(gsm8k_folder.parent / "openai" / "gsm8k")
    monkeypatch.chdir(gsm8k_folder.parent)
    train, held_out = both("gsm8k")
    assert (len(train), len(held_out)) == (8, 4) and train[0]["question"] == "What is 0 thousand?"
    assert "there is no subset nope" in refused("gsm8k", subset="nope")


def test_a_folder_of_plain_files_needs_no_subset_and_is_read_in_order(tmp_path, monkeypatch):
    folder = tmp_path / "json"  # a folder, though this is a kind of file
    write_jsonl(folder / "train-00001-of-00002.jsonl", gsm8k_rows(2, 10))
    write_jsonl(folder / "train-00000-of-00002.jsonl", gsm8k_rows(3))
    write_jsonl(folder / "validation.jsonl", gsm8k_rows(2, 20))
    write_jsonl(tmp_path / "train.jsonl", gsm8k_rows(4))
    monkeypatch.chdir(tmp_path)
    train, held_out = both("gsm8k", path="json", eval_split="validation")
    assert questions(train) == questions(gsm8k_rows(3) + gsm8k_rows(2, 10))
    assert sorted(questions(held_out)) == questions(gsm8k_rows(2, 20))
    text = refused("gsm8k", load_eval_rows, path=str(folder))
    assert text.startswith(f"{folder}: there is no split test, only train, validation; set data.train_split")
    assert "no split training, only train, validation" in refused("gsm8k", path=str(folder), train_split="training")


def test_a_changed_file_is_read_again(tmp_path):
    """The datasets library caches; what it keeps must not outlive a change, even one that keeps size and time."""
    file = write_jsonl(tmp_path / "data" / "train.jsonl", gsm8k_rows(2, 1))
    task = get_task("gsm8k", DataConfig(path=str(tmp_path / "data")))
    assert load_train_rows(task)[0]["question"] == "What is 1 thousand?"
    stat = file.stat()
    write_jsonl(file, gsm8k_rows(2, 5))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert stat.st_size == file.stat().st_size
    assert load_train_rows(task)[0]["question"] == "What is 5 thousand?"


def test_folders_that_are_no_data_set(tmp_path, gsm8k_folder):
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files; check data.path" in refused("gsm8k", path=str(tmp_path / "empty"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("hello")
    text = refused("gsm8k", path=str(tmp_path / "text"))
    assert "train.txt: only .parquet, .jsonl, .json, .csv files can be read; convert it" in text
    (gsm8k_folder / "README.md").write_text(README.replace("main", "first").replace("first/", "main/"))
    text = refused("math", path=str(gsm8k_folder))
    assert "pick one among the available configs: ['first', 'teacher']" in text and "data.subset" in text
    (gsm8k_folder / "README.md").write_text("---\nconfigs: [\n---\n")
    assert refused("gsm8k", path=str(gsm8k_folder)).startswith(str(gsm8k_folder))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("src.tasks.rows.hub_splits", lambda *_: pytest.fail("asked the hub"))
    for path in ("nope.jsonl", "data/train.parquet", "./nope", "/nope/nope", "a/b/c", "~/nope", "../x", "no such"):
        assert f"{path}: there is no such file or folder; check data.path" in refused("gsm8k", path=path)


# --- single files -----------------------------------------------------------------------------------------------------

WRITERS = {".parquet": write_parquet, ".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_single_file_keeps_a_tenth_for_evaluation(tmp_path, suffix):
    rows = gsm8k_rows(400)
    path = str(WRITERS[suffix](tmp_path / f"all{suffix}", rows))
    train, held_out = both("gsm8k", path=path)
    assert {"question", "answer"} == set(train[0])
    assert sorted(questions(train) + questions(held_out)) == sorted(questions(rows))
    assert 25 <= len(held_out) <= 55
    other = str(write_jsonl(tmp_path / "other.jsonl", rows[::-1]))
    assert set(questions(both("gsm8k", path=other)[1])) == set(questions(held_out)), "by content, not by place"
    validation = both("gsm8k", path=path, eval_split="validation")[1]
    assert sorted(questions(validation)) == sorted(questions(held_out)), "whatever the held-out part is called"


def test_rows_with_the_same_question_are_on_the_same_side(tmp_path):
    rows = [row | {"answer": f"#### {n}"} for row in gsm8k_rows(60) for n in range(3)]
    train, held_out = both("gsm8k", path=str(write_jsonl(tmp_path / "all.jsonl", rows)))
    assert len(train) + len(held_out) == 180 and held_out
    assert not set(questions(train)) & set(questions(held_out))


@pytest.mark.parametrize("start", range(0, 40, 2))
def test_at_least_one_row_is_kept_and_a_single_row_is_too_few(tmp_path, start):
    train, held_out = both("gsm8k", path=str(write_jsonl(tmp_path / "two.jsonl", gsm8k_rows(2, start))))
    assert (len(train), len(held_out)) == (1, 1)
    path = str(write_jsonl(tmp_path / "one.jsonl", gsm8k_rows(1, start)))
    text = refused("gsm8k", path=path)
    assert text == f"{path}: there are no rows for split train; name another split or another source"


@pytest.mark.parametrize("suffix", WRITERS)
def test_with_eval_path_a_file_is_all_training(tmp_path, suffix):
    path, eval_path = (str(WRITERS[suffix](tmp_path / f"{n}{suffix}", gsm8k_rows(30, n))) for n in (0, 100))
    train, held_out = both("gsm8k", path=path, eval_path=eval_path)
    assert questions(train) == questions(gsm8k_rows(30))
    assert sorted(questions(held_out)) == sorted(questions(gsm8k_rows(30, 100)))
    text = refused("gsm8k", path=path, eval_path=eval_path, eval_split="train")
    assert text == "data.train_split and eval_split are both train, so data.eval_path would not be read"


def test_a_path_may_begin_at_home_and_an_eval_path_that_is_the_path_still_keeps_a_tenth(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = str(write_jsonl(tmp_path / "all.jsonl", gsm8k_rows(50)))
    assert both("gsm8k", path="~/all.jsonl") == both("gsm8k", path=path, eval_path=path) == both("gsm8k", path=path)


def test_an_eval_folder_with_only_train_is_all_evaluation(tmp_path, gsm8k_folder):
    write_jsonl(tmp_path / "contest" / "train.jsonl", gsm8k_rows(5, 70))
    train, held_out = both("gsm8k", path=str(gsm8k_folder), eval_path=str(tmp_path / "contest"))
    assert len(train) == 8 and sorted(questions(held_out)) == questions(gsm8k_rows(5, 70))
    held_out = both("gsm8k", path=str(gsm8k_folder), eval_path=str(tmp_path / "contest"), subset="socratic")[1]
    assert sorted(questions(held_out)) == questions(gsm8k_rows(5, 70)), "data.subset is that of data.path"
    held_out = both("gsm8k", path=str(tmp_path / "contest"), eval_path=str(gsm8k_folder))[1]
    assert sorted(questions(held_out)) == questions(gsm8k_rows(4, 50)), "the subset of the task"
    text = refused("gsm8k", path=str(tmp_path / "contest"), eval_path=str(gsm8k_folder), subset="socratic")
    assert "there is no subset socratic; set data.subset to one there is: none" in text


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["{}", '{"question": '], "line 2: cannot be read: Expecting value: column 13"),
        (['{"question": "a", "answer": "1"}', "", "nonsense"], "line 3: cannot be read: Expecting value: column 1"),
        (["[1]"], 'line 1: cannot be read: a row must be an object such as {"question": "..."}'),
        (["null"], "line 1: cannot be read: a row must be an object"), (["[" * 100_000], "line 1: cannot be read:"),
        (['{"a": ' + "1" * 5000 + "}"], "line 1: cannot be read:"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named_by_its_number(tmp_path, lines, problem):
    path = write_jsonl(tmp_path / "x.jsonl", [lines[0].replace("{}", json.dumps(gsm8k_rows(1)[0])), *lines[1:]])
    assert f"{path} {problem}" in refused("gsm8k", path=str(path))
    folder = write_jsonl(tmp_path / "folder" / "train.jsonl", path.read_text().splitlines())
    assert f"{folder} {problem}" in refused("gsm8k", path=str(folder.parent)), "in a folder too"


def test_files_that_are_not_what_they_are_called(tmp_path):
    for name, content, problem in [
        ("x.parquet", b"PAR1 no", ": cannot be read"), ("x.json", b"[1, 2", ": cannot be read"),
        ("x.csv", b'question,answer\na,"1\n', ": cannot be read"), ("x.jsonl", b"\xff\xfe\x00", ": cannot be read"),
        ("x.txt", b"a", ": only .parquet, .jsonl"), ("x.csv", b"question,answer\nWhat?\n", "not as many fields as the"),
        ("x.csv", b"question,answer\nWhat?,1\nWhat?,1,2\n", " after row 1: cannot be read: the next row has not as "),
        ("x.jsonl", b"", "no rows for split train"), ("x.csv", b"", "no rows for split train"),
        ("x.json", b"[]", "no rows for split train"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        text = refused("gsm8k", path=str(tmp_path / name))
        assert text.startswith(str(tmp_path / name)) and problem in text


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    for suffix, text in {
        ".json": json.dumps(gsm8k_rows(2)),
        ".jsonl": "\n".join(["", *map(json.dumps, gsm8k_rows(2)), "", ""]),
        ".csv": "question,answer\nWhat?,1\n\nWhat else?,2\n",
    }.items():
        (tmp_path / f"x{suffix}").write_bytes(b"\xef\xbb\xbf" + text.encode())
        train, held_out = both("gsm8k", path=str(tmp_path / f"x{suffix}"))
        assert len(train) + len(held_out) == 2
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, gsm8k_rows(2))))
    assert len(both("gsm8k", path=str(tmp_path / "lines.json"))[0]) == 1, "JSON lines that are called .json"


# --- columns ----------------------------------------------------------------------------------------------------------


def test_other_columns_are_renamed_and_the_rest_is_kept(tmp_path):
    rows = [{"ask": "How many?", "result": 7, "source": "book"}] * 2 + [{"ask": "Why?", "result": "8", "source": "x"}]
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    settings = {"path": path, "prompt_column": "ask", "answer_column": "result"}
    train, held_out = both("gsm8k", **settings)
    assert sorted((r["question"], r["answer"], r["source"]) for r in train + held_out) == [
        ("How many?", "7", "book"),
        ("How many?", "7", "book"),
        ("Why?", "8", "x"),
    ]
    eval_path = str(write_jsonl(tmp_path / "y.jsonl", gsm8k_rows(3)))
    assert len(both("gsm8k", eval_path=eval_path, **settings)[1]) == 3, "the evaluation source has the task's columns"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "there is no column question with a value, only prompt, answer, id; name it in data.prompt_column"),
        ({"prompt_column": "promt"}, "there is no column promt with a value, only prompt, answer, id; name"),
        ({"prompt_column": "prompt", "answer_column": "x"}, "only prompt, answer, id; name it in data.answer_column"),
        ({"prompt_column": "prompt", "answer_column": "id"}, "must be a number or end in #### and a number, not 'a1'"),
    ],
)  # fmt: skip
def test_a_missing_column_is_named_with_the_key_that_renames_it(tmp_path, settings, problem):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "How many?", "answer": "1", "id": "a1"}])
    assert f"{path} line 1: " in refused("gsm8k", path=str(path), **settings)
    assert problem in refused("gsm8k", path=str(path), **settings)
    with_question = write_jsonl(tmp_path / "y.jsonl", [{"question": "How many?", "answer": "1"}])
    if settings.get("prompt_column") == "promt":
        text = refused("gsm8k", path=str(with_question), eval_path=str(path), **settings)
        assert "no column promt" in text, "a wrong name is no reason to take the task's own column"


@pytest.mark.parametrize("bad", [{"question": " "}, {"question": ["a"]}, {"question": True}, {"question": "\ud800"},
                                 {"answer": "18 or 20"}, {"answer": "so #### none"}, {"answer": "nan"},
                                 {"answer": None}])  # fmt: skip
def test_every_row_is_checked_not_only_the_first(tmp_path, bad):
    path = write_jsonl(tmp_path / "x.jsonl", [*gsm8k_rows(20), gsm8k_rows(1)[0] | bad, *gsm8k_rows(3)])
    assert f"{path} line 21: " in refused("gsm8k", path=str(path))
    path = write_parquet(tmp_path / "x.parquet", [*gsm8k_rows(1), {"question": "x", "answer": "?"}])
    assert f"{path} row 2: " in refused("gsm8k", path=str(path))


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """The hub is at a port where nobody listens, and nothing was downloaded before."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_without_network_a_data_set_of_the_hub_is_one_sentence_at_once(no_network):
    import datasets

    started = time.monotonic()
    text = refused("gsm8k")
    assert time.monotonic() - started < 8
    assert text.startswith("openai/gsm8k: cannot be loaded from the hub (Couldn't reach 'openai/gsm8k' on the Hub")
    assert "download it and name its folder in data.path" in text
    assert datasets.config.HF_HUB_OFFLINE is False, "the setting is put back"


def test_without_network_a_data_set_that_was_downloaded_before_is_used(no_network, gsm8k_folder, tmp_path):
    """The cache of the hub's acme/numbers, made from a local folder and renamed."""
    import datasets

    (gsm8k_folder / "main").rename(tmp_path / "numbers")
    datasets.load_dataset(str(tmp_path / "numbers"), cache_dir=str(no_network))
    (no_network / "numbers").rename(no_network / "acme___numbers")
    config = next((no_network / "acme___numbers").iterdir())
    config.rename(config.with_name("default"))
    train, held_out = both("gsm8k", path="acme/numbers")
    assert questions(train) == questions(gsm8k_rows(8)) and len(held_out) == 4
    text = refused("gsm8k", load_eval_rows, path="acme/numbers", eval_split="validation")
    assert "acme/numbers: there is no split validation, only train, test" in text
    text = refused("gsm8k", path="acme/numbers", subset="nope")
    assert "nope" in text and "data.subset" in text


def test_a_data_set_that_the_hub_does_not_have_is_one_sentence(no_network, monkeypatch):
    class NoSuchRepository(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    import datasets

    server = ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        text = refused("gsm8k", path="acme/nope")
    finally:
        server.shutdown()
        server.server_close()
    assert text.startswith("acme/nope: cannot be loaded from the hub (Dataset 'acme/nope' doesn't exist on the Hub")


def test_the_subset_of_another_hub_data_set_is_its_own_default(no_network, monkeypatch):
    import datasets

    asked = []

    def load_dataset(source, subset=None):
        asked.append((source, subset))
        if subset not in (None, "extra"):
            raise ValueError(f"BuilderConfig '{subset}' not found. Available: ['default', 'extra']")
        return {"train": datasets.Dataset.from_list(gsm8k_rows(3)), "test": datasets.Dataset.from_list(gsm8k_rows(2))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_train_rows(get_task("gsm8k", DataConfig(path="acme/words")))) == 3
    assert asked == [("acme/words", "main"), ("acme/words", None)]
    asked.clear()
    load_train_rows(get_task("gsm8k", DataConfig(path="acme/words", subset="extra")))
    assert asked == [("acme/words", "extra")]
    text = refused("gsm8k", path="acme/words", subset="nope")
    assert "acme/words" in text and "Available: ['default', 'extra']" in text
    assert "'main' not found" in refused("gsm8k"), "of the task's own source the subset is not optional"
    rows = [*gsm8k_rows(1), {"question": "", "answer": "1"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": datasets.Dataset.from_list(rows)})
    assert "openai/gsm8k train row 2: column question" in refused("gsm8k")


# --- gsm8k and math ---------------------------------------------------------------------------------------------------


def answered(answer: str) -> str:
    return f"I add.</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize("reference", ["3 * 6 = <<3*6=18>>18\n#### 18", "18", "18.0"])
@pytest.mark.parametrize(
    ("completion", "right", "well_formed"),
    [
        (answered("18"), 1, 1), (answered(" $18.00 "), 1, 1), (answered("19"), 0, 1), (answered("18 or 19"), 0, 1),
        (answered("18") + " done", 1, 0), ("It is \\boxed{18}", 1, 0), ("18", 0, 0), ("", 0, 0),
    ],
)  # fmt: skip
def test_gsm8k_rewards(reference, completion, right, well_formed):
    reward = get_task("gsm8k").reward(completion, {"question": "?", "answer": reference})
    assert reward == {"reward": right + 0.1 * well_formed, "answer": right, "format": well_formed}


MATH_TRAIN = [
    {
        "problem": "Half of \\{1\\}?", "level": "Level 1", "type": "Algebra",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    },
    {"problem": "Square?", "level": "Level 5", "type": "Algebra", "solution": "First \\boxed{3}, then \\boxed{x^2}."},
    {"problem": "Odd one?", "level": "Level ?", "type": "Geometry", "solution": "\\boxed{5}"},
    {"problem": "Two?", "level": "Level 3", "type": "Geometry", "solution": "\\boxed 2"},
]  # fmt: skip
MATH_500 = [
    {"problem": f"P{n}?", "solution": f"so \\boxed{{{n}}}", "answer": f"{n}", "level": n % 5 + 1} for n in range(6)
]


def test_math_trains_on_its_levels_and_is_evaluated_on_math_500(tmp_path, monkeypatch):
    """Local folders of those names stand in for the hub, as they do in the datasets library."""
    write_parquet(tmp_path / "DigitalLearningGmbH/MATH-lighteval/data/train-00000-of-00001.parquet", MATH_TRAIN)
    write_parquet(tmp_path / "DigitalLearningGmbH/MATH-lighteval/data/test-00000-of-00001.parquet", MATH_TRAIN[:1])
    write_jsonl(tmp_path / "HuggingFaceH4/MATH-500/test.jsonl", MATH_500)
    monkeypatch.chdir(tmp_path)
    train, held_out = both("math")
    assert [row["answer"] for row in train] == ["\\frac{1}{2}", "x^2", "5", "2"]
    assert sorted(row["answer"] for row in held_out) == list("012345"), "the levels are for training"
    assert [row["answer"] for row in both("math", math_levels=[1, 3])[0]] == ["\\frac{1}{2}", "2"]
    assert len(both("math", math_levels=[1])[1]) == 6
    assert "math_levels: no problem of split train is of the levels [2]" in refused("math", math_levels=[2])
    text = refused("math", load_eval_rows, eval_split="validation")
    assert "MATH-500: there is no split validation, only test" in text
    held_out = both("math", path="DigitalLearningGmbH/MATH-lighteval")[1]
    assert [row["problem"] for row in held_out] == ["Half of \\{1\\}?"], "a path of one's own brings its test split"
    train, held_out = both("math", eval_path=str(write_jsonl(tmp_path / "mine.jsonl", MATH_500[:2])))
    assert (len(train), len(held_out)) == (4, 2)


def test_math_levels_can_be_numbers_and_need_their_column(tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", MATH_500 * 2))
    rows = load_train_rows(get_task("math", DataConfig(path=path, eval_path=path + "x", math_levels=[2])))
    assert {row["problem"] for row in rows} == {"P1?"}
    path = str(write_jsonl(tmp_path / "y.jsonl", [{"problem": "?", "answer": "1"}] * 2))
    text = refused("math", path=path, eval_path=str(tmp_path / "x.jsonl"), math_levels=[2])
    assert text == "data.math_levels: there is no column level, only problem, answer; remove the key"
    path = str(write_jsonl(tmp_path / "z.jsonl", [{"problem": "?", "solution": "x " * 900}]))
    assert f"{path} line 1: " in refused("math", path=path), "a solution without a box has no answer"


@pytest.mark.parametrize("row", [{"problem": "?", "answer": "\\frac{1}{2}"}, MATH_TRAIN[0]])
def test_math_rewards(row):
    task = get_task("math")
    right = {"reward": 1.1, "answer": 1, "format": 1}
    assert task.reward(answered("\\frac12"), row) == task.reward(answered("0.5"), row) == right
    assert task.reward(answered("2"), row) == {"reward": 0.1, "answer": 0, "format": 1}
    assert task.reward("\\boxed{\\frac{1}{2}}", row) == {"reward": 1, "answer": 1, "format": 0}
    assert task.reward("", row) == {"reward": 0, "answer": 0, "format": 0}


def test_votes_are_counted_in_a_canonical_form():
    assert {get_task("gsm8k").answer_of(answered(text)) for text in ("1,800", "$1800", " 1800.0 ")} == {"1800"}
    assert get_task("gsm8k").answer_of(answered("no idea")) == "no idea"
    assert get_task("math").answer_of(answered("x + \\frac{1} {2}")) == "x+\\frac{1}{2}"
    assert get_task("countdown").answer_of(answered(" 1 +\n2 ")) == "1+2"
    assert {get_task(name).answer_of("nothing") for name in ("gsm8k", "math", "countdown")} == {None}


def test_prompts_hold_the_question_as_it_is():
    for name, column in (("gsm8k", "question"), ("math", "problem")):
        system, user = get_task(name).messages({column: "{a} {} %s {{b}}"})
        assert (system["role"], user["role"]) == ("system", "user")
        assert user["content"].startswith("{a} {} %s {{b}}\n\n") and "<answer> </answer>" in user["content"]
    assert "<answer> \\frac{3}{4} </answer>" in user["content"]
    assert get_task("math").response_prefix.endswith("<think>")


# --- countdown from a file --------------------------------------------------------------------------------------------

COUNTDOWN = [{"nums": [n, n + 3, 2 * n + 1], "target": n + 4} for n in range(1, 121)]


@pytest.mark.parametrize("layout", ["folder", ".parquet", ".jsonl", ".json", ".csv"])
def test_countdown_of_an_undivided_source_is_split_by_its_numbers(tmp_path, layout):
    if layout == "folder":
        write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", COUNTDOWN)
        path = str(tmp_path / "hub")
    else:
        path = str(WRITERS[layout](tmp_path / f"x{layout}", COUNTDOWN))
    seen = {}
    for split in ("train", "validation", "test"):
        task = get_task("countdown", DataConfig(path=path, train_size=1, eval_size=1))
        seen[split] = task.load(split)
        assert seen[split] == [row for row in COUNTDOWN if split_of(row["nums"]) == split], "train_size does not count"
    assert sum(map(len, seen.values())) == 120 and all(seen.values())
    assert len(load_eval_rows(task)) == 1
    text = refused("countdown", path=path, train_split="all")
    assert text == f"{path}: there are no rows for split all; name another split or another source"


def test_countdown_of_a_divided_source_keeps_its_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", COUNTDOWN[:30])
    write_jsonl(tmp_path / "test.jsonl", COUNTDOWN[30:50])
    train, held_out = both("countdown", path=str(tmp_path))
    assert train == COUNTDOWN[:30] and len(held_out) == 20


def test_countdown_can_train_on_generated_problems_and_be_evaluated_on_a_file(tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", COUNTDOWN))
    train, held_out = both("countdown", eval_path=path, train_size=7, eval_size=200)
    assert (len(train), len(held_out)) == (7, 120)
    assert len(load_eval_rows(get_task("countdown", DataConfig(eval_path=path)))) == 12
    text = refused("countdown", eval_path=path, eval_split="train")
    assert "so data.eval_path would not be read" in text


@pytest.mark.parametrize(
    "bad",
    [
        *({"nums": nums} for nums in ([1], 5, "1 2", "[1, 2", [1, 2.5], [1, -2], [1, 10**6], [True, 2], [1, None])),
        *({"target": target} for target in ("x", 1.5, [1], True)),
        {"nums": {"a": 1}},
    ],
)
def test_countdown_rows_are_checked(tmp_path, bad):
    path = write_jsonl(tmp_path / "x.jsonl", [COUNTDOWN[0], COUNTDOWN[1] | bad])
    text = refused("countdown", path=str(path))
    assert f"{path} line 2: a problem has at least two whole numbers (nums) and a whole target, not" in text


def test_generated_countdown_has_three_splits_and_256_evaluation_problems():
    easy = {"num_numbers": [2], "number_max": 50}
    assert len(load_eval_rows(get_task("countdown", DataConfig(**easy)))) == 256 == GENERATED_EVAL_SIZE
    assert len(load_train_rows(get_task("countdown", DataConfig(train_size=3, **easy)))) == 3
    text = "data: countdown generates the splits train, validation, test, not dev; set data.train_split or "
    assert refused("countdown", train_split="dev") == text + "data.eval_split"
    assert "not dev" in refused("countdown", load_eval_rows, eval_split="dev")


# --- scored -----------------------------------------------------------------------------------------------------------

SCORED = [
    {"prompt": f"Say {n}", "completions": [{"text": f"{n}", "score": 1}, {"text": "no", "score": -0.5}]}
    for n in range(5)
]


def test_scored_groups_come_from_the_file(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 9"}]
    rows = [*SCORED, SCORED[0] | {"prompt": chat}]
    for path in (write_jsonl(tmp_path / "train.jsonl", rows), write_parquet(tmp_path / "x.parquet", SCORED)):
        task = get_task("scored", DataConfig(path=str(path), eval_path=str(tmp_path)))
        loaded = load_train_rows(task)
        assert task.offline and loaded == (rows if path.suffix == ".jsonl" else SCORED)
    assert task.messages(rows[1]) == [{"role": "user", "content": "Say 1"}]
    assert task.messages(rows[5]) == chat
    task.data.system_prompt = "Sing."
    assert task.messages(rows[1])[0] == {"role": "system", "content": "Sing."}
    assert task.reward("no", rows[1]) == {"reward": -0.5, "answer": 0}
    assert task.reward("1", rows[1]) == {"reward": 1, "answer": 1}
    with pytest.raises(ValueError, match="not in the file"):
        task.reward("2", rows[1])
    assert not any(getattr(get_task(name), "offline", False) for name in TASKS if name != "scored")
    train, held_out = both("scored", path=str(tmp_path / "x.parquet"))
    assert len(train) + len(held_out) == 5 and held_out
    assert refused("scored") == "Scored has no problems of its own; name a source in data.path"


GOOD = {"text": "a", "score": 1.0}
NO_CHAT = ("", 5, [], [{"role": "user"}], [{"role": "user", "content": "\udc00"}], [{"role": 1, "content": "a"}])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *(({"completions": few}, "completions must be a list of at least 2") for few in ([GOOD], [], "ab")),
        ({"completions": None}, "there is no column completions with a value, only prompt, completions; name it in d"),
        *(({"completions": [GOOD, bad]}, 'completion 2 must be such as {"text": "...", "score": 1.0}')
          for bad in ("b", {"score": 1}, {"text": "\ud83d", "score": 1})),
        ({"completions": [{"text": "a"}, GOOD]}, "completion 1 must have a score that is a finite number, not None"),
        *(({"completions": [GOOD, {"text": "b", "score": bad}]}, f"finite number, not {bad!r:.80}")
          for bad in ("1", True, float("nan"), float("-inf"), 10**400)),
        *(({"prompt": bad}, "prompt must be a chat such as") for bad in NO_CHAT),
    ],
)  # fmt: skip
def test_scored_rows_are_checked_by_line(tmp_path, change, problem):
    path = write_jsonl(tmp_path / "x.jsonl", [*SCORED[:2], SCORED[2] | change])
    text = refused("scored", path=str(path))
    assert text.startswith(f"{path} line 3: ") and problem in text


def test_given_completions_are_episodes_that_no_policy_sampled():
    problems = make_problems(get_task("scored"), [SCORED[3]], Tokenizer(None), 100)  # 6 tokens and one before
    training = TrainingConfig(max_gen_len=3, max_prompt_len=100)
    ((one, two),) = (group.episodes for group in given_groups(problems, Tokenizer(None), (9,), training))
    assert (one.token_ids, two.token_ids) == ((ord("3"), 9), (ord("n"), ord("o"), 9)), "with the end"
    assert one.finished and one.logprobs == () and one.length == 2 and one.text == "3"
    assert (one.reward, one.reward_parts) == (1.0, {"reward": 1.0, "answer": 1.0})
    assert (two.reward, two.reward_parts) == (-0.5, {"reward": -0.5, "answer": 0.0})
    for shorter in (TrainingConfig(max_gen_len=2), TrainingConfig(max_seq_length=len(problems[0].prompt_ids) + 2)):
        (group,) = given_groups(problems, Tokenizer(None), (9,), shorter)
        assert [episode.text for episode in group.episodes] == ["3"], "one that is too long is left out"


# --- the fixed evaluation set -----------------------------------------------------------------------------------------


def test_the_evaluation_set_is_drawn_by_the_data_seed_alone(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", gsm8k_rows(2))
    write_jsonl(tmp_path / "test.jsonl", gsm8k_rows(250))

    def drawn(**settings) -> list[str]:
        random.seed(time.time())
        return questions(load_eval_rows(get_task("gsm8k", DataConfig(path=str(tmp_path), **settings))))

    assert len(drawn()) == 25, "a tenth of the split"
    assert drawn() == drawn(train_size=3) == drawn(system_prompt="x")
    assert drawn() != drawn(seed=1) and drawn(eval_size=7) == drawn()[:7]
    assert drawn() != questions(gsm8k_rows(25)) and len(set(drawn())) == 25, "drawn, not the first ones"
    assert sorted(drawn(eval_size=251)) == sorted(questions(gsm8k_rows(250))), "all of it, if it is smaller"


def test_a_tenth_is_at_least_one_and_at_most_a_thousand(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "class Mine:\n    def load(self, split): return [{'n': n} for n in range(self.data.seed)]\n"
        "    messages = reward = print\n"
    )
    for rows, size in ((1, 1), (9, 1), (19, 1), (20, 2), (9999, 999), (10_010, 1000), (12_000, 1000)):
        assert len(load_eval_rows(get_task("mine", DataConfig(task_file=str(path), seed=rows)))) == size


# --- tasks of one's own -----------------------------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass

from src.rl_datasets import GSM8K, Task

@dataclass
class Settings:
    length: int = 3

class ShortAnswers:
    response_prefix = "So: "
    system_prompt = "Be short."
    def load(self, split):
        return ({"word": f"{split} {n}"} for n in range(Settings().length))
    def messages(self, row):
        return [{"role": "user", "content": row["word"]}]
    def reward(self, text, row):
        return {"reward": -len(text), "answer": 0}

class Seeded:
    def __init__(self, data):
        self.seed = data.seed
    load = messages = reward = lambda self, *_: [{"seed": self.seed}]

class Countdown(Seeded): pass

class Words(Task):
    hub_id = "acme/words"
    user_prompt = "Spell {word}!"
    def reward(self, text, row): return 1.0

class Easy(GSM8K):
    user_prompt = "{question}"

class Half:
    def load(self, split): return []

class two_names(Seeded): pass

class TwoNames(Seeded): pass

short_answers = ShortAnswers
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(OWN)
    return str(path)


def test_a_task_of_ones_own_is_found_by_its_name(own):
    data = DataConfig(task_file=own)
    for name in ("ShortAnswers", "short_answers", "shortanswers", "SHORT_ANSWERS"):
        task = get_task(name, data)
        assert type(task).__name__ == "ShortAnswers" and task.data is data
        assert load_train_rows(task) == [{"word": f"train {n}"} for n in range(3)]
        assert load_eval_rows(task)[0]["word"].startswith("test ")


def test_own_tasks_come_first_get_the_config_and_may_inherit(own, tmp_path):
    data = DataConfig(task_file=own, seed=5)
    assert get_task("countdown", data).load("train") == [{"seed": 5}]
    assert type(get_task("gsm8k", data)) is TASKS["gsm8k"], "what was only imported is no task of the file"
    data.path = str(write_jsonl(tmp_path / "x.jsonl", [{"word": "tree"}, {"word": "sea"}]))
    rows = load_train_rows(get_task("words", data)) + load_eval_rows(get_task("words", data))
    assert sorted(row["word"] for row in rows) == ["sea", "tree"]
    assert get_task("words", data).messages(rows[0])[1]["content"] == f"Spell {rows[0]['word']}!"
    assert get_task("easy", data).messages({"question": "1 + 1?"})[-1]["content"] == "1 + 1?"
    assert refused("easy", task_file=own, path="nope.csv").startswith("nope.csv: there is no such file")
    task = get_task("words", DataConfig(task_file=own))
    assert (task.hub_id, task.response_prefix) == ("acme/words", TASKS["gsm8k"].response_prefix)


def test_unknown_names_list_what_there_is(own):
    known = "countdown, gsm8k, math, scored"
    for name, file, said in [
        ("gsm8", None, f"gsm8 is not a dataset; did you mean gsm8k? known are: {known}"),
        (
            "zzz",
            own,
            f"zzz is not a dataset; known are: {known}, Settings, ShortAnswers, Seeded, Countdown, Words, Easy",
        ),
        ("twonames", own, f"twonames is the name of two classes; known are: {known}"),
        ("half", own, f"{own}: class Half lacks messages, reward"),
    ]:
        with pytest.raises(ConfigError) as error:
            get_task(name, DataConfig(task_file=file))
        assert sentence(error).startswith(said)


METHODS = """
    def load(self, split): return [{'a': 1}]
    def messages(self, row): return [{'role': 'user', 'content': 'x'}]
    def reward(self, text, row): return 1
"""


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("x = 1\nclass Mine\n", "line 2: the file cannot be imported: SyntaxError: "),
        ("\n\nimport no_such_module\n", "line 3: the file cannot be imported: ModuleNotFoundError: No module"),
        ("def f():\n    return 1 / 0\nf()\n", "line 2: the file cannot be imported: ZeroDivisionError: "),
        ("import sys\nsys.exit(0)\n", "line 2: the file cannot be imported: SystemExit: 0"),
        ("class Other: pass\n", "mine is not a dataset; known are: countdown, gsm8k, math, scored, Other"),
        ("Mine = 5\n", "mine is not a dataset; known are: countdown, gsm8k, math, scored"),
        (f"class Mine:{METHODS}    load = 1", "class Mine lacks load"),
        (f"class Mine:{METHODS}    def __init__(self, data): data.nope", "line 5: Mine cannot be made: Attri"),
        (f"class Mine:{METHODS}    def __init__(self, data, more): pass", "my.py: Mine cannot be made: TypeError: "),
        (f"class Mine:{METHODS}    data = [1]", "Mine.data is the DataConfig; use another name"),
    ],
)
def test_errors_in_the_task_file_are_one_sentence_with_a_line(tmp_path, code, problem):
    path = tmp_path / "my.py"
    path.write_text(code)
    with pytest.raises(ConfigError) as error:
        get_task("mine", DataConfig(task_file=str(path)))
    assert problem in sentence(error) and ("line" not in problem or f"{path} line" in sentence(error))


def test_a_task_file_that_is_none(tmp_path):
    for path in (tmp_path / "nope.py", tmp_path, write_jsonl(tmp_path / "x.txt", [])):
        with pytest.raises(ConfigError, match=r"data.task_file: .* is not a Python file; name one that is there"):
            get_task("countdown", DataConfig(task_file=str(path)))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise KeyError(split)", "my.py line 2: Mine.load('train'): KeyError: 'train'"),
        ("return []", "Mine.load('train') must return a list of at least one dict"),
        ("return ['a']", "Mine.load('train') must return a list of at least one dict"),
        ("return {'a': 1}", "Mine.load('train') must return a list of at least one dict"),
        ("pass", "Mine.load('train'): TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_an_own_load_does_wrong_is_one_sentence(tmp_path, body, problem):
    path = tmp_path / "my.py"
    path.write_text(f"class Mine:\n    def load(self, split): {body}\n    messages = reward = print\n")
    assert problem in refused("mine", task_file=str(path))


def test_errors_of_our_own_tasks_keep_their_traceback():
    task = get_task("gsm8k")
    task.load = lambda split: 1 / 0
    with pytest.raises(ZeroDivisionError):
        load_train_rows(task)


# --- prompts ----------------------------------------------------------------------------------------------------------


CHAT, RAW = "system:S|user:Q|P", "S\n\nQ\nP"


def prompt_of(prompt_format: str, chat_template: str | None) -> str:
    task = get_task("scored", DataConfig(prompt_format=prompt_format, system_prompt="S", response_prefix="P"))
    problem = make_problems(task, [{"prompt": "Q"}], Tokenizer(chat_template), 100)[0]
    begin = [] if problem.prompt_text == CHAT else [0]
    assert problem.prompt_ids == (*begin, *map(ord, problem.prompt_text)), "raw text begins with the special token"
    return problem.prompt_text


def test_prompt_formats():
    assert prompt_of("auto", "template") == prompt_of("chat", "template") == CHAT
    assert prompt_of("raw", "template") == prompt_of("raw", None) == prompt_of("auto", None) == RAW
    with pytest.raises(ConfigError) as error:
        prompt_of("chat", None)
    assert sentence(error) == "data.prompt_format is chat, but the tokenizer has no chat template; set it to raw"


def test_prompts_are_tokenized_in_one_call_and_a_template_that_reads_the_row_gets_it():
    rows = [{"prompt": f"Q{n}"} for n in range(50)]
    for template, seen in (("{{ messages }}", [None] * 50), ("{{ problem.prompt }}", rows)):
        tokenizer = Tokenizer(template)
        assert len(make_problems(get_task("scored"), rows, tokenizer, 100)) == 50
        assert tokenizer.calls == 1 and tokenizer.problems == seen


@pytest.mark.parametrize(
    ("system", "own_system", "chat"),
    [
        (None, "attribute", "system:attribute|user:x|"), (None, None, "user:x|"),
        ("config", "attribute", "system:config|user:x|"), ("config", "message", "system:config|user:x|"),
        ("", "attribute", "user:x|"), ("", "message", "user:x|"), (None, "message", "system:message|user:x|"),
    ],
)  # fmt: skip
def test_system_message_of_an_own_task(tmp_path, system, own_system, chat):
    code = f"class Mine:{METHODS}"
    if own_system == "attribute":
        code += "    system_prompt = 'attribute'\n"
    if own_system == "message":
        code = code.replace("return [{'role'", "return [{'role': 'system', 'content': 'message'}, {'role'")
    (tmp_path / "my.py").write_text(code)
    task = get_task("mine", DataConfig(task_file=str(tmp_path / "my.py"), system_prompt=system))
    assert make_problems(task, load_train_rows(task), Tokenizer("template"), 100)[0].prompt_text == chat


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return row['b']", "my.py line 4: Mine.messages: KeyError: 'b'"),
        ("return 'x'", 'Mine.messages must be a chat such as [{"role": "user", "content": "..."}], not \'x\''),
        ("return []", "Mine.messages must be a chat such as"),
        ("return [{'role': 'user', 'content': None}]", "Mine.messages must be a chat such as"),
    ],
)
def test_what_own_messages_do_wrong_is_one_sentence(tmp_path, body, problem):
    path = tmp_path / "my.py"
    path.write_text(
        f"class Mine:\n    def load(self, split): return [{{'a': 1}}]\n    def messages(self, row):\n        {body}\n"
        "    def reward(self, text, row): return 1\n"
    )
    task = get_task("mine", DataConfig(task_file=str(path)))
    with pytest.raises(ConfigError) as error:
        make_problems(task, load_train_rows(task), Tokenizer("template"), 100)
    assert problem in sentence(error)
