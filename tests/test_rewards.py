"""Rewards: what a completion earns, and that code of the user cannot end or poison a run."""

import logging
import math
import signal
import textwrap
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from src.config import ConfigError, DataConfig
from src.records import Episode, Group, Problem
from src.tasks import Rewards, guard
from src.tasks.guard import RewardTimeout, guarded, limited, number_of


class Counting:
    """A task whose reward is the length of the text, right when it is the row's number."""

    def reward(self, text, row):
        return {"reward": float(len(text)), "answer": float(text == str(row["number"])), "letters": text.isalpha()}


def task_of(function):
    """A task with this reward(text, row)."""
    return type("Own", (), {"reward": lambda self, text, row: function(text, row)})()


def groups_of(*texts: list[str], rows=None, finished=True) -> list[Group]:
    rows = rows or [{"number": 10 + index} for index in range(len(texts))]
    return [
        Group(
            Problem(index, (1, 2), f"prompt {index}", row),
            tuple(Episode((7,) * len(text), (0.0,) * len(text), finished, text) for text in group),
        )
        for index, (group, row) in enumerate(zip(texts, rows, strict=True))
    ]


def of_episodes(groups, field: str) -> list:
    return [getattr(episode, field) for group in groups for episode in group.episodes]


def graded(task, data: DataConfig, *texts: list[str], **more) -> tuple[list[float], list[dict], list[int]]:
    """Rewards, parts and errors of every completion."""
    groups = Rewards(task, data).grade(groups_of(*texts, **more))
    return tuple(of_episodes(groups, field) for field in ("reward", "reward_parts", "reward_errors"))


@pytest.fixture
def functions_file(tmp_path):
    """Writes a file of reward functions and returns DataConfig keys that name them."""

    def write(code: str, *names: str, **more) -> DataConfig:
        (tmp_path / "own.py").write_text(textwrap.dedent(code), encoding="utf-8")
        return DataConfig(reward_functions=[f"{tmp_path / 'own.py'}:{name}" for name in names], **more)

    return write


@contextmanager
def within(seconds: float):
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    caplog.set_level(logging.INFO, "grpo")
    return caplog


# --- totals and parts -------------------------------------------------------------------------------------------------


def test_every_completion_gets_its_own_reward_and_parts():
    given = groups_of(["abc", "10"], ["12345", "11"])
    groups = Rewards(Counting(), DataConfig()).grade(given)
    assert [group.problem for group in groups] == [group.problem for group in given]
    assert of_episodes(groups, "text") == ["abc", "10", "12345", "11"]
    assert of_episodes(groups, "reward") == [3.0, 2.0, 5.0, 2.0]
    parts = [(3.0, 0.0, 1.0), (2.0, 1.0, 0.0), (5.0, 0.0, 0.0), (2.0, 1.0, 0.0)]
    names = ("reward", "answer", "letters")
    assert of_episodes(groups, "reward_parts") == [dict(zip(names, values, strict=True)) for values in parts]
    assert of_episodes(groups, "reward_errors") == [0] * 4


def test_a_plain_number_is_the_reward_and_right_from_one_on():
    values = {"a": 0.99, "b": 1, "c": True, "d": np.float32(2.5), "e": torch.tensor(-1.0)}
    rewards, parts, _ = graded(task_of(lambda text, row: values[text]), DataConfig(), list("abcde"))
    assert rewards == pytest.approx([0.99, 1.0, 1.0, 2.5, -1.0])
    assert [given["answer"] for given in parts] == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_the_task_weighs_one_and_each_function_one_unless_said_otherwise(functions_file):
    code = """
        def capitals(completions):
            return [sum(letter.isupper() for letter in text) for text in completions]
        def loss(completions, **rest):
            return [sum(letter in "aeiou" for letter in text) for text in completions]
        """
    data = functions_file(code, "capitals", "loss", reward_weights=[10.0, -1.0])
    rewards, parts, _ = graded(Counting(), data, ["ABe", "aaaa"])
    assert rewards == [3 + 10 * 2 - 1, 4 + 0 - 4]
    assert parts[0] == {"reward": 3.0, "answer": 0.0, "letters": 1.0, "capitals": 2.0, "loss": 1.0}
    assert graded(Counting(), functions_file(code, "capitals", "loss"), ["ABe"])[0] == [3 + 2 + 1]


def test_truncated_completions_get_zero_and_keep_their_parts():
    rewards = Rewards(Counting(), DataConfig())
    for finished, zero_truncated, reward in ((False, True, 0.0), (False, False, 3.0), (True, True, 3.0)):
        groups = rewards.grade(groups_of(["abc"], finished=finished), zero_truncated)
        assert of_episodes(groups, "reward") == [reward]
        assert of_episodes(groups, "reward_parts") == [{"reward": 3.0, "answer": 0.0, "letters": 1.0}]


