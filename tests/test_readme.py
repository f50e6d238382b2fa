"""The README, executed: every block and every command of it, as it stands or shortened."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import main
import src.train_grpo as method
from src.config import load_config
from src.engine import Engine
from src.engine.packing import pack
from src.records import Episode, Group, Problem
from src.rl_datasets import get_task
from src.run import Run
from src.run.reading import read_rows

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CONFIG = PROJECT / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SHORT = ["training.max_steps=1", "training.batch_size=8", "training.num_questions_per_batch=4", "data.train_size=8",
         "training.max_gen_len=24", "data.eval_size=4", "data.eval_samples=2", "training.eval_interval=0"]  # fmt: skip
NOT_FIRST = "training.eval_first=false"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
COMMAND = re.compile(r"(?:python|uv|pip|git|main\.py) |--\w")  # how a command begins in running text
EXECUTED: dict[str, str] = {}  # a command, or the first line of another block: the test that executes it


def executes(*commands: str):
    """The test runs these commands or blocks of the README."""

    def register(test):
        EXECUTED.update(dict.fromkeys(commands, test.__name__))
        return test

    return register


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands_of(text: str) -> set[str]:
    """Each line of a bash block, the first of another (of a diff the first that it adds), and those in the prose."""
    found = set()
    for language, content in blocks_of(text):
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        if language == "diff":
            lines = [line for line in lines if re.match(r"\+[^+]", line)]
        found.update(lines if language == "bash" else lines[:1])
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return found | {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose) if COMMAND.match(span)}


def block_with(line: str) -> str:
    """The one block that has this line."""
    (block,) = [content for _, content in blocks_of(README + CONTRIBUTING) if f"\n{line}\n" in f"\n{content}"]
    return block


def rows_of(tmp_path: Path) -> list[dict]:
    (file,) = tmp_path.glob("runs/*/metrics.jsonl")
    return read_rows(file)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """main.py's part of a command in a folder of its own, with further overrides."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(PROJECT / name)

    def run(command: str, *overrides: str) -> int:
        words = shlex.split(command.rpartition("&& ")[2])
        monkeypatch.setattr(sys, "argv", [*words[words.index("main.py") :], "--set", *overrides])
        return main.main()

    return run


# ---------------------------------------------------------------------------------------------------------------------
# What it says is complete
# ---------------------------------------------------------------------------------------------------------------------


def test_every_command_and_block_of_the_readme_is_executed_by_a_test():
    there = commands_of(README)
    new = sorted(there - set(EXECUTED))
    assert not new, f"the README has commands that no test executes: {new}; run them in a test under @executes(...)"
    gone = {command: test for command, test in EXECUTED.items() if command not in there}
    assert not gone, f"tests execute what the README does not say any more: {gone}"
    assert len(README.splitlines()) <= 250, "it is read in one sitting"


def test_commands_are_found_wherever_they_stand():
    text = "a `python -m x --y`, `uv run z`, `--set a.b=c` and `no_command`\n\n```bash\none && two\nthree\n```\n"
    text += "\n```\na drawing\nof two lines\n```\n\nwrapped `python -m\nx`\n\n```python\n# file.py\n```\n"
    text += "```diff\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+new\n+newer\n```\n"
    prose, blocks = {"python -m x --y", "uv run z", "--set a.b=c", "python -m x"}, {"one && two", "three", "a drawing"}
    assert commands_of(text) == prose | blocks | {"# file.py", "+new"}


@executes("main.py             the command line")
def test_what_is_named_is_there_and_the_house_is_whole():
    for page in ("README.md", "CONTRIBUTING.md", "benchmarks/FLEET.md"):
        for name in re.findall(r"(?:src|benchmarks|configs|tests)/[\w./-]*\w", (PROJECT / page).read_text("utf-8")):
            assert (PROJECT / name).exists() or "_X" in name, f"{page}: {name}"
    for name in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (PROJECT / name).is_file(), name
    named = set(re.findall(r"src/\w+(?:\.py|/)", block_with("main.py             the command line")))
    packages = {f"src/{door.parent.name}/" for door in (PROJECT / "src").glob("*/__init__.py")}
    assert named == packages | {f"src/{file.name}" for file in (PROJECT / "src").glob("*.py")} - {"src/__init__.py"}


