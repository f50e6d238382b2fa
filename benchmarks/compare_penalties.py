"""Every penalty from the same base, same everything else, several seeds: one table and one figure.

    uv run python -m benchmarks.compare_penalties            # 6 loss types x 3 seeds, about half an hour on 2 cores
    uv run python -m benchmarks.compare_penalties --quick    # 2 loss types, 1 seed, 10 steps: only shows that it runs

Evaluation is on the `test` split; settings were chosen on `validation`. The last line of stdout is one JSON document.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from src.config import load_config
from src.run.reading import read_rows
from src.train_grpo import run_training

CONFIGS = {
    "none": "config_none_tiny",
    "kl": "config_kl_beta0.04_tiny",
    "approx_kl": "config_approx_kl_beta0.04_tiny",
    "ot": "config_ot_beta0.5_w8_tiny",
    "maxent": "config_maxent_tau0.1_beta0.04_tiny",
    "listwise_kl": "config_listwise_kl_t0.1_tiny",
}
PROJECT = Path(__file__).resolve().parent.parent


def summarize(lines: list[dict]) -> dict[str, float]:
    """What the table shows of one run."""
    evaluations = [line for line in lines if "eval/pass@1" in line]
    first, last, steps = evaluations[0], evaluations[-1], lines[1:]
    seconds = [line["time/rollout"] + line["time/update"] for line in steps]
    return {
        "sampled_start": first["eval/pass@1"],
        "sampled_end": last["eval/pass@1"],
        "sampled_best": max(line["eval/pass@1"] for line in evaluations),
        "greedy_start": first["eval/greedy"],
        "greedy_end": last["eval/greedy"],
        "pass8_start": first["eval/pass@8"],
        "pass8_end": last["eval/pass@8"],
        "kl_end": last["train/kl_k3"],
        "entropy_end": mean(line["train/entropy"] for line in lines[-5:]),
        "seconds_a_step": mean(seconds),
        "training_seconds": sum(seconds),
        "steps": len(steps),
    }


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""

    def cell(runs: list[dict], name: str, percent: bool = True) -> str:
        values = [run[name] for run in runs]
        spread = stdev(values) if len(values) > 1 else 0.0
        return f"{mean(values):.1%} +- {spread:.1%}" if percent else f"{mean(values):.3f} +- {spread:.3f}"

    lines = [
        "| loss_type | sampled, before | sampled, after | sampled, best | greedy, before | greedy, after | "
        "pass@8, after | KL to the reference | s a step | training s |",
        "|" + "---|" * 10,
    ]
    for name, runs in results.items():
        cells = [
            cell(runs, key)
            for key in ("sampled_start", "sampled_end", "sampled_best", "greedy_start", "greedy_end", "pass8_end")
        ]
        cells += [
            cell(runs, "kl_end", False),
            f"{mean(r['seconds_a_step'] for r in runs):.2f}",
            f"{mean(r['training_seconds'] for r in runs):.0f}",
        ]
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines)


def draw(curves: dict[str, list[list[dict]]], file: Path) -> None:
    """Sampled and greedy accuracy against step, mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, key, title in zip(axes, ("eval/pass@1", "eval/greedy"), ("sampled (pass@1)", "greedy"), strict=True):
        for name, runs in curves.items():
            rows = [[line[key] for line in lines if key in line] for lines in runs]
            steps = [line["step"] for line in runs[0] if key in line]
            columns = list(zip(*rows, strict=True))
            (line,) = axis.plot(steps, [mean(column) for column in columns], marker="o", markersize=3, label=name)
            axis.fill_between(
                steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=line.get_color()
            )
        axis.set(title=f"held-out accuracy, {title}", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loss_types", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--output", default=str(PROJECT / "benchmarks" / "output" / "compare_penalties"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    overrides = []
    if arguments.quick:
        arguments.seeds, arguments.loss_types = 1, ["none", "kl"]
        overrides = ["training.max_steps=10", "training.eval_interval=5", "data.eval_size=64"]
    results, curves = {}, {}
    for seed in range(arguments.seeds):  # seed by seed, so that drift of the machine falls on all loss types alike
        for name in arguments.loss_types:
            config = load_config(
                PROJECT / "configs" / "configs_tiny" / f"{CONFIGS[name]}.yaml",
                [f"training.random_seed={seed}", *overrides],
            )
            work = Path(arguments.output) / f"seed{seed}"
            run_training(config, "countdown", work)
            lines = read_rows(work / "runs" / f"{CONFIGS[name]}_countdown" / "metrics.jsonl")
            results.setdefault(name, []).append(summarize(lines))
            curves.setdefault(name, []).append(lines)
    print(table(results))
    figure = Path(arguments.output) / "compare_penalties.png"
    draw(curves, figure)
    print(
        json.dumps(
            {
                "benchmark": "compare_penalties",
                "date": time.strftime("%Y-%m-%d"),
                "torch": torch.__version__,
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "quick": arguments.quick,
                "figure": figure.name,
                "runs": results,
            }
        )
    )


if __name__ == "__main__":
    main()
