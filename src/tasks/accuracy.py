"""What graded completions say: accuracies with their confidence intervals, and how a policy ranks given ones."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from src.tasks.answers import final_answer
from src.tasks.guard import Fault, guarded

if TYPE_CHECKING:  # it imports torch, which this package does without
    from src.records import Episode, Group

logger = logging.getLogger("grpo")


def mean(values: list[float]) -> float:
    """Not a number if there is nothing to average."""
    return sum(values) / len(values) if values else math.nan


def solved(episode: "Episode") -> bool:
    return episode.reward_parts["answer"] > 0.5


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct), Chen et al. 2021, equation 1."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def confidence(values: list[float]) -> float:
    """Half width of the 95% interval of the mean over problems (normal approximation)."""
    center = mean(values)
    return 1.96 * math.sqrt(mean([(value - center) ** 2 for value in values]) / max(1, len(values)))


def answers_of(task, texts: Iterable[str]) -> list[str | None]:
    """The answers that are voted on: by the task's answer_of if it has one, else final_answer; of the last turn."""
    texts = [getattr(text, "turns", (text,))[-1] for text in texts]
    if not hasattr(task, "answer_of"):
        return [final_answer(text) for text in texts]
    answers = [guarded(partial(task.answer_of, text)) for text in texts]
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


def majority_at_k(groups: list["Group"], task, problems_count: int) -> float:
    """Share of problems whose most common answer is correct; one that the sampler left out is not solved."""
    answers = iter(answers_of(task, [episode.text for group in groups for episode in group.episodes]))
    worth = [majority_is_correct([next(answers) for _ in g.episodes], [solved(e) for e in g.episodes]) for g in groups]
    return sum(worth) / problems_count


def summarize(
    problems_count: int, greedy_groups: list["Group"], sampled_groups: list["Group"], samples: int, task
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
    for part in parts:
        if part not in ("reward", "answer"):
            metrics[f"eval/reward/{part}"] = mean([episode.reward_parts.get(part, 0.0) for episode in episodes])
    metrics["eval/length"] = mean([episode.length for episode in episodes])
    metrics["eval/finished"] = mean([float(episode.finished) for episode in episodes])
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: the offline task has scores of given completions
# ---------------------------------------------------------------------------------------------------------------------


def count_pairs(scores: list[float], logprobs: list[float]) -> tuple[float, int]:
    """Pairs of a group with different scores: how many the log-probs order like the scores (equal: half), of how many.

    scores, logprobs [G].
    """
    rows = list(zip(scores, logprobs, strict=True))
    margins = [logprob - other for score, logprob in rows for worse, other in rows if score > worse]  # [pairs]
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in margins), len(margins)


def softmax(values: list[float]) -> list[float]:
    """exp(value) over their sum."""
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def ranking_metrics(score_lists: list[list[float]], logprob_lists: list[list[float]]) -> dict[str, float]:
    """Does the policy prefer the better completions? One list a group: scores, and length-normalised log-probs.

    Pair accuracy is a ratio of two sums over groups; its interval is that of the linearised ratio.
    """
    right, pairs, expected, best = [], [], [], []
    for scores, logprobs in zip(score_lists, logprob_lists, strict=True):
        probabilities = softmax(logprobs)  # [G]
        ordered, comparable = count_pairs(scores, logprobs)
        right.append(ordered)
        pairs.append(comparable)
        expected.append(sum(p * score for p, score in zip(probabilities, scores, strict=True)))
        best.append(sum(p for p, score in zip(probabilities, scores, strict=True) if score == max(scores)))
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
