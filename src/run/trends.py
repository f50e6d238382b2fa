"""Where a metric begins, where it ends, and whether it has risen by more than noise; nothing here imports torch."""

from math import hypot

import numpy as np

from src.run.reading import Run, is_number, series

MIN_STEPS = 10  # with fewer the ends of a curve are one or two steps, and a step is noise
START = 3  # steps that are the start of a curve: most policies have hardly moved by then, and one alone is noisy


def start_of(values: np.ndarray) -> float:
    return float(values[:START].mean())


def first(steps: np.ndarray, found: np.ndarray) -> int:
    """The first step where something is found."""
    return int(steps[int(np.argmax(found))])


def has(row: dict, *tags: str) -> bool:
    """Whether a row has finite numbers by all these names."""
    return all(is_number(row.get(tag)) for tag in tags)


def end_of(values: np.ndarray) -> float:
    """The mean of the last quarter."""
    return float(values[-max(START, len(values) // 4) :].mean())


def change(values: np.ndarray) -> tuple[float, float]:
    """What the last quarter is above the first one, and the standard error of that.

    The noise of a step is that of differences of neighbours, in which a trend hardly counts.
    """
    size = max(START, len(values) // 4)
    noise = float(np.diff(values).std()) / 2**0.5 if len(values) > 1 else 0.0
    return float(values[-size:].mean() - values[:size].mean()), noise * (2 / size) ** 0.5


def rises(values: np.ndarray, sure: float) -> bool:
    """By more than `sure` standard errors, and than rounding."""
    rise, error = change(values) if len(values) >= MIN_STEPS else (0.0, 0.0)
    return rise > max(sure * error, 1e-6)


def held_out(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, accuracies and half widths of their 95% intervals, of the evaluations that have both."""
    found = [row for row in run.rows if has(row, "eval/pass@1", "eval/pass@1_ci95")]
    columns = [[row[name] for row in found] for name in ("step", "eval/pass@1", "eval/pass@1_ci95")]
    return np.array(columns[0], dtype=int), np.array(columns[1]), np.array(columns[2])


def gains_accuracy(run: Run) -> bool:
    """Held-out accuracy by more than the interval of the difference, or that of training by 2 standard errors.

    That is little, as it speaks for the run: what is said where accuracy does not rise must be sure of it.
    """
    _, accuracy, width = held_out(run)
    if len(accuracy) > 1 and accuracy[-1] - accuracy[0] > hypot(width[0], width[-1]):
        return True
    return rises(series(run, "reward/answer")[1], sure=2.0)


def accuracy_told(run: Run) -> str:
    """What is known of accuracy, as evidence."""
    steps, accuracy, width = held_out(run)
    if len(accuracy) < 2:
        _, answers = series(run, "reward/answer")
        return (
            f"{start_of(answers):.0%} of the answers in training were right at first and {end_of(answers):.0%} at last"
        )
    ends = [f"{accuracy[i]:.1%} ± {width[i]:.1%} at step {steps[i]}" for i in (0, -1)]
    return f"held-out pass@1 is {ends[0]} and {ends[1]}"
