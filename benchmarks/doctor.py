"""Runs made to fail in a known way and healthy ones, all real, with the embedded model: what does the doctor say?

    uv run python -m benchmarks.doctor           # 14 runs that fail and 12 that do not; ten minutes on one thread
    uv run python -m benchmarks.doctor --quick   # 2 and 2
    uv run python -m benchmarks.doctor --only "clip fraction high" kl-lora

A run that is complete is only read, so after a change of src/run/faults.py the same command takes seconds. Of a run
that fails the fault has to be named first, of a healthy one none; the exit code is 1 if any differs. The last line of
stdout is one JSON document.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from src.config import RunError, load_config
from src.engine import Engine
from src.rl_datasets import Countdown
from src.run.console import configure_console
from src.run.doctor import examine_folder
from src.train_grpo import run_training

PROJECT = Path(__file__).resolve().parent.parent
HERE = "benchmarks/doctor.py"
SHORT = [  # the settings of configs_tiny, with less of everything
    f"model.pretrained_model_path={PROJECT / 'models' / 'countdown-tiny'}", "model.device=cpu", "training.max_steps=24",
    "training.batch_size=128", "training.num_questions_per_batch=16", "training.eval_interval=12", "data.eval_size=64",
    "data.eval_samples=4", "training.ckpt_save_interval=0", "data.train_size=2048",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# What a user got wrong
# ---------------------------------------------------------------------------------------------------------------------


class Arithmetic:
    """Sums of two numbers; the answer may stand where the model has not been taught to write it."""

    def load(self, split: str) -> list[dict]:
        first, last = {"train": (1, 30), "validation": (31, 36)}.get(split, (37, 44))
        return [{"nums": [a, b, 1], "target": a + b} for a in range(first, last) for b in range(1, 40)]

    def messages(self, row: dict) -> list[dict]:
        return [{"role": "user", "content": f"{row['nums']} {row['target']}"}]


class Boxed(Arithmetic):
    """The reward looks for an answer in a form that the prompt does not ask for: never right."""

    def reward(self, text: str, row: dict) -> dict[str, float]:
        right = float(f"\\boxed{{{row['target']}}}" in text)
        return {"reward": right, "answer": right}


class Lenient(Arithmetic):
    """Anything with a digit in it is right: all are."""

    def reward(self, text: str, row: dict) -> dict[str, float]:
        right = float(any(letter.isdigit() for letter in text))
        return {"reward": right, "answer": right}


class Ones(Arithmetic):
    """One and the same text is right for every prompt."""

    def reward(self, text: str, row: dict) -> dict[str, float]:
        ones = text.count("1")
        return {"reward": ones / 10, "answer": float(ones >= 10)}


class Strict(Countdown):
    """Countdown without the part for the format."""

    def reward(self, text: str, row: dict) -> dict[str, float]:
        right = super().reward(text, row)["answer"]
        return {"reward": right, "answer": right}


def pays_length(completions: list[str], **columns) -> list[float]:
    return [len(text) / 100 for text in completions]


def pays_products(completions: list[str], **columns) -> list[float]:
    """A form that has nothing to do with being right."""
    return [float(text.count("*")) for text in completions]


def pays_too_much(completions: list[str], **columns) -> list[float]:
    """A few of them so much that the gradient overflows."""
    return [1e29 if text.count("9") > 3 else 0.0 for text in completions]


@contextmanager
def hot_sampler() -> Iterator[None]:
    """Rollouts at twice the temperature that the trainer knows of."""
    sample = Engine.sample

    def hotter(engine: Engine, problems, samples, stream, temperature=None, *rest):
        hot = 2 * engine.config.training.temperature
        return sample(engine, problems, samples, stream, hot if temperature is None else temperature, *rest)

    Engine.sample = hotter  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.sample = sample  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------------------------
# The runs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A run and the fault that is to be named first; none for a healthy one."""

    name: str
    overrides: tuple[str, ...]
    fault: str | None = None
    config: str = "configs_tiny/config_none_tiny.yaml"
    task: str = "countdown"
    broken: bool = False  # with the hot sampler


def fails(fault: str, *overrides: str, **options) -> Trial:
    return Trial(fault.replace(" ", "-"), overrides, fault, **options)


def tiny(word: str) -> str:
    return f"configs_tiny/config_{word}_tiny.yaml"


NONE, KL = tiny("none"), tiny("kl_beta0.04")
OWN = f"data.task_file={PROJECT / HERE}"
ON_POLICY = ("training.minibatches=1", "training.old_logprobs=trainer")
SMALLER = ("training.batch_size=64", "training.num_questions_per_batch=8", "training.max_steps=16")
HOTTER = ("training.temperature=2", "training.learning_rate=1e-3")  # at 1 the embedded model explores little


