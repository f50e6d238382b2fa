"""What a completion earns: the task's own reward plus reward functions from the user's files.

Both are code that somebody wrote for one experiment, so nothing they do may end a run or poison it: a call is limited
in time, works on copies, and what it returns is checked. What goes wrong counts 0, is counted itself and is in the log.
"""

import copy
import importlib.util
import inspect
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from reprlib import repr as short_repr  # bounded, and it survives a __repr__ that raises
from typing import TYPE_CHECKING, Any

from src.config import LOSS_TYPES, ConfigError, DataConfig

if TYPE_CHECKING:  # it imports torch, which this file does without
    from src.packing import Group

logger = logging.getLogger("grpo")
PROJECT_FOLDER = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN = 0.1
SHOWN_ERRORS = 3  # different ones of a step that are logged in full
LARGEST = 1e30  # rewards are squared, and some arithmetic on them is in single precision
# what the loop and the evaluation log themselves under train/ and eval/
RESERVED_NAMES = {
    *("reward", "answer", "greedy", "length", "finished", "loss", "policy_loss", "penalty", "entropy", "entropy_bonus"),
    *("kl", "kl_k1", "kl_k3", "clip_fraction", "grad_norm", "learning_rate", "skipped_updates", "beta"),
    "groups_without_variance",
    *LOSS_TYPES,  # the metric of a penalty
}


# ---------------------------------------------------------------------------------------------------------------------
# Calling code that may raise or hang
# ---------------------------------------------------------------------------------------------------------------------


class RewardTimeout(BaseException):
    """Raised inside a call that takes too long; not an Exception, so that `except Exception` does not catch it."""


@cache  # said once
def warn_of_no_limit() -> None:
    logger.warning("rewards are not graded in the main thread: data.reward_timeout cannot break a call that hangs")


def limited(call: Callable[[], Any], seconds: float) -> Any:
    """call(), broken by RewardTimeout after `seconds`, again and again until it is over.

    Two things are not broken: a long call of C code that ignores signals, and a loop that catches BaseException.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread has signals
        warn_of_no_limit()
        return call()

    def inside():
        return call()

    def interrupt(number, frame):
        while frame is not None and frame.f_code is not inside.__code__:
            frame = frame.f_back
        if frame is not None:  # else the call is over: there is nothing to break, and nobody who would catch it
            raise RewardTimeout(over)

    over = f"took longer than data.reward_timeout, {seconds:g} s"
    handler = signal.signal(signal.SIGALRM, interrupt)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, SECONDS_BETWEEN)
    try:
        return inside()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)  # None: it was not set by Python
        signal.setitimer(signal.ITIMER_REAL, left, interval)


@dataclass(frozen=True)
class Fault:
    """What went wrong in a call."""

    text: str  # one line
    details: str = ""  # traceback


def guarded(call: Callable[[], Any], seconds: float) -> Any:
    """call() within `seconds`, or a Fault if it raised (SystemExit too) or hung."""
    try:
        return limited(call, seconds)
    except (KeyboardInterrupt, ConfigError):  # for the user
        raise
    except BaseException as error:
        try:
            text = " ".join(str(error).split())
        except Exception:
            text = "(its text cannot be shown)"
        name = "" if isinstance(error, RewardTimeout) else f"{type(error).__name__}: "
        return Fault(f"{name}{text}"[:300], "".join(traceback.format_exception(error))[-4000:])


def number_of(value: Any) -> float | None:
    """bool, int, float, or a NumPy or torch scalar as a float; None for what is no number (a text is not)."""
    if not hasattr(type(value), "__float__"):
        return None
    try:
        return float(value)
    except Exception:  # a tensor of several elements, an int too large for a float
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Reward functions from files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardFunction:
    """One entry of data.reward_functions."""

    name: str
    call: Callable
    weight: float
    accepted: frozenset[str] | None  # names of its keywords; None: all, it has **keywords
    required: frozenset[str]


def load_file(path: str):
    """The user's Python file as a module; whatever goes wrong in it is one sentence with its line."""
    file = next((c for c in (Path(path).expanduser(), PROJECT_FOLDER / path) if c.is_file()), None)
    if file is None or file.suffix != ".py":
        raise ConfigError(f"data.reward_functions: {path} is not a Python file; write an entry as file.py:function")
    name = f"reward functions of {file.resolve()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # there is one for .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # there, because dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        places = traceback.extract_tb(error.__traceback__)
        lines = [place.lineno for place in places if place.filename == module.__file__]
        text = str(error)
        if isinstance(error, SyntaxError) and error.filename == module.__file__:
            lines, text = [error.lineno], error.msg
        line = f" line {lines[-1]}" if lines else ""
        reason = f"{type(error).__name__}: {text}"
        raise ConfigError(f"data.reward_functions: {path}{line}: the file cannot be imported: {reason}") from error
    return module


