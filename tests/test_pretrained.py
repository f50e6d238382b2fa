"""benchmarks/pretrained.py: its task, what it counts, a sweep that is stopped, and that a run of it runs."""

import json
import sys

import pytest

from benchmarks import pretrained
from benchmarks.pretrained_task import Sums
from src.config import DataConfig
from src.train_grpo import next_problems

MODEL = "models/turns-tiny"
SETTINGS = {"dtype": "float32", "problems": 4, "samples": 8, "threads": 1} | {
    "training": {"random_seed": 1, "max_steps": 2}
}


@pytest.mark.parametrize(
    "text, strict, lenient, alone",
    [(" 17\n", 1, 1, 1), ("17.", 0, 1, 0), ("3 + 14 = 17", 0, 1, 0), ("18", 0, 0, 1), ("17 or 18", 0, 0, 0),
     ("", 0, 0, 0), ("-17", 0, 0, 1)],
)  # fmt: skip
def test_strict_lenient_and_format_are_told_apart(text, strict, lenient, alone):
    parts = Sums(DataConfig()).reward(text, {"question": "3 + 14", "answer": "17"})
    assert parts == {"reward": strict, "answer": strict, "lenient": lenient, "format": alone}


def test_no_two_numbers_are_in_two_splits():
    task = Sums(DataConfig(eval_size=10**6))
    splits = {split: task.load(split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 99 * 99
    pairs = [{frozenset(row["question"].split(" + ")) for row in rows} for rows in splits.values()]
    assert not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]
    assert all(eval(row["question"]) == int(row["answer"]) for row in splits["test"])
    assert Sums(DataConfig(eval_size=7)).load("test") == splits["test"][:7]


def test_a_run_is_known_by_settings_config_and_weights(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    names = {pretrained.fingerprint(each, str(tmp_path)) for each in (SETTINGS, SETTINGS | {"threads": 2})}
    (tmp_path / "model.safetensors").write_bytes(b"others")
    names.add(pretrained.fingerprint(SETTINGS, str(tmp_path)))
    for file in (pretrained.CONFIG, pretrained.CONFIG.with_name("pretrained_task.py")):
        (tmp_path / file.name).write_text(file.read_text().replace("../configs", str(pretrained.PROJECT / "configs")))
    monkeypatch.setattr(pretrained, "CONFIG", tmp_path / "pretrained.yaml")
    assert pretrained.fingerprint(SETTINGS, str(tmp_path)) in names, "the files may lie elsewhere"
    pretrained.CONFIG.write_text(pretrained.CONFIG.read_text().replace("1e-5", "2e-5"))
    assert pretrained.fingerprint(SETTINGS, str(tmp_path)) not in names
    assert len(names) == 3


def test_an_accuracy_is_reached_when_ten_steps_have_it():
    row = {"accuracy": [0.0] * 5 + [0.8] * 10, "seconds": [2.0] * 15}
    assert pretrained.reached(row, 0.4) == 20.0  # five of ten steps
    assert pretrained.reached(row, 0.75) == 30.0 and pretrained.reached(row, 0.9) is None
    row |= {"line": "ours", "like": "a", "settings": {"training": {"random_seed": 3}}}
    other = row | {"line": "trl", "seconds": [9.0] * 12, "accuracy": [0.0] * 2 + [0.5] * 10}
    shown = pretrained.race([row, other])
    assert "| ours, seed 3 | 2.0 | 20 s | 24 s | 26 s | 28 s | 30 s |" in shown and "first 12" in shown
    assert f"| trl, seed 3 | 9.0 | 90 s | 108 s |{' not in 12 steps |' * 3}" in shown


def test_trl_gets_the_prompts_that_our_run_draws():
    run = pretrained.load(SETTINGS, MODEL, "validation", 4)
    config = pretrained.config_of(SETTINGS, MODEL)
    rows = pretrained.prompts_in_order(config, run.engine.tokenizer)
    run.train_problems, run.config = pretrained_problems(run, config), config
    drawn = [problem for _ in range(2) for problem in next_problems(run, 16)]
    assert [row["prompt"] for row in rows[:32]] == [problem.prompt_text for problem in drawn]
    assert [row["right"] for row in rows[:32]] == [problem.row["answer"] for problem in drawn]
    assert rows[0]["prompt"].startswith("What is 3 + 14?\nAnswer: 17\n\nWhat is 47") and rows[0]["prompt"].endswith(
        "?\nAnswer:"
    )


def pretrained_problems(run, config):
    """The training problems, which a run that only evaluates does not load."""
    from src.tasks import load_train_rows, make_problems

    return make_problems(run.task, load_train_rows(run.task), run.engine.tokenizer, config.training.max_prompt_len)


@pytest.mark.parametrize("line", ["base", "lora"])
def test_a_run_trains_and_measures(line, tmp_path):
    settings = SETTINGS | (pretrained.LINES[line] | {"training": SETTINGS["training"]} if line == "lora" else {})
    found = pretrained.run_alone(line, settings, tmp_path, MODEL)
    assert set(pretrained.COLUMNS) <= set(found["metrics"]) and len(found["said"]) == 4
    assert abs(found["metrics"]["kl"]) < 1e-3
    if line == "lora":
        assert len(found["seconds"]) == len(found["accuracy"]) == 2 and set(found["curve"]) == {0, 2}
        assert (tmp_path / "runs" / "pretrained_Sums" / "final" / "model.safetensors").is_file()


@pytest.fixture
def sweep(monkeypatch, capsys, tmp_path):
    """Runs the sweep with runs that take no time, of which the n-th fails; gives its document, and what was run."""

    def go(*words: str, fails: int | None = None) -> tuple[dict | None, list[str]]:
        taken: list[str] = []

        def take(line, settings, options):
            if len(taken) == fails:
                raise SystemExit("stopped")
            taken.append(f"{line} {settings.get('training', {}).get('random_seed', '')}".strip())
            metrics = dict.fromkeys(pretrained.COLUMNS, 0.1 * len(taken))
            row = {"run": f"{line}-{pretrained.fingerprint(settings, MODEL)}", "line": line, "settings": settings,
                   "like": pretrained.like(line, settings, MODEL), "metrics": metrics}  # fmt: skip
            if line != "base":
                row |= {"seconds": [1.0] * 12, "accuracy": [0.5] * 12, "curve": {}}
            pretrained.append(row, options.results)
            return row

        monkeypatch.setattr(pretrained, "take", take)
        options = ["--results", str(tmp_path / "r.jsonl"), "--processes", "1", *words]
        monkeypatch.setattr(sys, "argv", ["pretrained", *options])
        try:
            pretrained.main()
        except SystemExit:
            return None, taken
        text = capsys.readouterr().out
        assert "| greedy, lenient | " in text
        return json.loads(text.splitlines()[-1]), taken

    return go


def test_a_sweep_that_is_stopped_goes_on(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "gguf" else name)
    whole = ["base", "ours 0", "trl 0", "ours 1", "ours 2", "lora 0", "lora 1", "lora 2"]
    document, first = sweep("--model", MODEL, fails=3)
    assert document is None and first == whole[:3]
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('{"run": "cut o')  # killed while it wrote
    document, later = sweep("--model", MODEL)
    assert later == whole[3:] and len(document["runs"]) == 8
    assert sweep("--model", MODEL)[1] == [] and (tmp_path / "r.png").stat().st_size > 5_000
    assert len(sweep("--model", MODEL, "--steps", "20", "--lines", "ours")[1]) == 3
    shown, taken = sweep("--show", str(tmp_path / "r.jsonl"))
    assert taken == [] and [row["line"] for row in shown["runs"]] == ["base", *["ours"] * 3, "trl", *["lora"] * 3]
    assert shown["runs"][1]["metrics"]["greedy"] == 0.1, "the newest of ours, not those of 150 steps too"
    for words in ((), ("--show", str(tmp_path / "none.jsonl")), ("--model", "models/none"),
                  ("--model", MODEL, "--samples", "4"), ("--convert", "a.whl", "folder")):  # fmt: skip
        assert sweep(*words) == (None, [])
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)  # TRL is not there
    assert sweep("--model", MODEL, "--seeds", "4") == (None, [])


def test_what_is_committed_is_of_todays_lines():
    rows = list(pretrained.read_results(pretrained.PROJECT / "benchmarks" / "pretrained.jsonl").values())
    of_ours = pretrained.of_line(rows, "ours")
    assert [row["settings"]["training"] for row in of_ours] == [{"max_steps": 150, "random_seed": n} for n in range(3)]
    assert {row["line"] for row in rows} >= {"base", "ours", "trl"}
    for row in rows:
        assert set(pretrained.COLUMNS) <= set(row["metrics"]) and row["settings"]["problems"] == pretrained.PROBLEMS
        assert len(row["said"]) == pretrained.SHOWN
    base = pretrained.of_line(rows, "base")[0]["metrics"]
    assert all(row["metrics"]["lenient/greedy"] > base["lenient/greedy"] + 0.2 for row in of_ours)
