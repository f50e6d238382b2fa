"""What tasks share: rows from data.path or the hub, their checks, and tasks from files of the user's own."""

import hashlib
import os
import random
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import ClassVar

from src.config import ConfigError, DataConfig
from src.tasks.guard import load_file, said_of
from src.tasks.rows import keep_tenth, open_source

MAX_EVAL_SIZE = 1000
SPLITS = ("train", "validation", "test")  # of generated problems
GENERATED_EVAL_SIZE = 256
HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON can hold half a surrogate pair, a tokenizer cannot
TASK_FILE = "data.task_file"
SYSTEM_PROMPT = (
    "You are a helpful assistant. You first think about the reasoning process in your mind "
    "and then provide the user with the answer."
)
RESPONSE_PREFIX = "Let me solve this step by step.\n<think>"


class Task:
    """Rows from data.path or the hub, and one user message. A task of your own may inherit this, but need not."""

    hub_id: str | None = None  # where the rows come from without data.path
    hub_subset: str | None = None
    eval_hub_id: str | None = None
    columns: ClassVar[dict] = {}  # config key -> names of that column in the source; rows have it by the first name
    system_prompt, response_prefix = SYSTEM_PROMPT, RESPONSE_PREFIX
    user_prompt = "{prompt}"  # filled from the row
    offline = False
    side_of: Callable[[dict], str] | None = None  # row -> split, for a source that is not divided

    def __init__(self, data: DataConfig):
        self.data = data

    def load(self, split: str) -> list[dict]:
        """The rows of a split, every one checked."""
        data, held_out = self.data, split != self.data.train_split
        train_source = data.path or self.hub_id
        eval_source = data.eval_path or (None if data.path else self.eval_hub_id) or train_source
        source, shared = eval_source if held_out else train_source, eval_source == train_source
        if source is None:
            raise ConfigError(f"{type(self).__name__} has no problems of its own; name a source in data.path")
        required = bool(data.subset or not data.path) and (shared or not held_out)
        parts = open_source(source, data.subset or self.hub_subset, required)
        is_file = os.path.isfile(os.path.expanduser(source))
        undivided = list(parts) == ["train"] and (is_file or self.side_of or (held_out and not shared))
        if split not in parts and not undivided:
            raise ConfigError(
                f"{source}: there is no split {split}, only {', '.join(parts)}; set data.train_split or "
                f"data.eval_split, or data.eval_path to another source"
            )
        own_names = held_out and not shared
        rows = [self.checked(place, row, own_names) for place, row in parts["train" if undivided else split]]
        if undivided and shared and self.side_of:
            rows = [row for row in rows if self.side_of(row) == split]
        elif undivided and shared:
            rows = keep_tenth(rows, self.columns.get("prompt_column", (None,))[0], held_out)
        if not rows:
            raise ConfigError(f"{source}: there are no rows for split {split}; name another split or another source")
        self.divided_here = bool(undivided and shared)
        return rows

    def checked(self, place: str, row: dict, own_names: bool) -> dict:
        """The prepared row, its columns renamed; `own_names`: they may be called as the task does, not the config."""
        renamed = dict(row)
        try:
            for key, own in self.columns.items():
                configured = getattr(self.data, key)
                names = ((configured,) if configured else ()) + (own if own_names or not configured else ())
                found = [row[name] for name in names if row.get(name) is not None]
                if not found:
                    raise ConfigError(
                        f"there is no column {' or '.join(names)} with a value, only {', '.join(row)}; "
                        f"name it in data.{key}"
                    )
                renamed[own[0]] = found[0]
            return self.prepare(renamed)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error

    def prepare(self, row: dict) -> dict:
        """The row as the other methods want it, or a ConfigError."""
        return row

    def messages(self, row: dict) -> list[dict]:
        """The chat that asks: the system message of the config, or else of the task, and user_prompt."""
        system = self.system_prompt if self.data.system_prompt is None else self.data.system_prompt
        user = self.user_prompt.format(**row)
        return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]


def split_of_text(text: str) -> str:
    """The split that generated problems with this text belong to, by its hash: a tenth each, test and validation."""
    digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
    return {0: "test", 1: "validation"}.get(digest[0] % 10, "train")


def is_text(value) -> bool:
    """Whether it is a text that a tokenizer can read."""
    return isinstance(value, str) and not HALF_PAIR.search(value)


def text_of(row: dict, column: str) -> str:
    """The column's text, or a ConfigError; a number counts as text, since that depends on the file's format."""
    value = row[column]
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not is_text(text) or not text.strip():
        raise ConfigError(f"column {column} must be a text that is not empty, not {value!r:.80}")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Tasks of the user's own
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def in_user_code(module: str, doing: str):
    """What data.task_file raises becomes one sentence with file and line; errors of our own tasks pass as they are."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        if not module.startswith(TASK_FILE):
            raise
        raise ConfigError(said_of(error, sys.modules[module].__file__, doing)) from error


def own_tasks(file: str) -> dict[str, type]:
    """The classes that a Python file defines."""
    module = load_file(file, TASK_FILE)
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: value for name, value in classes.items() if value.__module__ == module.__name__}


def load_split(task, split: str) -> list[dict]:
    """The rows of a split; what a task of the user's own returns is checked."""
    name, data = type(task).__name__, task.data
    if data.eval_path and data.train_split == data.eval_split:
        raise ConfigError(f"data.train_split and eval_split are both {split}, so data.eval_path would not be read")
    with in_user_code(type(task).__module__, f"{name}.load({split!r})"):
        rows = list(task.load(split))
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"data.task_file: {name}.load({split!r}) must return a list of at least one dict")
    return rows


def load_train_rows(task) -> list[dict]:
    """All rows of data.train_split."""
    return load_split(task, task.data.train_split)


def load_eval_rows(task) -> list[dict]:
    """The fixed evaluation rows: data.eval_size rows of data.eval_split, drawn by data.seed alone."""
    rows = load_split(task, task.data.eval_split)
    if getattr(task, "eval_is_generated", False):
        return rows
    random.Random(f"evaluation {task.data.seed}").shuffle(rows)
    share = 1 if getattr(task, "divided_here", False) else 10  # not a tenth of a tenth
    return rows[: task.data.eval_size or max(1, min(MAX_EVAL_SIZE, len(rows) // share))]
