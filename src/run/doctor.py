"""--doctor, and the last lines of a run: which faults of src/run/faults.py it has; nothing here imports torch."""

import logging
from dataclasses import dataclass
from pathlib import Path

from src.config import ConfigError
from src.run.console import INDENT, RESULT
from src.run.faults import DETECTORS
from src.run.reading import Run, is_number, read_config, read_rows
from src.run.trends import MIN_STEPS, has

logger = logging.getLogger("grpo")


@dataclass(frozen=True)
class Verdict:
    """What was found, in the order of causes, and what could not be judged for want of metrics."""

    steps: int
    faults: dict[str, str]  # name -> evidence and advice
    unjudged: list[str]

    def lines(self) -> list[str]:
        """One a fault; or that there is none, or too little to tell."""
        lines = [f"{fault}: {told}" for fault, told in self.faults.items()]
        if self.steps < MIN_STEPS:
            lines.append(f"{self.steps} steps are too few to judge a run by; {MIN_STEPS} are enough for a first look")
        elif not lines:
            lines.append(f"nothing wrong was found in {self.steps} steps")
        return lines


def examine(run: Run) -> Verdict:
    """Every detector that has what it needs."""
    steps = sum(has(row, "train/reward") for row in run.rows)
    there = {tag for row in run.rows for tag in row if is_number(row[tag])}
    faults, unjudged = {}, []
    for one in DETECTORS:
        if not there.issuperset(one.needs):
            unjudged.append(one.fault)
        elif steps >= one.least and (evidence := one.find(run)):
            faults[one.fault] = f"{evidence}; try: {one.advice}"
    return Verdict(steps, faults, unjudged)


def examine_folder(folder: Path) -> Verdict:
    """Of the run that it holds, finished or not."""
    rows = read_rows(folder / "metrics.jsonl")
    return examine(Run(folder.name, folder, read_config(folder / "config.yaml"), rows))


def diagnosis(folder: Path) -> list[str]:
    """The answer to --doctor; ConfigError, if there is no run in this folder."""
    if not folder.is_dir():
        raise ConfigError(f"--doctor {folder}: there is no such folder; give that of a run, such as runs/NAME")
    if not (folder / "metrics.jsonl").is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl"))
        advice = f"give one in it, such as {inside[-1]}" if inside else "give that of a run, such as runs/NAME"
        raise ConfigError(f"--doctor {folder}: there is no metrics.jsonl in it; {advice}")
    try:
        verdict = examine_folder(folder)
    except OSError as error:
        raise ConfigError(f"--doctor {folder}: metrics.jsonl cannot be read ({error.strerror}); check it") from error
    unjudged = f"not judged, as their metrics are not there: {', '.join(verdict.unjudged)}"
    return verdict.lines() + [unjudged] * (len(verdict.unjudged) > 0 and verdict.steps >= MIN_STEPS)


def log_diagnosis(folder: Path) -> None:
    """Below the summary of a run, a line a fault, as --doctor says it later."""
    try:
        for number, line in enumerate(examine_folder(folder).lines()):
            logger.log(RESULT, f"{'' if number else 'doctor':<{INDENT}}{line}")
    except Exception as error:  # the run is finished, and its model still has to go to the hub
        logger.warning(f"the doctor failed ({type(error).__name__}: {error}); the run is not touched by it")
