"""Evaluations and batches for people: the headline, tables and files of completions."""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from src.records import Group
from src.run.reading import read_rows
from src.run.storage import write_file
from src.run.telemetry import markdown_table

logger = logging.getLogger("grpo")


def accuracy_line(metrics: dict[str, float]) -> str:
    """The headline of an evaluation."""
    if "eval/pair_accuracy" in metrics:
        return (
            f"pair accuracy {metrics['eval/pair_accuracy']:.1%} (+-{metrics['eval/pair_accuracy_ci95']:.1%}), "
            f"expected score {metrics['eval/expected_score']:.3f} (+-{metrics['eval/expected_score_ci95']:.3f}), "
            f"best completion {metrics['eval/best_probability']:.1%} (+-{metrics['eval/best_probability_ci95']:.1%})"
        )
    if not metrics:
        return "not evaluated"
    passes = [
        f"{name[5:]} {value:.1%}"
        for name, value in metrics.items()
        if name.startswith("eval/pass@") and not name.endswith("_ci95") and name != "eval/pass@1"
    ]
    return (
        f"greedy {metrics['eval/greedy']:.1%} (+-{metrics['eval/greedy_ci95']:.1%}), "
        f"pass@1 {metrics['eval/pass@1']:.1%} (+-{metrics['eval/pass@1_ci95']:.1%}), "
        + ", ".join(passes[-1:] + [f"length {metrics['eval/length']:.1f}"])
    )


def headline(metrics: dict[str, float]) -> float:
    """The one number by which evaluations are compared."""
    return metrics["eval/pass@1"] if "eval/pass@1" in metrics else metrics["eval/pair_accuracy"]


def best_line(metrics_file: Path) -> str:
    """The first of the best evaluations that a run has written, and its step."""
    names = {"eval/pass@1": "pass@1", "eval/pair_accuracy": "pair accuracy"}
    found = [
        (row[tag], row["step"], tag) for row in read_rows(metrics_file) for tag in names if row.get(tag) is not None
    ]
    if not found:
        return "not known"
    value, step, tag = max(found, key=lambda entry: (entry[0], -entry[1]))
    return f"{names[tag]} {value:.1%} at step {step}"


def completions_table(groups: list[Group], shown: int = 8) -> str:
    """Prompts, completions and rewards of the first episodes, one of each group."""
    rows = [[g.problem.prompt_text, g.episodes[0].text, f"{g.episodes[0].reward:.2f}"] for g in groups[:shown]]
    return markdown_table(["prompt", "completion", "reward"], rows)


def completion_lines(kind: str, groups: list[Group]) -> Iterable[str]:
    """One JSON line a completion."""
    for group in groups:
        for episode in group.episodes:
            row = {
                "problem": group.problem.index,
                "kind": kind,
                "prompt": group.problem.prompt_text,
                "text": episode.text,
                "reward": episode.reward,
                "parts": episode.reward_parts,
                "finished": episode.finished,
                "tokens": episode.length,
            }
            if episode.old_logprobs:  # the offline task has no sampler, but log-probs of what it was given
                row |= {"kind": "given", "mean_logprob": sum(episode.old_logprobs) / len(episode.old_logprobs)}
            yield json.dumps(row) + "\n"


def write_report(
    folder: str | Path, about: dict, metrics: dict[str, float], greedy_groups: list[Group], sampled_groups: list[Group]
) -> None:
    """report.json (what was evaluated, when, and the metrics) and completions.jsonl; report.json comes last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*completion_lines("greedy", greedy_groups), *completion_lines("sampled", sampled_groups)]
    write_file(folder / "completions.jsonl", "".join(lines))
    numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
    report = {"about": {"date": datetime.now(UTC).isoformat(timespec="seconds")} | about, "metrics": numbers}
    write_file(folder / "report.json", json.dumps(report, indent=2, default=str) + "\n")


def keep_bad_batch(folder: Path, step: int, groups: list[Group]) -> None:
    """What a step without a finite gradient was computed on, to look at."""
    rows = [
        asdict(episode) | {"prompt": group.problem.prompt_text, "prompt_ids": group.problem.prompt_ids}
        for group in groups
        for episode in group.episodes
    ]
    try:
        folder.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        (folder / f"step_{step:06d}.jsonl").write_text(lines, encoding="utf-8")
    except OSError as error:  # only for looking at
        logger.warning(f"the batch of step {step} could not be written to {folder} ({error.strerror})")