def load_function(entry: str, weight: float, modules: dict[str, Any]) -> RewardFunction:
    """The function that `file.py:function` names, and the keywords it takes."""
    where = f"data.reward_functions: {entry}"
    path, _, name = entry.rpartition(":")
    if not path or not name:
        raise ConfigError(f"{where}: write it as file.py:function")
    if path not in modules:  # once for all of its functions
        modules[path] = load_file(path)
    function = getattr(modules[path], name, None)
    if not callable(function):
        known = [key for key, value in vars(modules[path]).items() if inspect.isfunction(value)]
        problem = "is not a function" if hasattr(modules[path], name) else "is not there"
        raise ConfigError(f"{where}: {name} {problem}; functions of {path} are: {', '.join(known) or 'none'}")
    parameters = inspect.signature(function).parameters.values()
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if by_position:
        raise ConfigError(f"{where}: {by_position[0]} must be a keyword; remove the / from its parameters")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = None if takes_all else frozenset(p.name for p in named)
    required = frozenset(p.name for p in named if p.default is p.empty)
    return RewardFunction(name, function, weight, accepted, required)


def load_functions(data: DataConfig) -> list[RewardFunction]:
    """All of data.reward_functions with their weights."""
    entries = data.reward_functions or []
    weights = [1.0] * len(entries) if data.reward_weights is None else data.reward_weights
    if len(weights) != len(entries):
        raise ConfigError(
            f"data.reward_weights has {len(weights)} values and data.reward_functions {len(entries)}; give one weight "
            f"for each function"
        )
    modules: dict[str, Any] = {}
    functions = [load_function(entry, weight, modules) for entry, weight in zip(entries, weights, strict=True)]
    names = [function.name for function in functions]
    for name in names:
        if name in RESERVED_NAMES or names.count(name) > 1:
            reason = "is a metric of the loop" if name in RESERVED_NAMES else "is given twice"
            raise ConfigError(f"data.reward_functions: {name} {reason}, and rewards are logged by name; rename it")
    if data.task_reward_weight == 0 and not any(weights):
        raise ConfigError("data.task_reward_weight is 0, so one of data.reward_functions needs a weight other than 0")
    return functions


# ---------------------------------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------------------------------