def test_the_source_is_as_long_as_the_comparison_says():
    ((loop, behind),) = re.findall(r"about (\d+) lines; ([\d,]+) more are behind doors", README)
    files = [file for kind in ("*.py", "*.c", "*.h") for file in (PROJECT / "src").rglob(kind)]
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    own = lines.pop(PROJECT / "src" / "train_grpo.py")
    assert abs(int(loop) - own) < 30 and abs(int(behind.replace(",", "")) - sum(lines.values())) < 400


def test_figures_stand_in_the_results():
    """Each number of the tables of figures and of learning that has a point or a comma is in benchmarks/RESULTS.md."""
    results = (PROJECT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for title, least in (("## Figures", 10), ("## What it learns", 20), ("## Several turns", 8)):
        section = README.split(f"{title}\n")[1].split("\n## ")[0]
        numbers = set(re.findall(r"\d+(?:[.,]\d+)+", "".join(re.findall(r"(?m)^\|.*", section))))
        assert len(numbers) >= least
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", results), f"{number} is not in RESULTS.md"


@executes("tokens     [ prompt A | A1      | A2   | A3         | prompt B | B1   | B2      | ... ]")
def test_the_drawing_of_a_packed_row_and_what_is_written():
    lengths = {"A": (3, (2, 1, 4)), "B": (2, (1, 2))}
    groups = [
        Group(Problem(i, (5,) * prompt, "", {}), tuple(Episode((7,) * n, (0.0,) * n, True, "") for n in completions))
        for i, (prompt, completions) in enumerate(lengths.values())
    ]
    row = pack(groups, "cpu", torch.float32)
    expected = [0, 1, 2] + [3, 4] + [3] + [3, 4, 5, 6] + [0, 1] + [2] + [2, 3]
    assert row.position_ids[0].tolist() == expected, "in the order of the drawing, each completion from its prompt on"
    assert row.batch.token_ids.tolist() == [7] * 10 and row.batch.lengths.tolist() == [2, 1, 4, 1, 2]
    answered = Episode((7, 8, 9, 6), (0.0, 0.0), True, "", written=(True, False, False, True))  # a tool wrote 8 and 9
    row = pack([Group(Problem(0, (5,), "", {}), (answered,))], "cpu", torch.float32)
    assert row.input_ids.tolist() == [[5, 7, 8, 9, 6]] and row.batch.token_ids.tolist() == [7, 6], "two are in the loss"


@executes(next(line for line in README.splitlines() if line.startswith("for step in run.steps(evaluate):")))
def test_the_loop_calls_what_there_is():
    loop = block_with("    run.record(metrics, groups)")
    compile(loop, "README.md", "exec")
    for owner, name in set(re.findall(r"((?:\w+\.)*)(\w+)\(", loop)) - {("", "parts_of")}:
        assert hasattr({"": method, "run.": Run, "run.engine.": Engine}[owner], name), name
    for verb in ("sample", "forward_backward", "optim_step", "state", "load"):
        assert f"`{verb}`" in README and hasattr(Engine, verb)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

FIRST = "pip install uv && uv run main.py --config configs/recipes/grpo.yaml --dataset_name countdown"


@executes(FIRST, "python main.py", "python main.py --doctor runs/NAME", "--dataset_name", "--eval_only", "--check",
          "--fresh", "--name NAME", "--profile", "--set model.pretrained_model_path=runs/.../final")  # fmt: skip
def test_the_first_command_and_its_switches(run, tmp_path, capsys, monkeypatch):
    short = [*SHORT, "training.max_steps=2", "training.learning_rate=1e-4"]
    assert run(f"{FIRST} --check", *short) == 0
    shown = capsys.readouterr().out
    assert "memory      estimated" in shown and "prompt      the first one" in shown
    assert run(f"{FIRST} --profile --quiet", *short) == 0
    assert re.search(r"(?m)^policy forward .*\n(?:.*\n)*step  ", capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()
    assert run(FIRST, *short) == 0
    shown = capsys.readouterr().out
    assert "\nbefore " in shown and "\nafter " in shown, "its accuracy before and after"
    assert "step 1/2" in shown
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["train/learning_rate"] == pytest.approx(1e-4 * 2 / 5), "the second of five steps of warm-up"
    folder = tmp_path / "runs" / "grpo_countdown"
    final = f"model.pretrained_model_path={folder / 'final'}"
    assert run(f"{FIRST} --eval_only", *short, final) == 0
    evaluated = json.loads((folder.parent / f"{folder.name}_eval" / "report.json").read_text())["metrics"]
    assert evaluated["eval/greedy"] == rows[2]["eval/greedy"]
    assert run(f"{FIRST} --fresh", *short, "training.max_steps=1", NOT_FIRST) == 0
    assert (folder.parent / f"{folder.name}.1" / "final").is_dir() and (folder / "final").is_dir()
    assert run(f"{FIRST} --name NAME", *short, "training.max_steps=1", NOT_FIRST) == 0
    assert (folder.parent / "NAME_countdown" / "final").is_dir()
    monkeypatch.setattr(sys, "argv", ["main.py", "--doctor", "runs/NAME_countdown"])
    capsys.readouterr()
    assert main.main() == 0 and "1 steps are too few to judge a run by" in capsys.readouterr().out


@executes("pip install uv && uv run pytest", "python -m pytest", "pip install -r requirements.txt")
def test_the_test_command(tmp_path):
    file = tmp_path / "test_one.py"
    file.write_text("def test_one():\n    assert 'src' in __import__('src').__name__\n")
    words = ["-m", "pytest", str(file), "-n", "0", "-c", str(PROJECT / "pyproject.toml")]  # it makes `src` importable
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    # that pip would accept every line of requirements.txt, and the versions, are tested in test_project.py
    lock = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    assert {"torch", "transformers", "pytest", "matplotlib"} <= set(re.findall(r"(?m)^([\w.-]+)==", lock))


@executes("uv run torchrun --nproc_per_node 2 main.py", "python -m pytest tests/test_distributed.py")
def test_two_processes(tmp_path):
    words = ["--nproc_per_node", "2", str(PROJECT / "main.py"), "--config", str(CONFIG), "--dataset_name", "countdown"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, "--set", *SHORT]
    done = subprocess.run([*command, NOT_FIRST], cwd=tmp_path, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    proofs = (PROJECT / "tests" / "test_distributed.py").read_text(encoding="utf-8")
    assert "def test_two_processes_have_the_gradient_of_one" in proofs


@executes("uv run tensorboard --logdir runs")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    from tensorboard.program import TensorBoard  # here, for its warnings

    board = TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", str(tmp_path), "--port", "0", "--load_fast", "false"])
    assert "TensorBoard" in urllib.request.urlopen(board.launch(), timeout=60).read().decode()


@executes("uv run main.py --config configs/configs_lora/config_kl_beta0.04_r16_tiny.yaml --dataset_name countdown")
def test_lora(run, tmp_path):
    (command,) = [name for name in commands_of(README) if "configs_lora" in name]
    assert run(command, *SHORT, NOT_FIRST) == 0
    (final,) = tmp_path.glob("runs/*/final")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in final.iterdir()}
    assert run(f"{command} --eval_only", *SHORT, f"lora.path={final}") == 0
    evaluated = json.loads(next(tmp_path.glob("runs/*_eval/report.json")).read_text())["metrics"]
    last = rows_of(tmp_path)[-1]
    assert evaluated["eval/greedy"] == last["eval/greedy"] and evaluated["eval/pass@1"] == last["eval/pass@1"]


BENCHMARKS = {  # what makes them short; of those that have no form of a few seconds only the options are read
    "python -m benchmarks.learning --set training.max_steps=60": None,
    "python -m benchmarks.frontier": None,
    "python -m benchmarks.frontier --show benchmarks/frontier.jsonl": " ",
    "python -m benchmarks.pretrained --show benchmarks/pretrained.jsonl": " ",
    "python -m benchmarks.gpu_first --output OUT": None,
    "python -m benchmarks.ot_figure": None,
    "uv run --group benchmarks python -m benchmarks.step --repetitions 3": None,
    "python -m benchmarks.rollout --repetitions 5 --skip generate_batch": "--shape tiny --quick --lengths fixed",
    "python -m benchmarks.optimizer": None,
    "python -m benchmarks.kill_storm": None,
    "python -m benchmarks.doctor": None,
    "python -m benchmarks.audit_reasoning_gym": None,
    "python -m benchmarks.fp32_head --model PATH": None,
}


EXAMPLES = [
    f"python main.py --config examples/{name}.yaml --dataset_name {name}"
    for name in ("second_attempt", "higher_lower", "calculator")
]


CHAIN_SUM = (
    "uv run --with reasoning-gym==0.1.25 main.py --config configs/configs_gym/chain_sum_smollm2.yaml "
    "--dataset_name rg:chain_sum"
)


@executes(CHAIN_SUM)
def test_reasoning_gym(run, tmp_path, capsys):
    """As far as the packages here allow; without reasoning-gym the line that says how to get it."""
    model = ["model.pretrained_model_path=models/countdown-tiny", "model.dtype=float32", "training.max_prompt_len=1500"]
    code = run(CHAIN_SUM, *SHORT, NOT_FIRST, *model)
    if find_spec("reasoning_gym"):
        assert code == 0 and rows_of(tmp_path)[-1]["step"] == 1
    else:
        assert code == 2 and "uv run --with reasoning-gym==0.1.25 main.py" in capsys.readouterr().err


@executes(*EXAMPLES)
@pytest.mark.parametrize("command", EXAMPLES)
def test_examples(command, run, tmp_path):
    assert run(command, *SHORT, NOT_FIRST, "training.max_gen_len=72") == 0
    assert rows_of(tmp_path)[0]["rollout/turns"] >= 1


@executes(*BENCHMARKS)
@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks(command, monkeypatch, capsys):
    words, shorter = command.partition("python -m ")[2].split(), BENCHMARKS[command]
    monkeypatch.setattr(sys, "argv", words + (shorter or "").split())
    benchmark = importlib.import_module(words[0])
    if shorter:
        assert not benchmark.main()
        json.loads(capsys.readouterr().out.splitlines()[-1])
        return
    read = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *given: sys.exit(f"read: {read(*given)}"))
    with pytest.raises(SystemExit, match="read: Namespace"):
        benchmark.main()


# ---------------------------------------------------------------------------------------------------------------------
# What one changes and adds
# ---------------------------------------------------------------------------------------------------------------------

CHANGED = """
import main, sys, torch
from dataclasses import replace
from types import SimpleNamespace as Bag
import src.train_grpo as method
from src.penalties import PENALTIES

policy, anchor = torch.randn(2, 7, dtype=torch.float64).unbind()
policy.requires_grad_()
p, q = policy.log_softmax(0), anchor.log_softmax(0)
by = lambda value: torch.autograd.grad(value, policy, retain_graph=True)[0]
value, metrics = PENALTIES["hellinger"](Bag(logprobs=p, anchor_logprobs=q), None, None)
distance = 1 - (0.5 * (p + q)).exp().sum()
assert torch.allclose(by((p.exp().detach() * value).sum()), by(distance)), "its gradient at the sampled tokens"
assert torch.allclose((p.exp() * metrics["train/hellinger"]).sum(), distance)
same = PENALTIES["hellinger"](Bag(logprobs=p, anchor_logprobs=p.detach()), None, None)[0]
assert same.abs().max() == 0 and by(same.sum()).abs().max() == 0, "zero at equality"
js, m = PENALTIES["js"].distance(None), (p.exp() + q.exp()) / 2
textbook = 0.5 * (p.exp() * (p.exp() / m).log()).sum() + 0.5 * (q.exp() * (q.exp() / m).log()).sum()
assert torch.allclose(js(policy[None], anchor[None])[0], textbook)
assert torch.allclose(by(js(policy[None], anchor[None]).sum()), by(textbook))
assert js(torch.tensor([[0.0, -400.0]]), torch.tensor([[-400.0, 0.0]])).item() == torch.tensor(2.0).log(), "far apart"
objective, train_step = method.objective, method.train_step
def with_kl_in_the_reward(training, scores, batch):
    kl = (scores.logprobs - scores.anchor_logprobs).detach()
    return objective(training, scores, replace(batch, advantages=batch.advantages - 0.1 * kl))
def with_a_metric_and_a_state(run, step):
    metrics, groups = train_step(run, step)
    run.state["mine"] = run.state.get("mine", 0.0) + step
    return metrics | {"mine/sum": run.state["mine"]}, groups
method.objective, method.train_step = with_kl_in_the_reward, with_a_metric_and_a_state
arguments = list(sys.argv)
for steps in (2, 3):  # the second goes on from the checkpoint of the first
    sys.argv = [*arguments, f"training.max_steps={steps}"]
    assert main.main() == 0
"""
DIFFS = [next(line for line in (README + CONTRIBUTING).splitlines() if line.startswith(start))
         for start in ('+@penalty("hellinger")', '+@penalty("js"')]  # fmt: skip


@executes("git apply", DIFFS[0], "--set training.loss_type=hellinger --name hellinger")
def test_what_the_readme_changes(tmp_path):
    """All diffs, one after the other, in a copy; the two penalties against their formulas, and a run with all of it."""
    for name in ("src", "configs", "models/countdown-tiny"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "main.py", tmp_path)
    (tmp_path / "changed.py").write_text(CHANGED)
    environment = ONE_THREAD | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for number, line in enumerate(DIFFS):
        (tmp_path / f"{number}.diff").write_text(block_with(line))
        subprocess.run(["git", "apply", f"{number}.diff"], cwd=tmp_path, check=True, env=environment)
    command = [sys.executable, "changed.py", *FIRST.split("main.py ")[1].split(), "--name", "hellinger"]
    words = ["--set", *SHORT, NOT_FIRST, "training.epsilon=0.1", "training.loss_type={hellinger: 0.1, js: 0.1}"]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3] and next(tmp_path.glob("runs/hellinger_countdown"))
    assert rows[2]["penalty/hellinger"] > 0 and rows[2]["penalty/js"] > 0, "the policy has left the reference"
    assert rows[2]["train/hellinger"] != 0 and 0 < rows[2]["train/js"] < 0.7
    assert [row["mine/sum"] for row in rows] == [1, 3, 6], "what was in run.state is there after the stop"


