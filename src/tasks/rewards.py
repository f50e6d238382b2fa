"""What a completion earns: the task's own reward plus reward functions from the user's files.

They work on copies, and what they return is checked. What goes wrong counts 0, is counted in `Episode.reward_errors`
and is in the log.
"""

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from reprlib import repr as short_repr  # bounded, and it survives a __repr__ that raises
from typing import TYPE_CHECKING, Any

from src.config import ConfigError, DataConfig
from src.tasks.guard import Fault, guarded, load_file, number_of

if TYPE_CHECKING:  # it imports torch, which this package does without
    from src.records import Episode, Group

logger = logging.getLogger("grpo")
SHOWN_ERRORS = 3  # different ones of a step that are logged in full
ALWAYS_PARTS = ("reward", "answer")
LARGEST = 1e30  # rewards are squared, and some arithmetic on them is in single precision


@dataclass(frozen=True)
class RewardFunction:
    """One entry of data.reward_functions."""

    name: str
    call: Callable
    weight: float
    accepted: frozenset[str] | None  # names of its keywords; None: all, it has **keywords
    required: frozenset[str]


def load_function(entry: str, weight: float, modules: dict[str, Any]) -> RewardFunction:
    """The function that `file.py:function` names, and the keywords it takes."""
    where = f"data.reward_functions: {entry}"
    path, _, name = entry.rpartition(":")
    if not path or not name:
        raise ConfigError(f"{where}: write it as file.py:function")
    if path not in modules:  # once for all of its functions
        modules[path] = load_file(path, "data.reward_functions")
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
        if names.count(name) > 1 or name in ALWAYS_PARTS:
            reason = "is given twice" if names.count(name) > 1 else "is a part of every task's reward"
            raise ConfigError(f"data.reward_functions: {name} {reason}, and rewards are logged by name; rename it")
    return functions


