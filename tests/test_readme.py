"""The README's own task, own reward, scored file and LoRA command, executed as they stand, on a few steps."""

import json
import re
from pathlib import Path

import pytest

from src.config import load_config
from src.train_grpo import run_evaluation, run_training

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
CONFIG = PROJECT / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SHORT = ["training.max_steps=2", "training.batch_size=16", "training.num_questions_per_batch=4", "data.eval_size=4",
         "data.eval_samples=2", "data.train_size=16", "training.eval_interval=0"]  # fmt: skip


def code_of(language: str, first_line: str) -> str:
    """The README's only block that begins so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(first_line)]
    return block


def rows_of(tmp_path: Path) -> list[dict]:
    (file,) = tmp_path.glob("runs/*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_task_of_ones_own(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text(code_of("python", "# my_task.py"))
    assert "data.task_file=my_task.py" in README and "--dataset_name SortList" in README
    more = [f"data.task_file={file}", "data.prompt_format=raw", "training.max_prompt_len=400"]
    run_training(load_config(CONFIG, [*SHORT, *more]), "SortList", tmp_path)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["train/reward"] == rows[-1]["train/answer"]
    from src.rl_datasets import get_task

    task = get_task("SortList", load_config(CONFIG, more).data)
    row = {"numbers": [30, 4, 11]}
    answers = ("so <answer>[4, 11, 30]</answer>", "<answer>[30, 4, 11]</answer>", "")
    assert [task.reward(text, row)["answer"] for text in answers] == [1, 0, 0]


def test_a_reward_of_ones_own(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(code_of("python", "# my_rewards.py"))
    more = [f"data.reward_functions={file}:short", "data.reward_weights=0.5"]
    config = load_config(CONFIG, [*SHORT, *more])
    run_evaluation(config, "countdown", tmp_path)
    (report,) = tmp_path.glob("runs/*_eval/completions.jsonl")
    from src.rl_datasets import get_task

    targets = [row["target"] for row in get_task("countdown", config.data).load("test")]
    for row in map(json.loads, report.read_text(encoding="utf-8").splitlines()):
        short = -0.01 * len(row["text"]) + 0.1 * (str(targets[row["problem"]]) in row["text"])
        assert row["parts"]["short"] == pytest.approx(short)
        assert row["reward"] == pytest.approx(row["parts"]["reward"] + 0.5 * short)


@pytest.mark.parametrize("loss_type", ["none", "maxent", "listwise_kl"])
def test_scored_completions(tmp_path, loss_type):
    line = json.loads(code_of("json", '{"prompt"'))
    file = tmp_path / "scored.jsonl"
    with file.open("w") as lines:  # groups of different sizes; the embedded model's template reads nums and target
        for number in range(60):
            row = {**line, "prompt": f"{number}?", "nums": [number % 7 + 1, 2, 3], "target": number}
            row["completions"] = row["completions"] + [{"text": "5 4", "score": 0.25}] * (number % 3)
            lines.write(json.dumps(row) + "\n")
    config = CONFIG.parent / next(path for path in CONFIG.parent.iterdir() if f"config_{loss_type}_" in path.name).name
    more = [f"data.path={file}", "training.old_logprobs=trainer", "training.learning_rate=0.002"]
    more += ["training.max_steps=12", "data.eval_size=100"]
    last = run_training(load_config(config, [*SHORT, *more]), "scored", tmp_path)
    first = rows_of(tmp_path)[0]
    assert last["eval/best_probability"] > first["eval/best_probability"] + 0.05
    assert "rollout/mismatch" not in rows_of(tmp_path)[-1], "nothing was sampled"


def test_lora(tmp_path):
    command = next(line for line in README.splitlines() if "configs_lora" in line and line.startswith("uv run"))
    path = PROJECT / re.search(r"--config (\S+)", command)[1]
    run_training(load_config(path, SHORT), "countdown", tmp_path)
    (final,) = tmp_path.glob("runs/*/final")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in final.iterdir()}
    evaluated = run_evaluation(load_config(path, [*SHORT, f"lora.path={final}"]), "countdown", tmp_path)
    assert evaluated == {name: value for name, value in rows_of(tmp_path)[-1].items() if name in evaluated}


def test_every_python_file_and_folder_that_is_named_is_there():
    for name in re.findall(r"(?:src|benchmarks|configs|tests)/[\w./-]*\w", README):
        assert (PROJECT / name).exists(), name