@executes("# my_task.py", "--set data.task_file=my_task.py --dataset_name SortList",
          "--set data.prompt_format=raw training.max_prompt_len=400")  # fmt: skip
def test_a_task_of_ones_own(run, tmp_path):
    (tmp_path / "my_task.py").write_text(block_with("# my_task.py"))
    command = f"main.py --config {CONFIG} --set data.task_file=my_task.py --dataset_name SortList"
    assert run(command, *SHORT, "data.prompt_format=raw", "training.max_prompt_len=400") == 0
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1] and rows[-1]["train/reward"] == rows[-1]["reward/answer"]
    task = get_task("SortList", load_config(CONFIG, ["data.task_file=my_task.py"]).data)
    row = {"numbers": [30, 4, 11]}
    answers = ("so <answer>[4, 11, 30]</answer>", "<answer>[30, 4, 11]</answer>", "")
    assert [task.reward(text, row)["answer"] for text in answers] == [1, 0, 0]


@executes("# my_rewards.py", "--set data.reward_functions=my_rewards.py:short")
def test_a_reward_of_ones_own(run, tmp_path):
    (tmp_path / "my_rewards.py").write_text(block_with("# my_rewards.py"))
    command = f"main.py --config {CONFIG} --dataset_name countdown --set data.reward_functions=my_rewards.py:short"
    assert run(f"{command} --eval_only", *SHORT, "data.reward_weights=0.5") == 0
    (report,) = tmp_path.glob("runs/*_eval/completions.jsonl")
    targets = [row["target"] for row in get_task("countdown", load_config(CONFIG, SHORT).data).load("test")]
    for row in map(json.loads, report.read_text(encoding="utf-8").splitlines()):
        short = -0.01 * len(row["text"]) + 0.1 * (str(targets[row["problem"]]) in row["text"])
        assert row["parts"]["short"] == pytest.approx(short)
        assert row["reward"] == pytest.approx(row["parts"]["reward"] + 0.5 * short)
    assert run(command, *SHORT, NOT_FIRST) == 0
    assert rows_of(tmp_path)[-1]["reward/short"] != 0


