"""Calls of code that somebody wrote for one experiment: nothing that it does may hang or end a run.

A call is limited in time, and what it raises is a Fault, a value like any other. A file that cannot be imported is a
sentence for the user.
"""

import importlib.util
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from src.config import ConfigError

logger = logging.getLogger("grpo")
PROJECT_FOLDER = Path(__file__).resolve().parents[2]
REWARD_SECONDS = 10.0  # for a call: of the task for one completion, of a reward function for all
SECONDS_BETWEEN = 0.1


class RewardTimeout(BaseException):
    """Raised inside a call that takes too long; not an Exception, so that `except Exception` does not catch it."""


@cache  # said once
def warn_of_no_limit() -> None:
    logger.warning("rewards are not graded in the main thread: a call that hangs cannot be broken")


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
            raise RewardTimeout(f"took longer than {seconds:g} s")

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


def guarded(call: Callable[[], Any]) -> Any:
    """call() within REWARD_SECONDS, or a Fault if it raised (SystemExit too) or hung."""
    try:
        return limited(call, REWARD_SECONDS)
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
# Python files of the user's own
# ---------------------------------------------------------------------------------------------------------------------


def said_of(error: BaseException, file: str | None, doing: str) -> str:
    """An error of the user's file as one sentence, with the last line of that file which it went through."""
    lines = [place.lineno for place in traceback.extract_tb(error.__traceback__) if place.filename == file]
    reason = str(error)
    if isinstance(error, SyntaxError) and error.filename == file:
        lines, reason = [error.lineno], error.msg
    line = f" line {lines[-1]}" if lines else ""
    return f"{file}{line}: {doing}: {type(error).__name__}: {reason}"


def load_file(path: str, key: str) -> ModuleType:
    """The Python file that the config key names as a module; whatever goes wrong in it is one sentence."""
    file = next((c for c in (Path(path).expanduser(), PROJECT_FOLDER / path) if c.is_file()), None)
    if file is None or file.suffix != ".py":
        raise ConfigError(f"{key}: {path} is not a Python file; name one that is there")
    name = f"{key} {os.path.abspath(file)}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # there is one for .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # there, because dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: {said_of(error, module.__file__, 'the file cannot be imported')}") from error
    return module
