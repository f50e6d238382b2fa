"""The examples as a user runs them: by main.py and their own configs, on the model that is embedded for them."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import main
from examples.make_model import TEMPLATE, WORDS, conversation_batch
from src.config import load_config
from src.engine.plan import memory_plan
from src.make_tiny_model import build_tokenizer
from src.prepare import prepare
from src.run.reading import read_rows

PROJECT = Path(__file__).resolve().parent.parent
MODEL = PROJECT / "models" / "turns-tiny"
EXAMPLES = sorted(path.stem for path in (PROJECT / "examples").glob("*.yaml"))
SHORT = ["training.batch_size=16", "training.num_questions_per_batch=4", "training.minibatches=2",
         "data.train_size=16", "data.eval_size=8", "data.eval_samples=2", "training.eval_interval=0"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """main.py on an example in a folder of its own; its run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str, steps: int = 2, arguments: tuple[str, ...] = ()) -> Path:
        words = ["main.py", "--config", str(PROJECT / "examples" / f"{name}.yaml"), "--dataset_name", name, *arguments]
        sets = [*SHORT, f"training.max_steps={steps}", *overrides]
        monkeypatch.setattr(sys, "argv", [*words, "--set", *sets])
        assert main.main() == 0
        return tmp_path / "runs" / f"{name}_{name}"

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_by_the_command_in_its_docstring(name, run, caplog):
    source = (PROJECT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"python main.py --config examples/{name}.yaml --dataset_name {name}\n" in source
    folder = run(name)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "rollout/turns" in row]
    assert len(rows) == 2 and all(row["rollout/turns"] > 1 for row in rows)
    assert all(row["rollout/mismatch"] < 1e-4 for row in rows), "over all turns"
    assert "reward errors so far" not in caplog.text


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_evaluation_of_an_example_has_the_same_turns_and_its_file_whole_transcripts(name, run):
    folder = run(name, arguments=("--eval_only",))
    (file,) = folder.parent.glob("*/completions.jsonl")
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    told = r"<\|user\|>(.*Try again\.|higher|lower)<\|assistant\|><|</tool><\|tool\|>\d+<\|assistant\|><answer>"
    assert len(texts) == 8 * 3 and any(re.search(told, text) for text in texts)


def test_the_model_is_what_its_program_makes():
    tokenizer, made = AutoTokenizer.from_pretrained(MODEL), build_tokenizer(WORDS, TEMPLATE)
    assert tokenizer.get_vocab() == made.get_vocab() and tokenizer.chat_template == made.chat_template
    size = sum(file.stat().st_size for folder in (PROJECT / "models").iterdir() for file in folder.iterdir())
    assert size < 5e6, "both embedded models"


def test_what_a_demonstration_is_told_is_not_learned():
    tokenizer = build_tokenizer(WORDS, TEMPLATE)
    ids, labels = conversation_batch(random.Random(0), tokenizer, 64, 0.5)
    for row, learned in zip(ids.tolist(), labels.tolist(), strict=True):
        text = tokenizer.decode([token for token, label in zip(row, learned, strict=True) if label >= 0])
        assert text.endswith("<|end|>") or not text  # a first attempt that is right, where it was to fail
        assert "<|user|>" not in text and "Try again" not in text and "higher" not in text
        assert tokenizer.unk_token_id not in row


@pytest.mark.parametrize("dataset, told", [("second_attempt", 32), ("countdown", 0)])
def test_where_a_task_replies_memory_and_cache_are_planned_for_all_that_may_be_told(dataset, told):
    """One reply, as long as max_prompt_len."""
    run = prepare(load_config(PROJECT / "examples" / "second_attempt.yaml", SHORT), dataset, PROJECT)
    (episode, *_) = run.engine.longest_groups()[0].episodes
    assert len(episode.token_ids) == run.config.training.max_gen_len + told
    plain = memory_plan(load_config(PROJECT / "examples" / "second_attempt.yaml", SHORT), run.engine.model, None)
    assert (memory_plan(run.config, run.engine.model, None)["rollout"] > plain["rollout"]) == (told > 0)