def pays(name: str, weight: int = 1) -> tuple[str, str]:
    """A reward function of this file beside that of the task."""
    return f"data.reward_functions={PROJECT / HERE}:{name}", f"data.reward_weights={weight}"


FAILING = [
    fails("no reward", OWN, task="Boxed"),
    fails("all answers right", OWN, task="Lenient"),
    fails("all answers wrong", OWN, "data.number_max=50", task="Strict"),
    fails("updates skipped", *pays("pays_too_much"), "training.scale_rewards=none", *SMALLER),
    fails("completions cut off", "training.max_gen_len=8"),
    fails("sampler mismatch", "training.old_logprobs=trainer", broken=True),
    fails("weights do not move", "training.learning_rate=1e-12", "model.dtype=bfloat16"),
    fails("length drifting", *pays("pays_length", 10), *HOTTER),
    fails("reward hacking", *pays("pays_products"), *ON_POLICY, "training.learning_rate=1e-3", "training.max_steps=14"),
    fails("clip fraction high", "training.inner_epochs=4", "training.learning_rate=2e-3", "training.epsilon=0.1",
          *SMALLER),
    fails("entropy collapsed", OWN, *ON_POLICY, "training.learning_rate=2e-3", task="Ones"),
    fails("entropy exploded", *ON_POLICY, "training.learning_rate=1e-2"),
    fails("KL running away", *ON_POLICY, "training.learning_rate=3e-3"),
    fails("evaluation takes the time", "training.eval_interval=1", "data.eval_samples_between=8", "data.eval_size=128",
          "training.max_steps=12"),
]  # fmt: skip
HEALTHY = [
    Trial("none", ()),
    Trial("kl", (), config=KL),
    Trial("none-seed1", ("training.random_seed=1",)),
    Trial("none-one-update", ON_POLICY),
    Trial("kl-bfloat16", ("model.dtype=bfloat16",), config=KL),
    Trial("kl-memory-efficient", ("model.dtype=bfloat16", "training.memory_efficient_adamw=true"), config=KL),
    Trial("kl-lora", (), config="configs_lora/config_kl_beta0.04_r16_tiny.yaml"),
    Trial("approx_kl", (), config=tiny("approx_kl_beta0.04")),
    Trial("ot", (), config=tiny("ot_beta0.5_w8")),
    Trial("maxent", (), config=tiny("maxent_tau0.1_beta0.04")),
    Trial("listwise_kl", (), config=tiny("listwise_kl_t0.1")),
    Trial("gspo", ("training.importance_sampling_level=sequence", "training.loss_agg=sequence",
                   "training.random_seed=2")),
]  # fmt: skip


def train(trial: Trial, output: Path) -> Path:
    """Take the run, or find it complete; its folder."""
    config = load_config(PROJECT / "configs" / trial.config, [*SHORT, *trial.overrides])
    config.name = trial.name
    with hot_sampler() if trial.broken else nullcontext():
        try:
            run_training(config, trial.task, str(output))
        except RunError as error:  # as it would end for the user
            print(f"{trial.name}: {error}", file=sys.stderr)
    return output / "runs" / f"{trial.name}_{trial.task}"


def table(results: list[dict]) -> str:
    """Markdown, a row a run."""
    lines = ["| run | fault made | faults named | evidence of the first |", "|---|---|---|---|"]
    for row in results:
        cells = [row["run"], row["made"] or "", ", ".join(row["named"]), row["evidence"].partition("; try")[0]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def judged(trial: Trial, output: Path) -> dict:
    """The run, and what the doctor says of it."""
    started = time.perf_counter()
    verdict = examine_folder(train(trial, output))
    named = list(verdict.faults)
    return {
        "run": trial.name,
        "made": trial.fault,
        "named": named,
        "evidence": next(iter(verdict.faults.values()), ""),
        "steps": verdict.steps,
        "seconds": round(time.perf_counter() - started, 1),
        "right": named[:1] == [trial.fault] if trial.fault else not named,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "output" / "doctor")
    parser.add_argument(
        "--only", nargs="+", metavar="RUN", default=[], help="names of runs, or the faults made in them"
    )
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configure_console(quiet=True)
    trials = [*FAILING[:2], *HEALTHY[:2]] if arguments.quick else [*FAILING, *HEALTHY]
    trials = [one for one in trials if not arguments.only or {one.name, one.fault} & {*arguments.only}]
    results = [judged(trial, arguments.output.resolve()) for trial in trials]
    print(table(results))
    document = {
        "benchmark": "doctor",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, one thread",
        "quick": arguments.quick,
        "right": sum(row["right"] for row in results),
        "runs": results,
    }
    print(json.dumps(document))
    return int(document["right"] != len(results))


if __name__ == "__main__":
    sys.exit(main())