class Rewards:
    """The rewards of one experiment. Build it before the model: it imports the user's files.

    task.reward(text, row) gives {"reward": ..., "answer": 0 or 1, other parts} or a plain number, which is the reward,
    and the answer counts as right if it is at least 1. A reward function gets all groups in one call:
    fn(completions=[...], prompts=[...], one list for each key of the rows) -> one number for each completion.
    """

    def __init__(self, task: Any, data: DataConfig):
        self.task, self.data = task, data
        self.task_name = f"{type(task).__name__}.reward"
        self.functions = load_functions(data)
        self.columns: list[str] | None = None
        self.errors = 0  # parts that an error made 0, since the start of this process

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

    def grade(self, groups: list["Group"], zero_truncated: bool = False) -> list["Group"]:
        """Every episode with its reward, the parts it is made of, and how many of them an error made 0.

        reward = task + sum of weight x function, or 0 if it is unfinished and `zero_truncated`.
        reward_parts are what the task gave ("reward" is its own) and each function's value, unweighted, by its name.
        """
        pairs = [(group.problem, episode) for group in groups for episode in group.episodes]
        of_task = [self.task_parts(episode, problem.row) for problem, episode in pairs]
        faults = {self.task_name: [fault for _, fault in of_task]}  # one or None for each completion
        names = dict.fromkeys(name for given, _ in of_task for name in given)
        parts = [dict.fromkeys(names, 0.0) | given for given, _ in of_task]  # a part that a completion lacks is 0
        terms = [[(1.0, given["reward"])] for given in parts]  # weight and value
        for function in self.functions if pairs else ():
            if function.name in names:
                raise ConfigError(
                    f"data.reward_functions: {function.name} is also a part of {self.task_name}; rename it"
                )
            values = self.function_values(function, pairs)
            faults[function.name] = [value if isinstance(value, Fault) else None for value in values]
            for index, value in enumerate(values):
                parts[index][function.name] = 0.0 if isinstance(value, Fault) else value
                terms[index].append((function.weight, parts[index][function.name]))
        self.report(faults)
        errors = [sum(fault is not None for fault in row) for row in zip(*faults.values(), strict=True)]
        graded = []
        for (_, episode), row, given, wrong in zip(pairs, terms, parts, errors, strict=True):
            if episode.broken or (zero_truncated and not episode.finished):
                row = [(weight, 0.0) for weight, _ in row]
            total = sum(weight * value for weight, value in row)
            earned = replace(episode, reward=total, rewards=tuple(row), reward_parts=given, reward_errors=wrong)
            graded.append(earned)
        rest = iter(graded)
        return [replace(group, episodes=tuple(islice(rest, len(group.episodes)))) for group in groups]

    def task_parts(self, episode: "Episode", row: dict) -> tuple[dict[str, float], Fault | None]:
        """The task's own reward of one completion in its parts; all 0 after an error."""
        if episode.broken:
            return {"reward": 0.0, "answer": 0.0}, self.noted(self.task_name, Fault(episode.broken))
        # a copy: the next completion must be graded against the same row
        given = guarded(lambda: self.task.reward(episode.text, copy.deepcopy(row)))
        number = number_of(given)
        if isinstance(given, dict):
            parts = self.check_parts(given)
        elif number is not None:
            parts = {"reward": number, "answer": float(number >= 1)}
        else:
            wrong = (
                given if isinstance(given, Fault) else Fault(f"returned {short_repr(given)}, not a dict or a number")
            )
            return {"reward": 0.0, "answer": 0.0}, self.noted(self.task_name, wrong)
        for part, value in parts.items():
            if not abs(value) < LARGEST:  # NaN too
                wrong = Fault(f"gave {part} = {value}, not a finite number")
                return dict.fromkeys(parts, 0.0), self.noted(self.task_name, wrong)
        return parts, None

    def check_parts(self, given: dict) -> dict[str, float]:
        """The parts as floats. A dict that is made wrong is an error at once, whatever data.on_reward_error says."""
        for part in ALWAYS_PARTS:
            if part not in given:
                raise ConfigError(
                    f'{self.task_name} must return a dict with "reward" and "answer", or a number; its dict has no '
                    f"{part}"
                )
        parts = {}
        for part, value in given.items():
            number = number_of(value)
            if number is None:
                raise ConfigError(
                    f"{self.task_name}: the part {part} is {short_repr(value)}; every part must be a number"
                )
            parts[part] = number
        return parts

    def function_values(self, function: RewardFunction, pairs: list[tuple]) -> list[float | Fault]:
        """One call of a reward function for all completions; a Fault where it went wrong."""
        if self.columns is None:
            self.check_columns([problem.row for problem, _ in pairs])

        def call():
            rows = [copy.deepcopy(problem.row) for problem, _ in pairs]
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

        values = guarded(call)
        if isinstance(values, Fault):
            return [self.noted(function.name, values)] * len(pairs)
        checked: list[float | Fault] = []
        for value in values:
            number = number_of(value)
            if number is not None and abs(number) < LARGEST:
                checked.append(number)
            else:
                wrong = Fault(f"returned {short_repr(value)}, not a finite number")
                checked.append(self.noted(function.name, wrong))
        return checked

    def noted(self, name: str, fault: Fault) -> Fault:
        """The fault, or the end of the run."""
        if self.data.on_reward_error == "stop":
            logger.error(f"{name}: {fault.text}\n{fault.details}".rstrip())
            raise ConfigError(f"{name}: {fault.text}; correct it, or go on with reward 0 by data.on_reward_error: zero")
        return fault

    def report(self, faults: dict[str, list[Fault | None]]) -> None:
        """One warning for each different error, the most frequent first."""
        completions = len(faults[self.task_name])
        # tracebacks of one error can differ, in the line that was running when the time was over
        counts = Counter((name, fault.text) for name, column in faults.items() for fault in column if fault)
        details = {(name, fault.text): fault.details for name, column in faults.items() for fault in column if fault}
        self.errors += counts.total()
        for (name, text), count in counts.most_common(SHOWN_ERRORS):
            logger.warning(
                f"{name}: {text} (reward 0 for {count} of {completions} completions; {self.errors} reward errors so "
                f"far)\n{details[name, text]}".rstrip()
            )
        if len(counts) > SHOWN_ERRORS:
            logger.warning(f"and {len(counts) - SHOWN_ERRORS} other reward errors in this step")
