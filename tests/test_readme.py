"""The README, executed: every block and every command of it, as it stands or shortened, and its tables made again."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import main
from benchmarks import tables
from src.config import SECTIONS, load_config
from src.packing import Episode, Group, pack
from src.rl_datasets import Problem, get_task

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
CONFIG = PROJECT / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SHORT = ["training.max_steps=2", "training.batch_size=16", "training.num_questions_per_batch=4", "data.eval_size=4",
         "data.eval_samples=2", "data.train_size=16", "training.eval_interval=0"]  # fmt: skip
COMMAND = re.compile(r"(?:python|uv|pip|git|source|main\.py) |--\w")  # how a command begins in running text
EXECUTED: dict[str, str] = {}  # a command, or the first line of another block: the test that executes it


def executes(*commands: str):
    """The test runs these commands or blocks of the README."""

    def register(test):
        EXECUTED.update(dict.fromkeys(commands, test.__name__))
        return test

    return register


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks, also of indented ones."""
    fence = r"^( *)```(\w*)\n(.*?)^\1```$"
    return [(language, content) for _, language, content in re.findall(fence, text, re.DOTALL | re.MULTILINE)]


def commands_of(text: str) -> set[str]:
    """Each line of a bash block, the first line of any other block, and the commands within the prose."""
    found = set()
    for language, content in blocks_of(text):
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        found.update(lines if language == "bash" else lines[:1])
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"<!--.*?-->", "", prose)
    tables = r"<!-- keys .*?<!-- end of keys"  # what a key means is no command
    prose = re.sub(tables, "", prose, flags=re.DOTALL)
    return found | {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose) if COMMAND.match(span)}


def block_that_begins(first_line: str) -> str:
    (block,) = [content for _, content in blocks_of(README) if content.strip().startswith(first_line)]
    return block


