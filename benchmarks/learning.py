"""What the recipes learn from the same base, several seeds: one table and one figure. Stopped, it goes on.

    uv run python -m benchmarks.learning                     # every recipe x 3 seeds, about 90 minutes on 2 cores
    uv run python -m benchmarks.learning --quick             # 2 recipes, 1 seed, 4 steps: only shows that it runs
    uv run python -m benchmarks.learning --configs configs/configs_tiny/config_maxent_tau0.1_beta0.04_tiny.yaml \
        --vary training.tau 0.01 0.05 0.1 0.5 --set training.max_steps=60 --output benchmarks/output/tau
    uv run python -m benchmarks.learning --configs examples/*.yaml --set training.max_steps=60 \
        --output benchmarks/output/examples

Evaluation is on the `test` split; settings were chosen on `validation`. Each run is a process of one thread, so that as
many as there are cores run beside each other. The last line of stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch

from src.run.reading import read_rows

PROJECT = Path(__file__).resolve().parent.parent
COLUMNS = {  # metric -> its name in the table, and how it is printed
    "before": ("sampled, before", "{:.1%}"),
    "eval/reward/first_attempt": ("first attempt", "{:.1%}"),
    "eval/pass@1": ("sampled", "{:.1%}"),
    "eval/greedy": ("greedy", "{:.1%}"),
    "eval/pass@8": ("pass@8", "{:.1%}"),
    "train/kl_k3": ("KL to the reference", "{:.3f}"),
    "rollout/turns": ("turns", "{:.2f}"),
    "train/entropy": ("entropy", "{:.3f}"),
    "maxent/weight_entropy": ("entropy of the weights", "{:.2f}"),
    "useful groups": ("useful groups", "{:.1%}"),  # of those trained on, over all steps
    "tokens": ("tokens sampled", "{:,.0f}"),
    "at equal tokens": ("sampled, at equal tokens", "{:.1%}"),
    "seconds a step": ("s a step", "{:.2f}"),
}


def train(label: str, config: Path, dataset: str, overrides: list[str], seed: int, output: Path) -> list[dict]:
    """The metrics of one run; one that is complete is only read."""
    work = output / f"seed{seed}"
    work.mkdir(parents=True, exist_ok=True)
    arguments = ["--config", str(config), "--dataset_name", dataset, "--name", label, "--quiet"]
    settings = [f"training.random_seed={seed}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (work / f"{label}.log").open("a") as log:
        command = [sys.executable, str(PROJECT / "main.py"), *arguments, "--set", *settings]
        code = subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{label}, seed {seed}, ended with {code}; see {log.name}; the same command goes on")
    print(f"{label}, seed {seed}: done", file=sys.stderr)
    return read_rows(work / "runs" / f"{label}_{dataset}" / "metrics.jsonl")


def summarize(rows: list[dict]) -> dict[str, float]:
    """The last evaluation, and means over the last five steps, of one run."""
    steps = [row for row in rows if "train/loss" in row]
    last = next(row for row in reversed(rows) if "eval/pass@8" in row)
    found = {}
    for name in COLUMNS:
        values = [row[name] for row in steps[-5:] if row.get(name) is not None]
        if name in last and name.startswith("eval/"):
            found[name] = last[name]
        elif values:
            found[name] = mean(values)
    found["before"] = next(row["eval/pass@1"] for row in rows if "eval/pass@1" in row)
    found["useful groups"] = 1 - mean(row["train/groups_without_variance"] for row in steps)
    found["tokens"] = sum(row["rollout/tokens"] for row in steps)
    found["seconds a step"] = mean(row["time/rollout"] + row["time/update"] for row in steps)
    return found


def accuracy_at(rows: list[dict], tokens: float) -> float:
    """Sampled accuracy when so many tokens had been sampled, on a line between the evaluations around it."""
    total, points = 0.0, []
    for row in rows:
        total += row.get("rollout/tokens", 0)
        if "eval/pass@1" in row:
            points.append((total, row["eval/pass@1"]))
    (x, y), (x_next, y_next) = next(pair for pair in pairwise(points) if pair[1][0] >= tokens)
    return y + (y_next - y) * (tokens - x) / (x_next - x)


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""

    def cell(runs: list[dict], name: str, form: str) -> str:
        values = [run[name] for run in runs if name in run]
        if not values:
            return ""
        return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")

    used = {
        name: shown
        for name, shown in COLUMNS.items()
        if any(run.get(name) for rows in results.values() for run in rows)
    }
    lines = ["| run | " + " | ".join(title for title, _ in used.values()) + " |", "|" + "---|" * (len(used) + 1)]
    for label, runs in results.items():
        lines.append(
            "| " + " | ".join([f"`{label}`", *(cell(runs, name, form) for name, (_, form) in used.items())]) + " |"
        )
    return "\n".join(lines)


def draw(curves: dict[str, list[list[dict]]], file: Path) -> None:
    """Sampled and greedy accuracy against step, mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, key, title in zip(axes, ("eval/pass@1", "eval/greedy"), ("sampled (pass@1)", "greedy"), strict=True):
        for index, (label, runs) in enumerate(curves.items()):
            rows = [[row[key] for row in lines if key in row] for lines in runs]
            steps = [row["step"] for row in runs[0] if key in row]
            columns = list(zip(*rows, strict=True))
            style = ("-", "--", ":")[index // 10 % 3]
            (line,) = axis.plot(
                steps, [mean(column) for column in columns], style, marker="o", markersize=3, label=label
            )
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axis.fill_between(steps, low, high, alpha=0.1, color=line.get_color())
        axis.set(title=f"held-out accuracy, {title}", xlabel="step")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", nargs="+", type=Path, default=sorted((PROJECT / "configs" / "recipes").glob("*.yaml"))
    )
    parser.add_argument("--dataset_name", help="default: countdown, of the examples their own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--vary", nargs="+", metavar="KEY VALUE...", help="one run for each value of a key; `10 a.b=c` gives others too"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "output" / "learning")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.configs = 1, arguments.configs[:2]
        arguments.overrides += ["training.max_steps=4", "training.eval_interval=2", "data.eval_size=32"]
    runs = {config.stem: (config.resolve(), arguments.overrides) for config in arguments.configs}
    if arguments.vary:
        key, *values = arguments.vary
        word = key.rpartition(".")[2]
        runs = {
            re.sub(r"[^\w.-]+", "_", f"{label}_{word}{value}"): (config, [*overrides, *f"{key}={value}".split()])
            for label, (config, overrides) in runs.items()
            for value in values
        }

    def dataset_of(config: Path) -> str:
        return arguments.dataset_name or (config.stem if config.parent.name == "examples" else "countdown")

    output = arguments.output.resolve()
    with ThreadPoolExecutor(arguments.processes) as pool:  # seed by seed: drift of the machine falls on all alike
        waiting = {
            (label, seed): pool.submit(train, label, config, dataset_of(config), overrides, seed, output)
            for seed in range(arguments.seeds)
            for label, (config, overrides) in runs.items()
        }
        curves = {label: [waiting[label, seed].result() for seed in range(arguments.seeds)] for label in runs}
    results = {label: [summarize(rows) for rows in seeds] for label, seeds in curves.items()}
    fewest = min(run["tokens"] for runs in results.values() for run in runs)
    for label, runs in results.items():
        for run, rows in zip(runs, curves[label], strict=True):
            run["at equal tokens"] = accuracy_at(rows, fewest)
    print(table(results))
    draw(curves, output / "learning.png")
    document = {
        "benchmark": "learning",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {arguments.processes} runs at a time, one thread each",
        "quick": arguments.quick,
        "runs": results,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