def test_a_part_that_a_completion_lacks_is_zero():
    task = task_of(lambda text, row: {"reward": 1, "answer": 1} | ({"loss": 2} if text == "b" else {}))
    assert [given["loss"] for given in graded(task, DataConfig(), ["a", "b"])[1]] == [0.0, 2.0]


def test_without_completions_no_function_is_called(functions_file, log):
    data = functions_file("def one(completions): raise AssertionError", "one")
    assert Rewards(Counting(), data).grade([]) == [] and log.records == []


# --- what a function is given -----------------------------------------------------------------------------------------


def test_a_function_is_called_once_with_columns_for_every_completion(functions_file):
    data = functions_file(
        """
        calls = []
        def everything(**given):
            calls.append(given)
            return [0] * len(given["completions"])
        def some(prompts, number, other="default"):
            calls.append((prompts, number, other))
            return [0] * len(prompts)
        """,
        "everything",
        "some",
    )
    rewards = Rewards(Counting(), data)
    rows = [{"number": 1, "hint": "h"}, {"number": 2, "level": [3]}]
    rewards.grade(groups_of(["a", "b"], ["c", "d"], rows=rows))
    everything, some = rewards.functions[0].call.__globals__["calls"]
    assert everything == {
        "completions": ["a", "b", "c", "d"], "prompts": ["prompt 0", "prompt 0", "prompt 1", "prompt 1"],
        "number": [1, 1, 2, 2], "hint": ["h", "h", None, None], "level": [None, None, [3], [3]],
    }  # fmt: skip
    assert some == (everything["prompts"], [1, 1, 2, 2], "default")


def test_columns_are_those_of_the_whole_data_set_when_it_was_checked(functions_file):
    rewards = Rewards(Counting(), functions_file("def own(completions, hint): return [h is None for h in hint]", "own"))
    rewards.check_columns([{"number": 1}, {"number": 2, "hint": "h"}])
    assert of_episodes(rewards.grade(groups_of(["a"], rows=[{"number": 1}])), "reward") == [2.0]
    with pytest.raises(ConfigError, match="own needs hint, which no row has; it can have: completions, prompts, n"):
        rewards.check_columns([{"number": 1}])
    with pytest.raises(ConfigError, match="own needs hint"):
        Rewards(Counting(), rewards.data).grade(groups_of(["a"]))


def test_a_reward_cannot_change_the_row_for_the_next_one(functions_file):
    seen = []

    def greedy(text, row):
        seen.append(list(row["nums"]))
        row["nums"].append(99)
        row["new"] = 1
        return 0

    data = functions_file(
        """
        def spoil(completions, nums):
            for numbers in nums:
                numbers.append(1)
            completions.clear()
            return [len(numbers) for numbers in nums]
        def count(completions, nums):
            return [len(numbers) for numbers in nums]
        """,
        "spoil",
        "count",
    )
    row = {"nums": [1, 2]}
    _, parts, _ = graded(task_of(greedy), data, ["a", "b"], rows=[row])
    assert seen == [[1, 2], [1, 2]] and row == {"nums": [1, 2]}
    assert [(given["spoil"], given["count"]) for given in parts] == [(3.0, 2.0)] * 2


@pytest.mark.parametrize(
    "result", ["np.array([1.5, 2])", "torch.tensor([1.5, 2])", "(x for x in (1.5, 2))", "(1.5, 2)"]
)
def test_any_sequence_of_numbers_will_do(functions_file, result):
    data = functions_file(f"import torch\nimport numpy as np\ndef own(completions): return {result}", "own")
    assert [given["own"] for given in graded(Counting(), data, ["a", "b"])[1]] == [1.5, 2.0]


def test_what_is_a_number():
    good = [True, 3, 2.5, np.int64(4), np.bool_(True), np.array(1.5), torch.tensor(2.0), torch.tensor([3.0])]
    assert [number_of(value) for value in good] == [1.0, 3.0, 2.5, 4.0, 1.0, 1.5, 2.0, 3.0]
    bad = [None, "1", b"1", [1.0], {}, 1j, torch.ones(2), np.ones(2), 10**400, object()]
    assert [number_of(value) for value in bad] == [None] * len(bad)


# --- errors of the user's code ----------------------------------------------------------------------------------------