def rows_of(tmp_path: Path) -> list[dict]:
    (file,) = tmp_path.glob("runs/*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """main.py's part of a command in a folder of its own, with further overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")

    def run(command: str, *overrides: str) -> int:
        words = shlex.split(command.rpartition("&& ")[2])
        words = words[words.index("main.py") :]
        monkeypatch.setattr(sys, "argv", words + [word for override in overrides for word in ("--set", override)])
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


def test_commands_are_found_wherever_they_stand():
    text = "a `python -m x --y`, `uv run z`, `--set a.b=c` and `no_command`\n\n```bash\none && two\nthree\n```\n"
    text += "\n   ```\n   a drawing\n   of two lines\n   ```\n\nwrapped `python -m\nx`\n\n```python\n# file.py\n```\n"
    prose, blocks = {"python -m x --y", "uv run z", "--set a.b=c", "python -m x"}, {"one && two", "three", "a drawing"}
    assert commands_of(text) == prose | blocks | {"# file.py"}


@executes("python -m benchmarks.tables")
def test_the_tables_of_keys_and_memory_are_what_the_code_says(tmp_path, monkeypatch):
    assert tables.rewritten(README) == README, "the README's tables are old; `python -m benchmarks.tables` writes them"
    old = tmp_path / "README.md"
    old.write_text(README.replace("| `kl_estimator` |", "| `gone` |").replace("| 7b |", "| 8b |"), encoding="utf-8")
    monkeypatch.setattr(tables, "README", old)
    tables.main()
    assert old.read_text(encoding="utf-8") == README


def test_every_key_has_a_row_with_its_default_and_choices():
    for section, keys in SECTIONS.items():
        table = README.split(f"<!-- keys {section}:")[1].split("<!-- end of keys")[0]
        rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
        assert [row[0] for row in rows] == [f"| `{name}`" for name in keys.__dataclass_fields__]
        for row, default in zip(rows, vars(keys()).values(), strict=True):
            written = row[1].strip("`").lower()
            assert written == ("(empty)" if default is None else str(default).lower()), row
    for row in ("`kl_estimator` | `k3` | `k1`, `k2`, `k3` |", "`ot_window` | `16` | int, at least 1 |"):
        assert f"| {row}" in README and f"| {row}" in tables.keys_table("training")


def test_the_memory_table_against_arithmetic():
    """Weights, gradients, optimizer states and key-value cache of Qwen2.5, counted by hand from its shapes."""
    shapes = {  # vocabulary, hidden, MLP, layers, width of keys and values, tied head
        "0.5b": (151936, 896, 4864, 24, 2 * 64, True),
        "1.5b": (151936, 1536, 8960, 28, 2 * 128, True),
        "3b": (151936, 2048, 11008, 36, 2 * 128, True),
        "7b": (152064, 3584, 18944, 28, 4 * 128, False),
    }
    table = README.split("<!-- memory:")[1].split("<!-- end of memory")[0]
    rows = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines() if "configs_" in line)
    assert set(rows) == set(shapes)
    for name, (vocabulary, hidden, mlp, layers, narrow, tied) in shapes.items():
        attention = 2 * hidden * hidden + hidden + 2 * (hidden * narrow + narrow)  # q, o, k, v; no bias in o
        layer = attention + 3 * hidden * mlp + 2 * hidden
        parameters = (1 if tied else 2) * vocabulary * hidden + layers * layer + hidden
        weights, optimizer, gradients, reference, rollout, update, total = map(float, rows[name].split(" | ")[1:])
        for cell, size in ((weights, 2), (gradients, 2), (reference, 2), (optimizer, 3)):
            assert cell == pytest.approx(size * parameters / 2**30, abs=0.051)
        slots = 128 if name == "7b" else 256
        # a slot holds its prompt and its completion, and each prompt is there once more; two sets of fp32 logits, twice
        cached = 2 * 2 * layers * narrow * (slots * (256 + 1024) + slots // 16 * 256)
        assert rollout == pytest.approx((cached + 16 * slots * vocabulary) / 2**30, abs=0.051)
        assert total == pytest.approx(weights + optimizer + reference + max(rollout, gradients + update), abs=0.3)
    assert tables.plan_of("3b", "3b")["weights"] == 2 * 3_085_938_688  # what the model card counts, in bf16


def test_every_python_file_and_folder_that_is_named_is_there():
    for name in re.findall(r"(?:src|benchmarks|configs|tests)/[\w./-]*\w", README):
        assert (PROJECT / name).exists(), name


@executes("main.py                command line")
def test_the_layout_names_every_file_of_src():
    layout = block_that_begins("main.py   ")
    named = set(re.findall(r"src/\w+\.py", layout))
    assert named == {f"src/{file.name}" for file in (PROJECT / "src").glob("*.py")} - {"src/__init__.py"}


def test_the_loop_is_as_long_as_the_comparison_says():
    (said,) = re.findall(r"about (\d+) lines, and a file for each part", README)
    lines = len((PROJECT / "src" / "train_grpo.py").read_text(encoding="utf-8").splitlines())
    assert abs(int(said) - lines) < 30, f"src/train_grpo.py has {lines} lines"


def test_figures_stand_in_the_results():
    """Each number of the table of figures that has a point or a comma is in benchmarks/RESULTS.md too."""
    table = README.split("## Figures")[1].split("\n\n")[2]
    results = (PROJECT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d+(?:[.,]\d+)+", table))
    assert len(numbers) >= 10
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", results), f"{number} is not in RESULTS.md"


@executes("tokens     [ prompt A | A1      | A2   | A3         | prompt B | B1   | B2      | ... ]")
def test_the_drawing_of_a_packed_batch():
    lengths = {"A": (3, (2, 1, 4)), "B": (2, (1, 2))}
    groups = [
        Group(Problem(i, (5,) * prompt, "", {}), tuple(Episode((7,) * n, (0.0,) * n, True, "") for n in completions))
        for i, (prompt, completions) in enumerate(lengths.values())
    ]
    batch = pack(groups, "cpu", torch.float32)
    expected = [0, 1, 2] + [3, 4] + [3] + [3, 4, 5, 6] + [0, 1] + [2] + [2, 3]
    assert batch.position_ids[0].tolist() == expected, "in the order of the drawing, each completion from its prompt on"
    assert batch.target_ids.tolist() == [7] * 10 and batch.lengths.tolist() == [2, 1, 4, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

FIRST = (
    "pip install uv && uv run main.py --config configs/configs_tiny/config_kl_beta0.04_tiny.yaml "
    "--dataset_name countdown"
)


@executes(FIRST, "--eval_only", "--check", "--fresh", "--set training.learning_rate=1e-4",
          "--set model.pretrained_model_path=runs/.../final", "--quiet", "--log_every N")  # fmt: skip
def test_the_first_command_and_its_switches(run, tmp_path, capsys):
    short = [*SHORT, "training.learning_rate=1e-4"]
    assert run(f"{FIRST} --check", *short) == 0
    shown = capsys.readouterr().out
    assert "memory      estimated" in shown and "prompt      the first one" in shown
    assert not (tmp_path / "runs").exists()
    assert run(FIRST, *short) == 0
    shown = capsys.readouterr().out
    assert "\nbefore " in shown and "\nafter " in shown, "its accuracy before and after"
    assert "step 1/2" in shown
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["train/learning_rate"] == pytest.approx(1e-4 * 2 / 5), "the second of five steps of warm-up"
    folder = tmp_path / "runs" / "config_kl_beta0.04_tiny_countdown"
    assert run(f"{FIRST} --eval_only", *short, f"model.pretrained_model_path={folder / 'final'}") == 0
    evaluated = json.loads((folder.parent / f"{folder.name}_eval" / "report.json").read_text())["metrics"]
    assert evaluated["eval/greedy"] == rows[2]["eval/greedy"]
    assert run(f"{FIRST} --fresh --log_every 2", *short) == 0
    shown = capsys.readouterr().out
    assert "step 1/2" not in shown and "step 2/2" in shown
    assert run(f"{FIRST} --quiet", *short, "training.max_steps=3") == 0
    shown = capsys.readouterr().out
    assert "step 3/3" not in shown and "\nafter " in shown
    assert (folder.parent / f"{folder.name}.1" / "final").is_dir() and len(list(folder.glob("final"))) == 1


@executes(f"{FIRST.rpartition('&& ')[2]} --profile",
          "phase               seconds   share   tokens/s   TFLOP/s     %     GB/s     %")  # fmt: skip
def test_the_profile_of_a_step(run, tmp_path, capsys):
    command = next(line for line in README.splitlines() if line.endswith("--profile"))
    assert run(f"{command} --quiet", *SHORT) == 0
    shown, printed = capsys.readouterr().out.splitlines(), block_that_begins("phase   ").splitlines()
    assert [line[:18] for line in shown[:14]] == [line[:18] for line in printed[:14]], "the same phases"
    captions = [[re.sub(r"[\d.,]+", "#", line) for line in lines[14:]] for lines in (shown, printed)]
    assert captions[0] == captions[1]
    assert not (tmp_path / "runs").exists()


@executes("python main.py --config configs/configs_tiny/config_kl_beta0.04_tiny.yaml --dataset_name countdown")
def test_the_command_without_uv_is_the_same():
    without = next(line for line in README.splitlines() if line.startswith("python main.py"))
    assert without.split()[1:] == FIRST.rpartition("uv run ")[2].split()


@executes("pip install uv && uv run pytest", "python -m pytest")
def test_the_test_command(tmp_path):
    file = tmp_path / "test_one.py"
    file.write_text("def test_one():\n    assert 'src' in __import__('src').__name__\n")
    words = ["-m", "pytest", str(file), "-c", str(PROJECT / "pyproject.toml")]  # its settings make `src` importable
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@executes("python -m venv .venv && source .venv/bin/activate", "pip install -r requirements.txt")
def test_an_environment_without_uv(tmp_path):
    command = next(line for line in README.splitlines() if line.startswith("python -m venv"))
    command = command.replace("python", sys.executable, 1).replace("venv .venv", "venv --without-pip .venv")
    shown = subprocess.run(["bash", "-c", f"{command} && python -c 'import sys; print(sys.prefix)'"],
                           cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert shown.stdout.strip() == str(tmp_path / ".venv"), shown.stderr
    # pip, which needs the network for the rest, would accept every line, and install what main.py and the tests import
    entries = (PROJECT / "requirements.txt").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    pinned = {}
    for line in filter(str.strip, entries):
        requirement = Requirement(line.partition("--hash")[0])
        assert "--hash=sha256:" in line and str(requirement.specifier).startswith("=="), line
        pinned[requirement.name] = requirement
    assert {"torch", "transformers", "datasets", "tensorboard", "pytest", "matplotlib"} <= set(pinned)


@executes("uv run torchrun --nproc_per_node 2 main.py --config configs/configs_tiny/config_kl_beta0.04_tiny.yaml "
          "--dataset_name countdown")  # fmt: skip
def test_two_processes(tmp_path):
    (command,) = [line for line in README.splitlines() if line.startswith("uv run torchrun")]
    _, _, _, *words = command.split()
    words = [str(PROJECT / word) if (PROJECT / word).is_file() else word for word in words]
    overrides = [word for override in SHORT for word in ("--set", override)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2]


@executes("python -m pytest tests/test_distributed.py")
def test_the_file_that_compares_numbers_of_processes_is_there():
    text = (PROJECT / "tests" / "test_distributed.py").read_text(encoding="utf-8")
    assert "def test_two_processes_have_the_gradient_of_one" in text


def test_the_arithmetic_of_the_plan_for_a_fleet():
    table = README.split("| 128 prompts x 16 completions x 4,096 tokens a step |")[1].split("\n\n")[0]
    cells = [row.split("|")[2:4] for row in table.splitlines()[2:]]
    tokens = 128 * 16 * 4096
    models = ((7.6e9, 8, 57e3, 1, 8), (70.6e9, 64, 328e3, 8, 8))  # parameters, GPUs, cache, GPUs a server, servers
    for column, (parameters, gpus, cache, wide, servers) in enumerate(models):
        read = 2 * parameters / (3.35e12 * wide)
        attend = 256 * 2048 * cache / (3.35e12 * wide)
        expected = [
            [2 * parameters / 1e9],
            [2 * parameters / 12.5e9, 2 * parameters / 0.125e9],
            [7 * parameters / 1e9],
            [8 * tokens / 1e9],
            [8 * parameters * tokens / (gpus * 400e12), gpus],
            [1e3 * read, wide],
            [1e3 * attend, wide],
            [tokens * (read + attend) / 256 / servers, wide * servers],
        ]
        for row, numbers in zip(cells, expected, strict=True):
            said = [float(number) for number in re.findall(r"[\d.]+(?= (?:GB|s|ms|GPU))", row[column])]
            assert said == pytest.approx(numbers, rel=0.05), row


@executes("uv run tensorboard --logdir runs")
def test_tensorboard(run, tmp_path):
    (tmp_path / "runs").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["tensorboard", "--logdir", "runs"]
    assert f"uv run {' '.join(words)}" in README
    command = [sys.executable, "-m", "tensorboard.main", *words[1:], "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page = ""
        until = time.monotonic() + 60
        while "TensorBoard" not in page and server.poll() is None and time.monotonic() < until:
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read().decode()
            except OSError:
                time.sleep(0.2)
        assert "TensorBoard" in page
    finally:
        server.kill()
        server.wait()


@executes("uv run main.py --config configs/configs_lora/config_kl_beta0.04_r16_tiny.yaml --dataset_name countdown")
def test_lora(run, tmp_path):
    command = next(line for line in README.splitlines() if "configs_lora" in line and line.startswith("uv run"))
    assert run(command, *SHORT) == 0
    (final,) = tmp_path.glob("runs/*/final")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in final.iterdir()}
    assert run(f"{command} --eval_only", *SHORT, f"lora.path={final}") == 0
    evaluated = json.loads(next(tmp_path.glob("runs/*_eval/report.json")).read_text())["metrics"]
    last = json.loads((final.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluated["eval/greedy"] == last["eval/greedy"] and evaluated["eval/pass@1"] == last["eval/pass@1"]


BENCHMARKS = {  # what makes them short; of those that have no form of a few seconds only the options are read
    "python -m benchmarks.compare_penalties --loss_types none kl approx_kl ot maxent": None,
    "uv run --group benchmarks python -m benchmarks.step --repetitions 3": None,
    "python -m benchmarks.update --repetitions 4": None,
    "python -m benchmarks.rollout --repetitions 5 --skip generate_batch": "--shape tiny --quick --lengths fixed",
    "python -m benchmarks.rollout --prompts 16 --lengths long_tail": "--shape tiny --quick --skip generate_batch",
    "python -m benchmarks.optimizer": None,
    "python -m benchmarks.kill_storm --kills 50 --seed 3": None,
    "python -m benchmarks.kill_storm": None,
    "python -m benchmarks.fuzz_rewards --cases 1000000": "--cases 300 --task countdown",
    "python -m benchmarks.scored": None,
    "python -m benchmarks.tensorboard_page --output page.png": None,
}


class OptionsRead(Exception):
    """In place of a benchmark that would take minutes."""


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

    def read_and_leave(parser):
        raise OptionsRead(read(parser))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_and_leave)
    with pytest.raises(OptionsRead):
        benchmark.main()


# ---------------------------------------------------------------------------------------------------------------------
# What one adds
# ---------------------------------------------------------------------------------------------------------------------

HELLINGER = """
import sys, torch
from src.penalties import PENALTIES, PenaltyInputs
from types import SimpleNamespace as Bag
policy = torch.randn(7, dtype=torch.float64, requires_grad=True)
anchor = torch.randn(7, dtype=torch.float64).log_softmax(0)
logprobs = policy.log_softmax(0)
value, metrics = PENALTIES["hellinger"](PenaltyInputs(Bag(logprobs=logprobs, anchor_logprobs=anchor), None), None)
distance = 1 - (0.5 * (logprobs + anchor)).exp().sum()
ours = torch.autograd.grad((logprobs.exp().detach() * value).sum(), policy, retain_graph=True)[0]
assert torch.allclose(ours, torch.autograd.grad(distance, policy, retain_graph=True)[0])
assert torch.allclose((logprobs.exp() * metrics["train/hellinger"]).sum(), distance)
same = PENALTIES["hellinger"](PenaltyInputs(Bag(logprobs=logprobs, anchor_logprobs=logprobs.detach()), None), None)[0]
assert same.abs().max() == 0 and torch.autograd.grad(same.sum(), policy)[0].abs().max() == 0, "zero at equality"
import main
sys.exit(main.main())
"""


@executes("diff --git a/src/config.py b/src/config.py", "git apply hellinger.diff",
          """sed 's/"kl"/"hellinger"/' configs/configs_tiny/config_kl_beta0.04_tiny.yaml > hellinger.yaml""",
          "uv run main.py --config hellinger.yaml --dataset_name countdown")  # fmt: skip
def test_a_penalty_of_ones_own(tmp_path):
    for name in ("src", "configs", "models/countdown-tiny"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "main.py", tmp_path)
    (tmp_path / "hellinger.diff").write_text(block_that_begins("diff --git"))
    (tmp_path / "checked.py").write_text(HELLINGER)
    short = " ".join(f"--set {override}" for override in SHORT)
    lines = block_that_begins("git apply").replace("uv run main.py", f"{sys.executable} checked.py")
    script = "set -e\n" + lines.strip() + f" {short} --set training.epsilon=0.1\n"
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["train/penalty"] > 0, "the policy has left the reference"
    assert rows[2]["train/hellinger"] != 0


@executes("# my_task.py", "--set data.task_file=my_task.py --dataset_name SortList",
          "--set data.prompt_format=raw --set training.max_prompt_len=400")  # fmt: skip
def test_a_task_of_ones_own(run, tmp_path):
    (tmp_path / "my_task.py").write_text(block_that_begins("# my_task.py"))
    more = ["data.prompt_format=raw", "training.max_prompt_len=400"]
    assert run(f"main.py --config {CONFIG} --set data.task_file=my_task.py --dataset_name SortList", *SHORT, *more) == 0
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["train/reward"] == rows[-1]["train/answer"]
    task = get_task("SortList", load_config(CONFIG, ["data.task_file=my_task.py"]).data)
    row = {"numbers": [30, 4, 11]}
    answers = ("so <answer>[4, 11, 30]</answer>", "<answer>[30, 4, 11]</answer>", "")
    assert [task.reward(text, row)["answer"] for text in answers] == [1, 0, 0]


@executes("# my_rewards.py", "--set data.reward_functions=my_rewards.py:short")
def test_a_reward_of_ones_own(run, tmp_path):
    (tmp_path / "my_rewards.py").write_text(block_that_begins("# my_rewards.py"))
    command = f"main.py --config {CONFIG} --dataset_name countdown --set data.reward_functions=my_rewards.py:short"
    assert run(f"{command} --eval_only", *SHORT, "data.reward_weights=0.5") == 0
    (report,) = tmp_path.glob("runs/*_eval/completions.jsonl")
    targets = [row["target"] for row in get_task("countdown", load_config(CONFIG, SHORT).data).load("test")]
    for row in map(json.loads, report.read_text(encoding="utf-8").splitlines()):
        short = -0.01 * len(row["text"]) + 0.1 * (str(targets[row["problem"]]) in row["text"])
        assert row["parts"]["short"] == pytest.approx(short)
        assert row["reward"] == pytest.approx(row["parts"]["reward"] + 0.5 * short)
    assert run(command, *SHORT) == 0
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[-1])["train/short"] != 0


@executes(
    '{"prompt": "What is 2 + 3?", "completions": [{"text": "5", "score": 1.0}, {"text": "6", "score": 0.0}]}',
    "--dataset_name scored --set data.path=scored.jsonl",
    "--dataset_name",
)
@pytest.mark.parametrize("loss_type", ["none", "maxent", "listwise_kl"])
def test_scored_completions(run, tmp_path, loss_type):
    line = json.loads(block_that_begins('{"prompt"'))
    with (tmp_path / "scored.jsonl").open("w") as lines:
        # groups of different sizes; the embedded model's template reads nums and target
        for number in range(60):
            row = {**line, "prompt": f"{number}?", "nums": [number % 7 + 1, 2, 3], "target": number}
            row["completions"] = row["completions"] + [{"text": "5 4", "score": 0.25}] * (number % 3)
            lines.write(json.dumps(row) + "\n")
    (config,) = CONFIG.parent.glob(f"config_{loss_type}_*.yaml")
    more = [
        "training.old_logprobs=trainer",
        "training.learning_rate=0.002",
        "training.max_steps=12",
        "data.eval_size=100",
    ]
    assert run(f"main.py --config {config} --dataset_name scored --set data.path=scored.jsonl", *SHORT, *more) == 0
    rows = rows_of(tmp_path)
    assert rows[-1]["eval/best_probability"] > rows[0]["eval/best_probability"] + 0.05
    assert "rollout/mismatch" not in rows[-1], "nothing was sampled"