@executes(
    '{"prompt": "What is 2 + 3?", "completions": [{"text": "5", "score": 1.0}, {"text": "6", "score": 0.0}]}',
    "--dataset_name scored --set data.path=scored.jsonl",
)
@pytest.mark.parametrize("loss_type", ["none", "maxent", "listwise_kl"])
def test_scored_completions(run, tmp_path, loss_type):
    (line,) = [json.loads(content) for language, content in blocks_of(README) if language == "json"]
    with (tmp_path / "scored.jsonl").open("w") as lines:
        # groups of different sizes; the embedded model's template reads nums and target
        for number in range(60):
            row = {**line, "prompt": f"{number}?", "nums": [number % 7 + 1, 2, 3], "target": number}
            row["completions"] = row["completions"] + [{"text": "5 4", "score": 0.25}] * (number % 3)
            lines.write(json.dumps(row) + "\n")
    config = sorted(CONFIG.parent.glob(f"config_{loss_type}_*.yaml"))[0]
    more = ["training.old_logprobs=trainer", "training.learning_rate=4e-3", "training.max_steps=5", "data.eval_size=99"]
    assert run(f"main.py --config {config} --dataset_name scored --set data.path=scored.jsonl", *SHORT, *more) == 0
    rows = rows_of(tmp_path)
    assert rows[-1]["eval/best_probability"] > rows[0]["eval/best_probability"] + 0.05
    assert "rollout/mismatch" not in rows[-1], "nothing was sampled"
