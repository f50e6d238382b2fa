"""What an evaluation says: accuracies with their confidence intervals, ranking measures of the offline task, reports.

Everything here is a function of graded completions; src/train_grpo.py samples and grades them.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from src.config import ConfigError
from src.grading import final_answer
from src.packing import Episode, Group
from src.rewards import Fault, guarded
from src.runs import read_rows
from src.storage import write_file
from src.telemetry import markdown_table

logger = logging.getLogger("grpo")
ANSWER_SECONDS = 10.0  # for the answer_of of a user's task

# ---------------------------------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    """Not a number if there is nothing to average."""
    return sum(values) / len(values) if values else math.nan


def solved(episode: Episode) -> bool:
    return episode.reward_parts["answer"] > 0.5


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct), Chen et al. 2021, equation 1."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def confidence(values: list[float]) -> float:
    """Half width of the 95% interval of the mean over problems (normal approximation)."""
    return 1.96 * float(torch.tensor(values).std(correction=0)) / math.sqrt(len(values)) if values else math.nan


def answers_of(task, texts: Iterable[str]) -> list[str | None]:
    """The answers that are voted on: by the task's answer_of if it has one, else src.grading.final_answer."""
    if not hasattr(task, "answer_of"):
        return [final_answer(text) for text in texts]
    answers = [guarded(partial(task.answer_of, text), ANSWER_SECONDS) for text in texts]
    faults = [answer for answer in answers if isinstance(answer, Fault)]
    if faults:
        logger.warning(
            f"{type(task).__name__}.answer_of: {faults[0].text} ({len(faults)} of {len(answers)} completions count as "
            f"without an answer)\n{faults[0].details}".rstrip()
        )
    return [None if answer is None or isinstance(answer, Fault) else str(answer) for answer in answers]


def majority_is_correct(answers: list[str | None], correct: list[bool]) -> float:
    """1 if the most common answer is correct, else 0; with a tie the expected value of drawing one of the tied.

    No answer is no vote. If equal answers were graded differently, an answer is worth the mean of its grades.
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer].append(right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return mean([sum(grades) / most for grades in votes.values() if len(grades) == most])


def majority_at_k(groups: list[Group], task, problems_count: int) -> float:
    """Share of problems whose most common answer is correct; one that the sampler left out is not solved."""
    answers = iter(answers_of(task, [episode.text for group in groups for episode in group.episodes]))
    worth = [majority_is_correct([next(answers) for _ in g.episodes], [solved(e) for e in g.episodes]) for g in groups]
    return sum(worth) / problems_count


def summarize(
    problems_count: int, greedy_groups: list[Group], sampled_groups: list[Group], samples: int, task
) -> dict[str, float]:
    """Greedy accuracy, pass@1, pass@k, majority vote, reward parts and lengths of an evaluation.

    Problems that the sampler left out count as not solved.
    """
    greedy = [float(solved(group.episodes[0])) for group in greedy_groups]
    correct = [sum(map(solved, group.episodes)) for group in sampled_groups]
    greedy += [0.0] * (problems_count - len(greedy))
    correct += [0] * (problems_count - len(correct))
    rates = [count / samples for count in correct]
    metrics = {"eval/greedy": mean(greedy), "eval/greedy_ci95": confidence(greedy)}
    metrics |= {"eval/pass@1": mean(rates), "eval/pass@1_ci95": confidence(rates)}
    powers = {2**exponent for exponent in range(1, samples.bit_length())}  # 2, 4, ... up to samples
    for k in sorted(powers | {samples} - {1}):
        metrics[f"eval/pass@{k}"] = mean([pass_at_k(count, samples, k) for count in correct])
    if samples > 2:
        metrics[f"eval/majority@{samples}"] = majority_at_k(sampled_groups, task, problems_count)
    episodes = [episode for group in sampled_groups for episode in group.episodes]
    parts = dict.fromkeys(part for episode in episodes for part in episode.reward_parts)
    for part in parts.keys() - {"reward", "answer"}:
        if f"eval/{part}" in metrics:
            raise ConfigError(f"the reward has a part {part}, which is the name of a metric; rename it")
    for part in parts:
        if part not in ("reward", "answer"):
            metrics[f"eval/{part}"] = mean([episode.reward_parts.get(part, 0.0) for episode in episodes])
    metrics["eval/length"] = mean([len(episode.token_ids) for episode in episodes])
    metrics["eval/finished"] = mean([float(episode.finished) for episode in episodes])
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: the offline task has scores of given completions
# ---------------------------------------------------------------------------------------------------------------------


def count_pairs(scores: Tensor, logprobs: Tensor) -> tuple[float, int]:
    """Pairs of a group with different scores: how many the log-probs order like the scores (equal: half), of how many.

    scores, logprobs [G].
    """
    better = scores[:, None] > scores[None, :]  # [G, G]
    margin = (logprobs[:, None] - logprobs[None, :])[better]  # [pairs]
    return float((margin > 0).sum() + 0.5 * (margin == 0).sum()), int(better.sum())


def ranking_metrics(score_lists: list[list[float]], logprob_lists: list[list[float]]) -> dict[str, float]:
    """Does the policy prefer the better completions? One list a group: scores, and length-normalised log-probs.

    Pair accuracy is a ratio of two sums over groups; its interval is that of the linearised ratio.
    """
    right, pairs, expected, best = [], [], [], []
    for given_scores, given_logprobs in zip(score_lists, logprob_lists, strict=True):
        scores = torch.tensor(given_scores, dtype=torch.float64)  # [G]
        logprobs = torch.tensor(given_logprobs, dtype=torch.float64)  # [G]
        probabilities = logprobs.softmax(0)  # [G]
        ordered, comparable = count_pairs(scores, logprobs)
        right.append(ordered)
        pairs.append(comparable)
        expected.append(float((probabilities * scores).sum()))
        best.append(float(probabilities[scores == scores.max()].sum()))
    share = sum(right) / sum(pairs) if sum(pairs) else math.nan
    spread = math.sqrt(sum((r - share * n) ** 2 for r, n in zip(right, pairs, strict=True)))
    return {
        "eval/pair_accuracy": share,
        "eval/pair_accuracy_ci95": 1.96 * spread / sum(pairs) if sum(pairs) else math.nan,
        "eval/expected_score": mean(expected),
        "eval/expected_score_ci95": confidence(expected),
        "eval/best_probability": mean(best),
        "eval/best_probability_ci95": confidence(best),
    }


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------


def accuracy_line(metrics: dict[str, float]) -> str:
    """The headline of an evaluation."""
    if "eval/pair_accuracy" in metrics:
        return (
            f"pair accuracy {metrics['eval/pair_accuracy']:.1%} (+-{metrics['eval/pair_accuracy_ci95']:.1%}), "
            f"expected score {metrics['eval/expected_score']:.3f} (+-{metrics['eval/expected_score_ci95']:.3f}), "
            f"best completion {metrics['eval/best_probability']:.1%} (+-{metrics['eval/best_probability_ci95']:.1%})"
        )
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
                "tokens": len(episode.token_ids),
            }
            if episode.old_logprobs:  # the offline task has no sampler, but log-probs of what it was given
                row |= {"kind": "given", "mean_logprob": mean(list(episode.old_logprobs))}
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