class Rewards:
    """The rewards of one experiment. Build it before the model: it imports the user's files.

    task.reward(text, row) gives {"reward": ..., "answer": 0 or 1, other parts} or a plain number, which is the reward,
    and the answer counts as right if it is at least 1. A reward function gets the whole step in one call:
    fn(completions=[...], prompts=[...], one list for each key of the rows) -> one number for each completion.
    """

    def __init__(self, task: Any, data: DataConfig):
        self.task, self.data = task, data
        self.task_name = type(task).__name__
        self.functions = load_functions(data)
        self.columns: list[str] | None = None
        self.errors = 0  # parts that an error made 0, since the start of this process
        self.faults: dict[tuple[str, Fault], int] = {}  # of the last grade(): where and what -> completions concerned

    def check_columns(self, rows: list[dict]) -> None:
        """Before a model is loaded: the rows have every column that a function cannot do without."""
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        for function in self.functions:
            missing = function.required - {"completions", "prompts", *self.columns}
            if missing:
                raise ConfigError(
                    f"data.reward_functions: {function.name} needs {', '.join(sorted(missing))}, which no row has; it "
                    f"can have: {', '.join(['completions', 'prompts', *self.columns])}"
                )

    def grade(self, groups: list["Group"], zero_truncated: bool = False) -> tuple[list["Group"], dict[str, float]]:
        """Every episode with its reward and the parts it is made of; and how many parts an error made 0.

        reward = task_reward_weight x task + sum of weight x function, or 0 if it is unfinished and `zero_truncated`.
        reward_parts are what the task gave ("reward" is its own, unweighted) and each function's value by its name.
        """
        self.faults = {}
        pairs = [(group.problem, episode) for group in groups for episode in group.episodes]
        parts = [self.task_parts(episode.text, problem.reference) for problem, episode in pairs]
        names = dict.fromkeys(name for given in parts for name in given)
        parts = [dict.fromkeys(names, 0.0) | given for given in parts]  # a part that a completion does not have is 0
        totals = [self.data.task_reward_weight * given["reward"] for given in parts]
        for function in self.functions if pairs else ():
            if function.name in names:
                raise ConfigError(
                    f"data.reward_functions: {function.name} is also a part of {self.task_name}.reward; rename one"
                )
            for index, value in enumerate(self.function_values(function, pairs)):
                parts[index][function.name] = value
                totals[index] += function.weight * value
        self.report(len(pairs))
        graded = iter(
            replace(episode, reward=0.0 if zero_truncated and not episode.finished else total, reward_parts=given)
            for (_, episode), total, given in zip(pairs, totals, parts, strict=True)
        )
        graded_groups = [replace(group, episodes=tuple(islice(graded, len(group.episodes)))) for group in groups]
        return graded_groups, {"rewards/errors": float(sum(self.faults.values()))}

    def task_parts(self, text: str, row: dict) -> dict[str, float]:
        """The task's own reward of one completion in its parts; all 0 after an error."""
        name = f"{self.task_name}.reward"
        # a copy: the next completion must be graded against the same row
        given = guarded(lambda: self.task.reward(text, copy.deepcopy(row)), self.data.reward_timeout)
        number = number_of(given)
        if isinstance(given, dict):
            parts = self.check_parts(given)
        elif number is not None:
            parts = {"reward": number, "answer": float(number >= 1)}
        else:
            wrong = Fault(f"returned {short_repr(given)}, not a dict or a number")
            self.note(name, given if isinstance(given, Fault) else wrong, 1)
            return {"reward": 0.0, "answer": 0.0}
        for part, value in parts.items():
            if not abs(value) < LARGEST:  # NaN too
                self.note(name, Fault(f"gave {part} = {value}, not a finite number"), 1)
                return dict.fromkeys(parts, 0.0)
        return parts

    def check_parts(self, given: dict) -> dict[str, float]:
        """The parts as floats. A dict that is made wrong is an error at once, whatever data.on_reward_error says."""
        for part in ("reward", "answer"):
            if part not in given:
                raise ConfigError(
                    f'{self.task_name}.reward must return a dict with "reward" and "answer", or a number; its dict has '
                    f"no {part}"
                )
        parts = {}
        for part, value in given.items():
            if part in RESERVED_NAMES - {"reward", "answer"}:
                raise ConfigError(f"{self.task_name}.reward: the part {part} is a metric of the loop; rename it")
            number = number_of(value)
            if number is None:
                raise ConfigError(
                    f"{self.task_name}.reward: the part {part} is {short_repr(value)}; every part must be a number"
                )
            parts[part] = number
        return parts

    def function_values(self, function: RewardFunction, pairs: list[tuple]) -> list[float]:
        """One call of a reward function for all completions; 0 where it went wrong."""
        if self.columns is None:
            self.check_columns([problem.reference for problem, _ in pairs])

        def call():
            rows = [copy.deepcopy(problem.reference) for problem, _ in pairs]
            keywords = {column: [row.get(column) for row in rows] for column in self.columns or ()}
            keywords |= {"completions": [e.text for _, e in pairs], "prompts": [p.prompt_text for p, _ in pairs]}
            if function.accepted is not None:
                keywords = {name: values for name, values in keywords.items() if name in function.accepted}
            values = function.call(**keywords)
            if isinstance(values, str | bytes | dict | set):
                raise TypeError(f"returned {short_repr(values)}, not a list of numbers")
            values = list(islice(values, len(pairs) + 1))  # here, for what is computed lazily
            if len(values) != len(pairs):
                found = "more" if len(values) > len(pairs) else str(len(values))
                raise ValueError(f"returned {found} values for {len(pairs)} completions")
            return values

        values = guarded(call, self.data.reward_timeout)
        if isinstance(values, Fault):
            self.note(function.name, values, len(pairs))
            return [0.0] * len(pairs)
        numbers = []
        for value in values:
            number = number_of(value)
            if number is None or not abs(number) < LARGEST:
                self.note(function.name, Fault(f"returned {short_repr(value)}, not a finite number"), 1)
                number = 0.0
            numbers.append(number)
        return numbers

    def note(self, name: str, fault: Fault, completions: int) -> None:
        """Count what went wrong, or stop the run."""
        if self.data.on_reward_error == "stop":
            logger.error(f"{name}: {fault.text}\n{fault.details}".rstrip())
            raise ConfigError(f"{name}: {fault.text}; correct it, or go on with reward 0 by data.on_reward_error: zero")
        # tracebacks of one error can differ, in the line that was running when the time was over
        known = next((key for key in self.faults if (key[0], key[1].text) == (name, fault.text)), (name, fault))
        self.faults[known] = self.faults.get(known, 0) + completions

    def report(self, completions: int) -> None:
        """One warning for each different error of the step, the most frequent first."""
        self.errors += sum(self.faults.values())
        ranked = sorted(self.faults.items(), key=lambda item: -item[1])
        for (name, fault), count in ranked[:SHOWN_ERRORS]:
            logger.warning(
                f"{name}: {fault.text} (reward 0 for {count} of {completions} completions; {self.errors} reward errors "
                f"so far)\n{fault.details}".rstrip()
            )
        if len(ranked) > SHOWN_ERRORS:
            logger.warning(f"and {len(ranked) - SHOWN_ERRORS} other reward errors in this step")