class Nasty(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raising(error):
    def function(text, row):
        if text == "bad":
            raise error
        return {"reward": 1.0, "answer": 1.0, "format": 1.0}

    return function


@pytest.mark.parametrize(
    ("error", "text"),
    [(ValueError("boom"), "ValueError: boom"), (SystemExit(3), "SystemExit: 3"), (GeneratorExit(), "GeneratorExit: "),
     (RecursionError("deep"), "RecursionError: deep"), (Nasty(), "Nasty: (its text cannot be shown)")],
)  # fmt: skip
def test_an_error_costs_its_own_completion_only_and_is_logged_once(error, text, log):
    rewards, parts, errors = graded(task_of(raising(error)), DataConfig(), ["good", "bad"], ["bad", "good"])
    zero, one = {"reward": 0.0, "answer": 0.0, "format": 0.0}, {"reward": 1.0, "answer": 1.0, "format": 1.0}
    assert (rewards, parts, errors) == ([1.0, 0.0, 0.0, 1.0], [one, zero, zero, one], [0, 1, 1, 0])
    (record,) = log.records
    assert record.levelno == logging.WARNING
    first, *trace = record.getMessage().splitlines()
    assert first == f"Own.reward: {text} (reward 0 for 2 of 4 completions; 2 reward errors so far)"
    assert trace[0].startswith("Traceback") and "in function" in record.getMessage()


def test_errors_are_those_of_their_call_and_the_warning_counts_them_all(log):
    rewards = Rewards(task_of(raising(ValueError("boom"))), DataConfig())
    first, second, third = (rewards.grade(groups_of(texts)) for texts in (["bad"] * 2, ["bad"] * 3, ["good"]))
    assert [sum(of_episodes(groups, "reward_errors")) for groups in (first, second, third)] == [2, 3, 0]
    assert rewards.errors == 5
    assert [record.getMessage().partition("; ")[2].splitlines()[0] for record in log.records] == [
        "2 reward errors so far)",
        "5 reward errors so far)",
    ]


def test_every_part_that_went_wrong_counts(functions_file):
    data = functions_file("def one(completions): 1 / 0\ndef two(completions): return [None, 1]", "one", "two")
    rewards, parts, errors = graded(task_of(raising(ValueError())), data, ["bad", "good"])
    assert (rewards, errors) == ([0.0, 2.0], [3, 1])
    assert parts[0] == {"reward": 0.0, "answer": 0.0, "format": 0.0, "one": 0.0, "two": 0.0}


def test_many_different_errors_do_not_flood_the_log(log):
    def fail(text, row):
        raise ValueError(text * 10_000)

    graded(task_of(fail), DataConfig(), [f"{n} " for n in range(50)] + ["7 "])
    assert len(log.records) == 4
    assert "7 7 7" in log.records[0].getMessage(), "the most frequent first"
    assert log.records[-1].getMessage() == "and 47 other reward errors in this step"
    assert all(len(record.getMessage().splitlines()[0]) < 500 for record in log.records)
    assert all(len(record.getMessage()) < 5000 for record in log.records)


def test_a_keyboard_interrupt_and_a_config_error_are_for_the_user():
    for error in (KeyboardInterrupt(), ConfigError("install the library")):
        with pytest.raises(type(error)):
            graded(task_of(raising(error)), DataConfig(), ["bad"])


@pytest.mark.parametrize("value", [None, "1.0", [1.0], float("nan"), float("inf"), -float("inf"), 1e200])
def test_a_wrong_value_of_the_task_counts_zero(value):
    task = task_of(lambda text, row: value if text == "bad" else 1)
    zero, one = {"reward": 0.0, "answer": 0.0}, {"reward": 1.0, "answer": 1.0}
    assert graded(task, DataConfig(), ["bad", "good"]) == ([0.0, 1.0], [zero, one], [1, 0])


@pytest.mark.parametrize("part", ["reward", "answer", "format"])
def test_a_part_that_is_not_finite_makes_all_parts_zero(part):
    good = {"reward": 1.0, "answer": 1.0, "format": 1.0}
    task = task_of(lambda text, row: good | {part: math.nan})
    assert graded(task, DataConfig(), ["a"]) == ([0.0], [dict.fromkeys(good, 0.0)], [1])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"reward": 1.0},
            'Own.reward must return a dict with "reward" and "answer", or a number; its dict has no answ',
        ),
        ({"answer": 1.0}, "its dict has no reward"), ({}, "its dict has no reward"),
        ({"reward": None, "answer": 1}, "Own.reward: the part reward is None; every part must be a number"),
        ({"reward": 1, "answer": "yes"}, "the part answer is 'yes'"),
        ({"reward": 1, "answer": 1, "why": []}, r"the part why is \[\]"),
    ],
)  # fmt: skip
def test_a_task_that_is_written_wrong_is_a_sentence(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        graded(task_of(lambda text, row: given), DataConfig(), ["a"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('boom')", "ValueError: boom"), ("raise SystemExit(0)", "SystemExit: 0"),
        ("return [1.0]", "returned 1 values for 3 completions"), ("return []", "returned 0 values for 3 completions"),
        ("return [1.0] * 4", "returned more values for 3 completions"),
        ("return __import__('itertools').repeat(1.0)", "returned more values for 3 completions"),
        ("return None", "NoneType"), ("return 1.0", "float"),
        ("return 'abc'", "returned 'abc', not a list of numbers"),
        ("return dict.fromkeys(completions, 1.0)", "not a list of numbers"),
    ],
)  # fmt: skip
def test_a_call_that_fails_costs_all_completions_this_part_only(functions_file, log, body, words):
    data = functions_file(f"def own(completions):\n    {body}\ndef one(completions): return [1, 1, 1]", "own", "one")
    rewards, parts, errors = graded(Counting(), data, ["a", "bb"], ["ccc"])
    assert (rewards, errors) == ([2.0, 3.0, 4.0], [1, 1, 1])
    assert [(given["own"], given["one"]) for given in parts] == [(0.0, 1.0)] * 3
    (record,) = log.records
    assert record.getMessage().startswith("own: ") and words in record.getMessage()
    assert "(reward 0 for 3 of 3 completions" in record.getMessage()


def test_single_wrong_values_cost_their_completion_only(functions_file, log):
    code = "def own(completions): return [2, None, float('nan'), '3', float('inf'), [1], 5]"
    data = functions_file(code, "own", reward_weights=[2.0])
    rewards, _, errors = graded(task_of(lambda text, row: 1), data, list("abcdefg"))
    assert (rewards, errors) == ([5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 11.0], [0, 1, 1, 1, 1, 1, 0])
    assert "own: returned None, not a finite number (reward 0 for 1 of 7" in log.text


def test_stop_ends_the_run_with_a_sentence_and_the_traceback(functions_file, log):
    task = task_of(raising(ValueError("two\nlines")))
    with pytest.raises(ConfigError, match=r"^Own.reward: ValueError: two lines; .*data.on_reward_error: zero$"):
        graded(task, DataConfig(on_reward_error="stop"), ["bad"])
    assert "Traceback" in log.text and log.records[0].levelno == logging.ERROR
    data = functions_file("def own(completions): return [None]", "own", on_reward_error="stop")
    with pytest.raises(ConfigError, match="own: returned None, not a finite number"):
        graded(Counting(), data, ["a"])


# --- hanging ----------------------------------------------------------------------------------------------------------


def sleep_for_ever():
    while True:
        time.sleep(60)


def swallow_exceptions():
    while True:
        try:
            time.sleep(60)
        except Exception as error:
            raise AssertionError("the timeout was caught") from error


def compute_for_ever():
    while True:
        pass


def backtrack():
    __import__("re").match(r"(a+)+$", "a" * 50 + "b")


def wait_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@pytest.mark.parametrize("function", [sleep_for_ever, swallow_exceptions, compute_for_ever, backtrack, wait_for_a_lock])
def test_a_call_that_hangs_is_broken(function):
    before = signal.getsignal(signal.SIGALRM)
    with within(10), pytest.raises(RewardTimeout):
        limited(function, 0.02)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_call_that_is_broken_may_clean_up_first():
    done = []

    def careful():
        try:
            time.sleep(60)
        finally:
            time.sleep(0.01)
            done.append(True)

    with pytest.raises(RewardTimeout):
        limited(careful, 0.02)
    assert done == [True]


def test_handler_and_timer_are_as_before():
    def handler(number, frame):
        raise AssertionError

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 100, 7)
    try:
        assert limited(lambda: 5, 1) == 5
        with pytest.raises(RewardTimeout):
            limited(swallow_exceptions, 0.02)
        state = (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert state[0] is handler
    assert 90 < state[1][0] <= 100 and state[1][1] == 7


def test_an_alarm_after_the_call_reaches_nobody(monkeypatch):
    """The call returns while its alarm is due: it must be a result or a timeout, never an error elsewhere."""
    monkeypatch.setattr(guard, "SECONDS_BETWEEN", 1e-4)
    outcomes = []
    for turn in range(300):
        started = time.perf_counter()

        def call(started=started, turn=turn):
            while time.perf_counter() - started < 1e-4 + turn * 1e-6:
                pass
            return "result"

        try:
            outcomes.append(limited(call, 2e-4))
        except RewardTimeout:
            outcomes.append("timeout")
    assert set(outcomes) == {"result", "timeout"}
    time.sleep(0.01)  # a timer that is still running would end this process now


def test_a_hanging_call_costs_its_own_completions_or_its_part(functions_file, log, monkeypatch):
    monkeypatch.setattr(guard, "REWARD_SECONDS", 0.05)
    task = task_of(lambda text, row: swallow_exceptions() if text == "bad" else 1)
    data = functions_file("import time\ndef own(completions):\n    time.sleep(60)", "own")
    with within(10):
        rewards, _, errors = graded(task, data, ["bad", "good", "bad"])
    assert (rewards, errors) == ([0.0, 1.0, 0.0], [2, 1, 2])
    of_function, of_task = (record.getMessage() for record in log.records)  # though the tracebacks may differ
    assert of_function.startswith("own: took longer than 0.05 s (reward 0 for 3 of 3")
    assert of_task.startswith("Own.reward: took longer than 0.05 s (reward 0 for 2 of 3")
    assert "swallow_exceptions" in of_task, "where it hung"


def test_outside_the_main_thread_there_is_no_limit_and_that_is_said_once(log, monkeypatch):
    guard.warn_of_no_limit.cache_clear()
    monkeypatch.setattr(guard, "REWARD_SECONDS", 0.01)
    results = []
    work = threading.Thread(
        target=lambda: results.extend(guarded(lambda: time.sleep(0.03) or "done") for _ in range(2))
    )
    work.start()
    work.join()
    assert results == ["done", "done"]
    assert [record.getMessage() for record in log.records] == [
        "rewards are not graded in the main thread: a call that hangs cannot be broken"
    ]


# --- what is wrong before a model is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "sentence"),
    [
        ("def own(completions: return", "own", "own.py line 1: the file cannot be imported: SyntaxError: invalid syn"),
        ("\n\nimport not_there_at_all", "own", "own.py line 3: .* ModuleNotFoundError: No module named 'not_there"),
        ("\nraise SystemExit(3)", "own", "own.py line 2: the file cannot be imported: SystemExit: 3"),
        ("def short(completions): return []\nx = 1", "own", "own is not there; functions of .*own.py are: short$"),
        ("own = 3", "own", "own is not a function; functions of .*own.py are: none$"),
        ("def own(completions, /): return []", "own", "completions must be a keyword; remove the /"),
        (
            "def answer(completions): return []",
            "answer",
            "answer is a part of every task's reward, and rewards are log",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_a_sentence(functions_file, code, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Rewards(Counting(), functions_file(code, name))


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("missing.py:own", "data.reward_functions: missing.py is not a Python file; name one that is there"),
        ("README.md:own", "README.md is not a Python file"),
        ("own.py", "data.reward_functions: own.py: write it as file.py:function"),
        ("own.py:", "write it as file.py:function"), (":own", "write it as file.py:function"),
    ],
)  # fmt: skip
def test_an_entry_that_names_nothing_is_a_sentence(entry, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Rewards(Counting(), DataConfig(reward_functions=[entry]))


def test_weights_and_names_have_to_fit(functions_file):
    code = "def own(completions): return [0]\nletters = own"
    with pytest.raises(ConfigError, match=r"data.reward_weights has 2 values and data.reward_functions 1"):
        Rewards(Counting(), functions_file(code, "own", reward_weights=[1.0, 2.0]))
    with pytest.raises(ConfigError, match=r"data.reward_weights has 1 values and data.reward_functions 0"):
        Rewards(Counting(), DataConfig(reward_weights=[1.0]))
    with pytest.raises(ConfigError, match="own is given twice"):
        Rewards(Counting(), functions_file(code, "own", "own"))
    with pytest.raises(ConfigError, match=r"letters is also a part of Counting.reward; rename it"):
        graded(Counting(), functions_file(code, "letters"), ["a"])


def test_a_file_may_hold_dataclasses_is_imported_once_and_found_from_the_working_directory(
    functions_file, tmp_path, monkeypatch
):
    data = functions_file(
        f"""
        from __future__ import annotations
        from dataclasses import dataclass
        from pathlib import Path
        @dataclass
        class Word:
            text: str
        with Path({str(tmp_path / "imports")!r}).open("a") as file:
            file.write("x")
        def one(completions): return [len(Word(text).text) for text in completions]
        def two(completions): return one(completions)
        """,
        "one",
        "two",
    )
    assert graded(Counting(), data, ["abc"])[0] == [9.0]
    assert (tmp_path / "imports").read_text() == "x"
    monkeypatch.chdir(tmp_path)
    assert graded(Counting(), DataConfig(reward_functions=["own.py:one"]), ["abc"])[0] == [6.0]
